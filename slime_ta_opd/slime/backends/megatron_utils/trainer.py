"""MegatronTrainer: one rank of the trainer. Its owner (a Ray actor, torchrun, a test) gives it a rank and an address."""

from __future__ import annotations

import argparse
import functools
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from slime.backends.megatron_utils import advantages, checkpoint, cpu_runtime, distributed, exact, hf_config, weights
from slime.backends.megatron_utils.hf_files import HFWriter
from slime.backends.megatron_utils.identity import check_identity, forced_change, run_identity
from slime.backends.megatron_utils.losses.registry import get_loss
from slime.backends.megatron_utils.model import build_model, unwrap, wrap_for_training
from slime.backends.megatron_utils.optimizer import Optimizer, is_finite
from slime.backends.megatron_utils.settings import Settings
from slime.backends.megatron_utils.step import Stepper, now, vocabulary_args
from slime.backends.megatron_utils.step_metrics import average_steps, memory_metrics, step_metrics
from slime.backends.megatron_utils.teacher import Teacher, teacher_shape
from ta_opd.errors import ConfigError, NumericsError

DEFAULT_TOP_K = 16
SMALL_VOCABULARY = 16384  # up to here `--opd-log-valid-kl auto` computes statistics over all valid tokens


def _on_device(method: Callable) -> Callable:
    """Runs a method with megatron-core's CPU support where CUDA is absent."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with cpu_runtime.cpu_runtime():
            return method(self, *args, **kwargs)

    return wrapped


class MegatronTrainer:
    """Model, optimizer and training steps on one rank.

    The constructor checks the arguments and the layout (ConfigError) and builds nothing. `init` builds everything and
    must run on all ranks. The other methods are collective too, unless they say otherwise.
    """

    def __init__(
        self, args: argparse.Namespace, rank: int, world_size: int, local_rank: int, master_addr: str, master_port: int,
        listener: socket.socket | None = None,
    ):  # fmt: skip
        self.args = args
        self.settings = Settings.from_args(args)
        if not self.settings.hf_checkpoint:
            raise ConfigError("--hf-checkpoint: expected the student's HF directory (it gives the model's shape), got nothing")
        self.shape = hf_config.load_shape(self.settings.hf_checkpoint)
        s = self.settings
        if s.expert_model_parallel_size > 1 and not self.shape.is_moe:
            raise ConfigError(f"layout: expert parallelism {s.expert_model_parallel_size} needs a model with experts")
        self._check_layout(self.shape, world_size)
        self.loss = get_loss(s.opd_loss_type)
        self.teacher_shape = self._teacher_shape(world_size)
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.address, self.listener = (master_addr, master_port), listener
        self.device = cpu_runtime.device(local_rank)
        self._extra: dict[str, Any] | None = None
        self._identity_changes: list[dict] = []

    def _check_layout(self, shape: hf_config.ModelShape, world_size: int) -> None:
        s = self.settings
        hf_config.check_layout(
            shape,
            world=world_size,
            tp=s.tensor_model_parallel_size,
            pp=s.pipeline_model_parallel_size,
            cp=s.context_parallel_size,
            ep=s.expert_model_parallel_size if shape.is_moe else 1,
            expert_tp=s.expert_tp,
            sequence_parallel=s.sequence_parallel,
        )

    def _teacher_shape(self, world_size: int) -> hf_config.ModelShape | None:
        if self.settings.opd_type != "megatron":
            if self.loss.teacher == "hidden":
                raise ConfigError(f"--opd-loss-type {self.loss.name} needs --opd-type megatron with --opd-teacher-load, got sglang")
            return None
        shape = teacher_shape(self.settings)
        try:
            self._check_layout(shape, world_size)
        except ConfigError as error:
            raise ConfigError(f"teacher {self.settings.opd_teacher_load}: {error}") from error
        return shape

    @_on_device
    def init(self) -> int:
        """Process groups, model, weights, optimizer. Returns the first rollout id to run."""
        cpu_runtime.install()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        s = self.settings
        distributed.init_world(self.rank, self.world_size, *self.address, s.distributed_timeout_minutes, self.listener)
        distributed.init_model_parallel(s)
        torch.manual_seed(s.seed)
        self.model = wrap_for_training(build_model(self.shape, s, self.device), s)
        found = checkpoint.find(s.load) if s.load else None
        if found is None and s.ref_load:
            found = checkpoint.find(s.ref_load)
        if found is None:
            weights.load_hf(unwrap(self.model), s.hf_checkpoint)
        self.optimizer = Optimizer(self.model, s)
        start = 0 if found is None else self._resume(found)
        self.teacher = None
        if self.teacher_shape is not None:
            self.teacher = Teacher(self.teacher_shape, s, unwrap(self.model), self.device)
        self.stepper = Stepper(
            model=self.model,
            loss=self.loss,
            settings=s,
            args=vocabulary_args(self.args, self.model, self.teacher_shape),
            device=self.device,
            log_valid=self._log_valid(),
            teacher=None if self.teacher is None else self.teacher.row_fields,
        )
        return start if s.start_rollout_id is None else s.start_rollout_id

    def _resume(self, found: checkpoint.Found) -> int:
        common = checkpoint.read_common(found)
        self._check_identity(found, common.get("ta_opd", {}))
        resuming = found.rollout_id >= 0 and "ta_opd" in common
        optimizer = self.optimizer if resuming and not self.settings.no_load_optim else None
        checkpoint.load(found, self.model, optimizer)
        if optimizer is None:
            self.optimizer.reload_from_model()
        if resuming:
            self._extra = common.get("extra")
        return found.rollout_id + 1 if resuming else 0

    def _check_identity(self, found: checkpoint.Found, held: dict) -> None:
        """Refuses another teacher or tokenizer than the checkpoint's; a forced change is kept in every checkpoint from now on
        and appended to <output-dir>/identity_changes.jsonl."""
        saved, current = held.get("identity", {}), run_identity(self.args)
        changed = check_identity(saved, current, allow=self.settings.allow_teacher_change, where=str(found.path))
        self._identity_changes = list(held.get("identity_changes", []))
        if changed:
            self._identity_changes.append(forced_change(found.rollout_id + 1, changed, saved, current))
            if dist.get_rank() == 0:
                root = Path(self.settings.output_dir or self.settings.save or ".")
                root.mkdir(parents=True, exist_ok=True)
                with open(root / "identity_changes.jsonl", "a") as file:
                    file.write(json.dumps(self._identity_changes[-1]) + "\n")

    def _log_valid(self) -> bool:
        choice = self.settings.opd_log_valid_kl
        return choice == "on" or (choice == "auto" and self.shape.vocab_size <= SMALL_VOCABULARY)

    @property
    def dp_rank(self) -> int:
        """Which data-parallel share of a batch this rank trains on (not collective)."""
        return mpu.get_data_parallel_rank()

    @property
    def dp_size(self) -> int:
        return mpu.get_data_parallel_world_size()

    @_on_device
    def train(self, rollout_id: int, data: dict) -> dict[str, float]:
        """One rollout's optimizer steps on this rank's samples; metrics, averaged over the steps, the same on every rank.

        data: per-sample lists of the manifest (slime.utils.fields) and "steps". Raises NumericsError with the ids of the
        offending samples where a loss or gradient is not finite (that step is not applied), unless --skip-nan-steps.
        """
        self.model.train()
        data = self.prepare(data)
        logged = []
        for number, step in enumerate(data["steps"]):
            begin = now(self.device)
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            sums = self.stepper.gradients(data, step)
            norm = self.optimizer.grad_norm()
            lr = self.optimizer.lr
            applied = sums.finite and is_finite(norm)
            if applied:
                self.optimizer.apply(norm)
            else:
                self._not_finite(rollout_id, number, data, step, sums, norm)
                self.optimizer.skip()
            metrics = step_metrics(sums, step, norm, lr, now(self.device) - begin, self.settings.opd_loss_type)
            logged.append({**metrics, "steps_skipped": float(not applied)})
        return average_steps(logged) | memory_metrics(self.device)

    def prepare(self, data: dict) -> dict:
        """The rollout's data with what the trainer itself knows: teacher fields and base advantages (collective)."""
        return self._with_advantages(self._with_teacher(data))

    def _with_teacher(self, data: dict) -> dict:
        """Adds teacher fields that the loss needs and the rollout did not bring, where the teacher is in these ranks."""
        if self.teacher is None or self.loss.teacher == "hidden":
            return data
        missing = [n for n in self.stepper.field_names if n in exact.FIELDS and n not in data and n != "student_topk_logprobs"]
        if not any(distributed.gather_objects(bool(missing))):
            return data
        return {**self._exact(data), **data}

    @_on_device
    def exact_metrics(self, data: dict) -> dict[str, list[np.ndarray]]:
        """Full-vocabulary H, KLf, KLr, C and top-K fields of every response token of this rank's samples (see exact.py).

        Needs --opd-type megatron; ConfigError otherwise.
        """
        if self.teacher is None:
            raise ConfigError("exact metrics need a teacher in the trainer: expected --opd-type megatron, got sglang")
        return self._exact(data)

    def _exact(self, data: dict) -> dict[str, list[np.ndarray]]:
        k = min(self.settings.opd_topk_metrics_k or DEFAULT_TOP_K, self.shape.vocab_size)
        row_bytes = self.teacher_shape.hidden_size * self.settings.dtype.itemsize
        return exact.exact_metrics(self.stepper, data, k, self.teacher_shape.vocab_size, row_bytes)

    def _with_advantages(self, data: dict) -> dict:
        """Adds base advantages for the sampled loss where any task reward is not zero, and missing old log-probs."""
        if self.settings.opd_loss_type != "sampled_reverse_kl":
            return data
        data = dict(data)
        if "rollout_log_probs" not in data:
            data["student_log_probs_old"] = self.stepper.log_probs(data)
        s, rewards = self.settings, [float(r) for r in data.get("rewards", [])]
        if not any(distributed.gather_objects(any(rewards))):
            return data
        if s.advantage_estimator == "grpo":
            rewards = self._group_rewards(data, rewards)
        out = advantages.token_advantages(s.advantage_estimator, rewards, data["response_lengths"], gamma=s.gamma)
        if s.normalize_advantages or s.advantage_estimator == "reinforce_plus_plus":
            own = advantages.masked_moments(out, data["loss_masks"])
            parts = distributed.gather_objects((self._replica(), own))
            moments = np.sum(list(dict(parts).values()), axis=0)
            out = advantages.whiten(out, data["loss_masks"], tuple(moments))
        data["advantages"] = out
        return data

    def _group_rewards(self, data: dict, rewards: list[float]) -> list[float]:
        """Group-normalised rewards; a group's samples may be on several data-parallel ranks."""
        per_prompt = max(self.settings.n_samples_per_prompt, 1)
        indices = data["sample_indices"]
        own = {int(i): (int(i) // per_prompt, r) for i, r in zip(indices, rewards, strict=True)}
        everyone: dict[int, tuple[int, float]] = {}
        for part in distributed.gather_objects(own):
            everyone.update(part)
        order = sorted(everyone)
        normalized = advantages.group_normalized([everyone[i][1] for i in order], [everyone[i][0] for i in order])
        by_sample = dict(zip(order, normalized.tolist(), strict=True))
        return [by_sample[int(i)] for i in indices]

    def _replica(self) -> int:
        return mpu.get_data_parallel_rank()

    def _not_finite(self, rollout_id, number, data, step, sums, norm) -> None:
        """Dumps the offending samples of this rank and raises NumericsError, unless the step may be skipped."""
        own = [data["sample_indices"][i] for i in step["indices"]] if "sample_indices" in data else list(step["indices"])
        bad = sorted(sums.bad_samples) or sorted({i for part in distributed.gather_objects(own) for i in part})
        root = Path(self.settings.output_dir or self.settings.save or ".") / "not_finite"
        if self._is_writer():
            held = [(i, n) for i, n in zip(step["indices"], own, strict=True) if n in bad]
            root.mkdir(parents=True, exist_ok=True)
            for i, name in held:
                arrays = {k: v[i] for k, v in data.items() if isinstance(v, list) and k != "steps" and len(v) > i}
                np.savez(root / f"rollout_{rollout_id:06d}_step_{number}_sample_{name}.npz", **arrays)
        if not self.settings.skip_nan_steps:
            what = f"loss {sums.objective}" if not sums.finite else f"gradient norm {norm}"
            raise NumericsError(
                f"rollout {rollout_id}, step {number}: {what} is not finite; the step was not applied. Samples {bad} are in "
                f"{root}; look at them, or pass --skip-nan-steps to go on without such steps"
            )

    def _is_writer(self) -> bool:
        """One rank of each data-parallel replica."""
        return (
            mpu.get_tensor_model_parallel_rank() == 0
            and mpu.get_context_parallel_rank() == 0
            and mpu.is_pipeline_last_stage()
        )

    @_on_device
    def compute_log_probs(self, data: dict) -> list[np.ndarray]:
        """Log-probs of every response token of this rank's samples under the current weights, float32 [L] each."""
        return self.stepper.log_probs(data)

    @_on_device
    def hf_weight_buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Weights by HF name in buckets of about `bucket_bytes`, gathered on rank 0; empty lists elsewhere.

        Tensors may share memory with the model: use them before the next train().
        """
        if self.settings.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)
        return weights.hf_weight_buckets(unwrap(self.model), bucket_bytes)

    @_on_device
    def save(self, rollout_id: int, extra: dict[str, Any]) -> None:
        """Checkpoint of `rollout_id` under --save; `extra` (plain values) comes back from load_extra()."""
        if not self.settings.save:
            raise ConfigError("--save: expected a directory for checkpoints, got nothing")
        if self.settings.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)
        checkpoint.save(
            self.settings.save,
            rollout_id,
            self.model,
            None if self.settings.no_save_optim else self.optimizer,
            args=self.args,
            identity=run_identity(self.args),
            identity_changes=self._identity_changes,
            extra=extra,
            keep=self.settings.keep_checkpoints,
        )

    def load_extra(self) -> dict[str, Any] | None:
        """What save() was given when the loaded checkpoint was written; None for a fresh start."""
        return self._extra

    @_on_device
    def save_hf(self, directory: str) -> None:
        """Writes the student as an HF directory, with config and tokenizer files of --hf-checkpoint."""
        writer = HFWriter(directory) if dist.get_rank() == 0 else None
        for bucket in self.hf_weight_buckets(512 * 2**20):
            for name, tensor in bucket:
                writer.add(name, tensor)
        if writer is not None:
            writer.close(self.settings.hf_checkpoint, self.settings.dtype)
        dist.barrier()

    def free(self) -> None:
        """Drops model and optimizer (not collective). Their gradient hooks form cycles that the collector cannot see."""
        model, optimizer = vars(self).pop("model", None), vars(self).pop("optimizer", None)
        for name in ("stepper", "teacher"):
            vars(self).pop(name, None)
        if optimizer is not None:
            optimizer.free()
        if model is not None:
            model.grad_accs.clear()
            for param in model.parameters():
                vars(param).pop("main_param", None)

    def close(self) -> None:
        """Drops everything and leaves the process groups (not collective)."""
        self.free()
        distributed.leave_world()
