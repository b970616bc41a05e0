"""
the model, in reading order: config, what all layers are told (rope, masks, borders), attention, mamba-2, block, model,
init, muon, decode caches.

a stack of pre-norm residual blocks, each a mixer and a SwiGLU. the pattern `mixer` is repeated over the layers: 'A' is
attention, 'S' attention over a sliding window, 'M' Mamba-2; 'MA' is a hybrid, 'MS' is Samba (arxiv 2406.07522). it
knows nothing of ARC but what a batch tells it: token ids, places (row, col, z), which document a token belongs to,
and at shots=0 which task and symmetry it is. a row may hold several documents: each is computed as if it stood alone.

B, T, C are batch, time, channels; nh heads of size hs; ns is the state size of mamba-2. its paper has matrices B and C,
here they are Bm and Cm.
"""
import functools
import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanoarc.settings import check_numbers

@dataclass
class ModelConfig:
    depth: int = 2 # the one dial: layers, and with them width and learning rates
    # pattern over the layers: A = attention, S = sliding window attention, M = mamba-2, e.g. 'A', 'MS', 'MMMA'
    mixer: str = 'MA'
    n_layer: int = 0 # blocks, each a mixer and a SwiGLU. 0 = depth
    n_embd: int = 0 # width of the residual stream. 0 = 48 a layer of depth, rounded up to a multiple of 32
    # heads of attention, see Frame: what each sees of an input, e.g. '0 0 3t 0x2 a b', or 'all'. 'auto' = all, where
    # places are of grids. '' = n_embd / head_size plain heads
    frames: str = 'auto'
    head_size: int = 0 # 0 = 16 with frames, 32 without
    window: int = 256 # tokens that S sees, itself among them
    n_hidden: int = 0 # width of the SwiGLU. 0 = 8/3 n_embd rounded down to a multiple of 16
    # bases of the angles of row, col, z. a single one, e.g. 10000: of the place in the document in their stead
    rope_bases: tuple[float, ...] = (100.0, 100.0, 10.0)
    dropout: float = 0.1 # share of the numbers of embeddings, mixers and MLPs that training sets to 0
    loops: int = 1 # times that the stack is run, with the same weights
    d_state: int = 64 # ns, the state size of mamba-2
    d_head: int = 64 # its head size
    d_conv: int = 4 # width of its causal convolution
    expand: int = 2 # its inner width over n_embd
    chunk_size: int = 128 # tokens of a chunk of its scan
    vocab_size: int = 16 # of the grid tokens
    n_task: int = 0 # rows of the task embedding, set from the data. 0 = in context, no embedding

    def __post_init__(self):
        self.rope_bases = tuple(self.rope_bases) # json and toml know lists only

    @property
    def kinds(self):
        """ the mixer of each layer, e.g. 'MAMA' """
        n = self.n_layer or self.depth
        return (self.mixer * n)[:n]

    @property
    def attends(self):
        """ is there a layer of attention? """
        return 'A' in self.kinds or 'S' in self.kinds

    def resolved(self):
        """ a copy in which what is 0 = by the dial has its number. checks it, raises ValueError """
        cfg = replace(self)
        cfg.n_layer = self.n_layer or self.depth
        cfg.n_embd = self.n_embd or (3 * self.depth + 1) // 2 * 32
        cfg.frames = self.frames.strip()
        if cfg.frames == 'auto':
            cfg.frames = 'all' if len(self.rope_bases) == 3 else ''
        cfg.head_size = self.head_size or (16 if cfg.frames else 32)
        cfg.n_hidden = self.n_hidden or cfg.n_embd * 8 // 3 // 16 * 16
        cfg.check()
        if not cfg.attends: # nobody heeds them
            cfg.frames = ''
        return cfg

    def check(self):
        """ of a resolved config. raises ValueError that names the setting """
        check_numbers(self, dict(depth=1, n_layer=1, n_embd=1, head_size=2, window=1, n_hidden=1, rope_bases=1,
                                 loops=1, d_state=1, d_head=1, d_conv=2, expand=1, chunk_size=1, vocab_size=16),
                      dict(dropout=255 / 256))
        if self.mixer == '' or set(self.mixer) - set('ASM'):
            raise ValueError(f"mixer={self.mixer!r}: want a pattern of A, S and M, e.g. 'MA'")
        if len(self.rope_bases) not in (1, 3):
            raise ValueError(f"rope_bases={self.rope_bases}: want 3, of row, col and z, "
                             f"or 1, of the place in the document")
        if self.attends:
            self.check_heads()
        if 'M' in self.kinds and self.expand * self.n_embd % self.d_head:
            inner = self.expand * self.n_embd
            raise ValueError(f"d_head={self.d_head}: want a divisor of expand * n_embd = {inner}")

    def check_heads(self):
        """ of attention """
        frames = read_frames(self.frames)
        if self.head_size % 2 or min(rope_shares(self.head_size, len(self.rope_bases))) < 1:
            raise ValueError(f"head_size={self.head_size}: want an even number, two channels a rope axis at least")
        if not frames and self.n_embd % self.head_size:
            raise ValueError(f"head_size={self.head_size}: want a divisor of n_embd={self.n_embd}")
        if frames and len(self.rope_bases) != 3:
            raise ValueError(f"frames={self.frames!r}: want 3 rope_bases")

