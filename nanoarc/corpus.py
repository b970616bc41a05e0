"""
tasks as flat arrays, in memory or mapped from files; and the leak guard, which knows a pair again whatever its colors
and orientation.
"""
import copy
import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoarc.grids import MAX_SIDE, Task, check_keys, grid_bytes, one_line, show
from nanoarc.jit import jit

# of a .json, a line of .jsonl, a file in a .zip. the largest real file has 4 MB, beyond this it is something else
MAX_JSON_BYTES = 64 * 2**20
FORMAT = 2 # of a packed corpus. 1 had no n_own
PROOF = 10_000 # pairs of a packed corpus that are hashed anew when it is opened, in 0.1 s. 400,000 would take 4 s

# -----------------------------------------------------------------------------
# strict json

class DuplicateKey:
    """ what an object holds under a key that stands there twice. no reader takes it for anything else """

    def __repr__(self):
        return "a duplicate key"

def parse_json(data, where, strict=True):
    """
    bytes of utf-8 (a BOM is fine) -> python objects. raises ValueError, also for a float, NaN or duplicate key.
    strict=False lets these three pass: the door names the task and the cell that has one
    """
    def to_float(s):
        if strict:
            raise ValueError(f"{show(s)} is not an integer, colors are integers 0..9: re-save the file without floats")
        return float(s)
    def to_dict(items):
        obj = dict(items)
        if len(obj) != len(items):
            twice = [key for key, n in Counter(key for key, _ in items).items() if n > 1]
            if strict:
                raise ValueError(f"duplicate key {show(twice[0])}")
            obj.update(dict.fromkeys(twice, DuplicateKey()))
        return obj
    load = partial(json.loads, object_pairs_hook=to_dict, parse_float=to_float, parse_constant=to_float)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{where}: over {MAX_JSON_BYTES // 2**20} MiB, no json of tasks is that large: "
                         "use .jsonl or a packed corpus")
    try:
        text = data.decode('utf-8-sig')
        try:
            return load(text)
        except ValueError as e:
            if 'integer string conversion' not in str(e):
                raise
            return load(text, parse_int=lambda s: int(s[:600])) # no color either, of digits that python converts
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        hint = ", is it .jsonl?" if e.msg == "Extra data" and e.lineno > 1 else ""
        raise ValueError(f"{where}: not json, {e.msg.lower()} at line {e.lineno} column {e.colno}{hint}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be tasks") from None
    except ValueError as e: # from the two hooks above
        raise ValueError(f"{where}: {e}") from None

def read_json(path, strict=True):
    """ a json file as python objects, see parse_json. raises ValueError that names the file """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, 'rb') as f:
        return parse_json(f.read(MAX_JSON_BYTES + 1), path, strict)

# -----------------------------------------------------------------------------
# hashes: what is one pair to a human has one hash here

@jit
def walk(start, H, W, d):
    """
    how to read the grid cells[start : start + H * W] as if it were turned by symmetry d of grids.dihedral
    -> (place of the first cell, step to the row below, step to the right, height, width)

    a b c  turned  c f  begins at place 2, the row below is -1 away, the cell to the right 3
    d e f  once    b e
                   a d
    """
    down, right = W, 1
    if d >= 4: # transposed
        down, right, H, W = 1, W, W, H
    for _ in range(d % 4): # np.rot90: the last column becomes the first row
        start, down, right, H, W = start + (W - 1) * right, -right, down, W, H
    return start, down, right, H, W

@jit
def hash_pair(cells, off, h, w, p, d, number, hashes):
    """
    FNV-1a of the sides and cells of pair p turned by d -> hashes (2,) uint64: of its input alone and of both grids, 0
    if the output is not known. number (10,) uint8: colors are numbered as they come, so that their names do not matter
    """
    hashes[:] = 0
    prime, x = np.uint64(0x100000001b3), np.uint64(0xcbf29ce484222325)
    number[:] = 10 # not seen yet
    seen = 0
    for side in range(2):
        g = 2 * p + side
        if h[g] > 0:
            start, down, right, H, W = walk(off[g], np.int64(h[g]), np.int64(w[g]), d)
            x = (x ^ np.uint64(H * 31 + W)) * prime
            for r in range(H):
                for c in range(W):
                    color = cells[start + r * down + c * right]
                    if number[color] == 10:
                        number[color] = seen
                        seen += 1
                    x = (x ^ np.uint64(number[color])) * prime
            hashes[side] = max(x ^ (x >> np.uint64(32)), np.uint64(1)) # not 0, that is "not known"

