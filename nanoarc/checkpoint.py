"""
the only code that writes or reads training state.

    out_dir/ckpt/step-000123.safetensors   weights, optimizer; everything else as json in its metadata
    out_dir/latest.json                    file names and their sha256, newest first, written last

a file is written under another name, synced and then renamed, so a crash at any moment leaves the old one or the new
one. the hash is checked before a byte is parsed, and safetensors holds numbers only: nothing in it can run.
"""
import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load as parse_tensors, save as dump_tensors

FORMAT = 1
KEEP = 2 # checkpoints on disk

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

def save(out_dir, step, model, optimizers, meta):
    """ model and optimizer state, and meta (a dict of json values), as the newest checkpoint. prunes older ones """
    out_dir = Path(out_dir)
    tensors = {f"model.{name}": x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, x in state.items():
                tensors[f"optim.{names[id(p)]}.{key}"] = x.detach().cpu().contiguous()
    data = dump_tensors(tensors, metadata={'nanoarc': json.dumps({'format': FORMAT, 'step': step, **meta})})
    name = f"step-{step:06d}.safetensors"
    write_file(out_dir / 'ckpt' / name, data)
    old = [x for x in read_index(out_dir) if x['file'] != name] if exists(out_dir) else []
    index = [{'file': name, 'step': step, 'sha256': hashlib.sha256(data).hexdigest()}] + old
    write_file(out_dir / 'latest.json', json.dumps(index[:KEEP], indent=1).encode())
    for x in index[KEEP:]:
        (out_dir / 'ckpt' / x['file']).unlink(missing_ok=True)

def exists(out_dir):
    """ is there a run in this directory? """
    return (Path(out_dir) / 'latest.json').exists()

def read_index(out_dir):
    """ latest.json -> list of {file, step, sha256}, newest first. raises ValueError """
    path = Path(out_dir) / 'latest.json'
    if not exists(out_dir):
        raise ValueError(f"{out_dir}: no checkpoint here (no latest.json), want the --out_dir of a training run")
    try:
        index = json.loads(path.read_bytes())
    except ValueError:
        index = None
    if not isinstance(index, list) or not index or any(
            not isinstance(x, dict) or x.keys() != {'file', 'step', 'sha256'} or os.path.basename(str(x['file'])) != x['file'] for x in index):
        raise ValueError(f"{path}: damaged, want a list of checkpoints")
    return index

def load(out_dir):
    """ the newest checkpoint that is whole -> (tensors, meta). raises ValueError if there is none """
    errors = []
    for x in read_index(out_dir):
        path = Path(out_dir) / 'ckpt' / x['file']
        if not path.is_file():
            errors.append(f"{path}: missing")
            continue
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != x['sha256']:
            errors.append(f"{path}: damaged, sha256 is {found[:12]}, want {x['sha256'][:12]}")
            continue
        n = int.from_bytes(data[:8], 'little') # safetensors: the header's length, then the header
        meta = json.loads(json.loads(data[8 : 8 + n])['__metadata__']['nanoarc'])
        if meta['format'] != FORMAT:
            raise ValueError(f"{path}: format {meta['format']}, this version reads {FORMAT}")
        for error in errors:
            print(f"warning: {error}, going back to {path}")
        return parse_tensors(data), meta
    raise ValueError("no whole checkpoint: " + "; ".join(errors))

def restore_model(model, tensors):
    """ weights into the model, strictly. raises ValueError that names what does not fit """
    want = model.state_dict()
    have = {name.removeprefix('model.'): x for name, x in tensors.items() if name.startswith('model.')}
    wrong = [name for name in want.keys() | have.keys() if name not in want or name not in have or want[name].shape != have[name].shape]
    if wrong:
        name = sorted(wrong)[0]
        raise ValueError(f"the checkpoint's weights do not fit this model: {len(wrong)} differ, first {name}: "
                         f"saved {list(have[name].shape) if name in have else 'none'}, now {list(want[name].shape) if name in want else 'none'}")
    model.load_state_dict(have)

def restore_optimizers(model, optimizers, tensors):
    """ optimizer state by parameter name """
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group['params']}
        for name, p in model.named_parameters():
            state = {key.rpartition('.')[2]: x for key, x in tensors.items() if key.startswith(f"optim.{name}.")}
            if id(p) in mine and state: # a step counter stays on the cpu unless the optimizer is fused on a gpu
                optimizer.state[p] = {key: x.to(p.device) for key, x in state.items()}
