"""What the trainer reads from the command line, with its defaults: the one place where args are looked up."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, fields

import torch

from ta_opd.errors import ConfigError

RECOMPUTED = ("core_attn", "mlp", "moe")
RECOMPUTED_BY_TE = ("layernorm", "moe_act")  # megatron-core has neither without Transformer Engine


@dataclass(frozen=True)
class Settings:
    """Trainer settings by slime's names. A missing or None attribute of args takes the default here."""

    hf_checkpoint: str | None = None
    load: str | None = None
    ref_load: str | None = None
    save: str | None = None
    output_dir: str | None = None
    seed: int = 1234
    start_rollout_id: int | None = None
    no_save_optim: bool = False
    no_load_optim: bool = False
    keep_checkpoints: int | None = None
    allow_teacher_change: bool = False
    transformer_impl: str = "local"
    make_vocab_size_divisible_by: int = 1
    distributed_timeout_minutes: int = 30

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    accumulate_allreduce_grads_in_fp32: bool = True
    optimizer_cpu_offload: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list | None = None
    bf16: bool = False
    fp32: bool = False
    moe_aux_loss_coeff: float = 0.0

    max_tokens_per_gpu: int = 8192
    global_batch_size: int | None = None
    opd_type: str = "sglang"
    opd_loss_type: str = "sampled_reverse_kl"
    opd_loss_rows: str = "kept"
    opd_last_layer_rows: str = "kept"
    opd_loss_reduction: str = "kept_token_mean"
    opd_log_valid_kl: str = "auto"
    advantage_estimator: str = "grpo"
    normalize_advantages: bool = False
    gamma: float = 1.0
    skip_nan_steps: bool = False
    opd_teacher_load: str | None = None
    opd_teacher_ckpt_step: int | None = None
    opd_teacher_hf: str | None = None
    opd_teacher_offload: bool = False
    opd_topk_metrics_k: int = 0

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay_style: str = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    num_rollout: int | None = None
    rollout_batch_size: int | None = None
    n_samples_per_prompt: int = 1

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        given = {f.name: getattr(args, f.name, None) for f in fields(cls)}
        if given["expert_tensor_parallel_size"] is not None:  # known launchers pass it as text
            given["expert_tensor_parallel_size"] = int(given["expert_tensor_parallel_size"])
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        settings._check()
        return settings

    def _check(self) -> None:
        if self.bf16 and self.fp32:
            raise ConfigError("--bf16 and --fp32: expected one of them, got both")
        if self.max_tokens_per_gpu < 1:
            raise ConfigError(f"--max-tokens-per-gpu: expected at least 1, got {self.max_tokens_per_gpu}")
        if self.opd_loss_rows not in ("kept", "all"):
            raise ConfigError(f"--opd-loss-rows: expected kept or all, got {self.opd_loss_rows!r}")
        if self.opd_last_layer_rows not in ("kept", "mlp", "all"):
            raise ConfigError(f"--opd-last-layer-rows: expected kept, mlp or all, got {self.opd_last_layer_rows!r}")
        if self.transformer_impl not in ("local", "transformer_engine"):
            raise ConfigError(f"--transformer-impl: expected local or transformer_engine, got {self.transformer_impl!r}")
        if self.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError("--transformer-impl transformer_engine: Transformer Engine is not installed; install it or use local")
        if self.recompute_granularity == "full" and not self.recompute_method:
            raise ConfigError("--recompute-granularity full: expected --recompute-method uniform or block beside it, got none")
        for name in self.recompute_modules or ():
            if name not in RECOMPUTED and not (self.transformer_impl == "transformer_engine" and name in RECOMPUTED_BY_TE):
                raise ConfigError(
                    f"--recompute-modules: expected some of {', '.join(RECOMPUTED)} (with --transformer-impl transformer_engine also "
                    f"{', '.join(RECOMPUTED_BY_TE)}), got {name!r}"
                )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
        for name in ("lr", "min_lr", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr: expected at most --lr {self.lr}, got {self.min_lr}")

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size inside experts: --expert-tensor-parallel-size, or that of the rest of the model."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def dtype(self) -> torch.dtype:
        """Parameter dtype: bf16 where asked for; else by device (bf16 on GPU, fp32 on CPU)."""
        if self.bf16 or (torch.cuda.is_available() and not self.fp32):
            return torch.bfloat16
        return torch.float32

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, for decaying learning rates (1 where the run's length is unknown)."""
        if self.lr_decay_iters:
            return self.lr_decay_iters
        per_rollout = 1
        if self.global_batch_size and self.rollout_batch_size:
            per_rollout = max(self.rollout_batch_size * self.n_samples_per_prompt // self.global_batch_size, 1)
        return max((self.num_rollout or 1) * per_rollout, 1)
