#!/usr/bin/env python
"""One torch_dist checkpoint directory (iter_0000012 or release) to a Hugging Face directory, one tensor at a time.

python tools/convert_torch_dist_to_hf.py --input-dir RUN/checkpoints/iter_0000012 --origin-hf-dir MODEL --output-dir OUT
"""

import argparse
import sys

import torch

from slime.backends.megatron_utils import convert
from ta_opd.errors import TaOpdError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", required=True, help="checkpoint directory, or a root with latest_checkpointed_iteration.txt")
    parser.add_argument("--origin-hf-dir", required=True, help="Hugging Face directory of the student: config and tokenizer")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("-f", "--force", action="store_true", help="replace --output-dir")
    parser.add_argument("--chunk-size", type=int, default=5 * 2**30, help="bytes of one safetensors file")
    parser.add_argument("--vocab-size", type=int, help="must be that of the origin; accepted for known command lines")
    parser.add_argument("--model-name", help="accepted for known command lines; the model type comes from the origin's config")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to write; default: that of the checkpoint")
    args = parser.parse_args(argv)
    try:
        convert.torch_dist_to_hf(
            convert.checkpoint_directory(args.input_dir),
            args.origin_hf_dir,
            args.output_dir,
            force=args.force,
            shard_bytes=args.chunk_size,
            vocab_size=args.vocab_size,
            dtype=DTYPES.get(args.dtype),
        )
    except (TaOpdError, OSError) as error:  # OSError: a full disk, a directory that may not be written
        print(f"convert_torch_dist_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
