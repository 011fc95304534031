"""A training script's command line: parse, check, print the plan or train, and turn an error into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from slime.ray import cluster
from slime.ray.calls import DISK_FULL
from slime.utils.arguments import parse_args
from slime.utils.plan import print_plan
from slime.utils.reachable import silent
from slime.utils.restart import with_restarts
from slime.utils.stop import Terminated
from slime.utils.validation import validate
from ta_opd.errors import TaOpdError


def main(train: Callable, argv: Sequence[str] | None = None, *, asynchronous: bool = False) -> int:
    """Exit code of `train(args)`: 0, 2 for an error of this project, 130 when interrupted, 143 where SIGTERM cost work.

    asynchronous: rollouts are sampled while the trainer works, so settings that cannot do both at once are refused.
    """
    try:
        args = parse_args(argv)
        args.asynchronous = asynchronous
        if cluster.is_joined(os.environ.get("RAY_ADDRESS")) and not args.dry_run:
            cluster.check(os.environ["RAY_ADDRESS"])  # before models and prompts are read, and before anything of the run is touched
        validate(args)
        if args.dry_run:
            print_plan(args)
        else:
            for line in silent(args):
                print(line, file=sys.stderr)
            with_restarts(train, args)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"error: {error.filename or 'a file of this run'} could not be written: {error.strerror}; make room, then resume", file=sys.stderr)
        return 2
    except Terminated as end:
        print(end, file=sys.stderr)
        return 143 if end.lost else 0
    except KeyboardInterrupt:
        print("interrupted: every process of this run has been stopped", file=sys.stderr)
        return 130
    return 0
