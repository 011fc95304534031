"""Both ports in a stock-shaped checkout, in fresh processes, against real HTTP servers; and what importing them pulls in."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from port_helpers import REPO, Server, kept_rows, load_cases, make_stock, run_stock, student_of, teacher_of

from ta_opd.errors import TaOpdError
from ta_opd.selection import _ARGUMENT
from ta_opd.slime_patch.hooks import post_process_rewards
from ta_opd.slime_patch.options import DEFAULTS, check_training
from ta_opd.token_bank import read_bank

CASES = {case["name"]: case for case in load_cases()}
HOOKS = {
    "custom_generate_function_path": "ta_opd.slime_patch.hooks.generate",
    "custom_rm_path": "ta_opd.slime_patch.hooks.reward_func",
    "custom_reward_post_process_path": "ta_opd.slime_patch.hooks.post_process_rewards",
    "custom_rollout_log_function_path": "ta_opd.slime_patch.hooks.log_rollout",
}
COPIED = {
    **HOOKS,
    "custom_rm_path": "slime.rollout.on_policy_distillation.reward_func",
    "custom_reward_post_process_path": "slime.rollout.on_policy_distillation.post_process_rewards",
}
COPIES = ("tip_compat.py", "on_policy_distillation.py")


def job_for(case: dict, student: Server, teacher: Server, config: Path | None, **more) -> dict:
    args = {
        "sglang_router_ip": "127.0.0.1", "sglang_router_port": student.port, "rm_url": teacher.url, "rollout_temperature": 1.0,
        "rollout_batch_size": 3, "use_opd": True, "opd_type": "sglang", "group_rm": False, "rm_type": None,
        "hf_checkpoint": "/models/student", "seed": 1234, "custom_config_path": config and str(config), **HOOKS, **more,
    }  # fmt: skip
    samples = []
    for s in case["samples"]:
        prompt = s["tokens"][: len(s["tokens"]) - s["response_length"]]
        samples.append({"index": s["index"], "group_index": s["group_index"], "prompt": " ".join(map(str, prompt))})
    return {"args": args, "samples": samples, "rollout_ids": [0]}


def write_config(directory: Path, case: dict, **more) -> Path:
    options = {
        **case["args"],
        "opd_profile": "released",
        "opd_budget_ratio": 0.3,
        "opd_token_bank_dir": str(directory / "bank"),
        **more,
    }
    path = directory / "ta_opd.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def copy_into(stock: Path, ta_opd_at: Path = REPO) -> None:
    source = ta_opd_at / "ta_opd" / "slime_patch" / "slime" / "rollout"
    for name in COPIES:
        shutil.copyfile(source / name, stock / "slime" / "rollout" / name)  # as cp does: the file, not the link


@pytest.mark.parametrize(
    ("port", "name", "mask"),
    [
        ("hooks", "plain-100", "random"),
        ("copied", "plain-100", "random"),
        ("hooks", "short-106", "q3"),
    ],
)
def test_a_rollout_of_a_stock_checkout_keeps_what_the_released_code_keeps(tmp_path, port, name, mask):
    case, stock = CASES[name], make_stock(tmp_path / "stock")
    if port == "copied":
        copy_into(stock)
    config = write_config(tmp_path, case, opd_budget_mask=mask, opd_token_bank_format="csv")
    with Server(student_of(case)) as student, Server(teacher_of(case)) as teacher:
        job = job_for(case, student, teacher, config, **(HOOKS if port == "hooks" else COPIED))
        result = run_stock(stock, {**job, "rollout_ids": [0, 5]})
        k = case["args"]["opd_topk_metrics_k"]
        assert all(payload["top_logprobs_num"] == k for payload in student.requests + teacher.requests)
    first, later = result["rollouts"]
    n = len(case["samples"])
    assert kept_rows([], first["loss_masks"]) == case["kept"][f"{mask}@0.3"]
    same = kept_rows([], later["loss_masks"]) == kept_rows([], first["loss_masks"])
    assert same == (mask != "random")  # rollout 5 is another draw
    assert first["rewards"] == first["raw"] == first["reward"] == [0.0] * n
    assert first["dtype"] == "torch.float32"
    for got, expected in zip(first["teacher_log_probs"], case["teacher_log_probs"], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert first["left"] == [] and first["metadata"] == [{}] * n  # no reply and no top-k stays on a sample
    assert [s["tokens"] for s in case["samples"]] == first["tokens"]
    bank = read_bank(tmp_path / "bank")
    assert sorted(path.name for path in (tmp_path / "bank").glob("rollout_*")) == ["rollout_000000.csv", "rollout_000005.csv"]
    bank = bank[bank["rollout_id"] == 0]
    for column, values in case["columns"].items():
        if column in ("quadrant", "Cmass_true"):
            continue
        expected = np.array([np.nan if value in (None, "") else value for value in values], float)
        np.testing.assert_allclose(bank[column].to_numpy(float), expected, rtol=0, atol=1e-9, equal_nan=True, err_msg=column)
    assert result["heavy"] == []
    assert ("slime.rollout.tip_compat" in result["slime"]) == (port == "copied")


def test_evaluation_goes_to_the_answer_check_not_to_the_teacher(tmp_path):
    case, stock = CASES["plain-100"], make_stock(tmp_path / "stock")
    config = write_config(tmp_path, case, opd_budget_mask="tip")
    with Server(student_of(case)) as student, Server(teacher_of(case)) as teacher:
        job = job_for(case, student, teacher, config, rm_type="exact")
        evaluate = [{**job["samples"][0], "label": "x" * 28}, {**job["samples"][1], "label": "no"}]
        result = run_stock(stock, {**job, "rollout_ids": [], "evaluate": evaluate})
        assert result["evaluation"] == [1.0, 0.0]
        assert teacher.requests == [] and all("top_logprobs_num" not in payload for payload in student.requests)


def test_group_rewards_and_whole_replies_as_rewards(tmp_path):
    """--group-rm, and a checkout whose own reward function returns the teacher's reply (as the released code's did)."""
    case, stock = CASES["exact-109"], make_stock(tmp_path / "stock")
    config = write_config(tmp_path, case, opd_budget_mask="dlearn_high")
    (stock / "raw_reward.py").write_text(
        "import json\nfrom pathlib import Path\n\nREPLIES = json.loads(Path(__file__).with_name('replies.json').read_text())\n\n"
        "async def reward_func(args, samples, **kwargs):\n    return [REPLIES[sample.index] for sample in samples]\n"
    )
    replies = []
    for i, sample in enumerate(case["samples"]):
        meta_info, prompt = dict(case["teacher_replies"][i]["meta_info"]), len(sample["tokens"]) - sample["response_length"]
        meta_info["input_token_logprobs"] = [[v, 0, None] for v in [None, *[-1.0] * (prompt - 1), *case["teacher_log_probs"][i]]]
        replies.append({"meta_info": meta_info})
    (stock / "replies.json").write_text(json.dumps(replies))
    with Server(student_of(case)) as student, Server(teacher_of(case)) as teacher:
        job = job_for(case, student, teacher, config, group_rm=True, custom_rm_path="raw_reward.reward_func")
        result = run_stock(stock, job)["rollouts"][0]
        assert teacher.requests == []
    assert kept_rows([], result["loss_masks"]) == case["kept"]["dlearn_high@0.3"]
    bank = read_bank(tmp_path / "bank")
    np.testing.assert_allclose(bank["Cmass_true"], np.array(case["columns"]["Cmass_true"], float), atol=1e-9)
    assert result["reward"] == [0.0] * len(replies)


def test_without_the_log_hook_the_rollout_id_comes_from_the_data_source(tmp_path):
    case, stock = CASES["plain-100"], make_stock(tmp_path / "stock")
    config = write_config(tmp_path, case, opd_budget_mask="tip")
    with Server(student_of(case)) as student, Server(teacher_of(case)) as teacher:
        job = job_for(case, student, teacher, config, custom_rollout_log_function_path=None)
        for sample in job["samples"]:
            sample["group_index"] += 6  # resumed after two rollouts of three prompts
        run_stock(stock, {**job, "rollout_ids": [2, 3]})
    assert sorted(read_bank(tmp_path / "bank")["rollout_id"].unique()) == [2, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"use_opd": False}, "pass --use-opd"),
        ({"opd_type": "megatron"}, "needs --opd-type sglang"),
        ({"rollout_temperature": 0.7}, "rollout_temperature: expected 1.0"),
        ({"opd_budget_masks": "tip"}, "did you mean 'opd_budget_mask'"),
        ({"opd_budget_seed": 7}, "did you mean 'opd_budget_mask_seed'"),
        ({"opd_quadrant_cuts": "rank"}, "did you mean 'opd_quadrant_cut'"),
        ({"opd_divergence_support": "exact"}, "opd_divergence_support: expected union_floor or union_tail"),
        ({}, "sample 4 was not scored by the teacher"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    args = SimpleNamespace(**{"use_opd": True, "opd_topk_metrics_k": 4, "opd_budget_mask": "tip", **wrong})
    sample = SimpleNamespace(index=4, reward=1.0, response_length=2, metadata={})
    with pytest.raises(TaOpdError, match=message):
        post_process_rewards(args, [sample])


def test_every_option_of_a_selection_is_listed_with_its_default():
    assert set(_ARGUMENT.values()) <= set(DEFAULTS)
    check_training(SimpleNamespace(opd_type="sglang", **dict.fromkeys(_ARGUMENT.values())))


PARTIAL = """
import asyncio, json, sys
from types import SimpleNamespace
from slime.utils.types import Sample
from ta_opd.slime_patch.hooks import generate

