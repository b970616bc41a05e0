"""
what does a shrunk vocabulary buy? a base with all rows of its embedding and head, and with the few that tasks as text
need: logits on these, memory of the weights and of a training step, tokens/s of training steps and of forward passes,
in turn, median of 5 rounds.
usage: python bench/finetune.py BASE [--tokens 1024]. last line: json
"""
import argparse
import json
import re
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.lm import LMConfig, make_lm
from nanoarc.run import get_device

ROUNDS = 5

def seconds(lm, batch, autocast, train):
    """ of a training step, or of a forward pass """
    start = time.perf_counter()
    with torch.set_grad_enabled(train), autocast():
        loss = lm(*batch)[1]
    if train:
        loss.backward()
        lm.zero_grad(set_to_none=True)
    loss.item() # waits for the device
    return time.perf_counter() - start

def describe(lm):
    """ -> rows of the vocabulary; MB of weights and of activations for 1,000 tokens, by what it says of itself """
    found = re.search(r"([\d,]+) MB of weights.* ([\d,]+) MB of activations", lm.about())
    weights, activations = found.groups()
    return {'rows': lm.base.get_input_embeddings().weight.size(0), 'mb_weights': int(weights.replace(",", "")),
            'mb_activations': int(activations.replace(",", ""))}

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('base')
    parser.add_argument('--tokens', type=int, default=1024)
    args = parser.parse_args()
    device, _, autocast = get_device('auto', 'auto')
    cfg = DataConfig(data='arc1/training', max_pair=100, shots=-1, loss_on='outputs', batch_tokens=args.tokens)
    batch = ArcLoader(ArcDataset(cfg), device=device).next_batch()
    lms, rates = {}, {}
    for name, shrink in (('all rows', False), ('shrunk', True)):
        torch.manual_seed(0)
        lms[name] = make_lm(LMConfig(base=args.base, shrink=shrink), device)
        rates[name] = {'train': [], 'forward': []}
    with torch.no_grad(), autocast():
        a, b = lms['all rows'](*batch)[0], lms['shrunk'](*batch)[0]
    different = float((a - b).abs().max())
    for k in range(ROUNDS + 1):
        for name, lm in lms.items():
            for what in ('train', 'forward'):
                rate = batch.idx.numel() / seconds(lm, batch, autocast, what == 'train')
                if k > 0: # the first round warms up
                    rates[name][what].append(rate)
    result = {'base': args.base, 'max_logit_difference': different}
    table = Table('', 'rows', 'MB of weights', 'MB of activations / 1,000 tokens', 'tokens / s, training', 'forward')
    for name, lm in lms.items():
        x = result[name] = describe(lm)
        x['train_tok_s'], x['forward_tok_s'] = median(rates[name]['train']), median(rates[name]['forward'])
        table.add_row(name, f"{x['rows']:,}", f"{x['mb_weights']:,}", f"{x['mb_activations']:,}",
                      f"{x['train_tok_s']:,.0f}", f"{x['forward_tok_s']:,.0f}")
    for what in ('train', 'forward'):
        pairs = zip(rates['all rows'][what], rates['shrunk'][what])
        result[f"ratio_{what}"] = median(b / a for a, b in pairs)
    Console(width=120).print(table)
    print(f"largest difference of a logit: {different:.1e}; shrunk is {result['ratio_train']:.2f} times as fast in "
          f"training, {result['ratio_forward']:.2f} times forward")
    print(json.dumps(result))

if __name__ == '__main__':
    main()
