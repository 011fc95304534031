#!/usr/bin/env bash
# Q3-only: low entropy and high divergence.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Q3-only: low entropy and high divergence."
METHOD_NAME=q3
fixed OPD_BUDGET_MASK q3
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
