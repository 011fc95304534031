"""Calls that steer a server rather than ask its model: health, cache, pause, memory, weights. Mixed into the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ta_opd.errors import ServiceError


class Controls:
    """Each call goes to all replicas at once unless it names one, and raises ServiceError when a replica refuses."""

    urls: list[str]
    name: str
    timeout: float

    async def call(self, url: str, path: str, body: dict | None = None, *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    async def call_all(self, path: str, body: dict | None = None, *, timeout: float | None = None) -> list[Any]:
        """The replies of all replicas, in the order of `urls`."""
        return list(await asyncio.gather(*(self.call(url, path, body, timeout=timeout) for url in self.urls)))

    async def server_info(self, url: str | None = None) -> dict[str, Any]:
        """Start arguments and sizes of one replica (default: the first)."""
        return await self.call(url or self.urls[0], "/server_info", timeout=30)

    async def model_info(self) -> list[dict[str, Any]]:
        """Model path and weight version of every replica."""
        return await self.call_all("/model_info", timeout=30)

    async def healthy(self, url: str, timeout: float = 15.0) -> bool:
        """Whether the replica samples a token. The call itself sleeps about a second; it says no while paused."""
        try:
            await self.call(url, "/health_generate", timeout=timeout)
        except ServiceError:
            return False
        return True

    async def weight_versions(self) -> dict[str, str]:
        infos = await self.model_info()
        return {url: str(info.get("weight_version")) for url, info in zip(self.urls, infos, strict=True)}

    async def check_weight_version(self, version: str) -> None:
        """ServiceError unless every replica reports `version`."""
        found = await self.weight_versions()
        wrong = {url: v for url, v in found.items() if v != str(version)}
        if wrong:
            raise ServiceError(f"{self.name}: expected weight version {version!r} everywhere after the sync, got {wrong}")

    async def flush_cache(self) -> None:
        """Forgets cached prefixes, waiting until the last request has left the scheduler."""
        await self.call_all("/flush_cache?timeout=60", {}, timeout=90)

    async def pause(self, mode: str = "abort") -> None:
        """mode "abort" ends running requests with what they have; "retract" and "in_place" hold them until `resume`."""
        await self.call_all("/pause_generation", {"mode": mode}, timeout=60)

    async def resume(self) -> None:
        await self.call_all("/continue_generation", {}, timeout=60)

    async def abort_all(self) -> None:
        """Ends every running request; each returns its partial output with finish_reason "abort"."""
        await self.call_all("/abort_request", {"abort_all": True}, timeout=60)

    async def release_memory(self, tags: Sequence[str] | None = None) -> None:
        """Gives GPU memory back (needs --enable-memory-saver). tags: "weights", "kv_cache"; None is both."""
        await self.call_all("/release_memory_occupation", {"tags": list(tags)} if tags else {}, timeout=120)

    async def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        await self.call_all("/resume_memory_occupation", {"tags": list(tags)} if tags else {}, timeout=120)

    # ------------------------------------------------------------------ weights
    # With flush_cache true SGLang ends itself where the cache cannot be flushed at once: while requests are paused, and for a
    # moment after the last reply. So all of these ask for flush_cache false; call `flush_cache` after the last of them.

    async def _weights_call(self, url: str, path: str, body: dict) -> None:
        reply = await self.call(url, path, body)
        if not isinstance(reply, dict) or not reply.get("success", False):
            message = reply.get("message") if isinstance(reply, dict) else reply
            raise ServiceError(f"{self.name} at {url}{path}: {message}")

    async def init_weights_update_group(
        self, url: str, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Has one replica join a process group; returns once the group is complete."""
        body = {
            "master_address": master_address, "master_port": master_port, "rank_offset": rank_offset, "world_size": world_size,
            "group_name": group_name, "backend": backend,
        }  # fmt: skip
        await self._weights_call(url, "/init_weights_update_group", body)

    async def destroy_weights_update_group(self, url: str, group_name: str) -> None:
        await self._weights_call(url, "/destroy_weights_update_group", {"group_name": group_name})

    async def update_weights_from_distributed(
        self, url: str, *, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str,
        weight_version: str | None = None, load_format: str | None = None,
    ) -> None:  # fmt: skip
        """Has one replica receive one bucket over the group."""
        body = {
            "names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group_name, "flush_cache": False,
            "load_format": load_format,
        }  # fmt: skip
        if weight_version is not None:
            body["weight_version"] = weight_version
        await self._weights_call(url, "/update_weights_from_distributed", body)

    async def update_weights_from_tensor(
        self, url: str, *, serialized: list[str], weight_version: str | None = None, load_format: str | None = None
    ) -> None:
        """Hands one replica one bucket as serialized tensors (base64), one entry a tensor-parallel rank."""
        body = {"serialized_named_tensors": serialized, "flush_cache": False, "load_format": load_format}
        if weight_version is not None:
            body["weight_version"] = weight_version
        await self._weights_call(url, "/update_weights_from_tensor", body)

    async def update_weights_from_disk(self, model_path: str, weight_version: str) -> None:
        """Has every replica load an HF directory and forget cached prefixes."""
        body = {"model_path": model_path, "weight_version": weight_version, "flush_cache": False}
        await asyncio.gather(*(self._weights_call(url, "/update_weights_from_disk", body) for url in self.urls))
        await self.flush_cache()
