""" python -m pytest tests/test_train.py """
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from nanoarc import checkpoint, train
from nanoarc.cli import main as cli
from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
from nanoarc.model import Model, ModelConfig
from nanoarc.train import TrainConfig, get_lr
from nanoarc.view import read_metrics, run_frame

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
    monkeypatch.setattr('torch.nn.utils.clip_grad_norm_', lambda params, _: seen.append([p.grad.clone() for p in params]) or torch.zeros(()))
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

@pytest.mark.parametrize('flag', ['--minutes=9', '--out_dir=x'])
def test_what_does_not_go_with_resume_says_why(tiny_run, capsys, flag):
    with pytest.raises(SystemExit):
        cli(['train', '--resume', tiny_run[0], flag])
    assert "does not go with --resume: it" in capsys.readouterr().err

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

# -----------------------------------------------------------------------------
# averaged weights, weights of another run, watching

def test_averaged_weights_are_the_average_and_what_solve_and_validation_use(toy, tmp_path):
    from nanoarc.solve import load_model
    args = ['train', f"--data={toy(n=4)}", '--max_iters=12', '--save_every=1', '--log_every=1', '--eval_every=0', *TINY]
    cli([*args, f"--out_dir={tmp_path / 'plain'}"])
    cli([*args, f"--out_dir={tmp_path / 'ema'}", '--ema=0.5'])
    (tensors, meta), plain = checkpoint.load(tmp_path / 'ema'), checkpoint.load(tmp_path / 'plain')
    assert all(torch.equal(tensors[name], x) for name, x in plain[0].items()) and losses(tmp_path / 'ema')[:-1] == losses(tmp_path / 'plain')[:-1] # it only watches
    assert meta['val_loss'] != plain[1]['val_loss']
    (tmp_path / 'ema' / 'ckpt' / 'step-000012.sha256').unlink()
    before = checkpoint.load(tmp_path / 'ema')[0]
    for name, x in before.items():
        if name.startswith('ema.'): # decay min(0.5, 12/21)
            assert torch.allclose(tensors[name], 0.5 * x + 0.5 * tensors[f"model.{name[4:]}"], atol=1e-6)
    cli(['train', '--resume', str(tmp_path / 'ema')])
    again = checkpoint.load(tmp_path / 'ema')
    assert all(torch.equal(again[0][name], x) for name, x in tensors.items()) and again[1]['val_loss'] == meta['val_loss']
    assert all(torch.equal(x, tensors[f"ema.{name}"]) for name, x in load_model(tmp_path / 'ema', 'cpu')[0].state_dict().items())
    cli(['train', '--resume', str(tmp_path / 'plain'), '--ema=0.9', '--max_iters=13']) # switched on later: it begins with the weights

def test_init_from_takes_the_weights_alone_and_knows_tasks_by_their_content(tiny_run, toy, tmp_path, capsys):
    run, src = tiny_run # 4 tasks
    more = toy(name='more', n=3, seed=9) # and 3 new ones
    args = ['train', '--data=', f"--out_dir={tmp_path / 'run'}", f"--init_from={run}", '--minutes=0', '--max_iters=1', '--lr=1e-12', '--adam_lr=1e-12', '--weight_decay=0', '--device=cpu', '--compile=off']
    cli([*args, f"--adapt={more}+{src}"])
    assert "weights of" in (text := capsys.readouterr().out) and "4 of 7 tasks known to it" in text
    (old, old_meta), (new, meta) = checkpoint.load(run), checkpoint.load(tmp_path / 'run')
    assert meta['step'] == 1 and meta['model']['n_task'] == 7
    for name, x in old.items():
        if name.startswith('model.') and name != 'model.wtask.weight':
            assert torch.allclose(new[name], x, atol=1e-6), name
    rows = {key: n for key, n in meta['rows'].items() if key in old_meta['rows']}
    assert len(rows) == 4
    for key, n in rows.items():
        assert torch.allclose(new['model.wtask.weight'][n], old['model.wtask.weight'][old_meta['rows'][key]], atol=1e-6)
    fresh = [n for n in range(7) if n not in rows.values()]
    assert new['model.wtask.weight'][fresh].std() > 0.5 * old['model.wtask.weight'].std() / 100 and not (new['model.wtask.weight'][fresh] == 0).any()
    with pytest.raises(SystemExit):
        cli([*args[:2], f"--out_dir={tmp_path / 'other'}", *args[3:], f"--adapt={src}", '--n_embd=64'])
    assert "do not fit this model" in capsys.readouterr().err

def test_what_an_earlier_run_was_trained_on_is_not_forgotten(toy, tmp_path, capsys):
    src, other = toy(n=2, side=12), toy(name='other', n=2, side=12, seed=5)
    cli(['train', f"--data={src}", f"--out_dir={tmp_path / 'first'}", '--max_iters=1', '--val_tasks=0', *TINY])
    cli(['train', f"--data={other}", f"--adapt={src}", f"--init_from={tmp_path / 'first'}", f"--out_dir={tmp_path / 'second'}", '--max_iters=1', '--val_tasks=0', *TINY])
    cli(['train', '--resume', str(tmp_path / 'second'), '--max_iters=2'])
    with pytest.raises(SystemExit):
        cli(['solve', '--run', str(tmp_path / 'second'), '--data', src])
    assert "was trained on 2 of these queries" in capsys.readouterr().err

