"""The rows of a scored bank: the released tool's columns, and what this project adds.

Of the position: sample_ordinal (0 in the bank's order), sample_index, group_index, prompt_id, tok_pos, pos_norm (over the scored length),
prompt_len, resp_len (full length), total_len, truncated, token_id, loss_mask.
Full vocabulary: Hs_full, Ht_full, KLf_full, KLr_full (nats), student/teacher_logp_sampled, sampled_reverse_kl, target_student_rank_full,
target_teacher_rank_full, teacher_top1_student_rank.
Of the K best tokens (true probabilities), for the first K under the plain name and for every K, when several were asked for, as
`<name>_k<K>`: see `dense.topk_metrics`; Cmass equals Cmass_true. Raw lists as JSON text: student/teacher_top_ids, _top_logps.
"""

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.ranking import Rows
from ta_opd.token_bank.jsonio import dump_rows

TOPK_NAMES = (
    "Cmass_true", "Cmass_topk", "Coverlap", "CBC", "KLf_union", "KLr_union", "reach_t1", "target_in_student_topk",
    "target_in_teacher_topk", "target_student_rank", "target_teacher_rank", "student_topk_mass", "teacher_topk_mass", "Hs_topk", "Ht_topk",
    "Hs_topk_norm", "Ht_topk_norm", "topk_jaccard", "shared_teacher_topk_mass", "shared_student_topk_mass",
)  # fmt: skip
_CONTEXT = ("sample_index", "group_index", "prompt_id", "prompt_len", "resp_len", "total_len", "truncated")


def position_frame(contexts, which: range) -> dict[str, np.ndarray]:
    """Position columns of the scored rows of contexts `which`, in order."""
    lengths = contexts.scored_len[list(which)]
    of_row = np.repeat(np.asarray(list(which)), lengths)
    out = {"sample_ordinal": of_row}
    for name in _CONTEXT:
        if name in contexts.frame:
            out[name] = contexts.frame[name].to_numpy()[of_row]
    rows = Rows.of(lengths)
    out["tok_pos"], out["pos_norm"] = rows.tok_pos.astype(np.int64), rows.place()
    out["token_id"] = np.concatenate([contexts.tokens[i][contexts.prompt_len[i] :] for i in which])
    out["loss_mask"] = np.concatenate([contexts.loss_mask[i] for i in which]).astype(np.int8)
    return out


def build_rows(contexts, which: range, arrays: dict[str, np.ndarray], ks: tuple[int, ...], *, raw_topk: bool) -> pd.DataFrame:
    """The table of contexts `which` from the arrays of `dense.row_metrics` and `dense.topk_metrics` (names `<metric>@<K>`).

    Raises DataError when a result is not finite (a model gave NaN logits), naming the position.
    """
    out = position_frame(contexts, which)
    out |= {
        "student_logp_sampled": arrays["student_logp"], "teacher_logp_sampled": arrays["teacher_logp"],
        "sampled_reverse_kl": arrays["student_logp"] - arrays["teacher_logp"],
        "Hs_full": arrays["Hs"], "Ht_full": arrays["Ht"], "KLf_full": arrays["KLf"], "KLr_full": arrays["KLr"],
        "target_student_rank_full": arrays["student_rank"], "target_teacher_rank_full": arrays["teacher_rank"],
        "teacher_top1_student_rank": arrays["teacher_top1_student_rank"],
    }  # fmt: skip
    for side in ("student", "teacher"):
        out[f"{side}_top1_id"] = arrays[f"{side}_ids"][:, 0]
        out[f"{side}_top1_prob"] = np.exp(arrays[f"{side}_logps"][:, 0])
    out["top1_match"] = (out["student_top1_id"] == out["teacher_top1_id"]).astype(float)
    bad = ~np.isfinite(out["KLf_full"])
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{int(bad.sum())} positions have no finite divergence (first: context {out['sample_ordinal'][row]}, position "
            f"{out['tok_pos'][row]}); a model returned NaN logits, perhaps from half precision on this device: try --dtype float32"
        )
    out |= topk_columns({K: {name: arrays[f"{name}@{K}"] for name in TOPK_NAMES} for K in ks}, ks)
    if raw_topk:
        K = ks[0]
        for side in ("student", "teacher"):
            out[f"{side}_top_ids"] = dump_rows(arrays[f"{side}_ids"][:, :K])
            out[f"{side}_top_logps"] = dump_rows(np.round(arrays[f"{side}_logps"][:, :K], 6))
    return pd.DataFrame(out)


def topk_columns(by_k: dict[int, dict[str, np.ndarray]], ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Plain names for ks[0], `<name>_k<K>` for every K when there are several. Rank 0 (outside the top-K) is NaN."""
    out: dict[str, np.ndarray] = {}
    for i, K in enumerate(ks):
        suffixes = ([""] if i == 0 else []) + ([f"_k{K}"] if len(ks) > 1 else [])
        for name, values in by_k[K].items():
            values = np.where(values > 0, values, np.nan) if name.endswith("_rank") else values
            out |= {name + suffix: values for suffix in suffixes}
        if "Cmass_true" in by_k[K]:
            out |= {f"Cmass{suffix}": by_k[K]["Cmass_true"] for suffix in suffixes}
    return out

