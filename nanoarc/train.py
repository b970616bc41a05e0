"""
the training loop. `nanoarc train --data arc1/training --minutes 5 --out_dir out/mine` on anything from a laptop to a
gpu, `torchrun --nproc_per_node=8 -m nanoarc train ...` on several. SIGTERM and ctrl-c finish the step and save.

writes out_dir/{metrics.jsonl, log.txt, loss.png, val.png, val.json, trained_on.txt, ckpt/}. each row of metrics.jsonl
has `step` and what was measured since the last one: loss and val_loss (nats per output token), done (share of the
steps, once their number is fixed), lr, tok_s, wait (share of the time that was spent waiting for data).
"""
import contextlib
import copy
import importlib.util
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from nanoarc import checkpoint
from nanoarc.corpus import with_earlier
from nanoarc.data import Batch, hash64
from nanoarc.grids import PAD
from nanoarc.run import (Budget, Log, Signals, Since, Timer, Watch, begin_with, exit_after, fit_to_data, from_saved,
                         get_device, get_ranks, is_first_rank, make_dataset, make_model, over_ranks, refuse_changes,
                         threads, together)
from nanoarc.settings import MAX_SEED, check_numbers
from nanoarc.view import draw_loss, draw_val

@dataclass
class TrainConfig:
    out_dir: str = 'out/run' # where checkpoints, metrics.jsonl and loss.png go
    config: str = '' # a TOML file of settings, flags win over it
    resume: str = '' # out_dir of a run to continue exactly, with its own settings
    # out_dir of a run to take the model's settings and weights from. tasks that it does not know get new rows of
    # the embedding. from a run of text the blocks alone are taken
    init_from: str = ''
    minutes: float = 5.0 # train this long: throughput is measured first, then max_iters is fixed. 0 = by max_iters
    max_iters: int = 0 # train this many steps. 0 = by minutes, and if both are set this one counts
    grad_accum: int = 1 # micro batches a step
    lr: float = 0.0 # peak of Muon, for the matrices. 0 = by the width of the model
    adam_lr: float = 0.0 # peak of AdamW, for embeddings, head and norms. 0 = by the width
    ns_steps: int = 5 # Newton-Schulz steps of Muon. 0 = AdamW for the matrices too, at the lr above
    weight_decay: float = 0.1 # of matrices, embeddings and convolutions, times the learning rate
    grad_clip: float = 1.0 # largest norm of the gradient, 0 = off
    warmup_iters: int = 20 # steps of linear warm-up
    warmup_frac: float = 0.0 # the same as a share of max_iters, where that is set. 0 = by warmup_iters
    decay_frac: float = 0.5 # share of the run, at its end, over which the learning rate falls linearly to 0
    eval_every: int = 250 # steps between validations, there is always one at the end. 0 = that one alone
    save_every: int = 250 # steps between checkpoints, there is always one at the end. 0 = that one alone
    log_every: int = 50 # steps between rows of metrics.jsonl. 0 = off
    draw_every: int = 2000 # steps between pictures, loss.png and val.png, there is always one at the end. 0 = off
    log: str = '' # send the rows of metrics.jsonl to a tracker too: 'wandb' | 'trackio'
    ema: float = 0.998 # decay of averaged weights, which validation and solve use. 0 = off
    seed: int = 1337 # of the weights and of the stream of documents
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    # 'float32' | 'bfloat16' | 'float16' | 'auto' = bfloat16 on recent cuda and on a cpu that has it, float16 on older
    # cuda, else float32
    dtype: str = 'auto'
    # torch.compile: 'on' | 'off' | 'auto' = on recent cuda in bfloat16, unless shapes are many (batching='bucket')
    compile: str = 'auto'

    def check(self):
        """ raises ValueError that names the setting """
        if self.compile not in ('auto', 'on', 'off'):
            raise ValueError(f"compile={self.compile!r}: want on, off or auto")
        if self.log and (self.log not in ('wandb', 'trackio') or not importlib.util.find_spec(self.log)):
            raise ValueError(f"log={self.log!r}: want wandb or trackio, and it installed: pip install 'nanoarc[log]'")
        check_numbers(self, dict(grad_accum=1), dict(ema=1, decay_frac=1, warmup_frac=1, seed=MAX_SEED,
                                                     grad_accum=2**16, ns_steps=100))
        if self.ema == 1:
            raise ValueError("ema=1: want less than 1")
        if self.warmup_frac > 0 and self.max_iters == 0 and not self.resume:
            raise ValueError(f"warmup_frac={self.warmup_frac}: a share of max_iters, which is not set, "
                             "want --warmup_iters with --minutes")
        if self.minutes == 0 and self.max_iters == 0 and not self.resume:
            raise ValueError("set --minutes or --max_iters")

