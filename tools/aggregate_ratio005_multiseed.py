"""Several seeds of the same runs at one budget: statistics over seeds, and paired differences between selectors.

python tools/aggregate_ratio005_multiseed.py --root seed1=OUT/A --root seed2=OUT/B --root seed3=OUT/C --ratio 0.05 --output-dir multiseed
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from ta_opd.errors import DataError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.budget import collect_gain_runs
from ta_opd.fixed_context.multiseed import PairedConfig, paired_differences, seed_summary
from ta_opd.fixed_context.tables import to_markdown, write_table


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--root", action="append", required=True, metavar="SEED=DIR", help="folder of a suite, or of <mask>_ratio<tag> runs of one seed (repeat)")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--ratio", type=float, default=0.05)
    p.add_argument("--metric", default="bootstrap_mean_diff", help="column of the gain summary to compare")
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--seed", type=int, default=20260512)
    return p


def work(args: argparse.Namespace) -> None:
    frame, notes = collect_gain_runs(cli.named_paths(args.root, "--root"))
    frame = frame[np.isclose(frame["ratio"], args.ratio)].rename(columns={"label": "seed_label"})
    if len(frame) == 0:
        raise DataError(f"no run with ratio {args.ratio:g} under the roots")
    summary = seed_summary(frame, by=["mask"], value=args.metric, seed="seed_label")
    pairs = paired_differences(
        frame, method="mask", value=args.metric, unit=["seed_label"], cluster="seed_label", config=PairedConfig(args.bootstrap, args.seed)
    )
    out = Path(args.output_dir)
    for name, table in (("multiseed_runs", frame), ("multiseed_summary", summary), ("multiseed_paired", pairs)):
        write_table(out / f"{name}.csv", table) if len(table) else None
    print(to_markdown(summary) + to_markdown(pairs), end="")
    for note in notes:
        print(f"note: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("aggregate_ratio005_multiseed", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
