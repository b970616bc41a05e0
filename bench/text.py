"""
how fast is the text loader? for each order and batch, in turn and on one core: whole shards by the loader; a memcpy
of the same bytes, from batches that lie in DRAM into the same ring of buffers; whole shards by build-nanogpt's
DataLoaderLite as its description has it, which makes int64 of a shard first and then hands out views. shards lie in
the page cache. medians of --rounds. usage: python bench/text.py [--rounds 7] [--tokens 100000000] [--shards 2] [--dir
DIR]. a minute on one cpu core. last line: json
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nanoarc.text import TextConfig, TextDataset, shard_bytes

MODES = {
    'shuffle 64x1024': ('shuffle', 64, 1024),
    'sequential 64x1024': ('sequential', 64, 1024),
    'shuffle 16x1024': ('shuffle', 16, 1024),
    'shuffle 8x4096': ('shuffle', 8, 4096),
    'shuffle 32x256': ('shuffle', 32, 256),
}
POOL = 256 * 2**20 # bytes, far more than any cache

class DataLoaderLite:
    """ that of build-nanogpt, by its description: a shard as int64 in memory, batches are views of it """

    def __init__(self, paths, B, T):
        self.paths, self.B, self.T, self.shard = paths, B, T, 0
        self.load()

    def load(self):
        self.tokens, self.at = torch.tensor(np.load(self.paths[self.shard]).astype(np.int32), dtype=torch.long), 0

    def next_batch(self):
        n = self.B * self.T
        buf = self.tokens[self.at : self.at + n + 1]
        x, y = buf[:-1].view(self.B, self.T), buf[1:].view(self.B, self.T)
        self.at += n
        if self.at + n + 1 > len(self.tokens):
            self.shard = (self.shard + 1) % len(self.paths)
            self.load()
        return x, y

def anon():
    """ MiB that belong to this process alone, mapped files apart """
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('RssAnon')) / 1024

def run(loader, batches, tokens):
    """ -> tokens a second """
    start = time.perf_counter()
    for _ in range(batches):
        loader.next_batch()
    return batches * tokens / (time.perf_counter() - start)

def memcpy(loader, seconds=0.3):
    """
    -> tokens a second whose idx and targets are copied, from batches that lie in DRAM into the ring of buffers of the
    loader
    """
    ring = [[x.numpy() for x in loader.next_batch()[:2]] for _ in range(3)]
    size = ring[0][0].size
    pool, rates, start = (
        [[x.copy() for x in ring[0]] for _ in range(max(POOL // (16 * size), 3))],
        [],
        time.perf_counter(),
    )
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        for i, batch in enumerate(pool):
            for to, x in zip(ring[i % 3], batch):
                np.copyto(to, x)
        rates.append(len(pool) * size / (time.perf_counter() - t))
    return median(rates)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--tokens', type=int, default=100_000_000)
    parser.add_argument('--shards', type=int, default=2)
    parser.add_argument('--dir', default='')
    args = parser.parse_args()
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results, rng = {}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.dir or None) as temp:
        for k in range(args.shards + 1):
            data = shard_bytes(rng.integers(0, 50257, args.tokens if k else 10_000, dtype=np.uint16), 'npy')
            (Path(temp) / f"edufineweb_{'train' if k else 'val'}_{k:06d}.npy").write_bytes(data)
        del data
        paths = sorted(Path(temp).glob('*_train_*'))
        for mode, (order, B, T) in MODES.items():
            cfg, n = TextConfig(temp, block_size=T, batch_tokens=B * T, order=order, val_tokens=0), B * T
            batches, before = max(len(paths) * (args.tokens // n - 1), 1), anon()
            ours = TextDataset(cfg).loader(prefetch=False)
            run(ours, batches, n) # warm
            mine = anon() - before
            rounds = []
            for _ in range(args.rounds):
                a, b, before = run(ours, batches, n), memcpy(ours), anon()
                lite = DataLoaderLite(paths, B, T)
                theirs = anon() - before
                del lite
                start = time.perf_counter() # its first shard is loaded at once, whole rounds of shards are counted
                lite = DataLoaderLite(paths, B, T)
                while lite.shard < len(paths) - 1:
                    lite.next_batch()
                while lite.at + 2 * n < len(lite.tokens): # and the last one
                    lite.next_batch()
                rounds.append((a, b, batches * n / (time.perf_counter() - start)))
                del lite
            at = []
            for k in (0, 10**12) * 50: # a start at the beginning, and far away
                start = time.perf_counter()
                other = ours.ds.loader(prefetch=False)
                other.batch = k
                other.next_batch()
                at.append(time.perf_counter() - start)
            results[mode] = {
                'tok_s': round(median(x for x, *_ in rounds)),
                'memcpy_tok_s': round(median(x for _, x, _ in rounds)),
                'lite_tok_s': round(median(x for *_, x in rounds)),
                'of_memcpy': round(median(a / b for a, b, _ in rounds), 2),
                'vs_lite': round(median(a / c for a, _, c in rounds), 1),
                'mb': round(mine, 1),
                'lite_mb': round(theirs, 1),
                'batch_1e12_of_batch_0': round(median(at[1::2]) / median(at[0::2]), 2),
            }
    table = Table(title=f"{args.shards} shards of {args.tokens:,} tokens, one core", title_justify='left')
    for name in (
        'order, batch',
        'tokens / s',
        'memcpy',
        'of memcpy',
        'lite',
        'x',
        'memory',
        'its memory',
        'batch 10^12',
    ):
        table.add_column(name, justify='left' if name == 'order, batch' else 'right', no_wrap=True)
    for mode, x in results.items():
        table.add_row(
            mode,
            *(f"{x[key] / 1e6:,.0f} M" for key in ('tok_s', 'memcpy_tok_s')),
            f"{x['of_memcpy']:.0%}",
            f"{x['lite_tok_s'] / 1e6:,.0f} M",
            f"{x['vs_lite']:.1f}",
            f"{x['mb']:.0f} MB",
            f"{x['lite_mb']:,.0f} MB",
            f"{x['batch_1e12_of_batch_0']:.2f}",
        )
    Console(width=110).print(table)
    print(json.dumps(results))

if __name__ == '__main__':
    main()
