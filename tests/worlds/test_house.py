"""house.py: the same tasks on every machine, the rules verb by verb in a room made by hand, the oracle.

What every world has in common is tested in tests/test_envs.py.
"""

import copy
import hashlib
import random
import re
from itertools import permutations, product

import pytest

from envs import careless_player
from worlds import house
from worlds.house import APPLIANCES, LAMP, NOTE, OBJECTS, TASK_TYPES, Goal, House, HouseConfig, kind_of

PLACE, LIGHT, CLEAN, *_, TWO = TASK_TYPES
DEFAULT = HouseConfig()
LARGE = HouseConfig(receptacles=20, objects=20, max_steps=50, task_types=TASK_TYPES)
SIZES = pytest.mark.parametrize("config", [DEFAULT, LARGE], ids=["default", "large"])
EXTREMES = [HouseConfig(*size, max_steps=20, task_types=TASK_TYPES) for size in product((6, 60), (2, 60))]
TYPES = pytest.mark.parametrize("task_type", TASK_TYPES)

DIGEST = "6447c35c2c270d10768fe2d9c52008d19fd299da408644818a534bc200b1e1f5"  # SHA-256 over 80 episodes

TAKE = "go to desk 1; take apple 1 from desk 1"  # in the kitchen
PUT = "go to shelf 1; move apple 1 to shelf 1"

# ---------------------------------------------------------------------------------------------------------- helpers


def kitchen(task_type: str = PLACE, kind: str = "pen", receptacle: str = "fridge") -> House:
    """A room made by hand. By default the pen is wanted in the fridge."""
    world = House(HouseConfig(max_steps=50, task_types=TASK_TYPES))
    world.reset("train", 0)
    world.goal, world.note = Goal(task_type, kind, receptacle), "pen 1 is at desk 1"
    world.receptacles = ["desk 1", "shelf 1", "shelf 2", "drawer 1", "sinkbasin 1", "microwave 1", "fridge 1"]
    world.place = {"apple 1": "desk 1", "apple 2": "drawer 1", "pen 1": "desk 1"}
    world.place |= {NOTE: "desk 1", LAMP: "shelf 1"}
    return world


def do(world: House, actions: str) -> list[tuple]:
    """The world's answers to actions, which are separated by semicolons. All of them must be valid."""
    answers = [world.step(action) for action in actions.split("; ")]
    assert all(info["valid"] for *_, info in answers)
    return answers


def fork(world: House) -> House:
    twin = House(world.config)
    vars(twin).update({name: copy.copy(value) for name, value in vars(world).items()})
    return twin


def state(world: House) -> dict:
    return vars(fork(world)) | {"steps": 0}


def oracle_actions(world: House) -> list[str]:
    """The oracle's actions up to the end of the episode. All of them must be valid, and the last one must succeed."""
    actions, ended = [], False
    while not ended:
        actions.append(world.oracle()[1])
        ((_, reward, terminated, truncated, info),) = do(world, actions[-1])
        assert reward == info["success"] == terminated
        ended = terminated or truncated
    assert terminated
    return actions


def careless_walk(world: House, split: str, seed: int, slip: float, limit: int):
    """Yield (action, answer) of at most `limit` steps of a careless player. The first action is None, for the reset."""
    player, rng, actions = careless_player(slip), random.Random(seed), []
    yield None, (world.reset(split, seed)[0], 0.0, False, False, {})
    for _ in range(limit):
        actions.append(player(world, actions, rng)[1])
        answer = world.step(actions[-1])
        yield actions[-1], answer
        if answer[2] or answer[3]:
            return


# ------------------------------------------------------------------------------------------------ tasks and splits


