"""The real loop: SGLang, Ray and Megatron on CPU. One run serves several checks, because starting one takes a while."""

import json
import math
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.launching import lines

pytestmark = pytest.mark.e2e
TOPK = ["--opd-loss-type", "topk_reverse_kl"]
SELECT = [*TOPK, "--opd-budget-mask", "dlearn_high", "--opd-budget-ratio", "0.2"]


@pytest.fixture(scope="module")
def whole(run, task):
    """Four rollouts with selection, a bank, a checkpoint after the second, evaluation and an HF model at the end."""
    out = task.root / "whole_checkpoints"
    return run("whole", *SELECT, "--num-rollout", "4", "--save", str(out), "--save-interval", "2", "--opd-token-bank-dir",
               str(task.root / "whole_bank"), "--eval-prompt-data", "heldout", str(task.heldout), "--eval-interval", "2",
               "--save-hf", "--save-debug-rollout-data", str(task.root / "whole_dumps")), out  # fmt: skip


def test_student_equal_to_teacher_has_no_divergence(run, servers):
    # the student's own engine as the teacher: both sides are one model with one set of weights
    result = run("equal", *TOPK, "--num-rollout", "1", teacher=servers.student)
    row = result.rows[0]
    assert abs(row["rollout/reverse_kl_valid"]) < 1e-4
    assert abs(row["train/loss"]) < 1e-4


def test_engine_and_trainer_agree_before_and_after_every_weight_sync(whole):
    result, _ = whole
    assert len(result.rows) == 4
    for row in result.rows:
        assert row["train/train_rollout_logprob_abs_diff_max"] < 1e-4, row["rollout_id"]
    drops = [row["train/divergence_valid"] for row in result.rows]
    assert drops[-1] < drops[0]  # the weights that the engines got are trained ones


def test_the_kept_count_is_the_budget(whole):
    for row in whole[0].rows:
        assert row["rollout/kept_tokens"] == math.ceil(0.2 * row["rollout/valid_tokens"] - 1e-9)
        assert row["train/kept_count"] == row["rollout/kept_tokens"]


def test_every_sample_keeps_a_token_and_the_bank_holds_what_was_trained(whole, task):
    for row in whole[0].rows:
        table = pq.read_table(task.root / "whole_bank" / f"rollout_{row['rollout_id']:06d}.parquet").to_pandas()
        assert len(table) == row["rollout/num_tokens"]
        assert table["budget_keep"].sum() == row["rollout/kept_tokens"]
        assert table.groupby("sample_ordinal")["budget_keep"].sum().min() >= 1
        assert set(table["rollout_id"]) == {row["rollout_id"]}


def test_metrics_evaluation_dumps_and_markers_are_written(whole, task):
    result, checkpoints = whole
    keys = result.rows[0]
    for name in ("rollout/reverse_kl_kept", "rollout/truncated", "rollout/response_length", "rollout/teacher_log_prob", "rollout/mean_Hs_topk",
                 "rollout/mean_KLf_union", "rollout/mean_Cmass", "train/grad_norm",
                 "train/lr", "seconds/generate", "seconds/train", "seconds/sync", "tokens_per_second/total"):  # fmt: skip
        assert name in keys, name
    evaluations = [json.loads(line) for line in (result.dir / "eval.jsonl").read_text().splitlines()]
    assert [e["rollout_id"] for e in evaluations] == [-1, 1, 3]
    assert all(e["num_prompts"] == 16 and 0 <= e["accuracy"] <= 1 for e in evaluations)
    done = json.loads((result.dir / "DONE").read_text())
    assert done["num_rollout"] == 4
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    dump = pq.read_table(task.root / "whole_dumps" / "rollout_000000.parquet").to_pandas()
    assert sum(sum(w > 0 for w in weights) for weights in dump["opd_weights"]) == result.rows[0]["rollout/kept_tokens"]
    assert len(dump) == 16 and all(len(t) == p + n for t, p, n in zip(dump["tokens"], dump["prompt_length"], dump["response_length"], strict=True))


