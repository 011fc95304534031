"""What a worker of `pool` runs: cases that build a trainer in some layout and return plain numbers to compare."""

from __future__ import annotations

import argparse
import os

import mt_tiny
import numpy as np
import torch
import torch.distributed as dist

_state: dict = {}


def join(rank: int, ranks: int, port: int, listener=None) -> None:
    """Leaves the groups of another layout (another port) and joins this world; `listener`: rank 0's socket on that port."""
    from slime.backends.megatron_utils import distributed

    if _state.get("world") == (ranks, port):
        return
    distributed.leave_world()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    distributed.init_world(rank, ranks, "127.0.0.1", port, minutes=5, listener=listener)
    _state["world"] = (ranks, port)


def leave(rank, ranks, port, **layout) -> None:
    """Leaves the world."""
    from slime.backends.megatron_utils import distributed

    distributed.leave_world()
    _state.clear()


def make_args(model, **changes) -> argparse.Namespace:
    base = dict(
        hf_checkpoint=str(model), opd_loss_type="topk_reverse_kl", max_tokens_per_gpu=64, lr=1e-3, fp32=True, adam_eps=1e-5,
        weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=0.5, opd_log_valid_kl="off", seed=7,
    )  # fmt: skip
    return argparse.Namespace(**{**base, **changes})


def make_trainer(rank: int, ranks: int, port: int, model, **changes):
    from slime.backends.megatron_utils.trainer import MegatronTrainer

    trainer = MegatronTrainer(make_args(model, **changes), rank, ranks, rank, "127.0.0.1", port)
    _state.setdefault("trainers", []).append(trainer)
    return trainer, trainer.init()


def release() -> None:
    """Frees what a case built."""
    for trainer in _state.pop("trainers", []):
        trainer.free()


def export(trainer) -> dict[str, np.ndarray]:
    """HF weights as rank 0 gets them (empty elsewhere)."""
    return {n: t.float().cpu().numpy().copy() for bucket in trainer.hf_weight_buckets(1 << 16) for n, t in bucket}


def raw_gradients(trainer, own) -> dict[str, np.ndarray]:
    """The step's gradient before clipping by HF name (rank 0); leaves the model as it was."""
    from slime.backends.megatron_utils import cpu_runtime, weights
    from slime.backends.megatron_utils.model import unwrap

    with cpu_runtime.cpu_runtime():
        trainer.model.zero_grad_buffer()
        trainer.stepper.gradients(trainer.prepare(own), own["steps"][0])
    model = unwrap(trainer.model)
    held = {p: p.data for p in model.parameters()}
    for p in held:
        p.data = p.main_grad.clone()
    try:
        return {n: t.float().cpu().numpy().copy() for bucket in weights.hf_weight_buckets(model, 1 << 20) for n, t in bucket}
    finally:
        for p, data in held.items():
            p.data = data


def train(rank, ranks, port, model, data, steps: int = 3, grads: bool = True, **changes) -> dict:
    """Log-probs before; gradient of the first step; metrics of `steps` steps on the same batch; weights after (rank 0)."""
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    logps = trainer.compute_log_probs(own)
    out = {"log_probs": dict(zip(own["sample_indices"], logps, strict=True))}
    if grads and not changes.get("use_distributed_optimizer"):
        out["gradients"] = raw_gradients(trainer, own)
    out["row_queries"] = _row_queries_used(trainer, own)
    out["gradient_dtypes"] = {str(p.main_grad.dtype) for p in trainer.model.parameters()}
    out["metrics"] = [trainer.train(step, own) for step in range(steps)]
    out["weights"] = export(trainer)
    return out


def _row_queries_used(trainer, own) -> int:
    """Micro-batches of the step whose last layer computes queries for rows of the loss only."""
    from slime.backends.megatron_utils import packing

    rows = trainer.settings.opd_loss_rows
    batches = trainer.stepper.pack(own, own["steps"][0]["indices"], lambda d, i: packing.choose_rows(d, i, rows, False))
    return sum(b.layout.row_queries is not None for b in batches)


def threads(rank, ranks, port, model, **changes) -> int:
    """Threads of this process after a trainer of the layout was built."""
    make_trainer(rank, ranks, port, model, **changes)
    return len(os.listdir("/proc/self/task"))


EXTRA = {"data_source": {"epoch": 1, "offset": (3, 4)}, "note": "kept"}


def moments(trainer) -> dict[str, np.ndarray]:
    """Both Adam moments by "<moment>:<HF name>", gathered over data, tensor and pipeline parallel ranks (rank 0)."""
    from slime.backends.megatron_utils import weights
    from slime.backends.megatron_utils.model import unwrap

    model = unwrap(trainer.model)
    out = {}
    for key in ("exp_avg", "exp_avg_sq"):
        held = {p: p.data for p in model.parameters()}
        for p in held:
            p.data = _moment(trainer, p, key).to(p.device, p.dtype)
        try:
            buckets = list(weights.hf_weight_buckets(model, 1 << 24))
            out.update({f"{key}:{n}": t.float().cpu().numpy().copy() for b in buckets for n, t in b})
        finally:
            for p, data in held.items():
                p.data = data
    return out


