"""
a trained model and a source -> submission.json, candidates.jsonl, solve.json.

each query is decoded under several views (augments of it). the answers are turned back: candidates. a good one is the
answer of many views, and probable under all of them. the true answers are never read here.

SIGTERM and ctrl-c finish the batch and write the submission of what is known so far. however it ended, the same command
goes on from there (submission.Keeper).
"""
import contextlib
import copy
import json
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from nanoarc import checkpoint
from nanoarc.corpus import a_few, find_leaks
from nanoarc.data import DEMOS, ArcDataset, ArcLoader, DataConfig, Sampler, has_context, hash64, one_a_row
from nanoarc.decode import decode, score_answers
from nanoarc.grids import IN, PAD, decode_grid, dihedral, grid_bytes, undo_augment
from nanoarc.run import Signals, get_device, get_ranks, is_first_rank, load_run
from nanoarc.settings import MAX_SEED, check_numbers
from nanoarc.submission import (Candidate, Keeper, Known, hold, keep_answers, rank_candidates, read_candidates,
                                read_fitting, read_leaks, write_results)
from nanoarc.train import TrainConfig, get_lr

MOST_VIEWS = 2**16 # of a query

@dataclass
class SolveConfig:
    run: str = '' # out_dir of a training run
    data: str = 'arc1/evaluation' # sources whose queries are to be answered, their answers stay closed
    out_dir: str = '' # where submission.json and candidates.jsonl go, '' = into the run
    base: str = '' # where the pretrained model of a fine-tuning lies, if not where it was
    # candidates.jsonl of other runs: their candidates and, if there is one, those of this run, together
    merge: tuple[str, ...] = ()
    views: int = 16 # augments of each query that are decoded. view 0 is the query as it is
    # no batch begins after so long, but each query's first view. shared evenly over the tasks, summed over starts of
    # the same solve. 0 = every view
    minutes: float = 0.0
    # besides the greedy answer of a view every other one that is at least so probable there. 1 = none
    p_min: float = 0.03
    # so many candidates of a query at most are judged under all views, those with the most votes
    score_most: int = 8
    # test-time training: so many steps on the demos of the tasks that are solved together, in a copy of the model
    ttt_steps: int = 0
    ttt_lr: float = 0.0 # its peak of Muon and AdamW, falling to 0. 0 = a fifth of the run's
    ttt_tokens: int = 1024 # tokens of a step of it
    together: int = 8 # tasks in a group, which is solved together and, with ttt_steps, trained on together
    # solve only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    max_pair: int = 0
    decode_rows: int = 128 # views decoded together, answers judged together
    # solve queries that the run was trained on, with their answers, and say so in the score
    allow_leak: bool = False
    seed: int = 1337 # of the views and test-time training
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in train, but 'auto' is float32 on every cpu

    def check(self):
        """ raises ValueError that names the setting """
        check_numbers(self, dict(views=1, decode_rows=1, together=1, score_most=1, ttt_tokens=1),
                      dict(p_min=1, seed=MAX_SEED, views=MOST_VIEWS))
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
        """ prompts of one kind are equally long, also in a language model's tokens: a few more for each pair """
        return len(self.idx), int((self.idx == IN).sum())

def make_views(sampler, pair, n, seed, query):
    """
    pair number of a query -> list of n Views at most, equal ones once. view 0 is the query as it is, views 1 to 8 are
    its eight symmetries, in its own colors, which many rules are about. in all others colors are permuted.
    """
    assert not sampler.known[pair], "answers are to be closed here"
    k = np.arange(n)
    order = hash64(seed, DEMOS, pair, k)
    docs = sampler.plan(np.full(n, pair), visit=np.maximum(k - 1, 0), order=order, as_is=k == 0, seed=seed)
    docs.cmap[:9] = np.arange(10)
    batch = sampler.write(one_a_row(docs), 0, n, int(docs.length.max()))
    row = int(sampler.tables.row[sampler.tables.pair_task[pair]])
    views, known = [], set()
    for i in range(n):
        T = docs.length[i]
        idx, pos = batch.idx[i, :T].numpy(), batch.pos[i, :T].numpy()
        d = int(docs.dihedral[i])
        look = d, idx.tobytes()
        if look not in known:
            known.add(look)
            views.append(View(query, i, d, docs.cmap[i], row, idx, pos))
    return views

