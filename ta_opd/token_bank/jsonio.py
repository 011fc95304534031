"""JSON both ways: orjson where it is installed (the port to a stock slime does not need it), else the standard library."""

import json
import math
from typing import Any

import numpy as np

try:
    import orjson
except ImportError:
    orjson = None


def loads(data: bytes | str) -> Any:
    """Parsed JSON; NaN and Infinity, which is Python's JSON only, are read too. Raises ValueError."""
    if orjson is not None:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    return json.loads(data)


def dumps(value: Any, *, indent: bool = False) -> bytes:
    """Compact (or indented) JSON; NaN and infinities become null, objects of other types their text."""
    if orjson is not None:
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if indent else 0)
        return orjson.dumps(value, default=str, option=option)
    layout = {"indent": 2} if indent else {"separators": (",", ":")}
    return json.dumps(_plain(value), default=str, ensure_ascii=False, **layout).encode()


def dump_rows(block_TK: np.ndarray) -> list[str]:
    """Each row of a 2-d array of finite numbers as a JSON array."""
    if len(block_TK) == 0:
        return []
    if orjson is None:
        return [json.dumps(row, separators=(",", ":")) for row in block_TK.tolist()]
    text = orjson.dumps(np.ascontiguousarray(block_TK), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return ["[" + row + "]" for row in text[2:-2].split("],[")]  # one dump of all rows, cut at their borders


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
