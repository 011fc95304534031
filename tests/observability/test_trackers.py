"""metrics.jsonl under resume, non-finite numbers, the trace, and what a rollout is logged as."""

import argparse
import importlib.util

import numpy as np
import orjson
import pytest

from slime.observability.metrics import rollout_metrics
from slime.observability.timer import Timer, write_trace
from slime.observability.trackers import Trackers, check_wandb
from slime.utils.types import Sample
from ta_opd.errors import ConfigError


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


def evaluated(tmp_path):
    return [(row["rollout_id"], row["dataset"]) for row in lines(tmp_path / "eval.jsonl")]


def test_a_resumed_run_knows_the_evaluation_that_its_checkpoint_came_after(tmp_path):
    first = Trackers(arguments(tmp_path))
    for rollout_id in (-1, 1, 3):
        first.log_eval(rollout_id, {"a": {"accuracy": 0.5 + rollout_id / 10, "per_prompt": [1, 0]}, "b": {"accuracy": 0.1}})
    again = Trackers(arguments(tmp_path), start=2)
    assert evaluated(tmp_path) == [(-1, "a"), (-1, "b"), (1, "a"), (1, "b")]
    assert again.recorded_eval(1, ["a", "b"]) == {"a": {"accuracy": 0.6, "per_prompt": [1, 0]}, "b": {"accuracy": 0.1}}
    assert again.recorded_eval(1, ["a"]) == {"a": {"accuracy": 0.6, "per_prompt": [1, 0]}}
    assert again.recorded_eval(0, ["a"]) is None
    assert evaluated(tmp_path) == [(-1, "a"), (-1, "b"), (1, "a"), (1, "b")]


def test_a_set_that_is_new_is_evaluated_with_the_others_and_no_row_is_there_twice(tmp_path):
    Trackers(arguments(tmp_path)).log_eval(1, {"a": {"accuracy": 0.5}, "old": {"accuracy": 0.2}})
    again = Trackers(arguments(tmp_path), start=2)
    assert again.recorded_eval(1, ["a", "new"]) is None
    again.log_eval(1, {"a": {"accuracy": 0.5}, "new": {"accuracy": 0.3}})
    assert sorted(evaluated(tmp_path)) == [(1, "a"), (1, "new"), (1, "old")]


def test_a_run_that_begins_anew_also_drops_the_evaluation_before_its_first_rollout(tmp_path):
    Trackers(arguments(tmp_path)).log_eval(-1, {"a": {"accuracy": 0.5}})
    assert Trackers(arguments(tmp_path)).recorded_eval(-1, ["a"]) is None
    assert evaluated(tmp_path) == []
    assert Trackers(arguments(tmp_path / "empty")).recorded_eval(-1, ["a"]) is None


def test_wandb_gets_every_number_and_goes_on_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="optional: pip install wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = arguments(tmp_path)
    args.use_wandb, args.wandb_project, args.wandb_group, args.run_name, args.lr = True, "p", None, "name", 0.5
    args.flag_names = ["lr"]
    for start in (0, 2):
        trackers = Trackers(args, start)
        for i in range(start, start + 2):
            trackers.log(i, {"train/loss": 0.1 * i})
        trackers.log_eval(start + 1, {"held": {"accuracy": 0.25, "per_prompt": [1]}})
        trackers.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {f.stem.removeprefix("run-") for f in files} == {(tmp_path / "wandb_id").read_text()}
    content = b""
    for file in files:
        content += file.read_bytes()
    assert content.count(b"train/loss") >= 4 and content.count(b"eval/held/accuracy") >= 2 and b"per_prompt" not in content


def test_wandb_without_a_key_is_refused_before_anything_starts(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    installed = importlib.util.find_spec("wandb") is not None
    with pytest.raises(ConfigError, match="WANDB_API_KEY" if installed else "not installed"):
        check_wandb()
    if installed:
        monkeypatch.setenv("WANDB_MODE", "offline")
        check_wandb()


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
