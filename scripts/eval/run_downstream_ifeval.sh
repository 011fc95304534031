#!/usr/bin/env bash
# IFEval, strict accuracy by prompt.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "IFEval, strict accuracy by prompt."
EVAL_NAME=downstream_ifeval
preset TASKS ifeval
eval_run "$@"
