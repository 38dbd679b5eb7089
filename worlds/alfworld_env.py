"""The real ALFWorld as an environment. It plays the published games and those that alfworld_games.py writes.

A data folder holds json_2.1.1/{train,valid_seen,valid_unseen}. Each game has a folder with two files: traj_data.json is
the goal, game.tw-pddl is what the engine plays. As in ALFWorld's loader, a game counts if it is solvable and has no
movable receptacle and no sliced object. The reward is 1.0 in the step that completes the task, else 0.0.

Differences from ALFWorld's loader:
- The order of the games is fixed, and the task types are mixed in any first N games.
- A data folder without games is an error, and so is a broken file.
- The action `help` is not admissible.
- Every observation ends with the task (setting `restate_task`). A very small model then need not remember it.

docs/worlds.md says how to install the engine and games.
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

from worlds.house import APPLIANCES, NOTHING, RESULT, TASK_TYPES, TREATMENT, kind_of, require_task_types

SPLITS = ("train", "valid_seen", "valid_unseen")  # the rooms of valid_unseen are in no other split
LAYOUT = "json_2.1.1"  # the published data's folder, named after its version

INSTRUCTIONS = """You act in a house. Every turn, write one thought and one action:
Thought: what to do next, and why
Action: go to R | open R | close R | take O from R | {put} | clean O with R | heat O with R | cool O with R | \
use O | slice O with O | examine X | look | inventory
You carry one object at a time. Closed things hide what they hold."""


@dataclass(frozen=True)
class AlfWorldConfig:
    """Where the games are, and how they are played. Raises ValueError for a value out of range."""

    data: str = ""  # folder that contains json_2.1.1; "": $ALFWORLD_DATA, else ~/.cache/alfworld (alfworld-download)
    max_steps: int = 50  # the episode is truncated after this many actions
    restate_task: bool = True  # every observation ends with the task; else only the first one does, as in ALFWorld
    task_types: tuple[str, ...] = TASK_TYPES  # games of other types are left out

    def __post_init__(self):
        require_task_types(self.task_types)
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")


# ------------------------------------------------------------------------------------------------ finding games


@dataclass(frozen=True)
class Game:
    """A game file and its goal, in the words that the player sees."""

    path: str
    task_type: str
    kind: str  # of the wanted object
    home: str  # kind of the receptacle that it goes to; "" for look_at_obj_in_light
    lamp: str  # kind of the lamp; "" for the other task types
    walkthrough: tuple[str, ...] = ()  # actions that win, as stored in the game file

    @property
    def treatment(self) -> str | None:
        return TREATMENT.get(self.task_type)


def data_folder(data: str) -> Path:
    """The folder that contains the splits. Raises ValueError, with the command to run, if it contains no game."""
    root = Path(data or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser() / LAYOUT
    if next(root.rglob("game.tw-pddl"), None) is None:
        raise ValueError(
            f"no ALFWorld games in {root}; run `alfworld-download` for the published ones, or "
            f"`python -m worlds.alfworld_games --out {root.parent} --split train --games 100` to write some, "
            "and name their folder with --env_args data=FOLDER or $ALFWORLD_DATA"
        )
    return root


@functools.cache  # all environments of a process share the list; thousands of files are read only once
def find_games(root: Path, split: str, task_types: tuple[str, ...]) -> tuple[Game, ...]:
    """The playable games of a split. Their order depends only on their names.

    Raises ValueError for a split without playable games, and for a broken file.
    """
    # Sorted by trial: the folder above it begins with the task type, so sorting by path would not mix the types.
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
    """The game beside a traj_data.json, or the reason why it is left out. ALFWorld's loader leaves out the same games.

    Raises ValueError for a broken file.
    """
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
    targets = (goal["pddl_params"].get(f"{role}_target") or "" for role in ("object", "parent", "toggle"))
    kind, home, lamp = (str(target).lower() for target in targets)
    return Game(str(game), goal["task_type"], kind, home, lamp, tuple(played.get("walkthrough") or ()))


def _json(path: Path, **keys: type) -> dict:
    """The content of a JSON file. Raises ValueError, with the path, if it is unreadable or lacks one of `keys`.

    keys: the type of each value that must be there.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    data = data if isinstance(data, dict) else {}
    if missing := [key for key, kind in keys.items() if not isinstance(data.get(key), kind)]:
        raise ValueError(f"{path} is broken: it has no {', '.join(missing)}")
    return data


