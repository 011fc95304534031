"""Has a SGLang server take a batch's top-K off the GPU in one piece and keep it as arrays until the reply.

SGLang 0.5.17 cuts the top-K of a decoding step into two tensors a request, copies each by itself and turns each into a list: about
30 us a request and step, more than half of what its scheduler costs a token; with 256 requests the GPU waits for it. Scored prompts
become K Python floats and K ints a position, and arrays again right after. Here
- the top-K of a decoding step stays one [requests, K] tensor until it is on the host;
- a request with `return_flat_raw_top_logprobs` (SGLang's own field, for scored prompts) also gets what it samples packed:
  `meta_info["output_top_logprobs_rows"]`, one text a token (`topk_rows`), and empty entries in `output_top_logprobs`;
- scored prompts of such a request are arrays all the way;
- a request with `token_ids_logprob` may be in one batch with one without (SGLang's scheduler dies of it).
Other requests get what SGLang gives them. Only versions of SGLang that this was checked against are changed; any other stays as it is,
and the client reads its replies as well. `SLIME_TOPK_AS_LISTS=1` leaves the server as it is, to compare.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from slime.backends.sglang_utils.cpu_support.hooks import after_import

CHECKED_VERSIONS = ("0.5.17",)
AS_LISTS_VARIABLE = "SLIME_TOPK_AS_LISTS"


def install() -> bool:
    """Registers the changes for the modules that this process will import; whether it did."""
    if os.environ.get(AS_LISTS_VARIABLE) == "1" or _version() not in CHECKED_VERSIONS:
        return False
    after_import("sglang.srt.layers.logprob_processor", _keep_together)
    after_import("sglang.srt.managers.scheduler_components.batch_result_processor", _rows_of_requests)
    after_import("sglang.srt.managers.scheduler_components.logprob_result_processor", _arrays_of_prompts)
    return True


def _version() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


class _Scored:
    """Top-K of some positions of one prompt, on its way to the host: a part of one chunk's copy."""

    def __init__(self, copy: _HostCopy, begin: int, end: int, k: int):
        self.copy, self.begin, self.end, self.k = copy, begin, end, k

    def __len__(self) -> int:
        return self.end - self.begin

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(log-probs float32 [n, k], ids int32 [n, k])"""
        values, ids = self.copy.arrays()
        return values[self.begin : self.end, : self.k], ids[self.begin : self.end, : self.k]


class _HostCopy:
    """Log-probs and ids [n, K] being copied to the host without waiting for it."""

    def __init__(self, values, ids):
        import torch

        self.event, self.host = None, (values, ids)
        if values.is_cuda:
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in (values, ids)]
            self.event = torch.cuda.Event()
            self.event.record()
            self.device, self.host = (values, ids), tuple(pinned)  # the source must outlive the copy

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self.event is not None:
            self.event.synchronize()
            self.event = self.device = None
        values, ids = self.host
        if not isinstance(values, np.ndarray):
            values, ids = self.host = values.float().numpy(), ids.int().numpy()
        return values, ids


def _keep_together(module) -> None:
    """layers.logprob_processor: no tensor a request, no list a position."""
    plain = module.get_top_logprobs

    def get_top_logprobs(logprobs, top_logprobs_nums, no_copy_to_cpu=False):
        """Of a decoding step. With no_copy_to_cpu: ([values], [ids]), each one tensor [requests, largest K]."""
        if not no_copy_to_cpu:
            return plain(logprobs, top_logprobs_nums)
        values, ids = logprobs.topk(max(top_logprobs_nums), dim=-1)
        return [values], [ids]

    def get_top_logprobs_chunk(logprobs, top_k_nums, pruned_lens, top_logprobs_val, top_logprobs_idx, split_pruned_len):
        """Appends to both lists, for each sequence of the chunk, its parts ([_Scored, ...]); returns how much of the last one is done.

        split_pruned_len: positions of the first sequence that the chunk before held.
        """
        copy, rows, begin, done = _HostCopy(*logprobs.topk(max(top_k_nums), dim=1)), logprobs.shape[0], 0, 0
        for n, (k, length) in enumerate(zip(top_k_nums, pruned_lens, strict=False)):
            before = split_pruned_len if n == 0 else 0
            length -= before
            if length <= 0:
                top_logprobs_val.append([])
                top_logprobs_idx.append([])
                continue
            here = max(min(length, rows - begin), 0)
            part = [_Scored(copy, begin, begin + here, k)]
            if before:
                top_logprobs_val[-1].extend(part)
            else:
                top_logprobs_val.append(part)
                top_logprobs_idx.append([])
            if here < length:
                done = before + here
            begin += length
        return done

    module.get_top_logprobs, module.get_top_logprobs_chunk = get_top_logprobs, get_top_logprobs_chunk


def _rows_of_requests(module) -> None:
    """scheduler_components.batch_result_processor: the step's one tensor becomes each request's row."""
    from slime.backends.sglang_utils.topk_rows import FIELD, pack_rows

    cls = module.SchedulerBatchResultProcessor
    of_decode, of_prefill = cls._normalize_decode_outputs, cls.move_logprobs_to_cpu

    def take(logits_output):
        asked = logits_output.next_token_token_ids_logprobs_val
        if asked:  # the empty lists of requests that asked for no ids beside some that did would end the server
            logits_output.next_token_token_ids_logprobs_val = [v if hasattr(v, "tolist") else np.empty(0) for v in asked]
        found = logits_output.next_token_top_logprobs_val, logits_output.next_token_top_logprobs_idx
        logits_output.next_token_top_logprobs_val = logits_output.next_token_top_logprobs_idx = None
        return found if found[0] else None

    def give(logits_output, found, batch) -> None:
        values_RK, ids_RK = found[0][0].float().cpu().numpy(), found[1][0].cpu().numpy()
        wanted = [(req.logprob.top_logprobs_num, req.return_flat_raw_top_logprobs) for req in batch.reqs]
        each = len(values_RK) // max(len(wanted), 1)  # rows a request: more than one with speculative decoding
        if each != 1:
            wanted = [(k, False) for k, _ in wanted for _ in range(each)]
        values, ids, texts = [[] for _ in wanted], [[] for _ in wanted], [None] * len(wanted)
        for k in {k for k, packed in wanted if packed and k > 0}:
            rows = [i for i, pair in enumerate(wanted) if pair == (k, True)]
            for i, text in zip(rows, pack_rows(ids_RK[rows, :k], values_RK[rows, :k]), strict=True):
                texts[i] = text
        for i, (k, packed) in enumerate(wanted):
            if k > 0 and not packed:
                values[i], ids[i] = values_RK[i, :k].tolist(), ids_RK[i, :k].tolist()
        logits_output.next_token_top_logprobs_val, logits_output.next_token_top_logprobs_idx = values, ids
        if any(text is not None for text in texts):
            logits_output.customized_info = {**(logits_output.customized_info or {}), FIELD: texts}

    def _normalize_decode_outputs(self, *, batch, result, logits_output, next_token_ids):
        found = take(logits_output) if batch.return_logprob else None
        out = of_decode(self, batch=batch, result=result, logits_output=logits_output, next_token_ids=next_token_ids)
        if found:
            give(logits_output, found, batch)
        return out

    def move_logprobs_to_cpu(self, *, batch, logits_output):
        found = take(logits_output) if batch.return_logprob else None
        of_prefill(self, batch=batch, logits_output=logits_output)
        if found:
            give(logits_output, found, batch)

    cls._normalize_decode_outputs, cls.move_logprobs_to_cpu = _normalize_decode_outputs, move_logprobs_to_cpu


class _Positions:
    """Top-K of a scored prompt's positions: nothing for the first, then values and ids [n, k]."""

    def __init__(self, values: np.ndarray, ids: np.ndarray):
        self.values, self.ids = values, ids

    def __len__(self) -> int:
        return 1 + len(self.values)


