"""
a pretrained language model that is told and asked our symbols. each of them is a piece of text:

    IN 1 2 ROW 3 4 ROW OUT 3 ROW 5 ROW END
    "I12\\n34\\nO3\\n5\\n</s>"               form='raw': a digit a cell, a newline a row

an LM is given and asked symbols as any Model here is. what it makes of them, tokens of its own, is its business alone.
colors and ROW are one token each, so a grid is as long for it as for us and the grammar of answers holds. embedding and
head keep only the rows of the tokens that the text form needs: a vocabulary of 50,000 costs as much as the rest of a
small model.
"""
import contextlib
import copy
import hashlib
import inspect
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanoarc import checkpoint
from nanoarc.grids import END, IN, OUT, ROW, VOCAB_SIZE, encode_pair
from nanoarc.model import is_recent

FIRST = 15 # the unused token: the IN with which a document begins, it may have more text before it

@dataclass
class LMConfig:
    # the pretrained causal language model: an id on the Hugging Face hub, a directory, or a .gguf file
    base: str = ''
    # a task as text: 'raw' = a digit a cell, a newline a row, short markers | 'chat' = so, an input a turn of the
    # user in its chat template
    form: str = 'raw'
    # of the LoRA adapters on every linear layer but the head (arxiv 2106.09685). 0 = all weights are trained
    rank: int = 32
    # what adapters say is scaled by alpha / rank, with rslora by alpha / sqrt(rank) (arxiv 2312.03732)
    alpha: float = 32.0
    rslora: bool = True # see alpha
    shrink: bool = True # keep only the rows of embedding and head that the text form needs, and train them too
    # forget activations and compute them again (gradient checkpointing): less memory, a third slower
    recompute: bool = False
    # under torchrun each rank holds its part of the frozen weights alone (FSDP2), for a base that fits into no single
    # gpu
    shard: bool = False
    # of weights that are not trained: 'float32' | 'bfloat16' | 'float16' | 'auto' = bfloat16 on recent cuda, float16 on
    # older, else float32
    base_dtype: str = 'auto'
    base_sha256: str = '' # of its files, set when they are read first

    def check(self):
        """ raises ValueError that names the setting """
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: want 0 or more")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: want more than 0")
        if self.base_dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
            raise ValueError(f"base_dtype={self.base_dtype!r}: want auto, float32, bfloat16 or float16")

    def about(self):
        trained = f"LoRA of rank {self.rank}" if self.rank > 0 else "all weights trained"
        return f"{self.base}, as {self.form} text, {trained}"

def make_lm(cfg, device, world=1):
    """ LMConfig -> LM on a device. raises ValueError """
    cfg.check()
    device = torch.device(device)
    if cfg.base_dtype == 'auto':
        dtype = 'float32'
        if device.type == 'cuda':
            dtype = 'bfloat16' if is_recent(device) else 'float16'
        cfg = replace(cfg, base_dtype=dtype)
    lm = LM(cfg)
    if cfg.shard and world > 1:
        lm.share_out(device, world)
    return lm.to(device)

# -----------------------------------------------------------------------------
# the base

@cache
def find_base(base):
    """
    where the files of a base are -> (directory, name of the .gguf in it or None). downloads what is not here. raises
    ValueError
    """
    path = Path(base)
    if path.suffix == '.gguf' and path.is_file():
        return path.parent, path.name
    if (path / 'config.json').is_file():
        return path, None
    if path.exists() or base.startswith(('/', '.', '~')) or base.count('/') != 1:
        raise ValueError(f"base={base!r}: want a directory with a config.json, a .gguf file, or an id on the Hugging "
                         "Face hub like 'tiiuae/Falcon-H1-0.5B-Base'")
    from huggingface_hub import snapshot_download
    wanted = ['*.json', '*.safetensors', '*.model', '*.jinja', '*.txt']
    try:
        return Path(snapshot_download(base, allow_patterns=wanted)), None
    except Exception as e: # no such model, no network, no permission: each of its libraries has errors of its own
        error = str(e).splitlines()[0]
        raise ValueError(f"base={base!r}: no such file, and from the Hugging Face hub: {error}") from None

