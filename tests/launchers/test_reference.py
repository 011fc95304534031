"""docs/configuration.md is what the declarations say, every selection flag has a variable, and the docs name things that exist."""

import os
import re
import subprocess
import sys

import pytest

from tests.launchers.conftest import ROOT, scripts

PAGES = ("method_entrypoints", "experiment_workflows", "table3", "configuration", "clusters", "troubleshooting")


def test_the_configuration_page_is_up_to_date():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/slime_ta_opd"}
    done = subprocess.run([sys.executable, ROOT / "tools/make_configuration_reference.py", "--check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RELEASED_FLAGS = """--opd-topk-metrics-k --opd-token-bank-dir --opd-token-bank-format --opd-token-bank-raw-topk --opd-exact-cmass
--opd-exact-cmass-max-union --opd-exact-cmass-overflow --opd-token-bank-pair-id --opd-teacher-name --opd-student-name --opd-budget-mask
--opd-budget-ratio --opd-budget-gamma --opd-budget-mask-seed --opd-budget-min-keep-per-sample --opd-compat-proxy
--opd-compat-prefix-ema-alpha --opd-metric-normalization --opd-metric-q-low --opd-metric-q-high --opd-type --opd-kl-coef
--opd-teacher-load --opd-teacher-ckpt-step"""


def test_every_flag_behind_a_variable_exists_and_every_released_one_has_a_variable(launch):
    from slime.utils.arguments import build_parser

    listed = launch("scripts/train/run_opd.sh", "--variables", check=True).out
    flags = {line.split("\t")[5] for line in listed.splitlines()[1:]} - {""}
    assert not set(RELEASED_FLAGS.split()) - flags
    assert not flags - {f for a in build_parser()._actions for f in a.option_strings}


def test_choices_of_the_launchers_are_those_of_train_py(launch):
    from slime.utils.arguments import build_parser

    known = {flag: action.choices for action in build_parser()._actions for flag in action.option_strings if action.choices}
    rows = [line.split("\t") for line in launch("scripts/train/run_opd.sh", "--variables", check=True).out.splitlines()[1:]]
    listed = {flag: kind.split(" | ") for _, _, kind, _, _, flag, _ in rows if " | " in kind and flag in known}
    assert len(listed) > 15 and {"--opd-loss-type", "--opd-loss-reduction"} <= set(listed)
    assert {flag: set(words) for flag, words in listed.items()} == {flag: set(map(str, known[flag])) for flag in listed}


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for path in re.findall(r"(?:scripts|tools|benchmarks|tests|slime_ta_opd|ta_opd)/[\w./-]+\.(?:sh|py|md|yaml|sbatch|txt)", text):
        assert (ROOT / path).exists(), f"{page}.md names {path}"
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), f"{page}.md links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p != "configuration"])
def test_variables_in_pages_exist(page, launch):
    """Every NAME=value in a code block is a variable of some launcher."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    used = set(re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]{2,})=", "\n".join(re.findall(r"```.*?\n(.*?)```", text, re.S)), re.M))
    known = {"CUDA_VISIBLE_DEVICES", "NLTK_DATA", "HF_HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "OMP_NUM_THREADS"}
    for script in ("scripts/train/run_teachability_opd_method_suite.sh", "scripts/train/run_opd_budget_ratio_sweep.sh", "scripts/train/run_opd.sh",
                   "scripts/diagnostics/run_4b_to_1p7b_gsm8k_fixed_context_300.sh", "scripts/eval/run_downstream.sh", "scripts/cluster/make_job.sh",
                   "scripts/eval/run_heldout_math.sh", "scripts/convert/convert_to_hf.sh", "scripts/convert/convert_to_torch_dist.sh",
                   "scripts/data/make_chat_prompts.sh", "scripts/diagnostics/run_14b_to_1p7b_retopk_8_32.sh"):  # fmt: skip
        known |= {line.split("\t")[1] for line in launch(script, "--variables", check=True).out.splitlines()[1:]}
    assert not used - known, used - known


def test_every_launcher_is_in_the_entry_points_or_workflows():
    text = "".join((ROOT / "docs" / f"{p}.md").read_text() for p in PAGES)
    for script in scripts():
        name = script.rsplit("/", 1)[1]
        assert name in text or script.startswith(("slime_ta_opd/run_", "examples/")), f"no page names {script}"


def test_every_alias_is_on_the_method_page():
    from ta_opd.selection import MASK_CHOICES, METHOD_ALIASES

    text = (ROOT / "docs/method_entrypoints.md").read_text()
    for name in {*METHOD_ALIASES, *MASK_CHOICES}:
        assert f"`{name}`" in text, name
