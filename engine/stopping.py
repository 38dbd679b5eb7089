"""Stopping a run early without losing work: Ctrl-C, or the SIGTERM of a cluster that takes a machine back.

While a run samples, nothing changes that a checkpoint holds, and the episodes can be sampled again from their seeds. So
sampling is broken off at once. An update is completed first. Either way all ranks stop at the same place, save, and
end; `--resume` gives the metrics and the weights of a run that was never stopped.
"""

import os
import signal
import time
from collections.abc import Callable

from accelerate.utils import gather_object


class Stopped(BaseException):
    """The run was asked to stop. It is no Exception: what catches an environment's errors must let it pass."""


class StopRequest:
    """The signal handlers of a run, until `close`. The first signal asks the run to stop, a second Ctrl-C ends it."""

    def __init__(self):
        self.since: float | None = None  # seconds on the monotonic clock, when the run was asked
        self.sampling = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        _current.append(self)

    def close(self) -> None:
        """Give the signals back to who had them before."""
        _current.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame) -> None:
        # A launcher passes on the signal that the terminal has already sent: the same key press, not a second one.
        if number == signal.SIGINT and self.since is not None and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if self.since is None:
            self.since = time.monotonic()
            # Not print: the signal may have come in the middle of one, and a buffer cannot be entered twice.
            os.write(2, b"stopping, and saving first; Ctrl-C once more stops at once\n")
            if self.sampling:
                raise Stopped


_current: list[StopRequest] = []  # the open one, if there is one; signal handlers belong to the process, too


def play_together(play: Callable[[], list]) -> list:
    """What `play` returns on each rank, as one list, the same on all ranks; they must call this together.

    play: samples, and changes nothing that a checkpoint holds.  Raises Stopped on every rank if one was asked to stop:
    that rank breaks off `play` and hands in a None. It must hand in something, because the others wait for it.
    """
    if not _current:  # evaluations outside of a run
        return gather_object(play())
    request = _current[-1]
    try:
        request.sampling = True
        mine = [None] if request.since is not None else play()
        request.sampling = False
    except Stopped:
        mine = [None]
    everything = gather_object(mine)
    if any(one is None for one in everything):
        raise Stopped
    return everything


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective call failed because another rank has ended. NCCL's words were not met in a test of ours."""
    return any(words in str(error) for words in ("by peer", "Broken pipe", "remote process exited"))
