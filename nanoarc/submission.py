"""
candidates, ranked; submission.json in Kaggle's shape and candidates.jsonl, written and read; the score of any
submission. answers are opened by the score alone.
"""
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from nanoarc import checkpoint
from nanoarc.corpus import a_few, read_json
from nanoarc.data import fits
from nanoarc.grids import grid_bytes, to_grid
from nanoarc.sources import read_sources

ATTEMPTS = 'attempt_1', 'attempt_2'

@dataclass
class ScoreConfig:
    submission: Annotated[str, tyro.conf.Positional] # a submission.json
    data: Annotated[str, tyro.conf.Positional] # the source that it answers
    # score only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    max_pair: int = 0
    out: str = '' # a .csv or .parquet with a row a query

def read_fitting(data, max_pair, opened):
    """
    sources -> (list of Corpus, list of Task) without tasks that have a demo of over max_pair tokens. raises
    ValueError
    """
    corpora, tasks = [], {}
    for c, _ in read_sources(data, opened):
        c = c.select(fits(c, max_pair))
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

def beliefs(candidates, select):
    """
    Candidates of one run for a query -> a number for each, together 1: its share of the votes, or for 'product' of the
    probability under all views (a product of experts), where a candidate that was not asked for has none
    """
    asked = [c.score for c in candidates if c.score is not None]
    if select == 'product' and asked:
        top = max(asked)
        weights = [0.0 if c.score is None else math.exp(c.score - top) for c in candidates]
    else:
        weights = [c.votes for c in candidates]
    total = sum(weights) or 1
    return [x / total for x in weights]

def rank_candidates(parts, select):
    """
    candidates of a query, by run: list of lists of Candidate -> list of (Candidate, belief), the best first. beliefs
    add up over the runs. where they are equal the log-probability decides, then the bytes of the grid.
    """
    same, belief = defaultdict(list), defaultdict(float) # by the bytes of a grid
    for part in parts:
        for c, x in zip(part, beliefs(part, select)):
            same[grid_bytes(c.grid)].append(c)
            belief[grid_bytes(c.grid)] += x
    merged = {key: merge(candidates) for key, candidates in same.items()}
    def order(key):
        c = merged[key]
        asked = select == 'product' and c.score is not None
        score = c.score if asked else -1e9
        return -round(belief[key], 6), -score, -c.log_prob, key
    return [(merged[key], belief[key]) for key in sorted(merged, key=order)]

# -----------------------------------------------------------------------------
# files

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
                line = {'task': task.name, 'query': i, 'belief': round(belief, 6), 'votes': c.votes,
                        'log_prob': c.log_prob, 'score': c.score, 'views': sorted(view for view, _ in c.found),
                        'grid': c.grid.tolist()}
                lines.append(json.dumps(line) + "\n")
        submission[task.name] = entries
    checkpoint.write_file(Path(out_dir) / 'candidates.jsonl', "".join(lines).encode())
    checkpoint.write_file(Path(out_dir) / 'submission.json', json.dumps(submission).encode())

