""" python -m pytest tests/test_checkpoint.py: what is saved. under kills and damage: test_reliability.py """
import os
from pathlib import Path

import pytest
import torch

from nanoarc import checkpoint
from nanoarc.model import Muon

def save(out, *steps):
    """ checkpoints of a small module """
    for step in steps:
        checkpoint.save(out, step, torch.nn.Linear(2, 2), [], {'note': f"of step {step}"})

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.write_file(tmp_path / 'x', b"old")
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError):
        checkpoint.write_file(tmp_path / 'x', b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('x', b"old")]

def test_a_failed_write_says_of_which_file(tmp_path, monkeypatch):
    path = str(tmp_path / 'x')
    for error, name in ((OSError(28, "No space left on device"), path), (OSError(5, "broken", "another"), "another")):
        def fail(*_):
            raise error
        monkeypatch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError) as caught:
            checkpoint.write_file(path, b"new")
        assert caught.value.filename == name

def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, capsys):
    save(tmp_path, 3, 6)
    path = checkpoint.file(tmp_path, 6)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    meta = checkpoint.load(tmp_path)[1]
    assert meta['step'] == 3 and meta['note'] == "of step 3"
    assert "step-000006.safetensors: damaged" in capsys.readouterr().out
    checkpoint.file(tmp_path, 3).unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*damaged.*missing"):
        checkpoint.load(tmp_path)

def test_a_hash_with_the_line_ends_of_windows_is_the_same(tmp_path, capsys):
    save(tmp_path, 3, 6)
    path = checkpoint.file(tmp_path, 6, 'sha256')
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert checkpoint.load(tmp_path)[1]['step'] == 6 and capsys.readouterr().out == ""

@pytest.mark.parametrize('signs', [False, True])
def test_a_checkpoint_under_another_number_is_not_loaded_and_the_reason_is_seen(tmp_path, signs):
    save(tmp_path, 10)
    for kind in ('safetensors', 'sha256'):
        checkpoint.file(tmp_path, 10, kind).rename(checkpoint.file(tmp_path, 5, kind))
    path, want = checkpoint.file(tmp_path, 5), "5.safetensors.n', want b'.*10.safetensors.n'"
    if signs:
        path.with_suffix('.sha256').write_bytes(checkpoint.signed(path.read_bytes(), path))
        want = "step-000005.safetensors: renamed, it is of step 10"
    with pytest.raises(ValueError, match=want):
        checkpoint.load(tmp_path)

def test_checkpoints_that_may_not_be_seen_are_not_taken_for_none(tmp_path, monkeypatch):
    save(tmp_path, 1)
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, 'iterdir', forbidden)
    with pytest.raises(PermissionError, match="ckpt"):
        checkpoint.steps(tmp_path)
    assert checkpoint.steps(tmp_path / 'elsewhere') == []

@pytest.mark.parametrize('name', ['file', 'file/run'])
def test_a_file_in_place_of_a_run_is_refused_by_name(tmp_path, name):
    (tmp_path / 'file').write_text("precious")
    with pytest.raises(ValueError, match=f"{name}: cannot write here, .*choose another --out_dir"):
        with checkpoint.lock(tmp_path / name):
            pass

def test_checkpoints_are_pruned_to_two(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 9)
    assert sorted(path.name for path in (tmp_path / 'ckpt').iterdir()) == [
        'step-000008.safetensors', 'step-000008.sha256', 'step-000009.safetensors', 'step-000009.sha256']

def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    save(tmp_path, 1)
    tensors, _ = checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"1 differ, first weight: saved \[2, 2\] torch.float32, now \[2, 3\] "):
        checkpoint.restore_model(torch.nn.Linear(3, 2), tensors)
    with pytest.raises(ValueError, match=r"1 differ, first bias: saved \[2\] torch.float32, now none"):
        checkpoint.restore_model(torch.nn.Linear(2, 2, bias=False), tensors)
    with pytest.raises(ValueError, match=r"2 differ, first bias: saved \[2\] torch.float32, now \[2\] torch.float64"):
        checkpoint.restore_model(torch.nn.Linear(2, 2).double(), tensors)

