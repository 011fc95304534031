"""Transformer Engine's layers on real GPUs, where it is installed: the dense model, our own layers and each other's checkpoints.

It multiplies fp32 in TF32 unless NVIDIA_TF32_OVERRIDE=0 says otherwise, as it does for these workers.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch
from conftest import data
from mt_pool import Pool
from test_mt_checkpoint import LAYOUTS as SAVED
from test_mt_parity import LAYOUTS, LR, MOE_LAYOUTS, moe_reference  # noqa: F401, a fixture
from test_mt_trainer import few_kept

GPUS = torch.cuda.device_count() or int(os.environ.get("TA_OPD_PRETEND_GPUS", 0))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
ENGINE = {"transformer_impl": "transformer_engine"}
BF16 = {"fp32": False, "bf16": True}
FAMILIES = [("qwen3", False), ("qwen3", True), ("qwen2", False), ("llama", True)]
PARITY = ["one", "dp2_overlap", "tp2", "tp2_sp", "tp2_recompute", "cp2", "pp2"]
RECOMPUTE = {
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
}


@pytest.fixture(scope="module")
def engine():
    held = os.environ.get("NVIDIA_TF32_OVERRIDE")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    workers = Pool(min(GPUS, 2))
    yield workers
    workers.close()
    if held is None:
        del os.environ["NVIDIA_TF32_OVERRIDE"]
    else:
        os.environ["NVIDIA_TF32_OVERRIDE"] = held


def needs(layout: dict) -> None:
    if layout["ranks"] > GPUS:
        pytest.skip(f"needs {layout['ranks']} GPUs")


def stored(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of a whole tensor, relative to its size."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "tied"), [*FAMILIES, ("qwen3_moe", False)])
def test_hf_weights_come_back_as_they_went_in(engine, models, tmp_path, family, tied, precision):
    """To the servers (buckets) and to disk, every tensor under its name."""
    folder = models(family, tied)
    source = {n: t.bfloat16().float() if precision == "bf16" else t for n, t in stored(folder).items()}
    given = {} if precision == "fp32" else BF16
    sent = engine.run("save_hf", 1, model=folder, out=str(tmp_path / "hf"), **ENGINE, **given)[0]
    written = stored(tmp_path / "hf")
    assert set(sent) == set(written) == set(source)
    for name, expected in source.items():
        np.testing.assert_array_equal(sent[name], expected.numpy(), err_msg=name)
        assert torch.equal(written[name].float(), expected), name


@pytest.mark.parametrize("layout", PARITY)
def test_fp32_parity(engine, models, references, layout):
    needs(LAYOUTS[layout])
    results = engine.run("train", model=models("qwen3", True), data=data(), lr=LR, **ENGINE, **LAYOUTS[layout])
    check_fp32(results, references("qwen3", True, "topk_reverse_kl", lr=LR))


@pytest.mark.parametrize(("family", "layout"), [("qwen2", "one"), ("qwen2", "tp2_sp"), ("llama", "one")])
def test_fp32_parity_of_families(engine, models, references, family, layout):
    needs(LAYOUTS[layout])
    results = engine.run("train", model=models(family), data=data(), lr=LR, **ENGINE, **LAYOUTS[layout])
    check_fp32(results, references(family, False, "topk_reverse_kl", lr=LR))


@pytest.mark.parametrize("layout", [n for n, layout in MOE_LAYOUTS.items() if layout["ranks"] <= 2])
def test_fp32_parity_of_experts(engine, models, moe_reference, layout):  # noqa: F811
    """Grouped products: one call for all experts of a layer."""
    needs(MOE_LAYOUTS[layout])
    results = engine.run("train", model=models("qwen3_moe"), data=data(), lr=LR, **ENGINE, **MOE_LAYOUTS[layout])
    reference, final, gradients = moe_reference
    check_fp32(results, {**reference, "weights": final, "gradients": gradients})


def check_fp32(results: list[dict], reference: dict) -> None:
    first = results[0]
    for r in results:
        for i, logps in r["log_probs"].items():
            np.testing.assert_allclose(logps, reference["log_probs"][i], atol=1e-4)
    np.testing.assert_allclose([m["loss"] for m in first["metrics"]], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in first["metrics"]], reference["norms"], rtol=1e-4)
    assert set(first["weights"]) == set(reference["weights"])
    for name, expected in reference["gradients"].items():
        if "gradients" in first:
            worst = np.abs(first["gradients"][name] - expected).max() / np.abs(expected).max()
            assert worst < 1e-4, f"gradient of {name}: {worst:.1e}"
    for name, expected in reference["weights"].items():
        np.testing.assert_allclose(first["weights"][name], expected, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_bf16_is_as_near_to_the_dense_model_as_our_layers_are(engine, models, references, family, tied):
    """Packed sequences, the same weights: log-probs, loss, gradient norm, and the gradient of every tensor."""
    common = dict(model=models(family, tied), data=data(), lr=LR, **BF16)
    found, own = (engine.run("train", 1, grads=False, **common, **impl)[0] for impl in (ENGINE, {}))
    reference = references(family, tied, "topk_reverse_kl", lr=LR)
    for i, expected in enumerate(reference["log_probs"]):
        np.testing.assert_allclose(found["log_probs"][i], expected, atol=0.1)
        np.testing.assert_allclose(found["log_probs"][i], own["log_probs"][i], atol=0.1)
    np.testing.assert_allclose([m["loss"] for m in found["metrics"]], reference["losses"], rtol=1e-2)
    np.testing.assert_allclose([m["loss"] for m in found["metrics"]], [m["loss"] for m in own["metrics"]], rtol=1e-2)
    np.testing.assert_allclose(found["metrics"][0]["grad_norm"], reference["norms"][0], rtol=3e-2)
    # apart from the steps: collecting gradients puts fp32 in the place of bf16 weights for a moment
    found, own = (engine.run("train", 1, steps=0, **common, **impl)[0]["gradients"] for impl in (ENGINE, {}))
    for name, expected in reference["gradients"].items():
        ours, engines = (error(x[name], expected) for x in (own, found))
        assert engines < max(2 * ours, 0.03), f"gradient of {name}: off by {engines:.3f}, in our layers by {ours:.3f}"


def test_bf16_of_experts(engine, models, references):
    """Rounding may send a token to another expert: the loss only."""
    common = dict(model=models("qwen3_moe"), data=data(), lr=LR, grads=False, **BF16)
    found, own = (engine.run("train", 1, **common, **impl)[0] for impl in (ENGINE, {}))
    expected = references("qwen3_moe", False, "topk_reverse_kl", lr=LR)["losses"]
    np.testing.assert_allclose([m["loss"] for m in found["metrics"]], expected, rtol=2e-2)
    np.testing.assert_allclose([m["loss"] for m in found["metrics"]], [m["loss"] for m in own["metrics"]], rtol=2e-2)


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "cp2", "pp2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_rows_have_the_gradient_of_all(engine, models, layout, precision):
    """The rows of the loss, and with them the last layer's MLP and norm, against every row and every layer whole."""
    needs(LAYOUTS[layout])
    common = dict(model=models("qwen3"), data=few_kept(), steps=1, max_tokens_per_gpu=200, **ENGINE, **LAYOUTS[layout])
    common |= {**BF16, "grads": False} if precision == "bf16" else {}
    kept = engine.run("train", opd_loss_rows="kept", opd_last_layer_rows="kept", **common)
    every = engine.run("train", opd_loss_rows="all", opd_last_layer_rows="all", **common)
    first, second = (r[0]["metrics"][0] for r in (kept, every))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-2 if precision == "bf16" else 1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=3e-2 if precision == "bf16" else 1e-4)
    for name, expected in every[0].get("gradients", {}).items():
        off = error(kept[0]["gradients"][name], expected)
        assert off < 1e-4, f"gradient of {name}: {off:.1e}"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("what", list(RECOMPUTE))
