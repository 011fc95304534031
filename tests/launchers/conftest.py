"""Launchers are run as users run them, in a clean environment, on model directories that hold the real shapes' config.json."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]

SHAPES = {  # name: (layers, hidden, ffn, heads, groups, vocabulary, tied)
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 151936, True),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False),
    "Qwen3-14B": (40, 5120, 17408, 40, 8, 151936, False),
    "Qwen2.5-3B": (36, 2048, 11008, 16, 2, 151936, True),
    "DeepSeek-R1-Distill-Qwen-14B": (48, 5120, 13824, 40, 8, 152064, False),
}
PAIRS = {
    "4b_to_1p7b": ("Qwen3-4B", "Qwen3-1.7B"),
    "8b_to_4b": ("Qwen3-8B", "Qwen3-4B"),
    "14b_to_4b": ("Qwen3-14B", "Qwen3-4B"),
    "r1_14b_to_3b": ("DeepSeek-R1-Distill-Qwen-14B", "Qwen2.5-3B"),
}


def write_shape(directory: Path, name: str) -> Path:
    layers, hidden, ffn, heads, groups, vocabulary, tied = SHAPES[name]
    config = {
        "model_type": "qwen3" if "Qwen3" in name else "qwen2", "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "rope_theta": 1000000, "tie_word_embeddings": tied, "max_position_embeddings": 40960,
    }  # fmt: skip
    if "Qwen3" in name:
        config["head_dim"] = 128
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Model directories, a prompt file, and an output root."""
    root = tmp_path_factory.mktemp("place")
    for name in SHAPES:
        write_shape(root / "models" / name, name)
    (root / "train.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?", "label": str(2 * i)}) + "\n" for i in range(900)))
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("4")
    return root


@pytest.fixture(scope="session")
def launch(place):
    """launch(script, NAME=value, ...) -> finished process with .out: standard output with this machine's paths taken out."""

    def run(script, *words, check=False, **variables):
        environment = {"PATH": os.environ["PATH"], "HOME": str(place), "TIMESTAMP": "20260101_000000", "OUTPUT_ROOT": str(place / "out"), **variables}
        done = subprocess.run(["bash", str(ROOT / script), *words], env=environment, capture_output=True, text=True, timeout=300)
        if check:
            assert done.returncode == 0, done.stderr + done.stdout[-2000:]
        return SimpleNamespace(code=done.returncode, out=neutral(done.stdout, place), err=neutral(done.stderr, place))

    return run


def neutral(text: str, place: Path) -> str:
    for path, word in ((str(ROOT / ".venv/bin/python"), "PYTHON"), (str(place), "PLACE"), (str(ROOT), "ROOT")):
        text = text.replace(path, word)
    return text


@pytest.fixture(scope="session")
def pair_variables(place):
    """Variables of one of PAIRS on GPUs, with a prompt file."""

    def variables(pair):
        teacher, student = PAIRS[pair]
        return {"TEACHER_MODEL": str(place / "models" / teacher), "STUDENT_HF": str(place / "models" / student),
                "PROMPT_DATA": str(place / "train.jsonl"), "DEVICE": "gpu"}  # fmt: skip

    return variables


def scripts() -> list[str]:
    """Every launcher of the project, relative to its root; libraries and model shapes are not launchers."""
    found = [
        *ROOT.glob("scripts/*/*.sh"), *ROOT.glob("slime_ta_opd/*.sh"), *ROOT.glob("slime_ta_opd/examples/on_policy_distillation/*.sh"),
        *ROOT.glob("examples/*/*.sh"),
    ]  # fmt: skip
    return sorted(str(p.relative_to(ROOT)) for p in found if p.parent.name not in ("lib", "models"))


def libraries() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in ("lib", "models") for p in ROOT.glob(f"scripts/{folder}/*.sh"))
