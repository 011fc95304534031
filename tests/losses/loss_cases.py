"""Cases of the parity tests, and one run of a case on one rank of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import loss_reference as reference
import torch

from slime.backends.megatron_utils.losses.exact_stats import exact_stats
from slime.backends.megatron_utils.losses.registry import LOSS_TYPES, get_loss
from slime.backends.megatron_utils.losses.types import Rows
from slime.backends.megatron_utils.losses.vocab_parallel import reshard_vocab

TOLERANCE = 1e-5
BF16_TOLERANCE = 0.04
H, TEACHER_H = 24, 16


@dataclass(frozen=True)
class Case:
    loss: str
    rows: int = 13
    vocab: int = 61  # not a multiple of any world size: the last shard is padded, or holds no id at all
    teacher_vocab: int | None = None
    per_rank: int | None = None  # rows of a shard; None: ceil(vocab / world)
    chunk: int | None = 7
    temperature: float = 1.0
    factor: bool = True
    k: int = 6
    support: str = "teacher"
    recompute: bool = False
    advantage: bool = False
    eps_c: float | None = None
    coef: float = 1.0
    beta: float = 0.5
    scale: float = 0.6  # of the weight: how peaked the student is
    double: bool = False  # f64 inputs: where rounding of peaked f32 logits would hide an error of the method

    @property
    def name(self) -> str:
        changed = [f"{f}={getattr(self, f)}" for f in self.__dataclass_fields__ if f != "loss"
                   and getattr(self, f) != self.__dataclass_fields__[f].default]
        return "-".join([self.loss, *changed])


def make_cases() -> list[Case]:
    cases = []
    for loss in LOSS_TYPES:
        cases += [
            Case(loss),
            Case(loss, factor=False, chunk=1, temperature=0.7, coef=0.5),
            Case(loss, chunk=100, temperature=1.3),
            Case(loss, rows=0),
            Case(loss, rows=0, factor=False),
            Case(loss, rows=1, chunk=None),
            Case(loss, per_rank=64, rows=5),  # from two ranks on, ranks without any id
            Case(loss, scale=2.0, double=True),
        ]
        if loss.startswith("topk"):
            cases += [
                Case(loss, support="student"),
                Case(loss, support="student", factor=False, temperature=0.9, chunk=5),
                Case(loss, k=61),
                Case(loss, k=1),
                Case(loss, teacher_vocab=80, k=12),
            ]
        if loss.startswith("full"):
            cases += [Case(loss, teacher_vocab=80), Case(loss, teacher_vocab=40, factor=False)]
        if loss.endswith("jsd"):
            cases += [Case(loss, beta=0.1), Case(loss, beta=0.9, factor=False)]
        if loss.startswith("sampled"):
            cases += [
                Case(loss, recompute=True),
                Case(loss, advantage=True, factor=False),
                Case(loss, advantage=True, eps_c=3.0, scale=2.0, double=True),
            ]
    return cases


CASES = {case.name: case for case in make_cases()}
EXACT_STATS = ((13, 5), (13, None), (0, None))


def _data(case: Case) -> dict:
    """Whole, unsharded f32 tensors of a case; the same on every rank."""
    g = torch.Generator().manual_seed(hash((case.rows, case.vocab, case.k)) % 2**31)
    teacher_vocab = case.teacher_vocab or case.vocab
    hidden = torch.randn(case.rows, H, generator=g)
    weight = torch.randn(case.vocab, H, generator=g) * case.scale
    teacher_hidden = torch.randn(case.rows, TEACHER_H, generator=g)
    teacher_weight = torch.randn(teacher_vocab, TEACHER_H, generator=g) * 0.6
    teacher_logps = torch.log_softmax((teacher_hidden @ teacher_weight.t()).double(), 1)
    student_logps = reference.dense_logps(hidden.double(), weight.double(), case.vocab, case.temperature)
    target = torch.randint(0, min(case.vocab, teacher_vocab), (case.rows,), generator=g)
    noise = torch.randn(case.rows, generator=g) * 0.3
    top = teacher_logps.topk(min(case.k, teacher_vocab), 1)
    student_ids = student_logps.topk(min(case.k, case.vocab), 1).indices
    at_student = teacher_logps.gather(1, student_ids.clamp(max=teacher_vocab - 1)).float()
    at_student[torch.rand(at_student.shape, generator=g) < 0.3] = torch.nan
    teacher_ids, teacher_top = top.indices.clone(), top.values.float()
    if case.rows > 2 and 1 < case.k < case.vocab:  # a row whose list came back short, and one that came back empty
        teacher_ids[1, case.k // 2 :], teacher_top[1, case.k // 2 :] = -1, -torch.inf
        teacher_ids[2], teacher_top[2] = -1, -torch.inf
        student_ids[1, case.k // 2 :], at_student[1, case.k // 2 :] = -1, torch.nan
    factor = torch.rand(case.rows, generator=g) * (torch.rand(case.rows, generator=g) < 0.8)
    return dict(
        hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, factor=factor,
        rows=dict(
            target_R=target,
            student_logp_old_R=student_logps.gather(1, target[:, None])[:, 0].float() + noise,
            teacher_logp_R=teacher_logps.gather(1, target[:, None])[:, 0].float(),
            advantage_R=torch.randn(case.rows, generator=g) if case.advantage else None,
            teacher_ids_RK=teacher_ids, teacher_logps_RK=teacher_top,
            student_ids_RK=student_ids, teacher_at_student_RK=at_student,
        ),
    )


def _reference(case: Case, data: dict, rows: Rows):
    hidden, weight = data["hidden"].double().requires_grad_(), data["weight"].double().requires_grad_()
    vocab = case.vocab
    if case.loss.startswith("full"):
        vocab = min(case.vocab, case.teacher_vocab or case.vocab)
    logps = reference.dense_logps(hidden, weight, vocab, case.temperature)
    if case.loss == "sampled_reverse_kl":
        loss = reference.sampled(logps, rows, case.coef, 0.2, 0.28, case.eps_c, case.recompute)
    elif case.loss.startswith("topk"):
        kind = case.loss.removeprefix("topk_").removesuffix("_truncated")
        ids, teacher = rows.teacher_ids_RK, rows.teacher_logps_RK
        if case.support == "student":
            ids, teacher = rows.student_ids_RK, reference.fill_from_list(
                rows.student_ids_RK, rows.teacher_at_student_RK, rows.teacher_ids_RK, rows.teacher_logps_RK)
        loss = case.coef * reference.topk(logps, ids, teacher, kind, case.beta, not case.loss.endswith("_truncated"))
    else:
        teacher = reference.dense_logps(data["teacher_hidden"].double(), data["teacher_weight"].double(), vocab,
                                        case.temperature)
        loss = case.coef * reference.divergence(case.loss.removeprefix("full_"), logps, teacher, case.beta)
    (loss * data["factor"].double()).sum().backward()
    return loss.detach(), hidden.grad, weight.grad, logps.detach()


def _padded(weight, rows_per_rank, world):
    """Padding is filled with large values: if a padded id entered a softmax, everything would be wrong."""
    out = torch.full((rows_per_rank * world, weight.shape[1]), 50.0)
    out[: weight.shape[0]] = weight
    return out


def _error(got, expected, scale=None, norm=False) -> float:
    """Largest difference over the largest expected entry (or `scale`); with `norm`, norms instead. inf where not finite."""
    got, expected = got.detach().double().cpu(), expected.double().cpu()
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    if got.numel() == 0:
        return 0.0
    size = torch.linalg.vector_norm if norm else (lambda x: x.abs().max())
    return float(size(got - expected) / (size(expected) if scale is None else size(scale)).clamp(min=1e-3))


def run_case(case: Case, rank: int, world: int, group, device="cpu", dtype=torch.float32) -> dict[str, float]:
    """Relative errors of loss, gradients and statistics against the dense reference.

    In bf16 the reference gets the rounded inputs too, and errors are norms of differences over norms.
    """
    data, norm = _data(case), dtype == torch.bfloat16
    heads = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    data |= {name: data[name].to(dtype).float() for name in heads}
    kind = torch.float64 if case.double else dtype

    per_rank = case.per_rank or -(-case.vocab // world)
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    hidden = data["hidden"].to(device, kind, copy=True).requires_grad_()
    weight = _padded(data["weight"], per_rank, world)[own].to(device, kind, copy=True).requires_grad_()
    rows = Rows(**{name: None if value is None else value.to(device) for name, value in data["rows"].items()})
    if case.loss.startswith("full"):
        teacher_rows = -(-data["teacher_weight"].shape[0] // world)
        teacher = _padded(data["teacher_weight"], teacher_rows, world)[rank * teacher_rows : (rank + 1) * teacher_rows]
        rows.teacher_weight_VH = reshard_vocab(teacher.to(device, kind), per_rank, group)
        rows.teacher_hidden_RH = data["teacher_hidden"].to(device, kind)
    factor = data["factor"].to(device, torch.promote_types(kind, torch.float32))
    rows.factor_R = factor if case.factor else None
    args = SimpleNamespace(
        vocab_size=case.vocab, teacher_vocab_size=case.teacher_vocab, rollout_temperature=case.temperature,
        loss_chunk_rows=case.chunk, opd_topk_support=case.support, opd_recompute_student=case.recompute, eps_clip=0.2,
        eps_clip_high=0.28, eps_clip_c=case.eps_c, opd_kl_coef=case.coef, opd_jsd_beta=case.beta)
    out = get_loss(case.loss)(hidden, weight, rows, args, group)
    total = out.total if case.factor else (out.loss_R * factor).sum()
    total.backward()

    loss, grad_hidden, grad_weight, logps = _reference(case, data, Rows(**data["rows"]))
    padded = torch.zeros(per_rank * world, H, dtype=torch.float64)
    padded[: case.vocab] = grad_weight
    weighted = loss * data["factor"]
    errors = {
        "loss": _error(out.loss_R, loss, norm=norm),
        "total": float((total.detach().cpu() - weighted.sum()).abs() / weighted.abs().sum().clamp(min=1e-3)),
        "grad_hidden": _error(hidden.grad, grad_hidden, norm=norm),
        "grad_weight": _error(weight.grad, padded[own], scale=grad_weight, norm=norm),
    }
    if case.rows:
        target = data["rows"]["target_R"]
        inside = target < logps.shape[1]
        target_logps = logps.gather(1, target.clamp(max=logps.shape[1] - 1)[:, None])[:, 0]
        errors["entropy"] = _error(out.stats["entropy"], -(logps.exp() * logps).sum(1), norm=norm)
        errors["student_logp"] = _error(out.stats["student_logp"].cpu()[inside], target_logps[inside], norm=norm)
    return errors


def run_exact_stats(rows: int, chunk: int | None, rank: int, world: int, group, device="cpu") -> dict[str, float]:
    case = Case("full_reverse_kl", rows=rows, teacher_vocab=80, temperature=0.8)
    data = _data(case)
    per_rank, teacher_rows, k = -(-case.vocab // world), -(-80 // world), 7
    weight = _padded(data["weight"], per_rank, world)[rank * per_rank : (rank + 1) * per_rank]
    teacher = _padded(data["teacher_weight"], teacher_rows, world)[rank * teacher_rows : (rank + 1) * teacher_rows]
    target = data["rows"]["target_R"]
    teacher = reshard_vocab(teacher.to(device), per_rank, group)
    out = exact_stats(data["hidden"].to(device), weight.to(device), data["teacher_hidden"].to(device), teacher, k=k,
                      tp_group=group, vocab_size=61, teacher_vocab_size=80, temperature=0.8, target_R=target.to(device),
                      chunk_rows=chunk)
    s = reference.dense_logps(data["hidden"].double(), data["weight"].double(), 61, 0.8)
    t = reference.dense_logps(data["teacher_hidden"].double(), data["teacher_weight"].double(), 61, 0.8)
    top = s.topk(k, 1)
    if rows == 0:
        return {"shape": float(out.H.shape != (0,) or out.student_ids_RK.shape != (0, k))}
    return {
        "H": _error(out.H, -(s.exp() * s).sum(1)),
        "KLf": _error(out.KLf, reference.divergence("forward_kl", s, t)),
        "KLr": _error(out.KLr, reference.divergence("reverse_kl", s, t)),
        "C": _error(out.C, t.exp().gather(1, top.indices).sum(1)),
        "student_ids": float((out.student_ids_RK.cpu() != top.indices).any()),
        "teacher_ids": float((out.teacher_ids_RK.cpu() != t.topk(k, 1).indices).any()),
        "student_logps": _error(out.student_logps_RK, top.values),
        "teacher_logps": _error(out.teacher_logps_RK, t.topk(k, 1).values),
        "teacher_at_student": _error(out.teacher_at_student_RK, t.gather(1, top.indices)),
        "student_logp": _error(out.student_logp_R, s.gather(1, target[:, None])[:, 0]),
        "teacher_logp": _error(out.teacher_logp_R, t.gather(1, target[:, None])[:, 0]),
    }


def run_all(rank: int, world: int, group, device="cpu") -> dict[str, dict[str, float]]:
    """Every case on this rank; on a GPU also those that are not about f32 rounding in bf16."""
    results = {name: run_case(case, rank, world, group, device) for name, case in CASES.items()}
    for rows, chunk in EXACT_STATS:
        results[f"exact_stats-rows={rows}-chunk={chunk}"] = run_exact_stats(rows, chunk, rank, world, group, device)
    if device != "cpu":
        for name, case in CASES.items():
            if not case.double:
                results[f"bf16-{name}"] = run_case(case, rank, world, group, device, torch.bfloat16)
    return results
