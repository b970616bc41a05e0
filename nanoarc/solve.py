"""
a trained model and a source -> submission.json, candidates.jsonl, solve.json; and the score of any submission.

each query is decoded under several views (augments of it), greedily and under a grammar that knows what a grid is; the
answers are turned back and vote. nothing here opens an answer but `score`.
"""
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.progress import track

from nanoarc import checkpoint, view
from nanoarc.data import DEMOS, END, MAX_GRID, PAD, ROW, DataConfig, Rows, Sampler, decode_grid, fits, grammar, hash64, next_pos, undo_dihedral
from nanoarc.model import Cache, Model, ModelConfig
from nanoarc.sources import find_leaks, grid_bytes, read_json, read_sources
from nanoarc.train import get_device, get_ranks

@dataclass
class SolveConfig:
    run: str # out_dir of a training run
    data: str = 'arc1/evaluation' # sources whose queries are to be answered, their answers stay closed
    out_dir: str = '' # where submission.json and candidates.jsonl go, '' = into the run
    views: int = 32 # augments of each query that are decoded and vote. view 0 is the query as it is
    max_pair: int = 0 # solve only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all
    decode_rows: int = 128 # views decoded together
    allow_leak: bool = False # solve queries that the run was trained on, with their answers, and say so in the score
    seed: int = 1337 # of the views
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in train

@dataclass
class ScoreConfig:
    submission: Annotated[str, tyro.conf.Positional] # a submission.json
    data: Annotated[str, tyro.conf.Positional] # the source that it answers
    max_pair: int = 0 # score only tasks whose demos have at most so many tokens, in the longer orientation. 0 = all

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

def load_model(run, device):
    """ out_dir of a run -> (model in eval mode, its DataConfig, {task key: embedding row}, was a leak allowed). raises ValueError """
    tensors, meta = checkpoint.load(run)
    model = Model(ModelConfig(**meta['model'])).to(device).eval()
    checkpoint.restore_model(model, tensors, 'ema' if meta['train']['ema'] > 0 else 'model')
    return model, DataConfig(**meta['data']), meta['rows'], bool(meta['leaks'])

# -----------------------------------------------------------------------------
# decoding

