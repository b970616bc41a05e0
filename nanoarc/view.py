"""
tasks, sources, runs and results for the eye. grids are drawn in the terminal, or with matplotlib into a png.
"""
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nanoarc import __version__
from nanoarc.sources import read_json, read_tasks, to_grid

# the ten colors as arcprize.org paints them
COLORS = ['#000000', '#0074d9', '#ff4136', '#2ecc40', '#ffdc00', '#aaaaaa', '#f012be', '#ff851b', '#7fdbff', '#870c25']

@dataclass
class ViewConfig:
    things: Annotated[list[str], tyro.conf.Positional] # task ids, or directories of runs; with --out page.html one directory that nanoarc solve wrote
    data: str = 'arc1/training+arc1/evaluation+arc2/training+arc2/evaluation' # sources to look task ids up in
    submission: str = '' # a submission.json: show its attempts too, and whether they are right
    out: str = '' # write a .png here instead of the terminal, or a .html of all tasks of a solved directory

def main(cfg):
    """ show task ids or runs. raises ValueError for an id that no source has """
    if len(cfg.things) == 0:
        raise ValueError("name a task id or a run directory to view")
    if cfg.out and not cfg.out.endswith(('.png', '.html')):
        raise ValueError(f"--out {cfg.out}: want a .png or .html")
    if cfg.out.endswith('.html'):
        if len(cfg.things) != 1 or not (Path(cfg.things[0]) / 'candidates.jsonl').is_file():
            raise ValueError(f"--out {cfg.out}: want one directory with a candidates.jsonl, as nanoarc solve writes it")
        write_page(cfg.things[0], cfg.out)
        print(cfg.out)
        return
    if all(Path(x).is_dir() for x in cfg.things):
        out = cfg.out or f"{cfg.things[0]}/loss.png"
        draw_loss(cfg.things, out)
        print_frame("runs", run_frame(cfg.things))
        print(out)
        return
    tasks = {}
    for task in read_tasks(cfg.data):
        tasks.setdefault(task.name, task) # the first source that has it
    missing = [x for x in cfg.things if x not in tasks]
    if missing:
        raise ValueError(f"no task and no directory named {', '.join(missing)} in {cfg.data}")
    tasks = [(tasks[name], tried) for name, tried in zip(cfg.things, read_attempts(cfg.submission, cfg.things))]
    if cfg.out:
        draw_tasks(tasks, cfg.out)
        print(cfg.out)
    else:
        for task, tried in tasks:
            print_task(task, tried)

def read_attempts(path, names):
    """ submission.json ('' = none) -> for each task name a list of {'attempt_1': grid, ...} by query. raises ValueError """
    submission = read_json(path) if path else {}
    if type(submission) is not dict:
        raise ValueError(f"{path}: want an object of attempts by task id, got {type(submission).__name__}")
    attempts = []
    for name in names:
        entries = submission.get(name, [])
        if type(entries) is not list or any(type(x) is not dict for x in entries):
            raise ValueError(f"{path}: task {name}: want a list of attempts by query")
        attempts.append([{key: to_grid(x[key], f"{path}: task {name}, query {i}, {key}") for key in ('attempt_1', 'attempt_2') if key in x}
                         for i, x in enumerate(entries)])
    return attempts

def captioned(task, tried):
    """ a task and its attempts, as read_attempts has them -> list of (caption, [grids]), each a column of the picture """
    columns = [(f"demo {i}", [x, y]) for i, (x, y) in enumerate(task.demos)]
    for i, (x, answer) in enumerate(task.queries):
        columns.append((f"query {i}", [x] + ([] if answer is None else [answer])))
        for key, grid in (tried[i] if i < len(tried) else {}).items():
            right = "" if answer is None else " right" if np.array_equal(grid, answer) else " wrong"
            columns.append((f"{key.replace('_', ' ')}{right}", [grid]))
    return columns

# -----------------------------------------------------------------------------
# terminal

def print_task(task, tried=(), console=None):
    """ demos, queries, attempts and answers side by side, inputs over outputs """
    console = console or Console()
    console.print(f"[bold]{task.name}[/bold] ({task.source}): {len(task.demos)} demos, {len(task.queries)} queries")
    blocks = []
    for caption, grids in captioned(task, tried):
        table = Table(caption, box=None, padding=0, header_style="dim" if "wrong" not in caption else "red")
        for k, grid in enumerate(grids):
            if k > 0:
                table.add_row("")
            table.add_row(grid_text(grid))
        blocks.append(table)
    console.print(Columns(blocks, padding=(1, 3)))

