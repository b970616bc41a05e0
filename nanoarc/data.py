"""
grids -> corpus -> samples -> batches. a task of two demos, the first being

    input 1 2   output 3      as one document of shots=0:    IN  1 2 ROW 3 4 ROW  OUT  3 ROW 5 ROW  END
          3 4          5      what carries loss (targets):                        3  ROW 5 ROW END  .

each grid row is closed by ROW, so that the shape of a grid survives. the stream of documents is a pure function of
(seed, t): document t is found by hashing counters, so there is no random state to save, no epoch to run dry, and
resuming at step 10^9 costs what step 0 costs. what runs once a document is compiled by numba, the rest is numpy.
"""
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, vectorize

from nanoarc.sources import MAX_SIDE, grid_bytes, guard, read_sources, trained_lines, walk

# tokens: 0..9 are the colors
ROW, IN, OUT, END, PAD = 10, 11, 12, 13, 14 # 15 is unused
VOCAB_SIZE = 16
MAX_GRID = MAX_SIDE * (MAX_SIDE + 1) # tokens of the largest grid
MAX_PAIR = 1 + MAX_GRID + 1 + MAX_GRID + 1 # IN rows OUT rows END
MAX_SHOTS = 127 # z = 2 * shots + 1 must fit a byte
WINDOW = 4096 # documents planned together
FORMAT = 2 # of the loader's state, goes up when the same state would mean other batches

class Batch(NamedTuple):
    """ what a model is given. `x, y = batch[:2]` is enough for a plain nanoGPT """
    idx: torch.Tensor # (B, T) int64 token ids
    targets: torch.Tensor # (B, T) int64 next tokens, -100 where there is no loss
    pos: torch.Tensor # (B, T, 3) uint8 row, col, z
    doc: torch.Tensor # (B, T) int32 number of the document within the row, -1 on PAD
    task: torch.Tensor # (B, T) int32 row of the task embedding, or None if shots != 0
    dihedral: torch.Tensor # (B, T) uint8, or None if shots != 0

@dataclass
class DataConfig:
    data: str = 'arc1/training' # sources whose demos and answered queries are trained on, e.g. 'arc1/training*2+my/dir'
    adapt: str = '' # sources whose demos alone are trained on, their answers stay closed
    shots: int = 0 # demos before the target: 0 = none (a learned task embedding instead), -1 = all that fit, k = up to k
    max_pair: int = 0 # leave out tasks with a demo of more tokens than this, in its longer orientation. 0 = off
    block_size: int = 2048 # the most tokens of a document. longer ones lose demos, never cells
    batching: str = 'bucket' # 'bucket' = similar lengths together (best on cpu) | 'pack' = rows of block_size full of documents (best on gpu) | 'pad' = a document a row of block_size
    batch_tokens: int = 2048 # tokens of a micro batch, padding included, over all ranks. at least one document
    loss_on: str = 'query' # 'query' = the target's output | 'outputs' = and the context's, but the first | 'all' = every token
    colors: str = 'auto' # permuted colors: 'domain' = 1..9 minus the task's output-only ones | 'nonzero' | 'all' | 'none' | 'auto' = domain at shots=0, else nonzero
    p_identity: float = 0.2 # share of the documents that keep their colors
    val_tasks: int = 32 # so many tasks of data have their queries held out for the validation loss, at most half of them
    deal: int = 10 # demos of each task that is dealt from a list of pairs (RE-ARC, BARC)
    on_bad: str = 'raise' # a malformed task: 'raise' | 'quarantine' = leave it out and say so
    allow_leak: bool = False # train on pairs of data that are queries of adapt, and say so in checkpoint and score
    drop_overlap: bool = False # leave out the tasks of data that hold such pairs

    def dataset(self, seed):
        return ArcDataset(self, seed)

LOSS_ON, BATCHING, COLORS_MODES = ('query', 'outputs', 'all'), ('bucket', 'pack', 'pad'), ('auto', 'domain', 'nonzero', 'all', 'none')

# -----------------------------------------------------------------------------
# counter-based randomness

U = np.uint64 # numba, like numpy 1, makes float64 of uint64 and int64: every constant is wrapped
DIHEDRAL, COLORS, IDENTITY, EPOCH, DEMOS, BATCHES, ROWS = (U(i) for i in range(7)) # one tag for each thing that is drawn

@vectorize(['uint64(uint64, uint64)'], cache=True)
def mix(h, x):
    """ one more integer into a hash: the finalizer of splitmix64 (Steele et al. 2014) """
    h = (h ^ x) + U(0x9e3779b97f4a7c15)
    h = (h ^ (h >> U(30))) * U(0xbf58476d1ce4e5b9)
    h = (h ^ (h >> U(27))) * U(0x94d049bb133111eb)
    return h ^ (h >> U(31))

def hash64(*parts):
    """ non-negative integers or arrays of them, broadcast -> uint64 """
    return reduce(mix, (np.asarray(x, dtype=U) for x in parts), U(0))

@vectorize(['uint64(uint64, uint64, uint64)'], cache=True)
def bijection(i, n, key):
    """
    a keyed permutation of 0..n-1 evaluated at i, n < 2^52. nothing is stored, so it costs the same for any n: a feistel
    network of 4 rounds (Luby and Rackoff 1988) over the next even number of bits, walked until it lands inside.
    """
    half = U(1)
    while U(1) << (half + half) < n:
        half += U(1)
    mask, h = (U(1) << half) - U(1), mix(U(0), key)
    while True:
        left, right = i >> half, i & mask
        for k in range(4):
            left, right = right, left ^ (mix(mix(h, U(k)), right) & mask)
        i = left << half | right
        if i < n: # at worst 1 time in 4, since n fills at least a quarter of the square
            return i

# -----------------------------------------------------------------------------
# grids and tokens

def dihedral(grid, d):
    """ the d-th of the 8 symmetries of the square: transpose if d >= 4, then np.rot90 d % 4 times """
    return np.rot90(grid.T if d >= 4 else grid, int(d) % 4)

def undo_dihedral(grid, d):
    """ the inverse of dihedral """
    grid = np.rot90(grid, -int(d) % 4)
    return grid.T if d >= 4 else grid

