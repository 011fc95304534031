import json

import pytest

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.sampling import SamplingConfig, choose_prompts, drop_trained, read_prompts, sample_bank
from tests.fixed_context.diagnostic_cases import write_prompts


def test_a_student_answers_held_out_prompts(models, tmp_path):
    prompts = read_prompts(write_prompts(tmp_path / "p.jsonl", 12))
    config = SamplingConfig(num_contexts=10, max_response_tokens=9, seed=3)
    bank, record = sample_bank(prompts, str(models["student"]), config)
    assert len(bank) == 10 and bank["resp_len"].between(1, 9).all() and record["seed"] == 3
    for row in bank.itertuples():
        tokens, response = json.loads(row.tokens), json.loads(row.response_token_ids)
        assert tokens[row.prompt_len :] == response and [f"w{t}" for t in tokens[: row.prompt_len]] == row.prompt.split()
        # Nothing follows an end of text, and only a response without one counts as truncated.
        assert 1 not in response[:-1] and row.truncated == (response[-1] != 1) and (not row.truncated or row.resp_len == 9)
    again, _ = sample_bank(prompts, str(models["student"]), config)
    other, _ = sample_bank(prompts, str(models["student"]), SamplingConfig(num_contexts=10, max_response_tokens=9, seed=4))
    assert again.equals(bank) and not other["tokens"].equals(bank["tokens"])


def test_prompts_that_were_trained_on_are_dropped(tmp_path):
    held_out, trained = read_prompts(write_prompts(tmp_path / "a.jsonl", 10)), read_prompts(write_prompts(tmp_path / "b.jsonl", 4))
    assert len(drop_trained(held_out, trained)) == 6
    with pytest.raises(DataError, match="all 4 also occur"):
        drop_trained(trained, held_out)


def test_choice_of_prompts(tmp_path):
    prompts = read_prompts(write_prompts(tmp_path / "a.jsonl", 30))
    first = choose_prompts(prompts, SamplingConfig(num_contexts=5))
    drawn = choose_prompts(prompts, SamplingConfig(num_contexts=5, sample="random", seed=1))
    assert [p["line"] for p in first] == [0, 1, 2, 3, 4] and [p["line"] for p in drawn] == sorted(p["line"] for p in drawn) != [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content, message",
    [('{"prompt": "a"}\n{"prompt": ', "line 2: no JSON"), ('{"text": "a"}\n', "row 1: expected an object"), ('{"prompt": ""}\n', "non-empty"), ("", "no prompt in it")],
)  # fmt: skip
def test_bad_prompt_files(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_bad_options_and_prompts(models, tmp_path):
    with pytest.raises(ConfigError, match="temperature > 0"):
        SamplingConfig(temperature=0)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "absent.jsonl")
    prompts = [{"prompt": [{"role": "user", "content": "w5"}], "label": None, "line": 4}]
    with pytest.raises(DataError, match="row 5 is a list of messages"):
        sample_bank(prompts, str(models["student"]), SamplingConfig())
    long = [{"prompt": "w5 w6 w7", "label": None, "line": 0}]
    with pytest.raises(DataError, match="expected 1 to 2 tokens, got 3"):
        sample_bank(long, str(models["student"]), SamplingConfig(max_prompt_tokens=2))


def test_penalties_of_the_checkpoint_do_not_change_what_is_sampled(models, tmp_path):
    """Instruct models bring a repetition penalty in generation_config.json; the bank is of the plain distribution."""
    import shutil

    penalised = tmp_path / "student"
    shutil.copytree(models["student"], penalised)
    known = json.loads((penalised / "generation_config.json").read_text()) if (penalised / "generation_config.json").is_file() else {}
    (penalised / "generation_config.json").write_text(json.dumps({**known, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_p": 0.9}))
    prompts = read_prompts(write_prompts(tmp_path / "p.jsonl", 6))
    config = SamplingConfig(num_contexts=6, max_response_tokens=12, seed=3)
    plain, changed = (sample_bank(prompts, str(path), config)[0] for path in (models["student"], penalised))
    assert changed["tokens"].tolist() == plain["tokens"].tolist()


def test_prompt_files_of_other_encodings(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert read_prompts(tmp_path / "bom.jsonl")[0]["prompt"] == "a"
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match="latin.jsonl: expected UTF-8 text"):
        read_prompts(tmp_path / "latin.jsonl")
