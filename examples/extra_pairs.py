"""
more pairs of a rule, for --extra: 1,000 for the task 67a3c6ac, whose rule is a mirror. write a generator like this one
for a task of your own, or for several, a file each.

    python examples/extra_pairs.py
    nanoarc train --data arc1/training --extra extra --extra_pairs 100
"""
import json
import random
from pathlib import Path

def make_pair(rng):
    """ -> an input and its output, as RE-ARC has them """
    height, width = rng.randint(2, 9), rng.randint(2, 9)
    x = [[rng.randint(0, 9) for _ in range(width)] for _ in range(height)]
    return {'input': x, 'output': [row[::-1] for row in x]}

def main():
    rng = random.Random(1337)
    Path('extra').mkdir(exist_ok=True)
    pairs = [make_pair(rng) for _ in range(1000)]
    Path('extra/67a3c6ac.json').write_text(json.dumps(pairs)) # the file has the name of the task

if __name__ == '__main__':
    main()
