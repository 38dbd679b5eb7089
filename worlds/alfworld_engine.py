"""ALFWorld's engine, one game at a time: textworld's PDDL environment with ALFWorld's names, 10 to 20 times faster.

As shipped, a step takes 25 to 35 ms, nearly all of it spent parsing the same few grammar strings again and copying
values that nobody changes. `speed_up` remembers and shares them instead; what the player reads stays the same to the
letter (tests/test_alfworld.py plays both).

Not covered: threads. The planner is a C++ library with global state; each `Engine` loads a copy of it of its own, so
any number of them can take turns in one process, but they must not step at the same time.
"""

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
    from textworld.logic import Rule
except ImportError as error:
    raise ImportError(f"ALFWorld's engine is not installed ({error}); run: {INSTALL}") from error

NOTHING = "Nothing happens."  # the engine's answer to a command that it does not know, or not here and now
GAMES_KEPT = 512  # in memory, 2 MB each, in large rooms 7; a first start takes 0.1 s to seconds, every other 10 ms


class EngineError(RuntimeError):
    """Something broke in the middle of an episode; that episode is lost, the engine can start the next one."""


class Engine:
    """A copy of the engine. `start` a game, then `step`; what could be done next is in `commands`."""

    def __init__(self):
        speed_up()
        self._env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
        self._loaded = None

    def start(self, game: str | dict) -> str:
        """Start a game file, or the dict that it holds, from its beginning; the text that greets the player.

        Raises ValueError for a game that the engine cannot read.
        """
        try:
            if game != self._loaded:
                self._loaded = None
                self._env.load(game)
                self._loaded = game
            self._state = self._env.reset()
        except (Exception, SystemExit) as error:  # the translator exits the process on a goal that it cannot read
            name = game if isinstance(game, str) else "the game"
            raise ValueError(f"{name} is broken: {type(error).__name__}: {error}") from error
        return self._state.feedback

    def step(self, command: str) -> tuple[str, bool]:
        """(text, whether the game is won). Raises EngineError if the engine does."""
        try:
            self._state, _, won = self._env.step(command)
        except Exception as error:
            raise EngineError(f"{command!r} in {self._loaded}: {type(error).__name__}: {error}") from error
        return self._state.feedback, won

    @property
    def commands(self) -> list[str]:
        """Everything that can be done now, sorted."""
        return self._state["admissible_commands"]

    def facts(self) -> dict[str, set[tuple[str, ...]]]:
        """What is true now, by predicate: facts()["inreceptacle"] holds ("apple 1", "drawer 2")."""
        names = {key: info.name.strip() for key, info in self._state["_entity_infos"].items()}
        table = defaultdict(set)
        for fact in self._state["_facts"]:
            table[fact.name].add(tuple(names[argument.name] for argument in fact.arguments))
        return table

    def plan(self) -> list[str]:
        """The planner's way to win from here, which takes it 1 ms to seconds, in very large rooms without end.

        Raises EngineError if there is none.
        """
        core = self._env.unwrapped
        try:
            plan = core._pddl_state.replan(core._entity_infos)
        except Exception as error:
            raise EngineError(f"the planner in {self._loaded}: {type(error).__name__}: {error}") from error
        if not plan:
            raise EngineError(f"no way to win from here in {self._loaded}")
        return plan


@functools.cache  # patches once per process, however many engines
def speed_up() -> None:
    """Let textworld remember what it parses and translates, all of them pure functions of their text."""
    parse = functools.cache(textgen._parse_and_convert)

    # The engine writes contexts into the symbols that it gets, hence a copy of them for each call.
    textgen._parse_and_convert = lambda text, rule_name, **_: copy.deepcopy(parse(text, rule_name=rule_name))
    Rule.parse_conjunctive_query = functools.cache(Rule.parse_conjunctive_query)
    logic._parse_and_convert = functools.lru_cache(GAMES_KEPT)(logic._parse_and_convert)

    # A context is extended but its values never change, so that new dicts are enough where the engine copies all.
    textgen.copy_context = lambda context: {
        **context,
        "variables": dict(context["variables"]),
        "mapping": dict(context["mapping"]),
    }

    def derive(symbol, context: dict | None = None) -> list:
        """As in textworld, which hands eval its variables in a way that Python 3.13 ended."""
        variables = (context or symbol.context)["variables"]
        return [textgen.TerminalSymbol(eval(symbol.expression, {}, dict(variables)))]

    textgen.EvalSymbol.derive = derive

    # Loading and resetting translate the same game again, each time once to play and once to plan.
    translate = functools.lru_cache(2 * GAMES_KEPT)(fast_downward.pddl2sas)

    @functools.wraps(fast_downward.pddl2sas)
    def pddl2sas(domain: str, problem: str, verbose: bool = False, optimize: bool = False):
        argv = sys.argv  # the translator leaves its own there
        try:
            return translate(domain, problem, optimize=optimize)
        finally:
            sys.argv = argv

    fast_downward.pddl2sas = pddl2sas
