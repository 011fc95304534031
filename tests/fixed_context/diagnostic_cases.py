"""Data the tests of the diagnostic share: the table behind the golden values, tiny models, banks."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.fixed_context.bank import build_bank, context_row, write_bank

VOCAB_S, VOCAB_T, TOKENS = 96, 104, 90


def golden_table() -> pd.DataFrame:
    """480 tokens in 20 groups from frac(sin(...)), written with Python's own floats: last bits decide ties of the released top-N."""
    rows = []
    for g in range(20):
        for t in range(24):

            def u(m, g=g, t=t):
                x = math.sin(12.9898 * g + 78.233 * t + 37.719 * m) * 43758.5453
                return x - math.floor(x)

            h, d, c = 3 * u(1) ** 3, 5 * u(3) ** 4 + 0.001, 1 - u(4) ** 3
            after = d * (1 - 0.3 * c * (d / 5) + 0.2 * (u(10) - 0.5))
            ht = 2 * u(2) ** 2
            rows.append(
                {
                    "sample_index": 100 + g, "sample_ordinal": g, "tok_pos": t, "pos_norm": t / 23, "Hs_full": 0.9 * h,
                    "Hs_full_base": h, "Ht_full": ht, "Ht_full_base": ht, "KLf_full_base": d, "KLf_full": after, "Cmass_true": c,
                    "Coverlap": round(16 * u(5)) / 16, "CBC": u(6), "reach_t1": float(u(7) > 0.3),
                    "target_in_student_topk": float(u(8) > 0.1), "G_KLf": (d - after) / (d + 1e-12),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def paper_table(groups: int = 40, length: int = 24, seed: int = 0) -> pd.DataFrame:
    """A joined table with before-training columns in which the gain grows with D * C, for analyses of profile paper."""
    rng = np.random.default_rng(seed)
    n = groups * length
    h, d, c = rng.random(n) ** 2, rng.gamma(1.0, 1.0, n), rng.random(n)
    after = d * (1 - 0.5 * c) + rng.normal(0, 0.05, n)
    table = pd.DataFrame(
        {
            "sample_ordinal": np.repeat(np.arange(groups), length), "sample_index": np.repeat(np.arange(groups), length),
            "prompt_id": np.repeat([f"p{i:03d}" for i in range(groups)], length), "tok_pos": np.tile(np.arange(length), groups),
            "pos_norm": np.tile(np.arange(length) / (length - 1), groups), "token_id": rng.integers(0, 50, n),
            "Hs_full": h * 0.9, "Hs_full_base": h, "Ht_full_base": rng.random(n), "KLf_full_base": d, "KLf_full": after,
            "KLr_full_base": d * 1.1, "KLr_full": after * 1.1, "Cmass_true_base": c, "Cmass_true": np.minimum(c + 0.05, 1),
            "Coverlap_base": np.round(c * 8) / 8, "CBC_base": np.sqrt(c), "reach_t1_base": (c > 0.5).astype(float),
            "reach_t1": (c + rng.normal(0, 0.2, n) > 0.45).astype(float), "target_in_student_topk_base": 1.0,
        }
    )  # fmt: skip
    return table


def make_model(path: Path, vocab: int, *, hidden: int = 32, layers: int = 2, seed: int = 0, tie: bool = True, noise_from=None, noise: float = 0.0):
    """A tiny random Qwen3 with a word-level tokenizer of TOKENS number words, saved as an HF model."""
    import torch

    from ta_opd.fixed_context.hf import import_transformers

    transformers = import_transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    if noise_from is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(noise_from))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * noise)
    else:
        config = transformers.Qwen3Config(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=tie, initializer_range=0.3, max_position_embeddings=256,
            eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(path))
    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, TOKENS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    ).save_pretrained(str(path))
    return path


def make_bank(path: Path, contexts: int = 9, seed: int = 0, longest: int = 20) -> Path:
    """A bank of random tokens with responses of 1 to `longest` tokens; two contexts share each prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(contexts):
        if i % 2 == 0:
            prompt = rng.integers(2, TOKENS, rng.integers(2, 8)).tolist()
        length = longest if i == 0 else int(rng.integers(1, longest + 1))
        tokens = [*prompt, *rng.integers(2, TOKENS, length).tolist()]
        rollout = {"tokens": tokens, "response_length": length, "sample_index": i, "group_index": i // 2, "status": "completed",
                   "prompt": "p", "response": "r", "rollout_id": 0}  # fmt: skip
        rows.append(context_row(rollout, source="test", ordinal=i))
    write_bank(path, build_bank(rows, max_samples=None), {"source": "test"})
    return path


def write_prompts(path: Path, count: int, start: int = 0) -> Path:
    """A JSONL file of `count` prompts that the tiny tokenizer knows."""
    lines = [json.dumps({"prompt": " ".join(f"w{3 + (7 * i + 13 * j) % 80}" for j in range(3 + i % 3)), "label": str(i)}) for i in range(start, start + count)]
    path.write_text("\n".join(lines) + "\n")
    return path
