#!/usr/bin/env bash
# Accuracy on a held-out prompt file: no network, no harness.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Accuracy on a held-out prompt file, for checkpoints or running SGLang servers: no network, no harness."
group "What is evaluated"
var MODELS list "" "LABEL=DIRECTORY or LABEL=http://ADDRESS of a SGLang server, space separated"
var BASE str base "label that differences are taken to"
var TOKENIZER model? "" "tokenizer directory for servers"
var DATA file "" "JSONL or parquet file of prompts with answers"
var INPUT_KEY str prompt "key of the prompt"
var LABEL_KEY str label "key of the answer"
var OUTPUT_ROOT out "\$TA_OPD_ROOT/outputs" "everything is written below this directory"
var RUN_DIR out "\$OUTPUT_ROOT/eval/heldout_math" "results; finished models are skipped"
group "How it is evaluated"
var RM_TYPE str math "answer check: math (equal in value), last_number, exact, or package.module:function"
var CHAT_TEMPLATE bool 1 "format prompts by the tokenizer's chat template (0 for base models)"
var CHAT_TEMPLATE_KWARGS str "{}" "JSON keywords for the template, such as {\"enable_thinking\": false}"
var MAX_GEN_TOKS int:1 2048 "most tokens of an answer"
var TEMPERATURE "float:[0,]" 0 "sampling temperature; 0: greedy"
var TOP_P "float:(0,1]" 1 "nucleus"
var EVAL_SEEDS list 1234 "evaluation seeds; several need TEMPERATURE"
var N_SAMPLES int:1 1 "answers to every question in each seed; several need TEMPERATURE"
var LIMIT int:1? "" "questions; empty: all"
group "Machine"
var PY str? "" "Python to use; empty: .venv of this project, else python3"
var GPU str? "" "GPU id; empty: the first visible one"
var DEVICE str auto "device, such as cuda:0 or cpu"
var DTYPE str auto "dtype of the model; auto: bfloat16 on GPU, float32 on CPU"
var BATCH_SIZE int:1 16 "questions a batch"
var SERVER_CONCURRENCY int:1 64 "requests in flight at a server"
var TRUST_REMOTE_CODE bool 0 "let model directories run their own code"
group "How to run"
var DRY_RUN choice:0,1 0 "print the exact command"
launcher_init "$@"
if [[ $DEVICE == gpu ]]; then DEVICE=cuda; fi # as the training launchers call it
use_python
command=()
if [[ -n $GPU ]]; then command=(env "CUDA_VISIBLE_DEVICES=$GPU"); fi
command+=("$PY" "$TA_OPD_ROOT/tools/evaluate_math.py" --models "$MODELS" --data "$DATA" --run-dir "$RUN_DIR" --base "$BASE"
  --input-key "$INPUT_KEY" --label-key "$LABEL_KEY" --chat-template-kwargs "$CHAT_TEMPLATE_KWARGS" --rm-type "$RM_TYPE"
  --seeds "$EVAL_SEEDS" --n-samples "$N_SAMPLES" --temperature "$TEMPERATURE" --top-p "$TOP_P" --max-gen-toks "$MAX_GEN_TOKS"
  --batch-size "$BATCH_SIZE" --device "$DEVICE" --dtype "$DTYPE" --server-concurrency "$SERVER_CONCURRENCY")
if [[ -n $TOKENIZER ]]; then command+=(--tokenizer "$TOKENIZER"); fi
if [[ -n $LIMIT ]]; then command+=(--limit "$LIMIT"); fi
if [[ $CHAT_TEMPLATE == 0 ]]; then command+=(--no-chat-template); fi
if [[ $TRUST_REMOTE_CODE == 1 ]]; then command+=(--trust-remote-code); fi
run_or_show "${command[@]}"
