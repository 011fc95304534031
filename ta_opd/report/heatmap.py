"""Data of the browsable heat map: responses of the training rollouts and of the frozen contexts, packed for a page.

Numbers become 16-bit integers between a minimum and a maximum, token texts an index into one list, everything base64; a token
costs about 60 bytes. What does not fit the byte budget is left out, and the page says how much is shown.

Shape suffixes: T tokens of a block, K entries of a top-k list.
"""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ta_opd.errors import TaOpdError
from ta_opd.fixed_context.selector_inputs import selector_inputs
from ta_opd.fixed_context.support import parse_lists
from ta_opd.fixed_context.tables import read_table
from ta_opd.report.figures_tokens import kept_rows
from ta_opd.report.loading import BANK_COLUMNS, TOPK_COLUMNS, Run, Suite, sample_bank
from ta_opd.report.vocabulary import Vocabulary
from ta_opd.selection import SelectionConfig, select_tokens

TOP = 6  # entries of a top-k list that are shown
ROLLOUTS = 3  # first, middle, last
RESPONSES = 8  # of each rollout
TOKENS = 600  # of each response
TOKEN_BYTES = 100  # of one in base64, with lists of both models
ROLLOUT_SHARE = 0.6  # of the map's bytes, for rollouts
SEED = 11


@dataclass(frozen=True)
class Quantity:
    """A quantity that tokens can be coloured by. scale: "unit" (0 to 1), "positive" (0 to a high quantile) or "signed" (around 0)."""

    key: str
    label: str
    scale: str
    note: str


ROLLOUT_QUANTITIES = (
    Quantity("Dlearn", "Dlearn, teachability", "unit", "normalised D × normalised C: disagreement the student could learn from"),
    Quantity("H_norm", "H, student entropy", "unit", "normalised entropy of the student's top-K"),
    Quantity("D_norm", "D, divergence", "unit", "normalised forward KL, teacher to student, on the union of both top-K"),
    Quantity("C_norm", "C, compatibility", "unit", "normalised teacher probability on the student's top-K"),
    Quantity("sampled_reverse_kl", "log p(student) − log p(teacher)", "signed", "of the sampled token, nats; positive: the student likes it more"),
)
FROZEN_QUANTITIES = (
    *ROLLOUT_QUANTITIES[:4],
    Quantity("KLf_full_base", "KL before training", "positive", "full-vocabulary KL(teacher ‖ student), nats"),
    Quantity("KLf_full", "KL after training", "positive", "full-vocabulary KL(teacher ‖ student), nats"),
    Quantity("gain", "gain", "signed", "KL before − KL after, nats; positive: closer to the teacher"),
)
RAW = {"Hs_topk": "H, nats", "KLf_union": "D, nats", "Cmass": "C, probability"}
FROZEN_RAW = {"Hs_full_base": "H before, nats", "Cmass_true_base": "C before, probability"}


