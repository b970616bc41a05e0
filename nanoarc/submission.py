"""
candidates, ranked; submission.json in Kaggle's shape and candidates.jsonl, written and read; the score of any
submission. answers are opened by the score alone.
"""
import contextlib
import hashlib
import io
import json
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch.distributed as dist
import tyro

from nanoarc import checkpoint
from nanoarc.corpus import a_few, read_json
from nanoarc.data import small_tasks
from nanoarc.grids import grid_bytes, show, to_grid
from nanoarc.run import exit_after
from nanoarc.settings import check_numbers, differences
from nanoarc.sources import known_faults, read_sources

ATTEMPTS = 'attempt_1', 'attempt_2'

@dataclass
class ScoreConfig:
    submission: Annotated[str, tyro.conf.Positional] # a submission.json
    data: Annotated[str, tyro.conf.Positional] # the source that it answers
    # score only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    max_pair: int = 0
    out: str = '' # a .csv or .parquet with a row a query. it marks tasks that are known to be faulty

def read_fitting(data, max_pair, opened):
    """
    sources -> (list of Corpus, list of Task), without tasks that have a demo of over max_pair tokens, 0 = all. raises
    ValueError
    """
    corpora, tasks = [], {}
    for c, _ in read_sources(data, opened):
        c = c.select(small_tasks(c, max_pair))
        c, _ = c.leave_out(c.is_extra()) # of a packed corpus: no prompt has these
        if len(c) > 0:
            corpora.append(c)
        for k in range(len(c)):
            task = c.task(k)
            if task.name in tasks:
                raise ValueError(f"two tasks of {data} are named {task.name}, a submission can hold one")
            tasks[task.name] = task
    if len(tasks) == 0:
        raise ValueError(f"no task in {data!r} with max_pair={max_pair}")
    return corpora, list(tasks.values())

# -----------------------------------------------------------------------------
# candidates

@dataclass
class Candidate:
    """ a proposed output of a query """
    grid: np.ndarray # (H, W) uint8
    votes: int = 0 # views that answer it greedily
    found: list = field(default_factory=list) # (view, log-probability there) of each view that answers it
    score: float | None = None # mean log-probability under all views, None = not asked for

    @property
    def log_prob(self):
        """ mean over the views that answer it. rounded, so that machines agree """
        total = sum(x for _, x in self.found)
        return round(total / max(len(self.found), 1), 4)

def merge(same):
    """ Candidates of several runs with the same grid -> one. its score is the mean of those that have one """
    found, scores = [], []
    for c in same:
        found += c.found
        if c.score is not None:
            scores.append(c.score)
    score = sum(scores) / len(scores) if scores else None
    return Candidate(same[0].grid, sum(c.votes for c in same), found, score)

def beliefs(candidates):
    """
    Candidates of one run for a query -> the share of each, 1 in all: of the probability under all views (a product of
    experts), where one without a score has none; if all have none, of the votes
    """
    scores = [c.score for c in candidates if c.score is not None]
    if scores:
        top = max(scores)
        weights = [0.0 if c.score is None else math.exp(c.score - top) for c in candidates]
    else:
        weights = [c.votes for c in candidates]
    total = sum(weights) or 1
    return [x / total for x in weights]

def rank_candidates(parts):
    """
    candidates of a query, by run: list of lists of Candidate -> list of (Candidate, belief), the best first. beliefs
    add up over the runs. where they are equal the log-probability decides, then the bytes of the grid.
    """
    same, belief = defaultdict(list), defaultdict(float) # by the bytes of a grid
    for part in parts:
        for c, x in zip(part, beliefs(part)):
            same[grid_bytes(c.grid)].append(c)
            belief[grid_bytes(c.grid)] += x
    merged = {key: merge(candidates) for key, candidates in same.items()}
    def order(key):
        c = merged[key]
        score = -1e9 if c.score is None else c.score # behind all that have one
        return -round(belief[key], 6), -score, -c.log_prob, key
    return [(merged[key], belief[key]) for key in sorted(merged, key=order)]

# -----------------------------------------------------------------------------
# files

def input_hash(task, i):
    """ of query i of a Task. in candidates.jsonl, so that they are not merged for another task of that name """
    return hashlib.sha256(grid_bytes(task.queries[i][0])).hexdigest()[:12]

