"""One run: its directory, progress, trackers, schedule of saves and evaluations, and the end of its processes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import ray

from slime.observability.console import RolloutProgress, say, tell_end, tell_resume
from slime.observability.timer import Timer, write_trace
from slime.observability.trackers import Trackers
from slime.utils import config_file
from slime.utils.reaper import Reaper
from slime.utils.stop import StopRequest, Terminated
from ta_opd.errors import ConfigError


class Run:
    """Context of a run. Leaving it, in whatever way, stops what `owns` was given, last first, then its Ray."""

    def __init__(self, args):
        self.args = args
        self.dir = Path(args.output_dir)
        self.timer = Timer("driver", keep_spans=True)
        self.spans: list[dict] = []
        self.owned: list[Any] = []
        self.trackers: Trackers | None = None
        self.final_eval: dict[str, Any] = {}
        self.start = 0
        self.last = self.saved = self.saving = -1  # the rollouts that were finished, saved, and begun to be saved last
        self.progress: RolloutProgress | None = None
        self.stop = StopRequest(can_save=bool(args.save) and not args.debug_rollout_only)

    def __enter__(self) -> Run:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / "DONE").unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--output-dir {self.dir}: expected a directory that can be written, got {error}; give another one") from error
        config_file.dump(self.args, self.dir / "config.yaml")
        self.began = time.time()
        self.had_ray = ray.is_initialized()
        self.stop.install()
        self.reaper = Reaper()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop.ignore()
        if self.progress is not None:
            self.progress.close()
        ends = [thing.stop for thing in reversed(self.owned) if hasattr(thing, "stop")]
        for end in [self.trackers.close, *ends] if self.trackers is not None else ends:
            try:
                end()
            except Exception as problem:  # one stuck process (or a full disk) must not keep the others alive
                print(f"while stopping {type(end.__self__).__name__}: {problem}", file=sys.stderr)
        if not self.had_ray:
            ray.shutdown()
        self.reaper.stop()
        self.stop.restore()
        if kind is None:  # after an error Ray's logs are worth keeping
            for session in filter(None, (getattr(thing, "session", None) for thing in self.owned)):
                shutil.rmtree(session, ignore_errors=True)
        if self.args.trace and self.spans:
            write_trace(self.spans, self.dir / "trace.json")
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.stop.aborted:
            raise Terminated(*self._aborted()) from None
        if kind is None and not self.finished:
            raise Terminated(f"stopped after rollout {self.last} as asked; {self.args.save} holds it: --load goes on from there", lost=False)
        if kind is None:
            done = {"run_name": self.args.run_name, "num_rollout": self.args.num_rollout, "start_rollout_id": self.start, "final": self.final_eval,
                    "seconds": round(time.time() - self.began, 3)}  # fmt: skip
            _write(self.dir / "DONE", orjson.dumps(done, option=orjson.OPT_INDENT_2))
            tell_end(self.args, self.dir, self.args.num_rollout - self.start, done["seconds"])

    def owns(self, thing: Any) -> Any:
        self.owned.append(thing)
        return thing

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.timer.phase(name):
            yield

    def resume(self, loaded: tuple[int, dict | None], rollout) -> int:
        """First rollout id; gives the data source back its place where a checkpoint was loaded."""
        start, extra = loaded
        self.start = start
        tell_resume(self.args, start)
        if extra and extra.get("rollout"):
            rollout.load_state(extra["rollout"])
        self.trackers = Trackers(self.args, start)
        return start

    def state(self, rollout, rollout_id: int) -> dict[str, Any]:
        """What the checkpoint of `rollout_id` keeps beside weights and optimizer."""
        return {"rollout": rollout.state(rollout_id), "config": config_file.resolved(self.args)}

    def rollouts(self, start: int) -> Iterator[int]:
        self.progress = RolloutProgress(self.args.run_name, start, self.args.num_rollout)
        self.last = self.saved = self.saving = start - 1
        self.stop.stage = "rollouts"
        for rollout_id in self.progress:
            if self.stop.asked and self.saved == self.last:  # else it was asked for too late for the save of that rollout
                break
            self.step_began = time.time()
            yield rollout_id
            self.last = rollout_id
            self.saved = max(self.saved, self.saving)
        self.stop.stage = "ending"

    def _aborted(self) -> tuple[str, bool]:
        """(message, whether work was lost) of a run that SIGTERM cut off."""
        if self.stop.stage == "starting" or self.last < self.start:
            return "SIGTERM before the first rollout was trained: every process of this run has been stopped, nothing was lost", False
        kept = f"{self.args.save} holds rollout {self.saved}" if self.saved >= self.start else "no checkpoint holds what was trained"
        return f"SIGTERM: every process of this run has been stopped; {kept}, the last one trained was {self.last}", self.saved < self.last

    @property
    def finished(self) -> bool:
        """Whether every rollout was run: false where SIGTERM asked for less."""
        return not self.stop.asked or self.last >= self.args.num_rollout - 1

    def save_due(self, rollout_id: int) -> bool:
        """Whether to save now; says yes for the rollout that SIGTERM asked to end with."""
        every, last = self.args.save_interval, rollout_id == self.args.num_rollout - 1
        due = bool(every) and ((rollout_id + 1) % every == 0 or last)
        due = (due or self.stop.asked) and bool(self.args.save) and not self.args.debug_rollout_only
        if due:
            self.saving = rollout_id
        return due

    def eval_due(self, rollout_id: int) -> bool:
        every = self.args.eval_interval
        if not every:
            return False
        if rollout_id < 0:
            return not self.args.skip_eval_before_train
        return (rollout_id + 1) % every == 0 or rollout_id == self.args.num_rollout - 1

    def evaluate(self, rollout, rollout_id: int) -> None:
        with self.phase("eval"):
            results = rollout.evaluate(rollout_id)
        self.trackers.log_eval(rollout_id, results)
        self._remember(rollout_id, results)

    def evaluate_at_start(self, rollout, rollout_id: int) -> None:
        """Where it is due before the first rollout of this call; a resumed run keeps what it wrote before its checkpoint."""
        if not self.eval_due(rollout_id):
            return
        results = self.trackers.recorded_eval(rollout_id, self.args.eval_datasets)
        if results is None:
            self.evaluate(rollout, rollout_id)
        else:
            self._remember(rollout_id, results)

    def _remember(self, rollout_id: int, results: dict[str, dict[str, Any]]) -> None:
        self.final_eval = {name: {k: v for k, v in r.items() if isinstance(v, (int, float))} for name, r in results.items()}
        when = f"after {rollout_id + 1} rollouts" if rollout_id >= 0 else "before training"
        for name, r in results.items():
            say(f"evaluation {when}: {name} accuracy {r['accuracy']:.3f} ({r['num_prompts']} prompts)")

    def log(self, rollout_id: int, batch) -> None:
        """Joins the phases of driver and manager, writes one line and tells how far the run is."""
        seconds = {**batch.seconds, **self.timer.take(), "total": time.time() - self.step_began}
        metrics = batch.metrics | {f"seconds/{k}": v for k, v in seconds.items()}
        tokens = metrics.get("rollout/valid_tokens", 0.0)
        for phase in ("generate", "train", "total"):
            if seconds.get(phase):
                metrics[f"tokens_per_second/{phase}"] = tokens / seconds[phase]
        self.spans += self.timer.take_spans() + batch.spans if self.args.trace else []
        self.trackers.log(rollout_id, metrics)
        self.progress.step(rollout_id, metrics, seconds)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
