#!/usr/bin/env bash
# GSM8K with chain of thought, all questions.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "GSM8K with chain of thought, all questions."
EVAL_NAME=downstream_gsm8k_full
preset TASKS gsm8k_cot
preset BATCH_SIZE 8
preset TIMEOUT 150m
eval_run "$@"
