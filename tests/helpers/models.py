"""Tiny models with random weights, for tests that run the real engines."""

from pathlib import Path

import torch


def write_tiny_qwen3(directory: Path, tokenizer_dir: Path, seed: int, *, layers: int = 2, hidden: int = 64, spread: float = 0.15, tied: bool = True) -> Path:
    """An HF directory of a small fp32 Qwen3 with the tokenizer of `tokenizer_dir`; `spread` is the weights' deviation."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=spread, dtype=torch.float32,
    )  # fmt: skip
    Qwen3ForCausalLM(config).float().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_tiny_qwen2(directory: Path, tokenizer_dir: Path, seed: int) -> Path:
    """An HF directory of a small fp32 Qwen2 (the architecture of Qwen2.5: biases on queries, keys and values)."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.15, dtype=torch.float32,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():  # biases start at zero, where a mistake would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
