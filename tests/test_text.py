"""
python -m pytest tests/test_text.py: shards, their loader, prepare under kills, one trainer. toy texts made here, no
network
"""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from slow_loader import EPOCH, bijection, hash64
from test_promises import digest
from test_reliability import fork, join

from nanoarc import checkpoint, hellaswag, text
from nanoarc.cli import main as cli
from nanoarc.run import read_metrics
from nanoarc.text import PrepareConfig, TextConfig, TextDataset, open_shard, prepare, shard_bytes

pytest.importorskip('tokenizers', reason="pip install 'nanoarc[text]'")
WORDS = "the a grid of cells is turned and each row that had one color has two now while rows without it".split()
WORDS += "stay as they were ünïcödé 123 don't".split()

def toy_texts(n=60, seed=0):
    rng, texts = random.Random(seed), []
    for _ in range(n):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 4))]
        texts.append("\n".join(lines))
    return texts

def write_jsonl(path, texts, key='text'):
    Path(path).write_text("".join(json.dumps({key: x}) + "\n" for x in texts))
    return str(path)

def made(tmp_path, name='shards', n=60, **kwargs):
    """ toy texts prepared -> the directory of their shards """
    src = write_jsonl(tmp_path / f"{name}.jsonl", toy_texts(n))
    settings = dict(dataset=src, out_dir=str(tmp_path / name), stem='toy', train_bpe=300, shard_tokens=1000)
    prepare(PrepareConfig(**{**settings, **kwargs}))
    return str(tmp_path / name)

def write_shards(path, sizes, kind='npy', vocab=50257, seed=0):
    """ shards as others make them, without a manifest: the first is for validation -> (path, list of their tokens) """
    path.mkdir()
    rng, shards = np.random.default_rng(seed), []
    for k, n in enumerate(sizes):
        shards.append(rng.integers(0, vocab, n).astype(np.uint16))
        (path / f"edufineweb_{'train' if k else 'val'}_{k:06d}.{kind}").write_bytes(shard_bytes(shards[-1], kind))
    return str(path), shards

def content(path):
    return {x.name: x.read_bytes() for x in Path(path).iterdir() if x.name != 'lock'}

# -----------------------------------------------------------------------------
# shards

@pytest.mark.parametrize('kind', ['npy', 'bin'])
def test_a_shard_is_what_others_write_and_read(tmp_path, kind):
    tokens, path = np.array([50256, 1, 65535, 0], np.uint16), tmp_path / f"x.{kind}"
    path.write_bytes(shard_bytes(tokens, kind))
    if kind == 'bin': # as llm.c and modded-nanogpt read it
        header = np.fromfile(path, np.int32, 256)
        assert header[:3].tolist() == [20240520, 1, 4] and not header[3:].any()
        assert np.fromfile(path, np.uint16, offset=1024).tolist() == tokens.tolist()
    else: # as build-nanogpt does
        x = np.load(path)
        assert x.dtype == np.uint16 and x.tolist() == tokens.tolist()
        np.save(path, tokens)
    x = open_shard(path)
    assert x.tolist() == tokens.tolist() and x.dtype == np.uint16 and not x.flags.writeable

@pytest.mark.parametrize(
    'name, data, want',
    [
        ('x.bin', b"", "magic 0"),
        ('x.bin', shard_bytes(np.zeros(4, np.uint16), 'bin')[:-1], "4 tokens in 1031 bytes"),
        ('x.bin', bytes(2000), "magic 0"),
        ('x.npy', b"", "x.npy: "),
        ('x.npy', shard_bytes(np.zeros(4, np.uint16), 'npy')[:-1], "x.npy: "),
        ('x.npy', shard_bytes(np.zeros(4, np.int64), 'npy'), "want uint16 tokens in one dimension, got int64 in 1"),
        ('x.npy', shard_bytes(np.zeros((2, 2), np.uint16), 'npy'), "got uint16 in 2"),
    ],
)
def test_a_file_that_is_no_shard_is_refused_by_its_name(tmp_path, name, data, want):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="x.(npy|bin): ") as e:
        open_shard(tmp_path / name)
    assert want in str(e.value)

def test_a_changed_shard_tokenizer_or_manifest_is_refused_by_its_name(tmp_path):
    path = Path(made(tmp_path))
    TextDataset(TextConfig(str(path), block_size=32, batch_tokens=64))
    for name in sorted(x.name for x in path.iterdir() if x.name != 'lock'):
        old = (path / name).read_bytes()
        (path / name).write_bytes(old[:-9] + bytes([old[-9] ^ 1]) + old[-8:] if name != 'manifest.json' else old[:-9])
        with pytest.raises(ValueError, match=f"{name}: "):
            TextDataset(TextConfig(str(path), block_size=32, batch_tokens=64))
        (path / name).write_bytes(old)
    shard = path / 'toy_train_000001.npy'
    shard.write_bytes(shard_bytes(np.zeros(999, np.uint16), 'npy'))
    with pytest.raises(ValueError, match="toy_train_000001.npy: 999 tokens, the manifest says 1,000"):
        TextDataset(TextConfig(str(path), block_size=32, batch_tokens=64, check_shards=False))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="toy_train_000001.npy"):
        TextDataset(TextConfig(str(path), block_size=32, batch_tokens=64))

