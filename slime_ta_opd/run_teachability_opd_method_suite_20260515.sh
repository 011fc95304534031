#!/usr/bin/env bash
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/train/run_teachability_opd_method_suite.sh" "$@"
