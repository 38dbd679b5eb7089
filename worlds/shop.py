"""An online shop that speaks WebShop's text protocol.

A task is an instruction ("i need insulated, handmade mug with color: red, and price lower than 30.00 dollars"). The
agent searches with `search[words]`, follows links and buttons with `click[value]`, chooses options and buys. Pages,
actions, search results and score are WebShop's (Yao et al. 2022, arXiv:2207.01206); nothing of it has to be installed,
because a made-up catalogue comes along. With `--data DIR` the shop sells what WebShop's product files describe.

The reward is 1 if the purchase scores a full 1.0, else 0, once, at the end; info["score"] is WebShop's own reward.

Differences from WebShop: the nouns of a title are its words that are no stop words, instead of what a spaCy model tags
(`Catalogue(nouns=...)` takes another rule); the search shortcuts <r>, <a>, <c>, <q> (random results, a listing of a
category, ...) are refused, two of them crash the original; ratings and reviews are empty, as they are upstream.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

from rapidfuzz.fuzz import token_set_ratio
from rapidfuzz.utils import default_process

from worlds.shop_data import PATH_MARK, Goal, Product, generate, load_files, parse
from worlds.shop_search import Index

SPLITS = ("train", "eval", "test")
SEP = " [SEP] "
PER_PAGE, MAX_RESULTS = 10, 50
SUB_PAGES = ("description", "features", "reviews")
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
    human_goals: int = 1  # 1: instructions that people wrote; 0: from a template
    seed: int = 233  # of the made-up catalogue, of prices and of price limits

    def __post_init__(self):
        if self.products < 0 or self.goals < 1 or self.max_steps < 1:
            raise ValueError(f"products must be 0 or more, goals and max_steps at least 1, got {self}")
        if self.human_goals not in (0, 1):
            raise ValueError(f"human_goals must be 0 or 1, got {self.human_goals}")
        if self.data and self.webshop_root:
            raise ValueError("data and webshop_root exclude each other: a checkout has its own data folder")


def split_range(goals: int, split: str) -> range:
    """Numbers of the goals of a split: WebShop's own test 0-499, eval 500-1499, train 1500 and up; a shop with less
    than 3000 goals keeps the proportions. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; webshop has {', '.join(SPLITS)}")
    test, evaluation = min(500, goals // 6), min(1500, goals // 2)
    return {"test": range(test), "eval": range(test, evaluation), "train": range(evaluation, goals)}[split]


def goal_number(goals: int, split: str, seed: int) -> int:
    """Number of the goal that is task number `seed` of the split. Raises ValueError if there is no such task."""
    numbers = split_range(goals, split)
    if not 0 <= seed < len(numbers):
        raise ValueError(f"split {split} has tasks 0 to {len(numbers) - 1}, got {seed}")
    return int(numbers[seed])  # WebShop takes any other kind of integer for a wish to get a random goal


# ------------------------------------------------------------------------------------------------- search and reward

NO_NOUNS = frozenset(["a", "an", "the", "and", "or", "of", "for", "with", "in", "on", "to", "by", "from", "that", "is",
                      "are", "be", "this", "it", "your", "my", "i"])  # fmt: skip


def title_words(title: str) -> list[str]:
    """The words of a title that stand in for its nouns."""
    return [word.lower() for word in re.findall(r"[A-Za-z]\w*", title) if word.lower() not in NO_NOUNS]


# The first of these that an option contains stands for the option: "black forest" is black. WebShop's list and order.
COLORS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal
dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy
khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine
yellow""".split()  # noqa: SIM905


@lru_cache(maxsize=100_000)
def _plain(text: str) -> str:
    """Lower case letters and digits; like thefuzz, which WebShop uses, without the Latin-1 letters beyond ASCII."""
    return default_process("".join(letter for letter in text if not 128 <= ord(letter) < 256))


def alike(a: object, b: object) -> bool:
    """The words of one are nearly all among the words of the other: a rounded token set ratio above 85 of 100."""
    return round(token_set_ratio(_plain(str(a)), _plain(str(b)))) > 85


@lru_cache(maxsize=100_000)
def option_core(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """Its colour if it has one. A (name, value) pair has one only if the value is a bare colour."""
    return next((color for color in COLORS if color in option), option)


def choose_options(options: dict[str, Iterable[str]], wanted: Iterable[str | tuple[str, str]]) -> dict[str, str]:
    """For each wanted option the closest value that the product has and that counts as it, as name -> value."""
    chosen = {}
    for want in wanted:
        exact = want if isinstance(want, str) else want[1]
        close = [
            (value != exact, name, value)
            for name, values in options.items()
            for value in values
            if name not in chosen and alike(option_core(value), option_core(want))
        ]
        if close:
            _, name, value = min(close)
            chosen[name] = value
    return chosen


class Catalogue:
    """Products and goals, found by WebShop's search and judged by its reward; shared by all environments.

    nouns: the nouns of a title, in lower case.
    """

    def __init__(self, products: list[Product], goals: list[Goal], nouns: Callable[[str], Iterable[str]] = title_words):
        self.products = {product.asin: product for product in products}
        self.goals, self.nouns = goals, nouns
        # In the order of the ids, which decides between results of equal score.
        self._index = Index((asin, self.products[asin].document()) for asin in sorted(self.products))

    def search(self, query: str) -> list[str]:
        """Ids of the best matches, best first, at most MAX_RESULTS."""
        return [asin for asin, _ in self._index.search(query, MAX_RESULTS)]

    def score(self, product: Product, goal: Goal, chosen: dict[str, str]) -> float:
        """WebShop's reward in [0, 1] for buying a product with the chosen options (name -> value)."""
        texts = [product.title.lower(), " ".join(product.bullets).lower(), product.description.lower()]
        matched = sum(
            any(alike(own, wanted) for own in product.attributes) or any(wanted in text for text in texts)
            for wanted in goal.attributes
        )
        values = [option_core(value) for value in chosen.values()]
        matched += sum(any(alike(value, option_core(wanted)) for value in values) for wanted in goal.options)
        matched += product.price <= goal.price_limit
        return matched / (len(goal.attributes) + len(goal.options) + 1) * self._type_factor(product, goal)

    def _type_factor(self, product: Product, goal: Goal) -> float:
        """1 for the wanted type of product, less for another one: 0.5, 0.1 or 0."""
        target = self.products[goal.asin]
        wanted, nouns = list(self.nouns(target.title)), set(self.nouns(product.title))
        overlap = len(set(wanted) & nouns) / len(wanted) if wanted else 0.2
        if overlap < 0.1:
            return 0.1 if overlap else 0.0
        categories = [{part.strip() for part in item.path.split(PATH_MARK)} for item in (product, target)]
        same = product.query == target.query or len(categories[0] & categories[1]) >= 2 or overlap > 0.2
        return 1.0 if same else 0.5


@cache
def load_catalogue(data: str, products: int, goals: int, human_goals: int, seed: int) -> Catalogue:
    """The catalogue of these settings of ShopConfig; one for all environments of the process."""
    if data:
        items, tasks = load_files(data, limit=products, human_goals=bool(human_goals), seed=seed)
    else:
        items, tasks = parse(*generate(products or 500, goals, seed), human_goals=bool(human_goals), seed=seed)
    if len(tasks) < 6:
        raise ValueError(f"{data or 'the catalogue'} has {len(tasks)} goals; three splits need at least 6")
    return Catalogue(items, tasks)


# ----------------------------------------------------------------------------------------------------------- the shop


def parse_action(action: str) -> tuple[str, str]:
    """("search" or "click", its argument in lower case); ("", "") for anything else, and for a search shortcut.

    >>> parse_action("search[Red mug]"), parse_action("buy it")
    (('search', 'red mug'), ('', ''))
    """
    match = re.match(r"(.+)\[(.+)\]", action)  # WebShop's: with a further bracket inside it finds no verb
    verb, argument = (match[1], match[2].lower()) if match else ("", "")
    refused = verb not in ("search", "click") or (verb == "search" and argument.split(" ")[0] in SHORTCUTS)
    return ("", "") if refused else (verb, argument)


def does_something(action: str, clickables: list[str]) -> bool:
    """Whether a page with these clickable values reacts to the action; a search is taken on any page."""
    verb, value = parse_action(action)
    return verb == "search" or (verb == "click" and value != "search" and value in clickables)


def offered(clickables: list[str], searches: Iterable[str]) -> list[str]:
    """Actions that a page reacts to: the clicks, or with the search bar in sight these searches."""
    if "search" in clickables:
        actions = [f"search[{search_text(words)}]" for words in searches]
    else:
        actions = [f"click[{value}]" for value in clickables]
    return [action for action in actions if does_something(action, clickables)]


def search_text(text: str) -> str:
    """Text that can stand between the brackets of a search."""
    return re.sub(r"[][\s]+", " ", text).strip()


def _text_nodes(texts: Iterable[str]) -> list[str]:
    """What is left of texts when WebShop has put them into a page and read them back."""
    # An empty element has no text, and white space with a line break in it counts as layout.
    return [text.strip() for text in texts if text and (text.strip(" \n\t\f\r") or "\n" not in text)]


class Shop:
    """One customer and one task at a time; gymnasium's reset and step, with text for both spaces.

    `reset(split, seed)` -> observation, info; `step(action)` -> observation, reward, terminated, truncated, info.
    info["valid"] says whether the action did something, info["success"] whether the purchase scored 1,
    info["score"] what it scored, info["task_type"] which category the wanted product is from.
    """

    instructions = INSTRUCTIONS

    def __init__(self, config: ShopConfig | None = None, catalogue: Catalogue | None = None):
        self.config = config or ShopConfig()
        c = self.config
        self.catalogue = catalogue or load_catalogue(c.data, c.products, c.goals, c.human_goals, c.seed)

    def size(self, split: str) -> int:
        """Number of tasks in the split."""
        return len(split_range(len(self.catalogue.goals), split))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Start task number `seed` of a split, 0 to size(split) - 1. Raises ValueError if there is no such task."""
        self.goal = self.catalogue.goals[goal_number(len(self.catalogue.goals), split, seed)]
        self.steps, self.score = 0, 0.0
        self._fitting: dict[str, dict[str, str] | None] = {}  # the oracle's notes: options that make a product fit
        self._words = ""  # the oracle's search
        self._leave()
        return self.observation(), self._info()

    def _leave(self) -> None:
        """To the search page, as a new customer."""
        self.page, self.results, self.number, self.asin, self.sub_page = "search", [], 1, "", ""
        self.chosen: dict[str, str] = {}  # option name -> value

    def _info(self) -> dict:
        category = self.catalogue.products[self.goal.asin].category
        return {"task_type": category, "success": self.score == 1.0, "score": self.score}

    # ------------------------------------------------------------------------------------------------- the pages

    def observation(self) -> str:
        """The text of the page."""
        if self.page == "done":
            return SEP.join(self._receipt())
        instruction = ["Instruction:", self.goal.instruction]
        if self.page == "search":
            return SEP.join(_text_nodes(["WebShop", *instruction, "Search"]))
        body = {"results": self._results_page, "item": self._item_page, "sub": self._sub_page}[self.page]()
        return SEP.join(_text_nodes([*instruction, "Back to Search", *body]))

    def shown(self) -> list[str]:
        """Ids of the products on this page of the results."""
        return self.results[(self.number - 1) * PER_PAGE : self.number * PER_PAGE]

    def _results_page(self) -> list[str]:
        items = [self.catalogue.products[asin] for asin in self.shown()]
        previous = ["< Prev"] if self.number > 1 else []
        head = [f"Page {self.number} (Total results: {len(self.results)})", *previous, "Next >"]
        return head + [text for item in items for text in (item.asin, item.title, item.price_tag)]

    def _item_page(self) -> list[str]:
        item = self.catalogue.products[self.asin]
        options = [text for name, values in item.options.items() for text in (name, *values)]
        links = ["Description", "Features", "Reviews", "Buy Now"]
        return ["< Prev", *options, item.title, f"Price: {item.price_tag}", "Rating: N.A.", *links]

    def _sub_page(self) -> list[str]:
        item = self.catalogue.products[self.asin]
        bullets = [f" {bullet}" for bullet in item.bullets]
        return ["< Prev", *{"description": [item.description], "features": bullets, "reviews": []}[self.sub_page]]

    def _receipt(self) -> list[str]:
        """The last page, with all the fields that WebShop leaves empty in its text mode."""
        options = re.sub("[<>&']", lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(self.chosen, sort_keys=True))
        bought = [("asin", self.asin), ("options", options)]
        bought += [(name, "None") for name in ("attrs", "category", "query", "product category")]
        target = ["asin", "options", "attrs", "price upper", "instuction text", "category", "product category", "query"]
        return [
            *("Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)"),
            *("Purchased", *(text for pair in bought for text in pair), "Target", *target, "Goal", "None"),
            *("Reward", "Your score (min 0.0, max 1.0)", str(self.score), "Reward Details", "None"),
        ]

    def clickables(self) -> list[str]:
        """Values that can be clicked on this page, in WebShop's order; "search" is there to be seen only."""
        if self.page in ("search", "done"):
            return ["search"] if self.page == "search" else []
        values = ["back to search"]
        if self.page == "results":
            values += ["< prev"] * (self.number > 1) + ["next >", *(asin.lower() for asin in self.shown())]
        else:
            values.append("< prev")
        if self.page == "item":
            options = self.catalogue.products[self.asin].options
            values += [*SUB_PAGES, "buy now", *(value for axis in options.values() for value in axis)]
        return list(dict.fromkeys(values))

    # ------------------------------------------------------------------------------------------------- acting

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Do one action. The reward is 1.0 in the step that buys exactly what is wanted, else 0.0."""
        valid = self.page != "done" and does_something(action, self.clickables())
        verb, value = parse_action(action)
        if valid and verb == "search":  # WebShop takes it on any page
            self._leave()
            self.page, self.results = "results", self.catalogue.search(value)
        elif valid:
            self._click(value)
        self.steps += 1
        terminated = self.page == "done"
        reward = float(valid and terminated and self.score == 1.0)
        truncated = not terminated and self.steps >= self.config.max_steps
        return self.observation(), reward, terminated, truncated, {"valid": valid, **self._info()}

    def _click(self, value: str) -> None:
        if value == "back to search":
            self._leave()
        elif value == "buy now":
            self.page = "done"
            self.score = self.catalogue.score(self.catalogue.products[self.asin], self.goal, self.chosen)
        elif self.page == "results" and value in ("next >", "< prev"):
            self.number += 1 if value == "next >" else -1
        elif self.page == "results":
            self.page, self.asin = "item", next(asin for asin in self.shown() if asin.lower() == value)
        elif self.page == "sub":  # "< prev"
            self.page = "item"
        elif value == "< prev":
            self.page, self.chosen = "results", {}
        elif value in SUB_PAGES:
            self.page, self.sub_page = "sub", value
        else:
            self.chosen[self._axis(value)] = value

    def _axis(self, value: str) -> str:
        """The option that a value belongs to; of two that share a value, the later one."""
        options = self.catalogue.products[self.asin].options
        return next(name for name in reversed(options) if value in options[name])

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Actions that do something now, in a fixed order; a random player searches for all the words of the task or
        for the type of product."""
        return offered(self.clickables(), (self.goal.instruction, self.catalogue.products[self.goal.asin].query))

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows the catalogue: it buys the first result that scores 1, or if there
        is none (some real goals ask for what no product has) the goal's own product as well as it can."""
        if self.page == "search":
            words = self._query()
            return f"I need {words}.", f"search[{words}]"
        if self.page == "results":
            return self._browse()
        wanted = self._fit(self.asin)
        if wanted is None or self.page == "sub":
            return "Go back.", "click[< prev]"
        for value in wanted.values():
            if value not in self.chosen.values() and does_something(f"click[{value}]", self.clickables()):
                return f"I need {value}.", f"click[{value}]"
        return "All is chosen.", "click[buy now]"

    def _browse(self) -> tuple[str, str]:
        """The oracle on a page of results."""
        here = next((asin for asin in self.shown() if self._fit(asin) is not None), None)
        if here is not None:
            return f"{here} fits.", f"click[{here}]"  # as it stands on the page; the shop reads it in lower case
        place = next((place for place, asin in enumerate(self.results) if self._fit(asin) is not None), None)
        if place is None:
            return "Nothing fits.", "click[back to search]"
        return "Not on this page.", "click[next >]" if place >= self.number * PER_PAGE else "click[< prev]"

    def _query(self) -> str:
        """Words that find a product that fits: those of the task if they do, else those of its own product's texts."""
        if not self._words:
            item = self.catalogue.products[self.goal.asin]
            values = [option if isinstance(option, str) else option[1] for option in self.goal.options]
            texts = (" ".join([*self.goal.attributes, item.query, *values]), item.title, item.document())
            tries = [search_text(text) for text in texts]
            finds = (any(self._fit(asin) is not None for asin in self.catalogue.search(words)) for words in tries)
            self._words = next((words for words, found in zip(tries, finds, strict=True) if found), tries[0])
        return self._words

    def _fit(self, asin: str) -> dict[str, str] | None:
        """Options (name -> value) with which this product scores 1; None if there are none. For the goal's own product
        the best there is."""
        if asin not in self._fitting:
            item = self.catalogue.products[asin]
            chosen = choose_options(item.options, self.goal.options)
            perfect = self.catalogue.score(item, self.goal, chosen) == 1.0
            self._fitting[asin] = chosen if perfect or asin == self.goal.asin else None
        return self._fitting[asin]
