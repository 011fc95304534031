"""Score a context bank with two causal language models: full-vocabulary and top-K quantities of every response position.

Work goes part by part (some contexts each); a finished part is a file, so an interrupted run goes on where it stopped. Both models may
be resident at once, or one at a time: then the student's last hidden states are written to disk, and only its output matrix stays while
the teacher runs. No [positions, vocabulary] array ever holds more than one block of rows.

Shape suffixes: B contexts of a batch, P padded length, R rows of a block or part, V vocabulary, H hidden size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context import hf
from ta_opd.fixed_context.bank import Contexts
from ta_opd.fixed_context.dense import row_metrics, topk_metrics
from ta_opd.fixed_context.parts import Parts
from ta_opd.fixed_context.scored_table import build_rows

RESIDENCIES = ("auto", "both", "one")
GIB = 1 << 30


@dataclass(frozen=True)
class ScoringConfig:
    """topk: K values, the first gives the plain column names. residency: `both` models at once, `one` at a time, or `auto` by free memory.

    max_tokens_per_batch: padded tokens of one forward pass. workspace_gib: memory for one block of logits and what is computed from it.
    contexts_per_part: how much an interruption can cost.
    """

    topk: tuple[int, ...] = (16,)
    student_device: str = "auto"
    teacher_device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_tokenizer_mismatch: bool = False
    residency: str = "auto"
    max_tokens_per_batch: int = 16384
    workspace_gib: float = 2.0
    contexts_per_part: int = 100
    raw_topk: bool = True

    def __post_init__(self):
        if not self.topk or min(self.topk) < 1 or len(set(self.topk)) != len(self.topk):
            raise ConfigError(f"topk: expected different positive numbers, got {self.topk}")
        if self.residency not in RESIDENCIES:
            raise ConfigError(f"residency: expected one of {', '.join(RESIDENCIES)}, got {self.residency!r}")


@dataclass
class Timings:
    """Seconds by stage: load (both models), student, teacher, metrics, write."""

    seconds: dict = field(default_factory=dict)

    def add(self, stage: str, since: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since


def score_contexts(
    contexts: Contexts, student, teacher, config: ScoringConfig, work_dir, *, log: Callable[[str], None] = lambda line: None
) -> tuple[pd.DataFrame, dict]:
    """(table, record): one row a scored position in bank order, columns as in `scored_table`, and how it was made.

    student, teacher: paths of HF models. work_dir: parts of this run; a run with the same bank, models and options goes on with the parts
    found there, another run's are deleted. It is removed at the end.
    Raises DataError when the tokenizers differ, a token is outside the shared vocabulary, K exceeds it, or a model cannot be loaded;
    ConfigError on devices and options.
    """
    devices = [hf.resolve_device(config.student_device), hf.resolve_device(config.teacher_device)]
    dtypes = [hf.resolve_dtype(config.dtype, device) for device in devices]
    tokenizer = hf.check_tokenizers(student, teacher, config.allow_tokenizer_mismatch, config.trust_remote_code)
    record = {
        "kind": "fixed_context_metrics", "bank_fingerprint": contexts.fingerprint, "student": str(Path(student).resolve()),
        "teacher": str(Path(teacher).resolve()), "topk": list(config.topk), "max_response_tokens": int(contexts.scored_len.max()),
        "tokenizer_fingerprint": tokenizer, "dtype": [str(d).removeprefix("torch.") for d in dtypes], "contexts": len(contexts),
        "model_stamp": [_stamp(student), _stamp(teacher)],
    }  # fmt: skip
    parts = Parts(Path(work_dir), record | {"contexts_per_part": config.contexts_per_part, "raw_topk": config.raw_topk}, len(contexts))
    if parts.done and log:
        log(f"going on with {len(parts.done)} of {parts.count} parts already scored")
    timings = Timings()
    if len(parts.done) < parts.count:
        both = _both_resident(config, student, teacher, devices, dtypes)
        run = _run_both if both else _run_one
        log(f"scoring {len(contexts)} contexts, {int(contexts.scored_len.sum())} positions, {'both models resident' if both else 'one model at a time'}")
        run(contexts, student, teacher, config, devices, dtypes, parts, timings, log)
    start = time.perf_counter()
    table = parts.collect()
    timings.add("write", start)
    record = {key: value for key, value in record.items() if key != "model_stamp"}
    return table, record | {"positions": len(table), "seconds": {k: round(v, 3) for k, v in timings.seconds.items()}}


@dataclass(frozen=True)
class Batch:
    """Contexts of one forward pass: ids [B, P] right-padded with 0, flat rows [R] of the positions that predict a response token, their
    places [R] in the part's row order, and the tokens they predict."""

    ids: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    targets: np.ndarray


