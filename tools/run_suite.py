"""Runs a method suite or budget sweep; scripts/train/run_teachability_opd_method_suite.sh and its sisters call this.

The run itself is configured through the environment, as scripts/train/run_opd.sh reads it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ta_opd.errors import TaOpdError
from ta_opd.suite import methods, plan, summary
from ta_opd.suite.memory import Memory
from ta_opd.suite.runner import Suite

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--entries", required=True, help="method:ratio[:index] entries, comma or space separated")
    p.add_argument("--entries-variable", default="METHOD_LIST", help="what --entries is called in error messages")
    p.add_argument("--seeds", default="seed1", help="seed labels, or label=train/rollout/mask")
    p.add_argument("--explicit-seeds", nargs=3, default=["", "", ""], help="SEED, ROLLOUT_SEED, OPD_BUDGET_MASK_SEED as the user set them")
    p.add_argument("--tag", required=True, help="name of the suite; its directory is OUTPUT_ROOT/TAG")
    p.add_argument("--output-root", required=True, type=Path)
    p.add_argument("--log-dir", required=True, type=Path)
    p.add_argument("--student", required=True, help="HF directory of the student")
    p.add_argument("--teacher", default="", help="HF directory of the teacher, for the fixed-context scores")
    p.add_argument("--prompt-data", required=True)
    p.add_argument("--input-key", default="prompt")
    p.add_argument("--label-key", default="")
    p.add_argument("--no-chat-template", action="store_true", help="prompts of the context bank are used as they are")
    p.add_argument("--topk", type=int, default=16)
    p.add_argument("--max-response-len", type=int, required=True)
    p.add_argument("--skip-eval", action="store_true", help="train and merge only")
    p.add_argument("--common-context", default="", help="frozen context bank; made by the suite when not given")
    p.add_argument("--baseline-metrics", default="", help="scores before training; made by the suite when not given")
    p.add_argument("--heldout-prompt-data", default="", help="prompts for the context bank; default --prompt-data")
    p.add_argument("--contexts", type=int, default=300)
    p.add_argument("--context-tokens", type=int, default=192)
    p.add_argument("--eval-gpus", default="", help="GPU ids of the fixed-context scoring; empty: CPU")
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--on-error", choices=("continue", "stop"), default="continue")
    p.add_argument("--force", action="store_true", help="run every row anew; old directories are kept under another name")
    p.add_argument("--dry-run", action="store_true", help="print the commands of all rows and start nothing")
    return p


def settings_from(args: argparse.Namespace) -> plan.Settings:
    return plan.Settings(
        root=ROOT, python=sys.executable, output_root=args.output_root, log_dir=args.log_dir, tag=args.tag,
        entries=tuple(methods.parse_entries(args.entries, args.entries_variable)),
        seeds=tuple(methods.parse_seeds(args.seeds, args.explicit_seeds)), student=args.student, teacher=args.teacher,
        prompt_data=args.prompt_data, top_k=args.topk, max_response_len=args.max_response_len, skip_eval=args.skip_eval,
        common_context=args.common_context, baseline_metrics=args.baseline_metrics, heldout_prompt_data=args.heldout_prompt_data,
        input_key=args.input_key, label_key=args.label_key, apply_chat_template=not args.no_chat_template, contexts=args.contexts,
        context_tokens=args.context_tokens, eval_gpus=args.eval_gpus, bootstrap=args.bootstrap,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        suite = Suite(settings_from(args), dict(os.environ), force=args.force, on_error=args.on_error)
        if args.dry_run:
            suite.dry_run()
            return 0
        result = suite.run()
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = summary.write(suite.settings, suite.rows, Memory(suite.settings.directory / "suite_state.json"))
    print("; ".join(f"{len(names)} {how}" for how, names in result.rows.items()))
    for how in ("failed", "interrupted"):
        for name in result.rows.get(how, ()):
            print(f"{how}: {name}", file=sys.stderr)
    print(f"summary: {written[0].with_suffix('.html')}")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
