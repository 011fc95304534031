"""Can reach be predicted inside Q3? Logistic regression on H, D and on H, D, C, judged on unseen contexts.

python tools/q3_reachability.py --input eval_latest/fixed_context_metrics.parquet --output-dir analysis/reachability
"""

import argparse
import sys
from pathlib import Path

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.reachability import ReachabilityConfig, reachability
from ta_opd.fixed_context.tables import read_table, to_markdown, write_json, write_table


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", required=True)
    p.add_argument("--output-dir", required=True)
    p.add_argument("--folds", type=int, default=5)
    p.add_argument("--min-q3-size", type=int, default=200)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--all-tokens", action="store_true", help="profile paper: also tokens that were reached before training")
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    config = ReachabilityConfig(profile=args.profile, folds=args.folds, min_q3_size=args.min_q3_size, seed=args.seed, newly=not args.all_tokens)
    models, tertiles, notes = reachability(read_table(args.input), config)
    out = Path(args.output_dir)
    write_table(out / "q3_reachability.csv", models)
    write_table(out / "q3_reachability_tertiles.csv", tertiles)
    write_json(out / "config.json", {"options": vars(config), "notes": notes})
    print(to_markdown(models) + to_markdown(tertiles), end="")
    for note in notes:
        print(f"note: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("q3_reachability", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
