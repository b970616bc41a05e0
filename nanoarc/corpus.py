"""
tasks as flat arrays, in memory or mapped from files; and the leak guard, which knows a pair again whatever its colors
and orientation.
"""
import copy
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoarc.grids import MAX_SIDE, Task, check_keys, grid_bytes, one_line, show
from nanoarc.jit import jit

# of a .json, a line of .jsonl, a file in a .zip. the largest real file has 4 MB, beyond this it is something else
MAX_JSON_BYTES = 64 * 2**20
FORMAT = 1 # of a packed corpus
PROOF = 10_000 # pairs of a packed corpus that are hashed anew when it is opened, in 0.1 s. 400,000 would take 4 s

# -----------------------------------------------------------------------------
# strict json

class DuplicateKey:
    """ what an object holds under a key that stands there twice. no reader takes it for anything else """

    def __repr__(self):
        return "a duplicate key"

def parse_json(data, where, strict=True):
    """
    bytes -> python objects: utf-8 (a BOM is fine), no floats, no NaN, no duplicate keys. raises ValueError.
    strict=False: these three pass, for the door to name the task and the cell that has them, if one does
    """
    def no_float(s):
        raise ValueError(f"{show(s)} is not an integer, colors are integers 0..9: re-save the file without floats")
    def no_duplicates(items):
        obj = dict(items)
        if len(obj) != len(items):
            twice = [key for key, n in Counter(key for key, _ in items).items() if n > 1]
            if strict:
                raise ValueError(f"duplicate key {show(twice[0])}")
            obj.update(dict.fromkeys(twice, DuplicateKey()))
        return obj
    numbers = {'parse_float': no_float, 'parse_constant': no_float} if strict else {}
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{where}: over {MAX_JSON_BYTES // 2**20} MiB, no json of tasks is that large: "
                         "use .jsonl or a packed corpus")
    try:
        text = data.decode('utf-8-sig')
        return json.loads(text, object_pairs_hook=no_duplicates, **numbers)
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not json, {e.msg.lower()} at line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be tasks") from None
    except ValueError as e: # from the two hooks above, or an integer of thousands of digits
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
            hashes[side] = max(x ^ x >> np.uint64(32), np.uint64(1)) # not 0, that is "not known"

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
    h, w = np.array([x.shape, y.shape], np.uint8).T.copy()
    _, pairs, _ = index_grids(np.concatenate([x.ravel(), y.ravel()]), np.array([0, x.size]), h, w)
    return int(pairs[0])

# -----------------------------------------------------------------------------

