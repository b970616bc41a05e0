#!/usr/bin/env bash
# HellaSwag on a real model: SmolLM2-135M-Instruct, 4 bits, which a package of 98 MB ships as a .gguf, on the first 300
# items.
# hardware: 2 cpu cores. minutes: 2. dollars: 0. expect: acc 0.35, acc_norm 0.36, of 300 items to 0.03. with
# "activity label: " before each context, as most evaluations have it, 0.38 and 0.41; published for the base model, not
# quantized, on all items: 0.42
# another model: MODEL=out/run bash runs/hellaswag.sh, or MODEL=HuggingFaceTB/SmolLM2-135M. all items: LIMIT=0
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
venv "[text,finetune]"
FILE=${FILE:-${NANOARC_TEST_DATA:-data}/hellaswag_val_2000.jsonl}
if [ ! -f "$FILE" ]; then
    echo "no $FILE: set FILE, to hellaswag_val.jsonl of github.com/rowanz/hellaswag for one" >&2
    exit 2
fi
MODEL=${MODEL:-$(smollm2)}
nanoarc text hellaswag --model "$MODEL" --file "$FILE" --limit "${LIMIT:-300}"