@torch.no_grad()
def decode(model, idx, pos, task=None, dihedral=None, most=MAX_GRID + 1):
    """
    greedy answers to (B, T) prompts of one length, all ending in OUT. pos (B, T, 3), task and dihedral (B,) or None
    -> (B, most) int64 tokens up to END, then PAD, and the (B,) log-probability of each, under the grammar.
    rows that are done leave the batch, so the longest answer does not hold up the rest.
    """
    B, T = idx.shape
    device = idx.device
    cache = Cache(model)
    out = torch.full((B, most), PAD, device=device)
    logp = torch.zeros(B, dtype=torch.promote_types(model.head.weight.dtype, torch.float32), device=device) # mps has no fp64
    rows, width = torch.arange(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    extra = () if task is None else (task[:, None], dihedral[:, None]) # the same at every token
    logits = model(idx, None, pos, None, *(x.expand(B, T) for x in extra), cache=cache)[0]
    at = pos[:, -1].long() # (b, 3) where the last token stands
    for t in range(most):
        logits = logits[:, -1].masked_fill(~grammar(at, width), float('-inf'))
        score, token = logits.log_softmax(-1).max(-1)
        out[rows, t], logp[rows] = token, logp[rows] + score
        width = torch.where((token == ROW) & (width == 0), at[:, 1], width)
        at = next_pos(at, token)
        going = token != END
        if not going.all(): # waits for the device
            rows, width, at, token = (x[going] for x in (rows, width, at, token))
            extra = tuple(x[going] for x in extra)
            cache.keep(going)
            if len(rows) == 0:
                break
        logits = model(token[:, None], None, at[:, None], None, *extra, cache=cache)[0]
    return out, logp

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

def draw_val(model, ds, out, n=4):
    """ validation queries of the n smallest tasks as the model answers them now, greedily -> a png. an answer that does not end where it should is cut short """
    s, device, shown = ds.sampler, model.head.weight.device, []
    pairs = ds.val_pairs[np.unique(s.tables.pair_task[ds.val_pairs], return_index=True)[1]] # one a task
    pairs = pairs[np.argsort(s.tables.need.max(0)[pairs], kind='stable')[:n]]
    for pair in pairs:
        docs = s.plan(np.array([pair]), 0, 0, True, 0)
        batch = s.write(Rows(docs, np.array([0, 1]), np.array([0]), None, None), 0, 1, int(docs.length[0]), loss_on='query')
        T = int((batch.targets[0] != -100).nonzero()[0]) + 1 # tokens of the prompt
        extra = [x[:, T - 1].to(device) for x in batch[4:] if x is not None]
        tokens = decode(model, batch.idx[:, :T].to(device), batch.pos[:, :T].to(device), *extra, most=int(docs.length[0]) - T)[0][0].tolist()
        rows = len(tokens) - tokens[::-1].index(ROW) if ROW in tokens else 0 # tokens of whole rows
        task = s.tables.pair_task[pair]
        corpus = s.corpora[s.part[task]]
        task, query = corpus.task(int((s.part[:task] == s.part[task]).sum())), int(pair - s.tables.first[task] - s.tables.n_demos[task])
        shown.append((replace(task, queries=[task.queries[query]]), [{'attempt_1': decode_grid(tokens[:rows])} if rows else {}]))
    view.draw_tasks(shown, out)

def main(cfg):
    """ solve a source -> path of submission.json. raises ValueError for what a user can mend """
    device, _, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    if cfg.views < 1 or cfg.decode_rows < 1:
        raise ValueError(f"views={cfg.views} decode_rows={cfg.decode_rows}: want at least 1")
    corpora, tasks = read_fitting(cfg.data, cfg.max_pair, opened=False)
    model, data_cfg, rows, allowed = load_model(cfg.run, device)
    leaks = find_leaks(cfg.run, corpora)
    if leaks and not (cfg.allow_leak or allowed):
        raise ValueError(f"{cfg.run} was trained on {len(leaks)} of these queries, answers included: {'; '.join(leaks[:3])}{'; ...' if len(leaks) > 3 else ''}. "
                         "train with --adapt in place of --data, or --allow_leak solves them and says so in the score")
    sampler = Sampler([(c, 1) for c in corpora], data_cfg, rows)
    table = sampler.tables
    unknown = [task.name for task, row in zip(tasks, table.row) if row < 0] if model.cfg.n_task > 0 else []
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(tasks)} tasks have no embedding row in {cfg.run}: {', '.join(unknown[:5])}"
                         f"{', ...' if len(unknown) > 5 else ''}. train on their demos with --adapt {cfg.data}, or in context with --shots=-1")
    # every view of every query, by prompt length
    by_length, found, alone = defaultdict(list), {}, []
    for k, task in enumerate(tasks):
        for i in range(len(task.queries)):
            pair = int(table.first[k] + table.n_demos[k] + i)
            found[k, i] = defaultdict(list)
            docs, prompts = make_views(sampler, pair, cfg.views, cfg.seed)
            if data_cfg.shots != 0 and (docs.pairs >= 0).sum(1).min() == 1:
                alone.append(f"{task.name} query {i}")
            for v, (idx, pos) in prompts.items():
                by_length[len(idx)].append((k, i, v, int(docs.dihedral[v]), docs.cmap[v], idx, pos))
    if alone and rank == 0:
        print(f"warning: no demo fits block_size={data_cfg.block_size} before {len(alone)} queries: {', '.join(alone[:5])}")
    batches = [group[j : j + cfg.decode_rows] for _, group in sorted(by_length.items()) for j in range(0, len(group), cfg.decode_rows)]
    mine, answers = batches[rank::world], [] # a batch is the same on any number of ranks, so its answers are
    for batch in track(mine, description=f"{len(found)} queries, {sum(map(len, by_length.values()))} views", disable=rank > 0):
        k, i, v, d, cmap, idx, pos = zip(*batch)
        extra = [torch.from_numpy(x).to(device) for x in (table.row[list(k)], np.array(d, np.uint8))] if model.cfg.n_task > 0 else []
        with autocast():
            tokens, logp = decode(model, *(torch.from_numpy(np.stack(x)).to(device) for x in (idx, pos)), *extra)
        tokens, logp = tokens.cpu().numpy(), logp.cpu().numpy()
        for b in range(len(batch)):
            end = np.flatnonzero(tokens[b] == END)[0] # the grammar saw to it that there is one
            grid = undo(decode_grid(tokens[b, :end].tolist()), d[b], cmap[b])
            answers.append((k[b], i[b], v[b], round(float(logp[b]), 4), grid))
    if world > 1:
        every = [None] * world
        dist.gather_object(answers, every if rank == 0 else None)
        answers = [x for part in every for x in part] if rank == 0 else []
    for k, i, v, logp, grid in sorted(answers, key=lambda x: x[:3]):
        found[k, i][grid_bytes(grid)].append((v, logp, grid))
    ranked = {key: rank_candidates(candidates) for key, candidates in found.items()}
    out_dir = Path(cfg.out_dir or cfg.run)
    if rank > 0: # the first one writes
        return out_dir / 'submission.json'
    write_results(out_dir, tasks, ranked)
    checkpoint.write_file(out_dir / 'solve.json', json.dumps({'run': cfg.run, 'data': cfg.data, 'views': cfg.views, 'seed': cfg.seed, 'leaks': leaks}, indent=1).encode())
    return out_dir / 'submission.json'

