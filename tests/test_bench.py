""" python -m pytest tests/test_bench.py: what the benchmarks count """
import sys
from pathlib import Path

import torch

from nanoarc.model import Model, ModelConfig

sys.path.insert(0, str(Path(__file__).parent.parent / 'bench'))

def test_flops_of_a_packed_row_are_those_of_its_documents():
    import model as bench
    net = Model(ModelConfig(mixer='A', n_layer=1, n_embd=32))
    doc = torch.tensor([[0, 0, 0, 1, 1, -1]])
    weights = sum(p.numel() for p in net.blocks.parameters() if p.ndim == 2) + net.head.weight.numel()
    assert bench.flops(net, doc) == 6 * weights * 5 + 3 * 4 * 32 * (6 + 3)
