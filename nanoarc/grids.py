"""
what a puzzle is, and how it becomes tokens. a task has a few demos, pairs of an input and an output grid, and queries,
inputs whose answer is asked for. a grid is a (H, W) uint8 array of colors 0..9. a pair becomes a list of tokens:

    input 1 2   output 3      IN  1 2 ROW 3 4 ROW  OUT  3 ROW 5 ROW  END
          3 4          5

each row of a grid is closed by ROW, so that the shape of the grid survives. this file is the definition, in plain
python; data.py does the same to millions of pairs with compiled loops.

the json keys "train" (the demos) and "test" (the queries) appear here and in sources.py alone, of all python.
"""
import hashlib
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache

import numpy as np

from nanoarc.paint import task_html

MAX_SIDE = 30 # the largest grid of ARC
MAX_NAME = 200 # characters of a task's name

@dataclass
class Task:
    """ one puzzle. grids are (H, W) uint8 with colors 0..9; the answer of a query is None where it is not known """
    name: str # the id within its source, e.g. '007bbfb7'
    source: str # e.g. 'arc1/training'
    demos: list # of (input, output)
    queries: list # of (input, answer or None)
    key: str = field(default="", repr=False) # tasks with one key are the same task: a hash of the demos in any order
    n_own: int = -1 # demos that it was published with, the first ones. -1 = all, 0 = none: the task was generated

    def __post_init__(self):
        self.key = self.key or demos_key(self.demos)

    def _repr_html_(self):
        """ how a notebook shows it """
        return task_html(self)

def grid_bytes(grid):
    """ a grid as bytes that tell its shape too: to hash it, to compare it, to break ties of a sort """
    return bytes(grid.shape) + grid.tobytes()

def demos_key(demos):
    """ pairs, in any order -> 32 hex digits """
    pairs = sorted(grid_bytes(x) + grid_bytes(y) for x, y in demos)
    return hashlib.sha256(b"".join(pairs)).hexdigest()[:32]

# -----------------------------------------------------------------------------
# tokens

# 0..9 are the colors, 15 is unused
ROW = 10 # ends a row of a grid
IN = 11 # begins an input
OUT = 12 # begins an output
END = 13 # ends a pair
PAD = 14
VOCAB_SIZE = 16
MAX_GRID = MAX_SIDE * (MAX_SIDE + 1) # tokens of the largest grid
MAX_PAIR = 1 + MAX_GRID + 1 + MAX_GRID + 1 # IN rows OUT rows END
MAX_SHOTS = 127 # demos before a target: z = 2 * 127 + 1 still fits a byte

def encode_grid(grid):
    """ (H, W) -> list of H * (W + 1) tokens """
    tokens = []
    for row in grid.tolist():
        tokens += row + [ROW]
    return tokens

def encode_pair(x, y):
    """ two grids -> their tokens, and the place (row, col, z) of each """
    tokens = [IN] + encode_grid(x) + [OUT] + encode_grid(y) + [END]
    places = [(0, 0, 0)]
    for token in tokens[1:]:
        places.append(next_place(*places[-1], token))
    return tokens, places

def next_place(row, col, z, token):
    """
    the place of a token, from the place (row, col, z) of the one before it. for numbers, numpy and torch alike.

    cell (r, c) of a grid stands at (r, c + 1), and the ROW that ends row r at (r + 1, 0). so every cell stands one to
    the right of the token that predicts it. IN and OUT stand at (0, 0), END at (H, 1).
    z tells the grids apart: 2k for the input and 2k + 1 for the output of a pair that k more follow. so a query, k = 0,
    looks the same however many demos stand before it. the caller gives the first IN its z.

        IN demo OUT demo  IN demo OUT demo  IN query OUT answer
        4       5         2       3         0        1
    """
    is_in, is_out, is_row = token == IN, token == OUT, token == ROW # True counts as 1
    same_grid = (token != IN) & (token != OUT)
    row = (row + is_row) * same_grid
    col = (col + 1) * (same_grid & (token != ROW))
    z = z + is_out - 3 * is_in # an output is one up from its input, the next input three down from that
    return row, col, z