class Frame(NamedTuple):
    """ what a head sees of an input """
    kind: str # '' = it as it lies, 't' = tiles of it, 'x' = it scaled up, 'a', 'b' = its halves, upper, lower if H > W
    symmetry: int = 0 # by which it is turned before
    scale: int = 1

ALL_FRAMES = '0 0 0 0 a b 0t 1t 2t 3t 4t 5t 6t 7t 0x2 0x3'

@functools.cache # asked at each forward
def read_frames(text):
    """ '0 3t 0x2 a b' or 'all' -> list of Frames. raises ValueError """
    frames = []
    for word in (ALL_FRAMES if text == 'all' else text).split():
        if word in ('a', 'b'):
            frames.append(Frame(word))
        elif re.fullmatch(r"[0-7](t|x[2-9])?", word):
            frames.append(Frame(word[1:2], int(word[0]), int(word[2:] or 1)))
        else:
            raise ValueError(f"frames={text!r}: want all, or a word a head: a symmetry 0..7, as it is or with a t "
                             f"(tiles) or x2 to x9 (scaled up), or a or b (a half), got {word!r}")
    return frames

def width_lr(n_embd):
    """ the peak learning rate that suits a width: it falls with its square root """
    return 5e-3 * (128 / n_embd) ** 0.5

# -----------------------------------------------------------------------------
# what all layers are told

class Shared:
    """
    made once a forward, read by each mixer: attention wants rope and masks, mamba-2 wants same. x (B, T, C) are the
    embedded tokens, pos (B, T, 3) their places, size those of the inputs (input_sizes) where there are frames, doc
    (B, T) their documents or None = one a row. with a cache they follow upon the tokens of earlier calls, `past` of
    them.
    """

    def __init__(self, cfg, x, pos, size, doc, cache):
        B, T, _ = x.shape
        self.past = 0
        if cache is not None:
            self.past = cache.n
            doc = cache.documents(doc) # (B, past + T)
        self.rope = None # cos and sin, for rotate
        self.masks = {} # of 'A' and of 'S', for attend
        self.same = None # {k: is the token k before of the same document?}, (B, T, 1) each. None = yes, always
        # on cpu values may be asked for. elsewhere to ask would be to wait for the device
        on_cpu = x.is_cpu and not torch.compiler.is_compiling()
        if 'M' in cfg.kinds and doc is not None:
            one_a_row = on_cpu and doc.max() <= 0 # and PAD after it: no border to heed
            if not one_a_row:
                self.same = same_document(doc, T, cfg.d_conv - 1)
        if not cfg.attends:
            return
        if len(cfg.rope_bases) == 1:
            pos = place_in_document(doc, B, self.past + T, x.device)[:, self.past :, None]
        places = pos[:, :, None] # (B, T, 1, axes), one for all heads
        if cfg.frames:
            places = frame_places(pos, size, read_frames(cfg.frames))
        self.rope = rope_tables(places, cfg.head_size, cfg.rope_bases)
        how = 'one'
        if on_cpu:
            how = 'blocks'
        elif cache is None and is_recent(x.device) and cfg.head_size in (16, 32, 64, 128, 256):
            how = 'flex'
        if 'A' in cfg.kinds:
            self.masks['A'] = make_mask(x, self.past, doc, 0, how)
        if 'S' in cfg.kinds:
            self.masks['S'] = make_mask(x, self.past, doc, cfg.window, how)

def same_document(doc, T, n):
    """
    doc (B, past + T) -> {k: mask (B, T, 1)} for k = 1..n: of each of the last T tokens, is the one
    k places before it of the same document?
    """
    doc = F.pad(doc, (n, 0), value=-2)[:, -T - n :] # what stands before the first token is of no document
    same = {}
    for k in range(1, n + 1):
        before = doc[:, n - k : n - k + T]
        same[k] = (doc[:, n:] == before)[..., None]
    return same

def place_in_document(doc, B, T, device):
    """ -> (B, T) int64, 0 at the first token of each document. doc (B, T) or None = one a row """
    place = torch.arange(T, device=device).expand(B, -1)
    if doc is not None:
        is_first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))
        place = place - (place * is_first).cummax(1).values
    return place

def is_recent(device):
    """ is it a GPU from Ampere on, which has bf16 and FlexAttention? a T4 is not """
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)

def has_bf16(device):
    """ are products of bf16 faster there? on recent GPUs, and on cpus with AVX512-BF16 or AMX """
    if device.type == 'cpu':
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return is_recent(device)

# rope (RoFormer, arxiv 2104.09864; over several axes as in mdlARC)

