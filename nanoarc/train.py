"""
the training loop. `nanoarc train --data arc1/training --minutes 5 --out_dir out/mine` on anything from a laptop to a gpu,
`torchrun --nproc_per_node=8 -m nanoarc.train ...` on several. SIGTERM and ctrl-c finish the step and save.
writes out_dir/{metrics.jsonl, log.txt, loss.png, val.png, trained_on.txt, ckpt/}. each row of metrics.jsonl has `step` and whichever
of loss, val_loss (nats per output token) and done (share of the steps, once their number is fixed), lr, tok_s, wait (share of
time spent on waiting for data) was measured there.
"""
import contextlib
import copy
import ctypes
import importlib.util
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from nanoarc import checkpoint, view
from nanoarc.data import PAD, Batch, DataConfig
from nanoarc.model import ModelConfig, is_recent
from nanoarc.sources import with_earlier

@dataclass
class TrainConfig:
    out_dir: str = 'out/run' # where checkpoints, metrics.jsonl and loss.png go
    config: str = '' # a TOML file of settings, flags win over it
    resume: str = '' # out_dir of a run to continue exactly, with its own settings
    init_from: str = '' # out_dir of a run whose model and weights to begin with. tasks that it does not know get new embedding rows. of a run of text its blocks
    minutes: float = 5.0 # train this long: throughput is measured first, then max_iters is fixed. 0 = by max_iters
    max_iters: int = 0 # train this many steps. 0 = by minutes, and if both are set this one counts
    grad_accum: int = 1 # micro batches a step
    lr: float = 0.0 # peak of Muon, for the matrices. 0 = by the width of the model
    adam_lr: float = 0.0 # peak of AdamW, for embeddings, head and norms. 0 = by the width
    ns_steps: int = 5 # Newton-Schulz steps of Muon. 0 = AdamW for the matrices too, at the lr above
    weight_decay: float = 0.1 # of matrices and embeddings, times the learning rate
    grad_clip: float = 1.0 # largest norm of the gradient, 0 = off
    warmup_iters: int = 20 # steps of linear warm-up
    warmup_frac: float = 0.0 # the same as a share of max_iters, where that is set. 0 = by warmup_iters
    decay_frac: float = 0.5 # share of the run, at its end, over which the learning rate falls linearly to 0
    eval_every: int = 250 # steps between validations, there is always one at the end. 0 = that one alone
    save_every: int = 250 # steps between checkpoints, there is always one at the end. 0 = that one alone
    log_every: int = 50 # steps between rows of metrics.jsonl. 0 = off
    draw_every: int = 1000 # steps between pictures, loss.png and val.png, there is always one at the end. 0 = off
    log: str = '' # send the rows of metrics.jsonl to a tracker too: 'wandb' | 'trackio'
    ema: float = 0.0 # decay of averaged weights, which validation and solve use then, e.g. 0.999. 0 = off
    seed: int = 1337 # of the weights and of the stream of documents
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # 'float32' | 'bfloat16' | 'float16' | 'auto' = bfloat16 on recent cuda, float16 on older, else float32
    compile: str = 'auto' # torch.compile: 'on' | 'off' | 'auto' = on recent cuda where shapes are few, so not with batching='bucket'

def get_lr(step, max_iters, cfg):
    """ factor of the peak learning rate at a step: linear warm-up, flat, linear decay to 0. max_iters=0: not known yet """
    factor = min((step + 1) / max(cfg.warmup_frac * max_iters or cfg.warmup_iters, 1), 1.0)
    if max_iters > 0 and cfg.decay_frac > 0:
        factor = min(factor, (max_iters - step) / (max_iters * cfg.decay_frac))
    return factor

