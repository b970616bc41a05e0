""" python -m pytest tests/test_solve.py """
import contextlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, toy_tasks

from nanoarc import checkpoint, data, solve
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig, Sampler, decode_grid, dihedral
from nanoarc.model import Model, ModelConfig
from nanoarc.solve import Candidate, rank_candidates
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

def candidate(grid, votes, logp, score=None):
    return Candidate(np.array(grid, np.uint8), votes, [(v, logp) for v in range(max(votes, 1))], score)

def test_votes_rank_and_ties_are_decided_by_log_probability_then_bytes():
    found = [candidate([[k] * k], votes, logp) for k, votes, logp in ((1, 1, -3.0), (2, 1, -1.0), (3, 2, -9.0), (4, 1, -1.0))]
    for part in (found, found[::-1]):
        ranked = rank_candidates([part])
        assert [c.grid.shape[1] for c, _ in ranked] == [3, 2, 4, 1]
        assert ranked[0][1] == 2 / 5 and sum(belief for _, belief in ranked) == pytest.approx(1)

def test_a_product_of_experts_hears_the_doubts_of_those_that_answer_otherwise():
    a, b, c = candidate([[1]], 3, -0.1, -5.0), candidate([[2]], 1, -0.2, -1.0), candidate([[3]], 0, -2.0) # 3 was not asked about
    assert [x.grid[0, 0] for x, _ in rank_candidates([[a, b, c]], 'votes')] == [1, 2, 3]
    assert [x.grid[0, 0] for x, _ in rank_candidates([[a, b, c]], 'product')] == [2, 1, 3]
    both = rank_candidates([[a, b, c]], 'both')
    p = 1 / (1 + np.exp(-4.0))
    assert [round(belief, 6) for _, belief in both] == [round((0.25 + p) / 2, 6), round((0.75 + 1 - p) / 2, 6), 0]
    assert [x.grid[0, 0] for x, _ in rank_candidates([[candidate([[1]], 3, -0.1)], [candidate([[2]], 1, -0.1)]], 'product')] == [1, 2] # nothing was asked about: votes

def test_the_second_attempt_is_the_more_probable_one_though_neither_is_believed():
    sure, likely, found = candidate([[1]], 9, -0.1, -0.1), candidate([[2]], 0, -2.0, -24.0), candidate([[3]], 0, -1.0, -38.0)
    for select in ('product', 'both'):
        assert [x.grid[0, 0] for x, _ in rank_candidates([[found, likely, sure]], select)] == [1, 2, 3]

def test_runs_that_agree_outvote_one_that_is_sure():
    parts = [[candidate([[1]], 5, -0.1), candidate([[2]], 4, -0.1)], [candidate([[3]], 6, -0.1), candidate([[2]], 4, -0.1)]]
    merged = rank_candidates(parts)
    assert [c.grid[0, 0] for c, _ in merged] == [2, 3, 1] and merged[0][0].votes == 8 and len(merged[0][0].found) == 8

def test_attempts_differ_and_every_query_has_an_entry_in_order(tmp_path):
    g = [candidate([[k]], 1, -1.0) for k in range(4)]
    tasks = [as_task('a', [[[0]], [[0]]]), as_task('b', [[[0]]])]
    ranked = {(0, 1): [(g[1], 0.5), (g[2], 0.3), (g[3], 0.2)], (1, 0): [(g[3], 1.0)]}
    solve.write_results(tmp_path, tasks, ranked)
    assert json.loads((tmp_path / 'submission.json').read_text()) == {
        'a': [{'attempt_1': [[0]], 'attempt_2': [[0]]}, {'attempt_1': [[1]], 'attempt_2': [[2]]}], 'b': [{'attempt_1': [[3]], 'attempt_2': [[3]]}]}
    again = solve.read_candidates(tmp_path / 'candidates.jsonl', tasks)
    assert {key: [c.grid[0, 0] for c in found] for key, found in again.items()} == {(0, 1): [1, 2, 3], (1, 0): [3]}

