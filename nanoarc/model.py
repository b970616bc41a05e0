"""
the model, in reading order: config, norm and rope, attention, mamba-2, block, model, init, muon, decode caches.

a stack of pre-norm residual blocks, each a mixer and a SwiGLU. the pattern `mixer` is repeated over the layers: 'A' is
attention, 'S' attention over a sliding window, 'M' Mamba-2; 'MA' is a hybrid, 'MS' is Samba (arxiv 2406.07522). it knows
nothing of ARC but what a batch tells it: token ids, places (row, col, z), which document a token belongs to, and at
shots=0 which task and symmetry it is. a row may hold several documents: each is computed as if it stood alone.
B, T, C are batch, time, channels; nh heads of size hs; ns is the state size of mamba-2, whose B and C are Bm and Cm here.
"""
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

@dataclass
class ModelConfig:
    depth: int = 4 # the one dial: layers, and with them width, heads and learning rates
    mixer: str = 'MA' # pattern over the layers: A = attention, S = sliding window attention, M = mamba-2, e.g. 'A', 'MS', 'MMMA'
    n_layer: int = 0 # blocks, each a mixer and a SwiGLU. 0 = depth
    n_embd: int = 0 # width of the residual stream. 0 = 32 a layer of depth
    head_size: int = 32 # of attention
    n_kv_head: int = 0 # heads of keys and values, each shared by as many query heads (GQA, arxiv 2305.13245). 0 = one each
    qk_norm: bool = False # queries and keys of norm 1 (arxiv 2010.04245)
    window: int = 256 # tokens that S sees, itself among them
    n_hidden: int = 0 # width of the SwiGLU, 0 = 8/3 n_embd rounded down to a multiple of 16
    prefix: bool = True # the tokens of a prompt see each other both ways (attention only, loss_on='query' only)
    rope_bases: tuple[float, ...] = (100.0, 100.0, 10.0) # of row, col, z. a single one, e.g. 10000: rope over the place in the document
    loops: int = 1 # times that the stack is run, with the same weights
    d_state: int = 64 # ns, the state size of mamba-2
    d_head: int = 64 # its head size
    d_conv: int = 4 # width of its causal convolution
    expand: int = 2 # its inner width over n_embd
    chunk_size: int = 128 # tokens of a chunk of its scan
    kernel: str = 'torch' # of that scan: 'torch' | 'triton' = flash-linear-attention's, to train on cuda
    vocab_size: int = 16 # of the grid tokens
    n_task: int = 0 # rows of the task embedding, set from the data. 0 = in context, no embedding

    def __post_init__(self):
        self.rope_bases = tuple(self.rope_bases) # json and toml know lists only

    def filled(self):
        """ the same with n_layer, n_embd, n_kv_head and n_hidden as the dial sets them. raises ValueError """
        n_layer, n_embd = self.n_layer or self.depth, self.n_embd or 32 * self.depth
        cfg = replace(self, n_layer=n_layer, n_embd=n_embd, n_hidden=self.n_hidden or n_embd * 8 // 3 // 16 * 16,
                      n_kv_head=self.n_kv_head or max(n_embd // max(self.head_size, 1), 1))
        least = dict(depth=1, n_layer=1, n_embd=1, head_size=2, n_kv_head=1, window=1, n_hidden=1, loops=1, d_state=1, d_head=1, d_conv=2, expand=1, chunk_size=1, vocab_size=16, n_task=0)
        for name, x in least.items():
            if getattr(cfg, name) < x:
                raise ValueError(f"{name}={getattr(cfg, name)}: want at least {x}")
        if not self.mixer or set(self.mixer) - set('ASM'):
            raise ValueError(f"mixer={self.mixer!r}: want a pattern of A, S and M, e.g. 'MA'")
        if self.kernel not in ('torch', 'triton'):
            raise ValueError(f"kernel={self.kernel!r}: want torch or triton")
        if len(self.rope_bases) not in (1, 3):
            raise ValueError(f"rope_bases={self.rope_bases}: want 3, of row, col and z, or 1, of the place in the document")
        if set(self.kinds) & set('AS') and (n_embd % self.head_size or n_embd // self.head_size % cfg.n_kv_head or self.head_size % 2 or self.head_size < 2 * len(self.rope_bases)):
            raise ValueError(f"head_size={self.head_size} n_kv_head={self.n_kv_head}: want heads of an even size, two channels a rope axis at least, that divides "
                             f"n_embd={n_embd}, and a number of kv heads that divides theirs")
        if 'M' in self.kinds and self.expand * n_embd % self.d_head:
            raise ValueError(f"d_head={self.d_head}: want a divisor of expand * n_embd = {self.expand * n_embd}")
        return cfg

    def learning_rates(self, lr, adam_lr):
        """ of Muon and of AdamW, 0 = as the width sets them: they fall with its square root """
        scale = (128 / self.filled().n_embd) ** 0.5
        return lr or 5e-3 * scale, adam_lr or 5e-3 * scale

    def check(self, device, loss_on):
        """ raises ValueError that names the setting if one cannot train so """
        if self.prefix and set(self.kinds) & set('AS') and loss_on != 'query':
            raise ValueError(f"prefix lets a prompt see its own next tokens, with loss_on={loss_on!r} that is cheating: add --no_prefix")
        check_kernel(self.kernel, device)

    def model(self, device, world=1):
        return Model(self).to(device)

    @property
    def kinds(self):
        """ the mixer of each layer, e.g. 'MAMA' """
        n = self.n_layer or self.depth
        return (self.mixer * n)[:n]

# -----------------------------------------------------------------------------
# rope (RoFormer, arxiv 2104.09864; over several axes as in mdlARC)

def rope_tables(pos, hs, bases):
    """ (B, T, axes) places -> cos and signed sin (B, T, 1, hs) fp32. of the hs/2 pairs the last axis turns the fewest """
    n = [-(-hs // (2 * len(bases)))] * (len(bases) - 1) # pairs that each axis turns
    n.append(hs // 2 - sum(n))
    angles = []
    for axis in range(len(bases)):
        freq = bases[axis] ** -(torch.arange(n[axis], dtype=torch.float32, device=pos.device) / n[axis])
        angles.append(pos[..., axis : axis + 1].float() * freq) # (B, T, n)
    angles = torch.cat(angles, -1)[:, :, None] # (B, T, 1, hs/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1) # as rotate wants them: (B, T, 1, hs)

def rotate(x, cos, sin):
    """ (B, T, nh, hs), each pair (i, i + hs/2) of its channels turned """
    x1, x2 = x.chunk(2, -1)
    return (x * cos + torch.cat([x2, x1], -1) * sin).type_as(x)

# -----------------------------------------------------------------------------
# attention

BLOCK = 128 # queries that see the same slice of the keys, on cpu

class Attention(nn.Module):
    """ multi-head attention with rope on q and k. what a token may see is the mask's business """

    def __init__(self, cfg, kind):
        super().__init__()
        self.kind, self.hs, self.nh, self.nkv, self.qk_norm = kind, cfg.head_size, cfg.n_embd // cfg.head_size, cfg.n_kv_head, cfg.qk_norm
        self.qkv = nn.Linear(cfg.n_embd, (self.nh + 2 * self.nkv) * self.hs, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, ctx, cache=None):
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, -1, self.hs).split([self.nh + self.nkv, self.nkv], 2)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.hs,), eps=1e-6).type_as(v)
        q, k = rotate(qk, *ctx.rope).transpose(1, 2).split([self.nh, self.nkv], 1) # (B, nh, T, hs) and (B, nkv, T, hs)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, ctx.masks[self.kind])
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

def attend(q, k, v, mask):
    """
    softmax(q k^T / sqrt(hs)) v of (B, nh, T, hs) and twice (B, nkv, keys, hs). mask: a BlockMask of FlexAttention, or a list of blocks
    of queries (first, end, first key, end of keys, (B or 1, 1, queries, keys) of 0 and -inf to add, or None = sees all of these).
    """
    shared = q.size(1) // k.size(1) # query heads a kv head
    if not isinstance(mask, list):
        return (flex_attention if torch.compiler.is_compiling() else compiled(flex_attention))(q, k, v, block_mask=mask, enable_gqa=shared > 1)
    y = []
    for (a, b, lo, hi, bias), qb in zip(mask, q.split([b - a for a, b, *_ in mask], 2)):
        kb, vb = k[:, :, lo:hi], v[:, :, lo:hi]
        if shared > 1:
            kb, vb = kb.repeat_interleave(shared, 1), vb.repeat_interleave(shared, 1)
        if q.is_cpu and hi - lo <= 8 * BLOCK: # plain products are faster than the fused kernel, and small enough to keep
            att = (qb * qb.size(-1) ** -0.5) @ kb.transpose(2, 3) # (B, nh, b - a, hi - lo)
            y.append((att if bias is None else att + bias).softmax(-1).type_as(vb) @ vb)
        else:
            y.append(F.scaled_dot_product_attention(qb, kb, vb, attn_mask=None if bias is None else bias.type_as(qb)))
    return y[0] if len(y) == 1 else torch.cat(y, 2)

@functools.cache
def compiled(f):
    """ FlexAttention (arxiv 2412.05496) is a kernel made for the mask, which skips what nobody sees: only compiled is it fast """
    return torch.compile(f)

def is_recent(device):
    """ is it a GPU from Ampere on, which has bf16 and FlexAttention? a T4 is not """
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)

# -----------------------------------------------------------------------------
# mamba-2 (arxiv 2405.21060)

FORGET = -30.0 # log decay at the border of two documents: e^-30 of a state is less than fp32 can tell from nothing

def ssd(x, a, Bm, Cm, Q, state=None, want_state=True):
    """
    the state space recurrence h_t = exp(a_t) h_{t-1} + x_t Bm_t^T, y_t = h_t Cm_t, in n chunks of q tokens, Q at most: inside
    the chunks, all at once, it is masked attention, from chunk to chunk one state is handed on.
    x (B, T, nh, hs), a (B, T, nh) log decay <= 0, Bm and Cm (B, T, ns), state (B, nh, hs, ns) before the first token or
    None = zero -> y (B, T, nh, hs) and the last state, None if there is one chunk and nobody wants it.
    """
    T = x.size(1)
    n = -(-T // Q)
    q = -(-T // n)
    if n * q > T: # more tokens that change no state
        x, a, Bm, Cm = (F.pad(z, (0, 0) * (z.ndim - 2) + (0, n * q - T)) for z in (x, a, Bm, Cm))
    x, s, Bm, Cm = (z.unflatten(1, (n, q)) for z in (x, a, Bm, Cm))
    x, s = x.transpose(2, 3), s.cumsum(2).transpose(2, 3) # (B, n, nh, q, hs), and (B, n, nh, q) log decay from the chunk's start
    future = torch.full((q, q), float('-inf'), dtype=s.dtype, device=s.device).triu(1)
    L = (s[..., :, None] - s[..., None, :] + future).exp() # (B, n, nh, q, q) decay from token j to token i
    y = ((Cm @ Bm.transpose(2, 3))[:, :, None] * L) @ x # (B, n, nh, q, hs)
    if n > 1 or want_state or state is not None:
        new = (x * (s[..., -1:] - s).exp()[..., None]).transpose(3, 4) @ Bm[:, :, None] # (B, n, nh, hs, ns) what a chunk leaves
        keep, before = s[..., -1, None, None].exp(), []
        for i in range(n):
            before.append(torch.zeros_like(new[:, 0]) if state is None else state)
            state = new[:, i] if state is None else new[:, i] + state * keep[:, i]
        y = y + (Cm[:, :, None] @ torch.stack(before, 1).transpose(3, 4)) * s.exp()[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :T], state

def ssd_triton(x, a, Bm, Cm):
    """
    the same by the kernel of flash-linear-attention (its simple_gla, of which mamba-2 is a case), from a state of zero -> y.
    it cannot share Bm and Cm among heads, and a compiler has to step around it. x, Bm and Cm of one dtype, a fp32
    """
    from fla.ops.simple_gla import chunk_simple_gla
    q, k = (z[:, :, None].expand(-1, -1, x.size(2), -1) for z in (Cm, Bm)) # (B, T, nh, ns)
    return chunk_simple_gla(q, k, x, a, scale=1.0)[0]

def check_kernel(kernel, device):
    """ raises ValueError if this device cannot train with it """
    if kernel == 'triton':
        try:
            import fla.ops.simple_gla # noqa: F401
        except ImportError as e:
            raise ValueError(f"kernel='triton' is flash-linear-attention's, which is not here ({e}): pip install 'nanoarc[gpu]', or --kernel=torch") from None
        if device.type != 'cuda':
            raise ValueError(f"kernel='triton' is for cuda, this is {device}: --kernel=torch")

class Mamba2(nn.Module):
    """ project, short causal convolution, selective state space, gated norm, project """

    def __init__(self, cfg, kind='M'):
        super().__init__()
        self.hs, self.ns, self.Q, self.kernel = cfg.d_head, cfg.d_state, cfg.chunk_size, cfg.kernel
        self.inner = cfg.expand * cfg.n_embd
        nh, self.mixed = self.inner // self.hs, self.inner + 2 * cfg.d_state # the convolution mixes x, Bm and Cm
        self.in_proj = nn.Linear(cfg.n_embd, self.inner + self.mixed + nh, bias=False) # gate, x Bm Cm, dt
        self.conv = nn.Parameter(torch.empty(cfg.d_conv, self.mixed)) # [k] weighs the token k steps back
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.a_log, self.dt_bias, self.skip = (nn.Parameter(torch.empty(nh)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=1e-6)
        self.proj = nn.Linear(self.inner, cfg.n_embd, bias=False)

    def forward(self, x, ctx, cache=None):
        B, T, C = x.shape
        K = len(self.conv)
        gate, u, dt = self.in_proj(x).split([self.inner, self.mixed, len(self.skip)], -1)
        u = torch.cat([u.new_zeros(B, K - 1, self.mixed) if cache is None or cache.conv is None else cache.conv, u], 1)
        w = self.conv.to(u.dtype)
        mixed = self.conv_bias.to(u.dtype) + u[:, K - 1 :] * w[0]
        for k in range(1, K):
            earlier = u[:, K - 1 - k : T + K - 1 - k] # by k tokens
            if ctx.same is not None: # nothing flows over the border of a document
                earlier = earlier * ctx.same[k - 1]
            mixed = mixed + earlier * w[k]
        v, Bm, Cm = F.silu(mixed).split([self.inner, self.ns, self.ns], -1)
        v = v.reshape(B, T, -1, self.hs) # (B, T, nh, hs)
        with torch.autocast(x.device.type, enabled=False): # a sum of many decays: fp32
            dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias) # (B, T, nh) how much of this token the state takes
            a = -dt * self.a_log.exp()
            if ctx.same is not None:
                a = a.masked_fill(~ctx.same[0], FORGET)
            dv, state = v * dt[..., None], None if cache is None else cache.state
            triton = self.kernel == 'triton' and cache is None and x.is_cuda
            dv, Bm, Cm = (z.to(v.dtype if triton else dt.dtype) for z in (dv, Bm, Cm))
            if state is not None and T == 1: # a token after another, by definition
                state = state * a[:, 0, :, None, None].exp() + dv[:, 0, :, :, None] * Bm[:, 0, None, None, :]
                y = (state @ Cm[:, 0, None, :, None])[..., 0][:, None] # (B, 1, nh, hs)
            elif triton:
                y = ssd_triton(dv, a, Bm, Cm)
            else:
                y, state = ssd(dv, a, Bm, Cm, self.Q, state, cache is not None)
        if cache is not None:
            cache.conv, cache.state = u[:, T:], state
        y = (y + v * self.skip[:, None]).reshape(B, T, -1)
        return self.proj(self.norm((y * F.silu(gate)).type_as(x)))

# -----------------------------------------------------------------------------

class MLP(nn.Module):
    """ SwiGLU (arxiv 2002.05202) """

    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 2 * cfg.n_hidden, bias=False) # gate and value as one matrix
        self.proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, value = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(gate) * value)

class Block(nn.Module):
    """ pre-norm residual block around every mixer, mamba-2 too """

    def __init__(self, cfg, kind):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.mixer = {'A': Attention, 'S': Attention, 'M': Mamba2}[kind](cfg, kind)
        self.norm2 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.mlp = MLP(cfg)

    def forward(self, x, ctx, cache=None):
        x = x + self.mixer(self.norm1(x), ctx, cache) # (B, T, C)
        return x + self.mlp(self.norm2(x)) # (B, T, C)

# -----------------------------------------------------------------------------

class Context:
    """ what all layers share in one forward: rope tables, who sees whom, where documents begin """

    def __init__(self, cfg, x, pos, doc, cache):
        """ cfg filled, x (B, T, C) the embedded tokens, pos (B, T, 3) and doc (B, T) or None, cache a Cache or None """
        B, T, _ = x.shape
        n = cache.n if cache is not None else 0 # tokens before these
        here = x.is_cpu and not torch.compiler.is_compiling() # elsewhere to ask for a value would be to wait for it
        if cache is not None:
            doc = cache.documents(doc) # (B, n + T)
        self.same, self.masks, self.rope = None, {}, None
        # mamba-2. on cpu a row of one document and PAD after it is worth knowing: it has no border to heed
        if 'M' in cfg.kinds and doc is not None and not (here and doc.max() <= 0):
            d = F.pad(doc, (cfg.d_conv - 1, 0), value=-2)[:, n:]
            now = d[:, cfg.d_conv - 1 :]
            self.same = [(now == d[:, k : T + k])[..., None] for k in range(cfg.d_conv - 2, -1, -1)] # [k] is the token k + 1 before of the same document?
        # attention
        kinds = set(cfg.kinds) - {'M'}
        if len(kinds) == 0:
            return
        place = pos
        if len(cfg.rope_bases) == 1: # no places but the one in the document
            place = torch.arange(n + T, device=x.device).expand(B, -1)
            if doc is not None:
                first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0)) # of a document
                place = place - (place * first).cummax(1).values
            place = place[:, n:, None]
        self.rope = rope_tables(place, cfg.head_size, cfg.rope_bases)
        prompt = None
        if cfg.prefix and T > 1: # all up to the OUT of the target is prompt: the answer alone has z = 1 and is not at (0, 0)
            prompt = F.pad((pos[..., 2] != 1) | ((pos[..., 0] == 0) & (pos[..., 1] == 0)), (n, 0)) # (B, n + T), what came before is done with
        flex = cache is None and is_recent(x.device) and cfg.head_size >= 16 and cfg.head_size.bit_count() == 1
        for kind in kinds:
            self.masks[kind] = make_mask(n, T, doc, prompt, cfg.window if kind == 'S' else 0, here, flex, x)

