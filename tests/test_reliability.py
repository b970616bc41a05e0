""" python -m pytest tests/test_reliability.py: training under kills, full disks, damage and signals, on any number of ranks. tests/README.md has the table """
import errno
import hashlib
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
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import toy_tasks

from nanoarc import checkpoint, train
from nanoarc.cli import main as cli
from nanoarc.data import ArcLoader, DataConfig
from nanoarc.model import Model, ModelConfig
from nanoarc.train import TrainConfig
from nanoarc.view import read_metrics

pytestmark = pytest.mark.reliability

def write_toy(path, **kwargs):
    path.mkdir(parents=True)
    for name, task in toy_tasks(**kwargs).items():
        (path / f"{name}.json").write_text(json.dumps(task))
    return str(path)

def run(out, src, resume=False, **kwargs):
    """ a small training, in this process: 24 steps of some milliseconds each, everything logged -> meta """
    settings = dict(minutes=0, max_iters=24, save_every=4, eval_every=6, draw_every=0, log_every=1, grad_accum=2, device='cpu', compile='off') | kwargs
    settings |= dict(resume=str(out)) if resume else dict(out_dir=str(out))
    return train.main(TrainConfig(**settings), ModelConfig(n_layer=2, n_embd=32, head_size=16), DataConfig(data=src, batch_tokens=60, val_tasks=2))

def go_on(out, src, **kwargs):
    """ whatever there is of a run, to its end """
    return run(out, src, resume=bool(checkpoint.steps(out)), **kwargs)

def digest(out):
    """ the last checkpoint's weights, optimizer and place, and every logged loss to the last bit """
    tensors, meta = checkpoint.load(out)
    h = hashlib.sha256(repr([meta['step'], meta['stream'], meta['tokens'], meta['val_loss']]).encode())
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].numpy().tobytes())
    return h.hexdigest(), [(x['step'], key, float(x[key]).hex()) for x in read_metrics(out) for key in ('loss', 'val_loss', 'lr') if key in x]

def fork(f, *args, **kwargs):
    """ f in a child, warm: everything is imported and compiled. it exits with 0, SystemExit's code, or 1 after an exception -> pid """
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
        import traceback
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

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """ the run that nobody interrupted -> (directory, source, its digest, seconds that it took) """
    path = tmp_path_factory.mktemp('whole')
    src = write_toy(path / 'src', n=4)
    run(path / 'warm', src, max_iters=2) # kernels are compiled here, children inherit them
    seconds = []
    for name in ('cold', 'run'):
        t = time.time()
        assert join(fork(run, path / name, src)) == 0
        seconds.append(time.time() - t)
    return path / 'run', src, digest(path / 'run'), min(seconds)

# -----------------------------------------------------------------------------
# the disk: every filesystem call of a save can be watched

def watch(mp, hook):
    """ from now on hook(moment, name, args) is called 'before' and 'after' each filesystem call that checkpoint.py makes """
    def wrap(name, f):
        def wrapped(*args, **kwargs):
            hook('before', name, args)
            result = f(*args, **kwargs)
            hook('after', name, args)
            return result
        return wrapped

    class File:
        def __init__(self, path, mode):
            hook('before', 'create', (path,))
            self.path, self.f = str(path), open(path, mode)
            hook('after', 'create', (path,))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def __getattr__(self, name): # write, flush, fileno, and what the lock needs
            f = getattr(self.f, name)
            return wrap(name, lambda *args: f(*args)) if name in ('write', 'flush') else f

    for name in ('replace', 'fsync', 'open', 'close', 'unlink', 'mkdir'):
        mp.setattr(os, name, wrap(name, getattr(os, name)))
    mp.setattr(checkpoint, 'open', File, raising=False)

def during_save(mp, number, act):
    """ act(k, moment, name, args) at the k-th moment of the number-th save -> list of all moments, to be filled """
    moments, state, save = [], {'saves': 0, 'on': False}, checkpoint.save

    def hook(moment, name, args):
        if state['on']:
            moments.append((moment, name))
            act(len(moments), moment, name, args)

    def counted(*args, **kwargs):
        state['saves'] += 1
        state['on'] = state['saves'] == number
        try:
            return save(*args, **kwargs)
        finally:
            state['on'] = False
    watch(mp, hook)
    mp.setattr(checkpoint, 'save', counted)
    return moments

