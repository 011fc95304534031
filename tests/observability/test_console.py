"""What a run prints: lines with their end in sight where no terminal is, a bar where one is, and the places at start and end."""

import io
from argparse import Namespace
from pathlib import Path

import pytest

from slime.observability import console
from slime.ray.placement import Layout
from slime.utils.misc import human_seconds
from ta_opd.errors import ConfigError

METRICS = {"rollout/reverse_kl_valid": 0.12345, "rollout/keep_ratio": 0.1, "rollout/response_length": 31.25, "train/loss": 2.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def guessed(monkeypatch):
    monkeypatch.delenv(console.CHOICE, raising=False)


def walk(total: int, seconds_a_step: float, *, start: int = 0, first: float | None = None) -> list[str]:
    """Lines of a run whose steps take that long by a clock of its own."""
    now = [100.0]
    out = io.StringIO()
    progress = console.RolloutProgress("mine", start, total, out, clock=lambda: now[0])
    for rollout_id in progress:
        took = first if first is not None and rollout_id == start else seconds_a_step
        now[0] += took
        progress.step(rollout_id, METRICS, {"total": took, "generate": took / 2, "train": took / 4})
    progress.close()
    assert "\r" not in out.getvalue()
    return out.getvalue().splitlines()


def test_long_steps_are_a_line_each_with_the_time_that_is_left():
    lines = walk(4, 60.0, first=300.0)  # the first warms up: it does not count where others have ended
    assert lines[0] == "mine: rollout 1 of 4, kl=0.123 kept=0.1 len=31.2 loss=2, 300.0 s (generate 150.0, train 75.0), 15 min left"
    assert [line.rsplit(", ", 1)[1] for line in lines[:3]] == ["15 min left", "2 min left", "60 s left"]
    assert lines[3].endswith("60.0 s (generate 30.0, train 15.0)") and len(lines) == 4


def test_short_steps_share_a_line_and_the_last_one_is_told():
    lines = walk(100, 1.0)
    told = [int(line.split("rollout ")[1].split(" of")[0]) for line in lines]
    assert told[0] == 1 and told[-1] == 100 and len(told) == 11 and all(b - a <= 10 for a, b in zip(told, told[1:], strict=False))


def test_a_resumed_run_counts_from_its_start():
    lines = walk(10, 20.0, start=8)
    assert len(lines) == 2 and "rollout 9 of 10" in lines[0] and "20 s left" in lines[0]


def test_a_bar_is_for_terminals_that_have_columns(monkeypatch):
    assert not console.wants_bar(io.StringIO())
    assert not console.wants_bar(Terminal())  # no descriptor, so no size
    monkeypatch.setenv(console.CHOICE, "bar")
    assert console.wants_bar(io.StringIO())
    monkeypatch.setenv(console.CHOICE, "lines")
    assert not console.wants_bar(Terminal())
    monkeypatch.setenv(console.CHOICE, "none")
    with pytest.raises(ConfigError, match="expected bar, lines or nothing, got 'none'"):
        console.wants_bar(io.StringIO())


def test_a_bar_shows_the_numbers_of_the_last_rollout(monkeypatch):
    monkeypatch.setenv(console.CHOICE, "bar")
    out = io.StringIO()
    progress = console.RolloutProgress("mine", 0, 2, out)
    for rollout_id in progress:
        progress.step(rollout_id, METRICS, {"total": 1.0})
    progress.close()
    assert "2/2" in out.getvalue() and "kl=0.123" in out.getvalue()


def test_start_and_end_say_where_things_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(run_name="mine", num_rollout=5, output_dir="out", save="out/checkpoints", save_hf="hf", debug_rollout_only=False)
    console.tell_start(args, Layout([0, 1], [[2]], {"a": [[3], [4]], "b": [[5]]}, 6))
    (tmp_path / "hf").mkdir()
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    console.tell_end(args, Path("out"), 5, 7200.0)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"starting 2 trainer ranks, 1 student engine, 3 teacher servers; servers write to {tmp_path}/out/logs"
    assert said[2] == f"mine: finished, 5 rollouts in 2 h 00 min; everything is in {tmp_path}/out"
    assert said[3] == f"the trained model: {tmp_path}/hf"  # checkpoints are inside and not named again
    assert said[4].startswith("a page with pictures: python ") and Path(said[4].split()[5]).is_file() and said[4].endswith(f" {tmp_path}/out")
    assert len(said) == 5


def test_a_resumed_run_says_what_is_done(capsys):
    args = Namespace(run_name="mine", num_rollout=5, load="/ckpt")
    console.tell_resume(args, 0)
    assert capsys.readouterr().out == ""
    console.tell_resume(args, 3)
    assert capsys.readouterr().out == "mine: going on from /ckpt: 3 of 5 rollouts are done\n"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3599, "60 min"), (5400, "1 h 30 min"), (90000, "25 h 00 min")])
def test_durations(seconds, words):
    assert human_seconds(seconds) == words
