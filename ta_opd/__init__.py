"""TA-OPD: which tokens of an on-policy distillation batch are worth teaching (arXiv 2605.26844).

Arrays in, arrays out: this package imports no engine.
"""

__version__ = "0.1.0"
