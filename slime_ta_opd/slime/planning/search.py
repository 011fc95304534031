"""The best split of up to a number of GPUs: the shortest step among those that fit, the fewest GPUs where steps are equal."""

from __future__ import annotations

from slime.planning import memory
from slime.planning.layout import GRID, MODES, SEARCHED, Layout, Servers, Split, layouts, server_sizes
from slime.planning.predict import Prediction, Task, predict, trainer_layouts
from ta_opd.errors import ConfigError

LAYOUTS_TRIED = 6  # of the fastest layouts of a trainer's size, where memory refuses the first ones


def best_plan(task: Task, modes: tuple[str, ...] = SEARCHED) -> Prediction:
    """The best prediction. Raises ConfigError that names the nearest misfits where nothing fits."""
    found: list[Prediction] = []
    misfits: list[Prediction] = []
    for mode in modes:
        for split in _splits(task, mode):
            prediction = predict(task, split)
            (found if prediction.fits else misfits).append(prediction)
    if not found:
        raise ConfigError(_nothing_fits(task, misfits, modes))
    return min(found, key=lambda p: (round(p.total, 6), p.split.gpus, MODES.index(p.split.mode)))


def _nothing_fits(task: Task, misfits: list[Prediction], modes: tuple[str, ...]) -> str:
    m = task.machine
    nearest = sorted(misfits, key=lambda p: (len(p.problems), p.bytes_by_role["trainer"]))[:1]
    why = "; ".join(p for n in nearest for p in n.problems) or _nothing_tried(task, modes)
    return (f"plan: expected a split of {m.gpus} x {m.gpu.kind} that holds student {task.student.name} and teacher {task.teacher.name}, got none. "
            f"Nearest: {why}. Use more GPUs or larger ones, a smaller teacher, or shorter responses")  # fmt: skip


def _nothing_tried(task: Task, modes: tuple[str, ...]) -> str:
    """Why there was not even a misfit: one part does not fit by itself, or the parts together take more GPUs than there are."""
    work, room = task.work, memory.usable(task.machine.gpu, task.rates)
    sequences = work.responses // work.optimizer_steps
    found = [x for size in GRID if size <= task.machine.gpus for x in layouts(task.student, size, task.machine.per_node, sequences)]
    if not found:
        return "no layout divides the student over these GPUs"
    if not any(_layouts(task, size) for size in GRID if size <= task.machine.gpus):
        needs = ((memory.trainer_memory(task.student, x, work, task.rates, -(-work.longest // x.cp)).total, str(x)) for x in found)
        least, layout = min(needs)
        return (f"memory: the trainer alone needs {least / memory.GIB:.1f} GiB a GPU ({layout}, sequences of {work.longest} tokens); "
                f"{room / memory.GIB:.1f} GiB are usable")  # fmt: skip
    for name, model in (("student", task.student), ("teacher", task.teacher)):
        sizes = [tp for tp in server_sizes(model, task.machine.per_node) if tp <= task.machine.gpus]
        if not any(_weights_fit(task, model, tp) for tp in sizes):
            least = min((memory.server_weights(model, tp) for tp in sizes), default=memory.server_weights(model, 1))
            return f"memory: the {name}'s weights take {least / memory.GIB:.1f} GiB of each GPU of one server; {room / memory.GIB:.1f} GiB are usable"
    return f"mode {' or '.join(modes)} takes more GPUs than these (trainer, student engines and teacher apart: at least one each)"


def _splits(task: Task, mode: str):
    """Splits worth predicting. Trainer sizes and server counts lie on one grid, whatever the number of GPUs."""
    total, per_node = task.machine.gpus, task.machine.per_node
    sizes = [g for g in GRID if g <= total]
    trainers = {size: _layouts(task, size) for size in sizes}
    students = [(tp, count) for tp in server_sizes(task.student, per_node) for count in GRID if tp * count <= total]
    teachers = [(tp, count) for tp in server_sizes(task.teacher, per_node) for count in GRID if tp * count <= total]
    students = [(tp, n) for tp, n in students if _weights_fit(task, task.student, tp) and n <= task.work.responses]
    teachers = [(tp, n) for tp, n in teachers if _weights_fit(task, task.teacher, tp) and n <= task.work.responses]
    if mode == "colocated":
        for size in sizes:
            for student in _widest(students, size):
                for teacher in _widest(teachers, size):
                    for layout in trainers[size]:
                        yield Split(mode, layout, Servers(student[1], student[0]), Servers(teacher[1], teacher[0]))
        return
    for size in sizes:
        own = mode != "teacher apart"  # the student's engines have GPUs of their own
        for layout in trainers[size][:2] if own else trainers[size]:
            for student in students if own else _widest(students, size):
                taken = student[0] * student[1]
                left = total - size - (taken if own else 0)
                if mode == "servers apart":
                    left = taken if left >= 0 else 0
                for teacher in _widest(teachers, left) if left > 0 else []:
                    yield Split(mode, layout, Servers(student[1], student[0]), Servers(teacher[1], teacher[0]))


def _layouts(task: Task, size: int) -> list[Layout]:
    sequences = task.work.responses // task.work.optimizer_steps
    ranked = trainer_layouts(task, size, layouts(task.student, size, task.machine.per_node, sequences))
    usable = memory.usable(task.machine.gpu, task.rates)
    alone = [x for _, x in ranked if memory.best_trainer_memory(task.student, x, task.work, task.rates, usable)]
    by_memory = sorted(alone, key=lambda x: memory.trainer_memory(task.student, x, task.work, task.rates, 4096).total)
    return list(dict.fromkeys(alone[:LAYOUTS_TRIED] + by_memory[:2]))


def _widest(servers: list[tuple[int, int]], gpus: int) -> list[tuple[int, int]]:
    """Of each tensor parallel size the largest count that fits."""
    best: dict[int, int] = {}
    for tp, count in servers:
        if tp * count <= gpus:
            best[tp] = max(best.get(tp, 0), count)
    return list(best.items())


def _weights_fit(task: Task, model, tp: int) -> bool:
    return memory.server_weights(model, tp) < memory.usable(task.machine.gpu, task.rates)
