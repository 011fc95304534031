"""Intervals: they cover what they should, pair what is paired, and say when nothing can be drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ta_opd.report import loading, statistics
from ta_opd.report.statistics import Estimate, Resampler, cluster_table, difference, from_draws, outcome, relative_drop


def frame(values, counts=None):
    return pd.DataFrame({"sum": values, "count": np.ones(len(values)) if counts is None else counts})


def test_interval_of_a_mean_is_near_the_normal_one():
    rng = np.random.default_rng(1)
    x = (rng.random(400) < 0.3).astype(float)
    estimate = Resampler(4000).estimate(cluster_table([frame(x)]))
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.low == pytest.approx(x.mean() - half, abs=0.006) and estimate.high == pytest.approx(x.mean() + half, abs=0.006)


def test_ratio_of_sums_weighs_prompts_by_their_tokens():
    estimate = Resampler(50).estimate(cluster_table([frame([10.0, 1.0], [10, 2])]))
    assert estimate.value == pytest.approx(11 / 12)


def test_draws_equal_a_plain_loop():
    sums, counts = np.array([3.0, 1.0, 4.0, 1.5]), np.array([2.0, 1.0, 5.0, 1.0])
    sampler = Resampler(200)
    table = cluster_table([frame(sums, counts)])
    weights = sampler.weights("prompts", table.labels)
    plain = [sum(w * s for w, s in zip(row, sums, strict=True)) / sum(w * c for w, c in zip(row, counts, strict=True)) for row in weights]
    np.testing.assert_allclose(sampler.draw(table), plain, rtol=1e-12)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(2)
    base = rng.random(300)
    one = Resampler().estimate(cluster_table([frame(base)]))
    three = Resampler().estimate(cluster_table([frame(base + shift) for shift in (-0.2, 0.0, 0.2)]))
    assert three.value == pytest.approx(one.value)
    assert three.high - three.low > 2 * (one.high - one.low)


def test_differences_of_the_same_prompts_are_paired():
    rng = np.random.default_rng(3)
    x = rng.random(200)
    sampler = Resampler()
    a, b = (sampler.estimate(cluster_table([frame(v)])) for v in (x, x - 0.01))
    gap = difference(a, b)
    assert gap.value == pytest.approx(0.01) and gap.low == pytest.approx(0.01) and gap.high == pytest.approx(0.01)
    drop = relative_drop(a, b)
    assert drop.value == pytest.approx(0.01 / x.mean()) and drop.low < drop.value < drop.high


def test_one_prompt_has_no_interval_and_nothing_is_unknown():
    one = Resampler().estimate(cluster_table([frame([0.5])]))
    assert one.known and np.isnan(one.low)
    assert not Resampler().estimate(cluster_table([])).known
    assert not difference(one, statistics.UNKNOWN).known
    assert not relative_drop(Estimate(0.0, 0, 0, np.zeros(3), 5, 1), one).known
    assert np.isnan(from_draws(1.0, np.full(5, np.nan), 10, 1).low)


def test_prompts_missing_in_one_seed_do_not_count_there():
    table = cluster_table([pd.DataFrame({"sum": [1.0, 1.0], "count": [1, 1]}, index=["a", "b"]), pd.DataFrame({"sum": [0.0], "count": [1]}, index=["a"])])
    assert table.point == pytest.approx(2 / 3) and table.counts_SG.tolist() == [[1, 1], [1, 0]]


def test_outcome_reads_evaluations_and_frozen_contexts(suite_dir):
    suite = loading.load(suite_dir)
    sampler = Resampler(500)
    outcomes = {key: outcome(runs, sampler) for key, runs in suite.arms.items()}
    full, _, random = outcomes.values()
    run = suite.runs[0]
    assert full.accuracy_after.value == pytest.approx(loading.eval_at(run, "after")["accuracy"])
    assert full.kl_after.value == pytest.approx(run.contexts["KLf_full"].mean())
    assert full.kl_before.value == random.kl_before.value and full.kl_before.prompts == 20
    assert difference(random.kl_after, full.kl_after).low > 0
    assert full.kl_drop.value == pytest.approx(1 - run.contexts["KLf_full"].mean() / run.contexts["KLf_full_base"].mean())


def test_masked_and_missing_positions_are_left_out():
    table = pd.DataFrame({"sample_index": [0, 0, 1, 1], "KLf_full": [1.0, np.nan, 3.0, 100.0], "loss_mask": [1, 1, 1, 0]})
    sums = statistics.context_sums(table, "KLf_full")
    assert sums.loc[0].tolist() == [1.0, 1.0] and sums.loc[1].tolist() == [3.0, 1.0]
    assert statistics.context_sums(table, "absent") is None


def test_accuracy_without_prompts_has_a_value_and_no_interval(suite_dir):
    run = loading.load(suite_dir).runs[0]
    for evaluation in run.evals:
        evaluation.pop("per_prompt")
    found = outcome([run], Resampler(100)).accuracy_after
    assert found.known and np.isnan(found.low)


def test_accuracies_of_seeds_alone_have_the_intervals_of_so_few_and_paired_differences():
    sampler = Resampler(4000)
    a, b, same = (sampler.of_means(x) for x in ([0.48, 0.50, 0.49], [0.46, 0.46, 0.47], [0.5, 0.5, 0.5]))
    half = stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert a.value == pytest.approx(0.49) and a.high - a.value == pytest.approx(half, rel=0.1) == a.value - a.low
    gap = difference(a, b)
    deviation = np.std([0.02, 0.04, 0.02], ddof=1)
    assert gap.value == pytest.approx(0.08 / 3) and gap.high - gap.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * deviation / np.sqrt(3), rel=0.1)
    assert same.known and np.isnan(same.low) and difference(a, same).high - difference(a, same).low == pytest.approx(a.high - a.low)
    assert not sampler.of_means([]).known and np.isnan(sampler.of_means([0.3]).low)
