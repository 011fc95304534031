"""Whatever a run started is gone after it, also orphans, and nothing else is touched."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from slime.utils import reaper

DRIVER = """
import subprocess, sys, time
sys.path[:0] = {path!r}
from slime.utils.reaper import Reaper
child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); time.sleep(600)"
before = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
reaper = Reaper(grace=0.5)
after = subprocess.Popen([sys.executable, "-c", child])
print(before.pid, after.pid, reaper.process.pid, flush=True)
sys.stdin.readline()
after.kill(), after.wait()  # what it had started is an orphan now
reaper.stop()
print("stopped", flush=True)
sys.stdin.readline()
"""


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_orphans_of_a_run_end_with_it_and_what_was_there_before_stays(end):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(path=sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    before, after, reaper = (psutil.Process(int(word)) for word in driver.stdout.readline().split())
    everything = [before, after, reaper]
    try:
        deadline = time.monotonic() + 20
        while not (grandchild := after.children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        everything += grandchild
        assert len(grandchild) == 1
        time.sleep(2.5)  # two looks of the reaper
        if end == "stop":
            driver.stdin.write("\n"), driver.stdin.flush()
            assert driver.stdout.readline() == "stopped\n"
        else:
            os.kill(driver.pid, signal.SIGKILL)
        psutil.wait_procs([after, *grandchild, reaper], timeout=15)
        assert [p.pid for p in (after, *grandchild, reaper) if alive(p)] == []
        assert alive(before)
    finally:
        driver.kill(), driver.wait()
        for process in everything:
            if alive(process):
                process.kill()


def test_files_of_servers_whose_owners_are_gone_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    space, shared = os.stat("/proc/self/ns/pid").st_ino, tmp_path / "sglang_shared"
    shared.write_text("")
    mine, lives, stranger = (tmp_path / f"sgl-{pid}-{space}-x" for pid in (ended.pid, os.getpid(), ended.pid + 1))
    for folder in (mine, lives, stranger):
        folder.mkdir()
        (folder / "socket").write_text("")
    (mine / "shared_memory").write_text(f"{shared}\n")
    reaper.sweep({ended.pid, os.getpid()}, str(tmp_path))
    assert not mine.exists() and not shared.exists() and lives.exists() and stranger.exists()
