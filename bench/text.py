"""
how fast is the text loader? for each order and shape of batches, in turn and on one core: whole shards by the loader; a
memcpy of the same bytes, from batches that lie in DRAM into the loader's ring of buffers; whole shards by
build-nanogpt's DataLoaderLite as its description has it, which makes int64 of a shard first and then hands out views.
shards lie in the page cache. medians of --rounds. last line: json. a minute on one cpu core.
usage: python bench/text.py [--rounds 7] [--tokens 100000000] [--shards 2] [--dir DIR]
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

MODES = [('shuffle', 64, 1024), ('sequential', 64, 1024), ('shuffle', 16, 1024), ('shuffle', 8, 4096),
         ('shuffle', 32, 256)] # order, rows, block_size
POOL = 256 * 2**20 # bytes, far more than any cache

class DataLoaderLite:
    """ that of build-nanogpt, by its description: a shard as int64 in memory, batches are views of it """

    def __init__(self, paths, B, T):
        self.paths, self.B, self.T, self.shard = paths, B, T, 0
        self.load()

    def load(self):
        self.tokens = torch.tensor(np.load(self.paths[self.shard]).astype(np.int32), dtype=torch.long)
        self.at = 0

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
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024

def run(loader, batches, tokens):
    """ -> tokens a second """
    start = time.perf_counter()
    for _ in range(batches):
        loader.next_batch()
    return batches * tokens / (time.perf_counter() - start)

def run_lite(paths, B, T, batches):
    """ -> tokens a second of whole shards, the first of which is loaded at once; MiB that it takes """
    before = anon()
    lite = DataLoaderLite(paths, B, T)
    mib = anon() - before
    del lite
    start = time.perf_counter()
    lite = DataLoaderLite(paths, B, T)
    while lite.shard < len(paths) - 1 or lite.at + 2 * B * T < len(lite.tokens):
        lite.next_batch()
    return batches * B * T / (time.perf_counter() - start), mib

def memcpy(loader, seconds=0.3):
    """ -> tokens a second if idx and targets are copied, from batches in DRAM into the loader's ring of buffers """
    ring = []
    for _ in range(3):
        batch = loader.next_batch()
        ring.append((batch.idx.numpy(), batch.targets.numpy()))
    idx, targets = ring[0]
    pool = [(idx.copy(), targets.copy()) for _ in range(max(POOL // (16 * idx.size), 3))]
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        for i, (idx, targets) in enumerate(pool):
            np.copyto(ring[i % 3][0], idx)
            np.copyto(ring[i % 3][1], targets)
        rates.append(len(pool) * idx.size / (time.perf_counter() - t))
    return median(rates)

def first_batch(ds, k):
    """ -> seconds until a new loader has batch number k """
    start = time.perf_counter()
    loader = ds.loader(prefetch=False)
    loader.batch = k
    loader.next_batch()
    return time.perf_counter() - start

def measure(paths, cfg, tokens, rounds):
    """ -> {name: number} """
    n, T = cfg.batch_tokens, cfg.block_size
    batches = max(len(paths) * (tokens // n - 1), 1)
    before = anon()
    loader = TextDataset(cfg).loader(prefetch=False)
    run(loader, batches, n) # warm
    mib = anon() - before
    ours, copied, lite = [], [], []
    for _ in range(rounds):
        ours.append(run(loader, batches, n))
        copied.append(memcpy(loader))
        rate, lite_mib = run_lite(paths, n // T, T, batches)
        lite.append(rate)
    near, far = [], []
    for _ in range(50):
        near.append(first_batch(loader.ds, 0))
        far.append(first_batch(loader.ds, 10**12))
    return {'tok_s': round(median(ours)), 'memcpy_tok_s': round(median(copied)), 'lite_tok_s': round(median(lite)),
            'of_memcpy': round(median(a / b for a, b in zip(ours, copied)), 2),
            'vs_lite': round(median(a / b for a, b in zip(ours, lite)), 1), 'mb': round(mib, 1),
            'lite_mb': round(lite_mib, 1), 'batch_1e12_of_batch_0': round(median(far) / median(near), 2)}

def show(results, title):
    table = Table('order, batch', title=title, title_justify='left')
    for name in ('tokens / s', 'memcpy', 'of memcpy', 'lite', 'x', 'memory', 'its memory', 'batch 10^12'):
        table.add_column(name, justify='right', no_wrap=True)
    for mode, x in results.items():
        table.add_row(mode, f"{x['tok_s'] / 1e6:,.0f} M", f"{x['memcpy_tok_s'] / 1e6:,.0f} M", f"{x['of_memcpy']:.0%}",
                      f"{x['lite_tok_s'] / 1e6:,.0f} M", f"{x['vs_lite']:.1f}", f"{x['mb']:.0f} MB",
                      f"{x['lite_mb']:,.0f} MB", f"{x['batch_1e12_of_batch_0']:.2f}")
    Console(width=110).print(table)

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
    rng, results = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory(dir=args.dir or None) as temp:
        for k in range(args.shards + 1):
            tokens = rng.integers(0, 50257, args.tokens if k else 10_000, dtype=np.uint16)
            name = f"edufineweb_{'train' if k else 'val'}_{k:06d}.npy"
            (Path(temp) / name).write_bytes(shard_bytes(tokens, 'npy'))
        del tokens
        paths = sorted(Path(temp).glob('*_train_*'))
        for order, B, T in MODES:
            cfg = TextConfig(temp, block_size=T, batch_tokens=B * T, order=order, val_tokens=0)
            results[f"{order} {B}x{T}"] = measure(paths, cfg, args.tokens, args.rounds)
    show(results, f"{args.shards} shards of {args.tokens:,} tokens, one core")
    print(json.dumps(results))

if __name__ == '__main__':
    main()
