"""
the command, nothing else: `nanoarc COMMAND ...`, flags with underscores, every default in a dataclass.
"""
import ast
import importlib.util
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# in reading order, the others from the ground up: a file imports only files above it
CORE = ['grids.py', 'data.py', 'model.py', 'train.py', 'decode.py', 'solve.py', 'checkpoint.py']
REST = ['settings.py', 'jit.py', 'paint.py', 'corpus.py', 'sources.py', 'workers.py', 'lm.py', 'text.py', 'run.py',
        'submission.py', 'view.py', 'finetune.py', 'hellaswag.py', 'sweep.py', 'cli.py', '__main__.py', '__init__.py']

# -----------------------------------------------------------------------------
# one function a command, its docstring is its help. imports are inside: torch takes seconds

def help_of(f):
    """ the docstring of a function as a line, '' where python -OO has dropped it """
    return " ".join((f.__doc__ or '').split())

def parse(cls, args, command, f=None):
    """ list of strings -> a config. --help begins with the docstring of f, or that of the command """
    from nanoarc.run import parse as parse_flags
    return parse_flags(cls, args, command, help_of(f or COMMANDS[command]))

def train(args):
    """ train a model on tasks, or on text (see train --text DIR --help) """
    from nanoarc.data import DataConfig
    from nanoarc.model import ModelConfig
    from nanoarc.run import Run, flag, parse_run, read_toml
    from nanoarc.text import TextConfig
    from nanoarc.train import TrainConfig, train as run
    text, path = flag(args, 'text'), flag(args, 'config')
    if path and not text:
        text = read_toml(path).get('text', '')
        if type(text) is not str:
            raise ValueError(f"{path}: text = {repr(text)[:40]}, want a str")
    default = Run(TrainConfig(), ModelConfig(), DataConfig())
    if text: # there is so much of it that nothing is seen twice
        default = Run(TrainConfig(ema=0.0), ModelConfig(depth=4, dropout=0.0), TextConfig(text=text))
    cfg = parse_run(default, args, 'train', help_of(train))
    run(cfg.train, cfg.model, cfg.data)

def finetune(args):
    """ fine-tune a pretrained language model on tasks as text """
    from nanoarc.data import DataConfig
    from nanoarc.finetune import finetune as run
    from nanoarc.lm import LMConfig
    from nanoarc.run import Run, parse_run
    from nanoarc.train import TrainConfig
    default = Run(TrainConfig(ema=0.0), LMConfig(), DataConfig(shots=-1, loss_on='outputs'))
    cfg = parse_run(default, args, 'finetune', help_of(finetune))
    run(cfg.train, cfg.model, cfg.data)

def export(args):
    """ a fine-tuned language model for transformers, or for the hub """
    from nanoarc.finetune import ExportConfig, export as run
    cfg = parse(ExportConfig, args, 'export')
    run(cfg)
    print(cfg.out)

def solve(args):
    """ a trained model and a source -> submission.json """
    from nanoarc.run import is_first_rank
    from nanoarc.solve import SolveConfig, solve as run
    path = run(parse(SolveConfig, args, 'solve'))
    if is_first_rank():
        print(path)

def score(args):
    """ a submission against the answers of a source """
    from nanoarc.submission import ScoreConfig, score_file
    score_file(parse(ScoreConfig, args, 'score'))

def view(args):
    """ tasks, attempts and loss curves, in the terminal or as png """
    from nanoarc.view import ViewConfig, view as run
    run(parse(ViewConfig, args, 'view'))

def draw(args):
    """ an editor for a task of your own, as a page for the browser """
    from nanoarc.view import DrawConfig, draw as run
    run(parse(DrawConfig, args, 'draw'))

def data(args):
    """ check, describe or pack a source: data check | stats | pack SRC """
    import tyro # late, for it is slow

    from nanoarc.data import DataConfig
    from nanoarc.settings import check_numbers

    @dataclass
    class Data:
        action: Annotated[str, tyro.conf.Positional] # 'check' | 'stats' | 'pack'
        src: Annotated[str, tyro.conf.Positional] # a source, e.g. arc1/training or a path
        # sources of pairs that somebody generated, which become further demos of the tasks of SRC, as in train
        extra: str = ''
        on_bad: str = 'raise' # a malformed task: 'raise' | 'quarantine' = leave it out and list it
        deal: int = DataConfig.deal # demos of each task that is dealt from a list of pairs (RE-ARC, BARC)
        # check: list the pairs of SRC that are queries of this source, whatever their colors and orientation
        against: str = ''
        out: str = '' # pack: the directory to write
        shots: int = -1 # stats: documents of so many demos, as in train
        block_size: int = DataConfig.block_size # stats: what does not fit into so many tokens
        max_pair: int = 0 # stats: only tasks with no longer demo. 0 = all
        extra_pairs: int = 0 # stats: so many extra pairs of a task an epoch. 0 = all
        png: str = '' # stats: a picture too

    cfg = parse(Data, args, 'data')
    check_numbers(cfg, dict(deal=1, shots=-1, block_size=1))
    if cfg.action == 'stats':
        from nanoarc.view import print_stats
        print_stats(DataConfig(data=cfg.src, extra=cfg.extra, extra_pairs=cfg.extra_pairs, on_bad=cfg.on_bad,
                               deal=cfg.deal, shots=cfg.shots, val_tasks=0, block_size=cfg.block_size,
                               max_pair=cfg.max_pair), cfg.png)
    elif cfg.action in ('check', 'pack'):
        check_source(cfg)
    else:
        raise ValueError(f"data {cfg.action}: want check, stats or pack")

