#!/usr/bin/env bash
# The paper's six benchmarks: AIME24, AIME25, GPQA-Diamond, HumanEval, IFEval, MATH-500; five seeds, sampled.
# shellcheck source=scripts/lib/run.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/run.sh"
# shellcheck source=scripts/lib/eval.sh
source "$TA_OPD_ROOT/scripts/lib/eval.sh"

about "The paper's six benchmarks: AIME24, AIME25, GPQA-Diamond, HumanEval, IFEval, MATH-500; five seeds, sampled."
EVAL_NAME=downstream_paper_six
preset TASKS aime24,aime25,gpqa_diamond_cot_zeroshot,humaneval_instruct,ifeval,minerva_math500
preset NUM_FEWSHOT 0
preset MAX_GEN_TOKS 4096
preset TEMPERATURE 0.6
preset TOP_P 0.95
preset EVAL_SEEDS "1 2 3 4 5"
eval_run "$@"
