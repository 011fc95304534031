"""What the quick start runs: methods times seeds, each one call of train.py with its own flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ta_opd.errors import ConfigError
from ta_opd.suite.methods import Entry, Seeds, budget_tag, parse_entries, parse_seeds

STACK = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("config.yaml")
METHODS = "pure_opd:1.0 teachability:0.10 entropy:0.10 random:0.10"


@dataclass(frozen=True)
class Planned:
    """One training run: its name, directory, and the flags that are its own."""

    name: str
    entry: Entry
    seeds: Seeds
    directory: Path
    flags: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the directory holds a run of these very flags that came to its end."""
        return (self.directory / "DONE").is_file() and _read(self.stamp) == self.identity

    @property
    def stamp(self) -> Path:
        return self.directory / "quickstart.json"

    @property
    def identity(self) -> dict:
        return {"flags": list(self.flags), "config": CONFIG.read_text()}

    def remember(self) -> None:
        """Writes what `finished` compares with."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(json.dumps(self.identity, indent=1) + "\n")


def plan(
    home: Path, *, methods: str, seeds: str, steps: int, student: Path, train_file: Path, heldout_file: Path, extra: Sequence[str] = ()
) -> list[Planned]:
    """Runs in the order of `methods`, all methods of one seed together, equal seeds and rollouts.

    `extra`: further train.py flags of every run. Raises ConfigError for an unknown method, a ratio outside (0, 1] or no rollout.
    """
    if steps < 1:
        raise ConfigError(f"--steps: expected at least 1 rollout, got {steps}")
    runs = []
    for seed in parse_seeds(seeds):
        for entry in parse_entries(methods, "--methods"):
            name = f"{entry.mask}_{budget_tag(entry.ratio)}_{seed.label}"
            directory = home / "runs" / name
            flags = (
                "--run-name", name, "--output-dir", str(directory), "--num-rollout", str(steps), "--hf-checkpoint", str(student),
                "--prompt-data", str(train_file), "--eval-prompt-data", "heldout", str(heldout_file), "--save-hf", str(directory / "hf"),
                "--opd-budget-mask", entry.mask, "--opd-budget-ratio", f"{entry.ratio:g}", "--opd-token-bank-dir", str(directory / "token_bank"),
                "--save-debug-rollout-data", str(directory / "rollouts"), "--seed", str(seed.train), "--rollout-seed", str(seed.rollout),
                "--opd-budget-mask-seed", str(seed.mask), *extra,
            )  # fmt: skip
            runs.append(Planned(name, entry, seed, directory, flags))
    return runs


def command(run: Planned, student_url: str, teacher_url: str) -> list[str]:
    """The train.py call of `run` with running servers."""
    return [
        sys.executable, str(STACK / "train.py"), "--config", str(CONFIG), *run.flags,
        "--rollout-external-engine-addrs", student_url, "--rm-url", f"{teacher_url}/generate",
    ]  # fmt: skip


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
