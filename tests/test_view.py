""" python -m pytest tests/test_view.py """
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partialmethod

import numpy as np
import pytest
from conftest import toy_tasks
from matplotlib.text import Text
from rich.console import Console

from nanoarc import view
from nanoarc.cli import main as cli
from nanoarc.grids import PALETTE
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
    ([], "name a task id"),
    (['007bbfb7', '--out=x.pdf'], "want a .png"),
])
def test_what_cannot_be_shown_is_said(args, want, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['view', *args])
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
    rows = view.run_rows([tiny_run[0], str(tmp_path / 'other')])
    losses = [x['loss'] for x in read_metrics(tiny_run[0]) if 'loss' in x]
    assert [row['step'] for row in rows] == [30, 30] and rows[0]['loss'] == losses[-1]
