"""The launchers on the real stack: the method suite and the drivers of the diagnostic, with tiny random models on CPU.

Two methods, killed once and called again, are run everywhere. The whole suite of the README, every driver, and the harness take long and
are run with TA_OPD_WHOLE_SUITE=1 (the harness also needs the packages of requirements/eval.txt).
"""

import json
import signal
import subprocess
import time

import pandas as pd
import psutil
import pytest

from tests.e2e.conftest import ROOT
from tests.e2e.launching import call, launch_place, lines, whole

pytestmark = pytest.mark.e2e
SUITE = "slime_ta_opd/run_teachability_opd_method_suite_20260515.sh"
METHODS = "pure_opd:1.0:10 teachability:0.10:20 entropy:0.10:30 teachability_entropy:0.10:40 tip:0.10:50"
DRIVERS = {  # script: (name of its diagnostic, its summary)
    "run_4b_to_1p7b_heldout_fixed_context_300": ("heldout_4b_to_1p7b_300", "heldout300_summary.md"),
    "run_8b_to_4b_fixed_context_300": ("8b_to_4b_diag300", "diag300_summary.md"),
    "run_14b_to_4b_fixed_context_300": ("14b_to_4b_diag300", "diag300_summary.md"),
    "run_8b_to_1p7b_fixed_context_300": ("8b_to_1p7b_diag300", "diag300_summary.md"),
    "run_4b_to_1p7b_gsm8k_fixed_context_300": ("gsm8k_4b_to_1p7b_300", "gsm8k300_summary.md"),
    "run_8b_to_1p7b_short": ("8b_to_1p7b_short", "8b_to_1p7b_short_summary.md"),
    "run_14b_to_1p7b_fixed_context_300": ("14b_to_1p7b_diag300", "diag300_summary.md"),
}
RETOPK = "run_14b_to_1p7b_retopk_8_32"


@pytest.fixture
def place(task, tmp_path):
    return launch_place(task, tmp_path)


def directory_of(place, mask, tag, budget="r0p10"):
    return place.out / f"student_train_budget_k8_{budget}_{mask}_max16_seed1_{tag}"


