from pathlib import Path

import pytest

from tests.fixed_context.diagnostic_cases import VOCAB_S, VOCAB_T, make_bank, make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """student (padded vocabulary of 96), teacher (104, untied), trained (the student, moved a little)."""
    root = tmp_path_factory.mktemp("models")
    student = make_model(root / "student", VOCAB_S)
    return {
        "student": student,
        "teacher": make_model(root / "teacher", VOCAB_T, hidden=48, layers=3, seed=1, tie=False),
        "trained": make_model(root / "trained", VOCAB_S, noise_from=student, noise=0.03, seed=2),
    }


@pytest.fixture(scope="session")
def bank(tmp_path_factory) -> Path:
    return make_bank(tmp_path_factory.mktemp("bank") / "context_bank.parquet")