@dataclass
class Pieces:
    """Token texts that occur, each once."""

    vocabulary: Vocabulary | None
    index: dict[int, int] = field(default_factory=dict)

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Index into `texts` of every id; -1 stays -1."""
        unique, inverse = np.unique(ids, return_inverse=True)
        local = np.array([-1 if i < 0 else self.index.setdefault(int(i), len(self.index)) for i in unique])
        return local[inverse].reshape(np.shape(ids))

    @property
    def texts(self) -> list[str]:
        return [self.vocabulary.text(i) if self.vocabulary else f"[{i}]" for i in self.index]


def build(suite: Suite, vocabulary: Vocabulary | None, *, max_bytes: int, notes: list[str]) -> dict:
    """{"pieces": [...], "blocks": [...]} for the page's script; blocks of rollouts first, then of frozen contexts.

    Rollouts get at most ROLLOUT_SHARE of `max_bytes` of base64, each run the same part; the frozen contexts get what is left. Fewer
    responses are shown when they do not all fit.
    """
    pieces = Pieces(vocabulary)
    first_runs = [runs[0] for runs in suite.arms.values()]
    room = int(ROLLOUT_SHARE * max_bytes / max(len(first_runs), 1))
    blocks = [block for run in first_runs if (block := rollout_block(run, pieces, notes, room)) is not None]
    used = sum(_size(block) for block in blocks)
    frozen = frozen_blocks(suite, [run for run in first_runs if run.contexts is not None], pieces, max_bytes - used, notes)
    return {"pieces": pieces.texts, "blocks": blocks + frozen}


def _size(block: dict) -> int:
    return len(json.dumps(block))


def rollout_block(run: Run, pieces: Pieces, notes: list[str], max_bytes: int | None = None) -> dict | None:
    """Responses of the first, a middle and the last rollout of one run, chosen at random with a fixed seed; None without a bank.

    Fewer and shorter ones where they would take more than about `max_bytes`.
    """
    tokens = None if max_bytes is None else max(1, max_bytes // TOKEN_BYTES // ROLLOUTS)
    sample = sample_bank(run, max_rollouts=ROLLOUTS, max_rows=10**9, notes=notes, columns=(*BANK_COLUMNS, *TOPK_COLUMNS),
                         pick=lambda part: _draw(part, tokens))  # fmt: skip
    if sample is None or sample.table.empty:  # a bank of others may lack the columns that tell responses apart
        return None
    table = sample.table
    prompts = _dump_prompts(run, sample.rollouts)
    responses = []
    for (rollout, _), rows in table.groupby(["rollout_id", "sample_ordinal"], sort=True):
        index = rows["sample_index"].iloc[0]
        told = prompts.get((int(rollout), int(index)), {}) if index == index else {}
        responses.append(_response(f"rollout {rollout}, sample {index}", rows, told.get("prompt"), told.get("label")))
    values = {q.key: _pack(table[q.key], _limits(table[q.key], q.scale)) for q in ROLLOUT_QUANTITIES}
    values |= {name: _pack(table[name]) for name in RAW if table[name].notna().any()}
    block = {
        "kind": "rollout", "arm": run.key.label, "run": run.name, "quantities": [vars(q) for q in ROLLOUT_QUANTITIES], "raw": RAW,
        "responses": responses, "tokens": _pack_index(pieces.add(table["token_id"].to_numpy(int))),
        "kept": _pack_bits(kept_rows(table)), "selects": run.key.mask != "full", "values": values,
        "caption": f"{len(responses)} responses drawn at random from rollouts {', '.join(map(str, sample.rollouts))} of {sample.of}"
        + (" (more do not fit this file)" if tokens is not None and len(table) > 0.9 * tokens * len(sample.rollouts) else ""),
        "top": {},
    }  # fmt: skip
    if table["student_top_ids"].notna().all():
        for side in ("student", "teacher"):
            block["top"][side] = _pack_top(*(_padded(table[f"{side}_top_{what}"]) for what in ("ids", "logps")), pieces)
    return block


def _draw(part: pa.Table, tokens: int | None) -> pa.Table:
    """Rows of a bank file that are shown: RESPONSES of each of at most ROLLOUTS rollouts in it, with at most about `tokens` tokens a rollout."""
    rollout_T, ordinal_T, position_T = (part[name].to_numpy() for name in ("rollout_id", "sample_ordinal", "tok_pos"))
    rollouts = np.unique(rollout_T)
    take_T = np.zeros(len(part), bool)
    for rollout in rollouts[np.unique(np.linspace(0, len(rollouts) - 1, min(ROLLOUTS, len(rollouts))).round().astype(int))]:
        inside_T, used = (rollout_T == rollout) & (position_T < TOKENS), 0
        ordinals = np.random.default_rng([SEED, int(rollout)]).permutation(np.unique(ordinal_T[inside_T]))
        for ordinal in ordinals[:RESPONSES]:
            rows_T = inside_T & (ordinal_T == ordinal)
            if tokens is not None and used + rows_T.sum() > tokens:
                if used:
                    continue
                rows_T &= position_T < tokens
            take_T |= rows_T
            used += int(rows_T.sum())
    return part.filter(pa.array(take_T))


def _dump_prompts(run: Run, rollouts) -> dict[tuple[int, int], dict]:
    """{(rollout id, sample index): {prompt, label}} from the run's rollout dumps, where it wrote any."""
    pattern = run.config.get("save_debug_rollout_data")
    found: dict[tuple[int, int], dict] = {}
    for rollout in rollouts if pattern else ():
        try:
            file = Path(str(pattern).format(rollout_id=rollout))
            file = file.with_suffix(".parquet") if file.suffix in (".parquet", ".pt") else file / f"rollout_{rollout:06d}.parquet"
            rows = pq.read_table(file, columns=["sample_index", "prompt", "label"]).to_pylist()
        except (OSError, ValueError, KeyError, IndexError):  # moved, cut off, other braces in the path: the map then shows no prompts
            continue
        found |= {(int(rollout), int(row["sample_index"])): row for row in rows if row["sample_index"] is not None}
    return found


