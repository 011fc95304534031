"""The whole diagnostic: train, export contexts, score before, convert, score after, analyse, recommend, summarise. Finished steps are kept.

python tools/run_fixed_context.py --diag-dir DIAG --student S --teacher T --save-dir RUN --train-command "bash scripts/train/run_opd.sh" \\
    --debug-rollout-data RUN/rollout_data --num-contexts 300 --max-response-tokens 192
python tools/run_fixed_context.py --diag-dir DIAG --student S --teacher T --after-hf step60=M60 --after-hf step120=M120 \\
    --bank-source heldout --prompt-data heldout.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.analyses import AnalysisConfig
from ta_opd.fixed_context.features import parse_quantile_pair
from ta_opd.fixed_context.pipeline import BANK_SOURCES, STEPS, PipelineConfig, plan, run_pipeline
from ta_opd.fixed_context.sampling import SamplingConfig
from ta_opd.fixed_context.scoring import RESIDENCIES, ScoringConfig

TOOLS = Path(__file__).resolve().parent


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--diag-dir", required=True, help="everything lands here")
    p.add_argument("--student", required=True, help="HF student before training")
    p.add_argument("--teacher", required=True, help="HF teacher")
    p.add_argument("--save-dir", help="torch_dist checkpoints of the run")
    p.add_argument("--after-hf", action="append", default=[], metavar="NAME=DIR", help="HF model after training instead (repeat, in order)")
    p.add_argument("--iterations", default="latest", help="latest, all, or numbers such as 25,50")
    p.add_argument("--train-command", help="shell command that trains; omitted: no training step")
    p.add_argument("--train-done-file", help="training counts as done when this file exists")
    p.add_argument("--bank-source", choices=BANK_SOURCES, default="dump")
    p.add_argument("--debug-rollout-data", nargs="+", default=[], metavar="DUMP")
    p.add_argument("--token-bank")
    p.add_argument("--prompt-data", help="held-out prompts for --bank-source heldout")
    p.add_argument("--exclude-prompts", help="training prompts, left out of the held-out ones")
    p.add_argument("--input-key", default="prompt")
    p.add_argument("--label-key", default="label")
    p.add_argument("--apply-chat-template", action="store_true")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--num-contexts", type=int, default=300)
    p.add_argument("--sample-response-tokens", type=int, default=256, help="longest response of --bank-source heldout")
    p.add_argument("--max-response-tokens", type=int, default=192, help="scored tokens of a response")
    p.add_argument("--sample", choices=("first", "random"), default="first")
    p.add_argument("--seed", type=int, default=42, help="of the bank")
    p.add_argument("--topk", default="16", help="16, or 16,8,32: the first gives the plain column names")
    p.add_argument("--student-device", default="auto")
    p.add_argument("--teacher-device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--residency", choices=RESIDENCIES, default="auto")
    p.add_argument("--max-tokens-per-batch", type=int, default=16384)
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--allow-tokenizer-mismatch", action="store_true")
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--analysis-seed", type=int, help="seed of every analysis (default: each analysis' own)")
    p.add_argument("--winsor", default="0.01,0.99", help="quantiles at which within-Q3, top-N and recommendation clip the gain, or none")
    p.add_argument("--summary-name", default="diag300_summary.md")
    p.add_argument("--pair-id", default="")
    p.add_argument("--report", action="store_true", help="end with one HTML report")
    p.add_argument("--force", nargs="*", default=[], metavar="STEP", help=f"run again: all, or some of {', '.join(STEPS)}")
    p.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    cli.add_profile(p)
    return p


def pipeline_config(args: argparse.Namespace) -> PipelineConfig:
    python = sys.executable
    convert = (python, str(TOOLS / "convert_megatron_checkpoint_to_hf.py"), "--checkpoint-root", "{checkpoint_root}", "--iteration", "{iteration}",
               "--origin-hf-dir", "{origin_hf}", "--output-dir", "{output}", "--force")  # fmt: skip
    report = ()
    if args.report:
        report = (python, str(TOOLS / "build_report.py"), "{diag_dir}", "--output", "{output}", "--tokenizer", "{student}")
        if args.save_dir:
            report += ("--training-run", args.save_dir)
        if args.pair_id:
            report += ("--title", f"Fixed-context diagnostic: {args.pair_id}")
    sampling = SamplingConfig(
        num_contexts=args.num_contexts, max_response_tokens=args.sample_response_tokens, temperature=args.temperature, sample=args.sample,
        seed=args.seed, input_key=args.input_key, label_key=args.label_key, apply_chat_template=args.apply_chat_template,
        device=args.student_device, dtype=args.dtype, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    scoring = ScoringConfig(
        topk=cli.parse_topk(args.topk), student_device=args.student_device, teacher_device=args.teacher_device, dtype=args.dtype,
        residency=args.residency, max_tokens_per_batch=args.max_tokens_per_batch, trust_remote_code=args.trust_remote_code,
        allow_tokenizer_mismatch=args.allow_tokenizer_mismatch,
    )  # fmt: skip
    analysis = AnalysisConfig(args.profile, args.bootstrap, args.analysis_seed, parse_quantile_pair(args.winsor))
    return PipelineConfig(
        diag_dir=args.diag_dir, student=args.student, teacher=args.teacher, save_dir=args.save_dir,
        after_hf={name: str(path) for name, path in cli.named_paths(args.after_hf, "--after-hf").items()}, iterations=args.iterations,
        train_command=args.train_command, train_done_file=args.train_done_file, convert_command=convert, report_command=report,
        bank_source=args.bank_source, rollout_dumps=tuple(args.debug_rollout_data), token_bank=args.token_bank, prompt_data=args.prompt_data,
        exclude_prompts=args.exclude_prompts, sampling=sampling, num_contexts=args.num_contexts,
        max_response_tokens=args.max_response_tokens, bank_sample=args.sample, seed=args.seed, scoring=scoring, analysis=analysis,
        summary_name=args.summary_name, pair_id=args.pair_id,
    )  # fmt: skip


def work(args: argparse.Namespace) -> None:
    config = pipeline_config(args)
    if args.dry_run:
        print("\n".join(plan(config)))
        return
    cli.quiet_models()
    run_pipeline(config, force=args.force, log=lambda line: print(line, flush=True))
    print("\n".join(ending(Path(args.diag_dir), args.summary_name)))


def ending(out: Path, summary: str) -> list[str]:
    """What was found in a few lines, and where to read on: the last that a terminal shows."""
    lines = []
    file = out / "analysis" / "recommend" / "selector_recommendation.json"
    if file.is_file():
        found = json.loads(file.read_text())
        overall, best = found["overall"], found["best"]
        lines.append(f"mean gain of all {overall['tokens']} tokens: {overall['mean_gain']:.3g} nats [{overall['ci_low']:.3g}, {overall['ci_high']:.3g}]")
        lines.append(f"highest on the tokens that {best['selector']} keeps at {best['ratio']:g}: {best['gain_per_kept_token']:.3g} nats")
        lines += [f"warning: {text}" for text in found["warnings"]]
    places = {"summary": out / summary, "selectors": file.with_suffix(".md"), "report": out / "report.html"}
    return lines + [f"{name}: {path}" for name, path in places.items() if path.is_file()]


def main(argv: list[str] | None = None) -> int:
    return cli.run("run_fixed_context", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
