"""
fine-tuning a pretrained language model: `nanoarc finetune --base HUB_ID --data arc1/training --minutes 60 --out_dir out/lm`.
the corpus, the stream, the loop, the solver and the score are those of a model from scratch. each of our symbols is a piece of text,

    IN 1 2 ROW 3 4 ROW OUT 3 ROW 5 ROW END      "I12\\n34\\nO3\\n5\\n</s>"      form='raw': a digit a cell, a newline a row

and an LM is told and asked symbols as any Model here is: what it makes of them, tokens of its own, is its business alone.
colors and ROW are one token each, so a grid is as long for it as for us and the grammar of answers holds. embedding and head
keep only the rows of the tokens that the text form needs: a vocabulary of 50,000 costs as much as the rest of a small model.
"""
import contextlib
import copy
import hashlib
import inspect
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanoarc import checkpoint, solve, train
from nanoarc.data import END, IN, OUT, ROW, VOCAB_SIZE
from nanoarc.model import is_recent
from nanoarc.sources import read_json

FIRST = 15 # the unused token: the IN with which a document begins, it may have more text before it

@dataclass
class LMConfig:
    base: str = '' # the pretrained causal language model: an id on the Hugging Face hub, a directory, or a .gguf file
    form: str = 'raw' # a task as text: 'raw' = a digit a cell, a newline a row, short markers | 'chat' = so, an input a turn of the user in its chat template
    rank: int = 32 # of the LoRA adapters on every linear layer but the head (arxiv 2106.09685). 0 = all weights are trained
    alpha: float = 32.0 # what adapters say is scaled by alpha / rank, with rslora by alpha / sqrt(rank) (arxiv 2312.03732)
    rslora: bool = True
    shrink: bool = True # keep only the rows of embedding and head that the text form needs, and train them too
    recompute: bool = False # forget activations and compute them again (gradient checkpointing): less memory, a third slower
    shard: bool = False # under torchrun each rank holds its part of the frozen weights alone (FSDP2), for a base that fits into no single gpu
    base_dtype: str = 'auto' # of weights that are not trained: 'float32' | 'bfloat16' | 'float16' | 'auto' = bfloat16 on recent cuda, float16 on older, else float32
    base_sha256: str = '' # of its files, set when they are read first
    n_task: int = 0 # there is no task embedding
    vocab_size = VOCAB_SIZE # what it is told and asked: symbols. no setting

    def check(self, device, loss_on):
        """ raises ValueError that names the setting if one cannot train so """
        if self.rank < 0 or self.alpha <= 0 or self.base_dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
            raise ValueError(f"rank={self.rank} alpha={self.alpha} base_dtype={self.base_dtype!r}: want 0 or more, above 0, and auto, float32, bfloat16 or float16")

    def filled(self):
        return replace(self, base='', recompute=False, shard=False) # files may move, base_sha256 may not change

    def learning_rates(self, lr, adam_lr):
        """ of the adapters, and of other weights: the rows of the vocabulary, or all """
        return lr or 3e-4, adam_lr or (1e-3 if self.rank > 0 else 5e-5)

    def about(self):
        return f"{self.base}, as {self.form} text, " + (f"LoRA of rank {self.rank}" if self.rank > 0 else "all weights trained")

    def model(self, device, world=1):
        dtype = {'cuda': 'bfloat16' if is_recent(torch.device(device)) else 'float16'}.get(torch.device(device).type, 'float32') if self.base_dtype == 'auto' else self.base_dtype
        lm = LM(replace(self, base_dtype=dtype))
        if self.shard and world > 1:
            lm.share_out(torch.device(device), world)
        return lm.to(device)

# -----------------------------------------------------------------------------
# the base

@cache
def find_base(base):
    """ where the files of a base are -> (directory, name of the .gguf in it or None). downloads what is not here. raises ValueError """
    path = Path(base)
    if path.suffix == '.gguf' and path.is_file():
        return path.parent, path.name
    if (path / 'config.json').is_file():
        return path, None
    if path.exists() or base.startswith(('/', '.', '~')) or base.count('/') != 1:
        raise ValueError(f"base={base!r}: want a directory with a config.json, a .gguf file, or an id on the Hugging Face hub like 'tiiuae/Falcon-H1-0.5B-Base'")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(base, allow_patterns=['*.json', '*.safetensors', '*.model', '*.jinja', '*.txt'])), None
    except Exception as e: # no such model, no network, no permission: each of its libraries has errors of its own
        raise ValueError(f"base={base!r}: no such file, and from the Hugging Face hub: {str(e).splitlines()[0]}") from None

