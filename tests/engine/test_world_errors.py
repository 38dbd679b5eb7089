"""Broken worlds: each ends its episode or the program with one line that names world, method and field.

A scripted player plays most of them. A few go through train.py and eval.py.
"""

import asyncio
import datetime
import decimal
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import torch
from conftest import rows

import envs
from engine.stopping import Stopped
from envs import PLAYERS, World, example, make_config, make_envs
from episode import Episode, Task
from imitate import fingerprint
from rollout import play_scripted
from worlds.contract import LARGEST, MOST_STEPS, MOST_TASKS, CheckedEnv, WorldError


class Good:
    """A world that is won in its second step. `answers`: name of a method -> what is made of its answer."""

    instructions, answers = "Say go.", MappingProxyType({})

    def __init__(self, config=None):
        self.taken = 0

    def answer(self, method: str, *values):
        return self.answers.get(method, lambda *values: values[0] if len(values) == 1 else values)(*values)

    def size(self, split: str):
        return self.answer("size", 5)

    def reset(self, split: str, seed: int):
        self.taken = 0
        return self.answer("reset", "Ready.", {"task_type": "toy", "success": False})

    def step(self, action: str):
        self.taken += 1
        won = self.taken == 2
        info = {"valid": True, "task_type": "toy", "success": won, "score": float(won)}
        return self.answer("step", "Fine.", float(won), won, False, info)

    def admissible(self):
        return self.answer("admissible", ["go"])

    def oracle(self):
        return self.answer("oracle", "now", "go")


def checked(make=Good, **answers) -> CheckedEnv:
    """An environment of the world `mine` with these answers."""
    return CheckedEnv("mine", type("Mine", (make,), {"answers": answers}), None, ("train", "eval"))


def play(env: CheckedEnv, player: str = "oracle", tasks: int = 1) -> list[Episode]:
    return play_scripted(env, [Task("mine", "train", seed) for seed in range(tasks)], PLAYERS[player], 0)


def error_of(caplog, env: CheckedEnv, player: str = "oracle") -> str:
    """The error of an episode, which is on record and in one line on the terminal."""
    (episode,) = play(env, player)
    assert (episode.aborted, episode.truncated, episode.success, episode.reward) == (True, True, False, 0.0)
    assert caplog.messages == [f"{episode.task} was aborted in step {len(episode.steps)}: {episode.info['error']}"] or (
        # A step that the world did not answer is on record, too.
        caplog.messages == [f"{episode.task} was aborted in step {len(episode.steps) - 1}: {episode.info['error']}"]
    )
    json.dumps(asdict(episode), allow_nan=False)
    (line,) = caplog.messages
    assert line.isprintable()
    assert len(line) < 1200
    return episode.info["error"]


# ---------------------------------------------------------------------------------------------------- wrong answers

CIRCLE = []
CIRCLE.append(CIRCLE)
TEXT = [None, b"Go.", 3, "\ud800", ["Go."], object(), np.array(["Go.", "On."])]
FLAG = [None, "False", 2, 0.5, [], np.array([True]), b"", math.nan]
NUMBER = [None, "1", b"1", math.nan, -math.inf, 1e300, 10**400, 1j, [1.0], np.float32("nan"), np.ones(2), torch.ones(1)]
NUMBER += [decimal.Decimal(1), 2 * LARGEST, torch.tensor(math.inf), [10**5000]]
OTHER = [object(), {1, 2}, math.nan, b"", np.zeros(3), datetime.date(2026, 1, 1), CIRCLE, print, {"deep": [math.inf]}]
WRONG = {"observation": TEXT, "reward": NUMBER, "terminated": FLAG, "truncated": FLAG}
OF_INFO = {"valid": FLAG, "success": FLAG, "task_type": TEXT, "score": NUMBER[:5], "f1": NUMBER[:5], "image": OTHER}
NAMES = {"reset": ["observation", "info"], "step": ["observation", "reward", "terminated", "truncated", "info"]}
NOT = {"valid": "true or false", "success": "true or false", "task_type": "text", "observation": "text"}
NOT |= {"terminated": "true or false", "truncated": "true or false", "image": "a value that JSON can write"}


