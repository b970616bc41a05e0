"""
python -m pytest tests/test_docs.py: README.md and docs/ say nothing that is not so. each line of a ```bash block, and
each command in `backticks`, is run where that is quick, otherwise parsed by the parser that it meets in earnest:

  nanoarc         data, score, source, view in the terminal and --help are run, in a directory that has what pages name.
                  of the others the flags are parsed and each config is checked
  python bench/   flags by the argparse of the script
  bash runs/      the script is there, knows the variables that are set, flags go to train or finetune
  torchrun, pip   flags by torchrun's parser; extras of pyproject.toml and files are there
"""
import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_pair, write_toy

from nanoarc import submission
from nanoarc.cli import COMMANDS, CORE, REST, main as cli
from nanoarc.model import ModelConfig
from nanoarc.sources import read_tasks
from nanoarc.text import shard_bytes

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
EVERY_PAGE = [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'tests' / 'README.md']
EXTRAS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']

# -----------------------------------------------------------------------------
# what stands in a page

def blocks(page, language):
    """ -> what stands in the fenced blocks of a language """
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text('utf-8'), re.M | re.S)

def prose(page):
    """ a page without its fenced blocks """
    return re.sub(r"^```.*?^```$", "", page.read_text('utf-8'), flags=re.M | re.S)

def commands_of(text):
    """ lines of a shell -> list of commands, a list of words each """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = []
        for word in shlex.split(line, comments=True):
            if word in ('while', 'do', 'done', ':', '...', '$?', '=', '75', '[', '];') or word == ':;':
                continue
            end = word in ('&&', '|', ';')
            if not end:
                words.append(word.removesuffix(';'))
            if end or word.endswith(';'):
                found.append(words)
                words = []
        found.append(words)
    return [words for words in found if words]

def commands_in(page):
    """ -> list of commands: those of bash blocks, and those in backticks """
    found = []
    for text in blocks(page, 'bash'):
        found += commands_of(text)
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.match(r"(\w+=\S* )*(nanoarc|python|python3|bash|torchrun|pip) \S", text):
            found += commands_of(text)
    return found

def of_pages(pages, find):
    """ -> list of parameters of a test: what find(page) finds, once each """
    found = {}
    for page in pages:
        for x in find(page):
            found.setdefault(str(x), pytest.param(x, id=f"{page.name}: {x if isinstance(x, str) else shlex.join(x)}"))
    return [*found.values()]

# -----------------------------------------------------------------------------
# a directory that has what they name

def write_answers(out, source):
    """ as nanoarc solve leaves a directory: a grid of one cell for each query """
    tasks, ranked = read_tasks(source), {}
    for k, task in enumerate(tasks):
        for i in range(len(task.queries)):
            ranked[k, i] = [(submission.Candidate(np.zeros((1, 1), np.uint8), 1, [(0, -1.0)], -1.0), 0.5)]
    submission.write_results(out, tasks, ranked)
    (out / 'solve.json').write_text(json.dumps({'run': 'x', 'data': source, 'leaks': []}))

