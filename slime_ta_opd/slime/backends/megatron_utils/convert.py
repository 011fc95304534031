"""HF directories to torch_dist checkpoints and back, one tensor at a time: memory holds the largest tensor, not the model.

Needs no GPU, no process group and no model: names and shapes follow from config.json by the rules of `weights`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from slime.backends.megatron_utils import checkpoint
from slime.backends.megatron_utils.hf_config import ModelShape, load_shape, read_config
from slime.backends.megatron_utils.hf_files import HFReader, HFWriter
from slime.backends.megatron_utils.torch_dist_files import TorchDistReader, TorchDistWriter
from slime.backends.megatron_utils.weights import Rule, hf_names, merge_shards, read_shard, rule_for
from ta_opd.errors import ConfigError, DataError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One megatron-core tensor: its key in the checkpoint, its place on stacked axes, its rule."""

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    rule: Rule


def entries(shape: ModelShape, stacked: bool = False) -> Iterator[Entry]:
    """Every tensor of the model in checkpoint naming. stacked: layers on a leading axis, as stock Megatron may write."""
    yield Entry("embedding.word_embeddings.weight", (), (), rule_for("embedding.word_embeddings.weight", shape))
    for layer in range(shape.num_layers):
        for name in _layer_tensors(shape):
            experts = range(shape.num_experts) if ".experts." in name else [None]
            for expert in experts:
                local = name if expert is None else name.replace("experts.experts", f"experts.local_experts.{expert}")
                rule = rule_for(f"decoder.layers.{layer}.{local}", shape)
                index, stack = ((layer,), (shape.num_layers,)) if stacked else ((), ())
                if expert is not None:
                    index, stack = (*index, expert), (*stack, shape.num_experts)
                yield Entry(f"decoder.layers.{name}" if stacked else f"decoder.layers.{layer}.{name}", index, stack, rule)
    yield Entry("decoder.final_layernorm.weight", (), (), rule_for("decoder.final_layernorm.weight", shape))
    if not shape.tied:
        yield Entry("output_layer.weight", (), (), rule_for("output_layer.weight", shape))