def kill_in_the_middle(variables, log, run_dir, number, seconds):
    """Starts the suite, sends `number` to it once `run_dir` has a checkpoint, and waits until everything that it started is gone.

    Returns rollouts in metrics.jsonl of that run."""
    with open(log, "w") as output:
        suite = subprocess.Popen(["bash", ROOT / SUITE], env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    mine = psutil.Process(suite.pid)
    deadline = time.monotonic() + seconds
    while not (run_dir / "latest_checkpointed_iteration.txt").exists():
        assert suite.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    started = mine.children(recursive=True)
    assert any("train.py" in " ".join(p.cmdline()) for p in started if p.is_running())
    suite.send_signal(number)
    assert suite.wait(120) == (130 if number == signal.SIGINT else -number), log.read_text()[-3000:]
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not (run_dir / "DONE").exists()
    return len(lines(run_dir / "metrics.jsonl"))


def check_rollouts(run_dir, total, before):
    """Every rollout of a continued run is there once, and it did not begin anew."""
    rows = [r["rollout_id"] for r in lines(run_dir / "metrics.jsonl")]
    assert rows == list(range(total)) and 0 < before < total
    assert json.loads((run_dir / "DONE").read_text())["start_rollout_id"] >= 1
    assert json.loads((run_dir / "DONE").read_text())["start_rollout_id"] >= 1


def test_two_methods_killed_in_the_middle_and_called_again(place, servers):
    """Servers that are running anyway, training and banks only: what is checked is the memory of the suite on the real train.py."""
    variables = place.variables | {
        "METHOD_LIST": "pure_opd:1.0:10 teachability:0.10:20", "TAG": "t", "NUM_ROLLOUT": "20", "SAVE_INTERVAL": "2", "SKIP_EVAL": "1",
        "TEACHER_URL": f"{servers.teacher}/generate", "STUDENT_URL": servers.student,
    }  # fmt: skip
    full, selected = directory_of(place, "full", "t", "r1p00"), directory_of(place, "dlearn_high", "t")
    before = kill_in_the_middle(variables, place.root / "first.log", selected, signal.SIGKILL, 200)
    finished = (full / "DONE").stat().st_mtime_ns
    output = call(SUITE, variables, 200)
    assert (full / "DONE").stat().st_mtime_ns == finished and "pure_opd 1 seed1: already done" in output
    check_rollouts(selected, 20, before)
    table = pd.read_csv(place.out / "t/suite_summary.csv")
    assert table["status"].tolist() == ["done", "done"] and table["rollouts"].tolist() == [20, 20]
    assert table["budget_real"][0] == 1.0 and 0.1 <= table["budget_real"][1] < 0.25
    assert table["reverse_kl_last"].notna().all() and table["train_seconds"].notna().all()
    assert (place.out / "t/suite_summary.html").stat().st_size > 0
    assert len(pd.read_parquet(selected / "token_bank/merged.parquet")) == table["valid_tokens"][1]


@whole
def test_the_readmes_method_suite(place, task):
    """The README's command from training to summary, servers started by every run; stopped twice on the way, by Ctrl-C and by SIGKILL."""
    variables = place.variables | {
        "METHOD_LIST": METHODS, "TAG": "t", "NUM_ROLLOUT": "20", "SAVE_INTERVAL": "2", "TEACHER_MODEL": str(task.teacher),
        "EVAL_PROMPT_DATA": f"heldout {task.heldout}", "HELDOUT_PROMPT_DATA": str(task.heldout), "CONTEXT_SAMPLES": "12", "CONTEXT_TOKENS": "16",
        "EVAL_BOOTSTRAP": "100",
    }  # fmt: skip
    full, second = directory_of(place, "full", "t", "r1p00"), directory_of(place, "dlearn_high", "t")
    fourth = directory_of(place, "ca_softor", "t")
    before_second = kill_in_the_middle(variables, place.root / "first.log", second, signal.SIGINT, 400)
    finished = (full / "DONE").stat().st_mtime_ns
    before_fourth = kill_in_the_middle(variables, place.root / "second.log", fourth, signal.SIGKILL, 600)
    check_rollouts(second, 20, before_second)
    output = call(SUITE, variables, 900)
    check_rollouts(fourth, 20, before_fourth)
    assert (full / "DONE").stat().st_mtime_ns == finished
    assert [f"{name}: already done" in output for name in ("pure_opd 1 seed1", "teachability 0.1 seed1", "entropy 0.1 seed1")] == [True] * 3
    table = pd.read_csv(place.out / "t/suite_summary.csv")
    assert table["method"].tolist() == ["pure_opd", "teachability", "entropy", "teachability_entropy", "tip"]
    assert set(table["status"]) == {"done"} and set(table["rollouts"]) == {20}
    assert table["budget_real"][0] == 1.0 and table["budget_real"][1:].between(0.1, 0.25).all()
    for column in ("reverse_kl_last", "forward_kl_before", "forward_kl_after", "gain", "q3_gap", "accuracy_before", "accuracy_after", "seconds"):
        assert table[column].notna().all(), column
    assert table["forward_kl_before"].nunique() == 1 and table["forward_kl_after"].nunique() == 5  # one bank, five trained students
    for name in ("suite_summary.md", "suite_summary.html", "method_mapping.csv", "plots/gain_by_budget.png"):
        assert (place.out / "t" / name).stat().st_size > 0
    assert call(SUITE, variables, 100).count("already done") == 6  # five rows and the baseline


@whole
@pytest.mark.parametrize("script", DRIVERS)
def test_a_diagnostic_driver_runs_to_its_summary(script, place, task):
    """By its name, then by its dated name, which finds everything done."""
    name, summary = DRIVERS[script]
    directory = place.out / "analysis/scale_context_robustness_20260517" / name
    log = place.root / "samples_gsm8k.jsonl"  # as the harness writes one
    log.write_text("".join(
        json.dumps({"doc_id": i, "arguments": {"gen_args_0": {"arg_0": row["prompt"], "arg_1": {}}}, "target": row["label"]}) + "\n"
        for i, row in enumerate(lines(task.train))
    ))  # fmt: skip
    source = {"GSM8K_SOURCE_JSONL": str(log)} if "gsm8k" in script else {"SOURCE_DATA": str(task.train)}
    variables = {k: v for k, v in place.variables.items() if k != "PROMPT_DATA"} | source | {
        "TEACHER_MODEL": str(task.teacher), "HELDOUT_SAMPLES": "16", "NUM_CONTEXTS": "16", "CONTEXT_TOKENS": "16", "NUM_ROLLOUT": "2",
        "SAVE_INTERVAL": "2", "BOOTSTRAP": "100", "SCORE_TOPK": "8",
    }  # fmt: skip
    call(f"scripts/diagnostics/{script}.sh", variables, 400)
    assert "Q3" in (directory / summary).read_text() and (directory / "report.html").stat().st_size > 10_000
    heldout = {r["prompt"] for r in lines(directory / "data/heldout.jsonl")}
    assert len(heldout) == 16 and not heldout & {r["prompt"] for r in lines(directory / "data/train.jsonl")}
    bank = pd.read_parquet(directory / "context_bank.parquet")
    assert len(bank) == 16 and set(bank["prompt"]) <= heldout
    again = call(f"slime_ta_opd/{script}_20260517.sh", variables, 100)
    steps = ("train", "export", "score_before", "convert", "score_after", "analyse", "robustness", "recommend", "summary", "report")
    assert [line.partition(" (")[0] for line in again.splitlines() if ": kept" in line] == [f"{step}: kept" for step in steps], again
    if name == "14b_to_1p7b_diag300":
        _score_again(place, task, directory)


def _score_again(place, task, directory):
    """The second scoring of a finished diagnostic with other K, by its dated name."""
    variables = {"PATH": place.variables["PATH"], "OUTPUT_ROOT": str(place.out), "TEACHER_MODEL": str(task.teacher), "STUDENT_HF": str(task.student),
                 "CONTEXT_TOKENS": "16", "BOOTSTRAP": "100", "STUDENT_DEVICE": "cpu", "TEACHER_DEVICE": "cpu"}  # fmt: skip
    call(f"slime_ta_opd/{RETOPK}_20260517.sh", variables, 300)
    first = pd.read_parquet(directory / "eval_latest/fixed_context_metrics.parquet")
    for k in (8, 32):
        folder = directory.with_name(f"{directory.name}_k{k}")
        assert len(pd.read_parquet(folder / "eval_latest/fixed_context_metrics.parquet")) == len(first)
        assert (folder / "analysis/gain/regression_summary.csv").exists()
