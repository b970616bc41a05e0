"""
the command, nothing else: `nanoarc COMMAND ...`, flags with underscores, every default in a dataclass.
"""
import importlib.util
import os
import sys
import tomllib
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

CORE = ['data.py', 'model.py', 'train.py', 'solve.py', 'checkpoint.py'] # in reading order
REST = ['sources.py', 'view.py', 'finetune.py', 'text.py', 'sweep.py', 'cli.py']

@dataclass
class Run:
    """ configs of a training run, TrainConfig, that of its model and that of its data """
    train: object
    model: object
    data: object

def parse(cls, args, command, help, default=None):
    """ list of strings -> a config, --help is made of the comments behind its fields. exits with 2 on an unknown flag """
    return tyro.cli(cls, args=args, default=default, prog=f"nanoarc {command}", description=help, config=(tyro.conf.OmitArgPrefixes,),
                    use_underscores=True)

# -----------------------------------------------------------------------------
# one function a command, its docstring is its help. imports are inside: torch takes a second

def train(args):
    """ train a model on a source of tasks, or with --text DIR on token shards (see nanoarc train --text DIR --help) """
    from nanoarc.data import DataConfig
    from nanoarc.model import ModelConfig
    from nanoarc.solve import draw_val
    from nanoarc.text import TextConfig
    from nanoarc.train import TrainConfig, main
    path = flag(args, 'config')
    text = flag(args, 'text') or (read_toml(path).get('text', '') if path else '') # shards in place of tasks
    cfg = parse_run(args, 'train', train.__doc__, TrainConfig(), ModelConfig(), TextConfig(text=text) if text else DataConfig())
    main(cfg.train, cfg.model, cfg.data, draw_val)

def finetune(args):
    """ fine-tune a pretrained language model on tasks as text """
    from nanoarc.data import DataConfig
    from nanoarc.finetune import LMConfig, main
    from nanoarc.solve import draw_val
    from nanoarc.train import TrainConfig
    cfg = parse_run(args, 'finetune', finetune.__doc__, TrainConfig(), LMConfig(), DataConfig(shots=-1, loss_on='outputs'))
    main(cfg.train, cfg.model, cfg.data, draw_val)

def export(args):
    """ a fine-tuned language model -> a directory for transformers, or for the hub """
    from nanoarc import finetune
    cfg = parse(finetune.ExportConfig, args, 'export', export.__doc__)
    finetune.export(cfg)
    print(cfg.out)

def parse_run(args, command, help, train_cfg, model_cfg, data_cfg):
    """ configs of the loop, the model and the data, the defaults of a command -> those of a run, as the flags, a TOML file, or a run to go on with or to begin with say """
    from nanoarc import checkpoint
    from nanoarc.model import ModelConfig
    from nanoarc.train import TrainConfig, configs
    resume, init_from, path, text = flag(args, 'resume'), flag(args, 'init_from'), flag(args, 'config'), 'text' in asdict(data_cfg)
    if resume or init_from:
        meta = checkpoint.load(resume or init_from)[1]
        model, data = configs(meta)
        if type(model) is not type(model_cfg):
            raise ValueError(f"{resume or init_from}: not a run of nanoarc {command}, its model is a {type(model).__name__}")
    if resume: # its settings are the defaults then
        for name, way in (('out_dir', "it goes on in its own directory"), ('minutes', "its number of steps is fixed, --max_iters changes it"), ('init_from', "its weights are there already")):
            if (x := flag(args, name)) and not (name == 'minutes' and float(x) == meta['train']['minutes']):
                raise ValueError(f"--{name} does not go with --resume: {way}")
        train_cfg, model_cfg, data_cfg = TrainConfig(**meta['train']), model, data
    elif init_from: # its model, the data is ours
        model_cfg = replace(model, n_task=0)
        if 'text' in meta['data'] and not text: # its blocks, places and vocabulary of the grids
            model_cfg = replace(model_cfg, **{name: getattr(ModelConfig(), name) for name in ('rope_bases', 'prefix', 'vocab_size')})
    if text and not resume:
        model_cfg = data_cfg.model_config(model_cfg)
    default = Run(train_cfg, model_cfg, data_cfg)
    if path:
        default = apply_toml(default, path)
    return parse(make_dataclass('Run', [(f.name, type(getattr(default, f.name))) for f in fields(default)]), args, command, help, default)

