""" python -m pytest tests/test_sources.py: what each kind of source gives, and what it says when it is broken """
import gzip
import importlib.util
import json
import os
import resource
import shutil
import zipfile

import numpy as np
import polars as pl
import pytest
from conftest import toy_tasks

from nanoarc.cli import main as cli
from nanoarc.sources import FAULTS, read_source, read_sources, read_tasks, to_json

GRID = [[1, 2], [3, 4]]

def task(x=GRID, **kwargs):
    """ a task whose demo 1 has the input x """
    pair = {'input': GRID, 'output': GRID}
    return {'train': [pair, {'input': x, 'output': GRID}, pair], 'test': [pair], **kwargs}

def make_list(n, seed=0):
    """ n pairs of one rule, as RE-ARC has them in a file """
    return toy_tasks(n=1, demos=n, side=9, seed=seed)['toy0000']['train']

def rows(grid):
    return None if grid is None else grid.tolist()

def all_tasks(c):
    """ Corpus -> list of Task """
    return [c.task(k) for k in range(len(c))]

def plain(c):
    """ Corpus -> what its tasks say but not where they are from, to compare with == """
    found = []
    for t in all_tasks(c):
        demos = [(rows(x), rows(y)) for x, y in t.demos]
        queries = [(rows(x), rows(y)) for x, y in t.queries]
        found.append((t.name, t.key, demos, queries))
    return found

def answers_of(tasks):
    """ list of Task -> the answers of all queries """
    return [rows(y) for t in tasks for _, y in t.queries]

def as_kaggle(tasks):
    """ {name: json of a task} -> the same without answers, {name: answers} """
    asked, solutions = {}, {}
    for name, obj in tasks.items():
        asked[name] = {**obj, 'test': [{'input': pair['input']} for pair in obj['test']]}
        solutions[name] = [pair['output'] for pair in obj['test']]
    return asked, solutions

def refusal(capsys, *args):
    """ the one line that a command dies with """
    with pytest.raises(SystemExit) as e:
        cli([str(x) for x in args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and len(err) < 400, err
    return err

# -----------------------------------------------------------------------------
# real corpora

@pytest.mark.parametrize('source, tasks, demos, queries', [
    ('arc1/training', 400, 1302, 416), ('arc1/evaluation', 400, 1363, 419), ('arc2/training', 1000, 3232, 1076),
    ('arc2/evaluation', 120, 359, 167), ('kaggle2024', 800, 2665, 835), ('kaggle2025', 1120, 3590, 1248),
    ('kaggle2025/evaluation', 120, 358, 172),
])
def test_the_bundled_sources_have_the_known_counts(source, tasks, demos, queries):
    got = read_tasks(source)
    assert len(got) == tasks
    assert sum(len(t.demos) for t in got) == demos
    assert sum(len(t.queries) for t in got) == queries
    assert None not in answers_of(got)
    for t in got:
        for x, y in t.demos:
            assert x.dtype == y.dtype == np.uint8 and max(x.max(), y.max()) <= 9

def test_conceptarc_is_160_tasks(test_data):
    c = read_source(str(test_data / 'conceptarc'))
    assert (len(c), int(c.n_demos.sum()), len(c.hash)) == (160, 427, 907)

@pytest.mark.parametrize('deal, tasks, demos', [(1, 2400, 2400), (3, 1200, 3600), (11, 400, 4400), (20, 400, 4400)])
def test_re_arc_is_dealt_without_loss(deal, tasks, demos, test_data):
    path = test_data / 're_arc_small.zip'
    if not path.is_file():
        pytest.skip("there is no re_arc_small.zip in NANOARC_TEST_DATA")
    want = {}
    with zipfile.ZipFile(path) as z:
        for name in z.namelist():
            if name.startswith('re_arc/tasks/'):
                pairs = json.loads(z.read(name))
                want[name[13:-5]] = sorted(json.dumps([p['input'], p['output']]) for p in pairs)
    assert len(want) == 400 and {len(pairs) for pairs in want.values()} == {12}
    c = read_source(str(path), n_demos=deal)
    assert (len(c), int(c.n_demos.sum()), len(c.hash)) == (tasks, demos, 4800)
    keys, got = {}, {name: [] for name in want}
    for t in all_tasks(c):
        assert len(t.queries) == 1 and t.queries[0][1] is not None and len(t.demos) == min(deal, 11)
        name = t.name.partition('.')[0]
        got[name] += [json.dumps([rows(x), rows(y)]) for x, y in t.demos + t.queries]
        keys.setdefault(name, set()).add(t.key)
    assert {name: sorted(pairs) for name, pairs in got.items()} == want
    assert {len(x) for x in keys.values()} == {1} and len(set.union(*keys.values())) == 400 # one list, one key

# -----------------------------------------------------------------------------
# files and folders

def test_answers_stay_closed_when_nobody_asked(tmp_path):
    obj = toy_tasks(n=1)['toy0000']
    obj['test'][0]['output'] = "not even a grid, and never looked at"
    (tmp_path / 'a.json').write_text(json.dumps(obj))
    assert answers_of(read_tasks(str(tmp_path / 'a.json'), opened=False)) == [None]
    with pytest.raises(ValueError, match="a.json: task a, query 0, output: want a grid"):
        read_tasks(str(tmp_path / 'a.json'))

def test_kaggle_challenges_find_their_solutions(tmp_path):
    asked, solutions = as_kaggle(toy_tasks(n=3, queries=2))
    path = tmp_path / 'arc-agi_test_challenges.json'
    path.write_text(json.dumps(asked))
    assert answers_of(read_tasks(str(path))) == [None] * 6 # unknown stays unknown
    (tmp_path / 'arc-agi_test_solutions.json').write_text(json.dumps(solutions))
    for source in (path, tmp_path, f"file://{tmp_path}", f"file://{path}"): # alone, in a tree, through fsspec
        assert answers_of(read_tasks(str(source))) == sum(solutions.values(), []), source
        assert answers_of(read_tasks(str(source), opened=False)) == [None] * 6

def test_a_directory_is_read_in_order_and_joined_and_repeated(tmp_path):
    for name, obj in toy_tasks(n=3).items():
        data = json.dumps({**obj, 'name': "stray"})
        (tmp_path / f"{name}.json").write_text(data, encoding='utf-8-sig') # a BOM and a "name" are fine
    (tmp_path / '__MACOSX' / 'a' / 'b').mkdir(parents=True)
    (tmp_path / '__MACOSX' / 'a' / 'b' / 'x.json').write_bytes(b"\x00\x05")
    (tmp_path / '._x.json').write_bytes(b"\x00\x05")
    (tmp_path / 'folder.json').mkdir()
    spec = f"{tmp_path}*2 + arc2/evaluation"
    assert [(len(c), n) for c, n in read_sources(spec)] == [(3, 2), (120, 1)]
    names = [t.name for t in read_tasks(spec)]
    assert names[:4] == ['toy0000', 'toy0001', 'toy0002', read_tasks('arc2/evaluation')[0].name]
    assert read_sources("") == [] and read_tasks(" + ") == []

def test_a_path_with_a_plus_or_a_star_is_one_source(tmp_path):
    for name in ('a+b', 'a*2'):
        path = tmp_path / name
        path.mkdir()
        (path / 'x.json').write_text(json.dumps(toy_tasks(n=1)['toy0000']))
        assert len(read_tasks(str(path))) == 1 and read_sources(str(path))[0][1] == 1

def test_a_link_out_of_the_directory_is_refused(tmp_path, toy):
    src, other = toy(), toy('other')
    os.symlink(f"{src}/toy0000.json", f"{src}/again.json")
    assert len(read_tasks(src)) == 4 # within it is fine
    os.symlink(f"{other}/toy0000.json", f"{src}/out.json")
    with pytest.raises(ValueError, match="out.json: a link out of"):
        read_tasks(src)

def write_links(folder, links):
    """ {name: what it leads to} """
    for name, target in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, folder / name)

@pytest.mark.parametrize('name, target, want', [
    ('more', '../other', "more: a link out of"), ('more.json', '../other', "more.json: a link out of"),
    ('in/more', '../../other', "more: a link out of"), ('more', '..', "more: a link out of"),
    ('gone.json', 'nowhere.json', "gone.json: No such file"), ('gone', 'nowhere', "gone: No such file"),
    ('gone.zip', '../nowhere', "gone.zip: a link out of"), ('me.json', 'me.json', "me.json: Too many levels"),
])
def test_no_link_is_left_out_in_silence(name, target, want, toy, tmp_path, capsys):
    src = toy()
    toy('other', seed=1)
    write_links(tmp_path / 'toy', {name: target})
    assert want in refusal(capsys, 'data', 'check', src)
    assert want.partition(":")[0] in refusal(capsys, 'data', 'check', f"file://{src}")
    c = read_source(src, on_bad='quarantine')
    assert len(c) == 3 and len(c.bad) == 1 and want in c.bad[0]

def test_links_may_lead_about_in_a_folder(toy, tmp_path):
    want = plain(read_source(toy()))
    write_links(tmp_path / 'toy', {'a/loop': '..', 'b': 'a', '.hidden/x': '/', 'README.md': '/none', 'a.txt': '/none'})
    assert plain(read_source(str(tmp_path / 'toy'))) == want
    shutil.copytree(tmp_path / 'toy', tmp_path / 'kept' / '.store', symlinks=True)
    write_links(tmp_path / 'kept', {'data': '.store'}) # the one way to a hidden folder
    assert plain(read_source(str(tmp_path / 'kept'))) == want

def test_a_snapshot_of_hugging_face_is_read_and_its_links_lead_nowhere_else(toy, tmp_path, capsys):
    want = plain(read_source(toy()))
    repo = tmp_path / 'datasets--me--arc'
    snapshot = repo / 'snapshots' / '0a1b'
    (repo / 'blobs').mkdir(parents=True)
    for k, name in enumerate(os.listdir(tmp_path / 'toy')):
        shutil.copy(tmp_path / 'toy' / name, repo / 'blobs' / f"ff{k}")
        write_links(snapshot, {f"data/{name}": f"../../../blobs/ff{k}"})
    write_links(snapshot, {'README.md': '../../blobs/gone', '.gitattributes': '../../blobs/gone'})
    for source in (snapshot, snapshot / 'data', repo, f"file://{snapshot}"):
        assert plain(read_source(str(source))) == want
    secret = tmp_path / 'secret.json'
    secret.write_text(json.dumps(task()))
    (repo / 'refs').mkdir()
    shutil.copy(secret, repo / 'refs' / 'x.json')
    write_links(repo, {'blobs/out': secret})
    for target in ('../../blobs/out', secret, '../../refs/x.json', '../../../secret.json'):
        write_links(snapshot, {'x.json': target})
        assert "x.json: a link out of" in refusal(capsys, 'data', 'check', snapshot)
        (snapshot / 'x.json').unlink()

READ = ['B.JSON', 'c.json.gz', 'd.zip', 'e.ndjson', 'f.Jsonl', 'g.jsonl.GZ', 'h.PARQUET', 'i/j.Zip', 'k.ndjson.gz']

def write_any(path, name, obj):
    """ a task under that name, in the format that the end of the path says """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, record = path.name.lower(), {'id': name, **obj}
    if '.zip' in kind:
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr(f"in/{name}.json", json.dumps(obj))
    elif '.parquet' in kind:
        write_table(path, [record])
    else:
        data = json.dumps(record if 'l' in kind or 'nd' in kind else {name: obj}).encode()
        path.write_bytes(gzip.compress(data) if '.gz' in kind else data)

def test_whatever_looks_like_data_is_read(tmp_path):
    names = []
    for name, obj in zip(READ, toy_tasks(n=len(READ)).values()):
        names.append(name.replace('/', '.'))
        write_any(tmp_path / 'd' / name, names[-1], obj)
        assert [t.name for t in read_tasks(str(tmp_path / 'd' / name))] == names[-1:] # alone too
    for source in (tmp_path / 'd', f"file://{tmp_path / 'd'}"):
        assert sorted(t.name for t in read_tasks(str(source))) == sorted(names)

NOT_READ = ['x.tar', 'x.tar.gz', 'x.tgz', 'x.csv', 'x.CSV', 'x.csv.gz', 'x.pickle', 'x.pkl', 'x.npz', 'x.json.xz',
            'x.jsonl.zst', 'x.json.bz2', 'x.7z', 'x.arrow', 'in/x.gz', 'x.json.txt', 'x.JSON.bak', 'x.pq',
            'x.jsonlines', 'x.json5', 'x.jsonc', '__x.csv']

@pytest.mark.parametrize('name', NOT_READ)
def test_what_looks_like_data_and_is_not_read_is_named(name, toy, tmp_path, capsys):
    src = toy()
    path = tmp_path / 'toy' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"whatever")
    assert f"{path}: nothing here reads .{name.lower().rpartition('.')[2]}" in refusal(capsys, 'data', 'check', src)
    assert f"{path}: nothing here reads" in refusal(capsys, 'data', 'check', path) # alone too
    c = read_source(src, on_bad='quarantine')
    assert len(c) == 3 and len(c.bad) == 1 and name in c.bad[0]
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z: # and in an archive
        z.writestr('a.json', json.dumps(task()))
        z.writestr(name, "whatever")
    assert f"x.zip: {name}: " in refusal(capsys, 'data', 'check', tmp_path / 'x.zip')
    c = read_source(str(tmp_path / 'x.zip'), on_bad='quarantine')
    assert len(c) == 1 and len(c.bad) == 1 and name in c.bad[0]