def rope_shares(hs, axes):
    """ how many of the hs/2 pairs of channels each axis turns: alike, the last one what is left """
    share = math.ceil(hs / 2 / axes)
    return [share] * (axes - 1) + [hs // 2 - share * (axes - 1)]

def rope_freqs(hs, bases, device=None):
    """ -> of each axis a tensor of the angles by which its pairs are turned a step """
    return [base ** -(torch.arange(n, dtype=torch.float32, device=device) / n)
            for n, base in zip(rope_shares(hs, len(bases)), bases)]

def rope_tables(pos, hs, bases):
    """ (B, T, heads or 1, axes) places -> their cos and sin, (B, T, heads or 1, hs/2) fp32 """
    angles = []
    for axis, freq in enumerate(rope_freqs(hs, bases, pos.device)):
        angles.append(pos[..., axis, None].float() * freq) # (B, T, heads, n)
    angles = torch.cat(angles, -1) # (B, T, heads, hs/2)
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """ (B, T, nh, hs), each pair (i, i + hs/2) of its channels turned """
    y = x.to(torch.promote_types(x.dtype, cos.dtype)) # once: products of two dtypes are slow on cpu
    y1, y2 = y.chunk(2, -1)
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1).type_as(x)

# frames. with rope a head finds "two to the left of my place", a constant distance. it does not find "my place in the
# mirrored input", "in the input repeated as tiles" or "scaled up by two", which is what many tasks ask for. a frame
# makes it one: the head's keys of the input's cells stand where a symmetry puts them, and its queries of the output ask
# at their place within a tile, or within the input that is scaled up

def input_sizes(pos, doc):
    """ places (B, T, 3), documents (B, T) or None = one a row -> height and width (B, T) of the input of their pair """
    row, col, z = pos.int().unbind(-1)
    pair = z // 2 # input and output of a pair are neighbours in z
    if doc is not None:
        pair = pair + 256 * doc.int()
    number = F.pad(pair[:, 1:] != pair[:, :-1], (1, 0)).long().cumsum(1) # 0.. of the pairs of a row
    size = []
    for x in (row, col): # the end of its last row stands at (height, 0), the last cell of a row in column `width`
        x = x.masked_fill(z % 2 == 1, 0)
        largest = torch.zeros_like(x).scatter_reduce(1, number, x, 'amax')
        size.append(largest.gather(1, number).clamp(min=1))
    return size

def turned_place(i, j, H, W, d):
    """ where the cell (i, j) of a grid (H, W) lies after symmetry d of grids.dihedral, and the new height and width """
    if d >= 4: # transposed
        i, j, H, W = j, i, W, H
    for _ in range(d % 4): # np.rot90: the last column becomes the first row
        i, j, H, W = W - 1 - j, i, W, H
    return i, j, H, W

