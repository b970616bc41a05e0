"""
python -m pytest tests/test_promises.py: what the loader promises, each as the exact test of it. bench/controls.py
plants the bugs
"""
import gc
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import toy_tasks
from slow_loader import SlowLoader
from test_data import sampler_of, visits

from nanoarc import data
from nanoarc.data import DEMOS, EPOCH, ArcDataset, ArcLoader, DataConfig, bijection, hash64
from nanoarc.sources import read_tasks
from nanoarc.workers import ArcStream

pytestmark = pytest.mark.reliability

def as_lists(batch):
    return [x if x is None else x.tolist() for x in batch]

def random_sources(rng, folder):
    """
    up to three files of toy tasks, or lists of pairs -> the settings data and adapt, and the same tasks as SlowLoader
    wants them
    """
    specs, tasks = {'data': [], 'adapt': []}, {'data': [], 'adapt': []}
    for i in range(rng.choice([1, 1, 2, 3])):
        path = folder / f"{i}.json"
        objects = toy_tasks(n=rng.randint(1, 5), demos=rng.randint(1, 5), queries=rng.randint(1, 3),
                            side=rng.choice([2, 5, 9]), seed=rng.randint(0, 3))
        objects = {f"{i}{name}": obj for name, obj in objects.items()} # no id stands for two tasks
        if rng.random() < 0.2: # a list, to be dealt
            objects = toy_tasks(n=1, demos=rng.randint(2, 25), side=rng.choice([2, 5]))['toy0000']['train']
        path.write_text(json.dumps(objects))
        repeat = rng.choice([1, 1, 2, 5])
        kind = 'adapt' if i > 0 and rng.random() < 0.5 else 'data'
        specs[kind].append(f"{path}*{repeat}")
        for task in read_tasks(str(path)):
            tasks[kind].append((task, repeat, kind == 'data'))
    return '+'.join(specs['data']), '+'.join(specs['adapt']), tasks['data'] + tasks['adapt']

def random_extra(rng, folder, tasks):
    """ up to two sources of lists and tasks for some of these -> the setting extra, and what SlowLoader wants """
    specs, extra = [], []
    for i in range(1, rng.choice([1, 1, 2, 3])):
        source = folder / f"extra{i}"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name in ['nobody', *(task.name for task, _, _ in tasks if rng.random() < 0.6)]:
            seed, side = rng.randint(0, 3), rng.choice([2, 5, 9])
            obj = toy_tasks(n=1, demos=rng.randint(2, 12), side=side, seed=seed)['toy0000']
            (source / f"{name}.json").write_text(json.dumps(rng.choice([obj, obj['train']])))
        repeat = rng.choice([1, 1, 2, 3])
        specs.append(f"{source}*{repeat}")
        extra += [(task, repeat, i) for task in read_tasks(str(source))]
    return '+'.join(specs), extra

def random_config(rng, spec, adapt, extra):
    return DataConfig(
        data=spec, adapt=adapt, extra=extra,
        extra_pairs=rng.choice([0, 0, 1, 3, 7]),
        shots=rng.choice([0, 0, -1, -1, 1, 2, 3]),
        block_size=rng.choice([40, 90, 200, 500]),
        batching=rng.choice(['bucket', 'pack', 'pad']),
        batch_tokens=rng.choice([1, 64, 300, 1000]),
        loss_on=rng.choice(['query', 'outputs', 'all']),
        colors=rng.choice(['auto', 'domain', 'nonzero', 'all', 'none']),
        p_identity=rng.choice([0, 0.2, 1]),
        val_tasks=rng.choice([0, 1, 2]),
        max_pair=rng.choice([0, 0, 60]),
        allow_leak=True,
        drop_overlap=rng.random() < 0.5,
        ignore_index=rng.choice([-100, -1]))

