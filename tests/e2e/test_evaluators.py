"""What scores a model outside training, on real servers and checkpoints: the built-in held-out evaluation and lm-evaluation-harness.

The harness (requirements/eval.txt) is run with TA_OPD_WHOLE_SUITE=1.
"""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from slime.evaluation import heldout
from tests.e2e.launching import call, launch_place, lines, whole

pytestmark = pytest.mark.e2e


@pytest.fixture
def place(task, tmp_path):
    return launch_place(task, tmp_path)


def test_a_server_and_a_checkpoint_get_the_same_held_out_answers(task, servers):
    settings = heldout.Settings(data=str(task.heldout), chat_template=False, rm_type="exact", max_new_tokens=24)
    generate, tokenizer = heldout.transformers_generator(str(task.teacher), batch_size=8)
    here = heldout.evaluate(generate, tokenizer, settings)
    there = heldout.evaluate(heldout.server_generator([servers.teacher], tokenizer), tokenizer, settings)
    assert len(there["responses"]) == 16 and there["runs"] == here["runs"]
    assert [r["response"] for r in there["responses"]] == [r["response"] for r in here["responses"]]
    sampled = heldout.Settings(**{**vars(settings), "temperature": 1.0, "seeds": (1, 2), "limit": 4})
    first, again = (heldout.evaluate(heldout.server_generator([servers.teacher], tokenizer), tokenizer, sampled)["responses"] for _ in range(2))
    assert first == again  # every answer has its own seed, however requests meet in batches
    assert [r["response"] for r in first[:4]] != [r["response"] for r in first[4:]]


@pytest.fixture
def text_server(task):
    """The teacher on a server that takes and gives text, as a user would start one (servers of a run speak token ids only)."""
    from slime.backends.sglang_utils.server import SGLangServer
    from slime.backends.sglang_utils.server_flags import server_arguments

    args = SimpleNamespace(device="cpu", rollout_max_context_len=256, rollout_seed=42)
    flags = [flag for flag in server_arguments(args, "teacher", str(task.teacher)) if flag != "--skip-tokenizer-init"]
    server = SGLangServer(task.teacher, "teacher", log_file=task.root / "text_server.log", extra_args=flags, device="cpu").start()
    try:
        server.wait_ready(300)
        yield server.url
    finally:
        server.stop()


@whole
def test_a_converted_checkpoint_is_evaluated_by_the_harness(place, servers, task):
    """Two rollouts of training, torch_dist to Hugging Face, then the harness and the held-out evaluation on the student before and after."""
    pytest.importorskip("lm_eval")
    run = place.out / "run"
    call("scripts/train/run_teachability.sh", place.variables | {
        "TEACHER_URL": f"{servers.teacher}/generate", "STUDENT_URL": servers.student, "NUM_ROLLOUT": "2", "SAVE_DIR": str(run),
    }, 300)  # fmt: skip
    call("scripts/convert/convert_to_hf.sh", place.variables | {
        "CHECKPOINT_ROOT": str(run), "ORIGIN_HF_DIR": str(task.student), "OUTPUT_DIR": str(run / "converted"),
    }, 300)  # fmt: skip
    models = f"base={task.student} trained={run / 'converted'}"
    call("scripts/eval/run_downstream.sh", place.variables | {
        "MODELS": models, "PROMPT_TASKS": f"arithmetic={task.heldout}", "CHAT_TEMPLATE": "0", "MAX_GEN_TOKS": "24", "DTYPE": "float32",
        "RUN_DIR": str(place.out / "harness"),
    }, 600)  # fmt: skip
    runs = pd.read_csv(place.out / "harness/runs.csv")
    assert runs["model"].tolist() == ["base", "trained"] and set(runs["metric"]) == {"exact_match,last-number"}
    assert runs["exact_match"].between(0, 1).all()
    (log,) = (place.out / "harness/trained").rglob("samples_arithmetic_*.jsonl")
    assert len(lines(log)) == 16
    summary = pd.read_csv(place.out / "harness/summary.csv")
    assert summary.set_index("model").loc["trained", "delta_vs_base"] == pytest.approx(runs["exact_match"][1] - runs["exact_match"][0])
    call("scripts/eval/run_heldout_math.sh", place.variables | {
        "MODELS": models, "DATA": str(task.heldout), "CHAT_TEMPLATE": "0", "MAX_GEN_TOKS": "24", "RM_TYPE": "exact",
        "RUN_DIR": str(place.out / "heldout"),
    }, 300)  # fmt: skip
    assert pd.read_csv(place.out / "heldout/summary.csv")["model"].tolist() == ["base", "trained"]
    # the harness's log is a source of prompts, as the GSM8K diagnostic uses one
    output = call("scripts/data/make_gsm8k_from_lm_eval_log.sh", place.variables | {
        "SOURCE": str(log), "OUTPUT": str(place.root / "prompts.jsonl"), "HELDOUT": "4",
    }, 100)  # fmt: skip
    prompts = {json.loads(line)["prompt"] for line in task.heldout.read_text().splitlines()}
    assert {r["prompt"] for r in lines(place.root / "prompts.jsonl")} < prompts, output


