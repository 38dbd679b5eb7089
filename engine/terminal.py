"""What a script does before its imports, so that nothing that happens to the terminal ends it.

A terminal is closed, a pipe's reader ends, the disk under `> log.txt` is full: Python raises from every print and every
progress bar, and once more when it exits. A pipe is full, or Ctrl-S stops the terminal: Python waits. Here such words
are dropped, and the work goes on.
"""

import os
import sys
from contextlib import suppress
from functools import partial
from select import select
from typing import TextIO


class Words:
    """A text stream that drops what it cannot write.

    patience: seconds that a word waits for a reader that does not read. The words after it do not wait.
    """

    def __init__(self, stream: TextIO, patience: float = 10):
        # `select` finds room for a line, not for a buffer of many.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        self.stream, self.patience, self.wait = stream, patience, patience

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream was closed by a library
            _, ready, _ = select([], [self.stream], [], self.wait)
            self.wait = self.patience if ready else 0
            if ready:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def start_script() -> None:
    """Guard the terminal's streams, let Ctrl-C end in one line, and let OpenMP's threads sleep soon."""
    # A stream that the caller closed is None. Its number is given to the next file that is opened, which must not be a
    # file of the run: libraries write to number 2.
    null = partial(open, os.devnull, encoding="utf-8")
    sys.stdin, sys.stdout, sys.stderr = sys.stdin or null(), sys.stdout or null("w"), sys.stderr or null("w")
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)
    sys.excepthook = _explain
    # OpenMP's threads spin while they wait, and take the cores from other programs. Here they sleep soon, unless the
    # user says otherwise. torch reads this when it is imported. Measured in docs/scaling.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _guarded(stream: TextIO) -> TextIO | Words:
    try:
        stream.fileno()
    except OSError:  # a notebook's stream is no file
        return stream
    return Words(stream)


def _explain(kind: type[BaseException], error: BaseException, trace) -> None:
    """Called with the error that ends the program. A run under way does not get here: see `stoppable`."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was saved yet", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