@cache
def hash_base(base):
    """ sha256 of the weights, the config and the tokenizer of a base """
    folder, gguf = find_base(base)
    if gguf:
        lines = [f".gguf {checkpoint.file_sha256(folder / gguf)}"] # whatever it is called
    else:
        paths = list(folder.glob('*.safetensors'))
        if len(paths) == 0:
            raise ValueError(f"base={base!r}: no .safetensors in {folder}. other files of weights may hold code, "
                             "nothing here reads them")
        for name in ('config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
                     'special_tokens_map.json', 'chat_template.jinja'):
            if (folder / name).is_file():
                paths.append(folder / name)
        lines = [f"{path.name} {checkpoint.file_sha256(path)}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

def read_tokenizer(base):
    from transformers import AutoTokenizer
    folder, gguf = find_base(base)
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf) if gguf else AutoTokenizer.from_pretrained(folder)

def read_base(base, dtype):
    """ -> (causal language model of transformers in eval mode, its tokenizer) """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    folder, gguf = find_base(base)
    kwargs = {'gguf_file': gguf} if gguf else {'use_safetensors': True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    return model.eval(), read_tokenizer(base)

# -----------------------------------------------------------------------------
# tasks as text

class TextForm:
    """ symbols -> pieces of text -> tokens of a tokenizer. raises ValueError if it has none for a color, or no end """

    def __init__(self, tokenizer, form):
        self.tokenizer = tokenizer
        if not tokenizer.eos_token:
            raise ValueError("the tokenizer of the base has no end-of-sequence token, by which an answer would end")
        if form not in ('raw', 'chat') or (form == 'chat' and not tokenizer.chat_template):
            raise ValueError(f"form={form!r}: want raw or chat, the latter for a base that has a chat template")
        if form == 'chat':
            start, ask, answer, end = chat_pieces(tokenizer)
        else:
            bos = tokenizer.bos_token_id
            with_bos = bos is not None and tokenizer('I').input_ids[0] == bos
            start, ask, answer, end = tokenizer.bos_token if with_bos else '', 'I', 'O', tokenizer.eos_token
        self.text = {color: str(color) for color in range(10)}
        self.text.update({ROW: '\n', IN: ask, OUT: answer, END: end, FIRST: start + ask})
        # what a text becomes depends on what stands before it: of each symbol, something that may
        pair = f"{start}{ask}1\n{answer}1\n"
        before = dict.fromkeys(range(10), start + ask)
        before.update({ROW: f"{start}{ask}1", OUT: f"{start}{ask}1\n", END: pair, IN: pair + end, FIRST: ''})
        self.ids = {x: self.tokens_after(before[x], text) for x, text in self.text.items()} # {symbol: its tokens}
        cells = [self.ids[x] for x in (*range(10), ROW)]
        firsts = {ids[0] for ids in cells} | {self.ids[END][0]}
        if set(map(len, cells)) != {1} or len(firsts) < 12:
            found = dict(zip((*range(10), 'ROW', 'END'), [*cells, self.ids[END]]))
            raise ValueError("the tokenizer of the base has not one token for each color and the end of a row: "
                             f"{found}")

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokens_after(self, before, text):
        """ tokens of a text that stands behind another. where they would melt into one, those that it has alone """
        a, b = self.tokens(before), self.tokens(before + text)
        if b[: len(a)] == a and len(b) > len(a):
            return b[len(a) :]
        return self.tokens(text)

    def write(self, symbols):
        """ symbols of a document, from IN on -> its text, and its tokens """
        text, ids = "", []
        for x in [FIRST, *symbols[1:]]:
            text += self.text[x]
            ids += self.ids[x]
        return text, ids

    def differs(self, documents):
        """ where the tokenizer itself would write the text of one of these documents in other tokens, '' = nowhere """
        names = self.tokenizer.convert_ids_to_tokens
        for symbols in documents:
            text, ids = self.write(symbols)
            want = self.tokens(text)
            if want != ids:
                n = 0
                while n < min(len(want), len(ids)) and want[n] == ids[n]:
                    n += 1
                return f"{names(want[n : n + 3])} for {names(ids[n : n + 3])}"
        return ''

def chat_pieces(tokenizer):
    """
    the text that a chat template has before the first turn, before an input, before an answer and behind it. found by a
    talk of four marks. raises ValueError
    """
    marks = [f"@{i}@" for i in range(4)]
    roles = 'user', 'assistant', 'user', 'assistant'
    messages = [{'role': role, 'content': mark} for role, mark in zip(roles, marks)]
    template = tokenizer.get_chat_template()
    template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", template) # today's date would be another text tomorrow
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    rest, parts = text, []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f"form='chat': the chat template of the base drops turns: {text!r}")
        parts.append(part)
    head, answer, between, again = parts
    end = rest
    ask = between.removeprefix(end)
    if not end or not between.startswith(end) or not head.endswith(ask) or again != answer:
        raise ValueError(f"form='chat': the turns of the base's chat template are not all alike: {text!r}")
    return head.removesuffix(ask), ask, answer, end

