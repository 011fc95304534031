"""What explains the gain: regressions with cluster-robust intervals, the Q3 contrast of high against low C, and matching.

python tools/analyze_fixed_context_gain.py --input eval_latest/fixed_context_metrics.parquet --output-dir analysis/gain
"""

import argparse
import sys

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.features import parse_quantile_pair
from ta_opd.fixed_context.gain import GainConfig, analyze_gain, write_gain
from ta_opd.fixed_context.tables import read_table, to_markdown


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", required=True, help="table with before-training columns and gains")
    p.add_argument("--output-dir", required=True)
    for role in ("gain", "h", "d", "c", "group", "pos", "ht"):
        p.add_argument(f"--{role}-col", help="column to use instead of the profile's")
    p.add_argument("--q-low", type=float, default=0.05)
    p.add_argument("--q-high", type=float, default=0.95)
    p.add_argument("--h-quantile", type=float, default=0.5)
    p.add_argument("--d-quantile", type=float, default=0.5)
    p.add_argument("--low-c-quantile", type=float, default=1 / 3)
    p.add_argument("--high-c-quantile", type=float, default=2 / 3)
    p.add_argument("--winsor", help="clip the gain at quantiles LOW,HIGH (default: raw)")
    p.add_argument("--trim", help="leave out rows whose gain is outside quantiles LOW,HIGH (default: none)")
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--use-quadrant", action="store_true", help="Q3 by quadrant (the table's column, else the online rule)")
    p.add_argument("--no-pictures", action="store_true")
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    overrides = {role: getattr(args, f"{role}_col") for role in ("gain", "h", "d", "c", "group", "pos", "ht")}
    config = GainConfig(
        profile=args.profile, q_low=args.q_low, q_high=args.q_high, h_quantile=args.h_quantile, d_quantile=args.d_quantile,
        low_c_quantile=args.low_c_quantile, high_c_quantile=args.high_c_quantile, bootstrap=args.bootstrap, seed=args.seed,
        use_quadrant=args.use_quadrant, winsor=parse_quantile_pair(args.winsor), trim=parse_quantile_pair(args.trim), overrides=overrides,
    )  # fmt: skip
    result = analyze_gain(read_table(args.input), config)
    out = write_gain(result, args.output_dir, pictures=not args.no_pictures)
    print(f"columns: {result.columns.as_dict()}")
    print(to_markdown(result.regressions), end="")
    print(to_markdown(result.summary.iloc[0].rename_axis("quantity").rename("value").reset_index(), digits=6), end="")
    for note in result.notes:
        print(f"note: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("analyze_fixed_context_gain", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
