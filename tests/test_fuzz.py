""" python -m pytest tests/test_fuzz.py: input that is broken or hostile """
import json
import os
import random
import stat
import subprocess
import sys
import zipfile
from difflib import SequenceMatcher
from pathlib import Path

import polars as pl
import pytest
from conftest import toy_tasks
from test_sources import cap_json, make_list, plain, refusal, task

from nanoarc.sources import read_source

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
    return valid_task(obj) or valid_list(obj) or valid_tasks(obj)

def has_keys(x, needed, known):
    """ each needed one, each known one once at most, none that is nearly one of these; any others """
    keys = [key for key, _ in x]
    for key in {*keys} - {*known}:
        if any(SequenceMatcher(None, word, key.strip().lower()).ratio() >= 0.8 for word in known):
            return False
    return {*needed} <= {*keys} and max(map(keys.count, known)) == 1

def valid_grid(x):
    if type(x) is not list or not 0 < len(x) < 31:
        return False
    for row in x:
        if type(row) is not list or not 0 < len(row) < 31 or len(row) != len(x[0]):
            return False
        if not all(type(cell) is int and cell in range(10) for cell in row):
            return False
    return True

def valid_pair(x, needed=('input', 'output')):
    if type(x) is not Pairs or not has_keys(x, needed, ('input', 'output')):
        return False
    return all(valid_grid(y) for key, y in x if key in ('input', 'output'))

def valid_list(x):
    if type(x) is not list or len(x) < 2:
        return False
    for y in x:
        is_two_grids = type(y) is list and len(y) == 2 and all(map(valid_grid, y))
        if not is_two_grids and not valid_pair(y):
            return False
    return True

def valid_tasks(x):
    if type(x) is not Pairs or not 0 < len(x) == len(dict(x)):
        return False
    return all(0 < len(name) <= 200 and name.isprintable() and valid_task(y) for name, y in x)

def valid_task(x):
    if type(x) is not Pairs or not has_keys(x, ('train', 'test'), ('train', 'test')):
        return False
    train, test = dict(x)['train'], dict(x)['test']
    if type(train) is not list or type(test) is not list or not train or not test:
        return False
    return all(map(valid_pair, train)) and all(valid_pair(y, ['input']) for y in test)

# -----------------------------------------------------------------------------
# mutations of valid tasks. a kind is a function of a spot that breaks it; its place is what the error has to name

class Spot:
    """ a random cell of a task, and all that it lies in """

    def __init__(self, obj, rng):
        self.obj, self.rng = obj, rng
        self.part = rng.choice(['train', 'test'])
        self.pairs = obj[self.part]
        self.i = rng.randrange(len(self.pairs))
        self.pair = self.pairs[self.i]
        self.side = rng.choice(['input', 'output'])
        self.grid = self.pair[self.side]
        self.r, self.c = rng.randrange(len(self.grid)), rng.randrange(len(self.grid[0]))

    def name(self, place):
        """ the words of an error for this place """
        pair = f", {'demo' if self.part == 'train' else 'query'} {self.i}"
        grid = f"{pair}, {self.side}"
        return {'cell': f"{grid}, row {self.r}, col {self.c}: ", 'row': f"{grid}, row ", 'grid': grid,
                'pair': f"{pair}: ", 'task': ": ", 'file': ""}[place]

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
    """ the text of the file becomes something else """
    return lambda s: lambda text: change(text, s.rng)

def a_grid(make):
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
    return rng.choice([word + "s", word + " ", word.upper(), word.capitalize(), word[:-1], word[1:], word + "\n"])

def another(word, rng):
    return rng.choice([f"{word}\n\x1b[31m" + "x" * 9, "\ud800", "k" * 999, ""])

def no_demo_output(s):
    s.part, s.pairs = 'train', s.obj['train']
    s.i = s.rng.randrange(len(s.pairs))
    del s.pairs[s.i]['output']

def in_a_list(s):
    s.i, s.obj[s.part] = 0, [s.pairs]

def twice(word):
    """ a key once more, before the first """
    def change(t, rng):
        more = rng.choice([f'"{word}": [[1]], ', f'"{word}": null, '])
        return t.replace(f'"{word}": ', more + f'"{word}": ', 1)
    return text(change)

def trailing_comma(t, rng):
    mark = rng.choice(["]", "}"])
    return t.replace(mark, "," + mark, 1)

def cut(t, rng):
    """ one of the characters that hold json together goes """
    k = rng.choice([k for k, x in enumerate(t) if x in '[]{}":'])
    return t[:k] + t[k + 1 :]

