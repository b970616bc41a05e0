""" python -m pytest tests/test_bench.py: what the benchmarks count, and that they run """
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoarc.data import ArcDataset, ArcLoader, DataConfig
from nanoarc.model import Model, ModelConfig
from nanoarc.run import make_dataset

BENCH = Path(__file__).parent.parent / 'bench'
RUNS = BENCH.parent / 'runs'
sys.path[:0] = [str(BENCH), str(RUNS)]

def test_flops_of_a_packed_row_are_those_of_its_documents():
    import model as bench
    net = Model(ModelConfig(mixer='A', n_layer=1, n_embd=32))
    doc = torch.tensor([[0, 0, 0, 1, 1, -1]])
    weights = sum(p.numel() for p in net.blocks.parameters() if p.ndim == 2) + net.head.weight.numel()
    assert bench.flops(net, doc) == 6 * weights * 5 + 3 * 4 * 32 * (6 + 3)

def test_what_one_may_expect_of_the_quickstart_lies_between_what_was_measured():
    import expect
    points = list(expect.SOLVED.items())
    assert points == sorted(points, key=lambda point: point[1]), "more tokens, more solved"
    assert [expect.expected(tokens) for tokens, _ in points] == [solved for _, solved in points]
    (a, low), (b, high) = points[:2]
    assert expect.expected((a * b) ** 0.5) == pytest.approx((low + high) / 2)
    assert expect.expected(1) == low and expect.expected(1e12) == points[-1][1]

@pytest.mark.parametrize('name', ['quickstart.sh', 'speedrun_cpu.sh'])
def test_flags_of_the_training_do_not_change_what_is_solved_later(name):
    text = (RUNS / name).read_text().replace("\\\n", " ")
    line = next(x for x in text.splitlines() if 'train --data arc1/training' in x and 'echo' not in x)
    first, behind = line.split('"$@"') # the last one of two equal flags counts
    assert '--max_pair' in behind.replace('$SMALL', '--max_pair') and '--out_dir' in behind and '--minutes' in line

@pytest.mark.slow
def test_the_quickstart_says_what_to_expect_here():
    command = [sys.executable, str(RUNS / 'expect.py'), '--minutes=2', '--seed=3']
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCH.parent).stdout
    speed, tokens = re.match(r"([\d,]+) tokens/s here, ([\d.]+)M in 2 minutes: expect \d+ to \d+ of 34", out).groups()
    assert float(tokens) == pytest.approx(120 * int(speed.replace(',', '')) / 1e6, abs=0.06)

@pytest.mark.slow
def test_an_ablation_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(BENCH / 'ablate.py'), 'mdlARC positions', '--seeds', '1', '--minutes', '0.01',
               '--max_pair', '28', '--views', '1', '--out', str(tmp_path)]
    (tmp_path / 'speed.json').write_text('{"default": 0.2}') # as if it had been measured: the arm still is to be
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blind = list(tmp_path.glob('fold*_of_2_*/blind/*.json'))
    assert len(blind) == 16 and 'failed' not in first
    for path in blind:
        assert not any('output' in query for query in json.loads(path.read_text())['test'])
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'done' in first and 'done' not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]
    assert set(json.loads(again.splitlines()[-1])) == {'default', 'mdlARC positions'}

def test_every_arm_of_the_ablation_is_a_model():
    import ablate
    for arm in ablate.ARMS:
        _, model_cfg, data_cfg, inputs, of_model = ablate.configs(arm, Path('fold'))
        ablate.patched(inputs, of_model)(replace(model_cfg, n_task=2))
        assert data_cfg.max_pair == 100

@pytest.mark.parametrize('arm', ['mlp conv', 'open gates'])
def test_an_arm_with_modules_of_its_own_decodes_what_it_trains(toy, arm):
    import ablate
    _, model_cfg, _, inputs, of_model = ablate.configs(arm, Path('fold'))
    torch.manual_seed(0)
    model = ablate.patched(inputs, of_model)(replace(model_cfg, n_task=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) # a gate begins at 0
        twin = copy.deepcopy(model)
        for p in model.parameters(): # a copy knows nothing of it
            p.zero_()
        batch = ArcLoader(ArcDataset(DataConfig(data=toy(n=4)))).next_batch()
        idx, pos, task, dihedral = (x[:1] for x in (batch.idx, batch.pos, batch.task, batch.dihedral))
        want, _ = twin(idx, pos=pos, task=task, dihedral=dihedral)
        begin = int((pos[0, :, 2] == 1).int().argmax()) + 1 # the first call reads the whole prompt
        cache, got = twin.cache(), []
        for part in (slice(begin), slice(begin, begin + 1), slice(begin + 1, None)):
            told = dict(pos=pos[:, part], task=task[:, part], dihedral=dihedral[:, part])
            got.append(twin(idx[:, part], **told, cache=cache)[0])
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-4) and want.std() > 0.1

