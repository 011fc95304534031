"""Scoring through SGLang's /generate: the real servers (e2e), and a local server that speaks the same JSON for everything else."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.fixed_context.bank import load_contexts
from ta_opd.fixed_context.evaluate import evaluate_bank
from ta_opd.fixed_context.hf import import_transformers
from ta_opd.fixed_context.sampling import SamplingConfig, read_prompts, sample_bank
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.server import GenerateClient
from ta_opd.fixed_context.server_scoring import ServerScoringConfig, score_contexts_on_servers
from ta_opd.fixed_context.tables import read_table
from tests.fixed_context.diagnostic_cases import VOCAB_S, make_model, write_prompts


class Scorer(BaseHTTPRequestHandler):
    """Answers /generate with the log-probs of a real model, in SGLang 0.5's layout (first position null, triples with a null text)."""

    def do_GET(self):
        self._send(200, {"model_path": self.server.path})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if self.server.failures:
            self.server.failures -= 1
            return self._send(503, {"error": "busy"})
        ids = request["input_ids"]
        with torch.no_grad():
            logp = self.server.model(torch.as_tensor([ids])).logits[0].log_softmax(-1)
        start = request["logprob_start_len"]
        rows = [logp[p - 1] for p in range(start + 1, len(ids))]
        meta = {"input_token_logprobs": [[None, ids[start], None], *([float(r[t]), t, None] for r, t in zip(rows, ids[start + 1 :], strict=True))]}
        if request.get("top_logprobs_num"):
            best = [r.topk(min(request["top_logprobs_num"], self.server.most)) for r in rows]
            meta["input_top_logprobs"] = [None, *([[float(v), int(i), None] for v, i in zip(b.values, b.indices, strict=True)] for b in best)]
        if request.get("token_ids_logprob"):
            meta["input_token_ids_logprobs"] = [None, *([[float(r[i]), i, None] for i in request["token_ids_logprob"]] for r in rows)]
        return self._send(200, {"meta_info": meta})

    def _send(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(models):
    servers = []

    def start(model, *, failures=0, most=10**6):
        server, path = ThreadingHTTPServer(("127.0.0.1", 0), Scorer), str(models.get(model, model))
        server.model = import_transformers().AutoModelForCausalLM.from_pretrained(path).eval()
        server.path, server.requests, server.failures, server.most = path, [], failures, most
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def same_vocabulary(models, tmp_path_factory):
    """A teacher with the student's padded vocabulary, so that a server's own softmax is the shared one."""
    return {**models, "teacher": make_model(tmp_path_factory.mktemp("m") / "teacher", VOCAB_S, hidden=48, layers=3, seed=1, tie=False)}


def test_equals_scoring_through_transformers(bank, same_vocabulary, serve, tmp_path):
    urls = serve("student")[0], serve(same_vocabulary["teacher"])[0]
    contexts = load_contexts(bank, max_response_tokens=14)
    served, record = score_contexts_on_servers(contexts, *urls, ServerScoringConfig(topk=(8, 16), contexts_per_part=4, window=5), tmp_path / "w")
    local, _ = score_contexts(contexts, same_vocabulary["student"], same_vocabulary["teacher"], ScoringConfig(topk=(8, 16)), tmp_path / "v")
    shared = [c for c in served if served[c].dtype.kind in "fi"]
    assert {"Cmass_true", "KLf_union_k16", "CBC", "student_logp_sampled", "reach_t1", "token_id", "prompt_id"} <= set(served)
    np.testing.assert_allclose(served[shared], local[shared], atol=1e-4)
    assert not [c for c in served if c.endswith("_full")] and record["through"] == "servers"


def test_a_gain_from_servers_is_that_of_the_union(bank, models, serve, tmp_path):
    teacher = serve("teacher")[0]
    options = {"config": ScoringConfig(topk=(8,)), "log": lambda line: None, "max_response_tokens": 6}
    evaluate_bank(bank, serve("student")[0], teacher, tmp_path / "a.parquet", **options)
    evaluate_bank(bank, serve("trained")[0], teacher, tmp_path / "b.parquet", baseline=tmp_path / "a.parquet", **options)
    table = read_table(tmp_path / "b.parquet")
    np.testing.assert_allclose(table["G_KLf_union_abs"], table["KLf_union_base"] - table["KLf_union"])
    assert "G_KLf" not in table


def test_ids_outside_the_shared_vocabulary_are_neither_kept_nor_asked_for(bank, models, serve, tmp_path):
    urls, servers = zip(serve("student"), serve("teacher"), strict=True)
    contexts = load_contexts(bank, max_response_tokens=10)
    served, _ = score_contexts_on_servers(contexts, *urls, ServerScoringConfig(topk=(16,)), tmp_path / "w")
    local, _ = score_contexts(contexts, models["student"], models["teacher"], ScoringConfig(topk=(16,)), tmp_path / "v")
    asked = [i for server in servers for r in server.requests for i in r.get("token_ids_logprob", ())]
    assert asked and max(asked) < VOCAB_S
    assert all(max(json.loads(ids)) < VOCAB_S for ids in served["teacher_top_ids"]) and served["teacher_top_ids"].equals(local["teacher_top_ids"])
    # Shares on the renormalised union do not depend on what lies outside it.
    np.testing.assert_allclose(served[["KLf_union", "CBC", "Coverlap"]], local[["KLf_union", "CBC", "Coverlap"]], atol=1e-4)


def test_a_busy_server_is_asked_again_and_a_dead_one_named(bank, serve, tmp_path):
    url, server = serve("student", failures=2)
    contexts = load_contexts(bank, max_samples=1, max_response_tokens=3)
    score_contexts_on_servers(contexts, url, url, ServerScoringConfig(topk=(4,)), tmp_path / "w")
    server.failures = 10**6
    with pytest.raises(ServiceError, match="503"):
        GenerateClient(url, retries=1).generate({"input_ids": [3, 4], "logprob_start_len": 0})
    with pytest.raises(ServiceError, match="no model information"):
        GenerateClient("http://127.0.0.1:9").model_path()


def test_only_missing_log_probs_are_asked_for(bank, serve, tmp_path):
    url, server = serve("student")
    contexts = load_contexts(bank, max_samples=2, max_response_tokens=5)
    score_contexts_on_servers(contexts, url, url, ServerScoringConfig(topk=(4,)), tmp_path / "w")
    # One model on both sides: every id is among its own top-K, so no second request is needed.
    assert all("token_ids_logprob" not in r for r in server.requests) and len(server.requests) == 4


def test_fewer_tokens_than_asked_for(bank, serve, tmp_path):
    url, _ = serve("student", most=3)
    with pytest.raises(DataError, match="got fewer at some"):
        score_contexts_on_servers(load_contexts(bank, max_samples=1), url, url, ServerScoringConfig(topk=(4,)), tmp_path / "w")


def test_a_model_and_a_server_cannot_be_mixed(bank, models, tmp_path):
    with pytest.raises(ConfigError, match="two models or two servers"):
        evaluate_bank(bank, "http://127.0.0.1:9", str(models["teacher"]), tmp_path / "x.parquet", config=ScoringConfig())


@pytest.mark.e2e
def test_real_sglang_servers(bank, same_vocabulary, tmp_path):
    """SGLang's own numbers: within 1e-4 of transformers in float32, and a bank sampled by the server."""
    server_module = pytest.importorskip("slime.backends.sglang_utils.server")
    flags = pytest.importorskip("slime.backends.sglang_utils.server_flags")

    class Args:
        device, rollout_max_context_len = "cpu", 128

    paths = [str(same_vocabulary[n]) for n in ("student", "teacher")]
    servers = [
        server_module.SGLangServer(p, role, log_file=tmp_path / f"{role}.log", extra_args=flags.server_arguments(Args, role, p), device="cpu")
        for p, role in zip(paths, ("student", "teacher"), strict=True)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(300)
        contexts = load_contexts(bank)
        config = ServerScoringConfig(topk=(8, 16), concurrency=4)
        served, _ = score_contexts_on_servers(contexts, servers[0].url, servers[1].url, config, tmp_path / "w")
        local, _ = score_contexts(contexts, *paths, ScoringConfig(topk=(8, 16), dtype="float32"), tmp_path / "v")
        shared = [c for c in served if served[c].dtype.kind in "fi"]
        np.testing.assert_allclose(served[shared], local[shared], atol=1e-4)
        prompts = read_prompts(write_prompts(tmp_path / "p.jsonl", 6))
        sampled, _ = sample_bank(prompts, servers[0].url, SamplingConfig(num_contexts=6, max_response_tokens=8))
        assert len(sampled) == 6 and sampled["resp_len"].between(1, 8).all() and (sampled["rollout_log_probs"] != "").all()
    finally:
        for server in servers:
            server.stop()