def solve(args):
    """ a trained model and a source -> submission.json """
    from nanoarc.solve import SolveConfig, main
    path = main(parse(SolveConfig, args, 'solve', solve.__doc__))
    if os.environ.get('RANK', '0') == '0': # under torchrun there are several of us
        print(path)

def score(args):
    """ a submission against the answers of a source """
    from nanoarc.solve import ScoreConfig, score_main
    score_main(parse(ScoreConfig, args, 'score', score.__doc__))

def view(args):
    """ tasks, attempts and loss curves, in the terminal or as png """
    from nanoarc.view import ViewConfig, main
    main(parse(ViewConfig, args, 'view', view.__doc__))

def data(args):
    """ data check SRC, data stats SRC, data pack SRC --out DIR: validate a source, describe it, make it open at once """
    from nanoarc.data import DataConfig
    from nanoarc.sources import Corpus, overlaps, queries_of, read_sources

    @dataclass
    class Data:
        action: Annotated[str, tyro.conf.Positional] # 'check' | 'stats' | 'pack'
        src: Annotated[str, tyro.conf.Positional] # a source, e.g. arc1/training or a path
        on_bad: str = 'raise' # a malformed task: 'raise' | 'quarantine' = leave it out and list it
        deal: int = DataConfig.deal # demos of each task that is dealt from a list of pairs (RE-ARC, BARC)
        against: str = '' # check: list the pairs of SRC that are queries of this source, whatever their colors and orientation
        out: str = '' # pack: the directory to write
        shots: int = -1 # stats: documents of so many demos, as in train
        block_size: int = DataConfig.block_size # stats: what does not fit into so many tokens
        max_pair: int = 0 # stats: only tasks with no longer demo. 0 = all
        png: str = '' # stats: a picture too

    cfg = parse(Data, args, 'data', data.__doc__)
    if cfg.action not in ('check', 'stats', 'pack'):
        raise ValueError(f"data {cfg.action}: want check, stats or pack")
    if cfg.action == 'stats':
        from nanoarc.view import print_stats
        print_stats(DataConfig(data=cfg.src, on_bad=cfg.on_bad, deal=cfg.deal, shots=cfg.shots, block_size=cfg.block_size, max_pair=cfg.max_pair, val_tasks=0), cfg.png)
        return
    sources = read_sources(cfg.src, True, cfg.on_bad, cfg.deal)
    corpora = [c for c, _ in sources]
    if len(corpora) == 0:
        raise ValueError("data: want a source")
    if cfg.action == 'pack' and ([repeat for _, repeat in sources] != [1] or not cfg.out):
        raise ValueError("data pack: want one source, without + or *, and --out DIR")
    for c in corpora:
        demos, answers = int(c.n_demos.sum()), int((c.h[1::2][~c.is_demo()] > 0).sum())
        print(f"{c.source}: {len(c)} tasks, {demos} demos, {len(c.hash) - demos} queries, {answers} of them with an answer")
        for error in c.bad:
            print(f"left out: {error}")
    if cfg.action == 'pack':
        corpora[0].save(cfg.out)
        print(f"{cfg.out}: {Corpus.open(cfg.out).sha256}") # opened again, as a proof
    if cfg.against:
        asked = queries_of([c for c, _ in read_sources(cfg.against, False, cfg.on_bad, cfg.deal)])
        texts = [text for c in corpora for _, text in overlaps(c, asked)]
        print("\n".join([*texts, f"{len(texts)} pairs of {cfg.src} are queries of {cfg.against}"]))

def sweep(args):
    """ search for settings: sweep SPACE.toml --trials 100 --jobs 1 """
    if not importlib.util.find_spec('optuna'):
        raise ValueError("sweep: want optuna: pip install 'nanoarc[sweep]'")
    from nanoarc.sweep import SweepConfig, main
    main(parse(SweepConfig, args, 'sweep', sweep.__doc__))

