#!/usr/bin/env bash
# AIME 2024 and 2025 with answers of at most 4096 tokens.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "AIME 2024 and 2025 with answers of at most 4096 tokens."
EVAL_NAME=downstream_aime_capped
preset TASKS aime24,aime25
preset MAX_GEN_TOKS 4096
preset BATCH_SIZE 1
preset TIMEOUT 240m
eval_run "$@"
