"""Mean, spread and 1.96 standard errors of a metric by method and budget, with a picture.

python tools/plot_budget_accuracy.py --input runs.csv --output-dir figures --method-col method --budget-col budget_ratio --metric-col score
"""

import argparse
import sys

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.budget import budget_accuracy, write_budget_accuracy
from ta_opd.fixed_context.tables import read_table, to_markdown


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", required=True, help="table with one row a run")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--method-col", default="method")
    p.add_argument("--budget-col", default="budget_ratio")
    p.add_argument("--metric-col", default="score")
    return p


def work(args: argparse.Namespace) -> None:
    names = {"method": args.method_col, "budget": args.budget_col, "metric": args.metric_col}
    summary = budget_accuracy(read_table(args.input), **names)
    out = write_budget_accuracy(summary, args.output_dir, **names)
    print(to_markdown(summary), end="")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("plot_budget_accuracy", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
