"""What a wrong word on the command line is answered with, and a run directory that cannot be made."""

from argparse import Namespace

import pytest

from slime.utils.arguments import build_parser, parse_args
from slime.utils.run import Run
from ta_opd.errors import TaOpdError


@pytest.mark.parametrize(("words", "message"), [
    (["--lr", "1e-3x"], "^--lr: invalid float value: '1e-3x'; --help explains every flag$"),
    (["--opd-token-bank-format", "xml"], "^--opd-token-bank-format: invalid choice: 'xml'.*parquet"),
    (["--num-rollout"], "^--num-rollout: expected one argument"),
])  # fmt: skip
def test_a_value_that_cannot_be_read_is_one_line_without_the_usage(words, message):
    with pytest.raises(TaOpdError, match=message):
        parse_args(words)


def test_an_output_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    args = Namespace(output_dir=str(tmp_path / "file" / "out"), save=None, debug_rollout_only=False)
    with pytest.raises(TaOpdError, match="--output-dir .*: expected a directory that can be written"), Run(args):
        pass


def test_help_begins_with_a_command_and_tells_every_default():
    text = build_parser().format_help()
    assert text.startswith("usage: train.py --hf-checkpoint DIR --teacher-model DIR --prompt-data FILE [flags]\n\n")
    words = " ".join(text.split())
    for action in build_parser()._actions:
        if isinstance(action.default, int | float) and not isinstance(action.default, bool) and "default" not in (action.help or ""):
            assert f"(default: {action.default})" in words, action.option_strings
