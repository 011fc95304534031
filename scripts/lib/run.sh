# shellcheck shell=bash
# What every launcher does with its variables: choose Python, print or run a command, place devices, call train.py.
# Sourcing this file sets TA_OPD_ROOT, LAUNCHER_NAME and TIMESTAMP.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then # empty arrays under set -u, associative arrays
  printf 'error: bash %s: expected bash 4.4 or newer (on macOS: brew install bash, then call it by its path)\n' "$BASH_VERSION" >&2
  exit 2
fi
set -euo pipefail
TA_OPD_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
LAUNCHER_NAME=${0##*/}
TIMESTAMP=${TIMESTAMP:-$(date +%Y%m%d_%H%M%S)}
FLAGS=()
LAUNCH_ENV=()
# shellcheck source=scripts/lib/vars.sh
source "$TA_OPD_ROOT/scripts/lib/vars.sh"
# shellcheck source=scripts/lib/train_vars.sh
source "$TA_OPD_ROOT/scripts/lib/train_vars.sh"

use_conda() {
  if [[ -z ${CONDA_SH-} ]]; then return; fi
  set +eu # hooks of conda packages read unset variables
  # shellcheck disable=SC1090
  source "$CONDA_SH"
  if ! conda activate "$CONDA_ENV"; then die "CONDA_ENV=$CONDA_ENV: conda could not activate it"; fi
  set -eu
}

use_python() { # PY, PYTHONPATH
  if [[ -z ${PY-} ]]; then
    if [[ -z ${CONDA_SH-} && -x $TA_OPD_ROOT/.venv/bin/python ]]; then PY=$TA_OPD_ROOT/.venv/bin/python; else PY=python3; fi
  fi
  if ! command -v "$PY" >/dev/null; then die "PY=$PY: expected a Python that can be run (bash scripts/setup.sh makes one)"; fi
  local path=$TA_OPD_ROOT:$TA_OPD_ROOT/slime_ta_opd
  if [[ -n ${MEGATRON_LM_DIR-} ]]; then path=$MEGATRON_LM_DIR:$path; fi
  PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
  if [[ -n ${FALLBACK_SITE_PACKAGES-} ]]; then PYTHONPATH+=:$FALLBACK_SITE_PACKAGES; fi
  export PY PYTHONPATH
}

show_command() { # one flag a line, quoted for the shell
  local word line="" out=""
  for word in "$@"; do
    printf -v word '%q' "$word"
    if [[ $word == --* && -n $line ]]; then
      out+="$line \\"$'\n'"  "
      line=$word
    else
      line+=${line:+ }$word
    fi
  done
  printf '%s%s\n' "$out" "$line"
}

run_or_show() { # the one place where DRY_RUN is decided
  if [[ ${DRY_RUN:-0} == 0 ]]; then
    "$@"
  else
    show_command "$@"
  fi
}

# ---------------------------------------------------------------------------------------------------- devices

_union() { # REPLY = ids of $1, then those of $2 that are not in it
  local -a extra
  local id
  REPLY=$1
  IFS=, read -ra extra <<<"$2"
  for id in "${extra[@]}"; do
    if [[ ,$REPLY, != *",$id,"* ]]; then REPLY+=,$id; fi
  done
}

_count() { # REPLY = number of ids
  local -a ids
  IFS=, read -ra ids <<<"$1"
  REPLY=${#ids[@]}
}

resolve_device() { # DEVICE auto -> gpu or cpu
  if [[ $DEVICE == auto ]]; then
    DEVICE=cpu
    if [[ -n ${RAY_ADDRESS-} ]] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then DEVICE=gpu; fi
  fi
}

check_ray_address() { # a form that can be joined and, where something will be started, a host that answers
  local place=${RAY_ADDRESS#http*://}
  local forms="host:port of a cluster's head, auto, or http://host:port of its job server"
  case $RAY_ADDRESS in
    "" | auto | local) return ;;
    ray://*) bad RAY_ADDRESS "$forms (Ray Client, ray://, cannot hold a driver)" && return ;;
  esac
  place=${place%%/*}
  if [[ $RAY_ADDRESS == http*://?* && $place != *:* ]]; then return; fi # a server behind a name of its own
  if [[ ! $place =~ ^[][A-Za-z0-9._:-]+:[0-9]+$ ]]; then
    bad RAY_ADDRESS "$forms"
  elif [[ $DRY_RUN == 0 ]] && ! timeout 5 bash -c "exec 3<>/dev/tcp/${place%:*}/${place##*:}" 2>/dev/null; then
    bad RAY_ADDRESS "$forms, but nothing answers there (ray start --head starts a cluster; empty: a Ray of this run alone)"
  fi
}

check_teacher_gpus() { # whole servers; on a cluster one is there whatever TEACHER_GPU says
  _count "$TEACHER_GPU"
  if [[ -n $RAY_ADDRESS ]] && ((REPLY < TEACHER_NUM_GPUS_PER_ENGINE)); then return; fi
  if ((REPLY % TEACHER_NUM_GPUS_PER_ENGINE)); then
    bad TEACHER_GPU "a multiple of TEACHER_NUM_GPUS_PER_ENGINE=$TEACHER_NUM_GPUS_PER_ENGINE ids, got $REPLY"
  fi
}

warn_without_effect() { # variables that were set and that nothing here will read
  local name why=""
  local -a head=(RAY_DASHBOARD_PORT RAY_OBJECT_MANAGER_PORT RAY_NODE_MANAGER_PORT RAY_DASHBOARD_AGENT_LISTEN_PORT RAY_DASHBOARD_AGENT_GRPC_PORT
    RAY_METRICS_EXPORT_PORT RAY_TEMP_DIR) idle=()
  if [[ -n $RAY_ADDRESS ]]; then
    head+=(RAY_PORT RAY_GPUS)
    why="RAY_ADDRESS=$RAY_ADDRESS is a cluster with ports and GPUs of its own"
  elif [[ $RAY_PORT == auto ]]; then
    why="without RAY_PORT no Ray head is started that could use it"
  fi
  if [[ -n $why ]]; then
    for name in "${head[@]}"; do
      if [[ ${_VAR_FROM[$name]} == user && ${!name} != auto ]]; then idle+=("$name=${!name}"); fi
    done
    for name in "${idle[@]}"; do printf 'warning: %s has no effect: %s\n' "$name" "$why" >&2; done
  fi
  if [[ -z $CONDA_SH && ${_VAR_FROM[CONDA_ENV]} == user ]]; then
    printf 'warning: CONDA_ENV=%s has no effect: conda is activated only with CONDA_SH\n' "$CONDA_ENV" >&2
  fi
}

check_devices() { # enough GPUs, and each of them there
  if [[ $RAY_ADDRESS == local ]]; then RAY_ADDRESS=""; fi
  check_ray_address
  resolve_device
  if [[ $DEVICE == cpu ]]; then return; fi
  if [[ -n $RAY_ADDRESS ]]; then
    check_teacher_gpus
    return
  fi
  _count "$RAY_GPUS"
  local have=$REPLY need=$ACTOR_NUM_GPUS_PER_NODE how="ACTOR_NUM_GPUS_PER_NODE=$ACTOR_NUM_GPUS_PER_NODE"
  if [[ -n $STUDENT_URL ]]; then
    how+=" (student engines are running already)"
  elif [[ $COLOCATE == 0 ]]; then
    need=$((need + ROLLOUT_NUM_GPUS))
    how+=" + ROLLOUT_NUM_GPUS=$ROLLOUT_NUM_GPUS (COLOCATE=1 shares them)"
  elif ((ROLLOUT_NUM_GPUS > need)); then
    need=$ROLLOUT_NUM_GPUS how="ROLLOUT_NUM_GPUS=$ROLLOUT_NUM_GPUS with COLOCATE=1"
  fi
  if ((have < need)); then bad RAY_GPUS "at least $need GPU ids for $how, got $have"; fi
  check_teacher_gpus
  if ((ACTOR_NUM_NODES > 1)); then bad ACTOR_NUM_NODES "1 on this host; several nodes need RAY_ADDRESS"; fi
  if [[ $DRY_RUN == 0 ]]; then
    local there id
    there=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    _union "$RAY_GPUS" "$TEACHER_GPU"
    for id in ${REPLY//,/ }; do
      if ((id >= there)); then bad RAY_GPUS "ids of GPUs of this host (it has $there, id $id is not one; TEACHER_GPU=$TEACHER_GPU)"; fi
    done
  fi
}

device_settings() { # LAUNCH_ENV, JOB_ENV (of train.py itself, wherever it runs) and FLAGS for the placement
  JOB_ENV=()
  if [[ -n $RAY_ADDRESS ]]; then
    _count "$TEACHER_GPU" # on a cluster ids mean nothing, but how many there are does
    if ((REPLY < TEACHER_NUM_GPUS_PER_ENGINE)); then REPLY=$TEACHER_NUM_GPUS_PER_ENGINE; fi
    FLAGS+=(--teacher-num-gpus "$REPLY")
    if [[ $DEVICE == cpu ]]; then JOB_ENV+=("CUDA_VISIBLE_DEVICES="); fi
    return
  fi
  if [[ $DEVICE == cpu ]]; then
    LAUNCH_ENV+=("CUDA_VISIBLE_DEVICES=")
    return
  fi
  if [[ -n $TEACHER_URL || $OPD_TYPE == megatron ]]; then # no teacher server of this run
    LAUNCH_ENV+=("CUDA_VISIBLE_DEVICES=$RAY_GPUS")
    return
  fi
  _union "$RAY_GPUS" "$TEACHER_GPU"
  LAUNCH_ENV+=("CUDA_VISIBLE_DEVICES=$REPLY")
  _count "$TEACHER_GPU"
  FLAGS+=(--teacher-num-gpus "$REPLY")
  _union "$RAY_GPUS" "$TEACHER_GPU"
  if [[ $REPLY == "$RAY_GPUS" ]]; then FLAGS+=(--teacher-colocate); fi
}

# ---------------------------------------------------------------------------------------------------- one run

check_run() { # relations between variables; each error names them
  warn_without_effect
  check_devices
  local total=$((ROLLOUT_BATCH_SIZE * N_SAMPLES_PER_PROMPT))
  if ((total % GLOBAL_BATCH_SIZE)); then
    bad GLOBAL_BATCH_SIZE "a divisor of ROLLOUT_BATCH_SIZE x N_SAMPLES_PER_PROMPT = $total"
  fi
  local model=$((TENSOR_MODEL_PARALLEL_SIZE * PIPELINE_MODEL_PARALLEL_SIZE * CONTEXT_PARALLEL_SIZE))
  if (((ACTOR_NUM_NODES * ACTOR_NUM_GPUS_PER_NODE) % model)); then
    bad ACTOR_NUM_GPUS_PER_NODE "ranks (times ACTOR_NUM_NODES) in a multiple of TP x PP x CP = $model"
  fi
  if [[ $OPD_TYPE == megatron ]]; then
    if [[ -z $OPD_TEACHER_LOAD ]]; then bad OPD_TEACHER_LOAD "the teacher's weights with OPD_TYPE=megatron"; fi
  else
    local sources=0 name
    for name in TEACHER_MODEL TEACHER_URL TEACHERS; do
      if [[ -n ${!name} ]]; then sources=$((sources + 1)); fi
    done
    if ((sources != 1)); then bad TEACHER_MODEL "exactly one of TEACHER_MODEL, TEACHER_URL and TEACHERS, got $sources"; fi
  fi
  check_pairs_of_values
  if [[ -n $MODEL_SHAPE && ! -f $TA_OPD_ROOT/scripts/models/$MODEL_SHAPE.sh ]]; then
    bad MODEL_SHAPE "a file in scripts/models: $(cd "$TA_OPD_ROOT/scripts/models" && printf '%s ' *.sh)"
  fi
  if [[ -n $MEGATRON_LM_DIR && ! -d $MEGATRON_LM_DIR/megatron/core ]]; then
    bad MEGATRON_LM_DIR "a Megatron-LM checkout (with megatron/core), or empty for the installed package"
  fi
  if [[ ! -f $SLIME_DIR/train.py ]]; then bad SLIME_DIR "the directory of train.py"; fi
  if [[ $ASYNC == 1 && $COLOCATE == 1 ]]; then bad ASYNC "0 with COLOCATE=1 (engines need GPUs of their own to sample while the trainer works)"; fi
}

check_pairs_of_values() { # what train.py would refuse, before a suite spends time on anything else
  if [[ -n ${OPD_SELECTOR_PATH-} && ${OPD_BUDGET_MASK-none} != none ]]; then
    bad OPD_SELECTOR_PATH "it to be empty beside OPD_BUDGET_MASK=$OPD_BUDGET_MASK (two rules; run_opd.sh without a mask runs your own)"
  fi
  if [[ -n $STUDENT_TORCH_DIST && ! -f $STUDENT_TORCH_DIST/latest_checkpointed_iteration.txt ]]; then
    bad STUDENT_TORCH_DIST "a torch_dist checkpoint (with latest_checkpointed_iteration.txt); empty starts from STUDENT_HF"
  fi
  if _is_number "$OPD_METRIC_Q_LOW" && _is_number "$OPD_METRIC_Q_HIGH" && ! _in_interval "$OPD_METRIC_Q_LOW" "[0,$OPD_METRIC_Q_HIGH)"; then
    bad OPD_METRIC_Q_LOW "less than OPD_METRIC_Q_HIGH=$OPD_METRIC_Q_HIGH"
  fi
  local limit=$ROLLOUT_MAX_CONTEXT_LEN name=ROLLOUT_MAX_CONTEXT_LEN longest
  longest=$(grep -o '"max_position_embeddings": *[0-9]*' "$STUDENT_HF/config.json" 2>/dev/null | grep -o '[0-9]*$' | head -n 1) || true
  if [[ -n $limit && -n $longest ]] && ((limit > longest)); then bad ROLLOUT_MAX_CONTEXT_LEN "at most the student's $longest"; fi
  if [[ -z $limit ]]; then limit=$longest name="the student's max_position_embeddings"; fi
  if [[ -n $limit ]] && ((ROLLOUT_MAX_RESPONSE_LEN >= limit)); then
    bad ROLLOUT_MAX_RESPONSE_LEN "room for a prompt within $name=$limit"
  fi
  local -a words
  read -ra words <<<"$EVAL_PROMPT_DATA"
  if ((${#words[@]} % 2)); then bad EVAL_PROMPT_DATA "pairs NAME FILE"; fi
  local i
  for ((i = 1; i < ${#words[@]}; i += 2)); do
    if [[ ! -r ${words[i]} ]]; then bad EVAL_PROMPT_DATA "pairs NAME FILE of readable files (${words[i]} is none)"; fi
  done
}

selection_flags() { # any of K, bank, mask, own rule switches the metrics on; 0 and empty become usable values
  if [[ $OPD_TOPK_METRICS_K == 0 && -z $OPD_TOKEN_BANK_DIR && $OPD_BUDGET_MASK == none && -z $OPD_SELECTOR_PATH ]]; then
    if [[ $OPD_PROFILE != paper ]]; then FLAGS+=(--opd-profile "$OPD_PROFILE"); fi # it decides the loss reduction, too
    warn_selection_is_off
    return
  fi
  if [[ $OPD_TOPK_METRICS_K == 0 && $OPD_TYPE == sglang ]]; then OPD_TOPK_METRICS_K=16; fi
  if [[ -z $OPD_TOKEN_BANK_DIR ]]; then OPD_TOKEN_BANK_DIR=$SAVE_DIR/token_bank; fi
  if [[ -z $OPD_TOKEN_BANK_PAIR_ID ]]; then
    local teacher=${TEACHER_MODEL:-${OPD_TEACHER_LOAD:-teacher}}
    OPD_TOKEN_BANK_PAIR_ID=$(slug "$teacher")_to_$(slug "$STUDENT_HF")
  fi
  flags_from_variables @
}

warn_selection_is_off() { # variables of the selection that were set, while nothing is measured or selected
  local name
  for name in "${_VAR_NAMES[@]}"; do
    case $name in OPD_BUDGET_MASK | OPD_TOPK_METRICS_K | OPD_TOKEN_BANK_DIR | OPD_PROFILE) continue ;; esac
    if [[ ${_VAR_FLAG[$name]} == @* && ${_VAR_FROM[$name]} == user && ${!name} != "${_VAR_DEFAULT[$name]}" ]]; then
      printf 'warning: %s=%s has no effect: nothing is selected (OPD_BUDGET_MASK=none, OPD_TOPK_METRICS_K=0, no OPD_TOKEN_BANK_DIR)\n' "$name" "${!name}" >&2
    fi
  done
}

slug() { # a directory name for use in file names: Qwen3-1.7B -> qwen3_1p7b
  local name=${1%/}
  name=${name##*/}
  name=${name,,}
  name=${name//./p}
  printf '%s' "${name//[^a-z0-9]/_}"
}

checkpoint_flags() {
  FLAGS+=(--output-dir "$SAVE_DIR" --run-name "$RUN_NAME" --save "$SAVE_DIR")
  if [[ $RESUME == 1 && -f $SAVE_DIR/latest_checkpointed_iteration.txt ]]; then
    FLAGS+=(--load "$SAVE_DIR")
  elif [[ -n $STUDENT_TORCH_DIST ]]; then
    FLAGS+=(--load "$STUDENT_TORCH_DIST" --no-load-optim --start-rollout-id 0)
  fi
}

optional_flags() {
  local item
  local -a named
  read -ra named <<<"$TEACHERS" # unlike $TEACHERS alone, this takes ? and * in an address as they are
  for item in "${named[@]}"; do FLAGS+=(--teacher "$item"); done
  if [[ $SAVE_DEBUG_ROLLOUT_DATA == 1 ]]; then
    FLAGS+=(--save-debug-rollout-data "$SAVE_DIR/debug_rollout/{rollout_id}.parquet")
  fi
  if [[ $TEACHER_PORT != auto ]]; then FLAGS+=(--teacher-port "$TEACHER_PORT"); fi
  if [[ $TEACHER_NCCL_PORT != auto ]]; then FLAGS+=(--teacher-nccl-port "$TEACHER_NCCL_PORT"); fi
  if [[ -n $MODEL_SHAPE ]]; then
    # shellcheck source=/dev/null
    source "$TA_OPD_ROOT/scripts/models/$MODEL_SHAPE.sh"
    FLAGS+=("${MODEL_ARGS[@]}")
  fi
}

ray_wrapper() { # WRAPPER = the command that puts train.py on a cluster, empty for train.py's own Ray
  WRAPPER=()
  if [[ $RAY_ADDRESS == http* ]]; then
    WRAPPER=("$PY" "$TA_OPD_ROOT/tools/run_on_ray.py" --address "$RAY_ADDRESS" --submission-id "${RAY_JOB_ID:-${RUN_NAME}_$TIMESTAMP}")
  elif [[ -z $RAY_ADDRESS && $RAY_PORT != auto ]]; then
    WRAPPER=("$PY" "$TA_OPD_ROOT/tools/run_on_ray.py" --start-head --host "$MASTER_ADDR" --port "$RAY_PORT" --log-dir "$LOG_DIR"
      --submission-id "${RAY_JOB_ID:-${RUN_NAME}_$TIMESTAMP}")
    local name flag
    for name in RAY_DASHBOARD_PORT RAY_OBJECT_MANAGER_PORT RAY_NODE_MANAGER_PORT RAY_DASHBOARD_AGENT_LISTEN_PORT \
      RAY_DASHBOARD_AGENT_GRPC_PORT RAY_METRICS_EXPORT_PORT; do
      flag=${name#RAY_}
      flag=--${flag//_/-}
      if [[ ${!name} != auto ]]; then WRAPPER+=("${flag,,}" "${!name}"); fi
    done
    if [[ -n $RAY_TEMP_DIR ]]; then WRAPPER+=(--temp-dir "$RAY_TEMP_DIR"); fi
    if [[ $DEVICE == cpu ]]; then # a process each needs a place, also where the host has fewer cores
      local -a named
      read -ra named <<<"$TEACHERS"
      WRAPPER+=(--least-cpus $((ACTOR_NUM_GPUS_PER_NODE + ROLLOUT_NUM_GPUS + (1 + ${#named[@]}) * TEACHER_NUM_GPUS_PER_ENGINE)))
    fi
  fi
  if ((${#WRAPPER[@]})); then WRAPPER+=(--); fi
}

opd_run() { # the whole of run_opd.sh and of its wrappers
  vars_training
  vars_selection
  group "Names of this run"
  var RUN_NAME name "${METHOD_NAME:-opd}_\$TIMESTAMP" "name in logs and trackers"
  var SAVE_DIR out "\$OUTPUT_ROOT/\$RUN_NAME" "directory of this run: checkpoints, metrics, token bank, DONE"
  launcher_init "$@"
  check_run
  stop_on_errors
  use_conda
  use_python
  resolve_mask_name
  launch_training
}

resolve_mask_name() { # an alias becomes the mask that train.py knows
  local mask
  case $OPD_BUDGET_MASK in # names that are masks already need no Python
    none | full | dlearn_high | ca_softor | split_budget_ca | entropy | tip | divergence | random | compatibility | q3 | q3_highc) return ;;
  esac
  if [[ -n $OPD_SELECTOR_PATH ]]; then return; fi
  if ! mask=$("$PY" -m ta_opd.suite.methods "$OPD_BUDGET_MASK"); then exit 2; fi
  OPD_BUDGET_MASK=$mask
}

launch_training() { # the command of one run, printed or become this process
  local eval_interval=${EVAL_INTERVAL-}
  if [[ -n $EVAL_PROMPT_DATA$EVAL_CONFIG && -z $eval_interval ]]; then EVAL_INTERVAL=$NUM_ROLLOUT; fi
  FLAGS=()
  flags_from_variables
  selection_flags
  checkpoint_flags
  optional_flags
  device_settings
  ray_wrapper
  if [[ -n $MEGATRON_LM_DIR$FALLBACK_SITE_PACKAGES ]]; then LAUNCH_ENV+=("PYTHONPATH=$PYTHONPATH"); fi # so that DRY_RUN shows it
  local script=train.py
  if [[ $ASYNC == 1 ]]; then script=train_async.py; fi
  if ((${#JOB_ENV[@]})); then JOB_ENV=(env "${JOB_ENV[@]}"); fi
  local -a command=("${WRAPPER[@]}" "${JOB_ENV[@]}" "$PY" "$SLIME_DIR/$script" "${FLAGS[@]}" "${PASS_THROUGH[@]}")
  if [[ -n $RAY_ADDRESS && $RAY_ADDRESS != http* ]]; then LAUNCH_ENV+=("RAY_ADDRESS=$RAY_ADDRESS"); fi
  if ((${#LAUNCH_ENV[@]})); then command=(env "${LAUNCH_ENV[@]}" "${command[@]}"); fi
  if [[ $DRY_RUN != 0 ]]; then
    show_command "${command[@]}"
    if [[ $DRY_RUN == plan ]]; then "${command[@]}" --dry-run; fi
    return
  fi
  mkdir -p -- "$SAVE_DIR" "$LOG_DIR"
  exec "${command[@]}"
}
