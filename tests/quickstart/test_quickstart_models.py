"""Tiny models: what is trained on, determinism, the cache, and what happens when a model comes out wrong."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.quickstart import arithmetic, decoding, tiny_models
from examples.quickstart.tiny_models import IGNORED, Settings, Shape, Training
from ta_opd.errors import ConfigError, NumericsError

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
FEW = Training(seed=1, steps=4, schedule=4, warmup=2, batch_size=8)
QUICK = Settings(
    teacher=FEW, student=dataclasses.replace(FEW, seed=2, stop_at=0.0, check_every=2, validation=10), teacher_shape=SMALL, student_shape=SMALL,
    teacher_at_least=0.0, student_between=(0.0, 1.0),
)  # fmt: skip
HELDOUT = arithmetic.make_problems(10, 20, seed=1)[1]


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.build_tokenizer()


def test_targets_are_the_response_and_its_end_token_only(tokenizer):
    problems = [arithmetic.parse_prompt("Q1+2?"), arithmetic.parse_prompt("Q9+8-3?")]
    ids, targets = tiny_models.encode(problems, tokenizer)
    assert ids.shape == targets.shape
    for row, problem in enumerate(problems):
        kept = targets[row] != IGNORED
        assert tokenizer.decode(targets[row][kept]) == problem.solution + "<eos>"
        assert torch.equal(ids[row][kept], targets[row][kept])
        assert tokenizer.decode(ids[row][: len(problem.prompt)]) == problem.prompt and not kept[: len(problem.prompt)].any()


def test_learning_rate_warms_up_and_ends_at_zero():
    training = Training(seed=0, steps=100, schedule=100, warmup=10, lr=1.0)
    rates = [tiny_models.learning_rate(training, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) == rates[9] == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.09)))
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_default_shape_is_the_documented_size():
    assert sum(p.numel() for p in tiny_models.make_model(Shape(), 0).parameters()) == 398_080


def test_equal_seeds_give_equal_weights_and_no_heldout_prompt_is_trained_on(monkeypatch):
    seen = []
    encode = tiny_models.encode
    monkeypatch.setattr(tiny_models, "encode", lambda problems, tok: seen.extend(p.prompt for p in problems) or encode(problems, tok))
    first, steps = tiny_models.train(SMALL, FEW, {p.prompt for p in HELDOUT})
    again, _ = tiny_models.train(SMALL, FEW, {p.prompt for p in HELDOUT})
    other, _ = tiny_models.train(SMALL, dataclasses.replace(FEW, seed=5), {p.prompt for p in HELDOUT})
    assert steps == 4
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    # A prompt that comes up is left out when it is held back.
    blocked = set(seen[:3])
    seen.clear()
    tiny_models.train(SMALL, FEW, blocked)
    assert seen and not blocked & set(seen)


def test_training_lowers_the_loss():
    model, _ = tiny_models.train(SMALL, Training(seed=1, steps=120, schedule=120, batch_size=16), set())
    fresh = tiny_models.make_model(SMALL, 1)
    ids, targets = tiny_models.encode(HELDOUT, arithmetic.build_tokenizer())

    def loss(m):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(m(input_ids=ids).logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)

    assert loss(model) < 0.8 * loss(fresh)


def test_a_student_that_never_gets_there_is_an_error():
    with pytest.raises(NumericsError, match="99% solved within 4 steps"):
        tiny_models.train(SMALL, dataclasses.replace(FEW, stop_at=0.99, check_every=2, validation=5), set())


def test_models_are_made_once_loadable_and_keyed_by_what_decides_them(tmp_path):
    made = tiny_models.tiny_models(tmp_path, HELDOUT, QUICK)
    assert not made.cached
    again = tiny_models.tiny_models(tmp_path, HELDOUT, QUICK)
    assert again.cached and again.teacher == made.teacher and again.student_accuracy == made.student_accuracy
    assert [p.name for p in tmp_path.iterdir()] == [made.teacher.parent.name]
    assert made.teacher.parent.stat().st_mode & 0o555 == 0o555
    model = decoding.load_model(made.student)
    assert model.config.model_type == "qwen3" and model.config.eos_token_id == 1
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in made.teacher.iterdir()}
    share = decoding.solved(model, arithmetic.build_tokenizer(), HELDOUT).mean()
    assert share == made.student_accuracy
    other = dataclasses.replace(QUICK, teacher=dataclasses.replace(FEW, seed=9))
    assert tiny_models.fingerprint(other, HELDOUT) != tiny_models.fingerprint(QUICK, HELDOUT)
    assert tiny_models.fingerprint(QUICK, HELDOUT[1:]) != tiny_models.fingerprint(QUICK, HELDOUT)


@pytest.mark.parametrize(
    "results, words",
    [
        ({"teacher": (0.8, 4, 1), "student": (0.4, 4, 1)}, "teacher: expected at least 90%"),
        ({"teacher": (1.0, 4, 1), "student": (0.1, 4, 1)}, "student: expected 20% to 60%"),
        ({"teacher": (1.0, 4, 1), "student": (0.7, 4, 1)}, "student: expected 20% to 60%"),
    ],
)
def test_models_that_do_not_fit_the_task_are_an_error_and_not_cached(tmp_path, monkeypatch, results, words):
    monkeypatch.setattr(tiny_models, "_train_both", lambda home, heldout, settings: results)
    with pytest.raises(NumericsError, match=words):
        tiny_models.tiny_models(tmp_path, HELDOUT, Settings())
    assert not any(tmp_path.iterdir())


def test_a_shorter_teacher_is_another_model_and_the_usual_one_is_not():
    assert tiny_models.with_teacher_steps(Settings().teacher.steps) == Settings()
    shorter = tiny_models.with_teacher_steps(360)
    assert (shorter.teacher.steps, shorter.teacher.schedule, shorter.student) == (360, 360, Settings().student)
    assert tiny_models.fingerprint(shorter, HELDOUT) != tiny_models.fingerprint(Settings(), HELDOUT)


def test_models_need_problems_to_hold_back(tmp_path):
    with pytest.raises(ConfigError, match="held-out"):
        tiny_models.tiny_models(tmp_path, [], QUICK)


def test_greedy_generation_with_a_cache_equals_it_without(tokenizer):
    model = tiny_models.make_model(SMALL, 3).eval()
    ids = torch.tensor([tokenizer(p.prompt)["input_ids"] for p in HELDOUT[:6]])
    new = decoding.generate(model, ids, max_new_tokens=12, eos_id=1, pad_id=0)
    for row in range(len(ids)):
        sequence = ids[row].tolist()
        for token in new[row].tolist():
            if sequence[-1] == 1 or token == 0 and 1 in sequence:
                assert token == 0
                continue
            with torch.no_grad():
                assert token == model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax().item()
            sequence.append(token)


def test_sampling_follows_its_seed_and_stops_at_the_end_token(tokenizer):
    model = tiny_models.make_model(SMALL, 3).eval()
    prompts = [p.prompt for p in HELDOUT] + ["Q1+2?"]  # two lengths
    first, again, other = (decoding.answer(model, tokenizer, prompts, temperature=1.0, seed=s, max_new_tokens=30) for s in (1, 1, 2))
    assert first == again and first != other and len(first) == len(prompts)
    for ids in first:
        assert 1 <= len(ids) <= 30 and 1 not in ids[:-1]
    assert any(ids[-1] == 1 for ids in first)


def test_tool_refuses_a_file_that_is_no_task(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "train_tiny_models.py"))["main"]
    (tmp_path / "held.jsonl").write_text('{"prompt": "hello", "label": "1"}\n')
    assert tool(["--heldout", str(tmp_path / "held.jsonl"), "--cache-dir", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
