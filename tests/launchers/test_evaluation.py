"""The harness's files by their real keys, seeds, differences; held-out accuracy from a real tiny checkpoint."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml

from slime.evaluation import harness, heldout, local_tasks, scores
from ta_opd.errors import ConfigError, DataError
from tests.launchers.conftest import ROOT


def results(path, **tasks):
    path.mkdir(parents=True)
    groups = tasks.pop("groups", {})
    (path / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps({"results": tasks, "groups": groups}))


def values(key, number, error=0.01):
    metric, _, name = key.partition(",")
    return {"alias": "t", "sample_len": 30, key: number, f"{metric}_stderr,{name}": error}


@pytest.fixture
def runs(tmp_path):
    """base and taopd on aime24 with three seeds, and one run of the math group; the files lie one directory deeper, as the harness puts them."""
    jobs = []
    for model, shift in (("base", 0.0), ("taopd", 0.1)):
        for seed, number in ((1, 0.2), (2, 0.3), (3, 0.1)):
            directory = tmp_path / model / "aime24" / f"seed{seed}"
            results(directory / "__models__x", aime24=values("exact_match,none", number + shift))
            jobs.append((model, "aime24", seed, 0, directory))
    directory = tmp_path / "taopd/leaderboard_math_hard/seed1"
    subjects = {f"leaderboard_math_{s}_hard": values("exact_match,none", v) for s, v in (("algebra", 0.5), ("geometry", 0.1))}
    results(directory / "m", groups={"leaderboard_math_hard": values("exact_match,none", 0.4)}, **subjects)
    jobs.append(("taopd", "leaderboard_math_hard", 1, 0, directory))
    return scores.read_runs(jobs)


def test_real_keys(runs):
    assert list(runs.columns) == ["model", "task", "seed", "sample", "metric", "exact_match", "exact_match_stderr", "result_json"]
    assert len(runs) == 9 and set(runs["metric"]) == {"exact_match,none"}
    assert runs["exact_match_stderr"].tolist() == [0.01] * 9


@pytest.mark.parametrize(
    ("task", "found", "key"),
    [
        ("gsm8k_cot", {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.4}, "exact_match,flexible-extract"),
        ("minerva_math500", {"exact_match,none": 0.1, "math_verify,none": 0.4}, "math_verify,none"),
        ("minerva_math500_local", {"exact_match,none": 0.4}, "exact_match,none"),
        ("ifeval", {"inst_level_loose_acc,none": 0.9, "prompt_level_strict_acc,none": 0.4}, "prompt_level_strict_acc,none"),
        ("humaneval_instruct", {"pass@1,create_test": 0.4}, "pass@1,create_test"),
        ("heldout", {"exact_match,last-number": 0.4}, "exact_match,last-number"),
        ("unheard_of", {"f1,none": 0.4, "f1_stderr,none": 0.9, "alias": "x"}, "f1,none"),
    ],
)
def test_headline(task, found, key):
    assert scores.headline(task, found)[:2] == (key, 0.4)


def test_a_result_without_a_number():
    with pytest.raises(DataError, match="expected a metric such as 'exact_match,none'"):
        scores.headline("x", {"alias": "x", "exact_match_stderr,none": 0.1})
    assert math.isnan(scores.headline("x", {"acc,none": 0.5, "acc_stderr,none": "N/A"})[2])


def test_mean_standard_error_and_paired_difference(runs):
    summary = scores.summarize(runs, "base").set_index(["model", "task"])
    base, ours = summary.loc[("base", "aime24")], summary.loc[("taopd", "aime24")]
    assert base["mean"] == pytest.approx(0.2) and base["se"] == pytest.approx(0.1 / math.sqrt(3)) and base["error_over"] == "seeds"
    assert base["high"] - base["mean"] == pytest.approx(4.303 * base["se"], rel=1e-3)
    assert ours["delta_vs_base"] == pytest.approx(0.1) and ours["delta_se"] == pytest.approx(0.0, abs=1e-12)  # every seed moved by 0.1
    assert math.isnan(base["delta_vs_base"])
    group = summary.loc[("taopd", "leaderboard_math_hard")]
    assert group["mean"] == 0.4 and group["se"] == 0.01 and group["error_over"] == "questions" and math.isnan(group["delta_vs_base"])


def test_unpaired_seeds_add_their_errors(runs):
    part = runs[(runs["model"] == "base") | (runs["seed"] != 3)]
    row = scores.summarize(part, "base").set_index(["model", "task"]).loc[("taopd", "aime24")]
    assert row["delta_se"] == pytest.approx(math.hypot(np.std([0.3, 0.4], ddof=1) / math.sqrt(2), 0.1 / math.sqrt(3)))


def test_tables(runs, tmp_path):
    written = {p.name: p for p in scores.write(tmp_path / "o", runs, "base")}
    assert set(written) == {"runs.csv", "summary.csv", "summary.md", "math_hard_summary.csv", "math_hard_summary.md"}
    hard = pd.read_csv(written["math_hard_summary.csv"]).iloc[0]
    assert (hard["model"], hard["overall"], hard["algebra"], hard["geometry"]) == ("taopd", 0.4, 0.5, 0.1)
    assert "| base | 20.00 +- 5.77 |" in written["summary.md"].read_text()
    assert scores.write(tmp_path / "p", runs[:0], "base") == []


def settings(tmp_path, **more):
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    if not (model / "config.json").exists():
        (model / "config.json").write_text("{}")
    return harness.Settings(**({"models": {"base": str(model)}, "tasks": ("aime24",), "run_dir": tmp_path / "run", "python": "python"} | more))


def test_harness_command(tmp_path):
    job = harness.jobs(settings(tmp_path, temperature=0.6, top_p=0.95, max_gen_toks=4096, seeds=(1, 2), n_samples=2, num_fewshot=0))
    assert [(j.seed, j.sample, j.directory.name) for j in job] == [
        (1, 0, "seed1_sample0"), (1, 1, "seed1_sample1"), (2, 0, "seed2_sample0"), (2, 1, "seed2_sample1"),
    ]  # fmt: skip
    assert len({j.command[j.command.index("--seed") + 1] for j in job}) == 4
    words = " ".join(job[0].command)
    assert "--gen_kwargs max_gen_toks=4096 temperature=0.6 top_p=0.95 do_sample=True --apply_chat_template --num_fewshot 0" in words
    server = harness.jobs(settings(tmp_path, models={"s": "http://h:1/generate"}, tokenizer="/t", chat_template=False))[0]
    assert "--model sglang-generate --model_args base_url=http://h:1/generate tokenizer=/t" in " ".join(server.command)
    assert "--apply_chat_template" not in server.command and "--gen_kwargs" not in server.command


def test_every_seed_reaches_a_server(tmp_path):
    """The native address takes it with the sampling parameters, an OpenAI-compatible one from the harness's model arguments."""
    more = {"tokenizer": "/t", "temperature": 0.6, "seeds": (5, 6)}
    native = harness.jobs(settings(tmp_path, models={"s": "http://h:1"}, **more))
    assert [j.command[-2] for j in native] == ["sampling_seed=5", "sampling_seed=6"] and native[0].command[-1] == "--apply_chat_template"
    openai = harness.jobs(settings(tmp_path, models={"s": "http://h:1/v1/"}, **more))
    words = [" ".join(j.command) for j in openai]
    assert "--model local-completions --model_args base_url=http://h:1/v1/completions model=default tokenizer_backend=huggingface tokenizer=/t" in words[0]
    assert "seed=5" in words[0] and "seed=6" in words[1] and "sampling_seed" not in words[0]


