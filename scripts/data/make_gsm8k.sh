#!/usr/bin/env bash
# GSM8K (training split) as a prompt file: the question, and the final number as label.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/data.sh
source "$TA_OPD_ROOT/scripts/lib/data.sh"

about "GSM8K (training split) as a prompt file: the question, and the final number as label."
DATA_FILE=gsm8k.jsonl
data_run gsm8k "$@"
