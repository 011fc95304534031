"""The union of two top-K, row by row: which ids both sides returned, and each side's probability at every member.

Two ways to the same answer. `union_fast` sorts one 64-bit key per entry, (id, side, float32 probability), so that equal ids become
neighbours and carry their numbers along: no search, no gather. `union_in_released_order` is for float64, the parity dtype: it
lays the slots out in the order in which the released code sums them, because sums of floats depend on their order in the last bit and
last bits decide ties.

Shape suffixes: B rows, K entries per side, U = 2K slots; a slot that is no member of the union has p = 0 on both sides.
"""

import sys
from dataclasses import dataclass
from itertools import chain

import numpy as np

_PAYLOAD, _KEY = (0, 1) if sys.byteorder == "little" else (1, 0)
_PAD_KEY = np.uint32(0xFFFFFFFE)  # what (-1 << 1) becomes: sorts behind every id
_ONE = np.uint32(1)


@dataclass(frozen=True)
class Union:
    """p_student, p_teacher [B, U]: probability of each member on each side, 0 where that side did not return it.

    num_shared [B]: members that both sides returned. shared_mass [B]: the teacher's probability on them.
    active [B, U] bool, or None when a member is exactly a slot with p > 0 on a side.
    """

    p_student: np.ndarray
    p_teacher: np.ndarray
    num_shared: np.ndarray
    shared_mass: np.ndarray
    active: np.ndarray | None


def union_fast(student_ids, teacher_ids, p_student, p_teacher) -> Union:
    """ids [B, K] int32 (-1 padding), p [B, K] float32 with p = 0 on padding; ids of a row differ. The order of slots is by id."""
    B, K = student_ids.shape
    keys_BU = np.empty((B, 2 * K), np.uint64)
    parts = keys_BU.view(np.uint32).reshape(B, 2 * K, 2)
    np.left_shift(student_ids.view(np.uint32), _ONE, out=parts[:, :K, _KEY])
    np.left_shift(teacher_ids.view(np.uint32), _ONE, out=parts[:, K:, _KEY])
    parts[:, K:, _KEY] |= _ONE
    parts[:, :K, _PAYLOAD] = p_student.view(np.uint32)
    parts[:, K:, _PAYLOAD] = p_teacher.view(np.uint32)
    keys_BU.sort(axis=1)
    key = np.ascontiguousarray(parts[..., _KEY]).ravel()
    bits = np.ascontiguousarray(parts[..., _PAYLOAD]).ravel()
    # Neighbours of one id are student then teacher, and differ in the side bit only.
    shared = np.zeros(key.size, bool)
    np.equal(key[1:] ^ key[:-1], _ONE, out=shared[1:])
    if student_ids[:, -1].min(initial=0) < 0 or teacher_ids[:, -1].min(initial=0) < 0:
        shared &= key < _PAD_KEY
    shared_BU = shared.reshape(B, 2 * K)
    shared_BU[:, 0] = False
    shared_mask = np.negative(shared.astype(np.uint32))
    key &= _ONE
    teacher_mask = np.negative(key, out=key)
    teacher_bits = bits & teacher_mask
    student_bits = bits ^ teacher_bits
    shared_bits = teacher_bits & shared_mask
    moved = student_bits[:-1] & shared_mask[1:]
    student_bits[1:] |= moved
    student_bits[:-1] ^= moved
    student_BU, teacher_BU = (x.view(np.float32).reshape(B, 2 * K) for x in (student_bits, teacher_bits))
    return Union(
        student_BU,
        teacher_BU,
        np.add.reduce(shared_BU.view(np.uint8), axis=1, dtype=np.uint8 if K < 256 else np.int32).astype(np.int32),
        np.einsum("bu->b", shared_bits.view(np.float32).reshape(B, 2 * K)),
        None,
    )


def union_in_released_order(student_ids, teacher_ids, p_student, p_teacher) -> Union:
    """As `union_fast` for float64 p, with the members of each row in the order of the released code's Python set."""
    B, K = student_ids.shape
    ids_BU = np.concatenate([student_ids, teacher_ids], axis=1).astype(np.int64)
    keys_BU = (ids_BU << 32) | np.arange(2 * K)
    keys_BU.sort(axis=1)
    shared_BU = ((keys_BU[:, 1:] >> 32) == (keys_BU[:, :-1] >> 32)) & (keys_BU[:, 1:] >= 0)
    rows, columns = np.nonzero(shared_BU)
    at_student, at_teacher = keys_BU[rows, columns] & 0xFFFFFFFF, keys_BU[rows, columns + 1] & 0xFFFFFFFF
    student_BU, teacher_BU = np.zeros((B, 2 * K)), np.zeros((B, 2 * K))
    student_BU[:, :K] = p_student
    teacher_BU[:, K:] = p_teacher
    teacher_BU[rows, at_student] = teacher_BU[rows, at_teacher]
    teacher_BU[rows, at_teacher] = 0
    active_BU = ids_BU >= 0
    active_BU[rows, at_teacher] = False
    shared_mass_B = ordered_sum(teacher_BU[:, :K])
    slots_BU = _set_order(student_ids, teacher_ids, ids_BU, active_BU)
    student_BU, teacher_BU, active_BU = (
        np.take_along_axis(x_BU, slots_BU, axis=1) for x_BU in (student_BU, teacher_BU, active_BU)
    )
    return Union(student_BU, teacher_BU, np.bincount(rows, minlength=B), shared_mass_B, active_BU)


def ordered_sum(x_BU: np.ndarray) -> np.ndarray:
    """Sum of each row from left to right, as Python's sum over a list."""
    total_B = np.zeros(x_BU.shape[0], x_BU.dtype)
    for column in range(x_BU.shape[1]):
        total_B += x_BU[:, column]
    return total_B


def _set_order(student_ids, teacher_ids, ids_BU, active_BU) -> np.ndarray:
    """Slots of every row in the iteration order of `set(student ids).union(teacher ids)`, the inactive ones last."""
    B = ids_BU.shape[0]
    padded = (student_ids < 0).any() or (teacher_ids < 0).any()
    unions = []
    for student, teacher in zip(student_ids.tolist(), teacher_ids.tolist(), strict=True):
        if padded:
            student, teacher = [i for i in student if i >= 0], [i for i in teacher if i >= 0]
        unions.append(list(set(student).union(teacher)))
    counts_B = np.fromiter(map(len, unions), np.int64, B)
    union_ids = np.fromiter(chain.from_iterable(unions), np.int64, int(counts_B.sum()))
    rows = np.repeat(np.arange(B), counts_B)
    places = np.arange(union_ids.size) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    slots_BU = np.argsort(~active_BU, axis=1, kind="stable")
    active_rows, active_slots = np.nonzero(active_BU)
    by_id = np.argsort((active_rows << 32) | ids_BU[active_rows, active_slots], kind="stable")
    in_union = np.argsort((rows << 32) | union_ids, kind="stable")
    slots_BU[rows[in_union], places[in_union]] = active_slots[by_id]
    return slots_BU
