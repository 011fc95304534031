"""What the planner's tests share: the recorded run, a task, the tool's JSON."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from slime.planning.models import load_model
from slime.planning.predict import Machine, Task
from slime.planning.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECORDED = RESULTS / "opd_step_one_h200_64x4x1024_r0p10.json"
# The recorded run: 256 responses at once, CUDA graphs up to 256, kept tokens all over every response. The planner's defaults are these.
AS_RECORDED = ["--student", "1.7B", "--teacher", "4B", "--gpus", "1", "--layout", "1,1,1,1", "--max-tokens-per-gpu", "16384"]


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task(rates, gpus=8, student="1.7B", teacher="4B", gpu="H200", **work) -> Task:
    return Task(load_model(student), load_model(teacher), Workload(**work), Machine(rates.gpu(gpu), gpus), rates)


def run_json(tool, capsys, words) -> dict:
    assert tool.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def recorded_seconds() -> dict:
    """Medians of the recorded run by the planner's phases, and its total."""
    seconds = json.loads(RECORDED.read_text())["seconds"]
    return {"generate": seconds.pop("sample"), **seconds}
