# shellcheck shell=bash
# One driver under all fixed-context diagnostics: split the prompts, then tools/run_fixed_context.py (train, freeze contexts of the
# initial student, score before and after, analyse). Finished steps are skipped when it is called again.

vars_diagnostics() {
  group "The diagnostic"
  var RUN_NAME name "\$DIAG_NAME" "name of the training run"
  var SAVE_DIR out "\$OUTPUT_ROOT/\$RUN_NAME" "directory of the training run"
  var STORY_ROOT out "\$OUTPUT_ROOT/analysis/scale_context_robustness_20260517" "directory of all diagnostics"
  var DIAG_DIR out "\$STORY_ROOT/\$DIAG_NAME" "directory of this one: contexts, scores, analysis, summary"
  var SOURCE_DATA file? "" "prompt file that is split into training and held-out prompts (not needed with both of them given)"
  var SOURCE_KIND choice:prompts,gsm8k,lm_eval_log prompts "form of SOURCE_DATA: a prompt file, GSM8K, or a sample log of the harness"
  var HELDOUT_PROMPT_DATA str "\$DIAG_DIR/data/heldout.jsonl" "held-out prompts that the contexts are made of"
  var HELDOUT_SAMPLES int:1 300 "prompts held out of SOURCE_DATA"
  var HELDOUT_SEED int:0 41717 "seed of that draw"
  var BANK_SOURCE choice:heldout,dump,tokenbank heldout "contexts: initial student on held-out prompts, or rollouts of the training (dump: as released)"
  var NUM_CONTEXTS int:1 300 "contexts"
  var CONTEXT_TOKENS int:1 192 "response tokens scored in each"
  var SCORE_TOPK list 16 "K of the scores; several such as 16,8,32 are scored in one pass"
  var ITERATIONS str latest "checkpoints to score: latest, all, or numbers such as 25,50"
  var BOOTSTRAP int:1 1000 "resamples of the intervals"
  var ANALYSIS_PROFILE choice:paper,released paper "definitions of the analysis: the paper's or the released code's"
  var SUMMARY_NAME name "\${DIAG_NAME}_summary.md" "name of the summary in DIAG_DIR"
  var REPORT bool 1 "also build the HTML report"
  var STUDENT_DEVICE str auto "device of the student's scoring: auto, cpu, cuda:N"
  var TEACHER_DEVICE str auto "device of the teacher's scoring"
  var HF_HOME str? "" "Hugging Face cache; empty: the default one"
  var HF_ENDPOINT str? "" "address of the Hugging Face hub; empty: the default one"
}

diagnostics_presets() { # what the released drivers hard-code; each can be overridden
  preset TEACHER_GPU 0
  preset RAY_GPUS 1
  preset COLOCATE 1
  preset ACTOR_NUM_GPUS_PER_NODE 1
  preset NUM_ROLLOUT 151
  preset ROLLOUT_BATCH_SIZE 2
  preset N_SAMPLES_PER_PROMPT 1
  preset GLOBAL_BATCH_SIZE 2
  preset ROLLOUT_MAX_RESPONSE_LEN 256
  preset SAVE_INTERVAL 25
  preset TEACHER_CUDA_GRAPH_MAX_BS 2
  preset SGLANG_CUDA_GRAPH_MAX_BS 2
  preset ROLLOUT_MEM_FRACTION 0.22
  preset OPD_TOPK_METRICS_K 16
  preset OPD_TOKEN_BANK_RAW_TOPK 1
  preset OPD_EXACT_CMASS 1
  preset SAVE_DEBUG_ROLLOUT_DATA 1
}

diagnostic_run() { # diagnostic_run NAME SEED TEACHER_MEM "$@"
  DIAG_NAME=$1
  diagnostics_presets
  preset SEED "$2"
  preset ROLLOUT_SEED "$2"
  preset OPD_BUDGET_MASK_SEED "$2"
  preset TEACHER_MEM_FRACTION "$3"
  preset OPD_TOKEN_BANK_PAIR_ID "${PAIR_ID:-$1}"
  shift 3
  vars_training
  vars_selection
  vars_diagnostics
  if declare -F vars_own >/dev/null; then vars_own; fi
  preset_prompts
  launcher_init "$@"
  check_diagnostic
  stop_on_errors
  use_conda
  use_python
  if [[ -n $HF_HOME ]]; then export HF_HOME; else unset HF_HOME; fi
  if [[ -n $HF_ENDPOINT ]]; then export HF_ENDPOINT; else unset HF_ENDPOINT; fi
  split_prompts
  fixed_context
}

preset_prompts() { # PROMPT_DATA is made by split_prompts unless it is given
  preset PROMPT_DATA "\$OUTPUT_ROOT/analysis/scale_context_robustness_20260517/$DIAG_NAME/data/train.jsonl"
  vars_data
  loosen PROMPT_DATA
}

