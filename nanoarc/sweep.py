"""
a search for settings by Optuna: `nanoarc sweep SPACE.toml --trials 100`. judged by val nats; no answer of an evaluation task is opened.

    [fixed]                                     what a --config file of `nanoarc train` takes, the same in all trials
    data = 'arc1/training'
    minutes = 2
    [search]
    mixer = ['MA', 'A']                         choices
    lr = {low = 1e-3, high = 2e-2, log = true}  a range, of integers if the setting is one; `step` for a grid

a trial is a run in out_dir/trial-0000, trained in a process of its own: what goes wrong there is recorded and the search goes on. if its
worker dies, another one, or the same command again, goes on with it from its checkpoint. processes with the same out_dir, or the
same --storage, work on one study. out_dir gets report.html, history.png, importance.png and best.toml, for `nanoarc train --config`.
"""
import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
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

from nanoarc import checkpoint, train, view
from nanoarc.cli import Run, apply_values
from nanoarc.data import DataConfig
from nanoarc.model import ModelConfig
from nanoarc.sources import BUNDLED

GRACE = 3 # heartbeats that a worker may miss
MEASURE = 'data', 'val_tasks', 'max_pair', 'block_size', 'on_bad', 'deal', 'seed' # decide on what is validated: val nats compare only where these are fixed
OWN = 'out_dir' # each trial has one

@dataclass
class SweepConfig:
    space: Annotated[str, tyro.conf.Positional] # a TOML file with the tables [fixed] and [search]
    out_dir: str = '' # where the study and the runs of its trials go. '' = out/NAME of the file
    trials: int = 100 # of the study, all workers and earlier calls together. 0 = the report alone
    jobs: int = 1 # trials at a time, each with its share of the threads
    storage: str = '' # URL of a database that several machines can reach. '' = sqlite in out_dir
    heartbeat: int = 10 # seconds between a worker's signs of life. a trial that misses three is taken over
    keep: bool = False # keep the checkpoints of trials that ended, not their metrics alone

def all_values(base):
    """ Run -> {name: value} """
    return {**asdict(base.train), **asdict(base.model), **asdict(base.data)}

class Failed(Exception):
    """ of one trial """

def read_space(path):
    """ a TOML file -> (its [fixed], its [search], the Run of what is not searched). raises ValueError that names file and key """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: {e}") from None
    fixed, search = tables.pop('fixed', {}), tables.pop('search', {})
    if tables or type(fixed) is not dict or type(search) is not dict or not search:
        raise ValueError(f"{path}: {'unknown ' + ', '.join(tables) if tables else 'nothing to search'}, want the tables [fixed] and [search]")
    base = apply_values(Run(train.TrainConfig(), ModelConfig(), DataConfig()), fixed, f"{path}: [fixed]")
    now = all_values(base)
    for name, x in search.items():
        where = f"{path}: [search]"
        values = x if type(x) is list else [x.get('low'), x.get('high')] if type(x) is dict and set(x) <= {'low', 'high', 'log', 'step'} else []
        if None in values or not values:
            raise ValueError(f"{where}: {name} = {x!r}, want a list of choices or a range like {{low = 1, high = 8}}, with log = true or step = 2 if you like")
        for value in values:
            apply_values(base, {name: value}, where)
        if name in fixed or name in MEASURE:
            raise ValueError(f"{where}: {name} {'is in [fixed] too' if name in fixed else 'decides what is validated on, it belongs into [fixed]'}")
        if type(x) is dict:
            if type(now[name]) not in (int, float):
                raise ValueError(f"{where}: {name} = {x!r}, a range of {type(now[name]).__name__} there is not, want a list of choices")
            try:
                (optuna.distributions.IntDistribution if type(now[name]) is int else optuna.distributions.FloatDistribution)(**x)
            except (TypeError, ValueError) as e:
                raise ValueError(f"{where}: {name}: {e}") from None
    if OWN in fixed or OWN in search:
        raise ValueError(f"{path}: {OWN}: each trial has its own, want --{OWN} of the sweep")
    if base.data.val_tasks < 1:
        raise ValueError(f"{path}: [fixed]: val_tasks = {base.data.val_tasks}, want some to judge by")
    return fixed, search, base

