"""
what may one expect of the quickstart on this machine? trains 60 steps of it, which are thrown away, for the tokens/s.
what so many tokens solved of the 34 tasks was measured elsewhere, dev/LOG.md says how.

usage: python runs/expect.py [--minutes 5] [--flags="--focus=0.3"] [other flags of the training, not looked at]
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
# of 1, 2, 2, 5, 1 runs of the quickstart on a cpu without bf16, whose --flags are those of fast in runs/venv.sh
SOLVED = {470_000: 0, 1_110_000: 3, 5_140_000: 17, 8_390_000: 18.6, 24_660_000: 19}
# of 2, 1, 6, 12, 10, 1 runs of the plain default, without --flags
PLAIN = {950_000: 0.5, 2_500_000: 9, 5_100_000: 14.5, 6_750_000: 16.8, 8_620_000: 19.5, 26_200_000: 26}
SEEDS = 2 # tasks that a run is above or below it, by its seed alone

def tokens_per_second(flags):
    """ of a short training of the quickstart's tasks """
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / 'speed'
        command = [sys.executable, '-m', 'nanoarc', 'train', '--data=arc1/training', '--adapt=arc1/evaluation*8',
                   '--max_pair=100', '--max_iters=60', '--log_every=10', '--eval_every=0', '--draw_every=0',
                   f'--out_dir={out_dir}', *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        speeds = [row['tok_s'] for row in run.read_metrics(out_dir) if 'tok_s' in row]
    return median(speeds[1:]) # the first step warms up

def expected(tokens, table):
    """ tasks solved of 34 by a training of so many tokens, between two measured ones by the logarithm of tokens """
    return float(np.interp(np.log(tokens), np.log(list(table)), list(table.values())))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=5.0)
    parser.add_argument('--flags', default='', help="of the training, as the quickstart's")
    args, _ = parser.parse_known_args()
    speed = tokens_per_second(args.flags.split())
    tokens = 60 * args.minutes * speed
    table = SOLVED if args.flags else PLAIN
    solved = round(expected(tokens, table))
    print(f"{speed:,.0f} tokens/s here, {tokens / 1e6:.1f}M in {args.minutes:g} minutes: "
          f"expect {max(solved - SEEDS, 0)} to {solved + SEEDS} of 34 solved by these settings")
    measured = ", ".join(f"{tokens / 1e6:.3g}M {solved:g}" for tokens, solved in table.items())
    print(f"(tokens and what they solved elsewhere: {measured})")

if __name__ == '__main__':
    main()