def view_rounds(views, minutes, first):
    """
    which views to decode in each round -> list of (first, first of the next round): all in one if there is time for
    all, otherwise twice as many each round, so that time may run out after any
    """
    edges = [0]
    if minutes > 0:
        while first < views:
            edges.append(first)
            first *= 2
    edges.append(views)
    return list(zip(edges, edges[1:]))

class Solver:
    """ a group of tasks, solved together: their views, these through the model, the candidates that come out """

    def __init__(self, cfg, model, autocast, sampler, queries, keeper=None):
        """ queries: {(task, query) by number: pair of the sampler}. keeper: what is known of them, None = nothing """
        self.cfg, self.model, self.autocast = cfg, model, autocast
        self.pause = keeper.pause if keeper else lambda: False # called between batches: is it to stop?
        self.deadline = float('inf') # see over
        self.views = []
        self.seen = [] # views that were decoded
        self.candidates = {} # {query: {bytes of a grid: Candidate}}
        for query, pair in queries.items():
            known = keeper.known[query] if keeper else Known()
            views = make_views(sampler, pair, cfg.views, cfg.seed, query)
            self.views += views
            self.seen += [x for x in views if x.number in known.seen]
            self.candidates[query] = {grid_bytes(c.grid): c for c in known.candidates}

    def each(self, views, size, f):
        """
        f(views, arguments of decode by name) of batches of at most `size` views of like lengths -> generator of (views,
        what f made of them), which may end early. what the device has no memory for is tried again in halves.
        """
        views = sorted(views, key=View.kind)
        while views and not self.pause() and not self.over():
            part = views[:size]
            if not self.model.pads: # it cannot tell filler: one kind at a time
                part = [x for x in part if x.kind() == views[0].kind()]
            result = None
            try:
                with self.autocast():
                    result = f(part, self.arguments(part))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            if result is None: # not in the except clause: there the traceback would still hold the tensors
                torch.cuda.empty_cache()
                size = len(part) // 2
            else:
                yield part, result
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

    def propose(self, views):
        """ decode views, their answers become candidates """
        def decoded(part, args):
            return decode(self.model, **args, p_min=self.cfg.p_min)
        earlier = {(x.query, x.number) for x in self.seen} # what is left are the batches that an earlier start had left
        views = [x for x in views if (x.query, x.number) not in earlier]
        for part, answers in self.each(views, self.cfg.decode_rows, decoded):
            self.seen += part
            for answer in answers:
                view = part[answer.prompt]
                grid = decode_grid(answer.tokens[:-1]) # without END
                grid = undo_augment(grid, view.dihedral, view.cmap)
                c = self.candidates[view.query].setdefault(grid_bytes(grid), Candidate(grid))
                c.votes += answer.greedy
                c.found.append((view.number, round(answer.log_prob, 4)))

    def over(self):
        """ is it past the deadline, of time.perf_counter, and has each query a candidate? then no batch is begun """
        return time.perf_counter() > self.deadline and all(self.candidates.values())

    def judge(self, rounds=((0, MOST_VIEWS),)):
        """ how probable are the candidates of a query under each of the views so far? a sole one needs no judge """
        best = {}
        for query, candidates in self.candidates.items():
            ranked = sorted(candidates.values(), key=lambda c: (-c.votes, -c.log_prob, grid_bytes(c.grid)))
            best[query] = ranked[: self.cfg.score_most]
        def log_probs(part, args):
            answers = []
            for x in part:
                answers.append([dihedral(x.cmap[c.grid], x.dihedral) for c in best[x.query]])
            return score_answers(self.model, answers=answers, **args)
        scores = defaultdict(list) # of each query, a list of log-probabilities a view
        for a, b in rounds:
            asked = [x for x in self.seen if a <= x.number < b and len(best[x.query]) > 1]
            for part, by_view in self.each(asked, max(self.cfg.decode_rows // self.cfg.score_most, 1), log_probs):
                for x, log_probs_of_view in zip(part, by_view):
                    scores[x.query].append(log_probs_of_view)
        if self.pause(): # the same command goes on
            return
        for query, by_view in scores.items():
            for c, x in zip(best[query], np.mean(by_view, 0)):
                c.score = round(float(x), 4)

    def known(self, done):
        """ {query: Known} """
        seen = defaultdict(list)
        for x in self.seen:
            seen[x.query].append(x.number)
        known = {}
        for query, candidates in self.candidates.items():
            known[query] = Known(done, seen[query], list(candidates.values()))
        return known

# -----------------------------------------------------------------------------
# test-time training

def fine_tune(model, lr, corpora, data_cfg, rows, cfg, device, pause=lambda: False):
    """
    test-time training (Akyürek et al., arxiv 2411.07279): a copy of the model after cfg.ttt_steps on the demos of
    these tasks. each demo is the target, under augments, with the others before it if in context; no answer is looked
    at. pause() before each step: is it to stop? -> (model, {task key: row}). raises ValueError if weights are not
    finite
    """
    data_cfg = replace(data_cfg, data='', adapt='', val_tasks=0, max_pair=0, batching='bucket',
                       batch_tokens=cfg.ttt_tokens)
    new_rows = Sampler(corpora, data_cfg).rows # as the dataset below numbers them too
    tuned = copy.deepcopy(model)
    if model.n_task > 0: # a task that it does not know begins with the mean of all
        known = model.wtask.weight.detach()
        weight = known.mean(0).repeat(len(new_rows), 1)
        for key, row in new_rows.items():
            if key in rows:
                weight[row] = known[rows[key]]
        tuned.wtask = torch.nn.Embedding.from_pretrained(weight, freeze=False)
    try:
        loader = ArcLoader(ArcDataset(data_cfg, cfg.seed, sources=([], [(c, 1) for c in corpora])), device=device)
    except ValueError: # nothing to train on: no demo fits, or in context there is but one
        return tuned.eval(), new_rows
    optimizers = tuned.optimizers(lr, lr, 0.0, TrainConfig.ns_steps)
    schedule = TrainConfig(warmup_iters=1, decay_frac=1.0)
    tuned.train()
    torch.manual_seed(cfg.seed) # of what is dropped
    for step in range(cfg.ttt_steps):
        if pause():
            break
        n = loader.loss_tokens()
        _, loss = tuned(*loader.next_batch())
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr * get_lr(step, cfg.ttt_steps, schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    if not all(p.isfinite().all() for p in tuned.parameters()):
        names = [name.decode() for c in corpora for name in c.name]
        raise ValueError(f"ttt_lr={lr:g}: after test-time training on {a_few(names, 3, ', ')} the weights are not "
                         "finite, want a lower one")
    return tuned.eval(), new_rows

def choose_tasks(corpora, group):
    """ list of Corpus, numbers of tasks that count through all of them -> list of Corpus with these tasks alone """
    chosen, first = [], 0
    for c in corpora:
        mine = np.isin(np.arange(first, first + len(c)), group)
        first += len(c)
        if mine.any():
            chosen.append(c.select(mine))
    return chosen

# -----------------------------------------------------------------------------

class Job:
    """ the model of a run and the tasks whose queries it is asked, a group of them after another """

    def __init__(self, cfg, corpora, tasks, device, autocast):
        """ raises ValueError if the run is not to be asked these """
        self.cfg, self.corpora, self.tasks, self.device, self.autocast = cfg, corpora, tasks, device, autocast
        self.model, self.data_cfg, self.meta = load_run(cfg.run, device, cfg.base)
        if not isinstance(self.data_cfg, DataConfig):
            raise ValueError(f"{cfg.run}: a run of text, want one of tasks: nanoarc train --init_from {cfg.run} begins "
                             "one with its blocks")
        self.leaks = find_leaks(cfg.run, corpora)
        if self.leaks and not (cfg.allow_leak or self.meta['leaks']):
            raise ValueError(f"{cfg.run} was trained on {len(self.leaks)} of these queries, answers included: "
                             f"{a_few(self.leaks, 3)}. train with --adapt in place of --data, or --allow_leak solves "
                             "them and says so in the score. Kaggle's visible test file is made of training tasks and "
                             "wants --allow_leak too")
        self.sampler = self.make_sampler(self.meta['rows'])
        if self.model.n_task > 0 and cfg.ttt_steps == 0:
            refuse_unknown(cfg, tasks, self.sampler.tables.row)

    def make_sampler(self, rows):
        return Sampler(self.corpora, self.data_cfg, rows)

    def settings(self, dtype):
        """ all that decides what comes out, by name """
        settings = asdict(self.cfg)
        for name in ('run', 'data', 'out_dir', 'base', 'merge', 'decode_rows', 'allow_leak', 'device'):
            del settings[name]
        sha256 = checkpoint.file(self.cfg.run, self.meta['step'], 'sha256').read_text('utf-8')
        corpus = " ".join(c.sha256[:12] for c in self.corpora)
        return {**settings, 'dtype': dtype, 'checkpoint': sha256[:12], 'corpus': corpus}

    def groups(self):
        """ tasks of like size together, list of lists of numbers. a group is solved the same way on any rank """
        t, n = self.sampler.tables, self.cfg.together
        size = np.maximum.reduceat(t.need.max(0), t.first[:-1])
        order = np.argsort(size, kind='stable').tolist()
        return [sorted(order[j : j + n]) for j in range(0, len(order), n)]

    def queries(self, group):
        """ numbers of tasks -> {(task, query) by number: pair of the sampler} """
        t, pairs = self.sampler.tables, {}
        for k in group:
            for i in range(len(self.tasks[k].queries)):
                pairs[k, i] = int(t.first[k] + t.n_demos[k] + i)
        return pairs

    def solve(self, keeper, rank, world):
        """ the groups of this rank of which not all is known """
        cfg, left = self.cfg, set(keeper.left())
        todo = [group for group in self.groups() if left & self.queries(group).keys()][rank::world]
        about = f"{len(left)} queries, {cfg.views} views each"
        n_solved = len(keeper.known) - len(left)
        if rank == 0 and n_solved > 0:
            print(f"goes on, {n_solved} queries are solved already")
        start, seconds = time.perf_counter(), 60 * cfg.minutes - keeper.spent
        for j, group in enumerate(track(todo, about, disable=rank > 0)):
            deadline = start + seconds * (j + 1) / len(todo) if cfg.minutes > 0 else float('inf')
            self.solve_group(group, keeper, deadline)
            if keeper.pause():
                break

    def solve_group(self, group, keeper, deadline):
        """ test-time training if there is any, then views in rounds. what comes out is in the keeper """
        cfg, model, sampler = self.cfg, self.model, self.sampler
        if cfg.ttt_steps > 0:
            lr = cfg.ttt_lr or model.peak_rates(self.meta['train']['lr'], 0)[0] / 5
            corpora = choose_tasks(self.corpora, group)
            known = self.meta['rows']
            model, rows = fine_tune(model, lr, corpora, self.data_cfg, known, cfg, self.device, keeper.pause)
            sampler = self.make_sampler(rows)
        queries = self.queries(group)
        keeper.solver = solver = Solver(cfg, model, self.autocast, sampler, queries, keeper)
        # on a gpu a step of all views that go together takes hardly longer than one of few
        first = max(cfg.decode_rows // len(queries), 1) if self.device.type == 'cuda' else 1
        rounds = view_rounds(cfg.views, cfg.minutes, first)
        now = time.perf_counter()
        solver.deadline = now + 0.7 * (deadline - now) # the rest is the judge's
        for a, b in rounds:
            solver.propose([x for x in solver.views if a <= x.number < b])
        solver.deadline = deadline
        solver.judge(rounds)
        keeper.close()

def solve(cfg):
    """
    solve a source -> path of submission.json. raises ValueError for what a user can mend, and SystemExit after a
    signal: 0 for SIGTERM, 130 for SIGINT.
    """
    cfg.check()
    out_dir = Path(cfg.out_dir or cfg.run)
    if cfg.run:
        checkpoint.some_steps(cfg.run) # raises before a directory is made of it
    with Signals() as signals, hold(out_dir) if is_first_rank() else contextlib.nullcontext():
        solve_into(out_dir, cfg, signals)
    if signals.got == signal.SIGINT: # all is written, but who called is not to go on
        sys.exit(130)
    return out_dir / 'submission.json'

def solve_into(out_dir, cfg, signals):
    """ solve, with out_dir to ourselves. all ranks come by here """
    device, dtype, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    if device.type == 'cpu': # 'highest' is MKL. oneDNN compiles each shape of a product, and here none comes twice
        torch.set_float32_matmul_precision('highest')
    corpora, tasks = read_fitting(cfg.data, cfg.max_pair, opened=False)
    keep_answers(out_dir, tasks)
    parts = [read_candidates(path, tasks) for path in cfg.merge] # of each run {(task, query): list of Candidates}
    leaks = set() # queries that were trained on, also by the runs that are merged
    for path in cfg.merge:
        leaks.update(read_leaks(path))
    if cfg.run:
        job = Job(cfg, corpora, tasks, device, autocast)
        keeper = Keeper(out_dir, job.queries(range(len(tasks))), job.settings(dtype), signals, rank, world)
        job.solve(keeper, rank, world)
        if rank == 0:
            warn_without_context(tasks, job.sampler)
        keeper.save()
        keeper.share()
        leaks.update(job.leaks)
        parts.append({query: x.candidates for query, x in keeper.known.items() if x.candidates})
    if rank == 0 and any(parts): # of a solve that was stopped at its beginning there is nothing to write
        ranked = {}
        for query in set().union(*parts):
            ranked[query] = rank_candidates([part.get(query, []) for part in parts])
        about = {'run': cfg.run, 'data': cfg.data, 'merge': cfg.merge, 'views': cfg.views,
                 'ttt_steps': cfg.ttt_steps, 'seed': cfg.seed, 'leaks': sorted(leaks)}
        checkpoint.write_file(out_dir / 'solve.json', json.dumps(about, indent=1).encode()) # first: it tells of leaks
        write_results(out_dir, tasks, ranked)
    if cfg.run:
        keeper.end(rank == 0)

def refuse_unknown(cfg, tasks, row):
    """ raises ValueError if some tasks have no row in the task embedding """
    unknown = [task.name for task, x in zip(tasks, row) if x < 0]
    if unknown:
        some = a_few(unknown, 5, ", ")
        raise ValueError(f"{len(unknown)} of {len(tasks)} tasks have no embedding row in {cfg.run}: {some}. "
                         f"--ttt_steps gives them one, or train on their demos with --adapt {cfg.data}, "
                         "or in context with --shots=-1")

def warn_without_context(tasks, sampler):
    """ in context: names the queries before which no demo fits """
    if sampler.cfg.shots == 0:
        return
    t, names = sampler.tables, []
    near = has_context(t, t.n_shown, t.need.max(0), sampler.cfg.block_size)
    for pair in np.flatnonzero(~sampler.is_demo & ~near):
        k = t.pair_task[pair]
        names.append(f"{tasks[k].name} query {pair - t.first[k] - t.n_demos[k]}")
    if names:
        print(f"warning: no demo fits block_size={sampler.cfg.block_size} before {len(names)} queries: "
              f"{', '.join(names[:5])}")
