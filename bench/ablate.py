"""
which idea is worth its time? every arm is the default model with something changed, trained as long as the default
trains in --minutes on a quiet machine: how fast an arm is, is measured first, so later nothing depends on the clock.

evaluation answers may judge nothing here, so 32 tasks of arc1/training play the evaluation tasks: their demos are in
--adapt, eight times an epoch as in the quickstart, their answers are asked for afterwards. val nats: per output token,
over 8 augments of each query. solved: of the 32, by a vote over 8 views. --max_pair 100, so each takes seconds.

usage: python bench/ablate.py [ARM ...] [--seeds 1 2 3] [--minutes 2] [--out out/ablate]. as many runs at once as there
are cores, one thread each. stop it at any time, the same command goes on. hours for all arms. last line: json
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanoarc import checkpoint, run, solve, train
from nanoarc.data import DEMOS, ArcDataset, ArcLoader, DataConfig, Sampler, hash64, small_tasks
from nanoarc.grids import ROW
from nanoarc.model import Model, ModelConfig, width_lr
from nanoarc.sources import read_source, read_tasks
from nanoarc.submission import score

def mdlarc_positions(idx, pos, dihedral):
    """
    theirs: a cell at (r, c), the end of a row at (r, W), so the first cell of a row is not beside the token that
    predicts it
    """
    pos, is_cell = pos.clone(), idx < 10
    width = F.pad(pos[:, :-1, 1], (1, 0)) # of the row that a ROW ends: the column of ours before it
    pos[..., 0] -= (idx == ROW).to(torch.uint8)
    pos[..., 1] = torch.where(idx == ROW, width, pos[..., 1] - is_cell.to(torch.uint8))
    return pos, dihedral

def no_dihedral(idx, pos, dihedral):
    return pos, torch.zeros_like(dihedral)

def zero_projections(model):
    """ what a block adds to the residual stream begins at nothing, as in GPT-NeoX, modded-nanogpt and nanochat """
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.proj.weight)
        torch.nn.init.zeros_(block.mlp.proj.weight)

# settings of TrainConfig, ModelConfig and DataConfig, and: inputs, a change of what the model is told; init, one of its
# first weights; repeat, how often the tasks to adapt to come in an epoch; lr_x, a factor of the learning rates
ARMS = {
    'default': {},
    # the data
    'colors nonzero': dict(colors='nonzero'),
    'mdlARC positions': dict(inputs=mdlarc_positions),
    'no dihedral embedding': dict(inputs=no_dihedral),
    '4 x 512 tokens a step': dict(grad_accum=4, batch_tokens=512),
    'pack 128': dict(batching='pack', block_size=128),
    'adapt*1': dict(repeat=1),
    'adapt*3': dict(repeat=3),
    # the model
    'A': dict(mixer='A'),
    'M': dict(mixer='M'),
    'MS': dict(mixer='MS', window=32), # the rows are short
    'AM': dict(mixer='AM'),
    'MMMA': dict(mixer='MMMA'),
    'zero projections': dict(init=zero_projections),
    '1d rope': dict(rope_bases=(10000.0,)),
    'qk norm': dict(qk_norm=True),
    'head size 64': dict(head_size=64),
    'gqa': dict(n_kv_head=1),
    'loops 2': dict(loops=2),
    '2 layers, loops 2': dict(loops=2, n_layer=2),
    # the optimizer
    'AdamW only': dict(ns_steps=0),
    'AdamW only, lr 2e-3': dict(ns_steps=0, lr=2e-3),
    'Newton-Schulz 3': dict(ns_steps=3),
    # the dial
    'depth 2': dict(depth=2),
    'depth 6': dict(depth=6),
}
for depth in (2, 4, 6):
    for x in (0.5, 2):
        ARMS[f"depth {depth}, lr x{x}"] = dict(depth=depth, lr_x=x)

def configs(arm, blind, **more):
    """ name of an arm, settings -> TrainConfig, ModelConfig, DataConfig, and the arm's inputs and init or None """
    change = dict(batch_tokens=2048, max_pair=100, val_tasks=0, minutes=0, eval_every=0)
    change |= ARMS[arm] | more
    inputs, init = change.pop('inputs', None), change.pop('init', None)
    repeat, lr_x = change.pop('repeat', 8), change.pop('lr_x', 1)
    change['data'] = str(blind.parent / 'rest')
    change['adapt'] = f"{blind}*{repeat}+arc1/evaluation"
    cfgs = []
    for cls in (train.TrainConfig, ModelConfig, DataConfig):
        names = [f.name for f in fields(cls) if f.name in change]
        cfgs.append(cls(**{name: change.pop(name) for name in names}))
    assert not change, change
    if lr_x != 1:
        cfgs[0].lr = cfgs[0].adam_lr = lr_x * width_lr(cfgs[1].resolved().n_embd)
    return *cfgs, inputs, init

