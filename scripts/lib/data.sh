# shellcheck shell=bash
# What the data launchers share: their variables and the call of tools/make_prompts.py.

data_run() { # data_run KIND "$@"; DATA_FILE is the default name of the output
  local kind=$1
  shift
  group "Prompt file"
  var PY str? "" "Python to use; empty: .venv of this project, else python3"
  var SOURCE list? "" "files or directories (parquet, jsonl), space separated; empty: download from the Hugging Face hub where the data set is there"
  var DATA_DIR out "\$TA_OPD_ROOT/outputs/data" "directory of the output"
  var OUTPUT str "\$DATA_DIR/$DATA_FILE" "training prompts, .jsonl or .parquet"
  if [[ $kind == chat ]]; then
    var PROMPT_KEY str prompt "dotted key of the prompt: a string or a list of messages"
    var LABEL_KEY str? "" "dotted key of the answer; empty: none"
  fi
  var AS_MESSAGES bool 0 "write prompts as chat messages"
  var HELDOUT int:0 300 "prompts that are held out and never trained on"
  var HELDOUT_OUTPUT str? "" "file of the held-out prompts; empty: OUTPUT with _heldout in its name"
  var HELDOUT_SEED int:0 41717 "seed of the held-out draw"
  var SECOND_HALF bool 0 "draw them from the second half of the file, as the released drivers do"
  var DRY_RUN choice:0,1 0 "print the exact command"
  launcher_init "$@"
  use_python
  local -a command=("$PY" "$TA_OPD_ROOT/tools/make_prompts.py" --kind "$kind" --output "$OUTPUT" --heldout "$HELDOUT"
    --heldout-seed "$HELDOUT_SEED") files
  if [[ -n $SOURCE ]]; then
    if [[ -e $SOURCE ]]; then files=("$SOURCE"); else read -ra files <<<"$SOURCE"; fi # one path may hold blanks
    command+=(--source "${files[@]}")
  fi
  if [[ $kind == chat ]]; then command+=(--prompt-key "$PROMPT_KEY" --label-key "$LABEL_KEY"); fi
  if [[ $AS_MESSAGES == 1 ]]; then command+=(--as-messages); fi
  if [[ -n $HELDOUT_OUTPUT ]]; then command+=(--heldout-output "$HELDOUT_OUTPUT"); fi
  if [[ $SECOND_HALF == 1 ]]; then command+=(--second-half); fi
  run_or_show "${command[@]}"
}
