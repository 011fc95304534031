"""The first x % of every response: the position baseline (Prefix OPD, arXiv 2602.15260; also in the comparisons of IER-OPD and DIAL-OPD).

A mask, so it saves no generation; a shorter `--rollout-max-response-len` does.
"""

import numpy as np

from ta_opd.selectors.registry import Batch, register_selector


@register_selector(
    "prefix", aliases=("position",), paper="Prefix OPD, arXiv 2602.15260", direction="low", defaults={"scope": "response"}
)
def prefix(batch: Batch) -> np.ndarray:
    """The first valid tokens of every response."""
    return batch.tok_pos
