"""The exact commands of every launcher, frozen for each pair and method: a broken example cannot land unnoticed.

`UPDATE_SNAPSHOTS=1 pytest tests/launchers/test_snapshots.py` writes them anew; read the difference before committing it.
"""

import os
import re
import shlex

import pytest

from tests.launchers.conftest import PAIRS, ROOT, scripts

SNAPSHOTS = ROOT / "tests" / "launchers" / "snapshots"
METHODS = (
    "pure_opd", "teachability", "teachability_entropy", "teachability_entropy_split", "entropy", "tip", "divergence", "random",
    "compatibility", "q3", "q3_highc",
)  # fmt: skip
EXAMPLES = "slime_ta_opd/examples/on_policy_distillation"
DIAGNOSTICS = (
    "4b_to_1p7b_heldout_fixed_context_300", "8b_to_4b_fixed_context_300", "14b_to_4b_fixed_context_300", "8b_to_1p7b_fixed_context_300",
    "14b_to_1p7b_fixed_context_300", "4b_to_1p7b_gsm8k_fixed_context_300", "8b_to_1p7b_short",
)  # fmt: skip
EVALUATIONS = (
    "downstream_gsm8k_full", "downstream_gsm8k_smoke", "downstream_aime_capped", "downstream_aime_uncapped", "downstream_math_hard",
    "downstream_math500", "downstream_gpqa_diamond", "downstream_humaneval", "downstream_ifeval", "downstream_paper_six",
)  # fmt: skip
CONVERTERS = ("convert_qwen3_1_7b_to_torch_dist", "convert_qwen3_4b_to_torch_dist", "convert_to_torch_dist")
DATA = ("make_dapo_math_17k", "make_gsm8k", "make_gsm8k_from_lm_eval_log", "make_chat_prompts")
PORTS = {"TEACHER_PORT": "14141", "TEACHER_NCCL_PORT": "24141", "RAY_PORT": "26379", "RAY_DASHBOARD_PORT": "8365"}


def frozen(name, text):
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no snapshot {path.name}; UPDATE_SNAPSHOTS=1 writes it"
    assert text == path.read_text(), f"{path.name} differs; if that is meant, UPDATE_SNAPSHOTS=1 writes it anew"


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_method_on_pair(method, pair, launch, pair_variables):
    done = launch(f"scripts/train/run_{method}.sh", DRY_RUN="1", check=True, **pair_variables(pair))
    frozen(f"train/{pair}__{method}", done.out)


@pytest.mark.parametrize("pair", PAIRS)
def test_suite_on_pair(pair, launch, pair_variables):
    variables = pair_variables(pair) | {"METHOD_LIST": "pure_opd:1.0:10, teachability:0.10:20 tip:0.05", "SEEDS": "seed1 seed3", "NUM_ROLLOUT": "70",
                                        "ROLLOUT_MAX_RESPONSE_LEN": "2048", "OPD_TOPK_METRICS_K": "32"}  # fmt: skip
    done = launch("scripts/train/run_teachability_opd_method_suite.sh", DRY_RUN="1", check=True, **variables)
    frozen(f"suites/{pair}", done.out)


def test_released_commands(launch, pair_variables):
    """What the released README calls, with its defaults, and the sweep with fixed ports."""
    variables = pair_variables("4b_to_1p7b")
    frozen("suites/method_suite_defaults", launch("slime_ta_opd/run_teachability_opd_method_suite_20260515.sh", DRY_RUN="1", check=True, **variables).out)
    sweep = launch("slime_ta_opd/run_opd_budget_ratio_sweep_20260512.sh", DRY_RUN="1", check=True, **variables, **PORTS)
    frozen("suites/ratio_sweep_ports", sweep.out)


@pytest.mark.parametrize("name", ["run-qwen3-1.7B-sampled-opd-sglang", "run-qwen3-4B-sampled-opd-sglang"])
def test_example(name, launch, pair_variables):
    done = launch(f"{EXAMPLES}/{name}.sh", DRY_RUN="1", check=True, **pair_variables("4b_to_1p7b"))
    assert done.out == launch(f"examples/on_policy_distillation/{name}.sh", DRY_RUN="1", check=True, **pair_variables("4b_to_1p7b")).out
    frozen(f"examples/{name}", done.out)


