"""Two real SGLang servers on CPU with tiny random models, against transformers. The tests build on each other in their order."""

import argparse
import json
import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.clients import Clients
from slime.backends.sglang_utils.probe import probe, table
from slime.backends.sglang_utils.server import SGLangServer
from slime.backends.sglang_utils.weight_bucket import flatten, serialize_for_engine
from slime.backends.sglang_utils.weight_sync import WeightSender
from slime.rollout.data_source import PromptDataSource
from slime.rollout.on_policy_distillation import score_sample
from slime.rollout.sglang_rollout import generate_rollout
from slime.utils.misc import load_tokenizer
from slime.utils.types import Sample
from ta_opd.errors import DataError
from tests.sglang_utils.tiny import VOCAB, make_tiny_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Servers a (the student's model) and b (the teacher's), the models in transformers, and a run's arguments."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("servers")
    folders = {name: make_tiny_model(root / name, seed) for seed, name in enumerate(("student", "teacher"))}
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Q{i}+{i}?", "label": str(2 * i)}) + "\n" for i in range(24)))
    args = argparse.Namespace(
        device="cpu", sglang_dtype="float32", rollout_max_context_len=300, rollout_max_response_len=40, rollout_temperature=1.0,
        rollout_top_p=1.0, rollout_top_k=-1, rollout_seed=1, hf_checkpoint=str(folders["student"]), sglang_server_concurrency=64,
        student_config=json.loads((folders["student"] / "config.json").read_text()), teacher_concurrency=32, request_timeout=60,
        request_retries=3, sglang_api_key="open sesame", teacher_timeout=60, opd_topk_metrics_k=8, opd_exact_cmass=True, opd_type="sglang",
        opd_exact_cmass_max_union=4096, opd_exact_cmass_overflow="fallback", rollout_batch_size=6, n_samples_per_prompt=2,
        prompt_data=str(root / "prompts.jsonl"), input_key="prompt", label_key="label", apply_chat_template=False, rollout_shuffle=True,
        weight_sync="auto", output_dir=str(root / "out"),
    )  # fmt: skip
    servers = [
        SGLangServer.for_run(run, role, str(folders[role]), log_file=root / f"{role}.log", device_env={"OMP_NUM_THREADS": "1"})
        for role, run in (("student", argparse.Namespace(**vars(args), rollout_stop=["any"])), ("teacher", args))
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(300)
        models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for n, f in folders.items()}
        clients = Clients.connect(args, [servers[0].url], {"default": [servers[1].url]})
        yield argparse.Namespace(args=args, servers=servers, models=models, clients=clients, root=root, folders=folders)
        clients.close()
    finally:
        for server in servers:
            server.stop()


