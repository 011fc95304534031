#!/usr/bin/env bash
# TA-OPD + Entropy: soft-OR of student entropy and learnable disagreement.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "TA-OPD + Entropy: soft-OR of student entropy and learnable disagreement."
METHOD_NAME=teachability_entropy
fixed OPD_BUDGET_MASK ca_softor
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
