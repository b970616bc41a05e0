"""
which idea is worth its time? every arm is the quickstart's model with something changed, trained as long as that
trains in --minutes on one core: how fast an arm is, is measured first, so later nothing depends on the clock.

evaluation answers may judge nothing here, so small tasks of arc1/training play the evaluation tasks: they are dealt
into --folds, and in each fold a model is trained on the other small tasks and on the demos of its own, eight times an
epoch as in the quickstart. the queries of its own are asked afterwards, over all folds each small task once: 81 tasks,
91 queries. an arm is compared with the default query by query, both with the same seeds; the error is that
of a mean over queries. solved: by the two attempts of `solve` with 8 views. found: among the candidates. nats: per
output token, over 8 augments of each query.

usage: python bench/ablate.py [ARM ...] [--seeds 1 2] [--folds 2] [--minutes 5] [--out out/ablate]. as many runs at once
as there are cores, one thread each. stop it at any time, the same command goes on. an arm takes folds x seeds x minutes
of a core. --noise: the default against itself, each pair of seeds. last line: json
"""
import argparse
import itertools
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
import torch.nn as nn
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanoarc import checkpoint, run, solve, train
from nanoarc.data import DEMOS, ArcDataset, ArcLoader, DataConfig, Sampler, hash64, pair_tokens, small_tasks
from nanoarc.grids import ROW
from nanoarc.model import Attention, Block, Mamba2, Model, ModelConfig, width_lr
from nanoarc.sources import read_source, read_tasks, to_json
from nanoarc.submission import read_candidates, score

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

def still(*names):
    """ parameters whose names end so are 0 and stay it """
    def change(model):
        for name, p in model.named_parameters():
            if name.endswith(names):
                p.requires_grad_(False).zero_()
    return change

def open_gates(model):
    """ heads with a frame have no gate """
    for block in model.blocks:
        if isinstance(block.mixer, Attention):
            block.mixer.gate = None

def look_anywhere(model):
    """ heads with a frame begin with a bias like the others', not at the cell that has its place there """
    for block in model.blocks:
        if isinstance(block.mixer, Attention):
            nn.init.normal_(block.mixer.qkv.bias, std=0.5)

def apart(names, lr=1, decay=1):
    """ embeddings of these names: learning rate and weight decay of AdamW, times those of the rest """
    def change(model):
        plain = model.optimizers
        def optimizers(peak, adam_peak, weight_decay, ns_steps=5):
            made = plain(peak, adam_peak, weight_decay, ns_steps)
            weights = [getattr(model, name).weight for name in names]
            group = made[-1].param_groups[0]
            group['params'] = [p for p in group['params'] if all(p is not w for w in weights)]
            made[-1].add_param_group({'params': weights, 'weight_decay': decay * weight_decay, 'lr': lr * adam_peak})
            return made
        model.optimizers = optimizers
    return change

class ConvMLP(nn.Module):
    """ a SwiGLU whose hidden channels go through a depthwise causal convolution (URM, arxiv 2512.14693) """

    def __init__(self, mlp, width):
        super().__init__()
        self.fc, self.proj = mlp.fc, mlp.proj
        self.conv = nn.Parameter(torch.zeros(width, self.proj.in_features))
        self.conv[0] = 1 # begins as the SwiGLU alone
        self.register_buffer('conv_bias', torch.zeros(self.proj.in_features)) # Mamba2.convolve asks for one

    def forward(self, x, shared, cache):
        gate, value = self.fc(x).chunk(2, -1)
        h = F.silu(gate) * value
        last = None if cache is None else getattr(cache, 'hidden', None)
        K, T = len(self.conv), h.size(1)
        if last is None:
            last = h.new_zeros(len(h), K - 1, h.size(2))
        h = torch.cat([last, h], 1)
        if cache is not None:
            cache.hidden = h[:, T:]
        return self.proj(F.silu(Mamba2.convolve(self, h, T, shared.same)))

