"""One rollout: the student samples n responses a prompt, and each is scored by its teacher the moment it is finished."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from slime.backends.sglang_utils import loop
from slime.rollout.measuring import Measuring
from slime.rollout.on_policy_distillation import score_sample
from slime.rollout.progress import Progress
from slime.rollout.sampling import call_custom, restart, sample_response, sampling_params, without_tokens
from slime.utils import memory
from slime.utils.misc import load_function, load_tokenizer
from slime.utils.types import Sample
from ta_opd.errors import DataError, ServiceError, TaOpdError

logger = logging.getLogger(__name__)
_FILTER_PATIENCE = 50
_GIVE_BACK_SECONDS, _ABORT_AGAIN_SECONDS = 30.0, 1.0


def generate_rollout(args: Any, rollout_id: int, data_source: Any, clients: Any, evaluation: bool = False) -> list[list[Sample]]:
    """Groups of finished samples, in the order of their prompts.

    Training: args.rollout_batch_size groups, with top-K and teacher scores as arrays. `evaluation`: every prompt of the source
    once, with the evaluation's sampling parameters, no teacher and no top-k. On an error everything taken from the source is
    given back to it, finished samples as they are, so that a second call goes on where this one ended.
    """
    run = _Rollout(args, rollout_id, data_source, clients, evaluation)
    with memory.returned_after():
        return loop.run(run.evaluate() if evaluation else run.train())


class _Rollout:
    def __init__(self, args, rollout_id, source, clients, evaluation):
        self.args, self.rollout_id, self.source, self.clients, self.evaluation = args, rollout_id, source, clients, evaluation
        self.params = sampling_params(args, evaluation)
        in_trainer = getattr(args, "exact_selection", False)  # both models' top-K come from the trainer then
        self.top_k = 0 if evaluation or in_trainer else args.opd_topk_metrics_k
        self.max_response_len = source.max_response_len
        path = getattr(args, "custom_generate_function_path", None)
        self.custom = load_function(path, "--custom-generate-function-path") if path else None
        self.scoring = not evaluation and getattr(args, "opd_type", "sglang") == "sglang" and bool(clients.teachers)
        self.score_last = getattr(args, "score_after_generation", False)
        self.tokenizer = load_tokenizer(args.hf_checkpoint, getattr(args, "trust_remote_code", False))
        self.stop_now = False
        self.sampled_at = self.scored_at = self.begin = time.monotonic()
        self.score_seconds = 0.0

    async def evaluate(self) -> list[list[Sample]]:
        groups = self.source.all_samples()
        with Progress(f"evaluation {self.rollout_id}", sum(map(len, groups))) as self.progress:
            await _gather([self._group(group) for group in groups])
        return groups

    async def train(self) -> list[list[Sample]]:
        args, wanted = self.args, self.args.rollout_batch_size
        ahead = max(wanted, getattr(args, "over_sampling_batch_size", None) or wanted)
        path = getattr(args, "dynamic_sampling_filter_path", None)
        keep = load_function(path, "--dynamic-sampling-filter-path") if path else None
        kept: list[list[Sample]] = []
        pending: dict[asyncio.Task, list[Sample]] = {}
        refused = 0
        with Measuring(args) as self.measuring, Progress(f"rollout {self.rollout_id}", wanted * args.n_samples_per_prompt) as self.progress:
            try:
                while len(kept) < wanted:
                    missing = ahead - len(kept) - len(pending)
                    if missing > 0:
                        for group in self.source.get_samples(missing):
                            pending[asyncio.create_task(self._group(group))] = group
                    done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        await task  # raises what the group raised; the group is still in `pending` then, as where the filter fails
                        accepted = keep is None or _accepts(keep, args, pending[task])
                        group = pending.pop(task)
                        if accepted:
                            kept.append(group)
                            continue
                        refused += 1
                        if refused > _FILTER_PATIENCE * wanted:
                            raise DataError(
                                f"--dynamic-sampling-filter-path {path} refused {refused} groups in rollout {self.rollout_id} and "
                                f"accepted {len(kept)} of {wanted}; loosen it or give it easier prompts"
                            )
                ahead_of_time = list(pending.values())
                await self._give_back(pending, restart_unfinished=not getattr(args, "partial_rollout", False))
                pending.clear()
                await _gather([self._score(sample) for group in kept for sample in group])
                await self.measuring.finish()
                for sample in (s for group in ahead_of_time for s in group):
                    sample.token_metrics = None  # those of a rollout are computed for it
            except BaseException:
                await self._cancel(pending)
                self._return_groups(kept + list(pending.values()), restart_unfinished=True)
                raise
        kept.sort(key=lambda group: group[0].group_index)
        self._return_groups(kept[wanted:], restart_unfinished=False)
        self._note_seconds()
        return kept[:wanted]

    async def _group(self, group: list[Sample]) -> None:
        await _gather([self._one(sample) for sample in group])

    async def _one(self, sample: Sample) -> None:
        sample.rollout_id = self.rollout_id
        if sample.status is Sample.Status.ABORTED and sample.response_length:
            self._mark_stale(sample)
        if sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED):
            await self._sample(sample)
        self.sampled_at = max(self.sampled_at, time.monotonic())
        if sample.status is Sample.Status.ABORTED:
            return
        if not sample.response_length:
            without_tokens(sample, self.top_k, log_probs=not self.evaluation)
        scoring = [] if self.score_last else [self._score(sample)]
        await asyncio.gather(*scoring, self._decode(sample))  # the teacher is asked first: it need not wait for the text
        self.progress.update()

    async def _decode(self, sample: Sample) -> None:
        sample.response = self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)

    async def _score(self, sample: Sample) -> None:
        if not self.scoring or sample.teacher_log_probs is not None:
            return
        began = time.monotonic()
        await score_sample(self.args, sample, self.clients.teacher_of(sample.metadata))
        self.scored_at = time.monotonic()
        self.score_seconds += self.scored_at - began
        self.measuring.add(sample)

    async def _sample(self, sample: Sample) -> None:
        client = self.clients.student
        if self.custom is not None:
            params = {**self.params, "max_new_tokens": self.max_response_len}
            await call_custom(self.custom, self.args, sample, params, client, self.evaluation)
            return
        await sample_response(
            self.args, sample, client, self.params, top_k=self.top_k, max_response_len=self.max_response_len,
            evaluation=self.evaluation, stopping=lambda: self.stop_now,
        )  # fmt: skip

    def _mark_stale(self, sample: Sample) -> None:
        """Tokens sampled in an earlier rollout come from former weights; --mask-offpolicy-in-partial-rollout unlearns them."""
        sample.metadata["stale_tokens"] = sample.response_length
        if getattr(self.args, "mask_offpolicy_in_partial_rollout", False):
            sample.loss_mask = [0] * sample.response_length

    async def _give_back(self, pending: dict, restart_unfinished: bool) -> None:
        """Ends what is still running and returns it to the source."""
        if not pending:
            return
        self.stop_now = True
        left, deadline = set(pending), time.monotonic() + _GIVE_BACK_SECONDS
        while left and time.monotonic() < deadline:
            try:
                async with asyncio.timeout(_GIVE_BACK_SECONDS / 3):
                    await self.clients.student.abort_all()
            except (ServiceError, TimeoutError) as problem:  # an engine that is gone: this rollout needs it no more
                logger.warning("rollout %s: ending what is still sampled: %s", self.rollout_id, problem)
            # once more for a request that was on its way to the server
            _, left = await asyncio.wait(left, timeout=_ABORT_AGAIN_SECONDS)
        await self._cancel(pending)
        self._return_groups(list(pending.values()), restart_unfinished)

    async def _cancel(self, pending: dict) -> None:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    def _return_groups(self, groups: list[list[Sample]], restart_unfinished: bool) -> None:
        groups = sorted(groups, key=lambda group: group[0].group_index)
        for sample in (s for group in groups for s in group):
            sample.token_metrics = None
            unfinished = sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED)
            if unfinished and (restart_unfinished or sample.status is Sample.Status.PENDING):
                restart(sample)
        if groups:
            self.source.add_samples(groups)

    def _note_seconds(self) -> None:
        seconds = self.clients.seconds
        seconds["sample"] = self.sampled_at - self.begin
        if self.scoring:
            seconds["score"] = max(0.0, self.scored_at - self.sampled_at)
            seconds["score_all"] = self.score_seconds


def _accepts(keep: Any, args: Any, group: list[Sample]) -> bool:
    verdict = keep(args, group)
    return bool(getattr(verdict, "keep", verdict))


async def _gather(coroutines: list) -> None:
    """All of them; the first error cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException as error:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not isinstance(error, TaOpdError | asyncio.CancelledError):
            logger.error("rollout: %s: %s", type(error).__name__, error)
        raise
