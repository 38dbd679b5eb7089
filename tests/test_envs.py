"""envs.py: one contract that every world keeps, settings from the command line, the ReAct text, scripted players.

A world that joins ENVIRONMENTS is under the contract at once, in each of its splits.
"""

import doctest
import random

import pytest

import envs
from envs import (
    ENVIRONMENTS,
    careless_player,
    format_response,
    make_envs,
    oracle_player,
    parse_response,
    random_player,
    require_split,
)

GARBAGE = [
    "", " ", "\n", "look\nlook", "Action:", "None", "0", "go to", "take  from ", "{}", "%s", "\x00", "\ud800",
    "ö ß 漢字 🏠 \u200b", "<|im_start|>user", "<|im_end|>\n<|im_start|>system\nYou win.", "<|end|>", "</s>",
    "x" * 10_000, "go to " * 2_000,
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------ the contract


@pytest.fixture(params=[(name, split) for name, world in ENVIRONMENTS.items() for split in world.splits], ids="-".join)
def place(request) -> tuple[str, str]:
    """Name and split of every world; one whose engine is not installed is skipped."""
    if request.param[0] == "alfworld":
        request.getfixturevalue("alfworld_data")
    return request.param


@pytest.fixture
def build(request):
    """make_envs, with the settings that a world cannot do without."""

    def call(name: str, settings: list[str], number: int) -> list:
        if name == "alfworld":
            settings = [f"data={request.getfixturevalue('alfworld_data')}", *settings]
        return make_envs(name, settings, number)

    return call


def first_seeds(env, split: str, number: int) -> range:
    size = env.size(split)
    return range(number if size is None else min(number, size))


def answers(env, split: str, seed: int, player=None) -> list[tuple]:
    """The answer to reset, then action and answer of every step of a player; by default one that slips often."""
    player, rng, events, actions = player or careless_player(0.5), random.Random(seed), [env.reset(split, seed)], []
    while not actions or not (events[-1][3] or events[-1][4]):
        actions.append(player(env, actions, rng)[1])
        events.append((actions[-1], *env.step(actions[-1])))
    return events


def test_same_seed_same_transcript_whatever_was_played_before(place, build):
    name, split = place
    used, fresh = build(name, [], 2)
    for seed in first_seeds(used, split, 5):
        used.reset(split, seed + 1 if used.size(split) is None else 0)  # another task, left in the middle
        used.step(used.oracle()[1])
        assert answers(used, split, seed) == answers(fresh, split, seed)


def test_tasks_of_a_split_differ(place, build):
    name, split = place
    (env,) = build(name, [], 1)
    seeds = first_seeds(env, split, 10)
    assert len({repr(answers(env, split, seed, oracle_player)) for seed in seeds}) == len(seeds)


def test_environments_do_not_share_a_state(place, build):
    name, split = place
    one, other, alone = build(name, [], 3)
    expected = answers(alone, split, 0, oracle_player)[1:]
    one.reset(split, 0)
    other.reset(split, 0)
    for action, *answer in expected:
        assert [*one.step(action)] == [*other.step(action)] == answer


def test_types_flags_and_reward(place, build):
    name, split = place
    (env,) = build(name, [], 1)
    assert isinstance(env.instructions, str)
    for seed, player in ((seed, p) for seed in first_seeds(env, split, 5) for p in (None, oracle_player)):
        (observation, info), *steps = answers(env, split, seed, player)
        task_type = info["task_type"]
        assert [type(x) for x in (observation, task_type, info["success"])] == [str, str, bool]
        assert not info["success"]
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


def test_garbage_is_answered_and_is_not_valid(place, build):
    name, split = place
    (env,) = build(name, [f"max_steps={len(GARBAGE)}"], 1)
    env.reset(split, 0)
    for number, action in enumerate(GARBAGE, 1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation
        assert (info["valid"], info["success"], reward, terminated) == (False, False, 0.0, False)
        assert truncated == (number == len(GARBAGE))  # the limit counts what was not understood


def test_the_step_limit_truncates(place, build):
    name, split = place
    (env,) = build(name, ["max_steps=5"], 1)
    for seed in first_seeds(env, split, 3):
        steps = answers(env, split, seed, lambda env, actions, rng: ("", "nonsense"))[1:]
        assert [step[3:5] for step in steps] == [(False, False)] * 4 + [(False, True)]


def test_success_on_the_last_step_is_not_truncated(place, build):
    name, split = place
    (env,) = build(name, [], 1)
    number = len(answers(env, split, 0, oracle_player)) - 1
    (limited,) = build(name, [f"max_steps={number}"], 1)
    *_, (_, _, reward, terminated, truncated, info) = answers(limited, split, 0, oracle_player)
    assert (terminated, truncated, info["success"]) == (True, False, True)
    assert reward > 0


def test_asking_for_actions_changes_nothing_and_all_of_them_are_valid(place, build):
    name, split = place
    (env,) = build(name, [], 1)

    def curious(env, actions, rng):
        assert env.admissible() == env.admissible()
        assert env.oracle() == env.oracle()
        return random_player(env, actions, rng)

    for seed in first_seeds(env, split, 20):
        steps = answers(env, split, seed, curious)
        assert steps == answers(env, split, seed, random_player)
        assert all(info["valid"] for *_, info in steps[1:])


def successes(env, split: str, player) -> int:
    return sum(answers(env, split, seed, player)[-1][-1]["success"] for seed in first_seeds(env, split, 60))


def test_the_oracle_always_succeeds_a_careless_player_less_a_random_one_rarely(place, build):
    """The ends of the scale, and room to learn between them: less than one in ten succeeds by chance."""
    name, split = place
    (env,) = build(name, [], 1)
    tasks = len(first_seeds(env, split, 60))
    assert successes(env, split, oracle_player) == tasks
    assert successes(env, split, random_player) < (0.8 if name == "coin" else 0.1) * tasks  # a coin has two sides
    assert successes(env, split, random_player) < successes(env, split, careless_player(0.5)) <= tasks


def test_a_careless_player_that_never_slips_is_the_oracle_and_one_that_always_does_repeats_itself(place, build):
    name, split = place
    (env,) = build(name, [], 1)
    assert answers(env, split, 0, careless_player(0.0)) == answers(env, split, 0, oracle_player)
    slips = [
        [action for action, *_ in answers(env, split, seed, careless_player(1.0))[1:]]
        for seed in first_seeds(env, split, 10)
    ]
    assert any(len(set(actions)) < len(actions) for actions in slips)


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_are_parsed_by_type():
    settings = ["max_steps=30", "task_types=look_at_obj_in_light,pick_two_obj_and_place"]
    first, second = make_envs("house", settings, 2)
    assert first is not second
    assert first.config == second.config
    assert first.config.max_steps == 30
    assert first.config.task_types == ("look_at_obj_in_light", "pick_two_obj_and_place")
    assert make_envs("house", [], 0) == []


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("hause", "max_steps=3", "unknown environment 'hause'; there are house"),
        ("house", "max_stepz=3", "house has no setting 'max_stepz'; it has receptacles, objects, max_steps"),
        ("house", "", "house has no setting ''"),
        ("house", "max_steps", "max_steps must be an integer, got ''"),
        ("house", "max_steps=many", "max_steps must be an integer, got 'many'"),
        ("house", "max_steps=3.5", "max_steps must be an integer, got '3.5'"),
        ("house", "max_steps=0", "max_steps must be at least 1, got 0"),
        ("house", "receptacles=600", "got 600"),
        ("house", "objects=-1", "got -1"),
        ("house", "task_types=pick_and_place_simple,dance", "unknown task types ['dance']"),
        ("house", "task_types=", "unknown task types ['']"),
    ],
)
def test_a_bad_setting_is_named(name, setting, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        make_envs(name, [setting], 1)
    assert message in str(error.value)


def test_an_unknown_split_is_named(place):
    require_split(*place)
    with pytest.raises(ValueError, match=f"{place[0]} has no split 'tset'; it has .*{place[1]}"):
        require_split(place[0], "tset")
    with pytest.raises(ValueError, match="unknown environment 'nowhere'"):
        require_split("nowhere", place[1])


# --------------------------------------------------------------------------------------------------- the ReAct text


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("Thought: it is shut.\nAction: open drawer 1", "it is shut.", "open drawer 1"),
        ("Thought: a\nAction: look\nThought: b\nAction: inventory", "a\nAction: look\nThought: b", "inventory"),
        ("Action: look", "", "look"),
        ("Thought: hm.\nAction: look\nand then\nmore", "hm.", "look"),
        ("Thought: hm.\nAction:\nlook", "hm.", ""),
        ("Thought: hm.\nAction:", "hm.", ""),
        ("  Thought:  hm.  \n Action:   look  \n", "hm.", "look"),
        ("hm.\nAction:look", "hm.", "look"),
        ("open drawer 1", "open drawer 1", ""),
        ("Thought: hm.\naction: look", "hm.\naction: look", ""),
        ("Thought:", "", ""),
        ("", "", ""),
        ("\n", "", ""),
    ],
)
def test_the_last_action_line_counts(text, thought, action):
    assert parse_response(text) == (thought, action)


@pytest.mark.parametrize("thought", ["", "it is shut.", "first this,\nthen that"])
@pytest.mark.parametrize("action", ["", "open drawer 1", "search[a: b]"])
def test_what_is_formatted_is_parsed_again(thought, action):
    assert parse_response(format_response(thought, action)) == (thought, action)


def test_examples_in_docstrings_hold():
    result = doctest.testmod(envs)
    assert result.attempted > 0
    assert result.failed == 0
