"""Token texts and kinds, repetition, and the packed data of the heat map."""

from __future__ import annotations

import base64
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from ta_opd.report import figures_tokens, health, heatmap, loading
from ta_opd.report.figures_tokens import kept_rows, kind_table, valid_rows
from ta_opd.report.loading import BankSample
from ta_opd.report.style import arm_styles
from ta_opd.report.vocabulary import Vocabulary, from_tokenizer_json, kind_of, kinds_in_context, load_vocabulary


@pytest.mark.parametrize(
    "piece, kind",
    [("7", "number"), (" 42", "number"), ("3.14", "number"), ("+", "operator"), (" -", "operator"), ("=", "equals"), (";", "punctuation"),
     (" the", "word"), ("ing", "word part"), ("A", "word"), ("\n", "space"), (" ", "space"), ("$\\", "punctuation"), ("x1", "word part"),
     ("", "other"), ("_3", "other")],
)  # fmt: skip
def test_kind_of_a_piece(piece, kind):
    assert kind_of(piece) == kind


def test_digits_after_an_equals_sign_are_results():
    pieces = ("<eos>", "1", "2", "+", "=", ";", " ")
    vocabulary = Vocabulary(pieces, frozenset({0}))
    text = ["1", "+", "2", "=", "1", "2", ";", "1", "<eos>"] + ["2", "=", " ", "1"] + ["1"]
    ids = np.array([pieces.index(t) for t in text])
    starts = np.zeros(len(ids), bool)
    starts[[0, 9, 13]] = True
    kinds = kinds_in_context(ids, starts, vocabulary).tolist()
    assert kinds[:9] == ["number", "operator", "number", "equals", "result", "result", "punctuation", "number", "special"]
    assert kinds[9:] == ["number", "equals", "space", "result", "number"]  # the last response starts anew


def test_byte_level_pieces_are_decoded():
    content = {"model": {"type": "BPE", "vocab": {"Ġthe": 0, "Ċ": 1, "Ã©": 2, "æ": 3, "<|endoftext|>": 4}}, "decoder": {"type": "ByteLevel"},
               "added_tokens": [{"id": 4, "content": "<|endoftext|>", "special": True}]}  # fmt: skip
    vocabulary = from_tokenizer_json(content)
    assert vocabulary.pieces == (" the", "\n", "é", "\\xe6", "<|endoftext|>") and vocabulary.special == {4}
    assert vocabulary.text(99) == "[99]"


