#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/diagnostics/run_14b_to_1p7b_retopk_8_32.sh" "$@"
