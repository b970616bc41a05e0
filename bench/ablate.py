"""
which idea is worth its time? every arm is the default model with something changed, trained as long as the default
trains in --minutes on a quiet machine: how fast an arm is, is measured first, so later nothing depends on the clock.

evaluation answers may judge nothing here, so 32 tasks of arc1/training play the evaluation tasks: their demos are in
--adapt, eight times an epoch as in the quickstart, their answers are asked for afterwards. val nats: per output token,
over 8 augments of each query. solved: of the 32, by a vote over 8 views. --max_pair 100, so each takes seconds.

usage: python bench/ablate.py [ARM ...] [--seeds 1 2 3] [--minutes 2] [--out out/ablate]. as many runs at once as there are
cores, one thread each. stop it at any time, the same command goes on. hours for all arms. last line: json
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
from rich.console import Console
from rich.table import Table

import nanoarc.model
from nanoarc import checkpoint, solve, train
from nanoarc.data import DEMOS, ROW, ArcDataset, ArcLoader, DataConfig, Sampler, fits, hash64
from nanoarc.model import Model, ModelConfig
from nanoarc.sources import read_source

def mdlarc_positions(idx, pos, dihedral):
    """ theirs: a cell at (r, c), the end of a row at (r, W), so the first cell of a row is not beside the token that predicts it """
    pos, cell = pos.clone(), idx < 10
    width = torch.nn.functional.pad(pos[:, :-1, 1], (1, 0)) # of the row that a ROW ends: the column of ours before it
    pos[..., 0] -= (idx == ROW).to(torch.uint8)
    pos[..., 1] = torch.where(idx == ROW, width, pos[..., 1] - cell.to(torch.uint8))
    return pos, dihedral

def zero_projections(model):
    """ what a block adds to the residual stream begins at nothing, as in GPT-NeoX, modded-nanogpt and nanochat """
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.proj.weight)
        torch.nn.init.zeros_(block.mlp.proj.weight)

ARMS = {
    'default': {},
    # the data
    'no prefix': dict(prefix=False),
    'colors nonzero': dict(colors='nonzero'),
    'no prefix, mdlARC positions': dict(inputs=mdlarc_positions, prefix=False), # their first cell of an answer stands where ours has OUT, which ends the prompt
    'no dihedral embedding': dict(inputs=lambda idx, pos, dihedral: (pos, torch.zeros_like(dihedral))),
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
    **{f"depth {depth}, lr x{x}": dict(depth=depth, lr_x=x) for depth in (2, 4, 6) for x in (0.5, 2)},
}

def configs(arm, blind, **kwargs):
    """ name of an arm -> (TrainConfig, ModelConfig, DataConfig, the change of the inputs or None, that of the weights or None) """
    change = {'batch_tokens': 2048, 'max_pair': 100, 'val_tasks': 0, 'minutes': 0, 'eval_every': 0, **ARMS[arm], **kwargs}
    inputs, init, repeat, x = change.pop('inputs', None), change.pop('init', None), change.pop('repeat', 8), change.pop('lr_x', 1)
    change |= dict(data=str(blind.parent / 'rest'), adapt=f"{blind}*{repeat}+arc1/evaluation")
    cfgs = [cls(**{f.name: change.pop(f.name) for f in fields(cls) if f.name in change}) for cls in (train.TrainConfig, ModelConfig, DataConfig)]
    assert not change, change
    if x != 1:
        cfgs[0].lr, cfgs[0].adam_lr = (x * lr for lr in cfgs[1].learning_rates(0, 0))
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

def write_tasks(out):
    """ the small tasks of arc1/training: 32 whose answers are taken away, and the rest -> directory of the 32 """
    blind = out / 'blind'
    if blind.is_dir():
        return blind
    ds = ArcDataset(DataConfig(data='arc1/training', max_pair=100))
    c = read_source('arc1/training')
    tasks = [c.task(k) for k in np.flatnonzero(fits(c, 100))]
    held = {tasks[ds.sampler.tables.pair_task[p]].name for p in ds.val_pairs}
    for task in tasks:
        for folder, answers in (('blind', False), ('rest', None), ('answers', True)):
            if (task.name in held) == (answers is not None):
                queries = [{'input': x.tolist(), **({'output': y.tolist()} if answers is not False else {})} for x, y in task.queries]
                demos = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos]
                checkpoint.write_file(out / folder / f"{task.name}.json", json.dumps({'train': demos, 'test': queries}).encode())
    return blind

# -----------------------------------------------------------------------------

class Stepper:
    """ training steps of an arm, to be timed """

    def __init__(self, arm, blind):
        self.cfg, model_cfg, data_cfg, *changes = configs(arm, blind)
        ds = ArcDataset(data_cfg)
        model_cfg.n_task = len(ds.sampler.rows)
        self.loader, self.model = ArcLoader(ds), patched(*changes)(model_cfg)
        self.optimizers = self.model.optimizers(*model_cfg.learning_rates(0, 0), 0.1, self.cfg.ns_steps)

    def seconds(self, steps):
        """ of so many steps """
        start = time.perf_counter()
        for _ in range(steps):
            for _ in range(self.cfg.grad_accum):
                (self.model(*self.loader.next_batch())[1] / 1000).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

def measure(arms, blind, path):
    """ seconds a step of the default, and how many times that an arm takes, in turn with it -> dict, kept in a file """
    train.get_device('cpu', 'float32') # its settings of the cpu
    speed = json.loads(path.read_text()) if path.is_file() else {}
    for arm in ['default', *arms]:
        if arm not in speed:
            base, mine = Stepper('default', blind), Stepper(arm, blind)
            times = [(base.seconds(5), mine.seconds(5)) for _ in range(8)][1:]
            speed[arm] = median(b / a for a, b in times) if arm != 'default' else median(a for a, _ in times) / 5
            print(f"{arm}: {speed[arm]:.3f} {'s a step' if arm == 'default' else 'of the default'}", flush=True)
            checkpoint.write_file(path, json.dumps(speed).encode())
    return speed

@torch.no_grad()
def nats(model, data_cfg, rows, src, views=8):
    """ mean loss over augments of the queries of src, whose answers are known, in nats per output token """
    sampler = Sampler([(read_source(src), 1)], data_cfg, rows)
    k, pairs = np.meshgrid(np.arange(views), np.flatnonzero(~sampler.is_demo))
    k, pairs = k.ravel(), pairs.ravel()
    laid = sampler.lay_out(sampler.plan(pairs, k - (k > 0), hash64(1337, DEMOS, pairs, k), k == 0, 1337), 'bucket', None)
    total = sum(float(model(*sampler.write(laid, r0, r1, T))[1]) for r0, r1, T in laid.batches)
    return total / int(laid.docs.loss_tokens.sum())

def work(arm, seed, steps, out):
    """ one run, or the rest of it, and its result """
    blind = out / 'blind'
    run = out / arm.replace(' ', '_') / f"{seed}_{steps}"
    cfg, model_cfg, data_cfg, inputs, init = configs(arm, blind, max_iters=steps, seed=seed, log_every=max(steps // 20, 1), out_dir=str(run))
    nanoarc.model.Model = patched(inputs, init) # whatever is built from a config now
    cfg.resume = str(run) if checkpoint.steps(run) else ''
    meta = train.main(cfg, model_cfg, data_cfg)
    model, _, rows, *_ = solve.load_model(run, torch.device('cpu'))
    result = {'val_nats': nats(model, data_cfg, rows, str(out / 'answers')), 'tokens': meta['tokens'], 'steps': steps, 'solved': None}
    losses = [x['loss'] for x in map(json.loads, (run / 'metrics.jsonl').read_text().splitlines()) if 'loss' in x]
    result['train_nats'] = mean(losses[-2:])
    if inputs is not mdlarc_positions: # decoding tells ours
        path = solve.main(solve.SolveConfig(run=str(run), data=str(blind), views=8))
        result['solved'] = solve.score(json.loads(path.read_text()), [c.task(k) for c in [read_source(str(out / 'answers'))] for k in range(len(c))])['solved']
    checkpoint.write_file(run / 'result.json', json.dumps(result).encode())

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
        return work(args.work[0], int(args.work[1]), int(args.work[2]), out)
    arms = args.arms or list(ARMS)
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}")
    blind = write_tasks(out)
    speed = measure(arms, blind, out / 'speed.json')
    jobs, wanted = [], defaultdict(list)
    for seed in args.seeds: # all arms once, then again: a table of one seed is of use already
        for arm in arms:
            steps = round(60 * args.minutes / speed['default'] / (speed[arm] if arm != 'default' else 1))
            if not (out / arm.replace(' ', '_') / f"{seed}_{steps}" / 'result.json').is_file():
                jobs.append([arm, str(seed), str(steps)])
            wanted[arm].append(out / arm.replace(' ', '_') / f"{seed}_{steps}" / 'result.json')

    def start(job):
        log = out / f"{job[0].replace(' ', '_')}_{job[1]}.log"
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        with open(log, 'w') as f:
            failed = subprocess.run([sys.executable, __file__, '--out', str(out), '--work', *job], stdout=f, stderr=f, env=env).returncode
        print(f"{' '.join(job)}: {f'failed, see {log}' if failed else 'done'}", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(start, jobs))
    table, results = Table(), {}
    for name in ('arm', 'val nats', 'range', 'solved of 32', 'each', 'train nats', 'tokens', 's / step'):
        table.add_column(name, justify='left' if name == 'arm' else 'right')
    for arm in arms:
        rows = [json.loads(path.read_text()) for path in wanted[arm] if path.is_file()]
        if rows:
            x, solved = [r['val_nats'] for r in rows], [r['solved'] for r in rows if r['solved'] is not None]
            results[arm] = {'val_nats': mean(x), 'range': [min(x), max(x)], 'solved': solved, 'train_nats': mean(r['train_nats'] for r in rows), 'seeds': len(rows)}
            table.add_row(arm, f"{mean(x):.3f}", f"{min(x):.3f} to {max(x):.3f}", f"{mean(solved):.1f}" if solved else '-', " ".join(map(str, solved)),
                          f"{results[arm]['train_nats']:.3f}", f"{mean(r['tokens'] for r in rows) / 1e6:.2f}M", f"x{speed[arm]:.2f}" if arm != 'default' else f"{speed[arm]:.3f}")
    Console(width=140).print(table)
    print(json.dumps(results))

if __name__ == '__main__':
    main()