def check_source(cfg):
    """ data check and data pack: reads a source, prints what is in it, writes it. raises ValueError """
    from nanoarc.corpus import Corpus, a_few, add_extra, overlaps, queries_of
    from nanoarc.sources import known_faults, read_sources
    from nanoarc.view import count_tasks
    sources = read_sources(cfg.src, True, cfg.on_bad, cfg.deal)
    more = read_sources(cfg.extra, True, cfg.on_bad, cfg.deal)
    if len(sources) == 0:
        raise ValueError("data: want a source")
    repeats = [repeat for _, repeat in sources + more]
    if cfg.action == 'pack' and (len(sources) > 1 or max(repeats) > 1 or not cfg.out):
        raise ValueError("data pack: want one source, without + or *, and --out DIR")
    extra = [c for c, _ in more]
    corpora, strangers = add_extra([c for c, _ in sources], extra)
    for c in corpora:
        n = count_tasks(c)
        added = f", {n['extra']} extra pairs" if n['extra'] else ""
        left_out = f", {len(c.bad)} things left out" if c.bad else ""
        print(f"{c.source}: {n['tasks']} tasks, {n['demos']} demos, {n['queries']} queries, "
              f"{n['answers']} of them with an answer{added}{left_out}")
    if extra:
        named = f": {a_few(strangers, 5, ', ')}" if strangers else ""
        print(f"{cfg.extra}: {sum(len(c.hash) for c in extra)} pairs, {len(strangers)} ids fit no task{named}")
    for c in corpora + extra:
        for error in c.bad:
            print(f"left out: {error}")
        for name, why in known_faults(c).items():
            print(f"known to be faulty: {name}, {why}")
    if cfg.action == 'pack':
        corpora[0].save(cfg.out)
        print(f"{cfg.out}: {Corpus.open(cfg.out).sha256}") # opened again, as a proof
    if cfg.against:
        asked = queries_of([c for c, _ in read_sources(cfg.against, False, cfg.on_bad, cfg.deal)])
        n = 0
        for c in corpora:
            for _, text in overlaps(c, asked):
                print(text)
                n += 1
        print(f"{n} pairs of {cfg.src} are queries of {cfg.against}")

def text(args):
    """ token shards, a test, samples: text prepare | hellaswag | sample """
    from nanoarc.hellaswag import HellaswagConfig, SampleConfig, hellaswag, sample
    from nanoarc.text import PrepareConfig, prepare
    actions = {'prepare': (PrepareConfig, prepare), 'hellaswag': (HellaswagConfig, hellaswag),
               'sample': (SampleConfig, sample)}
    name = args[0] if args else ''
    if name in ('-h', '--help'):
        print(f"{help_of(text)}. `nanoarc text ACTION --help` explains each flag\n")
        for _, action in actions.values():
            print(" ", help_of(action))
        sys.exit(0)
    if name not in actions:
        said = f"text {name}".strip()
        raise ValueError(f"{said}: want {', '.join(actions)}, each with --help")
    cls, action = actions[name]
    action(parse(cls, args[1:], f"text {name}", action))

def sweep(args):
    """ search for settings: sweep SPACE.toml --trials 100 --jobs 1 """
    if not importlib.util.find_spec('optuna'):
        raise ValueError("sweep: want optuna: pip install 'nanoarc[sweep]'")
    from nanoarc.sweep import SweepConfig, sweep as run
    run(parse(SweepConfig, args, 'sweep'))

def source(args):
    """ print the core, to read or to paste into a language model """

    @dataclass
    class Source:
        all: bool = False # every file of the package, not the core alone
        # only a table of lines and tokens (characters / 4), with the longest function and the longest line
        count: bool = False

    cfg = parse(Source, args, 'source')
    if cfg.count:
        print_counts()
        return
    for name, code in read_files(CORE + REST if cfg.all else CORE).items():
        print(f"# {'=' * 77}\n# nanoarc/{name}\n# {'=' * 77}\n{code}")

def read_files(names):
    """ -> {name: what is in this file of the package} """
    return {name: (Path(__file__).parent / name).read_text('utf-8') for name in names}

