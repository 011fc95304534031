"""Checks by comparing text."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"A(-?[^\sA]+)\s*$")


def _norm(text: str) -> str:
    return " ".join(text.split())


def exact_match(response: str, label: str | None, metadata: dict[str, Any] | None = None) -> float:
    """1.0 where the response, or the answer it ends with after a capital A ("...A19"), is the label; else 0.0."""
    if label is None:
        return 0.0
    wanted = _norm(label)
    if _norm(response) == wanted:
        return 1.0
    found = _MARKED.search(response)
    return float(found is not None and _norm(found.group(1)) in (wanted, wanted.removeprefix("A")))


def last_number_match(response: str, label: str | None, metadata: dict[str, Any] | None = None) -> float:
    """1.0 where the last number of the response equals the last number of the label; else 0.0."""
    if label is None:
        return 0.0
    ours, theirs = _NUMBER.findall(response), _NUMBER.findall(label)
    if not ours or not theirs:
        return 0.0
    return float(float(ours[-1].replace(",", "")) == float(theirs[-1].replace(",", "")))