def test_optimizers_are_restored_by_the_names_of_their_parameters(tmp_path):
    """ whatever the order of the parameters in them """
    def make(seed, order):
        torch.manual_seed(seed)
        model = torch.nn.Linear(2, 3)
        params = [model.weight, model.bias]
        return model, [torch.optim.AdamW(params[::order], lr=0.1)]
    def step(model, optimizers):
        model(torch.ones(1, 2)).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    model, optimizers = make(0, order=1)
    step(model, optimizers)
    checkpoint.save(tmp_path, 1, model, optimizers, {})
    other, others = make(1, order=-1)
    checkpoint.restore_training(other, others, *checkpoint.load(tmp_path))
    step(model, optimizers)
    step(other, others)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)

# -----------------------------------------------------------------------------
# what is saved is whole, what is loaded fits

def stepped(seed=0, steps=1):
    """ a model with a matrix for Muon, and a weight that no step reaches -> (model, its optimizers) """
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ('used', 'left')})
    optimizers = [Muon([model.used.weight], lr=0.1), torch.optim.AdamW([model.used.bias, *model.left.parameters()])]
    for _ in range(steps):
        model.used(torch.ones(1, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers

@pytest.mark.parametrize('x', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('where', ['model', 'ema', 'optim'])
def test_what_is_not_finite_is_not_written_and_the_older_ones_stay(tmp_path, where, x):
    ema, (model, optimizers) = stepped()[0], stepped()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizers, {}, ema)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'ckpt').iterdir()}
    weight = {'model': model, 'ema': ema}.get(where, model).used.weight
    bad = optimizers[0].state[weight]['momentum'] if where == 'optim' else weight.data
    bad[1, 2] = x
    with pytest.raises(ValueError, match=f"step-000003.* 1 of its tensors are not finite, first {where}.used.weight"):
        checkpoint.save(tmp_path, 3, model, optimizers, {}, ema)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'ckpt').iterdir()} == before

def test_a_parameter_that_no_step_has_reached_has_no_state_in_a_resumed_run_either(tmp_path):
    for steps in (0, 2):
        model, optimizers = stepped(0, steps)
        checkpoint.save(tmp_path, steps, model, optimizers, {})
        tensors, meta = checkpoint.load(tmp_path)
        other, others = stepped(1, 1)
        for optimizer in others:
            optimizer.state.clear()
        checkpoint.restore_training(other, others, tensors, meta)
        checkpoint.save(tmp_path, 9, other, others, {})
        again = checkpoint.load(tmp_path)[0]
        assert again.keys() == tensors.keys() and all(torch.equal(x, tensors[name]) for name, x in again.items())
        assert len(tensors) == 4 + 4 * (steps > 0) # momentum; step, exp_avg, exp_avg_sq

ADAM, MUON = 'optim.used.bias.exp_avg', 'optim.used.weight.momentum'

@pytest.mark.parametrize('change, want', [
    ({ADAM: torch.zeros(1)}, r"1 differ, first used.bias.exp_avg: saved \[1\] torch.float32, now \[3\] torch.float32"),
    ({ADAM: torch.zeros(3, dtype=torch.float16)}, "1 differ, first used.bias.exp_avg: .*torch.float16, now .*float32"),
    ({'optim.used.bias.step': torch.zeros(1)}, r"1 differ, first used.bias.step: saved \[1\]"),
    ({MUON: torch.zeros(9)}, r"1 differ, first used.weight.momentum: saved \[9\]"),
    ({ADAM: None}, "1 differ, first used.bias.exp_avg: saved none"),
    ({MUON: None}, "1 differ, first used.weight.momentum: saved none"),
    ({'optim.left.bias.exp_avg': torch.zeros(3)}, r"1 differ, first left.bias.exp_avg: saved \[3\] .*, now none"),
    ({'optim.used.bias.max_exp_avg_sq': torch.zeros(3)}, "1 differ, first used.bias.max_exp_avg_sq: .*, now none"),
    ({'optim.gone.exp_avg': torch.zeros(3)}, "1 differ, first gone.exp_avg: .*, now none"),
    ('all', "4 differ, first used.bias.exp_avg: saved none"),
])
def test_optimizer_state_that_does_not_fit_is_refused_by_name(tmp_path, change, want):
    checkpoint.save(tmp_path, 1, *stepped(), {})
    tensors, meta = checkpoint.load(tmp_path)
    if change == 'all':
        change = {name: None for name in tensors if name.startswith('optim.')}
    tensors.update(change)
    tensors = {name: x for name, x in tensors.items() if x is not None}
    with pytest.raises(ValueError, match=f"the checkpoint's optimizer states do not fit this model: {want}"):
        checkpoint.restore_training(*stepped(1), tensors, meta)

