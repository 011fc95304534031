import numpy as np
import pandas as pd
import pytest

from ta_opd.errors import DataError
from ta_opd.fixed_context.join import add_gains, join_baseline


def scored(shift=0.0, n=6):
    return pd.DataFrame(
        {"sample_ordinal": [0, 0, 0, 1, 1, 1][:n], "sample_index": [7, 7, 7, 9, 9, 9][:n], "tok_pos": [0, 1, 2, 0, 1, 2][:n],
         "token_id": [5, 6, 7, 8, 9, 3][:n], "KLf_full": np.arange(1.0, n + 1) + shift, "KLr_full": 2.0, "Hs_full": 0.5,
         "Cmass_true": 0.25, "student_top_ids": ["[1]"] * n}
    )  # fmt: skip


def test_every_before_column_is_kept_and_positions_are_not_doubled():
    joined = join_baseline(scored(-0.5), scored())
    for name in ("KLf_full", "KLr_full", "Hs_full", "Cmass_true", "student_top_ids"):
        assert f"{name}_base" in joined
    assert not {"token_id_base", "tok_pos_base", "sample_index_base"} & set(joined)
    assert (joined["KLf_full_base"] == scored()["KLf_full"]).all()


def test_absolute_and_relative_gain_are_two_columns():
    joined = join_baseline(scored(-0.5), scored())
    np.testing.assert_allclose(joined["G_KLf_abs"], 0.5)
    np.testing.assert_allclose(joined["G_KLf"], 0.5 / np.arange(1.0, 7.0))
    assert {"G_KLr", "G_KLr_abs"} <= set(joined)


def test_row_order_of_the_baseline_does_not_matter():
    joined = join_baseline(scored(-0.5), scored().sample(frac=1, random_state=0))
    np.testing.assert_allclose(joined["G_KLf_abs"], 0.5)


def test_sample_ordinal_is_used_when_an_index_is_missing():
    after, before = scored(), scored()
    after["sample_index"] = [7, 7, 7, np.nan, 9, 9]
    before["sample_index"] = 0
    assert len(join_baseline(after, before)) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.iloc[:-1], "1 of 6 positions exist only after"),
        (lambda b: pd.concat([b, b.iloc[:1]]), "repeat the key"),
        (lambda b: b.assign(token_id=[5, 6, 7, 8, 9, 4]), "another token before than after"),
        (lambda b: b.assign(tok_pos=[0, 1, 2, 0, 1, 3]), "only before"),
        (lambda b: b.drop(columns="tok_pos"), "tok_pos, in both tables"),
    ],
)
def test_tables_that_do_not_match(change, message):
    with pytest.raises(DataError, match=message):
        join_baseline(scored(), change(scored()))


@pytest.mark.parametrize(
    "key, label", [("bank_fingerprint", "context bank"), ("tokenizer_fingerprint", "tokenizer"), ("topk", "K"), ("teacher", "teacher")]
)
def test_records_that_do_not_match(key, label):
    with pytest.raises(DataError, match=f"different {label}"):
        join_baseline(scored(), scored(), after_meta={key: [16]}, before_meta={key: [8]})


def test_a_record_that_says_nothing_is_no_contradiction():
    join_baseline(scored(), scored(), after_meta={"topk": [16]}, before_meta={})


def test_no_divergence_in_common():
    with pytest.raises(DataError, match="share none of them"):
        add_gains(scored().drop(columns=["KLf_full", "KLr_full"]))
