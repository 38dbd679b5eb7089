"""Write games that the real ALFWorld engine plays, for machines that cannot fetch the published ones.

    python -m worlds.alfworld_games --out games --split train --games 200
    python -m worlds.alfworld_games --out games --split valid_seen --games 100
    python -m worlds.alfworld_games --out games --split valid_unseen --games 100

These are games in ALFWorld's format, not the published benchmark. The domain, the grammar, the goals and the
receptacles of the 120 rooms come from the alfworld package. The places of the objects are drawn at random; the
published ones come from a simulator. A room with more receptacles than the setting `receptacles` loses some of them.

The six task types take turns. The engine's planner solves each game, and its solution is played before the game is
written. A draw without a solution is drawn again.

train and valid_seen share 96 rooms. valid_unseen has 24 other rooms. No game is in both train and valid_seen, whatever
the seeds: the hash of a game decides which of the two it belongs to. The same arguments write the same files.
"""

import functools
import hashlib
import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

try:
    import alfworld.gen
    from alfworld.gen import constants, goal_library
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
except ImportError as error:
    raise ImportError(
        f"ALFWorld's engine is not installed ({error}); run: pip install --no-deps -r requirements-alfworld.txt"
    ) from error

from worlds.alfworld_engine import Engine, EngineError
from worlds.alfworld_env import LAYOUT
from worlds.house import TASK_TYPES, TREATMENT

PLANS = Path(alfworld.gen.__path__[0]) / "layouts"
FIXED = constants.RECEPTACLES - constants.MOVABLE_RECEPTACLES_SET
HOLDS = {kind: constants.VAL_RECEPTACLE_OBJECTS.get(kind, set()) & constants.OBJECTS_SET for kind in FIXED}
ABILITIES = constants.VAL_ACTION_OBJECTS  # "Cleanable" -> kinds of objects
APPLIANCES = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}  # as in house.py, in the layouts' spelling
STANDS = ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf")  # where a lamp may stand
EXTRA = {  # receptacles of the published games that the layouts never name
    "Kitchen": ("StoveBurner", "StoveBurner", "StoveBurner", "StoveBurner", "CoffeeMachine", "GarbageCan"),
    "LivingRoom": ("DiningTable", "GarbageCan", "SideTable"),
    "Bedroom": ("GarbageCan", "SideTable"),
    "Bathroom": ("GarbageCan", "ToiletPaperHanger", "TowelHolder"),
}
ATTEMPTS = 1000  # draws for one game; more than a dozen are rare


@dataclass(frozen=True)
class GamesConfig:
    """Which games to write, and where. Raises ValueError for a value out of range."""

    out: str = field(metadata={"help": "the games go to the folder OUT/json_2.1.1/SPLIT, which must not exist"})
    split: Literal["train", "valid_seen", "valid_unseen"] = field(default="train", metadata={"help": "split to write"})
    games: int = field(default=100, metadata={"help": "number of games; the six task types take turns"})
    seed: int = field(default=0, metadata={"help": "random seed of the draws"})
    receptacles: int = field(default=16, metadata={"help": "largest number in a room"})
    objects: int = field(default=18, metadata={"help": "largest number in a room"})

    def __post_init__(self):
        if self.games < 1:
            raise ValueError(f"games must be at least 1, got {self.games}")
        if self.receptacles < 5:
            raise ValueError(f"receptacles must be at least 5 (3 appliances and 2 more), got {self.receptacles}")
        if self.objects < 4:
            raise ValueError(f"objects must be at least 4 (3 of the wanted kind and a lamp), got {self.objects}")


# -------------------------------------------------------------------------------------------------------- rooms


@dataclass(frozen=True)
class Room:
    """One of AI2-THOR's floor plans: its receptacles, the same in every game, and the kinds of its objects."""

    floor: int  # number of the floor plan
    scene: str  # Kitchen, LivingRoom, Bedroom or Bathroom
    location: dict[str, str]  # receptacle -> location; a receptacle's id is "Cabinet|+00.68|+00.50|-02.20"
    kinds: tuple[str, ...]  # of the objects that belong here

    def places_for(self, kind: str) -> list[str]:
        """The receptacles that can contain this kind of object."""
        return [receptacle for receptacle in self.location if kind in HOLDS[kind_of(receptacle)]]