def print_counts():
    """ how long the files, the functions and the lines of the package are """
    code = read_files(CORE + REST)
    core, every = "".join(code[name] for name in CORE), "".join(code.values())
    for name, x in {**code, 'the core': core, 'all': every}.items():
        n_lines = x.count("\n")
        print(f"{name:14s} {n_lines:6,} lines {len(x) // 4:7,} tokens")
    n, where = max(functions(code))
    print(f"the longest function is {where}, {n} lines")
    n, where = max(lines(code))
    print(f"the longest line is {where}, {n} characters")

def functions(code):
    """ {file: code} -> list of (lines, file and name) of each function """
    found = []
    for name, x in code.items():
        for node in ast.walk(ast.parse(x)):
            if isinstance(node, ast.FunctionDef):
                found.append((node.end_lineno - node.lineno + 1, f"{name} {node.name}"))
    return found

def lines(code):
    """ {file: code} -> list of (characters, file and number) of each line """
    found = []
    for name, x in code.items():
        for number, line in enumerate(x.splitlines(), 1):
            found.append((len(line), f"{name}:{number}"))
    return found

GROUPS = {
    'tasks': {'data': data, 'view': view, 'draw': draw},
    'training': {'train': train, 'finetune': finetune, 'text': text, 'sweep': sweep},
    'answers': {'solve': solve, 'score': score, 'export': export},
    'nanoarc itself': {'source': source},
}
COMMANDS = {}
for group in GROUPS.values():
    COMMANDS.update(group)

# -----------------------------------------------------------------------------

def set_threads():
    """
    threads of OpenMP spin 300,000 rounds while they wait for each other. with 3,000 training is as fast alone and a
    third faster beside a busy process, with fewer it is slower alone (bench/busy.py). torch reads this at its import
    """
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '3000')

def print_help():
    """ every command, a line each """
    print("usage: nanoarc COMMAND [--flags], `nanoarc COMMAND --help` explains each flag")
    for title, group in GROUPS.items():
        print(f"\n{title}")
        for name, f in group.items():
            print(f"  {name:11s} {help_of(f)}")

class Unread:
    """ stdout or stderr. nobody need read it to the end: after `>&-`, `| head` or `| true` the work goes on """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w', encoding='utf-8')
        self.error = None # what went wrong but that nobody reads on: a full disk

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, f, *args):
        try:
            f(*args)
        except OSError as e: # what waits in its buffer, and what is to come, goes to /dev/null
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(e, BrokenPipeError):
                self.error = e

def main(args=None):
    """ a command: list of strings, None = those of this process. exits with 2 after what a user can mend """
    try:
        if importlib.util.find_spec('fcntl') is None: # by which a run is locked
            print("nanoarc: want Linux or macOS, on Windows inside WSL (wsl --install)", file=sys.stderr)
            sys.exit(2)
        if isinstance(sys.stdout, io.TextIOWrapper): # a locale may not have the letters of a name
            sys.stdout.reconfigure(errors='backslashreplace')
        set_threads()
        for name in ('stdout', 'stderr'):
            if getattr(sys, name) is getattr(sys, f"__{name}__"): # or a notebook or a test has put its own there
                setattr(sys, name, Unread(getattr(sys, name)))
        run_command(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
        if getattr(sys.stdout, 'error', None): # found out here at the latest: the work is done, what it said is lost
            raise sys.stdout.error
    except (ValueError, OSError) as e: # what a user can mend is one line. anything else is ours and keeps its traceback
        if os.environ.get('NANOARC_DEBUG'):
            raise
        from nanoarc.grids import one_line # a path or an id may hold anything
        print(f"nanoarc: {one_line(str(e))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

# flags that name a path and may not be empty
PATHS = 'config', 'resume', 'init_from', 'run', 'out_dir', 'out', 'text', 'model', 'submission', 'png'

def refuse_empty(args):
    """ raises ValueError on `--resume ""` or `--resume=`: without the flag something else would begin """
    for x, value in zip(args, [*args[1:], None]):
        name, equals, text = x.replace('-', '_').partition('=')
        if name[:2] == '__' and name[2:] in PATHS and (text if equals else value) == "":
            raise ValueError(f"--{name[2:]} is empty: an unset variable?")

def run_command(args):
    """ the first word says which. exits with 0 after --help, with 2 if there is no such command """
    name = args[0] if args else ''
    if name not in COMMANDS:
        print_help()
        if name in ('-h', '--help'):
            sys.exit(0)
        if args:
            print(f"\nnanoarc: no command {name!r}", file=sys.stderr)
        sys.exit(2)
    if os.environ.pop('NANOARC_ENDS_WITH_STDIN', ''): # we are a trial of a sweep
        from nanoarc.run import end_with_stdin
        end_with_stdin()
    refuse_empty(args)
    COMMANDS[name](args[1:])

if __name__ == '__main__': # python -m nanoarc.cli, which without this would do nothing and say nothing
    main()
