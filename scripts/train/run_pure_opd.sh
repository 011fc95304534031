#!/usr/bin/env bash
# Full OPD: every valid response token is a direct target.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Full OPD: every valid response token is a direct target."
METHOD_NAME=pure_opd
fixed OPD_BUDGET_MASK full
# shellcheck disable=SC2034  # whatever the environment says: all tokens
OPD_BUDGET_RATIO=1.0
preset OPD_BUDGET_RATIO 1.0
opd_run "$@"
