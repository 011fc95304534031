"""The GPU benchmarks' own code, without a GPU: the stock mask, the timeline, the arithmetic of the table, and (on request) a whole tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu import opd_step, random_models, timeline
from benchmarks.gpu.watch import Watch
from benchmarks.selection import synthetic_batch
from ta_opd.metrics import token_metrics
from ta_opd.selection import SelectionConfig, select_tokens

ROOT = Path(__file__).resolve().parents[2]
SELECTOR = ROOT / "benchmarks" / "gpu" / "stock_selector.py"


@pytest.mark.parametrize("mask", ["dlearn_high", "entropy", "tip"])
@pytest.mark.parametrize("profile", ["released", "paper"])
def test_the_loop_keeps_the_same_tokens(mask, profile, tmp_path, monkeypatch):
    batch = synthetic_batch(2048, 8, np.float64)
    valid = np.random.default_rng(0).random(2048) < 0.9
    metrics = token_metrics(**batch)
    raw = {"student": batch["student"], "teacher": batch["teacher"], "sampled_ids": batch["sampled_ids"]}
    monkeypatch.setenv("STOCK_CHECK", str(tmp_path / "check.json"))
    loop, ours = (select_tokens(metrics, valid, batch["response_lengths"], SelectionConfig(mask=mask, ratio=0.1, profile=profile, selector_path=path), **raw)
                  for path in (f"{SELECTOR}:{mask}", None))  # fmt: skip
    assert ours.keep.sum() > 150 and (loop.keep == ours.keep).all() and (loop.weights == ours.weights).all()
    check = json.loads((tmp_path / "check.json").read_text())
    assert check["kept_by_one_only"] == 0 and check["kept_by_loop"] == ours.keep.sum()


def trace(path: Path) -> Path:
    events = [{"name": n, "ph": "X", "ts": a * 1e6, "dur": (b - a) * 1e6} for n, a, b in
              (("sync", 0, 1), ("generate", 1, 4), ("select", 4, 4.5), ("train", 5, 7), ("generate", 7, 9))]  # fmt: skip
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_the_timeline_splits_generation_and_shows_waiting(tmp_path):
    spans = timeline.spans_of(trace(tmp_path / "trace.json"), [{"seconds/score": 0.5}, {"seconds/score": 0.0}])
    assert ("sample", 1, 3.5) in spans and ("score", 3.5, 4) in spans and ("sample", 7, 9) in spans
    assert [s for s in spans if s[0] == "waiting"] == [("waiting", 4.5, 5)]
    watched = [(t / 4, [min(1.0, t / 20), 0.5], [10.0, 11.0]) for t in range(36)]
    timeline.draw(spans, watched, tmp_path / "t.png", "title")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_the_watch_sees_its_children_and_averages():
    with Watch(interval=0.05) as watch:
        subprocess.run([sys.executable, "-c", "import time; x = bytearray(50_000_000); time.sleep(0.6)"], check=True)
    assert max(s[2][0] for s in watch.samples) > 0.04
    watch.samples = [(1.0, [0.5, 1.0], [3.0, 4.0]), (2.0, [1.0, 1.0], [5.0, 2.0]), (9.0, [0.0, 0.0], [99.0, 99.0])]
    assert watch.between(0.5, 2.5) == {"samples": 2, "busy": [0.75, 1.0], "peak_gib": [5.0, 4.0], "last_gib": [5.0, 2.0]}


def test_the_watch_reads_what_nvidia_smi_prints(tmp_path, monkeypatch):
    """A program of that name which prints as the real one does with these options."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@" > $(dirname "$0")/words\nfor i in 1 2 3 4; do echo "2, 100, 1024"; echo "3, 50, 2048"; sleep 0.05; done\nexec sleep 30\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Watch(["2", "3"], interval=0.05) as watch:
        for _ in range(100):
            if len(watch.samples) >= 3:
                break
            time.sleep(0.05)
    assert [s[1:] for s in watch.samples[:3]] == [([1.0, 0.5], [1.0, 2.0])] * 3
    words = (tmp_path / "words").read_text()
    assert "--id=2,3" in words and "--loop-ms=50" in words and "utilization.gpu" in words


