"""Whatever ends a run, every process that it started is gone, and no other."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e.conftest import BASE, TRAIN

pytestmark = pytest.mark.e2e


def test_interrupt_stops_every_process_of_the_run_and_no_other(task, servers, tmp_path):
    words = [sys.executable, str(TRAIN), "--hf-checkpoint", str(task.student), "--teacher-model", str(task.teacher), "--prompt-data",
             str(task.train), "--output-dir", str(tmp_path), "--num-rollout", "1000", *BASE]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(words, cwd=TRAIN.parent, stdout=output, stderr=output, env=env, preexec_fn=_take_interrupts)
    mine = psutil.Process(run.pid)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "metrics.jsonl").exists():
            assert run.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        started = mine.children(recursive=True)
        assert any("sglang" in " ".join(p.cmdline()) for p in started if p.is_running())
        run.send_signal(signal.SIGINT)
        assert run.wait(90) == 130
    finally:
        if run.poll() is None:
            run.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    from slime.backends.sglang_utils.client import SGLangClient

    client = SGLangClient([servers.student, servers.teacher], name="others")
    assert len(client.run(client.model_info())) == 2  # servers of somebody else still answer
    client.close()
    assert not (tmp_path / "DONE").exists()


def _take_interrupts():
    """Where the tests themselves run in the background of a script, Ctrl-C is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
