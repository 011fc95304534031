"""The union of two top-K, row by row: which ids both sides returned, and each side's probability at every member.

Two ways to the same answer. `union_fast` sorts one 64-bit key per entry, (id, side, float32 probability), so that equal ids become
neighbours and carry their numbers along: no search, no gather. `union_in_released_order` is for float64, the parity dtype: it
lays the slots out in the order in which the released code sums them, because sums of floats depend on their order in the last bit and
last bits decide ties.

Shape suffixes: B rows, K entries per side, U = 2K slots; a slot that is no member of the union has p = 0 on both sides.
"""

import math
import sys
from dataclasses import dataclass
from itertools import chain

import numpy as np

_PAYLOAD, _KEY = (0, 1) if sys.byteorder == "little" else (1, 0)
_PAD_KEY = np.uint32(0xFFFFFFFE)  # what (-1 << 1) becomes: sorts behind every id
_ONE = np.uint32(1)
_BEHIND = np.int64(1) << 40


class RepeatedIdError(ValueError):
    """A row of a top-K holds an id twice; `TopK.checked` repairs it."""


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


class Scratch:
    """Named buffers that live from block to block: fresh pages for every temporary would cost more than the arithmetic on them."""

    def __init__(self):
        self._buffers: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An uninitialised array under a name; the same memory at every call of that name."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


def union_fast(student_ids, teacher_ids, p_student, p_teacher, scratch: Scratch) -> Union:
    """ids [B, K] int32 (-1 padding), p [B, K] float32 with p = 0 on padding; The order of slots is by id.

    The result lives in `scratch` until the next call. Raises RepeatedIdError when a row of one side holds an id twice.
    """
    B, K = student_ids.shape
    U = 2 * K
    keys_BU = scratch("keys", (B, U), np.uint64)
    parts = keys_BU.view(np.uint32).reshape(B, U, 2)
    np.left_shift(student_ids.view(np.uint32), _ONE, out=parts[:, :K, _KEY])
    np.left_shift(teacher_ids.view(np.uint32), _ONE, out=parts[:, K:, _KEY])
    parts[:, K:, _KEY] |= _ONE
    parts[:, :K, _PAYLOAD] = p_student.view(np.uint32)
    parts[:, K:, _PAYLOAD] = p_teacher.view(np.uint32)
    keys_BU.sort(axis=1)
    key, student, teacher = (scratch(name, (B * U,), np.uint32) for name in ("key", "p student", "p teacher"))
    shared_mask, spare = scratch("shared mask", (B * U,), np.int32), scratch("spare", (B * U,), np.uint32)
    shared = scratch("shared", (B * U,), bool)
    np.copyto(key.reshape(B, U), parts[..., _KEY])
    np.copyto(student.reshape(B, U), parts[..., _PAYLOAD])
    # Neighbours of one id are student then teacher, and differ in the side bit only.
    shared[0] = False
    np.bitwise_xor(key[1:], key[:-1], out=spare[1:])
    np.equal(spare[1:], _ONE, out=shared[1:])
    padded = student_ids[:, -1].min(initial=0) < 0 or teacher_ids[:, -1].min(initial=0) < 0
    if padded:
        shared &= key < _PAD_KEY
    if spare[1:].min(initial=1) == 0:  # equal keys: padding, the last of a row and the first of the next, or one id twice on one side
        twice_BU = (spare.reshape(B, U) == 0)[:, 1:] & (key.reshape(B, U)[:, 1:] < _PAD_KEY)
        if twice_BU.any():
            raise RepeatedIdError
    shared_BU = shared.reshape(B, U)
    shared_BU[:, 0] = False
    # From here on bits: a mask of ones where the slot is the teacher's, and one where it is shared.
    np.copyto(shared_mask, shared)
    np.negative(shared_mask, out=shared_mask)
    shared_mask = shared_mask.view(np.uint32)
    key &= _ONE
    np.negative(key, out=key)
    np.bitwise_and(student, key, out=teacher)
    student ^= teacher
    np.bitwise_and(teacher, shared_mask, out=spare)
    shared_mass_B = np.einsum("bu->b", spare.view(np.float32).reshape(B, U))
    np.bitwise_and(student[:-1], shared_mask[1:], out=spare[1:])
    student[1:] |= spare[1:]
    student[:-1] ^= spare[1:]
    num_shared_B = np.einsum("bu->b", shared_BU.view(np.int8), dtype=np.int8 if K < 128 else np.int32)
    return Union(
        student.view(np.float32).reshape(B, U),
        teacher.view(np.float32).reshape(B, U),
        num_shared_B.astype(np.int32),
        shared_mass_B,
        None,
    )


def union_in_released_order(student_ids, teacher_ids, p_student, p_teacher, scratch=None) -> Union:
    """As `union_fast` for float64 p, with the members of each row in the order of the released code's Python set."""
    B, K = student_ids.shape
    ids_BU = np.concatenate([student_ids, teacher_ids], axis=1).astype(np.int64)
    keys_BU = (ids_BU << 32) | np.arange(2 * K)
    keys_BU.sort(axis=1)
    shared_BU = ((keys_BU[:, 1:] >> 32) == (keys_BU[:, :-1] >> 32)) & (keys_BU[:, 1:] >= 0)
    rows, columns = np.nonzero(shared_BU)
    if rows.size and ((keys_BU[rows, columns] & 0xFFFFFFFF) // K == (keys_BU[rows, columns + 1] & 0xFFFFFFFF) // K).any():
        raise RepeatedIdError
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
    B, U = x_BU.shape
    if B > 1 and U > 0:
        # Over the slow axis numpy adds whole rows, one after another; a single column it would sum pairwise.
        return np.add.reduce(np.ascontiguousarray(x_BU.T), axis=0)
    total_B = np.zeros(B, x_BU.dtype)
    for column in range(U):
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
    union_ids_BU = np.full(ids_BU.shape, _BEHIND)
    union_ids_BU[np.arange(ids_BU.shape[1]) < counts_B[:, None]] = np.fromiter(chain.from_iterable(unions), np.int64, counts_B.sum())
    # The j-th smallest id is in slot by_id[j] here and at place in_union[j] there; what is no member is behind on both sides.
    by_id_BU = np.argsort(np.where(active_BU, ids_BU, _BEHIND), axis=1)
    slots_BU = np.empty_like(by_id_BU)
    np.put_along_axis(slots_BU, np.argsort(union_ids_BU, axis=1), by_id_BU, axis=1)
    return slots_BU
