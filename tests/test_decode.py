""" python -m pytest tests/test_decode.py: answers, and how probable they are. models are random, and in float64 """
import itertools
import math

import numpy as np
import pytest
import torch

from nanoarc import decode as decoding, grids
from nanoarc.decode import assign_rows, decode, score_answers
from nanoarc.grids import END, IN, OUT, PAD, ROW, VOCAB_SIZE, decode_grid, grid_bytes, may_follow, next_place
from nanoarc.model import Model, ModelConfig

def prompts(B, T, seed=0):
    """ random prompts that end in OUT, of a grid of one row -> idx (B, T), pos (B, T, 3), task (B,), dihedral (B,) """
    rng = np.random.default_rng(seed)
    idx = torch.empty(B, T, dtype=torch.int64)
    idx[:, 0], idx[:, T - 2], idx[:, T - 1] = IN, ROW, OUT
    idx[:, 1 : T - 2] = torch.from_numpy(rng.integers(0, 10, (B, T - 3)))
    pos = torch.zeros(B, T, 3, dtype=torch.uint8)
    pos[:, 1 : T - 2, 1] = torch.arange(1, T - 2)
    pos[:, T - 2, 0] = 1
    pos[:, T - 1, 2] = 1
    return idx, pos, torch.arange(B, dtype=torch.int32) % 3, torch.arange(B, dtype=torch.uint8) % 8

def sharp_model(mixer, seed=0, sure=60.0, **kwargs):
    """ random, but the more sure of what it says """
    torch.manual_seed(seed)
    model = Model(ModelConfig(mixer=mixer, n_layer=2, n_embd=32, head_size=16, n_task=3, **kwargs)).double().eval()
    model.head.weight.data *= sure
    return model

def small_world(monkeypatch):
    """ from now on grids are at most 2 x 2 in two colors -> all 26 of them """
    monkeypatch.setattr(grids, 'MAX_SIDE', 2)
    def two_colors(token, row, col, width):
        return may_follow(token, row, col, width) & ((token < 2) | (token >= ROW))
    monkeypatch.setattr(decoding, 'may_follow', two_colors)
    found = []
    for h, w in itertools.product((1, 2), repeat=2):
        for cells in itertools.product((0, 1), repeat=h * w):
            found.append(np.array(cells, np.uint8).reshape(h, w))
    return found

def same(found, others):
    """ are two lists of Answers the same ones, in any order, and as probable to rounding? """
    found, others = sorted(found), sorted(others)
    for a, b in itertools.zip_longest(found, others):
        if (a.prompt, a.tokens, a.greedy) != (b.prompt, b.tokens, b.greedy) or abs(a.log_prob - b.log_prob) > 1e-9:
            return False
    return True

def next_scores(model, idx, pos, width, task, dihedral):
    """ list of tokens and of their places -> (16,) log-probabilities of the next token: one forward, no cache """
    told = [torch.full((1, len(idx)), int(x), dtype=torch.int32) for x in (task, dihedral)]
    with torch.no_grad():
        logits, _ = model(torch.tensor([idx]), None, torch.tensor([pos]), None, *told)
    row, col, _ = pos[-1]
    legal = torch.tensor([may_follow(token, row, col, width) for token in range(VOCAB_SIZE)])
    return logits[0, -1].masked_fill(~legal, -math.inf).log_softmax(-1)

# -----------------------------------------------------------------------------

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
def test_the_search_finds_what_brute_force_finds(monkeypatch, mixer):
    world = small_world(monkeypatch)
    model = sharp_model(mixer)
    idx, pos, *told = prompts(3, 8)
    every = score_answers(model, idx, pos, [world] * 3, *told) # of all 26, each
    assert np.allclose(np.exp(every).sum(1), 1, atol=1e-12) # they are all that there is
    for p_min in (0.9, 0.3, 0.1, 0.01, 1e-300):
        want = {}
        for b, log_probs in enumerate(every):
            for grid, x in zip(world, log_probs):
                if x >= math.log(p_min):
                    want[b, grid_bytes(grid)] = x
        found = {}
        for x in decode(model, idx, pos, *told, p_min=p_min):
            assert x.tokens[-1] == END
            found[x.prompt, grid_bytes(decode_grid(x.tokens[:-1]))] = x
        assert want.keys() <= found.keys()
        assert all(abs(found[key].log_prob - x) < 1e-9 for key, x in want.items())
        assert all(x.greedy for key, x in found.items() if key not in want)
        assert sorted(x.prompt for x in found.values() if x.greedy) == [0, 1, 2]
    assert len(found) == 3 * 26
    greedy = [x for x in decode(model, idx, pos, *told, p_min=0.01) if x.greedy]
    assert same(decode(model, idx, pos, *told), greedy)

