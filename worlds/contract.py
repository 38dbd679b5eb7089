"""What a world must be (`Env`), and the one place where all that it answers is checked and copied (`CheckedEnv`).

Answers become plain Python: numbers of numpy and torch are converted, and what a world changes later is not ours. An
exception, or an answer that breaks the contract, becomes a WorldError. It names world, method and field.
"""

import json
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

MOST_STEPS = 1000  # of an episode
MOST_TASKS = 10_000_000  # of a split: each pass over it draws an order of all its tasks
LARGEST = 1e15  # size of a reward: it is squared in float32


class Env(Protocol):
    """A world that plays one task at a time. One environment plays many tasks, a `reset` before each."""

    instructions: str  # the system turn of the prompt

    def size(self, split: str) -> int | None:
        """Number of tasks in the split, 0 if it is not installed; None if it has one for every seed."""

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start task number `seed` of the split: first observation, info with "task_type" and "success".

        It is called for tasks that there are: the split is one of the world's, and the number is below its size.
        """

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Observation, reward (0 before the end), terminated, truncated, info with "valid", "task_type", "success".

        Upper and lower case in the action are the same. The values of an info can be written as JSON. Evaluations
        report "score" and "f1" if it has them, both numbers. An episode ends within MOST_STEPS steps.
        """

    def admissible(self) -> list[str]:
        """The actions that are valid now, in a fixed order."""

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that makes no mistake. It knows a way from every state."""


class WorldError(SystemExit):
    """A world failed. Ends the program with its message, one line, unless it is caught."""


class CheckedEnv:
    """An environment whose answers keep the contract of `Env`. A method raises WorldError if the world's own fails.

    name, splits: of the world.  make(config): builds it; it is kept as `world`.
    """

    def __init__(self, name: str, make: Callable[[Any], Env], config: Any, splits: tuple[str, ...]):
        self.name, self.splits, self.steps = name, splits, 0
        with world_errors(name):
            self.world = make(config)
            self.instructions = _plain("instructions", self.world.instructions)

    def size(self, split: str) -> int | None:
        with world_errors(f"{self.name}.size"):
            if split not in self.splits:
                raise WorldError(f"unknown split {split!r}; there are {', '.join(self.splits)}")
            return _plain("number of tasks", self.world.size(split))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        size, self.steps = self.size(split), 0
        with world_errors(f"{self.name}.reset"):
            if size is not None and not 0 <= seed < size:
                raise WorldError(f"{split} has {size} tasks, numbered from 0; there is no {seed}")
            observation, info = _fields(self.world.reset(split, seed), "observation", "info")
            return observation, _info(info, "task_type", "success")

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        self.steps += 1
        with world_errors(f"{self.name}.step"):
            if self.steps > MOST_STEPS:
                raise WorldError(f"the episode does not end: {MOST_STEPS} steps, neither terminated nor truncated")
            *fields, info = _fields(self.world.step(action), "observation", "reward", "terminated", "truncated", "info")
            return *fields, _info(info, "valid", "task_type", "success")

    def admissible(self) -> list[str]:
        with world_errors(f"{self.name}.admissible"):
            return _plain("list of actions", self.world.admissible())

    def oracle(self) -> tuple[str, str]:
        with world_errors(f"{self.name}.oracle"):
            return tuple(_fields(self.world.oracle(), "thought", "action"))


# ------------------------------------------------------------------------------------------------------- exceptions


@contextmanager
def world_errors(where: str) -> Iterator[None]:
    """Any exception within becomes a WorldError that says where."""
    try:
        yield
    except KeyboardInterrupt:  # of the user or of a cluster, not of the world
        raise
    except BaseException as error:  # engines raise any type, and some call sys.exit
        raise WorldError(f"{where}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """Type and text of an exception. ValueError and ImportError are written for the user: their text is enough."""
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be made"
    enough = text and isinstance(error, ValueError | ImportError | WorldError)
    line = " ".join((text if enough else f"{type(error).__name__}: {text}").split())
    return (line if line.isprintable() else ascii(line)[1:-1])[:1000]


# ----------------------------------------------------------------------------------------------------------- fields

TEXT, FLAG, TEXTS = "text", "true or false", "a list of one or more texts"
NUMBER, COUNT = f"a number of at most {LARGEST:g} in size", f"a whole number from 0 to {MOST_TASKS}, or None"
FITS = {
    TEXT: lambda value: isinstance(value, str),
    FLAG: lambda value: value in (False, True),
    TEXTS: lambda value: value and isinstance(value, list) and all(isinstance(text, str) for text in value),
    NUMBER: lambda value: abs(value) <= LARGEST,
    COUNT: lambda value: value is None or (type(value) is int and 0 <= value <= MOST_TASKS),
}
FIELDS = {"instructions": TEXT, "observation": TEXT, "reward": NUMBER, "terminated": FLAG, "truncated": FLAG}
FIELDS |= {"info.valid": FLAG, "info.success": FLAG, "info.task_type": TEXT, "info.score": NUMBER, "info.f1": NUMBER}
FIELDS |= {"number of tasks": COUNT, "list of actions": TEXTS, "thought": TEXT, "action": TEXT}


def _plain(field: str, value: Any) -> Any:
    """A copy of the field's value as plain Python, by way of JSON. Raises WorldError if it is not what it must be."""
    kind = FIELDS.get(field, "a value that JSON can write")
    try:
        text = json.dumps(value, default=_scalar, allow_nan=False, ensure_ascii=False)
        plain = json.loads(text.encode())  # a lone surrogate cannot be encoded
        fits = kind not in FITS or FITS[kind](plain)
    except Exception:
        fits = False
    if not fits:
        raise WorldError(f"{field} is {_shown(value)}, not {kind}")
    return bool(plain) if kind == FLAG else float(plain) if kind == NUMBER else plain


def _shown(value: Any) -> str:
    """A short text of a value, whose own may not be made: Python writes no integer of more than 4,300 digits."""
    try:
        return reprlib.repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be written"


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's own. Raises TypeError for anything else."""
    if getattr(value, "ndim", None) != 0:
        raise TypeError
    return value.item()


def _fields(answer: tuple, *names: str) -> list:
    """The parts of an answer by name. An info is left to `_info`."""
    if not isinstance(answer, tuple | list) or len(answer) != len(names):
        raise WorldError(f"the answer is {_shown(answer)}, not ({', '.join(names)})")
    return [part if name == "info" else _plain(name, part) for name, part in zip(names, answer, strict=True)]


def _info(info: dict, *needed: str) -> dict:
    """A copy of an info without "error", which marks an aborted episode and in a world's own info means nothing."""
    if not isinstance(info, dict) or not all(isinstance(key, str) for key in info):
        raise WorldError(f"info is {_shown(info)}, not a dict with texts as keys")
    if missing := [key for key in needed if key not in info]:
        raise WorldError(f"info has no {' and no '.join(missing)}")
    return {key: _plain(f"info.{key}", value) for key, value in info.items() if key != "error"}
