"""Has a SGLang server score prompts without waiting for the GPU, and keep what comes of it as arrays until the reply.

SGLang 0.5.17 turns the logits of scored positions into float32, copies them, takes a log-softmax of all columns and a radix `topk`,
and chooses its rows by masks whose size the host has to wait for, so that the GPU idles while results are turned into lists. For
Qwen3-4B and K = 16 on an H200 those passes were 15 % of the GPU's work, and it idled another 12 % of the time. Here
- which rows belong to which request is computed on the host from lengths that it has;
- the logits stay in the dtype that the LM head wrote and are read once (`vocab_rows`);
- log-probs, top-K and log-probs of asked ids go to the host while the next batch runs.
The numbers are those of a float32 log-softmax to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class _HostCopy:
    """Tensors being copied to the host without waiting for it; `arrays` waits."""

    def __init__(self, *tensors):
        import torch

        self.event, self.host = None, tensors
        if tensors[0].is_cuda:
            self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            self.event = torch.cuda.Event()
            self.event.record()
            self.device = tensors  # the source must outlive the copy

    def arrays(self) -> list[np.ndarray]:
        """float32 for floats, int32 for ids"""
        if self.event is not None:
            self.event.synchronize()
            self.event = self.device = None
        if not isinstance(self.host[0], np.ndarray):
            self.host = [(t.float() if t.is_floating_point() else t.int()).numpy() for t in self.host]
        return self.host


class _Part:
    """Some positions of one prompt in a chunk's copy: rows [begin, end) of it, or with `flat` entries [begin, end) of [positions, width]."""

    def __init__(self, copy: _HostCopy, begin: int, end: int, width: int, flat: bool = False):
        self.copy, self.begin, self.end, self.width, self.flat = copy, begin, end, width, flat

    def arrays(self) -> list[np.ndarray]:
        """Each [positions, width]"""
        found = [a[self.begin : self.end] for a in self.copy.arrays()]
        return [a.reshape(-1, self.width) for a in found] if self.flat else [a[:, : self.width] for a in found]


def _joined(parts: list[list[_Part]], width: int, dtypes: Sequence[type]) -> list[np.ndarray]:
    """[positions, width] of each kind, over the chunks of a prompt and of its prefill."""
    found = [part.arrays() for several in parts for part in several]
    return [np.concatenate([f[n] for f in found]) if found else np.empty((0, width), dtype) for n, dtype in enumerate(dtypes)]


def _rows_as_written(module) -> None:
    """layers.logits_processor: logits of scored rows keep the LM head's dtype."""
    cls = module.LogitsProcessor
    plain = cls._copy_logits_to_buffer

    def _copy_logits_to_buffer(self, logits, logits_metadata, use_buffer=True):
        if use_buffer or self.final_logit_softcapping or not getattr(logits_metadata, "rows_as_written", False):
            return plain(self, logits, logits_metadata, use_buffer=use_buffer)
        return logits[:, : self.vocab_size]

    cls._copy_logits_to_buffer = _copy_logits_to_buffer


def _score_without_waiting(module) -> None:
    """layers.logprob_processor: log-probs of a prefill's scored rows."""
    import torch

    from slime.backends.sglang_utils import vocab_rows

    def on_device(values: Sequence[int] | np.ndarray, device):
        on_host = torch.from_numpy(np.asarray(values, np.int64))
        return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)

    def gather(logits, log_z, spans: list[tuple[int, int, list[int]]]) -> list[_Part]:
        """Log-probs of each span's ids at each of its rows, in one copy."""
        lengths = [(end - begin, len(ids)) for begin, end, ids in spans]
        rows = np.concatenate([np.repeat(np.arange(begin, end), len(ids)) for begin, end, ids in spans])
        columns = np.concatenate([np.tile(np.asarray(ids, np.int64), end - begin) for begin, end, ids in spans])
        rows, columns = on_device(rows, logits.device), on_device(columns, logits.device)
        copy = _HostCopy(logits[rows, columns].float() - log_z[rows])
        ends = np.cumsum([n * width for n, width in lengths])
        return [_Part(copy, int(end) - n * width, int(end), width, flat=True) for end, (n, width) in zip(ends, lengths, strict=True)]

    def _forward_by_chunk(self, pruned_states, sample_indices, input_logprob_indices, token_to_seq_idx, lm_head, get_logits_fn, logits_metadata,
                          chunk_size):  # fmt: skip
        """(LogprobResult, logits of the rows that sample [requests, V] float32).

        A request has one row a scored position; one without any has a row that samples, and every request's last row does.
        """
        meta, total, device = logits_metadata, pruned_states.shape[0], pruned_states.device
        scored = meta.extend_logprob_pruned_lens_cpu
        ends = np.cumsum([max(n, 1) for n in scored]).tolist()
        widths = meta.top_logprobs_nums if meta.extend_return_top_logprob else [0] * len(scored)
        asked = meta.token_ids_logprobs if meta.extend_token_ids_logprob else [None] * len(scored)
        count = input_logprob_indices.shape[0]
        tokens = torch.zeros(total, dtype=torch.int64, device=device)
        tokens.index_copy_(0, input_logprob_indices, meta.extend_input_logprob_token_ids_gpu[:count].to(torch.int64))
        token_log_probs, sampled = [], []
        tops, gathered = [[] for _ in scored], [[] for _ in scored]
        several = total > chunk_size and hasattr(lm_head, "set_lm_head_pass")  # an adapter on the LM head prepares each chunk by itself
        meta.rows_as_written = True
        for number, first in enumerate(range(0, total, chunk_size)):
            last = min(first + chunk_size, total)
            if several:
                lm_head.set_lm_head_pass(number)
            logits = get_logits_fn(pruned_states[first:last], lm_head, meta, use_logits_buffer=False)
            found = vocab_rows.log_probs(logits, tokens[first:last], max(widths))
            token_log_probs.append(found.log_probs)
            copy = _HostCopy(found.values, found.ids) if max(widths) else None
            spans, owners = [], []
            for i in range(token_to_seq_idx[first], token_to_seq_idx[last - 1] + 1):
                begin = ends[i] - max(scored[i], 1)
                here = max(begin, first) - first, min(ends[i], last) - first
                if scored[i] and widths[i]:
                    tops[i].append(_Part(copy, *here, widths[i]))
                if scored[i] and asked[i] is not None:
                    spans.append((*here, asked[i]))
                    owners.append(i)
            for i, part in zip(owners, gather(logits, found.log_z, spans) if spans else [], strict=True):
                gathered[i].append(part)
            samples = [end - 1 - first for end in ends if first < end <= last]
            if samples:
                sampled.append(logits.index_select(0, on_device(samples, device)).float())
            del logits
        if several:
            lm_head.reset_lm_head_pass()
        nothing = [[] for _ in scored]
        return module.LogprobResult(
            token_logprobs=torch.cat(token_log_probs).index_select(0, input_logprob_indices),
            top_logprobs_val=tops if meta.extend_return_top_logprob else None,
            top_logprobs_idx=nothing if meta.extend_return_top_logprob else None,
            token_ids_logprobs_val=gathered if meta.extend_token_ids_logprob else None,
            token_ids_logprobs_idx=nothing if meta.extend_token_ids_logprob else None,
        ), torch.cat(sampled)  # fmt: skip

    module.InputLogprobProcessor._forward_by_chunk = _forward_by_chunk