def test_what_lies_beside_data_is_no_error(toy, tmp_path):
    want = plain(read_source(toy()))
    beside = ['README.md', 'LICENSE', 'a.txt', 'b.png', 'c.py', 'x.json.sha256', '.git/x.csv', '__MACOSX/._x.zip',
              '.DS_Store', '.x.tar', 'sample_submission.json', '.ipynb_checkpoints/x.json', 'empty/', 'x.json.md',
              'x.json.png', 'json.py']
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for path in sorted((tmp_path / 'toy').glob('*')):
            z.write(path, path.name)
        for name in beside:
            z.writestr(name, "whatever")
    for name in beside:
        path = tmp_path / 'toy' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("whatever") if name[-1] != '/' else path.mkdir()
    os.mkfifo(tmp_path / 'toy' / 'pipe')
    for source in (tmp_path / 'toy', tmp_path / 'x.zip'):
        assert plain(read_source(str(source))) == want

def test_a_file_without_a_task_is_named(toy, tmp_path, capsys):
    src = toy()
    files = {'a.jsonl': b"", 'b.jsonl': b"\n \n", 'c.jsonl.gz': gzip.compress(b""), 'd.parquet': None, 'e.zip': None}
    for name, data in files.items():
        path = tmp_path / 'toy' / name
        if data is None:
            write_any(path, 'x', task())
        if name == 'd.parquet':
            pl.read_parquet(path).clear().write_parquet(path)
        elif name == 'e.zip':
            with zipfile.ZipFile(path, 'w') as z:
                z.writestr('README.md', "x")
        else:
            path.write_bytes(data)
        assert f"{path}: no " in refusal(capsys, 'data', 'check', src)
        c = read_source(src, on_bad='quarantine')
        assert len(c) == 3 and [name in error for error in c.bad] == [True]
        path.unlink()

def test_a_name_of_two_underlines_is_read(toy, tmp_path):
    src = toy()
    write_any(tmp_path / 'toy' / '__in' / '__b.json', 'b', task())
    assert len(read_source(src)) == 4

def test_a_pipe_is_no_file_and_nobody_waits_for_it(toy, tmp_path, capsys):
    src = toy()
    os.mkfifo(tmp_path / 'toy' / 'x.json')
    assert "x.json: neither a file nor a folder" in refusal(capsys, 'data', 'check', src)
    assert "x.json: is neither a file nor a folder" in refusal(capsys, 'data', 'check', tmp_path / 'toy' / 'x.json')
    assert len(read_source(src, on_bad='quarantine').bad) == 1

def test_what_we_may_not_read_is_named(toy, tmp_path, capsys, monkeypatch):
    """ root may read everything, so the system's answer is made up """
    src = toy()
    (tmp_path / 'toy' / 'shut').mkdir()
    shut, listdir, open_it = ['shut', 'toy0001.json'], os.listdir, open
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr('os.listdir', lambda path: refuse(path) if str(path)[-4:] == 'shut' else listdir(path))
    assert "toy/shut: Permission denied" in refusal(capsys, 'data', 'check', src)
    monkeypatch.setattr('builtins.open', lambda path, *args, **kwargs:
                        refuse(path) if str(path).endswith('1.json') else open_it(path, *args, **kwargs))
    c = read_source(src, on_bad='quarantine')
    assert c.name.tolist() == [b'toy0000', b'toy0002'] and len(c.bad) == 2
    for name, error in zip(shut, sorted(c.bad)):
        assert error == f"{src}/{name}: Permission denied"
    assert "toy0001.json: Permission denied" in refusal(capsys, 'data', 'check', f"{src}/toy0001.json")

def test_a_gz_is_bounded_and_damage_is_one_line(tmp_path, monkeypatch, capsys):
    path, data = tmp_path / 'x.json.gz', gzip.compress(json.dumps(task()).encode())
    broken = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    for bad in (b"", b"no gz", data[:-1], data[:9], broken, data + b"x", gzip.compress(b"")):
        path.write_bytes(bad)
        refusal(capsys, 'data', 'check', path)
    for name in ('x.json.gz', 'x.jsonl.gz'):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps(task()).encode() + b" " * 3_000_000))
        assert f"{name}: a bomb?" in refusal(capsys, 'data', 'check', tmp_path / name)
    path.write_bytes(data)
    cap_json(monkeypatch, 100)
    assert "x.json.gz: a bomb?" in refusal(capsys, 'data', 'check', path)

# -----------------------------------------------------------------------------
# names that could be two things

AMBIGUOUS = [ # what lies here, the source
    (['kaggle2025/'], 'kaggle2025'), (['kaggle2025'], 'kaggle2025'), (['kaggle2025/'], 'kaggle2025/'),
    (['kaggle2025/'], 'kaggle2025*2'), (['kaggle2025/', 'b/'], 'b+kaggle2025'), (['arc1/training/'], 'arc1/training'),
    (['arc1/'], 'arc2/training + arc1*2'), (['arc1+arc2/'], 'arc1+arc2'), (['arc1*2/'], 'arc1*2'),
    (['a/', 'b/', 'a+b/'], 'a+b'), (['a/', 'a*2/'], 'a*2'), (['a/', 'a+arc1*2/'], 'a+arc1*2'),
]

