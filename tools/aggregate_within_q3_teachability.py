"""One table of the within-Q3 contrasts of several diagnostics, and a picture.

python tools/aggregate_within_q3_teachability.py --input main=DIAG/analysis/within_q3 --input gsm8k=DIAG2/analysis/within_q3 --output-dir all
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from ta_opd.fixed_context import cli, plots
from ta_opd.fixed_context.tables import read_table, to_markdown, write_table

STEM = "within_q3_high_low_summary.csv"


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", action="append", required=True, metavar="NAME=DIR", help=f"folder with {STEM} (repeat)")
    p.add_argument("--output-dir", required=True)
    return p


def work(args: argparse.Namespace) -> None:
    parts = [read_table(path / STEM).assign(run=name) for name, path in cli.named_paths(args.input, "--input").items()]
    frame = pd.concat(parts, ignore_index=True)
    out = Path(args.output_dir)
    write_table(out / "within_q3_all.csv", frame)
    numbered = frame.assign(place=frame.groupby("score").cumcount() + 1)
    plots.curves(
        numbered, "place", "high_minus_low", "score", out / "within_q3_all.png", low="ci_low", high="ci_high",
        title="Top minus bottom quarter inside Q3, by diagnostic (in order given)",
    )  # fmt: skip
    print(to_markdown(frame[["run", "dataset", "score", "high_minus_low", "ci_low", "ci_high", "q3_tokens"]]), end="")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("aggregate_within_q3_teachability", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