check_diagnostic() {
  if [[ -z $SOURCE_DATA ]]; then SOURCE_DATA=${GSM8K_SOURCE_JSONL-}; fi
  if [[ ${_VAR_FROM[PROMPT_DATA]} != user ]]; then PROMPT_DATA=$DIAG_DIR/data/train.jsonl; fi
  if [[ -z $SOURCE_DATA ]]; then
    if [[ ! -f $PROMPT_DATA ]]; then bad PROMPT_DATA "a readable file, or SOURCE_DATA to split"; fi
    if [[ $BANK_SOURCE == heldout && ! -f $HELDOUT_PROMPT_DATA ]]; then
      bad HELDOUT_PROMPT_DATA "a readable file, or SOURCE_DATA to split (BANK_SOURCE=dump needs none)"
    fi
  elif ! prompts_are_there; then
    local name
    for name in PROMPT_DATA HELDOUT_PROMPT_DATA; do # a file of the user's is not written over
      if [[ ${_VAR_FROM[$name]} == user && -e ${!name} ]]; then
        bad "$name" "the name of a new file beside SOURCE_DATA=$SOURCE_DATA, whose split is written there; unset it to write below DIAG_DIR"
      fi
    done
  fi
  if [[ ! $SCORE_TOPK =~ ^[0-9]+(,[0-9]+)*$ ]]; then bad SCORE_TOPK "numbers such as 16 or 16,8,32"; fi
  if [[ ! $ITERATIONS =~ ^(latest|all|[0-9]+(,[0-9]+)*)$ ]]; then bad ITERATIONS "latest, all, or numbers such as 25,50"; fi
  if [[ -z $TEACHER_MODEL ]]; then bad TEACHER_MODEL "the teacher's directory (the scores need its weights)"; fi
  check_run
}

prompts_are_there() { [[ -f $PROMPT_DATA && (-f $HELDOUT_PROMPT_DATA || $BANK_SOURCE != heldout) ]]; }

split_prompts() { # once; the recorded indices stay what they are
  if prompts_are_there; then return; fi
  local kind=$SOURCE_KIND
  local -a command=("$PY" "$TA_OPD_ROOT/tools/make_prompts.py" --source "$SOURCE_DATA" --output "$PROMPT_DATA" --heldout "$HELDOUT_SAMPLES"
    --heldout-output "$HELDOUT_PROMPT_DATA" --heldout-seed "$HELDOUT_SEED" --second-half)
  if [[ $kind == prompts ]]; then
    command+=(--kind chat --prompt-key "$INPUT_KEY" --label-key "$LABEL_KEY")
  else
    command+=(--kind "$kind")
  fi
  run_or_show "${command[@]}"
}

fixed_context() {
  local train
  printf -v train '%q' "$TA_OPD_ROOT/scripts/train/run_opd.sh" # the command is read by a shell
  local -a command=("$PY" "$TA_OPD_ROOT/tools/run_fixed_context.py" --diag-dir "$DIAG_DIR" --student "$STUDENT_HF" --teacher "$TEACHER_MODEL"
    --save-dir "$SAVE_DIR" --train-command "bash $train" --train-done-file "$SAVE_DIR/DONE"
    --bank-source "$BANK_SOURCE" --num-contexts "$NUM_CONTEXTS" --max-response-tokens "$CONTEXT_TOKENS" --seed "$SEED" --topk "$SCORE_TOPK"
    --iterations "$ITERATIONS" --bootstrap "$BOOTSTRAP" --profile "$ANALYSIS_PROFILE" --summary-name "$SUMMARY_NAME"
    --pair-id "$DIAG_NAME")
  case $BANK_SOURCE in
    heldout)
      command+=(--prompt-data "$HELDOUT_PROMPT_DATA" --input-key prompt)
      if [[ $APPLY_CHAT_TEMPLATE == 1 ]]; then command+=(--apply-chat-template); fi
      ;;
    dump) command+=(--debug-rollout-data "$SAVE_DIR/debug_rollout/*.parquet") ;;
  esac
  device_words
  command+=("${DEVICE_WORDS[@]}")
  if [[ $REPORT == 1 ]]; then command+=(--report); fi
  export_chosen
  export RUN_NAME SAVE_DIR PROMPT_DATA
  if [[ $INPUT_KEY != prompt && $PROMPT_DATA == "$DIAG_DIR"/* ]]; then export INPUT_KEY=prompt; fi # split_prompts writes that key
  if [[ -n $LABEL_KEY && $PROMPT_DATA == "$DIAG_DIR"/* ]]; then export LABEL_KEY=label; fi
  if [[ $DRY_RUN != 0 ]]; then
    local shown there step
    printf -v shown -- '--prompt-data %q ' "$PROMPT_DATA"
    PROMPT_DATA=${SOURCE_DATA:-$PROMPT_DATA} # is there already
    printf -v there -- '--prompt-data %q ' "$PROMPT_DATA"
    show_command "${command[@]}"
    step=$(bash "$TA_OPD_ROOT/scripts/train/run_opd.sh")
    printf '# its training step\n%s\n' "${step%%"$there"*}$shown${step#*"$there"}"
    return
  fi
  exec "${command[@]}"
}

device_words() { # DEVICE_WORDS: where the scoring runs; the same GPUs as the training, student first
  local student=$STUDENT_DEVICE teacher=$TEACHER_DEVICE
  if [[ $DEVICE == cpu ]]; then
    if [[ $student == auto ]]; then student=cpu; fi
    if [[ $teacher == auto ]]; then teacher=cpu; fi
  fi
  DEVICE_WORDS=(--student-device "$student" --teacher-device "$teacher")
}
