"""Profile released against what the released code computed: 20 batches, every column, every mask at every budget."""

import types

import numpy as np
import pytest
from method_cases import CASES, released_case

from ta_opd.metrics import position_columns
from ta_opd.scores import QUADRANT_NAMES
from ta_opd.selection import RELEASED_MASKS, SelectionConfig, select_tokens

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero


def config_of(case, mask, ratio) -> SelectionConfig:
    args = types.SimpleNamespace(**case["args"], opd_budget_mask=mask, opd_budget_ratio=ratio, opd_profile="released")
    return SelectionConfig.from_args(args)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_columns_are_the_released_ones_to_the_last_bit(case):
    metrics, valid, lengths = released_case(case)
    scores = select_tokens(metrics, valid, lengths, config_of(case, "none", 1.0)).columns
    got = {**metrics, **scores, "pos_norm": position_columns(lengths)["pos_norm"], "loss_mask_original": valid}
    missing = {"_id": -1, "_rank": 0}
    for name, expected in case["columns"].items():
        if name == "quadrant":
            assert [QUADRANT_NAMES[int(q)] for q in got[name]] == expected
            continue
        absent = next((value for suffix, value in missing.items() if name.endswith(suffix)), np.nan)
        expected = np.array([absent if x in (None, "") else x for x in expected], np.float64)
        np.testing.assert_array_equal(np.asarray(got[name], np.float64), expected, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_kept_tokens_are_the_released_ones(case):
    metrics, valid, lengths = released_case(case)
    assert {key.split("@")[0] for key in case["kept"]} == set(RELEASED_MASKS) - {"none", "full"}
    for key, expected in case["kept"].items():
        mask, ratio = key.split("@")
        selection = select_tokens(metrics, valid, lengths, config_of(case, mask, float(ratio)))
        assert np.flatnonzero(selection.keep).tolist() == expected, key


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case["name"])
def test_float32_agrees_within_its_precision(case):
    exact, single = released_case(case)[0], released_case(case, np.float32)[0]
    for name, column in exact.items():
        assert single[name].dtype == (np.float32 if column.dtype == np.float64 else column.dtype)
        np.testing.assert_allclose(single[name], column, rtol=3e-6, atol=3e-6, err_msg=name)


GOLDEN_H = [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1, .05]  # fmt: skip
GOLDEN_D = [3, .1, 2.5, .2, 2, .3, 1.5, .4, 1, .5, 0, 4]  # fmt: skip
GOLDEN_C = [.9, .95, .1, .8, .7, .9, .2, .3, .5, .99, .6, .05]  # fmt: skip
GOLDEN_KEPT = {
    "entropy": ([0, 8, 9, 10], [0, 5, 6, 7, 8, 9, 10]),
    "divergence": ([0, 2, 11], [0, 2, 4, 6, 8, 11]),
    "tip": ([0, 9, 10, 11], [0, 6, 8, 9, 10, 11]),
    "compatibility": ([0, 1, 9], [0, 1, 3, 4, 5, 9]),
    "ca_softor": ([0, 9, 10], [0, 4, 7, 8, 9, 10]),
    "dlearn_high": ([0, 4, 8], [0, 4, 5, 6, 8, 9]),
    "dincompat_high": ([2, 6, 11], [2, 4, 6, 7, 8, 11]),
    "q3": ([0, 2, 4, 10], [0, 2, 4, 11]),
    "q3_highc": ([0, 2, 4, 10], [0, 2, 4, 11]),
    "q3_teachability_high": ([0, 2, 4, 10], [0, 2, 4, 11]),
    "q3_lowc": ([2, 4, 11], [0, 2, 4, 11]),
    "q3_teachability_low": ([2, 4, 11], [0, 2, 4, 11]),
    "q3_dincompat_high": ([2, 4, 11], [0, 2, 4, 11]),
    "split_budget_ca": ([0, 9, 10], [0, 2, 4, 8, 9, 10]),
    "random": ([2, 5, 7], [2, 5, 6, 7, 8, 9]),
}


