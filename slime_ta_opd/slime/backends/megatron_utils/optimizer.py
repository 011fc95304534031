"""Optimizer and learning-rate schedule of megatron-core, with three faults mended that show without TE or apex.

With torch's AdamW inside, megatron-core 0.16's DistributedOptimizer (1) cannot describe itself before its first step,
(2) fails on the key "step" when a checkpoint is loaded, and (3) leaves all parameters sharing one step tensor after a
load, so that a step would count once a parameter. (1) is met by creating the state at once, (2) and (3) by the two
functions that `_mend` puts in their place. The other optimizers cannot load a checkpoint written before the first step:
mended there too.

Where Transformer Engine or apex is installed, megatron-core would take their Adam instead, asked for or not, whose state has
another form. Torch's is taken everywhere, so that steps and checkpoints do not depend on what else is installed.

AdamW runs as one fused kernel: torch's default keeps copies the size of the weights while it steps, which was the trainer's peak.
With --optimizer-cpu-offload its state lives in host memory (host_state.py).

Weight decay is left off norms and biases: megatron-core applies that (wd_mult) only through OptimizerParamScheduler.
"""

from __future__ import annotations

import contextlib
import math
import types

import megatron.core.optimizer as mcore_optimizer
import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime.backends.megatron_utils.host_state import HostState, MainWeightsOnHost, check_host_memory
from slime.backends.megatron_utils.settings import Settings
from ta_opd.errors import ConfigError

_STYLES = ("constant", "linear", "cosine")


class Optimizer:
    """megatron-core's optimizer of one model with its schedule. `steps` counts optimizer steps of the whole run."""

    def __init__(self, model, settings: Settings):
        if settings.lr_decay_style not in _STYLES:
            raise ConfigError(f"--lr-decay-style: expected one of {', '.join(_STYLES)}, got {settings.lr_decay_style!r}")
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            overlap_param_gather=settings.overlap_param_gather,
            bf16=settings.dtype == torch.bfloat16,
            params_dtype=settings.dtype,
        )
        _take_torch_adam()
        offload = settings.optimizer_cpu_offload
        with MainWeightsOnHost() if offload else contextlib.nullcontext():
            self.core: ChainedOptimizer = get_megatron_optimizer(config, [model], get_standard_config_overrides(config))
        self.host: dict[object, HostState] = {}  # by part, where the state is in host memory
        self._groups = [{k: g[k] for k in ("max_lr", "min_lr", "betas", "eps")} for g in self.core.param_groups]
        parts = [part for part in self.core.chained_optimizers if _is_torch_adam(part)]
        if offload:
            check_host_memory(parts)
        for part in parts:
            _fuse(part.optimizer)
            if offload:
                self.host[part] = HostState(part)
            else:
                _create_state(part.optimizer)
            _mend(part, offload)
        if offload:
            self.core.reload_model_params()
        total = max(settings.total_steps, settings.lr_warmup_iters + 1)
        self.schedule = OptimizerParamScheduler(
            self.core,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_iters,
            lr_decay_steps=total,
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=total,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        model.config.grad_scale_func = self.core.scale_loss

    @property
    def steps(self) -> int:
        return self.schedule.num_steps

    @property
    def lr(self) -> float:
        return self.core.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        self.core.zero_grad()

    @torch.no_grad()
    def grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, the same on every rank; call once, after the backward passes."""
        self.core.prepare_grads()
        return float(self.core.get_grad_norm())

    @torch.no_grad()
    def apply(self, grad_norm: float) -> None:
        """Clips by `grad_norm` (as returned above) and takes one step; the learning rate moves on."""
        for part in self.core.chained_optimizers:
            clip = part.config.clip_grad
            if part in self.host:
                self.host[part].clip = clip / (grad_norm + 1e-6) if clip > 0 else 1.0  # as below; it clips chunk by chunk
            elif clip > 0 and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip, total_norm=grad_norm)
        self.core.step_with_ready_grads()
        self.schedule.step(increment=1)

    def skip(self) -> None:
        """Moves the schedule on without a step, for a step that is not applied."""
        self.schedule.step(increment=1)

    def sharded_state_dict(self, model_state: dict, metadata: dict, is_loading: bool) -> dict:
        return self.core.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def load_state_dict(self, state: dict) -> None:
        """Takes moments and step counts from a checkpoint; learning rate, betas and eps stay those of this run."""
        self.core.load_state_dict(state)
        for group, own in zip(self.core.param_groups, self._groups, strict=True):
            group.update(own)
        self.schedule.step(increment=0)

    def reload_from_model(self) -> None:
        """Copies model weights into the optimizer's main weights, after weights were loaded without it."""
        self.core.reload_model_params()

    def free(self) -> None:
        """Drops all state; the optimizer cannot be used afterwards."""
        for part in self.core.chained_optimizers:
            vars(part).clear()
        self.host.clear()


def is_finite(value: float) -> bool:
    return math.isfinite(value)


def _take_torch_adam() -> None:
    """Sets what megatron-core decided when it was imported."""
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False


def _is_torch_adam(part) -> bool:
    return isinstance(getattr(part, "optimizer", None), torch.optim.AdamW)


def _step(value: float, p: torch.Tensor) -> torch.Tensor:
    """A step count of its own for `p`, where the fused kernel reads it."""
    return torch.tensor(value, dtype=torch.float32, device=p.device)


def _fuse(adam: torch.optim.AdamW) -> None:
    for group in adam.param_groups:
        group.update(fused=True, foreach=False)


def _create_state(adam: torch.optim.AdamW) -> None:
    for group in adam.param_groups:
        for p in group["params"]:
            if not adam.state[p]:
                adam.state[p].update(
                    step=_step(0.0, p), exp_avg=torch.zeros_like(p.data), exp_avg_sq=torch.zeros_like(p.data)
                )


def _own_steps(adam: torch.optim.AdamW) -> None:
    """Gives every parameter its own step tensor, with the value it has (0 where a checkpoint had none)."""
    for p, state in adam.state.items():
        state["step"] = _step(float(state.get("step", 0.0)), p)


def _mend(optimizer, on_host: bool) -> None:
    """Replaces what fails, on this optimizer only. on_host: its state is a HostState's, which sees to step counts itself."""

    def set_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":
                target.copy_(tensors[key])

    def load_state_dict(self, state):
        if not isinstance(self, DistributedOptimizer):  # these leave the common step out before the first step
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))
        type(self).load_state_dict(self, state)
        _fuse(self.optimizer)  # param groups come from the checkpoint
        if not on_host:
            _own_steps(self.optimizer)

    optimizer.load_state_dict = types.MethodType(load_state_dict, optimizer)
    if isinstance(optimizer, DistributedOptimizer):
        optimizer._set_main_param_and_optimizer_states = types.MethodType(set_states, optimizer)
