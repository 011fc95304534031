"""The stages of a step over one running stack: what train.py and train_async.py put in an order."""

from __future__ import annotations

from collections.abc import Callable

from slime.observability.console import tell_start
from slime.ray.actor_group import create_actor_group
from slime.ray.placement import create_placement
from slime.ray.rollout import Batch, create_rollout_manager
from slime.utils.run import Run


class Steps:
    """Engines, teachers and Megatron ranks of a run, started and probed, with the first weights in every engine.

    start: the first rollout id (after the loaded checkpoint). Raises what the services and the trainer raise.
    """

    def __init__(self, args, run: Run):
        self.args, self.run = args, run
        placement = run.owns(create_placement(args))
        tell_start(args, placement.layout)
        self.rollout = run.owns(create_rollout_manager(args, placement))  # student engines and teacher servers, starting
        self.actors = run.owns(create_actor_group(args, placement))  # Megatron ranks, starting at the same time
        self.start = run.resume(self.actors.init(), self.rollout)
        self.rollout.wait_ready()  # servers up, probe passed
        with run.phase("sync"):
            self.actors.update_weights(self.rollout, version=self.start)
        run.evaluate_at_start(self.rollout, self.start - 1)

    def generate(self, rollout_id: int) -> Batch:
        """One rollout: sampled, scored, selected, split over data-parallel ranks."""
        return self._selected(self.rollout.generate(rollout_id))

    def generate_ahead(self, rollout_id: int) -> Callable[[], Batch] | None:
        """Starts a rollout with the weights that the engines have now; call the result to wait for it. None past the last.

        The engines must keep their weights until then; `sync` waits for them if it is called too early.
        """
        if rollout_id >= self.args.num_rollout:
            return None
        finish = self.rollout.begin(rollout_id)

        def wait() -> Batch:
            with self.run.phase("wait"):
                batch = finish()
            return self._selected(batch)

        return wait

    def _selected(self, batch: Batch) -> Batch:
        if not self.args.exact_selection:
            return batch
        with self.run.phase("score"):  # the teacher is on the trainer's ranks: exact H, D and C come from there
            exact = self.actors.exact_metrics(batch)
        return self.rollout.select(batch, exact)

    def train(self, rollout_id: int, batch: Batch) -> None:
        """The optimizer steps of one rollout on its kept rows; their numbers join the batch's metrics."""
        if self.args.debug_rollout_only:
            return
        with self.run.phase("train"):
            batch.metrics |= self.actors.train(rollout_id, batch)

    def sync(self, version: int) -> None:
        """The student's weights into every engine; each then reports `version`, the number of rollouts trained."""
        if self.args.debug_rollout_only:
            return
        with self.run.phase("sync"):
            self.actors.update_weights(self.rollout, version=version)

    def conclude(self, rollout_id: int, batch: Batch) -> None:
        """Evaluation, one line of metrics and a checkpoint, where they are due."""
        if self.run.eval_due(rollout_id):
            self.run.evaluate(self.rollout, rollout_id)
        self.run.log(rollout_id, batch)
        if self.run.save_due(rollout_id):  # after the log: a resumed run has no hole in its metrics
            with self.run.phase("save"):
                self.actors.save(rollout_id, extra=self.run.state(self.rollout, rollout_id))

    def finish(self) -> None:
        """The trained student as an HF directory, where it is asked for and every rollout was run."""
        if self.run.finished and self.args.save_hf and not self.args.debug_rollout_only:
            self.actors.save_hf(self.args.save_hf)
