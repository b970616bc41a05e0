""" python -m pytest tests/test_submission.py """
import json
import math
import os
import random
import re

import numpy as np
import pytest
from conftest import toy_tasks

from nanoarc import submission as sub
from nanoarc.cli import main as cli
from nanoarc.grids import Task
from nanoarc.sources import read_tasks
from nanoarc.submission import Candidate, rank_candidates

def as_task(name, answers):
    """ a task whose answers are these grids """
    x = np.array([[1]], np.uint8)
    return Task(name, 'toy', [(x, x)], [(x, np.array(y, np.uint8)) for y in answers])

def test_the_score_equals_a_hand_count():
    a, b = [[1, 2], [3, 4]], [[5]]
    tasks = [as_task('first', [a]), as_task('second', [b]), as_task('shape', [a]), as_task('half', [a, b]),
             as_task('noattempt', [b]), as_task('leftout', [a]), as_task('short', [a, b]), as_task('junk', [a])]
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
    result = sub.score(submission, tasks)
    # (1 + 1 + 0 + 1/2 + 1 + 0 + 1/2 + 0) / 8
    assert result['score'] == 50.0 and result['solved'] == 3 and result['tasks'] == 8
    assert (result['right'], result['outputs']) == (5, 10)
    assert sub.score({'x': [{'attempt_1': [[True]]}]}, [as_task('x', [[[1]]])])['score'] == 0 # true is not 1
    assert result['missing'] == ['leftout'] and result['unknown'] == ['stranger']
    assert "junk: want a list of attempts by query, got 'what?' (str)" in result['misshapen']
    assert result['per_task'] == {'first': [1, 1], 'second': [1, 1], 'shape': [0, 1], 'half': [1, 2],
                                  'noattempt': [1, 1], 'leftout': [0, 1], 'short': [1, 2], 'junk': [0, 1]}

@pytest.mark.parametrize('source, outputs',
                         [('arc1/evaluation', 419), ('arc2/evaluation', 167), ('kaggle2025/evaluation', 172)])
def test_a_perfect_submission_scores_100(source, outputs, tmp_path, capsys):
    submission = {}
    for task in read_tasks(source):
        submission[task.name] = [{'attempt_1': [[0]], 'attempt_2': y.tolist()} for _, y in task.queries]
    path = tmp_path / 'submission.json'
    path.write_text(json.dumps(submission))
    cli(['score', str(path), source])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['score'] == 100
    assert result['right'] == result['outputs'] == outputs
    assert result['solved'] == result['tasks']

def test_scoring_names_what_is_missing_and_refuses_unknown_answers(tmp_path, capsys):
    path, src = tmp_path / 'submission.json', tmp_path / 'src.json'
    tasks = toy_tasks(n=2)
    path.write_text(json.dumps({'toy0000': [], 'other': []}))
    src.write_text(json.dumps(tasks))
    cli(['score', str(path), str(src)])
    out = capsys.readouterr().out
    assert "1 tasks not in the submission, worth 0: toy0001" in out
    assert "1 tasks not in the source, ignored: other" in out
    del tasks['toy0001']['test'][0]['output']
    src.write_text(json.dumps(tasks))
    with pytest.raises(SystemExit):
        cli(['score', str(path), str(src)])
    assert "task toy0001, query 0: no answer to score against" in capsys.readouterr().err

def mapped(grid, f):
    """ f of each cell """
    return [list(map(f, row)) for row in grid]

A, B, C = [[1]], [[2, 0]], [[3], [4]] # the answers of two tasks, one of two queries

def perfect(attempt):
    """ a submission of right answers, each as attempt(rows) """
    a, b, c = ({'attempt_1': attempt(rows), 'attempt_2': attempt([[0]])} for rows in (A, B, C))
    return {'two': [a, b], 'one': [c]}

def scored(submission, tmp_path, capsys):
    """ the command on a submission of A, B, C -> its score, what it printed """
    tasks = {}
    for name, answers in (('two', [A, B]), ('one', [C])):
        pairs = [{'input': [[1]], 'output': rows} for rows in answers]
        tasks[name] = {'train': [{'input': [[5]], 'output': [[6]]}], 'test': pairs}
    for name, obj in (('tasks', tasks), ('submission', submission)):
        (tmp_path / f"{name}.json").write_text(json.dumps(obj))
    cli(['score', str(tmp_path / 'submission.json'), str(tmp_path / 'tasks.json')])
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])['score'], out

