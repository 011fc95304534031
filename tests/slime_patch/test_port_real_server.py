"""The port's requests against a real, unmodified SGLang server with a tiny model: values, windows, and the student's top-k."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from port_helpers import make_stock

from ta_opd.slime_patch import hooks

sys.path.insert(0, str(Path(__file__).parents[1] / "sglang_utils"))
pytestmark = pytest.mark.e2e
K = 4


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    import torch
    from tiny import make_tiny_model

    from slime.backends.sglang_utils.server import SGLangServer
    from slime.backends.sglang_utils.server_flags import server_arguments

    model = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=3)
    log = tmp_path_factory.mktemp("logs") / "server.log"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = server_arguments(SimpleNamespace(device=device, sglang_dtype="float32"), "student", str(model))
    server = SGLangServer(str(model), log_file=log, extra_args=flags)
    server.start()
    try:
        server.wait_ready(300)
        yield server.url
    finally:
        server.stop()


async def whole_union(url: str, sample, ids: list[int]) -> np.ndarray:
    """The reference: one request for every id at every position of the whole sequence, as the released code sent it."""
    import aiohttp

    payload = {
        "input_ids": sample.tokens, "sampling_params": {"temperature": 0, "max_new_tokens": 0}, "return_logprob": True,
        "logprob_start_len": 0, "token_ids_logprob": ids, "top_logprobs_num": K,
    }  # fmt: skip
    async with aiohttp.ClientSession() as session, session.post(url, json=payload) as response:
        meta_info = (await response.json())["meta_info"]
    rows = meta_info["input_token_ids_logprobs"][-sample.response_length :]
    table = {(p, entry[1]): entry[0] for p, row in enumerate(rows) for entry in row}
    sampled = np.array([entry[0] for entry in meta_info["input_token_logprobs"][-sample.response_length :]])
    wanted = sample.student_topk.ids
    return np.array([[table[p, t] for t in row] for p, row in enumerate(wanted.tolist())]), sampled


def test_sampling_and_scoring_agree_with_the_server_asked_plainly(url, tmp_path, monkeypatch):
    base = url.removesuffix("/generate")
    host, port = base.removeprefix("http://").split(":")
    stock = str(make_stock(tmp_path / "stock"))
    monkeypatch.syspath_prepend(stock)
    for name in [m for m in sys.modules if m == "slime" or m.startswith("slime.")]:
        monkeypatch.delitem(sys.modules, name)
    from slime.utils.types import Sample

    assert sys.modules["slime"].__file__.startswith(stock)
    args = SimpleNamespace(
        sglang_router_ip=host, sglang_router_port=int(port), rm_url=f"{base}/generate", opd_topk_metrics_k=K,
        opd_exact_cmass=True, opd_exact_cmass_window=5, opd_profile="released",
    )  # fmt: skip
    params = {"temperature": 1.0, "max_new_tokens": 23, "sampling_seed": 7, "ignore_eos": True}
    sample = Sample(index=0, prompt="5 9 30 77 120 6 8")

    async def run():
        await hooks.generate(args, sample, params)
        assert await hooks.reward_func(args, sample) == 0.0
        ids = sorted(set(sample.student_topk.ids.ravel().tolist()))
        return await whole_union(f"{base}/generate", sample, ids)

    reference, sampled = asyncio.run(run())
    assert sample.response_length == 23 and sample.student_topk.ids.shape == (23, K)
    np.testing.assert_allclose(sample.teacher_at_student_ids, reference, atol=2e-5)
    np.testing.assert_allclose(sample.teacher_log_probs, sampled, atol=2e-5)
    # student and teacher are the same model at temperature 1: the two top-k agree, and so do the sampled log-probs
    np.testing.assert_allclose(sample.student_topk.logprobs, sample.teacher_topk.logprobs, atol=2e-5)
    np.testing.assert_allclose(sample.rollout_log_probs, sample.teacher_log_probs, atol=2e-5)
