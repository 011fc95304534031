"""What SIGTERM does to a run: the running rollout is finished, saved, and the run ends in order.

Where nothing can be saved (no --save, or still starting) the run is aborted at once; a second SIGTERM always aborts.
"""

from __future__ import annotations

import os
import signal
import threading


class Terminated(Exception):
    """SIGTERM ended the run before its last rollout. lost: whether trained rollouts are in no checkpoint."""

    def __init__(self, message: str, lost: bool):
        super().__init__(message)
        self.lost = lost


class StopRequest:
    """Installed for the length of a run. asked: finish this rollout and save; aborted: the run was cut off."""

    def __init__(self, can_save: bool):
        self.can_save = can_save
        self.asked = self.aborted = False
        self.stage = "starting"  # then "rollouts", then "ending"
        self._old = None

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._on_signal)

    def ignore(self) -> None:
        """From now on SIGTERM does nothing: processes are being stopped."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def restore(self) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _on_signal(self, signum, frame) -> None:
        if self.stage == "rollouts" and self.can_save and not self.asked:
            self.asked = True
            # print is not safe inside a signal handler
            os.write(2, b"\nSIGTERM: this rollout is finished and saved, then the run ends; a second SIGTERM aborts it\n")
        elif self.stage == "ending" and not self.asked:
            self.asked = True
        else:
            self.aborted = True
            raise KeyboardInterrupt  # what Ray lets through while it waits