def reference(model, tokens) -> np.ndarray:
    """[len(tokens) - 1, V]: row i is the log-distribution of tokens[i + 1]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)[:-1].numpy()


def sequence(n=60, seed=0):
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


def test_the_key_is_asked_for_and_hidden(world):
    stranger = SGLangClient([world.servers[0].url], api_key=None, wait_timeout=1)
    with pytest.raises(Exception, match="API key|401"):
        loop.run(stranger.generate([1, 2], {"max_new_tokens": 1}))
    stranger.close()
    for process in map(psutil.Process, world.servers[0].pids()):
        assert "sesame" not in " ".join(process.cmdline())
    assert "sesame" not in world.servers[0].log_file.read_text()


def test_every_port_of_a_server_is_on_loopback(world):
    pids = {pid for server in world.servers for pid in server.pids()}
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    assert {server.port for server in world.servers} <= {address.port for address in listening}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}, listening


def test_scores_equal_transformers_and_a_span_equals_the_whole(world):
    ids, model = sequence(), world.models["teacher"]
    teacher = world.clients.teachers["default"]
    rows = reference(model, ids)
    whole = loop.run(teacher.score(ids, len(ids) - 1, 8))
    np.testing.assert_allclose(whole.log_probs, rows[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    np.testing.assert_array_equal(whole.topk.ids, np.argsort(-rows, axis=1, kind="stable")[:, :8])
    np.testing.assert_allclose(whole.topk.logprobs, np.take_along_axis(rows, whole.topk.ids.astype(int), 1), atol=1e-4)
    for length in (20, 1):
        span = loop.run(teacher.score(ids, length, 8, token_ids=[5, 300]))
        np.testing.assert_allclose(span.log_probs, whole.log_probs[-length:], atol=1e-5)
        np.testing.assert_array_equal(span.topk.ids, whole.topk.ids[-length:])
        np.testing.assert_allclose(span.gathered, rows[-length:][:, [5, 300]], atol=1e-4)


def test_sampling_repeats_by_seed_and_reports_its_own_log_probs(world):
    student, prompt = world.clients.student, sequence(12, 1)
    params = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    first, again, other = (loop.run(student.generate(prompt, {**params, "sampling_seed": s}, 8)) for s in (3, 3, 4))
    assert first.output_ids == again.output_ids != other.output_ids
    rows = reference(world.models["student"], prompt + first.output_ids)[len(prompt) - 1 :]
    np.testing.assert_allclose(first.log_probs, rows[np.arange(24), first.output_ids], atol=1e-4)
    np.testing.assert_allclose(first.topk.logprobs, np.take_along_axis(rows, first.topk.ids.astype(int), 1), atol=1e-4)


def test_an_id_beyond_the_vocabulary_does_not_reach_the_server(world):
    with pytest.raises(DataError, match="nothing was sent"):
        loop.run(world.clients.student.generate([1, VOCAB + 100], {"max_new_tokens": 1}))
    assert world.servers[0].alive()


def test_the_probe_finds_all_well_and_the_same_model_equal(world):
    checks = probe(world.args, world.clients.student, world.clients.teachers)
    assert not [c for c in checks if c.failed], "\n".join(table(checks))
    same = probe(world.args, world.clients.student, {"default": world.clients.student})
    assert [c.ok for c in same if "KL to student" in c.name] == [True]


def test_the_probe_says_what_is_wrong(world):
    args = argparse.Namespace(**{**vars(world.args), "rollout_temperature": 0.7, "rollout_max_context_len": 400})
    wrong = {c.name: c for c in probe(args, world.clients.student, {"default": SGLangClient("127.0.0.1:9", wait_timeout=0.1)}) if c.failed}
    assert {"student: temperature", "student: context length", "teacher: returns log-probs"} <= set(wrong)
    assert all(c.advice for c in wrong.values())


def check_rollout(world, samples, exact=True):
    for s in samples:
        student, teacher = (reference(world.models[n], s.tokens)[s.prompt_length - 1 :] for n in ("student", "teacher"))
        at = np.arange(s.response_length), s.response_ids
        np.testing.assert_allclose(s.rollout_log_probs, student[at], atol=1e-4)
        np.testing.assert_allclose(s.teacher_log_probs, teacher[at], atol=1e-4)
        if exact:
            np.testing.assert_allclose(s.teacher_at_student_ids, np.take_along_axis(teacher, s.student_topk.ids.astype(int), 1), atol=1e-4)


def test_a_rollout_with_exact_windows(world):
    source = PromptDataSource(world.args, load_tokenizer(world.args.hf_checkpoint))
    samples = [s for g in generate_rollout(world.args, 0, source, world.clients) for s in g]
    assert len(samples) == 12 and sum(s.response_length for s in samples) > 200
    check_rollout(world, samples)


@pytest.fixture
def respond(world):
    """respond(flag=value, ...) -> the response to the first prompt, always with the same seed."""

    def run(**flags):
        args = argparse.Namespace(**{**vars(world.args), "rollout_batch_size": 1, "n_samples_per_prompt": 1, "opd_exact_cmass": False, **flags})
        return generate_rollout(args, 0, PromptDataSource(args, load_tokenizer(args.hf_checkpoint)), world.clients)[0][0]

    return run


def test_a_response_ends_at_the_length_a_stop_id_or_a_stop_string(world, respond):
    free = respond()
    tokenizer, ids = load_tokenizer(world.args.hf_checkpoint), free.response_ids
    assert free.status is (Sample.Status.COMPLETED if ids[-1] == tokenizer.eos_token_id else Sample.Status.TRUNCATED)
    assert respond(rollout_max_response_len=5).response_ids == ids[:5]
    # the first id that comes up for the first time after a few tokens, so that it is known where the response has to end
    at = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    stopped = respond(rollout_stop_token_ids=[ids[at]])
    assert stopped.response_ids == ids[: at + 1] and stopped.status is Sample.Status.COMPLETED
    assert len(stopped.rollout_log_probs) == len(stopped.teacher_log_probs) == stopped.response_length == at + 1
    texts = [tokenizer.decode([i]) for i in ids]
    at = next(i for i in range(1, len(ids)) if len(texts[i]) == 1 and " " < texts[i] < "\x7f" and texts[i] not in texts[:i])
    stopped = respond(rollout_stop=[texts[at], "never said"])
    assert stopped.response_ids == ids[: at + 1] and stopped.response.endswith(texts[at]) and stopped.status is Sample.Status.COMPLETED


def test_windows_of_every_size_agree(world):
    source = PromptDataSource(world.args, load_tokenizer(world.args.hf_checkpoint))
    sample = generate_rollout(argparse.Namespace(**{**vars(world.args), "rollout_batch_size": 1}), 0, source, world.clients)[0][0]
    found = []
    for window in (1, 5, 16, 1000):
        args = argparse.Namespace(**vars(world.args), opd_exact_cmass_window=window)
        loop.run(score_sample(args, sample, world.clients.teachers["default"]))
        found.append(sample.teacher_at_student_ids)
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-5)


def disturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    named = [(n, p.detach()) for n, p in model.named_parameters()]
    return [named[:9], [], named[9:]]


def assert_serves(url, model, version):
    ids = sequence(30, 5)
    client = SGLangClient([url], api_key="open sesame", vocab_size=VOCAB)
    reply = loop.run(client.score(ids, 29))
    client.close()
    assert reply.weight_version == str(version)
    np.testing.assert_allclose(reply.log_probs, reference(model, ids)[np.arange(29), ids[1:]], atol=1e-4)


@pytest.mark.parametrize("way", ["distributed", "disk"])
def test_after_a_sync_the_engine_serves_the_trainers_weights(world, way):
    engines = {"urls": [world.servers[0].url], "api_key": "open sesame", "tp": 1, "colocated": False}
    sender = WeightSender(argparse.Namespace(**{**vars(world.args), "weight_sync": way}), engines, is_source=True)
    try:
        for version in (1, 2):
            done = sender.send(iter(disturb(world.models["student"])), version)
            assert done["bytes"] == sum(p.numel() * 4 for p in world.models["student"].parameters())
            assert_serves(world.servers[0].url, world.models["student"], version)
    finally:
        sender.close()


def test_weights_handed_over_as_serialized_tensors(world):
    named = [item for bucket in disturb(world.models["student"]) for item in bucket]
    url = world.servers[0].url
    part = serialize_for_engine(flatten(named, "cpu"))
    loop.run(world.clients.student.update_weights_from_tensor(url, serialized=[part], weight_version="9", load_format="flattened_bucket"))
    loop.run(world.clients.student.flush_cache())
    assert_serves(url, world.models["student"], 9)


def test_a_replica_killed_in_the_middle_of_a_rollout_and_started_again(world):
    """Both servers become replicas of one student; one is killed hard while it samples; the batch is whole and right."""
    a, b = world.servers
    urls = [a.url, b.url]
    engines = {"urls": urls, "api_key": "open sesame", "tp": 1, "colocated": False}
    sender = WeightSender(world.args, engines, is_source=True)
    sender.send(iter(disturb(world.models["student"])), 20)
    sender.close()
    for url in urls:
        assert_serves(url, world.models["student"], 20)
    world.models["teacher"].load_state_dict(world.models["student"].state_dict())
    args = argparse.Namespace(**{**vars(world.args), "rollout_batch_size": 16, "rollout_max_response_len": 150, "opd_exact_cmass": False})
    clients = Clients.connect(args, urls, {"default": [a.url]})
    clients.student.weight_version = "20"
    source = PromptDataSource(args, load_tokenizer(args.hf_checkpoint))
    pids = b.pids()

    def kill():
        while not clients.student.replicas.all[1].in_flight:
            time.sleep(0.005)
        time.sleep(0.15)
        os.kill(pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    groups = generate_rollout(args, 0, source, clients)
    killer.join()
    samples = [s for g in groups for s in g]
    assert sorted(s.index for s in samples) == list(range(32))
    assert clients.student.replicas.all[1].failures > 0 and a.alive()
    check_rollout(world, samples, exact=False)
    deadline = time.monotonic() + 60
    while b.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not b.alive() and not any(psutil.pid_exists(p) for p in pids[1:])
    b.stop()
    b.start().wait_ready(300)
    sender = WeightSender(world.args, {**engines, "urls": [a.url, b.url]}, is_source=True)
    sender.send(iter(disturb(world.models["student"])), 21)
    sender.close()
    for url in (a.url, b.url):
        assert_serves(url, world.models["student"], 21)
    clients.close()
