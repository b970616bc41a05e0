""" python -m pytest tests/test_sweep.py, with -m slow those that train many tiny trials and kill their sweeps """
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from nanoarc import sweep
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig
from nanoarc.model import ModelConfig, width_lr
from nanoarc.run import Run, apply_values, read_metrics, read_toml
from nanoarc.sweep import SweepConfig, all_values, by_run, first_trial, read_space, to_toml
from nanoarc.train import TrainConfig, get_lr

ROOT = Path(__file__).parent.parent
SPACE = """
[fixed]
data = '{data}'
n_layer = 2
head_size = 16
batch_tokens = 400
max_iters = {steps}
eval_every = 10
save_every = 10
log_every = 10
draw_every = 0
device = 'cpu'
[search]
n_embd = {widths}
lr = {{low = 1e-3, high = 1e-2, log = true}}
"""

@pytest.fixture
def space(toy, tmp_path):
    def write(steps=20, widths=(32,)):
        path = tmp_path / 'space.toml'
        path.write_text(SPACE.format(data=toy(n=4, queries=2, side=3), steps=steps, widths=list(widths)))
        return path
    return write

def study_of(out):
    return optuna.load_study(study_name='space', storage=f"sqlite:///{out / 'study.db'}")

def start(space, out, trials, *flags):
    """ a sweep in a process group of its own """
    command = [sys.executable, '-m', 'nanoarc', 'sweep', str(space), f"--out_dir={out}", f"--trials={trials}",
               '--heartbeat=1', *flags]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

def wait_for_one_more(out, known, process, seconds=120):
    """ until a trial that is none of these has a checkpoint -> the trials that have been begun """
    until = time.monotonic() + seconds
    while True:
        new = {path.parents[1].name for path in out.glob('trial-*/ckpt/*.sha256')} - known
        if new:
            return known | new
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.02)

def values_of(trials):
    """ {run: val nats} of the trials that are complete """
    done = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            done[trial.user_attrs['run']] = trial.value
    return done

@pytest.mark.parametrize('text, want', [
    ("[fixed]\nnlayer = 2\n[search]\nlr = [1e-3]", r"\[fixed\]: unknown setting nlayer"),
    ("[fixed]\nn_layer = 'x'\n[search]\nlr = [1e-3]", r"\[fixed\]: n_layer = 'x', want a int"),
    ("[search]\nlrr = [1e-3]", r"\[search\]: unknown setting lrr"),
    ("[search]\nn_layer = [2, 2.5]", r"\[search\]: n_layer = 2.5, want a int"),
    ("[search]\nn_layer = {low = 1, high = 4.5}", r"n_layer = 4.5, want a int"),
    ("[search]\nlr = {low = 1e-3}", r"lr = .*, want a list of choices or a range"),
    ("[search]\nlr = {low = 1e-3, high = 1e-2, logs = true}", r"lr = .*, want a list of choices or a range"),
    ("[search]\nlr = []", r"lr = \[\], want a list of choices or a range"),
    ("[search]\nlr = {low = 1e-2, high = 1e-3}", r"\[search\]: lr: .*low"),
    ("[search]\nmixer = {low = 'A', high = 'M'}", r"a range of str there is not"),
    ("[fixed]\nlr = 1e-3\n[search]\nlr = [1e-3]", r"lr is in \[fixed\] too"),
    ("[search]\nseed = [1, 2]", r"seed decides what is validated on, it belongs into \[fixed\]"),
    ("[fixed]\nout_dir = 'x'\n[search]\nlr = [1e-3]", r"out_dir: each trial has its own"),
    ("[fixed]\nval_tasks = 0\n[search]\nlr = [1e-3]", r"val_tasks = 0, want some to judge by"),
    ("[find]\nlr = [1e-3]", r"unknown find, want the tables \[fixed\] and \[search\]"),
    ("[fixed]\nlr = 1e-3", r"nothing to search"),
    ("[search]\nlr = ?\n", r"space.toml: .*line 2"),
])
def test_a_bad_space_is_refused_by_file_and_key(tmp_path, capsys, text, want):
    path = tmp_path / 'space.toml'
    path.write_text(text)
    with pytest.raises(SystemExit) as e:
        cli(['sweep', str(path), f"--out_dir={tmp_path / 'out'}", '--trials=0'])
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error.startswith(f"nanoarc: {path}: ") and error.count("\n") == 1
    assert re.search(want, error), error
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('name', ['sweep_small', 'sweep_2024'])
def test_every_choice_of_the_shipped_spaces_is_a_model(name):
    _, search, base = read_space(ROOT / 'runs' / f"{name}.toml")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(200):
        cfg = apply_values(base, sweep.suggest(study.ask(), search, base), name)
        cfg.model.resolved()
        cfg.train.check()
        cfg.data.check()

