"""The parity runs on real GPUs over NCCL: fp32 against the dense model, bf16 within its precision. Two GPUs run all of it."""

import os

import numpy as np
import pytest
import torch
from conftest import data
from test_mt_checkpoint import LAYOUTS as SAVED
from test_mt_host_state import assert_same
from test_mt_parity import LAYOUTS, LR
from test_mt_trainer import few_kept

GPUS = torch.cuda.device_count() or int(os.environ.get("TA_OPD_PRETEND_GPUS", 0))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]
NAMES = [n for n, layout in LAYOUTS.items() if layout["ranks"] <= 2]


def needs(layout: dict) -> None:
    if layout["ranks"] > GPUS:
        pytest.skip(f"needs {layout['ranks']} GPUs")


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("loss", ["topk_reverse_kl", "sampled_reverse_kl"])
def test_fp32_parity(pool, models, references, layout, loss):
    needs(LAYOUTS[layout])
    results = pool.run("train", model=models("qwen3", True), data=data(), opd_loss_type=loss, lr=LR, **LAYOUTS[layout])
    reference = references("qwen3", True, loss, lr=LR)
    np.testing.assert_allclose([m["loss"] for m in results[0]["metrics"]], reference["losses"], rtol=1e-5)
    for name, expected in reference["gradients"].items():
        if "gradients" in results[0]:
            error = np.abs(results[0]["gradients"][name] - expected).max() / np.abs(expected).max()
            assert error < 1e-4, f"gradient of {name}: {error:.1e}"
    for name, expected in reference["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], expected, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("layout", NAMES)
def test_bf16_is_within_its_precision(pool, models, references, layout):
    needs(LAYOUTS[layout])
    results = pool.run(
        "train", model=models("qwen3"), data=data(), opd_loss_type="topk_reverse_kl", lr=LR, fp32=False, bf16=True, grads=False,
        **LAYOUTS[layout],
    )  # fmt: skip
    reference = references("qwen3", False, "topk_reverse_kl", lr=LR)
    for r in results:
        for i, logps in r["log_probs"].items():
            np.testing.assert_allclose(logps, reference["log_probs"][i], atol=0.1)
    np.testing.assert_allclose([m["loss"] for m in results[0]["metrics"]], reference["losses"], rtol=1e-2)
    np.testing.assert_allclose([m["grad_norm"] for m in results[0]["metrics"]], reference["norms"], rtol=3e-2)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["one", "tp2_sp", "cp2", "pp2"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_recompute_and_kernels_of_the_layers(pool, models, layout, bf16, family):
    """Without a block's output as with it, and with the Triton kernels as with torch's, but for the order of sums."""
    needs(LAYOUTS[layout])
    results = pool.run("recompute_gradients", model=models(family), data=data(), fp32=not bf16, bf16=bf16, recompute_granularity="full",
                       recompute_method="uniform", recompute_num_layers=1, **LAYOUTS[layout])  # fmt: skip
    for found in results:
        assert found["saved"] == found["products"] > 0 and 0 < found["size"] < float("inf")
        for name, error in found["error"].items():
            assert error < (0.05 if bf16 else 1e-4), f"{name}: {error:.1e}"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["one", "tp2_sp", "cp2", "pp2"])
def test_last_layer_on_kept_rows(pool, models, layout, bf16):
    """The masked kernel of a few rows' queries against causal attention of all."""
    needs(LAYOUTS[layout])
    common = dict(model=models("qwen3", True), data=few_kept(), steps=1, max_tokens_per_gpu=200, fp32=not bf16, bf16=bf16, grads=not bf16,
                  **LAYOUTS[layout])  # fmt: skip
    kept, whole = (pool.run("train", opd_last_layer_rows=how, **common) for how in ("kept", "all"))
    assert any(r["row_queries"] for r in kept)
    first, second = (r[0]["metrics"][0] for r in (kept, whole))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-2 if bf16 else 1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=3e-2 if bf16 else 1e-4)
    for name, expected in whole[0].get("gradients", {}).items():
        error = np.abs(kept[0]["gradients"][name] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2"])
def test_megatron_teacher(pool, models, references, layout):
    needs(LAYOUTS[layout])
    teacher = str(models("qwen3", hidden_size=48, num_hidden_layers=2, seed=5))
    results = pool.run(
        "train", model=models("qwen3"), data=data(), opd_loss_type="full_reverse_kl", lr=LR, opd_type="megatron",
        opd_teacher_load=teacher, opd_teacher_offload=True, **LAYOUTS[layout],
    )  # fmt: skip
    reference = references("qwen3", False, "full_reverse_kl", lr=LR, teacher=teacher)
    np.testing.assert_allclose([m["loss"] for m in results[0]["metrics"]], reference["losses"], rtol=1e-5)


@pytest.mark.parametrize("layout", [dict(ranks=1), dict(ranks=2, expert_model_parallel_size=2)], ids=["one", "ep2"])
def test_experts(pool, models, references, layout):
    needs(layout)
    results = pool.run("train", model=models("qwen3_moe"), data=data(), lr=LR, grads=False, **layout)
    reference = references("qwen3_moe", False, "topk_reverse_kl", lr=LR)
    np.testing.assert_allclose([m["loss"] for m in results[0]["metrics"]], reference["losses"], rtol=1e-5)


@pytest.mark.parametrize(("source", "target"), [("one_distopt", "one"), ("tp2_sp_distopt", "dp2_distopt"), ("dp2_distopt", "tp2_sp_distopt")])
def test_checkpoints_between_layouts(pool, models, tmp_path, source, target):
    if source == "one_distopt":
        target = "one_distopt"
    needs(SAVED[source])
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), bf16=True, fp32=False)
    saved = pool.run("save_then_step", **common, **SAVED[source])
    loaded = pool.run("load_then_step", **common, load=str(tmp_path / "run"), **SAVED[target])
    for name, expected in saved[0]["moments"].items():
        np.testing.assert_array_equal(loaded[0]["moments"][name], expected, err_msg=name)
    for rank in loaded:
        assert rank["steps"] == {2.0} and rank["step_tensors"] == rank["parameters"] and rank["fused"]
    np.testing.assert_allclose(loaded[0]["next"]["loss"], saved[0]["next"]["loss"], rtol=1e-2)