def test_a_run_uses_the_first_of_the_visible_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    args = opd_step.parse(["--models", str(tmp_path), "--topology", "tp2", "--output-dir", str(tmp_path)])
    assert opd_step.used_gpus(args) == ["5", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert opd_step.used_gpus(args) == ["0", "1"]
    args.device = "cpu"
    assert opd_step.used_gpus(args) == []


def step(rollout_id: int, **seconds: float) -> dict:
    return {"rollout_id": rollout_id, "time": 100.0 + 10 * rollout_id, "rollout/samples": 8.0, "train/tokens": 4000.0, "train/rows": 300.0,
            "train/step_seconds": 1.0, "train/peak_memory_gib": 3.0, "train/memory_gib": 2.0 + 0.25 * rollout_id,
            **{f"seconds/{k}": v for k, v in seconds.items()}}  # fmt: skip


def test_the_summary_leaves_out_the_first_step_and_counts_operations(tmp_path):
    random_models.write_model(tmp_path / "tiny", "tiny", 0, context=128, vocabulary=64)
    args = opd_step.parse(["--tiny", "--device", "cpu", "--output-dir", str(tmp_path / "out"), "--skip", "1"])
    args.models = tmp_path
    rows = [step(0, total=90.0, sample=50.0, train=30.0), *(step(i, total=10.0, sample=6.0, score=1.0, select=0.25, split=0.25, train=2.0, sync=0.5) for i in (1, 2, 3))]
    watch = SimpleNamespace(between=lambda a, b: {"samples": 3, "busy": [0.8, 0.6], "peak_gib": [1.0, 1.0], "last_gib": [1.0, 1.0]})
    found = opd_step.summary(args, rows, watch, {"matmul_operations_per_second": 1e12})
    assert found["seconds"]["total"] == 10.0 and found["steps"] == 3
    assert found["idle"] == {"by_phases": pytest.approx(0.05), "by_gpu": pytest.approx(0.3)}
    assert found["select_bank_parse_share"] == pytest.approx(0.05) and found["score_beyond_generation"] == pytest.approx(0.1)
    assert found["memory_drift_gib"] == pytest.approx(0.5)
    trunk = 4 * (256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 640 + 2 * 256)
    attention = 4 * 4 * 256 * (4000 / 8 / 2) * 4000 * (1 + 2.5)
    use = found["utilisation"]
    assert use["operations_useful"] == pytest.approx(6 * trunk * 4000 + attention + 6 * 64 * 256 * 300)
    assert use["useful_of_phase"] == pytest.approx(use["operations_useful"] / 2.0 / 1e12)
    assert use["with_recompute_of_steps"] > use["useful_of_steps"] > use["useful_of_phase"]


def test_stock_is_made_of_flags_that_the_trainer_has(tmp_path):
    from slime.utils.arguments import build_parser

    for topology in opd_step.TOPOLOGIES:
        args = opd_step.parse(["--models", str(tmp_path), "--topology", topology, "--stock", "--output-dir", str(tmp_path / "out")])
        words = opd_step.command(args, args.output_dir, ["--rm-url", "http://x"] if topology == "apart" else ["--teacher-model", "t"])
        flags = build_parser().parse_args(words[2:])
        assert flags.opd_profile == "released" and flags.opd_loss_rows == "all" and flags.score_after_generation and flags.score_whole_sequence
        assert flags.sglang_mem_fraction_static == opd_step.MEMORY[topology][0]
        assert flags.opd_selector_path.endswith("stock_selector.py:entropy") and Path(flags.opd_selector_path.split(":")[0]).is_file()


@pytest.mark.parametrize("words", [["--case", "64x4"], ["--tiny", "--skip", "9"], []], ids=["case", "skip", "no models"])
def test_bad_input_is_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        opd_step.parse([*words, "--output-dir", str(tmp_path)])
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="starts servers for about a minute; set TA_OPD_SLOW=1")
@pytest.mark.parametrize("words", [["--topology", "one"], ["--topology", "one", "--stock"], ["--topology", "apart", "--budget", "1.0"], ["--topology", "tp2"]],
                         ids=["one", "stock", "apart", "tp2"])  # fmt: skip
def test_a_tiny_run_from_end_to_end(words, tmp_path):
    assert opd_step.main(["--tiny", "--device", "cpu", "--output-dir", str(tmp_path), *words]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 3 and result["seconds"]["total"] > result["seconds"]["train"] > 0
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    if "--stock" in words:
        assert result["stock_check"]["kept_by_one_only"] == 0
