"""The open registry of selectors: a name, where the rule was published, and one function from a batch to scores.

Shape suffix: T tokens of the batch.
"""

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ta_opd.errors import ConfigError, DataError
from ta_opd.topk import TopK, TopKParts

DIRECTIONS = ("high", "low")
CANDIDATES = ("valid", "q3")


@dataclass(frozen=True)
class Batch:
    """What a selector sees. columns: every metric and score column, [T]. valid [T] bool. sample, tok_pos [T] int32.

    student, teacher, sampled_ids: the raw top-K and tokens, None when the caller has none (`topk()` raises then). rng: keyed by
    (seed, rollout id), so that a resumed run draws the same numbers.
    """

    columns: dict[str, np.ndarray]
    valid: np.ndarray
    response_lengths: np.ndarray
    sample: np.ndarray
    tok_pos: np.ndarray
    config: object
    rollout_id: int
    rng: np.random.Generator
    student: TopK | TopKParts | None = None
    teacher: TopK | TopKParts | None = None
    sampled_ids: np.ndarray | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def topk(self) -> tuple[TopK | TopKParts, TopK | TopKParts, np.ndarray]:
        """(student, teacher, sampled ids), or DataError when this selector needs them and the caller passed none."""
        if self.student is None or self.teacher is None or self.sampled_ids is None:
            raise DataError(
                f"selector {self.config.mask!r} needs the top-K of both sides: pass student=, teacher=, sampled_ids= to select_tokens"
            )
        return self.student, self.teacher, self.sampled_ids


@dataclass(frozen=True)
class Scored:
    """A selector's answer when a plain score array is not enough.

    score [T]: what tokens are ranked by. weights [T] >= 0: how much supervision a kept token gets (default 1).
    candidates [T] bool: tokens that may be kept at all (default: all valid). Combined as
    `Selection.weights = weights * keep`, keep chosen among valid & candidates by score within the budget; at ratio 1 all of them.
    """

    score: np.ndarray
    weights: np.ndarray | None = None
    candidates: np.ndarray | None = None


@dataclass(frozen=True)
class Selector:
    """A registered rule. `defaults` are SelectionConfig fields that the rule's own recipe sets where the user did not."""

    name: str
    function: Callable[[Batch], np.ndarray | Scored]
    aliases: tuple[str, ...] = ()
    paper: str = ""
    direction: str = "high"
    candidates: str = "valid"
    summary: str = ""
    defaults: dict = field(default_factory=dict)


_SELECTORS: dict[str, Selector] = {}
_NAMES: dict[str, str] = {}


def register_selector(
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    paper: str = "",
    direction: str = "high",
    candidates: str = "valid",
    defaults: dict | None = None,
    replace: bool = False,
):
    """Decorator: make `function(batch: Batch) -> score [T] | Scored` selectable by name.

    direction: "high" keeps the largest scores, "low" the smallest. candidates: "valid" or "q3" (low entropy, high divergence only).
    defaults: SelectionConfig fields of the rule's own recipe, for example {"scope": "response"}. Raises ConfigError when a name is
    taken (unless `replace`) or an option is unknown.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"selector direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if candidates not in CANDIDATES:
        raise ConfigError(f"selector candidates: expected one of {', '.join(CANDIDATES)}, got {candidates!r}")

    def register(function):
        taken = [n for n in (name, *aliases) if n in _NAMES and _NAMES[n] != name]
        if taken or (name in _SELECTORS and not replace):
            raise ConfigError(f"selector name {(taken or [name])[0]!r} is taken; choose another or pass replace=True")
        lines = (function.__doc__ or "").strip().splitlines()
        _SELECTORS[name] = Selector(
            name, function, tuple(aliases), paper, direction, candidates, lines[0] if lines else "", defaults or {}
        )
        _NAMES.update({n: name for n in (name, *aliases)})
        return function

    return register


def resolve_mask(name: str) -> str:
    """Canonical selector name of a mask or alias. Raises ConfigError with the known names."""
    if name not in _NAMES:
        close = difflib.get_close_matches(str(name), _NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"unknown selector {name!r}{hint}; known: {', '.join(sorted(_NAMES))}")
    return _NAMES[name]


def get_selector(name: str) -> Selector:
    return _SELECTORS[resolve_mask(name)]


def list_selectors() -> list[Selector]:
    """All registered selectors, in order of registration."""
    return list(_SELECTORS.values())


def load_selector(path: str) -> Selector:
    """A user's own selector from "package.module:function" or "/path/file.py:function".

    The function may be decorated with `register_selector`; a plain one is used under its path, as a "high" rule over all valid tokens.
    Raises ConfigError when there is no such module, file or function.
    """
    module_name, _, function_name = path.rpartition(":")
    if not module_name or not function_name:
        raise ConfigError(f"selector path: expected 'package.module:function' or 'file.py:function', got {path!r}")
    known = _NAMES.get(path)
    if known:
        return _SELECTORS[known]
    function = getattr(_import(module_name), function_name, None)
    if not callable(function):
        raise ConfigError(f"selector path {path!r}: {module_name} has no function {function_name!r}")
    for selector in _SELECTORS.values():
        if selector.function is function:
            _NAMES[path] = selector.name
            return selector
    register_selector(path)(function)
    return _SELECTORS[path]


def _import(module_name: str):
    try:
        if not module_name.endswith(".py"):
            return importlib.import_module(module_name)
        if not Path(module_name).is_file():
            raise ConfigError(f"selector path: no file {module_name!r}")
        spec = importlib.util.spec_from_file_location(f"ta_opd_user_{Path(module_name).stem}", module_name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise ConfigError(f"selector path: cannot import {module_name!r}: {error}") from error
