""" python -m pytest tests/test_fuzz.py: input that is broken, hostile or changed, and what keeps its name: packed, selected, closed corpora, leaked pairs """
import hashlib
import io
import json
import os
import random
import re
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import toy_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_loader import canonical
from test_sources import GRID, make_list, plain, refusal, task

from nanoarc.cli import main as cli
from nanoarc.sources import Corpus, Task, overlaps, pair_hash, queries_of, read_source, read_sources, read_tasks

# -----------------------------------------------------------------------------
# an oracle that shares nothing with nanoarc: is this file a task, tasks by id, or a list of pairs?

class Pairs(list):
    """ a json object as its (key, value) pairs, so that a key twice is seen """

def valid(data):
    """ bytes of a .json -> bool """
    try:
        obj = json.loads(data.removeprefix(b"\xef\xbb\xbf").decode('utf-8'), object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return False
    return tidy(obj) and (valid_task(obj) or valid_pairs(obj) or (type(obj) is Pairs and len(obj) > 0 and all(0 < len(name) <= 200 and valid_task(x) for name, x in obj)))

def tidy(x):
    if type(x) is Pairs:
        return len(dict(x)) == len(x) and all(tidy(y) for _, y in x)
    return all(map(tidy, x)) if type(x) is list else type(x) is not float

def valid_grid(x):
    if type(x) is not list or not 0 < len(x) < 31 or not all(type(row) is list and 0 < len(row) < 31 and len(row) == len(x[0]) for row in x):
        return False
    return all(type(cell) is int and cell in range(10) for row in x for cell in row)

def valid_pair(x, keys=('input', 'output')):
    return type(x) is Pairs and sorted(key for key, _ in x) == sorted(keys) and all(valid_grid(y) for _, y in x)

def valid_pairs(x):
    return type(x) is list and len(x) > 1 and all(valid_pair(y) or type(y) is list and len(y) == 2 and all(map(valid_grid, y)) for y in x)

def valid_task(x):
    if type(x) is not Pairs or not {'train', 'test'} <= {key for key, _ in x} <= {'train', 'test', 'name'}:
        return False
    train, test = dict(x)['train'], dict(x)['test']
    return type(train) is list and type(test) is list and len(train) > 0 < len(test) and all(map(valid_pair, train)) and all(valid_pair(y) or valid_pair(y, ['input']) for y in test)

# -----------------------------------------------------------------------------
# mutations of valid tasks. a kind is a function of a spot that breaks it; its place is what the error has to name

class Spot:
    """ a random cell of a task, and all that it lies in """
    def __init__(self, obj, rng):
        self.obj, self.rng, self.part = obj, rng, rng.choice(['train', 'test'])
        self.pairs = obj[self.part]
        self.i = rng.randrange(len(self.pairs))
        self.pair, self.side = self.pairs[self.i], rng.choice(['input', 'output'])
        self.grid = self.pair[self.side]
        self.r, self.c = rng.randrange(len(self.grid)), rng.randrange(len(self.grid[0]))

    def name(self, place):
        pair = f", {'demo' if self.part == 'train' else 'query'} {self.i}"
        return {'cell': f"{pair}, {self.side}, row {self.r}, col {self.c}: ", 'row': f"{pair}, {self.side}, row ", 'grid': f"{pair}, {self.side}", 'pair': f"{pair}: ", 'task': ": ", 'file': ""}[place]

def put(make):
    """ a cell becomes something else """
    def change(s):
        s.grid[s.r][s.c] = make(s.rng)
    return change

def literal(*words):
    """ a cell becomes text that no json of a color has """
    def change(s):
        s.grid[s.r][s.c] = "@"
        return lambda text: text.replace('"@"', s.rng.choice(words))
    return change

def text(change):
    return lambda s: lambda text: change(text, s.rng)

def rows(make):
    """ a grid becomes something else """
    def change(s):
        s.pair[s.side] = make(s.grid, s.rng)
    return change

def a_row(make):
    def change(s):
        s.grid[s.r] = make(s.grid[s.r], s.rng)
    return change

def a_pair(make):
    def change(s):
        s.pairs[s.i] = make(s.pair, s.rng)
    return change

def a_part(make):
    def change(s):
        s.obj[s.part] = make(s.pairs, s.rng)
    return change

def rename(obj, old, new):
    items = [(new if key == old else key, x) for key, x in obj.items()]
    obj.clear()
    obj.update(items)

def misspell(word, rng):
    return rng.choice([word + "s", word + " ", word.upper(), word[:-1], f"{word}\n\x1b[31m", "\ud800"])

def no_demo_output(s):
    s.part, s.pairs = 'train', s.obj['train']
    s.i = s.rng.randrange(len(s.pairs))
    del s.pairs[s.i]['output']

def in_a_list(s):
    s.i, s.obj[s.part] = 0, [s.pairs]

def twice(word):
    return text(lambda t, rng: (rng.choice([f'"{word}": [[1]], ', f'"{word}": null, ']) + f'"{word}": ').join(t.split(f'"{word}": ', 1)))

def cut(t, rng):
    """ one of the characters that hold json together goes """
    return (lambda k: t[:k] + t[k + 1 :])(rng.choice([k for k, x in enumerate(t) if x in '[]{}":']))

SCALARS = [None, True, False, 0, 7, "x", "12\n34", ""]
KINDS = { # kind: (the place that is known, how to break it)
    'color over 9': ('cell', put(lambda rng: rng.choice([10, 11, 42, 99, 255]))),
    'color that wraps': ('cell', put(lambda rng: 256 * rng.randint(1, 999) + rng.randrange(10))),
    'color that wraps in 64 bits': ('cell', put(lambda rng: 2 ** rng.choice([31, 32, 63, 64, 128]) + rng.randrange(10))),
    'negative color': ('cell', put(lambda rng: -rng.choice([1, 2, 9, 246, 2**31, 2**64]))),
    '4000 digits': ('cell', put(lambda rng: 10**4000)),
    'bool': ('cell', put(lambda rng: rng.random() < 0.5)),
    'null': ('cell', put(lambda rng: None)),
    'digit in quotes': ('cell', put(lambda rng: str(rng.randrange(10)))),
    'text': ('cell', put(lambda rng: rng.choice(["", "\x1b[31m" * 99, "a\nb", "\ud800"]))),
    'a list as a color': ('cell', put(lambda rng: rng.choice([[], [1], [[1]]]))),
    'an object as a color': ('cell', put(lambda rng: rng.choice([{}, {'x': 1}]))),
    'short row': ('row', a_row(lambda row, rng: row[:-1])),
    'long row': ('row', a_row(lambda row, rng: row + [0])),
    'a row that is none': ('row', a_row(lambda row, rng: rng.choice([*SCALARS, {'0': 1}]))),
    'empty row': ('row', a_row(lambda row, rng: [])),
    '31 cols': ('row', rows(lambda g, rng: [[1] * 31 for _ in g])),
    'empty rows': ('row', rows(lambda g, rng: [[] for _ in g])),
    'no rows': ('grid', rows(lambda g, rng: [])),
    '31 rows': ('grid', rows(lambda g, rng: [g[0]] * 31)),
    'one-dimensional': ('row', rows(lambda g, rng: g[0])),
    'three-dimensional': ('row', rows(lambda g, rng: rng.choice([[g], [g, g], [[[x] for x in row] for row in g]]))),
    'a grid that is none': ('grid', rows(lambda g, rng: rng.choice(SCALARS))),
    'a grid by name': ('grid', rows(lambda g, rng: rng.choice([{}, {'0': g[0]}, {'rows': g}]))),
    'no input': ('pair', lambda s: s.pair.pop('input') and None),
    'no output': ('pair', no_demo_output),
    'unknown key in a pair': ('pair', lambda s: s.pair.update({s.rng.choice(["id", "mask", "a\nb", "k" * 999]): 1})),
    'misspelt key in a pair': ('pair', lambda s: rename(s.pair, s.side, misspell(s.side, s.rng))),
    'a pair that is none': ('pair', a_pair(lambda pair, rng: rng.choice(SCALARS))),
    'a pair as a list': ('pair', a_pair(lambda pair, rng: rng.choice([list(pair.values()), [pair], []]))),
    'missing part': ('task', lambda s: s.obj.pop(s.part) and None),
    'unknown key': ('task', lambda s: s.obj.update({s.rng.choice(["Name", "extra", "a\nb", "arc-gen"]): []})),
    'misspelt part': ('task', lambda s: rename(s.obj, s.part, misspell(s.part, s.rng))),
    'a part that is none': ('task', a_part(lambda pairs, rng: rng.choice([*SCALARS, {}, {'0': pairs[0]}]))),
    'an empty part': ('task', a_part(lambda pairs, rng: [])),
    'a part in a list': ('pair', in_a_list),
    'a task that is none': ('root', lambda task, rng: rng.choice([*SCALARS, [], {}])),
    'a task in a list': ('root', lambda task, rng: [task]),
    'a bad id': ('id', None),
    'float': ('file', literal("1.0", "1.5", "1e0", "1E400", "-0.0", "1e-400")),
    'NaN': ('file', literal("NaN", "Infinity", "-Infinity")),
    '5000 digits': ('file', literal("9" * 5000, "-" + "1" * 5000)),
    'a number of another language': ('file', literal("01", "+1", "0x1", "1_0", "\u0661", ".5", "1.", "--1", "1L")),
    'a word of another language': ('file', literal("True", "None", "undefined", "nan", "(1,)", "'1'", "np.uint8(1)")),
    'a key twice in a pair': ('file', twice('input')),
    'a key twice in a task': ('file', twice('train')),
    'trailing comma': ('file', text(lambda t, rng: t.replace(mark := rng.choice(["]", "}"]), "," + mark, 1))),
    'trailing text': ('file', text(lambda t, rng: t + rng.choice(["x", "\x00", "]", "}", "{}", "\n" + t]))),
    'a comment': ('file', text(lambda t, rng: rng.choice(["// x\n" + t, "/* x */" + t, t + "# x"]))),
    'single quotes': ('file', text(lambda t, rng: t.replace('"', "'"))),
    'truncated': ('file', text(lambda t, rng: t[: rng.randrange(len(t) - 1)])),
    'a bracket or quote less': ('file', text(cut)),
    'a NUL': ('file', text(lambda t, rng: t.replace("[", "[\x00", 1))),
    'latin-1': ('file', text(lambda t, rng: t.encode().replace(b'"', b'"\xe9', 1))),
    'utf-16': ('file', text(lambda t, rng: t.encode(rng.choice(['utf-16', 'utf-32', 'utf-16-le'])))),
    'too deep': ('file', text(lambda t, rng: t.replace("[[", "[" * rng.choice([1500, 5000, 20000]) + "[[", 1))),
    'empty': ('file', text(lambda t, rng: rng.choice(["", " \n", "\ufeff", "\ufeff\ufeff" + t]))),
}

def broken(kind, n):
    """ mutation number n of a kind -> (bytes of a file, what the error has to hold) """
    rng, (place, change) = random.Random(f"{kind} {n}"), KINDS[kind]
    objs = toy_tasks(n=2, demos=rng.randint(1, 4), queries=rng.randint(1, 3), side=rng.choice([3, 5, 9]), seed=rng.randrange(50))
    name, other = objs
    for pair in objs[name]['train'] + objs[name]['test']: # at least 2 rows and cols, so that a row can be shorter than another
        for side in pair:
            pair[side] = [row + row[:1] for row in pair[side] + pair[side][:1]]
    form, edit = rng.choice({'id': ['tasks'], 'root': ['task', 'tasks']}.get(place, ['task', 'tasks', 'splits'])), None
    if place == 'id':
        objs, hint = {rng.choice(["", "i" * 201, "\n" * 300]): objs[name], other: objs[other]}, "want a task id of 1..200"
    elif place == 'root':
        objs[name], hint = change(objs[name], rng), f": task {name}: " if form == 'tasks' else ""
    else:
        spot = Spot(objs[name], rng)
        edit = change(spot)
        hint = f": task {name if form != 'task' else 'x'}{spot.name(place)}" if place != 'file' else ""
    if form == 'splits':
        objs = {'training': {other: objs[other]}, 'evaluation': {name: objs[name]}}
    data = json.dumps(objs if form != 'task' else objs[name])
    data = edit(data) if edit else data
    return data if type(data) is bytes else data.encode('utf-8', 'surrogatepass'), hint

@pytest.mark.reliability
def test_ten_thousand_malformed_files_are_ten_thousand_errors_with_their_place(tmp_path):
    kinds, seen, path = list(KINDS), set(), tmp_path / 'x.json'
    for n in range(10_000):
        kind = kinds[n % len(kinds)]
        data, hint = broken(kind, n)
        assert not valid(data), (kind, n) # else the test is wrong
        path.write_bytes(data)
        try:
            read_source(str(path))
        except Exception as e:
            message = str(e)
            assert type(e) is ValueError and message.startswith(f"{path}: ") and hint in message and message.isprintable() and len(message) < len(str(path)) + 200, (kind, n, hint, e)
        else:
            raise AssertionError((kind, n, "accepted", data[:200]))
        seen.add(data)
    assert len(kinds) > 50 and len(seen) > 8000

@pytest.mark.reliability
def test_ten_thousand_files_with_changed_bytes_are_judged_as_the_oracle_does(tmp_path):
    rng, path, counts = random.Random(0), tmp_path / 'x.json', {True: 0, False: 0}
    bases = [json.dumps(x, separators=sep).encode() for n in range(20) for x in (toy_tasks(n=2, side=3, seed=n), toy_tasks(n=1, seed=n)['toy0000'], make_list(3, seed=n)) for sep in ((', ', ': '), (',', ':'))]
    for n in range(10_000):
        data = bytearray(rng.choice(bases))
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            k, m = rng.randrange(len(data)), rng.randrange(1, 9)
            change = rng.randrange(7)
            if change == 0:
                data[k] = rng.randrange(256)
            elif change == 1:
                data[k] ^= 1 << rng.randrange(8)
            elif change == 2:
                data[k : k + m] = b""
            elif change == 3:
                data[k:k] = rng.randbytes(m)
            elif change == 4:
                data[k:k] = data[k : k + m]
            elif change == 5:
                data[k] = rng.choice(b'0123456789[]{},:"-.eE \n\\')
            else:
                data = data[: max(k, 1)] if rng.random() < 0.1 else data.replace(b"1", b"2", 1)
        path.write_bytes(data)
        try:
            read_source(str(path))
            accepted = True
        except ValueError as e:
            assert type(e) is ValueError and str(e).startswith(f"{path}: ") and str(e).isprintable(), (n, e)
            accepted = False
        assert accepted == valid(bytes(data)), (n, bytes(data))
        counts[accepted] += 1
    assert min(counts.values()) > 500, counts

@pytest.mark.reliability
def test_without_asserts_the_errors_are_the_same(tmp_path):
    want, code = [], "import sys; from nanoarc.sources import read_source\nfor path in sys.argv[1:]:\n    try: read_source(path); print('accepted')\n    except Exception as e: print(type(e).__name__, e)"
    for n, kind in enumerate(KINDS):
        path = tmp_path / f"{n}.json"
        path.write_bytes(broken(kind, n)[0])
        with pytest.raises(ValueError) as e:
            read_source(str(path))
        want.append(f"ValueError {e.value}")
    out = subprocess.run([sys.executable, '-O', '-c', code, *(str(tmp_path / f"{n}.json") for n in range(len(KINDS)))], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == want and len(want) > 50

def test_at_no_depth_does_nesting_escape(tmp_path):
    (path := tmp_path / 'x.json').touch()
    for depth in [*range(1, 40), *range(150, 170), *range(300, 340), *range(480, 505), *range(960, 1010), 10**5]: # where python may stop
        deep = "[" * depth + "]" * depth
        for data in (f'{{"train": {deep}, "test": []}}', f'{{"train": [{{"input": {deep}, "output": [[1]]}}], "test": [{{"input": [[1]]}}]}}', f'{{"train": 1, "test": [], "x": {deep}}}', deep):
            path.write_text(data)
            with pytest.raises(ValueError, match="x.json: "):
                read_source(str(path))

@pytest.mark.reliability
def test_no_valid_task_is_refused(tmp_path):
    for n in range(300):
        objs = toy_tasks(n=2, demos=n % 5 + 1, queries=n % 3 + 1, side=[1, 5, 30][n % 3], seed=n)
        for obj in objs.values():
            for pair in obj['test'][: n % 2]:
                pair.pop('output')
        data = json.dumps(objs).encode()
        (tmp_path / 'x.json').write_bytes(data)
        assert valid(data) and len(read_source(str(tmp_path / 'x.json'))) == 2

# -----------------------------------------------------------------------------
# a changed pixel changes the sha256 of the corpus

@pytest.mark.reliability
def test_one_changed_digit_in_any_of_500_tasks_changes_the_corpus():
    tasks, rng = read_tasks('arc2/training')[:500], random.Random(0)
    whole, names = Corpus.of(tasks), set()
    arrays = {name: getattr(whole, name) for name in Corpus.ARRAYS}
    for k, t in enumerate(tasks):
        alone = Corpus.of([t]).sha256
        grid = rng.choice([g for pair in t.demos + t.queries for g in pair])
        r, c = rng.randrange(grid.shape[0]), rng.randrange(grid.shape[1])
        cells = whole.cells.copy()
        old, new = int(grid[r, c]), (int(grid[r, c]) + rng.randint(1, 9)) % 10
        g = next(g for g in range(2 * whole.first[k], 2 * whole.first[k + 1]) if whole.grid(g).shape == grid.shape and (whole.grid(g) == grid).all())
        cells[whole.off[g] + r * grid.shape[1] + c] = new
        grid.setflags(write=True)
        grid[r, c] = new
        assert Corpus.of([t]).sha256 != alone # its key and its seal are as they were, the cell is what counts
        grid[r, c] = old
        assert Corpus.of([t]).sha256 == alone
        names.add(Corpus("", {**arrays, 'cells': cells}).sha256)
    assert len(names) == 500 and whole.sha256 not in names

def test_a_name_a_shape_a_split_and_an_order_change_the_corpus_and_a_place_does_not():
    x, y = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(4, dtype=np.uint8).reshape(2, 2)
    t, other = Task("t", "here", [(x, y), (y, x)], [(x, y)]), Task("u", "here", [(y, y)], [(y, y)])
    want = Corpus.of([t, other], "here").sha256
    assert Corpus.of([replace(t, source="there"), other], "there").sha256 == want
    tasks = [replace(t, **fields) for fields in ( # the key stays, so each of the others has to count by itself
        {'name': "v"}, {'key': "k"}, {'queries': [(x, y.reshape(1, 4))]}, {'queries': [(x.reshape(3, 2), y)]}, {'queries': [(x, None)]}, {'queries': [(x, y)] * 2},
        {'demos': t.demos[:1]}, {'demos': t.demos[::-1]}, {'demos': t.demos[:1], 'queries': [(y, x), (x, y)]}, {'demos': t.demos + [(x, y)], 'queries': [(y, y)]})]
    corpora = [Corpus.of([task, other]) for task in tasks] + [Corpus.of([other, t]), Corpus.of([t]), Corpus.of([t, other, other]), Corpus.of([t, other], bad=["one is missing"])]
    assert len({want, *(c.sha256 for c in corpora)}) == len(corpora) + 1

# -----------------------------------------------------------------------------
# archives from strangers

BOMB = json.dumps(task()) + " " * 3_000_000

def archive(path, members, edit=lambda z: None, method=zipfile.ZIP_DEFLATED):
    """ members: {name or ZipInfo: text}. edit changes the directory before it is written """
    with zipfile.ZipFile(path, 'w', method) as z:
        for name, data in members.items():
            z.writestr(name, data)
        edit(z)
    return path.read_bytes()

def special(kind):
    info = zipfile.ZipInfo('x.json')
    info.external_attr = (kind | 0o644) << 16
    return info

def claims(**kwargs):
    """ what the directory of a zip says of its first member """
    return lambda z: [setattr(z.infolist()[0], name, x) for name, x in kwargs.items()]

ONE = json.dumps(task())
HOSTILE = { # kind: (members, more words for archive, what the error says)
    'parent': ({'../x.json': ONE}, {}, "../x.json: a path that leads out"),
    'parent within': ({'a/../../x.json': ONE}, {}, "a path that leads out"),
    'parent of junk': ({'x.json': ONE, '../readme.txt': "x"}, {}, "../readme.txt: a path"),
    'absolute': ({'/etc/x.json': ONE}, {}, "/etc/x.json: a path that leads out"),
    'backslash': ({'..\\x.json': ONE}, {}, "..\\\\x.json: a path that leads out"),
    'drive': ({'C:/x.json': ONE}, {}, "C:/x.json: a path that leads out"),
    'a folder out': ({'../d/': "", 'x.json': ONE}, {}, "../d/: a path that leads out"),
    'symlink': ({special(stat.S_IFLNK): "/etc/passwd"}, {}, "x.json: a link or device"),
    'device': ({special(stat.S_IFCHR): ""}, {}, "x.json: a link or device"),
    'pipe': ({special(stat.S_IFIFO): ""}, {}, "x.json: a link or device"),
    'encrypted': ({'x.json': ONE}, {'edit': claims(flag_bits=1)}, "x.json: encrypted"),
    'nested': ({'a/b.zip': "PK", 'x.json': ONE}, {}, "a/b.zip: an archive within"),
    'nested tar': ({'b.tar.gz': "x", 'x.json': ONE}, {}, "b.tar.gz: an archive within"),
    'ratio': ({'x.json': BOMB}, {}, "x.json: a bomb?"),
    'a small size is claimed': ({'x.json': BOMB}, {'edit': claims(file_size=100)}, "x.json: "),
    'a method that nobody has': ({'x.json': ONE}, {'edit': claims(compress_type=99)}, "x.json: damaged"),
    'another checksum': ({'x.json': ONE}, {'edit': claims(CRC=5)}, "x.json: damaged"),
    'control characters': ({'a\n\x1b[31m.json': "{"}, {}, "a\\n\\x1b[31m.json: not json"),
    'nothing': ({}, {}, "no .json, .jsonl, .parquet file in it"),
    'junk alone': ({'__MACOSX/x.json': ONE, '._x.json': ONE}, {}, "file in it"),
}

@pytest.mark.reliability
@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    members, more, want = HOSTILE[name]
    home = tmp_path / 'a' / 'b'
    home.mkdir(parents=True)
    archive(home / 'bad.zip', members, **more)
    monkeypatch.chdir(home)
    monkeypatch.setattr('tempfile.tempdir', str(home))
    before = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    err = refusal(capsys, 'data', 'check', home / 'bad.zip')
    assert f"{home}/bad.zip: " in err and want in err and err[:-1].isprintable()
    assert {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before and not Path('/etc/x.json').exists()

def test_a_good_archive_is_read_and_writes_nothing(tmp_path, monkeypatch):
    archive(tmp_path / 'x.zip', {f"{k}/{name}.json": json.dumps(obj) for k, (name, obj) in enumerate(toy_tasks(n=3).items())})
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(read_source('x.zip')) == 3 and os.listdir(tmp_path) == ['x.zip']

@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_is_bounded_while_it_is_inflated(method, tmp_path, monkeypatch):
    path = tmp_path / 'x.zip'
    archive(path, {f"{name}.json": json.dumps(obj) + " " * 3000 for name, obj in toy_tasks(n=4).items()}, method=method)
    assert len(read_source(str(path))) == 4
    for limit, most, want in (('MAX_ZIP_BYTES', 10_000, "toy0002.json: a bomb|toy0003.json: a bomb"), ('MAX_JSON_BYTES', 2000, "toy0000.json: a bomb"), ('MAX_ZIP_FILES', 3, "x.zip: 4 entries, want at most 3")):
        with monkeypatch.context() as m:
            m.setattr(f'nanoarc.sources.{limit}', most)
            with pytest.raises(ValueError, match=want):
                read_source(str(path))

@pytest.mark.reliability
@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive_is_one_error_or_the_same_tasks(method, tmp_path):
    path, rng = tmp_path / 'x.zip', random.Random(int(method))
    whole = archive(path, {f"\u00e9/{name}.json": json.dumps(obj) for name, obj in toy_tasks(n=3).items()}, method=method)
    want = {x[2:] and json.dumps(x[2:]) for x in plain(read_source(str(path)))}
    for n in range(1200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            k = rng.randrange(len(data))
            change = rng.randrange(4)
            if change < 2:
                data[k] = rng.randrange(256)
            elif change == 2:
                del data[k : k + rng.randrange(1, 40)]
            else:
                data[k:k] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(data if n % 9 else data[: rng.randrange(len(data))])
        for on_bad in ('raise', 'quarantine'):
            try:
                assert {json.dumps(x[2:]) for x in plain(read_source(str(path), on_bad=on_bad))} <= want # the checksum sees a changed cell
            except ValueError as e:
                assert type(e) is ValueError and str(e).startswith(f"{path}: ") and str(e).isprintable(), (n, repr(e))

def test_a_damaged_file_in_an_archive_is_one_task_in_quarantine(tmp_path):
    for bad in ('b.json', 'b.jsonl'):
        path = tmp_path / 'x.zip'
        data = archive(path, {'a.json': ONE, bad: json.dumps(task([[5]])), 'c.json': json.dumps(task([[6]]))}, method=zipfile.ZIP_STORED)
        path.write_bytes(data.replace(b"[[5]]", b"[[6]]"))
        c = read_source(str(path), on_bad='quarantine')
        assert c.name.tolist() == [b'a', b'c'] and len(c.bad) == 1 and bad in c.bad[0] and "damaged" in c.bad[0]

@pytest.mark.reliability
def test_a_damaged_table_is_one_error(tmp_path, capfd):
    path, rng = tmp_path / 'x.parquet', random.Random(0)
    pl.DataFrame([{'id': name, **obj} for name, obj in toy_tasks(n=3).items()]).write_parquet(path)
    whole, seen = path.read_bytes(), {}
    for n in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            k = rng.randrange(len(data))
            data[k : k + rng.randrange(0, 2)] = rng.randbytes(rng.randrange(0, 3))
        path.write_bytes(data)
        try:
            read_source(str(path))
        except BaseException as e: # polars may panic, which is no Exception
            if type(e) is not ValueError or not str(e).startswith(f"{path}: ") or not str(e).isprintable():
                seen[type(e).__name__] = (n, str(e)[:100])
    assert seen == {}

# -----------------------------------------------------------------------------
# packed

def pack(capsys, src, out, *flags):
    cli(['data', 'pack', str(src), '--out', str(out), *flags])
    return capsys.readouterr().out.split()[-1]

@pytest.fixture
def packed(tmp_path):
    """ a packed corpus -> function that puts other bytes in place of an array, their hash in the manifest, and other words there -> its path """
    src = tmp_path / 'x.json'
    src.write_text(json.dumps(toy_tasks(n=4, queries=2)))
    c = read_source(str(src))
    c.save(tmp_path / 'packed')
    files = {p.name: p.read_bytes() for p in (tmp_path / 'packed').iterdir()}
    def change(name=None, data=None, **manifest):
        for file, old in files.items():
            (tmp_path / 'packed' / file).write_bytes(old)
        obj = json.loads(files['manifest.json'])
        if name:
            (tmp_path / 'packed' / f"{name}.npy").write_bytes(data)
            obj['sha256'][name] = hashlib.sha256(data).hexdigest()
        (tmp_path / 'packed' / 'manifest.json').write_text(json.dumps({**obj, **manifest}))
        return tmp_path / 'packed'
    change.corpus, change.files = c, files
    return change

def npy(x, **kwargs):
    f = io.BytesIO()
    np.save(f, x, **kwargs)
    return f.getvalue()

@pytest.mark.reliability
@pytest.mark.parametrize('name', Corpus.ARRAYS)
def test_a_flipped_byte_a_short_file_and_a_missing_one_are_refused_by_name(name, packed, capsys):
    path = packed()
    file, data = path / f"{name}.npy", packed.files[f"{name}.npy"]
    places = {0, 5, 6, 8, 9, 10, 30, 60, 100, 126, 127, 128, 129, (128 + len(data)) // 2, len(data) - 1} # magic, version, length, dict, padding, data
    damaged = [data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :] for k in places for bit in (1, 128)] + [data[:k] for k in (0, 5, 64, 128, len(data) - 1)] + [data + b"\0"]
    for broken in damaged:
        file.write_bytes(broken)
        assert f"{file}: damaged" in refusal(capsys, 'data', 'check', path)
    file.unlink()
    assert f"{file}: missing" in refusal(capsys, 'data', 'check', path)

@pytest.mark.reliability
def test_a_flipped_byte_of_the_manifest_is_refused_or_changes_nothing(packed):
    path = packed()
    data, counts = packed.files['manifest.json'], [0, 0]
    for k in range(len(data)):
        for bit in (1, 4, 64, 128):
            (path / 'manifest.json').write_bytes(data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :])
            try:
                c = read_source(str(path))
                assert c.sha256 == packed.corpus.sha256 and len(c) == 4
                counts[0] += 1
            except ValueError as e:
                assert str(e).startswith(str(path)) and str(e).isprintable(), (k, bit, e)
                counts[1] += 1
    assert counts[1] > counts[0] > 0

def test_a_manifest_of_another_format_is_refused(packed, capsys):
    for change in ({'format': 2}, {'format': "1"}, {'format': None}, {'sha256': None}, {'sha256': []}, {'bad': 5}, {'bad': "text"}, {'bad': [5]}):
        assert "manifest.json: " in refusal(capsys, 'data', 'check', packed(**change)), change
    path = packed()
    for text in ('{"nanoarc": "packed corpus"}', '["packed corpus"]', '"packed corpus"', '{"nanoarc": "packed corpus"', '{"nanoarc": "something else"}', '', packed.files['manifest.json'][:-20].decode()):
        (path / 'manifest.json').write_text(text)
        assert f"{path}/manifest.json: " in refusal(capsys, 'data', 'check', path), text
    (path / 'manifest.json').unlink()
    assert f"{path}: no .json, .jsonl, .parquet file in it" in refusal(capsys, 'data', 'check', path)

def wrong(c, name, how):
    """ a file that is no such array, or one that does not fit the others """
    x = getattr(c, name)
    return {'short': lambda: npy(x[:-1]), 'long': lambda: npy(np.concatenate([x, x[-1:]])), 'empty': lambda: npy(x[:0]), 'a matrix': lambda: npy(x[None]), 'a number': lambda: npy(x[0]),
            'other type': lambda: npy(x.astype('f4') if x.dtype.kind != 'S' else x.astype('U')), 'wider': lambda: npy(x.astype('<i2' if x.dtype != '<i2' else '<i4') if x.dtype.kind != 'S' else x.astype('U9')),
            'objects': lambda: npy(x.astype(object), allow_pickle=True), 'no file': lambda: b"", 'no array': lambda: b"garbage", 'a header alone': lambda: npy(x)[:128], 'truncated': lambda: npy(x)[:-1]}[how]()

@pytest.mark.reliability
@pytest.mark.parametrize('how', ['short', 'long', 'empty', 'a matrix', 'a number', 'other type', 'wider', 'objects', 'no file', 'no array', 'a header alone', 'truncated'])
def test_an_array_that_does_not_fit_is_refused_though_its_hash_is_right(how, packed):
    for name in Corpus.ARRAYS:
        path = packed(name, wrong(packed.corpus, name, how))
        with pytest.raises(ValueError) as e:
            read_source(str(path))
        assert str(e.value).startswith(str(path)) and str(e.value).isprintable(), (name, str(e.value))

@pytest.mark.reliability
def test_values_that_cannot_be_are_refused_though_their_hashes_are_right(packed, capsys):
    c = packed.corpus
    assert plain(read_source(str(packed('cells', npy(c.cells))))) == plain(c) # else nothing below is proven
    for name, k, x, want in (('cells', 0, 10, "cells.npy: color 10 is outside 0..9"), ('cells', -1, 255, "cells.npy: color 255"), ('h', 0, 0, "do not fit"), ('h', 0, 31, ""), ('w', 0, 200, ""),
                             ('first', 0, 1, "do not fit"), ('first', 1, 0, "do not fit"), ('first', 1, 10**12, "do not fit"), ('first', -1, 19, "do not fit"), ('first', -1, 21, "do not fit"), ('first', 1, -3, "do not fit"),
                             ('n_demos', 0, 0, "do not fit"), ('n_demos', 0, -1, "do not fit"), ('n_demos', 0, 5, "do not fit"), ('n_demos', 3, 2**31 - 1, "do not fit")):
        y = getattr(c, name).copy()
        y[k] = x
        path = packed(name, npy(y))
        err = refusal(capsys, 'data', 'check', path)
        assert str(path) in err and want in err

@pytest.mark.reliability
def test_only_the_answer_of_a_query_may_be_empty(packed, tmp_path):
    c = packed.corpus # a task has 3 demos and 2 queries
    for g in range(10):
        h, w = c.h.copy(), c.w.copy()
        h[g] = w[g] = 0
        cells = np.concatenate([c.grid(k).ravel() for k in range(len(h)) if k != g])
        Corpus("", {**{name: getattr(c, name) for name in c.ARRAYS}, 'h': h, 'w': w, 'cells': cells}).save(tmp_path / str(g))
        if g in (7, 9):
            assert read_tasks(str(tmp_path / str(g)))[0].queries[g // 2 - 3][1] is None
        else:
            with pytest.raises(ValueError, match="the arrays do not fit together"):
                read_source(str(tmp_path / str(g)))

@pytest.mark.reliability
def test_a_color_cannot_hide_behind_a_short_header(packed):
    cells = packed.corpus.cells.copy()
    cells[:5] = 200
    header = f"{{'descr':'|u1','fortran_order':False,'shape':({len(cells)},)}}".encode().ljust(69) + b"\n" # 80 bytes with what is before it, np.save writes 128
    with pytest.raises(ValueError, match="cells.npy: "):
        read_source(str(packed('cells', b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, 'little') + header + cells.tobytes())))

def test_a_packed_corpus_is_the_corpus(toy, tmp_path, capsys):
    src = toy(n=5, queries=2)
    (tmp_path / 'toy' / 'list.json').write_text(json.dumps(make_list(12)))
    (tmp_path / 'toy' / 'c_challenges.json').write_text(json.dumps({'unknown': {**task(), 'test': [{'input': GRID}]}})) # a query without an answer
    for spec in (src, 'arc2/evaluation'):
        c = read_source(spec)
        assert pack(capsys, spec, out := tmp_path / f"packed{len(c)}") == c.sha256
        got = read_source(str(out))
        assert plain(got) == plain(c)
        assert got.sha256 == c.sha256 and all((getattr(got, x) == getattr(c, x)).all() for x in (*c.ARRAYS, 'off')) and got.source == str(out)
        assert [(len(x), n) for x, n in read_sources(f"{out}*2+{src}")] == [(len(c), 2), (7, 1)] # it is a source like any other
    (tmp_path / 'toy' / 'broken.json').write_text("{")
    c = read_source(src, on_bad='quarantine')
    assert pack(capsys, src, tmp_path / 'bad', '--on_bad', 'quarantine') == c.sha256 == read_source(str(tmp_path / 'bad')).sha256
    assert read_source(str(tmp_path / 'bad')).bad == c.bad and len(c.bad) == 1

def test_pack_takes_one_source_and_an_empty_directory(toy, tmp_path, capsys):
    src, out = toy(), tmp_path / 'out'
    for args, want in (([f"{src}+arc1/training", '--out', out], "want one source, without +"), ([src], "and --out DIR"), ([f"{src}*2", '--out', out], "want one source"), (['', '--out', out], "want a source")):
        assert want in refusal(capsys, 'data', 'pack', *args) and not out.exists()
    out.mkdir()
    (out / 'x').touch()
    for path in (out, out / 'x'):
        assert f"{path}: exists and is not empty" in refusal(capsys, 'data', 'pack', src, '--out', path)
    assert [p.name for p in out.iterdir()] == ['x']
    (out / 'x').unlink()
    pack(capsys, src, out)
    assert f"{out}: exists and is not empty" in refusal(capsys, 'data', 'pack', src, '--out', out)

@pytest.mark.parametrize('packed', [False, True])
def test_a_closed_corpus_reveals_no_answer(packed, toy, tmp_path, capsys):
    src = toy(queries=2)
    c = read_source(src)
    if packed:
        pack(capsys, src, src := str(tmp_path / 'packed'))
    closed, answers = read_source(src, opened=False), np.repeat(~c.is_demo(), 2) & np.tile([False, True], len(c.hash))
    assert all(y is None for t in read_tasks(src, opened=False) for _, y in t.queries)
    assert all((getattr(closed, x)[answers] == 0).all() for x in ('h', 'w', 'colors')) and all(closed.grid(g).size == 0 for g in np.flatnonzero(answers))
    assert all((closed.grid(g) == c.grid(g)).all() for g in np.flatnonzero(~answers)) and (closed.hash == c.hash).all()
    assert queries_of([closed]).keys() == queries_of([c]).keys() and len(queries_of([c])) == 6
    assert read_source(src).task(0).queries[0][1] is not None # what is closed is closed in that corpus alone

def test_closed_nobody_can_tell_the_size_of_an_answer(toy, tmp_path, capsys):
    src = toy(queries=2)
    pack(capsys, src, tmp_path / 'packed')
    here, there = read_source(src, opened=False), read_source(str(tmp_path / 'packed'), opened=False)
    assert all((getattr(here, x) == getattr(there, x)).all() for x in (*here.ARRAYS, 'off')) # offsets and cells too
    assert here.sha256 == there.sha256 != read_source(src).sha256

def test_select_keeps_some_tasks_and_the_name_of_the_whole(toy):
    c = read_source(toy(n=5, queries=2))
    keep = np.array([False, True, False, True, True])
    some = c.select(keep)
    assert plain(some) == [x for x, k in zip(plain(c), keep) if k]
    assert some.sha256 == c.sha256 and np.shares_memory(some.cells, c.cells) and len(c) == 5 and c.select(keep | True) is c
    assert (some.is_demo() == np.concatenate([[True] * 3 + [False] * 2] * 3)).all() and queries_of([some]).keys() < queries_of([c]).keys()
    shut = some.close()
    assert [x[:3] for x in plain(shut)] == [x[:3] for x in plain(some)]
    assert all(y is None for k in range(3) for _, y in shut.task(k).queries) and all(y is not None for k in range(3) for _, y in some.task(k).queries)
    assert plain(c.close().select(keep)) == plain(shut)

def test_what_a_closed_corpus_is_called_depends_on_nothing_before(toy):
    src = toy()
    a, b = read_source(src), read_source(src)
    assert len(a.sha256) == 64 and a.close().sha256 == b.close().sha256

# -----------------------------------------------------------------------------
# the leak guard

def test_the_leak_guard_finds_what_arc_1_and_2_share():
    asked = queries_of([read_source('arc1/evaluation', opened=False)])
    found = [text for _, text in overlaps(read_source('arc1/training'), asked)]
    assert found == ["40853293 (arc1/training) = 070dd51e query 0 (arc1/evaluation), verbatim", "caa06a1f (arc1/training) = 50a16a69 query 0 (arc1/evaluation), augmented"]
    arc2 = read_source('arc2/training')
    shared = set(arc2.name.tolist()) & set(read_source('arc1/evaluation').name.tolist())
    found = overlaps(arc2, asked)
    same = {arc2.name[k] for k, text in found if re.search(r"= (\w+) query", text)[1] == arc2.name[k].decode()}
    assert len(shared) == 376 and same == shared and {arc2.name[k] for k, _ in found} - shared == {b'caa06a1f'}
    assert overlaps(arc2, queries_of([read_source('arc1/evaluation')])) == found # opened or closed, it is one guard
    assert overlaps(arc2, {}) == []

def grids(most=3, colors=10):
    return st.tuples(st.integers(1, most), st.integers(1, most)).flatmap(lambda s: st.lists(st.integers(0, colors - 1), min_size=s[0] * s[1], max_size=s[0] * s[1]).map(lambda x: np.array(x, np.uint8).reshape(s)))

CALM = settings(deadline=None, derandomize=True, database=None, max_examples=300)

@CALM
@given(grids(8), grids(8), st.permutations(range(10)), st.integers(0, 7))
def test_the_hash_of_a_pair_sees_no_color_names_and_no_symmetry(x, y, names, d):
    turn = lambda g: np.array(names, np.uint8)[np.rot90(g.T if d > 3 else g, d)]
    assert pair_hash(turn(x), turn(y)) == pair_hash(x, y) != 0

@CALM
@given(grids(2, 3), grids(2, 3), grids(2, 3), grids(2, 3))
def test_the_hash_of_a_pair_tells_different_pairs(a, b, c, d):
    assert (pair_hash(a, b) == pair_hash(c, d)) == (canonical(a.tolist(), b.tolist()) == canonical(c.tolist(), d.tolist()))

def test_all_pairs_of_arc_with_one_hash_are_one_pair():
    tasks = read_tasks('arc1/evaluation')[:60]
    pairs = [pair for t in tasks for pair in t.demos + t.queries]
    assert len({pair_hash(x, y) for x, y in pairs}) == len({canonical(x.tolist(), y.tolist()) for x, y in pairs}) > 250

@pytest.mark.parametrize('junk', ["text", None, 5, True, [], [[]], [[10]], [[True]], [[1], [1, 2]], [[0] * 31], {'a': 1}])
def test_a_closed_answer_that_is_no_grid_is_not_ours_to_judge(junk, tmp_path):
    obj = toy_tasks(n=1, queries=3)['toy0000']
    (tmp_path / 'a.json').write_text(json.dumps(obj))
    want = read_source(str(tmp_path / 'a.json')).hash.tolist()
    obj['test'][1]['output'] = junk
    (tmp_path / 'a.json').write_text(json.dumps(obj))
    c = read_source(str(tmp_path / 'a.json'), opened=False)
    assert c.hash.tolist() == [*want[:4], 0, want[5]] and len(queries_of([c])) == 3 and len(overlaps(c, queries_of([c]))) == 2
    (tmp_path / 'x_challenges.json').write_text(json.dumps({'a': {'train': obj['train'], 'test': [{'input': pair['input']} for pair in obj['test']]}}))
    for solutions in ([junk], [junk] * 5): # as many as it likes
        (tmp_path / 'x_solutions.json').write_text(json.dumps({'a': solutions}))
        assert read_source(str(tmp_path / 'x_challenges.json'), opened=False).hash.tolist() == [*want[:3], 0, 0, 0]

def test_data_check_against_lists_what_leaks(toy, tmp_path, capsys):
    src = toy(n=3)
    objs = list(toy_tasks(n=3).values())
    turned = {side: np.rot90(9 - np.array(objs[1]['test'][0][side])).tolist() for side in ('input', 'output')}
    for name, pair in (('v', objs[0]['test'][0]), ('a', turned), ('n', {'input': GRID, 'output': GRID})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**task(), 'test': [pair]}))
    cli(['data', 'check', f"{tmp_path}/a.json+{tmp_path}/n.json+{tmp_path}/v.json", '--against', src])
    assert capsys.readouterr().out.splitlines()[3:] == [f"a ({tmp_path}/a.json) = toy0001 query 0 ({src}), augmented", f"v ({tmp_path}/v.json) = toy0000 query 0 ({src}), verbatim",
                                                        f"2 pairs of {tmp_path}/a.json+{tmp_path}/n.json+{tmp_path}/v.json are queries of {src}"]
