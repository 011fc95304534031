"""exp and log of the C library on arrays, to the last bit.

numpy's own vector exp and log may differ from the C library's (which Python's `math` calls) in the last bit. That is enough to break or
make a tie between two scores, so arrays in float64, the parity dtype of this package, go through here; float32 uses numpy's fast ones.
"""

import functools
import math

import numpy as np


@functools.cache
def _xlogy():
    """scipy's x * log(y), which takes log from the C library, or None: numpy alone is enough, only slower."""
    try:
        from scipy.special import xlogy
    except ImportError:
        return None
    return xlogy


def exp(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """exp(x) in the dtype of x, which is float32 or float64; -inf gives 0."""
    if x.dtype != np.float64:
        return np.exp(x, out=out)
    out = np.empty_like(x) if out is None else out
    # cexp(x + 0i) = exp(x) * (cos 0 + i sin 0), and numpy takes cexp from the C library. It is not defined for -inf + 0i everywhere.
    with np.errstate(invalid="ignore"):
        np.copyto(out, np.exp(x.astype(np.complex128)).real)
    out[x == -np.inf] = 0
    return out


def log(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """log(x) in the dtype of x, x > 0."""
    if x.dtype != np.float64:
        return np.log(x, out=out)
    xlogy = _xlogy()
    if xlogy is not None:
        return xlogy(1.0, x, out=out)
    out = np.empty_like(x) if out is None else out
    out[...] = np.fromiter(map(math.log, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)
    return out
