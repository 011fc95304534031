"""Dense references for the losses: plain autograd on float64 logits of the whole vocabulary, one process."""

import math

import torch


def dense_logps(hidden, weight, vocab_size, temperature):
    return torch.log_softmax(hidden @ weight[:vocab_size].t() / temperature, dim=1)


def divergence(kind, s, t, beta=0.5):
    """Of two [R, B] log-prob tables over the same events; -inf entries carry no mass."""
    p, q = s.exp(), t.exp()

    def product(mass, a, b):
        ok = mass > 0
        return torch.where(ok, mass * (torch.where(ok, a, 0.0) - torch.where(ok, b, 0.0)), 0.0)

    if kind == "reverse_kl":
        return product(p, s, t).sum(1)
    if kind == "forward_kl":
        return product(q, t, s).sum(1)
    m = torch.logsumexp(torch.stack([t + math.log(beta), s + math.log(1 - beta)]), 0)
    return (beta * product(q, t, m) + (1 - beta) * product(p, s, m)).sum(1)


def sampled(logps, rows, coef=1.0, eps=0.2, eps_high=None, eps_c=None, recompute=False):
    logp = logps.gather(1, rows.target_R[:, None])[:, 0]
    old, teacher = rows.student_logp_old_R.double(), rows.teacher_logp_R.double()
    advantage = -coef * ((logp.detach() if recompute else old) - teacher)
    if rows.advantage_R is not None:
        advantage = advantage + rows.advantage_R.double()
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high))
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if eps_c is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * eps_c), loss)
    return loss


def topk(logps, ids, teacher_logps, kind, beta=0.5, tail=True):
    """ids with -1 or a NaN teacher log-prob are merged into the tail event, row by row."""
    out = []
    vocab = logps.shape[1]
    for row, row_ids, row_teacher in zip(logps, ids.tolist(), teacher_logps.double(), strict=True):
        kept = [k for k, i in enumerate(row_ids) if 0 <= i < vocab and bool(torch.isfinite(row_teacher[k]))]
        support = torch.tensor([row_ids[k] for k in kept], dtype=torch.long)
        s, t = row[support], row_teacher[kept]
        off = torch.ones(vocab, dtype=torch.bool)
        off[support] = False
        if tail and off.any():
            s = torch.cat([s, torch.logsumexp(row[off], 0)[None]])
            rest = max(1.0 - float(t.exp().sum()), 2.0**-24)
            t = torch.cat([t, torch.tensor([math.log(rest)], dtype=torch.float64)])
        out.append(divergence(kind, s[None], t[None], beta)[0])
    return torch.stack(out) if out else logps.sum(1)


def fill_from_list(ids, logps, listed_ids, listed_logps):
    """Unknown (NaN) teacher log-probs looked up in the teacher's own list, entry by entry."""
    out = logps.clone()
    for r in range(ids.shape[0]):
        listed = dict(zip(listed_ids[r].tolist(), listed_logps[r].tolist(), strict=True))
        for k, token in enumerate(ids[r].tolist()):
            if token >= 0 and out[r, k].isnan() and token in listed:
                out[r, k] = listed[token]
    return out
