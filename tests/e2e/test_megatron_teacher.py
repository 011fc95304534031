"""A teacher on the trainer's ranks: selection by its whole vocabulary, through the real loop, without a word about K."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from ta_opd.token_bank import read_bank

pytestmark = pytest.mark.e2e


def test_selection_by_the_whole_vocabulary(run, task):
    bank = task.root / "exact_bank"
    result = run("exact", "--opd-type", "megatron", "--opd-teacher-load", str(task.teacher), "--opd-topk-metrics-k", "0",
                 "--opd-budget-mask", "tip_q3", "--opd-budget-ratio", "0.2", "--opd-budget-min-keep-per-sample", "0",
                 "--opd-budget-scope", "batch", "--opd-budget-rounding", "ceil", "--opd-token-bank-dir", str(bank), "--num-rollout", "2",
                 "--save-debug-rollout-data", str(task.root / "exact_dumps"))  # fmt: skip
    vocabulary = json.loads((task.student / "config.json").read_text())["vocab_size"]
    assert len(result.rows) == 2
    for row in result.rows:
        assert row["rollout/kept_tokens"] == row["train/kept_count"] == math.ceil(0.2 * row["rollout/valid_tokens"] - 1e-9)
        assert row["rollout/exact_fraction"] == 1.0
    dump = pq.read_table(task.root / "exact_dumps" / "rollout_000001.parquet").to_pandas()
    assert sum(sum(w > 0 for w in weights) for weights in dump["opd_weights"]) == result.rows[1]["rollout/kept_tokens"]
    table = read_bank(bank)
    assert table["Cmass_exact"].eq(1).all() and table["KLf_union"].gt(0).all()
    np.testing.assert_allclose(table["Hs_topk_norm"], table["Hs_topk"] / math.log(vocabulary), rtol=1e-5)
    for _, rollout in table.groupby("rollout_id"):
        entropy = np.minimum(rollout["Hs_topk_norm"], np.quantile(rollout["Hs_topk_norm"], 0.98))
        score = rollout["KLf_union"] * (1 - entropy)  # TIP's rule for overconfident errors
        assert score[rollout["budget_keep"] == 1].min() >= score[rollout["budget_keep"] == 0].max() - 1e-6
