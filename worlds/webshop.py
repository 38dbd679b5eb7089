"""The user's own WebShop, driven through its text environment with the same methods and texts as the embedded shop.

`--webshop-root DIR` names a checkout of https://github.com/princeton-nlp/WebShop that its setup.sh has prepared: Flask,
spaCy with a model, pyserini on Java, the product files and the search index. `shop.py` needs nothing of that.
"""

import random
import sys
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

from worlds.shop import (
    INSTRUCTIONS,
    Shop,
    ShopConfig,
    choose_options,
    does_something,
    goal_number,
    offered,
    search_text,
    split_range,
)


def make_webshop(config: ShopConfig) -> "Shop | WebShopAdapter":
    """The environment of a configuration: the user's WebShop if a checkout is named, else the embedded shop."""
    return WebShopAdapter(config) if config.webshop_root else Shop(config)


@contextmanager
def _seeded(seed: int):
    """WebShop draws from the global random generator: seed it, and put everything back afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _load_engine(root: str, products: int, human_goals: int, seed: int):
    """(environment class, its settings, server) of a checkout. The server holds products, search index and goals; all
    environments share it.

    Raises ValueError if there is no checkout or it does not start, ImportError if its packages are missing.
    """
    folder, setup = Path(root).resolve(), f"cd {root} && ./setup.sh -d small"
    if not (folder / "web_agent_site").is_dir():
        clone = f"git clone https://github.com/princeton-nlp/WebShop {root} && {setup}"
        raise ValueError(f"{root} holds no WebShop (there is no web_agent_site in it); run: {clone}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        from web_agent_site.envs import web_agent_text_env as engine  # gym.make fails with a current gym
    except ImportError as error:
        install = f"pip install -r {root}/requirements.txt"
        raise ImportError(f"WebShop lacks a package ({error}); run: {install}") from error
    except Exception as error:  # it loads spaCy's model and starts Java while it is imported
        raise ValueError(f"WebShop in {root} does not start ({error!r}); to fetch what it needs: {setup}") from error
    if folder not in Path(engine.__file__).resolve().parents:
        raise ValueError(f"another WebShop, {engine.__file__}, is loaded already; there can be one for each process")
    settings = {"observation_mode": "text", "human_goals": bool(human_goals), "num_products": products or None}
    try:
        with _seeded(seed):
            return engine.WebAgentTextEnv, settings, engine.WebAgentTextEnv(**settings).server
    except Exception as error:  # whatever its loaders raise for missing data, a missing index, no Java
        raise ValueError(f"WebShop in {root} does not start ({error!r}); to fetch what it needs: {setup}") from error


class WebShopAdapter:
    """One customer of the user's own WebShop, with the methods of `Shop`."""

    instructions = INSTRUCTIONS
    _numbers = count()

    def __init__(self, config: ShopConfig):
        self.config = config
        engine, settings, self.server = _load_engine(
            config.webshop_root, config.products, config.human_goals, config.seed
        )
        # A prefix of its own: its sessions must not meet those that other environments have for the same goal.
        prefix = f"customer{next(self._numbers)}-"
        with _seeded(config.seed):
            self.env = engine(server=self.server, session_prefix=prefix, **settings)

    def size(self, split: str) -> int:
        """Number of tasks in the split."""
        return len(split_range(len(self.server.goals), split))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start task number `seed` of a split, 0 to size(split) - 1. Raises ValueError if there is no such task."""
        number = goal_number(len(self.server.goals), split, seed)
        self.server.user_sessions.pop(self.env.session, None)  # the last episode's: nobody looks at it again
        self.goal, self.steps, self.score, self.terminated = self.server.goals[number], 0, 0.0, False
        self.observation, _ = self.env.reset(session=number)
        return self.observation, self._info()

    def _info(self) -> dict:
        return {"task_type": self.goal["category"], "success": self.score == 1.0, "score": self.score}

    def clickables(self) -> list[str]:
        """Values that can be clicked on this page; none after the purchase."""
        return [] if self.terminated else self.env.get_available_actions()["clickables"]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Do one action, unless WebShop would ignore it. The reward is 1.0 in the step that buys exactly what is
        wanted, else 0.0."""
        valid = not self.terminated and does_something(action, self.clickables())
        if valid:
            self.observation, score, self.terminated, _ = self.env.step(action)
            self.score = float(score)
        self.steps += 1
        reward = float(valid and self.terminated and self.score == 1.0)
        truncated = not self.terminated and self.steps >= self.config.max_steps
        return self.observation, reward, self.terminated, truncated, {"valid": valid, **self._info()}

    def admissible(self) -> list[str]:
        """Actions that do something now, in a fixed order, with the searches of `Shop.admissible`."""
        return offered(self.clickables(), (self.goal["instruction_text"], self.goal["query"]))

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows which product is meant, and searches for its title. It succeeds
        where that product does: some real goals ask for what their own product does not have."""
        asin, session, values = self.goal["asin"], self.server.user_sessions[self.env.session], self.clickables()
        if "search" in values:
            words = search_text(self.goal["name"])
            return f"I need {words}.", f"search[{words}]"
        if asin.lower() in values:
            return f"{asin} fits.", f"click[{asin}]"
        if session["asin"] is None:  # a page of results; one without a product is behind the last
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
