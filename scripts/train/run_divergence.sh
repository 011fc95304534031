#!/usr/bin/env bash
# High divergence: keep the tokens with the largest raw divergence.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "High divergence: keep the tokens with the largest raw divergence."
METHOD_NAME=divergence
fixed OPD_BUDGET_MASK divergence
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
