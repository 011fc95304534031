"""Freeze contexts: one row a student-written response, from rollout dumps, a token bank, or a student answering held-out prompts.

python tools/export_fixed_context_bank.py --debug-rollout-data RUN/rollout_data --max-samples 300 --output bank.parquet
python tools/export_fixed_context_bank.py --model STUDENT --prompt-data heldout.jsonl --max-samples 300 --output bank.parquet
"""

import argparse
import sys

from ta_opd.errors import ConfigError
from ta_opd.fixed_context import cli
from ta_opd.fixed_context.bank import SAMPLING, export_from_dumps, export_from_token_bank, write_bank
from ta_opd.fixed_context.sampling import SamplingConfig, drop_trained, read_prompts, sample_bank


def build_parser() -> argparse.ArgumentParser:
    p = cli.new_parser(__doc__)
    p.add_argument("--output", required=True, help="bank to write (.parquet, .csv or .jsonl)")
    p.add_argument("--max-samples", type=int, help="number of contexts (default: all)")
    p.add_argument("--sample", choices=SAMPLING, default="first", help="the first ones, or a seeded random choice")
    p.add_argument("--seed", type=int, default=42, help="of the random choice and of sampling from a model")
    p.add_argument("--debug-rollout-data", nargs="+", default=[], metavar="DUMP", help="rollout dumps (.pt, .parquet), folders or globs")
    p.add_argument("--released-order", action="store_true", help="take dump files in text order (0, 1, 10, 2), as the released tool")
    p.add_argument("--token-bank", help="take tokens, masks and log-probs from this token bank, prompts from the dumps")
    p.add_argument("--model", help="HF student, or http://... of an SGLang server, that answers --prompt-data")
    p.add_argument("--prompt-data", help="prompts that were not trained on (.jsonl or .parquet)")
    p.add_argument("--exclude-prompts", help="prompt file whose prompts are left out (the training set)")
    p.add_argument("--input-key", default="prompt")
    p.add_argument("--label-key", default="label")
    p.add_argument("--apply-chat-template", action="store_true")
    p.add_argument("--max-response-tokens", type=int, default=256)
    p.add_argument("--max-prompt-tokens", type=int)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--trust-remote-code", action="store_true")
    return p


def work(args: argparse.Namespace) -> None:
    chosen = {"max_samples": args.max_samples, "sample": args.sample, "seed": args.seed}
    if args.model:
        if not args.prompt_data:
            raise ConfigError("--model needs --prompt-data")
        cli.quiet_models()
        prompts = read_prompts(args.prompt_data, args.input_key, args.label_key)
        if args.exclude_prompts:
            left = drop_trained(prompts, read_prompts(args.exclude_prompts, args.input_key, args.label_key))
            print(f"{len(prompts) - len(left)} of {len(prompts)} prompts occur in {args.exclude_prompts} and are left out")
            prompts = left
        config = SamplingConfig(
            num_contexts=args.max_samples, max_response_tokens=args.max_response_tokens, max_prompt_tokens=args.max_prompt_tokens,
            temperature=args.temperature, sample=args.sample, seed=args.seed, apply_chat_template=args.apply_chat_template,
            device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        bank, record = sample_bank(prompts, args.model, config, log=print)
    elif args.token_bank:
        bank, record = export_from_token_bank(args.token_bank, args.debug_rollout_data, **chosen), {"source": args.token_bank, **chosen}
    elif args.debug_rollout_data:
        bank = export_from_dumps(args.debug_rollout_data, released_order=args.released_order, **chosen)
        record = {"source": args.debug_rollout_data, "released_order": args.released_order, **chosen}
    else:
        raise ConfigError("expected --debug-rollout-data, --token-bank with --debug-rollout-data, or --model with --prompt-data")
    write_bank(args.output, bank, record)
    print(f"{len(bank)} contexts, {int(bank['resp_len'].sum())} response tokens, {bank['prompt_id'].nunique()} prompts -> {args.output}")


def main(argv: list[str] | None = None) -> int:
    return cli.run("export_fixed_context_bank", work, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
