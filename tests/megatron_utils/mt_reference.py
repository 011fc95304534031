"""The dense reference: transformers and torch's AdamW in one process, whole logits, losses spelled out with autograd."""

from __future__ import annotations

import math

import mt_tiny
import numpy as np
import torch
import torch.nn.functional as F


def load(folder, dtype=torch.float32):
    from slime.backends.sglang_utils.cpu_support import install_torchvision_schema

    install_torchvision_schema()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def response_logits(model, data: dict, sample: int) -> torch.Tensor:
    """Logits that predict each response token, [L, V]."""
    tokens = torch.from_numpy(data["tokens"][sample].astype(np.int64))
    length = data["response_lengths"][sample]
    return model(tokens[None]).logits[0, len(tokens) - length - 1 : -1]


def targets(data: dict, sample: int) -> torch.Tensor:
    return torch.from_numpy(data["tokens"][sample][-data["response_lengths"][sample] :].astype(np.int64))


def divergence(kind: str, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of two log-prob tables [L, B] over the same events."""
    if kind == "reverse_kl":
        return (s.exp() * (s - t)).sum(1)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(1)
    middle = torch.logsumexp(torch.stack([s, t]) + math.log(0.5), 0)
    return 0.5 * (t.exp() * (t - middle)).sum(1) + 0.5 * (s.exp() * (s - middle)).sum(1)


def token_losses(
    logits: torch.Tensor, data: dict, sample: int, loss: str, support: str = "teacher", teacher=None, policy: tuple = ()
) -> torch.Tensor:
    """Loss of every response position, [L]. policy: (name, value) pairs of `sampled_loss`."""
    logp = logits.log_softmax(-1)
    take = lambda name: torch.from_numpy(data[name][sample]).to(logits.dtype)  # noqa: E731
    if loss == "sampled_reverse_kl":
        chosen = logp.gather(1, targets(data, sample)[:, None])[:, 0]
        base = take("advantages") if "advantages" in data else 0.0
        return sampled_loss(chosen, take("rollout_log_probs"), take("teacher_log_probs"), base, **dict(policy))
    if loss.startswith("full_"):
        return divergence(loss.removeprefix("full_"), logp, response_logits(teacher, data, sample).detach().log_softmax(-1))
    ids = torch.from_numpy(data[f"{support}_topk_ids"][sample].astype(np.int64))
    known = take("teacher_topk_logprobs" if support == "teacher" else "teacher_at_student_ids")
    outside = torch.ones_like(logp).scatter(1, ids, 0.0).bool()
    rest = torch.where(outside, logp, -torch.inf).logsumexp(1, keepdim=True)
    s = torch.cat([logp.gather(1, ids), rest], 1)
    t = torch.cat([known, torch.log1p(-known.exp().sum(1, keepdim=True))], 1)
    return divergence(loss.removeprefix("topk_"), s, t)


def sampled_loss(new, old, teacher, base, *, coef=1.0, low=0.2, high=0.2, dual=None, recompute=False) -> torch.Tensor:
    """The clipped policy loss of each sampled token."""
    signal = (new.detach() if recompute else old) - teacher
    out = []
    for advantage, ratio in zip(base - coef * signal, (new - old).exp(), strict=True):
        value = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        if dual is not None and advantage < 0:
            value = torch.min(value, -advantage * dual)
        out.append(value)
    return torch.stack(out)


def row_weights(data: dict, reduction: str) -> list[torch.Tensor]:
    """weight / denominator of every response position."""
    out, counts = [], mt_tiny.counts(data)
    for w in data["opd_weights"]:
        w = torch.from_numpy(w)
        if reduction == "sample_mean":
            out.append(w / max(float(w.sum()), 1e-30) / counts["num_samples"])
        else:
            out.append(w / counts["kept_tokens" if reduction == "kept_token_mean" else "valid_tokens"])
    return out


def objective(
    model, data: dict, loss: str, reduction: str = "kept_token_mean", support="teacher", teacher=None, policy=()
) -> torch.Tensor:
    total = torch.zeros(())
    for sample, weight in enumerate(row_weights(data, reduction)):
        losses = token_losses(response_logits(model, data, sample), data, sample, loss, support, teacher, policy)
        total = total + torch.where(weight != 0, losses * weight, 0.0).sum()
    return total


def run(
    folder, data: dict, loss: str, *, steps=3, lr=1e-3, clip=0.5, reduction="kept_token_mean", support="teacher", teacher=None, policy=()
):
    """Log-probs before, losses and gradient norms of each step, gradients of the first, weights after the last."""
    model = load(folder)
    with torch.no_grad():
        logps = [
            F.log_softmax(response_logits(model, data, i), -1).gather(1, targets(data, i)[:, None])[:, 0].numpy()
            for i in range(len(data["tokens"]))
        ]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5)
    out = {"log_probs": logps, "losses": [], "norms": []}
    for step in range(steps):
        adam.zero_grad()
        value = objective(model, data, loss, reduction, support, teacher, policy)
        value.backward()
        if step == 0:
            out["gradients"] = {n: p.grad.numpy().copy() for n, p in named.items()}
        out["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        out["losses"].append(float(value.detach()))
        adam.step()
    out["weights"] = {n: p.detach().numpy().copy() for n, p in named.items()}
    out["model"] = model
    return out
