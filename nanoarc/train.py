"""
the training loop. `nanoarc train --data arc1/training --minutes 5 --out_dir out/mine` on anything from a laptop to a gpu.
writes out_dir/{metrics.jsonl, loss.png, latest.json, trained_on.txt, ckpt/}. each row of metrics.jsonl has `step` and whichever of
loss, val_loss (nats per output token), lr, tok_s, wait (share of time spent on waiting for data) was measured there.
"""
import contextlib
import ctypes
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanoarc import checkpoint, view
from nanoarc.data import ArcDataset, ArcLoader, Batch
from nanoarc.model import Model, check_kernel, is_recent

@dataclass
class TrainConfig:
    out_dir: str = 'out/run' # where checkpoints, metrics.jsonl and loss.png go
    config: str = '' # a TOML file of settings, flags win over it
    resume: str = '' # out_dir of a run to continue exactly, with its own settings
    minutes: float = 5.0 # train this long: throughput is measured first, then max_iters is fixed. 0 = by max_iters
    max_iters: int = 0 # train this many steps. 0 = by minutes, and if both are set this one counts
    grad_accum: int = 1 # micro batches a step
    lr: float = 0.0 # peak of Muon, for the matrices. 0 = by the width of the model
    adam_lr: float = 0.0 # peak of AdamW, for embeddings, head and norms. 0 = by the width
    ns_steps: int = 5 # Newton-Schulz steps of Muon. 0 = AdamW for the matrices too, at the lr above
    weight_decay: float = 0.1 # of matrices and embeddings, times the learning rate
    grad_clip: float = 1.0 # largest norm of the gradient, 0 = off
    warmup_iters: int = 20 # steps of linear warm-up
    decay_frac: float = 0.5 # share of the run, at its end, over which the learning rate falls linearly to 0
    eval_every: int = 250 # steps between validations, there is always one at the end. 0 = off
    save_every: int = 250 # steps between checkpoints, there is always one at the end. 0 = off
    log_every: int = 50 # steps between rows of metrics.jsonl. 0 = off
    seed: int = 1337 # of the weights and of the stream of documents
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # 'float32' | 'bfloat16' | 'float16' | 'auto' = bfloat16 on recent cuda, float16 on older, else float32
    compile: str = 'auto' # torch.compile: 'on' | 'off' | 'auto' = on recent cuda where shapes are few, so not with batching='bucket'

def get_lr(step, max_iters, cfg):
    """ factor of the peak learning rate at a step: linear warm-up, flat, linear decay to 0. max_iters=0: not known yet """
    factor = min((step + 1) / max(cfg.warmup_iters, 1), 1.0)
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

@torch.no_grad()
def evaluate(model, ds, device, autocast):
    """ mean loss over the held out queries, nats per output token, or None if nothing is held out """
    total, tokens = 0.0, 0
    for batch in ds.val_batches():
        batch = Batch(*(x if x is None else x.to(device) for x in batch))
        with autocast():
            total += float(model(*batch)[1]) # waits for the device
        tokens += int((batch.targets != -100).sum())
    return total / tokens if tokens else None

