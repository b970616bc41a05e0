""" python -m pytest tests/test_train.py: the loop """
import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY

from nanoarc import checkpoint, grids, train, view
from nanoarc.cli import main as cli
from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
from nanoarc.decode import Answer
from nanoarc.model import Dropout, Model, ModelConfig
from nanoarc.run import load_run, read_metrics
from nanoarc.train import TrainConfig, evaluate, get_lr

def logged(out_dir, name='loss'):
    """ every value under this name """
    return [row[name] for row in read_metrics(out_dir) if name in row]

def losses(out_dir):
    """ every logged loss, to the last bit """
    found = []
    for row in read_metrics(out_dir):
        found += [(row['step'], name, row[name].hex()) for name in ('loss', 'val_loss') if name in row]
    return found

def is_same(a, b):
    """ two {name: tensor}, to the last bit """
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())

def files(path):
    """ all that is in a directory -> {path: bytes} """
    return {p: p.read_bytes() for p in path.rglob('*') if p.is_file()}

# -----------------------------------------------------------------------------
# it learns

def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    cfg = TrainConfig(warmup_iters=10, decay_frac=0.5)
    lr = [get_lr(step, 100, cfg) for step in range(100)]
    assert lr[0] == 0.1 and lr[9:51] == [1.0] * 42 and lr[75] == 0.5 and lr[99] == pytest.approx(0.02)
    assert [get_lr(step, 0, cfg) for step in range(50)] == lr[:50] # while --minutes still measures, it is the same

def test_it_overfits_a_few_tasks(toy, tmp_path):
    cli(['train', f"--data={toy(n=2, side=3)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=250', '--val_tasks=0',
         '--colors=none', *TINY, '--draw_every=250'])
    loss = logged(tmp_path / 'run')
    assert loss[0] > 2 and loss[-1] < 0.5
    assert (tmp_path / 'run' / 'loss.png').read_bytes()[:4] == b"\x89PNG"

@pytest.mark.slow
def test_the_2024_form_runs_and_its_loss_falls(tmp_path):
    cli(['train', '--data', 'arc1/training', '--shots=-1', '--batching=pad', '--block_size=4096', '--mixer=MA',
         '--max_iters=20', '--val_tasks=4', f"--out_dir={tmp_path}", '--log_every=1'])
    loss = logged(tmp_path)
    assert len(loss) == 20 and max(loss) < 4 and sum(loss[-5:]) < 0.8 * sum(loss[:5])

def test_micro_batches_are_weighed_by_their_loss_tokens(toy, tmp_path, monkeypatch):
    seen = []
    def clip(params, _): # in place of clipping, see the gradients
        seen.extend(p.grad.clone() for p in params)
        return torch.zeros(())
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    data_cfg = DataConfig(data=toy(n=4, side=6), batch_tokens=150)
    cfg = TrainConfig(out_dir=str(tmp_path / 'run'), minutes=0, max_iters=1, grad_accum=3, draw_every=0, device='cpu',
                      dtype='float32')
    model_cfg = ModelConfig(n_layer=1, n_embd=32, mixer='A', dropout=0.0)
    train.train(cfg, model_cfg, data_cfg)
    torch.manual_seed(cfg.seed)
    model, loader = Model(replace(model_cfg, n_task=4)), ArcLoader(ArcDataset(data_cfg))
    n = []
    for _ in range(3): # the mean over all tokens of the three, taken at once
        batch = loader.next_batch()
        n.append(int((batch.targets != -100).sum()))
        model(*batch)[1].backward()
    assert len(set(n)) > 1 # they differ, or this would show nothing
    for got, p in zip(seen, model.parameters(), strict=True):
        assert torch.allclose(got, p.grad / sum(n), atol=1e-6)

@pytest.mark.parametrize('bad', [True, False])
def test_a_step_that_overflows_is_skipped_by_all_optimizers(toy, tmp_path, monkeypatch, bad):
    """ fp16's scaler sees what its own optimizer sees; clipping would spread a NaN from one to the other """
    steps = []
    class Scaler: # found an overflow in nothing that it looked at
        def scale(self, x): return x * (float('nan') if bad else 1)
        def unscale_(self, optimizer): pass
        def step(self, optimizer): steps.append(optimizer); optimizer.step()
        def update(self): pass
        def is_enabled(self): return True
        def state_dict(self): return {}
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *args, **kwargs: Scaler())
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--max_iters=2', *TINY])
    assert len(steps) == (0 if bad else 4)
    assert all(torch.isfinite(x).all() for x in checkpoint.load(tmp_path / 'run')[0].values())

