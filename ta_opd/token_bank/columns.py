"""The 63 columns of a token bank, in the released order, and the step from NumPy arrays to one Arrow table.

One row a response token, valid or not. Shape suffixes: T rows, K entries of the raw top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ta_opd.errors import DataError

SCHEMA_VERSION = 1
QUADRANTS = ("Q1_highH_highD", "Q2_highH_lowD", "Q3_lowH_highD", "Q4_lowH_lowD")
RAW_TOPK = ("student_top_ids", "student_top_logps", "teacher_top_ids", "teacher_top_logps")

_TEXT = pa.dictionary(pa.int32(), pa.string())
_IDS, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.float64())


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type in a parquet bank, and what stands for "none" in the arrays of `ta_opd.metrics`."""

    name: str
    type: pa.DataType
    null_below: int | None = None
    nan_is_null: bool = False

    @property
    def is_text(self) -> bool:
        return pa.types.is_dictionary(self.type)

    @property
    def is_list(self) -> bool:
        return pa.types.is_list(self.type)

    @property
    def read_type(self) -> pa.DataType:
        """The type when read: plain strings for text."""
        return pa.string() if self.is_text else self.type


def _columns(kind: pa.DataType, names: str, **kwargs) -> tuple[Column, ...]:
    return tuple(Column(name, kind, **kwargs) for name in names.split())


COLUMN_TABLE: tuple[Column, ...] = (
    *_columns(pa.int32(), "schema_version"),
    *_columns(_TEXT, "pair_id teacher_name student_name"),
    *_columns(pa.int64(), "seed rollout_id sample_index group_index"),
    *_columns(pa.int32(), "sample_ordinal tok_pos"),
    *_columns(pa.float64(), "pos_norm"),
    *_columns(pa.int32(), "prompt_len resp_len total_len"),
    *_columns(pa.int8(), "truncated"),
    *_columns(pa.int32(), "token_id"),
    *_columns(pa.float64(), "student_logp_sampled teacher_logp_sampled sampled_reverse_kl sampled_teacher_adv"),
    *_columns(pa.int32(), "student_top1_id teacher_top1_id", null_below=0),
    *_columns(pa.float64(), "student_top1_prob teacher_top1_prob student_topk_mass teacher_topk_mass"),
    *_columns(pa.float64(), "Hs_topk Ht_topk Hs_topk_norm Ht_topk_norm KLf_union KLr_union"),
    *_columns(pa.float64(), "Cmass Cmass_topk"),
    *_columns(pa.float64(), "Cmass_true", nan_is_null=True),
    *_columns(pa.int8(), "Cmass_exact"),
    *_columns(pa.float64(), "Coverlap CBC Cprefix_ema"),
    *_columns(pa.int8(), "reach_t1 target_in_student_topk target_in_teacher_topk"),
    *_columns(pa.int32(), "target_student_rank target_teacher_rank", null_below=1),
    *_columns(pa.int8(), "loss_mask_original"),
    *_columns(pa.float64(), "H_norm D_norm C_norm DC_norm Dlearn Dincompat tip_score ca_softor_score split_ca_score"),
    *_columns(_TEXT, "quadrant budget_method"),
    *_columns(pa.float64(), "budget_ratio budget_score"),
    *_columns(pa.int8(), "budget_keep"),
    *_columns(_IDS, "student_top_ids"),
    *_columns(_LOGPS, "student_top_logps"),
    *_columns(_IDS, "teacher_top_ids"),
    *_columns(_LOGPS, "teacher_top_logps"),
)
BY_NAME: dict[str, Column] = {column.name: column for column in COLUMN_TABLE}
COLUMNS: dict[str, pa.DataType] = {column.name: column.type for column in COLUMN_TABLE}


def check_columns(columns: Mapping[str, object]) -> int:
    """The number of rows of `columns`; scalars stand for constant columns.

    Raises DataError on an unknown name, on arrays of different lengths, or when no array gives the length.
    """
    unknown = [name for name in columns if name not in BY_NAME]
    if unknown:
        raise DataError(f"token bank: unknown columns {unknown}; the columns are {', '.join(BY_NAME)}")
    lengths = {name: len(value) for name, value in columns.items() if not _is_scalar(value)}
    if not lengths:
        raise DataError("token bank: expected at least one array column (token_id, for example), got only constants")
    first_name, first = next(iter(lengths.items()))
    for name, length in lengths.items():
        if length != first:
            raise DataError(f"token bank: column {name} has {length} rows, but {first_name} has {first}")
    return first


def build_table(columns: Mapping[str, object], *, raw_topk: bool = False) -> pa.Table:
    """Arrays (or scalars, for constant columns) to the bank's Arrow table with all 63 columns.

    columns: a subset of COLUMNS, encoded as by `ta_opd.metrics` and `ta_opd.selection` ("none" is id -1, rank 0,
    Cmass_true NaN); integers may also come as floats with NaN or as masked arrays. `quadrant` takes codes 1 to 4 or
    names. The raw top-k columns take [T, K] arrays padded as in TopK (ids -1) and are null unless `raw_topk`. A missing
    column is null. Raises DataError as `check_columns` does.
    """
    rows = check_columns(columns)
    arrays = []
    for column in COLUMN_TABLE:
        value = columns.get(column.name)
        if value is None or (column.is_list and not raw_topk):
            arrays.append(pa.nulls(rows, column.type))
        elif column.is_list:
            ids_TK = np.asarray(columns[column.name.replace("logps", "ids")])
            arrays.append(_ragged(np.asarray(value), ids_TK >= 0, column.type))
        elif column.is_text:
            arrays.append(_text(value, rows, column))
        else:
            arrays.append(_numbers(value, rows, column))
    return pa.table(dict(zip(COLUMNS, arrays, strict=True)), schema=pa.schema(list(COLUMNS.items())))


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str) or np.ndim(value) == 0


def _numbers(value: object, rows: int, column: Column) -> pa.Array:
    values = np.ma.asarray(value) if np.ma.isMaskedArray(value) else np.asarray(value)
    if values.ndim == 0:
        values = np.full(rows, values)
    mask = np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else np.zeros(rows, bool)
    values = np.ma.getdata(values)
    if values.dtype.kind == "f" and (pa.types.is_integer(column.type) or column.nan_is_null):
        absent = ~np.isfinite(values)
        values, mask = np.where(absent, 0, values), mask | absent
    if column.null_below is not None:
        mask = mask | (values < column.null_below)
    values = values.astype(column.type.to_pandas_dtype(), copy=False)
    return pa.array(values, type=column.type, mask=mask if mask.any() else None)


def _text(value: object, rows: int, column: Column) -> pa.Array:
    if isinstance(value, np.ndarray) and value.size and value.strides == (0,):  # one value, broadcast
        value = str(value[0])
    if isinstance(value, str):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    values = np.asarray(value)
    if column.name == "quadrant" and values.dtype.kind in "iu":
        if rows and not (1 <= values.min() and values.max() <= len(QUADRANTS)):
            raise DataError(f"token bank: quadrant codes must be 1 to {len(QUADRANTS)}, got {np.unique(values)}")
        return pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int32) - 1), pa.array(QUADRANTS))
    return pa.array(values, type=pa.string()).dictionary_encode()


def _ragged(values_TK: np.ndarray, real_TK: np.ndarray, kind: pa.DataType) -> pa.Array:
    """[T, K] padded values to a list column without the padding."""
    offsets = np.zeros(len(values_TK) + 1, np.int32)
    np.cumsum(real_TK.sum(axis=1), out=offsets[1:])
    flat = values_TK[real_TK].astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind.value_type))