def get_device(device, dtype):
    """ the two settings, 'auto' resolved -> (torch.device, dtype name, autocast context maker). raises ValueError """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    known = {'cpu': True, 'mps': torch.backends.mps.is_available(), 'cuda': torch.cuda.is_available()}
    if not known.get(device.partition(':')[0]):
        raise ValueError(f"device={device!r}: not here, want one of {', '.join(name for name in known if known[name])}")
    if device == 'cuda' and 'LOCAL_RANK' in os.environ: # torchrun: a gpu a process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if dtype == 'auto':
        dtype = 'bfloat16' if is_recent(device) else 'float16' if device.type == 'cuda' else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype={dtype!r}: want float32, bfloat16 or float16")
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high') # TF32
    elif device.type == 'cpu':
        if platform.libc_ver()[0] == 'glibc':
            for option, size in ((-1, 2**30), (-3, 2**25)): # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: freed memory is kept, see LOG.md
                ctypes.CDLL(None).mallopt(option, size)
        if platform.machine() in ('x86_64', 'AMD64') and not torch.cpu._is_amx_tile_supported():
            # asks for oneDNN's products in place of MKL's. it would round to bf16 in AMX units: without them it is fp32 still, on AMD twice as fast
            torch.set_float32_matmul_precision('medium')
    autocast = contextlib.nullcontext if dtype == 'float32' else lambda: torch.autocast(device.type, dtype=getattr(torch, dtype))
    return device, dtype, autocast

def get_ranks(device):
    """ -> (rank, number of ranks), (0, 1) unless torchrun started us. they talk by gloo on cpu, nccl on cuda """
    if 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1 and not dist.is_initialized():
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=12)) # some wait for others that solve longer
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def over_ranks(world, op, *values):
    """ numbers -> the SUM or MAX of each over all ranks, the same on all of them, as floats: integers are exact to 2^53 """
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, getattr(dist.ReduceOp, op))
    return values.tolist()

class Signals:
    """
    SIGTERM and SIGINT wait for the end of the step, `got` says which came. one more after GRACE seconds does not wait; sooner it
    is taken for an echo, as where torchrun and the cluster both tell each process.
    """
    GRACE = 2.0

    def __enter__(self):
        self.got, self.old = 0, {}
        with contextlib.suppress(ValueError): # not the main thread: there they are somebody else's
            self.old = {x: signal.signal(x, self.handle) for x in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, _):
        if self.got and time.monotonic() > self.since + self.GRACE:
            os._exit(128 + number)
        if not self.got:
            self.got, self.since = number, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

def fill_rows(batch, n):
    """ a Batch, if it has fewer than n rows, with empty ones: a compiler is to see one shape """
    n -= len(batch.idx)
    if n <= 0:
        return batch
    batch = Batch(*(x if x is None else F.pad(x, (0, 0) * (x.ndim - 1) + (0, n), value=y) for x, y in zip(batch, (PAD, -100, 0, -1, 0, 0))))
    if batch.doc is not None: # many small documents: one large one would cost the attention more
        batch.doc[-n:] -= torch.arange(batch.doc.size(1), dtype=batch.doc.dtype, device=batch.doc.device) // 128
    return batch

@torch.no_grad()
def evaluate(model, ds, device, autocast, rank=0, world=1, rows=0):
    """ mean loss over the held out queries, nats per output token, or None if nothing is held out. rows: of a batch at least, see fill_rows """
    total, tokens = 0.0, 0
    for batch in ds.val_batches(rank, world):
        batch = fill_rows(Batch(*(x if x is None else x.to(device) for x in batch)), rows)
        with autocast():
            total += float(model(*batch)[1]) # waits for the device
        tokens += int((batch.targets != -100).sum())
    total, tokens = over_ranks(world, 'SUM', total, tokens)
    return total / tokens if tokens else None

