"""
python -m pytest tests/test_corpus.py: what a corpus is called, packed, selected and closed corpora, and leaked pairs
"""
import hashlib
import io
import json
import random
import resource
from dataclasses import replace

import numpy as np
import pytest
from conftest import toy_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_loader import canonical
from test_sources import GRID, all_tasks, answers_of, as_kaggle, make_list, plain, refusal, task

from nanoarc.cli import main as cli
from nanoarc.corpus import Corpus, overlaps, pair_hash, queries_of
from nanoarc.grids import Task, dihedral
from nanoarc.sources import read_source, read_sources, read_tasks

# -----------------------------------------------------------------------------
# a changed pixel changes the sha256 of the corpus

# sha256 before there were extra pairs. a corpus that has none is called so still
GOLDEN = {'arc1/training': '422c3a314d0937e3', 'arc1/evaluation': '4965c87cb791416c',
          'arc2/training': '7792a755446af6f2', 'arc2/evaluation': 'c249b6d911560974',
          'kaggle2025': '78a21fc816b4ceea'}

@pytest.mark.parametrize('source', GOLDEN)
def test_a_corpus_is_called_what_it_always_was(source):
    c = read_source(source)
    assert c.sha256.startswith(GOLDEN[source])
    assert replace_n_own(c, c.n_demos - 1).sha256 != c.sha256 != replace_n_own(c, 0 * c.n_own).sha256

def replace_n_own(c, n_own):
    return Corpus(c.source, {**{name: getattr(c, name) for name in c.ARRAYS}, 'n_own': n_own})

@pytest.mark.reliability
def test_one_changed_digit_in_any_of_500_tasks_changes_the_corpus():
    tasks, rng = read_tasks('arc2/training')[:500], random.Random(0)
    whole, names = Corpus.of(tasks), set()
    arrays = {name: getattr(whole, name) for name in Corpus.ARRAYS}
    for k, t in enumerate(tasks):
        alone = Corpus.of([t]).sha256
        pair, side = rng.randrange(len(t.demos) + len(t.queries)), rng.randrange(2)
        grid = (t.demos + t.queries)[pair][side]
        r, c = rng.randrange(grid.shape[0]), rng.randrange(grid.shape[1])
        old = int(grid[r, c])
        new = (old + rng.randint(1, 9)) % 10
        cells = whole.cells.copy()
        g = 2 * (whole.first[k] + pair) + side
        cells[whole.off[g] + r * grid.shape[1] + c] = new
        names.add(Corpus("", {**arrays, 'cells': cells}).sha256)
        grid.setflags(write=True)
        grid[r, c] = new
        assert Corpus.of([t]).sha256 != alone # its key is as it was, the cell is what counts
        grid[r, c] = old
        assert Corpus.of([t]).sha256 == alone
    assert len(names) == 500 and whole.sha256 not in names

def test_a_name_a_shape_a_split_and_an_order_change_the_corpus_and_a_place_does_not():
    x, y = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(4, dtype=np.uint8).reshape(2, 2)
    t, other = Task("t", "here", [(x, y), (y, x)], [(x, y)]), Task("u", "here", [(y, y)], [(y, y)])
    want = Corpus.of([t, other], "here").sha256
    assert Corpus.of([replace(t, source="there"), other], "there").sha256 == want
    corpora = [Corpus.of([other, t]), Corpus.of([t]), Corpus.of([t, other, other])]
    corpora.append(Corpus.of([t, other], bad=["one is missing"]))
    for fields in ( # the key stays, so each of the others has to count by itself
        {'name': "v"},
        {'key': "k"},
        {'queries': [(x, y.reshape(1, 4))]},
        {'queries': [(x.reshape(3, 2), y)]},
        {'queries': [(x, None)]},
        {'queries': [(x, y)] * 2},
        {'demos': t.demos[:1]},
        {'demos': t.demos[::-1]},
        {'demos': t.demos[:1], 'queries': [(y, x), (x, y)]},
        {'demos': t.demos + [(x, y)], 'queries': [(y, y)]},
    ):
        corpora.append(Corpus.of([replace(t, **fields), other]))
    assert len({want, *(c.sha256 for c in corpora)}) == len(corpora) + 1

