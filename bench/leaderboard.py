"""
what runs/speedrun_cpu.sh and runs/speedrun.sh compute: rows of dev/LEADERBOARD.md, MFU, dollars, and what a speedrun
will take.

  python bench/leaderboard.py trained RUN                   exit code 0 if that run is done, 1 if not
  python bench/leaderboard.py cpu "what changed" RUN ...    the row of some seeds, each with a score.json
  python bench/leaderboard.py gpu OUT "what changed"        the row of a speedrun; --dollars_per_hour, --peak_tflops
  python bench/leaderboard.py plan FLAGS OF TRAIN           expected tokens and minutes of a speedrun, before it begins
"""
import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from model import PEAK, flops
from rich.console import Console
from rich.table import Table

from nanoarc import checkpoint
from nanoarc.data import DataConfig
from nanoarc.model import ModelConfig
from nanoarc.run import Run, fit_to_data, make_dataset, make_model, parse_run, saved_configs
from nanoarc.train import TrainConfig

ROOT = Path(__file__).parent.parent
CPU = "## cpu: the small tasks, 2 cores, 5 minutes"
GPU = "## gpu: all tasks, one card, so many minutes"

# what mdlARC (github.com/mvakde/mdlARC) says of itself: dollars -> % of arc1/evaluation
MDLARC = {0.125: 31.5, 0.25: 38.3, 0.67: 44.0}

def add_row(board, section, cells):
    """
    a row at the end of the table of a section, unless it is there. raises ValueError if there is no such section, or no
    such table in it
    """
    lines = Path(board).read_text().splitlines()
    if section not in lines:
        raise ValueError(f"{board}: no line {section!r}")
    start = lines.index(section)
    table = [] # numbers of its lines
    for k in range(start + 1, len(lines)):
        if lines[k].startswith("## "):
            break
        if lines[k].startswith("|"):
            table.append(k)
    row = f"| {' | '.join(str(x).replace('|', '/') for x in cells)} |"
    if not table or lines[table[0]].count("|") != row.count("|"):
        raise ValueError(f"{board}: {section!r} has no table of {len(cells)} columns")
    if row in lines:
        print(f"{board} has this row already")
        return
    lines.insert(table[-1] + 1, row)
    checkpoint.write_file(board, ("\n".join(lines) + "\n").encode())

def show(board, section, cells):
    """ the row with the names of its columns, short and last """
    lines = Path(board).read_text().splitlines()
    names = next(x for x in lines[lines.index(section) :] if x.startswith("|")).strip("| ").split(" | ")
    table = Table(show_header=False)
    for name, x in zip(names, cells):
        table.add_row(name, str(x))
    Console(width=100).print(table)

def surroundings(run):
    """ what log.txt of a run says of where it was begun: a dict with cpu, cores, device, git, ... """
    return json.JSONDecoder().raw_decode((Path(run) / 'log.txt').read_text())[0]

def day(path):
    return time.strftime('%Y-%m-%d', time.localtime(Path(path).stat().st_mtime))

def is_trained(run):
    if not checkpoint.steps(run):
        return False
    meta = checkpoint.load(run)[1]
    return 0 < meta['max_iters'] <= meta['step']

def sums(run):
    """ what a finished run has come to -> (meta of its checkpoint, its score.json) """
    return checkpoint.load(run)[1], json.loads((Path(run) / 'score.json').read_text())

def cpu(args):
    metas, scores = zip(*(sums(run) for run in args.runs))
    solved = [x['solved'] for x in scores]
    processor = re.sub(r"\(\w+\)|CPU|\d+-Core|Processor|@.*", "", surroundings(args.runs[0])['cpu']).strip()
    cells = [day(Path(args.runs[-1]) / 'score.json'), args.what, f"{mean(solved):.1f}",
             " ".join(map(str, solved)), " ".join(str(x['right']) for x in scores),
             f"{mean(x['val_loss'] for x in metas):.3f}", f"{mean(x['tokens'] for x in metas) / 1e6:.2f}M",
             f"{mean(x['seconds'] for x in metas):.0f}", f"{mean(x['solve_seconds'] for x in scores):.0f}",
             processor, args.commit]
    add_row(args.board, CPU, cells)
    show(args.board, CPU, cells)

# -----------------------------------------------------------------------------
# gpu

def peak_of(name, given=0.0):
    """ name of a card -> FLOP/s of dense bf16, nan if nobody told """
    if given:
        return 1e12 * given
    for key, x in PEAK.items():
        if re.search(rf"\b{key}\b", name):
            return 1e12 * x
    return float('nan')

def on_meta(cfg, ds):
    """ a model for a dataset, on no device: its shapes alone """
    with torch.device('meta'):
        return make_model(fit_to_data(cfg, ds), 'meta')

def per_token(model, ds):
    """ FLOPs of training on a token, padding among them, of a model and the batches of its data """
    loader = ds.loader(0, 1, 'cpu')
    docs = [loader.next_batch().doc.clone() for _ in range(4)]
    return sum(flops(model, doc) for doc in docs) / sum(doc.numel() for doc in docs)

def shape(model):
    """ e.g. 8x512 MA """
    return f"{model.cfg.n_layer}x{model.cfg.n_embd} {model.cfg.mixer}"

def seconds_of(out):
    """ what speedrun.sh has measured, over all its calls -> {stage: seconds} """
    seconds = {}
    for line in (Path(out) / 'seconds.txt').read_text().splitlines():
        stage, x = line.split()
        seconds[stage] = seconds.get(stage, 0) + float(x)
    return seconds

