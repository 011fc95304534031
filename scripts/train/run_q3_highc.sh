#!/usr/bin/env bash
# Q3 with high compatibility.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Q3 with high compatibility."
METHOD_NAME=q3_highc
fixed OPD_BUDGET_MASK q3_highc
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
