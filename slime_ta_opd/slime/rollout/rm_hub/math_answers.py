"""Checks of mathematical answers through math-verify: equal in value, however they are written."""

from __future__ import annotations

import logging
from typing import Any

_TAIL = 4000  # characters; the answer stands at the end


def math_match(response: str, label: str | None, metadata: dict[str, Any] | None = None) -> float:
    """1.0 where the last answer of the response (boxed, or the last expression) equals the label in value; else 0.0.

    A response that cannot be parsed is wrong. math-verify's own timeouts need the main thread, so they are off and only the
    end of a long response is read.
    """
    if label is None or not response.strip():
        return 0.0
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        gold = parse(f"\\boxed{{{label}}}" if "\\boxed" not in label else label, parsing_timeout=None)
        boxed = response.rfind("\\boxed")
        answer = parse(response[boxed:] if boxed >= 0 else response[-_TAIL:], parsing_timeout=None)
        return float(bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None))
    except Exception:  # whatever a malformed expression makes the parser raise: not a right answer
        return 0.0