@pytest.mark.parametrize('submission, score, words', [
    # arc-agi-benchmarking, with the floats that it writes
    (perfect(lambda rows: {'answer': rows, 'metadata': {'cost': 0.25}}), 100,
     ["6 things that Kaggle does not know: two, query 0, attempt_1: read from {'answer': [[1]], 'metadata'"]),
    (perfect(lambda rows: {'answer': None}), 0, ["one, query 0, attempt_2: want a grid", "got None (NoneType)"]),
    # Kaggle in 2020
    (perfect(lambda rows: "|" + "|".join("".join(map(str, row)) for row in rows) + "| "), 100,
     ["6 things", "one, query 0, attempt_1: read from '|3|4| '"]),
    (perfect(lambda rows: "|1| |2|"), 0, ["two, query 1, attempt_2: want a grid", "got '|1| |2|' (str)"]),
    (perfect(lambda rows: [rows]), 0, ["6 entries are not", "two, query 0, attempt_1, row 0, col 0: want an integer",
                                       "got [1] (list)"]),
    (perfect(lambda rows: json.dumps(rows)), 0, ["two, query 1, attempt_1: want a grid", "got '[[2, 0]]' (str)"]),
    (perfect(lambda rows: mapped(rows, float)), 0, ["want an integer color 0..9, got 3.0 (float)"]),
    ({name: entries[0] for name, entries in perfect(list).items()}, 0,
     ["2 entries", "two: want a list of attempts by query, got {'attempt_1': [[1]], 'attempt_2':", "one: want"]),
    ({'two': [A, B], 'one': [C]}, 0, ["two: want a list of attempts by query, got [[2, 0]] (list) at query 1"]),
    ({'two': [{'attempt_1': A}, {'attempt_1': B}], 'one': [{'attempt_1': C}]}, 100, ["two, query 1: no attempt_2"]),
    ({'two': [{'attempt_1': A, 'attempt_2': A, 'attempt_3': A}, {'attempt_1': A, 'attempt_2': A, 'attempt_3': B}]}, 25,
     ["two, query 1: 'attempt_3' is ignored", "1 tasks not in the submission, worth 0: one"]),
    ({'two': None, 'one': [None]}, 0, ["two: want a list of attempts by query, got None", "(NoneType) at query 0"]),
    ({'two': [{'Attempt_1': A, 'attempt2': A}, {}], 'one': [{}]}, 0,
     ["two, query 0: no attempt_1 and no attempt_2", "'Attempt_1' is ignored", "'attempt2' is ignored"])])
def test_a_perfect_submission_in_another_shape_is_read_or_named_with_what_was_found(submission, score, words, tmp_path,
                                                                                    capsys):
    got, out = scored(submission, tmp_path, capsys)
    assert got == score
    for text in words:
        assert text in out
    assert "not in the submission" not in out or 'one' not in submission

def test_the_rules_of_arc_prize_and_of_kaggle_are_both_told(tmp_path, capsys):
    wrong = {'attempt_1': [[0]], 'attempt_2': [[0]]}
    _, out = scored({**perfect(list), 'two': [wrong, wrong]}, tmp_path, capsys)
    assert ("50.00% by the official rule of ARC Prize (the mean over tasks), 33.33% by Kaggle's (over outputs), "
            "1 of 2 tasks with every output right, 1 of 3 outputs") in out
    result = json.loads(out.splitlines()[-1])
    assert (result['score'], result['kaggle'], result['right'], result['outputs']) == (50, 33.33, 1, 3)

@pytest.mark.parametrize('x', [math.nan, math.inf, -1, 2**70])
def test_a_wrong_max_pair_is_no_score(x):
    with pytest.raises(ValueError, match=f"max_pair={x}: want "):
        sub.score_file(sub.ScoreConfig('submission.json', 'tasks.json', max_pair=x))

@pytest.mark.parametrize('text', ["[]", '{"leaks": 3}', "{"])
def test_a_damaged_solve_json_is_no_score_without_leaks(tmp_path, capsys, text):
    (tmp_path / 'solve.json').write_text(text)
    with pytest.raises(SystemExit) as e:
        scored(perfect(list), tmp_path, capsys)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "solve.json: not" in err and err.count("\n") == 1

