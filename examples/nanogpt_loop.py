""" the loader in a plain nanoGPT loop. run it twice, the second run goes on: python examples/nanogpt_loop.py """
import json
from pathlib import Path

import torch
from torch import nn

from nanoarc.data import VOCAB_SIZE, ArcDataset, ArcLoader, DataConfig

class GPT(nn.Module):
    def __init__(self, T, C=64, n_layer=2):
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(VOCAB_SIZE, C), nn.Embedding(T, C), nn.Linear(C, VOCAB_SIZE)
        block = nn.TransformerEncoderLayer(C, 4, 4 * C, dropout=0, activation='gelu', batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, n_layer, norm=nn.LayerNorm(C), enable_nested_tensor=False)
    def forward(self, idx): # (B, T) -> logits (B, T, V)
        T = idx.shape[1]
        x = self.wte(idx) + self.wpe.weight[:T]
        return self.head(self.blocks(x, nn.Transformer.generate_square_subsequent_mask(T), is_causal=True))

def main(cfg=DataConfig(shots=-1, batching='pad', block_size=512, batch_tokens=4096), steps=30, out='out/nanogpt_loop'):
    loader, model, place = ArcLoader(ArcDataset(cfg)), GPT(cfg.block_size), Path(out, 'loader.json')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if place.exists():
        loader.load_state_dict(json.loads(place.read_text())) # the seed and a few numbers
        [x.load_state_dict(state) for x, state in zip((model, optimizer), torch.load(Path(out, 'ckpt.pt')))]
    for step in range(steps):
        x, y = loader.next_batch()[:2] # (B, T) each, y is -100 where there is no loss
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).view(-1, VOCAB_SIZE), y.view(-1))
        loss.backward()
        optimizer.step()
        print(f"step {step} | loss {loss.item():.4f}")
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save((model.state_dict(), optimizer.state_dict()), Path(out, 'ckpt.pt'))
    place.write_text(json.dumps(loader.state_dict()))

if __name__ == '__main__':
    main()
