"""How the files hang together, read from their syntax trees: imports run one way, and importing does nothing."""

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("", "engine/", "tools/", "worlds/", "paper/") for path in sorted(ROOT.glob(f"{folder}[!_]*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}
WORLDS = {name for name in TREES if name.startswith("worlds.")}
PAPER = {name for name in TREES if name.startswith("paper.")}


def imports(tree: ast.Module) -> set[str]:
    """Full names of all that a file imports, inside its functions too."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


GRAPH = {name: imports(tree) & set(TREES) for name, tree in TREES.items()}


def reached(name: str) -> set[str]:
    """The project's files that a file imports, directly or not."""
    return GRAPH[name].union(*map(reached, GRAPH[name]))


# The hall from the task to the gradient: a file, and the files it may reach. `envs` brings the worlds with it.
ALLOWED = {
    "empg": set(),
    "episode": set(),
    "engine.figures": set(),
    "policy": set(),
    "tiny": {"policy"},
    "envs": WORLDS,
    "config": {"empg", "envs", *WORLDS},
    "engine.stopping": set(),
    "engine.checkpoint": {"policy", "config", "empg", "envs", "episode", "engine.scorer", "engine.ranks", "update", *WORLDS},
    "engine.kv_cache": set(),
    "engine": set(),
    "engine.sampler": {"empg", "policy", "engine", "engine.kv_cache"},
    "rollout": {"empg", "episode", "policy", "engine.kv_cache", "engine.sampler", "envs", *WORLDS},
    "engine.scorer": {"policy"},
    "engine.ranks": set(),
    "update": {"empg", "episode", "policy", "engine.scorer", "engine.ranks", "config", "envs", *WORLDS},
    "engine.record": {"empg", "episode", "config", "envs", "engine.figures", *WORLDS},
    "eval": {
        *("empg", "episode", "policy", "envs", "config", "engine.kv_cache", "engine.sampler", "rollout", "engine.record", "engine.figures"),
        *("engine.ranks", "engine.stopping"),
        *WORLDS,
    },
} | dict.fromkeys(WORLDS, WORLDS)


def test_imports_run_one_way():
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError names the cycle
    assert set(order) == set(TREES)
    above = {"groups", "train", *(name for name in TREES if name.startswith("tools."))}
    for program in ("train", "eval", "tools.bench"):
        assert {name for name in GRAPH if program in GRAPH[name]} <= above | PAPER
    assert all(not GRAPH[name] & PAPER for name in TREES.keys() - PAPER)  # the pipeline does not know the study


@pytest.mark.parametrize("name", sorted(TREES.keys() & ALLOWED.keys()))
def test_a_file_knows_only_what_it_needs(name):
    assert reached(name) <= ALLOWED[name]


def test_the_formulas_need_torch_alone_and_the_small_worlds_nothing():
    assert {module.split(".")[0] for module in imports(TREES["empg"])} == {"torch"}
    for world in ("house", "coin"):
        assert {module.split(".")[0] for module in imports(TREES[f"worlds.{world}"])} <= sys.stdlib_module_names


def test_the_equations_of_the_readme_have_functions_and_tests_of_these_names():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if "`test_" in line]
    tests = ast.parse((ROOT / "tests" / "test_empg.py").read_text())
    defined = {node.name for tree in (TREES["empg"], tests) for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    assert len(table) > 8
    assert named <= defined


# ----------------------------------------------------------------------------------------- importing does nothing

PROBE = """
import contextlib, io, logging, os, random, signal, sys, warnings
import matplotlib, numpy
{others}
torch.manual_seed(0), random.seed(0), numpy.random.seed(0)

def state():
    return {{
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "flags": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "seeds": (torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "logs": (list(logging.root.handlers), logging.root.level),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "process": (dict(os.environ), os.getcwd(), os.listdir(), list(sys.argv)),
        "engine.figures": matplotlib.rcParams._get("backend"),
    }}

before, printed = state(), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import {modules}
assert printed.getvalue() == "", printed.getvalue()
after = state()
assert [name for name in before if before[name] != after[name]] == []
"""


def test_importing_prints_nothing_and_leaves_threads_types_seeds_and_environment_alone(tmp_path):
    """What other libraries do when they are imported is not ours: they come first, by the files' own statements."""
    engine = all(importlib.util.find_spec(package) for package in ("alfworld", "textworld"))
    names = [name for name in TREES if engine or name not in ("worlds.alfworld_engine", "worlds.alfworld_games")]
    bodies = [part for name in names for node in TREES[name].body for part in getattr(node, "body", [node])]
    nodes = [node for node in bodies if isinstance(node, ast.Import | ast.ImportFrom)]
    others = {ast.unparse(node) for node in nodes if not imports(ast.Module([node], [])) & {"worlds", *TREES}}
    code = PROBE.format(others="\n".join(sorted(others)), modules=", ".join(names))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
