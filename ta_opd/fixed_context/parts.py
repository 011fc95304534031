"""Part files of a scoring run: a finished part is a file, so that an interrupted run goes on where it stopped."""

import json
import shutil
from pathlib import Path

import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.tables import read_table, write_json, write_table


class Parts:
    """The files of one scoring run under `folder`. `done`: numbers of finished parts."""

    def __init__(self, folder: Path, plan: dict, num_contexts: int):
        self.folder, self.size = folder, plan["contexts_per_part"]
        self.count = -(-num_contexts // self.size)
        self.num_contexts = num_contexts
        written = folder / "plan.json"
        if not written.is_file() or json.loads(written.read_text()) != json.loads(json.dumps(plan)):
            shutil.rmtree(folder, ignore_errors=True)
            write_json(written, plan)
        self.done = {part for part in range(self.count) if self.table(part).is_file()}

    def contexts(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, self.num_contexts))

    def todo(self) -> list[int]:
        return [part for part in range(self.count) if part not in self.done]

    def table(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.parquet"

    def hidden(self, part: int) -> Path:
        return self.folder / f"student_hidden_{part:05d}.pt"

    @property
    def head(self) -> Path:
        return self.folder / "student_head.pt"

    def finish(self, part: int, frame: pd.DataFrame) -> None:
        write_table(self.table(part), frame)
        self.hidden(part).unlink(missing_ok=True)
        self.done.add(part)

    def collect(self) -> pd.DataFrame:
        """All parts as one table. A part that cannot be read is deleted, so that the next run makes it anew, and the error says so."""
        frames = []
        for part in range(self.count):
            try:
                frames.append(read_table(self.table(part)))
            except DataError:
                self.table(part).unlink(missing_ok=True)
                raise
        return pd.concat(frames, ignore_index=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
