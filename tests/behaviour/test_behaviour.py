"""The behaviour run: the corpus is right, stacked models are the models, and a tiny run goes from nothing to tables."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.behaviour import outcome, plan
from benchmarks.behaviour.choosing import Chooser, Rule
from benchmarks.behaviour.distil import LOSS_ARGS, Distiller, _top, ends_of, prompts_of
from benchmarks.behaviour.pretrain import make_model, problem_sets, solved
from benchmarks.behaviour.sizes import SIZES
from benchmarks.behaviour.stacked import Stack, StackedAdam
from benchmarks.gpu import behaviour
from examples.reasoning import corpus
from slime.backends.megatron_utils.losses.registry import get_loss
from slime.backends.megatron_utils.losses.types import Rows
from ta_opd.errors import ConfigError
from ta_opd.selection import list_selectors

TINY = SIZES["tiny"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ corpus


@pytest.mark.parametrize("domain", list(corpus.DOMAINS))
def test_a_writer_without_slips_is_right(domain):
    level = corpus.Level(domains=(domain,))
    for problem in corpus.make_problems(60, 1, corpus.TEACHER, level):
        ids = corpus.encode(problem.solution)
        assert corpus.answer_of([*ids, corpus.END_ID]) == problem.label
        assert corpus.answer_of(ids) is None  # not ended
        assert max(ids) < corpus.VOCABULARY


def recomputed(prompt: tuple[str, ...]) -> str | None:
    """The answer from the prompt's words alone, for arithmetic."""
    if prompt[0] == "solve":
        total = int(prompt[1])
        for sign, number in zip(prompt[2:-1:2], prompt[3:-1:2], strict=True):
            total = {"+": total + int(number), "-": total - int(number), "*": total * int(number)}[sign]
        return str(total)
    if prompt[0] == "mod":
        base, total = int(prompt[1]), int(prompt[3])
        for sign, number in zip(prompt[4:-1:2], prompt[5:-1:2], strict=True):
            total = total + int(number) if sign == "+" else total * int(number)
        return str(total % base)
    if prompt[0] == "sort":
        return " ".join(sorted(prompt[1:-1], key=int))
    return None


def test_labels_are_the_answers_of_the_prompts():
    problems = corpus.make_problems(400, 5, corpus.TEACHER, corpus.Level())
    checked = [(p.label, recomputed(p.prompt)) for p in problems if recomputed(p.prompt) is not None]
    assert len(checked) > 150 and all(a == b for a, b in checked)


def test_words_are_distinct_and_writers_differ():
    assert len(set(corpus.words())) == corpus.VOCABULARY and len(set(corpus.NAMES)) == 96
    assert set(corpus.TEACHER.openers) != set(corpus.STUDENT.openers)
    slips = [p for p in corpus.make_problems(300, 2, corpus.STUDENT, corpus.Level()) if corpus.answer_of([*corpus.encode(p.solution), 1]) != p.label]
    assert 12 < len(slips) < 100  # a slip is clipped or undone now and then; lists and paths have none


def test_the_same_seed_gives_the_same_corpus_and_held_out_prompts_are_apart():
    assert corpus.make_problems(30, 4, corpus.TEACHER, TINY.level) == corpus.make_problems(30, 4, corpus.TEACHER, TINY.level)
    heldout, validation = problem_sets(TINY)
    avoid = {p.prompt for p in heldout + validation}
    assert len(avoid) == len(heldout) + len(validation)
    assert not avoid & {p.prompt for r in range(4) for p in prompts_of(1, r, TINY, avoid)}
    assert prompts_of(1, 0, TINY, avoid) == prompts_of(1, 0, TINY, avoid) != prompts_of(2, 0, TINY, avoid)


@pytest.mark.parametrize("change", [{"largest": 500}, {"steps": (4, 2)}, {"names": 3}, {"domains": ("poetry",)}])
def test_a_level_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="level: expected"):
        corpus.Level(**change)


# ------------------------------------------------------------------ stacked models


