"""
what surrounds a loop: the device, ranks, signals, the log, and the configs of a run, which come from flags, a TOML file
or a checkpoint.

three kinds of runs share one loop: a Model on tasks (ModelConfig, DataConfig), a Model on text (ModelConfig,
TextConfig), a pretrained language model on tasks (LMConfig, DataConfig). what the loop asks of them:

  a dataset, data.ArcDataset or text.TextDataset
    rows                            {task key: row of the task embedding}, {} = there is none
    vocab_size, tokenizer_sha256    how many tokens there are, and what they mean
    batch_rows                      rows of a global batch where all batches have one shape, 0 where they do not
    val_pairs, leaks, files         what is validated on, what allow_leak let pass, {name: bytes} to keep with the run
    loader(rank, world, device), val_batches(rank, world), about(), trained_on()
  a model, model.Model or lm.LM
    model(*batch, cache=None)       -> logits, and the loss summed over the targets that are not negative
    cfg, device, n_task             n_task: rows of its task embedding, 0 = none
    blocks, pads                    what torch.compile is for; may filler stand before a prompt?
    about(), cache(), peak_rates(lr, adam_lr), optimizers(lr, adam_lr, weight_decay, ns_steps)
"""
import contextlib
import ctypes
import importlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanoarc import __version__, checkpoint
from nanoarc.data import ArcDataset, DataConfig
from nanoarc.grids import one_line
from nanoarc.lm import LMConfig, auto_dtype, make_lm
from nanoarc.model import Model, ModelConfig, has_bf16
from nanoarc.settings import differences, is_like
from nanoarc.text import TextConfig, TextDataset, model_config

# -----------------------------------------------------------------------------
# device and ranks

def get_device(device, dtype, trains=False):
    """
    the two settings, 'auto' resolved -> (torch.device, dtype name, autocast context maker). trains: a cpu that has bf16
    takes it for that, decoding a token at a time gains nothing by it. raises ValueError
    """
    is_here = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    here = [name for name, x in is_here.items() if x]
    if device == 'auto':
        device = here[0]
    if device.partition(':')[0] not in here:
        raise ValueError(f"device={device!r}: not here, want one of {', '.join(here)}")
    if device == 'cuda' and 'LOCAL_RANK' in os.environ: # torchrun: a gpu a process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if dtype == 'auto':
        dtype = 'bfloat16' if trains and has_bf16(device) else auto_dtype(device)
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype={dtype!r}: want float32, bfloat16 or float16")
    def autocast():
        if dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, dtype))
    make_fast(device)
    return device, dtype, autocast

def make_fast(device):
    """ settings of this process by which fp32 is faster on a device: on cpu twice as fast, see dev/LOG.md """
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high') # TF32
        torch.backends.cuda.enable_cudnn_sdp(False) # it plans 40 ms for each new length, decoding has one a step
    if device.type != 'cpu':
        return
    if platform.libc_ver()[0] == 'glibc': # memory that is freed is kept for the next step
        libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
    # 'medium' makes torch multiply by oneDNN in place of MKL. oneDNN may round to bf16 then, but does so only in AMX
    # units: without them all stays fp32
    if platform.machine() in ('x86_64', 'AMD64') and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision('medium')

def threads():
    """ how many threads torch has, and by which settings they wait for each other (cli.set_threads) """
    n = torch.get_num_threads()
    words = [f"{n} thread{'s' if n > 1 else ''}"]
    for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'):
        if name in os.environ:
            words.append(f"{name}={os.environ[name]}")
    return " ".join(words)

def has_ranks():
    """ are there several of us, as under torchrun? RANK alone may be of anything """
    return 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1

def is_first_rank():
    """ is this the process that writes? """
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not has_ranks() or os.environ['RANK'] == '0'

def get_ranks(device):
    """ -> (rank, number of ranks), (0, 1) unless torchrun started us. they talk by gloo on cpu, nccl on cuda """
    if has_ranks() and not dist.is_initialized():
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(hours=12)) # a rank may wait for one that solves longer
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()