def candidate(grid, votes, logp, score=None):
    return Candidate(np.array(grid, np.uint8), votes, [(v, logp) for v in range(max(votes, 1))], score)

def colors(ranked):
    """ of candidates of one cell, the best first """
    return [int(c.grid[0, 0]) for c, _ in ranked]

def test_votes_rank_and_ties_are_decided_by_log_probability_then_bytes():
    found = [candidate([[1]], 1, -3.0), candidate([[2] * 2], 1, -1.0), candidate([[3] * 3], 2, -9.0),
             candidate([[4] * 4], 1, -1.0)]
    for part in (found, found[::-1]):
        ranked = rank_candidates([part])
        assert [c.grid.shape[1] for c, _ in ranked] == [3, 2, 4, 1]
        assert ranked[0][1] == 2 / 5
        assert sum(belief for _, belief in ranked) == pytest.approx(1)

def test_a_product_of_experts_hears_the_doubts_of_those_that_answer_otherwise():
    a, b = candidate([[1]], 3, -0.1, -5.0), candidate([[2]], 1, -0.2, -1.0)
    c = candidate([[3]], 0, -2.0) # was not asked about
    ranked = rank_candidates([[a, b, c]])
    assert colors(ranked) == [2, 1, 3]
    p = 1 / (1 + np.exp(-4.0))
    assert [round(belief, 6) for _, belief in ranked] == [round(p, 6), round(1 - p, 6), 0]
    parts = [[candidate([[1]], 3, -0.1)], [candidate([[2]], 1, -0.1)]] # nothing was asked about: votes
    assert colors(rank_candidates(parts)) == [1, 2]

def test_the_second_attempt_is_the_more_probable_one_though_neither_is_believed():
    sure = candidate([[1]], 9, -0.1, -0.1)
    likely = candidate([[2]], 0, -2.0, -24.0)
    found = candidate([[3]], 0, -1.0, -38.0)
    assert colors(rank_candidates([[found, likely, sure]])) == [1, 2, 3]

def test_runs_that_agree_outvote_one_that_is_sure():
    parts = [[candidate([[1]], 5, -0.1), candidate([[2]], 4, -0.1)],
             [candidate([[3]], 6, -0.1), candidate([[2]], 4, -0.1)]]
    merged = rank_candidates(parts)
    assert colors(merged) == [2, 3, 1]
    assert merged[0][0].votes == 8 and len(merged[0][0].found) == 8

def test_attempts_differ_and_every_query_has_an_entry_in_order(tmp_path):
    g = [candidate([[k]], 1, -1.0) for k in range(4)]
    tasks = [as_task('a', [[[0]], [[0]]]), as_task('b', [[[0]]])]
    ranked = {(0, 1): [(g[1], 0.5), (g[2], 0.3), (g[3], 0.2)], (1, 0): [(g[3], 1.0)]}
    sub.write_results(tmp_path, tasks, ranked)
    assert json.loads((tmp_path / 'submission.json').read_text()) == {
        'a': [{'attempt_1': [[0]], 'attempt_2': [[0]]}, {'attempt_1': [[1]], 'attempt_2': [[2]]}],
        'b': [{'attempt_1': [[3]], 'attempt_2': [[3]]}],
    }
    again = sub.read_candidates(tmp_path / 'candidates.jsonl', tasks)
    assert again.keys() == {(0, 1), (1, 0)}
    assert [c.grid[0, 0] for c in again[0, 1]] == [1, 2, 3]
    assert [c.grid[0, 0] for c in again[1, 0]] == [3]

def test_candidates_of_another_task_with_that_name_are_refused(tmp_path):
    one = Task('a', 'toy', [], [(np.array([[1, 2]], np.uint8), None)])
    other = Task('a', 'toy', [], [(np.array([[1], [2]], np.uint8), None)])
    sub.write_results(tmp_path, [one], {(0, 0): [(candidate([[1]], 1, -1.0), 1.0)]})
    path = tmp_path / 'candidates.jsonl'
    assert sub.read_candidates(path, [one])
    with pytest.raises(ValueError, match="line 1: task a, query 0: of another task with that name"):
        sub.read_candidates(path, [other])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: x for k, x in line.items() if k != 'input'}) + "\n" for line in lines))
    assert sub.read_candidates(path, [other]) # of an older version: nobody knows

