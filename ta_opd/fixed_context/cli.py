"""What the command lines of the diagnostic share: option groups, list syntax, one-line errors."""

import argparse
import os
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
    except ModuleNotFoundError as error:
        if error.name not in ENGINES:
            raise
        print(f"{name}: this needs {error.name}, which `pip install .` leaves out; bash scripts/setup.sh makes an environment with it "
              "(.venv), and the analyses work on the tables that were scored there", file=sys.stderr)  # fmt: skip
        return 1
    except BrokenPipeError:  # `| head` has read enough; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: stopped; finished parts are kept", file=sys.stderr)
        return 130
    return 0


ENGINES = ("torch", "transformers", "safetensors", "slime", "aiohttp", "sglang", "megatron")  # what the package stands without
# What --help says of flags that several tools have; a tool's own words come first.
HELP = {
    "output_dir": "folder for tables and pictures; made where it is missing", "out_dir": "folder for tables and pictures; made where it is missing",
    "bootstrap": "draws of the bootstrap intervals", "n_boot": "draws of the bootstrap intervals", "seed": "seed of every draw",
    "q_low": "H, D and C are normalised between this quantile ...", "q_high": "... and this one",
    "h_quantile": "Q3 has H below this quantile", "d_quantile": "... and D above this one",
    "low_c_quantile": "low C: below this quantile inside Q3", "high_c_quantile": "high C: above this one",
    "winsor_low": "gains below this quantile are set to it", "winsor_high": "gains above this quantile are set to it",
    "ratios": "budgets: shares of the tokens that are kept", "ratio": "budget: share of the tokens that is kept",
    "context_bank": "file of export_fixed_context_bank.py", "teacher": "model directory, or address of a SGLang server",
    "teacher_hf_dir": "model directory of the teacher", "iteration": "number of the checkpoint, or latest",
    "device": "auto, cpu, cuda:0, ...", "student_device": "auto, cpu, cuda:0, ...", "teacher_device": "auto, cpu, cuda:0, ...",
    "dtype": "auto (bfloat16 on GPU, float32 on CPU), bfloat16, float16, float32, float64",
    "trust_remote_code": "run code that a model directory brings along", "allow_tokenizer_mismatch": "score although the vocabularies differ",
    "input": "table of eval_fixed_context_bank.py with --baseline-metrics", "input_key": "key of the prompt", "label_key": "key of the reference answer",
    "apply_chat_template": "format prompts by the tokenizer's chat template", "temperature": "of sampling",
    "max_response_tokens": "longest response", "max_prompt_tokens": "longer prompts are left out", "num_contexts": "responses in the bank",
    "sample": "the first responses, or a random choice", "folds": "folds of contexts", "min_q3_size": "fewer tokens are not fitted",
    "method_col": "column of the method", "budget_col": "column of the budget", "metric_col": "column of the number",
    "no_pictures": "tables only", "bank_source": "where contexts come from: rollout dumps, the student on held-out prompts, or a token bank",
    "debug_rollout_data": "folder or files of --save-debug-rollout-data", "token_bank": "folder of --opd-token-bank-dir",
    "residency": "both models in memory, or one at a time", "max_tokens_per_batch": "padded tokens of one forward pass",
    "summary_name": "file of the summary in --diag-dir", "pair_id": "name of the pair in the summary",
}  # fmt: skip


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says what every flag is and what it is without being given."""

    def _format_action(self, action: argparse.Action) -> str:
        text = action.help or HELP.get(action.dest, "")
        if action.option_strings and action.default not in (None, "", argparse.SUPPRESS, []) and not isinstance(action.default, bool) and "default" not in text:
            text = f"{text} (default: {action.default:.3g})" if isinstance(action.default, float) else f"{text} (default: {action.default})"
        action.help = text.strip() or None
        return super()._format_action(action)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)


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
