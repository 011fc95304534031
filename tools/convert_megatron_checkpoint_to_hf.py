#!/usr/bin/env python
"""A checkpoint of a training run (its newest, or --iteration N) to a Hugging Face directory.

python tools/convert_megatron_checkpoint_to_hf.py --checkpoint-root RUN/checkpoints --origin-hf-dir MODEL --output-dir OUT
"""

import argparse
import sys

from slime.backends.megatron_utils import convert
from ta_opd.errors import ConfigError, TaOpdError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint-root", help="directory with latest_checkpointed_iteration.txt")
    where.add_argument("--input-dir", help="one checkpoint directory")
    parser.add_argument("--iteration", default="latest", help="latest, or the number of the rollout")
    parser.add_argument("--origin-hf-dir", required=True, help="Hugging Face directory of the student: config and tokenizer")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--force", action="store_true", help="replace --output-dir")
    parser.add_argument("--vocab-size", type=int, help="must be that of the origin")
    parser.add_argument("--chunk-size", type=int, default=5 * 2**30, help="bytes of one safetensors file")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    for flag in ("--slime-dir", "--load-max-workers", "--save-max-workers"):
        parser.add_argument(flag, help="accepted for known command lines; decides nothing here")
    parser.add_argument("--parallel", action="store_true", help="accepted for known command lines; decides nothing here")
    args = parser.parse_args(argv)
    try:
        if args.input_dir and args.iteration != "latest":
            raise ConfigError("--iteration: expected --checkpoint-root beside it, got --input-dir, which is one checkpoint already")
        source = convert.checkpoint_directory(args.checkpoint_root or args.input_dir, args.iteration)
        print(f"{source} + {args.origin_hf_dir} -> {args.output_dir}")
        if not args.dry_run:
            convert.torch_dist_to_hf(
                source,
                args.origin_hf_dir,
                args.output_dir,
                force=args.force,
                shard_bytes=args.chunk_size,
                vocab_size=args.vocab_size,
            )
    except (TaOpdError, OSError) as error:  # OSError: a full disk, a directory that may not be written
        print(f"convert_megatron_checkpoint_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