def patched(inputs, init):
    """ Model, its inputs and first weights changed """
    class Patched(Model):
        def __init__(self, cfg):
            super().__init__(cfg)
            if init is not None:
                init(self)

        def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
            if inputs is not None:
                pos, dihedral = inputs(idx, pos, dihedral)
            return super().forward(idx, targets, pos, doc, task, dihedral, cache)
    return Patched

def write_task(folder, task, answered):
    """ a Task as a file of that folder, with or without the answers """
    demos = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos]
    queries = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.queries]
    if not answered:
        for query in queries:
            del query['output']
    data = json.dumps({'train': demos, 'test': queries}).encode()
    checkpoint.write_file(folder / f"{task.name}.json", data)

def write_tasks(out):
    """ the small tasks of arc1/training: 32 whose answers are taken away, and the rest -> directory of the 32 """
    blind = out / 'blind'
    if blind.is_dir():
        return blind
    ds = ArcDataset(DataConfig(data='arc1/training', max_pair=100))
    corpus = read_source('arc1/training')
    corpus = corpus.select(small_tasks(corpus, 100))
    held = set(ds.sampler.tables.pair_task[ds.val_pairs].tolist())
    for k in range(len(corpus)):
        task = corpus.task(k)
        if k in held:
            write_task(blind, task, False)
            write_task(out / 'answers', task, True)
        else:
            write_task(out / 'rest', task, True)
    return blind

# -----------------------------------------------------------------------------

class Stepper:
    """ training steps of an arm, to be timed """

    def __init__(self, arm, blind):
        self.cfg, model_cfg, data_cfg, *changes = configs(arm, blind)
        ds = ArcDataset(data_cfg)
        self.loader = ArcLoader(ds)
        self.model = patched(*changes)(run.fit_to_data(model_cfg, ds))
        self.optimizers = self.model.optimizers(*self.model.peak_rates(0, 0), 0.1, self.cfg.ns_steps)

    def seconds(self, steps):
        """ of so many steps """
        start = time.perf_counter()
        for _ in range(steps):
            for _ in range(self.cfg.grad_accum):
                _, loss = self.model(*self.loader.next_batch())
                (loss / 1000).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

def measure(arms, blind, path):
    """ seconds a step of the default, and how many times that an arm takes, in turn with it -> dict, kept in a file """
    run.get_device('cpu', 'float32') # its settings of the cpu
    speed = json.loads(path.read_text()) if path.is_file() else {}
    for arm in ['default', *arms]:
        if arm in speed:
            continue
        base, mine = Stepper('default', blind), Stepper(arm, blind)
        times = [(base.seconds(5), mine.seconds(5)) for _ in range(8)][1:] # the first ones warm up
        if arm == 'default':
            speed[arm] = median(a for a, _ in times) / 5
            print(f"default: {speed[arm]:.3f} s a step", flush=True)
        else:
            speed[arm] = median(b / a for a, b in times)
            print(f"{arm}: {speed[arm]:.3f} of the default", flush=True)
        checkpoint.write_file(path, json.dumps(speed).encode())
    return speed

@torch.no_grad()
def nats(model, data_cfg, rows, src, views=8):
    """ mean loss over augments of the queries of src, whose answers are known, in nats per output token """
    sampler = Sampler([read_source(src)], data_cfg, rows)
    queries = np.flatnonzero(~sampler.is_demo)
    k = np.tile(np.arange(views), len(queries)) # view 0 is the query as it is
    pairs = np.repeat(queries, views)
    docs = sampler.plan(pairs, np.maximum(k - 1, 0), hash64(1337, DEMOS, pairs, k), k == 0, 1337)
    laid = sampler.lay_out(docs, 'bucket', 0)
    total = 0.0
    for r0, r1, T in laid.batches.tolist():
        _, loss = model(*sampler.write(laid, r0, r1, T))
        total += float(loss)
    return total / int(docs.loss_tokens.sum())

