"""Gain, regions, matching, regression: what they compute beyond the golden values, and what they say about bad input."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.features import (
    build_features,
    low_entropy_high_divergence,
    parse_quantile_pair,
    resolve_columns,
    with_gains,
)
from ta_opd.fixed_context.gain import GainConfig, analyze_gain, write_gain
from ta_opd.fixed_context.matching import match_within_groups
from ta_opd.fixed_context.regions import RegionConfig, quartile_of, within_q3, write_within_q3
from ta_opd.fixed_context.regression import MODELS, coefficient_rows, design
from ta_opd.fixed_context.tables import read_table
from tests.fixed_context.diagnostic_cases import golden_table, paper_table


def features(table=None, profile="paper", **options):
    table = with_gains(paper_table() if table is None else table)
    return build_features(table, resolve_columns(table, profile), profile=profile, **options)


def test_paper_uses_before_training_columns_and_the_absolute_gain():
    columns = resolve_columns(with_gains(paper_table()), "paper")
    assert columns.as_dict() == {
        "gain": "G_KLf_abs", "h": "Hs_full_base", "d": "KLf_full_base", "c": "Cmass_true_base", "group": "prompt_id", "pos": "pos_norm", "ht": "Ht_full_base",
    }  # fmt: skip


def test_what_the_trained_student_does_changes_no_paper_feature():
    table = paper_table()
    other = table.assign(Hs_full=0.0, Cmass_true=1.0, reach_t1=0.0)
    first, second = (analyze_gain(t, GainConfig(bootstrap=20)).summary for t in (table, other))
    assert first.equals(second)


def test_released_prefers_the_columns_of_the_released_tool():
    columns = resolve_columns(golden_table(), "released")
    assert (columns.gain, columns.h, columns.d, columns.c, columns.group) == ("G_KLf", "Hs_full", "KLf_full_base", "Cmass_true", "sample_index")


def test_missing_before_training_columns_say_what_to_do():
    with pytest.raises(DataError, match="c column: expected one of Cmass_true_base.*--baseline-metrics"):
        analyze_gain(golden_table())


def test_an_override_must_exist():
    with pytest.raises(DataError, match="'nope' is not in the table"):
        resolve_columns(paper_table(), "released", gain="nope")
    with pytest.raises(ConfigError, match="expected one of paper, released"):
        resolve_columns(paper_table(), "other")


def test_given_gains_are_not_computed_again():
    table = paper_table().assign(G_KLf=7.0)
    out = with_gains(table)
    assert (out["G_KLf"] == 7).all() and "G_KLf_abs" in out and "G_KLf_abs" not in table


def test_winsorising_and_trimming_are_stated():
    table = paper_table()
    raw, clipped, cut = (features(table, winsor=w, trim=t) for w, t in ((None, None), ((0.05, 0.95), None), (None, (0.05, 0.95))))
    low, high = np.quantile(raw.frame["G"], [0.05, 0.95])
    assert clipped.frame["G"].min() == pytest.approx(low) and clipped.frame["G"].max() == pytest.approx(high)
    assert len(clipped.frame) == len(raw.frame) > len(cut.frame)
    assert "winsorised" in clipped.notes[0] and "trimmed" in cut.notes[0]


@pytest.mark.parametrize("text, expected", [("0.01,0.99", (0.01, 0.99)), ("none", None), (None, None)])
def test_quantile_pairs(text, expected):
    assert parse_quantile_pair(text) == expected


@pytest.mark.parametrize("text", ["0.5", "a,b", "0.9,0.1", "-1,2"])
def test_bad_quantile_pairs(text):
    with pytest.raises(ConfigError):
        parse_quantile_pair(text)


def test_nan_rows_are_counted_and_left_out():
    table = with_gains(paper_table())
    table.loc[3:7, "G_KLf_abs"] = np.nan
    table.loc[10, "Cmass_true_base"] = np.nan
    result = analyze_gain(table, GainConfig(bootstrap=20))
    assert result.summary["nan_rows"][0] == 6 and result.summary["rows"][0] == len(table) - 6
    assert any("6 of" in note for note in result.notes)
    with pytest.raises(DataError, match="no row has a finite"):
        analyze_gain(table.assign(G_KLf_abs=np.nan), GainConfig(bootstrap=20, overrides={"gain": "G_KLf_abs"}))


def without_q3():
    """D equals H, so that of an even number of tokens none is at once in the lower half of H and the upper half of D."""
    table = paper_table()
    return table.assign(KLf_full_base=table["Hs_full_base"])


def test_an_empty_region_is_said():
    table = without_q3()
    result = analyze_gain(table, GainConfig(bootstrap=20))
    assert result.summary["q3_tokens"][0] == 0 and np.isnan(result.summary["bootstrap_mean_diff"][0])
    assert any("empty" in note for note in result.notes) and len(result.pairs) == 0
    regions = within_q3({"x": table}, RegionConfig(bootstrap=20))
    assert regions.contrasts["q3_tokens"].tolist() == [0, 0, 0] and any("empty" in note for note in regions.notes["x"])


def test_an_empty_region_can_be_written(tmp_path):
    table = without_q3()
    write_gain(analyze_gain(table, GainConfig(bootstrap=20)), tmp_path / "gain")
    config = RegionConfig(bootstrap=20)
    write_within_q3(within_q3({"x": table}, config), config, tmp_path / "regions")
    assert (tmp_path / "gain" / "config.json").is_file() and (tmp_path / "regions" / "within_q3_high_low_summary.csv").is_file()


def test_one_group_gives_estimates_and_no_interval():
    table = paper_table(groups=1, length=200)
    result = analyze_gain(table, GainConfig(bootstrap=20))
    assert any("only one group" in note for note in result.notes)
    assert np.isnan(result.summary["bootstrap_ci_low"][0]) and np.isfinite(result.summary["bootstrap_mean_diff"][0])
    assert result.coefficients["std_err"].isna().all() and result.coefficients["coef"].notna().all()


def test_rows_without_a_group():
    table = paper_table()
    table.loc[0, "prompt_id"] = None
    with pytest.raises(DataError, match="1 rows have none"):
        analyze_gain(table)


def test_released_region_falls_back_and_says_so():
    result = analyze_gain(golden_table(), GainConfig(profile="released", bootstrap=20, use_quadrant=True))
    assert result.summary["q3_tokens"][0] == 117 and "no quadrant column" in result.notes[0]


def test_quadrants_by_column_and_by_the_online_rule():
    table = paper_table()
    by_column = analyze_gain(table.assign(quadrant=np.where(table.index < 50, "Q3_lowH_highD", "Q1_highH_highD")), GainConfig(bootstrap=20, use_quadrant=True))
    assert by_column.summary["q3_tokens"][0] == 50
    by_rule = analyze_gain(table, GainConfig(bootstrap=20, use_quadrant=True))
    frame = features(table).frame
    expected = (frame["H"] < np.median(frame["H"])) & (frame["D"] >= np.median(frame["D"]))
    assert by_rule.summary["q3_tokens"][0] == expected.sum()


def test_cluster_robust_errors_are_those_of_statsmodels():
    frame = features().frame
    rows, r2 = coefficient_rows(frame, MODELS["H_D_C"])
    plain = sm.OLS(frame["G"].to_numpy(), design(frame, MODELS["H_D_C"])).fit()
    assert [r["coef"] for r in rows] == pytest.approx(plain.params.tolist())
    assert r2 == pytest.approx(plain.rsquared)
    # Repeating every cluster's rows must not make the clustered errors shrink as if there were new data.
    doubled = pd.concat([frame, frame], ignore_index=True)
    robust, _ = coefficient_rows(doubled, MODELS["H_D_C"])
    assert robust[1]["std_err"] == pytest.approx(rows[1]["std_err"], rel=0.02)
    assert sm.OLS(doubled["G"].to_numpy(), design(doubled, MODELS["H_D_C"])).fit().bse[1] < 0.75 * plain.bse[1]


def test_the_planted_effect_is_found():
    """In the table the gain is half of D * C, so C must matter inside Q3 and Dlearn must carry the decomposition."""
    result = analyze_gain(paper_table(), GainConfig(bootstrap=200))
    row = result.summary.iloc[0]
    assert row["bootstrap_ci_low"] > 0 and row["matching_mean_diff"] > 0
    coefficients = result.coefficients.set_index(["model", "term"])["coef"]
    assert coefficients["H_Dlearn_Dincompat", "Dlearn"] > 5 * abs(coefficients["H_Dlearn_Dincompat", "Dincompat"])


def test_matching_takes_the_nearest_low_token_of_the_same_group():
    frame = features().frame.head(200)
    pairs = match_within_groups(frame)
    by_row = frame.set_index("row")
    for pair in pairs.itertuples():
        group = frame[frame["group"] == pair.group]
        cut = np.median(group["C"])
        assert by_row.loc[pair.row_high, "C"] > cut >= by_row.loc[pair.row_low, "C"]
        low = group[group["C"] <= cut]
        high = by_row.loc[pair.row_high]
        distance = ((low[["H", "D", "pos"]] - high[["H", "D", "pos"]].astype(float)) ** 2).sum(axis=1)
        assert pair.distance**2 == pytest.approx(distance.min())
    expected = sum((g["C"] > g["C"].median()).sum() for _, g in frame.groupby("group"))
    assert len(pairs) == expected


def test_quartiles_as_pandas_cuts_them():
    x = np.random.default_rng(0).random(101)
    assert quartile_of(x).tolist() == pd.qcut(x, 4, labels=False).tolist()
    assert set(quartile_of(np.ones(5))) == {0}


def test_region_is_low_h_high_d():
    frame = features().frame
    inside = low_entropy_high_divergence(frame)
    assert frame["H"][inside].max() <= frame["H"].median() and frame["D"][inside].min() >= frame["D"].median()


def test_files_of_a_gain_analysis(tmp_path):
    write_gain(analyze_gain(paper_table(), GainConfig(bootstrap=20)), tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "regression_summary.csv", "regression_coefficients.csv", "q3_bootstrap_matching_summary.csv", "q3_matching_pairs.parquet",
        "analysis_tokens.parquet", "config.json", "heatmap_H_D_meanC.png", "q3_gain_by_C_bin.png", "residual_HD_vs_C.png",
    }  # fmt: skip
    assert read_table(tmp_path / "regression_summary.csv").columns.tolist() == ["model", "r2", "delta_r2_vs_HD", "terms"]
    assert {"residual_HD", "in_q3", "feature_Dlearn", "G_KLf_abs"} <= set(read_table(tmp_path / "analysis_tokens.parquet"))


def test_matching_one_large_group_takes_little_memory():
    """All responses to one prompt form one group: A x B distances of it at once were gigabytes for a bank of 57,600 tokens."""
    import tracemalloc

    rng, n = np.random.default_rng(0), 6000
    frame = pd.DataFrame({name: rng.random(n) for name in ("H", "D", "pos", "C", "G")} | {"group": 0, "row": np.arange(n)})
    tracemalloc.start()
    pairs = match_within_groups(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6, f"{peak / 1e6:.0f} MB"
    points, high, low = frame[["H", "D", "pos"]].to_numpy(), pairs["row_high"].to_numpy(), np.flatnonzero(frame["C"] <= frame["C"].median())
    for i in (0, 1500, 2999):
        distances = ((points[high[i]] - points[low]) ** 2).sum(1)
        assert pairs["row_low"].iloc[i] == low[distances.argmin()] and pairs["distance"].iloc[i] == pytest.approx(np.sqrt(distances.min()))
