""" python -m pytest tests/test_extra.py: pairs that somebody generated, as further demos of published tasks """
import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, toy_tasks
from test_data import check_held_out, domain_of, same
from test_promises import run
from test_sources import GRID, make_list, refusal, task

from nanoarc.cli import main as cli
from nanoarc.corpus import Corpus, add_extra
from nanoarc.data import ArcDataset, DataConfig
from nanoarc.sources import read_source

def pair_of(n, fill=1):
    """ a pair of n rows and a column """
    return {'input': [[fill]] * n, 'output': [[fill]] * n}

def turned(pair):
    """ the same pair, turned and recolored """
    return {side: np.rot90(9 - np.array(grid)).tolist() for side, grid in pair.items()}

@pytest.fixture
def write(tmp_path):
    """ {name: list of pairs or task} as a folder of files -> its path """
    def to_folder(folder, things):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, obj in things.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(obj))
        return str(tmp_path / folder)
    return to_folder

@pytest.fixture
def re_arc(test_data):
    path = test_data / 're_arc_100.zip'
    if not path.is_file():
        pytest.skip("there is no re_arc_100.zip in NANOARC_TEST_DATA")
    return str(path)

def targets(ds, epoch=0):
    """ numbers of the pairs that are asked in an epoch, how often each """
    n = np.uint64(len(ds))
    return Counter(ds.plan(np.uint64(epoch) * n + np.arange(n)).pairs[:, 0].tolist())

def tasks_of(c):
    return {t.name: t for t in (c.task(k) for k in range(len(c)))}

# -----------------------------------------------------------------------------
# which task a pair belongs to

@pytest.mark.slow
def test_re_arc_gives_no_rows_but_40_000_pairs(re_arc):
    ds = ArcDataset(DataConfig(data='arc1/training', extra=re_arc, val_tasks=0))
    assert len(ds.rows) == 400 and len(ds.sampler.key) == 400 and len(ds) == 1718 + 40_000 and ds.strangers == []
    assert (ds.sampler.is_extra.sum(), ds.num_pairs_out, ds.num_long, ds.num_alone) == (40_000, 0, 0, 0)
    assert abs(ds.shares - np.array([1718, 40_000]) / 41_718).max() < 1e-12
    assert f"targets: 4.1% arc1/training, 95.9% {re_arc}" in ds.about()

@pytest.mark.slow
def test_small_pairs_of_re_arc_are_more_of_the_small_tasks(re_arc):
    without = ArcDataset(DataConfig(max_pair=100, val_tasks=0))
    ds = ArcDataset(DataConfig(max_pair=100, val_tasks=0, extra=re_arc))
    n = int(ds.sampler.is_extra.sum())
    assert ds.rows == without.rows and len(ds.rows) == 81 and ds.num_tasks_out == without.num_tasks_out == 319
    assert len(ds) == len(without) + n and (n, ds.num_pairs_out) == (799, 7301)
    assert f"{ds.num_pairs_out} generated pairs over max_pair" in ds.about()
    dealt = ArcDataset(DataConfig(data=re_arc, max_pair=100, val_tasks=0)) # and alone it is not nothing
    long = dealt.sampler.tables.tokens.max(0)
    assert long.max() <= 100 and len(dealt) + dealt.num_pairs_out == 40_000 and len(dealt) > n

