""" python -m pytest tests/test_run.py: what surrounds the loop """
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import TINY, rewrite

from nanoarc import checkpoint, run, train, view
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig
from nanoarc.model import Model, ModelConfig
from nanoarc.run import Log, Pace, Watch, get_device, load_run, read_metrics, saved_configs
from nanoarc.train import TrainConfig

# -----------------------------------------------------------------------------
# device and signals

@pytest.mark.parametrize('has', [True, False])
def test_a_cpu_trains_in_bf16_if_its_products_are_faster_then(has, monkeypatch):
    monkeypatch.setattr('nanoarc.run.has_bf16', lambda device: has)
    device, dtype, autocast = get_device('cpu', 'auto', trains=True)
    assert (device.type, dtype) == ('cpu', 'bfloat16' if has else 'float32')
    with autocast():
        assert torch.is_autocast_enabled('cpu') == has
    assert get_device('cpu', 'float32', trains=True)[1] == get_device('cpu', 'auto')[1] == 'float32'

def test_the_device_that_is_asked_for_is_here_or_the_error_says_what_is():
    with pytest.raises(ValueError, match="device='gpu': not here, want one of .*cpu"):
        get_device('gpu', 'auto')
    with pytest.raises(ValueError, match="dtype='half': want float32"):
        get_device('cpu', 'half')

def test_a_process_ends_when_its_stdin_does():
    code = "import sys, time; from nanoarc.run import end_with_stdin; end_with_stdin(); print(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, '-uc', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert process.poll() is None
    process.stdin.close() # as when the process that holds the other end is killed
    assert process.wait(30) == -signal.SIGTERM

@pytest.mark.parametrize('env, is_first', [
    (dict(RANK='1'), True), (dict(RANK='x'), True), (dict(RANK='1', WORLD_SIZE='1'), True), (dict(), True),
    (dict(WORLD_SIZE='2'), True), (dict(RANK='0', WORLD_SIZE='2'), True), (dict(RANK='1', WORLD_SIZE='2'), False),
])
def test_a_rank_alone_in_the_environment_is_no_rank_of_ours(env, is_first, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, x in env.items():
        monkeypatch.setenv(name, x)
    assert run.is_first_rank() == is_first
    if len(env) < 2 or env['WORLD_SIZE'] == '1':
        assert run.get_ranks(torch.device('cpu')) == (0, 1)

@pytest.mark.parametrize('theirs, want', [
    ({}, "GOMP_SPINCOUNT=3000"),
    ({'OMP_WAIT_POLICY': 'ACTIVE'}, "OMP_WAIT_POLICY=ACTIVE"), # who has set something keeps it
    ({'GOMP_SPINCOUNT': '7'}, "GOMP_SPINCOUNT=7"),
])
@pytest.mark.slow
def test_idle_threads_sleep_soon_and_a_run_says_so(toy, tmp_path, theirs, want):
    clean = {name: x for name, x in os.environ.items() if not name.startswith(('OMP_', 'GOMP_', 'KMP_'))}
    command = [sys.executable, '-m', 'nanoarc', 'train', '--data', toy(n=4), '--out_dir', str(tmp_path), *TINY,
               '--max_iters=1']
    out = subprocess.run(command, env={**clean, 'OMP_NUM_THREADS': '2', **theirs}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert f"on cpu, 2 threads {want}\n" in out.stdout
    about = json.loads((tmp_path / 'log.txt').read_text().split("\n# ===")[0])
    assert about['threads'] == f"2 threads {want}"

def test_a_run_that_has_become_slow_says_so_once():
    pace = Pace()
    said = [pace.warning(tok_s) for tok_s in (100, 9000, 12000, 3000, 11000, 3900, 3500, 3000, 12000, 1000, 1000)]
    assert said[6].startswith("warning: 3,500 tokens/s, it was 12,000: is something else at work here?")
    assert [text for i, text in enumerate(said) if i != 6] == [""] * 10

@pytest.mark.parametrize('kind', ['cpu', 'cuda'])
def test_what_is_not_finite_is_found_before_it_is_saved(kind):
    """ on a gpu the last step is not waited for, but where something is saved """
    watch = Watch(torch.device(kind))
    watch.add(1, 'a', torch.tensor(1.0))
    watch.add(2, 'b', torch.tensor(float('nan')))
    assert watch.found() == (kind == 'cpu')
    watch.add(3, 'c', torch.tensor(float('inf')))
    assert watch.found() and watch.bad == (2, 'b')
    late = Watch(torch.device(kind))
    late.add(1, 'a', torch.tensor(float('inf')))
    assert late.found(lag=0)

# -----------------------------------------------------------------------------
# the log

def test_a_log_begins_with_all_that_made_the_run(toy, tmp_path):
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=2', '--draw_every=0', *TINY])
    text = (tmp_path / 'run' / 'log.txt').read_text()
    about, end = json.JSONDecoder().raw_decode(text)
    settings = {name for cls in (TrainConfig, ModelConfig, DataConfig) for name in cls.__dataclass_fields__}
    assert about['settings'].keys() == settings
    assert about['torch'] == torch.__version__ and about['cores'] >= 1
    assert {'git', 'cpu', 'device', 'command', 'python'} <= about.keys()
    for path in Path(run.__file__).parent.glob('*.py'):
        assert path.read_text() in text[end:]
    last = text.splitlines()[-1]
    assert last.startswith("2 steps, ") and "saving " in last and "waiting for data " in last

def test_a_resumed_log_writes_again_what_came_after_the_checkpoint(tmp_path):
    def log(step):
        return Log(tmp_path, step, 'x', (TrainConfig(), ModelConfig(), DataConfig()), torch.device('cpu'), 1)
    first = log(0)
    for step in (1, 2, 3):
        first.row(step, 3, val_loss=0.5, done=None)
        first.row(step + 1, 3, loss=float(step))
    log(2) # a checkpoint is saved after a row of loss and before one of val_loss
    assert read_metrics(tmp_path) == [{'step': 1, 'val_loss': 0.5}, {'step': 2, 'loss': 1.0}]

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
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=4', '--eval_every=2',
         '--log_every=1', '--draw_every=0', f"--log={name}", *TINY])
    monkeypatch.delitem(sys.modules, name)
    first, *calls, last = [json.loads(line) for line in (tmp_path / 'tracked').read_text().splitlines()]
    assert first[0] == 'init' and last == ['finish']
    assert first[1]['project'] == 'nanoarc' and first[1]['config']['max_iters'] == 4
    assert [{'step': step, **values} for _, values, step in calls] == read_metrics(tmp_path / 'run')

