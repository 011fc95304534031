# shellcheck shell=bash
# What the evaluation launchers share: their variables and the call of tools/evaluate_downstream.py.

vars_eval() {
  group "Where things are"
  var PY str? "" "Python that has lm_eval (requirements/eval.txt); empty: .venv of this project, else python3"
  var CONDA_SH file? "" "conda.sh to source first; empty: no conda"
  var CONDA_ENV str "verl" "conda environment to activate, only with CONDA_SH"
  var OUTPUT_ROOT out "\$TA_OPD_ROOT/outputs" "everything is written below this directory"
  var RUN_DIR out "\$OUTPUT_ROOT/eval/${EVAL_NAME:-downstream}" "results; finished runs in it are skipped"
  group "What is evaluated"
  var MODELS list "" "LABEL=DIRECTORY or LABEL=http://ADDRESS of a SGLang server, space separated"
  var BASE str base "label that differences are taken to"
  var TOKENIZER model? "" "tokenizer directory for servers"
  var TASKS list? "" "harness tasks, comma or space separated"
  var PROMPT_TASKS list? "" "NAME=FILE: prompt files of ours as tasks (the last number must equal the label)"
  var LOCAL_DATASETS list? "" "TASK=PATH: tasks read from a local file or data directory"
  var INPUT_KEY str prompt "key of the prompt in PROMPT_TASKS files"
  var LABEL_KEY str label "key of the answer in PROMPT_TASKS files"
  var HF_HOME str? "" "Hugging Face cache; empty: the default one"
  var OFFLINE bool 0 "use cached data only"
  group "How it is evaluated"
  var CHAT_TEMPLATE bool 1 "format questions by the tokenizer's chat template (0 for base models)"
  var SYSTEM_INSTRUCTION str? "" "system message"
  var NUM_FEWSHOT int:0? "" "examples before a question; empty: the task's own number"
  var MAX_GEN_TOKS int:1? "" "most tokens of an answer; empty: the task's own number"
  var TEMPERATURE "float:[0,]?" "" "sampling temperature; empty: greedy, as most tasks say"
  var TOP_P "float:(0,1]?" "" "nucleus; empty: all"
  var EVAL_SEEDS list 1234 "evaluation seeds; several need TEMPERATURE"
  var N_SAMPLES int:1 1 "answers to every question in each seed; several need TEMPERATURE"
  var LIMIT str? "" "questions of a task; empty: all"
  var ALLOW_CODE bool 0 "run code written by the model (HumanEval), in a sandbox that you trust"
  group "Machine"
  var GPU str? "" "GPU ids of the harness; empty: those visible"
  var GPU_ID str? "\$GPU" "the same, by its other released name"
  var DEVICE str auto "device of the harness, such as cuda:0 or cpu"
  var DTYPE str auto "dtype of the model, such as bfloat16"
  var BATCH_SIZE str 8 "questions a batch, or auto"
  var MAX_LENGTH int:1? "" "longest context; empty: the model's"
  var SERVER_CONCURRENCY int:1 32 "requests in flight at a server"
  var TRUST_REMOTE_CODE bool 0 "let model directories run their own code"
  var TIMEOUT str? "" "longest time of one harness process, such as 150m"
  group "How to run"
  var SUMMARIZE_ONLY bool 0 "read the results that are there"
  var DRY_RUN choice:0,1 0 "print the exact commands"
}

eval_run() {
  vars_eval
  launcher_init "$@"
  if [[ -z $TASKS && -z $PROMPT_TASKS ]]; then bad TASKS "harness tasks such as gsm8k_cot (or PROMPT_TASKS)"; fi
  if [[ -n $TIMEOUT && ! $TIMEOUT =~ ^[0-9]+[smh]?$ ]]; then bad TIMEOUT "a time such as 150m"; fi
  if [[ -n $LIMIT && ! $LIMIT =~ ^[0-9]+$ ]] && ! { _is_number "$LIMIT" && _in_interval "$LIMIT" "(0,1)"; }; then
    bad LIMIT "a number of questions, or a share of them below 1"
  fi
  if [[ $DEVICE == gpu ]]; then DEVICE=cuda; fi # as the training launchers call it
  stop_on_errors
  use_conda
  use_python
  if [[ $SUMMARIZE_ONLY$DRY_RUN == 00 ]] && ! "$PY" -c 'import lm_eval' 2>/dev/null; then
    die "PY=$PY: expected a Python that has lm_eval: $PY -m pip install -r requirements/eval.txt"
  fi
  if [[ -n $HF_HOME ]]; then export HF_HOME; else unset HF_HOME; fi
  if [[ $OFFLINE == 1 ]]; then export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1; fi
  if [[ -n $GPU_ID ]]; then export CUDA_VISIBLE_DEVICES=$GPU_ID; fi
  local -a command=("$PY" "$TA_OPD_ROOT/tools/evaluate_downstream.py" --models "$MODELS" --tasks "$TASKS" --run-dir "$RUN_DIR"
    --base "$BASE" --seeds "$EVAL_SEEDS" --n-samples "$N_SAMPLES" --batch-size "$BATCH_SIZE" --device "$DEVICE" --dtype "$DTYPE"
    --server-concurrency "$SERVER_CONCURRENCY" --input-key "$INPUT_KEY" --label-key "$LABEL_KEY")
  local name flag
  for name in SYSTEM_INSTRUCTION NUM_FEWSHOT MAX_GEN_TOKS TEMPERATURE TOP_P LIMIT MAX_LENGTH TOKENIZER TIMEOUT LOCAL_DATASETS PROMPT_TASKS; do
    flag=--${name//_/-}
    if [[ -n ${!name} ]]; then flag_with_value command "${flag,,}" "${!name}"; fi
  done
  if [[ $CHAT_TEMPLATE == 0 ]]; then command+=(--no-chat-template); fi
  if [[ $TRUST_REMOTE_CODE == 1 ]]; then command+=(--trust-remote-code); fi
  if [[ $ALLOW_CODE == 1 ]]; then command+=(--allow-code); fi
  if [[ $SUMMARIZE_ONLY == 1 ]]; then command+=(--summarize-only); fi
  if [[ $DRY_RUN == 1 ]]; then
    command+=(--dry-run)
    for name in HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES; do # of the commands that are printed
      if [[ -n ${!name-} ]]; then printf 'export %s=%q\n' "$name" "${!name}"; fi
    done
  fi
  exec "${command[@]}"
}
