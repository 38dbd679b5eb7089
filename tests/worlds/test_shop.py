"""The shop: WebShop's reward by hand and by another algorithm, its pages, the contract of every environment."""

import dataclasses
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import ENVIRONMENTS, make_envs, random_player
from worlds import shop
from worlds.shop import SEP, SPLITS, Catalogue, Shop, ShopConfig, choose_options, load_catalogue, split_range
from worlds.shop_data import Goal, Product


def product(asin="B1", **changes):
    values = {
        "title": "acme soft warm blanket",
        "category": "home",
        "query": "blanket",
        "path": "Home \u203a Bedding \u203a Blanket",
        "price": 20.0,
        "price_tag": "$20.0",
        "description": "A nice thing.",
        "bullets": ("machine washable",),
        "attributes": ("soft", "warm"),
        "options": {"color": ("dark red", "blue"), "size": ("small", "large")},
    }
    return Product(asin, **{**values, **changes})


def goal(asin="B1", attributes=("soft", "warm"), options=("red", "small"), price_limit=30.0):
    return Goal(asin, "i need it", attributes, options, price_limit)


@pytest.fixture(scope="module")
def env():
    return Shop()


def play(env, split, seed, choose):
    """Transcript of an episode; choose maps the environment to an action."""
    observation, info = env.reset(split, seed)
    steps = [(None, observation, 0.0, False, False, info)]
    while not (steps[-1][3] or steps[-1][4]):
        action = choose(env)
        steps.append((action, *env.step(action)))
    return steps


def whim(seed):
    rng = random.Random(seed)
    return lambda env: random_player(env, [], rng)[1]


# --------------------------------------------------------------------------------------------------------------- reward


@pytest.mark.parametrize(
    ("bought", "wanted", "chosen", "score"),
    [
        # 2 attributes, 2 options ("dark red" is dark, "red" is red: not the same), the price: 4 of 5
        (product(), goal(), {"color": "dark red", "size": "small"}, 4 / 5),
        (product(), goal(options=("dark red", "small")), {"color": "dark red", "size": "small"}, 1.0),
        (product(), goal(options=("dark red", "small")), {"color": "blue"}, 3 / 5),  # attributes and price
        (product(), goal(options=("dark red", "small")), {}, 3 / 5),
        (product(price=30.0), goal(options=()), {}, 1.0),  # the limit itself is allowed: 2 + 0 + 1 of 3
        (product(price=30.1), goal(options=()), {}, 2 / 3),
        (product(), goal(attributes=("washable", "warm"), options=()), {}, 1.0),  # it is in the features
        (product(), goal(attributes=("heated", "warm"), options=()), {}, 2 / 3),
        (product(), goal(attributes=("nice", "acme"), options=()), {}, 1.0),  # in description, in title
        # another type of product: no word of the title is the same
        (product("B2", title="tall lamp", query="lamp", path="Home \u203a Light"), goal(options=()), {}, 0.0),
        # one of four words (0.25 > 0.2) makes it the same type, whatever the rest
        (product("B2", title="soft towel", query="towel", path="Bath"), goal(options=()), {}, 1.0),
    ],
)
def test_reward_by_hand(bought, wanted, chosen, score):
    catalogue = Catalogue([product(), *([bought] if bought.asin != "B1" else [])], [wanted])
    assert catalogue.score(bought, wanted, chosen) == pytest.approx(score)


@pytest.mark.parametrize(
    ("shared", "query", "factor"), [(0, "x", 0.0), (1, "x", 0.1), (2, "x", 0.5), (2, "blanket", 1.0), (5, "x", 1.0)]
)
def test_type_factor(shared, query, factor):
    """The target has 20 words: 1 shared is 0.05 < 0.1, 2 are 0.1, 5 are 0.25 > 0.2. Two shared categories do, too."""
    words = [f"word{chr(97 + i)}" for i in range(20)]
    target = product(title=" ".join(words))
    other = product("B2", title=" ".join(["other", *words[:shared]]), query=query, path="Home \u203a Light")
    catalogue = Catalogue([target, other], [goal()])
    assert catalogue.score(other, goal(options=()), {}) == factor  # 3 of 3 points
    near = dataclasses.replace(other, path="Bedding \u203a Home \u203a Light")
    assert catalogue.score(near, goal(options=()), {}) == max(factor, (factor == 0.5) * 1.0)


