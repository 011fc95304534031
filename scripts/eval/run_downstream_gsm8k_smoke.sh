#!/usr/bin/env bash
# GSM8K with chain of thought, the first 200 questions.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "GSM8K with chain of thought, the first 200 questions."
EVAL_NAME=downstream_gsm8k_smoke
preset TASKS gsm8k_cot
preset BATCH_SIZE 8
preset LIMIT 200
preset TIMEOUT 75m
eval_run "$@"
