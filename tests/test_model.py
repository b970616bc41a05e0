""" python -m pytest tests/test_model.py """
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanoarc.data import END, OUT, ROW, ArcDataset, ArcLoader, DataConfig, grammar, next_pos
from nanoarc.model import BLOCK, FORGET, Attention, Cache, Mamba2, Model, ModelConfig, Muon, attend, make_mask, orthogonalize, ssd

MIXERS = ['A', 'M', 'MA', 'MS']
SWITCHES = {'plain': dict(prefix=False), 'prefix': {}, 'qk_norm': dict(qk_norm=True), 'gqa': dict(n_kv_head=1), 'loops': dict(loops=2),
            '1d_rope': dict(rope_bases=(10000.0,))}

def make(mixer='A', n_task=4, **kwargs):
    """ a tiny model in fp64, its weights large enough that every part matters """
    torch.manual_seed(1337)
    cfg = dict(mixer=mixer, n_layer=2, n_embd=32, head_size=16, d_head=16, d_state=8, chunk_size=5, window=7, n_task=n_task)
    model = Model(ModelConfig(**{**cfg, **kwargs})).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=0.3)
    return model

def toy_batch(src, shots=0):
    return ArcLoader(ArcDataset(DataConfig(data=src, batch_tokens=300, shots=shots))).next_batch()

def by_recurrence(x, a, Bm, Cm, doc, h=None):
    """ the definition: decay the state, write x into it, read it out; a new document starts from zero """
    B, T, nh, hs = x.shape
    h, ys = torch.zeros(B, nh, hs, Bm.size(-1), dtype=x.dtype) if h is None else h, []
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
    doc = (torch.arange(T)[None] >= cuts[:, :1]).int() + (torch.arange(T)[None] >= cuts[:, 1:]).int()
    return x, a, torch.randn(B, T, ns, dtype=dtype), torch.randn(B, T, ns, dtype=dtype), doc

def forget(a, doc):
    """ the decays of a packed row: a document drops the state of the one before """
    return a.masked_fill(torch.nn.functional.pad(doc[:, 1:] != doc[:, :-1], (1, 0))[..., None], FORGET)

def relative(x, want):
    return ((x - want).abs().max() / want.abs().max()).item()

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
    assert relative(ssd(x, forget(a, doc), Bm, Cm, 64)[0], by_recurrence(x, a, Bm, Cm, doc)[0]) < 1e-4

def test_ssd_has_the_gradient_of_the_recurrence():
    x, a, Bm, Cm, doc = scan_inputs(11)
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    grads = []
    for f in (lambda x, a, Bm, Cm, h: ssd(x, forget(a, doc), Bm, Cm, 4, h), lambda x, a, Bm, Cm, h: by_recurrence(x, a, Bm, Cm, doc, h)):
        z = [v.clone().requires_grad_() for v in (x, a, Bm, Cm, h)]
        y, state = f(*z)
        ((y ** 2).sum() + state.sum()).backward()
        grads.append([v.grad for v in z])
    assert all((p - q).abs().max() < 1e-9 for p, q in zip(*grads))

