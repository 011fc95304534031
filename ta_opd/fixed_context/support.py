"""Does the finding hang on how 'the student can represent it' is defined? The same analysis for several support definitions and K.

Every variable is a percentile rank (average ties), regressions are on z-scores: base {H, D, H*D, pos, Ht} and decomposition
{H, Dlearn, Dincompat, pos, Ht}, C being the rank of the support definition. Q3 contrast: top against bottom quarter of Dlearn.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.bootstrap import difference_interval, named_rng
from ta_opd.fixed_context.features import resolve_columns, with_gains
from ta_opd.fixed_context.regression import MODELS, coefficient_gap, fit, rank_deficient
from ta_opd.fixed_context.tables import to_markdown, write_json, write_table
from ta_opd.token_bank.jsonio import loads

DEFINITIONS = (
    "Cmass_true", "Coverlap", "CBC", "reach_t1", "target_in_student_topk", "topk_jaccard", "topk_overlap_frac",
    "shared_teacher_topk_mass", "shared_student_topk_mass", "top1_match",
)  # fmt: skip
RAW_TOPK = ("student_top_ids", "student_top_logps", "teacher_top_ids", "teacher_top_logps")
_WITH_K = re.compile(r"^(Cmass_true|Coverlap|CBC|topk_jaccard)_k(\d+)$")


@dataclass(frozen=True)
class SupportConfig:
    """Options of `support_robustness`; min_values: a definition with fewer finite values is skipped, and that is said."""

    profile: str = "paper"
    bootstrap: int = 800
    seed: int = 17
    min_values: int = 100


def support_robustness(datasets: dict[str, pd.DataFrame], config: SupportConfig | None = None) -> pd.DataFrame:
    """One row a dataset and definition: r2_HD, r2_decomp, delta_r2_vs_HD, betas, their gap, Q3 contrast; `note` where it was skipped.

    Definitions are DEFINITIONS plus `<name>_k<K>` columns (robustness to K); set quantities missing from a table are computed from its
    raw top-K columns. Profile `paper` reads `*_base` columns. Raises DataError when a table has no gain, entropy or divergence.
    """
    config = config or SupportConfig()
    rows = []
    for name, table in datasets.items():
        table = with_gains(table)
        suffix = "_base" if config.profile == "paper" else ""
        table = with_set_columns(table, suffix)
        wanted = {"c": _first_definition(table, suffix)}
        if config.profile == "released":
            wanted |= {"gain": "G_KLf" if "G_KLf" in table else None} | {
                role: column
                for role, column in (("h", "Hs_full_base"), ("d", "KLf_full_base"), ("ht", "Ht_full_base"))
                if column in table
            }
            wanted["group"] = "sample_ordinal" if "sample_ordinal" in table else None
        columns = resolve_columns(table, config.profile, **wanted)
        for definition in definitions_of(table, suffix):
            rows.append({"dataset": name, "support": definition, **_one(table, columns, definition + suffix, config, name)})
    return pd.DataFrame(rows)


def definitions_of(table: pd.DataFrame, suffix: str = "") -> list[str]:
    """The support definitions that `table` has (without `suffix`): DEFINITIONS in order, then the `_k<K>` ones by K."""
    plain = [name for name in DEFINITIONS if name + suffix in table]
    stems = [column[: len(column) - len(suffix)] for column in table.columns if column.endswith(suffix)]
    matches = [(int(m.group(2)), m.group(1), stem) for stem in stems if (m := _WITH_K.match(stem))]
    return plain + [stem for _, _, stem in sorted(matches)]


def with_set_columns(table: pd.DataFrame, suffix: str = "") -> pd.DataFrame:
    """`table` with topk_jaccard, topk_overlap_frac (|both| / |teacher's|), shared masses and top1_match, from the raw top-K columns.

    Columns that exist are kept; without raw top-K columns nothing is added, but overlap_frac is Coverlap and top1_match compares the
    top-1 id columns. Raises DataError on a cell that is no JSON list of numbers.
    """
    added = {}
    names = ("topk_jaccard", "topk_overlap_frac", "shared_teacher_topk_mass", "shared_student_topk_mass")
    raw = [name + suffix for name in RAW_TOPK]
    if any(name + suffix not in table for name in names) and all(name in table for name in raw):
        sets = _set_quantities(*(parse_lists(table[name], name) for name in raw))
        added |= {name + suffix: values for name, values in zip(names, sets, strict=True) if name + suffix not in table}
    elif f"topk_overlap_frac{suffix}" not in table and f"Coverlap{suffix}" in table:
        added[f"topk_overlap_frac{suffix}"] = table[f"Coverlap{suffix}"]
    ids = (f"student_top1_id{suffix}", f"teacher_top1_id{suffix}")
    if f"top1_match{suffix}" not in table and all(name in table for name in ids):
        added[f"top1_match{suffix}"] = (table[ids[0]].to_numpy() == table[ids[1]].to_numpy()).astype(float)
    return table.assign(**added) if added else table


def parse_lists(cells: pd.Series, name: str) -> np.ndarray:
    """[N, K] float64 from JSON-array strings (or lists), padded with NaN. DataError on a cell that is neither, or not of numbers."""
    values = cells.tolist()
    if values and all(isinstance(cell, str) and cell for cell in values):
        try:
            rows = loads("[" + ",".join(values) + "]")
            if len(rows) == len(values) and all(isinstance(row, list) for row in rows):
                return np.array(rows, np.float64).reshape(len(values), -1)
        except (ValueError, TypeError):
            pass  # lists of several lengths, or a bad cell: row by row
    parsed = [_one_list(cell, name, row) for row, cell in enumerate(values)]
    out = np.full((len(parsed), max((len(row) for row in parsed), default=0)), np.nan)
    for row, numbers in enumerate(parsed):
        out[row, : len(numbers)] = numbers
    return out


def _one_list(cell, name: str, row: int) -> list[float]:
    if cell is None or (isinstance(cell, str) and cell == "") or (isinstance(cell, float) and cell != cell):
        return []
    try:
        return [float(x) for x in (loads(cell) if isinstance(cell, (str, bytes)) else cell)]
    except (ValueError, TypeError) as error:
        raise DataError(f"column {name}, row {row}: expected a JSON list of numbers, got {str(cell)[:60]!r}") from error


def _set_quantities(student_ids, student_logps, teacher_ids, teacher_logps):
    same = student_ids[:, :, None] == teacher_ids[:, None, :]  # NaN equals nothing
    in_teacher, in_student = same.any(axis=2), same.any(axis=1)
    both = in_teacher.sum(axis=1)
    num_student, num_teacher = np.isfinite(student_ids).sum(axis=1), np.isfinite(teacher_ids).sum(axis=1)
    p_student, p_teacher = np.exp(np.nan_to_num(student_logps, nan=-np.inf)), np.exp(np.nan_to_num(teacher_logps, nan=-np.inf))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (
            both / (num_student + num_teacher - both),
            both / num_teacher,
            (p_teacher * in_student).sum(axis=1),
            (p_student * in_teacher).sum(axis=1),
        )


def _first_definition(table: pd.DataFrame, suffix: str) -> str:
    found = definitions_of(table, suffix)
    if not found:
        raise DataError(f"support: expected one of {', '.join(n + suffix for n in DEFINITIONS)} in the table")
    return found[0] + suffix


def percentile_rank(values: np.ndarray) -> np.ndarray:
    """Ranks 1/n to 1, ties sharing their average (pandas rank(pct=True))."""
    return pd.Series(values).rank(method="average", pct=True).to_numpy()


def _one(table, columns, definition: str, config: SupportConfig, dataset: str) -> dict:
    roles = {"G": columns.gain, "H": columns.h, "D": columns.d, "C": definition, "pos": columns.pos}
    values = {key: table[column].to_numpy(float) for key, column in roles.items()}
    values["Ht"] = table[columns.ht].to_numpy(float) if columns.ht else np.zeros(len(table))
    usable = np.logical_and.reduce([np.isfinite(v) for v in values.values()])
    counts = {"n": int(usable.sum()), "nan_rows": int((~usable).sum())}
    if usable.sum() < config.min_values:
        return counts | {"note": f"skipped: {int(usable.sum())} finite values, expected at least {config.min_values}"}
    values = {key: v[usable] for key, v in values.items()}
    ranks = {key: percentile_rank(values[key]) for key in ("H", "D", "C", "Ht")}
    frame = pd.DataFrame(ranks | {"pos": values["pos"], "G": values["G"], "group": table[columns.group].to_numpy()[usable]})
    frame["Dlearn"], frame["Dincompat"] = frame["D"] * frame["C"], frame["D"] * (1 - frame["C"])
    _, r2_base = fit(frame, MODELS["H_D"], standardise=True)
    gap = coefficient_gap(frame)
    region = frame[(frame["H"] <= frame["H"].quantile(0.5)) & (frame["D"] >= frame["D"].quantile(0.5))]
    contrast = {"q3_tokens": len(region)}
    if len(region):
        low, high = region["Dlearn"].quantile([0.25, 0.75])
        rng = np.random.default_rng(config.seed) if config.profile == "released" else named_rng(config.seed, dataset, definition)
        found = difference_interval(
            region["G"], region["Dlearn"] >= high, region["Dlearn"] <= low, region["group"], config.bootstrap, rng, only_members=True
        )  # fmt: skip
        contrast |= {
            "q3_high_minus_low": found.estimate,
            "q3_high_minus_low_ci_low": found.low,
            "q3_high_minus_low_ci_high": found.high,
        }
    notes = [] if len(region) else ["the Q3 region is empty"]
    if rank_deficient(frame, MODELS["H_Dlearn_Dincompat"], standardise=True):
        notes.append("its values do not vary enough: Dlearn and Dincompat cannot be told apart, betas mean nothing")
    delta = gap["r2_decomp"] - r2_base
    return counts | {"r2_HD": r2_base, **gap, "delta_r2_vs_HD": delta, **contrast, "note": "; ".join(notes)}


def write_support(result: pd.DataFrame, config: SupportConfig, missing: dict[str, str], output_dir) -> Path:
    """Writes support_definition_robustness.{csv,md}, missing_datasets.csv and config.json."""
    out = Path(output_dir)
    write_table(out / "support_definition_robustness.csv", result)
    shown = ["dataset", "support", "n", "r2_HD", "r2_decomp", "delta_r2_vs_HD", "beta_Dlearn", "beta_Dincompat", "beta_gap",
             "q3_high_minus_low", "q3_high_minus_low_ci_low", "q3_high_minus_low_ci_high", "note"]  # fmt: skip
    (out / "support_definition_robustness.md").write_text(to_markdown(result[[c for c in shown if c in result]]))
    write_table(out / "missing_datasets.csv", pd.DataFrame(missing.items(), columns=["dataset", "path"]))
    write_json(out / "config.json", {"options": vars(config)})
    return out