def test_a_task_is_the_same_text_on_every_machine():
    """Python's own hash() of a text differs between processes, and so did the tasks of a project that used it."""
    lines = []
    for config, split, seed in product([DEFAULT, LARGE], ["train", "eval"], range(20)):
        lines += [repr(event) for event in careless_walk(House(config), split, seed, 0.5, 30)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST


def test_train_and_eval_share_no_task_and_the_first_eval_tasks_differ(monkeypatch):
    """A project that drew its evaluation goals with repeats from the training goals had seen 64 % of them."""

    def fingerprints(split: str, number: int) -> set[str]:
        found = set()
        for seed in range(number):
            world.reset(split, seed)
            found.add(world.fingerprint())
        return found

    world = House()
    assert len(fingerprints("eval", 256)) == 256
    monkeypatch.setattr(House, "fingerprint", lambda world: str(world.goal))  # so coarse that every draw is a repeat
    assert not fingerprints("train", 400) & fingerprints("eval", 400)


@SIZES
@pytest.mark.parametrize("split", ["train", "eval"])
def test_rooms_have_their_size_and_every_task_type(config, split):
    world, types = House(config), set()
    for seed in range(40):
        types.add(world.reset(split, seed)[1]["task_type"])
        assert len(set(world.receptacles)) == config.receptacles
        assert len(set(world.place) - {NOTE, LAMP}) == config.objects
        wanted = [thing for thing in world.place if kind_of(thing) == world.goal.kind]
        assert len(wanted) == world.goal.number
        assert all(kind_of(world.place[thing]) != world.goal.receptacle for thing in wanted)
    assert types == set(config.task_types)


# ------------------------------------------------------------------------------------------------ verbs and replies


def test_every_verb_and_its_reply():
    world = kitchen()
    replies = {
        "look": "You see a desk 1, a shelf 1, a shelf 2, a drawer 1, a sinkbasin 1, a microwave 1, and a fridge 1.",
        "inventory": "You are carrying nothing.",
        "go to desk 1": "You arrive at desk 1. On the desk 1, you see a apple 1, a pen 1, and a note 1.",
        "read note 1": "The note 1 says: pen 1 is at desk 1.",
        "examine pen 1": "There's nothing special about pen 1.",
        "take apple 1 from desk 1": "You pick up the apple 1 from the desk 1.",
        "examine apple 1": "There's nothing special about apple 1.",
        "examine desk 1": "On the desk 1, you see a pen 1, and a note 1.",
        "  inventory\n": "You are carrying a apple 1.",
        "go to sinkbasin 1": "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.",
        "clean apple 1 with sinkbasin 1": "You clean the apple 1 using the sinkbasin 1.",
        "go to microwave 1": "You arrive at microwave 1. The microwave 1 is closed.",
        "heat apple 1 with microwave 1": "You heat the apple 1 using the microwave 1.",
        "go to fridge 1": "You arrive at fridge 1. The fridge 1 is closed.",
        "cool apple 1 with fridge 1": "You cool the apple 1 using the fridge 1.",
        "go to drawer 1": "You arrive at drawer 1. The drawer 1 is closed.",
        "examine drawer 1": "The drawer 1 is closed.",
        "open drawer 1": "You open the drawer 1. In the drawer 1, you see a apple 2.",
        "move apple 1 to drawer 1": "You move the apple 1 to the drawer 1.",
        " look": "In the drawer 1, you see a apple 1, and a apple 2.",
        "close drawer 1": "You close the drawer 1.",
        "look ": "The drawer 1 is closed.",
        "go to shelf 1": "You arrive at shelf 1. On the shelf 1, you see a desklamp 1.",
        "use desklamp 1": "You turn on the desklamp 1.",
    }
    for action, reply in replies.items():
        observation, *_, info = world.step(action)
        assert info["valid"]
        assert observation.startswith(f"{reply} At ")
    assert observation.endswith("lamp 1. At shelf 1 with nothing. Task: put a pen in fridge.")


@pytest.mark.parametrize(
    ("before", "impossible"),
    [
        ("look", "; go; go to; go to shelf; go to shelf 9; go to None; go shelf 1; go to shelf 1 now"),
        ("look", "open drawer 1; open None; close drawer 1; use desklamp 1; read note 1; dance; look around; nothing"),
        ("look", "examine; examine shelf 1; examine apple 1; examine None; inventory 1; take apple 1 from None"),
        ("look", "move apple 1 to None; clean apple 1 with None; take apple 1 from desk 1"),
        ("go to desk 1", "go to desk 1; open desk 1; close desk 1; use desklamp 1; use pen 1; take pen 9 from desk 1"),
        ("go to desk 1", "take apple 2 from desk 1; take apple 1 from shelf 1; take apple 1; take note 1 from desk 1"),
        ("go to desk 1", "move apple 1 to desk 1; move apple 1 to agent; read pen 1; read note; examine desklamp 1"),
        (TAKE, "take pen 1 from desk 1; take apple 1 from agent; take apple 1 from desk 1; move pen 1 to desk 1"),
        (TAKE, "move apple 1 to shelf 1; clean apple 1 with desk 1; eat apple 1; clean apple 1 with sinkbasin 1"),
        (f"{TAKE}; go to drawer 1", "move apple 1 to drawer 1; close drawer 1; examine apple 2; open drawer"),
        (f"{TAKE}; go to sinkbasin 1", "heat apple 1 with sinkbasin 1; clean apple 2 with sinkbasin 1; clean apple 1"),
        ("go to desk 1; take pen 1 from desk 1; go to fridge 1", "cool pen 1 with fridge 1; move pen 1 to fridge 1"),
        ("go to drawer 1", "take apple 2 from drawer 1; open fridge 1; close fridge 1; read note 1"),
        ("go to drawer 1; open drawer 1; go to shelf 2", "close drawer 1; open drawer 1; take apple 2 from drawer 1"),
        ("go to drawer 1; open drawer 1", "open drawer 1; take apple 1 from drawer 1; clean apple 2 with drawer 1"),
        ("go to shelf 1; use desklamp 1", "take desklamp 1 from shelf 1; use desklamp; move desklamp 1 to shelf 1"),
    ],
)
def test_what_is_impossible_changes_nothing(before, impossible):
    world = kitchen()
    do(world, before)
    known = state(world)
    for action in impossible.split("; "):
        observation, reward, terminated, truncated, info = world.step(action)
        assert observation.startswith(house.NOTHING)
        assert (info["valid"], reward, terminated, truncated) == (False, 0.0, False, False)
        assert state(world) == known


def test_admissible_are_exactly_the_possible_actions_of_the_grammar():
    world = House(HouseConfig(objects=3, task_types=TASK_TYPES))
    for seed in range(6):
        for _ in careless_walk(world, "train", seed, 0.7, 10):
            places, things = world.receptacles, list(world.place)
            grammar = ["look", "inventory", *(f"{verb} {name}" for verb in ("use", "read") for name in things)]
            grammar += [f"{verb} {place}" for verb in ("go to", "open", "close", "examine") for place in places]
            grammar += [f"examine {thing}" for thing in things]
            pairs = {"take": "from", "move": "to"} | dict.fromkeys(APPLIANCES, "with")
            grammar += [f"{verb} {o} {pairs[verb]} {r}" for verb, o, r in product(pairs, things, places)]
            possible = [action for action in grammar if fork(world).step(action)[4]["valid"]]
            known = state(world)
            assert sorted(world.admissible()) == sorted(possible)
            assert state(world) == known


def test_every_kind_of_object_suffers_what_its_table_says_and_nothing_else():
    for (kind, verbs), (verb, appliance) in product(OBJECTS.items(), APPLIANCES.items()):
        world = kitchen()
        world.place[f"{kind} 1"], world.holding = "agent", f"{kind} 1"
        world.step(f"go to {appliance} 1")
        assert world.step(f"{verb} {kind} 1 with {appliance} 1")[4]["valid"] == (verb in verbs)


# -------------------------------------------------------------------------------------------- what the player knows


@SIZES
def test_what_lies_in_a_closed_receptacle_is_not_seen_before_it_is_opened(config):
    world, opened = House(config), 0
    for seed in range(15):
        for action, (observation, *_) in careless_walk(world, "train", seed, 1.0, 40):
            if action is None:
                hidden = {thing: place for thing, place in world.place.items() if kind_of(place) in house.OPENABLE}
            elif action == f"read {NOTE}":
                break
            elif action.startswith("open "):
                hidden = {thing: place for thing, place in hidden.items() if place != action.removeprefix("open ")}
                opened += 1
            assert not set(re.findall(r"\w+ \d+", observation)) & set(hidden)
    assert opened  # or nothing was tested


@pytest.mark.parametrize("task_type", [PLACE, TWO])
def test_the_note_tells_where_every_wanted_object_is(task_type):
    world = House(HouseConfig(task_types=(task_type,)))
    for seed in range(10):
        first, _ = world.reset("train", seed)
        where = {thing: place for thing, place in world.place.items() if kind_of(thing) == world.goal.kind}
        assert f"The note 1 lies on {world.place[NOTE]}." in first
        observation = do(world, f"go to {world.place[NOTE]}; read {NOTE}")[-1][0]
        says = re.match(r"The note 1 says: (.*?)\.", observation)[1]
        assert dict(entry.split(" is at ") for entry in says.split(", ")) == where


# ---------------------------------------------------------------------------------------------------------- success


def treat(*verbs: str) -> str:
    return "; ".join(f"go to {APPLIANCES[verb]} 1; {verb} apple 1 with {APPLIANCES[verb]} 1" for verb in verbs)


HOT, COOL = "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep"
PEN, USE = "go to desk 1; take pen 1 from desk 1", "go to shelf 1; use desklamp 1"
SECOND = "go to drawer 1; open drawer 1; take apple 2 from drawer 1; go to shelf 2; move apple 2 to shelf 2"


@pytest.mark.parametrize(
    ("goal", "without", "completing"),  # all of the first actions do not complete the task, the next one does
    [
        ((PLACE, "apple", "shelf"), f"{TAKE}; go to shelf 1", "move apple 1 to shelf 1"),
        ((PLACE, "pen", "shelf"), f"{TAKE}; {PUT}; {PEN}; go to shelf 2", "move pen 1 to shelf 2"),  # another kind
        ((CLEAN, "apple", "shelf"), f"{TAKE}; {treat('clean')}; move apple 1 to sinkbasin 1; "  # in a wrong receptacle
         "take apple 1 from sinkbasin 1; go to shelf 2", "move apple 1 to shelf 2"),
        *(((f"pick_{verb}_then_place_in_recep", "apple", "shelf"),  # not treated, or otherwise
           f"{TAKE}; {PUT}; take apple 1 from shelf 1; {treat(*others)}; {PUT}; take apple 1 from shelf 1; "
           f"{treat(verb)}; go to shelf 1", "move apple 1 to shelf 1")
          for verb, *others in permutations(APPLIANCES)),
        ((HOT, "apple", "shelf"), f"{TAKE}; {treat('heat', 'cool')}; {PUT}; take apple 1 from shelf 1; "  # undone
         f"{treat('heat', 'clean')}; go to shelf 1", "move apple 1 to shelf 1"),
        ((COOL, "apple", "shelf"), f"{TAKE}; {treat('cool', 'heat')}; {PUT}; take apple 1 from shelf 1; "
         f"{treat('cool', 'clean')}; go to shelf 1", "move apple 1 to shelf 1"),
        ((CLEAN, "apple", "shelf"), f"{TAKE}; {treat('clean', 'heat', 'cool')}; go to shelf 1",  # clean stays
         "move apple 1 to shelf 1"),
        ((TWO, "apple", "shelf"), f"{TAKE}; {PUT}; {SECOND}; "  # in two receptacles
         "take apple 2 from shelf 2; go to shelf 1", "move apple 2 to shelf 1"),
        ((LIGHT, "pen", "desklamp"), f"{USE}; {TAKE}; {USE}; go to desk 1; move apple 1 to desk 1; "  # the wrong object
         "take pen 1 from desk 1; go to shelf 2", "go to shelf 1"),  # the lamp is still on
        ((LIGHT, "pen", "desklamp"), f"{PEN}; go to shelf 1; move pen 1 to shelf 1; use desklamp 1",  # not in hand
         "take pen 1 from shelf 1"),
        ((LIGHT, "pen", "desklamp"), f"{PEN}; go to shelf 1", "use desklamp 1"),
    ],
)  # fmt: skip
def test_what_completes_a_task(goal, without, completing):
    world = kitchen(*goal)
    assert not any(info["success"] for *_, info in do(world, without))
    assert do(world, completing)[0][1:4] == (1.0, True, False)


# ------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("config", [DEFAULT, LARGE, *EXTREMES])
def test_the_oracle_solves_every_task_with_possible_actions(config, split):
    # Shortest: go, read, take, use, when all lies on one surface. Longest: two objects that lie in drawers go into one:
    # go, read, then twice go, open, take, go, open, move, without opening the second time.
    world, lengths = House(config), []
    for seed in range(100 if config in (DEFAULT, LARGE) else 5):
        world.reset(split, seed)
        lengths.append(len(oracle_actions(world)))
    assert min(lengths) >= 4
    assert max(lengths) <= 13


def shortest(world: House) -> int:
    """Length of the shortest solution, by breadth-first search over all actions that can change the world."""

    def key(w: House) -> tuple:
        return w.at, w.lamp_on, *w.place.values(), frozenset(w.open), frozenset(w.treated)

    seen, border, length = {key(world)}, [world], 0
    while True:
        length, reached = length + 1, []
        for known in border:
            for action in known.admissible():
                if action.split()[0] in ("look", "examine", "inventory", "read"):
                    continue
                child = fork(known)
                if child.step(action)[2]:
                    return length
                if key(child) not in seen:
                    seen.add(key(child))
                    reached.append(child)
        border = reached


@TYPES
def test_the_oracle_is_as_short_as_a_search_but_for_the_note(task_type):
    # Reading costs one step, and another to go to the note unless the way leads there anyway.
    world = House(HouseConfig(objects=2, task_types=(task_type,)))
    for seed in range(5):
        world.reset("train", seed)
        best = shortest(world)
        assert best >= (3 if task_type == LIGHT else 4)  # go, take, go, move; beside the lamp go, take, use
        assert best + 1 <= len(oracle_actions(world)) <= best + 2


@TYPES
def test_the_oracle_finds_back_from_whatever_a_careless_player_did(task_type):
    # At most 16 steps: go to the note, read it; open and move to put down what is not wanted; twice go, open, take, go,
    # open, move for two objects, or once with go and a treatment.
    lengths = []
    for seed in range(12):
        world = House(HouseConfig(max_steps=1000, task_types=(task_type,)))
        if not any(terminated for _, (_, _, terminated, *_) in careless_walk(world, "train", seed, 0.9, 40)):
            lengths.append(len(oracle_actions(world)))
    assert lengths  # or every walk was a success
    assert max(lengths) <= 16
