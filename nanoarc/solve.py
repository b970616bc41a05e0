"""
a trained model and a source -> submission.json, candidates.jsonl, solve.json.

each query is decoded under several views (augments of it). the answers are turned back: candidates. what makes a good
one is how many views answer it, and how probable it is under all of them. no answer is opened here.
"""
import copy
import json
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track

from nanoarc import checkpoint
from nanoarc.corpus import a_few, find_leaks, read_json
from nanoarc.data import DEMOS, ArcDataset, ArcLoader, DataConfig, Sampler, alone, has_context, hash64
from nanoarc.decode import decode, score_answers
from nanoarc.grids import IN, PAD, decode_grid, dihedral, grid_bytes, undo_augment
from nanoarc.run import get_device, get_ranks, load_run
from nanoarc.settings import SEED, check_numbers
from nanoarc.submission import Candidate, rank_candidates, read_candidates, read_fitting, write_results
from nanoarc.train import TrainConfig, get_lr

@dataclass
class SolveConfig:
    run: str = '' # out_dir of a training run
    data: str = 'arc1/evaluation' # sources whose queries are to be answered, their answers stay closed
    out_dir: str = '' # where submission.json and candidates.jsonl go, '' = into the run
    base: str = '' # where the pretrained model of a fine-tuning lies, if not where it was
    # candidates.jsonl of other runs: their candidates and, if there is one, those of this run, together
    merge: tuple[str, ...] = ()
    views: int = 16 # augments of each query that are decoded. view 0 is the query as it is
    minutes: float = 0.0 # begin no more views after so long, shared out evenly over the tasks. 0 = all views
    # besides the greedy answer of a view every other one that is at least so probable there. 1 = none
    p_min: float = 0.03
    # the two best candidates are those most probable under all views: 'product' | those with the most 'votes' of views
    select: str = 'product'
    # candidates of a query whose probability under all views is asked for, those with the most votes
    score_most: int = 8
    # test-time training: so many steps on the demos of the tasks that are solved together, in a copy of the model
    ttt_steps: int = 0
    ttt_lr: float = 0.0 # its peak of Muon and AdamW, falling to 0. 0 = a fifth of the run's
    ttt_tokens: int = 1024 # tokens of a step of it
    together: int = 8 # tasks that are solved together, with ttt_steps trained on too
    # solve only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    max_pair: int = 0
    decode_rows: int = 128 # answers decoded together
    # solve queries that the run was trained on, with their answers, and say so in the score
    allow_leak: bool = False
    seed: int = 1337 # of the views and test-time training
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in train

    def check(self):
        """ raises ValueError that names the setting """
        check_numbers(self, dict(views=1, decode_rows=1, together=1, score_most=1, ttt_tokens=1),
                      dict(p_min=1, seed=SEED))
        if self.select not in ('product', 'votes'):
            raise ValueError(f"select={self.select!r}: want product or votes")
        if self.p_min == 0:
            raise ValueError("p_min=0: want a probability above 0, 1 = the greedy answer alone")
        if not self.run and not (self.merge and self.out_dir):
            raise ValueError("want the --run to solve with, or --merge FILE ... --out_dir DIR")

# -----------------------------------------------------------------------------
# views

@dataclass
class View:
    """ a query under an augment, as a prompt that ends in OUT """
    query: tuple # (task, query) by number
    number: int
    dihedral: int
    cmap: np.ndarray # (10,) what each color became
    row: int # of the task embedding
    idx: np.ndarray # (T,)
    pos: np.ndarray # (T, 3)

    def kind(self):
        """ views of one kind are as long, also to a language model: there each pair may be a few tokens more """
        return len(self.idx), int((self.idx == IN).sum())

def make_views(sampler, pair, n, seed, query):
    """
    pair number of a query -> list of n Views at most, equal ones once. view 0 is the query as it is, view k >= 1 an
    augment, drawn as in training but always with its colors permuted.
    """
    assert not sampler.known[pair], "answers are to be closed here"
    k = np.arange(n)
    visit = np.maximum(k - 1, 0)
    docs = sampler.plan(np.full(n, pair), visit, hash64(seed, DEMOS, pair, k), k == 0, seed)
    batch = sampler.write(alone(docs), 0, n, int(docs.length.max()))
    row = int(sampler.tables.row[sampler.tables.pair_task[pair]])
    views, known = [], set()
    for i in range(n):
        T = docs.length[i]
        idx, pos = batch.idx[i, :T].numpy(), batch.pos[i, :T].numpy()
        d = int(docs.dihedral[i])
        if (d, idx.tobytes()) not in known:
            known.add((d, idx.tobytes()))
            views.append(View(query, i, d, docs.cmap[i], row, idx, pos))
    return views

