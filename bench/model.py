"""
how fast is the model, and where does the time go?

  python bench/model.py                       train and decode tokens/s, memory, GFLOP/s: mixers x sizes x lengths
  python bench/model.py --quickstart          the quickstart's training step, module by module
  python bench/model.py --quickstart --against 7efbe0a      in turn with an older commit; --compiled: with torch.compile
  python bench/model.py --packed              packed rows from the loader, as a speedrun trains on (bench/gpu.sh)

what is compared takes turns, so that a busy machine is unfair to nobody. flops are those that the mathematics needs:
6 a weight and token, causal attention half of the square, only within documents. 15 minutes on 2 cpu cores for the
first, 2 for the second. last line: json
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
from inspect import signature
from pathlib import Path
from statistics import median

import torch

from nanoarc import train
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.model import Model, ModelConfig

# TFLOP/s of dense bf16 (T4: fp16), from the vendor's sheets
PEAK = {'H100': 989, 'H200': 989, 'A100': 312, 'L4': 121, 'RTX 4090': 165, 'T4': 65}
SMALL = dict(data='arc1/training', adapt='arc1/evaluation*8', max_pair=100) # what the quickstart trains on

def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

def clock(f, *args):
    """ seconds that f takes, until the device is done """
    sync()
    start = time.perf_counter()
    f(*args)
    sync()
    return time.perf_counter() - start

def ceiling(device, dtype):
    """ FLOP/s of a large matrix product, the most that one can hope for """
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = [clock(torch.mm, a, b) for _ in range(10)]
    return 2 * n**3 / median(times[3:])

def flops(model, doc):
    """ of a training step on documents (B, T), forward and backward """
    cfg = model.cfg
    lengths = torch.cat([torch.bincount(row[row >= 0]) for row in doc.cpu().long()]).double()
    tokens = float(lengths.sum())
    weights = 0
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith('w'): # embeddings multiply nothing
            weights += p.numel()
    mixers = 0.0 # forward
    for kind in cfg.kinds:
        if kind == 'M':
            inner = cfg.expand * cfg.n_embd
            chunk = min(cfg.chunk_size, doc.size(1))
            mixers += tokens * (chunk * (cfg.d_state + inner) + 4 * inner * cfg.d_state)
        else:
            seen = lengths * (lengths + 1) / 2 # pairs of tokens
            if kind == 'S':
                w = cfg.window
                seen = torch.where(lengths > w, w * lengths - w * (w - 1) / 2, seen)
            mixers += float(seen.sum()) * 4 * cfg.n_embd
    return cfg.loops * (6 * weights * tokens + 3 * mixers)

class Run:
    """ a model and its optimizers, for training steps on given batches """

    def __init__(self, cfg, device, autocast, compiled=False, lr=1e-4):
        torch.manual_seed(1337)
        self.model = Model(cfg).to(device)
        self.autocast = autocast
        self.optimizers = self.model.optimizers(lr, lr, 0.1)
        if compiled:
            for block in self.model.blocks:
                block.compile()

    def backward(self, batch):
        with self.autocast():
            loss = self.model(*batch)[1]
        (loss / 1000).backward()

    def update(self):
        for optimizer in self.optimizers:
            with self.autocast():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def step(self, batches):
        for batch in batches:
            self.backward(batch)
        self.update()

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
    idx, _, pos, _ = long_batch(B, T, device)
    told = {}
    if model.cfg.n_task > 0:
        told = {'task': torch.zeros_like(idx), 'dihedral': torch.zeros_like(idx)}
    if filler:
        begins = T // 2 * (torch.arange(B, device=device)[:, None] % 2)
        told['doc'] = (torch.arange(T, device=device) >= begins).int()
    last = {name: x[:, -1:] for name, x in told.items()}
    cache = model.cache()
    with autocast():
        model(idx, pos=pos, **told, cache=cache)
        for i in range(tokens + 4):
            if i == 4: # the first ones warm up
                sync()
                start = time.perf_counter()
            model(idx[:, :1], pos=pos[:, -1:], **last, cache=cache)
        sync()
    return B * tokens / (time.perf_counter() - start)

def peak_memory(device):
    """ MB, of the device or of this process """
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def parse_size(size):
    """ e.g. '4x128' -> settings of a ModelConfig """
    n_layer, n_embd = map(int, size.split('x'))
    return {'n_layer': n_layer, 'n_embd': n_embd}

# -----------------------------------------------------------------------------
# mixers x sizes x lengths, each in a process of its own: memory is that of a process

def grid_cell(args):
    """ all mixers at one size and length, in turn -> list of results. --memory, with one mixer alone: that """
    device, dtype, autocast = train.get_device(args.device, 'auto')
    on_cuda = device.type == 'cuda'
    T = args.lengths[0]
    B = max(args.tokens // T, 1)
    batch = long_batch(B, T, device)
    top = ceiling(device, getattr(torch, dtype))
    forget_peak()
    empty = peak_memory(device)
    runs = {}
    for mixer in args.mixers:
        cfg = ModelConfig(mixer=mixer, frames='', head_size=args.head_size, **parse_size(args.sizes[0]))
        runs[mixer] = Run(cfg, device, autocast, on_cuda)
        runs[mixer].step([batch])
    if args.memory:
        return [{'memory': peak_memory(device) - empty}]
    times = defaultdict(list)
    for _ in range(args.rounds):
        for mixer, run in runs.items():
            times[mixer].append(clock(run.step, [batch]))
    rows = []
    for mixer, run in runs.items():
        seconds = median(times[mixer])
        speed = flops(run.model, batch[3]) / seconds
        row = {'mixer': mixer, 'size': args.sizes[0], 'T': T, 'train_tok_s': B * T / seconds,
               'gflop_s': speed / 1e9, 'of_ceiling': speed / top,
               'decode_tok_s': decode_speed(run.model.eval(), 32 if on_cuda else 8, T, autocast), 'vs_A': None}
        if 'A' in times:
            row['vs_A'] = median(a / b for a, b in zip(times['A'], times[mixer]))
        rows.append(row)
    return rows

def child(args, *extra):
    """ this script in a process of its own -> its last line, parsed """
    command = [sys.executable, __file__, '--child', '--device', args.device, '--rounds', str(args.rounds),
               '--tokens', str(args.tokens), '--head_size', str(args.head_size), *extra]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])

def grid(args):
    print(f"{'mixer':6s} {'size':7s} {'T':>5s} {'train tok/s':>12s} {'x A':>5s} {'decode tok/s':>12s} {'GFLOP/s':>8s} "
          f"{'of matmul':>9s} {'memory MB':>9s}")
    rows = []
    for size in args.sizes:
        for T in args.lengths:
            where = '--sizes', size, '--lengths', str(T)
            for row in child(args, *where, '--mixers', *args.mixers):
                row |= child(args, *where, '--mixers', row['mixer'], '--memory')[0]
                print(f"{row['mixer']:6s} {size:7s} {T:5d} {row['train_tok_s']:12,.0f} {row['vs_A'] or 0:5.2f} "
                      f"{row['decode_tok_s']:12,.0f} {row['gflop_s']:8,.0f} {row['of_ceiling']:9.0%} "
                      f"{row['memory']:9,.0f}", flush=True)
                rows.append(row)
    return rows

# -----------------------------------------------------------------------------
# the quickstart's step, by module

def part_of(name, m):
    """ name of a module -> the part of a step that its time belongs to, '' = none, it lies within another """
    last = name.rpartition('.')[2]
    if last in ('norm1', 'norm2') or name == 'norm':
        return 'norms'
    if last == 'mixer':
        return type(m).__name__
    return last if last in ('mlp', 'head') else ''

class Profile:
    """ wall time of training steps and of their parts. on cpu, where calls wait for their results """

    def __init__(self, args):
        # a commit that knows no such word trains in float32
        trains = {'trains': True} if 'trains' in signature(train.get_device).parameters else {}
        _, _, autocast = train.get_device('cpu', 'auto', **trains)
        self.micro = args.micro or train.TrainConfig().grad_accum
        sizes = {'batch_tokens': args.tokens} if args.micro else {}
        self.loader = ArcLoader(ArcDataset(DataConfig(**SMALL, **sizes)))
        self.run = Run(ModelConfig(n_task=256), 'cpu', autocast, args.compiled) # rows enough, and the same for all
        self.parts = defaultdict(float) # seconds
        self.since = {}

    def hooks(self):
        """ clocks around the modules -> handles to remove them """
        def start(m, *_):
            self.since[m] = time.perf_counter()

        def stop(part):
            def add(m, *_):
                self.parts[part] += time.perf_counter() - self.since[m]
            return add

        handles = []
        for name, m in self.run.model.named_modules():
            part = part_of(name, m)
            if part:
                handles.append(m.register_forward_pre_hook(start))
                handles.append(m.register_forward_hook(stop(f"{part} forward")))
                handles.append(m.register_full_backward_pre_hook(start))
                handles.append(m.register_full_backward_hook(stop(f"{part} backward")))
        return handles

    def steps(self, n, by_part):
        """ what n steps took. with by_part there are clocks around the modules, which cost a little """
        self.parts.clear()
        handles = self.hooks() if by_part else []
        tokens, useful, work = 0, 0, 0.0
        begin = time.perf_counter()
        for _ in range(n):
            for _ in range(self.micro):
                t = time.perf_counter()
                batch = self.loader.next_batch()
                self.parts['loader'] += time.perf_counter() - t
                tokens += batch.idx.numel()
                useful += int((batch.doc >= 0).sum())
                work += flops(self.run.model, batch.doc)
                self.run.backward(batch)
            t = time.perf_counter()
            self.run.update()
            self.parts['optimizers'] += time.perf_counter() - t
        seconds = time.perf_counter() - begin
        for handle in handles:
            handle.remove()
        parts = {**self.parts, 'the rest': seconds - sum(self.parts.values())}
        return {'seconds': seconds, 'tokens': tokens, 'useful': useful, 'flops': work, 'steps': n, 'parts': parts}

def serve(args):
    """ a line in: so many steps, and whether by part. a line out: how long they took """
    start = time.perf_counter()
    profile = Profile(args)
    profile.steps(10, False)
    print(json.dumps({'ready': time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        n, by_part = map(int, line.split())
        print(json.dumps(profile.steps(n, bool(by_part))), flush=True)

class Server:
    """ this script with --serve, its package from `path` """

    def __init__(self, flags, path):
        env = {**os.environ, 'PYTHONPATH': str(path)}
        command = [sys.executable, __file__, '--serve', *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.ready = self.answer()['ready']

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def steps(self, n, by_part):
        self.process.stdin.write(f"{n} {int(by_part)}\n")
        self.process.stdin.flush()
        return self.answer()

def quickstart(args):
    """
    this tree, an older commit and the compiled model take turns. the older one too with steps as they are now, and now
    as they were
    """
    train.get_device('cpu', 'float32') # the ceiling is that of the same library
    root, old = Path(__file__).parent.parent, tempfile.mkdtemp()
    wanted = {'now': ([], root)}
    if args.against:
        command = ['git', 'worktree', 'add', '--quiet', '--detach', '--force', old, args.against]
        subprocess.run(command, check=True, cwd=root)
        wanted['then'] = [], old
        wanted['now, 4 x 512'] = ['--micro', '4', '--tokens', '512'], root
        wanted['then, 1 x 2048'] = ['--micro', '1', '--tokens', '2048'], old
    if args.compiled:
        wanted['compiled'] = ['--compiled'], root
    servers, speed, by_part, top = {}, defaultdict(list), defaultdict(list), []
    try:
        for name, (flags, path) in wanted.items():
            servers[name] = Server(flags, path)
            print(f"{name}: ready after {servers[name].ready:.1f} s, 10 steps among them", flush=True)
        for results in (speed, by_part):
            for _ in range(args.rounds):
                top.append(ceiling(torch.device('cpu'), torch.float32))
                for name, server in servers.items():
                    results[name].append(server.steps(20, results is by_part))
    finally:
        for server in servers.values():
            server.process.kill()
        if args.against:
            subprocess.run(['git', 'worktree', 'remove', '--force', old], cwd=root)
    return print_quickstart(speed, by_part, median(top))

def print_quickstart(speed, by_part, top):
    """ speed, by_part: {server: results of its rounds}, top: FLOP/s of a product -> a summary, for json """
    summary = {'ceiling_gflop_s': top / 1e9}
    for name, rounds in speed.items():
        faster = [a['useful'] / a['seconds'] / b['useful'] * b['seconds'] for a, b in zip(speed['now'], rounds)]
        summary[name] = row = {'now_is_faster_by': median(faster)}
        for key, of in (('tok_s', 'tokens'), ('useful_tok_s', 'useful'), ('gflop_s', 'flops')):
            row[key] = median(r[of] / r['seconds'] for r in rounds)
        row['gflop_s'] /= 1e9
        print(f"\n{name}: {row['tok_s']:,.0f} tokens/s, {row['useful_tok_s']:,.0f} of them useful; now is "
              f"{row['now_is_faster_by']:.2f} times as fast; milliseconds a step of "
              f"{rounds[0]['tokens'] / rounds[0]['steps']:,.0f} tokens:")
        if name == 'compiled': # its parts have melted together
            continue
        for part in by_part[name][0]['parts']:
            ms = median(1000 * r['parts'][part] / r['steps'] for r in by_part[name])
            share = median(r['parts'][part] / r['seconds'] for r in by_part[name])
            print(f"  {part:20s} {ms:6.1f}  {share:6.1%}")
    now = summary['now']['gflop_s']
    print(f"\nthe matmul ceiling is {top / 1e9:.0f} GFLOP/s, the step does {now:.0f}: {1e9 * now / top:.0%}")
    return summary

# -----------------------------------------------------------------------------
# packed rows

def show_kernels(what, n, f, device):
    """ where the time of n steps of f() goes: their dearest kernels, and how much of it the device has work """
    from torch.profiler import ProfilerActivity, profile
    on_cuda = device.type == 'cuda'
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities) as p:
        seconds = clock(f)
    kernels = [] # (seconds, times, name)
    for e in p.key_averages():
        if not on_cuda:
            kernels.append((e.self_cpu_time_total / 1e6, e.count, e.key))
        elif e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation: # no call that launches it
            kernels.append((e.self_device_time_total / 1e6, e.count, e.key))
    busy = sum(took for took, _, _ in kernels)
    print(f"{what} takes {1e3 * seconds / n:.1f} ms under the profiler, the device is at work for {busy / seconds:.0%} "
          "of it; the rest is waiting for python")
    for took, times, key in sorted(kernels, reverse=True)[:12]:
        print(f"  {1e3 * took / n:8.2f} ms  {times / n:6.0f} times  {key[:110]}")

def decoding(model, device, autocast, T=256, steps=32):
    """ what a step of decoding takes, by the number of prompts of several lengths; then the kernels of the last """
    model.eval()
    for B in (64, 512, 2048) if device.type == 'cuda' else (8, 64):
        ms = 1e3 * B / decode_speed(model, B, T, autocast, steps, filler=True)
        print(f"decoding {B} prompts of up to {T} tokens: {ms:.1f} ms a step")

    def again():
        decode_speed(model, B, T, autocast, steps, filler=True)

    show_kernels(f"a step of decoding {B} prompts, their reading among it,", steps + 4, again, device)

def packed_row(mixer, args, n_task, batches, device, autocast, peak, top):
    """ a model of this mixer trained on the batches, in turn -> what is measured """
    cfg = ModelConfig(mixer=mixer, frames=args.frames, head_size=args.head_size, n_task=n_task,
                      **parse_size(args.sizes[0]))
    forget_peak()
    start = time.perf_counter()
    run = Run(cfg, device, autocast, device.type == 'cuda')
    run.step(batches[:2])
    sync()
    ready = time.perf_counter() - start
    tok_s, flop_s = [], []
    for i in range(args.rounds):
        for batch in batches:
            seconds = clock(run.step, [batch])
            if i > 0:
                tok_s.append(int((batch.doc >= 0).sum()) / seconds)
                flop_s.append(flops(run.model, batch.doc) / seconds)
    row = {'mixer': mixer, 'tok_s': median(tok_s), 'mfu': median(flop_s) / peak, 'of_matmul': median(flop_s) / top,
           'memory_mb': peak_memory(device), 'ready_s': ready}
    if args.profile:
        def steps():
            for batch in batches:
                run.step([batch])
        show_kernels("a training step", len(batches), steps, device)
        decoding(Model(cfg).to(device), device, autocast) # not compiled, as solve has it: keys grow each step
    return row

def packed(args):
    """ packed rows from the loader, mixers in turn. results are kept in a file, of a run that was cut off too """
    device, dtype, autocast = train.get_device(args.device, 'auto')
    T = args.lengths[0]
    ds = ArcDataset(DataConfig(data='arc1/training', adapt='arc1/evaluation', batching='pack', drop_overlap=True,
                               block_size=T, batch_tokens=args.tokens))
    loader = ArcLoader(ds, device=device)
    batches = []
    for _ in range(4):
        batch = loader.next_batch() # lies in the loader's memory
        batches.append(train.fill_rows(batch._make(x.clone() for x in batch), args.tokens // T))
    top = ceiling(device, getattr(torch, dtype))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'
    peak = float('nan')
    for key, tflops in PEAK.items():
        if re.search(rf"\b{key}\b", name):
            peak = 1e12 * tflops
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    commit = git.stdout.strip()
    what = [name, dtype, args.sizes[0], T, args.tokens, args.head_size, args.frames, commit]
    out = Path(os.environ.get('OUT', 'out')) / 'bench_packed.jsonl'
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if out.is_file():
        for row in map(json.loads, out.read_text().splitlines()):
            if row['what'] == what:
                done[row['mixer']] = row
    for mixer in args.mixers:
        if mixer not in done:
            row = packed_row(mixer, args, len(ds.rows), batches, device, autocast, peak, top)
            done[mixer] = {**row, 'what': what}
            with open(out, 'a') as f:
                f.write(json.dumps(done[mixer]) + "\n")
    print(f"{name}, {dtype}, {args.sizes[0]}, rows of {T}, {args.tokens} tokens a step, {commit}; "
          f"matmul ceiling {top / 1e12:.2f} TFLOP/s, peak {peak / 1e12:.0f}")
    for r in (done[mixer] for mixer in args.mixers):
        print(f"{r['mixer']:6s} {r['tok_s']:12,.0f} tok/s  MFU {r['mfu']:6.1%}  of matmul {r['of_matmul']:6.1%}  "
              f"{r['memory_mb']:8,.0f} MB  ready after {r['ready_s']:.0f} s")
    return [done[mixer] for mixer in args.mixers]

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--mixers', nargs='+', default=['A', 'M', 'MA', 'MS'])
    parser.add_argument('--sizes', nargs='+', default=['2x64', '4x128', '8x256'], help="layers x width")
    parser.add_argument('--lengths', type=int, nargs='+', default=[512, 2048, 8192])
    parser.add_argument('--tokens', type=int, default=8192, help="of a step")
    parser.add_argument('--head_size', type=int, default=32)
    parser.add_argument('--frames', default='', help="of --packed")
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
    measure = grid
    if args.child:
        measure = grid_cell
    elif args.quickstart:
        measure = quickstart
    elif args.packed:
        measure = packed
    print(json.dumps(measure(args)))

if __name__ == '__main__':
    main()
