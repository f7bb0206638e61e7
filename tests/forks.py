# SPDX-License-Identifier: Apache-2.0
"""Processes that tests fork to kill them."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm.std import TqdmDefaultWriteLock

# Progress bars take a semaphore that forks share: a child killed with it in hand would block its
# parent for ever. This is set while tests are collected, before the first bar.
TqdmDefaultWriteLock.mp_lock = None


def fork(work: Callable[[], object], log: Path | None = None) -> int:
    """Runs ``work`` in a process of its own, whose words go to ``log``; returns the process id.

    It exits with 0, with the code of a SystemExit, or with 1 and a traceback.
    """
    process = os.fork()
    if process:
        return process
    # Ignored signals are inherited: SIGINT by a job in a shell's background, SIGHUP from nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if log is not None:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (
            os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2)
        )
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
