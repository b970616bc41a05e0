"""
how fast is training on a machine that has something else to do? the quickstart's model is trained for some steps alone
and beside one busy process, with each setting of the threads of OpenMP in turn. idle threads wait for the next piece of
work: how long they spin before they sleep is the question.

usage: python bench/busy.py [SETTING ...] [--rounds 5] [--steps 60]. all settings take 15 minutes. last line: json
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from nanoarc.run import read_metrics

# environment of a training, and ranks of one thread each where there are several. nanoarc sets what is not set here
SETTINGS = {
    'nanoarc': {},
    'gcc': {'GOMP_SPINCOUNT': '300000'}, # what OpenMP of gcc does by itself
    'spin 100,000': {'GOMP_SPINCOUNT': '100000'},
    'spin 30,000': {'GOMP_SPINCOUNT': '30000'},
    'spin 10,000': {'GOMP_SPINCOUNT': '10000'},
    'spin 5,000': {'GOMP_SPINCOUNT': '5000'},
    'spin 3,000': {'GOMP_SPINCOUNT': '3000'},
    'spin 2,000': {'GOMP_SPINCOUNT': '2000'},
    'spin 1,000': {'GOMP_SPINCOUNT': '1000'},
    'passive': {'OMP_WAIT_POLICY': 'PASSIVE'},
    'one thread': {'OMP_NUM_THREADS': '1'},
    'two ranks': {'OMP_NUM_THREADS': '1', 'RANKS': '2'},
}
FLAGS = ['--data', 'arc1/training', '--adapt', 'arc1/evaluation*8', '--max_pair', '100', '--minutes', '0',
         '--eval_every', '0', '--save_every', '0', '--draw_every', '0', '--val_tasks', '0']

def tokens_a_second(env, steps, out_dir):
    """ of the second half of a short training """
    ranks = int(env.get('RANKS', 1))
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    command += ['-m', 'nanoarc', 'train', *FLAGS, '--max_iters', str(steps), '--log_every', str(steps // 2),
                '--out_dir', str(out_dir)]
    clean = {name: x for name, x in os.environ.items() if not name.startswith(('OMP_', 'GOMP_'))}
    subprocess.run(command, env={**clean, **env}, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(out_dir)[-1]['tok_s']

def main(names, rounds, steps):
    found = {name: ([], []) for name in names} # alone, and beside a busy process
    with tempfile.TemporaryDirectory() as temp:
        for k in range(rounds):
            for name in names:
                for busy in (0, 1):
                    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
                    try:
                        speed = tokens_a_second(SETTINGS[name], steps, Path(temp) / f"{k} {name} {busy}")
                    finally:
                        for other in others:
                            other.kill()
                    found[name][busy].append(speed)
                a, b = found[name][0][-1], found[name][1][-1]
                print(f"round {k + 1}, {name}: {a:,.0f} alone, {b:,.0f} beside another", file=sys.stderr, flush=True)
    first = None
    print("| threads | alone, tokens / s | beside a busy process | of its own | of the first setting alone |")
    print("|---|---|---|---|---|")
    rows = {}
    for name, (alone, beside) in found.items():
        a, b = median(alone), median(beside)
        first = first or a
        rows[name] = {'alone': round(a), 'beside': round(b)}
        print(f"| {name} | {a:,.0f} | {b:,.0f} | {b / a:.0%} | {a / first:.0%} |")
    print(json.dumps(rows))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', default=list(SETTINGS))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=60)
    args = parser.parse_args()
    main(args.names, args.rounds, args.steps)
