""" python -m pytest tests/test_jit.py: compiled kernels follow the sources, and work wherever they may be kept """
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanoarc import jit

PACKAGE = Path(jit.__file__).parent

# a pair under each of the 8 symmetries, and the hash of all its tokens
STREAM = """
import hashlib
import numpy as np
from nanoarc.corpus import Corpus
from nanoarc.data import DataConfig, Sampler, one_a_row
from nanoarc.grids import Task
from nanoarc.jit import CACHE_DIR
x, y = np.array([[1, 2, 3]], np.uint8), np.array([[4], [5]], np.uint8)
sampler = Sampler([Corpus.of([Task('toy', 'toy', [(x, y)], [(x, None)])])], DataConfig())
docs = sampler.plan([0] * 8, np.arange(8), 0, False, 0)
batch = sampler.write(one_a_row(docs), 0, 8, 32)
print(CACHE_DIR, hashlib.sha256(batch.idx.numpy().tobytes()).hexdigest())
"""

def stream(root, **env):
    """ -> (where its kernels are kept, hash of the stream) of the package in root, in a process of its own """
    env = {**os.environ, 'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1', **env}
    env.pop('NUMBA_CACHE_DIR', None)
    command = [sys.executable, '-c', STREAM]
    out = subprocess.run(command, cwd='/', env=env, capture_output=True, text=True, check=True).stdout
    return out.split()

# a constant that kernels of data.py use, and a kernel that they call
CHANGES = [
    ('grids.py', "ROW = 10 #", "ROW = 15 #"),
    ('corpus.py', "range(d % 4): # np.rot90", "range(d % 2): # np.rot90"),
]

@pytest.mark.slow # all is compiled three times
def test_kernels_follow_a_change_in_another_file(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / 'nanoarc', ignore=shutil.ignore_patterns('__pycache__'))
    cache = str(tmp_path / 'cache')
    where, before = stream(tmp_path, XDG_CACHE_HOME=cache)
    for file, line, other in CHANGES:
        path = tmp_path / 'nanoarc' / file
        text = path.read_text()
        assert text.count(line) == 1
        path.write_text(text.replace(line, other))
        assert stream(tmp_path, XDG_CACHE_HOME=cache)[1] != before
        path.write_text(text)
    assert stream(tmp_path, XDG_CACHE_HOME=cache) == [where, before]
    assert Path(where).is_relative_to(cache) and any(Path(where).rglob('*.nbc')) # compiled code was kept

@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_kept(tmp_path):
    (tmp_path / 'file').write_text("") # no directory can be made below it, not even by root
    (tmp_path / f"nanoarc-{os.getuid()}").write_text("") # in the way of the other place
    where, found = stream(PACKAGE.parent, XDG_CACHE_HOME=str(tmp_path / 'file'), TMPDIR=str(tmp_path))
    assert Path(where).is_relative_to(tmp_path) and found == stream(PACKAGE.parent)[1]

def test_a_user_without_a_home_keeps_kernels_in_a_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.delenv('NUMBA_CACHE_DIR', raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(os.path, 'expanduser', str) # '~' stays as it is
    monkeypatch.setattr(jit.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert jit.find_cache_dir().parent == tmp_path / f"nanoarc-{os.getuid()}"
    assert not (tmp_path / '~').exists()

def test_the_directory_that_numba_is_told_holds_one_named_by_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv('NUMBA_CACHE_DIR', str(tmp_path))
    assert jit.find_cache_dir().parent == tmp_path

def test_a_cache_that_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv('NUMBA_CACHE_DIR', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(jit.tempfile, 'gettempdir', lambda: str(tmp_path / 'other'))
    mine = jit.find_cache_dir()
    assert mine.is_relative_to(tmp_path) and mine == jit.find_cache_dir()
    mine.chmod(0o777) # a cached kernel is code
    assert jit.find_cache_dir() != mine

def kernels_of(tree):
    """ the functions of a file that are compiled """
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(x).split("(")[0] for x in node.decorator_list]
            if 'jit' in decorators or 'ufunc' in decorators:
                found.append(node)
    return found

def imports_of(tree):
    """ {name: the file of the package that it is imported from} """
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith('nanoarc.'):
            for alias in node.names:
                found[alias.asname or alias.name] = node.module.removeprefix('nanoarc.') + '.py'
    return found

def test_every_file_with_kernels_is_part_of_the_name_of_the_cache():
    needed = set()
    for path in PACKAGE.glob('*.py'):
        tree = ast.parse(path.read_text())
        imported = imports_of(tree)
        for kernel in kernels_of(tree):
            needed.add(path.name)
            for node in ast.walk(kernel): # and every file that a kernel has a name from, such as ROW
                if isinstance(node, ast.Name) and node.id in imported:
                    needed.add(imported[node.id])
    assert needed == {'jit.py', 'grids.py', 'corpus.py', 'data.py'} == set(jit.SOURCES)