def first_trial(search, base):
    """ what is searched as the defaults have it, where all of it lies in the space, else {}: the first trial, to compare with """
    lrs = dict(zip(('lr', 'adam_lr'), base.model.learning_rates(base.train.lr, base.train.adam_lr)))
    now = {**all_values(base), **asdict(base.model.filled()), **lrs}
    inside = [now[name] in x if type(x) is list else x['low'] <= now[name] <= x['high'] for name, x in search.items()]
    return {name: now[name] for name in search} if all(inside) else {}

def suggest(trial, search, base):
    """ a value for everything that is searched. lists, which no database column holds, travel as json """
    found = {}
    for name, x in search.items():
        if type(x) is list:
            value = trial.suggest_categorical(name, [json.dumps(v) if type(v) is list else v for v in x])
            found[name] = json.loads(value) if type(x[0]) is list else value
        else:
            found[name] = (trial.suggest_int if type(all_values(base)[name]) is int else trial.suggest_float)(name, **x)
    return found

def absolute(spec):
    """ sources as DataConfig has them, found from any directory """
    parts = [spec] if os.path.exists(spec) else spec.split('+')
    return "+".join(os.path.abspath(p.strip()) if os.path.exists(p.strip().partition('*')[0]) and p.strip().partition('/')[0] not in BUNDLED else p.strip() for p in parts)

def to_toml(values):
    """ a flat dict -> the lines of a --config file """
    return "".join(f"{name} = {json.dumps(absolute(x) if name in ('data', 'adapt') else x, ensure_ascii=False)}\n" for name, x in values.items())

@contextlib.contextmanager
def alone(out_dir):
    """ what one of several workers does at a time """
    with open(out_dir / 'lock', 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def open_study(cfg, out_dir, fixed, search, base):
    """ the study, begun here or by another worker -> (study, its [fixed] with sources as whoever began it finds them). raises ValueError if it has another space """
    url, name = cfg.storage or f"sqlite:///{out_dir / 'study.db'}", Path(cfg.space).stem
    with alone(out_dir):
        try:
            storage = optuna.storages.RDBStorage(url, heartbeat_interval=cfg.heartbeat, grace_period=GRACE * cfg.heartbeat, heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                                                 engine_kwargs={'connect_args': {'timeout': 60}} if url.startswith('sqlite') else {})
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3, n_min_trials=3))
        except (ImportError, ValueError, sqlalchemy.exc.SQLAlchemyError) as e:
            raise ValueError(f"the database of the study: {str(e).splitlines()[0]}") from None
        space = study.user_attrs.get('space')
        if space is None:
            study.set_user_attr('settings', {name: absolute(x) if name in ('data', 'adapt') else x for name, x in fixed.items()})
            study.set_user_attr('space', {'fixed': fixed, 'search': search})
            if first := first_trial(search, base):
                study.enqueue_trial({name: json.dumps(list(x)) if type(x) in (list, tuple) else x for name, x in first.items()})
        elif wrong := [f"[{part}] {key}" for part, now in (('fixed', fixed), ('search', search)) for key in {**now, **space[part]} if now.get(key) != space[part].get(key)]:
            raise ValueError(f"{out_dir}: begun with another space, {', '.join(wrong)} differ: choose another --out_dir")
    return study, study.user_attrs['settings']

def by_run(study):
    """ {name of a run: its trial}, of one that was taken over the last """
    return {t.user_attrs['run']: t for t in study.get_trials(deepcopy=False) if 'run' in t.user_attrs and 'extra' not in t.user_attrs}

def last_line(path, code):
    """ why a trial failed: what its process said last """
    said = [line for line in path.read_text(errors='replace').splitlines() if line.strip()]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else said[-1].removeprefix("nanoarc: ") if said else f"exit code {code}"

