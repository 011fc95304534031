"""Has a SGLang server take a batch's top-K off the GPU in one piece and keep it as arrays until the reply.

SGLang 0.5.17 cuts the top-K of a decoding step into two tensors a request, copies each by itself and turns each into a list: about
30 us a request and step, more than half of what its scheduler costs a token; with 256 requests the GPU waits for it. Here
- the top-K of a decoding step is found in one reading of the log-probs (`vocab_rows`) and stays one [requests, K] tensor until it is
  on the host;
- a request with `return_flat_raw_top_logprobs` (SGLang's own field, for scored prompts) also gets what it samples packed:
  `meta_info["output_top_logprobs_rows"]`, one text a token (`topk_rows`), and empty entries in `output_top_logprobs`;
- a request with `token_ids_logprob` may be in one batch with one without (SGLang's scheduler dies of it);
- scored prompts are computed without waiting for the GPU and stay arrays, too: `server_scores`.
Other requests get what SGLang gives them. Only versions of SGLang that this was checked against are changed; any other stays as it is,
and the client reads its replies as well. `SLIME_TOPK_AS_LISTS=1` leaves the server as it is, to compare.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from slime.backends.sglang_utils import server_scores
from slime.backends.sglang_utils.cpu_support.hooks import after_import

CHECKED_VERSIONS = ("0.5.17",)
AS_LISTS_VARIABLE = "SLIME_TOPK_AS_LISTS"


def install() -> bool:
    """Registers the changes for the modules that this process will import; whether it did."""
    if os.environ.get(AS_LISTS_VARIABLE) == "1" or _version() not in CHECKED_VERSIONS:
        return False
    after_import("sglang.srt.layers.logprob_processor", _keep_together)
    after_import("sglang.srt.managers.scheduler_components.batch_result_processor", _rows_of_requests)
    for name, action in server_scores.CHANGES.items():
        after_import(name, action)
    return True


def _version() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def _keep_together(module) -> None:
    """layers.logprob_processor: no tensor a request."""
    from slime.backends.sglang_utils import vocab_rows

    plain = module.get_top_logprobs

    def get_top_logprobs(logprobs, top_logprobs_nums, no_copy_to_cpu=False):
        """Of a decoding step. With no_copy_to_cpu: ([values], [ids]), each one tensor [requests, largest K]."""
        if not no_copy_to_cpu:
            return plain(logprobs, top_logprobs_nums)
        values, ids = vocab_rows.largest(logprobs, max(top_logprobs_nums))
        return [values], [ids]

    module.get_top_logprobs = get_top_logprobs


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
