"""The helpers of the paper's figures: core evidence of several diagnostics, the atlas of tokens in context, the MATH-hard table."""

import importlib
import json

import numpy as np
import pandas as pd
import pytest

from ta_opd.errors import DataError
from ta_opd.fixed_context import analyses
from ta_opd.fixed_context.atlas import AtlasConfig, atlas, principal_plane
from ta_opd.fixed_context.bank import load_contexts
from ta_opd.fixed_context.evidence import core_evidence
from ta_opd.fixed_context.features import with_gains
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.tables import read_table, write_table
from tests.fixed_context.diagnostic_cases import paper_table


def tool(name):
    return importlib.import_module(f"tools.{name}").main


@pytest.fixture(scope="module")
def diagnostics(tmp_path_factory):
    """Two finished diagnostics, the second without support analysis."""
    root = tmp_path_factory.mktemp("diagnostics")
    config = analyses.AnalysisConfig(bootstrap=50)
    for seed, name in enumerate(("a", "b")):
        table = with_gains(paper_table(groups=60, seed=seed))
        analyses.run_gain(table, name, config, root / name / "analysis")
        if name == "a":
            analyses.run_support(table, name, config, root / name / "analysis")
    return {name: root / name for name in ("a", "b")}


def test_core_evidence_is_what_the_analyses_wrote(diagnostics, tmp_path, capsys):
    words = [word for name, path in diagnostics.items() for word in ("--diagnostic", f"{name}={path}")]
    assert tool("build_core_evidence_report")([*words, "--output-dir", str(tmp_path)]) == 0
    frame = read_table(tmp_path / "core_evidence.csv").set_index("diagnostic")
    r2 = read_table(diagnostics["b"] / "analysis/gain/regression_summary.csv").set_index("model")["r2"]
    assert frame.loc["b", "added_by_C"] == pytest.approx(r2["H_D_C"] - r2["H_D"]) and frame.loc["b", "added_by_C"] > 0.02
    contrast = read_table(diagnostics["a"] / "analysis/gain/q3_bootstrap_matching_summary.csv").iloc[0]
    assert frame.loc["a", "q3_contrast"] == pytest.approx(contrast["bootstrap_mean_diff"]) and frame.loc["a", "q3_low"] < frame.loc["a", "q3_contrast"]
    assert frame.loc["a", "dlearn_low"] < frame.loc["a", "dlearn_contrast"] < frame.loc["a", "dlearn_high"]
    assert frame.loc["a", "topn_dlearn_high"] > frame.loc["a", "topn_entropy"]  # the gain of these tables grows with D x C
    assert frame.loc["a", "support_min"] <= frame.loc["a", "support_max"] and np.isnan(frame.loc["b", "support_min"])
    page = (tmp_path / "core_evidence_report.md").read_text()
    assert "| quantity | a | b |" in page and page in capsys.readouterr().out
    assert (tmp_path / "core_evidence_q3.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_analyses(tmp_path):
    with pytest.raises(DataError, match="x=.*expected a finished diagnostic"):
        core_evidence({"x": tmp_path})


@pytest.fixture(scope="module")
def scored(bank, models, tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    table, record = score_contexts(load_contexts(bank), models["student"], models["teacher"], ScoringConfig(topk=(8,), dtype="float32"), root / "parts")
    return write_table(root / "theta0.parquet", table.sample(frac=1.0, random_state=3), record)  # rows in any order


def test_the_atlas_shows_the_states_that_predict_each_token(bank, models, scored):
    import torch

    from ta_opd.fixed_context.hf import import_transformers

    contexts = load_contexts(bank)
    config = AtlasConfig(max_tokens=25, dtype="float32", device="cpu", max_tokens_per_batch=40)
    table, shares = atlas(contexts, models["student"], read_table(scored), config)
    assert len(table) == 25 and not table.duplicated(["sample_ordinal", "tok_pos"]).any() and 0 < shares[1] <= shares[0] < 1
    model = import_transformers().AutoModelForCausalLM.from_pretrained(str(models["student"]))
    states = []
    for row in table.itertuples():
        tokens, place = contexts.tokens[row.sample_ordinal], contexts.prompt_len[row.sample_ordinal] + row.tok_pos
        assert tokens[place] == row.token_id
        with torch.no_grad():
            states.append(model.base_model(torch.as_tensor(tokens)[None]).last_hidden_state[0, place - 1].numpy())
    plane, _ = principal_plane(np.array(states))
    np.testing.assert_allclose(table[["x", "y"]], plane, atol=1e-4)
    wide = read_table(scored).set_index(["sample_ordinal", "tok_pos"])["Hs_full"]
    assert table["Hs_full"].tolist() == [wide[row.sample_ordinal, row.tok_pos] for row in table.itertuples()]


def test_atlas_tool_and_a_bank_that_does_not_match(bank, models, scored, tmp_path, capsys):
    words = ["--context-bank", str(bank), "--student", str(models["student"]), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    build = tool("build_contextual_token_embedding_atlas")
    assert build([*words, "--metrics", str(scored), "--max-tokens", "20"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out/contextual_token_atlas.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_table(tmp_path / "out/contextual_token_atlas.parquet")) == 20
    table = read_table(scored)
    other = write_table(tmp_path / "other.parquet", table.assign(token_id=table["token_id"] + 1))
    assert build([*words, "--metrics", str(other)]) == 1 and "metrics are of another bank: 0 positions are absent" in capsys.readouterr().err
    twice = write_table(tmp_path / "twice.parquet", pd.concat([table, table[:2]]))
    assert build([*words, "--metrics", str(twice)]) == 1 and "2 are repeated" in capsys.readouterr().err
    assert build([*words, "--metrics", str(scored), "--max-tokens", "2"]) == 1 and "at least 3 positions" in capsys.readouterr().err


def test_math_hard_table(tmp_path, capsys):
    def results(path, algebra, geometry, overall=None):
        path.parent.mkdir(parents=True)
        tasks = {f"leaderboard_math_{s}_hard": {"exact_match,none": v, "exact_match_stderr,none": 0.01} for s, v in (("algebra", algebra), ("geometry", geometry))}
        groups = {} if overall is None else {"leaderboard_math_hard": {"exact_match,none": overall}}
        path.write_text(json.dumps({"results": tasks, "groups": groups, "model_name": "m"}))

    results(tmp_path / "r/base/leaderboard_math_hard/seed1/x/results_1.json", 0.2, 0.4)
    results(tmp_path / "r/ours/leaderboard_math_hard/seed1/x/results_2.json", 0.5, 0.1, overall=0.33)
    (tmp_path / "r/ours/other").mkdir()
    (tmp_path / "r/ours/other/results_3.json").write_text(json.dumps({"results": {"gsm8k": {"exact_match,none": 1.0}}}))
    assert tool("summarize_math_hard")(["--root", str(tmp_path / "r"), "--output-dir", str(tmp_path / "o")]) == 0
    table = pd.read_csv(tmp_path / "o/math_hard_summary.csv").set_index("model")
    assert list(table.columns) == ["overall", "metric", "algebra", "geometry", "mtime", "json"]
    assert table.loc["base", "overall"] == pytest.approx(0.3) and table.loc["ours", "overall"] == 0.33 and table.loc["ours", "algebra"] == 0.5
    assert "| base | 0.3000 | exact_match,none |" in (tmp_path / "o/math_hard_summary.md").read_text()
    assert tool("summarize_math_hard")(["--root", str(tmp_path / "o"), "--output-dir", str(tmp_path / "o")]) == 1
    assert "expected results_*.json files" in capsys.readouterr().err
