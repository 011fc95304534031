"""Metrics of scored samples, computed in a thread while other samples are still sampled and scored."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slime.rollout.tip_compat import measure_samples
from slime.utils.types import Sample

_TOKENS = 16_384  # measured together: enough that numpy's calls cost little


class Measuring:
    """`with Measuring(args) as m: m.add(sample) ...; await m.finish()`, in an event loop. Samples without top-K are passed over."""

    def __init__(self, args: Any):
        self.args, self.on = args, args.opd_topk_metrics_k > 0
        self.samples: list[Sample] = []
        self.tokens = 0
        self.running: list[asyncio.Future] = []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="measuring")

    def add(self, sample: Sample) -> None:
        """For a sample that has its scores; it must stay as it is."""
        if not self.on:
            return
        self.samples.append(sample)
        self.tokens += sample.response_length
        if self.tokens >= _TOKENS:
            self._start()

    async def finish(self) -> None:
        """Returns when every sample is measured. Raises DataError where one is malformed."""
        self._start()
        await asyncio.gather(*self.running)

    def _start(self) -> None:
        samples, self.samples, self.tokens = self.samples, [], 0
        if samples:
            self.running.append(asyncio.get_running_loop().run_in_executor(self.thread, measure_samples, self.args, samples))

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *exc) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
