"""Selectors: the paper's own masks and, one short file each, the published rules of the field.

Importing this package registers them all.
"""

from ta_opd.selectors import dial, fire, ier, iw_opd, paper, prefix, sampled_rkl, sparse, sure, tip
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
    "Batch", "Scored", "Selector", "dial", "fire", "get_selector", "ier", "iw_opd", "list_selectors", "load_selector",
    "paper", "prefix", "register_selector", "resolve_mask", "sampled_rkl", "sparse", "sure", "tip",
]  # fmt: skip