def check_window(ds, slow, window, world, prefetch):
    """ every batch of a window, of each rank, is that of plain python """
    loaders = [ArcLoader(ds, rank, world, prefetch=prefetch) for rank in range(world)]
    for loader in loaders:
        loader.window = window
    for rows, T in slow.batches(window):
        total = loaders[0].loss_tokens()
        for rank, loader in enumerate(loaders):
            mine = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
            want = slow.write(mine, T)
            if ds.cfg.shots != 0:
                want[4:] = [None, None] # no task and no dihedral
            assert as_lists(loader.next_batch()) == want, ds.cfg
        assert total == loss_tokens(rows), ds.cfg
    assert all(loader.window == window + 1 and loader.batch == 0 for loader in loaders)

def loss_tokens(rows):
    """ of rows of SlowLoader's documents """
    n = 0
    for row in rows:
        for doc in row:
            n += sum(y >= 0 for y in doc['targets'])
    return n

@pytest.mark.parametrize('part', range(4))
@pytest.mark.slow
def test_the_kernels_equal_plain_python_on_1000_random_configurations(part, tmp_path, monkeypatch):
    modes, skipped, n_extra = set(), 0, 0
    for n in range(250):
        rng = random.Random(1000 * part + n)
        monkeypatch.setattr(data, 'WINDOW', rng.choice([1, 7, 24, 40]))
        spec, adapt, tasks = random_sources(rng, tmp_path)
        extra_spec, extra = random_extra(rng, tmp_path, tasks)
        cfg = random_config(rng, spec, adapt, extra_spec)
        seed, window = rng.choice([0, 1, 1337, 2**40]), rng.choice([0, 1, rng.randrange(10**12)])
        slow = SlowLoader(tasks, cfg, seed, data.WINDOW, extra)
        if len(slow.targets) == 0:
            with pytest.raises(ValueError, match="nothing to train on"):
                ArcDataset(cfg, seed)
            skipped += 1
            continue
        ds = ArcDataset(cfg, seed)
        assert [p.number for pool in slow.pools for p in pool] == ds.pools.pairs.tolist(), cfg
        assert sorted(p.number for p in slow.val) == ds.val_pairs.tolist(), cfg
        check_window(ds, slow, window, world=rng.choice([1, 1, 2, 3]), prefetch=rng.random() < 0.3)
        modes.add((cfg.batching, cfg.loss_on, cfg.shots))
        n_extra += any(len(pool) > 1 for pool in slow.pools)
    assert len(modes) > 40 and skipped < 50 and n_extra > 60

# -----------------------------------------------------------------------------
# the stream

# by seed: sha256 of the order of an epoch, of the augments of a pair, and of the contexts before it
GOLDEN = {
    0: ("fa4133b659afb537", "1f4970e819d352db", "3649f9e99deb9f2f"),
    1: ("337fc7d439e47ba3", "47220a3df652023f", "6b441c7e0105d626"),
    2: ("32c3648c0e6615d0", "7a0284cb2b691852", "dbbf84da9a5d25c7"),
    1337: ("274025e94becab29", "259fa5880160d3e0", "693982f1b15875d5"),
    2**63: ("34c1efd45e3fd19c", "649ed9ae3b898c93", "f3b0c0118483c211"),
}

def short_hash(*arrays):
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]

def epoch_order(n, seed, epoch):
    return bijection(np.arange(n, dtype=np.uint64), np.uint64(n), hash64(seed, EPOCH, epoch))

def test_an_epoch_is_a_permutation_at_any_size():
    for n in [*range(1, 301), 400, 1000, 1120, 65_537]:
        for seed in (0, 1337, 2**63):
            for epoch in (0, 1, 10**9):
                assert np.array_equal(np.sort(epoch_order(n, seed, epoch)), np.arange(n))

def test_the_order_is_the_one_that_it_always_was():
    """ or a resumed run would go on elsewhere: raise data.FORMAT when this has to change """
    grid = np.arange(10, dtype=np.uint8).reshape(2, 5)
    sampler = sampler_of(*[(grid, grid)] * 6, shots=-1) # pairs with all the colors
    for seed, (order, augments, contexts) in GOLDEN.items():
        assert short_hash(epoch_order(1000, seed, 3).astype('<u8')) == order
        dihedral, cmap = visits(sampler, 0, 1000, seed, p_identity=0.2)
        assert short_hash(dihedral, cmap) == augments
        docs = sampler.plan([2] * 1000, np.arange(1000), hash64(seed, DEMOS, np.arange(1000)), False, seed)
        assert short_hash(docs.pairs) == contexts