@pytest.mark.parametrize('broken', ['import', 'init', 'log', 'finish'])
def test_a_tracker_that_fails_ends_no_run_and_is_said_once(toy, tmp_path, monkeypatch, capsys, broken):
    code = TRACKER.replace(f"def {broken}(", "def unused(") + f"def {broken}_(*a, **k): raise OSError('no\\nnet')\n"
    code = code.replace(f"def {broken}_(", f"def {broken}(") if broken != 'import' else "raise ImportError('no net')"
    (tmp_path / 'trackio.py').write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'trackio', raising=False)
    monkeypatch.setenv('TRACKED', str(tmp_path / 'tracked'))
    out = tmp_path / 'run'
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=4', '--log_every=1', '--log=trackio', *TINY])
    monkeypatch.delitem(sys.modules, 'trackio', raising=False)
    assert checkpoint.load(out)[1]['step'] == 4 and len(read_metrics(out)) >= 4
    for text in (capsys.readouterr().out, (out / 'log.txt').read_text()):
        assert len(re.findall(r"^warning: trackio: \w+Error: no net. training goes on$", text, re.M)) == 1

@pytest.mark.parametrize('name', ['log.txt', 'metrics.jsonl'])
def test_a_log_that_cannot_be_written_ends_no_run_and_is_said_once(toy, tmp_path, monkeypatch, capsys, name):
    append = Log.append
    def full(self, file, text):
        if file == name:
            raise OSError(28, "No space left on device")
        append(self, file, text)
    monkeypatch.setattr(Log, 'append', full)
    out = tmp_path / 'run'
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=4', '--log_every=1', *TINY])
    assert checkpoint.load(out)[1]['step'] == 4
    assert capsys.readouterr().out.count(f"warning: {name}: OSError: [Errno 28] No space left on device") == 1

