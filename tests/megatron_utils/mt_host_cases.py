"""Cases of the pool about the optimizer's state in host memory (--optimizer-cpu-offload): "mt_host_cases.<name>"."""

from __future__ import annotations

import mt_cases
import mt_tiny
import numpy as np
import torch


def make_trainer_in_chunks(rank, ranks, port, model, chunk_bytes: int | None, **changes):
    """`mt_cases.make_trainer` with host chunks of this size."""
    from slime.backends.megatron_utils import host_state

    whole, host_state.CHUNK_BYTES = host_state.CHUNK_BYTES, chunk_bytes or host_state.CHUNK_BYTES
    try:
        return mt_cases.make_trainer(rank, ranks, port, model, **changes)
    finally:
        host_state.CHUNK_BYTES = whole


def state_of(trainer) -> dict[str, np.ndarray]:
    """This rank's main weights, moments and step counts by "<optimizer>:<tensor>:<kind>"."""
    state = {}
    for n, part in enumerate(trainer.optimizer.core.chained_optimizers):
        for i, p in enumerate(part.get_parameters()):
            held = {"main": p.data, **part.optimizer.state[p]}
            state.update({f"{n}:{i}:{k}": t.detach().cpu().numpy().copy() for k, t in held.items()})
    return state


def optimizer_alone(rank, ranks, port, model, steps: int = 3, chunk_bytes: int | None = None, **changes) -> dict:
    """Steps with drawn gradients, so that no kernel of forward or backward decides a bit: norms, state, weights, device memory in bytes
    (0 on CPU): `init` the peak of building, `held` between steps, `step` the peak of norm and step above that."""
    from slime.backends.megatron_utils import cpu_runtime

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    trainer, _ = make_trainer_in_chunks(rank, ranks, port, model, chunk_bytes, **changes)
    init = torch.cuda.max_memory_allocated() - before if cuda else 0
    held = torch.cuda.memory_allocated() if cuda else 0
    parameters, norms, peak = list(trainer.model.parameters()), [], 0
    for step in range(steps):
        with cpu_runtime.cpu_runtime():
            trainer.model.zero_grad_buffer()
            trainer.optimizer.zero_grad()
            for n, p in enumerate(parameters):
                p.main_grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + n)))
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            norms.append(trainer.optimizer.grad_norm())
            trainer.optimizer.apply(norms[-1])
            if cuda:
                peak = max(peak, torch.cuda.max_memory_allocated() - held)
    return {
        "norms": norms, "losses": [], "state": state_of(trainer), "weights": {n: p.detach().float().cpu().numpy() for n, p in trainer.model.named_parameters()},
        "init": init, "held": held - before, "step": peak, "parameters": sum(p.numel() for p in parameters), "largest": max(p.numel() for p in parameters),
    }  # fmt: skip


def optimizer_state(rank, ranks, port, model, data, steps: int = 3, chunk_bytes: int | None = None, save_at: int | None = None, **changes) -> dict:
    """Norms of `steps` steps, and after them this rank's whole optimizer state and the weights, bit by bit; how the state is held."""
    trainer, start = make_trainer_in_chunks(rank, ranks, port, model, chunk_bytes, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    metrics = []
    for step in range(start, start + steps):
        metrics.append(trainer.train(step, own))
        if step == save_at:
            trainer.save(step, mt_cases.EXTRA)
    optimizer, state = trainer.optimizer, state_of(trainer)
    hosts = list(optimizer.host.values())
    on_host = {(kind, host.host[kind].data_ptr() <= t.data_ptr() < host.host[kind].data_ptr() + host.host[kind].nbytes)
               for host in hosts for piece in host.pieces
               for kind, t in {"main": piece.main.data, **host.part.optimizer.state[piece.main]}.items() if kind in host.host}  # fmt: skip
    return {
        "start": start, "norms": [m["grad_norm"] for m in metrics], "losses": [m["loss"] for m in metrics], "state": state,
        "weights": {n: p.detach().float().cpu().numpy().copy() for n, p in trainer.model.named_parameters()}, "on_host": on_host,
        "groups": len(optimizer.core.param_groups), "host_bytes": sum(h.nbytes for h in hosts),
        "chunks": sum(len(h.chunks) for h in hosts), "pieces": sum(len(h.pieces) for h in hosts),
        "step_devices": {str(s["step"].device.type) for h in hosts for s in h.part.optimizer.state.values()},
    }  # fmt: skip