def field_cases() -> Iterator[tuple]:
    for method, names in NAMES.items():
        for name, values in WRONG.items():
            yield from ((method, name, value) for value in values if name in names)
        for name, values in OF_INFO.items():
            yield from ((method, f"info.{name}", value) for value in values if (method, name) != ("reset", "valid"))


@pytest.mark.parametrize(("method", "field", "value"), [*field_cases()])
def test_a_wrong_field_is_named_and_aborts_its_episode(method, field, value, caplog):
    def change(*values):
        fields = dict(zip(NAMES[method], values, strict=True))
        name, _, key = field.partition(".")
        fields[name] = fields[name] | {key: value} if key else value
        return tuple(fields.values())

    error = error_of(caplog, checked(**{method: change}))
    kind = NOT.get(field.removeprefix("info."), f"a number of at most {LARGEST:g} in size")
    assert error.startswith(f"mine.{method}: {field} is ")
    assert error.endswith(f", not {kind}")


@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "info is None, not a dict with texts as keys"),
        ([("valid", True)], "info is [('valid', True)], not a dict with texts as keys"),
        ({1: 2}, "info is {1: 2}, not a dict with texts as keys"),
        ({"valid": True, "success": True}, "info has no task_type"),
        ({"valid": True, "task_type": "toy"}, "info has no success"),
    ],
)
def test_an_info_that_is_no_dict_or_lacks_a_key(method, info, message, caplog):
    assert error_of(caplog, checked(**{method: lambda *values: (*values[:-1], info)})) == f"mine.{method}: {message}"


def test_an_info_of_a_step_needs_valid(caplog):
    env = checked(step=lambda *values: (*values[:-1], {"task_type": "toy", "success": True}))
    assert error_of(caplog, env) == "mine.step: info has no valid"


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("reset", None, "the answer is None, not (observation, info)"),
        ("reset", "Ready.", "the answer is 'Ready.', not (observation, info)"),
        ("reset", ("Ready.", {}, 3), "the answer is ('Ready.', {}, 3), not (observation, info)"),
        ("step", None, "the answer is None, not (observation, reward, terminated, truncated, info)"),
        # gym's of before 2022
        (
            "step",
            ("Go.", 0.0, False, {}),
            "the answer is ('Go.', 0.0, False, {}), not (observation, reward, terminated, truncated, info)",
        ),
        ("oracle", "go", "the answer is 'go', not (thought, action)"),
        ("oracle", ("now", None), "action is None, not text"),
        ("oracle", (b"now", "go"), "thought is b'now', not text"),
        ("oracle", ("now", "\ud800"), r"action is '\ud800', not text"),
        *(
            ("admissible", value, f"list of actions is {value!r}, not a list of one or more texts")
            for value in (None, [], "go", [None], {"go"}, {"go": 1}, [b"go"], ["\ud800"])
        ),
    ],
)
def test_an_answer_of_another_form(method, answer, message, caplog):
    env = checked(**{method: lambda *values: answer})
    assert error_of(caplog, env, "random" if method == "admissible" else "oracle") == f"mine.{method}: {message}"


SIZES = [-1, 5.0, True, "5", (5,), math.nan, MOST_TASKS + 1, np.float64(5), np.array([5])]


@pytest.mark.parametrize("size", SIZES)
def test_a_number_of_tasks_that_is_none(size):
    message = rf"^mine\.size: number of tasks is .+, not a whole number from 0 to {MOST_TASKS}, or None$"
    with pytest.raises(WorldError, match=message):
        checked(size=lambda number: size).size("train")


@pytest.mark.parametrize("instructions", TEXT)
def test_instructions_that_are_no_text(instructions):
    with pytest.raises(WorldError, match=r"^mine: instructions is .+, not text$"):
        CheckedEnv("mine", type("Mine", (Good,), {"instructions": instructions}), None, ("train",))


# ---------------------------------------------------------------------------------------------------- right answers

ALIKE = [
    (float, bool, str, int),
    (np.float32, np.bool_, np.str_, np.int64),
    (torch.tensor, torch.tensor, str, torch.tensor),
    (np.array, np.array, str, np.array),
    (bool, int, type("Text", (str,), {}), int),
    (np.float16, float, str, np.uint8),
]


