"""The manifest: collecting, length checks, and the split over data-parallel ranks."""

import numpy as np
import pytest

from slime.utils import fields
from slime.utils.dp_schedule import balance, split_for_data_parallel
from slime.utils.types import Sample
from ta_opd.errors import DataError
from ta_opd.topk import TopK


def make_sample(index, prompt, length, k=2, weight=None):
    rng = np.random.default_rng(index)
    logprobs = np.sort(rng.normal(-2, 1, (length, k)).astype(np.float32), axis=1)[:, ::-1]
    topk = TopK(np.tile(np.arange(k, dtype=np.int32), (length, 1)), np.ascontiguousarray(logprobs))
    return Sample(
        index=index, tokens=list(range(prompt + length)), response_length=length, reward=0.0,
        rollout_log_probs=np.full(length, -1.0, np.float32), teacher_log_probs=np.full(length, -2.0, np.float32),
        teacher_topk=topk, student_topk=topk, opd_weights=weight,
    )  # fmt: skip


def test_collect_follows_the_manifest_and_masks_weights():
    sample = make_sample(0, 3, 4, weight=np.array([1, 0, 2, 1], np.float32))
    sample.loss_mask = [1, 1, 1, 0]
    data = fields.collect([sample])
    assert data["opd_weights"][0].tolist() == [1, 0, 2, 0]  # a position that is no valid target gets no weight
    assert data["teacher_topk_ids"][0].shape == (4, 2) and data["teacher_topk_ids"][0].dtype == np.int32
    assert "teacher_at_student_ids" not in data
    assert len(data["tokens"][0]) == 7


def test_a_field_of_the_wrong_length_is_named_with_its_sample():
    sample = make_sample(7, 3, 4)
    sample.teacher_log_probs = np.zeros(5, np.float32)
    with pytest.raises(DataError, match=r"teacher_log_probs of sample 7: expected 4 rows, got 5"):
        fields.collect([sample])


def test_a_field_that_only_some_samples_carry_is_refused():
    samples = [make_sample(0, 1, 2), make_sample(1, 1, 2)]
    samples[1].teacher_topk = None
    with pytest.raises(DataError, match="1 of 2 samples carry it .first without: sample 1"):
        fields.collect(samples)


def test_a_response_without_a_token_has_every_field():
    empty = Sample(index=2, tokens=[1, 2], response_length=0, reward=0.0)
    data = fields.collect([empty, make_sample(0, 1, 2), make_sample(1, 1, 3)])
    assert [len(v) for v in data["rollout_log_probs"]] == [0, 2, 3] and data["teacher_topk_ids"][0].shape == (0, 2)
    assert "teacher_at_student_ids" not in data and len(data["tokens"][0]) == 2
    with pytest.raises(DataError, match="2 of 3 samples carry it .first without: sample 0"):
        fields.collect([empty, Sample(index=0, tokens=[1, 2, 3], response_length=1), make_sample(1, 1, 3)])


def test_for_rows_ships_what_the_loss_reads():
    names = fields.for_rows({"teacher_ids_RK", "teacher_logps_RK", "target_R"})
    assert {"teacher_topk_ids", "teacher_topk_logprobs", "tokens", "rollout_log_probs"} <= set(names)
    assert "student_topk_ids" not in names


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_split_keeps_every_sample_once_and_denominators_do_not_depend_on_the_layout(dp):
    rng = np.random.default_rng(0)
    samples = [make_sample(i, 2, int(rng.integers(1, 9))) for i in range(12)]
    for s in samples:
        s.opd_weights = (rng.random(s.response_length) < 0.5).astype(np.float32)
    data = fields.collect(samples)
    shards = split_for_data_parallel(data, dp, global_batch_size=4)
    assert sorted(i for s in shards for i in s["sample_indices"]) == list(range(12))
    for step in range(3):
        expected = sum(float(s.opd_weights.sum()) for s in samples[4 * step : 4 * step + 4])
        seen = {s["steps"][step]["kept_tokens"] for s in shards}
        assert seen == {expected}
        members = sorted(s["sample_indices"][i] for s in shards for i in s["steps"][step]["indices"])
        assert members == list(range(4 * step, 4 * step + 4))


def test_split_refuses_a_batch_that_does_not_divide():
    data = fields.collect([make_sample(i, 2, 3) for i in range(5)])
    with pytest.raises(DataError, match="multiple of the global batch size 4, got 5"):
        split_for_data_parallel(data, 1, 4)


def test_balance_is_even():
    parts = balance([9, 1, 8, 2, 7, 3], 2)
    assert sorted(sum(parts, [])) == list(range(6))
    assert abs(sum([9, 1, 8, 2, 7, 3][i] for i in parts[0]) - 15) <= 1
