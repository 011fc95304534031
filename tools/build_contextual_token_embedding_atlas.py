"""A map of tokens in context: the student's hidden states of a context bank in two dimensions, coloured by entropy, divergence, C and gain.

python tools/build_contextual_token_embedding_atlas.py --context-bank DIAG/context_bank.parquet --student STUDENT \\
    --metrics DIAG/eval_latest/fixed_context_metrics.parquet --output-dir DIAG/analysis/atlas
"""

import argparse
import sys
from pathlib import Path

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.atlas import AtlasConfig, atlas, write_atlas
from ta_opd.fixed_context.bank import load_contexts
from ta_opd.fixed_context.features import with_gains
from ta_opd.fixed_context.tables import read_table


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--context-bank", required=True)
    p.add_argument("--student", required=True, help="HF model whose hidden states are shown (before training)")
    p.add_argument("--metrics", required=True, help="scores of the same bank, from eval_fixed_context_bank.py")
    p.add_argument("--output-dir", required=True, type=Path)
    p.add_argument("--max-samples", type=int, help="the first N contexts only, as in the scoring")
    p.add_argument("--max-response-tokens", type=int, help="the first N tokens of every response only, as in the scoring")
    p.add_argument("--max-tokens", type=int, default=20000, help="positions shown, a seeded choice")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--trust-remote-code", action="store_true")
    return p


def work(args: argparse.Namespace) -> None:
    cli.quiet_models()
    contexts = load_contexts(args.context_bank, max_samples=args.max_samples, max_response_tokens=args.max_response_tokens)
    config = AtlasConfig(max_tokens=args.max_tokens, seed=args.seed, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    table, shares = atlas(contexts, args.student, with_gains(read_table(args.metrics)), config)
    written = write_atlas(table, shares, args.output_dir)
    print(f"{len(table)} positions; the two components hold {shares[0]:.1%} and {shares[1]:.1%} of the variance")
    print("written: " + " ".join(map(str, written)))


def main(argv: list[str] | None = None) -> int:
    return cli.run("build_contextual_token_embedding_atlas", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