def begin_with(model, ds, run):
    """
    the weights of another run into a model, averaged ones if it has them. of a task that it does not know the new embedding
    stays; of a run of text whose tokens are others than those of ds the blocks are taken, and all else stays. raises ValueError
    """
    tensors, meta = checkpoint.load(run)
    part = checkpoint.best_part(meta)
    if 'text' in meta['data'] and meta['stream']['tokenizer_sha256'] != ds.tokenizer_sha256:
        kept = {name: x for name, x in tensors.items() if name.startswith((f"{part}.blocks.", f"{part}.norm."))}
        new = {name: x for name, x in model.state_dict(prefix=f"{part}.").items() if not name.startswith((f"{part}.blocks.", f"{part}.norm."))}
        checkpoint.restore_model(model, {**kept, **new}, part)
        return f"of the text run {run} after {meta['step']} steps the {len(model.blocks)} blocks and the last norm; new: {', '.join(name.split('.')[1] for name in new)}"
    if (meta['model']['n_task'] > 0) != (model.cfg.n_task > 0):
        raise ValueError(f"init_from={run}: it was trained with shots={meta['data']['shots']}, with or without task embeddings, now it is the other way")
    known = [(n, meta['rows'][key]) for key, n in ds.rows.items() if key in meta['rows']]
    if (name := f"{part}.wtask.weight") in tensors and model.cfg.n_task > 0:
        weight = model.wtask.weight.detach().cpu().clone()
        if tensors[name].shape[1:] == weight.shape[1:] and known: # another width is refused below
            here, there = (torch.tensor(x) for x in zip(*known))
            weight[here] = tensors[name][there].to(weight.dtype)
        tensors[name] = weight
    checkpoint.restore_model(model, tensors, part)
    return f"weights of {run} after {meta['step']} steps" + (f", {len(known)} of {len(ds.rows)} tasks known to it" if model.cfg.n_task > 0 else "")

def check_settings(cfg, model_cfg, data_cfg, device):
    """ raises ValueError that names the setting and what it may be """
    if cfg.compile not in ('auto', 'on', 'off'):
        raise ValueError(f"compile={cfg.compile!r}: want on, off or auto")
    if cfg.log not in ('', 'wandb', 'trackio') or (cfg.log and not importlib.util.find_spec(cfg.log)):
        raise ValueError(f"log={cfg.log!r}: want wandb or trackio, and it installed: pip install 'nanoarc[log]'")
    names = ('minutes', 'max_iters', 'lr', 'adam_lr', 'ns_steps', 'weight_decay', 'grad_clip', 'warmup_iters', 'eval_every', 'save_every', 'log_every', 'draw_every')
    if wrong := [f"{name}={getattr(cfg, name)}" for name in names if getattr(cfg, name) < 0]:
        raise ValueError(f"{' '.join(wrong)}: want no negative number")
    if cfg.grad_accum < 1 or not 0 <= cfg.ema < 1 or not 0 <= cfg.decay_frac <= 1 or not 0 <= cfg.warmup_frac <= 1:
        raise ValueError(f"grad_accum={cfg.grad_accum} ema={cfg.ema} decay_frac={cfg.decay_frac} warmup_frac={cfg.warmup_frac}: want at least 1, 0 or more and less than 1, shares of 0..1")
    if cfg.warmup_frac > 0 and cfg.max_iters == 0 and not cfg.resume:
        raise ValueError(f"warmup_frac={cfg.warmup_frac}: a share of max_iters, which is not set, want --warmup_iters with --minutes")
    model_cfg.check(device, data_cfg.loss_on)

def configs(meta):
    """ meta data of a checkpoint -> the configs of its model and of its data """
    if 'base' in meta['model']:
        from nanoarc.finetune import LMConfig # imported late: it is seldom wanted, and calls us
        return LMConfig(**meta['model']), DataConfig(**meta['data'])
    if 'text' in meta['data']:
        from nanoarc.text import TextConfig # imported late: it imports us
        return ModelConfig(**meta['model']), TextConfig(**meta['data'])
    return ModelConfig(**meta['model']), DataConfig(**meta['data'])

def refuse_changes(meta, cfg, model_cfg):
    """ raises ValueError that names the settings without which a saved run would not go on as it began. its stream has checked its own """
    saved, names = type(model_cfg)(**meta['model']), [f.name for f in fields(model_cfg) if f.name != 'kernel'] # by which kernel is no matter
    pairs = [(name, meta['train'][name], getattr(cfg, name)) for name in ('grad_accum', 'dtype', 'ns_steps')]
    if any(getattr(saved.filled(), name) != getattr(model_cfg.filled(), name) for name in names):
        pairs += [(name, getattr(saved, name), getattr(model_cfg, name)) for name in names]
    if wrong := [f"{name} differs (saved {a}, now {b})" for name, a, b in pairs if a != b]:
        raise ValueError("resume refused: " + "; ".join(wrong))

