"""
what may one expect of the quickstart on this machine? trains 60 steps of it, which are thrown away, for the tokens/s.
what so many tokens solved of the 34 tasks was measured elsewhere, dev/LOG.md says how.

usage: python runs/expect.py [--minutes 5] [other flags of the training, not looked at]
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from nanoarc import run

# tokens of a whole training -> tasks solved of 34, of finished runs, whose learning rate went down to its end
# means of 1, 3, 5, 3, 12 and 1 runs. the twelve are two of 4.4M tokens, 25 each, and ten of 8M, whose mean is 24.6
SOLVED = {390_000: 0, 810_000: 3.3, 1_680_000: 12.2, 3_290_000: 22, 4_400_000: 24.7, 20_900_000: 25}
SEEDS = 2 # tasks that a run is above or below it, by its seed alone

def tokens_per_second():
    """ of a short training of the quickstart's tasks """
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / 'speed'
        command = [sys.executable, '-m', 'nanoarc', 'train', '--data=arc1/training', '--adapt=arc1/evaluation*8',
                   '--max_pair=100', '--max_iters=60', '--log_every=10', '--eval_every=0', '--draw_every=0',
                   f'--out_dir={out_dir}']
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        speeds = [row['tok_s'] for row in run.read_metrics(out_dir) if 'tok_s' in row]
    return median(speeds[1:]) # the first step warms up

def expected(tokens):
    """ tasks solved of 34 by a training of so many tokens, between two measured ones by the logarithm of tokens """
    return float(np.interp(np.log(tokens), np.log(list(SOLVED)), list(SOLVED.values())))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=5.0)
    args, _ = parser.parse_known_args()
    speed = tokens_per_second()
    tokens = 60 * args.minutes * speed
    solved = round(expected(tokens))
    print(f"{speed:,.0f} tokens/s here, {tokens / 1e6:.1f}M in {args.minutes:g} minutes: "
          f"expect {max(solved - SEEDS, 0)} to {solved + SEEDS} of 34 solved by these settings")
    measured = ", ".join(f"{tokens / 1e6:.3g}M {solved:g}" for tokens, solved in SOLVED.items())
    print(f"(tokens and what they solved elsewhere: {measured})")

if __name__ == '__main__':
    main()
