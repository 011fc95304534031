"""The launchers on the real stack: SGLang servers, Ray and Megatron-core on CPU, with tiny random models."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.launchers.conftest import ROOT

pytestmark = pytest.mark.e2e
SMALL = {
    "LABEL_KEY": "label", "APPLY_CHAT_TEMPLATE": "0", "ROLLOUT_BATCH_SIZE": "4", "N_SAMPLES_PER_PROMPT": "2", "GLOBAL_BATCH_SIZE": "8",
    "ROLLOUT_MAX_RESPONSE_LEN": "16", "ROLLOUT_MAX_CONTEXT_LEN": "96", "OPD_TOPK_METRICS_K": "8", "OPD_LOSS_TYPE": "topk_reverse_kl", "LR": "1e-3",
    "RECOMPUTE_GRANULARITY": "", "RECOMPUTE_METHOD": "", "RECOMPUTE_NUM_LAYERS": "", "DEVICE": "cpu", "ACTOR_NUM_GPUS_PER_NODE": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    from examples.quickstart import arithmetic
    from tests.helpers.models import write_tiny_qwen3

    root = tmp_path_factory.mktemp("launchers")
    paths = arithmetic.write_task(root, num_train=64, num_heldout=16, seed=3)
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_qwen3(root / name, paths["tokenizer"], seed)
    variables = {
        "PATH": os.environ["PATH"], "HOME": str(root), "OMP_NUM_THREADS": "1", "TEACHER_MODEL": str(root / "teacher"),
        "STUDENT_HF": str(root / "student"), "PROMPT_DATA": str(paths["train"]), "OUTPUT_ROOT": str(root / "out"), **SMALL,
    }  # fmt: skip
    return SimpleNamespace(root=root, variables=variables, train=paths["train"], heldout=paths["heldout"])


def wait_for(condition, process, seconds=300):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the suite ended early"
        assert time.time() < deadline
        time.sleep(0.1)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_method_suite_killed_in_the_middle_and_called_again(task):
    """Two methods to the summary; interrupted while the second trains, the next call goes on from its checkpoint."""
    script = ROOT / "slime_ta_opd/run_teachability_opd_method_suite_20260515.sh"
    variables = task.variables | {
        "METHOD_LIST": "pure_opd:1.0:10 teachability:0.10:20", "TAG": "t", "NUM_ROLLOUT": "6", "SAVE_INTERVAL": "1",
        "EVAL_PROMPT_DATA": f"heldout {task.heldout}", "HELDOUT_PROMPT_DATA": str(task.heldout), "CONTEXT_SAMPLES": "8", "CONTEXT_TOKENS": "16",
        "EVAL_BOOTSTRAP": "20",
    }  # fmt: skip
    out = task.root / "out"
    run = out / "student_train_budget_k8_r0p10_dlearn_high_max16_seed1_t"
    with open(task.root / "first.log", "w") as log:
        first = subprocess.Popen(["bash", script], env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        wait_for(lambda: len(lines(run / "metrics.jsonl")) >= 2 and (run / "latest_checkpointed_iteration.txt").exists(), first, 400)
        first.send_signal(signal.SIGINT)
        assert first.wait(120) == 130, (task.root / "first.log").read_text()
    assert not (run / "DONE").exists()
    done_before = len(lines(run / "metrics.jsonl"))
    full = out / "student_train_budget_k8_r1p00_full_max16_seed1_t"
    finished = (full / "DONE").stat().st_mtime_ns
    left = subprocess.run(["pgrep", "-f", str(task.root)], capture_output=True, text=True).stdout.split()
    assert not left, "processes of the suite are left"

    again = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (full / "DONE").stat().st_mtime_ns == finished  # not trained again
    assert "pure_opd 1 seed1: already done" in again.stdout
    rows = [r["rollout_id"] for r in lines(run / "metrics.jsonl")]
    assert rows == sorted(set(rows)) and rows[-1] == 5 and done_before < 6
    assert len(rows) >= 5  # the row of the rollout that was being saved may be lost
    table = pd.read_csv(out / "t/suite_summary.csv")
    assert table["status"].tolist() == ["done", "done"] and table["rollouts"].tolist() == [6, len(rows)]
    assert table["budget_real"][0] == 1.0 and 0.1 <= table["budget_real"][1] < 0.25
    for column in ("reverse_kl_last", "forward_kl_before", "forward_kl_after", "gain", "accuracy_before", "accuracy_after", "seconds"):
        assert table[column].notna().all(), column
    assert table["forward_kl_before"].nunique() == 1  # one bank, one initial student
    for name in ("suite_summary.md", "suite_summary.html", "method_mapping.csv", "plots/gain_by_budget.png"):
        assert (out / "t" / name).stat().st_size > 0


def test_a_diagnostic_driver_runs_to_its_summary(task):
    variables = task.variables | {
        "SOURCE_DATA": str(task.train), "HELDOUT_SAMPLES": "16", "NUM_CONTEXTS": "16", "CONTEXT_TOKENS": "16", "NUM_ROLLOUT": "2", "SAVE_INTERVAL": "2",
        "BOOTSTRAP": "20",
    }  # fmt: skip
    del variables["PROMPT_DATA"]
    done = subprocess.run(["bash", ROOT / "scripts/diagnostics/run_8b_to_1p7b_short.sh"], env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = task.root / "out/analysis/scale_context_robustness_20260517/8b_to_1p7b_short"
    assert (directory / "8b_to_1p7b_short_summary.md").read_text()
    heldout = {r["prompt"] for r in lines(directory / "data/heldout.jsonl")}
    assert len(heldout) == 16 and not heldout & {r["prompt"] for r in lines(directory / "data/train.jsonl")}
    bank = pd.read_parquet(directory / "context_bank.parquet")
    assert len(bank) == 16 and set(bank["prompt"]) <= heldout


def test_a_head_of_its_own_and_a_direct_driver(tmp_path):
    """Ray head by RAY_PORT: the command joins it, its code comes back, and no process of it stays."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "job.py").write_text(
        "import os, ray\nray.init(os.environ['RAY_ADDRESS'], logging_level='ERROR')\n"
        "print('answer', ray.get(ray.remote(lambda: 6 * 7).remote()))\nraise SystemExit(5)\n"
    )
    words = [sys.executable, ROOT / "tools/run_on_ray.py", "--start-head", "--port", str(port), "--num-cpus", "1", "--log-dir", tmp_path,
             "--temp-dir", f"/tmp/ta{port}", "--", sys.executable, tmp_path / "job.py"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "answer 42" in done.stdout
    assert not subprocess.run(["pgrep", "-f", f"/tmp/ta{port}"], capture_output=True, text=True).stdout.split()
    import shutil

    shutil.rmtree(f"/tmp/ta{port}", ignore_errors=True)


def test_a_head_on_a_port_that_is_taken(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        words = [sys.executable, ROOT / "tools/run_on_ray.py", "--start-head", "--port", str(s.getsockname()[1]), "--log-dir", tmp_path, "--", "true"]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a free port, but something listens there already" in done.stderr