def main(cfg, model_cfg, data_cfg):
    """ train to the end -> the meta data of the last checkpoint. raises ValueError for what a user can mend """
    started = time.perf_counter()
    device, dtype, autocast = get_device(cfg.device, cfg.dtype)
    if cfg.compile not in ('auto', 'on', 'off'):
        raise ValueError(f"compile={cfg.compile!r}: want on, off or auto")
    if cfg.grad_accum < 1 or min(cfg.eval_every, cfg.save_every, cfg.log_every, cfg.ns_steps, cfg.lr, cfg.adam_lr) < 0:
        raise ValueError("want a grad_accum of at least 1, and eval_every, save_every, log_every, ns_steps and learning rates of at least 0")
    if model_cfg.prefix and set(model_cfg.kinds) & set('AS') and data_cfg.loss_on != 'query':
        raise ValueError(f"prefix lets a prompt see its own next tokens, with loss_on={data_cfg.loss_on!r} that is cheating: add --no_prefix")
    check_kernel(model_cfg.kernel, device)
    torch.manual_seed(cfg.seed)
    out_dir = Path(cfg.resume or cfg.out_dir)

    # data
    ds = ArcDataset(data_cfg, seed=cfg.seed)
    loader = ArcLoader(ds, device=device)
    rows = ds.sampler.rows
    print(f"{len(ds.sampler.key)} tasks, {len(ds)} documents an epoch, {len(ds.val_pairs)} validation queries; left out: {ds.num_tasks_out} tasks over max_pair, "
          f"{ds.num_dropped} overlapping, {len(ds.bad)} malformed; pairs: {ds.num_held} held out, {ds.num_long} too long, {ds.num_alone} without context")
    for text in ds.leaks:
        print(f"leak allowed: {text}")

    # model
    n_task = len(rows) if data_cfg.shots == 0 else 0
    if model_cfg.n_task not in (0, n_task):
        raise ValueError(f"n_task={model_cfg.n_task}: the data has {n_task} tasks to embed, leave it out")
    model_cfg = replace(model_cfg, n_task=n_task)
    model = Model(model_cfg).to(device)
    lr, adam_lr = model_cfg.learning_rates(cfg.lr, cfg.adam_lr)
    optimizers = model.optimizers(lr, adam_lr, cfg.weight_decay, cfg.ns_steps)
    peaks = [[group['lr'] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    compiled = cfg.compile == 'on' or (cfg.compile == 'auto' and dtype == 'bfloat16' and device.type == 'cuda' and data_cfg.batching != 'bucket')
    for block in model.blocks if compiled else ():
        block.compile() # blocks of a kind share what is compiled, and around them little is left
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, mixer {model_cfg.mixer}, on {device}")

    # where we stand
    step, tokens, seconds, val_loss, max_iters = 0, 0, 0.0, None, cfg.max_iters
    if cfg.resume:
        tensors, meta = checkpoint.load(cfg.resume)
        if (cfg.ns_steps == 0) != (meta['train'].get('ns_steps') == 0): # runs of before had Muon
            raise ValueError(f"ns_steps={cfg.ns_steps}: {cfg.resume} was trained with {'AdamW' if cfg.ns_steps else 'Muon'} on its matrices, whose state does not fit")
        checkpoint.restore_model(model, tensors)
        checkpoint.restore_optimizers(model, optimizers, tensors)
        loader.load_state_dict(meta['stream'])
        scaler.load_state_dict(meta['scaler'])
        step, tokens, seconds, val_loss = (meta[key] for key in ('step', 'tokens', 'seconds', 'val_loss'))
        max_iters = cfg.max_iters or meta['max_iters']
        print(f"resumed {cfg.resume} at step {step}" + (f" of {max_iters}: it is done" if 0 < max_iters <= step else ""))
        if 0 < max_iters <= step: # what is on disk stays as it is
            return meta
    elif checkpoint.exists(out_dir):
        raise ValueError(f"{out_dir} holds a run already: continue it with --resume {out_dir}, or choose another --out_dir")
    elif cfg.minutes <= 0 and cfg.max_iters <= 0:
        raise ValueError("set --minutes or --max_iters")
    checkpoint.write_file(out_dir / 'trained_on.txt', ds.trained_on().encode()) # by which solve knows what it may not be asked
    log, start = Log(out_dir, step), step

    def save():
        meta = {'stream': loader.state_dict(), 'scaler': scaler.state_dict(), 'tokens': tokens, 'seconds': seconds, 'val_loss': val_loss, 'max_iters': max_iters,
                'rows': rows, 'leaks': ds.leaks, 'train': asdict(cfg), 'model': asdict(model_cfg), 'data': asdict(data_cfg)}
        checkpoint.save(out_dir, step, model, optimizers, meta)
        return {'step': step, **meta}

    # ------------------------------------------------------------------------- the loop
    measured = None # (seconds, step) since when throughput is measured, the first steps are slow
    share = max(0.8 * (1 - cfg.decay_frac), 0.05) # of the minutes to measure in: the decay must know when to begin
    t0, wait, seen = time.perf_counter(), 0.0, 0
    clock = t0 - seconds # training began then, had it never been interrupted
    with log:
        while max_iters == 0 or step < max_iters:
            # once in a while
            if max_iters == 0: # --minutes: fix the number of steps as soon as their speed is known
                now = time.perf_counter() - clock
                if measured is None and step >= 5:
                    measured = now, step
                elif measured is not None and now - measured[0] > min(60 * cfg.minutes * share, 120):
                    max_iters = max(step + int((60 * cfg.minutes - now) / (now - measured[0]) * (step - measured[1])), step + 1)
            if cfg.save_every and step % cfg.save_every == 0 and step > start:
                seconds = time.perf_counter() - clock
                save()
            if cfg.eval_every and step % cfg.eval_every == 0: # after the save, so that a resumed run comes by here again
                val_loss = evaluate(model, ds, device, autocast)
                log.row(step, max_iters, val_loss=val_loss)
            # -----------------------------------------------------------------
            factor = get_lr(step, max_iters, cfg)
            for optimizer, lrs in zip(optimizers, peaks):
                for group, peak in zip(optimizer.param_groups, lrs):
                    group['lr'] = peak * factor
            t, total = time.perf_counter(), 0.0
            n = loader.loss_tokens(cfg.grad_accum) # of the whole step: micro batches are weighed by their loss tokens
            for micro_step in range(cfg.grad_accum):
                t = time.perf_counter() if micro_step else t
                batch = loader.next_batch()
                wait += time.perf_counter() - t
                with autocast():
                    _, loss = model(*batch)
                scaler.scale(loss / n).backward() # grads add up
                total = total + loss.detach()
                seen += batch.idx.numel() # padding too: what the device works on
                tokens += batch.idx.numel()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float('inf'))
            for optimizer in optimizers:
                if not scaler.is_enabled() or torch.isfinite(norm): # fp16: all optimizers skip a step that overflowed, or none. waits for the device
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            # -----------------------------------------------------------------
            step += 1
            if cfg.log_every and (step % cfg.log_every == 0 or step == max_iters or step == 1):
                loss = float(total) / n # waits for the device
                dt = time.perf_counter() - t0
                log.row(step, max_iters, loss=loss, lr=lr * factor, tok_s=seen / dt, wait=wait / dt)
                t0, wait, seen = time.perf_counter(), 0.0, 0
    seconds = time.perf_counter() - clock
    val_loss = evaluate(model, ds, device, autocast)
    log.row(step, max_iters, val_loss=val_loss)
    meta = save()
    view.draw_loss([out_dir], out_dir / 'loss.png')
    val = f", {val_loss:.4f} nats per output token on validation" if val_loss is not None else ""
    print(f"{step} steps, {tokens:,} tokens, {seconds:.0f} s{val}: {out_dir}/loss.png (ready after {time.perf_counter() - started:.0f} s)")
    return meta

class Log:
    """ metrics.jsonl, and a progress line on a terminal or plain lines elsewhere. a resumed run rewrites what came after step """

    def __init__(self, out_dir, step):
        self.path, self.last = Path(out_dir) / 'metrics.jsonl', {}
        rows = [x for x in view.read_metrics(out_dir) if x['step'] < step or (x['step'] == step and 'loss' in x)] if step > 0 else []
        checkpoint.write_file(self.path, "".join(json.dumps(x) + "\n" for x in rows).encode())
        columns = TextColumn("{task.description}"), BarColumn(bar_width=5), TimeRemainingColumn() # 80 columns
        self.bar = Progress(*columns, console=Console(soft_wrap=True)) if sys.stdout.isatty() else None

    def __enter__(self):
        if self.bar:
            self.bar.start()
            self.bar.add_task("0/?", total=None)

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def row(self, step, max_iters, **values):
        values = {key: x for key, x in values.items() if x is not None}
        if not values: # no validation set
            return
        self.last.update(values)
        with open(self.path, 'a') as f:
            f.write(json.dumps({'step': step, **values}) + "\n")
        x = self.last
        text = f"{step}/{max_iters or '?'} " + " ".join(s.format(x[key]) for key, s in (('loss', "loss {:.3f}"), ('val_loss', "val {:.3f}"), ('lr', "lr {:.0e}"),
                                                        ('tok_s', "{:,.0f} tok/s"), ('wait', "wait {:.1%}")) if key in x)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, total=max_iters or None, description=text)
        elif 'loss' in values:
            print(f"step {text}", flush=True)

if __name__ == '__main__':
    from nanoarc.cli import main as cli
    cli(['train', *sys.argv[1:]])