def test_the_first_trial_of_the_small_space_is_the_default():
    _, search, base = read_space(ROOT / 'runs' / 'sweep_small.toml')
    first = first_trial(search, base)
    assert first == {'n_layer': 2, 'n_embd': 96, 'lr': width_lr(96), 'adam_lr': width_lr(96), 'weight_decay': 0.1,
                     'decay_frac': 0.5, 'batch_tokens': 2048, 'p_identity': 0.2, 'ema': 0.998, 'dropout': 0.1}
    assert first_trial({'lr': [1e-4]}, base) == {}

def test_what_is_written_is_read_back(tmp_path):
    values = {'data': 'arc1/training*2+arc1/evaluation', 'lr': 1e-05, 'drop_overlap': True,
              'rope_bases': [100.0, 10.0, 10.0], 'n_layer': 3, 'mixer': 'MA', 'log': 'w"ä\\'}
    (tmp_path / 'x.toml').write_text(to_toml(values))
    default = Run(TrainConfig(), ModelConfig(), DataConfig())
    got = all_values(apply_values(default, read_toml(tmp_path / 'x.toml'), "x.toml"))
    got['rope_bases'] = list(got['rope_bases'])
    assert {key: got[key] for key in values} == values

def test_sources_are_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / 'arc1').mkdir()
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path)
    assert sweep.absolute('mine*3+arc1/training*2') == f"{tmp_path / 'mine*3'}+arc1/training*2"

def test_warm_up_as_a_share_of_the_steps():
    cfg = TrainConfig(warmup_iters=3, warmup_frac=0.1, decay_frac=0.5)
    assert [get_lr(step, 100, cfg) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]

