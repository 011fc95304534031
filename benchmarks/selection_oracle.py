"""The definitions as a plain Python loop: what `ta_opd` is tested against, and what it is timed against.

One dictionary per token, one float at a time, no numpy. Nothing here is shared with `ta_opd`.
"""

import math
import sys
from fractions import Fraction

EPS = 1e-12
TAIL_RESOLUTION = 1e-6
if sys.version_info >= (3, 12):  # whose own sum of floats carries the rounding along: other last digits than the released code's 3.11

    def sum(values):
        total = 0
        for value in values:
            total += value
        return total


PROXY = {"mass": "Cmass", "set": "Coverlap", "bc": "CBC", "prefix_ema": "Cprefix_ema"}


def probabilities(items) -> dict[int, float]:
    """id -> probability of one position's [logprob, id, text] triples."""
    return {
        item[1]: math.exp(item[0]) for item in items or () if item and item[0] is not None and math.isfinite(item[0])
    }


def entropy(p: dict) -> tuple[float, float]:
    mass = sum(p.values())
    if mass <= 0:
        return 0.0, 0.0
    h = 0.0
    for value in p.values():
        h -= value / mass * math.log(max(value / mass, EPS))
    return max(h, 0.0), max(h, 0.0) / math.log(max(sum(value > 0 for value in p.values()), 2))


def union_floor(s: dict, t: dict) -> tuple[float, float, float]:
    members = set(list(s)).union(list(t))
    mass_s, mass_t = sum(s.get(v, 0.0) for v in members), sum(t.get(v, 0.0) for v in members)
    if mass_s <= 0 or mass_t <= 0:
        return 0.0, 0.0, 0.0
    forward = reverse = overlap = 0.0
    for v in members:
        a, b = max(s.get(v, 0.0) / mass_s, EPS), max(t.get(v, 0.0) / mass_t, EPS)
        forward += b * (math.log(b) - math.log(a))
        reverse += a * (math.log(a) - math.log(b))
        overlap += math.sqrt(a * b)
    return forward, reverse, overlap


def union_tail(s: dict, t: dict) -> tuple[float, float, float]:
    members = set(s) | set(t)
    if sum(s.values()) <= 0 or sum(t.values()) <= 0:
        return 0.0, 0.0, 0.0
    sides = []
    for side in (s, t):
        left = max(1 - sum(side.values()), TAIL_RESOLUTION)
        missing = len(members) - len(side)
        each = max(min(min(side.values()), left / (missing + 1)), 1e-30)
        total = sum(side.values()) + left
        q = {v: max(side.get(v, 0.0), each) / total for v in members}
        q["rest"] = (left - missing * each) / total
        sides.append(q)
    a, b = sides
    forward = sum(b[v] * math.log(b[v] / a[v]) for v in a)
    reverse = sum(a[v] * math.log(a[v] / b[v]) for v in a)
    return forward, reverse, sum(math.sqrt(a[v] * b[v]) for v in a)


def token(student_items, teacher_items, sampled: int, K: int, support: str = "union_floor") -> dict:
    """The metric columns of one token, without those of its sampled log-probs."""
    s, t = probabilities(student_items), probabilities(teacher_items)
    forward, reverse, overlap = (union_floor if support == "union_floor" else union_tail)(s, t)
    s_order, t_order = list(s), list(t)
    mass = min(sum(t.get(v, 0.0) for v in s), 1.0)
    (hs, hs_norm), (ht, ht_norm) = entropy(s), entropy(t)
    return {
        "student_top1_id": s_order[0] if s else -1,
        "teacher_top1_id": t_order[0] if t else -1,
        "student_top1_prob": s[s_order[0]] if s else 0.0,
        "teacher_top1_prob": t[t_order[0]] if t else 0.0,
        "student_topk_mass": min(sum(s.values()), 1.0),
        "teacher_topk_mass": min(sum(t.values()), 1.0),
        "Hs_topk": hs,
        "Ht_topk": ht,
        "Hs_topk_norm": hs_norm,
        "Ht_topk_norm": ht_norm,
        "KLf_union": forward,
        "KLr_union": reverse,
        "CBC": overlap,
        "Cmass": mass,
        "Cmass_topk": mass,
        "Coverlap": len(set(s) & set(t)) / K,
        "reach_t1": int(bool(t) and t_order[0] in s),
        "target_in_student_topk": int(sampled in s),
        "target_in_teacher_topk": int(sampled in t),
        "target_student_rank": s_order.index(sampled) + 1 if sampled in s else 0,
        "target_teacher_rank": t_order.index(sampled) + 1 if sampled in t else 0,
    }