def random_documents(n, seed=0):
    """ n lists of symbols, documents of 1 to 3 pairs of random grids """
    rng, documents = np.random.default_rng(seed), []
    for _ in range(n):
        symbols = []
        for _ in range(rng.integers(1, 4)):
            x = rng.integers(0, 10, rng.integers(1, 12, 2))
            y = rng.integers(0, 10, rng.integers(1, 12, 2))
            tokens, _ = encode_pair(x, y)
            symbols += tokens
        documents.append(symbols)
    return documents

# -----------------------------------------------------------------------------
# the model

# given several tokens behind a cache, other recurrent models forget their state, Mamba-1 for one
TAKES_SEVERAL = 'falcon_h1', 'zamba2', 'granitemoehybrid', 'bamba', 'nemotron_h', 'lfm2', 'mamba2'
PADS = (*TAKES_SEVERAL, 'jamba') # told what is filler, they keep it out of their state
# peft refuses the layers called out_proj there: fused kernels go around the adapter
NO_OUT_PROJ = 'falcon_h1', 'mamba', 'mamba2', 'falcon_mamba', 'nemotron_h'

class Expanded(NamedTuple):
    """ (B, T) symbols as (B, t) tokens """
    ids: torch.Tensor # (B, t) tokens
    of: torch.Tensor # (B, t) number of the symbol that each token is of
    ends: torch.Tensor # (B, T) where the last token of each symbol stands
    k: torch.Tensor # (B, t) how many tokens of its symbol come before this one, < 0 on filler
    begins: torch.Tensor # (B, t) does a document begin here?