def main(cfg, model_cfg, data_cfg, draw=None):
    """
    train to the end -> the meta data of the last checkpoint. draw(model, ds, path) makes a picture of some validation
    queries. raises ValueError for what a user can mend, and SystemExit after a signal: 0 for SIGTERM, 130 for SIGINT.
    """
    with Signals() as signals:
        return train(cfg, model_cfg, data_cfg, signals, draw)

def train(cfg, model_cfg, data_cfg, signals, draw):
    started = time.perf_counter()
    device, dtype, autocast = get_device(cfg.device, cfg.dtype)
    rank, world = get_ranks(device)
    check_settings(cfg, model_cfg, data_cfg, device)
    torch.manual_seed(cfg.seed)
    cfg = replace(cfg, dtype=dtype) # a resumed run takes the same, whatever 'auto' would be there
    out_dir = Path(cfg.resume or cfg.out_dir)

    # data
    ds = data_cfg.dataset(cfg.seed)
    loader = ds.loader(rank, world, device)
    if ds.vocab_size > model_cfg.vocab_size:
        raise ValueError(f"vocab_size={model_cfg.vocab_size}: the data has {ds.vocab_size:,} tokens")
    n_task = len(ds.rows) # 0 in context
    if cfg.resume:
        known = checkpoint.steps(cfg.resume)
        tensors, meta = checkpoint.load(cfg.resume)
        loader.load_state_dict(meta['stream']) # refuses another corpus, seed or batch
    elif model_cfg.n_task not in (0, n_task):
        raise ValueError(f"n_task={model_cfg.n_task}: the data has {n_task} tasks to embed, leave it out")

    # model
    model_cfg = replace(model_cfg, n_task=n_task)
    if cfg.resume:
        refuse_changes(meta, cfg, model_cfg)
    model = model_cfg.model(device, world)
    begun = begin_with(model, ds, cfg.init_from) if cfg.init_from and not cfg.resume else ""
    lr, adam_lr = model_cfg.learning_rates(cfg.lr, cfg.adam_lr)
    optimizers = model.optimizers(lr, adam_lr, cfg.weight_decay, cfg.ns_steps)
    peaks = [[group['lr'] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema > 0 else None
    averaged = list(zip(*((a, b) for a, b in zip(ema.parameters(), model.parameters()) if b.requires_grad))) if ema else [] # the averages, and of what
    compiled = cfg.compile == 'on' or (cfg.compile == 'auto' and dtype == 'bfloat16' and device.type == 'cuda' and data_cfg.batching != 'bucket')
    for block in [*model.blocks, *(ema.blocks if ema else [])] if compiled else ():
        block.compile() # blocks of a kind share what is compiled, and around them little is left
    rows = -(-max(data_cfg.batch_tokens // data_cfg.block_size, 1) // world) if compiled and model.blocks and data_cfg.batching != 'bucket' else 0 # of a batch, then all have as many
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    with checkpoint.lock(out_dir) if rank == 0 else contextlib.nullcontext():
        # where we stand
        step, tokens, seconds, val_loss, max_iters = 0, 0, 0.0, None, cfg.max_iters
        name = f"{out_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}" # of the run, for trackers
        if cfg.resume:
            if checkpoint.steps(out_dir) != known and rank == 0: # before we had the lock
                raise ValueError(f"{out_dir}: another process has gone on with this run meanwhile, resume again")
            checkpoint.restore_model(model, tensors)
            checkpoint.restore_optimizers(model, optimizers, tensors)
            scaler.load_state_dict(meta['scaler'])
            if ema:
                checkpoint.restore_model(ema, tensors, checkpoint.best_part(meta))
            step, tokens, seconds, val_loss, name = (meta[key] for key in ('step', 'tokens', 'seconds', 'val_loss', 'name'))
            max_iters = cfg.max_iters or meta['max_iters']
            begun = f"resumed {cfg.resume} at step {step}" + (f" of {max_iters}: it is done" if 0 < max_iters <= step else "")
            if 0 < max_iters <= step: # what is on disk stays as it is
                print(begun)
                return meta
        elif checkpoint.steps(out_dir):
            raise ValueError(f"{out_dir} holds a run already: continue it with --resume {out_dir}, or choose another --out_dir")
        elif cfg.minutes <= 0 and cfg.max_iters <= 0:
            raise ValueError("set --minutes or --max_iters")
        log, start = view.Log(out_dir if rank == 0 else None, step, name, (cfg, model_cfg, data_cfg), device, world), step
        log.print(ds.about())
        for text in ds.leaks:
            log.print(f"leak allowed: {text}")
        log.print(f"{model.about()}, on {device}" + (f", {world} ranks" if world > 1 else ""))
        if begun:
            log.print(begun)
        if rank == 0:
            lines = with_earlier(ds.trained_on(), (cfg.resume, cfg.init_from)) # by which solve knows what it may not be asked
            for file, data in {'trained_on.txt': lines.encode(), **ds.files}.items():
                checkpoint.write_file(out_dir / file, data)
        lag = 1 if device.type == 'cuda' else 0 # steps that a gpu may be ahead of us
        pending, bad = [], None # (step, place in the stream, loss) of steps that nobody looked at yet; step and place of one that is not finite
        spent = {'waiting for data': 0.0, 'saving': 0.0, 'validating and drawing': 0.0} # seconds

        @contextlib.contextmanager
        def timed(what):
            t = time.perf_counter()
            yield
            spent[what] += time.perf_counter() - t

        def save():
            meta = {'stream': loader.state_dict(), 'scaler': scaler.state_dict(), 'tokens': tokens, 'seconds': seconds if done else time.perf_counter() - clock, 'val_loss': val_loss,
                    'max_iters': max_iters, 'name': name, 'rows': ds.rows, 'leaks': ds.leaks, 'train': asdict(cfg), 'model': asdict(model_cfg), 'data': asdict(data_cfg)}
            if rank == 0:
                with timed('saving'):
                    log.sync()
                    checkpoint.save(out_dir, step, model, optimizers, meta, ema)
            return {'step': step, **meta}

        def is_bad(lag):
            """ look at the losses of all steps but the last `lag` ones """
            nonlocal bad
            while len(pending) > lag:
                at, place, loss = pending.pop(0)
                bad = bad or (None if math.isfinite(loss) else (at, place)) # waits for the device
            return bad is not None

        # ------------------------------------------------------------------------- the loop
        measured = None # (seconds, step) since when throughput is measured, the first steps are slow
        share = max(0.8 * (1 - cfg.decay_frac), 0.05) # of the minutes to measure in: the decay must know when to begin
        t0, waited, seen = time.perf_counter(), 0.0, tokens # at the row of metrics before
        planned, began, clock = max_iters, t0, t0 - seconds # training began then, had it never been interrupted
        with log:
            while True:
                # once in a while
                if max_iters == 0 and rank == 0: # --minutes: fix the number of steps as soon as their speed is known
                    now = time.perf_counter() - clock
                    if measured is None and step >= start + 5:
                        measured = now, step
                    elif measured is not None and now - measured[0] > min(60 * cfg.minutes * share, 120):
                        max_iters = max(step + int((60 * cfg.minutes - now) / (now - measured[0]) * (step - measured[1])), step + 1)
                done = 0 < max_iters <= step
                saves, evals, draws = (every > 0 and step % every == 0 for every in (cfg.save_every, cfg.eval_every, cfg.draw_every))
                spoilt = is_bad(0 if saves or done else lag)
                stop, spoilt, fixed = (int(x) for x in over_ranks(world, 'MAX', signals.got, spoilt, max_iters)) # all ranks do the same
                saves, max_iters = saves or fixed != planned, fixed # how long it will be is not to be lost
                planned = fixed
                if spoilt or ((stop or saves) and over_ranks(world, 'MAX', is_bad(0))[0]):
                    tasks = f"in a batch of the tasks {', '.join(loader.names(*bad[1], cfg.grad_accum))}" if bad else "on another rank"
                    raise ValueError(f"step {bad[0] if bad else step}: the loss or its gradient is not finite, {tasks}. no checkpoint has it. it would come again: try a lower --lr")
                if stop or done:
                    break
                if saves and step > start:
                    save()
                if evals: # after the save, so that a resumed run comes by here again
                    with timed('validating and drawing'):
                        val_loss = evaluate(ema or model, ds, device, autocast, rank, world, rows)
                    log.row(step, max_iters, val_loss=val_loss, done=step / max_iters if max_iters and val_loss is not None else None)
                if draws and step > start:
                    with timed('validating and drawing'):
                        log.draw(draw, ema or model, ds)
                # -----------------------------------------------------------------
                factor = get_lr(step, max_iters, cfg)
                for optimizer, lrs in zip(optimizers, peaks):
                    for group, peak in zip(optimizer.param_groups, lrs):
                        group['lr'] = peak * factor
                total, place = 0.0, (loader.window, loader.batch)
                n = loader.loss_tokens(cfg.grad_accum) # of the whole step: micro batches and ranks are weighed by their loss tokens
                for micro_step in range(cfg.grad_accum):
                    net.require_backward_grad_sync = micro_step == cfg.grad_accum - 1 # ranks add up their gradients once a step
                    tokens += loader.tokens()
                    with timed('waiting for data'):
                        batch = fill_rows(loader.next_batch(), rows)
                    with autocast():
                        _, loss = net(*batch)
                    scaler.scale(loss * world / n).backward() # grads add up, and over ranks they are averaged
                    total = total + loss.detach()
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float('inf'))
                for optimizer in optimizers:
                    if not scaler.is_enabled() or torch.isfinite(norm): # fp16: all optimizers skip a step that overflowed, or none. waits for the device
                        scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                scaler.update()
                if ema: # few steps are averaged over few, as TensorFlow's ExponentialMovingAverage has it
                    torch._foreach_lerp_(*averaged, 1 - min(cfg.ema, (1 + step) / (10 + step)))
                # -----------------------------------------------------------------
                step += 1
                pending.append((step, place, total if scaler.is_enabled() else total + norm.detach())) # a gradient may be infinite where the loss is not
                if cfg.log_every and (step % cfg.log_every == 0 or step == max_iters or step == 1):
                    total, = over_ranks(world, 'SUM', float(total)) # waits for the device
                    dt = time.perf_counter() - t0
                    log.row(step, max_iters, loss=total / n, lr=lr * factor, tok_s=(tokens - seen) / dt, wait=(spent['waiting for data'] - waited) / dt)
                    t0, waited, seen = time.perf_counter(), spent['waiting for data'], tokens
            if not done: # a signal
                if step > start or not cfg.resume:
                    save()
                log.print(f"stopped by signal {stop} after step {step}, --resume {out_dir} goes on")
                sys.exit(0 if stop == signal.SIGTERM else 128 + stop)
            seconds = time.perf_counter() - clock
            val_loss = evaluate(ema or model, ds, device, autocast, rank, world, rows)
            log.row(step, max_iters, val_loss=val_loss, done=1.0 if val_loss is not None else None)
            meta = save()
            if cfg.draw_every > 0:
                log.draw(draw, ema or model, ds)
        val = f", {val_loss:.4f} nats per output token on validation" if val_loss is not None else ""
        shares = ", ".join(f"{what} {x / (time.perf_counter() - began):.2%}" for what, x in spent.items())
        log.print(f"{step} steps, {tokens:,} tokens, {seconds:.0f} s{val}: {out_dir} (ready after {time.perf_counter() - started:.0f} s; {shares} of the time)")
        if signals.got == signal.SIGINT: # in the last step or after it: all is saved, and who called is not to go on
            sys.exit(130)
        return meta

if __name__ == '__main__':
    from nanoarc.cli import main as cli
    cli(['train', *sys.argv[1:]])
