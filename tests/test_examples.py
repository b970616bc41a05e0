""" python -m pytest tests/test_examples.py """
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from nanoarc import data
from nanoarc.data import ArcDataset, ArcLoader, Batch, DataConfig
from nanoarc.grids import VOCAB_SIZE
from nanoarc.workers import ArcStream

EXAMPLES = sorted((Path(__file__).parent.parent / 'examples').glob('*.py'))
LIBRARIES = {'dataloader': 'torchdata', 'hf_trainer': 'transformers', 'lightning_module': 'lightning'}
STARTS = ['fork', pytest.param('spawn', marks=pytest.mark.slow)] # of worker processes
# each spawned worker takes seconds to begin: two of them tell what three would
WORKERS = [(0, 'fork'), (1, 'fork'), (2, 'fork'), (3, 'fork'), pytest.param(2, 'spawn', marks=pytest.mark.slow)]

def load(name):
    """ an example as a module. skips if its library is not there """
    for library in ('torchdata', LIBRARIES.get(name, 'torch')):
        pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[0].parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture
def cfg(toy):
    return DataConfig(data=toy(n=4), shots=-1, batching='pad', block_size=256, batch_tokens=1024, val_tasks=0)

def clone(batch):
    return Batch(*(x if x is None else x.clone() for x in batch))

def reference(ds, n, rank=0, world=1):
    """ the first n batches, by the loader itself """
    loader = ArcLoader(ds, rank, world)
    return [clone(loader.next_batch()) for _ in range(n)]

def same(a, b):
    """ are these two batches, or lists of batches, equal to the last byte? """
    if isinstance(a, (Batch, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)

def take(batches, n):
    return [batch for _, batch in zip(range(n), batches)]

def document(batch, j):
    """ row j of a Batch """
    return Batch(*(x if x is None else x[j] for x in batch))

@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_under_40_lines(path):
    assert len(path.read_text().splitlines()) < 40
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]

@pytest.mark.slow
@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_out_of_the_box(path, tmp_path):
    load(path.stem)
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr

# -----------------------------------------------------------------------------
# nanogpt_loop

def test_the_loop_resumes_exactly(cfg, tmp_path, capsys):
    example, losses = load('nanogpt_loop'), []
    for parts in ([6], [2, 4]):
        torch.manual_seed(0)
        for steps in parts:
            example.main(cfg, steps, tmp_path / str(parts))
        losses.append([line.split(' | ')[1] for line in capsys.readouterr().out.splitlines()])
    assert losses[0] == losses[1] and len(set(losses[0])) == 6
    found = []
    for parts in ([6], [2, 4]):
        out = tmp_path / str(parts)
        found.append((torch.load(out / 'ckpt.pt')[0], (out / 'loader.json').read_text()))
    (weights, place), (weights_in_two, place_in_two) = found
    assert place == place_in_two and json.loads(place)['batch'] == 6
    assert all(torch.equal(x, weights_in_two[name]) for name, x in weights.items())

# -----------------------------------------------------------------------------
# dataloader

def test_the_dataloader_example_resumes_exactly(cfg, capsys):
    assert load('dataloader').main(cfg, n=2)
    assert "documents 8..15 | idx (8, 256)" in capsys.readouterr().out

@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('shots', [0, -1])
def test_two_workers_give_the_bytes_of_single_documents(cfg, shots, start):
    cfg.shots = shots
    ds = ArcDataset(cfg)
    batches = take(DataLoader(ds, batch_size=3, num_workers=2, collate_fn=ds.collate, multiprocessing_context=start), 4)
    assert len(batches) == 4
    for i, batch in enumerate(batches):
        assert same(batch, ds.collate([ds[3 * i + j] for j in range(3)]))
        for j in range(3):
            assert same(document(batch, j), ds[3 * i + j])

def stateful(ds, workers, start, state=None, **kwargs):
    """ a StatefulDataLoader over a new stream, or over the dataset in kwargs, at a place that went through json """
    lib = pytest.importorskip('torchdata.stateful_dataloader')
    args = {'dataset': ArcStream(ds), 'batch_size': None, 'num_workers': workers,
            'multiprocessing_context': start if workers else None}
    loader = lib.StatefulDataLoader(**{**args, **kwargs})
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    return loader

@pytest.mark.parametrize('workers, start', WORKERS)
def test_workers_give_the_batches_of_the_loader_in_order(cfg, workers, start):
    ds = ArcDataset(cfg)
    assert same(take(stateful(ds, workers, start), 10), reference(ds, 10))
    loader = DataLoader(ArcStream(ds, 1, 2), batch_size=None, num_workers=workers,
                        multiprocessing_context=start if workers else None)
    assert same(take(loader, 5), reference(ds, 5, 1, 2))

