"""torch_dist checkpoints: written beside, made durable, then put in place by a rename; loaded into any layout.

<dir>/iter_0000012/ holds rollout 12, <dir>/latest_checkpointed_iteration.txt names the newest one ("release" for
converted weights). A crash at any moment leaves the previous checkpoint loadable.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_distributed
from torch.distributed.checkpoint.api import CheckpointException

from slime.backends.megatron_utils.distributed import first_error
from slime.backends.megatron_utils.model import unwrap
from slime.backends.megatron_utils.optimizer import Optimizer
from slime.backends.megatron_utils.untrusted import only_weights, read_metadata
from slime.utils.config_file import SECRETS
from ta_opd.errors import ConfigError, DataError, ServiceError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
STACKED_KEY = "decoder.layers.self_attention.linear_proj.weight"
EXTRA_STATE = "._extra_state"  # grouped experts of Transformer Engine put their number behind it


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk: its directory and the rollout it holds (-1 for converted weights)."""

    path: Path
    rollout_id: int


def find(directory: str | Path, step: int | None = None) -> Found | None:
    """The newest checkpoint of a directory, or that of rollout `step`; None where there is none yet.

    Raises DataError where the tracker names a checkpoint that is not there.
    """
    root = Path(directory)
    if step is None:
        if not (root / TRACKER).is_file():
            return None
        text = (root / TRACKER).read_text().strip()
        if text != RELEASE and not text.isdigit():
            raise DataError(f"{root / TRACKER}: expected an iteration number or {RELEASE!r}, got {text!r}")
    else:
        text = str(step)
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    for path in (root / name, root / f".{name}.old"):
        if (path / "metadata.json").is_file():
            return Found(path, -1 if text == RELEASE else int(text))
    raise DataError(f"{root}: {TRACKER} names {name}, which is missing or incomplete; have {_names(root) or 'no checkpoint'}")


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("iter_*") if (p / "metadata.json").is_file())


def save(
    directory: str | Path,
    rollout_id: int,
    model,
    optimizer: Optimizer | None,
    *,
    args: argparse.Namespace,
    identity: dict[str, str],
    extra: dict[str, Any],
    keep: int | None = None,
    identity_changes: Sequence[dict] = (),
) -> Path:
    """Writes the checkpoint of `rollout_id` (collective). extra: plain values, tensors or numpy-free containers.
    identity_changes: every forced change of teacher or tokenizer so far (identity.forced_change).

    Raises DataError on every rank where `extra` holds something that cannot be read back safely, ServiceError where a file
    cannot be written (disk full): nothing of this checkpoint is left then, and those before it are whole.
    """
    root, name = Path(directory), f"iter_{rollout_id:07d}"
    partial = root / f".{name}.partial"
    common = {
        "ta_opd": {
            "format": 1,
            "rollout_id": rollout_id,
            "optimizer": optimizer is not None,
            "layout": layout(),
            "identity": identity,
            "identity_changes": list(identity_changes),
            "args": {k: v for k, v in _plain(vars(args)).items() if k not in SECRETS},
        },
        "extra": extra,
    }
    _check_plain(common)
    try:
        _write(root, partial, model, optimizer, common)
        if dist.get_rank() == 0:
            publish(root, partial, name, str(rollout_id))
            _drop_old(root, keep)
        dist.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _write_failure(error)
        if cause is None:
            raise
        # no word with the other ranks: they may be waiting inside the save, and end with the run
        shutil.rmtree(partial, ignore_errors=True)
        (root / f".{TRACKER}.partial").unlink(missing_ok=True)
        raise ServiceError(_not_written(root, rollout_id, cause)) from None
    return root / name


