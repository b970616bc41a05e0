"""
corpus -> documents -> rows -> batches.

a document is one token sequence: at shots=0 a single pair, otherwise a few demos of a task and then the pair asked
about. a row is T tokens of a batch and holds one or several documents.

the stream of documents is a pure function of (seed, t): document t is found by hashing counters. so there is no random
state to save, no epoch to run dry, and resuming at step 10^9 costs what step 0 costs. loops over documents and tokens
are compiled by numba, all else is numpy.
"""
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from nanoarc.corpus import a_few, add_extra, guard, joined, trained_lines, walk
from nanoarc.grids import END, IN, MAX_SHOTS, OUT, PAD, ROW, VOCAB_SIZE
from nanoarc.jit import jit, ufunc
from nanoarc.settings import check_numbers, differences
from nanoarc.sources import read_sources

WINDOW = 4096 # documents that are planned together
FORMAT = 4 # of the loader's state, goes up when the same state would mean other batches
MAX_EPOCH = 10**8 # targets. beyond it their tables fill the memory, of 8 bytes a target and more on the way

class Batch(NamedTuple):
    """ what a model is given. `x, y = batch[:2]` is enough for a plain nanoGPT """
    idx: torch.Tensor # (B, T) int64 token ids
    targets: torch.Tensor # (B, T) int64 next tokens, ignore_index where there is no loss
    pos: torch.Tensor # (B, T, 3) uint8 row, col, z
    doc: torch.Tensor # (B, T) int32 number of the document within the row, -1 on PAD
    task: torch.Tensor # (B, T) int32 row of the task embedding, or None if shots != 0
    dihedral: torch.Tensor # (B, T) uint8, or None if shots != 0

LOSS_ON = ('query', 'outputs', 'all')
BATCHING = ('bucket', 'pack', 'pad')
COLORS = ('auto', 'domain', 'nonzero', 'all', 'none')

