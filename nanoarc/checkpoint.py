"""
the only code that writes or reads training state.

    out_dir/ckpt/step-000123.safetensors   weights, optimizer; everything else as json in its metadata
    out_dir/ckpt/step-000123.sha256        its hash, for `sha256sum -c`. written last: without it it does not count
    out_dir/lock                           the process that trains here

a file is written under another name, synced and then renamed, so a crash at any moment leaves the old one or the new
one. the hash is checked before a byte is parsed, and safetensors holds numbers only: nothing in it can run.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors, save as dump_tensors

FORMAT = 6 # 5 had n_head
KEEP = 2 # checkpoints on disk
# what write_file puts into the directory of a run, by way of .NAME.tmp
WRITTEN = ('metrics.jsonl', 'val.json', 'trained_on.txt', 'tokenizer.json', 'submission.json', 'candidates.jsonl',
           'solve.json', 'loss.png', 'val.png')
# what else is written there
OPENED = 'ckpt', 'lock', 'solving.lock', 'log.txt', 'output.txt', 'study.db', 'wandb'

def write_file(path, data):
    """ bytes to a file, all or nothing, also when the machine dies """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    try:
        temp.unlink(missing_ok=True) # of a write that was killed, or a link of somebody's
        with open(temp, 'xb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException as e:
        temp.unlink(missing_ok=True)
        if isinstance(e, OSError) and not e.filename: # a write or a sync does not say of which file
            e.filename = str(path)
        raise
    fd = os.open(path.parent, os.O_RDONLY) # the rename itself must reach the disk too
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def refuse_links(out_dir):
    """ raises ValueError that names a link where we would write: whoever made it could have us write anywhere """
    for name in (*WRITTEN, *OPENED):
        if (Path(out_dir) / name).is_symlink():
            raise ValueError(f"{Path(out_dir) / name} is a link, what it leads to would be written: remove it. the "
                             "directory as a whole may be one")

@contextlib.contextmanager
def lock(out_dir, name='lock'):
    """
    while it is held no other process writes this run. the kernel lets go of it however we die. raises ValueError that
    names the process that holds it, or a link. by another name it is another lock: to solve while somebody trains
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e: # it is a file
        raise ValueError(f"{out_dir}: cannot write here, {e.strerror}. choose another --out_dir") from None
    refuse_links(out_dir)
    with open(out_dir / name, 'a+', encoding='utf-8') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise ValueError(f"{out_dir}: process {f.read().strip()} is writing this run") from None
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        if name == 'lock':
            remove_temps(out_dir)
        yield

def remove_temps(out_dir):
    """ what writes that were killed have left """
    for path in [*out_dir.glob('.*.tmp'), *(out_dir / 'ckpt').glob('.*.tmp')]:
        is_ours = path.name[1:-4] in WRITTEN or re.fullmatch(r'\.step-\d+\.\w+\.tmp', path.name)
        if is_ours:
            path.unlink()

def file(out_dir, step, kind='safetensors'):
    """ path of a checkpoint, or of its hash: kind='sha256' """
    return Path(out_dir) / 'ckpt' / f"step-{step:06d}.{kind}"

def steps(out_dir, kind='sha256'):
    """ the steps of which there is a checkpoint, newest first. files that are called otherwise are not ours """
    found, ckpt = [], Path(out_dir) / 'ckpt'
    for path in ckpt.iterdir() if ckpt.is_dir() else (): # not glob: it finds nothing where it may not look
        number = path.stem.removeprefix('step-')
        if number.isdecimal() and path == file(out_dir, int(number), kind) and path.is_file():
            found.append(int(number))
    return sorted(found, reverse=True)

def some_steps(out_dir):
    """ steps(out_dir). raises ValueError if there are none """
    found = steps(out_dir)
    if not found:
        raise ValueError(f"{out_dir}: no checkpoint here, want the --out_dir of a training run")
    return found

def newest(out_dir):
    """ the hash of the newest checkpoint, '' where out_dir is ''. raises ValueError if there is none """
    return file(out_dir, some_steps(out_dir)[0], 'sha256').read_text('utf-8') if out_dir else ''

def signed(data, path):
    """ what the .sha256 beside a path says of these bytes """
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()

def save(out_dir, step, model, optimizers, meta, ema=None):
    """
    state of model, optimizers and perhaps averaged weights, and meta (a dict of json values), as the newest checkpoint.
    prunes older ones. raises ValueError, and leaves them, if something is not finite
    """
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    if ema is not None:
        for name, x in ema.state_dict().items():
            tensors[f"ema.{name}"] = x
    fresh = [] # parameters without optimizer state: no step has reached them
    for name, p, optimizer in trained(model, optimizers):
        if optimizer.state.get(p):
            for key, x in optimizer.state[p].items():
                tensors[f"optim.{name}.{key}"] = x
        else:
            fresh.append(name)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    path = file(out_dir, step)
    bad = [name for name, x in tensors.items() if not x.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: not written, {len(bad)} of its tensors are not finite, first {bad[0]}, though loss "
                         "and gradient were. it is the update: try a lower --lr, --adam_lr or --weight_decay")
    meta = {**meta, 'format': FORMAT, 'step': step, 'fresh': fresh}
    data = dump_tensors(tensors, metadata={'nanoarc': json.dumps(meta)})
    write_file(path, data)
    write_file(file(out_dir, step, 'sha256'), signed(data, path))
    # this run began with the newest checkpoint that is whole, so any of a later step is damaged: it goes too
    older = [x for x in steps(out_dir) if x < step]
    prune(out_dir, [step, *older][:KEEP])

