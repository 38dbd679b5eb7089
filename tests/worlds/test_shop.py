"""The shop: WebShop's reward by hand and by another algorithm, its pages, its tasks, its oracle."""

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_envs import transcript

from envs import make_envs, oracle_player, random_player
from worlds import shop_reward
from worlds.shop import SEP, Catalogue, Shop
from worlds.shop_data import Goal, Product
from worlds.shop_reward import alike, choose_options, option_core
from worlds.webshop import SPLITS, ShopConfig, split_range

BLANKET = Product(
    *("B1", "acme soft warm blanket", "home", "blanket", "Home \u203a Bedding \u203a Blanket", 20.0, "$20.0"),
    description="A nice thing.",
    bullets=("machine washable",),
    attributes=("soft", "warm"),
    options={"color": ("dark red", "blue"), "size": ("small", "large")},
)
LAMP = {"asin": "B2", "title": "tall lamp", "query": "lamp", "path": "Home \u203a Light"}


def product(**changes):
    return dataclasses.replace(BLANKET, **changes)


def goal(attributes=("soft", "warm"), options=(), price_limit=30.0, asin="B1"):
    return Goal(asin, "i need it", attributes, options, price_limit)


def shop_with(*products):
    """A shop that sells these, at the start of one of its six equal tasks."""
    env = Shop(catalogue=Catalogue(list(products), [goal()] * 6))
    env.reset("train", 0)
    return env


def act(env, *actions):
    """The observation after these actions, all of which must be valid."""
    for action in actions:
        observation, *_, info = env.step(action)
        assert info["valid"], action
    return observation


# --------------------------------------------------------------------------------------------------------------- reward

RED, WANTED = {"color": "dark red", "size": "small"}, ("dark red", "small")


@pytest.mark.parametrize(
    ("changes", "wanted", "chosen", "score"),
    [
        # 2 attributes, 2 options ("dark red" is dark, "red" is red: not the same), the price: 4 of 5
        ({}, goal(options=("red", "small")), RED, 4 / 5),
        ({}, goal(options=WANTED), RED, 1.0),
        ({}, goal(options=WANTED), {"color": "blue"}, 3 / 5),  # attributes and price
        ({}, goal(options=WANTED), {}, 3 / 5),
        ({"price": 30.0}, goal(), {}, 1.0),  # the limit itself is allowed: 2 + 0 + 1 of 3
        ({"price": 30.1}, goal(), {}, 2 / 3),
        ({}, goal(("washable", "warm")), {}, 1.0),  # it is in the features
        ({}, goal(("heated", "warm")), {}, 2 / 3),
        ({}, goal(("nice", "acme")), {}, 1.0),  # in description, in title
        (LAMP, goal(), {}, 0.0),  # another type of product: no word of the title is the same
        (LAMP | {"title": "soft towel"}, goal(), {}, 1.0),  # one of four words is the same: 0.25 > 0.2
    ],
)
def test_reward_by_hand(changes, wanted, chosen, score):
    assert Catalogue([BLANKET], [wanted]).score(product(**changes), wanted, chosen) == pytest.approx(score)


@pytest.mark.parametrize(
    ("shared", "query", "factor"), [(0, "x", 0.0), (1, "x", 0.1), (2, "x", 0.5), (2, "blanket", 1.0), (5, "x", 1.0)]
)
def test_type_factor(shared, query, factor):
    """The target has 20 words: 1 shared is 0.05 < 0.1, 2 are 0.1, 5 are 0.25 > 0.2. Two shared categories do, too."""
    words = [f"word{chr(97 + i)}" for i in range(20)]
    target = product(title=" ".join(words))
    other = product(**LAMP | {"title": " ".join(["other", *words[:shared]]), "query": query})
    assert shop_reward.type_factor(other, target) == factor
    near = dataclasses.replace(other, path="Bedding \u203a Home \u203a Light")
    assert shop_reward.type_factor(near, target) == (1.0 if factor == 0.5 else factor)


