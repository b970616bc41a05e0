"""
what does a shrunk vocabulary buy? a base with all rows of its embedding and head, and with the few that tasks as text
need: logits on these, memory of the weights and of a training step, tokens/s of training steps and of forward passes,
in turn, median of 5 rounds. usage: python bench/finetune.py BASE [--tokens 1024]. last line: json
"""
import argparse
import json
import re
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
from nanoarc.lm import LMConfig, make_lm
from nanoarc.run import get_device

def main(rounds=5):
    parser = argparse.ArgumentParser()
    parser.add_argument('base')
    parser.add_argument('--tokens', type=int, default=1024)
    args = parser.parse_args()
    device, _, autocast = get_device('auto', 'auto')
    loader = ArcLoader(
        ArcDataset(
            DataConfig(data='arc1/training', max_pair=100, shots=-1, loss_on='outputs', batch_tokens=args.tokens)
        ),
        device=device,
    )
    models = {}
    for name, shrink in (('all rows', False), ('shrunk', True)):
        torch.manual_seed(0)
        models[name] = make_lm(LMConfig(base=args.base, shrink=shrink), device)
    times, batch = (
        {name: {'train': [], 'forward': []} for name in models},
        Batch(*(x if x is None else x.clone() for x in loader.next_batch())),
    )
    with torch.no_grad(), autocast():
        a, b = (lm(*batch)[0] for lm in models.values())
    different = float((a - b).abs().max())
    for k in range(rounds + 1): # the first one warms up
        for name, lm in models.items():
            for what in ('train', 'forward'):
                start = time.perf_counter()
                with torch.set_grad_enabled(what == 'train'), autocast():
                    loss = lm(*batch)[1]
                if what == 'train':
                    loss.backward()
                    lm.zero_grad(set_to_none=True)
                float(loss) # waits for the device
                times[name][what] += [batch.idx.numel() / (time.perf_counter() - start)] if k > 0 else []
    table, result = (
        Table('', 'rows', 'MB of weights', 'MB of activations / 1,000 tokens', 'tokens / s, training', 'forward'),
        {'base': args.base, 'max_logit_difference': different},
    )
    for name, lm in models.items():
        weights, activations = (
            int(x.replace(",", ""))
            for x in re.search(r"([\d,]+) MB of weights.* ([\d,]+) MB of activations", lm.about()).groups()
        )
        train, forward = (median(times[name][what]) for what in ('train', 'forward'))
        rows = lm.base.get_input_embeddings().weight.size(0)
        table.add_row(name, f"{rows:,}", f"{weights:,}", f"{activations:,}", f"{train:,.0f}", f"{forward:,.0f}")
        result[name] = {
            'rows': rows,
            'mb_weights': weights,
            'mb_activations': activations,
            'train_tok_s': train,
            'forward_tok_s': forward,
        }
    result['ratio_train'] = median(b / a for a, b in zip(times['all rows']['train'], times['shrunk']['train']))
    result['ratio_forward'] = median(b / a for a, b in zip(times['all rows']['forward'], times['shrunk']['forward']))
    Console(width=120).print(table)
    print(
        f"largest difference of a logit: {different:.1e}; shrunk is {result['ratio_train']:.2f} times as fast "
        f"in training, {result['ratio_forward']:.2f} times forward"
    )
    print(json.dumps(result))

if __name__ == '__main__':
    main()