def test_validation_counts_output_tokens_whatever_is_trained_on(toy, tmp_path):
    src, val_loss = toy(n=4), []
    for loss_on in ('query', 'all'):
        out = tmp_path / loss_on
        cli(['train', f"--data={src}", f"--out_dir={out}", '--max_iters=1', '--lr=1e-12', '--adam_lr=1e-12',
             '--shots=-1', f"--loss_on={loss_on}", *TINY])
        val_loss.append(checkpoint.load(out)[1]['val_loss'])
    assert val_loss[0] == pytest.approx(val_loss[1], rel=1e-4)

def test_minutes_become_a_number_of_steps(toy, tmp_path):
    args = [x for x in TINY if not x.startswith('--minutes')]
    cli(['train', f"--data={toy()}", f"--out_dir={tmp_path / 'run'}", '--minutes=0.025', *args])
    meta = checkpoint.load(tmp_path / 'run')[1]
    assert meta['max_iters'] == meta['step'] > 5
    assert meta['seconds'] > 0.5 # 1.5 were asked for, a busy machine may take longer

def test_metrics_have_what_is_promised(tiny_run):
    rows = read_metrics(tiny_run[0])
    for row in rows:
        assert 'step' in row and row.keys() <= {'step', 'loss', 'val_loss', 'lr', 'tok_s', 'wait'}
    assert rows[-1].keys() >= {'loss', 'lr', 'tok_s', 'wait'} and rows[-1]['step'] == 30

def test_a_row_holds_the_mean_loss_of_the_steps_since_the_row_before(toy, tmp_path):
    src, rows = toy(n=4), {}
    for n in (1, 4):
        out = tmp_path / f"{n}"
        cli(['train', f"--data={src}", f"--out_dir={out}", '--max_iters=10', '--eval_every=0', f"--log_every={n}",
             *TINY])
        rows[n] = {row['step']: row['loss'] for row in read_metrics(out) if 'loss' in row}
    each = [rows[1][step] for step in range(1, 11)]
    assert list(rows[4]) == [1, 4, 8, 10] and each[4] != pytest.approx(each[7])
    for begin, end in ((0, 1), (1, 4), (4, 8), (8, 10)):
        assert rows[4][end] == pytest.approx(sum(each[begin:end]) / (end - begin), rel=1e-6)

# -----------------------------------------------------------------------------
# it goes on where it was

def watch_dropout(monkeypatch):
    """ from now on each dropout tells -> list of (is the model in training? are there gradients?), to fill """
    modes, forward = [], Dropout.forward
    def dropped(self, x):
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, x)
    monkeypatch.setattr(Dropout, 'forward', dropped)
    return modes

