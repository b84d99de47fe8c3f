"""Signals that ask a run to stop, and the exit codes that follow."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn


@contextmanager
def stop_on_signal(say: bool = True) -> Iterator[list[int]]:
    """The signals, SIGTERM or SIGINT (Ctrl-C), that asked the run to stop so far: none, or one.

    The first only asks; a second one ends the process at once. Outside the main thread none are seen, and
    one that is ignored (as under nohup, or in a shell's background) stays so.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        # no print: the signal may have come in the middle of one
        if say:
            with suppress(OSError):  # Ctrl-C ends the `tee` that reads it, too
                os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving\n".encode())

    if threading.current_thread() is threading.main_thread():
        chosen = (signal.SIGTERM, signal.SIGINT)
        before = {n: signal.getsignal(n) for n in chosen if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> NoReturn:
    """End as the signal would have it: exit code 130 after SIGINT, 143 after SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
