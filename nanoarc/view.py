"""
tasks, sources, runs and results for the eye: in the terminal, as a png by matplotlib, as a page.
"""
import contextlib
import io
import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nanoarc import checkpoint
from nanoarc.corpus import read_json
from nanoarc.data import ArcDataset, one_a_row
from nanoarc.decode import decode
from nanoarc.grids import ROW, decode_grid
from nanoarc.paint import PALETTE, captioned
from nanoarc.run import read_metrics
from nanoarc.sources import read_tasks, to_json
from nanoarc.submission import read_attempts, read_candidates, read_submission, score

@dataclass
class ViewConfig:
    # task ids, or directories of runs; with --out page.html one directory that nanoarc solve wrote
    things: Annotated[list[str], tyro.conf.Positional]
    # sources to look task ids up in
    data: str = 'arc1/training+arc1/evaluation+arc2/training+arc2/evaluation'
    submission: str = '' # a submission.json: show its attempts too, and whether they are right
    out: str = '' # write a .png here instead of the terminal, or a .html of all tasks of a solved directory
    live: bool = False # a run, again and again while it trains, on any machine that sees its directory

def view(cfg):
    """ show task ids or runs. raises ValueError for an id that no source has """
    if len(cfg.things) == 0:
        raise ValueError("name a task id or a run directory to view")
    if cfg.live and (len(cfg.things) != 1 or not Path(cfg.things[0]).is_dir()):
        raise ValueError("--live: want the directory of one run")
    if cfg.out and not cfg.out.endswith(('.png', '.html')):
        raise ValueError(f"--out {cfg.out}: want a .png or .html")
    if cfg.out.endswith('.html'):
        if len(cfg.things) != 1 or not Path(cfg.things[0]).is_dir():
            raise ValueError(f"--out {cfg.out}: want one directory that solve wrote. a task goes into a .png")
        if not (Path(cfg.things[0]) / 'candidates.jsonl').is_file():
            raise ValueError(f"--out {cfg.out}: nothing is solved in {cfg.things[0]} yet, want first: nanoarc solve")
        write_page(cfg.things[0], cfg.out)
        print(cfg.out)
    elif cfg.live:
        watch(cfg.things[0])
    elif all(Path(x).is_dir() for x in cfg.things):
        out = said = cfg.out or f"{cfg.things[0]}/loss.png"
        if not cfg.out:
            checkpoint.refuse_links(cfg.things[0])
        try:
            draw_loss(cfg.things, out)
        except OSError as e: # perhaps nobody may write there
            if cfg.out:
                raise
            said = f"{out}: not written, {e.strerror}. --out x.png goes elsewhere"
        if len(cfg.things) == 1:
            Console().print(screen(cfg.things[0], solved_of(cfg.things[0])))
        else:
            print_table("runs", [run_row(run, need_metrics(run)) for run in cfg.things])
        print(said)
    else:
        view_tasks(cfg)

def find_tasks(names, data):
    """ ids and sources -> list of Task, of each the first that has this id. raises ValueError """
    known = {}
    for task in read_tasks(data):
        known.setdefault(task.name, task)
    missing = [x for x in names if x not in known]
    nowhere = [x for x in missing if not Path(x).is_dir()]
    if nowhere:
        raise ValueError(f"no task and no directory named {', '.join(nowhere)} in {data}")
    if missing:
        raise ValueError(f"{missing[0]} is a directory: want tasks alone or runs alone")
    return [known[name] for name in names]

def view_tasks(cfg):
    """ show task ids """
    tasks = find_tasks(cfg.things, cfg.data)
    shown = list(zip(tasks, attempts_of(tasks, cfg.submission)))
    if cfg.out:
        draw_tasks(shown, cfg.out)
        print(cfg.out)
    else:
        for task, tried in shown:
            print_task(task, tried)

def attempts_of(tasks, path):
    """ submission.json ('' = none) -> of each task a list by query of {'attempt_1': grid, ...}. raises ValueError """
    submission = read_submission(path) if path else {}
    attempts = []
    for task in tasks:
        tried, said = read_attempts(submission.get(task.name, []), len(task.queries), f"{path}: task {task.name}")
        for kind, text in said:
            if kind == 'broken':
                raise ValueError(text)
        attempts.append(tried)
    return attempts

# -----------------------------------------------------------------------------
# terminal

