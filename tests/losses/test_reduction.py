"""Row factors of the three reductions, against sums written out by hand and against a split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime.backends.megatron_utils.losses.reduction import REDUCTIONS, row_factors
from ta_opd.errors import ConfigError, DataError

# three samples: 2 of 4 valid kept, 1 of 3 kept, none of 5 kept
SAMPLE = torch.tensor([0, 0, 1])
LOSS = torch.tensor([3.0, 5.0, 7.0])
COUNTS = {"kept_tokens": 3.0, "valid_tokens": 12, "num_samples": 3}
PER_SAMPLE = torch.tensor([2.0, 1.0, 0.0])


def _objective(name, weight=None):
    weight = torch.ones(3) if weight is None else weight
    return row_factors(name, weight, sample_R=SAMPLE, kept_per_sample_N=PER_SAMPLE, **COUNTS)


@pytest.mark.parametrize(
    ("name", "expected", "denominator"),
    [("kept_token_mean", 15 / 3, 3), ("valid_token_mean", 15 / 12, 12), ("sample_mean", ((3 + 5) / 2 + 7 / 1 + 0) / 3, 3)],
)
def test_objectives(name, expected, denominator):
    out = _objective(name)
    assert (out.factor_R * LOSS).sum().item() == pytest.approx(expected)
    assert out.denominator == denominator and out.denominator_name in ("kept_tokens", "valid_tokens", "samples")


@pytest.mark.parametrize("name", REDUCTIONS)
def test_split_over_ranks_is_the_same_sum(name):
    whole = _objective(name).factor_R
    first = row_factors(name, torch.ones(2), sample_R=SAMPLE[:2], kept_per_sample_N=PER_SAMPLE, **COUNTS).factor_R
    # the other rank holds samples 1 and 2 only and numbers them from 0
    second = row_factors(name, torch.ones(1), sample_R=torch.tensor([0]), kept_per_sample_N=PER_SAMPLE[1:], **COUNTS).factor_R
    empty = row_factors(name, torch.ones(0), sample_R=torch.zeros(0, dtype=torch.int64), kept_per_sample_N=PER_SAMPLE, **COUNTS)
    assert torch.equal(torch.cat([first, second]), whole) and empty.factor_R.shape == (0,)


def test_weights_scale_and_zero_drops():
    out = _objective("kept_token_mean", torch.tensor([2.0, 0.0, 1.0]))
    assert out.factor_R.tolist() == pytest.approx([2 / 3, 0.0, 1 / 3])


def test_numpy_in_numpy_out():
    out = row_factors("sample_mean", np.ones(3, np.float32), sample_R=SAMPLE.numpy(), kept_per_sample_N=PER_SAMPLE.numpy(), **COUNTS)
    assert isinstance(out.factor_R, np.ndarray) and out.factor_R.dtype == np.float32


def test_nothing_to_teach_gives_zero_not_nan():
    out = row_factors("kept_token_mean", torch.zeros(2), kept_tokens=0, valid_tokens=0, num_samples=0)
    assert out.factor_R.tolist() == [0.0, 0.0] and out.denominator == 0
    none = row_factors("sample_mean", torch.zeros(1), sample_R=torch.tensor([2]), kept_per_sample_N=PER_SAMPLE, **COUNTS)
    assert none.factor_R.tolist() == [0.0]


def test_errors():
    with pytest.raises(ConfigError, match="got 'mean'"):
        _objective("mean")
    with pytest.raises(DataError, match="kept_per_sample_N"):
        row_factors("sample_mean", torch.ones(1), **COUNTS)
    with pytest.raises(DataError, match="not negative, got nan"):
        row_factors("kept_token_mean", torch.ones(1), kept_tokens=float("nan"), valid_tokens=1, num_samples=1)