class ConvBlock(Block):
    def forward(self, x, shared, cache=None):
        x = x + self.drop(self.mixer(self.norm1(x), shared, cache))
        return x + self.drop(self.mlp(self.norm2(x), shared, cache))

def mlp_conv(width=3):
    """ decoding has to remember the last hidden channels, so the caches are taught to """
    def change(model):
        for block in model.blocks:
            block.mlp = ConvMLP(block.mlp, width)
            block.__class__ = ConvBlock
        plain = model.cache
        def cache():
            made = plain()
            for layer in made.layers:
                layer.keep = keep_hidden(layer, layer.keep)
            return made
        model.cache = cache
    return change

def keep_hidden(layer, keep):
    def both(rows):
        keep(rows)
        layer.hidden = layer.hidden[rows]
    return both

def last_loops(n):
    """ of several loops only the last n have a gradient, and each begins with the embedded tokens again (URM) """
    def change(model):
        state = {}
        def embedded(module, _, x):
            state['loop'] = 0
        def begins(block, args):
            x, *more = args
            state['loop'] += 1
            if state['loop'] == 1: # x is more than wte: task, symmetry, tile
                state['first'] = x
                return args
            if model.training and state['loop'] <= model.cfg.loops - n + 1:
                x = x.detach()
            return (x + state['first'], *more)
        model.wte.register_forward_hook(embedded)
        model.blocks[0].register_forward_pre_hook(begins)
    return change

def residual_in_bf16(model):
    """ what blocks add up is bf16, where autocast is on: the model does so itself on recent gpus alone """
    def begins(block, args):
        x, *more = args
        if torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()
        return (x, *more)
    model.blocks[0].register_forward_pre_hook(begins)

# settings of TrainConfig, ModelConfig and DataConfig, and: inputs, a change of what the model is told; model, one of
# the model that was built; repeat, how often the tasks to adapt to come in an epoch; lr_x, a factor of the learning
# rates; more, sources that are trained on as well
ARMS = {
    'default': {},
    'as before': dict(frames='', n_layer=4, n_embd=128, dropout=0.0, ema=0.0), # until frames won
    # what the heads of attention see, and what is left of that without its parts
    'no frames': dict(frames=''),
    'plain heads, bias': dict(frames=' '.join(16 * '0'), model=still('wtile.weight')),
    'no tile number': dict(model=still('wtile.weight')),
    'no halves': dict(frames='0 0 0 0 0t 1t 2t 3t 4t 5t 6t 7t 0x2 0x3'),
    'no scaling': dict(frames='0 0 0 0 a b 0t 1t 2t 3t 4t 5t 6t 7t'),
    'open gates': dict(model=open_gates),
    'looks anywhere': dict(model=look_anywhere),
    # against learning the demos by heart
    'dropout 0': dict(dropout=0.0),
    'dropout 0.2': dict(dropout=0.2),
    'ema 0': dict(ema=0.0),
    'dropout 0, ema 0': dict(dropout=0.0, ema=0.0),
    'weight decay 0.5': dict(weight_decay=0.5),
    'task decay x5': dict(model=apart(['wtask', 'wdih'], decay=5)),
    'task decay 0': dict(model=apart(['wtask', 'wdih'], decay=0)),
    'task lr x3': dict(model=apart(['wtask'], lr=3, decay=1 / 3)),
    'loss on all': dict(loss_on='all'),
    # more rules in the same minutes
    'small of arc2': dict(more='+arc2/training', drop_overlap=True),
    'inverse tasks': dict(inverse=True),
    'up-scaled pairs': dict(scaled=True),
    # the data
    'colors nonzero': dict(colors='nonzero'),
    'mdlARC positions': dict(inputs=mdlarc_positions),
    'no dihedral embedding': dict(inputs=no_dihedral),
    '1024 tokens a step': dict(batch_tokens=1024),
    '4096 tokens a step': dict(batch_tokens=4096),
    'pack 128': dict(batching='pack', block_size=128),
    'adapt*1': dict(repeat=1),
    'adapt*3': dict(repeat=3),
    'adapt*16': dict(repeat=16),
    'adapt*32': dict(repeat=32),
    # the model
    'A': dict(mixer='A'),
    'M': dict(mixer='M'),
    'AM': dict(mixer='AM'),
    'zero projections': dict(model=zero_projections),
    'residual in bf16': dict(model=residual_in_bf16),
    '1d rope': dict(rope_bases=(10000.0,)),
    'loops 2': dict(loops=2),
    'loops 4, gradient of 2': dict(loops=4, model=last_loops(2)),
    'mlp conv': dict(model=mlp_conv()),
    # the optimizer
    'lr x2': dict(lr_x=2),
    '4096 tokens a step, lr x1.4': dict(batch_tokens=4096, lr_x=1.4),
    'lr x0.5': dict(lr_x=0.5),
    'AdamW only': dict(ns_steps=0),
    'AdamW only, lr 2e-3': dict(ns_steps=0, lr=2e-3),
    'Newton-Schulz 3': dict(ns_steps=3),
    # sizes
    '2x64': dict(n_embd=64),
    'slim': dict(n_hidden=160, expand=1, d_state=32, d_head=32),
    '2x128': dict(n_embd=128),
    'depth 3': dict(depth=3),
    'depth 4': dict(depth=4),
}

