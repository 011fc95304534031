"""The clients of one run: the student's engines, and the teachers by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.server_flags import model_config
from ta_opd.errors import DataError


@dataclass
class Clients:
    """The clients of one run: the student's engines and the teachers by name. seconds: phases of the last rollout."""

    student: SGLangClient
    teachers: dict[str, SGLangClient] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def connect(cls, args, student_urls: Sequence[str], teachers: dict[str, Sequence[str]], router: str | None = None) -> Clients:
        """Clients for the given addresses, set up from the run's flags; nothing is sent yet. router: in front of the student's."""
        found = {
            name: SGLangClient.for_run(args, urls, "teacher", "teacher" if name == "default" else f"teacher {name}")
            for name, urls in teachers.items()
        }
        for name, target in (getattr(args, "teachers", None) or {}).items():
            if isinstance(target, str) and name in found:  # a server of this run: an id beyond its vocabulary would end it
                found[name].vocab_size = model_config(target).get("vocab_size") or found[name].vocab_size
        return cls(SGLangClient.for_run(args, student_urls, "student", router=router), found)

    def teacher_of(self, metadata: dict[str, Any]) -> SGLangClient:
        """The teacher that a sample's metadata names; the only one where there is one. DataError for an unknown name."""
        if len(self.teachers) == 1:
            return next(iter(self.teachers.values()))
        name = metadata.get("teacher")
        if name not in self.teachers:
            raise DataError(f"unknown teacher {name!r}; expected one of {', '.join(self.teachers) or 'none'}")
        return self.teachers[name]

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call, e.g. "score": scoring that generation did not hide; then forgotten."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def close(self) -> None:
        for client in (self.student, *self.teachers.values()):
            client.close()