def slow_alike(a, b):
    """The token set ratio from its description, with sets of words and a table of common subsequences."""

    def ratio(a, b):  # 200 * longest common subsequence / sum of lengths
        row = [0] * (len(b) + 1)
        for x in a:
            new = [0]
            for j, y in enumerate(b):
                new.append(row[j] + 1 if x == y else max(new[j], row[j + 1]))
            row = new
        return 200 * row[-1] / (len(a) + len(b))

    a, b = (set(re.sub(r"[^a-z0-9_]", " ", text.lower()).split()) for text in (a, b))
    both, only_a, only_b = (" ".join(sorted(words)) for words in (a & b, a - b, b - a))
    if not a or not b or (both and not (only_a and only_b)):
        return bool(both)
    with_a, with_b = f"{both} {only_a}".strip(), f"{both} {only_b}".strip()
    return round(max([ratio(with_a, with_b), *(ratio(both, text) for text in (with_a, with_b) if both)])) > 85


WORDS = st.lists(st.sampled_from(["Red,", "red", "dark-red", "W_red", "small", "smal", "smalls", "2)", "2pack"]))


@given(WORDS.map(" ".join), WORDS.map(" ".join))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_alike_against_another_algorithm(a, b):
    assert alike(a, b) == alike(b, a) == slow_alike(a, b)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("na\u00efvet\u00e9", "navt", True),  # Latin-1 beyond ASCII is dropped
        ("\u0142", "l", False),  # other letters are not
        ("w-large", "large", True),
        ("w_large", "large", False),  # an underscore belongs to the word: 2 * 5 / 12 = 83
        ("a" * 53 + "b" * 9, "a" * 53 + "c" * 9, False),  # 2 * 53 / 124 = 85.48 is rounded to 85, which is not above 85
        ("a" * 54 + "b" * 8, "a" * 54 + "c" * 8, True),  # 87.1
    ],
)
def test_alike_is_thefuzz(a, b, expected):
    assert alike(a, b) == expected


def test_a_pair_from_a_template_has_a_colour_only_if_its_value_is_one():
    cores = [option_core(option) for option in ("dark red", ("color", "blue"), ("color", "dark red"))]
    assert cores == ["dark", "blue", ("color", "dark red")]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (["dark red", "small"], RED),
        ([("color", "dark red"), ("size", "small")], RED),
        (["reddish"], {"color": "red"}),  # red is the colour in it
        (["red wine"], {"color": "red wine"}),  # the very value goes before those that count as it
        (["green"], {}),
    ],
)
def test_choose_options(wanted, chosen):
    options = {"color": ("red wine", "red", "blue", "dark red"), "size": ("x-small", "small")}
    assert choose_options(options, wanted) == chosen


# ---------------------------------------------------------------------------------------------------------------- pages


@pytest.fixture
def small():
    """A shop with 12 blankets, each worth 20 dollars and more, and goals that the first one fulfils."""
    products = [product(asin=f"B{i:02d}", price=20.0 + i, price_tag=f"${20.0 + i}") for i in range(12)]
    wanted = goal(asin="B00", options=WANTED, price_limit=20.0)
    return Shop(catalogue=Catalogue(products, [dataclasses.replace(wanted, instruction=f"task {i}") for i in range(6)]))


