"""
what a training step asks of a gpu, without a clock: bash bench/gpu_static.sh. a model and its optimizers as
bench/model.py has them, bf16, blocks compiled, on packed rows from the loader.

  launches, waits   of a step's parts, and of --steps steps. where a stand-in for the CUDA libraries is loaded
                    (LD_PRELOAD) and exports phantom_count, from that, on a card from torch.profiler
  graphs            of torch.compile, and how many more there are after --steps batches
  GB of a layer     what the kernels of its graphs read and write, by inductor's sizes of their buffers
  kernels           the five largest that triton compiled: registers and stack of a thread, by cuobjdump from the
                    cubins, of each variant that inductor chooses from by time. stack is what has no register
  host ms           cpu time of a step, median
  roofline ms       of each kernel its products at 650 TFLOP/s or its bytes at 4.0 TB/s, whichever takes longer, and
                    2 us a launch. attention: the blocks of 128 x 128 that it touches at 225 TFLOP/s, a guess. what is
                    not compiled counts op by op

$OUT has a .json for each model, --table prints them all. --decode N: a step of decoding, all of it op by op.
"""
import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS, MEMORY, ATTENTION, LAUNCH = 650e12, 4.0e12, 225e12, 2e-6 # FLOP/s, bytes/s, FLOP/s, seconds
OUT = Path(os.environ.get('OUT', 'out/gpu_static'))

def roofline(flops, nbytes):
    return max(flops / PRODUCTS, nbytes / MEMORY)

class Eager(TorchDispatchMode):
    """ counts seconds, by the roofline, of what runs op by op """

    def __init__(self, device='cuda'):
        super().__init__()
        self.device = device # what is thought on the cpu, as in decoding, does not count
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or 'empty' in func.name():
            return out
        written = args[0] if out is None else out # in place
        touched = [x for x in tree_leaves((args, kwargs, written)) if isinstance(x, torch.Tensor)]
        if all(x.device.type != self.device for x in touched):
            return out
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.seconds += roofline(flops, sum(x.numel() * x.element_size() for x in touched))
        return out

def record_graphs():
    """ -> a list, to which each graph that inductor compiles from now on is added """
    from torch._inductor.graph import GraphLowering
    found, plain = [], GraphLowering.compile_to_module
    def compile_to_module(graph):
        module = plain(graph)
        row = Counter(kernels=len(graph.scheduler.nodes))
        for node in graph.scheduler.nodes:
            nbytes = node.get_read_write_buffers_sizes()
            row['bytes'] += nbytes
            row['seconds'] += roofline(node.estimate_flops() or 0, nbytes)
        found.append((graph.is_backward, row))
        return module
    GraphLowering.compile_to_module = compile_to_module
    return found

def of_layers(graphs, kinds):
    """ graphs as they were compiled -> {'A forward': row, ...}. layers of a kind share theirs """
    rows = {}
    for is_backward, part in ((False, 'forward'), (True, 'backward')):
        names = [f"{kind} {part}" for kind in dict.fromkeys(kinds[::-1] if is_backward else kinds)]
        mine = [row for back, row in graphs if back == is_backward]
        assert len(mine) == len(names), f"{len(mine)} graphs for {names}"
        rows |= zip(names, mine)
    return rows

def count(f):
    """ -> what f() returns, launches, waits for the device """
    stand_in = getattr(ctypes.CDLL(None), 'phantom_count', None)
    if stand_in:
        stand_in.restype = ctypes.c_long
        launches, waits = stand_in(0), stand_in(1)
        return f(), stand_in(0) - launches, stand_in(1) - waits
    with torch.profiler.profile() as p:
        result = f()
    n = Counter({e.key: e.count for e in p.key_averages()})
    launches = sum(k for name, k in n.items() if re.match(r"cu(da)?(Launch|Memset)", name))
    return result, launches, n['cudaStreamSynchronize'] + n['cudaEventSynchronize'] + n['cudaMemcpy']