@pytest.mark.parametrize('workers, start', WORKERS)
def test_a_stateful_loader_resumes_exactly_wherever_it_was_saved(cfg, workers, start, monkeypatch):
    if start == 'fork': # 10 batches a window. a new process would not know
        monkeypatch.setattr(data, 'WINDOW', 40)
    ds = ArcDataset(cfg)
    want = reference(ds, 32)
    for k in (0, 1, 2, 10, 21) if start == 'fork' else (2,):
        loader = stateful(ds, workers, start)
        assert same(take(loader, k) if k else [], want[:k]) # k=0 is saved before there is an iterator
        state = loader.state_dict()
        loader = stateful(ds, workers, start, state)
        again = stateful(ds, workers, start, loader.state_dict()) # saved at once, not a batch later
        assert same(take(again, 4), want[k : k + 4])
        assert same(take(loader, 2), want[k : k + 2])
        again = stateful(ds, workers, start, loader.state_dict())
        assert same(take(again, 8), want[k + 2 : k + 10])

@pytest.mark.parametrize('workers', [0, 2])
def test_a_place_in_another_stream_is_refused(cfg, workers):
    loader = stateful(ArcDataset(cfg), workers, 'fork')
    take(loader, 3)
    state = loader.state_dict()
    del loader # workers of an iterator that a traceback holds are waited for, 5 seconds each
    batches = iter(stateful(ArcDataset(cfg, seed=1), workers, 'fork', state))
    with pytest.raises(ValueError, match="seed differs"):
        next(batches)
    if workers:
        batches._shutdown_workers()

# a stream object that was iterated before is as good as a new one

@pytest.mark.parametrize('workers', [0, 2])
def test_a_used_stream_tells_the_place_that_it_was_sent_to(cfg, workers):
    ds = ArcDataset(cfg)
    stream, want = ArcStream(ds), reference(ds, 12)
    loader = stateful(ds, workers, 'fork', dataset=stream)
    take(loader, 3)
    state = loader.state_dict()
    take(iter(stream), 7)
    stream.load_state_dict(place := ArcLoader(ds).state_dict())
    assert stream.state_dict() == place
    loader.load_state_dict(state)
    again = stateful(ds, workers, 'fork', loader.state_dict())
    assert same(take(again, 4), want[3:7])
    assert same(take(loader, 4), want[3:7])

@pytest.mark.parametrize('start', STARTS)
def test_a_used_stream_may_go_to_workers(cfg, start):
    ds = ArcDataset(cfg)
    stream, want = ArcStream(ds), reference(ds, 12)
    take(iter(stream), 7)
    for k in (0, 1, 3) if start == 'fork' else (1,):
        loader = stateful(ds, 2, start, dataset=stream)
        assert same(take(loader, k) if k else [], want[:k])
        assert same(take(stateful(ds, 2, start, loader.state_dict()), 6), want[k : k + 6])

@pytest.mark.parametrize('workers', [0, 2])
def test_a_second_pass_begins_anew_and_knows_where_it_is(cfg, workers):
    ds = ArcDataset(cfg)
    want = reference(ds, 12)
    loader = stateful(ds, workers, 'fork', persistent_workers=workers > 0)
    take(loader, 7)
    for k in (0, 1, 3):
        batches = iter(loader)
        assert same(take(batches, k) if k else [], want[:k])
        assert same(take(stateful(ds, workers, 'fork', loader.state_dict()), 4), want[k : k + 4])

@pytest.mark.parametrize('workers', [0, 1, 2, 3])
def test_a_place_of_the_loader_may_go_to_a_stream_with_any_workers(cfg, workers):
    ds = ArcDataset(cfg)
    loader, stream, want = ArcLoader(ds), ArcStream(ds), reference(ds, 12)
    for _ in range(5):
        loader.next_batch()
    stream.load_state_dict(loader.state_dict())
    assert same(take(DataLoader(stream, batch_size=None, num_workers=workers), 6), want[5:11])

# -----------------------------------------------------------------------------
# hf_trainer

def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=None, bos_token_id=None, eos_token_id=None))

@pytest.mark.parametrize('batching', ['pad', 'pack', 'bucket'])
@pytest.mark.parametrize('loss_on', ['query', 'outputs', 'all'])
def test_the_loss_of_transformers_is_that_of_idx_and_targets(cfg, batching, loss_on):
    example = load('hf_trainer')
    cfg.batching, cfg.loss_on = batching, loss_on
    model, loader = tiny_llama(), ArcLoader(ArcDataset(cfg))
    for _ in range(3):
        batch = loader.next_batch()
        out = model(**example.to_hf(batch))
        assert torch.equal(out.loss, F.cross_entropy(out.logits.view(-1, VOCAB_SIZE), batch.targets.view(-1)))
        assert torch.equal(example.to_hf(batch)['input_ids'], batch.idx) and out.loss.item() > 1

def test_positions_count_from_0_within_a_document_and_attention_ends_at_padding(cfg):
    example = load('hf_trainer')
    cfg.batching = 'pack'
    batch = ArcLoader(ArcDataset(cfg)).next_batch()
    fields = {name: x.tolist() for name, x in example.to_hf(batch).items()}
    for docs, places, mask in zip(batch.doc.tolist(), fields['position_ids'], fields['attention_mask']):
        assert places == [i - docs.index(n) for i, n in enumerate(docs)]
        assert mask == [int(n >= 0) for n in docs]
    assert batch.doc.max() > 0 and (batch.doc == -1).any()

