#!/usr/bin/env bash
# One on-policy distillation run: reads the variables, checks them, calls train.py.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "One on-policy distillation run."
opd_run "$@"
