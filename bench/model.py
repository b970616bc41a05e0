"""
how fast is the model, and where does the time go?

  python bench/model.py                       train and decode tokens/s, memory, GFLOP/s or MFU: mixers x sizes x lengths, in turn
  python bench/model.py --quickstart          the quickstart's training step, module by module
  python bench/model.py --quickstart --against 7efbe0a      and the same of an older commit, in turn with it; --compiled adds torch.compile
  python bench/model.py --packed              packed rows from the loader, as a speedrun trains on (bench/gpu.sh)

flops are those that the mathematics needs: 6 a weight and token, causal attention half of the square, only within documents.
15 minutes on 2 cpu cores for the first, 2 for the second. last line: json
"""
import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

from nanoarc import train
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.model import Model, ModelConfig

PEAK = {'H100': 989, 'H200': 989, 'A100': 312, 'L4': 121, 'RTX 4090': 165, 'T4': 65} # TFLOP/s of dense bf16 (T4: fp16), from the vendor's sheets
SMALL = dict(data='arc1/training', adapt='arc1/evaluation*8', max_pair=100) # what the quickstart trains on

def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

def ceiling(device, dtype):
    """ FLOP/s of a large matrix product, the most that one can hope for """
    n = 8192 if device.type == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        sync()
        start = time.perf_counter()
        a @ b
        sync()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / median(times[3:])

def flops(model, doc):
    """ of a training step on documents (B, T), forward and backward """
    cfg = model.cfg
    lengths = torch.cat([torch.bincount(row[row >= 0]) for row in doc.cpu().long()]).double()
    tokens = float(lengths.sum())
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith('w')) # embeddings multiply nothing
    mixers = 0.0 # forward
    for kind in cfg.kinds:
        if kind == 'M':
            inner = cfg.expand * cfg.n_embd
            mixers += tokens * (min(cfg.chunk_size, doc.size(1)) * (cfg.d_state + inner) + 4 * inner * cfg.d_state)
        else:
            seen = lengths * (lengths + 1) / 2 # pairs of tokens
            if kind == 'S':
                seen = torch.where(lengths > cfg.window, cfg.window * lengths - cfg.window * (cfg.window - 1) / 2, seen)
            mixers += float(seen.sum()) * 4 * cfg.n_embd
    return cfg.loops * (6 * weights * tokens + 3 * mixers)

class Run:
    """ a model and its optimizers, for training steps on given batches """

    def __init__(self, cfg, device, autocast, compiled=False, lr=1e-4):
        torch.manual_seed(1337)
        self.model, self.autocast = Model(cfg).to(device), autocast
        self.optimizers = self.model.optimizers(lr, lr, 0.1)
        for block in self.model.blocks if compiled else ():
            block.compile()

    def step(self, batches):
        for batch in batches:
            with self.autocast():
                loss = self.model(*batch)[1]
            (loss / 1000).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def seconds(self, batches):
        sync()
        start = time.perf_counter()
        self.step(batches)
        sync()
        return time.perf_counter() - start