@pytest.fixture(scope='module')
def world(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp('world')
    for folder in ('runs', 'bench', 'examples', 'tests'):
        (path / folder).symlink_to(ROOT / folder)
    shutil.copy(ROOT / 'constraints.txt', path)
    shutil.copytree(tiny_run[0], path / 'out' / 'all')
    write_answers(path / 'out' / 'all', 'arc1/evaluation')
    for name in ('quickstart', 'text'):
        shutil.copytree(path / 'out' / 'all', path / 'out' / name)
    for name in ('folder', 'tasks'):
        write_toy(path / 'my' / name)
        shutil.move(path / 'my' / name / 'toy0000.json', path / 'my' / name / 'a.json')
    (path / 'out' / 'mine').mkdir()
    write_answers(path / 'out' / 'mine', str(path / 'my' / 'tasks'))
    rng = np.random.default_rng(0)
    pairs = json.dumps([toy_pair(rng, 4) for _ in range(20)])
    with zipfile.ZipFile(path / 're_arc.zip', 'w') as f:
        f.writestr('re_arc/tasks/007bbfb7.json', pairs)
    (path / 'extra').mkdir()
    (path / 'extra' / '67a3c6ac.json').write_text(pairs)
    cli(['data', 'pack', str(path / 're_arc.zip'), '--out', str(path / 'packed')])
    task = json.loads((path / 'my' / 'tasks' / 'a.json').read_text())
    (path / 'arc-agi_test_challenges.json').write_text(json.dumps({'a': task}))
    (path / 'data' / 'edu').mkdir(parents=True)
    (path / 'data' / 'edu' / 'x_train_000001.npy').write_bytes(shard_bytes(np.zeros(9, np.uint16), 'npy'))
    for name in ('mine.toml', 'out/sweep_small/best.toml'):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("lr = 0.01")
    return path

# -----------------------------------------------------------------------------
# is it one that works?

KNOWN = ['python3 -m venv .venv', 'source .venv/bin/activate', 'nanoarc', 'pip download'] # nothing to check

class Parsed(Exception):
    """ raised where a script of bench/ would begin """

LONG = ['train.train', 'finetune.finetune', 'finetune.export', 'solve.solve', 'text.prepare', 'hellaswag.hellaswag',
        'hellaswag.sample', 'sweep.sweep']

def check_nanoarc(words, patch):
    """ a command of ours: run, or parsed and its configs checked """
    def check_configs(*cfgs):
        for cfg in cfgs:
            if isinstance(cfg, ModelConfig):
                cfg.resolved()
            elif hasattr(cfg, 'check'):
                cfg.check()
        return ""
    for name in LONG:
        patch.setattr(f"nanoarc.{name}", check_configs)
    if words[0] == 'view' and {'--out', '--live'} & {*words}: # a picture takes seconds, what is live does not end
        patch.setattr('nanoarc.view.view', check_configs)
    if words[:2] == ['data', 'pack']:
        shutil.rmtree(words[words.index('--out') + 1])
    if len(words) > 1 or words[0] not in COMMANDS: # a name alone may be told
        cli(words)

def check_bench(script, words, patch):
    """ a script of bench/, up to where it has its arguments """
    def parse_args(self, args=None):
        parse(self, words)
        raise Parsed
    parse = argparse.ArgumentParser.parse_args
    if 'ArgumentParser' not in script.read_text():
        assert not any(x.startswith('-') for x in words), f"{script.name} takes no flags"
        return
    patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    patch.setattr(sys, 'argv', [str(script), *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name='__main__')

def check_script(script, words, variables, patch):
    """ a script of runs/: flags after its own words are those of a training """
    text = script.read_text()
    for name in variables:
        assert re.search(rf"\$\{{?{name}\b", text), f"{script.name} knows no {name}"
    flags = [x for x in words if x.startswith('--')]
    if flags and script.name != 'test.sh':
        assert re.search(r"flags of train|to the training", text), f"{script.name} takes no flags"
        check_nanoarc(['finetune' if 'finetune' in script.name else 'train', *flags], patch)

def check(words, patch):
    """ raises AssertionError or SystemExit, or whatever the command does, unless it is one that works """
    variables = []
    while '=' in words[0]:
        variables.append(words[0].partition('=')[0])
        words = words[1:]
    name, *rest = words
    try:
        if name == 'nanoarc' and rest:
            check_nanoarc(rest, patch)
        elif name == 'torchrun':
            from torch.distributed.run import get_args_parser
            args = get_args_parser().parse_args(rest)
            assert args.module and args.training_script == 'nanoarc', args
            check_nanoarc(args.training_script_args, patch)
        elif name in ('bash', 'python') and rest[0].startswith(('runs/', 'bench/', 'examples/', '.ci/')):
            script = ROOT / rest[0]
            assert script.is_file(), f"no {script}"
            if rest[0].startswith('bench/') and name == 'python':
                check_bench(script, rest[1:], patch)
            elif rest[0].startswith('examples/'):
                runpy.run_path(str(script), run_name='__main__')
            else:
                check_script(script, rest[1:], variables, patch)
        elif words[:2] == ['pip', 'install']:
            for x in rest:
                extra = re.search(r"nanoarc\[(\w+)\]", x)
                assert not extra or extra[1] in EXTRAS, x
                assert not x.endswith('.txt') or Path(x).is_file(), x
        else:
            assert shlex.join(words) in KNOWN, "nobody checks this"
    except SystemExit as e:
        assert e.code in (0, None), f"{shlex.join(words)} exits with {e.code}"

@pytest.mark.parametrize('words', of_pages(EVERY_PAGE, commands_in))
def test_a_command_of_a_page_works(words, world, monkeypatch):
    monkeypatch.chdir(world)
    check(words, monkeypatch)

@pytest.mark.parametrize('line', [
    "nanoarc train --minuts 5", "nanoarc train --batching=pak", "nanoarc fly", "nanoarc train --resume out/none",
    "nanoarc solve --run out/all --veiws 3", "nanoarc data check arc1/trainng", "nanoarc score none.json arc1",
    "nanoarc view out/all --outt x.png", "nanoarc text sample --modell x", "nanoarc finetune --base x --rang 4",
    "python bench/loader.py --milion", "python bench/page.py --fast", "python bench/none.py", "bash runs/quickstrat.sh",
    "python bench/ablate.py 'qk norm'", "bash runs/quickstart.sh --sead=1", "MINUTE=3 bash runs/speedrun.sh",
    "bash runs/kaggle.sh --lr=1",
    "torchrun --nproc_per_gnome=8 -m nanoarc train", "torchrun --nproc_per_node=8 -m nanoarc train --loopz=2",
    "pip install 'nanoarc[fine]'", "pip install -c none.txt", "frobnicate",
])
def test_a_wrong_command_would_be_seen(line, world, monkeypatch):
    monkeypatch.chdir(world)
    words, = commands_of(line)
    with pytest.raises((AssertionError, OSError)):
        check(words, monkeypatch)

def test_every_page_has_commands_and_they_are_found():
    text = "while A=1 bash runs/x.sh; [ $? = 75 ]; do :; done # twice\nnanoarc a 'b c' \\\n  --d && nanoarc e | tail\n"
    assert commands_of(text) == [['A=1', 'bash', 'runs/x.sh'], ['nanoarc', 'a', 'b c', '--d'], ['nanoarc', 'e'],
                                 ['tail']]
    for page in PAGES:
        assert commands_in(page), f"{page.name} has none"
        languages = re.findall(r"^```(.+)$", page.read_text('utf-8'), re.M)
        assert {*languages} <= {'bash', 'python', 'json'}, f"{page.name}: nobody checks {languages}"
        for language in languages:
            for line in "".join(blocks(page, language)).splitlines():
                assert len(line) <= 100, f"{page.name}: github shows no more without scrolling: {line}"

# -----------------------------------------------------------------------------
# what else stands there

@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page):
    idx = torch.zeros(1, 8, dtype=torch.long)
    for code in blocks(page, 'python'):
        exec(code.replace("'cuda'", "'cpu'"), {'idx': idx, 'targets': idx, 'doc': idx})

@pytest.mark.parametrize('text', of_pages(PAGES, lambda page: blocks(page, 'json')))
def test_a_task_of_a_page_is_one(text, tmp_path, capsys):
    (tmp_path / 'task.json').write_text(text)
    cli(['data', 'check', str(tmp_path / 'task.json')])
    assert "1 tasks, 2 demos, 1 queries, 1 of them with an answer" in capsys.readouterr().out

def test_every_flag_that_a_page_names_is_one():
    known = {'--nproc_per_node', '--nnodes', '--help', '--all', '--count'}
    for path in [*(ROOT / 'nanoarc').glob('*.py'), *(ROOT / 'bench').glob('*.py')]:
        text = path.read_text('utf-8')
        known |= {f"--{name}" for name in re.findall(r"^    +(\w+): [\w\[\], .]+ = ", text, re.M)}
        known |= set(re.findall(r"'(--\w+)'", text))
    for page in EVERY_PAGE:
        for text in re.findall(r"`([^`\n]+)`", prose(page)):
            for name in re.findall(r"(?<!\S)--\w+", text):
                assert {name, name.replace('--no_', '--')} & known, f"{page.name}: {name}"

def anchors(page):
    """ -> what github makes of the headings of a page """
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(' ', '-') for x in headings}