def configs(arm, fold, **more):
    """ name of an arm, folder of a fold, settings -> TrainConfig, ModelConfig, DataConfig, and its two changes """
    change = dict(batch_tokens=2048, max_pair=100, val_tasks=0, minutes=0, eval_every=0, draw_every=0)
    change |= ARMS[arm] | more
    inputs, of_model = change.pop('inputs', None), change.pop('model', None)
    repeat, lr_x = change.pop('repeat', 8), change.pop('lr_x', 1)
    change['data'] = str(fold / 'rest') + change.pop('more', '')
    change['adapt'] = f"{fold / 'blind'}*{repeat}+arc1/evaluation"
    if change.pop('inverse', False):
        change['data'] += f"+{fold / 'inverse_rest'}"
        change['adapt'] += f"+{fold / 'inverse_blind'}*4"
    if change.pop('scaled', False):
        change['extra'] = f"{fold / 'scaled'}*4"
    cfgs = []
    for cls in (train.TrainConfig, ModelConfig, DataConfig):
        names = [f.name for f in fields(cls) if f.name in change]
        cfgs.append(cls(**{name: change.pop(name) for name in names}))
    assert not change, change
    if lr_x != 1:
        cfgs[0].lr = cfgs[0].adam_lr = lr_x * width_lr(cfgs[1].resolved().n_embd)
    return *cfgs, inputs, of_model

def patched(inputs, of_model):
    """ Model, its inputs and itself changed """
    class Patched(Model):
        def __init__(self, cfg):
            super().__init__(cfg)
            if of_model is not None:
                with torch.no_grad():
                    of_model(self)

        def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
            if inputs is not None:
                pos, dihedral = inputs(idx, pos, dihedral)
            return super().forward(idx, targets, pos, doc, task, dihedral, cache)
    return Patched

def write_task(folder, task, answered):
    """ a Task as a file of that folder, with or without the answers """
    data = to_json(task)
    if not answered:
        for query in data['test']:
            del query['output']
    checkpoint.write_file(folder / f"{task.name}.json", json.dumps(data).encode())

def write_inverse(folder, task):
    """ the task that has our outputs as inputs. its query is of no use """
    demos = [{'input': y.tolist(), 'output': x.tolist()} for x, y in task.demos]
    data = {'train': demos, 'test': [{'input': [[0]]}]}
    checkpoint.write_file(folder / f"{task.name}_inverse.json", json.dumps(data).encode())

