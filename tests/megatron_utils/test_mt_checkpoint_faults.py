"""A full disk and kill -9 while saving: the checkpoint before is whole, nothing half-written counts, no key is stored."""

import socket
import time

import pytest
import torch
from conftest import data
from mt_pool import Pool


@pytest.mark.parametrize("limit", [512, 20_000], ids=["first_file", "later_file"])
def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(pool, models, tmp_path, limit):
    run = tmp_path / "run"
    (error,) = pool.run("save_past_a_limit", 1, model=models("qwen3"), save=str(run), limit=limit)
    assert error[0] == "ServiceError", error
    assert "checkpoint of rollout 1 could not be written" in error[1] and "iter_0000000" in error[1] and "--load" in error[1]
    assert sorted(p.name for p in run.iterdir()) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    (loaded,) = pool.run("load_then_step", 1, model=models("qwen3"), data=data(), save=str(run), load=str(run))
    assert loaded["start"] == 1


def test_kill_9_while_saving_leaves_the_newest_whole_checkpoint(pool, models, tmp_path):
    run, victim = tmp_path / "run", Pool(1)
    process, pipe = victim.workers[0]
    try:
        listener = socket.create_server(("127.0.0.1", 0))
        pipe.send(("save_forever", 1, listener.getsockname()[1], listener, {"model": models("qwen3"), "save": str(run)}))
        deadline = time.monotonic() + 200
        while not ((run / "iter_0000002").exists() and any(p.stat().st_size for p in run.glob(".iter_*.partial/*"))):
            assert time.monotonic() < deadline and process.is_alive()
        process.kill()  # some files of a checkpoint are written, it is not in place
        process.join()
        listener.close()
    finally:
        victim.close()
    newest = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert newest >= 2
    (loaded,) = pool.run("load_then_step", 1, model=models("qwen3"), data=data(), save=str(run), load=str(run))
    assert loaded["start"] == newest + 1
    pool.run("save_many", 1, model=models("qwen3"), save=str(run), rollouts=[newest + 1])
    assert not list(run.glob(".*")), "what the killed save left is gone after the next one"


def test_no_key_is_stored_in_a_checkpoint(pool, models, tmp_path):
    run = tmp_path / "run"
    pool.run("save_many", 1, model=models("qwen3"), save=str(run), rollouts=[0], sglang_api_key="hush-hush-hush")
    stored = torch.load(run / "iter_0000000" / "common.pt", weights_only=True)
    assert stored["ta_opd"]["args"]["save"] == str(run) and "sglang_api_key" not in stored["ta_opd"]["args"]
    assert all(b"hush-hush" not in file.read_bytes() for file in run.rglob("*") if file.is_file())
