"""The trainer as its owner sees it: kept rows against all rows, metrics, several steps, rewards, NaN, bad batches."""

import copy

import numpy as np
import pytest
from conftest import data

from ta_opd.errors import ConfigError

LAYOUTS = {
    "one": dict(ranks=1),
    "tp2_sp": dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": dict(ranks=2, context_parallel_size=2),
    "pp2": dict(ranks=2, pipeline_model_parallel_size=2),
    "tp2": dict(ranks=2, tensor_model_parallel_size=2),
    "dp2": dict(ranks=2),
}


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "cp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pp2", "tp2", "dp2"))])
def test_kept_rows_give_the_gradient_of_all_rows(pool, models, layout):
    common = dict(model=models("qwen3", True), data=data(), steps=1, **LAYOUTS[layout])
    kept, every = (pool.run("train", opd_loss_rows=rows, **common)[0] for rows in ("kept", "all"))
    assert kept["metrics"][0]["loss"] == pytest.approx(every["metrics"][0]["loss"], rel=1e-6)
    assert kept["metrics"][0]["rows"] == data()["steps"][0]["kept_count"]
    assert every["metrics"][0]["rows"] == data()["steps"][0]["valid_tokens"]
    assert kept["metrics"][0]["tokens"] < every["metrics"][0]["tokens"], "sequences are cut after their last kept token"
    for name, expected in every["gradients"].items():
        error = np.abs(kept["gradients"][name] - expected).max() / np.abs(expected).max()
        assert error < 5e-6, f"{name}: {error:.1e}"


LAST_LAYER = {
    "one": dict(ranks=1),
    "dp2": dict(ranks=2),
    "tp2": dict(ranks=2, tensor_model_parallel_size=2),
    "tp2_overlap": dict(
        ranks=4, tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True,
    ),
    "tp2_cp2_sp": dict(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
    "tp2_pp2_sp": dict(ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "cp2": dict(ranks=2, context_parallel_size=2),
    "pp2": dict(ranks=2, pipeline_model_parallel_size=2),
    "tp2_sp_recompute": dict(
        ranks=2, tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity="full", recompute_method="uniform",
        recompute_num_layers=1,
    ),
    "ep2": dict(ranks=2, expert_model_parallel_size=2),
}  # fmt: skip
FEW = {"ep2": "qwen3_moe", "one": "qwen3", "tp2_cp2_sp": "qwen2", "tp2_pp2_sp": "qwen3", "tp2_sp_recompute": "llama"}


def few_kept() -> dict:
    """Data whose kept rows are few enough for the last layer to compute queries for them only, and not only at the ends."""
    import mt_tiny

    return mt_tiny.make_data(seed=11, kept=0.12)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=() if x in FEW else pytest.mark.slow) for x in LAST_LAYER])
def test_last_layer_on_kept_rows(pool, models, layout):
    """Queries and MLP at kept rows, the MLP only, or everything for all tokens: one gradient, which is that of all rows."""
    family = FEW.get(layout, "qwen3")
    common = dict(model=models(family, layout == "one"), data=few_kept(), steps=1, max_tokens_per_gpu=200, **LAST_LAYER[layout])
    found = {how: pool.run("train", opd_last_layer_rows=how, **common) for how in ("kept", "mlp", "all")}
    every = pool.run("train", opd_loss_rows="all", opd_last_layer_rows="all", **common)
    assert any(r["row_queries"] for r in found["kept"]), "no micro-batch had few enough rows"
    assert not any(r["row_queries"] for how in ("mlp", "all") for r in found[how])
    for how, results in found.items():
        first = results[0]
        assert first["metrics"][0]["loss"] == pytest.approx(every[0]["metrics"][0]["loss"], rel=2e-6), how
        assert first["metrics"][0]["grad_norm"] == pytest.approx(every[0]["metrics"][0]["grad_norm"], rel=5e-6), how
        for name, expected in every[0].get("gradients", {}).items():
            error = np.abs(first["gradients"][name] - expected).max() / np.abs(expected).max()
            assert error < 5e-6, f"{how}, {name}: {error:.1e}"
        for name, expected in every[0]["weights"].items():
            np.testing.assert_allclose(first["weights"][name], expected, atol=1e-6, rtol=0, err_msg=f"{how}, {name}")


