#!/usr/bin/env python
"""A Hugging Face model directory to a torch_dist checkpoint (SAVE/release), one tensor at a time.

python tools/convert_hf_to_torch_dist.py --hf-checkpoint MODEL --save OUT

The model's shape comes from its config.json; Megatron's shape flags may be given and must agree. Other Megatron flags of
known command lines are named and ignored. Under torchrun, rank 0 converts and the others wait for nothing and end.
"""

import argparse
import os
import sys

from slime.backends.megatron_utils import convert
from slime.backends.megatron_utils.hf_config import load_shape, read_config
from slime.utils.arguments import SHAPE_FLAGS
from ta_opd.errors import ConfigError, TaOpdError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--hf-checkpoint", required=True, help="Hugging Face directory with safetensors")
    parser.add_argument("--save", required=True, help="directory of the checkpoint to write")
    parser.add_argument("--force", action="store_true", help="replace what is in --save")
    parser.add_argument("--check-only", action="store_true", help="check the model, write nothing")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=1, help="pad the vocabulary to a multiple")
    for flag in SHAPE_FLAGS:
        parser.add_argument(flag, type=float, help=argparse.SUPPRESS)
    args, ignored = parser.parse_known_args(argv)
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    if ignored:
        print(f"ignored (the shape comes from config.json): {' '.join(ignored)}", file=sys.stderr)
    try:
        _check_shape_flags(args)
        if args.check_only:
            shape = load_shape(args.hf_checkpoint)
            print(f"{args.hf_checkpoint}: {shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}: can be converted")
        else:
            convert.hf_to_torch_dist(
                args.hf_checkpoint, args.save, force=args.force, vocab_multiple=args.make_vocab_size_divisible_by
            )
    except (TaOpdError, OSError) as error:  # OSError: a full disk, a directory that may not be written
        print(f"convert_hf_to_torch_dist: {error}", file=sys.stderr)
        return 1
    return 0


def _check_shape_flags(args: argparse.Namespace) -> None:
    config = read_config(args.hf_checkpoint)
    for flag, key in SHAPE_FLAGS.items():
        given, actual = getattr(args, flag.lstrip("-").replace("-", "_")), config.get(key)
        if given is not None and actual is not None and float(given) != float(actual):
            raise ConfigError(f"{flag}: {args.hf_checkpoint} has {key} = {actual}, got {given:g}; drop the flag or fix the model")


if __name__ == "__main__":
    sys.exit(main())