def write_here(names):
    """ a task in each folder or file, by names that end in / or not """
    for name in names:
        if name[-1] == '/':
            os.makedirs(name)
        with open(name + ('x.json' if name[-1] == '/' else ''), 'w') as f:
            json.dump(task(), f)

@pytest.mark.parametrize('here, spec', AMBIGUOUS)
def test_a_name_that_could_be_two_sources_is_refused(here, spec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_here(here)
    err = refusal(capsys, 'data', 'check', spec)
    assert "ambiguous" in err and "say ./" in err
    name = err.partition("say ")[2].partition(" for the path")[0] # the way out that it names
    assert name[2:] in spec
    if os.path.isdir(name):
        assert [len(c) for c, _ in read_sources(name)] == [1]

def test_a_name_that_can_be_one_source_alone_is_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_here(['arc1/mine/', 'a+b/', 'a*2/', 'arc2x/', 'b/'])
    counts = {}
    for spec in ('arc1/training', 'arc1/mine', 'a+b', 'a*2', 'a*2*3', 'arc2x', './arc1/mine+./b*2', 'arc1/training*2'):
        counts[spec] = [(len(c), n) for c, n in read_sources(spec)]
    assert counts == {
        'arc1/training': [(400, 1)], 'arc1/mine': [(1, 1)], 'a+b': [(1, 1)], 'a*2': [(1, 1)], 'a*2*3': [(1, 3)],
        'arc2x': [(1, 1)], './arc1/mine+./b*2': [(1, 1), (1, 2)], 'arc1/training*2': [(400, 2)],
    }

@pytest.mark.parametrize('n', ["1000001", "100000000000", "9" * 5000])
def test_a_source_is_repeated_a_million_times_at_most(n, toy, capsys, monkeypatch):
    src = toy()
    with monkeypatch.context() as m:
        m.setattr('nanoarc.sources.read_source', None) # it is not read for that
        with pytest.raises(ValueError, match=f"{n}: want at most 1,000,000 times"):
            read_sources(f"{src}*{n}")
    monkeypatch.setattr('nanoarc.data.MAX_EPOCH', 1000)
    assert "12,000 targets an epoch, want at most 1,000" in refusal(capsys, 'data', 'stats', f"{src}*1000")

# -----------------------------------------------------------------------------
# trees

NAMES = ['B.json', 'a.json', 'a/x.json', 'a-b/y.json', 'a/b/c/z.json']

def make_tree(root):
    """ a tree in which the order of paths and that of strings differ -> {name: task} """
    objs = dict(zip(NAMES, toy_tasks(n=5).values()))
    for name, obj in objs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(obj))
    return objs

def test_a_directory_its_zip_and_their_urls_are_one_corpus(tmp_path):
    objs = make_tree(tmp_path / 'dir')
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for name in reversed(NAMES):
            z.writestr(name, json.dumps(objs[name]))
        for junk in ('__MACOSX/a/._x.json', 'a/._x.json', '.hidden.json', '.git/x.json', 'readme.txt'):
            z.writestr(junk, b"\x00\x05")
        z.writestr('a/b/', b"")
    urls = [f"{way}{tmp_path}/{name}" for way in ('', 'file://') for name in ('dir', 'x.zip')]
    got = {url: read_source(url) for url in urls}
    for c in got.values():
        assert sorted(plain(c)) == sorted(plain(got[urls[0]]))
    assert {x.decode() for x in got[urls[1]].name} == {'B', 'a', 'x', 'y', 'z'}
    names = {url: c.name.tolist() for url, c in got.items()}
    assert len({c.sha256 for c in got.values()}) == 1, names # where it lies does not matter

def test_one_zip_is_open_at_a_time(tmp_path):
    for k in range(30):
        write_any(tmp_path / 'd' / f"{k}.zip", f"t{k}", task([[k % 10]]))
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 15, hard))
    try:
        assert len(read_source(str(tmp_path / 'd'))) == 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