@pytest.mark.parametrize(("number", "flag", "text", "whole"), ALIKE)
def test_numbers_of_numpy_and_torch_become_python_s_own(number, flag, text, whole):
    def step(observation, reward, terminated, truncated, info):
        info = {"valid": flag(True), "task_type": text("toy"), "success": flag(info["success"])}
        info |= {"score": number(reward), "error": "means nothing"}
        return [text(observation), number(reward), flag(terminated), flag(truncated), info]

    def reset(observation, info):
        return text(observation), {"task_type": text("toy"), "success": flag(False)}

    env = checked(reset=reset, step=step, size=whole, admissible=lambda actions: tuple(map(text, actions)))
    assert env.size("train") == 5
    assert type(env.size("train")) is int
    for player in PLAYERS:
        one, other = play(env, player), play(checked(), player)
        assert json.dumps([asdict(episode) for episode in one]) == json.dumps([asdict(episode) for episode in other])


def test_what_a_world_changes_later_is_not_ours():
    kept = []

    class Forgetful(Good):
        def reset(self, split, seed):
            for info in kept:
                info.update(success=False, task_type="another", list=[3])
            observation, info = super().reset(split, seed)
            return observation, self.keep(info)

        def step(self, action):
            *answer, info = super().step(action)
            return *answer, self.keep(info | {"list": [1, 2]})

        def keep(self, info):
            kept.append(info)
            return info

    played = play(checked(Forgetful), tasks=3)
    assert [(episode.success, episode.info["task_type"], episode.info["list"]) for episode in played] == [
        (True, "toy", [1, 2])
    ] * 3


# ------------------------------------------------------------------------------------------------------- exceptions


class WordlessError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Panic(BaseException):
    """As of libraries that are written in Rust."""


RAISED = [
    (KeyError("x"), "KeyError: 'x'"),
    (ValueError("two\n lines"), "two lines"),
    (ValueError(), "ValueError:"),
    (ImportError("pip install it"), "pip install it"),
    (WordlessError(), "WordlessError: its text cannot be made"),
    (SystemExit(3), "SystemExit: 3"),
    (Panic("index"), "Panic: index"),
    (asyncio.CancelledError(), "CancelledError:"),
    (GeneratorExit(), "GeneratorExit:"),
    (StopIteration(), "StopIteration:"),
    (MemoryError(), "MemoryError:"),
    (RecursionError("deep"), "RecursionError: deep"),
    (RuntimeError("\x1b[31m red \ud800"), r"RuntimeError: \x1b[31m red \ud800"),
    (RuntimeError("x" * 9999), "RuntimeError: " + "x" * 900),
]


def said(error: str) -> str:
    """The error, of which a long one is cut off."""
    assert len(error) < 1100
    return error[: error.find("x" * 900) + 900] if "x" * 900 in error else error


@pytest.mark.parametrize("method", ["reset", "step", "oracle", "admissible"])
@pytest.mark.parametrize(("exception", "text"), RAISED)
def test_an_exception_of_any_type_is_named_and_aborts_its_episode(method, exception, text, caplog):
    def fail(*values):
        raise exception

    player = "random" if method == "admissible" else "oracle"
    assert said(error_of(caplog, checked(**{method: fail}), player)) == f"mine.{method}: {text}"


@pytest.mark.parametrize(("exception", "text"), RAISED)
def test_an_exception_outside_of_an_episode_ends_the_program_with_one_line(exception, text):
    def fail(*values):
        raise exception

    for where, call in (
        ("mine", lambda: CheckedEnv("mine", fail, None, ("train",))),
        ("mine.size", lambda: checked(size=fail).size("train")),
        ("mine.reset", lambda: fingerprint(checked(reset=fail), [])),
        ("mine.step", lambda: example(checked(step=fail))),
        ("mine.oracle", lambda: example(checked(oracle=fail))),
    ):
        with pytest.raises(WorldError) as raised:
            call()
        assert said(str(raised.value)) == f"{where}: {text}"


