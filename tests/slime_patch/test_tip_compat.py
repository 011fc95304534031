"""The adapter: this tree's samples, errors that name the sample, what is written where, rollout ids, the bank's config."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from port_helpers import kept_rows, load_cases, plain_samples

from slime.rollout import tip_compat
from slime.utils.types import Sample
from ta_opd.errors import ConfigError, DataError
from ta_opd.slime_patch import scored
from ta_opd.token_bank import read_bank
from ta_opd.topk import TopK

CASE = load_cases()[1]  # K 4, some positions masked


@pytest.fixture(autouse=True)
def fresh_state():
    scored.said.clear()
    tip_compat._last_rollout_id = None
    yield
    tip_compat.close_token_banks()


def options(**more) -> SimpleNamespace:
    given = {"opd_topk_metrics_k": 4, "opd_budget_mask": "dlearn_high", "opd_budget_ratio": 0.3, "rollout_id": 0}
    return SimpleNamespace(**{**given, **more})


def process(args, samples, case=CASE):
    return tip_compat.process_tip_compat_metrics(args, samples, case["teacher_log_probs"], case["teacher_replies"])


def tree_samples(case=CASE, k=4, dtype=np.float32) -> list[Sample]:
    """The same samples as this tree carries them: arrays."""
    samples = []
    for i, s in enumerate(case["samples"]):
        reply, length = case["teacher_replies"][i]["meta_info"], s["response_length"]
        samples.append(Sample(
            index=s["index"], group_index=s["group_index"], tokens=s["tokens"], response_length=length, loss_mask=s["loss_mask"],
            rollout_log_probs=np.array(s["rollout_log_probs"], np.float32), status=Sample.Status(s["status"]),
            teacher_log_probs=np.array(case["teacher_log_probs"][i], np.float32),
            student_topk=TopK.from_lists(s["student_top_logprobs"], k, dtype=dtype),
            teacher_topk=TopK.from_reply(reply, "teacher", k, length, dtype=dtype),
        ))  # fmt: skip
    return samples


def test_samples_of_this_tree_get_weights_and_keep_their_loss_mask():
    samples = tree_samples()
    masks = [list(s.loss_mask) for s in samples]
    summary = tip_compat.select_for_samples(options(), samples, rollout_id=3)
    assert [s.loss_mask for s in samples] == masks
    kept = np.concatenate([s.opd_weights for s in samples])
    assert kept.dtype == np.float32 and set(np.unique(kept)) == {0.0, 1.0}
    assert not kept[~np.concatenate([s.valid_mask() for s in samples])].any()
    assert summary["num_kept_tokens"] == kept.sum() and summary["num_valid_tokens"] == sum(map(sum, masks))
    assert summary["kept_per_sample"] == [int(s.opd_weights.sum()) for s in samples]
    assert summary["exact_fraction"] == 0.0
    assert all(s.student_topk is not None and s.teacher_topk is not None for s in samples)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("profile", ["paper", "released"])
def test_measuring_in_any_parts_changes_nothing(tmp_path, profile, exact):
    """Every column of the bank and every weight, with samples measured before in two parts, all but one, or not at all."""
    found = []
    for parts in ((), ((1, 3), (0, 2, *range(4, len(CASE["samples"])))), (range(1, len(CASE["samples"])),)):
        samples, folder = tree_samples(), tmp_path / str(len(found))
        if exact:
            for s in samples:
                s.teacher_at_student_ids = np.where(s.student_topk.ids % 3 > 0, s.student_topk.logprobs - 0.5, np.nan).astype(np.float32)
        args = options(opd_profile=profile, opd_exact_cmass=exact, opd_token_bank_dir=str(folder), opd_compat_proxy="prefix_ema")
        for part in parts:
            tip_compat.measure_samples(args, [samples[i] for i in part])
        assert [s.token_metrics is not None for s in samples] == [any(i in part for part in parts) for i in range(len(samples))]
        summary = tip_compat.select_for_samples(args, samples, 0)
        assert all(s.token_metrics is None for s in samples)
        tip_compat.close_token_banks()
        found.append((read_bank(folder), [s.opd_weights.tolist() for s in samples], summary))
    for bank, weights, summary in found[1:]:
        pd.testing.assert_frame_equal(bank, found[0][0], check_exact=True)
        assert weights == found[0][1] and summary == found[0][2]
    assert found[0][0]["Cprefix_ema"].nunique() > 5 and sum(map(sum, found[0][1])) > 0


def test_measuring_names_the_sample_that_is_malformed():
    samples = tree_samples()
    samples[2].rollout_log_probs = samples[2].rollout_log_probs[:-1]
    with pytest.raises(DataError, match=f"index {samples[2].index}"):
        tip_compat.measure_samples(options(), samples)


def test_both_kinds_of_samples_are_kept_alike():
    for mask in ("dlearn_high", "tip", "random", "q3"):
        args = options(opd_budget_mask=mask, opd_profile="released")
        tree, plain = tree_samples(dtype=np.float64), plain_samples(CASE)
        tip_compat.select_for_samples(args, tree, 0)
        process(args, plain)
        assert np.flatnonzero(np.concatenate([s.opd_weights for s in tree])).tolist() == kept_rows(plain)


def test_full_leaves_masks_untouched_but_weights_are_set():
    for mask, ratio in (("none", 0.1), ("full", 0.1), ("tip", 1.0)):
        samples = plain_samples(CASE)
        for sample in samples[:2]:
            sample.loss_mask = None
        before = [s.loss_mask for s in samples]
        process(options(opd_budget_mask=mask, opd_budget_ratio=ratio, opd_profile="released"), samples)
        assert [s.loss_mask for s in samples] == before
    samples = tree_samples()
    tip_compat.select_for_samples(options(opd_budget_mask="none"), samples, 0)
    assert all(np.array_equal(s.opd_weights, s.valid_mask()) for s in samples)


def test_a_sample_without_response_is_skipped_and_a_rollout_without_any_is_said_once(caplog):
    samples = plain_samples(CASE)
    samples[1] = SimpleNamespace(tokens=[1, 2], response_length=0, loss_mask=None, metadata={}, index=1, group_index=0)
    logs, replies = list(CASE["teacher_log_probs"]), list(CASE["teacher_replies"])
    logs[1], replies[1] = [], None
    summary = tip_compat.process_tip_compat_metrics(options(), samples, logs, replies)
    assert samples[1].loss_mask is None and summary["kept_per_sample"][1] == 0
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            summary = tip_compat.process_tip_compat_metrics(options(), samples[1:2], [[]], [None])
    assert summary["num_kept_tokens"] == 0 and summary["kept_per_sample"] == [0]
    assert caplog.text.count("without any response token") == 1


def test_all_masked_keeps_nothing_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            samples = plain_samples(CASE)
            for sample in samples:
                sample.loss_mask = [0] * sample.response_length
            assert process(options(), samples)["num_kept_tokens"] == 0
            assert not kept_rows(samples)
    assert caplog.text.count("no valid token") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.metadata.clear(), r"sample 2 \(index 2\).*student_top_logprobs.*21 positions, got nothing"),
        (lambda s: s.metadata.update(student_top_logprobs=[[]]), r"sample 2 .*21 positions, got 1 positions"),
        (lambda s: s.loss_mask.pop(), r"sample 2 .*loss_mask has 20 entries, expected 21"),
        (lambda s: s.rollout_log_probs.append(0.0), r"sample 2 .*rollout_log_probs has shape \(22,\), expected \(21,\)"),
    ],
)
def test_bad_samples_are_named(change, message):
    samples = plain_samples(CASE)
    change(samples[2])
    with pytest.raises(DataError, match=message):
        process(options(), samples)


def test_bad_replies_are_named():
    replies = list(CASE["teacher_replies"])
    for broken, message in (
        (None, "sample 3 .*meta_info, got NoneType"),
        ({"meta_info": {}}, "sample 3 .*input_top_logprobs is missing"),
        ({"meta_info": {"input_top_logprobs": [None, []]}}, "sample 3 .*at least 3 positions"),
    ):
        replies[3] = broken
        with pytest.raises(DataError, match=message):
            tip_compat.process_tip_compat_metrics(options(), plain_samples(CASE), CASE["teacher_log_probs"], replies)
    with pytest.raises(DataError, match="raw_rewards: expected one entry for each of 4 samples, got 3"):
        tip_compat.process_tip_compat_metrics(options(), plain_samples(CASE), CASE["teacher_log_probs"], replies[:3])
    logs = [*CASE["teacher_log_probs"][:3], [0.0]]
    with pytest.raises(DataError, match="sample 3 .*teacher_log_probs has shape"):
        tip_compat.process_tip_compat_metrics(options(), plain_samples(CASE), logs, CASE["teacher_replies"])


def test_without_a_mask_missing_topk_gives_metrics_of_empty_lists(tmp_path, caplog):
    samples = plain_samples(CASE)
    samples[0].metadata = {}
    with caplog.at_level(logging.WARNING):
        process(options(opd_budget_mask="full", opd_token_bank_dir=str(tmp_path)), samples)
    tip_compat.close_token_banks()
    bank = read_bank(tmp_path)
    first = bank["sample_ordinal"] == 0
    assert bank.loc[first, "Hs_topk"].eq(0).all() and bank.loc[~first, "Hs_topk"].gt(0).any()
    assert "empty lists" in caplog.text


def test_k_of_a_sample_that_differs_is_named():
    samples = tree_samples()
    samples[2].teacher_topk = TopK.empty(samples[2].response_length, 5)
    with pytest.raises(DataError, match=r"sample 2 \(index 2\): top-k of 4 \(student\) and 5 \(teacher\), expected 4"):
        tip_compat.select_for_samples(options(), samples, 0)
    samples = tree_samples()
    samples[1].student_topk = None
    with pytest.raises(DataError, match="sample 1 .*has no student top-k"):
        tip_compat.select_for_samples(options(), samples, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"opd_budget_mask": "entropi"}, "entropy"),
        ({"opd_budget_ratio": 0.0}, r"\(0, 1\]"),
        ({"opd_budget_ratio": 1.5}, r"\(0, 1\]"),
        ({"opd_topk_metrics_k": 0}, "needs top-k"),
        ({"opd_topk_metrics_k": -1}, ">= 0"),
        ({"opd_token_bank_format": "xml"}, "opd_token_bank_format"),
        ({"opd_exact_cmass_overflow": "what"}, "fallback"),
        ({"opd_exact_cmass_max_union": 0}, "max_union"),
        ({"opd_exact_cmass_max_union": "128"}, "whole number.*'128'"),  # YAML files hold what their writers typed
        ({"opd_compat_prefix_ema_alpha": "9e-1"}, "number.*'9e-1'"),
        ({"opd_budget_gamma": "5e-1"}, "number.*'5e-1'"),
        ({"opd_metric_q_low": "5e-2"}, "numbers.*'5e-2'"),
        ({"opd_budget_min_keep_per_sample": 1.5}, "whole number.*1.5"),
        ({"opd_budget_mask_seed": "seed1"}, "whole number.*'seed1'"),
        ({"opd_divergence_support": "union"}, "'union_floor', 'union_tail', 'exact'"),
    ],
)
def test_bad_options_say_what_was_expected(wrong, message):
    with pytest.raises(ConfigError, match=message):
        process(options(**wrong), plain_samples(CASE))


def test_nothing_asked_for_is_nothing_done():
    samples = plain_samples(CASE)
    assert process(SimpleNamespace(opd_budget_mask="none"), samples) is None
    assert samples[0].loss_mask == CASE["samples"][0]["loss_mask"]
    assert isinstance(samples[0].metadata["student_top_logprobs"], list)


def test_lists_become_arrays_and_a_second_call_gives_the_same():
    samples = plain_samples(CASE)
    process(options(), samples)
    first = kept_rows(samples)
    assert all(isinstance(s.metadata["student_top_logprobs"], TopK) for s in samples)
    for sample, source in zip(samples, CASE["samples"], strict=True):
        sample.loss_mask = source["loss_mask"]
    process(options(), samples)
    assert kept_rows(samples) == first


def test_rollout_ids_are_given_or_follow_the_data_source():
    groups = lambda first: [SimpleNamespace(group_index=first + i // 2) for i in range(8)]  # noqa: E731  (4 prompts, 2 samples each)
    args = SimpleNamespace(rollout_batch_size=4)
    assert tip_compat.rollout_id_of(SimpleNamespace(rollout_id=7), groups(0)) == 7
    assert [tip_compat.rollout_id_of(args, groups(4 * i)) for i in range(3)] == [0, 1, 2]
    tip_compat._last_rollout_id = None  # a new process that resumes: slime restores its group counter
    assert tip_compat.rollout_id_of(args, groups(12)) == 3
    assert tip_compat.rollout_id_of(args, groups(12)) == 4  # prompts handed out again (partial rollouts): still a new id
    tip_compat._last_rollout_id = None
    assert tip_compat.rollout_id_of(SimpleNamespace(), [SimpleNamespace()]) == 0
    assert tip_compat.rollout_id_of(SimpleNamespace(), [SimpleNamespace()]) == 1


def test_random_is_keyed_by_the_rollout_id_with_and_without_a_bank(tmp_path):
    def kept(**more):
        samples = plain_samples(CASE)
        process(options(opd_budget_mask="random", opd_profile="released", **more), samples)
        return kept_rows(samples)

    assert kept() == kept() == kept(opd_token_bank_dir=str(tmp_path))
    assert kept(rollout_id=1) != kept()
    assert kept(rollout_id=1, opd_budget_mask_seed=42) == kept(rollout_id=0, opd_budget_mask_seed=43)


def test_the_bank_identifies_rows_and_its_config_is_complete(tmp_path):
    args = options(
        opd_token_bank_dir=str(tmp_path), opd_token_bank_pair_id="pair", rm_url="http://t:1/generate", hf_checkpoint="/m/student",
        seed=1234, rollout_seed=43, rollout_id=12,
    )  # fmt: skip
    samples = plain_samples(CASE)
    samples[3].metadata["teacher"] = "maths"
    process(args, samples)
    tip_compat.close_token_banks()
    assert (tmp_path / "rollout_000012.parquet").exists()
    bank = read_bank(tmp_path)
    lengths = [s.response_length for s in samples]
    assert bank["resp_len"].tolist() == np.repeat(lengths, lengths).tolist()
    assert bank["prompt_len"].tolist() == np.repeat([len(s.tokens) - s.response_length for s in samples], lengths).tolist()
    assert bank["token_id"].tolist() == [t for s in samples for t in s.tokens[-s.response_length :]]
    assert bank["tok_pos"].tolist() == [i for n in lengths for i in range(n)]
    assert (bank["sample_ordinal"].unique().tolist(), bank["rollout_id"].unique().tolist()) == ([0, 1, 2, 3], [12])
    assert set(bank["seed"]) == {1234} and set(bank["pair_id"]) == {"pair"} and set(bank["student_name"]) == {"/m/student"}
    assert bank.groupby("sample_ordinal")["teacher_name"].first().tolist() == ["http://t:1/generate"] * 3 + ["maths"]
    assert bank["loss_mask_original"].tolist() == [m for s in CASE["samples"] for m in s["loss_mask"]]
    assert bank["student_top_ids"].isna().all()
    config = json.loads((tmp_path / "config.json").read_text())
    released = ("schema_version opd_topk_metrics_k opd_budget_mask opd_budget_ratio opd_budget_gamma opd_compat_proxy "
                "opd_metric_normalization opd_exact_cmass opd_exact_cmass_max_union opd_exact_cmass_overflow notes").split()  # fmt: skip
    missing = "opd_budget_mask_seed opd_budget_min_keep_per_sample opd_metric_q_low opd_compat_prefix_ema_alpha seed rollout_seed".split()
    assert not [key for key in (*released, *missing) if key not in config]
    assert config["resolved"]["min_keep_rule"] == "inside" and config["resolved"]["q_low"] == 0.05
    assert (config["seed"], config["rollout_seed"], config["opd_budget_mask_seed"]) == (1234, 43, 42)


def test_exact_values_of_some_samples_are_reported_as_a_fraction():
    samples = tree_samples()
    first = samples[0]
    first.teacher_at_student_ids = np.full(first.student_topk.ids.shape, -2.0, np.float32)
    summary = tip_compat.select_for_samples(options(), samples, 0)
    valid = [s.valid_mask().sum() for s in samples]
    assert summary["exact_fraction"] == pytest.approx(valid[0] / sum(valid))
    samples[1].teacher_at_student_ids = np.zeros((2, 4), np.float32)
    with pytest.raises(DataError, match="sample 1 .*teacher_at_student_ids has shape"):
        tip_compat.select_for_samples(options(), samples, 0)


def test_entropy_over_the_whole_vocabulary_is_divided_by_its_logarithm(tmp_path):
    """tip_q3 ranks by D * (1 - H): with H in nats, 1 - H would be negative and turn the order around."""
    samples, rng = tree_samples(), np.random.default_rng(0)
    exact = {name: [rng.uniform(0.1, high, s.response_length) for s in samples] for name, high in (("H", 6), ("KLf", 5), ("KLr", 5), ("C", 1))}
    args = options(opd_type="megatron", opd_budget_mask="tip_q3", student_config={"vocab_size": 1000}, opd_token_bank_dir=str(tmp_path))
    tip_compat.select_for_samples(args, samples, 0, exact)
    tip_compat.close_token_banks()
    bank = read_bank(tmp_path)
    np.testing.assert_allclose(bank["Hs_topk_norm"], np.concatenate(exact["H"]) / np.log(1000), rtol=1e-6)
    assert bank.loc[bank["loss_mask_original"] == 1, "budget_score"].gt(0).all()


def test_flush_puts_queued_rollouts_on_disk(tmp_path):
    for rollout_id in range(3):
        process(options(opd_token_bank_dir=str(tmp_path), rollout_id=rollout_id), plain_samples(CASE))
    tip_compat.flush_token_banks()
    assert len(list(tmp_path.glob("rollout_*"))) == 3
    tip_compat.close_token_banks()
    tip_compat.close_token_banks()


def test_weights_cannot_be_written_to_a_loss_mask_and_this_is_said(caplog, tmp_path):
    selector = tmp_path / "mine.py"
    selector.write_text("from ta_opd.selection import Scored\nimport numpy as np\n\ndef rule(batch):\n"
                        "    return Scored(batch['H_norm'], weights=np.full(batch.valid.size, 0.5))\n")  # fmt: skip
    args = options(opd_budget_mask="none", opd_selector_path=f"{selector}:rule")
    samples, tree = plain_samples(CASE), tree_samples()
    with caplog.at_level(logging.WARNING):
        process(args, samples)
    assert "only a loss_mask" in caplog.text and set(np.concatenate([s.loss_mask for s in samples])) == {0, 1}
    tip_compat.select_for_samples(args, tree, 0)
    assert set(np.concatenate([s.opd_weights for s in tree])) == {np.float32(0.0), np.float32(0.5)}
