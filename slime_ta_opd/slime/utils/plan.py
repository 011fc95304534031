"""The resolved plan of a run, printed by --dry-run: processes, devices, models, batch arithmetic and disk. Starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from slime.ray.placement import describe, plan_layout
from slime.utils import config_file
from slime.utils.misc import human_bytes


def print_plan(args) -> None:
    """Prints the plan and the resolved configuration."""
    layout = plan_layout(args)
    total = args.rollout_batch_size * args.n_samples_per_prompt
    student = args.student_config
    parameters = count_parameters(student)
    lines = ["processes", *describe(layout, args)]
    for name, target in args.teachers.items():
        where = "started here, free port" if isinstance(target, str) else "external"
        lines.append(f"teacher {name!r}: {target} ({where})")
    address = os.environ.get("RAY_ADDRESS")
    lines += [f"Ray: {'cluster at ' + address if address else 'local, started and stopped by this run'}", "", "model",
              f"student: {args.hf_checkpoint}, {student.get('model_type')}, {student.get('num_hidden_layers')} layers, "
              f"hidden {student.get('hidden_size')}, vocabulary {student.get('vocab_size')}, about {parameters / 1e6:.1f} M parameters",
              f"dtype: {'bf16' if args.bf16 else 'fp32'}, device {args.device}", "", "batch",
              f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} samples = {total} a rollout, "
              f"{total // args.global_batch_size} optimizer steps of {args.global_batch_size}, {args.num_rollout} rollouts, "
              f"{args.num_prompts} prompts ({args.num_rollout * args.rollout_batch_size / args.num_prompts:.2f} epochs)",
              f"selection: mask {args.opd_budget_mask}, budget {args.opd_budget_ratio:g}, K {args.opd_topk_metrics_k}, "
              f"profile {args.opd_profile}; loss {args.opd_loss_type}, {args.opd_loss_reduction}, rows {args.opd_loss_rows}",
              *_host_memory(args, parameters), "", "disk", f"run directory: {with_free_space(args.output_dir)}"]  # fmt: skip
    if args.save_interval:
        per = parameters * (12 if not args.no_save_optim else 4)
        saves = -(-args.num_rollout // args.save_interval)
        kept = min(saves, args.keep_checkpoints or saves)
        lines.append(f"checkpoints: {args.save}, {kept} x about {human_bytes(per)}")
    if args.opd_token_bank_dir:
        rows = total * args.rollout_max_response_len * args.num_rollout
        width = 16 * args.opd_topk_metrics_k if args.opd_token_bank_raw_topk else 0
        lines.append(f"token bank: {args.opd_token_bank_dir}, at most about {human_bytes(rows * (150 + width))}")
    print("resolved configuration")
    for key, value in config_file.resolved(args).items():
        print(f"  {key}: {value}")
    print("\n" + "\n".join(lines))  # last, where a terminal shows it


def _host_memory(args, parameters: float) -> list[str]:
    """What --optimizer-cpu-offload takes of the hosts, all trainer ranks together."""
    if not args.optimizer_cpu_offload:
        return []
    ranks = args.actor_num_nodes * args.actor_num_gpus_per_node
    copies = 1 if args.use_distributed_optimizer else ranks // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    size = human_bytes(parameters * (12 if args.bf16 else 8) * copies)
    return ["", "host memory", f"optimizer state: about {size} page-locked, over {ranks} trainer ranks on {args.actor_num_nodes} nodes"]


def count_parameters(config: dict[str, Any]) -> float:
    """Parameters of a dense or MoE decoder by its HF config."""
    h, layers = config.get("hidden_size", 0), config.get("num_hidden_layers", 0)
    heads = config.get("num_attention_heads", 1)
    dim = config.get("head_dim") or h // heads
    kv = config.get("num_key_value_heads", heads)
    attention = h * dim * (2 * heads + 2 * kv)
    experts = config.get("num_experts") or 0
    mlp = 3 * h * config.get("intermediate_size", 0)
    if experts:
        mlp = 3 * h * config.get("moe_intermediate_size", 0) * experts + h * experts
    tables = 1 if config.get("tie_word_embeddings") else 2
    return layers * (attention + mlp + 2 * h) + tables * config.get("vocab_size", 0) * h


def with_free_space(path: str) -> str:
    """`path`, with what the file system under it has free."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    stat = os.statvfs(existing)
    return f"{path} ({human_bytes(stat.f_bavail * stat.f_frsize)} free)"
