"""From one rank's samples to packed micro-batches: which rows, which tokens, in which bin, at which offset.

Shape letters: P prompt length, L response length, R rows, T packed tokens on this context-parallel rank, K top-k width.

A row is a response position whose token the loss (or a statistic) looks at. Position j is token P + j and is predicted
by the hidden state of token P + j - 1, so a sequence is cut after the predictor of its last row: causal attention makes
that exact. With context parallelism a sequence is padded to a multiple of 2 x CP, cut into 2 x CP chunks, and rank r
holds chunks r and 2CP - 1 - r; a row belongs to the rank that holds its predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.backends.megatron_utils.attention import PackedLayout, RowQueries
from slime.utils.fields import FIELDS
from ta_opd.errors import ConfigError, DataError


@dataclass(frozen=True)
class RowChoice:
    """Which response positions become rows. `grad`: bool [L], rows of the loss; `stat`: bool [L], looked at only."""

    grad: np.ndarray
    stat: np.ndarray


ROW_QUERY_SHARE = 0.25  # up to this share of the tokens as rows, masked attention of rows is less work than causal attention of all


# What a field looks like on a rank that has no sample at all.
_WITHOUT_SAMPLES = {f.name: np.zeros((0, 0) if f.shape == "LK" else 0, f.dtype) for f in FIELDS}


@dataclass(frozen=True)
class Parallel:
    """What packing must know of the layout."""

    tp: int = 1
    cp: int = 1
    cp_rank: int = 0
    sequence_parallel: bool = False


@dataclass(frozen=True)
class _Sequence:
    sample: int  # position in the data lists
    length: int  # tokens that enter the model, before padding
    positions: np.ndarray  # response positions that are rows: those of the loss first
    num_grad: int


@dataclass
class MicroBatch:
    """One packed micro-batch on this rank.

    tokens, positions: int64 [1, T]. row_index: int64 [R], packed index of each row's predictor, rows of the loss first
    (`num_grad` of them). fields: row-aligned tensors [R] or [R, K] by data name,
    and "target". sample, response_position: int64 [R]. num_tokens:
    real tokens on this rank (no padding).
    """

    tokens: Tensor
    positions: Tensor
    layout: PackedLayout
    row_index: Tensor
    num_grad: int
    fields: dict[str, Tensor]
    sample: Tensor
    response_position: Tensor
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.row_index.numel()


def choose_rows(data: dict, sample: int, rows: str, with_valid: bool) -> RowChoice:
    """Rows of one sample: `kept` (weight not 0) or `all` valid positions; `with_valid` adds the other valid ones."""
    kept = data["opd_weights"][sample] != 0
    valid = data["loss_masks"][sample] > 0
    grad = valid | kept if rows == "all" else kept
    return RowChoice(grad, valid & ~grad if with_valid else np.zeros_like(grad))


def every_row(data: dict, sample: int) -> RowChoice:
    """Every response position as a row that is only looked at."""
    length = data["response_lengths"][sample]
    return RowChoice(np.zeros(length, dtype=bool), np.ones(length, dtype=bool))


def pack(
    data: dict,
    indices: Sequence[int],
    choose: Callable[[dict, int], RowChoice],
    *,
    max_tokens: int,
    parallel: Parallel,
    field_names: Sequence[str],
    agree: Callable[[int], int] = lambda count: count,
    device: torch.device | str = "cpu",
    last_layer: str = "kept",
) -> list[MicroBatch]:
    """Packs the given samples into micro-batches of at most `max_tokens` tokens on each rank.

    indices: samples (positions in the data lists) of this step. choose: rows of a sample. field_names: per-token fields
    of `data` to align with the rows. agree: turns this rank's number of micro-batches into the one of all data-parallel
    ranks (a maximum); bins beyond the own need are filled with padding. Samples without rows are left out. last_layer: what
    the last layer computes for the needed rows only: "kept" its queries (where rows are few) and MLP, "mlp" its MLP, "all" nothing.
    Raises ConfigError for a sequence longer than max_tokens x CP, DataError for a sample without a prompt.
    """
    sequences = [s for s in (_sequence(data, i, choose(data, i)) for i in indices) if s is not None]
    multiple = 2 * parallel.cp if parallel.cp > 1 else 1
    sizes = [_round_up(s.length, multiple) for s in sequences]
    capacity = max_tokens * parallel.cp
    for sequence, size in zip(sequences, sizes, strict=True):
        if size > capacity:
            raise ConfigError(
                f"sample {_sample_name(data, sequence.sample)}: its {sequence.length} tokens do not fit into --max-tokens-per-gpu "
                f"{max_tokens} x context parallel {parallel.cp}; expected at least {-(-size // parallel.cp)}"
            )
    bins = balanced_bins(sizes, capacity)
    count = agree(len(bins))
    if count > len(bins):
        bins = balanced_bins(sizes, capacity, count)
    return [_assemble(data, [sequences[i] for i in b], parallel, multiple, field_names, device, last_layer) for b in bins]


def balanced_bins(sizes: Sequence[int], capacity: int, count: int = 0) -> list[list[int]]:
    """Indices of `sizes` in at least max(count, 1) bins, each within `capacity`, as equal as largest-first makes them.

    The number of bins is the smallest that largest-first finds, never below ceil(sum / capacity). Order inside a bin is
    the given one. Every size must fit the capacity.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    number = max(count, -(-sum(sizes) // capacity), 1)
    while True:
        loads, bins = [0] * number, [[] for _ in range(number)]
        for i in order:
            lightest = min(range(number), key=loads.__getitem__)
            if loads[lightest] + sizes[i] > capacity:
                break
            loads[lightest] += sizes[i]
            bins[lightest].append(i)
        else:
            return [sorted(b) for b in bins]
        number += 1


def _sequence(data: dict, sample: int, rows: RowChoice) -> _Sequence | None:
    grad, stat = np.flatnonzero(rows.grad), np.flatnonzero(rows.stat)
    if not len(grad) and not len(stat):
        return None
    prompt = len(data["tokens"][sample]) - data["response_lengths"][sample]
    if prompt < 1:
        raise DataError(f"sample {_sample_name(data, sample)}: expected at least one prompt token, got none")
    positions = np.concatenate([grad, stat])
    return _Sequence(sample, prompt + int(positions.max()), positions, len(grad))


def _sample_name(data: dict, sample: int) -> int:
    return data["sample_indices"][sample] if "sample_indices" in data else sample


def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _assemble(data, sequences, parallel: Parallel, multiple: int, field_names, device, last_layer: str) -> MicroBatch:
    """Lays the sequences of one bin behind each other, with padding where the layout asks for it."""
    lay = _Layout(parallel)
    grad, stat = _Rows(), _Rows()
    tokens = []
    for s in sequences:
        prompt = len(data["tokens"][s.sample]) - data["response_lengths"][s.sample]
        size = _round_up(s.length, multiple)
        padded = np.zeros(size, dtype=np.int64)
        padded[: s.length] = data["tokens"][s.sample][: s.length]
        local = lay.add(size)
        tokens.append(padded[local])
        for rows, positions in ((grad, s.positions[: s.num_grad]), (stat, s.positions[s.num_grad :])):
            packed = lay.packed_index(prompt + positions - 1)
            here = packed >= 0
            rows.add(s.sample, positions[here], packed[here])
    real = sum(_real_tokens(s.length, _round_up(s.length, multiple), parallel) for s in sequences)
    fill = lay.missing()
    if fill:
        tokens.append(np.zeros(fill * parallel.cp, dtype=np.int64)[lay.add(fill * parallel.cp)])
    index, sample, position = (np.concatenate([a, b]) for a, b in zip(grad.arrays(), stat.arrays(), strict=True))
    return MicroBatch(
        tokens=_to(np.concatenate(tokens), device)[None],
        positions=_to(np.concatenate(lay.positions), device)[None],
        layout=lay.packed_layout(_selected_rows(index, parallel), last_layer, device),
        row_index=_to(index, device),
        num_grad=len(grad.arrays()[0]),
        fields=_row_fields(data, sample, position, field_names, device),
        sample=_to(sample, device),
        response_position=_to(position, device),
        num_tokens=real,
    )


def _selected_rows(index: np.ndarray, parallel: Parallel) -> np.ndarray:
    """Rows for the last layer: the needed ones, at least one, padded for sequence parallelism."""
    multiple = parallel.tp if parallel.sequence_parallel else 1
    size = max(_round_up(len(index), multiple), multiple)
    return np.concatenate([index, np.zeros(size - len(index), dtype=np.int64)])


def _row_queries(rows: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray, device) -> RowQueries:
    """How rows (packed indices) attend, from the bounds of the segments' queries and keys."""
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    segment = np.searchsorted(cu_q, rows, side="right") - 1
    # bottom-right causal: the segment's last query sees all its keys
    seen = np.diff(cu_k)[segment] - (cu_q[segment + 1] - 1 - rows)
    bounds = [(int(r[0]), int(r[-1]) + 1, int(segment[r[0]])) for r in _runs(segment)]
    return RowQueries(
        order=_to(order, device),
        keys_seen=_to(seen.astype(np.int64), device),
        segments=[(first, end, int(cu_k[s]), int(cu_k[s + 1])) for first, end, s in bounds],
    )


def _real_tokens(length: int, size: int, parallel: Parallel) -> int:
    if parallel.cp == 1:
        return length
    return int((_held(size, parallel) < length).sum())


def _held(size: int, parallel: Parallel) -> np.ndarray:
    """Positions of a padded sequence that this context-parallel rank holds, in its packed order."""
    if parallel.cp == 1:
        return np.arange(size)
    chunk = size // (2 * parallel.cp)
    first, second = parallel.cp_rank * chunk, (2 * parallel.cp - 1 - parallel.cp_rank) * chunk
    return np.concatenate([np.arange(first, first + chunk), np.arange(second, second + chunk)])


def _row_fields(data, sample: np.ndarray, position: np.ndarray, names, device) -> dict[str, Tensor]:
    """Row-aligned tensors (int64 or float32) of the given fields, and the target token of each row."""
    lengths = data["response_lengths"]
    runs = [(int(sample[r[0]]), position[r]) for r in _runs(sample)]
    targets = [data["tokens"][s][len(data["tokens"][s]) - lengths[s] + at] for s, at in runs]
    fields = {"target": _to(_join(targets, np.int64), device)}
    for name in names:
        if name in data:
            like = data[name][0] if data[name] else _WITHOUT_SAMPLES.get(name, np.zeros(0))
            dtype = np.int64 if like.dtype.kind in "iu" else np.float32
            fields[name] = _to(_join([data[name][s][at] for s, at in runs] or [like[:0]], dtype), device)
    return fields


def _runs(sample: np.ndarray) -> list[np.ndarray]:
    """Indices of consecutive rows of one sample."""
    return [r for r in np.split(np.arange(len(sample)), np.flatnonzero(np.diff(sample)) + 1) if len(r)]


def _join(parts: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _to(array: np.ndarray, device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class _Rows:
    """Rows of one kind, sample after sample."""

    def __init__(self):
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, sample: int, positions: np.ndarray, packed: np.ndarray) -> None:
        self._parts.append((packed, np.full(len(packed), sample, dtype=np.int64), positions))

    def arrays(self) -> list[np.ndarray]:
        """[packed index, sample, response position], int64 [R] each."""
        empty = np.zeros(0, dtype=np.int64)
        return [np.concatenate([empty, *(p[i] for p in self._parts)]).astype(np.int64) for i in range(3)]


class _Layout:
    """Offsets of sequences in one packed micro-batch, and the segments that attention sees."""

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self.total = 0
        self.positions: list[np.ndarray] = []
        self._q: list[int] = []
        self._k: list[int] = []
        self._keys: list[tuple[int, int, int]] = []  # (offset, chunk, keys) of each segment, for context parallelism
        self._last = (0, 0)  # offset and padded size of the sequence added last

    def add(self, size: int) -> np.ndarray:
        """Appends a sequence of `size` tokens (padded); returns the positions this rank holds."""
        p = self.parallel
        held = _held(size, p)
        self._last = (self.total, size)
        self.positions.append(held)
        if p.cp == 1:
            self._q.append(size)
            self._k.append(size)
        else:
            chunk = size // (2 * p.cp)
            for number in (p.cp_rank, 2 * p.cp - 1 - p.cp_rank):
                keys = (number + 1) * chunk
                self._q.append(chunk)
                self._k.append(keys)
                self._keys.append((self.total, chunk, keys))
        self.total += len(held)
        return held

    def packed_index(self, positions: np.ndarray) -> np.ndarray:
        """Packed index of positions of the sequence added last; -1 where another context-parallel rank holds it."""
        offset, size = self._last
        if self.parallel.cp == 1:
            return offset + positions
        where = np.full(size, -1, dtype=np.int64)
        held = self.positions[-1]
        where[held] = offset + np.arange(len(held))
        return where[positions]

    def missing(self) -> int:
        """Tokens on this rank still to be filled: to a multiple of TP under sequence parallelism; never an empty batch."""
        p = self.parallel
        multiple = p.tp if p.sequence_parallel else 1
        even = 2 if p.cp > 1 else 1
        fill = -self.total % multiple if self.total else multiple
        while fill % even:
            fill += multiple
        return fill

    def packed_layout(self, rows: np.ndarray, last_layer: str, device) -> PackedLayout:
        cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (self._q, self._k))
        few = last_layer == "kept" and len(rows) <= ROW_QUERY_SHARE * self.total
        return PackedLayout(
            cu_seqlens_q=_to(cu_q, device),
            cu_seqlens_kv=_to(cu_k, device),
            max_seqlen_q=max(self._q),
            max_seqlen_kv=max(self._k),
            kv_index=_to(self._kv_index(), device) if self.parallel.cp > 1 else None,
            last_layer_rows=_to(rows, device),
            select_rows=last_layer != "all",
            row_queries=_row_queries(rows, cu_q, cu_k, device) if few else None,
        )

    def _kv_index(self) -> np.ndarray:
        """Where each attended key lies among the all-gathered keys of the context-parallel ranks."""
        cp = self.parallel.cp
        parts = []
        for offset, chunk, keys in self._keys:
            position = np.arange(keys)
            number = position // chunk
            rank = np.where(number < cp, number, 2 * cp - 1 - number)
            within = offset + np.where(number < cp, 0, chunk) + position % chunk
            parts.append(rank * self.total + within)
        return np.concatenate(parts).astype(np.int64)
