"""Every flag of train.py, in slime's names. Checks are in validation.py, files of flags in config_file.py.

A flag that a released launcher passes and that has nothing to switch here (fused kernels that do not exist in this
tree, for example) is accepted and listed in ACCEPTED_ONLY, so that known command lines keep working.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from slime.backends.megatron_utils.losses.reduction import REDUCTIONS
from slime.backends.megatron_utils.losses.registry import LOSS_TYPES
from slime.backends.sglang_utils.router import POLICIES as ROUTER_POLICIES
from slime.utils import config_file
from ta_opd.errors import ConfigError
from ta_opd.selection import MASK_CHOICES

# Megatron/slime flags of known launchers that decide nothing in this tree: flag -> number of values
ACCEPTED_ONLY = {
    "--no-rope-fusion": 0, "--no-masked-softmax-fusion": 0, "--no-persist-layer-norm": 0,
    "--no-gradient-accumulation-fusion": 0, "--attention-softmax-in-fp32": 0,
    "--attention-dropout": 1, "--hidden-dropout": 1, "--attention-backend": 1, "--megatron-to-hf-mode": 1,
    "--qkv-format": 1, "--balance-data": 0, "--use-kl-loss": 0, "--kl-loss-coef": 1, "--kl-loss-type": 1,
    "--entropy-coef": 1, "--num-gpus-per-node": 1,
    "--swiglu": 0, "--disable-bias-linear": 0, "--add-qkv-bias": 0, "--qk-layernorm": 0, "--group-query-attention": 0,
    "--use-rotary-position-embeddings": 0, "--no-rope-scaling": 0, "--normalization": 1,
    "--position-embedding-type": 1, "--untie-embeddings-and-output-weights": 0, "--sglang-enable-metrics": 0,
    "--use-dynamic-batch-size": 0, "--custom-rm-path": 1, "--custom-reward-post-process-path": 1,
    "--use-rollout-logprobs": 0,  # always so: old log-probs are those of the engine that sampled
}  # fmt: skip
# Those whose value would mean something: what this tree does, and what to use instead. Another value is refused.
_ENTRY_POINTS = ("slime.rollout.on_policy_distillation", "ta_opd.slime_patch.hooks")
ACCEPTED_VALUES = {
    "--attention-dropout": ((0.0,), "dropout is always off: log-probs of the trainer must be those of the engines"),
    "--hidden-dropout": ((0.0,), "dropout is always off: log-probs of the trainer must be those of the engines"),
    "--kl-loss-coef": ((0.0,), "there is no reference model; the divergence from the teacher is weighed by --opd-kl-coef"),
    "--entropy-coef": ((0.0,), "the loss has no entropy term"),
    "--normalization": (("RMSNorm",), "the layers are those of Qwen and Llama models"),
    "--position-embedding-type": (("rope",), "the layers are those of Qwen and Llama models"),
    "--custom-rm-path": (tuple(f"{module}.reward_func" for module in _ENTRY_POINTS),
                         "responses are scored by the teacher; answers of evaluation are checked by --rm-type"),
    "--custom-reward-post-process-path": (tuple(f"{module}.post_process_rewards" for module in _ENTRY_POINTS),
                                          "a selection rule of your own goes by --opd-selector-path"),
}  # fmt: skip
# Shape flags of MODEL_ARGS: the shape comes from the HF config; a value that disagrees with it is refused.
SHAPE_FLAGS = {
    "--num-layers": "num_hidden_layers", "--hidden-size": "hidden_size", "--ffn-hidden-size": "intermediate_size",
    "--num-attention-heads": "num_attention_heads", "--num-query-groups": "num_key_value_heads",
    "--vocab-size": "vocab_size", "--kv-channels": "head_dim", "--rotary-base": "rope_theta", "--norm-epsilon": "rms_norm_eps",
}  # fmt: skip


class _Help(argparse.HelpFormatter):
    """Adds a flag's default where its words do not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, "", argparse.SUPPRESS, []) or isinstance(action.default, bool) or "default" in text:
            return text
        return text + " (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of 200 flags in front of it would hide that."""

    def error(self, message: str):
        raise ConfigError(f"{message.removeprefix('argument ')}; --help explains every flag")