@pytest.mark.parametrize("layout", ["one", pytest.param("cp2", marks=pytest.mark.slow), pytest.param("pp2", marks=pytest.mark.slow)])
def test_statistics_over_valid_tokens(pool, models, references, layout):
    """Asked for, they cover every valid token, in the values of the dense model, and leave the step as it was."""
    batch = data()
    common = dict(model=models("qwen3"), data=batch, steps=1, opd_loss_type="topk_reverse_kl", lr=3e-4, **LAYOUTS[layout])
    plain = pool.run("train", **common)[0]
    logged = pool.run("train", opd_log_valid_kl="on", **common)[0]
    assert "reverse_kl_valid" not in plain["metrics"][0]
    for name, expected in plain["weights"].items():
        np.testing.assert_allclose(logged["weights"][name], expected, atol=2e-7, rtol=0)
    import mt_reference
    import torch

    model = mt_reference.load(models("qwen3"))
    kept, valid, gaps = [], [], []
    for i in range(len(batch["tokens"])):
        with torch.no_grad():
            losses = mt_reference.token_losses(mt_reference.response_logits(model, batch, i), batch, i, "topk_reverse_kl").numpy()
        kept.append(losses[batch["opd_weights"][i] != 0])
        valid.append(losses[batch["loss_masks"][i] > 0])
        rows = batch["opd_weights"][i] != 0
        gaps.append(np.abs(references("qwen3", False, "topk_reverse_kl", lr=3e-4)["log_probs"][i] - batch["rollout_log_probs"][i])[rows])
    metrics = logged["metrics"][0]
    assert metrics["reverse_kl_kept"] == pytest.approx(np.concatenate(kept).mean(), rel=1e-5)
    assert metrics["reverse_kl_valid"] == pytest.approx(np.concatenate(valid).mean(), rel=1e-5)
    assert metrics["train_rollout_logprob_abs_diff"] == pytest.approx(np.concatenate(gaps).mean(), rel=1e-5)
    assert metrics["train_rollout_logprob_abs_diff_max"] == pytest.approx(np.concatenate(gaps).max(), rel=1e-5)
    assert metrics["denominator_kept_tokens"] == batch["steps"][0]["kept_tokens"]


def test_micro_batches_and_packing_do_not_change_the_step(pool, models):
    big, small = (
        pool.run("train", 2, model=models("qwen3"), data=data(), steps=1, max_tokens_per_gpu=n)[0] for n in (200, 34)
    )
    assert big["metrics"][0]["micro_batches"] == 2 < small["metrics"][0]["micro_batches"]
    for name, expected in big["weights"].items():
        np.testing.assert_allclose(small["weights"][name], expected, atol=3e-7, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_buffers_in_bf16(pool, models, ranks):
    """--no-accumulate-allreduce-grads-in-fp32: buffers of half the size; the step is that of fp32 buffers within bf16."""
    common = dict(model=models("qwen3", True), data=data(), steps=1, ranks=ranks, fp32=False, bf16=True, grads=False)
    wide, narrow = (pool.run("train", accumulate_allreduce_grads_in_fp32=wide, **common)[0] for wide in (True, False))
    assert (wide["gradient_dtypes"], narrow["gradient_dtypes"]) == ({"torch.float32"}, {"torch.bfloat16"})
    assert narrow["metrics"][0]["loss"] == wide["metrics"][0]["loss"]
    assert narrow["metrics"][0]["grad_norm"] == pytest.approx(wide["metrics"][0]["grad_norm"], rel=1e-2)


def test_several_steps_in_a_rollout(pool, models, references):
    """Two optimizer steps a rollout, each with its own denominators, as two batches one after the other."""
    import mt_tiny

    halves = []
    for part in ([0, 1, 2], [3, 4, 5]):
        half = {k: [v[i] for i in part] for k, v in data().items() if k != "steps"}
        half["steps"] = [{"indices": [0, 1, 2], **mt_tiny.counts(half)}]
        halves.append(half)
    both = pool.run("train_lists", 1, model=models("qwen3"), batches=[_joined(halves)])[0]
    apart = pool.run("train_lists", 1, model=models("qwen3"), batches=halves)[0]
    for name, expected in apart["weights"].items():
        np.testing.assert_array_equal(both["weights"][name], expected)
    assert both["metrics"][0]["loss"] == pytest.approx(np.mean([m["loss"] for m in apart["metrics"]]))


def _joined(halves: list[dict]) -> dict:
    out = {k: sum((h[k] for h in halves), []) for k in halves[0] if k != "steps"}
    out["steps"] = [{**h["steps"][0], "indices": [i + 3 * n for i in range(3)]} for n, h in enumerate(halves)]
    return out


def test_task_rewards_become_advantages(pool, models):
    """GRPO groups may be split over data-parallel ranks; the dense reference gets the same advantages."""
    import mt_reference

    batch = copy.deepcopy(data())
    batch["rewards"] = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5]
    results = pool.run(
        "train", 2, model=models("qwen3"), data=batch, opd_loss_type="sampled_reverse_kl", n_samples_per_prompt=3, lr=3e-4, steps=1
    )
    reference = copy.deepcopy(batch)
    spread = np.std([1, 0, 0], ddof=1) + 1e-6
    last = np.std([1, 1, 0.5], ddof=1) + 1e-6
    values = [*((x - 1 / 3) / spread for x in (1, 0, 0)), *((x - 2.5 / 3) / last for x in (1, 1, 0.5))]
    reference["advantages"] = [np.full(n, v, np.float32) for n, v in zip(batch["response_lengths"], values, strict=True)]
    expected = mt_reference.run(models("qwen3"), reference, "sampled_reverse_kl", steps=1, lr=3e-4)
    assert results[0]["metrics"][0]["loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=1e-6, rtol=0)


def test_reinforce_plus_plus(pool, models):
    """Rewards at the last token, discounted backwards and whitened over the valid tokens of all ranks; the dense reference
    gets advantages that are written out here."""
    import mt_reference

    batch = copy.deepcopy(data())
    batch["rewards"] = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5]
    results = pool.run(
        "train", 2, model=models("qwen3"), data=batch, opd_loss_type="sampled_reverse_kl", advantage_estimator="reinforce_plus_plus",
        gamma=0.9, lr=3e-4, steps=1,
    )  # fmt: skip
    returns = []
    for reward, length in zip(batch["rewards"], batch["response_lengths"], strict=True):
        value, back = 0.0, []
        for position in reversed(range(length)):
            value = (reward if position == length - 1 else 0.0) + 0.9 * value
            back.append(value)
        returns.append(np.array(back[::-1]))
    valid = np.concatenate([r[m > 0] for r, m in zip(returns, batch["loss_masks"], strict=True)])
    reference = copy.deepcopy(batch)
    reference["advantages"] = [
        ((r - valid.mean()) / (valid.std() + 1e-6) * (m > 0)).astype(np.float32) for r, m in zip(returns, batch["loss_masks"], strict=True)
    ]
    expected = mt_reference.run(models("qwen3"), reference, "sampled_reverse_kl", steps=1, lr=3e-4)
    assert results[0]["metrics"][0]["loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2_sp", marks=pytest.mark.slow), pytest.param("pp2", marks=pytest.mark.slow)])
