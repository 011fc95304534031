"""What the losses read from the arguments; every attribute may be missing."""

from __future__ import annotations

from dataclasses import dataclass

from slime.backends.megatron_utils.losses.vocab_parallel import VocabShard
from ta_opd.errors import ConfigError


def option(args, name: str, default):
    """args.name, or the default when it is missing or None."""
    value = getattr(args, name, None)
    return default if value is None else value


@dataclass(frozen=True)
class HeadOptions:
    shard: VocabShard
    inv_temperature: float
    chunk_rows: int | None


def head_options(weight_VH, args, tp_group) -> HeadOptions:
    """Reads vocab_size (ids that exist; missing: no padding), rollout_temperature, opd_loss_chunk_rows.

    Raises ConfigError when the temperature is not positive.
    """
    temperature = float(option(args, "rollout_temperature", 1.0))
    if not temperature > 0:
        raise ConfigError(f"expected rollout_temperature > 0 (log-probs are those of logits / temperature), "
                          f"got {temperature}; sample with a positive temperature to train")
    shard = VocabShard.of(weight_VH.shape[0], option(args, "vocab_size", None), tp_group)
    return HeadOptions(shard, 1.0 / temperature, option(args, "opd_loss_chunk_rows", None))