def test_all_pairs_of_a_list_or_a_task_are_demos_between_its_own_and_its_queries(write, tmp_path):
    tasks = toy_tasks(n=3, demos=2, queries=2)
    made = {'toy0000': make_list(23), 'toy0002': toy_tasks(n=1, demos=3, queries=2, seed=5)['toy0000']}
    del made['toy0002']['test'][1]['output'] # who knows no answer has no pair
    data = write('data', tasks)
    want = {'toy0000': made['toy0000'], 'toy0001': []}
    want['toy0002'] = made['toy0002']['train'] + made['toy0002']['test'][:1]
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for name, obj in made.items():
            z.writestr(f"a/tasks/{name}.json", json.dumps(obj))
    cli(['data', 'pack', str(tmp_path / 'x.zip'), '--out', str(tmp_path / 'packed')])
    for source in (write('made', made), str(tmp_path / 'x.zip'), str(tmp_path / 'packed')):
        c = read_source(data)
        (joined,), strangers = add_extra([c], [read_source(source)])
        assert strangers == [] and joined.name.tolist() == c.name.tolist() and joined.key.tolist() == c.key.tolist()
        assert (joined.n_own == 2).all() and joined.is_indexed()
        before = tasks_of(c)
        for name, t in tasks_of(joined).items():
            old, extra = before[name], t.demos[2:]
            assert all(same(x, y) for x, y in zip(t.demos[:2] + t.queries, old.demos + old.queries, strict=True))
            got = sorted([x.tolist(), y.tolist()] for x, y in extra)
            assert got == sorted([p['input'], p['output']] for p in want[name])
            assert Corpus.of([t]).n_own.tolist() == [2]
    ds = ArcDataset(DataConfig(data=data, extra=source, val_tasks=0))
    assert len(ds) == 3 * 4 + 23 + 4 and len(ds.rows) == 3

def test_an_id_that_no_task_has_is_counted_and_said(write, tmp_path):
    made = {name: make_list(3) for name in ('toy0000', 'nobody', 'toy0000.x', 'other')}
    data, extra = write('data', toy_tasks(n=2)), write('made', made)
    ds = ArcDataset(DataConfig(data=data, extra=extra))
    assert ds.strangers == ['nobody', 'other', 'toy0000.x'] and ds.sampler.is_extra.sum() == 3
    cli(['train', f"--data={data}", f"--extra={extra}", f"--out_dir={tmp_path / 'run'}", '--max_iters=1', *TINY])
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert log.count("; 3 ids of extra fit no task: nobody, other, toy0000.x\n") == 1

def test_an_id_of_two_different_tasks_is_refused_by_name(write, tmp_path, capsys):
    a, b = write('a', toy_tasks(n=2)), write('b', toy_tasks(n=2, seed=1))
    extra = write('made', {'toy0001': make_list(3)})
    for args in ([f"--data={a}+{b}", '--adapt='], [f"--data={a}", f"--adapt={b}"]):
        said = refusal(capsys, 'train', *args, f"--extra={extra}", f"--out_dir={tmp_path / 'run'}")
        assert f"{extra}: extra pairs of toy0001, but two different tasks of data and adapt have that id" in said
    ArcDataset(DataConfig(data=f"{a}+{b}", extra=write('other', {'nobody': make_list(3)}))) # nobody asks which

def test_a_task_in_several_places_gets_its_pairs_once_and_in_adapt(write):
    a, extra = write('a', toy_tasks(n=2)), write('made', {'toy0001': make_list(7)})
    for cfg in (dict(data=f"{a}+{a}*2"), dict(data=a, adapt=a, allow_leak=True),
                dict(data=a, adapt=a, drop_overlap=True)):
        ds = ArcDataset(DataConfig(**cfg, extra=extra, val_tasks=0))
        s = ds.sampler
        assert s.is_extra.sum() == 7 and set(s.part[s.tables.pair_task[s.is_extra]]) == {1}
        assert sum(targets(ds)[p] for p in np.flatnonzero(s.is_extra)) == 7

# -----------------------------------------------------------------------------
# the stream

@pytest.mark.reliability
@pytest.mark.parametrize('shots', [0, -1])
def test_extra_pairs_come_without_replacement_however_few_an_epoch(write, shots):
    data = write('data', toy_tasks(n=3, demos=2, queries=2))
    extra = write('made', {'toy0000': make_list(10), 'toy0002': make_list(4, seed=1)})
    for n, times in ((3, 1), (3, 2), (7, 1), (0, 1), (99, 2)):
        ds = ArcDataset(DataConfig(data=f"{data}*2", extra=f"{extra}*{times}", extra_pairs=n, shots=shots, val_tasks=0))
        s = ds.sampler
        seen, orders = Counter(), set()
        for epoch in range(30):
            now = targets(ds, epoch)
            orders.add(tuple(sorted(now.items())))
            assert all(now[p] == 2 for p in np.flatnonzero(~s.is_extra))
            for k, size in ((0, 10), (2, 4)):
                pool = np.flatnonzero(s.is_extra & (s.tables.pair_task == k))
                assert len(pool) == size and sum(now[p] for p in pool) == min(n or size, size) * times
                counts = [seen[p] + now[p] for p in pool]
                assert max(counts) - min(counts) <= 1 # no pair a second time before all were seen
            seen += now
        assert len(orders) > 10 or n in (0, 99)