def frozen_blocks(suite: Suite, runs: list[Run], pieces: Pieces, max_bytes: int, notes: list[str]) -> list[dict]:
    """One block a run over the same frozen contexts: before and after training side by side."""
    if not runs or max_bytes <= 0:
        return []
    per_token = 4 * (2 + 1 + 2 * (len(FROZEN_QUANTITIES) + len(FROZEN_RAW)) + 3 * TOP * 4) / 3
    tokens = sum(len(run.contexts) for run in runs)
    share = min(1.0, max_bytes / max(tokens * per_token, 1))
    blocks = []
    for run in runs:
        try:
            blocks.append(frozen_block(suite, run, pieces, share))
        except TaOpdError as error:
            notes.append(f"{run.name}: frozen contexts are not in the heat map: {error}")
    return blocks


def frozen_block(suite: Suite, run: Run, pieces: Pieces, share: float) -> dict:
    """The frozen contexts of one run, scores from before training, the tokens its rule would keep there, KL before and after."""
    whole = run.contexts if run.contexts_file is None else read_table(run.contexts_file)  # with lists, for as long as this block takes
    inputs = selector_inputs(whole, source="full")
    table = whole.iloc[inputs.rows].reset_index(drop=True)
    config = SelectionConfig.from_args(Namespace(**run.config))
    selection = select_tokens(inputs.metrics, inputs.valid, inputs.response_lengths, config, **inputs.arguments())
    for name in ("H_norm", "D_norm", "C_norm", "Dlearn"):
        table[name] = selection.columns[name]
    table["gain"] = table["KLf_full_base"] - table["KLf_full"]
    table["kept"] = selection.keep
    ordinals = np.unique(table["sample_ordinal"])
    count = max(1, int(share * len(ordinals)))
    shown = ordinals[np.unique(np.linspace(0, len(ordinals) - 1, count).round().astype(int))]
    table = table[table["sample_ordinal"].isin(shown) & (table["tok_pos"] < TOKENS)].reset_index(drop=True)
    prompts = suite.bank_prompts
    responses = []
    for ordinal, rows in table.groupby("sample_ordinal", sort=True):
        known = prompts is not None and ordinal < len(prompts)
        told = (prompts["prompt"].iloc[ordinal], prompts["label"].iloc[ordinal]) if known else (None, None)
        before, after = rows["KLf_full_base"].mean(), rows["KLf_full"].mean()
        responses.append(_response(f"context {ordinal}", rows, *told) | {"note": f"mean KL {before:.3f} before, {after:.3f} after"})
    kl_high = float(np.nanquantile(table["KLf_full_base"], 0.98)) or 1.0
    limits = {q.key: _limits(table[q.key], q.scale) for q in FROZEN_QUANTITIES}
    limits["KLf_full_base"] = limits["KLf_full"] = (0.0, kl_high)
    block = {
        "kind": "frozen", "arm": run.key.label, "run": run.name, "quantities": [vars(q) for q in FROZEN_QUANTITIES],
        "raw": {k: v for k, v in FROZEN_RAW.items() if k in table}, "responses": responses,
        "tokens": _pack_index(pieces.add(table["token_id"].to_numpy(int))), "kept": _pack_bits(table["kept"].to_numpy(bool)),
        "selects": run.key.mask != "full",
        "values": {q.key: _pack(table[q.key], limits[q.key]) for q in FROZEN_QUANTITIES}
        | {name: _pack(table[name]) for name in FROZEN_RAW if name in table},
        "caption": f"{len(shown)} of {len(ordinals)} frozen contexts"
        + ("" if len(shown) == len(ordinals) else " (evenly spaced; the rest does not fit this file)"),
        "top": {},
    }  # fmt: skip
    columns = {"student": ("student", "_base"), "teacher": ("teacher", "_base"), "trained": ("student", "")}
    for side, (name, suffix) in columns.items():
        both = [f"{name}_top_{what}{suffix}" for what in ("ids", "logps")]
        if all(c in table for c in both):
            block["top"][side] = _pack_top(*(parse_lists(table[c], c) for c in both), pieces)
    return block


