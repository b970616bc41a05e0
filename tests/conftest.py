""" toy tasks and tiny runs that several test files share """
import json
import os
from pathlib import Path

import numpy as np
import pytest

def toy_tasks(n=3, demos=3, queries=1, side=4, seed=0):
    """ n tasks as json objects: the rule is a transpose, grids are random and not square """
    rng = np.random.default_rng(seed)
    def pair():
        x = rng.integers(0, 10, (rng.integers(1, side + 1), rng.integers(1, side + 1)))
        return {'input': x.tolist(), 'output': x.T.tolist()}
    return {f"toy{k:04d}": {'train': [pair() for _ in range(demos)], 'test': [pair() for _ in range(queries)]} for k in range(n)}

@pytest.fixture
def toy(tmp_path):
    """ writes toy tasks as a directory of json files -> its path """
    def write(name='toy', **kwargs):
        path = tmp_path / name
        path.mkdir()
        for task, obj in toy_tasks(**kwargs).items():
            (path / f"{task}.json").write_text(json.dumps(obj))
        return str(path)
    return write

@pytest.fixture(scope='session')
def test_data():
    """ the directory of real corpora that no package ships """
    path = os.environ.get('NANOARC_TEST_DATA', '')
    if not Path(path).is_dir() or not path:
        pytest.skip("NANOARC_TEST_DATA is not set: it names a directory with conceptarc/ in it")
    return Path(path)

TINY = ['--n_layer=2', '--n_embd=32', '--head_size=16', '--batch_tokens=400', '--minutes=0', '--device=cpu', '--compile=off']

@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """ a tiny model trained for 30 steps on the demos of 4 toy tasks -> (out_dir, source) """
    from nanoarc.cli import main
    path = tmp_path_factory.mktemp('tiny')
    src = path / 'toy'
    src.mkdir()
    for task, obj in toy_tasks(n=4, queries=2, side=3).items():
        (src / f"{task}.json").write_text(json.dumps(obj))
    main(['train', '--data=', f"--adapt={src}", f"--out_dir={path / 'run'}", '--max_iters=30', *TINY])
    return str(path / 'run'), str(src)
