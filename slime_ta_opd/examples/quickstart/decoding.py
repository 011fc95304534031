"""Sampling and answer checking with transformers on the CPU, for models of some hundred thousand parameters.

The servers do this for real models. Here it serves to make the tiny models and to check finished checkpoints without
starting anything. Shapes: B prompts, P prompt tokens, T new tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.quickstart.arithmetic import Problem, is_correct
from ta_opd.fixed_context.hf import import_transformers

MAX_NEW_TOKENS = 48


def load_model(directory: Path):
    """The fp32 CPU model of an HF directory, in eval mode."""
    import torch

    model = import_transformers().AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    return model.eval()


def generate(model, ids_BP, *, max_new_tokens: int, eos_id: int, pad_id: int, temperature: float = 0.0, generator=None):
    """Continue equally long prompts. ids_BP int64 -> new tokens [B, T <= max_new_tokens] int64, `pad_id` after `eos_id`.

    Temperature 0 takes the most likely token, otherwise tokens are drawn with `generator` from softmax(logits / temperature).
    """
    import torch

    produced, cache, current = [], None, ids_BP
    done_B = torch.zeros(len(ids_BP), dtype=torch.bool)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            output = model(input_ids=current, past_key_values=cache, use_cache=True)
            cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
            if temperature == 0:
                token_B = logits_BV.argmax(-1)
            else:
                token_B = torch.multinomial(torch.softmax(logits_BV / temperature, -1), 1, generator=generator)[:, 0]
            token_B = torch.where(done_B, pad_id, token_B)
            produced.append(token_B)
            done_B = done_B | (token_B == eos_id)
            if done_B.all():
                break
            current = token_B[:, None]
    return torch.stack(produced, 1)


def answer(
    model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """One response a prompt, as token ids that end with the end token unless cut off; prompts are batched by length."""
    import torch

    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    generator = torch.Generator().manual_seed(seed)
    responses: list[list[int]] = [[] for _ in prompts]
    for length in sorted(by_length):
        rows = by_length[length]
        new_BT = generate(
            model,
            torch.tensor([encoded[index] for index in rows]),
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        for index, row in zip(rows, new_BT.tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses[index] = row[:end]
    return responses


def solved(model, tokenizer, problems: Sequence[Problem]) -> np.ndarray:
    """[problems] bool: whether the greedy answer to each problem is right."""
    responses = answer(model, tokenizer, [problem.prompt for problem in problems])
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return np.array([is_correct(text, problem.label) for text, problem in zip(texts, problems, strict=True)])
