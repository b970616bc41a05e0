"""
a search for settings by Optuna: `nanoarc sweep SPACE.toml --trials 100`. judged by val nats; no answer of an evaluation
task is opened.

    [fixed]                                     what a --config file of `nanoarc train` takes, the same in all trials
    data = 'arc1/training'
    minutes = 2
    [search]
    mixer = ['MA', 'A']                         choices
    lr = {low = 1e-3, high = 2e-2, log = true}  a range, of integers if the setting is one; `step` for a grid

a trial is a run in out_dir/trial-0000, trained in a process of its own: what goes wrong there is recorded and the
search goes on. if its worker dies, another one, or the same command again, goes on with it from its checkpoint.
processes with the same out_dir, or the same --storage, work on one study. out_dir gets report.html, history.png,
importance.png and best.toml, for `nanoarc train --config`.
"""
import base64
import contextlib
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Annotated

import optuna
import sqlalchemy
import torch
import tyro
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from nanoarc import checkpoint
from nanoarc.data import DataConfig
from nanoarc.model import ModelConfig, width_lr
from nanoarc.run import Run, Signals, apply_values, exit_after, read_metrics, read_toml
from nanoarc.settings import check_numbers, differences
from nanoarc.sources import BUNDLED
from nanoarc.train import TrainConfig
from nanoarc.view import of_package, pyplot

GRACE = 3 # heartbeats that a worker may miss
NAME = "trial-{:04d}" # of a trial's directory
# these decide on what is validated: val nats compare only where they are fixed
MEASURE = 'data', 'val_tasks', 'max_pair', 'block_size', 'on_bad', 'deal', 'seed'

@dataclass
class SweepConfig:
    space: Annotated[str, tyro.conf.Positional] # a TOML file with the tables [fixed] and [search]
    out_dir: str = '' # where the study and the runs of its trials go. '' = out/NAME of the file
    trials: int = 100 # of the study, all workers and earlier calls together. 0 = the report alone
    jobs: int = 1 # trials at a time, each with its share of the threads
    storage: str = '' # URL of a database that several machines can reach. '' = sqlite in out_dir
    heartbeat: int = 10 # seconds between a worker's signs of life. a trial that misses some is taken over
    keep: bool = False # keep the checkpoints of trials that ended, not their metrics alone

    def check(self):
        """ raises ValueError that names the setting """
        check_numbers(self, dict(jobs=1, heartbeat=1))

class Failed(Exception):
    """ of one trial """

# -----------------------------------------------------------------------------
# the space

def all_values(run):
    """ Run -> {name: value} """
    return {**asdict(run.train), **asdict(run.model), **asdict(run.data)}

def read_space(path):
    """
    a TOML file -> (its [fixed], its [search], the Run of what is not searched). raises ValueError with file and key
    """
    tables = read_toml(path)
    fixed, search = tables.pop('fixed', {}), tables.pop('search', {})
    if tables:
        raise ValueError(f"{path}: unknown {', '.join(tables)}, want the tables [fixed] and [search]")
    if type(fixed) is not dict or type(search) is not dict or not search:
        raise ValueError(f"{path}: nothing to search, want the tables [fixed] and [search]")
    run = apply_values(Run(TrainConfig(), ModelConfig(), DataConfig()), fixed, f"{path}: [fixed]")
    for name, x in search.items():
        check_search(name, x, fixed, run, f"{path}: [search]")
    if 'out_dir' in fixed or 'out_dir' in search:
        raise ValueError(f"{path}: out_dir: each trial has its own, want --out_dir of the sweep")
    if run.data.val_tasks < 1:
        raise ValueError(f"{path}: [fixed]: val_tasks = {run.data.val_tasks}, want some to judge by")
    return fixed, search, run

def check_search(name, x, fixed, run, where):
    """ one setting of [search]. raises ValueError """
    values = []
    if type(x) is list:
        values = x
    elif type(x) is dict and set(x) <= {'low', 'high', 'log', 'step'}:
        values = [x.get('low'), x.get('high')]
    if not values or None in values:
        raise ValueError(f"{where}: {name} = {x!r}, want a list of choices or a range like {{low = 1, high = 8}}, "
                         "with log = true or step = 2 if you like")
    for value in values:
        apply_values(run, {name: value}, where)
    if name in fixed:
        raise ValueError(f"{where}: {name} is in [fixed] too")
    if name in MEASURE:
        raise ValueError(f"{where}: {name} decides what is validated on, it belongs into [fixed]")
    if type(x) is dict:
        kind = type(all_values(run)[name])
        ranges = {int: optuna.distributions.IntDistribution, float: optuna.distributions.FloatDistribution}
        if kind not in ranges:
            raise ValueError(f"{where}: {name} = {x!r}, a range of {kind.__name__} there is not, "
                             "want a list of choices")
        try:
            ranges[kind](**x)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{where}: {name}: {e}") from None

