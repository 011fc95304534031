"""Which runs there are: every selector at every budget and full supervision, each loss, each seed, both learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.behaviour.sizes import Size
from ta_opd.selection import list_selectors

OWN_BUDGET = ("mintok", "maxtok", "minmaxtok", "rand1tok")  # they name their tokens themselves: the budget only cuts


@dataclass(frozen=True)
class Arm:
    """What runs of different seeds and learning rates share."""

    selector: str
    budget: float
    loss: str

    @property
    def name(self) -> str:
        return f"{self.selector}-{self.budget:g}-{self.loss}"


@dataclass(frozen=True)
class Run:
    arm: Arm
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.arm.name}-lr{self.lr:g}-seed{self.seed}"


def selectors(size: Size) -> list[str]:
    return list(size.selectors) or [s.name for s in list_selectors() if s.name != "none"]


def arms(size: Size) -> list[Arm]:
    out = []
    for loss in size.losses:
        out.append(Arm("full", 1.0, loss))
        out += [Arm(name, budget, loss) for name in selectors(size) for budget in size.budgets]
    return out


def runs(size: Size) -> list[Run]:
    """Seed by seed, so that a stop at a time limit leaves whole seeds."""
    return [Run(arm, seed, lr) for seed in size.seeds for arm in arms(size) for lr in size.rates]


def groups(size: Size) -> Iterator[list[Run]]:
    """Runs that are trained together: of one loss and seed, so that they see the same prompts."""
    pending: dict[tuple, list[Run]] = {}
    for run in runs(size):
        key = (run.seed, run.arm.loss)
        pending.setdefault(key, []).append(run)
    for members in pending.values():
        for begin in range(0, len(members), size.group):
            yield members[begin : begin + size.group]
