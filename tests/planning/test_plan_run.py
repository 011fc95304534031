"""The planner: what was recorded comes out again, more of anything costs more, and memory says no."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from plan_cases import AS_RECORDED, RECORDED, RESULTS, recorded_seconds, run_json, script, task

from slime.planning import memory
from slime.planning.layout import Layout, Servers, Split
from slime.planning.limits import limits
from slime.planning.models import load_model
from slime.planning.predict import Machine, Task, predict
from slime.planning.rates import Rates
from slime.planning.search import best_plan
from slime.planning.workload import Workload
from ta_opd.errors import ConfigError


def test_the_recorded_step_comes_out_within_a_fifth(tool, capsys):
    got, recorded = run_json(tool, capsys, AS_RECORDED)["seconds"], recorded_seconds()
    assert set(got) == set(recorded)
    assert got.pop("select") < recorded.pop("select")  # which computed the metrics, too: now they are made beside the scoring
    for phase, seconds in recorded.items():
        assert got[phase] == pytest.approx(seconds, rel=0.2), phase


def test_every_recorded_topology_comes_out_within_a_fifth(rates):
    page = script("tools/make_scaling_page.py")
    found = [t for t, path in page.RECORDED.items() if path.is_file()]
    assert "one" in found
    for topology in found:
        real, guess = page.compared(rates, topology)
        assert guess["total"] == pytest.approx(real["total"], rel=0.2), topology


def test_sampling_and_scoring_follow_from_measurements_of_their_own(rates):
    """With every calibrated rate spoilt, these phases are predicted all the same. Not training: its layers changed since they were timed alone."""
    spoilt = {n: replace(r, value=r.value * 1000) if r.status == "calibrated" else r for n, r in rates.rates.items()}
    seconds = {}
    for name, given in (("as fitted", rates), ("spoilt", Rates(spoilt, rates.gpus))):
        job = Task(load_model("1.7B"), load_model("4B"), Workload(max_tokens=16384), Machine(rates.gpu("H200"), 1), given)
        found = predict(job, Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
        seconds[name] = {"generate": found.generate.wall, "score": found.seconds["score"]}
    assert seconds["spoilt"] == seconds["as fitted"]
    assert seconds["spoilt"]["generate"] == pytest.approx(recorded_seconds()["generate"], rel=0.1)
    assert seconds["spoilt"]["score"] == pytest.approx(recorded_seconds()["score"], rel=0.1)


def test_the_earlier_step_without_graphs(rates):
    """205 responses at once, CUDA graphs for 64 only; sampling of its rollout 1, the rate of a step without a graph from its rollout 0."""
    recorded = json.loads((RESULTS / "opd_step_one_h200_64x4x1024_r0p10_first.jsonl").read_text().splitlines()[1])
    work = Workload(student_concurrency=205, graph_batch=64)
    job = Task(load_model("1.7B"), load_model("4B"), work, Machine(rates.gpu("H200"), 1), rates)
    got = predict(job, Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
    assert got.generate.wall == pytest.approx(recorded["seconds/sample"], rel=0.1)


@pytest.mark.parametrize("way, all_rows", [("kept, ours, last layer on kept rows", False), ("all, ours", True)])
def test_times_and_peaks_of_the_trainer_alone(rates, way, all_rows):
    """benchmarks/loss_rows.py: one sequence batch without an optimizer, packed sequences of 4,096."""
    table = json.loads((RESULTS / "loss_rows_megatron_h200.json").read_text())["tables"]["whole step"]
    rows = [r for r in table if r["way"] == way and r["gradients"] == "fp32"]
    assert len(rows) == 2
    for row in rows:
        job = task(rates, prompts=row["tokens"] // 4096, samples=1, prompt_len=1, response_len=4095, budget=0.1, all_rows=all_rows, max_tokens=row["tokens"])
        got = predict(job, Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
        assert got.train.total - got.train.optimizer == pytest.approx(row["ms"] / 1e3, rel=0.1)
        found = memory.trainer_memory(job.student, Layout(), job.work, rates, row["tokens"])
        assert (found.total - found.optimizer) / memory.GIB == pytest.approx(row["peak GiB"], rel=0.15)


def services(part: str) -> list[dict]:
    rows = json.loads((RESULTS / "services_h200.json").read_text())
    found = [r for r in rows if r["part"] == part and r.get("span", "response") in ("response", "response, last load")]
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("part", ["generate", "score", "sync"])
def test_services_alone(rates, part):
    """benchmarks/services.py: 64 x 256 + 512 tokens at K = 0, 16 and 64, its --loads, and weights over CUDA handles without a pause."""
    for row in services(part):
        job = task(rates, prompts=row.get("responses", 64), samples=1, prompt_len=256, response_len=row.get("response_len", 512), k=row.get("K", 16))
        got = predict(job, Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
        if part == "sync" and not row["round"]:
            continue  # opens the handles; no rate counts that
        if part == "sync":
            assert got.seconds["sync"] - rates["sync_fixed_seconds"] == pytest.approx(row["seconds"], rel=0.25)
        else:
            assert {"generate": got.generate.wall, "score": got.score.total}[part] == pytest.approx(row["seconds"], rel=0.1)


def test_a_rollout_whose_scoring_overlaps(rates):
    """services.py's overlap, to which no rate is fitted: 64 responses of 256 to 512 tokens at K = 16, both servers on one GPU."""
    from benchmarks.own_lengths import own_length

    rows = [r for r in json.loads((RESULTS / "services_h200.json").read_text()) if r["part"] == "overlap" and "generation_alone" in r]
    mean = sum(own_length(i, 512) for i in range(64)) / 64
    job = task(rates, prompts=64, samples=1, prompt_len=256, response_len=512, response_mean=mean)
    got = predict(job, Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
    assert len(rows) == 2
    for row in rows:
        assert got.generate.wall == pytest.approx(row["generation_alone"], rel=0.15)
        assert got.seconds["generate"] + got.seconds["score"] == pytest.approx(row["seconds"], rel=0.15)


def test_a_short_step(rates):
    """8 responses of 64 tokens: steps of few milliseconds more than of tokens. Its training is bound by kernels' starts, to which a rate is fitted."""
    recorded = json.loads((RESULTS / "opd_step_one_h200_4x2x64_r0p10.json").read_text())["seconds"]
    got = predict(task(rates, prompts=4, samples=2, response_len=64, max_tokens=16384), Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
    for phase, key in (("generate", "sample"), ("score", "score")):
        assert got.seconds[phase] == pytest.approx(recorded[key], rel=0.2), phase
    assert got.seconds["train"] == pytest.approx(recorded["train"], rel=0.02) and got.total == pytest.approx(recorded["total"], rel=0.1)
    assert got.seconds["sync"] == pytest.approx(recorded["sync"], abs=0.03)  # fitted to two syncs of the long step, which took 0.09 s each


def test_the_recorded_peak_of_the_trainer(rates):
    """Its optimizer held a copy of all weights in its step (torch's foreach AdamW), which one fused kernel does not."""
    step = json.loads(RECORDED.read_text())
    found = memory.trainer_memory(load_model("1.7B"), Layout(), Workload(), rates, 16_384)
    assert (found.weights + found.gradients + found.optimizer) / memory.GIB == pytest.approx(step["medians"]["train/memory_gib"], rel=0.02)


def test_rates_are_what_the_raw_results_give():
    assert script("benchmarks/fit_rates.py").main(["--check"]) == 0


def test_the_scaling_page_is_up_to_date():
    assert script("tools/make_scaling_page.py").main(["--check"]) == 0


def test_every_rate_names_its_source(rates):
    for found in rates.rates.values():
        for name in found.source.split(",")[0].split(" + "):
            assert found.status == "assumed" or (RESULTS / name).is_file() or name.endswith(".py"), found
    assert {r.status for r in rates.rates.values()} == {"measured", "calibrated", "assumed"}


def test_parameter_counts():
    for name, total, active in (("1.7B", 1.72e9, 1.72e9), ("4B", 4.02e9, 4.02e9), ("14B", 14.8e9, 14.0e9), ("235B-A22B", 235e9, 21.5e9)):
        model = load_model(name)
        assert model.parameters == pytest.approx(total, rel=0.02)
        assert model.trunk_active + model.table_parameters == pytest.approx(active, rel=0.03)
    assert load_model("1.7B").cache_bytes == 2 * 28 * 8 * 128 * 2


def test_a_count_without_a_known_shape_is_guessed_and_said(tool, capsys):
    model = load_model("3B")
    assert model.guessed and model.parameters == pytest.approx(3e9, rel=0.12)
    assert tool.main(["--student", "3B", "--teacher", "4B", "--gpus", "2"]) == 0
    assert "guessed" in capsys.readouterr().out


def test_a_config_file_gives_the_same_as_its_name(tmp_path, rates):
    config = {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
              "max_position_embeddings": 40960}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for what in (tmp_path, tmp_path / "config.json"):
        assert load_model(str(what)).parameters == load_model("1.7B").parameters
        assert best_plan(task(rates, 2, student=str(what))).seconds == best_plan(task(rates, 2)).seconds


def test_more_gpus_are_never_slower(rates):
    totals = [best_plan(task(rates, gpus, "4B", "14B")).total for gpus in (2, 3, 4, 5, 8, 13, 16, 64)]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0] / 4  # steps of decoding stay


@pytest.mark.parametrize("more, of", [({"response_len": 4096}, "total"), ({"budget": 1.0, "cut": "prefix"}, "train"), ({"k": 64}, "select"),
                                      ({"samples": 8}, "total"), ({"overlap": False}, "score"), ({"prompt_len": 2048}, "generate"),
                                      ({"all_rows": True}, "train"), ({"k": 64}, "generate")])  # fmt: skip
def test_more_work_takes_longer(rates, more, of):
    split = Split("colocated", Layout(dp=4), Servers(4, 1), Servers(4, 1))
    least = {"response_len": 1024, "response_mean": 700.0, "cut": "prefix"}
    few, many = (predict(task(rates, 4, **w), split) for w in (least, {**least, **more}))
    seconds = [p.total if of == "total" else p.seconds[of] for p in (few, many)]
    assert seconds[1] > seconds[0]


def test_reply_bytes_grow_with_k_as_measured(rates):
    split, sizes = Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)), {}
    for k in (16, 64):
        job = task(rates, k=k)
        sizes[k] = predict(job, split).middle.reply_bytes / job.work.response_tokens
    measured = {r["K"]: r["generate_bytes"] + r["score_bytes"] for r in json.loads((RESULTS / "manager.json").read_text())["rows"]}
    assert sizes[16] == pytest.approx(measured[16], rel=0.01) and sizes[64] == pytest.approx(measured[64], rel=0.01)


