"""The whole diagnostic on tiny models, and what happens when it is run again, changed, or a part of it fails."""

import json
import os

import pytest

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.fixed_context.analyses import AnalysisConfig
from ta_opd.fixed_context.pipeline import LOCK, STEPS, PipelineConfig, checkpoint_iterations, checkpoints, plan, run_pipeline
from ta_opd.fixed_context.sampling import SamplingConfig
from ta_opd.fixed_context.tables import read_table, write_table
from ta_opd.suite.memory import directory_lock
from tests.fixed_context.diagnostic_cases import write_prompts

QUIET = {"log": lambda line: None}


@pytest.fixture
def config(models, tmp_path):
    return PipelineConfig(
        diag_dir=str(tmp_path / "diag"), student=str(models["student"]), teacher=str(models["teacher"]),
        after_hf={"step1": str(models["student"]), "step2": str(models["trained"])}, bank_source="heldout",
        prompt_data=str(write_prompts(tmp_path / "heldout.jsonl", 30)), exclude_prompts=str(write_prompts(tmp_path / "train.jsonl", 5)),
        sampling=SamplingConfig(num_contexts=12, max_response_tokens=16), num_contexts=12, max_response_tokens=12,
        analysis=AnalysisConfig(bootstrap=20), summary_name="summary.md", pair_id="tiny",
    )  # fmt: skip


def test_from_prompts_to_summary_and_again(config, tmp_path):
    first = run_pipeline(config, **QUIET)
    assert list(first) == ["export", "score_before", "score_after", "analyse", "robustness", "recommend", "summary"]
    assert set(first.values()) == {"done"}
    out = tmp_path / "diag"
    table = read_table(out / "eval_latest" / "fixed_context_metrics.parquet")
    assert table.groupby("sample_ordinal").size().max() <= 12 and table["G_KLf_abs"].abs().max() > 0
    assert (read_table(out / "eval_step1" / "fixed_context_metrics.parquet")["G_KLf_abs"] == 0).all()  # the student itself
    assert read_table(out / "analysis" / "gain_by_checkpoint.csv")["checkpoint"].tolist() == ["step1", "latest"]
    summary = (out / "summary.md").read_text()
    assert all(text in summary for text in ("Gain by checkpoint", "Regressions", "Which selector", "tiny"))
    for name in ("gain", "within_q3", "topn", "reachability", "support", "recommend"):
        assert any((out / "analysis" / name).iterdir())
    assert not list(out.glob("**/*.parts"))

    assert set(run_pipeline(config, **QUIET).values()) == {"kept"}
    # A changed option runs its step and what depends on it, nothing before.
    changed = PipelineConfig(**{**config.__dict__, "analysis": AnalysisConfig(bootstrap=21)})
    again = run_pipeline(changed, **QUIET)
    assert [s for s, r in again.items() if r == "kept"] == ["export", "score_before", "score_after"]
    # A lost output is made again.
    (out / "analysis" / "recommend" / "selector_recommendation.csv").unlink()
    lost = run_pipeline(changed, **QUIET)
    assert lost["recommend"] == "done" and lost["robustness"] == "kept"
    assert run_pipeline(changed, force=["summary"], **QUIET)["summary"] == "done"
    with pytest.raises(ConfigError, match="force: expected steps"):
        run_pipeline(changed, force=["everything"], **QUIET)


def test_a_changed_model_is_scored_again(config, models, tmp_path):
    run_pipeline(config, **QUIET)
    os.utime(models["trained"] / "model.safetensors")
    results = run_pipeline(config, **QUIET)
    assert results["score_before"] == "kept" and results["score_after"] == "done"


def test_a_failing_command_shows_the_end_of_its_log(config, tmp_path):
    failing = PipelineConfig(**{**config.__dict__, "train_command": "echo out of luck; exit 3"})
    with pytest.raises(ServiceError, match="(?s)training ended with code 3.*out of luck"):
        run_pipeline(failing, **QUIET)
    done = tmp_path / "DONE"
    training = PipelineConfig(**{**config.__dict__, "train_command": f"touch {done}", "train_done_file": str(done)})
    assert run_pipeline(training, **QUIET)["train"] == "done"
    assert run_pipeline(training, **QUIET)["train"] == "kept"


def test_two_calls_on_one_directory_do_not_meet(config, tmp_path):
    held = tmp_path / "held"
    shows = f"for f in /proc/$$/fd/*; do readlink $f; done > {held}; true"
    asks = PipelineConfig(**{**config.__dict__, "train_command": shows, "train_done_file": str(held)})
    with directory_lock(tmp_path / "diag", name=LOCK):
        with pytest.raises(ConfigError, match=rf"diag is in use by process {os.getpid()} on .* choose another --diag-dir \(DIAG_DIR\)"):
            run_pipeline(asks, **QUIET)
        assert not held.exists() and not (tmp_path / "diag" / "pipeline_state.json").exists()
    broken = PipelineConfig(**{**asks.__dict__, "prompt_data": str(tmp_path / "absent.jsonl")})  # the first step is enough here
    with pytest.raises(DataError):
        run_pipeline(broken, **QUIET)
    assert str(tmp_path / "diag" / LOCK) in held.read_text().splitlines()  # what is left of a killed call still holds the directory
    with directory_lock(tmp_path / "diag", 0.1, name=LOCK):
        pass


