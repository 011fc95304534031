"""Accuracy on a held-out prompt file, for Hugging Face checkpoints or running SGLang servers; needs no network and no harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from slime.evaluation import heldout, scores
from slime.utils.config_file import json_value
from slime.utils.misc import load_tokenizer, quiet_environment
from ta_opd.errors import ConfigError, TaOpdError
from ta_opd.suite.memory import fingerprint, stamp, write_json


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--models", required=True, help="LABEL=HF_DIRECTORY_OR_ADDRESS, space separated")
    p.add_argument("--data", required=True, help="JSONL or parquet file of prompts with answers")
    p.add_argument("--run-dir", required=True, type=Path)
    p.add_argument("--base", default="base", help="label that differences are taken to")
    p.add_argument("--tokenizer", default="", help="tokenizer directory for servers")
    p.add_argument("--input-key", default="prompt")
    p.add_argument("--label-key", default="label")
    p.add_argument("--no-chat-template", action="store_true")
    p.add_argument("--chat-template-kwargs", type=json_value, default={}, help="JSON")
    p.add_argument("--rm-type", default="math", help="math, last_number, exact, or package.module:function")
    p.add_argument("--seeds", default="1234")
    p.add_argument("--n-samples", type=int, default=1)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--max-gen-toks", type=int, default=2048)
    p.add_argument("--limit", type=int)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--server-concurrency", type=int, default=64)
    p.add_argument("--trust-remote-code", action="store_true")
    return p


def settings_from(args: argparse.Namespace) -> heldout.Settings:
    words = args.seeds.replace(",", " ").split()
    if not words or not all(w.isdigit() for w in words):
        raise ConfigError(f"EVAL_SEEDS={args.seeds!r}: expected numbers such as 1 2 3 4 5")
    return heldout.Settings(
        data=args.data, input_key=args.input_key, label_key=args.label_key, chat_template=not args.no_chat_template,
        chat_template_kwargs=args.chat_template_kwargs, rm_type=args.rm_type, seeds=tuple(map(int, words)), n_samples=args.n_samples,
        temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_gen_toks, limit=args.limit,
    )  # fmt: skip


def generator(model: str, args: argparse.Namespace):
    if model.startswith("http"):
        if not args.tokenizer:
            raise ConfigError(f"TOKENIZER: expected the tokenizer's directory for the server {model}")
        tokenizer = load_tokenizer(args.tokenizer, args.trust_remote_code)
        return heldout.server_generator(model.split(","), tokenizer, concurrency=args.server_concurrency), tokenizer
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(f"MODELS: {model}: expected a Hugging Face model directory (with config.json) or a server's address")
    return heldout.transformers_generator(
        model, batch_size=args.batch_size, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    quiet_environment()
    task = Path(args.data).stem
    rows = []
    try:
        settings = settings_from(args)
        models = {}
        for word in args.models.split():
            label, found, model = word.partition("=")
            if not found or not label or not model or label in models:
                raise ConfigError(f"MODELS={args.models!r}: expected LABEL=DIRECTORY_OR_ADDRESS with different labels, got {word!r}")
            models[label] = model
        for label, model in models.items():
            directory = args.run_dir / label / task
            read = [stamp(Path(p)) for p in (model, args.data) if not p.startswith("http")]  # a checkpoint that was written anew is another one
            print_of_run = fingerprint([model, repr(settings), *read])
            result = _finished(directory / "results.json", print_of_run)
            if result is None:
                generate, tokenizer = generator(model, args)
                result = heldout.evaluate(generate, tokenizer, settings)
                directory.mkdir(parents=True, exist_ok=True)
                with open(directory / "responses.jsonl", "w") as file:
                    file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in result.pop("responses"))
                write_json(directory / "results.json", {**result, "fingerprint": print_of_run})
            rows += [(label, task, r["seed"], 0, f"accuracy,{settings.rm_type}", r["accuracy"], r["stderr"], str(directory / "results.json"))
                     for r in result["runs"]]  # fmt: skip
            print(f"{label}: accuracy {sum(r['accuracy'] for r in result['runs']) / len(result['runs']):.4f} on {result['questions']} questions")
        columns = ["model", "task", "seed", "sample", "metric", "exact_match", "exact_match_stderr", "result_json"]
        written = scores.write(args.run_dir, pd.DataFrame(rows, columns=columns), args.base)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written[2].read_text())
    print("written: " + " ".join(map(str, written)))
    return 0


def _finished(path: Path, print_of_run: str) -> dict | None:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == print_of_run else None


if __name__ == "__main__":
    sys.exit(main())
