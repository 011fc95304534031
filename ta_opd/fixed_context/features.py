"""Which columns an analysis uses, and the features it builds from them.

Profile `paper` uses only what was known before training: entropy, divergence, compatibility and the teacher's entropy are `*_base`
columns, the gain is the absolute one (paper eq. 1), and rows are clustered by prompt. Profile `released` picks the columns the released
tools pick, which are partly the trained student's, and the relative gain.
"""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.join import GAIN_SOURCES, add_gains
from ta_opd.scores import PROFILES, ScoreConfig, normalise, soft_or

CANDIDATES = {
    "released": {
        "gain": ("G_KLf", "G_KLr"),
        "h": ("H_norm", "Hs_full", "Hs_topk_norm", "Hs"),
        "d": ("D_norm", "KLf_full_base", "KLf_full", "KLf_union", "KLf"),
        "c": ("Cmass_true", "Cmass", "C_norm", "CBC", "Coverlap"),
        "group": ("sample_index", "prompt_id", "group_index", "sample_ordinal"),
        "pos": ("pos_norm", "tok_pos"),
        "ht": ("Ht_full_base", "Ht_full", "Ht_topk_norm", "Ht"),
    },
    "paper": {
        "gain": ("G_KLf_abs", "G_KLf_union_abs"),
        "h": ("Hs_full_base", "Hs_topk_norm_base"),
        "d": ("KLf_full_base", "KLf_union_base"),
        "c": ("Cmass_true_base", "Cmass_base", "Cmass_topk_base"),
        "group": ("prompt_id", "group_index", "sample_index", "sample_ordinal"),
        "pos": ("pos_norm", "tok_pos"),
        "ht": ("Ht_full_base", "Ht_topk_norm_base"),
    },
}
REGION_QUANTILE = 0.5


@dataclass(frozen=True)
class Columns:
    """The column an analysis reads for each role; `ht` may be None (then the teacher's entropy counts as 0)."""

    gain: str
    h: str
    d: str
    c: str
    group: str
    pos: str
    ht: str | None

    def as_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def with_gains(table: pd.DataFrame) -> pd.DataFrame:
    """`table`, with the gain columns computed where it has a divergence before and after training but no gain yet."""
    for source, name in GAIN_SOURCES.items():
        if {source, f"{source}_base"} <= set(table.columns) and f"G_{name}_abs" not in table:
            given = {n: table[n] for n in table.columns if n.startswith("G_")}
            return add_gains(table).assign(**given)
    return table


