"""What Transformer Engine's layers bring along, without it: parameter names (as it has them in 2.11), extra states, another Adam."""

import mt_tiny
import numpy as np
import pytest
import torch
from conftest import data

from slime.backends.megatron_utils import checkpoint
from slime.backends.megatron_utils.convert import entries
from slime.backends.megatron_utils.hf_config import model_shape
from slime.backends.megatron_utils.weights import _split_expert, hf_names, rule_for
from ta_opd.errors import DataError

ATTENTION = [f"self_attention.{x}" for x in ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight")]
QK_NORM = ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
MLP = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
EXPERTS = ["pre_mlp_layernorm.weight", "mlp.router.weight", *(f"mlp.experts.linear_fc{i}.weight{n}" for i in (1, 2) for n in range(4))]
LAYER = {
    "qwen3": [*ATTENTION, *QK_NORM, *MLP],
    "qwen2": [*ATTENTION, "self_attention.linear_qkv.bias", *MLP],
    "llama": [*ATTENTION, *MLP],
    "qwen3_moe": [*ATTENTION, *QK_NORM, *EXPERTS],
}


@pytest.mark.parametrize("family", list(LAYER))
def test_each_hf_tensor_is_in_one_tensor_of_the_engines_model(family):
    shape = model_shape(mt_tiny.config(family).to_dict(), family)
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    names += [f"decoder.layers.{i}.{name}" for i in range(shape.num_layers) for name in LAYER[family]]
    rules = {name: rule_for(name, shape) for name in names}
    assert sorted(hf for rule in rules.values() for hf in rule.hf) == sorted(hf_names(shape))
    converted = {entry.key: entry.rule for entry in entries(shape) if "experts" not in entry.key}
    assert converted == {name: rule for name, rule in rules.items() if "experts" not in name}
    experts = [rule for name, rule in rules.items() if _split_expert(name.split(".", 3)[-1])]
    assert len(experts) == (8 * shape.num_layers if shape.is_moe else 0) and all(rule.expert for rule in experts)


class Layer(torch.nn.Linear):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("nothing to set")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(2, 3), Layer(3, 2)

    def sharded_state_dict(self, metadata):
        state = self.state_dict()
        return {**state, "second._extra_state1": state["second._extra_state"]}  # as grouped experts number theirs


def test_extra_states_are_neither_written_nor_asked_for(monkeypatch):
    monkeypatch.setattr(checkpoint, "unwrap", lambda model: model)
    monkeypatch.setattr(checkpoint, "_metadata", lambda stacked: {})
    source, target = Model(), Model()
    state = checkpoint._model_state(source, stacked=False)["model"]
    assert set(state) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    checkpoint._fill(target, state, "here")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    with pytest.raises(DataError, match="first.bias"):
        checkpoint._fill(target, {k: v for k, v in state.items() if k != "first.bias"}, "here")
    with pytest.raises(DataError, match="third"):
        checkpoint._fill(target, {**state, "third": torch.zeros(1)}, "here")


@pytest.mark.parametrize("distributed", [False, True])
def test_another_adam_beside_it_changes_nothing(pool, models, tmp_path, distributed):
    """A checkpoint from a machine where megatron-core finds another Adam goes on, to the bit, on one where it finds none."""
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), use_distributed_optimizer=distributed)
    saved = pool.run("beside_another_adam", 1, case="save_then_step", **common)[0]
    for case in ("load_then_step", "beside_another_adam"):
        how = {} if case == "load_then_step" else {"case": "load_then_step"}
        loaded = pool.run(case, 1, load=str(tmp_path / "run"), **common, **how)[0]
        assert loaded["steps"] == {2.0} and loaded["fused"]
        for name, expected in saved["after"].items():
            np.testing.assert_array_equal(loaded["after"][name], expected, err_msg=name)
