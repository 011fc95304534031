"""A process group of the trainer's source rank and every engine rank, for broadcasting weights."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.weight_bucket import Bucket
from ta_opd.errors import ServiceError

logger = logging.getLogger(__name__)


class WeightGroup:
    """Rank 0 is this process; engine i holds ranks 1 + i * tp onwards. They meet at a port of `host` that is held from now on."""

    def __init__(self, client: SGLangClient, tp: int, backend: str, host: str, name: str):
        self.client, self.tp, self.backend, self.host, self.name = client, tp, backend, host, name
        self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.listener.getsockname()[1]
        self.world = 1 + len(client.urls) * tp
        self.group: dist.ProcessGroup | None = None

    def join(self, timeout: float) -> None:
        """Builds the group; ServiceError when an engine does not join."""

        async def invite():
            await asyncio.gather(
                *(
                    self.client.init_weights_update_group(
                        url, master_address=self.host, master_port=self.port, rank_offset=1 + i * self.tp,
                        world_size=self.world, group_name=self.name, backend=self.backend,
                    )
                    for i, url in enumerate(self.client.urls)
                )
            )  # fmt: skip

        invited = asyncio.run_coroutine_threadsafe(invite(), loop.service_loop())
        limit = timedelta(seconds=timeout)
        try:
            # The same steps as the engines take: a TCP store, keys prefixed by the group's name, then the backend.
            store = self._meet(limit, invited)
            store.set_timeout(limit)
            self.group, _ = c10d._new_process_group_helper(
                self.world, 0, [], dist.Backend(self.backend), dist.PrefixStore(self.name, store),
                group_name=self.name, timeout=limit,
            )  # fmt: skip
            c10d._world.pg_group_ranks[self.group] = {i: i for i in range(self.world)}
            invited.result(timeout)
        except ServiceError:
            raise
        except Exception as error:  # whatever the store or the backend raises
            invited.cancel()
            raise ServiceError(f"weight sync: the engines did not join within {timeout:.0f} s: {error}") from error

    def _meet(self, limit: timedelta, invited: Future) -> dist.Store:
        """The store, once every engine is there; what `invited` failed with as soon as an engine refuses or dies.

        Waiting for the engines cannot be cut short, so a thread does it; its time limit ends it.
        """
        store: Future = Future()
        held = self.listener.detach()  # the store's from now on

        def wait():
            try:
                store.set_result(dist.TCPStore(self.host, self.port, self.world, is_master=True, timeout=limit, master_listen_fd=held))
            except Exception as error:
                store.set_exception(error)

        threading.Thread(target=wait, name="weights-join", daemon=True).start()
        while not store.done():
            if invited.done() and invited.exception() is not None:
                raise invited.exception()
            time.sleep(0.01)
        return store.result()

    def send(self, bucket: Bucket, version: str | None) -> None:
        """Broadcasts one bucket; ServiceError as soon as an engine refuses it or dies."""

        async def announce():
            await asyncio.gather(
                *(
                    self.client.update_weights_from_distributed(
                        url, names=bucket.names, dtypes=bucket.dtypes, shapes=bucket.shapes, group_name=self.name,
                        weight_version=version, load_format="flattened_bucket",
                    )
                    for url in self.client.urls
                )
            )  # fmt: skip

        announced = asyncio.run_coroutine_threadsafe(announce(), loop.service_loop())
        options = dist.BroadcastOptions()
        options.rootRank = 0
        pause = 0.0002
        try:
            work = self.group.broadcast([bucket.tensor], options)
            while not work.is_completed():
                if announced.done() and announced.exception() is not None:
                    raise announced.exception()
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
            work.wait()
        except ServiceError:
            raise
        except RuntimeError as error:  # any of the three calls may tell of a lost peer
            announced.cancel()
            raise ServiceError(f"weight sync: the broadcast to the engines failed: {error}") from error
        announced.result(self.client.timeout)
        if bucket.tensor.is_cuda:
            torch.cuda.synchronize()

    def close(self, failed: bool = False) -> None:
        """Leaves the group on both ends; an engine that is gone is passed over. failed: a broadcast may still be under way."""

        async def dismiss():
            results = await asyncio.gather(
                *(
                    self.client.call(url, "/destroy_weights_update_group", {"group_name": self.name}, timeout=20)
                    for url in self.client.urls
                ),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    logger.debug("weight sync: leaving the group: %s", result)

        self.listener.close()
        loop.run(dismiss())
        if self.group is not None:
            if failed and self.backend == "nccl":
                c10d._abort_process_group(self.group)  # destroying would wait for a broadcast that nobody will receive
            else:
                dist.destroy_process_group(self.group)
            self.group = None
