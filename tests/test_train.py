""" python -m pytest tests/test_train.py """
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from nanoarc import checkpoint, train
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig
from nanoarc.model import ModelConfig
from nanoarc.train import TrainConfig, get_lr
from nanoarc.view import read_metrics

def losses(out_dir):
    """ every logged loss, to the last bit """
    return [(x['step'], float(x[key]).hex()) for x in read_metrics(out_dir) for key in ('loss', 'val_loss') if key in x]

def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    cfg = TrainConfig(warmup_iters=10, decay_frac=0.5)
    lr = [get_lr(step, 100, cfg) for step in range(100)]
    assert lr[0] == 0.1 and lr[9:51] == [1.0] * 42 and lr[75] == 0.5 and lr[99] == pytest.approx(0.02)
    assert [get_lr(step, 0, cfg) for step in range(50)] == lr[:50] # while --minutes still measures, it is the same

def test_it_overfits_a_few_tasks(toy, tmp_path):
    cli(['train', f"--data={toy(n=2, side=3)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=250', '--val_tasks=0', '--colors=none', *TINY])
    rows = [x['loss'] for x in read_metrics(tmp_path / 'run') if 'loss' in x]
    assert rows[0] > 2 and rows[-1] < 0.5 and (tmp_path / 'run' / 'loss.png').read_bytes()[:4] == b"\x89PNG"

@pytest.mark.parametrize('mixer, accum', [('A', 1), ('MA', 2)])
def test_a_resumed_run_is_the_run_that_never_stopped(toy, tmp_path, mixer, accum):
    out = tmp_path / 'run'
    args = [f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=13', '--save_every=6', '--eval_every=4', '--log_every=2', f"--mixer={mixer}",
            f"--grad_accum={accum}", *TINY]
    cli(['train', *args])
    want, logged = checkpoint.load(out)[0], losses(out)
    assert len(logged) > 8
    for kind in ('sha256', 'safetensors'): # as if killed after step 12 ...
        checkpoint.file(out, 13, kind).unlink()
    with open(out / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 13, "lo') # ... in the middle of a line
    cli(['train', '--resume', str(out)])
    got = checkpoint.load(out)[0]
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert losses(out) == logged

def test_resuming_a_finished_run_changes_nothing(toy, tmp_path, capsys):
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=2', *TINY])
    files = [(p, p.read_bytes()) for p in sorted((tmp_path / 'run').rglob('*')) if p.is_file()]
    cli(['train', '--resume', str(tmp_path / 'run')])
    assert "at step 2 of 2: it is done" in capsys.readouterr().out
    assert [(p, p.read_bytes()) for p in sorted((tmp_path / 'run').rglob('*')) if p.is_file()] == files

def test_micro_batches_are_weighed_by_their_loss_tokens(toy, tmp_path, monkeypatch):
    from nanoarc.data import ArcDataset, ArcLoader
    from nanoarc.model import Model
    seen = []
    monkeypatch.setattr('torch.nn.utils.clip_grad_norm_', lambda params, _: seen.append([p.grad.clone() for p in params]))
    data_cfg, model_cfg = DataConfig(data=toy(n=4, side=6), batch_tokens=150), ModelConfig(n_layer=1, n_embd=32, mixer='A')
    train.main(TrainConfig(out_dir=str(tmp_path / 'run'), minutes=0, max_iters=1, grad_accum=3, device='cpu'), model_cfg, data_cfg)
    ds = ArcDataset(data_cfg)
    torch.manual_seed(1337)
    model, loader, n = Model(ModelConfig(**{**model_cfg.__dict__, 'n_task': 4})), ArcLoader(ds), []
    for _ in range(3): # the mean over all tokens of the three, taken at once
        batch = loader.next_batch()
        n.append(int((batch.targets != -100).sum()))
        model(*batch)[1].backward()
    assert len(set(n)) > 1 # they differ, or this would show nothing
    for got, p in zip(seen[0], model.parameters()):
        assert torch.allclose(got, p.grad / sum(n), atol=1e-6)

def test_validation_counts_output_tokens_whatever_is_trained_on(toy, tmp_path):
    src = toy(n=4)
    for loss_on in ('query', 'all'):
        cli(['train', f"--data={src}", f"--out_dir={tmp_path / loss_on}", '--max_iters=1', '--lr=1e-12', '--adam_lr=1e-12', '--shots=-1', '--no_prefix', f"--loss_on={loss_on}", *TINY])
    assert checkpoint.load(tmp_path / 'all')[1]['val_loss'] == pytest.approx(checkpoint.load(tmp_path / 'query')[1]['val_loss'], rel=1e-4)

def test_what_would_change_a_resumed_run_is_refused_by_name(tiny_run):
    run, _ = tiny_run
    for flag, field in (('--seed=1', 'seed'), ('--batch_tokens=999', 'batch_tokens differs'), ('--p_identity=0.5', 'p_identity differs'), ('--adapt=arc2/evaluation', 'corpus_sha256 differs'),
                        ('--n_embd=64', 'n_embd differs'), ('--minutes=9', 'does not go with --resume'), ('--out_dir=x', 'does not go with --resume')):
        result = subprocess.run([sys.executable, '-m', 'nanoarc.cli', 'train', '--resume', run, flag], capture_output=True, text=True)
        assert result.returncode == 2 and field in result.stderr and result.stderr.count("\n") == 1, result.stderr

def test_minutes_become_a_number_of_steps(toy, tmp_path):
    args = [x for x in TINY if not x.startswith('--minutes')]
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--minutes=0.05', *args])
    meta = checkpoint.load(tmp_path / 'run')[1]
    assert meta['max_iters'] == meta['step'] > 5 and meta['seconds'] > 1 # 3 s were asked for, a busy machine may take longer

def test_metrics_have_what_is_promised(tiny_run):
    rows = read_metrics(tiny_run[0])
    assert all('step' in x and set(x) <= {'step', 'loss', 'val_loss', 'lr', 'tok_s', 'wait'} for x in rows)
    assert set(rows[-1]) >= {'loss', 'lr', 'tok_s', 'wait'} and rows[-1]['step'] == 30

def test_a_damaged_checkpoint_falls_back_and_says_so(toy, tmp_path, capsys):
    out = tmp_path / 'run'
    cli(['train', f"--data={toy()}", f"--out_dir={out}", '--max_iters=6', '--save_every=3', *TINY])
    path = out / 'ckpt' / 'step-000006.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert checkpoint.load(out)[1]['step'] == 3 and "step-000006.safetensors: damaged" in capsys.readouterr().out
    (out / 'ckpt' / 'step-000003.safetensors').unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*damaged.*missing"):
        checkpoint.load(out)

def test_checkpoints_are_pruned_to_two(toy, tmp_path):
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=9', '--save_every=2', *TINY])
    assert sorted(p.name for p in (tmp_path / 'run' / 'ckpt').iterdir()) == [f"step-00000{step}.{kind}" for step in (8, 9) for kind in ('safetensors', 'sha256')]

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.write_file(tmp_path / 'x', b"old")
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        checkpoint.write_file(tmp_path / 'x', b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('x', b"old")]

@pytest.mark.parametrize('args, want', [
    (['--loss_on=all'], "add --no_prefix"), (['--batching=box'], "batching='box'"), (['--mixer=X'], "mixer='X'"), (['--max_iters=0'], "set --minutes or --max_iters"),
    (['--dtype=int8'], "dtype='int8'"), (['--data=no/where'], "no such source"), (['--config=no.toml'], "no.toml"), (['--resume=/no/run'], "no checkpoint here"),
    (['--colors=blue'], "colors='blue'"), (['--loss_on=x'], "loss_on='x'"), (['--shots=-2'], "shots=-2"),
    (['--grad_accum=0'], "grad_accum"), (['--seed=-1'], "seed=-1"), (['--n_embd=40', '--mixer=A'], "n_embd=40"), (['--head_size=2'], "head_size=2"), (['--device=gpu'], "device='gpu'"),
    (['--vocab_size=10'], "vocab_size=10"), (['--val_tasks=-1'], "val_tasks=-1"), (['--mixer=M', '--d_conv=1'], "d_conv=1"), (['--n_task=9'], "n_task=9"), (['--batch_tokens=0'], "batch_tokens=0")])
def test_a_wrong_setting_is_one_line_and_exit_2(args, want, toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        place = [] if any(x.startswith('--resume') for x in args) else [f"--out_dir={tmp_path / 'run'}"]
        tiny = TINY if place else [x for x in TINY if not x.startswith('--minutes')]
        cli(['train', f"--data={toy()}", *place, '--max_iters=1', *tiny, *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and want in err and err.count("\n") == 1

def test_a_directory_that_holds_a_run_is_not_overwritten(tiny_run, capsys):
    with pytest.raises(SystemExit):
        cli(['train', f"--data={tiny_run[1]}", f"--out_dir={tiny_run[0]}", '--max_iters=1', *TINY])
    assert "--resume" in capsys.readouterr().err

def test_a_toml_file_sets_fields_and_flags_win(toy, tmp_path, capsys):
    path = tmp_path / 'mine.toml'
    path.write_text(f"data = '{toy()}'\nn_layer = 1\nlr = 1\nmax_iters = 2\nbatch_tokens = 99")
    cli(['train', '--config', str(path), f"--out_dir={tmp_path / 'run'}", '--batch_tokens=64'])
    meta = checkpoint.load(tmp_path / 'run')[1]
    assert (meta['model']['n_layer'], meta['train']['lr'], meta['data']['batch_tokens'], meta['step']) == (1, 1, 64, 2)
    path.write_text(f"data = '{tmp_path / 'toy'}'\nrope_bases = [10, 10.0, 5.0]\nmax_iters = 1\neval_every = 0\nsave_every = 0\nlog_every = 0")
    cli(['train', '--config', str(path), f"--out_dir={tmp_path / 'bare'}", '--n_layer=1', '--n_embd=32'])
    assert checkpoint.load(tmp_path / 'bare')[1]['model']['rope_bases'] == [10, 10, 5]
    for text, want in (("resume = 'x'", "unknown setting resume"), ("n_layers = 1", "unknown setting n_layers"), ("n_layer = '1'", "n_layer = '1', want a int"), ("n_layer =", "mine.toml: ")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            cli(['train', '--config', str(path)])
        assert want in capsys.readouterr().err

def test_no_name_stands_in_two_configs():
    names = [name for cls in (TrainConfig, ModelConfig, DataConfig) for name in cls.__dataclass_fields__]
    assert len(names) == len(set(names))

def test_training_never_opens_the_answers_of_adapt(toy, tmp_path):
    src = Path(toy(n=2))
    for path in src.iterdir():
        obj = json.loads(path.read_text())
        for pair in obj['test']:
            pair['output'] = "closed"
        path.write_text(json.dumps(obj))
    cfg = TrainConfig(out_dir=str(tmp_path / 'run'), minutes=0, max_iters=2, device='cpu', compile='off')
    assert train.main(cfg, ModelConfig(n_layer=1, n_embd=32), DataConfig(data='', adapt=str(src)))['step'] == 2

@pytest.mark.slow
def test_the_2024_form_runs_and_its_loss_falls(tmp_path):
    cli(['train', '--data', 'arc1/training', '--shots=-1', '--batching=pad', '--block_size=4096', '--mixer=MA', '--max_iters=20', f"--out_dir={tmp_path}", '--log_every=1'])
    rows = [x['loss'] for x in read_metrics(tmp_path) if 'loss' in x]
    assert len(rows) == 20 and all(x < 4 for x in rows) and sum(rows[-5:]) < 0.8 * sum(rows[:5])

@pytest.mark.slow
def test_the_wheel_installed_elsewhere_trains(toy, tmp_path):
    root, src = Path(__file__).parent.parent, tmp_path / 'src'
    shutil.copytree(root / 'nanoarc', src / 'nanoarc') # a build leaves files beside the sources
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(root / name, src)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '-w', tmp_path / 'wheel', src], check=True)
    subprocess.run([*pip, 'install', '--no-deps', '--target', tmp_path / 'site', *(tmp_path / 'wheel').glob('*.whl')], check=True)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import nanoarc; assert 'site' in nanoarc.__file__; from nanoarc.cli import main; main()"
    args = [f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=5', *TINY]
    subprocess.run([sys.executable, '-c', code, 'train', *args], cwd=tmp_path, check=True)
    assert checkpoint.load(tmp_path / 'run')[1]['step'] == 5

@pytest.mark.parametrize('mixer', ['A', 'MA', 'MS'])
def test_validation_leaves_the_compiled_blocks_to_training(toy, mixer, monkeypatch):
    """ it comes before the first step: shapes of its own would use up the compiler's patience """
    import contextlib
    import torch
    from nanoarc.data import ArcDataset, ArcLoader
    from nanoarc.model import Model
    from nanoarc.train import evaluate
    torch._dynamo.reset()
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True) # masks as on a gpu, which do not depend on what is in a row
    ds = ArcDataset(DataConfig(data=toy(n=30, side=9), batching='pack', block_size=512, batch_tokens=1024, val_tasks=15))
    model, loader, calls = Model(ModelConfig(mixer=mixer, n_layer=4, n_embd=32, head_size=16, n_task=30)), ArcLoader(ds), []
    def backend(graph, _):
        return lambda *args: calls.append(1) or graph(*args)
    for block in model.blocks:
        block.compile(backend=backend)
    evaluate(model, ds, torch.device('cpu'), contextlib.nullcontext)
    for _ in range(3):
        calls.clear()
        model(*loader.next_batch())[1].backward()
        assert len(calls) == 4

def test_a_run_is_not_resumed_with_another_kind_of_optimizer(tiny_run):
    with pytest.raises(SystemExit):
        cli(['train', '--resume', tiny_run[0], '--ns_steps=0', '--max_iters=99'])

@pytest.mark.parametrize('bad', [True, False])
def test_a_step_that_overflows_is_skipped_by_all_optimizers(toy, tmp_path, monkeypatch, bad):
    """ fp16's scaler sees what its own optimizer sees; clipping would spread a NaN from one to the other """
    import torch
    steps = []
    class Scaler: # found an overflow in nothing that it looked at
        def scale(self, x): return x * (float('nan') if bad else 1)
        def unscale_(self, optimizer): pass
        def step(self, optimizer): steps.append(optimizer); optimizer.step()
        def update(self): pass
        def is_enabled(self): return True
        def state_dict(self): return {}
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *args, **kwargs: Scaler())
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=2', *TINY])
    assert len(steps) == (0 if bad else 4)
    assert all(torch.isfinite(x).all() for x in checkpoint.load(tmp_path / 'run')[0].values())
