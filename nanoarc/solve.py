"""
a trained model and a source -> submission.json, candidates.jsonl, solve.json; and the score of any submission.

each query is decoded under several views (augments of it) and a grammar that knows what a grid is. the answers are
turned back: candidates. what makes a good one: how many views answer it, and how probable it is under all of them.
nothing here opens an answer but `score`.
"""
import contextlib
import copy
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.progress import track

from nanoarc import checkpoint, view
from nanoarc.data import (DEMOS, END, IN, MAX_GRID, PAD, ROW, ArcDataset, ArcLoader, Rows, Sampler, decode_grid, dihedral, fits, grammar, hash64,
                          next_pos, undo_dihedral)
from nanoarc.sources import find_leaks, grid_bytes, read_json, read_sources, to_grid
from nanoarc.train import TrainConfig, configs, get_device, get_lr, get_ranks

SELECT = ('votes', 'product', 'both')

@dataclass
class SolveConfig:
    run: str = '' # out_dir of a training run
    data: str = 'arc1/evaluation' # sources whose queries are to be answered, their answers stay closed
    out_dir: str = '' # where submission.json and candidates.jsonl go, '' = into the run
    base: str = '' # where the pretrained model of a fine-tuning lies, if not where it was
    merge: tuple[str, ...] = () # candidates.jsonl of other runs: their candidates and, if there is one, those of this run, together
    views: int = 16 # augments of each query that are decoded. view 0 is the query as it is
    minutes: float = 0.0 # begin no more views after so long, shared out evenly over the tasks. 0 = all views
    p_min: float = 0.03 # besides the greedy answer of a view every other one that is at least so probable there. 1 = none
    samples: int = 0 # answers drawn from each view, besides
    temperature: float = 1.0 # of samples
    top_p: float = 1.0 # samples are drawn from the likeliest tokens that have this share together
    select: str = 'product' # the two best are those with the most 'votes', those most probable under all views: 'product', or 'both'
    score_most: int = 8 # candidates of a query whose probability under all views is asked for, those with the most votes
    ttt_steps: int = 0 # test-time training: so many steps on the demos of the tasks that are solved together, in a copy of the model
    ttt_lr: float = 0.0 # its peak of Muon and AdamW, falling to 0. 0 = a fifth of the run's
    ttt_tokens: int = 1024 # tokens of a step of it
    together: int = 8 # tasks that are solved together, with ttt_steps trained on too
    max_pair: int = 0 # solve only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    decode_rows: int = 128 # answers decoded together
    allow_leak: bool = False # solve queries that the run was trained on, with their answers, and say so in the score
    seed: int = 1337 # of the views, samples and test-time training
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in train
    compile: bool = False # torch.compile of the blocks, for any length. for long runs on cuda

@dataclass
class ScoreConfig:
    submission: Annotated[str, tyro.conf.Positional] # a submission.json
    data: Annotated[str, tyro.conf.Positional] # the source that it answers
    max_pair: int = 0 # score only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    out: str = '' # a .csv or .parquet with a row a query

@dataclass
class Candidate:
    """ a proposed output of a query """
    grid: np.ndarray # (H, W) uint8
    votes: int = 0 # views that answer it greedily, and samples
    found: list = field(default_factory=list) # (view, log-probability there) of each view that answers it
    score: float | None = None # mean log-probability under all views, None = not asked for

    @property
    def log_prob(self):
        """ mean over the views that answer it. rounded, so that machines agree """
        return round(sum(x for _, x in self.found) / max(len(self.found), 1), 4)

def read_fitting(data, max_pair, opened):
    """ sources -> (list of Corpus, list of Task), without tasks that have a demo of more than max_pair tokens. raises ValueError """
    corpora = [c.select(fits(c, max_pair)) for c, _ in read_sources(data, opened)]
    corpora = [c for c in corpora if len(c) > 0]
    tasks, names = [c.task(k) for c in corpora for k in range(len(c))], set()
    if len(tasks) == 0:
        raise ValueError(f"no task in {data!r} with max_pair={max_pair}")
    for task in tasks:
        if task.name in names:
            raise ValueError(f"two tasks of {data} are named {task.name}, a submission can hold one")
        names.add(task.name)
    return corpora, tasks

