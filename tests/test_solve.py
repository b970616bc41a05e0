""" python -m pytest tests/test_solve.py: views, candidates, test-time training, the command """
import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, rewrite
from test_decode import next_scores

from nanoarc import checkpoint, grids, solve as solving, submission as sub
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig, Sampler
from nanoarc.decode import score_answers
from nanoarc.grids import END, IN, OUT, ROW, dihedral, encode_grid, next_place, undo_augment
from nanoarc.run import load_run
from nanoarc.solve import SolveConfig, Solver, make_views, solve
from nanoarc.sources import read_source, read_tasks
from nanoarc.submission import Keeper, read_attempts, score

def change_tasks(src, change, out=None):
    """ change(name, task) each task of a directory, in place or as a copy -> its path """
    out = Path(out or src)
    out.mkdir(exist_ok=True)
    for path in Path(src).iterdir():
        task = json.loads(path.read_text())
        change(path.stem, task)
        (out / path.name).write_text(json.dumps(task))
    return str(out)

def without_answers(name, task):
    for pair in task['test']:
        pair.pop('output', None)

@pytest.fixture
def short_answers(monkeypatch):
    """ a model that has learned nothing fills the largest grid that there is: let that be a small one """
    monkeypatch.setattr(grids, 'MAX_SIDE', 9)

def first_query(sampler, k):
    """ number of the pair of task k that is its first query """
    return int(sampler.tables.first[k] + sampler.tables.n_demos[k])

def make_solver(tiny_run, tasks, **how):
    """ of the first query of some tasks, numbers of them """
    model, data_cfg, meta = load_run(tiny_run[0], 'cpu')
    sampler = Sampler([read_source(tiny_run[1], opened=False)], data_cfg, meta['rows'])
    queries = {(k, 0): first_query(sampler, k) for k in tasks}
    return Solver(SolveConfig(run=tiny_run[0], **{'views': 6, **how}), model, contextlib.nullcontext, sampler, queries)

# -----------------------------------------------------------------------------
# views and candidates

@pytest.mark.parametrize('shots', [0, -1])
def test_views_differ_begin_with_the_query_itself_and_can_be_undone(shots):
    sampler = Sampler([read_source('arc1/training', opened=False)], DataConfig(shots=shots))
    for k, task in enumerate(read_tasks('arc1/training')[:8]):
        views = make_views(sampler, first_query(sampler, k), 16, 1, (k, 0))
        assert views[0].number == 0 and views[0].dihedral == 0 and (views[0].cmap == np.arange(10)).all()
        assert len({(x.dihedral, x.idx.tobytes()) for x in views}) == len(views) >= 8
        assert {x.dihedral for x in views if x.number <= 8} == set(range(8))
        own = [x.number for x in views if (x.cmap == np.arange(10)).all()]
        assert own[-1] <= 8 and {x.number for x in views if x.number <= 8} == {*own}
        grid = task.queries[0][0]
        for x in views:
            turned = dihedral(x.cmap[grid], x.dihedral)
            tokens = [IN] + encode_grid(turned) + [OUT]
            assert x.idx.tolist()[-len(tokens) :] == tokens # the end of the prompt
            assert np.array_equal(undo_augment(turned, x.dihedral, x.cmap), grid)

def test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation(tiny_run):
    solver = make_solver(tiny_run, [1], views=14, p_min=0.01, score_most=3)
    solver.propose(solver.views)
    solver.judge()
    assert {x.dihedral for x in solver.views} != {0} and len({tuple(x.cmap) for x in solver.views}) > 3
    asked = [c for c in solver.candidates[1, 0].values() if c.score is not None]
    assert len(asked) == 3 < len(solver.candidates[1, 0])
    for c in asked:
        total = 0.0
        for x in solver.views: # the whole forward, a token after another, no cache
            idx, pos, width = x.idx.tolist(), x.pos.tolist(), 0
            for token in encode_grid(dihedral(x.cmap[c.grid], x.dihedral)) + [END]:
                total += float(next_scores(solver.model, idx, pos, width, x.row, x.dihedral)[token])
                if token == ROW and width == 0:
                    width = pos[-1][1]
                idx.append(token)
                pos.append(next_place(*pos[-1], token))
        assert abs(total / len(solver.views) - c.score) < 1e-3