@pytest.mark.parametrize('line, want', [
    ("{", "line 1: not a candidate"), ('{"task": "a"}', "line 1: no field 'query'"), ('{"task": "a", "query": 2, "votes": 1, "log_prob": -1, "score": null, "views": []}', "task a has no query 2"),
    ('{"task": "a", "query": 0, "votes": "1", "log_prob": -1, "score": null, "views": []}', "want numbers"),
    ('{"task": "a", "query": 0, "votes": 1, "log_prob": -1, "score": null, "views": [], "grid": [[10]]}', "task a, query 0, grid"),
    ('{"task": "c", "query": 0, "votes": 1, "log_prob": -1, "score": null, "views": []}', "no candidate for any"), ("", "no candidate for any")])
def test_candidates_that_are_none_are_refused_by_line(tmp_path, line, want):
    path = tmp_path / 'candidates.jsonl'
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(want)):
        solve.read_candidates(path, [as_task('a', [[[0]], [[0]]])])

# -----------------------------------------------------------------------------
# decoding

def prompts(model, B, T, seed=0):
    """ random prompts that end in OUT: a grid of one row, IN cells ROW OUT """
    rng = np.random.default_rng(seed)
    idx = torch.from_numpy(np.concatenate([np.full((B, 1), 11), rng.integers(0, 10, (B, T - 3)), np.full((B, 1), 10), np.full((B, 1), 12)], 1))
    pos = torch.zeros(B, T, 3, dtype=torch.uint8)
    pos[:, 1 : T - 2, 1] = torch.arange(1, T - 2)
    pos[:, T - 2, 0] = 1
    pos[:, T - 1, 2] = 1
    return idx, pos, torch.arange(B, dtype=torch.int32) % 3, torch.arange(B, dtype=torch.uint8) % 8

def sharp_model(mixer, seed=0, **kwargs):
    """ random, but not undecided """
    torch.manual_seed(seed)
    model = Model(ModelConfig(mixer=mixer, n_layer=2, n_embd=32, head_size=16, n_task=3, **kwargs)).double().eval()
    model.head.weight.data *= 60
    return model

def small_world(monkeypatch):
    """ a toy vocabulary: grids of at most 2 x 2 in two colors, 26 of them """
    monkeypatch.setattr(data, 'MAX_SIDE', 2)
    full = data.grammar
    def grammar(pos, width):
        ok = full(pos, width)
        ok[:, 2:10] = False
        return ok
    monkeypatch.setattr(solve, 'grammar', grammar)
    return [np.array(cells, np.uint8).reshape(h, w) for h in (1, 2) for w in (1, 2) for cells in itertools.product((0, 1), repeat=h * w)]

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
def test_the_search_finds_what_brute_force_finds(monkeypatch, mixer):
    grids = small_world(monkeypatch)
    model = sharp_model(mixer)
    args = prompts(model, 3, 8)
    every = solve.score_answers(model, args[0], args[1], [grids] * 3, *args[2:]) # of all 26, each
    assert np.allclose([sum(np.exp(x)) for x in every], 1, atol=1e-12) # they are all that there is
    for p_min in (0.9, 0.3, 0.1, 0.01, 1e-300):
        want = {(b, grid_bytes(g)): x for b, logps in enumerate(every) for g, x in zip(grids, logps) if x >= np.log(p_min)}
        found = {(b, grid_bytes(decode_grid(tokens[:-1]))): (x, greedy) for b, tokens, x, greedy in solve.decode(model, *args, p_min=p_min)}
        assert want.keys() <= found.keys() and all(abs(found[key][0] - x) < 1e-9 for key, x in want.items())
        assert all(greedy for key, (_, greedy) in found.items() if key not in want) and sum(greedy for _, greedy in found.values()) == 3
    assert len(found) == 3 * 26
    plain = {(b, tuple(tokens)) for b, tokens, *_ in solve.decode(model, *args)}
    assert plain == {(b, tuple(tokens)) for b, tokens, _, greedy in solve.decode(model, *args, p_min=0.01) if greedy}

