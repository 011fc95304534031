"""--max-restarts: a run whose process died starts over from its newest checkpoint, in the same driver."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from slime.ray.calls import ProcessLost

TRACKER = "latest_checkpointed_iteration.txt"  # written last by a save that is whole


def with_restarts(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """train(args); again, at most args.max_restarts times, where a process of the run died (ProcessLost).

    Everything that the failed attempt started has been stopped by then. Other errors would come again and end the run.
    """
    began = time.time()
    for left in range(args.max_restarts, -1, -1):
        try:
            return train(args)
        except ProcessLost as problem:
            if not left:
                raise ProcessLost(f"{problem}. {_advice(args)}") from problem
            where = resume_from_newest(args, began)
            print(f"{problem}\nstarting over from {where} (restarts left after this one: {left - 1})", flush=True)


def resume_from_newest(args: argparse.Namespace, began: float) -> str:
    """Points args at the newest checkpoint that this run wrote or started from; returns words for it."""
    tracker = Path(args.save or "") / TRACKER
    own = bool(args.save) and tracker.is_file()
    if own and (args.load == args.save or tracker.stat().st_mtime >= began):
        args.load, args.no_load_optim, args.start_rollout_id = args.save, False, None
        return f"the checkpoint of rollout {tracker.read_text().strip()} in {args.save}"
    return f"{args.load} again" if args.load else "the beginning, since nothing was saved yet"


def _advice(args: argparse.Namespace) -> str:
    if args.max_restarts:
        return f"It died {args.max_restarts + 1} times; look at the logs in {args.output_dir}/logs, then resume with --load {args.save}"
    if args.save and (Path(args.save) / TRACKER).is_file():
        return f"Resume with --load {args.save}; with --max-restarts N a run does so by itself"
    return "Nothing was saved: --save-interval N keeps checkpoints, --max-restarts N then goes on from them by itself"
