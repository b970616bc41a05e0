"""
python -m pytest tests/test_reliability.py: training and solving under kills, full disks, damage and signals, on any
number of ranks. tests/README.md has the table.
"""
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import rewrite, write_toy
from safetensors.torch import save as dump_tensors

from nanoarc import checkpoint, grids, train
from nanoarc.cli import Unread, main as cli
from nanoarc.corpus import Corpus
from nanoarc.data import ArcLoader, DataConfig, split
from nanoarc.model import Dropout, Model, ModelConfig, Muon
from nanoarc.run import read_metrics
from nanoarc.solve import SolveConfig, solve
from nanoarc.sources import read_source, read_tasks
from nanoarc.submission import Keeper, read_attempts
from nanoarc.train import TrainConfig

pytestmark = pytest.mark.reliability

SETTINGS = dict(minutes=0, max_iters=24, save_every=4, eval_every=6, draw_every=0, log_every=3, grad_accum=2,
                ema=0.0, device='cpu', dtype='float32', compile='off')
MODEL = dict(n_layer=2, n_embd=32, head_size=16, dropout=0.0)
MODEL_FLAGS = [f"--{name}={x}" for name, x in MODEL.items()]

def run(out, src, resume=False, dropout=0.0, **kwargs):
    """ a small training, in this process: 24 steps of some milliseconds each, everything logged -> meta """
    settings = {**SETTINGS, 'resume' if resume else 'out_dir': str(out), **kwargs}
    data_cfg = DataConfig(data=src, batch_tokens=60, val_tasks=2)
    return train.train(TrainConfig(**settings), ModelConfig(**{**MODEL, 'dropout': dropout}), data_cfg)

def go_on(out, src, **kwargs):
    """ whatever there is of a run, to its end """
    return run(out, src, resume=bool(checkpoint.steps(out)), **kwargs)

def logged(out, *names):
    """ every value of metrics.jsonl under these names -> list of (step, name, value) """
    found = []
    for row in read_metrics(out):
        found += [(row['step'], name, row[name]) for name in names if name in row]
    return found

def digest(out):
    """ the last checkpoint's weights, optimizer and place, and every logged loss to the last bit """
    tensors, meta = checkpoint.load(out)
    h = hashlib.sha256(repr([meta['step'], meta['stream'], meta['tokens'], meta['val_loss']]).encode())
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].numpy().tobytes())
    return h.hexdigest(), [(step, name, x.hex()) for step, name, x in logged(out, 'loss', 'val_loss', 'lr')]

