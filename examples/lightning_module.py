""" a LightningDataModule whose place in the stream goes into checkpoints. python examples/lightning_module.py """
import lightning
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from nanoarc.data import VOCAB_SIZE, ArcDataset, DataConfig
from nanoarc.workers import ArcStream

class ArcData(lightning.LightningDataModule):
    def __init__(self, cfg, num_workers=0):
        super().__init__()
        self.ds, self.num_workers, self.place = ArcDataset(cfg), num_workers, {}
    def train_dataloader(self): return self # an iterable without end: the next epoch goes on where the last one stopped
    def __iter__(self):
        stream = ArcStream(self.ds, self.trainer.global_rank, self.trainer.world_size)
        loader = StatefulDataLoader(stream, batch_size=None, num_workers=self.num_workers)
        loader.load_state_dict(self.place)
        yield from ((batch, loader.state_dict()) for batch in loader) # Lightning fetches ahead: each brings its place
    def on_before_batch_transfer(self, batch, dataloader_idx): # comes right before training_step
        batch, self.place = batch
        return batch
    def state_dict(self): return self.place
    def load_state_dict(self, state): self.place = state

class Bigram(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Embedding(VOCAB_SIZE, VOCAB_SIZE) # of the next token by this one
    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.logits(batch.idx).view(-1, VOCAB_SIZE), batch.targets.view(-1))
        self.log('loss', loss, prog_bar=True)
        return loss
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=0.1)

def main(cfg=DataConfig(shots=-1, block_size=1024, batch_tokens=4096), steps=50, out='out/lightning', resume=None):
    trainer = lightning.Trainer(max_steps=steps, accelerator='cpu', default_root_dir=out, logger=False)
    trainer.fit(Bigram(), datamodule=ArcData(cfg), ckpt_path=resume) # resume: a file in out/checkpoints

if __name__ == '__main__': main()