def is_close(a, b):
    """ the same Candidate, but for rounding? """
    views, others = sorted(a.found), sorted(b.found)
    if a.votes != b.votes or [number for number, _ in views] != [number for number, _ in others]:
        return False
    if (a.score is None) != (b.score is None):
        return False
    gaps = [x - y for (_, x), (_, y) in zip(views, others)]
    if a.score is not None:
        gaps.append(a.score - b.score)
    return max(map(abs, gaps)) < 1e-3

def test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out(tiny_run, monkeypatch):
    def solved(pads=True, **how):
        """ {(query, grid): Candidate} """
        solver = make_solver(tiny_run, range(3), **{'p_min': 0.1, 'score_most': 2, **how})
        solver.model.pads = pads
        assert len({len(x.idx) for x in solver.views}) > 2
        solver.propose(solver.views)
        solver.judge()
        found = {}
        for query, candidates in solver.candidates.items():
            found.update({(query, key): c for key, c in candidates.items()})
        return found
    want = solved()
    def is_the_same(found):
        return found.keys() == want.keys() and all(is_close(c, want[key]) for key, c in found.items())
    assert is_the_same(solved(decode_rows=2))
    assert is_the_same(solved(decode_rows=1)) # without any filler
    assert is_the_same(solved(pads=False))
    tried = []
    def limited(f, most):
        def g(model, idx, *args, **kwargs):
            tried.append(len(idx))
            if len(idx) > most:
                raise torch.OutOfMemoryError
            return f(model, idx, *args, **kwargs)
        return g
    for name in ('decode', 'score_answers'):
        monkeypatch.setattr(solving, name, limited(getattr(solving, name), 3))
    assert is_the_same(solved())
    n = len(make_solver(tiny_run, range(3)).views)
    assert max(tried) == n and 0 < tried.count(n) <= 2 and min(tried) >= 1
    monkeypatch.setattr(solving, 'decode', limited(solving.decode, 0))
    with pytest.raises(torch.OutOfMemoryError): # of one view: there is nothing to halve
        solved()

# -----------------------------------------------------------------------------
# answers stay closed

def files(out):
    return [(Path(out) / name).read_bytes() for name in ('submission.json', 'candidates.jsonl')]

def test_the_submission_is_the_same_bytes_when_the_answers_are_gone(tiny_run, tmp_path):
    run, src = tiny_run
    def spoil(name, task):
        task['test'][0]['output'] = "closed, who looks at it fails"
        del task['test'][1]['output']
    blind = change_tasks(src, spoil, tmp_path / 'blind')
    for name, data, rows in (('a', src, 128), ('b', blind, 128), ('c', src, 3)):
        cli(['solve', '--run', run, '--data', data, '--out_dir', str(tmp_path / name), '--views=5', '--device=cpu',
             f"--decode_rows={rows}"])
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    assert files(tmp_path / 'a')[0] == files(tmp_path / 'c')[0] # nor does the batch size matter
    submission = json.loads(files(tmp_path / 'a')[0])
    assert list(submission) == [f"toy{k:04d}" for k in range(4)]
    assert all(len(x) == 2 and x[0].keys() == {'attempt_1', 'attempt_2'} for x in submission.values())

@pytest.mark.parametrize('how', [
    {'p_min': 0.05}, {'p_min': 1.0}, {'ttt_steps': 3, 'together': 1}, {'ttt_steps': 2, 'together': 2},
    {'minutes': 5.0, 'views': 20}])
def test_no_answer_is_looked_at_whatever_is_asked_for(tiny_run, tmp_path, how):
    run, src = tiny_run
    closed = change_tasks(src, without_answers, tmp_path / 'closed')
    for out, data in (('a', src), ('b', closed)):
        settings = {'views': 8, 'device': 'cpu', **how}
        solve(SolveConfig(run=run, data=data, out_dir=str(tmp_path / out), **settings))
    assert files(tmp_path / 'a') == files(tmp_path / 'b')

def test_a_model_that_has_learned_its_tasks_solves_them(toy, tmp_path, capsys):
    src, run = toy(n=3, side=3, seed=4), str(tmp_path / 'run') # transposes, asked for what they were trained on
    cli(['train', f"--data={src}", f"--out_dir={run}", '--max_iters=300', '--val_tasks=0', *TINY])
    solve_it = ['solve', '--run', run, '--data', src, '--views=8', '--device=cpu']
    with pytest.raises(SystemExit): # it has seen the answers
        cli(solve_it)
    err = capsys.readouterr().err
    assert "was trained on 3 of these queries, answers included: " in err and err.count("\n") == 1
    assert "Kaggle's visible test file is made of training tasks and wants --allow_leak" in err
    assert f"({src}) = toy0000 query 0 ({src})" in err and "--allow_leak" in err
    cli([*solve_it, '--allow_leak'])
    capsys.readouterr()
    cli(['score', f"{run}/submission.json", src])
    *_, warning, result = capsys.readouterr().out.splitlines()
    assert json.loads(result)['score'] == 100 and json.loads(result)['leaks'] == 3
    assert "TRAINED ON 3 OF THE ANSWERS" in warning