@cache
def hash_base(base):
    """ sha256 of the weights, the config and the tokenizer of a base """
    folder, gguf = find_base(base)
    names = 'config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'
    paths = [folder / gguf] if gguf else sorted([*folder.glob('*.safetensors'), *(folder / name for name in names if (folder / name).is_file())])
    if not any(path.suffix in ('.gguf', '.safetensors') for path in paths):
        raise ValueError(f"base={base!r}: no .safetensors in {folder}. other files of weights may hold code, nothing here reads them")
    lines = [f"{path.suffix if gguf else path.name} {checkpoint.file_sha256(path)}" for path in paths]
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
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval(), read_tokenizer(base)

# -----------------------------------------------------------------------------
# tasks as text

class TextForm:
    """ symbols -> pieces of text -> tokens of a tokenizer. raises ValueError if it has none for a color, or no end of a sequence """

    def __init__(self, tokenizer, form):
        self.tokenizer = tokenizer
        if not tokenizer.eos_token:
            raise ValueError("the tokenizer of the base has no end-of-sequence token, by which an answer would end")
        if form not in ('raw', 'chat') or (form == 'chat' and not tokenizer.chat_template):
            raise ValueError(f"form={form!r}: want raw or chat, the latter for a base that has a chat template")
        with_bos = tokenizer.bos_token_id is not None and tokenizer('I').input_ids[0] == tokenizer.bos_token_id
        start, ask, answer, end = chat_pieces(tokenizer) if form == 'chat' else (tokenizer.bos_token if with_bos else '', 'I', 'O', tokenizer.eos_token)
        self.text = {**{x: str(x) for x in range(10)}, ROW: '\n', IN: ask, OUT: answer, END: end, FIRST: start + ask}
        pair = f"{start}{ask}1\n{answer}1\n"
        before = {**dict.fromkeys(range(10), start + ask), ROW: f"{start}{ask}1", OUT: f"{start}{ask}1\n", END: pair, IN: pair + end, FIRST: ''}
        self.ids = {x: self.tokens_after(before[x], text) for x, text in self.text.items()} # {symbol: its tokens}
        cells = [self.ids[x] for x in (*range(10), ROW)]
        if {len(ids) for ids in cells} != {1} or len({ids[0] for ids in cells} | {self.ids[END][0]}) < 12:
            raise ValueError(f"the tokenizer of the base has not one token for each color and the end of a row: {dict(zip((*range(10), 'ROW', 'END'), [*cells, self.ids[END]]))}")

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokens_after(self, before, text):
        """ tokens of a text that stands behind another. where they would melt into one, those that it has alone """
        a, b = self.tokens(before), self.tokens(before + text)
        return b[len(a) :] if b[: len(a)] == a and len(b) > len(a) else self.tokens(text)

    def write(self, symbols):
        """ symbols of a document, from IN on -> its text, and its tokens """
        symbols = [FIRST, *symbols[1:]]
        return "".join(self.text[x] for x in symbols), [i for x in symbols for i in self.ids[x]]

    def differs(self, documents):
        """ where the tokenizer itself would write the text of one of these documents in other tokens, '' = nowhere """
        for symbols in documents:
            text, ids = self.write(symbols)
            want = self.tokens(text)
            if want != ids:
                n = next((n for n, (a, b) in enumerate(zip(want, ids)) if a != b), min(len(want), len(ids)))
                return f"{self.tokenizer.convert_ids_to_tokens(want[n : n + 3])} for {self.tokenizer.convert_ids_to_tokens(ids[n : n + 3])}"
        return ''

def chat_pieces(tokenizer):
    """ the text that a chat template has before the first turn, before an input, before an answer and behind it. raises ValueError """
    marks = [f"@{i}@" for i in range(4)]
    messages = [{'role': role, 'content': mark} for role, mark in zip(('user', 'assistant') * 2, marks)]
    template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", tokenizer.get_chat_template()) # today's date would be another text tomorrow
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    rest, parts = text, []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f"form='chat': the chat template of the base drops turns: {text!r}")
        parts.append(part)
    (head, answer, between, again), end = parts, rest
    ask = between.removeprefix(end)
    if not end or not between.startswith(end) or not head.endswith(ask) or again != answer:
        raise ValueError(f"form='chat': the turns of the base's chat template are not all alike: {text!r}")
    return head.removesuffix(ask), ask, answer, end

