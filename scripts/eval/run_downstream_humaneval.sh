#!/usr/bin/env bash
# HumanEval for chat models; runs code written by the model (ALLOW_CODE=1).
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "HumanEval for chat models; runs code written by the model (ALLOW_CODE=1)."
EVAL_NAME=downstream_humaneval
preset TASKS humaneval_instruct
eval_run "$@"
