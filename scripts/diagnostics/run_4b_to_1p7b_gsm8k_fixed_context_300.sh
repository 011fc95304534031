#!/usr/bin/env bash
# Fixed-context diagnostic: Qwen3-4B teaches Qwen3-1.7B on GSM8K prompts.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/diagnostics.sh
source "$TA_OPD_ROOT/scripts/lib/diagnostics.sh"

about "Fixed-context diagnostic: Qwen3-4B teaches Qwen3-1.7B on GSM8K prompts."
preset SUMMARY_NAME gsm8k300_summary.md
preset SOURCE_KIND lm_eval_log
vars_own() { var GSM8K_SOURCE_JSONL file? "" "sample log of the harness on GSM8K; another name of SOURCE_DATA"; }
diagnostic_run gsm8k_4b_to_1p7b_300 41731 0.54 "$@"
