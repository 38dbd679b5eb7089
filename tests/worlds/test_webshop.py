"""The adapter to a WebShop checkout, on a stand-in for the checkout that has the traps of the real one."""

import random
import re
import sys

import numpy as np
import pytest
from test_envs import transcript

from envs import make_envs, oracle_player
from worlds import webshop
from worlds.contract import WorldError
from worlds.webshop import SPLITS, WebShopAdapter

# What the adapter needs of WebShop, with its traps: a goal is only obeyed if its number is an int, the global random
# generator is drawn from, also by the first print; a step after the purchase or with a strange search raises.
ENGINE = """
import random
from rich import print

class Server:
    built = 0

    def __init__(self, human_goals, num_products):
        Server.built += 1
        assert (human_goals, num_products) == (True, 100)
        print("Products loaded.")
        limits = [random.random() for _ in range(12)]
        goal = {"asin": "B1", "category": "home", "query": "mug", "name": "tall [red] mug", "goal_options": ["red"]}
        self.goals = [{**goal, "instruction_text": f"task {i}, price {limit}"} for i, limit in enumerate(limits)]
        self.product_item_dict = {"B1": {"options": {"color": ["red", "blue"]}}}
        self.user_sessions = {}

class WebAgentTextEnv:
    def __init__(self, observation_mode, human_goals, num_products, server=None, session_prefix=""):
        assert observation_mode == "text"
        self.server, self.prefix = server or Server(human_goals, num_products), session_prefix
        self.reset(random.randrange(12))

    def reset(self, session):
        goal = session if type(session) is int else random.randrange(12)
        self.session = f"{self.prefix}{session}"
        self.user = self.server.user_sessions.setdefault(self.session, {"asin": None, "options": {}})
        assert self.user == {"asin": None, "options": {}}, "two customers share a session"
        self.text, self.page = self.server.goals[goal]["instruction_text"], "search"
        return self.observation, None

    @property
    def observation(self):
        return f"{self.page} [SEP] {self.text} \\ud800"

    def get_available_actions(self):
        pages = {"search": ["search"], "results": ["back to search", "next >", "b0", "b1"], "done": [],
                 "item": ["back to search", "< prev", "buy now", "red", "boom"]}
        return {"clickables": pages[self.page]}

    def step(self, action):
        assert self.page != "done", "stepped after the purchase"
        value = action.split("[")[1][:-1].lower()
        if value.startswith("<a>") or value == "boom":
            raise KeyError(value)
        if action.startswith("search") or value == "< prev":
            self.page, self.user["asin"] = "results", None
        elif value in ("b0", "b1"):
            self.page, self.user["asin"] = "item", value.upper()
        elif value == "red":
            self.user["options"]["color"] = "red"
        done = value == "buy now"
        self.page = "done" if done else self.page
        right = self.user == {"asin": "B1", "options": {"color": "red"}}
        return self.observation, (1.0 if right else 0.5) if done else 0, done, None
"""
RICH = """
import random
from functools import cache

@cache
def get_console():
    return random.random()  # the real one draws, too

def print(text):
    get_console()
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in the place of a WebShop checkout; afterwards the process has never seen it."""
    folder = tmp_path / "WebShop" / "web_agent_site" / "envs"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "web_agent_text_env.py").write_text(ENGINE)
    (tmp_path / "WebShop" / "rich.py").write_text(RICH)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / "WebShop"
    webshop._load_engine.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("rich", "web_agent_site")]:
        del sys.modules[name]


@pytest.fixture
def make(checkout):
    fixed = [f"webshop_root={checkout}", "products=100"]
    return lambda number=1, *settings: [env.world for env in make_envs("webshop", [*fixed, *settings], number)]


def test_adapter_plays_a_checkout(make):
    state = random.getstate()
    first, second = make(2)
    assert random.getstate() == state  # although the engine seeds and draws
    assert type(first) is WebShopAdapter
    assert first.server is second.server
    assert type(first.server).built == 1
    assert [first.size(split) for split in SPLITS] == [6, 4, 2]
    draws = random.Random(233)  # as in the embedded shop
    assert [g["instruction_text"] for g in first.goals] == [f"task {i}, price {draws.random()}" for i in range(12)]
    second.reset("train", 0)  # the same goal at the same time
    second.step("search[mug]"), second.step("click[b0]")
    assert first.reset("train", np.int64(1)) == first.reset("train", 1)
    for seed in (0, 1, 0):
        _, *steps = transcript(first, "train", seed, oracle_player)
        assert [step[0] for step in steps] == ["search[tall red mug]", "click[B1]", "click[red]", "click[buy now]"]
        _, last, *answer = steps[-1]
        assert re.fullmatch(rf"done \[SEP\] task {6 + seed}, price [0-9.]+ \?", last)  # no lone surrogate
        info = {"valid": True, "task_type": "home", "success": True, "score": 1.0}
        assert answer == [1.0, True, False, info]
        assert first.step("search[mug]") == (last, 0.0, True, False, info | {"valid": False})
    assert len(first.server.user_sessions) <= 4  # old sessions are dropped


def test_adapter_half_a_purchase_and_the_way_back(make):
    (env,) = make()
    env.reset("test", 0)
    env.step("search[x]"), env.step("click[b0]")
    assert env.oracle()[1] == "click[< prev]"
    assert env.admissible() == [f"click[{v}]" for v in ("back to search", "< prev", "buy now", "red", "boom")]
    assert env.step("click[Buy Now]")[1:4] == (0.0, True, False)
    assert (env.score, env.admissible()) == (0.5, [])


def test_adapter_invalid_actions_limit_and_an_engine_that_raises(make):
    (env,) = make(1, "max_steps=5")
    first, _ = env.reset("test", 1)
    assert env.admissible() == [f"search[{env.goal['instruction_text']}]", "search[mug]"]
    for number, action in enumerate(("", "search[<a> x]", "click[search]", "click[red]", "hello"), 1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation, reward, terminated, truncated, info["valid"]) == (first, 0.0, False, number == 5, False)
    env.step("search[x]"), env.step("click[b1]")
    with pytest.raises(KeyError, match="boom"):
        env.step("click[boom]")
    assert transcript(env, "test", 1, oracle_player)[-1][2] == 1.0  # the next episode is not disturbed


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (None, "holds no WebShop .*; run: git clone https://github.com/princeton-nlp/WebShop "),
        ("import no_such_package", "no_such_package.*pip install .*selenium spacy thefuzz==0.19.0 torch"),
        ("raise OSError('no model')", "does not start .OSError.*Java.*spacy download en_core_web_sm"),
        ("WebAgentTextEnv = open", "no usable data .TypeError.*setup.sh -d small"),
    ],
)
def test_adapter_says_what_to_run(checkout, make, engine, message):
    file = checkout / "web_agent_site" / "envs" / "web_agent_text_env.py"
    file.write_text(engine) if engine else (checkout / "web_agent_site").rename(checkout / "gone")
    with pytest.raises(WorldError, match=message):
        make()


def test_adapter_refuses_a_second_checkout(checkout, make):
    make()
    other = checkout.parent / "other" / "web_agent_site"
    other.mkdir(parents=True)
    with pytest.raises(WorldError, match=r"another WebShop, .*is loaded already"):
        make_envs("webshop", [f"webshop_root={other.parent}"], 1)