def test_nan_loss_is_not_applied(pool, models, tmp_path, layout):
    batch = copy.deepcopy(data())
    first = int(np.flatnonzero(batch["opd_weights"][4])[0])
    batch["teacher_log_probs"][4][first] = np.nan
    common = dict(model=models("qwen3"), data=batch, opd_loss_type="sampled_reverse_kl", output_dir=str(tmp_path), **LAYOUTS[layout])
    for result in pool.run("train_not_finite", **common):
        assert result["error"][0] == "NumericsError"
        assert "Samples [4]" in result["error"][1] and "--skip-nan-steps" in result["error"][1]
        assert result["changed"] == [], "the step was applied"
    dumped = [p.name for p in (tmp_path / "not_finite").iterdir()]
    assert dumped == ["rollout_000000_step_0_sample_4.npz"]
    held = np.load(tmp_path / "not_finite" / dumped[0])
    np.testing.assert_array_equal(held["tokens"], batch["tokens"][4])
    for result in pool.run("train_not_finite", skip_nan_steps=True, **common):
        assert result["error"] is None and result["metrics"]["steps_skipped"] == 1.0 and result["changed"] == []


def test_a_gradient_that_overflows_is_not_applied(pool, models, tmp_path):
    """The loss is finite, its gradient's norm is not: nothing says which sample, so all of the step are kept."""
    batch = copy.deepcopy(data())
    batch["teacher_log_probs"][2][:] = 1e25
    common = dict(model=models("qwen3"), data=batch, opd_loss_type="sampled_reverse_kl", output_dir=str(tmp_path))
    (result,) = pool.run("train_not_finite", 1, **common)
    assert result["error"][0] == "NumericsError" and "gradient norm inf" in result["error"][1]
    assert result["changed"] == [] and len(list((tmp_path / "not_finite").iterdir())) == len(batch["tokens"])


