"""Loss, gradient with respect to hidden and to weight, and statistics, against a dense float64 autograd reference.

One process for world size 1; for 2 and 4 gloo ranks one spawn each, in which all cases run.
"""

from __future__ import annotations

import os
import socket

import loss_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

EXACT = [f"exact_stats-rows={rows}-chunk={chunk}" for rows, chunk in cases.EXACT_STATS]


def _rank(rank: int, world: int, port: int, out: str, device: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        torch.save(cases.run_all(rank, world, dist.group.WORLD, device), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_world(world: int, out, device: str) -> dict[int, dict[str, dict[str, float]]]:
    """{rank: {case: {quantity: relative error}}} of all cases on `world` ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, args=(world, port, str(out), device), nprocs=world, join=True)
    return {rank: torch.load(out / f"{rank}.pt") for rank in range(world)}


def above(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    return {what: error for what, error in errors.items() if not error <= tolerance}


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    if request.param == 1:
        return {0: cases.run_all(0, 1, None)}
    return run_world(request.param, tmp_path_factory.mktemp("world"), "cpu")


@pytest.mark.parametrize("name", [*cases.CASES, *EXACT])
def test_parity(results, name):
    for rank, by_case in results.items():
        bad = above(by_case[name], cases.TOLERANCE)
        assert not bad, f"rank {rank} of {len(results)}: relative errors above {cases.TOLERANCE}: {bad}"


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_parity_on_gpu(world, tmp_path, monkeypatch):
    """The same cases over NCCL on the Triton kernels, f32 without TF32 and bf16."""
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices, found {torch.cuda.device_count()}")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    bad = {}
    for rank, by_case in run_world(world, tmp_path, "cuda").items():
        for name, errors in by_case.items():
            # kernels take logs and exponentials of f32 with hardware approximations
            found = above(errors, cases.BF16_TOLERANCE if name.startswith("bf16") else 5 * cases.TOLERANCE)
            if found:
                bad[rank, name] = found
    assert not bad, bad
