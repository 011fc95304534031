"""Inside Q3 (low entropy, high divergence): gain by quartile of Dlearn, Dincompat and C, and top against bottom quarter.

python tools/analyze_within_q3_teachability.py --input k16:eval_latest/fixed_context_metrics.parquet --output-dir analysis/within_q3
"""

import argparse
import sys

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.features import parse_quantile_pair
from ta_opd.fixed_context.regions import RegionConfig, within_q3, write_within_q3
from ta_opd.fixed_context.tables import read_table, to_markdown


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--input", action="append", required=True, metavar="K:PATH", help="label and table (repeat)")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--q-low", type=float, default=0.05)
    p.add_argument("--q-high", type=float, default=0.95)
    p.add_argument("--h-quantile", type=float, default=0.5)
    p.add_argument("--d-quantile", type=float, default=0.5)
    p.add_argument("--winsor-low", type=float, default=0.01)
    p.add_argument("--winsor-high", type=float, default=0.99)
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--seed", type=int, default=20260513)
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    config = RegionConfig(
        profile=args.profile, q_low=args.q_low, q_high=args.q_high, h_quantile=args.h_quantile, d_quantile=args.d_quantile,
        winsor=parse_quantile_pair(f"{args.winsor_low},{args.winsor_high}"), bootstrap=args.bootstrap, seed=args.seed,
    )  # fmt: skip
    tables = {name: read_table(path) for name, path in cli.named_paths(args.input, "--input", ":").items()}
    result = within_q3(tables, config)
    out = write_within_q3(result, config, args.output_dir)
    print(to_markdown(result.contrasts), end="")
    for label, notes in result.notes.items():
        for note in notes:
            print(f"{label}: {note}")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("analyze_within_q3_teachability", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
