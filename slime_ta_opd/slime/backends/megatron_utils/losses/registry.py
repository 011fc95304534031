"""The losses by name, and what each needs. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ta_opd.errors import ConfigError

_PACKAGE = __package__
_BUILTIN = {
    "sampled_reverse_kl": "sampled_reverse_kl",
    "topk_reverse_kl": "topk",
    "topk_forward_kl": "topk",
    "topk_jsd": "topk",
    "topk_reverse_kl_truncated": "topk",
    "topk_forward_kl_truncated": "topk",
    "full_reverse_kl": "full",
    "full_forward_kl": "full",
    "full_jsd": "full",
}
LOSS_TYPES: tuple[str, ...] = tuple(_BUILTIN)

_REGISTRY: dict[str, LossSpec] = {}


@dataclass(frozen=True)
class LossSpec:
    """One loss: call it as fn(hidden_RH, weight_VH, rows, args, tp_group) -> TokenLoss.

    needs          names of `Rows` fields that must be given
    needs_student  those needed instead when `--opd-topk-support student`; None when the flag does not matter
    teacher        what the teacher must deliver: "logprob" (sampled token), "topk", or "hidden" (a Megatron teacher)
    rows           rows that are computed unless `--opd-loss-rows all`: "kept" (weight not 0)
    """

    name: str
    fn: Callable
    needs: frozenset[str]
    needs_student: frozenset[str] | None
    teacher: str
    rows: str = "kept"

    def __call__(self, hidden_RH, weight_VH, rows, args, tp_group=None):
        rows.require(self.needs_for(args), hidden_RH.shape[0], self.name)
        return self.fn(hidden_RH, weight_VH, rows, args, tp_group)

    def needs_for(self, args) -> frozenset[str]:
        """The `Rows` fields this loss needs with these arguments (reads `opd_topk_support`)."""
        if self.needs_student is not None and getattr(args, "opd_topk_support", None) == "student":
            return self.needs_student
        return self.needs


def register_loss(name: str, *, needs: set[str], teacher: str, needs_student: set[str] | None = None,
                  rows: str = "kept"):
    """Decorator: make a loss available to `--opd-loss-type NAME`. Raises ConfigError when the name is taken."""

    def decorate(fn):
        if name in _REGISTRY:
            raise ConfigError(f"expected a new loss name, got {name!r} which is registered already; choose another")
        student = None if needs_student is None else frozenset(needs_student)
        _REGISTRY[name] = LossSpec(name, fn, frozenset(needs), student, teacher, rows)
        return fn

    return decorate


def get_loss(name: str) -> LossSpec:
    """The loss of that name. Raises ConfigError that lists the known names."""
    if name not in _REGISTRY and name in _BUILTIN:
        import_module(f"{_PACKAGE}.{_BUILTIN[name]}")
    if name not in _REGISTRY:
        known = sorted(set(LOSS_TYPES) | set(_REGISTRY))
        raise ConfigError(f"expected --opd-loss-type to be one of {known}, got {name!r}")
    return _REGISTRY[name]