def place_in_frame(frame, i, j, H, W):
    """ where a frame puts the cell (i, j) of an input (H, W), and height and width of what it makes of that """
    if frame.kind not in ('a', 'b'):
        return turned_place(i, j, H, W, frame.symmetry)
    h, w = torch.where(H > W, H // 2, H), torch.where(H > W, W, W // 2)
    if frame.kind == 'b': # a row or column between the halves belongs to none
        i, j = i - (H - h), j - (W - w)
    return i, j, h, w

def frame_places(pos, size, frames):
    """
    places (B, T, 3), input_sizes, a list of a Frame a head -> (B, T, 2 nh, 3) the places of the queries of each head,
    then of the keys. they are equal but for z where the query's token predicts what the key's cell is in that frame
    """
    row, col, z = pos.int().unbind(-1)
    is_input = z % 2 == 0
    queries, keys = [], []
    for frame in frames:
        i, j, h, w = place_in_frame(frame, row, col - 1, *size) # cell (i, j) stands in column j + 1
        keys.append(torch.stack([torch.where(is_input, i, row), torch.where(is_input, j, col - 1), z], -1))
        asks = row, col # a token of the output asks for the cell that it predicts, to the right of its own
        if frame.kind == 't':
            asks = row % h, col % w
        elif frame.kind == 'x':
            asks = row // frame.scale, col // frame.scale
        queries.append(torch.stack([torch.where(is_input, row, asks[0]), torch.where(is_input, col, asks[1]), z], -1))
    return torch.stack(queries + keys, 2)

def tile_number(pos, size):
    """ -> (B, T): in which tile of the input's size an output token stands, 1 + 4 * down + right, 0 in an input """
    row, col, z = pos.int().unbind(-1)
    H, W = size
    number = 1 + 4 * (row // H).clamp(max=3) + (col // W).clamp(max=3)
    return number.masked_fill(z % 2 == 0, 0)

# masks

BLOCK = 128 # queries that see the same slice of the keys, on cpu and in FlexAttention

class Span(NamedTuple):
    """ the next n queries look at these keys """
    n: int
    keys: slice
    bias: torch.Tensor # (B or 1, 1, queries, keys) of 0 and -inf, added to the scores. None = they see all these keys

def make_mask(x, past, doc, window, how):
    """
    what T tokens after `past` others see: themselves and what came before in their document, the last `window` tokens
    if it is not 0 -> a mask for attend. x (B, T, C), doc (B, past + T) or None = one document a row.

    how: 'flex' -> a BlockMask of FlexAttention. 'one' -> a list of one Span. 'blocks' -> a list of Spans of BLOCK
    queries, without the keys that none of them sees: worth finding on cpu.
    """
    B, T, _ = x.shape
    last = torch.arange(past + T, device=x.device) # each sees the tokens from first to last, itself
    first = last - place_in_document(doc, 1 if doc is None else B, past + T, x.device)
    if window > 0:
        first = torch.maximum(first, last + 1 - window)
    first, last = first[:, past:], last[past:, None] # (B or 1, T), (T, 1)
    if how == 'flex':
        return block_mask(first.expand(B, T).int())
    spans = []
    size = BLOCK if how == 'blocks' else T
    for begin in range(0, T, size):
        end = min(begin + size, T)
        start = 0 # the first key
        if how == 'blocks':
            start = int(first[:, begin].min())
        elif window > 0:
            start = max(past + begin + 1 - window, 0)
        bias = None
        if T > 1 or doc is not None: # else it is one more token, which sees all of these
            j = torch.arange(start, past + end, device=x.device)
            ok = (j >= first[:, begin:end, None]) & (j <= last[begin:end]) # (B or 1, queries, keys)
            bias = torch.zeros(ok.shape, dtype=x.dtype, device=x.device).masked_fill(~ok, float('-inf'))[:, None]
        spans.append(Span(end - begin, slice(start, past + end), bias))
    return spans

def block_mask(first):
    """
    first (B, T) int32, never less than before: token i sees first[i] to i -> BlockMask. what a block of queries sees
    follows from its first and its last one, so nothing of T x T is made
    """
    T = first.size(1)
    q = torch.arange(math.ceil(T / BLOCK), dtype=torch.int32, device=first.device)
    low = first[:, None, ::BLOCK] // BLOCK # (B, 1, n) the first block that any of them sees, the last is their own
    high = F.pad(first[:, None], (0, -T % BLOCK), value=T)[..., BLOCK - 1 :: BLOCK] # what the last of them sees
    full = torch.minimum((high + BLOCK - 1) // BLOCK, q) # the first block that all of them see whole
    parts = torch.where(q < (full - low)[..., None], low[..., None] + q, q[:, None]) # (B, 1, n, n)
    wholes = (full[..., None] + q).clamp(max=len(q) - 1)

    def see(b, head, i, j):
        return (j >= first[b, i]) & (j <= i)

    return BlockMask.from_kv_blocks(full - low + 1, parts, q - full, wholes, BLOCK, see, (T, T))

@functools.cache
def compiled(f):
    """ torch.compile, once. FlexAttention (arxiv 2412.05496) gets a kernel that skips what the mask hides """
    return torch.compile(f)

# -----------------------------------------------------------------------------
# attention

CLOSED = 3.0 # a gate begins at sigmoid(-3) = 5%
SHARP = 5.0 # the bias by which a head looks at one place: at first nine tenths of its attention are there

class Attention(nn.Module):
    """
    multi-head attention with rope on q and k. what a token may see is the mask's business.

    a head with a frame begins by looking at one cell, that which has its place there, and begins closed: a gate (as in
    Qiu et al., arxiv 2505.06708) lets through what it finds. so a task opens the few heads that it needs
    """

    def __init__(self, cfg, kind):
        super().__init__()
        self.kind = kind
        frames = read_frames(cfg.frames)
        self.hs = cfg.head_size
        self.nh = len(frames) or cfg.n_embd // self.hs
        self.bases = cfg.rope_bases
        self.qkv = nn.Linear(cfg.n_embd, 3 * self.nh * self.hs, bias=len(frames) > 0)
        self.proj = nn.Linear(self.nh * self.hs, cfg.n_embd, bias=False)
        self.gate = None
        has_frame = [frame != Frame('') for frame in frames]
        if any(has_frame):
            self.register_buffer('has_frame', torch.tensor(has_frame), persistent=False) # (nh,)
            self.gate = nn.Linear(cfg.n_embd, self.nh, bias=False)

    def forward(self, x, shared, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.hs)
        qk, v = qkv.split([2 * self.nh, self.nh], 2) # queries and keys are turned alike, so as one
        q, k = rotate(qk, *shared.rope).transpose(1, 2).chunk(2, 1) # (B, nh, T, hs) each
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, shared.past)
        y = attend(q, k, v, shared.masks[self.kind]).transpose(1, 2) # (B, T, nh, hs)
        if self.gate is not None:
            opened = torch.where(self.has_frame, (self.gate(x) - CLOSED).sigmoid(), 1) # (B, T, nh)
            y = y * opened[..., None]
        return self.proj(y.reshape(B, T, -1))

    def look_at_places(self):
        """ queries and keys of heads with a frame agree where the place is the same, and the key is of the input """
        turn = torch.zeros(self.hs // 2)
        z = rope_freqs(self.hs, self.bases)[-1] # an input stands one before its output in z
        turn[-len(z) :] = -z
        q, k, _ = self.qkv.bias.view(3, self.nh, 2, self.hs // 2).unbind()
        has_frame = self.has_frame[:, None, None]
        q.copy_(torch.where(has_frame, SHARP * torch.stack([turn.cos(), turn.sin()]), q))
        k.copy_(torch.where(has_frame, SHARP * torch.tensor([[1.0], [0.0]]), k))

# of FlexAttention. torch's own forward kernel, 128 x 128 in 4 warps, has no room in the registers of Hopper
FORWARD = {'fwd_BLOCK_M': 128, 'fwd_BLOCK_N': 64, 'fwd_num_warps': 8}

def attend(q, k, v, mask):
    """ softmax(q k^T / sqrt(hs)) v of (B, nh, T, hs) and twice (B, nh, keys, hs). mask: see make_mask """
    if not isinstance(mask, list):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        options = FORWARD if q.size(-1) * q.element_size() <= 128 else None # bytes, or small cards have no room
        return flex(q, k, v, block_mask=mask, kernel_options=options)
    y = []
    for span, qs in zip(mask, q.split([span.n for span in mask], 2)):
        y.append(attend_to_all(qs, k[:, :, span.keys], v[:, :, span.keys], span.bias))
    return torch.cat(y, 2)

def attend_to_all(q, k, v, bias):
    """ the same for one Span, its bias added to the scores """
    if q.is_cpu and k.size(2) <= 8 * BLOCK: # plain products are faster than the fused kernel, and small enough to keep
        att = (q * q.size(-1) ** -0.5) @ k.transpose(2, 3) # (B, nh, queries, keys)
        if bias is not None:
            att = att + bias.type_as(att)
        return att.softmax(-1).type_as(v) @ v
    if bias is not None:
        bias = bias.type_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

# -----------------------------------------------------------------------------
# mamba-2 (arxiv 2405.21060). each head has a state (hs, ns), that decays by exp(a) and takes up x Bm^T with each token:
#   h_t = exp(a_t) h_{t-1} + x_t Bm_t^T
#   y_t = h_t Cm_t

# log decay at the border of two documents: e^-30 = 1e-13 of the old state is lost in the rounding of what is new.
# -inf would make nan of the differences of cumulative sums in ssd
FORGET = -30.0

def recur(x, a, Bm, Cm, state):
    """ one token, as the definition has it: x (B, nh, hs), a (B, nh), Bm and Cm (B, ns) -> y (B, nh, hs), new state """
    state = state * a[:, :, None, None].exp() + x[..., None] * Bm[:, None, None] # (B, nh, hs, ns)
    y = state @ Cm[:, None, :, None]
    return y[..., 0], state

def ssd(x, a, Bm, Cm, Q, state=None, want_state=True):
    """
    many tokens, in n chunks of q, Q at most: inside the chunks, all at once, it is masked attention, from chunk to
    chunk one state is handed on. y = what a token gets from its own chunk + what it gets from the
    state before that chunk.

    x (B, T, nh, hs), a (B, T, nh) log decay <= 0, Bm and Cm (B, T, ns), state (B, nh, hs, ns) before the first token or
    None = zero -> y (B, T, nh, hs) and the last state, None if there is one chunk and nobody wants it.
    """
    T = x.size(1)
    n = math.ceil(T / Q)
    q = math.ceil(T / n)
    if n * q > T: # more tokens, that change no state
        more = n * q - T
        x, a = F.pad(x, (0, 0, 0, 0, 0, more)), F.pad(a, (0, 0, 0, more))
        Bm, Cm = F.pad(Bm, (0, 0, 0, more)), F.pad(Cm, (0, 0, 0, more))
    x, a, Bm, Cm = (z.unflatten(1, (n, q)) for z in (x, a, Bm, Cm)) # (B, n, q, ...)
    x = x.transpose(2, 3) # (B, n, nh, q, hs)
    s = a.cumsum(2).transpose(2, 3) # (B, n, nh, q) log decay since the chunk began
    future = torch.full((q, q), float('-inf'), dtype=s.dtype, device=s.device).triu(1)
    L = (s[..., :, None] - s[..., None, :] + future).exp() # (B, n, nh, q, q) decay from token j to token i
    att = ((Cm @ Bm.transpose(2, 3))[:, :, None] * L).type_as(x) # (B, n, nh, q, q)
    y = att @ x # (B, n, nh, q, hs)
    if n > 1 or want_state or state is not None:
        before, state = hand_on(x, s, Bm, state) # (B, n, nh, hs, ns) the state before each chunk
        y = y + (Cm[:, :, None] @ before.type_as(Cm).transpose(3, 4)) * s.exp()[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :T], state

def hand_on(x, s, Bm, state):
    """ as in ssd, by chunks -> the state before each chunk (B, n, nh, hs, ns), and that after the last one """
    until_end = (s[..., -1:] - s).exp() # decay from each token to the end of its chunk
    x = (x * until_end[..., None]).type_as(x)
    new = x.transpose(3, 4) @ Bm[:, :, None] # (B, n, nh, hs, ns) what each chunk adds
    if state is None:
        state = torch.zeros_like(new[:, 0])
    # all borders in one product. a chain of steps spills a gpu's registers, and is no faster on cpu
    new = torch.cat([state.type_as(new)[:, None], new], 1).permute(0, 2, 1, 3, 4) # (B, nh, n + 1, hs, ns)
    until = F.pad(s[..., -1].transpose(1, 2).cumsum(2), (1, 0)) # (B, nh, n + 1) log decay until each border
    L = (until[..., :, None] - until[..., None, :]).tril().exp().tril() # first tril: exp would overflow
    states = (L.type_as(new) @ new.flatten(3)).unflatten(3, new.shape[3:]).transpose(1, 2)
    return states[:, :-1], states[:, -1].type_as(s)

class Mamba2(nn.Module):
    """ project, short causal convolution, selective state space, gated norm, project """

    def __init__(self, cfg):
        super().__init__()
        self.hs = cfg.d_head
        self.ns = cfg.d_state
        self.Q = cfg.chunk_size
        self.inner = cfg.expand * cfg.n_embd
        self.nh = self.inner // self.hs
        self.mixed = self.inner + 2 * self.ns # channels that go through the convolution: v, Bm and Cm
        self.in_proj = nn.Linear(cfg.n_embd, self.inner + self.mixed + self.nh, bias=False) # gate, v Bm Cm, dt
        self.conv = nn.Parameter(torch.empty(cfg.d_conv, self.mixed)) # [k] weighs the token k steps back
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.a_log = nn.Parameter(torch.empty(self.nh))
        self.dt_bias = nn.Parameter(torch.empty(self.nh))
        self.skip = nn.Parameter(torch.empty(self.nh))
        self.norm = Norm(self.inner, eps=1e-6)
        self.proj = nn.Linear(self.inner, cfg.n_embd, bias=False)

    def forward(self, x, shared, cache=None):
        B, T, C = x.shape
        gate, u, dt = self.in_proj(x).split([self.inner, self.mixed, self.nh], -1) # u holds values v, Bm and Cm
        last, state = None, None # what is remembered of earlier calls
        if cache is not None:
            last, state = cache.inputs, cache.state
        if last is None:
            last = u.new_zeros(B, len(self.conv) - 1, self.mixed)
        u = torch.cat([last, u], 1) # (B, K - 1 + T, mixed)
        v, Bm, Cm = F.silu(self.convolve(u, T, shared.same)).split([self.inner, self.ns, self.ns], -1)
        v = v.reshape(B, T, self.nh, self.hs)
        with torch.autocast(x.device.type, enabled=False): # decays and their sums: fp32
            dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias) # (B, T, nh) how much of a token the state takes
            a = -dt * self.a_log.exp()
            if shared.same is not None:
                a = a.masked_fill(~shared.same[1], FORGET)
            product = v.dtype if v.dtype == torch.bfloat16 else dt.dtype # of the scan: fp16 might overflow
            taken = (v * dt[..., None]).to(product) # what the state takes up
            Bm, Cm = Bm.to(product), Cm.to(product)
            if T == 1 and state is not None:
                token = [z[:, 0].type_as(state) for z in (taken, a, Bm, Cm)]
                y, state = recur(*token, state)
                y = y[:, None]
            else:
                y, state = ssd(taken, a, Bm, Cm, self.Q, state, want_state=cache is not None)
        if cache is not None:
            cache.inputs, cache.state = u[:, T:], state
        y = (y + v * self.skip[:, None]).reshape(B, T, -1)
        return self.proj(self.norm(y * F.silu(gate)))

    def convolve(self, u, T, same):
        """ (B, K - 1 + T, mixed), of which the last T are asked for -> (B, T, mixed), each with the K - 1 before it """
        w = self.conv.to(u.dtype)
        K = len(w)
        y = self.conv_bias.to(u.dtype) + u[:, K - 1 :] * w[0]
        for k in range(1, K): # a sum of shifted copies is faster than a convolution of torch
            earlier = u[:, K - 1 - k : K - 1 - k + T] # by k tokens
            if same is not None: # nothing flows over the border of a document
                earlier = earlier * same[k]
            y = y + earlier * w[k]
        return y

# -----------------------------------------------------------------------------

class Norm(nn.RMSNorm):
    """ in the dtype of its weights, whatever x has (torch is slow where they differ) """

    def forward(self, x):
        return super().forward(x.type_as(self.weight))

class MLP(nn.Module):
    """ SwiGLU (arxiv 2002.05202) """

    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 2 * cfg.n_hidden, bias=False) # gate and value as one matrix
        self.proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, value = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(gate) * value)

class Dropout(nn.Dropout):
    """
    torch's own is slow on cpu, most of it for its random numbers. there they are bytes here, so the share that is left
    out is a multiple of 1/256
    """

    def forward(self, x):
        if self.p == 0 or not self.training: # in this order: at 0 compiled blocks have one graph for both modes
            return x
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x)
        cut = round(256 * self.p) # smaller bytes are left out
        n = x.numel()
        random = torch.empty(n // 8 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.uint8)[:n].view(x.shape)
        kept = (random.to(x.dtype) - (cut - 1)).clamp(0, 1) # 0 or 1
        return x * (kept * (256 / (256 - cut)))

class Block(nn.Module):
    """ pre-norm residual block around every mixer, mamba-2 too """

    def __init__(self, cfg, kind):
        super().__init__()
        self.norm1 = Norm(cfg.n_embd, eps=1e-6)
        self.mixer = Mamba2(cfg) if kind == 'M' else Attention(cfg, kind)
        self.norm2 = Norm(cfg.n_embd, eps=1e-6)
        self.mlp = MLP(cfg)
        self.drop = Dropout(cfg.dropout)

    def forward(self, x, shared, cache=None):
        x = x + self.drop(self.mixer(self.norm1(x), shared, cache)) # (B, T, C)
        return x + self.drop(self.mlp(self.norm2(x))) # (B, T, C)

class Model(nn.Module):
    """
    model(*batch) -> logits (B, T, vocab_size) and the loss, summed over the tokens that carry it, in nats; None without
    targets. with a cache it goes on where the last call ended: first the prompts, then a token at a time, or several.
    """
    # the solver may decode prompts of several lengths together: filler before a shorter one is a document of its own.
    # some language models (lm.LM) cannot
    pads = True

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg = cfg.resolved()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.drop = Dropout(cfg.dropout)
        if cfg.n_task > 0:
            self.wtask = nn.Embedding(cfg.n_task, cfg.n_embd)
            self.wdih = nn.Embedding(8, cfg.n_embd)
        if cfg.frames:
            self.wtile = nn.Embedding(17, cfg.n_embd) # tile_number, up to 16
        self.learns_places = not cfg.attends and len(cfg.rope_bases) == 3 # where no rope tells them
        if self.learns_places:
            self.wrow = nn.Embedding(32, cfg.n_embd)
            self.wcol = nn.Embedding(32, cfg.n_embd)
            self.wz = nn.Embedding(256, cfg.n_embd) # z is a byte
        self.blocks = nn.ModuleList(Block(cfg, kind) for kind in cfg.kinds)
        self.norm = Norm(cfg.n_embd, eps=1e-6)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.apply(init_weights)

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        x = self.drop(self.wte(idx)) # (B, T, C)
        if self.n_task > 0:
            x = x + self.wtask(task) + self.wdih(dihedral.int())
        if self.learns_places:
            row, col, z = pos.int().unbind(-1)
            x = x + self.wrow(row) + self.wcol(col) + self.wz(z)
        size = None
        if self.cfg.frames:
            size = input_sizes(pos, doc) if cache is None else cache.input_sizes(pos, doc)
            x = x + self.wtile(tile_number(pos, size))
        shared = Shared(self.cfg, x, pos, size, doc, cache)
        if cache is None and is_recent(x.device) and torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16() # half the bytes of what blocks add up. decoding is not compiled, and gains nothing
        for i in range(self.cfg.loops * len(self.blocks)):
            block = self.blocks[i % len(self.blocks)]
            x = block(x, shared, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.n += idx.size(1)
        logits = self.head(self.norm(x)) # (B, T, vocab_size)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets is None:
            return logits, None
        targets = targets.flatten().clamp(min=-1) # there is no loss where one is negative
        return logits, F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction='sum')

    @property
    def device(self):
        return self.head.weight.device

    @property
    def n_task(self):
        return self.cfg.n_task

    def about(self):
        """ a line for the log """
        n = sum(p.numel() for p in self.parameters())
        looked_up = sum(x.weight.numel() for x in self.modules() if isinstance(x, nn.Embedding))
        return f"{n:,} parameters, {looked_up:,} of them embeddings, mixer {self.cfg.mixer}"

    def cache(self):
        """ for decoding, see Cache """
        return Cache(self)

    def peak_rates(self, lr, adam_lr):
        """ the learning rates of Muon and of AdamW, 0 = as the width sets it """
        default = width_lr(self.cfg.n_embd)
        return lr or default, adam_lr or default

    def optimizers(self, lr, adam_lr, weight_decay, ns_steps=5):
        """
        -> [Muon for the matrices of the blocks, AdamW for the rest: embeddings, head and convolutions with weight
        decay, norms, biases and the scalars of mamba-2 without]. ns_steps=0: AdamW for the matrices too, at their lr.
        """
        # a matrix that is several in one (qkv, gate and value, in_proj) is orthogonalized as one. Mamba2.conv is not
        # called weight, so AdamW has it
        matrices, decayed, plain = [], [], []
        for name, p in self.named_parameters():
            if p.ndim < 2:
                plain.append(p)
            elif name.startswith('blocks.') and name.endswith('.weight'):
                matrices.append(p)
            else:
                decayed.append(p)
        groups = [{'params': decayed, 'weight_decay': weight_decay}, {'params': plain, 'weight_decay': 0.0}]
        optimizers = []
        if ns_steps > 0:
            optimizers.append(Muon(matrices, lr, weight_decay=weight_decay, steps=ns_steps))
        else:
            groups.append({'params': matrices, 'weight_decay': weight_decay, 'lr': lr})
        optimizers.append(torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-8, fused=True))
        return optimizers

