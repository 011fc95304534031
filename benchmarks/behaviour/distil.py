"""On-policy distillation of a group of runs at once: metrics, selection and losses are the project's own.

A step: every run samples responses to the same prompts with its own weights; one forward pass gives the hidden states to train and the
student's top-K; the teacher scores all responses; ta_opd.metrics and ta_opd.selection choose each run's tokens (in worker processes);
the losses of slime.backends.megatron_utils.losses take the kept rows; one backward pass and one Adam step for all.
Shapes as in stacked.py; L rows of one run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from benchmarks.behaviour.plan import Run
from benchmarks.behaviour.pretrain import ROLLOUT_SEED, autocast, padded
from benchmarks.behaviour.sizes import Size
from benchmarks.behaviour.stacked import Stack, StackedAdam
from examples.reasoning import corpus
from slime.backends.megatron_utils.losses.reduction import row_factors
from slime.backends.megatron_utils.losses.registry import get_loss
from slime.backends.megatron_utils.losses.types import Rows
from ta_opd.metrics import token_metrics
from ta_opd.selection import SelectionConfig, select_tokens
from ta_opd.topk import TopK

TEACHER_TOKENS = 65_536  # of one forward pass of the teacher
LOSS_ARGS = SimpleNamespace(rollout_temperature=1.0, eps_clip=0.2, eps_clip_high=0.28)


@dataclass
class Log:
    """One row a run and rollout; seconds by stage of all groups."""

    rows: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now


def prompts_of(seed: int, rollout: int, size: Size, avoid: set) -> list[corpus.Problem]:
    """The prompts of a rollout: the same for every run of a seed, at any grouping."""
    rng, found = random.Random(f"{ROLLOUT_SEED} {seed} {rollout}"), []
    while len(found) < size.prompts:
        problem = corpus.make_problem(rng, corpus.TEACHER, size.level)
        if problem.prompt not in avoid:
            found.append(problem)
    return found


def choose(job: tuple) -> tuple[np.ndarray, dict]:
    """(weights [L], means) of one run's batch; runs in a worker. job: selector, budget, seed, rollout, and the arrays of the batch."""
    selector, budget, seed, rollout, a, keep_metrics = job
    student, teacher = TopK(a["student_ids"], a["student_logps"]), TopK(a["teacher_ids"], a["teacher_logps"])
    metrics = token_metrics(student, teacher, sampled_ids=a["sampled"], student_logprobs=a["student_logp"], teacher_logprobs=a["teacher_logp"],
                            response_lengths=a["lengths"])  # fmt: skip
    config = SelectionConfig(mask=selector, ratio=budget, seed=seed)
    valid = np.ones(len(a["sampled"]), bool)
    found = select_tokens(metrics, valid, a["lengths"], config, rollout_id=rollout, student=student, teacher=teacher, sampled_ids=a["sampled"])
    means = {name: float(np.mean(metrics[name])) for name in ("Hs_topk", "KLf_union", "Cmass", "sampled_reverse_kl")}
    kept = {f"{name}_kept": float(np.mean(metrics[name][found.keep])) for name in ("Cmass", "KLf_union")} if found.keep.any() else {}
    spread = {"Cmass_sd": float(np.std(metrics["Cmass"]))}
    return found.weights, {**means, **kept, **spread, "tokens": int(valid.sum()), "kept": int(found.keep.sum())} | (
        {"metrics": metrics} if keep_metrics else {})  # fmt: skip


