"""
grids -> corpus -> samples -> batches. a task of two demos, the first being

    input 1 2   output 3      as one document of shots=0:    IN  1 2 ROW 3 4 ROW  OUT  3 ROW 5 ROW  END
          3 4          5      what carries loss (targets):                        3  ROW 5 ROW END  .

each grid row is closed by ROW, so that the shape of a grid survives. the stream of documents is a pure function of
(seed, t): document t is found by hashing counters, so there is no random state to save, no epoch to run dry, and
resuming at step 10^9 costs what step 0 costs.
"""
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from nanoarc.sources import MAX_SIDE, grid_bytes, read_sources

# tokens: 0..9 are the colors
ROW, IN, OUT, END, PAD = 10, 11, 12, 13, 14 # 15 is unused
VOCAB_SIZE = 16
MAX_GRID = MAX_SIDE * (MAX_SIDE + 1) # tokens of the largest grid
MAX_PAIR = 1 + MAX_GRID + 1 + MAX_GRID + 1 # IN rows OUT rows END
MAX_SHOTS = 127 # z = 2 * shots + 1 must fit a byte
WINDOW = 4096 # documents planned together
FORMAT = 1 # of the loader's state, goes up when the same state would mean other batches

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
    batching: str = 'bucket' # 'bucket' = similar lengths together (best on cpu) | 'pad' = a document a row of block_size
    batch_tokens: int = 512 # tokens of a micro batch, padding included, over all ranks. at least one document
    loss_on: str = 'query' # 'query' = the target's output | 'outputs' = and the context's, but the first | 'all' = every token
    colors: str = 'auto' # permuted colors: 'domain' = 1..9 minus the task's output-only ones | 'nonzero' | 'all' | 'none' | 'auto' = domain at shots=0, else nonzero
    p_identity: float = 0.2 # share of the documents that keep their colors
    val_tasks: int = 32 # so many tasks of data have their queries held out for the validation loss, at most half of them

# -----------------------------------------------------------------------------
# counter-based randomness

DIHEDRAL, COLORS, IDENTITY, EPOCH, DEMOS, BATCHES = range(6) # one tag for each thing that is drawn

def hash64(*parts):
    """ integers or uint64 arrays, broadcast -> uint64. a chain of splitmix64 finalizers (Steele et al. 2014) """
    h = np.zeros(1, dtype=np.uint64)
    for x in parts:
        h = (h ^ np.asarray(x, dtype=np.uint64)) + np.uint64(0x9e3779b97f4a7c15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
        h = h ^ (h >> np.uint64(31))
    return h

def bijection(i, n, key):
    """
    a keyed permutation of 0..n-1 evaluated at i, all uint64 and broadcast, n < 2^52. nothing is stored, so it costs the
    same for any n: a feistel network of 6 rounds over the next even number of bits, walked until it lands inside.
    """
    i, n, key = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, dtype=np.uint64)) for x in (i, n, key)))
    half = np.maximum(np.ceil(np.log2(n.astype(np.float64)) / 2), 1).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, todo = i.copy(), np.arange(i.size)
    while len(todo) > 0:
        left, right = x[todo] >> half[todo], x[todo] & mask[todo]
        for k in range(6):
            left, right = right, left ^ (hash64(key[todo], k, right) & mask[todo])
        x[todo] = left << half[todo] | right
        todo = todo[x[todo] >= n[todo]] # at most 3 in 4, since n fills at least a quarter of the square
    return x

# -----------------------------------------------------------------------------
# grids and tokens

def dihedral(grid, d):
    """ the d-th of the 8 symmetries of the square: transpose if d >= 4, then np.rot90 d % 4 times """
    return np.rot90(grid.T if d >= 4 else grid, d % 4)

def undo_dihedral(grid, d):
    """ the inverse of dihedral """
    grid = np.rot90(grid, -(d % 4))
    return grid.T if d >= 4 else grid