def write_scaled(folder, task, max_pair):
    """ the demos with each cell as a block of 2 x 2, as far as they are small then, for --extra """
    pairs = []
    for x, y in task.demos:
        x, y = x.repeat(2, 0).repeat(2, 1), y.repeat(2, 0).repeat(2, 1)
        h, w = np.array([x.shape, y.shape]).T
        if pair_tokens(h, w)[0].max() <= max_pair:
            pairs.append({'input': x.tolist(), 'output': y.tolist()})
    if len(pairs) == 1: # a list is of two at least
        pairs *= 2
    if pairs:
        checkpoint.write_file(folder / f"{task.name}.json", json.dumps(pairs).encode())

def write_folds(out, n, max_pair):
    """ the small tasks of arc1/training, dealt by their ids -> folders of n folds: blind, its answers, the rest """
    corpus = read_source('arc1/training')
    corpus = corpus.select(small_tasks(corpus, max_pair))
    tasks = sorted((corpus.task(k) for k in range(len(corpus))), key=lambda task: task.name)
    folds = [out / f"fold{k}_of_{n}_{max_pair}" for k in range(n)]
    for k, fold in enumerate(folds):
        for i, task in enumerate(tasks):
            half = 'rest'
            if i % n == k:
                half = 'blind'
                write_task(fold / 'answers', task, True)
            write_task(fold / half, task, half == 'rest')
            write_inverse(fold / f"inverse_{half}", task)
            write_scaled(fold / 'scaled', task, max_pair)
    return folds

# -----------------------------------------------------------------------------

class Stepper:
    """ training steps of an arm, to be timed """

    def __init__(self, arm, fold):
        self.cfg, model_cfg, data_cfg, *changes = configs(arm, fold)
        _, _, self.autocast = run.get_device('cpu', self.cfg.dtype) # and settings by which the cpu is fast
        ds = ArcDataset(data_cfg)
        self.loader = ArcLoader(ds)
        self.model = patched(*changes)(run.fit_to_data(model_cfg, ds))
        self.optimizers = self.model.optimizers(*self.model.peak_rates(0, 0), 0.1, self.cfg.ns_steps)

    def seconds(self, steps):
        """ of so many steps, of a core: others may be busy beside them """
        start = time.process_time()
        for _ in range(steps):
            for _ in range(self.cfg.grad_accum):
                with self.autocast():
                    _, loss = self.model(*self.loader.next_batch())
                (loss / 1000).backward()
            for optimizer in self.optimizers:
                with self.autocast():
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

def measure(arms, fold, path):
    """ seconds a step of the default, and how many times that an arm takes, in turn with it -> dict, kept in a file """
    torch.set_num_threads(1) # as the runs will have
    speed = json.loads(path.read_text()) if path.is_file() else {}
    for arm in dict.fromkeys(['default', *arms]):
        if arm in speed:
            continue
        base, mine = Stepper('default', fold), Stepper(arm, fold)
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
    """ of each query of src, whose answers are known: mean loss over its augments, in nats per output token """
    sampler = Sampler([read_source(src)], data_cfg, rows)
    found = {}
    for k in range(len(sampler.key)):
        first, end = sampler.tables.first[k : k + 2].tolist()
        for i, pair in enumerate(range(first + int(sampler.tables.n_demos[k]), end)):
            view = np.arange(views) # view 0 is the query as it is
            pairs = np.full(views, pair)
            docs = sampler.plan(pairs, np.maximum(view - 1, 0), hash64(1337, DEMOS, pairs, view), view == 0, 1337)
            laid = sampler.lay_out(docs, 'bucket', 0)
            total = 0.0
            for r0, r1, T in laid.batches.tolist():
                _, loss = model(*sampler.write(laid, r0, r1, T, loss_on='query'))
                total += float(loss)
            found[f"{sampler.task(k).name} {i}"] = total / int(docs.loss_tokens.sum())
    return found

def run_dir(out, arm, seed, fold, steps):
    return out / arm.replace(' ', '_') / f"{seed}_{fold}_{steps}"

