"""What the command lines of the diagnostic share: option groups, list syntax, one-line errors."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ta_opd.errors import ConfigError, TaOpdError
from ta_opd.fixed_context.scoring import RESIDENCIES, ScoringConfig
from ta_opd.scores import PROFILES


def run(name: str, work: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parses, works, and turns the project's errors into one line and exit code 1."""
    args = parser.parse_args(argv)
    try:
        work(args)
    except TaOpdError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; finished parts are kept", file=sys.stderr)
        return 130
    return 0


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", choices=PROFILES, default="paper",
        help="paper: features from before training, absolute gain; released: the columns and options of the released tools",
    )  # fmt: skip


def add_models(parser: argparse.ArgumentParser) -> None:
    """Flags of a scoring run; `scoring_config` reads them."""
    parser.add_argument("--baseline-metrics", help="table of the same bank scored before training; adds *_base columns and gains")
    parser.add_argument("--topk", default="16", help="K, or several such as 16,8,32: the first gives the plain column names")
    parser.add_argument("--max-samples", type=int, help="score the first N contexts only")
    parser.add_argument("--max-response-tokens", type=int, help="score the first N tokens of every response only")
    parser.add_argument("--student-device", default="auto", help="auto, cpu, cuda:0, ...")
    parser.add_argument("--teacher-device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on GPU, float32 on CPU), bfloat16, float16, float32, float64")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--allow-tokenizer-mismatch", action="store_true", help="score although the vocabularies differ")
    parser.add_argument("--residency", choices=RESIDENCIES, default="auto", help="both models in memory, or one at a time")
    parser.add_argument("--max-tokens-per-batch", type=int, default=16384, help="padded tokens of one forward pass")
    parser.add_argument("--workspace-gib", type=float, default=2.0, help="memory for one block of logits")
    parser.add_argument("--contexts-per-part", type=int, default=100, help="contexts between two points to go on from")
    parser.add_argument("--no-raw-topk", action="store_true", help="leave out the four raw top-K columns")


def scoring_config(args: argparse.Namespace) -> ScoringConfig:
    return ScoringConfig(
        topk=parse_topk(args.topk), student_device=args.student_device, teacher_device=args.teacher_device, dtype=args.dtype,
        trust_remote_code=args.trust_remote_code, allow_tokenizer_mismatch=args.allow_tokenizer_mismatch, residency=args.residency,
        max_tokens_per_batch=args.max_tokens_per_batch, workspace_gib=args.workspace_gib, contexts_per_part=args.contexts_per_part,
        raw_topk=not args.no_raw_topk,
    )  # fmt: skip


def parse_topk(text: str) -> tuple[int, ...]:
    """(16, 8, 32) of "16,8,32". ConfigError on anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"topk: expected numbers such as 16 or 16,8,32, got {text!r}") from error


def parse_floats(text: str, what: str) -> tuple[float, ...]:
    """(0.01, 0.05) of "0.01,0.05". ConfigError on anything else."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{what}: expected numbers such as 0.01,0.05, got {text!r}") from error


def named_paths(items: list[str], what: str, separator: str = "=") -> dict[str, Path]:
    """{"k16": Path(...)} of ["k16=path"] (or "k16:path"). ConfigError on a missing name or a repeated one."""
    out: dict[str, Path] = {}
    for item in items:
        name, found, path = item.partition(separator)
        if not found or not name or not path:
            raise ConfigError(f"{what}: expected NAME{separator}PATH, got {item!r}")
        if name in out:
            raise ConfigError(f"{what}: the name {name!r} is given twice")
        out[name] = Path(path)
    return out


def quiet_models() -> None:
    """No progress bars of transformers: a tool's output is its own lines."""
    from ta_opd.fixed_context.hf import import_transformers

    import_transformers().utils.logging.disable_progress_bar()
