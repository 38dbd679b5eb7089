"""The real ALFWorld as an environment: one adapter for the published games and for those of alfworld_games.py.

A data folder holds json_2.1.1/{train,valid_seen,valid_unseen}, a folder per game with traj_data.json (the goal) and
game.tw-pddl (what the engine plays). Which of them count is ALFWorld's own choice: no movable receptacles, nothing
sliced, solvable. The reward is 1 when the task is done and 0 otherwise, once, at the end.

Differences from ALFWorld's loader: games come in a fixed order, any first N of them with mixed task types; folders
without games and broken files are errors; `help` is not offered; every observation may end with the task, so that a
very small model need not remember it (setting `restate_task`).

To play: pip install --no-deps -r requirements-alfworld.txt, then `alfworld-download` or
`python -m worlds.alfworld_games --out DIR --split train --games 100`, and --env alfworld --data DIR.
"""

import functools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
SPLITS = ("train", "valid_seen", "valid_unseen")  # the rooms of valid_unseen are in no other split
LAYOUT = "json_2.1.1"  # the published data's own name for its version

TREATMENT = {f"pick_{verb}_then_place_in_recep": verb for verb in ("clean", "heat", "cool")}  # task type -> verb
TOOL = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
RESULT = {"clean": "isclean", "heat": "ishot", "cool": "iscool"}  # what the engine calls it
INSTRUCTIONS = """You act in a house. Every turn, write one thought and one action:
Thought: what to do next, and why
Action: go to R | open R | close R | take O from R | {put} | clean O with R | heat O with R | cool O with R | \
use O | slice O with O | examine X | look | inventory
You carry one object at a time. Closed things hide what they hold."""


@dataclass(frozen=True)
class AlfWorldConfig:
    """Which games, and how they are played. Raises ValueError for a value out of range."""

    data: str = ""  # folder with json_2.1.1 in it; "" for $ALFWORLD_DATA, where alfworld-download leaves the games
    max_steps: int = 50  # actions, then the episode is truncated
    restate_task: int = 1  # 1: every observation ends with the task; 0: the first alone, as in ALFWorld
    task_types: tuple[str, ...] = TASK_TYPES  # games of other types are left out

    def __post_init__(self):
        if unknown := set(self.task_types) - set(TASK_TYPES):
            raise ValueError(f"unknown task types {sorted(unknown)}; there are {', '.join(TASK_TYPES)}")
        if not self.task_types:
            raise ValueError("task_types is empty")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.restate_task not in (0, 1):
            raise ValueError(f"restate_task must be 0 or 1, got {self.restate_task}")


# ------------------------------------------------------------------------------------------------ finding games


@dataclass(frozen=True)
class Game:
    """A game file and what it asks for, in the words that the player sees."""

    path: str
    task_type: str
    kind: str  # of the wanted object
    home: str  # kind of the receptacle that it goes to; "" for look_at_obj_in_light
    lamp: str  # kind of the lamp; "" for the other task types
    walkthrough: tuple[
        str, ...
    ] = ()  # a way to win, as it is stored in the game file; the planner's in those written here

    @property
    def treatment(self) -> str | None:
        return TREATMENT.get(self.task_type)