class Distiller:
    """teacher: a transformers model; workers: processes for the selection, 0 for none."""

    def __init__(self, teacher, student, size: Size, device: torch.device, avoid: set, workers: int = 0):
        self.teacher, self.student, self.size, self.device, self.avoid = teacher, student, size, device, avoid
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
        self.log = Log()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def train(self, runs: list[Run], on_rollout: Callable[[Stack, int], None] = lambda stack, rollout: None) -> Stack:
        """The stack after all rollouts. The runs share their loss and seed."""
        stack = Stack.copies(self.student, len(runs), self.device)
        rates = torch.tensor([run.lr for run in runs], device=self.device)
        optimizer = StackedAdam(stack.require_grad(), rates)
        generator = torch.Generator(self.device).manual_seed(1000 + runs[0].seed)
        for rollout in range(self.size.rollouts):
            self._step(stack, optimizer, runs, rollout, generator)
            on_rollout(stack, rollout)
        return stack

    def _step(self, stack: Stack, optimizer: StackedAdam, runs: list[Run], rollout: int, generator) -> None:
        clock = time.perf_counter()
        prompts = [corpus.encode(p.prompt) for p in prompts_of(runs[0].seed, rollout, self.size, self.avoid)]
        ids_BP = padded(prompts, corpus.PAD_ID).to(self.device)
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        count = len(runs)
        with autocast(self.device):
            ids_RBS = stack.sample(ids_BP.expand(count, *ids_BP.shape), lengths_B.expand(count, -1), self.size.response, corpus.END_ID,
                                   corpus.PAD_ID, 1.0, generator)  # fmt: skip
        ids_RBS = ids_RBS[:, :, : int(_ends(ids_RBS, lengths_B).max())].contiguous()
        clock = self._mark("generate", clock)
        with autocast(self.device):
            hidden = stack.hidden(ids_RBS[:, :, :-1])
        rows = self._rows(ids_RBS, lengths_B)
        with torch.no_grad():
            student = self._student(stack, hidden.detach(), ids_RBS, rows)  # in float32, as the loss does
        clock = self._mark("forward", clock)
        teacher = self._teacher(ids_RBS, rows)
        clock = self._mark("teacher", clock)
        found = self._select(runs, rollout, rows, student, teacher)
        clock = self._mark("select", clock)
        total, logged = self._loss(stack, hidden, runs, rows, student, teacher, [weights for weights, _ in found])
        total.backward()
        norm_R = optimizer.step().tolist()
        for run, (_, means), loss, norm in zip(runs, found, logged, norm_R, strict=True):
            self.log.rows.append({"run": run.name, "rollout": rollout, "loss": loss, "grad_norm": norm, **means})
        self._mark("train", clock)

    def _mark(self, stage: str, clock: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.log.time(stage, clock)

    def _rows(self, ids_RBS: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """Of each run, the flat indices into [B, S - 1] of the positions that predict a response token, responses one after another."""
        slots = torch.arange(ids_RBS.shape[2] - 1, device=self.device)
        ends_RB = _ends(ids_RBS, lengths_B)
        inside = (slots >= lengths_B[None, :, None] - 1) & (slots < ends_RB[..., None] - 1)
        self._lengths = inside.sum(2).tolist()
        return [torch.nonzero(inside[run].flatten())[:, 0] for run in range(len(ids_RBS))]

    def _student(self, stack: Stack, hidden: Tensor, ids_RBS: Tensor, rows: list[Tensor]) -> list[dict[str, Tensor]]:
        """Top-K and log-prob of the sampled token, from the logits at temperature 1."""
        out = []
        for run, index in enumerate(rows):
            logits = hidden[run].flatten(0, 1)[index].float() @ stack.head(run).float().T
            out.append(_top(torch.log_softmax(logits.float(), -1), ids_RBS[run, :, 1:].flatten()[index], self.size.k))
        return out

    @torch.no_grad()
    def _teacher(self, ids_RBS: Tensor, rows: list[Tensor]) -> list[dict[str, Tensor]]:
        runs, batch, length = ids_RBS.shape
        flat, parts = ids_RBS.reshape(runs * batch, length)[:, :-1], []
        each = max(1, TEACHER_TOKENS // length)
        for begin in range(0, len(flat), each):
            with autocast(self.device):
                parts.append(self.teacher(input_ids=flat[begin : begin + each], use_cache=False).logits.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32))
        logits = torch.cat(parts).view(runs, batch * (length - 1), -1)
        return [_top(torch.log_softmax(logits[run][index].float(), -1), ids_RBS[run, :, 1:].flatten()[index], self.size.k) for run, index in enumerate(rows)]

    def _select(self, runs: list[Run], rollout: int, rows, student, teacher) -> list[tuple[np.ndarray, dict]]:
        jobs, bounds = [], np.cumsum([len(index) for index in rows])[:-1]
        sides = [{k: np.split(torch.cat([run[k] for run in side]).cpu().numpy(), bounds) for k in side[0]} for side in (student, teacher)]
        for i, run in enumerate(runs):
            s, t = ({k: v[i] for k, v in side.items()} for side in sides)
            arrays = {"student_ids": s["ids"], "student_logps": s["logps"], "teacher_ids": t["ids"], "teacher_logps": t["logps"], "sampled": s["target"],
                      "student_logp": s["logp"], "teacher_logp": t["logp"], "lengths": np.array(self._lengths[i])}  # fmt: skip
            jobs.append((run.arm.selector, run.arm.budget, run.seed, rollout, arrays, False))
        if self.pool is None:
            return [choose(job) for job in jobs]
        return list(self.pool.map(choose, jobs, chunksize=max(1, len(jobs) // 32)))

    def _loss(self, stack: Stack, hidden: Tensor, runs: list[Run], rows, student, teacher, weights) -> tuple[Tensor, list[float]]:
        """Sum over runs of their objectives, each a mean over kept tokens; and each one's value."""
        totals, hiddens, heads = [], hidden.unbind(0), stack.heads()
        for i, run in enumerate(runs):
            weight_L = torch.as_tensor(weights[i], device=self.device)
            kept = torch.nonzero(weight_L > 0)[:, 0]
            s, t = student[i], teacher[i]
            weight_R = weight_L[kept]
            reduction = row_factors("kept_token_mean", weight_R, kept_tokens=float(weight_R.sum()), valid_tokens=len(weight_L), num_samples=self.size.prompts)
            given = Rows(
                target_R=s["target"][kept].long(), weight_R=weight_R, factor_R=reduction.factor_R.float(), student_logp_old_R=s["logp"][kept],
                teacher_logp_R=t["logp"][kept], teacher_ids_RK=t["ids"][kept], teacher_logps_RK=t["logps"][kept],
            )  # fmt: skip
            rows_Rh = hiddens[i].flatten(0, 1)[rows[i][kept]]
            totals.append(get_loss(run.arm.loss)(rows_Rh.float(), heads[i], given, LOSS_ARGS).total)
        return torch.stack(totals).sum(), [float(x) for x in torch.stack(totals).detach()]


def _ends(ids_RBS: Tensor, lengths_B: Tensor) -> Tensor:
    """[R, B] length of prompt and response, the end token included."""
    slots = torch.arange(ids_RBS.shape[2], device=ids_RBS.device)
    behind = slots >= lengths_B[None, :, None]
    ended = (ids_RBS == corpus.END_ID) & behind
    return torch.where(ended.any(2), ended.int().argmax(2) + 1, ids_RBS.shape[2])


def _top(logp_LV: Tensor, target_L: Tensor, k: int) -> dict[str, Tensor]:
    logps, ids = logp_LV.topk(k, -1)
    return {"ids": ids.int(), "logps": logps, "target": target_L.int(), "logp": logp_LV.gather(1, target_L[:, None])[:, 0]}
