"""
what is a way of solving worth? pass@2 on queries whose answers nobody trained on: a run's own validation queries, or
a source with --src and --answers (out/ablate/blind and out/ablate/answers, after bench/ablate.py), never evaluation
answers.

  python bench/solve.py out/quickstart
      views x selector, and the oracle: is any candidate right?
  python bench/solve.py out/a out/b --views 32 --p_min 0.3 0.1 0.03
      the search; --ttt_steps 10 30 likewise
  python bench/solve.py out/a --decode
      cached decoding against the whole forward, in turn

each setting solves all runs; seconds are per run, to propose candidates and to judge them. last line: json
"""
import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nanoarc import checkpoint, solve
from nanoarc.data import ArcDataset
from nanoarc.model import Cache
from nanoarc.run import get_device, load_run, saved_configs
from nanoarc.sources import read_tasks
from nanoarc.submission import rank_candidates, read_candidates
from nanoarc.view import pyplot

RIGHT = 'votes', 'product', 'oracle' # counts of right outputs
SETTINGS = 'p_min', 'ttt_steps', 'ttt_lr', 'ttt_tokens', 'together', 'minutes', 'score_most' # and views

def write_val(run, out):
    """ the validation tasks of a run -> directories of them without and with their answers """
    _, data_cfg = saved_configs(checkpoint.load(run)[1])
    ds = ArcDataset(data_cfg)
    s, found = ds.sampler, defaultdict(list)
    for p in ds.val_pairs.tolist():
        found[int(s.tables.pair_task[p])].append(p)
    for k, pairs in found.items():
        task = s.task(k)
        demos = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos]
        closed = [{'input': s.grid(2 * p).tolist()} for p in pairs]
        opened = [{'input': s.grid(2 * p).tolist(), 'output': s.grid(2 * p + 1).tolist()} for p in pairs]
        for folder, queries in (('closed', closed), ('open', opened)):
            text = json.dumps({'train': demos, 'test': queries})
            checkpoint.write_file(out / folder / f"{task.name}.json", text.encode())
    return str(out / 'closed'), str(out / 'open')

def timed(name, spent):
    """ solve.Solver's method, with a clock """
    method = getattr(solve.Solver, name)
    def run(self, *args):
        start = time.perf_counter()
        method(self, *args)
        spent[name] += time.perf_counter() - start
    return run

def is_right(candidates, answer):
    """ is the answer among them? """
    return any(np.array_equal(c.grid, answer) for c in candidates)

def measure(run, src, answers, settings, out):
    """ one solving -> seconds, pass@2 by selector, oracle, in right outputs; and the number of outputs """
    start, spent = time.perf_counter(), defaultdict(float)
    methods = {name: getattr(solve.Solver, name) for name in ('propose', 'judge')}
    for name in methods:
        setattr(solve.Solver, name, timed(name, spent))
    try:
        # one validation query is an augment of a demo of its own task
        solve.solve(solve.SolveConfig(run=run, data=src, out_dir=str(out), allow_leak=True, **settings))
    finally:
        for name, method in methods.items():
            setattr(solve.Solver, name, method)
    total = time.perf_counter() - start
    tasks = read_tasks(answers)
    found = read_candidates(out / 'candidates.jsonl', tasks)
    right = {name: 0 for name in RIGHT}
    for k, task in enumerate(tasks):
        for i, (_, y) in enumerate(task.queries):
            by_votes = [replace(c, score=None) for c in found[k, i]] # as if nobody had judged them
            for name, candidates in (('votes', by_votes), ('product', found[k, i])):
                best = [c for c, _ in rank_candidates([candidates])]
                right[name] += is_right(best[:2], y)
            right['oracle'] += is_right(found[k, i], y)
    return {'propose_s': spent['propose'], 'judge_s': spent['judge'], 'other_s': total - sum(spent.values()),
            'outputs': sum(len(task.queries) for task in tasks), **right}

