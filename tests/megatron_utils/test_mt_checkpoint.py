"""Checkpoints: into another layout with equal moments and the same next step; a crash while saving; what is refused."""

import json
import os

import numpy as np
import pytest
from conftest import data

LAYOUTS = {
    "one": dict(ranks=1),
    "one_distopt": dict(ranks=1, use_distributed_optimizer=True),
    "dp2_distopt": dict(ranks=2, use_distributed_optimizer=True),
    "tp2": dict(ranks=2, tensor_model_parallel_size=2),
    "tp2_sp_distopt": dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
    "pp2": dict(ranks=2, pipeline_model_parallel_size=2),
    "pp2_distopt": dict(ranks=2, pipeline_model_parallel_size=2, use_distributed_optimizer=True),
    "tp2_pp2_distopt": dict(
        ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, use_distributed_optimizer=True
    ),
    "tp2_dp2_distopt": dict(ranks=4, tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
}
PAIRS = [
    ("one", "tp2", False), ("one", "one", True), ("tp2", "pp2", True), ("dp2_distopt", "one_distopt", False),
    ("tp2_sp_distopt", "dp2_distopt", True), ("one_distopt", "tp2_pp2_distopt", True), ("pp2_distopt", "tp2_sp_distopt", False),
    ("tp2_dp2_distopt", "pp2_distopt", True), ("dp2_distopt", "dp2_distopt", False),
]  # fmt: skip
QUICK = {("one", "tp2"), ("dp2_distopt", "one_distopt"), ("tp2_sp_distopt", "dp2_distopt")}


@pytest.mark.parametrize(
    ("source", "target", "tied"),
    [pytest.param(*p, marks=() if p[:2] in QUICK else pytest.mark.slow, id=f"{p[0]}-{p[1]}") for p in PAIRS],
)
def test_other_layout(pool, models, tmp_path, source, target, tied):
    model = models("qwen3", tied)
    common = dict(model=model, data=data(), save=str(tmp_path / "run"), bf16=False)
    saved = pool.run("save_then_step", **common, **LAYOUTS[source])
    loaded = pool.run("load_then_step", **common, load=str(tmp_path / "run"), **LAYOUTS[target])
    for rank in loaded:
        assert rank["start"] == 2
        assert rank["extra"] == {"data_source": {"epoch": 1, "offset": (3, 4)}, "note": "kept"}
        assert rank["steps"] == {2.0}, "every parameter must have taken two steps"
        assert rank["step_tensors"] == rank["parameters"], "step tensors are shared between parameters"
        assert rank["fused"], "the step would copy all weights"
    before, after = saved[0], loaded[0]
    assert set(before["moments"]) == set(after["moments"])
    for name, expected in before["moments"].items():
        np.testing.assert_array_equal(after["moments"][name], expected, err_msg=name)
        assert np.abs(expected).max() > 0, name
    for name, expected in before["weights"].items():
        np.testing.assert_array_equal(after["weights"][name], expected, err_msg=name)
    assert after["next"]["lr"] == before["next"]["lr"]
    assert after["next"]["loss"] == pytest.approx(before["next"]["loss"], rel=1e-6)
    assert after["next"]["grad_norm"] == pytest.approx(before["next"]["grad_norm"], rel=1e-5)
    for name, expected in before["after"].items():
        np.testing.assert_allclose(after["after"][name], expected, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.slow
def test_bf16_resume_is_exact(pool, models, tmp_path):
    """Main weights are fp32 and come back bit by bit: the next step is that of the uninterrupted run."""
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), bf16=True, fp32=False)
    layout = LAYOUTS["dp2_distopt"]
    saved = pool.run("save_then_step", **common, **layout)
    loaded = pool.run("load_then_step", **common, load=str(tmp_path / "run"), **layout)
    for name, expected in saved[0]["after"].items():
        np.testing.assert_array_equal(loaded[0]["after"][name], expected, err_msg=name)


@pytest.mark.parametrize("offload", [False, True])
def test_a_sharded_state_is_gathered_by_the_rank_that_writes_it(pool, models, offload):
    (first, parameters), (second, _) = pool.run("gathered_to_save", model=models("qwen3"), optimizer_cpu_offload=offload, **LAYOUTS["dp2_distopt"])
    assert (first, second) == (12 * parameters, 0)


