"""Prompt files: every complaint names its line; order, epochs and resumption repeat exactly."""

import datetime
import decimal
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from slime.rollout.data_source import PromptDataSource
from slime.rollout.sample_state import sample_from_state, sample_to_state
from slime.utils.types import Sample
from ta_opd.errors import ConfigError, DataError
from ta_opd.topk import TopK


def write(args, text, name="data.jsonl"):
    from pathlib import Path

    file = Path(args.prompt_data).with_name(name)
    file.write_text(text)
    args.prompt_data = str(file)


GOOD = '{"prompt": "Q1?", "label": "1"}\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected at least one prompt, got none"),
        ("\n\n", "expected at least one prompt, got none"),
        (GOOD + "{not json}\n", r"line 2: expected one JSON object, got '\{not json\}'"),
        (GOOD + GOOD + "[1, 2]\n", "line 3: expected a JSON object, got list"),
        (GOOD + '{"question": "x", "label": "1"}\n', "line 2: no key 'prompt' .--input-key.; the keys there are question, label"),
        (GOOD + '{"prompt": "x"}\n', "line 2: no key 'label' .--label-key."),
        (GOOD + '{"prompt": "", "label": "1"}\n', "line 2: the prompt under 'prompt' is empty"),
        (GOOD + '{"prompt": 5, "label": "1"}\n', "line 2: expected text or a list of messages"),
        (GOOD + '{"prompt": [{"role": "user"}], "label": "1"}\n', "line 2: expected text or a list of messages"),
        (GOOD + '{"prompt": "x", "label": "1", "metadata": 3}\n', "line 2: expected an object under 'metadata', got int"),
        (GOOD + json.dumps({"prompt": "y" * 60, "label": ""}) + "\n", "line 2: the prompt has 60 tokens, at most 56 fit.*1 of 2 prompts"),
    ],
)
def test_bad_files(args, tokenizer, text, message):
    write(args, text)
    with pytest.raises(DataError, match=message):
        PromptDataSource(args, tokenizer)


