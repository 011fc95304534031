"""A Sample as plain lists, numbers, text and bytes, and back: what a checkpoint may hold and be read from without running code.

Metadata of a prompt may be anything that its file holds (a date of a parquet file, say): what is not plain becomes its text.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from slime.utils.types import Sample
from ta_opd.topk import TopK

_PLAIN = {int, float, str, bool, type(None)}  # of lists as long as a response
_MARKS = {"__array__", "__topk__", "__status__", "__bytes__", "__dict__"}


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # no empty bytes: torch's reader of checkpoints refuses them
        return {"__array__": [value.dtype.str, list(value.shape), value.tobytes() if value.size else None]}
    if isinstance(value, TopK):
        return {"__topk__": [_pack(value.ids), _pack(value.logprobs)]}
    if isinstance(value, Sample.Status):
        return {"__status__": value.value}
    if isinstance(value, (bytes, bytearray)):
        return {"__bytes__": value.hex()}
    if isinstance(value, dict):
        items = {str(k): _pack(v) for k, v in value.items()}
        return {"__dict__": items} if _MARKS & items.keys() else items
    if isinstance(value, (list, tuple)):
        return list(value) if _PLAIN.issuperset(map(type, value)) else [_pack(v) for v in value]
    if isinstance(value, np.generic):
        return _pack(value.item())
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            dtype, shape, data = value["__array__"]
            return np.frombuffer(data, dtype).reshape(shape).copy() if data else np.empty(shape, dtype)
        if "__topk__" in value:
            return TopK(*(_unpack(v) for v in value["__topk__"]))
        if "__status__" in value:
            return Sample.Status(value["__status__"])
        if "__bytes__" in value:
            return bytes.fromhex(value["__bytes__"])
        return {k: _unpack(v) for k, v in value.get("__dict__", value).items()}
    if isinstance(value, list):
        return list(value) if _PLAIN.issuperset(map(type, value)) else [_unpack(v) for v in value]
    return value


def sample_to_state(sample: Sample) -> dict[str, Any]:
    return {f.name: _pack(getattr(sample, f.name)) for f in fields(sample)}


def sample_from_state(state: dict[str, Any]) -> Sample:
    known = {f.name for f in fields(Sample)}
    return Sample(**{k: _unpack(v) for k, v in state.items() if k in known})
