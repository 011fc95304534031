"""Matched top-N and the recommendation, through the real selectors."""

import numpy as np
import pytest

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.bootstrap import group_codes, multiplicities
from ta_opd.fixed_context.recommend import RecommendConfig, as_markdown, recommend, write_recommendation
from ta_opd.fixed_context.selections import honest_choice, selection_gains
from ta_opd.fixed_context.selector_inputs import selector_inputs
from ta_opd.fixed_context.topn import TopNConfig, matched_topn, write_topn
from ta_opd.selection import list_selectors
from tests.fixed_context.diagnostic_cases import paper_table

OWN = ("dlearn_high", "entropy", "divergence", "random", "compatibility", "dincompat_high")


def test_gains_of_selections_equal_a_naive_bootstrap():
    rng = np.random.default_rng(0)
    gain, groups = rng.standard_normal(300), np.repeat(np.arange(20), 15)
    masks = [rng.random(300) < 0.2, rng.random(300) < 0.5]
    found = selection_gains(gain, masks, groups, 50, np.random.default_rng(1))
    draws = multiplicities(20, 50, np.random.default_rng(1))
    codes, _ = group_codes(groups)
    for mask, got in zip(masks, found, strict=True):
        naive = []
        for counts in draws:
            weight = counts[codes]
            naive.append((gain * mask * weight).sum() / (mask * weight).sum() - (gain * weight).sum() / weight.sum())
        np.testing.assert_allclose(got.vs_random.draws, naive, atol=1e-12)
        assert got.mean_gain.estimate == pytest.approx(gain[mask].mean()) and got.n_keep == mask.sum()
        assert got.vs_random.estimate == pytest.approx(gain[mask].mean() - gain.mean())


def test_weights_weigh():
    gain, weight = np.array([1.0, 3.0, 9.0]), np.array([2.0, 1.0, 0.0])
    found = selection_gains(gain, [weight], [0, 1, 2], 5, np.random.default_rng(0))[0]
    assert found.mean_gain.estimate == pytest.approx(5 / 3) and found.n_keep == 2 and found.share_of_gain == pytest.approx(4 / 13)


def test_matched_topn_finds_the_planted_rule():
    result = matched_topn(paper_table(), TopNConfig(ratios=(0.05, 0.1), selectors=OWN, bootstrap=100)).set_index(["selector", "ratio"])
    assert result.loc[("dlearn_high", 0.05), "n_keep"] == 48 and result.loc[("dlearn_high", 0.05), "keep_ratio"] == pytest.approx(0.05)
    assert result["mean_gain"].idxmax() == ("dlearn_high", 0.05)
    assert result.loc[("dlearn_high", 0.1), "vs_random_ci_low"] > 0 > result.loc[("dincompat_high", 0.1), "vs_random_ci_low"] - 1
    assert result.loc[("dlearn_high", 0.05), "gain_per_keep_ratio"] == pytest.approx(result.loc[("dlearn_high", 0.05), "mean_gain"] / 0.05)


def test_every_registered_selector_is_tried_and_none_vanishes():
    result = matched_topn(paper_table(groups=10), TopNConfig(ratios=(0.1,), bootstrap=20))
    assert set(result["selector"]) == {s.name for s in list_selectors()}
    ran = result[result["n_keep"].notna()]
    assert len(ran) >= 12 and result[result["n_keep"].isna()]["note"].str.startswith("not run").all()


def test_a_result_does_not_depend_on_row_order():
    table = paper_table()
    first = matched_topn(table, TopNConfig(ratios=(0.05,), selectors=OWN, bootstrap=20))
    second = matched_topn(table.sample(frac=1, random_state=1), TopNConfig(ratios=(0.05,), selectors=OWN, bootstrap=20))
    np.testing.assert_allclose(first["mean_gain"], second["mean_gain"])


def test_masked_positions_and_rows_without_gain_are_never_chosen():
    table = paper_table()
    table["loss_mask"] = (table["tok_pos"] > 2).astype(int)
    usable = np.ones(len(table), bool)
    usable[100:200] = False
    inputs = selector_inputs(table, source="full", usable=usable)
    assert inputs.valid.sum() == ((table["loss_mask"] == 1) & usable).sum()
    assert inputs.response_lengths.tolist() == [24] * 40


def test_full_entropy_is_over_the_logarithm_of_the_vocabulary():
    """tip_q3 ranks by D * (1 - H): with H in nats it would turn around."""
    lists = {"student_top_ids": "[5, 700, 9]", "teacher_top_ids": "[5, 999, 9]"} | dict.fromkeys(("student_top_logps", "teacher_top_logps"), "[-1, -2, -3]")
    plain = paper_table().assign(token_id=7, Hs_full_base=np.linspace(0.1, 6, len(paper_table())))
    for table, vocabulary in ((plain, 8), (plain.assign(**{f"{name}_base": text for name, text in lists.items()}), 1000)):
        inputs = selector_inputs(table, source="full")
        np.testing.assert_allclose(inputs.metrics["Hs_topk_norm"], table["Hs_full_base"].to_numpy()[inputs.rows] / np.log(vocabulary))


