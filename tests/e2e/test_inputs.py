"""Inputs as users have them: a Qwen2.5 model with a chat template, chat messages in parquet, servers started by the run."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import TRAIN
from tests.helpers.models import write_tiny_qwen2
from tests.sglang_utils.tiny import make_tokenizer

pytestmark = pytest.mark.e2e


def test_a_qwen25_pair_on_chat_messages_in_parquet(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_qwen2(tmp_path / name, tmp_path / "tokenizer", seed)
    rows = [{"messages": [{"role": "user", "content": f"{i} + 1 = ?"}], "reward_model": {"ground_truth": str(i + 1)}} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    words = [sys.executable, str(TRAIN), "--hf-checkpoint", str(tmp_path / "student"), "--teacher-model", str(tmp_path / "teacher"),
             "--prompt-data", str(tmp_path / "prompts.parquet"), "--input-key", "messages", "--label-key", "reward_model.ground_truth",
             "--apply-chat-template", "--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2",
             "--rollout-max-response-len", "16", "--opd-topk-metrics-k", "8", "--opd-loss-type", "topk_reverse_kl", "--opd-budget-mask",
             "teachability", "--opd-budget-ratio", "0.25", "--lr", "1e-3", "--no-use-tensorboard", "--save-debug-rollout-data",
             str(tmp_path / "dumps"), "--output-dir", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(words, cwd=TRAIN.parent, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["rollout_id"] for s in steps] == [0, 1]
    for step in steps:  # the engines' and Megatron's view of one model, attention biases included
        assert step["train/train_rollout_logprob_abs_diff_max"] < 1e-4
        assert 0 < step["rollout/kept_tokens"] < step["rollout/valid_tokens"]
    dump = pq.read_table(tmp_path / "dumps" / "rollout_000000.parquet").to_pandas()
    for tokens, length in zip(dump["tokens"], dump["prompt_length"], strict=True):
        text = tokenizer.decode(tokens[:length])
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_start|>assistant\n")
    assert set(dump["label"]) <= {str(i + 1) for i in range(8)}