def grid_text(grid):
    """ a grid as rich Text, a cell two columns wide, with its digit so that it reads without color too """
    text = Text()
    for r, row in enumerate(grid):
        if r > 0:
            text.append("\n")
        for x in row:
            text.append(f"{x} ", style=f"{'black' if x in (3, 4, 5, 8) else 'white'} on {COLORS[x]}")
    return text

# -----------------------------------------------------------------------------
# pages: what a run solved, and grids in a notebook

def write_page(solved, out, most=6):
    """ a directory of nanoarc solve -> one self-contained html page: tasks, attempts, the `most` best candidates of a query. raises ValueError """
    solved = Path(solved)
    about = read_json(solved / 'solve.json')
    submission, candidates = read_json(solved / 'submission.json'), {}
    for n, line in enumerate((solved / 'candidates.jsonl').read_text().splitlines(), 1):
        try:
            x = json.loads(line)
            candidates.setdefault((x['task'], x['query']), []).append([pack_grid(x['grid']), x['votes'], x['log_prob'] if x['score'] is None else x['score']])
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{solved / 'candidates.jsonl'}: line {n}: not a candidate ({e})") from None
    tasks = []
    for task in read_tasks(about['data']):
        if task.name not in submission: # over --max_pair
            continue
        queries = [{'input': pack_grid(x), 'answer': None if y is None else pack_grid(y), 'candidates': candidates.get((task.name, i), [])[:most],
                    'attempts': [pack_grid(submission[task.name][i][key]) for key in ('attempt_1', 'attempt_2')]} for i, (x, y) in enumerate(task.queries)]
        right = [None if q['answer'] is None else q['answer'] in q['attempts'] for q in queries]
        state = 'empty' if not any(q['candidates'] for q in queries) else 'unknown' if None in right else 'solved' if all(right) else 'wrong'
        tasks.append({'name': task.name, 'state': state, 'demos': [[pack_grid(x), pack_grid(y)] for x, y in task.demos], 'queries': queries})
    known = [task for task in tasks if task['state'] != 'unknown']
    title = f"{about['data']}: {sum(task['state'] == 'solved' for task in known)} of {len(known)} solved" if known else about['data']
    data = json.dumps({'title': title, 'colors': COLORS, 'tasks': tasks}, separators=(',', ':')).replace('<', '\\u003c') # no name may end the script
    page = (Path(__file__).parent / 'page.html').read_text().replace('DATA', data, 1)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(page)

def pack_grid(grid):
    """ (H, W) rows -> '01|23' """
    return "|".join("".join(map(str, row)) for row in (grid.tolist() if isinstance(grid, np.ndarray) else grid))

def grid_html(grid, side=10):
    """ a grid as inline svg, for a notebook """
    H, W = grid.shape
    cells = "".join(f'<rect x="{c * side}" y="{r * side}" width="{side - 1}" height="{side - 1}" fill="{COLORS[grid[r, c]]}"/>' for r in range(H) for c in range(W))
    return f'<svg width="{W * side}" height="{H * side}" style="background:#555555">{cells}</svg>'

def task_html(task, tried=()):
    """ a task, and attempts as read_attempts has them, as html: what a Task shows in a notebook """
    from html import escape
    blocks = "".join(f'<div style="margin:0 12px 8px 0"><small>{escape(caption)}</small>' + "".join(f'<div style="margin-top:4px">{grid_html(grid)}</div>' for grid in grids) + '</div>'
                     for caption, grids in captioned(task, tried))
    return f'<div><b>{escape(task.name)}</b> ({escape(task.source)})<div style="display:flex;flex-wrap:wrap">{blocks}</div></div>'

# -----------------------------------------------------------------------------
# runs, while they train