def random_documents(n, seed=0):
    """ n lists of symbols, documents of 1 to 3 pairs of random grids """
    rng, documents = np.random.default_rng(seed), []
    for _ in range(n):
        symbols = []
        for kind in (IN, OUT) * int(rng.integers(1, 4)):
            H, W = rng.integers(1, 12, 2)
            symbols += [kind, *np.concatenate([rng.integers(0, 10, (H, W)), np.full((H, 1), ROW)], 1).ravel().tolist()] + [END] * (kind == OUT)
        documents.append(symbols)
    return documents

# -----------------------------------------------------------------------------
# the model

TAKES_SEVERAL = ('falcon_h1', 'zamba2', 'granitemoehybrid', 'bamba', 'nemotron_h', 'lfm2', 'mamba2') # given several tokens behind a cache, other recurrent models forget their state, Mamba-1 for one
PADS = (*TAKES_SEVERAL, 'jamba') # told what is filler, they keep it out of their state
NO_OUT_PROJ = ('falcon_h1', 'mamba', 'mamba2', 'falcon_mamba', 'nemotron_h') # peft refuses these layers there: fused kernels go around the adapter

class LM(nn.Module):
    """
    a pretrained language model that is told and asked symbols: lm(*batch) -> logits (B, T, 16) and the loss, as for Model. a symbol of
    several tokens is as probable as all of them, its logit is that of its first. its state dict is what is trained, no more.
    """

    def __init__(self, cfg, base=None, tokenizer=None):
        from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin
        super().__init__()
        if base is None:
            if cfg.base_sha256 and hash_base(cfg.base) != cfg.base_sha256:
                raise ValueError(f"base={cfg.base!r} is another model than the one that was fine-tuned: the sha256 of its files differs (saved {cfg.base_sha256[:12]}, now {hash_base(cfg.base)[:12]})")
            base, tokenizer = read_base(cfg.base, getattr(torch, cfg.base_dtype))
        self.cfg, self.base, self.form, self.blocks = cfg, base, TextForm(tokenizer, cfg.form), () # no block is compiled
        self.dtype, self.longest = base.dtype, base.config.to_dict().get('max_position_embeddings') or float('inf') # tokens that it knows places for
        if odd := self.form.differs(random_documents(20)):
            print(f"note: this tokenizer would write {odd}: it is given a token a symbol all the same, which is not what it was pretrained on")
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=base.config).layers) # mamba and its like: what transformers calls linear attention
        accepted = inspect.signature(base.forward).parameters
        self.cache_name, self.takes_places = 'cache_params' if 'cache_params' in accepted else 'past_key_values', 'position_ids' in accepted
        self.pads = base.config.model_type in PADS if self.recurrent else self.takes_places and 'attention_mask' in accepted # may prompts of several lengths go together?
        ids = [self.form.ids.get(x, self.form.ids[ROW]) for x in range(VOCAB_SIZE)] # PAD is any token: nobody sees it
        kept = sorted({i for part in ids for i in part}) if cfg.shrink else []
        if cfg.shrink:
            ids = [[kept.index(i) for i in part] for part in ids]
            shrink(base, kept)
        self.kept = kept # tokens of the tokenizer whose rows embedding and head have
        self.register_buffer('size', torch.tensor([len(part) for part in ids]), persistent=False) # (16,) tokens of each symbol
        self.register_buffer('table', torch.tensor([part + [0] * (max(map(len, ids)) - len(part)) for part in ids]), persistent=False)
        base.requires_grad_(cfg.rank == 0)
        if cfg.rank > 0:
            self.add_adapters()
        if cfg.shrink:
            for part in (base.get_input_embeddings(), base.get_output_embeddings()):
                part.weight.requires_grad_(True)
        for p in self.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        self.trained = [name for name, p in self.named_parameters() if p.requires_grad]
        if cfg.recompute:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})

    def add_adapters(self):
        """ LoRA on every linear layer, but for the head, what peft refuses, and what would get no gradient: Mamba-1's scan takes dt_proj's weights past it, Zamba2 has adapters for other layers """
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D # GPT-2's linear layers
        head, refused = self.base.get_output_embeddings(), ('dt_proj', *(['out_proj'] if self.base.config.model_type in NO_OUT_PROJ else []))
        names = [name for name, m in self.base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head and name.rpartition('.')[2] not in refused and 'adapter_list' not in name]
        inject_adapter_in_model(LoraConfig(r=self.cfg.rank, lora_alpha=self.cfg.alpha, use_rslora=self.cfg.rslora, target_modules=names), self.base)

    def share_out(self, device, world):
        """ frozen weights over all ranks, a layer at a time; what is trained each rank has, as DistributedDataParallel wants it """
        mesh, frozen = init_device_mesh(device.type, (world,)), [name for name, _ in self.named_parameters() if name not in self.trained]
        ours = {p for p in self.parameters() if p.requires_grad}
        for layer in max((m for m in self.base.modules() if isinstance(m, nn.ModuleList)), key=len):
            fully_shard(layer, mesh=mesh, ignored_params=ours)
        fully_shard(self.base, mesh=mesh, ignored_params=ours)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen + [name for name, _ in self.named_buffers()])

    @property
    def device(self):
        return self.table.device

    def cache(self):
        return LMCache(self)

    def expand(self, idx, doc, begins, right=False):
        """
        (B, T) symbols, their documents or None, and does a document begin in column 0? -> (B, t) tokens, (B, t) the symbol by
        number that each is of, (B, T) where the last one of each symbol stands, (B, t) how many tokens of its symbol come before
        this one, < 0 for filler, (B, t) does a document begin here. right: rows of fewer tokens end with the others, and begin later
        """
        new = torch.zeros_like(idx, dtype=torch.bool)
        new[:, 0] = begins
        if doc is not None:
            new[:, 1:] = doc[:, 1:] != doc[:, :-1]
        idx = torch.where(new & (idx == IN), FIRST, idx)
        size = self.size[idx]
        ends = size.cumsum(1) - 1
        place = torch.arange(int(ends.max()) + 1, device=idx.device).repeat(len(idx), 1) # waits for the device
        if right:
            ends = ends + place[:, -1:] - ends[:, -1:]
        of = torch.searchsorted(ends, place).clamp(max=idx.size(1) - 1) # otherwise rows that are shorter end in tokens that nobody asks for
        k = place - (ends - size + 1).gather(1, of)
        return self.table[idx.gather(1, of), k.clamp(0, self.table.size(1) - 1)], of, ends, k, new.gather(1, of) & (k == 0)

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        n = cache.n if cache is not None else 0
        ids, of, ends, k, new = self.expand(idx, doc, n == 0, right=cache is not None and n == 0)
        place = torch.arange(n, n + ids.size(1), device=ids.device).expand_as(ids)
        if cache is not None and n == 0:
            real = k >= 0 if doc is None else (k >= 0) & (doc.gather(1, of) > 0) # no filler
            if not real.all(): # waits for the device
                first = int(real.any(0).int().argmax()) # filler of all rows is none
                cache.real, ids, ends = real[:, first:], ids[:, first:], ends - first
                place = (cache.real.cumsum(1) - 1).clamp(min=0)
        elif cache is not None and cache.real is not None:
            cache.real = F.pad(cache.real, (0, ids.size(1)), value=True)
            place = (cache.real.cumsum(1) - 1)[:, n:]
        elif doc is not None and doc.max() > 0: # packed. waits for the device
            if self.recurrent or not self.takes_places:
                raise ValueError(f"batching='pack': {type(self.base).__name__} would carry its state from a document into the next: --batching=bucket")
            place = place - torch.where(new, place, 0).cummax(1).values # begins anew: so transformers' attention tells documents apart
        steps = 1 if n > 0 and self.recurrent and self.base.config.model_type not in TAKES_SEVERAL else ids.size(1)
        logits = torch.cat([self.call(*part, cache) for part in zip(ids.split(steps, 1), place.split(steps, 1))], 1)
        logits, loss = logits.to(torch.promote_types(logits.dtype, torch.float32)), None # (B, t, its vocabulary)
        if targets is not None:
            asked = F.pad(targets[:, :-1] != -100, (1, 0)).gather(1, of) # (B, t) is this token of a symbol that is predicted?
            asked &= torch.arange(ids.size(1), device=ids.device) <= ends[:, -1:] # and is it there at all?
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.where(asked, ids, -100)[:, 1:].flatten(), reduction='sum')
        return logits.gather(1, ends[..., None].expand(-1, -1, logits.size(-1)))[..., self.table[:, 0]], loss

    def call(self, ids, place, cache):
        """ tokens and their places -> logits over its own vocabulary """
        kwargs = {'position_ids': place} if self.takes_places else {}
        if ids.size(1) + (cache.n if cache is not None else 0) > self.longest:
            raise ValueError(f"a document of {ids.size(1)} tokens: {type(self.base).__name__} knows places for {self.longest}: want a smaller --block_size")
        for m in self.base.modules() if self.cfg.recompute else (): # those layers alone, or dropout and fused kernels would come to life
            if hasattr(m, 'gradient_checkpointing'):
                m.training = torch.is_grad_enabled()
        if cache is not None:
            kwargs[self.cache_name], cache.n = cache.state, cache.n + ids.size(1)
            if cache.real is not None:
                kwargs['attention_mask'] = cache.real[:, : cache.n].long()
        half = self.dtype != torch.float32 and not torch.is_autocast_enabled(ids.device.type) # what is trained is fp32 all the same
        with torch.autocast(ids.device.type, self.dtype) if half else contextlib.nullcontext():
            return self.base(input_ids=ids, use_cache=cache is not None, **kwargs).logits

    def optimizers(self, lr, adam_lr, weight_decay, ns_steps=0):
        """ -> [AdamW], of adapters at lr and of the rest at adam_lr """
        groups = {'adapters': [], 'rest': []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups['adapters' if '.lora_' in name else 'rest'].append(p)
        groups = [{'params': groups['adapters'], 'lr': lr}, {'params': groups['rest'], 'lr': adam_lr}]
        return [torch.optim.AdamW([group for group in groups if group['params']], betas=(0.9, 0.95), weight_decay=weight_decay)]

    def about(self):
        """ a line: what it is, and what memory training takes. activations by counting those of 512 tokens """
        weights = [x.to_local() if isinstance(x, DTensor) else x for x in [*self.parameters(), *self.buffers()]]
        weights = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in weights}
        saved, alive = {}, [] # what backward would need, by storage. kept alive, or another tensor may get its address
        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self(torch.tensor([[IN, *[0] * 508, ROW, OUT, END]], device=self.device))
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        token = sum(n for at, n in saved.items() if at not in weights) / 512
        return (f"{self.cfg.about()}: {trained:,} parameters are trained; memory: {sum(weights.values()) / 1e6:,.0f} MB of weights, {12 * trained / 1e6:,.0f} MB of gradients and AdamW's "
                f"averages, {token / 1e3:,.0f} MB of activations for each 1,000 tokens of a micro batch" + (", and those of a layer that is computed again" if self.cfg.recompute else ""))

    def state_dict(self):
        """ what is trained """
        return {name: p.detach() for name, p in self.named_parameters() if name in self.trained}

    def load_state_dict(self, state):
        super().load_state_dict(state, strict=False) # checkpoint.restore_model has compared the names

    def __deepcopy__(self, memo):
        """ a copy has what is trained of its own and shares the rest """
        memo[id(self.form)] = self.form
        memo.update({id(x): x for name, x in [*self.named_parameters(), *self.named_buffers()] if name not in self.trained})
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

