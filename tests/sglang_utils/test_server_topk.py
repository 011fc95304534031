"""Top-K of a server of ours: rows of text that come back as they were, and true numbers for every kind of request."""

import asyncio
import time

import aiohttp
import numpy as np
import orjson
import pytest
import torch

from slime.backends.sglang_utils import server_topk, wire
from slime.backends.sglang_utils.server import SGLangServer
from slime.backends.sglang_utils.server_flags import _has_flash_attention
from slime.backends.sglang_utils.topk_rows import FIELD, pack_rows, row_bytes, unpack_rows
from ta_opd.errors import DataError
from tests.sglang_utils.tiny import make_tiny_model

K = 6


@pytest.mark.parametrize("width", [1, 2, 3, 16, 64])
def test_rows_come_back_as_they_were(width):
    rng = np.random.default_rng(width)
    ids = rng.integers(0, 2**31 - 1, (9, width)).astype(np.int32)
    logprobs = rng.normal(size=(9, width)).astype(np.float32)
    rows = pack_rows(ids, logprobs)
    assert len(rows) == 9 and {len(row) for row in rows} == {row_bytes(width) // 3 * 4} and "=" not in "".join(rows)
    back = unpack_rows(rows, width)
    np.testing.assert_array_equal(back.ids, ids)
    np.testing.assert_array_equal(back.logprobs, logprobs)
    one = unpack_rows(pack_rows(ids[::2].T[:, :1].T, logprobs[:1]), width)  # not contiguous
    np.testing.assert_array_equal(one.ids, ids[:1])


@pytest.mark.parametrize("spoil", [lambda r: r[:-1] + [None], lambda r: r[:-1] + [r[-1][:-4]], lambda r: [r[0] + "AAAA", r[1][4:]],
                                   lambda r: [r[0][:-1] + "!", r[1]]])  # fmt: skip
def test_a_damaged_row_is_named(spoil):
    rows = pack_rows(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match="packed top-k|rows of"):
        unpack_rows(spoil(rows), 4)


def test_rows_of_another_length_than_the_tokens():
    rows = pack_rows(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32))
    raw = orjson.dumps({"output_ids": [1, 2], "meta_info": {"output_token_logprobs": [[-1, 1, None], [-1, 2, None]], FIELD: rows}})
    with pytest.raises(DataError, match="top-k of 2 tokens, got 1"):
        wire.parse_generate(raw, 2)
    elsewhere = {"output_ids": [1, 2], "meta_info": {"output_token_logprobs": [[-1, 1, None], [-1, 2, None]]}, FIELD: rows}
    with pytest.raises(DataError, match="top-k of 2 tokens, got 0"):
        wire.parse_generate(orjson.dumps(elsewhere), 2)


def test_another_version_of_sglang_is_left_alone(monkeypatch):
    registered = []
    monkeypatch.setattr(server_topk, "after_import", lambda name, action: registered.append(name))
    monkeypatch.setattr(server_topk, "_version", lambda: "0.6.0")
    assert not server_topk.install() and not registered
    monkeypatch.setattr(server_topk, "_version", lambda: server_topk.CHECKED_VERSIONS[0])
    assert server_topk.install() and len(registered) == 5
    monkeypatch.setenv(server_topk.AS_LISTS_VARIABLE, "1")
    assert not server_topk.install() and len(registered) == 5


