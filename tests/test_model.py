""" python -m pytest tests/test_model.py: the model against plain definitions of its parts. most models are in fp64 """
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings, strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.decode import decode
from nanoarc.grids import END, IN, OUT, ROW, VOCAB_SIZE, decode_grid, dihedral, may_follow, next_place
from nanoarc.model import (BLOCK, FORGET, Attention, Cache, Dropout, Mamba2, Model, ModelConfig, Muon, Shared, Span,
                           attend, frame_places, hand_on, input_sizes, make_mask, orthogonalize, read_frames,
                           ssd, tile_number, width_lr)

MIXERS = ['A', 'M', 'MA', 'MS']
SWITCHES = {'plain': {}, 'loops': dict(loops=2), '1d_rope': dict(rope_bases=(10000.0,)), 'frames': dict(frames='all')}

def make(mixer='A', n_task=4, **kwargs):
    """ a tiny model in fp64, its weights large enough that every part matters """
    torch.manual_seed(1337)
    if mixer == 'frames':
        mixer, kwargs = 'MA', {**SWITCHES['frames'], **kwargs}
    tiny = dict(n_layer=2, n_embd=32, frames='', dropout=0.0, head_size=16, d_head=16, d_state=8, chunk_size=5,
                window=7)
    model = Model(ModelConfig(mixer=mixer, n_task=n_task, **{**tiny, **kwargs})).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.3)
    return model

def toy_batch(src, shots=0):
    return ArcLoader(ArcDataset(DataConfig(data=src, batch_tokens=300, shots=shots))).next_batch()

def packed_loader(src, shots=0):
    ds = ArcDataset(DataConfig(data=src, shots=shots, batching='pack', block_size=300, batch_tokens=600))
    return ArcLoader(ds)

def cut(batch, rows, cols):
    """ a part of a batch: what is None stays None """
    return [None if x is None else x[rows, cols] for x in batch]

def random_row(T=9):
    """ (1, T) tokens at random places, of task 0, not turned: arguments of a model """
    idx, pos = torch.randint(0, 10, (1, T)), torch.randint(0, 5, (1, T, 3), dtype=torch.uint8)
    return idx, None, pos, None, torch.zeros(1, T).int(), torch.zeros(1, T)

def relative(x, want):
    return ((x - want).abs().max() / want.abs().max()).item()

# -----------------------------------------------------------------------------
# the scan of mamba-2

def by_recurrence(x, a, Bm, Cm, doc, h=None):
    """ the definition: decay the state, write x into it, read it out; a new document starts from zero """
    B, T, nh, hs = x.shape
    if h is None:
        h = torch.zeros(B, nh, hs, Bm.size(-1), dtype=x.dtype)
    ys = []
    for t in range(T):
        if t > 0:
            h = h * (doc[:, t] == doc[:, t - 1])[:, None, None, None]
        h = h * a[:, t].exp()[..., None, None] + x[:, t, ..., None] * Bm[:, t, None, None]
        ys.append((h * Cm[:, t, None, None]).sum(-1)) # (B, nh, hs)
    return torch.stack(ys, 1), h

def scan_inputs(T, dtype=torch.float64, B=2, nh=3, hs=4, ns=5):
    """ -> x, a, Bm, Cm, and doc with three documents a row """
    torch.manual_seed(1337)
    x, a = torch.randn(B, T, nh, hs, dtype=dtype), -torch.rand(B, T, nh, dtype=dtype) * 3
    cuts = torch.sort(torch.randint(0, T + 1, (B, 2)))[0]
    doc = (torch.arange(T) >= cuts[:, :1]).int() + (torch.arange(T) >= cuts[:, 1:]).int()
    return x, a, torch.randn(B, T, ns, dtype=dtype), torch.randn(B, T, ns, dtype=dtype), doc

def forget(a, doc):
    """ the decays of a packed row: a document drops the state of the one before """
    is_first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))
    return a.masked_fill(is_first[..., None], FORGET)

@pytest.mark.parametrize('T, Q', [(1, 4), (17, 1), (17, 4), (17, 17), (17, 64), (32, 8), (33, 8), (300, 128)])
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_ssd_matches_the_recurrence(T, Q, dtype, tol):
    x, a, Bm, Cm, doc = scan_inputs(T, dtype)
    h = torch.randn(2, 3, 4, 5, dtype=dtype)
    one = torch.zeros_like(doc)
    for d, start in ((one, None), (one, h), (doc, None), (doc, h)):
        y, state = ssd(x, a if d is one else forget(a, d), Bm, Cm, Q, start)
        want, last = by_recurrence(x, a, Bm, Cm, d, start)
        assert relative(y, want) < tol and relative(state, last) < tol
    assert torch.equal(ssd(x, a, Bm, Cm, Q, want_state=False)[0], ssd(x, a, Bm, Cm, Q)[0])

def test_a_state_that_is_forgotten_leaves_nothing_even_in_many_documents_of_a_token():
    x, a, Bm, Cm, _ = scan_inputs(64, torch.float32)
    doc = torch.arange(64).expand(2, -1)
    y, _ = ssd(x, forget(a, doc), Bm, Cm, 64)
    assert relative(y, by_recurrence(x, a, Bm, Cm, doc)[0]) < 1e-4

def test_ssd_has_the_gradient_of_the_recurrence():
    *inputs, doc = scan_inputs(11)
    inputs.append(torch.randn(2, 3, 4, 5, dtype=torch.float64))

    def by_ssd(x, a, Bm, Cm, h):
        return ssd(x, forget(a, doc), Bm, Cm, 4, h)

    def by_definition(x, a, Bm, Cm, h):
        return by_recurrence(x, a, Bm, Cm, doc, h)

    grads = []
    for f in (by_ssd, by_definition):
        z = [v.clone().requires_grad_() for v in inputs]
        y, state = f(*z)
        ((y ** 2).sum() + state.sum()).backward()
        grads.append([v.grad for v in z])
    assert all((p - q).abs().max() < 1e-9 for p, q in zip(*grads))