@whole
def test_the_harness_asks_a_running_server(place, text_server, task):
    """The checkpoint itself, its server's native address and its OpenAI-compatible one: the same answers; seeds are reproducible."""
    pytest.importorskip("lm_eval")
    models = {"checkpoint": str(task.teacher), "native": text_server, "openai": f"{text_server}/v1"}
    variables = place.variables | {
        "MODELS": " ".join(f"{k}={v}" for k, v in models.items()), "BASE": "checkpoint", "TOKENIZER": str(task.teacher), "CHAT_TEMPLATE": "0",
        "PROMPT_TASKS": f"arithmetic={task.heldout}", "MAX_GEN_TOKS": "24", "DTYPE": "float32", "SERVER_CONCURRENCY": "4",
    }  # fmt: skip

    def answers(directory, **more):
        call("scripts/eval/run_downstream.sh", variables | more | {"RUN_DIR": str(directory)}, 600)
        found = {}
        for model in more.get("MODELS", variables["MODELS"]).split():
            label = model.partition("=")[0]
            for log in sorted((directory / label).rglob("samples_arithmetic_*.jsonl")):
                found.setdefault(label, []).append([r["resps"][0][0] for r in sorted(lines(log), key=lambda r: r["doc_id"])])
        return found

    greedy = answers(place.out / "greedy")
    assert len(greedy["checkpoint"][0]) == 16 and any(greedy["checkpoint"][0])
    assert greedy["native"] == greedy["openai"] == greedy["checkpoint"]
    servers_only = {"MODELS": f"native={text_server} openai={text_server}/v1", "BASE": "native", "TEMPERATURE": "1.0", "EVAL_SEEDS": "1 2"}
    first, again = (answers(place.out / f"sampled{turn}", **servers_only) for turn in range(2))
    assert first == again and first["native"][0] != first["native"][1]
    summary = pd.read_csv(place.out / "sampled0/summary.csv")
    assert summary["seeds"].tolist() == [2, 2] and set(summary["error_over"]) == {"seeds"}
    done = call("scripts/eval/run_heldout_math.sh", place.variables | {
        "MODELS": f"checkpoint={task.teacher} server={text_server}", "BASE": "checkpoint", "TOKENIZER": str(task.teacher), "DATA": str(task.heldout),
        "CHAT_TEMPLATE": "0", "MAX_GEN_TOKS": "24", "RM_TYPE": "exact", "RUN_DIR": str(place.out / "heldout"),
    }, 300)  # fmt: skip
    table = pd.read_csv(place.out / "heldout/summary.csv").set_index("model")
    assert table.loc["server", "mean"] == table.loc["checkpoint", "mean"], done


