"""The context bank: one row a student-written response, frozen so that every checkpoint is scored on the same positions."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.dumps import bank_rollouts, dump_files, read_dump
from ta_opd.fixed_context.tables import read_meta, read_table, write_table

COLUMNS = (
    "source_file", "rollout_id", "sample_ordinal", "sample_index", "group_index", "status", "prompt_len", "resp_len", "total_len",
    "truncated", "prompt", "response", "label", "tokens", "response_token_ids", "loss_mask", "rollout_log_probs", "teacher_log_probs",
    "prompt_id",
)  # fmt: skip
JSON_COLUMNS = ("tokens", "response_token_ids", "loss_mask", "rollout_log_probs", "teacher_log_probs")
SAMPLING = ("first", "random")


def context_row(rollout: dict, *, source: str, ordinal: int) -> dict | None:
    """One bank row from a response (dict of `dumps.KEYS`), or None when it has no tokens or no response.

    Lists become JSON text ("" when absent), as in the released banks; `prompt_id` names the prompt's tokens, so that responses to one
    prompt form one cluster whatever their indices. Raises DataError when the response is longer than the tokens, or a per-token list has
    another length than the response.
    """
    tokens = rollout.get("tokens")
    length = rollout.get("response_length")
    if tokens is None or len(tokens) == 0 or not length:
        return None
    tokens, length = [int(t) for t in tokens], int(length)
    prompt_len = len(tokens) - length
    if prompt_len < 0:
        raise DataError(f"{source}, response {ordinal}: response_length {length} exceeds the {len(tokens)} tokens")
    per_token = {name: _per_token(rollout.get(name), length, name, source, ordinal) for name in JSON_COLUMNS[2:]}
    per_token["loss_mask"] = per_token["loss_mask"] or json.dumps([1] * length)
    prompt = rollout.get("prompt")
    status = rollout.get("status") or ""
    return {
        "source_file": source, "rollout_id": rollout.get("rollout_id"), "sample_ordinal": ordinal,
        "sample_index": rollout.get("sample_index"), "group_index": rollout.get("group_index"), "status": status,
        "prompt_len": prompt_len, "resp_len": length, "total_len": len(tokens), "truncated": status == "truncated",
        "prompt": prompt if isinstance(prompt, str) or prompt is None else json.dumps(prompt, ensure_ascii=False),
        "response": rollout.get("response"), "label": None if rollout.get("label") is None else str(rollout["label"]),
        "tokens": json.dumps(tokens), "response_token_ids": json.dumps(tokens[prompt_len:]), **per_token,
        "prompt_id": hashlib.sha1(json.dumps(tokens[:prompt_len]).encode()).hexdigest()[:16],
    }  # fmt: skip


def _per_token(values, length: int, name: str, source: str, ordinal: int) -> str:
    if values is None or (hasattr(values, "__len__") and len(values) == 0):
        return ""
    if len(values) != length:
        raise DataError(f"{source}, response {ordinal}: {name} has {len(values)} values for a response of {length} tokens")
    # NaN is no JSON; an unknown log-prob is null.
    return json.dumps([None if v is None or v != v else (int(v) if name == "loss_mask" else float(v)) for v in values])


def build_bank(rows: Iterable[dict | None], *, max_samples: int | None, sample: str = "first", seed: int = 42) -> pd.DataFrame:
    """The bank table from context rows: the first `max_samples` with a response, or a seeded random choice in their original order.

    Raises ConfigError on an unknown way to sample, DataError when no row has a response.
    """
    if sample not in SAMPLING:
        raise ConfigError(f"bank sampling: expected {' or '.join(SAMPLING)}, got {sample!r}")
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max samples: expected 1 or more, got {max_samples}")
    kept: list[dict] = []
    for row in rows:
        if row is None:
            continue
        kept.append(row)
        if sample == "first" and len(kept) == max_samples:
            break
    if not kept:
        raise DataError("context bank: no response with tokens in the input")
    if sample == "random" and max_samples is not None and len(kept) > max_samples:
        kept = [kept[i] for i in sorted(random.Random(seed).sample(range(len(kept)), max_samples))]
    return pd.DataFrame(kept, columns=list(COLUMNS))


def export_from_dumps(
    sources: Sequence[str], *, max_samples: int | None = None, sample: str = "first", seed: int = 42, released_order: bool = False
) -> pd.DataFrame:
    """A bank from rollout dumps (paths, globs or folders). `sample_ordinal` is the response's place in its file, as released."""
    rows = (
        context_row(rollout, source=str(path), ordinal=ordinal)
        for path in dump_files(sources, released_order=released_order)
        for ordinal, rollout in enumerate(read_dump(path))
    )
    return build_bank(rows, max_samples=max_samples, sample=sample, seed=seed)