def test_each_visit_of_an_extra_pair_is_another_augment(write):
    data, extra = write('data', toy_tasks(n=2)), write('made', {'toy0001': make_list(6)})
    ds = ArcDataset(DataConfig(data=data, extra=extra, extra_pairs=2, val_tasks=0))
    docs = ds.plan(np.arange(24 * len(ds))) # 48 of 6 pairs: each 8 times
    for p in np.flatnonzero(ds.sampler.is_extra):
        assert sorted(docs.dihedral[docs.pairs[:, 0] == p]) == list(range(8))

def test_a_seed_chooses_other_pairs(write):
    data, extra = write('data', toy_tasks(n=2)), write('made', {'toy0001': make_list(40)})
    chosen = set()
    for seed in range(20):
        ds = ArcDataset(DataConfig(data=data, extra=extra, extra_pairs=3), seed)
        chosen.add(tuple(sorted(p for p in targets(ds) if ds.sampler.is_extra[p])))
    assert len(chosen) > 15

@pytest.mark.reliability
@pytest.mark.parametrize('mode', [
    dict(batching='bucket', batch_tokens=1000), dict(batching='pack', shots=-1, batch_tokens=1024, block_size=256)])
def test_ranks_and_resumes_see_the_same_stream_with_extra_pairs(write, mode):
    data = write('data', toy_tasks(n=5))
    extra = write('made', {f"toy000{k}": make_list(9, seed=k) for k in range(4)})
    ds = ArcDataset(DataConfig(data=data, extra=extra, extra_pairs=4, **mode))
    want = run(ds, [(1, 60)])
    assert run(ds, [(1, 13), (2, 17), (4, 20), (3, 10)]) == want

def test_a_context_is_of_own_and_extra_demos_and_no_longer_than_a_prompt(write):
    tasks = {**toy_tasks(n=1, demos=2, side=2), 'more': toy_tasks(n=1, demos=5, side=2, seed=1)['toy0000']}
    made = toy_tasks(n=1, demos=100, side=2, seed=2)['toy0000']['train']
    data, extra = write('data', tasks), write('made', {'toy0000': made})
    ds = ArcDataset(DataConfig(data=data, extra=extra, shots=-1, val_tasks=0))
    s, t = ds.sampler, ds.sampler.tables
    number = {name: k for k, name in enumerate(s.join('name').tolist())}
    met = set()
    for row in ds.plan(np.arange(20 * len(ds))).pairs:
        context = row[1:][row[1:] >= 0]
        assert row[0] not in context and len(set(context)) == len(context) and s.is_demo[context].all()
        if t.pair_task[row[0]] == number[b'toy0000']:
            assert len(context) == 2 # as many as it was published with
            met.update(context.tolist())
        else:
            assert 4 <= len(context) <= 5
    assert len(met) == 102

# -----------------------------------------------------------------------------
# what a query is asked with

