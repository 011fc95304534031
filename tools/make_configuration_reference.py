"""Writes docs/configuration.md: every variable of the launchers and every flag of train.py, from their declarations.

  make_configuration_reference.py            writes the page
  make_configuration_reference.py --check    ends with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from slime.utils.arguments import ACCEPTED_ONLY, SHAPE_FLAGS, build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
# In the order of the page. A variable is described where it appears first; later launchers list only what is new or has another default.
LAUNCHERS = (
    ("One run", "scripts/train/run_opd.sh"),
    ("Method wrappers", "scripts/train/run_teachability.sh"),
    ("Method suite", "scripts/train/run_teachability_opd_method_suite.sh"),
    ("Budget sweep", "scripts/train/run_opd_budget_ratio_sweep.sh"),
    ("Example, Megatron teacher", "slime_ta_opd/examples/on_policy_distillation/run-qwen3-8B-opd-megatron.sh"),
    ("Fixed-context diagnostic", "scripts/diagnostics/run_4b_to_1p7b_heldout_fixed_context_300.sh"),
    ("Diagnostic on GSM8K", "scripts/diagnostics/run_4b_to_1p7b_gsm8k_fixed_context_300.sh"),
    ("Short diagnostic", "scripts/diagnostics/run_8b_to_1p7b_short.sh"),
    ("Scores with other K", "scripts/diagnostics/run_14b_to_1p7b_retopk_8_32.sh"),
    ("Benchmarks through the harness", "scripts/eval/run_downstream.sh"),
    ("Benchmarks of the paper", "scripts/eval/run_downstream_paper_six.sh"),
    ("Held-out accuracy", "scripts/eval/run_heldout_math.sh"),
    ("Hugging Face to torch_dist", "scripts/convert/convert_to_torch_dist.sh"),
    ("torch_dist to Hugging Face", "scripts/convert/convert_to_hf.sh"),
    ("DAPO-Math-17k", "scripts/data/make_dapo_math_17k.sh"),
    ("Any chat data set", "scripts/data/make_chat_prompts.sh"),
    ("Cluster jobs", "scripts/cluster/make_job.sh"),
)
HEAD = """# Configuration reference

<!-- written by tools/make_configuration_reference.py from the declarations; edit those -->

Launchers read environment variables (`NAME=value bash SCRIPT`, or `bash SCRIPT NAME=value`); `--help` prints the ones that a launcher has,
`DRY_RUN=1` the exact commands. `$OTHER` in a default is the value of that variable; `TA_OPD_ROOT` is this project's directory. More
`train.py` flags follow after `--`. A wrong value stops a launcher before anything starts.

"""


def variables(script: str) -> tuple[str, list[list[str]]]:
    """(what the launcher does, its variables as [group, name, type, default, meaning, flag, ...])."""
    words = ["bash", str(ROOT / script), "--variables"]
    out = subprocess.run(words, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True).stdout.splitlines()
    return out[0].split("\t")[1], [line.split("\t") for line in out[1:]]


def launcher_sections() -> Iterable[str]:
    known: dict[str, tuple[str, ...]] = {}
    for title, script in LAUNCHERS:
        about, rows = variables(script)
        new = [r for r in rows if known.get(r[1]) != (r[3], r[4])]
        known |= {r[1]: (r[3], r[4]) for r in rows}
        same = len(rows) - len(new)
        yield f"## {title}: `{script}`\n\n{about}\n\n"
        if same:
            yield f"{same} variables are as above.\n\n"
        if not new:
            continue
        with_flags = any(r[5] for r in new)
        yield "| variable | default | meaning | type |" + (" flag |" if with_flags else "") + "\n"
        yield "|---|---|---|---|" + ("---|" if with_flags else "") + "\n"
        for _, name, kind, default, meaning, flag, _ in new:
            cells = [code(name), code(default), text(meaning), text(kind)] + ([code(flag)] if with_flags else [])
            yield "| " + " | ".join(cells) + " |\n"
        yield "\n"


def flag_sections() -> Iterable[str]:
    yield "## Flags of `slime_ta_opd/train.py`\n\nThe same names are keys of `--config FILE.yaml`; the command line wins.\n\n"
    for group in build_parser()._action_groups:
        actions = [a for a in group._group_actions if a.option_strings and a.help != argparse.SUPPRESS and "--help" not in a.option_strings]
        if not actions:
            continue
        yield f"### {group.title}\n\n" + (f"{text(group.description)}\n\n" if group.description else "")
        yield "| flag | default | meaning |\n|---|---|---|\n"
        for action in actions:
            name = ", ".join(action.option_strings)
            meaning = text(action.help or "")
            if action.choices:
                meaning += (" " if meaning else "") + "(" + ", ".join(map(str, action.choices)) + ")"
            yield f"| {code(name)} | {code(default_of(action))} | {meaning} |\n"
        yield "\n"
    yield "Accepted for known command lines, without effect: " + ", ".join(map(code, ACCEPTED_ONLY)) + ".\n"
    yield "A value that would ask for something else (a KL or entropy term, dropout, another reward function) is refused.\n\n"
    yield "Shape flags are checked against the model's configuration: " + ", ".join(map(code, SHAPE_FLAGS)) + ".\n"


def default_of(action: argparse.Action) -> str:
    if action.default is None or action.default == [] or action.default == {}:
        return ""
    return {True: "on", False: "off"}.get(action.default, str(action.default)) if isinstance(action.default, bool) else str(action.default)


def code(value: str) -> str:
    return f"`{value.replace('|', chr(92) + '|')}`" if value else ""


def text(value: str) -> str:
    return value.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    return HEAD + "".join(launcher_sections()) + "".join(flag_sections())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    content = page()
    if args.check:
        if PAGE.exists() and PAGE.read_text() == content:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is out of date: run tools/make_configuration_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(content)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
