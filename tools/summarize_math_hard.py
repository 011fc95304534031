"""The table of leaderboard_math_hard from the harness's result files: one row a model, one column a subject.

python tools/summarize_math_hard.py --root outputs/eval/downstream_math_hard --output-dir outputs/eval/downstream_math_hard

Every results_*.json below --root counts; a model with several is shown by its newest one.
"""

import argparse
import sys
from pathlib import Path

from slime.evaluation.scores import markdown, math_hard_from_files
from ta_opd.fixed_context import cli


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--root", required=True, type=Path, help="RUN_DIR of scripts/eval/run_downstream_math_hard.sh, or any folder of results")
    p.add_argument("--output-dir", required=True, type=Path)
    return p


def work(args: argparse.Namespace) -> None:
    table = math_hard_from_files(args.root)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output_dir / "math_hard_summary.csv", index=False)
    (args.output_dir / "math_hard_summary.md").write_text(markdown(table))
    print(markdown(table), end="")


def main(argv: list[str] | None = None) -> int:
    return cli.run("summarize_math_hard", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