def shrink(base, kept):
    """ embedding and head of a model of transformers with the rows of these tokens alone, in this order """
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    kept = torch.tensor(kept, device=base.get_input_embeddings().weight.device)
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        part.weight = nn.Parameter(part.weight.detach()[kept].clone())
        if getattr(part, 'bias', None) is not None:
            part.bias = nn.Parameter(part.bias.detach()[kept].clone())
    base.get_input_embeddings().num_embeddings, base.get_input_embeddings().padding_idx = len(kept), None
    base.get_output_embeddings().out_features = base.config.vocab_size = len(kept)
    if tied:
        base.get_output_embeddings().weight = base.get_input_embeddings().weight

class LMCache:
    """ as model.Cache, around that of transformers """

    def __init__(self, lm):
        from transformers import DynamicCache
        self.state, self.n, self.real = DynamicCache(config=lm.base.config), 0, None # tokens so far, and which of them are no filler, (B, n) or None = all

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 """
        self.state.reorder_cache(rows)
        self.real = self.real if self.real is None else self.real[rows]

# -----------------------------------------------------------------------------

@dataclass
class ExportConfig:
    run: Annotated[str, tyro.conf.Positional] # out_dir of a fine-tuning
    out: str # the directory to write
    data: str = '' # a source that the run's submission.json answers, for the score in the model card
    push_to_hub: str = '' # an id on the Hugging Face hub to upload it to, too

def export(cfg):
    """ a fine-tuned run -> a directory that transformers loads by itself: adapters merged, the rows of the vocabulary back in their places, the tokenizer, a model card """
    if Path(cfg.out).exists():
        raise ValueError(f"{cfg.out} is there already, choose another --out")
    tensors, meta = checkpoint.load(cfg.run)
    lm_cfg, data_cfg = train.configs(meta)
    if not isinstance(lm_cfg, LMConfig):
        raise ValueError(f"{cfg.run}: not a run of nanoarc finetune")
    lm = LM(replace(lm_cfg, base_dtype='float32'))
    checkpoint.restore_model(lm, tensors, checkpoint.best_part(meta))
    full, tokenizer = read_base(lm_cfg.base, torch.float32 if lm_cfg.base.endswith('.gguf') else 'auto')
    for m in lm.base.modules():
        if hasattr(m, 'merge') and hasattr(m, 'lora_A'):
            m.merge()
    found = {name.replace('.base_layer', ''): p for name, p in lm.base.named_parameters() if '.lora_' not in name}
    with torch.no_grad():
        for name, p in full.named_parameters():
            p[lm.kept if found[name].shape != p.shape else slice(None)] = found[name].to(p.dtype)
    if lm_cfg.base.endswith('.gguf'): # it is not quantized any more
        del full.config.quantization_config
    full.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    name = Path(lm_cfg.base).name if Path(lm_cfg.base).exists() else lm_cfg.base # where it lies here is nobody's business
    lines = [f"fine-tuned from `{name}` by nanoarc on `{data_cfg.data}`" + (f" and the demos of `{data_cfg.adapt}`" if data_cfg.adapt else "") + ".", "",
             f"- {meta['step']} steps, {meta['tokens']:,} tokens, {replace(lm_cfg, base=name).about()}",
             f"- {meta['val_loss']:.4f} nats per output token on held out queries" if meta['val_loss'] is not None else "- no validation"]
    if cfg.data:
        result = solve.score(read_json(Path(cfg.run) / 'submission.json'), solve.read_fitting(cfg.data, data_cfg.max_pair, opened=True)[1])
        leaks = read_json(Path(cfg.run) / 'solve.json')['leaks']
        lines.append(f"- {cfg.data}: {result['score']:.2f}% by the official rule, {result['solved']} of {result['tasks']} tasks with every output right in one of two attempts"
                     + (f", TRAINED ON {len(leaks)} OF THE ANSWERS" if leaks else "") + ". what the base has read before, nobody checks: ARC-AGI-1 has been public since 2019")
    form = "".join(lm.form.text[x] for x in (FIRST, 1, 2, ROW, 3, 4, ROW, OUT, 5, ROW, END))
    card = f"---\n{f'base_model: {name}' if name == lm_cfg.base else 'library_name: transformers'}\ntags: [arc-agi, nanoarc]\n---\n" + "\n".join([*lines, "", "A pair is written so, demos first, the query last, and its answer is asked for behind the last marker:", "", "```", form, "```", ""])
    checkpoint.write_file(Path(cfg.out) / 'README.md', card.encode())
    if cfg.push_to_hub:
        from huggingface_hub import HfApi
        HfApi().create_repo(cfg.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=cfg.push_to_hub, folder_path=cfg.out)

def main(cfg, lm_cfg, data_cfg, draw=None):
    """ fine-tune to the end -> the meta data of the last checkpoint. raises as train.main """
    if not lm_cfg.base:
        raise ValueError("want a --base: an id on the Hugging Face hub, a directory or a .gguf file")
    if data_cfg.shots == 0:
        raise ValueError("shots=0: a language model has no task embedding, it learns from the demos before the query: --shots=-1")
    if cfg.compile == 'on':
        raise ValueError("compile='on': a language model of transformers is run as it is")
    if lm_cfg.shard and (cfg.ema > 0 or cfg.draw_every > 0):
        raise ValueError(f"shard: ema={cfg.ema} draw_every={cfg.draw_every}: averages and pictures want a whole model on one rank, --ema=0 --draw_every=0")
    return train.main(cfg, replace(lm_cfg, base_sha256=lm_cfg.base_sha256 or hash_base(lm_cfg.base)), data_cfg, draw)

if __name__ == '__main__':
    from nanoarc.cli import main as cli
    cli(['finetune', *sys.argv[1:]])