class LM(nn.Module):
    """
    a pretrained language model that is told and asked symbols: lm(*batch) -> logits (B, T, 16) and the loss, as for
    Model. a symbol of several tokens is as probable as all of them, its logit is that of its first. its state dict is
    what is trained, no more.
    """
    n_task = 0 # there is no task embedding
    blocks = () # that torch.compile could compile

    def __init__(self, cfg, base=None, tokenizer=None):
        super().__init__()
        if base is None:
            if cfg.base_sha256 and hash_base(cfg.base) != cfg.base_sha256:
                raise ValueError(f"base={cfg.base!r} is another model than the one that was fine-tuned: the sha256 of "
                                 f"its files differs (saved {cfg.base_sha256[:12]}, now {hash_base(cfg.base)[:12]})")
            base, tokenizer = read_base(cfg.base, getattr(torch, cfg.base_dtype))
        self.cfg, self.base, self.form = cfg, base, TextForm(tokenizer, cfg.form)
        self.look_at_base()
        odd = self.form.differs(random_documents(20))
        if odd:
            print(f"note: this tokenizer would write {odd}: it is given a token a symbol all the same, "
                  "which is not what it was pretrained on")
        ids = [self.form.ids.get(x, self.form.ids[ROW]) for x in range(VOCAB_SIZE)] # PAD is any token: nobody sees it
        self.kept = [] # tokens of the tokenizer whose rows embedding and head have, [] = all
        if cfg.shrink:
            self.kept = sorted({i for part in ids for i in part})
            ids = [list(map(self.kept.index, part)) for part in ids]
            shrink(base, self.kept)
        longest = max(map(len, ids))
        table = torch.tensor([part + [0] * (longest - len(part)) for part in ids])
        self.register_buffer('size', torch.tensor(list(map(len, ids))), persistent=False) # (16,) tokens of each symbol
        self.register_buffer('table', table, persistent=False) # (16, longest) and which
        base.requires_grad_(cfg.rank == 0)
        if cfg.rank > 0:
            self.add_adapters()
        if cfg.shrink:
            base.get_input_embeddings().weight.requires_grad_(True)
            base.get_output_embeddings().weight.requires_grad_(True)
        self.trained = []
        for name, p in self.named_parameters():
            if p.requires_grad:
                p.data = p.data.float()
                self.trained.append(name)
        if cfg.recompute:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})

    def look_at_base(self):
        """ what kind of model it is """
        from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin
        config = self.base.config
        layers = DynamicCache(config=config).layers
        # mamba and its like: transformers calls them linear attention
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self.takes_several = not self.recurrent or config.model_type in TAKES_SEVERAL
        accepted = inspect.signature(self.base.forward).parameters
        self.cache_name = 'cache_params' if 'cache_params' in accepted else 'past_key_values'
        self.takes_places = 'position_ids' in accepted
        # may prompts of several lengths go together?
        self.pads = self.takes_places and 'attention_mask' in accepted
        if self.recurrent:
            self.pads = config.model_type in PADS
        self.longest = config.to_dict().get('max_position_embeddings') or float('inf') # tokens that it knows places for
        self.dtype = self.base.dtype

    def add_adapters(self):
        """
        LoRA on every linear layer, but for the head, what peft refuses, and what would get no gradient: Mamba-1's scan
        takes dt_proj's weights past it, Zamba2 has adapters for other layers
        """
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D # GPT-2's linear layers
        refused = ['dt_proj']
        if self.base.config.model_type in NO_OUT_PROJ:
            refused.append('out_proj')
        names = []
        for name, m in self.base.named_modules():
            is_linear = isinstance(m, (nn.Linear, Conv1D)) and m is not self.base.get_output_embeddings()
            if is_linear and name.rpartition('.')[2] not in refused and 'adapter_list' not in name:
                names.append(name)
        cfg = self.cfg
        lora = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, use_rslora=cfg.rslora, target_modules=names)
        inject_adapter_in_model(lora, self.base)

    def share_out(self, device, world):
        """ frozen weights over all ranks, a layer at a time; what is trained each rank has, as DDP wants it """
        mesh = init_device_mesh(device.type, (world,))
        frozen = [name for name, _ in self.named_parameters() if name not in self.trained]
        ours = {p for p in self.parameters() if p.requires_grad}
        lists = [m for m in self.base.modules() if isinstance(m, nn.ModuleList)]
        for layer in max(lists, key=len):
            fully_shard(layer, mesh=mesh, ignored_params=ours)
        fully_shard(self.base, mesh=mesh, ignored_params=ours)
        frozen += [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    @property
    def device(self):
        return self.table.device

    def train(self, mode=True):
        """ the base stays as it is when it is asked: without dropout, without fused kernels """
        return super().train(False)

    def cache(self):
        return LMCache(self)

    def expand(self, idx, doc, begins, to_the_right=False):
        """
        (B, T) symbols, their documents or None -> Expanded. begins: does a document begin in column 0? e.g. in chat
        form, where IN, OUT and END take three tokens each, here a a a, o o o, e e e:

            symbols   IN     1  ROW  OUT    2  ROW  END
            tokens    a a a  1  \\n   o o o  2  \\n   e e e
            of        0 0 0  1  2    3 3 3  4  5    6 6 6
            k         0 1 2  0  0    0 1 2  0  0    0 1 2
            ends          2  3  4        7  8  9        12

        rows of fewer tokens end in filler; to_the_right: they begin with it, since prompts have to end together.
        """
        begun = torch.zeros_like(idx, dtype=torch.bool)
        begun[:, 0] = begins
        if doc is not None:
            begun[:, 1:] = doc[:, 1:] != doc[:, :-1]
        idx = torch.where(begun & (idx == IN), FIRST, idx)
        size = self.size[idx]
        ends = size.cumsum(1) - 1
        t = int(ends.max()) + 1 # waits for the device
        if to_the_right:
            ends = ends + (t - 1 - ends[:, -1:])
        place = torch.arange(t, device=idx.device).repeat(len(idx), 1) # (B, t)
        of = torch.searchsorted(ends, place) # the first symbol that does not end before
        of = of.clamp(max=idx.size(1) - 1) # filler behind is of the last one, nobody asks for it
        starts = ends - size + 1
        k = place - starts.gather(1, of)
        ids = self.table[idx.gather(1, of), k.clamp(0, self.table.size(1) - 1)]
        return Expanded(ids, of, ends, k, begun.gather(1, of) & (k == 0))

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        n = cache.n if cache is not None else 0 # tokens so far
        is_prompt = cache is not None and n == 0
        x = self.expand(idx, doc, n == 0, to_the_right=is_prompt)
        if is_prompt:
            x, place = self.begin_prompts(x, doc, cache)
        elif cache is not None and cache.real is not None:
            cache.real = F.pad(cache.real, (0, x.ids.size(1)), value=True)
            place = (cache.real.cumsum(1) - 1)[:, n:]
        else:
            place = torch.arange(n, n + x.ids.size(1), device=idx.device).expand_as(x.ids)
            if cache is None and doc is not None and doc.max() > 0: # packed. waits for the device
                place = self.places_in_documents(place, x.begins)
        if n > 0 and not self.takes_several:
            logits = [self.call(x.ids[:, i : i + 1], place[:, i : i + 1], cache) for i in range(x.ids.size(1))]
            logits = torch.cat(logits, 1)
        else:
            logits = self.call(x.ids, place, cache)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) # (B, t, its vocabulary)
        loss = None if targets is None else self.loss(logits, targets, x)
        last = x.ends[..., None].expand(-1, -1, logits.size(-1)) # the last token of a symbol foretells the next symbol
        return logits.gather(1, last)[..., self.table[:, 0]], loss

    def begin_prompts(self, x, doc, cache):
        """
        prompts that end together, filler in front -> the same less filler that all of them have, and their places
        """
        real = x.k >= 0
        if doc is not None:
            real = real & (doc.gather(1, x.of) > 0)
        place = torch.arange(x.ids.size(1), device=x.ids.device).expand_as(x.ids)
        if not real.all(): # waits for the device
            first = int(real.any(0).int().argmax())
            cache.real = real[:, first:]
            x = x._replace(ids=x.ids[:, first:], ends=(x.ends - first).clamp(min=0))
            place = (cache.real.cumsum(1) - 1).clamp(min=0)
        return x, place

    def places_in_documents(self, place, begins):
        """ (B, t) places in a row of several documents -> each document from 0: so transformers tells them apart """
        if self.recurrent or not self.takes_places:
            raise ValueError(f"batching='pack': {type(self.base).__name__} would carry its state from a document into "
                             "the next: --batching=bucket")
        return place - torch.where(begins, place, 0).cummax(1).values

    def loss(self, logits, targets, x):
        """ summed over all tokens of the symbols that are predicted """
        predicted = F.pad(targets[:, :-1] != -100, (1, 0)) # (B, T)
        asked = predicted.gather(1, x.of)
        asked &= torch.arange(x.ids.size(1), device=x.ids.device) <= x.ends[:, -1:] # no filler
        wanted = torch.where(asked, x.ids, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), reduction='sum')

    def call(self, ids, place, cache):
        """ tokens and their places -> logits over its own vocabulary """
        n = ids.size(1) + (cache.n if cache is not None else 0)
        if n > self.longest:
            raise ValueError(f"a document of {ids.size(1)} tokens: {type(self.base).__name__} knows places for "
                             f"{self.longest}: want a smaller --block_size")
        if self.cfg.recompute: # only what is in training computes again, and nothing else is to be
            for m in self.base.modules():
                if hasattr(m, 'gradient_checkpointing'):
                    m.training = torch.is_grad_enabled()
        kwargs = {}
        if self.takes_places:
            kwargs['position_ids'] = place
        if cache is not None:
            cache.n = n
            kwargs[self.cache_name] = cache.state
            if cache.real is not None:
                kwargs['attention_mask'] = cache.real[:, :n].long()
        autocast = contextlib.nullcontext()
        if self.dtype != torch.float32 and not torch.is_autocast_enabled(ids.device.type): # what is trained is fp32
            autocast = torch.autocast(ids.device.type, self.dtype)
        with autocast:
            return self.base(input_ids=ids, use_cache=cache is not None, **kwargs).logits

    def peak_rates(self, lr, adam_lr):
        """
        learning rates of the adapters, and of other weights: the rows of the vocabulary, or all. 0 = the usual ones
        """
        return lr or 3e-4, adam_lr or (1e-3 if self.cfg.rank > 0 else 5e-5)

    def optimizers(self, lr, adam_lr, weight_decay, ns_steps=0):
        """ -> [AdamW], of adapters at lr and of the rest at adam_lr """
        adapters, rest = [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                (adapters if '.lora_' in name else rest).append(p)
        groups = [{'params': adapters, 'lr': lr}, {'params': rest, 'lr': adam_lr}]
        groups = [group for group in groups if group['params']]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay)]

    def about(self):
        """ a line: what it is, and what memory training takes """
        weights = {}
        for x in [*self.parameters(), *self.buffers()]:
            x = x.to_local() if isinstance(x, DTensor) else x
            weights[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        again = ", and those of a layer that is computed again" if self.cfg.recompute else ""
        fixed, saved = sum(weights.values()) / 1e6, self.saved_bytes(weights) / 1e3
        return (f"{self.cfg.about()}: {trained:,} parameters are trained; memory: {fixed:,.0f} MB of weights, "
                f"{12 * trained / 1e6:,.0f} MB of gradients and AdamW's averages, {saved:,.0f} MB of activations for "
                f"each 1,000 tokens of a micro batch{again}")

    def saved_bytes(self, weights, n=512):
        """ bytes a token that backward needs, but for weights ({address: bytes}). counted on n tokens """
        saved, alive = {}, [] # by address. kept alive, or another tensor may get it
        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x
        symbols = [IN] + [0] * (n - 4) + [ROW, OUT, END]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self(torch.tensor([symbols], device=self.device))
        return sum(size for address, size in saved.items() if address not in weights) / n

    def state_dict(self):
        """ what is trained """
        return {name: p.detach() for name, p in self.named_parameters() if name in self.trained}

    def load_state_dict(self, state):
        super().load_state_dict(state, strict=False) # checkpoint.restore_model has compared the names

    def __deepcopy__(self, memo):
        """ a copy has what is trained of its own and shares the rest """
        memo[id(self.form)] = self.form
        for name, x in [*self.named_parameters(), *self.named_buffers()]:
            if name not in self.trained:
                memo[id(x)] = x
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

def shrink(base, kept):
    """ embedding and head of a model of transformers with the rows of these tokens alone, in this order """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embedding.weight
    kept = torch.tensor(kept, device=embedding.weight.device)
    for part in (embedding, head):
        part.weight = nn.Parameter(part.weight.detach()[kept].clone())
        if getattr(part, 'bias', None) is not None:
            part.bias = nn.Parameter(part.bias.detach()[kept].clone())
    embedding.num_embeddings, embedding.padding_idx = len(kept), None
    head.out_features = base.config.vocab_size = len(kept)
    if tied:
        head.weight = embedding.weight

class LMCache:
    """ as model.Cache, around that of transformers """

    def __init__(self, lm):
        from transformers import DynamicCache
        self.state = DynamicCache(config=lm.base.config)
        self.n = 0 # tokens so far
        self.real = None # (B, n) which of them are no filler, None = all

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 """
        self.state.reorder_cache(rows)
        if self.real is not None:
            self.real = self.real[rows]
