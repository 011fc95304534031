"""--optimizer-cpu-offload: every bit of the state on the device, in every layout; checkpoints both ways; chunks; what is refused."""

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
    resident = pool.run("optimizer_state", **common)
    moved = pool.run("optimizer_state", optimizer_cpu_offload=True, chunk_bytes=SMALL, **common)
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
LATER = {  # layout of the save, of the load, whether the state is on the host then
    "to_the_device": (TWO, TWO, True, False),
    "to_the_host": (TWO, TWO, False, True),
    "to_the_host_elsewhere": (TWO, ONE, False, True),
    "fp32_to_the_host": (dict(ranks=1), dict(ranks=1), False, True),
    "plain_to_the_host": (dict(ranks=1, **BF16), dict(ranks=1, **BF16), True, True),
}


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n in ("to_the_device", "to_the_host_elsewhere", "plain_to_the_host") else pytest.mark.slow) for n in LATER])
def test_a_run_goes_on_with_the_flag_or_without(pool, models, tmp_path, case):
    source, target, before, after = LATER[case]
    common = dict(model=models("qwen3"), data=data(), save=str(tmp_path / "run"), chunk_bytes=SMALL)
    whole = pool.run("optimizer_state", steps=3, save_at=1, optimizer_cpu_offload=before, **common, **source)
    again = pool.run("optimizer_state", steps=1, optimizer_cpu_offload=after, load=str(tmp_path / "run"), **common, **target)
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
    pool.run("optimizer_state", 1, steps=1, save_at=0, **common)
    resident, moved = (
        pool.run("optimizer_state", 1, steps=1, load=str(tmp_path / "run"), no_load_optim=True, optimizer_cpu_offload=on, **common)
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


def test_too_little_host_memory_is_refused():
    import torch

    from slime.backends.megatron_utils import host_state

    with pytest.raises(ConfigError, match="--optimizer-cpu-offload: expected .* GiB of host memory .*--use-distributed-optimizer"):
        host_state._host_buffers(host_state.KINDS, 2**44, torch.device("cpu"))