@pytest.fixture(scope="module")
def two():
    """Two different models and their stack."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = make_model(TINY.student).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        models.append(model)
    stack, other = Stack.copies(models[0], 2, "cpu"), Stack.copies(models[1], 1, "cpu")
    for name, weight in stack.weights.items():
        weight[1] = other.weights[name][0]
    return models, stack


def test_a_stack_gives_each_models_logits_and_gradients(two):
    models, stack = two
    ids = torch.randint(3, 500, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    parameters = stack.require_grad()
    logits = stack.logits(stack.hidden(ids))
    torch.log_softmax(logits, -1)[..., 7].sum().backward()
    for run, model in enumerate(models):
        own = model(input_ids=ids[run], use_cache=False).logits
        torch.testing.assert_close(logits[run], own, atol=2e-4, rtol=1e-4)
        model.zero_grad()
        torch.log_softmax(own, -1)[..., 7].sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stack.weights[name.removeprefix("model.")].grad[run], parameter.grad, atol=5e-3, rtol=2e-3)
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)


def test_a_stack_writes_what_each_model_writes_at_any_prompt_length(two):
    models, stack = two
    ids = torch.randint(3, 500, (2, 3, 9), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([[4, 9, 6], [9, 3, 5]])
    got = stack.sample(ids, lengths, 8, corpus.END_ID, corpus.PAD_ID, 0.0, None)
    for run, model in enumerate(models):
        for row in range(3):
            n = int(lengths[run, row])
            own = model.generate(ids[run, row, :n][None], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1)[0]
            assert torch.equal(own, got[run, row, : len(own)])


def test_sampling_follows_the_models_distribution(two):
    models, stack = two
    prompt = torch.randint(3, 500, (1, 1, 5), generator=torch.Generator().manual_seed(4)).expand(2, 4000, 5)
    drawn = stack.sample(prompt, torch.full((2, 4000), 5), 1, -1, 0, 1.0, torch.Generator().manual_seed(0))[:, :, 5]
    for run, model in enumerate(models):
        p = torch.softmax(model(input_ids=prompt[run, :1]).logits[0, -1], -1)
        share = torch.bincount(drawn[run], minlength=corpus.VOCABULARY) / 4000
        assert float((share - p.detach()).abs().max()) < 5 * float((p.detach().max() / 4000).sqrt())


def test_each_run_has_its_own_rate_and_clipping():
    weight = torch.zeros(3, 4, 4, requires_grad=True)
    weight.grad = torch.stack([torch.full((4, 4), 100.0), torch.full((4, 4), 0.01), torch.full((4, 4), torch.nan)])
    optimizer = StackedAdam([weight], torch.tensor([1e-2, 2e-2, 1e-2]))
    norms = optimizer.step()
    assert float(norms[0]) == pytest.approx(400) and float(norms[1]) == pytest.approx(0.04)
    assert float(weight[0].mean()) == pytest.approx(-1e-2, rel=1e-3) and float(weight[1].mean()) == pytest.approx(-2e-2, rel=1e-3)
    assert float(weight[2].abs().max()) == 0


# ------------------------------------------------------------------ plan and tables


def test_the_plan_covers_the_registry_and_groups_hold_every_run_once():
    size = SIZES["gpu"]
    rates = {arm: size.rates[i % 2] for i, arm in enumerate(plan.arms(size))}
    first, later = plan.first_runs(size), plan.later_runs(size, rates)
    runs = first + later
    names = {s.name for s in list_selectors()} - {"none"}
    assert {r.arm.selector for r in runs} == names | {"full"}
    assert {(r.arm, r.lr) for r in first} == {(arm, lr) for arm in plan.arms(size) for lr in size.rates} and {r.seed for r in first} == {1}
    assert {(r.arm, r.seed, r.lr) for r in later} == {(arm, seed, rates[arm]) for arm in plan.arms(size) for seed in (2, 3)}
    groups = [*plan.groups(size, first), *plan.groups(size, later)]
    grouped = [r for group in groups for r in group]
    assert sorted(r.name for r in grouped) == sorted(r.name for r in runs) and len(set(grouped)) == len(runs) == plan.number_of_runs(size)
    assert all(len({(r.seed, r.arm.loss) for r in group}) == 1 and len(group) <= size.group for group in groups)
    assert 100e6 < size.teacher.width.parameters < 130e6 and 22e6 < size.student.width.parameters < 28e6


def test_the_better_rate_and_intervals_over_seeds():
    rows = [{"run": f"{lr}-{seed}", "selector": "entropy", "budget": 0.1, "loss": "x", "lr": lr, "seed": seed, "accuracy": a, "validation": v, "KLf": 1.0, "KLr": 1.0}
            for lr, v, values in ((1e-3, 0.5, (0.2, 0.4)), (2e-3, 0.6, (0.1, 0.3))) for seed, a in zip((1, 2), values, strict=True)]  # fmt: skip
    best = outcome.better_rate(pd.DataFrame(rows))
    assert set(best["lr"]) == {2e-3}  # by validation, not by the accuracy that is reported
    row = outcome.arm_table(best).iloc[0]
    assert row["accuracy"] == pytest.approx(0.2) and row["accuracy_ci"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert np.isnan(outcome.interval([0.3])[1])


# ------------------------------------------------------------------ a tiny run


def test_full_supervision_moves_towards_the_teacher_and_tokens_are_equal(tmp_path):
    torch.manual_seed(0)
    teacher, student = make_model(TINY.teacher).eval(), make_model(TINY.student).eval()
    runs = [plan.Run(plan.Arm(name, budget, "topk_reverse_kl"), 1, 4e-3) for name, budget in (("full", 1.0), ("random", 0.3))]
    with chooser_of(TINY) as chooser:
        distiller = Distiller(teacher, student, TINY, torch.device("cpu"), set(), chooser)
        distiller.train(runs)
    first, last = ([r for r in distiller.log.rows if r["rollout"] == i] for i in (0, TINY.rollouts - 1))
    assert last[0]["loss"] < first[0]["loss"]
    assert abs(first[0]["tokens"] - first[1]["tokens"]) <= 0.5 * first[0]["tokens"] and first[0]["kept"] == first[0]["tokens"]
    assert first[1]["kept"] == pytest.approx(0.3 * first[1]["tokens"], abs=1)
    assert len(solved(Stack.copies(student, 2, "cpu"), problem_sets(TINY)[0], 4)) == 2


def chooser_of(size, workers: int = 0) -> Chooser:
    return Chooser(workers, size.group, size.prompts * size.response, size.k)


def gradients(distiller, stack, ids_RBS, lengths_B, runs):
    parameters = stack.require_grad()
    places = distiller._places(ids_RBS, lengths_B)
    logits = distiller._logits(stack, distiller._hidden(stack, ids_RBS, lengths_B), places)
    student = _top(logits.detach(), places.target_RL, distiller.size.k)
    teacher, found = distiller._teach(runs, 0, ids_RBS, lengths_B, places, student)
    total, losses = distiller._loss(logits, runs, student, teacher, [w for w, _ in found])
    total.backward()
    return {n: w.grad for n, w in stack.weights.items()}, losses.tolist(), len(parameters), places


@pytest.mark.parametrize("loss", TINY.losses)
def test_a_run_learns_in_a_group_what_it_learns_alone(two, loss):
    """And the top-K divergence over nearly the whole vocabulary has the gradient of the full reverse KL by autograd."""
    models, _ = two
    k = 500 if loss == "topk_reverse_kl" else TINY.k
    size = replace(TINY, k=k)
    ids = torch.randint(3, 500, (1, 6, 14), generator=torch.Generator().manual_seed(5)).repeat(2, 1, 1)
    ids[:, 1, 11], lengths = corpus.END_ID, torch.tensor([4, 5, 6, 4, 5, 6])
    runs = [plan.Run(plan.Arm(name, budget, loss), 1, 1e-3) for name, budget in (("full", 1.0), ("entropy", 0.3))]
    with chooser_of(size) as chooser:
        distiller = Distiller(models[1], models[0], size, torch.device("cpu"), set(), chooser)
        together, values, _, places = gradients(distiller, Stack.copies(models[0], 2, "cpu"), ids, lengths, runs)
        for i, run in enumerate(runs):
            alone, value, count, _ = gradients(distiller, Stack.copies(models[0], 1, "cpu"), ids[:1], lengths, [run])
            assert value[0] == pytest.approx(values[i], rel=1e-5) and count == len(alone)
            for name, grad in alone.items():
                torch.testing.assert_close(together[name][i], grad[0], atol=1e-5, rtol=1e-3)
    assert places.counts == [sum(min(12, 14) if b == 1 else 14 for b in range(6)) - int(lengths.sum())] * 2
    if loss == "topk_reverse_kl":
        model = models[0]
        model.zero_grad()
        s, t = (torch.log_softmax(m(input_ids=ids[0, :, :-1]).logits, -1).flatten(0, 1)[places.index_RL[0]] for m in (model, models[1]))
        (s.exp() * (s - t.detach())).sum(1).mean().backward()
        full = {n.removeprefix("model."): p.grad for n, p in model.named_parameters()}
        for name, grad in together.items():
            torch.testing.assert_close(grad[0], full[name], atol=2e-3, rtol=2e-2)


def test_a_response_without_an_end_is_as_long_as_it_may_be():
    ids = torch.full((1, 3, 12), 7)
    ids[0, 0, 6] = ids[0, 1, 2] = corpus.END_ID  # the second is in the prompt
    assert ends_of(ids, torch.tensor([3, 4, 6]), 5).tolist() == [[7, 9, 11]] and ends_of(ids, torch.tensor([3, 4, 9]), 5).tolist() == [[7, 9, 12]]


def test_positions_behind_a_response_are_left_out_and_change_nothing(two):
    models, stack = two
    ids = torch.randint(3, 500, (2, 3, 11), generator=torch.Generator().manual_seed(8))
    ends = torch.tensor([[11, 4, 7], [5, 6, 1]])
    parameters = stack.require_grad()
    found = []
    for given in (None, ends):
        hidden = stack.hidden(ids, given)
        before = torch.arange(11) < ends[..., None]
        (hidden[before] ** 3).sum().backward()
        found.append((hidden[before].detach(), [p.grad.clone() for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    for parameter in parameters:
        parameter.requires_grad_(False)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    for whole, packed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(whole, packed, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("loss", TINY.losses)
def test_the_losses_of_all_runs_in_one_call_are_those_of_each_run_with_its_own_head(two, loss):
    models, stack = two
    size, rng = TINY, np.random.default_rng(0)
    ids = torch.randint(3, 500, (2, 4, 12), generator=torch.Generator().manual_seed(9))
    ids[1, :, 8], lengths = corpus.END_ID, torch.tensor([4, 5, 3, 4])
    runs = [plan.Run(plan.Arm("random", 0.3, loss), 1, 1e-3)] * 2
    with chooser_of(size) as chooser, torch.no_grad():
        distiller = Distiller(models[1], models[0], size, torch.device("cpu"), set(), chooser)
        places = distiller._places(ids, lengths)
        hidden = stack.hidden(ids[:, :, :-1])
        logits = distiller._logits(stack, hidden, places)
        student, teacher = _top(logits, places.target_RL, size.k), distiller._teacher(ids, lengths, places)
        weights = [rng.choice([0.0, 0.5, 1.0, 2.0], count).astype(np.float32) for count in places.counts]
        total, values = distiller._loss(logits, runs, student, teacher, weights)
        for run, weight in enumerate(weights):
            kept = torch.from_numpy(np.flatnonzero(weight))
            row = {k: v[run][kept] for k, v in teacher.items()}
            factor = torch.from_numpy(weight)[kept] / weight.sum()
            given = Rows(target_R=row["target"].long(), weight_R=factor, factor_R=factor, student_logp_old_R=student["logp"][run][kept],
                         teacher_logp_R=row["logp"], teacher_ids_RK=row["ids"], teacher_logps_RK=row["logps"])  # fmt: skip
            rows = hidden[run].flatten(0, 1)[places.index_RL[run][kept]]
            own = get_loss(loss)(rows, stack.heads()[run], given, LOSS_ARGS).total
            assert float(values[run]) == pytest.approx(float(own), rel=2e-5)
        assert float(total) == pytest.approx(float(values.sum()), rel=1e-5)


def test_workers_choose_what_is_chosen_without_them():
    rng, lengths = np.random.default_rng(1), [[5, 0, 9], [7, 6, 1], [3, 3, 3]]
    sides = {}
    for side in ("student", "teacher"):
        logits = np.sort(rng.normal(size=(3, 14, 4)).astype(np.float32), 2)[:, :, ::-1] - 3
        ids = np.argsort(rng.random((3, 14, 9)), 2)[:, :, :4].astype(np.int32)
        sides[side] = {"ids": ids, "logps": logits, "target": ids[:, :, 1], "logp": logits[:, :, 1]}
    found = []
    for workers in (0, 2):
        with Chooser(workers, 4, 20, 4) as chooser:
            chooser.put(0, "student", sides["student"])
            for i in range(3):
                chooser.put(i, "teacher", {k: v[i : i + 1] for k, v in sides["teacher"].items()})
            found.append([chooser.submit(i, Rule(name, 0.3, 1, 5), lengths[i]).result() for i, name in enumerate(("random", "tip_ier_or", "iw_opd"))])
    for here, there in zip(*found, strict=True):
        assert np.array_equal(here[0], there[0]) and here[1] == there[1] and here[1]["kept"] >= 3


@pytest.mark.parametrize("free, group", [(140, 56), (50, 28), (1, 1)])
def test_groups_shrink_to_what_is_free_on_the_device_and_stay_as_begun(monkeypatch, tmp_path, free, group):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 140 * 2**30))
    size = behaviour.fitted(SIZES["gpu"], tmp_path)
    assert size.group == group and (group == 1 or behaviour.memory(size)["peak"] < 0.9 * free * 2**30)
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups/0000.pickle").touch()
    (tmp_path / "size.json").write_text('{"group": 28}')
    assert behaviour.fitted(SIZES["gpu"], tmp_path).group == 28
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_tiny_run_gives_tables_pictures_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    words, handler = ["--size", "tiny", "--device", "cpu", "--output-dir", str(tmp_path)], signal.getsignal(signal.SIGTERM)
    assert behaviour.main([*words, "--seconds", "-1000"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["complete"] is False

    trained, train = [], Distiller.train

    def stopped_in_the_second_group(self, runs, on_rollout):
        def stop(stack, rollout):
            on_rollout(stack, rollout)
            if len(trained) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        trained.append(runs)
        return train(self, runs, stop)

    monkeypatch.setattr(Distiller, "train", stopped_in_the_second_group)
    assert behaviour.main(words) == 0 and signal.getsignal(signal.SIGTERM) == handler
    partly = json.loads((tmp_path / "result.json").read_text())
    assert partly["complete"] is False and partly["runs"] == len(trained[0]) and len(trained) == 2 and partly["regressed"]
    assert "stopped by SIGTERM" in capsys.readouterr().out
    for made in ("runs.csv", "arms.csv", "arms.png", "rollouts.parquet", "regression.csv", "report.html"):
        (tmp_path / made).unlink()
    monkeypatch.undo()
    assert behaviour.main(words) == 0 and not (tmp_path / "states").exists()
    assert behaviour.main([*words, "--rollouts", "9"]) == 2 and "expected groups of the same settings" in capsys.readouterr().err
    result, runs = json.loads((tmp_path / "result.json").read_text()), pd.read_csv(tmp_path / "runs.csv")
    assert result["complete"] and len(runs) == plan.number_of_runs(TINY) == result["of"]
    later = runs[runs["seed"] == TINY.seeds[1]]
    rates = outcome.rate_of_each_arm(runs[runs["seed"] == TINY.seeds[0]])
    assert {(r.selector, r.budget, r.loss): r.lr for r in later.itertuples()} == rates
    assert result["compatibility_sd"] > 0 and runs["run"].is_unique
    arms = pd.read_csv(tmp_path / "arms.csv")
    assert len(arms) == len(plan.arms(TINY)) and {"accuracy_ci", "KLf_ci"} <= set(arms)
    assert set(pd.read_csv(tmp_path / "regression.csv")["model"]) == {"H_D", "H_D_C", "H_Dlearn_Dincompat"}
    assert (tmp_path / "arms.png").stat().st_size > 5000 and "full" in (tmp_path / "report.html").read_text().lower()
    assert max(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) < 16 * 2**20


def test_rng_of_prompts_does_not_touch_the_global_one():
    random.seed(1)
    before = random.getstate()
    prompts_of(1, 1, TINY, set())
    assert random.getstate() == before
