"""TopK: from replies and lists, with everything that servers leave out."""

import numpy as np
import pytest

from ta_opd.errors import DataError
from ta_opd.topk import TopK, TopKParts, gathered_logprobs, last_positions, sampled_logprobs

NAN, INF = float("nan"), float("inf")


def test_full_lists():
    topk = TopK.from_lists([[[-0.1, 5, None], [-2.5, 7, "x"]], [[-0.2, 1, None], [-1.5, 2, None]]], 2)
    assert topk.ids.dtype == np.int32 and topk.logprobs.dtype == np.float32
    np.testing.assert_array_equal(topk.ids, [[5, 7], [1, 2]])
    np.testing.assert_allclose(topk.logprobs, [[-0.1, -2.5], [-0.2, -1.5]], rtol=1e-6)
    assert (topk.T, topk.K, len(topk)) == (2, 2, 2)
    np.testing.assert_allclose(topk.mass(), np.exp([[-0.1, -2.5], [-0.2, -1.5]]).sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    "position, ids",
    [
        (None, []),
        ([], []),
        ([[-0.5, 3, None]], [3]),
        ([None, [-0.5, 3, None], []], [3]),
        ([[None, 9, None], [-0.5, 3, None]], [3]),
        ([[NAN, 9, None], [-0.5, 3, None], [-INF, 4, None], [-0.6, 8, None]], [3, 8]),
        ([[-0.5, i, None] for i in range(7)], [0, 1, 2]),
        ([(-0.5, 3), (-0.7, 1)], [3, 1]),
    ],
)
def test_missing_short_long_and_not_finite(position, ids):
    topk = TopK.from_lists([[[-0.1, 1, None]], position], 3, dtype=np.float64)
    assert topk.ids[1].tolist() == ids + [-1] * (3 - len(ids))
    assert np.isfinite(topk.logprobs[1]).sum() == len(ids)
    assert topk.ids[0].tolist() == [1, -1, -1]


def test_a_repeated_id_keeps_its_first_place_and_its_last_value():
    topk = TopK.from_lists([[[-1.0, 4, None], [-2.0, 5, None], [-3.0, 4, None]]], 4, dtype=np.float64)
    assert topk.ids.tolist() == [[4, 5, -1, -1]]
    assert topk.logprobs.tolist() == [[-3.0, -2.0, -INF, -INF]]


@pytest.mark.parametrize("bad", [[["x", 1, None]], [[-0.5]], [[-0.5, None, None]], [3.0], [[-0.5, -4, None]], [[-0.5, 2**31, None]]])
def test_malformed_entries_raise(bad):
    with pytest.raises(DataError):
        TopK.from_lists([[[-0.1, 1, None]], bad], 3)


def test_reply_sides_take_the_last_positions_without_the_leading_null():
    entries = [None] + [[[-0.1 * i, i, None]] for i in range(1, 5)]
    teacher = TopK.from_reply({"input_top_logprobs": entries}, "teacher", 2, 3)
    assert teacher.ids[:, 0].tolist() == [2, 3, 4]
    student = TopK.from_reply({"output_top_logprobs": entries[1:]}, "student", 2, 4)
    assert student.ids[:, 0].tolist() == [1, 2, 3, 4]
    assert TopK.from_reply({}, "teacher", 2, 0).ids.shape == (0, 2)


def test_reply_errors_say_what_to_do():
    with pytest.raises(DataError, match="top_logprobs_num"):
        TopK.from_reply({}, "student", 2, 3)
    with pytest.raises(DataError, match="expected at least 5 .* got 2"):
        TopK.from_reply({"input_top_logprobs": [None, [], []]}, "teacher", 2, 5)
    with pytest.raises(DataError, match="'student' or 'teacher'"):
        TopK.from_reply({}, "rollout", 2, 3)


def test_arrays_are_checked():
    with pytest.raises(DataError, match="one shape"):
        TopK(np.zeros((2, 3), np.int32), np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match="int32"):
        TopK(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match="different K"):
        TopK.concat([TopK.empty(1, 2), TopK.empty(1, 3)])