def view_rounds(views, minutes, first):
    """
    which views to decode one after another, as (first, last + 1): all at once if there is time for all, otherwise twice
    as many each round, so that time may run out after any
    """
    if minutes == 0:
        return [(0, views)]
    edges = [0]
    while first < views:
        edges.append(first)
        first *= 2
    edges.append(views)
    return list(zip(edges, edges[1:]))

class Solver:
    """ some tasks that are solved together: their views, these through the model, the candidates that come out """

    def __init__(self, cfg, model, autocast, sampler, queries):
        """ queries: {(task, query) by number: pair of the sampler} """
        self.cfg, self.model, self.autocast = cfg, model, autocast
        self.views = []
        self.seen = [] # views that were decoded
        self.found = {} # {query: {bytes of a grid: Candidate}}
        for query, pair in queries.items():
            self.views += make_views(sampler, pair, cfg.views, cfg.seed, query)
            self.found[query] = {}

    def each(self, views, size, f):
        """
        f(views, arguments of decode by name) of batches of at most `size` views of like lengths -> generator of (views,
        what f made of them). what the device has no memory for is tried again in halves.
        """
        views = sorted(views, key=View.kind)
        while views:
            part = views[:size]
            if not self.model.pads: # it cannot tell filler: one kind at a time
                part = [x for x in part if x.kind() == views[0].kind()]
            found = None
            try:
                with self.autocast():
                    found = f(part, self.arguments(part))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            if found is None: # here, where the exception holds no memory any more
                torch.cuda.empty_cache()
                size = len(part) // 2
            else:
                yield part, found
                views = views[len(part) :]

    def arguments(self, views):
        """ of decode, by name. shorter prompts get filler before them, which is a document of its own """
        B, T = len(views), max(len(x.idx) for x in views)
        idx = np.full((B, T), PAD)
        pos = np.zeros((B, T, 3), np.uint8)
        doc = np.zeros((B, T), np.int32)
        for i, x in enumerate(views):
            n = T - len(x.idx)
            idx[i, n:], pos[i, n:], doc[i, n:] = x.idx, x.pos, 1
        args = {'idx': idx, 'pos': pos}
        if doc.min() == 0:
            args['doc'] = doc
        if self.model.n_task > 0:
            args['task'] = np.array([x.row for x in views])
            args['dihedral'] = np.array([x.dihedral for x in views], np.uint8)
        return {name: torch.from_numpy(x).to(self.model.device) for name, x in args.items()}

    def propose(self, views, deadline=float('inf')):
        """ decode views, their answers become candidates. after the deadline no batch is begun, see over """
        def answers(part, args):
            return decode(self.model, **args, p_min=self.cfg.p_min)
        for part, found in self.each(views, self.cfg.decode_rows, answers):
            self.seen += part
            for answer in found:
                view = part[answer.prompt]
                grid = decode_grid(answer.tokens[:-1]) # without END
                grid = undo_augment(grid, view.dihedral, view.cmap)
                c = self.found[view.query].setdefault(grid_bytes(grid), Candidate(grid))
                c.votes += answer.greedy
                c.found.append((view.number, round(answer.log_prob, 4)))
            if self.over(deadline):
                return

    def over(self, deadline):
        """ is it past the deadline, of time.perf_counter, and has each query a candidate? """
        return time.perf_counter() > deadline and all(self.found.values())

    def judge(self):
        """ how probable are the candidates of a query under each of the views so far? a sole one needs no judge """
        best = {}
        for query, found in self.found.items():
            ranked = sorted(found.values(), key=lambda c: (-c.votes, -c.log_prob, grid_bytes(c.grid)))
            best[query] = ranked[: self.cfg.score_most]
        def log_probs(part, args):
            answers = []
            for x in part:
                answers.append([dihedral(x.cmap[c.grid], x.dihedral) for c in best[x.query]])
            return score_answers(self.model, answers=answers, **args)
        asked = [x for x in self.seen if len(best[x.query]) > 1]
        scores = defaultdict(list) # of each query, a list of log-probabilities a view
        for part, found in self.each(asked, max(self.cfg.decode_rows // self.cfg.score_most, 1), log_probs):
            for x, log_probs_of_view in zip(part, found):
                scores[x.query].append(log_probs_of_view)
        for query, by_view in scores.items():
            for c, x in zip(best[query], np.mean(by_view, 0)):
                c.score = round(float(x), 4)

# -----------------------------------------------------------------------------
# test-time training

def fine_tune(model, lr, corpora, data_cfg, rows, cfg, device):
    """
    test-time training (Akyürek et al., arxiv 2411.07279): a copy of the model after cfg.ttt_steps on the demos of
    these tasks, each demo the target under all augments and, in context, the others before it. no answer is looked at,
    there is none. at shots=0 a task that the model does not know begins with the mean of all embeddings.
    -> (model, {task key: row})
    """
    data_cfg = replace(data_cfg, data='', adapt='', val_tasks=0, max_pair=0, batching='bucket',
                       batch_tokens=cfg.ttt_tokens)
    sources = [(c, 1) for c in corpora]
    tuned = copy.deepcopy(model)
    new_rows = Sampler(sources, data_cfg).rows # as the dataset below numbers them too
    if model.n_task > 0:
        known = model.wtask.weight.detach()
        weight = known.mean(0).repeat(len(new_rows), 1)
        for key, row in new_rows.items():
            if key in rows:
                weight[row] = known[rows[key]]
        tuned.wtask = torch.nn.Embedding.from_pretrained(weight, freeze=False)
    try:
        loader = ArcLoader(ArcDataset(data_cfg, cfg.seed, sources=([], sources)), device=device)
    except ValueError: # nothing to train on: no demo fits, or in context there is but one
        return tuned.eval(), new_rows
    optimizers = tuned.optimizers(lr, lr, 0.0, TrainConfig.ns_steps)
    schedule = TrainConfig(warmup_iters=1, decay_frac=1.0)
    tuned.train()
    for step in range(cfg.ttt_steps):
        n = loader.loss_tokens()
        _, loss = tuned(*loader.next_batch())
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr * get_lr(step, cfg.ttt_steps, schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tuned.eval(), new_rows

def choose_tasks(corpora, group):
    """ list of Corpus, numbers of tasks that count through all of them -> list of Corpus with these tasks alone """
    keep = np.zeros(sum(len(c) for c in corpora), bool)
    keep[group] = True
    chosen, first = [], 0
    for c in corpora:
        mine = keep[first : first + len(c)]
        first += len(c)
        if mine.any():
            chosen.append(c.select(mine))
    return chosen

# -----------------------------------------------------------------------------

def solve(cfg):
    """ solve a source -> path of submission.json. raises ValueError for what a user can mend """
    cfg.check()
    device, _, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    if device.type == 'cpu': # MKL: oneDNN compiles a product anew for each shape, and here no two steps have the same
        torch.set_float32_matmul_precision('highest')
    corpora, tasks = read_fitting(cfg.data, cfg.max_pair, opened=False)
    parts = [read_candidates(path, tasks) for path in cfg.merge] # {(task, query) by number: list of Candidates} each
    leaks = []
    if cfg.run:
        found, leaks = solve_with(cfg, corpora, tasks, device, autocast, rank, world)
        parts.append(found)
    out_dir = Path(cfg.out_dir or cfg.run)
    if rank > 0: # the first one writes
        return out_dir / 'submission.json'
    for path in cfg.merge: # the others may have seen more than they were asked
        about = Path(path).with_name('solve.json')
        if about.is_file():
            leaks = sorted({*leaks, *read_json(about)['leaks']})
    ranked = {}
    for query in {query for part in parts for query in part}:
        ranked[query] = rank_candidates([part.get(query, []) for part in parts], cfg.select)
    write_results(out_dir, tasks, ranked)
    about = {'run': cfg.run, 'data': cfg.data, 'merge': cfg.merge, 'views': cfg.views, 'select': cfg.select,
             'ttt_steps': cfg.ttt_steps, 'seed': cfg.seed, 'leaks': leaks}
    checkpoint.write_file(out_dir / 'solve.json', json.dumps(about, indent=1).encode())
    return out_dir / 'submission.json'

def solve_with(cfg, corpora, tasks, device, autocast, rank, world):
    """
    a run's model on the queries of tasks -> ({(task, query) by number: list of Candidates}, queries it was trained on).
    the candidates of all ranks are on rank 0
    """
    model, data_cfg, meta = load_run(cfg.run, device, cfg.base)
    if not isinstance(data_cfg, DataConfig):
        raise ValueError(f"{cfg.run}: a run of text, want one of tasks: nanoarc train --init_from {cfg.run} begins one "
                         "with its blocks")
    leaks = find_leaks(cfg.run, corpora)
    if leaks and not (cfg.allow_leak or meta['leaks']):
        raise ValueError(f"{cfg.run} was trained on {len(leaks)} of these queries, answers included: "
                         f"{a_few(leaks, 3)}. train with --adapt in place of --data, or --allow_leak solves them "
                         "and says so in the score")
    sampler = Sampler([(c, 1) for c in corpora], data_cfg, meta['rows'])
    if model.n_task > 0 and cfg.ttt_steps == 0:
        refuse_unknown(cfg, tasks, sampler.tables.row)
    # tasks of like size together. a group is solved the same way on any number of ranks
    t = sampler.tables
    size = np.maximum.reduceat(t.need.max(0), t.first[:-1])
    order = np.argsort(size, kind='stable').tolist()
    groups = [sorted(order[j : j + cfg.together]) for j in range(0, len(order), cfg.together)][rank::world]
    n_queries = sum(len(task.queries) for task in tasks)
    found, start = {}, time.perf_counter()
    for j, group in enumerate(track(groups, f"{n_queries} queries, {cfg.views} views each", disable=rank > 0)):
        deadline = float('inf')
        if cfg.minutes > 0:
            deadline = start + 60 * cfg.minutes * (j + 1) / len(groups)
        net, mine = model, sampler
        if cfg.ttt_steps > 0:
            lr = cfg.ttt_lr or model.peak_rates(meta['train']['lr'], 0)[0] / 5
            net, rows = fine_tune(model, lr, choose_tasks(corpora, group), data_cfg, meta['rows'], cfg, device)
            mine = Sampler([(c, 1) for c in corpora], data_cfg, rows)
        queries = {}
        for k in group:
            for i in range(len(tasks[k].queries)):
                queries[k, i] = int(t.first[k] + t.n_demos[k] + i)
        solver = Solver(cfg, net, autocast, mine, queries)
        # on a gpu a step of all views that go together takes hardly longer than one of few
        first = max(cfg.decode_rows // len(queries), 1) if device.type == 'cuda' else 1
        for a, b in view_rounds(cfg.views, cfg.minutes, first):
            if not solver.over(deadline):
                solver.propose([x for x in solver.views if a <= x.number < b], deadline)
        if cfg.select == 'product':
            solver.judge()
        for query, candidates in solver.found.items():
            found[query] = list(candidates.values())
    warn_alone(tasks, sampler, rank)
    if world > 1:
        every = [None] * world
        dist.gather_object(found, every if rank == 0 else None)
        if rank == 0:
            for part in every:
                found.update(part)
    return found, leaks

def refuse_unknown(cfg, tasks, row):
    """ raises ValueError if some tasks have no row in the task embedding """
    unknown = [task.name for task, x in zip(tasks, row) if x < 0]
    if unknown:
        some = a_few(unknown, 5, ", ")
        raise ValueError(f"{len(unknown)} of {len(tasks)} tasks have no embedding row in {cfg.run}: {some}. "
                         f"--ttt_steps gives them one, or train on their demos with --adapt {cfg.data}, "
                         "or in context with --shots=-1")

def warn_alone(tasks, sampler, rank):
    """ in context: names the queries before which no demo fits """
    if sampler.cfg.shots == 0 or rank > 0:
        return
    t, names = sampler.tables, []
    near = has_context(t, t.need.max(0), sampler.cfg.block_size)
    for pair in np.flatnonzero(~sampler.is_demo & ~near):
        k = t.pair_task[pair]
        names.append(f"{tasks[k].name} query {pair - t.first[k] - t.n_demos[k]}")
    if names:
        print(f"warning: no demo fits block_size={sampler.cfg.block_size} before {len(names)} queries: "
              f"{', '.join(names[:5])}")
