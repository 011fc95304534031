"""A teacher inside the trainer's ranks: another model, of any supported size, in the student's parallel layout.

It runs forward only on the student's micro-batches and gives the last hidden states of the rows that are asked for; its
vocabulary matrix is cut into the student's id ranges. Weights stay on the device, or come there only while they are used
(`--opd-teacher-offload`).

Shape letters: R rows, H hidden size of the teacher, V vocabulary rows of the student's shard, L response length, K top-k.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from slime.backends.megatron_utils import checkpoint, forward, hf_config, weights
from slime.backends.megatron_utils.losses.vocab_parallel import reshard_vocab
from slime.backends.megatron_utils.model import PackedGPTModel, build_model
from slime.backends.megatron_utils.packing import MicroBatch
from slime.backends.megatron_utils.settings import Settings
from ta_opd.errors import ConfigError


def teacher_shape(settings: Settings) -> hf_config.ModelShape:
    """Shape of `--opd-teacher-load`: its config.json, that of --opd-teacher-hf, or the one a converted checkpoint keeps.

    Raises ConfigError where there is none.
    """
    source = settings.opd_teacher_load
    if not source or not Path(source).is_dir():
        raise ConfigError(f"--opd-teacher-load: expected an HF or torch_dist directory with the teacher's weights, got {source!r}")
    for directory in (source, settings.opd_teacher_hf):
        if directory and (Path(directory) / "config.json").is_file():
            return hf_config.load_shape(directory)
    found = checkpoint.find(source, settings.opd_teacher_ckpt_step)
    if found is not None:
        kept = checkpoint.read_common(found).get("ta_opd", {}).get("hf_config")
        if kept:
            return hf_config.model_shape(json.loads(json.dumps(kept)), str(found.path))
    raise ConfigError(f"--opd-teacher-load: {source} does not say which model it holds; give the HF directory as --opd-teacher-hf")


class Teacher:
    """The teacher's part on this rank. Built and called on all ranks."""

    def __init__(self, shape: hf_config.ModelShape, settings: Settings, student: PackedGPTModel, device: torch.device):
        self.shape = shape
        self.device = device
        own = dataclasses.replace(settings, recompute_granularity=None, recompute_method=None, recompute_num_layers=None)
        model = build_model(shape, own, device)
        _load(model, settings)
        model.requires_grad_(False)
        model.eval()
        self.model = Float16Module(model.config, model) if model.config.bf16 else model
        self._inner = model
        self.head = self._align_head(student) if mpu.is_pipeline_last_stage() else None
        self._host = self._in_host_memory() if settings.opd_teacher_offload else []  # on a CPU the copies are the weights
        for param, kept in self._host:
            param.data = kept

    def _align_head(self, student: PackedGPTModel) -> Tensor:
        """This rank's rows of the teacher's vocabulary matrix, for the ids of the student's shard, [V, H]."""
        inner = self._inner
        weight = inner.shared_embedding_or_output_weight() if self.shape.tied else inner.output_layer.weight
        rows = student.vocab_size // mpu.get_tensor_model_parallel_world_size()
        if weight.size(0) == rows:
            return weight.detach()
        return reshard_vocab(weight.detach(), rows, mpu.get_tensor_model_parallel_group())

    def row_fields(self, batches: list[MicroBatch]) -> list[dict[str, Tensor]]:
        """Teacher fields of each micro-batch's rows: hidden states [R, H] and the head shard [V, H]; empty off the last stage."""

        def head(batch: MicroBatch, hidden_RH: Tensor, weight_VH: Tensor) -> tuple[Tensor, dict]:
            return hidden_RH.new_zeros((), dtype=torch.float32), {"teacher_hidden_RH": hidden_RH.detach()}

        with self._on_device(), torch.no_grad():
            kept = forward.run(self.model, batches, head, forward_only=True)
        if not kept:
            return [{} for _ in batches]
        return [{**fields, "teacher_weight_VH": self.head} for fields in kept]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Block with the weights on the device, where they are kept in host memory otherwise."""
        for param, kept in self._host:
            param.data = kept.to(self.device)
        try:
            yield
        finally:  # the copies in host memory are what they were: nothing has to go back
            for param, kept in self._host:
                param.data = kept

    def _in_host_memory(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Every parameter with its copy in host memory, but the head's, which losses read after the forward pass."""
        head = None if self.head is None else self.head.data_ptr()
        return [(p, p.data.cpu()) for p in self._inner.parameters() if p.data_ptr() != head]


def _load(model: PackedGPTModel, settings: Settings) -> None:
    source = settings.opd_teacher_load
    if (Path(source) / "config.json").is_file():
        weights.load_hf(model, source)
    else:
        checkpoint.load(checkpoint.require(source, settings.opd_teacher_ckpt_step), model, None, random_state=False)