def long_batch(B, T, device):
    """ rows of one document, no prompt: idx, targets, pos, doc """
    idx = torch.randint(0, 14, (B, T), device=device)
    place = torch.arange(T, device=device)
    pos = torch.stack([place // 31 % 31, place % 31, place // 961], -1).to(torch.uint8).expand(B, T, 3)
    return idx, idx.roll(-1, 1), pos, torch.zeros(B, T, dtype=torch.int32, device=device)

@torch.no_grad()
def decode_speed(model, B, T, autocast, tokens=32, filler=False):
    """ tokens/s of B prompts of T tokens that are gone on with. filler: half of them are half as long """
    device = model.device
    idx, _, pos, doc = long_batch(B, T, device)
    doc = (torch.arange(T, device=device) >= T // 2 * (torch.arange(B, device=device)[:, None] % 2)).int() if filler else None
    told = {'task': torch.zeros_like(idx), 'dihedral': torch.zeros_like(idx)} if model.cfg.n_task > 0 else {}
    last = {name: x[:, -1:] for name, x in {**told, **({'doc': doc} if filler else {})}.items()}
    cache = model.cache()
    with autocast():
        model(idx, pos=pos, doc=doc, **told, cache=cache)
        for i in range(tokens + 4):
            if i == 4:
                sync()
                start = time.perf_counter()
            model(idx[:, :1], pos=pos[:, -1:], **last, cache=cache)
        sync()
    return B * tokens / (time.perf_counter() - start)

def peak_memory(device):
    """ MB, of the device or of this process """
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def grid_cell(args):
    """ all mixers at one size and length, in turn -> list of results. with one mixer alone: its memory too """
    device, dtype, autocast = train.get_device(args.device, 'auto')
    top = ceiling(device, getattr(torch, dtype))
    n_layer, n_embd = map(int, args.sizes[0].split('x'))
    T = args.lengths[0]
    B = max(args.tokens // T, 1)
    batch = long_batch(B, T, device)
    forget_peak()
    empty = peak_memory(device)
    runs = {mixer: Run(ModelConfig(mixer=mixer, n_layer=n_layer, n_embd=n_embd, head_size=args.head_size, prefix=False), device, autocast, device.type == 'cuda') for mixer in args.mixers}
    for run in runs.values():
        run.step([batch])
    if args.memory:
        return [{'memory': peak_memory(device) - empty}]
    times = defaultdict(list)
    for _ in range(args.rounds):
        for mixer, run in runs.items():
            times[mixer].append(run.seconds([batch]))
    rows = []
    for mixer, run in runs.items():
        s, f = median(times[mixer]), flops(run.model, batch[3])
        rows.append({'mixer': mixer, 'size': args.sizes[0], 'T': T, 'train_tok_s': B * T / s, 'gflop_s': f / s / 1e9, 'of_ceiling': f / s / top,
                     'decode_tok_s': decode_speed(run.model.eval(), 32 if device.type == 'cuda' else 8, T, autocast)})
        rows[-1]['vs_A'] = median(a / b for a, b in zip(times['A'], times[mixer])) if 'A' in times else None
    return rows

def child(args, *extra):
    """ this script in a process of its own -> its last line, parsed """
    out = subprocess.run([sys.executable, __file__, '--child', '--device', args.device, '--rounds', str(args.rounds), '--tokens', str(args.tokens),
                          '--head_size', str(args.head_size), *extra], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])

def grid(args):
    print(f"{'mixer':6s} {'size':7s} {'T':>5s} {'train tok/s':>12s} {'x A':>5s} {'decode tok/s':>12s} {'GFLOP/s':>8s} {'of matmul':>9s} {'memory MB':>9s}")
    rows = []
    for size in args.sizes:
        for T in args.lengths:
            for row in child(args, '--sizes', size, '--lengths', str(T), '--mixers', *args.mixers):
                row |= child(args, '--sizes', size, '--lengths', str(T), '--mixers', row['mixer'], '--memory')[0]
                print(f"{row['mixer']:6s} {size:7s} {T:5d} {row['train_tok_s']:12,.0f} {row['vs_A'] or 0:5.2f} {row['decode_tok_s']:12,.0f} {row['gflop_s']:8,.0f} "
                      f"{row['of_ceiling']:9.0%} {row['memory']:9,.0f}", flush=True)
                rows.append(row)
    return rows

# -----------------------------------------------------------------------------
# the quickstart's step, by module

class Profile:
    """ wall time of training steps and of their parts. on cpu, where calls wait for their results """

    def __init__(self, args):
        cfg = train.TrainConfig()
        _, _, autocast = train.get_device('cpu', 'float32')
        self.micro = args.micro or cfg.grad_accum
        ds = ArcDataset(DataConfig(**SMALL, **({'batch_tokens': args.tokens} if args.micro else {})))
        model_cfg = ModelConfig(n_task=256) # enough, and the same for all
        lr = model_cfg.learning_rates(0, 0)[0] if hasattr(model_cfg, 'learning_rates') else cfg.lr # an older commit has them elsewhere
        self.loader, self.run = ArcLoader(ds), Run(model_cfg, 'cpu', autocast, args.compiled, lr)
        self.counts = hasattr(self.run.model.cfg, 'loops')
        self.seconds, self.since = defaultdict(float), {}

    def hooks(self):
        """ clocks around the modules -> handles to remove them """
        handles = []
        def add(kind, way, m):
            self.seconds[f"{kind} {way}"] += time.perf_counter() - self.since[m]
        for name, m in self.run.model.named_modules():
            last = name.rpartition('.')[2]
            if last in ('norm1', 'norm2', 'mixer', 'mlp', 'head') or name == 'norm':
                kind = type(m).__name__ if last == 'mixer' else 'norms' if 'norm' in last else last
                handles += [m.register_forward_pre_hook(lambda m, _: self.since.update({m: time.perf_counter()})),
                            m.register_forward_hook(lambda m, *_, kind=kind: add(kind, 'forward', m)),
                            m.register_full_backward_pre_hook(lambda m, _: self.since.update({m: time.perf_counter()})),
                            m.register_full_backward_hook(lambda m, *_, kind=kind: add(kind, 'backward', m))]
        return handles

    def steps(self, n, parts):
        """ -> seconds, tokens, useful tokens, FLOPs of n steps, and with parts seconds by part, which costs a little """
        self.seconds.clear()
        handles = self.hooks() if parts else []
        start, tokens, useful, optimizer, data, work = time.perf_counter(), 0, 0, 0.0, 0.0, 0.0
        for _ in range(n):
            for _ in range(self.micro):
                t = time.perf_counter()
                batch = self.loader.next_batch()
                data += time.perf_counter() - t
                tokens += batch.idx.numel()
                useful += int((batch.doc >= 0).sum())
                (self.run.model(*batch)[1] / 1000).backward()
                work += flops(self.run.model, batch.doc) if self.counts else 0
            t = time.perf_counter()
            for opt in self.run.optimizers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            optimizer += time.perf_counter() - t
        total = time.perf_counter() - start
        for handle in handles:
            handle.remove()
        found = {**self.seconds, 'optimizers': optimizer, 'loader': data}
        return {'seconds': total, 'tokens': tokens, 'useful': useful, 'flops': work, 'steps': n, 'parts': {**found, 'the rest': total - sum(found.values())}}

def serve(args):
    """ a line in: so many steps, and whether by part. a line out: how long they took """
    start, profile = time.perf_counter(), Profile(args)
    profile.steps(10, False)
    print(json.dumps({'ready': time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        n, parts = map(int, line.split())
        print(json.dumps(profile.steps(n, bool(parts))), flush=True)

def quickstart(args):
    """ this tree, an older commit and the compiled model take turns. the older one too with steps as they are now, and now as they were """
    train.get_device('cpu', 'float32') # the ceiling is that of the same library
    root, old, servers = Path(__file__).parent.parent, tempfile.mkdtemp(), {}
    try:
        names = {'now': ([], None)}
        if args.against:
            subprocess.run(['git', 'worktree', 'add', '--quiet', '--detach', '--force', old, args.against], check=True, cwd=root)
            names |= {'then': ([], old), 'now, 4 x 512': (['--micro', '4', '--tokens', '512'], None), 'then, 1 x 2048': (['--micro', '1', '--tokens', '2048'], old)}
        if args.compiled:
            names['compiled'] = ['--compiled'], None
        for name, (flags, path) in names.items():
            env = {**os.environ, 'PYTHONPATH': path or str(root)}
            servers[name] = subprocess.Popen([sys.executable, __file__, '--serve', *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            print(f"{name}: ready after {json.loads(servers[name].stdout.readline())['ready']:.1f} s, 10 steps among them", flush=True)
        results, top = defaultdict(list), []
        for i in range(2 * args.rounds): # first for the speed, then for the parts
            top.append(ceiling(torch.device('cpu'), torch.float32))
            for name, server in servers.items():
                server.stdin.write(f"20 {int(i >= args.rounds)}\n")
                server.stdin.flush()
                results[name].append(json.loads(server.stdout.readline()))
    finally:
        for server in servers.values():
            server.kill()
        if args.against:
            subprocess.run(['git', 'worktree', 'remove', '--force', old], cwd=root)
    summary = {'ceiling_gflop_s': median(top) / 1e9}
    for name, rounds in results.items():
        speed, parts = rounds[: args.rounds], rounds[args.rounds :]
        summary[name] = {'tok_s': median(r['tokens'] / r['seconds'] for r in speed), 'useful_tok_s': median(r['useful'] / r['seconds'] for r in speed),
                         'gflop_s': median(r['flops'] / r['seconds'] for r in speed) / 1e9,
                         'now_is_faster_by': median(a['useful'] / a['seconds'] / b['useful'] * b['seconds'] for a, b in zip(results['now'], speed))}
        print(f"\n{name}: {summary[name]['tok_s']:,.0f} tokens/s, {summary[name]['useful_tok_s']:,.0f} of them useful; now is {summary[name]['now_is_faster_by']:.2f} times as fast; "
              f"milliseconds a step of {rounds[0]['tokens'] / rounds[0]['steps']:,.0f} tokens:")
        for part in parts[0]['parts'] if name != 'compiled' else ():
            ms = median(1000 * r['parts'].get(part, 0) / r['steps'] for r in parts)
            print(f"  {part:20s} {ms:6.1f}  {median(r['parts'].get(part, 0) / r['seconds'] for r in parts):6.1%}")
    print(f"\nthe matmul ceiling is {summary['ceiling_gflop_s']:.0f} GFLOP/s, the step does {summary['now']['gflop_s']:.0f}: {summary['now']['gflop_s'] / summary['ceiling_gflop_s']:.0%}")
    return summary

def show_kernels(what, n, f, device):
    """ where the time of n steps of f() goes: their dearest kernels, and for how much of it the device has anything to do """
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')) as p:
        start = time.perf_counter()
        f()
        sync()
        seconds = time.perf_counter() - start
    events = [e for e in p.key_averages() if device.type != 'cuda' or (e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)] # kernels, not the calls that launch them
    key = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    busy = sum(getattr(e, key) for e in events) / 1e6
    print(f"{what} takes {1e3 * seconds / n:.1f} ms under the profiler, the device is at work for {busy / seconds:.0%} of it; the rest is waiting for python")
    for e in sorted(events, key=lambda e: -getattr(e, key))[:12]:
        print(f"  {getattr(e, key) / 1e3 / n:8.2f} ms  {e.count / n:6.0f} times  {e.key[:110]}")

def decoding(model, device, autocast, T=256, steps=32):
    """ what a step of decoding takes, by the number of prompts of several lengths; then the kernels of the last """
    model.eval()
    for B in (64, 512, 2048) if device.type == 'cuda' else (8, 64):
        print(f"decoding {B} prompts of up to {T} tokens: {1e3 * B / decode_speed(model, B, T, autocast, steps, filler=True):.1f} ms a step")
    show_kernels(f"a step of decoding {B} prompts, their reading among it,", steps + 4, lambda: decode_speed(model, B, T, autocast, steps, filler=True), device)

def packed(args):
    """ packed rows from the loader, mixers and kernels in turn """
    device, dtype, autocast = train.get_device(args.device, 'auto')
    n_layer, n_embd = map(int, args.sizes[0].split('x'))
    T = args.lengths[0]
    ds = ArcDataset(DataConfig(data='arc1/training', adapt='arc1/evaluation', batching='pack', drop_overlap=True, block_size=T, batch_tokens=args.tokens))
    loader, top = ArcLoader(ds, device=device), ceiling(device, getattr(torch, dtype))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'
    peak = next((1e12 * x for key, x in PEAK.items() if re.search(rf"\b{key}\b", name)), float('nan'))
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    what = [name, dtype, args.sizes[0], T, args.tokens, args.head_size, commit]
    batches = [train.fill_rows(type(b)(*(x.clone() for x in b)), args.tokens // T) for b in (loader.next_batch() for _ in range(4))]
    rows, out = [], Path(os.environ.get('OUT', 'out')) / 'bench_packed.jsonl'
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(x) for x in out.read_text().splitlines()] if out.is_file() else []
    for mixer, kernel in ((m, k) for m in args.mixers for k in (args.kernels if 'M' in m else ['torch'])):
        row = next((r for r in done if (r['mixer'], r['kernel'], r['what']) == (mixer, kernel, what)), None) # from a run that was cut off
        if row is None:
            cfg = ModelConfig(mixer=mixer, n_layer=n_layer, n_embd=n_embd, head_size=args.head_size, kernel=kernel, n_task=len(ds.sampler.rows))
            forget_peak()
            start = time.perf_counter()
            run = Run(cfg, device, autocast, device.type == 'cuda')
            run.step(batches[:2])
            ready = time.perf_counter() - start
            times = [(run.seconds([batch]), flops(run.model, batch.doc), int((batch.doc >= 0).sum())) for _ in range(args.rounds) for batch in batches][len(batches):]
            row = {'mixer': mixer, 'kernel': kernel, 'tok_s': median(n / s for s, _, n in times), 'mfu': median(f / s for s, f, _ in times) / peak,
                   'of_matmul': median(f / s for s, f, _ in times) / top, 'memory_mb': peak_memory(device), 'ready_s': ready, 'what': what}
            with open(out, 'a') as f:
                f.write(json.dumps(row) + "\n")
            if args.profile:
                show_kernels("a training step", len(batches), lambda: [run.step([batch]) for batch in batches], device)
                decoding(run.model, device, autocast)
            del run
        rows.append(row)
    print(f"{name}, {dtype}, {args.sizes[0]}, rows of {T}, {args.tokens} tokens a step, {commit}; matmul ceiling {top / 1e12:.2f} TFLOP/s, peak {peak / 1e12:.0f}")
    for r in rows:
        print(f"{r['mixer']:6s} {r['kernel']:7s} {r['tok_s']:12,.0f} tok/s  MFU {r['mfu']:6.1%}  of matmul {r['of_matmul']:6.1%}  {r['memory_mb']:8,.0f} MB  ready after {r['ready_s']:.0f} s")
    return rows

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--mixers', nargs='+', default=['A', 'M', 'MA', 'MS'])
    parser.add_argument('--sizes', nargs='+', default=['2x64', '4x128', '8x256'], help="layers x width")
    parser.add_argument('--lengths', type=int, nargs='+', default=[512, 2048, 8192])
    parser.add_argument('--tokens', type=int, default=8192, help="of a step")
    parser.add_argument('--head_size', type=int, default=32)
    parser.add_argument('--kernels', nargs='+', default=['torch'])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--quickstart', action='store_true')
    parser.add_argument('--against', default='', help="a commit")
    parser.add_argument('--compiled', action='store_true')
    parser.add_argument('--packed', action='store_true')
    parser.add_argument('--profile', action='store_true', help="with --packed: the dearest kernels of a step")
    parser.add_argument('--micro', type=int, default=0, help="micro batches of --tokens each, 0 = as train does")
    for name in ('child', 'memory', 'serve'): # for this script itself
        parser.add_argument(f"--{name}", action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    print(json.dumps(grid_cell(args) if args.child else quickstart(args) if args.quickstart else packed(args) if args.packed else grid(args)))

if __name__ == '__main__':
    main()
