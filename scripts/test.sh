#!/usr/bin/env bash
# Sets up .venv where needed and runs the tests. Arguments go to pytest: bash scripts/test.sh -m "not e2e".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