def build_parser() -> argparse.ArgumentParser:
    """The parser of train.py; groups follow the stages of a run."""
    parser = _Parser(
        prog="train.py",
        usage="%(prog)s --hf-checkpoint DIR --teacher-model DIR --prompt-data FILE [flags]",
        description="On-policy distillation with token selection (SGLang, Ray, Megatron-core). --dry-run shows what flags come to and starts nothing.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    for add in (_run, _cluster, _models, _data, _rollout, _sglang, _teacher, _selection, _loss, _optimizer, _parallel,
                _eval, _logging, _compat):  # fmt: skip
        add(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line over `--config` file over defaults. Raises ConfigError for unknown keys in the file."""
    parser = build_parser()
    args = config_file.parse(parser, argv)
    if args.teacher is None:
        args.teacher = []
    return args


def _run(parser):
    g = parser.add_argument_group("run")
    g.add_argument("--config", help="YAML file with flag names as keys; the command line wins")
    g.add_argument("--custom-config-path", help="YAML file whose keys are set on the arguments (slime's hook)")
    g.add_argument("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    g.add_argument("--output-dir", help="directory of this run; default outputs/<run-name>")
    g.add_argument("--run-name", default="opd", help="name used in logs and trackers")
    g.add_argument("--num-rollout", type=int, default=1, help="number of rollouts (steps of the loop) in all")
    g.add_argument("--start-rollout-id", type=int, help="first rollout id; default: after the loaded checkpoint, or 0")
    g.add_argument("--seed", type=int, default=1234, help="seed of the trainer")
    g.add_argument("--debug-rollout-only", action="store_true", help="sample, score and select, but do not train")
    g.add_argument("--save-debug-rollout-data", help="write every rollout to this parquet path, {rollout_id} filled in, or into this directory")
    g.add_argument("--max-restarts", type=int, default=0,
                   help="times that the run starts over from its newest checkpoint after a process of it died (see --save-interval)")  # fmt: skip
    g.add_argument("--trust-remote-code", action="store_true", help="let model directories run their own code")


def _cluster(parser):
    g = parser.add_argument_group("placement")
    g.add_argument("--actor-num-nodes", type=int, default=1, help="nodes of the trainer")
    g.add_argument("--actor-num-gpus-per-node", type=int, default=1, help="trainer ranks a node (processes, on CPU)")
    g.add_argument("--rollout-num-gpus", type=int, help="GPUs of the student engines; default: one engine")
    g.add_argument("--rollout-num-gpus-per-engine", type=int, default=1, help="tensor parallel size of one engine")
    g.add_argument("--colocate", action="store_true", help="engines on the trainer's GPUs")
    g.add_argument("--teacher-num-gpus", type=int, help="GPUs of the teacher servers; default: one server")
    g.add_argument("--teacher-num-gpus-per-engine", type=int, default=1, help="tensor parallel size of one teacher")
    g.add_argument("--teacher-colocate", action="store_true", help="teacher servers on the trainer's GPUs too")
    g.add_argument("--rollout-external-engine-addrs", nargs="+", help="use running student engines at these URLs")


def _models(parser):
    g = parser.add_argument_group("models and checkpoints")
    g.add_argument("--hf-checkpoint", help="HF directory of the student: shape, tokenizer and first weights")
    g.add_argument("--load", help="torch_dist checkpoint directory to resume from (also a converted one)")
    g.add_argument("--ref-load", help="weights to start from where --load holds no checkpoint (slime's name)")
    g.add_argument("--save", help="directory for torch_dist checkpoints; default <output-dir>/checkpoints if --save-interval")
    g.add_argument("--save-interval", type=int, help="rollouts between checkpoints")
    g.add_argument("--save-hf", nargs="?", const="", help="write the final student as an HF directory; default <output-dir>/hf")
    g.add_argument("--no-save-optim", action="store_true", help="leave the optimizer out of checkpoints")
    g.add_argument("--no-load-optim", action="store_true", help="start the optimizer afresh")
    g.add_argument("--keep-checkpoints", type=int, help="keep only the newest N checkpoints")
    g.add_argument("--allow-teacher-change", action="store_true", help="resume although teacher or tokenizer differ")
    g.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local",
                   help="layers in plain torch, or Transformer Engine where it is installed")  # fmt: skip
    g.add_argument("--make-vocab-size-divisible-by", type=int, default=1, help="pad the vocabulary to a multiple (times TP)")


def _data(parser):
    g = parser.add_argument_group("prompts")
    g.add_argument("--prompt-data", help="JSONL or parquet file of prompts")
    g.add_argument("--input-key", default="prompt", help="key of the prompt: a string or a list of chat messages")
    g.add_argument("--label-key", help="key of the reference answer")
    g.add_argument("--metadata-key", default="metadata", help="key of a dict kept with the sample")
    g.add_argument("--teacher-key", default="teacher", help="key that names the teacher of a prompt (with --teacher)")
    g.add_argument("--apply-chat-template", action="store_true", help="format prompts by the tokenizer's chat template")
    g.add_argument("--apply-chat-template-kwargs", type=config_file.json_value, default={}, help="JSON keywords for it")
    g.add_argument("--rollout-shuffle", action="store_true", help="shuffle the prompts anew each epoch")
    g.add_argument("--rollout-seed", type=int, default=42, help="seed of shuffling and sampling")


def _rollout(parser):
    g = parser.add_argument_group("rollout")
    g.add_argument("--rollout-batch-size", type=int, default=4, help="prompts a rollout")
    g.add_argument("--n-samples-per-prompt", type=int, default=1, help="responses a prompt")
    g.add_argument("--rollout-max-prompt-len", type=int, help="longer prompts are refused")
    g.add_argument("--skip-long-prompts", action="store_true", help="leave out training prompts that are too long, and say how many, instead of refusing the file")
    g.add_argument("--rollout-max-response-len", type=int, default=1024, help="most tokens sampled")
    g.add_argument("--rollout-max-context-len", type=int, help="prompt plus response at most; default: the model's")
    g.add_argument("--rollout-temperature", type=float, default=1.0, help="1.0 with a SGLang teacher, which always scores at 1")
    g.add_argument("--rollout-top-p", type=float, default=1.0, help="nucleus sampling")
    g.add_argument("--rollout-top-k", type=int, default=-1, help="sample from the k most likely tokens; -1 = all")
    g.add_argument("--rollout-stop", nargs="+", help="stop strings")
    g.add_argument("--rollout-stop-token-ids", nargs="+", type=int, help="stop token ids; default: the model's end tokens")
    g.add_argument("--over-sampling-batch-size", type=int, help="prompts sampled ahead for the dynamic filter")
    g.add_argument("--dynamic-sampling-filter-path", help="package.module.function(args, samples) -> bool")
    g.add_argument("--partial-rollout", action="store_true", help="carry unfinished responses to the next rollout")
    g.add_argument("--mask-offpolicy-in-partial-rollout", action="store_true", help="no loss on the stale part of a carried response")
    g.add_argument("--custom-generate-function-path", help="own coroutine in the place of the sampler")
    g.add_argument("--rollout-deterministic", action="store_true", help="seed every response by rollout and sample index")


def _sglang(parser):
    g = parser.add_argument_group("sglang", "any flag of sglang.launch_server is passed on as --sglang-<flag> VALUE")
    g.add_argument("--sglang-mem-fraction-static", type=float,
                   help="share of the GPU memory that is free when a student engine starts: its weights and KV cache")
    g.add_argument("--sglang-cuda-graph-max-bs", type=int, help="largest batch with a CUDA graph, student")
    g.add_argument("--sglang-server-concurrency", type=int, default=256, help="requests in flight for one engine")
    g.add_argument("--sglang-dtype", help="dtype of the engines; default bfloat16 on GPU, float32 on CPU")
    g.add_argument("--sglang-passthrough", nargs="*", default=[], help=argparse.SUPPRESS)  # filled by parse, kept in config.yaml
    g.add_argument("--sglang-host", default="127.0.0.1", help="address that servers bind to")
    g.add_argument("--sglang-api-key", help="key of the servers; better in the environment as SLIME_SGLANG_API_KEY; made up when they bind to another address than loopback")
    g.add_argument("--use-sglang-router", action="store_true", help="start sglang-router in front of several student engines")
    g.add_argument("--sglang-router-ip", help="address of a running router for the student's requests; engines are added to it")
    g.add_argument("--sglang-router-port", type=int, help="its port; alone: port of the router that is started, default a free one")
    g.add_argument("--sglang-router-policy", choices=ROUTER_POLICIES, default="cache_aware", help="how that router chooses an engine")
    g.add_argument("--server-start-timeout", type=float, default=900, help="seconds a server may take to start")
    g.add_argument("--weight-sync", choices=("auto", "ipc", "distributed", "disk"), default="auto",
                   help="how weights reach the engines; auto: ipc when colocated, else distributed")  # fmt: skip
    g.add_argument("--update-weight-buffer-size", type=int, default=512 * 2**20, help="bytes of one weight bucket")


def _teacher(parser):
    g = parser.add_argument_group("teacher")
    g.add_argument("--use-opd", action="store_true", default=True, help="on-policy distillation (always on here)")
    g.add_argument("--opd-type", choices=("sglang", "megatron"), default="sglang",
                   help="teacher behind a server, or on the trainer's ranks")  # fmt: skip
    g.add_argument("--rm-url", nargs="+", help="/generate URLs of running teacher servers (replicas of one teacher)")
    g.add_argument("--teacher-model", help="HF directory of the teacher; its server is started for the run")
    g.add_argument("--teacher", action="append", metavar="NAME=URL_OR_DIR", help="one of several named teachers")
    g.add_argument("--opd-teacher-load", help="teacher weights for --opd-type megatron (HF or torch_dist directory)")
    g.add_argument("--opd-teacher-hf", help="HF directory that gives the teacher's shape, when --opd-teacher-load is torch_dist")
    g.add_argument("--opd-teacher-offload", action="store_true", help="keep the Megatron teacher in host memory between its turns")
    g.add_argument("--opd-teacher-ckpt-step", type=int, help="iteration of --opd-teacher-load")
    g.add_argument("--teacher-port", type=int, help="port of the (first) teacher server; default: a free one")
    g.add_argument("--teacher-nccl-port", type=int, help="NCCL port of the (first) teacher server; default: a free one")
    g.add_argument("--teacher-mem-fraction-static", type=float,
                   help="share of the GPU memory that is free when a teacher starts: its weights and KV cache")
    g.add_argument("--teacher-cuda-graph-max-bs", type=int, help="largest batch with a CUDA graph, teacher")
    g.add_argument("--teacher-quantization", metavar="METHOD",
                   help="SGLang's quantization of a teacher that the run starts (fp8: about half the time in its products, other log-probs)")  # fmt: skip
    g.add_argument("--teacher-concurrency", type=int, default=64, help="scoring requests in flight for one teacher")
    g.add_argument("--teacher-timeout", type=float, default=600, help="seconds to wait for a teacher that is away")
    g.add_argument("--request-timeout", type=float, default=600, help="seconds one request may take")
    g.add_argument("--request-retries", type=int, default=5, help="times a failed request is sent again")
    g.add_argument("--score-after-generation", action="store_true", help="score when all responses are done (to compare)")
    g.add_argument("--score-whole-sequence", action="store_true", help="score prompt and response, as the stock client does (to compare)")
    g.add_argument("--topk-as-lists", action="store_true", help="servers handle top-K as a stock SGLang does (to compare)")
    g.add_argument("--skip-probe", action="store_true", help="do not check student against teacher at start")
    g.add_argument("--allow-tokenizer-mismatch", action="store_true", help="go on although the tokenizers differ")


def _selection(parser):
    g = parser.add_argument_group("token metrics and selection")
    g.add_argument("--opd-topk-metrics-k", type=int, default=0, help="K of top-k; 0 = off")
    g.add_argument("--opd-token-bank-dir", help="write the token bank here")
    g.add_argument("--opd-token-bank-format", choices=("parquet", "csv", "jsonl"), default="parquet", help="file format of the bank")
    g.add_argument("--opd-token-bank-raw-topk", action="store_true", help="keep the raw top-k arrays in the bank")
    g.add_argument("--opd-token-bank-pair-id", default="", help="label of the teacher-student pair in the bank")
    g.add_argument("--opd-exact-cmass", action="store_true", help="ask the teacher for its mass on the student's top-K")
    g.add_argument("--opd-exact-cmass-max-union", type=int, default=4096, help="most ids of one scoring request")
    g.add_argument("--opd-exact-cmass-overflow", choices=("fallback", "truncate", "error"), default="fallback",
                   help="when one request would exceed --opd-exact-cmass-max-union")  # fmt: skip
    g.add_argument("--opd-exact-cmass-window", type=int, help="positions scored together; default: chosen by measurement")
    g.add_argument("--opd-teacher-name", help="label in the bank; default: the teacher's directory or URL")
    g.add_argument("--opd-student-name", help="label in the bank; default: the student's directory")
    g.add_argument("--opd-budget-mask", default="none", metavar="MASK", help="one of " + ", ".join(MASK_CHOICES))
    g.add_argument("--opd-budget-ratio", type=float, default=1.0, help="share of valid tokens kept, (0, 1]")
    g.add_argument("--opd-budget-gamma", type=float, default=0.5, help="entropy share of split_budget_ca")
    g.add_argument("--opd-budget-mask-seed", type=int, default=42, help="seed of the random mask, joined with the rollout id")
    g.add_argument("--opd-budget-min-keep-per-sample", type=int, default=1, help="tokens that every response keeps; 0 = off")
    g.add_argument("--opd-compat-proxy", choices=("mass", "set", "bc", "prefix_ema"), default="mass", help="what measures compatibility C")
    g.add_argument("--opd-compat-prefix-ema-alpha", type=float, default=0.9, help="decay of prefix_ema")
    g.add_argument("--opd-profile", choices=("paper", "released"), default="paper",
                   help="sets the defaults of the flags below; a selector of another paper brings its own")  # fmt: skip
    g.add_argument("--opd-metric-normalization", choices=("batch_quantile", "batch_minmax", "none"),
                   help="how H, D and C are brought to [0, 1]; usually batch_quantile")  # fmt: skip
    g.add_argument("--opd-metric-q-low", type=float, help="lower quantile; usually 0.05")
    g.add_argument("--opd-metric-q-high", type=float, help="upper quantile; usually 0.95")
    g.add_argument("--opd-metric-population", choices=("valid", "all"), help="positions that statistics are taken over")
    g.add_argument("--opd-divergence-support", choices=("union_floor", "union_tail", "exact"), help="support of D")
    g.add_argument("--opd-softor-source", choices=("dlearn", "dc"), help="what ca_softor joins to entropy")
    g.add_argument("--opd-quadrant-cut", choices=("rank", "median"), help="how the quadrants are cut")
    g.add_argument("--opd-budget-scope", choices=("batch", "response"), help="population that shares one budget")
    g.add_argument("--opd-budget-rounding", choices=("ceil", "floor", "float_ceil"), help="of valid tokens x ratio")
    g.add_argument("--opd-budget-min-keep-rule", choices=("inside", "on_top"), help="min-keep inside or on top of the budget")
    g.add_argument("--opd-budget-min-keep-score", choices=("own", "ca_softor"), help="score that min-keep goes by")
    g.add_argument("--opd-budget-low-ties", choices=("earlier", "later"), help="who wins a tie of a lowest-first mask")
    g.add_argument("--opd-budget-random-source", choices=("rollout", "shuffle"), help="random mask: keyed by rollout, or released")
    g.add_argument("--opd-budget-reported-score", choices=("ranking", "released"), help="what the column budget_score holds")
    g.add_argument("--opd-selector-path", help="own selector: package.module:function or file.py:function")


def _loss(parser):
    g = parser.add_argument_group("loss")
    g.add_argument("--opd-loss-type", choices=LOSS_TYPES, default="sampled_reverse_kl", help="divergence that is trained")
    g.add_argument("--opd-loss-rows", choices=("kept", "all"), default="kept", help="rows that meet the vocabulary matrix")
    g.add_argument("--opd-last-layer-rows", choices=("kept", "mlp", "all"), default="kept",
                   help="what the last layer computes for the rows of the loss only: its queries and MLP, its MLP, nothing")  # fmt: skip
    g.add_argument("--opd-loss-reduction", choices=REDUCTIONS, help="default kept_token_mean; sample_mean in profile released")
    g.add_argument("--opd-topk-support", choices=("teacher", "student"), default="teacher", help="candidates of topk losses")
    g.add_argument("--opd-jsd-beta", type=float, default=0.5, help="weight of the teacher in the mixture of jsd losses")
    g.add_argument("--opd-kl-coef", type=float, default=1.0, help="factor of the distillation term")
    g.add_argument("--opd-recompute-student", action="store_true", help="student log-probs under the current weights")
    g.add_argument("--opd-log-valid-kl", choices=("auto", "on", "off"), default="auto",
                   help="also compute the trained divergence over all valid tokens; auto: where the vocabulary is small")  # fmt: skip
    g.add_argument("--advantage-estimator", choices=("grpo", "reinforce_plus_plus"), default="grpo", help="base advantage")
    g.add_argument("--normalize-advantages", action="store_true", help="whiten advantages over valid tokens")
    g.add_argument("--gamma", type=float, default=1.0, help="discount of reinforce_plus_plus")
    g.add_argument("--eps-clip", type=float, default=0.2, help="lower clip of the importance ratio")
    g.add_argument("--eps-clip-high", type=float, default=0.28, help="upper clip of the importance ratio")
    g.add_argument("--eps-clip-c", type=float, help="dual clip of the ratio for negative advantages; default off")
    g.add_argument("--calculate-per-token-loss", action="store_true", help="same as --opd-loss-reduction kept_token_mean")
    g.add_argument("--loss-chunk-rows", type=int, help="rows of one LM-head chunk; default: by bytes of logits")
    g.add_argument("--skip-nan-steps", action="store_true", help="skip a step whose loss is not finite instead of stopping")


def _optimizer(parser):
    g = parser.add_argument_group("optimizer")
    g.add_argument("--optimizer", choices=("adam",), default="adam", help="AdamW with decoupled decay")
    g.add_argument("--lr", type=float, default=1e-6, help="peak learning rate")
    g.add_argument("--min-lr", type=float, default=0.0, help="learning rate at the end of the decay")
    g.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine"), default="constant", help="decay of the rate")
    g.add_argument("--lr-warmup-iters", type=int, default=0, help="optimizer steps of warm-up")
    g.add_argument("--lr-decay-iters", type=int, help="optimizer steps of the decay; default: the whole run")
    g.add_argument("--weight-decay", type=float, default=0.1, help="not applied to norms and biases")
    g.add_argument("--adam-beta1", type=float, default=0.9, help="decay of the first moment")
    g.add_argument("--adam-beta2", type=float, default=0.98, help="decay of the second moment")
    g.add_argument("--adam-eps", type=float, default=1e-8, help="added to the root of the second moment")
    g.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0 = off")
    g.add_argument("--global-batch-size", type=int, help="samples an optimizer step; default: the whole rollout")
    g.add_argument("--micro-batch-size", type=int, default=1, help="samples a micro-batch where packing is off")
    g.add_argument("--max-tokens-per-gpu", type=int, default=8192, help="tokens packed into one micro-batch")


def _parallel(parser):
    g = parser.add_argument_group("megatron")
    g.add_argument("--tensor-model-parallel-size", type=int, default=1, help="TP")
    g.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="PP")
    g.add_argument("--context-parallel-size", type=int, default=1, help="CP")
    g.add_argument("--expert-model-parallel-size", type=int, default=1, help="EP, for MoE models")
    g.add_argument("--expert-tensor-parallel-size", type=int, help="TP inside the experts; default: TP")
    g.add_argument("--sequence-parallel", action="store_true", help="split activations of norms over TP")
    g.add_argument("--use-distributed-optimizer", action="store_true", help="split optimizer state over DP")
    g.add_argument("--overlap-grad-reduce", action="store_true", help="reduce gradients during the backward pass")
    g.add_argument("--overlap-param-gather", action="store_true", help="gather parameters during the forward pass")
    g.add_argument("--accumulate-allreduce-grads-in-fp32", action=argparse.BooleanOptionalAction, default=True,
                   help="gradient buffers of a bf16 model in fp32; --no-...: in bf16, 2 bytes a parameter less")  # fmt: skip
    g.add_argument("--optimizer-cpu-offload", action="store_true",
                   help="optimizer state (12 bytes a parameter) in page-locked host memory; it passes through the GPU in each step")  # fmt: skip
    g.add_argument("--recompute-granularity", choices=("full", "selective"), help="activations computed again in the backward pass")
    g.add_argument("--recompute-method", choices=("uniform", "block"), help="which layers --recompute-granularity full covers")
    g.add_argument("--recompute-modules", nargs="+", help="what --recompute-granularity selective covers")
    g.add_argument("--moe-aux-loss-coeff", type=float, default=0.0, help="weight of the load-balancing loss of models with experts, a mean over the step's tokens")
    g.add_argument("--recompute-num-layers", type=int, help="layers of one recomputed block")
    g.add_argument("--bf16", action="store_true", help="default on GPU")
    g.add_argument("--fp32", action="store_true", help="default on CPU")


def _eval(parser):
    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval-interval", type=int, help="rollouts between evaluations; also at start and end")
    g.add_argument("--eval-prompt-data", nargs="+", metavar="NAME FILE", help="pairs of data set name and prompt file")
    g.add_argument("--eval-config", help="YAML file of data sets with sampling parameters and an answer check of their own")
    g.add_argument("--eval-input-key", help="default --input-key")
    g.add_argument("--eval-label-key", help="default --label-key")
    g.add_argument("--n-samples-per-eval-prompt", type=int, default=1, help="answers a prompt")
    g.add_argument("--eval-temperature", type=float, default=0.0, help="0 = greedy")
    g.add_argument("--eval-top-p", type=float, default=1.0, help="nucleus sampling in evaluation")
    g.add_argument("--eval-top-k", type=int, default=-1, help="top-k sampling in evaluation; -1 = all")
    g.add_argument("--eval-max-response-len", type=int, help="default --rollout-max-response-len")
    g.add_argument("--skip-eval-before-train", action="store_true", help="no evaluation of the initial student")
    g.add_argument("--rm-type", default="exact", help="answer check of evaluation: exact, last_number or math")


def _logging(parser):
    g = parser.add_argument_group("logging")
    g.add_argument("--use-tensorboard", action=argparse.BooleanOptionalAction, default=True, help="write TensorBoard files")
    g.add_argument("--tensorboard-dir", help="default <output-dir>/tensorboard")
    g.add_argument("--use-wandb", action="store_true", help="log to wandb (not installed by default)")
    g.add_argument("--wandb-project", default="ta-opd", help="wandb project")
    g.add_argument("--wandb-group", help="wandb group")
    g.add_argument("--trace", action="store_true", help="write a Chrome trace of the run's phases")


def _compat(parser):
    g = parser.add_argument_group("accepted for known launchers", "shape flags must agree with the HF config")
    for flag, values in ACCEPTED_ONLY.items():
        kwargs = {"action": "store_true"} if values == 0 else {}
        g.add_argument(flag, help=argparse.SUPPRESS, **kwargs)
    for flag in SHAPE_FLAGS:
        g.add_argument(flag, type=float, help=argparse.SUPPRESS)
