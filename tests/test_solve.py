""" python -m pytest tests/test_solve.py """
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, toy_tasks

from nanoarc import checkpoint, solve
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig, Sampler, dihedral
from nanoarc.sources import Task, grid_bytes, read_source, read_tasks

def as_task(name, answers):
    """ a task whose answers are these grids """
    x = np.array([[1]], np.uint8)
    return Task(name, 'toy', [(x, x)], [(x, np.array(y, np.uint8)) for y in answers])

def test_the_score_equals_a_hand_count():
    a, b = [[1, 2], [3, 4]], [[5]]
    tasks = [as_task('first', [a]), as_task('second', [b]), as_task('shape', [a]), as_task('half', [a, b]), as_task('noattempt', [b]), as_task('leftout', [a]),
             as_task('short', [a, b]), as_task('junk', [a])]
    submission = {
        'first': [{'attempt_1': a, 'attempt_2': b}], # 1
        'second': [{'attempt_1': a, 'attempt_2': b}], # 1: either attempt counts
        'shape': [{'attempt_1': [[1, 2, 3, 4]], 'attempt_2': [[1, 2]]}], # 0
        'half': [{'attempt_1': a, 'attempt_2': a}, {'attempt_1': a, 'attempt_2': a}], # 1/2
        'noattempt': [{'attempt_2': b}], # 1: the one that is there is right
        'short': [{'attempt_1': a, 'attempt_2': a}], # 1/2: the second query has no entry
        'junk': "what?", # 0
        'stranger': [{'attempt_1': a}],
    }
    result = solve.score(submission, tasks)
    assert result['score'] == 50.0 and result['solved'] == 3 and result['tasks'] == 8 # (1 + 1 + 0 + 1/2 + 1 + 0 + 1/2 + 0) / 8
    assert (result['right'], result['outputs']) == (5, 10)
    assert solve.score({'x': [{'attempt_1': [[True]]}]}, [as_task('x', [[[1]]])])['score'] == 0 # true is not 1
    assert result['missing'] == ['leftout', 'junk'] and result['unknown'] == ['stranger']
    assert result['per_task'] == {'first': [1, 1], 'second': [1, 1], 'shape': [0, 1], 'half': [1, 2], 'noattempt': [1, 1], 'leftout': [0, 1], 'short': [1, 2], 'junk': [0, 1]}

@pytest.mark.parametrize('source, outputs', [('arc1/evaluation', 419), ('arc2/evaluation', 167), ('kaggle2025/evaluation', 172)])
def test_a_perfect_submission_scores_100(source, outputs, tmp_path, capsys):
    submission = {task.name: [{'attempt_1': [[0]], 'attempt_2': y.tolist()} for _, y in task.queries] for task in read_tasks(source)}
    path = tmp_path / 'submission.json'
    path.write_text(json.dumps(submission))
    cli(['score', str(path), source])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['score'] == 100 and result['right'] == result['outputs'] == outputs and result['solved'] == result['tasks']

def test_scoring_names_what_is_missing_and_refuses_unknown_answers(tmp_path, capsys):
    path, src = tmp_path / 'submission.json', tmp_path / 'src.json'
    tasks = toy_tasks(n=2)
    path.write_text(json.dumps({'toy0000': [], 'other': []}))
    src.write_text(json.dumps(tasks))
    cli(['score', str(path), str(src)])
    out = capsys.readouterr().out
    assert "1 tasks not in the submission, worth 0: toy0001" in out and "1 tasks not in the source, ignored: other" in out
    del tasks['toy0001']['test'][0]['output']
    src.write_text(json.dumps(tasks))
    with pytest.raises(SystemExit):
        cli(['score', str(path), str(src)])
    assert "task toy0001, query 0: no answer to score against" in capsys.readouterr().err

def test_votes_rank_and_ties_are_decided_by_log_probability_then_bytes():
    g = [np.full((1, k), k, np.uint8) for k in range(1, 5)]
    found = {grid_bytes(x): [(v, p, x) for v, p in views] for x, views in zip(g, [[(0, -3.0)], [(1, -1.0)], [(2, -9.0), (3, -9.0)], [(4, -1.0)]])}
    for order in (list(found), list(reversed(found))):
        ranked = solve.rank_candidates({key: found[key] for key in order})
        assert [grid.shape[1] for grid, *_ in ranked] == [3, 2, 4, 1]
        assert ranked[0][1:] == (2, -9.0, [2, 3])

