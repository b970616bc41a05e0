"""
attention and decoding alone, the first that runs/card.sh asks a card: python bench/card.py [--size 8x512] [--rounds 20]

attention on packed rows of 4096, forward and backward, with the options of nanoarc.model and with torch's own, and how
far from fp64; a step of decoding 333 prompts with cuDNN's attention, which nanoarc turns off, and without. a minute on
an H100, most of it compiling. last line: json
"""
import argparse
import json
import time
from statistics import median

import torch
from model import clock, parse_size, sync

from nanoarc import model as nano, train
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.decode import decode

def fp64(q, k, v, doc):
    """ attention of two heads of the first row by its definition, on cpu """
    q, k, v = (x[:1, :2].cpu().double() for x in (q, k, v))
    ok = (doc[0, :, None] == doc[0]).cpu().tril()
    att = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~ok, float('-inf'))
    return att.softmax(-1) @ v

def attention(doc, heads, rounds):
    """ doc (B, T) -> list of results, one a way """
    B, T = doc.shape
    q, k, v, g = torch.randn(4, B, heads, T, 64, device=doc.device, dtype=torch.bfloat16).unbind()
    mask = nano.make_mask(q[:, 0], 0, doc, 0, 'flex')
    want = fp64(q, k, v, doc)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    rows, ours = [], nano.FORWARD
    for name, options in (("nanoarc's options", ours), ("torch's options", {})):
        nano.FORWARD = options
        there, back = [], []
        for i in range(rounds + 3):
            start = time.perf_counter()
            y = nano.attend(q, k, v, mask)
            sync()
            middle = time.perf_counter()
            y.backward(g)
            sync()
            if i >= 3: # the first ones compile
                there.append(1e3 * (middle - start))
                back.append(1e3 * (time.perf_counter() - middle))
        error = float((y[:1, :2].detach().cpu() - want).norm() / want.norm())
        rows.append({'way': name, 'forward_ms': median(there), 'backward_ms': median(back), 'error': error})
        print(f"attention, {name:17s} {median(there):7.3f} ms forward {median(back):7.3f} ms backward, "
              f"{error:.1e} from fp64", flush=True)
    nano.FORWARD = ours
    return rows

def decoding(mixer, size, device, autocast, B=333, T=900):
    """ -> list of results, with cuDNN and without """
    torch.manual_seed(1337)
    cfg = nano.ModelConfig(mixer=mixer, frames='', head_size=64, n_task=2, **parse_size(size))
    model = nano.Model(cfg).to(device).eval()
    idx, place = torch.randint(0, 10, (B, T), device=device), torch.arange(T, device=device)
    pos = torch.stack([place // 31 % 31, place % 31, 0 * place], -1).to(torch.uint8).repeat(B, 1, 1)
    doc = (place >= torch.randint(0, T - 20, (B, 1), device=device)).int()
    task = torch.zeros(B, dtype=torch.int64, device=device)
    def go(steps):
        with autocast():
            decode(model, idx, pos, task, task, doc, most=steps)
    rows = []
    for name, on, n in (('cuDNN', True, 12), ('no cuDNN', False, 60)):
        torch.backends.cuda.enable_cudnn_sdp(on)
        go(3)
        read = clock(go, 3)
        ms = 1e3 * (clock(go, 3 + n) - read) / n
        rows.append({'mixer': mixer, 'way': name, 'step_ms': ms, 'read_ms': 1e3 * read})
        print(f"decoding, {mixer:2s} {name:8s} {ms:7.1f} ms a step of {B}, {1e3 * read:.0f} ms until the third",
              flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', default='8x512')
    parser.add_argument('--rounds', type=int, default=20)
    args = parser.parse_args()
    device, _, autocast = train.get_device('auto', 'auto')
    if device.type != 'cuda':
        raise SystemExit("bench/card.py: no cuda here, and without it there is nothing to measure")
    ds = ArcDataset(DataConfig(data='arc1/training', adapt='arc1/evaluation', batching='pack', drop_overlap=True,
                               block_size=4096, batch_tokens=32768))
    doc = train.fill_rows(ArcLoader(ds, device=device).next_batch(), 8).doc
    rows = attention(doc, parse_size(args.size)['n_embd'] // 64, args.rounds)
    for mixer in ('A', 'MA'):
        rows += decoding(mixer, args.size, device, autocast)
    print(json.dumps(rows))

if __name__ == '__main__':
    main()
