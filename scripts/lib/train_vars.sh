# shellcheck shell=bash
# The variables of training, each declared once for all launchers. Names are those of the released launchers; what those
# hard-coded is a variable here. A launcher changes a default with `preset` before it calls these functions.

vars_paths() {
  group "Where things are"
  var SLIME_DIR dir "\$TA_OPD_ROOT/slime_ta_opd" "directory of train.py"
  var MEGATRON_LM_DIR dir? "" "a Megatron-LM checkout to use in the place of the installed megatron-core"
  var PY str? "" "Python to use; empty: .venv of this project, else python3"
  var CONDA_SH file? "" "conda.sh to source first; empty: no conda"
  var CONDA_ENV str "verl" "conda environment to activate, only with CONDA_SH"
  var FALLBACK_SITE_PACKAGES dir? "" "searched for packages that the environment lacks"
  var OUTPUT_ROOT out "\$TA_OPD_ROOT/outputs" "everything is written below this directory"
  var LOG_DIR out "\$OUTPUT_ROOT/logs" "logs of the launchers"
}

vars_models() {
  group "Models"
  var TEACHER_MODEL model? "" "Hugging Face directory of the teacher; its server is started for the run" --teacher-model
  var TEACHER_URL list? "" "/generate addresses of running teacher servers (replicas); then no server is started" --rm-url
  var TEACHERS list? "" "several named teachers: NAME=ADDRESS_OR_DIRECTORY, space separated"
  var STUDENT_URL list? "" "addresses of running student engines, which get the weight updates; then none is started" --rollout-external-engine-addrs
  var STUDENT_HF model "" "Hugging Face directory of the student: shape, tokenizer, first weights" --hf-checkpoint
  var STUDENT_TORCH_DIST dir? "" "converted torch_dist checkpoint to start from; empty: the weights of STUDENT_HF"
  var MODEL_SHAPE name? "" "name in scripts/models to check the student's shape against; empty: no check"
  var ALLOW_TOKENIZER_MISMATCH bool 0 "go on although teacher and student tokenizers differ" --allow-tokenizer-mismatch
  var ALLOW_TEACHER_CHANGE bool 0 "resume although the teacher, its address, or the tokenizer is another one" --allow-teacher-change
}

vars_data() {
  group "Prompts"
  var DATA_DIR str "\$OUTPUT_ROOT/data" "directory of PROMPT_DATA's default"
  var PROMPT_DATA file "\$DATA_DIR/train.parquet" "JSONL or parquet file of prompts" --prompt-data
  var INPUT_KEY str "prompt" "key of the prompt (a string or chat messages)" --input-key
  var LABEL_KEY str? "" "key of the reference answer; empty: none" --label-key
  var APPLY_CHAT_TEMPLATE bool 1 "format prompts by the tokenizer's chat template" --apply-chat-template
  var CHAT_TEMPLATE_KWARGS str? "" "JSON keywords for the template, such as {\"enable_thinking\": false}" --apply-chat-template-kwargs
  var ROLLOUT_SHUFFLE bool 1 "shuffle the prompts anew each epoch" --rollout-shuffle
}

vars_devices() {
  group "Devices"
  var DEVICE choice:auto,gpu,cpu auto "auto: GPUs where nvidia-smi finds any, else CPU; on CPU the GPU ids are ignored"
  var TEACHER_GPU gpus 7 "GPU ids of the teacher server; ids that are in RAY_GPUS are shared with training"
  var RAY_GPUS gpus 0,1,2 "GPU ids of training and student engines"
  var ACTOR_NUM_NODES int:1 1 "nodes of the trainer (more than one needs RAY_ADDRESS)" --actor-num-nodes
  var ACTOR_NUM_GPUS_PER_NODE int:1 2 "trainer ranks a node (processes, on CPU)" --actor-num-gpus-per-node
  var ROLLOUT_NUM_GPUS int:1 1 "GPUs of the student engines" --rollout-num-gpus
  var ROLLOUT_NUM_GPUS_PER_ENGINE int:1 1 "tensor parallel size of one student engine" --rollout-num-gpus-per-engine
  var TEACHER_NUM_GPUS_PER_ENGINE int:1 1 "tensor parallel size of one teacher server" --teacher-num-gpus-per-engine
  var COLOCATE bool 0 "student engines share the trainer's GPUs" --colocate
}

