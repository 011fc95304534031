#!/usr/bin/env bash
# Qwen3-1.7B learns from a Qwen3-4B SGLang teacher on sampled tokens.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/lib/run.sh"

about "Qwen3-1.7B learns from a Qwen3-4B SGLang teacher on sampled tokens. Any other student and teacher work as well: shapes come from their config files."
preset RUN_NAME "qwen3_1_7b_student_qwen3_4b_teacher_sampled_opd_\$TIMESTAMP"
preset OPD_TOKEN_BANK_PAIR_ID qwen3_4b_to_qwen3_1p7b
opd_run "$@"
