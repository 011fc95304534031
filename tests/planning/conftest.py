import pytest
from plan_cases import RESULTS, script

from slime.planning.rates import load_rates


@pytest.fixture(scope="module")
def tool():
    return script("tools/plan_run.py")


@pytest.fixture
def rates():
    return load_rates(RESULTS / "rates.json")
