""" python -m pytest tests/test_bench.py: that the benchmarks run. what they measure is theirs """
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))

@pytest.mark.slow
def test_every_arm_of_the_ablation_trains(tmp_path):
    import ablate
    blind = ablate.write_tasks(tmp_path)
    assert len(list(blind.glob('*.json'))) == 32 and not any('"output"' in json.dumps(json.loads(p.read_text())['test']) for p in blind.glob('*.json'))
    for arm in ablate.ARMS:
        assert ablate.Stepper(arm, blind).seconds(1) > 0, arm

@pytest.mark.slow
def test_an_ablation_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(BENCH / 'ablate.py'), 'default', 'A', '--seeds', '1', '--minutes', '0.01', '--out', str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'done' in first and 'done' not in again and first.splitlines()[-1] == again.splitlines()[-1]
    assert set(json.loads(again.splitlines()[-1])) == {'default', 'A'}

@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--sizes', '2x32', '--lengths', '64', '--tokens', '128', '--rounds', '1'], ['--packed', '--sizes', '2x32', '--lengths', '256', '--tokens', '512', '--rounds', '1']])
def test_the_model_is_measured(tmp_path, flags):
    out = subprocess.run([sys.executable, str(BENCH / 'model.py'), *flags, '--device', 'cpu'], capture_output=True, text=True, check=True, env={**os.environ, 'OUT': str(tmp_path)}).stdout
    assert [row['mixer'] for row in json.loads(out.splitlines()[-1])] == ['A', 'M', 'MA', 'MS']

def test_flops_of_a_packed_row_are_those_of_its_documents():
    import torch
    import model as bench
    from nanoarc.model import Model, ModelConfig
    net = Model(ModelConfig(mixer='A', n_layer=1, n_embd=32))
    doc = torch.tensor([[0, 0, 0, 1, 1, -1]])
    weights = sum(p.numel() for p in net.blocks.parameters() if p.ndim == 2) + net.head.weight.numel()
    assert bench.flops(net, doc) == 6 * weights * 5 + 3 * 4 * 32 * (6 + 3)
