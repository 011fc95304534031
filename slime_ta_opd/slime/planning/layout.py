"""Who gets which GPUs: the trainer's layout, the student's engines, the teacher's replicas, together or apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slime.backends.megatron_utils.hf_config import check_layout
from slime.planning.models import Model
from ta_opd.errors import ConfigError

SEARCHED = ("colocated", "teacher apart", "apart")
MODES = (*SEARCHED, "servers apart")  # the last: both servers on the same GPUs, the trainer on others; a running teacher is given by --rm-url
# Sizes that are tried. A fixed grid: a plan for more GPUs may always use that of fewer, so more are never slower.
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1536, 2048, 3072, 4096)
TENSOR, PIPELINE, CONTEXT = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Layout:
    """The trainer: tensor, pipeline, context, data parallel sizes, and expert parallel within data and context parallel."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        experts = f" EP{self.ep}" if self.ep > 1 else ""
        return f"TP{self.tp} PP{self.pp} CP{self.cp} DP{self.dp}{experts}"


@dataclass(frozen=True)
class Servers:
    """`count` servers of `tp` GPUs each."""

    count: int
    tp: int

    @property
    def gpus(self) -> int:
        return self.count * self.tp

    def __str__(self) -> str:
        return f"{self.count} x TP{self.tp}"


@dataclass(frozen=True)
class Split:
    mode: str
    trainer: Layout
    student: Servers
    teacher: Servers

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        for name, servers in (("student", self.student), ("teacher", self.teacher)):
            if min(servers.count, servers.tp) < 1:
                raise ConfigError(f"{name} servers: expected at least one of at least one GPU, got {servers}")
        hosts = {"student": self.trainer if self.student_on_trainer else None,
                 "teacher": self.trainer if self.mode == "colocated" else self.student if self.servers_share else None}  # fmt: skip
        for name, servers in (("student", self.student), ("teacher", self.teacher)):
            host = hosts[name]
            if host is not None and servers.gpus > host.gpus:
                where = "trainer's" if host is self.trainer else "student's"
                raise ConfigError(f"{name} servers on the {where} GPUs: expected at most its {host.gpus} GPUs, got {servers.gpus}")

    @property
    def student_on_trainer(self) -> bool:
        return self.mode in ("colocated", "teacher apart")

    @property
    def servers_share(self) -> bool:
        """Whether the teacher is on the student's GPUs."""
        return self.mode in ("colocated", "servers apart")

    @property
    def gpus(self) -> int:
        extra = {"colocated": 0, "teacher apart": self.teacher.gpus, "apart": self.teacher.gpus + self.student.gpus, "servers apart": self.student.gpus}
        return self.trainer.gpus + extra[self.mode]


def layouts(model: Model, gpus: int, per_node: int, sequences: int) -> Iterator[Layout]:
    """Layouts of exactly `gpus` GPUs that megatron accepts: tensor parallel within a node, no data-parallel rank without a sequence."""
    for tp in TENSOR:
        for pp in PIPELINE:
            for cp in CONTEXT:
                if tp > per_node or gpus % (tp * pp * cp) or gpus // (tp * pp * cp) > sequences:
                    continue
                dp = gpus // (tp * pp * cp)
                for ep in _experts(model, dp * cp):
                    layout = Layout(tp, pp, cp, dp, ep)
                    if _accepted(model, layout):
                        yield layout


def _experts(model: Model, most: int) -> list[int]:
    if not model.shape.is_moe:
        return [1]
    return [e for e in (1, 2, 4, 8, 16, 32, 64, 128) if e <= most and most % e == 0 and model.shape.num_experts % e == 0]


def _accepted(model: Model, layout: Layout) -> bool:
    try:
        check_layout(model.shape, world=layout.gpus, tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, expert_tp=layout.tp,
                     sequence_parallel=layout.tp > 1)  # fmt: skip
    except ConfigError:
        return False
    return True


def server_sizes(model: Model, per_node: int) -> list[int]:
    """Tensor parallel sizes of one server: within a node, dividing the heads (KV heads may be repeated)."""
    return [tp for tp in TENSOR if tp <= per_node and model.shape.num_heads % tp == 0]
