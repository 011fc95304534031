"""Reachability, section 3, budgets, seeds."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.budget import budget_accuracy, collect_gain_runs, parse_ratio_tag, run_name_parts, write_budget_accuracy
from ta_opd.fixed_context.features import with_gains
from ta_opd.fixed_context.multiseed import PairedConfig, paired_differences, seed_summary
from ta_opd.fixed_context.reachability import ReachabilityConfig, auc, fit_logistic, group_folds, out_of_fold, reachability
from ta_opd.fixed_context.section3 import Section3Config, load_dataset, section3_tables, write_section3
from ta_opd.fixed_context.tables import write_table
from tests.fixed_context.diagnostic_cases import golden_table, paper_table


def test_logistic_regression_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2))
    y = (rng.random(500) < 1 / (1 + np.exp(-(0.3 + x @ [1.0, -2.0])))).astype(float)
    expected = sm.Logit(y, sm.add_constant(x)).fit(disp=0).params
    np.testing.assert_allclose(fit_logistic(x, y), expected, atol=1e-3)
    assert np.isfinite(fit_logistic(x, (x[:, 0] > 0).astype(float))).all()  # separable


def test_auc_counts_pairs():
    rng = np.random.default_rng(1)
    y, score = (rng.random(80) < 0.3).astype(float), np.round(rng.random(80), 1)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[y == 1] for b in score[y == 0]]
    assert auc(y, score) == pytest.approx(np.mean(pairs)) and np.isnan(auc(np.ones(3), np.arange(3)))


def test_folds_keep_groups_together_and_predict_unseen_ones():
    groups = np.repeat(np.arange(13), 7)
    folds = group_folds(groups, 5, 0)
    assert all(len(set(folds[groups == g])) == 1 for g in range(13)) and len(set(folds)) == 5
    x = groups[:, None].astype(float)
    labels = (np.random.default_rng(0).random(13) > 0.5).astype(float)
    y = labels[groups]
    flipped = y.copy()
    flipped[groups == 4] = 1 - flipped[groups == 4]
    same_fold = folds == folds[groups == 4][0]
    # A group's own labels must not reach its own predictions.
    np.testing.assert_allclose(out_of_fold(x, y, folds)[same_fold], out_of_fold(x, flipped, folds)[same_fold])


def test_reach_after_training_is_predicted_where_it_was_not_there_before():
    table = paper_table(groups=120)
    models, tertiles, notes = reachability(table, ReachabilityConfig(min_q3_size=50))
    models = models.set_index("model")
    assert models.loc["H_D_C", "auc"] > models.loc["H_D", "auc"] + 0.1
    assert tertiles["reach_rate"].is_monotonic_increasing and any("are left out" in n for n in notes)
    released, _, notes = reachability(golden_table(), ReachabilityConfig(profile="released", min_q3_size=50))
    assert np.isfinite(released["auc"]).all() and any("circular" in n for n in notes)


def test_reachability_says_what_it_cannot_do():
    models, _, notes = reachability(paper_table(groups=4), ReachabilityConfig())
    assert "auc" not in models and any("not fitted" in n for n in notes)
    with pytest.raises(DataError, match="no column reach_t1"):
        reachability(paper_table().drop(columns="reach_t1"))
    with pytest.raises(ConfigError):
        ReachabilityConfig(folds=1)


def diagnostic_folder(root, table):
    base = [c for c in table if c.endswith("_base")]
    keys = ["sample_ordinal", "sample_index", "prompt_id", "tok_pos", "pos_norm", "token_id"]
    write_table(root / "theta0_metrics.parquet", table[keys + base].rename(columns=lambda c: c.removesuffix("_base")))
    write_table(root / "eval_latest" / "fixed_context_metrics.parquet", table[keys + ["KLf_full", "KLr_full", "Hs_full", "Cmass_true", "reach_t1"]])
    return root


def test_section3_joins_the_features_before_training(tmp_path):
    table = paper_table()
    name, joined = load_dataset(f"main={diagnostic_folder(tmp_path / 'd', table)}")
    np.testing.assert_allclose(joined["Cmass_true_base"], table["Cmass_true_base"])
    np.testing.assert_allclose(joined["G_KLf_abs"], with_gains(table)["G_KLf_abs"])
    tables = section3_tables({name: joined}, Section3Config(bootstrap=30))
    expected = {"section3_dataset_manifest", "existing_q3_scale_context_summary", "robust_gain_stats", "bucket_gain_curves",
                "standardized_regression_coefficients", "within_q3_support_proxy_summary", "spline_sanity_bins", "section3_analysis_tokens"}  # fmt: skip
    assert set(tables) == expected
    robust = tables["robust_gain_stats"].set_index("variant")
    assert robust.loc["raw", "median"] == pytest.approx(np.median(with_gains(table)["G_KLf_abs"]))
    assert robust.loc["trim_5_95", "n"] < robust.loc["raw", "n"] == robust.loc["winsor_1_99", "n"]
    curves = tables["bucket_gain_curves"]
    dlearn = curves[(curves["region"] == "all") & (curves["score"] == "Dlearn")]["mean_gain"]
    assert dlearn.is_monotonic_increasing and set(curves["region"]) == {"all", "Q3"}
    assert set(tables["standardized_regression_coefficients"]["gain"]) == {"raw", "winsor_1_99"}
    write_section3(tables, Section3Config(), tmp_path / "out")
    assert (tmp_path / "out" / "section3_p0_evidence_summary.md").is_file() and len(list((tmp_path / "out").glob("*.csv"))) == 7


def test_section3_gain_is_stated(tmp_path):
    name, joined = load_dataset(f"x={diagnostic_folder(tmp_path / 'd', paper_table())}")
    for gain, column in (("absolute", "G_KLf_abs"), ("relative", "G_KLf")):
        assert section3_tables({name: joined}, Section3Config(bootstrap=10, gain=gain))["section3_dataset_manifest"]["gain_column"][0] == column
    with pytest.raises(DataError, match="NAME=DIR"):
        load_dataset("nothing")
    with pytest.raises(DataError, match="no such file"):
        load_dataset(f"x={tmp_path / 'absent'}")
    with pytest.raises(DataError, match="at least one dataset"):
        section3_tables({})


@pytest.mark.parametrize(
    "tag, ratio", [("r0p05", 0.05), ("0p05", 0.05), ("0.05", 0.05), ("005", 0.05), ("010", 0.10), ("01", 0.1), ("10", 1.0), ("1p0", 1.0), ("r1", 1.0)]
)
def test_ratio_tags(tag, ratio):
    assert parse_ratio_tag(tag) == ratio


def test_run_names():
    assert run_name_parts("dlearn_high_ratio005") == ("dlearn_high", 0.05, "")
    assert run_name_parts("q3_highc_r0p10") == ("q3_highc", 0.1, "")
    assert run_name_parts("q3_highc_r0p10_seed2") == ("q3_highc", 0.1, "seed2")
    for bad in ("dlearn_high", "x_ratioabc", "tip_r0p10_seed1.old_20260101_120000", "student_data_budget_k16_r0p10_tip_max64_seed1_tag.old_20260101_120000"):
        with pytest.raises(DataError):
            run_name_parts(bad)
    with pytest.raises(DataError):
        parse_ratio_tag("abc")


def run_folder(root, name, gap, kept=None):
    write_table(root / name / "gain" / "q3_bootstrap_matching_summary.csv", pd.DataFrame([{"bootstrap_mean_diff": gap, "matching_mean_diff": gap / 2}]))
    if kept is not None:
        rows = [{"rollout_id": 0, "num_valid_tokens": 1000, "num_kept_tokens": kept}, {"rollout_id": 0, "num_valid_tokens": 1000, "num_kept_tokens": kept}]
        write_table(root / name / "token_bank" / "summary.csv", pd.DataFrame(rows))


def test_runs_are_collected_with_what_they_kept_in_fact(tmp_path):
    run_folder(tmp_path, "dlearn_high_ratio0p05", 0.04, kept=80)
    run_folder(tmp_path, "entropy_ratio005", 0.02)
    (tmp_path / "q3_ratio0p05").mkdir()
    frame, notes = collect_gain_runs({"seed1": tmp_path})
    rows = frame.set_index("mask")
    assert rows.loc["dlearn_high", "keep_ratio"] == 0.08 and rows.loc["dlearn_high", "bootstrap_mean_diff_per_keep"] == pytest.approx(0.5)
    assert rows.loc["entropy", "bootstrap_mean_diff_per_keep"] == pytest.approx(0.4) and "q3_ratio0p05" in notes[0]
    with pytest.raises(DataError, match="no run folder"):
        collect_gain_runs({"x": tmp_path / "q3_ratio0p05"})
    with pytest.raises(DataError, match="no such folder"):
        collect_gain_runs({"x": tmp_path / "absent"})


def test_a_suites_own_folders_are_collected(tmp_path):
    """They carry a seed label, and their token banks lie elsewhere: the suite's summary says what was kept."""
    rows = []
    for seed, gap in (("seed1", 0.04), ("seed2", 0.06)):
        run_folder(tmp_path / "tag", f"tip_r0p10_{seed}", gap)
        rows.append({"mask": "tip", "budget_asked": 0.1, "seed_label": seed, "budget_real": 0.2, "kept_tokens": 200, "valid_tokens": 1000})
    run_folder(tmp_path / "tag", "tip_r0p10_seed1.old_20260101_120000", 9.0)
    frame, notes = collect_gain_runs({"all": tmp_path / "tag"})
    assert frame["label"].tolist() == ["seed1", "seed2"] and frame["mask"].tolist() == ["tip", "tip"] and not notes
    assert frame["bootstrap_mean_diff_per_keep"].tolist() == pytest.approx([0.4, 0.6])
    write_table(tmp_path / "tag" / "suite_summary.csv", pd.DataFrame(rows))
    frame, _ = collect_gain_runs({"a": tmp_path / "tag", "b": tmp_path / "tag"})
    assert frame["label"].tolist() == ["a:seed1", "a:seed2", "b:seed1", "b:seed2"]
    assert frame["keep_ratio"].tolist() == [0.2] * 4 and frame["bootstrap_mean_diff_per_keep"].tolist()[:2] == pytest.approx([0.2, 0.3])
    assert seed_summary(collect_gain_runs({"x": tmp_path / "tag"})[0], by=["mask"], value="bootstrap_mean_diff", seed="label")["seeds"].tolist() == [2]


