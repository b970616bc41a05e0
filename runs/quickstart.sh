#!/usr/bin/env bash
# the main job, end to end: set up, train on the small tasks of ARC-AGI-1 (every demo at most 100 tokens: 81 training
# and 34 evaluation tasks, of the latter the demos alone), solve the 34 with two attempts each, score.
# hardware: a laptop, 2 cpu cores. minutes: 6, of which 5 are training. dollars: 0. expect: about 24 of 34 solved
# words are passed to the training: bash runs/quickstart.sh --seed=1. two stay as they are: --max_pair, and --out_dir,
# which is OUT=out/mine bash runs/quickstart.sh. run again after an interruption, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
venv ""
SECONDS=0
OUT=${OUT:-out/quickstart}
SMALL="--max_pair=100"
if began "$OUT"; then
    nanoarc train --resume "$OUT" "$@"
else
    echo "== how fast is this machine?"
    python runs/expect.py "$@" || true
    echo "== training into $OUT, 5 minutes unless --minutes says another number"
    nanoarc train --data arc1/training --adapt 'arc1/evaluation*8' --minutes 5 "$@" $SMALL --out_dir "$OUT"
fi
echo "== solving 34 evaluation tasks, answers unseen"
nanoarc solve --run "$OUT" --data arc1/evaluation $SMALL
echo "== scoring"
nanoarc score "$OUT/submission.json" arc1/evaluation $SMALL | tee "$OUT/score.txt" | sed '$d'
nanoarc view $(python -c "import json; print(*list(json.load(open('$OUT/submission.json')))[:8])") \
    --data arc1/evaluation --submission "$OUT/submission.json" --out "$OUT/tasks.png" > /dev/null
echo "pictures: $OUT/tasks.png $OUT/loss.png"
echo "next: nanoarc view 66e6c45b --submission $OUT/submission.json,"
echo "or nanoarc train --minutes 10 --max_pair 100 --adapt 'arc1/evaluation*8' --out_dir out/longer"
python - "$OUT" $SECONDS <<'EOF'
import json, sys
from nanoarc import checkpoint
score = json.loads(open(f"{sys.argv[1]}/score.txt").read().splitlines()[-1])
meta = checkpoint.load(sys.argv[1])[1]
keys = 'solved', 'tasks', 'outputs', 'score'
val = meta['val_loss'] # None where nothing was held out
print(json.dumps({**{key: score[key] for key in keys}, 'val_nats': val and round(val, 4), 'tokens': meta['tokens'],
                  'train_seconds': round(meta['seconds']), 'total_seconds': int(sys.argv[2])}))
EOF
