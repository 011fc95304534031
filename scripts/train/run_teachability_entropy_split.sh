#!/usr/bin/env bash
# TA-OPD + Entropy by a split budget: OPD_BUDGET_GAMMA of it by entropy, the rest confident and learnable.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "TA-OPD + Entropy by a split budget: OPD_BUDGET_GAMMA of it by entropy, the rest confident and learnable."
METHOD_NAME=teachability_entropy_split
fixed OPD_BUDGET_MASK split_budget_ca
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
