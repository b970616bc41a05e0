"""
what a language model knows: HellaSwag, of a run of text or of any model of transformers. what it says: samples.
"""
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanoarc.lm import cache_name, read_base
from nanoarc.run import get_device, get_ranks, load_run, over_ranks
from nanoarc.settings import MAX_SEED, check_numbers
from nanoarc.text import PrepareConfig, TextConfig, json_object, make_tokenizer, need, read_tokenizer

def load_text_run(run, device):
    """
    out_dir of a run of text -> (Model in eval mode, Tokenizer, number of the end-of-text token). raises ValueError
    """
    model, data_cfg, meta = load_run(run, device)
    if not isinstance(data_cfg, TextConfig):
        raise ValueError(f"{run}: a run of tasks, want one of text")
    path, want = Path(run) / 'tokenizer.json', meta['stream']['tokenizer_sha256']
    if not want: # shards of others: GPT-2's
        data = make_tokenizer(PrepareConfig(''), ())
    else:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != want:
            raise ValueError(f"{path}: not the tokenizer of this run")
    return model, read_tokenizer(data, path), meta['stream']['eot']

class OwnModel:
    """ a Model of a run of text, as something that can be asked """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def encode(self, text, begins):
        """ text -> token ids. begins: is it the beginning of a document? """
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def ask(self, context, ends):
        """
        context (n,), endings (b, L) -> (b, L, vocab_size) logits that foretell the endings. the context is read once
        """
        cache = self.model.cache()
        logits, _ = self.model(context[None], cache=cache)
        first = logits[:, -1:].expand(len(ends), -1, -1)
        if ends.size(1) == 1:
            return first
        cache.keep(torch.zeros(len(ends), dtype=torch.int64, device=ends.device))
        more, _ = self.model(ends[:, :-1], cache=cache)
        return torch.cat([first, more], 1)

