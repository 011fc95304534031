"""A few worker processes that stay up and run many cases as gloo ranks: importing megatron-core costs seconds, a case little.

`Pool.run(name, ranks, **kwargs)` calls `mt_cases.<name>(rank, ranks, port, **kwargs)` on the first `ranks` workers and returns
their results in rank order ("<module>.<name>": a case of another module); an exception on any worker is raised here. The process groups of a layout are kept for the
next case of the same layout and destroyed before another one: every gloo group holds threads.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import os
import socket
import traceback

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
          "expert_tensor_parallel_size")  # fmt: skip


class WorkerError(AssertionError):
    """A case failed on a rank; the text is the worker's traceback."""


class Pool:
    def __init__(self, size: int):
        context = mp.get_context("spawn")
        self.port = 0
        self.layout = None
        self.workers = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(self, name: str, ranks: int, timeout: float = 240, **kwargs) -> list:
        layout, listener = (ranks, *(kwargs.get(name, 1) for name in LAYOUT)), None
        if layout != self.layout:
            if self.layout is not None and name != "leave":  # all ranks of the old world leave it together: NCCL waits for that
                self.run("leave", self.layout[0], **dict(zip(LAYOUT, self.layout[1:], strict=True)))
            self.layout, listener = layout, socket.create_server(("127.0.0.1", 0))  # held: other tests run meanwhile
            self.port = listener.getsockname()[1]
        for rank, (_, pipe) in enumerate(self.workers[:ranks]):
            pipe.send((name, ranks, self.port, listener if rank == 0 else None, kwargs))
        results, failure = [], None
        for rank, (_, pipe) in enumerate(self.workers[:ranks]):
            if not pipe.poll(timeout if failure is None else 20):
                self.close()
                raise WorkerError(failure or f"rank {rank} did not answer to {name} within {timeout} s")
            ok, value = pipe.recv()
            results.append(value)
            failure = failure or (None if ok else f"rank {rank}: {value}")
        if listener is not None:
            listener.close()
        if failure:
            raise WorkerError(failure)
        return results

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.join(2)
            if process.is_alive():
                process.kill()


def _work(rank: int, pipe) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import warnings

    warnings.filterwarnings("ignore")
    import mt_cases
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            name, ranks, port, listener, kwargs = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the pool is gone; gloo's threads would delay a regular exit by seconds
        try:
            mt_cases.join(rank, ranks, port, listener)
            module, _, case = name.rpartition(".")
            value = (True, getattr(importlib.import_module(module or "mt_cases"), case)(rank, ranks, port, **kwargs))
        except BaseException:
            value = (False, traceback.format_exc())
        mt_cases.release()
        gc.collect()
        pipe.send(value)
