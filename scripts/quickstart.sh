#!/usr/bin/env bash
# A whole on-policy distillation on this machine's CPU: sets up .venv where needed, makes a task and two tiny models, runs
# full OPD and three token selectors, and prints where the report is. Options: bash scripts/quickstart.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$root/.venv/bin/python" "$root/slime_ta_opd/examples/quickstart/run.py" "$@"