def test_pages(small):
    observation, info = small.reset("test", 0)
    assert observation == "WebShop [SEP] Instruction: [SEP] task 0 [SEP] Search"
    assert info == {"task_type": "home", "success": False, "score": 0.0}
    assert small.clickables() == ["search"]
    head = "Instruction: [SEP] task 0 [SEP] Back to Search [SEP] "

    def page(*actions):
        return act(small, *actions).removeprefix(head)

    items = [f"B{i:02d} [SEP] acme soft warm blanket [SEP] ${20.0 + i}" for i in range(12)]
    assert page("search[soft blanket]") == SEP.join(["Page 1 (Total results: 12)", "Next >", *items[:10]])
    assert small.clickables() == ["back to search", "next >", *(f"b{i:02d}" for i in range(10))]
    assert page("click[Next >]") == SEP.join(["Page 2 (Total results: 12)", "< Prev", "Next >", *items[10:]])
    assert page("click[next >]") == "Page 3 (Total results: 12) [SEP] < Prev [SEP] Next >"
    options = ["color", "dark red", "blue", "size", "small", "large"]
    texts = ["acme soft warm blanket", "Price: $20.0", "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"]
    item = SEP.join(["< Prev", *options, *texts])
    assert page("click[< prev]", "click[< prev]", "click[b00]") == item
    links = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
    assert small.clickables() == [*links, "dark red", "blue", "small", "large"]
    assert page("click[dark red]") == item
    assert page("click[description]") == "< Prev [SEP] A nice thing."
    assert small.clickables() == ["back to search", "< prev"]
    assert page("click[< prev]") == item
    assert page("click[features]") == "< Prev [SEP] machine washable"
    assert page("click[< prev]", "click[reviews]") == "< Prev"
    page("click[< prev]", "click[small]")
    small.steps = 0
    last, reward, terminated, truncated, info = small.step("click[buy now]")  # the colour has survived the sub-pages
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"valid": True, "task_type": "home", "success": True, "score": 1.0}
    assert last == (
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.) "
        '[SEP] Purchased [SEP] asin [SEP] B00 [SEP] options [SEP] {"color": "dark red", "size": "small"} '
        "[SEP] attrs [SEP] None [SEP] category [SEP] None [SEP] query [SEP] None [SEP] product category [SEP] None "
        "[SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] price upper [SEP] instuction text [SEP] category "
        "[SEP] product category [SEP] query [SEP] Goal [SEP] None [SEP] Reward "
        "[SEP] Your score (min 0.0, max 1.0) [SEP] 1.0 [SEP] Reward Details [SEP] None"
    )
    assert small.clickables() == small.admissible() == []
    observation, reward, terminated, truncated, info = small.step("search[blanket]")  # the shop is closed
    assert (observation, reward, terminated, truncated, info["valid"]) == (last, 0.0, True, False, False)


def test_the_last_choice_counts():
    """Of two options with the same value, the later one gets it. Going back forgets all choices."""
    env = shop_with(product(options={"lid": ("black", "white"), "cup": ("white", "red")}))
    act(env, "search[blanket]", "click[b1]", "click[red]", "click[white]", "click[black]")
    assert env.chosen == {"cup": "white", "lid": "black"}
    assert env.clickables()[-3:] == ["black", "white", "red"]
    act(env, "click[< prev]", "click[b1]")
    assert env.chosen == {}


def test_an_option_with_the_name_of_a_button_is_the_button():
    """As in WebShop, which also has a page of attributes that no button leads to."""
    env = shop_with(product(options={"show": ("attributes", "features", "next >", "search")}))
    item = act(env, "search[blanket search_results item_page]", "click[b1]")  # names of pages, which mislead WebShop
    page = "< Prev [SEP] soft [SEP] warm [SEP] home [SEP] blanket [SEP] Home \u203a Bedding \u203a Blanket"
    assert act(env, "click[attributes]").endswith(f"Back to Search [SEP] {page}")
    assert act(env, "click[< prev]", "click[features]").endswith("< Prev [SEP] machine washable")
    assert act(env, "click[< prev]", "click[next >]") == item
    assert env.chosen == {"show": "next >"}
    assert not env.step("click[search]")[-1]["valid"]
    assert "Page 1 (Total results: 1)" in act(env, "click[< prev]")


@pytest.mark.parametrize(
    "action",
    ["", "buy", "click[]", "search[]", "click[buy now]", "click[search]", " search[x]", "search[a[b]]",
     "click[b99]", "search[<r>]", "search[<a> soft]", "search[<c>]", "search[<Q> blanket]", "search[a\nb]", "<|end|>"],
)  # fmt: skip
def test_invalid_actions_change_nothing(small, action):
    first, _ = small.reset("test", 0)
    observation, reward, terminated, truncated, info = small.step(action)
    assert (observation, reward, terminated, truncated, info["valid"]) == (first, 0.0, False, False, False)