def rows(samples, K: int, support: str = "union_floor", alpha: float = 0.9) -> list[dict]:
    """One dictionary per token of the batch. samples: (student lists, teacher lists, sampled ids) per response."""
    result = []
    for sample, (student, teacher, sampled) in enumerate(samples):
        ema = None
        for position, (s, t, token_id) in enumerate(zip(student, teacher, sampled, strict=True)):
            row = token(s, t, token_id, K, support)
            ema = row["Cmass"] if ema is None else alpha * ema + (1 - alpha) * row["Cmass"]
            result.append({**row, "Cprefix_ema": ema, "sample": sample, "tok_pos": position})
    return result


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    share = place - low
    return ordered[low] * (1 - share) + ordered[high] * share if high > low else ordered[low]


def normalise(values: list[float], population: list[float], scheme: str, q_low: float, q_high: float) -> list[float]:
    finite = [x for x in population if math.isfinite(x)]
    if not finite:
        return [0.0] * len(values)
    if scheme == "batch_quantile":
        low, high = quantile(finite, q_low), quantile(finite, q_high)
    elif scheme == "batch_minmax":
        low, high = min(finite), max(finite)
    else:
        low, high = 0.0, max(max(finite), EPS)
    if abs(high - low) < EPS:
        return [0.0] * len(values)
    return [min(max((x - low) / (high - low), 0.0), 1.0) if math.isfinite(x) else 0.0 for x in values]


def score(table: list[dict], valid: list[bool], *, population="valid", softor="dlearn", proxy="mass",
          scheme="batch_quantile", q_low=0.05, q_high=0.95) -> None:  # fmt: skip
    """Add the score columns to every row, in place."""
    for row in table:
        row["DC"] = row["KLf_union"] * row[PROXY[proxy]]
    pairs = {"H_norm": "Hs_topk_norm", "D_norm": "KLf_union", "C_norm": PROXY[proxy], "DC_norm": "DC"}
    for name, source in pairs.items():
        values = [row[source] for row in table]
        chosen = [x for x, ok in zip(values, valid, strict=True) if ok or population == "all"]
        for row, y in zip(table, normalise(values, chosen, scheme, q_low, q_high), strict=True):
            row[name] = y
    inside = [row for row, ok in zip(table, valid, strict=True) if ok or population == "all"]
    if not inside:
        return
    h_median, d_median = quantile([r["H_norm"] for r in inside], 0.5), quantile([r["D_norm"] for r in inside], 0.5)
    for row in table:
        h, d, c, dc = row["H_norm"], row["D_norm"], row["C_norm"], row["DC_norm"]
        row["Dlearn"], row["Dincompat"] = d * c, d * (1 - c)
        row["tip_score"] = h + d - h * d
        x = d * c if softor == "dlearn" else dc
        row["ca_softor_score"] = h + x - h * x
        row["split_ca_score"] = (1 - h) * dc
        row["quadrant"] = (1 if d >= d_median else 2) if h >= h_median else (3 if d >= d_median else 4)


def select(table: list[dict], valid: list[bool], column: str, ratio: float, *, min_keep: int = 1, on_top=False,
           top_up="own", low=False, q3=False, float_ceil=False, late_ties=False) -> set[int]:  # fmt: skip
    """Kept row numbers of one plain ranking, one budget for the batch."""
    indices = [i for i, ok in enumerate(valid) if ok]
    if not indices:
        return set()
    budget = len(indices) * ratio if float_ceil else len(indices) * Fraction(str(ratio))
    budget = max(1, math.ceil(budget))

    def order(i, name=column, ascending=low):
        place = -table[i]["tok_pos"] if late_ties and ascending else table[i]["tok_pos"]
        return (table[i][name] if ascending else -table[i][name], place, i)

    candidates = {i for i in indices if not q3 or table[i]["quadrant"] == 3}
    by_sample = {}
    for i in indices:
        by_sample.setdefault(table[i]["sample"], []).append(i)
    if on_top:
        kept = set(sorted(candidates, key=order)[:budget])
        for members in by_sample.values():
            lacking = min_keep - sum(i in kept for i in members)
            rest = [i for i in members if i not in kept]
            key = order if top_up == "own" else (lambda i: order(i, "ca_softor_score", False))
            kept.update(sorted(rest, key=key)[: max(lacking, 0)])
        return kept
    reserved: list[int] = []
    for turn in range(min_keep):
        voices = []
        for members in by_sample.values():
            ranked = sorted(members, key=lambda i: (i not in candidates, *order(i)))
            voices.extend(ranked[turn : turn + 1])
        reserved.extend(sorted(voices, key=lambda i: (i not in candidates, *order(i))))
    kept = set(reserved[:budget])
    rest = sorted(candidates - kept, key=order)
    return kept | set(rest[: budget - len(kept)])
