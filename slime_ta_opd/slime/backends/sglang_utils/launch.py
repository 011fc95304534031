"""Starts a SGLang server with its API key taken from the environment, so that no process list or log shows it."""

import os
import sys

from slime.backends.sglang_utils.secret import API_KEY_VARIABLE, Secret


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
