"""Loss, gradient with respect to hidden and to weight, and statistics, against a dense float64 autograd reference.

One process for world size 1; for 2 and 4 gloo ranks one spawn each, in which all cases run.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402

EXACT = [f"exact_stats-rows={rows}-chunk={chunk}" for rows, chunk in ((13, 5), (13, None), (0, None))]


def _rank(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(cases.run_all(rank, world, dist.group.WORLD), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    """{rank: {case: {quantity: relative error}}} of one world size."""
    world = request.param
    if world == 1:
        return {0: cases.run_all(0, 1, None)}
    out = tmp_path_factory.mktemp(f"world{world}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, args=(world, port, str(out)), nprocs=world, join=True)
    return {rank: torch.load(out / f"{rank}.pt") for rank in range(world)}


@pytest.mark.parametrize("name", [*cases.CASES, *EXACT])
def test_parity(results, name):
    for rank, by_case in results.items():
        bad = {what: error for what, error in by_case[name].items() if not error <= cases.TOLERANCE}
        assert not bad, f"rank {rank} of {len(results)}: relative errors above {cases.TOLERANCE}: {bad}"
