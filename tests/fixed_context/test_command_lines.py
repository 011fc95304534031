"""The tools' command lines: every flag explained, an engine that is missing, a reader that stops reading."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ta_opd.fixed_context import cli
from ta_opd.fixed_context.recommend import RecommendConfig, recommend, write_recommendation
from tests.fixed_context.diagnostic_cases import paper_table

TOOLS = sorted(p for p in (Path(__file__).resolve().parents[2] / "tools").glob("*.py") if "cli.new_parser" in p.read_text())


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.stem)
def test_help_explains_every_flag_and_names_its_default(tool, capsys):
    spec = importlib.util.spec_from_file_location(f"help_of_{tool.stem}", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = module.build_parser()
    text = parser.format_help()
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.option_strings and isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert "default" in action.help, action.option_strings
    assert "%(" not in text


def test_a_tool_that_needs_an_engine_says_where_to_get_it(capsys):
    def needs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert cli.run("score", lambda args: needs("torch"), cli.new_parser(""), []) == 1
    assert "score: this needs torch, which `pip install .` leaves out; bash scripts/setup.sh" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        cli.run("score", lambda args: needs("a_typo"), cli.new_parser(""), [])


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(cli.__file__).parents[2])!r})\nfrom ta_opd.fixed_context import cli\n" \
           "sys.exit(cli.run('t', lambda args: [print('x' * 100) for _ in range(10000)], cli.new_parser(''), []))"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
    assert child.returncode == 0 and not errors, errors


def test_the_diagnostic_ends_with_what_it_found_and_where_to_read_on(tmp_path):
    spec = importlib.util.spec_from_file_location("run_fixed_context_ending", TOOLS[0].parent / "run_fixed_context.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.ending(tmp_path, "summary.md") == []  # nothing was analysed
    (tmp_path / "summary.md").write_text("")
    result = recommend(paper_table(), RecommendConfig(ratios=(0.1,), selectors=("dlearn_high", "entropy"), bootstrap=20, source="full"))
    write_recommendation(result, tmp_path / "analysis" / "recommend")
    said = tool.ending(tmp_path, "summary.md")
    assert said[0].startswith("mean gain of all 960 tokens: ") and said[1].startswith("highest on the tokens that dlearn_high keeps at 0.1: ")
    assert said[2 : 2 + len(result.warnings)] == [f"warning: {text}" for text in result.warnings]
    assert said[-2:] == [f"summary: {tmp_path}/summary.md", f"selectors: {tmp_path}/analysis/recommend/selector_recommendation.md"]