def kind_of(name: str) -> str:
    """The kind in an id: `Cabinet` for `Cabinet|+00.68|+00.50|-02.20`, `SinkBasin` for `Sink|...|SinkBasin`."""
    first, *_, last = name.split("|")
    return last if last.endswith("Basin") else first


def named(kind: str, rng: random.Random) -> str:
    """A new id for an object or a receptacle, written like the ids of the layouts."""
    return "|".join([kind, *(f"{rng.uniform(-4, 4):+06.2f}" for _ in range(3))])


@functools.cache
def make_room(floor: int, receptacles: int) -> Room:
    """The room of a floor plan, with at most `receptacles` of its receptacles.

    A large room keeps the appliances first, then one receptacle of each other kind, then the rest in random order.
    """
    rng = random.Random(floor)
    scene = next(scene for scene, floors in constants.SCENE_TYPE.items() if floor in floors)
    layout = json.loads((PLANS / f"FloorPlan{floor}-openable.json").read_bytes())
    poses = {name: pose for name, pose in layout.items() if kind_of(name) in FIXED}
    present = {kind_of(name) for name in poses}
    for kind in EXTRA[scene]:
        if kind not in present:
            poses[named(kind, rng)] = [rng.randint(-4, 4), rng.randint(-4, 4), 90 * rng.randint(0, 3), 60]
    names = rng.sample(sorted(poses), len(poses))
    first = {kind_of(name): name for name in reversed(names)}
    names.sort(key=lambda name: (first[kind_of(name)] != name, kind_of(name) not in APPLIANCES.values()))
    location = {}
    for name in sorted(names[:receptacles]):
        x, z, turn, tilt = poses[name]  # metres, degrees; the published games use quarter metres and quarter turns
        location[name] = f"loc|{round(4 * x)}|{round(4 * z)}|{round(turn) // 90}|{round(tilt)}"
    kinds = json.loads((PLANS / f"FloorPlan{floor}-objects.json").read_bytes())
    return Room(floor, scene, location, tuple(sorted((set(kinds) & constants.OBJECTS_SET) - FIXED)))


# -------------------------------------------------------------------------------------------------------- games


@dataclass(frozen=True)
class Draw:
    """A game before it is written: a room, a goal, and the places of the objects at the start."""

    room: Room
    task_type: str
    kind: str  # of the wanted object
    home: str  # kind of the receptacle that it goes to; "" for look_at_obj_in_light
    place: dict[str, str]  # object -> receptacle

    @property
    def lamp(self) -> str:
        return "" if self.home else "DeskLamp"

    def digest(self) -> int:
        """A hash of the start. It does not depend on the ids of the objects, only on their kinds and places."""
        start = sorted((receptacle, kind_of(thing)) for thing, receptacle in self.place.items())
        text = f"{self.room.floor} {sorted(self.room.location)} {self.task_type} {self.kind} {self.home} {start}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def goals(room: Room, task_type: str) -> list[tuple[str, str]]:
    """Every (kind of object, kind of home) that is a possible goal of this task type in this room."""
    verb = TREATMENT.get(task_type)
    appliance = APPLIANCES.get(verb)
    if room.scene not in constants.GOALS_VALID[task_type] or appliance not in {None, *map(kind_of, room.location)}:
        return []
    kinds = [kind for kind in room.kinds if verb is None or kind in ABILITIES[f"{verb}able".capitalize()]]
    homes = {kind: sorted({kind_of(receptacle) for receptacle in room.places_for(kind)}) for kind in kinds}
    if task_type == "look_at_obj_in_light":
        return [(kind, "") for kind in kinds if homes[kind] and kind not in ABILITIES["Toggleable"]]
    # An object starts away from its home, so it needs a second kind of receptacle. The home is not the appliance.
    return [(kind, home) for kind in kinds if len(homes[kind]) > 1 for home in homes[kind] if home != appliance]


