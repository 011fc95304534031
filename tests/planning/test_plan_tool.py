"""The planner's command line: bad input is named, a measured step stands beside its prediction, the plan is flags of the trainer."""

from __future__ import annotations

import json

import pytest
from plan_cases import AS_RECORDED, RECORDED, recorded_seconds, run_json

from slime.planning.models import load_model
from slime.planning.rates import Rate, Rates, load_rates
from ta_opd.errors import ConfigError, DataError

BAD = [
    (["--student", "huge"], "model 'huge': expected an HF directory"),
    (["--student", "/nowhere/config.json"], "expected an HF directory"),
    (["--student", "12B-A2B"], "mixture of experts is known by its config"),
    (["--gpus", "0"], "gpus: expected at least 1"),
    (["--gpu", "Z9"], "GPU 'Z9': expected one of"),
    (["--budget", "0"], "budget: expected a share"),
    (["--k", "-1"], "k: expected 0 or more"),
    (["--k", "200000"], "k: expected at most the student's vocabulary"),
    (["--response-len", "0"], "response_len: expected at least 1"),
    (["--response-mean", "5000"], "response_mean: expected 1 to response_len"),
    (["--optimizer-steps", "3"], "optimizer_steps: expected a divisor"),
    (["--matmul-tflops", "-5"], "GPU matmul: expected a positive number"),
    (["--matmul-tflops", "inf"], "GPU matmul: expected a positive number"),
    (["--bandwidth-tbps", "nan"], "GPU bandwidth: expected a positive number"),
    (["--student", "14B"], "memory: the trainer alone needs"),
    (["--teacher", "235B-A22B"], "memory: the teacher's weights take"),
    (["--response-len", "1000000000"], "memory: the trainer alone needs"),
    (["--gpus", "2", "--asynchronous"], "mode apart takes more GPUs than these"),
    (["--layout", "1,1"], "--layout: expected 4 positive numbers"),
    (["--layout", "1,1,1,8"], "at most --gpus 1"),
    (["--layout", "1,1,1,1", "--student-servers", "2x1"], "at most its 1 GPUs"),
    (["--rates", "/nowhere.json"], "rates /nowhere.json: expected a JSON file"),
]