def first_trial(search, run):
    """ the defaults of what is searched: the first trial, to compare with. {} where one is not in the space """
    model = run.model.resolved()
    lr = width_lr(model.n_embd)
    now = {**all_values(run), **asdict(model), 'lr': run.train.lr or lr, 'adam_lr': run.train.adam_lr or lr}
    first = {}
    for name, x in search.items():
        first[name] = now[name]
        if type(x) is list and now[name] not in x:
            return {}
        if type(x) is dict and not x['low'] <= now[name] <= x['high']:
            return {}
    return first

def to_param(x):
    """ a value as a database column can hold it: lists travel as json """
    return json.dumps(list(x)) if type(x) in (list, tuple) else x

def from_param(x, choices):
    """ the inverse. choices: the list or range that it is from """
    has_lists = type(choices) is list and type(choices[0]) is list
    return json.loads(x) if has_lists else x

def suggest(trial, search, run):
    """ a value for everything that is searched """
    found = {}
    for name, x in search.items():
        if type(x) is list:
            param = trial.suggest_categorical(name, [to_param(value) for value in x])
            found[name] = from_param(param, x)
        elif type(all_values(run)[name]) is int:
            found[name] = trial.suggest_int(name, **x)
        else:
            found[name] = trial.suggest_float(name, **x)
    return found

def absolute(spec):
    """ sources as DataConfig has them, found from any directory """
    parts = []
    for part in [spec] if os.path.exists(spec) else spec.split('+'):
        part = part.strip()
        is_path = os.path.exists(part.partition('*')[0]) and part.partition('/')[0] not in BUNDLED
        parts.append(os.path.abspath(part) if is_path else part)
    return "+".join(parts)

def with_absolute(values):
    """ settings with sources that are found from any directory """
    return {name: absolute(x) if name in ('data', 'adapt', 'extra') else x for name, x in values.items()}

def to_toml(values):
    """ a flat dict -> the lines of a --config file """
    lines = [f"{name} = {json.dumps(x, ensure_ascii=False)}\n" for name, x in with_absolute(values).items()]
    return "".join(lines)

# -----------------------------------------------------------------------------
# the study

@contextlib.contextmanager
def alone(out_dir):
    """ what one of several workers does at a time """
    with open(out_dir / 'lock', 'ab') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def open_storage(cfg, out_dir):
    """ the database. raises ValueError """
    url = cfg.storage or f"sqlite:///{out_dir / 'study.db'}"
    options = {'connect_args': {'timeout': 60}} if url.startswith('sqlite') else {} # seconds, for another's write
    try:
        return optuna.storages.RDBStorage(url, heartbeat_interval=cfg.heartbeat, grace_period=GRACE * cfg.heartbeat,
                                          heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                                          engine_kwargs=options)
    except (ImportError, ValueError, sqlalchemy.exc.SQLAlchemyError) as e:
        raise ValueError(f"the database of the study: {str(e).splitlines()[0]}") from None

def open_study(cfg, out_dir, fixed, search, run):
    """
    the study, begun here or by another worker -> (study, its [fixed] with sources as whoever began it finds them).
    raises ValueError if it has another space
    """
    now = {'fixed': fixed, 'search': search}
    with alone(out_dir):
        storage = open_storage(cfg, out_dir)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3, n_min_trials=3)
        study = optuna.create_study(storage=storage, study_name=Path(cfg.space).stem, load_if_exists=True,
                                    pruner=pruner)
        begun = study.user_attrs.get('space')
        if begun is None:
            study.set_user_attr('settings', with_absolute(fixed))
            study.set_user_attr('space', now)
            first = first_trial(search, run)
            if first:
                study.enqueue_trial({name: to_param(x) for name, x in first.items()})
            begun = now
    wrong = []
    for part in now:
        wrong += [f"[{part}] {text}" for text in differences(begun[part], now[part], 'begun')]
    if wrong:
        raise ValueError(f"{out_dir}: begun with another space, {', '.join(wrong)}: choose another --out_dir")
    return study, study.user_attrs['settings']

def by_run(study):
    """
    {name of a run: its trial}. a run that was taken over is several trials: the last one. raises ValueError if the
    database names what is no run of ours
    """
    found = {}
    for trial in study.get_trials(deepcopy=False):
        name = trial.user_attrs.get('run', NAME.format(trial.number))
        if not re.fullmatch(r'trial-[0-9]{4,}', str(name)):
            raise ValueError(f"the database of the study names the run {name!r}, want {NAME.format(trial.number)}")
        if 'run' in trial.user_attrs and 'extra' not in trial.user_attrs:
            found[name] = trial
    return found

