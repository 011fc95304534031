"""The released behaviour of `process_tip_compat_metrics` in plain Python, one float at a time: samples in, rows and kept row numbers out.

Written from the definitions alone; nothing here is shared with `ta_opd`. Quirks are the released ones: statistics over all response
tokens, loss-masked ones too, a budget in floating point, min-keep on top of the budget and by ca_softor_score whatever the method.
"""

import math
import random

EPS = 1e-12
PROXY = {"mass": "Cmass", "set": "Coverlap", "bc": "CBC", "prefix_ema": "Cprefix_ema"}
RANKED = {  # method: (score, only Q3, lowest first)
    "entropy": ("H_norm", False, False),
    "divergence": ("D_norm", False, False),
    "tip": ("tip_score", False, False),
    "compatibility": ("C_norm", False, False),
    "ca_softor": ("ca_softor_score", False, False),
    "dlearn_high": ("Dlearn", False, False),
    "teachability": ("Dlearn", False, False),
    "teachability_high": ("Dlearn", False, False),
    "dincompat_high": ("Dincompat", False, False),
    "q3": ("split_ca_score", True, False),
    "q3_highc": ("C_norm", True, False),
    "q3_lowc": ("C_norm", True, True),
    "q3_teachability_high": ("Dlearn", True, False),
    "q3_dlearn_high": ("Dlearn", True, False),
    "q3_teachability_low": ("Dlearn", True, True),
    "q3_dlearn_low": ("Dlearn", True, True),
    "q3_dincompat_high": ("Dincompat", True, False),
}
METHODS = (*RANKED, "split_budget_ca", "random")


