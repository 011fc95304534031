#!/usr/bin/env bash
# TIP-style: soft-OR of student entropy and raw divergence.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "TIP-style: soft-OR of student entropy and raw divergence."
METHOD_NAME=tip
fixed OPD_BUDGET_MASK tip
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
