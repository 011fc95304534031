"""A run that is given keys shows them to nobody: not in process lists, logs, saved configuration, metrics or Ray's own files."""

import os
from pathlib import Path

import pytest

from tests.e2e.live import LiveRun

pytestmark = pytest.mark.e2e
API_KEY, WANDB_KEY = "hush-hush-hush-api", "hush-hush-hush-wandb"


def files_with(text: str, *folders: Path) -> list[str]:
    found = []
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        try:
            if text.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


def test_keys_of_a_run_are_nowhere_to_be_seen(task, servers, tmp_path):
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student, "--sglang-api-key", API_KEY]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000", "--save-interval", "1", env={"WANDB_API_KEY": WANDB_KEY})
    try:
        run.wait_rows(2)
        processes = {p.pid: " ".join(p.cmdline()) for p in run.named("")} | {run.process.pid: Path(f"/proc/{run.process.pid}/cmdline").read_text()}
        (session,) = {Path(os.path.realpath(word.split("=", 1)[1].split("/sockets/")[0]))
                      for line in processes.values() for word in line.split() if word.startswith("--raylet_socket_name=")}  # fmt: skip
        assert len(processes) > 5 and list((session / "logs").iterdir())
        for key in (API_KEY, WANDB_KEY):
            assert not [line for line in processes.values() if key in line]
            assert files_with(key, session, tmp_path) == []
        run.process.terminate()
        run.ends(0)
    finally:
        run.stop()
    assert files_with("--num-rollout", tmp_path) == [] and files_with("num_rollout", tmp_path), "the search finds what is there"
    assert files_with(API_KEY, tmp_path) + files_with(WANDB_KEY, tmp_path) == []