def test_a_search_may_end_with_a_branch_that_became_too_improbable(monkeypatch):
    grids = small_world(monkeypatch)
    for seed in range(12):
        model = sharp_model('MA', seed)
        model.head.weight.data /= 3 # undecided: few answers are as probable as their beginnings
        args = prompts(model, 1, 8, seed)
        every = solve.score_answers(model, args[0], args[1], [grids], *args[2:])[0]
        for p_min in (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05):
            n = sum(x >= np.log(p_min) for x in every)
            assert n <= len(solve.decode(model, *args, p_min=p_min)) <= n + 1 # the greedy one is among them or is not

def test_samples_come_as_often_as_they_are_probable_and_find_all(monkeypatch):
    grids = small_world(monkeypatch)
    model = sharp_model('MA')
    model.head.weight.data /= 10
    args = prompts(model, 1, 8)
    p = np.exp(solve.score_answers(model, args[0], args[1], [grids], *args[2:])[0])
    found = solve.decode(model, *args, samples=4000, seed=3)
    count = Counter(grid_bytes(decode_grid(tokens[:-1])) for _, tokens, *_ in found)
    assert len(found) == 4000 and not any(greedy for *_, greedy in found)
    for g, x in zip(grids, p):
        assert abs(count[grid_bytes(g)] - 4000 * x) < 5 * np.sqrt(4000 * x * (1 - x)) + 1
    assert found == solve.decode(model, *args, samples=4000, seed=3) != solve.decode(model, *args, samples=4000, seed=4)
    cold = {tuple(tokens) for _, tokens, *_ in solve.decode(model, *args, samples=50, temperature=1e-3)}
    assert cold == {tuple(solve.decode(model, *args)[0][1])} == {tuple(tokens) for _, tokens, *_ in solve.decode(model, *args, samples=50, top_p=1e-6)}

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
@pytest.mark.parametrize('how', [{}, {'p_min': 0.02}])
def test_decoding_together_equals_one_by_one(mixer, how):
    model = sharp_model(mixer, window=5)
    args = prompts(model, 6, 9)
    together = sorted(solve.decode(model, *args, most=40, **how))
    alone = sorted((b, *x[1:]) for b in range(6) for x in solve.decode(model, *(x[b : b + 1] for x in args), most=40, **how))
    assert [x[:2] + x[3:] for x in together] == [x[:2] + x[3:] for x in alone] and np.allclose([x[2] for x in together], [x[2] for x in alone], atol=1e-10)
    if not how: # and a token at a time without any cache
        for b, tokens, logp, _ in together:
            idx, pos, out, total = args[0][b : b + 1], args[1][b : b + 1].long(), [], 0.0
            width = torch.zeros(1, dtype=torch.int64)
            while len(out) < 40 and (not out or out[-1] != 13):
                T = idx.size(1)
                logits = model(idx, None, pos, None, args[2][b : b + 1, None].expand(1, T), args[3][b : b + 1, None].expand(1, T))[0][:, -1]
                scores = logits.masked_fill(~data.grammar(pos[:, -1], width), -torch.inf).log_softmax(-1)
                token = scores.argmax(-1)
                total += float(scores.max().detach())
                width = torch.where((token == 10) & (width == 0), pos[:, -1, 1], width)
                idx, pos = torch.cat([idx, token[:, None]], 1), torch.cat([pos, data.next_pos(pos[:, -1], token)[:, None]], 1)
                out.append(int(token))
            assert out == tokens and abs(total - logp) < 1e-9

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
@pytest.mark.parametrize('more', [{}, {'prefix': False}, {'rope_bases': (100.0,)}])
def test_filler_before_a_shorter_prompt_changes_nothing(mixer, more):
    model = sharp_model(mixer, window=5, **more)
    args, lengths = prompts(model, 6, 9), (9, 4, 7, 2, 9, 8)
    doc = torch.ones(6, 9, dtype=torch.int32)
    for b, n in enumerate(lengths):
        doc[b, : 9 - n] = 0
    filled = args[0].masked_fill(doc == 0, data.PAD), args[1].masked_fill(doc[..., None] == 0, 0), *args[2:], doc
    for how in ({}, {'p_min': 0.02}):
        together = sorted(solve.decode(model, *filled, most=40, **how))
        alone = sorted((b, *x[1:]) for b, n in enumerate(lengths) for x in solve.decode(model, *(x[b : b + 1, 9 - n :] for x in args[:2]), *(x[b : b + 1] for x in args[2:]), most=40, **how))
        assert [x[:2] + x[3:] for x in together] == [x[:2] + x[3:] for x in alone] and np.allclose([x[2] for x in together], [x[2] for x in alone], atol=1e-10)
    grids = [[np.full((2, 3), b, np.uint8), np.eye(b % 3 + 1, dtype=np.uint8)] for b in range(6)]
    alone = [solve.score_answers(model, *(x[b : b + 1, 9 - n :] for x in args[:2]), grids[b : b + 1], *(x[b : b + 1] for x in args[2:]))[0] for b, n in enumerate(lengths)]
    assert np.allclose(solve.score_answers(model, *filled[:2], grids, *filled[2:]), alone, atol=1e-9)

