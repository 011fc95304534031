"""A wrong variable stops a launcher before anything starts, with its name, its value and what is expected."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launchers.conftest import ROOT

RUN = "scripts/train/run_opd.sh"
SUITE = "scripts/train/run_teachability_opd_method_suite.sh"


@pytest.mark.parametrize(
    ("script", "name", "value", "expected"),
    [
        (RUN, "TEACHER_MODEL", "/nowhere/teacher", "a Hugging Face model directory (with config.json)"),
        (RUN, "STUDENT_HF", "/nowhere/student", "a Hugging Face model directory (with config.json)"),
        (RUN, "STUDENT_TORCH_DIST", "/nowhere", "an existing directory"),
        (RUN, "PROMPT_DATA", "/nowhere/train.jsonl", "a readable file"),
        (RUN, "MEGATRON_LM_DIR", "/path/to/Megatron-LM", "an existing directory"),
        (RUN, "SLIME_DIR", "/", "the directory of train.py"),
        (RUN, "OUTPUT_ROOT", "/etc/passwd/outputs", "a directory that can be made (/etc/passwd is not writable)"),
        (RUN, "RAY_GPUS", "0", "at least 3 GPU ids for ACTOR_NUM_GPUS_PER_NODE=2 + ROLLOUT_NUM_GPUS=1"),
        (RUN, "RAY_GPUS", "0,1,1", "every GPU id once"),
        (RUN, "TEACHER_GPU", "seven", "GPU ids separated by commas"),
        (RUN, "OPD_BUDGET_RATIO", "10", "a fraction in (0, 1], such as 0.10 for ten percent"),
        (RUN, "OPD_BUDGET_RATIO", "0", "a fraction in (0, 1]"),
        (RUN, "OPD_BUDGET_RATIO", "0,1", "a fraction in (0, 1]"),
        (RUN, "OPD_BUDGET_GAMMA", "1.5", "a number in [0,1]"),
        (RUN, "NUM_ROLLOUT", "0", "an integer >= 1"),
        (RUN, "NUM_ROLLOUT", "fifty", "an integer >= 1"),
        (RUN, "SEED", "-1", "an integer >= 0"),
        (RUN, "LR", "1e", "a number in (0,)"),
        (RUN, "LR", "0", "a number in (0,)"),
        (RUN, "COLOCATE", "yes", "0 or 1"),
        (RUN, "OPD_TOKEN_BANK_FORMAT", "xml", "one of csv,jsonl,parquet"),
        (RUN, "GLOBAL_BATCH_SIZE", "7", "a divisor of ROLLOUT_BATCH_SIZE x N_SAMPLES_PER_PROMPT = 8"),
        (RUN, "ACTOR_NUM_GPUS_PER_NODE", "3", "ranks (times ACTOR_NUM_NODES) in a multiple of TP x PP x CP = 2"),
        (RUN, "MODEL_SHAPE", "qwen9", "a file in scripts/models"),
        (RUN, "TEACHER_PORT", "70000", "auto or a port number"),
        (RUN, "RUN_NAME", "a b", "letters, digits, dot, dash and underscore only"),
        (RUN, "RAY_ADDRESS", "ray://head:10001", "host:port of a cluster's head, auto, or http://host:port of its job server (Ray Client"),
        (RUN, "RAY_ADDRESS", "head", "host:port of a cluster's head, auto, or http://host:port of its job server"),
        (RUN, "STUDENT_TORCH_DIST", "/usr", "a torch_dist checkpoint (with latest_checkpointed_iteration.txt)"),
        (RUN, "OPD_METRIC_Q_LOW", "0.95", "less than OPD_METRIC_Q_HIGH=0.95"),
        (RUN, "OPD_LOSS_TYPE", "reverse_kl", "one of sampled_reverse_kl,topk_reverse_kl"),
        (RUN, "OPD_LOSS_REDUCTION", "mean", "one of kept_token_mean,sample_mean,valid_token_mean"),
        (RUN, "ROLLOUT_MAX_RESPONSE_LEN", "40960", "room for a prompt within the student's max_position_embeddings=40960"),
        (RUN, "ROLLOUT_MAX_CONTEXT_LEN", "1024", None),
        (RUN, "ROLLOUT_MAX_CONTEXT_LEN", "50000", "at most the student's 40960"),
        (RUN, "EVAL_PROMPT_DATA", "held", "pairs NAME FILE"),
        (RUN, "EVAL_PROMPT_DATA", "held /nowhere.jsonl", "pairs NAME FILE of readable files (/nowhere.jsonl is none)"),
        (SUITE, "OPD_METRIC_Q_HIGH", "0.01", None),
        (RUN, "TEACHER_URL", "http://127.0.0.1:1/generate", None),
        (SUITE, "SEED_LABEL", "seed/1", "letters, digits, dot, dash and underscore only"),
        (SUITE, "ON_ERROR", "ignore", "one of continue,stop"),
        (SUITE, "COMMON_CONTEXT", "/nowhere.parquet", "a readable file"),
    ],
)
def test_wrong_values(script, name, value, expected, launch, pair_variables, place):
    variables = pair_variables("4b_to_1p7b") | {"TENSOR_MODEL_PARALLEL_SIZE": "2" if name == "ACTOR_NUM_GPUS_PER_NODE" else "1"}
    variables |= {name: value}
    done = launch(script, DRY_RUN="1", **variables)
    assert done.code == 2
    if expected is None:  # it does not go with another one, which is named
        others = {
            "TEACHER_URL": "exactly one of TEACHER_MODEL, TEACHER_URL and TEACHERS, got 2",
            "ROLLOUT_MAX_CONTEXT_LEN": "error: ROLLOUT_MAX_RESPONSE_LEN=1024: expected room for a prompt within ROLLOUT_MAX_CONTEXT_LEN=1024",
            "OPD_METRIC_Q_HIGH": "error: OPD_METRIC_Q_LOW=0.05: expected less than OPD_METRIC_Q_HIGH=0.01",
        }
        assert others[name] in done.err
    else:
        assert f"error: {name}={value}: expected {expected}" in done.err
    assert not done.out
    assert not (place / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1"])
@pytest.mark.parametrize("script", [RUN, SUITE])
def test_a_cluster_that_is_not_there(script, address, launch, pair_variables, place):
    done = launch(script, RAY_ADDRESS=address, METHOD_LIST="pure_opd:1.0:10", **pair_variables("4b_to_1p7b"))
    assert done.code == 2 and not (place / "out").exists()
    assert f"error: RAY_ADDRESS={address}: expected host:port of a cluster's head" in done.err and "nothing answers there" in done.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teachabilty:0.10:20", "entry 'teachabilty:0.10:20': unknown method 'teachabilty'; did you mean 'teachability'?"),
        ("teachability:10:20", "entry 'teachability:10:20': expected a ratio in (0, 1], got 10; ten percent is 0.10"),
        ("teachability", "entry 'teachability': expected method:ratio:index"),
        ("teachability:0.1:x", "expected an index of 0 to 9999, got 'x'"),
        ("teachability:0.1:10 dlearn_high:0.10:20", "are the same run (mask dlearn_high)"),
    ],
)
def test_wrong_method_list(text, expected, launch, pair_variables):
    done = launch(SUITE, METHOD_LIST=text, DRY_RUN="1", **pair_variables("4b_to_1p7b"))
    assert done.code == 2
    assert expected in done.err and "METHOD_LIST" in done.err


def test_every_wrong_variable_is_named_at_once(launch, pair_variables):
    done = launch(RUN, DRY_RUN="1", **(pair_variables("4b_to_1p7b") | {"LR": "x", "SEED": "y", "STUDENT_HF": "/nowhere"}))
    assert [line.split("=")[0] for line in done.err.splitlines() if line.startswith("error")] == ["error: STUDENT_HF", "error: SEED", "error: LR"]


def test_a_port_that_is_taken(launch, pair_variables):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        done = launch(RUN, DRY_RUN="1", TEACHER_PORT=port, **pair_variables("4b_to_1p7b"))
    assert done.code == 2
    assert f"error: TEACHER_PORT={port}: expected a free port (something listens there already" in done.err


def test_a_misspelt_opd_variable_is_noticed(launch, pair_variables):
    done = launch(RUN, DRY_RUN="1", OPD_BUDGET_RATIOS="0.1", **pair_variables("4b_to_1p7b"))
    assert done.code == 0
    assert "warning: OPD_BUDGET_RATIOS is set, but this launcher has no such variable (--help lists them); did you mean OPD_BUDGET_RATIO?" in done.err


@pytest.mark.parametrize(("word", "meant"), [
    ("NUM_ROLOUTS=3", "NUM_ROLLOUT"), ("opd_budget_ratio=0.1", "OPD_BUDGET_RATIO"), ("OPD_TOPK_K=8", None), ("FOO=1", None),
])  # fmt: skip
def test_a_name_that_no_launcher_has_is_answered_with_the_nearest(word, meant):
    done = subprocess.run(["bash", str(ROOT / "scripts/train/run_teachability.sh"), word], capture_output=True, text=True)
    known = f"error: {word}: this launcher has no variable {word.split('=')[0]} (--help lists them)"
    assert done.returncode == 2 and done.stderr.strip() == known + (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (RUN, {"NUM_ROLLOUTS": "50"}, "NUM_ROLLOUTS is set, but this launcher has no such variable"),
        (RUN, {"RAY_DASHBOARD_PORT": "28166"}, "RAY_DASHBOARD_PORT=28166 has no effect: without RAY_PORT no Ray head is started"),
        (RUN, {"RAY_ADDRESS": "head:6379", "RAY_GPUS": "4,5"}, "RAY_GPUS=4,5 has no effect: RAY_ADDRESS=head:6379 is a cluster"),
        (RUN, {"CONDA_ENV": "mine"}, "CONDA_ENV=mine has no effect: conda is activated only with CONDA_SH"),
        (SUITE, {"OPD_TOKEN_BANK_DIR": "/banks", "METHOD_LIST": "tip:0.1:10"}, "OPD_TOKEN_BANK_DIR=/banks has no effect: each run of a suite"),
        (SUITE, {"RUN_LIST": "tip:0.1:10", "METHOD_LIST": "tip:0.1:10"}, "RUN_LIST has no effect: this suite reads METHOD_LIST"),
    ],
)
def test_a_variable_without_effect_is_noticed(script, variables, expected, launch, pair_variables):
    done = launch(script, DRY_RUN="1", **pair_variables("4b_to_1p7b"), **variables)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if expected in line] and done.err.count("warning:") == 1


@pytest.mark.parametrize(
    ("script", "variables", "shown"),
    [
        ("scripts/eval/run_downstream_gsm8k_full.sh", {"GPU": "5", "OFFLINE": "1"}, ["export CUDA_VISIBLE_DEVICES=5", "export HF_HUB_OFFLINE=1"]),
        ("scripts/eval/run_heldout_math.sh", {"GPU": "5"}, ["env CUDA_VISIBLE_DEVICES=5 PYTHON"]),
        (RUN, {"FALLBACK_SITE_PACKAGES": "/usr"}, ["PYTHONPATH=ROOT:ROOT/slime_ta_opd:/usr"]),
    ],
)
def test_a_dry_run_shows_the_environment_of_its_commands(script, variables, shown, launch, pair_variables, place):
    models = {"MODELS": f"base={place}/models/Qwen3-1.7B", "DATA": str(place / "train.jsonl")}
    done = launch(script, DRY_RUN="1", check=True, **pair_variables("4b_to_1p7b"), **models, **variables)
    assert all(text in done.out for text in shown), done.out


def test_whoever_sets_nothing_of_that_is_not_warned(launch, pair_variables):
    assert launch(RUN, DRY_RUN="1", **pair_variables("4b_to_1p7b")).err == ""
    assert launch(RUN, DRY_RUN="1", RAY_PORT="28163", RAY_DASHBOARD_PORT="28164", **pair_variables("4b_to_1p7b")).err == ""


def test_on_a_cluster_the_number_of_teacher_gpus_counts(launch, pair_variables):
    def teachers(**variables):
        return launch(RUN, DRY_RUN="1", RAY_ADDRESS="head:6379", **pair_variables("4b_to_1p7b"), **variables)

    assert "--teacher-num-gpus 4" in teachers(TEACHER_GPU="0,1,2,3", TEACHER_NUM_GPUS_PER_ENGINE="2").out
    assert "--teacher-num-gpus 2" in teachers(TEACHER_NUM_GPUS_PER_ENGINE="2").out
    assert "TEACHER_GPU=0,1,2: expected a multiple of TEACHER_NUM_GPUS_PER_ENGINE=2" in teachers(TEACHER_GPU="0,1,2", TEACHER_NUM_GPUS_PER_ENGINE="2").err


def test_an_unknown_mask_names_the_nearest(launch, pair_variables):
    done = launch(RUN, DRY_RUN="1", OPD_BUDGET_MASK="entropi", **pair_variables("4b_to_1p7b"))
    assert done.code == 2
    assert "OPD_BUDGET_MASK: unknown method 'entropi'; did you mean 'entropy'?" in done.err


def test_a_wrapper_does_not_run_another_method(launch, pair_variables):
    done = launch("scripts/train/run_teachability.sh", DRY_RUN="1", OPD_BUDGET_MASK="tip", **pair_variables("4b_to_1p7b"))
    assert done.code == 2
    assert "OPD_BUDGET_MASK=tip: expected dlearn_high, which run_teachability.sh is for" in done.err


def test_values_with_blanks_and_quotes_reach_the_command_whole(launch, pair_variables, place):
    variables = pair_variables("4b_to_1p7b") | {"CHAT_TEMPLATE_KWARGS": '{"enable_thinking": false}', "WANDB_PROJECT": "it's $HOME"}
    done = launch(RUN, DRY_RUN="1", check=True, **variables)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.out}"], capture_output=True, text=True, check=True).stdout.split("\0")
    assert words[words.index("--apply-chat-template-kwargs") + 1] == '{"enable_thinking": false}'
    assert words[words.index("--wandb-project") + 1] == "it's $HOME"


def test_the_asynchronous_loop_is_chosen_by_a_variable(launch, pair_variables):
    variables = pair_variables("4b_to_1p7b") | {"COLOCATE": "0", "RAY_GPUS": "0,1,2"}
    words = launch(RUN, DRY_RUN="1", check=True, **variables).out
    other = launch(RUN, DRY_RUN="1", ASYNC="1", check=True, **variables).out
    assert "train_async.py" not in words and other == words.replace("/train.py", "/train_async.py")
    done = launch(RUN, DRY_RUN="1", ASYNC="1", **(variables | {"COLOCATE": "1"}))
    assert done.code == 2 and "error: ASYNC=1: expected 0 with COLOCATE=1" in done.err


def test_settings_can_follow_the_command(launch, pair_variables):
    done = launch(RUN, "NUM_ROLLOUT=7", "DRY_RUN=1", "--", "--trace", check=True, **pair_variables("4b_to_1p7b"))
    assert "--num-rollout 7" in done.out and done.out.rstrip().endswith("--trace")
    assert launch(RUN, "NUM_ROLLOUTS=7").code == 2
    assert launch(RUN, "--num-rollout").code == 2


def test_defaults_are_expanded_once_and_user_values_never(tmp_path):
    script = f"""
        source {ROOT}/scripts/lib/run.sh
        about "test"
        var A str 'x$HOME' "a"
        var B str '${{A}}-$A' "b"
        var C str '$B/c' "c"
        launcher_init
        printf '%s\\n' "$A" "$B" "$C"
    """
    done = subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin", "HOME": "h", "A": "$HOME"}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["$HOME", "$HOME-$HOME", "$HOME-$HOME/c"], done.stderr


def test_numbers_with_leading_zeros_and_open_intervals():
    script = f"""
        source {ROOT}/scripts/lib/run.sh
        about "test"
        var N int:8:12 "" "n"
        var X "float:(0,]" "" "x"
        launcher_init && echo fine
    """

    def run(**env):
        return subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True).stdout.strip()

    assert run(N="09", X=".5") == "fine"
    assert run(N="12", X="1e9") == "fine"
    assert run(N="13", X="1") == ""
    assert run(N="9", X="0") == ""
    assert run(N="9", X="1e-400") == ""


DIAGNOSTIC = "scripts/diagnostics/run_8b_to_1p7b_short.sh"


@pytest.mark.parametrize("name", ["PROMPT_DATA", "HELDOUT_PROMPT_DATA"])
def test_a_diagnostic_does_not_write_over_the_users_prompts(name, launch, pair_variables, place):
    """docs/experiment_workflows.md exports PROMPT_DATA for a suite and SOURCE_DATA for a driver: the split must not replace the first."""
    variables = pair_variables("4b_to_1p7b")
    source = variables.pop("PROMPT_DATA")
    done = launch(DIAGNOSTIC, DRY_RUN="1", **variables, SOURCE_DATA=source, **{name: source})
    assert done.code == 2 and not done.out
    assert f"error: {name}=PLACE/train.jsonl: expected the name of a new file beside SOURCE_DATA=PLACE/train.jsonl" in done.err
    done = launch(DIAGNOSTIC, DRY_RUN="1", check=True, **variables, SOURCE_DATA=source, **{name: str(place / "new.jsonl")})
    assert "output PLACE/new.jsonl" in done.out
    both = {"PROMPT_DATA": source, "HELDOUT_PROMPT_DATA": str(place / "checkpoint/latest_checkpointed_iteration.txt")}
    assert "make_prompts.py" not in launch(DIAGNOSTIC, DRY_RUN="1", check=True, **variables, SOURCE_DATA=source, **both).out


def test_a_project_below_a_directory_with_blanks(place, pair_variables, tmp_path):
    """The training command of a diagnostic goes through a shell, so the project's path in it must be quoted."""
    project = tmp_path / "my project's & place"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    (project / "slime_ta_opd").mkdir()
    shutil.copy(ROOT / "slime_ta_opd" / "train.py", project / "slime_ta_opd")
    variables = pair_variables("4b_to_1p7b") | {"DRY_RUN": "1", "PY": sys.executable, "OUTPUT_ROOT": str(tmp_path / "o & ut")}
    variables["SOURCE_DATA"] = variables.pop("PROMPT_DATA")
    done = subprocess.run(["bash", str(project / DIAGNOSTIC)], env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert shlex.split(words[words.index("--train-command") + 1]) == ["bash", str(project / "scripts/train/run_opd.sh")]
    assert words[words.index("--prompt-data", words.index("training")) + 1].startswith(str(tmp_path / "o & ut"))


def test_evaluation_takes_the_names_of_training_and_no_negative_limit(launch, place):
    models = {"MODELS": f"base={place}/models/Qwen3-1.7B", "DATA": str(place / "train.jsonl")}
    for script in ("scripts/eval/run_downstream_gsm8k_full.sh", "scripts/eval/run_heldout_math.sh"):
        assert "--device cuda" in launch(script, DRY_RUN="1", DEVICE="gpu", check=True, **models).out.replace(" \\\n ", "")
    for limit, fine in (("-1", False), ("x", False), ("1.5", False), ("200", True), ("0.1", True)):
        done = launch("scripts/eval/run_downstream_gsm8k_full.sh", DRY_RUN="1", LIMIT=limit, **models)
        assert done.code == (0 if fine else 2) and (fine or f"error: LIMIT={limit}: expected a number of questions" in done.err)


def test_a_source_with_blanks_and_an_address_with_a_question_mark(launch, pair_variables, place, tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "a.jsonl").write_text('{"prompt": "q"}\n')
    done = launch("scripts/data/make_chat_prompts.sh", DRY_RUN="1", check=True, SOURCE=str(tmp_path / "my data"))
    words = shlex.split(done.out)
    assert words[words.index("--source") + 1] == str(tmp_path / "my data")
    variables = pair_variables("4b_to_1p7b") | {"TEACHER_MODEL": "", "TEACHERS": "t=http://h:1/generate?x"}
    (tmp_path / "t=http:/h:1").mkdir(parents=True)
    (tmp_path / "t=http:/h:1/generate1x").touch()
    done = subprocess.run(["bash", "-c", f"cd {shlex.quote(str(tmp_path))} && exec bash {ROOT / RUN}"], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "OUTPUT_ROOT": str(tmp_path / "out"), "DRY_RUN": "1", **variables})  # fmt: skip
    assert "--teacher t=http://h:1/generate\\?x" in done.stdout, done.stderr


def test_values_that_begin_with_a_dash_are_no_options(launch, pair_variables, place, tmp_path):
    (tmp_path / "-train.jsonl").write_text('{"prompt": "q"}\n')
    variables = pair_variables("4b_to_1p7b") | {"PROMPT_DATA": "-train.jsonl", "OUTPUT_ROOT": "-out", "OPD_TEACHER_NAME": "--mine", "OPD_BUDGET_MASK": "tip"}
    done = subprocess.run(["bash", "-c", f"cd {shlex.quote(str(tmp_path))} && exec bash {ROOT / RUN}"], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "RUN_NAME": "r", **variables})  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[words.index("--prompt-data") + 1] == "./-train.jsonl" and words[words.index("--save") + 1] == "./-out/r"
    assert "--opd-teacher-name=--mine" in words
    models = {"MODELS": f"base={place}/models/Qwen3-1.7B"}
    done = launch("scripts/eval/run_downstream_gsm8k_full.sh", DRY_RUN="1", SYSTEM_INSTRUCTION="-brief", check=True, **models)
    assert "--system_instruction=-brief" in shlex.split(done.out)