vars_parallel() {
  group "Model parallelism"
  var TENSOR_MODEL_PARALLEL_SIZE int:1 1 "TP of the trainer" --tensor-model-parallel-size
  var PIPELINE_MODEL_PARALLEL_SIZE int:1 1 "PP of the trainer" --pipeline-model-parallel-size
  var CONTEXT_PARALLEL_SIZE int:1 1 "CP of the trainer" --context-parallel-size
  var EXPERT_MODEL_PARALLEL_SIZE int:1 1 "EP of the trainer" --expert-model-parallel-size
  var SEQUENCE_PARALLEL bool 0 "sequence parallelism (with TP)" --sequence-parallel
  var USE_DISTRIBUTED_OPTIMIZER bool 0 "shard the optimizer over data-parallel ranks" --use-distributed-optimizer
  var OPTIMIZER_CPU_OFFLOAD bool 0 "optimizer state in host memory" --optimizer-cpu-offload
  var MAX_TOKENS_PER_GPU int:1? "" "tokens packed into one micro-batch; empty: train.py's default" --max-tokens-per-gpu
  var RECOMPUTE_GRANULARITY choice:full,selective? full "activation recomputation; empty: none" --recompute-granularity
  var RECOMPUTE_METHOD choice:uniform,block? uniform "how layers are grouped for it" --recompute-method
  var RECOMPUTE_NUM_LAYERS int:1? 1 "layers of one group" --recompute-num-layers
}

vars_ray() {
  group "Ray and ports"
  var RAY_ADDRESS str? "" "host:port of a cluster to join, or http://host:port of its job server; empty: a Ray of this run alone"
  var RAY_JOB_ID name? "" "submission id at a job server; empty: RUN_NAME and a time stamp"
  var MASTER_ADDR str 127.0.0.1 "address that a Ray head of this run binds to"
  var TEACHER_IP str? "" "address that the servers of this run bind to; another one than loopback gets an API key; empty: loopback" --sglang-host
  var TEACHER_PORT port auto "port of the teacher server"
  var TEACHER_NCCL_PORT port auto "port of the teacher's own process group"
  var RAY_PORT port auto "a number starts a Ray head on that port for this run (auto: none is needed)"
  var RAY_DASHBOARD_PORT port auto "dashboard and job server of that head"
  var RAY_OBJECT_MANAGER_PORT port auto "object manager of that head"
  var RAY_NODE_MANAGER_PORT port auto "node manager of that head"
  var RAY_DASHBOARD_AGENT_LISTEN_PORT port auto "dashboard agent of that head"
  var RAY_DASHBOARD_AGENT_GRPC_PORT port auto "dashboard agent (gRPC) of that head"
  var RAY_METRICS_EXPORT_PORT port auto "metrics of that head"
  var RAY_TEMP_DIR str? "" "session directory of that head; empty: a new one in /tmp"
}