def test_attempts_differ_and_every_query_has_an_entry_in_order(tmp_path):
    g = [np.full((1, 1), k, np.uint8) for k in range(4)]
    tasks = [as_task('a', [[[0]], [[0]]]), as_task('b', [[[0]]])]
    ranked = {(0, 1): [(g[1], 3, -1.0, [0]), (g[2], 2, -1.0, [1]), (g[3], 1, -1.0, [2])], (1, 0): [(g[3], 1, -1.0, [0])]}
    solve.write_results(tmp_path, tasks, ranked)
    submission = json.loads((tmp_path / 'submission.json').read_text())
    assert submission == {'a': [{'attempt_1': [[0]], 'attempt_2': [[0]]}, {'attempt_1': [[1]], 'attempt_2': [[2]]}], 'b': [{'attempt_1': [[3]], 'attempt_2': [[3]]}]}
    lines = [json.loads(line) for line in (tmp_path / 'candidates.jsonl').read_text().splitlines()]
    assert [(x['task'], x['query'], x['votes']) for x in lines] == [('a', 1, 3), ('a', 1, 2), ('a', 1, 1), ('b', 0, 1)]

@pytest.mark.parametrize('shots', [0, -1])
def test_views_differ_begin_with_the_query_itself_and_can_be_undone(shots):
    sampler = Sampler([(read_source('arc1/training', opened=False), 1)], DataConfig(shots=shots))
    for k, task in enumerate(read_tasks('arc1/training')[:8]):
        pair = int(sampler.tables.first[k] + sampler.tables.n_demos[k])
        docs, prompts = solve.make_views(sampler, pair, 16, seed=1)
        assert docs.dihedral[0] == 0 and (docs.cmap[0] == np.arange(10)).all() and 0 in prompts
        assert len({idx.tobytes() for idx, _ in prompts.values()}) >= len(prompts) - 8 and len(set(docs.dihedral.tolist())) == 8
        x = task.queries[0][0]
        for v in prompts:
            assert np.array_equal(solve.undo(dihedral(docs.cmap[v][x], docs.dihedral[v]), docs.dihedral[v], docs.cmap[v]), x)

