"""Fitting the rates of decoding and scoring: what a made-up GPU does is found again from rows as services.py writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import decode_log, fit_serving
from benchmarks.services import LOADS, Bench, Load, options
from slime.planning.models import load_model
from slime.planning.rates import Gpu, Rate, Rates
from slime.planning.serving import DecodeStep, decode_step, prefill_seconds

CARD = Gpu("card", 785e12, 141e9, 4.8e12, 360e9, 40e9)
STUDENT, TEACHER = load_model("1.7B"), load_model("4B")
SIZES = [Load(64, 512, k) for k in (0, 16, 64)] + [Load.parse(word) for word in LOADS]
SCHEDULER_SLOW = {"decode_host_seconds": 1.2e-3, "decode_host_request_seconds": 38e-6, "decode_topk_fixed_seconds": 9e-6, "decode_topk_seconds": 0.3e-6,
                  "decode_layer_seconds": 45e-6, "decode_sample_seconds": 7e-6, "decode_topk_gpu_seconds": 3e-6, "decode_cache_share": 0.55}  # fmt: skip
SCHEDULER_FAST = SCHEDULER_SLOW | {"decode_host_request_seconds": 12e-6, "decode_topk_fixed_seconds": 3e-6, "decode_topk_seconds": 0.05e-6}
LARGE_FIXED_PART = SCHEDULER_SLOW | {"decode_host_seconds": 3e-3, "decode_host_request_seconds": 15e-6, "decode_topk_fixed_seconds": 11e-6,
                                     "decode_topk_seconds": 0.05e-6, "decode_layer_seconds": 25e-6}  # fmt: skip
REPLIES = {"reply_seconds": 2e-6, "reply_topk_seconds": 0.1e-6}


def rates_of(values: dict) -> Rates:
    more = {"prefill_utilisation": 0.8, "decode_weight_share": fit_serving.WEIGHT_SHARE}
    return Rates({n: Rate(n, v, "", "measured", "") for n, v in {**more, **values}.items()}, {})


def made_rows(values: dict, noise: float = 0.01) -> list[dict]:
    """Rows of `generate` as such a card would give them, each step off by about `noise`."""
    rng, rates, rows = np.random.default_rng(0), rates_of(values), []
    for size in SIZES:
        steps = []
        for done in range(30, size.tokens, decode_log.INTERVAL):
            step = decode_step(STUDENT, 1, size.responses, (256 + done, 256 + done), size.k, CARD, rates).wall
            steps.append([size.responses, size.responses * (256 + done), step * (1 + noise * rng.standard_normal())])
        tokens = size.responses * size.tokens
        seconds = prefill_seconds(STUDENT, 1, size.responses * 256, 256, CARD, rates) + size.tokens * np.mean([s[2] for s in steps])
        seconds += tokens * (REPLIES["reply_seconds"] + size.k * REPLIES["reply_topk_seconds"])
        rows.append({"part": "generate", "K": size.k, "seconds": seconds, "responses": size.responses, "response_len": size.tokens,
                     "prompt_len": 256, "steps": steps})  # fmt: skip
    return rows


@pytest.mark.parametrize("true", [SCHEDULER_SLOW, SCHEDULER_FAST, LARGE_FIXED_PART],
                         ids=["the host bounds most steps", "the GPU bounds most steps", "the host bounds small batches"])  # fmt: skip
def test_steps_come_out_again_whoever_bounds_them(true):
    found = fit_serving.fit_decode(made_rows(true), STUDENT, CARD, 0.8)
    fitted, real = rates_of({n: f.value for n, f in found.items()}), rates_of(true)
    for running, positions, k in ((8, 300, 16), (64, 700, 16), (128, 600, 16), (256, 300, 16), (256, 1250, 16), (256, 500, 0)):
        guess, wanted = (decode_step(STUDENT, 1, running, (positions, positions), k, CARD, r).wall for r in (fitted, real))
        assert guess == pytest.approx(wanted, rel=0.05), (running, positions, k)
    assert found["decode_cache_share"].measured and found["decode_cache_share"].value == pytest.approx(0.55, rel=0.1)


def test_what_the_host_does_is_found_where_it_bounds_the_steps():
    found = fit_serving.fit_decode(made_rows(SCHEDULER_SLOW), STUDENT, CARD, 0.8)
    for name in ("decode_host_request_seconds", "decode_topk_seconds"):
        assert found[name].measured and found[name].value == pytest.approx(SCHEDULER_SLOW[name], rel=0.25), name


def test_one_batch_size_does_not_tell_a_request_from_a_step():
    rows = [r for r in made_rows(SCHEDULER_SLOW) if r["responses"] == 256]
    found = fit_serving.fit_decode(rows, STUDENT, CARD, 0.8)
    assert not found["decode_host_seconds"].measured and not found["decode_layer_seconds"].measured
    assert found["decode_cache_share"].measured


def test_a_step_is_the_longer_of_host_and_gpu():
    for host, wall in ((0.5, 2.5), (2.0, 8 / 3), (3.0, 19 / 6), (5.0, 5.0)):
        at = np.linspace(1.0, 4.0, 100_001)
        step = DecodeStep(host, 1.0, 4.0)
        assert step.wall == pytest.approx(np.maximum(host, at).mean(), rel=1e-4) and step.wall == pytest.approx(wall)
        assert step.gpu == 2.5


def test_what_no_step_tells_is_assumed():
    """A scheduler that never bounds a step: its rates stay at the guesses and do not reach the steps."""
    idle = {n: v / 100 for n, v in fit_serving.HOST.items()}
    rows = made_rows(SCHEDULER_SLOW | idle)
    found = fit_serving.fit_decode(rows, STUDENT, CARD, 0.8)
    assert not any(found[n].measured for n in fit_serving.HOST)
    assert all("no step tells" in found[n].how for n in fit_serving.HOST)
    fitted = rates_of({n: f.value for n, f in found.items()})
    for row in rows:
        for running, cached, seconds in row["steps"]:
            contexts = (cached / running, cached / running)
            assert decode_step(STUDENT, 1, running, contexts, row["K"], CARD, fitted).wall == pytest.approx(seconds, rel=0.1)


def test_a_pause_within_an_interval_does_not_bend_the_line():
    rows = made_rows(SCHEDULER_SLOW)
    for step in rows[-1]["steps"][7::12]:
        step[2] *= 8  # a full garbage collection
    clean, paused = (fit_serving.fit_decode(r, STUDENT, CARD, 0.8) for r in (made_rows(SCHEDULER_SLOW), rows))
    for name, found in clean.items():
        assert paused[name].value == pytest.approx(found.value, rel=0.05), name


def test_replies_are_what_steps_and_prefill_leave():
    found = fit_serving.fit_replies(made_rows(SCHEDULER_FAST), STUDENT, CARD, 0.8)
    for name, value in REPLIES.items():
        assert found[name].measured and found[name].value == pytest.approx(value, rel=0.01)


def test_rows_without_steps_still_give_every_rate():
    rows = [{k: v for k, v in r.items() if k != "steps"} for r in made_rows(SCHEDULER_SLOW)[:3]]
    found = fit_serving.fit_decode(rows, STUDENT, CARD, 0.8)
    assert set(found) == {*fit_serving.HOST, *fit_serving.GPU}
    assert [n for n, f in found.items() if f.measured] == ["decode_host_request_seconds", "decode_topk_fixed_seconds", "decode_topk_seconds"]
    assert not any(f.measured for f in fit_serving.fit_replies(rows, STUDENT, CARD, 0.8).values())


def made_scores(utilisation: float, call: float, token: float, fixed: float, each: float, last: bool) -> list[dict]:
    def seconds(batch, prompt, length, k, cached=False):
        whole = batch * (prompt + length)
        done = TEACHER.trunk_operations(whole) + TEACHER.attention_operations(whole, prompt + length) + TEACHER.head_operations(batch * length)
        if cached:
            done -= TEACHER.trunk_operations(batch * prompt) + TEACHER.attention_operations(batch * prompt, prompt)
        return done / utilisation / CARD.matmul + call + batch * length * (token + (fixed + each * k if k else 0))

    rows = [{"part": "score", "K": k, "span": span, "seconds": seconds(64, 256, 512, k, "cached" in span)}
            for k in (0, 16, 64) for span in ("response", "response, prompt cached")]  # fmt: skip
    if last:
        rows.append({"part": "score", "K": 16, "span": "response, last load", "seconds": seconds(256, 256, 1024, 16), "responses": 256, "response_len": 1024})
    return [*rows, {"part": "overlap", "seconds": 1.0, "last_score": seconds(1, 256, 512, 16)}]


@pytest.mark.parametrize("last", [False, True], ids=["as before", "with the last load"])
def test_scoring_comes_out_again(last):
    values = (0.8, 7e-3, 4e-6, 2e-6, 0.1e-6)
    found = fit_serving.fit_score(made_scores(*values, last), TEACHER, CARD)
    names = ("prefill_utilisation", "score_call_seconds", "score_token_seconds", "score_topk_fixed_seconds", "score_topk_seconds")
    for name, value in zip(names, values, strict=True):
        assert found[name].measured and found[name].value == pytest.approx(value, rel=1e-3), name


LOG = """
[2026-11-23 03:38:30] Prefill batch, #new-seq: 16, #new-token: 512, #cached-token: 0, token usage: 0.01, #running-req: 0, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 16, #token: 832, token usage: 0.01, cuda graph: True, gen throughput (token/s): 2349.58, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 16, #token: 1152, token usage: 0.02, cuda graph: True, gen throughput (token/s): 4000.00, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 12, #token: 1100, token usage: 0.02, cuda graph: True, gen throughput (token/s): 3900.00, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 12, #token: 1340, token usage: 0.02, cuda graph: True, gen throughput (token/s): 3000.00, #queue-req: 2
[2026-11-23 03:38:30] Prefill batch, #new-seq: 2, #new-token: 64, #cached-token: 0, token usage: 0.01, #running-req: 10, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 12, #token: 1440, token usage: 0.02, cuda graph: True, gen throughput (token/s): 1000.00, #queue-req: 0
[2026-11-23 03:38:30] Decode batch, #running-req: 12, #token: 1680, token usage: 0.02, cuda graph: True, gen throughput (token/s): 3000.00, #queue-req: 0
"""


def test_only_steady_intervals_of_a_log_count(tmp_path):
    assert decode_log.step_seconds(LOG.splitlines()) == [[16, 1152 - 160, 0.004], [12, 1680 - 120, 0.004]]
    (tmp_path / "log").write_text(LOG + LOG)
    assert decode_log.read(tmp_path / "log", len(LOG)) == decode_log.step_seconds(LOG.splitlines())
    assert decode_log.size(tmp_path / "log") == 2 * len(LOG) and decode_log.size(tmp_path / "none") == 0


@pytest.mark.parametrize("word", ["256x1024", "0x8@1", "8x8@", "axb@c", "8x8@16 "])
def test_a_bad_load_is_named(word):
    with pytest.raises(ValueError, match="expected RESPONSESxTOKENS@K such as 256x1024@16"):
        Load.parse(word)


def test_rows_reach_a_file_whose_folder_was_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "deeper" / "rows.json"
    monkeypatch.setattr("sys.argv", ["services.py", "--device", "cuda", "--json", str(path)])
    bench = Bench(options(), tmp_path)
    assert path.parent.is_dir()  # before any server starts
    bench.row("sync", round=0, seconds=0.05)
    bench.stop()
    assert json.loads(path.read_text()) == [{"part": "sync", "round": 0, "seconds": 0.05}]