def run_dir(out, arm, seed, steps):
    return out / arm.replace(' ', '_') / f"{seed}_{steps}"

def work(arm, seed, steps, out):
    """ one run, or the rest of it, and its result """
    blind, out_dir = out / 'blind', run_dir(out, arm, seed, steps)
    log_every = max(steps // 20, 1)
    cfg, model_cfg, data_cfg, inputs, init = configs(arm, blind, max_iters=steps, seed=seed, log_every=log_every,
                                                     out_dir=str(out_dir))
    run.Model = patched(inputs, init) # whatever is built from a config now
    if checkpoint.steps(out_dir):
        cfg.resume = str(out_dir)
    train.train(cfg, model_cfg, data_cfg)
    model, _, meta = run.load_run(out_dir, torch.device('cpu'))
    losses = [row['loss'] for row in run.read_metrics(out_dir) if 'loss' in row]
    result = {'val_nats': nats(model, data_cfg, meta['rows'], str(out / 'answers')), 'train_nats': mean(losses[-2:]),
              'tokens': meta['tokens'], 'steps': steps, 'solved': None}
    if inputs is not mdlarc_positions: # decoding tells ours
        path = solve.solve(solve.SolveConfig(run=str(out_dir), data=str(blind), views=8))
        result['solved'] = score(json.loads(path.read_text()), read_tasks(str(out / 'answers')))['solved']
    checkpoint.write_file(out_dir / 'result.json', json.dumps(result).encode())

def print_table(arms, speed, found):
    """ {arm: results of its runs} -> a summary of each, for json """
    table, summary = Table(), {}
    for name in ('arm', 'val nats', 'range', 'solved of 32', 'each', 'train nats', 'tokens', 's / step'):
        table.add_column(name, justify='left' if name == 'arm' else 'right')
    for arm in arms:
        rows = found[arm]
        if not rows:
            continue
        val = [row['val_nats'] for row in rows]
        solved = [row['solved'] for row in rows if row['solved'] is not None]
        train_nats = mean(row['train_nats'] for row in rows)
        tokens = mean(row['tokens'] for row in rows)
        summary[arm] = {'val_nats': mean(val), 'range': [min(val), max(val)], 'solved': solved,
                        'train_nats': train_nats, 'seeds': len(rows)}
        table.add_row(arm, f"{mean(val):.3f}", f"{min(val):.3f} to {max(val):.3f}",
                      f"{mean(solved):.1f}" if solved else '-', " ".join(map(str, solved)), f"{train_nats:.3f}",
                      f"{tokens / 1e6:.2f}M", f"{speed[arm]:.3f}" if arm == 'default' else f"x{speed[arm]:.2f}")
    Console(width=140).print(table)
    return summary

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('arms', nargs='*', metavar='ARM', help=", ".join(ARMS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--minutes', type=float, default=2.0)
    parser.add_argument('--out', default='out/ablate')
    parser.add_argument('--work', nargs=3, help="one run: ARM SEED STEPS. for this script itself")
    args = parser.parse_args()
    out = Path(args.out)
    if args.work:
        arm, seed, steps = args.work
        return work(arm, int(seed), int(steps), out)
    arms = args.arms or list(ARMS)
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}")
    blind = write_tasks(out)
    speed = measure(arms, blind, out / 'speed.json')
    jobs, wanted = [], defaultdict(list)
    for seed in args.seeds: # all arms once, then again: a table of one seed is of use already
        for arm in arms:
            step = speed['default']
            if arm != 'default':
                step *= speed[arm]
            steps = max(round(60 * args.minutes / step), 1)
            path = run_dir(out, arm, seed, steps) / 'result.json'
            wanted[arm].append(path)
            if not path.is_file():
                jobs.append([arm, str(seed), str(steps)])

    def start(job):
        log = out / f"{job[0].replace(' ', '_')}_{job[1]}.log"
        command = [sys.executable, __file__, '--out', str(out), '--work', *job]
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        with open(log, 'w') as f:
            failed = subprocess.run(command, stdout=f, stderr=f, env=env).returncode
        print(f"{' '.join(job)}: {f'failed, see {log}' if failed else 'done'}", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(start, jobs))
    found = {}
    for arm in arms:
        found[arm] = [json.loads(path.read_text()) for path in wanted[arm] if path.is_file()]
    print(json.dumps(print_table(arms, speed, found)))

if __name__ == '__main__':
    main()
