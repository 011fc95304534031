#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/diagnostics/run_14b_to_4b_fixed_context_300.sh" "$@"
