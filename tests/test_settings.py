""" python -m pytest tests/test_settings.py, with -m slow each value of each setting of each command """
import math
import time
from dataclasses import fields

import pytest
import test_text
from conftest import TINY
from test_hellaswag import write_items
from test_text import write_jsonl, write_shards

from nanoarc import grids
from nanoarc.cli import main as cli
from nanoarc.data import DataConfig
from nanoarc.hellaswag import HellaswagConfig, SampleConfig
from nanoarc.lm import LMConfig
from nanoarc.model import ModelConfig
from nanoarc.settings import is_like
from nanoarc.solve import SolveConfig
from nanoarc.submission import ScoreConfig
from nanoarc.sweep import SweepConfig
from nanoarc.text import PrepareConfig, TextConfig
from nanoarc.train import TrainConfig, train

text_run = test_text.text_run # a fixture
VALUES = (math.nan, math.inf, -math.inf, -1, 0, 2**70)

def numbers(cls):
    """ the fields of a config that hold numbers -> list of (config, name) """
    return [(cls, f.name) for f in fields(cls) if f.type in (int, float) or f.type == tuple[float, ...]]

def needed(cls):
    """ what a config has no default for """
    return {name: 'x' for name in ('model', 'file', 'dataset', 'space', 'submission', 'data') if name in
            {f.name for f in fields(cls) if f.default is f.default_factory}}

ALL = (TrainConfig, ModelConfig, DataConfig, TextConfig, PrepareConfig, LMConfig, SolveConfig, SampleConfig,
       SweepConfig)

@pytest.mark.parametrize('cls, name', [pair for cls in ALL for pair in numbers(cls)])
@pytest.mark.parametrize('x', [x for x in VALUES if x not in (0, -1)])
def test_no_setting_is_infinite_or_no_number(cls, name, x):
    cfg = cls(**needed(cls), **{name: (x,) if name == 'rope_bases' else x})
    with pytest.raises(ValueError, match=rf"^{name}=.*: want ") as e:
        cfg.resolved() if cls is ModelConfig else cfg.check()
    assert "\n" not in str(e.value)

# -----------------------------------------------------------------------------
# what is within its bounds runs

@pytest.fixture(scope='module')
def src(tiny_run):
    """ toy tasks, and the kernels are compiled already """
    return tiny_run[1]

def ends_well(call, name):
    """ call() ends within 20 s, well or with one line that names the setting """
    began = time.monotonic()
    try:
        call()
    except ValueError as e:
        assert name in str(e) and "\n" not in str(e)
    assert time.monotonic() - began < 20

@pytest.mark.parametrize('cls, name', [pair for cls in (TrainConfig, ModelConfig, DataConfig) for pair in numbers(cls)])
@pytest.mark.parametrize('x', [0, -1])
def test_a_run_with_any_number_is_refused_by_name_or_ends(src, tmp_path, cls, name, x):
    values = {TrainConfig: dict(minutes=0, max_iters=2, draw_every=0, device='cpu', compile='off',
                                out_dir=str(tmp_path / 'run')),
              ModelConfig: dict(n_layer=2, n_embd=32, head_size=16),
              DataConfig: dict(data=src, batch_tokens=400, val_tasks=2)}
    values[cls][name] = (x,) if name == 'rope_bases' else x
    def call():
        assert train(*(c(**x) for c, x in values.items()))['step'] == 2
    ends_well(call, name)

def commands(tmp_path, src, run, text_run):
    """ {a command with what it needs: its configs, and settings that it needs too} """
    shards, _ = write_shards(tmp_path / 'shards', [2000, 3000])
    items, texts = write_items(tmp_path / 'x.jsonl'), write_jsonl(tmp_path / 't.jsonl', test_text.toy_texts(40))
    space = tmp_path / 's.toml'
    space.write_text(f"[fixed]\ndata = '{src}'\nmax_iters = 2\nval_tasks = 2\n[search]\nlr = [1e-3]\n")
    (tmp_path / 'sub.json').write_text("{}")
    out = f"--out_dir={tmp_path / 'out'}"
    few = ['--max_iters=2', out, '--val_tasks=2', *TINY]
    return [(['train', f"--data={src}", *few], (TrainConfig, ModelConfig, DataConfig)),
            (['train', f"--text={shards}", *few[:2], *TINY[:3], '--batch_tokens=256', '--block_size=64', *TINY[4:]],
             (TextConfig,)), # the others are those of above
            (['solve', '--run', run, f"--data={src}", '--allow_leak', '--views=1', '--device=cpu', out,
              '--ttt_steps=1'], (SolveConfig,)),
            (['score', str(tmp_path / 'sub.json'), src], (ScoreConfig,)),
            (['text', 'sample', '--model', text_run, '--most=3'], (SampleConfig,)),
            (['text', 'hellaswag', '--model', text_run, '--file', items], (HellaswagConfig,)),
            (['text', 'prepare', '--dataset', texts, '--train_bpe=300', '--shard_tokens=900', out], (PrepareConfig,)),
            (['sweep', str(space), out, '--trials=0'], (SweepConfig,))]