class _Positions:
    """Top-K of a scored prompt's positions: nothing for the first, then values and ids [n, k]."""

    def __init__(self, values: np.ndarray, ids: np.ndarray):
        self.values, self.ids = values, ids

    def __len__(self) -> int:
        return 1 + len(self.values)


def _arrays_of_prompts(module) -> None:
    """scheduler_components.logprob_result_processor: a scored prompt's numbers from the parts of its chunks.

    The last row is of the token that would be sampled; it is left out. Where several items share a prompt (SGLang's multi-item scoring,
    which has its own way to here) everything stays as it is.
    """
    cls = module.SchedulerLogprobResultProcessor
    flatten, plain_top, plain_ids = cls._flatten_input_top_logprobs, cls._process_input_top_logprobs, cls._process_input_token_ids_logprobs

    def _process_input_top_logprobs(self, req) -> None:
        k = req.logprob.top_logprobs_num
        if k <= 0 or self._is_multi_item_scoring(req):
            return plain_top(self, req)
        values, ids = (a[:-1] for a in _joined(req.temp_input_top_logprobs_val, k, (np.float32, np.int32)))
        req.temp_input_top_logprobs_val = req.temp_input_top_logprobs_idx = None
        if req.return_flat_raw_top_logprobs:
            req.logprob.input_top_logprobs_val = req.logprob.input_top_logprobs_idx = _Positions(values, ids)
        else:
            req.logprob.input_top_logprobs_val, req.logprob.input_top_logprobs_idx = [None, *values.tolist()], [None, *ids.tolist()]

    def _process_input_token_ids_logprobs(self, req) -> None:
        ids = req.logprob.token_ids_logprob
        if ids is None or self._is_multi_item_scoring(req):
            return plain_ids(self, req)
        values = _joined(req.temp_input_token_ids_logprobs_val, len(ids), (np.float32,))[0][:-1]
        req.temp_input_token_ids_logprobs_val = req.temp_input_token_ids_logprobs_idx = None
        req.logprob.input_token_ids_logprobs_val = [None, *values.tolist()]
        req.logprob.input_token_ids_logprobs_idx = [None, *([ids] * len(values))]

    def _flatten_input_top_logprobs(self, req) -> None:
        positions = req.logprob.input_top_logprobs_val
        if not isinstance(positions, _Positions):
            return flatten(self, req)
        req.logprob.input_top_logprobs_val_flat, req.logprob.input_top_logprobs_idx_flat = positions.values, positions.ids
        req.logprob.input_top_logprobs_flat_null_prefix = 1
        req.logprob.input_top_logprobs_val, req.logprob.input_top_logprobs_idx = [], []

    cls._process_input_top_logprobs, cls._flatten_input_top_logprobs = _process_input_top_logprobs, _flatten_input_top_logprobs
    cls._process_input_token_ids_logprobs = _process_input_token_ids_logprobs


CHANGES = {  # by module of SGLang; server_topk.install registers them
    "sglang.srt.layers.logits_processor": _rows_as_written,
    "sglang.srt.layers.logprob_processor": _score_without_waiting,
    "sglang.srt.managers.scheduler_components.logprob_result_processor": _arrays_of_prompts,
}
