# SPDX-License-Identifier: Apache-2.0
"""Signals that end a process without a word, turned into an exception that can be told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

# What a closed terminal, a batch system and ``kill`` send. KILL cannot be caught.
SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal came; ``exit_code`` is 128 and its number, as a shell would say."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, `SIGNALS` raise :class:`Stopped` in the main thread, and INT KeyboardInterrupt as
    ever. A signal that is ignored (nohup) or handled already is left alone, and so are all where
    this is not the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    main = threading.current_thread() is threading.main_thread()
    caught = [number for number in SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
