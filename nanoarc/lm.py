"""
a pretrained language model that reads and writes our symbols. each symbol is a piece of text:

    IN 1 2 ROW 3 4 ROW OUT 3 ROW 5 ROW END
    "I12\\n34\\nO3\\n5\\n</s>"               form='raw': a digit a cell, a newline a row

from outside an LM looks like model.Model: symbols go in, logits of symbols come out. inside it turns them into tokens
of its own. a color and a ROW are one token each, so a grid has as many tokens there as here, and the grammar of answers
holds. embedding and head keep only the rows of tokens that the text form needs: a vocabulary of 50,000 costs as much as
the rest of a small model.
"""
import contextlib
import copy
import hashlib
import inspect
import re
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from nanoarc.corpus import a_few, hash_file
from nanoarc.grids import END, IN, OUT, ROW, VOCAB_SIZE, encode_pair
from nanoarc.model import is_recent
from nanoarc.settings import check_numbers

FIRST = 15 # the unused symbol stands for the IN that begins a document: there may be more text before it

@dataclass
class LMConfig:
    # the pretrained causal language model: an id on the Hugging Face hub, a directory, or a .gguf file
    base: str = ''
    # a task as text: 'raw' = a digit a cell, a newline a row, short markers | 'chat' = grids as in raw, each input a
    # turn of the user, each output one of the assistant
    form: str = 'raw'
    # rank of the LoRA adapters on every linear layer but the head (arxiv 2106.09685). 0 = all weights are trained
    rank: int = 32
    # the output of an adapter is scaled by alpha / rank, with rslora by alpha / sqrt(rank) (arxiv 2312.03732)
    alpha: float = 32.0
    rslora: bool = True # see alpha
    shrink: bool = True # keep only the rows of embedding and head that the text form needs, and train them too
    # forget activations and compute them again in backward (gradient checkpointing): less memory, a third slower
    recompute: bool = False
    # under torchrun each rank holds a part of the frozen weights (FSDP2), for a base that fits into no single gpu
    shard: bool = False
    base_dtype: str = 'auto' # of the frozen weights, as dtype
    base_sha256: str = '' # of the files of the base, set when they are first read

    def check(self):
        """ raises ValueError that names the setting """
        check_numbers(self)
        if self.alpha == 0:
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
        cfg = replace(cfg, base_dtype=auto_dtype(device))
    lm = LM(cfg)
    if cfg.shard and world > 1:
        lm.share_out(device, world)
    return lm.to(device)

def auto_dtype(device):
    """ the name of the dtype that a device is fast in """
    if device.type != 'cuda':
        return 'float32'
    return 'bfloat16' if is_recent(device) else 'float16'

# -----------------------------------------------------------------------------
# the base

@cache
def find_base(base):
    """ where the files of a base are -> (directory, name of the .gguf or None). downloads them. raises ValueError """
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
        lines = [f".gguf {hash_file(folder / gguf)}"] # whatever it is called
    else:
        paths = list(folder.glob('*.safetensors'))
        if len(paths) == 0:
            raise ValueError(f"base={base!r}: no .safetensors in {folder}. other files of weights may hold code, "
                             "nothing here reads them")
        for name in ('config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
                     'special_tokens_map.json', 'chat_template.jinja'):
            if (folder / name).is_file():
                paths.append(folder / name)
        lines = [f"{path.name} {hash_file(path)}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

def read_tokenizer(base):
    """ -> its tokenizer, of transformers """
    from transformers import AutoTokenizer
    folder, gguf = find_base(base)
    kwargs = {'gguf_file': gguf} if gguf else {}
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **kwargs)

