#!/usr/bin/env bash
# AIME 2024 and 2025 with answers as long as the task allows (32768 tokens; the model's context must be longer).
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "AIME 2024 and 2025 with answers as long as the task allows (32768 tokens; the model's context must be longer)."
EVAL_NAME=downstream_aime_uncapped
preset TASKS aime24,aime25
preset BATCH_SIZE 1
eval_run "$@"
