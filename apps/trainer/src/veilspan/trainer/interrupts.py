"""Ctrl-C and SIGTERM in a run: the step in hand is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = (
    "\nThe run stops when this step is finished and saved. To stop at once, which loses the steps "
    "since the newest checkpoint but counts them, interrupt it again.\n"
)


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A run that was asked to stop and has saved what it had; the same command continues it.

    Args:
        message: How far it came.
        signal_number: What asked for it.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = int(signal_number)


class StopAsked(Exception):  # noqa: N818 - nothing went wrong
    """Some process was asked to stop; the message is the number of the signal."""


class StopRequests:
    """Take note of SIGINT and SIGTERM while steps are taken; a second one acts at once.

    Every step since the newest checkpoint would be lost and yet count towards ε, so a run that is
    asked to stop finishes its step and saves it. Outside of the main thread, where Python gives out
    no signals, nothing is noted.

    Args:
        quiet: Say nothing, as all processes but the first.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        # The launcher passes on what a terminal has sent to all, and kills by itself after a while.
        self._repeats_count = not dist.is_torchelastic_launched()

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def require_none(self) -> None:
        """Raise if this process was asked to stop.

        Raises:
            StopAsked: With the number of the signal.
        """
        if self._received is not None:
            raise StopAsked(str(self._received))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None and not self._quiet:
            os.write(2, _NOTE.encode())  # a stream may be in the middle of a write
        self._received = number
        if self._repeats_count:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
