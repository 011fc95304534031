"""The tables of the paper's section 3 from before-training features and gains.

python tools/build_section3_analysis.py --dataset main=DIAG --dataset gsm8k=BEFORE.parquet:AFTER.parquet --output-dir section3
"""

import argparse
import sys

from ta_opd.errors import ConfigError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.section3 import Section3Config, load_dataset, section3_tables, write_section3
from ta_opd.fixed_context.tables import to_markdown


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--dataset", action="append", required=True, metavar="NAME=DIR", help="diagnostic folder, or NAME=BEFORE:AFTER (repeat)")
    p.add_argument("--output-dir", required=True)
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--seed", type=int, default=41717)
    p.add_argument("--gain", choices=("absolute", "relative"), default="absolute", help="paper eq. 1, or the released relative gain")
    return p


def work(args: argparse.Namespace) -> None:
    loaded = [load_dataset(spec) for spec in args.dataset]
    if len({name for name, _ in loaded}) < len(loaded):
        raise ConfigError("--dataset: a name is given twice")
    config = Section3Config(bootstrap=args.bootstrap, seed=args.seed, gain=args.gain)
    tables = section3_tables(dict(loaded), config)
    out = write_section3(tables, config, args.output_dir)
    print(to_markdown(tables["existing_q3_scale_context_summary"]), end="")
    print(f"{len(tables)} tables -> {out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("build_section3_analysis", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
