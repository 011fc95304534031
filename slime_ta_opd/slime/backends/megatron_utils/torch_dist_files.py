"""torch_dist checkpoint files read and written tensor by tensor, without process groups and without a model in memory.

The format is that of torch.distributed.checkpoint: `.metadata` (a pickle) says for each chunk of each tensor in which
`*.distcp` file, at which offset, a torch.save of it lies.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from slime.backends.megatron_utils.untrusted import read_metadata
from ta_opd.errors import DataError

_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


class TorchDistReader:
    """Tensors of one checkpoint directory (`iter_*` or `release`). Raises DataError where it is not one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / ".metadata").is_file() or not (self.path / "common.pt").is_file():
            raise DataError(f"{path}: expected a torch_dist checkpoint with .metadata and common.pt, found none")
        self._metadata = read_metadata(self.path)
        entries = self._metadata.state_dict_metadata
        self._tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self._where: dict[str, dict[torch.Size, _StorageInfo]] = {}
        for index, info in self._metadata.storage_data.items():
            if index.offset is not None:
                self._where.setdefault(index.fqn, {})[torch.Size(index.offset)] = info

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise DataError(f"{self.path}: tensor {key!r} is missing; the checkpoint is of another model or incomplete")
        return self._tensors[key]

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor, or with `index` its part at these leading indices (a layer or expert of a stacked tensor)."""
        entry = self._entry(key)
        lead, size = len(index), tuple(entry.size)
        if lead > len(size) or any(i >= s for i, s in zip(index, size, strict=False)):
            raise DataError(f"{self.path}: {key} of shape {size} has no part {index}")
        out = torch.empty(size[lead:], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            inside = all(o <= i < o + s for i, o, s in zip(index, chunk.offsets, chunk.sizes, strict=False))
            if not inside:
                continue
            data = self._load(key, chunk)
            part = data[tuple(i - o for i, o in zip(index, chunk.offsets, strict=False))]
            target = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True))
            out[target] = part
            filled += part.numel()
        if filled != out.numel():
            raise DataError(f"{self.path}: {key}{list(index)} holds {filled} of {out.numel()} elements; the checkpoint is incomplete")
        return out

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._where.get(key, {}).get(torch.Size(chunk.offsets))
        if info is None or not (self.path / info.relative_path).is_file():
            raise DataError(f"{self.path}: the file that holds {key} at {tuple(chunk.offsets)} is missing")
        try:
            with open(self.path / info.relative_path, "rb") as file:
                return torch.load(_Window(file, info.offset, info.length), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self.path / info.relative_path}: {key} cannot be read ({reason}); the file is cut off or damaged") from error


class _Window:
    """A read-only, seekable view of part of a file, as torch.load wants it."""

    def __init__(self, file, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._at
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self) -> bytes:
        raise OSError("not a text file")


class TorchDistWriter:
    """Writes one checkpoint directory: `add` each tensor (or each part of a stacked one), then `close`."""

    def __init__(self, path: str | Path, file_bytes: int = 2 * 2**30):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._file_bytes = file_bytes
        self._names = (f"__0_{i}.distcp" for i in itertools.count())
        self._file = None
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._where: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, tensor: Tensor, global_shape: tuple[int, ...] | None = None, offset: tuple[int, ...] = ()) -> None:
        """A whole tensor, or one part of `global_shape` that starts at `offset` (the part has all its dimensions)."""
        shape = torch.Size(global_shape or tensor.shape)
        offset = torch.Size(offset or (0,) * tensor.dim())
        tensor = tensor.detach().cpu().contiguous().clone()
        if key not in self._tensors:
            properties = TensorProperties.create_from_tensor(tensor)
            self._tensors[key] = TensorStorageMetadata(properties=properties, size=shape, chunks=[])
        self._tensors[key].chunks.append(ChunkStorageMetadata(offsets=offset, sizes=tensor.shape))
        if self._file is None or self._file.tell() >= self._file_bytes:
            self._next_file()
        start = self._file.tell()
        try:
            torch.save(tensor, self._file)
        except RuntimeError as error:  # torch's complaint about its archive hides why it could not be written
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        info = _StorageInfo(relative_path=self._name, offset=start, length=self._file.tell() - start)
        self._where[MetadataIndex(key, offset)] = info

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._name = next(self._names)
        self._file = open(self.path / self._name, "wb")

    def close(self, common: dict) -> None:
        """Writes `.metadata`, `common.pt` and `metadata.json`."""
        if self._file is not None:
            self._file.close()
        metadata = Metadata(
            state_dict_metadata=self._tensors, planner_data=None, storage_data=self._where, storage_meta=StorageMeta()
        )
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save(common, self.path / "common.pt")
        (self.path / "metadata.json").write_text(json.dumps(_CONFIG))
