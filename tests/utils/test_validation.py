"""Bad input: one clear error each, before anything heavy starts, and nothing is written."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import arithmetic
from slime.utils.arguments import parse_args
from slime.utils.plan import count_parameters
from slime.utils.validation import validate
from ta_opd.errors import TaOpdError
from tests.helpers.models import write_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    paths = arithmetic.write_task(root, num_train=8, num_heldout=4, seed=1)
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_qwen3(root / name, paths["tokenizer"], seed)
    return root


def flags(task, *more):
    return ["--hf-checkpoint", str(task / "student"), "--teacher-model", str(task / "teacher"), "--prompt-data", str(task / "train.jsonl"),
            "--label-key", "label", "--rollout-batch-size", "4", "--rollout-max-response-len", "32", "--opd-topk-metrics-k", "8",
            "--output-dir", str(task / "out"), *more]  # fmt: skip


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_good_command_line_passes_and_derives_what_follows(task):
    args = validate(parse_args(flags(task, "--n-samples-per-prompt", "2")))
    assert (args.global_batch_size, args.data_parallel_size, args.num_prompts) == (8, 1, 8)
    assert args.opd_loss_reduction == "kept_token_mean" and args.teachers == {"default": str(task / "teacher")}
    assert not (task / "out").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--hf-checkpoint", "/nowhere"], "--hf-checkpoint: expected an HF model directory, got '/nowhere', which does not exist"),
    (["--teacher-model", "/nowhere"], "--teacher-model: expected an HF model directory"),
    (["--prompt-data", "/nowhere.jsonl"], "/nowhere.jsonl"),
    (["--input-key", "question"], "question"),
    (["--opd-budget-mask", "teachable"], "unknown mask 'teachable'; did you mean 'teachability'"),
    (["--opd-budget-mask", "entropy", "--opd-topk-metrics-k", "0"], "needs top-k"),
    (["--opd-budget-ratio", "10"], r"expected a share in \(0, 1\], got 10"),
    (["--opd-budget-ratio", "0"], r"expected a share in \(0, 1\]"),
    (["--global-batch-size", "3"], "expected a divisor of rollout-batch-size x n-samples-per-prompt = 4 x 1 = 4, got 3"),
    (["--rollout-temperature", "0.7"], "scores at temperature 1"),
    (["--rollout-max-response-len", "256"], "expected room for a prompt within the context of 256"),
    (["--rollout-max-context-len", "512"], "the student's limit is 256, got 512"),
    (["--num-layers", "3"], "num_hidden_layers = 2, got 3"),
    (["--bf16", "--fp32"], "expected one of them, got both"),
    (["--opd-loss-type", "full_reverse_kl"], "expected --opd-type megatron, got sglang"),
    (["--rm-url", "http://127.0.0.1:1/generate"], "exactly one of --teacher-model, --rm-url and --teacher"),
    (["--tensor-model-parallel-size", "2"], "to be a multiple of TP x PP x CP = 2 x 1 x 1"),
    (["--eval-interval", "1"], "expected --eval-prompt-data"),
    (["--eval-prompt-data", "only"], "expected pairs of NAME FILE"),
    (["--load", "/nowhere"], "--load: expected a checkpoint directory"),
    (["--opd-metric-q-low", "0.9", "--opd-metric-q-high", "0.1"], "q"),
    (["--opd-type", "megatron"], "expected --opd-teacher-load"),
    (["--teacher-quantization", "fp8"], "expected a GPU and a teacher directory"),
    (["--opd-selector-path", "no.such.module:rule"], "no.such"),
    (["--opd-divergence-support", "exact"], "expected union_floor or union_tail with --opd-type sglang, got exact"),
    (["--opd-type", "megatron", "--opd-divergence-support", "union_tail"], "expected exact with --opd-type megatron"),
    (["--calculate-per-token-loss", "--opd-loss-reduction", "sample_mean"], "got sample_mean beside it; leave one out"),
    (["--save-debug-rollout-data", "dumps/{step}.parquet"], r"nothing in braces but \{rollout_id\}"),
    (["--save-debug-rollout-data", "dumps/all.pt"], "each rollout would replace the last"),
    (["--kl-loss-coef", "0.001"], "--kl-loss-coef: expected 0.0, got 0.001; there is no reference model"),
    (["--entropy-coef", "1e-3"], "--entropy-coef: expected 0.0"),
    (["--hidden-dropout", "0.1"], "--hidden-dropout: expected 0.0"),
    (["--normalization", "LayerNorm"], "expected RMSNorm, got LayerNorm"),
    (["--custom-rm-path", "my.rewards.score"], "expected slime.rollout.on_policy_distillation.reward_func or .*got my.rewards.score"),
    (["--custom-reward-post-process-path", "my.rewards.mask"], "got my.rewards.mask; a selection rule of your own"),
    (["--norm-epsilon", "1e-3"], "rms_norm_eps = .*, got 0.001"),
])  # fmt: skip
def test_bad_flags(task, more, message):
    with pytest.raises(TaOpdError, match=message):
        validate(parse_args(flags(task, *more)))
    assert not (task / "out").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty|no prompt"),
    ('{"prompt": "Q1+1?", "label": "2"}\nnot json\n', "2"),
    ('{"label": "2"}\n', "prompt"),
])  # fmt: skip
def test_bad_prompt_files(task, tmp_path, text, message):
    with pytest.raises(TaOpdError, match=message):
        validate(parse_args(flags(task, "--prompt-data", write(tmp_path / "p.jsonl", text))))


def test_tokenizers_that_differ_are_refused_by_the_first_difference(task, tmp_path):
    other = tmp_path / "other"
    paths = arithmetic.write_task(tmp_path / "t", num_train=4, num_heldout=2, seed=1)
    write_tiny_qwen3(other, paths["tokenizer"], 5)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    file.write_text(json.dumps(content))
    with pytest.raises(TaOpdError, match="tokenizers differ.*first difference '0'"):
        validate(parse_args(flags(task, "--teacher-model", str(other))))


@pytest.mark.parametrize(("more", "message"), [
    (["--sglang-router-ip", "10.0.0.1"], "expected --sglang-router-port beside it"),
    (["--sglang-router-port", "3000"], "--sglang-router-port: expected --use-sglang-router"),
    (["--use-sglang-router", "--sglang-router-ip", "10.0.0.1", "--sglang-router-port", "3000"], "expected one of them"),
])  # fmt: skip
def test_a_router_is_started_or_there(task, more, message):
    with pytest.raises(TaOpdError, match=message):
        validate(parse_args(flags(task, *more)))


def test_a_router_without_its_package(task, monkeypatch):
    find = importlib.util.find_spec
    assert validate(parse_args(flags(task, "--use-sglang-router"))).sglang_router_policy == "cache_aware"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sglang_router" else find(name, *rest))
    with pytest.raises(TaOpdError, match="sglang-router is not installed"):
        validate(parse_args(flags(task, "--use-sglang-router")))


def test_asynchronous_training_needs_engines_of_its_own(task):
    args = parse_args(flags(task, "--colocate"))
    args.asynchronous = True
    with pytest.raises(TaOpdError, match="--colocate: train_async.py samples while the trainer works"):
        validate(args)
    assert validate(parse_args(flags(task, "--colocate"))).colocate


def test_a_port_in_use_is_found_before_anything_starts(task):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TaOpdError, match=f"port {port} on 127.0.0.1 is in use"):
            validate(parse_args(flags(task, "--teacher-port", str(port))))


def test_several_teachers(task, tmp_path):
    words = [w for w in flags(task) if w not in ("--teacher-model", str(task / "teacher"))]
    teachers = ["--teacher", f"math={task / 'teacher'}", "--teacher", "code=http://a:1", "--teacher", "code=http://b:1"]
    rows = '{"prompt": "Q1+1?", "label": "2", "teacher": "math"}\n{"prompt": "Q1+2?", "label": "3", "teacher": "code"}\n'
    args = validate(parse_args([*words, *teachers, "--prompt-data", write(tmp_path / "p.jsonl", rows)]))
    assert args.teachers == {"math": str(task / "teacher"), "code": ["http://a:1", "http://b:1"]}
    with pytest.raises(TaOpdError, match="law"):
        validate(parse_args([*words, *teachers, "--prompt-data", write(tmp_path / "q.jsonl", rows.replace('"math"', '"law"'))]))
    with pytest.raises(TaOpdError, match="--teacher-key"):
        validate(parse_args([*words, *teachers]))  # prompts that name no teacher
    with pytest.raises(TaOpdError, match="expected NAME=URL"):
        validate(parse_args([*words, "--teacher", "http://a"]))


def test_the_command_prints_one_line_and_starts_nothing(task):
    words = [sys.executable, str(ROOT / "slime_ta_opd" / "train.py"), *flags(task, "--opd-budget-ratio", "10")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT / "slime_ta_opd", timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: --opd-budget-ratio: expected a share in (0, 1], got 10.0 (0.10 keeps 10 %)"]
    assert not (task / "out").exists()


def test_dry_run_prints_the_plan_and_starts_nothing(task):
    words = [sys.executable, str(ROOT / "slime_ta_opd" / "train.py"), *flags(task, "--dry-run", "--num-rollout", "10", "--save-interval", "5", "--optimizer-cpu-offload")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT / "slime_ta_opd", timeout=120)
    assert done.returncode == 0, done.stderr
    for piece in ("trainer: 1 ranks on CPU process 0", "student engine 0", "teacher 'default'", "4 prompts x 1 samples = 4 a rollout",
                  "checkpoints:", "opd_budget_mask: none", "free)", "page-locked, over 1 trainer ranks on 1 nodes"):  # fmt: skip
        assert piece in done.stdout, piece
    assert not (task / "out").exists()


def test_parameter_count_matches_the_model(task):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task / "student")
    exact = sum(p.numel() for p in model.parameters())
    config = json.loads((task / "student" / "config.json").read_text())
    assert abs(count_parameters(config) - exact) / exact < 0.01


def copied(task, tmp_path, change) -> str:
    """A copy of the student after change(its directory)."""
    target = tmp_path / "model"
    shutil.copytree(task / "student", target)
    change(target)
    return str(target)


def cut(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_tokenizer(model):
    for file in model.glob("token*"):
        file.unlink()


def another_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def lacking_a_shard(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


BROKEN_MODELS = [
    (cut, r"model.safetensors is cut off: expected [\d,]+ bytes, got [\d,]+; an interrupted download"),
    (lambda m: (m / "model.safetensors").unlink(), "holds no weights; expected model.safetensors or"),
    (lacking_a_shard, "lacks 1 of 2 files of weights, the first 'model-00002-of-00002.safetensors'"),
    (lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer.*git lfs pull"),
    (lambda m: (m / "model.safetensors").write_text("<html>not found</html>"), "is not a readable safetensors file"),
    (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "is not an index of weights"),
    (lambda m: (m / "config.json").write_text('{"model_type": '), "config.json is not JSON"),
    (lambda m: (m / "config.json").write_text("[]"), "expected a JSON object, got list"),
    (without_tokenizer, "holds no tokenizer"),
]


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--teacher-model"])
@pytest.mark.parametrize(("change", "message"), BROKEN_MODELS)
def test_a_model_directory_that_is_not_whole(task, tmp_path, flag, change, message):
    with pytest.raises(TaOpdError, match=f"{flag}.*{message}"):
        validate(parse_args(flags(task, flag, copied(task, tmp_path, change))))


def test_a_student_of_an_unknown_type_is_refused_and_a_teacher_is_not(task, tmp_path):
    model = copied(task, tmp_path, another_type)
    with pytest.raises(TaOpdError, match="model_type 'gpt2' is not supported by the Megatron trainer; expected one of qwen3"):
        validate(parse_args(flags(task, "--hf-checkpoint", model)))
    validate(parse_args(flags(task, "--teacher-model", model)))  # SGLang knows more types than the trainer


@pytest.mark.parametrize(("more", "message"), [
    (["--lr", "-1"], "--lr: expected 0 or more, got -1"),
    (["--lr", "nan"], "--lr: expected 0 or more, got nan"),
    (["--adam-beta2", "98"], r"--adam-beta2: expected a number in \[0, 1\], got 98"),
    (["--sglang-mem-fraction-static", "2"], "--sglang-mem-fraction-static: expected a share of the GPU's memory"),
    (["--max-tokens-per-gpu", "0"], "--max-tokens-per-gpu: expected at least 1, got 0"),
    (["--pipeline-model-parallel-size", "4", "--actor-num-gpus-per-node", "4"], "expected PP to divide the 2 layers, got PP 4"),
    (["--tensor-model-parallel-size", "8", "--actor-num-gpus-per-node", "8"], "expected TP to divide the . attention heads"),
])  # fmt: skip
def test_numbers_and_layouts_that_nothing_can_be_done_with(task, more, message):
    with pytest.raises(TaOpdError, match=message):
        validate(parse_args(flags(task, *more)))
