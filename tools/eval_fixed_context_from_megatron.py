"""Turn a torch_dist checkpoint into an HF model under <output-dir>/student_hf and score the context bank with it.

python tools/eval_fixed_context_from_megatron.py --checkpoint-root RUN --origin-hf-dir STUDENT --teacher-hf-dir TEACHER \\
    --context-bank bank.parquet --baseline-metrics theta0.parquet --output-dir RUN/eval_latest
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ta_opd.errors import ConfigError, ServiceError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.evaluate import evaluate_bank

CONVERTER = Path(__file__).resolve().parent / "convert_megatron_checkpoint_to_hf.py"


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint-root", help="folder with iter_NNNNNNN folders")
    source.add_argument("--input-dir", help="one iter_NNNNNNN folder")
    p.add_argument("--iteration", default="latest")
    p.add_argument("--origin-hf-dir", required=True, help="HF model the training started from (configuration, tokenizer)")
    p.add_argument("--teacher-hf-dir", required=True)
    p.add_argument("--context-bank", required=True)
    p.add_argument("--output-dir", required=True)
    p.add_argument("--slime-dir", help="accepted for the released command lines; the converter beside this tool is used")
    p.add_argument("--parallel-convert", action="store_true", help="read and write weights with several workers")
    p.add_argument("--force-convert", action="store_true", help="convert again although student_hf exists")
    p.add_argument("--dry-run", action="store_true", help="print the conversion command and stop")
    cli.add_models(p)
    return p


def conversion_command(args: argparse.Namespace, target: Path) -> list[str]:
    where = ["--checkpoint-root", args.checkpoint_root] if args.checkpoint_root else ["--input-dir", args.input_dir]
    command = [sys.executable, str(CONVERTER), *where, "--iteration", args.iteration, "--origin-hf-dir", args.origin_hf_dir,
               "--output-dir", str(target), "--force"]  # fmt: skip
    return command + (["--parallel"] if args.parallel_convert else [])


def work(args: argparse.Namespace) -> None:
    out = Path(args.output_dir)
    target = out / "student_hf"
    command = conversion_command(args, target)
    if args.dry_run:
        print(" ".join(command))
        return
    if args.force_convert or not (target / "config.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            raise ServiceError(f"conversion ended with code {code}: {' '.join(command)}")
    if not (target / "config.json").is_file():
        raise ConfigError(f"conversion left no model in {target}")
    cli.quiet_models()
    evaluate_bank(
        args.context_bank, str(target), args.teacher_hf_dir, out / "fixed_context_metrics.parquet", config=cli.scoring_config(args),
        baseline=args.baseline_metrics, max_samples=args.max_samples, max_response_tokens=args.max_response_tokens,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.run("eval_fixed_context_from_megatron", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