def test_a_skipped_step_leaves_nothing_behind(pool, models, tmp_path):
    """A step with a NaN and then a good one, skipping: the weights are those of the good step alone."""
    bad = copy.deepcopy(data())
    bad["teacher_log_probs"][1][int(np.flatnonzero(bad["opd_weights"][1])[0])] = np.nan
    common = dict(model=models("qwen3", True), opd_loss_type="sampled_reverse_kl", output_dir=str(tmp_path), skip_nan_steps=True)
    both = pool.run("train_lists", 1, batches=[bad, data()], **common)[0]
    alone = pool.run("train_lists", 1, batches=[data()], **common)[0]
    assert [m["steps_skipped"] for m in both["metrics"]] == [1.0, 0.0]
    for name, expected in alone["weights"].items():
        np.testing.assert_array_equal(both["weights"][name], expected, err_msg=name)


def test_a_step_without_kept_tokens_changes_nothing_but_decay(pool, models):
    import mt_tiny

    batch = copy.deepcopy(data())
    batch["opd_weights"] = [np.zeros_like(w) for w in batch["opd_weights"]]
    batch["steps"] = [{**batch["steps"][0], **mt_tiny.counts(batch)}]
    result = pool.run("train", 2, model=models("qwen3"), data=batch, steps=1, weight_decay=0.0)[0]
    assert result["metrics"][0]["loss"] == 0.0 and result["metrics"][0]["grad_norm"] == 0.0


def test_more_ranks_than_samples(pool, models):
    """The rank that has none takes part in the step and changes nothing."""
    import mt_tiny

    one = mt_tiny.make_data(samples=1)
    few, many = (pool.run("train", ranks, model=models("qwen3"), data=one, steps=1, grads=False)[0] for ranks in (1, 2))
    assert many["metrics"][0]["loss"] == pytest.approx(few["metrics"][0]["loss"], rel=1e-6)
    for name, expected in few["weights"].items():
        np.testing.assert_allclose(many["weights"][name], expected, atol=3e-7, rtol=0, err_msg=name)


def test_too_long_sample_stops_every_rank(pool, models):
    for error in pool.run("train_error", 2, model=models("qwen3"), data=data(), max_tokens_per_gpu=12):
        assert error[0] == "ConfigError" and "--max-tokens-per-gpu 12" in error[1]


def test_bad_layout_is_refused_before_anything_is_built(models):
    from mt_cases import make_args

    from slime.backends.megatron_utils.trainer import MegatronTrainer

    with pytest.raises(ConfigError, match="TP x PP x CP"):
        MegatronTrainer(make_args(models("qwen3"), tensor_model_parallel_size=4), 0, 2, 0, "127.0.0.1", 1)
    with pytest.raises(ConfigError, match="--hf-checkpoint"):
        MegatronTrainer(make_args(""), 0, 1, 0, "127.0.0.1", 1)
    with pytest.raises(ConfigError, match="opd-loss-type"):
        MegatronTrainer(make_args(models("qwen3"), opd_loss_type="kl"), 0, 1, 0, "127.0.0.1", 1)


def test_learning_rate_schedules(pool, models):
    common = dict(model=models("qwen3"), data=data(), lr=1e-3, min_lr=1e-4)
    linear = pool.run("learning_rates", 1, lr_decay_style="linear", lr_warmup_iters=2, lr_decay_iters=6, steps=7, **common)[0]
    np.testing.assert_allclose(linear, [0, 5e-4, 1e-3, 1e-4 + 9e-4 * 0.75, 1e-4 + 9e-4 * 0.5, 1e-4 + 9e-4 * 0.25, 1e-4], rtol=1e-6)
    cosine = pool.run("learning_rates", 1, lr_decay_style="cosine", lr_decay_iters=4, steps=5, **common)[0]
    np.testing.assert_allclose(cosine, [1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(5)], rtol=1e-6)
    assert pool.run("learning_rates", 1, lr_decay_style="constant", steps=2, **common)[0] == [1e-3, 1e-3]


@pytest.mark.slow
def test_bf16_is_close(pool, models):
    common = dict(model=models("qwen3"), data=data(), steps=2, grads=False)
    exact = pool.run("train", 2, **common)[0]
    rough = pool.run("train", 2, fp32=False, bf16=True, use_distributed_optimizer=True, **common)[0]
    for a, b in zip(exact["metrics"], rough["metrics"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)


@pytest.mark.slow
def test_vocabulary_padding_stays_out_of_the_softmax(pool, models, references):
    from test_mt_parity import compare

    results = pool.run(
        "train", 2, model=models("qwen3"), data=data(), lr=3e-4, tensor_model_parallel_size=2, make_vocab_size_divisible_by=48
    )
    compare(results, references("qwen3", False, "topk_reverse_kl", lr=3e-4))
