""" python -m pytest tests/test_finetune.py: the commands finetune and export, and what comes of them, on tiny bases """
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_tasks
from safetensors.torch import load_file, save_file

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')
pytest.importorskip('peft')
from test_lm import TEMPLATE, byte_tokenizer, prompts, tiny_base

from nanoarc import checkpoint, solve
from nanoarc.cli import main as cli
from nanoarc.grids import END, ROW
from nanoarc.lm import LMConfig, make_lm
from nanoarc.run import load_run, read_metrics
from nanoarc.submission import read_fitting

pytestmark = pytest.mark.filterwarnings('ignore')

# -----------------------------------------------------------------------------
# the whole

@pytest.fixture(scope='session')
def bases(tmp_path_factory):
    """ saved bases -> their directories """
    found = {}
    for name, kind, seed in (('hybrid', 'falcon_h1', 0), ('other', 'falcon_h1', 1), ('llama', 'llama', 0)):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        found[name] = str(tmp_path_factory.mktemp(name))
        tiny_base(kind, tokenizer, seed).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found

@pytest.fixture(scope='session')
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp('lm') / 'toy'
    path.mkdir()
    for name, task in toy_tasks(n=6, side=2).items():
        (path / f"{name}.json").write_text(json.dumps(task))
    return str(path)

def tune(base, source, out, *args):
    cli(['finetune', f"--base={base}", f"--data={source}", f"--out_dir={out}", '--minutes=0', '--rank=4',
         '--batch_tokens=100', '--val_tasks=2', '--log_every=1', '--device=cpu', '--draw_every=0', *args])

def digest(out):
    tensors, meta = checkpoint.load(out)
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].numpy().tobytes())
    return h.hexdigest(), meta['val_loss'], [(x['step'], x['loss']) for x in read_metrics(out) if 'loss' in x]

@pytest.mark.parametrize('args', [[], ['--rank=0'], ['--form=chat', '--ema=0.9']])
def test_resuming_is_exact_with_adapters_with_all_weights_and_with_averages(bases, source, tmp_path, args):
    tune(bases['hybrid'], source, tmp_path / 'whole', '--max_iters=8', '--save_every=2', *args)
    tune(bases['hybrid'], source, tmp_path / 'part', '--max_iters=8', '--save_every=2', *args)
    last = checkpoint.file(tmp_path / 'part', 8)
    last.unlink()
    last.with_suffix('.sha256').unlink()
    cli(['finetune', '--resume', str(tmp_path / 'part')])
    assert digest(tmp_path / 'part') == digest(tmp_path / 'whole')
    names = [name for name in checkpoint.load(tmp_path / 'part')[0] if name.startswith('model.')]
    # the base is not in it
    assert args == ['--rank=0'] or all('.lora_' in name or 'embed' in name or 'lm_head' in name for name in names)

def test_the_wrong_base_is_refused_by_name_and_a_moved_one_is_not(bases, source, tmp_path, capsys):
    out = tmp_path / 'run'
    tune(bases['hybrid'], source, out, '--max_iters=2')
    for command in (['finetune', '--resume', str(out), '--max_iters=3'],
                    ['solve', '--run', str(out), f"--data={source}", '--allow_leak', '--views=1']):
        with pytest.raises(SystemExit) as e:
            cli([*command, f"--base={bases['other']}"])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1
        assert f"base={bases['other']!r} is another model than the one that was fine-tuned" in err
    moved = tmp_path / 'moved'
    os.symlink(bases['hybrid'], moved)
    cli(['finetune', '--resume', str(out), f"--base={moved}", '--max_iters=3'])
    assert checkpoint.steps(out)[0] == 3
    new = [f"--out_dir={tmp_path / 'new'}", '--minutes=0', '--max_iters=1']
    for args, text in (
        (['--base=', '--data=arc1/training'], "want a --base"),
        ([f"--base={tmp_path / 'nothing'}"], "want a directory with a config.json, a .gguf file, or an id"),
        (['--base=nobody/nothing'], "base='nobody/nothing': no such file, and from the Hugging Face hub"),
        ([f"--base={moved}", '--shots=0'], "a language model has no task embedding"),
        (['--resume', str(out), '--rank=8', '--max_iters=4'], "rank differs (saved 4, now 8)"),
        ([f"--base={moved}", '--rank=-1'], "rank=-1"),
        ([f"--base={moved}", '--compile=on'], "compile='on'"),
    ):
        with pytest.raises(SystemExit) as e:
            cli(['finetune', *([] if '--resume' in args else new), *args])
        assert e.value.code == 2 and text in capsys.readouterr().err