def test_a_zip_may_have_paths_with_backslashes(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        z.writestr('dir\\', b"")
        z.writestr('dir\\x_challenges.json', json.dumps({'a': {**task(), 'test': [{'input': GRID}]}}))
        z.writestr('dir\\x_solutions.json', json.dumps({'a': [GRID]}))
        z.writestr('dir\\.git\\b.json', "junk")
    assert answers_of(read_tasks(str(tmp_path / 'x.zip'))) == [GRID]

def test_kaggle_files_find_each_other_inside_a_zip(tmp_path):
    asked, solutions = as_kaggle(toy_tasks(n=3, queries=2))
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        z.writestr('in/arc_solutions.json', json.dumps(solutions))
        z.writestr('in/arc_challenges.json', json.dumps(asked))
    assert answers_of(read_tasks(str(tmp_path / 'x.zip'))) == sum(solutions.values(), [])
    assert answers_of(read_tasks(str(tmp_path / 'x.zip'), opened=False)) == [None] * 6

def test_splits_of_tasks_are_joined(tmp_path, capsys):
    a, b = toy_tasks(n=2).values()
    path = tmp_path / 'x.json'
    path.write_text(json.dumps({'training': {'a': a}, 'evaluation': {'b': b, 'a': a}}))
    assert [t.name for t in read_tasks(str(path))] == ['a', 'b'] # the same task twice is one
    path.write_text(json.dumps({'train': {'a': a}, 'test': {'b': b}})) # a split may be called so
    assert [t.name for t in read_tasks(str(path))] == ['a', 'b']
    path.write_text(json.dumps({'training': {'a': a}, 'evaluation': {'a': b}}))
    assert "x.json: two different tasks are named a" in refusal(capsys, 'data', 'check', path)
    path.write_text(json.dumps({'training': {'a': a}, 'evaluation': {'b': task([[1, 10]])}}))
    assert "x.json: task b, demo 1, input, row 0, col 1: color 10" in refusal(capsys, 'data', 'check', path)

@pytest.mark.parametrize('junk', [5, None, [], "x", {'no': 1}])
def test_a_broken_task_in_a_split_does_not_hide_the_others(junk, tmp_path):
    a, b = toy_tasks(n=2).values()
    path = tmp_path / 'x.json'
    path.write_text(json.dumps({'training': {'a': a, 'c': junk}, 'evaluation': {'b': b}}))
    with pytest.raises(ValueError, match="x.json: task c: "):
        read_tasks(str(path))
    c = read_source(str(path), on_bad='quarantine')
    assert c.name.tolist() == [b'a', b'b'] and len(c.bad) == 1

# -----------------------------------------------------------------------------
# lists of pairs

def test_a_list_of_pairs_is_dealt_without_loss(tmp_path):
    path = tmp_path / 'x.json'
    for n in (2, 3, 4, 5, 12, 13, 41):
        pairs = make_list(n, seed=n)
        want = sorted([p['input'], p['output']] for p in pairs)
        path.write_text(json.dumps(pairs))
        for deal in range(1, 21):
            c = read_source(str(path), n_demos=deal)
            tasks = all_tasks(c)
            got = [[rows(x), rows(y)] for t in tasks for x, y in t.demos + t.queries]
            assert sorted(got) == want
            assert all(len(t.queries) == 1 for t in tasks)
            assert all(len(t.demos) == deal for t in tasks[:-1]) and 1 <= len(tasks[-1].demos) <= deal + 1
            assert {t.key for t in tasks} == {tasks[0].key}
            assert [t.name for t in tasks] == [f"x.{j}" for j in range(len(tasks))]
            closed = read_source(str(path), opened=False, n_demos=deal)
            assert (closed.hash == c.hash).all() and answers_of(all_tasks(closed)) == [None] * len(c)
    for deal in (0, -1):
        with pytest.raises(ValueError, match=f"deal={deal}: want at least 1"):
            read_source(str(path), n_demos=deal)

def test_how_a_list_is_dealt_depends_on_nothing_around_it(tmp_path):
    for d, names in (('one', 'abc'), ('two', 'cbxa')):
        (tmp_path / d / 'tasks').mkdir(parents=True)
        for name in names:
            (tmp_path / d / 'tasks' / f"{name}.json").write_text(json.dumps(make_list(11, seed=ord(name))))
    (tmp_path / 'two' / 'metadata.json').write_text('{"abc": {"n_examples": 1}}') # RE-ARC's statistics are no task
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for path in sorted((tmp_path / 'two').rglob('*.json'), reverse=True):
            z.write(path, f"re_arc/{path.relative_to(tmp_path / 'two')}")
    one = {x[0]: x for x in plain(read_source(str(tmp_path / 'one'), n_demos=3))}
    for other in ('two', 'x.zip'):
        tasks = {x[0]: x for x in plain(read_source(str(tmp_path / other), n_demos=3))}
        assert len(tasks) == 12 and {name: x for name, x in tasks.items() if name[0] != 'x'} == one
    met = []
    for name in ('a.0', 'a.1', 'a.2'):
        _, _, demos, queries = one[name]
        met += [x for x, _ in demos + queries]
    assert met != [p['input'] for p in make_list(11, seed=ord('a'))] # shuffled, not cut
    shutil.rmtree(tmp_path / 'two' / 'tasks')
    with pytest.raises(ValueError, match="metadata.json: task abc"): # without tasks/ beside it, a file like any other
        read_tasks(str(tmp_path / 'two'))

BAD_LISTS = {
    '[]': "task x: want a list of at least 2 pairs",
    json.dumps(make_list(1)): "task x: want a list of at least 2 pairs",
    json.dumps([*make_list(2), {'input': GRID}]): "task x, pair 2: no key 'output'",
    json.dumps([*make_list(2), [GRID]]): "task x, pair 2: want an object",
    json.dumps([*make_list(2), [GRID, [[10]]]]): "task x, pair 2, output, row 0, col 0: color 10",
    '[1, 2]': "task x, pair 0: want an object",
}

@pytest.mark.parametrize('text', BAD_LISTS)
def test_a_malformed_list_of_pairs_names_the_pair(text, tmp_path, capsys):
    (tmp_path / 'x.json').write_text(text)
    assert f"{tmp_path}/x.json: {BAD_LISTS[text]}" in refusal(capsys, 'data', 'check', tmp_path)

# -----------------------------------------------------------------------------
# .jsonl and .parquet

def test_a_line_of_jsonl_is_a_task_or_a_list_of_pairs(tmp_path):
    t = list(toy_tasks(n=5).values())
    examples = [[p['input'], p['output']] for p in make_list(8)]
    lines = [
        {'id': "a", **t[0]},
        {'task_id': "b", 'name': "title", **t[1]},
        {'name': "c", **t[2]},
        t[3],
        {'id': 7, **t[4]},
        {'source': "def f(x): ...", 'concepts': ["x"], 'examples': examples},
        {'id': "o", 'examples': make_list(4)},
    ]
    path = tmp_path / 'x.jsonl'
    text = b"\n\n  \r\n".join(json.dumps(x).encode() for x in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text) # a BOM, empty lines, no last newline
    tasks = all_tasks(read_source(str(path), n_demos=3))
    assert [x.name for x in tasks] == ['a', 'b', 'c', 'x.10', '7', 'x.16.0', 'x.16.1', 'o.0']
    assert [rows(x.demos[0][0]) for x in tasks[:5]] == [x['train'][0]['input'] for x in t]
    assert set(answers_of(read_tasks(str(path), opened=False))) == {None}

BAD_LINES = {
    '{"id": "a"': "not json",
    '[]': "want an object, got []",
    json.dumps({'id': "a", **task([[1, 10]])}): "task a, demo 1, input, row 0, col 1: color 10",
    json.dumps(task(tests=1)): "task x.4: unknown key 'tests', a typo of 'test'?",
    json.dumps({'id': "", **task()}): "want a task id",
    json.dumps({'id': "i" * 201, **task()}): "want a task id",
    json.dumps({'examples': 1}): "task x.4: want a list of at least 2 pairs",
    json.dumps({'examples': [[GRID, GRID], [GRID, [[1], []]]]}): "task x.4, pair 1, output, row 1",
    json.dumps({'id': "\ud800", 'examples': [[GRID, GRID], [GRID, [[11]]]]}): "want a task id of 1..200 printable",
    json.dumps({'id': "a", **task([[1.0]])}): "task a, demo 1, input, row 0, col 0: want an integer color",
}

@pytest.mark.parametrize('line', BAD_LINES)
def test_a_malformed_line_is_named_by_its_number(line, tmp_path, capsys):
    good = json.dumps({'id': "good", **task()})
    (tmp_path / 'x.jsonl').write_text(f"{good}\n\n\n{line}\n{good}\n")
    err = refusal(capsys, 'data', 'check', tmp_path / 'x.jsonl')
    assert f"x.jsonl: line 4: {BAD_LINES[line]}" in err, err
    c = read_source(str(tmp_path / 'x.jsonl'), on_bad='quarantine')
    assert c.name.tolist() == [b'good'] and BAD_LINES[line] in c.bad[0]

@pytest.mark.parametrize('name, text, want', [
    ('x.json', f"{json.dumps(task())}\n{json.dumps(task())}", "extra data at line 2 column 1, is it .jsonl?"),
    ('x.jsonl', json.dumps(task(), indent=1), "line 1: not a record, is it .json?"),
    ('x.jsonl', json.dumps([task()], indent=1), "line 1: not a record, is it .json?"),
    ('x.json', json.dumps([{'id': "a", **task()}]), "a list of tasks, want an object of tasks by id, or .jsonl"),
])
def test_a_file_that_is_called_by_the_wrong_name_is_told_the_right_one(name, text, want, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert want in refusal(capsys, 'data', 'check', tmp_path / name)

@pytest.mark.parametrize('name', [{'a': 1}, [], True])
def test_an_id_is_text_or_a_number(name, tmp_path):
    (tmp_path / 'x.jsonl').write_text(json.dumps({'id': name, **task()}))
    with pytest.raises(ValueError, match="x.jsonl: line 1: want a task id"):
        read_tasks(str(tmp_path / 'x.jsonl'))

def cap_json(monkeypatch, n):
    """ no json over n bytes """
    monkeypatch.setattr('nanoarc.corpus.MAX_JSON_BYTES', n)
    monkeypatch.setattr('nanoarc.sources.MAX_JSON_BYTES', n)

def test_a_line_over_the_cap_is_one_bad_line(tmp_path, monkeypatch):
    lines = [json.dumps(task()), json.dumps({'name': "a" * 5000, **task()}), json.dumps(task([[5]]))]
    (tmp_path / 'x.jsonl').write_text("\n".join(lines))
    cap_json(monkeypatch, 1000)
    with pytest.raises(ValueError, match="x.jsonl: line 2: over 0 MiB"):
        read_tasks(str(tmp_path / 'x.jsonl'))
    c = read_source(str(tmp_path / 'x.jsonl'), on_bad='quarantine')
    assert len(c.bad) == 1 and c.name.tolist() == [b'x.1', b'x.3'] # the lines behind it keep their numbers

@pytest.mark.parametrize('name', ["a b/c", "\u00e9\u4e2d", "a\\b", "a" * 200, "cost $0^^2$", "[/x]"])
def test_an_id_of_any_printable_characters_comes_back(name, tmp_path):
    for obj, tail in ((task(), ""), ({'examples': [[GRID, GRID]] * 3}, ".0")):
        (tmp_path / 'x.jsonl').write_text(json.dumps({'id': name, **obj}))
        assert read_tasks(str(tmp_path / 'x.jsonl'))[0].name == name + tail

# a name that breaks a line, a terminal or an encoding
NO_NAMES = ["a\nb", "a\r", "a\tb", "\x1b[31m", "a\x7f", "\x85", "a\u2028b", "\u2029", "\ud800", "\udcff", "\u202e",
            "\0"]

@pytest.mark.parametrize('name', NO_NAMES)
def test_no_name_breaks_a_line_whatever_file_it_comes_from(name, tmp_path, capsys):
    path, obj = tmp_path / 'd', task()
    path.mkdir()
    files = {
        'x.json': json.dumps({name: obj, 'good': obj}),
        'x_challenges.json': json.dumps({'training': {name: obj, 'good': obj}, 'evaluation': {'good': obj}}),
        'x.jsonl': json.dumps({'id': name, **obj}) + "\n" + json.dumps({'id': "good", **obj}),
        'y.jsonl': json.dumps({'id': name, 'examples': make_list(4)}) + "\n" + json.dumps({'id': "good", **obj}),
    }
    for file, text in files.items():
        (path / file).write_text(text)
        err = refusal(capsys, 'data', 'check', path)
        assert "want a task id of 1..200 printable characters" in err and err[:-1].isprintable(), file
        c = read_source(str(path), on_bad='quarantine')
        assert c.name.tolist() == [b'good'] and len(c.bad) == 1 and c.bad[0].isprintable(), file
        (path / file).unlink()
    if name in ("\0", "\ud800"): # no file can have it
        return
    (path / f"{name}.json").write_text(json.dumps(obj))
    (path / 'good.json').write_text(json.dumps(obj))
    err = refusal(capsys, 'data', 'check', path)
    assert "want a task id of 1..200 printable characters" in err and err[:-1].isprintable()
    cli(['data', 'check', str(path), '--on_bad', 'quarantine'])
    assert [line.isprintable() for line in capsys.readouterr().out.split("\n")] == [True] * 3 # counts, one left out, ""

def test_a_message_is_one_line_whatever_the_source_is_called(tmp_path, capsys):
    path = tmp_path / "a\n\x1b[31m\u2028"
    for source in (path, f"{path}*2", f"{path}+x", f"file://{path}", f"{path}/x.zip"):
        err = refusal(capsys, 'data', 'check', source)
        assert "no such source" in err and err[:-1].isprintable()
    path.mkdir()
    (path / 'x.json').write_text(json.dumps(task()))
    c = read_source(str(path))
    assert c.source.isprintable() and c.task(0).source == c.source
    cli(['data', 'check', str(path)])
    assert capsys.readouterr().out.count("\n") == 1

def test_ids_that_differ_in_a_nul_alone_are_refused_or_kept(tmp_path):
    objs = {"a": task(), "a\0": task([[5]]), "\0": task([[6]])} # numpy drops a NUL at the end
    (tmp_path / 'x.json').write_text(json.dumps(objs))
    try:
        names = [t.name for t in read_tasks(str(tmp_path / 'x.json'))]
    except ValueError as e:
        assert "x.json: " in str(e) and str(e).isprintable()
    else:
        assert len(set(names)) == 3 and "" not in names

def write_table(path, records, cells=None, column='train'):
    """ records as .parquet; the cells of a column as the given type """
    table = pl.DataFrame(records)
    if cells:
        pair = pl.Struct({'input': pl.List(pl.List(cells)), 'output': pl.List(pl.List(cells))})
        table = table.cast({column: pl.List(pair)})
    table.write_parquet(path)

INTEGERS = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]

def test_a_row_of_parquet_is_a_task_or_a_list_of_pairs(tmp_path):
    objs, path = list(toy_tasks(n=3).values()), tmp_path / 'x.parquet'
    lines = [json.dumps({'id': f"t{k}", **obj}) for k, obj in enumerate(objs)]
    (tmp_path / 'x.jsonl').write_text("\n".join(lines))
    for dtype in INTEGERS:
        write_table(path, [{'id': f"t{k}", 'more': 1.5, **obj} for k, obj in enumerate(objs)], dtype)
        assert plain(read_source(str(path))) == plain(read_source(str(tmp_path / 'x.jsonl'))), dtype
        write_table(path, [{'id': "x", 'examples': make_list(8)}], dtype, 'examples')
        assert read_source(str(path), n_demos=3).name.tolist() == [b'x.0', b'x.1']
    for ids, names in (
        ([{}] * 3, ['x.0', 'x.1', 'x.2']),
        ([{'name': f"n{k}"} for k in range(3)], ['n0', 'n1', 'n2']),
        ([{'task_id': k, 'name': "n"} for k in range(3)], ['0', '1', '2']),
    ):
        write_table(path, [{**x, **obj} for x, obj in zip(ids, objs)])
        assert [t.name for t in read_tasks(str(path))] == names
    assert answers_of(read_tasks(str(path), opened=False)) == [None] * 3
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        z.write(path, 'in/x.parquet')
    want = plain(read_source(str(path)))
    assert plain(read_source(str(tmp_path / 'x.zip'))) == want == plain(read_source(f"file://{path}"))

PLACES = {'train': "demo 0", 'test': "query 0", 'examples': "pair 0"}

@pytest.mark.parametrize('column', PLACES)
@pytest.mark.parametrize('cells', [pl.Float32, pl.Float64, pl.Boolean, pl.String])
def test_a_cell_of_a_table_that_is_no_integer_is_named(cells, column, tmp_path, capsys):
    path = tmp_path / 'x.parquet'
    records = [{'id': "a", 'examples': make_list(4)}] if column == 'examples' else [{'id': "a", **task()}]
    write_table(path, records, cells, column)
    want = f"{path}: row 0: task a, {PLACES[column]}, input, row 0, col 0: want an integer color 0..9, got "
    assert want in refusal(capsys, 'data', 'check', path)

def test_a_malformed_table_or_row_is_named(tmp_path, capsys):
    path, good = tmp_path / 'x.parquet', {'id': "good", **task()}
    columns = "want columns 'train' and 'test', or 'examples', found"
    for records, want in (
        ([{'id': "a", 'train': task()['train']}], f"{columns} ['id', 'train']"),
        ([{'a': 1}], columns),
        ([good, {'id': "a", **task([[300]])}], "row 1: task a, demo 1, input, row 0, col 0: color 300"),
        ([good, {'id': "a", **task([[-1]])}], "row 1: task a, demo 1, input, row 0, col 0: color -1"),
        ([good, {'id': "a", **task([[1], [1, 2]])}], "row 1: task a, demo 1, input, row 1: has 2"),
        ([good, {'id': "a", 'train': None, 'test': task()['test']}], "row 1: task a: want a list in 'train'"),
        ([good, {'id': "", **task()}], "row 1: want a task id"),
        ([{'id': "a", 'examples': make_list(1)}], "row 0: task a: want a list of at least 2 pairs"),
    ):
        write_table(path, records)
        assert f"x.parquet: {want}" in refusal(capsys, 'data', 'check', path)
    data = path.read_bytes()
    for broken in (b"", b"PAR1", b"hello", data[:-9], data[9:], json.dumps(task()).encode()):
        path.write_bytes(broken)
        assert "x.parquet: not parquet" in refusal(capsys, 'data', 'check', path)

def test_a_table_may_mix_known_and_unknown_answers(tmp_path):
    queries = [{'input': GRID, 'output': GRID}, {'input': [[5]], 'output': None}]
    write_table(tmp_path / 'x.parquet', [{'id': "a", 'train': [{'input': GRID, 'output': GRID}], 'test': queries}])
    assert answers_of(read_tasks(str(tmp_path / 'x.parquet'))) == [GRID, None]

def by_column(pairs):
    """ list of pairs -> the layout that `datasets` stores a sequence of them in """
    return {key: [pair.get(key) for pair in pairs] for key in ('input', 'output')}

def test_a_table_may_have_pairs_by_column(tmp_path):
    objs, path = toy_tasks(n=3, queries=2), tmp_path / 'x.parquet'
    (tmp_path / 'x.json').write_text(json.dumps(objs))
    want = plain(read_source(str(tmp_path / 'x.json')))
    rows_by = []
    for name, obj in objs.items():
        rows_by.append({'id': name, 'train': by_column(obj['train']), 'test': by_column(obj['test'])})
    pl.DataFrame(rows_by).write_parquet(path)
    assert plain(read_source(str(path))) == want
    (tmp_path / 'x.jsonl').write_text("\n".join(map(json.dumps, rows_by))) # as `datasets` writes it
    assert plain(read_source(str(tmp_path / 'x.jsonl'))) == want
    (tmp_path / 'x.json').write_text(json.dumps({x.pop('id'): x for x in rows_by}))
    assert plain(read_source(str(tmp_path / 'x.json'))) == want
    (tmp_path / 'toy0000.json').write_text(json.dumps(rows_by[0]))
    assert plain(read_source(str(tmp_path / 'toy0000.json'))) == want[:1]
    pl.DataFrame([{'id': "l", 'examples': by_column(make_list(4))}]).write_parquet(path)
    assert len(read_source(str(path)).hash) == 4

@pytest.mark.parametrize('test', [
    [{'input': GRID, 'output': None}], {'input': [GRID], 'output': [None]}, {'input': [GRID], 'output': None},
    {'input': [GRID]}, [{'input': GRID}],
])
def test_a_column_of_outputs_that_is_null_is_of_unknown_answers(test, tmp_path):
    pl.DataFrame([{'id': "a", 'train': task()['train'], 'test': test}]).write_parquet(tmp_path / 'x.parquet')
    assert answers_of(read_tasks(str(tmp_path / 'x.parquet'))) == [None]

@pytest.mark.parametrize('test, want', [
    ([None], "query 0: want an object with input, got None"), ([1], "query 0: want an object with input, got 1 (int)"),
    (["a"], "query 0: want an object with input, got 'a'"), (None, "want a list in 'test', got NoneType"),
    (1, "want a list in 'test', got int"), ("text", "want a list in 'test', got str"), ([], "no queries"),
    ([{'input': None, 'output': GRID}], "query 0, input: want a grid"), ({'input': None, 'output': None}, "no queries"),
    ({'input': [GRID], 'output': [GRID, GRID]}, "want a list in 'test', got dict"),
    ([[GRID, GRID]], "query 0: want an object with input"),
])
def test_a_row_whose_queries_are_none_is_one_bad_row(test, want, tmp_path, capsys):
    path = tmp_path / 'x.parquet'
    pl.DataFrame([{'id': "a", 'train': task()['train'], 'test': test}]).write_parquet(path)
    assert f"x.parquet: row 0: task a: {want}".replace(": query", ", query") in refusal(capsys, 'data', 'check', path)

def test_a_null_inside_test_costs_its_row_alone(tmp_path):
    write_table(tmp_path / 'x.parquet', [{'id': "a", **task(), 'test': [None]}, {'id': "good", **task()}])
    c = read_source(str(tmp_path / 'x.parquet'), on_bad='quarantine')
    assert c.name.tolist() == [b'good'] and len(c.bad) == 1

# -----------------------------------------------------------------------------
# URLs

@pytest.fixture
def memory():
    """ a file system of its own in memory """
    fs = pytest.importorskip('fsspec').filesystem('memory')
    fs.store.clear()
    yield fs
    fs.store.clear()

def test_a_url_is_a_file_a_folder_or_a_zip(memory, tmp_path):
    objs = make_tree(tmp_path / 'dir')
    (tmp_path / 'dir' / '.git').mkdir()
    (tmp_path / 'dir' / '.git' / 'x.json').write_text("junk")
    shutil.make_archive(tmp_path / 'x', 'zip', tmp_path / 'dir')
    write_table(tmp_path / 'x.parquet', [{'id': "a", **task()}])
    memory.put(str(tmp_path / 'dir'), '/deep/dir', recursive=True)
    for name in ('x.zip', 'x.parquet'):
        memory.pipe(f'/deep/{name}', (tmp_path / name).read_bytes())
    for way in ('memory://deep', f"file://{tmp_path}"):
        for name in ('dir', 'x.zip'):
            assert sorted(t.name for t in read_tasks(f"{way}/{name}")) == ['B', 'a', 'x', 'y', 'z']
        one = read_tasks(f"{way}/dir/a/x.json")
        assert len(one) == 1 and rows(one[0].demos[0][0]) == objs['a/x.json']['train'][0]['input']
        assert [t.name for t in read_tasks(f"{way}/x.parquet")] == ['a']
        assert len(read_tasks(f"{way}/dir*3 + arc2/evaluation")) == 125
        assert answers_of(read_tasks(f"{way}/dir/a/x.json", opened=False)) == [None]

def test_what_is_wrong_behind_a_url_is_one_line(memory, tmp_path, capsys, monkeypatch):
    memory.pipe('/d/bad.json', json.dumps(task([[10]])).encode())
    memory.pipe('/d/good.json', json.dumps(task()).encode())
    (tmp_path / 'bad.json').write_text(json.dumps(task([[10]])))
    for url, want in (
        ('memory://d', "/d/bad.json: task bad, demo 1, input, row 0, col 0: color 10"),
        (f'file://{tmp_path}', f"file://{tmp_path}/bad.json: task bad, demo 1"),
        ('nope://x/y.json', "nope://x/y.json: ValueError: 'Protocol not known: nope'"),
        ('memory://no/such/dir', "memory://no/such/dir: "),
        ('memory://no/such.json', "memory://no/such.json: "),
        (f'file://{tmp_path}/no.json', f"file://{tmp_path}/no.json: "),
    ):
        assert want in refusal(capsys, 'data', 'check', url)
    assert read_source('memory://d', on_bad='quarantine').name.tolist() == [b'good']
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'fsspec' else find(name))
    assert "memory://d: to read URLs, pip install fsspec" in refusal(capsys, 'data', 'check', 'memory://d')