@pytest.mark.parametrize('mixer, accum, dropout', [('A', 1, 0.0), ('MA', 2, 0.0), ('MA', 2, 0.2)])
def test_a_resumed_run_is_the_run_that_never_stopped(toy, tmp_path, mixer, accum, dropout):
    out = tmp_path / 'run'
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={out}", '--max_iters=13', '--save_every=6', '--eval_every=4',
         '--log_every=5', f"--mixer={mixer}", f"--grad_accum={accum}", *TINY, f"--dropout={dropout}"])
    want, before = checkpoint.load(out)[0], losses(out)
    assert len(before) > 8
    for kind in ('sha256', 'safetensors'): # as if killed after step 12 ...
        checkpoint.file(out, 13, kind).unlink()
    with open(out / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 13, "lo') # ... in the middle of a line
    torch.manual_seed(0) # whatever random numbers this process was at
    cli(['train', '--resume', str(out)])
    assert is_same(checkpoint.load(out)[0], want) and losses(out) == before

@pytest.mark.parametrize('ema', [0.0, 0.9])
def test_dropout_is_on_in_steps_alone(toy, tmp_path, monkeypatch, ema):
    """ not in validation, pictures and solving """
    modes, src, run = watch_dropout(monkeypatch), toy(n=4), tmp_path / 'run'
    monkeypatch.setattr(view, 'draw_tasks', lambda tasks, out: None)
    monkeypatch.setattr(grids, 'MAX_SIDE', 4) # answers of a model that has learned nothing are as large as they may
    cli(['train', f"--data={src}", f"--out_dir={run}", '--max_iters=6', '--eval_every=2', '--val_tasks=2',
         f"--ema={ema}", *TINY, '--draw_every=2', '--dropout=0.2'])
    assert set(modes) == {(True, True), (False, False)}
    modes.clear()
    cli(['solve', '--run', str(run), '--data', src, '--allow_leak', '--ttt_steps=2', '--views=1', '--device=cpu'])
    assert set(modes) == {(True, True), (False, False)}
    model, data_cfg, meta = load_run(run, 'cpu')
    ds = ArcDataset(data_cfg)
    for _ in range(2):
        assert evaluate(model, ds, torch.device('cpu'), contextlib.nullcontext) == pytest.approx(meta['val_loss'])

def test_resuming_a_finished_run_changes_nothing(toy, tmp_path, capsys):
    run = tmp_path / 'run'
    cli(['train', f"--data={toy()}", f"--out_dir={run}", '--max_iters=2', *TINY])
    before = files(run)
    cli(['train', '--resume', str(run)])
    assert "at step 2 of 2: it is done" in capsys.readouterr().out
    assert files(run) == before

def test_a_directory_that_holds_a_run_is_not_overwritten(tiny_run, capsys):
    with pytest.raises(SystemExit):
        cli(['train', f"--data={tiny_run[1]}", f"--out_dir={tiny_run[0]}", '--max_iters=1', *TINY])
    assert "--resume" in capsys.readouterr().err

def test_averaged_weights_are_the_average_and_what_solve_and_validation_use(toy, tmp_path):
    plain, ema = tmp_path / 'plain', tmp_path / 'ema'
    args = ['train', f"--data={toy(n=4)}", '--max_iters=12', '--save_every=1', '--log_every=1', '--eval_every=0', *TINY]
    cli([*args, f"--out_dir={plain}"])
    cli([*args, f"--out_dir={ema}", '--ema=0.5'])
    (tensors, meta), (plain_tensors, plain_meta) = checkpoint.load(ema), checkpoint.load(plain)
    averaged = {name: x for name, x in tensors.items() if name.startswith('ema.')}
    # it only watches
    assert is_same({name: x for name, x in tensors.items() if name not in averaged}, plain_tensors)
    assert losses(ema)[:-1] == losses(plain)[:-1]
    assert meta['val_loss'] != plain_meta['val_loss']
    checkpoint.file(ema, 12, 'sha256').unlink()
    before = checkpoint.load(ema)[0]
    for name, x in averaged.items(): # the decay is min(0.5, 12/21)
        weight = tensors[name.replace('ema.', 'model.', 1)]
        assert torch.allclose(x, 0.5 * before[name] + 0.5 * weight, atol=1e-6)
    cli(['train', '--resume', str(ema)])
    again = checkpoint.load(ema)
    assert is_same(again[0], tensors) and again[1]['val_loss'] == meta['val_loss']
    model = load_run(ema, 'cpu')[0]
    assert is_same({f"ema.{name}": x for name, x in model.state_dict().items()}, averaged)
    # switched on later, it begins with the weights
    cli(['train', '--resume', str(plain), '--ema=0.9', '--max_iters=13'])

def test_what_an_earlier_run_was_trained_on_is_not_forgotten(toy, tmp_path, capsys):
    src, other = toy(n=2, side=12), toy(name='other', n=2, side=12, seed=5)
    first, second = str(tmp_path / 'first'), str(tmp_path / 'second')
    args = ['--max_iters=1', '--val_tasks=0', *TINY]
    cli(['train', f"--data={src}", f"--out_dir={first}", *args])
    cli(['train', f"--data={other}", f"--adapt={src}", f"--init_from={first}", f"--out_dir={second}", *args])
    cli(['train', '--resume', second, '--max_iters=2'])
    with pytest.raises(SystemExit):
        cli(['solve', '--run', second, '--data', src])
    assert "was trained on 2 of these queries" in capsys.readouterr().err

def test_training_never_opens_the_answers_of_adapt(toy, tmp_path):
    src = Path(toy(n=2))
    for path in src.iterdir():
        obj = json.loads(path.read_text())
        for pair in obj['test']:
            pair['output'] = "closed"
        path.write_text(json.dumps(obj))
    cfg = TrainConfig(out_dir=str(tmp_path / 'run'), minutes=0, max_iters=2, draw_every=0, device='cpu')
    meta = train.train(cfg, ModelConfig(n_layer=1, n_embd=32), DataConfig(data='', adapt=str(src)))
    assert meta['step'] == 2

# -----------------------------------------------------------------------------
# pictures, and shapes for a compiler

def test_a_picture_of_validation_queries_is_drawn_on_the_way(toy, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(view, 'draw_tasks', lambda tasks, out: drawn.append(tasks))
    cli(['train', f"--data={toy(n=4)}", f"--out_dir={tmp_path / 'run'}", '--max_iters=5', '--val_tasks=2', *TINY,
         '--draw_every=2'])
    assert [len(tasks) for tasks in drawn] == [2, 2, 2] # after steps 2 and 4, and at the end
    for task, attempts in drawn[-1]:
        assert len(task.queries) == 1 and len(attempts) == 1
    model, data_cfg, _ = load_run(tmp_path / 'run', 'cpu')
    def cut_short(*args, **kwargs): # in its third row
        return [Answer(0, [3, 4, 10, 5, 6, 10, 7], 0.0, True)]
    monkeypatch.setattr(view, 'decode', cut_short)
    view.draw_val(model, ArcDataset(data_cfg), tmp_path / 'val.png')
    for _, attempts in drawn[-1]:
        assert attempts[0]['attempt_1'].tolist() == [[3, 4], [5, 6]]
    want = [[task.name, *(grid.tolist() for grid in task.queries[0]), [[3, 4], [5, 6]]] for task, _ in drawn[-1]]
    assert json.loads((tmp_path / 'val.json').read_text()) == want # what the terminal shows
    prompts = []
    def asked(model, idx, pos, **kwargs):
        prompts.append(idx.tolist())
        return cut_short()
    monkeypatch.setattr(view, 'decode', asked)
    for ignore_index in (-100, -1):
        view.draw_val(model, ArcDataset(replace(data_cfg, ignore_index=ignore_index)), tmp_path / 'val.png')
    assert prompts[:2] == prompts[2:] and all(idx[0][-1] == grids.OUT for idx in prompts)

@pytest.mark.parametrize('mixer', ['MA', 'S'])
def test_batches_are_filled_up_for_a_compiler(toy, mixer):
    """ with empty rows, in small documents, which change nothing """
    ds = ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=512, batch_tokens=2048))
    model, batch = Model(ModelConfig(mixer=mixer, depth=2, n_task=4, dropout=0.0)), ArcLoader(ds).next_batch()
    batch = Batch(*(x[:3].clone() for x in batch))
    full = train.fill_rows(batch, 5)
    assert all(len(x) == 5 and torch.equal(x[:3], y) for x, y in zip(full, batch))
    assert (full.targets[3:] == -100).all() and full.doc[3:].unique().tolist() == [-4, -3, -2, -1]
    assert torch.allclose(model(*full)[1], model(*batch)[1], rtol=1e-6)
    assert train.fill_rows(batch, 3) is batch and train.fill_rows(batch, 0) is batch
    text = train.fill_rows(Batch(batch.idx, batch.targets, None, None, None, None), 4)
    assert [x if x is None else len(x) for x in text] == [4, 4, None, None, None, None]

