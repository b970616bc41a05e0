"""
torch's DataLoader over single documents, and torchdata's StatefulDataLoader over whole batches, which resumes.
python examples/dataloader.py
"""
import json

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from nanoarc.data import ArcDataset, DataConfig
from nanoarc.workers import ArcStream

CONFIG = DataConfig(shots=-1, batching='pack', block_size=1024, batch_tokens=4096)

def main(cfg=CONFIG, n=4, num_workers=2, context=None):
    ds = ArcDataset(cfg)
    workers = {'num_workers': num_workers, 'multiprocessing_context': context}

    # 1. map style: ds[t] is document t, padded to block_size. no shuffle=True is needed, the order is random already
    for i, batch in zip(range(n), DataLoader(ds, batch_size=8, collate_fn=ds.collate, **workers)):
        n_loss = (batch.targets != -100).sum().item()
        print(f"documents {8 * i}..{8 * i + 7} | idx {tuple(batch.idx.shape)} | {n_loss} tokens carry loss")

    # 2. the stream makes the batches of the config itself, hence batch_size=None: packed here, as ArcLoader's are
    loader = StatefulDataLoader(ArcStream(ds), batch_size=None, **workers)
    batches = iter(loader)
    for _ in range(n):
        next(batches)
    state = json.dumps(loader.state_dict()) # between any two batches. what workers have ready by then is not lost
    first = [next(batches) for _ in range(n)]
    loader = StatefulDataLoader(ArcStream(ds), batch_size=None, **workers) # with as many workers as before
    loader.load_state_dict(json.loads(state))
    same = all(torch.equal(x.idx, y.idx) for x, y in zip(first, loader))
    print(f"batches {n}..{2 * n - 1} | idx {tuple(first[0].idx.shape)} | the same after resuming: {same}")
    return same

if __name__ == '__main__':
    main()