vars_sizes() {
  group "Sizes"
  var NUM_ROLLOUT int:1 2 "rollouts (steps of the loop) in all" --num-rollout
  var ROLLOUT_BATCH_SIZE int:1 4 "prompts a rollout" --rollout-batch-size
  var N_SAMPLES_PER_PROMPT int:1 2 "responses a prompt" --n-samples-per-prompt
  var GLOBAL_BATCH_SIZE int:1 8 "samples an optimizer step" --global-batch-size
  var MICRO_BATCH_SIZE int:1 1 "samples a micro-batch where packing is off" --micro-batch-size
  var ROLLOUT_MAX_RESPONSE_LEN int:1 1024 "most tokens of a response" --rollout-max-response-len
  var ROLLOUT_MAX_PROMPT_LEN int:1? "" "longer prompts are refused; empty: no limit" --rollout-max-prompt-len
  var SKIP_LONG_PROMPTS bool 0 "leave out training prompts that are too long instead of refusing the file" --skip-long-prompts
  var ROLLOUT_MAX_CONTEXT_LEN int:1? "" "prompt plus response at most; empty: the model's limit" --rollout-max-context-len
  var ROLLOUT_TEMPERATURE "float:(0,]" 1.0 "sampling temperature; 1.0 with a SGLang teacher" --rollout-temperature
  var SEED int:0 1234 "seed of the trainer" --seed
  var ROLLOUT_SEED int:0 42 "seed of shuffling and sampling" --rollout-seed
  var OPD_BUDGET_MASK_SEED int:0 42 "seed of the random mask" --opd-budget-mask-seed
  group "Servers"
  var TEACHER_MEM_FRACTION "float:(0,1)" 0.55 "GPU memory fraction of the teacher server" --teacher-mem-fraction-static
  var TEACHER_CUDA_GRAPH_MAX_BS int:1 8 "largest batch with a CUDA graph, teacher" --teacher-cuda-graph-max-bs
  var TEACHER_QUANTIZATION str? "" "SGLang's quantization of a teacher that the run starts, such as fp8" --teacher-quantization
  var ROLLOUT_MEM_FRACTION "float:(0,1)" 0.45 "GPU memory fraction of a student engine" --sglang-mem-fraction-static
  var USE_SGLANG_ROUTER bool 0 "sglang-router in front of several student engines" --use-sglang-router
  var SGLANG_CUDA_GRAPH_MAX_BS int:1 8 "largest batch with a CUDA graph, student" --sglang-cuda-graph-max-bs
}

vars_loss() {
  group "Loss and optimizer"
  var OPD_TYPE choice:sglang,megatron sglang "where the teacher runs" --opd-type
  var OPD_TEACHER_LOAD dir? "" "weights of a Megatron teacher (Hugging Face or torch_dist directory)" --opd-teacher-load
  var OPD_TEACHER_HF model? "" "Hugging Face directory of a torch_dist teacher: shape and tokenizer" --opd-teacher-hf
  var OPD_TEACHER_OFFLOAD bool 0 "keep the Megatron teacher's weights in host memory between uses" --opd-teacher-offload
  var OPD_TEACHER_CKPT_STEP int:0? "" "iteration of OPD_TEACHER_LOAD; empty: the latest" --opd-teacher-ckpt-step
  var OPD_LOSS_TYPE "choice:sampled_reverse_kl,topk_reverse_kl,topk_forward_kl,topk_jsd,topk_reverse_kl_truncated,topk_forward_kl_truncated,\
full_reverse_kl,full_forward_kl,full_jsd" sampled_reverse_kl "loss on the kept tokens" --opd-loss-type
  var OPD_LOSS_ROWS choice:kept,all kept "rows that meet the vocabulary matrix" --opd-loss-rows
  var OPD_LOSS_REDUCTION choice:kept_token_mean,sample_mean,valid_token_mean? "" "denominator of the loss; empty: that of OPD_PROFILE" --opd-loss-reduction
  var OPD_TOPK_SUPPORT choice:teacher,student teacher "candidates of the top-k losses" --opd-topk-support
  var OPD_JSD_BETA "float:[0,1]" 0.5 "weight of the teacher in the mixture of jsd losses" --opd-jsd-beta
  var OPD_RECOMPUTE_STUDENT bool 0 "student log-probs under the current weights" --opd-recompute-student
  var OPD_LOG_VALID_KL choice:auto,on,off auto "also log the trained divergence over all valid tokens" --opd-log-valid-kl
  var OPD_KL_COEF "float:[0,]" 1.0 "weight of the divergence" --opd-kl-coef
  var EPS_CLIP "float:(0,)" 0.2 "lower clip range of the ratio" --eps-clip
  var EPS_CLIP_HIGH "float:(0,)" 0.28 "upper clip range of the ratio" --eps-clip-high
  var LR "float:(0,)" 1e-6 "learning rate" --lr
  var MIN_LR "float:[0,)" 0 "floor of a decaying learning rate" --min-lr
  var LR_DECAY_STYLE choice:constant,linear,cosine constant "schedule of the learning rate" --lr-decay-style
  var LR_WARMUP_ITERS int:0 0 "optimizer steps of warm-up" --lr-warmup-iters
  var WEIGHT_DECAY "float:[0,)" 0.1 "weight decay" --weight-decay
  var ADAM_BETA1 "float:[0,1)" 0.9 "beta 1 of Adam" --adam-beta1
  var ADAM_BETA2 "float:[0,1)" 0.98 "beta 2 of Adam" --adam-beta2
  var CLIP_GRAD "float:[0,)" 1.0 "largest gradient norm" --clip-grad
}