def init_weights(m):
    """ the whole initialization as one table. norms begin at 1, the head is not tied, no projection is scaled down """
    if isinstance(m, (nn.Linear, nn.Embedding)):
        nn.init.normal_(m.weight, std=0.02)
        if getattr(m, 'bias', None) is not None: # of queries, keys and values, where there are frames
            nn.init.normal_(m.bias, std=0.5)
    elif isinstance(m, Attention) and m.gate is not None:
        with torch.no_grad():
            m.look_at_places()
    elif isinstance(m, Mamba2): # the paper's: decays of 1..16 a unit of time, steps of 0.001 to 0.1
        bound = len(m.conv) ** -0.5
        nn.init.uniform_(m.conv, -bound, bound)
        nn.init.zeros_(m.conv_bias)
        nn.init.ones_(m.skip)
        with torch.no_grad():
            m.a_log.uniform_(1, 16).log_()
            dt = torch.empty_like(m.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            m.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt))) # softplus of it is dt

# -----------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """
    momentum, orthogonalized (Keller Jordan's Muon, kellerjordan.github.io/posts/muon): matrices of one shape go through
    the newton-schulz iteration as one batch. the update is scaled by 0.2 sqrt(max(rows, cols)) so that its size is that
    of AdamW's (Moonlight, arxiv 2502.16982). in 16 bits on cuda, elsewhere under autocast alone.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), ps in of_shape.items():
                grads, bufs = [], []
                for p in ps:
                    if 'momentum' not in self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    grads.append(p.grad)
                    bufs.append(self.state[p]['momentum'])
                torch._foreach_lerp_(bufs, grads, 1 - group['momentum'])
                g = torch.stack(torch._foreach_lerp(grads, bufs, group['momentum'])) # nesterov, (n, rows, cols)
                g = orthogonalize(g, group['steps']) * (0.2 * max(rows, cols) ** 0.5)
                torch._foreach_mul_(ps, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(ps, list(g.unbind(0)), alpha=-group['lr'])

def orthogonalize(g, steps):
    """ (n, rows, cols) -> about U V^T of each: a quintic iteration pushes all singular values towards 1 """
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7) # first: for fp16 gradients may be too small
    if g.is_cuda:
        x = x.bfloat16() if is_recent(g.device) else x.half()
    elif torch.is_autocast_enabled(g.device.type):
        x = x.to(torch.get_autocast_dtype(g.device.type))
    is_tall = x.size(1) > x.size(2)
    if is_tall: # work on the smaller side
        x = x.mT
    for _ in range(steps): # x = 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        A = x @ x.mT
        polynomial = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    if is_tall:
        x = x.mT
    return x.type_as(g)

# -----------------------------------------------------------------------------
# decode caches: what is remembered of the tokens so far

def keep_rows(x, rows):
    """ x[rows]. of as many rows as before only those that change are written, in place """
    if len(rows) != len(x):
        return x[rows]
    changed = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    x[changed] = x[rows[changed]]
    return x

class KVCache:
    """ of attention: keys and values, (B, nh, room, hs) each, of which the first are in use """

    def __init__(self):
        self.k = None
        self.v = None

    def append(self, k, v, past):
        """ (B, nh, t, hs) more, after `past` others -> all so far """
        n = past + k.size(2)
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        room = self.k.size(2)
        if n > room: # grow by half, so that a token costs the same on average
            more = n + n // 2 - room
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))
        self.k[:, :, past:n] = k
        self.v[:, :, past:n] = v
        return self.k[:, :, :n], self.v[:, :, :n]

    def keep(self, rows):
        self.k, self.v = keep_rows(self.k, rows), keep_rows(self.v, rows)

