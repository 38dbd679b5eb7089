"""How the files hang together, read from their syntax trees: imports run one way, and importing does nothing."""

import ast
import contextlib
import importlib
import io
import logging
import os
import random
import signal
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib
import numpy
import torch

from tests import soak

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "engine/", "worlds/", "paper/", "tools/", "examples/")
FILES = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}[!_]*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}


def imports(tree: ast.Module) -> set[str]:
    """Full names of all that a file imports, inside its functions too."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


GRAPH = {name: imports(tree) & set(TREES) for name, tree in TREES.items()}

# The floors of the house, top to bottom. A file may import its own package, and what stands on lower floors.
FLOORS = (
    ("tools", "paper", "examples"),
    ("train",),
    ("imitate",),
    ("eval", "update"),
    ("rollout",),
    ("engine",),
    ("config",),
    ("envs", "tiny"),
    ("empg", "episode", "policy", "worlds"),  # the ground floor
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(name: str) -> str:
    return name.split(".")[0]


def test_imports_run_one_way():
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError names the cycle
    assert set(order) == set(TREES)
    arrows = [(name, other) for name in GRAPH for other in GRAPH[name] if room(name) != room(other)]
    assert [(a, b) for a, b in arrows if FLOOR[room(a)] >= FLOOR[room(b)]] == []


def test_the_top_level_is_what_a_student_reads():
    assert {name for name in TREES if "." not in name} <= set(FLOOR)
    assert len([name for name in TREES if "." not in name]) <= 11
    lines = {name: len(path.read_text().splitlines()) for name, path in zip(TREES, FILES, strict=True)}
    assert lines["train"] <= 250
    assert [name for name in lines if lines[name] > 350] == []


def test_text_files_have_an_encoding():
    """The default is the machine's. A page written in UTF-8 could not be read in another locale."""

    def is_text(call: ast.Call) -> bool:
        name, opened = ast.unparse(call.func), ast.unparse(call)
        if name.endswith((".read_text", ".write_text")):
            return True
        return name.endswith("open") and name != "record.open" and "b'" not in opened

    files = [*TREES.items(), *((path.name, ast.parse(path.read_text())) for path in ROOT.glob("docs/lab/*.py"))]
    calls = [(name, node) for name, tree in files for node in ast.walk(tree) if isinstance(node, ast.Call)]
    missing = [
        (name, ast.unparse(call))
        for name, call in calls
        if is_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert missing == []


def test_the_formulas_need_torch_alone_and_the_small_worlds_nothing():
    assert {room(module) for module in imports(TREES["empg"])} - sys.stdlib_module_names == {"torch"}
    for world in ("house", "coin"):
        assert {room(module) for module in imports(TREES[f"worlds.{world}"])} <= sys.stdlib_module_names


# ----------------------------------------------------------------------------------------- importing does nothing


def state() -> dict:
    """What an import may change for everybody else in the process."""
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "flags": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "seeds": (torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "logs": (list(logging.root.handlers), logging.root.level),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "process": (dict(os.environ), os.getcwd(), os.listdir(), list(sys.argv)),
        "engine.figures": matplotlib.rcParams._get("backend"),
    }


def test_importing_prints_nothing_and_leaves_threads_types_seeds_and_environment_alone(tmp_path):
    """What other libraries do when they are imported is not ours: they come first, by the files' own statements.

    The files are imported again, in a fork of this process.
    """
    extra = {"worlds.alfworld_engine": "alfworld", "worlds.alfworld_games": "textworld"}
    extra |= {name: "trl" for name in TREES if room(name) == "examples"}
    names = [name for name in TREES if name not in extra or importlib.util.find_spec(extra[name])]
    bodies = [part for name in names for node in TREES[name].body for part in getattr(node, "body", [node])]
    nodes = [node for node in bodies if isinstance(node, ast.Import | ast.ImportFrom)]
    others = {ast.unparse(node) for node in nodes if not imports(ast.Module([node], [])) & {"worlds", *TREES}}

    def probe() -> None:
        exec("\n".join(sorted(others)), {})
        for name in sys.modules.keys() & TREES.keys():
            del sys.modules[name]
        # None of these is what one of the files might set.
        os.chdir(tmp_path)
        os.environ.clear()
        logging.root.handlers.clear()
        torch.set_num_threads(3)
        matplotlib.rcParams["backend"] = "svg"
        before, printed = state(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            for name in names:
                importlib.import_module(name)
        assert printed.getvalue() == ""
        after = state()
        assert [part for part in before if before[part] != after[part]] == []

    log = tmp_path / "log.txt"
    codes, _ = soak.end(soak.start([], 1, log, probe))
    assert codes == [0], log.read_text()