@pytest.mark.slow
def test_each_command_with_any_number_is_refused_by_name_or_ends(tiny_run, text_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grids, 'MAX_SIDE', 4) # answers of a model that has learned nothing are as large as they may
    run, src = tiny_run
    n = 0
    for args, configs in commands(tmp_path, src, run, text_run[0]):
        for cls, name in (pair for cls in configs for pair in numbers(cls)):
            for x in VALUES:
                out, began = tmp_path / f"out{n}", time.monotonic()
                flags = [f"--{name}", *[str(x)] * 3] if name == 'rope_bases' else [f"--{name}={x}"]
                these = [y.replace(str(tmp_path / 'out'), str(out)) for y in args]
                code = 0
                try:
                    cli([*these, *flags])
                except SystemExit as e:
                    code = e.code or 0
                said = capsys.readouterr()
                assert code in (0, 2) and (code == 0 or name in said.err + said.out), (these, flags, said)
                assert code == 2 or x in (0, -1), (these, flags)
                assert time.monotonic() - began < 20
                n += 1
    assert n > 300

@pytest.mark.parametrize('command', ['check', 'stats'])
@pytest.mark.parametrize('flag', ['--deal=0', f"--deal={2**70}", '--shots=-2', '--max_pair=-1', '--block_size=0'])
def test_data_refuses_numbers_by_name(src, capsys, command, flag):
    with pytest.raises(SystemExit) as e:
        cli(['data', command, src, flag])
    assert e.value.code == 2 and f"{flag[2:]}: want " in capsys.readouterr().err

# -----------------------------------------------------------------------------
# from files

@pytest.mark.parametrize('x, default, want', [
    (1, 1, True), (1, 0.5, True), (0.5, 1, False), (True, 1, False), (1, True, False), ("a", 'b', True),
    (1, 'b', False), (None, 1, False), ({}, 1, False), (1, (1.0,), False), ([], (1.0,), True), ([1, 2.5], (1.0,), True),
    (["a"], (1.0,), False), ([[1]], (1.0,), False),
])
def test_what_may_stand_for_a_default(x, default, want):
    assert is_like(x, default) == want

@pytest.mark.parametrize('text, want', [
    ("a = " + "[" * 2000, ""), ("a = " + "{a = " * 2000, ""), ("\xff", ""),
    ("rope_bases = ['a']", "rope_bases = ['a'], want a tuple"), ("rope_bases = [[1]]", "rope_bases = [[1]], want a"),
    ("lr = nan", "lr=nan: want 0 to"), ("lr = inf", "lr=inf: want 0 to"), (f"seed = {2**70}", "seed="),
    ("text = 5", "text = 5, want a str"), ("text = ['a']", "text = ['a'], want a str"),
    ("max_iters = 1.5", "max_iters = 1.5, want a int"), ("mixer = {a = 1}", "mixer = {'a': 1}, want a str"),
    ("lr = 1979-05-27", "lr = datetime.date(1979, 5, 27), want a"),
])
def test_a_toml_file_of_nonsense_is_one_line(tmp_path, capsys, src, text, want):
    path = tmp_path / 'x.toml'
    path.write_bytes(text.encode('latin-1'))
    for command in (['train', f"--data={src}", '--config', str(path), f"--out_dir={tmp_path / 'run'}"],
                    ['sweep', str(path), f"--out_dir={tmp_path / 'out'}"]):
        with pytest.raises(SystemExit) as e:
            cli(command)
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.count("\n") == 1 and error.startswith("nanoarc: ")
        assert want in error or command[0] == 'sweep'