def write_results(out_dir, tasks, ranked):
    """
    ranked: {(task number, query number): rank_candidates(...)} -> submission.json, {id: [{"attempt_1": rows,
    "attempt_2": rows}, ...]} with every query of every task in order, and candidates.jsonl, a candidate a line.
    """
    submission, lines = {}, []
    for k, task in enumerate(tasks):
        entries = []
        for i in range(len(task.queries)): # each has an entry: a missing one must not shift the rest
            best = ranked.get((k, i), [])
            grids = [c.grid.tolist() for c, _ in best[:2]] or [[[0]]]
            entries.append({'attempt_1': grids[0], 'attempt_2': grids[-1]}) # a copy only if there is no other
            for c, belief in best:
                line = {'task': task.name, 'query': i, 'input': input_hash(task, i), 'belief': round(belief, 6),
                        'votes': c.votes, 'log_prob': c.log_prob, 'score': c.score,
                        'views': sorted(view for view, _ in c.found), 'grid': c.grid.tolist()}
                lines.append(json.dumps(line) + "\n")
        submission[task.name] = entries
    checkpoint.write_file(Path(out_dir) / 'candidates.jsonl', "".join(lines).encode())
    checkpoint.write_file(Path(out_dir) / 'submission.json', json.dumps(submission).encode())

def keep_answers(out_dir, tasks):
    """ raises ValueError if a submission.json lies there with answers that a new one for these tasks would not have """
    path = Path(out_dir) / 'submission.json'
    try:
        there = read_submission(path).keys()
    except ValueError: # there is none
        return
    lost = [show(name) for name in sorted(there - {task.name for task in tasks})]
    if lost:
        raise ValueError(f"{path} has answers to tasks that are not asked now, {a_few(lost, 3, ', ')}: choose another "
                         "--out_dir")

