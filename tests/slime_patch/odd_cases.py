"""Random batches in the form of the recorded cases, of the same kinds and of an odder one: what servers and samples can look like."""

import math
import random

KINDS = ("plain", "masked", "nomask", "same", "disjoint", "flat", "short", "nan", "empty", "exact", "odd")


def make_case(kind: str, seed: int) -> dict:
    """args, samples, teacher_log_probs and teacher_replies of one batch."""
    rng, odd = random.Random(f"{kind} {seed}"), kind == "odd"
    k = rng.choice([1, 2, 3, 4, 8, 16])
    vocab = max(4 * k + 1, rng.choice([0, 64, 512, 151_936]))
    args = {
        "opd_topk_metrics_k": k,
        "opd_compat_proxy": rng.choice(["mass", "set", "bc", "prefix_ema"]),
        "opd_compat_prefix_ema_alpha": rng.choice([0.0, 0.5, 0.9, 1.0] if odd else [0.5, 0.9]),
        "opd_metric_normalization": rng.choice(["batch_quantile", "batch_minmax", "none"]),
        "opd_metric_q_low": rng.choice([0.0, 0.05, 0.1]),
        "opd_metric_q_high": rng.choice([0.9, 0.95, 1.0]),
        "opd_budget_gamma": rng.choice([0.0, 0.3, 0.5, 0.77, 1.0]),
        "opd_budget_mask_seed": rng.randrange(100),
        "opd_budget_min_keep_per_sample": rng.choice([0, 1, 3, 50] if odd else [0, 1, 2]),
        "opd_exact_cmass": kind == "exact" or odd and rng.random() < 0.5,
    }
    case = {"name": f"{kind}-{seed}", "args": args, "samples": [], "teacher_log_probs": [], "teacher_replies": []}
    prompt = rng.randint(1, 9)
    for index in range(1 if odd and rng.random() < 0.2 else rng.randint(2, 6)):
        prompt = rng.randint(1, 9) if odd else prompt
        length = rng.choice([1, 2]) if odd and rng.random() < 0.3 else rng.randint(1, 30)
        if kind == "empty" and index % 2 or odd and rng.random() < 0.1:
            length = 0
        _add_sample(case, rng, kind, k, vocab, prompt, length)
    return case


def _add_sample(case: dict, rng: random.Random, kind: str, k: int, vocab: int, prompt: int, length: int) -> None:
    students, teachers, odd = [], [], kind == "odd"
    for _ in range(length):
        student, teacher = _position(rng, rng.choice(["plain", "same", "disjoint", "flat"]) if odd else kind, k, vocab)
        if odd and students and rng.random() < 0.3:  # the very position before: ties
            student, teacher = students[-1], teachers[-1]
        students.append(_spoilt(rng, kind, student))
        teachers.append(_spoilt(rng, kind, teacher))
    tokens = [rng.randrange(vocab) for _ in range(prompt + length)]
    for place, lists in enumerate(zip(students, teachers, strict=True)):
        seen = [item[1] for items in lists for item in items or [] if item]
        if seen and rng.random() < 0.8:
            tokens[prompt + place] = rng.choice(seen)
    mask = [1] * length
    if kind == "nomask" or odd and rng.random() < 0.3:
        mask = None
    elif kind == "masked" or odd:
        mask = [0] * length if odd and rng.random() < 0.2 else [int(rng.random() < 0.8) for _ in range(length)]
    info = {"input_top_logprobs": [None, *([[[-0.1, 0, None]]] * (prompt - 1)), *teachers]}
    if case["args"]["opd_exact_cmass"] and not (odd and rng.random() < 0.2):
        info["input_token_ids_logprobs"] = [None, *([[]] * (prompt - 1)), *_answers(rng, students, odd)]
    number = len(case["samples"])
    case["samples"].append({
        "tokens": tokens, "response_length": length, "loss_mask": mask, "student_top_logprobs": students, "index": number,
        "rollout_log_probs": [_sampled(rng, kind) for _ in range(length)], "group_index": number // 2,
        "status": rng.choice(["completed", "truncated"]),
    })  # fmt: skip
    case["teacher_log_probs"].append([_sampled(rng, kind) for _ in range(length)])
    case["teacher_replies"].append({"meta_info": info})


def _position(rng: random.Random, kind: str, k: int, vocab: int) -> tuple[list, list]:
    """(student's, teacher's) triples of one position."""
    ids = rng.sample(range(vocab), 2 * k)
    if kind == "flat":
        logprob = rng.choice([math.log(1 / k), -3.0])
        return [[logprob, i, None] for i in ids[:k]], [[logprob, i, None] for i in rng.sample(ids, k)]
    student = _weighed(rng, ids[:k])
    if kind == "same":
        return student, [list(item) for item in student]
    other = ids[k:] if kind == "disjoint" else rng.sample(ids, k)
    return student, _weighed(rng, other)


def _weighed(rng: random.Random, ids: list[int]) -> list:
    weights = sorted((rng.expovariate(1) ** 3 + 1e-9 for _ in ids), reverse=True)
    mass = rng.uniform(0.5, 0.9999) / sum(weights)
    return [[math.log(w * mass), i, None] for w, i in zip(weights, ids, strict=True)]


def _spoilt(rng: random.Random, kind: str, items: list | None) -> list | None:
    """The same position, perhaps with what its kind of batch is known for."""
    if kind not in ("short", "nan", "odd") or rng.random() > 0.3 or not items or not all(items):
        return items
    items = [list(item) for item in items]
    if kind == "short":
        return items[: rng.randint(0, len(items))]
    spot = rng.randrange(len(items))
    values = [-math.inf, math.nan] if kind == "nan" else [-math.inf, math.nan, None, -1e5, -745.2, -700.0, 0.0, 0.3]
    items[spot][0] = rng.choice(values)
    if kind == "nan":
        return items
    whole = [items, items[:spot], [], None, [*items[:spot], None, *items[spot + 1 :]], [*items[:spot], [], *items[spot + 1 :]]]
    return rng.choice(whole)


def _answers(rng: random.Random, students: list, odd: bool) -> list:
    """What the teacher gives for the union of the student's ids at every position; an odd one leaves things out."""
    union = list(dict.fromkeys(item[1] for items in students for item in items or [] if item))
    rows = [[[-rng.expovariate(0.3) - 1, i, None] for i in union] for _ in students]
    if not odd:
        return rows
    fewer = [[item for item in row if rng.random() < 0.5] for row in rows]
    unknown = [[[rng.choice([None, -math.inf, item[0]]), item[1], None] for item in row] for row in rows]
    others = [[-1.0, 151_940, None]]
    return [rng.choice([row, row, part, gap, others, [], None]) for row, part, gap in zip(rows, fewer, unknown, strict=True)]


def _sampled(rng: random.Random, kind: str) -> float | None:
    value = -rng.expovariate(1)
    return rng.choice([math.nan, -math.inf, None]) if kind in ("nan", "odd") and rng.random() < 0.05 else value