def test_megatron_teacher_example(launch, place):
    variables = {"STUDENT_HF": str(place / "models/Qwen3-8B"), "OPD_TEACHER_LOAD": str(place / "models/Qwen3-14B"), "DEVICE": "gpu",
                 "PROMPT_DATA": str(place / "train.jsonl")}  # fmt: skip
    frozen("examples/run-qwen3-8B-opd-megatron", launch(f"{EXAMPLES}/run-qwen3-8B-opd-megatron.sh", DRY_RUN="1", check=True, **variables).out)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diagnostic(name, launch, pair_variables):
    variables = pair_variables("4b_to_1p7b")
    variables["SOURCE_DATA"] = variables.pop("PROMPT_DATA")
    done = launch(f"scripts/diagnostics/run_{name}.sh", DRY_RUN="1", check=True, **variables)
    assert done.out == launch(f"slime_ta_opd/run_{name}_20260517.sh", DRY_RUN="1", check=True, **variables).out
    frozen(f"diagnostics/{name}", done.out)


def test_retopk(launch, place):
    diagnostic = place / "diag"
    (diagnostic / "eval_latest/student_hf").mkdir(parents=True)
    (diagnostic / "context_bank.parquet").touch()
    done = launch("scripts/diagnostics/run_14b_to_1p7b_retopk_8_32.sh", DRY_RUN="1", check=True, DIAG_DIR=str(diagnostic),
                  TEACHER_MODEL=str(place / "models/Qwen3-14B"), STUDENT_HF=str(place / "models/Qwen3-1.7B"))  # fmt: skip
    frozen("diagnostics/14b_to_1p7b_retopk_8_32", done.out)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(name, launch, place):
    models = f"base={place}/models/Qwen3-1.7B trained={place}/models/Qwen3-4B"
    done = launch(f"scripts/eval/run_{name}.sh", DRY_RUN="1", check=True, MODELS=models, ALLOW_CODE="1")
    frozen(f"eval/{name}", done.out)


def test_heldout_evaluation(launch, place):
    done = launch("scripts/eval/run_heldout_math.sh", DRY_RUN="1", check=True, MODELS=f"base={place}/models/Qwen3-1.7B", DATA=str(place / "train.jsonl"))
    frozen("eval/heldout_math", done.out)


def test_conversion(launch, place):
    out = ""
    for name in CONVERTERS:
        out += launch(f"scripts/convert/{name}.sh", DRY_RUN="1", check=True, HF_MODEL=str(place / "models/Qwen3-1.7B"), NPROC_PER_NODE="2").out
    out += launch("scripts/convert/convert_to_hf.sh", DRY_RUN="1", check=True, CHECKPOINT_ROOT=str(place / "checkpoint"),
                  ORIGIN_HF_DIR=str(place / "models/Qwen3-1.7B")).out  # fmt: skip
    frozen("convert", out)


def test_data(launch, place):
    out = ""
    for name in DATA:
        out += launch(f"scripts/data/{name}.sh", DRY_RUN="1", check=True, SOURCE=str(place / "train.jsonl")).out
    frozen("data", out)


@pytest.mark.parametrize(
    ("where", "variables"),
    [
        ("job_server", {"RAY_ADDRESS": "http://head:8265"}),
        ("job_server_cpu", {"RAY_ADDRESS": "https://head/ray", "DEVICE": "cpu"}),
        ("cluster", {"RAY_ADDRESS": "head:6379", "ACTOR_NUM_NODES": "2"}),
        ("own_head", PORTS),
        ("cpu", {"DEVICE": "cpu"}),
        ("own_head_cpu", {"DEVICE": "cpu", "RAY_PORT": "28163"}),
        ("one_gpu", {"RAY_GPUS": "3", "TEACHER_GPU": "3", "COLOCATE": "1", "ACTOR_NUM_GPUS_PER_NODE": "1"}),
        ("running_teacher", {"TEACHER_MODEL": "", "TEACHER_URL": "http://a:1/generate http://b:2/generate"}),
        ("two_teachers", {"TEACHER_MODEL": "", "TEACHERS": "math=http://a:1/generate code=http://b:2/generate"}),
        ("running_engines", {"TEACHER_MODEL": "", "TEACHER_URL": "http://a:1/generate", "STUDENT_URL": "http://b:1 http://b:2", "RAY_GPUS": "0,1"}),
        ("checked_shape", {"MODEL_SHAPE": "qwen3-1.7B"}),
    ],
)
def test_where_it_runs(where, variables, launch, pair_variables):
    done = launch("scripts/train/run_teachability.sh", DRY_RUN="1", check=True, **(pair_variables("4b_to_1p7b") | variables))
    frozen(f"where/{where}", done.out)


