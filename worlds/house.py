"""A household world in ALFWorld's action grammar: pure Python, text in, text out.

A room holds receptacles ("drawer 1") and objects ("apple 1"). A closed receptacle hides its objects. The reward is 1.0
in the step that completes the task and 0.0 in every other step.

A note lies on a surface. Going there and reading it costs up to two steps. The note says where the wanted objects are.
This is the information-gathering step that EMPG's clarity bonus is about.

Task types and verbs are ALFWorld's, and the replies are modelled on it. Three differences:
- ALFWorld has no note and no `read`.
- Every observation here ends with the task. A very small model then need not remember it.
- Rooms are drawn at random. ALFWorld takes them from the simulator AI2-THOR.
"""

import copy
import hashlib
import random
from dataclasses import dataclass
from itertools import count

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
SPLITS = ("train", "eval")

SURFACES = ("countertop", "diningtable", "sidetable", "shelf", "desk", "dresser")  # never closed
HIDING = ("drawer", "cabinet")  # closed at the start
APPLIANCES = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}  # verb -> kind of appliance
OPENABLE = (*HIDING, "microwave", "fridge")
RESULT = {"clean": "clean", "heat": "hot", "cool": "cool"}  # verb -> adjective in the task
TREATMENT = {f"pick_{verb}_then_place_in_recep": verb for verb in APPLIANCES}  # task type -> verb
OBJECTS = {  # kind -> the treatments that are possible
    "apple": ("clean", "heat", "cool"), "tomato": ("clean", "heat", "cool"), "potato": ("clean", "heat", "cool"),
    "egg": ("clean", "heat", "cool"), "cup": ("clean", "heat", "cool"), "mug": ("clean", "heat", "cool"),
    "plate": ("clean", "heat", "cool"), "bowl": ("clean", "cool"), "lettuce": ("clean", "cool"),
    "pan": ("clean", "cool"), "bread": ("heat", "cool"), "knife": ("clean",), "fork": ("clean",), "spoon": ("clean",),
    "cloth": ("clean",),
    "book": (), "pen": (), "pencil": (), "cd": (), "keychain": (), "watch": (), "vase": (), "candle": (), "box": (),
}  # fmt: skip

NOTE, LAMP = "note 1", "desklamp 1"
NOTHING = "Nothing happens."
INSTRUCTIONS = """\
You act in a house, one action a turn, and carry one object at a time. The note tells where the wanted things are.
Actions: go to X, open X, close X, take O from X, move O to X, clean O with X, heat O with X, cool O with X, \
use O, read O, examine X, look, inventory
Write:
Thought: why
Action: what"""


@dataclass(frozen=True)
class HouseConfig:
    """The size of a room, the step limit and the task types. Raises ValueError for a value out of range."""

    receptacles: int = 6  # in a room, including one appliance for each treatment in task_types
    objects: int = 4  # in a room, not counting the note and the lamp
    max_steps: int = 14  # the episode is truncated after this many actions
    task_types: tuple[str, ...] = (TASK_TYPES[0], TASK_TYPES[2], TASK_TYPES[3])  # place, clean, heat

    def __post_init__(self):
        require_task_types(self.task_types)
        if not 6 <= self.receptacles <= 60:
            raise ValueError(
                f"receptacles must be 6 to 60 (up to 3 appliances, 2 surfaces, 1 drawer), got {self.receptacles}"
            )
        if not 2 <= self.objects <= 60:
            raise ValueError(f"objects must be 2 to 60, got {self.objects}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")


@dataclass(frozen=True)
class Goal:
    """The goal of a task: `number` objects of one kind, treated if the task type says so, in one receptacle.

    The goal of look_at_obj_in_light is to hold one object beside the lamp, with the lamp on.
    """

    task_type: str
    kind: str  # of the wanted objects
    receptacle: str  # kind of the receptacle; "desklamp" for look_at_obj_in_light

    @property
    def treatment(self) -> str | None:
        return TREATMENT.get(self.task_type)

    @property
    def number(self) -> int:
        return 2 if self.task_type == "pick_two_obj_and_place" else 1

    def __str__(self) -> str:
        if self.task_type == "look_at_obj_in_light":
            return f"examine the {self.kind} with the desklamp."
        which = "two" if self.number == 2 else f"a {RESULT[self.treatment]}" if self.treatment else "a"
        return f"put {which} {self.kind} in {self.receptacle}."


