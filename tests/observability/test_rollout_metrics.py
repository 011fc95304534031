"""What a rollout logs, over all valid tokens, over kept ones, and by teacher."""

import numpy as np
import pytest

from slime.observability.metrics import rollout_metrics
from slime.utils.types import Sample


def sample(gap, length, teacher=None, mask=None, weights=None):
    return Sample(
        tokens=[1] * (2 + length), response_length=length, loss_mask=mask, metadata={"teacher": teacher} if teacher else {},
        rollout_log_probs=np.full(length, -1.0, np.float32), teacher_log_probs=np.full(length, -1.0 - gap, np.float32),
        opd_weights=None if weights is None else np.array(weights, np.float32),
    )  # fmt: skip


def test_numbers_by_teacher():
    found = rollout_metrics([sample(0.5, 4, "code"), sample(2.0, 4, "maths"), sample(1.0, 12, "maths")], None)
    by_teacher = {key: value for key, value in found.items() if key.startswith("teacher/")}
    assert by_teacher == {
        "teacher/code/samples": 1.0,
        "teacher/code/reverse_kl_valid": pytest.approx(0.5),
        "teacher/maths/samples": 2.0,
        "teacher/maths/reverse_kl_valid": pytest.approx((4 * 2.0 + 12 * 1.0) / 16),
    }
    assert found["rollout/reverse_kl_valid"] == pytest.approx((4 * 0.5 + 4 * 2.0 + 12 * 1.0) / 20)
    assert not [key for key in rollout_metrics([sample(0.5, 4)], None) if key.startswith("teacher/")]


def test_what_a_selection_kept_of_each_teachers_tokens():
    kept = rollout_metrics([sample(1.0, 4, "code", mask=[0, 1, 1, 1], weights=[0, 2, 0, 0]), sample(1.0, 2, "maths", weights=[1, 1])], None)
    assert kept["teacher/code/keep_ratio"] == pytest.approx(1 / 3) and kept["teacher/maths/keep_ratio"] == 1


def test_positions_that_are_no_targets_and_tokens_that_are_not_kept():
    found = rollout_metrics([sample(1.0, 4, mask=[0, 1, 1, 1], weights=[1, 1, 0, 0]), sample(3.0, 4, weights=[0, 0, 0, 1])], None)
    assert found["rollout/valid_tokens"] == 7 and found["rollout/kept_tokens"] == 2 and found["rollout/keep_ratio"] == pytest.approx(2 / 7)
    assert found["rollout/reverse_kl_valid"] == pytest.approx((3 * 1.0 + 4 * 3.0) / 7)
    assert found["rollout/reverse_kl_kept"] == pytest.approx((1.0 + 3.0) / 2)


def test_a_response_without_a_token_changes_nothing_but_the_counts_of_samples():
    some = [sample(1.0, 4, weights=[1, 1, 0, 0]), sample(3.0, 4, weights=[0, 0, 0, 1])]
    empty = Sample(tokens=[1, 2], response_length=0)  # carries no field at all
    found, without = rollout_metrics([some[0], empty, some[1]], None), rollout_metrics(some, None)
    counted = ("rollout/samples", "rollout/response_length")
    assert {k: v for k, v in found.items() if k not in counted} == {k: v for k, v in without.items() if k not in counted}
    assert found["rollout/samples"] == 3 and found["rollout/kept_tokens"] == 3
    assert rollout_metrics([empty], None)["rollout/kept_tokens"] == 0


def test_metadata_of_a_data_set_that_is_no_name_of_a_teacher():
    """It ended the rollout: a dict is no key."""
    samples = [sample(1.0, 2, {"name": "Mrs. Smith"}), sample(1.0, 2, ["a", "b"])]
    assert not [key for key in rollout_metrics(samples, None) if key.startswith("teacher/")]