def test_a_leak_that_training_was_allowed_is_in_its_checkpoint_and_in_the_score(toy, tmp_path, capsys, short_answers):
    src, run = toy(n=2, side=9), str(tmp_path / 'run')
    train_it = ['train', f"--data={src}", f"--adapt={src}", f"--out_dir={run}", '--max_iters=1', '--val_tasks=0', *TINY]
    with pytest.raises(SystemExit):
        cli(train_it)
    assert "--drop_overlap" in capsys.readouterr().err
    cli([*train_it, '--allow_leak'])
    assert len(checkpoint.load(run)[1]['leaks']) == 2 and "leak allowed: toy0000" in capsys.readouterr().out
    cli(['solve', '--run', run, '--data', src, '--views=1', '--device=cpu'])
    cli(['score', f"{run}/submission.json", src])
    assert "TRAINED ON 2 OF THE ANSWERS" in capsys.readouterr().out

def test_a_run_knows_what_it_was_trained_on_though_the_asked_file_has_no_answers(toy, tmp_path, capsys):
    src, run = toy(n=3, side=9), str(tmp_path / 'run')
    cli(['train', f"--data={src}", '--shots=-1', f"--out_dir={run}", '--max_iters=1', '--val_tasks=0', *TINY])
    blind = change_tasks(src, without_answers, tmp_path / 'blind')
    with pytest.raises(SystemExit):
        cli(['solve', '--run', run, '--data', blind, '--views=1', '--device=cpu'])
    assert "was trained on 3 of these queries" in capsys.readouterr().err

@pytest.mark.parametrize('damage', ['empty', 'a line less', 'half a line', 'not utf-8', 'a line more'])
def test_what_a_run_was_trained_on_is_not_half_known(toy, tmp_path, capsys, damage):
    src, run = toy(n=3, side=9), str(tmp_path / 'run')
    cli(['train', f"--data={src}", '--shots=-1', f"--out_dir={run}", '--max_iters=1', '--val_tasks=0', *TINY])
    path = tmp_path / 'run' / 'trained_on.txt'
    whole = path.read_bytes()
    lines = whole.splitlines(True)
    cut = len(b"".join(lines[:5]))
    path.write_bytes({'empty': b"", 'a line less': whole[:cut], 'half a line': whole[: cut - 9],
                      'not utf-8': b"\xff" + whole, 'a line more': lines[0] + whole}[damage])
    with pytest.raises(SystemExit):
        cli(['solve', '--run', run, '--data', src, '--views=1', '--device=cpu'])
    err = capsys.readouterr().err
    assert f"{path}: damaged" in err and "--resume" in err and err.count("\n") == 1
    path.unlink()
    cli(['train', f"--resume={run}", '--max_iters=2'])
    assert path.read_bytes() == whole

# -----------------------------------------------------------------------------
# the command

WORK = dict(views=6, p_min=0.1, together=2, decode_rows=3, device='cpu')