def slow_score(item, target, wanted, chosen):
    """WebShop's reward once more, written from its description with sets of words instead of rapidfuzz."""

    def indel(a, b):  # 200 * longest common subsequence / sum of lengths
        row = [0] * (len(b) + 1)
        for x in a:
            new = [0]
            for j, y in enumerate(b):
                new.append(row[j] + 1 if x == y else max(new[j], row[j + 1]))
            row = new
        return 200 * row[-1] / (len(a) + len(b)) if a or b else 100

    def close(a, b):
        a, b = (set(re.sub(r"[^a-z0-9]", " ", text.lower()).split()) for text in (a, b))
        if not a or not b:
            return False
        both, only_a, only_b = (" ".join(sorted(words)) for words in (a & b, a - b, b - a))
        if both and (not only_a or not only_b):
            return True
        with_a, with_b = f"{both} {only_a}".strip(), f"{both} {only_b}".strip()
        ratios = [indel(with_a, with_b)] + ([indel(both, with_a), indel(both, with_b)] if both else [])
        return round(max(ratios)) > 85

    def color(text):
        return next((c for c in shop.COLORS if text.find(c) >= 0), text)

    points = 0
    for attribute in wanted.attributes:
        in_text = [attribute in text.lower() for text in (item.title, " ".join(item.bullets), item.description)]
        points += 1 if True in in_text or [a for a in item.attributes if close(a, attribute)] else 0
    for option in wanted.options:
        points += 1 if [v for v in chosen.values() if close(color(v), color(option))] else 0
    points += 0 if item.price > wanted.price_limit else 1
    total = len(wanted.attributes) + len(wanted.options) + 1
    words = [w for w in re.split(r"[^A-Za-z0-9]+", target.title.lower()) if w and w not in shop.NO_NOUNS]
    same = sum(1 for w in set(words) if w in item.title.lower().split()) / len(words)
    kinds = set(item.path.split(" \u203a ")) & set(target.path.split(" \u203a "))
    if same == 0:
        return 0.0
    right = item.query == target.query or len(kinds) > 1 or same > 0.2
    return points / total * (0.1 if same < 0.1 else 1.0 if right else 0.5)


def test_reward_against_another_algorithm(env):
    rng, scores = random.Random(0), Counter()
    items = list(env.catalogue.products.values())
    for _ in range(400):
        wanted = rng.choice(env.catalogue.goals)
        target = env.catalogue.products[wanted.asin]
        item = rng.choice([target, rng.choice([i for i in items if i.query == target.query]), rng.choice(items)])
        chosen = {name: rng.choice(values) for name, values in item.options.items() if rng.random() < 0.8}
        score = env.catalogue.score(item, wanted, chosen)
        assert score == pytest.approx(slow_score(item, target, wanted, chosen))
        scores[score] += 1
    assert len(scores) > 6  # not all the same


@given(st.text(max_size=12), st.text(max_size=12))
@settings(derandomize=True, deadline=None)
def test_alike_is_symmetric_and_reflexive(a, b):
    assert shop.alike(a, b) == shop.alike(b, a)
    assert shop.alike(a, a) == bool(shop._plain(a))


def test_alike_is_thefuzz():
    """Letters like e-acute are dropped before the comparison, as thefuzz does, letters beyond Latin-1 are not; and the
    ratio is rounded before it is compared: 2 * 53 / 124 = 85.48 becomes 85, which is not above 85."""
    assert shop.alike("na\u00efvet\u00e9", "navt")
    assert not shop.alike("\u0142", "l")
    assert not shop.alike("a" * 53 + "b" * 9, "a" * 53 + "c" * 9)
    assert shop.alike("a" * 54 + "b" * 8, "a" * 54 + "c" * 8)  # 87.1


