#!/usr/bin/env bash
# Fixed-context diagnostic: Qwen3-8B teaches Qwen3-1.7B.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/diagnostics.sh
source "$TA_OPD_ROOT/scripts/lib/diagnostics.sh"

about "Fixed-context diagnostic: Qwen3-8B teaches Qwen3-1.7B."
preset SUMMARY_NAME diag300_summary.md
diagnostic_run 8b_to_1p7b_diag300 8317 0.62 "$@"