@jit
def index_grids(cells, off, h, w):
    """
    -> (grids,) uint16 set of the colors of each grid, a bit a color; (pairs,) uint64 pair_hash, 0 where the output is
    not known; (pairs,) uint64 the same of the input alone. each hash is the least of eight, one a symmetry.
    """
    P = len(h) // 2
    colors = np.zeros(2 * P, np.uint16)
    for g in range(2 * P):
        for i in range(off[g], off[g] + np.int64(h[g]) * w[g]): # h and w are bytes, their product is not
            colors[g] |= np.uint16(1 << cells[i])
    inputs, pairs = np.zeros(P, np.uint64), np.zeros(P, np.uint64)
    number, hashes = np.empty(10, np.uint8), np.empty((8, 2), np.uint64)
    for p in range(P):
        for d in range(8):
            hash_pair(cells, off, h, w, p, d, number, hashes[d])
        inputs[p] = hashes[:, 0].min()
        pairs[p] = hashes[:, 1].min()
    return colors, pairs, inputs

def pair_hash(x, y):
    """ two grids -> int, the same under any symmetry and any renaming of colors """
    return int(Corpus.of([Task("", "", [(x, y)], [])]).hash[0])

def areas(h, w):
    """ (grids,) sides -> (grids,) cells of each. the sides are bytes, their product is not """
    return np.multiply(h, w, dtype=np.int64)

def grids_of(pairs):
    """ (n,) numbers of pairs -> (2n,) numbers of their grids """
    return np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()

# -----------------------------------------------------------------------------

# arrays of a Corpus and their types in a file
BY_GRID = {'h': 'u1', 'w': 'u1', 'colors': '<u2'}
BY_PAIR = {'hash': '<u8', 'input_hash': '<u8'}
BY_TASK = {'n_demos': '<i4', 'name': 'S', 'key': 'S32', 'n_own': '<i4'}