def test_options_from_a_template_are_pairs():
    """("color", "blue") is blue, a colour on its own; ("color", "dark red") is compared word by word."""
    assert shop.option_core(("color", "blue")) == "blue"
    assert shop.option_core(("color", "dark red")) == ("color", "dark red")
    assert choose_options(product().options, [("color", "dark red"), ("size", "large")]) == {
        "color": "dark red",
        "size": "large",
    }


def test_choose_options_prefers_the_very_value():
    options = {"color": ("red wine", "red", "blue"), "size": ("x-small", "small")}
    assert choose_options(options, ["red", "small"]) == {"color": "red", "size": "small"}
    assert choose_options(options, ["green"]) == {}


# ---------------------------------------------------------------------------------------------------------------- pages


@pytest.fixture
def small():
    """A shop with 12 blankets, each worth 20 dollars and more, and a goal that the first one fulfils."""
    products = [product(f"B{i:02d}", price=20.0 + i, price_tag=f"${20.0 + i}") for i in range(12)]
    wanted = goal("B00", options=("dark red", "small"), price_limit=20.0)
    return Shop(catalogue=Catalogue(products, [dataclasses.replace(wanted, instruction=f"task {i}") for i in range(6)]))


def test_pages(small):
    observation, info = small.reset("test", 0)
    assert observation == "WebShop [SEP] Instruction: [SEP] task 0 [SEP] Search"
    assert info == {"task_type": "home", "success": False, "score": 0.0}
    assert small.clickables() == ["search"]
    head = "Instruction: [SEP] task 0 [SEP] Back to Search [SEP] "

    def act(action):
        observation, reward, terminated, truncated, info = small.step(action)
        assert (reward, terminated, truncated, info["valid"]) == (0.0, False, False, True)
        return observation.removeprefix(head)

    items = [f"B{i:02d} [SEP] acme soft warm blanket [SEP] ${20.0 + i}" for i in range(12)]
    assert act("search[soft blanket]") == SEP.join(["Page 1 (Total results: 12)", "Next >", *items[:10]])
    assert small.clickables() == ["back to search", "next >", *(f"b{i:02d}" for i in range(10))]
    assert act("click[Next >]") == SEP.join(["Page 2 (Total results: 12)", "< Prev", "Next >", *items[10:]])
    assert act("click[next >]") == "Page 3 (Total results: 12) [SEP] < Prev [SEP] Next >"
    act("click[< prev]"), act("click[< prev]")
    options = ["color", "dark red", "blue", "size", "small", "large"]
    texts = ["acme soft warm blanket", "Price: $20.0", "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"]
    item = SEP.join(["< Prev", *options, *texts])
    assert act("click[b00]") == item
    links = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
    assert small.clickables() == [*links, "dark red", "blue", "small", "large"]
    assert act("click[dark red]") == item
    assert act("click[description]") == "< Prev [SEP] A nice thing."
    assert small.clickables() == ["back to search", "< prev"]
    assert act("click[< prev]") == item
    assert act("click[features]") == "< Prev [SEP] machine washable"
    act("click[< prev]")
    assert act("click[reviews]") == "< Prev"
    act("click[< prev]"), act("click[small]")
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


def test_going_back_forgets_the_options(small):
    small.reset("test", 0)
    for action in ("search[blanket]", "click[b00]", "click[blue]", "click[< prev]", "click[b00]"):
        small.step(action)
    assert small.chosen == {}
    small.step("click[blue]"), small.step("click[dark red]")
    assert small.chosen == {"color": "dark red"}  # the last click on an axis counts


def test_a_value_of_two_options_belongs_to_the_later_one():
    twins = product("B1", options={"lid": ("black", "white"), "cup": ("white", "red")})
    env = Shop(catalogue=Catalogue([twins], [goal("B1")] * 6))
    env.reset("train", 0)
    for action in ("search[blanket]", "click[b1]", "click[white]", "click[black]"):
        env.step(action)
    assert env.chosen == {"cup": "white", "lid": "black"}
    assert env.clickables()[-3:] == ["black", "white", "red"]


