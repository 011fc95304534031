#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/train/run_opd_budget_ratio_sweep.sh" "$@"
