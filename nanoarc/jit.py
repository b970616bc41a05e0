"""
numba's compilers, with a cache of their own.

numba keeps a compiled kernel until the one file that holds it changes. our kernels call each other across files and use
constants of other files, so that cache would go stale: here it lies in a directory named by the sources of all of them.
"""
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import numba

SOURCES = 'jit.py', 'grids.py', 'corpus.py', 'data.py' # files that have kernels, and constants of kernels

def find_cache_dir():
    """ NUMBA_CACHE_DIR, the user's cache directory, or a temporary one: where we may write -> path, which exists """
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    home = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    places = [home / 'nanoarc', Path(tempfile.gettempdir()) / f"nanoarc-{os.getuid()}"]
    if os.environ.get('NUMBA_CACHE_DIR'):
        places.insert(0, Path(os.environ['NUMBA_CACHE_DIR']).absolute())
    for parent in places:
        if not parent.is_absolute(): # a user without a home
            continue
        try:
            (parent / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        info = (parent / name).stat()
        private = info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(parent / name, os.W_OK): # a cached kernel is code: nobody else may put one there
            return parent / name
    return Path(tempfile.mkdtemp(prefix='nanoarc-')) # compiled anew by each process

CACHE_DIR = str(find_cache_dir())

def cached(compiler, *args, **kwargs):
    """ a decorator of numba, with our cache directory while it decorates """
    def decorate(f):
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, CACHE_DIR
        try:
            return compiler(*args, cache=True, **kwargs)(f)
        finally:
            numba.config.CACHE_DIR = before
    return decorate

jit = cached(numba.njit, nogil=True) # holds no lock while it runs, so that another thread may

def ufunc(*signatures):
    """ a function of numbers -> one of arrays, which kernels may call too """
    return cached(numba.vectorize, list(signatures))
