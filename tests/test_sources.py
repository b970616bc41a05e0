""" python -m pytest tests/test_sources.py """
import json
import os

import numpy as np
import pytest
from conftest import toy_tasks

from nanoarc.cli import main as cli
from nanoarc.sources import read_sources

@pytest.mark.parametrize('source, tasks, demos, queries', [
    ('arc1/training', 400, 1302, 416), ('arc1/evaluation', 400, 1363, 419), ('arc2/training', 1000, 3232, 1076),
    ('arc2/evaluation', 120, 359, 167), ('kaggle2024', 800, 2665, 835), ('kaggle2025', 1120, 3590, 1248), ('kaggle2025/evaluation', 120, 358, 172)])
def test_the_bundled_sources_have_the_known_counts(source, tasks, demos, queries):
    got = [task for task, _ in read_sources(source)]
    assert (len(got), sum(len(t.demos) for t in got), sum(len(t.queries) for t in got)) == (tasks, demos, queries)
    assert all(y is not None for t in got for _, y in t.queries)
    assert all(g.dtype == np.uint8 and g.max() <= 9 for t in got for pair in t.demos for g in pair)

def test_conceptarc_is_160_tasks(test_data):
    assert len(read_sources(str(test_data / 'conceptarc'))) == 160

def test_answers_stay_closed_when_nobody_asked(tmp_path):
    obj = toy_tasks(n=1)['toy0000']
    obj['test'][0]['output'] = "not even a grid, and never looked at"
    (tmp_path / 'a.json').write_text(json.dumps(obj))
    assert read_sources(str(tmp_path / 'a.json'), answers=False)[0][0].queries[0][1] is None
    with pytest.raises(ValueError, match="a.json: task a, query 0, output: want a grid"):
        read_sources(str(tmp_path / 'a.json'))

def test_kaggle_challenges_find_their_solutions(tmp_path):
    tasks = toy_tasks(n=3, queries=2)
    solutions = {name: [pair.pop('output') for pair in task['test']] for name, task in tasks.items()}
    path = tmp_path / 'arc-agi_test_challenges.json'
    path.write_text(json.dumps(tasks))
    assert all(y is None for task, _ in read_sources(str(path)) for _, y in task.queries) # unknown stays unknown
    (tmp_path / 'arc-agi_test_solutions.json').write_text(json.dumps(solutions))
    assert [[y.tolist() for _, y in task.queries] for task, _ in read_sources(str(path))] == list(solutions.values())
    assert all(y is None for task, _ in read_sources(str(path), answers=False) for _, y in task.queries)

def test_a_directory_is_read_in_order_and_joined_and_repeated(tmp_path):
    for name, task in toy_tasks(n=3).items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**task, 'name': "stray"}), encoding='utf-8-sig') # a BOM and a "name" are fine
    (tmp_path / '__MACOSX' / 'a' / 'b').mkdir(parents=True)
    (tmp_path / '__MACOSX' / 'a' / 'b' / 'x.json').write_bytes(b"\x00\x05")
    (tmp_path / '._x.json').write_bytes(b"\x00\x05")
    (tmp_path / 'folder.json').mkdir()
    got = read_sources(f"{tmp_path}*2 + arc2/evaluation")
    assert [task.name for task, _ in got[:3]] == ['toy0000', 'toy0001', 'toy0002'] and [n for _, n in got[:4]] == [2, 2, 2, 1]

def test_a_path_with_a_plus_is_one_source(tmp_path):
    path = tmp_path / 'a+b'
    path.mkdir()
    (path / 'x.json').write_text(json.dumps(toy_tasks(n=1)['toy0000']))
    assert len(read_sources(str(path))) == 1

# -----------------------------------------------------------------------------
# malformed input: one line that names file, task and place, exit code 2

GRID = [[1, 2], [3, 4]]