@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--mixers', 'MA', '--lengths', '64', '--tokens', '128', '--rounds', '1'],
    ['--packed', '--mixers', 'A', 'MS', '--lengths', '256', '--tokens', '512', '--rounds', '2'],
])
def test_the_model_is_measured(tmp_path, flags):
    command = [sys.executable, str(BENCH / 'model.py'), '--sizes', '2x32', '--device', 'cpu', *flags]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OUT': str(tmp_path)})
    assert out.returncode == 0, out.stderr
    mixers = [word for word in flags if word.strip('AMS') == '']
    assert [row['mixer'] for row in json.loads(out.stdout.splitlines()[-1])] == mixers

def test_without_cuda_a_line_says_that_no_gpu_can_be_counted(tmp_path):
    env = {**ENV, 'CUDA_VISIBLE_DEVICES': '', 'OUT': str(tmp_path / 'out')}
    done = subprocess.run(['bash', str(BENCH / 'gpu_static.sh')], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and 'no CUDA here' in done.stderr
    assert not (tmp_path / 'out').exists()

def test_a_product_counts_by_its_arithmetic_or_its_bytes_and_a_view_not_at_all():
    import gpu_static
    small, large = torch.zeros(2, 3), torch.zeros(2048, 2048)
    for x, want in ((small, 4 * (3 * 2 + 2 * 3 + 2 * 2) / 4e12), (large, 2 * 2048 ** 3 / 650e12)):
        with gpu_static.Eager('cpu') as eager:
            x @ x.mT
        assert eager.seconds == pytest.approx(want)
    with gpu_static.Eager('cpu') as eager:
        torch._foreach_add_([small, small], 1.0)
    assert eager.seconds == pytest.approx(2 * 2 * 24 / 4e12) # read and written

# -----------------------------------------------------------------------------
# the leaderboard and the scripts that add to it

BOARD = BENCH.parent / 'dev' / 'LEADERBOARD.md'
RUNS = BENCH.parent / 'runs'
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': PATH}
CPU = "## cpu: the small tasks, 2 cores, 5 minutes"
GPU = "## gpu: all tasks, one card, so many minutes"

def rows_of(board, section):
    """ the rows of a section's table, as lists of cells, its head first """
    text = Path(board).read_text().split(section + "\n")[1].split("\n## ")[0]
    rows = []
    for line in text.splitlines():
        if line.startswith("|") and '---' not in line:
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows

def test_a_row_is_added_where_it_belongs_once(tmp_path):
    import leaderboard
    board = tmp_path / 'board.md'
    board.write_text(BOARD.read_text())
    before, gpu = rows_of(board, leaderboard.CPU), rows_of(board, leaderboard.GPU)
    row = [f"x{k}" for k in range(len(before[0]))]
    for _ in range(2):
        leaderboard.add_row(board, leaderboard.CPU, row)
    assert rows_of(board, leaderboard.CPU) == [*before, row] and rows_of(board, leaderboard.GPU) == gpu
    leaderboard.add_row(board, leaderboard.GPU, ['a|b', *range(len(gpu[0]) - 1)])
    assert rows_of(board, leaderboard.GPU)[-1][0] == 'a/b' and rows_of(board, leaderboard.CPU) == [*before, row]
    for table in (before, gpu):
        assert {len(cells) for cells in table} == {len(table[0])}
    with pytest.raises(ValueError, match="no table of 2 columns"):
        leaderboard.add_row(board, leaderboard.CPU, ['x', 'y'])
    with pytest.raises(ValueError, match="no line '## nowhere'"):
        leaderboard.add_row(board, '## nowhere', row)

def test_the_peak_of_a_card_is_known_by_its_name_or_given():
    import leaderboard
    assert leaderboard.peak_of('NVIDIA H100 80GB HBM3') == 989e12
    assert leaderboard.peak_of('NVIDIA L4') == 121e12
    assert leaderboard.peak_of('NVIDIA L40S', 362) == 362e12
    assert math.isnan(leaderboard.peak_of('AMD EPYC')) # nobody knows

@pytest.mark.slow
def test_flops_a_token_are_those_of_the_batches():
    import leaderboard
    import model as bench
    cfg = DataConfig(data='arc1/training', max_pair=60, batching='pack', block_size=256, batch_tokens=512)
    ds = make_dataset(cfg, 1)
    model = leaderboard.on_meta(ModelConfig(mixer='A', n_layer=1, n_embd=32, frames=''), ds)
    batch = ds.loader(0, 1, 'cpu').next_batch()
    weights = 6 * (12 * 32 * 32 // 3 + 3 * 32 * 80 + 16 * 32) # of a token: qkv and proj, SwiGLU, head
    one = bench.flops(model, batch.doc) / batch.doc.numel()
    assert leaderboard.per_token(model, ds) == pytest.approx(one, rel=0.05) and 0.9 * weights < one < 1.5 * weights

def test_dollars_are_those_of_the_seconds_of_each_stage(tmp_path):
    import leaderboard
    (tmp_path / 'seconds.txt').write_text("start 1\ntrain 200\ntrain 250\nsolve 90\n")
    assert leaderboard.seconds_of(tmp_path) == {'start': 1, 'train': 450, 'solve': 90}

def test_what_to_hope_for_is_read_off_the_curve_of_mdlarc():
    from leaderboard import mdlarc_score
    assert [mdlarc_score(x) for x in (0.125, 0.25, 0.67)] == ['32%', '38%', '44%']
    assert mdlarc_score((0.25 * 0.67) ** 0.5) == '41%' # halfway, by the logarithm
    assert (mdlarc_score(0.1), mdlarc_score(1)) == ('less than 32%', 'more than 44%')

@pytest.mark.slow
@pytest.mark.parametrize('minutes', ['2', '10', '30', '60'])
def test_a_dry_speedrun_says_what_it_will_take(tmp_path, minutes):
    env = {**ENV, 'DRY': '1', 'MINUTES': minutes, 'MFU': '0.3', 'OUT': str(tmp_path / 'out')}
    done = subprocess.run(['bash', str(RUNS / 'speedrun.sh')], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(':', 1) for line in done.stdout.splitlines())
    assert float(said['minutes'].split(':')[0]) == float(minutes)
    assert "mdlARC's curve has" in said['score']
    assert '30%' in said['assumed MFU'] and said['card'].strip().startswith('H100')
    tokens, step = re.match(r" *([\d,]+)M in [\d,]+ steps of ([\d.]+)k", said['tokens']).groups()
    work = float(re.search(r"(\d+) MFLOP a token", said['model'])[1])
    want = 0.75 * 60 * float(minutes) * 0.3 * 989e12 / work / 1e12
    assert float(tokens.replace(',', '')) == pytest.approx(want, rel=0.02) and float(step) > 32
    assert not (tmp_path / 'out').exists()

@pytest.mark.slow
def test_a_speedrun_takes_generated_pairs(tmp_path):
    pair = {'input': [[1]], 'output': [[2]]}
    (tmp_path / '007bbfb7.json').write_text(json.dumps([pair] * 5))
    env = {**ENV, 'DRY': '1', 'MINUTES': '2', 'REARC': str(tmp_path), 'EXTRA_PAIRS': '3'}
    done = subprocess.run(['bash', str(RUNS / 'speedrun.sh')], cwd=tmp_path, capture_output=True, text=True, env=env)
    said = dict(line.split(':', 1) for line in done.stdout.splitlines())
    share, n = re.search(rf"([\d.]+)% {tmp_path}", said['data'])[1], int(re.search(r"(\d+) documents", said['data'])[1])
    assert float(share) == pytest.approx(300 / n, abs=0.05), done.stderr

@pytest.mark.parametrize('trains, want', [
    ("trap '' TERM; exec sleep 60", 75), # in the compiler it does not hear
    ("kill -9 $$", 137), # by whom ever, the time was not over
])
def test_a_slice_that_had_to_be_killed_goes_on(tmp_path, trains, want):
    fake = tmp_path / 'python3'
    fake.write_text(f'#!/bin/sh\ncase "$*" in *"nanoarc train"*) {trains} ;; -c*) exit 0 ;; *) exit 1 ;; esac\n')
    fake.chmod(0o755)
    env = {**ENV, 'PATH': f"{tmp_path}:{ENV['PATH']}", 'SLICE': '2', 'GRACE': '1', 'OUT': str(tmp_path / 'out')}
    done = subprocess.run(['bash', str(RUNS / 'speedrun.sh')], capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == want, done.stderr
    assert ("the same command goes on" in done.stdout) == (want == 75)

# a python of some version on some machine: it answers questions as that one would, and `-m venv` makes another
FAKE = """#!/bin/sh
case $1 in
    -c) exec {real} -c "import platform, sys
sys.version_info, sys.platform, platform.machine = ({version}, 0), '{system}', lambda: '{machine}'
exec(sys.argv[1])" "$2" ;;
    --version) echo "Python {shown}" ;;
    -m) case $2 in
        venv) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "{name}" > .venv/made_by ;;
        pip) echo pip >> .venv/made_by ;;
    esac
esac
"""

def set_up(folder, pythons, **env):
    """ `venv` where the PATH has these: name -> (version, system, machine). -> what was said, who made .venv """
    path = folder / 'bin'
    path.mkdir(parents=True, exist_ok=True)
    for tool in ('cat', 'cksum', 'cp', 'mkdir', 'rm', 'uname'):
        if not (path / tool).exists():
            (path / tool).symlink_to(shutil.which(tool))
    for name in ('pyproject.toml', 'constraints.txt'):
        shutil.copy(RUNS.parent / name, folder)
    for name, (version, system, machine) in pythons.items():
        text = FAKE.format(real=sys.executable, name=name, version=version, shown=version.replace(', ', '.'),
                           system=system, machine=machine)
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    done = subprocess.run([shutil.which('bash'), '-euc', f"source {RUNS / 'venv.sh'}; venv [text]"], cwd=folder,
                          env={'PATH': str(path), **env}, capture_output=True, text=True)
    made_by = folder / '.venv' / 'made_by'
    return done.returncode, done.stderr, made_by.read_text().split() if made_by.exists() else []

LINUX, INTEL, ARM = ('linux', 'x86_64'), ('darwin', 'x86_64'), ('darwin', 'arm64')

@pytest.mark.parametrize('pythons, want', [
    ({'python3': ('3, 12', *LINUX), 'python3.14': ('3, 14', *LINUX)}, 'python3'),
    ({'python3': ('3, 15', *LINUX), 'python3.13': ('3, 13', *LINUX), 'python3.11': ('3, 11', *LINUX)}, 'python3.13'),
    ({'python3': ('3, 9', *LINUX), 'python3.14': ('3, 14', *LINUX)}, 'python3.14'),
    ({'python3.11': ('3, 11', *ARM)}, 'python3.11'),
    ({'python3': ('3, 12', *INTEL), 'python3.12': ('3, 12', *ARM)}, 'python3.12'),
])
def test_a_python_that_pytorch_and_numba_have_wheels_for_is_found_on_the_path(tmp_path, pythons, want):
    code, said, made_by = set_up(tmp_path, pythons)
    assert (code, said, made_by) == (0, '', [want, 'pip'])
    assert set_up(tmp_path, pythons)[2] == [want, 'pip'] # it is there already

@pytest.mark.parametrize('pythons, env, want', [
    ({}, {}, "no python3 on "),
    ({'python3': ('3, 15', *LINUX)}, {}, "Python 3.15 on "),
    ({'python3': ('3, 10', *LINUX), 'python3.9': ('3, 9', *LINUX)}, {}, "Python 3.10 on "),
    ({'python3': ('3, 12', *INTEL), 'python3.11': ('3, 11', *INTEL)}, {}, "Python 3.12 on "),
    ({'python3': ('3, 12', *LINUX), 'mine': ('3, 15', *LINUX)}, {'PYTHON': 'mine'}, "Python 3.15 on "), # as told
])
def test_where_no_python_has_wheels_a_line_says_so_and_nothing_is_built(tmp_path, pythons, env, want):
    code, said, made_by = set_up(tmp_path, pythons, **env)
    assert (code, made_by) == (2, []) and said.count("\n") == 1
    assert want in said and "Python 3.11 to 3.14" in said

def test_a_virtual_environment_of_another_python_is_made_anew(tmp_path):
    set_up(tmp_path, {'python3': ('3, 12', *LINUX)})
    set_up(tmp_path, {'python3': ('3, 15', *LINUX), 'python3.13': ('3, 13', *LINUX)})
    assert (tmp_path / '.venv' / 'made_by').read_text().split()[0] == 'python3' # its own 3.12 will do
    shutil.copy(tmp_path / 'bin' / 'python3', tmp_path / '.venv' / 'bin' / 'python') # 3.15
    (tmp_path / '.venv' / 'nanoarc-is-installed[text]').unlink()
    assert set_up(tmp_path, {})[2] == ['python3.13', 'pip']

def test_the_scripts_and_pip_want_the_same_pythons():
    wanted = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (RUNS.parent / 'pyproject.toml').read_text())
    low, high = wanted.groups()
    text = (RUNS / 'venv.sh').read_text()
    assert f"(3, {low}) <= sys.version_info < (3, {high})" in text
    assert "python3 " + " ".join(f"python3.{k}" for k in range(int(high) - 1, int(low) - 1, -1)) + ";" in text

def start(script, words, cwd, **env):
    """ one of the scripts, in a group of processes of its own """
    return subprocess.Popen(['bash', str(RUNS / script), *words], cwd=cwd, start_new_session=True, env={**ENV, **env},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def wait_for(process, path, pattern):
    """ until there is a file """
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)

@pytest.mark.slow
def test_a_speedrun_that_is_stopped_in_the_middle_is_the_one_that_was_not(tmp_path):
    words = ["a | rehearsal", '--max_pair=60', '--max_iters=150', '--save_every=20', '--n_embd=32', '--head_size=16',
             '--expand=4']
    def run(out, **env):
        return start('speedrun.sh', words, tmp_path, REHEARSAL='1', VIEWS='1', COMMIT='abc', OUT=str(out), **env)
    cut, other = tmp_path / 'cut', tmp_path / 'whole'
    whole = run(other)
    text = whole.communicate()[0]
    assert whole.returncode == 0, text
    process = run(cut, SLICE='1') # over before anything has begun
    assert process.communicate()[0].strip().endswith("the same command goes on") and process.returncode == 75
    process = run(cut)
    wait_for(process, cut, 'ckpt/*.sha256')
    os.killpg(process.pid, signal.SIGTERM) # in the middle of training
    process.communicate()
    assert process.returncode != 0 and not (cut / 'part0').exists()
    process = run(cut, SLICE='500')
    text = process.communicate()[0]
    assert process.returncode == 0 and 'resumed' in text, text
    for name in ('solved/submission.json', 'score.json'):
        assert (cut / name).read_bytes() == (other / name).read_bytes()
    head, cells = rows_of(cut / 'LEADERBOARD.md', GPU)
    row = dict(zip(head, cells, strict=True))
    want = dict(zip(*rows_of(other / 'LEADERBOARD.md', GPU), strict=True))
    for name in ('what changed', 'target', 'score', 'solved', 'val nats', 'tokens', 'model', 'card', 'commit'):
        assert row[name] == want[name]
    assert (row['what changed'], row['target']) == ('a / rehearsal', 'arc1/evaluation')
    assert row['solved'].endswith("of 13") and row['commit'] == 'abc'
    for name in ('minutes', 'dollars', 'val nats'):
        assert re.fullmatch(r"[\d.]+", row[name])
    import leaderboard
    seconds = leaderboard.seconds_of(cut) # of all calls
    assert {'train', 'solve', 'score'} <= seconds.keys() and seconds['train'] > 1
    assert sum(seconds.values()) / 60 == pytest.approx(float(row['minutes']), abs=0.06)
    assert "dollars at 2.00 an hour: " in text and f"train {seconds['train']:.0f} s" in text
    before = (cut / 'LEADERBOARD.md').read_bytes() # once more: it is done
    assert "has this row already" in run(cut).communicate()[0] and (cut / 'LEADERBOARD.md').read_bytes() == before

@pytest.mark.slow
def test_a_row_of_the_cpu_leaderboard_in_two_calls(tmp_path):
    words = ["tiny", '--n_layer=1', '--n_embd=32', '--head_size=16', '--expand=4', '--max_iters=60', '--save_every=10']
    out = tmp_path / 'out'
    def run(*flags):
        return start('speedrun_cpu.sh', [*words, *flags], tmp_path, SEEDS='1 2', SOLVE='--views 2', OUT=str(out))
    process = run()
    wait_for(process, out, '2/ckpt/*.sha256')
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = (out / '1' / 'score.json').stat().st_mtime_ns
    text = run().communicate()[0]
    assert "seed 1 is done" in text and "resumed" in text, text
    assert (out / '1' / 'score.json').stat().st_mtime_ns == first
    head, cells = rows_of(out / 'LEADERBOARD.md', CPU)
    row = dict(zip(head, cells, strict=True))
    solved = [int(x) for x in row['each'].split()]
    assert row['what changed'] == 'tiny' and len(solved) == 2
    assert float(cells[2]) == pytest.approx(sum(solved) / 2)
    assert "was begun otherwise" in run('--lr=1e-3').communicate()[0]
    assert len(rows_of(out / 'LEADERBOARD.md', CPU)) == 2

def test_every_planted_bug_has_its_line_and_its_test():
    import controls
    for name, file, line, bug, test in controls.CONTROLS:
        text = (BENCH.parent / 'nanoarc' / file).read_text()
        path, _, function = test.partition('::')
        function = function.partition('[')[0]
        assert text.count(line) == 1 and line != bug, f"{name}: {file} has this line {text.count(line)} times: {line}"
        tests = (BENCH.parent / 'tests' / path).read_text()
        assert not function or f"def {function}(" in tests, f"{name}: no {test}"