def test_warm_up_as_a_share_of_steps_that_nobody_knows_is_refused(toy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(['train', f"--data={toy()}", '--warmup_frac=0.1', '--minutes=1', f"--out_dir={tmp_path / 'run'}"])
    assert "warmup_frac=0.1: a share of max_iters" in capsys.readouterr().err

@pytest.mark.slow
def test_a_trial_that_fails_fails_alone_and_train_takes_the_best(space, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / 'out', space(widths=(32, 33))
    def alternate(self, study, trial, name, choices):
        return choices.choices[trial.number % 2] if name == 'n_embd' else 3e-3
    monkeypatch.setattr(optuna.samplers.TPESampler, 'sample_independent', alternate)
    monkeypatch.setattr(sweep, 'first_trial', lambda *_: {})
    monkeypatch.chdir(tmp_path)
    path.write_text(path.read_text().replace(f"{tmp_path}/", "")) # sources by relative paths
    cli(['sweep', str(path), '--out_dir=out', '--trials=2'])
    os.chdir('/')
    (out / 'best.toml').unlink()
    cli(['sweep', str(path), f"--out_dir={out}", '--trials=0']) # the report alone, from elsewhere
    trials = by_run(study_of(out))
    good, bad = trials['trial-0000'], trials['trial-0001']
    assert good.state == TrialState.COMPLETE and good.value == read_metrics(out / 'trial-0000')[-1]['val_loss']
    assert bad.state == TrialState.FAIL
    assert 'want a divisor of expand * n_embd = 66' in bad.user_attrs['error']
    assert 'want a divisor of expand * n_embd = 66' in capsys.readouterr().out
    page = (out / 'report.html').read_text()
    assert f"{good.value:.4f}" in page and 'want a divisor of expand * n_embd = 66' in page and 'src="http' not in page
    cli(['train', '--config', str(out / 'best.toml'), '--out_dir', str(tmp_path / 'again')])
    assert read_metrics(tmp_path / 'again')[-1]['val_loss'] == good.value
    path.write_text(path.read_text().replace("save_every = 10", "save_every = 11"))
    with pytest.raises(SystemExit):
        cli(['sweep', str(path), f"--out_dir={out}"])
    assert "begun with another space, [fixed] save_every differ" in capsys.readouterr().err

def test_a_trial_worse_than_the_others_is_stopped(space, tmp_path, monkeypatch, capsys):
    # everything is worse
    monkeypatch.setattr(optuna.pruners, 'MedianPruner', lambda **_: optuna.pruners.ThresholdPruner(upper=0.0))
    cli(['sweep', str(space(steps=3000)), f"--out_dir={tmp_path / 'out'}", '--trials=1'])
    trial, = study_of(tmp_path / 'out').trials
    assert trial.state == TrialState.PRUNED and 0 in trial.intermediate_values
    assert 'pruned' in capsys.readouterr().out
    run = tmp_path / 'out' / 'trial-0000'
    assert "stopped by signal 15" in (run / 'output.txt').read_text()
    assert not (run / 'ckpt').exists()

@pytest.mark.slow
def test_a_killed_sweep_loses_no_trial_and_repeats_none(space, tmp_path):
    out, path = tmp_path / 'out', space(steps=250)
    known = set()
    def kill(how, sig):
        """ a sweep, until one more trial trains -> what is complete when it is dead """
        nonlocal known
        process = start(path, out, 4)
        known = wait_for_one_more(out, known, process)
        how(process.pid, sig)
        process.communicate()
        return values_of(by_run(study_of(out)).values())
    assert kill(os.killpg, signal.SIGKILL) == {}
    one = kill(os.killpg, signal.SIGKILL) # in the second one, the first is done
    two = kill(os.kill, signal.SIGKILL) # the parent alone
    until = time.monotonic() + 20 # what it began stops too
    while not any("stopped by signal 15" in (out / name / 'output.txt').read_text() for name in known):
        assert time.monotonic() < until, "an orphan trains on"
        time.sleep(0.1)
    three = kill(os.kill, signal.SIGTERM) # it stops by itself, and what it began
    assert study_of(out).trials[-1].state == TrialState.WAITING # at once, nobody need wait for a heartbeat
    assert [len(one), len(two), len(three)] == [1, 2, 3]
    assert one.items() <= two.items() <= three.items()
    assert "4 trials, 4 complete" in start(path, out, 4).communicate()[0]
    trials = study_of(out).trials
    done = values_of(trials)
    assert done.keys() == known and three.items() <= done.items()
    states = [trial.state for trial in trials]
    assert len(done) == states.count(TrialState.COMPLETE) == 4
    assert len(trials) - 4 == states.count(TrialState.FAIL) == 4 # those that were taken over
    for name in known:
        assert f"resumed {out / name} at step" in (out / name / 'output.txt').read_text()
    name = sorted(known)[1] # its result is as if nobody had killed it
    cli(['train', '--config', str(out / name / 'settings.toml'), '--out_dir', str(tmp_path / 'alone')])
    assert read_metrics(tmp_path / 'alone')[-1]['val_loss'] == done[name]
    before = (out / 'study.db').read_bytes()
    assert "4 trials, 4 complete" in start(path, out, 4).communicate()[0]
    assert (out / 'study.db').read_bytes() == before

@pytest.mark.slow
def test_two_workers_share_a_study(space, tmp_path):
    out, path = tmp_path / 'out', space(steps=100)
    workers = [start(path, out, 6, '--jobs=2'), start(path, out, 6)]
    texts = [worker.communicate()[0] for worker in workers]
    trials = study_of(out).trials
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)] # the last may be stopped
    assert 6 == sum('extra' not in t.user_attrs for t in ended) and trials[0].state == TrialState.COMPLETE
    done = [set(re.findall(r"^(trial-\d+) (?:[\d.]+ nats|pruned)", text, re.M)) for text in texts]
    assert done[0] and done[1] and not done[0] & done[1] and len(done[0] | done[1]) == 6
    spans = sorted((t.datetime_start, t.datetime_complete) for t in trials)
    assert any(a[1] > b[0] for a, b in zip(spans, spans[1:])) # at the same time
    for name in ('report.html', 'history.png', 'importance.png', 'best.toml'):
        assert (out / name).stat().st_size > 0
    assert (out / 'report.html').read_text().count('data:image/png;base64,') == 2

@pytest.mark.parametrize('name', ['../victim', '/etc', 'trial-0000/../../victim', 'victim', 'trial-1', '', 5, ['a'],
                                  'trial-0000\n', 'trial-٠٠٠٠'])