def test_the_score_says_what_was_never_answered_and_that_the_solve_goes_on(tmp_path, capsys):
    answers = {}
    for task in read_tasks('arc2/evaluation'):
        answers[task.name] = [{'attempt_1': [[0]], 'attempt_2': [[0]]} for _ in task.queries]
    path = tmp_path / 'submission.json'
    path.write_text(json.dumps(answers))
    cli(['score', str(path), 'arc2/evaluation'])
    out = capsys.readouterr().out
    assert "167 queries have [[0]] twice, which solve writes where it has no answer: 0934a4d8 0; " in out
    assert "has not ended" not in out
    (tmp_path / 'solving-0.json').touch()
    cli(['score', str(path), 'arc2/evaluation'])
    assert "the solve that writes it has not ended" in capsys.readouterr().out

LINE = '{"task": "a", "query": 0, "votes": 1, "log_prob": -1, "score": null, "views": []}'

@pytest.mark.parametrize('line, want', [
    ("{", "line 1: not a candidate"),
    ('{"task": "a"}', "line 1: no field 'query'"),
    (LINE.replace('"query": 0', '"query": 2'), "task a has no query 2"),
    (LINE.replace('"votes": 1', '"votes": "1"'), "want numbers"),
    (LINE.replace('-1', 'NaN'), "want numbers"),
    (LINE.replace('"votes": 1', f'"votes": {10**400}'), "want numbers"),
    (LINE.replace('[]', '[[0]]'), "want numbers"),
    (LINE.replace('"a"', '["a"]'), "line 1: not a candidate"),
    (LINE.replace('0', 'true'), "task a has no query True"),
    ("[" * 100000, "line 1: not a candidate"),
    (LINE.replace('}', ', "grid": [[10]]}'), "task a, query 0, grid"),
    (LINE.replace('"a"', '"c"'), "no candidate for any"),
    ("", "no candidate for any"),
])
def test_candidates_that_are_none_are_refused_by_line(tmp_path, line, want):
    path = tmp_path / 'candidates.jsonl'
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(want)):
        sub.read_candidates(path, [as_task('a', [[[0]], [[0]]])])

def is_same(a, b):
    """ json values, true is not 1 """
    if type(a) is not type(b):
        return False
    if type(a) is not list:
        return a == b
    return len(a) == len(b) and all(map(is_same, a, b))

def recomputed(submission, tasks):
    """ ARC Prize's rule, written down without a look at sub.score -> (score, solved) """
    shares = []
    for task in tasks:
        entries = submission.get(task.name)
        hits = 0
        for number, (_, answer) in enumerate(task.queries):
            try:
                entry = entries[number]
                tried = [entry[key] for key in ('attempt_1', 'attempt_2') if key in entry]
            except (IndexError, KeyError, TypeError): # nothing is there, or something that is no entry
                continue
            if type(entries) is list and any(is_same(rows, answer.tolist()) for rows in tried):
                hits += 1
        shares.append(hits / len(task.queries))
    return round(100 * sum(shares) / len(tasks), 2), shares.count(1)

SPOILED = [ # what becomes of a right answer
    lambda g: None,
    lambda g: "grid",
    lambda g: [],
    lambda g: [[]],
    lambda g: g[0],
    lambda g: mapped(g, float),
    lambda g: mapped(g, str),
    lambda g: mapped(g, lambda x: True if x == 1 else x),
    lambda g: g[:-1],
    lambda g: [row + [0] for row in g],
    lambda g: [g],
    lambda g: {'0': g},
    lambda g: [*g[:-1], g[-1][:-1]],
    lambda g: mapped(g, lambda x: x + 10),
    lambda g: mapped(g, lambda x: (x + 1) % 10),
    lambda g: list(map(list, zip(*g))),
    lambda g: 7,
]

def crafted(tasks, rng):
    """ a submission, right in part and broken in part """
    submission = {}
    for task in tasks:
        entries = []
        for _, y in task.queries:
            good, pair = y.tolist(), {}
            for key in ('attempt_1', 'attempt_2'):
                pair[key] = good if rng.random() < 0.4 else rng.choice(SPOILED)(good)
            for key in list(pair):
                if rng.random() < 0.1:
                    del pair[key]
            entries.append(rng.choice([pair] * 5 + [None, [pair], "x"]))
        broken = [entries[:-1], entries + [{}], entries[::-1], None, {'0': entries}, "x"]
        entries = rng.choice([entries] * 6 + broken)
        if rng.random() < 0.95:
            submission[task.name] = entries
    if rng.random() < 0.5:
        submission['00000000'] = []
    return submission

