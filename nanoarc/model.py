"""
the model, in reading order: config, rope, attention, mamba-2, block, model, init, muon, decode caches.

a stack of pre-norm residual blocks, each a mixer and a SwiGLU. the pattern `mixer` is repeated over the layers: 'A' is
attention, 'M' is Mamba-2, 'MA' alternates the two. it knows nothing of ARC but what a batch tells it: token ids, places
(row, col, z), which document a token belongs to, and at shots=0 which task and symmetry it is.
B, T, C are batch, time, channels; nh heads of size hs; ns is the state size of mamba-2, whose B and C are Bm and Cm here.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class ModelConfig:
    mixer: str = 'MA' # pattern over the layers: A = attention, M = mamba-2, e.g. 'A', 'MMA'
    n_layer: int = 4 # blocks, each a mixer and a SwiGLU
    n_embd: int = 128 # width of the residual stream
    head_size: int = 32 # of attention
    n_hidden: int = 0 # width of the SwiGLU, 0 = 8/3 n_embd rounded down to a multiple of 16
    prefix: bool = True # the tokens of a prompt see each other both ways (attention only, loss_on='query' only)
    rope_bases: tuple[float, float, float] = (100.0, 100.0, 10.0) # of row, col, z
    d_state: int = 64 # ns, the state size of mamba-2
    d_head: int = 64 # its head size
    d_conv: int = 4 # width of its causal convolution
    expand: int = 2 # its inner width over n_embd
    chunk_size: int = 64 # tokens of a chunk of its scan
    vocab_size: int = 16 # of the grid tokens
    n_task: int = 0 # rows of the task embedding, set from the data. 0 = in context, no embedding

    def __post_init__(self):
        self.rope_bases = tuple(self.rope_bases) # json and toml know lists only

    @property
    def kinds(self):
        """ the mixer of each layer, e.g. 'MAMA' """
        return (self.mixer * self.n_layer)[: self.n_layer]

# -----------------------------------------------------------------------------
# 3d rope (RoFormer, arxiv 2104.09864, an axis at a time as in mdlARC)

def rope_tables(pos, hs, bases):
    """ (B, T, 3) row, col, z -> cos and signed sin (B, T, 1, hs) fp32. of the hs/2 pairs z turns the fewest """
    n = [-(-hs // 6), -(-hs // 6)] # pairs that row and col turn
    n.append(hs // 2 - sum(n))
    angles = []
    for axis in range(3):
        freq = bases[axis] ** -(torch.arange(n[axis], dtype=torch.float32, device=pos.device) / n[axis])
        angles.append(pos[..., axis : axis + 1].float() * freq) # (B, T, n)
    angles = torch.cat(angles, -1)[:, :, None] # (B, T, 1, hs/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1) # as rotate wants them: (B, T, 1, hs)

def rotate(x, cos, sin):
    """ (B, T, nh, hs), each pair (i, i + hs/2) of its channels turned """
    x1, x2 = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([x2, x1], -1), sin).type_as(x)

# -----------------------------------------------------------------------------

class Attention(nn.Module):
    """ multi-head attention with rope on q and k. what a token may see is the mask's business """

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_embd % cfg.head_size or cfg.head_size < 6 or cfg.head_size % 2:
            raise ValueError(f"n_embd={cfg.n_embd} head_size={cfg.head_size}: want heads of an even size from 6 that divides n_embd")
        self.hs = cfg.head_size
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, ctx, cache=None):
        B, T, C = x.shape
        nh = C // self.hs
        qk, v = self.qkv(x).view(B, T, 3 * nh, self.hs).split([2 * nh, nh], 2)
        q, k = rotate(qk, *ctx.rope).transpose(1, 2).chunk(2, 1) # (B, nh, T, hs) each
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.mask, is_causal=ctx.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

