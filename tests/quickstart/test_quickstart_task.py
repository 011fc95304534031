"""The arithmetic task: right answers, disjoint sets, one character a token."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.quickstart import arithmetic
from ta_opd.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def test_solution_is_worked_out_step_by_step():
    problem = arithmetic.solve([7, 5, 3, 8, 2], "+-++")
    assert problem.prompt == "Q7+5-3+8+2?"
    assert problem.solution == "7+5=12;12-3=9;9+8=17;17+2=19;A19"
    assert problem.label == "19"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6))
def test_every_step_of_a_sampled_problem_is_true(seed, operations):
    problem = arithmetic.sample_problem(random.Random(seed), operations)
    *steps, answer = problem.solution.split(";")
    assert len(steps) == operations
    for step in steps:
        left, right = step.split("=")
        assert eval(left) == int(right) >= 0
    assert answer == f"A{problem.label}" == f"A{eval(problem.prompt[1:-1])}"
    assert arithmetic.parse_prompt(problem.prompt) == problem


def test_sets_are_distinct_disjoint_and_the_same_for_one_seed():
    train, heldout = arithmetic.make_problems(500, 100, seed=4)
    prompts = [p.prompt for p in train + heldout]
    assert len(train) == 500 and len(heldout) == 100 and len(set(prompts)) == 600
    assert arithmetic.make_problems(500, 100, seed=4) == (train, heldout)
    assert arithmetic.make_problems(500, 100, seed=5)[1] != heldout
    # More training prompts leave the held-out ones as they are.
    assert arithmetic.make_problems(50, 100, seed=4)[1] == heldout


@pytest.mark.parametrize("sizes", [(0, 1, 4), (1, 0, 4), (1, 1, 0), (60, 60, 1)])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ConfigError, match="expected"):
        arithmetic.make_problems(sizes[0], sizes[1], seed=1, operations=sizes[2])


@pytest.mark.parametrize("numbers, signs", [([1, 2], ""), ([1, 2], "+-"), ([1, 2], "-")])
def test_impossible_chains_are_refused(numbers, signs):
    with pytest.raises(DataError):
        arithmetic.solve(numbers, signs)


@pytest.mark.parametrize(
    "response, answer",
    [("7+5=12;A12", "12"), ("7+5=12;A12<eos>", "12"), ("7+5=12;", None), ("A12;", None), ("", None), ("A1A2", "2")],
)
def test_answer_is_what_follows_the_last_mark(response, answer):
    assert arithmetic.extract_answer(response) == answer
    assert arithmetic.is_correct(response, "12") == (answer == "12")


def test_files_read_back_and_a_bad_line_is_named(tmp_path):
    paths = arithmetic.write_task(tmp_path, num_train=20, num_heldout=5, seed=2)
    assert len(arithmetic.read_jsonl(paths["train"])) == 20
    assert set(json.loads(paths["heldout"].read_text().splitlines()[0])) == {"prompt", "label"}
    lines = paths["train"].read_text().splitlines()
    for bad in ("{", '{"prompt": "Q1+1?", "label": "3"}', '{"prompt": "hello", "label": "1"}', '["Q1+1?"]'):
        paths["train"].write_text("\n".join([*lines[:6], bad, *lines[7:]]))
        with pytest.raises(DataError, match="line 7"):
            arithmetic.read_jsonl(paths["train"])
    paths["train"].write_text("")
    with pytest.raises(DataError, match="empty"):
        arithmetic.read_jsonl(paths["train"])


def test_tokenizer_loads_with_auto_tokenizer_and_round_trips(tmp_path):
    from ta_opd.fixed_context.hf import import_transformers

    arithmetic.build_tokenizer().save_pretrained(str(tmp_path))
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tokenizer) == arithmetic.VOCAB_SIZE == 32
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for problem in arithmetic.make_problems(50, 1, seed=3)[0]:
        text = problem.prompt + problem.solution
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]


def test_tool_writes_the_task_and_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "make_arithmetic_task.py"))["main"]
    assert tool(["--output-dir", str(tmp_path), "--num-train", "30", "--num-heldout", "10"]) == 0
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 30
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert tool(["--output-dir", str(tmp_path), "--operations", "0"]) == 2
    assert "error: expected at least one" in capsys.readouterr().err