def last_line(path, code):
    """ why a trial failed: what its process said last """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    said = [line for line in path.read_text('utf-8', 'replace').splitlines() if line.strip()]
    return said[-1].removeprefix("nanoarc: ") if said else f"exit code {code}"

class Sweep:
    """ a worker: what it knows of the study """

    def __init__(self, cfg, signals):
        self.cfg, self.signals = cfg, signals
        fixed, self.search, self.run = read_space(cfg.space)
        self.out_dir = Path(cfg.out_dir or f"out/{Path(cfg.space).stem}").resolve()
        self.out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.refuse_links(self.out_dir)
        self.study, self.fixed = open_study(cfg, self.out_dir, fixed, self.search, self.run)
        by_run(self.study) # raises

    def left(self):
        """ -> how many trials nobody has begun, or wait for somebody who goes on with them """
        found = by_run(self.study)
        waiting = sum(trial.state == TrialState.WAITING for trial in found.values())
        return max(self.cfg.trials - len(found), 0) + waiting

    def wait_for_others(self):
        """ trials that somebody else is at: if there is no sign of life they are taken over """
        others = [name for name, trial in by_run(self.study).items() if trial.state == TrialState.RUNNING]
        if others:
            seconds = GRACE * self.cfg.heartbeat
            print(f"{', '.join(others)}: at work elsewhere, or its worker died. waiting {seconds} s for a sign of life",
                  flush=True)
            until = time.monotonic() + seconds + 2
            while time.monotonic() < until and not self.signals.got:
                time.sleep(0.2)
            optuna.storages.fail_stale_trials(self.study)

    def work(self):
        """ trials, until there are enough or a signal comes """
        if self.cfg.trials == 0: # the report alone
            return
        self.wait_for_others()
        if self.left() == 0 or self.signals.got:
            return
        with contextlib.suppress(SystemExit): # of a trial, after a signal
            self.study.optimize(self.objective, n_trials=self.left(), n_jobs=self.cfg.jobs, catch=Failed,
                                callbacks=[self.ended])

    def begin(self, trial, run):
        """ a trial, or the rest of it -> its process, which ends when its stdin does """
        args = ['--resume', str(run)]
        values = {**self.fixed, **suggest(trial, self.search, self.run)}
        if not checkpoint.steps(run):
            checkpoint.write_file(run / 'settings.toml', to_toml(values).encode())
            args = ['--config', str(run / 'settings.toml'), '--out_dir', str(run)]
        here = Path(__file__).parent.parent # a trial is to run the same nanoarc, wherever that lies
        threads = max(torch.get_num_threads() // self.cfg.jobs, 1)
        env = {**os.environ, 'PYTHONPATH': f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
               'OMP_NUM_THREADS': str(threads), 'NANOARC_ENDS_WITH_STDIN': '1'}
        with open(run / 'output.txt', 'ab') as f:
            return subprocess.Popen([sys.executable, '-m', 'nanoarc', 'train', *args], stdin=subprocess.PIPE, stdout=f,
                                    stderr=f, env=env)

    def follow(self, trial, run):
        """ a trial's process from its begin to its end, while its val nats are reported -> (exit code, pruned?) """
        told, prune = set(), False
        with self.begin(trial, run) as child:
            while child.poll() is None:
                for row in read_metrics(run):
                    # trials differ in steps, they compare by their share of the time
                    tenth = int(10 * row.get('done', 0))
                    if 'done' in row and tenth not in told:
                        told.add(tenth)
                        trial.report(row['val_loss'], tenth)
                        prune = prune or (tenth < 10 and trial.should_prune())
                if prune or self.signals.got:
                    child.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.2)
        return child.returncode, prune

    def objective(self, trial):
        """ train a trial -> val nats. raises TrialPruned or Failed, and SystemExit when this worker is to stop """
        name = trial.user_attrs.get('run', NAME.format(trial.number))
        trial.set_user_attr('run', name)
        before = [other for other in by_run(self.study) if other < name]
        if len(before) >= self.cfg.trials: # meanwhile another worker has begun the last one
            trial.set_user_attr('extra', True)
            raise Failed("one too many")
        run = self.out_dir / name
        if run.is_symlink():
            raise ValueError(f"{run} is a link, and a trial would be written where it leads: remove it")
        code, pruned = self.follow(trial, run)
        last = [row['val_loss'] for row in read_metrics(run) if row.get('done') == 1]
        if code == 0 and last:
            return last[-1]
        if self.signals.got: # whoever comes next goes on with it
            self.study.tell(trial, state=TrialState.FAIL)
            RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])
            raise SystemExit
        if pruned:
            raise optuna.TrialPruned
        error = "stopped from outside" if code == 0 else last_line(run / 'output.txt', code)
        trial.set_user_attr('error', error)
        raise Failed

    def ended(self, study, trial):
        """ after each trial: says how it went, prunes, stops if it was the last """
        run = trial.user_attrs['run']
        if 'extra' not in trial.user_attrs:
            text = f"{run} {how_it_ended(trial)}"
            best = [t.value for t in by_run(study).values() if t.state == TrialState.COMPLETE]
            if best:
                text += f", best {min(best):.4f}"
            params = [f"{name}={number(x)}" for name, x in trial.params.items()]
            print(f"{text}; {', '.join(params)}", flush=True)
        if trial.state != TrialState.FAIL and not self.cfg.keep:
            checkpoint.prune(self.out_dir / run)
            with contextlib.suppress(OSError): # something of somebody else's is in there
                (self.out_dir / run / 'ckpt').rmdir()
        if self.left() == 0:
            study.stop()