def require_task_types(task_types: tuple[str, ...]) -> None:
    """Raises ValueError if there is no task type, or an unknown one."""
    if unknown := set(task_types) - set(TASK_TYPES):
        raise ValueError(f"unknown task types {sorted(unknown)}; there are {', '.join(TASK_TYPES)}")
    if not task_types:
        raise ValueError("task_types is empty")


def kind_of(name: str) -> str:
    """`drawer` for `drawer 1`."""
    return name.split()[0]


def listing(names: list[str]) -> str:
    """`a cup 1, and a pen 1`, as ALFWorld writes it; `nothing` for an empty list."""
    if not names:
        return "nothing"
    *first, last = (f"a {name}" for name in names)
    return f"{', '.join(first)}, and {last}" if first else last


class House:
    """One task at a time, see `worlds.contract.Env`. Valid is an action that the world understood and did."""

    instructions = INSTRUCTIONS

    def __init__(self, config: HouseConfig | None = None):
        self.config = config or HouseConfig()

    # ------------------------------------------------------------------------------------------- building a task

    def size(self, split: str) -> None:
        """None: there is a task for every seed."""

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """The hash of a task decides which split it belongs to, so no train task is also an eval task. Tasks are drawn
        until one belongs to `split`."""
        for attempt in count():
            self._build(random.Random(f"{split}/{seed}/{attempt}"))  # a str seed draws the same on every machine
            digest = int.from_bytes(hashlib.sha256(self.fingerprint().encode()).digest()[:8], "big")
            if split == ("eval" if digest % 4 == 0 else "train"):
                break
        self.at, self.holding, self.lamp_on, self.note_read, self.steps = None, None, False, False, 0
        self.open, self.treated = set(), set()  # open receptacles; (verb, object) pairs
        observation = f"You are in a room. You see {listing(self.receptacles)}."
        if LAMP in self.place:
            observation += f" The {LAMP} stands on {self.place[LAMP]}."
        observation += f" The {NOTE} lies on {self.place[NOTE]}."
        return self._with_status(observation), {"task_type": self.goal.task_type, "success": False}

    def _build(self, rng: random.Random) -> None:
        """Draw a room, its objects and a goal."""
        number: dict[str, int] = {}

        def named(kind: str) -> str:
            number[kind] = number.get(kind, 0) + 1
            return f"{kind} {number[kind]}"

        appliances = [
            kind for task, kind in zip(TREATMENT, APPLIANCES.values(), strict=True) if task in self.config.task_types
        ]
        free = self.config.receptacles - len(appliances)
        # No object starts in a receptacle of the goal's kind. Two kinds of surface leave at least one to start on.
        surfaces = [named(kind) for kind in rng.sample(SURFACES, 2)]
        surfaces += [named(rng.choice(SURFACES)) for _ in range(free // 2 - 2)]
        hiding = [named(rng.choice(HIDING)) for _ in range(free - len(surfaces))]
        self.receptacles = [*surfaces, *hiding, *map(named, appliances)]
        rng.shuffle(self.receptacles)

        self.goal = self._draw_goal(rng)
        storage = [r for r in surfaces + hiding if kind_of(r) != self.goal.receptacle]
        others = [kind for kind in OBJECTS if kind != self.goal.kind]
        kinds = [self.goal.kind] * self.goal.number
        kinds += [rng.choice(others) for _ in range(self.config.objects - len(kinds))]
        self.place = {named(kind): rng.choice(storage) for kind in kinds}  # object -> receptacle, or "agent" if held
        self.place[NOTE] = rng.choice(surfaces)
        if "look_at_obj_in_light" in self.config.task_types:
            self.place[LAMP] = rng.choice(surfaces)
        wanted = [thing for thing in self.place if kind_of(thing) == self.goal.kind]
        self.note = ", ".join(f"{thing} is at {self.place[thing]}" for thing in wanted)

    def _draw_goal(self, rng: random.Random) -> Goal:
        task_type = rng.choice(self.config.task_types)
        treatment = TREATMENT.get(task_type)
        kind = rng.choice([kind for kind, verbs in OBJECTS.items() if treatment is None or treatment in verbs])
        if task_type == "look_at_obj_in_light":
            return Goal(task_type, kind, "desklamp")
        # Nothing is stored in a sink, or in the appliance that treats it.
        kinds = sorted({kind_of(r) for r in self.receptacles} - {"sinkbasin", APPLIANCES.get(treatment)})
        return Goal(task_type, kind, rng.choice(kinds))

    def fingerprint(self) -> str:
        """The start of the task in one line. Two tasks have the same line only if they are the same task."""
        return f"{self.goal} {self.receptacles} {sorted(self.place.items())}"

    # ------------------------------------------------------------------------------------------------- acting

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        reply = self._act(action)
        self.steps += 1
        success = self._done()
        truncated = not success and self.steps >= self.config.max_steps
        info = {"valid": reply != NOTHING, "task_type": self.goal.task_type, "success": success}
        return self._with_status(reply), float(success), success, truncated, info

    def _with_status(self, text: str) -> str:
        where = f"At {self.at or 'the door'} with {self.holding or 'nothing'}."
        return f"{text} {where} Task: {self.goal}"

    def _act(self, action: str) -> str:
        """Do the action and return the reply. The reply is NOTHING if the action is unknown or not possible now."""
        match action.lower().split():
            case ["go", "to", *name] if (place := " ".join(name)) in self.receptacles and place != self.at:
                self.at = place
                return f"You arrive at {place}. {self._contents(place)}"
            case ["open", *name] if (place := " ".join(name)) == self.at and self._closed(place):
                self.open.add(place)
                return f"You open the {place}. {self._contents(place)}"
            case ["close", *name] if (place := " ".join(name)) == self.at and place in self.open:
                self.open.remove(place)
                return f"You close the {place}."
            case ["take", kind, n, "from", *name] if self._can_take(thing := f"{kind} {n}", " ".join(name)):
                self.place[thing], self.holding = "agent", thing
                return f"You pick up the {thing} from the {self.at}."
            case ["move", kind, n, "to", *name] if self._can_put(thing := f"{kind} {n}", " ".join(name)):
                self.place[thing], self.holding = self.at, None
                return f"You move the {thing} to the {self.at}."
            case [verb, kind, n, "with", *name] if self._can_treat(verb, thing := f"{kind} {n}", " ".join(name)):
                self.treated -= {("heat", thing), ("cool", thing)} if verb != "clean" else set()
                self.treated.add((verb, thing))
                return f"You {verb} the {thing} using the {self.at}."
            case ["use", *name] if " ".join(name) == LAMP and self.at and self.place.get(LAMP) == self.at:
                self.lamp_on = True
                return f"You turn on the {LAMP}."
            case ["read", *name] if " ".join(name) == NOTE and self.place[NOTE] == self.at:
                self.note_read = True
                return f"The {NOTE} says: {self.note}."
            case ["examine", *name] if (thing := " ".join(name)) == self.at or thing in self._reachable():
                return self._contents(thing) if thing == self.at else f"There's nothing special about {thing}."
            case ["look"]:
                return self._contents(self.at) if self.at else f"You see {listing(self.receptacles)}."
            case ["inventory"]:
                return f"You are carrying {listing([self.holding] if self.holding else [])}."
        return NOTHING

    def _closed(self, place: str) -> bool:
        return kind_of(place) in OPENABLE and place not in self.open

    def _contents(self, place: str) -> str:
        if self._closed(place):
            return f"The {place} is closed."
        where = "In" if kind_of(place) in OPENABLE else "On"
        return f"{where} the {place}, you see {listing([o for o, p in self.place.items() if p == place])}."

    def _reachable(self) -> list[str]:
        """The objects that the agent sees or holds."""
        here = self.at if self.at and not self._closed(self.at) else None
        return [thing for thing, place in self.place.items() if place in (here, "agent")]

    def _can_take(self, thing: str, place: str) -> bool:
        if thing in (NOTE, LAMP) or self.holding is not None:
            return False
        return place == self.at == self.place.get(thing) and not self._closed(place)

    def _can_put(self, thing: str, place: str) -> bool:
        return thing == self.holding and place == self.at and not self._closed(place)

    def _can_treat(self, verb: str, thing: str, place: str) -> bool:
        possible = verb in OBJECTS.get(kind_of(thing), ())
        return possible and thing == self.holding and place == self.at and kind_of(place) == APPLIANCES[verb]

    def _done(self) -> bool:
        goal = self.goal
        if goal.receptacle == "desklamp":
            held = self.holding is not None and kind_of(self.holding) == goal.kind
            return held and self.lamp_on and self.at == self.place[LAMP]
        homes = [self.place[o] for o in self._ready() if kind_of(self.place[o]) == goal.receptacle]
        return any(homes.count(home) >= goal.number for home in homes)

    def _ready(self) -> list[str]:
        """The objects of the wanted kind that need no treatment any more."""
        verb = self.goal.treatment
        return [o for o in self.place if kind_of(o) == self.goal.kind and (verb is None or (verb, o) in self.treated)]

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Every action that is possible now, in a fixed order. A random player draws from these."""
        actions = [f"go to {r}" for r in self.receptacles]
        actions += [f"open {self.at}", f"close {self.at}", f"examine {self.at}"]
        for thing in self._reachable():
            actions += [f"take {thing} from {self.at}", f"move {thing} to {self.at}", f"examine {thing}"]
            actions += [f"{verb} {thing} with {self.at}" for verb in APPLIANCES]
        actions += [f"use {LAMP}", f"read {NOTE}", "look", "inventory"]
        return [action for action in actions if self._possible(action)]

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that reads the note first and then makes no mistake, from any state."""
        goal, held = self.goal, self.holding
        if not self.note_read:
            return self._there(self.place[NOTE], f"The {NOTE} lies on", f"read {NOTE}")
        mine = [thing for thing in self.place if kind_of(thing) == goal.kind]
        homes = [r for r in self.receptacles if kind_of(r) == goal.receptacle]
        # Of two wanted objects, the second goes to the receptacle that holds the first.
        home = max(homes, key=[self.place[thing] for thing in mine].count, default=None)
        if held is None:
            thing = next(o for o in mine if self.place[o] != home or o not in self._ready())
            return self._there(self.place[thing], f"The {thing} is at", f"take {thing} from {self.place[thing]}")
        if held not in mine:
            return self._there(self.at, "Not wanted, leave it at", f"move {held} to {self.at}")
        if goal.receptacle == "desklamp":
            return self._there(self.place[LAMP], f"The {LAMP} stands on", f"use {LAMP}")
        if held not in self._ready():
            tool = f"{APPLIANCES[goal.treatment]} 1"
            if self.at != tool:
                return f"To {goal.treatment} it, to the {tool}.", f"go to {tool}"
            return f"To {goal.treatment} it, use the {tool}.", f"{goal.treatment} {held} with {tool}"
        return self._there(home, "It belongs to", f"move {held} to {home}")

    def _possible(self, action: str) -> bool:
        trial = copy.copy(self)
        trial.place, trial.open, trial.treated = dict(self.place), set(self.open), set(self.treated)
        return trial._act(action) != NOTHING

    def _there(self, place: str, thought: str, action: str) -> tuple[str, str]:
        """(thought, action) of the next step towards `action` at `place`: go there, open it, then act."""
        if self.at != place:
            return f"{thought} {place}.", f"go to {place}"
        return (f"The {place} is closed.", f"open {place}") if self._closed(place) else (f"{thought} {place}.", action)