def over_ranks(world, op, *values):
    """ numbers -> the SUM or MAX of each over all ranks, as floats, the same on all ranks. exact to 2^53 """
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, getattr(dist.ReduceOp, op))
    return values.tolist()

def together(world, read):
    """
    read() on every rank, -> {name: value} of what must be the same on all. raises ValueError on all ranks if it does on
    one, or if they differ
    """
    if world == 1:
        read()
        return
    mine, error = {}, ""
    try:
        mine = read()
    except (ValueError, OSError) as e:
        error = str(e)
    found = [None] * world
    dist.all_gather_object(found, (mine, error))
    for rank, (_, error) in enumerate(found):
        if error:
            raise ValueError(f"rank {rank}: {error}")
    first, _ = found[0]
    wrong = []
    for rank, (other, _) in enumerate(found):
        wrong += differences(first, other, "rank 0", f"rank {rank}")
    if wrong:
        raise ValueError(f"the ranks are not of one run: {'; '.join(wrong)}")

class Signals:
    """
    SIGTERM and SIGINT wait for the end of the step, `got` says which came. a second one after GRACE seconds does not
    wait. sooner it is taken for an echo: torchrun and the cluster may both tell each process.
    """
    GRACE = 2.0

    def __enter__(self):
        self.got, self.old = 0, {}
        with contextlib.suppress(ValueError): # not the main thread: there they are somebody else's
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, _):
        if self.got == 0:
            self.got, self.since = number, time.monotonic()
        elif time.monotonic() > self.since + self.GRACE:
            os._exit(128 + number)

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

def exit_after(number):
    """ the process ends as a signal wants it: with 0 after SIGTERM, else with 128 + its number """
    sys.exit(0 if number == signal.SIGTERM else 128 + number)

def end_with_stdin():
    """ SIGTERM to ourselves when stdin closes: so a trial ends when its sweep does, however that dies """
    def watch():
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()

# -----------------------------------------------------------------------------
# what the loop keeps an eye on

class Budget:
    """
    minutes -> a number of steps, by the speed after the first five, which are slow. it must be known before the
    learning rate begins to fall, for it says when that is.
    """

    def __init__(self, cfg, step):
        self.seconds = 60 * cfg.minutes
        flat = self.seconds * (1 - cfg.decay_frac) # until the learning rate falls
        self.measuring = min(max(0.8 * flat, 0.05 * self.seconds), 120) # seconds
        self.first = step + 5
        self.since = None # (step, seconds) when measuring began

    def steps(self, step, seconds):
        """ of the whole run, 0 = not known yet. seconds of training so far """
        if self.since is None:
            if step >= self.first:
                self.since = step, seconds
            return 0
        step0, seconds0 = self.since
        if seconds - seconds0 <= self.measuring:
            return 0
        steps_a_second = (step - step0) / (seconds - seconds0)
        return max(step + int((self.seconds - seconds) * steps_a_second), step + 1)

class Watch:
    """
    finds a loss or gradient that is not finite. whoever looks at a number waits for the device, so on a gpu the last
    step is not looked at before the next one is under way.
    """

    def __init__(self, device):
        self.lag = 1 if device.type == 'cuda' else 0
        self.unseen = [] # (step, its place in the stream, a number)
        self.bad = None # step and place of the first that is not finite

    def add(self, step, place, x):
        self.unseen.append((step, place, x))

    def found(self, lag=None):
        """ was there one, but for the last `lag` steps? """
        lag = self.lag if lag is None else lag
        while len(self.unseen) > lag:
            step, place, x = self.unseen.pop(0)
            if self.bad is None and not math.isfinite(x): # waits for the device
                self.bad = step, place
        return self.bad is not None

class Timer:
    """ with timer('saving'): ... adds up the seconds that each thing took """

    def __init__(self):
        self.began = time.perf_counter()
        self.spent = {'waiting for data': 0.0, 'saving': 0.0, 'validating and drawing': 0.0}

    @contextlib.contextmanager
    def __call__(self, what):
        t = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - t

    def shares(self):
        total = time.perf_counter() - self.began
        return ", ".join(f"{what} {x / total:.2%}" for what, x in self.spent.items())

