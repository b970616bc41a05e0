"""
prompts -> answers, and how probable an answer is that is known already. a prompt goes through the model once; what the
model remembers of it (model.Cache) is gone on with, a token at a time.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanoarc.grids import END, MAX_GRID, PAD, ROW, VOCAB_SIZE, encode_grid, may_follow, next_place

class Answer(NamedTuple):
    """ of one prompt """
    prompt: int # its row in the batch of prompts
    tokens: list # up to END
    log_prob: float # of all of them, under the grammar
    greedy: bool # is each of them the most probable one?

def read_prompts(model, idx, pos, task, dihedral, doc):
    """
    prompts as for decode -> a cache that has read them, (B, 16) logits of the token that follows, and what else the
    model is told at each token to come, {name: (B, 1)}
    """
    told = {} # what is the same for all tokens to come
    if task is not None:
        told = {'task': task[:, None], 'dihedral': dihedral[:, None]}
    cache = model.cache()
    everywhere = {name: x.expand(idx.shape) for name, x in told.items()}
    logits, _ = model(idx, pos=pos, doc=doc, **everywhere, cache=cache)
    if doc is not None:
        told['doc'] = doc[:, -1:]
    return cache, logits[:, -1], told

@torch.no_grad()
def decode(model, idx, pos, task=None, dihedral=None, doc=None, p_min=1.0, most=MAX_GRID + 1):
    """
    (B, T) prompts, all ending in OUT -> list of Answers under the grammar, of at most `most` tokens. pos (B, T, 3),
    task and dihedral (B,) or None. doc (B, T) is 1 on a prompt and 0 on the filler before it, None = there is none.

    of each prompt the greedy answer, and every other one of at least p_min: what ARChitects' depth-first search finds
    (github.com/da-fr/arc-prize-2024). here all open answers take a step together, of a prompt
    at most 1 / p_min and the greedy one.
    """
    B = len(idx)
    cache, logits, told = read_prompts(model, idx, pos, task, dihedral, doc)
    logits = logits.cpu() # where all that follows is thought
    live = { # answers that have not ended
        'prompt': torch.arange(B),
        'slot': torch.arange(B), # its row in the cache
        'tokens': torch.zeros(B, 0, dtype=torch.int64),
        'log_prob': torch.zeros(B, dtype=logits.dtype),
        'greedy': torch.ones(B, dtype=torch.bool),
    }
    for name in ('row', 'col', 'width'): # place of its last token, width of its first row, 0 while that is open
        live[name] = torch.zeros(B, dtype=torch.int64)
    every_token = torch.arange(VOCAB_SIZE)
    found = []
    for _ in range(most):
        # each answer goes on by its best token, as long as it is the greedy one, and by all that keep it above p_min
        legal = may_follow(every_token, live['row'][:, None], live['col'][:, None], live['width'][:, None])
        scores = logits[live['slot']].masked_fill(~legal, float('-inf')).log_softmax(-1) # (b, 16)
        best = F.one_hot(scores.argmax(-1), VOCAB_SIZE).bool() & live['greedy'][:, None] # (b, 16)
        probable = live['log_prob'][:, None] + scores >= math.log(p_min) # (b, 16)
        parent, token = (best | probable).nonzero(as_tuple=True)
        live = {name: x[parent] for name, x in live.items()}
        live['greedy'] = best[parent, token]
        live['log_prob'] = live['log_prob'] + scores[parent, token]
        live['tokens'] = torch.cat([live['tokens'], token[:, None]], 1)
        live['width'] = torch.where((token == ROW) & (live['row'] == 0), live['col'], live['width'])
        live['row'], live['col'], _ = next_place(live['row'], live['col'], 1, token)
        # some have ended
        ended = token == END
        found += to_answers(live, ended)
        live = {name: x[~ended] for name, x in live.items()}
        if len(live['slot']) == 0: # or what was open has become too improbable
            return found
        live['slot'], source = assign_rows(live['slot'], len(logits))
        if not torch.equal(source, torch.arange(len(logits))):
            cache.keep(source)
            told = {name: x[source] for name, x in told.items()}
        step = torch.ones(len(source), 1, 4, dtype=torch.int64) # z = 1
        step[live['slot'], 0, :3] = torch.stack([token[~ended], live['row'], live['col']], -1)
        step = step.to(idx.device)
        logits, _ = model(step[..., 0], pos=step[..., 1:], **told, cache=cache)
        logits = logits[:, -1].cpu() # waits for the device, once a step
    # cut short. never at the default of `most`: by then the grammar has forced an END
    return found + to_answers(live, torch.ones_like(live['greedy']))

def assign_rows(slot, n):
    """
    slot (b,): the row of a cache of n that each open answer goes on from -> its new row, and of each new row the old
    one. a copy of all is dear: a branch takes the row of an answer that ended
    """
    free = torch.ones(n, dtype=torch.bool)
    free[slot] = False
    is_branch = F.pad(slot[1:] == slot[:-1], (1, 0)) # of several that go on from a row the first one stays
    if is_branch.sum() > free.sum() or len(slot) < 0.75 * n: # no room, or too much of it
        return torch.arange(len(slot)), slot
    to = slot.masked_scatter(is_branch, free.nonzero())
    return to, torch.arange(n).index_copy(0, to, slot)

def to_answers(live, which):
    """ the rows of open answers that a (b,) mask names -> list of Answers """
    columns = [live[name][which].tolist() for name in ('prompt', 'tokens', 'log_prob', 'greedy')]
    return [Answer(*x) for x in zip(*columns)]

@torch.no_grad()
def score_answers(model, idx, pos, answers, task=None, dihedral=None, doc=None):
    """
    (B, T) prompts as for decode, and of each a list of grids -> list of B lists of the log-probability of each grid,
    under the grammar
    """
    cache, logits, told = read_prompts(model, idx, pos, task, dihedral, doc)
    prompt = [] # (b,) of each answer
    written = []
    for i, grids in enumerate(answers):
        prompt += [i] * len(grids)
        written += [encode_grid(grid) + [END] for grid in grids]
    width = torch.tensor([tokens.index(ROW) for tokens in written], device=idx.device)[:, None] # (b, 1)
    tokens = pad_sequence([torch.tensor(x) for x in written], batch_first=True, padding_value=PAD) # (b, n)
    tokens, n = tokens.to(idx.device), tokens.size(1)
    filler = tokens == PAD
    # (row, col) of the token before each one, the first time OUT. of 2 columns: (0, 0) (0, 1) (0, 2) (1, 0) ...
    place = torch.arange(n, device=idx.device).masked_fill(filler, 0) # (b, n)
    row, col = place // (width + 1), place % (width + 1)
    prompt = torch.tensor(prompt)
    cache.keep(prompt)
    logits = logits[prompt, None]
    told = {name: x[prompt].expand(-1, n - 1) for name, x in told.items()}
    pos = torch.stack([row, col, torch.ones_like(row)], -1) # z = 1: the output of the target
    more, _ = model(tokens[:, :-1], pos=pos[:, 1:], **told, cache=cache) # token i itself stands at place i + 1
    logits = torch.cat([logits, more], 1) # (b, n, 16)
    known_width = torch.where(row == 0, 0, width)
    every_token = torch.arange(VOCAB_SIZE, device=idx.device)
    legal = may_follow(every_token, row[..., None], col[..., None], known_width[..., None])
    legal = legal | filler[..., None] # its scores are dropped below
    scores = logits.masked_fill(~legal, float('-inf')).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    sums = scores.masked_fill(filler, 0).sum(1)
    return [x.tolist() for x in sums.split([len(grids) for grids in answers])]
