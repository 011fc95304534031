#!/usr/bin/env bash
# GPQA-Diamond with chain of thought, zero-shot (gated data: needs an accepted licence or LOCAL_DATASETS).
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "GPQA-Diamond with chain of thought, zero-shot (gated data: needs an accepted licence or LOCAL_DATASETS)."
EVAL_NAME=downstream_gpqa_diamond
preset TASKS gpqa_diamond_cot_zeroshot
preset MAX_GEN_TOKS 4096
eval_run "$@"
