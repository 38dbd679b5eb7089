"""The environments by name, the ReAct text, and scripted players.

An environment has gymnasium's reset and step. Observations and actions are text: `Env` in worlds/contract.py. What the
environment does not understand gets an answer, never an exception. `terminated`: the world ended the episode.
`truncated`: the step limit ended it. An exception, or an answer of another type, aborts the episode. It trains nothing.

This file imports every world. A world imports its large packages only where it uses them, so the others start fast.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from worlds import alfworld_env, coin, house, search, search_world, shop, webshop
from worlds.contract import CheckedEnv, Env, WorldError, in_one_line


@dataclass(frozen=True)
class World:
    """How to make an environment, its settings, and the splits of its tasks."""

    make: Callable[[Any], Env]  # config -> environment
    config: type  # a frozen dataclass; its fields have the types in SETTINGS
    splits: tuple[str, ...]  # the first is for training, the others are held out


ENVIRONMENTS = {
    "house": World(house.House, house.HouseConfig, house.SPLITS),
    "alfworld": World(alfworld_env.AlfWorld, alfworld_env.AlfWorldConfig, alfworld_env.SPLITS),
    "webshop": World(shop.make_webshop, webshop.ShopConfig, webshop.SPLITS),
    "search": World(search.Search, search.SearchConfig, search_world.SPLITS),
    "coin": World(coin.Coin, coin.CoinConfig, coin.SPLITS),
}


# What the command line can give: type of a setting -> what it must be, and how its text is read.
SETTINGS = {
    int: ("an integer", int),
    float: ("a number", float),
    bool: ("true or false", lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]),
    str: ("text", str),
    tuple[str, ...]: ("texts", lambda text: tuple(text.split(","))),
}


def setting_types(name: str) -> dict[str, Any]:
    """The settings of an environment with their types. Raises ValueError for an unknown environment."""
    config = _world(name).config
    try:
        types = get_type_hints(config)  # `from __future__ import annotations` makes texts of them
        return {field.name: types[field.name] for field in fields(config) if field.init}
    except Exception as error:
        raise WorldError(f"{name}: its settings are no dataclass with types: {in_one_line(error)}") from error


def make_config(name: str, args: Sequence[str]) -> Any:
    """The configuration of an environment. args: its settings, such as "max_steps=30" or "task_types=a,b".

    Raises ValueError for an unknown environment or setting, or a value out of range. Reads no file.
    """
    types, settings = setting_types(name), {}
    for arg in args:
        key, _, value = arg.partition("=")
        if key not in types:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(types)}")
        if types[key] not in SETTINGS:
            raise WorldError(f"{name}: the setting {key} is no int, float, bool, str or tuple[str, ...]: {types[key]}")
        what, read = SETTINGS[types[key]]
        try:
            settings[key] = read(value)
        except (KeyError, ValueError):
            raise ValueError(f"{key} must be {what}, got {value!r}") from None
    try:
        return _world(name).config(**settings)
    except Exception as error:
        raise ValueError(f"{name}: {in_one_line(error)}") from error


def make_envs(name: str, args: Sequence[str], number: int, splits: Sequence[str] = ()) -> list[Env]:
    """`number` environments of one kind, whose answers are checked; args as in `make_config`.

    Raises ValueError for bad settings; WorldError if data or packages are missing, or if one of the `splits` has no
    tasks.
    """
    config = make_config(name, args)
    world = _world(name)
    envs = [CheckedEnv(name, world.make, config, world.splits) for _ in range(number)]
    for split in splits:
        if envs[0].size(split) == 0:
            raise WorldError(f"{name} has no tasks in split {split!r}")
    return envs


def require_split(name: str, split: str) -> None:
    """Raises ValueError for an unknown environment or split."""
    if split not in _world(name).splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(_world(name).splits)}")


def held_out_splits(name: str) -> tuple[str, ...]:
    """The splits that are not for training. Raises ValueError for an unknown environment."""
    return _world(name).splits[1:]


def _world(name: str) -> World:
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}; there are {', '.join(ENVIRONMENTS)}")
    world = ENVIRONMENTS[name]
    sound = isinstance(world.splits, tuple) and all(isinstance(split, str) for split in world.splits)
    if not sound or world.splits[:1] != ("train",) or len(world.splits) < 2:
        raise WorldError(f"{name}: its splits must be a tuple, train and then others, got {world.splits!r}")
    return world


# -------------------------------------------------------------------------------------------------- the ReAct text


# A response is read in the same way in every world:
# - A <think> block at its start is thought. Where the prompt opens the block, the response holds only its end.
# - The first line after that which begins with "Action:" counts. Later ones do not: a model may play on by itself.
# - Forgiven are the word's case, a full-width colon, a line break after the colon, and bold type, backticks, a fence,
#   quotes or a full stop around the action.
# - A response that was cut off has no action, because `go to drawer 1` may be the beginning of `go to drawer 10`.
THINK = re.compile(r"\s*<think>.*?(?:</think>|\Z)|(?:(?!<think>).)*?</think>", re.DOTALL)
ACTION = re.compile(r"^[^\w\n]*action[ *`]*[:\uff1a][*`]*\s*(?:```\w*\n\s*)?(.*)", re.IGNORECASE | re.MULTILINE)
QUOTED = re.compile(r"""["'\u201c\u2018](.*?)[.\u3002]?["'\u201d\u2019]""")


def parse_response(text: str, ended: bool = True) -> tuple[str, str]:
    """(thought, action) of a response; the action is "" if there is none.  ended: whether it came to its stop token.

    >>> parse_response("Thought: it is closed.\\nAction: open drawer 1")
    ('it is closed.', 'open drawer 1')
    >>> parse_response("open drawer 1")
    ('open drawer 1', '')
    """
    block = THINK.match(text)
    found = ACTION.search(text, block.end() if block else 0)
    thought = text[: found.start()] if found else text
    action = found[1].strip(" \t\r*`").rstrip(" *`.\u3002") if found and ended else ""
    quoted = QUOTED.fullmatch(action)
    return thought.strip().removeprefix("Thought:").strip(), quoted[1] if quoted else action


def format_response(thought: str, action: str) -> str:
    """The text of a response, as the instructions of every environment ask for it."""
    return f"Thought: {thought}\nAction: {action}"


def example(env: Env, attempts: int = 10) -> str:
    """A training episode of the oracle as text, for the prompt of a model that never saw the world.

    The oracle plays the first training tasks until it solves one.  Raises WorldError if it solves none of `attempts`.
    """
    size, limit = env.size("train"), 0
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
        if truncated:
            limit = len(lines) // 2 - 1  # steps: two lines each, after two lines
    advice = f", because its episodes are truncated at max_steps={limit}; set a larger one" if limit else ""
    raise WorldError(f"no example: the oracle solves none of the first {attempts} training tasks{advice}")


# ------------------------------------------------------------------------------------------------- scripted players

# A player maps an environment, its actions so far in the episode and a random generator to (thought, action).
Player = Callable[[Env, list[str], random.Random], tuple[str, str]]


def oracle_player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
    """It makes no mistake: the upper end of the scale."""
    return env.oracle()


def random_player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
    """It takes any valid action: the lower end of the scale."""
    return "Anything.", rng.choice(env.admissible())


def careless_player(slip: float) -> Player:
    """The oracle, but with probability `slip` it slips: it takes a random action, or repeats an earlier one.

    A repeated action may be invalid by then. A model that imitates this player therefore sees mistakes, the answer to
    an invalid action, and the way back.
    """

    def player(env: Env, actions: list[str], rng: random.Random) -> tuple[str, str]:
        if rng.random() >= slip:
            return env.oracle()
        return "Maybe.", rng.choice(actions if actions and rng.random() < 0.5 else env.admissible())

    return player


PLAYERS = {"oracle": oracle_player, "random": random_player}