class Corpus:
    """
    the tasks of one source in flat arrays. grid g is cells[off[g] :][: h[g] * w[g]] of shape (h[g], w[g]). pair p is
    the grids 2p and 2p + 1; an answer that is not known is an empty grid. task k owns the pairs first[k] to
    first[k + 1] - 1, its n_demos[k] demos before its queries. name[k] is unique, tasks of one key[k] are the same task.
    """
    ARRAYS = {'cells': 'u1', 'h': 'u1', 'w': 'u1', 'colors': '<u2', 'hash': '<u8', 'input_hash': '<u8', 'first': '<i8',
              'n_demos': '<i4', 'name': 'S', 'key': 'S32'}

    def __init__(self, source, arrays, bad=(), files=None):
        self.source = source
        self.bad = list(bad) # the tasks that on_bad=quarantine left out, as error messages
        self.files = files # sha256 of each array as a .npy file, None = not computed yet
        for name, x in arrays.items():
            setattr(self, name, x)
        sizes = np.multiply(self.h, self.w, dtype=np.int64)
        self.off = np.cumsum(sizes) - sizes

    @classmethod
    def of(cls, tasks, source="", bad=()):
        """ list of Task -> Corpus """
        grids, pairs, n_demos = [], [], []
        for task in tasks:
            n_demos.append(len(task.demos))
            pairs.append(len(task.demos) + len(task.queries))
            for x, y in task.demos + task.queries:
                grids += [x, np.zeros((0, 0), np.uint8) if y is None else y]
        arrays = {
            'cells': np.concatenate([grid.ravel() for grid in grids]),
            'h': np.array([grid.shape[0] for grid in grids], np.uint8),
            'w': np.array([grid.shape[1] for grid in grids], np.uint8),
            'first': np.append(0, np.cumsum(pairs)),
            'n_demos': np.array(n_demos, np.int32),
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
        return Task(self.name[k].decode(), self.source, pairs[:n], pairs[n:], self.key[k].decode())

    def is_demo(self):
        """ -> (pairs,) bool """
        n = np.diff(self.first)
        end_of_demos = (self.first[:-1] + self.n_demos).repeat(n)
        return np.arange(len(self.hash)) < end_of_demos

    def select(self, keep):
        """ the tasks in keep, a mask of them. the cells are shared, not copied """
        if keep.all():
            return self
        other = copy.copy(self)
        other.sha256 = self.sha256 # that of the whole source
        pairs = keep.repeat(np.diff(self.first))
        for name in ('n_demos', 'name', 'key'):
            setattr(other, name, getattr(self, name)[keep])
        for name in ('hash', 'input_hash'):
            setattr(other, name, getattr(self, name)[pairs])
        for name in ('off', 'h', 'w', 'colors'):
            setattr(other, name, getattr(self, name)[pairs.repeat(2)])
        other.first = np.append(0, np.cumsum(np.diff(self.first)[keep]))
        return other

    def close(self):
        """ the same tasks with no answer in them. what is left of each is its pair_hash """
        is_answer = np.zeros(len(self.h), bool)
        is_answer[1::2] = ~self.is_demo()
        sizes = np.multiply(self.h, self.w, dtype=np.int64)
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        for name in ('h', 'w', 'colors'):
            arrays[name] = np.where(is_answer, 0, arrays[name])
        kept = [self.cells[a : a + n] for a, n in zip(self.off[~is_answer], sizes[~is_answer])]
        arrays['cells'] = np.concatenate(kept)
        return Corpus(self.source, arrays, self.bad)

    @cached_property
    def sha256(self):
        """ what makes two corpora the same: every grid, name and split into tasks, not where the files lie """
        files = self.files
        if files is None:
            files = {name: hashlib.sha256(npy_bytes(getattr(self, name))).hexdigest() for name in self.ARRAYS}
        follow = 'colors', 'hash', 'input_hash' # from the rest
        parts = [files[name] for name in self.ARRAYS if name not in follow]
        return hashlib.sha256(json.dumps([parts, len(self.bad)]).encode()).hexdigest()

    def is_indexed(self):
        """ do colors and hashes follow from the cells? in all of PROOF pairs, and evenly spaced ones of more """
        P = len(self.hash)
        p = np.linspace(0, P - 1, min(P, PROOF)).astype(np.int64)
        g = np.stack([2 * p, 2 * p + 1], 1).ravel()
        colors, hashes, inputs = index_grids(self.cells, self.off[g], self.h[g], self.w[g])
        closed = self.h[2 * p + 1] == 0 # of such an answer nothing but its hash is left
        same = (hashes == self.hash[p]) | closed
        return same.all() and (inputs == self.input_hash[p]).all() and (colors == self.colors[g]).all()

    def save(self, out_dir):
        """ write a packed corpus: an .npy file an array and manifest.json, which is written last. raises ValueError """
        out_dir = Path(out_dir)
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ValueError(f"{out_dir}: exists and is not empty, choose another --out")
        out_dir.mkdir(parents=True, exist_ok=True)
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
        where = f"{path / 'manifest.json'}"
        manifest = read_json(where)
        check_keys(manifest, ('nanoarc', 'format', 'source', 'tasks', 'pairs', 'bad', 'sha256'), (), where)
        is_sound = type(manifest['sha256']) is dict and type(manifest['bad']) is list
        if manifest['format'] != FORMAT or not is_sound or not set(map(type, manifest['bad'])) <= {str}:
            raise ValueError(f"{where}: want a packed corpus of format {FORMAT}, got format {show(manifest['format'])}")
        arrays = {}
        for name, dtype in cls.ARRAYS.items():
            arrays[name] = open_array(path / f"{name}.npy", dtype, manifest['sha256'].get(name))
        top = arrays['cells'].max(initial=0)
        if top > 9:
            raise ValueError(f"{path / 'cells.npy'}: color {top} is outside 0..9")
        if not fit_together(**arrays):
            raise ValueError(f"{path}: the arrays do not fit together")
        c = cls(one_line(str(path)), arrays, map(one_line, manifest['bad']), manifest['sha256'])
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

def fit_together(cells, h, w, colors, hash, input_hash, first, n_demos, name, key):
    """ are the arrays of a packed corpus tasks together? """
    P, K = len(hash), len(n_demos)
    if not len(h) == len(w) == len(colors) == 2 * P or len(input_hash) != P:
        return False
    if K == 0 or not len(first) - 1 == len(name) == len(key) == K:
        return False
    n_pairs = np.diff(first)
    if first[0] != 0 or first[-1] != P or (n_demos < 1).any() or (n_pairs <= n_demos).any():
        return False
    sizes = np.multiply(h, w, dtype=np.int64)
    may_be_empty = np.zeros(2 * P, bool) # the answer of a query alone
    may_be_empty[1::2] = np.arange(P) >= (first[:-1] + n_demos).repeat(n_pairs)
    is_grid = (sizes > 0) | (may_be_empty & (h == w))
    if max(h.max(), w.max()) > MAX_SIDE or not is_grid.all() or sizes.sum() != len(cells):
        return False
    names = name.tolist()
    try: # text, in one line
        is_text = b" ".join(names + key.tolist()).decode().isprintable()
    except UnicodeDecodeError:
        return False
    return is_text and b"" not in names and len(set(names)) == K

def is_packed(path):
    """ is this the directory of a packed corpus? """
    path = Path(path) / 'manifest.json'
    return os.path.isfile(path) and b'"packed corpus"' in path.read_bytes()[:100]

def npy_bytes(x):
    """ an array as the bytes of an .npy file """
    f = io.BytesIO()
    np.save(f, x, allow_pickle=False)
    return f.getbuffer()

def hash_file(path):
    """ -> sha256 in hex, without holding the file in memory """
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()

# -----------------------------------------------------------------------------
# the leak guard: was a query trained on, with its answer? yes, if a trained pair has the same pair_hash. a query whose
# answer nobody here knows has none. then yes, if a trained pair has the same input and its task shares a demo with ours

class Query(NamedTuple):
    """ what the leak guard knows of a query """
    label: str # for people
    input: bytes # the grid, to tell whether a copy is verbatim
    pair: int # pair_hash, 0 = nobody here knows the answer
    demos: frozenset # pair_hash of the demos of its task

    def is_leaked_by(self, pair, task_pairs):
        """ by a trained pair of equal input? its pair_hash, and those of all pairs of its task -> bool """
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

def overlaps(corpus, asked):
    """
    pairs of a Corpus that leak queries_of others -> list of (task number, text that names both, and says whether the
    input is the same to the last cell)
    """
    found = []
    same_input = np.isin(corpus.input_hash, np.array(list(asked), np.uint64))
    for p in np.flatnonzero(same_input & (corpus.hash > 0)):
        k = int(np.searchsorted(corpus.first, p, side='right')) - 1
        task_pairs = corpus.hash[corpus.first[k] : corpus.first[k + 1]].tolist()
        for query in asked[int(corpus.input_hash[p])]:
            if query.is_leaked_by(int(corpus.hash[p]), task_pairs):
                how = "verbatim" if grid_bytes(corpus.grid(2 * p)) == query.input else "augmented"
                found.append((k, f"{corpus.name[k].decode()} ({corpus.source}) = {query.label}, {how}"))
    return found

def a_few(texts, n, sep="; "):
    """ the first n of them in a line, and dots for the rest """
    return sep.join(texts[:n]) + (f"{sep}..." if len(texts) > n else "")

def guard(data, adapt, drop_overlap, allow_leak):
    """
    two lists of (Corpus, repeat): pairs of data that are queries of adapt are refused. (its demos may be in data, they
    come with the queries.) -> data, without the tasks that hold such pairs if drop_overlap; how many these are; and the
    texts of the pairs that allow_leak let pass. raises ValueError
    """
    asked = queries_of([c for c, _ in adapt])
    kept, dropped, leaks = [], 0, []
    for c, repeat in data:
        found = overlaps(c, asked)
        leaks += [text for _, text in found]
        keep = np.ones(len(c), bool)
        if drop_overlap:
            keep[[k for k, _ in found]] = False
        dropped += int((~keep).sum())
        kept.append((c.select(keep), repeat))
    if drop_overlap:
        return kept, dropped, []
    if leaks and not allow_leak:
        raise ValueError(f"{len(leaks)} pairs of data are queries of adapt, answers included: {a_few(leaks, 3)}. "
                         "--drop_overlap leaves these tasks out, --allow_leak trains on them and says so")
    return kept, dropped, leaks

def trained_lines(corpora, trained):
    """
    list of Corpus, (pairs of all,) bool -> the text of trained_on.txt: of each trained pair a line of two hashes, of it
    and of its input, its task and source
    """
    lines, base = "", 0
    for c in corpora:
        mine = trained[base : base + len(c.hash)]
        base += len(c.hash)
        task = np.repeat(np.arange(len(c)), np.diff(c.first))
        for p in np.flatnonzero(mine):
            lines += f"{c.hash[p]:016x} {c.input_hash[p]:016x} {c.name[task[p]].decode()} ({c.source})\n"
    return lines

def with_earlier(lines, runs):
    """ the text of trained_on.txt and that of runs which went before ('' = none) -> every line of them, once """
    found = set(lines.splitlines(True))
    for run in runs:
        path = Path(run) / 'trained_on.txt'
        if run and path.is_file():
            found.update(path.read_text('utf-8').splitlines(True))
    return "".join(sorted(found))

def find_leaks(run, corpora):
    """ queries of corpora that the run was trained on with their answers -> list of texts that name both tasks """
    path = Path(run) / 'trained_on.txt'
    if not path.is_file():
        print(f"warning: no {path}, so nobody knows whether it was trained on what it is asked now")
        return []
    by_input = defaultdict(list) # {hash of the input: [(pair_hash, label of the task), ...]}
    task_pairs = defaultdict(set) # {label of the task: pair_hash of its pairs}
    for line in path.read_text('utf-8').splitlines():
        pair, x, label = line.split(" ", 2)
        by_input[int(x, 16)].append((int(pair, 16), label))
        task_pairs[label].add(int(pair, 16))
    found = {}
    for x, queries in queries_of(corpora).items():
        for query in queries:
            for pair, label in by_input[x]:
                if query.is_leaked_by(pair, task_pairs[label]):
                    found[query.label] = f"{label} = {query.label}"
    return list(found.values())
