"""Normalisation, scores and quadrants."""

import numpy as np
import pytest
from method_cases import metrics_of, random_samples

from benchmarks import selection_oracle as oracle
from ta_opd.errors import ConfigError
from ta_opd.scores import PROXY_COLUMN, QUADRANT_NAMES, ScoreConfig, batch_scores, degenerate_medians, normalise

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero
K = 6
SCORES = ("H_norm", "D_norm", "C_norm", "DC_norm", "Dlearn", "Dincompat", "tip_score", "ca_softor_score", "split_ca_score")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_examples_of_normalisation(dtype):
    quantile, plain = ScoreConfig(), ScoreConfig(normalization="none")
    np.testing.assert_allclose(normalise(np.arange(5, dtype=dtype), None, quantile), [0, 2 / 9, 0.5, 7 / 9, 1], rtol=1e-6)
    same = np.full(3, 5, dtype)
    assert normalise(same, None, quantile).tolist() == [0, 0, 0] and normalise(same, None, plain).tolist() == [1, 1, 1]
    got = normalise(np.array([1, np.nan, 3], dtype), None, ScoreConfig(normalization="batch_minmax"))
    assert got.tolist() == [0, 0, 1]
    assert normalise(np.array([np.nan, np.inf], dtype), None, quantile).tolist() == [0, 0]
    assert normalise(np.zeros(0, dtype), None, quantile).size == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_population_whose_inner_quantiles_are_equal_carries_no_signal(dtype):
    rng = np.random.default_rng(3)
    for num in (2, 5, 8, 50, 333, 1000):
        for value in rng.random(40) * 27:
            x_T = np.full(num, value, dtype)
            x_T[: num // 25], x_T[num - num // 25 :] = 0, 30  # less than 5 % at each end
            assert not normalise(x_T, None, ScoreConfig()).any(), (num, value)


@pytest.mark.parametrize("scheme", ["batch_quantile", "batch_minmax", "none"])
def test_a_small_range_is_a_range(scheme):
    """Late in training all divergences are small; only a range below 1e-12 carries no signal."""
    x_T = np.array([0.0, 1.0, 2.0])
    config = ScoreConfig(normalization=scheme, q_low=0.0, q_high=1.0)
    for scale in (1e-2, 1e-6, 6e-13):
        assert normalise(x_T * scale, None, config).tolist() == [0, 0.5, 1], scale
    np.testing.assert_allclose(normalise(x_T * 4e-13, None, config), [0, 0.4, 0.8] if scheme == "none" else [0, 0, 0], rtol=1e-12)


@pytest.mark.parametrize("profile", ["paper", "released"])
@pytest.mark.parametrize("scheme", ["batch_quantile", "batch_minmax", "none"])
@pytest.mark.parametrize("proxy", list(PROXY_COLUMN))
def test_scores_equal_the_plain_loop(profile, scheme, proxy):
    samples = random_samples(21, K, num=12)
    metrics, _ = metrics_of(samples, K)
    valid = np.random.default_rng(0).random(metrics["Cmass"].size) < 0.7
    config = ScoreConfig(profile=profile, proxy=proxy, normalization=scheme, q_low=0.1, q_high=0.9)
    got = batch_scores(metrics, valid, config)
    table = oracle.rows(samples, K)
    paper = profile == "paper"
    oracle.score(
        table, valid.tolist(), population="valid" if paper else "all", softor="dlearn" if paper else "dc", proxy=proxy,
        scheme=scheme, q_low=0.1, q_high=0.9,
    )  # fmt: skip
    for name in SCORES:
        np.testing.assert_array_equal(got[name], [row[name] for row in table], err_msg=name)
    if not degenerate_medians(got, valid):
        np.testing.assert_array_equal(got["quadrant"], [row["quadrant"] for row in table])


def test_paper_statistics_ignore_invalid_tokens_and_released_ones_do_not():
    metrics = {name: np.arange(8.0) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}
    wild = {name: np.append(column, [1e6, np.nan]) for name, column in metrics.items()}
    valid = np.arange(10) < 8
    paper = batch_scores(wild, valid, ScoreConfig(profile="paper"))
    alone = batch_scores(metrics, valid[:8], ScoreConfig(profile="paper"))
    released = batch_scores(wild, valid, ScoreConfig(profile="released"))
    for name in (*SCORES, "quadrant"):
        np.testing.assert_array_equal(paper[name][:8], alone[name])
    assert (released["H_norm"][:8] != alone["H_norm"]).any()


def degenerate_entropy(T=40) -> dict:
    rng = np.random.default_rng(2)
    entropy = np.where(np.arange(T) < 30, rng.random(T) * 1e-9, rng.random(T))
    # Minimum and low quantile coincide: 30 of 40 tokens clip to 0.
    metrics = {"Hs_topk_norm": entropy, "KLf_union": rng.random(T), "Cmass": rng.random(T)}
    return {**metrics, "Hs_topk_norm": np.where(entropy < 1e-8, entropy, entropy + 1)}


def test_quadrants_by_rank_when_the_degenerate_medians():
    metrics, valid = degenerate_entropy(), np.ones(40, bool)
    metrics["Hs_topk_norm"][:30] = 0
    released = batch_scores(metrics, valid, ScoreConfig(profile="released"))
    assert not np.isin(released["quadrant"], (3, 4)).any()
    paper = batch_scores(metrics, valid, ScoreConfig(profile="paper"))
    assert degenerate_medians(paper, valid) == ["H_norm"]
    assert np.isin(paper["quadrant"], (3, 4)).sum() == 20
    low = np.isin(paper["quadrant"], (3, 4))
    assert metrics["Hs_topk_norm"][low].max() <= metrics["Hs_topk_norm"][~low].min()


def test_by_rank_outsiders_and_values_that_are_not_finite_have_a_half_too():
    """Outsiders are held against the lowest of the population's upper half; nan and -inf count as 0, inf as the largest."""
    entropy = np.array([0, 0, 0, 0.0, 0, np.nan, 2, 3, np.inf, 0, 0, 1, 2, np.nan])
    valid = np.arange(14) < 9
    metrics = {"Hs_topk_norm": entropy, "KLf_union": np.arange(14.0), "Cmass": np.ones(14)}
    quadrant = batch_scores(metrics, valid, ScoreConfig(quadrant_cut="rank"))["quadrant"]
    high = np.isin(quadrant, (1, 2)).astype(int)
    assert high[valid].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]  # of equal ones the later are higher
    assert high[~valid].tolist() == [1, 1, 1, 1, 1]
    entropy[[4, 5]] = 0.5
    high = np.isin(batch_scores(metrics, valid, ScoreConfig(quadrant_cut="rank"))["quadrant"], (1, 2)).astype(int)
    assert high.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]