def work(arm, seed, fold, steps, views, out):
    """ one run, or the rest of it, and its result """
    out_dir = run_dir(out, arm, seed, fold, steps)
    log_every = max(steps // 20, 1)
    cfg, model_cfg, data_cfg, inputs, of_model = configs(arm, out / fold, max_iters=steps, seed=seed,
                                                         log_every=log_every, out_dir=str(out_dir))
    run.Model = patched(inputs, of_model) # whatever is built from a config now
    if checkpoint.steps(out_dir):
        cfg.resume = str(out_dir)
    train.train(cfg, model_cfg, data_cfg)
    model, _, meta = run.load_run(out_dir, torch.device('cpu'))
    answers = str(out / fold / 'answers')
    losses = [row['loss'] for row in run.read_metrics(out_dir) if 'loss' in row]
    result = {'nats': nats(model, data_cfg, meta['rows'], answers), 'train_nats': mean(losses[-2:]),
              'tokens': meta['tokens'], 'steps': steps}
    if inputs is not mdlarc_positions: # decoding tells ours
        path = solve.solve(solve.SolveConfig(run=str(out_dir), data=str(out / fold / 'blind'), views=views))
        result |= right(path, read_tasks(answers))
    checkpoint.write_file(out_dir / 'result.json', json.dumps(result).encode())

def right(path, tasks):
    """ submission.json of a solve -> of each query: was it solved, was its answer found, as 0 or 1 """
    solved = {}
    for row in score(json.loads(path.read_text()), tasks)['per_query']:
        solved[f"{row['task']} {row['query']}"] = int(row['right'])
    candidates, found = read_candidates(path.parent / 'candidates.jsonl', tasks), {}
    for k, task in enumerate(tasks):
        for i, (_, answer) in enumerate(task.queries):
            hits = [np.array_equal(c.grid, answer) for c in candidates.get((k, i), ())]
            found[f"{task.name} {i}"] = int(any(hits))
    return {'solved': solved, 'found': found}

# -----------------------------------------------------------------------------

MEASURES = 'solved', 'found', 'nats'

def by_query(results, measure):
    """ {(seed, fold): result} -> {query: mean over seeds}; {} if it was not measured """
    values = defaultdict(list)
    for result in results.values():
        for query, x in result.get(measure, {}).items():
            values[query].append(x)
    return {query: mean(x) for query, x in values.items()}

def difference(mine, base, measure):
    """
    results of an arm and of the default, {(seed, fold): result}, of which the runs that both have count -> mean over
    queries of the difference, its standard error; for solved and found of the sum over queries
    """
    both = mine.keys() & base.keys()
    a = by_query({key: mine[key] for key in both}, measure)
    b = by_query({key: base[key] for key in both}, measure)
    delta = np.array([a[query] - b[query] for query in a])
    if len(delta) < 2:
        return None
    scale = 1 if measure == 'nats' else len(delta)
    error = scale * float(delta.std(ddof=1)) / len(delta) ** 0.5
    return round(scale * float(delta.mean()), 6), round(error, 6) # the last bit is another one now and then

def shown(x, digits):
    """ (difference, error) or None -> text """
    return "" if x is None else f"{x[0]:+.{digits}f} +- {x[1]:.{digits}f}"

def print_table(arms, base, speed, found):
    """ {arm: {(seed, fold): result}}, the arm that others are compared with -> a summary of each arm, for json """
    table, summary = Table(), {}
    for name in ('arm', 'solved', 'more', 'found', 'more', 'nats', 'more', 'train nats', 'tokens', 's / step', 'runs'):
        table.add_column(name, justify='left' if name == 'arm' else 'right')
    for arm in arms:
        results = found[arm]
        if not results:
            continue
        cells, row = [], {'runs': len(results)}
        for measure in MEASURES:
            x, digits = by_query(results, measure), 3 if measure == 'nats' else 1
            value = None
            if x:
                value = mean(x.values()) if measure == 'nats' else sum(x.values())
            more = difference(results, found[base], measure) if arm != base else None
            cells += [f"{value:.{digits}f}" if x else "-", shown(more, digits)]
            row |= {measure: value, f"{measure}_more": more, 'queries': len(x) or row.get('queries')}
        tokens = mean(result['tokens'] for result in results.values())
        train_nats = mean(result['train_nats'] for result in results.values())
        pace = f"{speed[arm]:.3f}" if arm == 'default' else f"x{speed[arm]:.2f}"
        table.add_row(arm, *cells, f"{train_nats:.3f}", f"{tokens / 1e6:.2f}M", pace, str(len(results)))
        summary[arm] = row
    Console(width=160).print(table)
    return summary

def print_noise(results):
    """ the default against itself: what two seeds differ by, of each pair of them """
    seeds = sorted({seed for seed, _ in results})
    of_seed = {}
    for seed in seeds:
        of_seed[seed] = {(0, fold): x for (s, fold), x in results.items() if s == seed}
    pairs = []
    for a, b in itertools.combinations(seeds, 2):
        row = {measure: difference(of_seed[a], of_seed[b], measure) for measure in MEASURES}
        print(f"seed {a} - seed {b}: solved {shown(row['solved'], 1)}, found {shown(row['found'], 1)}, "
              f"nats {shown(row['nats'], 3)}")
        pairs.append({'seeds': [a, b], **row})
    return pairs

def known_arm(name):
    """ an argument as it is, if it names an arm """
    if name not in ARMS:
        raise argparse.ArgumentTypeError(f"no arm {name}")
    return name

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('arms', nargs='*', type=known_arm, metavar='ARM', help=", ".join(ARMS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--folds', type=int, default=2)
    parser.add_argument('--minutes', type=float, default=5.0)
    parser.add_argument('--max_pair', type=int, default=100, help="tokens of a demo of a small task")
    parser.add_argument('--views', type=int, default=8, help="of a query, to solve it by")
    parser.add_argument('--base', default='default', choices=ARMS, metavar='ARM', help="compared with")
    parser.add_argument('--noise', action='store_true', help="the default alone, seed against seed")
    parser.add_argument('--out', default='out/ablate')
    parser.add_argument('--work', nargs=4, help="one run: ARM SEED FOLD STEPS. for this script itself")
    args = parser.parse_args()
    out = Path(args.out)
    if args.work:
        arm, seed, fold, steps = args.work
        return work(arm, int(seed), fold, int(steps), args.views, out)
    if args.folds < 2:
        parser.error("--folds: want at least 2, what is not asked is trained on")
    others = [] if args.noise else [arm for arm in args.arms or ARMS if arm != args.base]
    arms = [args.base, *others]
    folds = write_folds(out, args.folds, args.max_pair)
    speed = measure(arms, folds[0], out / 'speed.json')
    jobs, wanted = [], defaultdict(dict)
    for seed in args.seeds: # all arms once, then again: a table of one seed is of use already
        for arm in arms:
            step = speed['default'] * (1 if arm == 'default' else speed[arm])
            steps = max(round(60 * args.minutes / step), 1)
            for fold in folds:
                path = run_dir(out, arm, seed, fold.name, steps) / 'result.json'
                wanted[arm][seed, fold.name] = path
                if not path.is_file():
                    jobs.append([arm, str(seed), fold.name, str(steps)])

    def start(job):
        log = out / f"{'_'.join(job[:3]).replace(' ', '_')}.log"
        command = [sys.executable, __file__, '--out', str(out), '--views', str(args.views), '--work', *job]
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        with open(log, 'w') as f:
            failed = subprocess.run(command, stdout=f, stderr=f, env=env).returncode
        print(f"{' '.join(job)}: {f'failed, see {log}' if failed else 'done'}", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(start, jobs))
    found = {}
    for arm in arms:
        found[arm] = {key: json.loads(path.read_text()) for key, path in wanted[arm].items() if path.is_file()}
    summary = print_table(arms, args.base, speed, found)
    if args.noise:
        summary['noise'] = print_noise(found[args.base])
    print(json.dumps(summary))

if __name__ == '__main__':
    main()