def decode_speed(run):
    """ tokens/s of answers of 100 tokens to 8 prompts of 1,000, with caches and by the whole forward, in turn """
    device, _, autocast = get_device('auto', 'auto')
    model, _, _ = load_run(run, device)
    idx = torch.randint(0, 10, (8, 1000), device=device)
    pos = torch.zeros(8, 1000, 3, dtype=torch.uint8, device=device)
    extra = []
    if model.n_task > 0: # task and dihedral
        extra = [torch.zeros(8, 1, dtype=x, device=device) for x in (torch.int32, torch.uint8)]
    def step(idx, pos, cache=None):
        with torch.no_grad(), autocast():
            logits = model(idx, None, pos, None, *(x.expand(idx.shape) for x in extra), cache=cache)[0][:, -1]
        return logits.argmax(-1)[:, None]
    def cached(n):
        cache = Cache(model)
        token = step(idx, pos, cache)
        for _ in range(n - 1):
            token = step(token, pos[:, :1], cache)
        return float(token[0, 0])
    def whole(n):
        x = idx
        for k in range(n):
            x = torch.cat([x, step(x, pos[:, :1].expand(8, x.size(1), 3))], 1)
        return float(x[0, -1])
    times = []
    for _ in range(6):
        start = time.perf_counter()
        cached(100)
        middle = time.perf_counter()
        whole(10) # they are all alike, and slow
        times.append((800 / (middle - start), 80 / (time.perf_counter() - middle)))
    times = times[1:] # the first one warms up
    cached_speed, whole_speed = median(a for a, _ in times), median(b for _, b in times)
    ratio = median(a / b for a, b in times)
    print(f"cached {cached_speed:,.0f} tokens/s, prompt included; whole forward {whole_speed:,.0f}; "
          f"{ratio:.1f} times as fast")
    return {'cached_tok_s': cached_speed, 'whole_tok_s': whole_speed, 'ratio': ratio}

def summed(rows):
    """ what `measure` found in each run -> one row: counts are added up, seconds averaged """
    total = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        total[key] = mean(values) if key.endswith('_s') else sum(values)
    return total

def print_table(results, varied):
    shares = [f"{name}, % right" for name in RIGHT]
    table = Table(*varied, 'outputs', *shares, 'propose s', 'judge s', 'other s')
    for r in results:
        cells = [f"{r[name]:g}" for name in varied]
        cells.append(str(r['outputs']))
        cells += [f"{100 * r[name] / r['outputs']:.1f}" for name in RIGHT]
        cells += [f"{r[name]:.1f}" for name in ('propose_s', 'judge_s', 'other_s')]
        table.add_row(*cells)
    Console(width=140).print(table)

def draw_results(results, out):
    """ pass@2 by views, one curve a selector -> a png """
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.6), layout='constrained')
    views = [r['views'] for r in results]
    for name in RIGHT:
        shares = [100 * r[name] / r['outputs'] for r in results]
        ax.plot(views, shares, marker='o', markersize=4, label=name, linestyle='--' if name == 'oracle' else '-')
    ax.set(xscale='log', xlabel="views of a query", ylabel="outputs right in two attempts, %", xticks=views,
           xticklabels=views)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(out, dpi=110)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--src', default='')
    parser.add_argument('--answers', default='')
    parser.add_argument('--decode', action='store_true')
    parser.add_argument('--png', default='', help="pass@2 by views, one curve a selector")
    parser.add_argument('--views', type=int, nargs='+', default=[1, 8, 32, 128])
    for name in SETTINGS:
        default = getattr(solve.SolveConfig, name)
        parser.add_argument(f"--{name}", type=type(default), nargs='+', default=[default])
    args = parser.parse_args()
    if args.decode:
        print(json.dumps(decode_speed(args.runs[0])))
        return
    choices = {name: getattr(args, name) for name in ('views', *SETTINGS)}
    varied = [name for name, values in choices.items() if len(values) > 1] or ['views']
    results = []
    with tempfile.TemporaryDirectory() as temp:
        sources = []
        for n, run in enumerate(args.runs):
            sources.append((args.src, args.answers) if args.src else write_val(run, Path(temp) / f"{n}"))
        for values in itertools.product(*choices.values()):
            settings = dict(zip(choices, values))
            rows = []
            for run, (src, answers) in zip(args.runs, sources):
                rows.append(measure(run, src, answers, settings, Path(temp) / 'out'))
            results.append({**settings, **summed(rows)})
            print({key: results[-1][key] for key in (*varied, *RIGHT)}, flush=True)
    print_table(results, varied)
    if args.png:
        draw_results(results, args.png)
    print(json.dumps(results))

if __name__ == '__main__':
    main()