def next_pos(pos, token):
    """
    (..., 3) row, col, z of a token and the (...) token after it -> where that one stands. works for numpy and torch.
    a cell and END stand one to the right, ROW opens the next row, OUT and IN start a grid: so every cell stands at
    (0, +1) from the token that predicts it, and z counts grids down to 0 for the last input and 1 for its output.
    """
    r, c, z = pos[..., 0], pos[..., 1], pos[..., 2]
    inside = (token != IN) & (token != OUT) # True counts as 1
    row = (r + (token == ROW)) * inside
    col = (c + 1) * (inside & (token != ROW))
    z = z + 1 * (token == OUT) - 3 * (token == IN)
    return torch.stack([row, col, z], -1) if torch.is_tensor(pos) else np.stack([row, col, z], -1)

def decode_grid(tokens):
    """ tokens of one grid, from its first cell to its last ROW -> (H, W) uint8. raises ValueError if they are no grid """
    rows = [[]]
    for x in tokens:
        if x == ROW:
            rows.append([])
        elif 0 <= x <= 9:
            rows[-1].append(x)
        else:
            raise ValueError(f"token {x} inside a grid")
    lens = {len(row) for row in rows[:-1]}
    if rows[-1] or len(lens) != 1 or not 1 <= len(rows) - 1 <= MAX_SIDE or not 1 <= len(rows[0]) <= MAX_SIDE:
        raise ValueError(f"rows of lengths {[len(row) for row in rows]} are no grid")
    return np.array(rows[:-1], dtype=np.uint8)

def grammar(pos, width):
    """
    which tokens may follow, inside an answer. pos (B, 3) of the last token and width (B,) of the first row, 0 while it
    is open, both int64 -> (B, 16) bool. ROW at col W only, cells before it, END after a ROW, no side over 30.
    """
    r, c = pos[:, :1], pos[:, 1:2] # (B, 1) rows closed so far, cells in this row
    width = torch.where(width == 0, MAX_SIDE, width)[:, None]
    token = torch.arange(VOCAB_SIZE, device=pos.device)
    cell = (token < ROW) & (c < width) & (r < MAX_SIDE)
    row = (token == ROW) & (c > 0) & ((c == width) | (r == 0))
    return cell | row | ((token == END) & (c == 0) & (r > 0))

# -----------------------------------------------------------------------------
# the kernels: compiled once, then cached on disk. they hold no lock, so another thread may run meanwhile

class Tables(NamedTuple):
    """ what the kernels know of a corpus: K tasks, P pairs, in few and narrow arrays: in a large one each look is a cache miss """
    cells: np.ndarray # as in sources.Corpus
    grid: np.ndarray # (2P,) int64 where each grid begins in cells << 16 | height << 8 | width. no sides: the answer is not known
    first: np.ndarray # as in sources.Corpus
    n_demos: np.ndarray
    pair_task: np.ndarray # (P,) int32
    need: np.ndarray # (2, P) int16 tokens that a pair may take, upright and turned
    usable: np.ndarray # (P,) bool, a demo that may stand in a context
    domain: np.ndarray # (K,) uint16 set of the colors that augments may exchange, a bit a color
    row: np.ndarray # (K,) int32 row of the task embedding, -1 = none
    place: np.ndarray # (31, 3 * MAX_GRID) uint8 row, col, 0 of each token of a grid of 30 rows, by its width
    depth: np.ndarray # (256, 3 * MAX_GRID) uint8 0, 0, z of as many tokens, by z

class Documents(NamedTuple):
    """ a plan of n documents, nothing of them written yet """
    pairs: np.ndarray # (n, 1 + most) int32: column 0 is the target, column k the pair k steps before it, -1 = none
    drawn: np.ndarray # (n, most) int32 the demos that were drawn for the context, in order, those that found no room too. -1 = none
    tight: np.ndarray # (n,) bool: some found none
    dihedral: np.ndarray # (n,) uint8
    cmap: np.ndarray # (n, 10) uint8 color map
    length: np.ndarray # (n,) int64 tokens, of the prompt where the answer is not known
    loss_tokens: np.ndarray # (n,) int64 tokens that carry loss