def put_template(path: Path) -> str:
    """The template of the put action in a game's grammar: `move {o} to {r}`, in older data `put {o} in/on {r}`.

    All games of a data folder use the same one. Raises ValueError for a broken file.
    """
    found = re.search(r'action PutObject \{\s*template :: "(.*?)"', _json(path, grammar=str)["grammar"])
    if found is None or re.search("[{}]", re.sub(r"\{[or]\}", "", found[1])):
        raise ValueError(f"{path} is broken: its grammar has no PutObject with the names {{o}} and {{r}}")
    return found[1]


# ------------------------------------------------------------------------------------------------ playing games


class AlfWorld:
    """One game at a time, see `worlds.contract.Env`. Valid is an action that the engine understood and did.

    Raises ValueError if there are no games, ImportError if the engine is not installed.
    """

    def __init__(self, config: AlfWorldConfig | None = None):
        # Imported here, because every other environment must work without the engine's packages.
        from worlds.alfworld_engine import Engine

        self.config = config or AlfWorldConfig()
        self._root = data_folder(self.config.data)
        self._put = put_template(next(self._root.rglob("game.tw-pddl")))
        self.instructions = INSTRUCTIONS.format(put=self._put.format(o="O", r="R"))
        self._engine = Engine()

    def size(self, split: str) -> int:
        """Number of games, 0 without the split's folder. Raises ValueError if no game is playable or one is broken."""
        there = (self._root / split).is_dir()
        return len(find_games(self._root, split, self.config.task_types)) if there else 0

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start game number `seed` of the split. Raises ValueError if it is broken."""
        self.game = find_games(self._root, split, self.config.task_types)[seed]
        intro, _, task = self._engine.start(self.game.path).rpartition("Your task is to: ")
        self._actions, self._task = [], f" Task: {task.strip()}"
        intro = intro.removeprefix("-= Welcome to TextWorld, ALFRED! =-").strip()
        return intro + self._task, {"task_type": self.game.task_type, "success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Raises alfworld_engine.EngineError if the engine fails. The environment can be reset after that."""
        action = action.lower()
        reply, success = self._engine.step(action)
        self._actions.append(action)
        truncated = not success and len(self._actions) >= self.config.max_steps
        info = {"valid": reply != NOTHING, "task_type": self.game.task_type, "success": success}
        observation = reply + self._task if self.config.restate_task else reply
        return observation, float(success), success, truncated, info

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Every action that is possible now, sorted. `help` is left out."""
        return [command for command in self._engine.commands if command != "help"]

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows where everything is, from any state.

        1. The next action of the stored walkthrough, if every action so far followed it.
        2. Otherwise the action that `Oracle` decides on.
        3. If the engine would reject that action, the first action of the planner's plan.
        Raises alfworld_engine.EngineError if the planner finds no plan.
        """
        thought, action = Oracle(self.game, self._engine.facts(), self._put).decide()
        done, plan = len(self._actions), self.game.walkthrough
        if (*self._actions,) == plan[:done] and done < len(plan) and plan[done] in self._engine.commands:
            return thought, plan[done]
        if action not in self._engine.commands:
            action = self._engine.plan()[0]
        return thought, action