def read_candidates(path, tasks):
    """
    a candidates.jsonl -> {(task, query) by number: list of Candidates}. raises ValueError that names file, line and
    field, or says that no task in it is asked for
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, want a candidates.jsonl of nanoarc solve")
    number = {task.name: k for k, task in enumerate(tasks)}
    found = defaultdict(list)
    for n, line in enumerate(Path(path).read_text('utf-8').splitlines(), 1):
        where = f"{path}: line {n}"
        try:
            x = json.loads(line)
            name, i, votes, log_prob = x['task'], x['query'], x['votes'], x['log_prob']
            score, views = x['score'], x['views']
        except KeyError as e:
            raise ValueError(f"{where}: no field {e}") from None
        except (ValueError, TypeError):
            raise ValueError(f"{where}: not a candidate") from None
        if name not in number: # of a larger source
            continue
        k = number[name]
        if not isinstance(i, int) or not 0 <= i < len(tasks[k].queries):
            raise ValueError(f"{where}: task {name} has no query {i}")
        where = f"{where}: task {name}, query {i}"
        numbers = [votes, log_prob] + ([] if score is None else [score])
        if not set(map(type, numbers)) <= {int, float} or type(views) is not list:
            raise ValueError(f"{where}: want numbers for votes, log_prob and score, a list of views")
        grid = to_grid(x.get('grid'), f"{where}, grid")
        found[k, i].append(Candidate(grid, votes, [(view, log_prob) for view in views], score))
    if not found:
        raise ValueError(f"{path}: no candidate for any of these {len(tasks)} tasks")
    return found

# -----------------------------------------------------------------------------
# the score

def attempts_of(task, submission):
    """ its entries, one a query: dicts {'attempt_1': rows, ...} as json has them, {} for what is none """
    entries = submission.get(task.name)
    if type(entries) is not list:
        return []
    return [x if type(x) is dict else {} for x in entries]

def score_task(task, attempts):
    """ which attempts are right? -> a dict a query. raises ValueError where an answer is not known """
    rows = []
    for i, (_, answer) in enumerate(task.queries):
        if answer is None:
            raise ValueError(f"{task.source}: task {task.name}, query {i}: no answer to score against")
        tried = attempts[i] if i < len(attempts) else {}
        want = json.dumps(answer.tolist()) # compared as text: in python [[True]] == [[1]]
        hits = [json.dumps(tried.get(key)) == want for key in ATTEMPTS]
        rows.append({'task': task.name, 'query': i, 'attempt_1': hits[0], 'attempt_2': hits[1], 'right': any(hits)})
    return rows

def misordered(submission, tasks):
    """ names of tasks whose attempts would be right for another query of theirs than the one they stand at """
    names = []
    for task in tasks:
        answers = [json.dumps(answer.tolist()) for _, answer in task.queries]
        for tried, answer in zip(attempts_of(task, submission), answers):
            texts = {json.dumps(rows) for rows in tried.values()}
            if answer not in texts and texts & set(answers):
                names.append(task.name)
                break
    return names

def score(submission, tasks):
    """
    a parsed submission.json and tasks with answers -> dict. the official rule: a query counts if either attempt
    equals its answer, a task is worth the share of its queries that count, and the score is the mean over all tasks,
    in percent; a task or attempt that is missing or malformed is worth 0. `solved` is stricter: tasks with every
    query right.
    """
    per_task, per_query, missing, misshapen, total = {}, [], [], [], 0.0
    for task in tasks:
        attempts, n = attempts_of(task, submission), len(task.queries)
        if type(submission.get(task.name)) is not list:
            missing.append(task.name)
        elif len(attempts) != n:
            misshapen.append(f"{task.name} has {len(attempts)} entries, want {n}")
        for i, tried in enumerate(attempts[:n]):
            lacks = [f"no {key}" for key in ATTEMPTS if key not in tried]
            if lacks:
                misshapen.append(f"{task.name}, query {i}: {' and '.join(lacks)}")
        rows = score_task(task, attempts)
        right = sum(row['right'] for row in rows)
        per_query += rows
        per_task[task.name] = [right, n]
        total += 100 * right / n
    return {'score': round(total / len(tasks), 2), 'solved': sum(right == n for right, n in per_task.values()),
            'tasks': len(tasks), 'right': sum(row['right'] for row in per_query), 'outputs': len(per_query),
            'per_task': per_task, 'per_query': per_query, 'missing': missing,
            'unknown': [name for name in submission if name not in per_task], 'misshapen': misshapen,
            'misordered': misordered(submission, tasks)}

# what may be odd about a submission: a key of `score` and how it is said
ODD = {'misordered': "tasks have the right answers of their queries in another order",
       'misshapen': "entries without their two attempts, what is missing is worth 0",
       'missing': "tasks not in the submission, worth 0",
       'unknown': "tasks not in the source, ignored"}

def score_file(cfg):
    """ print the score of a submission, a json object as the last line -> the dict of `score`. raises ValueError """
    if cfg.out and Path(cfg.out).suffix not in ('.csv', '.parquet'):
        raise ValueError(f"--out {cfg.out}: want a .csv or .parquet")
    submission = read_json(cfg.submission)
    if type(submission) is not dict:
        raise ValueError(f"{cfg.submission}: want an object of attempts by task id")
    _, tasks = read_fitting(cfg.data, cfg.max_pair, opened=True)
    result = score(submission, tasks)
    about = Path(cfg.submission).with_name('solve.json') # by the solver, a submission from elsewhere has none
    result['leaks'] = len(read_json(about).get('leaks', [])) if about.is_file() else 0
    per_query, per_task = result.pop('per_query'), result.pop('per_task')
    if cfg.out:
        import polars as pl
        frame = pl.DataFrame(per_query)
        if cfg.out.endswith('.csv'):
            frame.write_csv(cfg.out)
        else:
            frame.write_parquet(cfg.out)
    for key, what in ODD.items():
        found = result.pop(key)
        if found:
            print(f"{len(found)} {what}: {a_few(found, 10)}")
    solved = [name for name, (right, n) in per_task.items() if right == n]
    partly = [f"{name} {right}/{n}" for name, (right, n) in per_task.items() if 0 < right < n]
    print(f"solved: {' '.join(solved) or 'none'}" + (f"; in part: {', '.join(partly)}" if partly else ""))
    leaked = f", TRAINED ON {result['leaks']} OF THE ANSWERS" if result['leaks'] else ""
    print(f"{result['score']:.2f}% by the official rule, {result['solved']} of {result['tasks']} tasks with every "
          f"output right, {result['right']} of {result['outputs']} outputs{leaked}")
    print(json.dumps(result))
    return result
