#!/usr/bin/env bash
# Scores the contexts of a finished diagnostic again with other K, before and after training.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"

about "Scores the contexts of a finished diagnostic again with K = 8 and 32, before and after training, into DIAG_DIR_k8 and DIAG_DIR_k32."
group "The diagnostic"
var PY str? "" "Python to use; empty: .venv of this project, else python3"
var OUTPUT_ROOT out "\$TA_OPD_ROOT/outputs" "everything is written below this directory"
var STORY_ROOT out "\$OUTPUT_ROOT/analysis/scale_context_robustness_20260517" "directory of all diagnostics"
var DIAG_DIR dir "\$STORY_ROOT/14b_to_1p7b_diag300" "the finished diagnostic (context_bank.parquet, eval_latest/student_hf)"
var TEACHER_MODEL model "" "Hugging Face directory of the teacher"
var STUDENT_HF model "" "Hugging Face directory of the initial student"
var TOPKS list "8 32" "values of K"
var CONTEXT_TOKENS int:1 192 "response tokens scored in each context"
var NUM_CONTEXTS int:1 300 "contexts"
var BOOTSTRAP int:1 1000 "resamples of the intervals"
var STUDENT_DEVICE str auto "device of the student: auto, cpu, cuda:N"
var TEACHER_DEVICE str auto "device of the teacher"
var DRY_RUN choice:0,1 0 "print the exact commands"
launcher_init "$@"
for file in context_bank.parquet eval_latest/student_hf; do
  if [[ ! -e $DIAG_DIR/$file ]]; then bad DIAG_DIR "a finished diagnostic (there is no $file in it)"; fi
done
if [[ ! $TOPKS =~ ^[0-9]+([[:space:],]+[0-9]+)*$ ]]; then bad TOPKS "numbers such as 8 32"; fi
stop_on_errors
use_python

score() { # score K STUDENT OUTPUT [more flags]
  local k=$1 student=$2 output=$3
  shift 3
  if [[ -f $output ]]; then return; fi
  run_or_show "$PY" "$TA_OPD_ROOT/tools/eval_fixed_context_bank.py" --context-bank "$DIAG_DIR/context_bank.parquet" --student "$student" \
    --teacher "$TEACHER_MODEL" --output "$output" --topk "$k" --max-samples "$NUM_CONTEXTS" --max-response-tokens "$CONTEXT_TOKENS" \
    --student-device "$STUDENT_DEVICE" --teacher-device "$TEACHER_DEVICE" "$@"
}

for k in ${TOPKS//,/ }; do
  out=${DIAG_DIR}_k$k
  if [[ $DRY_RUN == 0 ]]; then mkdir -p "$out/eval_latest"; fi
  score "$k" "$STUDENT_HF" "$out/theta0_metrics.parquet"
  score "$k" "$DIAG_DIR/eval_latest/student_hf" "$out/eval_latest/fixed_context_metrics.parquet" --baseline-metrics "$out/theta0_metrics.parquet"
  run_or_show "$PY" "$TA_OPD_ROOT/tools/analyze_fixed_context_gain.py" --input "$out/eval_latest/fixed_context_metrics.parquet" \
    --output-dir "$out/analysis/gain" --bootstrap "$BOOTSTRAP"
done