def get_lr(step, max_iters, cfg):
    """ factor of the peak learning rate: linear warm-up, flat, linear decay to 0. max_iters=0: not known yet """
    warmup = cfg.warmup_frac * max_iters or cfg.warmup_iters
    factor = min((step + 1) / max(warmup, 1), 1.0)
    if max_iters > 0 and cfg.decay_frac > 0:
        factor = min(factor, (max_iters - step) / (max_iters * cfg.decay_frac))
    return factor

def is_time(every, step):
    """ is it time again for what happens every so many steps? 0 = never """
    return every > 0 and step % every == 0

# -----------------------------------------------------------------------------
# where a run stands, and how good it is

@dataclass
class State:
    """ where a run stands: what changes each step but weights, optimizers and the place in the stream """
    step: int = 0
    max_iters: int = 0 # 0 = by minutes, not fixed yet
    tokens: int = 0 # that all ranks worked on
    seconds: float = 0.0 # of training
    val_loss: float | None = None
    name: str = '' # of the run, for trackers
    losses: tuple = (0.0,) # not logged yet

def fill_rows(batch, n):
    """ a Batch with empty rows behind its own, n in all: a compiler is to see one shape """
    more = n - len(batch.idx)
    if more <= 0:
        return batch
    parts = []
    for x, empty in zip(batch, (PAD, -100, 0, -1, 0, 0)): # of idx, targets, pos, doc, task, dihedral
        if x is not None:
            x = torch.cat([x, x.new_full((more, *x.shape[1:]), empty)])
        parts.append(x)
    batch = Batch(*parts)
    if batch.doc is not None: # cut into documents -1, -2, ... of 128 tokens: one large one costs attention more
        T = batch.doc.size(1)
        batch.doc[-more:] -= torch.arange(T, dtype=batch.doc.dtype, device=batch.doc.device) // 128
    return batch

def evaluate(model, ds, device, autocast, rank=0, world=1, rows=0):
    """
    mean loss over the held out queries, nats per output token, or None if nothing is held out. rows: of a batch at
    least, see fill_rows
    """
    model.eval()
    total, tokens = 0.0, 0
    for batch in ds.val_batches(rank, world):
        batch = Batch(*(x if x is None else x.to(device) for x in batch))
        batch = fill_rows(batch, rows)
        # what is compiled for training has gradients. without them all would be compiled again
        with autocast(), torch.set_grad_enabled(rows > 0):
            _, loss = model(*batch)
        total += loss.item() # waits for the device
        tokens += int((batch.targets >= 0).sum())
    model.train()
    total, tokens = over_ranks(world, 'SUM', total, tokens)
    return total / tokens if tokens else None

# -----------------------------------------------------------------------------

