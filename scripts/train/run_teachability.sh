#!/usr/bin/env bash
# TA-OPD: keep the tokens with the most learnable disagreement.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "TA-OPD: keep the tokens with the most learnable disagreement."
METHOD_NAME=teachability
fixed OPD_BUDGET_MASK dlearn_high
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