def test_every_target_comes_once_an_epoch_times_its_repeat():
    ds = ArcDataset(DataConfig(data='arc1/training*2+arc2/evaluation', val_tasks=0))
    n = len(ds)
    first = ds.sampler.tables.first[400] # where arc2 begins
    assert n == 2 * 1718 + 526
    for epoch in (0, 1, 10**9):
        seen = Counter(ds.plan(np.arange(epoch * n, (epoch + 1) * n, dtype=np.uint64)).pairs[:, 0].tolist())
        assert seen == {p: 2 if p < first else 1 for p in range(1718 + 526)}

def test_no_two_seeds_or_epochs_share_a_stream():
    ds = ArcDataset(DataConfig(data='arc1/training', val_tasks=0))
    heads, n = set(), len(ds)
    for ds.seed in range(64):
        for epoch in range(64):
            heads.add(tuple(ds.plan(np.arange(epoch * n, epoch * n + 64)).pairs[:, 0].tolist()))
    assert len(heads) == 64 * 64
    orders = [epoch_order(1000, seed, 0) for seed in range(64)]
    orders += [epoch_order(1000, 0, epoch) for epoch in range(1, 64)]
    rho = np.corrcoef(np.array(orders, float)) - np.eye(len(orders))
    assert abs(rho).max() < 0.15

def test_resuming_costs_one_plan_wherever_it_is(toy, monkeypatch):
    ds, calls, plan = ArcDataset(DataConfig(data=toy(n=4))), [], ArcDataset.plan
    def counted(self, t):
        calls.append(len(t))
        return plan(self, t)
    monkeypatch.setattr(ArcDataset, 'plan', counted)
    state = ArcLoader(ds).state_dict()
    for window in (0, 10**6, 10**9, 10**12, 2**51 - 1): # the last one ends at document 2^63
        calls.clear()
        loader = ArcLoader(ds, prefetch=False)
        loader.load_state_dict({**state, 'window': window, 'batch': 3})
        loader.next_batch()
        assert calls == [data.WINDOW]

# -----------------------------------------------------------------------------
# state

MODES = [
    dict(batching='bucket', batch_tokens=3000),
    dict(batching='pack', shots=-1, batch_tokens=2048, block_size=512, loss_on='outputs'),
    dict(batching='pad', shots=2, batch_tokens=8192, block_size=256),
]

def digest(batches):
    h = hashlib.sha256()
    for batch in batches:
        for x in batch:
            if x is not None:
                h.update(str(tuple(x.shape)).encode() + x.numpy().tobytes())
    return h.hexdigest()

@pytest.mark.parametrize('mode', MODES)
def test_every_place_can_be_gone_back_to(toy, mode):
    cfg = DataConfig(data=toy(n=5), **mode)
    loader, states, batches = ArcLoader(ArcDataset(cfg)), [], []
    loader.batch = len(loader.rows(0).batches) - 30 # so that a window ends in the middle
    for _ in range(60):
        states.append(json.dumps(loader.state_dict()))
        batches.append(digest([loader.next_batch()]))
    assert loader.window == 1
    for i in range(60):
        other = ArcLoader(ArcDataset(cfg), prefetch=i % 2 == 0)
        other.load_state_dict(json.loads(states[i]))
        assert [digest([other.next_batch()]) for _ in range(60 - i)] == batches[i:]

def refusal(saved, seed=1337, **cfg):
    """ what a loader of these settings says to a saved state """
    with pytest.raises(ValueError) as e:
        ArcLoader(ArcDataset(DataConfig(**cfg), seed)).load_state_dict(saved)
    return str(e.value)

def names_alone(field):
    """ the pattern of a message that names this field and no other """
    return re.compile(f"resume refused: {field} differs [^;]*")

