"""The start-up probe against fake servers: what it asks fits the run, and what it says. Real servers are in test_real_server.py."""

import functools
from types import SimpleNamespace

import pytest

from slime.backends.sglang_utils import probe as probing
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.probe import probe
from tests.sglang_utils.tiny import make_tokenizer


@pytest.fixture
def ask(monkeypatch, fake):
    """ask(context=) -> (checks, requests of the student, requests of the teacher)"""
    monkeypatch.setattr(probing, "load_tokenizer", lambda path, trust=False: make_tokenizer())

    def run(context=None, **more):
        student, teacher = (fake(context=context and context + 1) for _ in range(2))
        args = SimpleNamespace(hf_checkpoint="student", rollout_temperature=1.0, opd_topk_metrics_k=4, sglang_dtype="float32",
                               rollout_max_context_len=context, student_config={"vocab_size": 5000}, **more)  # fmt: skip
        clients = [SGLangClient([s.url], timeout=5, retries=0, wait_timeout=1, name=n) for s, n in ((student, "student"), (teacher, "teacher"))]
        try:
            return probe(args, clients[0], {"default": clients[1]}), student.requests, teacher.requests
        finally:
            for client in clients:
                client.close()

    return run


NAMES = ["student: context length", "student: log-probs and top-4", "student: temperature", "teacher: returns log-probs", "teacher: determinism",
         "teacher: context length", "teacher: vocabulary", "teacher: tokenizer"]  # fmt: skip


@pytest.mark.parametrize("context", [None, 2048, 80, 64, 20, 9, 4])
def test_every_check_is_made_in_a_context_of_any_size(ask, context):
    checks, student, teacher = ask(context)
    assert [c.name for c in checks] == NAMES
    assert not [c for c in checks if c.failed], checks
    longest = max(len(r["input_ids"]) + r["sampling_params"]["max_new_tokens"] for r in student + teacher)
    assert longest <= (context or 72)
    if context is None or context >= 72:
        assert max(len(r["input_ids"]) for r in teacher) > 20  # a real text where there is room


def test_the_second_scoring_is_the_one_that_rollouts_ask_for(ask, monkeypatch):
    _, _, teacher = ask(80)
    starts = [r["logprob_start_len"] for r in teacher]
    assert starts[0] == 0 and starts[1] > 20 and teacher[0]["input_ids"] == teacher[1]["input_ids"]
    from tests.sglang_utils import fake_server

    right = fake_server.FakeSGLang.reply

    def wrong_from_the_middle(self, body):
        reply = right(self, body)
        if body.get("logprob_start_len", -1) > 20:
            for entry in reply["meta_info"]["input_token_logprobs"][1:]:
                entry[0] -= 0.5
        return reply

    monkeypatch.setattr(fake_server.FakeSGLang, "reply", wrong_from_the_middle)
    checks, _, _ = ask(80)
    assert "teacher: determinism" in {c.name for c in checks if c.failed}


def test_a_context_that_is_too_short_is_said(ask, fake, monkeypatch):
    checks, _, _ = ask(96)
    assert next(c for c in checks if c.name == "teacher: context length").found == "server 97, run 96"
    monkeypatch.setattr("tests.sglang_utils.fake_server.FakeSGLang._server_info", _short)
    checks, _, _ = ask(96)
    failed = [c for c in checks if c.failed]
    assert {c.name for c in failed} == {"student: context length", "teacher: context length"}
    assert "--context-length of at least 104" in failed[0].advice


async def _short(self, request):
    from aiohttp import web

    return web.json_response({"context_length": 50})


@pytest.mark.parametrize("external", [None, ["http://a", "http://b"]])
def test_engines_of_somebody_else_may_still_serve_the_weights_of_an_earlier_run(monkeypatch, fake, tmp_path, external):
    """One of two was started again since: the probe ended the run that would have sent the weights to both."""
    monkeypatch.setattr(probing, "load_tokenizer", lambda path, trust=False: make_tokenizer())
    (tmp_path / "config.json").write_text('{"vocab_size": 5000}')
    one, other, teacher = fake(), fake(), fake()
    for server, by in ((one, 0.5), (other, 1.0)):
        monkeypatch.setattr(server, "reply", functools.partial(_shifted, server.reply, by))
    monkeypatch.setattr(SGLangClient, "model_info", _model_info(tmp_path))
    args = SimpleNamespace(hf_checkpoint=str(tmp_path), rollout_temperature=1.0, opd_topk_metrics_k=4, sglang_dtype="float32",
                           rollout_max_context_len=80, student_config={"vocab_size": 5000}, rollout_external_engine_addrs=external)  # fmt: skip
    clients = [SGLangClient(urls, timeout=5, retries=0, wait_timeout=1) for urls in ([one.url, other.url], [teacher.url])]
    found = {c.name: c for c in probe(args, clients[0], {"default": clients[1]})}
    for client in clients:
        client.close()
    for name in ("student: replicas agree", "teacher: KL to student"):
        assert found[name].ok is (None if external else False) and ("are sent to them next" in found[name].found) == bool(external), found[name]
    assert not external or not [c for c in found.values() if c.failed]


def _shifted(reply, by, body):
    found = reply(body)
    for entry in (found["meta_info"].get("input_token_logprobs") or [])[1:] + found["meta_info"]["output_token_logprobs"]:
        entry[0] -= by
    return found


def _model_info(folder):
    async def model_info(self):
        return [{"model_path": str(folder), "weight_version": "1"} for _ in self.urls]

    return model_info
