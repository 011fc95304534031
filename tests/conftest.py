"""What every test of the tree starts from, and how tests are shared out to several processes (scripts/test.sh)."""

from pathlib import Path

import pytest

from ta_opd.selectors import registry

HERE = Path(__file__).parent
ONE_POOL = "tests/megatron_utils/"  # its files share one pool of gloo workers; two of them would only be in each other's way


@pytest.fixture(autouse=True)
def own_selectors(monkeypatch):
    """A rule that one test registers is gone for the next."""
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE / "e2e" in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For -n N --dist loadfile: a file stays in one process, and so do all files that share a pool."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ONE_POOL if nodeid.startswith(ONE_POOL) else super()._split_scope(nodeid)

    return Files(config, log)