MIB = 2**20
STREAMED = {
    "one": dict(ranks=1),
    "one_distributed": dict(ranks=1, use_distributed_optimizer=True),
    "one_bf16_gradients": dict(ranks=1, use_distributed_optimizer=True, accumulate_allreduce_grads_in_fp32=False),
    "one_fp32": dict(ranks=1, fp32=True, bf16=False),
    "dp2_overlap": dict(ranks=2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "tp2": dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True),
}  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("layout", STREAMED)
def test_optimizer_state_in_host_memory(pool, models, layout, clip):
    """Eight steps of chunks that cut every large tensor, on three streams: each bit of the state on the device, and the device never holds it."""
    from slime.backends.megatron_utils.host_chunks import staging_bytes

    needs(STREAMED[layout])
    chunk = 3 * MIB
    narrow = layout == "one_bf16_gradients"
    model = models("qwen3", True, hidden_size=512, intermediate_size=2048, vocab_size=32768)
    common = dict(model=model, steps=8, lr=1e-2, clip_grad=clip, **{**dict(fp32=False, bf16=True), **STREAMED[layout]})
    resident = pool.run("mt_host_cases.optimizer_alone", **common)
    moved = pool.run("mt_host_cases.optimizer_alone", optimizer_cpu_offload=True, chunk_bytes=chunk, **common)
    for ours, theirs in zip(moved, resident, strict=True):
        np.testing.assert_allclose(ours["norms"], theirs["norms"], rtol=1e-6)
        if not narrow:
            assert ours["norms"] == theirs["norms"]
    if not (narrow and clip):  # there the norm's last bits, which depend on the order of its sum, are in the clipped gradients
        assert_same([{**r, "norms": []} for r in moved], [{**r, "norms": []} for r in resident])
    else:
        for name, values in resident[0]["weights"].items():
            np.testing.assert_allclose(moved[0]["weights"][name], values, atol=2e-2, rtol=2e-2, err_msg=name)
    for ours, theirs in zip(moved, resident, strict=True):
        if not torch.cuda.is_available():
            continue
        n, bf16 = ours["parameters"], layout != "one_fp32"
        weights, gradients = (2, 2 if narrow else 4) if bf16 else (4, 4)
        assert ours["held"] <= (weights + gradients) * n + 8 * MIB, "the state is on the device"
        assert theirs["held"] - ours["held"] >= (12 if bf16 else 8) * n / (2 if "dp2" in layout else 1) - 8 * MIB
        assert ours["init"] <= (weights + gradients) * n + 12 * ours["largest"] + 16 * MIB, "the state was built on the device"
        assert ours["step"] <= staging_bytes(chunk, narrow) + 16 * MIB


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", ["one", "one_distopt", "dp2_distopt"])
def test_checkpoints_with_the_state_in_host_memory(pool, models, tmp_path, layout, before, after):
    needs(SAVED[layout])
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), bf16=True, fp32=False, **SAVED[layout])
    saved = pool.run("save_then_step", optimizer_cpu_offload=before, **common)
    loaded = pool.run("load_then_step", optimizer_cpu_offload=after, load=str(tmp_path / "run"), **common)
    for name, expected in saved[0]["moments"].items():
        np.testing.assert_array_equal(loaded[0]["moments"][name], expected, err_msg=name)
        assert np.abs(expected).max() > 0, name
    for rank in loaded:
        assert rank["steps"] == {2.0} and rank["step_tensors"] == rank["parameters"] and rank["fused"]
    np.testing.assert_allclose(loaded[0]["next"]["loss"], saved[0]["next"]["loss"], rtol=1e-2)