def read_candidates(path, tasks):
    """
    a candidates.jsonl -> {(task, query) by number: list of Candidates}. raises ValueError that names file, line and
    field, or says that no task in it is asked for
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, want a candidates.jsonl of nanoarc solve")
    number = {task.name: k for k, task in enumerate(tasks)}
    found = defaultdict(list)
    for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        where = f"{path}: line {n}"
        try:
            x = json.loads(line)
            i, votes, log_prob, score, views = x['query'], x['votes'], x['log_prob'], x['score'], x['views']
            name = x['task']
            k = number.get(name)
        except KeyError as e:
            raise ValueError(f"{where}: no field {e}") from None
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{where}: not a candidate") from None
        if k is None: # of a larger source
            continue
        if type(i) is not int or not 0 <= i < len(tasks[k].queries):
            raise ValueError(f"{where}: task {name} has no query {show(i)}")
        where = f"{where}: task {name}, query {i}"
        mine = input_hash(tasks[k], i)
        if x.get('input', mine) != mine: # none in files of an older version
            raise ValueError(f"{where}: of another task with that name, its input is not the one that is asked")
        numbers = votes, log_prob, 0 if score is None else score
        are_numbers = all(type(value) in (int, float) and abs(value) < 2**53 for value in numbers) # nan is not
        are_views = type(views) is list and all(type(view) is int for view in views)
        if not (are_numbers and are_views):
            raise ValueError(f"{where}: want numbers for votes, log_prob and score, a list of views")
        grid = to_grid(x.get('grid'), f"{where}, grid")
        found[k, i].append(Candidate(grid, votes, [(view, log_prob) for view in views], score))
    if not found:
        raise ValueError(f"{path}: no candidate for any of these {len(tasks)} tasks")
    return found

# -----------------------------------------------------------------------------
# what is known stays known, however a solve ends

class Known(NamedTuple):
    """ what is known of a query """
    done: bool = False # all that is asked for
    seen: list = [] # numbers of the views that were decoded
    candidates: list = []

class Keeper:
    """
    what is known of each query, also on disk until all is: out_dir/solving-RANK.json. each rank keeps there what all
    knew when it began, so any number of ranks may go on
    """
    SHARE = 0.005 # the share of the time that saving may take

    def __init__(self, out_dir, queries, settings, signals, rank, world):
        """ reads what there is, begins to keep. raises ValueError if that is of another solve """
        self.out_dir, self.path = out_dir, out_dir / f"solving-{rank}.json"
        self.settings, self.signals, self.world = settings, signals, world
        self.known = {query: Known() for query in queries} # {(task, query) by number: Known}
        self.spent = 0.0 # seconds, by earlier starts
        self.solver = None # the Solver that is under way
        self.stop = 0 # the signal that ended it, on any rank
        for path in self.files():
            self.learn(*read_known(path, settings))
        self.share() # nobody writes before all have read
        self.began = time.perf_counter()
        self.save()

    def files(self):
        """ those of all ranks """
        return sorted(self.out_dir.glob('solving-[0-9]*.json'))

    def learn(self, spent, known):
        """ what another rank or an earlier start knew: of each query the one that got further """
        self.spent = max(self.spent, spent)
        for query, x in known.items():
            mine = self.known.get(query)
            if mine and (x.done, len(x.seen)) > (mine.done, len(mine.seen)):
                self.known[query] = x

    def share(self):
        """ all ranks come by here, and know the same then """
        mine = self.signals.got, self.spent, self.known
        every = [mine]
        if self.world > 1:
            every = [None] * self.world
            dist.all_gather_object(every, mine)
        for stop, spent, known in every:
            self.stop = max(self.stop, stop)
            self.learn(spent, known)

    def save(self):
        """ to the disk """
        t = time.perf_counter()
        if self.solver:
            self.known.update(self.solver.known(False))
        queries = []
        for (k, i), x in self.known.items():
            candidates = [[c.grid.tolist(), c.votes, c.found, c.score] for c in x.candidates]
            queries.append([k, i, x.done, x.seen, candidates])
        kept = {'settings': self.settings, 'seconds': self.spent + t - self.began, 'queries': queries}
        checkpoint.write_file(self.path, json.dumps(kept).encode())
        self.due = time.perf_counter() + (time.perf_counter() - t) / self.SHARE

    def pause(self):
        """ between two batches: saves if it is time -> is the solve to stop? """
        if time.perf_counter() > self.due:
            self.save()
        return self.signals.got > 0

    def close(self):
        """ the Solver ends, all that it was asked is known if no signal came """
        self.known.update(self.solver.known(self.signals.got == 0))
        self.solver = None

    def left(self):
        """ queries of which not all is known yet """
        return [query for query, x in self.known.items() if not x.done]

    def end(self, is_first):
        """ the results are written: the files go, or if a signal came before the end, SystemExit says so """
        n, left = len(self.known), len(self.left())
        if left > 0:
            if is_first:
                print(f"stopped by signal {self.stop}, {n - left} of {n} queries are solved: the same command goes on")
            exit_after(self.stop)
        if is_first:
            for path in self.files():
                path.unlink()

def read_known(path, settings):
    """ a file of a Keeper -> (seconds, {query: Known}). raises ValueError if it is none, or of other settings """
    known = {}
    try:
        kept = json.loads(path.read_bytes())
        seconds = float(kept['seconds'])
        wrong = differences(kept['settings'], settings, 'kept')
        for k, i, done, seen, rows in kept['queries']:
            candidates = [Candidate(to_grid(grid, path), votes, found, score) for grid, votes, found, score in rows]
            known[k, i] = Known(bool(done), [int(number) for number in seen], candidates)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: not what nanoarc solve keeps while it solves, remove it to begin anew") from None
    if wrong:
        raise ValueError(f"{path} is of a solve that has not ended, and {'; '.join(wrong)}. with the same settings it "
                         f"goes on, rm {path.parent}/solving-*.json lets it begin anew")
    return seconds, known

@contextlib.contextmanager
def hold(out_dir):
    """ nobody else solves into out_dir meanwhile. raises ValueError if it cannot be written: now, not after hours """
    for name in ('submission.json', 'candidates.jsonl', 'solve.json'):
        if (out_dir / name).is_dir():
            raise ValueError(f"{out_dir / name} is a directory, choose another --out_dir")
    with contextlib.ExitStack() as stack: # so that no error of the solve itself is caught
        try:
            stack.enter_context(checkpoint.lock(out_dir, 'solving.lock'))
            checkpoint.write_file(out_dir / 'solving.tmp', bytes(2**20)) # about what a submission needs
            (out_dir / 'solving.tmp').unlink()
        except OSError as e:
            raise ValueError(f"{out_dir}: cannot write here, {e.strerror}. choose another --out_dir") from None
        yield

# -----------------------------------------------------------------------------
# the score

def read_submission(path):
    """ a submission.json -> {task id: what it has there}. raises ValueError """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: a directory or a pipe, want the file submission.json")
    submission = read_json(path, strict=False) # what others write beside the grids may be floats
    if type(submission) is not dict:
        raise ValueError(f"{path}: want an object of attempts by task id, got {type(submission).__name__}")
    return submission

def as_rows(x):
    """ an attempt as arc-agi-benchmarking writes it, {"answer": rows, ...}, or Kaggle in 2020, "|12|34|" -> rows """
    if type(x) is dict and 'answer' in x:
        return x['answer']
    if type(x) is str and re.fullmatch(r'\|([0-9]+\|)+', x.strip()):
        return [list(map(int, row)) for row in x.strip()[1:-1].split('|')]
    return x

def read_attempts(entries, n, where):
    """
    what a submission has for a task of n queries -> a list by query of {'attempt_1': grid, ...}, the grids alone; and
    what is odd, as (kind, text): 'broken' = no grid, 'short' = not all is there, 'remark' = unknown to Kaggle
    """
    attempts, said = [], []
    wanted = f"{where}: want a list of attempts by query, got"
    if type(entries) is not list:
        said.append(('broken', f"{wanted} {show(entries)} ({type(entries).__name__})"))
        return attempts, said
    if len(entries) != n:
        said.append(('short', f"{where} has {len(entries)} entries, want {n}"))
    for i, x in enumerate(entries):
        at, tried = f"{where}, query {i}", {}
        attempts.append(tried)
        if type(x) is not dict:
            said.append(('broken', f"{wanted} {show(x)} ({type(x).__name__}) at query {i}"))
            continue
        lacks = [f"no {key}" for key in ATTEMPTS if key not in x]
        if lacks:
            said.append(('short', f"{at}: {' and '.join(lacks)}"))
        for key, attempt in x.items():
            if key not in ATTEMPTS:
                said.append(('remark', f"{at}: {show(key)} is ignored"))
                continue
            rows = as_rows(attempt)
            try:
                tried[key] = to_grid(rows, f"{at}, {key}")
            except ValueError as e:
                said.append(('broken', str(e)))
                continue
            if rows is not attempt:
                said.append(('remark', f"{at}, {key}: read from {show(attempt)}"))
    return attempts, said

def score_task(task, attempts):
    """ which attempts are right? -> a dict a query. raises ValueError where an answer is not known """
    rows = []
    for i, (_, answer) in enumerate(task.queries):
        if answer is None:
            raise ValueError(f"{task.source}: task {task.name}, query {i}: no answer to score against")
        tried = attempts[i] if i < len(attempts) else {}
        hits = [key in tried and np.array_equal(tried[key], answer) for key in ATTEMPTS]
        rows.append({'task': task.name, 'query': i, 'attempt_1': hits[0], 'attempt_2': hits[1], 'right': any(hits)})
    return rows

def is_misordered(task, attempts):
    """ would the attempts at one query be right for another one of the task? """
    answers = [grid_bytes(answer) for _, answer in task.queries]
    for tried, answer in zip(attempts, answers):
        grids = set(map(grid_bytes, tried.values()))
        if answer not in grids and grids & set(answers):
            return True
    return False

# what may be odd about a submission: a key of `score` and how it is said
ODD = {'misordered': "tasks have the right answers of their queries in another order",
       'misshapen': 'entries are not [{"attempt_1": rows, "attempt_2": rows}, one a query], what is missing is worth 0',
       'remarks': "things that Kaggle does not know",
       'unanswered': "queries have [[0]] twice, which solve writes where it has no answer",
       'missing': "tasks not in the submission, worth 0",
       'unknown': "tasks not in the source, ignored"}

def score(submission, tasks):
    """
    a parsed submission.json and tasks with answers -> dict. a query counts if either attempt equals its answer, one
    that is missing or malformed does not. `score` is ARC Prize's rule: a task is worth the share of its queries that
    count, and the score is the mean over all tasks, in percent. `kaggle` is its leaderboard's: the share of all
    queries. `solved` is stricter than both: tasks with every query right.
    """
    per_task, per_query, total = {}, [], 0.0
    odd = {key: [] for key in ODD}
    for task in tasks:
        attempts, n = [], len(task.queries)
        if task.name not in submission:
            odd['missing'].append(task.name)
        else:
            attempts, said = read_attempts(submission[task.name], n, task.name)
            for kind, text in said:
                odd['remarks' if kind == 'remark' else 'misshapen'].append(text)
        rows = score_task(task, attempts)
        if is_misordered(task, attempts):
            odd['misordered'].append(task.name)
        for tried, row in zip(attempts, rows):
            grids = [grid.tolist() for grid in tried.values()]
            if grids == [[[0]], [[0]]] and not row['right']:
                odd['unanswered'].append(f"{task.name} {row['query']}")
        n_right = sum(row['right'] for row in rows)
        per_query += rows
        per_task[task.name] = [n_right, n]
        total += 100 * n_right / n
    odd['unknown'] = [ascii(name)[1:-1][:40] for name in submission if name not in per_task]
    right, n = sum(row['right'] for row in per_query), len(per_query)
    return {'score': round(total / len(tasks), 2), 'kaggle': round(100 * right / n, 2),
            'solved': sum(right == n for right, n in per_task.values()), 'tasks': len(tasks), 'right': right,
            'outputs': n, 'per_task': per_task, 'per_query': per_query, **odd}

def verdict(result, leaks):
    """ the dict of `score` and queries that were trained on -> a sentence """
    leaked = f", TRAINED ON {len(leaks)} OF THE ANSWERS" if leaks else ""
    return (f"{result['score']:.2f}% by the official rule of ARC Prize (the mean over tasks), {result['kaggle']:.2f}% "
            f"by Kaggle's (over outputs), {result['solved']} of {result['tasks']} tasks with every output right, "
            f"{result['right']} of {result['outputs']} outputs{leaked}")

def read_leaks(path):
    """ queries that were trained on, as solve.json beside a file has them. [] = it comes from elsewhere """
    about = Path(path).with_name('solve.json')
    found = read_json(about) if about.is_file() else {'leaks': []}
    if type(found) is not dict or type(found.get('leaks')) is not list:
        raise ValueError(f"{about}: not a solve.json of nanoarc, it has no list of leaks")
    return found['leaks']

def score_file(cfg):
    """ print the score of a submission, a json object as the last line -> the dict of `score`. raises ValueError """
    check_numbers(cfg)
    if cfg.out and Path(cfg.out).suffix not in ('.csv', '.parquet'):
        raise ValueError(f"--out {cfg.out}: want a .csv or .parquet")
    submission = read_submission(cfg.submission)
    corpora, tasks = read_fitting(cfg.data, cfg.max_pair, opened=True)
    result, leaks = score(submission, tasks), read_leaks(cfg.submission)
    if any(Path(cfg.submission).parent.glob('solving-[0-9]*.json')):
        print("the solve that writes it has not ended, the same command goes on")
    result['leaks'] = len(leaks)
    per_query, per_task = result.pop('per_query'), result.pop('per_task')
    for key, what in ODD.items():
        found = result.pop(key)
        if found:
            print(f"{len(found)} {what}: {a_few(found, 30)}")
    solved = [name for name, (right, n) in per_task.items() if right == n]
    partly = [f"{name} {right}/{n}" for name, (right, n) in per_task.items() if 0 < right < n]
    print(f"solved: {' '.join(solved) or 'none'}" + (f"; in part: {', '.join(partly)}" if partly else ""))
    print(verdict(result, leaks))
    print(json.dumps(result))
    if cfg.out:
        import polars as pl
        faults, data = {}, io.BytesIO()
        for c in corpora:
            faults.update(known_faults(c))
        frame = pl.DataFrame([{**row, 'fault': faults.get(row['task'], "")} for row in per_query])
        if cfg.out.endswith('.csv'):
            frame.write_csv(data)
        else:
            frame.write_parquet(data)
        checkpoint.write_file(cfg.out, data.getvalue())
    return result