def three_dimensional(g, rng):
    return rng.choice([[g], [g, g], [[[x] for x in row] for row in g]])

COMMENTS = [lambda t: "// x\n" + t, lambda t: "/* x */" + t, lambda t: t + "# x"]
SCALARS = [None, True, False, 0, 7, "x", "12\n34", ""]
KINDS = { # kind: (the place that is known, how to break it)
    'color over 9': ('cell', put(lambda rng: rng.choice([10, 11, 42, 99, 255, 2**31]))),
    'color that wraps': ('cell', put(lambda rng: 256 * rng.randint(1, 999) + rng.randrange(10))),
    'color that wraps in 64 bits': ('cell', put(lambda rng: 2 ** rng.choice([32, 63, 64, 128]) + rng.randrange(10))),
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
    '31 cols': ('row', a_grid(lambda g, rng: [[1] * 31 for _ in g])),
    'empty rows': ('row', a_grid(lambda g, rng: [[] for _ in g])),
    'no rows': ('grid', a_grid(lambda g, rng: [])),
    '31 rows': ('grid', a_grid(lambda g, rng: [g[0]] * 31)),
    'one-dimensional': ('row', a_grid(lambda g, rng: g[0])),
    'three-dimensional': ('row', a_grid(three_dimensional)),
    'a grid that is none': ('grid', a_grid(lambda g, rng: rng.choice(SCALARS))),
    'a grid by name': ('grid', a_grid(lambda g, rng: rng.choice([{}, {'0': g[0]}, {'rows': g}]))),
    'no input': ('pair', lambda s: s.pair.pop('input') and None),
    'no output': ('pair', no_demo_output),
    'misspelt key in a pair': ('pair', lambda s: rename(s.pair, s.side, misspell(s.side, s.rng))),
    'misspelt key beside it': ('pair', lambda s: s.pair.update({misspell(s.side, s.rng): s.grid})),
    'another key for the input': ('pair', lambda s: rename(s.pair, 'input', another('input', s.rng))),
    'a pair that is none': ('pair', a_pair(lambda pair, rng: rng.choice(SCALARS))),
    'a pair as a list': ('pair', a_pair(lambda pair, rng: rng.choice([list(pair.values()), [pair], []]))),
    'missing part': ('task', lambda s: s.obj.pop(s.part) and None),
    'misspelt part': ('task', lambda s: rename(s.obj, s.part, misspell(s.part, s.rng))),
    'misspelt part beside it': ('task', lambda s: s.obj.update({misspell(s.part, s.rng): s.pairs})),
    'another key for a part': ('task', lambda s: rename(s.obj, s.part, another(s.part, s.rng))),
    'a part that is none': ('task', a_part(lambda pairs, rng: rng.choice([*SCALARS, {}, {'0': pairs[0]}]))),
    'an empty part': ('task', a_part(lambda pairs, rng: [])),
    'a part in a list': ('pair', in_a_list),
    'a task that is none': ('root', lambda task, rng: rng.choice([*SCALARS, [], {}])),
    'a task in a list': ('root', lambda task, rng: [task]),
    'a bad id': ('id', None),
    'float': ('cell', literal("1.0", "1.5", "1e0", "1E400", "-0.0", "1e-400")),
    'NaN': ('cell', literal("NaN", "Infinity", "-Infinity")),
    '5000 digits': ('file', literal("9" * 5000, "-" + "1" * 5000)),
    'a number of another language': ('file', literal("01", "+1", "0x1", "1_0", "\u0661", ".5", "1.", "--1", "1L")),
    'a word of another language': ('file', literal("True", "None", "undefined", "nan", "(1,)", "'1'", "np.uint8(1)")),
    'a key twice in a pair': ('file', twice('input')),
    'a key twice in a task': ('file', twice('train')),
    'trailing comma': ('file', text(trailing_comma)),
    'trailing text': ('file', text(lambda t, rng: t + rng.choice(["x", "\x00", "]", "}", "{}", "\n" + t]))),
    'a comment': ('file', text(lambda t, rng: rng.choice(COMMENTS)(t))),
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
    place, change = KINDS[kind]
    rng = random.Random(f"{kind} {n}")
    demos, queries, side = rng.randint(1, 4), rng.randint(1, 3), rng.choice([3, 5, 9])
    objs = toy_tasks(n=2, demos=demos, queries=queries, side=side, seed=rng.randrange(50))
    name, other = objs
    for pair in objs[name]['train'] + objs[name]['test']:
        for side, grid in pair.items(): # at least 2 rows and cols, so that a row can be shorter than another
            pair[side] = [row + row[:1] for row in grid + grid[:1]]
    forms = {'id': ['tasks'], 'root': ['task', 'tasks']}.get(place, ['task', 'tasks', 'splits'])
    form, edit, hint = rng.choice(forms), None, ""
    if place == 'id':
        objs = {rng.choice(["", "i" * 201, "\n" * 300, "a\nb", "\u2028", "\x1b"]): objs[name], other: objs[other]}
        hint = "want a task id of 1..200"
    elif place == 'root':
        objs[name] = change(objs[name], rng)
        if form == 'tasks':
            hint = f": task {name}: "
    else:
        spot = Spot(objs[name], rng)
        edit = change(spot) # of the text, or None
        if place != 'file':
            hint = f": task {'x' if form == 'task' else name}{spot.name(place)}"
    data = {
        'task': objs.get(name),
        'tasks': objs,
        'splits': {'training': {other: objs[other]}, 'evaluation': {name: objs.get(name)}},
    }[form]
    data = json.dumps(data)
    if edit:
        data = edit(data)
    return data if type(data) is bytes else data.encode('utf-8', 'surrogatepass'), hint

@pytest.mark.reliability
@pytest.mark.slow
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
            assert type(e) is ValueError and message.startswith(f"{path}: ") and hint in message, (kind, n, hint, e)
            assert message.isprintable() and len(message) < len(str(path)) + 200, (kind, n, e)
        else:
            raise AssertionError((kind, n, "accepted", data[:200]))
        seen.add(data)
    assert len(kinds) > 50 and len(seen) > 8000

def flip(data, rng):
    """ change a few bytes of a bytearray, somewhere """
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
        elif rng.random() < 0.1:
            data = data[: max(k, 1)]
        else:
            data = data.replace(b"1", b"2", 1)
    return bytes(data)

@pytest.mark.reliability
def test_ten_thousand_files_with_changed_bytes_are_judged_as_the_oracle_does(tmp_path):
    rng, path, counts = random.Random(0), tmp_path / 'x.json', {True: 0, False: 0}
    bases = []
    for n in range(20):
        for obj in (toy_tasks(n=2, side=3, seed=n), toy_tasks(n=1, seed=n)['toy0000'], make_list(3, seed=n)):
            bases += [json.dumps(obj).encode(), json.dumps(obj, separators=(',', ':')).encode()]
    for n in range(10_000):
        data = flip(bytearray(rng.choice(bases)), rng)
        path.write_bytes(data)
        try:
            read_source(str(path))
            accepted = True
        except ValueError as e:
            assert type(e) is ValueError and str(e).startswith(f"{path}: ") and str(e).isprintable(), (n, e)
            accepted = False
        assert accepted == valid(data), (n, data)
        counts[accepted] += 1
    assert min(counts.values()) > 500, counts

READ_ALL = """
import sys
from nanoarc.sources import read_source
for path in sys.argv[1:]:
    try:
        read_source(path)
        print('accepted')
    except Exception as e:
        print(type(e).__name__, e)
"""

@pytest.mark.reliability
def test_without_asserts_the_errors_are_the_same(tmp_path):
    paths, want = [], []
    for n, kind in enumerate(KINDS):
        path = tmp_path / f"{n}.json"
        path.write_bytes(broken(kind, n)[0])
        with pytest.raises(ValueError) as e:
            read_source(str(path))
        paths.append(str(path))
        want.append(f"ValueError {e.value}")
    out = subprocess.run([sys.executable, '-O', '-c', READ_ALL, *paths], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == want and len(want) > 50

def test_at_no_depth_does_nesting_escape(tmp_path):
    path = tmp_path / 'x.json'
    path.touch()
    # where python may stop
    depths = [*range(1, 40), *range(150, 170), *range(300, 340), *range(480, 505), *range(960, 1010), 10**5]
    for depth in depths:
        deep = "[" * depth + "]" * depth
        for data in (
            f'{{"train": {deep}, "test": []}}',
            f'{{"train": [{{"input": {deep}, "output": [[1]]}}], "test": [{{"input": [[1]]}}]}}',
            f'{{"train": 1, "test": [], "x": {deep}}}',
            deep,
        ):
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

def claim(name, x):
    """ what the directory of a zip says of its first member """
    return {'edit': lambda z: setattr(z.infolist()[0], name, x)}

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
    'encrypted': ({'x.json': ONE}, claim('flag_bits', 1), "x.json: encrypted"),
    'nested': ({'a/b.zip': "PK", 'x.json': ONE}, {}, "a/b.zip: an archive within"),
    'nested tar': ({'b.tar.gz': "x", 'x.json': ONE}, {}, "b.tar.gz: an archive within"),
    'ratio': ({'x.json': BOMB}, {}, "x.json: a bomb?"),
    'a small size is claimed': ({'x.json': BOMB}, claim('file_size', 100), "x.json: "),
    'a method that nobody has': ({'x.json': ONE}, claim('compress_type', 99), "x.json: damaged"),
    'another checksum': ({'x.json': ONE}, claim('CRC', 5), "x.json: damaged"),
    'control characters': ({'a\n\x1b[31m.json': "{"}, {}, "a\\n\\x1b[31m.json: not json"),
    'nothing': ({}, {}, "no .json, .jsonl, .ndjson, .parquet file in it"),
    'no name': ({'x.json': ONE}, claim('filename', ""), "an entry without a name"),
    'a gz': ({'b.json.gz': "x", 'x.json': ONE}, {}, "b.json.gz: an archive within"),
    'junk alone': ({'__MACOSX/x.json': ONE, '._x.json': ONE}, {}, "file in it"),
}

def times(root):
    """ {path: when it was changed} of a tree """
    return {str(p): p.stat().st_mtime_ns for p in root.rglob('*')}

@pytest.mark.reliability
@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    members, more, want = HOSTILE[name]
    home = tmp_path / 'a' / 'b'
    home.mkdir(parents=True)
    archive(home / 'bad.zip', members, **more)
    monkeypatch.chdir(home)
    monkeypatch.setattr('tempfile.tempdir', str(home))
    before = times(tmp_path)
    err = refusal(capsys, 'data', 'check', home / 'bad.zip')
    assert f"{home}/bad.zip: " in err and want in err and err[:-1].isprintable()
    assert times(tmp_path) == before and not Path('/etc/x.json').exists()

def test_a_good_archive_is_read_and_writes_nothing(tmp_path, monkeypatch):
    archive(tmp_path / 'x.zip', {f"d/{name}.json": json.dumps(obj) for name, obj in toy_tasks(n=3).items()})
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(read_source('x.zip')) == 3 and os.listdir(tmp_path) == ['x.zip']

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]