def gpu(args):
    meta, score = sums(args.out)
    model_cfg, data_cfg = saved_configs(meta)
    ds = make_dataset(data_cfg, meta['train']['seed'])
    model = on_meta(model_cfg, ds)
    where = surroundings(args.out)
    card = where['cpu'] if where['device'] == 'cpu' else where['device'].removeprefix("NVIDIA ")
    rate = per_token(model, ds) * meta['tokens'] / meta['seconds']
    mfu = rate / peak_of(where['device'], args.peak_tflops)
    seconds, rate_a_second = seconds_of(args.out), args.dollars_per_hour / 3600
    total = sum(seconds.values())
    cells = [day(Path(args.out) / 'score.json'), args.what, args.target, f"{total / 60:.1f}",
             f"{total * rate_a_second:.2f}", f"{score['score']:.2f}%",
             f"{score['solved']} of {score['tasks']}",
             "" if meta['val_loss'] is None else f"{meta['val_loss']:.3f}", f"{meta['tokens'] / 1e6:,.1f}M",
             f"{rate / 1e9:,.0f} GFLOP/s" if math.isnan(mfu) else f"{mfu:.1%}", shape(model), card, args.commit]
    add_row(args.board, GPU, cells)
    show(args.board, GPU, cells)
    paid = [f"{stage} {x:.0f} s {x * rate_a_second:.3f}" for stage, x in seconds.items()]
    print(f"dollars at {args.dollars_per_hour:.2f} an hour: {', '.join(paid)}")

def mdlarc_score(dollars):
    """ what mdlARC's curve has for so many dollars, by their logarithm -> words """
    least, most = min(MDLARC), max(MDLARC)
    if dollars < least:
        return f"less than {MDLARC[least]:.0f}%"
    if dollars > most:
        return f"more than {MDLARC[most]:.0f}%"
    return f"{np.interp(math.log(dollars), np.log(list(MDLARC)), list(MDLARC.values())):.0f}%"

def plan(args, flags):
    """ print what these settings come to in so many minutes of training at an assumed MFU """
    cfg = parse_run(Run(TrainConfig(), ModelConfig(), DataConfig()), flags, 'train', "")
    card = args.card or (torch.cuda.get_device_name() if torch.cuda.is_available() else 'H100')
    peak = peak_of(card, args.peak_tflops)
    ds = make_dataset(cfg.data, cfg.train.seed)
    model = on_meta(cfg.model, ds)
    parameters = sum(p.numel() for p in model.parameters())
    work = per_token(model, ds)
    tokens = 60 * args.train_minutes * args.mfu * peak / work
    loader = ds.loader(0, 1, 'cpu')
    step = cfg.train.grad_accum * mean(loader.next_batch().idx.numel() for _ in range(8))
    epoch = float(ds.plan(range(min(len(ds), 2**14))).length.mean()) * len(ds)
    minutes = args.train_minutes + args.solve_minutes + args.other_minutes
    dollars = minutes / 60 * args.dollars_per_hour
    said = {'card': f"{card}, {peak / 1e12:.0f} TFLOP/s of bf16 at most",
            'model': f"{shape(model)}, {parameters / 1e6:.1f}M parameters, {work / 1e6:.0f} MFLOP a token",
            'data': ds.about(),
            'assumed MFU': f"{args.mfu:.0%}; measured: 7.6% of an H200 with 8x512 MA. since then the code is "
                            "another one, a roofline gives it 22% (dev/LOG.md)",
            'tokens': f"{tokens / 1e6:,.0f}M in {tokens / step:,.0f} steps of {step / 1e3:.1f}k, "
                      f"{tokens / epoch:,.0f} epochs of {epoch / 1e6:.2f}M",
            'minutes': f"{minutes:.1f}: {args.train_minutes:g} to train, {args.solve_minutes:g} to solve, "
                       f"{args.other_minutes:g} to start, compile, save and score",
            'dollars': f"{dollars:.2f} at {args.dollars_per_hour:.2f} an hour"}
    if args.target == 'arc1/evaluation':
        said['score'] = f"not measured. mdlARC's curve has {mdlarc_score(dollars)} for these dollars"
    for name, x in said.items():
        print(f"{name + ':':13s} {x}")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--board', default=ROOT / 'dev' / 'LEADERBOARD.md')
    parser.add_argument('--commit', default='?')
    parser.add_argument('--dollars_per_hour', type=float, default=2.0)
    parser.add_argument('--peak_tflops', type=float, default=0.0, help="of the card in dense bf16, 0 = by its name")
    parser.add_argument('--target', default='arc1/evaluation')
    parser.add_argument('--card', default='', help="plan: of another card than this machine's")
    parser.add_argument('--mfu', type=float, default=0.08, help="plan: assumed")
    for name in ('train', 'solve', 'other'):
        parser.add_argument(f"--{name}_minutes", type=float, default=1.0, help="plan")
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('trained').add_argument('run')
    part = commands.add_parser('cpu')
    part.add_argument('what')
    part.add_argument('runs', nargs='+')
    part = commands.add_parser('gpu')
    part.add_argument('out')
    part.add_argument('what')
    commands.add_parser('plan')
    args, flags = parser.parse_known_args()
    if flags and args.command != 'plan':
        parser.error(f"unknown {' '.join(flags)}")
    if args.command == 'trained':
        sys.exit(not is_trained(args.run))
    try:
        if args.command == 'plan':
            plan(args, flags)
        elif args.command == 'cpu':
            cpu(args)
        else:
            gpu(args)
    except (ValueError, OSError) as e:
        sys.exit(f"leaderboard: {e}")

if __name__ == '__main__':
    main()