def test_a_log_that_becomes_a_directory_ends_no_run_nor_its_resume(toy, tmp_path, capsys):
    out = tmp_path / 'run'
    args = ['--max_iters=4', '--save_every=1', '--log_every=1', *TINY]
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", *args])
    (out / 'metrics.jsonl').unlink()
    (out / 'metrics.jsonl').mkdir()
    for step in (6, 8): # the rows cannot be read, not written and not synced
        capsys.readouterr()
        cli(['train', '--resume', str(out), f"--max_iters={step}", '--draw_every=0'])
        assert checkpoint.load(out)[1]['step'] == step
        assert capsys.readouterr().out.count("warning: metrics.jsonl: IsADirectoryError: ") == 1
    about, _ = json.JSONDecoder().raw_decode((out / 'log.txt').read_text()) # a warning is not before it
    assert about['settings']['max_iters'] == 4

@pytest.mark.parametrize('error', [ValueError("no such font"), MemoryError(), OSError(13, "Permission denied")])
def test_a_picture_that_fails_ends_no_run_and_is_said_once(toy, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(train, 'draw_loss', fail)
    out = tmp_path / 'run'
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=6', '--log_every=1', *TINY, '--draw_every=2'])
    assert checkpoint.load(out)[1]['step'] == 6
    assert capsys.readouterr().out.count("warning: loss.png and val.png: ") == 1

def test_a_picture_that_fails_leaves_the_model_in_training(toy, tmp_path, monkeypatch):
    modes, out = [], tmp_path / 'run'
    def fail(*_, **__):
        raise ValueError("no picture")
    monkeypatch.setattr(view, 'decode', fail)
    forward = Model.forward
    def watched(self, *args, **kwargs):
        if torch.is_grad_enabled():
            modes.append(self.training)
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Model, 'forward', watched)
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=6', '--val_tasks=2', *TINY, '--draw_every=2'])
    assert modes == [True] * 6 and (out / 'loss.png').exists() and not (out / 'val.png').exists()

def test_rows_of_nonsense_are_no_rows(tmp_path):
    rows = ['{"step": 1, "loss": 2.5}', "[" * 100_000, '{"step": 2, "loss": "x"}', '{"step": true}', '{"step": 3.5}',
            '{"step": 4, "a": ' + "[" * 100_000, '{"step": 5, "loss": null}', "[1]", '{"step": 6, "val_loss": NaN}']
    (tmp_path / 'metrics.jsonl').write_text("\n".join(rows))
    assert [row['step'] for row in read_metrics(tmp_path)] == [1, 6]

@pytest.mark.slow
def test_wandb_itself_takes_it_offline(toy, tmp_path):
    """ in a process of its own: it leaves services behind """
    pytest.importorskip('wandb')
    args = [f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=3', '--log_every=1', '--log=wandb',
            '--draw_every=0', *TINY]
    env = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    result = subprocess.run([sys.executable, '-m', 'nanoarc', 'train', *args], env=env, capture_output=True,
                            text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))) == 1

def test_the_progress_line_is_readable_at_80_columns(toy, tmp_path):
    pyte = pytest.importorskip('pyte')
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    args = [f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=40', '--log_every=5', '--eval_every=10',
            '--draw_every=0', *TINY]
    env = {**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '80'}
    process = subprocess.Popen([sys.executable, '-m', 'nanoarc', 'train', *args], stdout=child, stderr=child, env=env)
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
    whole = r"\d+/40 loss \d\.\d{3} val \d\.\d{3} lr \de-\d\d [\d,]+ tok/s wait \d+\.\d% .*\d:\d\d:\d\d$" # on one line
    assert any(re.match(whole, line) for line in shown), shown
    assert not any(re.match(r"\s*tok/s", line) for line in shown), shown

# -----------------------------------------------------------------------------
# the configs of a run

def test_a_setting_that_is_newer_than_a_run_has_its_default_and_the_run_goes_on(tiny_run, tmp_path):
    old, same = tmp_path / 'old', tmp_path / 'same'
    shutil.copytree(tiny_run[0], old)
    shutil.copytree(tiny_run[0], same)
    def forget(meta):
        del meta['data']['p_identity'], meta['stream']['p_identity'], meta['model']['loops'], meta['train']['ns_steps']
    rewrite(old, forget)
    for out in (old, same):
        cli(['train', '--resume', str(out), '--max_iters=32'])
    (tensors, meta), (want, want_meta) = checkpoint.load(old), checkpoint.load(same)
    assert tensors.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in tensors.items())
    assert meta['stream'] == want_meta['stream'] and meta['model'] == want_meta['model']

def test_a_toml_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / 'x.toml').write_bytes(b"\xef\xbb\xbflr = 0.5")
    assert run.read_toml(tmp_path / 'x.toml') == {'lr': 0.5}