def test_a_directory_of_nothing_of_both_kinds_or_of_other_tokens_is_refused(tmp_path):
    cfg = TextConfig(str(tmp_path / 'a'), block_size=8, batch_tokens=8)
    write_shards(tmp_path / 'a', [100, 100], vocab=60000)
    with pytest.raises(ValueError, match="edufineweb_(val|train)_00000[01].npy: token 5.*less than 50257"):
        TextDataset(cfg)
    (tmp_path / 'a' / 'x_train_000002.bin').write_bytes(shard_bytes(np.zeros(9, np.uint16), 'bin'))
    with pytest.raises(ValueError, match="both .npy and .bin"):
        TextDataset(cfg)
    shutil.rmtree(tmp_path / 'a')
    (tmp_path / 'a').mkdir()
    with pytest.raises(ValueError, match="no shards here"):
        TextDataset(cfg)
    (tmp_path / 'a' / 'prepare.json').write_text("{}")
    with pytest.raises(ValueError, match="has not finished here"):
        TextDataset(cfg)

@pytest.mark.parametrize('change, want', [
    (lambda x: x['shards'][0].update(name='../victim'), "shard '../victim', want toy_val_000000.npy"),
    (lambda x: x['shards'].append(dict(x['shards'][0])), "shard 'toy_val_000000.npy', want toy_train_000001.npy"),
    (lambda x: x.pop('shards'), "no field 'shards'"), (lambda x: x.pop('settings'), "no field 'settings'"),
])
def test_a_preparation_touches_no_shard_but_its_own(tmp_path, monkeypatch, change, want):
    """ whatever its prepare.json names """
    victim, write = tmp_path / 'victim', text.Preparation.write_shard
    victim.write_bytes(shard_bytes(np.zeros(1000, np.uint16), 'npy'))
    def once(self, *args):
        write(self, *args)
        raise KeyboardInterrupt
    src, out = write_jsonl(tmp_path / 'x.jsonl', toy_texts()), str(tmp_path / 'shards')
    cfg = PrepareConfig(src, out_dir=out, stem='toy', train_bpe=300, shard_tokens=1000)
    with monkeypatch.context() as mp:
        mp.setattr(text.Preparation, 'write_shard', once)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
    path = tmp_path / 'shards' / 'prepare.json'
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {want}")):
        prepare(cfg)
    assert victim.exists()

@pytest.mark.parametrize('line', ["[" * 100_000, '{"text": ' + "[" * 100_000, "{", "[]", "\xff"])
def test_lines_of_nonsense_are_named(tmp_path, capsys, line):
    path = tmp_path / 'x.jsonl'
    path.write_bytes(b'{"text": "a"}\n' + line.encode('latin-1'))
    for command in (['prepare', '--dataset', str(path), '--train_bpe=300', f"--out_dir={tmp_path / 'out'}"],
                    ['hellaswag', '--model=x', '--file', str(path)]):
        with pytest.raises(SystemExit) as e:
            cli(['text', *command])
        error = capsys.readouterr().err
        line = 2 if command[0] == 'prepare' else 1
        assert e.value.code == 2 and f"{path}: line {line}" in error and error.count("\n") == 1

# -----------------------------------------------------------------------------
# the loader

class DataLoaderLite:
    """ that of build-nanogpt, by its description, on shards in memory """

    def __init__(self, shards, B, T, rank, world):
        self.shards, self.B, self.T, self.rank, self.world = shards, B, T, rank, world
        self.current_shard, self.current_position = 0, B * T * rank

    def next_batch(self):
        n, stride = self.B * self.T, self.B * self.T * self.world
        tokens = torch.from_numpy(self.shards[self.current_shard].astype(np.int64))
        buf = tokens[self.current_position : self.current_position + n + 1]
        x, y = buf[:-1].view(self.B, self.T), buf[1:].view(self.B, self.T)
        self.current_position += stride
        if self.current_position + stride + 1 > len(self.shards[self.current_shard]):
            self.current_shard = (self.current_shard + 1) % len(self.shards)
            self.current_position = self.n_before()
        return x, y

    def n_before(self):
        return self.B * self.T * self.rank

