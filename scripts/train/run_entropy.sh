#!/usr/bin/env bash
# Entropy-only: keep the tokens where the student is least certain.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Entropy-only: keep the tokens where the student is least certain."
METHOD_NAME=entropy
fixed OPD_BUDGET_MASK entropy
preset OPD_BUDGET_RATIO 0.10
opd_run "$@"