def print_task(task, tried=(), console=None):
    """ demos, queries, attempts and answers side by side, inputs over outputs """
    console = console or Console()
    about = f" ({task.source}): {len(task.demos)} demos, {len(task.queries)} queries"
    console.print(Text.assemble((task.name, 'bold'), about)) # brackets in a name are no markup
    blocks = []
    for caption, grids in captioned(task, tried):
        table = Table(caption, box=None, padding=0, header_style="red" if "wrong" in caption else "dim")
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
            ink = 'black' if x in (3, 4, 5, 8) else 'white' # on the light colors
            text.append(f"{x} ", style=f"{ink} on {PALETTE[x]}")
    return text

def print_table(title, rows):
    """ list of dicts of equal keys, in the terminal """
    table = Table(title=title, title_justify='left', title_style='bold')
    for name, x in rows[0].items():
        table.add_column(name, justify='left' if isinstance(x, str) else 'right')
    for row in rows:
        table.add_row(*(Text(cell_text(x)) for x in row.values()))
    Console().print(table)

def cell_text(x):
    """ a value of a table as text """
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.3f}" if x < 10 else f"{x:,.1f}"
    return x if isinstance(x, str) else f"{x:,}"

# -----------------------------------------------------------------------------
# a run in the terminal

DOTS = np.array([[1, 8], [2, 16], [4, 32], [64, 128]]) # of a letter of braille: 4 rows, 2 columns