def test_recompute_changes_nothing(engine, models, family, what):
    if family == "qwen3_moe" and what == "selective":
        pytest.skip("selective recompute of an MLP is for dense models")
    common = dict(model=models(family), data=data(), lr=LR, steps=2, **ENGINE)
    plain, again = (engine.run("train", 1, **common, **how)[0] for how in ({}, RECOMPUTE[what]))
    np.testing.assert_allclose([m["loss"] for m in again["metrics"]], [m["loss"] for m in plain["metrics"]], rtol=1e-6)
    for name, expected in plain["gradients"].items():
        off = error(again["gradients"][name], expected)
        assert off < 1e-5, f"gradient of {name}: {off:.1e}"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("source", "target"), [(ENGINE, ENGINE), (ENGINE, {}), ({}, ENGINE)], ids=["same", "to_ours", "from_ours"])
@pytest.mark.parametrize("layout", ["one", "one_distopt", "tp2_sp_distopt"])
def test_checkpoints_move_between_implementations(engine, models, tmp_path, family, source, target, layout):
    needs(SAVED[layout])
    common = dict(model=models(family), data=data(), save=str(tmp_path / "run"), **BF16, **SAVED[layout])
    saved = engine.run("save_then_step", **common, **source)[0]
    loaded = engine.run("load_then_step", **common, load=str(tmp_path / "run"), **target)[0]
    for name, expected in {**saved["moments"], **saved["weights"]}.items():
        held = loaded["moments"] if ":" in name else loaded["weights"]
        np.testing.assert_array_equal(held[name], expected, err_msg=name)
    assert loaded["steps"] == {2.0} and loaded["step_tensors"] == loaded["parameters"] and loaded["fused"]
    np.testing.assert_allclose(loaded["next"]["loss"], saved["next"]["loss"], rtol=1e-2)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_conversion_both_ways(engine, models, tmp_path, family):
    """A converted HF directory is trained from, and what is saved converts back to what the servers get."""
    from slime.backends.megatron_utils.convert import checkpoint_directory, hf_to_torch_dist, torch_dist_to_hf

    folder = models(family)
    hf_to_torch_dist(folder, tmp_path / "start", report=lambda line: None)
    common = dict(model=folder, save=str(tmp_path / "run"), **ENGINE)
    out = engine.run("train_and_save", 1, data=data(), load=str(tmp_path / "start"), **common)[0]
    fresh = engine.run("train", 1, model=folder, data=data(), steps=1, grads=False, **ENGINE)[0]
    torch_dist_to_hf(checkpoint_directory(tmp_path / "run"), folder, tmp_path / "hf", report=lambda line: None)
    written = stored(tmp_path / "hf")
    assert set(written) == set(out["weights"])
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor.numpy(), out["weights"][name], err_msg=name)
        np.testing.assert_allclose(out["weights"][name], fresh["weights"][name], atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2"])
def test_megatron_teacher(engine, models, references, layout):
    """A teacher of another size, kept on the host between its turns."""
    needs(LAYOUTS[layout])
    teacher = str(models("qwen3", hidden_size=48, num_hidden_layers=2, seed=5))
    results = engine.run(
        "train", model=models("qwen3"), data=data(), opd_loss_type="full_reverse_kl", lr=LR, opd_type="megatron",
        opd_teacher_load=teacher, opd_teacher_offload=True, **ENGINE, **LAYOUTS[layout],
    )  # fmt: skip
    reference = references("qwen3", False, "full_reverse_kl", lr=LR, teacher=teacher)
    np.testing.assert_allclose([m["loss"] for m in results[0]["metrics"]], reference["losses"], rtol=1e-5)