def may_follow(token, row, col, width):
    """
    the grammar of an answer: may this token follow the one at (row, col)? width is that of the first row, 0 while it
    is open. a row ends where the first one did, END comes after a ROW, no side is over 30. numbers, or arrays that
    broadcast.
    """
    widest = width + MAX_SIDE * (width == 0) # MAX_SIDE while the first row is open
    is_cell = (token < ROW) & (col < widest) & (row < MAX_SIDE)
    is_row = (token == ROW) & (col > 0) & ((col == widest) | (row == 0))
    is_end = (token == END) & (col == 0) & (row > 0)
    return is_cell | is_row | is_end

def decode_grid(tokens):
    """ tokens of a grid, from its first cell to its last ROW -> (H, W) uint8. raises ValueError if they are none """
    rows, row = [], []
    for token in tokens:
        if token == ROW:
            rows.append(row)
            row = []
        elif 0 <= token <= 9:
            row.append(token)
        else:
            raise ValueError(f"token {token} inside a grid")
    widths = [len(x) for x in rows]
    is_open = len(row) > 0
    if is_open or len(set(widths)) != 1 or len(rows) > MAX_SIDE or not 1 <= widths[0] <= MAX_SIDE:
        raise ValueError(f"rows of lengths {widths + [len(row)]} are no grid")
    return np.array(rows, dtype=np.uint8)

# -----------------------------------------------------------------------------
# augments: a symmetry of the square and a renaming of the colors. the rule of a task survives both

def dihedral(grid, d):
    """ the d-th of the 8 symmetries of the square: transpose if d >= 4, then np.rot90 d % 4 times """
    if d >= 4:
        grid = grid.T
    return np.rot90(grid, int(d) % 4)

def undo_dihedral(grid, d):
    """ the inverse of dihedral """
    grid = np.rot90(grid, -int(d) % 4)
    return grid.T if d >= 4 else grid

def is_turned(d):
    """ does symmetry d make (W, H) of (H, W)? a number or an array of them -> 0 or 1 """
    return (d // 4 + d) % 2

def undo_augment(grid, d, cmap):
    """ a grid whose color x has become cmap[x] and which was turned by d -> as it was """
    colors = np.argsort(cmap).astype(np.uint8) # the inverse permutation
    return undo_dihedral(colors[grid], d)

# -----------------------------------------------------------------------------
# validation: json -> grids. what has passed here is trusted everywhere else. in messages rows, cols, demos and queries
# count from 0, as in the json

def show(x, most=40):
    """ a value in an error message: short, one line, without control characters """
    s = ascii(x)
    return s if len(s) <= most else s[: most - 3] + "..."

def one_line(text):
    """ a path or a message as it is, or escaped where it would break a line or a terminal """
    return text if text.isprintable() else ascii(text)[1:-1]

def to_grid(rows, where):
    """ json rows -> (H, W) uint8 grid. where names the place in error messages. raises ValueError, never casts """
    if type(rows) is not list:
        raise ValueError(f"{where}: want a grid, that is a list of rows, got {show(rows)} ({type(rows).__name__})")
    if not 1 <= len(rows) <= MAX_SIDE:
        raise ValueError(f"{where}: want 1..{MAX_SIDE} rows, got {len(rows)}")
    for r, row in enumerate(rows):
        if type(row) is not list:
            raise ValueError(f"{where}, row {r}: want a list of colors, got {show(row)} ({type(row).__name__})")
        if not 1 <= len(row) <= MAX_SIDE:
            raise ValueError(f"{where}, row {r}: want 1..{MAX_SIDE} cells, got {len(row)}")
        if len(row) != len(rows[0]):
            raise ValueError(f"{where}, row {r}: has {len(row)} cells, row 0 has {len(rows[0])}")
        # bool is a subclass of int, so isinstance would let True pass
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) > 9:
            refuse_colors(row, f"{where}, row {r}")
    return np.array(rows, dtype=np.uint8)

def refuse_colors(row, where):
    """ raises the ValueError that names the first cell that is no color """
    for c, x in enumerate(row):
        if type(x) is not int:
            raise ValueError(f"{where}, col {c}: want an integer color 0..9, got {show(x)} ({type(x).__name__})")
        if not 0 <= x <= 9:
            raise ValueError(f"{where}, col {c}: color {show(x)} is outside 0..9")

