"""Reading top-k straight from a reply's bytes must equal the general way, on regular and on odd replies."""

import gc
import json
import random

import numpy as np
import orjson
import pytest
from method_cases import top_list

from ta_opd import reply as reply_module
from ta_opd.errors import DataError
from ta_opd.reply import collector_paused, loads, read_reply
from ta_opd.topk import TopK

K = 5


def reply(side: str, positions: list, *, dump=orjson.dumps) -> bytes:
    name = {"student": "output", "teacher": "input"}[side]
    lead = [None] if side == "teacher" else []
    info = {
        "id": "a]]]b",
        f"{name}_token_logprobs": [[-0.5, 3, None]] * len(positions),
        f"{name}_top_logprobs": lead + positions,
        "completion_tokens": len(positions),
    }
    return dump({"text": "[[[x]]]", "meta_info": info})


def regular(T: int, seed: int = 0) -> list:
    rng = random.Random(seed)
    return [top_list(rng, K, 150_000) for _ in range(T)]


def both_ways(raw: bytes, side: str, length: int, dtype=np.float64):
    rest, fast = read_reply(raw, side, K, length, dtype=dtype)
    slow = TopK.from_reply(json.loads(raw)["meta_info"], side, K, length, dtype=dtype)
    np.testing.assert_array_equal(fast.ids, slow.ids)
    np.testing.assert_array_equal(fast.logprobs, slow.logprobs)
    assert fast.logprobs.dtype == dtype and rest["text"] == "[[[x]]]" and rest["meta_info"]["completion_tokens"] > 0
    return rest


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dump", [orjson.dumps, lambda x: json.dumps(x, separators=(",", ":")).encode()])
def test_regular_replies_take_the_fast_way(side, dtype, dump, monkeypatch):
    raw = reply(side, regular(40), dump=dump)
    monkeypatch.setattr(TopK, "from_reply", classmethod(lambda *a, **k: pytest.fail("fell back")))
    rest, fast = read_reply(raw, side, K, 30, dtype=dtype)
    monkeypatch.undo()
    field = f"{'output' if side == 'student' else 'input'}_top_logprobs"
    assert rest["meta_info"][field] is None
    both_ways(raw, side, 30, dtype)
    both_ways(raw, side, 40, dtype)


def odd_positions() -> dict:
    lists = {name: regular(12, seed) for seed, name in enumerate(["short", "null", "empty", "text", "no log-prob", "twice", "exponent"])}
    lists["short"][3] = lists["short"][3][:2]
    lists["null"][4] = None
    lists["empty"][11] = []
    lists["text"][2][1][2] = "]]],"
    lists["no log-prob"][5][2][0] = None
    lists["twice"][7][4][1] = lists["twice"][7][0][1]
    lists["exponent"][1][0][0] = -1e-7
    return {**lists, "first is short": [[]] + regular(11), "longer": [row + [[-9.0, 7, None]] for row in regular(12)]}


@pytest.mark.parametrize("name", odd_positions())
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_odd_replies_equal_the_general_way(side, name):
    for length in (12, 7):
        both_ways(reply(side, odd_positions()[name]), side, length)


def test_spaces_and_not_a_number():
    both_ways(reply("student", regular(9), dump=lambda x: json.dumps(x).encode()), "student", 9)
    positions = regular(9)
    positions[3][0][0] = float("nan")
    raw = reply("student", positions, dump=lambda x: json.dumps(x, separators=(",", ":")).encode())
    with pytest.raises(DataError, match="no JSON"):  # NaN is no JSON; SGLang writes null
        read_reply(raw, "student", K, 9)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes of the top-k's text changed, dropped, put in or doubled."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(raw.find(b"_top_logprobs"), len(raw))
        kind, more = rng.randrange(4), rng.choices(b'[],nul-0123456789.e ":{}', k=rng.randint(1, 3))
        if kind == 0:
            raw[at] = more[0]
        elif kind == 1:
            del raw[at : at + rng.randint(1, 8)]
        else:
            raw[at:at] = bytes(more) if kind == 2 else raw[at : at + rng.randint(1, 40)]
    return bytes(raw)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_whatever_stands_in_the_text_both_ways_agree_where_it_is_json(side):
    def outcome(work):
        try:
            topk = work()
        except Exception as error:
            return type(error)
        return topk.ids.tolist(), topk.logprobs.tolist()

    rng, compared = random.Random(3), 0
    for seed in range(6000):
        raw = damaged(reply(side, regular(3, seed)), rng)
        try:
            info = orjson.loads(raw)["meta_info"]
        except (orjson.JSONDecodeError, KeyError):
            continue
        fast = outcome(lambda raw=raw: read_reply(raw, side, K, 2, dtype=np.float64)[1])
        slow = outcome(lambda info=info: TopK.from_reply(info, side, K, 2, dtype=np.float64))
        assert fast == slow, raw
        compared += 1
    assert compared > 200


def test_text_that_is_no_json_gives_an_error_or_numbers_never_a_crash():
    raw = reply("student", regular(3))
    for old, new in ((b",null],[", b",null],,"), (b"[[[", b"[[,"), (b",null]],[[", b",null]],,,")):
        with pytest.raises(DataError, match="no JSON"):
            read_reply(raw[: raw.find(b"_top_")] + raw[raw.find(b"_top_") :].replace(old, new), "student", K, 3)


def test_mixed_counts_that_add_up_are_not_taken_for_regular():
    positions = regular(4)
    positions[1].append(positions[2].pop())
    both_ways(reply("student", positions), "student", 4)


def test_short_and_missing_replies_raise():
    with pytest.raises(DataError, match="expected at least 9 positions"):
        read_reply(reply("student", regular(4)), "student", K, 9)
    with pytest.raises(DataError, match="input_top_logprobs is missing"):
        read_reply(reply("student", regular(4)), "teacher", K, 4)
    with pytest.raises(DataError, match="no JSON"):
        loads(b"<html>busy</html>")
    with pytest.raises(DataError, match="'student' or 'teacher'"):
        read_reply(b"{}", "both", K, 1)
    assert read_reply(reply("student", regular(4)), "student", K, 0)[1].T == 0


def test_without_arrow_the_general_way_serves(monkeypatch):
    monkeypatch.setattr(reply_module, "pa", None)
    assert both_ways(reply("student", regular(6)), "student", 6)["meta_info"]["output_top_logprobs"] is not None


def test_the_collector_is_left_as_found():
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        loads(b"{}")
        assert not gc.isenabled()
    finally:
        gc.enable()
