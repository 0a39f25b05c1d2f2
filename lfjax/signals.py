"""What asks a run to stop: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a lost terminal) unless it is ignored, as by nohup."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable, *numbers: signal.Signals) -> Iterator[None]:
    """Has the signals handled inside; SIGHUP stays ignored where it is. Gives back the handlers from before."""
    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
