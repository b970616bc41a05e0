"""
would a test see it? bugs drawn at random over the package: an operator, a word, a number off by one. each is planted in
a copy of the sources, where the quick tests run that import its file, up to the first that fails. what survives is
equivalent or lacks a test. usage: python bench/mutate.py [-n 30] [--seed 0] [--files data.py ...]. half an hour on 2
cpu cores, the same command goes on where it was stopped.
"""
import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from keyword import iskeyword
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / 'out' / 'mutants.jsonl'
OTHER = {'<': '<=', '<=': '<', '>': '>=', '>=': '>', '==': '!=', '!=': '==', '+': '-', '-': '+', '*': '+', '/': '*',
         '//': '*', '%': '//', '**': '*', '<<': '>>', '>>': '<<', '&': '|', '|': '&', '^': '&', '+=': '-=', '-=': '+=',
         '*=': '+=', '//=': '*=', 'and': 'or', 'or': 'and', 'not': '', 'True': 'False', 'False': 'True', 'min': 'max',
         'max': 'min', 'break': 'continue', 'continue': 'break', 'any': 'all', 'all': 'any'}
QUICK = 'not slow and not gpu and not browser'
LINES = 'tests/test_bench.py::test_every_planted_bug_has_its_line_and_its_test' # a changed line is no seen bug
BINARY = '+', '-', '*', '/', '**', '&', '|' # these may also stand before a value alone

def mutants(path):
    """ -> list of (number of the line, what it becomes, text of the mutated file) """
    text, before, found = path.read_text('utf-8'), None, []
    lines = text.splitlines(True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        new = OTHER.get(token.string)
        if token.type == tokenize.NUMBER and token.string.isdigit():
            new = str(int(token.string) + 1)
        elif token.type == tokenize.NUMBER and re.fullmatch(r"[\d.e-]+", token.string):
            new = f"(2 * {token.string})"
        behind_value = before and (before.string in (')', ']') or before.type in (tokenize.NAME, tokenize.NUMBER))
        if token.string in BINARY and (not behind_value or iskeyword(before.string)):
            new = None
        before = token
        if new is None:
            continue
        number, line = token.start[0], lines[token.start[0] - 1]
        becomes = line[: token.start[1]] + new + line[token.end[1] :]
        mutated = "".join([*lines[: number - 1], becomes, *lines[number:]])
        with contextlib.suppress(SyntaxError):
            ast.parse(mutated)
            found.append((number, becomes.strip(), mutated))
    return found

def tests_of(name):
    """ the test files that import a file of the package, its own first """
    stem, found = Path(name).stem, []
    for path in sorted((ROOT / 'tests').glob('test_*.py')):
        if re.search(rf"^\s*(from nanoarc\.{stem} |from nanoarc import .*\b{stem}\b)", path.read_text('utf-8'), re.M):
            found.append(f"tests/{path.name}")
    return sorted(found, key=lambda test: test != f"tests/test_{stem}.py") or ['tests']

def first_failure(folder, tests):
    """ -> the first of the tests that fails, '' = all are green """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': str(folder),
           'NUMBA_CACHE_DIR': str(folder / 'kernels')}
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-n', 'auto', '-p', 'no:cacheprovider', '-m', QUICK,
               f"--deselect={LINES}"]
    try:
        done = subprocess.run([*command, *tests], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "it hangs"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return '' if done.returncode == 0 else failed[1] if failed else f"pytest ended with {done.returncode}"

def try_all(drawn):
    """ list of (file, line, becomes, mutated text) -> a row for each, those of an earlier call from the file """
    OUT.parent.mkdir(exist_ok=True)
    OUT.touch()
    rows = [json.loads(line) for line in OUT.read_text('utf-8').splitlines()]
    done = {(row['file'], row['sha256']): row for row in rows} # of the mutated text
    keys = [(name, hashlib.sha256(text.encode()).hexdigest()) for name, *_, text in drawn]
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / 'nanoarc'
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.git', '.venv', 'out', '__pycache__', '.*_cache'))
        if not set(keys) <= done.keys() and (red := first_failure(folder, ['tests'])):
            sys.exit(f"{red}: is to be green first")
        for key, (name, line, becomes, text) in zip(keys, drawn):
            if key not in done:
                path = folder / 'nanoarc' / name
                path.write_text(text, 'utf-8')
                seen = first_failure(folder, tests_of(name)) or 'SURVIVED'
                shutil.copy(ROOT / 'nanoarc' / name, path)
                done[key] = {'file': name, 'line': line, 'becomes': becomes, 'seen': seen, 'sha256': key[1]}
                with open(OUT, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(done[key]) + "\n")
            print(f"{done[key]['seen']}: {name}:{line}: {becomes}", flush=True)
    return [done[key] for key in keys]

def main(args):
    pool = []
    for path in sorted((ROOT / 'nanoarc').glob('*.py')):
        pool += [(path.name, *mutant) for mutant in mutants(path) if path.name in (args.files or [path.name])]
    drawn = random.Random(args.seed).sample(pool, min(args.n, len(pool)))
    print(f"{len(drawn)} of {len(pool):,} mutations, seed {args.seed}")
    survivors = [row for row in try_all(drawn) if row['seen'] == 'SURVIVED']
    print(f"\n{len(survivors)} of {len(drawn)} survived\n\n| where | what it became | why |\n|---|---|---|")
    for row in survivors:
        print(f"| `{row['file']}:{row['line']}` | `{row['becomes']}` | |")

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in (('-n', 30), ('--seed', 0)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument('--files', nargs='*')
    main(parser.parse_args())
