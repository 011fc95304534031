"""Reading and writing HF model directories tensor by tensor: a model never has to fit in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slime.backends.megatron_utils.hf_config import read_config
from ta_opd.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# files of an HF directory that are not weights and belong to any model saved from it
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


class HFReader:
    """Tensors of an HF safetensors directory by name. Files are opened once and mapped, not read as a whole.

    Raises DataError where the directory holds no safetensors, or where the index names a missing file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path}: expected an HF model directory, which does not exist")
        self._file_of = self._index()
        self._open: dict[str, safe_open] = {}

    def _index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            weight_map = json.loads((self.path / INDEX).read_text())["weight_map"]
            missing = sorted({f for f in weight_map.values() if not (self.path / f).is_file()})
            if missing:
                raise DataError(f"{self.path}: {INDEX} names files that are not there: {', '.join(missing)}")
            return weight_map
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{self.path}: expected safetensors weights ({SINGLE} or {INDEX}), found none")
        names = {}
        for file in files:
            with safe_open(file, "pt") as f:
                names.update(dict.fromkeys(f.keys(), file.name))
        return names

    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def slice(self, name: str):
        """A safetensors slice: `get_shape()`, and indexing that reads only the asked part. DataError if missing."""
        file = self._file_of.get(name)
        if file is None:
            raise DataError(f"{self.path}: tensor {name!r} is missing; the directory is incomplete or of another model type")
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, "pt")
        return self._open[file].get_slice(name)

    def get(self, name: str) -> torch.Tensor:
        return self.slice(name)[:]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())


class HFWriter:
    """Writes an HF directory shard by shard: a shard is flushed when it reaches `shard_bytes`; `close` writes the index.

    Writes into `<path>.partial` and renames at the end, so that a crash never leaves a directory that looks complete.
    """

    def __init__(self, path: str | Path, shard_bytes: int = 5 * 2**30):
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous().clone()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self.partial / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self, origin: str | Path, dtype: torch.dtype) -> None:
        """Names the shards, writes the index, copies config and tokenizer files of `origin`, and puts all in place."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            os.replace(self.partial / "shard-0", self.partial / SINGLE)
        else:
            weight_map = {}
            for i, names in enumerate(self._shards):
                file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
                os.replace(self.partial / f"shard-{i}", self.partial / file)
                weight_map.update(dict.fromkeys(names, file))
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2))
        copy_side_files(origin, self.partial, dtype)
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)


def copy_side_files(origin: str | Path, target: str | Path, dtype: torch.dtype) -> None:
    """Copies config, generation and tokenizer files; config.json gets the dtype that the weights are written in."""
    for file in sorted(Path(origin).iterdir()):
        if file.is_file() and file.suffix in SIDE_SUFFIXES and not file.name.endswith("safetensors.index.json"):
            if file.name != "config.json":
                shutil.copy2(file, Path(target) / file.name)
    config = read_config(origin)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    (Path(target) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def missing_tensors(reader: HFReader, expected: Iterable[str]) -> list[str]:
    return [name for name in expected if name not in reader]
