#!/usr/bin/env bash
# Fixed-context diagnostic: Qwen3-8B teaches Qwen3-4B.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/diagnostics.sh
source "$TA_OPD_ROOT/scripts/lib/diagnostics.sh"

about "Fixed-context diagnostic: Qwen3-8B teaches Qwen3-4B."
preset SUMMARY_NAME diag300_summary.md
diagnostic_run 8b_to_4b_diag300 84317 0.62 "$@"
