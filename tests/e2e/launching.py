"""What the end-to-end tests of the launchers share: a clean environment with tiny sizes, and a call that must end well."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.e2e.conftest import ROOT

whole = pytest.mark.skipif(os.environ.get("TA_OPD_WHOLE_SUITE") != "1", reason="takes many minutes; TA_OPD_WHOLE_SUITE=1 runs it")
SMALL = {
    "LABEL_KEY": "label", "APPLY_CHAT_TEMPLATE": "0", "ROLLOUT_BATCH_SIZE": "4", "N_SAMPLES_PER_PROMPT": "2", "GLOBAL_BATCH_SIZE": "8",
    "ROLLOUT_MAX_RESPONSE_LEN": "16", "ROLLOUT_MAX_CONTEXT_LEN": "96", "OPD_TOPK_METRICS_K": "8", "OPD_LOSS_TYPE": "topk_reverse_kl", "LR": "1e-3",
    "RECOMPUTE_GRANULARITY": "", "RECOMPUTE_METHOD": "", "RECOMPUTE_NUM_LAYERS": "", "DEVICE": "cpu", "ACTOR_NUM_GPUS_PER_NODE": "1",
}  # fmt: skip
KEPT = ("PATH", "PYTHONPATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")


def launch_place(task, root):
    """root, out and variables of a launcher: nothing else of this process's environment, all output below root/out."""
    variables = {name: os.environ[name] for name in KEPT if name in os.environ} | {
        "HOME": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STUDENT_HF": str(task.student), "PROMPT_DATA": str(task.train),
        "OUTPUT_ROOT": str(root / "out"), "PY": sys.executable, **SMALL,
    }  # fmt: skip
    return SimpleNamespace(root=root, out=root / "out", variables=variables)


def call(script, variables, seconds):
    """Standard output of a launcher (path in the tree) that must end well."""
    done = subprocess.run(["bash", ROOT / script], env=variables, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lines(path):
    """Records of a JSONL file that may still be written."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