@pytest.mark.parametrize("exception", [KeyboardInterrupt, Stopped])
def test_who_asks_the_run_to_stop_is_heard_within_a_world(exception):
    def interrupt(*values):
        raise exception

    with pytest.raises(exception):
        play(checked(step=interrupt))


@pytest.mark.parametrize("method", ["size", "reset", "step", "oracle"])
def test_a_world_without_a_method_is_told_which(method):
    rest = {name: value for name, value in vars(Good).items() if name not in (method, "__dict__", "__weakref__")}
    error = play(checked(type("Half", (), rest)))[0].info["error"]
    assert error == f"mine.{method}: AttributeError: 'Mine' object has no attribute '{method}'"


def test_a_world_that_never_ends_is_stopped(caplog):
    def never(observation, reward, terminated, truncated, info):
        return observation, 0.0, False, False, info

    message = f"mine.step: the episode does not end: {MOST_STEPS} steps, neither terminated nor truncated"
    for player in PLAYERS:
        (episode,) = play(checked(step=never), player)
        assert (episode.info["error"], len(episode.steps)) == (message, MOST_STEPS + 1)
    with pytest.raises(WorldError) as error:
        example(checked(step=never))
    assert str(error.value) == message


# -------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class MineConfig:
    steps: int = 3


@pytest.fixture
def mine(monkeypatch):
    """mine(make, config, splits) adds the world `mine`."""

    def add(make=Good, config=MineConfig, splits=("train", "eval")):
        monkeypatch.setitem(envs.ENVIRONMENTS, "mine", World(make, config, splits))

    return add


@pytest.fixture
def config_with(monkeypatch):
    """config_with(fields) is a dataclass of a module, which makes texts of its annotations if `future`."""

    def make(fields: str, future: bool = True) -> type:
        code = "from __future__ import annotations\n" if future else ""
        code += f"from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    {fields}\n"
        module = ModuleType("mine_of_tests")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(code, module.__dict__)
        return module.Config

    return make


EVERY = "n: int = 1; p: float = 0.5; hard: bool = True; name: str = 'a'; kinds: tuple[str, ...] = ()"


@pytest.mark.parametrize("future", [False, True])
def test_settings_are_read_by_their_types_whether_or_not_these_are_texts(mine, config_with, future):
    """`hard=False` was the tuple ('False',), which is true, and with the import from __future__ so was every int."""
    mine(config=config_with(EVERY, future))
    config = make_config("mine", ["n=3", "p=1e-3", "hard=False", "name=b c", "kinds=x,y"])
    assert asdict(config) == {"n": 3, "p": 1e-3, "hard": False, "name": "b c", "kinds": ("x", "y")}
    assert [make_config("mine", [f"hard={text}"]).hard for text in ("true", "1", "0")] == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "setting", "message"),
    [
        ("n: int = 1", "n=many", "n must be an integer, got 'many'"),
        ("p: float = 1", "p=half", "p must be a number, got 'half'"),
        ("hard: bool = True", "hard=maybe", "hard must be true or false, got 'maybe'"),
        ("n: int = 1", "m=1", "mine has no setting 'm'; it has n"),
        ("n: int", "", "mine: TypeError: Config.__init__() missing 1 required positional argument: 'n'"),
        *(
            (f"n: {kind} = ()", "n=1", "mine: the setting n is no int, float, bool, str or tuple[str, ...]: ")
            for kind in ("list[int]", "tuple[int, ...]", "int | None", "tuple", "object")
        ),
        ("n: Unknown = 1", "n=1", "mine: its settings are no dataclass with types: NameError: "),
    ],
)
def test_a_setting_that_cannot_be_read_is_named_in_one_line(mine, config_with, fields, setting, message):
    mine(config=config_with(fields))
    with pytest.raises((ValueError, WorldError)) as error:
        make_config("mine", [setting] if setting else [])
    assert message in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("config", [None, dict, {"steps": 3}, type("Plain", (), {"steps": 3}), Good(), print])
def test_settings_that_are_no_dataclass(mine, config):
    mine(config=config)
    with pytest.raises(WorldError, match=r"^mine: its settings are no dataclass with types: .+$"):
        make_config("mine", [])


