"""On-policy distillation of a group of runs at once: metrics, selection and losses are the project's own.

A step: every run samples responses to the same prompts with its own weights; one forward pass gives the hidden states to train and the
student's top-K; the teacher scores the responses of a few runs at a time, and meanwhile ta_opd's metrics and selection choose the tokens of
those already scored (choosing.py); the loss of slime.backends.megatron_utils.losses takes the kept rows of all runs in one call; one
backward pass and one Adam step for all. The host waits for the device twice before the loss, for lengths and for the scores.
Shapes as in stacked.py; L rows of one run: the positions that predict a response token, padded to the most that a run has; M kept rows of all runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from benchmarks.behaviour.choosing import Chooser, Rule
from benchmarks.behaviour.plan import Run
from benchmarks.behaviour.pretrain import ROLLOUT_SEED, autocast, padded, upload
from benchmarks.behaviour.sizes import Size
from benchmarks.behaviour.stacked import Stack, StackedAdam, flattened, pack
from examples.reasoning import corpus
from slime.backends.megatron_utils.losses.reduction import row_factors
from slime.backends.megatron_utils.losses.registry import get_loss
from slime.backends.megatron_utils.losses.types import Rows

TEACHER_SEQUENCES = 512  # of one forward pass of the teacher
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


@dataclass(frozen=True)
class Places:
    """The rows of a batch. index_RL: places in [B x (S - 1)]; lengths [R][B]: rows of every response; target_RL: the tokens they predict."""

    index_RL: Tensor
    lengths: list[list[int]]
    target_RL: Tensor

    @property
    def counts(self) -> list[int]:
        """Rows of every run."""
        return [sum(own) for own in self.lengths]

    def of(self, runs: slice) -> Places:
        return Places(self.index_RL[runs], self.lengths[runs], self.target_RL[runs])


class OnHost:
    """Tensors on their way to host memory: `arrays` waits for them, and for nothing that the device was given later."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._event = None
        if not next(iter(tensors.values())).is_cuda:
            self._tensors = tensors
            return
        self._tensors = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for name, t in tensors.items()}
        self._event = torch.cuda.Event()
        self._event.record()

    def arrays(self) -> dict[str, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return {name: t.numpy() for name, t in self._tensors.items()}


class Distiller:
    """teacher: a transformers model; chooser: for at least `size.group` runs."""

    def __init__(self, teacher, student, size: Size, device: torch.device, avoid: set, chooser: Chooser):
        self.student, self.size, self.device, self.avoid, self.chooser = student, size, device, avoid, chooser
        self.teacher = Stack.copies(teacher, 1, device)
        self.log = Log()

    def train(self, runs: Sequence[Run], on_rollout: Callable[[Stack, int], None] = lambda stack, rollout: None) -> Stack:
        """The stack after all rollouts. The runs share their loss and seed. on_rollout may raise to give the group up."""
        stack = Stack.copies(self.student, len(runs), self.device)
        rates = torch.tensor([run.lr for run in runs], device=self.device)
        optimizer = StackedAdam(stack.require_grad(), rates)
        generator = torch.Generator(self.device).manual_seed(1000 + runs[0].seed)
        for rollout in range(self.size.rollouts):
            self._step(stack, optimizer, runs, rollout, generator)
            on_rollout(stack, rollout)
        return stack

    def _step(self, stack: Stack, optimizer: StackedAdam, runs: Sequence[Run], rollout: int, generator) -> None:
        clock = time.perf_counter()
        prompts = [corpus.encode(p.prompt) for p in prompts_of(runs[0].seed, rollout, self.size, self.avoid)]
        ids_BP = padded(prompts, corpus.PAD_ID).to(self.device)
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        count = len(runs)
        with autocast(self.device):
            ids_RBS = stack.sample(ids_BP.expand(count, *ids_BP.shape), lengths_B.expand(count, -1), self.size.response, corpus.END_ID,
                                   corpus.PAD_ID, 1.0, generator)  # fmt: skip
        ids_RBS = ids_RBS[:, :, : int(ends_of(ids_RBS, lengths_B, self.size.response).max())].contiguous()
        clock = self._mark("generate", clock)
        places = self._places(ids_RBS, lengths_B)
        logits_RLV = self._logits(stack, self._hidden(stack, ids_RBS, lengths_B), places)
        student = _top(logits_RLV.detach(), places.target_RL, self.size.k)
        clock = self._mark("forward", clock)
        teacher, found = self._teach(runs, rollout, ids_RBS, lengths_B, places, student)
        clock = self._mark("teacher and select", clock)
        total, logged_R = self._loss(logits_RLV, runs, student, teacher, [weights for weights, _ in found])
        total.backward()
        norms = optimizer.step()
        for run, (_, means), loss, norm in zip(runs, found, logged_R.tolist(), norms, strict=True):
            self.log.rows.append({"run": run.name, "rollout": rollout, "loss": loss, "grad_norm": norm, **means})
        self._mark("train", clock)

    def _mark(self, stage: str, clock: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.log.time(stage, clock)

    def _places(self, ids_RBS: Tensor, lengths_B: Tensor) -> Places:
        """Of each run the positions that predict a response token, responses one after another."""
        slots = torch.arange(ids_RBS.shape[2] - 1, device=self.device)
        inside_RBS = (slots >= lengths_B[None, :, None] - 1) & (slots < ends_of(ids_RBS, lengths_B, self.size.response)[..., None] - 1)
        index_RL = pack(inside_RBS)
        return Places(index_RL, inside_RBS.sum(2).tolist(), ids_RBS[:, :, 1:].flatten(1).gather(1, index_RL))

    def _hidden(self, stack: Stack, ids_RBS: Tensor, lengths_B: Tensor) -> Tensor:
        """[R, B, S - 1, h] of the positions before each response's last token."""
        with autocast(self.device):
            return stack.hidden(ids_RBS[:, :, :-1], ends_of(ids_RBS, lengths_B, self.size.response) - 1)

    def _logits(self, stack: Stack, hidden: Tensor, places: Places) -> Tensor:
        """[R, L, V] at temperature 1, in float32 with every run's own head, as the losses do."""
        runs, batch, length, _ = hidden.shape
        rows = hidden.flatten(0, 2).index_select(0, flattened(places.index_RL, batch * length))
        return torch.bmm(rows.view(*places.index_RL.shape, -1).float(), stack.heads().transpose(1, 2))

    def _teach(self, runs: Sequence[Run], rollout: int, ids_RBS: Tensor, lengths_B: Tensor, places: Places, student: dict) -> tuple[dict, list]:
        """(the teacher's top-K [R, L, ..], (weights, means) of every run): runs are chosen for while the device scores the next ones."""
        host, step = OnHost(student), max(1, TEACHER_SEQUENCES // ids_RBS.shape[1])
        parts = [slice(begin, min(begin + step, len(runs))) for begin in range(0, len(runs), step)]
        scored = []
        for part in parts:
            found = self._teacher(ids_RBS[part], lengths_B, places.of(part))
            scored.append((found, OnHost(found)))
        self.chooser.put(0, "student", host.arrays())
        chosen: list[Future] = []
        for part, (_, arrays) in zip(parts, scored, strict=True):
            self.chooser.put(part.start, "teacher", arrays.arrays())
            for i in range(part.start, part.stop):
                rule = Rule(runs[i].arm.selector, runs[i].arm.budget, runs[i].seed, rollout)
                chosen.append(self.chooser.submit(i, rule, places.lengths[i]))
        teacher = {name: torch.cat([found[name] for found, _ in scored]) for name in scored[0][0]}
        return teacher, [future.result() for future in chosen]

    @torch.no_grad()
    def _teacher(self, ids_RBS: Tensor, lengths_B: Tensor, places: Places) -> dict[str, Tensor]:
        """Its top-K and log-probs of the sampled tokens, [R, L, ..]."""
        runs, batch, length = ids_RBS.shape
        together = ids_RBS.reshape(1, runs * batch, length)
        hidden = self._hidden(self.teacher, together, lengths_B.repeat(runs))
        rows = hidden.flatten(0, 2).index_select(0, flattened(places.index_RL, batch * (length - 1)))
        with autocast(self.device):
            logits = self.teacher.logits(rows[None])
        return _top(logits.view(*places.index_RL.shape, -1), places.target_RL, self.size.k)

    def _loss(self, logits_RLV: Tensor, runs: Sequence[Run], student: dict, teacher: dict, weights: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Sum over runs of their objectives, each a mean over kept tokens; and each one's value [R].

        The project's losses have one head for all their rows and here every run has its own: they are given logits with the identity for
        a head, which in float32 changes no bit of them, and the gradient goes on from the logits.
        """
        places, owners, given, factors = [], [], [], []
        for i, weight_L in enumerate(weights):
            kept = np.flatnonzero(weight_L > 0)
            own = weight_L[kept]
            places.append(kept + i * logits_RLV.shape[1])
            owners.append(np.full(len(kept), i))
            given.append(own)
            factors.append(row_factors("kept_token_mean", own, kept_tokens=float(own.sum()), valid_tokens=len(weight_L), num_samples=self.size.prompts).factor_R)
        kept_M, owner_M, weight_M, factor_M = (upload(torch.from_numpy(np.concatenate(x)), self.device) for x in (places, owners, given, factors))
        s, t = ({name: x.flatten(0, 1).index_select(0, kept_M) for name, x in side.items()} for side in (student, teacher))
        rows = Rows(target_R=s["target"].long(), weight_R=weight_M, factor_R=factor_M.float(), student_logp_old_R=s["logp"], teacher_logp_R=t["logp"],
                    teacher_ids_RK=t["ids"], teacher_logps_RK=t["logps"])  # fmt: skip
        identity = torch.eye(logits_RLV.shape[2], device=self.device)
        found = get_loss(runs[0].arm.loss)(logits_RLV.flatten(0, 1).index_select(0, kept_M), identity, rows, LOSS_ARGS)
        value_R = torch.zeros(len(runs), device=self.device).index_add_(0, owner_M, found.loss_R.detach() * rows.factor_R)
        return found.total, value_R


def ends_of(ids_RBS: Tensor, lengths_B: Tensor, response: int) -> Tensor:
    """[R, B] length of prompt and response, the end token included; a response that has no end is `response` tokens long."""
    slots = torch.arange(ids_RBS.shape[2], device=ids_RBS.device)
    ended = (ids_RBS == corpus.END_ID) & (slots >= lengths_B[None, :, None])
    return torch.where(ended.any(2), ended.int().argmax(2) + 1, (lengths_B + response).clamp(max=ids_RBS.shape[2]))


def _top(logits_RLV: Tensor, target_RL: Tensor, k: int) -> dict[str, Tensor]:
    """Top-K and the sampled token's log-prob."""
    logp = torch.log_softmax(logits_RLV, -1)
    logps, ids = logp.topk(k, -1)
    return {"ids": ids.int(), "logps": logps, "target": target_RL.int(), "logp": logp.gather(-1, target_RL[..., None])[..., 0]}
