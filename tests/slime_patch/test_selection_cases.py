"""The recorded cases of the released code, through process_tip_compat_metrics: every column, every kept set."""

import numpy as np
import pandas as pd
import pytest
from port_helpers import kept_rows, load_cases, plain_samples

from slime.rollout import tip_compat
from ta_opd.token_bank import read_bank

CASES = load_cases()


def args_for(case: dict, mask: str, ratio: float, **more):
    from types import SimpleNamespace

    return SimpleNamespace(
        **case["args"], opd_profile="released", opd_budget_mask=mask, opd_budget_ratio=ratio, rollout_id=0, **more
    )


def run(case: dict, mask: str, ratio: float, **more):
    samples = plain_samples(case)
    args = args_for(case, mask, ratio, **more)
    tip_compat.process_tip_compat_metrics(args, samples, case["teacher_log_probs"], case["teacher_replies"])
    return samples


def test_there_are_1520_kept_sets():
    assert sum(len(case["kept"]) for case in CASES) == 20 * 19 * 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_kept_sets_of_every_method_and_budget(case):
    for key, expected in case["kept"].items():
        mask, ratio = key.split("@")
        assert kept_rows(run(case, mask, float(ratio))) == expected, key


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_columns_and_the_random_draw_through_a_csv_bank(case, tmp_path):
    samples = run(case, "random", 0.3, opd_token_bank_dir=str(tmp_path), opd_token_bank_format="csv")
    tip_compat.close_token_banks()
    assert [path.name for path in tmp_path.glob("rollout_*")] == ["rollout_000000.csv"]
    text = pd.read_csv(tmp_path / "rollout_000000.csv", dtype=str, keep_default_na=False)
    bank = read_bank(tmp_path)
    for name, values in case["columns"].items():
        if name == "quadrant":
            assert text[name].tolist() == values
            continue
        expected = np.array([np.nan if value in (None, "") else value for value in values], float)
        absent = [value in (None, "") for value in values]
        assert [cell == "" for cell in text[name]] == absent, name
        np.testing.assert_allclose(bank[name].to_numpy(float), expected, rtol=0, atol=1e-9, equal_nan=True, err_msg=name)
    assert np.flatnonzero(bank["budget_keep"]).tolist() == case["kept"]["random@0.3"] == kept_rows(samples)
    assert set(text["budget_method"]) == {"random"}


def test_every_format_holds_the_same_bank(tmp_path):
    case, banks = CASES[1], {}
    for kind in ("parquet", "csv", "jsonl"):
        run(case, "tip", 0.3, opd_token_bank_dir=str(tmp_path / kind), opd_token_bank_format=kind, opd_token_bank_raw_topk=True)
        tip_compat.close_token_banks()
        banks[kind] = read_bank(tmp_path / kind)
    for kind in ("csv", "jsonl"):
        assert np.array_equal(np.stack(banks[kind]["student_top_ids"]), np.stack(banks["parquet"]["student_top_ids"]))
        numbers = [name for name in banks[kind] if "_top_" not in name]
        pd.testing.assert_frame_equal(banks[kind][numbers], banks["parquet"][numbers], check_exact=True)