def test_the_general_launchers(launch, pair_variables, place):
    """run_opd.sh without a method, the sweep by its undated name, and the harness on any task."""
    variables = pair_variables("4b_to_1p7b")
    frozen("train/run_opd", launch("scripts/train/run_opd.sh", DRY_RUN="1", check=True, **variables).out)
    sweep = launch("scripts/train/run_opd_budget_ratio_sweep.sh", DRY_RUN="1", check=True, **variables, **PORTS)
    frozen("suites/ratio_sweep_ports", sweep.out)
    done = launch("scripts/eval/run_downstream.sh", DRY_RUN="1", check=True, MODELS="server=http://127.0.0.1:30000", BASE="server",
                  TOKENIZER=str(place / "models/Qwen3-1.7B"), TASKS="gsm8k_cot", TEMPERATURE="0.6", EVAL_SEEDS="1 2")  # fmt: skip
    frozen("eval/downstream", done.out)


def test_every_launcher_has_a_frozen_command():
    """A new script needs a snapshot here (the jobs of make_job.sh are compared with the files in scripts/cluster)."""
    covered = {f"scripts/train/run_{name}.sh" for name in (*METHODS, "opd", "opd_budget_ratio_sweep", "teachability_opd_method_suite")}
    covered |= {f"scripts/diagnostics/run_{name}.sh" for name in (*DIAGNOSTICS, "14b_to_1p7b_retopk_8_32")}
    covered |= {f"slime_ta_opd/run_{name}_20260517.sh" for name in (*DIAGNOSTICS, "14b_to_1p7b_retopk_8_32")}
    covered |= {"slime_ta_opd/run_teachability_opd_method_suite_20260515.sh", "slime_ta_opd/run_opd_budget_ratio_sweep_20260512.sh"}
    covered |= {f"scripts/eval/run_{name}.sh" for name in (*EVALUATIONS, "downstream", "heldout_math")}
    covered |= {f"scripts/convert/{name}.sh" for name in (*CONVERTERS, "convert_to_hf")} | {f"scripts/data/{name}.sh" for name in DATA}
    examples = ("run-qwen3-1.7B-sampled-opd-sglang", "run-qwen3-4B-sampled-opd-sglang", "run-qwen3-8B-opd-megatron")
    covered |= {f"{folder}/{name}.sh" for name in examples for folder in (EXAMPLES, "examples/on_policy_distillation")}
    assert set(scripts()) - covered == {"scripts/cluster/make_job.sh"}


# ------------------------------------------------------------------------------------- what the frozen commands are worth


def commands(folder):
    """(snapshot, words) of every frozen command that runs Python."""
    for path in sorted(SNAPSHOTS.glob(f"{folder}/*.txt") if folder else SNAPSHOTS.glob("**/*.txt")):
        text = re.sub(r"\\\n\s*", "", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
        for line in text.splitlines():
            words = shlex.split(line)
            if words and any(w.endswith(".py") for w in words):
                yield path.name, words


def test_train_py_takes_every_frozen_command():
    from slime.utils.arguments import parse_args

    seen = 0
    for name, words in commands(""):
        for i, word in enumerate(words):
            if word.endswith("train.py"):
                try:
                    parse_args(words[i + 1 :])
                except SystemExit:
                    pytest.fail(f"{name}: train.py refuses {words[i + 1 :]}")
                seen += 1
    assert seen > 60


def test_tools_take_every_frozen_command():
    """By the flags that each tool prints with --help (argparse would refuse others)."""
    import subprocess
    import sys

    used = {}
    for name, words in commands(""):
        for i, word in enumerate(words):
            if word.startswith("ROOT/tools/") and word.endswith(".py"):
                flags = {w for w in words[i + 1 :] if w.startswith("--") and w != "--"}
                if word.endswith("run_on_ray.py"):
                    flags = {w for w in words[i + 1 : words.index("--")] if w.startswith("--")}
                used.setdefault(word.removeprefix("ROOT/"), {}).update(dict.fromkeys(flags, name))
    assert len(used) >= 8
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/slime_ta_opd", "COLUMNS": "200"}
    for tool, flags in used.items():
        shown = subprocess.run([sys.executable, ROOT / tool, "--help"], env=environment, capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", shown))
        missing = {f: n for f, n in flags.items() if f not in known}
        assert not missing, f"{tool} has no {missing}"


def test_no_placeholder_path_is_left():
    for path in SNAPSHOTS.glob("**/*.txt"):
        assert "/path/to" not in path.read_text()
