"""Score a context bank with a student and a teacher: full-vocabulary entropies and divergences, exact compatibility, top-K geometry.

python tools/eval_fixed_context_bank.py --context-bank bank.parquet --student S --teacher T --topk 16,8,32 --output theta0.parquet
python tools/eval_fixed_context_bank.py --context-bank bank.parquet --student TRAINED --teacher T --baseline-metrics theta0.parquet --output after.parquet
"""

import argparse
import sys

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.evaluate import evaluate_bank


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--context-bank", required=True)
    p.add_argument("--student", required=True, help="HF model directory, or http://... of an SGLang server (then the teacher too)")
    p.add_argument("--teacher", required=True)
    p.add_argument("--output", required=True, help="table to write (.parquet, .csv or .jsonl)")
    p.add_argument("--concurrency", type=int, default=16, help="requests at a time to a server")
    cli.add_models(p)
    return p


def work(args: argparse.Namespace) -> None:
    cli.quiet_models()
    evaluate_bank(
        args.context_bank, args.student, args.teacher, args.output, config=cli.scoring_config(args), baseline=args.baseline_metrics,
        max_samples=args.max_samples, max_response_tokens=args.max_response_tokens, concurrency=args.concurrency,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.run("eval_fixed_context_bank", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
