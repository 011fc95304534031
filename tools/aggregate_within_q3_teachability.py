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
    rows = frame.drop_duplicates(["run", "dataset"])
    places = [name if frame["dataset"].nunique() < 2 else f"{name}\n{dataset}" for name, dataset in zip(rows["run"], rows["dataset"], strict=True)]
    numbered = frame.assign(place=frame.groupby("score").cumcount() + 1)
    plots.curves(
        numbered, "place", "high_minus_low", "score", out / "within_q3_all.png", low="ci_low", high="ci_high",
        title="Gain of the top minus the bottom quarter inside Q3", note="whiskers: 95 % bootstrap intervals over prompts",
        xlabel="diagnostic", ylabel="difference of mean gain, nats a token",
        places=places,
    )  # fmt: skip
    print(to_markdown(frame[["run", "dataset", "score", "high_minus_low", "ci_low", "ci_high", "q3_tokens"]]), end="")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("aggregate_within_q3_teachability", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