def make_mask(n, T, doc, prompt, window, here, flex, x):
    """
    what T tokens after n others see -> a mask for `attend`. doc and prompt (B, n + T) or None, window in tokens or 0. the tokens of a
    document stand together. here: on cpu, where the keys that a block of queries cannot see are worth finding.
    """
    def see(b, h, i, j): # does token i see token j? h, the head, does not matter
        ok = i >= j if prompt is None else (i >= j) | (prompt[b, i] & prompt[b, j])
        if window > 0:
            ok = ok & ((i - j).abs() < window)
        return ok if doc is None else ok & (doc[b, i] == doc[b, j]) # PAD sees PAD
    if flex:
        return compiled(create_block_mask)(see, len(x) if doc is not None or prompt is not None else None, None, T, T, device=x.device)
    if T == 1 and doc is None: # one more token sees all that is in the cache
        return [(0, 1, max(n + 1 - window, 0) if window > 0 else 0, n + 1, None)]
    if doc is None and prompt is not None and n == 0 and window == 0 and prompt.all(): # nothing but prompt, as when decoding begins
        return [(0, T, 0, T, None)]
    blocks, rows = [], torch.arange(len(x), device=x.device)[:, None, None]
    for a in range(0, T, BLOCK if here else T):
        b = min(a + BLOCK, T) if here else T
        lo, hi = 0, n + (b if prompt is None else T)
        if here and doc is not None: # from where the first document of the block begins to where its last one ends
            lo = int((doc[:, : n + a + 1] == doc[:, n + a, None]).int().argmax(1).min())
            if prompt is not None:
                hi -= int((doc.flip(1) == doc[:, n + b - 1, None]).int().argmax(1).min())
        if window > 0:
            lo, hi = max(lo, n + a + 1 - window), min(hi, n + b - 1 + window)
        ok = see(rows, None, torch.arange(n + a, n + b, device=x.device)[:, None], torch.arange(lo, hi, device=x.device)) # (B, b - a, hi - lo)
        bias = torch.zeros(ok.shape, dtype=x.dtype, device=x.device).masked_fill(~ok, float('-inf'))
        blocks.append((a, b, lo, hi, bias.view(-1, 1, b - a, hi - lo)))
    return blocks

