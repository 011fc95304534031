"""Stand-in for SGLang's compiled kernels: a dense model on a CPU without AMX imports their names and calls none."""

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU version")

    missing.__name__ = name
    return missing