def moments_of_a_save(tmp_path, src):
    """ those of the third, the first that prunes """
    with pytest.MonkeyPatch.context() as mp:
        moments = during_save(mp, 3, lambda *_: None)
        run(tmp_path / 'counted', src, max_iters=13)
    assert len(moments) > 30 and {'create', 'write', 'flush', 'fsync', 'replace', 'unlink'} <= {name for _, name in moments}
    return moments

def no_temps(out):
    return not [path for path in Path(out).rglob('*') if path.name.endswith('.tmp')]

def test_a_kill_before_and_after_each_filesystem_call_of_a_save_loses_nothing(whole, tmp_path):
    _, src, want, _ = whole
    def suicide(out, k):
        with pytest.MonkeyPatch.context() as mp:
            during_save(mp, 3, lambda n, *_: os.kill(os.getpid(), signal.SIGKILL) if n == k else None)
            run(out, src)
    for k in range(1, len(moments_of_a_save(tmp_path, src)) + 1):
        out = tmp_path / f"{k}"
        assert join(fork(suicide, out, k)) == -signal.SIGKILL
        assert checkpoint.load(out)[1]['step'] in (8, 12) and len(checkpoint.steps(out)) >= 2
        assert join(fork(run, out, src, resume=True)) == 0
        assert digest(out) == want and no_temps(out), k
        assert {path.name for path in (out / 'ckpt').iterdir()} == {f"step-{step:06d}.{kind}" for step in (20, 24) for kind in ('safetensors', 'sha256')}

def test_50_kills_at_any_moment_and_the_run_is_the_one_that_never_stopped(whole, tmp_path):
    _, src, want, seconds = whole
    rng, kills, n = random.Random(0), 0, 0
    while kills < 50:
        out, code = tmp_path / f"{n}", None
        while code != 0:
            pid = fork(go_on, out, src)
            time.sleep(rng.random() * seconds)
            if kills < 50:
                os.kill(pid, signal.SIGKILL)
            code = join(pid)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
        assert digest(out) == want and no_temps(out)
        n += 1

def test_a_full_disk_costs_nothing_but_the_save(whole, tmp_path, capsys):
    _, src, want, _ = whole
    args = ['train', f"--data={src}", '--minutes=0', '--max_iters=24', '--save_every=4', '--eval_every=6', '--draw_every=0', '--log_every=1', '--grad_accum=2', '--device=cpu',
            '--compile=off', '--n_layer=2', '--n_embd=32', '--head_size=16', '--batch_tokens=60', '--val_tasks=2']
    for k, (_, name) in enumerate(moments_of_a_save(tmp_path, src), 1):
        if name == 'mkdir': # the directory is there
            continue
        out, number = tmp_path / f"{k}", (errno.ENOSPC, errno.EIO, errno.EDQUOT)[k % 3]
        def fail(n, moment, name, call):
            if n == k:
                raise OSError(number, os.strerror(number))
        with pytest.MonkeyPatch.context() as mp:
            during_save(mp, 3, fail)
            with pytest.raises(SystemExit) as e:
                cli([*args, f"--out_dir={out}"])
        assert e.value.code == 2 and os.strerror(number) in capsys.readouterr().err
        assert checkpoint.load(out)[1]['step'] in (8, 12) and no_temps(out)
        if k % 8 == 0:
            run(out, src, resume=True)
            assert digest(out) == want

