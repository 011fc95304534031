"""One pool of gloo workers, tiny models and dense references for all tests of the trainer."""

from __future__ import annotations

import functools

import mt_tiny
import pytest
from mt_pool import Pool


@pytest.fixture(scope="package")  # its idle workers poll; they end with the last test of this folder
def pool():
    workers = Pool(4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models(family, tied=False, **changes) -> folder of a tiny HF model, made once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(family: str, tied: bool = False, **changes):
        name = "_".join([family, "tied" if tied else "untied", *(f"{k}{v}" for k, v in changes.items())])
        return mt_tiny.make_model(root / name, family, tied, **changes)

    return make


@pytest.fixture(scope="session")
def references(models):
    """references(family, tied, loss, **options) -> the dense run of three steps on `data(seed)`."""
    import mt_reference

    @functools.cache
    def run(family: str, tied: bool, loss: str, seed: int = 0, teacher: str | None = None, **options):
        if teacher is not None:
            options["teacher"] = mt_reference.load(teacher)
        return mt_reference.run(models(family, tied), data(seed), loss, **options)

    return run


@functools.cache
def data(seed: int = 0) -> dict:
    return mt_tiny.make_data(seed)
