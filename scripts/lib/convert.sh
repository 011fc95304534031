# shellcheck shell=bash
# What the checkpoint converters share.

to_torch_dist() { # NAME is the default of the directory names
  group "Hugging Face -> torch_dist"
  var SLIME_DIR dir "\$TA_OPD_ROOT/slime_ta_opd" "directory of train.py"
  var MEGATRON_LM_DIR dir? "" "a Megatron-LM checkout to use in the place of the installed megatron-core"
  var PY str? "" "Python to use; empty: .venv of this project, else python3"
  var HF_MODEL model "" "Hugging Face directory to convert"
  var SAVE_DIR out "\$TA_OPD_ROOT/outputs/checkpoints/${NAME}_torch_dist" "directory of the checkpoint"
  var NPROC_PER_NODE int:1 1 "processes of torchrun"
  var MASTER_PORT port 29617 "port of torchrun, or auto"
  var FORCE bool 0 "convert again; the old directory is kept as SAVE_DIR.bak.TIME"
  var CHECK_ONLY bool 0 "check model and environment, convert nothing"
  var EXTRA_MEGATRON_ARGS list? "" "accepted for known command lines; nothing of it applies here"
  var DRY_RUN choice:0,1 0 "print the exact command"
  launcher_init "$@"
  if [[ -e $SAVE_DIR/latest_checkpointed_iteration.txt && $FORCE$CHECK_ONLY == 00 ]]; then
    bad SAVE_DIR "a directory without a checkpoint (FORCE=1 converts again)"
  fi
  stop_on_errors
  use_python
  local -a command=("$PY")
  if ((NPROC_PER_NODE > 1)); then
    command+=(-m torch.distributed.run --nproc-per-node "$NPROC_PER_NODE")
    if [[ $MASTER_PORT != auto ]]; then command+=(--master-port "$MASTER_PORT"); fi
  fi
  command+=("$TA_OPD_ROOT/tools/convert_hf_to_torch_dist.py" --hf-checkpoint "$HF_MODEL" --save "$SAVE_DIR")
  if [[ $CHECK_ONLY == 1 ]]; then command+=(--check-only); fi
  if [[ $FORCE == 1 && $CHECK_ONLY == 0 && -e $SAVE_DIR ]]; then run_or_show mv -- "$SAVE_DIR" "$SAVE_DIR.bak.$TIMESTAMP"; fi
  run_or_show "${command[@]}"
}

to_hf() {
  group "torch_dist -> Hugging Face"
  var PY str? "" "Python to use; empty: .venv of this project, else python3"
  var CHECKPOINT_ROOT dir "" "directory with latest_checkpointed_iteration.txt (SAVE_DIR of a run)"
  var ITERATION str latest "latest, or a number"
  var ORIGIN_HF_DIR model "" "Hugging Face directory of the student: configuration and tokenizer"
  var OUTPUT_DIR out "\$CHECKPOINT_ROOT/hf_\$ITERATION" "directory of the Hugging Face checkpoint"
  var FORCE bool 0 "replace OUTPUT_DIR"
  var DRY_RUN choice:0,1 0 "print the exact command"
  launcher_init "$@"
  if [[ ! $ITERATION =~ ^(latest|[0-9]+)$ ]]; then bad ITERATION "latest or a number"; fi
  if [[ ! -f $CHECKPOINT_ROOT/latest_checkpointed_iteration.txt ]]; then
    bad CHECKPOINT_ROOT "a checkpoint directory (with latest_checkpointed_iteration.txt)"
  fi
  stop_on_errors
  use_python
  local -a command=("$PY" "$TA_OPD_ROOT/tools/convert_megatron_checkpoint_to_hf.py" --checkpoint-root "$CHECKPOINT_ROOT"
    --iteration "$ITERATION" --origin-hf-dir "$ORIGIN_HF_DIR" --output-dir "$OUTPUT_DIR")
  if [[ $FORCE == 1 ]]; then command+=(--force); fi
  run_or_show "${command[@]}"
}