# -----------------------------------------------------------------------------
# packed

def pack(capsys, src, out, *flags):
    """ the command -> the sha256 that it prints """
    cli(['data', 'pack', str(src), '--out', str(out), *flags])
    return capsys.readouterr().out.split()[-1]

class Packed:
    """ a packed corpus, to be written with changes, all hashes in its manifest right """

    def __init__(self, tmp_path):
        (tmp_path / 'x.json').write_text(json.dumps(toy_tasks(n=4, queries=2)))
        self.path = tmp_path / 'packed'
        self.corpus = read_source(str(tmp_path / 'x.json'))
        self.corpus.save(self.path)
        self.files = {p.name: p.read_bytes() for p in self.path.iterdir()}

    def write(self, name=None, data=None, **manifest):
        """ data in place of the array of that name, other values in the manifest -> path """
        for file, old in self.files.items():
            (self.path / file).write_bytes(old)
        obj = json.loads(self.files['manifest.json'])
        if name:
            (self.path / f"{name}.npy").write_bytes(data)
            obj['sha256'][name] = hashlib.sha256(data).hexdigest()
        (self.path / 'manifest.json').write_text(json.dumps({**obj, **manifest}))
        return self.path

@pytest.fixture
def packed(tmp_path):
    return Packed(tmp_path)

def npy(x, **kwargs):
    f = io.BytesIO()
    np.save(f, x, **kwargs)
    return f.getvalue()

@pytest.mark.reliability
@pytest.mark.parametrize('name', Corpus.ARRAYS)
def test_a_flipped_byte_a_short_file_and_a_missing_one_are_refused_by_name(name, packed, capsys):
    path = packed.write()
    file, data = path / f"{name}.npy", packed.files[f"{name}.npy"]
    damaged = [data[:k] for k in (0, 5, 64, 128, len(data) - 1)] + [data + b"\0"]
    # magic, version, length, dict, padding, data
    for k in {0, 5, 6, 8, 9, 10, 30, 60, 100, 126, 127, 128, 129, (128 + len(data)) // 2, len(data) - 1}:
        for bit in (1, 128):
            damaged.append(data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :])
    for broken in damaged:
        file.write_bytes(broken)
        assert f"{file}: damaged" in refusal(capsys, 'data', 'check', path)
    file.unlink()
    assert f"{file}: missing" in refusal(capsys, 'data', 'check', path)

@pytest.mark.reliability
def test_a_flipped_byte_of_the_manifest_is_refused_or_changes_nothing(packed):
    path, data = packed.write(), packed.files['manifest.json']
    same = refused = 0
    for k in range(len(data)):
        for bit in (1, 4, 64, 128):
            (path / 'manifest.json').write_bytes(data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :])
            try:
                c = read_source(str(path))
                assert c.sha256 == packed.corpus.sha256 and len(c) == 4
                same += 1
            except ValueError as e:
                assert str(e).startswith(str(path)) and str(e).isprintable(), (k, bit, e)
                refused += 1
    assert refused > same > 0

