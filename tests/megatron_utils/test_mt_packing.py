"""Packing: bins, cuts, offsets, context-parallel chunks. Pure functions, checked against spelled-out expectations."""

import mt_tiny
import numpy as np
import pytest
import torch

from slime.backends.megatron_utils.packing import Parallel, balanced_bins, choose_rows, every_row, pack
from ta_opd.errors import ConfigError, DataError

FIELDS = ["opd_weights", "teacher_topk_ids", "rollout_log_probs"]


def kept(data, i):
    return choose_rows(data, i, "kept", False)


def rows_of(batches) -> dict:
    """(sample, position) -> (target, weight, ids) of every row of the loss."""
    found = {}
    for b in batches:
        for r in range(b.num_grad):
            key = (int(b.sample[r]), int(b.response_position[r]))
            assert key not in found
            found[key] = (int(b.fields["target"][r]), float(b.fields["opd_weights"][r]), b.fields["teacher_topk_ids"][r].tolist())
    return found


def expected_rows(data) -> dict:
    out = {}
    for s, weights in enumerate(data["opd_weights"]):
        prompt = len(data["tokens"][s]) - data["response_lengths"][s]
        for p in np.flatnonzero(weights):
            out[s, int(p)] = (int(data["tokens"][s][prompt + p]), float(weights[p]), data["teacher_topk_ids"][s][p].tolist())
    return out


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_kept_token_is_one_row_of_its_predictor(cp, sequence_parallel):
    data = mt_tiny.make_data(seed=3, samples=7)
    batches = []
    for rank in range(cp):
        parallel = Parallel(tp=2, cp=cp, cp_rank=rank, sequence_parallel=sequence_parallel)
        own = pack(data, range(7), kept, max_tokens=40, parallel=parallel, field_names=FIELDS)
        for b in own:
            assert b.tokens.shape == b.positions.shape and b.tokens.shape[0] == 1
            assert not sequence_parallel or b.tokens.shape[1] % 2 == 0
            assert b.tokens.shape[1] <= 40 + (2 * cp if sequence_parallel else 0)
            for r in range(b.num_grad):
                s, p, at = int(b.sample[r]), int(b.response_position[r]), int(b.row_index[r])
                predictor = len(data["tokens"][s]) - data["response_lengths"][s] + p - 1
                assert int(b.positions[0, at]) == predictor
                assert int(b.tokens[0, at]) == data["tokens"][s][predictor]
        batches += own
    assert rows_of(batches) == expected_rows(data)


def test_sequences_end_at_the_predictor_of_their_last_kept_token():
    data = mt_tiny.make_data(seed=1, samples=3)
    data["opd_weights"] = [np.zeros_like(w) for w in data["opd_weights"]]
    data["opd_weights"][1][1] = 1.0
    (batch,) = pack(data, range(3), kept, max_tokens=100, parallel=Parallel(), field_names=FIELDS)
    prompt = len(data["tokens"][1]) - data["response_lengths"][1]
    assert batch.tokens[0].tolist() == data["tokens"][1][: prompt + 1].tolist()
    assert batch.num_tokens == prompt + 1 and batch.row_index.tolist() == [prompt]
    assert batch.layout.last_layer_rows.tolist() == [prompt]


def test_statistics_rows_follow_the_rows_of_the_loss():
    data = mt_tiny.make_data(seed=2, samples=4)
    batches = pack(data, range(4), lambda d, i: choose_rows(d, i, "kept", True), max_tokens=64, parallel=Parallel(), field_names=FIELDS)
    for b in batches:
        weights = b.fields["opd_weights"]
        assert (weights[: b.num_grad] != 0).all() and (weights[b.num_grad :] == 0).all()
    seen = sorted((int(s), int(p)) for b in batches for s, p in zip(b.sample, b.response_position, strict=True))
    assert seen == sorted((s, int(p)) for s, m in enumerate(data["loss_masks"]) for p in np.flatnonzero(m))


