"""Batches for the tests of the method library: random replies in the servers' list form, and the released cases."""

import gzip
import json
import math
import random
from pathlib import Path

import numpy as np

from ta_opd.metrics import token_metrics
from ta_opd.topk import TopK, gathered_logprobs, last_positions

CASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "selection_cases.json.gz").read_bytes()))


def released_case(case: dict, dtype=np.float64) -> tuple[dict, np.ndarray, list[int]]:
    """(metrics, valid, response lengths) of one released case; float64 is the parity dtype."""
    K, samples = case["args"]["opd_topk_metrics_k"], case["samples"]
    lengths = [sample["response_length"] for sample in samples]
    students = [TopK.from_lists(sample["student_top_logprobs"], K, dtype=dtype) for sample in samples]
    infos = [reply["meta_info"] for reply in case["teacher_replies"]]
    teachers = [
        TopK.from_reply(info, "teacher", K, n, dtype=dtype) for info, n in zip(infos, lengths, strict=True)
    ]
    known = None
    if case["args"]["opd_exact_cmass"]:
        field = "input_token_ids_logprobs"
        known = np.concatenate([
            gathered_logprobs(last_positions(info[field], n, field), student.ids, dtype=dtype)
            for info, n, student in zip(infos, lengths, students, strict=True)
        ])  # fmt: skip
    metrics = token_metrics(
        TopK.concat(students),
        TopK.concat(teachers),
        sampled_ids=np.concatenate([s["tokens"][len(s["tokens"]) - s["response_length"] :] for s in samples]),
        student_logprobs=np.concatenate([s["rollout_log_probs"] for s in samples]),
        teacher_logprobs=np.concatenate(case["teacher_log_probs"]),
        response_lengths=lengths,
        prefix_ema_alpha=case["args"]["opd_compat_prefix_ema_alpha"],
        teacher_at_student_ids=known,
        partly_exact=True,
    )
    masks = [
        [1] * n if sample["loss_mask"] is None else sample["loss_mask"] for sample, n in zip(samples, lengths, strict=True)
    ]
    return metrics, np.concatenate(masks).astype(bool), lengths


def top_list(rng: random.Random, K: int, vocab: int, around: list | None = None) -> list:
    """One position's triples, best first; with `around`, about half of the ids come from that other list."""
    shared = rng.sample([item[1] for item in around], min(K, len(around)) // 2) if around else []
    ids = list(dict.fromkeys([*shared, *rng.sample(range(vocab), K)]))[:K]
    rng.shuffle(ids)
    weights = sorted((rng.expovariate(1) ** 2 + 1e-4 for _ in range(K)), reverse=True)
    mass = rng.uniform(0.6, 0.999)
    return [[math.log(w / sum(weights) * mass), i, None] for w, i in zip(weights, ids, strict=True)]


def random_samples(seed: int, K: int = 6, num: int = 5, longest: int = 24, vocab: int = 90) -> list[tuple]:
    """(student lists, teacher lists, sampled ids) per response: overlaps of every size, short and empty lists, one empty response."""
    rng = random.Random(seed)
    samples = [([], [], [])]
    for _ in range(num):
        student, teacher, sampled = [], [], []
        for _ in range(rng.randint(1, longest)):
            s = top_list(rng, K, vocab)
            t = rng.choice([s, top_list(rng, K, vocab), top_list(rng, K, vocab, s), top_list(rng, K, vocab, s)])
            if rng.random() < 0.05:
                t = t[: rng.randint(0, K - 1)]
            if rng.random() < 0.05:
                s = rng.choice([[], s[:1], None])
            student.append(s)
            teacher.append(t)
            sampled.append(s[0][1] if s else rng.randrange(vocab))
        samples.append((student, teacher, sampled))
    rng.shuffle(samples)
    return samples


def metrics_of(samples: list[tuple], K: int, dtype=np.float64, **options) -> tuple[dict, list[int]]:
    """(metrics, lengths); the sampled log-probs are the top-1 ones, NaN without."""
    lengths = [len(sampled) for _, _, sampled in samples]
    student = TopK.concat([TopK.from_lists(s, K, dtype=dtype) for s, _, _ in samples])
    teacher = TopK.concat([TopK.from_lists(t, K, dtype=dtype) for _, t, _ in samples])
    metrics = token_metrics(
        student, teacher, sampled_ids=np.concatenate([np.array(x, int) for _, _, x in samples]),
        student_logprobs=np.where(np.isfinite(student.logprobs[:, 0]), student.logprobs[:, 0], np.nan),
        teacher_logprobs=np.where(np.isfinite(teacher.logprobs[:, 0]), teacher.logprobs[:, 0], np.nan),
        response_lengths=lengths, **options,
    )  # fmt: skip
    return metrics, lengths