def read_base(base, dtype):
    """ -> (causal language model of transformers in eval mode, its tokenizer). raises ValueError """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    disable_progress_bar()
    set_verbosity_error() # its report of a load is our lines below
    folder, gguf = find_base(base)
    if (folder / 'adapter_config.json').is_file():
        raise ValueError(f"base={base!r}: an adapter of peft, want a model that it was merged into")
    kwargs = {'gguf_file': gguf} if gguf else {'use_safetensors': True}
    kwargs.update(dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        tokenizer = read_tokenizer(base)
    except Exception as e: # not a model, damaged, of another version: each of its libraries has errors of its own
        if 'trust_remote_code' in str(e):
            raise ValueError(f"base={base!r}: it comes with code of its own, which nothing here runs, and transformers "
                             "does not know it otherwise") from None
        error = textwrap.shorten(f"{type(e).__name__}: {e}", 200, placeholder=" ...")
        raise ValueError(f"base={base!r}: transformers cannot read it, {error}") from None
    # transformers fills these with random numbers
    wrong = [f"{name} is missing" for name in sorted(info['missing_keys'])]
    for name, saved, wanted in sorted(info['mismatched_keys']):
        wrong.append(f"{name} is {tuple(saved)}, want {tuple(wanted)}")
    if wrong:
        raise ValueError(f"base={base!r}: {a_few(wrong, 3)}")
    if info['unexpected_keys']:
        print(f"note: transformers does not use these of the base: {a_few(sorted(info['unexpected_keys']), 3)}")
    return model.eval(), tokenizer

def cache_name(model):
    """ what a model of transformers calls its cache: `cache` since 5.24. raises ValueError """
    accepted = inspect.signature(model.forward).parameters
    for name in ('cache', 'cache_params', 'past_key_values'): # another name would be swallowed without a word
        if name in accepted:
            return name
    raise ValueError(f"{type(model).__name__}: this version of transformers takes no cache under a name known here")

# -----------------------------------------------------------------------------
# tasks as text

class TextForm:
    """
    symbols -> pieces of text -> tokens of a tokenizer. text: {symbol: its piece}, ids: {symbol: its list of tokens}.
    raises ValueError if a color or the end of a row is not one token, or if there is no end-of-sequence token
    """

    def __init__(self, tokenizer, form):
        self.tokenizer = tokenizer
        if not tokenizer.eos_token:
            raise ValueError("the tokenizer of the base has no end-of-sequence token, by which an answer would end")
        if form not in ('raw', 'chat') or (form == 'chat' and not tokenizer.chat_template):
            raise ValueError(f"form={form!r}: want raw or chat, the latter for a base that has a chat template")
        if form == 'chat':
            start, ask, answer, end = chat_pieces(tokenizer)
        else:
            start, ask, answer, end = '', 'I', 'O', tokenizer.eos_token
            bos = tokenizer.bos_token_id
            if bos is not None and tokenizer('I').input_ids[0] == bos: # the base is used to one before a text
                start = tokenizer.bos_token
        digits = {color: str(color) for color in range(10)}
        self.text = {**digits, ROW: '\n', IN: ask, OUT: answer, END: end, FIRST: start + ask}
        # the tokens of a piece depend on the text before it. so each symbol gets an example of what may stand there
        pair = f"{start}{ask}1\n{answer}1\n"
        before = {color: start + ask for color in range(10)}
        before.update({ROW: f"{start}{ask}1", OUT: f"{start}{ask}1\n", END: pair, IN: pair + end, FIRST: ''})
        self.ids = {x: self.tokens_after(before[x], text) for x, text in self.text.items()}
        answers = {x: self.ids[x] for x in (*range(10), ROW, END)} # an answer is made of these
        firsts = {ids[0] for ids in answers.values() if ids} # by which they are told apart
        if len(firsts) < 12 or any(len(self.ids[x]) != 1 for x in (*range(10), ROW)):
            raise ValueError("the tokenizer of the base has not one token for each color and the end of a row, symbols "
                             f"and their tokens: {answers}")

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokens_after(self, before, text):
        """ the tokens of a text that stands behind another. if the two melt into one token: those of the text alone """
        a, b = self.tokens(before), self.tokens(before + text)
        if b[: len(a)] == a and len(b) > len(a):
            return b[len(a) :]
        return self.tokens(text)

    def write(self, symbols):
        """ the symbols of a document, from IN on -> its text, its tokens """
        text, ids = "", []
        for x in [FIRST, *symbols[1:]]:
            text += self.text[x]
            ids += self.ids[x]
        return text, ids

    def differs(self, documents):
        """ where the tokenizer would write one of these documents in other tokens than we do, '' = nowhere """
        names = self.tokenizer.convert_ids_to_tokens
        for symbols in documents:
            text, ids = self.write(symbols)
            want = self.tokens(text)
            for n, (a, b) in enumerate(zip(want, ids)):
                if a != b:
                    return f"{names(want[n : n + 3])} for {names(ids[n : n + 3])}"
        return ''

def chat_pieces(tokenizer):
    """
    the text that a chat template puts before the first turn, before an input, before an answer, and behind either.
    found by a talk of four turns that say @0@ to @3@. raises ValueError
    """
    marks = [f"@{i}@" for i in range(4)]
    roles = 'user', 'assistant', 'user', 'assistant'
    messages = [{'role': role, 'content': mark} for role, mark in zip(roles, marks)]
    template = tokenizer.get_chat_template()
    template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", template) # today's date would be another text tomorrow
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    if re.findall(r"@\d@", text) != marks:
        raise ValueError(f"form='chat': the chat template of the base drops turns: {text!r}")
    head, answer, between, again, end = re.split(r"@\d@", text)
    ask = between.removeprefix(end)
    if not end or not between.startswith(end) or not head.endswith(ask) or again != answer:
        raise ValueError(f"form='chat': the turns of the base's chat template are not all alike: {text!r}")
    return head.removesuffix(ask), ask, answer, end

def random_documents(n, seed=0):
    """ n lists of symbols, documents of 1 to 3 pairs of random grids """
    rng = np.random.default_rng(seed)
    documents = []
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

# recurrent models that go on from their cache by several tokens at once. others forget their state, Mamba-1 for one
TAKES_SEVERAL = 'falcon_h1', 'zamba2', 'granitemoehybrid', 'bamba', 'nemotron_h', 'lfm2', 'mamba2'
PADS = (*TAKES_SEVERAL, 'jamba') # recurrent models that keep filler out of their state, if a mask says where it is
# peft refuses the layers called out_proj in these: their fused kernels would go around the adapter
NO_OUT_PROJ = 'falcon_h1', 'mamba', 'mamba2', 'falcon_mamba', 'nemotron_h'

class Expanded(NamedTuple):
    """ (B, T) symbols as (B, t) tokens. LM.expand has an example """
    ids: torch.Tensor # (B, t) tokens
    of: torch.Tensor # (B, t) the number 0..T-1 of the symbol that a token belongs to
    ends: torch.Tensor # (B, T) where the last token of each symbol stands
    k: torch.Tensor # (B, t) how many tokens of its symbol come before a token, < 0 on filler in front
    begins: torch.Tensor # (B, t) bool, is it the first token of a document?

class LM(nn.Module):
    """
    a pretrained language model that reads and writes symbols: lm(*batch) -> logits (B, T, 16) and the loss, as for
    model.Model. the logit of a symbol is that of its first token, the loss counts all of its tokens. the state dict
    holds what is trained, no more.
    """
    n_task = 0 # there is no task embedding
    blocks = () # nothing for torch.compile

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
        ids = [self.form.ids.get(x, self.form.ids[ROW]) for x in range(VOCAB_SIZE)] # for PAD any: nobody sees it
        self.kept = [] # the tokens whose rows are left in embedding and head, [] = all
        if cfg.shrink:
            self.kept = sorted(set().union(*ids))
            ids = [list(map(self.kept.index, part)) for part in ids] # from here on a token is the number of its row
            shrink(base, self.kept)
        size = torch.tensor([len(part) for part in ids])
        table = pad_sequence([torch.tensor(part) for part in ids], batch_first=True)
        self.register_buffer('size', size, persistent=False) # (16,) how many tokens each symbol is
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
        """ what the base is, and what it can take """
        from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin
        config = self.base.config
        layers = DynamicCache(config=config).layers
        # mamba and its like: transformers calls them linear attention
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self.takes_several = not self.recurrent or config.model_type in TAKES_SEVERAL
        accepted = inspect.signature(self.base.forward).parameters
        self.cache_name = cache_name(self.base)
        self.takes_places = 'position_ids' in accepted
        # may prompts of several lengths go together?
        self.pads = self.takes_places and 'attention_mask' in accepted
        if self.recurrent:
            self.pads = config.model_type in PADS
        self.longest = config.to_dict().get('max_position_embeddings') or float('inf') # the most tokens it can place
        self.dtype = self.base.dtype

    def add_adapters(self):
        """
        LoRA on every linear layer but the head, what peft refuses, and what would get no gradient: Mamba-1's scan reads
        the weights of dt_proj directly, and Zamba2 has a list of adapters of its own, each used in some layers only
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
        """ the frozen weights shared out over all ranks, layer by layer. what is trained stays whole, for DDP """
        from torch.distributed.fsdp import fully_shard
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
        """ eval mode all the same: no dropout, no fused kernels, and the base answers in training as it does later """
        return super().train(False)

    def cache(self):
        return LMCache(self)

    def expand(self, idx, doc, begins, to_the_right=False):
        """
        (B, T) symbols, (B, T) the documents they are of or None -> Expanded. begins: does a document begin in column 0?
        e.g. in chat form, where IN, OUT and END are three tokens each, here a a a, o o o, e e e:

            symbols   IN     1  ROW  OUT    2  ROW  END
            tokens    a a a  1  \\n   o o o  2  \\n   e e e
            of        0 0 0  1  2    3 3 3  4  5    6 6 6
            k         0 1 2  0  0    0 1 2  0  0    0 1 2
            ends          2  3  4        7  8  9        12

        rows of fewer tokens than others end in filler. to_the_right: they begin with it, for prompts must end together.
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
        starts = ends - size + 1
        place = torch.arange(t, device=idx.device).repeat(len(idx), 1) # (B, t)
        of = torch.searchsorted(ends, place) # the first symbol that does not end before
        of = of.clamp(max=idx.size(1) - 1) # filler at the end counts as the last symbol, its logits are not used
        k = place - starts.gather(1, of)
        ids = self.table[idx.gather(1, of), k.clamp(0, self.table.size(1) - 1)]
        return Expanded(ids, of, ends, k, begun.gather(1, of) & (k == 0))

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        """ as model.Model, but pos, task and dihedral are of no use to a base """
        n = cache.n if cache is not None else 0 # tokens so far
        is_prompt = cache is not None and n == 0
        x = self.expand(idx, doc, n == 0, to_the_right=is_prompt)
        # (B, t) place: of each token in its document, filler not counted
        if is_prompt:
            x, place = self.begin_prompts(x, doc, cache)
        elif cache is not None and cache.real is not None: # the prompts began with filler
            cache.real = F.pad(cache.real, (0, x.ids.size(1)), value=True)
            place = (cache.real.cumsum(1) - 1)[:, n:]
        else:
            place = torch.arange(n, n + x.ids.size(1), device=idx.device).expand_as(x.ids)
            if cache is None and doc is not None and doc.max() > 0: # several documents a row. waits for the device
                place = self.places_in_documents(place, x.begins)
        if n > 0 and not self.takes_several:
            logits = [self.call(x.ids[:, i : i + 1], place[:, i : i + 1], cache) for i in range(x.ids.size(1))]
            logits = torch.cat(logits, 1)
        else:
            logits = self.call(x.ids, place, cache)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) # (B, t, its vocabulary)
        loss = None if targets is None else self.loss(logits, targets, x)
        # at the last token of a symbol it says what the first token of the next one is
        last = x.ends[..., None].expand(-1, -1, logits.size(-1))
        first = self.table[:, 0] # (16,) of each symbol
        return logits.gather(1, last)[..., first], loss

    def begin_prompts(self, x, doc, cache):
        """
        prompts that end together, with filler in front -> Expanded without the filler that all rows have, (B, t) places
        """
        real = x.k >= 0 # no filler
        if doc is not None:
            real = real & (doc.gather(1, x.of) > 0)
        place = torch.arange(x.ids.size(1), device=x.ids.device).expand_as(x.ids)
        if not real.all(): # waits for the device
            first = int(real.any(0).int().argmax()) # where the longest prompt begins
            cache.real = real[:, first:]
            x = x._replace(ids=x.ids[:, first:], ends=(x.ends - first).clamp(min=0))
            place = (cache.real.cumsum(1) - 1).clamp(min=0)
        return x, place

    def places_in_documents(self, place, begins):
        """
        (B, t) places in a row of several documents -> (B, t) in each document from 0 on: by these attention in
        transformers keeps documents apart. e.g. 0 1 2 3 4, of which 0 and 3 begin a document -> 0 1 2 0 1
        """
        if self.recurrent or not self.takes_places:
            raise ValueError(f"batching='pack': {type(self.base).__name__} would carry its state from a document into "
                             "the next: --batching=bucket")
        # less the place where the document of each token began
        return place - torch.where(begins, place, 0).cummax(1).values

    def loss(self, logits, targets, x):
        """ summed over all tokens of the symbols that carry loss """
        predicted = F.pad(targets[:, :-1] >= 0, (1, 0)) # (B, T) is this symbol the target of the one before?
        asked = predicted.gather(1, x.of) # (B, t)
        asked &= torch.arange(x.ids.size(1), device=x.ids.device) <= x.ends[:, -1:] # no filler
        wanted = torch.where(asked, x.ids, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), reduction='sum')

    def call(self, ids, place, cache):
        """ (B, t) tokens and their places -> logits over the base's own vocabulary """
        n = ids.size(1) + (cache.n if cache is not None else 0) # tokens, with these
        if n > self.longest:
            raise ValueError(f"a document of {ids.size(1)} tokens: {type(self.base).__name__} knows places for "
                             f"{self.longest}: want a smaller --block_size")
        if self.cfg.recompute: # transformers does so in training mode alone. only these layers get into it
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
        # what is trained is fp32, the rest may not be
        if self.dtype != torch.float32 and not torch.is_autocast_enabled(ids.device.type):
            autocast = torch.autocast(ids.device.type, self.dtype)
        with autocast:
            return self.base(input_ids=ids, use_cache=cache is not None, **kwargs).logits

    def peak_rates(self, lr, adam_lr):
        """ learning rates of the adapters and of all else that is trained, 0 = the usual ones """
        return lr or 3e-4, adam_lr or (1e-3 if self.cfg.rank > 0 else 5e-5)

    def optimizers(self, lr, adam_lr, weight_decay, ns_steps=0):
        """ -> [AdamW], of adapters at lr and of the rest at adam_lr """
        adapters, rest = [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                part = adapters if '.lora_' in name else rest
                part.append(p)
        groups = [{'params': adapters, 'lr': lr}, {'params': rest, 'lr': adam_lr}]
        groups = [group for group in groups if group['params']]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay)]

    def about(self):
        """ a line: what it is, and what memory training takes """
        sizes = {} # {address: bytes} of the weights
        for x in [*self.parameters(), *self.buffers()]:
            storage = (x.to_local() if hasattr(x, 'to_local') else x).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        weights, states = sum(sizes.values()) / 1e6, 12 * trained / 1e6 # a gradient and two averages, 4 bytes each
        activations = self.saved_bytes(sizes) / 1e3
        again = ", and those of a layer that is computed again" if self.cfg.recompute else ""
        return (f"{self.cfg.about()}: {trained:,} parameters are trained; memory: {weights:,.0f} MB of weights, "
                f"{states:,.0f} MB of gradients and AdamW's averages, {activations:,.0f} MB of activations for each "
                f"1,000 tokens of a micro batch{again}")

    def saved_bytes(self, weights, n=512):
        """ the bytes a token that a forward pass of n tokens keeps for backward, less weights ({address: bytes}) """
        saved, alive = {}, [] # {address: bytes}. tensors are kept alive, or two of them may have the same address
        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x
        symbols = [IN] + [0] * (n - 4) + [ROW, OUT, END]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self(torch.tensor([symbols], device=self.device))
        return sum(size for address, size in saved.items() if address not in weights) / n

    def state_dict(self):
        """ {name: tensor} of what is trained """
        return {name: p.detach() for name, p in self.named_parameters() if name in self.trained}

    def load_state_dict(self, state):
        super().load_state_dict(state, strict=False) # checkpoint.restore_model has compared the names

    def __deepcopy__(self, memo):
        """ a copy has what is trained for itself and shares the rest """
        memo[id(self.form)] = self.form
        for name, x in [*self.named_parameters(), *self.named_buffers()]:
            if name not in self.trained:
                memo[id(x)] = x
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

def shrink(base, kept):
    """ leaves the rows of these tokens in embedding and head of a model of transformers, in this order """
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
    """ as model.Cache, around the cache of transformers """

    def __init__(self, lm):
        from transformers import DynamicCache
        self.state = DynamicCache(config=lm.base.config)
        self.n = 0 # tokens so far
        self.real = None # (B, n) bool, which of them are no filler. None = all

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 """
        self.state.reorder_cache(rows)
        if self.real is not None:
            self.real = self.real[rows]
