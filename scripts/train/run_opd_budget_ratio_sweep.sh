#!/usr/bin/env bash
# Budgets side by side: every mask:ratio entry of RUN_LIST is trained, scored on frozen contexts and put into one summary.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/suite.sh
source "$TA_OPD_ROOT/scripts/lib/suite.sh"

about "Budgets side by side: every mask:ratio entry of RUN_LIST is trained, scored on frozen contexts and put into one summary. \
Finished runs are skipped, so the same command goes on where it was stopped."
suite_main RUN_LIST \
  "dlearn_high:0.01:10 dlearn_high:0.05:20 dlearn_high:0.10:30 q3_highc:0.01:40 q3_highc:0.05:50" \
  "mask:ratio:index entries, comma or space separated; the index only orders ports that you fix" \
  budget_ratio_sweep_k16_seed1_20260512 "$@"
