"""
how often should the demos of the tasks to be solved be seen? evaluation answers may not judge that, so the 32 validation
tasks play the evaluation tasks: their answers are taken away, their demos go into --adapt, the rest of arc1/training is --data.
usage: python bench/standin.py 1 3 8 [--steps 600] [--seed 1337], 2 minutes a number on 2 cpu cores. last line: json
"""
import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from nanoarc import solve, train
from nanoarc.data import ArcDataset, DataConfig, fits
from nanoarc.model import ModelConfig
from nanoarc.sources import read_source

parser = argparse.ArgumentParser()
parser.add_argument('repeats', type=int, nargs='+')
parser.add_argument('--steps', type=int, default=600)
parser.add_argument('--seed', type=int, default=1337)
parser.add_argument('--max_pair', type=int, default=100)
args = parser.parse_args()

def write(folder, task, answers):
    """ a task as a json file, with or without the answers of its queries """
    folder.mkdir(exist_ok=True)
    queries = [{'input': x.tolist(), **({'output': y.tolist()} if answers else {})} for x, y in task.queries]
    (folder / f"{task.name}.json").write_text(json.dumps({'train': [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos], 'test': queries}))

with tempfile.TemporaryDirectory() as temp:
    temp = Path(temp)
    ds = ArcDataset(DataConfig(data='arc1/training', max_pair=args.max_pair))
    c = read_source('arc1/training')
    tasks = [c.task(k) for k in np.flatnonzero(fits(c, args.max_pair))]
    held = {tasks[ds.sampler.tables.pair_task[p]].name for p in ds.val_pairs}
    for task in tasks:
        write(temp / ('blind' if task.name in held else 'rest'), task, answers=task.name not in held)
    results = {}
    for n in args.repeats:
        out = str(temp / f"run{n}")
        data_cfg = DataConfig(data=str(temp / 'rest'), adapt=f"{temp / 'blind'}*{n}+arc1/evaluation", max_pair=args.max_pair, val_tasks=0)
        meta = train.main(train.TrainConfig(out_dir=out, minutes=0, max_iters=args.steps, seed=args.seed, log_every=200), ModelConfig(), data_cfg)
        path = solve.main(solve.SolveConfig(run=out, data=str(temp / 'blind')))
        result = solve.score(json.loads(path.read_text()), [task for task in tasks if task.name in held])
        results[f"*{n}"] = {key: result[key] for key in ('solved', 'tasks', 'right', 'outputs')} | {'tokens': meta['tokens']}
    for key, x in results.items():
        print(f"adapt{key:4s} {x['solved']:3d} of {x['tasks']} tasks, {x['right']} of {x['outputs']} outputs after {x['tokens']:,} tokens")
    print(json.dumps(results))