def test_inputs_say_what_is_missing():
    with pytest.raises(DataError, match="no column token_id"):
        selector_inputs(paper_table().drop(columns="token_id"))
    with pytest.raises(ConfigError, match="full or online"):
        selector_inputs(paper_table(), source="x")
    with pytest.raises(DataError, match="occurs twice"):
        selector_inputs(paper_table().assign(tok_pos=0))
    with pytest.raises(DataError, match="need the column Hs_full_base"):
        selector_inputs(paper_table().drop(columns="Hs_full_base"), source="full")


def test_recommendation_ranks_and_says_which_rules_are_better():
    result = recommend(paper_table(), RecommendConfig(ratios=(0.1, 0.3), selectors=OWN, bootstrap=200, source="full"))
    table = result.table
    assert table["rank"].tolist() == list(range(1, len(table) + 1)) and table.iloc[0]["selector"] == "dlearn_high"
    assert table["gain_per_kept_token"].is_monotonic_decreasing
    verdicts = table.set_index(["selector", "ratio"])["verdict"]
    assert verdicts["dlearn_high", 0.1] == "better than random" and verdicts["full", 1.0] == "reference"
    assert not any("did not bring" in w for w in result.warnings)
    assert result.overall["best_of_many_held_out"]["vs_random"] > 0


def test_a_rule_that_loses_is_named():
    table = paper_table()
    table["KLf_full"] = 2 * table["KLf_full_base"].mean() - 0.5 * table["KLf_full_base"]  # the larger D, the smaller the gain... reversed below
    table["KLf_full"] = table["KLf_full_base"] - 1 / (1 + table["KLf_full_base"] * table["Cmass_true_base"])
    result = recommend(table, RecommendConfig(ratios=(0.1,), selectors=OWN, bootstrap=200, source="full"))
    losing = next(w for w in result.warnings if "Loses to a random choice" in w)
    assert "dlearn_high at 0.1" in losing
    assert any("dlearn_high (teachability) is not better than random" in w for w in result.warnings)


def test_training_that_did_not_help_is_the_first_warning():
    table = paper_table()
    rng = np.random.default_rng(3)
    table["KLf_full"] = table["KLf_full_base"] + 0.1 + rng.normal(0, 0.1, len(table))
    result = recommend(table, RecommendConfig(ratios=(0.1,), selectors=OWN, bootstrap=100, source="full"))
    assert "did not bring the student measurably closer" in result.warnings[0]
    assert np.isnan(result.table["share_of_gain"]).all()


def test_saturated_compatibility_few_prompts_and_early_budgets_are_warned_of():
    table = paper_table(groups=8)
    table["Cmass_true_base"] = 0.999
    table["Hs_full_base"] = 1.0 - table["pos_norm"]
    warnings = recommend(table, RecommendConfig(ratios=(0.05,), selectors=("entropy", "dlearn_high"), bootstrap=50, source="full")).warnings
    assert any("saturated" in w for w in warnings) and any("Only 8 prompts" in w for w in warnings)
    assert any("the first tenth of responses" in w and "entropy at 0.05" in w for w in warnings)


def test_the_best_of_many_noises_is_not_believed():
    rng = np.random.default_rng(0)
    gain, groups = rng.standard_normal(2000), np.repeat(np.arange(40), 50)
    masks = [rng.random(2000) < 0.05 for _ in range(60)]
    on_all = max(gain[m].mean() for m in masks)
    held_out = honest_choice(gain, masks, groups, np.random.default_rng(1))
    assert on_all > 0.15 and abs(held_out.vs_random) < 0.08
    assert sum(held_out.chosen.values()) == pytest.approx(1)
    assert honest_choice(gain[:100], [m[:100] for m in masks], groups[:100], np.random.default_rng(1)).chosen == {}


def test_files_and_page(tmp_path):
    result = recommend(paper_table(), RecommendConfig(ratios=(0.1, 0.2), selectors=OWN, bootstrap=20, source="full"))
    write_recommendation(result, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"selector_recommendation.{s}" for s in ("csv", "md", "json", "png")}
    assert "vs_random" in as_markdown(result)
    config = TopNConfig(ratios=(0.1,), selectors=OWN, bootstrap=20)
    write_topn(matched_topn(paper_table(), config), config, {"a": "b"}, tmp_path / "topn")
    assert (tmp_path / "topn" / "matched_fixed_context_topn_manifest.json").is_file()


@pytest.mark.parametrize("config", [TopNConfig, RecommendConfig])
def test_bad_ratios(config):
    for ratios in ((), (0.0,), (1.5,)):
        with pytest.raises(ConfigError, match="ratios"):
            config(ratios=ratios)


def test_no_before_training_columns():
    with pytest.raises(DataError, match="--baseline-metrics"):
        recommend(paper_table()[["sample_ordinal", "tok_pos", "token_id", "Hs_full", "KLf_full"]])