def load_model(run, device, base=''):
    """ out_dir of a run, and where its pretrained model lies now if that has moved -> (model in eval mode, its DataConfig, {task key: embedding row}, was a leak allowed, peak learning rate of Muon). raises ValueError """
    tensors, meta = checkpoint.load(run)
    if 'text' in meta['data']:
        raise ValueError(f"{run}: a run of text, want one of tasks: nanoarc train --init_from {run} begins one with its blocks")
    model_cfg, data_cfg = configs(meta)
    if base:
        model_cfg = replace(model_cfg, base=base)
    model = model_cfg.model(device).eval()
    checkpoint.restore_model(model, tensors, checkpoint.best_part(meta))
    return model, data_cfg, meta['rows'], bool(meta['leaks']), model.cfg.learning_rates(meta['train']['lr'], 0)[0]

# -----------------------------------------------------------------------------
# decoding

def read_prompts(model, idx, pos, task, dihedral, doc):
    """ prompts as for decode -> Cache after them, (B, 16) logits of the token that follows, and what else the model is told at each token to come, {name: (B, 1)} """
    cache = model.cache()
    same = {} if task is None else {'task': task[:, None], 'dihedral': dihedral[:, None]} # at every token
    logits = model(idx, None, pos, doc, **{name: x.expand(idx.shape) for name, x in same.items()}, cache=cache)[0][:, -1]
    return cache, logits, same if doc is None else {**same, 'doc': doc[:, -1:]}

@torch.no_grad()
def decode(model, idx, pos, task=None, dihedral=None, doc=None, p_min=1.0, samples=0, temperature=1.0, top_p=1.0, seed=0, most=MAX_GRID + 1):
    """
    answers to (B, T) prompts, all ending in OUT, under the grammar. pos (B, T, 3), task and dihedral (B,) or None. doc (B, T) is 1 on a
    prompt and 0 on the filler before it, None = there is none -> list of (prompt, tokens up to END, log-probability, is it the greedy one).

    of each prompt the greedy answer, and with p_min < 1 every answer of at least that probability (what ARChitects' depth-first
    search finds, github.com/da-fr/arc-prize-2024; here all open ones take a step together, at most 1 / p_min of a prompt). samples=n: n
    drawn answers of each instead. a prompt goes through the model once, whatever branches off it.
    """
    device, found, branches = idx.device, [], p_min < 1 and samples == 0
    cache, logits, extra = read_prompts(model, idx, pos, task, dihedral, doc)
    rows = torch.arange(len(idx), device=device).repeat_interleave(max(samples, 1)) # (b,) the prompt of each open answer
    if samples > 1:
        cache.keep(rows)
        logits, extra = logits[rows], {name: x[rows] for name, x in extra.items()}
    at, width = pos[:, -1].long()[rows], torch.zeros_like(rows) # where the last token stands, and the sides of the grid so far
    out, logp = torch.zeros(len(rows), 0, dtype=torch.int64, device=device), torch.zeros(len(rows), dtype=logits.dtype, device=device)
    greedy, generator = torch.full_like(rows, samples == 0, dtype=torch.bool), torch.Generator(device).manual_seed(seed)
    for _ in range(most):
        scores = logits.masked_fill(~grammar(at, width), float('-inf')).log_softmax(-1) # (b, 16)
        parent = every = torch.arange(len(rows), device=device)
        token = best = scores.argmax(-1) if samples == 0 else draw(scores, temperature, top_p, generator)
        if branches:
            wanted = logp[:, None] + scores >= math.log(p_min)
            wanted[every, best] |= greedy
            parent, token = wanted.nonzero(as_tuple=True)
            greedy = greedy[parent] & (token == best[parent])
        rows, at, width, logp = rows[parent], at[parent], width[parent], logp[parent] + scores[parent, token]
        out = torch.cat([out[parent], token[:, None]], 1)
        width = torch.where((token == ROW) & (width == 0), at[:, 1], width)
        at, ended = next_pos(at, token), token == END
        if ended.any(): # waits for the device
            found += zip(rows[ended].tolist(), out[ended].tolist(), logp[ended].tolist(), greedy[ended].tolist())
            rows, at, width, logp, out, greedy, token, parent = (x[~ended] for x in (rows, at, width, logp, out, greedy, token, parent))
        if len(rows) == 0: # all ended, or what is still open has become too improbable
            break
        if not torch.equal(parent, every): # some left, or branched
            cache.keep(parent)
            extra = {name: x[parent] for name, x in extra.items()}
        logits = model(token[:, None], pos=at[:, None], **extra, cache=cache)[0][:, -1]
    else:
        found += zip(rows.tolist(), out.tolist(), logp.tolist(), greedy.tolist()) # cut short
    return found

def draw(scores, temperature, top_p, generator):
    """ (b, V) log-probabilities -> (b,) tokens, from the likeliest ones that have share top_p together (Holtzman et al. 2020) """
    p, order = (scores / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]

