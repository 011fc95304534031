"""Replies as bytes become arrays, or a DataError that says what is wrong."""

import base64

import numpy as np
import orjson
import pytest

from slime.backends.sglang_utils import wire
from ta_opd.errors import DataError


def generated(**meta):
    base = {"finish_reason": {"type": "stop"}, "weight_version": "3", "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
            "output_top_logprobs": [[[-0.5, 7, None], [-2.0, 1, None]], [[-0.1, 2, None], [-1.5, 8, None]]]}  # fmt: skip
    return {"output_ids": [7, 8], "meta_info": {**base, **meta}}


def test_generate():
    reply = wire.parse_generate(orjson.dumps(generated()), 2)
    assert (reply.output_ids, reply.finish_reason, reply.weight_version) == ([7, 8], "stop", "3")
    np.testing.assert_array_equal(reply.log_probs, np.float32([-0.5, -1.5]))
    np.testing.assert_array_equal(reply.topk.ids, [[7, 1], [2, 8]])


def test_generate_without_tokens():
    reply = wire.parse_generate(orjson.dumps({"output_ids": [], "meta_info": {**generated(output_token_logprobs=[], output_top_logprobs=[])["meta_info"]}}), 2)
    assert reply.output_ids == [] and len(reply.topk) == 0 and len(reply.log_probs) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_token_logprobs": [[-0.5, 7, None]]}, "expected 2 log-probs"),
        ({"output_token_logprobs": None}, "expected 2 log-probs.*none"),
        ({"output_token_logprobs": [[-0.5, 7, None], [None, 8, None]]}, "1 of 2 log-probs are not finite"),
        ({"output_top_logprobs": [[[-0.5, 7, None], [-2.0, 1, None]]]}, "output_top_logprobs"),
        ({"output_top_logprobs": None}, "output_top_logprobs"),
    ],
)
def test_generate_with_something_missing(change, message):
    with pytest.raises(DataError, match=message):
        wire.parse_generate(orjson.dumps(generated(**change)), 2)


@pytest.mark.parametrize("raw", [b"", b"{", orjson.dumps(generated())[:60], b"[]", b'{"output_ids":[1]}', b"null"])
def test_a_damaged_reply(raw):
    with pytest.raises(DataError):
        wire.parse_generate(raw, 2)


def scored(flat, damage=None):
    values = np.float32([[-0.1, -2.0], [-0.3, -1.0], [-0.2, -4.0]])
    ids = np.int32([[5, 6], [7, 8], [9, 1]])
    meta = {"finish_reason": {"type": "length"}, "weight_version": "3",
            "input_token_logprobs": [[None, 4, None], [-0.1, 5, None], [-1.0, 8, None], [-0.2, 9, None]]}  # fmt: skip
    if flat:
        meta |= {
            "input_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
            "input_top_logprobs_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
            "input_top_logprobs_shape": [3, 2],
            "input_top_logprobs_null_prefix": 1,
        }
    else:
        meta["input_top_logprobs"] = [None] + [[[float(v), int(i), None] for v, i in zip(a, b, strict=True)] for a, b in zip(values, ids, strict=True)]
    meta.update(damage or {})
    return orjson.dumps({"meta_info": meta})


def test_both_forms_of_the_teachers_reply_are_equal():
    packed, nested = (wire.parse_score(scored(flat), 2, 2) for flat in (True, False))
    np.testing.assert_array_equal(packed.topk.ids, [[7, 8], [9, 1]])
    np.testing.assert_array_equal(packed.topk.ids, nested.topk.ids)
    np.testing.assert_array_equal(packed.topk.logprobs, nested.topk.logprobs)
    np.testing.assert_array_equal(packed.log_probs, np.float32([-1.0, -0.2]))


