"""How much of the optimizer's state visits the device at a time with --optimizer-cpu-offload (host_state.py). Imports nothing: the
planner counts these bytes, too."""

CHUNK_BYTES = 256 * 2**20  # of state; the device holds SLOTS of them during a step
SLOTS = 3
KINDS = ("main", "exp_avg", "exp_avg_sq")
STATE_BYTES = 4 * len(KINDS)  # of one parameter


def staging_bytes(chunk_bytes: int = CHUNK_BYTES, bf16_gradients: bool = False) -> int:
    """Most device memory that a step takes beside weights and gradients; none between steps."""
    return SLOTS * chunk_bytes + (chunk_bytes // len(KINDS) if bf16_gradients else 0)
