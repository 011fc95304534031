"""Prompt files from public data sets: one form (prompt, label), duplicates removed, a held-out part split off with recorded indices."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ta_opd.errors import ConfigError, DataError

Prompt = str | list[dict[str, str]]


@dataclass
class PromptSet:
    """Prompts with answers, in source order. `origin[i]` is the row of the source that line i came from."""

    prompts: list[Prompt] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    rows_read: int = 0
    duplicates: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, indices: Sequence[int]) -> PromptSet:
        return PromptSet(
            [self.prompts[i] for i in indices], [self.labels[i] for i in indices], [self.origin[i] for i in indices],
            self.rows_read, self.duplicates, self.skipped,
        )  # fmt: skip


def read_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of JSONL, JSON-array and parquet files in order. Raises DataError with file and line."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"source {path}: expected a JSONL, JSON or parquet file, which does not exist")
        if path.suffix in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            try:
                for batch in pq.ParquetFile(path).iter_batches():
                    yield from batch.to_pylist()
            except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
                raise DataError(f"source {path}: cannot be read as parquet ({error}); is it cut off?") from None
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"source {path}: expected UTF-8 text ({error})") from None
        if path.suffix == ".json" and text.lstrip().startswith("["):
            try:
                yield from json.loads(text)
            except ValueError as error:
                raise DataError(f"source {path}: expected a JSON array ({error})") from None
            continue
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 inside a text
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"source {path} line {number}: expected a JSON object, got {line[:60]!r} ({error})") from None


def look_up(row: dict[str, Any], key: str) -> Any:
    """Value of a dotted key ("reward_model.ground_truth"). Raises DataError that lists the keys there are."""
    value: Any = row
    for part in key.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise DataError(f"expected key {key!r}, got a row with {', '.join(map(str, row)) or 'no key'}")
    return value


def dapo(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """DAPO-Math-17k: the user's message and the ground truth of the reward model."""
    return look_up(row, "prompt.0.content"), str(look_up(row, "reward_model.ground_truth"))


def gsm8k(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """GSM8K: the question, and the number after ####."""
    answer = look_up(row, "answer")
    found = re.search(r"####\s*(\S+)", answer)
    if not found:
        raise DataError(f"expected '#### number' at the end of a GSM8K answer, got {answer[-40:]!r}")
    return look_up(row, "question"), found[1].replace(",", "")


def lm_eval_log(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """A line of the harness's sample log: the prompt as the model saw it, and the target."""
    arguments = look_up(row, "arguments")
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    prompt = next(iter(first.values())) if isinstance(first, dict) else first[0]
    target = row.get("target")
    return prompt, None if target is None else re.sub(r"(?s).*####\s*", "", str(target)).strip().replace(",", "")


def chat(prompt_key: str, label_key: str) -> Callable[[dict[str, Any]], tuple[Prompt, str | None]]:
    """Any data set with a string or a list of messages under `prompt_key`; the last answer of a conversation is cut off."""

    def read(row: dict[str, Any]) -> tuple[Prompt, str | None]:
        value = look_up(row, prompt_key)
        if isinstance(value, list):
            value = [{"role": _role(m), "content": m.get("content", m.get("value"))} for m in value]
            while value and value[-1]["role"] == "assistant":
                value.pop()
        label = look_up(row, label_key) if label_key else None
        return value, None if label is None else str(label)

    return read


def _role(message: dict[str, Any]) -> str:
    role = message.get("role", message.get("from"))
    return {"human": "user", "gpt": "assistant"}.get(role, role)


def collect(rows: Iterable[dict[str, Any]], read: Callable[[dict[str, Any]], tuple[Prompt, str | None]]) -> PromptSet:
    """All prompts once, by their text without outer white space; empty ones are skipped and counted. Raises DataError with the row."""
    out, seen = PromptSet(), set()
    for number, row in enumerate(rows):
        out.rows_read += 1
        try:
            prompt, label = read(row)
        except (DataError, AttributeError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"source row {number}: {error}") from None
        key = _key(prompt)
        if not key:
            out.skipped += 1
        elif key in seen:
            out.duplicates += 1
        else:
            seen.add(key)
            out.prompts.append(prompt)
            out.labels.append(label)
            out.origin.append(number)
    if not out.prompts:
        raise DataError(f"expected at least one prompt, got none in {out.rows_read} rows")
    return out


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    if not prompt or not all(isinstance(m.get("content"), str) and m.get("role") for m in prompt):
        return ""
    return json.dumps([[m["role"], m["content"].strip()] for m in prompt])


def split(prompts: PromptSet, heldout: int, seed: int, *, second_half: bool = False) -> tuple[list[int], list[int]]:
    """(training indices, held-out indices), both sorted and disjoint.

    `second_half` draws the held-out part from the second half of the file with Python's generator, as the released drivers do (the same
    lines for the same file and seed); there they were trained on as well, here never. Raises ConfigError when too few prompts are left.
    """
    pool = range(len(prompts) // 2 if second_half else 0, len(prompts))
    if heldout < 0 or heldout > len(pool) or heldout >= len(prompts):
        raise ConfigError(f"HELDOUT={heldout}: expected at most {min(len(pool), len(prompts) - 1)} of {len(prompts)} prompts, so that some are left")
    chosen = sorted(random.Random(seed).sample(pool, heldout))
    taken = set(chosen)
    return [i for i in range(len(prompts)) if i not in taken], chosen


def write(prompts: PromptSet, path: Path, *, as_messages: bool = False) -> None:
    """One JSON object a line with `prompt` and, where known, `label`; parquet by suffix. The whole file or nothing."""
    rows = []
    for prompt, label in zip(prompts.prompts, prompts.labels, strict=True):
        if as_messages and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        rows.append({"prompt": prompt} | ({} if label is None else {"label": label}))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(dict.fromkeys(name for row in rows for name in row))  # the first row alone would name the columns
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), partial)
    else:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


def record(path: Path, prompts: PromptSet, sources: Sequence[Path], heldout: Sequence[int], seed: int, second_half: bool) -> None:
    """Beside the training file: where it came from and which lines were held out."""
    path.write_text(json.dumps({
        "sources": {str(s): hashlib.sha256(s.read_bytes()).hexdigest() for s in sources},
        "rows_read": prompts.rows_read, "duplicates": prompts.duplicates, "skipped": prompts.skipped, "prompts": len(prompts),
        "heldout_seed": seed, "heldout_from": "second half" if second_half else "anywhere",
        "heldout_indices": list(heldout), "heldout_source_rows": [prompts.origin[i] for i in heldout],
    }, indent=1) + "\n")  # fmt: skip
