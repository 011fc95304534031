"""What saturates first: the parts of a step that do not get faster with more GPUs, as shares of the step.

Every one of them is read off the code: the rollout manager is one process, statistics are over the whole batch, weights leave from
trainer rank 0, and the token bank is written by one thread of the manager.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.planning.predict import Prediction, Task

CROWDED = 0.10  # of a step: worth a warning


@dataclass(frozen=True)
class Limit:
    """seconds: of one core, link or disk in a step. hidden: it runs beside other phases and costs nothing until it is longer."""

    name: str
    seconds: float
    share: float
    hidden: bool
    load: str
    breaks_at: float

    @property
    def crowded(self) -> bool:
        return self.share > (1.0 if self.hidden else CROWDED)


def limits(task: Task, prediction: Prediction) -> list[Limit]:
    """Largest share of its allowance first. breaks_at: response tokens a second of the whole run at which this part takes 10 % of
    a step (100 % of generation where it is hidden behind it)."""
    p, m = prediction, prediction.middle
    tokens, total = task.work.response_tokens, prediction.total
    beside = p.seconds["generate"] + p.seconds["score"]
    found = [
        _limit("replies parsed and measured in one process", m.parse, beside, True, f"{m.reply_bytes / beside / 1e6:,.0f} MB/s", tokens / m.parse if m.parse else 0.0),
        _limit("batch-wide statistics and mask", m.select, total, False, f"{m.held_bytes / 1e9:,.1f} GB held", CROWDED * tokens / m.select if m.select else 0.0),
        _limit("splitting and shipping", m.split, total, False, f"{m.ship_bytes / 1e9:,.1f} GB", CROWDED * tokens / m.split if m.split else 0.0),
        _limit("token bank, one thread", m.bank, total, True, f"{m.bank_bytes / 1e9:,.2f} GB a step", tokens / m.bank if m.bank else 0.0),
        _limit("weight sync from one source", p.seconds["sync"], total, False, f"{task.student.parameters * 2 / 1e9:,.0f} GB", 0.0),
    ]
    return sorted(found, key=lambda x: -x.share / (1.0 if x.hidden else CROWDED))


def _limit(name: str, seconds: float, of: float, hidden: bool, load: str, breaks_at: float) -> Limit:
    return Limit(name, seconds, seconds / of if of else 0.0, hidden, load, breaks_at)

