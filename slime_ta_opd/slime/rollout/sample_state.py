"""A Sample as plain lists, numbers and bytes, and back: what a checkpoint may hold and be read from without running code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from slime.utils.types import Sample
from ta_opd.topk import TopK


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__array__": [value.dtype.str, list(value.shape), value.tobytes()]}
    if isinstance(value, TopK):
        return {"__topk__": [_pack(value.ids), _pack(value.logprobs)]}
    if isinstance(value, Sample.Status):
        return {"__status__": value.value}
    if isinstance(value, dict):
        return {str(k): _pack(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            dtype, shape, data = value["__array__"]
            return np.frombuffer(data, dtype).reshape(shape).copy()
        if "__topk__" in value:
            return TopK(*(_unpack(v) for v in value["__topk__"]))
        if "__status__" in value:
            return Sample.Status(value["__status__"])
        return {k: _unpack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    return value


def sample_to_state(sample: Sample) -> dict[str, Any]:
    return {f.name: _pack(getattr(sample, f.name)) for f in fields(sample)}


def sample_from_state(state: dict[str, Any]) -> Sample:
    known = {f.name for f in fields(Sample)}
    return Sample(**{k: _unpack(v) for k, v in state.items() if k in known})