vars_selection() {
  group "Token metrics and selection"
  var OPD_BUDGET_MASK str none "selection rule, by mask or alias (docs/method_entrypoints.md)" @--opd-budget-mask
  var OPD_BUDGET_RATIO ratio 1.0 "share of the valid tokens that are kept" @--opd-budget-ratio
  vars_selection_common
}

vars_selection_common() { # all but rule and ratio, which a suite sets row by row
  var OPD_BUDGET_GAMMA "float:[0,1]" 0.5 "entropy share of split_budget_ca" @--opd-budget-gamma
  var OPD_TOPK_METRICS_K int:0 0 "K of top-k; with a mask, an own rule or a bank, 0 becomes 16" @--opd-topk-metrics-k
  var OPD_TOKEN_BANK_DIR str? "" "token bank; with a mask, an own rule or K, empty becomes SAVE_DIR/token_bank" @--opd-token-bank-dir
  var OPD_TOKEN_BANK_FORMAT choice:csv,jsonl,parquet csv "format of the token bank" @--opd-token-bank-format
  var OPD_TOKEN_BANK_RAW_TOPK bool 0 "keep raw top-k ids and log-probs in the bank" @--opd-token-bank-raw-topk
  var OPD_TOKEN_BANK_PAIR_ID str? "" "label of the pair in the bank; empty: made of the two directory names" @--opd-token-bank-pair-id
  var OPD_EXACT_CMASS bool 0 "ask the teacher for its mass on the student's top-K" @--opd-exact-cmass
  var OPD_EXACT_CMASS_MAX_UNION int:1 4096 "most ids of one scoring request" @--opd-exact-cmass-max-union
  var OPD_EXACT_CMASS_OVERFLOW choice:fallback,truncate,error fallback "what to do with more ids" @--opd-exact-cmass-overflow
  var OPD_COMPAT_PROXY choice:mass,set,bc,prefix_ema mass "which C enters the scores" @--opd-compat-proxy
  var OPD_COMPAT_PREFIX_EMA_ALPHA "float:[0,1]" 0.9 "decay of prefix_ema" @--opd-compat-prefix-ema-alpha
  var OPD_METRIC_NORMALIZATION choice:batch_quantile,batch_minmax,none batch_quantile "how H, D and C are normalised" @--opd-metric-normalization
  var OPD_METRIC_Q_LOW "float:[0,1)" 0.05 "lower quantile of batch_quantile" @--opd-metric-q-low
  var OPD_METRIC_Q_HIGH "float:(0,1]" 0.95 "upper quantile of batch_quantile" @--opd-metric-q-high
  var OPD_BUDGET_MIN_KEEP_PER_SAMPLE int:0 1 "tokens kept in every sample at least" @--opd-budget-min-keep-per-sample
  var OPD_PROFILE choice:paper,released paper "defaults of the next eleven: the paper's or the released code's" @--opd-profile
  var OPD_METRIC_POPULATION choice:valid,all? "" "positions that statistics are taken over" @--opd-metric-population
  var OPD_SOFTOR_SOURCE choice:dlearn,dc? "" "what ca_softor joins to entropy" @--opd-softor-source
  var OPD_BUDGET_SCOPE choice:batch,response? "" "population that shares one budget" @--opd-budget-scope
  var OPD_BUDGET_MIN_KEEP_RULE choice:inside,on_top? "" "min-keep inside the budget or on top of it" @--opd-budget-min-keep-rule
  var OPD_DIVERGENCE_SUPPORT choice:union_floor,union_tail,exact? "" "support of D" @--opd-divergence-support
  var OPD_QUADRANT_CUT choice:rank,median? "" "how the quadrants are cut" @--opd-quadrant-cut
  var OPD_BUDGET_ROUNDING choice:ceil,floor,float_ceil? "" "rounding of valid tokens x ratio" @--opd-budget-rounding
  var OPD_BUDGET_MIN_KEEP_SCORE choice:own,ca_softor? "" "score that min-keep goes by" @--opd-budget-min-keep-score
  var OPD_BUDGET_LOW_TIES choice:earlier,later? "" "who wins a tie of a lowest-first mask" @--opd-budget-low-ties
  var OPD_BUDGET_RANDOM_SOURCE choice:rollout,shuffle? "" "random mask: keyed by rollout, or as released" @--opd-budget-random-source
  var OPD_BUDGET_REPORTED_SCORE choice:ranking,released? "" "what the column budget_score holds" @--opd-budget-reported-score
  var OPD_EXACT_CMASS_WINDOW int:1? "" "positions scored together; empty: chosen by measurement" @--opd-exact-cmass-window
  var OPD_TEACHER_NAME str? "" "label in the bank; empty: the teacher's directory or address" @--opd-teacher-name
  var OPD_STUDENT_NAME str? "" "label in the bank; empty: the student's directory" @--opd-student-name
  var OPD_SELECTOR_PATH str? "" "own selector in the place of OPD_BUDGET_MASK: package.module:function or file.py:function" @--opd-selector-path
}