def fork(f, *args, **kwargs):
    """
    f in a child, warm: all is imported and compiled. it exits with 0, with SystemExit's code, or with 1 after an
    exception -> pid
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get('NANOARC_DEBUG'):
            os.dup2(null, 2)
        f(*args, **kwargs)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def join(pid, timeout=60):
    """ -> exit code of a child, or minus the signal that killed it """
    end = time.time() + timeout
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a child still ran after {timeout} s")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """ the run that nobody interrupted -> (directory, source, its digest) """
    path = tmp_path_factory.mktemp('whole')
    src = write_toy(path / 'src', n=4)
    run(path / 'warm', src, max_iters=2) # kernels are compiled here, children inherit them
    assert join(fork(run, path / 'run', src)) == 0
    return path / 'run', src, digest(path / 'run')

@pytest.fixture(scope='module')
def part(whole, tmp_path_factory):
    """ the same run killed after the save of step 16 -> (directory, seconds that the rest of it takes) """
    path, src, want = tmp_path_factory.mktemp('part'), *whole[1:]
    def killed():
        save = checkpoint.save
        def save_and_die(out_dir, step, *args):
            save(out_dir, step, *args)
            if step == 16:
                die()
        checkpoint.save = save_and_die
        run(path / 'run', src)
    assert join(fork(killed)) == -signal.SIGKILL
    (path / 'run' / 'lock').unlink()
    seconds = []
    for name in ('cold', 'warm'):
        shutil.copytree(path / 'run', path / name)
        t = time.time()
        assert join(fork(run, path / name, src, resume=True)) == 0
        seconds.append(time.time() - t)
        assert digest(path / name) == want
    return path / 'run', min(seconds)

# -----------------------------------------------------------------------------
# the disk: every filesystem call of a save can be watched

class File:
    """ what open returns to checkpoint.py from now on """

    def __init__(self, hook, path, mode, **kwargs):
        self.hook = hook
        hook('before', 'create', (path,))
        self.f = open(path, mode, **kwargs)
        hook('after', 'create', (path,))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.f.close()

    def __getattr__(self, name): # write, flush, fileno, and what the lock needs
        f = getattr(self.f, name)
        return wrapped(self.hook, name, f) if name in ('write', 'flush') else f

def wrapped(hook, name, f):
    """ f, with hook called before and after it """
    def call(*args, **kwargs):
        hook('before', name, args)
        result = f(*args, **kwargs)
        hook('after', name, args)
        return result
    return call

def during_save(mp, act, what='save', nth=0):
    """
    from now on act(k, moment, name, args) is called at the k-th moment of the first save, or of the nth call of another
    function of checkpoint.py: 'before' and 'after' each filesystem call that it makes -> list of all moments, to be
    filled
    """
    moments, is_saving, saves, save = [], [], itertools.count(), getattr(checkpoint, what)
    def hook(moment, name, args):
        if is_saving:
            moments.append((moment, name))
            act(len(moments), moment, name, args)
    def watched(*args):
        if next(saves) != nth:
            return save(*args)
        is_saving.append(True)
        try:
            return save(*args)
        finally:
            is_saving.clear()
    for name in ('replace', 'fsync', 'open', 'close', 'unlink', 'mkdir'):
        mp.setattr(os, name, wrapped(hook, name, getattr(os, name)))
    mp.setattr(checkpoint, 'open', lambda path, mode, **kwargs: File(hook, path, mode, **kwargs), raising=False)
    mp.setattr(checkpoint, what, watched)
    return moments

@pytest.fixture(scope='module')
def moments(whole, part, tmp_path_factory):
    """ those of a save that prunes, of step 20 """
    out = tmp_path_factory.mktemp('moments') / 'run'
    shutil.copytree(part[0], out)
    with pytest.MonkeyPatch.context() as mp:
        found = during_save(mp, lambda *_: None)
        run(out, whole[1], resume=True, max_iters=21)
    assert len(found) > 30
    assert {'create', 'write', 'flush', 'fsync', 'replace', 'unlink'} <= {name for _, name in found}
    return found

def no_temps(out):
    return not [path for path in Path(out).rglob('*') if path.name.endswith('.tmp')]

def files(out):
    """ all that is in a directory -> {name: bytes} """
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob('*')) if path.is_file()}

@pytest.mark.slow
def test_a_kill_before_and_after_each_filesystem_call_of_a_save_loses_nothing(whole, part, moments, tmp_path):
    _, src, want = whole
    def suicide(out, k):
        with pytest.MonkeyPatch.context() as mp:
            during_save(mp, lambda n, *_: die() if n == k else None)
            run(out, src, resume=True)
    for k in range(1, len(moments) + 1):
        out = tmp_path / f"{k}"
        shutil.copytree(part[0], out)
        assert join(fork(suicide, out, k)) == -signal.SIGKILL
        assert checkpoint.load(out)[1]['step'] in (16, 20) and len(checkpoint.steps(out)) >= 2
        assert join(fork(run, out, src, resume=True)) == 0
        assert digest(out) == want and no_temps(out), k
        assert sorted(files(out / 'ckpt')) == ['step-000020.safetensors', 'step-000020.sha256',
                                               'step-000024.safetensors', 'step-000024.sha256']

@pytest.mark.slow
def test_50_kills_at_any_moment_and_the_run_is_the_one_that_never_stopped(whole, part, tmp_path):
    _, src, want = whole
    rng, kills, n = random.Random(0), 0, 0
    while kills < 50:
        out, code = tmp_path / f"{n}", None
        while code != 0:
            pid = fork(go_on, out, src)
            if kills < 50:
                time.sleep(rng.random() * part[1]) # enough for a save or two
                os.kill(pid, signal.SIGKILL)
            code = join(pid)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
        assert digest(out) == want and no_temps(out)
        n += 1

def test_a_full_disk_costs_nothing_but_the_save(whole, part, moments, tmp_path, capsys):
    _, src, want = whole
    for k, (_, name) in enumerate(moments, 1):
        if name == 'mkdir': # the directory is there
            continue
        out, number = tmp_path / f"{k}", (errno.ENOSPC, errno.EIO, errno.EDQUOT)[k % 3]
        shutil.copytree(part[0], out)
        def fail(n, moment, name, args):
            if n == k:
                raise OSError(number, os.strerror(number))
        with pytest.MonkeyPatch.context() as mp:
            during_save(mp, fail)
            with pytest.raises(SystemExit) as e:
                cli(['train', '--resume', str(out)])
        assert e.value.code == 2 and os.strerror(number) in capsys.readouterr().err
        assert checkpoint.load(out)[1]['step'] in (16, 20) and no_temps(out)
        if k % 8 == 0:
            run(out, src, resume=True)
            assert digest(out) == want

def test_a_file_size_limit_is_a_full_disk(whole, tmp_path):
    run_dir = whole[0]
    size = max(path.stat().st_size for path in (run_dir / 'ckpt').iterdir())
    def limited(out, share):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        tensors, meta = checkpoint.load(out)
        model = Model(ModelConfig(**MODEL, n_task=4))
        checkpoint.restore_model(model, tensors)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * share // 16, size))
        checkpoint.save(out, 99, model, [], {**meta, 'pad': "x" * size})
    for share in range(16):
        out = tmp_path / f"{share}"
        shutil.copytree(run_dir, out)
        assert join(fork(limited, out, share)) == 1
        assert checkpoint.load(out)[1]['step'] == 24 and no_temps(out)

# -----------------------------------------------------------------------------
# a machine that loses power

class Disk:
    """ what a disk was told, and what may be on it after a crash: what was not synced may be there or not """

    def __init__(self, files):
        self.data = {} # of each file that is being written, its bytes
        self.synced = {} # of each such file, the bytes that are safe
        self.names = dict(files) # what is safe: {name: bytes}, or (name,) = a file that is being written
        self.waiting = [] # changes of names that are not safe yet

    def tell(self, op, *args):
        if op in ('link', 'rename', 'unlink'):
            self.waiting.append((op, *args))
        if op == 'link':
            self.data[args[0]] = b""
        elif op == 'write':
            self.data[args[0]] += args[1]
        elif op == 'fsync' and args[0] in self.data:
            self.synced[args[0]] = self.data[args[0]]
        elif op == 'fsync': # the directory
            for change in self.waiting:
                self.change(*change)
            self.waiting = []

    def change(self, op, name, to=None):
        if op == 'link':
            self.names[name] = (name,)
        elif op == 'unlink':
            self.names.pop(name, None)
        else: # if the old name was never safe, the file is there all the same
            self.names[to] = self.names.pop(name, (name,))

    def crash(self, root, rng):
        """ leave a directory as a crash may leave it, by rng """
        for change in self.waiting:
            if rng.random() < 0.5:
                self.change(*change)
        shutil.rmtree(root, ignore_errors=True)
        for name, content in self.names.items():
            if isinstance(content, tuple):
                content = self.left_of(*content, rng)
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def left_of(self, name, rng):
        """ of a file that was being written: all of it if it was synced, otherwise anything """
        if name in self.synced:
            return self.synced[name]
        data = self.data[name]
        cut = rng.randrange(len(data) + 1) // 512 * 512
        return rng.choice([b"", data, data[:cut], zeroed(data, rng), zeroed(data, rng)])

def zeroed(data, rng):
    """ some blocks were not written """
    data = bytearray(data)
    for k in range(0, len(data), 512):
        if rng.random() < 0.3:
            data[k : k + 512] = bytes(len(data[k : k + 512]))
    return bytes(data)

def operations_of_a_save(out, step):
    """ what a disk is told, in order. names are relative to out """
    ops, at = [], [] # at: what was opened
    def name(path):
        return str(Path(path).relative_to(out))
    def record(_, moment, call, args):
        if moment == 'after' and call == 'open':
            at.append('directory')
        elif moment == 'after' and call == 'fsync':
            ops.append(('fsync', at[-1]))
        elif moment == 'before' and call == 'create':
            ops.append(('link', name(args[0])))
            at.append(name(args[0]))
        elif moment == 'before' and call == 'write':
            ops.append(('write', at[-1], bytes(args[0])))
        elif moment == 'before' and call == 'replace':
            ops.append(('rename', name(args[0]), name(args[1])))
        elif moment == 'before' and call == 'unlink':
            ops.append(('unlink', name(args[0])))
    tensors, meta = checkpoint.load(out)
    model = Model(ModelConfig(**meta['model']))
    checkpoint.restore_model(model, tensors)
    with pytest.MonkeyPatch.context() as mp:
        during_save(mp, record)
        checkpoint.save(out, step, model, [], {**meta, 'step': step})
    return ops

def test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    run(out, whole[1], max_iters=9)
    before = files(out)
    ops = operations_of_a_save(out, 10)
    assert [op for op, *_ in ops][-2:] == ['unlink'] * 2
    rng, seen = random.Random(0), []
    for k in range(len(ops) + 1):
        for _ in range(50):
            disk = Disk(before)
            for op in ops[:k]:
                disk.tell(*op)
            disk.crash(tmp_path / 'crashed', rng)
            step = checkpoint.load(tmp_path / 'crashed')[1]['step']
            assert step in ((9, 10) if k < len(ops) - 2 else (10,)) # once it may prune, the new one is safe
            seen.append(step)
    assert len(seen) >= 600 and set(seen) == {9, 10}

# -----------------------------------------------------------------------------
# damage

def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

def damaged(good, rng):
    """ the bytes of a checkpoint -> damaged ones, one after another """
    for _ in range(2000):
        yield flipped(good, rng.randrange(8 * len(good)))
    for k in range(64):
        yield good[: len(good) * k // 64]
    header = 8 + struct.unpack('<Q', good[:8])[0]
    for k in range(0, header, 29):
        yield good[:k]
    for k in range(0, len(good) - 4095, 4096):
        yield good[:k] + bytes(4096) + good[k + 4096 :]
    a, b = good[8192:12288], good[16384:20480] # swapped
    yield good[:8192] + b + good[12288:16384] + a + good[20480:]
    yield good + b"\0"
    yield b""

def test_no_damaged_checkpoint_is_ever_loaded(tmp_path, capsys):
    out, n = tmp_path / 'run', 0
    for step in (20, 24):
        checkpoint.save(out, step, torch.nn.Linear(80, 80), [], {})
    path, sha_path = checkpoint.file(out, 24), checkpoint.file(out, 24, 'sha256')
    good, sha = path.read_bytes(), sha_path.read_bytes()
    def is_refused():
        step, text = checkpoint.load(out)[1]['step'], capsys.readouterr().out
        assert step == 20 and "step-000024.safetensors: damaged, its sha256 is" in text and "going back to" in text
    another = checkpoint.file(out, 20).read_bytes()
    for data in (*damaged(good, random.Random(0)), another):
        assert data != good
        path.write_bytes(data)
        is_refused()
        n += 1
    path.write_bytes(good)
    for bit in range(0, 8 * len(sha), 5):
        sha_path.write_bytes(flipped(sha, bit))
        is_refused()
        n += 1
    sha_path.write_bytes(sha)
    assert n > 2200 and checkpoint.load(out)[1]['step'] == 24
    checkpoint.file(out, 20).write_bytes(b"x")
    path.unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*missing.*damaged"):
        checkpoint.load(out)
    with pytest.raises(SystemExit) as e:
        cli(['train', '--resume', str(out)])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1

def test_training_goes_on_from_the_one_before_a_damaged_checkpoint_and_keeps_two_good_ones(whole, tmp_path, capsys):
    _, src, want = whole
    out = tmp_path / 'run'
    shutil.copytree(whole[0], out)
    path = checkpoint.file(out, 24)
    path.write_bytes(path.read_bytes()[:-1])
    run(out, src, resume=True, save_every=3) # 20 -> 21, 24: the damaged one is not counted among the good ones
    assert "going back to" in capsys.readouterr().out and checkpoint.steps(out) == [24, 21]
    assert digest(out) == want
    path.write_bytes(path.read_bytes()[:-1])
    run(out, src, resume=True, save_every=0, max_iters=23)
    assert checkpoint.steps(out) == [23, 21]

class Canary:
    """ who unpickles it makes a file """

    def __reduce__(self):
        return Path.touch, (Path(os.environ['CANARY']),)

def as_bytes(write):
    f = io.BytesIO()
    write(f)
    return f.getvalue()

def open_toxic_files(tmp_path, src):
    """ a pickle in each kind of file that is read here: all are refused, and nothing of them is run """
    out, packed, pickled = tmp_path / 'run', tmp_path / 'packed', pickle.dumps(Canary())
    array = np.array([Canary()], dtype=object)
    torch_file = as_bytes(lambda f: torch.save(Canary(), f))
    npy = as_bytes(lambda f: np.save(f, array, allow_pickle=True))
    npz = as_bytes(lambda f: np.savez(f, cells=array))
    read_source(src).save(packed)
    manifest = (packed / 'manifest.json').read_text()
    events = [] # from here on: numpy and torch pickled above, that was us
    def listen(event, _):
        if event in ('pickle.find_class', 'os.system', 'subprocess.Popen'):
            events.append(event)
    sys.addaudithook(listen)
    for data in (pickled, torch_file, npz, struct.pack('<Q', len(pickled)) + pickled):
        path = checkpoint.file(out, 1)
        checkpoint.write_file(path, data)
        checkpoint.write_file(path.with_suffix('.sha256'), checkpoint.signed(data, path)) # an attacker's hash is right
        with pytest.raises(Exception):
            checkpoint.load(out)
    for path in packed.glob('*.npy'):
        good, about = path.read_bytes(), json.loads(manifest)
        path.write_bytes(npy)
        assert path.stem in about['sha256']
        about['sha256'][path.stem] = hashlib.sha256(npy).hexdigest()
        (packed / 'manifest.json').write_text(json.dumps(about))
        with pytest.raises(ValueError, match="not an array"):
            Corpus.open(packed)
        path.write_bytes(good)
    for name in ('a.json', 'a.jsonl', 'a.parquet', 'a.zip', 'a.npy'):
        (tmp_path / name).write_bytes(pickled)
        with pytest.raises(Exception):
            read_source(str(tmp_path / name))
    (tmp_path / 'c.toml').write_bytes(pickled)
    with pytest.raises(SystemExit):
        cli(['train', f"--config={tmp_path / 'c.toml'}"])
    assert not events, events

def test_nothing_in_a_file_is_ever_run(whole, tmp_path, monkeypatch):
    canary = tmp_path / 'sang'
    monkeypatch.setenv('CANARY', str(canary))
    assert join(fork(open_toxic_files, tmp_path, whole[1])) == 0
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary())) # it can sing
    assert canary.exists()

def test_no_line_of_the_package_can_read_a_pickle():
    wanted = re.compile(r'\bpickle\b|allow_pickle\s*=\s*True|weights_only\s*=\s*False|yaml\.load|torch\.load'
                        r'|(?<![.\w])(eval|exec)\(')
    found = []
    for path in Path(train.__file__).parent.glob('*.py'):
        for line in path.read_text().splitlines():
            if wanted.search(re.sub(r"""'[^']*'|"[^"]*"|#.*""", '', line)):
                found.append(f"{path.name}: {line.strip()}")
    assert found == []

