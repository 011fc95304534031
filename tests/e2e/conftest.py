"""Real servers, Ray and Megatron on this machine, with tiny random models; servers are started once for all runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "slime_ta_opd" / "train.py"
RESPONSE = 24
BASE = ["--label-key", "label", "--rollout-shuffle", "--rollout-batch-size", "8", "--n-samples-per-prompt", "2",
        "--rollout-max-response-len", str(RESPONSE), "--opd-topk-metrics-k", "8", "--lr", "1e-3", "--weight-decay", "0",
        "--no-use-tensorboard"]  # fmt: skip


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Prompts, tokenizer, and two random Qwen3 models of different weights."""
    from examples.quickstart import arithmetic
    from tests.helpers.models import write_tiny_qwen3

    root = tmp_path_factory.mktemp("task")
    paths = arithmetic.write_task(root, num_train=64, num_heldout=16, seed=3)
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_qwen3(root / name, paths["tokenizer"], seed)
    return SimpleNamespace(root=root, student=root / "student", teacher=root / "teacher", train=paths["train"], heldout=paths["heldout"])


@pytest.fixture(scope="package")
def servers(task):
    """One student engine, one teacher, and a second copy of the student as a teacher, all running."""
    from slime.backends.sglang_utils.server import SGLangServer
    from slime.backends.sglang_utils.server_flags import server_arguments

    args = SimpleNamespace(device="cpu", rollout_max_context_len=256, rollout_seed=42)
    started = []
    try:
        for role, model in (("student", task.student), ("teacher", task.teacher)):
            log = task.root / f"{role}_{len(started)}.log"
            server = SGLangServer(model, role, log_file=log, extra_args=server_arguments(args, role, str(model)), device="cpu")
            started.append(server.start())
        for server in started:
            server.wait_ready(300)
        yield SimpleNamespace(student=started[0].url, teacher=started[1].url)
    finally:
        for server in started:
            server.stop()


@pytest.fixture(scope="package")
def run(task, servers, tmp_path_factory):
    """run(name, *flags, script=) -> finished run: rows of metrics.jsonl and its directory. Uses the shared servers."""

    def start(name, *flags, teacher=None, check=True, script=TRAIN):
        out = tmp_path_factory.mktemp(name)
        words = [sys.executable, str(script), "--hf-checkpoint", str(task.student), "--prompt-data", str(task.train),
                 "--rm-url", f"{teacher or servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student,
                 "--output-dir", str(out), *BASE, *flags]  # fmt: skip
        done = subprocess.run(words, cwd=TRAIN.parent, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        file = out / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return SimpleNamespace(dir=out, rows=rows, output=done.stdout + done.stderr, code=done.returncode)

    return start
