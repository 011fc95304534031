"""Selectors: the paper's own masks and, one short file each, the published rules of the field.

Importing this package registers them all.
"""

from ta_opd.selectors import paper
from ta_opd.selectors.registry import (
    Batch,
    Scored,
    Selector,
    get_selector,
    list_selectors,
    load_selector,
    register_selector,
    resolve_mask,
)

__all__ = [
    "Batch", "Scored", "Selector", "get_selector", "list_selectors", "load_selector", "paper", "register_selector",
    "resolve_mask",
]  # fmt: skip
