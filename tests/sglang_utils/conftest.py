import pytest

from tests.sglang_utils.fake_server import FakeSGLang


@pytest.fixture
def fake():
    """Makes fake servers; all are stopped at the end."""
    made = []

    def make(**kwargs):
        made.append(FakeSGLang(**kwargs))
        return made[-1]

    yield make
    for server in made:
        server.stop()