def test_budget_accuracy(tmp_path):
    frame = pd.DataFrame({"method": ["a"] * 4 + ["b"], "budget_ratio": [0.1, 0.1, 0.1, 0.3, 0.1], "score": [1.0, 2.0, 3.0, 5.0, "none"]})
    out = budget_accuracy(frame)
    row = out[(out["method"] == "a") & (out["budget_ratio"] == 0.1)].iloc[0]
    assert (row["n"], row["mean"], row["std"]) == (3, 2.0, 1.0) and row["ci95"] == pytest.approx(1.96 / 3**0.5)
    assert "b" not in set(out["method"])
    write_budget_accuracy(out, tmp_path, method="method", budget="budget_ratio", metric="score")
    assert (tmp_path / "budget_accuracy.png").stat().st_size > 1000
    with pytest.raises(DataError, match="expected the columns score"):
        budget_accuracy(frame.drop(columns="score"))
    with pytest.raises(DataError, match="no row has a number"):
        budget_accuracy(frame.assign(score="x"))


def seeds():
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        shared = rng.normal(0, 5)  # noise both methods see
        for prompt in range(20):
            for method, effect in (("a", 1.0), ("b", 0.0)):
                rows.append({"method": method, "seed": seed, "prompt_id": prompt, "score": shared + effect + rng.normal(0, 0.2)})
    return pd.DataFrame(rows)


