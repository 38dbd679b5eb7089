"""ALFWorld's engine, one game at a time: textworld's PDDL environment with ALFWorld's names, 10 to 20 times faster.

The engine as shipped takes 25 to 35 ms for a step. It spends nearly all of that on parsing the same few grammar strings
again, and on copying values that never change. `speed_up` caches and shares them. Every observation stays the same,
letter for letter (tests/worlds/test_alfworld.py compares both).

Not covered: threads. The planner is a C++ library with global state, and each `Engine` loads its own copy of it. Many
engines can take turns in one process. Two engines must not step at the same time.
"""

import ast
import copy
import functools
import sys
from collections import defaultdict

INSTALL = "pip install --no-deps -r requirements-alfworld.txt"

try:
    import fast_downward
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv
    from textworld.envs.pddl import logic, textgen
    from textworld.generator.game import EntityInfo
    from textworld.logic import Rule
except ImportError as error:
    raise ImportError(f"ALFWorld's engine is not installed ({error}); run: {INSTALL}") from error

NOTHING = "Nothing happens."  # the engine's reply to a command that is unknown or not possible now
# The first start of a game takes 0.1 s to seconds, later ones take 10 ms. A game takes 2 MB, in a large room 7 MB.
GAMES_KEPT = 512


class EngineError(RuntimeError):
    """The engine failed in the middle of an episode. That episode is lost, but the engine can start another one."""


class Engine:
    """One copy of the engine. Call `start`, then `step`. `commands` are the actions that are possible now."""

    def __init__(self):
        speed_up()
        self._env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
        self._loaded = None

    def start(self, game: str | dict) -> str:
        """Start a game from its beginning and return the first text. game: a game file's path, or its content.

        Raises ValueError for a game that the engine cannot read.
        """
        try:
            if game != self._loaded:
                self._loaded = None
                self._env.load(game)
                for action in self._env.unwrapped._logic.actions.values():  # the rules are checked by now
                    textgen._parse_and_convert(action.template + action.feedback_rule, rule_name="symbols")
                self._loaded = game
            self._state = self._env.reset()
        except (Exception, SystemExit) as error:  # the translator calls sys.exit for a bad goal
            name = game if isinstance(game, str) else "the game"
            raise ValueError(f"{name} is broken: {type(error).__name__}: {error}") from error
        return self._state.feedback

    def step(self, command: str) -> tuple[str, bool]:
        """(text, whether the game is won). Raises EngineError if the engine fails."""
        try:
            self._state, _, won = self._env.step(command)
        except Exception as error:
            raise EngineError(f"{command!r} in {self._loaded}: {type(error).__name__}: {error}") from error
        return self._state.feedback, won

    @property
    def commands(self) -> list[str]:
        """Every command that is possible now, sorted."""
        return self._state["admissible_commands"]

    def facts(self) -> dict[str, set[tuple[str, ...]]]:
        """The facts that are true now, by predicate: ("apple 1", "drawer 2") may be in facts()["inreceptacle"]."""
        names = {key: info.name.strip() for key, info in self._state["_entity_infos"].items()}
        table = defaultdict(set)
        for fact in self._state["_facts"]:
            table[fact.name].add(tuple(names[argument.name] for argument in fact.arguments))
        return table

    def plan(self) -> list[str]:
        """The planner's commands that win from here. Raises EngineError if there is no plan.

        Planning takes 1 ms to seconds. In very large rooms it may never end.
        """
        core = self._env.unwrapped
        try:
            plan = core._pddl_state.replan(core._entity_infos)
        except Exception as error:
            raise EngineError(f"the planner in {self._loaded}: {type(error).__name__}: {error}") from error
        if not plan:
            raise EngineError(f"no way to win from here in {self._loaded}")
        return plan


@functools.lru_cache(GAMES_KEPT)
def parse_expression(text: str) -> ast.expr:
    """The expression of a grammar: names, `o.name` and the like, texts, `+`, `or`. Raises EngineError for others."""
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EngineError(f"the grammar's expression {text!r} cannot be read") from error
    for node in ast.walk(expression):
        match node:
            case ast.Name() | ast.Load() | ast.Add() | ast.Or() | ast.BoolOp(op=ast.Or()) | ast.BinOp(op=ast.Add()):
                pass
            case ast.Constant(value=str()):
                pass
            case ast.Attribute(value=ast.Name(), attr=name) if name in EntityInfo.__slots__:
                pass
            case _:
                raise EngineError(f"the grammar's expression {text!r} is none of those that ALFWorld's games have")
    return expression


def evaluate(node: ast.expr, variables: dict[str, EntityInfo]) -> EntityInfo | str | None:
    """The value of an expression that `parse_expression` has read."""
    match node:
        case ast.Constant(value=text):
            return text
        case ast.Name(id=name):
            return variables[name]
        case ast.Attribute(value=thing, attr=name):
            return getattr(evaluate(thing, variables), name)
        case ast.BinOp(left=left, right=right):
            return evaluate(left, variables) + evaluate(right, variables)
        case ast.BoolOp(values=values):
            for value in (evaluate(part, variables) for part in values):
                if value:
                    break
            return value


class Expression(textgen.EvalSymbol):
    """An expression in a game's grammar. textworld calls Python's eval with it, so a game could run any code."""

    def __init__(self, expression: str, *context: dict):
        super().__init__(expression, *context)
        parse_expression(expression)  # a game is refused when it is loaded

    def derive(self, context: dict | None = None) -> list:
        variables = (context or self.context)["variables"]
        return [textgen.TerminalSymbol(evaluate(parse_expression(self.expression), variables))]


@functools.cache  # the patches are applied once per process
def speed_up() -> None:
    """Patch textworld so that it caches what it parses and translates. All of these are pure functions of a text."""
    parse = functools.cache(textgen._parse_and_convert)

    # The engine writes contexts into the symbols that it receives. Each call therefore gets its own copy.
    textgen._parse_and_convert = lambda text, rule_name, **_: copy.deepcopy(parse(text, rule_name=rule_name))
    Rule.parse_conjunctive_query = functools.cache(Rule.parse_conjunctive_query)
    logic._parse_and_convert = functools.lru_cache(GAMES_KEPT)(logic._parse_and_convert)

    # The engine adds to a context but never changes its values. New dicts are enough; textworld makes a deep copy.
    textgen.copy_context = lambda context: {
        **context,
        "variables": dict(context["variables"]),
        "mapping": dict(context["mapping"]),
    }

    textgen.EvalSymbol = Expression

    # Loading a game translates it twice: once to play and once to plan. Every reset does so again.
    translate = functools.lru_cache(2 * GAMES_KEPT)(fast_downward.pddl2sas)

    @functools.wraps(fast_downward.pddl2sas)
    def pddl2sas(domain: str, problem: str, verbose: bool = False, optimize: bool = False):
        argv = sys.argv  # the translator overwrites it
        try:
            return translate(domain, problem, optimize=optimize)
        finally:
            sys.argv = argv

    fast_downward.pddl2sas = pddl2sas
