"""--optimizer-cpu-offload: every bit of the state on the device, in every layout; checkpoints both ways; chunks; what is refused."""

import contextlib
import itertools
import types

import numpy as np
import pytest
from conftest import data

from ta_opd.errors import ConfigError

DISTRIBUTED = dict(use_distributed_optimizer=True)
BF16 = dict(fp32=False, bf16=True)
TP2 = dict(ranks=2, tensor_model_parallel_size=2, sequence_parallel=True)
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
CASES = {
    "one_fp32": ("qwen3", dict(ranks=1)),
    "one_bf16": ("qwen3", dict(ranks=1, **BF16)),
    "one_distributed_bf16": ("qwen3", dict(ranks=1, **DISTRIBUTED, **BF16)),
    "dp2_fp32": ("qwen3", dict(ranks=2, **DISTRIBUTED)),
    "dp2_bf16": ("qwen3", dict(ranks=2, **DISTRIBUTED, **BF16)),
    "dp2_bf16_gradients": ("qwen3", dict(ranks=2, **DISTRIBUTED, **BF16, accumulate_allreduce_grads_in_fp32=False)),
    "tp2_fp32": ("qwen3", dict(**TP2)),
    "tp2_bf16": ("qwen3", dict(**TP2, **BF16)),
    "tp2_bf16_gradients": ("qwen3", dict(**TP2, **BF16, accumulate_allreduce_grads_in_fp32=False)),
    "tp2_dp2_bf16_overlap": ("qwen3", dict(**{**TP2, "ranks": 4}, **OVERLAP, **BF16)),
    "ep2_bf16": ("qwen3_moe", dict(ranks=2, expert_model_parallel_size=2, **DISTRIBUTED, **BF16)),
}
QUICK = ("one_fp32", "one_bf16", "dp2_bf16_gradients", "tp2_dp2_bf16_overlap", "ep2_bf16")
SMALL = 12 * 160  # bytes of a chunk: 160 parameters, no divisor of any tensor here


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["norms"] == theirs["norms"] and ours["losses"] == theirs["losses"]
        for kind in ("state", "weights"):
            assert ours[kind].keys() == theirs[kind].keys()
            for name, values in theirs[kind].items():
                np.testing.assert_array_equal(ours[kind][name], values, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_every_bit_is_that_of_the_state_on_the_device(pool, models, case):
    family, layout = CASES[case]
    common = dict(model=models(family, True, intermediate_size=72), data=data(), clip_grad=0.05, lr=1e-2, **layout)
    resident = pool.run("mt_host_cases.optimizer_state", **common)
    moved = pool.run("mt_host_cases.optimizer_state", optimizer_cpu_offload=True, chunk_bytes=SMALL, **common)
    assert_same(moved, resident)
    for rank in moved:
        assert min(rank["norms"]) > 0.05, "nothing was clipped"
        assert rank["groups"] >= 2 and rank["chunks"] > 2 * rank["pieces"]
        kinds = ("main", "exp_avg", "exp_avg_sq") if layout.get("bf16") else ("exp_avg", "exp_avg_sq")
        assert rank["on_host"] == {(k, True) for k in kinds} and rank["step_devices"] == {"cpu"}
        parameters = sum(v.size for n, v in rank["state"].items() if n.endswith("main"))
        assert 4 * len(kinds) * parameters <= rank["host_bytes"] < 4 * len(kinds) * (parameters + 16 * rank["pieces"])
        assert all(float(v) == 3.0 for n, v in rank["state"].items() if n.endswith("step"))
        assert any(np.abs(v).max() > 0 for n, v in rank["state"].items() if n.endswith("exp_avg"))
    assert not resident[0]["on_host"] and resident[0]["chunks"] == 0


ONE = dict(ranks=1, **DISTRIBUTED, **BF16)
TWO = dict(ranks=2, **DISTRIBUTED, **BF16)
EP2 = dict(ranks=2, expert_model_parallel_size=2, **DISTRIBUTED, **BF16)
LATER = {  # layout of the save, of the load, whether the state is on the host then
    "to_the_device": (TWO, TWO, True, False),
    "to_the_host": (TWO, TWO, False, True),
    "to_the_host_elsewhere": (TWO, ONE, False, True),
    "fp32_to_the_host": (dict(ranks=1), dict(ranks=1), False, True),
    "experts_to_the_device": (EP2, EP2, True, False),
    "experts_to_the_host": (EP2, EP2, False, True),
    "plain_to_the_host": (dict(ranks=1, **BF16), dict(ranks=1, **BF16), True, True),
}


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n in ("to_the_device", "to_the_host_elsewhere", "plain_to_the_host") else pytest.mark.slow) for n in LATER])
def test_a_run_goes_on_with_the_flag_or_without(pool, models, tmp_path, case):
    source, target, before, after = LATER[case]
    common = dict(model=models("qwen3_moe" if "experts" in case else "qwen3"), data=data(), save=str(tmp_path / "run"), chunk_bytes=SMALL)
    whole = pool.run("mt_host_cases.optimizer_state", steps=3, save_at=1, optimizer_cpu_offload=before, **common, **source)
    again = pool.run("mt_host_cases.optimizer_state", steps=1, optimizer_cpu_offload=after, load=str(tmp_path / "run"), **common, **target)
    assert {r["start"] for r in again} == {2} and bool(again[0]["on_host"]) == after
    assert all(held for r in again for _, held in r["on_host"])
    if source == target:
        for rank in whole:
            rank["norms"], rank["losses"] = rank["norms"][2:], rank["losses"][2:]
        assert_same(again, whole)
    else:
        assert again[0]["norms"][0] == pytest.approx(whole[0]["norms"][2], rel=1e-2)
        assert {float(v) for n, v in again[0]["state"].items() if n.endswith("step")} == {3.0}
        for key in ("main", "exp_avg", "exp_avg_sq"):
            sums = [sum(np.abs(v, dtype=np.float64).sum() for r in ranks for n, v in r["state"].items() if n.endswith(key)) for ranks in (whole, again)]
            assert sums[1] == pytest.approx(sums[0], rel=1e-2), key