@pytest.mark.parametrize('mixer', ['A', 'MA'])
def test_an_answer_scored_is_as_probable_as_an_answer_decoded(mixer, monkeypatch):
    small_world(monkeypatch)
    model = sharp_model(mixer)
    args = prompts(model, 4, 9)
    found = [x for x in solve.decode(model, *args, p_min=0.05, most=60) if x[1][-1] == 13]
    grids = [[decode_grid(tokens[:-1]) for b, tokens, *_ in found if b == k] for k in range(4)]
    want = [[x for b, _, x, _ in found if b == k] for k in range(4)]
    keep = [k for k in range(4) if grids[k]]
    assert len(keep) > 1
    scores = solve.score_answers(model, *(x[keep] for x in args[:2]), [grids[k] for k in keep], *(x[keep] for x in args[2:]))
    assert all(np.allclose(a, want[k], atol=1e-9) for a, k in zip(scores, keep))

def test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation(tiny_run):
    model, data_cfg, rows, *_ = solve.load_model(tiny_run[0], torch.device('cpu'))
    sampler = Sampler([(read_source(tiny_run[1], opened=False), 1)], data_cfg, rows)
    pair = int(sampler.tables.first[1] + sampler.tables.n_demos[1])
    solver = solve.Solver(solve.SolveConfig(views=6, p_min=0.01, score_most=3), model, contextlib.nullcontext, sampler, {(1, 0): pair})
    solver.propose(solver.views)
    solver.judge()
    asked = [c for c in solver.found[1, 0].values() if c.score is not None]
    assert len(asked) == 3 < len(solver.found[1, 0]) and {x.dihedral for x in solver.views} != {0} and len({tuple(x.cmap) for x in solver.views}) > 3
    for c in asked:
        total = 0.0
        for x in solver.views: # the whole forward, a token after another, no cache
            grid = dihedral(x.cmap[c.grid], x.dihedral)
            answer = [t for row in grid.tolist() for t in (*row, 10)] + [13]
            idx, pos, width = x.idx.tolist(), [torch.tensor(x.pos[-1].astype(int))], 0
            for n, t in enumerate(answer):
                extra = [torch.full((1, len(idx)), value, dtype=torch.int32) for value in (x.row, x.dihedral)]
                places = torch.cat([torch.from_numpy(x.pos.astype(int)), *(p[None] for p in pos[1:])])[None]
                logits = model(torch.tensor([idx]), None, places, None, *extra)[0][0, -1]
                total += float(logits.masked_fill(~data.grammar(pos[-1][None], torch.tensor([width]))[0], -torch.inf).log_softmax(-1)[t].detach())
                width = int(pos[-1][1]) if t == 10 and width == 0 else width
                idx.append(t)
                pos.append(data.next_pos(pos[-1], torch.tensor(t)))
        assert abs(total / len(solver.views) - c.score) < 1e-3

