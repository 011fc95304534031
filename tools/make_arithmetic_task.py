"""Write the quick start's task: prompts with labels, a held-out set, and a character tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.quickstart import arithmetic
from ta_opd.errors import TaOpdError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="gets train.jsonl, heldout.jsonl and tokenizer/")
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-heldout", type=int, default=300)
    parser.add_argument("--operations", type=int, default=arithmetic.DEFAULT_OPERATIONS, help="steps of a chain")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        paths = arithmetic.write_task(
            args.output_dir,
            num_train=args.num_train,
            num_heldout=args.num_heldout,
            operations=args.operations,
            seed=args.seed,
        )
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, path in paths.items():
        print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
