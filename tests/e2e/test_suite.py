"""The launchers on the real stack: the method suite and the drivers of the diagnostic, with tiny random models on CPU.

Two methods, killed once and called again, are run everywhere. The whole suite of the README, every driver, and the harness take long and
are run with TA_OPD_WHOLE_SUITE=1 (the harness also needs the packages of requirements/eval.txt).
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest

from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.e2e
whole = pytest.mark.skipif(os.environ.get("TA_OPD_WHOLE_SUITE") != "1", reason="takes many minutes; TA_OPD_WHOLE_SUITE=1 runs it")
SUITE = ROOT / "slime_ta_opd/run_teachability_opd_method_suite_20260515.sh"
METHODS = "pure_opd:1.0:10 teachability:0.10:20 entropy:0.10:30 teachability_entropy:0.10:40 tip:0.10:50"
SMALL = {
    "LABEL_KEY": "label", "APPLY_CHAT_TEMPLATE": "0", "ROLLOUT_BATCH_SIZE": "4", "N_SAMPLES_PER_PROMPT": "2", "GLOBAL_BATCH_SIZE": "8",
    "ROLLOUT_MAX_RESPONSE_LEN": "16", "ROLLOUT_MAX_CONTEXT_LEN": "96", "OPD_TOPK_METRICS_K": "8", "OPD_LOSS_TYPE": "topk_reverse_kl", "LR": "1e-3",
    "RECOMPUTE_GRANULARITY": "", "RECOMPUTE_METHOD": "", "RECOMPUTE_NUM_LAYERS": "", "DEVICE": "cpu", "ACTOR_NUM_GPUS_PER_NODE": "1",
}  # fmt: skip


@pytest.fixture
def place(task, tmp_path):
    """Variables of a launcher in a clean environment, all output below tmp_path/out."""
    clean = {name: os.environ[name] for name in ("PATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO") if name in os.environ}
    variables = clean | {
        "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STUDENT_HF": str(task.student), "PROMPT_DATA": str(task.train),
        "OUTPUT_ROOT": str(tmp_path / "out"), "PY": sys.executable, **SMALL,
    }  # fmt: skip
    return SimpleNamespace(root=tmp_path, out=tmp_path / "out", variables=variables)


def lines(path):
    """Records of a file that may still be written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def directory_of(place, mask, tag, budget="r0p10"):
    return place.out / f"student_train_budget_k8_{budget}_{mask}_max16_seed1_{tag}"


def call(script, variables, seconds):
    """(output, finished process) of a launcher that must end well."""
    done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def kill_in_the_middle(variables, log, run_dir, number, seconds):
    """Starts the suite, sends `number` to it once `run_dir` has a checkpoint, and waits until everything that it started is gone.

    Returns rollouts in metrics.jsonl of that run."""
    with open(log, "w") as output:
        suite = subprocess.Popen(["bash", SUITE], env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
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