@pytest.mark.reliability
@pytest.mark.parametrize('cfg', [dict(), dict(shots=-1), dict(shots=-1, block_size=60), dict(max_pair=40)])
def test_what_a_query_is_asked_with_does_not_depend_on_extra_pairs(write, cfg):
    tasks, made = toy_tasks(n=8, demos=3, side=5, seed=3), {}
    for name, obj in tasks.items(): # 7 is a color of outputs alone, but not in the extra pairs
        for pair in obj['train'] + obj['test']:
            pair['input'] = (np.array(pair['input']) % 5).tolist()
            pair['output'] = [[7]]
        made[name] = make_list(9, seed=int(name[-1])) + [{'input': [[7]], 'output': [[k] for k in range(1, 10)]}]
    data, asked = write('data', tasks), write('asked', toy_tasks(n=4, demos=2, side=5, seed=4))
    cfg = dict(data=data, val_tasks=4, batch_tokens=400, **cfg)
    ds, without = ArcDataset(DataConfig(**cfg, extra=write('made', made))), ArcDataset(DataConfig(**cfg))
    s, old = ds.sampler, without.sampler
    assert s.is_extra.sum() > 8 and s.key.tolist() == old.key.tolist() and ds.rows == without.rows
    assert [domain_of(s, k) for k in range(len(s.key))] == [domain_of(old, k) for k in range(len(s.key))]
    batches = list(ds.val_batches())
    assert len(batches) > 0 and all(same(a, b) for a, b in zip(batches, without.val_batches(), strict=True))
    closed = [read_source(asked, opened=False)]
    extended, _ = add_extra(closed, [read_source(write('more', {'toy0000': make_list(9)}))])
    need = []
    for c in (closed, extended):
        sampler = type(s)(c, DataConfig())
        need.append(sampler.tables.need[:, ~sampler.is_demo].tolist())
    assert need[0] == need[1]

def test_a_large_pair_goes_alone_and_a_large_published_demo_takes_its_task(write):
    tasks = {name: {'train': [pair_of(3), pair_of(4)], 'test': [pair_of(9)]} for name in 'abc'}
    tasks['b']['train'].append(pair_of(20)) # 83 tokens
    made = {name: [pair_of(k, 2) for k in (2, 3, 20, 4)] for name in tasks}
    data, extra = write('data', tasks), write('made', made)
    ds = ArcDataset(DataConfig(data=data, extra=extra, max_pair=80, val_tasks=0))
    assert ds.sampler.join('name').tolist() == [b'a', b'c'] and ds.num_tasks_out == 1
    assert ds.sampler.is_extra.sum() == 6 and ds.num_pairs_out == 2 and len(ds) == 2 * 3 + 6
    ds = ArcDataset(DataConfig(data=data, extra=extra, block_size=80, val_tasks=0)) # it is in no context either
    assert ds.num_long == 4 and len(ds) == 9 + 9
    dealt = ArcDataset(DataConfig(data=extra, deal=3, max_pair=80, val_tasks=0)) # and so in a list that stands alone
    assert (len(dealt), dealt.num_pairs_out, dealt.num_tasks_out) == (9, 3, 0)

def test_a_dealt_task_that_gets_extra_pairs_counts_as_published(write):
    data, extra = write('data', {'x': make_list(8)}), write('made', {'x.1': make_list(5, seed=1)})
    (c,), _ = add_extra([read_source(data, n_demos=3)], [read_source(extra)])
    assert c.n_own.tolist() == [0, 3] and c.n_demos.tolist() == [3, 8] and c.is_extra().sum() == 5

# -----------------------------------------------------------------------------
# leaks

def test_an_extra_pair_that_is_a_query_of_adapt_is_refused_dropped_or_allowed(write, tmp_path, capsys):
    tasks, asked = toy_tasks(n=2, side=9), toy_tasks(n=2, side=9, queries=2, seed=1)
    asked = {f"eval{k}": obj for k, obj in enumerate(asked.values())}
    leak = turned(asked['eval0']['test'][1])
    cfg = dict(data=write('data', tasks), adapt=write('asked', asked), val_tasks=0)
    for owner in ('toy0001', 'eval0', 'eval1'): # of a task of data, of the task itself, of another one of adapt
        extra = write(f"to_{owner}", {owner: [*make_list(5), leak]})
        cfg['extra'] = extra
        said = refusal(capsys, 'train', *(f"--{name}={x}" for name, x in cfg.items()), f"--out_dir={tmp_path / 'run'}")
        where = cfg['data'] if owner[0] == 't' else cfg['adapt']
        assert f"1 pairs of data are queries of adapt, answers included: an extra pair of {owner} ({where}) = eval0 " \
               f"query 1 ({cfg['adapt']}), augmented" in said
        ds = ArcDataset(DataConfig(**cfg, drop_overlap=True))
        assert (ds.num_dropped, ds.num_pairs_dropped, ds.leaks) == (0, 1, []) and ds.sampler.is_extra.sum() == 5
        assert "left out: 1 generated pairs overlapping;" in ds.about() and len(ds) == 8 + 6 + 5
        ds = ArcDataset(DataConfig(**cfg, allow_leak=True))
        assert len(ds.leaks) == 1 and ds.sampler.is_extra.sum() == 6
    query = dict(asked['eval0']['test'][1])
    del asked['eval0']['test'][1]['output'] # and though nobody knows the answer
    cfg['adapt'], cfg['extra'] = write('asked', asked), write('to_eval0', {'eval0': [*make_list(5), query]})
    with pytest.raises(ValueError, match="an extra pair of eval0 .* = eval0 query 1"):
        ArcDataset(DataConfig(**cfg))

