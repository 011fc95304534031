"""The vectorised bootstrap against drawing groups and concatenating their rows."""


import numpy as np
import pandas as pd
import pytest

from ta_opd.errors import DataError
from ta_opd.fixed_context.bootstrap import difference_interval, mean_interval, multiplicities, named_rng


def frame(groups=30, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, groups)
    return pd.DataFrame(
        {"group": np.repeat(rng.permutation(groups) * 3, sizes), "x": rng.standard_normal(sizes.sum()), "score": rng.random(sizes.sum())}
    )


def naive_draws(data, statistic, draws, seed):
    rng = np.random.default_rng(seed)
    parts = {name: part for name, part in data.groupby("group")}
    names = sorted(parts)
    return np.array([statistic(pd.concat([parts[names[i]] for i in rng.choice(len(names), size=len(names), replace=True)])) for _ in range(draws)])


def test_mean_equals_naive_draw_by_draw():
    data = frame()
    found = mean_interval(data["x"], data["group"], 100, np.random.default_rng(3))
    naive = naive_draws(data, lambda part: part["x"].mean(), 100, 3)
    np.testing.assert_allclose(found.draws, naive, rtol=0, atol=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))


@pytest.mark.parametrize("only_members", [False, True])
def test_difference_equals_naive_draw_by_draw(only_members):
    data = frame(seed=1)
    low_cut, high_cut = data["score"].quantile([0.1, 0.9])
    high, low = data["score"] >= high_cut, data["score"] <= low_cut
    found = difference_interval(data["x"], high, low, data["group"], 100, np.random.default_rng(5), only_members=only_members)
    used = data[high | low] if only_members else data
    naive = naive_draws(used, lambda p: p.loc[p["score"] >= high_cut, "x"].mean() - p.loc[p["score"] <= low_cut, "x"].mean(), 100, 5)
    np.testing.assert_allclose(found.draws, naive, rtol=0, atol=1e-12)
    assert found.estimate == pytest.approx(data["x"][high].mean() - data["x"][low].mean())


def test_draws_without_a_side_are_left_out_of_the_interval():
    data = pd.DataFrame({"group": [0, 1, 2], "x": [1.0, 2.0, 3.0]})
    found = difference_interval(data["x"], [True, False, False], [False, True, True], data["group"], 50, np.random.default_rng(0))
    assert np.isnan(found.draws).any() and np.isfinite([found.low, found.high]).all()


def test_one_group_has_no_interval():
    found = mean_interval([1.0, 2.0], ["a", "a"], 10, np.random.default_rng(0))
    assert found.estimate == 1.5 and np.isnan(found.low) and not found.excludes_zero


def test_empty_side_is_nan():
    found = difference_interval([1.0, 2.0], [False, False], [True, True], [0, 1], 10, np.random.default_rng(0))
    assert np.isnan(found.estimate) and np.isnan(found.low)


def test_no_group_or_no_draw_is_refused():
    with pytest.raises(DataError, match="at least one group and one draw"):
        multiplicities(0, 10, np.random.default_rng(0))


def test_every_draw_holds_as_many_groups_as_there_are():
    assert (multiplicities(17, 40, np.random.default_rng(0)).sum(1) == 17).all()


def test_names_make_their_own_stream():
    assert named_rng(1, "a").random() == named_rng(1, "a").random() != named_rng(1, "b").random()


def test_a_thousand_draws_over_57600_rows():
    rng = np.random.default_rng(0)
    values, groups, score = rng.standard_normal(57600), np.repeat(np.arange(300), 192), rng.random(57600)
    found = difference_interval(values, score > 0.9, score < 0.1, groups, 1000, np.random.default_rng(1))
    assert found.num_groups == 300 and found.low < found.estimate < found.high
