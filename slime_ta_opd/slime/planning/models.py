"""Model sizes from an HF config or a parameter count, and what follows from them: parameters, cache bytes, operations.

Operations are multiplications plus additions of one forward pass. Shapes: L layers, h hidden, V vocabulary, S positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from slime.backends.megatron_utils.hf_config import ModelShape, model_shape, read_config
from ta_opd.errors import ConfigError

VOCABULARY = 151_936
BF16 = 2
# Known shapes by parameter count: hidden, ffn, layers, heads, KV heads, tied, experts, active experts, expert ffn.
KNOWN = {
    "0.6B": (1024, 3072, 28, 16, 8, True, 0, 0, 0),
    "1.7B": (2048, 6144, 28, 16, 8, True, 0, 0, 0),
    "4B": (2560, 9728, 36, 32, 8, True, 0, 0, 0),
    "8B": (4096, 12288, 36, 32, 8, False, 0, 0, 0),
    "14B": (5120, 17408, 40, 40, 8, False, 0, 0, 0),
    "32B": (5120, 25600, 64, 64, 8, False, 0, 0, 0),
    "30B-A3B": (2048, 6144, 48, 32, 4, False, 128, 8, 768),
    "235B-A22B": (4096, 12288, 94, 64, 4, False, 128, 8, 1536),
}
HEAD_DIM = 128
_COUNT = re.compile(r"(\d+(?:\.\d+)?)B(-A\d+(?:\.\d+)?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Model:
    """A shape with a name. `guessed`: the shape was made up for a parameter count that no known model has."""

    name: str
    shape: ModelShape
    guessed: bool = False

    @property
    def q_width(self) -> int:
        return self.shape.num_heads * self.shape.head_dim

    @property
    def kv_width(self) -> int:
        return self.shape.num_kv_heads * self.shape.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.shape.hidden_size * (2 * self.q_width + 2 * self.kv_width)

    @property
    def expert_parameters(self) -> int:
        """Of all experts of one layer; 0 in a dense model."""
        s = self.shape
        return 3 * s.hidden_size * s.moe_ffn_hidden_size * s.num_experts

    @property
    def dense_parameters(self) -> int:
        """Of one layer, without experts."""
        s = self.shape
        mlp = s.hidden_size * s.num_experts if s.is_moe else 3 * s.hidden_size * s.ffn_hidden_size
        return self.attention_parameters + mlp + 2 * s.hidden_size

    @property
    def active_layer_parameters(self) -> int:
        """Of one layer, those that one token meets."""
        s = self.shape
        return self.dense_parameters + 3 * s.hidden_size * s.moe_ffn_hidden_size * s.experts_per_token

    @property
    def table_parameters(self) -> int:
        """Of one of the two vocabulary matrices."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def parameters(self) -> int:
        tables = 1 if self.shape.tied else 2
        return self.shape.num_layers * (self.dense_parameters + self.expert_parameters) + tables * self.table_parameters

    @property
    def trunk_active(self) -> int:
        """Parameters between the two vocabulary matrices that one token meets."""
        return self.shape.num_layers * self.active_layer_parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one position, bf16."""
        return 2 * self.shape.num_layers * self.kv_width * BF16

    def trunk_operations(self, tokens: float) -> float:
        return 2.0 * self.trunk_active * tokens

    def unread_operations(self, tokens: float) -> float:
        """The part of the trunk that full recompute of layer by layer leaves out: a dense MLP's last product (recompute.py)."""
        s = self.shape
        return 0.0 if s.is_moe else 2.0 * s.num_layers * s.hidden_size * s.ffn_hidden_size * tokens

    def attention_operations(self, tokens: float, positions: float) -> float:
        """Causal attention of `tokens` tokens in sequences of `positions` tokens."""
        return 4.0 * self.shape.num_layers * self.q_width * tokens * positions / 2

    def head_operations(self, rows: float) -> float:
        return 2.0 * self.table_parameters * rows

    def decode_weight_bytes(self, batch: float) -> float:
        """Weights that one decoding step of a batch reads: all of a dense model, of experts those that some token meets."""
        s = self.shape
        experts = 0.0
        if s.is_moe:
            experts = self.expert_parameters * (1 - (1 - s.experts_per_token / s.num_experts) ** max(batch, 1.0))
        return BF16 * (s.num_layers * (self.dense_parameters + experts) + self.table_parameters)


