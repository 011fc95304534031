"""Models of true shapes with random weights, and prompts for them: for speed and memory where nothing can be downloaded.

    python benchmarks/gpu/random_models.py --output-dir DIR --shapes qwen3-1.7B qwen3-4B

The tokenizer is one word an id over the whole vocabulary, so every sampled id can be decoded and every prompt has the
asked length.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 151936
# hidden, ffn, layers, heads, KV heads, head size, tied
SHAPES = {
    "qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4B": (2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8B": (4096, 12288, 36, 32, 8, 128, False),
    "qwen3-14B": (5120, 17408, 40, 40, 8, 128, False),
    "tiny": (256, 640, 4, 4, 2, 64, True),
}


def write_model(directory: Path, shape: str, seed: int, context: int = 8192, vocabulary: int = VOCABULARY, end_scale: float = 1.0) -> Path:
    """An HF directory of a Qwen3 of that shape, bf16, weights from a normal distribution.

    end_scale: factor of the end token's row of the output matrix; above 1 its logit varies more, so that responses end at
    different lengths instead of all at the limit.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, ffn, layers, heads, kv, head, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head, max_position_embeddings=context, tie_word_embeddings=tied, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attention_bias=False, eos_token_id=1, pad_token_id=0,
        bos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    if tied:
        model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        model.get_output_embeddings().weight[1] *= end_scale
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.save_pretrained(directory)
    word_tokenizer(vocabulary).save_pretrained(directory)
    return directory


def word_tokenizer(vocabulary: int):
    """One word an id: `w17` is 17; 0 pads and 1 ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def write_prompts(path: Path, count: int, length: int, seed: int, vocabulary: int = VOCABULARY) -> Path:
    rng = np.random.default_rng(seed)
    with path.open("w") as f:
        for _ in range(count):
            words = " ".join(f"w{i}" for i in rng.integers(2, vocabulary, length))
            f.write(json.dumps({"prompt": words, "label": ""}) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-1.7B", "qwen3-4B"])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--end-scale", type=float, default=1.0, help="above 1: responses end at different lengths (try 4)")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed, shape in enumerate(args.shapes):
        print(write_model(args.output_dir / shape, shape, seed, vocabulary=args.vocabulary, end_scale=args.end_scale))
    print(write_prompts(args.output_dir / "prompts.jsonl", args.prompts, args.prompt_length, 0, args.vocabulary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
