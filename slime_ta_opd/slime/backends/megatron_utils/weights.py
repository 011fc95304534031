"""Weights between HF names and megatron-core names, both ways, one tensor at a time.

A `Rule` says which HF tensors make up one megatron-core tensor and how the latter is cut over tensor-parallel ranks:
- copy: the same on every rank;
- rows, cols: cut along dimension 0 or 1;
- vocab: rows, with padding rows of zeros at the end (dropped again on the way out);
- qkv: query, key and value projections, grouped by key/value head: [q of group, k, v] for each group, groups over ranks;
- gate_up: each rank holds [gate part; up part].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from slime.backends.megatron_utils.hf_config import ModelShape
from slime.backends.megatron_utils.hf_files import HFReader
from slime.backends.megatron_utils.model import PackedGPTModel
from ta_opd.errors import DataError


@dataclass(frozen=True)
class Rule:
    kind: str
    hf: tuple[str, ...]
    expert: bool = False


_LAYER_RULES = {
    "input_layernorm.weight": Rule("copy", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": Rule("copy", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Rule("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": Rule("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.q_layernorm.weight": Rule("copy", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule("copy", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule("cols", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": Rule("copy", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Rule("copy", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Rule("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("cols", ("mlp.down_proj.weight",)),
    "mlp.router.weight": Rule("copy", ("mlp.gate.weight",)),
}
_EXPERT_RULES = {
    "linear_fc1.weight": ("gate_up", ("gate_proj.weight", "up_proj.weight")),
    "linear_fc2.weight": ("cols", ("down_proj.weight",)),
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_EXPERT_TE = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


def rule_for(name: str, shape: ModelShape) -> Rule:
    """Rule of a megatron-core tensor by its global name (layer and expert numbers of the whole model).

    Raises DataError for a name that no supported model has.
    """
    if name == "embedding.word_embeddings.weight":
        return Rule("vocab", ("model.embed_tokens.weight",))
    if name == "output_layer.weight":
        return Rule("vocab", ("model.embed_tokens.weight" if shape.tied else "lm_head.weight",))
    if name == "decoder.final_layernorm.weight":
        return Rule("copy", ("model.norm.weight",))
    layer = _LAYER.fullmatch(name)
    if layer:
        prefix, rest = f"model.layers.{layer[1]}.", layer[2]
        expert = _split_expert(rest)
        if expert and expert[1] in _EXPERT_RULES:
            kind, parts = _EXPERT_RULES[expert[1]]
            return Rule(kind, tuple(f"{prefix}mlp.experts.{expert[0]}.{p}" for p in parts), expert=True)
        if rest in _LAYER_RULES:
            rule = _LAYER_RULES[rest]
            return Rule(rule.kind, tuple(prefix + n for n in rule.hf))
    raise DataError(f"no HF counterpart is known for the megatron-core tensor {name!r} of a {shape.family} model")


def _split_expert(rest: str) -> tuple[int, str] | None:
    """(expert number, name inside the expert) for both expert layouts of megatron-core."""
    if match := _EXPERT.fullmatch(rest):
        return int(match[1]), match[2]
    if match := _EXPERT_TE.fullmatch(rest):
        return int(match[2]), match[1]
    return None


def hf_names(shape: ModelShape) -> list[str]:
    """Every tensor name of the model's HF directory, in the order of the layers."""
    layer = [n for key, rule in _LAYER_RULES.items() if "layer_norm_weight" not in key for n in rule.hf]
    if not shape.qkv_bias:
        layer = [n for n in layer if not n.endswith(".bias")]
    if not shape.qk_norm:
        layer = [n for n in layer if "_norm.weight" not in n]
    if shape.is_moe:
        layer = [n for n in layer if not n.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight"))]
        for expert in range(shape.num_experts):
            layer += [f"mlp.experts.{expert}.{x}_proj.weight" for x in ("gate", "up", "down")]
    else:
        layer.remove("mlp.gate.weight")
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{n}" for i in range(shape.num_layers) for n in layer]
    names.append("model.norm.weight")
    return names if shape.tied else [*names, "lm_head.weight"]


def read_shard(reader: HFReader, rule: Rule, shape: ModelShape, rank: int, size: int, padded_vocab: int) -> Tensor:
    """This tensor-parallel rank's part of a megatron-core tensor, reading only the needed parts of the HF files.

    rank, size: position in the tensor-parallel group. Raises DataError where a tensor is missing or has another shape.
    """
    if rule.kind == "copy":
        return reader.get(rule.hf[0])
    if rule.kind == "cols":
        part = reader.slice(rule.hf[0])
        width = _divide(reader, rule.hf[0], part.get_shape()[1], size)
        return part[:, rank * width : (rank + 1) * width]
    if rule.kind == "gate_up":
        return torch.cat([_row_part(reader, name, rank, size) for name in rule.hf])
    if rule.kind == "vocab":
        return _vocab_part(reader, rule.hf[0], shape, rank, size, padded_vocab)
    return _group_qkv([_row_part(reader, name, rank, size) for name in rule.hf], shape)


def _row_part(reader: HFReader, name: str, rank: int, size: int) -> Tensor:
    part = reader.slice(name)
    rows = _divide(reader, name, part.get_shape()[0], size)
    return part[rank * rows : (rank + 1) * rows]


def _divide(reader: HFReader, name: str, length: int, size: int) -> int:
    if length % size:
        raise DataError(f"{reader.path}: {name} of length {length} cannot be cut over {size} tensor-parallel ranks")
    return length // size


def _vocab_part(reader: HFReader, name: str, shape: ModelShape, rank: int, size: int, padded: int) -> Tensor:
    part = reader.slice(name)
    stored = part.get_shape()[0]
    if stored != shape.vocab_size:
        raise DataError(f"{reader.path}: {name} has {stored} rows, but config.json says vocab_size {shape.vocab_size}")
    rows = padded // size
    start, stop = rank * rows, min((rank + 1) * rows, stored)
    real = part[start:stop] if start < stop else part[:0]
    return real if len(real) == rows else torch.cat([real, real.new_zeros(rows - len(real), real.size(1))])


def _group_qkv(qkv: list[Tensor], shape: ModelShape) -> Tensor:
    """Rows of q, k, v for some groups -> grouped rows [q of group, k, v, q of next group, ...]."""
    groups = qkv[1].size(0) // shape.head_dim
    return torch.cat([x.reshape(groups, -1, *x.shape[1:]) for x in qkv], dim=1).reshape(-1, *qkv[0].shape[1:])


def merge_shards(rule: Rule, shards: list[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Parts of one megatron-core tensor in rank order -> HF tensors by name; undoes `read_shard`."""
    if rule.kind == "copy":
        return {rule.hf[0]: shards[0]}
    if rule.kind == "cols":
        return {rule.hf[0]: torch.cat(shards, dim=1) if len(shards) > 1 else shards[0]}
    if rule.kind == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return {name: torch.cat([h[i] for h in halves]) for i, name in enumerate(rule.hf)}
    full = torch.cat(shards) if len(shards) > 1 else shards[0]
    if rule.kind == "vocab":
        return {rule.hf[0]: full[: shape.vocab_size]}
    per_group = shape.num_heads // shape.num_kv_heads * shape.head_dim
    grouped = full.reshape(shape.num_kv_heads, per_group + 2 * shape.head_dim, *full.shape[1:])
    parts = grouped.split([per_group, shape.head_dim, shape.head_dim], dim=1)
    return {name: p.reshape(-1, *full.shape[1:]) for name, p in zip(rule.hf, parts, strict=True)}


def global_name(name: str, model: PackedGPTModel) -> str:
    """Local parameter name on this rank -> the name with the whole model's layer and expert numbers."""
    layer = _LAYER.fullmatch(name)
    if not layer:
        return name
    number = int(layer[1]) + get_transformer_layer_offset(model.config)
    rest = layer[2]
    expert = _split_expert(rest)
    if expert:
        local = model.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
        which = expert[0] + mpu.get_expert_model_parallel_rank() * local
        rest = f"mlp.experts.local_experts.{which}.{expert[1]}"
    return f"decoder.layers.{number}.{rest}"


def load_hf(model: PackedGPTModel, path: str) -> None:
    """Fills this rank's parameters from an HF directory. Raises DataError where tensors are missing or do not fit."""
    reader = HFReader(path)
    absent = [name for name in hf_names(model.shape) if name not in reader]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} tensors of a {model.shape.family} model are missing, the first {absent[0]!r}; "
            "the directory is incomplete or config.json is of another model"
        )
    for name, param in model.named_parameters():
        rule = rule_for(global_name(name, model), model.shape)
        group = _tensor_group(rule)
        value = read_shard(reader, rule, model.shape, group.rank(), group.size(), model.vocab_size)
        if value.shape != param.shape:
            raise DataError(f"{path}: {rule.hf[0]}: expected a part of shape {tuple(param.shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            param.copy_(value)


def _tensor_group(rule: Rule) -> dist.ProcessGroup:
    return mpu.get_expert_tensor_parallel_group() if rule.expert else mpu.get_tensor_model_parallel_group()


def hf_weight_buckets(model: PackedGPTModel, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """The model's weights by HF name, gathered on global rank 0 a bucket at a time.

    Collective: every rank iterates to the end. Rank 0 gets lists of (name, tensor on its device) of about
    `bucket_bytes`; the other ranks get as many empty lists. At no time is more than one bucket held beside the model.
    """
    source = dist.get_rank() == 0
    bucket, size = [], 0
    for rule, owners, local in _manifest(model):
        shards = _collect(local, owners)
        full_bytes = owners[0][1].numel() * owners[0][1].element_size() * len(owners)
        if size and size + full_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        if source:
            bucket += [(name, t.contiguous()) for name, t in merge_shards(rule, shards, model.shape).items()]
        size += full_bytes
    yield bucket


def _manifest(model: PackedGPTModel) -> Iterable[tuple[Rule, list[tuple[int, Tensor]], Tensor | None]]:
    """(rule, [(owner rank, meta tensor of its shard)] by tensor-parallel rank, own shard or None) of every tensor."""
    own = {}
    for name, param in model.named_parameters():
        if name == "output_layer.weight" and model.shape.tied:
            continue
        own[global_name(name, model)] = param.detach()
    described = {n: (_tensor_group(rule_for(n, model.shape)).rank(), tuple(t.shape), t.dtype) for n, t in own.items()}
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, described)
    holders: dict[str, dict[int, tuple[int, Tensor]]] = {}
    for rank, names in enumerate(gathered):
        for name, (tp_rank, shape, dtype) in names.items():
            holders.setdefault(name, {}).setdefault(tp_rank, (rank, torch.empty(shape, dtype=dtype, device="meta")))
    for name in sorted(holders, key=_layer_order):
        rule = rule_for(name, model.shape)
        by_tp = holders[name]
        ranks = [0] if rule.kind == "copy" else range(len(by_tp))
        yield rule, [by_tp[r] for r in ranks], own.get(name)


def _layer_order(name: str) -> tuple:
    first = {"embedding": 0, "decoder.layers": 1, "decoder.final": 2, "output_layer": 3}
    place = next(v for k, v in first.items() if name.startswith(k))
    return place, [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def _collect(local: Tensor | None, owners: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Sends the owners' shards to rank 0; returns them there in rank order, and an empty list elsewhere."""
    rank = dist.get_rank()
    if rank != 0:
        if any(owner == rank for owner, _ in owners):
            dist.send(local.contiguous(), dst=0)
        return []
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shards = []
    for owner, meta in owners:
        if owner == 0:
            shards.append(local)
        else:
            shards.append(torch.empty(meta.shape, dtype=meta.dtype, device=device))
            dist.recv(shards[-1], src=owner)
    return shards
