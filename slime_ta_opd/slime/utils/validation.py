"""Checks of a resolved command line, before anything heavy starts; derived defaults are filled in here.

Every check raises ConfigError or DataError with what was expected, what came and what to do.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import secrets
import sys
from pathlib import Path

import torch

from slime.backends.megatron_utils.hf_config import check_layout, model_shape
from slime.backends.sglang_utils.secret import API_KEY_VARIABLE, hide
from slime.backends.sglang_utils.server import check_port, is_loopback
from slime.observability.trackers import check_wandb
from slime.rollout.data_source import PromptDataSource
from slime.rollout.dump import dump_path
from slime.rollout.eval_sets import args_of, read_eval_sets
from slime.utils.arguments import ACCEPTED_VALUES, SHAPE_FLAGS
from slime.utils.misc import load_tokenizer
from slime.utils.model_dirs import check_tokenizer_files, check_weights, read_model_config
from ta_opd.errors import ConfigError, DataError
from ta_opd.selection import MASK_CHOICES, SelectionConfig

NO_SELECTION = ("none", "full")


def validate(args: argparse.Namespace) -> argparse.Namespace:
    """Fills derived values in and checks everything that needs no server. Returns `args`."""
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.output_dir is None:
        args.output_dir = str(Path("outputs") / args.run_name)
    if args.sglang_api_key is not None:
        hide(args.sglang_api_key)
    args.sglang_api_key = args.sglang_api_key or os.environ.get(API_KEY_VARIABLE)
    if args.sglang_api_key is None and not is_loopback(args.sglang_host):
        args.sglang_api_key = secrets.token_urlsafe(24)
    _accepted(args)
    _models(args)
    _numbers(args)
    _batches(args)
    _selection(args)
    _teacher(args)
    _layout(args)
    _router(args)
    _checkpoints(args)
    _prompts(args)
    if args.use_wandb:
        check_wandb()
    return args


def _accepted(args):
    """Flags that this tree accepts without a switch behind them must ask for what it does anyway."""
    for flag, (allowed, why) in ACCEPTED_VALUES.items():
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value is None:
            continue
        try:
            same = any(value == one if isinstance(one, str) else float(value) == one for one in allowed)
        except ValueError:
            same = False
        if not same:
            raise ConfigError(f"{flag}: expected {' or '.join(map(str, allowed))}, got {value}; {why}")


def _models(args):
    args.student_config = read_model_config(args.hf_checkpoint, "--hf-checkpoint")
    args.student_shape = model_shape(args.student_config, f"--hf-checkpoint {args.hf_checkpoint}")
    check_tokenizer_files(args.hf_checkpoint, "--hf-checkpoint")
    if not (args.load and args.rollout_external_engine_addrs):  # else nobody reads the directory's weights
        check_weights(args.hf_checkpoint, "--hf-checkpoint")
    for flag, key in SHAPE_FLAGS.items():
        given = getattr(args, flag.lstrip("-").replace("-", "_"))
        actual = args.student_config.get(key)
        if given is not None and actual is not None and float(given) != float(actual):
            raise ConfigError(f"{flag}: {args.hf_checkpoint} has {key} = {actual}, got {given:g}; drop the flag or fix the model")
    if args.bf16 and args.fp32:
        raise ConfigError("--bf16 and --fp32: expected one of them, got both")
    if not args.bf16 and not args.fp32:
        args.bf16 = args.device == "cuda"
        args.fp32 = not args.bf16
    if args.sglang_dtype is None:
        args.sglang_dtype = "bfloat16" if args.bf16 else "float32"


AT_LEAST_ZERO = ("lr", "min_lr", "weight_decay", "clip_grad", "eps_clip", "eps_clip_high", "opd_kl_coef", "eval_temperature")
SHARES = ("adam_beta1", "adam_beta2", "opd_jsd_beta", "opd_budget_gamma")
FRACTIONS = ("sglang_mem_fraction_static", "teacher_mem_fraction_static")


def _numbers(args):
    """Numbers that argparse takes and nothing can be done with."""
    for names, holds, expected in (
        (AT_LEAST_ZERO, lambda v: v >= 0 and math.isfinite(v), "0 or more"),
        (SHARES, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        (FRACTIONS, lambda v: 0 < v < 1, "a share of the GPU's memory in (0, 1)"),
        (("rollout_top_p", "eval_top_p"), lambda v: 0 < v <= 1, "a share in (0, 1]; 1 samples from everything"),
        (("max_tokens_per_gpu", "micro_batch_size", "request_timeout", "teacher_timeout"), lambda v: v >= 1, "at least 1"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ConfigError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def _batches(args):
    for name in ("num_rollout", "rollout_batch_size", "n_samples_per_prompt", "rollout_max_response_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    total = args.rollout_batch_size * args.n_samples_per_prompt
    if args.global_batch_size is None:
        args.global_batch_size = total
    if args.global_batch_size < 1 or total % args.global_batch_size:
        raise ConfigError(
            f"--global-batch-size: expected a divisor of rollout-batch-size x n-samples-per-prompt = "
            f"{args.rollout_batch_size} x {args.n_samples_per_prompt} = {total}, got {args.global_batch_size}"
        )
    if args.over_sampling_batch_size is not None and args.over_sampling_batch_size < args.rollout_batch_size:
        raise ConfigError(
            f"--over-sampling-batch-size: expected at least --rollout-batch-size {args.rollout_batch_size}, "
            f"got {args.over_sampling_batch_size}"
        )
    context = args.student_config.get("max_position_embeddings")
    if args.rollout_max_context_len is None:
        args.rollout_max_context_len = context
    elif context and args.rollout_max_context_len > context:
        raise ConfigError(f"--rollout-max-context-len: the student's limit is {context}, got {args.rollout_max_context_len}")
    if args.rollout_max_context_len and args.rollout_max_response_len >= args.rollout_max_context_len:
        raise ConfigError(
            f"--rollout-max-response-len: expected room for a prompt within the context of "
            f"{args.rollout_max_context_len} tokens, got {args.rollout_max_response_len}"
        )


def _selection(args):
    if args.opd_selector_path is None and args.opd_budget_mask not in MASK_CHOICES:
        near = difflib.get_close_matches(args.opd_budget_mask, MASK_CHOICES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"--opd-budget-mask: unknown mask {args.opd_budget_mask!r}{hint} Known: {', '.join(MASK_CHOICES)}")
    if not 0 < args.opd_budget_ratio <= 1:
        raise ConfigError(f"--opd-budget-ratio: expected a share in (0, 1], got {args.opd_budget_ratio} (0.10 keeps 10 %)")
    if not 0 <= args.opd_compat_prefix_ema_alpha <= 1:
        raise ConfigError(f"--opd-compat-prefix-ema-alpha: expected [0, 1], got {args.opd_compat_prefix_ema_alpha}")
    config = SelectionConfig.from_args(args)  # checks every other choice
    selects = bool(args.opd_selector_path) or config.mask not in NO_SELECTION
    if args.opd_exact_cmass_max_union < 1:
        raise ConfigError(f"--opd-exact-cmass-max-union: expected at least 1, got {args.opd_exact_cmass_max_union}")
    vocabulary = args.student_config.get("vocab_size") or 0
    if args.opd_topk_metrics_k < 0 or (vocabulary and args.opd_topk_metrics_k > vocabulary):
        raise ConfigError(f"--opd-topk-metrics-k: expected 0 to {vocabulary}, got {args.opd_topk_metrics_k}")
    if args.opd_type == "sglang" and args.opd_topk_metrics_k == 0:
        needs = {
            f"--opd-budget-mask {args.opd_budget_mask}": selects,
            f"--opd-loss-type {args.opd_loss_type}": args.opd_loss_type.startswith("topk"),
            "--opd-exact-cmass": args.opd_exact_cmass,
            "--opd-token-bank-dir": args.opd_token_bank_dir,
        }
        for what, needed in needs.items():
            if needed:
                raise ConfigError(f"{what} needs top-k: expected --opd-topk-metrics-k of 1 or more (16 is usual), got 0")
    wanted = ("exact",) if args.opd_type == "megatron" else ("union_floor", "union_tail")
    if args.opd_divergence_support is not None and args.opd_divergence_support not in wanted:
        raise ConfigError(
            f"--opd-divergence-support: expected {' or '.join(wanted)} with --opd-type {args.opd_type}, got {args.opd_divergence_support}; a server "
            "returns top-k lists, a Megatron teacher the whole vocabulary"
        )
    args.exact_selection = args.opd_type == "megatron" and (selects or bool(args.opd_token_bank_dir))
    if args.exact_selection and args.opd_topk_metrics_k == 0:
        args.opd_topk_metrics_k = min(16, vocabulary or 16)  # what the trainer takes from both models
    if args.calculate_per_token_loss and args.opd_loss_reduction not in (None, "kept_token_mean"):
        raise ConfigError(f"--calculate-per-token-loss is --opd-loss-reduction kept_token_mean; got {args.opd_loss_reduction} beside it; leave one out")
    if args.opd_loss_reduction is None:
        per_sample = args.opd_profile == "released" and not args.calculate_per_token_loss
        args.opd_loss_reduction = "sample_mean" if per_sample else "kept_token_mean"


def _teacher(args):
    if args.opd_type == "megatron":
        if not args.opd_teacher_load:
            raise ConfigError("--opd-type megatron: expected --opd-teacher-load with the teacher's weights, got nothing")
    elif args.opd_loss_type.startswith("full"):
        raise ConfigError(
            f"--opd-loss-type {args.opd_loss_type} needs full-vocabulary teacher logits: expected --opd-type megatron, "
            "got sglang; with a SGLang teacher use the topk losses"
        )
    sources = [bool(args.rm_url), bool(args.teacher_model), bool(args.teacher)]
    if args.opd_type == "sglang" and sum(sources) != 1:
        raise ConfigError("teacher: expected exactly one of --teacher-model, --rm-url and --teacher NAME=URL, "
                          f"got {sum(sources)} of them")  # fmt: skip
    if args.opd_type == "sglang" and args.rollout_temperature != 1.0:
        raise ConfigError(
            f"--rollout-temperature: expected 1.0, got {args.rollout_temperature}; a SGLang teacher scores at temperature 1 "
            "whatever is asked, so student and teacher log-probs would not be of one convention"
        )
    if args.teacher_port:
        check_port(args.sglang_host, args.teacher_port)
    args.teachers = parse_teachers(args) if args.opd_type == "sglang" else {}
    if args.teacher_quantization and not (args.device == "cuda" and any(isinstance(t, str) for t in args.teachers.values())):
        raise ConfigError(f"--teacher-quantization: expected a GPU and a teacher directory whose server this run starts, got {args.device} and "
                          f"{list(args.teachers.values()) or '--opd-type megatron'}; a teacher given by URL is quantized where it is started")  # fmt: skip
    tokenizer = load_tokenizer(args.hf_checkpoint, args.trust_remote_code)
    in_trainer = args.opd_teacher_hf or args.opd_teacher_load if args.opd_type == "megatron" else None
    for name, target in args.teachers.items():
        if isinstance(target, str):  # its server is started by this run
            flag = f"--teacher {name}" if args.teacher else "--teacher-model"
            read_model_config(target, flag)
            check_tokenizer_files(target, flag)
            check_weights(target, flag)
    directories = [d for d in [in_trainer, *args.teachers.values()] if isinstance(d, str) and (Path(d) / "config.json").is_file()]
    for directory in dict.fromkeys(directories):
        teacher_config = read_model_config(directory, "--teacher-model")
        context = teacher_config.get("max_position_embeddings")
        if context and args.rollout_max_context_len and context < args.rollout_max_context_len:
            raise ConfigError(
                f"teacher {directory}: its context of {context} tokens is shorter than --rollout-max-context-len "
                f"{args.rollout_max_context_len}; lower the latter"
            )
        if not args.allow_tokenizer_mismatch:
            check_tokenizers(tokenizer, load_tokenizer(directory, args.trust_remote_code), directory)


def parse_teachers(args) -> dict[str, str | list[str]]:
    """{name: HF directory or list of URLs}; one unnamed teacher is called "default"."""
    if args.teacher:
        teachers: dict[str, str | list[str]] = {}
        for item in args.teacher:
            name, found, target = item.partition("=")
            if not found or not name or not target:
                raise ConfigError(f"--teacher: expected NAME=URL or NAME=DIRECTORY, got {item!r}")
            if "://" in target:
                urls = teachers.setdefault(name, [])
                if not isinstance(urls, list):
                    raise ConfigError(f"--teacher {name}: given both as a directory and as a URL")
                urls.append(target)
            elif name in teachers:
                raise ConfigError(f"--teacher {name}: given twice")
            elif not Path(target).is_dir():
                raise ConfigError(f"--teacher {name}: expected a URL or a model directory, got {target!r}, which does not exist")
            else:
                teachers[name] = target
        return teachers
    if args.rm_url:
        return {"default": list(args.rm_url)}
    if args.teacher_model:
        if not Path(args.teacher_model).is_dir():
            raise ConfigError(f"--teacher-model: expected an HF model directory, got {args.teacher_model!r}; it does not exist")
        return {"default": args.teacher_model}
    return {}


def check_tokenizers(student, teacher, directory: str) -> None:
    """DataError unless both map the same strings to the same ids (padding of the vocabulary may differ)."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = next((t for t in sorted(set(ours) | set(theirs)) if ours.get(t) != theirs.get(t)), None)
        raise DataError(
            f"tokenizers differ: student has {len(ours)} entries, teacher {directory} has {len(theirs)}; first difference "
            f"{differing!r}: id {ours.get(differing)} against {theirs.get(differing)}. On-policy distillation scores the "
            "student's own token ids: use a teacher of the same tokenizer (or --allow-tokenizer-mismatch, at your risk)"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise DataError(
            f"tokenizers differ in the end token: student {student.eos_token_id}, teacher {teacher.eos_token_id} ({directory}); "
            "responses would never end for one of them. Use --allow-tokenizer-mismatch if that is meant"
        )


def _layout(args):
    if getattr(args, "asynchronous", False) and args.colocate:
        raise ConfigError("--colocate: train_async.py samples while the trainer works, so engines need places of their own; "
                          "drop the flag or use train.py")  # fmt: skip
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if min(tp, pp, cp, args.actor_num_nodes, args.actor_num_gpus_per_node) < 1:
        raise ConfigError("layout: expected sizes of at least 1")
    if world % (tp * pp * cp):
        raise ConfigError(
            f"layout: expected actor-num-nodes x actor-num-gpus-per-node = {world} to be a multiple of TP x PP x CP = "
            f"{tp} x {pp} x {cp} = {tp * pp * cp}"
        )
    args.world_size, args.data_parallel_size = world, world // (tp * pp * cp)
    check_layout(args.student_shape, world=world, tp=tp, pp=pp, cp=cp, ep=args.expert_model_parallel_size if args.student_shape.is_moe else 1,
                 expert_tp=args.expert_tensor_parallel_size or tp, sequence_parallel=args.sequence_parallel)  # fmt: skip
    if args.rollout_num_gpus is None:
        args.rollout_num_gpus = args.rollout_num_gpus_per_engine
    if args.rollout_num_gpus % args.rollout_num_gpus_per_engine:
        raise ConfigError(
            f"--rollout-num-gpus: expected a multiple of --rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine}, "
            f"got {args.rollout_num_gpus}"
        )
    if args.teacher_num_gpus is None:
        args.teacher_num_gpus = args.teacher_num_gpus_per_engine
    if args.teacher_num_gpus % args.teacher_num_gpus_per_engine:
        raise ConfigError(
            f"--teacher-num-gpus: expected a multiple of --teacher-num-gpus-per-engine {args.teacher_num_gpus_per_engine}, "
            f"got {args.teacher_num_gpus}"
        )


def _router(args):
    if args.sglang_router_ip and not args.sglang_router_port:
        raise ConfigError(f"--sglang-router-ip {args.sglang_router_ip}: expected --sglang-router-port beside it, got none")
    if args.use_sglang_router and args.sglang_router_ip:
        raise ConfigError("--use-sglang-router and --sglang-router-ip: the first starts a router, the second uses one; expected one of them")
    if args.sglang_router_port and not (args.use_sglang_router or args.sglang_router_ip):
        raise ConfigError("--sglang-router-port: expected --use-sglang-router (to start one) or --sglang-router-ip (to use one) beside it")
    if args.use_sglang_router:
        if importlib.util.find_spec("sglang_router") is None:
            raise ConfigError("--use-sglang-router: the package sglang-router is not installed; pip install sglang-router==0.3.2, or drop the flag")
        if args.sglang_router_port:
            check_port("127.0.0.1", args.sglang_router_port)


def _checkpoints(args):
    for flag, value in (("--save-interval", args.save_interval), ("--eval-interval", args.eval_interval)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: expected at least 1, got {value}")
    if args.save_interval and not args.save:
        args.save = str(Path(args.output_dir) / "checkpoints")
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts: expected 0 or more, got {args.max_restarts}")
    if args.max_restarts and not args.save_interval:
        raise ConfigError("--max-restarts: expected --save-interval N beside it, so that there are checkpoints to start over from")
    if args.save_debug_rollout_data:
        dump_path(args.save_debug_rollout_data, 0)
    if args.save_hf == "":
        args.save_hf = str(Path(args.output_dir) / "hf")
    if args.load and not Path(args.load).is_dir():
        raise ConfigError(f"--load: expected a checkpoint directory, got {args.load!r}, which does not exist")


def _prompts(args):
    args.eval_datasets, args.eval_settings = read_eval_sets(args)
    if args.eval_interval and not args.eval_datasets:
        raise ConfigError("--eval-interval: expected --eval-prompt-data NAME FILE (or --eval-config) beside it, got none")
    if not args.prompt_data:
        raise ConfigError("--prompt-data: expected a JSONL or parquet file, got nothing")
    tokenizer = load_tokenizer(args.hf_checkpoint, args.trust_remote_code)
    source = PromptDataSource(args, tokenizer)  # reads and checks every prompt
    args.num_prompts = len(source)
    if source.skipped:
        print(f"note: {source.skipped} of {source.skipped + len(source)} prompts of {args.prompt_data} are too long and left out", file=sys.stderr)
    for name, file in args.eval_datasets.items():
        PromptDataSource(args_of(args, name), tokenizer, path=file, evaluation=True)
