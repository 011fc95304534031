"""Profile released, through `process_tip_compat_metrics`, against the definitions in plain Python, on batches beyond the recorded ones."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import released_oracle as oracle
from odd_cases import KINDS, make_case
from port_helpers import kept_rows, load_cases, plain_samples

from slime.rollout import tip_compat
from ta_opd.selection import RELEASED_MASKS
from ta_opd.token_bank import read_bank

RATIOS = (1e-6, 0.03, 0.07, 0.1, 0.3, 0.5, 0.999, 1.0)
BATCHES = [(kind, seed) for kind in KINDS for seed in range(8 if kind == "odd" else 2)]


def process(case: dict, mask: str, ratio: float, rollout_id: int = 0, **more) -> list:
    samples = plain_samples(case)
    args = SimpleNamespace(
        **case["args"], opd_profile="released", opd_budget_mask=mask, opd_budget_ratio=ratio, rollout_id=rollout_id, **more
    )
    tip_compat.process_tip_compat_metrics(args, samples, case["teacher_log_probs"], case["teacher_replies"])
    return samples


def rows_of(case: dict) -> list[dict]:
    return oracle.measure(case["args"], case["samples"], case["teacher_log_probs"], case["teacher_replies"])


def test_the_oracle_is_the_released_code_on_the_recorded_cases():
    for case in load_cases():
        rows = rows_of(case)
        for name, values in case["columns"].items():
            expected = [None if value in ("", None) else value for value in values]
            assert all(row[name] == value or value != value for row, value in zip(rows, expected, strict=True)), (case["name"], name)
        for key, kept in case["kept"].items():
            mask, ratio = key.split("@")
            assert oracle.select(case["args"], rows, mask, float(ratio)) == kept, (case["name"], key)


def test_every_released_mask_is_here():
    assert {*oracle.METHODS, "none", "full"} == set(RELEASED_MASKS)


@pytest.mark.parametrize(("kind", "seed"), BATCHES)
def test_kept_tokens(kind, seed):
    case = make_case(kind, seed)
    rows = rows_of(case)
    for number, mask in enumerate(RELEASED_MASKS):
        for ratio in RATIOS[(number + seed) % 3 :: 3]:
            samples, kept = process(case, mask, ratio, rollout_id=seed), oracle.select(case["args"], rows, mask, ratio, seed)
            if kept is None:
                assert [s.loss_mask for s in samples] == [s["loss_mask"] for s in case["samples"]], (mask, ratio)
            else:
                assert kept_rows(samples) == kept, (mask, ratio)


@pytest.mark.parametrize(("kind", "seed"), BATCHES)
def test_every_column_of_a_csv_bank(kind, seed, tmp_path):
    case = make_case(kind, seed)
    rows, mask, ratio = rows_of(case), RELEASED_MASKS[(7 * seed + len(kind)) % len(RELEASED_MASKS)], RATIOS[seed % len(RATIOS)]
    process(case, mask, ratio, opd_token_bank_dir=str(tmp_path), opd_token_bank_format="csv")
    tip_compat.close_token_banks()
    bank = read_bank(tmp_path)
    kept = oracle.select(case["args"], rows, mask, ratio)
    rows = [row | {"sample_ordinal": row.pop("sample"), "budget_score": score, "budget_keep": row["loss_mask_original"] if kept is None else int(i in kept)}
            for i, (row, score) in enumerate(zip(rows, oracle.reported(rows, mask, ratio), strict=True))]  # fmt: skip
    for name in rows[0]:
        got = [None if pd.isna(value) else value for value in bank[name].astype(object)]
        want = [None if isinstance(row[name], float) and math.isnan(row[name]) else row[name] for row in rows]
        if name == "quadrant":
            assert got == want
            continue
        assert [value is None for value in got] == [value is None for value in want], name
        numbers = np.array([[g, w] for g, w in zip(got, want, strict=True) if g is not None], float).reshape(-1, 2)
        np.testing.assert_allclose(numbers[:, 0], numbers[:, 1], rtol=0, atol=1e-9, err_msg=f"{mask} {ratio} {name}")
