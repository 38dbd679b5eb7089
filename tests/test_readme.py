"""README.md: the lines to read are those that an iteration enters, and what it names is there."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import train
from config import EvalConfig, TrainConfig, parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MOST_LINES, MOST_FILES = 600, 8


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def functions(file: str) -> dict[str, tuple[int, int]]:
    """First and last line of each function of a file, decorators included; a method's name is Class.name."""
    found = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        inner = [(f"{node.name}.", part) for part in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, part in inner:
            if isinstance(part, ast.FunctionDef):
                first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
                found[prefix + part.name] = (first, part.end_lineno)
    return found


# -------------------------------------------------------------------------------------------------- the lines to read


@pytest.fixture(scope="module")
def path(tmp_path_factory, cache) -> dict[str, dict[str, tuple[int, int]]]:
    """The functions of top-level files that an iteration without an evaluation enters: file -> name -> lines.

    engine/ and worlds/ are left out. A function within a function counts as part of it.
    """
    codes, sample_groups, evaluate_and_save = {train.iterate.__code__}, train.sample_groups, train.evaluate_and_save

    def sample_and_watch(*arguments):
        if arguments[-1] == 0:  # the first task: iteration 1
            sys.setprofile(lambda frame, event, _: codes.add(frame.f_code) if event == "call" else None)
        return sample_groups(*arguments)

    def evaluate_and_stop(*arguments):
        try:
            evaluate_and_save(*arguments)
        finally:
            sys.setprofile(None)

    out, profile = tmp_path_factory.mktemp("path"), sys.getprofile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_groups", sample_and_watch)
        patch.setattr(train, "evaluate_and_save", evaluate_and_stop)
        train.train(TrainConfig(**SMALL | {"out": str(out), "cache": str(cache)}))
    sys.setprofile(profile)
    entered: dict[str, dict[str, tuple[int, int]]] = {}
    for file in sorted({code.co_filename for code in codes if Path(code.co_filename).parent == ROOT}):
        lines = {code.co_firstlineno for code in codes if code.co_filename == file}
        spans = functions(Path(file).name)
        entered[Path(file).name] = {
            name: (first, last) for name, (first, last) in spans.items() if any(first <= x <= last for x in lines)
        }
    return {file: spans for file, spans in entered.items() if spans}


def test_the_lines_to_read_are_those_that_an_iteration_enters(path):
    rows = re.findall(r"^\| (\[([\w.]+)\]\(\2\).*?) \| (.*) \|$", section("The 600 lines to read"), re.MULTILINE)
    heads = {file: head for head, file, _ in rows}
    table = {
        file: {name: (int(first), int(last)) for name, first, last in re.findall(r"`([\w.]+)` (\d+)-(\d+)", row)}
        for _, file, row in rows
    }
    lines = sum(last - first + 1 for spans in path.values() for first, last in spans.values())
    files = [file for file in heads if file in path] + [file for file in path if file not in heads]
    right = "\n".join(
        f"| {heads.get(file, f'[{file}]({file})')} | "
        + ", ".join(f"`{name}` {first}-{last}" for name, (first, last) in path[file].items())
        + " |"
        for file in files
    )
    if table != path or f"{lines} lines in {len(path)} files" not in section("The 600 lines to read"):
        pytest.fail(f"README's table is out of date; {lines} lines in {len(path)} files:\n{right}")
    assert lines <= MOST_LINES
    assert len(path) <= MOST_FILES


# ---------------------------------------------------------------------------------------------------------- the names


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_equations_have_functions_and_tests_of_these_names():
    table = [line for line in section("Equation, function, test").splitlines() if "`test_" in line]
    defined = functions("empg.py").keys() | functions("tests/test_empg.py").keys()
    assert len(table) > 8
    assert {name for line in table for name in re.findall(r"`(\w+)`", line)} <= defined


def test_the_places_to_change_are_there():
    places = re.findall(r"`([\w/]+\.py)`: `(\w+)`", section("Where do I change what"))
    places += [
        (f"{module}.py", name) for module, name in re.findall(r" (\w+)\.(\w+)  ", section("The path of the data"))
    ]
    assert len(places) > 14
    for file, name, *_ in places:
        assert re.search(rf"^(def|class) {name}\b|^{name} = ", (ROOT / file).read_text(), re.MULTILINE), (file, name)


@pytest.mark.parametrize("page", ["README.md", "docs/lab.md", "docs/metrics.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_commands_name_files_and_flags_that_exist():
    commands = re.findall(r"(?:python -m |bash |accelerate launch |python )([\w./]+)((?: [^`&|\n]+)?)[`&\n]", README)
    assert len(commands) > 6
    for program, flags in commands:
        file = program if program.endswith((".py", ".sh")) else program.replace(".", "/") + ".py"
        assert (ROOT / file).exists(), file
        if file in ("train.py", "eval.py", "imitate.py"):
            flags = shlex.split(flags.replace("--env mine", ""), comments=True)
            parse_config(EvalConfig if file == "eval.py" else TrainConfig, flags)  # ends the program for unknown flags


def test_the_results_are_those_of_the_results_page():
    results = (ROOT / "docs" / "results.md").read_text()
    quoted = re.findall(r"[+−]\d+\.\d \([^)]*\)", section("Does it help?"))
    assert len(quoted) == 5
    assert [text for text in quoted if text not in results] == []
    seed_0 = next(line for line in results.splitlines() if line.startswith("| 0 |")).split("|")
    before, after, low, high = *seed_0[2].split(), *re.findall(r"[\d.]+", seed_0[3])
    table = next(line for line in section("One command").splitlines() if line.startswith("all "))
    assert re.findall(r"\d+\.\d", table)[0::3] == [before, after]
    assert f"[{low}, {high}]" in table
