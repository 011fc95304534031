"""docs/method.md says what the code does: its example runs, its tables name every mask, flag and profile value."""

import re
from pathlib import Path

import numpy as np
import pytest

from ta_opd.metrics import METRIC_COLUMNS
from ta_opd.scores import SCORE_COLUMNS
from ta_opd.selection import _ARGUMENT, MASK_CHOICES, METHOD_ALIASES, PROFILE_DEFAULTS, SelectionConfig, select_tokens
from ta_opd.selectors import registry

TEXT = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))
WORDS = set(re.findall(r"\w+", TEXT))


def test_every_mask_alias_and_column_is_named():
    fused = {name for name in MASK_CHOICES if name.endswith("_ier_and")}
    assert set(MASK_CHOICES) - fused <= WORDS
    assert set(METHOD_ALIASES) <= WORDS
    assert {name for name in SCORE_COLUMNS if name not in CODE} == set()
    patterns = {"target_in_*_topk", "target_*_rank", "student_top1_id/prob", "teacher_top1_id/prob"}
    assert patterns <= CODE
    plain = [n for n in METRIC_COLUMNS if "top1" not in n and not n.startswith("target_") and not n.endswith("logp_sampled")]
    assert [name for name in plain if name not in CODE] == []


@pytest.mark.parametrize("profile, column", [("paper", 3), ("released", 4)])
def test_profile_table_is_the_code(profile, column):
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ") and "--opd-" in line and line.count("|") == 5]
    said = {row[2].strip().strip("`").removeprefix("--").replace("-", "_"): row[column] for row in rows}
    defaults = PROFILE_DEFAULTS[profile]
    for name, value in defaults.items():
        if name == "scope":  # batch in both
            continue
        if name == "reported_score":
            assert _ARGUMENT[name] in said
            continue
        assert f"`{value}`" in said[_ARGUMENT[name]], name


def test_the_example_selector_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
    block = next(b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "register_selector" in b)
    assert len(block.strip().splitlines()) <= 15
    (tmp_path / "my_rule.py").write_text(block)
    rng = np.random.default_rng(0)
    metrics = {name: rng.random(20) for name in ("Hs_topk_norm", "KLf_union", "Cmass")}
    metrics["student_logp_sampled"], metrics["teacher_logp_sampled"] = -rng.exponential(1, (2, 20))
    metrics["target_teacher_rank"] = np.tile([1, 2], 10)
    config = SelectionConfig(selector_path=f"{tmp_path / 'my_rule.py'}:confident_mistakes", ratio=0.2)
    assert config.scope == "response"
    selection = select_tokens(metrics, np.ones(20), [10, 10], config)
    score = np.exp(metrics["student_logp_sampled"]) * (1 - np.exp(metrics["teacher_logp_sampled"]))
    expected = {2 * i + 1 + half for half in (0, 10) for i in np.argsort(-score[half : half + 10][1::2])[:2]}
    assert set(np.flatnonzero(selection.keep).tolist()) == expected
    np.testing.assert_allclose(selection.weights[selection.keep], 1 + score[selection.keep], rtol=1e-6)