@pytest.mark.parametrize('shots', [0, -1])
def test_an_augment_of_a_held_out_query_among_extra_pairs_is_held_out_too(write, shots):
    tasks = toy_tasks(n=4, side=9)
    made = {name: [*make_list(4, seed=10 + k), turned(obj['test'][0])] for k, (name, obj) in enumerate(tasks.items())}
    ds = ArcDataset(DataConfig(data=write('data', tasks), extra=write('made', made), val_tasks=2, shots=shots))
    assert len(ds.val_pairs) == 2 and ds.num_held == 4
    check_held_out(ds)

def test_extra_pairs_that_were_trained_on_are_written_down_and_not_asked(write, tmp_path, capsys):
    a, b = write('a', toy_tasks(n=2)), write('b', {'other': toy_tasks(n=1, seed=7)['toy0000']})
    made = {'toy0001': make_list(4), 'other': make_list(6, seed=1)}
    extra, out = write('made', made), str(tmp_path / 'run')
    cli(['train', f"--data={a}", f"--adapt={b}", f"--extra={extra}", '--val_tasks=0', f"--out_dir={out}",
         '--max_iters=2', *TINY])
    lines = Path(out, 'trained_on.txt').read_text().splitlines()[:-1] # the last one is a sha256
    names = Counter(line.split()[2] for line in lines)
    assert names == {'toy0000': 4, 'toy0001': 4 + 4, 'other': 6} # but the own demos of adapt
    query = make_list(6, seed=1)[3]
    asked = write('asked', {'new': {'train': toy_tasks(n=1, seed=7)['toy0000']['train'], 'test': [turned(query)]}})
    with pytest.raises(SystemExit):
        cli(['solve', '--run', out, '--data', asked])
    assert "was trained on 1 of these queries, answers included: other" in capsys.readouterr().err

# -----------------------------------------------------------------------------
# packed, and what the commands say

def test_a_packed_corpus_keeps_which_demos_are_its_own(write, tmp_path, capsys):
    data, extra = write('data', toy_tasks(n=3)), write('made', {'toy0001': make_list(8)})
    cli(['data', 'pack', data, '--extra', extra, '--out', str(tmp_path / 'packed')])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data}: 3 tasks, 9 demos, 3 queries, 3 of them with an answer, 8 extra pairs"
    assert lines[1] == f"{extra}: 8 pairs, 0 ids fit no task"
    c = read_source(str(tmp_path / 'packed'))
    assert c.n_own.tolist() == [3, 3, 3] and c.n_demos.tolist() == [3, 11, 3] and c.sha256 == lines[2].split()[-1]
    closed = c.close()
    assert closed.n_own.tolist() == [3, 3, 3] and closed.select(closed.n_demos > 3).n_own.tolist() == [3]
    cfg = dict(extra_pairs=3, val_tasks=1)
    joined, packed = ArcDataset(DataConfig(data=data, extra=extra, **cfg)), ArcDataset(DataConfig(data=c.source, **cfg))
    docs, other = (ds.plan(np.arange(200)) for ds in (joined, packed)) # the stream is the same
    assert (docs.pairs == other.pairs).all() and (docs.cmap == other.cmap).all()
    assert joined.corpus_sha256 != packed.corpus_sha256
    for out, more in (('a', f"{extra}*2"), ('b', '')):
        args = ['data', 'pack', f"{data}+{data}" if out == 'b' else data, '--extra', more, '--out', tmp_path / out]
        assert "want one source, without + or *" in refusal(capsys, *args)

