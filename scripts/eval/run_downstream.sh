#!/usr/bin/env bash
# lm-evaluation-harness on checkpoints or running SGLang servers: any TASKS, with seeds, summary and difference to BASE.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "lm-evaluation-harness on checkpoints or running SGLang servers: any TASKS, with seeds, summary and difference to BASE."
EVAL_NAME=downstream
eval_run "$@"
