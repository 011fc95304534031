#!/usr/bin/env bash
# The hard half of MATH, by subject.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "The hard half of MATH, by subject."
EVAL_NAME=downstream_math_hard
preset TASKS leaderboard_math_hard
preset BATCH_SIZE 4
preset TIMEOUT 360m
if [[ -n ${TASK-} ]]; then preset TASKS "$TASK"; fi # the released name
eval_run "$@"
