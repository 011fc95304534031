"""metrics.jsonl under resume, non-finite numbers, the trace, and what a rollout is logged as."""

import argparse

import numpy as np
import orjson

from slime.observability.metrics import rollout_metrics
from slime.observability.timer import Timer, write_trace
from slime.observability.trackers import Trackers
from slime.utils.types import Sample


def arguments(tmp_path):
    return argparse.Namespace(output_dir=str(tmp_path), use_tensorboard=False, use_wandb=False, tensorboard_dir=None)


def lines(path):
    return [orjson.loads(x) for x in path.read_bytes().splitlines()]


def test_resume_drops_rollouts_that_run_again_and_a_cut_line(tmp_path):
    first = Trackers(arguments(tmp_path))
    for i in range(4):
        first.log(i, {"a": float(i), "bad": float("nan")})
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"rollout_id": 1, "a"')
    again = Trackers(arguments(tmp_path), start=2)
    again.log(2, {"a": 20.0})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(r["rollout_id"], r["a"]) for r in rows] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert rows[0]["bad"] is None


def test_reverse_kl_over_valid_and_over_kept_tokens_are_two_numbers():
    sample = Sample(tokens=[0, 1, 2, 3, 4], response_length=4, loss_mask=[1, 1, 1, 0], metadata={"teacher": "math"},
                    rollout_log_probs=np.array([-1, -1, -1, -9], np.float32), teacher_log_probs=np.array([-2, -4, -1, -9], np.float32),
                    opd_weights=np.array([0, 1, 0, 0], np.float32))  # fmt: skip
    m = rollout_metrics([sample], {"exact_fraction": 0.5, "kept_per_sample": [1]})
    assert np.isclose(m["rollout/reverse_kl_valid"], 4 / 3) and m["rollout/reverse_kl_kept"] == 3.0
    assert (m["rollout/kept_tokens"], m["rollout/valid_tokens"], m["rollout/exact_fraction"]) == (1.0, 3.0, 0.5)
    assert np.isclose(m["teacher/math/reverse_kl_valid"], 4 / 3)
    assert "rollout/kept_per_sample" not in m


def test_timer_adds_up_and_the_trace_has_one_row_a_process(tmp_path):
    timer = Timer("driver", keep_spans=True)
    timer.add("train", 1.0, 2.0)
    timer.add("train", 3.0, 3.5)
    other = Timer("rollout", keep_spans=True)
    other.add("generate", 0.0, 1.0)
    assert timer.take() == {"train": 1.5} and timer.take() == {}
    write_trace(timer.take_spans() + other.take_spans(), tmp_path / "t.json")
    events = orjson.loads((tmp_path / "t.json").read_bytes())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"driver", "rollout"}
    assert sum(e["ph"] == "X" for e in events) == 3
