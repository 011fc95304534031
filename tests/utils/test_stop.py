"""SIGTERM by the stage that a run is in."""

import os
import signal

import pytest

from slime.utils.stop import StopRequest


@pytest.fixture
def stop():
    made = []

    def make(can_save, stage):
        request = StopRequest(can_save)
        request.install()
        request.stage = stage
        made.append(request)
        return request

    held = signal.getsignal(signal.SIGTERM)
    yield make
    for request in made:
        request.restore()
    assert signal.getsignal(signal.SIGTERM) is held


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_one_asks_and_the_second_one_aborts(stop):
    request = stop(True, "rollouts")
    term()
    assert request.asked and not request.aborted
    with pytest.raises(KeyboardInterrupt):
        term()
    assert request.aborted


@pytest.mark.parametrize(("can_save", "stage"), [(False, "rollouts"), (True, "starting"), (False, "starting")])
def test_where_nothing_can_be_saved_it_aborts_at_once(stop, can_save, stage):
    request = stop(can_save, stage)
    with pytest.raises(KeyboardInterrupt):
        term()
    assert request.aborted and not request.asked


def test_while_processes_are_stopped_it_does_nothing(stop):
    request = stop(True, "rollouts")
    request.ignore()
    term()
    assert not request.asked and not request.aborted
