"""Runs triton_checks.py: on the GPU where there is one, else in Triton's interpreter."""

from pathlib import Path

from tests.helpers.triton_interpreter import needs_triton, run_checks


@needs_triton
def test_kernels_agree_with_torch():
    run_checks(Path(__file__).with_name("triton_checks.py"))