def check_keys(obj, needed, allowed, where):
    """ raises ValueError unless obj is a dict with all needed keys. further keys pass, but for typos of known ones """
    if type(obj) is not dict:
        wanted = " and ".join(needed)
        raise ValueError(f"{where}: want an object with {wanted}, got {show(obj)} ({type(obj).__name__})")
    refuse_typos(obj, needed + allowed, where)
    for key in needed:
        if key not in obj:
            raise ValueError(f"{where}: no key {key!r}, found {show(sorted(obj))}")

def refuse_typos(keys, known, where):
    """ raises ValueError if a key is nearly a known one: 'Train', 'tests', 'ouput'. it would be left out in silence """
    for key in keys:
        meant = "" if key in known else known_like(key, known)
        if meant:
            raise ValueError(f"{where}: unknown key {show(key)}, a typo of {meant!r}? rename it or take it out")

@lru_cache # each pair of a table has the same keys
def known_like(key, known):
    """ the known key that this one is nearly, whatever its case, '' if none """
    nearest = get_close_matches(key.strip().lower(), known, 1, 0.8) # one at most
    return nearest[0] if nearest else ""

def to_pair(obj, where):
    """ {"input": rows, "output": rows}, or BARC's [rows, rows] -> (input, output). raises ValueError """
    if type(obj) is list and len(obj) == 2:
        obj = {'input': obj[0], 'output': obj[1]}
    check_keys(obj, ('input', 'output'), (), where)
    return to_grid(obj['input'], f"{where}, input"), to_grid(obj['output'], f"{where}, output")

def as_pairs(obj):
    """ pairs that a table has by column, {"input": [grid, ...], "output": [...]} -> list of pairs. else obj itself """
    if type(obj) is not dict or 'input' not in obj:
        return obj
    columns = {key: x for key, x in obj.items() if x is not None} # null: nothing is known of any pair
    are_lists = all(type(x) is list for x in columns.values())
    if not are_lists or len(set(map(len, columns.values()))) > 1:
        return obj
    return [dict(zip(columns, values)) for values in zip(*columns.values())]

def at_task(name, where):
    """ the place of a task, for error messages. raises ValueError if its name cannot be one """
    if type(name) is not str or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"{where}: want a task id of 1..{MAX_NAME} printable characters, in one line, "
                         f"got {show(name)} ({type(name).__name__})")
    return f"{where}: task {ascii(name)[1:-1][:40]}"

def to_task(obj, name, source, where, opened=True, solutions=None):
    """
    {"train": pairs, "test": pairs} -> Task. solutions: Kaggle's list of answers, None = as the file has them.
    opened=False: nobody may use the answers (Corpus.close drops them later), so a malformed one becomes None and is no
    error. raises ValueError.
    """
    where = at_task(name, where)
    check_keys(obj, ('train', 'test'), (), where)
    train, test = as_pairs(obj['train']), as_pairs(obj['test'])
    for key, what, pairs in (('train', 'demos', train), ('test', 'queries', test)):
        if type(pairs) is not list: # not shown, there may be answers in it
            raise ValueError(f"{where}: want a list in {key!r}, got {type(pairs).__name__}")
        if len(pairs) == 0:
            raise ValueError(f"{where}: no {what}, {key!r} is empty")
    if opened and solutions is not None and len(solutions) != len(test):
        raise ValueError(f"{where}: {len(test)} queries but {len(solutions)} solutions")
    demos = []
    for i, pair in enumerate(train):
        at = f"{where}, demo {i}"
        check_keys(pair, ('input', 'output'), (), at) # to_pair would take BARC's lists too
        demos.append(to_pair(pair, at))
    queries = []
    for i, pair in enumerate(test):
        at = f"{where}, query {i}"
        check_keys(pair, ('input',), ('output',), at)
        x = to_grid(pair['input'], f"{at}, input")
        if solutions is not None:
            rows = solutions[i] if i < len(solutions) else None # too few are no error if they stay closed
            answer = to_answer(rows, f"{at}, solution", opened)
        elif 'output' in pair:
            answer = to_answer(pair['output'], f"{at}, output", opened)
        else:
            answer = None
        queries.append((x, answer))
    return Task(name, source, demos, queries)

def to_answer(rows, where, opened):
    """ to_grid. if it is to stay closed: None where it is no grid """
    try:
        return to_grid(rows, where)
    except ValueError:
        if opened:
            raise
        return None