def test_a_file_size_limit_is_a_full_disk(whole, tmp_path):
    run_dir, src, *_ = whole
    size = max(path.stat().st_size for path in (run_dir / 'ckpt').iterdir())
    def limited(out, share):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model, tensors = Model(ModelConfig(n_layer=2, n_embd=32, head_size=16, n_task=4)), checkpoint.load(out)
        checkpoint.restore_model(model, tensors[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * share // 16, size))
        checkpoint.save(out, 99, model, [], tensors[1] | {'pad': "x" * size})
    for share in range(0, 16):
        out = tmp_path / f"{share}"
        shutil.copytree(run_dir, out)
        assert join(fork(limited, out, share)) == 1
        assert checkpoint.load(out)[1]['step'] == 24 and no_temps(out)

def replay(root, files, ops, rng):
    """
    a directory as a crash may leave it. files: {name: bytes} that were safe before; ops: what was done since, in order.
    what was not synced may be there, be cut short, hold blocks of zeros, or be missing; a new name, a rename or a removal whose
    directory was not synced may not have happened. every choice by rng.
    """
    data, synced, names, waiting = {}, {}, dict(files), [] # open file -> bytes; what of it is safe; name -> bytes or open file; names' changes that are not
    for op, *args in ops:
        if op == 'create':
            data[args[0]] = b""
            waiting.append(('link', args[0]))
        elif op == 'write':
            data[args[0]] += args[1]
        elif op == 'fsync' and args[0] in data:
            synced[args[0]] = data[args[0]]
        elif op == 'replace':
            waiting.append(('rename', *args))
        elif op == 'unlink':
            waiting.append(('unlink', *args))
        elif op == 'fsync': # the directory
            for change in waiting:
                apply(names, change)
            waiting = []
    for change in waiting:
        if rng.random() < 0.5:
            apply(names, change)
    shutil.rmtree(root, ignore_errors=True)
    for name, content in names.items():
        if not isinstance(content, bytes): # a file of this save
            whole, safe = data[content[0]], synced.get(content[0])
            content = safe if safe is not None else rng.choice([b"", whole, whole[: rng.randrange(len(whole) + 1) // 512 * 512],
                                                                zeroed(whole, rng), zeroed(whole, rng)])
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

def apply(names, change):
    kind, name, *to = change
    if kind == 'link':
        names[name] = (name,)
    elif kind == 'unlink':
        names.pop(name, None)
    elif name in names:
        names[to[0]] = names.pop(name)
    else: # the name was never safe, the rename is: the file is there all the same
        names[to[0]] = (name,)

def zeroed(x, rng):
    x = bytearray(x)
    for k in range(0, len(x), 512):
        if rng.random() < 0.3:
            x[k : k + 512] = bytes(len(x[k : k + 512]))
    return bytes(x)

def test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(whole, tmp_path, capsys):
    _, src, *_ = whole
    out, ops = tmp_path / 'run', []
    run(out, src, max_iters=9)
    before = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()}
    name = lambda path: str(Path(path).relative_to(out))
    last = []
    def record(_, moment, call, args):
        if moment == 'after' and call == 'open':
            last.append('directory')
        if moment == 'before' and call in ('create', 'unlink'):
            ops.append((call, name(args[0])))
            last.append(name(args[0]))
        elif moment == 'before' and call == 'write':
            ops.append((call, last[-1], bytes(args[0])))
        elif moment == 'after' and call == 'fsync':
            ops.append((call, last[-1]))
        elif moment == 'before' and call == 'replace':
            ops.append((call, name(args[0]), name(args[1])))
    with pytest.MonkeyPatch.context() as mp:
        during_save(mp, 1, record)
        tensors, meta = checkpoint.load(out)
        model = Model(ModelConfig(**meta['model']))
        checkpoint.restore_model(model, tensors)
        checkpoint.save(out, 10, model, [], meta | {'step': 10})
    rng, seen = random.Random(0), []
    for k in range(len(ops) + 1):
        for _ in range(50):
            replay(tmp_path / 'crashed', before, ops[:k], rng)
            step = checkpoint.load(tmp_path / 'crashed')[1]['step']
            assert step in ((9, 10) if k < len(ops) - 2 else (10,)) # once it may prune, the new one is safe
            seen.append(step)
    assert len(seen) >= 600 and set(seen) == {9, 10} and [op for op, *_ in ops][-2:] == ['unlink'] * 2

def test_no_damaged_checkpoint_is_ever_loaded(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(whole[0], out)
    path, rng, n = checkpoint.file(out, 24), random.Random(0), 0
    good, sha = path.read_bytes(), checkpoint.file(out, 24, 'sha256').read_bytes()
    header = 8 + struct.unpack('<Q', good[:8])[0]

    def refused(data, where=path, original=good):
        nonlocal n
        where.write_bytes(data)
        capsys.readouterr()
        step, text = checkpoint.load(out)[1]['step'], capsys.readouterr().out
        assert step == 20 and 'step-000024.safetensors: ' in text and 'going back to' in text and ('sha256 is' in text or 'missing' in text)
        where.write_bytes(original)
        n += 1

    def flipped(data, bit):
        return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
    for _ in range(2000):
        refused(flipped(good, rng.randrange(8 * len(good))))
    for bit in range(0, 8 * len(sha), 5):
        refused(flipped(sha, bit), checkpoint.file(out, 24, 'sha256'), sha)
    for k in range(64):
        refused(good[: len(good) * k // 64])
    for k in range(0, header, 97):
        refused(good[:k])
    for k in range(0, len(good) - 4095, 4096):
        if good[k : k + 4096] != bytes(4096):
            refused(good[:k] + bytes(4096) + good[k + 4096 :])
    a, b = good[8192:12288], good[16384:20480]
    assert a != b
    refused(good[:8192] + b + good[12288:16384] + a + good[20480:])
    refused(good + b"\0")
    refused(checkpoint.file(out, 20).read_bytes()) # another file
    refused(b"")
    assert n > 2200 and checkpoint.load(out)[1]['step'] == 24
    checkpoint.file(out, 20).write_bytes(b"x")
    path.unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*missing.*damaged"):
        checkpoint.load(out)
    cli_code = subprocess.run([sys.executable, '-m', 'nanoarc.cli', 'train', '--resume', str(out)], capture_output=True, text=True)
    assert cli_code.returncode == 2 and cli_code.stderr.count("\n") == 1

def test_training_goes_on_from_the_one_before_a_damaged_checkpoint_and_keeps_two_good_ones(whole, tmp_path, capsys):
    _, src, want, _ = whole
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
    def __reduce__(self):
        return (Path.touch, (Path(os.environ['CANARY']),))

def test_nothing_in_a_file_is_ever_run(whole, tmp_path):
    os.environ['CANARY'] = str(tmp_path / 'sang')
    out, toxic = tmp_path / 'run', pickle.dumps(Canary())
    def bait(path, data, sign=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if sign: # as an attacker would: the hash is right
            path.with_suffix('.sha256').write_bytes(checkpoint.signed(data, path))
    def attempts():
        watched = []
        sys.addaudithook(lambda event, _: watched.append(event) if event in ('pickle.find_class', 'os.system', 'subprocess.Popen') else None)
        import io
        torch_file, npy, npz = io.BytesIO(), io.BytesIO(), io.BytesIO()
        torch.save(Canary(), torch_file)
        np.save(npy, np.array([Canary()], dtype=object), allow_pickle=True)
        np.savez(npz, cells=np.array([Canary()], dtype=object))
        watched.clear() # numpy and torch pickled them, that was us
        from nanoarc.sources import Corpus, read_source
        for data in (toxic, torch_file.getvalue(), npz.getvalue(), struct.pack('<Q', len(toxic)) + toxic):
            bait(checkpoint.file(out, 1), data, sign=True)
            with pytest.raises(Exception):
                checkpoint.load(out)
        packed = tmp_path / 'packed'
        read_source(whole[1]).save(packed)
        for path in packed.glob('*.npy'):
            old = path.read_bytes()
            bait(path, npy.getvalue())
            manifest = json.loads((packed / 'manifest.json').read_text()) if (packed / 'manifest.json').exists() else {}
            if path.name in manifest.get('sha256', {}) or path.stem in manifest.get('sha256', {}):
                key = path.name if path.name in manifest['sha256'] else path.stem
                manifest['sha256'][key] = hashlib.sha256(npy.getvalue()).hexdigest()
                (packed / 'manifest.json').write_text(json.dumps(manifest))
            with pytest.raises(Exception):
                Corpus.open(packed)
            path.write_bytes(old)
        for name in ('a.json', 'a.jsonl', 'a.parquet', 'a.zip', 'a.npy'):
            bait(tmp_path / 'src' / name, toxic)
            with pytest.raises(Exception):
                read_source(str(tmp_path / 'src' / name))
        bait(tmp_path / 'c.toml', toxic)
        with pytest.raises(SystemExit):
            cli(['train', f"--config={tmp_path / 'c.toml'}"])
        assert not watched, watched
    assert join(fork(attempts)) == 0
    assert not (tmp_path / 'sang').exists()
    pickle.loads(toxic) # the canary can sing
    assert (tmp_path / 'sang').exists()

def test_no_line_of_the_package_can_read_a_pickle():
    wanted = re.compile(r'\bpickle\b|allow_pickle\s*=\s*True|weights_only\s*=\s*False|yaml\.load|torch\.load|(?<![.\w])(eval|exec)\(')
    found = [f"{path.name}: {line.strip()}" for path in Path(train.__file__).parent.glob('*.py') for line in path.read_text().splitlines()
             if wanted.search(re.sub(r'"[^"]*"|#.*', '', line))]
    assert found == []

# -----------------------------------------------------------------------------
# signals

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_at_any_moment_saves_and_the_run_goes_on_exactly(whole, tmp_path, number, code):
    _, src, want, seconds = whole
    rng = random.Random(0)
    for n in range(20 if number == signal.SIGTERM else 8):
        out = tmp_path / f"{n}"
        pid = fork(run, out, src)
        while not (out / 'lock').exists(): # its handlers are there before
            time.sleep(0.001)
        time.sleep(rng.random() * seconds * 0.9)
        os.kill(pid, number)
        t = time.time()
        got = join(pid)
        rows, (step, *_) = read_metrics(out), checkpoint.steps(out)
        assert time.time() - t < 5 and (got == code or step == 24) and no_temps(out)
        assert step == max((x['step'] for x in rows if 'loss' in x), default=0) # the step it was in, and no other
        assert join(fork(run, out, src, resume=True)) == 0
        assert digest(out) == want

@pytest.mark.parametrize('moment', ['save', 'evaluate', 'first step'])
def test_a_signal_in_the_middle_of_something_waits_for_its_end(whole, tmp_path, monkeypatch, moment):
    _, src, want, _ = whole
    module, name = {'save': (checkpoint, 'save'), 'evaluate': (train, 'evaluate'), 'first step': (train.view, 'Log')}[moment]
    original, count = getattr(module, name), itertools.count(1)
    def interrupted(*args, **kwargs):
        if next(count) == (1 if moment == 'first step' else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)
    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / 'run', src)
    assert e.value.code == 0 and checkpoint.steps(tmp_path / 'run')[0] == {'save': 9, 'evaluate': 7, 'first step': 0}[moment]
    monkeypatch.undo()
    run(tmp_path / 'run', src, resume=True)
    assert digest(tmp_path / 'run') == want

def test_a_second_signal_does_not_wait(whole, tmp_path):
    _, src, want, _ = whole
    out = tmp_path / 'run'
    def stuck():
        train.Signals.GRACE = 0.05
        evaluate, n = train.evaluate, itertools.count()
        train.evaluate = lambda *args: (next(n) == 1 and time.sleep(60), evaluate(*args))[1]
        run(out, src)
    pid = fork(stuck)
    while not checkpoint.steps(out):
        time.sleep(0.01)
    time.sleep(0.3) # it sleeps in the validation at step 6
    before = [(path.name, path.read_bytes()) for path in sorted((out / 'ckpt').iterdir())]
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert join(pid, 2) == 130
    assert before == [(path.name, path.read_bytes()) for path in sorted((out / 'ckpt').iterdir())]
    run(out, src, resume=True)
    assert digest(out) == want

def test_the_echo_of_a_signal_is_none(whole, tmp_path):
    """ torchrun and the cluster may both tell a process, milliseconds apart """
    _, src, want, _ = whole
    out = tmp_path / 'run'
    pid = fork(run, out, src)
    while len(checkpoint.steps(out)) < 2:
        time.sleep(0.001)
    for _ in range(3):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    assert join(pid) == 0
    run(out, src, resume=True)
    assert digest(out) == want

def test_nobody_who_reads_the_output_is_needed(whole, tmp_path):
    _, src, want, _ = whole
    def unread():
        r, w = os.pipe()
        os.dup2(w, 1)
        os.close(r), os.close(w)
        sys.stdout = open(1, 'w', closefd=False)
        run(tmp_path / 'run', src)
    assert join(fork(unread)) == 0 and digest(tmp_path / 'run') == want

def test_a_signal_to_the_command_itself(whole, tmp_path):
    """ from cold, as a cluster does it """
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        out = tmp_path / f"{number}"
        args = [f"--data={whole[1]}", f"--out_dir={out}", '--minutes=5', '--n_layer=2', '--n_embd=32', '--head_size=16', '--batch_tokens=60', '--save_every=9', '--log_every=1', '--val_tasks=2']
        process = subprocess.Popen([sys.executable, '-m', 'nanoarc.train', *args], stdout=subprocess.PIPE, text=True)
        while not checkpoint.steps(out):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        text = process.communicate(timeout=10)[0]
        assert process.returncode == code and f"stopped by signal {int(number)} after step {checkpoint.steps(out)[0]}" in text

# -----------------------------------------------------------------------------
# one run a directory, and only the run that it was

def test_two_runs_cannot_write_one_directory(whole, tmp_path, capsys):
    _, src, want, _ = whole
    out = tmp_path / 'run'
    def hold():
        with checkpoint.lock(out):
            (tmp_path / 'held').touch()
            time.sleep(60)
    pid = fork(hold)
    while not (tmp_path / 'held').exists():
        time.sleep(0.01)
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

def test_a_run_that_went_on_before_the_lock_was_ours_is_not_set_back(whole, tmp_path, monkeypatch):
    _, src, want, _ = whole
    out, lock = tmp_path / 'run', checkpoint.lock
    run(out, src, max_iters=8)
    def late(path): # the other process ends just before
        monkeypatch.undo()
        run(out, src, resume=True, max_iters=24)
        return lock(path)
    monkeypatch.setattr(checkpoint, 'lock', late)
    with pytest.raises(ValueError, match="another process has gone on with this run meanwhile"):
        run(out, src, resume=True, max_iters=16)
    assert checkpoint.steps(out) == [24, 20]

def test_rows_that_a_crash_spoilt_do_not_stop_a_resume(whole, tmp_path):
    _, src, want, _ = whole
    out = tmp_path / 'run'
    run(out, src, save_every=8, max_iters=24)
    for kind in ('sha256', 'safetensors'):
        checkpoint.file(out, 24, kind).unlink()
    rows = (out / 'metrics.jsonl').read_bytes().splitlines(True)
    (out / 'metrics.jsonl').write_bytes(b"".join(rows[:-3]) + bytes(512) + b"\n" + rows[-1][:9]) # all of it after the checkpoint at 16
    run(out, src, resume=True)
    assert digest(out) == want

def test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name(whole, tmp_path, capsys):
    run_dir, src, *_ = whole
    changes = dict(seed=1, grad_accum=1, dtype='bfloat16', ns_steps=3, batch_tokens=61, block_size=512, batching='pack', shots=1, max_pair=99, colors='all', p_identity=0.3,
                   val_tasks=1, deal=3, allow_leak=True, drop_overlap=True, n_layer=1, n_embd=64, mixer='A', head_size=32, n_kv_head=1, qk_norm=True, window=9,
                   n_hidden=99, prefix=False, rope_bases=(9.0, 9.0, 9.0), loops=2, d_state=32, d_head=32, d_conv=3, expand=4, chunk_size=64, vocab_size=17)
    for name, x in changes.items():
        settings = ['--no_' + name] if x is False else [f"--{name}"] if x is True else [f"--{name}", *map(str, x)] if isinstance(x, tuple) else [f"--{name}={x}"]
        with pytest.raises(SystemExit) as e:
            cli(['train', '--resume', str(run_dir), *settings])
        err = capsys.readouterr().err
        assert e.value.code == 2 and re.findall(r"(\w+) differs", err) == [name], (name, err)
    task = sorted(Path(src).iterdir())[0]
    text = task.read_text()
    color = int(re.search(r'\d', text)[0])
    for now in (re.sub(r'\d', str((color + 1) % 10), text, count=1), None): # one pixel, or one task less
        task.write_text(now) if now else task.unlink()
        with pytest.raises(SystemExit):
            cli(['train', '--resume', str(run_dir)])
        assert re.findall(r"(\w+) differs", capsys.readouterr().err) == ['corpus_sha256']
        task.write_text(text)
    out = tmp_path / 'run'
    shutil.copytree(run_dir, out)
    for step in checkpoint.steps(out): # of a later version
        data = checkpoint.file(out, step).read_bytes()
        data = data.replace(b'\\"format\\": 1', b'\\"format\\": 9')
        checkpoint.file(out, step).write_bytes(data)
        checkpoint.file(out, step, 'sha256').write_bytes(checkpoint.signed(data, checkpoint.file(out, step)))
    with pytest.raises(SystemExit):
        cli(['train', '--resume', str(out)])
    assert re.findall(r"(\w+) differs", capsys.readouterr().err) == ['format']

def poisoned(step, what='loss'):
    """ the loss of that step is no number, or its gradient """
    original, calls = Model.forward, itertools.count(1)
    def forward(self, *args, **kwargs):
        logits, loss = original(self, *args, **kwargs)
        if torch.is_grad_enabled() and next(calls) == 2 * step:
            loss = loss * float('nan') if what == 'loss' else loss + (self.head.weight[0, 0] - self.head.weight[0, 0].detach()).abs().sqrt() # 0, its slope is not
        return logits, loss
    return forward

@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint(whole, tmp_path, monkeypatch, what):
    _, src, want, _ = whole
    out, seen = tmp_path / 'run', []
    monkeypatch.setattr(Model, 'forward', poisoned(8, what)) # of which the checkpoint is due at once
    original = ArcLoader.next_batch
    def recorded(self):
        seen.append(self.names(self.window, self.batch))
        return original(self)
    monkeypatch.setattr(ArcLoader, 'next_batch', recorded)
    with pytest.raises(ValueError, match="step 8: the loss or its gradient is not finite, in a batch of the tasks toy") as e:
        run(out, src)
    assert re.findall(r"toy\d+", str(e.value)) == sorted({*seen[14], *seen[15]}) != sorted({name for names in seen for name in names})
    assert checkpoint.steps(out) == [4]
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
        dist.init_process_group('gloo', init_method=f"file://{meet}", rank=rank, world_size=world)
        f(rank, *args)
    pids = [fork(child, rank) for rank in range(world)]
    return [join(pid) for pid in pids]

def recorded_run(rank, out, src, **kwargs):
    """ go_on, and what each rank was given is written down: place in the stream -> a hash of each row's tensors """
    rows, original = [], ArcLoader.next_batch
    def next_batch(self):
        window, place = self.window, self.batch
        r0, r1, _ = self.rows(window).batches[place]
        mine = (r1 - r0) * (self.rank + 1) // self.world - (r1 - r0) * self.rank // self.world
        batch = original(self)
        rows.append((window, place, self.rank, [hashlib.sha256(b"".join(x[i].numpy().tobytes() for x in batch if x is not None)).hexdigest() for i in range(mine)]))
        return batch
    ArcLoader.next_batch = next_batch
    try:
        go_on(out, src, **kwargs)
    finally:
        (out / f"rows-{time.time_ns()}-{rank}.json").write_text(json.dumps(rows))

def stream_of(out):
    """ all that all ranks of a run were given, in the order of the stream """
    rows = sorted(tuple(x) for path in out.glob('rows-*.json') for x in map(tuple, json.loads(path.read_text())))
    return [h for *_, hashes in rows for h in hashes]

def test_one_two_four_three_ranks_are_one_run(whole, tmp_path):
    _, src, *_ = whole
    alone, out = tmp_path / 'alone', tmp_path / 'run'
    assert ranks(1, tmp_path, recorded_run, alone, src) == [0]
    for world, to in ((1, 6), (2, 12), (4, 18), (3, 24)): # the schedule is that of 24 steps
        assert ranks(world, tmp_path, stopped_run, out, src, to) == [0] * world
    assert len(stream_of(alone)) > 80 and stream_of(out) == stream_of(alone)
    for key in ('loss', 'val_loss'):
        a, b = ([(x['step'], x[key]) for x in read_metrics(path) if key in x] for path in (alone, out))
        assert [step for step, _ in a] == [step for step, _ in b] and len(a) > 3
        assert max(abs(x - y) / x for (_, x), (_, y) in zip(a, b)) < 1e-5
    assert checkpoint.load(alone)[1]['tokens'] == checkpoint.load(out)[1]['tokens']
    for world in (2, 3, 4): # and from the beginning
        assert ranks(world, tmp_path, recorded_run, tmp_path / f"{world}", src) == [0] * world
        assert stream_of(tmp_path / f"{world}") == stream_of(alone)
        losses = [[x['loss'] for x in read_metrics(path) if 'loss' in x] for path in (alone, tmp_path / f"{world}")]
        assert max(abs(x - y) / x for x, y in zip(*losses)) < 1e-5

def stopped_run(rank, out, src, to):
    """ recorded_run to a step, where one rank alone gets a SIGTERM: all stop there """
    original = Model.forward
    calls = itertools.count(1 + 2 * (checkpoint.steps(out) or [0])[0])
    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled() and next(calls) == 2 * to and to < 24 and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)
    Model.forward = forward
    recorded_run(rank, out, src)

@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_ranks_end_together_on_any_corpus(tmp_path, world, whole):
    srcs = [write_toy(tmp_path / f"src{n}", n=n) for n in (1, 2, 5, 97)]
    def all_of_them(rank):
        for n, src in enumerate(srcs):
            meta = run(tmp_path / f"run{n}", src, max_iters=3, eval_every=2)
            assert meta['step'] == 3
    assert ranks(world, tmp_path, all_of_them) == [0] * world
    assert all(checkpoint.load(tmp_path / f"run{n}")[1]['step'] == 3 for n in range(4))

@pytest.mark.parametrize('how', ['raises', 'is killed', 'has a loss that is not finite'])
def test_a_rank_that_dies_ends_all(whole, tmp_path, how):
    def dies(rank):
        if rank == 1 and how == 'has a loss that is not finite':
            Model.forward = poisoned(9)
        elif rank == 1:
            original, calls = Model.forward, itertools.count()
            def forward(self, *args, **kwargs):
                if next(calls) == 20:
                    os.kill(os.getpid(), signal.SIGKILL) if how == 'is killed' else 1 / 0
                return original(self, *args, **kwargs)
            Model.forward = forward
        run(tmp_path / 'run', whole[1])
    t = time.time()
    codes = ranks(3, tmp_path, dies)
    assert 0 not in codes and time.time() - t < 30
    assert checkpoint.load(tmp_path / 'run')[1]['step'] in (4, 8)

def test_torchrun_ends_when_a_rank_dies_and_stops_when_told(whole, tmp_path):
    """ the real thing: its workers are killed, or it gets a SIGTERM, and the run goes on with another number of ranks """
    out = tmp_path / 'run'
    args = ['-m', 'nanoarc.train', f"--data={whole[1]}", '--n_layer=2', '--n_embd=32', '--head_size=16', '--batch_tokens=60', '--val_tasks=2', '--save_every=5', '--log_every=1',
            '--minutes=0', '--max_iters=100000']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    process = subprocess.Popen([*command, *args, f"--out_dir={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.steps(out):
        time.sleep(0.05)
        assert process.poll() is None
    workers = [int(x) for x in subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(timeout=30) != 0
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    step = checkpoint.steps(out)[0]
    process = subprocess.Popen([*command, '-m', 'nanoarc.train', '--resume', str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while checkpoint.steps(out)[0] < step + 10:
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    text = process.communicate(timeout=30)[0]
    assert f"stopped by signal 15 after step {checkpoint.steps(out)[0]}" in text and no_temps(out)

def test_solve_gives_the_same_submission_on_any_number_of_ranks(tiny_run, tmp_path):
    from nanoarc import solve
    run_dir, src = tiny_run
    def solved(rank, out):
        solve.main(solve.SolveConfig(run=run_dir, data=src, out_dir=str(out), views=8, decode_rows=5, together=1, device='cpu', select='both', ttt_steps=1))
    for world in (1, 2, 3, 7):
        assert ranks(world, tmp_path, solved, tmp_path / f"{world}") == [0] * world
        for name in ('submission.json', 'candidates.jsonl'):
            assert (tmp_path / f"{world}" / name).read_bytes() == (tmp_path / '1' / name).read_bytes()
    assert not (tmp_path / '1' / 'candidates.jsonl').read_text() == ""
