"""Budget curves of a sweep: the Q3 gap, the matched gap and the mean gain of every <mask>_ratio<tag> run, against the ratio kept.

python tools/aggregate_budget_ratio_curve.py --root seed1=OUT/TAG_SEED1 --root seed2=OUT/TAG_SEED2 --output-dir curves
"""

import argparse
import sys
from pathlib import Path

from ta_opd.fixed_context import cli, plots
from ta_opd.fixed_context.budget import collect_gain_runs
from ta_opd.fixed_context.tables import to_markdown, write_table

CURVES = ("bootstrap_mean_diff", "matching_mean_diff", "mean_gain")


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--root", action="append", required=True, metavar="LABEL=DIR", help="folder of a suite, or of runs of one seed (repeat)")
    p.add_argument("--output-dir", required=True)
    return p


def work(args: argparse.Namespace) -> None:
    frame, notes = collect_gain_runs(cli.named_paths(args.root, "--root"))
    out = Path(args.output_dir)
    write_table(out / "budget_ratio_runs.csv", frame)
    measures = [name for name in (*CURVES, "keep_ratio") if name in frame]
    curve = frame.groupby(["mask", "ratio"], sort=False)[measures].agg(["mean", "std", "count"])
    curve.columns = ["_".join(name) for name in curve.columns]
    curve = curve.reset_index()
    write_table(out / "budget_ratio_curve.csv", curve)
    for name in CURVES:
        if name in frame:
            plots.curves(curve, "ratio", f"{name}_mean", "mask", out / f"budget_ratio_{name}.png", title=f"{name} by budget", xlabel="budget", ylabel=name)
    print(to_markdown(curve), end="")
    for note in notes:
        print(f"note: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("aggregate_budget_ratio_curve", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