def test_a_log_begins_with_all_that_made_the_run(toy, tmp_path):
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=2', *TINY])
    text = (tmp_path / 'run' / 'log.txt').read_text()
    about, end = json.JSONDecoder().raw_decode(text)
    settings = {name for cls in (TrainConfig, ModelConfig, DataConfig) for name in cls.__dataclass_fields__}
    assert about['settings'].keys() == settings and about['torch'] == torch.__version__ and about['cores'] >= 1 and {'git', 'cpu', 'device', 'command', 'python'} <= about.keys()
    assert Path(train.__file__).read_text() in text[end:] and text.splitlines()[-1].startswith("2 steps, ")
    assert "saving " in text.splitlines()[-1] and "waiting for data " in text.splitlines()[-1]

TRACKER = '''
import json, os
def write(*x):
    with open(os.environ['TRACKED'], 'a') as f:
        f.write(json.dumps(x) + "\\n")
def init(**kwargs): write('init', kwargs)
def log(values, step): write('log', values, step)
def finish(): write('finish')
'''

@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_tracker_gets_what_metrics_jsonl_gets(toy, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv('TRACKED', str(tmp_path / 'tracked'))
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=4', '--eval_every=2', '--log_every=1', f"--log={name}", *TINY])
    monkeypatch.delitem(sys.modules, name)
    calls = [json.loads(line) for line in (tmp_path / 'tracked').read_text().splitlines()]
    assert calls[0][0] == 'init' and calls[0][1]['project'] == 'nanoarc' and calls[0][1]['config']['max_iters'] == 4 and calls[-1] == ['finish']
    assert [{'step': step, **values} for kind, values, step in calls[1:-1]] == read_metrics(tmp_path / 'run')

def test_wandb_itself_takes_it_offline(toy, tmp_path):
    """ in a process of its own: it leaves services behind """
    pytest.importorskip('wandb')
    import os
    args = [f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=3', '--log_every=1', '--log=wandb', *TINY]
    result = subprocess.run([sys.executable, '-m', 'nanoarc.train', *args], env={**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))) == 1

def test_the_progress_line_is_readable_at_80_columns(toy, tmp_path):
    pyte = pytest.importorskip('pyte')
    import os
    import pty
    import struct
    import fcntl
    import termios
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    args = [f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=40', '--log_every=5', '--eval_every=10', '--draw_every=0', *TINY]
    process = subprocess.Popen([sys.executable, '-m', 'nanoarc.train', *args], stdout=child, stderr=child, env={**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '80'})
    os.close(child)
    screen, shown = pyte.Screen(80, 24), set()
    stream = pyte.ByteStream(screen)
    while True:
        try:
            data = os.read(main, 65536)
        except OSError: # the other end is closed
            break
        stream.feed(data)
        shown.update(line.rstrip() for line in screen.display)
    assert process.wait() == 0
    lines = [line for line in shown if re.match(r"\d+/40 loss \d\.\d{3} val \d\.\d{3} lr \de-\d\d [\d,]+ tok/s wait \d+\.\d% .*\d:\d\d:\d\d$", line)]
    assert lines and not any(re.match(r"\s*tok/s", line) for line in shown), shown # whole, on one line

def test_two_runs_are_overlaid(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run[0], tmp_path / 'other')
    cli(['view', tiny_run[0], str(tmp_path / 'other'), f"--out={tmp_path / 'x.png'}"])
    assert (tmp_path / 'x.png').stat().st_size > 10000 and "at step" in capsys.readouterr().out
    frame = run_frame([tiny_run[0], str(tmp_path / 'other')])
    rows = read_metrics(tiny_run[0])
    assert frame['step'].to_list() == [30, 30] and frame['loss'][0] == [x['loss'] for x in rows if 'loss' in x][-1]

def test_a_picture_of_validation_queries_is_drawn_on_the_way(toy, tmp_path, monkeypatch):
    from nanoarc import solve, view
    drawn = []
    monkeypatch.setattr(view, 'draw_tasks', lambda tasks, out: drawn.append(tasks))
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=5', '--draw_every=2', '--val_tasks=2', *TINY])
    assert len(drawn) == 3 and [len(tasks) for tasks in drawn] == [2, 2, 2] # after steps 2 and 4, and at the end
    for task, attempts in drawn[-1]:
        assert len(task.queries) == 1 and len(attempts) == 1
    model, data_cfg, *_ = solve.load_model(tmp_path / 'run', 'cpu')
    from nanoarc.data import ArcDataset
    ds = ArcDataset(data_cfg)
    monkeypatch.setattr(solve, 'decode', lambda model, idx, pos, task, d, most: [(0, [3, 4, 10, 5, 6, 10, 7], 0.0, True)]) # cut in its third row
    solve.draw_val(model, ds, "")
    assert [attempts[0]['attempt_1'].tolist() for _, attempts in drawn[-1]] == [[[3, 4], [5, 6]]] * 2

@pytest.mark.parametrize('mixer', ['MA', 'S'])
def test_batches_are_filled_up_for_a_compiler(toy, mixer):
    """ with empty rows, in small documents, which change nothing """
    ds = ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=512, batch_tokens=2048))
    model, batch = Model(ModelConfig(mixer=mixer, depth=2, n_task=4)), ArcLoader(ds).next_batch()
    batch = Batch(*(x[:3].clone() for x in batch))
    full = train.fill_rows(batch, 5)
    assert all(len(x) == 5 and torch.equal(x[:3], y) for x, y in zip(full, batch)) and (full.targets[3:] == -100).all() and full.doc[3:].unique().tolist() == [-4, -3, -2, -1]
    assert torch.allclose(model(*full)[1], model(*batch)[1], rtol=1e-6) and train.fill_rows(batch, 3) is batch and train.fill_rows(batch, 0) is batch
    text = Batch(batch.idx, batch.targets, None, None, None, None)
    assert [x if x is None else len(x) for x in train.fill_rows(text, 4)] == [4, 4, None, None, None, None]
