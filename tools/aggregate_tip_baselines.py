"""One table of all selectors of a sweep: gaps, gains per token kept, and the tokens kept in fact.

python tools/aggregate_tip_baselines.py --root seed1=OUT/TAG --output-dir baselines --ratios 0.03,0.05
"""

import argparse
import sys
from pathlib import Path

from ta_opd.errors import DataError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.budget import collect_gain_runs
from ta_opd.fixed_context.tables import to_markdown, write_table


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--root", action="append", required=True, metavar="LABEL=DIR", help="folder of a suite, or of <mask>_ratio<tag> runs (repeat)")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--ratios", help="only these budgets, comma-separated")
    p.add_argument("--masks", help="only these selectors, comma-separated")
    return p


def work(args: argparse.Namespace) -> None:
    frame, notes = collect_gain_runs(cli.named_paths(args.root, "--root"))
    if args.ratios:
        frame = frame[frame["ratio"].isin(cli.parse_floats(args.ratios, "--ratios"))]
    if args.masks:
        frame = frame[frame["mask"].isin(args.masks.split(","))]
    if len(frame) == 0:
        raise DataError("no run is left with these --ratios and --masks")
    first = [c for c in ("label", "mask", "ratio", "keep_ratio", "bootstrap_mean_diff", "bootstrap_mean_diff_per_keep",
                         "matching_mean_diff", "matching_mean_diff_per_keep", "mean_gain", "q3_tokens") if c in frame]  # fmt: skip
    frame = frame[first + [c for c in frame if c not in first]].sort_values(["ratio", "bootstrap_mean_diff"], ascending=[True, False])
    out = Path(args.output_dir)
    write_table(out / "tip_baselines.csv", frame)
    (out / "tip_baselines.md").write_text(to_markdown(frame[first]))
    print(to_markdown(frame[first]), end="")
    for note in notes:
        print(f"note: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("aggregate_tip_baselines", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