# another value than the default, of each setting that a state has
CHANGED = dict(shots=1, max_pair=90, extra_pairs=3, block_size=99, batching='pad', batch_tokens=77, loss_on='all',
               colors='all', p_identity=0.3, val_tasks=1, deal=2, allow_leak=True, drop_overlap=True)

def test_a_place_in_another_stream_is_refused_by_exactly_the_name_of_what_differs(toy):
    src = toy(n=4)
    state = ArcLoader(ArcDataset(DataConfig(data=src))).state_dict()
    assert set(state) == {'format', 'window', 'batch', 'seed', 'corpus_sha256', *CHANGED}
    for field in state:
        if field not in ('window', 'batch'):
            assert names_alone(field).fullmatch(refusal({**state, field: "other"}, data=src))
    for field, x in CHANGED.items():
        assert names_alone(field).fullmatch(refusal(state, data=src, **{field: x}))
    assert names_alone('seed').fullmatch(refusal(state, seed=1, data=src))
    for other in (toy('b', n=4, seed=1), f"{src}*2"):
        assert names_alone('corpus_sha256').fullmatch(refusal(state, data=other))

def test_a_setting_that_is_newer_than_a_saved_state_counts_as_its_default(toy):
    src = toy(n=4)
    loader = ArcLoader(ArcDataset(DataConfig(data=src)))
    loader.next_batch()
    state = loader.state_dict()
    want = digest([loader.next_batch()])
    for field, x in CHANGED.items():
        older = {key: x for key, x in state.items() if key != field} # as if the field had been added since
        other = ArcLoader(ArcDataset(DataConfig(data=src)))
        other.load_state_dict(older)
        assert digest([other.next_batch()]) == want
        assert names_alone(field).fullmatch(refusal(older, data=src, **{field: x}))
    for field in ('format', 'seed', 'corpus_sha256'): # no settings: these have no default
        older = {key: x for key, x in state.items() if key != field}
        assert names_alone(field).fullmatch(refusal(older, data=src))
    assert names_alone('gone').fullmatch(refusal({**state, 'gone': 1}, data=src)) # a setting that there was then

@dataclass
class NewerConfig(DataConfig):
    new: int = 5 # a field of a later version

def test_one_new_field_leaves_older_states_loadable(toy):
    src = toy(n=4)
    loader = ArcLoader(ArcDataset(DataConfig(data=src)))
    loader.next_batch()
    state = loader.state_dict()
    newer = ArcLoader(ArcDataset(NewerConfig(data=src)))
    newer.load_state_dict(state)
    assert digest([newer.next_batch()]) == digest([loader.next_batch()])
    with pytest.raises(ValueError, match="^resume refused: new differs .saved 5, now 6.$"):
        ArcLoader(ArcDataset(NewerConfig(data=src, new=6))).load_state_dict(state)

# -----------------------------------------------------------------------------
# ranks

def global_batch(loaders):
    """ the next batch of each rank -> the fields of the global one: their rows in order """
    parts = []
    for loader in loaders:
        batch = loader.next_batch()
        real = (batch.doc >= 0).any(1)
        if not real.any(): # none of the rows is this rank's: it has one without loss
            assert len(batch.idx) == 1 and (batch.targets == -100).all()
        parts.append([None if x is None else x[real] for x in batch])
    return [None if xs[0] is None else torch.cat(xs) for xs in zip(*parts)]

def run(ds, schedule):
    """ list of (world size, steps), the state handed on as json -> digest of all global batches """
    h, state = hashlib.sha256(), None
    for world, steps in schedule:
        loaders = [ArcLoader(ds, rank, world, prefetch=False) for rank in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(state))
        for _ in range(steps):
            h.update(digest([global_batch(loaders)]).encode())
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1 # no rank is elsewhere
        state = states.pop()
    return h.hexdigest()

@pytest.mark.parametrize('mode', MODES)
def test_one_two_four_three_ranks_see_the_same_global_stream(toy, mode):
    ds = ArcDataset(DataConfig(data=toy(n=5), **mode))
    want = run(ds, [(1, 400)])
    assert run(ds, [(1, 100), (2, 100), (4, 100), (3, 100)]) == want