def test_a_search_may_find_nothing(small):
    small.reset("test", 0)
    for words in (" ", "the", "zebra", "<|im_end|>"):
        assert act(small, f"search[{words}]").endswith("Page 1 (Total results: 0) [SEP] Next >")


def test_texts_appear_as_html_shows_them():
    """Elements without text vanish, spaces around texts too, and white space with a line break is layout."""
    bullets = ("", " \n ", "x\ny ")
    env = shop_with(product(title="  it's <b> & so ", description="", bullets=bullets, options={"a": ("p",)}))
    assert "B1 [SEP] it's <b> & so [SEP] $20.0" in act(env, "search[so]")
    assert act(env, "click[b1]", "click[description]").endswith("[SEP] < Prev")
    assert act(env, "click[< prev]", "click[features]").endswith("[SEP] < Prev [SEP]  [SEP] x\ny")
    env.chosen = {"a": "it's <1> & \u00e9"}  # JSON that is safe inside HTML
    assert '{"a": "it\\u0027s \\u003c1\\u003e \\u0026 \\u00e9"}' in act(env, "click[< prev]", "click[buy now]")


# ----------------------------------------------------------------------------------------------------- oracle and tasks


@pytest.mark.filterwarnings("ignore:catalogue. left out")  # products without an instruction from a template
@pytest.mark.parametrize("human", [0, 1])
@pytest.mark.parametrize("size", [{}, {"products": 60, "seed": 5}])
def test_oracle_solves_every_task_and_nothing_is_wanted_twice_in_whatever_words(size, human):
    """ "insulated, handmade mug" for training and "handmade, insulated mug" for testing are one goal."""
    env, state, first = Shop(ShopConfig(**size, human_goals=human)), random.getstate(), set()
    for split in SPLITS:
        for seed in range(env.size(split)):
            (observation, _), *steps = transcript(env, split, seed, oracle_player)
            assert steps[-1][2] == 1.0, (split, seed)
            assert all(info["valid"] for *_, info in steps)
            first.add(re.sub(", and price.*", "", observation))
    assert random.getstate() == state  # the global generator is not used
    wishes = {(env.catalogue.products[g.asin].query, frozenset(g.attributes), frozenset(g.options)) for g in env.goals}
    assert len(wishes) == len(first) == len(env.goals)  # no repeats, within a split or across


def test_oracle_recovers_from_any_state():
    def lost(env, actions, rng):
        if env.steps >= 20:
            return oracle_player(env, actions, rng)
        _, action = random_player(env, actions, rng)
        # It may search on any page, and must not buy.
        return "", "search[red]" if action == "click[buy now]" or rng.random() < 0.1 else action

    env = Shop(ShopConfig(max_steps=60))
    for seed in range(60):
        assert transcript(env, "train", seed, lost)[-1][2] == 1.0


def test_only_a_perfect_purchase_is_rewarded():
    infos = []
    for seed in range(60):
        for _, _, reward, terminated, _, info in transcript(Shop(), "train", seed, random_player)[1:]:
            assert (reward == 1.0) == info["success"] == (info["score"] == 1.0)
            assert terminated or info["score"] == 0.0
            infos.append(info)
    assert any(0 < info["score"] < 1 for info in infos)


def test_splits_are_webshops_and_large_enough():
    assert [split_range(12_087, split) for split in SPLITS] == [range(1500, 12_087), range(500, 1500), range(500)]
    assert [split_range(600, split) for split in SPLITS] == [range(300, 600), range(100, 300), range(100)]
    assert Shop().size("test") >= 256


@given(st.integers(6, 20_000))
@settings(derandomize=True, deadline=None)
def test_splits_of_any_shop(goals):
    ranges = [split_range(goals, split) for split in ("test", "eval", "train")]
    assert [i for r in ranges for i in r] == list(range(goals))
    assert all(ranges)


def test_environments_share_the_catalogue():
    one, other = make_envs("webshop", ["products=60"], 2)
    assert one.world.catalogue is other.world.catalogue