def test_rank_cut_changes_nothing_when_the_median_works():
    samples = random_samples(4, K, num=12)
    metrics, _ = metrics_of(samples, K)
    valid = np.ones(metrics["Cmass"].size, bool)
    by_rank = batch_scores(metrics, valid, ScoreConfig(quadrant_cut="rank"))
    by_median = batch_scores(metrics, valid, ScoreConfig(quadrant_cut="median"))
    assert not degenerate_medians(by_rank, valid)
    np.testing.assert_array_equal(by_rank["quadrant"], by_median["quadrant"])
    assert set(by_rank["quadrant"].tolist()) <= set(QUADRANT_NAMES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"profile": "original"}, "paper, released"),
        ({"proxy": "jaccard"}, "mass, set, bc, prefix_ema"),
        ({"normalization": "zscore"}, "batch_quantile"),
        ({"population": "some"}, "valid, all"),
        ({"q_low": 0.9, "q_high": 0.1}, "q_low < q_high"),
        ({"q_low": 0.05, "q_high": 1.05}, "q_low < q_high"),
        ({"q_low": -0.05}, "q_low < q_high"),
        ({"softor_source": "d"}, "dlearn, dc"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(**options)


def test_divergence_that_is_mostly_zero_does_not_count_as_high():
    rng = np.random.default_rng(7)
    metrics = {"Hs_topk_norm": rng.random(40), "KLf_union": np.where(np.arange(40) < 30, 0, rng.random(40) + 1), "Cmass": rng.random(40)}
    released = batch_scores(metrics, np.ones(40, bool), ScoreConfig(profile="released"))
    assert np.isin(released["quadrant"], (1, 3)).all()
    paper = batch_scores(metrics, np.ones(40, bool), ScoreConfig(profile="paper"))
    assert degenerate_medians(paper, np.ones(40, bool)) == ["D_norm"]
    high = np.isin(paper["quadrant"], (1, 3))
    assert high.sum() == 20 and high[30:].all()
