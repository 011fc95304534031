#!/usr/bin/env bash
# Compatibility-only: keep the tokens where the teacher mass on the student support is largest.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Compatibility-only: keep the tokens where the teacher mass on the student support is largest."
METHOD_NAME=compatibility
fixed OPD_BUDGET_MASK compatibility
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