def test_states_handed_on_at_once_are_those_of_a_chain():
    torch.manual_seed(1337)
    x, Bm = torch.randn(2, 6, 3, 1, 4).double(), torch.randn(2, 6, 1, 5).double() # chunks of a token
    s = -3 * torch.rand(2, 6, 3, 1).double()
    s[:, 3] = FORGET
    args = [z.requires_grad_() for z in (x, s, Bm, torch.randn(2, 3, 4, 5).double())]
    h, before = args[3], []
    for i in range(6):
        before.append(h)
        h = x[:, i, :, 0, :, None] * Bm[:, i, 0, None, None] + h * s[:, i, :, :, None].exp()
    want, found = (torch.stack(before, 1), h), hand_on(*args)
    g = [torch.randn_like(x) for x in want]
    for x, y in zip(found + torch.autograd.grad(found, args, g), want + torch.autograd.grad(want, args, g)):
        assert relative(x, y) < 1e-10

def test_gradcheck_of_ssd():
    *inputs, _ = scan_inputs(7, B=1, nh=2, hs=2, ns=3)
    inputs.append(torch.randn(1, 2, 2, 3, dtype=torch.float64))
    args = [v.requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(lambda x, a, Bm, Cm, h: ssd(x, a, Bm, Cm, 3, h), args)

def test_mamba_equals_that_of_transformers_with_the_same_weights():
    transformers = pytest.importorskip('transformers')
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    torch.manual_seed(1337)
    ours = Mamba2(ModelConfig(mixer='M', n_embd=64, d_head=16, d_state=8, chunk_size=16).resolved())
    theirs = Mamba2Mixer(transformers.Mamba2Config(
        hidden_size=64, num_heads=8, head_dim=16, state_size=8, expand=2, conv_kernel=4, n_groups=1, chunk_size=8,
        num_hidden_layers=1, use_bias=False, layer_norm_epsilon=1e-6), layer_idx=0)
    pairs = [(ours.in_proj.weight, theirs.in_proj.weight), (ours.conv_bias, theirs.conv1d.bias),
             (ours.a_log, theirs.A_log), (ours.dt_bias, theirs.dt_bias), (ours.skip, theirs.D),
             (ours.norm.weight, theirs.norm.weight), (ours.proj.weight, theirs.out_proj.weight)]
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.3)
        for p, q in pairs:
            q.copy_(p)
        theirs.conv1d.weight.copy_(ours.conv.flip(0).t()[:, None])

    class Ctx:
        same = None

    x = torch.randn(2, 37, 64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(mine, Ctx), theirs(other)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    assert relative(y, want) < 1e-5 and relative(mine.grad, other.grad) < 1e-4
    assert all(relative(p.grad, q.grad) < 1e-4 for p, q in pairs)
    assert relative(ours.conv.grad, theirs.conv1d.weight.grad[:, 0].t().flip(0)) < 1e-4

def test_mamba_begins_with_the_decays_and_steps_of_the_paper():
    mixer = Model(ModelConfig(mixer='M', n_embd=512)).blocks[0].mixer
    dt, decay = F.softplus(mixer.dt_bias), mixer.a_log.exp()
    assert 1e-3 <= dt.min() < 1e-2 < dt.max() <= 0.1 and 1 <= decay.min() and decay.max() <= 16
    assert (mixer.skip == 1).all() and (mixer.conv_bias == 0).all() and mixer.conv.abs().max() <= 0.5

# -----------------------------------------------------------------------------
# attention

def row_of_documents(T, seed=0):
    """ -> doc (2, T) of packed rows, PAD at the end of the second """
    rng = np.random.default_rng(seed)
    doc = np.stack([np.sort(rng.integers(0, max(T // 20, 1), T)) for _ in range(2)])
    doc = np.unique(doc, return_inverse=True)[1].reshape(2, T)
    doc[1, T - T // 5 :] = -1
    return torch.from_numpy(doc).int()

def by_softmax(q, k, v, doc, window):
    """ the definition, a query at a time """
    y = torch.zeros_like(q)
    for b in range(q.size(0)):
        for i in range(q.size(2)):
            see = []
            for j in range(i + 1):
                if (window == 0 or i - j < window) and (doc is None or doc[b, i] == doc[b, j]):
                    see.append(j)
            att = (q[b, :, i, None] * k[b][:, see]).sum(-1) / q.size(-1) ** 0.5
            y[b, :, i] = (att.softmax(-1)[..., None] * v[b][:, see]).sum(1)
    return y

@pytest.fixture
def flex_on_cpu(monkeypatch):
    """ FlexAttention, not compiled: the mask that a gpu gets """
    monkeypatch.setattr('nanoarc.model.compiled', lambda f: f)

@pytest.mark.parametrize('window', [0, 1, 9])
@pytest.mark.parametrize('T', [1, 50, 2 * BLOCK + 3])
@pytest.mark.parametrize('how', ['blocks', 'one', 'flex'])
def test_attention_sees_what_it_should_on_every_path(T, window, how, flex_on_cpu):
    if how == 'flex' and (T == 50 or window == 9):
        pytest.skip("slow on cpu")
    torch.manual_seed(1337)
    q, k, v = torch.randn(3, 2, 2, T, 16, dtype=torch.float64).unbind()
    for doc in (row_of_documents(T), None):
        with torch.no_grad():
            y = attend(q, k, v, make_mask(q[:, 0], 0, doc, window, how))
        assert (y - by_softmax(q, k, v, doc, window)).abs().max() < 1e-12

@pytest.mark.parametrize('T', [BLOCK - 1, 3 * BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize('window', [0, 1, BLOCK, BLOCK + 9])
def test_flex_attention_skips_the_blocks_that_nobody_sees_and_asks_nothing_where_all_do(T, window):
    long = torch.arange(T) // (2 * BLOCK + 1)
    for doc in (row_of_documents(T), torch.stack([torch.zeros(T), long]).int(), torch.arange(T).expand(2, -1), None):
        mask = make_mask(torch.zeros(2, T, 8), 0, doc, window, 'flex')
        want = create_block_mask(mask.mask_mod, 2, None, T, T, device='cpu') # looks at all pairs
        assert torch.equal(mask.to_dense(), want.to_dense())
        for name in ('kv_num_blocks', 'full_kv_num_blocks', 'q_num_blocks', 'full_q_num_blocks'):
            assert torch.equal(getattr(mask, name), getattr(want, name)), name
        ok = create_mask(mask.mask_mod, 2, None, T, T, device='cpu')[:, 0]
        i, j = torch.arange(T)[:, None], torch.arange(T)
        same = True if doc is None else doc[:, :, None] == doc[:, None]
        assert torch.equal(ok, ((j <= i) & ((window == 0) | (i - j < window)) & same).expand(2, -1, -1))

def test_long_rows_take_the_fused_kernel_and_see_the_same():
    T = 9 * BLOCK + 5
    q, k, v = torch.randn(3, 1, 1, T, 8, dtype=torch.float64).unbind()
    y = attend(q, k, v, make_mask(q[:, 0], 0, None, 0, 'blocks'))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (y - want).abs().max() < 1e-12

def test_blocks_leave_out_keys_that_none_of_them_sees():
    T = 4 * BLOCK
    x = torch.zeros(1, T, 8)
    doc = (torch.arange(T) // (BLOCK // 2))[None].int() # two documents a block
    mask = make_mask(x, 0, doc, 0, 'blocks')
    assert [s[:2] for s in mask] == [(BLOCK, slice(a, a + BLOCK)) for a in range(0, T, BLOCK)]
    mask = make_mask(x, 0, None, 10, 'blocks')
    assert [s.keys for s in mask] == [slice(max(a - 9, 0), a + BLOCK) for a in range(0, T, BLOCK)]

# -----------------------------------------------------------------------------
# documents

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('switch', SWITCHES)
@pytest.mark.parametrize('shots', [0, -1])
def test_a_packed_row_equals_its_documents_alone(toy, mixer, switch, shots):
    model = make(mixer, n_task=4 if shots == 0 else 0, **SWITCHES[switch])
    batch = packed_loader(toy(n=4), shots).next_batch()
    logits, loss = model(*batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0
    for row, docs in enumerate(batch.doc):
        for d in range(int(docs.max()) + 1):
            alone = batch._replace(doc=batch.doc * 0)
            one, nats = model(*(None if x is None else x[row][docs == d][None] for x in alone))
            assert (one[0] - logits[row][docs == d]).abs().max() < 1e-10
            nats.backward()
            total += nats.item()
    assert int(batch.doc.max()) > 1 and abs(loss.item() - total) < 1e-9 * total and torch.isfinite(logits).all()
    assert all(relative(p.grad, grads[name]) < 1e-8 for name, p in model.named_parameters())

@pytest.mark.parametrize('mixer', MIXERS)
def test_a_padded_row_equals_its_document_alone_and_the_loss_is_a_sum(mixer, toy):
    batch = toy_batch(toy(n=4, side=5))
    model = make(mixer)
    logits, loss = model(*batch)
    alone = 0
    for b in range(len(batch.idx)):
        n = int((batch.doc[b] == 0).sum())
        one, nats = model(*(x[b : b + 1, :n] for x in batch))
        assert (one[0] - logits[b, :n]).abs().max() < 1e-10
        alone += nats
    assert torch.isfinite(logits).all() and (loss - alone).abs() < 1e-8 * loss

@pytest.mark.parametrize('mixer', MIXERS)
def test_two_documents_in_one_row_do_not_see_each_other(mixer, toy):
    batch = toy_batch(toy(n=4, side=4))
    model = make(mixer)
    n = [int((batch.doc[b] == 0).sum()) for b in range(2)]
    row = [torch.cat([x[0, : n[0]], x[1, : n[1]]])[None] for x in batch]
    row[3] = torch.tensor([[0] * n[0] + [1] * n[1]], dtype=torch.int32)
    logits, want = model(*row)[0][0], model(*batch)[0]
    assert (logits - torch.cat([want[0, : n[0]], want[1, : n[1]]])).abs().max() < 1e-10

@pytest.mark.parametrize('mixer', MIXERS)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_changing_an_output_token_moves_nothing_before_it(mixer, data):
    model = make(mixer)
    tokens = [IN, 1, 2, ROW, 3, 4, ROW, OUT, 5, 6, 7, ROW, 8, 9, 0, ROW, 1, 2, 3, ROW, END]
    idx, T = torch.tensor([tokens]), len(tokens)
    places = [(0, 0, 0)]
    for token in tokens[1:]:
        places.append(next_place(*places[-1], token))
    pos, told = torch.tensor([places], dtype=torch.uint8), torch.zeros(1, T).int()
    args = dict(pos=pos, doc=told, task=told, dihedral=told)
    before = model(idx, **args)[0]
    t = data.draw(st.integers(8, T - 1)) # the answer begins at 8
    idx[0, t] = (idx[0, t] + data.draw(st.integers(1, 9))) % 10
    after = model(idx, **args)[0]
    assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])

# -----------------------------------------------------------------------------
# frames

def tokens_of(*grids):
    """ -> (1, T, 3) the places of pairs of grids, the last one with z = 0 and 1 """
    places = []
    for n, grid in enumerate(grids):
        z = 2 * (len(grids) // 2 - 1 - n // 2) + n % 2
        places.append((0, 0, z))
        for r in range(grid.shape[0]):
            places += [(r, c + 1, z) for c in range(grid.shape[1])]
            places.append((r + 1, 0, z))
    return torch.tensor([places], dtype=torch.uint8)

def made(x, frame):
    """ what a frame makes of a grid: the output that its head finds cell by cell """
    H, W = x.shape
    if frame in ('a', 'b'):
        x = x if H > W else x.T
        half = len(x) // 2
        x = x[:half] if frame == 'a' else x[-half:]
        return x if H > W else x.T
    y = dihedral(x, int(frame[0]))
    if frame.endswith('t'):
        return np.tile(y, (2, 3))
    scale = int(frame[2:] or 1)
    return y.repeat(scale, 0).repeat(scale, 1)

@pytest.mark.parametrize('frame', [*(f"{d}{kind}" for d in range(8) for kind in ('', 't', 'x2', 'x3')), 'a', 'b'])
@pytest.mark.parametrize('pairs', [1, 2])
def test_a_frame_finds_the_cell_of_the_turned_tiled_scaled_or_halved_input(frame, pairs):
    grids = []
    for n in range(pairs):
        x = np.arange(14).reshape(2, 7) + 10 # each cell is another one
        x = x if n == 0 else x.T
        grids += [x, made(x, frame)]
    pos = tokens_of(*grids)
    places = frame_places(pos, input_sizes(pos, None), read_frames(f"0 {frame}"))
    query, key = places[0, :, 1].tolist(), places[0, :, 3].tolist() # of the second head
    z = pos[0, :, 2].tolist()
    for n in range(len(z)):
        r, c, _ = pos[0, n].tolist() # a token of an output predicts its cell (r, c)
        grid = grids[len(grids) - 2 - z[n] // 2 * 2]
        out = grids[len(grids) - 1 - z[n] // 2 * 2]
        if z[n] % 2 == 0 or r >= out.shape[0] or c >= out.shape[1]:
            continue
        want = [*query[n][:2], z[n] - 1]
        found = [k for k in range(len(z)) if [*key[k][:2], z[k]] == want and pos[0, k, 1] > 0]
        assert len(found) == 1
        i, j, _ = pos[0, found[0]].tolist()
        assert grid[i, j - 1] == out[r, c]
    here = pos.int() # of the first head: as it lies
    assert torch.equal(places[:, :, 0], here)
    assert torch.equal(places[:, :, 2], here - torch.tensor([0, 1, 0]))

def test_a_head_with_a_frame_begins_by_looking_at_its_cell_and_is_closed(monkeypatch):
    x = np.arange(9).reshape(3, 3)
    pos = tokens_of(x, x)
    T, seen = pos.size(1), {}
    model = Model(ModelConfig(mixer='A', depth=1)).eval()
    layer = model.blocks[0].mixer
    def look(q, k, v, mask):
        seen['share'] = (q * q.size(-1) ** -0.5 @ k.mT + mask[0].bias).softmax(-1)[0] # (nh, T, T)
        return attend(q, k, v, mask)
    monkeypatch.setattr('nanoarc.model.attend', look)
    layer.proj.register_forward_pre_hook(lambda module, args: seen.update(found=args[0][0].unflatten(-1, (16, 16))))
    model(torch.zeros(1, T, dtype=torch.int64), pos=pos)
    t = pos[0].tolist().index([1, 0, 1]) # the output's second row begins: it predicts (1, 0)
    for h in range(6, 15): # 0t to 7t, 0x2
        want = 0 if h == 14 else dihedral(x, h - 6)[1, 0]
        cell = pos[0].tolist().index([want // 3, want % 3 + 1, 0])
        assert seen['share'][h, t].argmax() == cell and seen['share'][h, t, cell] > 0.7
    size = seen['found'].norm(dim=-1).mean(0) # (nh,)
    assert size[4:].max() < 0.2 * size[:4].min()

def test_a_tile_has_a_number():
    pos = tokens_of(np.zeros((2, 3)), np.zeros((4, 9)))
    number = tile_number(pos, input_sizes(pos, None))[0]
    z, place = pos[0, :, 2], pos[0].tolist()
    assert (number[z == 0] == 0).all()
    for x, want in (((0, 0), 1), ((0, 2), 1), ((0, 3), 2), ((1, 8), 3), ((3, 6), 7)):
        assert int(number[place.index([*x, 1])]) == want

def test_attention_with_frames_is_a_plain_double_loop(toy):
    batch = packed_loader(toy(n=4, side=4), shots=-1).next_batch()
    _, _, pos, doc, _, _ = cut(batch, slice(1), slice(60))
    cfg = make('A', frames='0 3t 6x2', head_size=12, rope_bases=(50.0, 20.0, 10.0)).cfg
    layer = Attention(cfg, 'A').double()
    x = torch.randn(1, 60, cfg.n_embd, dtype=torch.float64)
    shared = Shared(cfg, x, pos, input_sizes(pos, doc), doc, None)
    y = layer(x, shared)
    places = frame_places(pos, input_sizes(pos, doc), read_frames(cfg.frames))[0]
    gates = (x[0] @ layer.gate.weight.T - 3).sigmoid()
    gates[:, 0] = 1 # of the frame that is no frame
    q, k, v = layer.qkv(x)[0].view(60, 3, 3, 12).unbind(1)
    turns = [(axis, base ** -x) for axis, base in enumerate(cfg.rope_bases) for x in (0.0, 0.5)] # frequency of a pair
    want = torch.zeros(60, 3, 12, dtype=torch.float64)
    for h in range(3):
        for i in range(60):
            scores, seen = [], [j for j in range(i + 1) if doc[0, i] == doc[0, j]]
            for j in seen:
                score = 0.0
                for m, (axis, freq) in enumerate(turns): # channels m and m + 6 are turned by the distance
                    angle = float(places[i, h, axis] - places[j, 3 + h, axis]) * freq
                    a, b = q[i, h, m], q[i, h, m + 6]
                    c, d = k[j, h, m], k[j, h, m + 6]
                    score += (a * c + b * d) * np.cos(angle) + (b * c - a * d) * -np.sin(angle)
                scores.append(score / 12 ** 0.5)
            share = torch.stack(scores).softmax(0)
            want[i, h] = gates[i, h] * sum(s * v[j, h] for s, j in zip(share, seen))
    assert relative(y[0], layer.proj(want.flatten(1))) < 1e-6 # cos and sin are fp32

# -----------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize('mixer', [*MIXERS, 'frames'])
@pytest.mark.parametrize('shots', [0, -1])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(mixer, shots, toy):
    batch = toy_batch(toy(n=4, side=5), shots)
    model = make(mixer, n_task=4 if shots == 0 else 0).eval()
    full = model(*batch)[0]
    for b in range(min(3, len(batch.idx))):
        n = int((batch.doc[b] == 0).sum())
        start = int((batch.idx[b] == OUT).nonzero().max()) + 1 # the prompt ends with the last OUT
        cache, got, a = Cache(model), [], 0
        for end in range(start, n + 1):
            idx, _, pos, _, task, dihedral = cut(batch, slice(b, b + 1), slice(a, end))
            got.append(model(idx, None, pos, None, task, dihedral, cache=cache)[0])
            a = end
        assert (torch.cat(got, 1)[0] - full[b, :n]).abs().max() < 1e-10

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('switch', ['plain', '1d_rope', 'loops'])
@pytest.mark.parametrize('pieces', [[5, 1, 1, 1], [2, 30, 1, 1], [1] * 8, [12, 9, 11, 1, 1], [2, 1, 90, 1]])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_over_the_border_of_documents(mixer, switch, pieces, toy):
    batch = packed_loader(toy(n=4, side=3)).next_batch()
    batch = [torch.cat([x[:1, 3:290], x[1:2, 8:295]]) for x in batch] # the borders of the rows are not the same
    model = make(mixer, **SWITCHES[switch]).eval()
    n = sum(pieces)
    if n < 20: # the border of the first two documents is among them
        border = int((batch[3][0] != batch[3][0, 0]).int().argmax())
        batch = cut(batch, slice(2), slice(max(border - n // 2, 0), None))
    assert (batch[3][0, :n] != batch[3][0, 0]).any()
    full = model(*cut(batch, slice(2), slice(n)))[0]
    cache, got, a = Cache(model), [], 0
    for piece in pieces:
        got.append(model(*cut(batch, slice(2), slice(a, a + piece)), cache=cache)[0])
        a += piece
    assert (torch.cat(got, 1) - full).abs().max() < 1e-10
    cache.keep(torch.tensor([1]))
    more = model(*cut(batch, slice(1, 2), slice(n, n + 1)), cache=cache)[0]
    want = model(*cut(batch, slice(1, 2), slice(n + 1)))[0][:, -1:]
    assert (more - want).abs().max() < 1e-10

def test_docs_come_in_every_call_or_in_none():
    model = make('M')
    idx, pos, doc = torch.zeros(1, 3).long(), torch.zeros(1, 3, 3, dtype=torch.uint8), torch.zeros(1, 3).int()
    for first, then in ((doc, None), (None, doc)):
        cache = Cache(model)
        model(idx, None, pos, first, doc, doc, cache=cache)
        with pytest.raises(AssertionError, match="docs"):
            model(idx, None, pos, then, doc, doc, cache=cache)

def three_prompts():
    """ -> idx (3, 8), pos (3, 8, 3), task (3,), dihedral (3,) """
    grids = [[1, 2, ROW, 3, 4, ROW], [5, 2, ROW, 9, 4, ROW], [0, 0, ROW, 0, 0, ROW]]
    idx = torch.tensor([[IN, *grid, OUT] for grid in grids])
    places = [(0, 0, 0)]
    for token in idx[0, 1:].tolist():
        places.append(next_place(*places[-1], token))
    pos = torch.tensor([places] * 3, dtype=torch.uint8)
    return idx, pos, torch.tensor([0, 1, 2]), torch.tensor([0, 5, 7])

@torch.no_grad()
@pytest.mark.parametrize('mixer', [*MIXERS, 'frames'])
def test_decode_equals_the_uncached_forward_token_by_token(mixer):
    model = make(mixer).eval()
    model.head.weight[END] *= 3 # or an untrained model seldom ends
    prompts = three_prompts()
    found = {answer.prompt: answer for answer in decode(model, *prompts)}
    for b in range(3):
        idx, places, task, dihedral = (x[b].tolist() for x in prompts)
        total, width = 0.0, 0
        while idx[-1] != END and len(idx) < 150:
            told = [torch.full((1, len(idx)), x, dtype=torch.int32) for x in (task, dihedral)]
            logits, _ = model(torch.tensor([idx]), None, torch.tensor([places]), told[0] * 0, *told)
            row, col, _ = places[-1]
            legal = torch.tensor([bool(may_follow(token, row, col, width)) for token in range(VOCAB_SIZE)])
            best = logits[0, -1].masked_fill(~legal, float('-inf')).log_softmax(-1).max(-1)
            token = int(best.indices)
            total += float(best.values)
            if token == ROW and width == 0:
                width = col
            idx.append(token)
            places.append(next_place(*places[-1], token))
        assert found[b].tokens[: len(idx) - 8] == idx[8:]
        if idx[-1] == END:
            assert abs(total - found[b].log_prob) < 1e-9

@pytest.mark.slow
def test_decoding_ends_and_decodes_whatever_the_weights():
    idx = torch.tensor([[IN, 1, ROW, OUT], [IN, 2, ROW, OUT]])
    pos = torch.tensor([[[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]] * 2, dtype=torch.uint8)
    args = idx, pos, torch.tensor([0, 1]), torch.tensor([0, 5])
    for mixer in MIXERS:
        model = make(mixer).eval()
        found = decode(model, *args)
        assert sorted(answer.prompt for answer in found) == [0, 1]
        for b, tokens, log_prob, _ in found:
            assert tokens[-1] == END and max(decode_grid(tokens[:-1]).shape) <= 30 and log_prob < 0
            alone = decode(model, *(x[b : b + 1] for x in args))[0]
            assert alone.tokens == tokens and abs(alone.log_prob - log_prob) < 1e-9

# -----------------------------------------------------------------------------
# the stack

@pytest.mark.parametrize('mixer', ['A', 'M'])
def test_each_block_is_a_pre_norm_residual(mixer):
    block = make(mixer).blocks[0]
    seen = {}
    block.mixer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    block.mlp.register_forward_hook(lambda m, args, out: seen.update(u=args[0], v=out))

    class Ctx:
        rope = torch.ones(1, 6, 1, 8), torch.zeros(1, 6, 1, 8)
        masks = {'A': [Span(6, slice(6), None)]}
        same = None

    x = torch.randn(1, 6, 32, dtype=torch.float64) * 7
    out = block(x, Ctx)
    assert torch.allclose(seen['x'], block.norm1(x)) and torch.allclose(seen['u'], block.norm2(x + seen['y']))
    assert torch.allclose(out, x + seen['y'] + seen['v']) # take the mixer and the mlp away and x is left
    assert isinstance(block.mixer, {'A': Attention, 'M': Mamba2}[mixer])

def test_a_pattern_is_repeated_over_the_layers():
    model = Model(ModelConfig(mixer='MMA', n_layer=5, n_embd=32))
    assert "".join('A' if isinstance(b.mixer, Attention) else 'M' for b in model.blocks) == 'MMAMM'

def test_mamba_alone_is_told_the_places():
    model = make('M')
    idx, _, pos, *told = random_row()
    assert not torch.allclose(model(idx, None, pos * 0, *told)[0], model(idx, None, pos * 0 + 1, *told)[0])

def test_a_pattern_longer_than_the_stack_is_told_the_places_too():
    model = Model(ModelConfig(mixer='MA', n_layer=1, n_embd=32)) # the A does not come to pass, so nothing turns
    assert model.cfg.kinds == 'M' and hasattr(model, 'wrow')

def test_the_stack_run_twice_is_a_stack_of_twice_the_layers():
    twice, long = make('MA', loops=2), make('MA', n_layer=4)
    weights = twice.state_dict()
    for name, w in twice.state_dict().items():
        if name.startswith('blocks.'):
            _, i, rest = name.split('.', 2)
            weights[f"blocks.{int(i) + 2}.{rest}"] = w
    long.load_state_dict(weights)
    x = random_row()
    assert torch.equal(twice(*x)[0], long(*x)[0])

def test_the_log_tells_parameters_and_how_many_of_them_are_embeddings():
    """ of tokens, tasks and symmetries; the head is a product """
    cfg = ModelConfig(mixer='A', n_layer=1, n_embd=32, n_task=5, frames='')
    block = (1 + 1) * 32 + (3 + 1) * 32 * 32 + 3 * 32 * cfg.resolved().n_hidden # norms, qkv and proj, SwiGLU
    n = 32 * (VOCAB_SIZE + 5 + 8)
    assert Model(cfg).about() == f"{block + n + 32 + VOCAB_SIZE * 32:,} parameters, {n:,} of them embeddings, mixer A"

def test_the_dial_sets_width_heads_and_learning_rates():
    for depth, width in ((2, 96), (3, 160), (4, 192), (6, 288)):
        model = Model(ModelConfig(depth=depth, frames=''))
        assert (len(model.blocks), model.cfg.n_embd, model.blocks[1].mixer.nh) == (depth, width, width // 32)
        assert model.peak_rates(0, 0) == (width_lr(width), width_lr(width))
        assert model.peak_rates(0.1, 0) == (0.1, width_lr(width))
        assert model.peak_rates(0, 0.1) == (width_lr(width), 0.1)
    assert width_lr(64) > width_lr(128) == 5e-3 > width_lr(256)
    cfg = ModelConfig(depth=6, n_layer=3, n_embd=64).resolved()
    assert (cfg.n_layer, cfg.n_embd, cfg.kinds) == (3, 64, 'MAM') and cfg.resolved() == cfg

def test_heads_have_frames_where_places_are_of_grids():
    cfg = ModelConfig().resolved()
    assert (cfg.frames, cfg.head_size) == ('all', 16) and cfg.resolved() == cfg
    assert Model(cfg).blocks[1].mixer.nh == 16
    for other in (dict(rope_bases=(10000.0,)), dict(frames='')): # text, off
        cfg = ModelConfig(**other).resolved()
        assert (cfg.frames, cfg.head_size) == ('', 32) and cfg.resolved() == cfg
        assert Model(cfg).blocks[1].mixer.nh == 3
    assert ModelConfig(mixer='M').resolved().frames == ''
    assert ModelConfig(frames=' ').resolved().frames == ''

def test_a_head_that_only_turns_has_a_frame_too():
    assert Model(ModelConfig(mixer='A', frames='3 0 0t')).blocks[0].mixer.has_frame.tolist() == [True, False, True]

@pytest.mark.parametrize('wrong', [
    dict(frames='8'), dict(frames='0 x2'), dict(frames='0', rope_bases=(9.0,)), dict(mixer='AB'),
    dict(mixer=''), dict(depth=0), dict(head_size=40, frames=''), dict(head_size=4),
    dict(rope_bases=(1.0, 2.0)), dict(loops=0), dict(window=0), dict(d_head=60), dict(d_head=0),
    dict(d_state=0), dict(expand=0), dict(n_hidden=-1), dict(head_size=3), dict(d_conv=1), dict(chunk_size=0),
    dict(vocab_size=10)])
def test_a_wrong_setting_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        Model(ModelConfig(**wrong))

def test_a_setting_that_no_layer_heeds_is_not_refused():
    Model(ModelConfig(mixer='M', n_embd=48, d_head=16)) # whatever the head size of attention
    Model(ModelConfig(mixer='A', n_embd=48, head_size=16))

def test_the_model_alone_takes_tokens_and_documents():
    model = Model(ModelConfig(mixer='MMMA', depth=4, rope_bases=(10000,), vocab_size=500)) # as in the readme
    idx, doc = torch.randint(0, 500, (2, 70)), torch.arange(70).expand(2, -1).int() // 30
    logits, loss = model(idx, idx.roll(-1, 1), doc=doc)
    loss.backward()
    assert logits.shape == (2, 70, 500) and loss.item() == pytest.approx(140 * np.log(500), rel=0.02)

# -----------------------------------------------------------------------------
# the optimizers

@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_muon_orthogonalizes(shape):
    torch.manual_seed(1337)
    s = torch.linalg.svdvals(orthogonalize(torch.randn(*shape), 5))
    assert 0.5 < s.min() and s.max() < 1.3

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_muon_sees_small_gradients_in_16_bits_too(dtype):
    torch.manual_seed(1337)
    g = 1e-7 * torch.randn(2, 24, 8) # below the smallest number of fp16, 6e-8, are most of them
    want = orthogonalize(g, 5)
    with torch.autocast('cpu', dtype=dtype):
        got = orthogonalize(g, 5)
    assert got.dtype == torch.float32 and relative(got.double(), want.double()) < 0.1

def test_muon_batched_equals_one_at_a_time_and_takes_what_adamw_does_not():
    torch.manual_seed(1337)
    ws = [torch.randn(6, 4) for _ in range(3)]
    together = [torch.nn.Parameter(w.clone()) for w in ws]
    alone = [torch.nn.Parameter(w.clone()) for w in ws]
    opts = [Muon(together, 0.1, weight_decay=0.1)] + [Muon([p], 0.1, weight_decay=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone):
            p.grad = torch.randn(6, 4)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(together, alone))
    model = make('MA')
    taken = []
    for opt in model.optimizers(1, 1, 0):
        for group in opt.param_groups:
            taken += group['params']
    assert len(taken) == len(set(map(id, taken))) == len(list(model.parameters()))

@pytest.mark.parametrize('ns_steps', [5, 0])
def test_each_parameter_has_one_optimizer_and_decays_as_it_should(ns_steps):
    model = make('MA')
    names = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for opt in model.optimizers(0.3, 0.2, 0.1, ns_steps):
        for group in opt.param_groups:
            for p in group['params']:
                name = names[id(p)]
                seen.append(name)
                last = name.rpartition('.')[2]
                is_matrix = name.startswith('blocks.') and last == 'weight' and 'norm' not in name
                is_plain = 'norm' in name or last in ('a_log', 'dt_bias', 'skip', 'conv_bias')
                assert isinstance(opt, Muon) == (is_matrix and ns_steps > 0)
                assert group['lr'] == (0.3 if is_matrix else 0.2)
                assert group['weight_decay'] == (0.0 if is_plain else 0.1)
    assert sorted(seen) == sorted(names.values())

# -----------------------------------------------------------------------------
# precision and compilers

def test_products_of_the_cpu_are_exact():
    from nanoarc.run import get_device
    get_device('cpu', 'float32')
    a, b = torch.randn(2, 512, 512, dtype=torch.float64).unbind()
    assert relative((a.float() @ b.float()).double(), a @ b) < 2e-6 # bf16 has 4e-3

class Dtypes(TorchDispatchMode):
    """ of the operands of each operator that runs meanwhile: {name: dtypes} """

    def __init__(self):
        super().__init__()
        self.seen = defaultdict(set)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        for x in args:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.seen[f.overloadpacket.__name__].add(x.dtype)
        return f(*args, **(kwargs or {}))

def test_in_16_bits_products_alone_are(toy):
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer='MA', depth=2, n_task=4, chunk_size=16))
    batch = packed_loader(toy(n=4, side=4)).next_batch()
    with Dtypes() as ops, torch.autocast('cpu', torch.bfloat16):
        _, loss = model(*batch)
    loss.backward()
    assert ops.seen['mm'] | ops.seen['bmm'] == {torch.bfloat16}
    # norms, decays and their sums, steps, the loss
    for name in ('rsqrt', 'pow', 'cumsum', 'exp', 'softplus', '_log_softmax', 'nll_loss_forward'):
        assert ops.seen[name] == {torch.float32}, name
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    for opt in model.optimizers(1e-3, 1e-3, 0.1):
        opt.step()
        for state in opt.state.values():
            assert all(x.dtype == torch.float32 for x in state.values() if x.ndim > 0)

def test_a_softmax_of_16_bits_sums_in_32():
    torch.manual_seed(0)
    x = torch.zeros(4, 3000, dtype=torch.bfloat16).requires_grad_() # a sum in 16 bits stops at 256
    weights, grad = x.softmax(-1), torch.randn(4, 3000).bfloat16()
    weights.backward(grad)
    assert (weights.double() * 3000 - 1).abs().max() < 2**-8
    want = (grad.double() - grad.double().mean(-1, keepdim=True)) / 3000
    assert relative(x.grad.double(), want) < 2**-8

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_leaves_out_its_share_and_scales_the_rest(dtype):
    torch.manual_seed(0)
    x = torch.ones(100, 8, 1001, dtype=dtype, requires_grad=True)
    drop = Dropout(0.1)
    y = drop(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) # what is left out has no gradient, the rest is scaled alike
    scale = torch.tensor(256 / (256 - 26), dtype=dtype)
    kept = y == scale
    assert ((y == 0) | kept).all()
    for lane in kept.flatten().unflatten(0, (-1, 8)).unbind(1): # bytes of one random number
        assert abs(lane.double().mean().item() - 230 / 256) < 4 * (0.1 * 0.9 / len(lane)) ** 0.5
    assert not torch.equal(drop(x), y)
    assert drop.eval()(x) is x

def test_on_a_recent_gpu_blocks_add_up_in_bf16_unless_they_decode(monkeypatch):
    model = make('MA', n_task=0).float().eval()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: seen.append(x.dtype))
    idx = torch.randint(0, 10, (2, 30))
    places = torch.zeros(2, 30, 3, dtype=torch.uint8)
    want, _ = model(idx, pos=places)
    monkeypatch.setattr('nanoarc.model.is_recent', lambda device: True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got, _ = model(idx, pos=places)
        model(idx, pos=places, cache=model.cache())
    model(idx, pos=places)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert seen == [fp32] * 2 + [bf16] * 2 + [fp32] * 2 + [fp32] * 2 # the last ones: without autocast
    assert got.dtype == fp32 and 0 < relative(got.double(), want.double()) < 0.05

def test_a_dropout_of_everything_is_refused():
    with pytest.raises(ValueError, match="dropout=1"):
        ModelConfig(dropout=1.0).resolved()

@pytest.mark.slow
def test_what_a_compiler_makes_of_the_scan_has_products_in_16_bits_and_decays_in_32_both_ways():
    torch._dynamo.reset()
    seen, graphs = defaultdict(set), []
    def look(graph, inputs): # with autocast on, a compiler plans the way back under it
        graphs.append(graph)
        for node in graph.graph.nodes:
            if node.op == 'call_function':
                values = [x.meta.get('val') for x in node.all_input_nodes]
                dtypes = {x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()}
                seen[getattr(node.target, '_opname', str(node.target))] |= dtypes
        return make_boxed_func(graph.forward)
    torch.manual_seed(1337)
    mixer = Model(ModelConfig(mixer='M', n_layer=1, n_embd=64, chunk_size=16)).blocks[0].mixer
    x = torch.randn(2, 37, 64)
    grads = []
    for way in ('plain', 'compiled'):
        if way == 'compiled':
            mixer.compile(backend=aot_autograd(fw_compiler=look, bw_compiler=look))
        mixer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=way == 'compiled'):
            y = mixer(x, SimpleNamespace(same=None))
        y.float().square().sum().backward()
        grads.append([p.grad for p in mixer.parameters()])
    assert len(graphs) == 2 and seen['mm'] | seen['bmm'] == {torch.bfloat16}
    assert seen['exp'] == seen['cumsum'] == {torch.float32}
    for want, grad in zip(*grads):
        assert (grad - want).norm() < 0.1 * want.norm()

@pytest.mark.parametrize('mixer', MIXERS)
def test_half_precision_is_near(toy, mixer):
    batch = toy_batch(toy(n=4, side=5))
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer=mixer, depth=2, n_task=4, dropout=0.0))
    want = model(*batch)[1]
    want_grads = torch.autograd.grad(want, list(model.parameters()))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(*batch)[1]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32 and abs((loss / want).item() - 1) < 0.01
    # bf16 rounds by 2^-9 at most. a gradient goes through some ten products, so a few of these
    norm = torch.cat([x.flatten() for x in want_grads]).norm()
    error = torch.cat([(x - y).flatten() for x, y in zip(grads, want_grads)]).norm() / norm
    assert 0 < error < 10 * 2**-9

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('batching', ['bucket', 'pack'])
@pytest.mark.slow
def test_blocks_compile_without_a_graph_break_and_are_the_same(toy, mixer, batching):
    torch._dynamo.reset()
    ds = ArcDataset(DataConfig(data=toy(n=4), batching=batching, block_size=300, batch_tokens=600))
    model, loader = make(mixer), ArcLoader(ds)
    want = [model(*loader.next_batch())[1].item() for _ in range(3)]
    for block in model.blocks:
        block.compile(fullgraph=True, backend='eager')
    loader = ArcLoader(ds)
    for x in want:
        loss = model(*loader.next_batch())[1]
        loss.backward()
        assert loss.item() == pytest.approx(x, rel=1e-12)

@pytest.mark.parametrize('mixer', MIXERS)
@torch.no_grad()
@pytest.mark.slow
def test_decoding_compiles_without_a_graph_break_and_seldom_again(mixer):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    plain, model = make(mixer).eval(), make(mixer).eval()
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    idx, pos = torch.randint(0, 10, (2, 160)), torch.randint(0, 9, (2, 160, 3), dtype=torch.uint8)
    row = idx, None, pos, None, torch.zeros(2, 160).int(), torch.zeros(2, 160)
    caches, graphs = [Cache(plain), Cache(model)], []
    a = 0
    for end in range(20, 161): # 20 tokens, then one at a time
        part = cut(row, slice(2), slice(a, end))
        x, y = plain(*part, cache=caches[0])[0], model(*part, cache=caches[1])[0]
        assert (x - y).abs().max() < 1e-12
        graphs.append(counter.frame_count)
        a = end
    assert graphs[-1] == graphs[60], f"compiled again and again: {graphs}" # by then the cache has grown once

# -----------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('path', ['flex', 'sdpa', 'compiled'])
def test_a_gpu_agrees_with_the_cpu(toy, mixer, path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no cuda")
    if path == 'sdpa': # what a T4 takes
        monkeypatch.setattr('nanoarc.model.is_recent', lambda device: False)
    ds = ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=512, batch_tokens=2048))
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer=mixer, depth=2, head_size=32, window=50, n_task=4))
    batch = ArcLoader(ds).next_batch()
    want = model(*batch)[1]
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    if path == 'compiled':
        for block in model.blocks:
            block.compile()
    loss = model(*(x.cuda() for x in batch))[1]
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)
    for name, p in model.named_parameters():
        assert relative(p.grad.cpu(), grads[name]) < 0.02 # TF32 at worst
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    with torch.autocast('cuda', dtype=dtype):
        assert model(*(x.cuda() for x in batch))[1].item() == pytest.approx(want.item(), rel=0.02)

@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize('mixer', MIXERS)
def test_a_gpu_decodes_as_the_cpu_does(mixer):
    if not torch.cuda.is_available():
        pytest.skip("no cuda")
    model = make(mixer).float().eval()
    model.head.weight[END] *= 3
    prompts = three_prompts()
    mine = sorted(decode(model, *prompts))
    other = sorted(decode(model.cuda(), *(x.cuda() for x in prompts)))
    assert [x[:2] for x in mine] == [x[:2] for x in other]
    assert max(abs(x.log_prob - y.log_prob) for x, y in zip(mine, other)) < 0.05
