#!/usr/bin/env bash
# Sets up .venv where needed, lints, and runs the tests: first those that stay in their own process, TEST_PROCESSES files at a time
# (default 2), then one after another those that start servers and Ray. Arguments go to pytest; with any that chooses tests, all run in one
# process: bash scripts/test.sh -m "not e2e", bash scripts/test.sh tests/ta_opd
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
.venv/bin/ruff check .
pytest=(.venv/bin/python -m pytest)
for argument in "$@"; do
  case $argument in
    --durations=* | --tb=* | --color=* | -q | -v | -x) ;;
    *) exec "${pytest[@]}" "$@" ;;
  esac
done
status=0
"${pytest[@]}" -m "not e2e" -n "${TEST_PROCESSES:-2}" --dist loadfile "$@" || status=$?
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.e2e' tests | grep -v '^tests/e2e/' | sort) # only these are imported again
"${pytest[@]}" -m e2e tests/e2e "${files[@]}" "$@" || status=$?
exit "$status"
