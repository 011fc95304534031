#!/usr/bin/env bash
# Fixed-context diagnostic: Qwen3-4B teaches Qwen3-1.7B, 300 held-out mathematics prompts.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/diagnostics.sh
source "$TA_OPD_ROOT/scripts/lib/diagnostics.sh"

about "Fixed-context diagnostic: Qwen3-4B teaches Qwen3-1.7B, 300 held-out mathematics prompts."
preset HELDOUT_SAMPLES 400
preset SUMMARY_NAME heldout300_summary.md
diagnostic_run heldout_4b_to_1p7b_300 41717 0.54 "$@"
