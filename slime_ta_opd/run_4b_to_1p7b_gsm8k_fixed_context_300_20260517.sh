#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/diagnostics/run_4b_to_1p7b_gsm8k_fixed_context_300.sh" "$@"