@pytest.mark.parametrize('world', [1, 2, 8])
@pytest.mark.parametrize('kind', ['npy', 'bin'])
def test_in_sequence_it_is_the_loader_of_build_nanogpt(tmp_path, world, kind):
    for trial in range(12):
        rng = random.Random(trial)
        T, B = rng.randint(1, 9), rng.randint(1, 3)
        G = B * T * world
        sizes = [50] + [G + 1 + rng.choice([0, rng.randint(0, 5 * G), G - 1, G]) for _ in range(rng.randint(1, 4))]
        path, shards = write_shards(tmp_path / f"{trial}", sizes, kind)
        ds = TextDataset(TextConfig(path, block_size=T, batch_tokens=G, order='sequential'))
        lite = [DataLoaderLite(shards[1:], B, T, rank, world) for rank in range(world)]
        ours = [ds.loader(rank, world, prefetch=rank % 2 == 0) for rank in range(world)]
        for k in range(3 * sum(sizes) // G):
            for a, b in zip(lite, ours):
                x, y = a.next_batch()
                batch = b.next_batch()
                assert torch.equal(batch.idx, x) and torch.equal(batch.targets, y), (trial, k)
                assert batch.idx.dtype == batch.targets.dtype == torch.int64
                assert batch[2:] == (None, None, None, None)

def test_shuffled_it_is_the_same_in_plain_python(tmp_path):
    T, rows, seed = 7, 5, 99
    path, shards = write_shards(tmp_path / 'x', [20, 100, 13, 57, 7 * 7])
    ds = TextDataset(TextConfig(path, block_size=T, batch_tokens=rows * T), seed)
    windows = [(s, w) for s, x in enumerate(shards[1:]) for w in range(len(x) // T - 1)]
    assert ds.num_short == 1 and len(windows) == 13 + 7 + 6
    loader = ds.loader()
    for k in (*range(20), 10**9, 2**60):
        loader.batch = k
        idx, targets = loader.next_batch()[:2]
        for r in range(rows):
            epoch, j = divmod(k * rows + r, len(windows))
            key = hash64(seed, EPOCH, epoch)
            s, w = windows[bijection(j, len(windows), key)]
            at = w * T + hash64(s, h=key) % T
            assert idx[r].tolist() == shards[1 + s][at : at + T].tolist()
            assert targets[r].tolist() == shards[1 + s][at + 1 : at + 1 + T].tolist()

def test_an_epoch_has_each_window_once_and_no_two_seeds_or_epochs_are_alike(tmp_path):
    path, _ = write_shards(tmp_path / 'x', [20, 3000, 1000])
    orders = set()
    for seed in range(8):
        ds = TextDataset(TextConfig(path, block_size=10, batch_tokens=10), seed)
        for epoch in (0, 1, 10**9):
            places = [ds.places(k, 0, 1) for k in range(epoch * 398, epoch * 398 + 398)]
            windows = sorted((int(s[0]), int(at[0]) // 10) for s, at in places)
            assert windows == [(0, w) for w in range(299)] + [(1, w) for w in range(99)]
            orders.add(tuple(int(at[0]) for _, at in places))
            assert all(int(at[0]) + 11 <= (3000, 1000)[int(s[0])] for s, at in places)
    assert len(orders) == 24

@pytest.mark.parametrize('order', ['shuffle', 'sequential'])
def test_every_place_can_be_gone_back_to(tmp_path, order):
    path, _ = write_shards(tmp_path / 'x', [20, 400, 300])
    cfg = TextConfig(path, block_size=8, batch_tokens=32, order=order)
    loader, states, batches = TextDataset(cfg).loader(), [], []
    for _ in range(60):
        states.append(json.dumps(loader.state_dict()))
        batches.append(digest([loader.next_batch()]))
    assert len(set(batches)) > 20
    for i in range(0, 60, 7):
        other = TextDataset(cfg).loader(prefetch=i % 2 == 0)
        other.load_state_dict(json.loads(states[i]))
        assert [digest([other.next_batch()]) for _ in range(60 - i)] == batches[i:]

def test_any_number_of_ranks_sees_the_same_global_stream(tmp_path):
    path, _ = write_shards(tmp_path / 'x', [20, 400, 300])
    ds = TextDataset(TextConfig(path, block_size=8, batch_tokens=48))
    want, state = [], ds.loader().state_dict()
    alone = ds.loader()
    for _ in range(24):
        want.append(alone.next_batch().idx.clone())
    for k, world in enumerate((1, 2, 4, 3, 5, 6, 7, 36)):
        loaders = [ds.loader(rank, world) for rank in range(world)]
        for loader in loaders:
            loader.load_state_dict(state)
        for i in range(3 * k, 3 * k + 3):
            assert loaders[0].tokens() == 48 == loaders[-1].loss_tokens()
            parts = [loader.next_batch() for loader in loaders]
            assert torch.equal(torch.cat([x.idx for x in parts if (x.targets != -100).any()]), want[i])
            for r, x in enumerate(parts):
                assert len(x.idx) == max(6 * (r + 1) // world - 6 * r // world, 1)
        state = loaders[-1].state_dict()
        assert all(loader.state_dict() == state for loader in loaders)

def test_a_place_in_another_stream_is_refused_by_exactly_the_name_of_what_differs(tmp_path):
    path, _ = write_shards(tmp_path / 'x', [200, 400, 300])
    cfg = dict(text=path, block_size=8, batch_tokens=32)
    state = TextDataset(TextConfig(**cfg)).loader().state_dict()
    moved = shutil.copytree(path, tmp_path / 'moved')
    # only the place where they lie
    TextDataset(TextConfig(**{**cfg, 'text': str(moved)}, check_shards=False)).loader().load_state_dict(state)
    for field, x in dict(block_size=16, batch_tokens=64, order='sequential', val_tokens=64).items():
        with pytest.raises(ValueError, match=f"^resume refused: {field} differs [^;]*$"):
            TextDataset(TextConfig(**{**cfg, field: x})).loader().load_state_dict(state)
    with pytest.raises(ValueError, match="^resume refused: seed differs [^;]*$"):
        TextDataset(TextConfig(**cfg), seed=1).loader().load_state_dict(state)
    other, _ = write_shards(tmp_path / 'y', [200, 400, 300], seed=1)
    with pytest.raises(ValueError, match="^resume refused: corpus_sha256 differs [^;]*$"):
        TextDataset(TextConfig(**{**cfg, 'text': other})).loader().load_state_dict(state)

def test_resuming_costs_the_same_wherever_it_is(tmp_path, monkeypatch):
    path, _ = write_shards(tmp_path / 'x', [20, 4000, 3000])
    places = TextDataset.places
    def counted(self, *args):
        calls.append(args)
        return places(self, *args)
    monkeypatch.setattr(TextDataset, 'places', counted)
    for order in ('shuffle', 'sequential'):
        ds, calls = TextDataset(TextConfig(path, block_size=8, batch_tokens=32, order=order)), []
        for k in (0, 10**6, 10**12, 2**58):
            loader = ds.loader(prefetch=False)
            loader.batch = k
            loader.next_batch()
        assert calls == [(k, 0, 1) for k in (0, 10**6, 10**12, 2**58)]

def test_a_batch_is_valid_until_the_second_next_call(tmp_path):
    path, _ = write_shards(tmp_path / 'x', [20, 4000])
    loader, held = TextDataset(TextConfig(path, block_size=8, batch_tokens=64)).loader(), []
    for _ in range(300):
        batch = loader.next_batch()
        held.append((batch, digest([batch])))
        for old, want in held[-2:]:
            assert digest([old]) == want

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason="reads the memory of the process from /proc")
def test_no_shard_is_copied_into_memory(tmp_path):
    def anon(): # MiB that belong to us alone, mapped files apart
        lines = Path('/proc/self/status').read_text().splitlines()
        return [int(line.split()[1]) / 1024 for line in lines if line.startswith('RssAnon')][0]
    path, _ = write_shards(tmp_path / 'x', [2000, 20_000_000]) # 40 MB
    loader = TextDataset(TextConfig(path, block_size=1024, batch_tokens=8192)).loader()
    before = anon()
    loader = TextDataset(TextConfig(path, block_size=1024, batch_tokens=8192)).loader()
    for _ in range(3000): # all of it
        loader.next_batch()
    assert anon() - before < 5

def test_validation_is_the_beginning_of_the_validation_shard_each_row_once(tmp_path):
    path, shards = write_shards(tmp_path / 'x', [1000, 400])
    ds = TextDataset(TextConfig(path, block_size=8, batch_tokens=32, val_tokens=333))
    for world in (1, 2, 3, 7):
        batches = [batch for rank in range(world) for batch in ds.val_batches(rank, world)]
        if world == 1:
            assert all(torch.equal(a.idx, b.idx) for a, b in zip(batches, ds.val_batches(), strict=True))
        idx, targets = torch.cat([x.idx for x in batches]), torch.cat([x.targets for x in batches])
        assert sorted(idx.tolist()) == sorted(shards[0][:328].reshape(-1, 8).tolist())
        assert sorted(targets.tolist()) == sorted(shards[0][1:329].reshape(-1, 8).tolist())
    # a target for the last one must be there
    assert len(TextDataset(TextConfig(path, block_size=8, batch_tokens=32)).val_starts()) == 124
    assert list(TextDataset(TextConfig(path, block_size=8, batch_tokens=32, val_tokens=0)).val_batches()) == []

@pytest.mark.parametrize(
    'kwargs, want',
    [
        (dict(order='random'), "order='random'"),
        (dict(batch_tokens=12), "a multiple of block_size"),
        (dict(block_size=0), "block_size=0"),
        (dict(val_tokens=-1), "val_tokens=-1"),
        (dict(block_size=300, batch_tokens=300), "no training shard of 600 tokens or more"),
        (dict(batch_tokens=400, order='sequential'), "no training shard of 401 tokens"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path, kwargs, want):
    path, _ = write_shards(tmp_path / 'x', [100, 400])
    with pytest.raises(ValueError) as e:
        TextDataset(TextConfig(**{**dict(text=path, block_size=8, batch_tokens=32), **kwargs}))
    assert want in str(e.value)

# -----------------------------------------------------------------------------
# prepare

def test_documents_come_back_from_the_shards_whatever_they_were_read_from(tmp_path):
    texts = toy_texts(40) + ["", " ", "<|endoftext|> is no end <|endoftext|>", "tabs\t\r\n and \x00"]
    parts = tmp_path / 'parts'
    (parts / 'b').mkdir(parents=True)
    write_jsonl(parts / 'a.jsonl', texts[:15])
    (parts / 'a.jsonl').write_text((parts / 'a.jsonl').read_text().replace("\n", "\n\n", 3)) # blank lines are nothing
    pl.DataFrame({'n': range(15), 'text': texts[15:30]}).write_parquet(parts / 'b' / 'c.parquet')
    for k, x in enumerate(texts[30:]):
        (parts / 'b' / f"d{k:02d}.txt").write_bytes(x.encode())
    (parts / 'b' / '.hidden.txt').write_text("hidden")
    (parts / 'readme.md').write_text("no text")
    want = None
    for k, src in enumerate((write_jsonl(tmp_path / 'all.jsonl', texts), str(parts))):
        for kind in ('npy', 'bin'):
            out = tmp_path / f"{k}{kind}"
            m = prepare(PrepareConfig(src, out_dir=str(out), stem='toy', format=kind, train_bpe=300, shard_tokens=700))
            shards = [open_shard(out / x['name']) for x in m['shards']]
            names = [f"toy_{'train' if k else 'val'}_{k:06d}.{kind}" for k in range(len(shards))]
            assert [x['name'] for x in m['shards']] == names and len(shards) > 3
            assert [x['tokens'] for x in m['shards']] == [len(x) for x in shards]
            assert {len(x) for x in shards[:-1]} == {700} and m['documents'] == len(texts)
            for x in m['shards']:
                assert x['sha256'] == hashlib.sha256((out / x['name']).read_bytes()).hexdigest()
            tokens = np.concatenate(shards)
            assert want is None or np.array_equal(tokens, want)
            want = tokens
            tok = text.read_tokenizer((out / 'tokenizer.json').read_bytes(), '')
            docs = np.split(tokens, np.flatnonzero(tokens == m['eot']))[1:]
            assert tokens[0] == m['eot'] and m['vocab_size'] == tok.get_vocab_size()
            assert [tok.decode(x[1:].tolist()) for x in docs] == texts

def test_a_dataset_of_the_hub_is_streamed_at_the_revision_where_it_began(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    src, asked = write_jsonl(tmp_path / 'x.jsonl', toy_texts(), 'body'), []
    load = datasets.load_dataset
    def from_hub(name, config, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        return load('json', data_files=src, split='train', streaming=True, cache_dir=str(tmp_path / 'cache'))
    info = type('Info', (), {'sha': 'abc', 'info': type('X', (), {'splits': None})})
    monkeypatch.setattr(datasets, 'load_dataset', from_hub)
    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *args: info)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name: info)
    small = dict(train_bpe=300, shard_tokens=700)
    m = prepare(PrepareConfig('HuggingFaceFW/fineweb-edu', 'sample-10BT', column='body', out_dir=str(tmp_path / 'hub'),
                              **small))
    local = prepare(PrepareConfig(write_jsonl(tmp_path / 'y.jsonl', toy_texts()), out_dir=str(tmp_path / 'local'),
                                  **small))
    assert set(asked) == {('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', 'abc', True)} and m['revision'] == 'abc'
    assert [x['name'] for x in m['shards']][:2] == ['edufineweb_val_000000.npy', 'edufineweb_train_000001.npy']
    assert [x['sha256'] for x in m['shards']] == [x['sha256'] for x in local['shards']]

def test_max_tokens_is_the_beginning_of_all_of_them(tmp_path):
    def tokens(name, n):
        path = Path(made(tmp_path, name, shard_tokens=700, max_tokens=n))
        return np.concatenate([open_shard(x) for x in sorted(path.glob('*.npy'), key=lambda x: x.name[-10:])])
    assert np.array_equal(tokens('part', 1555), tokens('whole', 0)[:1555])

BAD = [
    ('x.jsonl', b'{"text": "a"}\n\n{"text": 5}\n', "x.jsonl: line 3, field 'text': want a text, got int"),
    ('x.jsonl', b'{"body": "a"}\n', "x.jsonl: line 1, field 'text': want a text, got NoneType"),
    ('x.jsonl', b'{"text": "a"}\n[1]\n', "x.jsonl: line 2: want an object with a field 'text', got list"),
    ('x.jsonl', b'{"text": "a"}\n{"te\n', "x.jsonl: line 2: "),
    ('x.jsonl', b'{"text": "\\ud800"}\n', "x.jsonl: line 1, field 'text': character 0 is no unicode"),
    ('x.txt', b'ab\xff', "x.txt: 'utf-8' codec"),
    ('x.jsonl', b'{"text": "\xff"}\n', "x.jsonl: line 1: 'utf-8' codec"),
    ('x.parquet', b'PAR1', "x.parquet: "),
    ('x.parquet', pl.DataFrame({'body': ["a"]}), "x.parquet: no field 'text', it has body"),
    ('x.parquet', pl.DataFrame({'text': ["a", None]}), "x.parquet: row 1, field 'text': want a text, got NoneType"),
    ('x.md', b'a', "x.md: want a .txt, .jsonl or .parquet"),
]

@pytest.mark.parametrize('name, data, want', BAD)
def test_a_malformed_document_is_named_by_file_line_and_field(tmp_path, capsys, name, data, want):
    path, out = tmp_path / name, tmp_path / 'out'
    if isinstance(data, pl.DataFrame):
        data.write_parquet(path)
    else:
        path.write_bytes(data)
    with pytest.raises(SystemExit) as e:
        cli(['text', 'prepare', f"--dataset={path}", f"--out_dir={out}", '--train_bpe=300'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"nanoarc: {tmp_path}/{want}") and err.count("\n") == 1
    assert not (out / 'manifest.json').exists()

def test_what_was_prepared_is_left_alone_and_other_settings_are_refused_by_name(tmp_path, capsys):
    path = made(tmp_path)
    before = {x: (x.stat().st_mtime_ns, x.read_bytes()) for x in Path(path).iterdir() if x.name != 'lock'}
    cfg = PrepareConfig(str(tmp_path / 'shards.jsonl'), out_dir=path, stem='toy', train_bpe=300, shard_tokens=1000)
    prepare(cfg)
    assert "done already" in capsys.readouterr().out
    os.utime(tmp_path / 'shards.jsonl', ns=(0, before[Path(path) / 'manifest.json'][0] - 10**9))
    with pytest.raises(ValueError, match="shards made otherwise.*: files differs"):
        prepare(cfg)
    src = write_jsonl(tmp_path / 'y.jsonl', toy_texts())
    want = "dataset differs .*; shard_tokens differs .there 1000, now 500.*; files differs"
    with pytest.raises(ValueError, match=want):
        prepare(PrepareConfig(src, out_dir=path, stem='toy', train_bpe=300, shard_tokens=500))
    assert {x: (x.stat().st_mtime_ns, x.read_bytes()) for x in Path(path).iterdir() if x.name != 'lock'} == before
    other, _ = write_shards(tmp_path / 'other', [100, 100])
    with pytest.raises(ValueError, match="holds shards of others, e.g. edufineweb_"):
        prepare(PrepareConfig(src, out_dir=other, train_bpe=300))

def test_too_little_text_a_full_disk_and_wrong_tokenizers_are_one_clear_line(tmp_path, monkeypatch):
    src = write_jsonl(tmp_path / 'x.jsonl', toy_texts())
    def refused(want, **kwargs):
        with pytest.raises(ValueError, match=want):
            prepare(PrepareConfig(src, out_dir=str(tmp_path / 'out'), **{'train_bpe': 300, **kwargs}))
        # the next attempt is free to be another
        assert not list((tmp_path / 'out').glob('*.npy')) and not (tmp_path / 'out' / 'prepare.json').exists()
    refused("tokens fill one shard, which is for validation: want --shard_tokens of less than half")
    refused("none called '</s>'", train_bpe=0, tokenizer=made(tmp_path), eot='</s>')
    refused("want gpt2, a tokenizer.json or a directory with one", train_bpe=0, tokenizer=str(tmp_path / 'nowhere'))
    refused("train_bpe=65537", train_bpe=65537)
    refused("'train' and 'val' in the name", stem='trainset')
    (tmp_path / 'tokenizer.json').write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json: "):
        prepare(PrepareConfig(src, out_dir=str(tmp_path / 'spoilt'), tokenizer=str(tmp_path / 'tokenizer.json')))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused("about 0.0 GB of shards are to come, 0.0 GB are free")

def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match="this wants tokenizers: pip install 'nanoarc.text.'"):
        prepare(PrepareConfig(write_jsonl(tmp_path / 'x.jsonl', toy_texts()), out_dir=str(tmp_path / 'out')))
    with pytest.raises(ValueError, match="this wants transformers: pip install 'nanoarc.finetune.'"):
        hellaswag.load_language_model('gpt2', 'cpu')

def test_gpt2_where_it_cannot_be_fetched_says_so(tmp_path, monkeypatch):
    from tiktoken_ext import openai_public
    def unreachable():
        raise ConnectionError("no route")
    monkeypatch.setattr(openai_public, 'gpt2', unreachable)
    want = "tokenizer 'gpt2': tiktoken cannot fetch it here .ConnectionError.: --train_bpe 8192"
    with pytest.raises(ValueError, match=want):
        prepare(PrepareConfig(write_jsonl(tmp_path / 'x.jsonl', toy_texts()), out_dir=str(tmp_path / 'out')))

def test_a_bpe_of_tiktoken_is_the_same_one_here(tmp_path, monkeypatch):
    import tiktoken
    from tiktoken_ext import openai_public
    tok = json.loads((Path(made(tmp_path, train_bpe=400)) / 'tokenizer.json').read_text())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    byte = dict(zip(chars, printable + [b for b in range(256) if b not in printable]))
    ranks = {}
    for token, rank in tok['model']['vocab'].items():
        if token != '<|endoftext|>': # it stood first
            ranks[bytes(byte[c] for c in token)] = rank - 1
    special = {'<|endoftext|>': len(ranks)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    want = tiktoken.Encoding('toy', pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(openai_public, 'gpt2', lambda: dict(mergeable_ranks=ranks, special_tokens=special))
    got = text.read_tokenizer(text.make_tokenizer(PrepareConfig(''), ()), '')
    assert got.token_to_id('<|endoftext|>') == len(ranks)
    assert got.get_vocab_size() == want.n_vocab == len(tok['model']['vocab']) > 340
    for x in toy_texts(50, seed=1) + ["<|endoftext|>", "  tabs\t\n\n x", "日本語 🙂", ""]:
        assert got.encode(x, add_special_tokens=False).ids == want.encode_ordinary(x)

@pytest.mark.reliability
@pytest.mark.slow
def test_20_kills_at_any_moment_of_prepare_and_the_shards_are_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(text, 'ENCODED', 20000) # so that shards are written all along
    src = write_jsonl(tmp_path / 'x.jsonl', toy_texts(3000))
    def go(out):
        prepare(PrepareConfig(src, out_dir=str(out), stem='toy', train_bpe=400, shard_tokens=9000))
    assert join(fork(go, tmp_path / 'warm')) == 0
    start = time.time()
    assert join(fork(go, tmp_path / 'whole')) == 0
    seconds, want = time.time() - start, content(tmp_path / 'whole')
    rng, kills, moments, n = random.Random(0), 0, set(), 0
    assert len(want) > 12
    while kills < 20:
        code, out = None, tmp_path / f"{n}"
        while code != 0:
            pid = fork(go, out)
            time.sleep(rng.random() * seconds)
            if kills < 20:
                os.kill(pid, signal.SIGKILL)
            code = join(pid)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            moments.add(len(list(out.glob('*.npy'))))
        assert content(out) == want
        n += 1
    assert len(moments) > 4 # they came early and late

@pytest.mark.reliability
@pytest.mark.slow
def test_a_kill_before_and_after_each_file_of_prepare_loses_nothing(tmp_path):
    src = write_jsonl(tmp_path / 'x.jsonl', toy_texts(60))
    def go(out, number=-1, after=False):
        write, count = checkpoint.write_file, [0]
        def killed(path, data):
            count[0] += 1
            if after and count[0] == number:
                write(path, data)
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, data)
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(checkpoint, 'write_file', killed)
            prepare(PrepareConfig(src, out_dir=str(out), stem='toy', train_bpe=300, shard_tokens=800))
        return count[0]
    files = go(tmp_path / 'whole')
    want = content(tmp_path / 'whole')
    assert files == 2 + 2 * (len(want) - 2) + 1
    for k in range(1, files + 1):
        for after in (False, True):
            out = tmp_path / f"{k}{after}"
            assert join(fork(go, out, k, after)) == -signal.SIGKILL
            go(out)
            assert content(out) == want, (k, after)

# -----------------------------------------------------------------------------
# one trainer

TINY = ['--n_layer=2', '--n_embd=32', '--head_size=16', '--d_state=16', '--d_head=16', '--block_size=32',
        '--batch_tokens=256', '--val_tokens=500', '--minutes=0', '--device=cpu', '--compile=off']

@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
    """ a tiny hybrid trained on toy texts -> (out_dir, directory of the shards) """
    path = tmp_path_factory.mktemp('text')
    shards = made(path, n=200)
    cli(['train', f"--text={shards}", f"--out_dir={path / 'run'}", '--max_iters=150', '--lr=0.02', '--log_every=10',
         '--save_every=60', '--eval_every=50', *TINY])
    return str(path / 'run'), shards

def test_it_learns_more_than_how_often_each_token_comes(text_run):
    run, shards = text_run
    tokens = np.concatenate([open_shard(x) for x in Path(shards).glob('*_train_*.npy')])
    p = np.bincount(tokens) / len(tokens)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    meta = checkpoint.load(run)[1]
    assert meta['val_loss'] < entropy - 0.5 and meta['tokens'] == 150 * 256
    assert meta['model']['vocab_size'] == 320 and meta['model']['rope_bases'] == [10000.0]
    assert (Path(run) / 'loss.png').exists() and (Path(run) / 'trained_on.txt').read_text().startswith('sha256 ')

def test_a_resumed_run_is_the_run_that_never_stopped(text_run, tmp_path):
    run, shards = text_run
    out = shutil.copytree(run, tmp_path / 'run')
    moved = shutil.copytree(shards, tmp_path / 'moved')
    for kind in ('sha256', 'safetensors'): # as if killed after step 120
        checkpoint.file(out, 150, kind).unlink()
    assert checkpoint.load(out)[1]['step'] == 120
    cli(['train', '--resume', str(out), '--text', str(moved)]) # where they lie is no matter
    (got, meta), (want, _) = checkpoint.load(out), checkpoint.load(run)
    assert meta['step'] == 150 and got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    def losses(run):
        return [(x['step'], key, x[key].hex()) for x in read_metrics(run) for key in ('loss', 'val_loss') if key in x]
    assert losses(out) == losses(run)

def test_a_resumed_run_on_other_shards_or_settings_is_refused_by_name(text_run, tmp_path, capsys):
    run, shards = text_run
    other = made(tmp_path, n=199)
    for flags, want in (
        (['--text', other], "corpus_sha256 differs"),
        (['--block_size=64'], "block_size differs"),
        (['--order=sequential'], "order differs"),
        (['--seed=1'], "seed differs"),
        (['--n_embd=64'], "n_embd differs"),
    ):
        with pytest.raises(SystemExit):
            cli(['train', '--resume', run, '--max_iters=151', *flags])
        assert want in capsys.readouterr().err

def test_settings_of_text_come_from_a_file_too_and_a_small_vocabulary_is_refused(text_run, tmp_path, capsys):
    lines = [f"text = '{text_run[1]}'", "block_size = 16", "batch_tokens = 32", "max_iters = 1", "n_layer = 1",
             "n_embd = 32", "val_tokens = 0"]
    (tmp_path / 'x.toml').write_text("\n".join(lines))
    cli(['train', '--config', str(tmp_path / 'x.toml'), f"--out_dir={tmp_path / 'run'}", '--minutes=0', '--device=cpu'])
    meta = checkpoint.load(tmp_path / 'run')[1]
    assert meta['data']['block_size'] == 16 and meta['model']['vocab_size'] == 320 and meta['val_loss'] is None
    with pytest.raises(SystemExit):
        cli(['train', f"--text={text_run[1]}", '--vocab_size=64', f"--out_dir={tmp_path / 'small'}", '--max_iters=1',
             *TINY])
    assert "vocab_size=64: the data has 300 tokens" in capsys.readouterr().err

@pytest.mark.parametrize('flags', [[], ['--shots=-1']])
def test_training_on_tasks_begins_with_the_blocks_of_a_text_run(text_run, toy, tmp_path, capsys, flags):
    run, _ = text_run
    cli(['train', '--data=', f"--adapt={toy()}", f"--init_from={run}", f"--out_dir={tmp_path / 'run'}", '--max_iters=1',
         '--minutes=0', '--lr=1e-12', '--adam_lr=1e-12', '--weight_decay=0', '--device=cpu', *flags])
    out = capsys.readouterr().out
    new = "wte, head" if flags else "wte, wtask, wdih, head"
    assert f"of the text run {run} after 150 steps the 2 blocks and the last norm; new: {new}" in out
    (old, _), (new, meta) = checkpoint.load(run), checkpoint.load(tmp_path / 'run')
    kept = [name for name in new if name.startswith(('model.blocks', 'model.norm'))]
    assert len(kept) > 10 and all(torch.allclose(new[name], old[name], atol=1e-6) for name in kept)
    assert new['model.wte.weight'].shape == new['model.head.weight'].shape == (16, 32)
    assert meta['model']['n_task'] == (0 if flags else 3)
    assert len(meta['model']['rope_bases']) == 3 and meta['model']['n_embd'] == 32
    assert not (tmp_path / 'run' / 'tokenizer.json').exists()
    cli(['solve', '--run', str(tmp_path / 'run'), '--data', str(tmp_path / 'toy'), '--views=1'])

def test_other_text_begins_with_all_of_it_if_the_tokens_are_the_same(text_run, tmp_path, capsys):
    run, shards = text_run
    for name, kwargs, want in (('same', dict(train_bpe=0, tokenizer=shards, n=50), "weights of"),
                               ('other', dict(n=50), "of the text run")):
        more = made(tmp_path, name, **kwargs)
        cli(['train', f"--text={more}", f"--init_from={run}", f"--out_dir={tmp_path / name}-run", '--max_iters=1',
             '--block_size=32', '--batch_tokens=64', '--minutes=0', '--device=cpu'])
        assert want in capsys.readouterr().out

def test_what_is_for_tasks_refuses_a_run_of_text_and_the_other_way_round(text_run, tiny_run, capsys):
    for args, want in (
        (['solve', '--run', text_run[0], '--data', tiny_run[1]], "a run of text, want one of tasks"),
        (['text', 'sample', '--model', tiny_run[0]], "a run of tasks, want one of text"),
        (['text'], "text: want prepare, hellaswag, sample"),
        (['text', 'fly'], "text fly: want prepare"),
    ):
        with pytest.raises(SystemExit) as e:
            cli(args)
        assert e.value.code == 2 and want in capsys.readouterr().err

def test_two_ranks_train_as_one_does(text_run, tmp_path):
    def rank_of(rank, world):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(28000 + os.getppid() % 999))
        cli(['train', f"--text={text_run[1]}", f"--out_dir={tmp_path / str(world)}", '--max_iters=6', '--log_every=1',
             '--dtype=float32', *TINY])
    def losses(world):
        rows = read_metrics(tmp_path / str(world))
        return [(x['step'], x[key]) for x in rows for key in ('loss', 'val_loss') if key in x]
    for world in (1, 2):
        assert [join(pid) for pid in [fork(rank_of, rank, world) for rank in range(world)]] == [0] * world
    one, two = losses(1), losses(2)
    assert len(one) == len(two) == 8 and np.allclose(one, two, rtol=0, atol=1e-4)

@pytest.mark.slow
def test_the_loader_is_measured():
    command = [sys.executable, 'bench/text.py', '--rounds=1', '--tokens=400000']
    out = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert all(x['tok_s'] > 1e6 and x['lite_tok_s'] > 1e6 for x in json.loads(out.stdout.splitlines()[-1]).values())
