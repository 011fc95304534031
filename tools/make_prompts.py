"""Makes prompt files (JSONL or parquet with `prompt` and `label`) from DAPO-Math-17k, GSM8K, a harness log or any chat data set.

Duplicates are removed; a held-out part is split off and never trained on; OUTPUT.indices.json records which lines it holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ta_opd import prompt_sets
from ta_opd.errors import ConfigError, TaOpdError

HUB = {"dapo": "BytedTsinghua-SIA/DAPO-Math-17k", "gsm8k": "openai/gsm8k"}


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--kind", choices=("dapo", "gsm8k", "lm_eval_log", "chat"), required=True)
    p.add_argument("--source", nargs="*", type=Path, default=[], help="files or directories; default: download from the Hugging Face hub")
    p.add_argument("--prompt-key", default="prompt", help="chat: dotted key of the prompt or messages")
    p.add_argument("--label-key", default="", help="chat: dotted key of the answer")
    p.add_argument("--as-messages", action="store_true", help="write prompts as chat messages")
    p.add_argument("--output", type=Path, required=True, help="training prompts (.jsonl or .parquet)")
    p.add_argument("--heldout", type=int, default=0, help="prompts that are held out")
    p.add_argument("--heldout-output", type=Path, help="default: OUTPUT with _heldout in its name")
    p.add_argument("--heldout-seed", type=int, default=41717)
    p.add_argument("--second-half", action="store_true", help="draw them from the second half of the file, as the released drivers")
    return p


def source_files(args: argparse.Namespace, written: list[Path]) -> list[Path]:
    """Files of --source, directories searched; downloaded when none was given. Raises ConfigError.

    written: outputs of this call. One that an earlier call left in a directory that is searched is no source; one that is named is refused.
    """
    given = list(args.source)
    own = {path.resolve() for path in written}
    if len(own) < len(written):
        raise ConfigError(f"HELDOUT_OUTPUT={written[1]}: expected another file than OUTPUT")
    for path in given:
        if path.resolve() in own:
            raise ConfigError(f"OUTPUT={path}: expected another file than SOURCE, which would be written over")
    if not given:
        if args.kind not in HUB:
            raise ConfigError(f"SOURCE: expected a file for kind {args.kind}, got nothing")
        from huggingface_hub import snapshot_download

        try:
            given = [Path(snapshot_download(HUB[args.kind], repo_type="dataset", allow_patterns=["*.parquet"]))]
        except Exception as error:  # the hub's client raises many kinds
            raise ConfigError(f"SOURCE: {HUB[args.kind]} could not be downloaded ({error}); expected a local file or directory") from None
    files = []
    for path in given:
        if path.is_dir():
            found = sorted(f for pattern in ("*.parquet", "*.jsonl") for f in path.rglob(pattern) if f.resolve() not in own)
            files += [f for f in found if args.kind != "gsm8k" or ("main" in str(f) and "train" in f.name)] or found
        else:
            files.append(path)
    if not files:
        raise ConfigError(f"SOURCE={' '.join(map(str, given))}: expected .parquet or .jsonl files there, found none")
    return files


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        target = args.heldout_output or args.output.with_name(f"{args.output.stem}_heldout{args.output.suffix}")
        files = source_files(args, [args.output, target] if args.heldout else [args.output])
        readers = {"dapo": prompt_sets.dapo, "gsm8k": prompt_sets.gsm8k, "lm_eval_log": prompt_sets.lm_eval_log}
        read = readers.get(args.kind) or prompt_sets.chat(args.prompt_key, args.label_key)
        prompts = prompt_sets.collect(prompt_sets.read_rows(files), read)
        train, heldout = prompt_sets.split(prompts, args.heldout, args.heldout_seed, second_half=args.second_half)
        prompt_sets.write(prompts.subset(train), args.output, as_messages=args.as_messages)
        prompt_sets.record(args.output.with_suffix(".indices.json"), prompts, files, heldout, args.heldout_seed, args.second_half)
        print(f"{args.output}: {len(train)} prompts of {prompts.rows_read} rows ({prompts.duplicates} duplicates, {prompts.skipped} empty)")
        if heldout:
            prompt_sets.write(prompts.subset(heldout), target, as_messages=args.as_messages)
            print(f"{target}: {len(heldout)} held-out prompts")
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
