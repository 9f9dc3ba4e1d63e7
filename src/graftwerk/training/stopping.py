"""The wish that a run saves its state and leaves: by a signal, here or in another process."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(BaseException):
    """Ends a run that has to stop before its end; the message says why. Its state is saved.

    A signal raises it anywhere: who takes any Exception for a bad file must not take this for one.
    """


class Stop:
    """Why this run has to stop, if it has to. Within its `with` signals are noted, not obeyed.

    Until `polled` is set nothing has been done that could be lost, and the first signal raises
    `Interrupted` at once. From then on who runs the steps looks at `reason` between two of them.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.polled = False
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def ask(self, reason: str) -> None:
        """Wishes the run to stop; the first reason counts."""
        self.reason = self.reason or reason

    def __enter__(self) -> "Stop":
        # Elsewhere Python allows no handlers, and whoever made the thread has the signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of the data loader; it ends with us
            return
        self.ask(signal.Signals(number).name)
        if not self.polled:
            raise Interrupted(self.reason)
