"""METHOD_LIST entries, budget tags old and new, seed labels."""

import pytest

from ta_opd.errors import ConfigError
from ta_opd.suite import methods
from ta_opd.suite.methods import budget_tag, parse_entries, parse_seeds, read_budget_tag, resolve_method, slug

README = "pure_opd:1.0:10 teachability:0.10:20 entropy:0.10:30 teachability_entropy:0.10:40 tip:0.10:50"


def test_the_readme_list():
    entries = parse_entries(README)
    assert [(e.method, e.mask, e.ratio, e.index) for e in entries] == [
        ("pure_opd", "full", 1.0, 10), ("teachability", "dlearn_high", 0.1, 20), ("entropy", "entropy", 0.1, 30),
        ("teachability_entropy", "ca_softor", 0.1, 40), ("tip", "tip", 0.1, 50),
    ]  # fmt: skip
    assert parse_entries(README.replace(" ", ",")) == entries
    assert parse_entries(" , ".join(README.split())) == entries


@pytest.mark.parametrize(
    ("mask", "names"),
    {
        "full": "pure_opd full_opd full none", "dlearn_high": "teachability teachability_high dlearn dlearn_high",
        "entropy": "entropy high_entropy", "ca_softor": "teachability_entropy entropy_teachability ta_softor dlearn_entropy",
        "split_budget_ca": "teachability_entropy_split entropy_teachability_split ta_split", "tip": "tip tip_softor",
        "q3_highc": "q3_highc q3_highC", "q3": "q3", "divergence": "divergence high_d raw_d", "random": "random",
        "compatibility": "compatibility high_c",
    }.items(),
)  # fmt: skip
def test_every_released_alias(mask, names):
    assert {resolve_method(name) for name in names.split()} == {mask}


def test_full_has_ratio_one_and_a_missing_index_is_filled_in():
    assert [(e.ratio, e.index) for e in parse_entries("pure_opd:0.3 tip:0.5")] == [(1.0, 10), (0.5, 20)]


@pytest.mark.parametrize("text", ["", " , ", "tip", "tip:0", "tip:1.5", "tip:nan", "tip:0.1:-1", "tip:0.1:1:1", "tip:0.1 tip:0.10", "a:0.1"])
def test_bad_lists(text):
    with pytest.raises(ConfigError, match="RUN_LIST"):
        parse_entries(text, "RUN_LIST")


@pytest.mark.parametrize(("ratio", "tag"), [(0.05, "r0p05"), (0.1, "r0p10"), (0.005, "r0p005"), (1.0, "r1p00"), (0.125, "r0p125"), (0.3, "r0p30")])
def test_new_tags(ratio, tag):
    assert budget_tag(ratio) == tag
    assert read_budget_tag(tag) == ratio


@pytest.mark.parametrize(
    ("tag", "ratio"),
    [("005", 0.05), ("ratio005", 0.05), ("010", 0.10), ("ratio010", 0.1), ("003", 0.03), ("001", 0.01), ("01", 0.1), ("10", 1.0), ("1", 1.0), ("0005", 0.005)],
)
def test_released_tags_are_ratios_without_their_dot(tag, ratio):
    assert read_budget_tag(tag) == ratio


@pytest.mark.parametrize("tag", ["", "r0.05", "50", "ratio", "r2p00", "000", "0p05", "11"])
def test_other_tags_are_refused(tag):
    with pytest.raises(ConfigError, match="budget tag"):
        read_budget_tag(tag)


def test_tags_of_the_released_shell_are_read_back():
    for text in ("0.01", "0.03", "0.05", "0.10", "0.1", "1.0", "0.125"):
        assert read_budget_tag("ratio" + text.replace(".", "")) == float(text)


def test_seed_labels():
    assert [(s.train, s.rollout, s.mask) for s in parse_seeds("seed1 seed2,seed3")] == [(1234, 42, 42), (1235, 43, 43), (1236, 44, 44)]
    assert parse_seeds("mine=7/8/9") == [methods.Seeds("mine", 7, 8, 9)]
    assert parse_seeds("seed1", ("5", "", None)) == [methods.Seeds("seed1", 5, 42, 42)]
    assert parse_seeds("anything") == [methods.Seeds("anything", 1234, 42, 42)]
    for bad in ("", "seed1 seed1", "a b", "x=1/2", "x=a/b/c", "s/1"):
        with pytest.raises(ConfigError, match="SEEDS"):
            parse_seeds(bad)


def test_slug():
    assert slug("/models/Qwen3-1.7B/") == "qwen3_1p7b"
    assert slug("a b.jsonl") == "a_bpjsonl"


def test_masks_that_launchers_take_without_python_are_masks():
    import re

    from tests.launchers.conftest import ROOT

    listed = re.search(r"none \| ([a-z0-9_ |]+)\) return", (ROOT / "scripts/lib/run.sh").read_text())[1].split(" | ")
    assert len(listed) > 8
    assert [resolve_method(m) for m in listed] == listed


def test_command_line(capsys):
    assert methods.main(["teachability", "raw_d"]) == 0
    assert capsys.readouterr().out.split() == ["dlearn_high", "divergence"]
    assert methods.main(["teachabiliti"]) == 2
    assert "did you mean 'teachability'" in capsys.readouterr().err