def resolve_columns(table: pd.DataFrame, profile: str, **overrides) -> Columns:
    """The columns of `profile` that `table` has; an override (gain=, h=, d=, c=, group=, pos=, ht=) that is not None wins.

    Raises ConfigError on an unknown profile, DataError when a role has no column (with what profile `paper` needs) or an override is
    not in the table.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
    chosen = {}
    for role, candidates in CANDIDATES[profile].items():
        asked = overrides.get(role)
        if asked is not None:
            if asked not in table:
                raise DataError(f"{role} column {asked!r} is not in the table; it has {', '.join(table.columns[:40])}")
            chosen[role] = asked
            continue
        found = [name for name in candidates if name in table and table[name].notna().any()]
        if not found and role != "ht":
            hint = (
                "; join a before-training table that has it (tools/eval_fixed_context_bank.py --baseline-metrics), "
                "or use --profile released"
                if profile == "paper"
                else ""
            )
            raise DataError(f"{role} column: expected one of {', '.join(candidates)} in the table{hint}")
        chosen[role] = found[0] if found else None
    return Columns(**chosen)


def before_training_where_released(table: pd.DataFrame, profile: str) -> dict:
    """Overrides with which some released tools prefer the before-training H and D; nothing for other profiles."""
    if profile != "released":
        return {}
    return {role: name for role, name in (("h", "Hs_full_base"), ("d", "KLf_full_base")) if name in table}


@dataclass(frozen=True)
class Features:
    """`frame` [N rows]: G, H, D, C (normalised, 0 to 1), raw_h, raw_d, raw_c, pos, Ht, Dlearn, Dincompat, tip_score, ca_softor_score,
    group, row (position in the input table). `nan_rows` input rows were left out; `notes` say what was done."""

    frame: pd.DataFrame
    columns: Columns
    nan_rows: int
    notes: tuple[str, ...]


def build_features(
    table: pd.DataFrame,
    columns: Columns,
    *,
    profile: str,
    q_low: float = 0.05,
    q_high: float = 0.95,
    winsor: tuple[float, float] | None = None,
    trim: tuple[float, float] | None = None,
) -> Features:
    """Features of every row with a finite gain (profile `paper`: and finite H, D and C).

    Normalisation is clip((x - Q_low) / (Q_high - Q_low), 0, 1) over the table (paper eq. 11), position over its whole range.
    winsor = (low, high) clips the gain at those quantiles; trim = (low, high) leaves rows outside them out. Raises DataError when no row
    is left.
    """
    values = {role: table[name].to_numpy(float) for role, name in columns.as_dict().items() if name and role != "group"}
    needed = ["gain"] if profile == "released" else ["gain", "h", "d", "c"]
    usable = np.logical_and.reduce([np.isfinite(values[role]) for role in needed])
    nan_rows, notes = int((~usable).sum()), []
    if nan_rows:
        notes.append(f"{nan_rows} of {len(table)} rows without a finite {', '.join(needed)} were left out")
    if not usable.any():
        raise DataError(f"no row has a finite {', '.join(needed)} ({len(table)} rows)")
    gain = values["gain"]
    if trim is not None:
        low, high = np.quantile(gain[usable], trim)
        inside = usable & (gain >= low) & (gain <= high)
        notes.append(f"gain trimmed at quantiles {trim[0]} and {trim[1]}: {int((usable & ~inside).sum())} rows left out")
        usable = inside
    gain = gain[usable]
    if winsor is not None:
        low, high = np.quantile(gain, winsor)
        gain = np.clip(gain, low, high)
        notes.append(f"gain winsorised at quantiles {winsor[0]} and {winsor[1]}")
    scale = _pandas_scale if profile == "released" else _scale
    raw = {role: values[role][usable] for role in ("h", "d", "c")}
    h, d, c = (scale(raw[role], q_low, q_high) for role in ("h", "d", "c"))
    pos = scale(values["pos"][usable], 0.0, 1.0)
    ht = scale(values["ht"][usable], q_low, q_high) if columns.ht else np.zeros(len(gain))
    frame = pd.DataFrame(
        {
            "G": gain, "H": h, "D": d, "C": c, "raw_h": raw["h"], "raw_d": raw["d"], "raw_c": raw["c"], "pos": pos, "Ht": ht,
            "Dlearn": d * c, "Dincompat": d * (1 - c), "tip_score": soft_or(h, d), "ca_softor_score": soft_or(h, d * c),
            "group": table[columns.group].to_numpy()[usable], "row": np.flatnonzero(usable),
        }
    )  # fmt: skip
    if frame["group"].isna().any():
        raise DataError(f"group column {columns.group!r}: {int(frame['group'].isna().sum())} rows have none")
    return Features(frame, columns, nan_rows, tuple(notes))


def _scale(x: np.ndarray, q_low: float, q_high: float) -> np.ndarray:
    return normalise(x, None, ScoreConfig(q_low=q_low, q_high=q_high))


def _pandas_scale(x: np.ndarray, q_low: float, q_high: float) -> np.ndarray:
    """The same with pandas' interpolation, whose last bits decide the ties of the released top-N."""
    series = pd.Series(x)
    low, high = series.quantile(q_low), series.quantile(q_high)
    if not abs(high - low) >= 1e-12:
        return np.zeros(len(x))
    return ((series - low) / (high - low)).clip(0, 1).fillna(0).to_numpy()


def low_entropy_high_divergence(
    frame: pd.DataFrame, h_quantile: float = REGION_QUANTILE, d_quantile: float = REGION_QUANTILE
) -> np.ndarray:
    """[N] bool, the Q3 region: H at or below its quantile and D at or above its quantile (as the released offline tools cut it)."""
    h, d = frame["H"].to_numpy(), frame["D"].to_numpy()
    return (h <= np.quantile(h, h_quantile)) & (d >= np.quantile(d, d_quantile))


def parse_quantile_pair(text: str | None) -> tuple[float, float] | None:
    """'0.01,0.99' -> (0.01, 0.99); None, '' and 'none' -> None. ConfigError unless 0 <= low < high <= 1."""
    if text is None or text.strip().lower() in ("", "none"):
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"quantile pair: expected LOW,HIGH such as 0.01,0.99, got {text!r}") from error
    if not 0 <= low < high <= 1:
        raise ConfigError(f"quantile pair: expected 0 <= LOW < HIGH <= 1, got {text!r}")
    return low, high