def test_one_version_of_antlr_serves_both_latex_parsers():
    """sympy's (the harness's MATH tasks) accepts 4.11 only, math-verify's several; every set installs that one."""
    import sympy
    from math_verify import parse, verify
    from sympy.parsing.latex import parse_latex

    assert parse_latex(r"\frac{1}{2}").doit() == sympy.Rational(1, 2)
    assert verify(parse(r"$\frac{1}{2}$"), parse("$0.5$"))
    pins = {f.name: [line for line in f.read_text().splitlines() if line.startswith("antlr4")] for f in (ROOT / "requirements").glob("*.txt")}
    assert {name: lines for name, lines in pins.items() if lines} == dict.fromkeys(("cpu.txt", "gpu.txt"), ["antlr4-python3-runtime==4.11.0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"a": "/nowhere"}}, "MODELS: a=/nowhere: expected a Hugging Face model directory"),
        ({"models": {"a": "http://h:1"}}, "TOKENIZER: expected the tokenizer's directory"),
        ({"tasks": ("humaneval",)}, "ALLOW_CODE=0: humaneval runs code written by the model"),
        ({"seeds": (1, 2)}, "expected TEMPERATURE above 0"),
        ({"n_samples": 2}, "expected TEMPERATURE above 0"),
    ],
)
def test_what_would_fail_after_hours(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        harness.check(settings(tmp_path, **change))


FAKE = "import os,sys,json,pathlib as p\nd=p.Path(sys.argv[sys.argv.index('--output_path')+1])/'m'\nd.mkdir()\n(d/'results_1.json').write_text('{\"results\": {}}')\n"


def test_done_runs_are_skipped_unless_the_command_changed(tmp_path):
    """Bookkeeping only: the process in the place of the harness writes a file and ends."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/usr/bin/env bash\nshift 3\nexec {__import__('sys').executable} -c \"$FAKE\" \"$@\"\n")
    fake.chmod(0o755)
    environment = {"FAKE": FAKE, "PATH": "/usr/bin:/bin"}

    def ended(**more):
        chosen = settings(tmp_path, python=str(fake), **more)
        return [how for _, how in harness.run(chosen, harness.jobs(chosen), environment, [])]

    assert ended() == ["done"]
    assert ended() == ["skipped"]
    (tmp_path / "model/model.safetensors").write_text("trained further, written to the same place")
    (tmp_path / "run/base/aime24/seed1234/m/results_1.json").unlink()
    (tmp_path / "run/base/aime24/seed1234/m").rmdir()
    assert ended() == ["done"]
    assert ended() == ["skipped"]
    done = json.loads((tmp_path / "run/base/aime24/seed1234/DONE").read_text())
    (tmp_path / "run/base/aime24/seed1234/DONE").write_text(json.dumps({"fingerprint": done["fingerprint"]}))
    assert ended() == ["skipped"]  # of an earlier version, which did not look at the model
    (tmp_path / "run/base/aime24/seed1234/m/results_1.json").unlink()
    (tmp_path / "run/base/aime24/seed1234/m").rmdir()
    assert ended(limit="5") == ["done"]
    environment["FAKE"] = "raise SystemExit(1)"
    assert ended(tasks=("aime25",)) == ["failed"]
    chosen = settings(tmp_path, python=str(fake), tasks=("other",))
    assert [how for _, how in harness.run(chosen, harness.jobs(chosen), environment, [2])] == ["interrupted"]


def test_a_known_task_on_local_files(tmp_path):
    known = tmp_path / "aime24.yaml"
    (tmp_path / "base.yaml").write_text("training_split: train\ndoc_to_text: !function utils.f\n")
    known.write_text("include: base.yaml\ntask: aime24\ntest_split: test\nfewshot_split: train\n")
    (tmp_path / "data.parquet").touch()
    names = local_tasks.write(tmp_path / "tasks", {"aime24": str(tmp_path / "data.parquet")}, {}, "p", "l", find=lambda task: known)
    assert names == {"aime24": "aime24_local"}
    written = yaml.safe_load((tmp_path / "tasks/aime24_local.yaml").read_text())
    assert written["include"] == str(known) and written["dataset_path"] == "parquet"
    assert written["dataset_kwargs"] == {"data_files": dict.fromkeys(("test", "train"), str(tmp_path / "data.parquet"))}
    assert local_tasks.local_copy("aime24", str(tmp_path), lambda task: known)[1]["dataset_path"] == str(tmp_path)
    with pytest.raises(ConfigError, match="LOCAL_DATASETS: aime24=/nowhere"):
        local_tasks.local_copy("aime24", "/nowhere", lambda task: known)
    with pytest.raises(ConfigError, match="PROMPT_TASKS"):
        local_tasks.prompt_task("a-b", str(known), "p", "l")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random tiny checkpoint with a character tokenizer, and prompts with labels."""
    from examples.quickstart import arithmetic
    from tests.helpers.models import write_tiny_qwen3

    root = tmp_path_factory.mktemp("checkpoint")
    paths = arithmetic.write_task(root, num_train=8, num_heldout=6, seed=3)
    return write_tiny_qwen3(root / "model", paths["tokenizer"], 0), paths["heldout"]


def test_heldout_accuracy_of_a_checkpoint(checkpoint):
    model, data = checkpoint
    generate, tokenizer = heldout.transformers_generator(str(model), batch_size=4)
    base = {"data": str(data), "chat_template": False, "rm_type": "exact", "max_new_tokens": 6}
    greedy = heldout.evaluate(generate, tokenizer, heldout.Settings(**base))
    assert greedy["questions"] == 6 and len(greedy["responses"]) == 6 and len(greedy["runs"]) == 1
    assert greedy["runs"][0]["accuracy"] == 0.0 and 0 < greedy["runs"][0]["response_length"] <= 6
    assert greedy["responses"] == heldout.evaluate(generate, tokenizer, heldout.Settings(**base))["responses"]
    one = heldout.evaluate(heldout.transformers_generator(str(model), batch_size=1)[0], tokenizer, heldout.Settings(**base))
    assert [r["response"] for r in one["responses"]] == [r["response"] for r in greedy["responses"]]  # padding changes nothing
    sampled = heldout.Settings(**base, temperature=1.0, seeds=(1, 2), n_samples=2)
    first = heldout.evaluate(generate, tokenizer, sampled)
    assert [r["seed"] for r in first["runs"]] == [1, 2] and len(first["responses"]) == 24
    assert first["responses"] == heldout.evaluate(generate, tokenizer, sampled)["responses"]
    texts = {seed: [r["response"] for r in first["responses"] if r["seed"] == seed] for seed in (1, 2)}
    assert texts[1] != texts[2]


def test_heldout_counts_right_answers(checkpoint):
    """The generator here answers from the labels, so that the numbers are known."""
    model, data = checkpoint
    tokenizer = heldout.load_tokenizer(str(model))
    labels = [json.loads(line)["label"] for line in data.read_text().splitlines()]

    def generate(prompts, seeds, settings):
        answers = [f"A{labels[i // settings.n_samples]}" if i % 2 == 0 else "A?" for i in range(len(prompts))]
        return [heldout.Answer(tokenizer.encode(a, add_special_tokens=False), True) for a in answers]

    settings = heldout.Settings(data=str(data), chat_template=False, rm_type="exact", temperature=1.0, n_samples=2)
    run = heldout.evaluate(generate, tokenizer, settings)["runs"][0]
    assert (run["accuracy"], run["accuracy_any"], run["stderr"], run["truncated"]) == (0.5, 1.0, 0.0, 0.0)


def test_heldout_complaints(checkpoint, tmp_path):
    model, data = checkpoint
    tokenizer = heldout.load_tokenizer(str(model))
    with pytest.raises(ConfigError, match="expected TEMPERATURE above 0"):
        heldout.evaluate(None, tokenizer, heldout.Settings(data=str(data), seeds=(1, 2)))
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}], "label": "1"}\n')
    with pytest.raises(ConfigError, match="expected CHAT_TEMPLATE=1"):
        heldout.evaluate(None, tokenizer, heldout.Settings(data=str(tmp_path / "chat.jsonl"), chat_template=False))
    (tmp_path / "null.jsonl").write_text('{"prompt": "1", "label": null}\n')
    with pytest.raises(ConfigError, match="LABEL_KEY=label: expected answers"):
        heldout.evaluate(None, tokenizer, heldout.Settings(data=str(tmp_path / "null.jsonl")))


def test_heldout_accuracy_is_of_the_model_as_it_is_now(checkpoint, tmp_path, capsys):
    """A checkpoint is often written to one place again; its old accuracy must not pass for the new one's."""
    import importlib.util
    import shutil

    spec = importlib.util.spec_from_file_location("evaluate_math", ROOT / "tools/evaluate_math.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shutil.copytree(checkpoint[0], tmp_path / "model")
    words = ["--models", f"a={tmp_path / 'model'}", "--data", str(checkpoint[1]), "--run-dir", str(tmp_path / "run"), "--max-gen-toks", "2",
             "--no-chat-template", "--base", "a"]  # fmt: skip
    made = []
    tool.heldout.transformers_generator, original = (lambda *a, **k: made.append(a) or original(*a, **k)), tool.heldout.transformers_generator
    try:
        for change, times in ((None, 1), (None, 1), ("weights", 2), (None, 2)):
            if change:
                file = tmp_path / "model" / "model.safetensors"
                file.write_bytes(file.read_bytes())
            assert tool.main(words) == 0 and len(made) == times
    finally:
        tool.heldout.transformers_generator = original
