"""Starts a SGLang server with its API key taken from the environment, so that no process list or log shows it.

Every process that the server spawns imports this file first, and from then on ends with the one that spawned it: SGLang
asks the kernel for that too, but only after seconds of imports, and a parent killed in that time left them behind.
Full garbage collections are rare in all of them, and top-K lists stay arrays (server_topk.py).
"""

import gc
import os
import signal
import sys
import threading
import time

from slime.backends.sglang_utils.rendezvous import listen_where_told
from slime.backends.sglang_utils.secret import API_KEY_VARIABLE, Secret
from slime.backends.sglang_utils.server_topk import install as install_topk

_PARENT_VARIABLE = "SLIME_SERVER_PARENT"  # process id that children of this process find there
_LOOK_SECONDS = 0.5
# A batch in flight is millions of small lists (tokens x K log-probs), all alive: a full collection finds nothing among them and stops the
# server for 0.2 to 0.8 s, three times in 18 s of sampling on an H200. Young objects are collected as usual, all of them once in 250 million.
_COLLECT = (50_000, 5, 1_000)


def end_with(parent: int) -> None:
    """Has this process end by SIGKILL once `parent` is no longer its parent."""

    def watch():
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__mp_main__":  # spawned by the server; the supervisor sees to the server itself
    end_with(int(os.environ[_PARENT_VARIABLE]))
if __name__ in ("__main__", "__mp_main__"):
    gc.set_threshold(*_COLLECT)
    install_topk()
    listen_where_told()
    os.environ[_PARENT_VARIABLE] = str(os.getpid())


def main(argv):
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(argv)
    key = os.environ.pop(API_KEY_VARIABLE, None)
    if key:
        object.__setattr__(server_args, "api_key", Secret(key))  # it refuses plain assignment once it is resolved
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