@pytest.mark.slow
def test_any_number_of_ranks_sees_the_same_global_stream(toy):
    ds = ArcDataset(DataConfig(data=toy(n=5), batch_tokens=1500))
    want, rng = run(ds, [(1, 12)]), random.Random(0)
    for world in (*range(2, 17), 36, 97):
        assert run(ds, [(world, 12)]) == want
    for _ in range(200):
        cuts = sorted(rng.sample(range(1, 12), 3))
        assert run(ds, [(rng.randint(1, 9), b - a) for a, b in zip([0, *cuts], [*cuts, 12])]) == want

def task_and_loss(batches):
    """ of each row that is not empty: its task, and how many of its tokens carry loss """
    found = []
    for batch in batches:
        for row in range(len(batch.idx)):
            if batch.doc[row, 0] >= 0:
                found.append((int(batch.task[row, 0]), int((batch.targets[row] != -100).sum())))
    return found

def test_each_validation_query_counts_once_on_any_number_of_ranks(toy):
    ds = ArcDataset(DataConfig(data=toy(n=23, queries=2), val_tasks=9, batch_tokens=300))
    n = len(ds.val_pairs)
    assert n == 18
    want = sorted(task_and_loss(ds.val_batches()))
    assert len(want) == n
    for world in range(1, 8):
        ranks = [list(ds.val_batches(rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1 # they meet as often, none hangs
        got = []
        for batches in ranks:
            got += task_and_loss(batches)
        assert sorted(got) == want

# -----------------------------------------------------------------------------
# processes and memory

# torch sometimes aborts a worker that it ends in the middle of an endless stream
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('start, workers', [('fork', 1), ('fork', 2), ('fork', 3), ('forkserver', 2), ('spawn', 2)])
@pytest.mark.slow
def test_worker_processes_make_the_same_bytes_in_the_same_order(toy, start, workers):
    ds = ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=128, batch_tokens=512, shots=-1))
    loader = ArcLoader(ds)
    loader.next_batch() # its thread must not trouble the children
    want = ArcLoader(ds)
    with_workers = iter(torch.utils.data.DataLoader(ArcStream(ds), batch_size=None, num_workers=workers,
                                                    multiprocessing_context=start))
    for _ in range(100):
        assert digest([next(with_workers)]) == digest([want.next_batch()])
    del with_workers

def test_a_loader_that_was_forked_goes_on(toy):
    loader = ArcLoader(ArcDataset(DataConfig(data=toy(n=4))))
    read, write = os.pipe()
    for _ in range(3):
        loader.next_batch()
    if (pid := os.fork()) == 0: # the child has no thread, and must not wait for it
        os.write(write, digest([loader.next_batch()]).encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and os.read(read, 64).decode() == digest([loader.next_batch()])

def rss():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20 # MiB

@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason="reads the memory of the process from /proc")
@pytest.mark.parametrize('prefetch', [True, False])
@pytest.mark.slow
def test_memory_stays_flat_over_100_000_batches(toy, prefetch):
    loader = ArcLoader(ArcDataset(DataConfig(data=toy(n=3), batch_tokens=600)), prefetch=prefetch)
    for _ in range(10_000): # every shape has come by
        loader.next_batch()
    gc.collect()
    start, files = rss(), len(os.listdir('/proc/self/fd'))
    for _ in range(100_000):
        loader.next_batch()
    gc.collect()
    assert rss() - start < 1 and len(os.listdir('/proc/self/fd')) == files and loader.window > 100

def test_a_batch_is_valid_until_the_second_next_call(toy):
    loader = ArcLoader(ArcDataset(DataConfig(data=toy(n=4), batching='pack', block_size=128, batch_tokens=512)))
    held = []
    for _ in range(300):
        batch = loader.next_batch()
        held.append((batch, digest([batch])))
        for old, want in held[-2:]:
            assert digest([old]) == want
