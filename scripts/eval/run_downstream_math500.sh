#!/usr/bin/env bash
# MATH-500, zero-shot, answers checked by math-verify.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "MATH-500, zero-shot, answers checked by math-verify."
EVAL_NAME=downstream_math500
preset TASKS minerva_math500
preset NUM_FEWSHOT 0
preset MAX_GEN_TOKS 4096
eval_run "$@"
