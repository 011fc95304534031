"""Sees to the end of every process that a run started, however the run ended: `python -I reaper.py DRIVER_PID SECONDS NOT_MINE...`

Servers end with their supervisors and Ray's processes with the driver, but Ray's helpers may outlive a driver that was killed
by minutes, and a run stopped while Ray starts leaves them behind. This process notes the driver's descendants once a second.
When its standard input closes (the run ended, or the driver died in whatever way) it gives them SECONDS to go by themselves
(half a second after an orderly end, which says so), then kills those that are left, each known by process id and start time, and
removes the files of servers that were killed in this way. NOT_MINE: children that the driver had before.
Standard library only, and no import of the project.
"""

import glob
import os
import select
import shutil
import signal
import subprocess
import sys
import time

LOOK_SECONDS = 1.0
GRACE_SECONDS, ORDERLY_SECONDS = 8.0, 0.5


def processes() -> dict[int, tuple[int, str, str]]:
    """{process id: (parent, start time, state)} of this machine."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(name)] = (int(fields[1]), fields[19], fields[0])
    return found


def below(roots: set[int], table: dict[int, tuple[int, str, str]], leave: set[int]) -> set[int]:
    """Descendants of `roots`, without `leave` and what is below it."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(pid)
    found, todo = set(), list(roots)
    while todo:
        for pid in children.get(todo.pop(), []):
            if pid not in leave and pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


def sweep(pids: set[int], root: str = "/tmp") -> None:
    """Removes the files of servers that processes `pids` started (see sglang_utils/server.py), where these are gone and nobody else did:
    what a server has in shared memory, by its supervisor's list, and the folder with its sockets."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    for pid in pids:
        if os.path.exists(f"/proc/{pid}"):
            continue
        for folder in glob.glob(os.path.join(root, f"sgl-{pid}-{space}-*")):
            try:
                with open(os.path.join(folder, "shared_memory")) as file:
                    for name in file.read().split():
                        os.unlink(name)
            except OSError:
                pass
            shutil.rmtree(folder, ignore_errors=True)


class Reaper:
    """The driver's end: started with a run, `stop` at its end. grace: seconds that processes get to end by themselves."""

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self.grace = grace
        mine = below({os.getpid()}, processes(), set()) if os.path.isdir("/proc/self") else set()
        words = [sys.executable, "-I", __file__, str(os.getpid()), str(grace), *map(str, sorted(mine))]
        # a session of its own: Ctrl-C in a terminal must not reach it
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    def stop(self) -> None:
        """For an orderly end: everything was stopped. Returns when every process of the run is gone, killing what is left."""
        try:
            self.process.stdin.write(b"ended")
            self.process.stdin.close()
        except OSError:
            pass  # the reaper itself was killed
        try:
            self.process.wait(self.grace + 7)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(argv: list[str]) -> int:
    driver, grace, leave = int(argv[0]), float(argv[1]), {os.getpid(), *map(int, argv[2:])}
    seen: dict[int, str] = {}

    def left() -> set[int]:
        """Remembered processes that are still there, with what they have started since."""
        table = processes()
        there = {pid for pid, start in seen.items() if pid in table and table[pid][1] == start}
        for pid in below({*there, driver}, table, leave):
            seen[pid] = table[pid][1]
            there.add(pid)
        return {pid for pid in there if table[pid][2] not in "ZX"}

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # it ends with the run, not before
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        left()
    deadline = time.monotonic() + (ORDERLY_SECONDS if sys.stdin.read() else grace)
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in range(50):
        rest = left()
        if not rest:
            sweep(set(seen))
            return 0
        for pid in rest:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.1)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if os.path.isdir("/proc/self") else sys.stdin.read() and 0)