@pytest.mark.parametrize(
    "action",
    ["", "buy", "click[]", "search[]", "click[buy now]", "click[search]", "SEARCH[x]", " search[x]", "search[a[b]]",
     "click[b99]", "search[<r>]", "search[<a> soft]", "search[<c>]", "search[<Q> blanket]", "search[a\nb]", "<|end|>"],
)  # fmt: skip
def test_invalid_actions_change_nothing(small, action):
    first, _ = small.reset("test", 0)
    observation, reward, terminated, truncated, info = small.step(action)
    assert (observation, reward, terminated, truncated, info["valid"]) == (first, 0.0, False, False, False)


def test_a_search_may_find_nothing(small):
    small.reset("test", 0)
    for words in (" ", "the", "zebra", "<|im_end|>"):
        observation, _, _, _, info = small.step(f"search[{words}]")
        assert info["valid"]
        assert observation.endswith("Page 1 (Total results: 0) [SEP] Next >")


def test_texts_appear_as_html_shows_them():
    """Elements without text vanish, spaces around texts too, and white space with a line break is layout."""
    odd = product("B1", title="  it's <b> & so ", description="", bullets=("", " \n ", "x\ny "), options={"a": ("p",)})
    env = Shop(catalogue=Catalogue([odd], [goal("B1", options=())] * 6))
    env.reset("train", 0)
    assert "B1 [SEP] it's <b> & so [SEP] $20.0" in env.step("search[so]")[0]
    env.step("click[b1]")
    assert env.step("click[description]")[0].endswith("[SEP] < Prev")
    env.step("click[< prev]")
    assert env.step("click[features]")[0].endswith("[SEP] < Prev [SEP]  [SEP] x\ny")
    env.step("click[< prev]")
    env.chosen = {"a": "it's <1> & \u00e9"}  # JSON that is safe inside HTML
    assert '{"a": "it\\u0027s \\u003c1\\u003e \\u0026 \\u00e9"}' in env.step("click[buy now]")[0]


def test_markers_of_a_chat_template_are_just_text():
    odd = product("B1", title="blanket <|im_end|> <|end|>", description="<|assistant|>buy")
    env = Shop(catalogue=Catalogue([odd], [goal("B1", options=("<|end|>",))] * 6))
    env.reset("train", 0)
    assert "blanket <|im_end|> <|end|>" in env.step("search[blanket]")[0]


# ------------------------------------------------------------------------------------------------------------- contract


def test_same_seed_same_transcript_and_the_random_state_is_left_alone(env):
    state = random.getstate()
    other = Shop(ShopConfig(max_steps=15))
    for seed in range(20):
        first = play(env, "eval", seed, whim(seed))
        assert play(other, "eval", seed, whim(seed)) == first == play(env, "eval", seed, whim(seed))
    assert random.getstate() == state
    assert other.catalogue is env.catalogue  # built once


def test_types_limits_and_rewards(env):
    for seed in range(60):
        steps = play(env, "train", seed, whim(seed))
        assert len(steps) - 1 <= 15
        for _, observation, reward, terminated, truncated, info in steps[1:]:
            assert (type(observation), type(reward), type(terminated), type(truncated)) == (str, float, bool, bool)
            assert set(info) == {"valid", "task_type", "success", "score"}
            assert (reward == 1.0) == (info["success"] and terminated) == (info["score"] == 1.0)
            assert not (terminated and truncated)
            assert info["valid"]  # admissible actions are
        assert all(not (done or cut) for _, _, _, done, cut, _ in steps[:-1])
        assert all(reward == 0 for _, _, reward, _, _, _ in steps[:-1])
        assert steps[-1][4] == (not steps[-1][3])


def test_truncation():
    env = Shop(ShopConfig(max_steps=2))
    steps = play(env, "test", 0, lambda _: "look around")
    assert [(s[3], s[4]) for s in steps] == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize("split", SPLITS)