class Corpus:
    """
    the tasks of one source in flat arrays. grid g is cells[off[g] :][: h[g] * w[g]] of shape (h[g], w[g]). pair p is
    the grids 2p and 2p + 1; an answer that is not known is an empty grid. task k owns the pairs first[k] to
    first[k + 1] - 1, its n_demos[k] demos before its queries. name[k] is unique, tasks of one key[k] are the same task.

    a task was published with its first n_own[k] demos. those behind them are extra pairs, which somebody generated by
    the same rule (add_extra). n_own[k] = 0: all pairs of the task were generated, its query too (deal_tasks).
    """
    ARRAYS = {'cells': 'u1', **BY_GRID, **BY_PAIR, 'first': '<i8', **BY_TASK}

    def __init__(self, source, arrays, bad=(), files=None):
        self.source = source
        self.bad = list(bad) # the tasks that on_bad=quarantine left out, as error messages
        self.files = files # sha256 of each array as a .npy file, None = not computed yet
        # (pairs,) which source of extra pairs each is from: 1 is the first, 0 is none
        self.origin = np.zeros(len(arrays['h']) // 2, np.int64)
        for name, x in arrays.items():
            setattr(self, name, x)
        sizes = areas(self.h, self.w)
        self.off = np.cumsum(sizes) - sizes

    @classmethod
    def of(cls, tasks, source="", bad=()):
        """ list of Task -> Corpus """
        grids = []
        for task in tasks:
            for x, y in task.demos + task.queries:
                grids += [x, np.zeros((0, 0), np.uint8) if y is None else y]
        n_demos = np.array([len(task.demos) for task in tasks], np.int32)
        n_own = np.array([task.n_own for task in tasks], np.int32)
        n_queries = [len(task.queries) for task in tasks]
        arrays = {
            'cells': np.concatenate([grid.ravel() for grid in grids]),
            'h': np.array([grid.shape[0] for grid in grids], np.uint8),
            'w': np.array([grid.shape[1] for grid in grids], np.uint8),
            'first': np.append(0, np.cumsum(n_demos + n_queries)),
            'n_demos': n_demos,
            'n_own': np.where(n_own < 0, n_demos, n_own),
            'name': np.array([task.name.encode() for task in tasks], 'S'),
            'key': np.array([task.key.encode() for task in tasks], 'S32'),
        }
        c = cls(source, arrays, bad)
        c.colors, c.hash, c.input_hash = index_grids(c.cells, c.off, c.h, c.w)
        return c

    def __len__(self):
        return len(self.n_demos)

    def grid(self, g):
        """ grid number g as a (H, W) uint8 view """
        h, w = int(self.h[g]), int(self.w[g])
        return self.cells[self.off[g] : self.off[g] + h * w].reshape(h, w)

    def task(self, k):
        """ task number k as a Task, its grids are views """
        pairs = []
        for p in range(self.first[k], self.first[k + 1]):
            x, y = self.grid(2 * p), self.grid(2 * p + 1)
            pairs.append((x, y if y.size > 0 else None))
        n = int(self.n_demos[k])
        return Task(self.name[k].decode(), self.source, pairs[:n], pairs[n:], self.key[k].decode(), int(self.n_own[k]))

    def pair_task(self):
        """ -> (pairs,) number of the task that each is of """
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def first_of(self, n):
        """ n (tasks,) -> (pairs,) bool: is it one of the first n[k] of its task k? """
        return np.arange(len(self.hash)) < (self.first[:-1] + n)[self.pair_task()]

    def n_shown(self):
        """ -> (tasks,) demos of a prompt: those that the task was published with, all of a task that was generated """
        return np.where(self.n_own > 0, self.n_own, self.n_demos)

    def is_demo(self):
        """ -> (pairs,) bool """
        return self.first_of(self.n_demos)

    def is_shown(self):
        """ -> (pairs,) bool: a demo of a prompt """
        return self.first_of(self.n_shown())

    def is_extra(self):
        """ -> (pairs,) bool: a demo that its task was not published with """
        return self.is_demo() & ~self.is_shown()

    def is_generated(self):
        """ -> (pairs,) bool: an extra pair, or any pair of a task that was dealt """
        return self.is_extra() | (self.n_own == 0)[self.pair_task()]

    def select(self, keep):
        """ the tasks in keep, a mask of them. the cells are shared, not copied """
        return self.select_pairs(keep[self.pair_task()])

    def select_pairs(self, keep):
        """
        keep (pairs,) bool -> these pairs, and the tasks that have one. the cells are shared, not copied. a task loses
        all pairs that it was published with or none, or else n_own would be wrong
        """
        if keep.all():
            return self
        other = copy.copy(self)
        task = self.pair_task()
        n_pairs = np.bincount(task[keep], minlength=len(self))
        other.n_demos = np.bincount(task[keep & self.is_demo()], minlength=len(self)).astype(np.int32)
        other.first = np.append(0, np.cumsum(n_pairs[n_pairs > 0]))
        for names, kept in ((BY_TASK, n_pairs > 0), ([*BY_PAIR, 'origin'], keep), ([*BY_GRID, 'off'], keep.repeat(2))):
            for name in names:
                setattr(other, name, getattr(other, name)[kept])
        other.sha256 = self.sha256 # that of the whole: what is left out of it follows from settings
        return other

    def leave_out(self, bad):
        """
        bad (pairs,) bool -> the corpus without them, and how many of them went alone: a pair that was generated does, a
        pair that was published takes its task with it
        """
        task = self.pair_task()
        stays = ~np.isin(task, task[bad & ~self.is_generated()]) # (pairs,) does its task?
        return self.select_pairs(stays & ~bad), int((stays & bad).sum())

    def close(self):
        """ the same tasks with no answer in them. what is left of each is its pair_hash """
        is_answer = np.zeros(len(self.h), bool)
        is_answer[1::2] = ~self.is_demo()
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        for name in BY_GRID:
            arrays[name] = np.where(is_answer, 0, arrays[name])
        arrays['cells'] = gather(self.cells, self.off, arrays['h'], arrays['w'])
        return Corpus(self.source, arrays, self.bad)

    @cached_property
    def sha256(self):
        """ what makes two corpora the same: every grid, name and split into tasks, not where the files lie """
        files = self.files or {name: sha256_of_npy(getattr(self, name)) for name in self.ARRAYS}
        follow = 'colors', 'hash', 'input_hash' # from the other arrays
        if (self.n_own == self.n_demos).all(): # then it is the hash of before there were extra pairs
            follow += ('n_own',)
        parts = [files[name] for name in self.ARRAYS if name not in follow]
        return hashlib.sha256(json.dumps([parts, len(self.bad)]).encode()).hexdigest()

    def is_indexed(self):
        """ do colors and hashes follow from the cells? in all of PROOF pairs, and evenly spaced ones of more """
        P = len(self.hash)
        p = np.linspace(0, P - 1, min(P, PROOF)).astype(np.int64)
        g = grids_of(p)
        colors, hashes, inputs = index_grids(self.cells, self.off[g], self.h[g], self.w[g])
        closed = self.h[2 * p + 1] == 0 # of such an answer nothing but its hash is left
        same = (hashes == self.hash[p]) | closed
        return same.all() and (inputs == self.input_hash[p]).all() and (colors == self.colors[g]).all()

    def save(self, out_dir):
        """ write a packed corpus: an .npy file an array and manifest.json, all or nothing. raises ValueError """
        out_dir = Path(out_dir)
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ValueError(f"{out_dir}: exists and is not empty, choose another --out")
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            self.write(out_dir)
        except BaseException as e: # ctrl-c too
            for file in out_dir.iterdir():
                file.unlink()
            if isinstance(e, OSError): # numpy has no reason to give when a file stays short
                raise ValueError(f"{out_dir}: {e.strerror or f'{e}, is the disk full?'}") from None
            raise

    def write(self, out_dir):
        """ see save. the manifest comes last: without it nothing is whole """
        files = {}
        for name in self.ARRAYS:
            np.save(out_dir / f"{name}.npy", getattr(self, name), allow_pickle=False)
            files[name] = hash_file(out_dir / f"{name}.npy")
        manifest = {'nanoarc': 'packed corpus', 'format': FORMAT, 'source': self.source, 'tasks': len(self),
                    'pairs': len(self.hash), 'bad': self.bad, 'sha256': files}
        temp = out_dir / '.manifest.json.tmp'
        temp.write_text(json.dumps(manifest, indent=1), 'utf-8')
        os.replace(temp, out_dir / 'manifest.json')

    @classmethod
    def open(cls, path):
        """ a packed corpus, memory-mapped. every file is hashed first (2 GB/s): none is damaged. raises ValueError """
        path = Path(path)
        where = path / 'manifest.json'
        if not where.is_file():
            raise ValueError(f"{path}: not a whole packed corpus (no manifest.json), pack it anew")
        manifest = read_json(where)
        check_keys(manifest, ('nanoarc', 'format', 'source', 'tasks', 'pairs', 'bad', 'sha256'), (), where)
        hashes, bad = manifest['sha256'], manifest['bad']
        is_sound = {'format': manifest['format'] in (1, FORMAT), 'sha256': type(hashes) is dict,
                    'bad': type(bad) is list and set(map(type, bad)) <= {str}}
        for name, sound in is_sound.items():
            if not sound:
                raise ValueError(f"{where}: want a packed corpus of format {FORMAT}, got {name} {show(manifest[name])}")
        arrays = {}
        for name, dtype in cls.ARRAYS.items():
            if name == 'n_own' and manifest['format'] == 1:
                arrays[name] = arrays['n_demos']
            else:
                arrays[name] = open_array(path / f"{name}.npy", dtype, hashes.get(name))
        top = arrays['cells'].max(initial=0)
        if top > 9:
            raise ValueError(f"{path / 'cells.npy'}: color {top} is outside 0..9")
        if not fit_together(**arrays):
            raise ValueError(f"{path}: the arrays do not fit together")
        c = cls(one_line(str(path)), arrays, map(one_line, bad), hashes)
        if not c.is_indexed():
            raise ValueError(f"{path}: colors, hash or input_hash do not follow from cells, pack it anew")
        return c

def open_array(file, dtype, sha256):
    """ an .npy file of one dimension and a known hash -> array, mapped. raises ValueError """
    if not file.is_file():
        raise ValueError(f"{file}: missing, this packed corpus is not whole")
    found = hash_file(file)
    if found != sha256:
        raise ValueError(f"{file}: damaged, sha256 is {found[:12]}, the manifest has {show(sha256)[1:13]}")
    try:
        x = np.lib.format.open_memmap(file, mode='c') # copy on write, nothing is written, nothing unpickled
    except Exception as e: # numpy raises whatever a header makes it stumble over
        raise ValueError(f"{file}: not an array, {show(str(e), 200)}") from None
    is_text = dtype == 'S' and x.dtype.kind == 'S' # of any length
    if x.ndim != 1 or (x.dtype != np.dtype(dtype) and not is_text):
        raise ValueError(f"{file}: want a flat array of {dtype}, got {x.ndim} dimensions of {x.dtype}")
    return np.asarray(x)

def fit_together(cells, h, w, colors, hash, input_hash, first, n_demos, name, key, n_own):
    """ are the arrays of a packed corpus tasks together? """
    P, K = len(hash), len(n_demos)
    lengths = [len(x) for x in (h, w, colors, input_hash, first, name, key, n_own)]
    if K == 0 or lengths != [2 * P, 2 * P, 2 * P, P, K + 1, K, K, K]:
        return False
    n_pairs = np.diff(first)
    is_task = (1 <= n_demos) & (n_demos < n_pairs) & (0 <= n_own) & (n_own <= n_demos)
    if first[0] != 0 or first[-1] != P or not is_task.all():
        return False
    may_be_empty = np.zeros(2 * P, bool) # the answer of a query alone
    may_be_empty[1::2] = np.arange(P) >= (first[:-1] + n_demos).repeat(n_pairs)
    sizes = areas(h, w)
    is_grid = (sizes > 0) | (may_be_empty & (h == w))
    if max(h.max(), w.max()) > MAX_SIDE or not is_grid.all() or sizes.sum() != len(cells):
        return False
    names = name.tolist()
    try: # text, in one line
        is_text = b" ".join(names + key.tolist()).decode().isprintable()
    except UnicodeDecodeError:
        return False
    return is_text and all(names) and len(set(names)) == K

def is_packed(path):
    """ is this the directory of a packed corpus, perhaps of a half one? """
    manifest = Path(path) / 'manifest.json'
    has_one = os.path.isfile(manifest) and b'"packed corpus"' in manifest.read_bytes()[:100]
    return has_one or os.path.isfile(Path(path) / 'cells.npy')

def sha256_of_npy(x):
    """ an array -> what hash_file says of it as an .npy file """
    f = io.BytesIO()
    np.save(f, x, allow_pickle=False)
    return hashlib.sha256(f.getbuffer()).hexdigest()

def hash_file(path):
    """ -> sha256 in hex, without holding the file in memory """
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()

# -----------------------------------------------------------------------------
# extra pairs: what somebody generated by the rule of a published task becomes further demos of it

def add_extra(corpora, extra):
    """
    two lists of Corpus -> the first, with the pairs of the second as extra demos of the tasks whose id they have; and
    the ids that no task has. raises ValueError for an id of two different tasks
    """
    if len(extra) == 0:
        return corpora, []
    owner, strangers = find_owners(corpora, extra)
    extended, before = [], 0
    for c in corpora:
        extended.append(insert(c, extra, owner - before))
        before += len(c)
    return extended, strangers

def find_owners(corpora, extra):
    """
    see add_extra -> (pairs of all extra,) number of the task that each is for, counted through all corpora, -1 = none;
    and the list of ids that no task has
    """
    names = np.concatenate([c.name for c in corpora]).tolist()
    keys = np.concatenate([c.key for c in corpora]).tolist()
    n_tasks = Counter(name for name, _ in set(zip(names, keys))) # {id: how many different tasks have it}
    # of equal ids the last task gets the pairs: adapt's come last, and no task of adapt is dropped for a leak
    number = {name: k for k, name in enumerate(names)}
    owners, strangers = [], {} # {id: True}, in the order that they come
    for e in extra:
        owner = np.full(len(e), -1)
        for j, name in enumerate(e.name.tolist()):
            if name not in number:
                name = re.sub(rb"\.\d+$", b"", name) # as sources.deal_tasks has named it
            if n_tasks[name] > 1:
                raise ValueError(f"{e.source}: extra pairs of {name.decode()}, but two different tasks of data and "
                                 "adapt have that id: leave out one of their sources, or rename the task there")
            owner[j] = number.get(name, -1)
            if owner[j] < 0:
                strangers[name.decode()] = True
        is_known = e.h[1::2] > 0 # a query without its answer cannot be a demo
        owners.append(np.where(is_known, owner[e.pair_task()], -1))
    return np.concatenate(owners), list(strangers)

def insert(c, extra, owner):
    """
    a Corpus, a list of others, and of each pair of these the number of the task that it is for -> c with the pairs that
    are for a task of c behind the demos of that task
    """
    parts = [c, *extra] # pairs and grids are counted through all of them
    task = np.concatenate([c.pair_task(), owner])
    rank = np.ones(len(task)) # within a task: demos 0, extra pairs 1, queries 2
    rank[: len(c.hash)] = np.where(c.is_demo(), 0, 2)
    ours = np.flatnonzero((task >= 0) & (task < len(c)))
    if len(ours) == len(c.hash): # nothing is for this corpus
        return c
    pairs = ours[np.lexsort((rank[ours], task[ours]))]
    grids = grids_of(pairs)
    arrays = {'name': c.name, 'key': c.key}
    for names, chosen in ((BY_GRID, grids), (BY_PAIR, pairs)):
        for name in names:
            arrays[name] = np.concatenate([getattr(x, name) for x in parts])[chosen]
    off = joined([x.off for x in parts], [len(x.cells) for x in parts])[grids]
    arrays['cells'] = gather(np.concatenate([x.cells for x in parts]), off, arrays['h'], arrays['w'])
    arrays['origin'] = np.repeat(np.arange(len(parts)), [len(x.hash) for x in parts])[pairs]
    n_extra = np.bincount(task[ours], minlength=len(c)) - np.diff(c.first)
    arrays['first'] = c.first + np.append(0, np.cumsum(n_extra))
    arrays['n_demos'] = (c.n_demos + n_extra).astype(np.int32)
    # a dealt task counts as published as soon as it has more
    arrays['n_own'] = np.where(n_extra > 0, c.n_shown(), c.n_own)
    return Corpus(c.source, arrays, c.bad)

def joined(arrays, sizes):
    """ arrays of indices, each into an array of the given size -> one of indices into all of those, joined """
    before = np.cumsum([0] + sizes[:-1])
    return np.concatenate([x + n for x, n in zip(arrays, before)])

def gather(cells, off, h, w):
    """ grids that lie anywhere in cells -> their cells one after another. what lies so already is copied at once """
    ends = off + areas(h, w)
    is_apart = off[1:] != ends[:-1] # from the grid before it
    first, last = off[np.append(True, is_apart)], ends[np.append(is_apart, True)]
    return np.concatenate([cells[a:b] for a, b in zip(first, last)])

# -----------------------------------------------------------------------------
# the leak guard: was a query trained on, with its answer? yes, if a trained pair has the same pair_hash. a query whose
# answer nobody here knows has none. then yes, if a trained pair has the same input and its task shares a demo with ours
# (overlaps asks that of a Corpus, before training; find_leaks of the trained_on.txt of a run, before it solves)

class Query(NamedTuple):
    """ what the leak guard knows of a query """
    label: str # for people
    input: bytes # the grid, to tell whether a copy is verbatim
    pair: int # pair_hash, 0 = nobody here knows the answer
    demos: frozenset # pair_hash of the demos of its task

    def is_leaked_by(self, pair, task_pairs):
        """ the pair_hash of a trained pair of equal input, and those of all pairs of its task -> bool """
        if self.pair > 0:
            return pair == self.pair
        return not self.demos.isdisjoint(task_pairs)

def queries_of(corpora):
    """ list of Corpus -> {hash of the input: [Query, ...]} """
    asked = defaultdict(list)
    for c in corpora:
        for k in range(len(c)):
            first, end_of_demos = c.first[k], c.first[k] + c.n_demos[k]
            demos = frozenset(c.hash[first:end_of_demos].tolist())
            for i, p in enumerate(range(end_of_demos, c.first[k + 1])):
                label = f"{c.name[k].decode()} query {i} ({c.source})"
                query = Query(label, grid_bytes(c.grid(2 * p)), int(c.hash[p]), demos)
                asked[int(c.input_hash[p])].append(query)
    return asked

def overlaps(c, asked):
    """
    pairs of a Corpus that leak queries_of others -> list of (pair number, text that names both, and says whether the
    input is the same to the last cell)
    """
    found, task, is_extra = [], c.pair_task(), c.is_extra()
    same_input = np.isin(c.input_hash, np.array(list(asked), np.uint64))
    for p in np.flatnonzero(same_input & (c.hash > 0)).tolist():
        k = task[p]
        task_pairs = c.hash[c.first[k] : c.first[k + 1]].tolist()
        for query in asked[int(c.input_hash[p])]:
            if query.is_leaked_by(int(c.hash[p]), task_pairs):
                how = "verbatim" if grid_bytes(c.grid(2 * p)) == query.input else "augmented"
                what = "an extra pair of " if is_extra[p] else ""
                found.append((p, f"{what}{c.name[k].decode()} ({c.source}) = {query.label}, {how}"))
    return found

def a_few(texts, n, sep="; "):
    """ the first n of them in a line, and dots for the rest """
    return sep.join(texts[:n]) + (f"{sep}..." if len(texts) > n else "")

def guard(data, adapt, drop_overlap, allow_leak):
    """
    two lists of Corpus -> both in one, how many pairs were left out alone, texts of the leaks. a leak is a pair of
    data, or an extra pair of either, that is a query of adapt. (demos of adapt may be in data, they come with the
    queries.) raises ValueError if there is one, unless drop_overlap leaves it out or allow_leak lets it pass
    """
    asked = queries_of(adapt)
    kept, n_alone, leaks = [], 0, []
    for i, c in enumerate([*data, *adapt]):
        is_trained = np.full(len(c.hash), True) if i < len(data) else c.is_extra()
        found = [(p, text) for p, text in overlaps(c, asked) if is_trained[p]]
        if drop_overlap:
            bad = np.zeros(len(c.hash), bool)
            bad[[p for p, _ in found]] = True
            c, n = c.leave_out(bad)
            n_alone += n
        else:
            leaks += [text for _, text in found]
        kept.append(c)
    if leaks and not allow_leak:
        raise ValueError(f"{len(leaks)} pairs of data are queries of adapt, answers included: {a_few(leaks, 3)}. "
                         "--drop_overlap leaves these tasks out, of generated pairs these alone, --allow_leak trains "
                         "on them and says so")
    return kept, n_alone, leaks

def trained_lines(corpora, trained):
    """
    list of Corpus, (pairs of all,) bool -> text, of each trained pair a line: two hashes, of it and of its input, its
    task and source
    """
    lines, ends = "", np.cumsum([len(c.hash) for c in corpora])
    for c, mine in zip(corpora, np.split(trained, ends)):
        task = c.pair_task()
        for p in np.flatnonzero(mine):
            lines += f"{c.hash[p]:016x} {c.input_hash[p]:016x} {c.name[task[p]].decode()} ({c.source})\n"
    return lines

def with_earlier(text, runs):
    """
    trained_lines of a run, and those that went before it ('' = none) -> the text of trained_on.txt: every line of them,
    once, and a sha256
    """
    found = set(text.splitlines(True))
    for run in runs:
        if run and (Path(run) / 'trained_on.txt').is_file():
            found.update(read_trained_on(run))
    text = "".join(sorted(found))
    return f"{text}sha256 {hashlib.sha256(text.encode()).hexdigest()}\n"

def read_trained_on(run):
    """ -> list of its lines. raises ValueError if any is missing, or the guard would be off without a word """
    path = Path(run) / 'trained_on.txt'
    text, _, last = path.read_bytes().rpartition(b"sha256 ")
    if last.decode('ascii', 'replace') != hashlib.sha256(text).hexdigest() + "\n":
        raise ValueError(f"{path}: damaged, or of an older version: its last line is not the sha256 of the others. "
                         f"remove it, and nanoarc train --resume {run} writes it anew")
    return text.decode().splitlines(True)

def find_leaks(run, corpora):
    """ queries of corpora that the run was trained on with their answers -> list of texts that name both tasks """
    path = Path(run) / 'trained_on.txt'
    if not path.is_file():
        print(f"warning: no {path}, so nobody knows whether it was trained on what it is asked now")
        return []
    by_input = defaultdict(list) # {hash of the input: [(pair_hash, label of the task), ...]}
    task_pairs = defaultdict(set) # {label of the task: pair_hash of its pairs}
    for line in read_trained_on(run):
        pair, x, label = line.rstrip("\n").split(" ", 2)
        by_input[int(x, 16)].append((int(pair, 16), label))
        task_pairs[label].add(int(pair, 16))
    found = {}
    for x, queries in queries_of(corpora).items():
        for query in queries:
            for pair, label in by_input[x]:
                if query.is_leaked_by(pair, task_pairs[label]):
                    found[query.label] = f"{label} = {query.label}"
    return list(found.values())