vars_evaluation() {
  group "Evaluation during training"
  var EVAL_PROMPT_DATA list? "" "pairs NAME FILE of held-out prompts; empty: no evaluation" --eval-prompt-data
  var EVAL_CONFIG file? "" "YAML file of held-out sets with sampling parameters and a check of their own (docs/services.md)" --eval-config
  var EVAL_INTERVAL int:1? "" "rollouts between evaluations; empty with EVAL_PROMPT_DATA or EVAL_CONFIG: NUM_ROLLOUT" --eval-interval
  var N_SAMPLES_PER_EVAL_PROMPT int:1 1 "responses an evaluation prompt" --n-samples-per-eval-prompt
  var EVAL_TEMPERATURE "float:[0,]" 0 "temperature of evaluation" --eval-temperature
  var EVAL_MAX_RESPONSE_LEN int:1? "" "most tokens of an evaluation response" --eval-max-response-len
  var RM_TYPE str exact "answer check: exact, last_number or math" --rm-type
}

vars_written() {
  group "What is written"
  var SAVE_INTERVAL int:1? 1 "rollouts between checkpoints; empty: none" --save-interval
  var SAVE_HF bool 0 "write the final student as a Hugging Face directory, SAVE_DIR/hf" --save-hf
  var SAVE_DEBUG_ROLLOUT_DATA bool 0 "write every rollout below SAVE_DIR/debug_rollout"
  var DEBUG_ROLLOUT_ONLY bool 0 "sample, score and select, but do not train" --debug-rollout-only
  var USE_WANDB bool 0 "also log to wandb" --use-wandb
  var WANDB_PROJECT str ta-opd "project there" --wandb-project
}

vars_how() {
  group "How to run"
  var ASYNC bool 0 "sample the next rollout while this one trains (train_async.py): faster, and one step off-policy"
  var DRY_RUN choice:0,1,plan 0 "1: print the exact commands; plan: also let train.py print its resolved plan"
  var RESUME bool 1 "go on from the newest checkpoint in SAVE_DIR"
  var ALLOW_GLOBAL_RAY_STOP bool 0 "accepted and ignored: a launcher stops what it started and nothing else"
}

vars_training() { # everything but the names of one run
  vars_paths
  vars_models
  vars_data
  vars_devices
  vars_parallel
  vars_ray
  vars_sizes
  vars_loss
  vars_evaluation
  vars_written
  vars_how
}
