"""Models of the services benchmark: configurations in real shapes, tiny weights, and the tensors that a weight sync sends."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SHAPES = {
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32, vocab_size=4096),
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                 head_dim=128, vocab_size=151936),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
               head_dim=128, vocab_size=151936),
}  # fmt: skip


def write_model(folder: Path, shape: str, dtype: str, seed: int) -> Path:
    """Config and tokenizer of a Qwen3 of this shape, weights for the tiny one only; a server makes up the others."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tests" / "sglang_utils" / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder.mkdir()
    config = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=True, attention_bias=False, attention_dropout=0.0, use_cache=True,
        torch_dtype=dtype, initializer_range=0.02, **SHAPES[shape],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(folder)
    if shape == "tiny":
        _tiny_weights(folder, seed)
    return folder


def _tiny_weights(folder: Path, seed: int) -> None:
    """Student and teacher near each other (the teacher is the student and some noise), so that their top-k overlap."""
    import torch

    from slime.backends.sglang_utils.cpu_support import install_torchvision_schema

    install_torchvision_schema()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**json.loads((folder / "config.json").read_text()), "initializer_range": 0.15})).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * seed * torch.randn_like(p))
    model.save_pretrained(folder)


def hf_shapes(c: dict) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a dense Qwen3 with tied embeddings."""
    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    out = [("model.embed_tokens.weight", (c["vocab_size"], h)), ("model.norm.weight", (h,))]
    for i in range(c["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
            "self_attn.q_norm": (d,), "self_attn.k_norm": (d,), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f), "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        out += [(f"model.layers.{i}.{name}.weight", shape) for name, shape in layer.items()]
    return out


def bucketed(named, size: int) -> list[list]:
    buckets, room = [[]], size
    for name, tensor in named:
        need = tensor.numel() * tensor.element_size()
        if buckets[-1] and need > room:
            buckets.append([])
            room = size
        buckets[-1].append((name, tensor))
        room -= need
    return buckets
