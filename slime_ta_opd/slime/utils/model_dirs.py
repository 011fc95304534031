"""Looks at a Hugging Face model directory before anything is started: its config, tokenizer files, and whether its weights are whole.

Only headers are read, so that this costs milliseconds for any model. What is wrong here would otherwise end a server or a rank minutes later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ta_opd.errors import ConfigError

INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenization_*.py")
LFS = b"version https://git-lfs"
AGAIN = "an interrupted download? Fetch the model again"


def read_model_config(path: str | None, flag: str) -> dict[str, Any]:
    """config.json of a model directory. Raises ConfigError where there is no such directory, no config, or no JSON object in it."""
    if not path:
        raise ConfigError(f"{flag}: expected an HF model directory, got nothing")
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise ConfigError(f"{flag}: expected an HF model directory, got {path!r}, which does not exist")
    if not file.is_file():
        raise ConfigError(f"{flag}: {path!r} holds no config.json; expected an HF model directory")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{flag}: {file} is not JSON ({error}); {AGAIN}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{flag}: {file}: expected a JSON object, got {type(config).__name__}")
    return config


def check_tokenizer_files(path: str, flag: str) -> None:
    """ConfigError where a directory has no tokenizer: transformers would make an empty one of it and say nothing."""
    if not any(True for pattern in TOKENIZERS for _ in Path(path).glob(pattern)):
        raise ConfigError(f"{flag}: {path!r} holds no tokenizer ({', '.join(TOKENIZERS[:3])}, ...); copy the files of the model's tokenizer there")


def check_weights(path: str, flag: str) -> None:
    """ConfigError where weights are missing or cut off. Safetensors files are compared with the sizes that their headers give."""
    root = Path(path)
    if (root / INDEX).is_file():
        files = [root / name for name in _shards(root / INDEX, flag)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(f"{flag}: {path!r} lacks {len(missing)} of {len(files)} files of weights, the first {missing[0]!r}; {AGAIN}")
    else:
        files = sorted({file for pattern in OTHER_WEIGHTS for file in root.glob(pattern)})
        if not files:
            raise ConfigError(f"{flag}: {path!r} holds no weights; expected model.safetensors or {INDEX} with its files; {AGAIN}")
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file, flag)


def _shards(index: Path, flag: str) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{flag}: {index} is not an index of weights ({error!r}); {AGAIN}") from error


def _check_safetensors(file: Path, flag: str) -> None:
    """The format: 8 bytes with the header's length, the header in JSON, then the tensors up to the largest end that it names."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(LFS))
        if start == LFS:
            raise ConfigError(f"{flag}: {file} is a Git LFS pointer and not the weights: run git lfs pull in that directory")
        length = int.from_bytes(start[:8], "little")
        opened.seek(8)
        header = opened.read(length) if length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{flag}: {file} is not a readable safetensors file; {AGAIN}") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ConfigError(f"{flag}: {file} is cut off: expected {expected:,} bytes, got {size:,}; {AGAIN}")
