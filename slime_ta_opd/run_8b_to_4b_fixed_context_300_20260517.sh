#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/diagnostics/run_8b_to_4b_fixed_context_300.sh" "$@"
