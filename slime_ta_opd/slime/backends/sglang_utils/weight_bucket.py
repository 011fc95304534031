"""A bucket of named tensors as one flat tensor of bytes, in the layout that SGLang's "flattened_bucket" expects."""

from __future__ import annotations

import base64
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

_DEVICE_FIELD = 6  # place of the device index among the arguments that rebuild a CUDA tensor


@dataclass
class Bucket:
    """tensor: uint8 [total bytes]; names, dtypes ("bfloat16"), shapes: of the parts, in their order within it."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    tensor: Tensor


def flatten(named: list[tuple[str, Tensor]], device: str) -> Bucket:
    """Copies the tensors one behind the other; wide dtypes first, so that every part lies on a multiple of its width."""
    named = sorted(named, key=lambda item: -item[1].element_size())
    parts = []
    for _, tensor in named:
        tensor = tensor.detach()
        if device == "cuda" and not tensor.is_cuda:
            tensor = tensor.cuda(non_blocking=True)
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
    return Bucket(
        [name for name, _ in named],
        [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
        [list(tensor.shape) for _, tensor in named],
        torch.cat(parts),
    )


class _CudaHandle:
    """Pickles as the call that opens another process's CUDA memory, with the GPU named by its UUID.

    The number of a GPU differs between processes that see different ones. SGLang accepts a UUID in its place.
    """

    def __init__(self, tensor: Tensor):
        from torch.multiprocessing.reductions import reduce_tensor

        self.function, arguments = reduce_tensor(tensor)
        uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
        self.arguments = (*arguments[:_DEVICE_FIELD], uuid, *arguments[_DEVICE_FIELD + 1 :])

    def __reduce__(self):
        return self.function, self.arguments


def serialize_for_engine(bucket: Bucket) -> str:
    """The bucket for update_weights_from_tensor, base64: CUDA memory by handle, CPU memory by value.

    The memory behind a handle must stay alive until the engine has answered.
    """
    metadata, begin = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        torch_dtype = getattr(torch, dtype)
        size = torch_dtype.itemsize
        for side in shape:
            size *= side
        metadata.append(
            SimpleNamespace(name=name, shape=torch.Size(shape), dtype=torch_dtype, start_idx=begin, end_idx=begin + size, numel=size)
        )
        begin += size
    tensor = _CudaHandle(bucket.tensor) if bucket.tensor.is_cuda else bucket.tensor
    return base64.b64encode(pickle.dumps({"flattened_tensor": tensor, "metadata": metadata})).decode()
