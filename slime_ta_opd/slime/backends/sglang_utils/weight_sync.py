"""Sends the trainer's weights to the student's engines, bucket by bucket in HF names, and checks that they arrived.

Ways: "ipc" hands CUDA memory over to engines on the same GPUs; "distributed" broadcasts over a process group of the source
and all engines (NCCL, or gloo on CPU); "disk" writes an HF directory that the engines load. No request should be running: one
that is would be answered before the update goes through.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.server import is_loopback
from slime.backends.sglang_utils.weight_bucket import Bucket, flatten, serialize_for_engine
from slime.backends.sglang_utils.weight_group import WeightGroup
from ta_opd.errors import ConfigError, ServiceError

WAYS = ("ipc", "distributed", "disk")
_JOIN_SECONDS = 300.0


def choose_way(asked: str, colocated: bool, device: str) -> str:
    """The way to take for --weight-sync `asked`. ConfigError where it cannot work."""
    if asked == "auto":
        return "ipc" if colocated and device == "cuda" else "distributed"
    if asked not in WAYS:
        raise ConfigError(f"--weight-sync: expected auto, {', '.join(WAYS)}; got {asked!r}")
    if asked == "ipc" and not (colocated and device == "cuda"):
        raise ConfigError("--weight-sync ipc: needs engines on the trainer's own GPUs (--colocate); use auto or distributed")
    if asked == "distributed" and colocated and device == "cuda":
        raise ConfigError("--weight-sync distributed: NCCL cannot join two processes on one GPU; with --colocate use auto or ipc")
    return asked


class WeightSender:
    """The trainer's end. One on every rank; only the source (rank 0) holds tensors in its buckets.

    engines: {"urls": [...], "api_key": str | None, "tp": ranks of one engine, "colocated": bool}. Raises ServiceError where
    an engine refuses, dies, or reports another weight version after the sync.
    """

    def __init__(self, args, engines: dict, is_source: bool):
        self.engines, self.is_source = engines, is_source
        self.device = getattr(args, "device", "cpu")
        self.way = choose_way(getattr(args, "weight_sync", "auto"), engines["colocated"], self.device)
        self.folder = Path(getattr(args, "output_dir", None) or "outputs") / "weights"
        self.model_folder = Path(args.hf_checkpoint)
        self.client = SGLangClient(
            engines["urls"], timeout=getattr(args, "request_timeout", 600), api_key=engines["api_key"], name="student"
        )
        self.group: WeightGroup | None = None

    def send(self, buckets: Iterable[list[tuple[str, Tensor]]], version: int | str) -> dict[str, float]:
        """Sends every bucket and sets `version` on every engine. Every rank calls this: gathering a bucket is collective.

        Returns seconds and bytes (on the source; zero bytes elsewhere).
        """
        begin, version = time.monotonic(), str(version)
        buckets = iter(buckets)
        try:
            size = self._send(buckets, version)
        except (ServiceError, OSError):
            for _ in buckets:  # the other ranks gather to the end; the next send must find all of them at the start
                pass
            raise
        if self.is_source:
            if self.way != "disk":
                loop.run(self.client.flush_cache())
            loop.run(self.client.check_weight_version(version))
        return {"seconds": time.monotonic() - begin, "bytes": float(size)}

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None
        self.client.close()

    # ------------------------------------------------------------------ ways

    def _send(self, buckets: Iterator[list[tuple[str, Tensor]]], version: str) -> int:
        if self.way == "ipc":
            return self._send_ipc(buckets, version)
        if not self.is_source:
            for _ in buckets:
                pass
            return 0
        return self._send_distributed(buckets, version) if self.way == "distributed" else self._send_disk(buckets, version)

    def _send_distributed(self, buckets, version: str) -> int:
        if self.group is None:
            self.group = self._join()
        size = 0
        try:
            for bucket, last in _with_last(_filled(buckets)):
                flat = flatten(bucket, self.device)
                size += flat.tensor.numel()
                self.group.send(flat, version if last else None)
        except BaseException:
            self.group.close(failed=True)
            self.group = None
            raise
        return size

    def _join(self) -> WeightGroup:
        urls = self.client.urls
        local = all(is_loopback(urlparse(url).hostname or "") for url in urls)
        host = "127.0.0.1" if local else _own_address(urls[0])
        backend = "nccl" if self.device == "cuda" else "gloo"
        group = WeightGroup(self.client, self.engines["tp"], backend, host, f"weights_{uuid.uuid4().hex[:8]}")
        group.join(_JOIN_SECONDS)
        return group

    def _send_ipc(self, buckets, version: str) -> int:
        """Every trainer rank hands its own copy to the engine rank on its GPU; the first rank of each engine posts."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if world > 1 else 0
        tp, urls = self.engines["tp"], self.client.urls
        if len(urls) * tp > world:
            raise ConfigError(f"--colocate: {len(urls)} engines of {tp} GPUs need as many trainer ranks, got {world}")
        size = 0
        for bucket, last in _with_last(_filled(buckets) if world == 1 else buckets):
            flat = _spread(bucket, self.device, rank) if world > 1 else flatten(bucket, self.device)
            if flat is None:
                continue
            size += flat.tensor.numel() if self.is_source else 0
            parts = [serialize_for_engine(flat)]
            if world > 1:
                gathered: list = [None] * world
                dist.all_gather_object(gathered, parts[0])
                parts = gathered[rank : rank + tp]
            problem = None
            if rank % tp == 0 and rank // tp < len(urls):
                problem = self._post_tensors(urls[rank // tp], parts, version if last else None)
            if world > 1:
                problems: list = [None] * world
                dist.all_gather_object(problems, problem)  # also keeps every rank's memory until all engines have read it
                problem = next((p for p in problems if p), None)
            if problem:
                raise ServiceError(problem)
            del flat
        torch.cuda.ipc_collect()
        return size

    def _post_tensors(self, url: str, parts: list[str], version: str | None) -> str | None:
        call = self.client.update_weights_from_tensor(
            url, serialized=parts, weight_version=version, load_format="flattened_bucket"
        )
        try:
            loop.run(call)
        except ServiceError as error:
            return str(error)
        return None

    def _send_disk(self, buckets, version: str) -> int:
        size = write_hf_folder(_filled(buckets), self.folder, self.model_folder)
        loop.run(self.client.update_weights_from_disk(str(self.folder.absolute()), version))
        return size


def write_hf_folder(buckets: Iterable[list[tuple[str, Tensor]]], folder: Path, model_folder: Path) -> int:
    """Writes the buckets as an HF directory (one shard a bucket), whole or not at all; returns the bytes of the tensors.

    The other files (config, tokenizer) are those of `model_folder`.
    """
    from safetensors.torch import save_file

    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    index, size = {}, 0
    for number, bucket in enumerate(buckets, 1):
        name = f"model-{number:05d}.safetensors"
        # clones: tied or sliced tensors share memory, which safetensors refuses
        tensors = {key: t.detach().to("cpu").contiguous().clone() for key, t in bucket}
        save_file(tensors, fresh / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    (fresh / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    for file in model_folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth") and "index.json" not in file.name:
            shutil.copy2(file, fresh / file.name)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return size


def _filled(buckets: Iterable[list]) -> Iterator[list]:
    return (bucket for bucket in buckets if bucket)


def _with_last(items: Iterable) -> Iterator[tuple[list, bool]]:
    """(item, whether it is the last one); looks one item ahead."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        raise ServiceError("weight sync: the trainer gave no weights at all") from None
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _spread(bucket: list[tuple[str, Tensor]], device: str, rank: int) -> Bucket | None:
    """Rank 0's bucket on every rank, by broadcast over the default group; None where it is empty."""
    flat = flatten(bucket, device) if bucket else None
    described = [(flat.names, flat.dtypes, flat.shapes, flat.tensor.numel()) if flat else None]
    dist.broadcast_object_list(described, src=0)
    if described[0] is None:
        return None
    names, dtypes, shapes, size = described[0]
    if rank != 0:
        flat = Bucket(names, dtypes, shapes, torch.empty(size, dtype=torch.uint8, device=torch.cuda.current_device()))
    dist.broadcast(flat.tensor, src=0)
    return flat


def _own_address(url: str) -> str:
    """The address of this machine that a connection to `url` leaves from."""
    import socket

    parsed = urlparse(url)
    with socket.create_connection((parsed.hostname, parsed.port or 80), timeout=10) as connection:
        return connection.getsockname()[0]
