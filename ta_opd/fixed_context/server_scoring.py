"""Score a context bank through two running SGLang servers: everything the top-K say, with exact probabilities where they matter.

Both servers return their K best tokens at every response position. What is missing for exact values (the teacher's log-prob at the
student's tokens, and the other way round) is asked for over short windows. Full-vocabulary entropies and divergences are not available
this way: the table has no `*_full` columns, and gains are those of KLf_union and KLr_union. Each server's softmax runs over its own
(padded) vocabulary; where the two sizes differ, ids outside the shared part are left out of the top-K and never asked for (a server may
die of an id it does not know). Sizes are read from the config.json at the path a server reports, or given as `shared_vocab`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.bank import Contexts
from ta_opd.fixed_context.dense import topk_metrics
from ta_opd.fixed_context.parts import Parts
from ta_opd.fixed_context.scored_table import TOPK_NAMES, position_frame, topk_columns
from ta_opd.fixed_context.server import GenerateClient
from ta_opd.token_bank.jsonio import dump_rows
from ta_opd.topk import PAD_ID, TopK, gathered_logprobs, last_positions

SPARE = 8  # ids asked for beyond K where the vocabularies differ


@dataclass(frozen=True)
class ServerScoringConfig:
    """topk: as in ScoringConfig. window: response positions of one request for missing log-probs; max_ids: most ids of such a request.
    shared_vocab: ids at or above it are cut (default: the smaller of the two vocabularies, where both are known)."""

    topk: tuple[int, ...] = (16,)
    concurrency: int = 16
    timeout: float = 600.0
    window: int = 16
    max_ids: int = 512
    shared_vocab: int | None = None
    contexts_per_part: int = 100
    raw_topk: bool = True


def score_contexts_on_servers(
    contexts: Contexts, student_url: str, teacher_url: str, config: ServerScoringConfig, work_dir, *, log: Callable[[str], None] = lambda line: None
) -> tuple[pd.DataFrame, dict]:
    """(table, record) as `scoring.score_contexts`, without the full-vocabulary columns; resumable the same way.

    Raises ServiceError when a server does not answer, DataError when it returns fewer positions or tokens than asked for.
    """
    started = time.perf_counter()
    clients = [GenerateClient(url, timeout=config.timeout, concurrency=config.concurrency) for url in (student_url, teacher_url)]
    models = [client.model_path() for client in clients]
    config, margin = _with_shared_vocabulary(config, models)
    if config.shared_vocab is not None and contexts.max_token() >= config.shared_vocab:
        raise DataError(f"the bank holds token {contexts.max_token()}, but the servers share {config.shared_vocab}; is the bank of another tokenizer?")
    record = {
        "kind": "fixed_context_metrics", "bank_fingerprint": contexts.fingerprint, "student": models[0], "teacher": models[1],
        "topk": list(config.topk), "max_response_tokens": int(contexts.scored_len.max()), "contexts": len(contexts), "through": "servers",
    }  # fmt: skip
    plan = record | {"contexts_per_part": config.contexts_per_part, "raw_topk": config.raw_topk, "urls": [c.base for c in clients]}
    parts = Parts(Path(work_dir), plan, len(contexts))
    for part in parts.todo():
        which = parts.contexts(part)
        scored = list(clients[0].map(lambda i: _score_one(contexts, i, clients, config, margin), which))
        arrays = {name: np.concatenate([one[name] for one in scored]) for name in scored[0]}
        parts.finish(part, _build(contexts, which, arrays, config))
        log(f"part {part + 1} of {parts.count}: {len(arrays['student_logp'])} positions")
    table = parts.collect()
    return table, record | {"positions": len(table), "seconds": {"total": round(time.perf_counter() - started, 3)}}


def _with_shared_vocabulary(config: ServerScoringConfig, models: list[str]) -> tuple[ServerScoringConfig, int]:
    """The config with `shared_vocab` filled in where it can be known, and how many ids more than K to ask for, so that K are left."""
    sizes = [_vocab_size(path) for path in models]
    known = [size for size in (*sizes, config.shared_vocab) if size is not None]
    if not known:
        return config, 0
    shared = min(known)
    return replace(config, shared_vocab=shared), SPARE if len(set(known)) > 1 else 0


def _vocab_size(model_path: str) -> int | None:
    try:
        return int(json.loads((Path(model_path) / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _score_one(contexts: Contexts, i: int, clients, config: ServerScoringConfig, margin: int) -> dict[str, np.ndarray]:
    """Arrays of one context's rows, names as in `dense.row_metrics`."""
    tokens, length, K = contexts.tokens[i].tolist(), int(contexts.scored_len[i]), max(config.topk)
    sides = [_topk_and_logprobs(client, tokens, length, K, margin, config.shared_vocab) for client in clients]
    (student, student_logp), (teacher, teacher_logp) = sides
    return {
        "student_logp": student_logp, "teacher_logp": teacher_logp,
        "student_ids": student.ids.astype(np.int64), "student_logps": student.logprobs,
        "teacher_ids": teacher.ids.astype(np.int64), "teacher_logps": teacher.logprobs,
        "teacher_at_student": _at(clients[1], tokens, length, student.ids, teacher, config),
        "student_at_teacher": _at(clients[0], tokens, length, teacher.ids, student, config),
    }  # fmt: skip