class Since:
    """
    what is measured from one row of metrics to the next. losses are added up on the device, so that nobody waits for it
    but who asks. each rank adds up its own, and all are saved: a run that goes on logs the same, to the last bit
    """

    def __init__(self, rank, world, timer, tokens, n=0, *totals):
        """ timer: of the run, tokens: worked on so far, n: steps that are not logged yet, totals: of each rank """
        self.rank, self.world, self.timer, self.tokens, self.n = rank, world, timer, tokens, int(n)
        self.time, self.waited = time.perf_counter(), 0.0
        self.total = 0.0
        if len(totals) == world:
            self.total = totals[rank]
        elif rank == 0: # there were more or fewer ranks
            self.total = sum(totals)

    def add(self, loss):
        """ of a step, the share of this rank """
        self.total, self.n = self.total + loss, self.n + 1

    def losses(self):
        """ -> [number of steps, sum of each rank]. all ranks come by here. waits for the device """
        totals = [0.0] * self.world
        totals[self.rank] = float(self.total)
        return [self.n, *over_ranks(self.world, 'SUM', *totals)]

    def row(self, tokens):
        """ -> {name: value}, and from here on it begins anew """
        n, *totals = self.losses()
        now, waited = time.perf_counter(), self.timer.spent['waiting for data']
        dt = now - self.time
        values = {'loss': sum(totals) / n, 'tok_s': (tokens - self.tokens) / dt, 'wait': (waited - self.waited) / dt}
        self.total, self.n, self.tokens, self.time, self.waited = 0.0, 0, tokens, now, waited
        return values

class Pace:
    """ says once, in words, that training has become several times slower than it was """
    TIMES = 3

    def __init__(self):
        self.fastest = 0.0 # tokens/s
        self.slow_rows = 0 # one after another
        self.said = False

    def warning(self, tok_s):
        """ tokens/s since the last row of metrics -> what to say, '' = nothing. one slow row may be a validation """
        self.fastest = max(self.fastest, tok_s)
        self.slow_rows = self.slow_rows + 1 if self.TIMES * tok_s < self.fastest else 0
        if self.slow_rows < 2 or self.said:
            return ""
        self.said = True
        return (f"warning: {tok_s:,.0f} tokens/s, it was {self.fastest:,.0f}: is something else at work here? "
                "OMP_NUM_THREADS=1 suffers least from that")

# -----------------------------------------------------------------------------
# the log