def test_a_manifest_of_another_format_is_refused_by_what_is_wrong_in_it(packed, capsys):
    for name, x in (
        ('format', 3), ('format', "1"), ('format', None), ('sha256', None), ('sha256', []), ('bad', 5), ('bad', "text"),
        ('bad', [5]),
    ):
        want = f"manifest.json: want a packed corpus of format 2, got {name} {x!r}\n"
        assert want in refusal(capsys, 'data', 'check', packed.write(**{name: x}))
    path = packed.write()
    whole = packed.files['manifest.json'].decode()
    for text in ('{"nanoarc": "packed corpus"}', '["packed corpus"]', '"packed corpus"', '{"nanoarc": "packed corpus"',
                 whole[:-20]):
        (path / 'manifest.json').write_text(text)
        assert f"{path}/manifest.json: " in refusal(capsys, 'data', 'check', path), text
    for text in ('{"nanoarc": "something else"}', '', whole[:9]):
        (path / 'manifest.json').write_text(text)
        assert f"{path}/manifest.json: " in refusal(capsys, 'data', 'check', path), text
    (path / 'manifest.json').unlink()
    want = f"{path}: not a whole packed corpus (no manifest.json), pack it anew"
    assert want in refusal(capsys, 'data', 'check', path)

def test_a_corpus_that_was_packed_before_there_were_extra_pairs_opens(packed):
    path = packed.write(format=1)
    (path / 'n_own.npy').unlink()
    c = read_source(str(path))
    assert c.sha256 == packed.corpus.sha256 and plain(c) == plain(packed.corpus) and (c.n_own == c.n_demos).all()

def other_type(x):
    return x.astype('U' if x.dtype.kind == 'S' else 'f4')

def npz(x):
    f = io.BytesIO()
    np.savez(f, a=x)
    return f.getvalue()

def wider(x):
    if x.dtype.kind == 'S':
        return x.astype('U9')
    return x.astype('<i4' if x.dtype == '<i2' else '<i2')

# a file that is no such array, or one that does not fit the others
WRONG = {
    'short': lambda x: npy(x[:-1]),
    'long': lambda x: npy(np.concatenate([x, x[-1:]])),
    'empty': lambda x: npy(x[:0]),
    'a matrix': lambda x: npy(x[None]),
    'a number': lambda x: npy(x[0]),
    'other type': lambda x: npy(other_type(x)),
    'wider': lambda x: npy(wider(x)),
    'objects': lambda x: npy(x.astype(object), allow_pickle=True),
    'no file': lambda x: b"",
    'no array': lambda x: b"garbage",
    'a header alone': lambda x: npy(x)[:128],
    'truncated': lambda x: npy(x)[:-1],
    'an .npz': npz,
    'a broken .npz': lambda x: npz(x)[:50],
}

@pytest.mark.reliability
@pytest.mark.parametrize('how', WRONG)
def test_an_array_that_does_not_fit_is_refused_though_its_hash_is_right(how, packed):
    for name in Corpus.ARRAYS:
        path = packed.write(name, WRONG[how](getattr(packed.corpus, name)))
        with pytest.raises(ValueError) as e:
            read_source(str(path))
        assert str(e.value).startswith(str(path)) and str(e.value).isprintable(), (name, str(e.value))

@pytest.mark.reliability
def test_values_that_cannot_be_are_refused_though_their_hashes_are_right(packed, tmp_path, capsys):
    c = packed.corpus
    assert plain(read_source(str(packed.write('cells', npy(c.cells))))) == plain(c) # else nothing below is proven
    for name, k, x, want in (
        ('cells', 0, 10, "cells.npy: color 10 is outside 0..9"), ('cells', -1, 255, "cells.npy: color 255"),
        ('h', 0, 0, "do not fit"), ('h', 0, 31, "do not fit"), ('w', 0, 200, "do not fit"),
        ('first', 0, 1, "do not fit"), ('first', 1, 0, "do not fit"), ('first', 1, 10**12, "do not fit"),
        ('first', -1, 19, "do not fit"), ('first', -1, 21, "do not fit"), ('first', 1, -3, "do not fit"),
        ('n_demos', 0, 0, "do not fit"), ('n_demos', 0, -1, "do not fit"), ('n_demos', 0, 5, "do not fit"),
        ('n_demos', 3, 2**31 - 1, "do not fit"), ('n_own', 0, -1, "do not fit"), ('n_own', 0, 4, "do not fit"),
    ):
        y = getattr(c, name).copy()
        y[k] = x
        path = packed.write(name, npy(y))
        err = refusal(capsys, 'data', 'check', path)
        assert str(path) in err and want in err, (name, k, x)
    tall = np.zeros((31, 1), np.uint8)
    Corpus.of([Task("t", "", [(tall, tall)], [(tall, None)])]).save(tmp_path / 'tall')
    assert "do not fit" in refusal(capsys, 'data', 'check', tmp_path / 'tall')