def chart(curves, width=64, height=8):
    """ list of (steps, losses, style) -> rich Text: the curves over a log axis, in letters of braille """
    steps = np.concatenate([x for x, _, _ in curves])
    logs = np.log(np.maximum(np.concatenate([y for _, y, _ in curves]), 1e-6))
    first, last, low, high = steps.min(), steps.max(), logs.min(), logs.max()
    letters, ink = np.zeros((height, width), int), np.full((height, width), 'none', object)
    for x, y, style in curves:
        place = (np.array(x) - first) / max(last - first, 1) * (2 * width - 1)
        col = np.arange(int(place[0]), int(place[-1]) + 1)
        line = np.interp(col, place, np.log(np.maximum(y, 1e-6)))
        row = ((high - line) / max(high - low, 1e-6) * (4 * height - 1)).astype(int)
        np.bitwise_or.at(letters, (row // 4, col // 2), DOTS[row % 4, col % 2])
        ink[row // 4, col // 2] = style
    text = Text()
    for r in range(height):
        label = f"{np.exp(high + (low - high) * r / (height - 1)):8.3g} " if r % 4 == 0 or r == height - 1 else " " * 9
        text.append(label, style='dim')
        for letter, style in zip(letters[r], ink[r]):
            text.append(chr(0x2800 + letter), style=style)
        text.append("\n")
    return text.append(f"{'':9}{first:<{width // 2},}{last:>{width // 2},}", style='dim')

def read_val(run):
    """ the queries of val.png -> list of rich tables: query, answer and what the model answered """
    tables = []
    with contextlib.suppress(ValueError, TypeError, IndexError, OSError): # there are none
        for name, query, answer, attempt in json.loads((Path(run) / 'val.json').read_bytes()):
            how = ("right", 'green') if attempt == answer else ("wrong", 'red')
            table = Table(box=None, padding=(0, 2, 0, 0))
            for head in ((name, 'dim'), ("answer", 'dim'), how):
                table.add_column(Text(*head))
            table.add_row(*map(grid_text, (query, answer, attempt)))
            tables.append(table)
    return tables

def last_lines(run):
    """ of log.txt. it begins with all sources, so only its end is read """
    path = Path(run) / 'log.txt'
    if not path.is_file():
        return []
    with open(path, 'rb') as f:
        f.seek(max(path.stat().st_size - 4096, 0))
        return f.read().decode('utf-8', 'replace').splitlines()

def end_of(run):
    """ how a run has ended, in the words of its log. "" = it has not, or was killed """
    for line in last_lines(run)[-2:]:
        if end := re.match(r'\d+ steps, [\d,]+ tokens, \d+ s|stopped by signal .*|ended by .*', line):
            return end[0]
    return ""

def screen(run, solved=""):
    """ a directory of a run -> what the terminal shows of it: where it stands, its losses, some validation queries """
    rows = read_metrics(run)
    if not rows:
        return Text(f"{run}: no row in metrics.jsonl yet")
    about = run_row(run, rows)
    totals = re.findall(r'^step \d+/(\d+)', "\n".join(last_lines(run)), re.MULTILINE) # as soon as they are known
    of = f" of {int(totals[-1]):,}" if totals else ""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("step", f"{about['step']:,}{of}")
    if about['loss'] is not None:
        facts.add_row(Text("training loss", 'dodger_blue1'), f"{about['loss']:.3f} nats per output token")
    if about['val_loss'] is not None:
        best = f"{about['best val_loss']:.3f} at step {about['at step']:,}"
        facts.add_row(Text("validation loss", 'dark_orange'), f"{about['val_loss']:.3f}, the lowest was {best}")
    if None not in (about['tok_s'], about['wait']):
        facts.add_row("speed", f"{about['tok_s']:,.0f} tokens/s, {about['wait']:.1%} of the time waiting for data")
    if solved:
        facts.add_row("solved", f"{solved} tasks")
    if end_of(run):
        facts.add_row("ended", Text(end_of(run)))
    curves = []
    for key, style in (('loss', 'dodger_blue1'), ('val_loss', 'dark_orange')):
        steps, losses = curve(rows, key)
        if steps:
            curves.append((steps, losses, style))
    parts = [Text(str(run), 'bold'), facts, "", chart(curves) if curves else "", ""]
    return Group(*parts, Columns(read_val(run), padding=(1, 3)))

def watch(run, seconds=1.0):
    """ the screen of a run, drawn again and again until it has ended or somebody presses ctrl-c """
    with Live(screen(run), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while not end_of(run):
            time.sleep(seconds)
            live.update(screen(run), refresh=True)
        live.update(screen(run), refresh=True) # it may have ended after the one before

def solved_of(run):
    """ "14 of 34" tasks, or "" where nothing was solved or not every answer is known """
    with contextlib.suppress(ValueError, OSError):
        submission = read_submission(Path(run) / 'submission.json')
        source = read_solve(run)['data']
        result = score(submission, [task for task in read_tasks(source) if task.name in submission])
        return f"{result['solved']} of {result['tasks']}"
    return ""

# -----------------------------------------------------------------------------
# pages for a browser, each one file that asks for no other

def of_package(name):
    """ the text of a file beside this one: a page, or style.css, which all pages have """
    return Path(__file__).with_name(name).read_text('utf-8')

def template(name):
    """ a page of the package, with its style, without its data """
    return of_package(name).replace('STYLE', of_package('style.css'), 1)

def write_html(name, data, out):
    """ a page of the package with what it is to show, as json """
    data = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c') # no name may end the script
    checkpoint.write_file(out, template(name).replace('DATA', data, 1).encode())

@dataclass
class DrawConfig:
    task: Annotated[str, tyro.conf.Positional] = '' # id of a task to begin with, '' = an empty one
    data: str = ViewConfig.data # sources to look it up in, or the file of a task of your own
    out: str = 'draw.html' # the page to write

def draw(cfg):
    """ write the editor, and say what to do with it. raises ValueError for an id that no source has """
    if not cfg.out.endswith('.html'):
        raise ValueError(f"--out {cfg.out}: want a .html")
    name, task = cfg.task or 'my', None
    if cfg.task:
        task = to_json(find_tasks([cfg.task], cfg.data)[0])
    write_html('draw.html', {'colors': PALETTE, 'name': name, 'task': task}, cfg.out)
    print(f"{cfg.out}: open it in a browser, draw, save {name}.json. then: nanoarc solve --run RUN --data {name}.json "
          f"--out_dir out/{name}, and --ttt_steps 100 if the run has no demos in context, as the quickstart has not")

# what a run solved

def write_page(solved, out, most=6):
    """
    a directory of nanoarc solve -> one self-contained html page: tasks, attempts, the `most` best candidates of a
    query. raises ValueError
    """
    solved, source = Path(solved), read_solve(solved)['data']
    known = read_tasks(source)
    attempts = attempts_of(known, solved / 'submission.json')
    candidates = read_candidates(solved / 'candidates.jsonl', known)
    tasks = []
    for k, task in enumerate(known):
        if not attempts[k]: # over --max_pair
            continue
        queries = []
        for i, (x, answer) in enumerate(task.queries):
            best = []
            for c in candidates[k, i][:most]:
                best.append([pack_grid(c.grid), c.votes, c.log_prob if c.score is None else c.score])
            queries.append({'input': pack_grid(x), 'answer': None if answer is None else pack_grid(answer),
                            'candidates': best, 'attempts': [pack_grid(grid) for grid in attempts[k][i].values()]})
        demos = [[pack_grid(x), pack_grid(y)] for x, y in task.demos]
        tasks.append({'name': task.name, 'state': state_of(queries), 'demos': demos, 'queries': queries})
    states = [task['state'] for task in tasks]
    title, n = source, len(states) - states.count('unknown')
    if n > 0:
        title += f": {states.count('solved')} of {n} solved"
    data = {'title': title, 'colors': PALETTE, 'tasks': tasks, 'editor': template('draw.html')}
    write_html('page.html', data, out)

def read_solve(solved):
    """ what solve.json of a directory says. raises ValueError """
    path = Path(solved) / 'solve.json'
    about = read_json(path)
    if type(about) is not dict or type(about.get('data')) is not str:
        raise ValueError(f"{path}: not a solve.json of nanoarc, it does not say of which data")
    return about

def state_of(queries):
    """ how a task of the page went """
    if not any(q['candidates'] for q in queries):
        return 'empty'
    if any(q['answer'] is None for q in queries):
        return 'unknown'
    return 'solved' if all(q['answer'] in q['attempts'] for q in queries) else 'wrong'

def pack_grid(grid):
    """ [[0, 1], [2, 3]] -> '01|23' """
    rows = ["".join(map(str, row)) for row in grid]
    return "|".join(rows)

# -----------------------------------------------------------------------------
# pictures

def pyplot():
    """ matplotlib without a window, imported late: it takes a second """
    os.environ['MPLBACKEND'] = 'agg' # a notebook names one there which may not be here, and then the import fails
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    return plt

PLAIN = {'parse_math': False, 'usetex': False} # names are no formulas, whatever dollars are in them

def save_figure(fig, out):
    """ a figure to a file, and away with it """
    data = io.BytesIO()
    try:
        fig.savefig(data, format=Path(out).suffix[1:] or 'png', dpi=110)
    finally:
        pyplot().close(fig)
    checkpoint.write_file(out, data.getvalue())

def draw_grid(ax, grid, title):
    """ one grid into a matplotlib axis """
    from matplotlib.colors import ListedColormap
    ax.pcolormesh(grid, cmap=ListedColormap(PALETTE), vmin=0, vmax=9, edgecolors='#555555', linewidth=0.5)
    ax.set(aspect='equal', xticks=[], yticks=[], ylim=(grid.shape[0], 0))
    ink = {'right': 'green', 'wrong': 'red'}.get(title.rpartition(" ")[2], 'black') # of an attempt
    ax.set_title(title, fontsize=8, color=ink)
    ax.axis('on')

def draw_tasks(tasks, out):
    """ list of (Task, attempts) -> a png, two rows of grids a task: inputs over outputs, then the attempts """
    pictures = [captioned(task, tried) for task, tried in tasks]
    n = max(len(columns) for columns in pictures)
    fig = pyplot().figure(figsize=(1.5 * n, 3.6 * len(tasks)), layout='constrained')
    parts = fig.subfigures(len(tasks), squeeze=False)[:, 0]
    for part, (task, _), columns in zip(parts, tasks, pictures):
        part.suptitle(task.name, x=0.01, ha='left', fontsize=10, weight='bold', **PLAIN)
        axes = part.subplots(2, n, squeeze=False)
        for ax in axes.flat:
            ax.axis('off')
        for i, (caption, grids) in enumerate(columns):
            if caption.startswith("attempt"): # beside the answer
                draw_grid(axes[1, i], grids[0], caption)
            else:
                titles = [caption, "answer" if caption.startswith("query") else ""]
                for j, grid in enumerate(grids):
                    draw_grid(axes[j, i], grid, titles[j])
    save_figure(fig, out)

def draw_val(model, ds, out, n=4):
    """ validation queries of the n smallest tasks as the model answers them now, greedily -> a png, and val.json """
    if len(ds.val_pairs) == 0:
        return
    s, t = ds.sampler, ds.sampler.tables
    _, first = np.unique(t.pair_task[ds.val_pairs], return_index=True) # one a task
    pairs = ds.val_pairs[first]
    size = t.need.max(0)[pairs]
    shown = []
    model.eval()
    for pair in pairs[np.argsort(size, kind='stable')[:n]]:
        docs = s.plan(np.array([pair]), visit=0, order=0, as_is=True, seed=0)
        length = int(docs.length[0])
        batch = s.write(one_a_row(docs), 0, 1, length, loss_on='query')
        T = int((batch.targets[0] >= 0).nonzero()[0]) + 1 # tokens of the prompt
        told = {}
        if batch.task is not None:
            told = {'task': batch.task[:, 0].to(model.device), 'dihedral': batch.dihedral[:, 0].to(model.device)}
        idx, pos = batch.idx[:, :T].to(model.device), batch.pos[:, :T].to(model.device)
        tokens = decode(model, idx, pos, **told, most=length - T)[0].tokens
        while tokens and tokens[-1] != ROW: # without END, or a last row that was cut short
            tokens.pop()
        k = t.pair_task[pair]
        task = s.task(k)
        query = task.queries[pair - t.first[k] - t.n_demos[k]]
        task = replace(task, demos=task.demos[: t.n_shown[k]], queries=[query])
        shown.append((task, [{'attempt_1': decode_grid(tokens)} if tokens else {}]))
    model.train()
    draw_tasks(shown, out)
    rows = []
    for task, tried in shown:
        (query, answer), attempt = task.queries[0], tried[0].get('attempt_1', np.zeros((1, 1), np.uint8))
        rows.append([task.name, query.tolist(), answer.tolist(), attempt.tolist()])
    checkpoint.write_file(Path(out).with_suffix('.json'), json.dumps(rows).encode())

def draw_loss(runs, out):
    """ training and validation loss of one or several run directories -> a png """
    plt = pyplot() # before anything of matplotlib is imported
    from matplotlib.ticker import LogLocator, NullLocator
    fig, ax = plt.subplots(figsize=(7, 4), layout='constrained')
    for k, run in enumerate(runs):
        rows = need_metrics(run)
        name, color, val_color = f" of {Path(run).name}", f"C{k}", f"C{k}"
        if len(runs) == 1:
            name, color, val_color = "", "C0", "C1"
        steps, loss = curve(rows, 'loss')
        if steps:
            ax.plot(steps, loss, color=color, label=f"training{name}", alpha=0.7, linewidth=1)
        solved = solved_of(run)
        name += f", {solved} tasks solved" if solved else ""
        steps, loss = curve(rows, 'val_loss')
        if steps:
            ax.plot(steps, loss, color=val_color, label=f"validation{name}", marker='o', markersize=3)
    ax.set(xlabel="step", ylabel="nats per output token", yscale='log')
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_major_formatter('{x:g}')
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)
    for text in ax.legend(handles=ax.lines).get_texts():
        text.set(**PLAIN)
    save_figure(fig, out)

def curve(rows, key):
    """ rows of metrics -> (steps, values) of those that have the key, and no nan or nonsense there """
    rows = [row for row in rows if key in row and max(abs(row[key]), abs(row['step'])) < 2**53]
    return [row['step'] for row in rows], [row[key] for row in rows]

def need_metrics(run):
    """ read_metrics, or ValueError where there are none """
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"{run}: no metrics.jsonl with a row, not a run directory")
    return rows

def run_row(run, rows):
    """ a run directory and its metrics -> a row of a table: its steps, losses in nats per output token, speed """
    _, loss = curve(rows, 'loss')
    steps, val = curve(rows, 'val_loss')
    best = min(val, default=None)
    _, speed = curve(rows, 'tok_s')
    _, wait = curve(rows, 'wait')
    return {'run': str(run), 'step': rows[-1]['step'], 'loss': loss[-1] if loss else None,
            'val_loss': val[-1] if val else None,
            'best val_loss': best, 'at step': steps[val.index(best)] if val else None,
            'tok_s': np.median(speed) if speed else None, 'wait': np.mean(wait) if wait else None}

# -----------------------------------------------------------------------------
# statistics of sources

def print_stats(cfg, png=''):
    """ DataConfig -> tables of what its data holds: tasks, sizes, colors, tokens, what does not fit; and a picture """
    ds = ArcDataset(cfg)
    s, t = ds.sampler, ds.sampler.tables
    docs = ds.plan(np.arange(min(len(ds), 2**17), dtype=np.uint64)) # of an epoch, or enough of a long one
    print_table("tasks", [count_tasks(c) for c in s.corpora if len(c) > 0])
    inputs = 2 * np.flatnonzero(s.known) # numbers of grids
    outputs = inputs + 1
    side = np.maximum(t.h, t.w).astype(int)
    area = t.h.astype(int) * t.w
    columns = {'input side': side[inputs], 'output side': side[outputs], 'input cells': area[inputs],
               'output cells': area[outputs], 'tokens, longer way': t.need.max(0)[s.known], 'demos a task': t.n_shown,
               f"tokens a document, shots={cfg.shots}": docs.length, "of them with loss": docs.loss_tokens}
    print_table("percentiles", [percentiles(name, x) for name, x in columns.items()])
    cells = np.zeros(10, np.int64) # of each color
    for start in range(0, len(t.cells), 2**24): # they may be more than memory holds
        cells += np.bincount(t.cells[start : start + 2**24], minlength=10)
    sets, lines = s.join('colors'), []
    for color in range(10):
        has = sets >> color & 1
        lines.append({'color': color, 'cells': cells[color] / cells.sum(),
                      'inputs that have it': has[inputs].mean(), 'outputs that have it': has[outputs].mean()})
    print_table("colors", lines)
    shots = (docs.pairs >= 0).sum(1) - 1
    others = np.bincount(t.pair_task, t.usable)[t.pair_task] - t.usable # demos that could stand before each pair
    others = np.minimum(others, t.n_shown[t.pair_task])
    asked = np.minimum(others, s.most)[docs.pairs[:, 0]]
    lost = (shots < asked).sum() # documents with fewer
    counts = {'documents an epoch': len(ds), 'lost demos': lost, 'targets too long': ds.num_long,
              'targets without context': ds.num_alone, 'tasks over max_pair': ds.num_tasks_out,
              'pairs over max_pair': ds.num_pairs_out, 'tasks malformed': len(ds.bad)}
    print_table(f"in block_size={cfg.block_size}", [counts])
    if png:
        draw_stats(columns, docs.length, shots, cells, cfg, png)
        print(png)

def percentiles(name, x):
    """ an array -> a row of the table of percentiles """
    line = {'': name}
    for q in (0, 5, 25, 50, 75, 95, 99, 100):
        line[f"{q}%"] = np.percentile(x, q, method='nearest')
    return {**line, 'mean': x.mean()}

def count_tasks(c):
    """ Corpus -> a row of the table of tasks """
    h, w = c.h.reshape(-1, 2), c.w.reshape(-1, 2)
    answered, is_demo, is_extra = h[:, 1] > 0, c.is_demo(), c.is_extra()
    same = (h[:, 0] == h[:, 1]) & (w[:, 0] == w[:, 1])
    return {'source': c.source, 'tasks': len(c), 'demos': (is_demo & ~is_extra).sum(), 'extra': is_extra.sum(),
            'queries': (~is_demo).sum(), 'answers': (answered & ~is_demo).sum(), 'same_shape': same[answered].mean()}

def draw_stats(columns, length, shots, cells, cfg, out):
    """ sides, colors and document lengths of a source -> a png """
    fig, ((a, b), (c, d)) = pyplot().subplots(2, 2, figsize=(10, 7), layout='constrained')
    a.hist2d(columns['input side'], columns['output side'], bins=np.arange(0.5, 31.5), cmin=1, norm='log')
    a.set(title="longer side of the grids of a pair", xlabel="input", ylabel="output", aspect='equal')
    b.bar(range(10), cells / cells.sum(), color=PALETTE, edgecolor='#555555')
    b.set(title="share of all cells", xlabel="color", xticks=range(10))
    c.hist(length, bins=60, color='#0074d9')
    c.axvline(cfg.block_size, color='#ff4136', linewidth=1)
    c.set(title=f"documents of shots={cfg.shots}, block_size in red", xlabel="tokens", ylabel="documents")
    d.bar(*np.unique(shots, return_counts=True), color='#2ecc40')
    d.set(title="demos before the target", xlabel="demos", ylabel="documents")
    fig.suptitle(cfg.data, **PLAIN)
    save_figure(fig, out)