# -----------------------------------------------------------------------------
# bases of other people

def copy_of(base, out, config=None, tokens=None, **tensors):
    """ a base with other entries in its config and tokenizer_config, and other tensors, None = without this one """
    shutil.copytree(base, out)
    for file, values in (('config.json', config), ('tokenizer_config.json', tokens)):
        (out / file).write_text(json.dumps({**json.loads((out / file).read_text()), **(values or {})}))
    saved = {**load_file(out / 'model.safetensors'), **tensors}
    saved = {name: x for name, x in saved.items() if x is not None}
    save_file(saved, out / 'model.safetensors', metadata={'format': 'pt'})
    return out

def refused(capsys, base, source, out):
    """ what is said of a base, in one line """
    with pytest.raises(SystemExit) as e:
        tune(base, source, out, '--max_iters=1')
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith(f"nanoarc: base='{base}': ") and len(err) < 400
    return err

@pytest.mark.parametrize('where', ['code.', 'somebody/else--code.'])
@pytest.mark.parametrize('tells', ['config', 'model', 'tokenizer', 'all'])
@pytest.mark.parametrize('kind', ['evil', 'llama'])
def test_no_code_of_a_base_runs_and_nobody_is_asked(bases, source, tmp_path, capsys, monkeypatch, kind, tells, where):
    """ if transformers knows its class that one is taken, if not it is refused """
    monkeypatch.setattr('builtins.input', lambda *_: pytest.fail("it asks"))
    names = {'AutoConfig': 'config', 'AutoModelForCausalLM': 'model'}
    auto_map = {name: f"{where}{name}" for name, part in names.items() if tells in (part, 'all')}
    tokens = {'auto_map': {'AutoTokenizer': [None, f"{where}Tokens"]}} if tells in ('tokenizer', 'all') else {}
    base = copy_of(bases['llama'], tmp_path / 'base', {'model_type': kind, 'auto_map': auto_map}, tokens)
    (base / 'code.py').write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w').write('x')")
    if kind == 'llama':
        tune(base, source, tmp_path / 'run', '--max_iters=1')
    else:
        err = refused(capsys, base, source, tmp_path / 'run')
        assert 'trust_remote_code' not in err
        assert ("code of its own" if tells in ('config', 'all') else "model type `evil`") in err
    assert not (tmp_path / 'PWNED').exists()

def test_no_code_of_a_tokenizer_runs_and_nobody_is_asked(bases, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda *_: pytest.fail("it asks"))
    tokens = {'auto_map': {'AutoTokenizer': [None, 'code.Tokens']}, 'tokenizer_class': 'Evil'}
    base = copy_of(bases['llama'], tmp_path / 'base', tokens=tokens)
    (base / 'code.py').write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w').write('x')")
    assert "code of its own" in refused(capsys, base, source, tmp_path / 'run') and not (tmp_path / 'PWNED').exists()

LOST = 'model.layers.0.self_attn.q_proj.weight'

@pytest.mark.parametrize('tensors, want', [
    ({LOST: None}, f"{LOST} is missing"),
    ({'lm_head.weight': None}, "lm_head.weight is missing"),
    ({'model.norm.weight': None, LOST: None}, f"{LOST} is missing; model.norm.weight is missing"),
    ({LOST: torch.zeros(32, 31)}, f"{LOST} is (32, 31), want (32, 32)"),
    ({'model.embed_tokens.weight': torch.zeros(7, 32)}, "model.embed_tokens.weight is (7, 32), want ("),
])
def test_a_base_that_would_be_filled_with_random_numbers_is_refused(bases, source, tmp_path, capsys, tensors, want):
    base = copy_of(bases['llama'], tmp_path / 'base', **tensors)
    assert want in refused(capsys, base, source, tmp_path / 'run')