def test_a_submission_of_a_packed_corpus_is_asked_with_its_own_demos(write, tmp_path):
    from nanoarc.submission import read_fitting
    data, extra = write('data', toy_tasks(n=3)), write('made', {'toy0001': [*make_list(8), pair_of(30)]})
    cli(['data', 'pack', data, '--extra', extra, '--out', str(tmp_path / 'packed')])
    (c,), tasks = read_fitting(str(tmp_path / 'packed'), 80, opened=False)
    assert [len(t.demos) for t in tasks] == [3, 3, 3] and c.n_demos.tolist() == [3, 3, 3]

def test_data_check_and_stats_show_extra_pairs_apart(write, tmp_path, capsys, monkeypatch):
    data = write('data', toy_tasks(n=3))
    extra = write('made', {'toy0001': [*map(pair_of, range(1, 9)), pair_of(30)], 'who': make_list(2)})
    cli(['data', 'check', data, '--extra', extra])
    assert capsys.readouterr().out.splitlines()[1] == f"{extra}: 11 pairs, 1 ids fit no task: who"
    cli(['data', 'check', data, '--extra', extra, '--against', data])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"4 pairs of {data} are queries of {data}" # three queries, and a column that is one too
    assert any(line.startswith(f"an extra pair of toy0001 ({data}) = toy000") for line in lines)
    monkeypatch.chdir(tmp_path) # a table of short names
    cli(['data', 'stats', 'data', '--extra', 'made', '--extra_pairs', '2', '--max_pair', '100', '--shots', '0'])
    cells = []
    for line in capsys.readouterr().out.splitlines():
        cells.append([x.strip() for x in line.split('│')[1:-1]])
    assert any(row[1:5] == ['3', '9', '8', '3'] for row in cells) # tasks, demos, extra, queries
    assert any(row[:1] + row[5:6] == ['14', '1'] for row in cells) # documents an epoch; a pair over max_pair

BAD = {
    "made/toy0001.json: task toy0001, pair 2, output, row 0, col 0: color 10 is outside 0..9":
        [*make_list(2), [GRID, [[10]]]],
    "made/toy0001.json: task toy0001, pair 2, input: want 1..30 rows, got 31": [*make_list(2), pair_of(31)],
    "made/toy0001.json: task toy0001: want a list of at least 2 pairs, got []": [],
    "made/toy0001.json: task toy0001, demo 1, input": task([[1, 10]]),
}

@pytest.mark.parametrize('want', BAD)
def test_a_broken_extra_pair_is_one_line_and_in_quarantine_goes_alone(want, write, tmp_path, capsys):
    extra = write('made', {'toy0001': BAD[want], 'toy0000': make_list(3)})
    data = write('data', toy_tasks(n=2))
    for args in (['train', f"--data={data}", f"--out_dir={tmp_path / 'run'}"], ['data', 'check', data]):
        assert want in refusal(capsys, *args, f"--extra={extra}")
    ds = ArcDataset(DataConfig(data=data, extra=extra, on_bad='quarantine'))
    assert len(ds.bad) > 0 and ds.sampler.is_extra.sum() == (5 if "pair 2" in want else 3)

def test_the_generator_of_the_example_makes_pairs_of_a_published_rule(tmp_path):
    example = Path(__file__).parent.parent / 'examples' / 'extra_pairs.py'
    subprocess.run([sys.executable, example], cwd=tmp_path, check=True)
    ds = ArcDataset(DataConfig(data='arc1/training', extra=str(tmp_path / 'extra'), val_tasks=0))
    assert ds.sampler.is_extra.sum() == 1000 and ds.strangers == []
    t = tasks_of(read_source('arc1/training'))['67a3c6ac']
    assert all((x[:, ::-1] == y).all() for x, y in t.demos + t.queries)
