"""Which servers start together: those that share a GPU take turns, all others do not wait."""

import pytest

from slime.ray.servers import Managed, in_turn


def servers(*slots: list[int]) -> list[Managed]:
    return [Managed("student", f"s{i}", "m", s) for i, s in enumerate(slots)]


@pytest.mark.parametrize(
    "slots, expected",
    [
        ([[0], [0]], [["s0"], ["s1"]]),
        ([[0], [1], [0], [1]], [["s0", "s1"], ["s2", "s3"]]),
        ([[0, 1], [2, 3], [0], [1], [2, 3]], [["s0", "s1"], ["s2", "s3", "s4"]]),
        ([[1], [2]], [["s0", "s1"]]),
        ([[0], [0, 1], [1]], [["s0"], ["s1"], ["s2"]]),
        ([], []),
    ],
)
def test_servers_that_share_a_slot_take_turns(slots, expected):
    assert [[s.name for s in batch] for batch in in_turn(servers(*slots))] == expected