def rank_candidates(candidates):
    """
    {grid bytes: [(view, log-probability, grid), ...]} -> list of (grid, votes, log-probability, views), best first:
    most votes, then the higher mean log-probability (rounded, so that machines agree), then the bytes of the grid.
    """
    rows = []
    for key, found in candidates.items():
        logp = round(sum(x for _, x, _ in found) / len(found), 4)
        rows.append((-len(found), -logp, key, (found[0][2], len(found), logp, sorted(v for v, _, _ in found))))
    return [row[-1] for row in sorted(rows, key=lambda row: row[:3])]

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
            grids = [grid.tolist() for grid, *_ in best[:2]] or [[[0]]]
            submission[task.name][i] = {'attempt_1': grids[0], 'attempt_2': grids[-1]} # a copy only if there is no other
            lines += [json.dumps({'task': task.name, 'query': i, 'votes': votes, 'log_prob': logp, 'views': views, 'grid': grid.tolist()})
                      for grid, votes, logp, views in best]
    checkpoint.write_file(Path(out_dir) / 'candidates.jsonl', "".join(line + "\n" for line in lines).encode())
    checkpoint.write_file(Path(out_dir) / 'submission.json', json.dumps(submission).encode())

def score(submission, tasks):
    """
    a parsed submission.json and tasks with answers -> dict. the official rule: a query counts if either attempt equals its
    answer, a task is worth the share of its queries that count, and the score is the mean over all tasks, in percent; a task
    or attempt that is missing or malformed is worth 0. `solved` is stricter: tasks with every query right.
    """
    result = {'score': 0.0, 'solved': 0, 'tasks': len(tasks), 'right': 0, 'outputs': 0, 'per_task': {}, 'missing': [], 'unknown': []}
    for task in tasks:
        tried = submission.get(task.name)
        if not isinstance(tried, list):
            result['missing'].append(task.name)
            tried = []
        right = 0
        for i, (_, answer) in enumerate(task.queries):
            if answer is None:
                raise ValueError(f"{task.source}: task {task.name}, query {i}: no answer to score against")
            attempts = tried[i] if i < len(tried) and isinstance(tried[i], dict) else {}
            want = json.dumps(answer.tolist()) # as text: in python [[True]] == [[1]]
            right += any(json.dumps(attempts.get(key)) == want for key in ('attempt_1', 'attempt_2'))
        n = len(task.queries)
        result['per_task'][task.name] = [right, n]
        result['right'] += right
        result['outputs'] += n
        result['solved'] += right == n
        result['score'] += 100 * right / n / len(tasks)
    result['score'] = round(result['score'], 2)
    result['unknown'] = [name for name in submission if name not in result['per_task']]
    return result

def score_main(cfg):
    """ print the score of a submission, a json object as the last line -> the dict of `score`. raises ValueError """
    submission = read_json(cfg.submission)
    if type(submission) is not dict:
        raise ValueError(f"{cfg.submission}: want an object of attempts by task id")
    result = score(submission, read_fitting(cfg.data, cfg.max_pair, opened=True)[1])
    about = Path(cfg.submission).with_name('solve.json') # by the solver, a submission from elsewhere has none
    result['leaks'] = len(read_json(about).get('leaks', [])) if about.is_file() else 0
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
