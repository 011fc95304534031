"""Accuracy of the current student on a data set: no teacher, no top-k, the evaluation's own sampling parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from slime.rollout.rm_hub import get_checker
from slime.rollout.sglang_rollout import generate_rollout


def evaluate(args: Any, rollout_id: int, clients: Any, dataset: Any) -> dict[str, Any]:
    """Samples every prompt of `dataset` (a PromptDataSource made with evaluation=True) and checks the answers.

    Returns accuracy (mean over prompts of the share of right responses), accuracy_any (a right one among the n),
    response_length (mean tokens), truncated (share), num_prompts, and per_prompt: one dict a prompt.
    """
    check = get_checker(args.rm_type)
    groups = generate_rollout(args, rollout_id, dataset, clients, evaluation=True)
    table = []
    for group in groups:
        right = [float(check(s.response, s.label, s.metadata)) for s in group]
        for sample, score in zip(group, right, strict=True):
            sample.reward = score
        table.append(
            {
                "row": group[0].metadata.get("prompt_row"),
                "label": group[0].label,
                "response": group[0].response,
                "accuracy": sum(right) / len(right),
                "response_length": sum(s.response_length for s in group) / len(group),
                "truncated": sum(s.truncated for s in group) / len(group),
            }
        )
    return {
        "accuracy": float(np.mean([row["accuracy"] for row in table])),
        "accuracy_any": float(np.mean([row["accuracy"] > 0 for row in table])),
        "response_length": float(np.mean([row["response_length"] for row in table])),
        "truncated": float(np.mean([row["truncated"] for row in table])),
        "num_prompts": len(table),
        "per_prompt": table,
    }