class Oracle:
    """A player that knows where everything is. It decides on the next action from the facts of the current state.

    Planning can take more than a second. This takes less than 1 ms. Its actions are also easier to learn: it takes a
    wanted object that is here, while one of several shortest plans may fetch another of the same kind.
    """

    def __init__(self, game: Game, facts: dict[str, set[tuple[str, ...]]], put: str):
        self.game, self.facts, self.put = game, facts, put
        self.place = dict(sorted(facts["inreceptacle"]))  # object -> receptacle
        self.held = next((thing for _, thing in facts["holds"]), None)
        at = {location for _, location in facts["atlocation"]}
        # Several receptacles may share a location.
        self.here = {r for r, location in facts["receptacleatlocation"] if location in at}
        self.wanted = [thing for thing, _ in sorted(facts["objecttype"]) if kind_of(thing) == game.kind]
        treated = {thing for (thing,) in facts[f"is{RESULT[game.treatment]}"]} if game.treatment else self.wanted
        self.ready = [thing for thing in self.wanted if thing in treated]

    def decide(self) -> tuple[str, str]:
        """(thought, action).

        A missing name becomes 'None'. The engine rejects that action, and the planner is asked.
        """
        game, held, home = self.game, self.held, self._home()
        if held is None:
            left = [o for o in self.wanted if o in self.place and (o not in self.ready or self.place[o] != home)]
            left = [o for o in left if o in self.ready] or left
            spot = self._nearest(self.place[o] for o in left)
            thing = next((o for o in left if self.place[o] == spot), None)
            return self._at(spot, f"I need the {game.kind}.", f"take {thing} from {spot}")
        kind = kind_of(held)
        if held not in self.wanted:
            spot = self._nearest(self._can_hold(held))
            return self._at(spot, f"I do not need the {kind}.", self.put.format(o=held, r=spot))
        if game.lamp:
            lamp = next((o for o in sorted(self.place) if kind_of(o) == game.lamp), None)
            return self._at(self.place.get(lamp), f"I need the {game.lamp}.", f"use {lamp}")
        if held not in self.ready:
            tool = self._nearest(self._of_kind(APPLIANCES[game.treatment]))
            treat = f"{game.treatment} {held} with {tool}"
            return self._at(tool, f"I must {game.treatment} the {kind}.", treat, open_first=False)
        return self._at(home, f"The {kind} goes to the {game.home}.", self.put.format(o=held, r=home))

    def _at(self, spot: str | None, thought: str, action: str, open_first: bool = True) -> tuple[str, str]:
        """(thought, action) of the next step towards `action` at `spot`: go there, open it, then act.

        open_first: False for a treatment, which works with a closed appliance.
        """
        if spot not in self.here:
            return thought, f"go to {spot}"
        return thought, f"open {spot}" if open_first and self._closed(spot) else action

    def _home(self) -> str | None:
        """The receptacle for the wanted object. Of two wanted objects, the second goes where the first is."""
        homes = self._of_kind(self.game.home)
        at_home = [self.place.get(o) for o in self.ready]
        most = max(map(at_home.count, homes), default=0)
        best = [r for r in homes if at_home.count(r) == most]
        # With empty hands the choice must not depend on where the agent is, or it would go back and forth.
        return self._nearest(best) if self.held else min(best, default=None)

    def _nearest(self, spots: Iterable[str]) -> str | None:
        """The first of `spots`, sorted: here before elsewhere, then open before closed, then by name."""
        return min(spots, key=lambda r: (r not in self.here, self._closed(r), r), default=None)

    def _closed(self, spot: str) -> bool:
        return (spot,) in self.facts["openable"] and (spot,) not in self.facts["opened"]

    def _of_kind(self, kind: str) -> list[str]:
        return [r for r, _ in self.facts["receptacletype"] if kind_of(r) == kind]

    def _can_hold(self, thing: str) -> list[str]:
        """The receptacles that can contain a thing."""
        types = {kind for o, kind in self.facts["objecttype"] if o == thing}
        may = {place for place, kind in self.facts["cancontain"] if kind in types}
        return [r for r, kind in self.facts["receptacletype"] if kind in may]