def export_from_token_bank(
    bank_dir: str, prompt_sources: Sequence[str], *, max_samples: int | None = None, sample: str = "first", seed: int = 42
) -> pd.DataFrame:
    """A bank from a token bank (sampled tokens, masks, log-probs) and the rollout dumps of the same run (prompts)."""
    prompts = [rollout for path in dump_files(prompt_sources) for rollout in read_dump(path)]
    rows = (context_row(rollout, source=str(bank_dir), ordinal=i) for i, rollout in enumerate(bank_rollouts(bank_dir, prompts)))
    return build_bank(rows, max_samples=max_samples, sample=sample, seed=seed)


def write_bank(path, bank: pd.DataFrame, meta: dict) -> Path:
    """Writes the bank with how it was made (`meta`: source, sampling, seed, model...) and its fingerprint."""
    return write_table(path, bank, {"kind": "context_bank", "contexts": len(bank), "fingerprint": fingerprint(bank), **meta})


def fingerprint(bank: pd.DataFrame) -> str:
    """A short name of the bank's contexts: its tokens, prompt lengths and order."""
    digest = hashlib.sha256()
    for tokens, length in zip(bank["tokens"], bank["prompt_len"], strict=True):
        digest.update(f"{length}:{tokens}\n".encode())
    return digest.hexdigest()[:16]


class Contexts:
    """A bank as arrays, ready to score.

    tokens: list of int64 arrays (prompt and the response cut to `max_response_tokens`); prompt_len, resp_len [N] (resp_len: full length),
    scored_len [N]: positions to score; loss_mask: list of int8 arrays [scored_len]; frame: the bank's rows; meta: its record.
    """

    def __init__(self, frame: pd.DataFrame, meta: dict, max_response_tokens: int | None):
        self.frame, self.meta = frame.reset_index(drop=True), meta
        self.fingerprint = fingerprint(frame)
        self.prompt_len = frame["prompt_len"].to_numpy(np.int64)
        self.resp_len = frame["resp_len"].to_numpy(np.int64)
        limit = max_response_tokens or int(self.resp_len.max())
        self.scored_len = np.minimum(self.resp_len, limit)
        self.tokens, self.loss_mask = [], []
        for row, (tokens, mask) in enumerate(zip(frame["tokens"], frame["loss_mask"], strict=True)):
            ids = np.asarray(_json_list(tokens, "tokens", row), np.int64)
            if len(ids) != self.prompt_len[row] + self.resp_len[row]:
                raise DataError(
                    f"context bank, row {row}: expected {self.prompt_len[row]} + {self.resp_len[row]} tokens, got {len(ids)}"
                )
            if self.prompt_len[row] < 1:
                raise DataError(f"context bank, row {row}: the prompt is empty, so the first response token has no context")
            ones = np.ones(self.resp_len[row], np.int8)
            full_mask = ones if not isinstance(mask, str) or mask == "" else np.asarray(_json_list(mask, "loss_mask", row), np.int8)
            self.tokens.append(ids[: self.prompt_len[row] + self.scored_len[row]])
            self.loss_mask.append(full_mask[: self.scored_len[row]])

    def __len__(self) -> int:
        return len(self.tokens)

    def max_token(self) -> int:
        return max(int(ids.max()) for ids in self.tokens)


def load_contexts(path, *, max_samples: int | None = None, max_response_tokens: int | None = None) -> Contexts:
    """The bank at `path`, its first `max_samples` rows. Raises DataError when it is no bank, is cut off, or its rows do not add up."""
    frame = read_table(path)
    missing = [name for name in ("tokens", "prompt_len", "resp_len") if name not in frame]
    if missing:
        raise DataError(f"context bank {path}: expected the columns {', '.join(missing)}; was it written by export_fixed_context_bank?")
    if "loss_mask" not in frame:
        frame["loss_mask"] = ""
    return Contexts(frame if max_samples is None else frame.head(max_samples), read_meta(path), max_response_tokens)


def _json_list(text, name: str, row: int) -> list:
    try:
        return json.loads(text) if isinstance(text, str) else list(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"context bank, row {row}: {name} is no JSON list ({str(text)[:40]!r})") from error
