"""What a script does before its first import, so that nothing on the terminal can end it.

A terminal is closed, a pipe's reader ends, the disk under `> log.txt` is full: Python raises from every print and every
progress bar, and once more when it exits. Here such words are dropped, and the work goes on.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO


class Words:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed, or its encoding lacks a character
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def start_script() -> None:
    """Guard stdout and stderr, end with one line after Ctrl-C, and let OpenMP's threads sleep soon."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: the next file that is opened would get the number, and the words
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream for a number that was closed.
    sys.stdout, sys.stderr = (Words(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    sys.excepthook = _explain
    # OpenMP's threads spin while they wait, and take the cores from other programs. Here they sleep soon, unless the
    # user says otherwise. torch reads this when it is imported. Measured in docs/scaling.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _explain(kind: type[BaseException], error: BaseException, trace) -> None:
    """What Python prints of an error that ends the program."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was saved yet", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
