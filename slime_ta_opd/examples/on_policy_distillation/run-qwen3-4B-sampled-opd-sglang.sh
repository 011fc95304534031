#!/usr/bin/env bash
# Qwen3-4B learns from a larger Qwen3 SGLang teacher on sampled tokens.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/lib/run.sh"

about "Qwen3-4B learns from a larger Qwen3 SGLang teacher on sampled tokens. Any other student and teacher work as well: shapes come from their config files."
preset RUN_NAME "qwen3_4b_student_sampled_opd_\$TIMESTAMP"
preset OPD_TOKEN_BANK_PAIR_ID qwen3_teacher_to_qwen3_4b
opd_run "$@"