def test_slices_and_concatenation():
    topk = TopK.from_lists([[[-0.1, i, None]] for i in range(6)], 1)
    assert topk[2:4].ids.ravel().tolist() == [2, 3]
    assert topk[-1].ids.ravel().tolist() == [5] and topk[0].ids.ravel().tolist() == [0]
    assert topk[np.array([True] + [False] * 5)].T == 1
    np.testing.assert_array_equal(TopK.concat([topk[:2], topk[2:]]).ids, topk.ids)


def test_checked_repairs_arrays_made_by_hand():
    topk = TopK(np.array([[3, -1, 3, 6]], np.int32), np.array([[-1.0, -2.0, -0.5, NAN]]))
    assert topk.checked().ids.tolist() == [[3, -1, -1, -1]]
    assert topk.checked().logprobs.tolist() == [[-0.5, -INF, -INF, -INF]]


def test_sampled_logprobs():
    assert sampled_logprobs([[-0.5, 1, None], [-0.25, 2, None]], 1, dtype=np.float64).tolist() == [-0.25]
    got = sampled_logprobs([[None, 1, None], [-0.25, 2, None], None], 3)
    np.testing.assert_array_equal(got, np.array([np.nan, -0.25, np.nan], np.float32))
    with pytest.raises(DataError, match="expected at least 4"):
        sampled_logprobs([[-0.5, 1, None]], 4)


def test_gathered_logprobs():
    entries = [[[-1.0, 7, None], [-2.0, 9, None]], None, [[-3.0, 7, None], [NAN, 9, None]], [[-4.0, 1, None]]]
    ids = np.array([[9, 7], [7, 9], [7, 9], [-1, -1]], np.int32)
    got = gathered_logprobs(entries, ids, dtype=np.float64)
    np.testing.assert_array_equal(got, [[-2, -1], [np.nan, np.nan], [-3, np.nan], [-INF, -INF]])
    none_of_them = gathered_logprobs([entries[3]], ids[:1], absent_is_zero=True)
    np.testing.assert_array_equal(none_of_them, [[-INF, -INF]])
    assert np.isnan(gathered_logprobs([entries[3]], ids[:1])).all()
    some = gathered_logprobs([entries[0], None], np.array([[9, 8], [9, 7]], np.int32), absent_is_zero=True)
    np.testing.assert_array_equal(some, [[-2, np.nan], [np.nan, np.nan]])
    with pytest.raises(DataError, match="expected 4 positions, got 2"):
        gathered_logprobs(entries[:2], ids)


def test_last_positions_of_an_empty_response():
    assert last_positions(None, 0, "input_top_logprobs") == []


def test_parts_read_like_one_array():
    rng = np.random.default_rng(0)
    lengths = [3, 0, 1, 7, 4]
    parts = [TopK(rng.integers(0, 9, (n, 2)).astype(np.int32), rng.random((n, 2)).astype(np.float32)) for n in lengths]
    chain, whole = TopKParts(parts), TopK.concat(parts)
    assert (chain.T, chain.K, chain.dtype, len(chain)) == (15, 2, np.float32, 15)
    for start in range(16):
        for stop in range(17):
            np.testing.assert_array_equal(chain[start:stop].ids, whole[start:stop].ids)
            np.testing.assert_array_equal(chain[start:stop].logprobs, whole[start:stop].logprobs)
    np.testing.assert_array_equal(chain.ids, whole.ids)
    np.testing.assert_array_equal(chain.astype(np.float64).logprobs, whole.astype(np.float64).logprobs)
    assert chain.astype(np.float64).dtype == np.float64
    assert np.shares_memory(chain[4:6].ids, parts[3].ids)  # within one part: no copy
    with pytest.raises(DataError, match="step 1"):
        chain[::2]
    with pytest.raises(DataError, match=r"different K: \[1, 2\]"):
        TopKParts([parts[0], TopK.empty(1, 1)])
    with pytest.raises(DataError, match="nothing to chain"):
        TopKParts([])
