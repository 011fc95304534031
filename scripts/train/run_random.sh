#!/usr/bin/env bash
# Random: the same budget, drawn at random.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Random: the same budget, drawn at random."
METHOD_NAME=random
fixed OPD_BUDGET_MASK random
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