class Log:
    """
    what is measured and printed: metrics.jsonl; log.txt, which begins with all that made the run; a tracker; a progress
    line on a terminal, plain lines elsewhere. none of these may end a run: what fails is said once, and training goes
    on. out_dir=None: nothing, for ranks other than the first.
    """

    def __init__(self, out_dir, step, name, cfgs, device, world):
        self.out_dir = out_dir
        self.last = {} # the newest value of each thing that was measured
        self.pace = Pace()
        self.failed = set() # what has been said to fail
        self.bar = self.tracker = None
        if out_dir is None:
            return
        settings = {}
        for cfg in cfgs:
            settings.update(asdict(cfg))
        with self.harmless('log.txt'):
            self.append('log.txt', json.dumps({'settings': settings, **surroundings(device, world)}, indent=1))
            for path in sorted(Path(__file__).parent.glob('*.py')):
                code = path.read_text(encoding='utf-8')
                self.append('log.txt', f"# {'=' * 77}\n# nanoarc/{path.name}\n# {'=' * 77}\n{code}")
        with self.harmless('metrics.jsonl'):
            self.begin_rows(step)
        with self.harmless(settings['log']):
            self.begin_tracker(settings, name)
        with self.harmless("the progress line"):
            if sys.stdout and sys.stdout.isatty():
                columns = TextColumn("{task.description}"), BarColumn(bar_width=5), TimeRemainingColumn() # 80 columns
                self.bar = Progress(*columns, console=Console(soft_wrap=True))

    def begin_rows(self, step):
        """ metrics.jsonl, without what a resumed run writes again: also the validation at its step """
        rows = read_metrics(self.out_dir) if step > 0 else []
        lines = []
        for row in rows:
            if row['step'] < step or (row['step'] == step and 'loss' in row):
                lines.append(json.dumps(row) + "\n")
        checkpoint.write_file(self.out_dir / 'metrics.jsonl', "".join(lines).encode())

    def begin_tracker(self, settings, name):
        """ wandb or trackio, if it is wanted """
        if settings['log']:
            tracker = importlib.import_module(settings['log'])
            more = {'id': name, 'dir': str(self.out_dir)} if settings['log'] == 'wandb' else {}
            tracker.init(project='nanoarc', name=name, config=settings, resume='allow', **more)
            self.tracker = tracker

    @contextlib.contextmanager
    def harmless(self, what):
        """ whatever goes wrong in here does not end the run, it is said once """
        try:
            yield
        except Exception as e:
            if what not in self.failed:
                self.failed.add(what)
                why = " ".join(str(e).split())[:200]
                self.print(f"warning: {what}: {type(e).__name__}: {why}. training goes on")

    def __enter__(self):
        with self.harmless("the progress line"):
            if self.bar:
                self.bar.start()
                self.bar.add_task("0", total=None)
        return self

    def __exit__(self, kind, error, _):
        with self.harmless("the progress line"):
            if self.bar:
                self.bar.stop()
        if kind not in (None, SystemExit): # who watches elsewhere is to know
            self.print(f"ended by {kind.__name__}: {one_line(str(error))}", show=False)
        if self.tracker:
            with self.harmless(self.tracker.__name__):
                if kind is not None and self.tracker.__name__ == 'wandb':
                    self.tracker.finish(exit_code=1)
                else:
                    self.tracker.finish()

    def sync(self):
        """ what is logged reaches the disk, before a checkpoint that counts on it """
        if self.out_dir is None:
            return
        with self.harmless('metrics.jsonl'), open(self.out_dir / 'metrics.jsonl', 'ab') as f:
            os.fsync(f.fileno())

    def append(self, name, text):
        """ a line to a file of the run """
        with open(self.out_dir / name, 'a', encoding='utf-8', errors='backslashreplace') as f:
            f.write(text + "\n")

    def print(self, text, show=True):
        """ a line to the eye and to log.txt """
        if self.out_dir is None:
            return
        with self.harmless('log.txt'):
            self.append('log.txt', text)
        with self.harmless('stdout'): # nobody reads on: `| head`, or a `| tee` that ctrl-c reached too
            if show:
                print(text, flush=True)

    def row(self, step, max_iters, **values):
        """ a row of metrics.jsonl, without the values that are None """
        if self.out_dir is None:
            return
        values = {name: x for name, x in values.items() if x is not None}
        self.last.update(values)
        with self.harmless('metrics.jsonl'):
            self.append('metrics.jsonl', json.dumps({'step': step, **values}))
        if self.tracker:
            with self.harmless(self.tracker.__name__):
                self.tracker.log(values, step=step)
        text = f"{step}/{max_iters}" if max_iters else f"{step}" # by the clock nobody knows how many there will be
        shown = {'loss': "loss {:.3f}", 'val_loss': "val {:.3f}", 'lr': "lr {:.0e}", 'tok_s': "{:,.0f} tok/s",
                 'wait': "wait {:.1%}"}
        for name, form in shown.items():
            if name in self.last:
                text += " " + form.format(self.last[name])
        with self.harmless("the progress line"):
            if self.bar:
                self.bar.update(self.bar.task_ids[0], completed=step, total=max_iters or None, description=text)
        self.print(f"step {text}", show=not self.bar and 'loss' in values)
        if 'tok_s' in values:
            warning = self.pace.warning(values['tok_s'])
            if warning:
                self.print(warning)

def read_metrics(run):
    """ out_dir of a run -> rows of its metrics.jsonl, dicts of numbers with 'step' each. other lines are left out """
    path, rows = Path(run) / 'metrics.jsonl', []
    if not path.exists():
        return rows
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError): # a crash cut it short
            continue
        has_step = isinstance(row, dict) and type(row.get('step')) is int
        if has_step and all(type(x) in (int, float) for x in row.values()):
            rows.append(row)
    return rows

