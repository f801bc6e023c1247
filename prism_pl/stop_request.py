"""Ctrl+C and SIGTERM as a wish that is granted at the end of a step, where the run can be saved."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOLD = b"\nStopping at the end of this step, with a checkpoint. Ctrl+C again stops at once.\n"


class StopRequest:
    """Remembers the first signal; the second one is a KeyboardInterrupt where it arrives."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over. Nothing where Python would refuse: outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            self.asked = False
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, TOLD)  # print is not safe in a handler: it may interrupt another print


def leave_to_the_run(worker: int) -> None:
    """`worker_init_fn` of a loader: Ctrl+C reaches every process of a terminal, and workers must outlive the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
