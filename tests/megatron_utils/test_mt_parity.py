"""Every layout and loss against transformers + AdamW: log-probs, gradients, norms, and weights after three steps.

Learning rate 3e-4 and eps 1e-5: with a smaller eps Adam turns the rounding of near-zero gradients into visible steps.
"""

import numpy as np
import pytest
from conftest import data

LR = 3e-4
GRAD_TOLERANCE = 1e-5  # max error of a tensor's gradient, relative to the largest entry of that tensor
WEIGHT_TOLERANCE = 1e-6

LAYOUTS = {
    "one": dict(ranks=1),
    "dp2": dict(ranks=2),
    "dp2_distopt": dict(ranks=2, use_distributed_optimizer=True),
    "dp2_overlap": dict(ranks=2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "tp2": dict(ranks=2, tensor_model_parallel_size=2),
    "tp2_sp": dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": dict(ranks=2, context_parallel_size=2),
    "pp2": dict(ranks=2, pipeline_model_parallel_size=2),
    "tp4_sp": dict(ranks=4, tensor_model_parallel_size=4, sequence_parallel=True),
    "tp2_pp2": dict(ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2_dp2_sp": dict(ranks=4, tensor_model_parallel_size=2, sequence_parallel=True),
    "tp2_cp2_sp": dict(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
    "pp2_dp2_distopt": dict(ranks=4, pipeline_model_parallel_size=2, use_distributed_optimizer=True),
    "cp2_pp2": dict(ranks=4, context_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2_recompute": dict(
        ranks=2, tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity="full",
        recompute_method="uniform", recompute_num_layers=1,
    ),  # fmt: skip
}
LOSSES = ("sampled_reverse_kl", "topk_reverse_kl", "topk_forward_kl", "topk_jsd")
QUICK = {("one", "topk_reverse_kl"), ("tp2_sp", "topk_jsd"), ("cp2", "sampled_reverse_kl"), ("dp2", "topk_reverse_kl"),
         ("pp2", "topk_forward_kl"), ("tp2_pp2", "topk_reverse_kl"), ("tp2_dp2_sp", "sampled_reverse_kl"),
         ("dp2_overlap", "topk_reverse_kl")}  # fmt: skip


def compare(results: list[dict], reference: dict, *, names: bool = True) -> None:
    logps = {i: x for r in results for i, x in r["log_probs"].items()}
    assert sorted(logps) == list(range(len(reference["log_probs"])))
    for i, expected in enumerate(reference["log_probs"]):
        np.testing.assert_allclose(logps[i], expected, atol=1e-5)
    first = results[0]
    for r in results[1:]:
        assert [m["loss"] for m in r["metrics"]] == [m["loss"] for m in first["metrics"]], "ranks disagree on the loss"
    np.testing.assert_allclose([m["loss"] for m in first["metrics"]], reference["losses"], rtol=1e-6, atol=1e-6)
    norms = [m["grad_norm"] for m in first["metrics"]]
    np.testing.assert_allclose(norms[:1], reference["norms"][:1], rtol=5e-6)
    # Adam's steps magnify rounding: the float32 reference itself is 4e-6 off its float64 twin in the third, or not, by its threads
    np.testing.assert_allclose(norms, reference["norms"], rtol=3e-5)
    if not names:
        return
    assert set(first["weights"]) == set(reference["weights"])
    for name, expected in reference.get("gradients", {}).items():
        if "gradients" in first:
            error = np.abs(first["gradients"][name] - expected).max() / np.abs(expected).max()
            assert error <= GRAD_TOLERANCE, f"gradient of {name}: {error:.1e}"
    for name, expected in reference["weights"].items():
        error = np.abs(first["weights"][name] - expected).max()
        assert error <= WEIGHT_TOLERANCE, f"weight {name} after three steps: {error:.1e}"


def alternate(layout: str, loss: str, losses: tuple[str, ...]) -> bool:
    """Tied or not, so that every layout and every loss is run both ways without running every pair twice."""
    return (list(LAYOUTS).index(layout) + losses.index(loss)) % 2 == 1


def matrix():
    for layout in LAYOUTS:
        for loss in LOSSES:
            marks = () if (layout, loss) in QUICK else pytest.mark.slow
            yield pytest.param(layout, loss, marks=marks, id=f"{layout}-{loss}")


@pytest.mark.parametrize(("layout", "loss"), list(matrix()))
def test_dense_parity(pool, models, references, layout, loss):
    tied = alternate(layout, loss, LOSSES)
    results = pool.run("train", model=models("qwen3", tied), data=data(), opd_loss_type=loss, lr=LR, **LAYOUTS[layout])
    compare(results, references("qwen3", tied, loss, lr=LR))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("layout", ["one", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp2_sp", "cp2_pp2"))])
def test_families(pool, models, references, family, layout):
    results = pool.run("train", model=models(family), data=data(), opd_loss_type="topk_reverse_kl", lr=LR, **LAYOUTS[layout])
    compare(results, references(family, False, "topk_reverse_kl", lr=LR))


@pytest.mark.parametrize("reduction", ["sample_mean", "valid_token_mean"])
@pytest.mark.parametrize("layout", [pytest.param("dp2", marks=pytest.mark.slow), "tp2_cp2_sp"])
def test_reductions(pool, models, references, reduction, layout):
    results = pool.run(
        "train", model=models("qwen3"), data=data(), opd_loss_type="topk_reverse_kl", opd_loss_reduction=reduction, lr=LR,
        **LAYOUTS[layout],
    )  # fmt: skip
    compare(results, references("qwen3", False, "topk_reverse_kl", reduction=reduction, lr=LR))
    step = data()["steps"][0]
    named = {"denominator_samples": step["num_samples"], "denominator_valid_tokens": step["valid_tokens"]}
    logged = {k: v for k, v in results[-1]["metrics"][0].items() if k.startswith("denominator")}
    assert logged == {k: float(v) for k, v in named.items() if reduction.split("_")[0] in k}


@pytest.mark.parametrize(
    ("policy", "flags"),
    [
        ({"recompute": True, "coef": 0.5}, {"opd_recompute_student": True, "opd_kl_coef": 0.5}),
        ({"low": 0.1, "high": 0.3, "dual": 2.0}, {"eps_clip": 0.1, "eps_clip_high": 0.3, "eps_clip_c": 2.0}),
    ],
    ids=["recompute", "clips"],
)
@pytest.mark.parametrize("layout", ["tp2_sp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("one", "tp2_pp2", "tp2_cp2_sp"))])
def test_policy_options(pool, models, near_data, layout, policy, flags):
    """The student side under the current weights, and both clips with the bound for negative advantages, on moved weights."""
    import mt_reference

    results = pool.run("train", model=models("qwen3"), data=near_data, opd_loss_type="sampled_reverse_kl", lr=LR, **flags, **LAYOUTS[layout])
    expected = mt_reference.run(models("qwen3"), near_data, "sampled_reverse_kl", lr=LR, policy=tuple(policy.items()))
    compare(results, expected)
    plain = mt_reference.run(models("qwen3"), near_data, "sampled_reverse_kl", lr=LR)
    assert expected["losses"][1] != pytest.approx(plain["losses"][1], rel=1e-3), "the options change nothing here"
    if "low" in policy:
        assert 0 < results[0]["metrics"][0]["clipped_kept"] < 1


@pytest.fixture(scope="module")
def near_data(models):
    """Rollout data whose old log-probs are near the model's own, so that ratios are on both sides of every clip."""
    import copy

    import mt_reference
    import torch

    batch, model, rng = copy.deepcopy(data()), mt_reference.load(models("qwen3")), np.random.default_rng(1)
    for i in range(len(batch["tokens"])):
        with torch.no_grad():
            logp = mt_reference.response_logits(model, batch, i).log_softmax(-1).gather(1, mt_reference.targets(batch, i)[:, None])[:, 0]
        batch["rollout_log_probs"][i] = (logp.numpy() + 0.4 * rng.standard_normal(len(logp))).astype(np.float32)
        batch["teacher_log_probs"][i] = (batch["rollout_log_probs"][i] + rng.standard_normal(len(logp))).astype(np.float32)
    return batch


def test_student_support(pool, models, references):
    results = pool.run(
        "train", model=models("qwen3"), data=data(), opd_loss_type="topk_reverse_kl", opd_topk_support="student", lr=LR,
        **LAYOUTS["tp2"],
    )  # fmt: skip
    compare(results, references("qwen3", False, "topk_reverse_kl", support="student", lr=LR))


MOE_LAYOUTS = {
    "one": dict(ranks=1),
    "ep2": dict(ranks=2, expert_model_parallel_size=2),
    "tp2_ep2": dict(
        ranks=2, tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True
    ),
    "tp2_sp": dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2_ep2_distopt": dict(
        ranks=4, pipeline_model_parallel_size=2, expert_model_parallel_size=2, use_distributed_optimizer=True
    ),
}


@pytest.fixture(scope="module")
def moe_reference(references, tmp_path_factory):
    """The dense run of the model with experts: run, weights and first gradient by their names on disk."""
    import torch

    from slime.backends.megatron_utils.hf_files import HFReader

    run = references("qwen3_moe", False, "topk_reverse_kl", lr=LR)
    model, on_disk = run["model"], {}
    for what, values in (("gradients", run["gradients"]), ("weights", run["weights"])):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.from_numpy(values[name]))
        folder = tmp_path_factory.mktemp(what)
        model.save_pretrained(folder)
        reader = HFReader(folder)
        on_disk[what] = {name: reader.get(name).numpy() for name in reader.names()}
    return run, on_disk["weights"], on_disk["gradients"]


@pytest.mark.parametrize("layout", [pytest.param(x, marks=() if x in ("one", "ep2") else pytest.mark.slow) for x in MOE_LAYOUTS])
def test_experts(pool, models, moe_reference, layout):
    reference, final, gradients = moe_reference
    results = pool.run("train", model=models("qwen3_moe"), data=data(), opd_loss_type="topk_reverse_kl", lr=LR, **MOE_LAYOUTS[layout])
    compare(results, reference, names=False)
    assert ("gradients" in results[0]) != ("use_distributed_optimizer" in MOE_LAYOUTS[layout])
    for name, found in results[0].get("gradients", {}).items():
        expected = gradients[name]
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= GRAD_TOLERANCE, f"gradient of {name}: {error:.1e}"
    assert set(results[0]["weights"]) == set(final)
    for name, expected in final.items():
        np.testing.assert_allclose(results[0]["weights"][name], expected, atol=WEIGHT_TOLERANCE, rtol=0, err_msg=name)
