import numpy as np
import pandas as pd
import pytest

from ta_opd.errors import DataError
from ta_opd.fixed_context.support import (
    SupportConfig,
    definitions_of,
    parse_lists,
    support_robustness,
    with_set_columns,
    write_support,
)
from tests.fixed_context.diagnostic_cases import paper_table


def with_lists(table):
    n = len(table)
    table = table.copy()
    table["student_top_ids_base"] = ["[3, 1, 2]"] * n
    table["student_top_logps_base"] = [f"[{np.log(0.5)}, {np.log(0.3)}, {np.log(0.1)}]"] * n
    table["teacher_top_ids_base"] = ["[1, 9, 3]"] * n
    table["teacher_top_logps_base"] = [f"[{np.log(0.6)}, {np.log(0.2)}, {np.log(0.1)}]"] * n
    table["student_top1_id_base"], table["teacher_top1_id_base"] = 3, 1
    return table


def test_set_quantities_from_raw_lists():
    row = with_set_columns(with_lists(paper_table()), "_base").iloc[0]
    assert row["topk_jaccard_base"] == 2 / 4 and row["topk_overlap_frac_base"] == pytest.approx(2 / 3)
    assert row["shared_teacher_topk_mass_base"] == pytest.approx(0.7) and row["shared_student_topk_mass_base"] == pytest.approx(0.8)


def test_top1_match_compares_the_two_best_tokens():
    """The sets {3, 1, 2} and {1, 9, 3} share members in another order: the best tokens differ."""
    table = with_lists(paper_table())
    assert (with_set_columns(table, "_base")["top1_match_base"] == 0).all()
    table["teacher_top1_id_base"] = 3
    assert (with_set_columns(table, "_base")["top1_match_base"] == 1).all()


def test_every_definition_and_every_k():
    table = with_lists(paper_table())
    for K in (32, 8):
        table[f"Cmass_true_k{K}_base"] = table["Cmass_true_base"] ** (8 / K)
    result = support_robustness({"a": table, "b": table}, SupportConfig(bootstrap=50))
    names = result[result["dataset"] == "a"]["support"].tolist()
    assert names == ["Cmass_true", "Coverlap", "CBC", "reach_t1", "target_in_student_topk", "topk_jaccard", "topk_overlap_frac",
                     "shared_teacher_topk_mass", "shared_student_topk_mass", "top1_match", "Cmass_true_k8", "Cmass_true_k32"]  # fmt: skip
    rows = result[result["dataset"] == "a"].set_index("support")
    assert rows.loc["Cmass_true", "beta_gap_ci_low"] > 0
    # K only stretches C monotonically here, and everything is a rank.
    assert rows.loc["Cmass_true_k8", "r2_decomp"] == pytest.approx(rows.loc["Cmass_true_k32", "r2_decomp"])


def test_too_few_values_are_skipped_and_said():
    table = paper_table()
    table.loc[5:, "CBC_base"] = np.nan
    row = support_robustness({"a": table}, SupportConfig(bootstrap=20)).set_index("support").loc["CBC"]
    assert row["n"] == 5 and "skipped" in row["note"] and np.isnan(row["r2_HD"])


def test_a_constant_definition_is_said_to_mean_nothing():
    result = support_robustness({"a": paper_table()}, SupportConfig(bootstrap=20)).set_index("support")
    assert "betas mean nothing" in result.loc["target_in_student_topk", "note"] and result.loc["CBC", "note"] == ""


def test_no_definition_at_all():
    table = paper_table().drop(columns=[c for c in paper_table() if c.startswith(("Cmass", "Coverlap", "CBC", "reach", "target_in"))])
    with pytest.raises(DataError, match="support: expected one of Cmass_true_base"):
        support_robustness({"a": table})


def test_lists_that_are_none():
    assert np.isnan(parse_lists(with_lists(paper_table())["student_top_ids_base"].head(1).map(lambda x: ""), "x")).all()
    with pytest.raises(DataError, match="row 0: expected a JSON list"):
        parse_lists(with_lists(paper_table())["student_top_ids_base"].head(1).map(lambda x: "[1, 2"), "x")


def test_lists_of_every_form():
    cells = pd.Series(["[1, 2]", np.array([3.0]), [4, 5, 6], "", None, "[]", float("nan")])
    expected = [[1, 2, np.nan], [3, np.nan, np.nan], [4, 5, 6], *[[np.nan] * 3] * 4]
    np.testing.assert_array_equal(parse_lists(cells, "x"), expected)
    with pytest.raises(DataError, match="row 0"):
        parse_lists(pd.Series(["[1", "2]"]), "x")  # joined they would be one good list


def test_definitions_know_their_suffix():
    assert definitions_of(paper_table()) == ["Cmass_true", "reach_t1"]


def test_written_files(tmp_path):
    config = SupportConfig(bootstrap=20)
    write_support(support_robustness({"a": paper_table()}, config), config, {"gone": "x.parquet"}, tmp_path)
    assert "gone" in (tmp_path / "missing_datasets.csv").read_text() and "Cmass_true" in (tmp_path / "support_definition_robustness.md").read_text()
