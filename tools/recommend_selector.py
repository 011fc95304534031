"""Which selector and budget would pay off for this teacher and student? From one run scored before and after a short full training.

python tools/recommend_selector.py --input eval_latest/fixed_context_metrics.parquet --output-dir analysis/recommend
"""

import argparse
import sys

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.features import parse_quantile_pair
from ta_opd.fixed_context.recommend import RecommendConfig, as_markdown, recommend, write_recommendation
from ta_opd.fixed_context.selector_inputs import SOURCES
from ta_opd.fixed_context.tables import read_table


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", required=True, help="table of eval_fixed_context_bank.py with --baseline-metrics")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--ratios", default="0.05,0.1,0.2,0.3,0.5")
    p.add_argument("--selectors", help="comma-separated names (default: all registered)")
    p.add_argument("--source", choices=SOURCES, default="online", help="quantities as training sees them, or full-vocabulary ones")
    p.add_argument("--support", choices=("union_tail", "union_floor"), default="union_tail", help="divergence of --source online")
    p.add_argument("--min-keep", type=int, default=1, help="tokens kept for every response, as in training")
    p.add_argument("--winsor", default="0.01,0.99", help="clip the gain at quantiles LOW,HIGH, or none")
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--seed", type=int, default=42)
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    config = RecommendConfig(
        profile=args.profile, ratios=cli.parse_floats(args.ratios, "--ratios"), source=args.source, support=args.support,
        selectors=tuple(args.selectors.split(",")) if args.selectors else None, min_keep=args.min_keep, bootstrap=args.bootstrap,
        seed=args.seed, winsor=parse_quantile_pair(args.winsor),
    )  # fmt: skip
    result = recommend(read_table(args.input), config)
    out = write_recommendation(result, args.output_dir)
    print(as_markdown(result, most=10))
    print(f"every selector at every budget: {out / 'selector_recommendation.md'} (.csv, .json; .png as a picture)")


def main(argv: list[str] | None = None) -> int:
    return cli.run("recommend_selector", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