def trained(model, optimizers):
    """ -> list of (name, parameter, its optimizer) """
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group['params']:
                found.append((names[id(p)], p, optimizer))
    return found

def prune(out_dir, keep=()):
    """ remove the checkpoints of all other steps, whole or half, and nothing else """
    for kind in ('sha256', 'safetensors'): # in this order: what is left is no checkpoint
        for x in steps(out_dir, kind):
            if x not in keep:
                file(out_dir, x, kind).unlink()

def load(out_dir):
    """ the newest checkpoint that is whole -> (tensors, meta). raises ValueError if there is none """
    errors = []
    for step in some_steps(out_dir):
        path = file(out_dir, step)
        try:
            data, want = path.read_bytes(), file(out_dir, step, 'sha256').read_bytes().replace(b"\r\n", b"\n")
        except OSError as e: # perhaps of a disk that cannot read it
            errors.append(f"{path}: {e.strerror if path.exists() else 'missing'}")
            continue
        found = signed(data, path)
        if found == want:
            for error in errors:
                print(f"warning: {error}, going back to {path}")
            return parse(data, path)
        errors.append(f"{path}: damaged, its sha256 is {found}, want {want[:99]}")
    raise ValueError("no whole checkpoint: " + "; ".join(errors))

def parse(data, path):
    """ the bytes of a checkpoint -> (tensors, meta). raises ValueError """
    try: # the header by hand, its length comes first: of bytes safetensors gives the tensors alone
        n = int.from_bytes(data[:8], 'little')
        header = json.loads(data[8 : 8 + n])
        meta = json.loads(header['__metadata__']['nanoarc'])
        found, step = meta['format'], meta['step']
        tensors = parse_tensors(data)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: no checkpoint of nanoarc: {type(e).__name__} {e}") from None
    if found != FORMAT:
        raise ValueError(f"{path}: format differs (saved {found}, this version reads {FORMAT})")
    if path.stem != f"step-{step!s:0>6}":
        raise ValueError(f"{path}: renamed, it is of step {step}")
    return tensors, meta

def eval_part(meta):
    """ the weights of a checkpoint that validation and solve use: 'ema', averaged, where there are any, or 'model' """
    return 'ema' if meta['train']['ema'] > 0 else 'model'

def restore_model(model, tensors, part='model'):
    """ weights into the model, strictly; part='ema': the averaged ones. raises ValueError that names what differs """
    have = part_of(tensors, part)
    refuse_others(have, model.state_dict(), "weights")
    model.load_state_dict(have)

def part_of(tensors, part):
    """ {'model.wte.weight': x, ...} and 'model' -> {'wte.weight': x, ...} """
    return {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}

def kind_of(x):
    """ shape and dtype of a tensor, 'none' of None """
    return 'none' if x is None else f"{list(x.shape)} {x.dtype}"

def refuse_others(have, want, what):
    """ two dicts of tensors. raises ValueError that names the first of another shape or dtype, or that is not there """
    wrong = []
    for name in sorted(want.keys() | have.keys()):
        saved, now = kind_of(have.get(name)), kind_of(want.get(name))
        if saved != now:
            wrong.append(f"{name}: saved {saved}, now {now}")
    if wrong:
        raise ValueError(f"the checkpoint's {what} do not fit this model: {len(wrong)} differ, first {wrong[0]}")

def restore_training(model, optimizers, tensors, meta):
    """ weights, and optimizer state by parameter name. raises ValueError that names what differs """
    mine = trained(model, optimizers)
    for name, p, _ in mine: # a step passes over what has no gradient
        p.grad = None if name in meta['fresh'] else torch.zeros_like(p)
    for optimizer in optimizers: # the step makes the states that are filled below
        optimizer.step()
        optimizer.zero_grad()
    want = {}
    for name, p, optimizer in mine:
        for key, x in optimizer.state.get(p, {}).items():
            want[f"{name}.{key}"] = x
    have = part_of(tensors, 'optim')
    refuse_others(have, want, "optimizer states")
    for name, x in want.items():
        x.copy_(have[name])
    restore_model(model, tensors) # last: the step has changed the weights

def restore_scaler(scaler, saved):
    """ a GradScaler's state. raises ValueError that names what differs """
    for name, now in scaler.state_dict().items():
        x = saved.get(name)
        if type(x) is not type(now) or not 0 <= x < math.inf:
            raise ValueError(f"the checkpoint's gradient scaler does not fit: {name}: saved {x}, want like {now}")
    scaler.load_state_dict(saved)
