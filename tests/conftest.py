""" toy tasks and tiny runs that several test files share """
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

def toy_pair(rng, side):
    """ a random grid, seldom square, and its transpose """
    x = rng.integers(0, 10, (rng.integers(1, side + 1), rng.integers(1, side + 1)))
    return {'input': x.tolist(), 'output': x.T.tolist()}

def toy_tasks(n=3, demos=3, queries=1, side=4, seed=0):
    """ n tasks as json objects: the rule is a transpose """
    rng = np.random.default_rng(seed)
    tasks = {}
    for k in range(n):
        train = [toy_pair(rng, side) for _ in range(demos)]
        test = [toy_pair(rng, side) for _ in range(queries)]
        tasks[f"toy{k:04d}"] = {'train': train, 'test': test}
    return tasks

def write_toy(path, **kwargs):
    """ toy tasks as a directory of json files -> its path """
    path.mkdir(parents=True)
    for name, task in toy_tasks(**kwargs).items():
        (path / f"{name}.json").write_text(json.dumps(task))
    return str(path)

@pytest.fixture
def toy(tmp_path):
    """ write_toy under a name of this test's own """
    def write(name='toy', **kwargs):
        return write_toy(tmp_path / name, **kwargs)
    return write

@pytest.fixture(scope='session')
def test_data():
    """ the directory of real corpora that no package ships """
    path = os.environ.get('NANOARC_TEST_DATA', '')
    if not Path(path).is_dir() or not path:
        pytest.skip("NANOARC_TEST_DATA is not set: it names a directory with conceptarc/ in it")
    return Path(path)

@pytest.fixture(scope='session')
def driver():
    """ a real browser without a window """
    browser = shutil.which('chromium') or shutil.which('google-chrome')
    if not (browser and shutil.which('chromedriver')):
        pytest.skip("needs chromium and chromedriver: apt install chromium chromium-driver")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,900'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()

TINY = ['--n_layer=2', '--n_embd=32', '--head_size=16', '--batch_tokens=400', '--minutes=0', '--device=cpu',
        '--compile=off', '--dtype=float32', '--dropout=0', '--ema=0',
        '--draw_every=0'] # pictures take longer than all else

@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """ a tiny model trained for 30 steps on the demos of 4 toy tasks -> (out_dir, source) """
    from nanoarc.cli import main
    path = tmp_path_factory.mktemp('tiny')
    src = write_toy(path / 'toy', n=4, queries=2, side=3)
    main(['train', '--data=', f"--adapt={src}", f"--out_dir={path / 'run'}", '--max_iters=30', *TINY])
    return str(path / 'run'), src

def rewrite(out, change):
    """ the newest checkpoint of a run with other meta data, as another version of us would have written it """
    from safetensors.torch import save

    from nanoarc import checkpoint
    tensors, meta = checkpoint.load(out)
    path = checkpoint.file(out, meta['step'])
    change(meta)
    data = save(tensors, metadata={'nanoarc': json.dumps(meta)})
    checkpoint.write_file(path, data)
    checkpoint.write_file(path.with_suffix('.sha256'), checkpoint.signed(data, path))
