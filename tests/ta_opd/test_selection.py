"""Budgets, ties, min-keep, scopes and seeds of the selection engine; its errors."""

import pickle
import types

import numpy as np
import pytest
from method_cases import metrics_of, random_samples

from benchmarks import selection_oracle as oracle
from ta_opd.errors import ConfigError, DataError
from ta_opd.ranking import Order, Rows, budget_share, exact_ceil, reserve, token_budget
from ta_opd.selection import (
    MASK_CHOICES,
    METHOD_ALIASES,
    RELEASED_MASKS,
    SelectionConfig,
    list_selectors,
    resolve_mask,
    select_tokens,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero
K = 6
RANKINGS = {
    "entropy": ("H_norm", {}),
    "divergence": ("D_norm", {}),
    "tip": ("tip_score", {}),
    "compatibility": ("C_norm", {}),
    "ca_softor": ("ca_softor_score", {}),
    "dlearn_high": ("Dlearn", {}),
    "dincompat_high": ("Dincompat", {}),
    "q3": ("split_ca_score", {"q3": True}),
    "q3_highc": ("C_norm", {"q3": True}),
    "q3_lowc": ("C_norm", {"q3": True, "low": True}),
    "q3_teachability_high": ("Dlearn", {"q3": True}),
    "q3_teachability_low": ("Dlearn", {"q3": True, "low": True}),
    "q3_dincompat_high": ("Dincompat", {"q3": True}),
}


def plain(T: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.random(T) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}


def kept(selection) -> set[int]:
    return set(np.flatnonzero(selection.keep).tolist())


@pytest.mark.parametrize("mask", RANKINGS)
@pytest.mark.parametrize("profile", ["paper", "released"])
@pytest.mark.parametrize("min_keep", [0, 1, 3])
def test_plain_rankings_equal_the_plain_loop(mask, profile, min_keep):
    samples = random_samples(31, K, num=10)
    metrics, lengths = metrics_of(samples, K)
    valid = np.random.default_rng(1).random(sum(lengths)) < 0.8
    table, paper = oracle.rows(samples, K), profile == "paper"
    oracle.score(table, valid.tolist(), population="valid" if paper else "all", softor="dlearn" if paper else "dc")
    column, options = RANKINGS[mask]
    for ratio in (0.02, 0.1, 0.35, 0.8):
        expected = oracle.select(
            table, valid.tolist(), column, ratio, min_keep=min_keep, on_top=not paper, float_ceil=not paper,
            top_up="own" if paper else "ca_softor", late_ties=not paper, **options,
        )  # fmt: skip
        config = SelectionConfig(mask=mask, ratio=ratio, min_keep=min_keep, profile=profile)
        assert kept(select_tokens(metrics, valid, lengths, config)) == expected, ratio


@pytest.mark.parametrize("mask", ["entropy", "q3_lowc", "dlearn_high"])
@pytest.mark.parametrize("min_keep", [0, 1, 4])
def test_response_scope_is_one_selection_per_response(mask, min_keep):
    metrics, lengths = metrics_of(random_samples(5, K, num=10), K)
    valid = np.random.default_rng(3).random(sum(lengths)) < 0.8
    config = SelectionConfig(mask=mask, ratio=0.3, scope="response", min_keep=min_keep)
    selection = select_tokens(metrics, valid, lengths, config)
    column, options = RANKINGS[mask]
    scores = selection.columns
    expected, start, budget = set(), 0, 0
    for length in lengths:
        rows = range(start, start + length)
        start += length
        table = [
            {column: scores[column][i], "tok_pos": i, "sample": 0, "quadrant": scores["quadrant"][i]} for i in rows
        ]
        own = oracle.select(table, valid[list(rows)].tolist() if length else [], column, 0.3, min_keep=min_keep, **options)
        expected |= {i + rows.start for i in own}
        num_valid = int(valid[rows.start : rows.stop].sum())
        budget += exact_ceil(num_valid, 0.3)
    assert kept(selection) == expected and selection.budget == budget


def test_golden_paper_profile_differs_only_as_documented():
    # The released golden vector: min-keep displaces the last ranked token instead of adding one.
    H = [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1, .05]  # fmt: skip
    D = [3, .1, 2.5, .2, 2, .3, 1.5, .4, 1, .5, 0, 4]  # fmt: skip
    C = [.9, .95, .1, .8, .7, .9, .2, .3, .5, .99, .6, .05]  # fmt: skip
    metrics = dict(zip(("Hs_topk_norm", "KLf_union", "Cmass"), map(np.array, (H, D, C)), strict=True))
    got = {mask: sorted(kept(select_tokens(metrics, np.ones(12), [5, 7], SelectionConfig(mask=mask, ratio=0.25)))) for mask in
           ("entropy", "divergence", "dlearn_high", "q3_highc")}  # fmt: skip
    assert got == {"entropy": [4, 9, 10], "divergence": [0, 2, 11], "dlearn_high": [0, 4, 8], "q3_highc": [0, 4, 11]}


def test_budget_roundings():
    assert [token_budget(100, 0.07, rule) for rule in ("ceil", "floor", "float_ceil")] == [7, 7, 8]
    assert [token_budget(10, 0.25, rule) for rule in ("ceil", "floor", "float_ceil")] == [3, 2, 3]
    assert token_budget(3, 0.01, "floor") == 1 and token_budget(0, 0.5, "ceil") == 0
    assert exact_ceil(1000, 0.1) == 100 and exact_ceil(3, 1.0) == 3 and exact_ceil(7, 0.3) == 3 and exact_ceil(9, 5 / 9) == 5
    assert token_budget(100, 0.29, "floor") == 29 and exact_ceil(10**6, 0.1) == 10**5 and exact_ceil(10**6, 0.100001) == 100001


def test_ties_go_to_early_positions_then_early_rows():
    metrics = {name: np.zeros(9) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}
    for mask in ("entropy", "compatibility"):
        config = SelectionConfig(mask=mask, ratio=5 / 9, min_keep=0)
        assert kept(select_tokens(metrics, np.ones(9), [3, 3, 3], config)) == {0, 3, 6, 1, 4}


def test_low_rules_break_ties_early_in_paper_and_late_as_released():
    metrics = plain(12)
    metrics["Cmass"][:] = 0.5
    quadrant3 = {"Hs_topk_norm": np.tile([0.0, 1.0], 6), "KLf_union": np.tile([1.0, 0.0], 6)}
    for profile, expected in (("paper", {0, 6}), ("released", {4, 10})):
        config = SelectionConfig(mask="q3_lowc", ratio=0.1, min_keep=0, profile=profile)
        assert kept(select_tokens({**metrics, **quadrant3}, np.ones(12), [6, 6], config)) == expected


def test_min_keep_inside_shares_a_budget_that_is_too_small_fairly():
    metrics = plain(20)
    lengths = [4, 4, 4, 4, 4]
    config = SelectionConfig(mask="entropy", ratio=0.15, min_keep=2)  # budget 3 for 5 responses
    selection = select_tokens(metrics, np.ones(20), lengths, config)
    best = np.arange(0, 20, 4) + metrics["Hs_topk_norm"].reshape(5, 4).argmax(axis=1)
    scores = selection.columns["H_norm"]
    assert kept(selection) == set(sorted(best, key=lambda i: (-scores[i], i % 4, i))[:3])
    assert selection.budget == 3 == selection.keep.sum()


def test_min_keep_gives_every_response_a_voice_even_outside_q3():
    T, lengths = 40, [10, 10, 10, 10]
    metrics = plain(T)
    metrics["Hs_topk_norm"][10:20] = 1.0  # the second response has no Q3 token
    for rule in ("inside", "on_top"):
        config = SelectionConfig(mask="q3_highc", ratio=0.2, min_keep=1, min_keep_rule=rule)
        selection = select_tokens(metrics, np.ones(T), lengths, config)
        assert (np.add.reduceat(selection.keep, [0, 10, 20, 30]) >= 1).all()
        assert selection.summary["forced_tokens"] >= 1
        assert (selection.keep.sum() <= selection.budget) == (rule == "inside")


def test_forced_tokens_are_those_that_their_score_would_not_have_kept():
    rng = np.random.default_rng(5)
    lengths = [8] * 10
    metrics = {name: rng.random(80) for name in plain(1)}
    metrics["Hs_topk_norm"][:40] += 1  # the first five responses are surer of a place
    for min_keep in (0, 1, 2):
        config = SelectionConfig(mask="entropy", ratio=0.25, min_keep=min_keep, normalization="batch_minmax")
        selection = select_tokens(metrics, np.ones(80), lengths, config)
        best = set(np.argsort(-selection.columns["H_norm"])[:20].tolist())
        assert selection.summary["forced_tokens"] == len(kept(selection) - best) == 5 * min_keep
        assert (selection.summary["num_kept_tokens"], selection.summary["keep_ratio"]) == (20, 0.25)


def test_q3_reports_that_it_cannot_fill_its_budget():
    selection = select_tokens(plain(40), np.ones(40), [40], SelectionConfig(mask="q3", ratio=0.9))
    assert selection.keep.sum() < selection.budget and "candidates of 'q3'" in selection.summary["warnings"][0]


def test_degenerate_entropy_is_reported():
    metrics = plain(40)
    metrics["Hs_topk_norm"][:30] = 0
    summary = select_tokens(metrics, np.ones(40), [40], SelectionConfig(mask="q3", ratio=0.2)).summary
    assert any("lowest H_norm" in warning for warning in summary["warnings"]) and summary["q3_tokens"] > 0
    valid = np.arange(40) >= 30
    for population, warned in (("valid", False), ("all", True)):
        config = SelectionConfig(mask="q3", ratio=0.2, population=population)
        warnings = select_tokens(metrics, valid, [40], config).summary["warnings"]
        assert any("lowest H_norm" in warning for warning in warnings) == warned


def test_split_budget():
    metrics = plain(50, 4)
    config = SelectionConfig(mask="split_budget_ca", ratio=0.2, gamma=0.3, min_keep=0)
    selection = select_tokens(metrics, np.ones(50), [50], config)
    by_entropy = np.argsort(-selection.columns["H_norm"], kind="stable")[:3]
    rest = [i for i in np.argsort(-selection.columns["split_ca_score"], kind="stable") if i not in by_entropy][:7]
    assert kept(selection) == {*by_entropy.tolist(), *map(int, rest)}


def test_shares_of_a_budget_are_rounded_half_up_and_as_released_to_even():
    for budget, share, half_up, released in ((1, 0.5, 1, 0), (3, 0.5, 2, 2), (5, 0.5, 3, 2), (50, 0.29, 15, 14), (7, 0.0, 0, 0), (7, 1, 7, 7), (0, 0.5, 0, 0)):
        assert budget_share(budget, share, "ceil") == half_up and budget_share(budget, share, "float_ceil") == released, (budget, share)
    metrics = plain(10, 4)
    for profile, by_entropy in (("paper", 3), ("released", 2)):
        selection = select_tokens(metrics, np.ones(10), [10], SelectionConfig(mask="split_budget_ca", ratio=0.5, min_keep=0, profile=profile))
        order = np.argsort(-selection.columns["H_norm"], kind="stable")
        rest = [i for i in np.argsort(-selection.columns["split_ca_score"], kind="stable") if i not in order[:by_entropy]]
        assert kept(selection) == {*order[:by_entropy].tolist(), *map(int, rest[: 5 - by_entropy])}


def test_random_is_keyed_by_seed_and_rollout_and_grows_with_the_ratio():
    metrics, ones = plain(200), np.ones(200)

    def draw(ratio=0.1, rollout_id=0, **options):
        config = SelectionConfig(mask="random", ratio=ratio, min_keep=0, **options)
        return kept(select_tokens(metrics, ones, [120, 80], config, rollout_id=rollout_id))

    assert draw() == draw() != draw(rollout_id=1)
    assert draw() != draw(seed=43) and draw() < draw(ratio=0.3)
    assert draw(profile="released", rollout_id=1) == draw(profile="released", seed=43)
    assert draw(seed=-5) != draw(seed=5)


def test_everything_masked_is_said_once_and_empty_responses_are_fine():
    selection = select_tokens(plain(6), np.zeros(6), [0, 6, 0], SelectionConfig(mask="tip", ratio=0.5))
    assert not selection.keep.any() and not selection.weights.any() and selection.budget == 0 == selection.num_valid
    assert selection.summary["warnings"] == ["no valid token in the batch: nothing is kept"]
    nothing = select_tokens({name: np.zeros(0) for name in plain(1)}, [], [0, 0], SelectionConfig(mask="q3", ratio=0.5))
    assert nothing.keep.shape == (0,) and nothing.summary["keep_ratio"] == 0
    some = select_tokens(plain(6), np.ones(6), [0, 6, 0], SelectionConfig(mask="tip", ratio=0.5))
    assert some.keep.sum() == 3


def test_none_and_full_keep_every_valid_token():
    valid = np.arange(10) % 3 > 0
    for mask in ("none", "full"):
        selection = select_tokens(plain(10), valid, [10], SelectionConfig(mask=mask, ratio=0.2))
        assert (selection.keep == valid).all() and (selection.weights == valid).all()
        assert selection.columns["budget_method"][0] == mask


def test_columns_and_summary():
    metrics, lengths = metrics_of(random_samples(2, K), K)
    valid = np.ones(sum(lengths))
    selection = select_tokens(metrics, valid, lengths, SelectionConfig(mask="teachability", ratio=0.25))
    assert selection.weights.dtype == np.float32 and selection.keep.dtype == bool
    assert {len(column) for column in selection.columns.values()} == {sum(lengths)}
    assert set(selection.columns["budget_method"]) == {"teachability"} and set(selection.columns["budget_ratio"]) == {0.25}
    summary = selection.summary
    assert summary["num_kept_tokens"] == selection.keep.sum() == selection.budget
    assert summary["mean_H_norm"] == pytest.approx(selection.columns["H_norm"].mean())
    for name in ("reach_t1", "Coverlap", "student_topk_mass", "teacher_topk_mass", "Ht_topk"):
        assert summary[f"mean_{name}"] == pytest.approx(metrics[name].mean())
    pickle.loads(pickle.dumps(selection))


def test_the_summary_says_where_in_the_responses_tokens_were_kept():
    first = select_tokens(plain(21), np.ones(21), [10, 0, 11], SelectionConfig(mask="prefix", ratio=0.2, min_keep=0))
    assert first.summary["valid_position"] == pytest.approx(0.5)
    assert first.summary["kept_position"] == pytest.approx((0 + 1 / 9 + 0 + 0.1 + 0.2) / 5)
    nothing = select_tokens(plain(4), np.zeros(4), [4], SelectionConfig(mask="prefix", ratio=0.2))
    assert nothing.summary["kept_position"] == nothing.summary["valid_position"] == 0


def test_config_from_arguments():
    args = types.SimpleNamespace(
        opd_budget_mask="tip", opd_budget_ratio=0.3, opd_budget_mask_seed=7, opd_budget_min_keep_per_sample=2,
        opd_budget_scope="response", opd_budget_min_keep_rule="on_top", opd_metric_q_low=0.1, opd_metric_population=None,
    )  # fmt: skip
    config = SelectionConfig.from_args(args)
    assert (config.mask, config.ratio, config.seed, config.min_keep) == ("tip", 0.3, 7, 2)
    assert (config.scope, config.min_keep_rule, config.q_low, config.population) == ("response", "on_top", 0.1, "valid")
    assert SelectionConfig.from_args(types.SimpleNamespace()) == SelectionConfig()
    assert config.resolved()["softor_source"] == "dlearn"
    released = SelectionConfig.from_args(types.SimpleNamespace(opd_profile="released", opd_budget_mask="tip"))
    assert (released.population, released.min_keep_rule, released.rounding) == ("all", "on_top", "float_ceil")
    with pytest.raises(ConfigError, match="two selection rules: .*'mine.py:rule' and 'tip'"):
        SelectionConfig.from_args(types.SimpleNamespace(opd_budget_mask="tip", opd_selector_path="mine.py:rule"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, r"\(0, 1\], got 0"),
        ({"ratio": 1.5}, r"got 1.5"),
        ({"ratio": "half"}, "got 'half'"),
        ({"ratio": float("nan")}, "got nan"),
        ({"gamma": -1}, "gamma"),
        ({"min_keep": -1}, "0 .off. or more"),
        ({"mask": "teachabilty"}, "did you mean 'teachability'.*known: .*dlearn_high"),
        ({"scope": "token"}, "batch, response"),
        ({"min_keep_rule": "outside"}, "inside, on_top"),
        ({"profile": "mine"}, "paper, released"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**options)


def test_mismatched_lengths_are_named():
    with pytest.raises(DataError, match="valid: expected 6"):
        select_tokens(plain(6), np.ones(5), [6], SelectionConfig())
    with pytest.raises(DataError, match=r"metrics: expected 7 .*Cmass"):
        select_tokens(plain(6), np.ones(7), [7], SelectionConfig())


def test_registry_lists_the_released_masks_and_aliases():
    assert len(RELEASED_MASKS) == 21 and set(RELEASED_MASKS) <= set(MASK_CHOICES)
    assert {s.name for s in list_selectors()} <= set(MASK_CHOICES)
    assert resolve_mask("teachability") == resolve_mask("teachability_high") == "dlearn_high"
    assert resolve_mask("q3_dlearn_low") == "q3_teachability_low" and resolve_mask("full") == "none"
    for alias, mask in METHOD_ALIASES.items():
        assert mask in MASK_CHOICES, alias
    assert METHOD_ALIASES["pure_opd"] == "full" and METHOD_ALIASES["ta_softor"] == "ca_softor"
    assert METHOD_ALIASES["ta_split"] == "split_budget_ca" and METHOD_ALIASES["q3_highC"] == "q3_highc"
    assert all(s.summary and s.paper for s in list_selectors())


def test_reservation_prefers_candidates_and_respects_the_room():
    rows = Rows.of([3, 3, 2])
    order = Order(np.array([0.9, 0.1, 0.2, 0.8, 0.7, 0.3, 0.5, 0.4]), rows)
    candidates = np.array([0, 1, 1, 0, 1, 0, 0, 0], bool)
    everywhere = np.ones(8, bool)
    assert np.flatnonzero(reserve(order, candidates, everywhere, 1, 8)).tolist() == [2, 4, 6]
    assert np.flatnonzero(reserve(order, candidates, everywhere, 1, 1)).tolist() == [4]
    assert np.flatnonzero(reserve(order, candidates, everywhere, 2, 8)).tolist() == [1, 2, 3, 4, 6, 7]
    assert np.flatnonzero(reserve(order, candidates, everywhere, 2, np.array([1, 2, 0]))).tolist() == [2, 3, 4]