def task(x=GRID, **kwargs):
    """ a task whose demo 1 has the input x """
    pair = {'input': GRID, 'output': GRID}
    return {'train': [pair, {'input': x, 'output': GRID}, pair], 'test': [pair], **kwargs}

IN_GRID = 'bad.json: task bad, demo 1, input'
MALFORMED = {
    'ragged': (task([[1, 2], [3]]), f"{IN_GRID}, row 1: has 1 cells, row 0 has 2"),
    'ten': (task([[1, 10], [3, 4]]), f"{IN_GRID}, row 0, col 1: color 10 is outside 0..9"),
    'negative': (task([[1, 2], [-1, 4]]), f"{IN_GRID}, row 1, col 0: color -1 is outside"),
    'wraps': (task([[256, 2]]), f"{IN_GRID}, row 0, col 0: color 256 is outside"),
    'huge': (task([[10**30, 2]]), f"{IN_GRID}, row 0, col 0: color 1000000000"),
    'bool': (task([[1, True]]), f"{IN_GRID}, row 0, col 1: want an integer color 0..9, got True (bool)"),
    'null': (task([[None, 1]]), f"{IN_GRID}, row 0, col 0: want an integer color 0..9, got None"),
    'digit': (task([["1", 1]]), f"{IN_GRID}, row 0, col 0: want an integer color 0..9, got '1' (str)"),
    'no rows': (task([]), f"{IN_GRID}: want 1..30 rows, got 0"),
    'empty row': (task([[]]), f"{IN_GRID}, row 0: want 1..30 cells, got 0"),
    '1d': (task([1, 2]), f"{IN_GRID}, row 0: want a list of colors, got 1 (int)"),
    '3d': (task([[[1]]]), f"{IN_GRID}, row 0, col 0: want an integer color 0..9, got [1] (list)"),
    'tall': (task([[1]] * 31), f"{IN_GRID}: want 1..30 rows, got 31"),
    'wide': (task([[1] * 31]), f"{IN_GRID}, row 0: want 1..30 cells, got 31"),
    'a dict': (task({'rows': GRID}), f"{IN_GRID}: want a grid"),
    'a string': (task("12\n34"), f"{IN_GRID}: want a grid, that is a list of rows, got '12\\n34' (str)"),
    'no output': ({**task(), 'train': [{'input': GRID}]}, "bad.json: task bad, demo 0: no key 'output'"),
    'typo': ({**task(), 'test': [{'input': GRID, 'outputs': GRID}]}, "bad.json: task bad, query 0: unknown key 'outputs'"),
    'no test': ({'train': task()['train']}, "bad.json: task bad: no key 'test'"),
    'no demos': ({**task(), 'train': []}, "bad.json: task bad: no demos"),
    'no queries': ({**task(), 'test': []}, "bad.json: task bad: no queries"),
    'demos a dict': ({**task(), 'train': {'0': 1}}, "bad.json: task bad: want a list in 'train'"),
    'a pair is a list': ({**task(), 'train': [[GRID, GRID]]}, "bad.json: task bad, demo 0: want an object with input and output"),
    'unknown key': (task(extra=1), "bad.json: task bad: unknown key 'extra'"),
    'a list': ([task()], "bad.json: want a task or an object of tasks"),
    'a float': ('{"train": [{"input": [[1.0]], "output": [[1]]}], "test": []}', "bad.json: '1.0' is not an integer"),
    'overflow': ('{"train": [{"input": [[1e400]], "output": [[1]]}], "test": []}', "bad.json: '1e400' is not an integer"),
    'NaN': ('{"train": [{"input": [[NaN]], "output": [[1]]}], "test": []}', "bad.json: 'NaN' is not an integer"),
    'duplicate key': ('{"train": [], "test": [], "train": []}', "bad.json: duplicate key 'train'"),
    'trailing comma': ('{"train": [],}', "bad.json: not json, "),
    'truncated': (json.dumps(task())[:-9], "bad.json: not json, "),
    'empty': ('', "bad.json: not json, expecting value at line 1 column 1"),
    'a NUL': ('\x00', "bad.json: not json, "),
    'latin-1': (b'{"train": "\xe9"}', "bad.json: not UTF-8 at byte 11"),
    'deep': ('[' * 200_000, "bad.json: nested too deeply"),
    '5000 digits': ('{"a": ' + '9' * 5000 + '}', "bad.json: Exceeds the limit"),
    'control characters in an id': ({'a\n\x1b[31m': task([[11]])}, "bad.json: task a\\n\\x1b[31m, demo 1, input, row 0, col 0: color 11"),
    'demos by name': ({'abc': {'train': {'a': 1}, 'test': {}}}, "bad.json: task abc: want a list in 'train'"),
    'control characters': (task([["\x1b[31m" + "x" * 99]]), f"{IN_GRID}, row 0, col 0: want an integer color 0..9, got '\\x1b[31mxxx"),
}

