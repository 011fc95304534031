"""Which runs there are: every selector at every budget and full supervision, each loss and seed.

The first seed runs at both learning rates; the others at the better one of each arm, by the validation problems of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def first_runs(size: Size) -> list[Run]:
    """Of the first seed: every arm at both learning rates."""
    return [Run(arm, size.seeds[0], lr) for arm in arms(size) for lr in size.rates]


def later_runs(size: Size, rates: Mapping[Arm, float]) -> list[Run]:
    """Of the other seeds, each arm at its own rate; seed by seed, so that a stop at a time limit leaves whole seeds."""
    return [Run(arm, seed, rates[arm]) for seed in size.seeds[1:] for arm in arms(size)]


def number_of_runs(size: Size) -> int:
    return len(arms(size)) * (len(size.rates) + len(size.seeds) - 1)


def groups(size: Size, runs: list[Run]) -> Iterator[list[Run]]:
    """Runs that are trained together: of one loss and seed, so that they see the same prompts."""
    pending: dict[tuple, list[Run]] = {}
    for run in runs:
        pending.setdefault((run.seed, run.arm.loss), []).append(run)
    for members in pending.values():
        for begin in range(0, len(members), size.group):
            yield members[begin : begin + size.group]
