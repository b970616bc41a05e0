"""
the only code that writes or reads training state.

    out_dir/ckpt/step-000123.safetensors   weights, optimizer; everything else as json in its metadata
    out_dir/ckpt/step-000123.sha256        its hash, as `sha256sum -c` reads it. written last: without it there is none
    out_dir/lock                           the process that trains here

a file is written under another name, synced and then renamed, so a crash at any moment leaves the old one or the new
one. the hash is checked before a byte is parsed, and safetensors holds numbers only: nothing in it can run.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path

from safetensors.torch import load as parse_tensors, save as dump_tensors

FORMAT = 2
KEEP = 2 # checkpoints on disk
# what write_file writes into the directory of a run
WRITTEN = 'metrics.jsonl', 'trained_on.txt', 'tokenizer.json', 'submission.json', 'candidates.jsonl', 'solve.json'

def write_file(path, data):
    """ bytes to a file, all or nothing, also when the machine dies """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with open(temp, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fd = os.open(path.parent, os.O_RDONLY) # the rename itself must reach the disk too
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

@contextlib.contextmanager
def lock(out_dir):
    """
    while it is held, no other process writes this run: the kernel lets go of it when we die, however we die. what a
    save that was killed left behind is removed. raises ValueError that names the process that holds it.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / 'lock', 'a+', encoding='utf-8') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise ValueError(f"{out_dir}: process {f.read().strip()} is writing this run") from None
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        for path in [*out_dir.glob('.*.tmp'), *(out_dir / 'ckpt').glob('.*.tmp')]:
            is_ours = path.name[1:-4] in WRITTEN or re.fullmatch(r'\.step-\d+\.\w+\.tmp', path.name)
            if is_ours:
                path.unlink()
        yield

def file(out_dir, step, kind='safetensors'):
    """ path of a checkpoint, or of its hash: kind='sha256' """
    return Path(out_dir) / 'ckpt' / f"step-{step:06d}.{kind}"

def steps(out_dir):
    """ the steps of which there is a checkpoint, newest first """
    found = [re.fullmatch(r'step-(\d+)\.sha256', path.name) for path in (Path(out_dir) / 'ckpt').glob('*')]
    return sorted((int(m[1]) for m in found if m), reverse=True)

def some_steps(out_dir):
    """ the same. raises ValueError if there is none """
    found = steps(out_dir)
    if not found:
        raise ValueError(f"{out_dir}: no checkpoint here, want the --out_dir of a training run")
    return found

def signed(data, path):
    """ what the .sha256 beside a path says of these bytes """
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()

def save(out_dir, step, model, optimizers, meta, ema=None):
    """
    state of model, optimizers and perhaps averaged weights, and meta (a dict of json values), as the newest checkpoint.
    prunes older ones
    """
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    if ema is not None:
        for name, x in ema.state_dict().items():
            tensors[f"ema.{name}"] = x
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, x in state.items():
                tensors[f"optim.{names[id(p)]}.{key}"] = x
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    data = dump_tensors(tensors, metadata={'nanoarc': json.dumps({'format': FORMAT, 'step': step, **meta})})
    path = file(out_dir, step)
    write_file(path, data)
    write_file(file(out_dir, step, 'sha256'), signed(data, path))
    prune(out_dir, step)

def prune(out_dir, step):
    """ keep this checkpoint and the ones before it, KEEP in all """
    # we hold the lock and began with the newest that is whole: one of a later step is damaged, it goes too
    older = [x for x in steps(out_dir) if x < step]
    keep = [step, *older][:KEEP]
    for x in steps(out_dir):
        if x not in keep:
            file(out_dir, x, 'sha256').unlink() # first: what is left is no checkpoint
    kept = [file(out_dir, x) for x in keep]
    for path in (Path(out_dir) / 'ckpt').glob('step-*.safetensors'): # also what a save that was killed has left
        if path not in kept:
            path.unlink()

def load(out_dir):
    """ the newest checkpoint that is whole -> (tensors, meta). raises ValueError if there is none """
    errors = []
    for step in some_steps(out_dir):
        path = file(out_dir, step)
        if not path.is_file():
            errors.append(f"{path}: missing")
            continue
        try:
            data, want = path.read_bytes(), file(out_dir, step, 'sha256').read_bytes()
        except OSError as e: # a disk that cannot read it
            errors.append(f"{path}: {e.strerror}")
            continue
        found = signed(data, path)
        if found != want:
            want = want[:12].decode('ascii', 'backslashreplace')
            errors.append(f"{path}: damaged, its sha256 is {found[:12].decode()}, want {want}")
            continue
        for error in errors:
            print(f"warning: {error}, going back to {path}")
        meta = read_meta(data)
        if meta['format'] != FORMAT:
            raise ValueError(f"{path}: format differs (saved {meta['format']}, this version reads {FORMAT})")
        return parse_tensors(data), meta
    raise ValueError("no whole checkpoint: " + "; ".join(errors))

def read_meta(data):
    """
    bytes of a checkpoint -> what was saved beside the tensors. a safetensors file begins with its header's length
    """
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + n])
    return json.loads(header['__metadata__']['nanoarc'])

def best_part(meta):
    """ the weights of a checkpoint that validation and solve use: 'ema', averaged, where there are any, or 'model' """
    return 'ema' if meta['train']['ema'] > 0 else 'model'

def restore_model(model, tensors, part='model'):
    """ weights into the model, strictly; part='ema': the averaged ones. raises ValueError that names what differs """
    want = model.state_dict()
    have = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
    wrong = []
    for name in sorted(want.keys() | have.keys()):
        saved = list(have[name].shape) if name in have else 'none'
        now = list(want[name].shape) if name in want else 'none'
        if saved != now:
            wrong.append(f"{name}: saved {saved}, now {now}")
    if wrong:
        raise ValueError(f"the checkpoint's weights do not fit this model: {len(wrong)} differ, first {wrong[0]}")
    model.load_state_dict(have)

def restore_optimizers(model, optimizers, tensors):
    """ optimizer state by parameter name """
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group['params']}
        for name, p in model.named_parameters():
            state = {}
            for key, x in tensors.items():
                if key.startswith(f"optim.{name}."):
                    state[key.rpartition('.')[2]] = x.to(p.device)
            if id(p) in mine and state:
                optimizer.state[p] = state
