""" python -m pytest tests/test_grids.py: symmetries, tokens, places, grammar, and the kernels against them """
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from test_data import documents, sampler_of, written

from nanoarc import grids
from nanoarc.grids import END, OUT, PAD, ROW

sides = st.integers(1, 30)
any_grid = st.tuples(sides, sides).flatmap(lambda hw: arrays(np.uint8, hw, elements=st.integers(0, 9)))

@given(any_grid, st.integers(0, 7))
def test_a_dihedral_and_its_inverse_are_the_identity(grid, d):
    assert np.array_equal(grids.undo_dihedral(grids.dihedral(grid, d), d), grid)
    assert grids.dihedral(grid, d).shape == (grid.shape[::-1] if d in (1, 3, 4, 6) else grid.shape)

def test_the_eight_dihedrals_are_eight():
    grid = np.arange(6).reshape(2, 3)
    assert len({grids.dihedral(grid, d).tobytes() + bytes(grids.dihedral(grid, d).shape) for d in range(8)}) == 8

def test_the_grammar_ends_at_thirty():
    def legal(r, c, w):
        return [token for token in range(16) if grids.may_follow(token, r, c, w)]

    assert (
        legal(0, 30, 0) == [ROW]
        and legal(30, 0, 5) == [END]
        and legal(29, 0, 5) == [*range(10), END]
        and legal(3, 5, 5) == [ROW]
    )


@given(any_grid, st.integers(0, 7), st.permutations(range(10)))
def test_an_augment_can_be_undone(grid, d, cmap):
    cmap = np.array(cmap, np.uint8)
    turned = grids.dihedral(cmap[grid], d)
    assert np.array_equal(grids.undo_augment(turned, d, cmap), grid)
    assert turned.shape == (grid.shape[::-1] if grids.is_turned(d) else grid.shape)

@given(any_grid)
def test_a_grid_survives_the_round_trip(grid):
    tokens = grids.encode_grid(grid)
    assert len(tokens) == grid.shape[0] * (grid.shape[1] + 1) <= grids.MAX_GRID
    assert np.array_equal(grids.decode_grid(tokens), grid) and grids.decode_grid(tokens).dtype == np.uint8

@pytest.mark.parametrize(
    'tokens',
    [
        [],
        [1],
        [ROW],
        [1, ROW, ROW],
        [1, 2, ROW, 3, ROW],
        [1, ROW, 2],
        [1, END],
        [PAD, ROW],
        [0] * 31 + [ROW],
        [0, ROW] * 31,
    ],
)
def test_what_is_no_grid_is_refused(tokens):
    with pytest.raises(ValueError):
        grids.decode_grid(tokens)

@settings(max_examples=60, deadline=None)
@given(any_grid, any_grid)
def test_the_kernels_write_what_the_definition_says(x, y):
    sampler = sampler_of((x, y))
    idx, _, pos = written(sampler, documents(sampler, 0))
    tokens, places = grids.encode_pair(x, y)
    assert idx.tolist() == tokens and list(map(tuple, pos.tolist())) == places

def test_places_and_grammar_are_the_same_for_numbers_numpy_and_torch():
    rng = np.random.default_rng(0)
    row, col, z, token, width = (rng.integers(0, n, 500) for n in (31, 31, 200, 16, 31))
    place = [grids.next_place(*x) for x in zip(row.tolist(), col.tolist(), z.tolist(), token.tolist())]
    legal = [grids.may_follow(*x) for x in zip(token.tolist(), row.tolist(), col.tolist(), width.tolist())]
    for kind in (np.asarray, torch.from_numpy):
        row2, col2, z2, token2, width2 = map(kind, (row, col, z, token, width))
        got = np.stack([np.asarray(x) for x in grids.next_place(row2, col2, z2, token2)], 1)
        assert got.tolist() == [list(map(int, x)) for x in place]
        assert np.asarray(grids.may_follow(token2, row2, col2, width2)).tolist() == [bool(x) for x in legal]
    assert any(legal) and not all(legal) and OUT in token
