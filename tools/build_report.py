"""Make one self-contained HTML report from a run or a suite directory; pictures (PNG) and tables (CSV, Markdown) go beside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ta_opd.errors import TaOpdError
from ta_opd.report.build import MIB, Options, build_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="a run (holds metrics.jsonl), a directory of runs, or a suite")
    parser.add_argument("--output", type=Path, help="default DIRECTORY/report.html")
    parser.add_argument("--title")
    parser.add_argument("--training-run", help="of a diagnostic: the run directory behind it, for curves over training and its token bank")
    parser.add_argument("--tokenizer", help="directory with the tokenizer.json of the models; default: found through the runs")
    parser.add_argument("--max-mib", type=float, default=10.0, help="largest size of the page")
    parser.add_argument("--bank-rollouts", type=int, default=24, help="rollouts of each token bank that the pictures read")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws")
    args = parser.parse_args(argv)
    try:
        options = Options(
            max_bytes=int(args.max_mib * MIB), bank_rollouts=args.bank_rollouts, tokenizer=args.tokenizer, title=args.title, draws=args.draws,
            training=args.training_run,
        )
        report = build_report(args.directory, args.output, options)
    except (TaOpdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in report.headline:
        print(line)
    for line in report.warnings:
        print(f"warning: {line}")
    for line in report.notes:
        print(f"note: {line}")
    print(f"report: {report.html} ({report.html.stat().st_size / MIB:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
