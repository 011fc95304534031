"""Arguments, prompts and a model without a server, for what happens between the data and the samples."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

from slime.backends.sglang_utils.wire import GenerateReply, ScoreReply
from ta_opd.topk import TopK
from tests.sglang_utils.tiny import VOCAB, make_tokenizer


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def dense(seed: int, ids) -> np.ndarray:
    """float64 [len(ids), VOCAB]: row p is the log-distribution of the token at position p, given those before it."""
    rows = [np.random.default_rng([seed, p, *map(int, ids[:p])]).normal(size=VOCAB) * 2 for p in range(len(ids))]
    return log_softmax(np.array(rows))


def top(rows, k):
    ids = np.argsort(-rows, axis=1, kind="stable")[:, :k].astype(np.int32)
    return TopK(ids, np.take_along_axis(rows, ids.astype(np.int64), 1).astype(np.float32))


class FakeModel:
    """Answers like SGLangClient from `dense`. hook(kind, number of the call) may raise or return a finish reason."""

    def __init__(self, seed, hook=None):
        self.seed, self.hook, self.calls, self.vocab_size = seed, hook, [], VOCAB
        self.urls, self.aborting, self.delay, self.version = ["http://fake"], False, 0.0, "1"

    def _call(self, kind, **seen):
        self.calls.append((kind, seen))
        return self.hook(kind, len(self.calls)) if self.hook else None

    async def generate(self, input_ids, params, top_k=0, *, log_probs=True, prefer=None, key=None):
        finish = self._call("generate", top_k=top_k, log_probs=log_probs, params=params, ids=list(input_ids)) or "length"
        n = params["max_new_tokens"] if finish != "abort" else max(1, params["max_new_tokens"] // 2)
        await asyncio.sleep(self.delay * (1 + params["sampling_seed"] % 3))
        if self.aborting:
            finish, n = "abort", max(1, n // 2)
        rng = np.random.default_rng(params["sampling_seed"])
        out = rng.integers(0, 200, n).tolist()
        sequence = [*input_ids, *out]
        rows = dense(self.seed, sequence)[len(input_ids) :]
        values = rows[np.arange(n), out].astype(np.float32) if log_probs else np.empty(0, np.float32)
        return GenerateReply(out, values, top(rows, top_k) if top_k else None, finish, self.version, "", 0, url="http://fake")

    async def score(self, input_ids, length, top_k=0, token_ids=None, *, whole=False, prefer=None):
        self._call("score", length=length, top_k=top_k, ids=list(input_ids))
        await asyncio.sleep(self.delay)
        rows = dense(self.seed, input_ids)[len(input_ids) - length :]
        values = rows[np.arange(length), input_ids[len(input_ids) - length :]].astype(np.float32)
        return ScoreReply(values, top(rows, top_k) if top_k else None, None, "1", 0, url="http://fake")

    async def score_windows(self, input_ids, windows, *, prefer=None):
        self._call("windows", windows=windows)
        rows = dense(self.seed, input_ids)
        return [rows[b:e][:, np.asarray(ids, np.int64)].astype(np.float32) for b, e, ids in windows]

    async def abort_all(self):
        self.aborting = True


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def args(tmp_path, monkeypatch):
    from slime.rollout import sglang_rollout

    monkeypatch.setattr(sglang_rollout, "load_tokenizer", lambda path, trust=False: make_tokenizer())
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Q{i}+1?", "label": str(i + 1)}) + "\n" for i in range(10)))
    return SimpleNamespace(
        prompt_data=str(file), input_key="prompt", label_key="label", metadata_key="metadata", teacher_key="teacher", teachers={},
        apply_chat_template=False, apply_chat_template_kwargs={}, rollout_shuffle=False, rollout_seed=7, n_samples_per_prompt=2,
        n_samples_per_eval_prompt=1, rollout_batch_size=3, rollout_max_response_len=8, rollout_max_context_len=64,
        rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=-1, eval_temperature=0.0, eval_top_p=1.0, eval_top_k=-1,
        opd_topk_metrics_k=6, opd_exact_cmass=False, opd_type="sglang", student_config={"vocab_size": VOCAB}, hf_checkpoint="student",
        rm_type="exact",
    )  # fmt: skip