class Model(nn.Module):
    """
    model(*batch) -> logits (B, T, vocab_size) and the loss, summed over the tokens that carry it, in nats.
    with a cache it goes on where the last call ended: first the prompts, then a token at a time, or several.
    """
    pads = True # prompts of several lengths may go together, what fills up the shorter ones in front is a document of its own

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg = cfg.filled()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.n_task > 0:
            self.wtask, self.wdih = nn.Embedding(cfg.n_task, cfg.n_embd), nn.Embedding(8, cfg.n_embd)
        self.places = not set(cfg.kinds) & set('AS') and len(cfg.rope_bases) == 3
        if self.places: # without rope they are learned. z is a byte
            self.wrow, self.wcol, self.wz = nn.Embedding(32, cfg.n_embd), nn.Embedding(32, cfg.n_embd), nn.Embedding(256, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, kind) for kind in cfg.kinds)
        self.norm = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.apply(init_weights)

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        x = self.wte(idx) # (B, T, C)
        if self.cfg.n_task > 0:
            x = x + self.wtask(task) + self.wdih(dihedral.int())
        if self.places:
            x = x + self.wrow(pos[..., 0].int()) + self.wcol(pos[..., 1].int()) + self.wz(pos[..., 2].int())
        ctx = Context(self.cfg, x, pos, doc, cache)
        for i in range(self.cfg.loops * len(self.blocks)):
            x = self.blocks[i % len(self.blocks)](x, ctx, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.n += idx.size(1)
        logits = self.head(self.norm(x)) # (B, T, vocab_size)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') # skips -100

    @property
    def device(self):
        return self.head.weight.device

    def about(self):
        return f"{sum(p.numel() for p in self.parameters()):,} parameters, mixer {self.cfg.mixer}"

    def cache(self):
        """ for decoding, see Cache """
        return Cache(self)

    def optimizers(self, lr, adam_lr, weight_decay, ns_steps=5):
        """
        -> [Muon for the matrices of the blocks, AdamW for the rest: embeddings, head and convolutions with weight decay, norms, biases
        and the scalars of mamba-2 without]. ns_steps=0: AdamW for the matrices too, at the learning rate of Muon.
        """
        groups = {'matrix': [], 'decayed': [], 'plain': []}
        for name, p in self.named_parameters():
            kind = 'plain' if p.ndim < 2 else 'matrix' if name.startswith('blocks.') and name.endswith('.weight') else 'decayed'
            groups[kind].append(p)
        adam = [{'params': groups['decayed'], 'weight_decay': weight_decay}, {'params': groups['plain'], 'weight_decay': 0.0}]
        if ns_steps == 0:
            adam.append({'params': groups['matrix'], 'weight_decay': weight_decay, 'lr': lr})
        muon = [Muon(groups['matrix'], lr, weight_decay=weight_decay, steps=ns_steps)] if ns_steps > 0 else []
        return muon + [torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]

def init_weights(m):
    """ the whole initialization as one table. norms begin at 1 """
    if isinstance(m, (nn.Linear, nn.Embedding)):
        nn.init.normal_(m.weight, std=0.02)
    elif isinstance(m, Mamba2): # the paper's: decays of 1..16 a unit of time, steps of 0.001 to 0.1
        nn.init.uniform_(m.conv, -len(m.conv) ** -0.5, len(m.conv) ** -0.5)
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
    of AdamW's (Moonlight, arxiv 2502.16982). in 16 bits on cuda, fp32 on cpu where bf16 is several times slower.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, cols), ps in shapes.items():
                for p in ps:
                    if 'momentum' not in self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                grads, bufs = [p.grad for p in ps], [self.state[p]['momentum'] for p in ps]
                torch._foreach_lerp_(bufs, grads, 1 - group['momentum'])
                g = torch.stack(torch._foreach_lerp(grads, bufs, group['momentum'])) # nesterov, (n, rows, cols)
                g = orthogonalize(g, group['steps']) * (0.2 * max(rows, cols) ** 0.5)
                torch._foreach_mul_(ps, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(ps, list(g.unbind(0)), alpha=-group['lr'])

def orthogonalize(g, steps):
    """ (n, rows, cols) -> about U V^T of each: a quintic iteration pushes all singular values towards 1 """
    x = g.bfloat16() if is_recent(g.device) else g.half() if g.is_cuda else g
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x # work on the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).type_as(g)

# -----------------------------------------------------------------------------
# decode caches

class KVCache:
    """ keys and values of the tokens so far, (B, nkv, T, hs), with room to grow """

    def __init__(self):
        self.k = self.v = None
        self.n = 0 # tokens so far

    def append(self, k, v):
        """ (B, nkv, t, hs) more -> all so far """
        a, self.n = self.n, self.n + k.size(2)
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        if self.n > self.k.size(2): # grow by half, so that a token costs the same on average
            self.k, self.v = (F.pad(x, (0, 0, 0, self.n + self.n // 2 - x.size(2))) for x in (self.k, self.v))
        self.k[:, :, a : self.n], self.v[:, :, a : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]

    def keep(self, rows):
        """ go on with these rows of the batch only """
        self.k, self.v = self.k[rows], self.v[rows]

class SSMCache:
    """ what mamba-2 remembers: the last inputs of the convolution (B, K-1, channels) and the state (B, nh, hs, ns) """

    def __init__(self):
        self.conv = self.state = None

    def keep(self, rows):
        """ go on with these rows of the batch only """
        self.conv, self.state = self.conv[rows], self.state[rows]

class Cache:
    """ decode caches of all layers, for a batch of prompts. docs in every call or in none; with prefix a prompt comes in one call """

    def __init__(self, model):
        self.layers = [SSMCache() if kind == 'M' else KVCache() for _ in range(model.cfg.loops) for kind in model.cfg.kinds]
        self.n, self.doc = 0, None # tokens so far, and their documents (B, n)

    def documents(self, doc):
        """ those of more tokens, (B, T) or None -> those of all so far, (B, n + T) or None """
        assert self.n == 0 or (doc is None) == (self.doc is None), "docs in every call or in none"
        self.doc = doc if self.doc is None else torch.cat([self.doc, doc], 1)
        return self.doc

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 or bool """
        self.doc = self.doc if self.doc is None else self.doc[rows]
        for layer in self.layers:
            layer.keep(rows)
