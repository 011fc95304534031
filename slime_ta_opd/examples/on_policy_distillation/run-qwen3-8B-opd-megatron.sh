#!/usr/bin/env bash
# Qwen3-8B learns from a teacher that runs inside Megatron (OPD_TEACHER_LOAD), on eight GPUs.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/lib/run.sh"

about "Qwen3-8B learns from a teacher that runs inside Megatron (OPD_TEACHER_LOAD), on eight GPUs. Any other student and teacher work as well: shapes come from their config files."
preset RUN_NAME "qwen3_8b_opd_megatron_\$TIMESTAMP"
preset OPD_TYPE megatron
preset RAY_GPUS 0,1,2,3,4,5,6,7
preset ACTOR_NUM_GPUS_PER_NODE 4
preset ROLLOUT_NUM_GPUS 4
preset TENSOR_MODEL_PARALLEL_SIZE 2
preset SEQUENCE_PARALLEL 1
preset USE_DISTRIBUTED_OPTIMIZER 1
preset ROLLOUT_MEM_FRACTION 0.7
opd_run "$@"
