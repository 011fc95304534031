"""Every command line: its flags are frozen, it does its work on real files, and bad input is one line and exit code 1."""

import importlib
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ta_opd.fixed_context.features import with_gains
from ta_opd.fixed_context.tables import read_table, write_table
from tests.fixed_context.diagnostic_cases import golden_table, paper_table, write_prompts

# The released flags, which must go on working.
RELEASED_FLAGS = {
    "export_fixed_context_bank": "--debug-rollout-data --output --max-samples",
    "eval_fixed_context_bank": "--context-bank --student --teacher --output --baseline-metrics --topk --max-samples --max-response-tokens "
    "--student-device --teacher-device --dtype --trust-remote-code --allow-tokenizer-mismatch",
    "eval_fixed_context_from_megatron": "--checkpoint-root --input-dir --iteration --origin-hf-dir --teacher-hf-dir --context-bank --output-dir "
    "--baseline-metrics --slime-dir --student-device --teacher-device --dtype --topk --max-samples --max-response-tokens --parallel-convert "
    "--force-convert --dry-run",
    "analyze_fixed_context_gain": "--input --output-dir --gain-col --h-col --d-col --c-col --group-col --pos-col --ht-col --q-low --q-high "
    "--h-quantile --d-quantile --low-c-quantile --high-c-quantile --bootstrap --seed --use-quadrant",
    "analyze_within_q3_teachability": "--input --output-dir --winsor-low --winsor-high --bootstrap --seed",
    "support_definition_robustness": "--output-dir --dataset --n-boot",
    "matched_fixed_context_topn": "--input-root --out-dir --ratios --bootstrap --seed",
    "build_section3_analysis": "--output-dir --bootstrap --seed",
    "q3_reachability": "--min-q3-size --seed",
    "plot_budget_accuracy": "--input --output-dir --method-col --budget-col --metric-col",
    "recommend_selector": "--input --output-dir --ratios --bootstrap --seed",
    "run_fixed_context": "--diag-dir --student --teacher --save-dir --train-command --force --dry-run",
    "aggregate_budget_ratio_curve": "--root --output-dir",
    "aggregate_tip_baselines": "--root --output-dir",
    "aggregate_ratio005_multiseed": "--root --output-dir",
    "aggregate_within_q3_teachability": "--input --output-dir",
}  # fmt: skip


def tool(name):
    return importlib.import_module(f"tools.{name}")


@pytest.mark.parametrize("name", RELEASED_FLAGS)
def test_flags(name):
    known = {option for action in tool(name).build_parser()._actions for option in action.option_strings}
    assert not set(RELEASED_FLAGS[name].split()) - known


@pytest.fixture
def joined(tmp_path):
    return str(write_table(tmp_path / "joined.parquet", with_gains(paper_table(groups=60))))


@pytest.fixture
def golden(tmp_path):
    return str(write_table(tmp_path / "golden.parquet", golden_table()))


def test_gain_tool_prints_the_golden_values(golden, tmp_path, capsys):
    argv = ["--input", golden, "--output-dir", str(tmp_path / "g"), "--profile", "released", "--bootstrap", "200"]
    assert tool("analyze_fixed_context_gain").main(argv) == 0
    out = capsys.readouterr().out
    assert "0.0280372" in out and "| matching_pairs | 54 |" in out
    assert read_table(tmp_path / "g" / "regression_summary.csv")["r2"].round(6).tolist() == [0.421858, 0.447170, 0.536767]
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    assert config["columns"]["h"] == "Hs_full" and config["options"]["winsor"] is None