# -----------------------------------------------------------------------------
# signals

def wait_for(condition, process=None):
    """ until it holds. fails after a minute, or if the process that is to make it hold has ended """
    end = time.time() + 60
    while not condition():
        assert time.time() < end and (process is None or process.poll() is None)
        time.sleep(0.002)

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_at_any_moment_saves_and_the_run_goes_on_exactly(whole, part, tmp_path, number, code):
    _, src, want = whole
    rng = random.Random(0)
    for n in range(20 if number == signal.SIGTERM else 8):
        out = tmp_path / f"{n}"
        if n % 2: # at its beginning, or at its end
            shutil.copytree(part[0], out)
        pid = fork(go_on, out, src)
        wait_for((out / 'lock').exists) # its handlers are there before
        time.sleep(rng.random() * part[1] * 0.9)
        os.kill(pid, number)
        t = time.time()
        got = join(pid)
        rows, step = logged(out, 'loss'), checkpoint.steps(out)[0]
        assert time.time() - t < 5 and (got == code or step == 24) and no_temps(out)
        n = checkpoint.load(out)[1]['losses'][0] # steps since the last row
        assert step - max((x for x, *_ in rows), default=0) == n < 3 # the step that it was in, and no other
        assert join(fork(run, out, src, resume=True)) == 0
        assert digest(out) == want

