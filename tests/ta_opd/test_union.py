"""The union of two top-K lists against Python's dictionaries, at sizes where narrow integers and padding bite."""

import numpy as np
import pytest

from ta_opd.union import RepeatedIdError, Scratch, union_fast, union_in_released_order


def sides_of(K: int, B: int, seed: int, dtype, padding: bool):
    """(ids, p) of both sides: rows that share nothing, everything or a part; id 0 and the largest id occur; some lists are short or empty."""
    rng = np.random.default_rng(seed)
    vocab = np.concatenate([np.arange(3 * K), [2**31 - 2]])
    student = np.stack([rng.permutation(vocab)[:K] for _ in range(B)]).astype(np.int32)
    teacher = np.stack([rng.permutation(vocab)[:K] for _ in range(B)]).astype(np.int32)
    teacher[::3], teacher[1::3] = student[::3], rng.permuted(student[1::3], axis=1)
    # The last id of a row and the first of the next one are neighbours in memory.
    student[:, 0] = np.where((student == 0).any(1), student[:, 0], 0)
    p = [rng.random((B, K)).astype(dtype) + dtype(1e-3) for _ in range(2)]
    if padding:
        for ids, mass in zip((student, teacher), p, strict=True):
            short_B = rng.integers(0, K + 1, B)
            gone_BK = np.arange(K) >= np.where(rng.random(B) < 0.5, K, short_B)[:, None]
            ids[gone_BK], mass[gone_BK] = -1, 0
    return student, teacher, *p


@pytest.mark.parametrize("union, dtype", [(union_fast, np.float32), (union_in_released_order, np.float64)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("K", [1, 2, 16, 127, 128, 200])
def test_members_shares_and_mass(K, padding, union, dtype):
    scratch = Scratch()
    for seed, B in enumerate((7, 1, 12)):
        student, teacher, p_student, p_teacher = sides_of(K, B, seed, dtype, padding)
        got = union(student, teacher, p_student, p_teacher, scratch)
        for b in range(B):
            of_student = {i: v for i, v in zip(student[b].tolist(), p_student[b].tolist(), strict=True) if i >= 0}
            of_teacher = {i: v for i, v in zip(teacher[b].tolist(), p_teacher[b].tolist(), strict=True) if i >= 0}
            members = of_student.keys() | of_teacher.keys()
            want = sorted((of_student.get(i, 0.0), of_teacher.get(i, 0.0)) for i in members)
            used = got.active[b] if got.active is not None else (got.p_student[b] > 0) | (got.p_teacher[b] > 0)
            found = sorted(zip(got.p_student[b][used].tolist(), got.p_teacher[b][used].tolist(), strict=True))
            assert found == want
            assert not got.p_student[b][~used].any() and not got.p_teacher[b][~used].any()
            shared = of_student.keys() & of_teacher.keys()
            assert got.num_shared[b] == len(shared)
            np.testing.assert_allclose(got.shared_mass[b], sum(of_teacher[i] for i in shared), rtol=1e-5)


@pytest.mark.parametrize("union, dtype", [(union_fast, np.float32), (union_in_released_order, np.float64)])
@pytest.mark.parametrize("side", [0, 1])
def test_an_id_twice_on_one_side_is_an_error(side, union, dtype):
    ids = [np.array([[3, 5, 0]], np.int32), np.array([[7, 5, 9]], np.int32)]
    p = np.full((1, 3), 0.2, dtype)
    assert union(*ids, p, p, Scratch()).num_shared.tolist() == [1]
    ids[side][0, 2] = ids[side][0, 0]
    with pytest.raises(RepeatedIdError):
        union(*ids, p, p, Scratch())