def test_a_larger_teacher_scores_longer_and_experts_less_than_their_size(rates):
    split = Split("apart", Layout(dp=4), Servers(4, 1), Servers(1, 8))
    total = {name: predict(task(rates, 16, teacher=name), split).score.total for name in ("4B", "14B", "235B-A22B")}
    assert total["4B"] < total["14B"] < total["235B-A22B"] < total["14B"] * 235 / 14


def test_what_cannot_fit_is_refused_with_the_reason(rates):
    with pytest.raises(ConfigError, match=r"4B and teacher 14B, got none.*memory: trainer .* needs 7\d\.\d GiB .*usable"):
        best_plan(task(rates, 1, "4B", "14B", gpu="H100"))
    with pytest.raises(ConfigError, match="context: the student takes 40960 positions"):
        best_plan(task(rates, 64, response_len=50_000))
    assert best_plan(task(rates, 4, "4B", "14B", gpu="H100")).split.gpus <= 4


def test_the_optimizer_state_in_host_memory_leaves_the_card(rates, tool, capsys):
    from slime.backends.megatron_utils.host_chunks import staging_bytes

    split = Split("colocated", Layout(dp=2), Servers(2, 1), Servers(2, 1))
    here, there = (predict(task(rates, 2, optimizer_cpu_offload=on), split) for on in (False, True))
    assert there.trainer.host == here.trainer.optimizer and here.trainer.host == 0
    assert there.trainer.optimizer == staging_bytes() < here.trainer.optimizer
    moved = 12 * sum(memory.local_parameters(task(rates).student, split.trainer)) / 2
    assert there.trainer.host == pytest.approx(moved) and there.train.optimizer == pytest.approx(moved / rates["host_link_bytes"])
    assert there.seconds["train"] > here.seconds["train"] and there.bytes_by_role["trainer"] < here.bytes_by_role["trainer"]
    words = "--student 1.7B --teacher 4B --gpus 1 --layout 1,1,1,1".split()
    shown = run_json(tool, capsys, [*words, "--optimizer-cpu-offload"])
    assert "--optimizer-cpu-offload" in shown["plan"]["flags"] and shown["memory_gib"]["host_a_rank"] == pytest.approx(19.2, abs=0.2)
    assert "--optimizer-cpu-offload" not in run_json(tool, capsys, words)["plan"]["flags"]
    assert tool.main([*words, "--optimizer-cpu-offload"]) == 0
    assert "19.2 GiB of page-locked host memory a trainer rank" in " ".join(capsys.readouterr().out.split())


