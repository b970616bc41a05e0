""" python -m pytest tests/test_model.py """
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanoarc.data import END, OUT, ROW, ArcDataset, ArcLoader, DataConfig, grammar, next_pos
from nanoarc.model import Attention, Cache, Mamba2, Model, ModelConfig, Muon, orthogonalize, ssd

MIXERS = ['A', 'M', 'MA']

def make(mixer='A', n_task=4, **kwargs):
    """ a tiny model in fp64, its weights large enough that every part matters """
    torch.manual_seed(1337)
    model = Model(ModelConfig(mixer=mixer, n_layer=2, n_embd=32, head_size=16, d_head=16, d_state=8, chunk_size=5, n_task=n_task, **kwargs)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=0.3)
    return model

def toy_batch(src, shots=0):
    return ArcLoader(ArcDataset(DataConfig(data=src, batch_tokens=300, shots=shots))).next_batch()

def by_recurrence(x, a, Bm, Cm, doc):
    """ the definition: decay the state, write x into it, read it out; a new document starts from zero """
    B, T, nh, hs = x.shape
    h, ys = torch.zeros(B, nh, hs, Bm.size(-1), dtype=x.dtype), []
    for t in range(T):
        if t > 0:
            h = h * (doc[:, t] == doc[:, t - 1])[:, None, None, None]
        h = h * a[:, t].exp()[..., None, None] + x[:, t, ..., None] * Bm[:, t, None, None]
        ys.append((h * Cm[:, t, None, None]).sum(-1)) # (B, nh, hs)
    return torch.stack(ys, 1), h

@pytest.mark.parametrize('T, Q', [(1, 4), (17, 4), (17, 17), (17, 64), (32, 8), (33, 8)])
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_ssd_matches_the_recurrence(T, Q, dtype, tol):
    B, nh, hs, ns = 2, 3, 4, 5
    torch.manual_seed(1337)
    x, a = torch.randn(B, T, nh, hs, dtype=dtype), -torch.rand(B, T, nh, dtype=dtype) * 3
    Bm, Cm = torch.randn(B, T, ns, dtype=dtype), torch.randn(B, T, ns, dtype=dtype)
    cuts = torch.sort(torch.randint(0, T + 1, (B, 2)))[0]
    doc = (torch.arange(T)[None] >= cuts[:, :1]).int() + (torch.arange(T)[None] >= cuts[:, 1:]).int() # three documents a row
    for d in (doc, torch.zeros_like(doc)):
        y, state = ssd(x, a, Bm, Cm, d, Q)
        want, h = by_recurrence(x, a, Bm, Cm, d)
        assert (y - want).abs().max() < tol and (state - h).abs().max() < tol
    assert torch.equal(ssd(x, a, Bm, Cm, None, Q)[0], y) # no doc is one document

def test_ssd_has_the_gradient_of_the_recurrence():
    torch.manual_seed(1337)
    shapes = (2, 11, 2, 3), (2, 11, 2), (2, 11, 4), (2, 11, 4)
    args = [torch.randn(*s, dtype=torch.float64) for s in shapes]
    args[1] = -args[1].abs()
    doc = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    grads = []
    for f in (lambda *z: ssd(*z, doc, 4), lambda *z: by_recurrence(*z, doc)):
        z = [x.clone().requires_grad_() for x in args]
        (f(*z)[0] ** 2).sum().backward()
        grads.append([x.grad for x in z])
    assert all((p - q).abs().max() < 1e-11 for p, q in zip(*grads))

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
        rope, mask, causal, doc = (torch.ones(1, 6, 1, 16), torch.zeros(1, 6, 1, 16)), None, True, None
    x = torch.randn(1, 6, 32, dtype=torch.float64) * 7
    out = block(x, Ctx)
    assert torch.allclose(seen['x'], block.norm1(x)) and torch.allclose(seen['u'], block.norm2(x + seen['y']))
    assert torch.allclose(out, x + seen['y'] + seen['v']) # take the mixer and the mlp away and x is left
    assert isinstance(block.mixer, {'A': Attention, 'M': Mamba2}[mixer])

def test_a_pattern_is_repeated_over_the_layers_and_a_wrong_one_is_refused():
    model = Model(ModelConfig(mixer='MMA', n_layer=5, n_embd=32))
    assert "".join('A' if isinstance(b.mixer, Attention) else 'M' for b in model.blocks) == 'MMAMM'
    for mixer in ('', 'AB', 'S'):
        with pytest.raises(ValueError, match="mixer="):
            Model(ModelConfig(mixer=mixer))

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
    tokens, logp = decode(model, prompts, pos, task, dih)
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
        assert tokens[b, : len(idx) - 8].tolist() == idx[8:]
        if idx[-1] == END:
            assert abs(total - float(logp[b])) < 1e-9

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
        tokens, logp = decode(model, idx, pos, task, dih)
        for b in range(2):
            n = tokens[b].tolist().index(END)
            grid = decode_grid(tokens[b, :n].tolist())
            assert max(grid.shape) <= 30 and logp[b] < 0
            alone = decode(model, idx[b : b + 1], pos[b : b + 1], task[b : b + 1], dih[b : b + 1])
            assert torch.equal(alone[0][0], tokens[b]) and (alone[1][0] - logp[b]).abs() < 1e-9

@pytest.mark.parametrize('mixer, shots', [('A', -1), ('MA', 0), ('M', -1)])
def test_the_loss_of_a_packed_batch_is_that_of_its_documents_one_by_one(toy, mixer, shots):
    from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
    ds = ArcDataset(DataConfig(data=toy(n=4), shots=shots, batching='pack', block_size=512, batch_tokens=1024))
    model = Model(ModelConfig(n_layer=2, n_embd=32, head_size=16, mixer=mixer, n_task=4 if shots == 0 else 0)).eval()
    with torch.no_grad():
        batch = ArcLoader(ds).next_batch()
        alone = 0.0
        for row, docs in enumerate(batch.doc):
            for d in range(int(docs.max()) + 1):
                one = Batch(*(x if x is None else x[row][docs == d][None] for x in batch))
                alone += float(model(*one._replace(doc=torch.zeros_like(one.doc)))[1])
        assert int(batch.doc.max()) > 1 and float(model(*batch)[1]) == pytest.approx(alone, rel=1e-4)