@pytest.mark.reliability
def test_only_the_answer_of_a_query_may_be_empty(packed, tmp_path):
    c = packed.corpus # a task has 3 demos and 2 queries
    arrays = {name: getattr(c, name) for name in c.ARRAYS}
    for g in range(10):
        h, w, colors = c.h.copy(), c.w.copy(), c.colors.copy()
        h[g] = w[g] = colors[g] = 0
        cells = np.concatenate([c.grid(k).ravel() for k in range(len(h)) if k != g])
        out = tmp_path / str(g)
        Corpus("", {**arrays, 'h': h, 'w': w, 'colors': colors, 'cells': cells}).save(out)
        if g in (7, 9):
            assert read_tasks(str(out))[0].queries[g // 2 - 3][1] is None
        else:
            with pytest.raises(ValueError, match="the arrays do not fit together"):
                read_source(str(out))

@pytest.mark.reliability
@pytest.mark.parametrize('h, w', [(0, 3), (3, 0)])
def test_an_answer_without_rows_has_no_columns_either(h, w, packed, tmp_path):
    c = packed.corpus # grid 7 is the answer of a query
    cells = np.concatenate([c.grid(k).ravel() for k in range(len(c.h)) if k != 7])
    for name, x in (('h', h), ('w', w), ('colors', 0)):
        getattr(c, name)[7] = x
    arrays = {name: getattr(c, name) for name in c.ARRAYS}
    Corpus("", {**arrays, 'cells': cells}).save(tmp_path / 'out')
    with pytest.raises(ValueError, match="the arrays do not fit together"):
        read_source(str(tmp_path / 'out'))

@pytest.mark.reliability
@pytest.mark.parametrize('name', ['colors', 'hash', 'input_hash'])
def test_what_follows_from_the_cells_cannot_be_made_up(name, packed, capsys):
    x = getattr(packed.corpus, name)
    for k in (0, 7, len(x) - 1):
        lie = x.copy()
        lie[k] ^= 1
        err = refusal(capsys, 'data', 'check', packed.write(name, npy(lie)))
        assert f"{packed.path}: colors, hash or input_hash do not follow from cells" in err

def test_of_a_closed_answer_the_hash_is_all_that_is_left(packed, tmp_path):
    closed = read_source(str(packed.write()), opened=False)
    closed.save(tmp_path / 'closed')
    c = read_source(str(tmp_path / 'closed'))
    assert (c.hash == packed.corpus.hash).all() and answers_of(all_tasks(c)) == [None] * 8

@pytest.mark.reliability
@pytest.mark.parametrize('name', [b"a\nb", b"\x1b[31m", b"\xe2\x80\xa8", b"\xff", b"", b"toy0001"])
def test_the_names_of_a_packed_corpus_are_names_each_once(name, packed):
    x = packed.corpus.name.copy()
    x[0] = name
    with pytest.raises(ValueError, match="the arrays do not fit together"):
        read_source(str(packed.write('name', npy(x))))

@pytest.mark.reliability
def test_a_color_cannot_hide_behind_a_short_header(packed):
    cells = packed.corpus.cells.copy()
    cells[:5] = 200
    header = f"{{'descr':'|u1','fortran_order':False,'shape':({len(cells)},)}}".encode()
    header = header.ljust(69) + b"\n" # 80 bytes with what is before it, np.save writes 128
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, 'little') + header + cells.tobytes()
    with pytest.raises(ValueError, match="cells.npy: "):
        read_source(str(packed.write('cells', data)))