def added(values) -> float:
    """Plainly from left to right; `sum` compensates for rounding since Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


def finite(value) -> bool:
    return value is not None and math.isfinite(value)


def top(items) -> dict[int, float]:
    """id -> probability of one position."""
    return {item[1]: math.exp(item[0]) for item in items or [] if item and finite(item[0])}


def clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def entropy(p: dict[int, float]) -> tuple[float, float]:
    mass = added(p.values())
    if mass <= 0:
        return 0.0, 0.0
    h = max(-added(v / mass * math.log(max(v / mass, EPS)) for v in p.values() if v > 0), 0.0)
    return h, h / math.log(max(len([v for v in p.values() if v > 0]), 2))


def divergences(s: dict, t: dict) -> tuple[float, float, float]:
    union = set(list(s)).union(list(t))  # the order in which a set of ids is summed decides last bits, and they decide ties
    mass_s, mass_t = added(s.get(v, 0.0) for v in union), added(t.get(v, 0.0) for v in union)
    if mass_s <= 0 or mass_t <= 0:
        return 0.0, 0.0, 0.0
    forward = reverse = overlap = 0.0
    for v in union:
        ps, pt = max(s.get(v, 0.0) / mass_s, EPS), max(t.get(v, 0.0) / mass_t, EPS)
        forward += pt * (math.log(pt) - math.log(ps))
        reverse += ps * (math.log(ps) - math.log(pt))
        overlap += math.sqrt(ps * pt)
    return forward, reverse, overlap


def measure(args: dict, samples: list[dict], teacher_log_probs: list, replies: list[dict]) -> list[dict]:
    """One dictionary a response token. samples: tokens, response_length, loss_mask, rollout_log_probs, student_top_logprobs."""
    rows, k, alpha = [], args["opd_topk_metrics_k"], args["opd_compat_prefix_ema_alpha"]
    for number, (sample, logs, reply) in enumerate(zip(samples, teacher_log_probs, replies, strict=True)):
        length, info, ema = sample["response_length"], reply["meta_info"], None
        teachers = info["input_top_logprobs"][len(info["input_top_logprobs"]) - length :]
        asked = info.get("input_token_ids_logprobs") if args["opd_exact_cmass"] else None
        asked = asked[len(asked) - length :] if asked else [None] * length
        for place in range(length):
            s, t = top(sample["student_top_logprobs"][place]), top(teachers[place])
            s_ids, t_ids, token = list(s), list(t), sample["tokens"][len(sample["tokens"]) - length + place]
            known = top(asked[place])
            lower = clamp(added(t.get(v, 0.0) for v in s))
            true = clamp(added(known.get(v, 0.0) for v in s)) if known else None
            c = lower if true is None else true
            ema = c if ema is None else alpha * ema + (1 - alpha) * c
            (hs, hs_norm), (ht, ht_norm) = entropy(s), entropy(t)
            forward, reverse, overlap = divergences(s, t)
            student_logp, teacher_logp = sample["rollout_log_probs"][place], logs[place]
            both = finite(student_logp) and finite(teacher_logp)
            rows.append({
                "sample": number, "tok_pos": place, "pos_norm": place / max(length - 1, 1), "token_id": token,
                "student_logp_sampled": student_logp, "teacher_logp_sampled": teacher_logp,
                "sampled_reverse_kl": student_logp - teacher_logp if both else None,
                "sampled_teacher_adv": teacher_logp - student_logp if both else None,
                "student_top1_id": s_ids[0] if s else None, "teacher_top1_id": t_ids[0] if t else None,
                "student_top1_prob": s[s_ids[0]] if s else 0.0, "teacher_top1_prob": t[t_ids[0]] if t else 0.0,
                "student_topk_mass": clamp(added(s.values())), "teacher_topk_mass": clamp(added(t.values())),
                "Hs_topk": hs, "Ht_topk": ht, "Hs_topk_norm": hs_norm, "Ht_topk_norm": ht_norm,
                "KLf_union": forward, "KLr_union": reverse, "CBC": overlap,
                "Cmass": c, "Cmass_topk": lower, "Cmass_true": true, "Cmass_exact": int(true is not None),
                "Coverlap": len(set(s) & set(t)) / k, "Cprefix_ema": ema, "reach_t1": int(bool(t) and t_ids[0] in s),
                "target_in_student_topk": int(token in s), "target_in_teacher_topk": int(token in t),
                "target_student_rank": s_ids.index(token) + 1 if token in s else None,
                "target_teacher_rank": t_ids.index(token) + 1 if token in t else None,
                "loss_mask_original": 1 if sample["loss_mask"] is None else int(sample["loss_mask"][place]),
            })  # fmt: skip
    score(args, rows)
    return rows


def quantile(values: list[float], q: float) -> float:
    ordered, place = sorted(values), q * (len(values) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] if low == high else ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


def norm(args: dict, values: list[float]) -> list[float]:
    known, mode = [v for v in values if math.isfinite(v)], args["opd_metric_normalization"]
    if not known:
        return [0.0] * len(values)
    if mode == "none":
        low, high = 0.0, max(max(known), EPS)
    elif mode == "batch_minmax":
        low, high = min(known), max(known)
    else:
        low, high = quantile(known, args["opd_metric_q_low"]), quantile(known, args["opd_metric_q_high"])
    if abs(high - low) < EPS:
        return [0.0] * len(values)
    return [clamp((v - low) / (high - low)) if math.isfinite(v) else 0.0 for v in values]


def score(args: dict, rows: list[dict]) -> None:
    """The score columns, in place."""
    proxy = PROXY[args["opd_compat_proxy"]]
    sources = {
        "H_norm": [r["Hs_topk_norm"] for r in rows], "D_norm": [r["KLf_union"] for r in rows], "C_norm": [r[proxy] for r in rows],
        "DC_norm": [r["KLf_union"] * r[proxy] for r in rows],
    }  # fmt: skip
    for name, values in sources.items():
        for row, value in zip(rows, norm(args, values), strict=True):
            row[name] = value
    if not rows:
        return
    h_half, d_half = quantile([r["H_norm"] for r in rows], 0.5), quantile([r["D_norm"] for r in rows], 0.5)
    for r in rows:
        h, d, c, dc = r["H_norm"], r["D_norm"], r["C_norm"], r["DC_norm"]
        r["Dlearn"], r["Dincompat"], r["split_ca_score"] = d * c, d * (1 - c), (1 - h) * dc
        r["tip_score"], r["ca_softor_score"] = h + d - h * d, h + dc - h * dc
        half = "highH" if h >= h_half else "lowH", "highD" if d >= d_half else "lowD"
        r["quadrant"] = {("highH", "highD"): "Q1", ("highH", "lowD"): "Q2", ("lowH", "highD"): "Q3", ("lowH", "lowD"): "Q4"}[half]
        r["quadrant"] += "_" + "_".join(half)


def select(args: dict, rows: list[dict], method: str, ratio: float, rollout_id: int = 0) -> list[int] | None:
    """Kept row numbers, ascending; None where the masks are left as they are."""
    valid = [i for i, r in enumerate(rows) if r["loss_mask_original"]]
    if method in ("none", "full") or ratio >= 1 or not valid:
        return None
    budget = max(1, math.ceil(len(valid) * ratio))

    def best(pool: list[int], column: str, count: int, lowest: bool = False) -> list[int]:
        if lowest:  # ascending in the score, and then backwards in the position
            return sorted(pool, key=lambda i: (rows[i][column], -rows[i]["tok_pos"], i))[:count]
        return sorted(pool, key=lambda i: (-rows[i][column], rows[i]["tok_pos"], i))[:count]

    if method == "random":
        pool = list(valid)
        random.Random(args["opd_budget_mask_seed"] + rollout_id).shuffle(pool)
        kept = set(pool[:budget])
    elif method == "split_budget_ca":
        kept = set(best(valid, "H_norm", min(max(round(budget * args["opd_budget_gamma"]), 0), budget)))
        for column in ("split_ca_score", "ca_softor_score"):
            kept |= set(best([i for i in valid if i not in kept], column, budget - len(kept)))
    else:
        column, inside_q3, lowest = RANKED[method]
        kept = set(best([i for i in valid if not inside_q3 or rows[i]["quadrant"].startswith("Q3")], column, budget, lowest))
    for number in {rows[i]["sample"] for i in valid}:
        mine = [i for i in valid if rows[i]["sample"] == number]
        missing = args["opd_budget_min_keep_per_sample"] - sum(i in kept for i in mine)
        kept |= set(best([i for i in mine if i not in kept], "ca_softor_score", max(missing, 0)))
    return sorted(kept)


def reported(rows: list[dict], method: str, ratio: float) -> list[float]:
    """The budget_score column."""
    if method in ("none", "full", "random") or ratio >= 1 or not any(r["loss_mask_original"] for r in rows):
        return [0.0] * len(rows)
    if method == "split_budget_ca":
        return [max(r["H_norm"], r["split_ca_score"]) for r in rows]
    column, _, lowest = RANKED[method]
    return [1 - r[column] if lowest else r[column] for r in rows]