def test_a_host_that_is_not_there_is_no_missing_file(capsys):
    pytest.importorskip('fsspec')
    pytest.importorskip('aiohttp')
    err = refusal(capsys, 'data', 'check', 'http://127.0.0.1:1/x.json')
    assert "127.0.0.1:1/x.json: ClientConnectorError: " in err and "Cannot connect to host 127.0.0.1:1" in err

def test_what_to_install_for_a_url_is_said_in_whole(memory, capsys, monkeypatch):
    for sentence in ('HTTPFileSystem requires "requests" and "aiohttp" to be installed',
                     "Install huggingface_hub to access HfFileSystem"):
        def refuse(url):
            raise ImportError(sentence)
        monkeypatch.setattr('fsspec.core.url_to_fs', refuse)
        assert sentence in refusal(capsys, 'data', 'check', 'https://example.com/z.json')

def test_behind_a_url_nothing_is_left_out_in_silence_either(memory, capsys):
    memory.pipe('/d/A.JSON', json.dumps(task()).encode())
    memory.pipe('/d/b.json.gz', gzip.compress(json.dumps(task([[5]])).encode()))
    memory.pipe('/d/README.md', b"x")
    memory.pipe('/q.json?download=true', json.dumps(task([[6]])).encode())
    assert sorted(t.name for t in read_tasks('memory://d')) == ['A', 'b']
    assert [t.name for t in read_tasks('memory://q.json?download=true')] == ['q']
    memory.pipe('/d/c.csv', b"x")
    assert "/d/c.csv: nothing here reads .csv" in refusal(capsys, 'data', 'check', 'memory://d')
    assert len(read_source('memory://d', on_bad='quarantine').bad) == 1

