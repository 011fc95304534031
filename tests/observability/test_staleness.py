"""How old the weights were that sampled what is trained."""

import pytest

from slime.observability.metrics import staleness
from slime.utils.types import Sample


def sample(rollout_id, *versions):
    return Sample(rollout_id=rollout_id, weight_versions=[list(v) for v in versions], response_length=sum(n for _, n in versions))


def test_mean_over_tokens_and_the_oldest():
    # a fresh response of 10 tokens; one of which 6 tokens were sampled two steps ago and 4 now
    found = staleness([sample(5, ("5", 10)), sample(5, ("3", 6), ("5", 4))])
    assert found == {"rollout/staleness": pytest.approx(12 / 20), "rollout/staleness_max": 2.0}


def test_nothing_is_said_where_versions_are_not_known():
    assert staleness([]) == {}
    assert staleness([sample(3, ("default", 4)), sample(None, ("1", 4)), sample(3)]) == {}
