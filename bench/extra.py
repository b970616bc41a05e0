"""
what do extra pairs cost? seconds and MB to open arc1/training with 100 pairs a task, read from a zip, and with 1,000,
packed; the loader with them and without, in turn and on one core, medians of --rounds. the 1,000 are the 100, ten times
under other colors, written to a temporary folder.

    python bench/extra.py re_arc_100.zip [--rounds 5]

2 minutes on one cpu core. last line: json
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from loader import MODES, run_child, run_ours, settings

from nanoarc.corpus import Corpus, index_grids
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.sources import read_source

DATA = 'arc1/training'
OPEN = """
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
def peak():
    for line in open('/proc/self/status'):
        if line.startswith('VmHWM'):
            return int(line.split()[1]) / 1024 # MiB
ArcLoader(ArcDataset(DataConfig()), prefetch=False).next_batch() # compiled kernels are loaded
before, most, start = rss(), peak(), time.perf_counter()
ds = ArcDataset(DataConfig(**json.loads(sys.argv[1])))
print(json.dumps([time.perf_counter() - start, rss() - before, peak() - most, len(ds)]))
"""

def write_grown(src, out, times=10):
    """ a packed corpus of the lists of src, each several times under other colors. lists have 100 pairs """
    c, rng = read_source(src, n_demos=99), np.random.default_rng(0)
    arrays = {name: np.tile(getattr(c, name), times) for name in c.ARRAYS}
    arrays['cells'] = np.concatenate([rng.permutation(10).astype(np.uint8)[c.cells] for _ in range(times)])
    ids = [name.partition(b'.')[0] for name in c.name.tolist()]
    arrays['name'] = np.array([b'%s.%d' % (name, k) for k in range(times) for name in ids])
    arrays['first'] = np.append(0, np.cumsum(np.tile(np.diff(c.first), times)))
    grown = Corpus(src, arrays)
    grown.colors, grown.hash, grown.input_hash = index_grids(grown.cells, grown.off, grown.h, grown.w)
    grown.save(out)

def measure_open(extra, rounds):
    """ -> dict of figures """
    config = json.dumps(dict(data=DATA, extra=extra, val_tasks=0))
    seconds, added, most, documents = zip(*[run_child(OPEN, config) for _ in range(rounds)])
    return {'documents': documents[0], 'open_s': round(median(seconds), 2), 'rss_mb': round(median(added)),
            'peak_mb': round(median(most))}

def measure_speed(mode, extra, rounds):
    """ -> dict of figures: useful tokens a second without and with them """
    config = settings(DATA, mode)
    loaders = [ArcLoader(ArcDataset(DataConfig(**config, extra=x)), prefetch=False) for x in ('', extra)]
    speeds = []
    for k in range(rounds + 1):
        speeds.append([run_ours(loader)[0] for loader in loaders])
    without, extended = zip(*speeds[1:]) # the first round compiles
    return {'without': round(median(without)), 'with': round(median(extended)),
            'ratio': round(median(b / a for a, b in speeds[1:]), 3)}

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('src')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as temp:
        grown = str(Path(temp) / 'grown')
        write_grown(args.src, grown)
        for name, extra in (('none', ''), ('100 a task, zip', args.src), ('1,000 a task, packed', grown)):
            x = results[name] = measure_open(str(Path(extra).resolve()) if extra else '', args.rounds)
            print(f"{name}: {x['documents']:,} documents an epoch, opened in {x['open_s']:.2f} s, {x['rss_mb']} MB, "
                  f"{x['peak_mb']} MB on the way")
        for mode in MODES:
            for name, extra in (('100', args.src), ('1,000', grown)):
                x = results[f"{mode} {name}"] = measure_speed(mode, extra, args.rounds)
                print(f"{mode}: {x['without'] / 1e6:,.0f} M useful tokens / s, with {name} pairs a task "
                      f"{x['with'] / 1e6:,.0f} M, ratio {x['ratio']:.2f}")
    print(json.dumps(results))

if __name__ == '__main__':
    main()