class HubModel:
    """
    a model of transformers that can be asked the same. if its cache holds more than plain keys and values, it reads the
    context again with each ending
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.cached = True

    def encode(self, text, begins):
        """ as OwnModel, with the special tokens that the model is used to at the beginning """
        ids = self.tokenizer(text, add_special_tokens=begins)['input_ids']
        if begins and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id: # some end a text too, but it goes on
            ids = ids[:-1]
        return ids

    def ask(self, context, ends):
        """ as OwnModel """
        b, n = len(ends), len(context)
        if self.cached:
            out = self.model(context[None], use_cache=True)
            cache = out.get(cache_name(self.model))
            self.cached = is_plain(cache)
        if not self.cached:
            whole = torch.cat([context.expand(b, -1), ends], 1)
            return self.model(whole).logits[:, n - 1 : -1]
        cache.batch_repeat_interleave(b)
        first = out.logits[:, -1:].expand(b, -1, -1)
        more = self.model(ends, **{cache_name(self.model): cache}).logits[:, :-1]
        return torch.cat([first, more], 1)

def is_plain(cache):
    """ has this cache of transformers keys and values in all layers and nothing else? """
    from transformers import cache_utils
    plain = cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer
    return isinstance(cache, cache_utils.DynamicCache) and all(type(x) in plain for x in cache.layers)

def load_language_model(name, device):
    """ a run of nanoarc, a directory or hub id of transformers, or a .gguf -> OwnModel or HubModel """
    if (Path(name) / 'ckpt').is_dir():
        model, tokenizer, _ = load_text_run(name, device)
        return OwnModel(model, tokenizer)
    need('transformers')
    model, tokenizer = read_base(name, torch.float32)
    return HubModel(model.to(device), tokenizer)

# -----------------------------------------------------------------------------

@dataclass
class HellaswagConfig:
    model: str # out_dir of a run of text; or of transformers: a directory, a hub id, a .gguf
    file: str # hellaswag_val.jsonl, of github.com/rowanz/hellaswag
    limit: int = 0 # the first so many items. 0 = all
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in solve

def read_hellaswag(path):
    """ .jsonl -> list of (ctx, 4 endings, number of the right one). raises ValueError with file, line and field """
    items = []
    with open(path, 'rb') as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                items.append(read_item(line, f"{path}: line {n}"))
    if not items:
        raise ValueError(f"{path}: no items")
    return items

def read_item(line, where):
    """ a line of the file -> (ctx, 4 endings, number of the right one). raises ValueError """
    x = json_object(line, where)
    ctx, ends, label = x.get('ctx'), x.get('endings'), x.get('label')
    if not isinstance(ctx, str) or not ctx:
        raise ValueError(f"{where}, field 'ctx': want a text, got {str(ctx)[:40]!r}")
    if not isinstance(ends, list) or len(ends) != 4 or set(map(type, ends)) != {str}:
        raise ValueError(f"{where}, field 'endings': want 4 texts, got {str(ends)[:40]!r}")
    if type(label) is not int or not 0 <= label <= 3:
        raise ValueError(f"{where}, field 'label': want 0 to 3, got {str(label)[:40]!r}")
    return ctx, ends, label

@torch.no_grad()
def ending_losses(lm, context, ends, device):
    """ token ids of a context and of b endings -> (b,) sum of the losses over each ending, nats, (b,) its tokens """
    n = torch.tensor([len(x) for x in ends], device=device)
    # shorter endings have zeros behind them: no token sees what comes after it
    idx = torch.zeros(len(ends), int(n.max()), dtype=torch.int64, device=device)
    for row, x in zip(idx, ends):
        row[: len(x)] = torch.tensor(x)
    logits = lm.ask(torch.tensor(context, device=device), idx).float()
    losses = F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction='none').view_as(idx) # (b, L)
    behind = torch.arange(idx.size(1), device=device) >= n[:, None]
    return losses.masked_fill(behind, 0).sum(1), n

def hellaswag(cfg):
    """
    text hellaswag --model M --file F: how often is the right ending the most probable one? by the sum of its losses
    (acc), by their mean (acc_norm)
    """
    check_numbers(cfg)
    items = read_hellaswag(cfg.file)
    if cfg.limit > 0:
        items = items[: cfg.limit]
    device, _, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    lm = load_language_model(cfg.model, device)
    right, right_norm, n, began = 0, 0, 0, time.perf_counter()
    for ctx, ends, label in items[rank::world]:
        ends = [lm.encode(" " + x, False) for x in ends]
        with autocast():
            total, count = ending_losses(lm, lm.encode(ctx, True), ends, device)
        right += int(total.argmin() == label) # waits for the device
        right_norm += int((total / count).argmin() == label)
        n += 1
        if rank == 0 and n % 50 == 0:
            speed = n * world / (time.perf_counter() - began)
            print(f"{n * world}/{len(items)} acc {right / n:.4f} acc_norm {right_norm / n:.4f}, {speed:.1f} items / s",
                  flush=True)
    right, right_norm, n = over_ranks(world, 'SUM', right, right_norm, n)
    result = {'items': int(n), 'acc': right / n, 'acc_norm': right_norm / n}
    if rank == 0:
        print(json.dumps(result))
    return result

# -----------------------------------------------------------------------------

@dataclass
class SampleConfig:
    model: str # out_dir of a run of text
    prompt: str = '' # what to go on from. '' = the beginning of a document
    num: int = 3 # samples
    most: int = 100 # tokens of each, unless the document ends before
    temperature: float = 0.8 # 0 = the most probable token, always
    top_k: int = 50 # only so many of the most probable tokens. 0 = off
    top_p: float = 1.0 # only the most probable tokens that make up this much together (Holtzman et al. 2020)
    seed: int = 1337 # of the draws
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu

    def check(self):
        """ raises ValueError that names the setting """
        check_numbers(self, dict(num=1, most=1), dict(top_p=1, seed=MAX_SEED))
        if self.top_p == 0:
            raise ValueError("top_p=0: want a share of more than 0")

def draw_tokens(logits, cfg, generator):
    """ (B, vocab_size) -> (B,) tokens """
    if cfg.temperature == 0:
        return logits.argmax(-1)
    if 0 < cfg.top_k < logits.size(1):
        least = logits.topk(cfg.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float('-inf'))
    p, order = (logits / cfg.temperature).softmax(-1).sort(descending=True)
    before = p.cumsum(-1) - p # what the more probable ones make up
    p = p.masked_fill(before >= cfg.top_p, 0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]

@torch.no_grad()
def sample(cfg):
    """ text sample --model DIR --prompt P: what the model says """
    cfg.check()
    device, _, _ = get_device(cfg.device, 'float32')
    model, tok, eot = load_text_run(cfg.model, device)
    prompt = tok.encode(cfg.prompt, add_special_tokens=False).ids or [eot]
    cache, generator = model.cache(), torch.Generator(device).manual_seed(cfg.seed)
    logits, _ = model(torch.tensor([prompt], device=device), cache=cache)
    logits = logits[:, -1].expand(cfg.num, -1)
    cache.keep(torch.zeros(cfg.num, dtype=torch.int64, device=device))
    tokens = torch.zeros(cfg.num, 0, dtype=torch.int64, device=device)
    for _ in range(cfg.most):
        new = draw_tokens(logits[:, : tok.get_vocab_size()], cfg, generator) # the vocabulary was rounded up
        tokens = torch.cat([tokens, new[:, None]], 1)
        if (tokens == eot).any(1).all():
            break
        logits, _ = model(new[:, None], cache=cache)
        logits = logits[:, -1]
    texts = []
    for row in tokens.tolist():
        if eot in row:
            row = row[: row.index(eot)]
        texts.append(cfg.prompt + tok.decode(row))
        print(f"{texts[-1]}\n---")
    return texts
