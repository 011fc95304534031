"""Scoring with real (tiny) models: against a dense float64 pass, in every mode, and interrupted."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context import scoring
from ta_opd.fixed_context.bank import load_contexts
from ta_opd.fixed_context.evaluate import evaluate_bank
from ta_opd.fixed_context.hf import CausalModel, import_transformers
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.tables import read_meta, read_table
from tests.fixed_context.diagnostic_cases import VOCAB_S, make_bank, make_model


def score(bank, models, tmp_path, *, name="w", limit=None, student="student", **options):
    options = {"dtype": "float64", "topk": (8, 16), **options}
    contexts = load_contexts(bank, max_response_tokens=limit)
    return score_contexts(contexts, models[student], models["teacher"], ScoringConfig(**options), tmp_path / name)


def reference(bank, models, K, limit=None):
    """The same by one dense float64 pass a context over the shared vocabulary."""
    auto = import_transformers().AutoModelForCausalLM
    student, teacher = (auto.from_pretrained(str(models[n])).double() for n in ("student", "teacher"))
    contexts, parts = load_contexts(bank, max_response_tokens=limit), []
    for i in range(len(contexts)):
        ids = torch.as_tensor(contexts.tokens[i])[None]
        start, n = contexts.prompt_len[i], contexts.scored_len[i]
        with torch.no_grad():
            ls, lt = (m(ids).logits[0, start - 1 : start - 1 + n, :VOCAB_S].log_softmax(-1) for m in (student, teacher))
        top, target = ls.topk(K, 1).indices, ids[0, start:, None]
        parts.append(
            pd.DataFrame(
                {
                    "Hs_full": -(ls.exp() * ls).sum(1), "Ht_full": -(lt.exp() * lt).sum(1), "KLf_full": (lt.exp() * (lt - ls)).sum(1),
                    "KLr_full": (ls.exp() * (ls - lt)).sum(1), "Cmass_true": lt.gather(1, top).exp().sum(1),
                    "student_logp_sampled": ls.gather(1, target)[:, 0], "teacher_logp_sampled": lt.gather(1, target)[:, 0],
                    "target_student_rank_full": 1 + (ls > ls.gather(1, target)).sum(1),
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("residency", ["both", "one"])
@pytest.mark.parametrize("limit", [None, 6])
def test_equals_a_dense_float64_pass_within_1e6(bank, models, tmp_path, residency, limit):
    table, record = score(bank, models, tmp_path, residency=residency, limit=limit, contexts_per_part=4, max_tokens_per_batch=60, workspace_gib=1e-5)
    expected = reference(bank, models, 8, limit)
    for name in expected:
        np.testing.assert_allclose(table[name], expected[name], atol=1e-6, rtol=0, err_msg=name)
    assert record["positions"] == len(expected) and record["topk"] == [8, 16]


def test_float32_models_stay_close(bank, models, tmp_path):
    table, _ = score(bank, models, tmp_path, dtype="float32")
    expected = reference(bank, models, 8)
    np.testing.assert_allclose(table["KLf_full"], expected["KLf_full"], atol=1e-4)


def test_both_residencies_and_all_batchings_agree(bank, models, tmp_path):
    base, _ = score(bank, models, tmp_path, name="a", residency="both")
    for i, options in enumerate(({"residency": "one"}, {"residency": "one", "contexts_per_part": 2}, {"max_tokens_per_batch": 1})):
        other, _ = score(bank, models, tmp_path, name=f"b{i}", **options)
        numeric = [c for c in base if base[c].dtype.kind == "f"]
        np.testing.assert_allclose(base[numeric], other[numeric], atol=1e-9)
        assert base[["sample_ordinal", "tok_pos", "token_id"]].equals(other[["sample_ordinal", "tok_pos", "token_id"]])


def test_columns_of_positions_and_of_each_k(bank, models, tmp_path):
    table, _ = score(bank, models, tmp_path, limit=5)
    contexts = load_contexts(bank)
    assert table.groupby("sample_ordinal").size().tolist() == np.minimum(contexts.resp_len, 5).tolist()
    assert table["pos_norm"].max() == 1.0 and (table["resp_len"].to_numpy() == contexts.resp_len[table["sample_ordinal"]]).all()
    assert table["Cmass_true"].equals(table["Cmass_true_k8"]) and (table["Cmass_true_k16"] >= table["Cmass_true_k8"] - 1e-12).all()
    assert {"prompt_id", "loss_mask", "student_top_ids", "teacher_top_logps", "topk_jaccard", "top1_match", "target_teacher_rank"} <= set(table)
    single, _ = score(bank, models, tmp_path, name="one_k", limit=5, topk=(16,))
    assert not [c for c in single if "_k16" in c]
    np.testing.assert_allclose(single["KLf_union"], table["KLf_union_k16"], atol=1e-12)


def test_released_columns_are_there(bank, models, tmp_path):
    table, _ = score(bank, models, tmp_path)
    released = (
        "sample_ordinal sample_index group_index tok_pos pos_norm prompt_len resp_len total_len truncated token_id student_logp_sampled "
        "teacher_logp_sampled Hs_full Ht_full KLr_full KLf_full student_top1_id teacher_top1_id student_top1_prob teacher_top1_prob Cmass_true "
        "Coverlap CBC KLf_union KLr_union reach_t1 target_in_student_topk target_in_teacher_topk target_student_rank target_teacher_rank "
        "student_top_ids student_top_logps teacher_top_ids teacher_top_logps"
    )
    assert not set(released.split()) - set(table)


@pytest.mark.parametrize("residency", ["both", "one"])
def test_an_interrupted_run_goes_on(bank, models, tmp_path, monkeypatch, residency):
    whole, _ = score(bank, models, tmp_path, name="whole", residency=residency, contexts_per_part=3)
    finished, real = [], scoring._finish

    def stop_after_one(parts, part, *rest):
        if finished:
            raise KeyboardInterrupt
        finished.append(part)
        real(parts, part, *rest)

    monkeypatch.setattr(scoring, "_finish", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        score(bank, models, tmp_path, residency=residency, contexts_per_part=3)
    scored = []
    monkeypatch.setattr(scoring, "_finish", lambda parts, part, *rest: (scored.append(part), real(parts, part, *rest)))
    if residency == "one":  # the student's work is done: it must not be loaded again
        load = CausalModel.load.__func__

        def only_the_teacher(cls, path, **options):
            assert "teacher" in str(path)
            return load(cls, path, **options)

        monkeypatch.setattr(CausalModel, "load", classmethod(only_the_teacher))
    table, _ = score(bank, models, tmp_path, residency=residency, contexts_per_part=3)
    assert scored == [1, 2] and table.equals(whole)


def test_parts_of_another_run_are_not_mixed_in(bank, models, tmp_path, monkeypatch):
    score(bank, models, tmp_path, contexts_per_part=3)
    again, _ = score(bank, models, tmp_path, contexts_per_part=3, student="trained")
    fresh, _ = score(bank, models, tmp_path, name="fresh", contexts_per_part=3, student="trained")
    assert again.equals(fresh)


def test_a_part_cut_off_is_made_anew(bank, models, tmp_path):
    whole, _ = score(bank, models, tmp_path, contexts_per_part=3)
    part = tmp_path / "w" / "part_00001.parquet"
    part.write_bytes(part.read_bytes()[:300])
    with pytest.raises(DataError, match="cut off"):
        score(bank, models, tmp_path, contexts_per_part=3)
    assert score(bank, models, tmp_path, contexts_per_part=3)[0].equals(whole)


def test_tokens_outside_the_shared_vocabulary(models, tmp_path):
    small = {**models, "student": make_model(tmp_path / "small", 64)}
    with pytest.raises(DataError, match="the models share 64"):
        score(make_bank(tmp_path / "b.parquet"), small, tmp_path)


def test_k_larger_than_the_vocabulary(bank, models, tmp_path):
    with pytest.raises(DataError, match="at most the shared vocabulary of 96"):
        score(bank, models, tmp_path, topk=(97,))


def test_other_tokenizer(bank, models, tmp_path):
    other = make_model(tmp_path / "other", VOCAB_S)
    text = (other / "tokenizer.json").read_text().replace('"w5"', '"x5"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="tokenizers differ"):
        score(bank, {**models, "student": other}, tmp_path)
    table, record = score(bank, {**models, "student": other}, tmp_path, allow_tokenizer_mismatch=True)
    assert len(table) and record["tokenizer_fingerprint"] is None


def test_nan_logits_are_an_error_that_names_the_position(bank, models, tmp_path):
    broken = make_model(tmp_path / "nan", VOCAB_S, noise_from=models["student"], noise=float("nan"))
    with pytest.raises(DataError, match="no finite divergence"):
        score(bank, {**models, "student": broken}, tmp_path)


@pytest.mark.parametrize("options", [{"topk": ()}, {"topk": (8, 8)}, {"residency": "some"}, {"topk": (0,)}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ConfigError):
        ScoringConfig(**options)


def test_unknown_device_and_dtype(bank, models, tmp_path):
    with pytest.raises(ConfigError, match="CUDA devices"):
        score(bank, models, tmp_path, student_device="cuda:99")
    with pytest.raises(ConfigError, match="expected auto or one of"):
        score(bank, models, tmp_path, dtype="int8")


def test_no_model_there(bank, models, tmp_path):
    with pytest.raises(DataError, match="no model can be loaded"):
        score(bank, {**models, "teacher": tmp_path / "absent"}, tmp_path, allow_tokenizer_mismatch=True)


def soft_capped(path, tokenizer_from):
    """A tiny Gemma 2: its logits are tanh-capped behind the output matrix."""
    transformers = import_transformers()
    torch.manual_seed(3)
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_S, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        final_logit_softcapping=2.0, initializer_range=0.5, query_pre_attn_scalar=16,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def test_a_head_that_is_no_plain_product(bank, models, tmp_path):
    capped = {**models, "student": soft_capped(tmp_path / "capped", models["student"])}
    table, _ = score(bank, capped, tmp_path, residency="both")
    expected = reference(bank, capped, 8)
    np.testing.assert_allclose(table["KLf_full"], expected["KLf_full"], atol=1e-6)
    for role in ("student", "teacher"):
        with pytest.raises(ConfigError, match="--residency both"):
            score(bank, {**models, role: capped["student"]}, tmp_path, name=role, residency="one")


def test_before_and_after_in_one_table(bank, models, tmp_path):
    options = {"config": ScoringConfig(topk=(8, 16)), "log": lambda line: None}
    evaluate_bank(bank, str(models["student"]), str(models["teacher"]), tmp_path / "theta0.parquet", **options)
    evaluate_bank(bank, str(models["trained"]), str(models["teacher"]), tmp_path / "after.parquet", baseline=tmp_path / "theta0.parquet", **options)
    table, before = read_table(tmp_path / "after.parquet"), read_table(tmp_path / "theta0.parquet")
    assert table["Cmass_true_k16_base"].equals(before["Cmass_true_k16"]) and table["student_top_ids_base"].equals(before["student_top_ids"])
    np.testing.assert_allclose(table["G_KLf_abs"], before["KLf_full"] - table["KLf_full"])
    assert table["G_KLf_abs"].abs().max() > 0 and read_meta(tmp_path / "after.parquet")["topk"] == [8, 16]
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(DataError, match="different K"):
        evaluate_bank(
            bank, str(models["trained"]), str(models["teacher"]), tmp_path / "x.parquet", baseline=tmp_path / "theta0.parquet",
            config=ScoringConfig(topk=(8,)), log=lambda line: None,
        )  # fmt: skip
    other = make_bank(tmp_path / "other_bank.parquet", seed=5)
    with pytest.raises(DataError, match="different context bank"):
        evaluate_bank(other, str(models["trained"]), str(models["teacher"]), tmp_path / "y.parquet", baseline=tmp_path / "theta0.parquet", **options)