def test_a_skipped_step_and_weights_loaded_alone(pool, models, tmp_path):
    """A NaN is not applied; a checkpoint without its optimizer gives main weights of the loaded ones."""
    import copy

    bad = copy.deepcopy(data())
    bad["teacher_log_probs"][1][int(np.flatnonzero(bad["opd_weights"][1])[0])] = np.nan
    common = dict(model=models("qwen3"), opd_loss_type="sampled_reverse_kl", output_dir=str(tmp_path), skip_nan_steps=True, **BF16)
    alone = pool.run("train_lists", 1, batches=[data()], **common)[0]
    both = pool.run("train_lists", 1, batches=[bad, data()], optimizer_cpu_offload=True, **common)[0]
    assert [m["steps_skipped"] for m in both["metrics"]] == [1.0, 0.0]
    for name, expected in alone["weights"].items():
        np.testing.assert_array_equal(both["weights"][name], expected, err_msg=name)
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), lr=1e-2, **BF16)
    pool.run("mt_host_cases.optimizer_state", 1, steps=1, save_at=0, **common)
    resident, moved = (
        pool.run("mt_host_cases.optimizer_state", 1, steps=1, load=str(tmp_path / "run"), no_load_optim=True, optimizer_cpu_offload=on, **common)
        for on in (False, True)
    )
    assert_same(moved, resident)