@njit(cache=True, nogil=True)
def draw_augment(pair, visit, h_dihedral, h_colors, domain, cmap, ranks, colors):
    """
    -> dihedral, and cmap (10,) is filled. without replacement: 8 visits of a pair see each dihedral once, and its color
    maps are all permutations of the domain, in steps that have no factor in common with their number. ranks (8,) uint64
    and colors (10,) int64 are scratch.
    """
    h, d = mix(mix(h_dihedral, pair), visit // U(8)), 0
    for k in range(8):
        ranks[k] = mix(h, U(k))
    for k in range(8): # the dihedral whose hash has so many below it
        below = 0
        for other in range(8):
            below += ranks[other] < ranks[k]
        d = k if below == np.int64(visit % U(8)) else d
    n, total = 0, U(1)
    for x in range(10):
        cmap[x] = x
        if (domain >> x) & 1:
            colors[n] = x
            n += 1
            total *= U(n)
    h = mix(h_colors, pair)
    code = (visit % total * (U(1) + h % total // U(210) * U(210)) + (h >> U(32))) % total # 210 has every prime of 10 factorial
    for j in range(n): # fisher-yates: the digits of code say what to swap
        a, b = colors[j], colors[j + np.int64(code % U(n - j))]
        cmap[a], cmap[b] = cmap[b], cmap[a]
        code //= U(n - j)
    return d

@njit(cache=True, nogil=True)
def subset_sums(drawn, n, need, room, reach):
    """ bit t of row j of reach will say whether some of the first j of n drawn demos need t tokens together, for t <= room """
    reach[0] = 0
    reach[0, 0] = 1
    for j in range(n):
        word, bit = need[drawn[j]] // 64, U(need[drawn[j]] % 64)
        reach[j + 1] = reach[j]
        for w in range(word, room // 64 + 1):
            reach[j + 1, w] |= reach[j, w - word] << bit
            if w > word and bit > 0:
                reach[j + 1, w] |= reach[j, w - word - 1] >> (U(64) - bit)

@njit(cache=True, nogil=True)
def has(bits, t):
    """ is bit t set in an array of uint64? """
    return (bits[t // 64] >> U(t % 64)) & U(1) > 0

@njit(cache=True, nogil=True)
def take(drawn, n, need, total, reach, pairs):
    """ those drawn demos that need `total` tokens together, the first drawn preferred, behind the target in pairs -> how many """
    pairs[1:], shots = -1, 0
    for j in range(n - 1, -1, -1):
        if not has(reach[j], total): # not without this one
            total -= need[drawn[j]]
            shots += 1
            pairs[shots] = drawn[j]
    pairs[1 : shots + 1] = pairs[1 : shots + 1][::-1].copy() # as they were drawn
    return shots

@njit(cache=True, nogil=True)
def tokens_of(grid, turned):
    """ an entry of Tables.grid -> tokens that it takes, a ROW a row """
    h, w = grid >> 8 & 255, grid & 255
    return h * w + (w if turned else h)

@njit(cache=True, nogil=True)
def measure(tab, pairs, shots, context, turned, loss_on):
    """ a document of a target and so many tokens of context -> its tokens, and how many of them carry loss """
    loss, p = 0, pairs[0]
    length = context + 2 + tokens_of(tab.grid[2 * p], turned) # IN and OUT
    for k in range(max(shots, 1) if loss_on == 1 else 1): # not the first pair, unless it is alone
        if tab.grid[2 * pairs[k] + 1] & 255:
            loss += tokens_of(tab.grid[2 * pairs[k] + 1], turned) + 1 # and END
    if tab.grid[2 * p + 1] & 255:
        length += tokens_of(tab.grid[2 * p + 1], turned) + 1
    return length, length - 1 if loss_on == 2 else loss

@njit(cache=True, nogil=True)
def is_turned(d):
    """ does dihedral d make (W, H) of (H, W)? """
    return (d // 4 + d) % 2

@njit(cache=True, nogil=True)
def plan_documents(tab, target, visit, order, as_is, seed, p_identity, n_demos, most, block_size, loss_on):
    """
    (n,) target pairs, how often each was visited before, hashes that order their contexts, and whether to take them as
    they are, without augment and in the order of the file -> the fields of Documents. the context is drawn from the other
    demos of the task, of which there are n_demos at the most, `most` at the most; if they do not all find room in
    block_size, it is those of them that fill it best.
    """
    n = len(target)
    pairs, drawn, tight = np.full((n, 1 + most), -1, np.int32), np.full((n, most), -1, np.int32), np.zeros(n, np.bool_)
    dihedral, cmap, length, loss_tokens = np.zeros(n, np.uint8), np.empty((n, 10), np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int64)
    ranks, colors = np.empty(8, np.uint64), np.empty(10, np.int64)
    keys, queue = np.empty(n_demos, np.uint64), np.empty(n_demos, np.int64)
    reach = np.empty((most + 1, block_size // 64 + 1), np.uint64)
    h_dihedral, h_colors, h_identity = mix(mix(U(0), seed), DIHEDRAL), mix(mix(U(0), seed), COLORS), mix(mix(U(0), seed), IDENTITY)
    for i in range(n):
        p, shots, total = target[i], 0, 0
        task = tab.pair_task[p]
        if not as_is[i]:
            dihedral[i] = draw_augment(U(p), visit[i], h_dihedral, h_colors, tab.domain[task], cmap[i], ranks, colors)
        if as_is[i] or np.float64(mix(mix(h_identity, U(p)), visit[i])) < p_identity * 2.0**64:
            for x in range(10):
                cmap[i, x] = x
        pairs[i, 0] = p
        if most > 0:
            for j in range(tab.n_demos[task]): # insertion sort, tasks have few demos
                key, at = U(j) if as_is[i] else mix(order[i], U(j)), j
                while at > 0 and keys[at - 1] > key and tab.n_demos[task] <= 64:
                    keys[at], queue[at] = keys[at - 1], queue[at - 1]
                    at -= 1
                keys[at], queue[at] = key, tab.first[task] + j
            if tab.n_demos[task] > 64:
                queue[: tab.n_demos[task]] = tab.first[task] + np.argsort(keys[: tab.n_demos[task]])
            need = tab.need[is_turned(dihedral[i])]
            room = max(block_size - need[p], 0)
            for j in range(tab.n_demos[task]):
                if shots < most and queue[j] != p and tab.usable[queue[j]] and need[queue[j]] <= room:
                    drawn[i, shots] = pairs[i, shots + 1] = queue[j]
                    total += need[queue[j]]
                    shots += 1
            if total > room: # not all find it: those that fill it best
                tight[i], total = True, room
                subset_sums(drawn[i], shots, need, total, reach)
                while not has(reach[shots], total):
                    total -= 1
                shots = take(drawn[i], shots, need, total, reach, pairs[i])
        length[i], loss_tokens[i] = measure(tab, pairs[i], shots, total, is_turned(dihedral[i]), loss_on)
    return pairs, drawn, tight, dihedral, cmap, length, loss_tokens

@njit(cache=True, nogil=True)
def write_rows(tab, docs, row_start, row_docs, r0, r1, loss_on, tokens, idx, targets, pos, doc, task, dihedral):
    """
    rows r0..r1-1, row r being the documents row_docs[row_start[r] : row_start[r+1]] one after another, into the (B, T)
    arrays of a Batch, pos as (B, 3 * T); rows past r1 stay empty. pos, doc, task and dihedral may have no elements: then
    they are not wanted. tokens is (T,) uint8 scratch: a pair is put together there, then widened and colored in one go.
    """
    for b in range(idx.shape[0]):
        x, y, at, seen = idx[b], targets[b], 0, 0
        last = row_start[r0 + b + 1] if r0 + b < r1 else row_start[r0 + b]
        for j in range(row_start[r0 + b], last if len(tab.cells) > 2**23 else 0): # in DRAM: ask for the first lines of all pairs at once, then wait once
            for k in range(docs.pairs.shape[1]):
                if docs.pairs[row_docs[j], k] < 0:
                    break
                a = tab.grid[2 * docs.pairs[row_docs[j], k]] >> 16
                for m in range(4):
                    seen += tab.cells[np.uintp(min(a + 64 * m, len(tab.cells) - 1))]
        tokens[0] = seen & 1 # or the compiler would see that nobody looks
        for j in range(row_start[r0 + b], last):
            n_doc = row_docs[j]
            start, shots, d = at, 0, docs.dihedral[n_doc]
            while shots + 1 < docs.pairs.shape[1] and docs.pairs[n_doc, shots + 1] >= 0:
                shots += 1
            color = U(0xfedcba) << U(40) # 4 bits a token: what it becomes. past the colors each is itself
            for c in range(10):
                color |= U(docs.cmap[n_doc, c]) << U(4 * c)
            for k in range(shots, -1, -1):
                p, begin, out = docs.pairs[n_doc, k], at, at
                known = tab.grid[2 * p + 1] & 255 > 0
                for side in range(2):
                    z = np.uint8(2 * k + side)
                    out, tokens[at] = at, IN + side # IN or OUT
                    if pos.size > 0:
                        pos[b, 3 * at], pos[b, 3 * at + 1], pos[b, 3 * at + 2] = 0, 0, z
                    at += 1
                    if side == 1 and not known: # a prompt ends here
                        break
                    g = tab.grid[2 * p + side]
                    a, row, col, H, W = walk(g >> 16, g >> 8 & 255, g & 255, d)
                    if pos.size > 0:
                        where, place, depth = pos[b, 3 * at :], tab.place[W], tab.depth[z]
                        for m in range(3 * H * (W + 1)):
                            where[m] = place[m] + depth[m]
                    for r in range(H): # an unsigned index spares the test for a negative one
                        i = a
                        for c in range(W):
                            tokens[np.uintp(at + c)] = tab.cells[np.uintp(i)]
                            i += col
                        tokens[np.uintp(at + W)] = ROW
                        a += row
                        at += W + 1
                if known:
                    tokens[at] = END
                    if pos.size > 0:
                        pos[b, 3 * at], pos[b, 3 * at + 1], pos[b, 3 * at + 2] = H, 1, z
                    at += 1
                wide, narrow = x[begin:at], tokens[begin:at]
                for m in range(len(wide)):
                    wide[m] = np.int64(color >> (U(narrow[m]) << U(2)) & U(15))
                y[begin:at] = -100
                if known and (k == 0 or (loss_on == 1 and k < shots)):
                    y[out : at - 1] = x[out + 1 : at] # OUT predicts the first cell, the last ROW predicts END
            if loss_on == 2:
                y[start : at - 1] = x[start + 1 : at]
            if doc.size > 0:
                doc[b, start:at] = j - row_start[r0 + b]
            if task.size > 0:
                task[b, start:at] = tab.row[tab.pair_task[p]]
                dihedral[b, start:at] = d
        x[at:], y[at:] = PAD, -100
        if pos.size > 0:
            pos[b, 3 * at :] = 0
        if doc.size > 0:
            doc[b, at:] = -1
        if task.size > 0:
            task[b, at:] = 0
            dihedral[b, at:] = 0

@njit(cache=True, nogil=True)
def counting_sort(key, n):
    """ (m,) keys in 0..n-1 -> (m,) their stable order, and (n + 1,) where each key begins in it """
    start, order = np.zeros(n + 1, np.int64), np.empty(len(key), np.int64)
    for x in key:
        start[x + 1] += 1
    start = start.cumsum()
    at = start.copy()
    for i in range(len(key)):
        order[at[key[i]]] = i
        at[key[i]] += 1
    return order, start

@njit(cache=True, nogil=True)
def best_fit(tab, docs, order, T, loss_on):
    """
    -> (n,) the row of T tokens that each document goes to, in this order: the fullest that has room. one that is tight
    has lost demos already; it may lose more, if it then fills a row to within 1 in 512. docs is changed then.
    """
    newest, before = np.full(T + 1, -1), np.empty(len(order), np.int64) # by room left: the newest row, and for each row the one before
    count = np.zeros(T // 64 + 1, np.int64) # of rows by room // 64, so that a search may leap
    reach = np.empty((docs.drawn.shape[1] + 1, T // 64 + 1), np.uint64)
    row, n_rows, most = np.empty(len(order), np.int64), 0, 0
    for i in order:
        if docs.tight[i] and docs.length[i] < T - T // 512:
            turned, p, n = is_turned(docs.dihedral[i]), docs.pairs[i, 0], (docs.drawn[i] >= 0).sum()
            need = tab.need[turned]
            subset_sums(docs.drawn[i], n, need, T - need[p], reach)
            best, room, at = T // 512 + 1, most, 0
            while room > need[p] and best > 0:
                if newest[room] >= 0:
                    for left in range(min(best, room - need[p])):
                        if has(reach[n], room - need[p] - left):
                            best, at = left, room
                            break
                room -= 1 if count[room // 64] else room % 64 + 1
            if at > 0:
                total = at - need[p] - best
                shots = take(docs.drawn[i], n, need, total, reach, docs.pairs[i])
                docs.length[i], docs.loss_tokens[i] = measure(tab, docs.pairs[i], shots, total, turned, loss_on)
        room = docs.length[i]
        while room <= most and newest[room] < 0:
            room += 1 if count[room // 64] else 64 - room % 64
        if room <= most:
            r = newest[room]
            newest[room] = before[r]
            count[room // 64] -= 1
        else:
            r, room = n_rows, T
            n_rows += 1
        room -= docs.length[i]
        row[i], before[r], newest[room], most = r, newest[room], r, max(most, room)
        count[room // 64] += 1
    return row

@njit(cache=True, nogil=True)
def cut_buckets(width, batch_tokens):
    """ (n,) ascending widths -> where each batch ends: at most batch_tokens, no row 1/16 wider than another, at least one row """
    ends, start, n = np.empty(len(width), np.int64), 0, 0
    for end in range(1, len(width) + 1): # grow until one more row would be too many
        if end == len(width) or (end - start + 1) * width[end] > batch_tokens or 16 * width[end] > 17 * width[start]:
            ends[n] = end
            start, n = end, n + 1
    return ends[:n]

@njit(cache=True, nogil=True)
def has_context(tab, long, block_size):
    """ -> (P,) bool: is there another usable demo of its task that fits before the pair, whatever the orientation? """
    out = np.zeros(len(long), np.bool_)
    for p in range(len(out)):
        a = tab.first[tab.pair_task[p]]
        for q in range(a, a + tab.n_demos[tab.pair_task[p]]):
            if q != p and tab.usable[q] and long[p] + long[q] <= block_size:
                out[p] = True
                break
    return out

# -----------------------------------------------------------------------------

class Rows(NamedTuple):
    """ documents laid out in rows, and rows in batches """
    docs: Documents
    row_start: np.ndarray # (rows + 1,) int64: row r holds the documents row_docs[row_start[r] : row_start[r+1]]
    row_docs: np.ndarray # (n,) int64
    batches: np.ndarray # (batches, 3) int64: first row, last row + 1, T
    loss_tokens: np.ndarray # (batches,) int64

class Sampler:
    """
    corpora, and what a config makes of them: lengths, color domains, contexts. plans documents and writes them. the
    corpora, a list of (Corpus, repeat), are joined: task k and pair p count through all of them.

    rows: {task key: row of the task embedding}, to look tasks up in a trained model, -1 where it has none; None numbers
    them as they come. tasks with equal demos share one row.
    """

    def __init__(self, corpora, cfg, rows=None):
        for name, known in (('loss_on', LOSS_ON), ('colors', COLORS_MODES), ('batching', BATCHING)):
            if getattr(cfg, name) not in known:
                raise ValueError(f"{name}={getattr(cfg, name)!r}: want one of {', '.join(known)}")
        if cfg.block_size < 1 or cfg.batch_tokens < 1:
            raise ValueError(f"block_size={cfg.block_size} batch_tokens={cfg.batch_tokens}: want at least 1")
        if cfg.shots < -1:
            raise ValueError(f"shots={cfg.shots}: want -1, 0 or a number of demos")
        self.corpora, self.cfg = [c for c, _ in corpora], cfg
        def join(name):
            xs = [getattr(c, name) for c in self.corpora]
            return xs[0] if len(xs) == 1 else np.concatenate(xs) # no copy of one, it may be mapped from a large file
        cells, h, w, n_demos, self.hash, self.key = (join(name) for name in ('cells', 'h', 'w', 'n_demos', 'hash', 'key'))
        base = np.cumsum([0] + [len(c.cells) for c in self.corpora])
        grid = np.concatenate([c.off + n for c, n in zip(self.corpora, base)]) << 16 | h.astype(np.int64) << 8 | w
        first = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(c.first) for c in self.corpora]))])
        pair_task = np.repeat(np.arange(len(n_demos), dtype=np.int32), np.diff(first))
        self.is_demo = np.concatenate([c.is_demo() for c in self.corpora])
        self.repeat = np.repeat([repeat for _, repeat in corpora], [len(c) for c in self.corpora]) # (K,)
        self.part = np.repeat(np.arange(len(corpora)), [len(c) for c in self.corpora]) # (K,) which corpus it is from
        # what fits must not depend on answers that we may not see: such a query reserves room for the task's longest output
        self.known, size = h[1::2] > 0, np.multiply(h, w, dtype=np.int32)
        output = np.where(self.is_demo, size[1::2] + np.maximum(h[1::2], w[1::2]), 0)
        reserve = np.where(self.known, 0, np.maximum.reduceat(output, first[:-1])[pair_task])
        need = pair_tokens(h, w) + reserve
        # mdlARC's rule (src/common.py): a color that only outputs have means something by itself. answers play no part, so
        # that a hidden one cannot change a view
        mode = cfg.colors if cfg.colors != 'auto' else 'domain' if cfg.shots == 0 else 'nonzero'
        domain = np.full(len(n_demos), {'none': 0, 'all': 1023}.get(mode, 1022), np.uint16) # 1022: all but color 0
        if mode == 'domain':
            colors = join('colors')
            seen = np.bitwise_or.reduceat(colors[::2], first[:-1])
            made = np.bitwise_or.reduceat(np.where(self.is_demo, colors[1::2], 0), first[:-1])
            domain &= ~(made & ~seen)
        row = np.full(len(n_demos), -1, np.int32)
        if rows is None and cfg.shots == 0:
            keys, at, same = np.unique(self.key, return_index=True, return_inverse=True)
            row[:] = np.argsort(np.argsort(at))[same] # in order of appearance
            rows = {keys[i].decode(): n for n, i in enumerate(np.argsort(at))}
        elif rows:
            row[:] = [rows.get(key.decode(), -1) for key in self.key]
        self.rows = rows or {}
        self.n_demos = int(n_demos.max())
        self.most = min(self.n_demos, MAX_SHOTS, cfg.shots if cfg.shots >= 0 else MAX_SHOTS)
        self.tables = Tables(cells, grid, first, n_demos, pair_task, need.astype(np.int16), self.is_demo.copy(), domain, row, *places())

    def grid(self, g):
        """ grid number g as a (H, W) uint8 view """
        x = int(self.tables.grid[g])
        h, w = x >> 8 & 255, x & 255
        return self.tables.cells[x >> 16 : (x >> 16) + h * w].reshape(h, w)

    def task(self, k):
        """ task number k, counted through all corpora, as a Task """
        return self.corpora[self.part[k]].task(int((self.part[:k] == self.part[k]).sum()))

    def plan(self, target, visit, order, as_is, seed, p_identity=0.0):
        """ see plan_documents; arrays of n or scalars -> Documents """
        n = len(target)
        visit, order, as_is = (np.broadcast_to(np.asarray(x, dtype), n).copy() for x, dtype in ((visit, U), (order, U), (as_is, bool)))
        return Documents(*plan_documents(self.tables, np.asarray(target, np.int64), visit, order, as_is, U(seed), float(p_identity),
                                         self.n_demos, self.most, self.cfg.block_size, LOSS_ON.index(self.cfg.loss_on)))

    def lay_out(self, docs, batching, key):
        """
        Documents -> Rows. bucket: widths are rounded up to 16 a power of two, at least 4 apart, so that a compiler sees
        few shapes. key: hash by which rows of 'pack' and all batches are shuffled, None = leave them.
        """
        n, T = len(docs.length), self.cfg.block_size
        order, start = np.arange(n), np.arange(n + 1) # a document a row
        if batching == 'bucket':
            step = np.maximum(2.0 ** (np.floor(np.log2(docs.length)) - 4), 4)
            width = np.minimum(np.ceil(docs.length / step) * step, np.maximum(docs.length, T)).astype(np.int64) # a learned position ends at block_size
            order = counting_sort(width, width.max() + 1)[0]
            ends = cut_buckets(width[order], self.cfg.batch_tokens)
            T = width[order[ends - 1]]
        else:
            if batching == 'pack': # the longest first, but last what fills a row alone or may shrink to fill another
                last = docs.tight & (docs.length >= T - T // 16)
                order = counting_sort(T + np.where(last, docs.length, -docs.length), 2 * T + 1)[0]
                row = best_fit(self.tables, docs, order, T, LOSS_ON.index(self.cfg.loss_on))
                rank = np.argsort(mix(mix(key, ROWS), np.arange(row.max() + 1, dtype=U))) # neighbours are alike otherwise
                order, start = counting_sort(np.argsort(rank)[row], len(rank))
            B, R = max(self.cfg.batch_tokens // T, 1), len(start) - 1
            n = -(-R // B) # batches, of even size: no rank is to go without because one is a rest
            ends = np.arange(1, n + 1) * R // n
        batches = np.stack([np.concatenate([[0], ends[:-1]]), ends, np.broadcast_to(T, len(ends))], 1)
        if key is not None:
            batches = batches[np.argsort(mix(key, np.arange(len(batches), dtype=U)))]
        loss = np.concatenate([[0], np.cumsum(docs.loss_tokens[order])])[start]
        return Rows(docs, start, order, batches, loss[batches[:, 1]] - loss[batches[:, 0]])

    def write(self, rows, r0, r1, T, buffers=None, loss_on=None):
        """ rows r0..r1-1 -> Batch, in buffers if given. no rows: one without loss """
        buffers = buffers or Buffers(max(r1 - r0, 1) * T, self.cfg.shots == 0)
        batch, arrays = buffers.shaped(max(r1 - r0, 1), T)
        write_rows(self.tables, rows.docs, rows.row_start, rows.row_docs, r0, r1, LOSS_ON.index(loss_on or self.cfg.loss_on), np.empty(T, np.uint8), *arrays)
        return batch

def places():
    """ -> place and depth of Tables: tokens of one grid differ in row and col alone, so pos is a sum of two tables """
    place, depth = np.zeros((MAX_SIDE + 1, 3 * MAX_GRID), np.uint8), np.zeros((256, 3 * MAX_GRID), np.uint8)
    for W in range(1, MAX_SIDE + 1):
        r, c = np.divmod(np.arange(MAX_SIDE * (W + 1)), W + 1)
        place[W, : 3 * len(r)] = np.stack([r + (c == W), (c + 1) * (c < W), 0 * r], 1).ravel() # ROW opens the next row
    depth[:, 2::3] = np.arange(256)[:, None]
    return place, depth

def pair_tokens(h, w):
    """ (2P,) sides of grids -> (2, P) int32 tokens of pairs with an answer, upright and turned: IN, OUT, END, cells, a ROW a row """
    size = np.multiply(h, w, dtype=np.int32)
    return np.stack([3 + size[::2] + size[1::2] + x[::2] + x[1::2] for x in (h, w)])

class Buffers:
    """ memory for Batches of at most n tokens, one at a time. xy: for idx and targets alone """

    def __init__(self, n, tasked, xy=False, pin=False):
        kinds = ((1, torch.int64), (1, torch.int64), (3, torch.uint8), (1, torch.int32), (1, torch.int32), (1, torch.uint8)) # as in Batch
        wanted = [True, True, not xy, not xy, tasked and not xy, tasked and not xy]
        self.n, self.views, self.copied = n, {}, None # on cuda: an event, that the copy out of here is done
        self.flat = [torch.empty(k * n if want else 0, dtype=dtype, pin_memory=pin) for (k, dtype), want in zip(kinds, wanted)]

    def shaped(self, B, T):
        """ -> (Batch of B rows of T, the same as numpy arrays (B, T) with pos (B, 3 * T); what is not wanted has no element) """
        if (B, T) not in self.views: # a few shapes come again and again
            xs = [x[: k * B * T].view(B, k * T) if len(x) else x.view(0, 0) for x, k in zip(self.flat, (1, 1, 3, 1, 1, 1))]
            shown = [x if len(x) else None for x in xs]
            self.views[B, T] = Batch(*(x.view(B, T, 3) if i == 2 and x is not None else x for i, x in enumerate(shown))), [x.numpy() for x in xs]
        return self.views[B, T]

def split(n, rank, world):
    """ which of n rows are a rank's: first, last + 1. every row is some rank's, whatever the number of ranks """
    return n * rank // world, n * (rank + 1) // world

class ArcDataset(torch.utils.data.Dataset):
    """
    the stream: document t for any t >= 0, a pure function of (seed, t). each trainable pair is the target once an epoch
    (n times where its source is repeated *n), its context is the other demos of its task and never a query.

    ds[t] is a Batch of one document, (T,) each with T = block_size, for any t >= 0 (the stream has no end, do not iterate);
    len(ds) = targets x epochs; DataLoader wants collate_fn=ds.collate. the demos of `adapt`
    are targets too, its answers stay closed (all that is kept of one is a hash, for the leak guard). skipped pairs are counted in num_held (a validation query, verbatim
    or as an augment of it in another task), num_long (do not fit block_size) and num_alone (no context, where shots != 0),
    skipped tasks in num_tasks_out (over max_pair) and num_dropped (drop_overlap). leaks: what allow_leak let pass.
    sources: in place of cfg.data and cfg.adapt, two lists of (Corpus, repeat).
    raises ValueError if nothing is left, or if pairs of data are queries of adapt.
    """

    vocab_size, tokenizer_sha256, files = VOCAB_SIZE, 'grids', {} # its tokens, and what training keeps beside the checkpoint: {name: bytes}

    def __init__(self, cfg, seed=1337, epochs=1, sources=None):
        if cfg.val_tasks < 0 or cfg.max_pair < 0 or type(seed) is not int or not 0 <= seed < 2**64 or not 0 <= cfg.p_identity <= 1:
            raise ValueError(f"val_tasks={cfg.val_tasks} max_pair={cfg.max_pair} seed={seed} p_identity={cfg.p_identity}: want no negative number, "
                             "a seed of 64 bits, a share of 0..1")
        self.cfg, self.seed, self.epochs = cfg, seed, epochs
        data, adapt = sources or (read_sources(cfg.data, True, cfg.on_bad, cfg.deal), read_sources(cfg.adapt, False, cfg.on_bad, cfg.deal))
        if len(data + adapt) == 0:
            raise ValueError("nothing to train on: data and adapt are both empty")
        n_read = sum(len(c) for c, _ in data + adapt)
        text = repr([(c.sha256, repeat, i < len(data)) for i, (c, repeat) in enumerate(data + adapt)])
        self.corpus_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.bad = [error for c, _ in data + adapt for error in c.bad]
        data, adapt = ([(c.select(fits(c, cfg.max_pair)), repeat) for c, repeat in part] for part in (data, adapt))
        self.num_tasks_out = n_read - sum(len(c) for c, _ in data + adapt)
        data, self.num_dropped, self.leaks = guard(data, adapt, cfg.drop_overlap, cfg.allow_leak)
        data, adapt = ([(c, repeat) for c, repeat in part if len(c) > 0] for part in (data, adapt))
        nothing = (f"nothing to train on in data={cfg.data!r} adapt={cfg.adapt!r}: of {n_read} tasks {self.num_tasks_out} are over "
                   f"max_pair={cfg.max_pair} and {self.num_dropped} overlap")
        if len(data + adapt) == 0:
            raise ValueError(nothing)
        self.sampler = s = Sampler(data + adapt, cfg)
        self.rows = s.rows # {task key: row of the task embedding}, {} in context
        t, in_data = s.tables, s.part < len(data) # (K,)
        task = t.pair_task
        # hold out the queries of some tasks of data. chosen by content, so that each seed is judged on the same ones
        query = s.known & ~s.is_demo & in_data[task] # (P,)
        keys, at = np.unique(s.key[np.unique(task[query])], return_index=True)
        n = min(cfg.val_tasks, len(keys) // 2)
        val = query & np.isin(task, np.unique(task[query])[at[:n]])
        held, by_hash = val.copy(), {}
        for p in np.flatnonzero(val):
            by_hash.setdefault(int(s.hash[p]), []).append(p)
        for p in np.flatnonzero(np.isin(s.hash, np.array(list(by_hash), U)) & s.known): # the same pair elsewhere
            held[p] |= any(s.key[task[p]] != s.key[task[q]] or self.same_pair(p, q) for q in by_hash[int(s.hash[p])])
        t.usable[held] = False
        # what is trained on
        can = s.known & (s.is_demo | in_data[task])
        long = t.need.max(0)
        short, near = long <= cfg.block_size, has_context(t, long, cfg.block_size) if cfg.shots != 0 else np.ones(len(task), bool)
        self.num_held, self.num_long, self.num_alone = (int(x.sum()) for x in (can & held, can & ~held & ~short, can & ~held & short & ~near))
        pairs = np.flatnonzero(can & ~held & short & near)
        if len(pairs) == 0:
            raise ValueError(f"{nothing}, then {self.num_held} pairs are held out, {self.num_long} over block_size={cfg.block_size}, {self.num_alone} without context")
        self.val_pairs = np.flatnonzero(val & short & near)
        times = s.repeat[task[pairs]]
        self.targets = np.repeat(pairs, times).astype(np.int32) # small: the larger the corpus, the more a look costs
        self.copy = (np.arange(len(self.targets)) - np.repeat(np.cumsum(times) - times, times)).astype(np.int32) # which of the repeats
        self.trained = (t.usable | np.isin(np.arange(len(task)), pairs)) & in_data[task] # (P,) pairs whose output may be seen, adapt's apart

    def loader(self, rank=0, world=1, device='cpu'):
        return ArcLoader(self, rank, world, device)

    def about(self):
        """ a line of counts: what is here, and what is not """
        return (f"{len(self.sampler.key)} tasks, {len(self)} documents an epoch, {len(self.val_pairs)} validation queries; left out: {self.num_tasks_out} tasks over max_pair, "
                f"{self.num_dropped} overlapping, {len(self.bad)} malformed; pairs: {self.num_held} held out, {self.num_long} too long, {self.num_alone} without context")

    def same_pair(self, p, q):
        """ are these two pairs the same to the last cell? """
        return all(grid_bytes(self.sampler.grid(2 * p + i)) == grid_bytes(self.sampler.grid(2 * q + i)) for i in range(2))

    def trained_on(self):
        """ a line for each pair of data whose output may be trained on, by which solve knows. adapt is exempt """
        return trained_lines(self.sampler.corpora, self.trained)

    def __reduce__(self):
        """ to a worker process go the settings, it reads the files itself: a packed corpus is mapped there too, not copied """
        return reopen, (type(self), self.cfg, self.seed, self.epochs, self.corpus_sha256)

    def __len__(self):
        return len(self.targets) * self.epochs

    def __getitem__(self, t):
        if t < 0: # the stream has no end to count from
            raise IndexError(f"document {t}: want t >= 0")
        rows = Rows(self.plan(np.array([t], U)), np.array([0, 1]), np.array([0]), None, None)
        return Batch(*(x if x is None else x[0] for x in self.sampler.write(rows, 0, 1, self.cfg.block_size)))

    def collate(self, items):
        """ list of ds[t] -> Batch, for torch's DataLoader(ds, collate_fn=ds.collate) """
        return Batch(*(None if x[0] is None else torch.stack(x) for x in zip(*items)))

    def plan(self, t):
        """ (n,) document numbers -> Documents """
        t, n = np.asarray(t, U), U(len(self.targets))
        epoch, i = np.divmod(t, n)
        i = bijection(i, n, hash64(self.seed, EPOCH, epoch)).astype(np.int64)
        target = self.targets[i]
        visit = epoch * self.sampler.repeat[self.sampler.tables.pair_task[target]].astype(U) + self.copy[i].astype(U)
        return self.sampler.plan(target, visit, hash64(self.seed, DEMOS, t), False, self.seed, self.cfg.p_identity)

    def plan_window(self, window):
        """ window number -> Rows of the documents of that window, batches shuffled """
        t = U(window) * U(WINDOW) + np.arange(WINDOW, dtype=U)
        return self.sampler.lay_out(self.plan(t), self.cfg.batching, hash64(self.seed, BATCHES, window))

    def val_batches(self, rank=0, world=1):
        """ the validation set as Batches of at most batch_tokens, the same each time: as it is, no augment, demos in order """
        if len(self.val_pairs) == 0:
            return
        rows = self.sampler.lay_out(self.sampler.plan(self.val_pairs, 0, 0, True, 0), self.cfg.batching, U(0)) # in rows as in training, for compilers
        for r0, r1, T in rows.batches:
            a, b = split(r1 - r0, rank, world)
            yield self.sampler.write(rows, r0 + a, r0 + b, T, loss_on='query') # whatever is trained on, so that runs compare

def fits(corpus, max_pair):
    """ which tasks of a Corpus have no demo of more than max_pair tokens in its longer orientation -> (tasks,) bool. 0 = all """
    if max_pair == 0:
        return np.ones(len(corpus), bool)
    long = pair_tokens(corpus.h, corpus.w).max(0)
    return np.maximum.reduceat(np.where(corpus.is_demo(), long, 0), corpus.first[:-1]) <= max_pair

def reopen(cls, cfg, seed, epochs, corpus_sha256):
    """ an ArcDataset in another process. raises ValueError if the files have changed since """
    ds = cls(cfg, seed, epochs)
    if ds.corpus_sha256 != corpus_sha256:
        raise ValueError(f"data={cfg.data!r} adapt={cfg.adapt!r}: changed since the first process read it")
    return ds

# -----------------------------------------------------------------------------

class ArcLoader:
    """
    batches without end: next_batch(), state_dict(), load_state_dict(). a window of 4096 consecutive documents is planned
    alone, cut into batches, and these shuffled. every rank plans the whole global batch and writes its own rows, so the
    world size is not part of the state. a thread keeps the next batch ready (prefetch). the tensors of a batch are valid
    until the second next call. xy: only idx and targets are made.
    """

    def __init__(self, dataset, rank=0, world=1, device='cpu', prefetch=True, xy=False):
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.ds, self.rank, self.world, self.device, self.prefetch, self.xy = dataset, rank, world, torch.device(device), prefetch, xy
        self.window, self.batch = 0, 0 # the batch that comes next
        self.ring, self.turn = [], 0 # buffers: one is with the user, one was, one is being written
        self.plan = lru_cache(maxsize=2)(dataset.plan_window)
        self.pid, self.pool, self.ready = None, None, None # of the thread; what it works on, as (place, future)
        self.lock = threading.Lock()

    def rows(self, window):
        """ window number -> Rows. two threads ask, one plans """
        if self.pid != os.getpid(): # the first call, or a forked process, where the thread is not and who knows what the lock is
            self.pid, self.lock, self.ready, self.ring = os.getpid(), threading.Lock(), None, [None] * 3
            self.pool = ThreadPoolExecutor(1, 'nanoarc-loader') if self.prefetch else None
        with self.lock:
            return self.plan(window)

    def after(self, window, batch):
        """ the place in the stream of batches after (window, batch) """
        return (window, batch + 1) if batch + 1 < len(self.rows(window).batches) else (window + 1, 0)

    def loss_tokens(self, n=1):
        """ how many tokens carry loss in the next n global batches. known from the plan, so ranks need not ask each other """
        place, total = (self.window, self.batch), 0
        for _ in range(n):
            total += int(self.rows(place[0]).loss_tokens[place[1]])
            place = self.after(*place)
        return total

    def tokens(self):
        """ of the next global batch, padding included: what all ranks work on """
        r0, r1, T = self.rows(self.window).batches[self.batch]
        return int((r1 - r0) * T)

    def names(self, window, batch, n=1):
        """ ids of the tasks in this rank's rows of the n global batches from a place on """
        names, s = set(), self.ds.sampler
        for _ in range(n):
            rows = self.rows(window)
            r0, r1, _ = (int(x) for x in rows.batches[batch])
            a, b = split(r1 - r0, self.rank, self.world)
            docs = rows.row_docs[rows.row_start[r0 + a] : rows.row_start[r0 + b]]
            names.update(s.tables.pair_task[rows.docs.pairs[docs, 0]].tolist())
            window, batch = self.after(window, batch)
        return sorted(s.task(k).name for k in names)

    def write(self, place, turn):
        """ -> Batch on the cpu: this rank's rows of the global batch at a place, in buffers number turn of the ring """
        rows = self.rows(place[0])
        r0, r1, T = (int(x) for x in rows.batches[place[1]])
        a, b = split(r1 - r0, self.rank, self.world)
        buffers = self.ring[turn]
        if buffers is None or buffers.n < max(b - a, 1) * T:
            n = max((b - a) * T, T, self.ds.cfg.batch_tokens // self.world)
            buffers = self.ring[turn] = Buffers(n, self.ds.cfg.shots == 0, self.xy, pin=self.device.type == 'cuda')
        if buffers.copied is not None: # on cuda: the copy out of here may still be on its way
            buffers.copied.synchronize()
        return self.ds.sampler.write(rows, r0 + a, r0 + b, T, buffers)

    def next_batch(self):
        """ -> Batch on self.device, this rank's rows of the next global batch """
        place = self.window, self.batch
        self.rows(self.window)
        turn, ready = self.turn, self.ready
        batch = ready[1].result() if ready else None # waits for the thread, it must not write on
        if ready is None or ready[0] != place: # nothing is on its way, or someone went elsewhere
            batch = self.write(place, turn)
        self.window, self.batch = following = self.after(*place)
        self.turn = (turn + 1) % 3
        if self.pool:
            self.ready = following, self.pool.submit(self.write, following, self.turn)
        if self.device.type == 'cpu':
            return batch
        batch = Batch(*(x if x is None else x.to(self.device, non_blocking=True) for x in batch))
        if self.device.type == 'cuda':
            self.ring[turn].copied = torch.cuda.Event()
            self.ring[turn].copied.record()
        return batch

    def state_dict(self):
        """ all there is to resume by, a small dict of json values: the place, and what must be the same for it to mean the same """
        cfg = {key: x for key, x in asdict(self.ds.cfg).items() if key not in ('data', 'adapt', 'on_bad')} # files may move, corpus_sha256 may not change
        return {'format': FORMAT, 'window': self.window, 'batch': self.batch, 'seed': self.ds.seed, 'corpus_sha256': self.ds.corpus_sha256, **cfg}

    def load_state_dict(self, state):
        """ go to a saved place. raises ValueError that names the fields if it was a place in another stream """
        now = self.state_dict()
        wrong = [key for key in {**now, **state} if key not in ('window', 'batch') and (key not in now or key not in state or state[key] != now[key])]
        if wrong:
            raise ValueError("resume refused: " + "; ".join(f"{key} differs (saved {str(state.get(key))[:12]}, now {str(now.get(key))[:12]})" for key in wrong))
        self.window, self.batch = state['window'], state['batch']

class ArcStream(torch.utils.data.IterableDataset):
    """
    an ArcLoader for torch's DataLoader(ArcStream(ds), batch_size=None, num_workers=n) and torchdata's StatefulDataLoader,
    which saves and resumes it. worker w of n makes the batches w, w + n, ...: in all the same ones in the same order. each
    new iterator begins anew, or where load_state_dict said; a resumed run wants as many workers as before.
    """

    def __init__(self, dataset, rank=0, world=1):
        self.args, self.start, self.place = (dataset, rank, world), {}, {} # where the next iterator begins, and where this one is

    def __iter__(self):
        self.start, self.place = {}, self.start # at once, a generator would wait for its first batch
        return self.batches(dict(self.place))

    def batches(self, start):
        worker = torch.utils.data.get_worker_info()
        n, skip = (worker.num_workers, worker.id) if worker else (1, 0)
        loader, saved = ArcLoader(*self.args, prefetch=False), start.pop('workers', 1)
        if start:
            if saved not in (1, n):
                raise ValueError(f"resume refused: workers differs (saved {saved}, now {n})")
            loader.load_state_dict(start)
            skip = skip if saved == 1 else n - 1 # the place after a batch of this worker, or of a process without others
        while True:
            for _ in range(skip):
                loader.window, loader.batch = loader.after(loader.window, loader.batch)
            skip = n - 1
            batch = Batch(*(x if x is None else x.clone() for x in loader.next_batch())) # the next one comes before this is used
            self.place = {**loader.state_dict(), 'workers': n}
            yield batch

    def state_dict(self):
        """ of this worker, {} before its first batch """
        return self.start or self.place

    def load_state_dict(self, state):
        """ where the next iterator begins: a state of this or of an ArcLoader. raises ValueError there, if it is a place in another stream """
        self.start = state or {}
