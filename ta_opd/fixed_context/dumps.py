"""Rollouts on disk, whoever wrote them, as one dict a response.

Formats: this project's parquet dumps (one row a response, list columns), torch `.pt` dumps of `--save-debug-rollout-data` (read with
weights_only: nothing in the file can run code), and token banks joined with a dump that holds their prompts.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ta_opd.errors import DataError
from ta_opd.token_bank import read_bank

KEYS = (
    "rollout_id", "sample_index", "group_index", "status", "prompt", "response", "label", "tokens", "response_length", "loss_mask",
    "rollout_log_probs", "teacher_log_probs",
)  # fmt: skip


def dump_files(sources: Sequence[str], *, released_order: bool = False) -> list[Path]:
    """The dump files named by paths, globs and folders, each once.

    Order: numbers in names as numbers (rollout 2 before rollout 10), or with `released_order` plain text order. Raises DataError when a
    source matches nothing.
    """
    files: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix in (".pt", ".parquet")]
        else:
            names = glob.glob(str(source)) or glob.glob(re.sub(r"\.pt$", ".parquet", str(source)))  # where slime would have written .pt
            found = [Path(name) for name in names]
        if not found:
            raise DataError(f"rollout dumps: nothing matches {source!r}; expected .pt or .parquet files, a folder of them, or a glob")
        files |= dict.fromkeys(p.resolve() for p in found)
    return sorted(files, key=(lambda p: str(p)) if released_order else _natural)


def _natural(path: Path) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def read_dump(path: Path) -> Iterator[dict]:
    """One dict of KEYS a response of one dump file, in file order. Raises DataError on a file that cannot be read or is no dump."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".pt":
        yield from _read_torch(path)
    else:
        raise DataError(f"rollout dump {path}: expected a .pt or .parquet file")


def _read_parquet(path: Path) -> Iterator[dict]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"rollout dump {path}: cannot be read ({str(error).splitlines()[0][:160]}); is it cut off?") from error
    if rows and "tokens" not in rows[0]:
        raise DataError(f"rollout dump {path}: expected a column `tokens`, got {', '.join(rows[0])}")
    for row in rows:
        yield {key: row.get(key) for key in KEYS}


def _read_torch(path: Path) -> Iterator[dict]:
    content = _load_torch(path)
    if not isinstance(content, dict) or not isinstance(content.get("samples"), (list, tuple)):
        raise DataError(f"rollout dump {path}: expected a dict with a list of `samples`")
    for sample in content["samples"]:
        if not isinstance(sample, dict):
            raise DataError(f"rollout dump {path}: expected every sample as a dict, got {type(sample).__name__}")
        row = {key: sample.get(key) for key in KEYS}
        row["sample_index"] = sample.get("index", sample.get("sample_index"))
        row["rollout_id"] = content.get("rollout_id", sample.get("rollout_id"))
        row["status"] = str(row["status"]).rsplit(".", 1)[-1].lower() if row["status"] is not None else None
        yield {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def _load_torch(path: Path):
    import torch

    # What numpy arrays in a pickle need; none of these runs code of the file's choosing.
    safe = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar]
    safe += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"rollout dump {path}: cannot be read safely ({str(error).splitlines()[0][:160]}); "
            "only plain Python data, tensors and numpy arrays are accepted"
        ) from error


def bank_rollouts(bank_dir, prompts: Sequence[dict]) -> Iterator[dict]:
    """Responses of a token bank, whose rows hold the sampled tokens, with their prompts taken from `prompts` by sample_index.

    prompts: dicts with sample_index and either `tokens` (prompt + response) or `prompt_tokens`, and optionally the text fields of KEYS. The
    loss mask, student and teacher log-probs are the bank's. Raises DataError when a sample has no prompt, a gap, or other tokens.
    """
    columns = ["rollout_id", "sample_index", "group_index", "tok_pos", "prompt_len", "truncated", "token_id",
               "student_logp_sampled", "teacher_logp_sampled", "loss_mask_original"]  # fmt: skip
    table = read_bank(bank_dir, columns=columns)
    by_sample = {int(p["sample_index"]): p for p in prompts if p.get("sample_index") is not None}
    for (rollout, sample), part in table.groupby(["rollout_id", "sample_index"], sort=False):
        part = part.sort_values("tok_pos")
        response = part["token_id"].astype(int).tolist()
        if part["tok_pos"].tolist() != list(range(len(part))):
            raise DataError(f"token bank {bank_dir}: sample {sample} of rollout {rollout} has repeated or missing positions")
        source = by_sample.get(int(sample))
        if source is None:
            raise DataError(f"token bank {bank_dir}: no prompt for sample {sample}; a bank holds no prompts, give the rollout dumps too")
        prompt = _prompt_tokens(source, int(part["prompt_len"].iloc[0]), response, sample)
        yield {
            "rollout_id": int(rollout), "sample_index": int(sample), "group_index": _integer(part["group_index"].iloc[0]),
            "status": "truncated" if part["truncated"].iloc[0] else "completed", "prompt": source.get("prompt"),
            "response": source.get("response"), "label": source.get("label"), "tokens": prompt + response,
            "response_length": len(response), "loss_mask": part["loss_mask_original"].fillna(1).astype(int).tolist(),
            "rollout_log_probs": part["student_logp_sampled"].tolist(), "teacher_log_probs": part["teacher_logp_sampled"].tolist(),
        }  # fmt: skip


def _prompt_tokens(source: dict, prompt_len: int, response: list[int], sample) -> list[int]:
    if source.get("prompt_tokens") is not None:
        prompt = [int(t) for t in source["prompt_tokens"]]
    else:
        tokens = [int(t) for t in source.get("tokens") or ()]
        prompt = tokens[:prompt_len]
        if tokens[prompt_len:] != response:
            raise DataError(f"token bank: sample {sample} of the dump holds another response than the bank; are they of one run?")
    if len(prompt) != prompt_len:
        raise DataError(f"token bank: sample {sample} has a prompt of {len(prompt)} tokens in the dump and {prompt_len} in the bank")
    return prompt


def _integer(value):
    return None if value is None or pd.isna(value) else int(value)