def text(args):
    """ text prepare, text hellaswag, text sample: token shards of any corpus, a test of language models, what they say """
    from nanoarc.text import HellaswagConfig, PrepareConfig, SampleConfig, hellaswag, prepare, sample
    actions = {'prepare': (PrepareConfig, prepare), 'hellaswag': (HellaswagConfig, hellaswag), 'sample': (SampleConfig, sample)}
    if args[:1] in (['-h'], ['--help']):
        print(f"{text.__doc__.strip()}. `nanoarc text ACTION --help` explains each flag\n", *(f"  {f.__doc__.strip()}" for _, f in actions.values()), sep="\n")
        sys.exit(0)
    if not args or args[0] not in actions:
        raise ValueError(f"text{''.join(f' {x}' for x in args[:1])}: want {', '.join(actions)}, each with --help")
    cls, action = actions[args[0]]
    action(parse(cls, args[1:], f"text {args[0]}", action.__doc__))

def source(args):
    """ print the core, a header before each file, to read or to paste into a language model """
    @dataclass
    class Source:
        all: bool = False # every file of the package, not the core alone
        count: bool = False # only a table of lines and tokens (characters / 4)

    cfg = parse(Source, args, 'source', source.__doc__)
    texts = {name: (Path(__file__).parent / name).read_text() for name in CORE + REST * (cfg.all or cfg.count)}
    if not cfg.count:
        for name, text in texts.items():
            print(f"# {'=' * 77}\n# nanoarc/{name}\n# {'=' * 77}\n{text}")
        return
    core = "".join(texts[name] for name in CORE)
    for name, text in [*texts.items(), ('the core five', core), ('all', "".join(texts.values()))]:
        print(f"{name:14s} {text.count(chr(10)):6,} lines {len(text) // 4:7,} tokens")

COMMANDS = {'train': train, 'finetune': finetune, 'export': export, 'solve': solve, 'score': score, 'view': view, 'data': data, 'text': text, 'sweep': sweep, 'source': source}

# -----------------------------------------------------------------------------

def flag(args, name):
    """ the value of --name in a list of strings, the last one, '' if it is not there. hyphens pass for underscores, as for tyro """
    value = ''
    for i, x in enumerate(args):
        key, equals, text = x.partition('=')
        if key.startswith('--') and key[2:].replace('-', '_') == name:
            value = text if equals else args[i + 1] if i + 1 < len(args) else value
    return value

def read_toml(path):
    """ -> {key: value}. raises ValueError """
    try:
        return tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: {e}") from None

def apply_toml(default, path):
    """ a group of configs with the values that a TOML file has for them. raises ValueError """
    return apply_values(default, read_toml(path), path)

def apply_values(default, values, where):
    """ a group of configs with other values: {name: value}. raises ValueError on a key that none of them knows, and on a value of another type """
    values = dict(values)
    for group in fields(default):
        part = getattr(default, group.name)
        mine = {f.name: values.pop(f.name) for f in fields(part) if f.name in values and f.name not in ('resume', 'init_from', 'config')}
        for key, x in mine.items():
            want = type(getattr(part, key))
            if type(x) is not want and (want, type(x)) not in ((float, int), (tuple, list)):
                raise ValueError(f"{where}: {key} = {x!r}, want a {want.__name__}")
        default = replace(default, **{group.name: replace(part, **mine)})
    if values:
        raise ValueError(f"{where}: unknown setting {', '.join(values)}")
    return default

def main(args=None):
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ('-h', '--help') or args[0] not in COMMANDS:
        print("usage: nanoarc COMMAND [--flags], `nanoarc COMMAND --help` explains each flag\n")
        for name, f in COMMANDS.items():
            print(f"  {name:8s}{f.__doc__.strip()}")
        if args and args[0] not in ('-h', '--help'):
            print(f"\nnanoarc: no command {args[0]!r}", file=sys.stderr)
        sys.exit(0 if args and args[0] in ('-h', '--help') else 2)
    try:
        COMMANDS[args[0]](args[1:])
    except BrokenPipeError: # `nanoarc source | head`
        os._exit(1)
    except (ValueError, OSError) as e: # what a user can mend is one line. anything else is ours and keeps its traceback
        if os.environ.get('NANOARC_DEBUG'):
            raise
        print(f"nanoarc: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == '__main__':
    main()