def golden_metrics() -> dict:
    columns = {"Hs_topk_norm": GOLDEN_H, "KLf_union": GOLDEN_D, "Cmass": GOLDEN_C}
    return {name: np.array(values, np.float64) for name, values in columns.items()}


@pytest.mark.parametrize("mask", GOLDEN_KEPT)
@pytest.mark.parametrize("which", [0, 1])
def test_golden_selection(mask, which):
    config = SelectionConfig(mask=mask, ratio=(0.25, 0.5)[which], profile="released")
    selection = select_tokens(golden_metrics(), np.ones(12, bool), [5, 7], config)
    assert np.flatnonzero(selection.keep).tolist() == GOLDEN_KEPT[mask][which]
    assert selection.budget == (3, 6)[which]


def test_golden_random_at_the_next_rollout():
    config = SelectionConfig(mask="random", ratio=0.25, profile="released", min_keep=0)
    selection = select_tokens(golden_metrics(), np.ones(12, bool), [5, 7], config, rollout_id=1)
    assert np.flatnonzero(selection.keep).tolist() == [1, 9, 10]


def test_golden_scores():
    config = SelectionConfig(mask="entropy", ratio=0.25, profile="released")
    columns = select_tokens(golden_metrics(), np.ones(12, bool), [5, 7], config).columns
    names = ["H_norm", "D_norm", "C_norm", "DC_norm", "Dlearn", "Dincompat", "tip_score", "ca_softor_score", "split_ca_score"]
    row = {index: [columns[name][index] for name in names] for index in (0, 8)}
    expected_0 = [0, 0.867452, 0.923638, 1.0, 0.801212, 0.06624, 0.867452, 1.0, 1.0]
    expected_8 = [0.841962, 0.278351, 0.474453, 0.231665, 0.132064, 0.146286, 0.885952, 0.878574, 0.036612]
    np.testing.assert_allclose(row[0], expected_0, atol=6e-7)
    np.testing.assert_allclose(row[8], expected_8, atol=6e-7)
    assert (columns["quadrant"][0], columns["quadrant"][8]) == (3, 1)


def test_golden_ties():
    equal = {name: np.full(8, 0.5) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}
    config = SelectionConfig(mask="dlearn_high", ratio=0.5, profile="released", min_keep=0)
    assert np.flatnonzero(select_tokens(equal, np.ones(8, bool), [4, 4], config).keep).tolist() == [0, 1, 4, 5]


def test_released_budget_has_the_float_artefact_and_paper_not():
    zero = {name: np.linspace(0, 1, 100) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}
    for profile, budget in (("released", 8), ("paper", 7)):
        config = SelectionConfig(mask="entropy", ratio=0.07, profile=profile)
        assert select_tokens(zero, np.ones(100, bool), [100], config).budget == budget


def test_ratio_one_returns_early_with_every_mask():
    config = SelectionConfig(mask="q3_lowc", ratio=1.0, profile="released")
    valid = np.arange(12) % 3 > 0
    selection = select_tokens(golden_metrics(), valid, [5, 7], config)
    assert (selection.keep == valid).all() and not selection.columns["budget_score"].any()


@pytest.mark.parametrize(
    "mask, expected",
    [
        ("q3_lowc", lambda c: 1 - c["C_norm"]),
        ("q3_teachability_low", lambda c: 1 - c["Dlearn"]),
        ("split_budget_ca", lambda c: np.maximum(c["H_norm"], c["split_ca_score"])),
        ("random", lambda c: np.zeros(12)),
        ("tip", lambda c: c["tip_score"]),
    ],
)
def test_budget_score_has_the_released_quirks(mask, expected):
    columns = select_tokens(
        golden_metrics(), np.ones(12, bool), [5, 7], SelectionConfig(mask=mask, ratio=0.25, profile="released")
    ).columns
    np.testing.assert_array_equal(columns["budget_score"], expected(columns))
