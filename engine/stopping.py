"""Stopping a run early without losing work: Ctrl-C, a terminal that is closed, or a cluster that takes a machine back.
And stopping it before a step that would ruin the weights.

Sampling changes nothing that a checkpoint holds, and the episodes can be sampled again from their seeds. So sampling is
aborted at once. An update is completed first. Either way all ranks stop at the same place, save, and
end; `--resume` gives the metrics and the weights of a run that was never stopped.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

from accelerate.utils import gather_object

from episode import Episode


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. A KeyboardInterrupt: what an environment raises beside that only ends its episode."""


# SIGHUP comes when the terminal is closed, SIGUSR1 when Slurm warns a job (`sbatch --signal=USR1@300`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """The signal handlers of a run, until `close`. The first signal asks the run to stop, a second Ctrl-C ends it."""

    def __init__(self):
        self.save: Callable[[], Path] | None = None  # writes a checkpoint; None while a run is prepared
        self.since: float | None = None  # seconds on the monotonic clock, when the run was asked
        self.sampling = False
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        if self._before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
            if self.save is None:
                raise KeyboardInterrupt
            # Not print: the signal may have come in the middle of one, and a buffer cannot be entered twice.
            with suppress(OSError):  # the terminal may be gone
                if select([], [2], [], 0)[1]:  # and a full pipe would keep us here
                    os.write(2, b"stopping, and saving first; Ctrl-C once more stops at once\n")
            if self.sampling:
                raise Stopped


_current: list[StopRequest] = []  # the open one, if there is one; signal handlers belong to the process, too


@contextmanager
def stoppable(out: Path) -> Iterator[StopRequest]:
    """Within, a signal or the loss of another rank ends the program with one line, and with a checkpoint if there is
    something to save: what `save` of the request is set to.  out: the folder of the run."""
    request = StopRequest()
    try:
        try:
            yield request
        except Stopped:
            raise SystemExit(f"stopped, {request.save()} is complete; resume with --resume") from None
    except KeyboardInterrupt:  # of the save, too
        saved = any(out.glob("checkpoint-*"))
        what = "the last checkpoint is complete; resume with --resume" if saved else "nothing was saved yet"
        raise SystemExit(f"stopped; {what}") from None
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        # Print before `finally` restores the signal handlers: torchrun sends SIGTERM to the other ranks at once.
        print("another process of this run has ended; resume from the last checkpoint with --resume", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        request.close()


def gather_or_stop(play: Callable[[], list]) -> list:
    """What `play` returns on each rank, as one list, the same on all ranks; they must call this together.

    play: samples, and changes nothing that a checkpoint holds.  Raises Stopped on every rank if one was asked to stop.
    gather_object is collective, so a rank that stops contributes a None.
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


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective call failed because another rank has ended. NCCL's message is untested."""
    return any(words in str(error) for words in ("by peer", "Broken pipe", "remote process exited"))


# ------------------------------------------------------------------------------------------------ numbers of a step


class NotFiniteError(Exception):
    """A loss or gradient is infinite or nan; no step was taken with it. `episodes` are those that it came from."""

    def __init__(self, episodes: list[Episode]):
        super().__init__("loss or gradient is not finite")
        self.episodes = episodes


def require_finite(value: float, episodes: list[Episode]) -> float:
    """The value. Raises NotFiniteError with the episodes that it came from if it is infinite or nan."""
    if not math.isfinite(value):
        raise NotFiniteError(episodes)
    return value
