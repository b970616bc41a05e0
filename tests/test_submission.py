""" python -m pytest tests/test_submission.py """
import json
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
    assert result['missing'] == ['leftout', 'junk'] and result['unknown'] == ['stranger']
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

def candidate(grid, votes, logp, score=None):
    return Candidate(np.array(grid, np.uint8), votes, [(v, logp) for v in range(max(votes, 1))], score)

def colors(ranked):
    """ of candidates of one cell, the best first """
    return [int(c.grid[0, 0]) for c, _ in ranked]

def test_votes_rank_and_ties_are_decided_by_log_probability_then_bytes():
    found = [candidate([[1]], 1, -3.0), candidate([[2] * 2], 1, -1.0), candidate([[3] * 3], 2, -9.0),
             candidate([[4] * 4], 1, -1.0)]
    for part in (found, found[::-1]):
        ranked = rank_candidates([part], 'votes')
        assert [c.grid.shape[1] for c, _ in ranked] == [3, 2, 4, 1]
        assert ranked[0][1] == 2 / 5
        assert sum(belief for _, belief in ranked) == pytest.approx(1)

def test_a_product_of_experts_hears_the_doubts_of_those_that_answer_otherwise():
    a, b = candidate([[1]], 3, -0.1, -5.0), candidate([[2]], 1, -0.2, -1.0)
    c = candidate([[3]], 0, -2.0) # was not asked about
    assert colors(rank_candidates([[a, b, c]], 'votes')) == [1, 2, 3]
    ranked = rank_candidates([[a, b, c]], 'product')
    assert colors(ranked) == [2, 1, 3]
    p = 1 / (1 + np.exp(-4.0))
    assert [round(belief, 6) for _, belief in ranked] == [round(p, 6), round(1 - p, 6), 0]
    parts = [[candidate([[1]], 3, -0.1)], [candidate([[2]], 1, -0.1)]] # nothing was asked about: votes
    assert colors(rank_candidates(parts, 'product')) == [1, 2]

def test_the_second_attempt_is_the_more_probable_one_though_neither_is_believed():
    sure = candidate([[1]], 9, -0.1, -0.1)
    likely = candidate([[2]], 0, -2.0, -24.0)
    found = candidate([[3]], 0, -1.0, -38.0)
    assert colors(rank_candidates([[found, likely, sure]], 'product')) == [1, 2, 3]

def test_runs_that_agree_outvote_one_that_is_sure():
    parts = [[candidate([[1]], 5, -0.1), candidate([[2]], 4, -0.1)],
             [candidate([[3]], 6, -0.1), candidate([[2]], 4, -0.1)]]
    merged = rank_candidates(parts, 'votes')
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

LINE = '{"task": "a", "query": 0, "votes": 1, "log_prob": -1, "score": null, "views": []}'

@pytest.mark.parametrize('line, want', [
    ("{", "line 1: not a candidate"),
    ('{"task": "a"}', "line 1: no field 'query'"),
    (LINE.replace('"query": 0', '"query": 2'), "task a has no query 2"),
    (LINE.replace('"votes": 1', '"votes": "1"'), "want numbers"),
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
    """ the official rule, written down without a look at sub.score -> (score, solved) """
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

def mapped(grid, f):
    """ f of each cell """
    return [list(map(f, row)) for row in grid]

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
    with pytest.raises(SystemExit):
        cli(['score', str(path), 'arc2/evaluation', '--out=x.txt'])