def _write(root: Path, partial: Path, model, optimizer: Optimizer | None, common: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        for left in root.glob(".iter_*.partial"):  # of a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {**_model_state(model, stacked=False), **common, "rng": _rng_object(_rng_state())}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], _metadata(False), is_loading=False)
        state["schedule"] = optimizer.schedule.state_dict()
    dist_checkpointing.save(state, str(partial), sharded_strategy=_InProcessSave("torch_dist", 1))


def _write_failure(error: BaseException) -> str | None:
    """What the operating system, or torch's writer, says against writing a file; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, CheckpointException):  # one exception a rank
        return next(filter(None, (_write_failure(cause) for cause, _ in error.failures.values())), None)
    if any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream error")):  # torch.save to a path
        return "a file could not be written"
    return None


def _not_written(root: Path, rollout_id: int, cause: str) -> str:
    names = _names(root)
    kept = f"the newest whole one is {names[-1]}" if names else "there is none before it"
    try:
        free = f"{shutil.disk_usage(root).free / 2**20:.0f} MiB free there"
    except OSError:
        free = "free space unknown"
    return (f"checkpoint of rollout {rollout_id} could not be written to {root}: {cause} ({free}). Nothing of it is left, {kept}. "
            "Make room, or keep fewer with --keep-checkpoints N, then resume with --load")  # fmt: skip


def load(found: Found, model, optimizer: Optimizer | None, *, random_state: bool = True) -> dict[str, Any]:
    """Fills model and, where given and saved, optimizer and random state (collective). Returns the common state.

    The layout may be another than that of the save; random state is then left alone. Raises DataError where the
    checkpoint does not hold this model.
    """
    path = str(found.path)
    common = read_common(found)
    ours = common.get("ta_opd", {})
    with_optimizer = optimizer is not None and bool(ours.get("optimizer"))
    stacked = STACKED_KEY in read_metadata(path).state_dict_metadata
    state = _model_state(model, stacked)
    same_layout = random_state and ours.get("layout") == layout()
    if same_layout:
        state["rng"] = _rng_object(None)
    if with_optimizer:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], _metadata(stacked), is_loading=True)
    try:
        with only_weights():
            loaded = dist_checkpointing.load(state, path)
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{path}: the checkpoint does not hold this model: {reason}") from error
    _fill(unwrap(model), loaded["model"], path)
    if with_optimizer:
        optimizer.load_state_dict(loaded["optimizer"])
        optimizer.schedule.load_state_dict(loaded["schedule"])
        optimizer.schedule.step(increment=0)
    elif optimizer is not None:
        optimizer.reload_from_model()
    if same_layout:
        _set_rng_state(loaded["rng"])
    return loaded


def read_common(found: Found) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors: {"ta_opd": {...}, "extra": {...}} for ours, anything for others."""
    read_metadata(found.path)  # refuses what is no metadata, before anything else reads it
    with only_weights():
        try:
            return dist_checkpointing.load_common_state_dict(str(found.path))
        except (pickle.UnpicklingError, CheckpointingException) as error:
            raise DataError(f"{found.path / 'common.pt'}: refused: {str(error).splitlines()[0]}") from None


def layout() -> dict[str, int]:
    return {
        "world": dist.get_world_size(),
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
    }


def publish(root: Path, partial: Path, name: str, tracked: str) -> None:
    """Makes `partial` durable, renames it to `name`, then names it in the tracker. One process only."""
    for folder, _, files in os.walk(partial):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))
    target, old = root / name, root / f".{name}.old"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(partial, target)
    _sync(root)
    temporary = root / f".{TRACKER}.partial"
    temporary.write_text(tracked)
    _sync(temporary)
    os.replace(temporary, root / TRACKER)
    _sync(root)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop_old(root: Path, keep: int | None) -> None:
    if keep:
        for name in _names(root)[:-keep]:
            shutil.rmtree(root / name)


class _InProcessSave(SaveShardedStrategy):
    """torch_dist without megatron-core's writer processes: they cost seconds a save and cannot start in a Ray actor."""

    can_handle_sharded_objects = True

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save_distributed(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _metadata(stacked: bool) -> dict[str, Any]:
    """How tensors are named: one key a layer (stock Megatron stacks layers; such checkpoints are read too)."""
    return {
        "non_homogeneous_layers": not stacked,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        # gathered between hosts and by the rank that writes it: else every rank held the whole state, and its GPU a third of that
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(model, stacked: bool) -> dict[str, Any]:
    """Tensors of the model; layers' extra states, which are empty, are left out, so that converted weights need none."""
    state = unwrap(model).sharded_state_dict(metadata=_metadata(stacked))
    return {"model": {k: v for k, v in state.items() if EXTRA_STATE not in k}}


def _fill(model, state: dict[str, Any], path: str) -> None:
    """Sets the model's tensors. Transformer Engine's layers also ask for their extra states, which have a use in FP8 only."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [k for k in missing if EXTRA_STATE not in k] + unexpected
    if wrong:
        raise DataError(f"{path}: the checkpoint does not hold this model: {len(wrong)} tensors do not fit, the first {wrong[0]!r}")


def _rng_object(data) -> ShardedObject:
    return ShardedObject("rng_state", data, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _rng_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _plain(value: Any) -> Any:
    """Arguments as they can be stored: containers of plain values; anything else by its text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _check_plain(common: dict[str, Any]) -> None:
    """DataError on every rank if any rank's common state cannot be loaded back with weights_only."""
    error = None
    try:
        buffer = io.BytesIO()
        torch.save(common, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as cause:  # pickle raises many kinds
        error = DataError(f"checkpoint: `extra` must hold plain values, got something that cannot be read back: {cause}")
    error = first_error(error)
    if error is not None:
        raise error


def require(directory: str, step: int | None = None) -> Found:
    """`find`, where a checkpoint must be there. Raises ConfigError if not."""
    found = find(directory, step)
    if found is None:
        raise ConfigError(f"{directory}: expected a torch_dist checkpoint with {TRACKER}, found none")
    return found
