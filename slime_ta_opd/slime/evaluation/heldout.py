"""Accuracy on a held-out prompt file, from a Hugging Face checkpoint (transformers) or a running SGLang server: no network, no harness."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from slime.rollout.prompt_file import PromptRow, read_prompt_file
from slime.rollout.rm_hub import get_checker
from slime.rollout.sampling import sampling_seed
from slime.utils.misc import load_tokenizer
from ta_opd.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What is asked and how it is answered; times and lengths in tokens."""

    data: str
    input_key: str = "prompt"
    label_key: str = "label"
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    rm_type: str = "math"
    seeds: tuple[int, ...] = (1234,)
    n_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    limit: int | None = None


@dataclass(frozen=True)
class Answer:
    """One response: its tokens and whether it ended by itself."""

    tokens: list[int]
    finished: bool


class Generator(Protocol):
    """Answers token prompts; `seeds[i]` is the sampling seed of prompt i."""

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Settings) -> list[Answer]: ...


def encode(rows: Sequence[PromptRow], tokenizer: Any, settings: Settings) -> list[list[int]]:
    """Token ids of every prompt, through the chat template where asked (a string becomes a user message)."""
    out = []
    for row in rows:
        if settings.chat_template:
            messages = row.prompt if isinstance(row.prompt, list) else [{"role": "user", "content": row.prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings.chat_template_kwargs)
        elif isinstance(row.prompt, str):
            text = row.prompt
        else:
            raise ConfigError(f"CHAT_TEMPLATE=0: {row.where} holds chat messages; expected CHAT_TEMPLATE=1 for them")
        out.append(tokenizer.encode(text, add_special_tokens=False))
    return out


def evaluate(generate: Generator, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Answers every prompt n_samples times for every seed and checks the answers.

    Returns per seed {seed, accuracy, stderr (over questions), truncated, response_length} and the responses. Raises DataError for a
    broken prompt file, ConfigError for several runs without sampling or prompts without labels.
    """
    if settings.temperature == 0 and len(settings.seeds) * settings.n_samples > 1:
        raise ConfigError("EVAL_SEEDS and N_SAMPLES: several runs without sampling would all be the same; expected TEMPERATURE above 0")
    rows, fingerprint = read_prompt_file(settings.data, input_key=settings.input_key, label_key=settings.label_key)
    rows = rows[: settings.limit]
    if all(row.label is None for row in rows):
        raise ConfigError(f"LABEL_KEY={settings.label_key}: expected answers in {settings.data}, got none")
    check = get_checker(settings.rm_type)
    prompts = encode(rows, tokenizer, settings)
    runs, responses = [], []
    for seed in settings.seeds:
        repeated = [p for p in prompts for _ in range(settings.n_samples)]
        answers = generate(repeated, [sampling_seed(seed, i, True) for i in range(len(repeated))], settings)
        texts = [tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
        right = np.array([check(t, rows[i // settings.n_samples].label, {}) for i, t in enumerate(texts)], float)
        right = right.reshape(len(rows), settings.n_samples)
        by_question = right.mean(axis=1)
        runs.append({
            "seed": seed, "accuracy": float(by_question.mean()), "accuracy_any": float(right.max(axis=1).mean()),
            "stderr": float(by_question.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan,
            "truncated": float(np.mean([not a.finished for a in answers])),
            "response_length": float(np.mean([len(a.tokens) for a in answers])),
        })  # fmt: skip
        for i, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            question, sample = divmod(i, settings.n_samples)
            responses.append({
                "seed": seed, "row": question, "sample": sample, "label": rows[question].label, "response": text,
                "right": right[question, sample], "length": len(answer.tokens), "truncated": not answer.finished,
            })  # fmt: skip
    return {"data": settings.data, "data_sha256": fingerprint, "questions": len(rows), "rm_type": settings.rm_type,
            "runs": runs, "responses": responses}  # fmt: skip


def transformers_generator(directory: str, *, batch_size: int = 16, device: str = "auto", dtype: str = "auto",
                           trust_remote_code: bool = False) -> tuple[Generator, Any]:  # fmt: skip
    """(generator, tokenizer) of a Hugging Face checkpoint. Batches are left-padded, longest prompts first; sampling is seeded by batch."""
    import torch
    from tqdm import tqdm

    if not torch.cuda.is_available():
        from slime.backends.sglang_utils.cpu_support import install_torchvision_schema

        install_torchvision_schema()
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(directory, trust_remote_code)
    place = ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("bfloat16" if place.startswith("cuda") else "float32") if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, kind), trust_remote_code=trust_remote_code, local_files_only=True
    )  # fmt: skip
    model = model.to(place).eval()
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    model.generation_config = GenerationConfig()  # only `settings` count: a repetition penalty of the checkpoint is not in the servers' answers

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], seeds: Sequence[int], settings: Settings) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        sampling = {"do_sample": False} if settings.temperature == 0 else {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0,
        }  # fmt: skip
        for batch in tqdm(list(_chunks(order, batch_size)), desc=f"answers of {directory.rstrip('/').rsplit('/', 1)[-1]}", unit="batch"):
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in batch], device=place)
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=place)
            torch.manual_seed(seeds[batch[0]])
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, pad_token_id=pad,
                eos_token_id=sorted(ends) or None, **sampling,
            )  # fmt: skip
            for i, row in zip(batch, out[:, longest:].tolist(), strict=True):
                answers[i] = _cut(row, ends)
        return answers

    return generate, tokenizer


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(tokens: list[int], ends: set[int]) -> Answer:
    """Tokens up to the first end token, and whether there was one."""
    for position, token in enumerate(tokens):
        if token in ends:
            return Answer(tokens[:position], True)
    return Answer(tokens, False)


def server_generator(urls: Sequence[str], tokenizer: Any, *, concurrency: int = 64) -> Generator:
    """Generator over running SGLang servers (replicas of one model); every answer has its own sampling seed."""
    from slime.backends.sglang_utils.client import SGLangClient

    client = SGLangClient(list(urls), max_concurrency=concurrency, name="model")

    def generate(prompts: Sequence[list[int]], seeds: Sequence[int], settings: Settings) -> list[Answer]:
        params = {"temperature": settings.temperature, "top_p": settings.top_p, "max_new_tokens": settings.max_new_tokens}

        async def one(prompt: list[int], seed: int) -> Answer:
            reply = await client.generate(prompt, {**params, "sampling_seed": seed}, log_probs=False)
            tokens = list(map(int, reply.output_ids))
            finished = reply.finish_reason != "length"
            if finished and tokens and tokens[-1] == tokenizer.eos_token_id:
                tokens.pop()
            return Answer(tokens, finished)

        async def everything() -> list[Answer]:
            return list(await asyncio.gather(*(one(p, s) for p, s in zip(prompts, seeds, strict=True))))

        return client.run(everything())

    return generate
