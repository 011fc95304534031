"""Between slime's samples and the arrays of `ta_opd`: collect, measure, select, write back, export. No maths here.

Works on the samples of this tree (TopK arrays, `opd_weights`) and on those of a stock slime checkout (lists of
`[logprob, id, text]` in `metadata["student_top_logprobs"]`, the teacher's reply as the reward, only a `loss_mask` to
write to). This file and on_policy_distillation.py are what a stock checkout needs besides `pip install ta-opd`; it
imports nothing of slime.

Shape suffixes: T response tokens of the batch (samples one after another), L of one sample, K entries of a top-k.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import ta_opd
from ta_opd.errors import DataError
from ta_opd.metrics import position_columns, prefix_ema, token_metrics
from ta_opd.selection import Selection, SelectionConfig, select_tokens
from ta_opd.slime_patch.options import resolve, selects
from ta_opd.slime_patch.scored import Scored, Stacked, from_arrays, from_reply, join, known_at_student_ids, say, stack
from ta_opd.token_bank import TokenBankWriter

_CONFIG_KEYS = ("seed", "rollout_seed", "use_opd", "hf_checkpoint", "rm_url", "teacher_model", "teacher", "rollout_temperature",
                "rollout_max_response_len", "rollout_batch_size", "n_samples_per_prompt")  # fmt: skip
_writers: dict[Path, TokenBankWriter] = {}
_last_rollout_id: int | None = None


def select_for_samples(
    args: Any, samples: Sequence[Any], rollout_id: int, exact: dict[str, Sequence[np.ndarray]] | None = None
) -> dict[str, Any]:
    """Measure a rollout batch, select its tokens, queue its token bank; for samples that carry TopK arrays.

    Sets `sample.opd_weights` (float32 [L], 0 where not selected) where that attribute exists, else `sample.loss_mask`.
    Returns the selection's summary (counts, means over valid tokens) with `kept_per_sample` and `exact_fraction`, the
    share of valid tokens whose C is exact. Raises DataError on lengths that do not match or missing top-k, naming the
    sample. exact: full-vocabulary "H", "KLf", "KLr" and "C", one array [L] a sample, from a caller that has them.
    """
    options = resolve(args)
    scored = [from_arrays(options, s, i) for i, s in enumerate(samples) if s.response_length > 0]
    return _run(options, scored, samples, rollout_id, exact)


def measure_samples(args: Any, samples: Sequence[Any]) -> None:
    """The metrics of scored samples, put on `sample.token_metrics` for `select_for_samples`, which then need not compute them.

    They are the same whichever samples are measured together, so a caller can measure while other samples are still being scored.
    Raises DataError as `select_for_samples`.
    """
    options = resolve(args)
    scored = [from_arrays(options, s, i) for i, s in enumerate(samples) if s.response_length > 0]
    if scored:
        _measure(options, scored)


def process_tip_compat_metrics(
    args: Any, samples: Sequence[Any], teacher_log_probs: Sequence[Any], raw_rewards: Sequence[Any]
) -> dict[str, Any] | None:
    """Measure a rollout batch, select its tokens, queue its token bank; for samples of a stock slime checkout.

    teacher_log_probs: [L] a sample, teacher's log-probs of the sampled tokens. raw_rewards: the teacher's reply a sample
    (with `meta_info.input_top_logprobs`, perhaps `input_token_ids_logprobs`), anything else where the sample carries
    TopK arrays. The rollout id is `args.rollout_id` where present, else see `rollout_id_of`. The student's lists in the
    metadata become arrays. Returns the summary as `select_for_samples`; None when nothing is asked for. Raises DataError.
    """
    options = resolve(args)
    config = SelectionConfig.from_args(options)
    rollout_id = rollout_id_of(args, samples)
    if options.opd_topk_metrics_k == 0 and not options.opd_token_bank_dir and not selects(config):
        return None
    for name, values in (("teacher_log_probs", teacher_log_probs), ("raw_rewards", raw_rewards)):
        if len(values) != len(samples):
            raise DataError(f"{name}: expected one entry for each of {len(samples)} samples, got {len(values)}")
    scored = [
        from_reply(options, sample, i, teacher_log_probs[i], raw_rewards[i], selects(config))
        for i, sample in enumerate(samples)
        if sample.response_length > 0
    ]
    return _run(options, scored, samples, rollout_id)


def close_token_banks() -> None:
    """Write everything that is queued and stop the writers; returns when all is on disk. Raises ServiceError."""
    while _writers:
        _writers.popitem()[1].close()


def flush_token_banks() -> None:
    """Wait until everything that is queued is on disk (before a checkpoint, say). Raises ServiceError."""
    for writer in _writers.values():
        writer.flush()


def rollout_id_of(args: Any, samples: Sequence[Any]) -> int:
    """The true rollout id: `args.rollout_id`, else one derived from the data source's counter.

    A stock slime hands its hooks no rollout id (the hook `log_rollout` of ta_opd.slime_patch does). Without one, the
    group index divided by the prompts a rollout serves: it continues after a resume, as slime saves that counter. Ids
    never repeat within the process.
    """
    global _last_rollout_id
    given = getattr(args, "rollout_id", None)
    if given is not None:
        return int(given)
    groups = [s.group_index for s in samples if getattr(s, "group_index", None) is not None]
    derived = min(groups) // max(getattr(args, "rollout_batch_size", None) or 1, 1) if groups else 0
    first = max(derived, getattr(args, "start_rollout_id", None) or 0)
    _last_rollout_id = first if _last_rollout_id is None else max(first, _last_rollout_id + 1)
    return _last_rollout_id


def _run(
    options: SimpleNamespace,
    scored: list[Scored],
    samples: Sequence[Any],
    rollout_id: int,
    exact: dict[str, Sequence[np.ndarray]] | None = None,
) -> dict[str, Any]:
    config = SelectionConfig.from_args(options)
    if not scored:
        say("a rollout without any response token: nothing is measured or kept")
        empty = {"num_tokens": 0, "num_valid_tokens": 0, "num_kept_tokens": 0, "keep_ratio": 0.0}
        return {**empty, "exact_fraction": 0.0, "kept_per_sample": [0] * len(samples)}
    lengths_N = np.array([s.length for s in scored])
    stacked = student, teacher, token_ids_T = stack(options, scored)
    valid_T = np.concatenate([s.valid_L for s in scored])
    metrics = _collect(options, scored, stacked) if exact is None else _metrics(options, scored, stacked, exact)
    metrics["Cprefix_ema"] = prefix_ema(metrics["Cmass"], lengths_N, options.opd_compat_prefix_ema_alpha)
    selection = select_tokens(
        metrics, valid_T, lengths_N, config,
        rollout_id=rollout_id, student=student, teacher=teacher, sampled_ids=token_ids_T,
    )  # fmt: skip
    for warning in selection.summary.get("warnings", ()):
        say(warning)
    kept_per_sample = _write_back(config, scored, selection, len(samples))
    if options.opd_token_bank_dir:
        columns = {**_identity(options, scored, token_ids_T, valid_T), **metrics, **selection.columns}
        if options.opd_token_bank_raw_topk:
            columns |= {"student_top_ids": student.ids, "student_top_logps": student.logprobs}
            columns |= {"teacher_top_ids": teacher.ids, "teacher_top_logps": teacher.logprobs}
        _writer(options, config, _support(options, exact)).write(rollout_id, columns)
    exact_fraction = float(metrics["Cmass_exact"][valid_T].mean()) if valid_T.any() else 0.0
    return {**selection.summary, "exact_fraction": exact_fraction, "kept_per_sample": kept_per_sample}


def _collect(options: SimpleNamespace, scored: list[Scored], stacked: Stacked) -> dict[str, np.ndarray]:
    """Metrics of all positions, computed for those samples that `measure_samples` has not measured; they leave the samples."""
    todo = [s for s in scored if getattr(s.sample, "token_metrics", None) is None]
    if len(todo) == len(scored):
        return _metrics(options, scored, stacked)
    if todo:
        _measure(options, todo)
    parts = [s.sample.token_metrics for s in scored]
    for s in scored:
        s.sample.token_metrics = None
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(options: SimpleNamespace, scored: list[Scored]) -> None:
    metrics = _metrics(options, scored, stack(options, scored))
    ends_N = np.cumsum([s.length for s in scored])
    for s, end in zip(scored, ends_N.tolist(), strict=True):
        s.sample.token_metrics = {name: values[end - s.length : end] for name, values in metrics.items()}


def _metrics(
    options: SimpleNamespace, scored: list[Scored], stacked: Stacked, exact: dict[str, Sequence[np.ndarray]] | None = None
) -> dict[str, np.ndarray]:
    student, teacher, token_ids_T = stacked
    if exact is not None:
        exact = {name: np.concatenate([np.asarray(values[s.ordinal]) for s in scored]) for name, values in exact.items()}
        exact["vocab_size"] = (getattr(options, "student_config", None) or {}).get("vocab_size")
    return token_metrics(
        student,
        teacher,
        sampled_ids=token_ids_T,
        student_logprobs=join(scored, "student_logprobs_L"),
        teacher_logprobs=join(scored, "teacher_logprobs_L"),
        response_lengths=[s.length for s in scored],
        support=_support(options, exact),
        prefix_ema_alpha=None,  # slow for few samples: done once for all of them
        teacher_at_student_ids=known_at_student_ids(scored),
        partly_exact=options.opd_profile == "released",
        exact=exact,
    )


def _support(options: SimpleNamespace, exact: Any) -> str:
    return "exact" if exact is not None else options.opd_divergence_support or "union_floor"


def _write_back(config: SelectionConfig, scored: list[Scored], selection: Selection, num_samples: int) -> list[int]:
    kept_per_sample = [0] * num_samples
    start = 0
    for s in scored:
        rows = slice(start, start + s.length)
        start += s.length
        kept_per_sample[s.ordinal] = int(selection.keep[rows].sum())
        if hasattr(s.sample, "opd_weights"):
            s.sample.opd_weights = np.array(selection.weights[rows], np.float32)
        elif not config.keeps_everything:
            s.sample.loss_mask = selection.keep[rows].astype(int).tolist()
            if not np.isin(selection.weights[rows], (0, 1)).all():
                say(f"{config.mask!r} gives weights, but these samples have only a loss_mask: kept tokens count 1 each")
    return kept_per_sample


def _identity(options: SimpleNamespace, scored: list[Scored], token_ids_T, valid_T) -> dict[str, Any]:
    lengths_N = np.array([s.length for s in scored])
    totals_N = np.array([len(s.sample.tokens) for s in scored])
    place = position_columns(lengths_N)

    def spread(values: list) -> np.ndarray:
        return np.repeat(np.array(values, object if isinstance(values[0], str) else None), lengths_N)

    def number(name: str) -> np.ndarray:  # NaN where a sample has none
        values = [getattr(s.sample, name, None) for s in scored]
        return spread([np.nan if v is None else v for v in values] if None in values else values)

    teachers = [_teacher_name(options, s.sample) for s in scored]
    return {
        "pair_id": options.opd_token_bank_pair_id,
        "teacher_name": teachers[0] if len(set(teachers)) == 1 else spread(teachers),
        "student_name": str(options.opd_student_name or getattr(options, "hf_checkpoint", None) or ""),
        "seed": getattr(options, "seed", None),
        "sample_index": number("index"),
        "group_index": number("group_index"),
        "sample_ordinal": spread([s.ordinal for s in scored]),
        "tok_pos": place["tok_pos"],
        "pos_norm": place["pos_norm"],
        "prompt_len": np.repeat(totals_N - lengths_N, lengths_N),
        "resp_len": np.repeat(lengths_N, lengths_N),
        "total_len": np.repeat(totals_N, lengths_N),
        "truncated": spread([_status(s.sample) == "truncated" for s in scored]),
        "token_id": token_ids_T,
        "loss_mask_original": valid_T,
    }


def _teacher_name(options: SimpleNamespace, sample: Any) -> str:
    named = (getattr(sample, "metadata", None) or {}).get("teacher")
    name = named or options.opd_teacher_name or getattr(options, "opd_teacher_load", None)
    name = name or getattr(options, "teacher_model", None) or getattr(options, "rm_url", None) or ""
    return ",".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name)


def _status(sample: Any) -> str:
    status = getattr(sample, "status", "")
    return str(getattr(status, "value", status)).lower()


def _writer(options: SimpleNamespace, config: SelectionConfig, support: str) -> TokenBankWriter:
    directory = Path(options.opd_token_bank_dir).resolve()
    if directory not in _writers:
        chosen = {k: v for k, v in vars(options).items() if k.startswith("opd_") or k in _CONFIG_KEYS}
        chosen["resolved"] = {**config.resolved(), "divergence_support": support}
        chosen["ta_opd_version"] = ta_opd.__version__
        chosen["notes"] = "one row a response token; 'resolved' holds what profile and selector set; see docs/method.md"
        _writers[directory] = TokenBankWriter(directory, options.opd_token_bank_format, chosen, options.opd_token_bank_raw_topk)
    return _writers[directory]
