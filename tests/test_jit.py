""" python -m pytest tests/test_jit.py: compiled kernels follow the sources, and work wherever they may be kept """
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanoarc import jit

PACKAGE = Path(jit.__file__).parent
DIGEST = """
import hashlib
from nanoarc.data import ArcDataset, ArcLoader, DataConfig
loader = ArcLoader(ArcDataset(DataConfig(data='arc1/training', max_pair=60)), prefetch=False)
print(hashlib.sha256(b''.join(loader.next_batch().idx.numpy().tobytes() for _ in range(20))).hexdigest())
"""

def digest(root, home, **env):
    """ of a batch that the package in root makes, in a process of its own """
    env = {**os.environ, 'PYTHONPATH': str(root), 'XDG_CACHE_HOME': str(home), 'PYTHONDONTWRITEBYTECODE': '1', **env}
    env.pop('NUMBA_CACHE_DIR', None)
    command = [sys.executable, '-c', DIGEST]
    return subprocess.run(command, cwd='/', env=env, capture_output=True, text=True, check=True).stdout

@pytest.mark.slow # all is compiled again
@pytest.mark.parametrize('file, line, other', [
    ('grids.py', "ROW = 10 #", "ROW = 15 #"), # a constant that kernels of data.py use
    ('corpus.py', "range(d % 4): # np.rot90", "range(d % 2): # np.rot90")]) # a kernel that kernels of data.py call
def test_kernels_follow_a_change_in_another_file(tmp_path, file, line, other):
    shutil.copytree(PACKAGE, tmp_path / 'nanoarc', ignore=shutil.ignore_patterns('__pycache__'))
    path = tmp_path / 'nanoarc' / file
    text = path.read_text()
    assert text.count(line) == 1
    before = digest(tmp_path, tmp_path / 'cache')
    path.write_text(text.replace(line, other))
    changed = digest(tmp_path, tmp_path / 'cache')
    path.write_text(text)
    assert changed != before == digest(tmp_path, tmp_path / 'cache')

def test_every_file_with_kernels_is_part_of_the_name_of_the_cache():
    using = [
        path.name for path in PACKAGE.glob('*.py') if re.search(r"^@(jit|ufunc)\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(using) == ['corpus.py', 'data.py'] and set(using) <= set(jit.SOURCES)

@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_kept(tmp_path):
    (tmp_path / 'file').write_text("") # no directory can be made below it, not even by root
    nowhere = str(tmp_path / 'file')
    assert digest(PACKAGE.parent, nowhere) == digest(PACKAGE.parent, tmp_path)

def test_a_cache_that_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    mine = jit.find_cache_dir()
    assert mine.is_relative_to(tmp_path)
    mine.chmod(0o777) # a cached kernel is code
    assert jit.find_cache_dir() != mine
