"""From losses of rows to one objective: a factor for each row, and the denominator by name. Imports no torch.

The counts are those of the whole optimizer step over all data-parallel ranks and micro-batches, so that the objective is
the plain sum of factor_R x loss_R over all of them, at every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ta_opd.errors import ConfigError, DataError

REDUCTIONS = ("kept_token_mean", "sample_mean", "valid_token_mean")


@dataclass(frozen=True)
class Reduction:
    """factor_R: weight_R / denominator, the type of weight_R; denominator: the number, named for the log."""

    factor_R: Any
    denominator: float
    denominator_name: str


def row_factors(name: str, weight_R, *, kept_tokens: float, valid_tokens: float, num_samples: float, sample_R=None,
                kept_per_sample_N=None) -> Reduction:
    """Factors of the rows of one rank (torch tensor or numpy array in, the same out).

    kept_token_mean   sum of weight x loss / sum of weights (arXiv 2605.26844, eq. 7, one mean over all kept tokens)
    sample_mean       mean over kept tokens of each sample, then mean over all samples, those with no kept token too
    valid_token_mean  sum of weight x loss / number of valid tokens: a smaller budget gives a smaller step

    kept_tokens is the sum of weights, valid_tokens and num_samples are counts, all of the whole step. sample_mean needs
    sample_R [R] (sample of each row) and kept_per_sample_N [N] (sum of weights of each sample, over all its rows, whichever
    rank holds them). A denominator of 0 means that there is nothing to teach; the factors are then 0. Raises ConfigError on
    an unknown name, DataError on missing counts.
    """
    if name == "kept_token_mean":
        denominator, what = float(kept_tokens), "kept_tokens"
    elif name == "valid_token_mean":
        denominator, what = float(valid_tokens), "valid_tokens"
    elif name == "sample_mean":
        if sample_R is None or kept_per_sample_N is None:
            raise DataError("sample_mean: expected sample_R and kept_per_sample_N, got None; give the sample of every row "
                            "and the sum of weights of every sample")
        own_R = kept_per_sample_N[sample_R]
        weight_R = weight_R / (own_R + (own_R == 0))
        denominator, what = float(num_samples), "samples"
    else:
        raise ConfigError(f"expected --opd-loss-reduction to be one of {REDUCTIONS}, got {name!r}")
    if denominator < 0 or denominator != denominator:
        raise DataError(f"{name}: expected a count of {what} that is not negative, got {denominator}")
    return Reduction(weight_R / denominator if denominator else weight_R * 0.0, denominator, what)
