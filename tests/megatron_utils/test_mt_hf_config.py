"""Shapes from config.json, rotary frequencies against transformers, and layouts that do not divide."""

import dataclasses
import importlib.util

import mt_tiny
import numpy as np
import pytest

from slime.backends.megatron_utils.hf_config import check_layout, load_shape, model_shape, rope_inv_freq
from slime.backends.megatron_utils.settings import Settings
from ta_opd.errors import ConfigError, DataError

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip


def test_shape_of_qwen3_1_7b():
    shape = model_shape(QWEN3)
    assert (shape.num_layers, shape.head_dim, shape.rope_theta, shape.tied, shape.qk_norm, shape.qkv_bias) == (28, 128, 1e6, True, True, False)
    assert shape.padded_vocab(1, 8) == 151936 and shape.padded_vocab(128, 2) == 152064 and shape.padded_vocab(1, 5) == 151940


def test_families(models):
    assert load_shape(models("qwen2")).qkv_bias
    llama = load_shape(models("llama", True))
    assert (llama.qkv_bias, llama.qk_norm, llama.rope["rope_type"]) == (False, False, "llama3")
    moe = load_shape(models("qwen3_moe"))
    assert (moe.num_experts, moe.experts_per_token, moe.moe_ffn_hidden_size, moe.norm_topk_prob) == (4, 2, 16, True)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_rotary_frequencies_are_those_of_transformers(family):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = mt_tiny.config(family)
    shape = model_shape(config.to_dict())
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected = 1.0 / 1e4 ** (np.arange(0, 16, 2) / 16)
    else:
        expected = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].numpy()
    np.testing.assert_allclose(rope_inv_freq(shape).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gemma3"}, "gemma3.*qwen3, qwen2, llama, qwen3_moe"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_would_change_the_maths_is_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        model_shape({**QWEN3, **changes})


def test_no_config_json(tmp_path):
    with pytest.raises(DataError, match="config.json, found none"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json: expected JSON"):
        load_shape(tmp_path)


LAYOUT = dict(world=8, tp=2, pp=2, cp=2, ep=1, expert_tp=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"world": 6}, "world size 6"),
        ({"tp": 16, "pp": 1, "cp": 1, "world": 16}, "8 key/value groups"),
        ({"tp": 3, "pp": 1, "cp": 1, "world": 3}, "16 attention heads"),
        ({"pp": 8, "tp": 1, "cp": 1, "sequence_parallel": False}, "28 layers"),
        ({"tp": 1, "sequence_parallel": True}, "--sequence-parallel needs"),
        ({"ep": 2}, "has none"),
        ({"cp": 0}, "at least 1"),
    ],
)
def test_bad_layouts(changes, text):
    with pytest.raises(ConfigError, match=text):
        check_layout(model_shape(QWEN3), **{**LAYOUT, **changes})


def test_bad_expert_layouts(models):
    shape = load_shape(models("qwen3_moe"))
    layout = dict(world=4, tp=2, pp=1, cp=1, ep=2, expert_tp=2, sequence_parallel=True)
    check_layout(shape, **layout)
    for changes, text in (({"ep": 3}, "4 experts"), ({"ep": 4}, "world size 4"), ({"sequence_parallel": False}, "--sequence-parallel")):
        with pytest.raises(ConfigError, match=text):
            check_layout(shape, **{**layout, **changes})
    with pytest.raises(ConfigError, match="MLP width 18"):
        check_layout(dataclasses.replace(shape, moe_ffn_hidden_size=18), **{**layout, "expert_tp": 4, "world": 8})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bf16": True, "fp32": True}, "--bf16 and --fp32"),
        ({"max_tokens_per_gpu": 0}, "--max-tokens-per-gpu"),
        ({"recompute_granularity": "full"}, "--recompute-method"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]}, "--recompute-modules: .* got 'layernorm'"),
        ({"overlap_param_gather": True}, "--use-distributed-optimizer"),
        ({"lr": -1.0}, "--lr"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"opd_loss_rows": "some"}, "--opd-loss-rows"),
        ({"opd_last_layer_rows": "some"}, "--opd-last-layer-rows"),
        ({"transformer_impl": "te"}, "local or transformer_engine"),
    ],
)
def test_bad_settings(changes, text):
    import argparse

    with pytest.raises(ConfigError, match=text):
        Settings.from_args(argparse.Namespace(**changes))


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_transformer_engine_is_asked_for_and_missing(monkeypatch):
    """Said before anything is built, and again where a half-installed one gets past that."""
    import argparse

    from megatron.core.transformer import TransformerConfig

    from slime.backends.megatron_utils.layer_spec import block_spec

    with pytest.raises(ConfigError, match="Transformer Engine is not installed; install it or use local"):
        Settings.from_args(argparse.Namespace(transformer_impl="transformer_engine"))
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ConfigError, match="Transformer Engine"):
        block_spec(config, "transformer_engine")


def test_settings_take_defaults_for_missing_and_none():
    import argparse

    settings = Settings.from_args(argparse.Namespace(lr=None, clip_grad=0.3, expert_tensor_parallel_size="1", unknown=3))
    assert (settings.lr, settings.clip_grad, settings.expert_tp) == (1e-6, 0.3, 1)
    run = Settings.from_args(argparse.Namespace(num_rollout=5, rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=16))
    assert run.total_steps == 10