# -----------------------------------------------------------------------------
# quarantine

def test_quarantine_leaves_out_whole_tasks_and_says_so(toy, tmp_path, capsys):
    good = read_source(toy('dir'))
    src = tmp_path / 'dir'
    d, e = json.dumps({'id': "d", **task([[5]])}), json.dumps({'id': "e", **task([[12]])})
    (src / 'broken.json').write_text("{")
    (src / 'list.json').write_text(json.dumps([*make_list(9), {'input': GRID}]))
    (src / 'many.json').write_text(json.dumps({'a': task([[10]]), 'b': task(), 'c': task([[11]])}))
    (src / 'lines.jsonl').write_text(f"{d}\n{e}")
    (src / 'x.parquet').write_bytes(b"PAR1")
    want = ['broken.json: not json', 'lines.jsonl: line 2: task e, demo 1, input', 'list.json: task list, pair 9: no',
            'many.json: task a, demo 1, input', 'many.json: task c', 'x.parquet: not parquet']
    assert want[0] in refusal(capsys, 'data', 'check', src)
    with pytest.raises(ValueError, match="on_bad='ignore': want raise or quarantine"):
        read_source(str(src), on_bad='ignore')
    c = read_source(str(src), on_bad='quarantine')
    assert len(c.bad) == len(want)
    for words, error in zip(want, sorted(c.bad)):
        assert words in error and "\n" not in error
    tasks = {t[0]: t for t in plain(c)}
    assert tasks.keys() == {'b', 'd', 'list.0', 'toy0000', 'toy0001', 'toy0002'}
    assert all(tasks[t[0]] == t for t in plain(good))
    cli(['data', 'check', str(src), '--on_bad', 'quarantine'])
    out = capsys.readouterr().out
    assert f"{src}: 6 tasks, 23 demos, 6 queries, 6 of them" in out
    assert out.count("left out: ") == 6 and all(words in out for words in want)
    shutil.copytree(src, tmp_path / 'whole') # the good tasks alone are another corpus
    for name in ('broken.json', 'x.parquet'):
        (tmp_path / 'whole' / name).unlink()
    (tmp_path / 'whole' / 'list.json').write_text(json.dumps(make_list(9)))
    (tmp_path / 'whole' / 'many.json').write_text(json.dumps({'b': task()}))
    (tmp_path / 'whole' / 'lines.jsonl').write_text(d)
    whole = read_source(str(tmp_path / 'whole'), on_bad='quarantine')
    assert whole.bad == [] and (whole.cells == c.cells).all() and (whole.name == c.name).all()
    assert whole.sha256 != c.sha256

def test_of_a_list_quarantine_leaves_out_the_bad_pairs_alone(tmp_path, capsys):
    pairs, path = make_list(40), tmp_path / 'x.json'
    tall = {'input': [[1]] * 31, 'output': [[1]]}
    path.write_text(json.dumps(pairs))
    whole = read_source(str(path))
    for bad in ([0], [39], [3, 4, 5], range(0, 40, 2), range(38)):
        obj = [tall if i in bad else pair for i, pair in enumerate(pairs)]
        path.write_text(json.dumps(obj))
        assert f"task x, pair {bad[0]}, input: want 1..30 rows, got 31" in refusal(capsys, 'data', 'check', path)
        (tmp_path / 'x.jsonl').write_text(json.dumps({'id': "x", 'examples': obj}))
        for source in (path, tmp_path / 'x.jsonl'):
            c = read_source(str(source), on_bad='quarantine')
            got = [[rows(x), rows(y)] for t in all_tasks(c) for x, y in t.demos + t.queries]
            assert sorted(got) == sorted([p['input'], p['output']] for i, p in enumerate(pairs) if i not in bad)
            assert [f"pair {i}, input: want 1..30 rows" in error for i, error in zip(bad, c.bad)] == [True] * len(bad)
            assert len({t.key for t in all_tasks(c)}) == 1
    path.write_text(json.dumps(pairs + [tall]))
    c = read_source(str(path), on_bad='quarantine') # the other pairs are dealt as they are without it
    assert plain(c) == plain(whole) and len(c.bad) == 1
    path.write_text(json.dumps([tall] * 5 + pairs[:1]))
    with pytest.raises(ValueError, match="not one whole task, 6 in quarantine"): # one pair is no task
        read_source(str(path), on_bad='quarantine')

def test_quarantine_leaves_out_the_task_with_the_float_and_no_other(tmp_path, capsys):
    for bad, want in (
        ('1.0', "demo 1, input, row 0, col 1: want an integer color 0..9, got 1.0 (float)"),
        ('1e400', "demo 1, input, row 0, col 1: want an integer color 0..9, got inf (float)"),
        ('NaN', "demo 1, input, row 0, col 1: want an integer color 0..9, got nan (float)"),
        ('1]], "input": [[1, 2', "demo 1, input: want a grid, that is a list of rows, got a duplicate key"),
        ('1]], "mask": [[0.5]], "mask": [[2', None),
    ):
        text = json.dumps({'a': task(), 'b': task([[7, "@"]]), 'c': task()}).replace('"@"', bad)
        path = tmp_path / 'x_challenges.json'
        path.write_text(text)
        if want:
            assert f"{path}: task b, {want}" in refusal(capsys, 'data', 'check', path)
        c = read_source(str(path), on_bad='quarantine')
        assert c.name.tolist() == ([b'a', b'c'] if want else [b'a', b'b', b'c'])
    path.write_text(json.dumps({'a': task(), 'b': task(), 'c': task()}).replace('"c"', '"a"'))
    assert f"{path}: task a: want an object with train and test, got a duplicate key" in \
        refusal(capsys, 'data', 'check', path)
    assert read_source(str(path), on_bad='quarantine').name.tolist() == [b'b']
    solutions = json.dumps({'a': [GRID], 'b': [[[7, 1.0]]], 'c': [GRID]})
    path.write_text(json.dumps({'a': task(), 'b': task(), 'c': task()}))
    (tmp_path / 'x_solutions.json').write_text(solutions)
    assert "task b, query 0, solution, row 0, col 1: want an integer" in refusal(capsys, 'data', 'check', path)
    assert read_source(str(path), on_bad='quarantine').name.tolist() == [b'a', b'c']

def test_a_broken_file_alone_is_no_quarantine(tmp_path):
    (tmp_path / 'x.json').write_text("{")
    for source in (tmp_path, tmp_path / 'x.json'):
        with pytest.raises(ValueError, match="x.json: not json"):
            read_source(str(source), on_bad='quarantine')
    (tmp_path / 'x.json').write_text(json.dumps({'a': task([[10]])}))
    with pytest.raises(ValueError, match="not one whole task, 1 in quarantine, the first: .*x.json: task a, demo 1"):
        read_source(str(tmp_path), on_bad='quarantine')

