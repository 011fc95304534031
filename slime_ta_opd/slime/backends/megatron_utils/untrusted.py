"""Reading a checkpoint that somebody else may have made, without running code of its choosing.

torch_dist keeps `.metadata`, which torch reads by pickle.load, and objects beside tensors, which it reads with weights_only=False.
Here the first is read through a list of the few types that belong in it, before torch gets to see it, and the second is forced.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ta_opd.errors import DataError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "builtins": {"set", "frozenset"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise DataError(f"asks for {module}.{name}, which no checkpoint needs; reading it could run code")
        return getattr(importlib.import_module(module), name)


def read_metadata(path: str | Path) -> Metadata:
    """What the `.metadata` of a torch_dist checkpoint says. DataError where it holds anything but checkpoint metadata."""
    file = Path(path) / ".metadata"
    try:
        with file.open("rb") as content:
            metadata = _Unpickler(content).load()
    except DataError as error:
        raise DataError(f"{file}: refused: it {error}") from None
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise DataError(f"{file}: not the metadata of a torch_dist checkpoint: {error}") from error
    if not isinstance(metadata, Metadata):
        raise DataError(f"{file}: expected the metadata of a torch_dist checkpoint, got {type(metadata).__name__}")
    return metadata


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """Every torch.load inside is one with weights_only, also where a library asks for less."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    old = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old
