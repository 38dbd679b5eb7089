"""How the files hang together, read from their syntax trees: imports run one way, importing does nothing, and every
function and file is of a size that people read.
"""

import ast
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
FUNCTIONS = [
    (f"{name}.py:{node.lineno} {node.name}", node)
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def imports(tree: ast.Module) -> set[str]:
    """Top names of all that a file imports, inside its functions too."""
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[0] for module in modules}


GRAPH = {name: imports(tree) & set(TREES) for name, tree in TREES.items()}


def reached(name: str) -> set[str]:
    """The project's files that a file imports, directly or not."""
    return GRAPH[name].union(*map(reached, GRAPH[name]))


# ---------------------------------------------------------------------------------------------------------- imports


def test_imports_run_one_way():
    assert "train" in GRAPH
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError names the cycle
    assert set(order) == set(TREES)


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("train", "eval"),
        ("eval", "rollout"),
        ("rollout", "policy"),
        ("rollout", "episode"),
        ("rollout", "envs"),
        ("envs", "house"),
        ("envs", "alfworld_env"),
        ("envs", "webshop"),
        ("envs", "search"),
        ("train", "update"),
        ("train", "checkpoint"),
        ("train", "config"),
        ("train", "figures"),
        ("eval", "config"),
        ("update", "empg"),
        ("rollout", "empg"),
    ],
)
def test_the_way_from_the_task_to_the_gradient(name, imported):
    assert imported in GRAPH[name]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("empg", set()),
        ("house", set()),
        ("search", {"search_world", "retrieval"}),
        ("webshop", {"shop", "shop_data", "shop_search"}),
        ("alfworld_env", {"alfworld_engine"}),
        ("alfworld_games", {"alfworld_env", "alfworld_engine"}),
        ("episode", set()),
        ("policy", set()),
        ("figures", set()),
        ("checkpoint", {"policy"}),
        ("config", {"envs"}),
        ("update", {"empg", "episode", "config", "envs"}),
        ("rollout", {"empg", "episode", "policy", "envs"}),
    ],
)
def test_a_file_knows_only_what_it_needs(name, allowed):
    worlds = reached("envs") if "envs" in allowed else set()
    assert reached(name) <= allowed | worlds


def test_the_formulas_need_torch_alone_and_the_house_nothing():
    assert imports(TREES["empg"]) == {"torch"}
    assert imports(TREES["house"]) <= sys.stdlib_module_names


def test_programs_are_imported_by_programs_only():
    users = {program: {name for name in GRAPH if program in GRAPH[name]} for program in ("train", "eval")}
    assert users["train"] <= {"bench"}
    assert users["eval"] <= {"train", "bench"}


def test_policy_and_worlds_do_not_know_each_other():
    assert "policy" not in reached("envs")
    assert "envs" not in reached("policy")


# ----------------------------------------------------------------------------------------- importing does nothing

PROBE = """
import contextlib, io, logging, os, random, signal, sys, warnings
import numpy
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
    trees = {name: tree for name, tree in TREES.items() if engine or name not in ("alfworld_engine", "alfworld_games")}
    bodies = [part for tree in trees.values() for node in tree.body for part in getattr(node, "body", [node])]
    nodes = [node for node in bodies if isinstance(node, ast.Import | ast.ImportFrom)]
    others = {ast.unparse(node) for node in nodes if not imports(ast.Module([node], [])) & set(TREES)}
    code = PROBE.format(others="\n".join(sorted(others)), modules=", ".join(trees))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------------------- sizes


def test_functions_have_at_most_40_lines():
    # The training loop is exempt: it is read as a page.
    lines = {where: node.end_lineno - node.lineno + 1 for where, node in FUNCTIONS if node.name != "train"}
    assert {where: number for where, number in lines.items() if number > 40} == {}


def test_files_have_at_most_450_lines():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in TREES}
    assert {name: number for name, number in lines.items() if number > 450} == {}


def test_files_classes_and_public_functions_have_docstrings():
    documented = [(f"{name}.py", tree) for name, tree in TREES.items()]
    for name, tree in TREES.items():
        definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        public = [node for node in definitions if not node.name.startswith("_") and node.name != "main"]
        documented += [(f"{name}.py:{node.lineno} {node.name}", node) for node in public]
    assert [where for where, node in documented if ast.get_docstring(node) is None] == []