class KVCache:
    """ keys and values of the tokens so far, (B, nh, T, hs), with room to grow """

    def __init__(self):
        self.k = self.v = None
        self.n = 0 # tokens so far

    def append(self, k, v):
        """ (B, nh, t, hs) more -> all so far """
        a, self.n = self.n, self.n + k.size(2)
        if self.k is None:
            self.k, self.v = k, v
        if self.n > self.k.size(2): # grow by half, so that a token costs the same on average
            self.k, self.v = (F.pad(x, (0, 0, 0, self.n // 2 + 16)) for x in (self.k, self.v))
        self.k[:, :, a : self.n], self.v[:, :, a : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]

    def keep(self, rows):
        """ go on with these rows of the batch only """
        self.k, self.v = self.k[rows], self.v[rows]

# -----------------------------------------------------------------------------
# mamba-2 (arxiv 2405.21060)

def ssd(x, a, Bm, Cm, doc, Q, want_state=True):
    """
    the state space recurrence h_t = exp(a_t) h_{t-1} + x_t Bm_t^T, y_t = h_t Cm_t, in chunks of Q tokens: inside a
    chunk it is masked attention, between chunks one state is handed on. the state starts at zero in each document.
    x (B, T, nh, hs), a (B, T, nh) log decay <= 0, Bm and Cm (B, T, ns), doc (B, T) or None -> y (B, T, nh, hs) and the
    last state (B, nh, hs, ns), not up to date with want_state=False. tested against the recurrence, a token at a time.
    """
    B, T, nh, hs = x.shape
    y, state, before = [], x.new_zeros(B, nh, hs, Bm.size(-1)), None # before: the document that the state belongs to
    for t in range(0, T, Q):
        xc, bc, cc = x[:, t : t + Q], Bm[:, t : t + Q], Cm[:, t : t + Q]
        s = a[:, t : t + Q].cumsum(1).transpose(1, 2) # (B, nh, q) log decay from the chunk's start
        L = s[..., :, None] - s[..., None, :] # (B, nh, q, q) log decay from token j to token i
        seen = torch.ones(L.shape[-2:], dtype=torch.bool, device=x.device).tril()
        carry, last = s.exp(), (s[..., -1:] - s).exp() # (B, nh, q) from the state to token i, and from token j to the end
        if doc is not None:
            dc = doc[:, t : t + Q]
            seen = seen & (dc[:, None, :, None] == dc[:, None, None, :])
            last = last * (dc == dc[:, -1:])[:, None]
            if before is not None:
                carry = carry * (dc == before)[:, None]
            before = dc[:, -1:]
        att = (cc @ bc.transpose(1, 2))[:, None] * L.masked_fill(~seen, float('-inf')).exp() # (B, nh, q, q)
        yc = att @ xc.transpose(1, 2) # (B, nh, q, hs)
        if t > 0: # the first chunk has no past
            yc = yc + (cc[:, None] @ state.transpose(2, 3)) * carry[..., None]
        y.append(yc.transpose(1, 2))
        if want_state or t + Q < T:
            state = state * carry[..., -1, None, None] + (xc.transpose(1, 2) * last[..., None]).transpose(2, 3) @ bc[:, None]
    return torch.cat(y, 1), state

class Mamba2(nn.Module):
    """ project, short causal convolution, selective state space, gated norm, project """

    def __init__(self, cfg):
        super().__init__()
        self.hs, self.ns, self.Q = cfg.d_head, cfg.d_state, cfg.chunk_size
        self.inner = cfg.expand * cfg.n_embd
        if self.inner % self.hs or cfg.d_conv < 2 or cfg.chunk_size < 1:
            raise ValueError(f"expand * n_embd = {self.inner}, d_head={self.hs}, d_conv={cfg.d_conv}, chunk_size={cfg.chunk_size}: "
                             "want a d_head that divides the first, a d_conv of at least 2 and chunks")
        nh, self.mixed = self.inner // self.hs, self.inner + 2 * cfg.d_state # the convolution mixes x, Bm and Cm
        self.in_proj = nn.Linear(cfg.n_embd, self.inner + self.mixed + nh, bias=False) # gate, x Bm Cm, dt
        self.conv = nn.Parameter(torch.empty(cfg.d_conv, self.mixed)) # [k] weighs the token k steps back
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.a_log, self.dt_bias, self.skip = (nn.Parameter(torch.empty(nh)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=1e-6)
        self.proj = nn.Linear(self.inner, cfg.n_embd, bias=False)

    def forward(self, x, ctx, cache=None):
        B, T, C = x.shape
        K, doc = len(self.conv), ctx.doc
        gate, u, dt = self.in_proj(x).split([self.inner, self.mixed, len(self.skip)], -1)
        step = cache is not None and cache.state is not None # one token after another
        past = cache.conv if step else u.new_zeros(B, K - 1, self.mixed)
        u = torch.cat([past, u], 1)
        if cache is not None:
            cache.conv = u[:, -(K - 1) :]
        mixed = torch.addcmul(self.conv_bias, u[:, K - 1 :], self.conv[0])
        for k in range(1, K):
            shifted = u[:, K - 1 - k : T + K - 1 - k] # k tokens earlier
            if doc is not None: # nothing flows over the border of a document
                shifted = shifted * F.pad(doc[:, k:] == doc[:, :-k], (min(k, T), 0))[..., None] if T > k else shifted * 0
            mixed = torch.addcmul(mixed, shifted, self.conv[k])
        v, Bm, Cm = F.silu(mixed).split([self.inner, self.ns, self.ns], -1)
        v = v.reshape(B, T, -1, self.hs) # (B, T, nh, hs)
        dt = F.softplus(dt.float() + self.dt_bias) # (B, T, nh) how much of this token the state takes
        a = -dt * self.a_log.exp()
        dv = v * dt[..., None].type_as(v)
        if step:
            assert T == 1, "with a state at hand it goes a token at a time"
            state = cache.state * a[:, 0, :, None, None].exp() + dv[:, 0, :, :, None] * Bm[:, 0, None, None, :]
            y = (state * Cm[:, 0, None, None, :]).sum(-1)[:, None].type_as(v)
        else:
            with torch.autocast(x.device.type, enabled=False): # a sum of many decays: fp32
                y, state = ssd(*(z.to(a.dtype) for z in (dv, a, Bm, Cm)), doc, self.Q, cache is not None)
        if cache is not None:
            cache.state = state
        y = (y + v * self.skip[:, None]).reshape(B, T, -1)
        return self.proj(self.norm((y * F.silu(gate)).type_as(x)))

class SSMCache:
    """ what mamba-2 remembers: the last inputs of the convolution (B, K-1, channels) and the state (B, nh, hs, ns) """

    def __init__(self):
        self.conv = self.state = None

    def keep(self, rows):
        """ go on with these rows of the batch only """
        self.conv, self.state = self.conv[rows], self.state[rows]

# -----------------------------------------------------------------------------

class MLP(nn.Module):
    """ SwiGLU (arxiv 2002.05202) """

    def __init__(self, cfg):
        super().__init__()
        hidden = cfg.n_hidden or cfg.n_embd * 8 // 3 // 16 * 16
        self.fc = nn.Linear(cfg.n_embd, 2 * hidden, bias=False) # gate and value as one matrix
        self.proj = nn.Linear(hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, value = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(gate) * value)

class Block(nn.Module):
    """ pre-norm residual block around every mixer, mamba-2 too """

    def __init__(self, cfg, kind):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.mixer = {'A': Attention, 'M': Mamba2}[kind](cfg)
        self.norm2 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.mlp = MLP(cfg)

    def forward(self, x, ctx, cache=None):
        x = x + self.mixer(self.norm1(x), ctx, cache) # (B, T, C)
        return x + self.mlp(self.norm2(x)) # (B, T, C)

class Context:
    """ what all layers share in one forward: rope tables, the attention mask, the documents """

    def __init__(self, cfg, pos, doc, start):
        """ start: tokens already in the cache """
        self.mask, self.causal = None, False
        # a row of one document and PAD after it has no border that a causal mixer must heed. a gpu would have to wait for the
        # answer, so there the borders are always heeded
        alone = doc is None or (doc.device.type == 'cpu' and not (doc > 0).any())
        self.doc = None if alone else doc
        if 'A' not in cfg.kinds:
            return
        self.rope = rope_tables(pos, cfg.head_size, cfg.rope_bases)
        if start > 0: # one more token sees all that is in the cache
            return
        if doc is None: # one prompt a row, all of it
            self.causal = not cfg.prefix
            return
        T = doc.size(1)
        i = torch.arange(T, device=doc.device)
        see = i[:, None] >= i # (T, T) causal
        if cfg.prefix: # all up to the OUT of the target is prompt. the answer alone has z = 1 and is not at (0, 0)
            prompt = (pos[..., 2] != 1) | ((pos[..., 0] == 0) & (pos[..., 1] == 0)) # (B, T)
            see = see | (prompt[:, :, None] & prompt[:, None, :])
        self.mask = (see & (doc[:, :, None] == doc[:, None, :]))[:, None] # (B, 1, T, T), PAD sees PAD

class Model(nn.Module):
    """
    model(*batch) -> logits (B, T, vocab_size) and the loss, summed over the tokens that carry it, in nats.
    with a cache: first the prompts (of one length, doc None), then a token at a time.
    """

    def __init__(self, cfg):
        super().__init__()
        if not cfg.mixer or set(cfg.mixer) - set('AM') or cfg.n_layer < 1 or cfg.n_embd < 1 or cfg.vocab_size < 16:
            raise ValueError(f"mixer={cfg.mixer!r} n_layer={cfg.n_layer} n_embd={cfg.n_embd} vocab_size={cfg.vocab_size}: "
                             "want a pattern of A and M, e.g. 'MA', at least a layer, and the 16 grid tokens")
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.n_task > 0:
            self.wtask, self.wdih = nn.Embedding(cfg.n_task, cfg.n_embd), nn.Embedding(8, cfg.n_embd)
        if 'A' not in cfg.kinds: # without rope the places are learned. z is a byte
            self.wrow, self.wcol, self.wz = nn.Embedding(32, cfg.n_embd), nn.Embedding(32, cfg.n_embd), nn.Embedding(256, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, kind) for kind in cfg.kinds)
        self.norm = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.apply(init_weights)

    def forward(self, idx, targets=None, pos=None, doc=None, task=None, dihedral=None, cache=None):
        x = self.wte(idx) # (B, T, C)
        if self.cfg.n_task > 0:
            x = x + self.wtask(task) + self.wdih(dihedral.int())
        if 'A' not in self.cfg.kinds:
            x = x + self.wrow(pos[..., 0].int()) + self.wcol(pos[..., 1].int()) + self.wz(pos[..., 2].int())
        ctx = Context(self.cfg, pos, doc, cache.n if cache is not None else 0)
        for i, block in enumerate(self.blocks):
            x = block(x, ctx, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.n += idx.size(1)
        logits = self.head(self.norm(x)) # (B, T, vocab_size)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') # skips -100

    def optimizers(self, lr, adam_lr, weight_decay):
        """ -> [Muon for the matrices of the blocks, AdamW for embeddings, head, norms and the rest] """
        named = dict(self.named_parameters())
        matrices = [p for name, p in named.items() if name.startswith('blocks.') and name.endswith('.weight') and p.ndim == 2]
        known = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in known]
        decayed, plain = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim < 2]
        return [Muon(matrices, lr, weight_decay=weight_decay),
                torch.optim.AdamW([{'params': decayed, 'weight_decay': weight_decay}, {'params': plain, 'weight_decay': 0.0}],
                                  lr=adam_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]

def init_weights(m):
    """ the whole initialization as one table """
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
    of AdamW's (Moonlight, arxiv 2502.16982). bf16 on cuda, fp32 on cpu where bf16 is several times slower.
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
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x # work on the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).type_as(g)

class Cache:
    """ decode caches of all layers, for a batch of prompts of one length """

    def __init__(self, model):
        self.layers = [KVCache() if isinstance(block.mixer, Attention) else SSMCache() for block in model.blocks]
        self.n = 0 # tokens so far

    def keep(self, rows):
        """ go on with these rows of the batch only, (b,) int64 or bool """
        for layer in self.layers:
            layer.keep(rows)