# in the nth call of a function, and the step after which the run is saved then
@pytest.mark.parametrize('module, name, nth, saved', [
    (checkpoint, 'save', 2, 9), (train, 'evaluate', 2, 7), (train, 'Log', 1, 0)], ids=['save', 'evaluate', 'start'])
def test_a_signal_in_the_middle_of_something_waits_for_its_end(whole, tmp_path, monkeypatch, module, name, nth, saved):
    _, src, want = whole
    original, count = getattr(module, name), itertools.count(1)
    def interrupted(*args):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / 'run', src)
    assert e.value.code == 0 and checkpoint.steps(tmp_path / 'run')[0] == saved
    monkeypatch.undo()
    run(tmp_path / 'run', src, resume=True)
    assert digest(tmp_path / 'run') == want

def test_a_second_signal_does_not_wait(whole, tmp_path):
    _, src, want = whole
    out, asleep = tmp_path / 'run', tmp_path / 'asleep'
    def stuck():
        train.Signals.GRACE = 0.05
        evaluate, count = train.evaluate, itertools.count()
        def slow(*args):
            if next(count) == 1: # at step 6
                asleep.touch()
                time.sleep(60)
            return evaluate(*args)
        train.evaluate = slow
        run(out, src)
    pid = fork(stuck)
    wait_for(asleep.exists)
    before = files(out / 'ckpt')
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert join(pid, 2) == 130
    assert files(out / 'ckpt') == before
    run(out, src, resume=True)
    assert digest(out) == want

def test_the_echo_of_a_signal_is_none(whole, tmp_path):
    """ torchrun and the cluster may both tell a process, milliseconds apart """
    _, src, want = whole
    out = tmp_path / 'run'
    pid = fork(run, out, src)
    wait_for(lambda: len(checkpoint.steps(out)) == 2)
    for _ in range(3):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    assert join(pid) == 0
    run(out, src, resume=True)
    assert digest(out) == want

def test_nobody_who_reads_the_output_is_needed(whole, tmp_path):
    _, src, want = whole
    def unread():
        r, w = os.pipe()
        os.dup2(w, 1)
        os.close(r)
        os.close(w)
        sys.stdout = open(1, 'w', closefd=False)
        run(tmp_path / 'run', src)
    assert join(fork(unread)) == 0 and digest(tmp_path / 'run') == want

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_to_the_command_itself(whole, tmp_path, number, code):
    """ from cold, as a cluster does it """
    out = tmp_path / 'run'
    args = [f"--data={whole[1]}", f"--out_dir={out}", '--minutes=5', *MODEL_FLAGS, '--batch_tokens=60',
            '--save_every=9', '--log_every=1', '--val_tasks=2']
    process = subprocess.Popen([sys.executable, '-m', 'nanoarc', 'train', *args], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: checkpoint.steps(out), process)
    process.send_signal(number)
    text = process.communicate(timeout=10)[0]
    assert process.returncode == code
    assert f"stopped by signal {int(number)} after step {checkpoint.steps(out)[0]}" in text

# -----------------------------------------------------------------------------
# one run a directory, and only the run that it was

def test_two_runs_cannot_write_one_directory(whole, tmp_path, capsys):
    _, src, want = whole
    out, held = tmp_path / 'run', tmp_path / 'held'
    def hold():
        with checkpoint.lock(out):
            held.touch()
            time.sleep(60)
    pid = fork(hold)
    wait_for(held.exists)
    (out / 'ckpt').mkdir()
    (out / 'ckpt' / '.step-000001.safetensors.tmp').write_bytes(b"of a save that goes on")
    for _ in range(2):
        with pytest.raises(SystemExit) as e:
            cli(['train', f"--data={src}", f"--out_dir={out}", '--minutes=0', '--max_iters=1'])
        err = capsys.readouterr().err
        assert e.value.code == 2 and f"process {pid} " in err and err.count("\n") == 1
        assert not no_temps(out) # nobody tidied up behind its back
    os.kill(pid, signal.SIGKILL)
    join(pid)
    run(out, src) # the lock died with its holder
    assert digest(out) == want and no_temps(out)