def test_a_run_that_the_database_names_elsewhere_is_refused(space, tmp_path, capsys, name):
    out, path, thesis = tmp_path / 'out', space(), tmp_path / 'victim' / 'ckpt' / 'thesis'
    cli(['sweep', str(path), f"--out_dir={out}", '--trials=0'])
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    study_of(out).enqueue_trial({'lr': 0.005, 'n_embd': 32}, user_attrs={'run': name})
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli(['sweep', str(path), f"--out_dir={out}", '--trials=1'])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("nanoarc: the database of the study names the run ")
    assert error.count("\n") == 1 and thesis.read_text() == "precious"

def test_a_link_in_a_sweep_is_not_followed(space, tmp_path, capsys):
    path, victim = space(), tmp_path / 'victim'
    victim.mkdir()
    for name in ('trial-0000', 'study.db', 'lock'):
        out = tmp_path / f"out of {name}"
        out.mkdir()
        (out / name).symlink_to(victim)
        with pytest.raises(SystemExit):
            cli(['sweep', str(path), f"--out_dir={out}", '--trials=1'])
        assert f"{out / name} is a link" in capsys.readouterr().err and list(victim.iterdir()) == []

def test_a_users_file_among_the_checkpoints_of_a_trial_stays(space, tmp_path, monkeypatch):
    out, follow = tmp_path / 'out', sweep.Sweep.follow
    def kept(self, trial, run):
        result = follow(self, trial, run)
        (run / 'ckpt' / 'step-000020-best.safetensors').write_text("precious")
        return result
    monkeypatch.setattr(sweep.Sweep, 'follow', kept)
    cli(['sweep', str(space()), f"--out_dir={out}", '--trials=1'])
    assert [x.name for x in (out / 'trial-0000' / 'ckpt').iterdir()] == ['step-000020-best.safetensors']

def test_a_report_without_pictures_is_a_report(space, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.Sweep, 'follow', lambda *_: (0, False))
    monkeypatch.setattr(sweep, 'read_metrics', lambda _: [{'step': 1, 'val_loss': 0.5, 'done': 1}])
    def fail(*_):
        raise ValueError("no backend")
    monkeypatch.setattr(sweep, 'draw_study', fail)
    cli(['sweep', str(space()), f"--out_dir={tmp_path / 'out'}", '--trials=2'])
    assert "warning: history.png and importance.png: ValueError: no backend" in capsys.readouterr().out
    assert "2 trials, 2 complete" in (tmp_path / 'out' / 'report.html').read_text()

@pytest.mark.browser
def test_a_report_fits_a_phone_and_is_dark_in_the_dark(space, tmp_path, monkeypatch, driver):
    monkeypatch.setattr(sweep.Sweep, 'follow', lambda *_: (0, False))
    monkeypatch.setattr(sweep, 'read_metrics', lambda _: [{'step': 1, 'val_loss': 0.5, 'done': 1}])
    cli(['sweep', str(space()), f"--out_dir={tmp_path / 'out'}", '--trials=2'])
    dark = {'name': 'prefers-color-scheme', 'value': 'dark'}
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [dark]})
    screen = {'width': 390, 'height': 800, 'deviceScaleFactor': 1, 'mobile': True}
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    driver.get((tmp_path / 'out' / 'report.html').as_uri())
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390 # the table scrolls by itself
    color = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert color == 'rgb(22, 22, 22)'
    driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})

def test_a_sweep_without_its_database_is_one_line(space, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['sweep', str(space()), f"--out_dir={tmp_path / 'out'}", '--storage=nosuch://x'])
    assert e.value.code == 2 and "the database of the study: " in capsys.readouterr().err

def test_a_trial_has_its_share_of_the_threads(space, tmp_path, monkeypatch):
    seen = []
    class Child(subprocess.Popen):
        def __init__(self, args, env, **kwargs):
            seen.append(env['OMP_NUM_THREADS'])
            super().__init__(['true'], env=env, **kwargs)
    monkeypatch.setattr(sweep.subprocess, 'Popen', Child)
    monkeypatch.setattr(sweep.torch, 'get_num_threads', lambda: 7)
    sweep.sweep(SweepConfig(str(space(widths=(64, 96))), out_dir=str(tmp_path / 'out'), trials=1, jobs=2))
    assert seen == ['3']
    trial, = study_of(tmp_path / 'out').trials
    assert trial.params == {'n_embd': 96, 'lr': width_lr(96)} # the first one is the default
    assert trial.user_attrs['error'] == "stopped from outside"
