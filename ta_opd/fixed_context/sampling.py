"""A held-out bank: the initial student answers prompts that were not trained on (paper, section on fixed contexts).

The student is an HF model here, or a running SGLang server. Sampling is at temperature 1 without truncation unless said otherwise, because
that is the distribution on-policy distillation trains on.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context import hf
from ta_opd.fixed_context.bank import build_bank, context_row


@dataclass(frozen=True)
class SamplingConfig:
    """num_contexts prompts are taken (None = all), one response each, at most max_response_tokens long."""

    num_contexts: int | None = 300
    max_response_tokens: int = 256
    max_prompt_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    sample: str = "first"
    seed: int = 42
    input_key: str = "prompt"
    label_key: str = "label"
    apply_chat_template: bool = False
    batch_tokens: int = 32768
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.temperature <= 0 or self.max_response_tokens < 1:
            raise ConfigError(
                f"sampling: expected temperature > 0 and at least one response token, got {self.temperature} and {self.max_response_tokens}"
            )


def read_prompts(path, input_key: str = "prompt", label_key: str = "label") -> list[dict]:
    """[{"prompt": str or list of chat messages, "label": ..., "line": n}] of a JSONL or parquet file.

    Raises DataError naming the line when a row is no object, lacks the key or has an empty prompt, and when the file has no row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"prompt file {path}: no such file")
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"prompt file {path}: cannot be read as parquet ({str(error).splitlines()[0][:160]})") from error
    else:
        rows = []
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"prompt file {path}: expected UTF-8 text ({error})") from error
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a prompt
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"prompt file {path}, line {number}: no JSON ({error})") from error
    prompts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get(input_key):
            raise DataError(f"prompt file {path}, row {number}: expected an object with a non-empty {input_key!r}")
        prompts.append({"prompt": row[input_key], "label": row.get(label_key), "line": number - 1})
    if not prompts:
        raise DataError(f"prompt file {path}: no prompt in it")
    return prompts


def choose_prompts(prompts: list[dict], config: SamplingConfig) -> list[dict]:
    """The first num_contexts prompts, or a seeded random choice in file order."""
    count = config.num_contexts
    if count is None or count >= len(prompts):
        return prompts
    if config.sample == "random":
        return [prompts[i] for i in sorted(random.Random(config.seed).sample(range(len(prompts)), count))]
    return prompts[:count]


def drop_trained(prompts: list[dict], trained: list[dict]) -> list[dict]:
    """`prompts` without those that `trained` holds too (compared as text without outer spaces). DataError when none is left."""
    known = {_prompt_text(p) for p in trained}
    left = [p for p in prompts if _prompt_text(p) not in known]
    if not left:
        raise DataError(f"held-out prompts: all {len(prompts)} also occur among the training prompts")
    return left


def _prompt_text(prompt: dict) -> str:
    text = prompt["prompt"]
    return text.strip() if isinstance(text, str) else json.dumps(text, sort_keys=True)


def encode_prompts(prompts: list[dict], tokenizer, config: SamplingConfig) -> list[list[int]]:
    """Token ids of each prompt. DataError when one is empty or longer than max_prompt_tokens."""
    encoded = []
    for prompt in prompts:
        text = prompt["prompt"]
        if config.apply_chat_template:
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        elif not isinstance(text, str):
            raise DataError(f"prompt row {prompt['line'] + 1} is a list of messages; pass --apply-chat-template")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or (config.max_prompt_tokens and len(ids) > config.max_prompt_tokens):
            raise DataError(f"prompt row {prompt['line'] + 1}: expected 1 to {config.max_prompt_tokens or 'any number of'} tokens, got {len(ids)}")
        encoded.append([int(t) for t in ids])
    return encoded