def surroundings(device, world):
    """ what a run depends on but for its settings -> dict: versions, hardware, the commit """
    def output(*command):
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""
    commit = ""
    if shutil.which('git') and output('git', 'ls-files', 'train.py'): # not the repository of who has us installed
        commit = output('git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    cpu, cpuinfo = platform.processor(), Path('/proc/cpuinfo')
    lines = cpuinfo.read_text('utf-8', 'replace').splitlines() if cpuinfo.exists() else []
    for line in lines:
        if line.startswith('model name'):
            cpu = line.partition(':')[2].strip()
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)
    versions = {name: version(name) for name in ('torch', 'numpy', 'numba', 'safetensors')}
    return {'started': time.strftime('%Y-%m-%d %H:%M:%S %Z'), 'command': sys.argv, 'git': commit,
            'nanoarc': __version__, 'python': platform.python_version(), **versions, 'platform': platform.platform(),
            'cpu': cpu, 'cores': os.cpu_count(), 'threads': threads(), 'device': gpu, 'ranks': world}

# -----------------------------------------------------------------------------
# the configs of a run

@dataclass
class Run:
    """ the three configs of a run. no name stands in two of them """
    train: object # TrainConfig
    model: object # ModelConfig or LMConfig
    data: object # DataConfig or TextConfig

def make_dataset(cfg, seed):
    return TextDataset(cfg, seed) if isinstance(cfg, TextConfig) else ArcDataset(cfg, seed)

def make_model(cfg, device, world=1):
    return make_lm(cfg, device, world) if isinstance(cfg, LMConfig) else Model(cfg).to(device)

def fit_to_data(cfg, ds):
    """ a model's config for a dataset: it has as many rows of the task embedding as that. raises ValueError """
    if isinstance(cfg, LMConfig): # it is told and asked symbols, and knows no task
        return cfg
    if ds.vocab_size > cfg.vocab_size:
        raise ValueError(f"vocab_size={cfg.vocab_size}: the data has {ds.vocab_size:,} tokens")
    if cfg.n_task not in (0, len(ds.rows)):
        raise ValueError(f"n_task={cfg.n_task}: the data has {len(ds.rows)} tasks to embed, leave it out")
    return replace(cfg, n_task=len(ds.rows))

def from_saved(cls, values):
    """ a config as a checkpoint has it. a setting that is newer than that has its default. raises ValueError """
    unknown = values.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"saved with settings that this version does not know: {', '.join(sorted(unknown))}")
    for f in fields(cls):
        if f.name in values and f.default is not None and not is_like(values[f.name], f.default):
            raise ValueError(f"saved with {f.name} = {repr(values[f.name])[:40]}, want one like {f.default!r}")
    return cls(**values)

# what the meta data of a checkpoint must have
META = {'step': int, 'train': dict, 'model': dict, 'data': dict, 'stream': dict, 'rows': dict, 'leaks': list}

def saved_configs(meta):
    """ meta data of a checkpoint -> the configs of its model and of its data. raises ValueError """
    for name, kind in META.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"a checkpoint with {name} = {str(meta.get(name))[:40]}, want a {kind.__name__}")
    model_cls = LMConfig if 'base' in meta['model'] else ModelConfig
    data_cls = TextConfig if 'text' in meta['data'] else DataConfig
    return from_saved(model_cls, meta['model']), from_saved(data_cls, meta['data'])

def load_run(out_dir, device, base=''):
    """
    out_dir of a run, and where its pretrained model lies if that has moved -> (model in eval mode with the weights that
    validation uses, config of its data, meta data). raises ValueError
    """
    tensors, meta = checkpoint.load(out_dir)
    model_cfg, data_cfg = saved_configs(meta)
    if base:
        if not isinstance(model_cfg, LMConfig):
            raise ValueError(f"base={base!r}: {out_dir} has no pretrained model, leave it out")
        model_cfg = replace(model_cfg, base=base)
    model = make_model(model_cfg, device).eval()
    checkpoint.restore_model(model, tensors, checkpoint.eval_part(meta))
    return model, data_cfg, meta

