"""What the losses read from the arguments; every attribute may be missing."""

from __future__ import annotations

from dataclasses import dataclass

from slime.backends.megatron_utils.losses.vocab_parallel import VocabShard
from ta_opd.errors import ConfigError


def option(args, name: str, default):
    """args.name, or the default when it is missing or None."""
    value = getattr(args, name, None)
    return default if value is None else value


def jsd_beta(args) -> float:
    """opd_jsd_beta, 0.5 unless given. Raises ConfigError outside (0, 1), where the JSD is 0 or a KL by another name."""
    beta = float(option(args, "opd_jsd_beta", 0.5))
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"expected 0 < opd_jsd_beta < 1, got {beta}; for the limits take a forward or reverse KL loss")
    return beta


@dataclass(frozen=True)
class HeadOptions:
    shard: VocabShard
    inv_temperature: float
    chunk_rows: int | None


def head_options(weight_VH, args, tp_group) -> HeadOptions:
    """Reads vocab_size (ids that exist; missing: no padding), rollout_temperature, loss_chunk_rows.

    Raises ConfigError when the temperature is not positive.
    """
    temperature = float(option(args, "rollout_temperature", 1.0))
    if not temperature > 0:
        raise ConfigError(f"expected rollout_temperature > 0 (log-probs are those of logits / temperature), "
                          f"got {temperature}; sample with a positive temperature to train")
    shard = VocabShard.of(weight_VH.shape[0], option(args, "vocab_size", None), tp_group)
    return HeadOptions(shard, 1.0 / temperature, option(args, "loss_chunk_rows", None))