def held(array) -> int:
    """Bytes that stay in memory for `array`: those of the buffer at the end of its chain of views."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array.nbytes if isinstance(array, np.ndarray | memoryview) else len(array)


@pytest.mark.parametrize("flat, before", [(True, 0), (False, 0), (True, 300)])
def test_what_stays_of_a_reply_is_its_arrays(flat, before):
    """before: prompt positions that the server scored as well."""
    n, k = 500, 16
    top = [[[-0.5 - i - j / 100, 1000 * j + i, None] for i in range(k)] for j in range(n)]
    meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": [[None, 1, None], *([-0.25, 5, None] for _ in range(n))]}
    if flat:
        rows = np.array([[[v, i] for v, i, _ in row] for row in top[:before] + top])
        meta |= {
            "input_top_logprobs_val_flat_b64": base64.b64encode(rows[..., 0].astype(np.float32).tobytes()).decode(),
            "input_top_logprobs_idx_flat_b64": base64.b64encode(rows[..., 1].astype(np.int32).tobytes()).decode(),
            "input_top_logprobs_shape": [before + n, k],
        }
    else:
        meta["input_top_logprobs"] = [None, *top]
    score = wire.parse_score(orjson.dumps({"meta_info": meta}), n, k)
    arrays = [score.log_probs, score.topk.ids, score.topk.logprobs]
    reply = {"output_ids": list(range(n)), "meta_info": {**generated()["meta_info"], "output_top_logprobs": top,
             "output_token_logprobs": [[-0.25, i, None] for i in range(n)]}}  # fmt: skip
    sampled = wire.parse_generate(orjson.dumps(reply), k)
    arrays += [sampled.log_probs, sampled.topk.ids, sampled.topk.logprobs]
    assert [a.dtype.itemsize for a in arrays] == [4] * 6
    assert sum(map(held, arrays)) <= 1.02 * n * (2 * 4 + 4 * 4 * k)  # float32 and int32, and nothing of the text behind them


def test_a_narrow_top_k_is_padded():
    topk = wire.parse_score(scored(True), 3, 4).topk
    assert topk.ids.shape == (3, 4) and (topk.ids[:, 2:] == -1).all() and np.isneginf(topk.logprobs[:, 2:]).all()


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"input_top_logprobs_shape": [2, 2]}, "packed top-k of the reply is damaged"),
        ({"input_top_logprobs_val_flat_b64": "!!!"}, "damaged"),
        ({"input_token_logprobs": [[None, 4, None]]}, "expected at least 3"),
        ({"input_token_logprobs": [[None, 4, None], [None, 5, None], [-1.0, 8, None], [-0.2, 9, None]]}, "1 of 3 log-probs are missing"),
        ({"finish_reason": {"type": "abort"}}, "aborted"),
        ({"input_token_logprobs": None}, "return log-probs at all"),
    ],
)
def test_a_damaged_score(damage, message):
    with pytest.raises(DataError, match=message):
        wire.parse_score(scored(True, damage), 3, 2)


def test_score_payload_is_the_response_span():
    payload = wire.score_payload([1, 2, 3, 4], 2, 8, token_ids=np.array([5, 6]))
    assert payload["logprob_start_len"] == 1 and payload["sampling_params"]["max_new_tokens"] == 0
    assert payload["token_ids_logprob"] == [5, 6] and payload["return_flat_raw_top_logprobs_b64"] and not payload["return_text_in_logprobs"]
    assert wire.score_payload([1, 2, 3, 4], 2, whole=True)["logprob_start_len"] == 0
    assert "top_logprobs_num" not in wire.score_payload([1, 2, 3], 1) and "token_ids_logprob" not in wire.score_payload([1, 2, 3], 1, token_ids=[])


def test_windows_come_back_in_the_order_asked():
    def window(rows):
        return {"meta_info": {"finish_reason": {"type": "length"}, "input_token_ids_logprobs": [None, *rows]}}

    raw = orjson.dumps([window([[[-1.0, 4, None], [-2.0, 6, None]]]), window([[[-3.0, 9, None]], [[-4.0, 9, None]]])])
    a, b = wire.parse_windows(raw, [(3, 4, [4, 6]), (4, 6, [9])])
    np.testing.assert_array_equal(a, np.float32([[-1, -2]]))
    np.testing.assert_array_equal(b, np.float32([[-3], [-4]]))
    shuffled = orjson.dumps([window([[[-2.0, 6, None], [-1.0, 4, None]]])])
    np.testing.assert_array_equal(wire.parse_windows(shuffled, [(3, 4, [4, 6])])[0], np.float32([[-1, -2]]))
    with pytest.raises(DataError, match="expected 2 windows back, got 1"):
        wire.parse_windows(shuffled, [(3, 4, [4, 6]), (4, 5, [1])])
