"""Before and after on the same positions: every before-training column becomes `<name>_base`, and the gains are added.

Two gains, never under one name, for each divergence X in KLf_full, KLr_full, KLf_union, KLr_union that both tables have:

- absolute, nats: `G_X_abs` = before - after (paper eq. 1); positive = the trained student is closer to the teacher.
- relative: `G_X` = (before - after) / (before + 1e-12) (the released code). It has a heavy negative tail where `before` is near 0.

For the two full-vocabulary divergences X is written as the released code does, without `_full`: G_KLf, G_KLr, G_KLf_abs, G_KLr_abs.
"""

import numpy as np
import pandas as pd

from ta_opd.errors import DataError

EPS = 1e-12
# Facts of the position itself: equal before and after, kept once and without a suffix.
POSITION_COLUMNS = (
    "sample_ordinal", "sample_index", "group_index", "prompt_id", "tok_pos", "pos_norm", "prompt_len", "resp_len",
    "total_len", "truncated", "token_id", "loss_mask",
)  # fmt: skip
GAIN_SOURCES = {"KLf_full": "KLf", "KLr_full": "KLr", "KLf_union": "KLf_union", "KLr_union": "KLr_union"}
# Records of two tables that must agree for their rows to mean the same thing.
_SAME = {
    "bank_fingerprint": "context bank",
    "tokenizer_fingerprint": "tokenizer",
    "teacher": "teacher",
    "topk": "K",
    "max_response_tokens": "response limit",
}


def join_baseline(
    after: pd.DataFrame, before: pd.DataFrame, *, after_meta: dict | None = None, before_meta: dict | None = None
) -> pd.DataFrame:
    """`after` with every column of `before` as `<name>_base`, and the gain columns of the module.

    Rows are matched on (sample_index, tok_pos) when both tables have a complete sample_index, else on (sample_ordinal, tok_pos). Both
    tables must hold the same positions, each once, with the same token; their records (`read_meta`), where both say something, must name
    the same bank, tokenizer, teacher, K and response limit. Row order is that of `after`.
    Raises DataError saying which rows or which record differ.
    """
    check_same_origin(after_meta or {}, before_meta or {})
    keys = join_keys(after, before)
    for name, frame in (("after", after), ("before", before)):
        check_unique(frame, keys, f"{name}-training table")
    _check_same_rows(after, before, keys)
    renamed = {
        name: f"{name}_base" for name in before.columns if name not in POSITION_COLUMNS and not name.endswith("_base")
    }
    right = before.rename(columns=renamed)[[*keys, *renamed.values(), *(["token_id"] if "token_id" in before else [])]]
    right = right.rename(columns={"token_id": "_token_before"})
    joined = after.merge(right, on=keys, how="left", validate="one_to_one", sort=False)
    if "_token_before" in joined and "token_id" in joined:
        wrong = joined["token_id"].to_numpy() != joined["_token_before"].to_numpy()
        if wrong.any():
            first = joined.loc[np.flatnonzero(wrong)[0], keys].to_dict()
            raise DataError(
                f"baseline join: {int(wrong.sum())} of {len(joined)} positions hold another token before than after "
                f"training (first at {first}); score both checkpoints on one context bank"
            )
    return add_gains(joined.drop(columns=["_token_before"], errors="ignore"))


def add_gains(joined: pd.DataFrame) -> pd.DataFrame:
    """The gain columns from `X` and `X_base`, for each divergence that both sides have; a copy. DataError when there is none."""
    joined = joined.copy()
    found = False
    for source, name in GAIN_SOURCES.items():
        if source in joined and f"{source}_base" in joined:
            old, new = joined[f"{source}_base"].to_numpy(float), joined[source].to_numpy(float)
            joined[f"G_{name}_abs"] = old - new
            joined[f"G_{name}"] = (old - new) / (old + EPS)
            found = True
    if not found:
        raise DataError(
            f"gain: expected one of {', '.join(GAIN_SOURCES)} before and after training; the tables share none of them"
        )
    return joined


def join_keys(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """[sample key, "tok_pos"]: sample_index when both tables have it without gaps, else sample_ordinal."""
    for key in ("sample_index", "sample_ordinal"):
        if all(key in frame and frame[key].notna().all() for frame in (a, b)):
            if all("tok_pos" in frame for frame in (a, b)):
                return [key, "tok_pos"]
    raise DataError("baseline join: expected sample_index or sample_ordinal, and tok_pos, in both tables")


def check_unique(frame: pd.DataFrame, keys: list[str], what: str) -> None:
    """DataError when two rows of `frame` have the same keys."""
    twice = frame.duplicated(keys)
    if twice.any():
        first = frame.loc[twice.idxmax(), keys].to_dict()
        raise DataError(
            f"{what}: {int(twice.sum())} rows repeat the key {tuple(keys)} (first {first}); "
            "was the same file given twice, or do two runs share sample indices?"
        )


def check_same_origin(after_meta: dict, before_meta: dict) -> None:
    """DataError when the two records contradict each other about bank, tokenizer, teacher, K or response limit."""
    for key, label in _SAME.items():
        a, b = after_meta.get(key), before_meta.get(key)
        if a is not None and b is not None and a != b:
            raise DataError(
                f"baseline join: the tables were made with a different {label}: expected {a!r} (after), got {b!r} (before); "
                "score both checkpoints with the same bank, teacher and --topk"
            )


def _check_same_rows(after: pd.DataFrame, before: pd.DataFrame, keys: list[str]) -> None:
    left, right = pd.MultiIndex.from_frame(after[keys]), pd.MultiIndex.from_frame(before[keys])
    only_after, only_before = ~left.isin(right), ~right.isin(left)
    if only_after.any() or only_before.any():
        example = left[only_after][0] if only_after.any() else right[only_before][0]
        raise DataError(
            f"baseline join on {tuple(keys)}: {int(only_after.sum())} of {len(after)} positions exist only after training and "
            f"{int(only_before.sum())} of {len(before)} only before (for example {tuple(map(int, example))}); "
            "score both checkpoints on the same bank with the same --max-samples and --max-response-tokens"
        )