def draw(rng: random.Random, config: GamesConfig, task_type: str) -> Draw | None:
    """A random game, which may have no solution. None if this task type is not possible in the room that was drawn."""
    unseen = config.split == "valid_unseen"
    floors = constants.TEST_SCENE_NUMBERS if unseen else constants.TRAIN_SCENE_NUMBERS
    room = make_room(rng.choice(floors), config.receptacles)
    if not (options := goals(room, task_type)):
        return None
    kind, home = rng.choice(options)
    place = {}
    start = [receptacle for receptacle in room.places_for(kind) if kind_of(receptacle) != home]
    for _ in range(1 + (task_type == "pick_two_obj_and_place") + (rng.random() < 0.3)):  # sometimes one too many
        place[named(kind, rng)] = rng.choice(start)
    if not home:
        stands = [receptacle for receptacle in room.location if kind_of(receptacle) in STANDS]
        place[named("DeskLamp", rng)] = rng.choice(stands or sorted(room.location))
    left = constants.MAX_NUM_OF_OBJ_INSTANCES * [
        other for other in room.kinds if other != kind and room.places_for(other)
    ]
    for other in rng.sample(left, max(0, min(len(left), config.objects - len(place)))):
        place[named(other, rng)] = rng.choice(room.places_for(other))
    return Draw(room, task_type, kind, home, place)


def problem(game: Draw, trial: str) -> str:
    """The PDDL problem of a game. Its names are mangled as in the published files."""
    location, place = game.room.location, game.place
    start = "loc|0|0|0|30"
    receptacle_kinds, object_kinds = (sorted({kind_of(name) for name in names}) for names in (location, place))
    objects = ["agent1 - agent", *(f"{kind}Type - otype" for kind in object_kinds)]
    objects += [f"{kind}Type - rtype" for kind in receptacle_kinds]
    objects += [f"{mangled(name)} - object" for name in place] + [f"{mangled(name)} - receptacle" for name in location]
    objects += [f"{mangled(spot)} - location" for spot in sorted({start, *location.values()})]

    facts = ["atLocation agent1 " + start]
    for name, spot in location.items():
        facts += [f"receptacleType {name} {kind_of(name)}Type", f"receptacleAtLocation {name} {spot}"]
        facts += [f"openable {name}"] if kind_of(name) in constants.OPENABLE_CLASS_SET else []
    facts += [f"canContain {r}Type {o}Type" for r in receptacle_kinds for o in object_kinds if o in HOLDS[r]]
    for name, receptacle in place.items():
        kind = kind_of(name)
        facts += [f"objectType {name} {kind}Type", f"inReceptacle {name} {receptacle}"]
        facts += [f"objectAtLocation {name} {location[receptacle]}"]
        facts += [f"pickupable {name}"] if kind != game.lamp else []
        facts += [f"isReceptacleObject {name}"] if kind in constants.MOVABLE_RECEPTACLES_SET else []
        facts += [f"{ability.lower()} {name}" for ability, kinds in ABILITIES.items() if kind in kinds]
    goal = goal_library.gdict[game.task_type]["pddl"].format(obj=game.kind, recep=game.home, toggle=game.lamp)
    facts = "\n".join(f"({mangled(fact)})" for fact in facts)
    header = f"(define (problem plan_{trial})\n(:domain alfred)\n(:objects\n" + "\n".join(objects)
    return f"{header}\n)\n(:init\n{facts}\n)\n{goal.replace('#', '-')}"


def mangled(text: str) -> str:
    """The text with `-+|.` replaced by words. PDDL does not allow these characters in a name."""
    words = {"-": "_minus_", "+": "_plus_", "|": "_bar_", ".": "_dot_"}
    return re.sub(r"[-+|.]", lambda match: words[match[0]], text)