def _layer_tensors(shape: ModelShape) -> list[str]:
    names = ["self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"]
    names += ["self_attention.linear_qkv.bias"] if shape.qkv_bias else []
    names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] if shape.qk_norm else []
    names += ["self_attention.linear_proj.weight"]
    if shape.is_moe:
        return [*names, "pre_mlp_layernorm.weight", "mlp.router.weight", *(f"mlp.experts.experts.linear_fc{i}.weight" for i in (1, 2))]
    return [*names, "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]


def hf_to_torch_dist(
    hf_dir: str | Path, save_dir: str | Path, *, force: bool = False, vocab_multiple: int = 1, report: Report = print
) -> Path:
    """Writes <save_dir>/release and a tracker that names it. Returns the release directory.

    Raises ConfigError for a model type that is not supported and for a target that exists (unless `force`), DataError for
    missing tensors or shapes that disagree with config.json. Nothing is put in place before all is written.
    """
    shape = load_shape(hf_dir)
    root = Path(save_dir)
    _refuse_existing(root, force)
    reader = HFReader(hf_dir)
    absent = [name for name in hf_names(shape) if name not in reader]
    if absent:
        raise DataError(f"{hf_dir}: {len(absent)} tensors of a {shape.family} model are missing, the first {absent[0]!r}")
    partial = root / f".{checkpoint.RELEASE}.partial"
    with _removed_on_error(partial):
        writer = TorchDistWriter(partial)
        padded = shape.padded_vocab(vocab_multiple, 1)
        for number, entry in enumerate(entries(shape)):
            tensor = read_shard(reader, entry.rule, shape, 0, 1, padded)
            _check_shape(hf_dir, entry, tensor, shape, padded)
            writer.add(
                entry.key,
                tensor.reshape((1,) * len(entry.index) + tensor.shape),
                global_shape=(*entry.stack, *tensor.shape),
                offset=(*entry.index, *(0,) * tensor.dim()),
            )
            if number % 50 == 0:
                report(f"{entry.key} {tuple(tensor.shape)} {tensor.dtype}")
        info = {"format": 1, "rollout_id": -1, "optimizer": False, "identity": {}, "hf_config": read_config(hf_dir)}
        writer.close({"ta_opd": info, "extra": None})
        checkpoint.publish(root, partial, checkpoint.RELEASE, checkpoint.RELEASE)
    report(f"wrote {root / checkpoint.RELEASE}")
    return root / checkpoint.RELEASE


def torch_dist_to_hf(
    checkpoint_dir: str | Path,
    origin_hf_dir: str | Path,
    output_dir: str | Path,
    *,
    force: bool = False,
    shard_bytes: int = 5 * 2**30,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    report: Report = print,
) -> Path:
    """One checkpoint directory (`iter_*` or `release`) to an HF directory with config and tokenizer of the origin.

    vocab_size: rows of the vocabulary to write, if not those of the origin's config. dtype: of the written weights; by
    default that of the checkpoint. Raises ConfigError for a target that exists (unless `force`) and unsupported models,
    DataError where the checkpoint holds another model.
    """
    shape = load_shape(origin_hf_dir)
    if vocab_size is not None and vocab_size != shape.vocab_size:
        raise ConfigError(f"--vocab-size: expected {shape.vocab_size} as in {origin_hf_dir}/config.json, got {vocab_size}")
    output = Path(output_dir)
    _refuse_existing(output, force)
    reader = TorchDistReader(checkpoint_dir)
    stacked = checkpoint.STACKED_KEY in reader
    writer = HFWriter(output, shard_bytes)
    written_dtype = dtype
    with _removed_on_error(writer.partial):
        for number, entry in enumerate(entries(shape, stacked)):
            tensor = reader.read(entry.key, entry.index)
            if entry.rule.kind == "vocab" and tensor.size(0) < shape.vocab_size:
                raise DataError(f"{checkpoint_dir}: {entry.key} has {tensor.size(0)} rows, the vocabulary {shape.vocab_size}")
            padded = tensor.size(0) if entry.rule.kind == "vocab" else 0
            _check_shape(checkpoint_dir, entry, tensor, shape, padded)
            for name, value in merge_shards(entry.rule, [tensor], shape).items():
                writer.add(name, value if dtype is None else value.to(dtype))
            written_dtype = written_dtype or tensor.dtype
            if number % 50 == 0:
                report(f"{entry.key}{list(entry.index) or ''} {tuple(tensor.shape)} {tensor.dtype}")
        writer.close(origin_hf_dir, written_dtype)
    report(f"wrote {output}")
    return output


def checkpoint_directory(root: str | Path, iteration: str = "latest") -> Path:
    """`latest` or a number -> the directory of that checkpoint. A directory that is one already is taken as it is."""
    root = Path(root)
    if iteration == "latest" and (root / "common.pt").is_file():
        return root
    if iteration != "latest" and not iteration.isdigit():
        raise ConfigError(f"--iteration: expected latest or a number, got {iteration!r}")
    return checkpoint.require(str(root), None if iteration == "latest" else int(iteration)).path


def _return_freed_memory() -> None:
    """Lets glibc give freed tensors back to the system at once; its heap would otherwise grow to the size of the model."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    """Starts without `partial` left from before, and leaves none behind when the block fails."""
    _return_freed_memory()
    created = not partial.parent.exists()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(partial.parent if created else partial, ignore_errors=True)
        raise


def _refuse_existing(target: Path, force: bool) -> None:
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target}: exists and is not empty; expected a new directory, or --force to replace it")
    if target.is_file():
        raise ConfigError(f"{target}: is a file; expected a directory")
    os.makedirs(target.parent, exist_ok=True)


def _check_shape(where, entry: Entry, tensor: torch.Tensor, shape: ModelShape, padded_vocab: int) -> None:
    """DataError where a tensor has not the size that config.json implies."""
    hidden, q = shape.hidden_size, shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    ffn = shape.moe_ffn_hidden_size if entry.rule.expert else shape.ffn_hidden_size
    name = entry.key.split(".", 2)[-1] if entry.key.startswith("decoder.layers.") else entry.key
    expected = {
        "vocab": (padded_vocab, hidden),
        "qkv": (q + 2 * kv,) if name.endswith("bias") else (q + 2 * kv, hidden),
        "gate_up": (2 * ffn, hidden),
        "cols": (hidden, ffn if "fc2" in name else q),
        "rows": tuple(tensor.shape),
    }.get(entry.rule.kind)
    if expected is None:  # copied as they are: norms and the router
        if "router" in name:
            expected = (shape.num_experts, hidden)
        else:
            expected = (shape.head_dim,) if name.endswith(("q_layernorm.weight", "k_layernorm.weight")) else (hidden,)
    if tuple(tensor.shape) != expected:
        raise DataError(f"{where}: {entry.key}: expected shape {expected} by config.json, got {tuple(tensor.shape)}")