def load_model(what: str, *, served: bool = False) -> Model:
    """A model by HF directory, config.json, known name ("1.7B", "235B-A22B") or dense parameter count ("3B").

    served: only servers hold it, so a quantized checkpoint (FP8, say) will do; its weights are counted in bf16. Raises ConfigError that
    says what would be understood.
    """
    path = Path(what)
    if path.is_dir() or path.name.endswith(".json"):
        if not path.exists():
            raise ConfigError(f"model {what!r}: expected an HF directory, a config.json or a parameter count such as 1.7B, got a path that does not exist")
        folder = path if path.is_dir() else path.parent
        config = read_config(folder) if path.is_dir() or path.name == "config.json" else _json(path)
        return Model(folder.name if path.is_dir() else path.stem, _shape_of(config, str(path), served))
    match = _COUNT.fullmatch(what.strip())
    if match is None:
        raise ConfigError(f"model {what!r}: expected an HF directory, a config.json, one of {', '.join(KNOWN)}, or a dense count such as 3B")
    name = what.strip().upper()
    if name in KNOWN:
        return Model(name, _shape(*KNOWN[name]))
    if match.group(2):
        raise ConfigError(f"model {what!r}: a mixture of experts is known by its config only (or {', '.join(k for k in KNOWN if '-A' in k)}); give its config.json")
    count = float(match.group(1)) * 1e9
    if not 5e7 <= count <= 2e12:
        raise ConfigError(f"model {what!r}: expected 0.05B to 2000B parameters")
    return Model(name, _guess(count), guessed=True)


def _shape_of(config: dict, where: str, served: bool) -> ModelShape:
    """Raises ConfigError on a config that names no decoder's sizes."""
    expected = f"model {where}: expected the config of a decoder with whole numbers above 0 as sizes"
    if not isinstance(config, dict):
        raise ConfigError(f"{expected}, got {type(config).__name__}")
    if served:
        config = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        shape = model_shape(config, where)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{expected}, got one without ({type(error).__name__}: {error})") from error
    sizes = ["num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_positions"]
    sizes += ["num_experts", "experts_per_token", "moe_ffn_hidden_size"] if shape.is_moe else []
    wrong = {name: getattr(shape, name) for name in sizes if type(getattr(shape, name)) is not int or getattr(shape, name) < 1}
    if wrong:
        raise ConfigError(f"{expected}, got {', '.join(f'{name} {value!r}' for name, value in wrong.items())}")
    return shape


def _json(path: Path) -> dict:
    import json

    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model {path}: expected a JSON config, got text that is not JSON ({error})") from error


def _shape(hidden, ffn, layers, heads, kv_heads, tied, experts=0, active=0, expert_ffn=0) -> ModelShape:
    return ModelShape(
        family="qwen3_moe" if experts else "qwen3", num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=HEAD_DIM, vocab_size=VOCABULARY, norm_eps=1e-6, max_positions=40_960, rope_theta=1e6,
        rope={"rope_type": "default"}, tied=tied, qkv_bias=False, qk_norm=True, num_experts=experts, experts_per_token=active,
        moe_ffn_hidden_size=expert_ffn,
    )  # fmt: skip


def _guess(count: float) -> ModelShape:
    """A dense shape of about `count` parameters: MLP three times as wide as hidden, one layer for 112 of hidden."""
    best = None
    for hidden in range(512, 32_769, 256):
        layers = max(4, round(hidden / 112 / 4) * 4)
        shape = _shape(hidden, 3 * hidden, layers, hidden // HEAD_DIM, 8 if hidden >= 1024 else 4, count < 5e9)
        error = abs(Model("", shape).parameters - count)
        if best is None or error < best[0]:
            best = (error, shape)
    return best[1]