def test_the_submission_is_the_same_bytes_when_the_answers_are_gone(tiny_run, tmp_path):
    run, src = tiny_run
    blind = tmp_path / 'blind'
    blind.mkdir()
    for path in Path(src).iterdir():
        obj = json.loads(path.read_text())
        for k, pair in enumerate(obj['test']):
            pair['output'] = "closed, who looks at it fails"
            if k > 0:
                del pair['output']
        (blind / path.name).write_text(json.dumps(obj))
    for name, source in (('a', src), ('b', str(blind)), ('c', src)):
        cli(['solve', '--run', run, '--data', source, '--out_dir', str(tmp_path / name), '--views=5', '--device=cpu', f"--decode_rows={3 if name == 'c' else 128}"])
    for file in ('submission.json', 'candidates.jsonl'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    assert (tmp_path / 'a' / 'submission.json').read_bytes() == (tmp_path / 'c' / 'submission.json').read_bytes() # nor does the batch size matter
    submission = json.loads((tmp_path / 'a' / 'submission.json').read_text())
    assert list(submission) == [f"toy{k:04d}" for k in range(4)] and all(len(x) == 2 and set(x[0]) == {'attempt_1', 'attempt_2'} for x in submission.values())

def test_a_task_without_an_embedding_row_is_refused_by_name_with_the_way_out(tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['solve', '--run', tiny_run[0], '--data', 'arc2/evaluation'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and "120 of 120 tasks have no embedding row" in err and "0934a4d8" in err and "--adapt arc2/evaluation" in err and err.count("\n") == 1

def test_a_model_that_has_learned_its_tasks_solves_them(toy, tmp_path, capsys):
    src = toy(n=3, side=3, seed=4) # transposes, asked for what they were trained on
    cli(['train', f"--data={src}", f"--out_dir={tmp_path / 'run'}", '--max_iters=300', '--val_tasks=0', *TINY])
    solve_it = ['solve', '--run', str(tmp_path / 'run'), '--data', src, '--views=8', '--device=cpu']
    with pytest.raises(SystemExit): # it has seen the answers
        cli(solve_it)
    err = capsys.readouterr().err
    assert "was trained on 3 of these queries, answers included: " in err and f"({src}) = toy0000 query 0 ({src})" in err and "--allow_leak" in err and err.count("\n") == 1
    cli([*solve_it, '--allow_leak'])
    capsys.readouterr()
    cli(['score', str(tmp_path / 'run' / 'submission.json'), src])
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])['score'] == 100 and json.loads(out[-1])['leaks'] == 3 and "TRAINED ON 3 OF THE ANSWERS" in out[-2]

def test_a_leak_that_training_was_allowed_is_in_its_checkpoint_and_in_the_score(toy, tmp_path, capsys):
    src, run = toy(n=2, side=9), tmp_path / 'run'
    train_it = ['train', f"--data={src}", f"--adapt={src}", f"--out_dir={run}", '--max_iters=1', '--val_tasks=0', *TINY]
    with pytest.raises(SystemExit):
        cli(train_it)
    assert "--drop_overlap" in capsys.readouterr().err
    cli([*train_it, '--allow_leak'])
    assert len(checkpoint.load(run)[1]['leaks']) == 2 and "leak allowed: toy0000" in capsys.readouterr().out
    cli(['solve', '--run', str(run), '--data', src, '--views=1', '--device=cpu'])
    cli(['score', str(run / 'submission.json'), src])
    assert "TRAINED ON 2 OF THE ANSWERS" in capsys.readouterr().out

def test_a_query_before_which_no_demo_fits_is_named(toy, tmp_path, capsys):
    cli(['train', f"--data={toy(side=3)}", '--shots=-1', '--block_size=70', f"--out_dir={tmp_path / 'run'}", '--max_iters=1', *TINY])
    cli(['solve', '--run', str(tmp_path / 'run'), '--data', toy('big', n=2, side=9), '--views=1', '--device=cpu'])
    assert "warning: no demo fits block_size=70 before 2 queries: toy0000 query 0" in capsys.readouterr().out

@pytest.mark.parametrize('args, want', [(['--views=0'], "views=0"), (['--decode_rows=0'], "decode_rows=0"), (['--device=cuda:9'], "device='cuda:9'"), (['--run=/no'], "no checkpoint here")])
def test_a_wrong_setting_is_one_line_and_exit_2(args, want, tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['solve', '--run', tiny_run[0], '--data', tiny_run[1], *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and want in err and err.count("\n") == 1

def test_in_context_needs_no_row(toy, tmp_path):
    cli(['train', f"--data={toy()}", '--shots=-1', '--mixer=MA', f"--out_dir={tmp_path / 'run'}", '--max_iters=2', *TINY])
    other = toy('other', n=2, seed=5, side=9)
    cli(['solve', '--run', str(tmp_path / 'run'), '--data', other, '--views=2', '--device=cpu'])
    assert set(json.loads((tmp_path / 'run' / 'submission.json').read_text())) == {'toy0000', 'toy0001'}

def test_a_run_knows_what_it_was_trained_on_though_the_asked_file_has_no_answers(toy, tmp_path, capsys):
    src, blind = toy(n=3, side=9), tmp_path / 'blind'
    cli(['train', f"--data={src}", '--shots=-1', f"--out_dir={tmp_path / 'run'}", '--max_iters=1', '--val_tasks=0', *TINY])
    blind.mkdir()
    for path in Path(src).iterdir():
        obj = json.loads(path.read_text())
        del obj['test'][0]['output']
        (blind / path.name).write_text(json.dumps(obj))
    with pytest.raises(SystemExit):
        cli(['solve', '--run', str(tmp_path / 'run'), '--data', str(blind), '--views=1', '--device=cpu'])
    assert "was trained on 3 of these queries" in capsys.readouterr().err
