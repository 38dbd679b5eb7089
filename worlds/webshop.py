"""WebShop: the settings, splits and actions of every shop, and an adapter to the real one.

The embedded shop (`shop.py`) is the default. It needs no WebShop. `--env_args webshop_root=DIR` plays the real one: DIR
is a checkout of https://github.com/princeton-nlp/WebShop with its packages, its spaCy model, its product files and its
search index. An error names what is missing and the command that gets it.
"""

import random
import re
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from worlds.shop_reward import choose_options

SPLITS = ("train", "eval", "test")
SHORTCUTS = ("<r>", "<a>", "<c>", "<q>")
INSTRUCTIONS = """You shop on a website. Every turn, write one thought and one action:
Thought: what to look for, and why
Action: search[words] | click[value]
Values stand on the page: product ids, options, links such as Next >, < Prev, Back to Search, Features. \
Click each option that is asked for, then click[Buy Now]."""


@dataclass(frozen=True)
class ShopConfig:
    """Which shop, and how long an episode may be. Raises ValueError for values out of range."""

    products: int = 0  # 0 for all there are, which is 500 in the made-up catalogue
    goals: int = 10  # instructions for each product of the made-up catalogue, at most
    max_steps: int = 15  # actions, then the episode is truncated
    data: str = ""  # folder with WebShop's product files; "" for the made-up catalogue
    webshop_root: str = ""  # a WebShop checkout to drive; "" for the embedded shop
    human_goals: bool = True  # instructions that people wrote; else from a template
    seed: int = 233  # of the made-up catalogue, of prices and of price limits

    def __post_init__(self):
        if self.products < 0 or self.goals < 1 or self.max_steps < 1:
            raise ValueError(f"products must be 0 or more, goals and max_steps at least 1, got {self}")
        if self.data and self.webshop_root:
            raise ValueError("data and webshop_root exclude each other: a checkout has its own data folder")
        if self.webshop_root and self.products not in (0, 100, 1000, 100_000):
            raise ValueError(f"WebShop has search indexes for products = 0, 100, 1000, 100000, got {self.products}")


