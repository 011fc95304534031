"""Evaluation sets with sampling parameters, prompt keys and answer checks of their own."""

import json

import pytest

from slime.rollout.data_source import PromptDataSource
from slime.rollout.eval_sets import args_of, read_eval_sets
from slime.rollout.evaluate import evaluate
from ta_opd.errors import ConfigError
from tests.rollout.test_rollout import clients

TWO = """
eval:
  defaults: {temperature: 0.6, max_response_len: 4}
  datasets:
    - {name: hard, path: HARD, rm_type: "tests.rollout.test_eval_sets:always", n_samples_per_eval_prompt: 3, top_k: 20, label_key: answer}
    - {name: easy, path: EASY, temperature: 0, stop_token_ids: [7]}
"""


def always(response, label, metadata):
    return float(label == "yes")


@pytest.fixture
def two(args, tmp_path):
    """Arguments of a run with two sets beside one of --eval-prompt-data."""
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps({"prompt": f"Q{i}", "answer": "yes"}) + "\n" for i in range(4)))
    file = tmp_path / "eval.yaml"
    file.write_text(TWO.replace("HARD", str(tmp_path / "hard.jsonl")).replace("EASY", args.prompt_data))
    args.eval_config, args.eval_prompt_data, args.eval_input_key, args.eval_label_key = str(file), ["plain", args.prompt_data], None, None
    args.eval_max_response_len = None
    args.eval_datasets, args.eval_settings = read_eval_sets(args)
    return args


def test_every_set_is_sampled_and_checked_in_its_own_way(two, tokenizer):
    asked, found = {}, {}
    for name, file in two.eval_datasets.items():
        both = clients()
        found[name] = evaluate(args_of(two, name), 3, both, PromptDataSource(args_of(two, name), tokenizer, path=file, evaluation=True))
        asked[name] = [seen for _, seen in both.student.calls]
        assert both.teachers["default"].calls == []
        assert all(seen["top_k"] == 0 and not seen["log_probs"] for seen in asked[name])
    params = {name: seen[0]["params"] for name, seen in asked.items()}
    assert [len(asked[name]) for name in ("plain", "hard", "easy")] == [10, 12, 10]
    assert [params[name]["temperature"] for name in ("plain", "hard", "easy")] == [0.0, 0.6, 0.0]
    assert [params[name]["top_k"] for name in ("plain", "hard", "easy")] == [-1, 20, -1]
    assert [params[name]["max_new_tokens"] for name in ("plain", "hard", "easy")] == [8, 4, 4]
    assert params["easy"]["stop_token_ids"] == [7] and "stop_token_ids" not in params["hard"]
    assert found["hard"]["accuracy"] == 1.0 and found["easy"]["accuracy"] == found["plain"]["accuracy"] == 0.0
    assert two.eval_temperature == 0.0 and two.rm_type == "exact"  # the run's own stay


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "expected `eval:` with a list `datasets:`"),
    ("eval: {datasets: []}", "expected `eval:` with a list `datasets:`"),
    ("eval: {datasets: [{name: a}]}", "datasets\\[1\\]: expected name and path"),
    ("eval: {datasets: [{name: a, path: b, temprature: 1}]}", "unknown key 'temprature'; did you mean 'temperature'"),
    ("eval: {datasets: [{name: a, path: b, temperature: -1}]}", "temperature: expected float of at least 0, got -1"),
    ("eval: {datasets: [{name: a, path: b, top_k: x}]}", "top_k: expected int"),
    ("eval: {datasets: [{name: a, path: b}, {name: a, path: c}]}", "the set 'a' is given twice"),
    ("eval: {datasets: [{name: a, path: b, rm_type: nope}]}", "unknown check 'nope'"),
    ("eval: {defaults: 3, datasets: [{name: a, path: b}]}", "defaults: expected keys and values"),
    ("a: [", "not valid YAML"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
])  # fmt: skip
def test_unclear_files(args, tmp_path, text, message):
    file = tmp_path / "eval.yaml"
    file.write_text(text)
    args.eval_config, args.eval_prompt_data = str(file), None
    with pytest.raises(ConfigError, match=message):
        read_eval_sets(args)


def test_a_file_that_is_not_there(args):
    args.eval_config, args.eval_prompt_data = "/nowhere.yaml", None
    with pytest.raises(ConfigError, match="does not exist"):
        read_eval_sets(args)