def test_a_search_may_end_with_a_branch_that_became_too_improbable(monkeypatch):
    world = small_world(monkeypatch)
    for seed in range(12):
        model = sharp_model('MA', seed, sure=20.0) # undecided: few answers are as probable as their beginnings
        idx, pos, *told = prompts(1, 8, seed)
        every = score_answers(model, idx, pos, [world], *told)[0]
        for p_min in (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05):
            n = sum(x >= math.log(p_min) for x in every)
            assert n <= len(decode(model, idx, pos, *told, p_min=p_min)) <= n + 1 # the greedy one may be one of them

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
@pytest.mark.parametrize('how', [{}, {'p_min': 0.02}])
def test_decoding_together_equals_one_by_one(mixer, how):
    model = sharp_model(mixer, window=5)
    args = prompts(6, 9)
    together = decode(model, *args, most=40, **how)
    alone = []
    for b in range(6):
        found = decode(model, *(x[b : b + 1] for x in args), most=40, **how)
        alone += [x._replace(prompt=b) for x in found]
    assert same(together, alone)
    if how:
        return
    for x in together: # and a token at a time, without any cache
        idx, pos, task, dihedral = (y[x.prompt].tolist() for y in args)
        tokens, log_prob, width = [], 0.0, 0
        while len(tokens) < 40 and END not in tokens:
            scores = next_scores(model, idx, pos, width, task, dihedral)
            token = int(scores.argmax())
            if token == ROW and width == 0:
                width = pos[-1][1]
            log_prob += float(scores[token])
            idx.append(token)
            pos.append(next_place(*pos[-1], token))
            tokens.append(token)
        assert tokens == x.tokens and abs(log_prob - x.log_prob) < 1e-9

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
@pytest.mark.parametrize('more', [{}, {'rope_bases': (100.0,)}])
@pytest.mark.slow
def test_filler_before_a_shorter_prompt_changes_nothing(mixer, more):
    model = sharp_model(mixer, window=5, **more)
    idx, pos, task, dihedral = prompts(6, 9)
    lengths = 9, 4, 7, 2, 9, 8
    doc = torch.ones(6, 9, dtype=torch.int32)
    for b, n in enumerate(lengths):
        doc[b, : 9 - n] = 0
    filled_idx, filled_pos = idx.masked_fill(doc == 0, PAD), pos.masked_fill(doc[..., None] == 0, 0)
    def short(b): # a prompt alone, as arguments of decode
        start = 9 - lengths[b]
        return idx[b : b + 1, start:], pos[b : b + 1, start:], task[b : b + 1], dihedral[b : b + 1]
    for how in ({}, {'p_min': 0.02}):
        alone = []
        for b in range(6):
            alone += [x._replace(prompt=b) for x in decode(model, *short(b), most=40, **how)]
        assert same(decode(model, filled_idx, filled_pos, task, dihedral, doc, most=40, **how), alone)
    answers = [[np.full((2, 3), b, np.uint8), np.eye(b % 3 + 1, dtype=np.uint8)] for b in range(6)]
    alone = []
    for b in range(6):
        idx_b, pos_b, *told = short(b)
        alone += score_answers(model, idx_b, pos_b, answers[b : b + 1], *told)
    together = score_answers(model, filled_idx, filled_pos, answers, task, dihedral, doc)
    assert np.allclose(together, alone, atol=1e-9)

@pytest.mark.parametrize('mixer', ['A', 'MA'])
def test_an_answer_scored_is_as_probable_as_an_answer_decoded(mixer, monkeypatch):
    small_world(monkeypatch)
    model = sharp_model(mixer)
    idx, pos, task, dihedral = prompts(4, 9)
    found = {} # of each prompt, the answers that have ended
    for x in decode(model, idx, pos, task, dihedral, p_min=0.05, most=60):
        if x.tokens[-1] == END:
            found.setdefault(x.prompt, []).append(x)
    keep = sorted(found)
    assert len(keep) > 1
    answers = [[decode_grid(x.tokens[:-1]) for x in found[b]] for b in keep]
    scores = score_answers(model, idx[keep], pos[keep], answers, task[keep], dihedral[keep])
    for b, log_probs in zip(keep, scores):
        assert np.allclose(log_probs, [x.log_prob for x in found[b]], atol=1e-9)

def test_answers_go_on_in_the_row_where_they_are_and_branches_where_one_has_ended():
    rng = np.random.default_rng(0)
    copies = 0
    for _ in range(300):
        n = int(rng.integers(1, 12))
        go_on = rng.choice([0, 1, 1, 1, 2, 3], n) # answers that go on from each row
        slot = torch.from_numpy(np.repeat(rng.permutation(n), go_on)) # rows are in any order
        to, source = assign_rows(slot, n)
        assert len(set(to.tolist())) == len(slot) and torch.equal(source[to], slot) # each finds what it is to know
        if len(source) == n:
            assert int((source != torch.arange(n)).sum()) == len(slot) - len(slot.unique()) # branches alone are copied
        else:
            copies += 1
            assert len(slot) > n or len(slot) < 0.75 * n
    assert 50 < copies < 250

@torch.no_grad()
def test_rows_of_a_cache_are_written_where_they_change():
    model, args = sharp_model('MA'), prompts(4, 9)
    def read():
        cache = model.cache()
        model(args[0], pos=args[1], task=args[2][:, None], dihedral=args[3][:, None], cache=cache)
        return cache, [layer.k if hasattr(layer, 'k') else layer.state for layer in cache.layers]
    for rows in ([0, 1, 2, 3], [0, 3, 2, 3], [3, 2, 1, 0], [1, 1], [0, 1, 1, 2, 3]):
        cache, before = read()
        cache.keep(torch.tensor(rows))
        after = [layer.k if hasattr(layer, 'k') else layer.state for layer in cache.layers]
        for x, y, z in zip(before, after, read()[1]):
            assert torch.equal(y, z[rows]) and (x is y) == (len(rows) == 4)

def test_what_does_not_end_is_cut_short():
    idx, pos, *told = prompts(2, 8)
    model = sharp_model('A')
    whole = decode(model, idx, pos, *told)
    assert all(x.tokens[-1] == END for x in whole)
    for most in (1, 3):
        for x in decode(model, idx, pos, *told, most=most):
            want = [y for y in whole if y.prompt == x.prompt][0]
            assert x.tokens == want.tokens[:most] and x.log_prob >= want.log_prob