def test_pairing_removes_shared_noise():
    table = seeds()
    row = paired_differences(table, method="method", value="score", unit=["seed", "prompt_id"], cluster="seed", config=PairedConfig(200)).iloc[0]
    assert (row["method_a"], row["method_b"], row["clusters"], row["units"]) == ("a", "b", 4, 80)
    assert 0.8 < row["ci_low"] < row["difference"] < row["ci_high"] < 1.2
    summary = seed_summary(table.groupby(["method", "seed"], as_index=False)["score"].mean(), by=["method"], value="score")
    assert summary["std"].min() > 2  # unpaired, the effect of 1 would drown
    assert summary["seeds"].tolist() == [4, 4]


def test_seed_tables_that_do_not_add_up():
    table = seeds()
    with pytest.raises(DataError, match="repeat a combination"):
        seed_summary(table, by=["method"], value="score")
    with pytest.raises(DataError, match="two values"):
        paired_differences(table, method="method", value="score", unit=["seed"], cluster="seed")
    with pytest.raises(DataError, match="expected the columns nope"):
        seed_summary(table, by=["nope"], value="score")
    one = table[table["seed"] == 0]
    row = paired_differences(one, method="method", value="score", unit=["seed", "prompt_id"], cluster="seed").iloc[0]
    assert np.isnan(row["ci_low"]) and "one cluster" in row["note"]