def test_no_plan_holds_more_than_the_card(rates):
    for gpus, student, teacher in ((1, "1.7B", "4B"), (4, "4B", "14B"), (64, "32B", "235B-A22B")):
        job = task(rates, gpus, student, teacher, response_len=8192, response_mean=4096.0, prompts=64)
        got = best_plan(job)
        assert got.fits and sum(got.bytes_by_role.values()) > 0
        share = {"colocated": ("trainer", "student", "teacher"), "teacher apart": ("trainer", "student"), "apart": ("trainer",)}[got.split.mode]
        assert sum(got.bytes_by_role[r] for r in share) <= memory.usable(job.machine.gpu, rates)
        assert got.split.gpus <= gpus and got.split.trainer.gpus % got.split.trainer.tp == 0


def test_the_middle_is_named_when_it_is_full(rates):
    job = task(rates, 1024, "1.7B", "4B", prompts=16384, response_len=4096, response_mean=2000.0)
    names = {x.name for x in limits(job, best_plan(job)) if x.crowded}
    assert "batch-wide statistics and mask" in names


def test_both_servers_on_one_gpu_and_the_trainer_on_the_other(rates):
    """Topology `apart` of benchmarks/gpu/opd_step.py."""
    job = task(rates, 2)
    beside = predict(job, Split("servers apart", Layout(), Servers(1, 1), Servers(1, 1)))
    one = predict(task(rates, 1), Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)))
    assert beside.fits and beside.split.gpus == 2
    assert beside.seconds["generate"] == pytest.approx(one.seconds["generate"]) and beside.seconds["train"] <= one.seconds["train"]
    assert beside.busy < one.busy
    with pytest.raises(ConfigError, match="on the student's GPUs"):
        Split("servers apart", Layout(), Servers(1, 1), Servers(2, 1))


def test_asynchronous_training_hides_the_shorter_side(rates):
    split = Split("apart", Layout(dp=2), Servers(2, 1), Servers(2, 1))
    one, ahead = (predict(task(rates, 6, asynchronous=a), split) for a in (False, True))
    made = sum(one.seconds[p] for p in ("generate", "score", "select", "split"))
    assert one.seconds == ahead.seconds and ahead.total < one.total
    assert ahead.total == pytest.approx(max(made, one.seconds["train"]) + one.seconds["sync"])
    assert ahead.busy > one.busy
    with pytest.raises(ConfigError, match="asynchronous: expected student engines on GPUs of their own"):
        best_plan(task(rates, 2, asynchronous=True), ("colocated",))


def test_lengths_that_differ_hide_scoring(rates):
    split = Split("apart", Layout(dp=2), Servers(2, 1), Servers(2, 1))
    equal, spread = (predict(task(rates, 6, response_mean=m), split) for m in (None, 700.0))
    assert equal.seconds["score"] == pytest.approx(equal.score.total)  # all end at once
    assert spread.seconds["score"] < 0.2 * spread.score.total