SPLITS = [(), ("train",), "train", ["train", "eval"], ("eval", "train"), None, {"train"}, ("train", 1)]


@pytest.mark.parametrize("splits", SPLITS)
def test_splits_of_another_form(mine, splits):
    mine(splits=splits)
    with pytest.raises(WorldError, match=r"^mine: its splits must be a tuple, train and then others, got .+$"):
        make_envs("mine", [], 1)


# -------------------------------------------------------------------------------------------------- the whole path


def broken(**answers) -> type:
    return type("Mine", (Good,), {"answers": answers})


def fail(*values):
    raise OSError("no engine")


def test_a_world_whose_every_step_breaks_ends_a_run_and_an_evaluation(mine, run, whole, evaluate, tmp_path):
    """A run counted thirty iterations in which it trained nothing, and ended with 0 %."""
    mine(broken(step=fail))
    everything = r"episodes were aborted: mine\.step: OSError: no engine$"
    with pytest.raises(SystemExit, match=f"^all 5 {everything}"):
        run(env="mine", policy=str(whole / "first_policy"), demonstrations=0, learning_rate=1e-4)
    with pytest.raises(SystemExit, match=f"^all 5 {everything}"):
        evaluate("--env", "mine", "--policy", "oracle")
    with pytest.raises(SystemExit, match=r"^demonstrations: an episode was aborted: mine\.step: OSError: no engine$"):
        run("other", env="mine", demonstrations=4)
    mine(broken(step=lambda *values: (*values[:2], False, False, values[-1])))
    with pytest.raises(SystemExit, match=rf"mine\.step: the episode does not end: {MOST_STEPS} steps"):
        evaluate("--env", "mine", "--policy", "random")
    with pytest.raises(SystemExit, match=rf"mine\.step: the episode does not end: {MOST_STEPS} steps"):
        evaluate("--env", "mine", "--policy", "random", "--example")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"size": lambda _: -1}, "mine.size: number of tasks is -1, not a whole number"),
        ({"size": fail}, "mine.size: OSError: no engine"),
        ({"reset": fail}, "mine.reset: OSError: no engine"),
        ({"reset": lambda *_: (None, {})}, "mine.reset: observation is None, not text"),
    ],
)
def test_what_breaks_before_an_episode_ends_run_and_evaluation(mine, run, evaluate, answers, message):
    mine(broken(**answers))
    with pytest.raises(SystemExit, match=message):
        run(env="mine", demonstrations=4)
    with pytest.raises(SystemExit, match=message):
        evaluate("--env", "mine", "--policy", "oracle")


def test_a_run_in_a_world_of_numpy_writes_its_evaluations(mine, run, whole):
    """An np.bool_ in an info was accepted until the first iteration that writes its episodes."""

    def step(observation, reward, terminated, truncated, info):
        info |= {"success": np.bool_(info["success"]), "valid": torch.tensor(True), "score": np.float32(reward)}
        return observation, torch.tensor(reward), np.bool_(terminated), np.bool_(truncated), info

    mine(broken(step=step))
    out = run(env="mine", iterations=1, policy=str(whole / "first_policy"), demonstrations=0, learning_rate=1e-4)
    assert rows(out)[-1]["eval/success"] == 1.0
    assert (out / "episodes" / "000001.jsonl").exists()


def test_a_broken_split_is_not_a_missing_one(mine, evaluate):
    """ALFWorld may be installed without a split: its size is 0. Any error ends the program: one broken file of a split
    made eval.py leave out all of it."""

    class Missing(Good):
        def size(self, split):
            if split == "other" and error:
                raise error
            return 0 if split == "other" else 5

    mine(Missing, splits=("train", "eval", "other"))
    error = None
    assert evaluate("--env", "mine", "--policy", "oracle")["oracle"]["episodes"] == 5
    for wrong, said in ((KeyError("other"), "KeyError: 'other'"), (ValueError("x is broken"), "x is broken")):
        error = wrong
        with pytest.raises(SystemExit, match=rf"^mine\.size: {said}$"):
            evaluate("--env", "mine", "--policy", "oracle")
