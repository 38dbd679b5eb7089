"""docs/lab.md: its changes fit the code, its commands exist, and its numbers are on record and come out again.

A changed copy of empg.py or train.py is run as a module of its own. So this proves that a student who makes the change
sees the numbers of the page.
"""

import inspect
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_envs

from config import TrainConfig, parse_config
from envs import ENVIRONMENTS, Env, World, careless_player, make_envs, oracle_player, random_player

ROOT = Path(__file__).parents[1]
PARTS = ["Predict", "Change", "Run", "Compare"]
EXERCISES = dict(enumerate((ROOT / "docs" / "lab.md").read_text().split("\n## ")[1:10], 1))  # number -> text
RECORD = [json.loads(line) for line in (ROOT / "docs" / "lab" / "record.jsonl").read_text().splitlines()]


def part(number: int, name: str) -> str:
    """One of the four parts of an exercise."""
    return re.split(r"\*\*(?:" + "|".join(PARTS) + r")\.\*\*", EXERCISES[number])[1 + PARTS.index(name)]


def changes(number: int) -> list[tuple[str, str, str]]:
    """(file, lines as they are, lines as they become) of each diff in an exercise."""
    found = re.findall(r"In `([\w/.]+)`[^\n]*:\n\n```diff\n(.*?)```", part(number, "Change"), re.DOTALL)

    def lines(diff: str, signs: str) -> str:
        return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in signs)

    return [(file, lines(diff, " -"), lines(diff, " +")) for file, diff in found]


def changed_source(file: str, number: int) -> str:
    """The text of a file after the change of an exercise."""
    source = (ROOT / file).read_text()
    for name, old, new in changes(number):
        source = source.replace(old, new) if name == file else source
    return source


