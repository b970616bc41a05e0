""" python -m pytest tests/test_grids.py: symmetries, tokens, places, grammar, and the kernels against them """
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_data import any_grid, documents, sampler_of, small_grid, written

from nanoarc import grids
from nanoarc.grids import END, MAX_GRID, MAX_PAIR, OUT, PAD, ROW, VOCAB_SIZE

symmetries = st.integers(0, 7)
color_maps = st.permutations(range(10)).map(lambda cmap: np.array(cmap, np.uint8))

# -----------------------------------------------------------------------------
# augments

@given(any_grid, symmetries)
def test_a_dihedral_and_its_inverse_are_the_identity(grid, d):
    assert np.array_equal(grids.undo_dihedral(grids.dihedral(grid, d), d), grid)
    assert grids.dihedral(grid, d).shape == (grid.shape[::-1] if d in (1, 3, 4, 6) else grid.shape)

def test_the_eight_dihedrals_are_eight():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert len({grids.grid_bytes(grids.dihedral(grid, d)) for d in range(8)}) == 8

@given(any_grid, symmetries, color_maps)
def test_an_augment_can_be_undone(grid, d, cmap):
    seen = grids.dihedral(cmap[grid], d)
    assert np.array_equal(grids.undo_augment(seen, d, cmap), grid)
    assert seen.shape == (grid.shape[::-1] if grids.is_turned(d) else grid.shape)

# -----------------------------------------------------------------------------
# tokens

def test_the_example_of_the_docstring_is_true():
    x, y = np.array([[1, 2], [3, 4]], np.uint8), np.array([[3], [5]], np.uint8)
    tokens, _ = grids.encode_pair(x, y)
    names = {10: "ROW", 11: "IN", 12: "OUT", 13: "END"}
    text = " ".join(names.get(token, str(token)) for token in tokens)
    assert text == "IN 1 2 ROW 3 4 ROW OUT 3 ROW 5 ROW END"
    assert text in " ".join(grids.__doc__.split()).replace("3 4 5", "") # the grids are drawn beside it

@given(any_grid)
def test_a_grid_survives_the_round_trip(grid):
    H, W = grid.shape
    tokens = grids.encode_grid(grid)
    assert len(tokens) == H * (W + 1) <= MAX_GRID
    back = grids.decode_grid(tokens)
    assert np.array_equal(back, grid) and back.dtype == np.uint8

NO_GRIDS = {
    'nothing': [],
    'an open row': [1],
    'an empty row': [ROW],
    'an empty last row': [1, ROW, ROW],
    'rows of two lengths': [1, 2, ROW, 3, ROW],
    'an open last row': [1, ROW, 2],
    'END inside': [1, END],
    'PAD inside': [PAD, ROW],
    'a row of 31': [0] * 31 + [ROW],
    '31 rows': [0, ROW] * 31,
}

@pytest.mark.parametrize('kind', NO_GRIDS)
def test_what_is_no_grid_is_refused(kind):
    with pytest.raises(ValueError):
        grids.decode_grid(NO_GRIDS[kind])

# -----------------------------------------------------------------------------
# places and grammar

def test_places_and_grammar_are_the_same_for_numbers_numpy_and_torch():
    rng = np.random.default_rng(0)
    row, col, z, token, width = (rng.integers(0, n, 500) for n in (31, 31, 200, VOCAB_SIZE, 31))
    places, legal = [], []
    for i in range(500):
        r, c, t = int(row[i]), int(col[i]), int(token[i])
        places.append(tuple(int(x) for x in grids.next_place(r, c, int(z[i]), t)))
        legal.append(bool(grids.may_follow(t, r, c, int(width[i]))))
    assert any(legal) and not all(legal)
    for kind in (np.asarray, torch.from_numpy):
        r, c, t = kind(row), kind(col), kind(token)
        got = grids.next_place(r, c, kind(z), t)
        assert list(zip(*(x.tolist() for x in got))) == places
        assert grids.may_follow(t, r, c, kind(width)).tolist() == legal

def legal_after(row, col, width):
    """ -> list of the tokens that may follow """
    return [token for token in range(VOCAB_SIZE) if grids.may_follow(token, row, col, width)]

def test_the_grammar_ends_at_thirty():
    assert legal_after(0, 30, 0) == [ROW]
    assert legal_after(30, 0, 5) == [END]
    assert legal_after(29, 0, 5) == [*range(10), END]
    assert legal_after(3, 5, 5) == [ROW]

@given(any_grid)
def test_the_grammar_lets_every_grid_pass(grid):
    row, col, z, width = 0, 0, 1, 0 # at OUT
    for token in grids.encode_grid(grid) + [END]:
        assert grids.may_follow(token, row, col, width)
        if token == ROW:
            width = col
        row, col, z = grids.next_place(row, col, z, token)

def test_what_the_grammar_lets_pass_is_a_grid():
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens, row, col, z, width = [], 0, 0, 1, 0
        while END not in tokens:
            token = int(rng.choice(legal_after(row, col, width)))
            if token == ROW:
                width = col
            row, col, z = grids.next_place(row, col, z, token)
            tokens.append(token)
        H, W = grids.decode_grid(tokens[:-1]).shape
        assert max(H, W) <= 30 and (row, col) == (H, 1)

# -----------------------------------------------------------------------------
# the kernels of data.py write what this file says

@settings(max_examples=60, deadline=None)
@given(any_grid, any_grid, symmetries, color_maps)
def test_the_kernels_write_what_the_definition_says(x, y, d, cmap):
    sampler = sampler_of((x, y))
    idx, _, pos = written(sampler, documents(sampler, 0, d, cmap))
    tokens, places = grids.encode_pair(grids.dihedral(cmap[x], d), grids.dihedral(cmap[y], d))
    assert idx.tolist() == tokens and list(map(tuple, pos.tolist())) == places
    assert len(tokens) <= MAX_PAIR

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(small_grid, small_grid), min_size=1, max_size=4), symmetries)
def test_the_kernels_write_a_context_as_the_definition_says(pairs, d):
    sampler = sampler_of(*pairs, shots=-1)
    idx, _, pos = written(sampler, documents(sampler, 0, d))
    tokens, places = [], []
    for k in range(len(pairs) - 1, -1, -1): # k pairs before the target, which comes last
        x, y = pairs[k]
        more, at = grids.encode_pair(grids.dihedral(x, d), grids.dihedral(y, d))
        tokens += more
        places += [(row, col, z + 2 * k) for row, col, z in at]
    assert idx.tolist() == tokens and list(map(tuple, pos.tolist())) == places
    follow = grids.next_place(*pos[:-1].astype(int).T, idx[1:])
    assert np.array_equal(np.stack(follow, 1), pos[1:]) # also from one pair to the next
    assert (idx == OUT).sum() == len(pairs)