def test_analysis_tools_on_a_joined_table(joined, tmp_path, capsys):
    runs = {
        "analyze_within_q3_teachability": ["--input", f"k16:{joined}", "--output-dir", str(tmp_path / "w"), "--bootstrap", "20"],
        "support_definition_robustness": ["--dataset", f"a={joined}", "--dataset", "b=absent.parquet", "--output-dir", str(tmp_path / "s"), "--n-boot", "20"],
        "matched_fixed_context_topn": ["--input", f"a={joined}", "--out-dir", str(tmp_path / "t"), "--bootstrap", "20", "--selectors", "entropy,dlearn_high"],
        "q3_reachability": ["--input", joined, "--output-dir", str(tmp_path / "r"), "--min-q3-size", "50"],
        "recommend_selector": ["--input", joined, "--output-dir", str(tmp_path / "rec"), "--bootstrap", "20", "--selectors", "entropy,dlearn_high", "--source", "full"],
    }  # fmt: skip
    for name, argv in runs.items():
        assert tool(name).main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "missing: b (absent.parquet)" in out and "vs_random" in out
    assert len(list(tmp_path.glob("*/*.csv"))) >= 7
    argv = ["--input", f"x={tmp_path / 'w'}", "--input", f"y={tmp_path / 'w'}", "--output-dir", str(tmp_path / "all")]
    assert tool("aggregate_within_q3_teachability").main(argv) == 0
    assert len(read_table(tmp_path / "all" / "within_q3_all.csv")) == 6


def test_topn_reads_the_folders_of_each_k(tmp_path):
    for k in (8, 16):
        write_table(tmp_path / "in" / f"k{k}" / "fixed_context_metrics.parquet", golden_table())
    argv = ["--input-root", str(tmp_path / "in"), "--out-dir", str(tmp_path / "out"), "--profile", "released", "--ratios", "0.05", "--bootstrap", "10"]
    assert tool("matched_fixed_context_topn").main(argv) == 0
    assert read_table(tmp_path / "out" / "matched_fixed_context_topn.csv")["dataset"].unique().tolist() == ["k16", "k8"]


def test_sweep_tools(tmp_path, capsys):
    for seed in (1, 2, 3):
        for mask, gap in (("dlearn_high", 0.04), ("entropy", 0.02)):
            folder = tmp_path / f"s{seed}" / f"{mask}_ratio0p05" / "gain"
            write_table(folder / "q3_bootstrap_matching_summary.csv", pd.DataFrame([{"bootstrap_mean_diff": gap + seed / 1000, "mean_gain": gap}]))
    roots = [word for seed in (1, 2, 3) for word in ("--root", f"seed{seed}={tmp_path / f's{seed}'}")]
    for name in ("aggregate_budget_ratio_curve", "aggregate_tip_baselines", "aggregate_ratio005_multiseed"):
        assert tool(name).main([*roots, "--output-dir", str(tmp_path / name)]) == 0, capsys.readouterr().err
    paired = read_table(tmp_path / "aggregate_ratio005_multiseed" / "multiseed_paired.csv").iloc[0]
    assert paired["difference"] == pytest.approx(0.02) and paired["clusters"] == 3
    summary = read_table(tmp_path / "aggregate_ratio005_multiseed" / "multiseed_summary.csv").set_index("mask")
    assert summary.loc["entropy", "mean"] == pytest.approx(0.022)
    frame = pd.DataFrame({"method": ["a", "a"], "budget_ratio": [0.1, 0.3], "score": [1.0, 2.0]})
    argv = ["--input", str(write_table(tmp_path / "runs.csv", frame)), "--output-dir", str(tmp_path / "p")]
    assert tool("plot_budget_accuracy").main(argv) == 0 and (tmp_path / "p" / "budget_accuracy.png").is_file()


def test_export_score_and_pipeline(models, tmp_path, capsys):
    prompts = str(write_prompts(tmp_path / "p.jsonl", 14))
    bank, before, after = (str(tmp_path / name) for name in ("bank.parquet", "before.parquet", "after.parquet"))
    student, teacher, trained = (str(models[n]) for n in ("student", "teacher", "trained"))
    argv = ["--model", student, "--prompt-data", prompts, "--max-samples", "8", "--max-response-tokens", "10", "--output", bank]
    assert tool("export_fixed_context_bank").main(argv) == 0, capsys.readouterr().err
    score = ["--context-bank", bank, "--teacher", teacher, "--topk", "16,8", "--max-response-tokens", "9"]
    assert tool("eval_fixed_context_bank").main([*score, "--student", student, "--output", before]) == 0
    assert tool("eval_fixed_context_bank").main([*score, "--student", trained, "--output", after, "--baseline-metrics", before]) == 0
    assert {"G_KLf", "G_KLf_abs", "Cmass_true_k8_base"} <= set(read_table(after))
    argv = ["--diag-dir", str(tmp_path / "d"), "--student", student, "--teacher", teacher, "--after-hf", f"x={trained}", "--bank-source", "heldout",
            "--prompt-data", prompts, "--num-contexts", "8", "--sample-response-tokens", "8", "--bootstrap", "10"]  # fmt: skip
    assert tool("run_fixed_context").main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.split()[-7:] == ["export", "score_before", "score_after", "analyse", "robustness", "recommend", "summary"]
    assert tool("run_fixed_context").main(argv) == 0 and (tmp_path / "d" / "diag300_summary.md").is_file()
    section = ["--dataset", f"tiny={tmp_path / 'd'}", "--output-dir", str(tmp_path / "s3"), "--bootstrap", "10"]
    assert tool("build_section3_analysis").main(section) == 0