def _topk_and_logprobs(client: GenerateClient, tokens: list[int], length: int, K: int, margin: int, vocab) -> tuple[TopK, np.ndarray]:
    from ta_opd.slime_patch.teacher import reply_logprobs, score_payload

    asked = K + margin
    meta = client.generate(score_payload(tokens, length, asked))["meta_info"]
    topk = TopK.from_reply(meta, "teacher", asked, length, dtype=np.float64)
    if margin and vocab is not None:
        inside = topk.ids < vocab
        topk = TopK(np.where(inside, topk.ids, PAD_ID), np.where(inside, topk.logprobs, -np.inf)).checked()
    topk = TopK(topk.ids[:, :K], topk.logprobs[:, :K])
    if (topk.ids == PAD_ID).any():
        raise DataError(f"{client.base}: asked for the {K} best tokens of {length} positions, got fewer at some; lower --topk")
    return topk, reply_logprobs(meta, length)


def _at(client: GenerateClient, tokens, length: int, wanted_LK: np.ndarray, own: TopK, config: ServerScoringConfig) -> np.ndarray:
    """[L, K] log-probs of this server at the other side's ids: from its own top-K where they hold them, else asked for in windows."""
    from ta_opd.slime_patch.teacher import exact_windows, merge_known, score_payload

    known_LK = merge_known(wanted_LK, own)
    prompt = len(tokens) - length
    for start, end, ids in exact_windows(wanted_LK, ~np.isnan(known_LK), max_ids=config.max_ids, window=config.window):
        meta = client.generate(score_payload(tokens[: prompt + end], end - start, 0, token_ids=ids))["meta_info"]
        entries = last_positions(meta.get("input_token_ids_logprobs"), end - start, "input_token_ids_logprobs")
        answer = gathered_logprobs(entries, wanted_LK[start:end], dtype=np.float64)
        block = known_LK[start:end]
        np.copyto(block, answer, where=np.isnan(block) & ~np.isnan(answer))
    if np.isnan(known_LK).any():
        raise DataError(f"{client.base}: {int(np.isnan(known_LK).sum())} of the log-probs asked for by token id did not come back")
    return known_LK


def _build(contexts: Contexts, which: range, arrays: dict, config: ServerScoringConfig) -> pd.DataFrame:
    import torch

    out = position_frame(contexts, which)
    out |= {
        "student_logp_sampled": arrays["student_logp"],
        "teacher_logp_sampled": arrays["teacher_logp"],
        "sampled_reverse_kl": arrays["student_logp"] - arrays["teacher_logp"],
    }
    for side in ("student", "teacher"):
        out[f"{side}_top1_id"] = arrays[f"{side}_ids"][:, 0]
        out[f"{side}_top1_prob"] = np.exp(arrays[f"{side}_logps"][:, 0])
    out["top1_match"] = (out["student_top1_id"] == out["teacher_top1_id"]).astype(float)
    rows = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    target = torch.from_numpy(np.ascontiguousarray(out["token_id"]))
    by_k = {K: {name: value.numpy() for name, value in topk_metrics(rows, K, target).items()} for K in config.topk}
    out |= topk_columns({K: {name: values[name] for name in TOPK_NAMES} for K, values in by_k.items()}, config.topk)
    if config.raw_topk:
        for side in ("student", "teacher"):
            out[f"{side}_top_ids"] = dump_rows(arrays[f"{side}_ids"][:, : config.topk[0]])
            out[f"{side}_top_logps"] = dump_rows(np.round(arrays[f"{side}_logps"][:, : config.topk[0]], 6))
    return pd.DataFrame(out)