def run_trial(trial, study, cfg, out_dir, fixed, search, base, signals):
    """ train it, or the rest of it -> val nats. raises TrialPruned or Failed, and SystemExit when this worker is to stop """
    trial.set_user_attr('run', name := trial.user_attrs.get('run', f"trial-{trial.number:04d}"))
    if sorted(by_run(study)).index(name) >= cfg.trials: # another worker has begun the last one in this moment
        trial.set_user_attr('extra', True)
        raise Failed("one too many")
    run, values, told, prune = out_dir / name, {**fixed, **suggest(trial, search, base)}, set(), False
    args = ['--resume', str(run)]
    if not checkpoint.steps(run):
        checkpoint.write_file(run / 'settings.toml', to_toml(values).encode())
        args = ['--config', str(run / 'settings.toml'), '--out_dir', str(run)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': str(max(torch.get_num_threads() // cfg.jobs, 1))}
    with open(run / 'output.txt', 'ab') as f:
        child = subprocess.Popen([sys.executable, '-m', 'nanoarc.sweep', *args], stdin=subprocess.PIPE, stdout=f, stderr=f, env=env)
    with child: # it ends when its stdin does
        while child.poll() is None:
            for row in view.read_metrics(run):
                if 'done' in row and (tenth := int(10 * row['done'])) not in told: # of the run: trials differ in steps, they compare by their share of the time
                    told.add(tenth)
                    trial.report(row['val_loss'], tenth)
                    prune = prune or (tenth < 10 and trial.should_prune())
            if prune or signals.got:
                child.send_signal(signal.SIGTERM)
                break
            time.sleep(0.2)
    rows = [row for row in view.read_metrics(run) if row.get('done') == 1]
    if child.returncode == 0 and rows:
        return rows[-1]['val_loss']
    if signals.got: # whoever comes next goes on with it
        study.tell(trial, state=TrialState.FAIL)
        RetryHeartbeatStaleTrialCallback()(study, study.trials[trial.number])
        raise SystemExit
    if prune:
        raise optuna.TrialPruned
    trial.set_user_attr('error', "stopped from outside" if child.returncode == 0 else last_line(run / 'output.txt', child.returncode))
    raise Failed

def main(cfg):
    """ work on a study until it has its trials -> path of the report. raises ValueError for what a user can mend, SystemExit after a signal """
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if cfg.trials < 0 or cfg.jobs < 1 or cfg.heartbeat < 1:
        raise ValueError(f"trials={cfg.trials} jobs={cfg.jobs} heartbeat={cfg.heartbeat}: want 0 or more, at least 1 and 1")
    fixed, search, base = read_space(cfg.space)
    out_dir = Path(cfg.out_dir or f"out/{Path(cfg.space).stem}").resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    study, fixed = open_study(cfg, out_dir, fixed, search, base)

    def left():
        """ trials that nobody has begun, or that wait to be gone on with """
        found = by_run(study)
        return max(cfg.trials - len(found), 0) + sum(t.state == TrialState.WAITING for t in found.values())

    def ended(study, trial):
        run, best = trial.user_attrs['run'], [t.value for t in by_run(study).values() if t.state == TrialState.COMPLETE]
        how = {TrialState.COMPLETE: f"{trial.value or 0:.4f} nats", TrialState.PRUNED: "pruned", TrialState.FAIL: f"failed: {trial.user_attrs.get('error')}"}[trial.state]
        if 'extra' not in trial.user_attrs:
            print(f"{run} {how}" + (f", best {min(best):.4f}" if best else "") + f"; {', '.join(f'{name}={x:.4g}' if type(x) is float else f'{name}={x}' for name, x in trial.params.items())}", flush=True)
        if trial.state != TrialState.FAIL and not cfg.keep:
            shutil.rmtree(out_dir / run / 'ckpt', ignore_errors=True)
        if left() == 0:
            study.stop()

    with train.Signals() as signals:
        if cfg.trials and (others := [name for name, t in by_run(study).items() if t.state == TrialState.RUNNING]):
            print(f"{', '.join(others)}: at work elsewhere, or its worker died. waiting {GRACE * cfg.heartbeat} s for a sign of life", flush=True)
            until = time.monotonic() + GRACE * cfg.heartbeat + 2
            while time.monotonic() < until and not signals.got:
                time.sleep(0.2)
            optuna.storages.fail_stale_trials(study)
        try:
            with contextlib.suppress(SystemExit): # of run_trial, after a signal
                if left() and cfg.trials and not signals.got:
                    study.optimize(lambda trial: run_trial(trial, study, cfg, out_dir, fixed, search, base, signals), n_trials=left(), n_jobs=cfg.jobs, catch=Failed, callbacks=[ended])
        finally:
            with alone(out_dir):
                path = report(study, out_dir, fixed, search)
        if signals.got:
            print(f"stopped by signal {signals.got}, the same command goes on", flush=True)
            sys.exit(0 if signals.got == signal.SIGTERM else 128 + signals.got)
    return path

# -----------------------------------------------------------------------------
# the report

def report(study, out_dir, fixed, search):
    """ best.toml, history.png, importance.png, and report.html with both and all trials in it -> its path """
    trials = sorted(by_run(study).items(), key=lambda x: (x[1].state != TrialState.COMPLETE, x[1].value if x[1].value is not None else x[1].intermediate_values.get(x[1].last_step, 1e9)))
    done = [(name, t) for name, t in trials if t.state == TrialState.COMPLETE]
    pictures = []
    if done:
        values = {name: json.loads(x) if type(search[name][0] if type(search[name]) is list else 0) is list else x for name, x in done[0][1].params.items()}
        checkpoint.write_file(out_dir / 'best.toml', f"# {done[0][0]} of {study.study_name}: {done[0][1].value:.4f} val nats\n{to_toml({**fixed, **values})}".encode())
    plt, plots = view.pyplot(), optuna.visualization.matplotlib
    if len(done) > 1:
        judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(max(5 / len(done), 0.1), 0.5)) # of what the best are made, at least 5 of them
        for name, draw in (('history', lambda: plots.plot_optimization_history(study, target_name="val nats")), ('importance', lambda: plots.plot_param_importances(study, evaluator=judge))):
            figure = draw().figure
            figure.set_size_inches(8, 4.5)
            figure.savefig(out_dir / f"{name}.png", dpi=110, bbox_inches='tight')
            plt.close(figure)
            pictures.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode((out_dir / f"{name}.png").read_bytes()).decode()}">')
    lines = []
    for name, t in trials:
        how = {TrialState.PRUNED: f"pruned at {10 * (t.last_step or 0)}%", TrialState.FAIL: f"failed: {t.user_attrs.get('error', 'its worker died')}"}.get(t.state, t.state.name.lower())
        nats = t.value if t.value is not None else t.intermediate_values.get(t.last_step)
        cells = [name, "" if nats is None else f"{nats:.4f}", how, *(f"{x:.4g}" if type(x) is float else str(x) for x in (t.params.get(key, "") for key in search))]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(x)}</th>" for x in ('trial', 'val nats', 'how it ended', *search))
    about = f"{len(trials)} trials, {len(done)} complete" + (f", the best {done[0][1].value:.4f} val nats by {done[0][0]}" if done else "")
    checkpoint.write_file(out_dir / 'report.html', (f'<!doctype html><meta charset="utf-8"><title>{escape(study.study_name)}</title><style>body{{font:14px sans-serif;margin:2em}}td,th{{padding:2px 10px;text-align:left}}'
                          f'img{{max-width:100%}}tr:nth-child(2){{font-weight:bold}}</style><h1>{escape(study.study_name)}</h1><p>{escape(about)}</p>{"".join(pictures)}<table><tr>{head}</tr>{"".join(lines)}</table>'
                          f'<h2>the same in all trials</h2><pre>{escape(to_toml(fixed))}</pre>').encode())
    print(f"{about}: {out_dir / 'report.html'}")
    return out_dir / 'report.html'

def work(args):
    """ a trial, in a process of its own: `nanoarc train`, that SIGTERMs itself when the sweep which began it is no more """
    from nanoarc.cli import main as cli
    def watch():
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()
    cli(['train', *args])

if __name__ == '__main__':
    work(sys.argv[1:])
