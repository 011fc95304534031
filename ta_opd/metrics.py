"""Per-token quantities of the student's and the teacher's top-K: entropy, divergence, compatibility, overlap, ranks.

Everything is computed from two `TopK` in row blocks that stay in cache; no row depends on another, except `Cprefix_ema`.

Shape suffixes: T positions, K entries per side, U = 2K slots of the union (a slot that is no union member is inactive), N samples,
B rows of one block. Letters: p probabilities as returned, q probabilities of the union distribution, M mass.

Supports of the divergences (D = `KLf_union`, `KLr_union`, `CBC`), U = ids of the student's and the teacher's top-K:

- `union_floor` (the released definition): each side is divided by its own top-K mass; a union member that a side did not return gets
  1e-12, so each teacher-only token adds about q_teacher * 27 nats to D.
- `union_tail`: nothing is invented. A side that returned mass M and smallest probability p_min, and lacks n members of the union, has
  R = max(1 - M, 1e-6) left for everything it did not return (1e-6 is what float32 log-probs can resolve of a mass near 1). R is spread
  over the n missing members and one shared rest bucket, and no missing member can be likelier than the least likely returned one:
  each missing member gets m = min(p_min, R / (n + 1)) (at least 1e-30), the rest bucket gets R - n*m >= R / (n + 1). Both sides are divided by
  M + R, sum to 1 over U and the rest bucket, and the divergences are over U and the rest bucket. So D >= 0, D = 0 for equal sides, and
  D is finite and bounded by what the replies can tell apart.
- `exact`: full-vocabulary values handed in by a caller that has them; only ranks, masses and overlap come from the top-K.

A side that returned nothing has D = KLr = CBC = C = 0 in every support.
"""

from collections.abc import Mapping

import numpy as np

from ta_opd import libm
from ta_opd.errors import ConfigError, DataError
from ta_opd.ranking import Rows
from ta_opd.topk import PAD_ID, TopK, TopKParts
from ta_opd.union import RepeatedIdError, Scratch, Union, ordered_sum, union_fast, union_in_released_order

EPS = 1e-12
TAIL_RESOLUTION = 1e-6
SMALLEST = 1e-30
SUPPORTS = ("union_floor", "union_tail", "exact")
MAX_LOGPROB = 80.0  # exp() of more overflows float32 sums; a log-prob above 0 is malformed anyway
BLOCK_SLOTS = 1 << 16  # slots of one block: its buffers stay in a core's cache

METRIC_COLUMNS = (
    "student_logp_sampled", "teacher_logp_sampled", "sampled_reverse_kl", "sampled_teacher_adv",
    "student_top1_id", "teacher_top1_id", "student_top1_prob", "teacher_top1_prob",
    "student_topk_mass", "teacher_topk_mass", "Hs_topk", "Ht_topk", "Hs_topk_norm", "Ht_topk_norm",
    "KLf_union", "KLr_union", "Cmass", "Cmass_topk", "Cmass_true", "Cmass_exact", "Coverlap", "CBC", "Cprefix_ema",
    "reach_t1", "target_in_student_topk", "target_in_teacher_topk", "target_student_rank", "target_teacher_rank",
)  # fmt: skip
_INT8 = ("Cmass_exact", "reach_t1", "target_in_student_topk", "target_in_teacher_topk")
_INT32 = ("student_top1_id", "teacher_top1_id", "target_student_rank", "target_teacher_rank")