def sweep(cfg):
    """
    work on a study until it has its trials -> path of the report. raises ValueError, and SystemExit after a signal
    """
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cfg.check()
    with Signals() as signals:
        worker = Sweep(cfg, signals)
        try:
            worker.work()
        finally:
            with alone(worker.out_dir):
                path = report(worker.study, worker.out_dir, worker.fixed, worker.search)
        if signals.got:
            print(f"stopped by signal {signals.got}, the same command goes on", flush=True)
            exit_after(signals.got)
    return path

# -----------------------------------------------------------------------------
# the report

CSS = ('body{padding:0 12px 2em}td{padding:2px 10px}img{max-width:100%}table,pre{display:block;overflow-x:auto}'
       'tr:first-child,tr:nth-child(2){font-weight:bold}') # the names of the columns, and the best trial

def number(x):
    """ a value of a setting as text """
    return f"{x:.4g}" if type(x) is float else str(x)

def how_it_ended(trial):
    """ in words """
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.4f} nats"
    if trial.state == TrialState.PRUNED:
        return f"pruned at {10 * (trial.last_step or 0)}%"
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('error', 'its worker died')}"
    return trial.state.name.lower()

def last_value(trial):
    """ val nats at the end of a trial, or those reported last, inf where there are none """
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values.get(trial.last_step, math.inf)

def order(item):
    """ (name, trial) -> what trials are sorted by: the best complete one first """
    _, trial = item
    return trial.state != TrialState.COMPLETE, last_value(trial)

def report(study, out_dir, fixed, search):
    """ best.toml, history.png, importance.png, and report.html with both and all trials in it -> its path """
    trials = sorted(by_run(study).items(), key=order)
    done = sum(trial.state == TrialState.COMPLETE for _, trial in trials)
    about = f"{len(trials)} trials, {done} complete"
    if done > 0:
        name, best = trials[0]
        about += f", the best {best.value:.4f} val nats by {name}"
        values = {key: from_param(x, search[key]) for key, x in best.params.items()}
        text = f"# {name} of {study.study_name}: {best.value:.4f} val nats\n{to_toml({**fixed, **values})}"
        checkpoint.write_file(out_dir / 'best.toml', text.encode())
    rows = [['trial', 'val nats', 'how it ended', *search]]
    for name, trial in trials:
        nats = last_value(trial)
        params = [number(trial.params.get(key, "")) for key in search]
        rows.append([name, "" if nats == math.inf else f"{nats:.4f}", how_it_ended(trial), *params])
    lines = ""
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines += f"<tr>{cells}</tr>"
    pictures = ""
    if done > 1:
        try:
            pictures = draw_study(study, out_dir, done)
        except Exception as e: # there is a report all the same
            print(f"warning: history.png and importance.png: {type(e).__name__}: {e}")
    title = escape(study.study_name)
    style = of_package('style.css') + CSS
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    page += '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    page += f'<h1>{title}</h1><p>{escape(about)}</p>{pictures}<table>{lines}</table>'
    page += f'<h2>the same in all trials</h2><pre>{escape(to_toml(fixed))}</pre>'
    checkpoint.write_file(out_dir / 'report.html', page.encode())
    print(f"{about}: {out_dir / 'report.html'}")
    return out_dir / 'report.html'

def draw_study(study, out_dir, n_done):
    """ history.png and importance.png -> both as html """
    plt, plots = pyplot(), optuna.visualization.matplotlib # in this order: ours needs no window
    # of what the best are made, at least 5 of them
    judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(max(5 / n_done, 0.1), 0.5))
    axes = {'history': plots.plot_optimization_history(study, target_name="val nats"),
            'importance': plots.plot_param_importances(study, evaluator=judge)}
    html = ""
    for name, ax in axes.items():
        path = out_dir / f"{name}.png"
        ax.figure.set_size_inches(8, 4.5)
        ax.figure.savefig(path, dpi=110, bbox_inches='tight')
        plt.close(ax.figure)
        html += f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    return html