port, prompt = json.loads(sys.argv[1])
args = SimpleNamespace(sglang_router_ip="127.0.0.1", sglang_router_port=port, opd_topk_metrics_k=2)
sample = Sample(index=0, prompt=prompt)
for _ in range(3):
    sample = asyncio.run(generate(args, sample, {"max_new_tokens": 4}))
print(json.dumps([sample.tokens, sample.response_length, sample.student_topk.ids.tolist(), str(sample.status)]))
image = Sample(index=0, prompt=prompt, multimodal_inputs={"images": ["x"]})
try:
    asyncio.run(generate(args, image, {"max_new_tokens": 4}))
except ValueError as error:
    print(error)
"""


def test_a_continued_response_appends_its_topk(tmp_path):
    def two_tokens(payload: dict) -> dict:
        done = len(payload["input_ids"])
        meta_info = {"output_token_logprobs": [[-0.5, done, None], [-0.5, done + 1, None]], "finish_reason": {"type": "abort"}}
        meta_info["output_top_logprobs"] = [[[-0.5, done + i, None], [-1.5, 90, None]] for i in range(2)]
        return {"text": "ab", "meta_info": meta_info}

    stock = make_stock(tmp_path / "stock")
    with Server(two_tokens) as student:
        out = subprocess.run(
            [sys.executable, "-c", PARTIAL, json.dumps([student.port, "7 8"])], check=True, capture_output=True, text=True,
            env={"PYTHONPATH": f"{stock}:{REPO}", "PATH": ""}, cwd=stock, timeout=60,
        ).stdout.splitlines()  # fmt: skip
        assert [payload["sampling_params"]["max_new_tokens"] for payload in student.requests] == [4, 2]
    tokens, length, ids, status = json.loads(out[0])
    assert (tokens, length, status) == ([7, 8, 2, 3, 4, 5], 4, "Status.TRUNCATED")
    assert ids == [[2, 90], [3, 90], [4, 90], [5, 90]]
    assert "text prompts" in out[1]


@pytest.mark.parametrize("module", ["ta_opd.slime_patch.hooks", "ta_opd.slime_patch.teacher", "ta_opd.token_bank"])
def test_importing_the_port_pulls_in_no_engine(module):
    code = (
        f"import sys; before = set(sys.modules); import {module}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'ray', 'sglang', 'megatron', 'slime', 'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.stdout.strip() == "[]"


BARE = """
import sys
for name in ("orjson", "scipy", "statsmodels", "matplotlib", "yaml", "transformers", "ray", "sglang", "megatron"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from port_helpers import kept_rows, load_cases, plain_samples
from ta_opd.slime_patch import hooks
from ta_opd.slime_patch.slime.rollout import tip_compat
from ta_opd.token_bank import read_bank

case = load_cases()[0]
for kind in ("csv", "jsonl", "parquet"):
    samples = plain_samples(case)
    args = SimpleNamespace(**case["args"], opd_profile="released", opd_budget_mask="tip", opd_budget_ratio=0.3, rollout_id=0,
                           opd_token_bank_dir=sys.argv[2] + kind, opd_token_bank_format=kind, opd_token_bank_raw_topk=True)
    tip_compat.process_tip_compat_metrics(args, samples, case["teacher_log_probs"], case["teacher_replies"])
    tip_compat.close_token_banks()
    assert kept_rows(samples) == case["kept"]["tip@0.3"]
    bank = read_bank(sys.argv[2] + kind)
    assert abs(bank["tip_score"] - case["columns"]["tip_score"]).max() < 1e-9
    assert len(bank["student_top_ids"][0]) == case["args"]["opd_topk_metrics_k"]
"""


def test_numpy_pandas_pyarrow_aiohttp_and_torch_are_enough(tmp_path):
    command = [sys.executable, "-c", BARE, str(Path(__file__).parent), str(tmp_path / "bank_")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COPIES)
def test_the_copied_files_import_without_this_trees_slime(tmp_path, name):
    stock = make_stock(tmp_path / "stock")
    copy_into(stock)
    blocked = ("ray", "sglang", "megatron", "transformers", "slime.backends", "slime.ray", "slime.observability")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"import slime.rollout.{name[:-3]} as module\nprint(module.__file__)\n"
        "print(sorted(m for m in sys.modules if m.startswith('slime.') and sys.modules[m]))"
    )
    environment = {"PYTHONPATH": f"{stock}:{REPO}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=stock, timeout=60)
    assert done.returncode == 0, done.stderr
    where, loaded = done.stdout.splitlines()
    assert Path(where) == stock / "slime" / "rollout" / name
    assert set(eval(loaded)) <= {"slime.rollout", "slime.rollout.tip_compat", "slime.rollout.on_policy_distillation"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The ta-opd distribution, built from an sdist and unpacked: what `pip install ta-opd` puts into site-packages."""
    directory = tmp_path_factory.mktemp("dist")
    source = directory / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        source.mkdir(exist_ok=True)
        shutil.copyfile(REPO / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPO / "ta_opd", source / "ta_opd", symlinks=True, ignore=ignore)
    shutil.copytree(REPO / "slime_ta_opd" / "slime" / "rollout", source / "slime_ta_opd" / "slime" / "rollout", ignore=ignore)
    build = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", build, "sdist", str(directory)], cwd=source, check=True, capture_output=True, timeout=120
    )
    with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
        archive.extractall(directory / "sdist", filter="data")
    unpacked = next((directory / "sdist").iterdir())
    subprocess.run(
        [sys.executable, "-c", build, "wheel", str(directory)], cwd=unpacked, check=True, capture_output=True, timeout=120
    )
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def test_the_installed_package_alone_carries_the_copied_port(tmp_path, installed):
    for name in COPIES:
        shipped = installed / "ta_opd" / "slime_patch" / "slime" / "rollout" / name
        assert shipped.is_file() and not shipped.is_symlink()
        assert shipped.read_bytes() == (REPO / "slime_ta_opd" / "slime" / "rollout" / name).read_bytes()
    case, stock = CASES["nomask-112"], make_stock(tmp_path / "stock")
    copy_into(stock, installed)
    config = write_config(tmp_path, case, opd_budget_mask="tip")
    with Server(student_of(case)) as student, Server(teacher_of(case)) as teacher:
        result = run_stock(stock, job_for(case, student, teacher, config, **COPIED), ta_opd_at=installed)
    assert Path(result["ta_opd"]).is_relative_to(installed)
    assert kept_rows([], result["rollouts"][0]["loss_masks"]) == case["kept"]["tip@0.3"]


def test_the_port_files_exist_once_and_are_linked():
    for name in COPIES:
        link = REPO / "ta_opd" / "slime_patch" / "slime" / "rollout" / name
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()
        assert link.resolve() == REPO / "slime_ta_opd" / "slime" / "rollout" / name