def test_gradcheck_of_ssd():
    x, a, Bm, Cm, _ = scan_inputs(7, B=1, nh=2, hs=2, ns=3)
    args = [v.requires_grad_() for v in (x, a, Bm, Cm, torch.randn(1, 2, 2, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda x, a, Bm, Cm, h: ssd(x, a, Bm, Cm, 3, h), args)

def test_mamba_equals_that_of_transformers_with_the_same_weights():
    transformers = pytest.importorskip('transformers')
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    torch.manual_seed(1337)
    cfg = ModelConfig(mixer='M', n_embd=64, d_head=16, d_state=8, chunk_size=16).filled()
    ours = Mamba2(cfg)
    theirs = Mamba2Mixer(transformers.Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, state_size=8, expand=2, conv_kernel=4, n_groups=1, chunk_size=8,
                                                   num_hidden_layers=1, use_bias=False, layer_norm_epsilon=1e-6), layer_idx=0)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.3)
        for p, q in ((theirs.in_proj.weight, ours.in_proj.weight), (theirs.conv1d.weight, ours.conv.flip(0).t()[:, None]), (theirs.conv1d.bias, ours.conv_bias),
                     (theirs.A_log, ours.a_log), (theirs.dt_bias, ours.dt_bias), (theirs.D, ours.skip), (theirs.norm.weight, ours.norm.weight), (theirs.out_proj.weight, ours.proj.weight)):
            p.copy_(q)
    class Ctx:
        same = None
    x = torch.randn(2, 37, 64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(mine, Ctx), theirs(other)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    assert relative(y, want) < 1e-5 and relative(mine.grad, other.grad) < 1e-4
    for p, q in ((ours.in_proj.weight, theirs.in_proj.weight), (ours.a_log, theirs.A_log), (ours.dt_bias, theirs.dt_bias), (ours.skip, theirs.D),
                 (ours.norm.weight, theirs.norm.weight), (ours.proj.weight, theirs.out_proj.weight), (ours.conv_bias, theirs.conv1d.bias)):
        assert relative(p.grad, q.grad) < 1e-4
    assert relative(ours.conv.grad, theirs.conv1d.weight.grad[:, 0].t().flip(0)) < 1e-4

# -----------------------------------------------------------------------------

def row_of_documents(T, prefix, seed=0):
    """ -> doc (2, T) of a packed row, PAD at the end of the second, and prompt (2, T) bool or None """
    rng = np.random.default_rng(seed)
    doc = np.stack([np.sort(rng.integers(0, max(T // 20, 1), T)) for _ in range(2)])
    doc = np.unique(doc, return_inverse=True)[1].reshape(2, T)
    doc[1, T - T // 5 :] = -1
    prompt = np.zeros((2, T), bool)
    for b in range(2): # all but the last third of a document
        for d in np.unique(doc[b]):
            at = np.flatnonzero(doc[b] == d)
            prompt[b, at[: 1 + len(at) * 2 // 3]] = True
    return torch.from_numpy(doc).int(), torch.from_numpy(prompt) if prefix else None

def by_softmax(q, k, v, doc, prompt, window):
    """ the definition, a query at a time """
    y = torch.zeros_like(q)
    for b in range(q.size(0)):
        for i in range(q.size(2)):
            see = [j for j in range(q.size(2)) if (j <= i or (prompt is not None and prompt[b, i] and prompt[b, j]))
                   and (not window or abs(i - j) < window) and (doc is None or doc[b, i] == doc[b, j])]
            att = (q[b, :, i, None] * k[b][:, see]).sum(-1) / q.size(-1) ** 0.5
            y[b, :, i] = (att.softmax(-1)[..., None] * v[b][:, see]).sum(1)
    return y

@pytest.mark.parametrize('prefix', [True, False])
@pytest.mark.parametrize('window', [0, 1, 9])
@pytest.mark.parametrize('T', [1, 50, 2 * BLOCK + 3])
@pytest.mark.parametrize('how', ['blocks', 'one', 'flex'])
def test_attention_sees_what_it_should_on_every_path(T, window, prefix, how):
    torch.manual_seed(1337)
    q, k, v = torch.randn(3, 2, 2, T, 16, dtype=torch.float64).unbind()
    for doc, prompt in (row_of_documents(T, prefix), (None, None)):
        if how == 'flex' and (T == 50 or window == 9): # slow on cpu
            continue
        with torch.no_grad():
            y = attend(q, k, v, make_mask(0, T, doc, prompt, window, how == 'blocks', how == 'flex', q[:, 0])) if how != 'flex' else flex_on_cpu(q, k, v, doc, prompt, window)
        assert (y - by_softmax(q, k, v, doc, prompt, window)).abs().max() < 1e-12

def flex_on_cpu(q, k, v, doc, prompt, window):
    """ FlexAttention, not compiled: the mask that a gpu gets """
    with pytest.MonkeyPatch.context() as m:
        m.setattr('nanoarc.model.compiled', lambda f: f)
        return attend(q, k, v, make_mask(0, q.size(2), doc, prompt, window, False, True, q[:, 0]))

def test_the_blocks_that_flex_attention_skips_are_those_of_each_row():
    T = 3 * BLOCK
    prompt = torch.zeros(2, T, dtype=torch.bool)
    prompt[1] = True
    with pytest.MonkeyPatch.context() as m:
        m.setattr('nanoarc.model.compiled', lambda f: f)
        for doc in (None, torch.zeros(2, T, dtype=torch.int32)): # row 0 is causal, in row 1 all see all
            assert make_mask(0, T, doc, prompt, 0, False, True, torch.zeros(2, T, 8)).to_dense()[:, 0].sum((1, 2)).tolist() == [6, 9]
        doc = torch.arange(T)[None].repeat(2, 1) // BLOCK
        assert make_mask(0, T, doc, None, 0, False, True, torch.zeros(2, T, 8)).to_dense()[:, 0].sum((1, 2)).tolist() == [3, 3]

def test_long_rows_take_the_fused_kernel_and_see_the_same():
    T = 9 * BLOCK + 5
    q, k, v = torch.randn(3, 1, 1, T, 8, dtype=torch.float64).unbind()
    y = attend(q, k, v, make_mask(0, T, None, None, 0, True, False, q[:, 0]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (y - want).abs().max() < 1e-12

def test_blocks_leave_out_keys_that_none_of_them_sees():
    T = 4 * BLOCK
    doc = (torch.arange(T) // (BLOCK // 2))[None].int() # two documents a block
    for prompt in (None, torch.ones(1, T, dtype=torch.bool)):
        mask = make_mask(0, T, doc, prompt, 0, True, False, torch.zeros(1, T, 8))
        assert [(a, b, lo, hi) for a, b, lo, hi, _ in mask] == [(a, a + BLOCK, a, a + BLOCK) for a in range(0, T, BLOCK)]
    mask = make_mask(0, T, None, None, 10, True, False, torch.zeros(1, T, 8))
    assert [(lo, hi) for _, _, lo, hi, _ in mask] == [(max(a - 9, 0), a + BLOCK) for a in range(0, T, BLOCK)]

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('switch', SWITCHES)
@pytest.mark.parametrize('shots', [0, -1])
def test_a_packed_row_equals_its_documents_alone(toy, mixer, switch, shots):
    ds = ArcDataset(DataConfig(data=toy(n=4), shots=shots, batching='pack', block_size=300, batch_tokens=600))
    model = make(mixer, n_task=4 if shots == 0 else 0, **SWITCHES[switch])
    batch, total = ArcLoader(ds).next_batch(), 0
    logits, loss = model(*batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for row, docs in enumerate(batch.doc):
        for d in range(int(docs.max()) + 1):
            one, nats = model(*(x if x is None else (x * 0 if i == 3 else x)[row][docs == d][None] for i, x in enumerate(batch)))
            assert (one[0] - logits[row][docs == d]).abs().max() < 1e-10
            nats.backward()
            total += nats.item()
    assert int(batch.doc.max()) > 1 and abs(loss.item() - total) < 1e-9 * total and torch.isfinite(logits).all()
    assert all(relative(p.grad, grads[name]) < 1e-8 for name, p in model.named_parameters())

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('prefix', [True, False])
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_changing_an_output_token_moves_nothing_before_it(mixer, prefix, data):
    model = make(mixer, prefix=prefix)
    rows = [11, 1, 2, ROW, 3, 4, ROW, OUT, 5, 6, 7, ROW, 8, 9, 0, ROW, 1, 2, 3, ROW, END]
    idx, T = torch.tensor([rows]), len(rows)
    pos = [torch.zeros(3, dtype=torch.int64)]
    for x in rows[1:]:
        pos.append(next_pos(pos[-1], torch.tensor(x)))
    pos = torch.stack(pos).to(torch.uint8)[None]
    args = dict(pos=pos, doc=torch.zeros(1, T, dtype=torch.int32), task=torch.zeros(1, T, dtype=torch.int32), dihedral=torch.zeros(1, T, dtype=torch.uint8))
    before = model(idx, **args)[0]
    t = data.draw(st.integers(8, T - 1)) # the answer begins at 8
    idx[0, t] = (idx[0, t] + data.draw(st.integers(1, 9))) % 10
    after = model(idx, **args)[0]
    assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])

def test_a_prompt_sees_itself_both_ways_only_with_prefix():
    for prefix in (True, False):
        model = make('A', prefix=prefix)
        pos = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 1, 1]]], dtype=torch.uint8)
        args = dict(pos=pos, doc=torch.zeros(1, 5, dtype=torch.int32), task=torch.zeros(1, 5, dtype=torch.int32), dihedral=torch.zeros(1, 5, dtype=torch.uint8))
        a, b = (model(torch.tensor([[11, 1, x, 12, 5]]), **args)[0] for x in (2, 3))
        assert torch.equal(a[:, :2], b[:, :2]) == (not prefix)

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('shots, prefix', [(0, True), (0, False), (-1, True)])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(mixer, shots, prefix, toy):
    batch = toy_batch(toy(n=4, side=5), shots)
    model = make(mixer, n_task=4 if shots == 0 else 0, prefix=prefix).eval()
    full = model(*batch)[0]
    for b in range(min(3, len(batch.idx))):
        n = int((batch.doc[b] == 0).sum())
        start = int((batch.idx[b] == OUT).nonzero().max()) + 1 # the prompt ends with the last OUT
        row = [x if x is None else x[b : b + 1, :n] for x in (batch.idx, batch.pos, batch.task, batch.dihedral)]
        cache, got = Cache(model), []
        for a, z in [(0, start)] + [(t, t + 1) for t in range(start, n)]:
            idx, pos, task, dih = (x if x is None else x[:, a:z] for x in row)
            got.append(model(idx, None, pos, None, task, dih, cache=cache)[0])
        assert (torch.cat(got, 1)[0] - full[b, :n]).abs().max() < 1e-10

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('switch', ['plain', '1d_rope', 'gqa', 'loops'])
@pytest.mark.parametrize('pieces', [[5, 1, 1, 1], [2, 30, 1, 1], [1] * 8, [12, 9, 11, 1, 1], [2, 1, 90, 1]])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_over_the_border_of_documents(mixer, switch, pieces, toy):
    ds = ArcDataset(DataConfig(data=toy(n=4, side=3), shots=0, batching='pack', block_size=300, batch_tokens=600))
    batch = [x[:2, 3:] for x in ArcLoader(ds).next_batch()]
    model = make(mixer, **{**SWITCHES[switch], 'prefix': False}).eval() # a prompt comes in one call
    n = sum(pieces)
    if n < 20: # the border of the first two documents is among them
        first = int((batch[3][0] != batch[3][0, 0]).int().argmax()) - n // 2
        batch = [x[:, max(first, 0) :] for x in batch]
    full = model(*(x[:, :n] for x in batch))[0]
    cache, got, a = Cache(model), [], 0
    for piece in pieces:
        idx, _, pos, doc, task, dih = (x[:, a : a + piece] for x in batch)
        got.append(model(idx, None, pos, doc, task, dih, cache=cache)[0])
        a += piece
    assert (batch[3][0, :n] != batch[3][0, 0]).any() and (torch.cat(got, 1) - full).abs().max() < 1e-10
    cache.keep(torch.tensor([1]))
    idx, _, pos, doc, task, dih = (x[1:, n : n + 1] for x in batch)
    more = model(idx, None, pos, doc, task, dih, cache=cache)[0]
    assert (more - model(*(x[1:, : n + 1] for x in batch))[0][:, -1:]).abs().max() < 1e-10

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

@pytest.mark.parametrize('mixer', ['A', 'M'])
def test_each_block_is_a_pre_norm_residual(mixer):
    block = make(mixer).blocks[0]
    seen = {}
    block.mixer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    block.mlp.register_forward_hook(lambda m, args, out: seen.update(u=args[0], v=out))
    class Ctx:
        rope, masks, same = (torch.ones(1, 6, 1, 16), torch.zeros(1, 6, 1, 16)), {'A': [(0, 6, 0, 6, None)]}, None
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
    idx = torch.randint(0, 10, (1, 6))
    task, dih = torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.uint8)
    a, b = (model(idx, None, torch.full((1, 6, 3), x, dtype=torch.uint8), None, task, dih)[0] for x in (0, 1))
    assert not torch.allclose(a, b)

@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_muon_orthogonalizes(shape):
    torch.manual_seed(1337)
    s = torch.linalg.svdvals(orthogonalize(torch.randn(*shape), 5))
    assert 0.5 < s.min() and s.max() < 1.3

def test_muon_batched_equals_one_at_a_time_and_takes_what_adamw_does_not():
    torch.manual_seed(1337)
    ws = [torch.randn(6, 4) for _ in range(3)]
    together, alone = [[torch.nn.Parameter(w.clone()) for w in ws] for _ in range(2)]
    opts = [Muon(together, 0.1, weight_decay=0.1)] + [Muon([p], 0.1, weight_decay=0.1) for p in alone]
    for step in range(3):
        for k, (p, q) in enumerate(zip(together, alone)):
            p.grad = torch.from_numpy(np.random.default_rng(10 * step + k).normal(size=(6, 4)).astype(np.float32))
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(together, alone))
    model = make('MA')
    groups = [p for opt in model.optimizers(1, 1, 0) for g in opt.param_groups for p in g['params']]
    assert len(groups) == len(set(map(id, groups))) == len(list(model.parameters()))

@torch.no_grad()
@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('prefix', [True, False])
def test_decode_equals_the_uncached_forward_token_by_token(mixer, prefix):
    from nanoarc.solve import decode
    model = make(mixer, prefix=prefix).eval()
    model.head.weight[END] *= 3 # or an untrained model seldom ends
    prompts = torch.tensor([[11, 1, 2, ROW, 3, 4, ROW, OUT], [11, 5, 2, ROW, 9, 4, ROW, OUT], [11, 0, 0, ROW, 0, 0, ROW, OUT]])
    pos = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0], [2, 0, 0], [0, 0, 1]], dtype=torch.uint8).expand(3, -1, -1)
    task, dih = torch.tensor([0, 1, 2]), torch.tensor([0, 5, 7])
    found = {b: (tokens, logp) for b, tokens, logp, _ in decode(model, prompts, pos, task, dih)}
    for b in range(3):
        idx, p, total, width = prompts[b].tolist(), pos[b].long(), 0.0, 0
        while idx[-1] != END and len(idx) < 150:
            n = len(idx)
            args = p[None].to(torch.uint8), torch.zeros(1, n, dtype=torch.int32), task[b].expand(1, n), dih[b].expand(1, n)
            logits = model(torch.tensor([idx]), None, *args)[0][0, -1]
            best = logits.masked_fill(~grammar(p[-1:], torch.tensor([width]))[0], float('-inf')).log_softmax(-1).max(-1)
            total += float(best.values)
            idx.append(int(best.indices))
            width = width or (int(p[-1, 1]) if idx[-1] == ROW else 0)
            p = torch.cat([p, next_pos(p[-1:], torch.tensor(idx[-1:]))])
        assert found[b][0][: len(idx) - 8] == idx[8:]
        if idx[-1] == END:
            assert abs(total - found[b][1]) < 1e-9

def test_a_pattern_longer_than_the_stack_is_told_the_places_too():
    model = Model(ModelConfig(mixer='MA', n_layer=1, n_embd=32)) # the A does not come to pass, so nothing turns
    assert model.cfg.kinds == 'M' and hasattr(model, 'wrow')

def test_decoding_ends_and_decodes_whatever_the_weights(toy):
    from nanoarc.data import decode_grid
    from nanoarc.solve import decode
    for seed, mixer in enumerate(MIXERS):
        torch.manual_seed(seed)
        model = make(mixer).eval()
        idx = torch.tensor([[11, 1, ROW, OUT], [11, 2, ROW, OUT]])
        pos = torch.tensor([[[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]] * 2, dtype=torch.uint8)
        task, dih = torch.tensor([0, 1]), torch.tensor([0, 5])
        found = decode(model, idx, pos, task, dih)
        assert sorted(b for b, *_ in found) == [0, 1]
        for b, tokens, logp, _ in found:
            assert tokens[-1] == END and max(decode_grid(tokens[:-1]).shape) <= 30 and logp < 0
            _, alone, x, _ = decode(model, idx[b : b + 1], pos[b : b + 1], task[b : b + 1], dih[b : b + 1])[0]
            assert alone == tokens and abs(x - logp) < 1e-9

def test_the_stack_run_twice_is_a_stack_of_twice_the_layers():
    twice, long = make('MA', loops=2), make('MA', n_layer=4)
    weights = twice.state_dict()
    long.load_state_dict({name: weights[".".join([*name.split('.')[:1], str(int(name.split('.')[1]) % 2), *name.split('.')[2:]]) if name.startswith('blocks') else name]
                          for name in long.state_dict()})
    x = torch.randint(0, 10, (1, 9)), None, torch.randint(0, 5, (1, 9, 3), dtype=torch.uint8), None, torch.zeros(1, 9).int(), torch.zeros(1, 9)
    assert torch.equal(twice(*x)[0], long(*x)[0])

def test_shared_keys_and_values_are_those_of_full_heads_that_are_equal():
    shared, full = make('A', n_embd=64, n_kv_head=2), make('A', n_embd=64)
    weights = shared.state_dict()
    for name, w in weights.items():
        if name.endswith('qkv.weight'):
            q, k1, k2, v1, v2 = w.split([64, 16, 16, 16, 16])
            weights[name] = torch.cat([q, k1, k1, k2, k2, v1, v1, v2, v2])
    full.load_state_dict(weights)
    x = torch.randint(0, 10, (1, 9)), None, torch.randint(0, 5, (1, 9, 3), dtype=torch.uint8), None, torch.zeros(1, 9).int(), torch.zeros(1, 9)
    assert (shared(*x)[0] - full(*x)[0]).abs().max() < 1e-12

def test_queries_and_keys_have_norm_one_if_asked():
    model = make('A', qk_norm=True)
    with torch.no_grad():
        x = torch.randint(0, 10, (1, 9)), None, torch.randint(0, 5, (1, 9, 3), dtype=torch.uint8), None, torch.zeros(1, 9).int(), torch.zeros(1, 9)
        before = model(*x)[0]
        for block in model.blocks:
            block.mixer.qkv.weight[:64] *= 5 # of q and k: their size does not matter any more
        assert (model(*x)[0] - before).abs().max() < 1e-5 and (make('A')(*x)[0] - before).abs().max() > 1e-2

def test_the_dial_sets_width_heads_and_learning_rates():
    for depth in (2, 4, 6):
        model = Model(ModelConfig(depth=depth))
        assert (len(model.blocks), model.cfg.n_embd, model.blocks[1].mixer.nh) == (depth, 32 * depth, depth)
    lrs = [ModelConfig(depth=depth).learning_rates(0, 0) for depth in (2, 4, 8)]
    assert lrs[0] > lrs[1] > lrs[2] and ModelConfig(depth=8).learning_rates(0.1, 0) == (0.1, lrs[2][1])
    cfg = ModelConfig(depth=6, n_layer=3, n_embd=64).filled()
    assert (cfg.n_layer, cfg.n_embd, cfg.kinds) == (3, 64, 'MAM') and cfg.filled() == cfg

@pytest.mark.parametrize('wrong', [dict(mixer='AB'), dict(mixer=''), dict(depth=0), dict(head_size=48), dict(head_size=4), dict(n_kv_head=3), dict(rope_bases=(1.0, 2.0)), dict(loops=0),
                                   dict(window=0), dict(d_head=60), dict(d_head=0), dict(d_state=0), dict(n_hidden=-1), dict(n_kv_head=-1), dict(head_size=0), dict(d_conv=1), dict(chunk_size=0), dict(kernel='cuda'), dict(vocab_size=10)])
def test_a_wrong_setting_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Model(ModelConfig(**wrong))

def test_a_setting_that_no_layer_heeds_is_not_refused():
    Model(ModelConfig(mixer='M', n_embd=48, d_head=16)) # whatever the head size of attention
    Model(ModelConfig(mixer='A', n_embd=48, head_size=16))

def test_products_of_the_cpu_are_exact():
    from nanoarc.train import get_device
    get_device('cpu', 'float32')
    a, b = torch.randn(2, 512, 512, dtype=torch.float64).unbind()
    assert relative((a.float() @ b.float()).double(), a @ b) < 2e-6 # bf16 has 4e-3

def test_a_prompt_alone_needs_no_mask():
    prompt = torch.ones(2, 50, dtype=torch.bool)
    assert make_mask(0, 50, None, prompt, 0, False, False, torch.zeros(2, 50, 8)) == [(0, 50, 0, 50, None)]

def test_docs_come_in_every_call_or_in_none():
    model = make('M')
    cache, doc = Cache(model), torch.zeros(1, 3).int()
    x = torch.zeros(1, 3).long(), None, torch.zeros(1, 3, 3, dtype=torch.uint8)
    model(*x, doc, doc, doc, cache=cache)
    with pytest.raises(AssertionError, match="docs"):
        model(*x, None, doc, doc, cache=cache)
    cache = Cache(model)
    model(*x, None, doc, doc, cache=cache)
    with pytest.raises(AssertionError, match="docs"):
        model(*x, doc, doc, doc, cache=cache)

def test_the_triton_kernel_is_refused_where_it_cannot_work(monkeypatch):
    import sys
    from nanoarc.model import check_kernel
    check_kernel('torch', torch.device('cpu'))
    monkeypatch.setitem(sys.modules, 'fla', None) # as if it were not installed
    with pytest.raises(ValueError, match=r"kernel='triton'.*pip install 'nanoarc\[gpu\]'"):
        check_kernel('triton', torch.device('cpu'))
    for name in ('fla', 'fla.ops', 'fla.ops.simple_gla'):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(ValueError, match="kernel='triton' is for cuda, this is cpu"):
        check_kernel('triton', torch.device('cpu'))
    make('M', kernel='triton') # what a gpu has trained, any machine decodes

def test_each_parameter_has_one_optimizer_and_decays_as_it_should():
    model = make('MA')
    names = {id(p): name for name, p in model.named_parameters()}
    for ns_steps in (5, 0):
        groups = [(type(opt), group, [names[id(p)] for p in group['params']]) for opt in model.optimizers(0.3, 0.2, 0.1, ns_steps) for group in opt.param_groups]
        assert sorted(name for _, _, group in groups for name in group) == sorted(names.values())
        for kind, group, members in groups:
            for name in members:
                matrix = name.startswith('blocks.') and name.endswith('.weight') and 'norm' not in name
                assert (kind is Muon) == (matrix and ns_steps > 0) and group['lr'] == (0.3 if matrix else 0.2)
                assert group['weight_decay'] == (0.0 if 'norm' in name or name.rpartition('.')[2] in ('a_log', 'dt_bias', 'skip', 'conv_bias') else 0.1)

def test_mamba_begins_with_the_decays_and_steps_of_the_paper():
    mixer = Model(ModelConfig(mixer='M', n_embd=512)).blocks[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 <= dt.min() < 1e-2 < dt.max() <= 0.1 and 1 <= mixer.a_log.exp().min() and mixer.a_log.exp().max() <= 16
    assert (mixer.skip == 1).all() and (mixer.conv_bias == 0).all() and mixer.conv.abs().max() <= 0.5

@pytest.mark.parametrize('mixer', MIXERS)
def test_half_precision_is_near(toy, mixer):
    batch = toy_batch(toy(n=4, side=5))
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer=mixer, depth=2, n_task=4, qk_norm=True, n_kv_head=1))
    want = model(*batch)[1]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(*batch)[1]
    loss.backward()
    assert loss.dtype == torch.float32 and abs((loss / want).item() - 1) < 0.01 and all(torch.isfinite(p.grad).all() for p in model.parameters())

@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('batching', ['bucket', 'pack'])
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
def test_decoding_compiles_without_a_graph_break_and_seldom_again(mixer):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    plain, model = make(mixer).eval(), make(mixer).eval()
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    idx = torch.randint(0, 10, (2, 160), generator=torch.Generator().manual_seed(1))
    pos, task, dih = torch.randint(0, 9, (2, 160, 3), dtype=torch.uint8), torch.zeros(2, 160).int(), torch.zeros(2, 160)
    caches, graphs = [Cache(plain), Cache(model)], []
    for a, b in [(0, 20)] + [(t, t + 1) for t in range(20, 160)]:
        x, y = (m(idx[:, a:b], None, pos[:, a:b], None, task[:, a:b], dih[:, a:b], cache=cache)[0] for m, cache in zip((plain, model), caches))
        assert (x - y).abs().max() < 1e-12
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[60], f"compiled again and again: {graphs}" # by then the cache has grown once

def test_the_model_alone_takes_tokens_and_documents():
    model = Model(ModelConfig(mixer='MMMA', depth=4, rope_bases=(10000,), prefix=False, vocab_size=500)) # as in the readme
    idx, doc = torch.randint(0, 500, (2, 70)), torch.arange(70).expand(2, -1).int() // 30
    logits, loss = model(idx, idx.roll(-1, 1), doc=doc)
    loss.backward()
    assert logits.shape == (2, 70, 500) and loss.item() == pytest.approx(140 * np.log(500), rel=0.02)

# -----------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('path', ['flex', 'sdpa', 'triton', 'compiled'])
def test_a_gpu_agrees_with_the_cpu(toy, mixer, path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no cuda")
    if path == 'triton':
        pytest.importorskip('fla.ops.simple_gla')
    if path == 'sdpa': # what a T4 takes
        monkeypatch.setattr('nanoarc.model.is_recent', lambda device: False)
    ds = ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=512, batch_tokens=2048))
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer=mixer, depth=2, head_size=32, window=50, n_task=4, kernel='triton' if path == 'triton' else 'torch'))
    batch = ArcLoader(ds).next_batch()
    want = model(*batch)[1]
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    for block in model.blocks if path == 'compiled' else ():
        block.compile()
    loss = model(*(x.cuda() for x in batch))[1]
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)
    assert all(relative(p.grad.cpu(), grads[name]) < 0.02 for name, p in model.named_parameters()) # TF32 at worst
    with torch.autocast('cuda', dtype=torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16):
        assert model(*(x.cuda() for x in batch))[1].item() == pytest.approx(want.item(), rel=0.02)

@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize('mixer', MIXERS)
def test_a_gpu_decodes_as_the_cpu_does(mixer):
    from nanoarc.solve import decode
    if not torch.cuda.is_available():
        pytest.skip("no cuda")
    model = make(mixer).float().eval()
    model.head.weight[END] *= 3
    prompts = torch.tensor([[11, 1, 2, ROW, 3, 4, ROW, OUT], [11, 5, 2, ROW, 9, 4, ROW, OUT]])
    pos = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0], [2, 0, 0], [0, 0, 1]], dtype=torch.uint8).expand(2, -1, -1)
    task, dih = torch.tensor([0, 1]), torch.tensor([0, 5])
    mine = sorted(decode(model, prompts, pos, task, dih))
    other = sorted(decode(model.cuda(), *(x.cuda() for x in (prompts, pos, task, dih))))
    assert [x[:2] for x in mine] == [x[:2] for x in other] and max(abs(x[2] - y[2]) for x, y in zip(mine, other)) < 0.05
