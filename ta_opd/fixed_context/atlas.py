"""A map of tokens in context: the student's last hidden states of a bank's positions in two dimensions, beside their scores.

Positions are matched to their scores by (sample_ordinal, tok_pos), never by the order of rows or files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context import hf
from ta_opd.fixed_context.bank import Contexts
from ta_opd.fixed_context.plots import new_figure
from ta_opd.fixed_context.scoring import make_batches
from ta_opd.fixed_context.tables import write_table

KEYS = ["sample_ordinal", "tok_pos"]
SHOWN = (("Hs_full_base", "student entropy H"), ("KLf_full_base", "divergence D"), ("Cmass_true_base", "compatibility C"), ("G_KLf_abs", "gain"))


@dataclass(frozen=True)
class AtlasConfig:
    """max_tokens: positions that are drawn (a seeded choice of all); max_tokens_per_batch: padded tokens of one forward pass."""

    max_tokens: int = 20000
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    max_tokens_per_batch: int = 16384
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.max_tokens < 3:
            raise ConfigError(f"max_tokens: expected at least 3 positions for a map, got {self.max_tokens}")


def contextual_embeddings(contexts: Contexts, model_dir, config: AtlasConfig) -> tuple[pd.DataFrame, np.ndarray]:
    """(positions, hidden states): a seeded choice of the bank's scored positions, KEYS and token_id in order, and [T, H] float32 states.

    The state of a position is the last hidden state that predicts its token. Raises DataError when the model cannot be loaded.
    """
    import torch

    device = hf.resolve_device(config.device)
    model = hf.CausalModel.load(model_dir, device=device, dtype=hf.resolve_dtype(config.dtype, device), trust_remote_code=config.trust_remote_code)
    lengths = np.asarray(contexts.scored_len)
    total = int(lengths.sum())
    chosen = np.sort(np.random.default_rng(config.seed).choice(total, min(config.max_tokens, total), replace=False))
    states = None
    targets = np.empty(total, np.int64)
    with torch.inference_mode():
        for batch in make_batches(contexts, range(len(contexts)), config.max_tokens_per_batch):
            hidden = model.hidden(torch.as_tensor(batch.ids).to(device))
            targets[batch.places] = batch.targets
            wanted = np.isin(batch.places, chosen)
            rows = hidden.reshape(-1, hidden.shape[-1])[torch.as_tensor(batch.rows[wanted]).to(device)].float().cpu().numpy()
            if states is None:
                states = np.empty((len(chosen), rows.shape[1]), np.float32)
            states[np.searchsorted(chosen, batch.places[wanted])] = rows
    model.free()
    positions = pd.DataFrame({"sample_ordinal": np.repeat(np.arange(len(contexts)), lengths), "tok_pos": np.concatenate([np.arange(n) for n in lengths])})
    return positions.assign(token_id=targets).iloc[chosen].reset_index(drop=True), states


def principal_plane(states_TH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([T, 2] coordinates, [2] share of variance) on the first two principal components; signs make the largest loading positive."""
    centred = states_TH - states_TH.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return centred @ axes, values[::-1][:2] / max(float(values.sum()), 1e-30)


def atlas(contexts: Contexts, model_dir, metrics: pd.DataFrame, config: AtlasConfig) -> tuple[pd.DataFrame, np.ndarray]:
    """(table, shares): chosen positions with x, y and every column of `metrics` that SHOWN names.

    Raises DataError when `metrics` lacks a position, repeats one, or disagrees about a token.
    """
    positions, states = contextual_embeddings(contexts, model_dir, config)
    plane, shares = principal_plane(states)
    columns = [name for name, _ in SHOWN if name in metrics] or [name.removesuffix("_base") for name, _ in SHOWN if name.removesuffix("_base") in metrics]
    missing = [name for name in (*KEYS, "token_id") if name not in metrics]
    if missing or not columns:
        raise DataError(f"metrics: expected {', '.join((*KEYS, 'token_id'))} and scores such as Hs_full, missing {missing or 'all scores'}")
    if metrics.duplicated(KEYS).any():
        raise DataError(f"metrics: expected every {' and '.join(KEYS)} once, {int(metrics.duplicated(KEYS).sum())} are repeated")
    table = positions.assign(x=plane[:, 0], y=plane[:, 1]).merge(metrics[[*KEYS, "token_id", *columns]], on=KEYS, how="left", suffixes=("", "_scored"))
    unknown = table["token_id_scored"].isna()
    if unknown.any() or (table["token_id"] != table["token_id_scored"]).any():
        raise DataError(f"metrics are of another bank: {int(unknown.sum())} positions are absent, {int((table['token_id'] != table['token_id_scored']).sum())} tokens differ")
    return table.drop(columns="token_id_scored"), shares


def write_atlas(table: pd.DataFrame, shares: np.ndarray, out: Path) -> list[Path]:
    """contextual_token_atlas.parquet and .png: one panel a quantity, colours between its 2 and 98 % quantiles."""
    out.mkdir(parents=True, exist_ok=True)
    written = [write_table(out / "contextual_token_atlas.parquet", table, {"variance_shares": [float(s) for s in shares]})]
    labels = dict(SHOWN) | {name.removesuffix("_base"): label for name, label in SHOWN}
    columns = [name for name in table if name in labels]
    figure, first = new_figure(4.4 * len(columns), 4.2)
    first.remove()
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(columns), sharex=True, sharey=True)), columns, strict=True):
        low, high = np.nanquantile(table[name], [0.02, 0.98])
        image = ax.scatter(table["x"], table["y"], c=table[name], s=5, lw=0, cmap="cividis", vmin=low, vmax=max(high, low + 1e-12), rasterized=True)
        ax.set(title=labels[name], xlabel=f"component 1 ({shares[0]:.0%} of the variance)", ylabel=f"component 2 ({shares[1]:.0%})" if ax is figure.axes[0] else "")
        figure.colorbar(image, ax=ax, shrink=0.8)
    path = out / "contextual_token_atlas.png"
    figure.savefig(path, dpi=130)
    return [*written, path]
