"""Matched top-N: every selector keeps equally many tokens of one scored bank; whose tokens gained most?

python tools/matched_fixed_context_topn.py --input-root DIAG --out-dir DIAG/analysis/topn          # reads DIAG/k*/fixed_context_metrics.parquet
python tools/matched_fixed_context_topn.py --input run=eval_latest/fixed_context_metrics.parquet --out-dir analysis/topn
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.features import parse_quantile_pair
from ta_opd.fixed_context.selector_inputs import SOURCES
from ta_opd.fixed_context.tables import read_table, to_markdown
from ta_opd.fixed_context.topn import TopNConfig, matched_topn, write_topn

SHOWN = 8  # selectors of a budget that are printed; the files hold all


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--input-root", help="folder with k*/fixed_context_metrics.parquet")
    source.add_argument("--input", action="append", metavar="NAME=PATH", help="name and table (repeat)")
    p.add_argument("--out-dir", required=True)
    p.add_argument("--ratios", default="0.01,0.03,0.05,0.10")
    p.add_argument("--selectors", help="comma-separated names (default: all)")
    p.add_argument("--source", choices=SOURCES, default="full", help="full-vocabulary quantities, or those training sees online")
    p.add_argument("--winsor", default="0.01,0.99", help="clip the gain at quantiles LOW,HIGH, or none")
    p.add_argument("--bootstrap", type=int, default=500)
    p.add_argument("--seed", type=int, default=20260515)
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    if args.input:
        paths = cli.named_paths(args.input, "--input")
    else:
        paths = {p.parent.name: p for p in sorted(Path(args.input_root).glob("k*/fixed_context_metrics.parquet"))}
        if not paths:
            raise DataError(f"no k*/fixed_context_metrics.parquet under {args.input_root}")
    config = TopNConfig(
        profile=args.profile, ratios=cli.parse_floats(args.ratios, "--ratios"), source=args.source, bootstrap=args.bootstrap,
        selectors=tuple(args.selectors.split(",")) if args.selectors else None, seed=args.seed, winsor=parse_quantile_pair(args.winsor),
    )  # fmt: skip
    result = pd.concat([matched_topn(read_table(path), config, dataset=name) for name, path in paths.items()], ignore_index=True)
    out = write_topn(result, config, {name: str(path) for name, path in paths.items()}, args.out_dir)
    shown = [c for c in ("dataset", "selector", "ratio", "n_keep", "mean_gain", "ci_low", "ci_high", "gain_per_keep_ratio", "note") if c in result]
    for (dataset, ratio), part in result.groupby(["dataset", "ratio"], sort=False):
        best = part.sort_values("mean_gain", ascending=False, kind="stable").head(SHOWN)
        print(f"{dataset} at {ratio:g}: the best {len(best)} of {len(part)} selectors")
        print(to_markdown(best[shown]))
    print(f"all rows -> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("matched_fixed_context_topn", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