def refuse_changes(meta, cfg, model_cfg):
    """ raises ValueError that names the settings without which a saved run would not go on as it began """
    old, new = saved_configs(meta)[0], model_cfg
    if isinstance(old, LMConfig): # these may change: files move, but base_sha256 stays
        old = replace(old, base=new.base, recompute=new.recompute, shard=new.shard)
    elif old.resolved() == new.resolved(): # the same, said in another way
        old = new
    saved, now = asdict(old), asdict(new)
    saved_cfg = from_saved(type(cfg), meta['train'])
    for name in ('grad_accum', 'dtype', 'ns_steps'):
        saved[name], now[name] = getattr(saved_cfg, name), getattr(cfg, name)
    wrong = differences(saved, now)
    if wrong:
        raise ValueError("resume refused: " + "; ".join(wrong))

def begin_with(model, ds, run):
    """
    the weights of another run into a model, averaged ones if it has them -> a line that says so. a task that it does
    not know keeps its new embedding; of text with other tokens only the blocks are taken. raises ValueError
    """
    tensors, meta = checkpoint.load(run)
    part = checkpoint.eval_part(meta)
    when = f"{run} after {meta['step']} steps"
    if 'text' in meta['data'] and meta['stream']['tokenizer_sha256'] != ds.tokenizer_sha256:
        return f"of the text run {when} {begin_with_blocks(model, tensors, part)}"
    if (len(meta['rows']) > 0) != (model.n_task > 0):
        raise ValueError(f"init_from={run}: it was trained with shots={meta['data']['shots']}, "
                         "with or without task embeddings, now it is the other way")
    if model.n_task == 0:
        checkpoint.restore_model(model, tensors, part)
        return f"weights of {when}"
    known = [key for key in ds.rows if key in meta['rows']]
    theirs = tensors[f"{part}.wtask.weight"]
    weight = model.wtask.weight.detach().cpu().clone()
    if theirs.shape[1:] == weight.shape[1:]: # another width is refused below
        for key in known:
            weight[ds.rows[key]] = theirs[meta['rows'][key]]
    checkpoint.restore_model(model, {**tensors, f"{part}.wtask.weight": weight}, part)
    return f"weights of {when}, {len(known)} of {len(ds.rows)} tasks known to it"

def begin_with_blocks(model, tensors, part):
    """ of these weights the blocks and the norm behind them into a model -> a text that says so """
    blocks = f"{part}.blocks.", f"{part}.norm."
    old = {name: x for name, x in tensors.items() if name.startswith(blocks)}
    mine = model.state_dict(prefix=f"{part}.")
    new = {name: x for name, x in mine.items() if not name.startswith(blocks)}
    checkpoint.restore_model(model, {**old, **new}, part)
    names = ", ".join(name.split('.')[1] for name in new)
    return f"the {len(model.blocks)} blocks and the last norm; new: {names}"

# -----------------------------------------------------------------------------
# flags and TOML files

def flag(args, name):
    """ the value of --name in a list of strings, the last one, '' if it is not there. hyphens pass for underscores """
    value = ''
    for i, x in enumerate(args):
        key, equals, text = x.partition('=')
        if key.startswith('--') and key[2:].replace('-', '_') == name:
            if equals:
                value = text
            elif i + 1 < len(args):
                value = args[i + 1]
    return value

def read_toml(path):
    """ -> {key: value}. raises ValueError """
    try:
        return tomllib.loads(Path(path).read_bytes().decode('utf-8-sig'))
    except (ValueError, RecursionError) as e: # or not UTF-8, or too deep
        raise ValueError(f"{path}: {e}") from None

def apply_values(run, values, where):
    """ a Run with other values: {name: value}. raises ValueError on a name that it has not, and on another type """
    unknown = dict(values)
    for part in fields(run):
        cfg, mine = getattr(run, part.name), {}
        for f in fields(cfg):
            if f.name not in values or f.name in ('resume', 'init_from', 'config'): # these are flags alone
                continue
            x, now = unknown.pop(f.name), getattr(cfg, f.name)
            if not is_like(x, now):
                raise ValueError(f"{where}: {f.name} = {repr(x)[:40]}, want a {type(now).__name__} like {now!r}")
            mine[f.name] = x
        run = replace(run, **{part.name: replace(cfg, **mine)})
    if unknown:
        raise ValueError(f"{where}: unknown setting {', '.join(unknown)}")
    return run