def _arrays_of_prompts(module) -> None:
    """scheduler_components.logprob_result_processor: a scored prompt's top-K from the parts of its chunks."""
    cls = module.SchedulerLogprobResultProcessor
    flatten = cls._flatten_input_top_logprobs

    def _process_input_top_logprobs(self, req) -> None:
        if req.logprob.top_logprobs_num <= 0:
            return
        parts = [part.arrays() for parts in req.temp_input_top_logprobs_val for part in parts]
        req.temp_input_top_logprobs_val = req.temp_input_top_logprobs_idx = None
        k = req.logprob.top_logprobs_num
        values, ids = (np.concatenate([p[side] for p in parts]) if parts else np.empty((0, k), kind)
                       for side, kind in ((0, np.float32), (1, np.int32)))  # fmt: skip
        if self._is_multi_item_scoring(req):
            req.logprob.input_top_logprobs_val, req.logprob.input_top_logprobs_idx = values.tolist(), ids.tolist()
            return
        values, ids = values[:-1], ids[:-1]  # the last row is of the token that would be sampled
        if req.return_flat_raw_top_logprobs:
            req.logprob.input_top_logprobs_val = req.logprob.input_top_logprobs_idx = _Positions(values, ids)
        else:
            req.logprob.input_top_logprobs_val, req.logprob.input_top_logprobs_idx = [None, *values.tolist()], [None, *ids.tolist()]

    def _flatten_input_top_logprobs(self, req) -> None:
        positions = req.logprob.input_top_logprobs_val
        if not isinstance(positions, _Positions):
            return flatten(self, req)
        req.logprob.input_top_logprobs_val_flat, req.logprob.input_top_logprobs_idx_flat = positions.values, positions.ids
        req.logprob.input_top_logprobs_flat_null_prefix = 1
        req.logprob.input_top_logprobs_val, req.logprob.input_top_logprobs_idx = [], []

    cls._process_input_top_logprobs, cls._flatten_input_top_logprobs = _process_input_top_logprobs, _flatten_input_top_logprobs