def test_unigram_lists_and_missing_files(tmp_path):
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0], ["▁a", -1]]}, "decoder": {"type": "Metaspace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_vocabulary([None, tmp_path / "nowhere", tmp_path]).pieces == ("<unk>", " a")
    (tmp_path / "tokenizer.json").write_text("{")
    assert load_vocabulary([tmp_path]) is None


def test_repetition_equals_a_plain_count():
    rng = np.random.default_rng(0)
    rows = []
    for rollout in range(3):
        for sample in range(4):
            for pos, token in enumerate(rng.integers(0, 3, rng.integers(2, 40))):
                rows.append((rollout, sample, pos, token))
    table = pd.DataFrame(rows, columns=["rollout_id", "sample_ordinal", "tok_pos", "token_id"])
    found = health.repetition(table.sample(frac=1, random_state=1))
    for rollout, part in table.groupby("rollout_id"):
        shares = []
        for _, response in part.groupby("sample_ordinal"):
            ids = response.sort_values("tok_pos")["token_id"].tolist()
            grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
            if grams:
                shares.append(sum(g in grams[:i] for i, g in enumerate(grams)) / len(grams))
        assert found[rollout] == pytest.approx(np.mean(shares))


def collapse(run, **columns):
    """The run with other numbers in some columns of its metrics."""
    run.metrics = run.metrics.assign(**columns)
    return run


@pytest.mark.parametrize(
    "column, values, name",
    [("rollout/response_length", [30, 25, 20, 10, 4, 2], "response length"), ("rollout/truncated", [0, 0, 0, 0.1, 0.3, 0.6], "truncated responses"),
     ("rollout/reverse_kl_valid", [0.5, 0.5, 0.6, 0.9, 1.0, 2.0], "reverse KL, all valid tokens")],
)  # fmt: skip
def test_each_sign_of_collapse_is_seen(suite_dir, column, values, name):
    run = loading.load(suite_dir).runs[0]
    assert not [c for c in health.check_run(run, None) if c.bad]
    bad = [c.name for c in health.check_run(collapse(run, **{column: values}), None) if c.bad]
    assert bad == [name]
    assert health.warnings(health.check_run(run, None))[0].startswith("Full OPD (full_1_seed1): " + name)


def test_lost_entropy_and_repetition_are_seen(suite_dir):
    run = loading.load(suite_dir).runs[0]
    bank = loading.sample_bank(run, max_rollouts=10, max_rows=10**6, notes=[])
    table = bank.table.copy()
    last = table["rollout_id"] == 5
    table.loc[last, "Hs_topk"] = 1e-3
    table.loc[last, "token_id"] = 3
    bad = {c.name for c in health.check_run(run, BankSample(table, bank.rollouts, bank.of)) if c.bad}
    assert bad == {"student entropy", "repeated 4-grams"}


def test_kind_table_adds_up(suite_dir):
    suite = loading.load(suite_dir)
    samples = {k: loading.sample_bank(r[0], max_rollouts=9, max_rows=10**6, notes=[]) for k, r in suite.arms.items()}
    table = kind_table(samples, load_vocabulary([suite_dir / "tokenizer"]))
    for key, part in table.groupby("mask"):
        sample = next(s for k, s in samples.items() if k.mask == key).table
        assert part["valid"].sum() == valid_rows(sample).sum() and part["kept"].sum() == kept_rows(sample).sum()
        assert part["share_of_valid"].sum() == pytest.approx(1) and part["share_of_kept"].sum() == pytest.approx(1)
    full = table[table["mask"] == "full"]
    np.testing.assert_allclose(full["lift"], 1.0)


def unpack(packed):
    coded = np.frombuffer(base64.b64decode(packed["data"]), "<u2").astype(float)
    values = packed["low"] + (packed["high"] - packed["low"]) * coded / 65534
    return np.where(coded == 65535, np.nan, values)


def test_packed_numbers_come_back():
    values = np.array([0.0, 1.25, np.nan, -3.0, 7.5])
    np.testing.assert_allclose(unpack(heatmap._pack(values)), values, atol=2e-4)
    np.testing.assert_allclose(unpack(heatmap._pack(np.full(3, 2.0))), 2.0, atol=2e-4)


def test_rollout_block_holds_what_the_bank_says(suite_dir):
    suite = loading.load(suite_dir)
    vocabulary = load_vocabulary([suite_dir / "tokenizer"])
    pieces = heatmap.Pieces(vocabulary)
    run = suite.runs[1]
    block = heatmap.rollout_block(run, pieces, [])
    bank = loading.read_bank_file(run.bank_dir / "rollout_000000.parquet").to_pandas()
    response = block["responses"][0]
    assert response["name"].startswith("rollout 0, sample ")
    index = int(response["name"].rsplit(" ", 1)[1])
    own = bank[bank["sample_index"] == index]
    place = slice(response["start"], response["start"] + response["length"])
    tokens = np.frombuffer(base64.b64decode(block["tokens"]), "<u4")[place]
    assert [pieces.texts[t] for t in tokens] == [vocabulary.text(t) for t in own["token_id"]]
    np.testing.assert_allclose(unpack(block["values"]["Dlearn"])[place], own["Dlearn"], atol=1e-4)
    kept = np.unpackbits(np.frombuffer(base64.b64decode(block["kept"]), np.uint8)).astype(bool)[place]
    assert kept.tolist() == (own["budget_keep"] > 0).tolist() and kept.any()
    top = block["top"]["teacher"]
    probability = np.frombuffer(base64.b64decode(top["p"]), "<u2").reshape(-1, top["k"])[place] / 65535
    np.testing.assert_allclose(probability[:, 0], own["teacher_top1_prob"], atol=2e-5)


def test_prompts_come_from_the_dumps_of_the_run(suite_dir, tmp_path):
    home = tmp_path / "s"
    shutil.copytree(suite_dir, home)
    run = loading.load(home).runs[1]
    (tmp_path / "dumps").mkdir()
    rows = pd.DataFrame({"sample_index": range(8), "prompt": [f"question {i}" for i in range(8)], "label": "4"})
    rows.to_parquet(tmp_path / "dumps" / "rollout_000000.parquet")
    run.config["save_debug_rollout_data"] = str(tmp_path / "dumps")
    block = heatmap.rollout_block(run, heatmap.Pieces(None), [])
    shown = {r["name"]: r["prompt"] for r in block["responses"]}
    assert shown["rollout 0, sample 3"] == "question 3"
    assert all(prompt is None for name, prompt in shown.items() if not name.startswith("rollout 0"))


def test_contexts_that_do_not_fit_are_left_out_and_that_is_said(suite_dir):
    suite = loading.load(suite_dir)
    everything = heatmap.build(suite, None, max_bytes=10**7, notes=[])
    frozen = [b for b in everything["blocks"] if b["kind"] == "frozen"]
    assert len(frozen) == 3 and frozen[0]["caption"] == "20 of 20 frozen contexts" and len(frozen[0]["responses"]) == 20
    used = sum(len(json.dumps(b)) for b in everything["blocks"] if b["kind"] == "rollout")
    small = heatmap.build(suite, None, max_bytes=used + 30_000, notes=[])
    part = [b for b in small["blocks"] if b["kind"] == "frozen"][0]
    assert 0 < len(part["responses"]) < 20 and "does not fit" in part["caption"]
    assert len(json.dumps(small)) < used + 60_000


def test_frozen_block_shows_what_the_rule_would_keep_before_training(suite_dir):
    suite = loading.load(suite_dir)
    blocks = {b["run"]: b for b in heatmap.build(suite, None, max_bytes=10**7, notes=[])["blocks"] if b["kind"] == "frozen"}
    total = len(suite.runs[1].contexts)
    keep = {name: np.unpackbits(np.frombuffer(base64.b64decode(b["kept"]), np.uint8))[:total].sum() for name, b in blocks.items()}
    # The budget, or one token for each of the 20 contexts where that is more.
    assert keep["full_1_seed1"] == total and keep["dlearn_high_0.2_seed1"] == np.ceil(0.2 * total)
    assert set(blocks["full_1_seed1"]["top"]) == {"student", "teacher", "trained"}
    gain = unpack(blocks["full_1_seed1"]["values"]["gain"])
    expected = (suite.runs[0].contexts["KLf_full_base"] - suite.runs[0].contexts["KLf_full"]).to_numpy()
    np.testing.assert_allclose(np.sort(gain), np.sort(expected), atol=1e-3)


def test_rollouts_of_many_methods_share_the_room(suite_dir):
    """With responses of hundreds of tokens, eight methods filled the page alone and the report ended in an error."""
    suite = loading.load(suite_dir)
    blocks = heatmap.build(suite, None, max_bytes=30_000, notes=[])["blocks"]  # 6,000 a run: 20 tokens of each of its three rollouts
    small = [block for block in blocks if block["kind"] == "rollout"]
    assert len(small) == 3
    for block in small:
        lengths = [r["length"] for r in block["responses"]]
        assert 3 <= len(lengths) < 24 and sum(lengths) <= 60 and "more do not fit" in block["caption"]
        assert {r["name"].split(",")[0] for r in block["responses"]} == {"rollout 0", "rollout 2", "rollout 5"}
    tiny = heatmap.rollout_block(suite.runs[1], heatmap.Pieces(None), [], max_bytes=900)
    assert [(r["length"], r["of"] > 3) for r in tiny["responses"]] == [(3, True)] * 3


def test_tokens_that_look_like_mathematics_are_drawn_as_they_are(suite_dir):
    """`$$` is a token of answers in mathematics; read as a formula it ended the report."""
    suite = loading.load(suite_dir)
    samples = {key: loading.sample_bank(runs[0], max_rollouts=3, max_rows=10**6, notes=[]) for key, runs in suite.arms.items()}
    formulas = Vocabulary(("$$", "$\\frac$", "$x_$", "\\") * 10, frozenset())
    drawn = figures_tokens.response_strip(samples, arm_styles(list(suite.arms)), formulas)
    assert drawn.png[:4] == b"\x89PNG"


def test_a_bank_that_does_not_tell_responses_apart_has_no_block(suite_dir, tmp_path):
    run = loading.load(suite_dir).runs[1]
    run.bank_dir = tmp_path
    pd.DataFrame({"rollout_id": [0, 0], "tok_pos": [0, 1], "token_id": [2, 3]}).to_parquet(tmp_path / "rollout_000000.parquet")
    assert heatmap.rollout_block(run, heatmap.Pieces(None), []) is None
