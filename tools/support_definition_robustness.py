"""Does the finding depend on how support is defined, or on K? The same analysis for every definition in each table.

python tools/support_definition_robustness.py --dataset run=eval_latest/fixed_context_metrics.parquet --output-dir analysis/support
"""

import argparse
import sys

from ta_opd.errors import DataError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.support import SupportConfig, support_robustness, write_support
from ta_opd.fixed_context.tables import read_table, to_markdown


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--output-dir", required=True)
    p.add_argument("--dataset", action="append", required=True, metavar="NAME=PATH", help="name and table (repeat); absent files are listed")
    p.add_argument("--n-boot", type=int, default=800)
    p.add_argument("--seed", type=int, default=17)
    cli.add_profile(p)
    return p


def work(args: argparse.Namespace) -> None:
    paths = cli.named_paths(args.dataset, "--dataset")
    missing = {name: str(path) for name, path in paths.items() if not path.is_file()}
    tables = {name: read_table(path) for name, path in paths.items() if name not in missing}
    if not tables:
        raise DataError(f"none of the datasets exists: {missing}")
    config = SupportConfig(profile=args.profile, bootstrap=args.n_boot, seed=args.seed)
    result = support_robustness(tables, config)
    out = write_support(result, config, missing, args.output_dir)
    shown = [c for c in ("dataset", "support", "n", "r2_HD", "r2_decomp", "beta_Dlearn", "beta_Dincompat", "q3_high_minus_low",
                         "q3_high_minus_low_ci_low", "q3_high_minus_low_ci_high", "note") if c in result]  # fmt: skip
    print(to_markdown(result[shown], digits=6), end="")
    for name, path in missing.items():
        print(f"missing: {name} ({path})")
    print(f"-> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("support_definition_robustness", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
