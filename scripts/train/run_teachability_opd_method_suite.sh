#!/usr/bin/env bash
# Methods side by side: every entry of METHOD_LIST is trained, scored on frozen contexts and put into one summary.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/suite.sh
source "$TA_OPD_ROOT/scripts/lib/suite.sh"

about "Methods side by side: every entry of METHOD_LIST is trained, scored on frozen contexts and put into one summary. \
Finished runs are skipped, so the same command goes on where it was stopped."
suite_main METHOD_LIST \
  "pure_opd:1.0:10 teachability:0.10:20 entropy:0.10:30 teachability_entropy:0.10:40 tip:0.10:50" \
  "method:ratio:index entries, comma or space separated; the index only orders ports that you fix" \
  teachability_method_suite_k16_seed1_20260515 "$@"
