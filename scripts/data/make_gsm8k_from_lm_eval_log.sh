#!/usr/bin/env bash
# GSM8K prompts as the harness showed them, from its sample log.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/data.sh
source "$TA_OPD_ROOT/scripts/lib/data.sh"

about "GSM8K prompts as the harness showed them, from its sample log."
DATA_FILE=gsm8k_lm_eval.jsonl
data_run lm_eval_log "$@"