@pytest.mark.parametrize('mixer', ['A', 'MA', 'MS'])
def test_validation_leaves_the_compiled_blocks_to_training(toy, mixer, monkeypatch):
    """ it comes before the first step: shapes of its own would use up the compiler's patience """
    torch._dynamo.reset()
    # masks as on a gpu, which do not depend on what is in a row
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    src = toy(n=30, side=9)
    ds = ArcDataset(DataConfig(data=src, batching='pack', block_size=512, batch_tokens=1024, val_tasks=15))
    model = Model(ModelConfig(mixer=mixer, n_layer=4, n_embd=32, head_size=16, dropout=0.0, n_task=30))
    calls, graphs = [], []
    def backend(graph, _):
        graphs.append(graph)
        def counted(*args):
            calls.append(1)
            return graph(*args)
        return counted
    for block in model.blocks:
        block.compile(backend=backend)
    evaluate(model, ds, torch.device('cpu'), contextlib.nullcontext, rows=2)
    n = len(graphs)
    assert n > 0
    loader = ArcLoader(ds)
    for _ in range(3):
        calls.clear()
        model(*loader.next_batch())[1].backward()
        assert len(calls) == 4
    evaluate(model, ds, torch.device('cpu'), contextlib.nullcontext, rows=2)
    assert len(graphs) == n # validation and training run the same ones

def test_averages_are_not_compiled(toy, tmp_path):
    cfg = TrainConfig(out_dir=str(tmp_path), compile='on', device='cpu')
    run = train.Training(cfg, ModelConfig(n_layer=2, n_embd=32), DataConfig(data=toy(n=4)))
    assert all(block._compiled_call_impl for block in run.model.blocks)
    assert not any(block._compiled_call_impl for block in run.ema.blocks)

@pytest.mark.parametrize('name, most', [('grad_accum', 2**16), ('ns_steps', 100)])
def test_counts_that_no_step_could_do_are_refused(name, most):
    TrainConfig(**{name: most}).check()
    with pytest.raises(ValueError, match=f"{name}={most + 1}: want . to {most}"):
        TrainConfig(**{name: most + 1}).check()