@torch.no_grad()
def score_answers(model, idx, pos, answers, task=None, dihedral=None, doc=None):
    """
    (B, T) prompts as for decode, and of each a list of grids -> list of B lists of the log-probability of each grid, under
    the grammar. a prompt goes through the model once.
    """
    device = idx.device
    cache, first, extra = read_prompts(model, idx, pos, task, dihedral, doc)
    rows = torch.tensor([b for b, grids in enumerate(answers) for _ in grids], device=device)
    written = [write_answer(grid) for grids in answers for grid in grids]
    n = max(len(tokens) for tokens, *_ in written)
    tokens, at, width = (torch.from_numpy(np.stack([np.pad(x[i], [(0, n - len(x[i]))] + [(0, 0)] * (x[i].ndim - 1), constant_values=PAD if i == 0 else 0) for x in written])).to(device) for i in range(3))
    cache.keep(rows)
    logits = first[rows, None]
    if n > 1:
        more = model(tokens[:, :-1], pos=at[:, 1:], **{name: x[rows].expand(-1, n - 1) for name, x in extra.items()}, cache=cache)[0]
        logits = torch.cat([logits, more], 1) # (b, n, 16), of the token at each place
    legal = grammar(at.flatten(0, 1), width.flatten()).view_as(logits) | (tokens == PAD)[..., None]
    scores = logits.masked_fill(~legal, float('-inf')).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    sums = iter(scores.masked_fill(tokens == PAD, 0).sum(1).tolist())
    return [[next(sums) for _ in grids] for grids in answers]

def write_answer(grid):
    """ (H, W) grid -> (n,) int64 tokens up to END, (n, 3) where the token before each stands, (n,) width of the first row, 0 while it is open """
    H, W = grid.shape
    tokens = np.full((H, W + 1), ROW, np.int64)
    tokens[:, :W] = grid
    tokens = np.append(tokens, END)
    r, c = np.divmod(np.arange(len(tokens)), W + 1) # the token before cell (r, c) stands at column c, be it OUT, ROW or a cell
    return tokens, np.stack([r, c, np.ones_like(r)], 1), np.where(r == 0, 0, W)

def make_views(sampler, pair, n, seed):
    """
    query -> (Documents of n views, {number: (idx (T,), pos (T, 3))} of those that differ), prompts that stop after OUT.
    view 0 is the query as it is; view k >= 1 is an augment, drawn as in training but always with its colors permuted.
    """
    assert not sampler.known[pair], "answers are to be closed here"
    k = np.arange(n)
    docs = sampler.plan(np.full(n, pair), k - (k > 0), hash64(seed, DEMOS, pair, k), k == 0, seed)
    batch = sampler.write(Rows(docs, np.arange(n + 1), k, None, None), 0, n, int(docs.length.max()))
    prompts, known = {}, set()
    for i, T in enumerate(docs.length):
        idx, pos = batch.idx[i, :T].numpy(), batch.pos[i, :T].numpy()
        key = (int(docs.dihedral[i]), idx.tobytes())
        if key not in known:
            known.add(key)
            prompts[i] = idx, pos
    return docs, prompts

def undo(grid, d, cmap):
    """ the inverse of an augment: colors first, then the dihedral """
    return undo_dihedral(np.argsort(cmap).astype(np.uint8)[grid], d)

@dataclass
class View:
    """ a prompt, and how to turn its answer back """
    query: tuple # (task, query) by number
    number: int
    dihedral: int
    cmap: np.ndarray # (10,)
    row: int # of the task embedding
    idx: np.ndarray # (T,)
    pos: np.ndarray # (T, 3)

