""" python -m pytest tests/test_view.py """
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partialmethod

import numpy as np
import pytest
from conftest import toy_tasks
from matplotlib.text import Text
from rich.console import Console

from nanoarc import view
from nanoarc.cli import main as cli
from nanoarc.paint import PALETTE
from nanoarc.run import read_metrics
from nanoarc.sources import read_tasks

def test_a_task_is_drawn_in_the_terminal():
    task = {task.name: task for task in read_tasks('arc1/training')}['007bbfb7']
    out = io.StringIO()
    tried = [{'attempt_1': task.queries[0][1].tolist(), 'attempt_2': [[1]]}]
    view.print_task(task, tried, Console(file=out, width=200, force_terminal=True, color_system='truecolor'))
    text = out.getvalue()
    for words in ("007bbfb7", "demo 4", "attempt 1 right", "attempt 2 wrong"):
        assert words in text
    assert "48;2;255;65;54" in text # red cells are red

def test_a_png_has_the_colors_of_the_grid(tmp_path):
    import matplotlib.image
    path = tmp_path / 'submission.json'
    task = {task.name: task for task in read_tasks('arc1/evaluation')}['66e6c45b']
    path.write_text(json.dumps({'66e6c45b': [{'attempt_1': task.queries[0][1].tolist(), 'attempt_2': [[8]]}]}))
    cli(['view', '66e6c45b', '007bbfb7', '--submission', str(path), '--out', str(tmp_path / 'x.png')])
    image = (matplotlib.image.imread(tmp_path / 'x.png')[..., :3] * 255).round().astype(int)
    have = {tuple(x) for x in np.unique(image.reshape(-1, 3), axis=0).tolist()}
    used = {8}
    for x, y in task.demos:
        used |= {*x.flat, *y.flat}
    for c in used:
        assert tuple(bytes.fromhex(PALETTE[c][1:])) in have

def test_loss_curves_of_runs_are_drawn(tiny_run, tmp_path, capsys):
    cli(['view', tiny_run[0], tiny_run[0], '--out', str(tmp_path / 'both.png')])
    assert (tmp_path / 'both.png').stat().st_size > 5000