def test_a_file_without_a_task_is_no_quarantine_either(tmp_path, capsys):
    (tmp_path / 'x.jsonl').write_text("\n")
    err = refusal(capsys, 'data', 'check', tmp_path / 'x.jsonl', '--on_bad', 'quarantine')
    assert err.endswith("x.jsonl: not one whole task, 1 in quarantine, the first: "
                        f"{tmp_path}/x.jsonl: no line in it\n")

def test_a_corpus_in_quarantine_may_move(toy, tmp_path, monkeypatch):
    for name in ('here', 'there'):
        toy(name)
        (tmp_path / name / 'broken.json').write_text("{")
        (tmp_path / name / 'lines.jsonl').write_text(json.dumps({'id': "e", **task([[12]])}))
    shutil.make_archive(tmp_path / 'x', 'zip', tmp_path / 'there')
    monkeypatch.chdir(tmp_path)
    sources = [str(tmp_path / 'here'), str(tmp_path / 'there'), f"{tmp_path}/there/", 'there', './there',
               f"file://{tmp_path}/there", 'x.zip', './x.zip', f"file://{tmp_path}/x.zip"]
    got = {source: read_source(source, on_bad='quarantine') for source in sources}
    assert len({c.sha256 for c in got.values()}) == 1, {source: c.bad for source, c in got.items()}
    assert len(got['there'].bad) == 2

# -----------------------------------------------------------------------------
# malformed input: one line that names file, task and place, exit code 2

COLOR = "want an integer color 0..9, got"
IN_GRID = 'bad.json: task bad, demo 1, input'
MALFORMED = {
    'ragged': (task([[1, 2], [3]]), f"{IN_GRID}, row 1: has 1 cells, row 0 has 2"),
    'ten': (task([[1, 10], [3, 4]]), f"{IN_GRID}, row 0, col 1: color 10 is outside 0..9"),
    'negative': (task([[1, 2], [-1, 4]]), f"{IN_GRID}, row 1, col 0: color -1 is outside"),
    'wraps': (task([[256, 2]]), f"{IN_GRID}, row 0, col 0: color 256 is outside"),
    'huge': (task([[10**30, 2]]), f"{IN_GRID}, row 0, col 0: color 1000000000"),
    'bool': (task([[1, True]]), f"{IN_GRID}, row 0, col 1: {COLOR} True (bool)"),
    'null': (task([[None, 1]]), f"{IN_GRID}, row 0, col 0: {COLOR} None"),
    'digit': (task([["1", 1]]), f"{IN_GRID}, row 0, col 0: {COLOR} '1' (str)"),
    'no rows': (task([]), f"{IN_GRID}: want 1..30 rows, got 0"),
    'empty row': (task([[]]), f"{IN_GRID}, row 0: want 1..30 cells, got 0"),
    '1d': (task([1, 2]), f"{IN_GRID}, row 0: want a list of colors, got 1 (int)"),
    '3d': (task([[[1]]]), f"{IN_GRID}, row 0, col 0: {COLOR} [1] (list)"),
    'tall': (task([[1]] * 31), f"{IN_GRID}: want 1..30 rows, got 31"),
    'wide': (task([[1] * 31]), f"{IN_GRID}, row 0: want 1..30 cells, got 31"),
    'a dict': (task({'rows': GRID}), f"{IN_GRID}: want a grid"),
    'a string': (task("12\n34"), f"{IN_GRID}: want a grid, that is a list of rows, got '12\\n34' (str)"),
    'no output': ({**task(), 'train': [{'input': GRID}]}, "bad.json: task bad, demo 0: no key 'output'"),
    'typo': ({**task(), 'test': [{'input': GRID, 'outputs': GRID}]},
             "bad.json: task bad, query 0: unknown key 'outputs'"),
    'no test': ({'train': task()['train']}, "bad.json: task bad: no key 'test'"),
    'no demos': ({**task(), 'train': []}, "bad.json: task bad: no demos"),
    'no queries': ({**task(), 'test': []}, "bad.json: task bad: no queries"),
    'demos a dict': ({**task(), 'train': {'0': 1}}, "bad.json: task bad: want a list in 'train'"),
    'a pair is a list': ({**task(), 'train': [[GRID, GRID]]},
                         "bad.json: task bad, demo 0: want an object with input and output"),
    'typo of a part': (task(tests=[]), "bad.json: task bad: unknown key 'tests', a typo of 'test'?"),
    'a list': ([task(), task()], "bad.json: a list of tasks, want"),
    'a float': (task([[1.0]]), f"{IN_GRID}, row 0, col 0: {COLOR} 1.0 (float)"),
    'overflow': (json.dumps(task([["@"]])).replace('"@"', "1e400"), f"{IN_GRID}, row 0, col 0: {COLOR} inf (float)"),
    'NaN': (task([[float('nan')]]), f"{IN_GRID}, row 0, col 0: {COLOR} nan (float)"),
    'duplicate key': ('{"train": [], "test": [1], "train": []}',
                      "bad.json: task bad: want a list in 'train', got DuplicateKey"),
    'trailing comma': ('{"train": [],}', "bad.json: not json, "),
    'truncated': (json.dumps(task())[:-9], "bad.json: not json, "),
    'empty': ('', "bad.json: not json, expecting value at line 1 column 1"),
    'a NUL': ('\x00', "bad.json: not json, "),
    'latin-1': (b'{"train": "\xe9"}', "bad.json: not UTF-8 at byte 11"),
    'deep': ('[' * 200_000, "bad.json: nested too deeply"),
    '5000 digits': (json.dumps(task([[1, "@"]])).replace('"@"', '-' + '9' * 5000),
                    f"{IN_GRID}, row 0, col 1: color -9999999"),
    'control characters in an id': ({'a\n\x1b[31m': task()}, "bad.json: want a task id of 1..200 printable"),
    'demos by name': ({'abc': {'train': {'a': 1}, 'test': {}}}, "bad.json: task abc: want a list in 'train'"),
    'control characters': (task([["\x1b[31m" + "x" * 99]]), f"{IN_GRID}, row 0, col 0: {COLOR} '\\x1b[31mxxx"),
}

@pytest.mark.parametrize('kind', MALFORMED)
def test_malformed_input_is_one_line_that_names_the_place(kind, tmp_path, capsys):
    data, want = MALFORMED[kind]
    if type(data) in (dict, list):
        data = json.dumps(data)
    if type(data) is str:
        data = data.encode()
    path = tmp_path / 'bad.json'
    path.write_bytes(data)
    assert f"{tmp_path}{os.sep}{want}" in refusal(capsys, 'data', 'check', path)

# other collections have keys of their own
MORE = {'uuid': "x", 'id': 7, 'name': "stray", 'descriptions': [{'time': 37.165}], 'text': "rotate", 'best': None,
        'training_set': [], 'metadata': {'score': 1.5, 'nan': float('nan')}, 'solution': [1.0], 'a\nb': 1}

def write_in_each_format(folder, obj):
    """ -> paths of .json, .jsonl and .parquet with this one task """
    folder.mkdir()
    (folder / 'a.json').write_text(json.dumps(obj))
    (folder / 'x_challenges.json').write_text(json.dumps({'a': obj}))
    (folder / 'x.jsonl').write_text(json.dumps({**obj, 'id': "a"}))
    pl.DataFrame([{**obj, 'id': "a"}]).write_parquet(folder / 'x.parquet')
    return list(folder.glob('*'))

def test_further_keys_pass_in_each_format(tmp_path):
    obj = task()
    (tmp_path / 'a.json').write_text(json.dumps(obj))
    want = plain(read_source(str(tmp_path / 'a.json')))
    for part in (obj, obj['train'][0], obj['test'][0]): # of a task, of a demo, of a query
        part.update(MORE)
    for path in write_in_each_format(tmp_path / 'more', obj):
        assert plain(read_source(str(path))) == want, path
    (tmp_path / 'list.json').write_text(json.dumps([{**pair, **MORE} for pair in make_list(4)]))
    assert len(read_source(str(tmp_path / 'list.json')).hash) == 4

TYPOS = [('train', 'Train'), ('train', 'trian'), ('train', 'train '), ('test', 'tests'), ('test', 'TEST'),
         ('test', 'tst'), ('output', 'ouput'), ('output', 'Output'), ('output', 'outputs'), ('input', 'imput'),
         ('input', 'inputs')]

@pytest.mark.parametrize('meant, typo', TYPOS)
@pytest.mark.parametrize('beside', [True, False])
def test_a_typo_of_a_known_key_is_refused_by_name_in_each_format(meant, typo, beside, tmp_path, capsys):
    for place in ("", ", demo 1", ", query 0"):
        obj = json.loads(json.dumps(task()))
        part = {"": obj, ", demo 1": obj['train'][1], ", query 0": obj['test'][0]}[place]
        if meant not in part:
            continue
        part[typo] = part[meant]
        if not beside:
            del part[meant]
        for path in write_in_each_format(tmp_path / f"in{place}", obj):
            err, want = refusal(capsys, 'data', 'check', path), f"unknown key {typo!r}, a typo of {meant!r}?"
            where = "" if path.suffix == '.parquet' else f": task a{place}: " # in a table all pairs have one key
            assert where + want in err, path

