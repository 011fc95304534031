"""Runs one server and sees to its end: `python -I supervise.py PARENT_PID SCRATCH_DIR -- COMMAND...`

The server gets its own session. It is ended, with everything it started, when this process is asked to stop (SIGTERM),
when PARENT_PID is no longer the parent (it died, however it died), when the server's main process ends by itself, or when
one of its workers is gone: the main process would keep its requests waiting for a minute before it ends.
SCRATCH_DIR (the server's TMPDIR) is removed at the end. Standard library only, and no threads, so that the kernel's
parent-death signal can be trusted: it is tied to the parent's thread.
"""

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_SECONDS = 1.0
LOOKS_FOR_A_FILE = 20  # rounds of 0.1 s
_asked_to_stop = False


def _prctl(option, value):
    try:
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # not Linux: the polling below still works


def _die_with(supervisor):
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # killed before the kernel knew
        os._exit(1)


def _stop(signum, frame):
    global _asked_to_stop
    _asked_to_stop = True


def _children(pid):
    """Process ids below `pid`, itself not included (Linux)."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for task in tasks:
            try:
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    below = [int(word) for word in file.read().split()]
            except OSError:
                continue
            found += below
            todo += below
    return found


def _workers(pids):
    """Those among `pids` that are SGLang's schedulers and detokenizers, by their title."""
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if file.read(32).startswith(b"sglang::"):
                    found.add(pid)
        except OSError:
            pass
    return found


def _ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class SharedMemory:
    """SGLang's files in shared memory that processes of this server have mapped; it leaves them behind when it is killed.

    One that appears is looked for in the processes' maps at once and in the next rounds, until it is found there or is taken for
    another server's: a process that maps it may be killed a moment later. Names are written to a file in `scratch`, for whoever
    cleans up should the supervisor be killed.
    """

    def __init__(self, scratch, folder="/dev/shm"):
        self.scratch, self.prefix = scratch, os.path.join(folder, "sglang_")
        self.files, self.others, self.rounds = set(), self._listed(), {}

    def look(self, pids, everything=False):
        """pids: () -> process ids of the server. everything: also where no new file is there."""
        fresh = self._listed() - self.files - self.others
        if not fresh and not everything:
            return
        found = self._mapped(pids()) - self.files
        if found:
            self.files |= found
            with open(os.path.join(self.scratch, "shared_memory"), "a") as note:
                note.write("".join(name + "\n" for name in sorted(found)))
        for name in fresh - found:
            self.rounds[name] = self.rounds.get(name, 0) + 1
            if self.rounds[name] >= LOOKS_FOR_A_FILE:
                self.others.add(name)

    def _listed(self):
        folder, beginning = os.path.split(self.prefix)
        try:
            return {os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(beginning)}
        except OSError:
            return set()

    def _mapped(self, pids):
        found = set()
        for pid in pids:
            try:
                with open(f"/proc/{pid}/maps") as file:
                    found.update(line.split()[5] for line in file if self.prefix in line)
            except OSError:
                pass
        return found


def _remove(files):
    for file in files:
        try:
            os.unlink(file)
        except OSError:
            pass


def _signal(pids, signum):
    for pid in pids:
        try:
            os.kill(pid, signum)
        except OSError:
            pass


def _reap():
    """Collects ended children (orphans of the server are handed to us); returns {pid: exit code}."""
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _end_everything():
    me, deadline = os.getpid(), time.monotonic() + GRACE_SECONDS
    _signal(_children(me), signal.SIGTERM)
    while _children(me) and time.monotonic() < deadline:
        _reap()
        time.sleep(0.05)
    while True:
        left = _children(me)
        if not left:
            return
        _signal(left, signal.SIGKILL)
        _reap()
        time.sleep(0.02)


def main(argv):
    parent, scratch, command = int(argv[0]), argv[1], argv[3:]
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, _stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    tie = functools.partial(_die_with, os.getpid())
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=tie, stdin=subprocess.DEVNULL)
    code, rounds, shared, workers = None, 0, SharedMemory(scratch), set()
    try:
        while code is None and not _asked_to_stop and os.getppid() == parent:
            if rounds % 50 == 0:
                workers |= _workers(_children(os.getpid()))
            shared.look(functools.partial(_children, os.getpid()), everything=rounds % 50 == 0)
            if any(_ended(pid) for pid in workers):
                print("supervisor: a worker of this server died; the server is ended", flush=True)
                code = 1
                break
            rounds += 1
            code = _reap().get(server.pid)
            if code is None:
                time.sleep(0.1)
        shared.look(functools.partial(_children, os.getpid()), everything=True)
    finally:
        _end_everything()
        _remove(shared.files)
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if code is None else (code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