@pytest.mark.parametrize('args, want', [
    (['nosuch'], "no task and no directory named nosuch"),
    (['RUN', 'nosuch'], "no task and no directory named nosuch in"),
    (['RUN', '007bbfb7'], "is a directory: want tasks alone or runs alone"),
    ([], "name a task id"),
    (['007bbfb7', '--out=x.pdf'], "want a .png"),
])
def test_what_cannot_be_shown_is_said(args, want, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        cli(['view', *(x.replace('RUN', str(tmp_path)) for x in args)])
    assert e.value.code == 2 and want in capsys.readouterr().err

@pytest.mark.parametrize('text, want', [
    ("[]", "want an object"),
    ('{"66e6c45b": [null]}', "task 66e6c45b: want a list of attempts"),
    ("{", "not json"),
    ('{"66e6c45b": [{"attempt_1": null}]}', "task 66e6c45b, query 0, attempt_1: want a grid"),
    ('{"66e6c45b": [{"attempt_2": [[77]]}]}', "attempt_2, row 0, col 0: color 77"),
])
@pytest.mark.slow
def test_a_malformed_submission_is_named(text, want, tmp_path, capsys):
    path = tmp_path / 'sub.json'
    path.write_text(text)
    with pytest.raises(SystemExit) as e:
        cli(['view', '66e6c45b', '--submission', str(path)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and want in err and "sub.json" in err and err.count("\n") == 1

NAMES = ["cost $0^^2$", "$", "[/x]", "[bold]", "_under", "a$b_c$d", r"\frac", "%d{}"]

@pytest.mark.parametrize('name', NAMES)
def test_any_name_is_shown_as_it_is(toy, tiny_run, tmp_path, capsys, monkeypatch, name):
    src = tmp_path / 'x.json'
    src.write_text(json.dumps({name: toy_tasks(1)['toy0000']}))
    monkeypatch.setattr(Console, '__init__', partialmethod(Console.__init__, width=200))
    cli(['view', name, '--data', str(src)])
    assert f"{name} (" in capsys.readouterr().out
    drawn, draw = [], Text.draw
    def recorded(self, *args, **kwargs):
        drawn.append((self.get_text(), self.get_parse_math()))
        return draw(self, *args, **kwargs)
    monkeypatch.setattr(Text, 'draw', recorded)
    cli(['view', name, '--data', str(src), '--out', str(tmp_path / 'x.png')])
    assert (name, False) in drawn
    drawn.clear()
    run = tmp_path / 'runs' / name.replace('/', '')
    shutil.copytree(tiny_run[0], run)
    cli(['view', tiny_run[0], str(run), '--out', str(tmp_path / 'y.png')])
    assert run.name in capsys.readouterr().out and (f"training of {run.name}", False) in drawn
    drawn.clear()
    src = tmp_path / name.replace('/', '')
    shutil.copytree(tmp_path / 'toy', src) if (tmp_path / 'toy').is_dir() else shutil.copytree(toy(), src)
    cli(['data', 'stats', str(src), '--png', str(tmp_path / 'z.png')])
    assert (str(src), False) in drawn

@pytest.mark.parametrize('backend', ['module://no.such_backend', 'TkAgg', 'nonsense'])
@pytest.mark.slow
def test_pictures_need_no_backend_that_is_not_here(tiny_run, tmp_path, backend):
    """ as a notebook's `!nanoarc ...` passes one on """
    code = "import sys; from nanoarc.cli import main; main(sys.argv[1:])"
    command = [sys.executable, '-c', code, 'view', tiny_run[0], f"--out={tmp_path / 'x.png'}"]
    done = subprocess.run(command, env={**os.environ, 'MPLBACKEND': backend}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / 'x.png').stat().st_size > 5000

def test_a_picture_of_a_run_is_not_written_through_a_link(tiny_run, tmp_path, capsys):
    run, thesis = tmp_path / 'run', tmp_path / 'thesis'
    shutil.copytree(tiny_run[0], run)
    thesis.write_text("precious")
    (run / 'loss.png').symlink_to(thesis)
    with pytest.raises(SystemExit):
        cli(['view', str(run)])
    assert f"{run / 'loss.png'} is a link" in capsys.readouterr().err and thesis.read_text() == "precious"
def test_attempts_of_another_system_are_shown_and_what_is_missing_is_no_error(tmp_path, capsys):
    path = tmp_path / 'sub.json'
    path.write_text('{"66e6c45b": [{"attempt_1": {"answer": [[8]], "metadata": {"cost": 0.5}}, "attempt_3": 1}]}')
    cli(['view', '66e6c45b', '--submission', str(path)])
    assert "attempt 1 wrong" in capsys.readouterr().out

def test_two_runs_are_overlaid(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run[0], tmp_path / 'other')
    cli(['view', tiny_run[0], str(tmp_path / 'other'), f"--out={tmp_path / 'x.png'}"])
    assert (tmp_path / 'x.png').stat().st_size > 10000 and "at step" in capsys.readouterr().out
    row = view.run_row(tiny_run[0], read_metrics(tiny_run[0]))
    losses = [x['loss'] for x in read_metrics(tiny_run[0]) if 'loss' in x]
    assert row['step'] == 30 and row['loss'] == losses[-1]

@pytest.mark.parametrize('is_full', [False, True])
def test_a_run_that_nobody_may_write_to_is_shown(tiny_run, tmp_path, capsys, monkeypatch, is_full):
    run = tmp_path / 'run'
    shutil.copytree(tiny_run[0], run)
    if is_full:
        monkeypatch.setattr(os, 'fsync', full_disk)
    else:
        (run / 'loss.png').mkdir()
    cli(['view', str(run)])
    out = capsys.readouterr().out
    assert "30 of 30" in out and re.search(r"run/loss.png: not written, (No space|Is a dir).* --out x.png", out)
    with pytest.raises(SystemExit): # what is asked for is another thing
        cli(['view', str(run), f"--out={run if is_full else run / 'loss.png'}{'/x.png' if is_full else ''}"])

def full_disk(_):
    raise OSError(28, "No space left on device")

@pytest.mark.parametrize('args, out', [
    ('view 007bbfb7', 'x.png'), ('view RUN RUN', 'x.png'), ('draw', 'x.html'), ('data stats SRC', 'x.png')])
def test_a_picture_that_does_not_fit_is_named_and_the_old_one_stays(args, out, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, 'fsync', full_disk)
    path = tmp_path / out
    path.write_text("older")
    words = args.replace('RUN', tiny_run[0]).replace('SRC', tiny_run[1]).split()
    with pytest.raises(SystemExit) as e:
        cli([*words, f"--{'png' if words[0] == 'data' else 'out'}={path}"])
    assert e.value.code == 2 and f"No space left on device: '{path}'" in capsys.readouterr().err
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [(out, "older")]

# -----------------------------------------------------------------------------
# a run in the terminal, and while it runs

def shown(what, width=80):
    """ something of rich as plain text """
    out = io.StringIO()
    Console(file=out, width=width).print(what)
    return out.getvalue()

def test_a_chart_in_the_terminal_shows_the_curves():
    steps = list(range(0, 101, 10))
    text = shown(view.chart([(steps, [4.0 * 0.9 ** k for k in range(11)], 'blue'), ([0, 100], [4, 1], 'red')]))
    *lines, last = [line.rstrip() for line in text.splitlines()]
    assert len(lines) == 8 and max(map(len, lines)) == 9 + 64 and last.split() == ['0', '100']
    assert float(lines[0].split()[0]) == 4 and float(lines[-1].split()[0]) == 1
    begins = [len(line) - len(line[9:].lstrip("\u2800")) for line in lines] # it falls to the right
    assert begins == sorted(begins) and begins[0] == 9 and begins[-1] > 60
    letters = shown(view.chart([([0, 1, 2, 3], np.exp([3, 2, 1, 0]), 'blue')], width=2, height=2)).splitlines()
    assert [line[9:] for line in letters[:2]] == ["\u2821\u2800", "\u2800\u2881"] # a diagonal in 4 x 8 dots
    assert shown(view.chart([([5], [0.0], 'blue')])) # a run that has just begun, or knows all

def test_the_screen_of_a_run_says_where_it_stands(tiny_run, tmp_path, capsys):
    cli(['view', tiny_run[0]])
    text = capsys.readouterr().out
    loss = [x['loss'] for x in read_metrics(tiny_run[0]) if 'loss' in x][-1]
    for words in ("30 of 30", f"training loss  {loss:.3f} nats per output token", "tokens/s", "30 steps, "):
        assert words in text
    assert "solved" not in text and max(map(len, text.splitlines()[:-1])) <= 80
    run = tmp_path / 'run'
    shutil.copytree(tiny_run[0], run)
    val = [['ab[b]c', [[1, 2]], [[3], [4]], [[3], [4]]], ['d', [[1]], [[2]], [[3]]]]
    (run / 'val.json').write_text(json.dumps(val))
    tasks = read_tasks(tiny_run[1])
    submission = {task.name: [{'attempt_1': y.tolist(), 'attempt_2': [[0]]} for _, y in task.queries] for task in tasks}
    submission[tasks[0].name][0]['attempt_1'] = [[9] * 9]
    del submission[tasks[1].name] # was not to be solved
    (run / 'submission.json').write_text(json.dumps(submission))
    (run / 'solve.json').write_text(json.dumps({'data': tiny_run[1], 'leaks': []}))
    cli(['view', str(run)])
    text = capsys.readouterr().out
    for damaged in ('[1]', '{"a": 1}', '[["a", [[1]], [[77]], [[1]]]]', '['):
        (run / 'val.json').write_text(damaged)
        assert view.read_val(run) == []
    assert "2 of 3 tasks" in text and "ab[b]c" in text and "right" in text and "wrong" in text

BIG = 10**31

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('rows, losses', [
    ('{"step": 1, "loss": NaN}', []), ('{"step": 1, "loss": 1e400}', []), (f'{{"step": 1, "loss": {BIG}}}', []),
    ('{"step": 1, "loss": 1%s}' % ("0" * 400), []), (f'{{"step": {BIG}, "loss": 2.5}}', []),
    ('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": -Infinity, "val_loss": NaN, "tok_s": 5, "wait": NaN}', [2.5]),
])
def test_what_is_no_finite_number_is_left_out_of_the_curves(rows, losses, tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_text(rows)
    for args in ([], [f"--out={tmp_path / 'x.png'}"], [str(tmp_path)]):
        cli(['view', str(tmp_path), *args])
        out = capsys.readouterr().out
        assert "nan" not in out and ("2.500" in out) == (losses != [])
    assert view.curve(read_metrics(tmp_path), 'loss')[1] == losses
    assert shown(view.screen(tmp_path)) # as --live draws it

def test_the_picture_of_losses_has_plain_numbers_and_what_is_solved(tiny_run, tmp_path, monkeypatch):
    labels = []
    def seen(fig, out):
        fig.canvas.draw()
        ax, = fig.axes
        labels.extend(x.get_text() for x in [*ax.get_yticklabels(), *ax.get_yticklabels(minor=True)])
        labels.extend(x.get_text() for x in ax.get_legend().get_texts())
    monkeypatch.setattr(view, 'save_figure', seen)
    monkeypatch.setattr(view, 'solved_of', lambda run: "14 of 34")
    run = tmp_path / 'run'
    run.mkdir()
    for values in ([6.6, 3.8], [2.1, 0.4], [0.61, 0.58], [3, 0.002]):
        labels.clear()
        rows = [{'step': k, 'loss': x, 'val_loss': x} for k, x in enumerate(values)]
        (run / 'metrics.jsonl').write_text("".join(json.dumps(row) + "\n" for row in rows))
        view.draw_loss([run], tmp_path / 'x.png')
        *numbers, training, validation = labels
        assert training == "training" and validation == "validation, 14 of 34 tasks solved"
        inside = [x for x in numbers if x and min(values) <= float(x) <= max(values)] # plain, or float would raise
        assert inside, numbers

def live(run):
    """ `nanoarc view RUN --live` in a terminal of its own -> (process, function that waits until it shows words) """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('HHHH', 50, 200, 0, 0)) # rows, columns
    code = ("import sys; from nanoarc import view; view.watch.__defaults__ = (0.05,); "
            "from nanoarc.cli import main; main(['view', sys.argv[1], '--live'])")
    process = subprocess.Popen([sys.executable, '-c', code, str(run)], stdin=its, stdout=its, stderr=its,
                               env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '200'})
    os.close(its)
    text = ""
    def wait_for(words, seconds=60):
        nonlocal text
        end = time.time() + seconds
        while words not in text:
            assert time.time() < end, text[-2000:]
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 65536).decode('utf-8', 'replace')
        text = text.partition(words)[2]
    return process, wait_for

def write_row(run, step, end="\n", **values):
    with open(run / 'metrics.jsonl', 'a') as f:
        f.write(json.dumps({'step': step, **values}) + end)
    with open(run / 'log.txt', 'a') as f:
        f.write(f"step {step}/400 and so on\n")

def test_a_run_is_watched_while_rows_are_written_and_until_it_ends(tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    process, wait_for = live(run)
    wait_for("no row")
    write_row(run, 1, loss=3.25, tok_s=1234.0, wait=0.5)
    wait_for("1 of 400")
    wait_for("3.250 nats")
    write_row(run, 50, val_loss=2.125)
    wait_for("2.125, the lowest was 2.125 at step 50")
    write_row(run, 100, loss=1.5)
    with open(run / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 150, "lo') # the rest is to come
    wait_for("1.500 nats")
    with open(run / 'metrics.jsonl', 'a') as f:
        f.write('ss": 0.875}\n')
    wait_for("0.875 nats")
    (run / 'val.json').write_text(json.dumps([['abcd', [[1, 2]], [[3], [4]], [[3], [4]]]]))
    wait_for("abcd")
    wait_for("right")
    assert process.poll() is None
    with open(run / 'log.txt', 'a') as f:
        f.write("400 steps, 1,234,567 tokens, 99 s, 0.5 nats per output token on validation: x (...)\n")
    wait_for("400 steps, 1,234,567 tokens, 99 s")
    assert process.wait(20) == 0

def test_the_last_screen_was_drawn_after_the_end(monkeypatch, tmp_path):
    asked = iter(["", "", "400 steps"]) # the end comes between a screen and the question
    seen = []
    monkeypatch.setattr(view, 'screen', lambda run: seen.append('screen') or "")
    monkeypatch.setattr(view, 'end_of', lambda run: seen.append('asked') or next(asked))
    view.watch(tmp_path, seconds=0)
    assert seen[-2:] == ['asked', 'screen']

def test_watching_ends_with_ctrl_c(tiny_run, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    shutil.copy(f"{tiny_run[0]}/metrics.jsonl", run)
    process, wait_for = live(run)
    wait_for("training loss")
    wait_for("training loss") # again
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0

@pytest.mark.parametrize('last, ended', [
    ("stopped by signal 15 after step 7, --resume out goes on", True), ("ended by ValueError: step 3: ...", True),
    ("step 7/9 loss 1.0", False), ("7 steps, 12,3", False), ("", False)])
def test_a_run_has_ended_when_its_log_says_so(tmp_path, last, ended):
    (tmp_path / 'log.txt').write_text("400 steps, 1 tokens, 9 s, of an earlier start\n" + "x\n" * 5000 + last)
    assert bool(view.end_of(tmp_path)) == ended

@pytest.mark.parametrize('things', [['66e6c45b'], ['RUN', 'RUN'], []])
def test_what_cannot_be_watched_is_said(things, tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['view', *(x.replace('RUN', tiny_run[0]) for x in things), '--live'])
    assert e.value.code == 2 and "want the directory of one run" in capsys.readouterr().err or not things