def test_kaggle_files_that_do_not_match_name_the_task(tmp_path):
    path, solved = tmp_path / 'x_challenges.json', tmp_path / 'x_solutions.json'
    path.write_text(json.dumps(toy_tasks(n=2)))
    for solutions, want in (
        ({'toy0000': [GRID]}, "x_solutions.json: task ids differ.*toy0001"),
        ({'toy0000': [GRID, GRID], 'toy0001': [GRID]}, "task toy0000: 1 queries but 2 solutions"),
        ({'toy0000': [[[11]]], 'toy0001': [GRID]}, "task toy0000, query 0, solution, row 0, col 0: color 11"),
        ({'toy0000': [], 'toy0001': [GRID]}, "toy0000: want a list of grids"),
        ([[GRID], [GRID]], "x_solutions.json: want answers by task id, those of x_challenges.json, got list"),
        ({'a\n\x1b[31m' + "z" * 500: [GRID]}, "^[ -~]{1,400}$"), # one line, whatever is in an id
    ):
        solved.write_text(json.dumps(solutions))
        with pytest.raises(ValueError, match=want):
            read_tasks(str(path))

@pytest.mark.parametrize('source', ['no/such/thing', 'arc1/test', 'arc3'])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(ValueError, match=f"{source}: no such source"):
        read_tasks(source)

def test_two_different_tasks_of_one_name_are_refused(tmp_path):
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / 'x.json').write_text(json.dumps(toy_tasks(n=1, seed=k)['toy0000']))
    with pytest.raises(ValueError, match="two different tasks are named x"):
        read_tasks(str(tmp_path))
    (tmp_path / '1' / 'x.json').write_text((tmp_path / '0' / 'x.json').read_text())
    assert len(read_tasks(str(tmp_path))) == 1 # the same task twice is one
    task = toy_tasks(n=1)['toy0000']
    task['test'][0]['output'] = [[0] * 9]
    (tmp_path / '1' / 'x.json').write_text(json.dumps(task))
    with pytest.raises(ValueError, match="two different tasks are named x"): # but not with another answer
        read_tasks(str(tmp_path))

@pytest.mark.parametrize('there', ['a.json', 'b.jsonl', 'b.parquet', 'b.zip', 'list.jsonl'])
def test_of_two_tasks_of_one_name_both_places_are_named_and_the_first_is_kept(there, tmp_path, capsys):
    a, b = {'id': "t", **task()}, {'id': "t", **task([[5]])}
    if there == 'list.jsonl': # t.0 and t.1 twice
        a, b = ({'id': "t", 'examples': make_list(6, seed)} for seed in range(2))
    path = tmp_path / there
    places = [f"{path}: line 1", f"{path}: line 3"]
    if there == 'a.json': # and another file
        path.write_text(json.dumps({'t': a}))
        (tmp_path / 'b.jsonl').write_text(json.dumps(b))
        places = [str(path), f"{tmp_path}/b.jsonl: line 1"]
    elif there == 'b.parquet':
        write_table(path, [a, b])
        places = [f"{path}: row 0", f"{path}: row 1"]
    elif there == 'b.zip':
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('x/t.json', json.dumps(a))
            z.writestr('y/t.json', json.dumps(b))
        places = [f"{path}: x/t.json", f"{path}: y/t.json"]
    else:
        path.write_text(f"{json.dumps(a)}\n\n{json.dumps(b)}")
    name = "t"
    if there == 'list.jsonl':
        name, places = "t.0", [f"{place}: task t" for place in places]
    way_out = "rename one, or join their files or folders with +" if there == 'a.json' else "rename one"
    want = f"{places[1]}: two different tasks are named {name}, the other in {places[0]}: {way_out}"
    assert refusal(capsys, 'data', 'check', tmp_path) == f"nanoarc: {want}\n"
    c = read_source(str(tmp_path), on_bad='quarantine', n_demos=2)
    assert c.bad == [want] and len(c) == (2 if there == 'list.jsonl' else 1)
    first = [pair['input'] for pair in a.get('train', a.get('examples'))]
    assert all(rows(x) in first for t in all_tasks(c) for x, _ in t.demos)

def test_an_empty_directory_and_a_giant_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no .json, .jsonl, .ndjson, .parquet file in it"):
        read_tasks(str(tmp_path))
    cap_json(monkeypatch, 100)
    (tmp_path / 'x.json').write_text(json.dumps(task()))
    with pytest.raises(ValueError, match="x.json: over 0 MiB"):
        read_tasks(str(tmp_path))

def test_kaggles_own_directory_is_read_as_it_is(tmp_path):
    tasks = toy_tasks(n=4, queries=2)
    asked, solutions = as_kaggle(tasks)
    some = {name: asked[name] for name in list(asked)[:2]}
    for name, obj in (
        ('arc-agi_evaluation_challenges', asked), ('arc-agi_evaluation_solutions', solutions),
        ('arc-agi_test_challenges', some),
        ('sample_submission', {'toy0000': [{'attempt_1': [[0, 0]], 'attempt_2': [[0, 0]]}]}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(obj))
    for name in ('arc-agi_test', 'a'): # the same tasks again without answers, behind and before those that have them
        got = read_source(str(tmp_path))
        assert [t[0] for t in plain(got)] == sorted(tasks) and None not in answers_of(all_tasks(got))
        closed = read_source(str(tmp_path), opened=False)
        assert closed.hash.all() and (closed.hash == got.hash).all() # closed, a known answer is not forgotten either
        if name == 'arc-agi_test':
            (tmp_path / 'arc-agi_test_challenges.json').rename(tmp_path / 'a_challenges.json')

def test_closed_no_error_tells_of_an_answer(tmp_path):
    secret = [[7, 3, 7], [3, 7, 3]]
    obj = toy_tasks(n=1)['toy0000']
    for k, answer in enumerate([secret, [[0]]]): # one name, two answers
        (tmp_path / str(k)).mkdir()
        obj['test'][0]['output'] = answer
        (tmp_path / str(k) / 'x.json').write_text(json.dumps(obj))
    assert len(read_tasks(str(tmp_path), opened=False)) == 1 # whether they differ is not told
    path = tmp_path / '0' / 'x_challenges.json'
    path.write_text(json.dumps({'x': obj}))
    for solutions in ([secret], {'x': {'0': secret}}, {'x': secret[0][0]}, {'x': []}):
        (tmp_path / '0' / 'x_solutions.json').write_text(json.dumps(solutions))
        with pytest.raises(ValueError, match="x_solutions.json: ") as e:
            read_tasks(str(path), opened=False)
        assert "7" not in str(e.value).removeprefix(str(tmp_path)), e.value

def test_no_source_at_all_is_an_error(capsys):
    for src in ('', '+'):
        assert "want a source" in refusal(capsys, 'data', 'check', src)

# -----------------------------------------------------------------------------
# what is known to be wrong in the bundled sources

# of some faults, how the cells show them: what holds of a pair, and of how many pairs of the task
SHOWN = {
    '3ee1011a': (lambda x, y: set(x.flat) == {0, 2, 3, 8} and (x == 3).sum() == 4 and (y[2] == 3).sum() == 2, 1),
    'd2acf2cb': (lambda x, y: len(set(x.flat)) > len(set(y.flat)), 1),
    '9356391f': (lambda x, y: (x[0] != y[0]).any(), 1),
    'e5062a87': (lambda x, y: (x[1, 3:7] == 0).all() and (x[5, 1:5] == 2).all() and (y[1, 3:7] == 0).all(), 1),
    'a416fc5b': (lambda x, y: y.min() == y.max(), 1),
    'b74ca5d1': (lambda x, y: x.shape == (30, 30) and x[13, 11:16].tolist() == [6, 6, 6, 6, 2] and y[13, 15] == 4, 1),
    '7ed72f31': (lambda x, y: y[17:22, 4].tolist() == [2, 2, 2, 2, 3] and y[21, 6] == y[21, 2] == 1, 1),
    '53fb4810': (lambda x, y: x[-5:, 3].tolist() == [6, 4, 6, 6, 4], 1),
}

def test_what_is_known_to_be_faulty_is_so_in_each_bundled_source_that_has_it():
    seen = []
    for source in ('arc1', 'arc2', 'kaggle2024', 'kaggle2025'):
        for task in read_tasks(source):
            if task.name in FAULTS:
                seen.append((task.name, source))
            if task.name in SHOWN:
                is_faulty, n = SHOWN[task.name]
                pairs = [pair for pair in task.demos + task.queries if shows(is_faulty, pair)]
                assert len(pairs) == n, (task.name, source)
    assert {name for name, _ in seen} == FAULTS.keys() and len(seen) == 4 * 8 + 2 * 6

def shows(is_faulty, pair):
    try:
        return bool(is_faulty(*pair))
    except IndexError: # too small
        return False

def test_data_check_names_what_is_known_to_be_faulty(toy, tmp_path, capsys):
    cli(['data', 'check', 'arc1/evaluation'])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 7 and out[1].startswith("known to be faulty: 070dd51e, ambiguous: ") and "#134" in out[1]
    task, = (task for task in read_tasks('arc1/evaluation') if task.name == '070dd51e')
    (tmp_path / '070dd51e.json').write_text(json.dumps(to_json(task)))
    cli(['data', 'check', str(tmp_path / '070dd51e.json')]) # somebody else's, it may have been mended
    assert len(capsys.readouterr().out.splitlines()) == 1