def test_a_packed_corpus_is_the_corpus(toy, tmp_path, capsys):
    src = toy(n=5, queries=2)
    (tmp_path / 'toy' / 'list.json').write_text(json.dumps(make_list(12)))
    unknown = {**task(), 'test': [{'input': GRID}]} # a query without an answer
    (tmp_path / 'toy' / 'c_challenges.json').write_text(json.dumps({'unknown': unknown}))
    for spec in (src, 'arc2/evaluation'):
        c, out = read_source(spec), tmp_path / spec.replace('/', '_')
        assert pack(capsys, spec, out) == c.sha256
        got = read_source(str(out))
        assert plain(got) == plain(c)
        assert got.sha256 == c.sha256 and got.source == str(out)
        for name in (*c.ARRAYS, 'off'):
            assert (getattr(got, name) == getattr(c, name)).all()
        sources = read_sources(f"{out}*2+{src}") # it is a source like any other
        assert [(len(x), n) for x, n in sources] == [(len(c), 2), (7, 1)]
    (tmp_path / 'toy' / 'broken.json').write_text("{")
    c = read_source(src, on_bad='quarantine')
    assert pack(capsys, src, tmp_path / 'bad', '--on_bad', 'quarantine') == c.sha256
    got = read_source(str(tmp_path / 'bad'))
    assert got.sha256 == c.sha256 and got.bad == c.bad and len(c.bad) == 1

def test_pack_takes_one_source_and_an_empty_directory(toy, tmp_path, capsys):
    src, out = toy(), tmp_path / 'out'
    for args, want in (
        ([f"{src}+arc1/training", '--out', out], "want one source, without +"),
        ([src], "and --out DIR"),
        ([f"{src}*2", '--out', out], "want one source"),
        (['', '--out', out], "want a source"),
    ):
        assert want in refusal(capsys, 'data', 'pack', *args) and not out.exists()
    out.mkdir()
    (out / 'x').touch()
    for path in (out, out / 'x'):
        assert f"{path}: exists and is not empty" in refusal(capsys, 'data', 'pack', src, '--out', path)
    assert [p.name for p in out.iterdir()] == ['x']
    (out / 'x').unlink()
    pack(capsys, src, out)
    assert f"{out}: exists and is not empty" in refusal(capsys, 'data', 'pack', src, '--out', out)