def test_trainer_sees_the_documents_in_order_and_resumes_exactly(cfg, tmp_path, monkeypatch):
    example, seen, losses = load('hf_trainer'), [], {}
    to_hf, train = example.to_hf, example.ArcTrainer.train
    monkeypatch.setattr(example, 'to_hf', lambda batch: seen.append(batch) or to_hf(batch))
    def record(self, **kwargs):
        train(self, **kwargs)
        losses[len(losses)] = [log['loss'] for log in self.state.log_history if 'loss' in log]
    monkeypatch.setattr(example.ArcTrainer, 'train', record)
    example.main(cfg, steps=12, out=tmp_path)
    ds = ArcDataset(cfg)
    assert len(seen) >= 12
    for i, batch in enumerate(seen):
        assert same(batch, ds.collate([ds[8 * i + j] for j in range(8)]))
    example.main(cfg, steps=12, out=tmp_path, resume=str(tmp_path / 'checkpoint-10'))
    assert losses[0] == losses[1] and len(losses[0]) == 12

# -----------------------------------------------------------------------------
# lightning_module

def fit(example, cfg, out, workers=0, resume=None, steps=9, **kwargs):
    """ a checkpoint after each step -> (the batches that training_step saw, weights) """
    from lightning.pytorch.callbacks import ModelCheckpoint
    seen = []
    class Recorder(example.Bigram):
        def training_step(self, batch, batch_idx):
            seen.append(clone(batch))
            return super().training_step(batch, batch_idx)
    torch.manual_seed(0)
    model, save = Recorder(), ModelCheckpoint(out, '{step}', every_n_train_steps=1, save_top_k=-1)
    trainer = example.lightning.Trainer(max_steps=steps, accelerator='cpu', logger=False, callbacks=[save],
                                        enable_progress_bar=False, enable_model_summary=False, **kwargs)
    trainer.fit(model, datamodule=example.ArcData(cfg, workers), ckpt_path=resume)
    return seen, model.logits.weight.detach()

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kwargs', [{}, {'limit_train_batches': 4}, {'accumulate_grad_batches': 2}],
                         ids=['endless', 'epochs', 'accumulate'])
def test_lightning_resumes_exactly(cfg, tmp_path, kwargs, workers, monkeypatch):
    example, per_step = load('lightning_module'), kwargs.get('accumulate_grad_batches', 1)
    monkeypatch.setattr(data, 'WINDOW', 20) # 5 batches a window
    seen, weight = fit(example, cfg, tmp_path / 'a', workers, **kwargs)
    assert same(seen, reference(ArcDataset(cfg), 9 * per_step)) # and an epoch of Lightning does not start over
    for k in (1, 4, 7):
        again, other = fit(example, cfg, tmp_path / str(k), workers, resume=tmp_path / 'a' / f"step={k}.ckpt", **kwargs)
        assert same(again, seen[k * per_step :]), k
        assert torch.equal(weight, other), k

def test_lightning_gives_each_rank_its_rows(cfg):
    module = load('lightning_module').ArcData(cfg)
    for rank in range(2):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        assert same([batch for batch, _ in take(module.train_dataloader(), 4)], reference(module.ds, 4, rank, 2))

def test_the_lightning_example_runs_and_goes_on(cfg, tmp_path):
    example = load('lightning_module')
    example.main(cfg, steps=3, out=tmp_path)
    example.main(cfg, steps=5, out=tmp_path, resume=tmp_path / 'checkpoints' / 'epoch=0-step=3.ckpt')
    assert (tmp_path / 'checkpoints' / 'epoch=0-step=5.ckpt').exists()

# -----------------------------------------------------------------------------
# quickstart.ipynb

NOTEBOOK = EXAMPLES[0].parent / 'quickstart.ipynb'

def outputs_of(cells):
    """ -> list of the outputs of all cells of a notebook """
    found = []
    for cell in cells:
        found += cell.get('outputs', [])
    return found

def test_the_notebook_is_kept_with_one_picture_and_no_other_output():
    output, = outputs_of(json.loads(NOTEBOOK.read_text('utf-8'))['cells'])
    assert {*output['data']} == {'image/png', 'text/plain'} and NOTEBOOK.stat().st_size < 100_000

@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    monkeypatch.setenv('MINUTES', '0.05')
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    where = {'metadata': {'path': str(tmp_path)}} # it writes beside itself
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=where).execute()
    said, kinds = "", []
    for output in outputs_of(notebook.cells):
        said += output.get('text', '')
        kinds += output.get('data', {})
    assert "400 tasks to learn from, 400 to be asked about" in said and " of 34 tasks with every output right" in said
    assert kinds.count('image/png') == 3 # the loss, tasks of the evaluation, a task of one's own
    out = tmp_path / 'out' / 'notebook'
    assert len(json.loads((out / 'submission.json').read_text())) == 34
    assert [*json.loads((out / 'mine' / 'submission.json').read_text())] == ['mine']
    assert "34 solved" in (out / 'page.html').read_text()