def requests():
    """(name, payload) of many kinds: packed and not, with K and without, scored in one piece and in chunks, all at once."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 250, n).tolist() for n in (5, 20, 150, 90, 33, 12, 64, 65)]
    sample = {"temperature": 1.0, "max_new_tokens": 60, "ignore_eos": True}
    plain = {"return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64"}

    def lists(payload):
        return {k: v for k, v in payload.items() if k not in plain}

    for i, ids in enumerate(tokens):
        params = {**sample, "sampling_seed": i, "max_new_tokens": 60 - 7 * i}
        yield f"sampled {i}", wire.generate_payload(ids, params, K)
        yield f"sampled lists {i}", lists(wire.generate_payload(ids, {**params, "sampling_seed": 50 + i}, 2 + i % 3))
        yield f"sampled without {i}", wire.generate_payload(ids, {**params, "sampling_seed": 99}, 0, log_probs=i % 2 == 0)
        length = len(ids) // 2
        yield f"scored {i}", wire.score_payload(ids, length, K)
        yield f"scored whole {i}", wire.score_payload(ids, length, 3, whole=True)
        yield f"scored lists {i}", lists(wire.score_payload(ids, length, K, token_ids=[3, 4]))


async def answers(url: str) -> dict[str, bytes]:
    async with aiohttp.ClientSession() as session:

        async def ask(name, payload):
            async with session.post(f"{url}/generate", json=payload) as reply:
                assert reply.status == 200, await reply.text()
                return name, await reply.read()

        return dict(await asyncio.gather(*(ask(*request) for request in requests())))


def check(model, name: str, payload: dict, raw: bytes, atol: float = 1e-4) -> None:
    """Log-probs and top-K of one reply against transformers."""
    k, scored = payload.get("top_logprobs_num", 0), name.startswith("scored")
    if scored:
        length = len(payload["input_ids"]) // 2
        reply, tokens = wire.parse_score(raw, length, k, payload.get("token_ids_logprob")), payload["input_ids"]
    else:
        reply = wire.parse_generate(raw, k, payload["return_logprob"])
        length, tokens = len(reply.output_ids), payload["input_ids"] + reply.output_ids
        assert length == payload["sampling_params"]["max_new_tokens"], name
        packed = k > 0 and "return_flat_raw_top_logprobs" in payload
        assert (f'"{FIELD}":["'.encode() in raw) == packed, name
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([tokens], device=model.device)).logits[0].float(), -1)[-length - 1 : -1].cpu().numpy()
    if "token_ids_logprob" in payload:
        np.testing.assert_allclose(reply.gathered, rows[:, payload["token_ids_logprob"]], atol=atol, err_msg=name)
    if payload["return_logprob"]:
        np.testing.assert_allclose(reply.log_probs, rows[np.arange(length), tokens[-length:]], atol=atol, err_msg=name)
    if k > 0:
        assert reply.topk.ids.shape == (length, k), name
        np.testing.assert_allclose(reply.topk.logprobs, np.take_along_axis(rows, reply.topk.ids.astype(int), 1), atol=atol, err_msg=name)
        np.testing.assert_allclose(reply.topk.logprobs, -np.sort(-rows, axis=1)[:, :k], atol=atol, err_msg=name)


def serve(folder, flags, tmp_path, **env) -> dict[str, bytes]:
    """What a server with `flags` answers to all of `requests`."""
    device = flags[1]
    server = SGLangServer(str(folder), log_file=tmp_path / "server.log", extra_args=flags, device=device, device_env={"OMP_NUM_THREADS": "1", **env})
    try:
        server.start()
        server.wait_ready(300)
        return asyncio.run(answers(server.url))
    except (aiohttp.ClientError, AssertionError):
        time.sleep(8)  # the server writes what it died of
        print(server.log_tail(80))
        raise
    finally:
        server.stop()


@pytest.mark.e2e
def test_all_kinds_of_requests_at_once_against_transformers(tmp_path, monkeypatch):
    """Prefill in chunks of 64 tokens and log-probs in chunks of 16, so that prompts span several of both."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", 3)
    monkeypatch.setenv("SGLANG_ENABLE_LOGPROB_CHUNK", "true")
    monkeypatch.setenv("SGLANG_LOGPROB_CHUNK_SIZE", "16")
    flags = ["--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule",
             "--disable-cuda-graph", "--skip-tokenizer-init", "--grammar-backend", "none", "--skip-server-warmup", "--mem-fraction-static", "0.1",
             "--max-total-tokens", "8192", "--max-running-requests", "64", "--chunked-prefill-size", "64", "--disable-radix-cache"]  # fmt: skip
    replies = serve(folder, flags, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, payload in requests():
        check(model, name, payload, replies[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_kinds_of_requests_on_a_gpu(tmp_path, monkeypatch):
    """The same in bf16, with the kernels and SGLang's loop that prepares a batch while another one runs; SGLang's own way is as near to
    transformers as ours."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", 3, hidden=256, head_dim=64, vocab=5000, init=0.05)
    monkeypatch.setenv("SGLANG_ENABLE_LOGPROB_CHUNK", "true")
    monkeypatch.setenv("SGLANG_LOGPROB_CHUNK_SIZE", "16")
    flags = ["--device", "cuda", "--dtype", "bfloat16", *(() if _has_flash_attention() else ("--attention-backend", "triton")), "--sampling-backend", "pytorch",
             "--disable-cuda-graph", "--skip-tokenizer-init", "--grammar-backend", "none", "--skip-server-warmup", "--mem-fraction-static", "0.2",
             "--max-total-tokens", "8192", "--max-running-requests", "64", "--chunked-prefill-size", "64", "--disable-radix-cache"]  # fmt: skip
    replies = serve(folder, flags, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    for name, payload in requests():
        check(model, name, payload, replies[name], atol=0.05)