def _response(name: str, rows: pd.DataFrame, prompt, label) -> dict:
    first = int(rows.index[0])
    full = int(rows["resp_len"].iloc[0]) if "resp_len" in rows else len(rows)
    return {
        "name": name, "start": first, "length": len(rows), "of": full, "prompt": None if prompt is None else str(prompt),
        "label": None if label is None or label != label else str(label),
    }  # fmt: skip


def _limits(values: pd.Series, scale: str) -> tuple[float, float]:
    """Range of the colours: 0 to 1, 0 to the 98 % quantile, or the same to both sides of 0."""
    if scale == "unit":
        return 0.0, 1.0
    known = values.to_numpy(float)
    known = known[np.isfinite(known)]
    high = float(np.quantile(np.abs(known), 0.98)) if len(known) else 1.0
    high = high or 1.0
    return (0.0, high) if scale == "positive" else (-high, high)


def _pack(values, colors: tuple[float, float] | None = None) -> dict:
    """16-bit numbers between the finite extremes; 65535 is "none". `colors`: range of the colour scale."""
    array = np.asarray(values, float)
    known = np.isfinite(array)
    low, high = (float(array[known].min()), float(array[known].max())) if known.any() else (0.0, 1.0)
    span = high - low or 1.0
    coded = np.where(known, np.round((np.where(known, array, low) - low) / span * 65534), 65535).astype("<u2")
    packed = {"low": round(low, 6), "high": round(low + span, 6), "data": _base64(coded)}
    return packed | ({"colors": [round(c, 6) for c in colors]} if colors else {})


def _pack_index(index: np.ndarray) -> str:
    return _base64(index.astype("<u4"))


def _pack_bits(flags: np.ndarray) -> str:
    return _base64(np.packbits(flags.astype(bool)))


def _padded(lists: pd.Series) -> np.ndarray:
    """[T, K] float64 of ragged lists, NaN where shorter."""
    K = max((len(row) for row in lists), default=0)
    out = np.full((len(lists), K), np.nan)
    for i, row in enumerate(lists):
        out[i, : len(row)] = row
    return out


def _pack_top(ids_TK: np.ndarray, logps_TK: np.ndarray, pieces: Pieces) -> dict:
    """The TOP best entries: piece indices (65535 none) and probabilities in 1/65535."""
    K = min(TOP, ids_TK.shape[1])
    ids = np.nan_to_num(ids_TK[:, :K], nan=-1).astype(int)
    local = pieces.add(ids)
    local = np.where((local < 0) | (local > 65534), 65535, local).astype("<u2")
    probability = np.round(np.exp(np.nan_to_num(logps_TK[:, :K], nan=-np.inf)).clip(0, 1) * 65535).astype("<u2")
    return {"k": K, "ids": _base64(local), "p": _base64(probability)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