def test_a_command_that_leaves_nothing_is_an_error(config, tmp_path):
    with pytest.raises(DataError, match="step train ended without"):
        run_pipeline(PipelineConfig(**{**config.__dict__, "train_command": "true", "train_done_file": str(tmp_path / "absent")}), **QUIET)


def test_an_interrupted_step_is_not_taken_for_done(config, monkeypatch):
    from ta_opd.fixed_context import analyses

    run_pipeline(config, **QUIET)
    monkeypatch.setattr(analyses, "run_support", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, force=["robustness"], **QUIET)
    monkeypatch.undo()
    assert run_pipeline(config, **QUIET)["robustness"] == "done"


def test_the_report_is_the_last_step(config, tmp_path):
    report = ("bash", "-c", "test -d {student} && cp {diag_dir}/summary.md {output} # a path with {braces}, {} and {0}")
    results = run_pipeline(PipelineConfig(**{**config.__dict__, "report_command": report}), **QUIET)
    assert list(results)[-1] == "report" and "tiny" in (tmp_path / "diag" / "report.html").read_text()


def torch_dist(root, numbers, latest):
    for n in numbers:
        write_table(root / f"iter_{n:07d}" / "x.csv", read_table_of(n))
    (root / "latest_checkpointed_iteration.txt").write_text(f"{latest}\n")
    return root


def read_table_of(n):
    import pandas as pd

    return pd.DataFrame({"n": [n]})


def test_checkpoints_of_a_run_are_converted(config, models, tmp_path):
    root = torch_dist(tmp_path / "ckpt", (2, 4, 10), 10)
    convert = ("bash", "-c", f"echo {{iteration}} {{checkpoint_root}} && mkdir -p {{output}} && cp -r {models['trained']}/. {{output}}")
    run = PipelineConfig(**{**config.__dict__, "after_hf": {}, "save_dir": str(root), "convert_command": convert, "iterations": "all"})
    results = run_pipeline(run, **QUIET)
    assert results["convert"] == "done" and list(plan(run)) == [s for s in STEPS if s not in ("train", "report")]
    out = tmp_path / "diag"
    assert "10" in (out / "logs" / "convert_eval_latest.log").read_text()
    names = ["iter_0000002", "iter_0000004", "latest"]
    assert read_table(out / "analysis" / "gain_by_checkpoint.csv")["checkpoint"].tolist() == names
    assert set(run_pipeline(run, **QUIET).values()) == {"kept"}


def test_iterations(tmp_path):
    root = torch_dist(tmp_path, (2, 4, 10), 4)
    assert checkpoint_iterations(root, "latest") == [4]
    assert checkpoint_iterations(root, "all") == [2, 4, 10]
    assert checkpoint_iterations(root, "10,2") == [2, 10]
    with pytest.raises(DataError, match=r"expected iterations \[3\], found \[2, 4, 10\]"):
        checkpoint_iterations(root, "3")
    with pytest.raises(ConfigError, match="latest, all or numbers"):
        checkpoint_iterations(root, "last")
    with pytest.raises(DataError, match="no iter_NNNNNNN folder"):
        checkpoint_iterations(tmp_path / "absent", "all")


def test_names_of_hf_checkpoints(config):
    assert list(checkpoints(config)) == ["eval_step1", "eval_latest"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bank_source": "x"}, "expected one of dump, heldout, tokenbank"),
        ({"prompt_data": None}, "needs prompt_data"),
        ({"after_hf": {}}, "save_dir"),
        ({"after_hf": {}, "save_dir": "x"}, "convert_command"),
    ],
)
def test_configurations_that_cannot_run(config, change, message):
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(**{**config.__dict__, **change})


def test_state_is_readable(config, tmp_path):
    run_pipeline(config, **QUIET)
    state = json.loads((tmp_path / "diag" / "pipeline_state.json").read_text())
    assert set(state) == {"export", "score_before", "score_after", "analyse", "robustness", "recommend", "summary"}
    assert all(entry["seconds"] >= 0 for entry in state.values())


@pytest.mark.parametrize("text", ["{", "[]", '{"train": "done"}'])
def test_a_state_of_another_form_is_said(config, tmp_path, text):
    (tmp_path / "diag").mkdir()
    (tmp_path / "diag" / "pipeline_state.json").write_text(text)
    with pytest.raises(DataError, match=r"pipeline_state.json: expected the JSON state of a diagnostic, .*move the file away"):
        run_pipeline(config, **QUIET)


def test_a_finished_training_is_not_scored_against_another_teacher(config, tmp_path):
    """RUN_NAME and DIAG_DIR of a driver do not change with TEACHER_MODEL: scores of a new teacher would be put beside the old run."""
    done = tmp_path / "DONE"
    training = PipelineConfig(**{**config.__dict__, "train_command": f"touch {done}", "train_done_file": str(done), "prompt_data": str(tmp_path / "absent")})
    for _ in range(2):  # the training is done once, the prompts are not there
        with pytest.raises(DataError, match="no such file"):
            run_pipeline(training, **QUIET)
    other = PipelineConfig(**{**training.__dict__, "teacher": config.student})
    with pytest.raises(ConfigError, match=f"is of a training with student {config.student} and teacher {config.teacher}, got"):
        run_pipeline(other, **QUIET)