class Log:
    """
    what is measured and printed, by rank 0: metrics.jsonl; log.txt, which begins with all that made the run; a tracker; a
    progress line on a terminal, plain lines elsewhere. a resumed run rewrites what came after step. out_dir=None: nothing.
    """

    def __init__(self, out_dir, step, name, cfgs, device, world):
        self.out_dir, self.last, self.bar, self.tracker = out_dir, {}, None, None
        if out_dir is None:
            return
        from nanoarc import checkpoint # imported late: it brings torch
        rows = [x for x in read_metrics(out_dir) if x['step'] < step or (x['step'] == step and 'loss' in x)] if step > 0 else []
        checkpoint.write_file(out_dir / 'metrics.jsonl', "".join(json.dumps(x) + "\n" for x in rows).encode())
        settings = {key: x for cfg in cfgs for key, x in asdict(cfg).items()}
        with open(out_dir / 'log.txt', 'a') as f:
            print(json.dumps({'settings': settings, **surroundings(device, world)}, indent=1), file=f)
            for path in sorted(Path(__file__).parent.glob('*.py')):
                print(f"# {'=' * 77}\n# nanoarc/{path.name}\n# {'=' * 77}\n{path.read_text()}", file=f)
        if cfgs[0].log:
            self.tracker = importlib.import_module(cfgs[0].log)
            self.tracker.init(project='nanoarc', name=name, config=settings, resume='allow', **({'id': name, 'dir': str(out_dir)} if cfgs[0].log == 'wandb' else {}))
        if sys.stdout.isatty():
            columns = TextColumn("{task.description}"), BarColumn(bar_width=5), TimeRemainingColumn() # 80 columns
            self.bar = Progress(*columns, console=Console(soft_wrap=True))

    def __enter__(self):
        if self.bar:
            self.bar.start()
            self.bar.add_task("0/?", total=None)

    def __exit__(self, kind, *_):
        if self.bar:
            self.bar.stop()
        if self.tracker:
            self.tracker.finish(**({'exit_code': 1} if kind and self.tracker.__name__ == 'wandb' else {}))

    def sync(self):
        """ what is logged reaches the disk, before a checkpoint that counts on it """
        if self.out_dir is not None:
            with open(self.out_dir / 'metrics.jsonl', 'a') as f:
                os.fsync(f.fileno())

    def print(self, text, show=True):
        """ a line to the eye and to log.txt """
        if self.out_dir is None:
            return
        with open(self.out_dir / 'log.txt', 'a') as f:
            print(text, file=f)
        if show:
            try:
                print(text, flush=True)
            except BrokenPipeError: # nobody reads on: `| head`, or a `| tee` that ctrl-c reached too. training goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def row(self, step, max_iters, **values):
        values = {key: x for key, x in values.items() if x is not None}
        if self.out_dir is None or not values: # no validation set
            return
        self.last.update(values)
        with open(self.out_dir / 'metrics.jsonl', 'a') as f:
            f.write(json.dumps({'step': step, **values}) + "\n")
        if self.tracker:
            self.tracker.log(values, step=step)
        x = self.last
        text = f"{step}/{max_iters or '?'} " + " ".join(s.format(x[key]) for key, s in (('loss', "loss {:.3f}"), ('val_loss', "val {:.3f}"), ('lr', "lr {:.0e}"),
                                                        ('tok_s', "{:,.0f} tok/s"), ('wait', "wait {:.1%}")) if key in x)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, total=max_iters or None, description=text)
        self.print(f"step {text}", show=not self.bar and 'loss' in values)

    def draw(self, draw, model, ds):
        """ loss.png, and val.png by draw(model, ds, path) """
        if self.out_dir is not None and self.last:
            draw_loss([self.out_dir], self.out_dir / 'loss.png')
            if draw is not None and len(ds.val_pairs):
                draw(model, ds, self.out_dir / 'val.png')

def surroundings(device, world):
    """ what a run depends on but for its settings -> dict: versions, hardware, the commit """
    import torch
    def output(*command):
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""
    cpuinfo = Path('/proc/cpuinfo')
    cpu = [line.partition(':')[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith('model name')] if cpuinfo.exists() else []
    tracked = output('git', 'ls-files', 'train.py') if shutil.which('git') else "" # not the repository of who has us installed
    return {'started': time.strftime('%Y-%m-%d %H:%M:%S %Z'), 'command': sys.argv, 'git': output('git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*') if tracked else "",
            'nanoarc': __version__, 'python': platform.python_version(), **{name: version(name) for name in ('torch', 'numpy', 'numba', 'safetensors')}, 'platform': platform.platform(),
            'cpu': cpu[0] if cpu else platform.processor(), 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device), 'ranks': world}