def test_export_from_dumps(tmp_path):
    row = {"rollout_id": 0, "sample_index": 0, "tokens": [3, 4, 5], "response_length": 2, "prompt": "p", "status": "completed"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rollout_000000.parquet")
    argv = ["--debug-rollout-data", str(tmp_path), "--output", str(tmp_path / "bank.csv"), "--max-samples", "5"]
    assert tool("export_fixed_context_bank").main(argv) == 0
    assert np.array_equal(json.loads(read_table(tmp_path / "bank.csv")["tokens"][0]), [3, 4, 5])


def test_conversion_command(tmp_path, capsys):
    argv = ["--checkpoint-root", "RUN", "--origin-hf-dir", "S", "--teacher-hf-dir", "T", "--context-bank", "B", "--output-dir", str(tmp_path), "--dry-run"]
    assert tool("eval_fixed_context_from_megatron").main(argv) == 0
    words = capsys.readouterr().out.split()
    assert words[1].endswith("tools/convert_megatron_checkpoint_to_hf.py")
    assert words[2:] == ["--checkpoint-root", "RUN", "--iteration", "latest", "--origin-hf-dir", "S", "--output-dir", f"{tmp_path}/student_hf", "--force"]


@pytest.mark.parametrize(
    "name, argv, message",
    [
        ("analyze_fixed_context_gain", ["--input", "absent.parquet", "--output-dir", "x"], "no such file"),
        ("analyze_within_q3_teachability", ["--input", "k16", "--output-dir", "x"], "expected NAME:PATH"),
        ("support_definition_robustness", ["--dataset", "a=absent", "--output-dir", "x"], "none of the datasets exists"),
        ("matched_fixed_context_topn", ["--input-root", "absent", "--out-dir", "x"], "no k*/fixed_context_metrics.parquet"),
        ("export_fixed_context_bank", ["--output", "x.parquet"], "expected --debug-rollout-data"),
        ("export_fixed_context_bank", ["--output", "x.parquet", "--model", "m"], "needs --prompt-data"),
        ("eval_fixed_context_bank", ["--context-bank", "absent.csv", "--student", "s", "--teacher", "t", "--output", "o.csv"], "no such file"),
        ("eval_fixed_context_bank", ["--context-bank", "b", "--student", "s", "--teacher", "t", "--output", "o", "--topk", "a"], "expected numbers"),
        ("build_section3_analysis", ["--dataset", "x", "--output-dir", "o"], "NAME=DIR"),
        ("aggregate_tip_baselines", ["--root", "a=absent", "--output-dir", "o"], "no such folder"),
        ("run_fixed_context", ["--diag-dir", "d", "--student", "s", "--teacher", "t"], "needs rollout_dumps"),
    ],
)
def test_bad_input_is_one_line(name, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool(name).main(argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"{name}: ") and error.count("\n") == 1


def test_importing_the_package_imports_no_engine():
    import pkgutil
    import subprocess
    import sys

    import ta_opd.fixed_context as package

    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    engines = ("torch", "transformers", "sglang", "ray", "megatron", "slime", "statsmodels", "matplotlib", "aiohttp")
    code = f"import sys; [__import__(n) for n in {names!r}]; print([e for e in {engines!r} if e in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