def test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out(tiny_run, monkeypatch):
    model, data_cfg, rows, *_ = solve.load_model(tiny_run[0], torch.device('cpu'))
    sampler = Sampler([(read_source(tiny_run[1], opened=False), 1)], data_cfg, rows)
    queries = {(k, 0): int(sampler.tables.first[k] + sampler.tables.n_demos[k]) for k in range(3)}
    def solved(**how):
        solver = solve.Solver(solve.SolveConfig(**{'views': 6, 'p_min': 0.1, 'score_most': 2, **how}), model, contextlib.nullcontext, sampler, queries)
        solver.propose(solver.views)
        solver.judge()
        assert len({len(x.idx) for x in solver.views}) > 2
        return {(query, key): (c.votes, sorted(c.found), c.score) for query, found in solver.found.items() for key, c in found.items()}
    want, tried = solved(), []
    def same(found):
        return found.keys() == want.keys() and all(a[0] == b[0] and [x[0] for x in a[1]] == [x[0] for x in b[1]] and np.allclose([x[1] for x in a[1]], [x[1] for x in b[1]], atol=1e-3)
                                                   and (a[2] is b[2] is None or abs(a[2] - b[2]) < 1e-3) for a, b in zip(found.values(), (want[key] for key in found)))
    assert same(solved(decode_rows=2)) and same(solved(decode_rows=1)) # the latter without any filler
    monkeypatch.setattr(model, 'pads', False, raising=False)
    assert same(solved())
    monkeypatch.undo()
    for name in ('decode', 'score_answers'):
        def limited(model, idx, *args, f=getattr(solve, name), **kwargs):
            tried.append(len(idx))
            if len(idx) > 3:
                raise torch.OutOfMemoryError
            return f(model, idx, *args, **kwargs)
        monkeypatch.setattr(solve, name, limited)
    assert same(solved()) and max(tried) == 18 and 0 < tried.count(18) <= 2 and min(tried) >= 1
    monkeypatch.setattr(solve, 'decode', lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError): # of one view: there is nothing to halve
        solved()

# -----------------------------------------------------------------------------
# the whole

def files(out):
    return [(out / name).read_bytes() for name in ('submission.json', 'candidates.jsonl')]

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

@pytest.mark.parametrize('how', [{'select': 'product', 'p_min': 0.05}, {'select': 'both', 'samples': 3}, {'ttt_steps': 3, 'together': 1}, {'ttt_steps': 2, 'together': 2, 'select': 'both'}, {'minutes': 5.0, 'views': 20}])
def test_no_answer_is_looked_at_whatever_is_asked_for(tiny_run, tmp_path, how):
    run, src = tiny_run
    closed = tmp_path / 'closed'
    shutil.copytree(src, closed)
    for path in closed.iterdir():
        task = json.loads(path.read_text())
        for pair in task['test']:
            del pair['output']
        path.write_text(json.dumps(task))
    for out, data_src in (('a', src), ('b', str(closed))):
        solve.main(solve.SolveConfig(**{'run': run, 'data': data_src, 'out_dir': str(tmp_path / out), 'views': 8, 'device': 'cpu', **how}))
    assert files(tmp_path / 'a') == files(tmp_path / 'b')

def test_test_time_training_learns_new_tasks_and_leaves_the_run_alone(toy, tmp_path):
    """ a model that never saw these tasks has no row for them: it is given one, and learns to say their (single) answer """
    run, src = tmp_path / 'run', Path(toy(name='new', n=3, seed=7, side=2))
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={run}", '--max_iters=30', *TINY])
    for path in src.iterdir(): # every output of a task is one and the same
        task = json.loads(path.read_text())
        for pair in task['train'] + task['test']:
            pair['input'] = [[x % 5 for x in row] for row in pair['input']] # 5 and up are the outputs' alone, and keep their color
            pair['output'] = [[int(path.stem[-1]) + 5] * 2]
        path.write_text(json.dumps(task))
    before = checkpoint.file(run, 30).read_bytes()
    base = {'run': str(run), 'data': str(src), 'views': 1, 'device': 'cpu', 'out_dir': str(tmp_path / 'out')}
    with pytest.raises(ValueError, match="--ttt_steps gives them one"):
        solve.main(solve.SolveConfig(**base))
    path = solve.main(solve.SolveConfig(**base, ttt_steps=80, together=3, ttt_lr=5e-3))
    result = solve.score(json.loads(path.read_text()), read_tasks(str(src)))
    assert result['solved'] == 3 and checkpoint.file(run, 30).read_bytes() == before