def _moment(trainer, param, key):
    """One moment of a parameter at its full (tensor-parallel) shape; data-parallel ranks hold parts or copies of it."""
    part = trainer.optimizer.core.chained_optimizers[0]
    if not hasattr(part, "model_param_group_index_map"):
        main = getattr(param, "main_param", None)
        return part.optimizer.state[param if main is None else main][key].reshape(param.shape)
    full = torch.zeros(param.numel(), device=param.device)
    if param in part.model_param_group_index_map:
        group, order = part.model_param_group_index_map[param]
        main = part.optimizer.param_groups[group]["params"][order]
        where = part._get_model_param_range_map(param)["param"]
        full[where.start : where.end] = part.optimizer.state[main][key].reshape(-1)
    dist.all_reduce(full, group=part.data_parallel_group)
    return full.reshape(param.shape)


def save_then_step(rank, ranks, port, model, data, **changes) -> dict:
    """Two steps, a save, and one more step as the uninterrupted run takes it."""
    trainer, _ = make_trainer(rank, ranks, port, model, lr_decay_style="cosine", lr_decay_iters=10, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    for rollout in range(2):
        trainer.train(rollout, own)
    trainer.save(1, EXTRA)
    out = {"moments": moments(trainer), "weights": export(trainer)}
    return {**out, "next": trainer.train(2, own), "after": export(trainer)}


def load_then_step(rank, ranks, port, model, data, **changes) -> dict:
    trainer, start = make_trainer(rank, ranks, port, model, lr_decay_style="cosine", lr_decay_iters=10, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    states = [s for part in trainer.optimizer.core.chained_optimizers for s in part.optimizer.state.values()]
    out = {
        "start": start,
        "extra": trainer.load_extra(),
        "steps": {float(s["step"]) for s in states},
        "step_tensors": len({s["step"].data_ptr() for s in states}),
        "parameters": len(states),
        "fused": all(g["fused"] for g in trainer.optimizer.core.param_groups),
        "moments": moments(trainer),
        "weights": export(trainer),
    }
    return {**out, "next": trainer.train(start, own), "after": export(trainer)}


def gathered_to_save(rank, ranks, port, model, **changes) -> tuple[int, int]:
    """(bytes of the optimizer's state that this rank hands to a save, its parameters)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from slime.backends.megatron_utils import checkpoint, cpu_runtime

    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    with cpu_runtime.cpu_runtime():
        tensors = checkpoint._model_state(trainer.model, False)["model"]
        state = trainer.optimizer.sharded_state_dict(tensors, checkpoint._metadata(False), is_loading=False)
    held = [v.data for v in nested_values(state) if isinstance(v, (ShardedTensor, ShardedTensorFactory))]
    return sum(t.nbytes for t in held), sum(p.numel() for p in trainer.model.parameters())


def crash_in_second_save(rank, ranks, port, model, data, **changes) -> str:
    """The process dies (here: an exception) between writing the files and putting them in place."""
    from slime.backends.megatron_utils import checkpoint

    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    trainer.save(0, EXTRA)
    held = checkpoint.publish
    checkpoint.publish = _crash
    try:
        trainer.save(1, EXTRA)
    except KeyboardInterrupt:
        return "crashed"
    finally:
        checkpoint.publish = held
    return "went on"


def _crash(*args):
    raise KeyboardInterrupt


def save_past_a_limit(rank, ranks, port, model, limit, **changes) -> tuple[str, str]:
    """A checkpoint, then one with files of at most `limit` bytes, which is what a full disk does to a write."""
    import resource

    from ta_opd.errors import TaOpdError

    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    trainer.save(0, EXTRA)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        trainer.save(1, EXTRA)
    except TaOpdError as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    return "went on", ""


def save_forever(rank, ranks, port, model, **changes) -> None:
    """Checkpoint after checkpoint, until the process is killed."""
    trainer, start = make_trainer(rank, ranks, port, model, **changes)
    for rollout in range(start, 10**6):
        trainer.save(rollout, EXTRA)


def save_many(rank, ranks, port, model, rollouts, **changes) -> None:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    for rollout in rollouts:
        trainer.save(rollout, EXTRA)


def beside_another_adam(rank, ranks, port, case, **kwargs):
    """A case as it runs where Transformer Engine or apex is installed: megatron-core has found their Adam."""
    import megatron.core.optimizer as found
    from megatron.core.optimizer import distrib_optimizer

    held = found.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE
    found.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = False, True
    try:
        return globals()[case](rank, ranks, port, **kwargs)
    finally:
        found.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = held


def load_then_save(rank, ranks, port, model, data, **changes) -> None:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    trainer.save(5, EXTRA)


def load_error(rank, ranks, port, model, data, **changes) -> tuple[str, str] | None:
    """(name, text) of the error that building and loading raises, or None."""
    try:
        make_trainer(rank, ranks, port, model, **changes)
    except Exception as error:
        return type(error).__name__, str(error)


def save_error(rank, ranks, port, model, **changes) -> tuple[str, str] | None:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    try:
        trainer.save(0, {"a function": make_args})
    except Exception as error:
        return type(error).__name__, str(error)


def train_and_save(rank, ranks, port, model, data, **changes) -> dict:
    trainer, start = make_trainer(rank, ranks, port, model, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    trainer.train(0, own)
    trainer.save(0, {})
    return {"start": start, "weights": export(trainer)}


def save_hf(rank, ranks, port, model, out, **changes) -> dict[str, np.ndarray]:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    trainer.save_hf(out)
    return export(trainer)


def train_lists(rank, ranks, port, model, batches, **changes) -> dict:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    metrics = [trainer.train(i, mt_tiny.shard_steps(b, trainer.dp_rank, trainer.dp_size)) for i, b in enumerate(batches)]
    return {"metrics": metrics, "weights": export(trainer)}


def train_not_finite(rank, ranks, port, model, data, **changes) -> dict:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    out = {"error": None, "metrics": None}
    try:
        out["metrics"] = trainer.train(0, mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size))
    except Exception as error:
        out["error"] = (type(error).__name__, str(error))
    out["changed"] = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    return out


def train_error(rank, ranks, port, model, data, **changes) -> tuple[str, str] | None:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    try:
        trainer.train(0, mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size))
    except Exception as error:
        return type(error).__name__, str(error)


def learning_rates(rank, ranks, port, model, data, steps, **changes) -> list[float]:
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    return [trainer.train(i, data)["lr"] for i in range(steps)]


def exact(rank, ranks, port, model, data, held_bytes: int | None = None, **changes) -> dict:
    """Exact statistics by sample; held_bytes: of the teacher's hidden states that may wait for the student."""
    from slime.backends.megatron_utils import exact as module

    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    teacher, turns = trainer.stepper.teacher, []
    trainer.stepper.teacher = lambda batches: turns.append(len(batches)) or teacher(batches)
    whole, module.HELD_BYTES = module.HELD_BYTES, held_bytes or module.HELD_BYTES
    try:
        found = trainer.exact_metrics(own)
    finally:
        module.HELD_BYTES = whole
    assert (len(turns) > 1) == (held_bytes is not None), f"the teacher's turns: {turns}"
    return {i: {name: values[n] for name, values in found.items()} for n, i in enumerate(own["sample_indices"])}


def recompute_gradients(rank, ranks, port, model, data, **changes) -> dict:
    """Gradients of one step, this rank's: recomputed in full, without what is not read, not recomputed, without Triton kernels; counted
    products."""
    from torch.utils.flop_counter import FlopCounterMode

    from slime.backends.megatron_utils import cpu_runtime, packing, trunk_ops
    from slime.backends.megatron_utils.model import unwrap

    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    own = trainer.prepare(mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size))
    step, block = own["steps"][0], unwrap(trainer.model).decoder
    grads, operations = {}, {}
    ways = {"all": (False, "full", True), "left out": (True, "full", True), "kept": (True, None, True), "torch": (True, "full", False)}
    for name, way in ways.items():
        block.leave_out, block.config.recompute_granularity, trunk_ops.KERNELS = way
        trainer.model.zero_grad_buffer()
        with cpu_runtime.cpu_runtime(), FlopCounterMode(display=False) as counter:
            trainer.stepper.gradients(own, step)
        grads[name] = [p.main_grad.clone() for p in trainer.model.parameters()]
        operations[name] = counter.get_total_flops()
    trunk_ops.KERNELS = True
    per_block = changes["recompute_num_layers"] if changes["recompute_method"] == "uniform" else 1
    covered = len(block.layers) if changes["recompute_method"] == "uniform" else changes["recompute_num_layers"]
    ends = [layer for i, layer in enumerate(block.layers, 1) if i % per_block == 0 and i <= covered and layer.can_leave_out]
    rows = trainer.settings.opd_loss_rows
    batches = trainer.stepper.pack(own, step["indices"], lambda d, i: packing.choose_rows(d, i, rows, False))
    products = 0
    for batch in batches:
        for layer in ends:
            selected = layer.is_last and batch.layout.select_rows
            size = batch.layout.last_layer_rows.numel() if selected else batch.tokens.numel()
            products += 2 * size * layer.mlp.linear_fc2.weight.numel()
    return {
        "equal": {name: all(torch.equal(a, b) for a, b in zip(grads["all"], g, strict=True)) for name, g in grads.items()},
        "error": {name: max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(grads["all"], g, strict=True))
                  for name, g in grads.items()},
        "size": sum(float(g.abs().sum()) for g in grads["all"]),
        "saved": operations["all"] - operations["left out"],
        "products": products,
        "row_queries": sum(b.layout.row_queries is not None for b in batches),
    }  # fmt: skip