def run_frame(runs):
    """ run directories -> polars frame, a row a run: its steps, last and best losses in nats per output token, speed. raises ValueError """
    import polars as pl
    rows = pl.concat([pl.DataFrame([{'run': str(run), **x} for x in need_metrics(run)], infer_schema_length=None) for run in runs], how='diagonal')
    for name in ('loss', 'val_loss', 'tok_s', 'wait'):
        if name not in rows.columns:
            rows = rows.with_columns(pl.lit(None, pl.Float64).alias(name))
    return rows.group_by('run', maintain_order=True).agg(pl.col('step').max(), pl.col('loss').drop_nulls().last(), pl.col('val_loss').drop_nulls().last(),
        pl.col('val_loss').min().alias('best val_loss'), pl.col('step').sort_by('val_loss', nulls_last=True).first().alias('at step'), pl.col('tok_s').median(), pl.col('wait').mean())

# -----------------------------------------------------------------------------
# statistics of sources

def print_stats(cfg, png=''):
    """ DataConfig -> tables of what its data holds: tasks, sizes, colors, lengths of its documents, what does not fit; and a picture """
    import polars as pl

    from nanoarc.data import ArcDataset # imported late: it brings torch
    ds = ArcDataset(cfg)
    s, t = ds.sampler, ds.sampler.tables
    h, w = t.grid >> 8 & 255, t.grid & 255
    pairs = pl.DataFrame({
        'source': np.array([c.source for c in s.corpora])[s.part[t.pair_task]], 'task': t.pair_task, 'demo': s.is_demo, 'answered': s.known, 'same shape': (h[::2] == h[1::2]) & (w[::2] == w[1::2]),
        'input side': np.maximum(h[::2], w[::2]), 'output side': np.maximum(h[1::2], w[1::2]), 'input cells': (h * w)[::2],
        'output cells': (h * w)[1::2], 'tokens, longer way': t.need.max(0)})
    docs = ds.plan(np.arange(min(len(ds), 2**17), dtype=np.uint64)) # of an epoch, or enough of a long one
    shots = (docs.pairs >= 0).sum(1) - 1
    can = np.minimum(np.bincount(t.pair_task, t.usable)[t.pair_task] - t.usable, s.most)[docs.pairs[:, 0]]
    tables = [("tasks", pairs.group_by('source', maintain_order=True).agg(
        tasks=pl.col('task').n_unique(), demos=pl.col('demo').sum(), queries=(~pl.col('demo')).sum(),
        answers=(pl.col('answered') & ~pl.col('demo')).sum(), same_shape=pl.col('same shape').filter('answered').mean()))]
    columns = {name: pairs.filter('answered')[name].to_numpy() for name in pairs.columns[5:]}
    columns |= {'demos a task': t.n_demos, f"tokens a document, shots={cfg.shots}": docs.length, "of them with loss": docs.loss_tokens}
    tables.append(("percentiles", pl.DataFrame([{'': name, **{f"{q}%": int(np.percentile(x, q, method='nearest')) for q in (0, 5, 25, 50, 75, 95, 99, 100)}, 'mean': float(x.mean())}
                                                for name, x in columns.items()])))
    cells = np.bincount(np.concatenate([t.cells[a : a + 2**24] for a in range(0, len(t.cells), 2**24)]), minlength=10)
    tables.append(("colors", pl.DataFrame({'color': range(10), 'cells': cells / cells.sum(), **{
        f"{name} that have it": [float((x >> color & 1).mean()) for color in range(10)] for name, x in
        zip(('inputs', 'outputs'), np.concatenate([c.colors for c in s.corpora]).reshape(-1, 2)[s.known].T)}})))
    tables.append((f"in block_size={cfg.block_size}", pl.DataFrame({
        'documents an epoch': [len(ds)], 'lost demos': [int((shots < can).sum())], 'targets too long': [ds.num_long], 'targets without context': [ds.num_alone],
        'tasks over max_pair': [ds.num_tasks_out], 'tasks malformed': [len(ds.bad)]})))
    for title, frame in tables:
        print_frame(title, frame)
    if png:
        draw_stats(pairs.filter('answered'), docs, shots, cells, cfg, png)
        print(png)

# -----------------------------------------------------------------------------
# pictures

def pyplot():
    """ matplotlib without a window, imported late: it takes a second """
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    return plt