@pytest.mark.parametrize("words, message", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_says_what_was_expected(tool, capsys, words, message):
    assert tool.main(["--student", "1.7B", "--teacher", "4B", "--gpus", "1", *words]) == 2
    assert message in capsys.readouterr().err


SHAPE = {"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "rms_norm_eps": 1e-6,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6}  # fmt: skip


@pytest.mark.parametrize(
    "config, message",
    [
        ({**SHAPE, "num_hidden_layers": 0}, "got num_layers 0"), ({**SHAPE, "hidden_size": "2048"}, "got hidden_size '2048'"),
        ({k: v for k, v in SHAPE.items() if k != "vocab_size"}, "KeyError: 'vocab_size'"), ([1], "got list"),
        ({**SHAPE, "num_attention_heads": 0, "head_dim": None}, "got one without (ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_config_without_sizes_is_said(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="expected the config of a decoder with whole numbers above 0 as sizes") as raised:
        load_model(str(tmp_path))
    assert message in str(raised.value)


def test_a_quantized_teacher_is_planned_and_a_quantized_student_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": {"quant_method": "fp8"}}))
    assert load_model(str(tmp_path), served=True).parameters == load_model("1.7B").parameters
    with pytest.raises(ConfigError, match="quantization_config .* is not supported by the Megatron trainer"):
        load_model(str(tmp_path))


def test_a_damaged_file_of_rates(tmp_path):
    path = tmp_path / "rates.json"
    for content, message in (("{", "expected keys"), ('{"gpus": {}, "rates": {"x": {"value": 1}}}', "entry 'x'")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_rates(path)
    with pytest.raises(DataError, match="expected an entry 'speed'"):
        Rates({"x": Rate("x", 1, "", "assumed", "")}, {})["speed"]


def test_tables_name_phases_and_the_state_of_every_rate(tool, capsys):
    assert tool.main([*AS_RECORDED, "--sources"]) == 0
    text = capsys.readouterr().out
    for word in ("generate", "sync", "GiB a GPU", "measured", "calibrated", "assumed", "loss_rows_megatron_h200.json", "--colocate"):
        assert word in text


def test_a_measured_step_beside_its_prediction(tool, capsys, tmp_path):
    seconds = recorded_seconds()
    assert tool.main([*AS_RECORDED, "--compare", str(RECORDED)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert float(rows["train"][0]) == pytest.approx(seconds["train"], abs=1e-3) and set(rows) == set(seconds)
    assert [name for name, row in rows.items() if abs(int(row[2].strip("%+"))) > 20] == ["select"]  # recorded with the metrics in it
    assert tool.main([*AS_RECORDED, "--k", "64", "--response-len", "512", "--compare", str(RECORDED)]) == 2
    assert "expected flags that describe its step (64x4x1024, K 16, budget 0.1, topology one), got 64x4x512, K 64, budget 0.1, topology one" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("[]")
    assert tool.main([*AS_RECORDED, "--compare", str(tmp_path / "result.json")]) == 2
    assert "expected a result.json of opd_step.py" in capsys.readouterr().err


TWO = ["--student", "1.7B", "--teacher", "4B", "--gpus", "2", "--max-tokens-per-gpu", "16384"]
PLACES = {"apart": ["--mode", "servers apart", "--layout", "1,1,1,1"],
          "tp2": ["--mode", "colocated", "--layout", "2,1,1,1", "--student-servers", "2x1", "--teacher-servers", "2x1"]}  # fmt: skip


@pytest.mark.parametrize("topology", PLACES)
def test_steps_on_two_gpus_are_compared_with_the_same_topology_only(tool, capsys, tmp_path, topology):
    other = next(t for t in PLACES if t != topology)
    result = {"case": "64x4x1024", "k": 16, "budget": "0.10", "topology": topology, "medians": {"rollout/response_length": 1020.7},
              "seconds": {"sample": 10.0, "train": 5.0, "total": 20.0}}  # fmt: skip
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert tool.main([*TWO, *PLACES[topology], "--compare", str(path)]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {"generate", "train", "total"}
    assert tool.main([*TWO, *PLACES[other], "--compare", str(path)]) == 2
    assert f"topology {topology}), got 64x4x1024, K 16, budget 0.1, topology {other}" in capsys.readouterr().err
    path.write_text(json.dumps({**result, "medians": {"rollout/response_length": 700.0}}))
    assert tool.main([*TWO, *PLACES[topology], "--compare", str(path)]) == 2
    assert "expected its mean response, --response-mean 700, got 1024" in capsys.readouterr().err
    assert tool.main([*TWO, *PLACES[topology], "--response-mean", "700", "--compare", str(path)]) == 0


def test_the_flags_of_a_plan_are_flags_of_the_trainer(tool, capsys):
    from slime.utils.arguments import build_parser

    plan = run_json(tool, capsys, ["--student", "4B", "--teacher", "14B", "--gpus", "8"])["plan"]
    args = build_parser().parse_args(plan["flags"])
    assert args.actor_num_nodes * args.actor_num_gpus_per_node == plan["trainer"]["dp"] * plan["trainer"]["tp"] * plan["trainer"]["pp"] * plan["trainer"]["cp"]


def test_the_terminal_ends_with_the_flags_and_the_sources_of_rates_are_asked_for(tool, capsys, monkeypatch):
    words = ["--student", "1.7B", "--teacher", "4B", "--gpus", "8"]
    assert tool.main(words) == 0
    plain = capsys.readouterr().out
    assert plain.splitlines()[-1].startswith("train.py --actor-num-nodes 1") and "assumed; --sources lists them" in plain and "bank_us" not in plain
    assert tool.main([*words, "--sources"]) == 0
    assert "bank_us" in capsys.readouterr().out
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)  # an environment for analysing has no rich
    assert tool.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("--actor-num-nodes 1")