def test_all_rows_have_weight_zero_where_not_kept():
    data = mt_tiny.make_data(seed=2, samples=4)
    batches = pack(data, range(4), lambda d, i: choose_rows(d, i, "all", True), max_tokens=64, parallel=Parallel(), field_names=FIELDS)
    assert sum(b.num_grad for b in batches) == sum(b.num_rows for b in batches) == sum(int(m.sum()) for m in data["loss_masks"])


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_segments(cp):
    """The ranks' chunks put together are the sequences; the keys of each chunk are the sequence up to its end."""
    data = mt_tiny.make_data(seed=5, samples=3)
    ranks = [
        pack(data, range(3), every_row, max_tokens=80, parallel=Parallel(cp=cp, cp_rank=r), field_names=[])[0] for r in range(cp)
    ]
    gathered_tokens = torch.cat([b.tokens[0] for b in ranks])
    gathered_positions = torch.cat([b.positions[0] for b in ranks])
    for b in ranks:
        layout = b.layout
        q, k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_kv.tolist()
        assert q[-1] == b.tokens.shape[1] and k[-1] == layout.kv_index.numel()
        for i in range(len(q) - 1):
            own_positions = b.positions[0, q[i] : q[i + 1]]
            keys = layout.kv_index[k[i] : k[i + 1]]
            assert gathered_positions[keys].tolist() == list(range(k[i + 1] - k[i]))
            assert own_positions.tolist() == list(range(k[i + 1] - k[i] - len(own_positions), k[i + 1] - k[i]))
            assert gathered_tokens[keys][own_positions].tolist() == b.tokens[0, q[i] : q[i + 1]].tolist()


def test_bins_are_balanced_and_within_capacity():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 60, rng.integers(1, 40)).tolist()
        bins = balanced_bins(sizes, 64)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
        loads = [sum(sizes[i] for i in b) for b in bins]
        assert max(loads) <= 64 and len(bins) <= 2 * -(-sum(sizes) // 64)
    loads = [sum(sizes) for sizes in ([10, 10, 10, 10],)]
    assert [len(b) for b in balanced_bins([10, 10, 10, 10], 20)] == [2, 2] and loads == [40]
    assert [len(b) for b in balanced_bins([10], 20, count=3)] == [1, 0, 0]


def test_ranks_with_less_get_padding_micro_batches():
    data = mt_tiny.make_data(seed=0, samples=2)
    for parallel in (Parallel(), Parallel(tp=2, sequence_parallel=True), Parallel(tp=2, cp=2, cp_rank=1, sequence_parallel=True)):
        batches = pack(data, [0], kept, max_tokens=64, parallel=parallel, field_names=FIELDS, agree=lambda n: 3)
        assert len(batches) == 3
        assert [b.num_tokens for b in batches][1:] == [0, 0]
        for b in batches[1:]:
            assert b.num_rows == 0 and b.fields["teacher_topk_ids"].shape == (0, 4)
            assert b.tokens.shape[1] % (2 if parallel.sequence_parallel else 1) == 0 and b.tokens.shape[1] > 0
            assert b.layout.last_layer_rows.numel() >= 1
    (batch,) = pack(data, [], kept, max_tokens=64, parallel=Parallel(), field_names=FIELDS)
    assert batch.num_rows == 0


def test_a_rank_without_any_sample_has_fields_of_the_right_kind():
    """More data-parallel ranks than samples: ids are integers of two dimensions there, too."""
    data = {name: [] for name in ("tokens", "response_lengths", "loss_masks", *FIELDS)}
    (batch,) = pack(data, [], kept, max_tokens=40, parallel=Parallel(), field_names=FIELDS)
    assert batch.num_rows == 0
    for name, dtype, dims in (("teacher_topk_ids", torch.int64, 2), ("opd_weights", torch.float32, 1), ("target", torch.int64, 1)):
        assert (batch.fields[name].dtype, batch.fields[name].dim()) == (dtype, dims), name


def test_too_long_and_without_prompt():
    data = mt_tiny.make_data(seed=0, samples=2)
    data["sample_indices"] = [70, 71]
    with pytest.raises(ConfigError, match=r"sample 7[01].*--max-tokens-per-gpu 4"):
        pack(data, range(2), every_row, max_tokens=4, parallel=Parallel(), field_names=[])
    data["tokens"][1] = data["tokens"][1][-data["response_lengths"][1] :]
    with pytest.raises(DataError, match="sample 71.*prompt"):
        pack(data, range(2), every_row, max_tokens=64, parallel=Parallel(), field_names=[])
