"""The core evidence of several finished diagnostics on one page: regressions, Q3 contrasts, matching, equal budgets, support.

python tools/build_core_evidence_report.py --diagnostic 4b_to_1p7b=DIAG_A --diagnostic 8b_to_4b=DIAG_B --output-dir evidence
"""

import argparse
import sys
from pathlib import Path

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.evidence import core_evidence, write_core_evidence


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--diagnostic", action="append", required=True, metavar="NAME=DIAG_DIR", help="a folder of tools/run_fixed_context.py (repeat)")
    p.add_argument("--output-dir", required=True, type=Path)
    p.add_argument("--ratio", type=float, default=0.05, help="budget of the top-N rows")
    return p


def work(args: argparse.Namespace) -> None:
    frame = core_evidence(cli.named_paths(args.diagnostic, "--diagnostic"), args.ratio)
    written = write_core_evidence(frame, args.output_dir, args.ratio)
    print(written[1].read_text(), end="")
    print("written: " + " ".join(map(str, written)))


def main(argv: list[str] | None = None) -> int:
    return cli.run("build_core_evidence_report", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
