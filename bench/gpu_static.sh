#!/usr/bin/env bash
# what a training step asks of a gpu, counted, not timed: `A` and `MA` at 8x512 and 8x768, 32,768 tokens a step on packed
# rows of 4096. wants a torch with CUDA, and a card or a stand-in for its libraries (LD_PRELOAD), see bench/gpu_static.py;
# without them a line says so, exit code 2. hardware: anything with 24 GB of memory. minutes: 2 a model, of compiling
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/gpu_static} PYTHONPATH=.
for size in ${SIZES:-8x512 8x768}; do
    for mixer in ${MIXERS:-A MA}; do
        python3 bench/gpu_static.py --size "$size" --mixer "$mixer"
    done
done
python3 bench/gpu_static.py --table