def draw_grid(ax, grid, title="", color='black'):
    """ one grid into a matplotlib axis """
    from matplotlib.colors import ListedColormap
    ax.pcolormesh(grid, cmap=ListedColormap(COLORS), vmin=0, vmax=9, edgecolors='#555555', linewidth=0.5)
    ax.set(aspect='equal', xticks=[], yticks=[], ylim=(grid.shape[0], 0))
    ax.set_title(title, fontsize=8, color=color)

def draw_tasks(tasks, out):
    """ list of (Task, attempts) -> a png, two rows of grids a task: inputs over outputs, then the attempts """
    plt = pyplot()
    rows = [captioned(task, tried) for task, tried in tasks]
    n = max(len(columns) for columns in rows)
    fig = plt.figure(figsize=(1.5 * n, 3.6 * len(rows)), layout='constrained')
    for part, (task, _), columns in zip(fig.subfigures(len(rows), squeeze=False)[:, 0], tasks, rows):
        part.suptitle(task.name, x=0.01, ha='left', fontsize=10, weight='bold')
        axes = part.subplots(2, n, squeeze=False)
        for ax in axes.flat:
            ax.axis('off')
        for i, (caption, grids) in enumerate(columns):
            color = 'green' if caption.endswith("right") else 'red' if caption.endswith("wrong") else 'black'
            first = int(caption.startswith("attempt")) # attempts stand beside the answer
            for j, grid in enumerate(grids, first):
                axes[j, i].axis('on')
                draw_grid(axes[j, i], grid, caption if j == first else "answer" if caption.startswith("query") else "", color)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)

def draw_stats(pairs, docs, shots, cells, cfg, out):
    """ sides, colors and document lengths of a source -> a png. pairs is a polars frame, see print_stats """
    plt = pyplot()
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 7), layout='constrained')
    a.hist2d(pairs['input side'].to_numpy(), pairs['output side'].to_numpy(), bins=np.arange(0.5, 31.5), cmin=1, norm='log')
    a.set(title="longer side of the grids of a pair", xlabel="input", ylabel="output", aspect='equal')
    b.bar(range(10), cells / cells.sum(), color=COLORS, edgecolor='#555555')
    b.set(title="share of all cells", xlabel="color", xticks=range(10))
    c.hist(docs.length, bins=60, color='#0074d9')
    c.axvline(cfg.block_size, color='#ff4136', linewidth=1)
    c.set(title=f"documents of shots={cfg.shots}, block_size in red", xlabel="tokens", ylabel="documents")
    d.bar(*np.unique(shots, return_counts=True), color='#2ecc40')
    d.set(title="demos before the target", xlabel="demos", ylabel="documents")
    fig.suptitle(cfg.data)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)

def print_frame(title, frame):
    """ a polars frame in the terminal """
    table = Table(title=title, title_justify='left', title_style='bold')
    for name in frame.columns:
        table.add_column(name, justify='left' if frame[name].dtype.to_python() is str else 'right')
    for row in frame.iter_rows():
        table.add_row(*("" if x is None else f"{x:.3f}" if isinstance(x, float) and x < 10 else f"{x:,.1f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else x for x in row))
    Console().print(table)

def read_metrics(run):
    """ metrics.jsonl of a run directory -> list of dicts, each with 'step'. lines that a crash cut short or spoilt are left out """
    path, rows = Path(run) / 'metrics.jsonl', []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            x = json.loads(line)
        except ValueError:
            continue
        rows += [x] if isinstance(x, dict) and isinstance(x.get('step'), int) else []
    return rows

def need_metrics(run):
    """ read_metrics, or ValueError where there are none """
    if not (rows := read_metrics(run)):
        raise ValueError(f"{run}: no metrics.jsonl with a row, not a run directory")
    return rows

def draw_loss(runs, out):
    """ training and validation loss of one or several run directories -> a png """
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4), layout='constrained')
    for k, run in enumerate(runs):
        rows = need_metrics(run)
        name = "" if len(runs) == 1 else f"{Path(run).name} "
        for key, label, style in (('loss', "training", dict(alpha=0.5, linewidth=1)), ('val_loss', "validation", dict(marker='o', markersize=3))):
            points = [(x['step'], x[key]) for x in rows if key in x]
            if points:
                ax.plot(*zip(*points), color=f"C{k if len(runs) > 1 else int(key == 'val_loss')}", label=name + label, **style)
    ax.set(xlabel="step", ylabel="nats per output token", yscale='log')
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    fig.savefig(out, dpi=110)
    plt.close(fig)
