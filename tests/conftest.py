"""What every test of the tree starts from."""

import pytest

from ta_opd.selectors import registry


@pytest.fixture(autouse=True)
def own_selectors(monkeypatch):
    """A rule that one test registers is gone for the next."""
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
