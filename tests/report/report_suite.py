"""Writes a small suite as train.py leaves it behind: real token banks and scores, made from random distributions.

The trained student of a method is the teacher's distribution mixed with the student's; `skill` says how far it came.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import yaml

from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.tables import write_table
from ta_opd.metrics import token_metrics
from ta_opd.selection import SelectionConfig, select_tokens
from ta_opd.token_bank import TokenBankWriter
from ta_opd.topk import TopK

PIECES = ["<pad>", "<eos>", *"0123456789+-=;A", "word", " the", "\n", "</script>", "&lt;", "é", "中"]
V, K = len(PIECES), 5


def tokenizer_json(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    added = [{"id": 0, "content": "<pad>", "special": True}, {"id": 1, "content": "<eos>", "special": True}]
    content = {"model": {"type": "WordLevel", "vocab": {p: i for i, p in enumerate(PIECES)}}, "added_tokens": added}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def topk(logp: np.ndarray, k: int = K) -> TopK:
    ids = np.argsort(-logp, axis=1)[:, :k]
    return TopK(ids.astype(np.int32), np.take_along_axis(logp, ids, 1).astype(np.float64))


def write_suite(
    home: Path, methods=(("full", 1.0, 0.8), ("dlearn_high", 0.2, 0.7), ("random", 0.2, 0.2)), *, seeds=(1,), rollouts=6, samples=8, contexts=20,
    prompts=40, raw_topk=True, length=12,
) -> Path:  # fmt: skip
    """methods: (mask, ratio, skill). Returns `home`."""
    tokenizer_json(home / "tokenizer")
    names = []
    for seed in seeds:
        for mask, ratio, skill in methods:
            name = f"{mask}_{ratio:g}_seed{seed}"
            write_run(home / "runs" / name, mask, ratio, skill, seed, rollouts, samples, contexts, prompts, raw_topk, length)
            names.append(name)
    bank = [{"prompt": f"Q{i}+1?", "label": str(i + 1), "response": ""} for i in range(contexts)]
    pd.DataFrame(bank).to_parquet(home / "context_bank.parquet")
    suite = {"title": "A <suite> & more", "runs": names, "teacher_accuracy": 0.95, "facts": ["made for a test"]}
    (home / "suite.json").write_text(json.dumps(suite))
    return home


def write_run(directory, mask, ratio, skill, seed, rollouts, samples, contexts, prompts, raw_topk, length) -> None:
    directory.mkdir(parents=True)
    config = {
        "run_name": directory.name, "opd_budget_mask": mask, "opd_budget_ratio": ratio, "seed": seed, "rollout_seed": seed, "opd_budget_mask_seed": seed,
        "rollout_batch_size": samples, "n_samples_per_prompt": 1, "opd_topk_metrics_k": K, "opd_loss_type": "topk_reverse_kl", "lr": 3e-4,
        "opd_profile": "paper", "num_rollout": rollouts,
    }  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    selection = SelectionConfig.from_args(Namespace(**config))
    rng = np.random.default_rng([seed, 5])
    lines = []
    with TokenBankWriter(directory / "token_bank", config=config, raw_topk=raw_topk) as writer:
        for rollout in range(rollouts):
            lengths = rng.integers(length // 2, length + 1, samples)
            columns, kept, valid = bank_columns(rng, lengths, selection, rollout, skill * rollout / rollouts)
            writer.write(rollout, columns)
            gap = float(np.mean(columns["sampled_reverse_kl"]))
            lines.append(
                {
                    "rollout_id": rollout, "rollout/reverse_kl_valid": gap, "rollout/reverse_kl_kept": float(columns["sampled_reverse_kl"][kept].mean()),
                    "rollout/kept_tokens": float(kept.sum()), "rollout/valid_tokens": float(valid), "rollout/response_length": float(lengths.mean()),
                    "rollout/truncated": 0.0, "seconds/generate": 0.5, "seconds/select": 0.02, "seconds/train": 0.3, "seconds/sync": 0.1,
                    "seconds/total": 1.0,
                }
            )  # fmt: skip
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    write_evals(directory, skill, rollouts, prompts, np.random.default_rng(9))
    write_table(directory / "fixed_context_metrics.parquet", scored_contexts(contexts, skill, length))
    (directory / "DONE").write_text(json.dumps({"seconds": 12.5}))


def bank_columns(rng, lengths, selection, rollout, skill):
    T = int(lengths.sum())
    teacher = log_softmax(3 * rng.normal(size=(T, V)))
    student = log_softmax((1 - skill) * 2 * rng.normal(size=(T, V)) + skill * teacher)
    tokens = np.array([rng.choice(V, p=np.exp(row)) for row in student], np.int32)
    rows = np.arange(T)
    tops = topk(student), topk(teacher)
    metrics = token_metrics(
        *tops, sampled_ids=tokens, student_logprobs=student[rows, tokens], teacher_logprobs=teacher[rows, tokens], response_lengths=lengths
    )
    chosen = select_tokens(
        metrics, np.ones(T, bool), lengths, selection, rollout_id=rollout, student=tops[0], teacher=tops[1], sampled_ids=tokens
    )
    position = np.concatenate([np.arange(n) for n in lengths])
    columns = {
        **metrics, **chosen.columns, "sample_index": np.repeat(np.arange(len(lengths)) + 100 * rollout, lengths),
        "sample_ordinal": np.repeat(np.arange(len(lengths)), lengths), "tok_pos": position, "pos_norm": position / np.repeat(lengths - 1, lengths),
        "prompt_len": 4, "resp_len": np.repeat(lengths, lengths), "truncated": 0, "token_id": tokens, "loss_mask_original": np.ones(T, np.int8),
        "student_top_ids": tops[0].ids, "student_top_logps": tops[0].logprobs, "teacher_top_ids": tops[1].ids, "teacher_top_logps": tops[1].logprobs,
    }  # fmt: skip
    return columns, chosen.keep, T


def write_evals(directory, skill, rollouts, prompts, rng) -> None:
    draw = rng.random(prompts)
    rows = []
    for rollout, share in ((-1, 0.3), (rollouts - 1, 0.3 + 0.6 * skill)):
        right = (draw < share).astype(float)
        table = [{"row": i, "accuracy": float(r)} for i, r in enumerate(right)]
        rows.append({"rollout_id": rollout, "dataset": "heldout", "accuracy": float(right.mean()), "num_prompts": prompts, "per_prompt": table})
    (directory / "eval.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def scored_contexts(contexts: int, skill: float, length: int) -> pd.DataFrame:
    """Scores of one student against the same frozen contexts, joined with those before training."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(length // 2, length + 1, contexts)
    T = int(lengths.sum())
    teacher = log_softmax(3 * rng.normal(size=(T, V)))
    before = log_softmax(2 * rng.normal(size=(T, V)))
    after = log_softmax((1 - skill) * before + skill * teacher)
    tokens = rng.integers(0, V, T)

    def scores(student: np.ndarray) -> pd.DataFrame:
        s, t = topk(student), topk(teacher)
        on_student = np.exp(np.take_along_axis(teacher, s.ids, 1)).sum(1)
        frame = {
            "sample_ordinal": np.repeat(np.arange(contexts), lengths), "sample_index": np.repeat(np.arange(contexts), lengths),
            "tok_pos": np.concatenate([np.arange(n) for n in lengths]), "resp_len": np.repeat(lengths, lengths), "token_id": tokens,
            "student_logp_sampled": student[np.arange(T), tokens], "teacher_logp_sampled": teacher[np.arange(T), tokens],
            "Hs_full": -(np.exp(student) * student).sum(1), "KLf_full": (np.exp(teacher) * (teacher - student)).sum(1),
            "KLr_full": (np.exp(student) * (student - teacher)).sum(1), "Cmass_true": on_student,
        }  # fmt: skip
        for side, top in (("student", s), ("teacher", t)):
            frame[f"{side}_top_ids"] = [json.dumps(row) for row in top.ids.tolist()]
            frame[f"{side}_top_logps"] = [json.dumps(row) for row in top.logprobs.tolist()]
        return pd.DataFrame(frame)

    return join_baseline(scores(after), scores(before))