@dataclass
class DataConfig:
    # sources whose demos and answered queries are trained on, e.g. 'arc1/training*2+my/dir'
    data: str = 'arc1/training'
    adapt: str = '' # sources whose demos alone are trained on, their answers stay closed
    # sources of pairs that somebody generated, e.g. RE-ARC: further demos of the tasks of data and adapt whose id a
    # list or a task of them has
    extra: str = ''
    extra_pairs: int = 0 # so many extra pairs of a task (and source) an epoch, other ones each time. 0 = all
    # demos before the target: 0 = none (a learned task embedding instead), -1 = all that fit, k = up to k
    shots: int = 0
    # leave out tasks with a demo of more tokens than this, in its longer orientation, and generated pairs. 0 = off
    max_pair: int = 0
    block_size: int = 2048 # the most tokens of a document. longer ones lose demos, never cells
    # 'bucket' = similar lengths together (best on cpu) | 'pack' = rows of block_size full of documents (best on gpu) |
    # 'pad' = a document a row of block_size
    batching: str = 'bucket'
    # tokens of a micro batch, padding included, over all ranks. at least one document
    batch_tokens: int = 2048
    # 'query' = the target's output | 'outputs' = also those of its context, but the first one, which nothing explains |
    # 'all' = every token
    loss_on: str = 'query'
    # the target where there is no loss, as the loss of your own model has it: -100 in PyTorch, -1 in nanoGPT
    ignore_index: int = -100
    # permuted colors: 'domain' = 1..9 minus the task's output-only ones | 'nonzero' | 'all' | 'none' |
    # 'auto' = domain at shots=0, else nonzero
    colors: str = 'auto'
    p_identity: float = 0.2 # share of the documents that keep their colors. they are turned all the same
    # so many tasks of data have their queries held out for the validation loss, at most half of them
    val_tasks: int = 32
    deal: int = 10 # a list of pairs of one rule (RE-ARC, BARC) is dealt out as tasks of so many demos and a query
    on_bad: str = 'raise' # a malformed task: 'raise' | 'quarantine' = leave it out and say so
    # train on pairs of data that are queries of adapt, and say so in checkpoint and score
    allow_leak: bool = False
    drop_overlap: bool = False # leave out the tasks of data that hold such pairs, of generated pairs these alone

    def check(self):
        """ raises ValueError that names the setting """
        for name, known in (('loss_on', LOSS_ON), ('colors', COLORS), ('batching', BATCHING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: want one of {', '.join(known)}")
        check_numbers(self, dict(block_size=1, batch_tokens=1, shots=-1, deal=1, ignore_index=-2**63),
                      dict(p_identity=1, ignore_index=-1)) # other targets are tokens

# -----------------------------------------------------------------------------
# counter-based randomness: a hash of a few numbers in place of a generator with a state

U = np.uint64 # numba makes float64 of uint64 and int64, so every constant beside a uint64 is wrapped

# what is drawn, a tag each, so that equal numbers mean different draws
DIHEDRAL, COLOR_MAP, IDENTITY, EPOCH, DEMOS, BATCHES, ROWS, POOL = map(U, range(8))

@ufunc('uint64(uint64, uint64)')
def mix(h, x):
    """ one more integer into a hash: the finalizer of splitmix64 (Steele et al. 2014) """
    h = (h ^ x) + U(0x9e3779b97f4a7c15)
    h = (h ^ (h >> U(30))) * U(0xbf58476d1ce4e5b9)
    h = (h ^ (h >> U(27))) * U(0x94d049bb133111eb)
    return h ^ (h >> U(31))

def hash64(*parts):
    """ non-negative integers or arrays of them, broadcast -> uint64 """
    h = U(0)
    for x in parts:
        h = mix(h, np.asarray(x, dtype=U))
    return h

@ufunc('uint64(uint64, uint64, uint64)')
def bijection(i, n, key):
    """
    where a shuffle of 0..n-1 puts i, n < 2^52. each key is another shuffle. nothing is stored, so it costs the same for
    any n: a feistel network of 4 rounds (Luby and Rackoff 1988) shuffles the numbers of an even number of bits, the
    fewest that hold n, and is repeated until it lands below n.
    """
    half = U(1) # bits of each half
    while U(1) << (half + half) < n:
        half += U(1)
    mask = (U(1) << half) - U(1)
    h = mix(U(0), key)
    while True:
        left, right = i >> half, i & mask
        for k in range(4):
            left, right = right, left ^ (mix(mix(h, U(k)), right) & mask)
        i = left << half | right
        if i < n: # true for at least a quarter of all these numbers
            return i

# -----------------------------------------------------------------------------
# the kernels

class Tables(NamedTuple):
    """ what the kernels know of K tasks and their P pairs. pair p is the grids 2p and 2p + 1 """
    cells: np.ndarray # uint8, of all grids one after another, row by row
    off: np.ndarray # (2P,) where each grid begins in cells
    h: np.ndarray # (2P,) uint8 its sides, 0 = an answer that is not known
    w: np.ndarray
    first: np.ndarray # (K + 1,) task k owns the pairs first[k] to first[k + 1] - 1
    n_demos: np.ndarray # (K,) its demos are the first so many of them
    n_shown: np.ndarray # (K,) the first so many of these are its own, or all where it was dealt: a prompt has no more
    pair_task: np.ndarray # (P,) int32
    tokens: np.ndarray # (2, P) int32 tokens of a pair, upright and turned
    answer: np.ndarray # (2, P) int32 those of its output, END among them. 0 = not known
    need: np.ndarray # (2, P) int32 tokens. a hidden answer counts as the longest output that is shown
    usable: np.ndarray # (P,) bool: a demo that may stand before a target
    domain: np.ndarray # (K,) uint16 set of the colors that augments may exchange, a bit a color
    row: np.ndarray # (K,) int32 row of the task embedding, -1 = none

class Documents(NamedTuple):
    """ a plan of n documents, nothing of them written yet """
    pairs: np.ndarray # (n, 1 + most) int32: column 0 is the target, column k the pair k steps before it, -1 = none
    dihedral: np.ndarray # (n,) uint8
    cmap: np.ndarray # (n, 10) uint8: what each color becomes
    length: np.ndarray # (n,) int64 tokens. where the answer is not known, of the prompt
    loss_tokens: np.ndarray # (n,) int64 tokens that carry loss

@jit
def draw_augment(pair, visit, h_dihedral, h_colors, domain, cmap):
    """
    -> the symmetry of a visit to a pair, and cmap (10,) is filled. without replacement: 8 visits see each symmetry
    once, n! visits each permutation of the n colors in its domain.
    """
    colors = np.empty(10, np.int64)
    n, total = 0, U(1)
    for x in range(10):
        cmap[x] = x
        if (domain >> x) & 1:
            colors[n] = x
            n += 1
            total *= U(n)
    # a number below n! is a permutation: digit j, in base n - j, says which of the colors j.. is swapped with color j
    code = bijection(visit % total, total, mix(mix(h_colors, pair), visit // total))
    for j in range(n):
        a, b = colors[j], colors[j + np.int64(code % U(n - j))]
        cmap[a], cmap[b] = cmap[b], cmap[a]
        code //= U(n - j)
    return bijection(visit % U(8), U(8), mix(mix(h_dihedral, pair), visit // U(8)))

@jit
def plan_documents(tab, target, visit, order, as_is, seed, p_identity, most, block_size, loss_on):
    """
    (n,) target pairs, how often each was visited before, and hashes that order their contexts -> Documents.
    the context is the other demos of the task, in a drawn order: each is taken if it still fits into block_size, `most`
    at the most, and never more than a prompt has. the first that is taken stands next to the target.
    as_is (n,): no augment, and the demos that a prompt has are taken, the first of the file nearest to the target.
    """
    n = len(target)
    pairs = np.full((n, 1 + most), -1, np.int32)
    dihedral = np.zeros(n, np.uint8)
    cmap = np.empty((n, 10), np.uint8)
    length = np.zeros(n, np.int64)
    loss_tokens = np.zeros(n, np.int64)
    h_dihedral = mix(mix(U(0), seed), DIHEDRAL)
    h_colors = mix(mix(U(0), seed), COLOR_MAP)
    h_identity = mix(mix(U(0), seed), IDENTITY)
    for i in range(n):
        p = target[i]
        task = tab.pair_task[p]
        if not as_is[i]:
            dihedral[i] = draw_augment(U(p), visit[i], h_dihedral, h_colors, tab.domain[task], cmap[i])
        if as_is[i] or np.float64(mix(mix(h_identity, U(p)), visit[i])) < p_identity * 2.0**64:
            cmap[i] = np.arange(10)
        turned = (dihedral[i] // 4 + dihedral[i]) % 2 # as grids.is_turned
        pairs[i, 0] = p
        length[i] = tab.tokens[turned, p]
        loss_tokens[i] = tab.answer[turned, p]
        if most > 0:
            limit = min(most, tab.n_shown[task])
            among = tab.n_shown[task] if as_is[i] else tab.n_demos[task]
            room = block_size - tab.need[turned, p]
            shots = 0
            for k in range(among):
                if shots == limit:
                    break
                j = k if as_is[i] else np.int64(bijection(U(k), U(among), order[i]))
                q = tab.first[task] + j
                if q != p and tab.usable[q] and tab.need[turned, q] <= room:
                    shots += 1
                    pairs[i, shots] = q
                    room -= tab.need[turned, q]
                    length[i] += tab.tokens[turned, q]
            if loss_on == 'outputs':
                for k in range(1, shots): # not pair `shots`, the first of the document: nothing stands before it
                    loss_tokens[i] += tab.answer[turned, pairs[i, k]]
        if loss_on == 'all':
            loss_tokens[i] = length[i] - 1
    return Documents(pairs, dihedral, cmap, length, loss_tokens)

@jit
def write_grid(tab, g, d, cmap, z, idx, pos, at):
    """ grid number g, turned by d and recolored, into a row of T tokens from `at` on -> where it ends """
    # the turned grid: where its first cell lies, the steps from there to the row below and to the right, its sides
    cell, down, right, H, W = walk(tab.off[g], np.int64(tab.h[g]), np.int64(tab.w[g]), d)
    for r in range(H):
        for c in range(W):
            idx[at + c] = cmap[tab.cells[cell + c * right]]
            pos[at + c, 0], pos[at + c, 1], pos[at + c, 2] = r, c + 1, z
        idx[at + W] = ROW
        pos[at + W, 0], pos[at + W, 1], pos[at + W, 2] = r + 1, 0, z
        cell += down
        at += W + 1
    return at

@jit
def write_document(tab, docs, i, loss_on, ignore, idx, targets, pos, at):
    """ document i into a row of T tokens from `at` on -> where it ends """
    start = at
    shots = (docs.pairs[i] >= 0).sum() - 1
    for k in range(shots, -1, -1): # the target comes last
        p, begin = docs.pairs[i, k], at
        idx[at] = IN
        pos[at, 0], pos[at, 1], pos[at, 2] = 0, 0, 2 * k
        at = write_grid(tab, 2 * p, docs.dihedral[i], docs.cmap[i], 2 * k, idx, pos, at + 1)
        out = at
        idx[at] = OUT
        pos[at, 0], pos[at, 1], pos[at, 2] = 0, 0, 2 * k + 1
        at += 1
        if tab.h[2 * p + 1] > 0: # otherwise the answer is not known, and a prompt ends here
            at = write_grid(tab, 2 * p + 1, docs.dihedral[i], docs.cmap[i], 2 * k + 1, idx, pos, at)
            idx[at] = END
            pos[at, 0], pos[at, 1], pos[at, 2] = pos[at - 1, 0], 1, 2 * k + 1
            at += 1
        targets[begin:at] = ignore
        if k == 0 or (loss_on == 'outputs' and k < shots):
            targets[out : at - 1] = idx[out + 1 : at] # OUT predicts the first cell, the last ROW predicts END
    if loss_on == 'all':
        targets[start : at - 1] = idx[start + 1 : at]
    return at

@jit
def write_rows(tab, docs, row_start, row_docs, r0, r1, loss_on, ignore, idx, targets, pos, doc, task, dihedral):
    """
    rows r0..r1-1 into the (B, T) arrays of a Batch, pos (B, T, 3). row r is the documents
    row_docs[row_start[r] : row_start[r + 1]] one after another. rows of the batch past these stay empty.
    ignore: the target where there is no loss. task and dihedral may have no elements: then they are not wanted.
    """
    for b in range(len(idx)):
        at = 0
        if b < r1 - r0:
            first, last = row_start[r0 + b], row_start[r0 + b + 1]
            for j in range(first, last):
                i, start = row_docs[j], at
                at = write_document(tab, docs, i, loss_on, ignore, idx[b], targets[b], pos[b], at)
                doc[b, start:at] = j - first
                if task.size > 0:
                    task[b, start:at] = tab.row[tab.pair_task[docs.pairs[i, 0]]]
                    dihedral[b, start:at] = docs.dihedral[i]
        idx[b, at:], targets[b, at:], pos[b, at:], doc[b, at:] = PAD, ignore, 0, -1
        if task.size > 0:
            task[b, at:], dihedral[b, at:] = 0, 0

@jit
def best_fit(length, T):
    """ (n,) lengths, the longest first -> (n,) the row of T tokens that each goes to: the fullest with room """
    row = np.empty(len(length), np.int64)
    room = np.empty(len(length), np.int64) # left in each row
    n_rows = 0
    for i in range(len(length)):
        best = n_rows # a new row, unless there is one with room
        for r in range(n_rows):
            if room[r] >= length[i] and (best == n_rows or room[r] < room[best]):
                best = r
        if best == n_rows:
            room[best] = T
            n_rows += 1
        room[best] -= length[i]
        row[i] = best
    return row

@jit
def cut_buckets(width, batch_tokens):
    """
    (n,) ascending widths -> where each batch of them ends. a batch has at least one row, at most batch_tokens tokens,
    and no row that is more than 1/16 wider than another.
    """
    ends = np.empty(len(width), np.int64)
    start, n = 0, 0
    for end in range(1, len(width) + 1):
        full = True
        if end < len(width): # would one more row be too many?
            full = (end - start + 1) * width[end] > batch_tokens or 16 * width[end] > 17 * width[start]
        if full:
            ends[n] = end
            start = end
            n += 1
    return ends[:n]

@jit
def has_context(tab, n, long, block_size):
    """
    -> (P,) bool: is there another usable demo among the first n (K,) of its task that fits before the pair, whatever
    the orientation?
    """
    found = np.zeros(len(long), np.bool_)
    for p in range(len(long)):
        task = tab.pair_task[p]
        for q in range(tab.first[task], tab.first[task] + n[task]):
            if q != p and tab.usable[q] and long[p] + long[q] <= block_size:
                found[p] = True
                break
    return found

# -----------------------------------------------------------------------------
# documents in rows, rows in batches

class Rows(NamedTuple):
    """ documents laid out in rows, and rows in batches """
    docs: Documents
    row_start: np.ndarray # (rows + 1,) int64: row r holds the documents row_docs[row_start[r] : row_start[r + 1]]
    row_docs: np.ndarray # (n,) int64
    batches: np.ndarray # (batches, 3) int64: first row, last row + 1, T
    loss_tokens: np.ndarray # (batches,) int64

def one_a_row(docs):
    """ Documents -> Rows, a document a row, in no batches """
    n = len(docs.length)
    return Rows(docs, np.arange(n + 1), np.arange(n), np.zeros((0, 3), np.int64), np.zeros(0, np.int64))

def even_batches(n_rows, B, T):
    """ -> (batches, 3) of at most B rows, even in size: a small last batch would leave some ranks without work """
    n = -(-n_rows // B)
    edges = np.arange(n + 1) * n_rows // n
    return np.stack([edges[:-1], edges[1:], np.full(n, T)], 1)

def bucket_widths(length, T):
    """
    (n,) lengths -> (n,) widths of rows, a little longer, of which there are few: 16 of them from a power of two to the
    next, at least 4 apart, so a compiler sees few shapes. rounding takes none over T, which may be all that a model can
    take (a document that is longer anyway stays as it is).
    """
    step = np.maximum(2.0 ** (np.floor(np.log2(length)) - 4), 4)
    width = np.ceil(length / step) * step
    return np.minimum(width, np.maximum(length, T)).astype(np.int64)

def pair_tokens(h, w):
    """
    (2P,) sides of grids -> (2, P) int32 tokens of each pair, upright and turned, and those of its output alone, 0 where
    that is not known. a grid takes its cells and a ROW a row; IN, OUT and END come to it.
    """
    cells = np.multiply(h, w, dtype=np.int32)
    rows = np.stack([h, w]) # turned, a grid has as many rows as it had columns
    grids = cells + rows # (2, 2P)
    answer = np.where(h[1::2] > 0, grids[:, 1::2] + 1, 0)
    return 1 + grids[:, ::2] + 1 + answer, answer

class Sampler:
    """
    corpora, and what a config makes of them: lengths, color domains, contexts. it plans documents and writes them.
    corpora is a list of Corpus. they are joined: task k and pair p count through all of them.

    rows: {task key: row of the task embedding} of a trained model, a task that it does not know has row -1. rows=None:
    they are numbered as the tasks come, tasks with equal demos share one. (Rows, the class, are those of batches.)
    """

    def __init__(self, corpora, cfg, rows=None):
        cfg.check()
        self.cfg, self.corpora = cfg, corpora
        sizes = [len(c) for c in corpora]
        self.part = np.repeat(np.arange(len(sizes)), sizes) # (K,) number of its corpus
        self.hash = self.join('hash') # (P,) corpus.pair_hash: the same for all augments of a pair, 0 = not known
        self.key = self.join('key') # (K,) tasks of one key are the same task
        self.is_demo = np.concatenate([c.is_demo() for c in corpora]) # (P,)
        self.is_shown = np.concatenate([c.is_shown() for c in corpora]) # (P,)
        self.is_extra = self.is_demo & ~self.is_shown # (P,)
        self.origin = self.join('origin') # (P,) number of its source of extra pairs, 0 = none
        h, w, n_demos = self.join('h'), self.join('w'), self.join('n_demos')
        n_shown = np.concatenate([c.n_shown() for c in corpora])
        self.known = h[1::2] > 0 # (P,)
        off = joined([c.off for c in corpora], [len(c.cells) for c in corpora])
        first = joined([c.first[:-1] for c in corpora], [len(c.hash) for c in corpora])
        first = np.append(first, len(self.hash))
        pair_task = np.repeat(np.arange(len(n_demos), dtype=np.int32), np.diff(first))
        tokens, answer = pair_tokens(h, w)
        # what fits must not depend on an answer that we may not see: it counts as long as the longest of a prompt
        longest = np.maximum.reduceat(np.where(self.is_shown, answer.max(0), 0), first[:-1]) # (K,)
        need = tokens + np.where(self.known, 0, longest[pair_task])
        domain = self.color_domains(first)
        if rows is None:
            rows = {}
            if cfg.shots == 0:
                for key in dict.fromkeys(self.key.tolist()):
                    rows[key.decode()] = len(rows)
        self.rows = rows
        row = np.array([rows.get(key.decode(), -1) for key in self.key.tolist()], np.int32)
        self.most = min(int(n_shown.max()), MAX_SHOTS) # demos before a target
        if cfg.shots >= 0:
            self.most = min(self.most, cfg.shots)
        self.tables = Tables(self.join('cells'), off, h, w, first, n_demos, n_shown, pair_task, tokens, answer,
                             need, self.is_demo.copy(), domain, row)

    def join(self, name):
        """ an array of all corpora. no copy of one, it may be mapped from a large file """
        arrays = [getattr(c, name) for c in self.corpora]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def color_domains(self, first):
        """ (K + 1,) where the pairs of each task begin -> (K,) uint16 sets of the colors that augments may exchange """
        mode = self.cfg.colors
        if mode == 'auto':
            mode = 'domain' if self.cfg.shots == 0 else 'nonzero'
        colors = {'none': [], 'all': range(10), 'nonzero': range(1, 10), 'domain': range(1, 10)}[mode]
        domain = np.full(len(first) - 1, sum(1 << x for x in colors), np.uint16)
        if mode == 'domain':
            # mdlARC's rule (src/common.py): a color that only outputs have means something by itself. answers play no
            # part, so that a hidden one cannot change a view, nor do extra pairs
            sets = self.join('colors')
            in_inputs = np.bitwise_or.reduceat(np.where(self.is_extra, 0, sets[::2]), first[:-1])
            in_outputs = np.bitwise_or.reduceat(np.where(self.is_shown, sets[1::2], 0), first[:-1])
            domain &= ~(in_outputs & ~in_inputs)
        return domain

    def grid(self, g):
        """ grid number g as a (H, W) uint8 view """
        t = self.tables
        h, w = int(t.h[g]), int(t.w[g])
        return t.cells[t.off[g] : t.off[g] + h * w].reshape(h, w)

    def task(self, k):
        """ task number k, counted through all corpora, as a Task """
        before = np.searchsorted(self.part, self.part[k]) # tasks of the corpora before its own
        return self.corpora[self.part[k]].task(int(k - before))

    def plan(self, target, visit, order, as_is, seed, p_identity=0.0):
        """ see plan_documents; arrays of n or scalars -> Documents """
        n = len(target)
        visit = np.full(n, visit, U) # an array as it is, a number n times
        order = np.full(n, order, U)
        as_is = np.full(n, as_is, bool)
        target = np.asarray(target, np.int64)
        return plan_documents(self.tables, target, visit, order, as_is, U(seed), float(p_identity),
                              self.most, self.cfg.block_size, self.cfg.loss_on)

    def lay_out(self, docs, batching, key):
        """ Documents -> Rows. key: the seed of the shuffle of batches, and in 'pack' of rows: neighbours are alike """
        n, T = len(docs.length), self.cfg.block_size
        B = max(self.cfg.batch_tokens // T, 1)
        row_docs, row_start = np.arange(n), np.arange(n + 1) # a document a row
        if batching == 'pad':
            batches = even_batches(n, B, T)
        elif batching == 'bucket':
            width = bucket_widths(docs.length, T)
            row_docs = np.argsort(width, kind='stable')
            ends = cut_buckets(width[row_docs], self.cfg.batch_tokens)
            batches = np.stack([np.append(0, ends[:-1]), ends, width[row_docs[ends - 1]]], 1)
        else:
            longest_first = np.argsort(-docs.length, kind='stable')
            row = np.empty(n, np.int64) # of each document
            row[longest_first] = best_fit(docs.length[longest_first], T)
            # rows are renumbered at random
            n_rows = int(row.max()) + 1
            new_number = np.empty(n_rows, np.int64) # of each row
            new_number[np.argsort(hash64(key, ROWS, np.arange(n_rows)))] = np.arange(n_rows)
            row = new_number[row]
            row_docs = np.argsort(row, kind='stable')
            row_start = np.append(0, np.cumsum(np.bincount(row)))
            batches = even_batches(n_rows, B, T)
        batches = batches[np.argsort(hash64(key, np.arange(len(batches))))]
        loss = np.append(0, np.cumsum(docs.loss_tokens[row_docs]))[row_start] # before each row
        return Rows(docs, row_start, row_docs, batches, loss[batches[:, 1]] - loss[batches[:, 0]])

    def write(self, rows, r0, r1, T, buffers=None, loss_on=None):
        """ rows r0..r1-1 -> Batch, in buffers if given. if there are none: one row of PAD, without loss """
        B = max(r1 - r0, 1)
        tasked = self.cfg.shots == 0
        buffers = buffers or Buffers(B * T, tasked)
        batch = buffers.shaped(B, T)
        task, dihedral = np.empty((0, 0), np.int32), np.empty((0, 0), np.uint8)
        if tasked:
            task, dihedral = batch.task.numpy(), batch.dihedral.numpy()
        write_rows(self.tables, rows.docs, rows.row_start, rows.row_docs, r0, r1, loss_on or self.cfg.loss_on,
                   self.cfg.ignore_index, batch.idx.numpy(), batch.targets.numpy(), batch.pos.numpy(),
                   batch.doc.numpy(), task, dihedral)
        return batch

class Buffers:
    """ memory for a Batch of at most n tokens. tasked: with task and dihedral. xy: idx and targets alone, for text """

    def __init__(self, n, tasked, xy=False, pin=False):
        def empty(shape, dtype, wanted):
            return torch.empty(shape, dtype=dtype, pin_memory=pin) if wanted else None
        self.n = n
        self.copied = None # on cuda: an event, that the copy out of here is done
        self.flat = Batch(empty(n, torch.int64, True), empty(n, torch.int64, True),
                          empty((n, 3), torch.uint8, not xy), empty(n, torch.int32, not xy),
                          empty(n, torch.int32, tasked and not xy), empty(n, torch.uint8, tasked and not xy))

    def shaped(self, B, T):
        """ -> Batch of B rows of T """
        parts = []
        for x in self.flat:
            parts.append(x if x is None else x[: B * T].view(B, T, *x.shape[1:]))
        return Batch(*parts)

def split(n, rank, world):
    """ which of n rows are a rank's: first, last + 1. every row is some rank's, whatever the number of ranks """
    return n * rank // world, n * (rank + 1) // world

# -----------------------------------------------------------------------------
# the stream

class Pools(NamedTuple):
    """
    what the targets of an epoch are drawn from. pool j, pairs[first[j] :][: size[j]], is the extra pairs that a task
    has from one source, or any other pair alone. slots[j] targets of each epoch are from pool j, none of them twice
    before all came once, which may take several epochs
    """
    pairs: np.ndarray # (m,) numbers
    first: np.ndarray # (pools,)
    size: np.ndarray # (pools,) uint64
    slots: np.ndarray # (pools,) uint64

class ArcDataset(torch.utils.data.Dataset):
    """
    the stream of documents. each trainable pair is the target once an epoch (n times where its source is repeated *n),
    its context is the other demos of its task and never a query. the demos of `adapt` are targets too. its answers stay
    closed: all that is kept of one is a hash, for the leak guard. pairs of `extra` are further demos of these tasks,
    but what a query is asked with, and in which augments, does not depend on them.

    ds[t] is a Batch of one document, (T,) each with T = block_size, for any t >= 0 (the stream has no end, do not
    iterate). len(ds) = targets x epochs, epochs has no other use. torch's DataLoader wants collate_fn=ds.collate.

    what is left out is counted: num_tasks_out (tasks over max_pair), num_dropped (tasks, by drop_overlap); of pairs
    num_pairs_out and num_pairs_dropped (generated ones, likewise), num_held (a validation query, or an augment of one),
    num_long (over block_size), num_alone (without context, where shots != 0). leaks: what allow_leak let pass.
    strangers: ids of extra that no task has. shares: of the targets, which each of `sources` has.

    sources: in place of cfg.data and cfg.adapt, without cfg.extra, two lists of (Corpus, repeat).
    raises ValueError if nothing is left, or if pairs of data are queries of adapt.
    """

    # the loop asks these of any dataset, see run.py
    vocab_size = VOCAB_SIZE
    tokenizer_sha256 = 'grids' # what its tokens mean
    files = {} # {name: bytes} that training keeps beside the checkpoint

    def __init__(self, cfg, seed=1337, epochs=1, sources=None):
        cfg.check()
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: want a seed of 64 bits")
        self.cfg, self.seed, self.epochs = cfg, seed, epochs
        extra = []
        if sources is None:
            data = read_sources(cfg.data, True, cfg.on_bad, cfg.deal)
            adapt = read_sources(cfg.adapt, False, cfg.on_bad, cfg.deal)
            extra = read_sources(cfg.extra, True, cfg.on_bad, cfg.deal)
        else:
            data, adapt = sources
        if len(data + adapt) == 0:
            raise ValueError("nothing to train on: data and adapt are both empty")
        parts = [(c.sha256, repeat, True) for c, repeat in data] + [(c.sha256, repeat, False) for c, repeat in adapt]
        parts += [(c.sha256, repeat, 'extra') for c, repeat in extra]
        self.corpus_sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.sources = [(c.source, repeat) for c, repeat in data + adapt + extra]
        corpora = self.leave_out([c for c, _ in data], [c for c, _ in adapt], [c for c, _ in extra])
        self.sampler = Sampler(corpora, cfg)
        self.rows = self.sampler.rows # {task key: row of the task embedding}, {} in context
        self.choose_targets(len(data))

    def leave_out(self, data, adapt, extra):
        """
        three lists of Corpus -> those of data and adapt, with the extra pairs and without what is too large or
        overlaps, which is counted. some may have no task left
        """
        cfg = self.cfg
        self.bad = [error for c in data + adapt + extra for error in c.bad] # what quarantine left out
        corpora, self.strangers = add_extra(data + adapt, extra)
        self.n_read = sum(len(c) for c in corpora)
        fit, self.num_pairs_out = [], 0
        for c in corpora:
            c, n = c.leave_out(too_large(c, cfg.max_pair))
            fit.append(c)
            self.num_pairs_out += n
        self.num_tasks_out = self.n_read - sum(len(c) for c in fit)
        n = len(data)
        corpora, self.num_pairs_dropped, self.leaks = guard(fit[:n], fit[n:], cfg.drop_overlap, cfg.allow_leak)
        n_left = sum(len(c) for c in corpora)
        self.num_dropped = self.n_read - self.num_tasks_out - n_left
        if n_left == 0:
            raise ValueError(self.nothing())
        return corpora

    def nothing(self):
        """ what to say if nothing is left """
        cfg = self.cfg
        return (f"nothing to train on in data={cfg.data!r} adapt={cfg.adapt!r}: of {self.n_read} tasks "
                f"{self.num_tasks_out} are over max_pair={cfg.max_pair} and {self.num_dropped} overlap")

    def choose_targets(self, n_data):
        """ which pairs are validated on, and which are trained on. the first n_data corpora are those of data """
        s, t, cfg = self.sampler, self.sampler.tables, self.cfg
        in_data = s.part[t.pair_task] < n_data # (P,) as all masks here
        val, held = self.hold_out(s.known & ~s.is_demo & in_data)
        t.usable[held] = False # has_context below looks at it
        longest = t.need.max(0) # of upright and turned
        fits = longest <= cfg.block_size
        with_context = with_shown = np.ones(len(longest), bool)
        if cfg.shots != 0:
            with_context = has_context(t, t.n_demos, longest, cfg.block_size)
            with_shown = has_context(t, t.n_shown, longest, cfg.block_size) # all that validation puts in front
        can = s.known & (s.is_demo | in_data)
        self.num_held = int((can & held).sum())
        self.num_long = int((can & ~held & ~fits).sum())
        self.num_alone = int((can & ~held & fits & ~with_context).sum())
        self.val_pairs = np.flatnonzero(val & fits & with_shown)
        chosen = can & ~held & fits & with_context
        if not chosen.any():
            raise ValueError(f"{self.nothing()}, then {self.num_held} pairs are held out, {self.num_long} over "
                             f"block_size={cfg.block_size}, {self.num_alone} without context")
        self.trained = (t.usable | chosen) & (in_data | s.is_extra) # whose output is seen, but adapt's own
        self.make_pools(np.flatnonzero(chosen))

    def make_pools(self, pairs):
        """ numbers of the pairs that may be targets -> what an epoch draws them from, and the share of each source """
        s, t = self.sampler, self.sampler.tables
        task, is_extra = t.pair_task[pairs], s.is_extra[pairs]
        # number of its source: those of data and adapt, then those of extra pairs, whose origin counts from 1
        source = np.where(s.origin[pairs] > 0, len(s.corpora) - 1 + s.origin[pairs], s.part[task])
        goes_on = is_extra[1:] & is_extra[:-1] & (task[1:] == task[:-1]) & (source[1:] == source[:-1])
        first = np.flatnonzero(np.append(True, ~goes_on))
        size = np.diff(np.append(first, len(pairs)))
        repeat = np.array([repeat for _, repeat in self.sources])[source[first]]
        slots = np.minimum(size, self.cfg.extra_pairs or len(pairs)) * repeat
        if slots.sum() > MAX_EPOCH:
            raise ValueError(f"{slots.sum():,} targets an epoch, want at most {MAX_EPOCH:,}: repeat sources less (*n)")
        self.pools = Pools(pairs, first, size.astype(U), slots.astype(U))
        self.pool = np.repeat(np.arange(len(first), dtype=np.int32), slots)
        self.slot = (np.arange(len(self.pool)) - np.repeat(np.cumsum(slots) - slots, slots)).astype(np.int32)
        self.shares = np.bincount(source[first], slots, len(self.sources)) / len(self.pool)

    def hold_out(self, query):
        """
        (P,) answered queries -> (P,) those of val_tasks tasks, for validation, chosen by content so that each seed is
        judged on the same ones; and (P,) pairs that may not be trained on for that: these, and all augments of them.
        """
        s, task = self.sampler, self.sampler.tables.pair_task
        first_of = {} # {key: the first task of that key}
        for k in np.unique(task[query]):
            first_of.setdefault(s.key[k], k)
        keys = sorted(first_of)[: min(self.cfg.val_tasks, len(first_of) // 2)]
        val = query & np.isin(task, [first_of[key] for key in keys])
        held = np.isin(s.hash, s.hash[val]) & s.known
        return val, held

    @property
    def batch_rows(self):
        """ rows of a global batch, where all batches have one shape. 0 = shapes differ """
        return 0 if self.cfg.batching == 'bucket' else max(self.cfg.batch_tokens // self.cfg.block_size, 1)

    def loader(self, rank=0, world=1, device='cpu'):
        return ArcLoader(self, rank, world, device)

    def about(self):
        """ a line of counts: what is here, and what is not """
        tasks, queries = len(self.sampler.key), len(self.val_pairs)
        text = f"{tasks} tasks, {len(self)} documents an epoch, {queries} validation queries"
        out = {'tasks over max_pair': self.num_tasks_out, 'tasks overlapping': self.num_dropped,
               'tasks malformed': len(self.bad), 'generated pairs over max_pair': self.num_pairs_out,
               'generated pairs overlapping': self.num_pairs_dropped, 'pairs held out': self.num_held,
               'pairs too long': self.num_long, 'pairs without context': self.num_alone}
        left_out = [f"{n} {what}" for what, n in out.items() if n]
        if left_out:
            text += f"; left out: {', '.join(left_out)}"
        if len(self.sources) > 1:
            shares = [f"{x:.1%} {name}" for (name, _), x in zip(self.sources, self.shares)]
            text += f"; targets: {', '.join(shares)}"
        if self.strangers:
            text += f"; {len(self.strangers)} ids of extra fit no task: {a_few(self.strangers, 5, ', ')}"
        return text

    def trained_on(self):
        """ of trained_on.txt: a line for each pair of data and extra that is trained on, solve refuses these """
        return trained_lines(self.sampler.corpora, self.trained)

    def __reduce__(self):
        """ to a worker process go the settings, it reads the files itself: a packed corpus is mapped there too """
        return reopen, (type(self), self.cfg, self.seed, self.epochs, self.corpus_sha256)

    def __len__(self):
        return len(self.pool) * self.epochs

    def __getitem__(self, t):
        if t < 0: # the stream has no end to count from
            raise IndexError(f"document {t}: want t >= 0")
        batch = self.sampler.write(one_a_row(self.plan(np.array([t], U))), 0, 1, self.cfg.block_size)
        return Batch(*(x if x is None else x[0] for x in batch))

    def collate(self, items):
        """ list of ds[t] -> Batch, for torch's DataLoader(ds, collate_fn=ds.collate) """
        return Batch(*(None if x[0] is None else torch.stack(x) for x in zip(*items)))

    def plan(self, t):
        """ (n,) document numbers -> Documents """
        t, n = np.asarray(t, U), U(len(self.pool))
        epoch, i = np.divmod(t, n)
        i = bijection(i, n, hash64(self.seed, EPOCH, epoch)).astype(np.int64)
        pool = self.pool[i]
        first, size = self.pools.first[pool], self.pools.size[pool]
        drawn = epoch * self.pools.slots[pool] + self.slot[i].astype(U) # so many came from its pool before
        visit, k = np.divmod(drawn, size) # every `size` of them see each pair of the pool once
        some = size > 1 # elsewhere there is nothing to shuffle
        key = hash64(self.seed, POOL, self.pools.pairs[first[some]], visit[some])
        k[some] = bijection(k[some], size[some], key)
        target = self.pools.pairs[first + k.astype(np.int64)]
        order = hash64(self.seed, DEMOS, t)
        return self.sampler.plan(target, visit, order, False, self.seed, self.cfg.p_identity)

    def plan_window(self, window):
        """ window number -> Rows of its documents """
        t = U(window) * U(WINDOW) + np.arange(WINDOW, dtype=U)
        return self.sampler.lay_out(self.plan(t), self.cfg.batching, hash64(self.seed, BATCHES, window))

    def val_batches(self, rank=0, world=1):
        """ the validation set as Batches, the same each time: as_is (plan_documents), in rows as in training """
        if len(self.val_pairs) == 0:
            return
        docs = self.sampler.plan(self.val_pairs, 0, 0, True, 0)
        rows = self.sampler.lay_out(docs, self.cfg.batching, U(0))
        for r0, r1, T in rows.batches.tolist():
            a, b = split(r1 - r0, rank, world)
            # loss on the query alone, whatever the setting, so that runs of other settings compare
            yield self.sampler.write(rows, r0 + a, r0 + b, T, loss_on='query')

def long_pairs(corpus, max_pair):
    """ -> (pairs,) bool: of more than max_pair tokens in its longer orientation. 0 = none """
    if max_pair == 0:
        return np.zeros(len(corpus.hash), bool)
    return pair_tokens(corpus.h, corpus.w)[0].max(0) > max_pair

def too_large(corpus, max_pair):
    """ -> (pairs,) bool: may not be trained on. the query of a published task may be of any size """
    return long_pairs(corpus, max_pair) & (corpus.is_demo() | corpus.is_generated())

def small_tasks(corpus, max_pair):
    """ -> (tasks,) bool: no demo of its prompts has more than max_pair tokens in its longer orientation. 0 = all """
    large = long_pairs(corpus, max_pair) & corpus.is_shown()
    return np.bincount(corpus.pair_task()[large], minlength=len(corpus)) == 0

def reopen(cls, cfg, seed, epochs, corpus_sha256):
    """ an ArcDataset in another process. raises ValueError if the files have changed since """
    ds = cls(cfg, seed, epochs)
    if ds.corpus_sha256 != corpus_sha256:
        raise ValueError(f"data={cfg.data!r} adapt={cfg.adapt!r}: changed since the first process read it")
    return ds

# -----------------------------------------------------------------------------
# the loader

class ArcLoader:
    """
    batches without end: next_batch(), state_dict(), load_state_dict(). each window of WINDOW consecutive documents is
    planned by itself, cut into batches, and these shuffled. every rank plans the whole global batch and writes its own
    rows, so the world size is not part of the state. a thread keeps the next batch ready (prefetch). the tensors of a
    batch are overwritten by the second call of next_batch after the one that gave them.
    """

    def __init__(self, dataset, rank=0, world=1, device='cpu', prefetch=True):
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.ds, self.rank, self.world = dataset, rank, world
        self.device, self.prefetch = torch.device(device), prefetch
        self.window, self.batch = 0, 0 # the place of the batch that comes next
        self.plan_window = lru_cache(maxsize=2)(lambda w: dataset.plan_window(w))
        self.start()

    def start(self):
        """ the thread and what belongs to it """
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(1, 'nanoarc-loader') if self.prefetch else None
        self.ready = None # (place, future) of the batch that it works on
        self.ring = [None] * 3 # buffers: one is with the user, one was before, one is being written
        self.turn = 0 # the buffers for the next batch

    def check_process(self):
        """ a forked process has no thread, and who knows who holds the lock there """
        if self.pid != os.getpid():
            self.start()

    def rows(self, window):
        """ window number -> Rows. two threads ask, one plans """
        self.check_process()
        with self.lock:
            return self.plan_window(window)

    def after(self, window, batch):
        """ the place of the batch after this one """
        if batch + 1 < len(self.rows(window).batches):
            return window, batch + 1
        return window + 1, 0

    def mine(self, window, batch):
        """ of a global batch -> Rows of its window, this rank's first row and last row + 1, T """
        rows = self.rows(window)
        r0, r1, T = rows.batches[batch].tolist()
        a, b = split(r1 - r0, self.rank, self.world)
        return rows, r0 + a, r0 + b, T

    def loss_tokens(self, n=1):
        """ tokens that carry loss in the next n global batches. the plan knows: ranks need not ask each other """
        place, total = (self.window, self.batch), 0
        for _ in range(n):
            window, batch = place
            total += int(self.rows(window).loss_tokens[batch])
            place = self.after(*place)
        return total

    def tokens(self):
        """ of the next global batch, padding included: what all ranks work on """
        r0, r1, T = self.rows(self.window).batches[self.batch].tolist()
        return (r1 - r0) * T

    def names(self, window, batch, n=1):
        """ ids of the tasks in this rank's rows of the n global batches from a place on """
        s, numbers = self.ds.sampler, set()
        for _ in range(n):
            rows, r0, r1, _ = self.mine(window, batch)
            docs = rows.row_docs[rows.row_start[r0] : rows.row_start[r1]]
            numbers.update(s.tables.pair_task[rows.docs.pairs[docs, 0]].tolist())
            window, batch = self.after(window, batch)
        return sorted(s.task(k).name for k in numbers)

    def write(self, place, turn):
        """ -> Batch on the cpu: this rank's rows of the global batch at a place, in buffers `turn` of the ring """
        rows, r0, r1, T = self.mine(*place)
        buffers = self.ring[turn]
        if buffers is None or buffers.n < max(r1 - r0, 1) * T:
            n = max((r1 - r0) * T, T, self.ds.cfg.batch_tokens // self.world)
            buffers = self.ring[turn] = Buffers(n, self.ds.cfg.shots == 0, pin=self.device.type == 'cuda')
        if buffers.copied is not None: # on cuda: the copy out of here may still be on its way
            buffers.copied.synchronize()
        return self.ds.sampler.write(rows, r0, r1, T, buffers)

    def next_batch(self):
        """ -> Batch on self.device, this rank's rows of the next global batch """
        self.check_process()
        place, turn = (self.window, self.batch), self.turn
        batch = None
        if self.ready is not None:
            at, future = self.ready
            written = future.result() # waits for the thread
            if at == place: # otherwise somebody has loaded another state meanwhile
                batch = written
        if batch is None:
            batch = self.write(place, turn)
        self.window, self.batch = self.after(*place)
        self.turn = (turn + 1) % 3
        if self.pool is not None:
            following = self.window, self.batch
            self.ready = following, self.pool.submit(self.write, following, self.turn)
        if self.device.type == 'cpu':
            return batch
        batch = Batch(*(x if x is None else x.to(self.device, non_blocking=True) for x in batch))
        if self.device.type == 'cuda':
            self.ring[turn].copied = torch.cuda.current_stream(self.device).record_event()
        return batch

    def state_dict(self):
        """ all there is to resume by, a dict of json values: the place, and what must be the same for it to be one """
        state = {'format': FORMAT, 'window': self.window, 'batch': self.batch, 'seed': self.ds.seed}
        state['corpus_sha256'] = self.ds.corpus_sha256
        for name, x in asdict(self.ds.cfg).items():
            # files may move, corpus_sha256 may not change. what is ignored may be called otherwise
            if name not in ('data', 'adapt', 'extra', 'on_bad', 'ignore_index'):
                state[name] = x
        return state

    def load_state_dict(self, state):
        """ go to a saved place. raises ValueError that names the fields if it was a place in another stream """
        now = self.state_dict()
        default = asdict(type(self.ds.cfg)()) # of a setting that is newer than the saved state
        saved = {name: state.get(name, default.get(name)) for name in {**now, **state}}
        place = {'window': 0, 'batch': 0} # may differ
        wrong = differences({**saved, **place}, {**now, **place})
        if wrong:
            raise ValueError("resume refused: " + "; ".join(wrong))
        self.window, self.batch = state['window'], state['batch']
