"""RolloutManager: the actor that owns engines, teachers and prompts, and turns them into train batches.

generate(rollout_id): sample and score -> select -> token bank (written by a thread) -> split over data-parallel ranks.
Per-token data never pass through the driver: it gets object references, one a rank.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from slime.backends.sglang_utils.client import StaleWeights
from slime.observability.metrics import rollout_metrics, staleness
from slime.observability.timer import Timer
from slime.ray.calls import get
from slime.ray.cluster import enter_directory
from slime.ray.placement import Placement
from slime.utils import fields, memory
from slime.utils.dp_schedule import split_for_data_parallel
from slime.utils.types import Sample
from ta_opd.errors import ServiceError
from ta_opd.topk import TopK

RESTARTS = 3  # times that one rollout may lose its engines
STOP_SECONDS, BUSY_STOP_SECONDS = 30.0, 3.0
HEAL_PATIENCE = 10.0  # seconds in which an engine that failed a request is found dead


@dataclass
class Batch:
    """What the driver holds of one rollout: shards[r] is a one-item list with the reference of data-parallel rank r."""

    rollout_id: int
    shards: list[list[ray.ObjectRef]]
    metrics: dict[str, float]
    seconds: dict[str, float]
    spans: list[dict] = field(default_factory=list)


def create_rollout_manager(args, placement: Placement) -> RolloutGroup:
    """Starts the manager, which begins to start the servers at once."""
    return RolloutGroup(args, placement)


class RolloutGroup:
    """The driver's handle on the manager."""

    def __init__(self, args, placement: Placement):
        self.args = args
        self.actor = RolloutManager.options(**placement.options(0, env=memory.one_arena(), gpus=[])).remote(args, placement)
        # beside the trainer's start, but not on its GPUs: there it has to take its memory first
        self._ready = None if args.colocate and args.device == "cuda" else self.actor.start.remote()
        self._long = self._ready  # the last call that may take long; the manager does one thing after another
        self.resync: Callable[[], None] = lambda: None  # sends the current weights; set by the run once there is a trainer

    def wait_ready(self) -> None:
        self._long = self._ready or self.actor.start.remote()
        for line in get([self._long])[0]:
            print(line)
        self._long = None

    def engines(self) -> dict:
        return get([self.actor.engines.remote()])[0]

    def set_version(self, version: int) -> None:
        get([self.actor.set_version.remote(version)])

    def generate(self, rollout_id: int) -> Batch:
        return self.begin(rollout_id)()

    def begin(self, rollout_id: int) -> Callable[[], Batch]:
        """Starts a rollout; the returned function waits for it. Other calls to the manager wait until it is done."""
        started = self._long = self.actor.generate.remote(rollout_id)
        return lambda: self._with_engines("generate", rollout_id, started)

    def select(self, batch: Batch, exact: list[list[ray.ObjectRef]]) -> Batch:
        """The same rollout, selected by the full-vocabulary values that the trainer's teacher gave (one box a rank)."""
        selected = get([self.actor.select_exact.remote(batch.rollout_id, exact)])[0]
        selected.seconds = {**batch.seconds, **selected.seconds, "rollout": batch.seconds["rollout"] + selected.seconds["rollout"]}
        selected.spans = batch.spans + selected.spans
        return selected

    def evaluate(self, rollout_id: int) -> dict[str, dict[str, Any]]:
        return self._with_engines("evaluate", rollout_id)

    def _with_engines(self, method: str, rollout_id: int, started: ray.ObjectRef | None = None) -> Any:
        """Calls the manager; after a restarted engine the weights are sent again (`resync`) and the call starts over.

        started: the first call, where it was made before.
        """
        for _ in range(1 + RESTARTS):
            try:
                self._long = started or getattr(self.actor, method).remote(rollout_id)
                found, self._long = get([self._long])[0], None
                return found
            except StaleWeights as problem:
                last, started = problem, None
                print(f"rollout {rollout_id}: {problem}; sending the weights and starting over")
                self.resync()
        raise ServiceError(f"rollout {rollout_id}: engines were lost {1 + RESTARTS} times; last problem: {last}")

    def state(self, rollout_id: int) -> dict[str, Any]:
        """What a run needs to go on after `rollout_id`, the last rollout or the one before."""
        return get([self.actor.state.remote(rollout_id)])[0]

    def load_state(self, state: dict[str, Any]) -> None:
        get([self.actor.load_state.remote(state)])

    def heal(self) -> list[str]:
        """Starts engines again that died a moment ago; their names. They need the weights then."""
        return get([self.actor.heal.remote()])[0]

    def stop(self) -> None:
        """Ends the servers in order; at once where the manager is in the middle of something, since they end with it, too."""
        busy = self._long is not None and not ray.wait([self._long], timeout=0, fetch_local=False)[0]
        try:
            ray.get(self.actor.stop.remote(), timeout=BUSY_STOP_SECONDS if busy else STOP_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # it died, or is about to: its servers end with it
        finally:
            ray.kill(self.actor)


@ray.remote
class RolloutManager:
    def __init__(self, args, placement: Placement):
        from slime.ray.servers import Servers
        from slime.rollout.data_source import PromptDataSource
        from slime.rollout.eval_sets import args_of
        from slime.utils.misc import load_tokenizer

        enter_directory()
        self.args = args
        self.timer = Timer("rollout", keep_spans=args.trace)
        self.tokenizer = load_tokenizer(args.hf_checkpoint, args.trust_remote_code)
        self.source = PromptDataSource(args, self.tokenizer)
        self.evaluation = {name: PromptDataSource(args_of(args, name), self.tokenizer, path=file, evaluation=True)
                           for name, file in args.eval_datasets.items()}  # fmt: skip
        self.servers = Servers(args, placement)
        self.samples: list[Sample] = []  # of the last rollout
        # the data source after the last two rollouts: a checkpoint is written when the next one may be sampled already
        self.states: deque[tuple[int, dict[str, Any]]] = deque(maxlen=2)

    def start(self) -> list[str]:
        """Starts every server side by side, waits, probes; returns the lines to show."""
        return self.servers.start()

    def engines(self) -> dict:
        return self.servers.engine_info()

    def set_version(self, version: int) -> None:
        self.servers.set_version(version)

    def generate(self, rollout_id: int) -> Batch:
        from slime.rollout.sglang_rollout import generate_rollout

        begin = time.time()
        with self._engines_kept(), self.timer.phase("generate"):
            # on an error what was sampled so far goes back to the data source: nothing is lost or doubled
            groups = generate_rollout(self.args, rollout_id, self.source, self.servers.clients)
        self.samples = [s for group in groups for s in group]
        self.states.append((rollout_id, self.source.state_dict()))
        try:
            selection = None if self.args.exact_selection else self._select(rollout_id)
        finally:
            self._dump(rollout_id)
        return self._batch(rollout_id, selection, begin)

    def select_exact(self, rollout_id: int, exact: list[list[ray.ObjectRef]]) -> Batch:
        """Selection of the last rollout by full-vocabulary values: exact[r] boxes what data-parallel rank r found."""
        begin = time.time()
        by_index: dict[int, dict] = {}
        for (box,) in exact:
            found = ray.get(box)
            for i, index in enumerate(found["sample_indices"]):
                by_index[index] = {k: v[i] for k, v in found.items()}
        rows = [by_index[s.index] for s in self.samples]
        for sample, row in zip(self.samples, rows, strict=True):
            sample.teacher_log_probs = row["teacher_log_probs"]
            sample.student_topk = TopK(row["student_topk_ids"], row["student_topk_logprobs"])
            sample.teacher_topk = TopK(row["teacher_topk_ids"], row["teacher_topk_logprobs"])
            sample.teacher_at_student_ids = row["teacher_at_student_ids"]
        values = {name: [row[name] for row in rows] for name in ("H", "KLf", "KLr", "C")}
        selection = self._select(rollout_id, values)
        self._dump(rollout_id)
        return self._batch(rollout_id, selection, begin)

    def _dump(self, rollout_id: int) -> None:
        """--save-debug-rollout-data, with the weights that the selection gave (again, where the trainer's teacher came first)."""
        if self.args.save_debug_rollout_data:
            from slime.rollout.dump import dump_rollout

            dump_rollout(self.args.save_debug_rollout_data, rollout_id, self.samples)

    def _batch(self, rollout_id: int, selection: dict[str, Any] | None, begin: float) -> Batch:
        """The manager's samples as train data, one shard a data-parallel rank."""
        with self.timer.phase("split"):
            metrics = rollout_metrics(self.samples, selection)
            if not self.args.debug_rollout_only:  # there the weights stay what they are
                metrics |= staleness(self.samples)
            data = fields.collect(self.samples, self._needed_fields())
            shards = split_for_data_parallel(data, self.args.data_parallel_size, self.args.global_batch_size)
            refs = [[ray.put({**shard, "rollout_id": rollout_id})] for shard in shards]
            if selection is not None or not self.args.exact_selection:
                self.samples = []  # the shards hold what training needs; else the trainer's teacher comes first
        seconds = {**self.timer.take(), **self.servers.clients.take_seconds(), "rollout": time.time() - begin}
        return Batch(rollout_id, refs, metrics, seconds, self.timer.take_spans())

    @contextlib.contextmanager
    def _engines_kept(self) -> Iterator[None]:
        """For requests to the student: dead engines are started again, before them and after a failure.

        StaleWeights then: they need the weights, and the call has to be made again.
        """
        self._restarted()
        try:
            with self.servers.serving():
                yield
        except StaleWeights:
            raise
        except ServiceError as problem:
            self._restarted(problem)
            raise

    def _restarted(self, problem: Exception | None = None) -> None:
        names = self.servers.heal()
        if names:
            raise StaleWeights(f"restarted {', '.join(names)}") from problem

    def heal(self) -> list[str]:
        return self.servers.heal(patience=HEAL_PATIENCE)

    def _select(self, rollout_id: int, exact: dict[str, list] | None = None) -> dict[str, Any] | None:
        if exact is None and (self.args.opd_type == "megatron" or self.args.opd_topk_metrics_k == 0):
            return None
        from slime.rollout import tip_compat

        with self.timer.phase("select"):
            return tip_compat.select_for_samples(self.args, self.samples, rollout_id, exact)

    def _needed_fields(self) -> list[str]:
        from slime.backends.megatron_utils.losses.registry import get_loss

        return fields.for_rows(get_loss(self.args.opd_loss_type).needs_for(self.args))

    def evaluate(self, rollout_id: int) -> dict[str, dict[str, Any]]:
        """Accuracy of the current student on every evaluation set; no teacher, no top-k."""
        from slime.rollout.evaluate import evaluate

        with self._engines_kept():
            return {name: evaluate(data.args, rollout_id, self.servers.clients, data) for name, data in self.evaluation.items()}

    def state(self, rollout_id: int) -> dict[str, Any]:
        if self.args.opd_token_bank_dir:
            from slime.rollout import tip_compat

            tip_compat.flush_token_banks()
        return {"data_source": dict(self.states)[rollout_id]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["data_source"])

    def stop(self) -> None:
        try:
            if self.args.opd_token_bank_dir:
                from slime.rollout import tip_compat

                tip_compat.close_token_banks()
        finally:
            self.servers.stop()

