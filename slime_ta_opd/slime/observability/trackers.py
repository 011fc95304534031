"""Where numbers go: metrics.jsonl always, TensorBoard by default, wandb when asked."""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from slime.utils import config_file
from ta_opd.errors import ConfigError


class Trackers:
    """log() appends one line and forwards the numbers. Lines of rollouts that are run again are cut at `start`."""

    def __init__(self, args, start: int = 0):
        self.dir = Path(args.output_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.metrics_file = _resume(self.dir / "metrics.jsonl", start)
        self.eval_file = _resume(self.dir / "eval.jsonl", start, anew=start == 0)  # then also the evaluation before the first rollout
        self.board = self.wandb = None
        if args.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.tensorboard_dir or str(self.dir / "tensorboard"), purge_step=start or None)
        if args.use_wandb:
            self.wandb = _start_wandb(args, self.dir)

    def log(self, rollout_id: int, metrics: dict[str, float]) -> None:
        clean = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        _append(self.metrics_file, {"rollout_id": rollout_id, "step": rollout_id, "time": time.time(), **clean})
        self._forward(rollout_id, metrics)

    def log_eval(self, rollout_id: int, results: dict[str, dict[str, Any]]) -> None:
        """One line a data set; `per_prompt` lists go to the file only."""
        for dataset, result in results.items():
            _append(self.eval_file, {"rollout_id": rollout_id, "dataset": dataset, **result})
            numbers = {f"eval/{dataset}/{k}": float(v) for k, v in result.items() if isinstance(v, (int, float))}
            self._forward(max(rollout_id, 0), numbers)

    def recorded_eval(self, rollout_id: int, datasets: Iterable[str]) -> dict[str, dict[str, Any]] | None:
        """The results after `rollout_id` that an earlier part of this run wrote for all `datasets`; where one is missing the others go, and None."""
        rows = [orjson.loads(line) for line in self.eval_file.read_bytes().splitlines()] if self.eval_file.exists() else []
        wanted = set(datasets)
        found = {row["dataset"]: row for row in rows if row["rollout_id"] == rollout_id and row["dataset"] in wanted}
        if found.keys() == wanted:
            return {name: {k: v for k, v in row.items() if k not in ("rollout_id", "dataset")} for name, row in found.items()}
        if found:
            _replace(self.eval_file, [row for row in rows if row["rollout_id"] != rollout_id or row["dataset"] not in wanted])
        return None

    def _forward(self, step: int, numbers: dict[str, float]) -> None:
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("ab") as f:
        f.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def _resume(path: Path, start: int, anew: bool = False) -> Path:
    """Drops lines of rollouts from `start` on (they are run again), all of them if `anew`, and a line cut off by a crash."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines():
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if row["rollout_id"] < start and not anew:
                kept.append(row)
        _replace(path, kept)
    return path


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """The file with exactly these rows, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    partial.replace(path)


def check_wandb() -> None:
    """ConfigError unless wandb is installed and has a place to log to; called before anything starts."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("--use-wandb: the package wandb is not installed; pip install wandb, or drop the flag")
    if os.environ.get("WANDB_MODE", "online") != "online" or {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & set(os.environ):
        return
    try:
        logins = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        logins = {}
    if urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname not in logins:
        raise ConfigError("--use-wandb: expected WANDB_API_KEY or a `wandb login`, got none; WANDB_MODE=offline logs to the run directory")


def _start_wandb(args, directory: Path):
    """A run that goes on under the same id when this directory is resumed."""
    import wandb

    file = directory / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return wandb.init(project=args.wandb_project, group=args.wandb_group, name=args.run_name, dir=str(directory), id=file.read_text(),
                      resume="allow", config=config_file.resolved(args))  # fmt: skip
