"""An adapter to the real WebShop: the same methods and texts as the embedded shop.

`--webshop-root DIR` names a checkout of https://github.com/princeton-nlp/WebShop with its packages, its spaCy model,
its product files and its search index. An error names what is missing and the command that gets it. `shop.py` needs
none of it.
"""

import random
import sys
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

from worlds.shop import Customer, Shop, ShopConfig, does_something, goal_number, offered, search_text
from worlds.shop_reward import choose_options


def make_webshop(config: ShopConfig) -> "Shop | WebShopAdapter":
    """The real WebShop if the configuration names a checkout, else the embedded shop."""
    return WebShopAdapter(config) if config.webshop_root else Shop(config)


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
def _load_engine(root: str, products: int, human_goals: int, seed: int):
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
    settings = {"observation_mode": "text", "human_goals": bool(human_goals), "num_products": products or None}
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
        """Start task number `seed` of a split, 0 to size(split) - 1. Raises ValueError if there is no such task."""
        number = goal_number(len(self.goals), split, seed)
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
        """(thought, action) of a player that knows the wanted product and searches for its title. It succeeds where
        that product does: some real goals ask for what their own product does not have."""
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