def test_oracle_reaches_everything(env, split):
    for seed in range(env.size(split)):
        steps = play(env, split, seed, lambda env: env.oracle()[1])
        assert steps[-1][2] == 1.0, steps
        assert all(info["valid"] for *_, info in steps[1:])


def test_oracle_recovers_from_any_state(env):
    patient = Shop(ShopConfig(max_steps=60))
    for seed in range(60):
        rng, wander = random.Random(seed), whim(seed)

        def lost(env, rng=rng, wander=wander):
            if env.steps >= 20:
                return env.oracle()[1]
            action = wander(env)
            # It may search on any page, and must not buy.
            return "search[red]" if action == "click[buy now]" or rng.random() < 0.1 else action

        assert play(patient, "train", seed, lost)[-1][2] == 1.0


@pytest.mark.parametrize("human", [0, 1])
def test_oracle_in_another_shop_and_with_goals_from_a_template(human):
    env = Shop(ShopConfig(products=60, seed=5, human_goals=human))
    for split in SPLITS:
        for seed in range(env.size(split)):
            assert play(env, split, seed, lambda env: env.oracle()[1])[-1][2] == 1.0


def test_thoughts_are_short(env):
    env.reset("train", 0)
    thought, action = env.oracle()
    assert action == f"search[{thought.removeprefix('I need ').removesuffix('.')}]"
    assert len(thought.split()) < 10


@pytest.mark.filterwarnings("ignore:catalogue. left out")  # products without an instruction from a template
@pytest.mark.parametrize("human", [0, 1])
def test_nothing_is_wanted_twice_in_whatever_words(human):
    """ "insulated, handmade mug" for training and "handmade, insulated mug" for testing are one goal."""
    catalogue = Shop(ShopConfig(human_goals=human)).catalogue
    wishes = Counter(
        (catalogue.products[goal.asin].query, frozenset(goal.attributes), frozenset(goal.options))
        for goal in catalogue.goals
    )
    assert set(wishes.values()) == {1}


def test_splits_are_disjoint_full_and_webshops(env):
    assert {s: env.size(s) for s in SPLITS} == {s: len(split_range(len(env.catalogue.goals), s)) for s in SPLITS}
    assert split_range(12_087, "test") == range(500)
    assert split_range(12_087, "eval") == range(500, 1500)
    assert split_range(12_087, "train") == range(1500, 12_087)
    tasks = {split: [env.reset(split, seed)[0] for seed in range(env.size(split))] for split in SPLITS}
    texts = [re.sub(", and price.*", "", text) for split in SPLITS for text in tasks[split]]
    assert len(texts) == len(set(texts)) == len(env.catalogue.goals)  # no repeats, within a split or across
    assert env.size("test") >= 256


@given(st.integers(6, 20_000))
@settings(derandomize=True)
def test_splits_of_any_shop(goals):
    ranges = [split_range(goals, split) for split in ("test", "eval", "train")]
    assert [i for r in ranges for i in r] == list(range(goals))
    assert all(ranges)


def test_unknown_tasks(env):
    with pytest.raises(ValueError, match="unknown split 'dev'; webshop has train, eval, test"):
        env.reset("dev", 0)
    with pytest.raises(ValueError, match="unknown split"):
        env.size("dev")
    for seed in (-1, env.size("test")):
        with pytest.raises(ValueError, match=rf"split test has tasks 0 to {env.size('test') - 1}, got {seed}"):
            env.reset("test", seed)


def test_by_name():
    envs = make_envs("webshop", ["products=60", "max_steps=7"], 2)
    assert envs[0].catalogue is envs[1].catalogue
    assert envs[0].config == ShopConfig(products=60, max_steps=7)
    assert ENVIRONMENTS["webshop"].splits == SPLITS


@pytest.mark.parametrize(
    "settings",
    [{"products": -1}, {"goals": 0}, {"max_steps": 0}, {"human_goals": 2}, {"data": "a", "webshop_root": "b"}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"must be|exclude"):
        ShopConfig(**settings)


def test_too_few_goals():
    with pytest.raises(ValueError, match="three splits need at least 6"):
        load_catalogue("", 1, 2, 1, 0)