def test_a_run_that_went_on_before_the_lock_was_ours_is_not_set_back(whole, part, tmp_path, monkeypatch):
    _, src, want = whole
    out, lock = tmp_path / 'run', checkpoint.lock
    shutil.copytree(part[0], out)
    def late(path): # the other process ends just before
        monkeypatch.undo()
        run(out, src, resume=True)
        return lock(path)
    monkeypatch.setattr(checkpoint, 'lock', late)
    assert run(out, src, resume=True, max_iters=20)['step'] == 24
    assert checkpoint.steps(out) == [24, 20] and digest(out) == want

def test_rows_that_a_crash_spoilt_do_not_stop_a_resume(whole, part, tmp_path):
    _, src, want = whole
    out = tmp_path / 'run'
    shutil.copytree(part[0], out)
    rows = (whole[0] / 'metrics.jsonl').read_bytes().splitlines(True)
    spoilt = rows[:-3] + [bytes(512) + b"\n", rows[-1][:9]] # all of it after step 16
    (out / 'metrics.jsonl').write_bytes(b"".join(spoilt))
    run(out, src, resume=True)
    assert digest(out) == want

# settings that a resumed run must keep, with other values
CHANGES = dict(seed=1, grad_accum=1, dtype='bfloat16', ns_steps=3, batch_tokens=61, block_size=512, batching='pack',
               shots=1, max_pair=99, colors='all', p_identity=0.3, val_tasks=1, deal=3, allow_leak=True,
               drop_overlap=True, loss_on='all', n_layer=1, n_embd=64, mixer='A', head_size=32, window=9,
               n_hidden=99, rope_bases=(9.0, 9.0, 9.0), loops=2, d_state=16, d_head=16, d_conv=3,
               expand=4, chunk_size=64, vocab_size=17)

def as_flags(name, x):
    if x is True:
        return [f"--{name}"]
    if isinstance(x, tuple):
        return [f"--{name}", *map(str, x)]
    return [f"--{name}={x}"]