def parse(cls, args, command, help, default=None):
    """ list of strings -> a config. --help is made of the comments on its fields. exits with 2 on an unknown flag """
    if '--help' in args or '-h' in args: # in a wider terminal tyro sets boxes side by side, edge to edge, in any order
        os.environ['COLUMNS'] = str(min(shutil.get_terminal_size().columns, 120))
    return tyro.cli(cls, args=args, default=default, prog=f"nanoarc {command}", description=help,
                    config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)

# the settings that matter first, of each kind of run those that it has
FIRST = """
  --base ID          the pretrained model: an id on the hub, a directory or a .gguf file
  --text DIR         the token shards to train on
  --data SRC         tasks to learn from, demos and answers: arc1/training, my/folder, a+b
  --adapt SRC        tasks to learn the demos of, not the answers: arc1/evaluation
  --shots N          demos put before a pair: -1 = all that fit. 0 = each task an embedding
  --max_pair N       leave out tasks with larger demos, e.g. 100 tokens. 0 = none
  --minutes N        how long to train
  --depth N          size of the model: N layers, about 48 N wide
  --mixer PATTERN    what the layers are: A = attention, M = mamba-2, e.g. MA
  --rank N           size of the LoRA adapters, 0 = train all weights
  --batch_tokens N   tokens of a batch
  --out_dir DIR      where the run is saved
  --resume DIR       go on with a run that was stopped
"""

def first_settings(run):
    """ Run -> the lines of FIRST that it has """
    lines = []
    for line in FIRST.strip("\n").splitlines():
        name = line.split()[0].strip('-')
        if any(hasattr(getattr(run, part.name), name) for part in fields(run)):
            lines.append(line)
    return "\n".join(lines)

def parse_run(default, args, command, help):
    """
    list of strings -> Run. a setting that they leave open comes from --config, else from the run of --resume or
    --init_from, else from the default
    """
    resume, init_from, path = flag(args, 'resume'), flag(args, 'init_from'), flag(args, 'config')
    is_text = isinstance(default.data, TextConfig)
    if is_text:
        default = replace(default, model=model_config(default.model, default.data.text))
    run = resume or init_from
    if run:
        _, meta = checkpoint.load(run)
        model, data = saved_configs(meta)
        if type(model) is not type(default.model):
            raise ValueError(f"{run}: not a run of nanoarc {command}, its model is a {type(model).__name__}")
    if resume:
        refuse_with_resume(args, meta)
        default = Run(from_saved(type(default.train), meta['train']), model, data)
    elif init_from: # its model, the data is ours
        if isinstance(model, ModelConfig):
            model = replace(model, n_task=0)
        if is_text or isinstance(data, TextConfig): # places and tokens are ours too
            model = replace(model, rope_bases=default.model.rope_bases, vocab_size=default.model.vocab_size)
        default = replace(default, model=model)
    if path:
        default = apply_values(default, read_toml(path), path)
    kinds = [(f.name, type(getattr(default, f.name))) for f in fields(default)]
    about = f"{help}\n\nwhat matters first, everything else is below:\n{first_settings(default)}"
    return parse(make_dataclass('Run', kinds), args, command, about, default)

def refuse_with_resume(args, meta):
    """ raises ValueError on a flag that a resumed run cannot heed """
    reasons = {'out_dir': "it goes on in its own directory", 'init_from': "its weights are there already",
               'minutes': "its number of steps is fixed, --max_iters changes it"}
    minutes = meta['train']['minutes']
    for name, reason in reasons.items():
        x = flag(args, name)
        if x and not (name == 'minutes' and x in (str(minutes), f"{minutes:g}")): # its own may pass
            raise ValueError(f"--{name} does not go with --resume: {reason}")
