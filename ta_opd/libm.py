"""exp and log of the C library on arrays, to the last bit.

numpy's own vector exp and log may differ from the C library's (which Python's `math` calls) in the last bit. That is enough to break or
make a tie between two scores, so arrays in float64, the parity dtype of this package, go through here; float32 uses numpy's fast ones.
"""

import math

import numpy as np

try:
    from scipy.special import xlogy as _xlogy
except ImportError:  # scipy is not needed by the port to a stock slime
    _xlogy = None


def exp(x: np.ndarray) -> np.ndarray:
    """exp(x) in the dtype of x, which is float32 or float64; -inf gives 0."""
    if x.dtype != np.float64:
        return np.exp(x)
    # cexp(x + 0i) = exp(x) * (cos 0 + i sin 0), and numpy takes cexp from the C library. It is not defined for -inf + 0i everywhere.
    with np.errstate(invalid="ignore"):
        return np.where(x == -np.inf, 0.0, np.exp(x.astype(np.complex128)).real)


def log(x: np.ndarray) -> np.ndarray:
    """log(x) in the dtype of x, x > 0."""
    if x.dtype != np.float64:
        return np.log(x)
    if _xlogy is not None:
        return _xlogy(1.0, x)
    return np.fromiter(map(math.log, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)
