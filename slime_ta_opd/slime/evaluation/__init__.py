"""Evaluation of checkpoints outside training: lm-evaluation-harness (harness, local_tasks), held-out answers (heldout),
and what is reported of them (scores)."""