def test_the_saved_model_is_the_trained_one_and_loads_in_transformers(whole, task):
    import torch
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(whole[0].dir / "hf")
    first = AutoModelForCausalLM.from_pretrained(task.student)
    moved = [float((a - b).abs().max()) for a, b in zip(trained.parameters(), first.parameters(), strict=True)]
    assert max(moved) > 1e-4
    assert all(torch.isfinite(p).all() for p in trained.parameters())


def test_one_seed_gives_the_same_kept_tokens_and_losses(run, whole, task):
    again = run("again", *SELECT, "--num-rollout", "2", "--opd-token-bank-dir", str(task.root / "again_bank"))
    for first, second in zip(whole[0].rows[:2], again.rows, strict=True):
        for key in ("rollout/kept_tokens", "rollout/valid_tokens", "rollout/response_length"):
            assert first[key] == second[key], key
        assert first["train/loss"] == pytest.approx(second["train/loss"], abs=2e-5)
    one = pq.read_table(task.root / "whole_bank" / "rollout_000000.parquet").to_pandas()
    two = pq.read_table(task.root / "again_bank" / "rollout_000000.parquet").to_pandas()
    np.testing.assert_array_equal(one["token_id"], two["token_id"])
    np.testing.assert_array_equal(one["budget_keep"], two["budget_keep"])


def test_a_checkpoint_resumes_at_the_next_rollout_with_the_same_data(run, whole, task):
    _, checkpoints = whole
    resumed_from = task.root / "resume"
    resumed_from.mkdir()
    (resumed_from / "iter_0000001").symlink_to(checkpoints / "iter_0000001")
    (resumed_from / "latest_checkpointed_iteration.txt").write_text("1")
    out = task.root / "resumed"  # as the whole run left it, so that both what is kept and what is run again can be seen
    out.mkdir()
    for name in ("metrics.jsonl", "eval.jsonl"):
        (out / name).write_bytes((whole[0].dir / name).read_bytes())
    begun = time.time()
    run("resumed", *SELECT, "--num-rollout", "4", "--load", str(resumed_from), "--output-dir", str(out), "--eval-prompt-data", "heldout",
        str(task.heldout), "--eval-interval", "2", "--save-debug-rollout-data", str(task.root / "resumed_dumps"))  # fmt: skip
    rows = lines(out / "metrics.jsonl")
    assert [(r["rollout_id"], r["time"] > begun) for r in rows] == [(0, False), (1, False), (2, True), (3, True)]
    evaluations, before = lines(out / "eval.jsonl"), lines(whole[0].dir / "eval.jsonl")
    assert [e["rollout_id"] for e in evaluations] == [-1, 1, 3] and evaluations[:2] == before[:2]
    for rollout_id in (2, 3):
        one = pq.read_table(task.root / "whole_dumps" / f"rollout_{rollout_id:06d}.parquet").to_pandas()
        two = pq.read_table(task.root / "resumed_dumps" / f"rollout_{rollout_id:06d}.parquet").to_pandas()
        assert list(one["prompt"]) == list(two["prompt"])
        assert list(one["sample_index"]) == list(two["sample_index"])
    for first, second in zip(whole[0].rows[2:], rows[2:], strict=True):
        assert first["train/loss"] == pytest.approx(second["train/loss"], rel=0.02)


def test_two_data_parallel_ranks_train_the_same_step(run, whole):
    split = run("dp2", *SELECT, "--num-rollout", "2", "--actor-num-gpus-per-node", "2", "--use-distributed-optimizer")
    for first, second in zip(whole[0].rows[:2], split.rows, strict=True):
        assert first["train/loss"] == pytest.approx(second["train/loss"], abs=2e-5)
        assert first["train/grad_norm"] == pytest.approx(second["train/grad_norm"], rel=1e-3)


def test_sampled_reverse_kl_and_every_early_mask_run(run):
    for mask in ("full", "entropy", "random"):
        result = run(f"sampled_{mask}", "--opd-loss-type", "sampled_reverse_kl", "--num-rollout", "1", "--opd-budget-mask", mask,
                     "--opd-budget-ratio", "0.3")  # fmt: skip
        row = result.rows[0]
        share = row["rollout/kept_tokens"] / row["rollout/valid_tokens"]
        assert share == 1.0 if mask == "full" else 0.3 <= share < 0.35
