#!/usr/bin/env bash
# Any data set with strings or chat messages as a prompt file.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/data.sh
source "$TA_OPD_ROOT/scripts/lib/data.sh"

about "Any data set with strings or chat messages as a prompt file."
DATA_FILE=prompts.jsonl
data_run chat "$@"