def test_a_base_that_lacks_nothing_it_needs_is_taken(bases, source, tmp_path, capsys):
    """ a head that is the embedding is saved once, and what transformers does not use is said """
    tied = tmp_path / 'tied'
    tiny_base('llama', byte_tokenizer(), tied=True).save_pretrained(tied)
    byte_tokenizer().save_pretrained(tied)
    assert 'lm_head.weight' not in load_file(tied / 'model.safetensors')
    tune(tied, source, tmp_path / 'a', '--max_iters=1')
    assert "does not use" not in capsys.readouterr().out
    more = copy_of(bases['llama'], tmp_path / 'more', **{'model.layers.2.mlp.up_proj.weight': torch.zeros(48, 32)})
    tune(more, source, tmp_path / 'b', '--max_iters=1')
    assert "does not use these of the base: model.layers.2.mlp.up_proj.weight" in capsys.readouterr().out

def test_a_base_that_cannot_be_read_is_one_line(bases, source, tmp_path, capsys):
    data = (Path(bases['llama']) / 'model.safetensors').read_bytes()
    for k, (file, content) in enumerate((('model.safetensors', data[:-99]), ('model.safetensors', b'{'),
                                         ('config.json', b'{'), ('config.json', b'{"hidden_size": 3}'),
                                         ('config.json', b'{"model_type": "vit"}'), ('tokenizer.json', b'{}'))):
        base = copy_of(bases['llama'], tmp_path / f"base{k}")
        (base / file).write_bytes(content)
        assert "transformers cannot read it, " in refused(capsys, base, source, tmp_path / 'run')
    base = copy_of(bases['llama'], tmp_path / 'adapter')
    (base / 'adapter_config.json').write_text(json.dumps({'base_model_name_or_path': bases['other']}))
    assert "an adapter of peft" in refused(capsys, base, source, tmp_path / 'run')

# -----------------------------------------------------------------------------
# what comes of it

@pytest.fixture(scope='session')
def tuned(bases, source, tmp_path_factory):
    """ a base that has learned a little of the toy tasks' demos """
    out = tmp_path_factory.mktemp('tuned') / 'run'
    tune(bases['hybrid'], '', out, f"--adapt={source}", '--max_iters=60', '--lr=0.01', '--adam_lr=0.01',
         '--val_tasks=0', '--batch_tokens=400')
    return str(out)

def test_it_learns_what_a_pair_looks_like(tuned):
    losses = [x['loss'] for x in read_metrics(tuned) if 'loss' in x]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])

@pytest.mark.parametrize('args', [['--views=3'], ['--views=2', '--ttt_steps=2', '--together=1', '--ttt_lr=0.01']])
@pytest.mark.slow
def test_it_solves_by_the_same_solver_without_answers(tuned, source, tmp_path, args):
    for path in Path(source).iterdir():
        obj = json.loads(path.read_text())
        for pair in obj['test']:
            del pair['output']
        (tmp_path / 'blind').mkdir(exist_ok=True)
        (tmp_path / 'blind' / path.name).write_text(json.dumps(obj))
    for name, src, more in (('a', source, []), ('b', tmp_path / 'blind', []), ('c', source, ['--decode_rows=3'])):
        cli(['solve', '--run', tuned, f"--data={src}", f"--out_dir={tmp_path / name}", '--p_min=0.05', '--device=cpu',
             *args, *more])
    a, b, c = (json.loads((tmp_path / name / 'submission.json').read_text()) for name in 'abc')
    assert a == b == c and len(a) == 6
    a, b = ((tmp_path / name / 'candidates.jsonl').read_bytes() for name in 'ab')
    assert a == b and len(a.splitlines()) > 6

def test_test_time_training_leaves_the_model_as_it_is(tuned):
    model, data_cfg, meta = load_run(tuned, torch.device('cpu'))
    before = {name: p.clone() for name, p in model.named_parameters()}
    corpora = read_fitting('arc1/training', 40, opened=False)[0]
    some = [corpora[0].select(np.arange(len(corpora[0])) < 2)]
    cfg = solve.SolveConfig(ttt_steps=2)
    net, _ = solve.fine_tune(model, 0.01, some, data_cfg, meta['rows'], cfg, torch.device('cpu'))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in net.named_parameters():
        if 'lora_A' not in name:
            assert torch.equal(p, before[name]) != (name in model.trained), name

@pytest.mark.parametrize('kind, args', [('hybrid', []), ('llama', ['--rank=0']),
                                        ('llama', ['--no_shrink', '--form=chat'])])