@pytest.mark.parametrize('shots', [-1, 0])
def test_test_time_training_runs_in_context_too_and_where_there_is_nothing_to_train_on(toy, tmp_path, shots):
    run = tmp_path / 'run'
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={run}", '--max_iters=2', f"--shots={shots}", *TINY])
    for name, demos in (('many', 3), ('one', 1)): # one demo: in context there is nothing before it
        src = toy(name=name, n=2, demos=demos, seed=3)
        path = solve.main(solve.SolveConfig(run=str(run), data=src, views=2, ttt_steps=2, out_dir=str(tmp_path / name), device='cpu'))
        assert len(json.loads(path.read_text())) == 2

def test_runs_are_merged(tiny_run, tmp_path):
    run, src = tiny_run
    for n, seed in enumerate((1, 2)):
        solve.main(solve.SolveConfig(run=run, data=src, out_dir=str(tmp_path / f"{n}"), views=4, seed=seed, device='cpu'))
    paths = tuple(str(tmp_path / f"{n}" / 'candidates.jsonl') for n in range(2))
    out = solve.main(solve.SolveConfig(merge=paths, data=src, out_dir=str(tmp_path / 'both')))
    mine = solve.main(solve.SolveConfig(run=run, merge=paths[:1], data=src, out_dir=str(tmp_path / 'too'), views=4, seed=2, device='cpu'))
    assert out.read_bytes() == mine.read_bytes()
    total = [sum(json.loads(line)['votes'] for line in (Path(path).parent / 'candidates.jsonl').read_text().splitlines()) for path in (*paths, out)]
    assert total[0] + total[1] == total[2]
    with pytest.raises(ValueError, match="want the --run"):
        solve.main(solve.SolveConfig(merge=paths, data=src))

def test_minutes_bound_the_views_and_every_query_gets_one(tiny_run, tmp_path):
    run, src = tiny_run
    solve.main(solve.SolveConfig(run=run, data=src, out_dir=str(tmp_path), views=64, minutes=1e-9, together=1, device='cpu'))
    lines = [json.loads(line) for line in (tmp_path / 'candidates.jsonl').read_text().splitlines()]
    assert {(x['task'], x['query']) for x in lines} == {(f"toy000{k}", i) for k in range(4) for i in range(2)} and max(v for x in lines for v in x['views']) == 0
    assert all(x['score'] is None or abs(x['score'] - x['log_prob']) < 1e-3 for x in lines) # nor is a candidate judged under others

# -----------------------------------------------------------------------------
# scores, computed again by other means

def recomputed(submission, tasks):
    """ the official rule, written down without a look at solve.score """
    def same(a, b):
        return type(a) is type(b) and (a == b if not isinstance(a, list) else len(a) == len(b) and all(map(same, a, b)))
    per_task = {}
    for task in tasks:
        entries = submission[task.name] if task.name in submission and type(submission[task.name]) is list else []
        hits = 0
        for number, (_, answer) in enumerate(task.queries):
            try:
                entry = entries[number]
                hits += bool([key for key in ('attempt_1', 'attempt_2') if same(entry[key] if type(entry) is dict and key in entry else None, answer.tolist())])
            except IndexError:
                pass
        per_task[task.name] = hits / len(task.queries)
    return round(100 * sum(per_task.values()) / len(tasks), 2), sum(x == 1 for x in per_task.values())

def test_the_score_agrees_with_another_computation_on_200_crafted_submissions():
    tasks, rng = [task for task in read_tasks('arc2/evaluation')][:40], random.Random(0)
    spoil = [lambda g: None, lambda g: "grid", lambda g: [], lambda g: [[]], lambda g: g[0], lambda g: [[float(x) for x in row] for row in g], lambda g: [[str(x) for x in row] for row in g],
             lambda g: [[True if x == 1 else x for x in row] for row in g], lambda g: g[:-1], lambda g: [row + [0] for row in g], lambda g: [g], lambda g: {'0': g}, lambda g: [*g[:-1], g[-1][:-1]],
             lambda g: [[x + 10 for x in row] for row in g], lambda g: [[(x + 1) % 10 for x in row] for row in g], lambda g: list(zip(*g)) and [list(row) for row in zip(*g)], lambda g: 7]
    seen = set()
    for n in range(200):
        submission = {}
        for task in tasks:
            entries = []
            for x, y in task.queries:
                good, pair = y.tolist(), {}
                for key in ('attempt_1', 'attempt_2'):
                    pair[key] = good if rng.random() < 0.4 else rng.choice(spoil)(good)
                for key in list(pair):
                    if rng.random() < 0.1:
                        del pair[key]
                entries.append(rng.choice([pair, pair, pair, pair, pair, None, [pair], "x"]))
            entries = rng.choice([entries] * 6 + [entries[:-1], entries + [{}], entries[::-1], None, {'0': entries}, "x"])
            if rng.random() < 0.95:
                submission[task.name] = entries
        if rng.random() < 0.5:
            submission['00000000'] = []
        result = solve.score(submission, tasks)
        assert (result['score'], result['solved']) == recomputed(submission, tasks)
        seen.add(result['score'])
    assert len(seen) > 50