class Solver:
    """ some tasks that are solved together: their views, batches of these through the model, and the candidates that come out """

    def __init__(self, cfg, model, autocast, sampler, queries):
        """ queries: {(task, query) by number: pair of the sampler} """
        self.cfg, self.model, self.autocast, self.alone = cfg, model, autocast, []
        self.device, self.found, self.views, self.seen, self.fits = model.device, {query: {} for query in queries}, [], [], {}
        for query, pair in queries.items():
            docs, prompts = make_views(sampler, pair, cfg.views, cfg.seed)
            row = int(sampler.tables.row[sampler.tables.pair_task[pair]])
            self.views += [View(query, v, int(docs.dihedral[v]), docs.cmap[v], row, *prompts[v]) for v in prompts]
            if sampler.cfg.shots != 0 and (docs.pairs >= 0).sum(1).min() == 1:
                self.alone.append(query)

    def each(self, views, size, f):
        """
        f of batches of at most `size` views of like lengths -> (views, what f makes of them) each. f(views, the arguments of decode by name).
        shorter prompts get filler before them, where the model can tell; and what a gpu has no memory for is tried again in halves.
        """
        def kind(x): # of as many pairs: to a language model each may be a few tokens more
            return len(x.idx), int((x.idx == IN).sum())
        views, size = sorted(views, key=kind), min(size, self.fits.get(f.__name__, size))
        for rest in [views] if self.model.pads else [list(group) for _, group in groupby(views, kind)]:
            while rest:
                part, found = rest[:size], None
                with contextlib.suppress(torch.OutOfMemoryError) if len(part) > 1 else contextlib.nullcontext(), self.autocast():
                    found = f(part, self.arguments(part))
                if found is None:
                    size = self.fits[f.__name__] = len(part) // 2
                    torch.cuda.empty_cache()
                else:
                    yield part, found
                    rest = rest[size:]

    def arguments(self, views):
        """ of decode, by name """
        T = len(views[-1].idx) # the longest
        filler = np.array([T - len(x.idx) for x in views])
        args = {'idx': np.stack([np.pad(x.idx, (n, 0), constant_values=PAD) for x, n in zip(views, filler)]), 'pos': np.stack([np.pad(x.pos, ((n, 0), (0, 0))) for x, n in zip(views, filler)])}
        if filler.any() or self.cfg.compile: # compiled for both it would be compiled too often
            args['doc'] = (np.arange(T) >= filler[:, None]).astype(np.int32)
        if self.model.cfg.n_task > 0:
            args |= {'task': np.array([x.row for x in views]), 'dihedral': np.array([x.dihedral for x in views], np.uint8)}
        return {name: torch.from_numpy(x).to(self.device) for name, x in args.items()}

    def propose(self, views, deadline=float('inf')):
        """ decode views, their answers become candidates. after the deadline, of time.perf_counter, no batch is begun if each query has one """
        cfg = self.cfg
        for samples in (0, cfg.samples) if cfg.samples > 0 else (0,):
            def answers(part, args):
                seed = int(hash64(cfg.seed, len(self.views), *part[0].query, part[0].number)) >> 1
                return decode(self.model, **args, p_min=cfg.p_min, samples=samples, temperature=cfg.temperature, top_p=cfg.top_p, seed=seed)
            for part, found in self.each(views, max(cfg.decode_rows // max(samples, 1), 1), answers):
                if samples == 0:
                    self.seen += part
                for b, tokens, logp, greedy in found:
                    view = part[b]
                    grid = undo(decode_grid(tokens[:-1]), view.dihedral, view.cmap)
                    c = self.found[view.query].setdefault(grid_bytes(grid), Candidate(grid))
                    c.votes += greedy or samples > 0
                    if all(v != view.number for v, _ in c.found): # drawn again
                        c.found.append((view.number, round(logp, 4)))
                if self.over(deadline):
                    return

    def over(self, deadline):
        return time.perf_counter() > deadline and all(self.found.values())

    def judge(self):
        """ how probable are the candidates of a query under each of the views so far? a sole one needs no judge """
        best = {query: sorted(found.values(), key=lambda c: (-c.votes, -c.log_prob, grid_bytes(c.grid)))[: self.cfg.score_most] for query, found in self.found.items()}
        asked = [x for x in self.seen if len(best[x.query]) > 1]
        scores = defaultdict(list)
        def logps(part, args):
            return score_answers(self.model, answers=[[dihedral(x.cmap[c.grid], x.dihedral) for c in best[x.query]] for x in part], **args)
        for part, found in self.each(asked, max(self.cfg.decode_rows // self.cfg.score_most, 1), logps):
            for x, y in zip(part, found):
                scores[x.query].append(y)
        for query, found in scores.items():
            for c, x in zip(best[query], np.mean(found, 0)):
                c.score = round(float(x), 4)

def fine_tune(model, lr, corpora, data_cfg, rows, cfg, device):
    """
    test-time training (Akyürek et al., arxiv 2411.07279): a copy of the model after cfg.ttt_steps on the demos of these tasks,
    each demo the target under all augments and, in context, the others before it. no answer is looked at, there is none. at
    shots=0 a task that the model does not know begins with the mean of all embeddings -> (model, {task key: row}).
    """
    alone = replace(data_cfg, data='', adapt='', val_tasks=0, max_pair=0, batching='bucket', batch_tokens=cfg.ttt_tokens)
    sources = [(c, 1) for c in corpora]
    new_rows, ds = Sampler(sources, alone).rows, None
    with contextlib.suppress(ValueError): # nothing to train on: no demo fits, or in context there is but one
        ds = ArcDataset(alone, cfg.seed, sources=([], sources))
    tuned = copy.deepcopy(model)
    if model.cfg.n_task > 0:
        known = model.wtask.weight.detach()
        weight = torch.stack([known[rows[key]] if key in rows else known.mean(0) for key in new_rows])
        tuned.wtask, tuned.cfg = torch.nn.Embedding.from_pretrained(weight, freeze=False), replace(model.cfg, n_task=len(weight))
    optimizers, schedule = tuned.optimizers(lr, lr, 0.0), TrainConfig(warmup_iters=1, decay_frac=1.0)
    loader = ArcLoader(ds, device=device) if ds else None
    for step in range(cfg.ttt_steps if ds else 0):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = lr * get_lr(step, cfg.ttt_steps, schedule)
        n = loader.loss_tokens()
        (tuned(*loader.next_batch())[1] / n).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tuned.eval(), new_rows

def draw_val(model, ds, out, n=4):
    """ validation queries of the n smallest tasks as the model answers them now, greedily -> a png. an answer that does not end where it should is cut short """
    s, device, shown = ds.sampler, model.device, []
    pairs = ds.val_pairs[np.unique(s.tables.pair_task[ds.val_pairs], return_index=True)[1]] # one a task
    pairs = pairs[np.argsort(s.tables.need.max(0)[pairs], kind='stable')[:n]]
    for pair in pairs:
        docs = s.plan(np.array([pair]), 0, 0, True, 0)
        batch = s.write(Rows(docs, np.array([0, 1]), np.array([0]), None, None), 0, 1, int(docs.length[0]), loss_on='query')
        T = int((batch.targets[0] != -100).nonzero()[0]) + 1 # tokens of the prompt
        extra = [x[:, T - 1].to(device) for x in batch[4:] if x is not None]
        tokens = decode(model, batch.idx[:, :T].to(device), batch.pos[:, :T].to(device), *extra, most=int(docs.length[0]) - T)[0][1]
        rows = len(tokens) - tokens[::-1].index(ROW) if ROW in tokens else 0 # tokens of whole rows
        k = s.tables.pair_task[pair]
        task, query = s.task(k), int(pair - s.tables.first[k] - s.tables.n_demos[k])
        shown.append((replace(task, queries=[task.queries[query]]), [{'attempt_1': decode_grid(tokens[:rows])} if rows else {}]))
    view.draw_tasks(shown, out)

def main(cfg):
    """ solve a source -> path of submission.json. raises ValueError for what a user can mend """
    device, _, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    if device.type == 'cpu':
        torch.set_float32_matmul_precision('highest') # MKL: oneDNN compiles a product anew for each shape, and here no two steps have the same
    if min(cfg.views, cfg.decode_rows, cfg.together, cfg.score_most, cfg.ttt_tokens) < 1 or min(cfg.minutes, cfg.samples, cfg.ttt_steps, cfg.ttt_lr) < 0:
        raise ValueError(f"views={cfg.views} decode_rows={cfg.decode_rows} together={cfg.together} score_most={cfg.score_most} ttt_tokens={cfg.ttt_tokens}: want at least 1, "
                         "and no negative minutes, samples, ttt_steps or ttt_lr")
    if cfg.select not in SELECT or not 0 < cfg.p_min <= 1 or not 0 < cfg.top_p <= 1 or cfg.temperature <= 0:
        raise ValueError(f"select={cfg.select!r} p_min={cfg.p_min} top_p={cfg.top_p} temperature={cfg.temperature}: want one of {', '.join(SELECT)}, shares above 0 and up to 1, "
                         "a temperature above 0")
    if not cfg.run and not (cfg.merge and cfg.out_dir):
        raise ValueError("want the --run to solve with, or --merge FILE ... --out_dir DIR")
    corpora, tasks = read_fitting(cfg.data, cfg.max_pair, opened=False)
    parts, leaks = [read_candidates(path, tasks) for path in cfg.merge], []
    if cfg.run:
        found, leaks = solve_with(cfg, corpora, tasks, device, autocast, rank, world)
        parts.append(found)
    out_dir = Path(cfg.out_dir or cfg.run)
    if rank > 0: # the first one writes
        return out_dir / 'submission.json'
    for path in cfg.merge: # the others may have seen more than they were asked
        about = Path(path).with_name('solve.json')
        leaks = sorted({*leaks, *(read_json(about)['leaks'] if about.is_file() else [])})
    write_results(out_dir, tasks, {query: rank_candidates([part.get(query, []) for part in parts], cfg.select) for query in {query for part in parts for query in part}})
    about = {'run': cfg.run, 'data': cfg.data, 'merge': cfg.merge, 'views': cfg.views, 'select': cfg.select, 'ttt_steps': cfg.ttt_steps, 'seed': cfg.seed, 'leaks': leaks}
    checkpoint.write_file(out_dir / 'solve.json', json.dumps(about, indent=1).encode())
    return out_dir / 'submission.json'

def solve_with(cfg, corpora, tasks, device, autocast, rank, world):
    """ a run's model on the queries of tasks -> ({(task, query) by number: list of Candidates}, queries it was trained on). of all ranks on rank 0 """
    model, data_cfg, rows, allowed, lr = load_model(cfg.run, device, cfg.base)
    if cfg.compile and not model.blocks:
        raise ValueError("compile: a language model of transformers is run as it is")
    leaks = find_leaks(cfg.run, corpora)
    if leaks and not (cfg.allow_leak or allowed):
        raise ValueError(f"{cfg.run} was trained on {len(leaks)} of these queries, answers included: {'; '.join(leaks[:3])}{'; ...' if len(leaks) > 3 else ''}. "
                         "train with --adapt in place of --data, or --allow_leak solves them and says so in the score")
    sampler = Sampler([(c, 1) for c in corpora], data_cfg, rows)
    table = sampler.tables
    unknown = [task.name for task, row in zip(tasks, table.row) if row < 0] if model.cfg.n_task > 0 and cfg.ttt_steps == 0 else []
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(tasks)} tasks have no embedding row in {cfg.run}: {', '.join(unknown[:5])}"
                         f"{', ...' if len(unknown) > 5 else ''}. --ttt_steps gives them one, or train on their demos with --adapt {cfg.data}, or in context with --shots=-1")
    # tasks of like size together. a group is solved the same way on any number of ranks
    order = sorted(range(len(tasks)), key=lambda k: (int(table.need[:, table.first[k] : table.first[k + 1]].max()), k))
    groups = [order[j : j + cfg.together] for j in range(0, len(order), cfg.together)][rank::world]
    if cfg.compile:
        torch._dynamo.config.cache_size_limit = 64 # kinds of blocks x prompts, steps and whole answers x sizes that happen to equal another one
    found, alone, start = {}, [], time.perf_counter()
    for j, group in enumerate(track(groups, description=f"{sum(len(task.queries) for task in tasks)} queries, {cfg.views} views each", disable=rank > 0)):
        deadline = start + 60 * cfg.minutes * (j + 1) / len(groups) if cfg.minutes > 0 else float('inf')
        queries = {(k, i): int(table.first[k] + table.n_demos[k] + i) for k in sorted(group) for i in range(len(tasks[k].queries))}
        mine, net = sampler, model
        if cfg.ttt_steps > 0:
            net, mine = with_training(cfg, model, cfg.ttt_lr or lr / 5, corpora, sorted(group), data_cfg, rows, device)
        for block in net.blocks if cfg.compile and (j == 0 or net is not model) else ():
            block.compile(dynamic=True)
        solver = Solver(cfg, net, autocast, mine, queries)
        alone += [f"{tasks[k].name} query {i}" for k, i in solver.alone]
        first = max(cfg.decode_rows // len(queries), 1) if device.type == 'cuda' else 1 # views of each query. on a gpu a step of all that go together takes hardly longer than one of few
        edges = sorted({0, cfg.views, *(min(first << k, cfg.views) for k in range(10))}) if cfg.minutes > 0 else [0, cfg.views]
        for a, b in zip(edges, edges[1:]):
            if not solver.over(deadline):
                solver.propose([x for x in solver.views if a <= x.number < b], deadline)
        if cfg.select != 'votes':
            solver.judge()
        found |= {query: list(candidates.values()) for query, candidates in solver.found.items()}
    if world > 1:
        every = [None] * world
        dist.gather_object(found, every if rank == 0 else None)
        found = {query: candidates for part in every for query, candidates in part.items()} if rank == 0 else {}
    if alone and rank == 0:
        print(f"warning: no demo fits block_size={data_cfg.block_size} before {len(alone)} queries: {', '.join(alone[:5])}")
    return found, leaks

def with_training(cfg, model, lr, corpora, group, data_cfg, rows, device):
    """ test-time training for the tasks of a group, by number -> (model, Sampler with their rows in it) """
    keep = np.zeros(sum(len(c) for c in corpora), bool)
    keep[group] = True
    parts = np.split(keep, np.cumsum([len(c) for c in corpora])[:-1])
    chosen = [c.select(part) for c, part in zip(corpora, parts) if part.any()]
    net, rows = fine_tune(model, lr, chosen, data_cfg, rows, cfg, device)
    return net, Sampler([(c, 1) for c in corpora], data_cfg, rows)

def rank_candidates(parts, select='votes'):
    """
    candidates of a query, by run: list of lists of Candidate -> list of (Candidate, belief), the best first. belief adds up over
    the runs what share of a run's votes a candidate has ('votes'), its probability under all views over that of all candidates
    ('product', a product of experts), or their mean ('both'); then it is the log-probability, then the bytes of the grid that decide.
    """
    merged = {}
    for part in parts:
        votes = sum(c.votes for c in part) or 1
        scores = [c.score for c in part if c.score is not None]
        top = max(scores, default=0.0)
        total = sum(math.exp(x - top) for x in scores)
        for c in part:
            share = c.votes / votes
            product = share if not scores else math.exp(c.score - top) / total if c.score is not None else 0.0
            belief = {'votes': share, 'product': product, 'both': (share + product) / 2}[select]
            old, before = merged.get(grid_bytes(c.grid), (Candidate(c.grid), 0.0))
            both = [x for x in (old.score, c.score) if x is not None]
            merged[grid_bytes(c.grid)] = Candidate(c.grid, old.votes + c.votes, old.found + c.found, sum(both) / len(both) if both else None), before + belief
    def score(c): # where belief is too small to tell
        return c.score if c.score is not None and select != 'votes' else -1e9
    return sorted(merged.values(), key=lambda x: (-round(x[1], 6), -score(x[0]), -x[0].log_prob, grid_bytes(x[0].grid)))

# -----------------------------------------------------------------------------
# results

def write_results(out_dir, tasks, ranked):
    """
    ranked: {(task number, query number): rank_candidates(...)} -> submission.json in Kaggle's shape, {id: [{"attempt_1": rows,
    "attempt_2": rows}, ...]} with every query of every task in order, and candidates.jsonl, a candidate a line.
    """
    submission, lines = {}, []
    for k, task in enumerate(tasks):
        submission[task.name] = [None] * len(task.queries) # filled by index: a missing one must not shift the rest
        for i in range(len(task.queries)):
            best = ranked.get((k, i), [])
            grids = [c.grid.tolist() for c, _ in best[:2]] or [[[0]]]
            submission[task.name][i] = {'attempt_1': grids[0], 'attempt_2': grids[-1]} # a copy only if there is no other
            lines += [json.dumps({'task': task.name, 'query': i, 'belief': round(belief, 6), 'votes': c.votes, 'log_prob': c.log_prob, 'score': c.score,
                                  'views': sorted(v for v, _ in c.found), 'grid': c.grid.tolist()}) for c, belief in best]
    checkpoint.write_file(Path(out_dir) / 'candidates.jsonl', "".join(line + "\n" for line in lines).encode())
    checkpoint.write_file(Path(out_dir) / 'submission.json', json.dumps(submission).encode())

def read_candidates(path, tasks):
    """ a candidates.jsonl -> {(task, query) by number: list of Candidates}. raises ValueError that names file, line and field, or a task that is not asked for """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, want a candidates.jsonl of nanoarc solve")
    number, found = {task.name: k for k, task in enumerate(tasks)}, defaultdict(list)
    for n, line in enumerate(Path(path).read_text().splitlines(), 1):
        where = f"{path}: line {n}"
        try:
            x = json.loads(line)
            name, i, votes, log_prob, score, views = (x[key] for key in ('task', 'query', 'votes', 'log_prob', 'score', 'views'))
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{where}: {'no field ' + str(e) if isinstance(e, KeyError) else 'not a candidate'}") from None
        k = number.get(name)
        if k is None:
            continue # of a larger source
        if not isinstance(i, int) or not 0 <= i < len(tasks[k].queries):
            raise ValueError(f"{where}: task {name} has no query {i}")
        if not all(type(v) in (int, float) for v in (votes, log_prob)) or type(score) not in (float, int, type(None)) or type(views) is not list:
            raise ValueError(f"{where}: task {name}, query {i}: want numbers for votes, log_prob and score, a list of views")
        found[k, i].append(Candidate(to_grid(x.get('grid'), f"{where}: task {name}, query {i}, grid"), votes, [(v, log_prob) for v in views], score))
    if not found:
        raise ValueError(f"{path}: no candidate for any of these {len(tasks)} tasks")
    return found

def score(submission, tasks):
    """
    a parsed submission.json and tasks with answers -> dict. the official rule: a query counts if either attempt equals its
    answer, a task is worth the share of its queries that count, and the score is the mean over all tasks, in percent; a task
    or attempt that is missing or malformed is worth 0. `solved` is stricter: tasks with every query right.
    """
    result = {'score': 0.0, 'solved': 0, 'tasks': len(tasks), 'right': 0, 'outputs': 0, 'per_task': {}, 'per_query': [], 'missing': [], 'unknown': [], 'misshapen': []}
    for task in tasks:
        tried = submission.get(task.name)
        if not isinstance(tried, list):
            result['missing'].append(task.name)
            tried = []
        elif len(tried) != len(task.queries):
            result['misshapen'].append(f"{task.name} has {len(tried)} entries, want {len(task.queries)}")
        right = 0
        for i, (_, answer) in enumerate(task.queries):
            if answer is None:
                raise ValueError(f"{task.source}: task {task.name}, query {i}: no answer to score against")
            attempts = tried[i] if i < len(tried) and isinstance(tried[i], dict) else {}
            want = json.dumps(answer.tolist()) # as text: in python [[True]] == [[1]]
            hits = [json.dumps(attempts.get(key)) == want for key in ('attempt_1', 'attempt_2')]
            if set(attempts) < {'attempt_1', 'attempt_2'} and i < len(tried):
                result['misshapen'].append(f"{task.name}, query {i}: no {' and no '.join(key for key in ('attempt_1', 'attempt_2') if key not in attempts)}")
            result['per_query'].append({'task': task.name, 'query': i, 'attempt_1': hits[0], 'attempt_2': hits[1], 'right': any(hits)})
            right += any(hits)
        n = len(task.queries)
        result['per_task'][task.name] = [right, n]
        result['right'] += right
        result['outputs'] += n
        result['solved'] += right == n
        result['score'] += 100 * right / n / len(tasks)
    result['score'] = round(result['score'], 2)
    result['unknown'] = [name for name in submission if name not in result['per_task']]
    return result

def misordered(submission, tasks):
    """ names of tasks whose attempts would be right for another query of theirs than the one they stand at """
    names = []
    for task in tasks:
        tried = submission.get(task.name)
        answers = [json.dumps(answer.tolist()) for _, answer in task.queries]
        mine = [{json.dumps(grid) for grid in x.values()} if isinstance(x, dict) else set() for x in tried] if isinstance(tried, list) else []
        if any(answers[j] in x and answers[j] != answers[i] and answers[i] not in x for i, x in enumerate(mine[: len(answers)]) for j in range(len(answers)) if j != i):
            names.append(task.name)
    return names

def score_main(cfg):
    """ print the score of a submission, a json object as the last line -> the dict of `score`. raises ValueError """
    if cfg.out and Path(cfg.out).suffix not in ('.csv', '.parquet'):
        raise ValueError(f"--out {cfg.out}: want a .csv or .parquet")
    submission = read_json(cfg.submission)
    if type(submission) is not dict:
        raise ValueError(f"{cfg.submission}: want an object of attempts by task id")
    tasks = read_fitting(cfg.data, cfg.max_pair, opened=True)[1]
    result = score(submission, tasks)
    about = Path(cfg.submission).with_name('solve.json') # by the solver, a submission from elsewhere has none
    result['leaks'] = len(read_json(about).get('leaks', [])) if about.is_file() else 0
    if cfg.out:
        import polars as pl
        frame = pl.DataFrame(result['per_query'])
        frame.write_csv(cfg.out) if cfg.out.endswith('.csv') else frame.write_parquet(cfg.out)
    result.pop('per_query')
    if wrong := misordered(submission, tasks):
        print(f"{len(wrong)} tasks have the right answers of their queries in another order: {', '.join(wrong[:10])}")
    if misshapen := result.pop('misshapen'):
        print(f"{len(misshapen)} entries without their two attempts, what is missing is worth 0: {'; '.join(misshapen[:10])}{'; ...' if len(misshapen) > 10 else ''}")
    for key, what in (('missing', "not in the submission, worth 0"), ('unknown', "not in the source, ignored")):
        if names := result.pop(key):
            print(f"{len(names)} tasks {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    partly = [f"{name} {right}/{n}" for name, (right, n) in result['per_task'].items() if 0 < right < n]
    solved = [name for name, (right, n) in result.pop('per_task').items() if right == n]
    leaked = f", TRAINED ON {result['leaks']} OF THE ANSWERS" if result['leaks'] else ""
    print(f"solved: {' '.join(solved) or 'none'}" + (f"; in part: {', '.join(partly)}" if partly else ""))
    print(f"{result['score']:.2f}% by the official rule, {result['solved']} of {result['tasks']} tasks with every output right, "
          f"{result['right']} of {result['outputs']} outputs{leaked}")
    print(json.dumps(result))
    return result

if __name__ == '__main__':
    from nanoarc.cli import main as cli
    cli(['solve', *sys.argv[1:]])
