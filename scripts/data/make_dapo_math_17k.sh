#!/usr/bin/env bash
# DAPO-Math-17k as a prompt file: one line a problem, its answer as label, duplicates removed.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/data.sh
source "$TA_OPD_ROOT/scripts/lib/data.sh"

about "DAPO-Math-17k as a prompt file: one line a problem, its answer as label, duplicates removed."
DATA_FILE=dapo_math_17k_dedup_slime.jsonl
data_run dapo "$@"