class Training:
    """ all that a run is made of: data, model, optimizers, where it stands. begun or gone on with, and saved, here """

    def __init__(self, cfg, model_cfg, data_cfg):
        self.device, dtype, self.autocast = get_device(cfg.device, cfg.dtype, trains=True)
        self.rank, self.world = get_ranks(self.device)
        torch.manual_seed(cfg.seed)
        self.cfg = cfg = replace(cfg, dtype=dtype) # a resumed run takes the same, whatever 'auto' would be there
        self.model_cfg, self.data_cfg = model_cfg, data_cfg
        self.out_dir = Path(cfg.resume or cfg.out_dir)
        self.timer = Timer()
        self.watch = Watch(self.device)
        together(self.world, self.read)
        # model
        self.model = make_model(self.model_cfg, self.device, self.world)
        self.begun = ""
        if cfg.init_from and not cfg.resume:
            self.begun = begin_with(self.model, self.ds, cfg.init_from)
        self.lr, adam_lr = self.model.peak_rates(cfg.lr, cfg.adam_lr)
        self.optimizers = self.model.optimizers(self.lr, adam_lr, cfg.weight_decay, cfg.ns_steps)
        for group in self.groups():
            group['peak'] = group['lr']
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == 'float16')
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if cfg.ema > 0 else None
        self.eval_model = self.ema or self.model # what is validated and solved with
        self.fixed_rows = self.compile_blocks()
        self.net = DistributedDataParallel(self.model) if self.world > 1 else self.model
        # where it stands
        self.state = State(max_iters=cfg.max_iters, name=f"{self.out_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if cfg.resume:
            self.restore()

    def read(self):
        """ ds, loader, tensors, meta -> {name: value} of what must be the same on all ranks. raises ValueError """
        cfg = self.cfg
        self.ds = make_dataset(self.data_cfg, cfg.seed)
        self.loader = self.ds.loader(self.rank, self.world, self.device)
        if cfg.resume:
            self.tensors, self.meta = checkpoint.load(cfg.resume)
            self.loader.load_state_dict(self.meta['stream']) # refuses another corpus, seed or batch
        self.model_cfg = fit_to_data(self.model_cfg, self.ds)
        if cfg.resume:
            refuse_changes(self.meta, cfg, self.model_cfg)
        same = {**asdict(cfg), **asdict(self.model_cfg), **self.loader.state_dict()}
        for name in ('out_dir', 'config', 'resume', 'init_from', 'device', 'base'): # another machine may have others
            same.pop(name, None)
        return {**same, 'checkpoint': checkpoint.newest(cfg.resume or cfg.init_from)}

    def restore(self):
        """ to where the checkpoint was saved. raises ValueError that names what does not fit """
        tensors, meta = self.tensors, self.meta
        checkpoint.restore_training(self.model, self.optimizers, tensors, meta)
        if self.ema: # of a saved run without averages they begin with its weights
            checkpoint.restore_model(self.ema, tensors, checkpoint.eval_part(meta))
        checkpoint.restore_scaler(self.scaler, meta.get('scaler', {}))
        self.state = from_saved(State, {f.name: meta[f.name] for f in fields(State) if f.name in meta})
        self.state.max_iters = self.cfg.max_iters or self.state.max_iters
        self.begun = f"resumed {self.cfg.resume} at step {self.state.step}"
        del self.tensors

    def groups(self):
        """ the parameter groups of all optimizers """
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def compile_blocks(self):
        """ torch.compile, if it is wanted -> rows that each batch is to have, for one shape. 0 = as they come """
        cfg, batch_rows = self.cfg, self.ds.batch_rows
        gains = self.device.type == 'cuda' and cfg.dtype == 'bfloat16' and batch_rows > 0
        if cfg.compile == 'off' or (cfg.compile == 'auto' and not gains) or len(self.model.blocks) == 0:
            return 0
        # blocks of a kind share what is compiled, and around them little is left. averages stay as they are: without
        # gradients all would be compiled again, for a batch or two
        for block in self.model.blocks:
            block.compile()
        return -(-batch_rows // self.world) # rounded up

    def open_log(self):
        """ -> Log, with what this run is about in it, and trained_on.txt beside it """
        cfg, ds = self.cfg, self.ds
        out_dir = self.out_dir if self.rank == 0 else None
        configs = cfg, self.model_cfg, self.data_cfg
        self.log = Log(out_dir, self.state.step, self.state.name, configs, self.device, self.world)
        where = str(self.device)
        if self.device.type == 'cpu':
            where += f", {threads()}"
        if self.world > 1:
            where += f", {self.world} ranks"
        leaks = [f"leak allowed: {text}" for text in ds.leaks]
        for text in (ds.about(), *leaks, f"{self.model.about()}, on {where}", self.begun):
            if text:
                self.log.print(text)
        if self.rank == 0:
            lines = with_earlier(ds.trained_on(), (cfg.resume, cfg.init_from)) # what solve may not be asked
            checkpoint.write_file(self.out_dir / 'trained_on.txt', lines.encode())
            for name, data in ds.files.items():
                checkpoint.write_file(self.out_dir / name, data)
        return self.log

    def save(self):
        """ a checkpoint. all ranks come by here, the first one writes """
        self.state.losses = self.since.losses()
        self.meta = {**asdict(self.state), 'stream': self.loader.state_dict(), 'scaler': self.scaler.state_dict(),
                     'rows': self.ds.rows, 'leaks': self.ds.leaks, 'train': asdict(self.cfg),
                     'model': asdict(self.model_cfg), 'data': asdict(self.data_cfg)}
        if self.rank == 0:
            with self.timer('saving'):
                self.log.sync()
                checkpoint.save(self.out_dir, self.state.step, self.model, self.optimizers, self.meta, self.ema)

    def validate(self, done):
        """ done: share of the steps, None = not known yet """
        with self.timer('validating and drawing'):
            loss = evaluate(self.eval_model, self.ds, self.device, self.autocast, self.rank, self.world,
                            self.fixed_rows)
        self.state.val_loss = loss
        if loss is not None:
            self.log.row(self.state.step, self.state.max_iters, val_loss=loss, done=done)

    def draw(self):
        """ loss.png and val.png """
        if self.rank == 0 and self.log.last: # something is logged
            with self.timer('validating and drawing'), self.log.harmless("loss.png and val.png"):
                draw_loss([self.out_dir], self.out_dir / 'loss.png')
                draw_val(self.eval_model, self.ds, self.out_dir / 'val.png')
            self.eval_model.train() # also where a picture failed

    def average(self):
        """ weights into their averages. early on the decay is smaller, as in TensorFlow's moving averages """
        decay = min(self.cfg.ema, (1 + self.state.step) / (10 + self.state.step))
        for a, p in zip(self.ema.parameters(), self.model.parameters()):
            if p.requires_grad:
                a.lerp_(p.detach(), 1 - decay)

    def not_finite(self):
        """ -> the error to raise """
        step, tasks = self.state.step, "on another rank"
        if self.watch.bad is not None:
            step, place = self.watch.bad
            names = self.loader.names(*place, self.cfg.grad_accum)
            tasks = f"in a batch of the tasks {', '.join(names)}"
        return ValueError(f"step {step}: the loss or its gradient is not finite, {tasks}. no checkpoint has it. "
                          "it would come again: try a lower --lr")

    def summary(self):
        state, val = self.state, ""
        if state.val_loss is not None:
            val = f", {state.val_loss:.4f} nats per output token on validation"
        return (f"{state.step} steps, {state.tokens:,} tokens, {state.seconds:.0f} s{val}: {self.out_dir} "
                f"({self.timer.shares()} of the time)")

def train(cfg, model_cfg, data_cfg):
    """
    train to the end -> the meta data of the last checkpoint. raises ValueError for what a user can mend, and SystemExit
    after a signal: 0 for SIGTERM, 130 for SIGINT.
    """
    cfg.check()
    out_dir = cfg.resume or cfg.out_dir
    if cfg.resume:
        checkpoint.some_steps(cfg.resume) # raises before the lock would make it a directory
    with Signals() as signals, checkpoint.lock(out_dir) if is_first_rank() else contextlib.nullcontext():
        if not cfg.resume and checkpoint.steps(out_dir):
            raise ValueError(f"{out_dir} holds a run already: continue it with --resume {out_dir}, or choose another "
                             "--out_dir")
        run = Training(cfg, model_cfg, data_cfg)
        if 0 < run.state.max_iters <= run.state.step: # what is on disk stays as it is
            print(f"{run.begun} of {run.state.max_iters}: it is done")
        else:
            with run.open_log():
                loop(run, signals)
        return run.meta

def loop(run, signals):
    """ step after step """
    cfg, state, loader, world = run.cfg, run.state, run.loader, run.world
    net, optimizers, scaler, timer = run.net, run.optimizers, run.scaler, run.timer
    groups = run.groups()
    budget = Budget(cfg, state.step)
    start, planned = state.step, state.max_iters
    clock = time.perf_counter() - state.seconds # when training began, had it never been interrupted
    run.since = Since(run.rank, world, timer, state.tokens, *state.losses)
    run.model.train()
    while True:
        # all ranks do the same: stop if a signal came to one, end when the first one's budget says so
        state.seconds = time.perf_counter() - clock
        if state.max_iters == 0 and run.rank == 0:
            state.max_iters = budget.steps(state.step, state.seconds)
        stop, max_iters, bad = over_ranks(world, 'MAX', signals.got, state.max_iters, run.watch.found())
        stop, state.max_iters = int(stop), int(max_iters)
        done = 0 < state.max_iters <= state.step
        # also in the moment when the number of steps gets fixed
        saves = is_time(cfg.save_every, state.step) or state.max_iters != planned
        planned = state.max_iters
        if saves or stop or done: # nothing bad may be saved, so look at the last step too
            bad, = over_ranks(world, 'MAX', run.watch.found(lag=0))
        if bad:
            raise run.not_finite()
        if stop or done:
            break

        # once in a while
        if saves and state.step > start:
            run.save()
        # after the save: a run that is killed in between and resumed comes by here again (Log drops the rows from here)
        if is_time(cfg.eval_every, state.step):
            run.validate(state.step / state.max_iters if state.max_iters else None)
        if is_time(cfg.draw_every, state.step) and state.step > start:
            run.draw()

        # --------------------------------------------------------------------- a step
        factor = get_lr(state.step, state.max_iters, cfg)
        for group in groups:
            group['lr'] = group['peak'] * factor
        # random numbers of a step (a dropout's) are a function of its number, so there is no state of them to save
        torch.manual_seed(int(hash64(cfg.seed, state.step, run.rank)))
        place = loader.window, loader.batch
        n = loader.loss_tokens(cfg.grad_accum) # of the whole step: micro batches and ranks are weighed by their tokens
        total = 0.0
        for micro_step in range(cfg.grad_accum):
            net.require_backward_grad_sync = micro_step == cfg.grad_accum - 1 # ranks add up gradients once a step
            state.tokens += loader.tokens()
            with timer('waiting for data'):
                batch = fill_rows(loader.next_batch(), run.fixed_rows)
            with run.autocast():
                _, loss = net(*batch)
            scaler.scale(loss * world / n).backward() # grads add up, and over ranks they are averaged
            total = total + loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or float('inf'))
        for optimizer in optimizers:
            # fp16: all optimizers skip a step that overflowed, or none. waits for the device
            if not scaler.is_enabled() or torch.isfinite(norm):
                with run.autocast(): # Muon has products too
                    scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        if run.ema:
            run.average()
        # ---------------------------------------------------------------------
        state.step += 1
        run.since.add(total / n)
        # a gradient may be infinite where the loss is not. in fp16 that is nothing to worry about
        run.watch.add(state.step, place, total if scaler.is_enabled() else total + norm.detach())
        if cfg.log_every > 0 and (is_time(cfg.log_every, state.step) or state.step in (1, state.max_iters)):
            measured = run.since.row(state.tokens) # waits for the device
            run.log.row(state.step, state.max_iters, **measured, lr=run.lr * factor)
    if not done: # a signal
        if state.step > start or not cfg.resume:
            run.save()
        run.log.print(f"stopped by signal {stop} after step {state.step}, --resume {run.out_dir} goes on")
        exit_after(stop)
    run.validate(1.0)
    run.save()
    if cfg.draw_every > 0:
        run.draw()
    run.log.print(run.summary())
    if signals.got == signal.SIGINT: # in the last step or after it: all is saved, and who called is not to go on
        sys.exit(130)