@pytest.mark.parametrize('side, limit, why', [(30, 9000, "is the disk full?"), (4, 500, "File too large")])
def test_a_pack_that_fails_says_why_and_leaves_nothing(side, limit, why, toy, tmp_path, capsys):
    src, out = toy(n=8, side=side), tmp_path / 'out'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)) # as if the disk were full
    try:
        err = refusal(capsys, 'data', 'pack', src, '--out', out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"nanoarc: {out}: " in err and why in err and list(out.iterdir()) == []
    pack(capsys, src, out)

def test_a_pack_that_is_interrupted_leaves_nothing(toy, tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt
    monkeypatch.setattr('nanoarc.corpus.hash_file', interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_source(toy()).save(tmp_path / 'out')
    assert list((tmp_path / 'out').iterdir()) == []

# -----------------------------------------------------------------------------
# closed, selected

@pytest.mark.parametrize('packed', [False, True])
def test_a_closed_corpus_reveals_no_answer(packed, toy, tmp_path, capsys):
    src = toy(queries=2)
    c = read_source(src)
    if packed:
        pack(capsys, src, tmp_path / 'packed')
        src = str(tmp_path / 'packed')
    closed = read_source(src, opened=False)
    assert answers_of(read_tasks(src, opened=False)) == [None] * 6
    is_answer = np.zeros(len(c.h), bool)
    is_answer[1::2] = ~c.is_demo()
    for g in range(len(c.h)):
        if is_answer[g]:
            assert closed.h[g] == closed.w[g] == closed.colors[g] == 0 and closed.grid(g).size == 0
        else:
            assert (closed.grid(g) == c.grid(g)).all()
    assert (closed.hash == c.hash).all()
    assert queries_of([closed]).keys() == queries_of([c]).keys() and len(queries_of([c])) == 6
    assert None not in answers_of(read_tasks(src)) # what is closed is closed in that corpus alone

def test_closed_nobody_can_tell_the_size_of_an_answer(toy, tmp_path, capsys):
    src = toy(queries=2)
    pack(capsys, src, tmp_path / 'packed')
    here, there = read_source(src, opened=False), read_source(str(tmp_path / 'packed'), opened=False)
    for name in (*here.ARRAYS, 'off'): # offsets and cells too
        assert (getattr(here, name) == getattr(there, name)).all()
    assert here.sha256 == there.sha256 != read_source(src).sha256

def test_select_keeps_some_tasks_and_the_name_of_the_whole(toy):
    c = read_source(toy(n=5, queries=2))
    keep = np.array([False, True, False, True, True])
    some = c.select(keep)
    assert plain(some) == [x for x, kept in zip(plain(c), keep) if kept]
    assert some.sha256 == c.sha256 and np.shares_memory(some.cells, c.cells)
    assert len(c) == 5 and c.select(keep | True) is c
    assert some.is_demo().tolist() == [True, True, True, False, False] * 3
    assert queries_of([some]).keys() < queries_of([c]).keys()
    shut = some.close()
    assert [x[:3] for x in plain(shut)] == [x[:3] for x in plain(some)]
    assert answers_of(all_tasks(shut)) == [None] * 6 and None not in answers_of(all_tasks(some))
    assert plain(c.close().select(keep)) == plain(shut)

def test_what_a_closed_corpus_is_called_depends_on_nothing_before(toy):
    src = toy()
    a, b = read_source(src), read_source(src)
    assert len(a.sha256) == 64 and a.close().sha256 == b.close().sha256

# -----------------------------------------------------------------------------
# hashes of pairs

def grids(most=3, colors=10):
    """ grids of sides 1..most and colors 0..colors - 1 """
    def of_shape(shape):
        cells = st.lists(st.integers(0, colors - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
        return cells.map(lambda x: np.array(x, np.uint8).reshape(shape))
    return st.tuples(st.integers(1, most), st.integers(1, most)).flatmap(of_shape)

CALM = settings(deadline=None, derandomize=True, database=None, max_examples=300)

def canonical_pair(x, y):
    return canonical(x.tolist(), y.tolist())

@CALM
@given(grids(8), grids(8), st.permutations(range(10)), st.integers(0, 7))
def test_the_hash_of_a_pair_sees_no_color_names_and_no_symmetry(x, y, names, d):
    cmap = np.array(names, np.uint8)
    assert pair_hash(cmap[dihedral(x, d)], cmap[dihedral(y, d)]) == pair_hash(x, y) != 0

@CALM
@given(grids(2, 3), grids(2, 3), grids(2, 3), grids(2, 3))
def test_the_hash_of_a_pair_tells_different_pairs(a, b, c, d):
    same = canonical_pair(a, b) == canonical_pair(c, d)
    assert (pair_hash(a, b) == pair_hash(c, d)) == same

def test_all_pairs_of_arc_with_one_hash_are_one_pair():
    hashes, forms = set(), set()
    for t in read_tasks('arc1/evaluation')[:60]:
        for x, y in t.demos + t.queries:
            hashes.add(pair_hash(x, y))
            forms.add(canonical_pair(x, y))
    assert len(hashes) == len(forms) > 250

# -----------------------------------------------------------------------------
# the leak guard

def test_the_leak_guard_asks_for_every_query_of_a_task(tmp_path):
    objs, names = toy_tasks(n=1, queries=4, side=9), 'abcd'
    (tmp_path / 'asked.json').write_text(json.dumps(objs))
    asked = queries_of([read_source(str(tmp_path / 'asked.json'), opened=False)])
    for name, pair in zip(names, objs['toy0000']['test']): # a task that has it as a demo, one that has it as a query
        trained = {name: {**task(), 'train': [pair]}, 'q': {**task(), 'test': [pair]}}
        (tmp_path / 'x.json').write_text(json.dumps(trained))
        found = [text for _, text in overlaps(read_source(str(tmp_path / 'x.json')), asked)]
        i = names.index(name)
        assert [f"= toy0000 query {i} " in text for text in found] == [True, True], found

def test_the_leak_guard_finds_what_arc_1_and_2_share():
    asked = queries_of([read_source('arc1/evaluation', opened=False)])
    found = [text for _, text in overlaps(read_source('arc1/training'), asked)]
    assert found == ["40853293 (arc1/training) = 070dd51e query 0 (arc1/evaluation), verbatim",
                     "caa06a1f (arc1/training) = 50a16a69 query 0 (arc1/evaluation), augmented"]
    arc2 = read_source('arc2/training')
    shared = set(arc2.name.tolist()) & set(read_source('arc1/evaluation').name.tolist())
    found = overlaps(arc2, asked)
    same = set()
    task = arc2.pair_task()
    for p, text in found:
        name = arc2.name[task[p]].decode()
        if f"= {name} query" in text:
            same.add(name.encode())
    assert len(shared) == 376 and same == shared
    assert {arc2.name[task[p]] for p, _ in found} - shared == {b'caa06a1f'}
    assert overlaps(arc2, queries_of([read_source('arc1/evaluation')])) == found # opened or closed, it is one guard
    assert overlaps(arc2, {}) == []

NO_GRIDS = ["text", None, 5, True, [], [[]], [[10]], [[True]], [[1], [1, 2]], [[0] * 31], {'a': 1}]

@pytest.mark.parametrize('junk', NO_GRIDS)
def test_a_closed_answer_that_is_no_grid_is_not_ours_to_judge(junk, tmp_path):
    path = tmp_path / 'a.json'
    obj = toy_tasks(n=1, queries=3)['toy0000']
    path.write_text(json.dumps(obj))
    want = read_source(str(path)).hash.tolist()
    obj['test'][1]['output'] = junk
    path.write_text(json.dumps(obj))
    c = read_source(str(path), opened=False)
    assert c.hash.tolist() == [*want[:4], 0, want[5]]
    assert len(queries_of([c])) == 3 and len(overlaps(c, queries_of([c]))) == 2
    path = tmp_path / 'x_challenges.json'
    asked, _ = as_kaggle({'a': obj})
    path.write_text(json.dumps(asked))
    for solutions in ([junk], [junk] * 5): # as many as it likes
        (tmp_path / 'x_solutions.json').write_text(json.dumps({'a': solutions}))
        assert read_source(str(path), opened=False).hash.tolist() == [*want[:3], 0, 0, 0]

def test_data_check_against_lists_what_leaks(toy, tmp_path, capsys):
    src = toy(n=3)
    objs = list(toy_tasks(n=3).values())
    verbatim = objs[0]['test'][0]
    turned = {side: np.rot90(9 - np.array(grid)).tolist() for side, grid in objs[1]['test'][0].items()}
    a, n, v = (f"{tmp_path}/{name}.json" for name in 'anv')
    for path, pair in ((v, verbatim), (a, turned), (n, {'input': GRID, 'output': GRID})):
        with open(path, 'w') as f:
            json.dump({**task(), 'test': [pair]}, f)
    cli(['data', 'check', f"{a}+{n}+{v}", '--against', src])
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"a ({a}) = toy0001 query 0 ({src}), augmented",
        f"v ({v}) = toy0000 query 0 ({src}), verbatim",
        f"2 pairs of {a}+{n}+{v} are queries of {src}",
    ]