@pytest.mark.parametrize('method', METHODS)
def test_an_archive_is_bounded_while_it_is_inflated(method, tmp_path, monkeypatch):
    path = tmp_path / 'x.zip'
    members = {f"{name}.json": json.dumps(obj) + " " * 3000 for name, obj in toy_tasks(n=4).items()}
    archive(path, members, method=method)
    assert len(read_source(str(path))) == 4
    with monkeypatch.context() as m:
        m.setattr('nanoarc.sources.MAX_ZIP_BYTES', 10_000)
        with pytest.raises(ValueError, match="toy0002.json: a bomb|toy0003.json: a bomb"):
            read_source(str(path))
    with monkeypatch.context() as m:
        cap_json(m, 2000)
        with pytest.raises(ValueError, match="toy0000.json: a bomb"):
            read_source(str(path))
    with monkeypatch.context() as m:
        m.setattr('nanoarc.sources.MAX_ZIP_FILES', 3)
        with pytest.raises(ValueError, match="x.zip: 4 entries, want at most 3"):
            read_source(str(path))

@pytest.mark.reliability
@pytest.mark.parametrize('method', METHODS)
def test_a_damaged_archive_is_one_error_or_the_same_tasks(method, tmp_path):
    path, rng = tmp_path / 'x.zip', random.Random(int(method))
    members = {f"\u00e9/{name}.json": json.dumps(obj) for name, obj in toy_tasks(n=3).items()}
    whole = archive(path, members, method=method)
    want = {json.dumps(x[2:]) for x in plain(read_source(str(path)))}
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
                tasks = plain(read_source(str(path), on_bad=on_bad))
                assert {json.dumps(x[2:]) for x in tasks} <= want # the checksum sees a changed cell
            except ValueError as e:
                good = type(e) is ValueError and str(e).startswith(f"{path}: ") and str(e).isprintable()
                assert good, (n, repr(e))

def test_a_damaged_file_in_an_archive_is_one_task_in_quarantine(tmp_path):
    five, six = json.dumps(task([[5]])), json.dumps(task([[6]]))
    for bad in ('b.json', 'b.jsonl'):
        path = tmp_path / 'x.zip'
        data = archive(path, {'a.json': ONE, bad: five, 'c.json': six}, method=zipfile.ZIP_STORED)
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