@pytest.mark.parametrize(("sizes", "width"), [((5, 33, 16, 7), 32), ((1,), 16), ((300, 1, 300), 160), ((64, 64), 1024)])
def test_chunks_cover_every_element_once_and_end_at_whole_vectors(sizes, width):
    import torch

    from slime.backends.megatron_utils.host_state import ALIGN, Piece, _cut

    pieces, offset = [], 0
    for n, size in enumerate(sizes):
        weight = torch.zeros(size, dtype=torch.bfloat16)
        pieces.append(Piece(torch.zeros(size), weight, None, group=n // 2, offset=offset))
        offset += -(-size // ALIGN) * ALIGN
    seen = {id(p): [] for p in pieces}
    for chunk in _cut(pieces, width):
        assert 0 < chunk.stop - chunk.start <= width
        for piece, begin, end in chunk.parts:
            assert piece.group == chunk.group and begin % ALIGN == 0 and (end % ALIGN == 0 or end == piece.main.numel())
            assert chunk.start <= piece.offset + begin and piece.offset + end <= chunk.stop
            seen[id(piece)] += list(range(begin, end))
    assert all(seen[id(p)] == list(range(p.main.numel())) for p in pieces)


class Streams:
    """Work on streams that runs late, in the order of a priority: whatever no event holds back goes ahead of the rest."""

    def __init__(self):
        self.queues: dict[object, list] = {}
        self.current = None

    def run(self, priority: list) -> None:
        while any(self.queues.values()):
            for stream in priority:
                queue = self.queues[stream]
                if queue and (not isinstance(queue[0], Event) or queue[0].done):
                    work = queue.pop(0)
                    if callable(work):
                        work()
                    break
            else:
                raise AssertionError("the streams wait for each other")


class Event:
    done = False

    def set(self) -> None:
        self.done = True


class Stream:
    def __init__(self, streams: Streams):
        self.streams, self.priority = streams, None
        streams.queues[self] = []

    def record_event(self) -> Event:
        event = Event()
        self.streams.queues[self].append(event.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.streams.queues[self].append(event)

    def wait_stream(self, other) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.streams.run(self.priority)


@pytest.mark.parametrize("priority", list(itertools.permutations(range(3))))
def test_no_stream_runs_ahead_of_what_it_needs(monkeypatch, priority):
    """Copies and steps run late and in the worst orders that the events allow: the bits of AdamW on the whole."""
    import torch
    from torch.overrides import TorchFunctionMode

    from slime.backends.megatron_utils import host_state

    streams = Streams()
    made, compute = [], Stream(streams)

    def make(device=None):
        made.append(Stream(streams))
        return made[-1]

    @contextlib.contextmanager
    def on(stream):
        streams.current = stream
        yield
        streams.current = None

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    drawn = torch.Generator().manual_seed(0)
    models = [torch.randn(n, generator=drawn).bfloat16() for n in (500, 33, 700)]
    for model in models:
        model.main_grad = torch.randn(model.shape, generator=drawn)
    mains = [m.float() for m in models]
    whole = [m.clone() for m in mains]
    adam, plain = (torch.optim.AdamW(x, lr=1e-2, fused=True, foreach=False) for x in (mains, whole))
    part = types.SimpleNamespace(optimizer=adam, float16_groups=[models], fp32_from_float16_groups=[mains])
    held = host_state.HostState(part, 12 * 64)
    for piece, value in zip(held.pieces, whole, strict=True):
        piece.main.data.copy_(value)
    update = held._update

    def later(chunk, stage, widened):
        state = adam.state[chunk.parts[0][0].main]
        counted = state["step"].clone()  # read when the work is queued

        def work():
            now, state["step"] = state["step"], counted
            update(chunk, stage, widened)
            state["step"] = now

        streams.queues[compute].append(work)

    held._update = later

    class Queued(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_ and streams.current is not None:
                streams.queues[streams.current].append(lambda: args[0].copy_(args[1]))
                return args[0]
            return func(*args, **(kwargs or {}))

    order = [(compute, *made)[i] for i in priority]
    for stream in made:
        stream.priority = order
    held.clip = 0.3
    for _ in range(2):
        for model, value in zip(models, whole, strict=True):
            model.main_grad = torch.randn(model.shape, generator=drawn)
            value.grad = model.main_grad * 0.3
        with Queued():
            held.step()
        plain.step()
        assert len(held.chunks) > 3 * host_state.SLOTS and not any(streams.queues.values())
        for piece, value, model in zip(held.pieces, whole, models, strict=True):
            assert torch.equal(piece.main.data, value) and torch.equal(model, value.bfloat16())
            for kind in host_state.MOMENTS:
                assert torch.equal(adam.state[piece.main][kind], plain.state[value][kind])


def test_moments_of_a_checkpoint_go_straight_to_host_memory(monkeypatch):
    """Never where the weights are (torch's own loader puts them there first): these have no memory at all."""
    import torch

    from slime.backends.megatron_utils import host_state

    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: None)
    weights = [torch.zeros(n, device="meta") for n in (40, 7)]
    adam = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], lr=1.0)
    held = host_state.HostState(types.SimpleNamespace(optimizer=adam))
    found = {i: {"exp_avg": torch.randn(w.shape), "exp_avg_sq": torch.rand(w.shape), "step": torch.tensor(5.0)} for i, w in enumerate(weights)}
    groups = [{**group, "params": [i], "lr": 0.25} for i, group in enumerate(adam.param_groups)]
    adam.load_state_dict({"state": found, "param_groups": groups})
    for i, (weight, begin) in enumerate(zip(weights, (0, 48), strict=True)):
        for kind in host_state.MOMENTS:
            assert torch.equal(held.host[kind][begin : begin + weight.numel()], found[i][kind])
            assert adam.state[weight][kind].data_ptr() == held.host[kind][begin:].data_ptr()
    assert [float(adam.state[w]["step"]) for w in weights] == [5.0, 5.0] and adam.state[weights[0]]["step"] is not adam.state[weights[1]]["step"]
    assert [g["lr"] for g in adam.param_groups] == [0.25, 0.25] and [g["params"][0] is w for g, w in zip(adam.param_groups, weights, strict=True)] == [True, True]


@pytest.mark.parametrize(("nodes", "refused"), [(("a", "a"), True), (("a", "b"), False)])
def test_too_little_host_memory_is_refused(monkeypatch, nodes, refused):
    """Two ranks that each want 60 % of what is left: not on one node, though each of them alone would fit."""
    import torch

    from slime.backends.megatron_utils import host_state

    weight = torch.nn.Parameter(torch.zeros(60, dtype=torch.float32))
    part = types.SimpleNamespace(optimizer=torch.optim.AdamW([weight]))
    left = 8 * 64 * 10 // 6
    monkeypatch.setattr(host_state.memory, "available", lambda: left)
    monkeypatch.setattr(host_state.distributed, "gather_objects", lambda own: [(node, *own[1:]) for node in nodes])
    expected = pytest.raises(ConfigError, match="of the 2 ranks on a, .*--use-distributed-optimizer") if refused else contextlib.nullcontext()
    with expected:
        host_state.check_host_memory([part])