def test_the_score_agrees_with_another_computation_on_200_crafted_submissions():
    tasks, rng = read_tasks('arc2/evaluation')[:40], random.Random(0)
    seen = set()
    for _ in range(200):
        submission = crafted(tasks, rng)
        result = sub.score(submission, tasks)
        assert (result['score'], result['solved']) == recomputed(submission, tasks)
        seen.add(result['score'])
    assert len(seen) > 50

def test_the_score_names_what_is_short_or_out_of_order_and_writes_a_table(tmp_path, capsys):
    answers, two = {}, []
    for task in read_tasks('arc2/evaluation'):
        grids = [y.tolist() for _, y in task.queries]
        answers[task.name] = [{'attempt_1': grid, 'attempt_2': grid} for grid in grids]
        if len(grids) == 2 and grids[0] != grids[1]:
            two.append(task.name)
    a, b, c, d = two[:4]
    answers[a].reverse()
    answers[b].pop()
    del answers[c][1]['attempt_2']
    answers[d][0] = {'attempt_1': [[0]], 'attempt_2': [[0]]} # wrong, but in order
    path = tmp_path / 'submission.json'
    path.write_text(json.dumps(answers))
    for name in ('out.csv', 'out.parquet'):
        cli(['score', str(path), 'arc2/evaluation', f"--out={tmp_path / name}"])
        out = capsys.readouterr().out
        assert f"1 tasks have the right answers of their queries in another order: {a}" in out
        assert f"{b} has 1 entries, want 2" in out
        assert f"{c}, query 1: no attempt_2" in out
    import polars as pl
    frame = pl.read_csv(tmp_path / 'out.csv')
    assert frame.equals(pl.read_parquet(tmp_path / 'out.parquet'))
    assert len(frame) == 167 and int(frame['right'].sum()) == 167 - 2 - 1 - 1
    marked = {row['task']: row['fault'] for row in frame.iter_rows(named=True) if row['fault']}
    assert marked.keys() == {'53fb4810', '7ed72f31', '88e364bc', 'a6f40cea'} and "#57" in marked['7ed72f31']
    with pytest.raises(SystemExit):
        cli(['score', str(path), 'arc2/evaluation', '--out=x.txt'])

def test_a_key_of_a_submission_cannot_write_to_the_terminal(tmp_path, capsys):
    path, src = tmp_path / 'submission.json', tmp_path / 'src.json'
    path.write_text(json.dumps({"p\n\x1b[31mq": 1, "\u2028": 5, "x" * 999: 1}))
    src.write_text(json.dumps(toy_tasks(n=1)))
    cli(['score', str(path), str(src)])
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and f"ignored: p\\n\\x1b[31mq; \\u2028; {'x' * 40}\n" in out

@pytest.mark.parametrize('kind', ['directory', 'pipe', 'nothing'])
def test_what_is_no_file_is_no_submission_and_one_is_asked_for(kind, tmp_path):
    path = tmp_path / 'x'
    if kind == 'directory':
        path.mkdir()
    elif kind == 'pipe':
        os.mkfifo(path)
    want = "no such file" if kind == 'nothing' else "pipe, want the file submission.json"
    with pytest.raises(ValueError, match=want):
        sub.read_submission(path)

@pytest.mark.parametrize('name', ['o.csv', 'o.parquet'])
def test_a_table_that_does_not_fit_costs_no_score_and_is_named(name, tmp_path, capsys, monkeypatch):
    path, src, out = tmp_path / 'submission.json', tmp_path / 'src.json', tmp_path / 'new' / name
    path.write_text("{}")
    src.write_text(json.dumps(toy_tasks(n=1)))
    cli(['score', str(path), str(src), f"--out={out}"])
    before = out.read_bytes()
    capsys.readouterr()
    def full_disk(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(SystemExit) as e:
        cli(['score', str(path), str(src), f"--out={out}"])
    said = capsys.readouterr()
    assert e.value.code == 2 and f"No space left on device: '{out}'" in said.err
    assert json.loads(said.out.splitlines()[-1])['score'] == 0 and out.read_bytes() == before