def token_metrics(
    student: TopK | TopKParts,
    teacher: TopK | TopKParts,
    *,
    sampled_ids,
    student_logprobs,
    teacher_logprobs,
    response_lengths,
    support: str = "union_floor",
    prefix_ema_alpha: float | None = 0.9,
    teacher_at_student_ids: np.ndarray | None = None,
    partly_exact: bool = False,
    exact: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All metric columns of the token bank, each [T], T = sum(response_lengths).

    student, teacher: top-K of every response position, the samples one after another (in parts: nothing large is copied).
    sampled_ids [T]: the sampled tokens.
    student_logprobs, teacher_logprobs [T]: log-probs of the sampled tokens (NaN where unknown). response_lengths [N].
    support: see the module. prefix_ema_alpha: see `prefix_ema`; None leaves `Cprefix_ema` out.
    teacher_at_student_ids [T, K]: teacher log-probs at the student's ids, NaN where unknown; a row known in full has an exact C
    (`Cmass_exact` 1, `Cmass` = `Cmass_true`). A row known in part is exact only with `partly_exact` (the released way: what is unknown
    counts 0). exact: full-vocabulary "H" (nats), "KLf", "KLr", "C", each [T], and optionally "vocab_size" (then
    Hs_topk_norm = H / ln(vocab_size), else H) and "CBC"; needed when support is "exact".

    Floats are float64 when either TopK is (every released value is met within 1e-9), else float32. Encodings: no top-1 -1, no rank 0,
    unknown `Cmass_true` NaN, flags int8. Raises DataError on lengths or K that do not match, ConfigError on an unknown support.
    """
    lengths_N = np.asarray(response_lengths, np.int64)
    T = int(lengths_N.sum())
    _check_inputs(student, teacher, T, support, exact)
    dtype = np.result_type(student.dtype, teacher.dtype)
    out = _allocate(T, dtype)
    out["student_logp_sampled"][:] = _row_values(student_logprobs, T, "student_logprobs", dtype)
    out["teacher_logp_sampled"][:] = _row_values(teacher_logprobs, T, "teacher_logprobs", dtype)
    sampled_T = _row_values(sampled_ids, T, "sampled_ids", np.int64)
    with np.errstate(invalid="ignore"):
        out["sampled_reverse_kl"][:] = out["student_logp_sampled"] - out["teacher_logp_sampled"]
    out["sampled_reverse_kl"][~np.isfinite(out["sampled_reverse_kl"])] = np.nan
    np.negative(out["sampled_reverse_kl"], out=out["sampled_teacher_adv"])

    slots = BLOCK_SLOTS if dtype == np.float32 else BLOCK_SLOTS // 8
    rows = max(64, slots // (2 * max(student.K, 1)))
    scratch = Scratch()
    for start in range(0, T, rows):
        block = slice(start, min(start + rows, T))
        view = {name: values[block] for name, values in out.items()}
        sides = [_usable(side[block].astype(dtype)) for side in (student, teacher)]
        try:
            _block_metrics(*sides, sampled_T[block], support, scratch, view)
        except RepeatedIdError:
            _block_metrics(*(side.checked() for side in sides), sampled_T[block], support, scratch, view)
    _exact_mass(out, student, teacher_at_student_ids, partly_exact)
    if support == "exact":
        _full_vocabulary(out, exact, T)
    if prefix_ema_alpha is None:
        del out["Cprefix_ema"]
    else:
        out["Cprefix_ema"] = prefix_ema(out["Cmass"], lengths_N, prefix_ema_alpha)
    return out


def position_columns(response_lengths) -> dict[str, np.ndarray]:
    """Where each token is: `tok_pos` int32 within its response, `pos_norm` = tok_pos / max(length - 1, 1), `sample` int32, each [T]."""
    rows = Rows.of(response_lengths)
    return {"tok_pos": rows.tok_pos, "pos_norm": rows.place(), "sample": rows.sample}


def _check_inputs(student: TopK | TopKParts, teacher: TopK | TopKParts, T: int, support: str, exact) -> None:
    if support not in SUPPORTS:
        raise ConfigError(f"divergence support: expected one of {', '.join(SUPPORTS)}, got {support!r}")
    for side, topk in (("student", student), ("teacher", teacher)):
        if topk.T != T:
            raise DataError(f"{side} top-k: expected {T} positions (the sum of the response lengths), got {topk.T}")
    if student.K != teacher.K:
        raise DataError(f"top-k: student has K = {student.K}, teacher has K = {teacher.K}; ask both for the same K")
    if support == "exact":
        missing = [name for name in ("H", "KLf", "KLr", "C") if exact is None or name not in exact]
        if missing:
            raise DataError(f"support 'exact' needs full-vocabulary {', '.join(missing)} in exact={{...}}")


def _row_values(values, T: int, name: str, dtype) -> np.ndarray:
    values_T = np.full(T, np.nan, dtype) if values is None else np.asarray(values, dtype)
    if values_T.shape != (T,):
        raise DataError(f"{name}: expected {T} values (the sum of the response lengths), got shape {values_T.shape}")
    return values_T


def _allocate(T: int, dtype) -> dict[str, np.ndarray]:
    kinds = dict.fromkeys(_INT8, np.int8) | dict.fromkeys(_INT32, np.int32)
    return {name: np.zeros(T, kinds.get(name, dtype)) for name in METRIC_COLUMNS}


def _block_metrics(student: TopK, teacher: TopK, sampled_B, support: str, scratch: Scratch, out: dict) -> None:
    p_sides, mass_sides = [], []
    for name, short, topk in (("student", "Hs", student), ("teacher", "Ht", teacher)):
        p_BK = scratch(f"p {name}", topk.ids.shape, topk.logprobs.dtype)
        libm.exp(np.minimum(topk.logprobs, MAX_LOGPROB, out=p_BK), out=p_BK)
        mass_B = _row_sum(p_BK)
        np.minimum(mass_B, 1, out=out[f"{name}_topk_mass"])
        _entropy(p_BK, mass_B, scratch, out[f"{short}_topk"], out[f"{short}_topk_norm"])
        if topk.K:
            out[f"{name}_top1_id"][:] = topk.ids[:, 0]
            out[f"{name}_top1_prob"][:] = p_BK[:, 0]
            rank_B = _rank_of(sampled_B, topk.ids)
            out[f"target_{name}_rank"][:] = rank_B
            np.greater(rank_B, 0, out=out[f"target_in_{name}_topk"].view(bool))
        p_sides.append(p_BK)
        mass_sides.append(mass_B)
    if student.K == 0:
        return
    np.greater(_rank_of(teacher.ids[:, 0], student.ids), 0, out=out["reach_t1"].view(bool))
    match = union_in_released_order if mass_sides[0].dtype == np.float64 else union_fast
    union = match(student.ids, teacher.ids, *p_sides, scratch)
    np.divide(union.num_shared, student.K, out=out["Coverlap"], casting="same_kind")
    np.minimum(union.shared_mass, 1, out=out["Cmass_topk"])
    out["Cmass"][:] = out["Cmass_topk"]
    tails = _tails(union, student, teacher, p_sides, mass_sides) if support == "union_tail" else None
    _divergences(union, mass_sides, tails, scratch, out)


def _usable(topk: TopK) -> TopK:
    """Entries with an id and a finite log-prob, as `TopK.from_lists` leaves them; hand-made arrays may need repair."""
    if np.array_equal(topk.ids >= 0, np.isfinite(topk.logprobs)) and (topk.logprobs < np.inf).all():  # nan is not less either
        return topk
    return topk.checked()


def _rank_of(token_B, ids_BK) -> np.ndarray:
    """1-based place of a token in each row, 0 where it is not there (or is the padding -1)."""
    hit_BK = ids_BK == token_B.astype(np.int32, copy=False)[:, None]
    rank_B = hit_BK.argmax(axis=1) + 1
    rank_B *= hit_BK[np.arange(len(rank_B)), rank_B - 1]
    rank_B *= token_B >= 0
    return rank_B


def _row_sum(x_BU: np.ndarray) -> np.ndarray:
    """Sum of each row, the same for equal rows wherever they stand in the batch (a BLAS product does not promise that)."""
    return ordered_sum(x_BU) if x_BU.dtype == np.float64 else np.einsum("bu->b", x_BU)


def _row_dot(a_BU: np.ndarray, b_BU: np.ndarray) -> np.ndarray:
    return ordered_sum(a_BU * b_BU) if a_BU.dtype == np.float64 else np.einsum("bu,bu->b", a_BU, b_BU)


def _positive(mass_B: np.ndarray) -> np.ndarray:
    """Masses to divide by: 1 where there is none."""
    return np.where(mass_B > 0, mass_B, mass_B.dtype.type(1))


def _entropy(p_BK, mass_B, scratch: Scratch, entropy_B, normalised_B) -> None:
    """Entropy (nats) of each row divided by its mass, and the same over ln(max(number of p > 0, 2)); 0 for a row without mass."""
    q_BK, log_q_BK = (scratch(name, p_BK.shape, p_BK.dtype) for name in ("entropy q", "entropy log"))
    np.divide(p_BK, _positive(mass_B)[:, None], out=q_BK)
    np.maximum(q_BK, _column(EPS, q_BK), out=log_q_BK)
    libm.log(log_q_BK, out=log_q_BK)
    np.negative(_row_dot(q_BK, log_q_BK), out=entropy_B)
    np.maximum(entropy_B, 0, out=entropy_B)
    K = p_BK.shape[1]
    log_counts = libm.log(np.maximum(np.arange(K + 1), 2).astype(p_BK.dtype))
    num_positive_B = K if (p_BK[:, -1:] > 0).all() else np.count_nonzero(p_BK, axis=1)
    np.divide(entropy_B, log_counts[num_positive_B], out=normalised_B)


def _column(value: float, like_BU: np.ndarray) -> np.ndarray:
    """One value as [B, 1]: numpy's two-array loops are faster than those with a scalar."""
    return np.full((like_BU.shape[0], 1), value, like_BU.dtype)


def _tails(union: Union, student: TopK, teacher: TopK, p_sides, mass_sides) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per side (R, m, n): the probability left for what it did not return, what a missing member gets, and how many are missing."""
    counts = [_num_real(topk.ids) for topk in (student, teacher)]
    result = []
    for p_BK, mass_B, count_B, other_count_B in zip(p_sides, mass_sides, counts, counts[::-1], strict=True):
        num_missing_B = other_count_B - union.num_shared
        left_B = np.maximum(1 - mass_B, TAIL_RESOLUTION).astype(p_BK.dtype)
        smallest_B = p_BK[np.arange(len(p_BK)), np.maximum(count_B - 1, 0)]
        missing_B = np.minimum(smallest_B, left_B / (num_missing_B + 1))
        result.append((left_B, missing_B.astype(p_BK.dtype), num_missing_B))
    return result


def _num_real(ids_BK: np.ndarray) -> np.ndarray:
    """[B] entries of each row; padding is last, so a row whose last id is real is full."""
    if (ids_BK[:, -1] >= 0).all():
        return np.full(ids_BK.shape[0], ids_BK.shape[1])
    return (ids_BK >= 0).sum(axis=1)


def _divergences(union: Union, mass_sides, tails, scratch: Scratch, out: dict) -> None:
    q_sides, rests = [], []
    for side, p_BU in enumerate((union.p_student, union.p_teacher)):
        if tails is None:
            # In float64 the released code sums the mass over the union once more, in the union's order.
            total_B = _positive(ordered_sum(p_BU) if p_BU.dtype == np.float64 else mass_sides[side])
            floor_B1 = _column(EPS, p_BU)
        else:
            left_B, missing_B, num_missing_B = tails[side]
            total_B = mass_sides[side] + left_B
            floor_B1 = np.maximum(missing_B / total_B, SMALLEST)[:, None]
            rest_B = (left_B - num_missing_B.astype(p_BU.dtype) * missing_B) / total_B
            rests.append(np.maximum(rest_B, SMALLEST))
        q_BU = np.divide(p_BU, total_B[:, None], out=scratch(f"q {side}", p_BU.shape, p_BU.dtype))
        q_sides.append(np.maximum(q_BU, floor_B1, out=q_BU))
    q_student_BU, q_teacher_BU = q_sides
    ratio_BU, log_BU = (scratch(name, q_student_BU.shape, q_student_BU.dtype) for name in ("ratio", "log"))
    libm.log(q_teacher_BU, out=ratio_BU)
    ratio_BU -= libm.log(q_student_BU, out=log_BU)
    active_BU = union.active
    if active_BU is None and tails is not None:
        active_BU = (union.p_student > 0) | (union.p_teacher > 0)
    if active_BU is not None:
        ratio_BU *= active_BU
    forward_B = _row_dot(q_teacher_BU, ratio_BU)
    reverse_B = -_row_dot(q_student_BU, ratio_BU)
    q_student_BU *= q_teacher_BU
    np.sqrt(q_student_BU, out=q_student_BU)
    # With the 1e-12 floor an inactive slot adds 1e-12, which float32 cannot see.
    overlap_B = _row_sum(q_student_BU) if active_BU is None else _row_dot(q_student_BU, active_BU.astype(q_student_BU.dtype))
    if tails is not None:
        rest_ratio_B = libm.log(rests[1]) - libm.log(rests[0])
        forward_B += rests[1] * rest_ratio_B
        reverse_B -= rests[0] * rest_ratio_B
        overlap_B += np.sqrt(rests[0] * rests[1])
    known_B = (mass_sides[0] > 0) & (mass_sides[1] > 0)
    for name, values_B in (("KLf_union", forward_B), ("KLr_union", reverse_B), ("CBC", overlap_B)):
        np.multiply(values_B, known_B, out=out[name])


def _exact_mass(out: dict, student: TopK | TopKParts, teacher_at_student_ids, partly_exact: bool) -> None:
    """C from the teacher's log-probs at the student's ids, where known (paper eq. 4, without the bound of eq. 17)."""
    out["Cmass_true"].fill(np.nan)
    if teacher_at_student_ids is None:
        return
    known = np.asarray(teacher_at_student_ids)
    if known.shape != (student.T, student.K):
        raise DataError(f"teacher_at_student_ids: expected shape {(student.T, student.K)}, got {known.shape}")
    if student.K == 0:
        return
    rows = max(64, BLOCK_SLOTS // student.K)
    for start in range(0, student.T, rows):
        block = slice(start, start + rows)
        given_BK = ~np.isnan(known[block])
        real_BK = student[block].ids != PAD_ID
        any_B = given_BK.any(axis=1)
        exact_B = any_B if partly_exact else any_B & (given_BK | ~real_BK).all(axis=1)
        p_BK = libm.exp(np.minimum(np.where(given_BK & real_BK, known[block], -np.inf), MAX_LOGPROB))
        mass_B = np.clip(_row_sum(p_BK), 0.0, 1.0)
        out["Cmass_exact"][block] = exact_B
        out["Cmass_true"][block][exact_B] = mass_B[exact_B]
        out["Cmass"][block][exact_B] = mass_B[exact_B]


def _full_vocabulary(out: dict, exact: Mapping, T: int) -> None:
    names = {"H": "Hs_topk", "KLf": "KLf_union", "KLr": "KLr_union", "C": "Cmass", "CBC": "CBC"}
    for name, column in names.items():
        if name in exact:
            out[column][:] = _row_values(exact[name], T, f"exact[{name!r}]", out[column].dtype)
    out["Cmass_true"][:] = out["Cmass"]
    out["Cmass_exact"][:] = 1
    vocab_size = exact.get("vocab_size")
    out["Hs_topk_norm"][:] = out["Hs_topk"] / (np.log(vocab_size) if vocab_size else 1.0)


def prefix_ema(c_T: np.ndarray, response_lengths, alpha: float) -> np.ndarray:
    """Exponential mean of C over the prefix of each sample, [T] in C's dtype: e_0 = C_0, e_t = alpha*e_(t-1) + (1-alpha)*C_t.

    All samples step together, longest first: a step costs the same for one sample as for many.
    """
    lengths_N, ema_T = np.asarray(response_lengths, np.int64), np.zeros_like(c_T)
    if c_T.size == 0:
        return ema_T
    starts_N = np.cumsum(lengths_N) - lengths_N
    order_N = np.argsort(-lengths_N, kind="stable")
    order_N = order_N[lengths_N[order_N] > 0]
    starts_N, lengths_N = starts_N[order_N], lengths_N[order_N]
    state_N = c_T[starts_N].astype(np.float64)
    ema_T[starts_N] = state_N
    alive = len(starts_N)
    for position in range(1, int(lengths_N[0])):
        while lengths_N[alive - 1] <= position:
            alive -= 1
        at_N = starts_N[:alive] + position
        state_N = alpha * state_N[:alive] + (1 - alpha) * c_T[at_N]
        ema_T[at_N] = state_N
    return ema_T