def solve(engine: Engine, game: dict) -> list[str] | None:
    """The planner's commands that win, after playing them. None if there is no plan, or if it does not win."""
    try:
        engine.start(game)
        plan = engine.plan()
    except (ValueError, EngineError):  # from the translator and from the planner: the goal cannot be reached
        return None
    return plan if [engine.step(command)[1] for command in plan][-1] else None


# ------------------------------------------------------------------------------------------------------ writing


def make_game(engine: Engine, config: GamesConfig, number: int, taken: set[int]) -> dict[str, str]:
    """The files of game number `number`: path in the split -> text. Adds the digest of the game to `taken`.

    taken: digests of the games that are already in the split.  Raises ValueError if no draw has a solution.
    """
    task_type = TASK_TYPES[number % len(TASK_TYPES)]
    trial = f"trial_G{config.seed:04d}{number:06d}"
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{config.seed}/{config.split}/{number}/{attempt}")
        game = draw(rng, config, task_type)
        if game is None or game.digest() in taken:
            continue
        if config.split != "valid_unseen" and (config.split == "valid_seen") != (game.digest() % 4 == 0):
            continue
        template = rng.choice(goal_library.gdict[task_type]["templates"])
        task = template.format(obj=game.kind, recep=game.home, toggle=game.lamp).lower()
        pddl = problem(game, trial)
        grammar, domain = (Path(path).read_text(encoding="utf-8") for path in (ALFRED_TWL2_PATH, ALFRED_PDDL_PATH))
        grammar = grammar.replace("UNKNOWN GOAL", task)
        played = {"pddl_domain": domain, "grammar": grammar, "pddl_problem": pddl}
        if walkthrough := solve(engine, played):
            taken.add(game.digest())
            folder = f"{task_type}-{game.kind}-None-{game.home or game.lamp}-{game.room.floor}/{trial}"
            return {
                f"{folder}/traj_data.json": json.dumps(trajectory(game, trial, task, config.seed), indent=1),
                f"{folder}/initial_state.pddl": pddl,
                f"{folder}/game.tw-pddl": json.dumps(played | {"solvable": True, "walkthrough": walkthrough}),
            }
    raise ValueError(f"no {task_type} found in {ATTEMPTS} draws; try more receptacles or objects")


def trajectory(game: Draw, trial: str, task: str, seed: int) -> dict:
    """The content of traj_data.json: the goal, in the form that ALFWorld's loader and its scripted expert read."""
    floor = game.room.floor
    goal = {"object_target": game.kind, "parent_target": game.home, "toggle_target": game.lamp, "mrecep_target": ""}
    return {
        "task_id": trial,
        "task_type": game.task_type,
        "pddl_params": goal | {"object_sliced": False},
        "scene": {"floor_plan": f"FloorPlan{floor}", "scene_num": floor, "random_seed": seed},
        "turk_annotations": {"anns": [{"task_desc": task, "high_descs": [], "votes": [1]}]},
        "generated": True,
    }


def write_games(config: GamesConfig) -> Path:
    """Write all games of a split, or none, and return their folder. Raises ValueError if the folder exists already."""
    folder = Path(config.out) / LAYOUT / config.split
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or choose another --out")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed at the end: a killed run leaves no half split
    aside.mkdir(parents=True)
    engine, taken = Engine(), set()
    numbers = tqdm(range(config.games), desc=f"writing {config.split}", unit="game")
    games = [make_game(engine, config, number, taken) for number in numbers]
    for name, text in [file for game in games for file in game.items()]:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_text(text, encoding="utf-8")
    os.replace(aside, folder)
    return folder


def main() -> None:
    from transformers import HfArgumentParser  # takes seconds to import

    parser = HfArgumentParser(GamesConfig, description=__doc__.partition("\n")[0])
    try:
        (config,) = parser.parse_args_into_dataclasses()
        folder = write_games(config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{config.games} games in {folder}; play them with --env alfworld --env_args data={config.out}")


if __name__ == "__main__":
    main()