@pytest.mark.parametrize('page', EVERY_PAGE, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", page.read_text('utf-8')):
        path, _, anchor = "".join(link).partition('#')
        if not path.startswith('http'):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"

def rows(page):
    """ -> {first cell of a row: {head of a column: cell}} of all tables of a page """
    found, heads = {}, None
    for line in prose(page).splitlines():
        cells = [x.strip() for x in line.split('|')][1:-1]
        if not cells:
            heads = None
        elif heads is None:
            heads = cells
        elif not line.startswith("|---"):
            found[cells[0]] = dict(zip(heads, cells))
    return found

def test_the_readme_is_short_and_its_loader_is_that_of_the_docs():
    assert len((ROOT / 'README.md').read_text('utf-8')) <= 9000
    ours, docs = rows(ROOT / 'README.md'), rows(ROOT / 'docs' / 'loader.md')
    shared = [name for name in ours if name in docs]
    assert len(shared) == 4
    for name in shared:
        assert ours[name].items() <= docs[name].items()

def test_the_docs_name_every_file_in_reading_order_and_every_command():
    files = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / 'docs' / 'code.md').read_text('utf-8'), re.M)
    assert files == [name for name in CORE + REST if not name.startswith('__')]
    named = {words[1] for page in PAGES for words in commands_in(page) if words[0] == 'nanoarc'}
    assert named - {'--help'} == set(COMMANDS)