def make_batches(contexts: Contexts, which: range, max_tokens: int) -> Iterator[Batch]:
    """Batches of contexts of similar length whose padded size stays within `max_tokens` (a longer context goes alone)."""
    first_row = np.cumsum([0, *(contexts.scored_len[i] for i in which)])
    place = {i: first_row[n] for n, i in enumerate(which)}
    by_length = sorted(which, key=lambda i: -len(contexts.tokens[i]))
    while by_length:
        P = len(contexts.tokens[by_length[0]])
        B = max(1, min(len(by_length), max_tokens // P))
        taken, by_length = by_length[:B], by_length[B:]
        ids = np.zeros((B, P), np.int64)
        rows, places, targets = [], [], []
        for b, i in enumerate(taken):
            tokens, start, length = contexts.tokens[i], contexts.prompt_len[i], contexts.scored_len[i]
            ids[b, : len(tokens)] = tokens
            rows.append(b * P + start - 1 + np.arange(length))
            places.append(place[i] + np.arange(length))
            targets.append(tokens[start : start + length])
        yield Batch(ids, np.concatenate(rows), np.concatenate(places), np.concatenate(targets))


def _both_resident(config: ScoringConfig, student, teacher, devices, dtypes) -> bool:
    if config.residency != "auto":
        return config.residency == "both"
    if devices[0] != devices[1]:
        return True
    sizes = [hf.weight_bytes(path, dtype) for path, dtype in zip((student, teacher), dtypes, strict=True)]
    free = _free_bytes(devices[0])
    if None in sizes or free is None:
        return False
    return 1.1 * sum(sizes) + (config.workspace_gib + 2) * GIB < free


def _free_bytes(device) -> int | None:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _run_both(contexts, student, teacher, config, devices, dtypes, parts: Parts, timings: Timings, log) -> None:
    import torch

    start = time.perf_counter()
    models = [
        hf.CausalModel.load(path, device=device, dtype=dtype, trust_remote_code=config.trust_remote_code)
        for path, device, dtype in zip((student, teacher), devices, dtypes, strict=True)
    ]
    timings.add("load", start)
    vocab = _shared_vocabulary(contexts, models[0].vocab, models[1].vocab, config)
    with torch.inference_mode():
        few = torch.as_tensor(contexts.tokens[0][None, :8])
        plain = all([model.check_head(few.to(model.device)) for model in models])
        max_tokens = config.max_tokens_per_batch if plain else 1  # logits instead of hidden states: a context at a time
        heads = [_Head(model, devices[1], vocab) for model in models]
        for part in parts.todo():
            blocks = _Collector(int(contexts.scored_len[list(parts.contexts(part))].sum()))
            for batch in make_batches(contexts, parts.contexts(part), max_tokens):
                states = []
                for model, stage in zip(models, ("student", "teacher"), strict=True):
                    start = time.perf_counter()
                    states.append(_rows_of(model, batch, plain).to(devices[1]))
                    _wait(model.device)
                    timings.add(stage, start)
                start = time.perf_counter()
                _score_rows(states, heads, batch, config, blocks, plain)
                timings.add("metrics", start)
            _finish(parts, part, contexts, blocks, config, vocab, timings, log)
    for model in models:
        model.free()


def _run_one(contexts, student, teacher, config, devices, dtypes, parts: Parts, timings: Timings, log) -> None:
    import torch

    missing = [part for part in parts.todo() if not parts.hidden(part).is_file()]
    if missing or not parts.head.is_file():
        start = time.perf_counter()
        model = hf.CausalModel.load(student, device=devices[0], dtype=dtypes[0], trust_remote_code=config.trust_remote_code)
        timings.add("load", start)
        with torch.inference_mode():
            few = torch.as_tensor(contexts.tokens[0][None, :8]).to(model.device)
            if not model.check_head(few):
                raise ConfigError(
                    f"{student}: its logits are not a plain product of hidden states and output weights, so it cannot be scored with one "
                    "model at a time; use --residency both"
                )
            start = time.perf_counter()
            bias = getattr(model.head, "bias", None)
            _save(parts.head, {"weight": model.head.weight.cpu(), "bias": None if bias is None else bias.cpu()})
            for part in missing:
                _save(parts.hidden(part), _part_hidden(model, contexts, parts.contexts(part), config))
            _wait(model.device)
            timings.add("student", start)
        model.free()
    start = time.perf_counter()
    model = hf.CausalModel.load(teacher, device=devices[1], dtype=dtypes[1], trust_remote_code=config.trust_remote_code)
    saved = torch.load(parts.head, weights_only=True)
    timings.add("load", start)
    vocab = _shared_vocabulary(contexts, saved["weight"].shape[0], model.vocab, config)
    with torch.inference_mode():
        plain = model.check_head(torch.as_tensor(contexts.tokens[0][None, :8]).to(model.device))
        if not plain:
            raise ConfigError(f"{teacher}: its logits are not a plain product of hidden states and output weights; use --residency both")
        heads = [_Head.of(saved["weight"], saved["bias"], devices[1], vocab), _Head(model, devices[1], vocab)]
        for part in parts.todo():
            hidden_RH = torch.load(parts.hidden(part), weights_only=True)
            blocks = _Collector(len(hidden_RH))
            for batch in make_batches(contexts, parts.contexts(part), config.max_tokens_per_batch):
                start = time.perf_counter()
                states = [hidden_RH[torch.as_tensor(batch.places)].to(devices[1]), _rows_of(model, batch, plain)]
                _wait(model.device)
                timings.add("teacher", start)
                start = time.perf_counter()
                _score_rows(states, heads, batch, config, blocks, plain)
                timings.add("metrics", start)
            _finish(parts, part, contexts, blocks, config, vocab, timings, log)
    model.free()


class _Head:
    """The output matrix cut to the shared vocabulary, on the device where metrics are computed."""

    def __init__(self, model, device, vocab: int):
        self.weight = model.head.weight[:vocab].to(device)
        bias = getattr(model.head, "bias", None)
        self.bias = None if bias is None else bias[:vocab].to(device)
        self.vocab = vocab

    @classmethod
    def of(cls, weight, bias, device, vocab: int) -> "_Head":
        head = cls.__new__(cls)
        head.weight, head.vocab = weight[:vocab].to(device), vocab
        head.bias = None if bias is None else bias[:vocab].to(device)
        return head

    def logits(self, state, plain: bool):
        return hf.head_logits(state, self.weight, self.bias) if plain else state[:, : self.vocab]


class _Collector:
    """Results of a part's rows, filled block by block in any order. names -> float64 or int64 arrays [R] or [R, K]."""

    def __init__(self, num_rows: int):
        self.num_rows, self.arrays = num_rows, {}

    def put(self, places: np.ndarray, values: dict) -> None:
        for name, tensor in values.items():
            value = tensor.cpu().numpy()
            if name not in self.arrays:
                self.arrays[name] = np.empty((self.num_rows, *value.shape[1:]), value.dtype)
            self.arrays[name][places] = value


def _rows_of(model: hf.CausalModel, batch: Batch, plain: bool):
    """[R, H] hidden states (or [R, V] logits) of the batch's rows, on the model's device."""
    import torch

    ids = torch.as_tensor(batch.ids).to(model.device)
    rows = torch.as_tensor(batch.rows).to(model.device)
    if not plain:
        return model.full_logits(ids, rows)
    hidden_BPH = model.hidden(ids)
    return hidden_BPH.reshape(-1, hidden_BPH.shape[-1])[rows]


def _part_hidden(model, contexts: Contexts, which: range, config: ScoringConfig):
    import torch

    hidden = None
    for batch in make_batches(contexts, which, config.max_tokens_per_batch):
        rows = _rows_of(model, batch, True).cpu()
        if hidden is None:
            hidden = torch.empty(int(contexts.scored_len[list(which)].sum()), rows.shape[1], dtype=rows.dtype)
        hidden[torch.as_tensor(batch.places)] = rows
    return hidden


def _score_rows(states, heads, batch: Batch, config: ScoringConfig, blocks: _Collector, plain: bool) -> None:
    import torch

    vocab = heads[1].vocab
    # Two float32 logit blocks, their float64 copies, two float64 temporaries.
    rows_a_block = max(1, int(config.workspace_gib * GIB / (vocab * 40)))
    targets = torch.as_tensor(batch.targets).to(heads[1].weight.device)
    for start in range(0, len(batch.rows), rows_a_block):
        block = slice(start, start + rows_a_block)
        logits = [head.logits(state[block], plain) for head, state in zip(heads, states, strict=True)]
        rows = row_metrics(*logits, targets[block], config.topk)
        values = dict(rows)
        for K in config.topk:
            values |= {f"{name}@{K}": value for name, value in topk_metrics(rows, K, targets[block]).items()}
        blocks.put(batch.places[block], values)


def _finish(parts: Parts, part: int, contexts, blocks: _Collector, config, vocab: int, timings: Timings, log) -> None:
    start = time.perf_counter()
    parts.finish(part, build_rows(contexts, parts.contexts(part), blocks.arrays, config.topk, raw_topk=config.raw_topk))
    timings.add("write", start)
    log(f"part {part + 1} of {parts.count}: {blocks.num_rows} positions, shared vocabulary {vocab}")


def _shared_vocabulary(contexts: Contexts, student_vocab: int, teacher_vocab: int, config: ScoringConfig) -> int:
    vocab = min(student_vocab, teacher_vocab)
    if contexts.max_token() >= vocab:
        raise DataError(
            f"the bank holds token {contexts.max_token()}, but the models share {vocab} (student {student_vocab}, teacher {teacher_vocab}); "
            "is the bank of another tokenizer?"
        )
    if max(config.topk) > vocab:
        raise DataError(f"topk: expected at most the shared vocabulary of {vocab}, got {max(config.topk)}")
    return vocab


def _save(path: Path, content) -> None:
    import torch

    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def _wait(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _stamp(path) -> str:
    """Changes when the weights at `path` do: names, sizes and times of its files."""
    files = sorted(Path(path).glob("*")) if Path(path).is_dir() else []
    return ";".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files if f.suffix in (".safetensors", ".bin", ".json"))


def describe(config: ScoringConfig) -> dict:
    """The options as plain data, for records."""
    return asdict(config)