def differing(run_dir, args, capsys):
    """ resume it -> the names that the refusal gives """
    with pytest.raises(SystemExit) as e:
        cli(['train', '--resume', str(run_dir), *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    return re.findall(r"(\w+) differs", err)

def test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name(whole, tmp_path, capsys):
    out, src = tmp_path / 'run', Path(whole[1])
    for name, x in CHANGES.items():
        assert differing(whole[0], as_flags(name, x), capsys) == [name]
    task = sorted(src.iterdir())[0]
    text = task.read_text()
    color = int(re.search(r'\d', text)[0])
    task.write_text(re.sub(r'\d', str((color + 1) % 10), text, count=1)) # one pixel
    assert differing(whole[0], [], capsys) == ['corpus_sha256']
    task.unlink() # one task less
    assert differing(whole[0], [], capsys) == ['corpus_sha256']
    task.write_text(text)
    shutil.copytree(whole[0], out)
    rewrite(out, lambda meta: meta['stream'].update(fancy=True)) # of a stream that we cannot make
    assert differing(out, ['--max_iters=25'], capsys) == ['fancy']
    rewrite(out, lambda meta: meta.update(format=9)) # of a later version
    assert differing(out, [], capsys) == ['format']

@pytest.mark.parametrize('save_every', [4, 0])
def test_an_update_that_is_not_finite_is_not_saved(whole, tmp_path, monkeypatch, save_every):
    """ its loss and gradient were: the last good checkpoint stays, and there is none with step 8 or later """
    _, src, want = whole
    out, step, calls = tmp_path / 'run', Muon.step, itertools.count(1)
    def bad_step(self):
        step(self)
        if next(calls) == 8:
            self.param_groups[0]['params'][0].data[0, 0] = float('inf')
    monkeypatch.setattr(Muon, 'step', bad_step)
    last = 24 if save_every else 8
    with pytest.raises(ValueError, match="step-000008.* not written, 1 of its tensors .* not finite, first model.bl"):
        run(out, src, max_iters=last, save_every=save_every)
    assert checkpoint.steps(out) == [4][: save_every]
    monkeypatch.undo()
    if save_every:
        run(out, src, resume=True)
        assert digest(out) == want

def poisoned(step, what='loss'):
    """ a Model.forward by which the loss of a step is no number, or its gradient """
    original, calls = Model.forward, itertools.count(1)
    def forward(self, *args, **kwargs):
        logits, loss = original(self, *args, **kwargs)
        if torch.is_grad_enabled() and next(calls) == 2 * step:
            if what == 'loss':
                return logits, loss * float('nan')
            x = self.head.weight[0, 0]
            loss = loss + (x - x.detach()).abs().sqrt() # 0, but its slope is infinite
        return logits, loss
    return forward

@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint(whole, tmp_path, monkeypatch,
                                                                                           what):
    _, src, want = whole
    out, seen, next_batch = tmp_path / 'run', [], ArcLoader.next_batch
    def recorded(self):
        seen.append(set(self.names(self.window, self.batch)))
        return next_batch(self)
    monkeypatch.setattr(Model, 'forward', poisoned(8, what)) # of which the checkpoint is due at once
    monkeypatch.setattr(ArcLoader, 'next_batch', recorded)
    error = "step 8: the loss or its gradient is not finite, in a batch of the tasks toy"
    with pytest.raises(ValueError, match=error) as e:
        run(out, src)
    assert re.findall(r"toy\d+", str(e.value)) == sorted(seen[14] | seen[15]) != sorted(set.union(*seen))
    assert seen[14] != seen[14] | seen[15] != seen[15] # those of both micro batches
    assert checkpoint.steps(out) == [4] and "\nended by ValueError: step 8: the loss" in (out / 'log.txt').read_text()
    monkeypatch.undo()
    run(out, src, resume=True)
    assert digest(out) == want

# -----------------------------------------------------------------------------
# ranks

def ranks(world, path, f, *args):
    """ f(rank, *args) in so many processes that talk by gloo -> their exit codes """
    path.mkdir(parents=True, exist_ok=True)
    meet = path / f"meet{time.time_ns()}"
    def child(rank):
        os.environ['RANK'] = str(rank) # as torchrun does
        dist.init_process_group('gloo', init_method=f"file://{meet}", rank=rank, world_size=world)
        f(rank, *args)
    pids = [fork(child, rank) for rank in range(world)]
    return [join(pid) for pid in pids]

def hash_row(batch, i):
    """ of row i of a Batch, all that a model is given of it """
    return hashlib.sha256(b"".join(x[i].numpy().tobytes() for x in batch if x is not None)).hexdigest()

def recorded_run(rank, out, src):
    """ go_on, and what each rank was given is written down: its place in the stream, and a hash of each row """
    given, next_batch = [], ArcLoader.next_batch
    def recorded(self):
        window, place = self.window, self.batch
        r0, r1, _ = self.rows(window).batches[place]
        a, b = split(r1 - r0, self.rank, self.world)
        batch = next_batch(self)
        given.append((window, place, self.rank, [hash_row(batch, i) for i in range(b - a)]))
        return batch
    ArcLoader.next_batch = recorded
    try:
        go_on(out, src)
    finally:
        (out / f"rows-{time.time_ns()}-{rank}.json").write_text(json.dumps(given))

def stopped_run(rank, out, src, to):
    """ recorded_run to a step, where one rank alone gets a SIGTERM: all stop there """
    original, start = Model.forward, max(checkpoint.steps(out), default=0)
    calls = itertools.count(1 + 2 * start)
    is_last = rank == dist.get_world_size() - 1
    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled() and next(calls) == 2 * to and to < 24 and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)
    Model.forward = forward
    recorded_run(rank, out, src)

def stream_of(out):
    """ all that all ranks of a run were given, in the order of the stream """
    given = []
    for path in out.glob('rows-*.json'):
        given += json.loads(path.read_text())
    hashes = []
    for *_, of_rows in sorted(given):
        hashes += of_rows
    return hashes

def largest_gap(out, other, name):
    """ between the values of two runs that logged the same steps """
    a, b = logged(out, name), logged(other, name)
    assert [step for step, *_ in a] == [step for step, *_ in b] and len(a) > 3
    return max(abs(x - y) / x for (*_, x), (*_, y) in zip(a, b))

def test_one_two_four_three_ranks_are_one_run(whole, tmp_path):
    src, alone, out = whole[1], tmp_path / 'alone', tmp_path / 'run'
    assert ranks(1, tmp_path, recorded_run, alone, src) == [0]
    for world, to in ((1, 6), (2, 12), (4, 18), (3, 24)): # the schedule is that of 24 steps
        assert ranks(world, tmp_path, stopped_run, out, src, to) == [0] * world
    assert len(stream_of(alone)) > 80 and stream_of(out) == stream_of(alone)
    assert largest_gap(alone, out, 'loss') < 1e-5 and largest_gap(alone, out, 'val_loss') < 1e-5
    assert checkpoint.load(alone)[1]['tokens'] == checkpoint.load(out)[1]['tokens']
    for world in (2, 3, 4): # and from the beginning
        out = tmp_path / f"{world}"
        assert ranks(world, tmp_path, recorded_run, out, src) == [0] * world
        assert stream_of(out) == stream_of(alone) and largest_gap(alone, out, 'loss') < 1e-5

def test_ranks_that_were_stopped_between_two_rows_end_as_those_that_were_not(whole, tmp_path):
    src, digests = whole[1], []
    for name, stops in (('whole', (24,)), ('stopped', (7, 17, 24))): # rows are due after 6, 9, 15, 18
        out = tmp_path / name
        for to in stops:
            assert ranks(2, tmp_path, stopped_run, out, src, to) == [0, 0]
        digests.append(digest(out))
    assert digests[0] == digests[1] # each loss to the last bit

@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_ranks_end_together_on_any_corpus(tmp_path, world, whole):
    srcs = [write_toy(tmp_path / f"src{n}", n=n) for n in (1, 2, 5, 97)]
    def all_of_them(rank):
        for n, src in enumerate(srcs):
            meta = run(tmp_path / f"run{n}", src, max_iters=3, eval_every=2)
            assert meta['step'] == 3
    assert ranks(world, tmp_path, all_of_them) == [0] * world
    assert all(checkpoint.load(tmp_path / f"run{n}")[1]['step'] == 3 for n in range(4))

def other_weights(out, src):
    """ a run at step 4, and a copy of it with another weight """
    run(out, src, max_iters=4)
    tensors, meta = checkpoint.load(out)
    tensors['model.head.weight'][0, 0] += 1
    data = dump_tensors(tensors, metadata={'nanoarc': json.dumps(meta)})
    shutil.copytree(out, f"{out}-other")
    path = checkpoint.file(f"{out}-other", 4)
    path.write_bytes(data)
    path.with_suffix('.sha256').write_bytes(checkpoint.signed(data, path))
    run(f"{out}-later", src, max_iters=6)

@pytest.mark.parametrize('what, want', [
    ('seed', ['seed']), ('lr', ['lr']), ('val_tasks', ['val_tasks']), ('corpus', ['corpus_sha256']),
    ('n_layer', ['n_layer']), ('number of tasks', ['n_task', 'corpus_sha256']), ('weights', ['checkpoint']),
    ('step', ['batch', 'checkpoint']), ('base run', ['checkpoint']), ('nothing', []), ('no corpus', None),
])
def test_ranks_of_two_runs_are_refused_on_all_ranks_by_what_differs(whole, tmp_path, what, want):
    src, said = whole[1], tmp_path / 'said'
    said.mkdir()
    other = {'corpus': write_toy(tmp_path / 'other', n=4, seed=1), 'number of tasks': write_toy(tmp_path / 'five', n=5),
             'no corpus': str(tmp_path / 'nothing')}
    if what in ('weights', 'step', 'base run'):
        other_weights(tmp_path / 'run', src)
    def one_differs(rank):
        cfg, model_cfg = dict(SETTINGS, max_iters=8, out_dir=str(tmp_path / 'out')), dict(MODEL)
        data_cfg = dict(data=src, batch_tokens=60, val_tasks=2)
        odd = rank == 2
        if what in ('seed', 'lr', 'val_tasks', 'n_layer') and odd:
            for values in (cfg, model_cfg, data_cfg):
                if what in values or (what in ('seed', 'lr') and values is cfg):
                    values[what] = 1
        if what in other and odd:
            data_cfg['data'] = other[what]
        if what in ('weights', 'step'):
            cfg['resume'] = f"{tmp_path / 'run'}" + ({'weights': '-other', 'step': '-later'}[what] if odd else "")
        if what == 'base run':
            cfg['init_from'] = f"{tmp_path / 'run'}" + ("-other" if odd else "")
        try:
            train.train(TrainConfig(**cfg), ModelConfig(**model_cfg), DataConfig(**data_cfg))
        except ValueError as e:
            (said / str(rank)).write_text(str(e))
            raise
    t = time.time()
    codes = ranks(3, tmp_path / 'meet', one_differs)
    assert codes == ([0] * 3 if want == [] else [1] * 3) and time.time() - t < 40
    texts = {path.read_text() for path in said.iterdir()}
    assert len(texts) == (0 if want == [] else 1) # all say the same
    if want:
        text, = texts
        assert text.startswith("the ranks are not of one run: ") and re.findall(r"(\w+) differs", text) == want
        assert text.count("rank 2 ") == len(want) and "\n" not in text.replace("\n)", ")")
    elif want is None:
        assert f"rank 2: {other[what]}" in texts.pop()
    assert checkpoint.steps(tmp_path / 'out') == ([] if want != [] else [8, 4])

@pytest.mark.parametrize('how', ['raises', 'is killed', 'has a loss that is not finite'])
def test_a_rank_that_dies_ends_all(whole, tmp_path, how):
    def one_dies(rank):
        original, calls = Model.forward, itertools.count()
        def forward(self, *args, **kwargs):
            if next(calls) == 20:
                if how == 'is killed':
                    die()
                raise RuntimeError("this rank ends here")
            return original(self, *args, **kwargs)
        if rank == 1:
            Model.forward = poisoned(9) if how == 'has a loss that is not finite' else forward
        run(tmp_path / 'run', whole[1])
    t = time.time()
    codes = ranks(3, tmp_path, one_dies)
    assert 0 not in codes and time.time() - t < 30
    assert checkpoint.load(tmp_path / 'run')[1]['step'] in (4, 8)

@pytest.mark.slow
def test_torchrun_ends_when_a_rank_dies_and_stops_when_told(whole, tmp_path):
    """ the real thing: a worker is killed, then it gets a SIGTERM, and both times the run can go on """
    out = tmp_path / 'run'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'nanoarc',
               'train']
    args = [f"--data={whole[1]}", f"--out_dir={out}", *MODEL_FLAGS, '--batch_tokens=60', '--val_tasks=2',
            '--save_every=5', '--log_every=1', '--minutes=0', '--max_iters=100000']
    process = subprocess.Popen([*command, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: checkpoint.steps(out), process)
    ps = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
    workers = [int(x) for x in ps.stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(timeout=30) != 0
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    step = checkpoint.steps(out)[0]
    process = subprocess.Popen([*command, '--resume', str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    wait_for(lambda: checkpoint.steps(out)[0] >= step + 10, process)
    process.terminate()
    text = process.communicate(timeout=30)[0]
    assert f"stopped by signal 15 after step {checkpoint.steps(out)[0]}" in text and no_temps(out)

def masked_run(rank, out, src, **kwargs):
    """ run, with dropout of whole channels -> its masks go to a file """
    masks = []
    def dropped(self, x):
        mask = F.dropout(torch.ones(x.size(-1)), 0.2, self.training)
        if torch.is_grad_enabled():
            masks.append(mask.numpy().tobytes().hex())
        return x * mask
    Dropout.forward = dropped
    run(out, src, dropout=0.2, **kwargs)
    (out / f"masks-{rank}-{time.time_ns()}.json").write_text(json.dumps(masks))

def masks_of(out, rank):
    """ all masks that a rank drew, in a run that may have been interrupted """
    masks = []
    for path in sorted(out.glob(f"masks-{rank}-*.json")):
        masks += json.loads(path.read_text())
    return masks

def test_dropout_draws_other_masks_on_each_rank_and_the_same_ones_in_a_resumed_run(whole, tmp_path):
    src, out, resumed = whole[1], tmp_path / 'run', tmp_path / 'resumed'
    def all_of_it(rank):
        masked_run(rank, out, src)
    def first_part(rank):
        masked_run(rank, resumed, src, max_iters=8)
    def second_part(rank):
        masked_run(rank, resumed, src, resume=True)
    for f in (all_of_it, first_part, second_part):
        assert ranks(2, tmp_path, f) == [0, 0]
    first, second = masks_of(out, 0), masks_of(out, 1)
    assert len(first) == len(second) == 24 * 2 * 5 # steps, micro batches, the embedding and two in each block
    assert len({*first, *second}) == len(first + second) # no mask twice
    assert (masks_of(resumed, 0), masks_of(resumed, 1)) == (first, second)

def test_solve_gives_the_same_submission_on_any_number_of_ranks(tiny_run, tmp_path):
    run_dir, src = tiny_run
    def solved(rank, out):
        solve(SolveConfig(run=run_dir, data=src, out_dir=str(out), views=8, decode_rows=5, together=1, ttt_steps=1,
                          device='cpu'))
    want = None
    for world in (1, 2, 3, 7):
        out = tmp_path / f"{world}"
        assert ranks(world, tmp_path, solved, out) == [0] * world
        found = [(out / name).read_bytes() for name in ('submission.json', 'candidates.jsonl')]
        want = want or found
        assert found == want and all(want)

# -----------------------------------------------------------------------------
# solving

def solve_toy(tiny_run, out):
    """ what is known is saved after each batch """
    Keeper.SHARE = 1e9
    grids.MAX_SIDE = 9 # in a child: a model that has learned nothing fills the largest grid that there is
    solve(SolveConfig(run=tiny_run[0], data=tiny_run[1], out_dir=str(out), views=6, p_min=0.1, together=2,
                      decode_rows=3, ttt_steps=1, device='cpu'))

def solved(out):
    return [(out / name).read_bytes() for name in ('submission.json', 'candidates.jsonl')]

@pytest.fixture(scope='module')
def whole_solve(tiny_run, tmp_path_factory):
    """ what nobody interrupted -> its files, seconds that it takes """
    path = tmp_path_factory.mktemp('solved')
    assert join(fork(solve_toy, tiny_run, path / 'cold')) == 0
    t = time.time()
    assert join(fork(solve_toy, tiny_run, path / 'warm')) == 0
    seconds = time.time() - t
    assert solved(path / 'cold') == solved(path / 'warm')
    return solved(path / 'warm'), seconds

def is_whole_or_absent(out, src):
    """ submission.json: two grids for each query of each task """
    path = out / 'submission.json'
    if not path.exists():
        return True
    submission = json.loads(path.read_text())
    said = [read_attempts(submission[task.name], len(task.queries), "")[1] for task in read_tasks(src)]
    return len(submission) == len(said) and not any(said)

def full_disk(tiny_run, out, nth, k):
    """ solve_toy, but that the k-th moment of the nth file that is written finds the disk full """
    def fail(n, *_):
        if n == k:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.MonkeyPatch.context() as mp:
        during_save(mp, fail, 'write_file', nth)
        solve_toy(tiny_run, out)

def test_20_solves_that_are_killed_stopped_or_out_of_disk_go_on_to_the_same_bytes(tiny_run, whole_solve, tmp_path):
    rng, n, moments = random.Random(0), 0, {'kill': 0, 'stop': 0, 'disk': 0}
    want, seconds = whole_solve
    while sum(moments.values()) < 20 or min(moments.values()) < 5:
        out, is_done = tmp_path / f"{n}", False
        n += 1
        while not is_done:
            how = rng.choice(sorted(moments))
            if how == 'disk':
                code = join(fork(full_disk, tiny_run, out, rng.randrange(12), rng.randrange(1, 13)))
            else:
                pid, number = fork(solve_toy, tiny_run, out), signal.SIGKILL if how == 'kill' else signal.SIGTERM
                wait_for((out / 'solving.lock').exists) # its handlers are there before
                time.sleep(rng.random() * seconds * 0.7)
                os.kill(pid, number)
                code = join(pid)
            assert code in {'kill': (0, -signal.SIGKILL), 'stop': (0,), 'disk': (0, 1)}[how]
            assert is_whole_or_absent(out, tiny_run[1])
            is_done = code == 0 and not (out / 'solving-0.json').exists()
            moments[how] += not is_done
        assert solved(out) == want and no_temps(out)

@pytest.mark.slow
def test_a_kill_around_each_filesystem_call_of_the_results_loses_nothing(tiny_run, whole_solve, tmp_path):
    def solve_without_results(out):
        write = checkpoint.write_file
        checkpoint.write_file = lambda path, data: die() if path.name == 'solve.json' else write(path, data)
        solve_toy(tiny_run, out)
    def solve_and_die(out, nth, k):
        with pytest.MonkeyPatch.context() as mp:
            during_save(mp, lambda n, *_: die() if n == k else None, 'write_file', nth)
            solve_toy(tiny_run, out)
    almost = tmp_path / 'almost'
    assert join(fork(solve_without_results, almost)) == -signal.SIGKILL
    for nth in (3, 4, 5): # after a try of the directory and two saves: solve.json, candidates.jsonl, submission.json
        codes = []
        while 0 not in codes and len(codes) < 50: # until it has no more moments
            out = tmp_path / f"{nth}-{len(codes)}"
            shutil.copytree(almost, out)
            codes.append(join(fork(solve_and_die, out, nth, len(codes) + 1)))
            assert is_whole_or_absent(out, tiny_run[1]) and (out / 'solving-0.json').exists() == (codes[-1] != 0)
            if codes[-1] != 0:
                assert join(fork(solve_toy, tiny_run, out)) == 0
            assert solved(out) == whole_solve[0] and no_temps(out)
        assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 12

@pytest.mark.parametrize('how', ['stop', 'kill'])
def test_ranks_that_are_stopped_go_on_as_any_number_of_ranks(tiny_run, whole_solve, tmp_path, how):
    out, (want, seconds) = tmp_path / 'out', whole_solve
    def some_ranks(rank, after, number):
        if after and (how == 'stop' or rank == 1):
            threading.Timer(after, os.kill, (os.getpid(), number)).start()
        solve_toy(tiny_run, out)
    number = signal.SIGTERM if how == 'stop' else signal.SIGKILL
    for world in (2, 3, 1):
        codes = ranks(world, tmp_path, some_ranks, 0.4 * seconds / world, number)
        assert is_whole_or_absent(out, tiny_run[1])
        assert how == 'kill' or codes == [0] * world
    while (out / 'solving-0.json').exists():
        assert ranks(2, tmp_path, some_ranks, 0, 0) == [0, 0]
    assert solved(out) == want and not list(out.glob('solving-*.json'))

@pytest.mark.parametrize('how', ['nobody reads', 'a full disk', 'closed'])
def test_solve_needs_nobody_who_reads_its_output(tiny_run, whole_solve, tmp_path, how):
    def unread():
        r, w = os.pipe()
        os.dup2(w if how == 'nobody reads' else os.open('/dev/full', os.O_WRONLY), 1)
        os.close(r)
        os.close(w)
        sys.stdout = Unread(None if how == 'closed' else open(1, 'w', closefd=False)) # as the command has it
        solve_toy(tiny_run, tmp_path / 'out')
        sys.stdout.flush()
    assert join(fork(unread)) == 0 and solved(tmp_path / 'out') == whole_solve[0]

def test_torchrun_stops_a_solve_when_told_and_one_rank_goes_on(tiny_run, tmp_path):
    """ the real thing, as the readme has it """
    cfg = SolveConfig(run=tiny_run[0], data=tiny_run[1], views=60, together=1, device='cpu')
    out, alone = tmp_path / 'out', tmp_path / 'alone'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', '--',
               'nanoarc', 'solve', '--run', cfg.run, '--data', cfg.data, '--views=60', '--together=1', '--device=cpu']
    process = subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((out / 'solving-1.json').exists, process)
    process.terminate()
    process.wait(timeout=60)
    assert (out / 'solving-0.json').exists() and is_whole_or_absent(out, cfg.data)
    for path in (out, alone):
        assert join(fork(solve, replace(cfg, out_dir=str(path)))) == 0
    assert solved(out) == solved(alone) and not (out / 'solving-0.json').exists()
