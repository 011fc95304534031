"""exp and log equal Python's math to the last bit in float64, and the method library imports no more than numpy."""

import math
import subprocess
import sys

import numpy as np
import pytest

from ta_opd import libm


def test_float64_is_the_c_library():
    x = -np.random.default_rng(0).exponential(4, 20_000)
    p = libm.exp(x)
    np.testing.assert_array_equal(p, [math.exp(v) for v in x.tolist()])
    np.testing.assert_array_equal(libm.log(p), [math.log(v) for v in p.tolist()])
    assert libm.exp(np.array([-np.inf, 0.0])).tolist() == [0.0, 1.0]


def test_without_scipy_the_same_bits(monkeypatch):
    p = np.random.default_rng(1).random((7, 30))
    with_scipy, out = libm.log(p), np.empty_like(p)
    monkeypatch.setattr(libm, "_xlogy", lambda: None)
    assert libm.log(p, out=out) is out
    np.testing.assert_array_equal(out, with_scipy)


@pytest.mark.parametrize("function", [libm.exp, libm.log])
def test_float32_stays_float32(function):
    x = np.linspace(0.1, 1, 9, dtype=np.float32)
    out = np.empty_like(x)
    assert function(x, out=out) is out and function(x).dtype == np.float32


def test_the_method_needs_numpy_only():
    code = (
        "import sys; import ta_opd.selection, ta_opd.metrics, ta_opd.topk; "
        "print([m for m in ('scipy', 'pandas', 'pyarrow', 'torch', 'orjson', 'slime', 'sglang', 'ray', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