def test_the_score_names_what_is_short_or_out_of_order_and_writes_a_table(tmp_path, capsys):
    tasks = [task for task in read_tasks('arc2/evaluation') if len(task.queries) == 2 and not np.array_equal(task.queries[0][1], task.queries[1][1])][:3]
    answers = {task.name: [{'attempt_1': y.tolist(), 'attempt_2': y.tolist()} for _, y in task.queries] for task in read_tasks('arc2/evaluation')}
    a, b, c = (task.name for task in tasks)
    answers[a].reverse()
    answers[b].pop()
    del answers[c][1]['attempt_2']
    path = tmp_path / 'submission.json'
    path.write_text(json.dumps(answers))
    for name in ('out.csv', 'out.parquet'):
        cli(['score', str(path), 'arc2/evaluation', f"--out={tmp_path / name}"])
        out = capsys.readouterr().out
        assert f"1 tasks have the right answers of their queries in another order: {a}" in out and f"{b} has 1 entries, want 2" in out and f"{c}, query 1: no attempt_2" in out
    import polars as pl
    frame = pl.read_csv(tmp_path / 'out.csv')
    assert frame.equals(pl.read_parquet(tmp_path / 'out.parquet')) and len(frame) == 167 and int(frame['right'].sum()) == 164
    with pytest.raises(SystemExit):
        cli(['score', str(path), 'arc2/evaluation', '--out=x.txt'])

def test_compiled_blocks_solve_the_same(tiny_run, tmp_path, monkeypatch):
    torch._dynamo.reset()
    run, src = tiny_run
    plain, calls = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kwargs: (calls.append(kwargs), plain(self, backend='eager', fullgraph=True, **kwargs)))
    for name, compiled in (('a', False), ('b', True)):
        solve.main(solve.SolveConfig(run=run, data=src, out_dir=str(tmp_path / name), views=4, device='cpu', compile=compiled, p_min=0.05, select='product'))
    assert calls == [{'dynamic': True}] * 2 and files(tmp_path / 'a') == files(tmp_path / 'b')

def test_kaggles_files_are_solved_without_a_network(tiny_run, tmp_path):
    """ the challenges as they lie in a notebook, answers nowhere, and every socket is an error """
    run, src = tiny_run
    challenges = {task.name: {'train': [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos], 'test': [{'input': x.tolist()} for x, _ in task.queries]} for task in read_tasks(src)}
    path = tmp_path / 'arc-agi_test_challenges.json'
    path.write_text(json.dumps(challenges))
    code = "import socket\nclass Off(socket.socket):\n    def __init__(self, *a, **k): raise OSError('no network here')\nsocket.socket = Off\nsocket.create_connection = socket.getaddrinfo = Off\n" \
           "from nanoarc.cli import main\nmain()"
    args = ['solve', '--run', run, '--data', str(path), '--out_dir', str(tmp_path / 'working'), '--views=4', '--ttt_steps=2', '--minutes=1', '--device=cpu']
    subprocess.run([sys.executable, '-c', code, *args], check=True, capture_output=True)
    submission = json.loads((tmp_path / 'working' / 'submission.json').read_text())
    assert {name: len(x) for name, x in submission.items()} == {name: len(x['test']) for name, x in challenges.items()}
    assert all(set(x) == {'attempt_1', 'attempt_2'} for entries in submission.values() for x in entries)