def test_an_export_is_a_model_of_transformers_that_gives_the_same_logits(bases, source, tmp_path, kind, args, capsys):
    run, out = tmp_path / 'run', tmp_path / 'out'
    tune(bases[kind], source, run, '--max_iters=6', '--lr=0.02', '--adam_lr=0.02', *args)
    cli(['solve', '--run', str(run), f"--data={source}", '--allow_leak', '--views=1', '--device=cpu'])
    cli(['export', str(run), '--out', str(out), '--data', source])
    lm, _, _ = load_run(str(run), torch.device('cpu'))
    base = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    symbols = prompts(1)[0].tolist()
    text, _ = lm.form.write(symbols)
    ids = tokenizer(text, return_tensors='pt', add_special_tokens=False).input_ids
    got = base(ids).logits[0, -1]
    want = lm(torch.tensor([symbols]))[0][0, -1, [*range(10), ROW, END]]
    assert torch.allclose(got[[lm.form.ids[x][0] for x in (*range(10), ROW, END)]], want, atol=1e-3)
    original = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    assert not torch.allclose(got, original(ids).logits[0, -1], atol=1e-2)
    card, table = (out / 'README.md').read_text(), base.get_input_embeddings().weight
    assert f"- {base.num_parameters():,} parameters, {table.numel():,} of them embeddings\n" in card
    for words in ("nats per output token", "% by the official rule of ARC Prize (", "% by Kaggle's ("):
        assert words in card
    assert bases[kind] not in card and re.search(r"TRAINED ON \d OF THE ANSWERS", card)
    with pytest.raises(SystemExit):
        cli(['export', str(run), '--out', str(out)])
    assert "is there already" in capsys.readouterr().err

def same_run(a, b, steps):
    """ of one rank and of two: the same losses to 1e-5 """
    (_, val, one), (_, val2, two) = digest(a), digest(b)
    return len(one) == len(two) == steps and np.allclose(one, two, rtol=0, atol=1e-5) and abs(val - val2) < 1e-5

def test_two_ranks_are_the_same_run_as_one(bases, source, tmp_path):
    from test_reliability import ranks
    def run(rank, out):
        tune(bases['llama'], source, out, '--max_iters=4', '--dtype=float32')
    assert ranks(1, tmp_path / 'meet', run, tmp_path / 'one') == [0]
    assert ranks(2, tmp_path / 'meet', run, tmp_path / 'two') == [0, 0]
    assert same_run(tmp_path / 'one', tmp_path / 'two', 4)

@pytest.mark.parametrize('kind', ['llama', 'hybrid'])
def test_frozen_weights_that_are_shared_out_over_ranks_are_the_same_run(bases, source, tmp_path, kind):
    from test_reliability import ranks
    def run(rank, out, *args):
        tune(bases[kind], source, out, '--dtype=float32', *args)
    def held(rank, out):
        lm = make_lm(LMConfig(base=bases[kind], rank=4, shard=True), 'cpu', 2)
        here, frozen, ours = 0, 0, 0
        for name, p in lm.named_parameters():
            if name in lm.trained:
                here += p.numel()
                ours += p.numel()
            else:
                here += p.to_local().numel()
                frozen += p.numel()
        (out / f"held{rank}").write_text(json.dumps([here, frozen, ours]))
    assert ranks(2, tmp_path / 'meet', held, tmp_path) == [0, 0]
    (a, frozen, ours), (b, *_) = (json.loads((tmp_path / f"held{rank}").read_text()) for rank in range(2))
    assert a + b == frozen + 2 * ours # each has its half
    assert ranks(1, tmp_path / 'meet', run, tmp_path / 'one', '--max_iters=4', '--save_every=2') == [0]
    assert ranks(2, tmp_path / 'meet', run, tmp_path / 'two', '--max_iters=4', '--shard', '--save_every=2') == [0, 0]
    assert same_run(tmp_path / 'one', tmp_path / 'two', 4)
    val = digest(tmp_path / 'one')[1]
    for path in (checkpoint.file(tmp_path / 'two', 4), checkpoint.file(tmp_path / 'two', 4, 'sha256')):
        path.unlink()
    def go_on(rank, *args):
        cli(['finetune', '--resume', str(tmp_path / 'two'), *args])
    assert ranks(1, tmp_path / 'meet', go_on, '--no_shard') == [0] # a whole model goes on with it
    assert abs(digest(tmp_path / 'two')[1] - val) < 1e-5