class SSMCache:
    """ of mamba-2: the last inputs of the convolution (B, K - 1, mixed), and the state (B, nh, hs, ns) """

    def __init__(self):
        self.inputs = None
        self.state = None

    def keep(self, rows):
        self.inputs, self.state = keep_rows(self.inputs, rows), keep_rows(self.state, rows)

class Cache:
    """ of all layers, for a batch of prompts. docs in every call or in none """

    def __init__(self, model):
        self.n = 0 # tokens so far
        self.doc = None # their documents (B, n)
        self.size = None # with frames: height and width (B, 1) of the input that is answered
        self.layers = []
        for kind in model.cfg.kinds * model.cfg.loops:
            self.layers.append(SSMCache() if kind == 'M' else KVCache())

    def documents(self, doc):
        """ those of more tokens, (B, T) or None -> those of all so far, (B, n + T) or None """
        assert self.n == 0 or (doc is None) == (self.doc is None), "docs in every call or in none"
        self.doc = doc if self.doc is None else torch.cat([self.doc, doc], 1)
        return self.doc

    def input_sizes(self, pos, doc):
        """
        as the function of that name. the first call reads the prompts, inputs whole; all that follows is of the output
        that they ask for
        """
        if self.n > 0:
            return [x.expand(pos.shape[:2]) for x in self.size]
        size = input_sizes(pos, doc)
        self.size = [x[:, -1:] for x in size]
        return size

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 """
        if self.size is not None:
            self.size = [x[rows] for x in self.size]
        if self.doc is not None:
            self.doc = self.doc[rows]
        for layer in self.layers:
            layer.keep(rows)