def split_range(goals: int, split: str) -> range:
    """The numbers of a split's goals: in WebShop test has 0-499, eval 500-1499, train the rest. With fewer than 3000
    goals, test gets a sixth, eval a third, train half."""
    test, evaluation = min(500, goals // 6), min(1500, goals // 2)
    return {"test": range(test), "eval": range(test, evaluation), "train": range(evaluation, goals)}[split]


# -------------------------------------------------------------------------------------------------------- actions


def parse_action(action: str) -> tuple[str, str]:
    """("search" or "click", its argument in lower case); ("", "") for anything else, and for a search shortcut.

    >>> parse_action("search[Red mug]"), parse_action("buy it")
    (('search', 'red mug'), ('', ''))
    """
    match = re.match(r"(.+)\[(.+)\]", action)  # WebShop's: all before the last "[" is the verb
    verb, argument = (match[1], match[2].lower()) if match else ("", "")
    refused = verb not in ("search", "click") or (verb == "search" and argument.split(" ")[0] in SHORTCUTS)
    return ("", "") if refused else (verb, argument)


def does_something(action: str, clickables: list[str]) -> bool:
    """Whether a page with these clickable values reacts to the action. Every page takes a search."""
    verb, value = parse_action(action)
    return verb == "search" or (verb == "click" and value != "search" and value in clickables)


def offered(clickables: list[str], searches: Iterable[str]) -> list[str]:
    """Actions that a page reacts to: its clicks, or these searches if it has the search bar."""
    if "search" in clickables:
        actions = [f"search[{search_text(words)}]" for words in searches]
    else:
        actions = [f"click[{value}]" for value in clickables]
    return [action for action in actions if does_something(action, clickables)]


def search_text(text: str) -> str:
    """Text that can stand between the brackets of a search."""
    return re.sub(r"[][\s]+", " ", text).strip()


class Customer:
    """What `Shop` and `WebShopAdapter` share: number of tasks, valid actions, reward, step limit.

    A subclass has goals (a list), task_type, steps, score and terminated, and the methods reset, observation,
    clickables and _act.
    """

    instructions = INSTRUCTIONS

    def __init__(self, config: ShopConfig):
        self.config = config

    def goal_numbers(self, split: str) -> range:
        """Numbers of the split's goals. They are ints: WebShop picks a random goal for numpy's integers."""
        return split_range(len(self.goals), split)

    def size(self, split: str) -> int:
        return len(self.goal_numbers(split))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """An invalid action changes nothing. info["score"] is WebShop's; 1.0, exactly what is wanted, is a success."""
        action = action.lower()
        valid = not self.terminated and does_something(action, self.clickables())
        if valid:
            self._act(action)
        self.steps += 1
        reward = float(valid and self.terminated and self.score == 1.0)
        truncated = not self.terminated and self.steps >= self.config.max_steps
        return self.observation(), reward, self.terminated, truncated, {"valid": valid, **self._info()}

    def _info(self) -> dict:
        return {"task_type": self.task_type, "success": self.score == 1.0, "score": self.score}


# ------------------------------------------------------------------------------------------------ the real WebShop


@contextmanager
def _seeded(seed: int):
    """Seed the global random generator, which WebShop draws from, and restore its state afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


# WebShop's requirements.txt pins packages for Python 3.8, and its setup.sh downloads another spaCy model than it loads.
PACKAGES = (
    "pip install beautifulsoup4 cleantext flask gdown gym pyserini rank_bm25 requests rich selenium spacy "
    "thefuzz==0.19.0 torch"
)
MODEL = "python -m spacy download en_core_web_sm"


@cache
def _load_engine(root: str, products: int, human_goals: bool, seed: int):
    """(environment class, its settings, server) of a checkout. All environments share the server, which holds products,
    search index and goals.

    Raises ValueError if there is no checkout or it does not start, ImportError if its packages are missing.
    """
    folder = Path(root).resolve()
    if not (folder / "web_agent_site").is_dir():
        clone = f"git clone https://github.com/princeton-nlp/WebShop {root}"
        raise ValueError(f"{root} holds no WebShop (there is no web_agent_site in it); run: {clone}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        import rich
        from web_agent_site.envs import web_agent_text_env as engine  # gym.make fails with a current gym
    except ImportError as error:
        raise ImportError(f"WebShop lacks a package ({error}); run: {PACKAGES}") from error
    except Exception as error:  # the import loads the spaCy model and starts Java
        raise ValueError(f"WebShop in {root} does not start ({error!r}); it needs Java, and run: {MODEL}") from error
    if folder not in Path(engine.__file__).resolve().parents:
        raise ValueError(f"another WebShop, {engine.__file__}, is loaded already; there can be one for each process")
    settings = {"observation_mode": "text", "human_goals": human_goals, "num_products": products or None}
    with _seeded(seed):
        rich.get_console()  # the engine prints with it; its creation draws random numbers and would shift the goals
    try:
        with _seeded(seed):
            return engine.WebAgentTextEnv, settings, engine.WebAgentTextEnv(**settings).server
    except Exception as error:  # its loaders raise many types for missing data or a missing index
        setup = f"cd {root} && ./setup.sh -d small"
        raise ValueError(
            f"WebShop in {root} has no usable data ({error!r}); to download and index it: {setup}"
        ) from error


class WebShopAdapter(Customer):
    """One customer of the real WebShop."""

    _numbers = count()

    def __init__(self, config: ShopConfig):
        super().__init__(config)
        engine, settings, self.server = _load_engine(
            config.webshop_root, config.products, config.human_goals, config.seed
        )
        self.goals = self.server.goals
        # Each environment has its own prefix. Otherwise two with the same goal would share a session.
        prefix = f"customer{next(self._numbers)}-"
        with _seeded(config.seed):
            self.env = engine(server=self.server, session_prefix=prefix, **settings)

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        number = self.goal_numbers(split)[seed]
        self.server.user_sessions.pop(self.env.session, None)  # the last episode's, no longer needed
        self.goal, self.steps, self.score, self.terminated = self.goals[number], 0, 0.0, False
        self.task_type = self.goal["category"]
        self.page, _ = self.env.reset(session=number)
        return self.observation(), self._info()

    def observation(self) -> str:
        """The text of the page. A lone surrogate becomes "?", as in `Shop`: tokenizers refuse it."""
        return self.page.encode(errors="replace").decode()

    def clickables(self) -> list[str]:
        """Values that can be clicked on this page; none after the purchase."""
        return [] if self.terminated else self.env.get_available_actions()["clickables"]

    def _act(self, action: str) -> None:
        self.page, score, self.terminated, _ = self.env.step(action)
        self.score = float(score)

    def admissible(self) -> list[str]:
        """Actions that do something now, in a fixed order, with the searches of `Shop.admissible`."""
        return offered(self.clickables(), (self.goal["instruction_text"], self.goal["query"]))

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows the wanted product and searches for its title. It always buys that
        product. This scores less than 1 if the goal asks for an option that its own product lacks, as some do."""
        asin, session, values = self.goal["asin"], self.server.user_sessions[self.env.session], self.clickables()
        if "search" in values:
            words = search_text(self.goal["name"])
            return f"I need {words}.", f"search[{words}]"
        if asin.lower() in values:
            return f"{asin} fits.", f"click[{asin}]"
        if session["asin"] is None:  # a page of results; the one after the last is empty
            more = len(set(values) - {"back to search", "< prev", "next >"}) > 0
            return "Not on this page.", "click[next >]" if more else "click[back to search]"
        if session["asin"] != asin or "buy now" not in values:
            return "Go back.", "click[< prev]"
        wanted = self.goal["goal_options"]
        wanted = wanted.items() if isinstance(wanted, dict) else wanted
        for value in choose_options(self.server.product_item_dict[asin]["options"], wanted).values():
            if value not in session["options"].values() and does_something(f"click[{value}]", values):
                return f"I need {value}.", f"click[{value}]"
        return "All is chosen.", "click[buy now]"
