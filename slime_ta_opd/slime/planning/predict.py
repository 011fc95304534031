"""One step of the loop under one split of the GPUs: seconds by phase, bytes by role, and what passes through one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from slime.planning import memory, serving, training
from slime.planning.layout import Layout, Split
from slime.planning.memory import GIB, TrainerMemory
from slime.planning.models import BF16, Model
from slime.planning.rates import Gpu, Rates
from slime.planning.workload import Workload
from ta_opd.errors import ConfigError

PHASES = ("generate", "score", "select", "split", "train", "sync")
_CACHE_FOR_TEACHER = 0.2  # of what weights leave, where both servers share a GPU


@dataclass(frozen=True)
class Machine:
    gpu: Gpu
    gpus: int
    per_node: int = 8

    def __post_init__(self):
        if self.gpus < 1 or self.per_node < 1:
            raise ConfigError(f"gpus: expected at least 1 (and 1 a node), got {self.gpus} and {self.per_node}")


@dataclass(frozen=True)
class Task:
    student: Model
    teacher: Model
    work: Workload
    machine: Machine
    rates: Rates

    def __post_init__(self):
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            if self.work.k > model.shape.vocab_size:
                raise ConfigError(f"k: expected at most the {role}'s vocabulary of {model.shape.vocab_size}, got {self.work.k}")


@dataclass(frozen=True)
class Middle:
    """The rollout manager, one process: seconds of its one core, bytes. parse (with the metrics) and bank run beside other phases."""

    parse: float
    select: float
    split: float
    bank: float
    reply_bytes: float
    ship_bytes: float
    bank_bytes: float
    held_bytes: float


@dataclass(frozen=True)
class Prediction:
    split: Split
    seconds: dict[str, float]
    bytes_by_role: dict[str, float]
    generate: serving.GenerateSeconds
    score: serving.ScoreSeconds
    train: training.TrainSeconds
    middle: Middle
    trainer: TrainerMemory
    busy: float
    problems: tuple[str, ...] = field(default=())
    asynchronous: bool = False

    @property
    def total(self) -> float:
        """Seconds of a step. Asynchronous: the rollout and the training beside it, then the sync."""
        if not self.asynchronous:
            return sum(self.seconds.values())
        made = sum(self.seconds[p] for p in ("generate", "score", "select", "split"))
        return max(made, self.seconds["train"]) + self.seconds["sync"]

    @property
    def fits(self) -> bool:
        return not self.problems


def middle(task: Task) -> Middle:
    """What passes through the manager in one step."""
    rates, work = task.rates, task.work
    tokens, k = work.response_tokens, work.k

    def per_token(name: str) -> float:
        return rates[f"{name}_fixed"] + rates[f"{name}_per_k"] * k

    us = 1e-6 * tokens * rates["manager_factor"]
    reply = per_token("generate_bytes") + per_token("score_bytes")
    held = 2 * 8 * k + 64 + 4 * 60  # both top-K, ids and log-probs, and about sixty columns of metrics and scores
    bank = (rates["bank_us"] * us, rates["bank_bytes"] * tokens) if work.bank else (0.0, 0.0)
    return Middle((per_token("parse_us") + per_token("measure_us")) * us, per_token("select_us") * us, rates["split_us"] * 1e-6 * tokens, bank[0],
                  reply * tokens, per_token("ship_bytes") * tokens, bank[1], held * tokens)  # fmt: skip


def sync_seconds(task: Task, split: Split) -> float:
    """Buckets from one source: handed over on shared GPUs, broadcast from rank 0 to all engines otherwise."""
    rates, gpu = task.rates, task.machine.gpu
    size = memory.server_weights(task.student, 1)
    gather = rates["sync_fixed_seconds"]
    if split.trainer.tp * split.trainer.pp > 1:
        gather += size / (gpu.nvlink if split.trainer.tp * split.trainer.pp <= task.machine.per_node else gpu.network)
    if not split.student_on_trainer:
        link = gpu.nvlink if split.gpus <= task.machine.per_node else gpu.network
        return gather + size / min(link, rates["sync_copy_bytes"])
    spread = size / (gpu.nvlink if split.trainer.gpus <= task.machine.per_node else gpu.network) if split.trainer.gpus > 1 else 0.0
    return gather + spread + size / rates["sync_copy_bytes"]


def room(task: Task, split: Split) -> tuple[TrainerMemory | None, float, float, dict[str, float]]:
    """(the trainer's memory or None, positions in one student cache, positions in one teacher cache, bytes on the fullest GPU by role)."""
    usable, rates = memory.usable(task.machine.gpu, task.rates), task.rates
    reserve = rates["server_reserve_bytes"]
    student_weights = memory.server_weights(task.student, split.student.tp)
    teacher_weights = memory.server_weights(task.teacher, split.teacher.tp)
    student_unit = memory.cache_bytes(task.student, split.student.tp)
    teacher_unit = memory.cache_bytes(task.teacher, split.teacher.tp)
    student_least = memory.SEQUENCES_HELD * task.work.longest * student_unit
    teacher_least = task.work.longest * teacher_unit
    on_trainer = 0.0
    if split.student_on_trainer:
        on_trainer += student_weights + reserve + student_least
    if split.mode == "colocated":
        on_trainer += teacher_weights + reserve + teacher_least
    trainer = memory.best_trainer_memory(task.student, split.trainer, task.work, rates, usable - on_trainer)
    held = trainer.total if trainer else memory.trainer_memory(task.student, split.trainer, task.work, rates, task.work.max_tokens or 4096).total
    left_student = usable - student_weights - reserve - (held if split.student_on_trainer else 0.0)
    left_teacher = usable - teacher_weights - reserve
    if split.servers_share:
        both = left_student - teacher_weights - reserve
        left_teacher = max(teacher_least, _CACHE_FOR_TEACHER * both)
        left_student = both - left_teacher
    wanted = min(task.work.student_concurrency, -(-task.work.responses // split.student.count)) * task.work.longest * student_unit
    roles = {"trainer": held, "student": student_weights + reserve + max(0.0, min(left_student, wanted)),
             "teacher": teacher_weights + reserve + max(0.0, min(left_teacher, 64 * task.work.longest * teacher_unit))}  # fmt: skip
    return trainer, left_student / student_unit, left_teacher / teacher_unit, roles


def predict(task: Task, split: Split) -> Prediction:
    """Seconds by phase and bytes by role; `problems` says what does not fit."""
    work, rates, gpu = task.work, task.rates, task.machine.gpu
    trainer, student_room, teacher_room, roles = room(task, split)
    problems = []
    usable = memory.usable(gpu, rates)
    if trainer is None:
        problems.append(f"memory: trainer {split.trainer} needs {roles['trainer'] / GIB:.1f} GiB a GPU beside "
                        f"{_others(split, roles) / GIB:.1f} GiB of servers; {usable / GIB:.1f} GiB are usable")  # fmt: skip
    for name, held, least in (("student", student_room, memory.SEQUENCES_HELD), ("teacher", teacher_room, 1)):
        if held < least * work.longest:
            model, servers = (task.student, split.student) if name == "student" else (task.teacher, split.teacher)
            weights = memory.server_weights(model, servers.tp) / GIB
            problems.append(f"memory: a {name} server of {servers.tp} GPUs ({weights:.1f} GiB of weights a GPU) has no room for "
                            f"{least} x {work.longest} positions of cache")  # fmt: skip
    limits = {"student": task.student.shape.max_positions, "teacher": task.teacher.shape.max_positions}
    problems += [f"context: the {n} takes {m} positions, prompt and response have {work.longest}" for n, m in limits.items() if work.longest > m]
    generate = serving.generate_seconds(task.student, split.student, work, gpu, rates, max(student_room, work.longest))
    score = serving.score_seconds(task.teacher, split.teacher, work, gpu, rates)
    tokens = trainer.tokens if trainer else work.max_tokens or 4096
    train = training.train_seconds(task.student, split.trainer, work, gpu, rates, tokens, task.machine.per_node)
    after, added = serving.not_hidden(generate, score, work, split.servers_share)
    between = middle(task)
    seconds = {"generate": max(generate.wall + added, between.parse), "score": after, "select": between.select, "split": between.split,
               "train": train.total, "sync": sync_seconds(task, split)}  # fmt: skip
    if work.asynchronous and split.student_on_trainer:
        problems.append(f"asynchronous: expected student engines on GPUs of their own (mode apart), got {split.mode}: they would share the trainer's")
    held = trainer or memory.trainer_memory(task.student, split.trainer, work, rates, tokens)
    found = Prediction(split, seconds, roles, generate, score, train, between, held, 0.0, tuple(problems), work.asynchronous)
    busy = split.student.gpus * generate.busy + split.teacher.gpus * score.busy + split.trainer.gpus * train.total
    return replace(found, busy=min(1.0, busy / (split.gpus * found.total)))


def _others(split: Split, roles: dict[str, float]) -> float:
    names = {"colocated": ("student", "teacher"), "teacher apart": ("student",)}.get(split.mode, ())
    return sum(roles[n] for n in names)


def trainer_layouts(task: Task, gpus: int, candidates: Iterable[Layout]) -> list[tuple[float, Layout]]:
    """(seconds with a small micro-batch, layout), fastest first."""
    found = []
    for layout in candidates:
        seconds = training.train_seconds(task.student, layout, task.work, task.machine.gpu, task.rates, 8192, task.machine.per_node)
        found.append((seconds.total, layout))
    return sorted(found, key=lambda pair: (pair[0], str(pair[1])))


__all__ = ["BF16", "PHASES", "Machine", "Middle", "Prediction", "Task", "middle", "predict", "room", "sync_seconds", "trainer_layouts"]