def data_folder(data: str) -> Path:
    """The folder with the splits. Raises ValueError, with the command to run, if there is no game in it."""
    root = Path(data or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser() / LAYOUT
    if next(root.rglob("game.tw-pddl"), None) is None:
        raise ValueError(
            f"no ALFWorld games in {root}; run `alfworld-download` for the published ones, or "
            f"`python -m worlds.alfworld_games --out {root.parent} --split train --games 100` to write some, "
            "and name their folder with --data or $ALFWORLD_DATA"
        )
    return root


@functools.cache  # thousands of files, the same for every environment of the process
def find_games(root: Path, split: str, task_types: tuple[str, ...]) -> tuple[Game, ...]:
    """The playable games of a split, in an order that depends on their names alone.

    Raises ValueError for an unknown split, one without playable games, and a file that cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; alfworld has {', '.join(SPLITS)}")
    # By trial first: the name of the folder above begins with the task type.
    found = sorted((root / split).rglob("traj_data.json"), key=lambda path: (path.parent.name, path))
    games, skipped = [], Counter()
    for path in tqdm(found, desc=f"reading {split}", unit="game", leave=False, delay=2):
        game = _read(path, str(path.relative_to(root)), task_types)
        if isinstance(game, Game):
            games.append(game)
        else:
            skipped[game] += 1
    reasons = "".join(f"; {number} left out: {reason}" for reason, number in sorted(skipped.items()))
    if not games:
        raise ValueError(
            f"no playable game in {root / split}{reasons}; run `alfworld-download`, or "
            f"`python -m worlds.alfworld_games --out {root.parent} --split {split} --games 100`"
        )
    if skipped:
        logging.getLogger(__name__).warning("%s: %d games%s", root / split, len(games), reasons)
    return tuple(games)


def _read(path: Path, name: str, task_types: tuple[str, ...]) -> Game | str:
    """The game beside a traj_data.json, or the reason why it does not count; ALFWorld's loader leaves the same out."""
    if "movable" in name or "Sliced" in name:
        return "movable or sliced"
    goal = _json(path, task_type=str, pddl_params=dict)
    if goal["task_type"] not in task_types:
        return "other task types"
    game = path.parent / "game.tw-pddl"
    if not game.exists():
        return "no game file"
    played = _json(game, pddl_domain=str, grammar=str, pddl_problem=str)
    if not played.get("solvable"):
        return "not solvable"
    words = [goal["pddl_params"].get(f"{role}_target") or "" for role in ("object", "parent", "toggle")]
    object_and_places = (str(word).lower() for word in words)
    return Game(str(game), goal["task_type"], *object_and_places, tuple(played.get("walkthrough") or ()))


def _json(path: Path, **keys: type) -> dict:
    """What a file holds. Raises ValueError, with the path, if it cannot be read or lacks one of the keys."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    data = data if isinstance(data, dict) else {}
    if missing := [key for key, kind in keys.items() if not isinstance(data.get(key), kind)]:
        raise ValueError(f"{path} is broken: it has no {', '.join(missing)}")
    return data


def put_template(path: Path) -> str:
    """`move {o} to {r}`, or `put {o} in/on {r}` in older data: a game file's own words, and those of its folder."""
    found = re.search(r'action PutObject \{\s*template :: "(.*?)"', _json(path, grammar=str)["grammar"])
    if found is None:
        raise ValueError(f"{path} is broken: its grammar has no PutObject")
    return found[1]


# -------------------------------------------------------------------------------------------------- playing them


def kind_of(name: str) -> str:
    """`drawer` for `drawer 1`."""
    return name.split()[0]


class AlfWorld:
    """One game at a time; gymnasium's reset and step, with text for both spaces.

    `reset(split, seed)` -> observation, info; `step(action)` -> observation, reward, terminated, truncated, info.
    info["valid"] says whether the engine understood and did the action, info["success"] whether the task is done.
    Raises ValueError if there is no data, ImportError if the engine is not installed.
    """

    def __init__(self, config: AlfWorldConfig | None = None):
        from worlds.alfworld_engine import (  # here, so that the project works without the engine's packages
            NOTHING,
            Engine,
        )

        self.config, self._nothing = config or AlfWorldConfig(), NOTHING
        self._root = data_folder(self.config.data)
        self._put = put_template(next(self._root.rglob("game.tw-pddl")))
        self.instructions = INSTRUCTIONS.format(put=self._put.format(o="O", r="R"))
        self._engine = Engine()

    def size(self, split: str) -> int:
        """Number of games in the split. Raises ValueError for an unknown or empty one."""
        return len(find_games(self._root, split, self.config.task_types))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start game number `seed` of the split. Raises ValueError for one that is not there or that is broken."""
        if not 0 <= seed < self.size(split):
            raise ValueError(f"{split} has {self.size(split)} games, numbered from 0; there is no {seed}")
        self.game = find_games(self._root, split, self.config.task_types)[seed]
        room, _, task = self._engine.start(self.game.path).rpartition("Your task is to: ")
        self._actions, self._task = [], f" Task: {task.strip()}"
        room = room.removeprefix("-= Welcome to TextWorld, ALFRED! =-").strip()
        return room + self._task, {"task_type": self.game.task_type, "success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Do one action. The reward is 1.0 in the step that completes the task, else 0.0.

        Raises alfworld_engine.EngineError if the engine does; the environment can be reset then.
        """
        reply, success = self._engine.step(action)
        self._actions.append(action)
        truncated = not success and len(self._actions) >= self.config.max_steps
        info = {"valid": reply != self._nothing, "task_type": self.game.task_type, "success": success}
        observation = reply + self._task if self.config.restate_task else reply
        return observation, float(success), success, truncated, info

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Every action that the engine would do now, sorted; `help` is left out."""
        return [command for command in self._engine.commands if command != "help"]

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player who knows where everything is, whatever happened before: the game's stored
        walkthrough for as long as it was followed and goes on, then what the facts suggest, then the planner.

        Raises alfworld_engine.EngineError if there is no way to win.
        """
        thought, action = Oracle(self.game, self._engine.facts(), self._put).decide()
        done, plan = len(self._actions), self.game.walkthrough
        if (*self._actions,) == plan[:done] and done < len(plan) and plan[done] in self._engine.commands:
            return thought, plan[done]
        if action not in self._engine.commands:  # a state that the facts were not read for: let the planner think
            action = self._engine.plan()[0]
        return thought, action


class Oracle:
    """The next step of a player who knows where everything is and has left the stored walkthrough, decided from the
    facts of the state it is in.

    To plan anew takes a second and more in some states, this takes less than 1 ms; and it is easier to learn from: it
    takes what lies before its eyes, where a planner with several shortest plans may fetch the like from elsewhere.
    """

    def __init__(self, game: Game, facts: dict[str, set[tuple[str, ...]]], put: str):
        self.game, self.facts, self.put = game, facts, put
        self.place = dict(sorted(facts["inreceptacle"]))  # object -> where it lies
        self.held = next((thing for _, thing in facts["holds"]), None)
        at = {location for _, location in facts["atlocation"]}
        self.here = {r for r, location in facts["receptacleatlocation"] if location in at}  # they may share a location
        self.wanted = [thing for thing, _ in sorted(facts["objecttype"]) if kind_of(thing) == game.kind]
        treated = {thing for (thing,) in facts[RESULT[game.treatment]]} if game.treatment else self.wanted
        self.ready = [thing for thing in self.wanted if thing in treated]

    def decide(self) -> tuple[str, str]:
        """(thought, action); what it does not find is called None, an action that the engine does not know."""
        game, held, home = self.game, self.held, self._home()
        if held is None:
            left = [o for o in self.wanted if o in self.place and (o not in self.ready or self.place[o] != home)]
            left = [o for o in left if o in self.ready] or left
            spot = self._nearest(self.place[o] for o in left)
            thing = next((o for o in left if self.place[o] == spot), None)
            return self._at(spot, f"I need the {game.kind}.", f"take {thing} from {spot}")
        kind = kind_of(held)
        if held not in self.wanted:
            spot = self._nearest(self._holding(held))
            return self._at(spot, f"I do not need the {kind}.", self.put.format(o=held, r=spot))
        if game.lamp:
            lamp = next((o for o in sorted(self.place) if kind_of(o) == game.lamp), None)
            return self._at(self.place.get(lamp), f"I need the {game.lamp}.", f"use {lamp}")
        if held not in self.ready:
            tool = self._nearest(self._of_kind(TOOL[game.treatment]))
            treat = f"{game.treatment} {held} with {tool}"
            return self._at(tool, f"I must {game.treatment} the {kind}.", treat, open_first=False)
        return self._at(home, f"The {kind} goes to the {game.home}.", self.put.format(o=held, r=home))

    def _at(self, spot: str | None, thought: str, action: str, open_first: bool = True) -> tuple[str, str]:
        """The way to do `action` at `spot`: go, open (a tool works closed), act."""
        if spot not in self.here:
            return thought, f"go to {spot}"
        return thought, f"open {spot}" if open_first and self._closed(spot) else action

    def _home(self) -> str | None:
        """Where the wanted object goes: beside its twin if that is home already."""
        homes = self._of_kind(self.game.home)
        at_home = [self.place.get(o) for o in self.ready]
        most = max(map(at_home.count, homes), default=0)
        best = [r for r in homes if at_home.count(r) == most]
        # With empty hands the nearest would change on the way from one home to the other, and there would be no end.
        return self._nearest(best) if self.held else min(best, default=None)

    def _nearest(self, spots: Iterable[str]) -> str | None:
        """Here rather than elsewhere, open rather than closed."""
        return min(spots, key=lambda r: (r not in self.here, self._closed(r), r), default=None)

    def _closed(self, spot: str) -> bool:
        return (spot,) in self.facts["openable"] and (spot,) not in self.facts["opened"]

    def _of_kind(self, kind: str) -> list[str]:
        return [r for r, _ in self.facts["receptacletype"] if kind_of(r) == kind]

    def _holding(self, thing: str) -> list[str]:
        """The receptacles that may hold a thing."""
        types = {kind for o, kind in self.facts["objecttype"] if o == thing}
        may = {place for place, kind in self.facts["cancontain"] if kind in types}
        return [r for r, kind in self.facts["receptacletype"] if kind in may]
