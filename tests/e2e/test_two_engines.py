"""A run of its own engines behind a router: two real engines, asynchronous training. By hand, with TA_OPD_SLOW=1."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from tests.e2e.conftest import BASE, TRAIN

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: about a minute")]


@pytest.fixture(scope="module")
def routed(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("routed")
    words = [sys.executable, str(TRAIN.with_name("train_async.py")), "--hf-checkpoint", str(task.student), "--teacher-model", str(task.teacher),
             "--prompt-data", str(task.train), "--output-dir", str(out), "--num-rollout", "3", "--rollout-num-gpus", "2", "--use-sglang-router",
             "--sglang-router-policy", "round_robin", "--rollout-max-context-len", "128", "--opd-loss-type", "topk_reverse_kl",
             "--save-debug-rollout-data", str(out / "dumps"), *BASE]  # fmt: skip
    before = {p.pid for p in psutil.process_iter()}
    done = subprocess.run(words, cwd=TRAIN.parent, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    left = [p for p in psutil.process_iter() if p.pid not in before and any(w in " ".join(p.cmdline()) for w in ("sglang", str(out)))]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(rows=rows, dir=out, output=done.stdout, left=left)


def test_both_engines_serve_and_get_the_weights(routed):
    assert [row["rollout/staleness"] for row in routed.rows] == [0, 1, 1]
    assert abs(routed.rows[0]["train/importance_ratio_mean"] - 1) < 1e-4  # both engines have the trainer's weights
    assert "student: replicas agree" in routed.output
    for name in ("student_0", "student_1"):
        log = (routed.dir / "logs" / f"{name}.log").read_text()
        assert log.count("update_weights_from_distributed") >= 1 or log.count("Prefill batch") > 3, log[-2000:]
    assert (routed.dir / "logs" / "router.log").exists()


def test_nothing_of_it_is_left(routed):
    assert not routed.left