def commands(number: int) -> list[list[str]]:
    """The words of each command in an exercise, in a block or in the text."""
    text = part(number, "Run")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`((?:python|pytest) [^`]+)`", text)
    return [shlex.split(line) for line in lines]


def example_world() -> ModuleType:
    """The world that exercise 7 shows."""
    module = ModuleType("safe")
    exec(re.search(r"```python\n(.*?)```", part(7, "Change"), re.DOTALL)[1], module.__dict__)
    return module


@pytest.fixture
def safe(monkeypatch) -> ModuleType:
    """The example world, as the change of exercise 7 adds it."""
    module = example_world()
    monkeypatch.setitem(ENVIRONMENTS, "safe", World(module.Safe, module.SafeConfig, module.SPLITS))
    return module


# ------------------------------------------------------------------------------------------- the text and the code


@pytest.mark.parametrize("number", EXERCISES)
def test_each_exercise_has_the_four_parts_and_its_change_fits_the_code(number):
    assert len(EXERCISES) == 9
    assert re.findall(r"\*\*(\w+)\.\*\*", EXERCISES[number]) == PARTS
    assert changes(number)
    for file, old, new in changes(number):
        assert old != new
        assert (ROOT / file).read_text().count(old) == 1


@pytest.mark.parametrize("number", EXERCISES)
def test_the_commands_name_files_modules_tests_and_flags_that_exist(number, safe, capsys):
    assert commands(number)
    for program, first, *words in commands(number):
        if program == "pytest":
            text = "".join((ROOT / word).read_text() for word in words if word.startswith("tests/"))
            name = words[words.index("-k") + 1] if "-k" in words else ""
            assert name in text or name in ENVIRONMENTS
            continue
        assert program == "python"
        module = words.pop(0).replace(".", "/") + ".py" if first == "-m" else first
        assert (ROOT / module).exists()
        if module in ("train.py", "docs/lab/batch.py"):
            parse_config(TrainConfig, words)  # ends the program for an unknown flag
        elif module == "paper/page.py":
            assert (ROOT / words[0] / "config.json").exists()


def test_the_example_world_keeps_the_contract_of_every_world(safe):
    def build(*settings: str) -> Env:
        return make_envs("safe", settings, 1)[0]

    players = {"oracle": oracle_player, "random": random_player, "careless": careless_player(0.5)}
    for split in safe.SPLITS:
        played = {
            name: [test_envs.transcript(build(), split, n, player) for n in range(60)]
            for name, player in players.items()
        }
        given = {"place": ("safe", split), "build": build, "played": played}
        contract = [test for name, test in vars(test_envs).items() if name.startswith("test_") and callable(test)]
        contract = [(test, inspect.signature(test).parameters) for test in contract]
        contract = [(test, names) for test, names in contract if names and set(names) <= set(given)]
        assert len(contract) > 7
        for test, names in contract:
            test(**{name: given[name] for name in names})


# ------------------------------------------------------------------------------------------- the numbers


def numbers(value) -> set[float]:
    """All numbers of a JSON value, those in its texts included."""
    if isinstance(value, dict | list):
        return set().union(*map(numbers, value.values() if isinstance(value, dict) else value))
    return {float(text) for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", str(value).replace("−", "-"))}


def decimals(text: str) -> set[float]:
    """All numbers with a decimal point in a text."""
    return {float(number.replace("−", "-")) for number in re.findall(r"(?<![\w.])[-−]?\d+\.\d+", text)}


@pytest.mark.parametrize("number", EXERCISES)
def test_the_numbers_of_tables_and_prose_are_on_record(number):
    """A number with a decimal point is a result, the value of an expression on record, or stands in the change."""
    record = [row for row in RECORD if row["exercise"] == number]
    measured = [row for row in record if "command" in row]
    assert all({"command", "commit", "seed", "result"} <= row.keys() for row in measured)
    text, on_record = part(number, "Compare"), numbers([row["result"] for row in measured])
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows
    assert numbers(" ".join(cell for row in rows for cell in row.split("|")[2:])) <= on_record
    for row in (row for row in record if "computed" in row):
        digits = len(row["computed"].split(".")[1])
        assert f"{eval(row['from'], {'math': math}):.{digits}f}" == row["computed"]
        on_record.add(float(row["computed"]))
    on_record |= decimals(part(number, "Change"))
    assert {abs(x) for x in decimals(text + part(number, "Predict"))} <= {abs(x) for x in on_record}


WORDS = {"One": 1, "Two": 2, "Three": 3, "Four": 4, "Five": 5, "Six": 6}


@pytest.mark.parametrize("number", EXERCISES)
def test_the_tests_that_turn_red_are_named_and_counted(number):
    text, record = part(number, "Compare"), [row for row in RECORD if row["exercise"] == number]
    failed = {name for row in record for name in row.get("failed", [])}
    assert set(re.findall(r"test_\w+", text)) == failed
    assert [WORDS[word] for word in re.findall(r"(\w+)\s+tests\s+(?:turn red|do)\b", text)] == (
        [len(failed)] if failed else []
    )
    passed = [
        row["result"].split()[0]
        for row in record
        if row.get("command", "").startswith("pytest") and not row.get("failed")
    ]
    assert re.findall(r"(\d+) tests", text) == passed


def module_of(file: str, row: dict, monkeypatch) -> ModuleType:
    """A copy of a module, changed as a row of the record says. Later copies import this one, other tests do not."""
    source = changed_source(file, row["exercise"]) if row["changed"] else (ROOT / file).read_text()
    module = ModuleType(file.removesuffix(".py").replace("/", "."))
    module.__file__ = str(ROOT / file)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(*row.get("then", ("", ""))), file, "exec"), module.__dict__)
    return module


def again(command: str) -> list:
    rows = [row for row in RECORD if command in row.get("command", "")]
    assert rows
    return [pytest.param(row, id=f"{row['exercise']}-{number}") for number, row in enumerate(rows)]


@pytest.mark.parametrize("row", again("docs.lab.batch"))
def test_what_is_on_record_of_the_kept_batch_comes_out_again(row, monkeypatch, capsys):
    """The numbers of the page are those of the code as it is now, with and without the change of the exercise."""
    batch = [module_of(file, row, monkeypatch) for file in ("empg.py", "train.py", "docs/lab/batch.py")][-1]
    monkeypatch.chdir(ROOT)
    batch.main(shlex.split(row["command"])[3:])
    assert json.loads(capsys.readouterr().out) == pytest.approx(row["result"], abs=2e-3)


@pytest.mark.parametrize("row", again("paper.page"))
def test_what_is_on_record_of_the_credit_page_comes_out_again(row, monkeypatch):
    data = module_of("paper/page.py", row, monkeypatch).read_run(ROOT / "docs" / "lab" / "house")
    groups, result = data["batches"][0]["groups"], row["result"]
    steps = [step for group in groups for episode in group for step in episode["steps"]]
    for kind in ("mistake", "uncertain"):
        advantage = [step["advantage"] for step in steps if step["filter"] == kind]
        assert result[kind] == {"steps": len(advantage), "positive": sum(a > 0 for a in advantage)}
    for place, values in result.get("shown", {}).items():
        group, episode, step = map(int, place.split())
        step = groups[group][episode]["steps"][step]
        assert values["action"] == data["texts"][step["action"]]
        assert values == {**values, **{name: step[name] for name in ("norm_entropy", "g", "f", "advantage", "filter")}}
        assert values["base"] == groups[group][episode]["base"]


def test_a_run_without_kept_episodes_is_named(tmp_path):
    from docs.lab import batch

    with pytest.raises(SystemExit, match="has no kept episodes; a run writes them"):
        batch.main(["--out", str(tmp_path)])