def test_a_task_without_an_embedding_row_is_refused_by_name_with_the_way_out(tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['solve', '--run', tiny_run[0], '--data', 'arc2/evaluation'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    for words in ("120 of 120 tasks have no embedding row", "0934a4d8", "--adapt arc2/evaluation"):
        assert words in err

def test_a_query_before_which_no_demo_fits_is_named(toy, tmp_path, capsys, short_answers):
    run = str(tmp_path / 'run')
    cli(['train', f"--data={toy(side=3)}", '--shots=-1', '--block_size=70', f"--out_dir={run}", '--max_iters=1', *TINY])
    cli(['solve', '--run', run, '--data', toy('big', n=2, side=9), '--views=1', '--device=cpu'])
    assert "warning: no demo fits block_size=70 before 2 queries: toy0000 query 0" in capsys.readouterr().out

@pytest.mark.parametrize('args, want', [
    (['--views=0'], "views=0"), (['--decode_rows=0'], "decode_rows=0"), (['--device=cuda:9'], "device='cuda:9'"),
    (['--run=/no'], "no checkpoint here"), (['--p_min=0'], "p_min=0"),
    (['--ttt_steps=-1'], "ttt_steps=-1"), (['--max_pair=1'], "no task in"), (['--seed=-1'], "seed=-1"),
    ([f"--seed={2**70}"], f"seed={2**70}"), (['--minutes=nan'], "minutes=nan"), (['--minutes=inf'], "minutes=inf"),
    (['--p_min=nan'], "p_min=nan"), (['--ttt_lr=inf'], "ttt_lr=inf"), ([f"--views={2**17}"], "views=131072"),
    (['--base=x'], "base='x'"), (['--ttt_steps=3', '--ttt_lr=1e9'], "ttt_lr=1e+09: after test-time training on toy"),
])
def test_a_wrong_setting_is_one_line_and_exit_2(args, want, tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['solve', '--run', tiny_run[0], '--data', tiny_run[1], *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and want in err and err.count("\n") == 1

@pytest.mark.parametrize('x', [math.nan, math.inf, -1, 0, 2**70])
@pytest.mark.parametrize('name', [f.name for f in fields(SolveConfig) if f.type in (int, float, bool)])
def test_a_number_is_refused_by_name_or_the_solve_ends(tiny_run, tmp_path, monkeypatch, short_answers, name, x):
    run, src = tiny_run
    work = {**WORK, 'views': 1, 'run': run, 'data': src, 'out_dir': str(tmp_path), name: x}
    try:
        solve(SolveConfig(**work))
    except ValueError as e:
        assert str(e).startswith(f"{name}={x}: want ")
    else:
        assert x == 0 and (tmp_path / 'submission.json').exists()

def test_in_context_needs_no_row(toy, tmp_path, short_answers):
    run = tmp_path / 'run'
    cli(['train', f"--data={toy()}", '--shots=-1', '--mixer=MA', f"--out_dir={run}", '--max_iters=2', *TINY])
    other = toy('other', n=2, seed=5, side=9)
    cli(['solve', '--run', str(run), '--data', other, '--views=2', '--device=cpu'])
    assert json.loads((run / 'submission.json').read_text()).keys() == {'toy0000', 'toy0001'}

def test_runs_are_merged(tiny_run, tmp_path):
    run, src = tiny_run
    def solved(name, **how):
        return solve(SolveConfig(data=src, out_dir=str(tmp_path / name), views=4, device='cpu', **how))
    def votes(submission):
        lines = submission.with_name('candidates.jsonl').read_text().splitlines()
        return sum(json.loads(line)['votes'] for line in lines)
    one, two = solved('one', run=run, seed=1), solved('two', run=run, seed=2)
    paths = tuple(str(path.with_name('candidates.jsonl')) for path in (one, two))
    both = solved('both', merge=paths)
    mine = solved('mine', run=run, seed=2, merge=paths[:1]) # that of this run, and the other
    assert both.read_bytes() == mine.read_bytes()
    assert votes(one) + votes(two) == votes(both)
    with pytest.raises(ValueError, match="want the --run"):
        solve(SolveConfig(merge=paths, data=src))

def test_answers_to_other_tasks_are_not_overwritten(tiny_run, toy, tmp_path, short_answers):
    run, src = tiny_run
    work = dict(WORK, run=run, out_dir=str(tmp_path / 'out'), ttt_steps=1, ttt_tokens=200)
    path = solve(SolveConfig(**work, data=src))
    before = path.read_bytes()
    solve(SolveConfig(**{**work, 'seed': 2}, data=src)) # the same tasks again
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"has answers to tasks that are not asked now, .*: choose another --out_dir"):
        solve(SolveConfig(**work, data=toy('others', n=1, seed=9)))
    assert path.read_bytes() == before

def test_minutes_bound_the_views_and_every_query_gets_one(tiny_run, tmp_path):
    run, src = tiny_run
    solve(SolveConfig(run=run, data=src, out_dir=str(tmp_path), views=64, minutes=1e-9, together=1, device='cpu'))
    lines = [json.loads(line) for line in (tmp_path / 'candidates.jsonl').read_text().splitlines()]
    assert {(x['task'], x['query']) for x in lines} == {(f"toy000{k}", i) for k in range(4) for i in range(2)}
    for x in lines:
        assert set(x['views']) == {0}
        assert x['score'] is None or abs(x['score'] - x['log_prob']) < 1e-3 # nor is a candidate judged under others

def test_minutes_bound_the_judge_and_what_he_asked_goes_by_all_queries(tiny_run, tmp_path, monkeypatch, short_answers):
    now, asked = [0.0], []
    def slow(*args, answers, **how):
        now[0] += 25
        asked.append(len(answers))
        return score_answers(*args, answers=answers, **how)
    monkeypatch.setattr(solving, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(solving, 'score_answers', slow)
    solve(SolveConfig(run=tiny_run[0], data=tiny_run[1], out_dir=str(tmp_path), views=16, minutes=1, p_min=0.01,
                      decode_rows=64, device='cpu')) # the judge asks 8 views at a time
    scores = defaultdict(list)
    for line in (tmp_path / 'candidates.jsonl').read_text().splitlines():
        x = json.loads(line)
        scores[x['task'], x['query']].append(x['score'])
    assert len(asked) == 3 and len(scores) == 8 # at 0, 25 and 50 seconds
    assert all(len(x) == 1 or any(x) for x in scores.values())

def test_kaggles_files_are_solved_without_a_network(tiny_run, tmp_path):
    """ the challenges as they lie in a notebook, answers nowhere, and every socket is an error """
    run, src = tiny_run
    challenges = {}
    for path in sorted(Path(src).iterdir()):
        challenges[path.stem] = task = json.loads(path.read_text())
        without_answers(path.stem, task)
    path = tmp_path / 'arc-agi_test_challenges.json'
    path.write_text(json.dumps(challenges))
    code = ("import socket\n"
            "class Off(socket.socket):\n"
            "    def __init__(self, *a, **k): raise OSError('no network here')\n"
            "socket.socket = Off\n"
            "socket.create_connection = socket.getaddrinfo = Off\n"
            "from nanoarc.cli import main\n"
            "main()")
    args = ['solve', '--run', run, '--data', str(path), '--out_dir', str(tmp_path / 'working'), '--views=4',
            '--ttt_steps=2', '--minutes=1', '--device=cpu']
    subprocess.run([sys.executable, '-c', code, *args], check=True, capture_output=True)
    submission = json.loads((tmp_path / 'working' / 'submission.json').read_text())
    assert submission.keys() == challenges.keys()
    for name, entries in submission.items():
        assert len(entries) == len(challenges[name]['test'])
        assert all(x.keys() == {'attempt_1', 'attempt_2'} for x in entries)

# -----------------------------------------------------------------------------
# what is known is not lost (kills at any moment are in test_reliability.py)

def kept(out):
    """ what is in a file of a Keeper """
    return json.loads((Path(out) / 'solving-0.json').read_text())

def signal_at(monkeypatch, name, nth, number):
    """ a signal in the nth call of a function of solve.py -> calls so far, a list """
    calls, f = [], getattr(solving, name)
    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return f(*args, **kwargs)
    monkeypatch.setattr(solving, name, called)
    return calls

def is_submission(path, tasks):
    """ of all tasks, with two grids for each query? """
    submission = json.loads(Path(path).read_text())
    said = [read_attempts(submission[task.name], len(task.queries), "") for task in tasks]
    return submission.keys() == {task.name for task in tasks} and all(remarks == [] for _, remarks in said)

@pytest.mark.parametrize('name, nth, number, code', [
    ('decode', 5, signal.SIGTERM, 0), ('decode', 2, signal.SIGINT, 130), ('score_answers', 1, signal.SIGTERM, 0),
    ('score_answers', 4, signal.SIGINT, 130), ('fine_tune', 2, signal.SIGTERM, 0)])
def test_a_signal_writes_what_is_known_and_the_same_command_goes_on(tiny_run, tmp_path, monkeypatch, capsys,
                                                                     short_answers, name, nth, number, code):
    monkeypatch.setattr(Keeper, 'SHARE', 1e9) # after each batch
    run, src = tiny_run
    work = dict(WORK, run=run, data=src, ttt_steps=2 if name == 'fine_tune' else 0)
    with monkeypatch.context() as mp:
        whole = signal_at(mp, 'decode', 0, 0)
        solve(SolveConfig(**work, out_dir=str(tmp_path / 'whole')))
    with monkeypatch.context() as mp:
        signal_at(mp, name, nth, number)
        calls = signal_at(mp, 'decode', 0, 0) if name != 'decode' else None
        with pytest.raises(SystemExit) as e:
            solve(SolveConfig(**work, out_dir=str(tmp_path / 'out')))
    n = len(calls) if calls is not None else nth
    assert e.value.code == code and is_submission(tmp_path / 'out' / 'submission.json', read_tasks(src))
    assert f"stopped by signal {int(number)}, " in capsys.readouterr().out
    assert sum(len(candidates) for *_, candidates in kept(tmp_path / 'out')['queries']) > 0
    with monkeypatch.context() as mp:
        rest = signal_at(mp, 'decode', 0, 0)
        solve(SolveConfig(**work, out_dir=str(tmp_path / 'out')))
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')
    assert n + len(rest) == len(whole) # no view is decoded twice
    assert not [path for path in (tmp_path / 'out').iterdir() if 'solving-' in path.name or path.suffix == '.tmp']

def test_a_solve_that_is_stopped_at_its_beginning_leaves_an_earlier_submission_alone(tiny_run, tmp_path, monkeypatch,
                                                                                      short_answers):
    work = dict(WORK, run=tiny_run[0], data=tiny_run[1], out_dir=str(tmp_path))
    solve(SolveConfig(**work))
    before = files(tmp_path)
    signal_at(monkeypatch, 'load_run', 1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        solve(SolveConfig(**work, seed=5))
    assert files(tmp_path) == before

def test_a_solve_goes_on_with_the_same_settings_alone(tiny_run, tmp_path, monkeypatch, short_answers):
    run, src = tiny_run
    work = dict(WORK, run=run, data=src, out_dir=str(tmp_path))
    monkeypatch.setattr(Keeper, 'SHARE', 1e9)
    with monkeypatch.context() as mp, pytest.raises(SystemExit):
        signal_at(mp, 'decode', 5, signal.SIGTERM)
        solve(SolveConfig(**work))
    others = dict(views=7, p_min=0.2, score_most=3, ttt_steps=1, ttt_lr=0.1, ttt_tokens=9, together=3, max_pair=99,
                  seed=1, minutes=1.0, dtype='float16')
    for name, x in others.items():
        with pytest.raises(ValueError, match=rf"solving-0.json is of a solve .* {name} differs \(kept .*, now {x}"):
            solve(SolveConfig(**{**work, name: x}))
    other = change_tasks(src, lambda name, task: task['train'].reverse(), tmp_path / 'other')
    shutil.copytree(run, tmp_path / 'run')
    rewrite(tmp_path / 'run', lambda meta: meta.update(seconds=1)) # another checkpoint
    for how, name in (({'data': other}, 'corpus'), ({'run': str(tmp_path / 'run')}, 'checkpoint')):
        with pytest.raises(ValueError, match=f"{name} differs"):
            solve(SolveConfig(**{**work, **how}))
    rows = [[[0]], [[0, 0, False, 3, []]]] # a row that is too short, views that are no list
    broken = [json.dumps({**kept(tmp_path), "queries": x}) for x in rows]
    for text in ("", "[]", "[" * 100000, '{"settings": {}}', *broken):
        good = (tmp_path / 'solving-0.json').read_text()
        (tmp_path / 'solving-0.json').write_text(text)
        with pytest.raises(ValueError, match="solving-0.json: not what nanoarc solve keeps"):
            solve(SolveConfig(**work))
        (tmp_path / 'solving-0.json').write_text(good)
    solve(SolveConfig(**{**work, 'decode_rows': 5, 'allow_leak': True})) # goes on: these decide nothing
    solve(SolveConfig(**work, seed=1)) # it had ended, so this is another one

def test_minutes_are_those_of_all_starts(tiny_run, tmp_path, monkeypatch, short_answers):
    work = dict(WORK, run=tiny_run[0], data=tiny_run[1], out_dir=str(tmp_path), minutes=9, together=1)
    with monkeypatch.context() as mp, pytest.raises(SystemExit):
        signal_at(mp, 'score_answers', 2, signal.SIGTERM)
        solve(SolveConfig(**work))
    about = kept(tmp_path)
    assert 0 < about['seconds'] < 60
    (tmp_path / 'solving-0.json').write_text(json.dumps({**about, 'seconds': 9 * 60}))
    known = {(k, i) for k, i, _, seen, _ in about['queries'] if seen}
    solve(SolveConfig(**work))
    views = defaultdict(set)
    for line in (tmp_path / 'candidates.jsonl').read_text().splitlines():
        x = json.loads(line)
        views[int(x['task'][-1]), x['query']] |= set(x['views'])
    assert 0 < len(known) < 8 and len(views) == 8
    for query, seen in views.items():
        assert (len(seen) > 1) == (query in known)

def test_saving_takes_a_share_of_the_time_however_long_it_takes(tmp_path, monkeypatch):
    now = [0.0] # a clock that a write sets forward
    monkeypatch.setattr(sub.time, 'perf_counter', lambda: now[0])
    saves = []
    def write(path, data):
        saves.append(now[0])
        now[0] += 2.0
    monkeypatch.setattr(checkpoint, 'write_file', write)
    keeper = Keeper(tmp_path, [(0, 0)], {}, SimpleNamespace(got=0), 0, 1)
    while now[0] < 5000:
        now[0] += 1.0
        assert keeper.pause() is False
    assert 2 * len(saves) / now[0] < 0.01 and len(saves) > 10

@pytest.mark.parametrize('how', ['a file in the way', 'a file above it', 'a full disk', 'a directory in the way'])
def test_a_directory_that_cannot_be_written_is_refused_before_the_model_is_loaded(tiny_run, tmp_path, monkeypatch,
                                                                                   capsys, how):
    out = tmp_path / 'out'
    if how == 'a file in the way':
        out.write_text("mine")
    elif how == 'a file above it':
        (tmp_path / 'file').write_text("mine")
        out = tmp_path / 'file' / 'out'
    elif how == 'a directory in the way':
        (out / 'candidates.jsonl').mkdir(parents=True)
    else:
        def full(fd):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(os, 'fsync', full)
    monkeypatch.setattr(solving, 'load_run', None)
    with pytest.raises(SystemExit) as e:
        cli(['solve', '--run', tiny_run[0], '--data', tiny_run[1], '--out_dir', str(out)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and str(out) in err and "choose another --out_dir" in err

def test_two_solves_cannot_write_one_directory_and_training_is_not_in_the_way(tiny_run, tmp_path, short_answers):
    work = dict(WORK, run=tiny_run[0], data=tiny_run[1], out_dir=str(tmp_path), views=1)
    with checkpoint.lock(tmp_path, 'solving.lock'), pytest.raises(ValueError, match=f"process {os.getpid()} is"):
        solve(SolveConfig(**work))
    with checkpoint.lock(tmp_path):
        solve(SolveConfig(**work))

# -----------------------------------------------------------------------------
# test-time training

def test_test_time_training_learns_new_tasks_and_leaves_the_run_alone(toy, tmp_path):
    """ a model that never saw these tasks has no row for them: it is given one, and learns to say the one answer """
    run, src = str(tmp_path / 'run'), toy(name='new', n=3, seed=7, side=2)
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={run}", '--max_iters=30', *TINY])
    def one_output(name, task): # colors from 5 on are the outputs' alone, and keep their place
        for pair in task['train'] + task['test']:
            pair['input'] = [[x % 5 for x in row] for row in pair['input']]
            pair['output'] = [[int(name[-1]) + 5] * 2]
    change_tasks(src, one_output)
    before = checkpoint.file(run, 30).read_bytes()
    base = {'run': run, 'data': src, 'views': 1, 'device': 'cpu', 'out_dir': str(tmp_path / 'out')}
    with pytest.raises(ValueError, match="--ttt_steps gives them one"):
        solve(SolveConfig(**base))
    path = solve(SolveConfig(**base, ttt_steps=80, together=3, ttt_lr=5e-3))
    assert score(json.loads(path.read_text()), read_tasks(src))['solved'] == 3
    assert checkpoint.file(run, 30).read_bytes() == before

@pytest.mark.parametrize('shots', [-1, 0])
def test_test_time_training_runs_in_context_too_and_where_there_is_nothing_to_train_on(toy, tmp_path, short_answers,
                                                                                       shots):
    run = str(tmp_path / 'run')
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={run}", '--max_iters=2', f"--shots={shots}", *TINY])
    for name, demos in (('many', 3), ('one', 1)): # one demo: in context there is nothing before it
        src, out = toy(name=name, n=2, demos=demos, seed=3), str(tmp_path / f"out-{name}")
        path = solve(SolveConfig(run=run, data=src, views=2, ttt_steps=2, out_dir=out, device='cpu'))
        assert len(json.loads(path.read_text())) == 2