def test_long_prompts_are_left_out_where_that_is_asked_for(args, tokenizer):
    long = [json.dumps({"prompt": "y" * n, "label": ""}) + "\n" for n in (60, 56, 57)]
    write(args, GOOD + long[0] + GOOD + long[1] + long[2])
    with pytest.raises(DataError, match="2 of 5 prompts are too long.*--skip-long-prompts"):
        PromptDataSource(args, tokenizer)
    args.skip_long_prompts = True
    source = PromptDataSource(args, tokenizer)
    assert (len(source), source.skipped) == (3, 2) and [len(i) for i in source.prompt_ids][2] == 56
    assert [group[0].metadata["prompt_row"] for group in source.get_samples(4)] == [0, 1, 2, 0]
    state = source.state_dict()
    write(args, long[0] + long[2])
    with pytest.raises(DataError, match="expected prompts of at most 56 tokens, got 2 longer ones"):
        PromptDataSource(args, tokenizer)
    write(args, GOOD + long[0] + GOOD + long[1] + long[2])
    args.rollout_max_prompt_len = 40  # another limit: another set of prompts
    source = PromptDataSource(args, tokenizer)
    assert source.skipped == 3
    with pytest.raises(DataError, match="had 3 prompts and 3 of them were used"):
        source.load_state_dict(state | {"position": 3})
    args.eval_input_key = args.eval_label_key = None
    with pytest.raises(DataError, match="3 of 5 prompts are too long"):  # an evaluation never shrinks by itself
        PromptDataSource(args, tokenizer, evaluation=True)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"prompt": "é", "label": "1"}'.encode("latin-1"), "save the file as UTF-8"),
    ("a.csv", b"prompt,label\nQ1?,1\n", "tables in CSV are not read: write them as parquet or JSONL"),
    ("a.json", b'[\n {"prompt": "Q1?", "label": "1"}\n]\n', "the file is one JSON value over many lines: write one object a line"),
    ("a.json", b'[{"prompt": "Q1?", "label": "1"}]\n', "got list; a list of objects becomes JSONL when each stands on a line of its own"),
])  # fmt: skip
def test_files_of_another_form_say_what_to_do(args, tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    args.prompt_data = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        PromptDataSource(args, tokenizer)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(args, tokenizer, tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() * 2)
    args.prompt_data = str(tmp_path / "bom.jsonl")
    assert len(PromptDataSource(args, tokenizer)) == 2


def test_missing_file(args, tokenizer, tmp_path):
    with pytest.raises(DataError, match="expected a JSONL or parquet file, found nothing"):
        PromptDataSource(args, tokenizer, path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="found a directory"):
        PromptDataSource(args, tokenizer, path=str(tmp_path))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        PromptDataSource(args, tokenizer, path=str(tmp_path / "bad.parquet"))


def test_an_id_outside_the_vocabulary(args, tokenizer):
    args.student_config = {"vocab_size": 40}
    with pytest.raises(DataError, match="line 1: token id .* is outside the student's vocabulary of 40"):
        PromptDataSource(args, tokenizer)


def test_prompt_length_flag(args, tokenizer):
    args.rollout_max_prompt_len = 3
    with pytest.raises(DataError, match="at most 3 fit .--rollout-max-prompt-len.; 10 of 10 prompts"):
        PromptDataSource(args, tokenizer)


def test_chat_prompts(args, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    write(args, json.dumps({"prompt": messages, "label": 3}) + "\n" + json.dumps({"prompt": "hi", "label": None}) + "\n")
    with pytest.raises(ConfigError, match="line 1.*pass --apply-chat-template"):
        PromptDataSource(args, tokenizer)
    args.apply_chat_template = True
    source = PromptDataSource(args, tokenizer)
    expected = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    first, second = (g[0] for g in source.get_samples(2))
    assert first.tokens == second.tokens == expected
    assert (first.label, second.label) == ("3", None)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        PromptDataSource(args, tokenizer)


def test_parquet_with_messages_and_a_dotted_label(args, tokenizer, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "reward_model": {"ground_truth": f"{i}"}} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    args.prompt_data, args.label_key, args.apply_chat_template = str(tmp_path / "p.parquet"), "reward_model.ground_truth", True
    source = PromptDataSource(args, tokenizer)
    assert [r.label for r in source.rows] == ["0", "1", "2"]
    args.label_key = "reward_model.nothing"
    with pytest.raises(DataError, match="row 1: no key 'reward_model.nothing'"):
        PromptDataSource(args, tokenizer)


def test_groups_are_n_samples_with_running_numbers(args, tokenizer):
    source = PromptDataSource(args, tokenizer)
    groups = source.get_samples(2) + source.get_samples(2)
    assert [[s.index for s in g] for g in groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [g[0].group_index for g in groups] == [0, 1, 2, 3] and groups[1][1].label == "2" and len(source) == 10
    assert groups[0][0].tokens is not groups[0][1].tokens  # each sample grows on its own


def orders(source, epochs=3):
    return [[g[0].metadata["prompt_row"] for g in source.get_samples(10)] for _ in range(epochs)]


def test_shuffled_anew_each_epoch_by_seed(args, tokenizer):
    args.rollout_shuffle = True
    a, b = (orders(PromptDataSource(args, tokenizer)) for _ in range(2))
    assert a == b and all(sorted(x) == list(range(10)) for x in a) and a[0] != a[1] != a[2]
    args.rollout_seed = 8
    assert orders(PromptDataSource(args, tokenizer)) != a
    args.rollout_shuffle = False
    assert orders(PromptDataSource(args, tokenizer)) == [list(range(10))] * 3


def test_resumes_with_the_very_next_prompt_over_the_end_of_an_epoch(args, tokenizer):
    args.rollout_shuffle = True
    source = PromptDataSource(args, tokenizer)
    source.get_samples(7)
    aborted = source.get_samples(1)
    aborted[0][0].student_topk = TopK(np.int32([[1, 2]]), np.float32([[-1, -2]]))
    source.add_samples(aborted)
    state = pickle.loads(pickle.dumps(source.state_dict()))
    ahead = [[(s.index, s.tokens, s.metadata["prompt_row"]) for s in g] for g in source.get_samples(9)]
    again = PromptDataSource(args, tokenizer)
    again.load_state_dict(state)
    groups = again.get_samples(9)
    assert [[(s.index, s.tokens, s.metadata["prompt_row"]) for s in g] for g in groups] == ahead
    np.testing.assert_array_equal(groups[0][0].student_topk.ids, [[1, 2]])


def test_state_is_plain_data(args, tokenizer):
    source = PromptDataSource(args, tokenizer)
    source.add_samples(source.get_samples(2))

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (bool, int, float, str, bytes))

    assert plain(source.state_dict())


def test_resume_on_another_file(args, tokenizer, caplog):
    source = PromptDataSource(args, tokenizer)
    source.get_samples(6)
    state = source.state_dict()
    write(args, GOOD * 4)
    with pytest.raises(DataError, match="10 prompts and 6 of them were used.*has 4"):
        PromptDataSource(args, tokenizer).load_state_dict(state)
    write(args, GOOD * 12)
    PromptDataSource(args, tokenizer).load_state_dict(state)
    assert "order of prompts changes" in caplog.text


def test_sample_state_keeps_every_field():
    sample = Sample(index=3, prompt=[{"role": "user", "content": "x"}], tokens=[1, 2, 3], response_length=1, status=Sample.Status.ABORTED,
                    rollout_log_probs=np.float32([-1]), student_topk=TopK(np.int32([[4]]), np.float32([[-0.5]])), metadata={"a": np.int64(3)},
                    teacher_at_student_ids=np.float32([[np.nan]]))  # fmt: skip
    back = sample_from_state(sample_to_state(sample))
    assert back.status is Sample.Status.ABORTED and back.prompt == sample.prompt and back.metadata == {"a": 3}
    np.testing.assert_array_equal(back.teacher_at_student_ids, sample.teacher_at_student_ids)
    np.testing.assert_array_equal(back.student_topk.logprobs, sample.student_topk.logprobs)


def test_a_sample_without_a_token_and_with_odd_metadata_goes_through_a_checkpoint():
    """A response that was taken back before its first token has empty arrays, and a parquet file holds dates and bytes."""
    metadata = {"when": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.5"), "image": b"", "raw": b"\x00\xff", "nested": [{"__array__": "text"}]}
    sample = Sample(index=3, tokens=[1, 2, 3], status=Sample.Status.ABORTED, rollout_log_probs=np.empty(0, np.float32), student_topk=TopK.empty(0, 4),
                    metadata=metadata, loss_mask=[])  # fmt: skip
    file = io.BytesIO()
    torch.save(sample_to_state(sample), file)
    file.seek(0)
    back = sample_from_state(torch.load(file, weights_only=True))
    assert back.rollout_log_probs.shape == (0,) and back.rollout_log_probs.dtype == np.float32 and back.student_topk.ids.shape == (0, 4)
    assert back.metadata == {**metadata, "when": "2026-01-02", "price": "1.5"}
    assert (back.tokens, back.status, back.loss_mask, back.response_length) == ([1, 2, 3], Sample.Status.ABORTED, [], 0)


def test_named_teachers(args, tokenizer):
    args.teachers = {"math": [], "code": []}
    write(args, '{"prompt": "a", "label": "", "teacher": "code"}\n')
    assert PromptDataSource(args, tokenizer).get_samples(1)[0][0].metadata["teacher"] == "code"
    write(args, '{"prompt": "a", "label": "", "teacher": "law"}\n')
    with pytest.raises(DataError, match="line 1: unknown teacher 'law'; --teacher gives math, code"):
        PromptDataSource(args, tokenizer)
    assert len(PromptDataSource(args, tokenizer, evaluation=True)) == 1  # evaluation has no teacher


def test_evaluation_uses_its_own_keys_and_lengths(args, tokenizer):
    write(args, '{"question": "a", "answer": "2"}\n' * 3)
    args.eval_input_key, args.eval_label_key, args.eval_max_response_len, args.n_samples_per_eval_prompt = "question", "answer", 5, 4
    args.rollout_shuffle = True
    source = PromptDataSource(args, tokenizer, evaluation=True)
    first, second = source.all_samples(), source.all_samples()
    assert source.max_response_len == 5 and [len(g) for g in first] == [4, 4, 4]
    assert [s.index for g in first for s in g] == [s.index for g in second for s in g] == list(range(12))
