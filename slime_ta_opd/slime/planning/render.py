"""A prediction as rich tables, JSON, Markdown, and flags of train.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slime.planning import memory
from slime.planning.limits import limits
from slime.planning.memory import GIB
from slime.planning.models import Model
from slime.planning.predict import PHASES, Prediction, Task


def as_dict(task: Task, prediction: Prediction) -> dict[str, Any]:
    """Everything, for --json."""
    p, t, g = prediction, prediction.train, task.machine.gpu
    return {
        "student": _model(task.student), "teacher": _model(task.teacher),
        "machine": {"gpu": g.kind, "gpus": task.machine.gpus, "per_node": task.machine.per_node, "used": p.split.gpus},
        "workload": asdict(task.work),
        "plan": {"mode": p.split.mode, "trainer": asdict(p.split.trainer), "student": asdict(p.split.student), "teacher": asdict(p.split.teacher),
                 "micro_batch_tokens": p.trainer.tokens, "flags": flags(task, p)},
        "seconds": {**p.seconds, "total": p.total}, "problems": list(p.problems),
        "tokens": {"response": task.work.response_tokens, "trained": task.work.trained_tokens, "kept": task.work.kept_rows,
                   "a_second": task.work.response_tokens / p.total},
        "memory_gib": {**{k: v / GIB for k, v in p.bytes_by_role.items()}, "card": g.memory / GIB,
                       "usable": memory.usable(g, task.rates) / GIB, "host_a_rank": p.trainer.host / GIB},
        "generate": {"steps": p.generate.steps, "responses_at_once": p.generate.running, "waves": p.generate.waves},
        "train": {**{k: v for k, v in asdict(t).items()}, "mfu": mfu(task, p)},
        "score_all_seconds": p.score.total, "gpus_busy": p.busy,
        "limits": [asdict(x) for x in limits(task, p)],
        "rates": [asdict(r) for r in task.rates.footnotes()],
    }  # fmt: skip


def mfu(task: Task, prediction: Prediction) -> float:
    """Useful operations (6 N a trained token, attention, kept rows; no recompute) of the train phase over what the matmul rate allows."""
    return prediction.train.useful / prediction.train.total / prediction.split.trainer.gpus / task.machine.gpu.matmul


def _model(model: Model) -> dict[str, Any]:
    return {"name": model.name, "parameters": model.parameters, "active": model.trunk_active + model.table_parameters,
            "layers": model.shape.num_layers, "hidden": model.shape.hidden_size, "guessed": model.guessed}  # fmt: skip


def flags(task: Task, prediction: Prediction) -> list[str]:
    """What to give train.py for this plan."""
    p, layout, node = prediction, prediction.split.trainer, task.machine.per_node
    words = ["--actor-num-nodes", str(max(1, -(-layout.gpus // node))), "--actor-num-gpus-per-node", str(min(layout.gpus, node)),
             "--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp), "--context-parallel-size", str(layout.cp),
             "--rollout-num-gpus", str(p.split.student.gpus), "--rollout-num-gpus-per-engine", str(p.split.student.tp),
             "--teacher-num-gpus", str(p.split.teacher.gpus), "--teacher-num-gpus-per-engine", str(p.split.teacher.tp),
             "--max-tokens-per-gpu", str(p.trainer.tokens), "--use-distributed-optimizer"]  # fmt: skip
    if layout.tp > 1:
        words.append("--sequence-parallel")
    if task.work.optimizer_cpu_offload:
        words.append("--optimizer-cpu-offload")
    if layout.ep > 1:
        words += ["--expert-model-parallel-size", str(layout.ep)]
    if task.work.recompute:
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    words += {"colocated": ["--colocate", "--teacher-colocate"], "teacher apart": ["--colocate"], "apart": [], "servers apart": ["--rm-url", "URL"]}[p.split.mode]
    return words


def show(task: Task, prediction: Prediction, console, *, sources: bool = False) -> None:
    """Tables on a rich console, the flags last. sources: also where every rate comes from; else how many of them were measured."""
    from rich.table import Table

    p, m = prediction, task.machine
    guessed = [x.name for x in (task.student, task.teacher) if x.guessed]
    console.print(f"[bold]{task.student.name}[/] learns from [bold]{task.teacher.name}[/] on {p.split.gpus} of {m.gpus} x {m.gpu.kind}: "
                  f"{p.total:.1f} s a step, {task.work.response_tokens / p.total:,.0f} response tokens a second")  # fmt: skip
    if guessed:
        console.print(f"shape guessed from the parameter count: {', '.join(guessed)}")
    for problem in p.problems:
        console.print(f"[red]does not fit:[/] {problem}")
    table = Table(title="seconds of a step")
    for name in ("phase", "seconds", "of the step"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in PHASES:
        table.add_row(phase, f"{p.seconds[phase]:.2f}", f"{p.seconds[phase] / p.total:.1%}")
    table.add_row("total", f"{p.total:.2f}", "", style="bold")
    console.print(table)
    where = Table(title="who runs where")
    for name in ("role", "layout", "GPUs", "GiB a GPU"):
        where.add_column(name, justify="left" if name in ("role", "layout") else "right")
    where.add_row("trainer", f"{p.split.trainer}, micro-batches of {p.trainer.tokens:,} tokens", str(p.split.trainer.gpus), f"{p.bytes_by_role['trainer'] / GIB:.1f}")
    note = {"colocated": ("trainer's GPUs", "trainer's GPUs"), "teacher apart": ("trainer's GPUs", "own GPUs"), "apart": ("own GPUs", "own GPUs"),
            "servers apart": ("own GPUs", "student's GPUs")}[p.split.mode]  # fmt: skip
    where.add_row("student engines", f"{p.split.student}, {note[0]}, {p.generate.running:.0f} responses at once", str(p.split.student.gpus), f"{p.bytes_by_role['student'] / GIB:.1f}")
    where.add_row("teacher servers", f"{p.split.teacher}, {note[1]}", str(p.split.teacher.gpus), f"{p.bytes_by_role['teacher'] / GIB:.1f}")
    console.print(where)
    console.print(f"GPUs busy {p.busy:.0%} of the step; training at {mfu(task, p):.0%} of the matmul rate (recompute not counted); "
                  f"{memory.usable(m.gpu, task.rates) / GIB:.1f} GiB of a card are usable")  # fmt: skip
    if p.trainer.host:
        console.print(f"optimizer state: {p.trainer.host / GIB:.1f} GiB of page-locked host memory a trainer rank, "
                      f"{p.trainer.host * min(p.split.trainer.gpus, m.per_node) / GIB:.1f} GiB a node")  # fmt: skip
    crowd = Table(title="what does not grow with GPUs")
    for name in ("part", "seconds", "share", "load"):
        crowd.add_column(name, justify="left" if name in ("part", "load") else "right")
    for x in limits(task, p):
        crowd.add_row(x.name, f"{x.seconds:.2f}", f"{x.share:.1%}{' (hidden)' if x.hidden else ''}", x.load, style="red" if x.crowded else "")
    console.print(crowd)
    notes, styles = task.rates.footnotes(), {"measured": "", "calibrated": "yellow", "assumed": "red"}
    if sources:
        table = Table(title="rates this rests on")
        for name in ("rate", "value", "status", "source"):
            table.add_column(name)
        for r in notes:
            table.add_row(r.name, f"{r.value:.4g} {r.unit}", r.status, r.source, style=styles[r.status])
        console.print(table)
    else:
        counts = ", ".join(f"{sum(r.status == status for r in notes)} {status}" for status in styles)
        console.print(f"rests on {len(notes)} rates: {counts}; --sources lists them")
    console.print(("train_async.py " if p.asynchronous else "train.py ") + " ".join(flags(task, p)), soft_wrap=True, highlight=False)


ROW_HEAD = ("| GPUs | mode | trainer | student | teacher | generate | score | select | split | train | sync | step s | tokens/s | busy | GiB a GPU |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def markdown_row(task: Task, prediction: Prediction) -> str:
    p = prediction
    peak = max(_stacked(p)) / GIB
    cells = [str(p.split.gpus), p.split.mode, str(p.split.trainer), str(p.split.student), str(p.split.teacher), *(f"{p.seconds[x]:.2f}" for x in PHASES),
             f"{p.total:.1f}", f"{task.work.response_tokens / p.total:,.0f}", f"{p.busy:.0%}", f"{peak:.0f}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _stacked(p: Prediction) -> list[float]:
    """Bytes on a GPU of each kind."""
    b = p.bytes_by_role
    return {"colocated": [b["trainer"] + b["student"] + b["teacher"]], "teacher apart": [b["trainer"] + b["student"], b["teacher"]],
            "apart": [b["trainer"], b["student"], b["teacher"]], "servers apart": [b["trainer"], b["student"] + b["teacher"]]}[p.split.mode]  # fmt: skip


def markdown_limits(task: Task, prediction: Prediction) -> list[str]:
    """Rows `| part | seconds | share | load |`, the most crowded first."""
    out = []
    for x in limits(task, prediction):
        mark = "**" if x.crowded else ""
        out.append(f"| {mark}{x.name}{mark} | {x.seconds:.2f} | {x.share:.1%}{', hidden' if x.hidden else ''} | {x.load} |")
    return out
