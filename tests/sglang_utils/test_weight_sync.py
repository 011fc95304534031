"""Buckets, the ways of a sync, and snapshots on disk; the syncs themselves run in test_real_servers.py."""

import asyncio
import base64
import pickle
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.weight_bucket import flatten, serialize_for_engine
from slime.backends.sglang_utils.weight_group import WeightGroup
from slime.backends.sglang_utils.weight_sync import _with_last, choose_way, write_hf_folder
from ta_opd.errors import ConfigError, ServiceError


def tensors():
    return [("a", torch.arange(6, dtype=torch.bfloat16).view(2, 3)), ("b", torch.randn(5)), ("c", torch.randn(4, 2).t())]


def unpack(bucket):
    out = {}
    for meta in pickle.loads(base64.b64decode(serialize_for_engine(bucket)))["metadata"]:
        assert meta.start_idx % meta.dtype.itemsize == 0 and meta.end_idx - meta.start_idx == meta.numel
        out[meta.name] = bucket.tensor[meta.start_idx : meta.end_idx].view(meta.dtype).view(meta.shape)
    return out


def test_a_bucket_holds_every_tensor_at_an_address_its_dtype_can_be_read_from():
    named = tensors()
    bucket = flatten(named, "cpu")
    assert bucket.dtypes == ["float32", "float32", "bfloat16"] and bucket.tensor.dtype == torch.uint8
    found = unpack(bucket)
    for name, tensor in named:
        assert torch.equal(found[name], tensor)


def test_the_ways():
    assert choose_way("auto", True, "cuda") == "ipc"
    assert choose_way("auto", False, "cuda") == choose_way("auto", True, "cpu") == "distributed"
    assert choose_way("disk", True, "cuda") == "disk"
    for asked, colocated, device in (("ipc", False, "cuda"), ("ipc", True, "cpu"), ("distributed", True, "cuda"), ("post", True, "cuda")):
        with pytest.raises(ConfigError, match="--weight-sync"):
            choose_way(asked, colocated, device)


def test_the_last_bucket_is_known():
    assert list(_with_last("abc")) == [("a", False), ("b", False), ("c", True)]
    with pytest.raises(ServiceError, match="no weights"):
        list(_with_last([]))


def test_a_snapshot_is_whole_and_replaces_the_former_one(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("old weights, not copied")
    folder = tmp_path / "weights"
    for step in range(2):
        named = [(n, t + step) for n, t in tensors()]
        size = write_hf_folder([named[:2], named[2:]], folder, model)
        assert size == sum(t.numel() * t.element_size() for _, t in named)
        found = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
        assert all(torch.equal(found[n], t) for n, t in named)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model-00001.safetensors", "model-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "weights"]


def test_a_failed_snapshot_leaves_the_former_one(tmp_path):
    model, folder = tmp_path / "model", tmp_path / "weights"
    model.mkdir()
    write_hf_folder([tensors()], folder, model)

    def broken():
        yield tensors()[:1]
        raise RuntimeError("the trainer died")

    with pytest.raises(RuntimeError):
        write_hf_folder(broken(), folder, model)
    assert len(load_file(folder / "model-00001.safetensors")) == 3
    assert SimpleNamespace(**load_file(folder / "model-00001.safetensors")).b.shape == (5,)


def test_the_port_where_the_engines_meet_is_held_from_its_choice():
    """An engine comes to it only after others have had the time to take it."""

    class Engine:
        urls = ["http://engine"]

        async def init_weights_update_group(self, url, master_address, master_port, world_size, **rest):
            with socket.socket() as other:
                with pytest.raises(OSError, match="in use"):
                    other.bind((master_address, master_port))
            limit = timedelta(seconds=20)
            self.store = await asyncio.to_thread(dist.TCPStore, master_address, master_port, world_size, False, limit)
            await asyncio.to_thread(self.store.set, "engine", "is here")

        async def call(self, url, path, body, timeout):
            self.left = body["group_name"]

    engine = Engine()
    group = WeightGroup(engine, 1, "gloo", "127.0.0.1", "weights")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", group.port))
    invited = asyncio.run_coroutine_threadsafe(
        engine.init_weights_update_group("", group.host, group.port, group.world), loop.service_loop()
    )
    store = group._meet(timedelta(seconds=20), invited)
    assert store.get("engine") == b"is here"
    group.close()
    assert engine.left == "weights"


def test_ranks_that_broadcast_have_the_engines_nccl_settings(monkeypatch):
    """SGLang sets both to 0 where they are not set; NCCL fails at the first broadcast between ranks that differ in the first."""
    from slime.ray.actor_group import rank_environment

    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    apart = SimpleNamespace(device="cuda", weight_sync="auto", colocate=False, rollout_external_engine_addrs=None)
    assert rank_environment(apart).items() >= {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}.items()
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")  # the servers inherit it as well
    assert rank_environment(apart)["NCCL_CUMEM_ENABLE"] == "1"
    by_url = SimpleNamespace(**{**vars(apart), "colocate": True, "rollout_external_engine_addrs": ["http://there:1"]})
    assert rank_environment(by_url)["NCCL_NVLS_ENABLE"] == "0"
    for other in ({"colocate": True}, {"weight_sync": "disk"}, {"device": "cpu"}):
        assert not any(name.startswith("NCCL") for name in rank_environment(SimpleNamespace(**{**vars(apart), **other})))


def test_a_group_whose_broadcast_failed_is_not_waited_for(monkeypatch):
    """Over NCCL, destroying it would wait for the broadcast."""
    from torch.distributed import distributed_c10d as c10d

    done = []
    monkeypatch.setattr(c10d, "_abort_process_group", lambda group: done.append(("abort", group)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: done.append(("destroy", group)))
    for backend, failed, expected in (("nccl", True, "abort"), ("nccl", False, "destroy"), ("gloo", True, "destroy")):
        group = WeightGroup(SimpleNamespace(urls=[]), 1, backend, "127.0.0.1", "weights")
        group.group = "the group"
        group.close(failed)
        assert done.pop() == (expected, "the group") and not done and group.group is None


@pytest.mark.parametrize("where", ["broadcast", "is_completed", "wait"])
def test_a_lost_peer_is_a_service_error_wherever_the_backend_tells_of_it(where):
    """The engine is brought back and the weights are sent again for that error only; NCCL tells of it while it is asked for completion."""

    class Backend:
        def broadcast(self, tensors, options):
            return self.tell("broadcast") or self

        def is_completed(self):
            self.tell("is_completed")
            return where == "wait"

        def wait(self):
            self.tell("wait")

        def tell(self, place):
            if place == where:
                raise RuntimeError("NCCL communicator was aborted on rank 0")

    group = WeightGroup(SimpleNamespace(urls=[], timeout=1), 1, "nccl", "127.0.0.1", "weights")
    group.listener.close()
    group.group = Backend()
    with pytest.raises(ServiceError, match="communicator was aborted"):
        group.send(flatten(tensors(), "cpu"), None)
