# shellcheck shell=bash
# What the method suite and the ratio sweep share: their variables and the call of tools/run_suite.py.

vars_suite() { # after `var METHOD_LIST` or `var RUN_LIST`
  var SEED_LABEL name seed1 "seeds of a suite with one repetition: seed1 is 1234/42/42, seed2 1235/43/43, ..."
  var SEEDS list "\$SEED_LABEL" "repetitions: labels such as seed1 seed2 seed3, or mine=7/8/9 (trainer/rollout/mask)"
  var FORCE bool 0 "run every row anew; old directories are kept under another name"
  var ON_ERROR choice:continue,stop continue "after a failed run: go on with the rest, or stop"
  group "Fixed-context evaluation"
  var SKIP_EVAL bool 0 "train and merge the token banks only"
  var COMMON_CONTEXT file? "" "frozen context bank; empty: the suite makes one with the initial student"
  var BASELINE_METRICS file? "" "scores of COMMON_CONTEXT before training; empty: the suite makes them"
  var HELDOUT_PROMPT_DATA file? "" "held-out prompts of that bank; empty: PROMPT_DATA, which is trained on"
  var CONTEXT_SAMPLES int:1 300 "contexts of that bank"
  var CONTEXT_TOKENS int:1 192 "response tokens scored in each"
  var EVAL_TEACHER_HF model? "\$TEACHER_MODEL" "teacher directory for the scoring (needed where the teacher is an address)"
  var EVAL_GPUS gpus? "\$TEACHER_GPU,\$RAY_GPUS" "GPU ids of the scoring: student first, teacher second"
  var EVAL_BOOTSTRAP int:1 1000 "resamples of the intervals"
}

check_suite() {
  check_run
  if [[ $SKIP_EVAL == 0 && -z $EVAL_TEACHER_HF ]]; then bad EVAL_TEACHER_HF "the teacher's directory, or SKIP_EVAL=1"; fi
  if [[ -n $BASELINE_METRICS && -z $COMMON_CONTEXT ]]; then bad COMMON_CONTEXT "the bank that BASELINE_METRICS belong to"; fi
}

suite_run() { # suite_run ENTRIES_VARIABLE
  local entries=$1 gpus=$EVAL_GPUS topk=$OPD_TOPK_METRICS_K
  if [[ $DEVICE == cpu ]]; then gpus=""; fi
  if [[ $topk == 0 ]]; then topk=16; fi
  local -a command=("$PY" "$TA_OPD_ROOT/tools/run_suite.py" --entries "${!entries}" --entries-variable "$entries"
    --seeds "$SEEDS" --explicit-seeds "$(chosen SEED)" "$(chosen ROLLOUT_SEED)" "$(chosen OPD_BUDGET_MASK_SEED)"
    --tag "$TAG" --output-root "$OUTPUT_ROOT" --log-dir "$LOG_DIR" --student "$STUDENT_HF" --teacher "$EVAL_TEACHER_HF"
    --prompt-data "$PROMPT_DATA" --input-key "$INPUT_KEY" --label-key "$LABEL_KEY" --topk "$topk"
    --max-response-len "$ROLLOUT_MAX_RESPONSE_LEN" --common-context "$COMMON_CONTEXT" --baseline-metrics "$BASELINE_METRICS"
    --heldout-prompt-data "$HELDOUT_PROMPT_DATA" --contexts "$CONTEXT_SAMPLES" --context-tokens "$CONTEXT_TOKENS"
    --eval-gpus "$gpus" --bootstrap "$EVAL_BOOTSTRAP" --on-error "$ON_ERROR")
  if [[ $APPLY_CHAT_TEMPLATE == 0 ]]; then command+=(--no-chat-template); fi
  if [[ $SKIP_EVAL == 1 ]]; then command+=(--skip-eval); fi
  if [[ $FORCE == 1 ]]; then command+=(--force); fi
  if [[ $DRY_RUN != 0 ]]; then command+=(--dry-run); fi
  if ((${#PASS_THROUGH[@]})); then die "-- ${PASS_THROUGH[*]}: a suite passes no flags on; use the variables (--help)"; fi
  export_chosen
  exec "${command[@]}"
}

chosen() { # the value of a variable if the user set it
  if [[ ${_VAR_FROM[$1]} == user ]]; then printf '%s' "${!1}"; fi
}

suite_main() { # suite_main ENTRIES_VARIABLE DEFAULT_ENTRIES MEANING DEFAULT_TAG "$@"
  local entries=$1 list=$2 meaning=$3 tag=$4
  shift 4
  # the released sweep's sizes; each can be overridden
  preset NUM_ROLLOUT 50
  preset ROLLOUT_MAX_RESPONSE_LEN 64
  preset SAVE_INTERVAL 10
  preset OPD_TOPK_METRICS_K 16
  preset TEACHER_GPU 4
  preset RAY_GPUS 5
  preset ACTOR_NUM_GPUS_PER_NODE 1
  preset COLOCATE 1
  preset EVAL_GPUS 4,5
  vars_training
  group "Token metrics and selection"
  vars_selection_common
  group "The suite"
  var "$entries" runs "$list" "$meaning"
  var TAG name "$tag" "name of the suite; its directory is OUTPUT_ROOT/TAG"
  vars_suite
  launcher_init "$@"
  local other=RUN_LIST
  if [[ $entries == RUN_LIST ]]; then other=METHOD_LIST; fi
  if [[ -n ${!other-} ]]; then printf 'warning: %s has no effect: this suite reads %s\n' "$other" "$entries" >&2; fi
  if [[ -n $OPD_TOKEN_BANK_DIR ]]; then
    printf 'warning: OPD_TOKEN_BANK_DIR=%s has no effect: each run of a suite has a bank of its own, SAVE_DIR/token_bank\n' "$OPD_TOKEN_BANK_DIR" >&2
  fi
  check_suite
  stop_on_errors
  use_conda
  use_python
  suite_run "$entries"
}
