"""Prompt files from the forms that DAPO-Math-17k, GSM8K, harness logs and chat data sets come in."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slime.rollout.prompt_file import read_prompt_file
from ta_opd import prompt_sets
from ta_opd.errors import ConfigError, DataError
from tests.launchers.conftest import ROOT


def make(*words):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/slime_ta_opd", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, ROOT / "tools/make_prompts.py", *map(str, words)], env=environment, capture_output=True, text=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dapo(tmp_path):
    """The published parquet repeats every problem; the message's text is the prompt, the reward model's truth the label."""
    rows = [{"prompt": [{"role": "user", "content": f"Solve {i % 7}. " + " " * (i // 7)}], "reward_model": {"ground_truth": str(i % 7), "style": "rule"}} for i in range(21)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    done = make("--kind", "dapo", "--source", tmp_path, "--output", tmp_path / "out/train.jsonl", "--heldout", 2)
    assert done.returncode == 0, done.stderr
    train, heldout = lines(tmp_path / "out/train.jsonl"), lines(tmp_path / "out/train_heldout.jsonl")
    assert len(train) == 5 and len(heldout) == 2
    assert sorted(r["label"] for r in train + heldout) == list("0123456")
    record = json.loads((tmp_path / "out/train.indices.json").read_text())
    assert (record["rows_read"], record["duplicates"], record["prompts"]) == (21, 14, 7)
    assert [f"Solve {i}. " for i in record["heldout_source_rows"]] == [r["prompt"] for r in heldout]
    assert read_prompt_file(tmp_path / "out/train.jsonl", input_key="prompt", label_key="label")[0][0].label in "0123456"


def test_gsm8k_and_its_harness_log(tmp_path):
    (tmp_path / "g.jsonl").write_text("".join(json.dumps({"question": f"q{i}?", "answer": f"because\n#### 1,{i:03d}"}) + "\n" for i in range(3)))
    done = make("--kind", "gsm8k", "--source", tmp_path / "g.jsonl", "--output", tmp_path / "a.parquet")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "a.parquet").to_pylist()[1] == {"prompt": "q1?", "label": "1001"}
    log = [{"doc_id": i // 2, "arguments": {"gen_args_0": {"arg_0": f"Q: q{i // 2}?\nA:", "arg_1": {}}}, "target": f"x #### {i // 2}"} for i in range(4)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    done = make("--kind", "lm_eval_log", "--source", tmp_path / "samples.jsonl", "--output", tmp_path / "b.jsonl")
    assert lines(tmp_path / "b.jsonl") == [{"prompt": "Q: q0?\nA:", "label": "0"}, {"prompt": "Q: q1?\nA:", "label": "1"}], done.stderr
    old_form = prompt_sets.lm_eval_log({"arguments": [["Q: x", {}]], "target": "7"})
    assert old_form == ("Q: x", "7")


def test_chat(tmp_path):
    rows = [
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "meta": {"a": 5}},
        {"conversations": [{"from": "human", "value": " "}], "meta": {"a": 6}},
        {"conversations": [{"from": "human", "value": "hi "}, {"from": "gpt", "value": "x"}], "meta": {"a": 7}},
        {"conversations": [{"from": "human", "value": "hi"}], "meta": {"a": 8}},
    ]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    done = make("--kind", "chat", "--prompt-key", "conversations", "--label-key", "meta.a", "--source", tmp_path / "c.json", "--output", tmp_path / "o.jsonl")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "o.jsonl") == [
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "label": "5"},
        {"prompt": [{"role": "user", "content": " "}], "label": "6"},
        {"prompt": [{"role": "user", "content": "hi "}], "label": "7"},
    ]
    assert "1 duplicates" in done.stdout


def test_strings_become_messages(tmp_path):
    prompts = prompt_sets.collect([{"p": "a"}, {"p": "b"}], prompt_sets.chat("p", ""))
    prompt_sets.write(prompts, tmp_path / "x.jsonl", as_messages=True)
    assert lines(tmp_path / "x.jsonl")[0] == {"prompt": [{"role": "user", "content": "a"}]}


def test_the_heldout_draw_is_recorded_disjoint_and_the_same_for_a_seed():
    prompts = prompt_sets.collect([{"p": str(i)} for i in range(1000)], prompt_sets.chat("p", ""))
    train, heldout = prompt_sets.split(prompts, 400, 41717, second_half=True)
    assert min(heldout) >= 500 and len(heldout) == 400 and len(train) == 600 and not set(train) & set(heldout)
    import random

    assert heldout == sorted(random.Random(41717).sample(range(500, 1000), 400))  # the released drivers' lines
    assert prompt_sets.split(prompts, 400, 41717, second_half=True)[1] == heldout
    assert prompt_sets.split(prompts, 400, 1, second_half=True)[1] != heldout
    assert prompt_sets.split(prompts, 0, 1) == (list(range(1000)), [])


def test_too_many_held_out():
    prompts = prompt_sets.collect([{"p": "a"}, {"p": "b"}], prompt_sets.chat("p", ""))
    for number, half in ((2, False), (2, True), (-1, False)):
        with pytest.raises(ConfigError, match=f"HELDOUT={number}"):
            prompt_sets.split(prompts, number, 1, second_half=half)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"a": 1}\n', "gsm8k", "source row 0: expected key 'answer', got a row with a"),
        ('{"question": "q", "answer": "no number"}\n', "gsm8k", "expected '#### number'"),
        ('{"question": "q"}\nnot json\n', "dapo", "row 0"),
        ("not json\n", "chat", "line 1: expected a JSON object, got 'not json'"),
        ("", "chat", "expected at least one prompt, got none in 0 rows"),
        ('{"prompt": ["text"]}\n', "chat", "source row 0"),
    ],
)
def test_bad_sources(content, kind, message, tmp_path):
    (tmp_path / "s.jsonl").write_text(content)
    done = make("--kind", kind, "--source", tmp_path / "s.jsonl", "--output", tmp_path / "o.jsonl")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_missing_source(tmp_path):
    done = make("--kind", "chat", "--source", tmp_path / "none.jsonl", "--output", tmp_path / "o.jsonl")
    assert done.returncode == 2 and "which does not exist" in done.stderr
    with pytest.raises(DataError):
        list(prompt_sets.read_rows([tmp_path / "none"]))


ODD = "one\u2028two\x85three\x0cfour"  # str.splitlines cuts at all of these; JSON lines end at \n only


def test_prompts_with_unusual_line_separators(tmp_path):
    from ta_opd.fixed_context.sampling import read_prompts

    (tmp_path / "in.jsonl").write_text("\ufeff" + json.dumps({"prompt": ODD, "label": "1"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    prompts = prompt_sets.collect(prompt_sets.read_rows([tmp_path / "in.jsonl"]), prompt_sets.chat("prompt", "label"))
    prompt_sets.write(prompts, tmp_path / "out.jsonl")
    assert [p["prompt"] for p in read_prompts(tmp_path / "out.jsonl")] == [ODD]
    assert read_prompt_file(tmp_path / "out.jsonl", input_key="prompt", label_key="label")[0][0].prompt == ODD


def test_labels_of_later_rows_reach_parquet(tmp_path):
    prompt_sets.write(prompt_sets.PromptSet(["a", "b"], [None, "2"]), tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == [{"prompt": "a", "label": None}, {"prompt": "b", "label": "2"}]
    prompt_sets.write(prompt_sets.PromptSet(["a"], [None]), tmp_path / "q.parquet")
    assert pq.read_table(tmp_path / "q.parquet").column_names == ["prompt"]


@pytest.mark.parametrize(("name", "content"), [("a.json", b"[{"), ("a.jsonl", b'{"prompt": "\xe9"}'), ("a.parquet", b"PAR1")])
def test_sources_that_cannot_be_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"source .*{name}"):
        list(prompt_sets.read_rows([tmp_path / name]))


def test_outputs_are_never_sources(tmp_path):
    """Called again on a directory that holds its outputs, it must draw the same held-out prompts; a source is not written over."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(20)))
    words = ("--kind", "chat", "--heldout", 5, "--output", tmp_path / "a.jsonl")
    results = []
    for _ in range(2):
        done = make(*words, "--source", tmp_path)
        assert done.returncode == 0, done.stderr
        results.append(((tmp_path / "a.jsonl").read_text(), (tmp_path / "a_heldout.jsonl").read_text()))
    assert results[0] == results[1] and len(lines(tmp_path / "a.jsonl")) == 15
    before = source.read_text()
    done = make("--kind", "chat", "--heldout", 5, "--source", source, "--output", tmp_path / "." / "in.jsonl")
    assert done.returncode == 2 and "expected another file than SOURCE" in done.stderr and source.read_text() == before
    done = make(*words, "--source", source, "--heldout-output", tmp_path / "a.jsonl")
    assert done.returncode == 2 and "HELDOUT_OUTPUT" in done.stderr
