"""Evaluates checkpoints or running SGLang servers with lm-evaluation-harness; scripts/eval/*.sh call this.

Finished (model, task, seed, sample) runs are skipped; --summarize-only reads what is there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from slime.evaluation import harness, scores
from ta_opd.errors import ConfigError, TaOpdError
from ta_opd.suite.process import stop_requests


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--models", required=True, help="LABEL=HF_DIRECTORY_OR_ADDRESS, space separated")
    p.add_argument("--tasks", required=True, help="harness tasks, comma or space separated")
    p.add_argument("--run-dir", required=True, type=Path)
    p.add_argument("--base", default="base", help="label that differences are taken to")
    p.add_argument("--seeds", default="1234")
    p.add_argument("--n-samples", type=int, default=1)
    p.add_argument("--no-chat-template", action="store_true")
    p.add_argument("--system-instruction", default="")
    p.add_argument("--num-fewshot", type=int)
    p.add_argument("--max-gen-toks", type=int)
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-p", type=float)
    p.add_argument("--batch-size", default="8")
    p.add_argument("--limit", default="")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--max-length", type=int)
    p.add_argument("--tokenizer", default="")
    p.add_argument("--server-concurrency", type=int, default=32)
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--allow-code", action="store_true", help="run code written by the model (HumanEval)")
    p.add_argument("--timeout", default="", help="of one harness process, such as 150m")
    p.add_argument("--local-datasets", default="", help="TASK=PATH, space separated: tasks read from local data")
    p.add_argument("--prompt-tasks", default="", help="NAME=FILE, space separated: prompt files as tasks")
    p.add_argument("--input-key", default="prompt")
    p.add_argument("--label-key", default="label")
    p.add_argument("--summarize-only", action="store_true")
    p.add_argument("--dry-run", action="store_true")
    return p


def pairs(text: str, variable: str) -> dict[str, str]:
    """{left: right} of space-separated LEFT=RIGHT. Raises ConfigError."""
    out: dict[str, str] = {}
    for word in text.split():
        left, found, right = word.partition("=")
        if not found or not left or not right or left in out:
            raise ConfigError(f"{variable}={text!r}: expected NAME=VALUE entries with different names, got {word!r}")
        out[left] = right
    return out


def seconds(text: str) -> float | None:
    """Seconds of 90, 90s, 150m or 6h; None for nothing."""
    if not text:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    number = text[:-1] if unit else text
    if not number.replace(".", "", 1).isdigit():
        raise ConfigError(f"TIMEOUT={text!r}: expected a time such as 150m")
    return float(number) * (unit or 1)


def settings_from(args: argparse.Namespace) -> harness.Settings:
    words = args.seeds.replace(",", " ").split()
    if not words or not all(w.isdigit() for w in words):
        raise ConfigError(f"EVAL_SEEDS={args.seeds!r}: expected numbers such as 1 2 3 4 5")
    prompt_tasks = pairs(args.prompt_tasks, "PROMPT_TASKS")
    tasks = [*args.tasks.replace(",", " ").split(), *prompt_tasks]
    return harness.Settings(
        models=pairs(args.models, "MODELS"), tasks=tuple(dict.fromkeys(tasks)), run_dir=args.run_dir, seeds=tuple(map(int, words)),
        n_samples=args.n_samples, chat_template=not args.no_chat_template, system_instruction=args.system_instruction,
        num_fewshot=args.num_fewshot, max_gen_toks=args.max_gen_toks, temperature=args.temperature, top_p=args.top_p,
        batch_size=args.batch_size, limit=args.limit, device=args.device, dtype=args.dtype, max_length=args.max_length,
        tokenizer=args.tokenizer, server_concurrency=args.server_concurrency, trust_remote_code=args.trust_remote_code,
        allow_code=args.allow_code, timeout=seconds(args.timeout), local_datasets=pairs(args.local_datasets, "LOCAL_DATASETS"),
        prompt_tasks=prompt_tasks, input_key=args.input_key, label_key=args.label_key,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    """What a harness process needs to import transformers on a CPU machine; a no-op with CUDA."""
    import torch

    if torch.cuda.is_available():
        return dict(os.environ)
    from slime.backends.sglang_utils.cpu_support import child_environment

    return child_environment()


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        settings = settings_from(args)
        if not settings.tasks:
            raise ConfigError("TASKS: expected at least one harness task, or PROMPT_TASKS")
        harness.check(settings)
        todo = harness.jobs(settings)
        if args.dry_run:
            for job in todo:
                print(shlex.join(job.command))
            return 0
        ended = []
        if not args.summarize_only:
            with stop_requests() as stop:
                ended = harness.run(settings, todo, _environment(), stop)
        runs = scores.read_runs((j.model, j.task, j.seed, j.sample, j.directory) for j in todo)
        written = scores.write(settings.run_dir, runs, args.base)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = [(job, how) for job, how in ended if how not in ("done", "skipped")]
    for job, how in bad:
        print(f"{how}: {job.model} {job.task} seed {job.seed}; see {job.directory / 'harness.log'}", file=sys.stderr)
    if written:
        print(written[2].read_text())
        print("written: " + " ".join(map(str, written)))
    if any(how == "interrupted" for _, how in bad):
        return 130
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