def test_a_scaler_that_does_not_fit_is_refused_by_name():
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(torch.ones(1)) # it begins late
    good = scaler.state_dict()
    checkpoint.restore_scaler(scaler, good)
    for change in ({'scale': None}, {'scale': float('nan')}, {'scale': -1.0}, {'growth_interval': 'x'}):
        with pytest.raises(ValueError, match=f"gradient scaler does not fit: {next(iter(change))}: saved "):
            checkpoint.restore_scaler(scaler, {**good, **change})
    with pytest.raises(ValueError, match="gradient scaler does not fit: scale: saved None"):
        checkpoint.restore_scaler(scaler, {})
    checkpoint.restore_scaler(torch.amp.GradScaler('cpu', enabled=False), {})

@pytest.mark.parametrize('header', [
    "[" * 100_000, "{}", "[]", "5", '{"__metadata__": {"nanoarc": "[]"}}', '{"__metadata__": {"nanoarc": "{}"}}',
    '{"__metadata__": {"nanoarc": 1}}', '{"__metadata__": {"nanoarc": "' + "[" * 100_000 + '"}}', "\xff",
    '{"__metadata__": {"nanoarc": "{\\"format\\": 2}"}, "x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
])
def test_a_file_that_is_no_checkpoint_is_one_line_though_its_hash_is_right(tmp_path, header):
    path, header = checkpoint.file(tmp_path, 1), header.encode('latin-1')
    data = len(header).to_bytes(8, 'little') + header
    checkpoint.write_file(path, data)
    checkpoint.write_file(path.with_suffix('.sha256'), checkpoint.signed(data, path))
    with pytest.raises(ValueError, match="step-000001.safetensors: no checkpoint of nanoarc: ") as e:
        checkpoint.load(tmp_path)
    assert "\n" not in str(e.value)

# -----------------------------------------------------------------------------
# it writes where it should, and removes what is its own

@pytest.mark.parametrize('name', checkpoint.WRITTEN + checkpoint.OPENED)
@pytest.mark.parametrize('kind', ['file', 'directory', 'nothing'])
def test_a_link_in_a_run_is_refused_by_name(tmp_path, name, kind):
    out, thesis = tmp_path / 'run', tmp_path / 'thesis'
    out.mkdir()
    if kind == 'file':
        thesis.write_text("precious")
    elif kind == 'directory':
        thesis.mkdir()
    (out / name).symlink_to(thesis)
    with pytest.raises(ValueError, match=f"{out / name} is a link"):
        with checkpoint.lock(out):
            pass
    assert thesis.exists() == (kind != 'nothing') and (kind != 'file' or thesis.read_text() == "precious")
    (out / name).unlink()
    (tmp_path / 'other').symlink_to(out) # the directory may be one
    with checkpoint.lock(tmp_path / 'other'):
        pass

def test_a_link_where_a_file_is_made_is_not_followed(tmp_path):
    thesis = tmp_path / 'thesis'
    thesis.write_text("precious")
    for name in ('.x.tmp', 'x'):
        (tmp_path / name).symlink_to(thesis)
    checkpoint.write_file(tmp_path / 'x', b"ours")
    assert thesis.read_text() == "precious" and (tmp_path / 'x').read_bytes() == b"ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ['thesis', 'x']

def test_what_a_user_puts_beside_the_checkpoints_stays_and_is_in_nobodys_way(tmp_path):
    save(tmp_path, 1, 2)
    ckpt = tmp_path / 'ckpt'
    theirs = ['step-000002-best.safetensors', 'step-1.sha256', 'step-1.safetensors', 'step-٠٠٠٠٠١.sha256',
              'step-000001.safetensors.bak', 'step-0000002.sha256', 'step-.sha256', 'step-000002.SHA256']
    for name in theirs:
        (ckpt / name).write_text(name)
    (ckpt / 'step-000009.sha256').mkdir()
    (ckpt / 'step-000009.safetensors').mkdir()
    assert checkpoint.steps(tmp_path) == [2, 1] and checkpoint.load(tmp_path)[1]['step'] == 2
    save(tmp_path, 3, 4, 1_000_000)
    assert checkpoint.steps(tmp_path) == [1_000_000, 4]
    assert all((ckpt / name).read_text() == name for name in theirs)
    ours = {path.name for path in ckpt.iterdir() if path.is_file()} - {*theirs}
    assert ours == {f"step-{x}.{kind}" for x in ('000004', '1000000') for kind in ('sha256', 'safetensors')}
