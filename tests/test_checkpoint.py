""" python -m pytest tests/test_checkpoint.py: what is saved. under kills and damage: test_reliability.py """
import os

import pytest
import torch

from nanoarc import checkpoint

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

def test_checkpoints_are_pruned_to_two(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 9)
    assert sorted(path.name for path in (tmp_path / 'ckpt').iterdir()) == [
        'step-000008.safetensors', 'step-000008.sha256', 'step-000009.safetensors', 'step-000009.sha256']

def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    save(tmp_path, 1)
    tensors, _ = checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"1 differ, first weight: saved \[2, 2\], now \[2, 3\]"):
        checkpoint.restore_model(torch.nn.Linear(3, 2), tensors)
    with pytest.raises(ValueError, match=r"1 differ, first bias: saved \[2\], now none"):
        checkpoint.restore_model(torch.nn.Linear(2, 2, bias=False), tensors)

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
    tensors, _ = checkpoint.load(tmp_path)
    other, others = make(1, order=-1)
    checkpoint.restore_model(other, tensors)
    checkpoint.restore_optimizers(other, others, tensors)
    step(model, optimizers)
    step(other, others)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