def swaps_sides(d):
    """ does symmetry d turn (H, W) into (W, H)? int or array -> 0 or 1 """
    return (d // 4 + d) % 2

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

class Documents(NamedTuple):
    """ a plan of n documents, nothing of them written yet """
    pairs: np.ndarray # (n, 1 + most shots) int32: column 0 is the target, column k the pair k steps before it, -1 = none
    dihedral: np.ndarray # (n,) int64
    cmap: np.ndarray # (n, 10) uint8 color map
    length: np.ndarray # (n,) int64 tokens, of the prompt where the answer is not known
    loss_tokens: np.ndarray # (n,) int64 tokens that carry loss

class Corpus:
    """
    every grid of a list of tasks in one flat array, and what follows from them. grid g is cells[off[g] : off[g+1]] of
    shape (h[g], w[g]). pair p is the grids 2p and 2p+1; an unknown answer is an empty grid. task k owns the pairs
    first[k] : first[k+1], its n_demos[k] demos before its queries.

    rows: {task key: row of the task embedding}, to look tasks up in a trained model, -1 where it has none; None numbers
    them as they come. tasks with equal demos share one row.
    """

    def __init__(self, tasks, cfg, rows=None):
        if cfg.block_size < 1 or cfg.batch_tokens < 1:
            raise ValueError(f"block_size={cfg.block_size} batch_tokens={cfg.batch_tokens}: want at least 1")
        for name, known in (('loss_on', ('query', 'outputs', 'all')), ('colors', ('auto', 'domain', 'nonzero', 'all', 'none')), ('batching', ('bucket', 'pad'))):
            if getattr(cfg, name) not in known:
                raise ValueError(f"{name}={getattr(cfg, name)!r}: want one of {', '.join(known)}")
        if cfg.shots < -1:
            raise ValueError(f"shots={cfg.shots}: want -1, 0 or a number of demos")
        self.tasks, self.cfg = tasks, cfg
        pairs = [pair for task in tasks for pair in task.demos + task.queries]
        grids = [grid if grid is not None else np.zeros((0, 0), np.uint8) for pair in pairs for grid in pair]
        self.cells = np.concatenate([grid.ravel() for grid in grids] + [np.zeros(0, np.uint8)])
        self.h = np.array([grid.shape[0] for grid in grids], dtype=np.int64)
        self.w = np.array([grid.shape[1] for grid in grids], dtype=np.int64)
        self.off = np.concatenate([[0], np.cumsum(self.h * self.w)])
        self.n_demos = np.array([len(task.demos) for task in tasks], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum([len(task.demos) + len(task.queries) for task in tasks])]).astype(np.int64)
        self.pair_task = np.repeat(np.arange(len(tasks)), np.diff(self.first)) # (pairs,)
        if rows is None:
            rows = {}
            for task in tasks:
                rows.setdefault(task.key, len(rows))
        self.rows = rows
        self.row = np.array([rows.get(task.key, -1) for task in tasks], dtype=np.int32)
        # tokens of both grids of each pair, as it is and transposed: (pairs, 2 grids, 2 orientations)
        sides = np.stack([self.h, self.w], -1).reshape(-1, 2, 2)
        self.grid_len = (self.h * self.w).reshape(-1, 2, 1) + sides
        self.known = self.h[1::2] > 0
        self.pair_len = self.grid_len.sum(1) + np.where(self.known, 3, 2)[:, None] # IN, OUT and, after an answer, END
        # what fits must not depend on answers that we may not see: such a query reserves room for the task's longest output
        self.long = self.pair_len.max(1)
        self.demos = np.full((len(tasks), max(self.n_demos, default=0)), -1, dtype=np.int32) # those that may be a context
        self.domain, self.n_domain = np.zeros((len(tasks), 10), np.uint8), np.zeros(len(tasks), np.int64)
        for k in range(len(tasks)):
            a, b, c = self.first[k], self.first[k] + self.n_demos[k], self.first[k + 1]
            self.demos[k, : b - a] = np.arange(a, b)
            unknown = b + np.flatnonzero(~self.known[b:c])
            self.long[unknown] += self.grid_len[a:b, 1].max() + 1
            permuted = self.permuted_colors(tasks[k])
            self.domain[k] = permuted + [x for x in range(10) if x not in permuted] # the fixed ones last
            self.n_domain[k] = len(permuted)

    def permuted_colors(self, task):
        """ the colors that augments may exchange. answers play no part, so a hidden one cannot change a view """
        mode = self.cfg.colors if self.cfg.colors != 'auto' else 'domain' if self.cfg.shots == 0 else 'nonzero'
        if mode == 'domain': # mdlARC's rule (src/common.py): a color that only outputs have means something by itself
            seen = set(np.concatenate([x.ravel() for x, _ in task.demos + task.queries]).tolist())
            made = set(np.concatenate([y.ravel() for _, y in task.demos]).tolist())
            return [x for x in range(1, 10) if x not in made - seen]
        return {'nonzero': list(range(1, 10)), 'all': list(range(10)), 'none': []}[mode]

    def grid(self, g):
        """ grid number g as a (H, W) uint8 view """
        return self.cells[self.off[g] : self.off[g + 1]].reshape(self.h[g], self.w[g])

    def augments(self, pair, visit, seed):
        """
        (n,) pairs and how often each was visited before -> (n,) dihedral and (n, 10) uint8 color maps. without
        replacement: 8 visits see each dihedral once, and the color maps follow a seeded order of all permutations.
        """
        pair, visit = np.asarray(pair, np.int64), np.asarray(visit, np.uint64)
        d = np.argsort(hash64(seed, DIHEDRAL, pair[:, None], visit[:, None] // np.uint64(8), np.arange(8)), axis=1)
        d = d[np.arange(len(pair)), (visit % np.uint64(8)).astype(np.int64)]
        n = self.n_domain[self.pair_task[pair]]
        total = np.array([math.factorial(k) for k in range(11)], dtype=np.uint64)[n]
        code = bijection(visit % total, total, hash64(seed, COLORS, pair)).astype(np.int64)
        perm, every = np.tile(np.arange(10), (len(pair), 1)), np.arange(len(pair))
        for j in range(9): # fisher-yates: the digits of code say what to swap, past the domain they are 0
            base = np.maximum(n - j, 1)
            other = j + code % base
            perm[every, j], perm[every, other] = perm[every, other], perm[every, j]
            code //= base
        domain = self.domain[self.pair_task[pair]] # (n, 10)
        cmap = np.empty((len(pair), 10), dtype=np.uint8)
        np.put_along_axis(cmap, domain.astype(np.int64), np.take_along_axis(domain, perm, 1), 1)
        return d, cmap

    def documents(self, target, d, cmap, order):
        """
        (n,) target pairs, their augments and an (n, most demos) uint64 order of the context -> Documents. the context
        is the other demos of the task, first come first served while shots and block_size allow.
        """
        target, shots = np.asarray(target, np.int64), self.cfg.shots
        pairs = target[:, None].astype(np.int32)
        if shots != 0:
            context = self.demos[self.pair_task[target]] # (n, K)
            order = np.where((context < 0) | (context == pairs), np.uint64(2**64 - 1), order)
            context = np.take_along_axis(context, np.argsort(order, axis=1, kind='stable'), 1)
            keep, room = np.zeros(context.shape, bool), self.cfg.block_size - self.long[target]
            for k in range(context.shape[1]):
                fits = (context[:, k] >= 0) & (context[:, k] != target) & (self.long[context[:, k]] <= room)
                keep[:, k] = fits & (keep.sum(1) < (shots if shots > 0 else MAX_SHOTS))
                room = room - self.long[context[:, k]] * keep[:, k]
            left = np.argsort(~keep, axis=1, kind='stable') # what is kept moves to the left
            context = np.take_along_axis(np.where(keep, context, -1), left, 1)
            pairs = np.concatenate([pairs, context], axis=1)
        turned = swaps_sides(d)
        length = (self.pair_len[pairs, turned[:, None]] * (pairs >= 0)).sum(1)
        answers = (self.grid_len[pairs, 1, turned[:, None]] + 1) * (pairs >= 0) # output and END
        if self.cfg.loss_on == 'query':
            loss_tokens = answers[:, 0]
        elif self.cfg.loss_on == 'all':
            loss_tokens = length - 1
        else: # every output but that of the first pair, which is the last column in use; the target always counts
            n, every = (pairs >= 0).sum(1), np.arange(len(pairs))
            loss_tokens = answers.sum(1) - np.where(n > 1, answers[every, n - 1], 0)
        return Documents(pairs, d, cmap, length, loss_tokens)

    def write_grid(self, g, d, cmap, z, idx, pos, at):
        """ grid g, augmented, as tokens and positions from slot `at` on -> the slot after it """
        grid = dihedral(cmap[self.grid(g)], d)
        h, w = grid.shape
        end = at + h * (w + 1)
        body, p = idx[at:end].reshape(h, w + 1), pos[at:end].reshape(h, w + 1, 3)
        body[:, :w], body[:, w] = grid, ROW
        p[..., 0], p[..., 1], p[..., 2] = np.arange(h)[:, None], np.arange(1, w + 2), z
        p[:, w, 0] += 1 # ROW opens the next row
        p[:, w, 1] = 0
        return end

    def write(self, docs, i, idx, targets, pos, prompt=False, loss_on=None):
        """
        document i of a plan into (T,) idx and targets and (T, 3) pos, from slot 0 on -> its length. loss_on=None: as cfg.
        prompt=True stops after the OUT of the target, and the answer is not read.
        """
        d, cmap, loss_on = int(docs.dihedral[i]), docs.cmap[i], loss_on or self.cfg.loss_on
        pairs, at = docs.pairs[i][docs.pairs[i] >= 0], 0
        for k in reversed(range(len(pairs))):
            idx[at], pos[at] = IN, (0, 0, 2 * k)
            at = self.write_grid(2 * pairs[k], d, cmap, 2 * k, idx, pos, at + 1)
            idx[at], pos[at] = OUT, (0, 0, 2 * k + 1)
            if k == 0 and prompt:
                return at + 1
            out = at
            at = self.write_grid(2 * pairs[k] + 1, d, cmap, 2 * k + 1, idx, pos, at + 1)
            idx[at], pos[at] = END, (pos[at - 1, 0], 1, 2 * k + 1)
            if k == 0 or (loss_on == 'outputs' and k < len(pairs) - 1):
                targets[out:at] = idx[out + 1 : at + 1] # OUT predicts the first cell, the last ROW predicts END
            at += 1
        if loss_on == 'all':
            targets[: at - 1] = idx[1:at]
        return at

# -----------------------------------------------------------------------------

class ArcDataset(torch.utils.data.Dataset):
    """
    the stream: document t for any t >= 0, a pure function of (seed, t). each trainable pair is the target once an epoch
    (n times where its source is repeated *n), its context is the other demos of its task and never a query.

    ds[t] is a Batch of one document, (T,) each with T = block_size; len(ds) = targets x epochs. the demos of `adapt`
    are targets too, its answers are never opened. skipped pairs are counted in num_held (equal to a validation query),
    num_leaks (pairs of `data` whose input is a query of `adapt`: their output may be the closed answer), num_long (do not
    fit block_size) and num_alone (no context, where shots != 0). raises ValueError if nothing is left.
    """

    def __init__(self, cfg, seed=1337, epochs=1):
        self.cfg, self.seed, self.epochs = cfg, seed, epochs
        sources = [(*x, True) for x in read_sources(cfg.data)] + [(*x, False) for x in read_sources(cfg.adapt, answers=False)]
        unfit = np.array([too_long(task, cfg.max_pair) for task, _, _ in sources], dtype=bool)
        self.num_tasks_out = int(unfit.sum()) # by max_pair
        sources = [x for x, out in zip(sources, unfit) if not out]
        tasks, repeats, in_data = [list(x) for x in zip(*sources)] if sources else ([], [], [])
        self.corpus = c = Corpus(tasks, cfg)
        if cfg.val_tasks < 0 or seed < 0:
            raise ValueError(f"val_tasks={cfg.val_tasks} seed={seed}: want no negative number")
        pair_key = [grid_bytes(c.grid(2 * p)) + grid_bytes(c.grid(2 * p + 1)) for p in range(len(c.pair_task))]
        # hold out the queries of some tasks of data. chosen by content, so that each seed is judged on the same ones
        queries = {task.key: [p for p in range(c.first[k] + c.n_demos[k], c.first[k + 1]) if c.known[p]]
                   for k, task in reversed(list(enumerate(tasks))) if in_data[k]} # reversed: the first of equal tasks stays
        keys = sorted(key for key in queries if queries[key])
        self.val_pairs = sorted(p for key in keys[: min(cfg.val_tasks, len(keys) // 2)] for p in queries[key])
        held = {pair_key[p] for p in self.val_pairs}
        closed = {grid_bytes(x) for task, mine in zip(tasks, in_data) if not mine for x, _ in task.queries}
        leaks = {p for p, k in enumerate(c.pair_task) if in_data[k] and grid_bytes(c.grid(2 * p)) in closed}
        # what is trained on
        targets, self.num_held, self.num_leaks, self.num_long, self.num_alone = [], 0, 0, 0, 0
        for k in range(len(tasks)):
            for i, p in enumerate(range(c.first[k], c.first[k] + c.n_demos[k])):
                if pair_key[p] in held or p in leaks:
                    c.demos[k, i] = -1 # neither a target nor a context
        for p, k in enumerate(c.pair_task):
            is_demo = p < c.first[k] + c.n_demos[k]
            if not c.known[p] or not (is_demo or in_data[k]):
                continue
            if p in leaks:
                self.num_leaks += 1
            elif pair_key[p] in held:
                self.num_held += 1
            elif c.long[p] > cfg.block_size:
                self.num_long += 1
            elif cfg.shots != 0 and not self.has_context(p):
                self.num_alone += 1
            else:
                targets += [(p, repeats[k], i) for i in range(repeats[k])]
        if len(targets) == 0:
            raise ValueError(f"nothing to train on in data={cfg.data!r} adapt={cfg.adapt!r}: of {len(sources) + self.num_tasks_out} tasks "
                             f"{self.num_tasks_out} are over max_pair={cfg.max_pair}, then {self.num_held} pairs are held out, {self.num_leaks} are queries "
                             f"of adapt, {self.num_long} over block_size={cfg.block_size}, {self.num_alone} without context")
        self.val_pairs = [p for p in self.val_pairs if c.long[p] <= cfg.block_size and (cfg.shots == 0 or self.has_context(p))]
        self.targets, self.repeat, self.copy = np.array(targets, dtype=np.int64).T
        identity = hashlib.sha256()
        for task, repeat, flag in sources: # paths may move, content may not
            identity.update(f"{task.name} {repeat} {flag} {len(task.demos)}".encode())
            for x, y in task.demos + task.queries: # in the order of the file, which numbers the pairs
                identity.update(grid_bytes(x) + (grid_bytes(y) if y is not None else b"?"))
        self.corpus_sha256 = identity.hexdigest()
        self.pipeline_sha256 = hashlib.sha256(json.dumps({**asdict(cfg), 'data': '', 'adapt': ''}, sort_keys=True).encode()).hexdigest()

    def has_context(self, p):
        """ is there a demo that may stand before pair p and fits there? """
        c = self.corpus
        demos = [q for q in c.demos[c.pair_task[p]] if q >= 0 and q != p]
        return any(c.long[p] + c.long[q] <= self.cfg.block_size for q in demos)

    def __len__(self):
        return len(self.targets) * self.epochs

    def __getitem__(self, t):
        if t < 0: # the stream has no end to count from
            raise IndexError(f"document {t}: want t >= 0")
        return Batch(*(x if x is None else x[0] for x in self.write_batch(self.plan(np.array([t])), [0], self.cfg.block_size)))

    def collate(self, items):
        """ list of ds[t] -> Batch, for torch's DataLoader(ds, collate_fn=ds.collate) """
        return Batch(*(None if x[0] is None else torch.stack(x) for x in zip(*items)))

    def plan(self, t):
        """ (n,) document numbers -> Documents """
        n = np.uint64(len(self.targets))
        epoch, i = np.divmod(np.asarray(t, dtype=np.uint64), n)
        i = bijection(i, n, hash64(self.seed, EPOCH, epoch)).astype(np.int64)
        visit = epoch * self.repeat[i].astype(np.uint64) + self.copy[i].astype(np.uint64)
        d, cmap = self.corpus.augments(self.targets[i], visit, self.seed)
        plain = hash64(self.seed, IDENTITY, self.targets[i], visit).astype(np.float64) < self.cfg.p_identity * 2.0**64
        cmap[plain] = np.arange(10)
        order = hash64(self.seed, DEMOS, np.asarray(t)[:, None], np.arange(self.corpus.demos.shape[1])) # of the context
        return self.corpus.documents(self.targets[i], d, cmap, order)

    def val_plan(self):
        """ Documents of the held out queries, as they are: no augment, demos in the order of the file, whatever the seed """
        n, order = len(self.val_pairs), np.arange(self.corpus.demos.shape[1], dtype=np.uint64)
        cmap = np.tile(np.arange(10, dtype=np.uint8), (n, 1))
        return self.corpus.documents(self.val_pairs, np.zeros(n, np.int64), cmap, np.tile(order, (n, 1)))

    def val_batches(self):
        """ the validation set as Batches of at most batch_tokens, the same ones each time """
        docs = self.val_plan()
        for ids, T in cut_buckets(docs.length, self.cfg.batch_tokens):
            yield self.write_batch(docs, ids, T, loss_on='query') # whatever is trained on, so that runs compare

    def write_batch(self, docs, ids, T, buffers=None, loss_on=None):
        """ the documents ids of a plan, one a row of T tokens -> Batch. no ids: one row without loss. loss_on: as cfg """
        B = max(len(ids), 1)
        idx, targets, pos, doc, task, dih = buffers if buffers is not None else new_buffers(B * T)
        idx, targets, doc, task, dih = (x[: B * T].view(B, T) for x in (idx, targets, doc, task, dih))
        pos = pos[: 3 * B * T].view(B, T, 3)
        for x, empty in ((idx, PAD), (targets, -100), (pos, 0), (doc, -1), (task, 0), (dih, 0)):
            x.fill_(empty)
        rows = idx.numpy(), targets.numpy(), pos.numpy()
        for b, i in enumerate(ids):
            n = self.corpus.write(docs, i, *(x[b] for x in rows), loss_on=loss_on)
            doc[b, :n] = 0
            task[b, :n] = int(self.corpus.row[self.corpus.pair_task[docs.pairs[i, 0]]])
            dih[b, :n] = int(docs.dihedral[i])
        return Batch(idx, targets, pos, doc, *((task, dih) if self.cfg.shots == 0 else (None, None)))

def too_long(task, max_pair):
    """ does a demo of the task take more than max_pair tokens in its longer orientation? 0 = no limit """
    def longest(x, y):
        return 3 + x.size + y.size + max(x.shape[0] + y.shape[0], x.shape[1] + y.shape[1])
    return max_pair > 0 and any(longest(x, y) > max_pair for x, y in task.demos)

def new_buffers(n, pin=False):
    """ flat tensors for a Batch of n tokens, in the order of its fields """
    shapes = ((n, torch.int64), (n, torch.int64), (3 * n, torch.uint8), (n, torch.int32), (n, torch.int32), (n, torch.uint8))
    return [torch.empty(k, dtype=dtype, pin_memory=pin) for k, dtype in shapes]

def cut_buckets(length, batch_tokens):
    """
    (n,) lengths -> list of (document numbers, T): similar lengths together, at most batch_tokens a batch but at least
    one document. widths are rounded up to 16 a power of two, at least 4 apart, so that a compiler sees few shapes.
    """
    step = np.maximum(2.0 ** (np.floor(np.log2(length)) - 4), 4)
    width = (np.ceil(length / step) * step).astype(np.int64)
    order, batches, start = np.argsort(width, kind='stable'), [], 0
    for end in range(1, len(order) + 1): # grow until one more document would be too many
        if end == len(order) or (end - start + 1) * width[order[end]] > batch_tokens:
            batches.append((order[start:end], int(width[order[end - 1]])))
            start = end
    return batches

class ArcLoader:
    """
    batches without end: next_batch(), state_dict(), load_state_dict(). a window of 4096 consecutive documents is planned
    alone, cut into batches, and these shuffled. every rank plans the whole global batch and writes its own rows, so the
    world size is not part of the state. the tensors of a batch are valid until the second next call.
    """

    def __init__(self, dataset, rank=0, world=1, device='cpu'):
        self.ds, self.rank, self.world, self.device = dataset, rank, world, torch.device(device)
        self.window, self.batch = 0, 0 # the batch that comes next
        self.ring, self.copied, self.turn = [None, None], [None, None], 0
        self.plan = lru_cache(maxsize=2)(self.plan)

    def plan(self, window):
        """ window number -> (Documents, shuffled list of (document numbers, T)) """
        cfg = self.ds.cfg
        docs = self.ds.plan(np.uint64(window) * np.uint64(WINDOW) + np.arange(WINDOW, dtype=np.uint64))
        if cfg.batching == 'bucket':
            batches = cut_buckets(docs.length, cfg.batch_tokens)
        else:
            n = max(cfg.batch_tokens // cfg.block_size, 1)
            batches = [(np.arange(i, min(i + n, WINDOW)), cfg.block_size) for i in range(0, WINDOW, n)]
        shuffle = np.argsort(hash64(self.ds.seed, BATCHES, window, np.arange(len(batches))))
        return docs, [batches[i] for i in shuffle]

    def ahead(self, n):
        """ the next n places in the stream of batches, as (window, batch); the last one is where we stand after n-1 """
        window, batch = self.window, self.batch
        for _ in range(n):
            yield window, batch
            last = batch + 1 == len(self.plan(window)[1])
            window, batch = (window + 1, 0) if last else (window, batch + 1)

    def loss_tokens(self, n=1):
        """ how many tokens carry loss in the next n global batches. known from the plan, so ranks need not ask each other """
        total = 0
        for window, batch in self.ahead(n):
            docs, batches = self.plan(window)
            total += int(docs.loss_tokens[batches[batch][0]].sum())
        return total

    def next_batch(self):
        """ -> Batch on self.device, this rank's rows of the next global batch """
        docs, batches = self.plan(self.window)
        ids, T = batches[self.batch]
        n, r, W = len(ids), self.rank, self.world
        ids = ids[n * r // W : n * (r + 1) // W]
        self.turn ^= 1
        if self.copied[self.turn] is not None: # on cuda: the copy out of this buffer may still be on its way
            self.copied[self.turn].synchronize()
        if self.ring[self.turn] is None or len(self.ring[self.turn][0]) < max(len(ids), 1) * T:
            self.ring[self.turn] = new_buffers(max(len(ids) * T, T, self.ds.cfg.batch_tokens // W), pin=self.device.type == 'cuda')
        batch = self.ds.write_batch(docs, ids, T, self.ring[self.turn])
        *_, (self.window, self.batch) = self.ahead(2)
        if self.device.type == 'cpu':
            return batch
        batch = Batch(*(x if x is None else x.to(self.device, non_blocking=True) for x in batch))
        if self.device.type == 'cuda':
            self.copied[self.turn] = torch.cuda.Event()
            self.copied[self.turn].record()
        return batch

    def state_dict(self):
        """ all there is to resume by, a small dict of json values """
        return {'format': FORMAT, 'seed': self.ds.seed, 'window': self.window, 'batch': self.batch,
                'corpus_sha256': self.ds.corpus_sha256, 'pipeline_sha256': self.ds.pipeline_sha256, 'global_batch': self.ds.cfg.batch_tokens}

    def load_state_dict(self, state):
        """ go to a saved place. raises ValueError that names the fields if it was a place in another stream """
        now = self.state_dict()
        wrong = [key for key in now if key not in ('window', 'batch') and state.get(key) != now[key]]
        if wrong or now.keys() != state.keys():
            raise ValueError("resume refused: " + "; ".join(f"{key} differs (saved {str(state.get(key))[:12]}, now {str(now[key])[:12]})" for key in wrong))
        self.window, self.batch = state['window'], state['batch']
