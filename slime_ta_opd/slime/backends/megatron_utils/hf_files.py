"""Reading and writing HF model directories tensor by tensor: a model never has to fit in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slime.backends.megatron_utils.hf_config import read_config
from ta_opd.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# files of an HF directory that are not weights and belong to any model saved from it
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


# bytes read through one mapping before it is dropped: what was read stays resident as long as its mapping
MAPPED_BYTES = 2**30
# room for the header of a safetensors file that is written as a stream; blanks after the header are part of the format
HEADER_BYTES = 2 * 2**20
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class HFReader:
    """Tensors of an HF safetensors directory by name. Files are mapped, not read as a whole, one at a time.

    Raises DataError where the directory holds no safetensors, or where the index names a missing file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path}: expected an HF model directory, which does not exist")
        self._file_of = self._index()
        self._opened: tuple[str, safe_open] | None = None
        self._left = 0

    def _index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            try:
                weight_map = json.loads((self.path / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{self.path / INDEX}: expected JSON with a weight_map, got something else: {error!r}") from error
            missing = sorted({f for f in weight_map.values() if not (self.path / f).is_file()})
            if missing:
                raise DataError(f"{self.path}: {INDEX} names files that are not there: {', '.join(missing)}")
            return weight_map
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{self.path}: expected safetensors weights ({SINGLE} or {INDEX}), found none")
        names = {}
        for file in files:
            names.update(dict.fromkeys(_open(file).keys(), file.name))
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
        if self._opened is None or self._opened[0] != file or self._left < 0:
            self._opened, self._left = (file, _open(self.path / file)), MAPPED_BYTES
        try:
            part = self._opened[1].get_slice(name)
        except SafetensorError as error:
            raise DataError(f"{self.path}: {INDEX} says that {name!r} is in {file}, which does not hold it") from error
        self._left -= math.prod(part.get_shape()) * 2
        return part

    def get(self, name: str) -> torch.Tensor:
        return self.slice(name)[:]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())


def _open(file: Path) -> safe_open:
    """Raises DataError where the file is not a whole safetensors file."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read as safetensors ({error}); an incomplete download? Fetch it again") from error


class HFWriter:
    """Writes an HF directory tensor by tensor, in files of at most `shard_bytes` (and one tensor); `close` writes the index.

    Nothing is held back: a file's header goes into room left at its start. Writes into `<path>.partial` and renames at the end, so that a crash never leaves a directory that looks complete.
    """

    def __init__(self, path: str | Path, shard_bytes: int = 5 * 2**30):
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._file = None
        self._header: dict[str, dict] = {}
        self._header_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        line = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        room = len(json.dumps({name: line})) + 64
        held = 0 if self._file is None else self._file.tell() - HEADER_BYTES
        if self._header and (held + size > self.shard_bytes or self._header_bytes + room > HEADER_BYTES - 64):
            self._flush()
            held = 0
        if self._file is None:
            self._file = open(self.partial / f"shard-{len(self._shards)}", "wb")
            self._file.seek(HEADER_BYTES)
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._file)
        self._header[name] = {**line, "data_offsets": [held, held + size]}
        self._header_bytes += room
        self.total_bytes += size

    def _flush(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}).encode()
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
        self._file.close()
        self._shards.append(list(self._header))
        self._file, self._header, self._header_bytes = None, {}, 0

    def close(self, origin: str | Path, dtype: torch.dtype) -> None:
        """Names the shards, writes the index, copies config and tokenizer files of `origin`, and puts all in place."""
        if self._header:
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