def kernels(folder, n=5):
    """ the n with the largest cubins in it -> {name: [(registers, stack) of each variant]} """
    import triton
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    cubins = sorted(folder.rglob('*.cubin'), key=lambda path: -path.stat().st_size)
    found = {path.stem: [] for path in cubins}
    for path in cubins:
        if path.stem in list(found)[:n]:
            said = subprocess.run([tool, '-res-usage', path], capture_output=True, text=True, check=True).stdout
            found[path.stem].append([int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", said).groups()])
    return dict(list(found.items())[:n])

def measure(args, folder):
    """ -> what is known of one model """
    import model as bench

    from nanoarc import run, train
    from nanoarc.data import ArcDataset, ArcLoader, DataConfig
    from nanoarc.model import ModelConfig
    device, _, autocast = run.get_device('cuda', 'auto')
    ds = ArcDataset(DataConfig(data='arc1/training', adapt='arc1/evaluation', batching='pack', drop_overlap=True,
                               block_size=4096, batch_tokens=args.tokens))
    loader, graphs = ArcLoader(ds, device=device), record_graphs()
    step = bench.Run(ModelConfig(mixer=args.mixer, frames='', head_size=64, n_task=len(ds.rows),
                                 **bench.parse_size(args.size)), device, autocast, True)
    batches = [train.fill_rows(loader.next_batch(), args.tokens // 4096) for _ in range(args.steps)]
    compiled, host = torch._dynamo.utils.counters['stats'], []
    def steps():
        for batch in batches:
            start = time.process_time()
            step.step([batch])
            host.append(1e3 * (time.process_time() - start))
    step.step(batches[:1])
    first = compiled['unique_graphs']
    waits = count(steps)[2]
    host.clear()
    steps() # without a profiler
    def forward():
        with autocast():
            return step.model(*batches[0])[1]
    loss, *n = count(forward)
    launches = {'forward': n[0], 'backward': count(loss.backward)[1]}
    with Eager() as eager:
        for optimizer in step.optimizers:
            launches[type(optimizer).__name__] = count(optimizer.step)[1]
        step.model.blocks, blocks = nn.ModuleList(), step.model.blocks
        forward().backward()
    step.model.blocks = blocks
    layers = of_layers(graphs, step.model.cfg.kinds)
    docs = [batch.doc.cpu() for batch in batches]
    parts = estimate(step.model.cfg, layers, docs, eager.seconds, sum(launches.values()))
    seconds = sum(parts.values()) / 1e3
    mfu = mean(bench.flops(step.model, doc) for doc in docs) / seconds / (1e12 * bench.PEAK['H200'])
    return {'size': args.size, 'mixer': args.mixer, 'launches': launches, 'waits': waits, 'graphs': first,
            'recompiles': compiled['unique_graphs'] - first, 'layers': layers, 'host_ms': median(host),
            'kernels': kernels(folder / 'triton'), 'parts_ms': parts, 'mfu': mfu}

def measure_decoding(args, prompt=930, steps=60):
    """ -> of a step that adds a token to each of args.decode answers, after prompts of so many tokens """
    import model as bench

    from nanoarc import run
    from nanoarc.decode import decode
    from nanoarc.grids import OUT as END_OF_PROMPT
    from nanoarc.model import Model, ModelConfig
    device, _, autocast = run.get_device('cuda', 'auto')
    model = Model(ModelConfig(mixer=args.mixer, frames='', head_size=64, n_task=800, **bench.parse_size(args.size)))
    model = model.to(device).eval()
    idx = torch.zeros(args.decode, prompt, dtype=torch.int64, device=device)
    idx[:, -1] = END_OF_PROMPT
    row = torch.zeros(args.decode, dtype=torch.int64, device=device)
    pos = torch.zeros(*idx.shape, 3, dtype=torch.uint8, device=device)
    doc = torch.ones(idx.shape, dtype=torch.int32, device=device)
    doc[:, :5] = 0 # filler
    def go(most):
        with autocast():
            return decode(model, idx, pos, row, row.to(torch.uint8), doc, most=most)
    def cost(most):
        _, launches, waits = count(lambda: go(most))
        with Eager() as eager:
            go(most)
        return launches, waits, eager.seconds
    go(3) # warms up
    few, many = cost(3), cost(3 + steps)
    launches, waits, seconds = ((b - a) / steps for a, b in zip(few, many))
    return {'launches': launches, 'waits': waits, 'bytes_ms': 1e3 * seconds, 'launches_ms': 1e3 * LAUNCH * launches}

def estimate(cfg, layers, docs, not_compiled, launches):
    """ -> milliseconds of a step, by the roofline, of its parts """
    from nanoarc.model import BLOCK, make_mask
    blocks, touched = 0.0, []
    for name, graph in layers.items():
        blocks += cfg.kinds.count(name[0]) * graph['seconds']
    for doc in docs:
        mask = make_mask(torch.empty(*doc.shape, 1), 0, doc, 0, 'flex')
        touched.append(float((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()))
    flops = mean(touched) * BLOCK ** 2 * cfg.n_embd * 4 # of a layer, forward. backward 2.5 times that
    attention = cfg.kinds.count('A') * 3.5 * flops / ATTENTION
    return {'blocks': 1e3 * blocks, 'attention': 1e3 * attention, 'not compiled': 1e3 * not_compiled,
            'launches': 1e3 * LAUNCH * launches}

def print_table(rows):
    print("| model | launches: forward, backward, Muon, AdamW | waits | graphs, more later | GB of a layer, forward + "
          "backward | host ms | roofline ms: blocks, attention, not compiled, launches | MFU |\n" + "|---" * 8 + "|")
    for row in rows:
        gb = {name: f"{graph['bytes'] / 1e9:.1f}" for name, graph in row['layers'].items()}
        moved = [f"`{kind}` {gb[f'{kind} forward']} + {gb[f'{kind} backward']}" for kind in row['mixer']]
        n, ms = row['launches'].values(), row['parts_ms'].values()
        print(f"| `{row['mixer']}` {row['size']} | {sum(n)}: {', '.join(map(str, n))} | {row['waits']} | "
              f"{row['graphs']}, {row['recompiles']} | {', '.join(moved)} | {row['host_ms']:.1f} | "
              f"{sum(ms):.1f}: {', '.join(f'{x:.1f}' for x in ms)} | {row['mfu']:.0%} |")
    for row in rows:
        print(f"\n`{row['mixer']}` {row['size']}, the largest kernels, registers and bytes of stack of their variants:")
        for name, variants in row['kernels'].items():
            print(f"  {'; '.join(f'{registers}, {stack}' for registers, stack in sorted(variants))}: {name[:80]}")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', default='8x512', help="layers x width")
    parser.add_argument('--mixer', default='A')
    parser.add_argument('--tokens', type=int, default=32768, help="of a step")
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--decode', type=int, default=0, metavar='N', help="N answers by a token, in place of a step")
    parser.add_argument('--table', action='store_true', help="of what is in $OUT")
    args = parser.parse_args()
    if args.table:
        return print_table([json.loads(path.read_text()) for path in sorted(OUT.glob('*.json'))])
    if not torch.cuda.is_available():
        print("bench/gpu_static.py: no CUDA here. want a torch that is built for it, and a card or a stand-in for its "
              "libraries", file=sys.stderr)
        return 2
    if args.decode:
        row = measure_decoding(args)
        print(f"{args.mixer} {args.size}, {args.decode} answers:", {name: round(x, 2) for name, x in row.items()})
        return None
    folder = OUT / f"{args.size}.{args.mixer}"
    shutil.rmtree(folder, ignore_errors=True) # what was compiled before is not of this
    os.environ |= {'TRITON_CACHE_DIR': str(folder / 'triton'), 'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor')}
    row = measure(args, folder)
    (OUT / f"{folder.name}.json").write_text(json.dumps(row))
    print(f"{args.mixer} {args.size}: counted", flush=True)

if __name__ == '__main__':
    sys.exit(main())