def test_crash_while_saving_leaves_the_previous_one(pool, models, tmp_path):
    run = tmp_path / "run"
    results = pool.run("crash_in_second_save", 1, model=models("qwen3"), data=data(), save=str(run))
    assert results == ["crashed"]
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    loaded = pool.run("load_then_step", 1, model=models("qwen3"), data=data(), save=str(run), load=str(run))
    assert loaded[0]["start"] == 1


def test_overwriting_and_keeping_the_newest(pool, models, tmp_path):
    run = tmp_path / "run"
    pool.run("save_many", 1, model=models("qwen3"), save=str(run), rollouts=[0, 1, 2, 2], keep_checkpoints=2)
    assert sorted(p.name for p in run.iterdir()) == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_another_teacher_or_tokenizer_is_refused(pool, models, tmp_path):
    import shutil

    teacher, other = tmp_path / "teacher", tmp_path / "other"
    shutil.copytree(models("qwen3"), teacher)
    shutil.copytree(models("qwen3"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 9e9}}))
    run = str(tmp_path / "run")
    common = dict(model=models("qwen3"), data=data(), save=run)
    pool.run("save_then_step", 1, **common, teachers={"default": str(teacher)})
    again = dict(**common, load=run)
    assert pool.run("load_error", 1, **again, teachers={"default": str(teacher)}) == [None]
    (error,) = pool.run("load_error", 1, **again, teachers={"default": str(other)})
    assert error[0] == "ConfigError" and "another teacher:default" in error[1] and "--allow-teacher-change" in error[1]
    forced = dict(**again, teachers={"default": str(other)}, allow_teacher_change=True, output_dir=str(tmp_path / "out"))
    pool.run("load_then_save", 1, **forced)
    (line,) = (tmp_path / "out" / "identity_changes.jsonl").read_text().splitlines()
    recorded = json.loads(line)
    assert recorded["from_rollout"] == 2 and list(recorded["changed"]) == ["teacher:default"]
    assert len(set(recorded["changed"]["teacher:default"])) == 2
    held = checkpoint_common(run)["ta_opd"]
    assert held["identity_changes"] == [recorded] and held["rollout_id"] == 5
    assert pool.run("load_error", 1, **again, teachers={"default": str(other)}) == [None], "the forced teacher is the run's own now"
    pool.run("save_then_step", 1, **common, teachers={"default": str(teacher)})
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert pool.run("load_error", 1, **again, teachers={"default": str(moved)}) == [None]
    student = tmp_path / "student"
    shutil.copytree(models("qwen3"), student)
    (student / "tokenizer.json").write_text('{"model": "another"}')
    (error,) = pool.run("load_error", 1, **{**again, "model": student}, teachers={"default": str(teacher)})
    assert error[0] == "ConfigError" and "another tokenizer" in error[1]
    assert pool.run("load_error", 1, **{**again, "model": student}, teachers={"default": str(teacher)}, allow_teacher_change=True) == [None]


def checkpoint_common(run) -> dict:
    from slime.backends.megatron_utils import checkpoint

    return checkpoint.read_common(checkpoint.require(str(run)))


def test_wrong_model_and_broken_tracker(pool, models, tmp_path):
    run = tmp_path / "run"
    pool.run("save_many", 1, model=models("qwen3"), save=str(run), rollouts=[0])
    (error,) = pool.run("load_error", 1, model=models("qwen3", hidden_size=48), data=data(), load=str(run))
    assert error[0] == "DataError" and "does not hold this model" in error[1]
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    (error,) = pool.run("load_error", 1, model=models("qwen3"), data=data(), load=str(run))
    assert error[0] == "DataError" and "iter_0000007" in error[1]
    os.remove(run / "latest_checkpointed_iteration.txt")
    assert pool.run("load_error", 1, model=models("qwen3"), data=data(), load=str(run)) == [None], "no checkpoint yet: start from HF"


def test_extra_must_be_plain(pool, models, tmp_path):
    (error,) = pool.run("save_error", 1, model=models("qwen3"), save=str(tmp_path / "run"))
    assert error[0] == "DataError" and "plain values" in error[1]
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()
