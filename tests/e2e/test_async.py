"""train_async.py on the real stack: rollouts one step old, sampled while the step before trains, resumable, nothing lost."""

import json
import math

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import RESPONSE, TRAIN

pytestmark = pytest.mark.e2e
SCRIPT = TRAIN.with_name("train_async.py")
FLAGS = ["--opd-loss-type", "topk_reverse_kl", "--opd-budget-mask", "dlearn_high", "--opd-budget-ratio", "0.5", "--num-rollout", "4"]


@pytest.fixture(scope="module")
def ahead(run, task, servers):
    """Four asynchronous rollouts with a checkpoint after the second, dumps and a trace; and the version that the engine ends with."""
    from slime.backends.sglang_utils.client import SGLangClient

    checkpoints = task.root / "async_checkpoints"
    result = run("async", *FLAGS, "--save", str(checkpoints), "--save-interval", "2", "--trace",
                 "--save-debug-rollout-data", str(task.root / "async_dumps"), script=SCRIPT)  # fmt: skip
    client = SGLangClient([servers.student])
    versions = client.run(client.weight_versions())
    client.close()
    return result, checkpoints, versions[servers.student]


def dump(task, name, rollout_id):
    return pq.read_table(task.root / name / f"rollout_{rollout_id:06d}.parquet").to_pandas()


def spans(result, name, process):
    """(begin, end) of a phase of one process, in the order of the steps."""
    events = json.loads((result.dir / "trace.json").read_text())["traceEvents"]
    rows = {e["tid"] for e in events if e["ph"] == "M" and e["args"]["name"] == process}
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] == name and e["tid"] in rows)


def test_every_rollout_is_trained_and_is_one_step_old_from_the_second_on(ahead):
    result, _, version = ahead
    assert [row["rollout_id"] for row in result.rows] == [0, 1, 2, 3]
    assert [row["rollout/staleness"] for row in result.rows] == [0, 1, 1, 1]
    assert [row["rollout/staleness_max"] for row in result.rows] == [0, 1, 1, 1]
    assert [row["rollout/samples"] for row in result.rows] == [16] * 4
    assert all(math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in result.rows)
    assert result.rows[-1]["train/divergence_valid"] < result.rows[0]["train/divergence_valid"]
    assert version == "4"


def test_a_rollout_is_sampled_with_one_version_of_the_weights_and_says_which(ahead, task):
    for rollout_id, version in enumerate(["0", "0", "1", "2"]):
        table = dump(task, "async_dumps", rollout_id)
        assert {tuple(v) for v in table["weight_versions"]} == {(version,)}
        assert all(n == [length] for n, length in zip(map(list, table["weight_version_tokens"]), table["response_length"], strict=True))
        assert table["response_length"].max() <= RESPONSE


def test_the_importance_ratio_is_one_on_fresh_samples_only(ahead):
    rows = ahead[0].rows
    assert abs(rows[0]["train/importance_ratio_mean"] - 1) < 1e-4 and abs(rows[0]["train/importance_ratio_max"] - 1) < 1e-3
    for row in rows[1:]:
        assert row["train/importance_ratio_max"] > 1.001  # the trained weights are not those that sampled
        assert 0.5 < row["train/importance_ratio_mean"] < 2


def test_generation_overlaps_training(ahead):
    generate, train = spans(ahead[0], "generate", "rollout"), spans(ahead[0], "train", "driver")
    sync = spans(ahead[0], "sync", "driver")
    assert len(generate) == len(train) == 4 and len(sync) == 5
    # rollout k + 1 is there before the weights of step k are sent: it was not waiting for them, as it does in train.py
    assert all(generate[step + 1][1] <= sync[step + 1][0] for step in range(3))
    assert not [1 for a, b in sync for c, d in generate if a < d and c < b]
    # both work at once; a busy machine may start one of them late, but not every time
    assert any(generate[step + 1][0] < train[step][1] and train[step][0] < generate[step + 1][1] for step in range(3))


def test_it_resumes_with_the_same_prompts(ahead, run, task):
    resumed_from = task.root / "async_resume"
    resumed_from.mkdir()
    (resumed_from / "iter_0000001").symlink_to(ahead[1] / "iter_0000001")
    (resumed_from / "latest_checkpointed_iteration.txt").write_text("1")
    again = run("async_resumed", *FLAGS, "--load", str(resumed_from), "--save-debug-rollout-data", str(task.root / "async_resumed"),
                script=SCRIPT)  # fmt: skip
    assert [(row["rollout_id"], row["rollout/staleness"]) for row in again.rows] == [(2, 0), (3, 1)]
    for rollout_id in (2, 3):
        one, two = dump(task, "async_dumps", rollout_id), dump(task, "async_resumed", rollout_id)
        assert list(one["prompt"]) == list(two["prompt"]) and list(one["sample_index"]) == list(two["sample_index"])
    indices = [i for rollout_id in range(4) for i in dump(task, "async_dumps", rollout_id)["sample_index"]]
    assert sorted(indices) == list(range(64))  # nothing sampled ahead is lost or trained twice