@pytest.mark.parametrize('part', ['train', 'model', 'data'])
def test_a_saved_setting_that_nobody_knows_is_named(tiny_run, tmp_path, part, capsys):
    out = tmp_path / 'run'
    shutil.copytree(tiny_run[0], out)
    rewrite(out, lambda meta: meta[part].update(prefix=True))
    with pytest.raises(SystemExit) as e:
        cli(['train', '--resume', str(out), '--max_iters=32'])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "this version does not know: prefix" in error

@pytest.mark.parametrize('change, want', [
    (lambda meta: meta['model'].update(n_layer='x'), "saved with n_layer = 'x', want one like 0"),
    (lambda meta: meta['model'].update(rope_bases=['a']), "saved with rope_bases = ['a']"),
    (lambda meta: meta['train'].update(lr=None), "saved with lr = None"),
    (lambda meta: meta.update(step='30'), "a checkpoint with step = 30, want a int"),
    (lambda meta: meta.update(tokens=[1]), "saved with tokens = [1]"),
    (lambda meta: meta.update(model=5), "a checkpoint with model = 5, want a dict"),
    (lambda meta: meta.pop('stream'), "a checkpoint with stream = None, want a dict"),
    (lambda meta: meta['train'].update(lr=float('nan')), "lr=nan: want 0 to"),
])
def test_a_saved_setting_of_another_type_is_named(tiny_run, tmp_path, change, want, capsys):
    out = tmp_path / 'run'
    shutil.copytree(tiny_run[0], out)
    rewrite(out, change)
    with pytest.raises(SystemExit) as e:
        cli(['train', '--resume', str(out), '--max_iters=32'])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and want in error

def test_a_run_is_loaded_as_it_was_saved(tiny_run):
    model, data_cfg, meta = load_run(tiny_run[0], 'cpu')
    tensors, _ = checkpoint.load(tiny_run[0])
    assert not model.training and data_cfg.adapt == tiny_run[1] and meta['step'] == 30
    assert (model.cfg.resolved(), data_cfg) == (saved_configs(meta)[0].resolved(), saved_configs(meta)[1])
    for name, x in model.state_dict().items():
        assert torch.equal(x, tensors[f"model.{name}"])

def test_a_run_is_not_resumed_with_another_kind_of_optimizer(tiny_run, capsys):
    with pytest.raises(SystemExit):
        cli(['train', '--resume', tiny_run[0], '--ns_steps=0', '--max_iters=99'])
    assert "ns_steps differs (saved 5, now 0)" in capsys.readouterr().err

def test_init_from_takes_the_weights_alone_and_knows_tasks_by_their_content(tiny_run, toy, tmp_path, capsys):
    old_run, src = tiny_run # 4 tasks
    more = toy(name='more', n=3, seed=9) # and 3 new ones
    args = ['train', '--data=', f"--init_from={old_run}", '--minutes=0', '--max_iters=1', '--lr=1e-12',
            '--adam_lr=1e-12', '--weight_decay=0', '--device=cpu', '--compile=off']
    cli([*args, f"--adapt={more}+{src}", f"--out_dir={tmp_path / 'run'}"])
    text = capsys.readouterr().out
    assert "weights of" in text and "4 of 7 tasks known to it" in text
    (old, old_meta), (new, meta) = checkpoint.load(old_run), checkpoint.load(tmp_path / 'run')
    assert meta['step'] == 1 and meta['model']['n_task'] == 7
    for name, x in old.items():
        if name.startswith('model.') and name != 'model.wtask.weight':
            assert torch.allclose(new[name], x, atol=1e-6), name
    old_weight, weight = old['model.wtask.weight'], new['model.wtask.weight']
    known = [key for key in meta['rows'] if key in old_meta['rows']]
    assert len(known) == 4
    for key in known:
        assert torch.allclose(weight[meta['rows'][key]], old_weight[old_meta['rows'][key]], atol=1e-6)
    fresh = weight[[row for key, row in meta['rows'].items() if key not in known]]
    assert fresh.std() > 0.5 * old_weight.std() / 100 and not (fresh == 0).any()
    with pytest.raises(SystemExit):
        cli([*args, f"--adapt={src}", f"--out_dir={tmp_path / 'other'}", '--n_embd=64'])
    assert "do not fit this model" in capsys.readouterr().err
