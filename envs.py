"""What an environment is, the environments by name, the ReAct text, and scripted players.

An environment is gymnasium's reset and step with text for observations and actions (`Env` below). Its answer to an
action that it does not understand is part of the world, never an exception. `terminated` means that the world ended
the episode, `truncated` that its step limit did.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from worlds import alfworld_env, coin, house, search, shop, webshop


class Env(Protocol):
    """One world that plays one task at a time; it is reset, never rebuilt."""

    instructions: str  # for the system turn

    def size(self, split: str) -> int | None:
        """Number of tasks in the split; None if it has one for every seed."""

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start task number `seed` of the split: first observation, info with "task_type" and "success"."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Observation, reward (0 before the end), terminated, truncated, info with "valid" beside the above."""

    def admissible(self) -> list[str]:
        """Actions that would do something now, in a fixed order."""

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that makes no mistake, whatever happened before."""


@dataclass(frozen=True)
class World:
    """How to make an environment, and which splits its tasks come in."""

    make: Callable[[Any], Env]  # from a config
    config: type  # a frozen dataclass of ints, strs and tuples of strs
    splits: tuple[str, ...]  # the one to train on, then the held-out ones


ENVIRONMENTS = {
    "house": World(house.House, house.HouseConfig, house.SPLITS),
    "alfworld": World(alfworld_env.AlfWorld, alfworld_env.AlfWorldConfig, alfworld_env.SPLITS),
    "webshop": World(webshop.make_webshop, shop.ShopConfig, shop.SPLITS),
    "search": World(search.Search, search.SearchConfig, search.SPLITS),
    "coin": World(coin.Coin, coin.CoinConfig, coin.SPLITS),
}


def make_config(name: str, args: Sequence[str]) -> Any:
    """The configuration of an environment. args: settings such as "max_steps=30" or "task_types=a,b".

    Raises ValueError for an unknown environment or setting, or a value out of range. Reads no file.
    """
    world = _world(name)
    types = {f.name: f.type for f in fields(world.config)}
    settings = {}
    for arg in args:
        key, _, value = arg.partition("=")
        if key not in types:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(types)}")
        try:
            settings[key] = int(value) if types[key] is int else value if types[key] is str else tuple(value.split(","))
        except ValueError:
            raise ValueError(f"{key} must be an integer, got {value!r}") from None
    return world.config(**settings)


def make_envs(name: str, args: Sequence[str], number: int, splits: Sequence[str] = ()) -> list[Env]:
    """`number` environments of one kind; args as in `make_config`.

    Raises ValueError for bad settings or missing data, and if one of the `splits` has no tasks; ImportError if the
    world's packages are not installed.
    """
    config = make_config(name, args)
    envs = [_world(name).make(config) for _ in range(number)]
    for split in splits:
        require_split(name, split)
        if envs[0].size(split) == 0:
            raise ValueError(f"{name} has no tasks in split {split!r}")
    return envs


def require_split(name: str, split: str) -> None:
    """Raises ValueError for an unknown environment or split."""
    if split not in _world(name).splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(_world(name).splits)}")


def held_out_splits(name: str) -> tuple[str, ...]:
    """The splits that are not for training. Raises ValueError for an unknown environment."""
    return _world(name).splits[1:]


def fingerprint(env: Env, args: Sequence[str]) -> list:
    """What tells the training tasks of two environments apart: JSON that changes with the settings, with the files that
    they name, with the first tasks, and with the worlds' own code."""
    size = env.size("train")
    first = [env.reset("train", seed)[0] for seed in range(3 if size is None else min(3, size))]
    named = [Path(value) for _, found, value in (arg.partition("=") for arg in args) if found and value]
    files = [
        file for path in named if path.exists() for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    code = [file.read_text() for file in sorted(Path(__file__).parent.glob("worlds/*.py"))]
    return [sorted(args), size, first, stats, code, Path(__file__).read_text()]


def _world(name: str) -> World:
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}; there are {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


# -------------------------------------------------------------------------------------------------- the ReAct text


def parse_response(text: str) -> tuple[str, str]:
    """(thought, action) of a response. The last `Action:` counts; the action is "" if there is none.

    >>> parse_response("Thought: it is closed.\\nAction: open drawer 1")
    ('it is closed.', 'open drawer 1')
    >>> parse_response("open drawer 1")
    ('open drawer 1', '')
    """
    thought, found, action = text.rpartition("Action:")
    if not found:
        thought, action = text, ""
    return thought.strip().removeprefix("Thought:").strip(), action.partition("\n")[0].strip()


def format_response(thought: str, action: str) -> str:
    """The text of a response, as the instructions of every environment ask for it."""
    return f"Thought: {thought}\nAction: {action}"


def example(env: Env, attempts: int = 10) -> str:
    """A faultless training episode as text, for the instructions of a model that never saw the world.

    The oracle plays the first training tasks until it solves one.  Raises ValueError if it solves none of `attempts`.
    """
    size = env.size("train")
    for seed in range(attempts if size is None else min(attempts, size)):
        observation, info = env.reset("train", seed)
        lines, done = ["An example:", observation], False
        while not done:
            thought, action = env.oracle()
            observation, _, terminated, truncated, info = env.step(action)
            lines += [format_response(thought, action), observation]
            done = terminated or truncated
        if info["success"]:
            return "\n".join(lines[:-1])  # the last observation only says that the episode is over
    raise ValueError(f"the oracle solves none of the first {attempts} training tasks, so there is no example to show")


# ------------------------------------------------------------------------------------------------- scripted players

# A player maps an environment, its actions so far in the episode and a random generator to (thought, action).
Player = Callable[[Env, list[str], random.Random], tuple[str, str]]


def oracle_player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
    """The upper end of the scale."""
    return env.oracle()


def random_player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
    """The lower end of the scale: any action that does something."""
    return "Anything.", rng.choice(env.admissible())


def careless_player(slip: float) -> Player:
    """The oracle, but with probability `slip` a step is a random action or repeats an earlier one, possible or not.

    Imitation of it shows a tiny model every situation, "Nothing happens." included, and the way back from it.
    """

    def player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
        if rng.random() >= slip:
            return env.oracle()
        return "Maybe.", rng.choice(actions if actions and rng.random() < 0.5 else env.admissible())

    return player


PLAYERS = {"oracle": oracle_player, "random": random_player}
