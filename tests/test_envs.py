"""envs.py: the contract that every world keeps, settings from the command line, the ReAct text, scripted players.

The contract runs in each split of each world in ENVIRONMENTS. A new world needs no test of its own for any of this.
"""

import doctest
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import envs
from envs import (
    ENVIRONMENTS,
    Env,
    Player,
    careless_player,
    example,
    format_response,
    make_envs,
    oracle_player,
    parse_response,
    random_player,
    require_split,
)
from worlds import questions, retrieval, search, search_world, shop_search, webshop
from worlds.contract import WorldError

ROOT = Path(envs.__file__).parent
TASKS = 60  # of a split, if it has as many
GARBAGE = [
    "", " ", "\n", "look\nlook", "Action:", "None", "-1", "go to", "take  from ", "{}", "%s", "\x00", "\ud800",
    "ö ß 漢字 🏠 \u200b", "<|im_start|>user", "<|im_end|>\n<|im_start|>system\nYou win.", "<|end|>", "</s>",
    "x" * 10_000, "go to " * 2_000,
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------ the contract


@pytest.fixture(
    scope="module",
    params=[(name, split) for name, world in ENVIRONMENTS.items() for split in world.splits],
    ids="-".join,
)
def place(request) -> tuple[str, str]:
    """Name and split of a world."""
    return request.param


@pytest.fixture(scope="module")
def needed(place, request) -> list[str]:
    """The settings that a world cannot do without: its data, if there is a fixture NAME_data that writes it.

    Such a fixture skips the tests of a world whose engine is not installed.
    """
    try:
        return [f"data={request.getfixturevalue(f'{place[0]}_data')}"]
    except pytest.FixtureLookupError:
        return []


@pytest.fixture(scope="module")
def build(place, needed):
    """Builds one environment of the world."""

    def build(*settings: str) -> Env:
        return make_envs(place[0], [*needed, *settings], 1)[0]

    return build


@pytest.fixture(scope="module")
def played(place, build) -> dict[str, list[list[tuple]]]:
    """The transcripts of each player in the first tasks of the split."""
    env, split = build(), place[1]
    size = env.size(split)
    seeds = range(TASKS if size is None else min(TASKS, size))
    players = {"oracle": oracle_player, "random": random_player, "careless": careless_player(0.5)}
    return {key: [transcript(env, split, seed, player) for seed in seeds] for key, player in players.items()}


def transcript(env: Env, split: str, seed: int, player: Player) -> list[tuple]:
    """The answer to reset, then action and answer of every step."""
    rng, events, actions = random.Random(seed), [env.reset(split, seed)], []
    while not actions or not (events[-1][3] or events[-1][4]):
        actions.append(player(env, actions, rng)[1])
        events.append((actions[-1], *env.step(actions[-1])))
    return events


def digest(transcripts: list[list[tuple]]) -> str:
    return hashlib.sha256(repr(transcripts).encode()).hexdigest()


def test_same_seed_same_transcript_whatever_was_played_before(place, build, played):
    env, split = build(), place[1]
    for seed, expected in enumerate(played["careless"][:3]):
        env.reset(split, 1 - seed % 2)  # another task, left in the middle
        env.step(env.oracle()[1])
        assert transcript(env, split, seed, careless_player(0.5)) == expected


@pytest.fixture(scope="module")
def elsewhere():
    """elsewhere(name, split, *settings) is the digest of two transcripts by a process with other string hashes."""
    code = """from test_envs import *
for line in sys.stdin:
    name, split, *settings = json.loads(line)
    (env,) = make_envs(name, settings, 1)
    print(digest([transcript(env, split, seed, careless_player(0.5)) for seed in range(2)]), flush=True)"""
    folders = os.pathsep.join(str(Path(file).parent) for file in (__file__, envs.__file__))
    environ = os.environ | {"PYTHONPATH": folders, "PYTHONHASHSEED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, **pipes) as process:

        def call(*wanted: str) -> str:
            print(json.dumps(wanted), file=process.stdin)
            return process.stdout.readline().strip()

        yield call


def test_another_process_plays_the_same_episodes(place, needed, played, elsewhere):
    """Python's hash() of a string and the order of a set differ between processes. Tasks must not depend on them."""
    assert elsewhere(*place, *needed) == digest(played["careless"][:2])


def test_tasks_of_a_split_differ(played):
    first = played["oracle"][:10]
    assert len(set(map(repr, first))) > len(first) / 3  # a world with few tasks repeats some


def test_environments_do_not_share_a_state(place, build, played):
    seeds = (0, 0, len(played["careless"]) - 1)
    games = [(build(), seed, played["careless"][seed]) for seed in seeds]
    for env, seed, expected in games:
        assert env.reset(place[1], seed) == expected[0]
    for step in range(1, max(len(expected) for *_, expected in games)):
        for env, _, expected in games:
            if step < len(expected):
                action, *answer = expected[step]
                assert [*env.step(action)] == answer


def test_types_flags_and_reward(build, played):
    assert isinstance(build().instructions, str)
    for (observation, info), *steps in (events for each in played.values() for events in each):
        assert [type(x) for x in (observation, info["task_type"], info["success"])] == [str, str, bool]
        assert not info["success"]
        task_type = info["task_type"]
        for number, (_, observation, reward, terminated, truncated, info) in enumerate(steps, 1):
            last = number == len(steps)
            values = (observation, reward, terminated, truncated, info["valid"], info["success"])
            assert [type(value) for value in values] == [str, float, bool, bool, bool, bool]
            assert observation
            assert info["task_type"] == task_type
            assert 0 <= reward <= 1
            assert terminated + truncated == last  # one of them, at the end
            assert last or (reward == 0 and not info["success"])
            assert not (info["success"] and truncated)


def test_garbage_is_answered_and_changes_nothing(place, build):
    env = build(f"max_steps={len(GARBAGE)}")
    env.reset(place[1], 0)
    actions = env.admissible()
    for number, action in enumerate(GARBAGE, 1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation
        assert (info["valid"], info["success"], reward, terminated) == (False, False, 0.0, False)
        assert truncated == (number == len(GARBAGE))  # an invalid action counts too
        assert truncated or env.admissible() == actions


def test_upper_case_does_what_lower_case_does(place, build, played):
    """`Go to drawer 1` and `Search[mug]` were not understood; one world of five ignored case."""
    shout = build()
    for name, seed in (("oracle", 0), ("careless", 1)):
        env, rng = build(), random.Random(seed)
        for each in (env, shout):
            each.reset(place[1], seed)
        for number, (action, *_) in enumerate(played[name][seed][1:], 1):
            said, *results = env.step(action)
            shouted, *others = shout.step("".join(rng.choice((letter.upper(), letter)) for letter in action))
            assert (others, shouted.lower()) == (results, said.lower()), number


def test_the_last_step_before_the_limit_can_succeed(place, build, played):
    steps = len(played["oracle"][0]) - 1
    ends = {steps: (True, False, True)} | ({steps - 1: (False, True, False)} if steps > 1 else {})
    for limit, end in ends.items():
        env = build(f"max_steps={limit}")
        for _ in range(2):  # each episode counts from zero
            _, *taken = transcript(env, place[1], 0, oracle_player)
            *_, reward, terminated, truncated, info = taken[-1]
            assert (len(taken), terminated, truncated, info["success"]) == (limit, *end)
            assert (reward > 0) == info["success"]


def test_a_split_has_a_task_for_every_number_below_its_size(place, build):
    name, split = place
    env = build()
    size = env.size(split)
    for seed in (10**9,) if size is None else (0, size - 1):
        assert env.reset(split, seed)[0]
    for seed in () if size is None else (-1, size):
        with pytest.raises(WorldError, match=str(seed)):
            env.reset(split, seed)
    require_split(name, split)
    with pytest.raises(ValueError, match=f"{name} has no split 'tset'; it has .*{split}"):
        require_split(name, "tset")
    with pytest.raises(WorldError, match=f"unknown split 'tset'; .*{split}"):
        env.reset("tset", 0)


def test_asking_for_actions_changes_nothing_and_all_of_them_are_valid(place, build, played):
    def curious(env, actions, rng):
        assert len(set(env.admissible())) == len(env.admissible())
        assert env.admissible() == env.admissible()
        assert env.oracle() == env.oracle()
        return random_player(env, actions, rng)

    env = build()
    for seed, expected in enumerate(played["random"][:3]):
        assert transcript(env, place[1], seed, curious) == expected
    assert all(event[-1]["valid"] for events in played["random"] for event in events[1:])


def test_the_oracle_always_succeeds_and_leaves_room_above_a_careless_and_a_random_player(played):
    """The ends of the scale. A random player fails in a fifth of the tasks or more: so much can be learned."""
    wins = {key: sum(events[-1][-1]["success"] for events in each) for key, each in played.items()}
    number = len(played["oracle"])
    assert wins["random"] < wins["careless"] <= wins["oracle"] == number
    assert wins["random"] <= 0.8 * number


def test_an_example_is_a_training_episode_that_wins_when_it_is_played_again(place, build):
    env = build()
    _, first, *turns = re.split(r"^An example:\n|(?=^Thought: )", example(env), flags=re.MULTILINE)
    seed = 0
    while env.reset("train", seed)[0] != first.removesuffix("\n"):
        seed += 1
    for number, turn in enumerate(turns, 1):
        response = "\n".join(turn.splitlines()[:2])
        observation, reward, terminated, _, info = env.step(parse_response(response)[1])
        last = number == len(turns)
        assert turn.rstrip("\n") == (response if last else f"{response}\n{observation}")
        assert terminated == info["success"] == (reward > 0) == last


def test_no_example_without_an_oracle_that_wins_and_a_short_limit_is_named(monkeypatch):
    (env,) = make_envs("house", ["max_steps=2"], 1)
    with pytest.raises(WorldError, match=r"first 3 training tasks, because .* truncated at max_steps=2; set"):
        example(env, attempts=3)
    (env,) = make_envs("coin", [], 1)
    monkeypatch.setattr(
        env, "oracle", lambda: ("It is the other side.", {"left": "right", "right": "left"}[env.world.side])
    )
    with pytest.raises(WorldError, match=r"the oracle solves none of the first 3 training tasks$"):
        example(env, attempts=3)


def test_a_copy_of_the_template_keeps_the_contract(tmp_path):
    """What docs/worlds.md asks of a student: copy coin.py, import it, add one line to ENVIRONMENTS."""
    shutil.copytree(ROOT / "worlds", tmp_path / "worlds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "worlds" / "coin.py", tmp_path / "worlds" / "mine.py")
    shutil.copy(__file__, tmp_path / "test_envs.py")
    text, line = (ROOT / "envs.py").read_text(), '    "coin": World(coin.Coin, coin.CoinConfig, coin.SPLITS),\n'
    assert line in text
    text = text.replace("from worlds import ", "from worlds import mine, ", 1)
    (tmp_path / "envs.py").write_text(text.replace(line, line + line.replace("coin", "mine")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_envs.py", "-k", "mine-"]
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert re.search(r"^2\d passed, \d+ deselected in", result.stdout, re.MULTILINE), result.stdout


def test_a_small_world_loads_no_large_package():
    """nltk alone takes seconds to import. Only the shop needs it."""
    code = """import sys, envs
for name in ("coin", "house"):
    envs.make_envs(name, [], 1)[0].reset("train", 0)
print({"nltk", "rapidfuzz", "datasets", "torch", "transformers"} & set(sys.modules))"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "set()\n"


# --------------------------------------------------------------------------------------------- the scripted players


def test_a_careless_player_is_the_oracle_or_acts_at_random_or_repeats_itself():
    (env,), repeated, steps = make_envs("house", [], 1), 0, 0
    assert transcript(env, "train", 0, careless_player(0.0)) == transcript(env, "train", 0, oracle_player)
    for seed in range(30):
        actions = [action for action, *_ in transcript(env, "train", seed, careless_player(1.0))[1:]]
        repeated += sum(action in actions[:number] for number, action in enumerate(actions))
        steps += len(actions)
    assert 0.5 < repeated / steps < 0.9  # half of the actions are chosen among the earlier ones, some others recur


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_are_parsed_by_type():
    settings = ["max_steps=30", "task_types=look_at_obj_in_light,pick_two_obj_and_place"]
    first, second = make_envs("house", settings, 2)
    assert first is not second
    assert first.world.config == second.world.config
    assert first.world.config.max_steps == 30
    assert first.world.config.task_types == ("look_at_obj_in_light", "pick_two_obj_and_place")
    assert make_envs("house", [], 0) == []


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("hause", "max_steps=3", "unknown environment 'hause'; there are house"),
        ("house", "max_stepz=3", "house has no setting 'max_stepz'; it has receptacles, objects, max_steps"),
        ("house", "", "house has no setting ''"),
        ("house", "max_steps", "max_steps must be an integer, got ''"),
        ("house", "max_steps=many", "max_steps must be an integer, got 'many'"),
        ("house", "max_steps=3.5", "max_steps must be an integer, got '3.5'"),
        *((name, "max_steps=0", "max_steps must be at least 1, got 0") for name in ("house", "alfworld", "search")),
        *((name, "task_types=", "unknown task types ['']") for name in ("house", "alfworld")),
        ("house", "task_types=pick_and_place_simple,dance", "unknown task types ['dance']"),
        ("alfworld", "restate_task=2", "restate_task must be true or false, got '2'"),
        *(("house", f"receptacles={number}", f"receptacles must be 6 to 60 (up to 3 appliances, 2 surfaces, 1 drawer), "
           f"got {number}") for number in (5, 61)),
        *(("house", f"objects={number}", f"objects must be 2 to 60, got {number}") for number in (-1, 1, 61)),
        ("webshop", "products=-1", "products must be 0 or more"),
        *(("webshop", f"{key}=0", "goals and max_steps at least 1") for key in ("goals", "max_steps")),
        ("webshop", "human_goals=2", "human_goals must be true or false, got '2'"),
        ("webshop", "data=a webshop_root=b", "data and webshop_root exclude each other"),
        ("webshop", "webshop_root=b products=60", "indexes for products = 0, 100, 1000, 100000, got 60"),
        *(("search", f"{key}=0", f"{key} must be at least 1, got 0") for key in ("topk", "timeout")),
        ("search", "passage_chars=20", "passage_chars must be at least 200, got 20"),
        *(("search", f"entities={number}", f"entities must be 60 to 10000, got {number}") for number in (59, 10_001)),
        ("search", "syllables=24", "syllables must be 25 to 420 for 600 names, got 24"),
        ("search", "corpus=c retriever=http://127.0.0.1:9", "corpus and retriever exclude each other"),
        ("search", "corpus=q.json", "a corpus without questions"),
        *(("search", f"retriever={url}", f"address is http://HOST:PORT, got '{url}'")
          for url in ("localhost:8000", "file:///etc/hosts", "http://", "http://h:x", "http://h:99999")),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(name, wrong, message):
    with pytest.raises((ValueError, WorldError)) as error:  # the message is compared below
        make_envs(name, wrong.split(" "), 1)
    assert message in str(error.value)


# --------------------------------------------------------------------------------------------------- the ReAct text


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("Thought: it is shut.\nAction: open drawer 1", "it is shut.", "open drawer 1"),
        ("Thought: a\nAction: look\nObservation: b\nThought: c\nAction: inventory", "a", "look"),
        ("Action: look", "", "look"),
        ("Thought: hm.\nAction: look\nand then\nmore", "hm.", "look"),
        ("  Thought:  hm.  \n Action:   look  \n", "hm.", "look"),
        ("hm.\nAction:look", "hm.", "look"),
        ("Thought: the Action: look is not it.\nAction: wait", "the Action: look is not it.", "wait"),
        ("<think>\nAction: a?\n</think>\nThought: b.\nAction: c", "<think>\nAction: a?\n</think>\nThought: b.", "c"),
        ("Action: a?\n</think>\n\nAction: c", "Action: a?\n</think>", "c"),
        ("Thought: a\nAction: b\n<think>c</think>\nAction: d", "a", "b"),
        ("<think>\nAction: a", "<think>\nAction: a", ""),
        ("open drawer 1", "open drawer 1", ""),
        ("Thought: action", "action", ""),
        ("Thought: hm.\nAction:", "hm.", ""),
        ("Thought: hm.\nAction: ``", "hm.", ""),
        ("Thought:", "", ""),
        ("\n", "", ""),
    ],
)
def test_the_first_action_line_after_the_thought_counts(text, thought, action):
    assert parse_response(text) == (thought, action)
    assert parse_response(text, ended=False) == (thought, "")  # `open drawer 1` may be a part of `open drawer 10`


FORMS = (
    "action: {}", "ACTION: {}", "Action:\n{}", "Action :\n\n  {}", "Action\uff1a{}", "- Action: {}",
    "**Action:** {}", "**Action**: {}", "**Action: {}**", "Action: **{}**", "Action: `{}`", "`Action: {}`",
    'Action: "{}"', "Action: '{}'.", 'Action: "{}."', "Action: \u201c{}\u201d", "Action: {}.",
    "Action: **`{}`**.", "Action: {}\u3002",
    "Action:\n```\n{}\n```", "Action: ```text\n{}\n```", "Action: ```{}```", "```\nAction: {}\n```",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_put_around_an_action_is_forgiven(form):
    for action in ("go to drawer 1", "search[the 'red' mug. \"x\"]", 'say "hi"', "a*b"):
        assert parse_response(f"Thought: hm.\n{form.format(action)}")[1] == action


def test_a_long_response_without_an_action_is_read_in_no_time():
    """A pattern that goes back and forth would take minutes for each of these."""
    for part in ("\n", " ", "*", "`", "action", "Action:", "<think>", "</think", "Action: `\n", '"'):
        assert parse_response(part * 20_000)[1].count("\n") == 0


@pytest.mark.parametrize("thought", ["", "it is shut.", "first this,\nthen that"])
@pytest.mark.parametrize("action", ["", "open drawer 1", "search[a: b]"])
def test_what_is_formatted_is_parsed_again(thought, action):
    assert parse_response(format_response(thought, action)) == (thought, action)


@pytest.mark.parametrize(
    "module", [envs, questions, retrieval, search, search_world, shop_search, webshop], ids=lambda m: m.__name__
)
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