def sample_bank(
    prompts: list[dict], student: str, config: SamplingConfig, *, log: Callable[[str], None] = lambda line: None
) -> tuple[pd.DataFrame, dict]:
    """(bank, record): one sampled response a chosen prompt. student: an HF model directory (sampled with transformers), or "http://..."
    of an SGLang server, whose tokenizer is read from the model path that it reports.

    Equal seeds give equal banks with transformers on one device. Raises DataError when no response comes back.
    """
    chosen = choose_prompts(prompts, config)
    served = student.startswith(("http://", "https://"))
    if served:
        from ta_opd.fixed_context.server import GenerateClient

        client = GenerateClient(student)
        model_path = client.model_path()
    else:
        model_path = student
    tokenizer = hf.load_tokenizer(model_path, config.trust_remote_code)
    encoded = encode_prompts(chosen, tokenizer, config)
    log(f"sampling {len(encoded)} responses of up to {config.max_response_tokens} tokens from {student}")
    responses = _sample_served(client, encoded, config) if served else _sample_local(student, encoded, tokenizer, config)
    rows = []
    for i, (prompt, ids, response) in enumerate(zip(chosen, encoded, responses, strict=True)):
        rollout = {
            "tokens": ids + response["ids"], "response_length": len(response["ids"]), "sample_index": i, "group_index": prompt["line"],
            "status": "completed" if response["stopped"] else "truncated", "prompt": prompt["prompt"],
            "response": tokenizer.decode(response["ids"]), "label": prompt["label"], "rollout_log_probs": response.get("log_probs"),
        }  # fmt: skip
        rows.append(context_row(rollout, source=str(student), ordinal=i))
    bank = build_bank(rows, max_samples=None)
    record = {
        "source": "sampled", "student": str(model_path), "temperature": config.temperature, "top_p": config.top_p, "seed": config.seed,
        "sample": config.sample, "max_response_tokens": config.max_response_tokens, "apply_chat_template": config.apply_chat_template,
    }  # fmt: skip
    return bank, record


def _sample_served(client, encoded: list[list[int]], config: SamplingConfig) -> list[dict]:
    def one(numbered) -> dict:
        i, ids = numbered
        params = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k,
                  "max_new_tokens": config.max_response_tokens, "skip_special_tokens": False, "sampling_seed": config.seed + i}  # fmt: skip
        reply = client.generate({"input_ids": ids, "sampling_params": params, "return_logprob": True})
        items = reply["meta_info"].get("output_token_logprobs") or []
        stopped = (reply["meta_info"].get("finish_reason") or {}).get("type") == "stop"
        return {"ids": [int(item[1]) for item in items], "log_probs": [item[0] for item in items], "stopped": stopped}

    return list(client.map(one, enumerate(encoded)))


def _sample_local(path: str, encoded: list[list[int]], tokenizer, config: SamplingConfig) -> list[dict]:
    import torch

    device = hf.resolve_device(config.device)
    model = hf.CausalModel.load(path, device=device, dtype=hf.resolve_dtype(config.dtype, device), trust_remote_code=config.trust_remote_code)
    stops = _stop_ids(model.model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
    model.model.generation_config = hf.import_transformers().GenerationConfig()  # its penalties would change the distribution
    torch.manual_seed(config.seed)
    results: list[dict | None] = [None] * len(encoded)
    # Prompts of one length go together, so that no row is padded.
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    options = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": max(config.top_k, 0),
               "max_new_tokens": config.max_response_tokens, "pad_token_id": pad, "eos_token_id": stops or None}  # fmt: skip
    for length, which in sorted(by_length.items()):
        at_once = max(1, config.batch_tokens // (length + config.max_response_tokens))
        for start in range(0, len(which), at_once):
            group = which[start : start + at_once]
            ids = torch.as_tensor(np.asarray([encoded[i] for i in group], np.int64), device=device)
            with torch.inference_mode():
                out = model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            for i, row in zip(group, out[:, length:].tolist(), strict=True):
                end = next((n + 1 for n, token in enumerate(row) if token in stops), None)
                results[i] = {"ids": row[:end] if end else row, "stopped": end is not None}
    model.free()
    return results


def _stop_ids(model, tokenizer) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = configured if isinstance(configured, (list, tuple)) else [configured]
    return list(dict.fromkeys(int(t) for t in (*stops, tokenizer.eos_token_id) if t is not None))
