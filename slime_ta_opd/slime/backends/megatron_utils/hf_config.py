"""The model's shape from the HF config.json: what megatron-core needs to know about a model, and nothing else.

Families: Qwen3, Qwen2 / Qwen2.5, Llama 3, Qwen3 MoE. Anything else is refused with the list of known types.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ta_opd.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

FAMILIES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "qwen3_moe": "qwen3_moe"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a decoder-only model. `rope` holds the rope parameters as HF names them."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope: dict
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def padded_vocab(self, multiple: int, tp: int) -> int:
        """Vocabulary rows that the model holds: `vocab_size` rounded up to a multiple of `multiple` x `tp`."""
        step = max(multiple, 1) * tp
        return (self.vocab_size + step - 1) // step * step


def read_config(path: str | Path) -> dict:
    """config.json of an HF directory. Raises DataError if there is none."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise DataError(f"{path}: expected an HF model directory with config.json, found none")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, got something else: {error}") from error


def load_shape(path: str | Path) -> ModelShape:
    return model_shape(read_config(path), str(path))


def model_shape(config: dict, where: str = "config.json") -> ModelShape:
    """HF config -> ModelShape. Raises ConfigError for a model type or an option that is not supported."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not supported by the Megatron trainer; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    _refuse(config, where, family)
    heads = config["num_attention_heads"]
    theta, rope = _rope_parameters(config, where)
    moe = {}
    if family == "qwen3_moe":
        moe = {
            "num_experts": config.get("num_experts") or config["num_local_experts"],  # transformers 5 writes the latter
            "experts_per_token": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        }
    return ModelShape(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        max_positions=config.get("max_position_embeddings", 4096),
        rope_theta=theta,
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        **moe,
    )


def _refuse(config: dict, where: str, family: str) -> None:
    """ConfigError for options that would silently change the maths."""
    refused = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")) and family != "qwen2",
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "quantization_config": config.get("quantization_config") is not None,
    }
    for key, bad in refused.items():
        if bad:
            raise ConfigError(f"{where}: {key} = {config.get(key)!r} is not supported by the Megatron trainer for {family}")


def _rope_parameters(config: dict, where: str) -> tuple[float, dict]:
    """(theta, parameters) from both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; expected default, linear or llama3")
    return float(theta), {"rope_type": kind, **rope}


def rope_inv_freq(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies, float32 [head_dim / 2], as HF computes them (llama3: Llama 3.1 wavelength blending)."""
    import torch  # here alone, so that shapes and layouts can be looked at without it (tools/plan_run.py)

    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    inv_freq = 1.0 / (shape.rope_theta**exponents)
    kind = shape.rope["rope_type"]
    if kind == "linear":
        return inv_freq / shape.rope["factor"]
    if kind == "llama3":
        factor, original = shape.rope["factor"], shape.rope["original_max_position_embeddings"]
        low, high = shape.rope["low_freq_factor"], shape.rope["high_freq_factor"]
        wavelength = 2 * math.pi / inv_freq
        blend = (original / wavelength - low) / (high - low)
        middle = (1 - blend) * inv_freq / factor + blend * inv_freq
        long, short = wavelength > original / low, wavelength < original / high
        return torch.where(long, inv_freq / factor, torch.where(short, inv_freq, middle))
    return inv_freq


def check_layout(
    shape: ModelShape, *, world: int, tp: int, pp: int, cp: int, ep: int, expert_tp: int, sequence_parallel: bool
) -> None:
    """Refuses a parallel layout that does not divide the model or the world. Raises ConfigError; builds nothing."""
    if min(world, tp, pp, cp, ep) < 1:
        raise ConfigError(f"layout: expected sizes of at least 1, got world {world}, TP {tp}, PP {pp}, CP {cp}, EP {ep}")
    if world % (tp * pp * cp):
        raise ConfigError(f"layout: expected world size {world} to be a multiple of TP x PP x CP = {tp} x {pp} x {cp}")
    for what, size in (("attention heads", shape.num_heads), ("key/value groups", shape.num_kv_heads)):
        if size % tp:
            raise ConfigError(f"layout: expected TP to divide the {size} {what}, got TP {tp}")
    ffn, ffn_tp = (shape.moe_ffn_hidden_size, expert_tp) if shape.is_moe else (shape.ffn_hidden_size, tp)
    if ffn % ffn_tp:
        raise ConfigError(f"layout: expected TP to divide the MLP width {ffn}, got TP {ffn_tp}")
    if shape.num_layers % pp:
        raise ConfigError(f"layout: expected PP to divide the {shape.num_layers} layers, got PP {pp}")
    if ep > 1 and not shape.is_moe:
        raise ConfigError(f"layout: expert parallelism {ep} needs a model with experts; {shape.family} has none")
    if shape.is_moe:
        if shape.num_experts % ep:
            raise ConfigError(f"layout: expected EP to divide the {shape.num_experts} experts, got EP {ep}")
        if world % (expert_tp * pp * ep):
            raise ConfigError(
                f"layout: expected world size {world} to be a multiple of expert TP x PP x EP = {expert_tp} x {pp} x {ep}"
            )
        if tp > 1 and not sequence_parallel:
            raise ConfigError("layout: experts with TP > 1 need --sequence-parallel")
    if sequence_parallel and tp == 1:
        raise ConfigError("layout: --sequence-parallel needs --tensor-model-parallel-size of 2 or more, got 1")