@pytest.mark.parametrize('kind', MALFORMED)
def test_malformed_input_is_one_line_that_names_the_place(kind, tmp_path, capsys):
    obj, want = MALFORMED[kind]
    path = tmp_path / 'bad.json'
    path.write_bytes(obj if isinstance(obj, bytes) else (obj if isinstance(obj, str) else json.dumps(obj)).encode())
    with pytest.raises(SystemExit) as e:
        cli(['data', 'check', str(path)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and f"{tmp_path}{os.sep}{want}" in err and len(err) < 400, err

def test_kaggle_files_that_do_not_match_name_the_task(tmp_path):
    path, solved = tmp_path / 'x_challenges.json', tmp_path / 'x_solutions.json'
    path.write_text(json.dumps(toy_tasks(n=2)))
    for solutions, want in (({'toy0000': [GRID]}, "x_solutions.json: task ids differ.*toy0001"), ({'toy0000': [GRID, GRID], 'toy0001': [GRID]}, "task toy0000: 1 queries but 2 solutions"),
                            ({'toy0000': [[[11]]], 'toy0001': [GRID]}, "task toy0000, query 0, solution, row 0, col 0: color 11"), ({'toy0000': [], 'toy0001': [GRID]}, "toy0000: want a list of grids"),
                            ([[GRID], [GRID]], "x_solutions.json: task ids differ from those of x_challenges.json: \\[\\[\\[")):
        solved.write_text(json.dumps(solutions))
        with pytest.raises(ValueError, match=want):
            read_sources(str(path))

@pytest.mark.parametrize('source, want', [('no/such/thing', "no such source"), ('arc1/test', "no such source"), ('arc3', "no such source")])
def test_a_source_that_is_not_there_is_named(source, want):
    with pytest.raises(ValueError, match=want):
        read_sources(source)

def test_two_different_tasks_of_one_name_are_refused(tmp_path):
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / 'x.json').write_text(json.dumps(toy_tasks(n=1, seed=k)['toy0000']))
    with pytest.raises(ValueError, match="two different tasks are named x"):
        read_sources(str(tmp_path))
    (tmp_path / '1' / 'x.json').write_text((tmp_path / '0' / 'x.json').read_text())
    assert len(read_sources(str(tmp_path))) == 1 # the same task twice is one
    task = toy_tasks(n=1)['toy0000']
    task['test'][0]['output'] = [[0] * 9]
    (tmp_path / '1' / 'x.json').write_text(json.dumps(task))
    with pytest.raises(ValueError, match="two different tasks are named x"): # but not with another answer
        read_sources(str(tmp_path))

def test_an_empty_directory_and_a_giant_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no .json file"):
        read_sources(str(tmp_path))
    monkeypatch.setattr('nanoarc.sources.MAX_JSON_BYTES', 100)
    (tmp_path / 'x.json').write_text(json.dumps(task()))
    with pytest.raises(ValueError, match="x.json: 0 MiB"):
        read_sources(str(tmp_path))
