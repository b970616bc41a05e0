""" python -m pytest tests/test_bench.py: what the benchmarks count, and that they run """
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoarc.model import Model, ModelConfig

BENCH = Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))

def test_flops_of_a_packed_row_are_those_of_its_documents():
    import model as bench
    net = Model(ModelConfig(mixer='A', n_layer=1, n_embd=32))
    doc = torch.tensor([[0, 0, 0, 1, 1, -1]])
    weights = sum(p.numel() for p in net.blocks.parameters() if p.ndim == 2) + net.head.weight.numel()
    assert bench.flops(net, doc) == 6 * weights * 5 + 3 * 4 * 32 * (6 + 3)

@pytest.mark.slow
def test_an_ablation_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(BENCH / 'ablate.py'), 'no prefix, mdlARC positions', '--seeds', '1', '--minutes', '0.01', '--out', str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(list((tmp_path / 'blind').glob('*.json'))) == 32 and 'failed' not in first
    assert not any('"output"' in json.dumps(json.loads(path.read_text())['test']) for path in (tmp_path / 'blind').glob('*.json'))
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'done' in first and 'done' not in again and first.splitlines()[-1] == again.splitlines()[-1]
    assert set(json.loads(again.splitlines()[-1])) == {'no prefix, mdlARC positions'}

def test_every_arm_of_the_ablation_is_a_model():
    import ablate
    for arm in ablate.ARMS:
        cfg, model_cfg, data_cfg, inputs, init = ablate.configs(arm, Path('blind'))
        ablate.patched(inputs, init)(model_cfg)
        assert data_cfg.max_pair == 100

@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--sizes', '2x32', '--lengths', '64', '--tokens', '128', '--rounds', '1'], ['--packed', '--sizes', '2x32', '--lengths', '256', '--tokens', '512', '--rounds', '2']])
def test_the_model_is_measured(tmp_path, flags):
    out = subprocess.run([sys.executable, str(BENCH / 'model.py'), *flags, '--device', 'cpu'], capture_output=True, text=True, env={**os.environ, 'OUT': str(tmp_path)})
    assert out.returncode == 0, out.stderr
    assert [row['mixer'] for row in json.loads(out.stdout.splitlines()[-1])] == ['A', 'M', 'MA', 'MS']
