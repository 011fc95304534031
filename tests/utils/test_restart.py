"""--max-restarts: when a run starts over, from where, and when it does not."""

import os
from types import SimpleNamespace

import pytest

from slime.ray.calls import ProcessLost
from slime.utils.restart import TRACKER, with_restarts
from ta_opd.errors import DataError


def make_args(tmp_path, **changes):
    base = dict(max_restarts=2, save=str(tmp_path / "save"), load=None, no_load_optim=False, start_rollout_id=None, output_dir=str(tmp_path))
    return SimpleNamespace(**{**base, **changes})


def write(args, rollout, age=0.0):
    os.makedirs(args.save, exist_ok=True)
    tracker = os.path.join(args.save, TRACKER)
    with open(tracker, "w") as file:
        file.write(str(rollout))
    os.utime(tracker, (os.stat(tracker).st_atime, os.stat(tracker).st_mtime - age))


def failing(args, times, save_before=None):
    """A run that dies `times` times; it writes a checkpoint before its first death where asked."""
    loads = []

    def train(args):
        loads.append((args.load, args.no_load_optim, args.start_rollout_id))
        if len(loads) == 1 and save_before is not None:
            write(args, save_before)
        if len(loads) <= times:
            raise ProcessLost("a trainer rank (pid 1) of this run died")

    return train, loads


def test_starts_over_from_the_checkpoint_that_this_run_wrote(tmp_path, capsys):
    args = make_args(tmp_path, load="elsewhere", no_load_optim=True, start_rollout_id=0)
    train, loads = failing(args, 2, save_before=7)
    with_restarts(train, args)
    assert loads == [("elsewhere", True, 0), (args.save, False, None), (args.save, False, None)]
    assert "checkpoint of rollout 7" in capsys.readouterr().out


def test_a_checkpoint_of_an_older_run_is_not_taken(tmp_path, capsys):
    args = make_args(tmp_path)
    write(args, 90, age=3600)
    train, loads = failing(args, 1)
    with_restarts(train, args)
    assert loads == [(None, False, None)] * 2 and "the beginning" in capsys.readouterr().out


def test_a_resumed_run_goes_on_from_what_it_resumed_from(tmp_path):
    args = make_args(tmp_path)
    write(args, 90, age=3600)
    args.load = args.save
    train, loads = failing(args, 1)
    with_restarts(train, args)
    assert loads == [(args.save, False, None)] * 2


@pytest.mark.parametrize(("allowed", "advice"), [(0, "--max-restarts"), (2, "died 3 times")])
def test_ends_when_no_restart_is_left(tmp_path, allowed, advice):
    args = make_args(tmp_path, max_restarts=allowed)
    train, loads = failing(args, 10)
    with pytest.raises(ProcessLost, match="a trainer rank.*died.*" + advice):
        with_restarts(train, args)
    assert len(loads) == allowed + 1


def test_other_errors_are_not_tried_again(tmp_path):
    calls = []

    def train(args):
        calls.append(1)
        raise DataError("the same would come again")

    with pytest.raises(DataError):
        with_restarts(train, make_args(tmp_path))
    assert len(calls) == 1
