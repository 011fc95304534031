"""scripts/setup.sh where it must refuse: one clear line, a non-zero exit, nothing marked as installed."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup(*words, **env):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh"), *words], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def one_line(done, text):
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("setup: ") and text in lines[0], done.stderr


def test_unknown_argument():
    one_line(setup("tpu"), "unknown argument 'tpu'")


def test_wrong_python(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    one_line(setup("cpu", VENV=str(tmp_path / "venv"), PYTHON=str(old)), "not Python 3.11 or newer (got: Python 3.9.1)")
    assert not (tmp_path / "venv").exists()


def test_no_disk(tmp_path):
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho head\necho /dev/x 10000000 9000000 1000000 90% /\n")
    df.chmod(0o755)
    done = setup("cpu", VENV=str(tmp_path / "venv"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    one_line(done, "5 GB of free disk needed for the cpu set, got 0 GB")


@pytest.mark.slow
def test_a_failed_download_is_not_counted_as_done(tmp_path):
    venv = tmp_path / "venv"
    blocked = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
               "PIP_EXTRA_INDEX_URL": "", "PIP_DEFAULT_TIMEOUT": "1", "PIP_RETRIES": "0"}  # fmt: skip
    done = setup("cpu", VENV=str(venv), **blocked)
    assert done.returncode != 0 and "No matching distribution found for torch" in done.stderr.strip().splitlines()[-1]
    assert not (venv / ".ta_opd_stamp").exists()


def test_a_finished_environment_returns_at_once(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/bin/true")
    files = sorted((ROOT / "requirements").glob("*.txt"))
    text = f"cpu  {ROOT}\n".encode() + b"".join(f.read_bytes() for f in files) + (ROOT / "scripts" / "setup.sh").read_bytes()
    (venv / ".ta_opd_stamp").write_text(hashlib.sha256(text).hexdigest() + "\n")
    begin = time.monotonic()
    done = setup("cpu", VENV=str(venv))
    assert done.returncode == 0 and done.stderr == "" and time.monotonic() - begin < 2


def test_every_requirement_is_pinned():
    for file in (ROOT / "requirements").glob("*.txt"):
        lines = [x.strip() for x in file.read_text().splitlines() if x.strip() and not x.startswith("#")]
        assert lines and all("==" in x for x in lines), file
