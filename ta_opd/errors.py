"""Errors of the project: one root, and every subclass also is the standard exception a caller would expect.

All take a single message, so they survive pickling between Ray processes. A message says what was expected, what came,
and what to do.
"""


class TaOpdError(Exception):
    """Root of every error that the project raises on purpose."""


class ConfigError(TaOpdError, ValueError):
    """A flag, variable or configuration file asks for something that cannot be run."""


class DataError(TaOpdError, ValueError):
    """Input data (prompts, replies, banks, checkpoints) is missing, malformed or does not match."""


class ServiceError(TaOpdError, RuntimeError):
    """A server or actor did not start, answered wrongly, or died."""


class NumericsError(TaOpdError, ArithmeticError):
    """A loss, gradient or metric is not finite where it must be."""
