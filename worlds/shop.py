"""An online shop that speaks WebShop's text protocol.

A task is an instruction ("i need insulated, handmade mug with color: red, and price lower than 30.00 dollars"). The
agent searches with `search[words]`, clicks links, buttons and options with `click[value]`, and buys. Pages, actions,
search results and score are WebShop's (Yao et al. 2022, arXiv:2207.01206). WebShop itself is not needed: the shop
brings a made-up catalogue. With `--env_args data=DIR` it sells the products in WebShop's own files.

The reward is 1 if the purchase scores a full 1.0, else 0. It comes once, at the end. info["score"] is WebShop's reward.

Differences from WebShop:
- WebShop finds the nouns of a title with a spaCy model. Here they are all words but stop words.
- The search shortcuts <r>, <a>, <c> and <q> are refused. Two of them crash WebShop.
- WebShop looks for the names of its pages in the address of the page, which holds the search and the options. If those
  contain `search_results` or `item_page`, its `< Prev` leads to a wrong page. Here it always leads one page back.
- A lone surrogate (half a character) in a product file becomes "?".
"""

import json
import re
from collections.abc import Iterable
from functools import cache

from worlds.shop_data import Goal, Product, generate, load_files, parse
from worlds.shop_reward import choose_options, score
from worlds.shop_search import Index
from worlds.webshop import Customer, ShopConfig, WebShopAdapter, does_something, offered, parse_action, search_text

SEP = " [SEP] "
PER_PAGE, MAX_RESULTS = 10, 50
SUB_PAGES = ("description", "features", "reviews")
HIDDEN_PAGE = "attributes"  # has no button; an option of this name leads to it


def make_webshop(config: ShopConfig) -> "Shop | WebShopAdapter":
    """The real WebShop if the configuration names a checkout, else the embedded shop."""
    return WebShopAdapter(config) if config.webshop_root else Shop(config)


class Catalogue:
    """Products and goals, with WebShop's search and reward. All environments share one."""

    def __init__(self, products: list[Product], goals: list[Goal]):
        self.products = {product.asin: product for product in products if product.sold}
        self.goals = goals
        in_order = sorted(products, key=lambda product: product.asin)  # of equal scores, the smaller id comes first
        self._index = Index((product.asin, product.document()) for product in in_order)

    def search(self, query: str) -> list[str]:
        """Ids of the products among the MAX_RESULTS best matches, best first."""
        return [asin for asin, _ in self._index.search(query, MAX_RESULTS) if asin in self.products]

    def score(self, product: Product, goal: Goal, chosen: dict[str, str]) -> float:
        """WebShop's reward in [0, 1] for buying a product with the chosen options (name -> value)."""
        return score(product, self.products[goal.asin], goal, chosen)


@cache
def load_catalogue(data: str, products: int, goals: int, human_goals: bool, seed: int) -> Catalogue:
    """The catalogue for these settings of ShopConfig, built once in a process."""
    if data:
        items, tasks = load_files(data, limit=products, human_goals=human_goals, seed=seed)
    else:
        items, tasks = parse(*generate(products or 500, goals, seed), human_goals=human_goals, seed=seed)
    if len(tasks) < 6:
        raise ValueError(f"{data or 'the catalogue'} has {len(tasks)} goals; three splits need at least 6")
    return Catalogue(items, tasks)


# ----------------------------------------------------------------------------------------------------------- the shop


def _text_nodes(texts: Iterable[str]) -> list[str]:
    """The texts as they are after WebShop has written them into HTML and parsed it again."""
    # An empty text leaves an empty element. White space that contains a line break counts as layout.
    return [text.strip() for text in texts if text and (text.strip(" \n\t\f\r") or "\n" not in text)]


class Shop(Customer):
    """The embedded shop: one customer and one task at a time."""

    def __init__(self, config: ShopConfig | None = None, catalogue: Catalogue | None = None):
        super().__init__(config or ShopConfig())
        c = self.config
        self.catalogue = catalogue or load_catalogue(c.data, c.products, c.goals, c.human_goals, c.seed)
        self.goals = self.catalogue.goals

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        self.goal = self.goals[self.goal_numbers(split)[seed]]
        self.task_type, self.steps, self.score = self.catalogue.products[self.goal.asin].category, 0, 0.0
        self._fitting: dict[str, dict[str, str] | None] = {}  # the oracle's memory: what `_fit` returned
        self._words = ""  # and its search
        self._leave()
        return self.observation(), self._info()

    def _leave(self) -> None:
        """Go to the search page and forget everything."""
        self.page, self.results, self.number, self.asin, self.sub_page = "search", [], 1, "", ""
        self.chosen: dict[str, str] = {}  # option name -> value

    @property
    def terminated(self) -> bool:
        """Whether something was bought."""
        return self.page == "done"

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
        attributes = [*(f" {text}" for text in item.attributes), item.category, item.query, item.path]
        texts = {"description": [item.description], "features": bullets, "reviews": [], HIDDEN_PAGE: attributes}
        return ["< Prev", *texts[self.sub_page]]

    def _receipt(self) -> list[str]:
        """The last page. WebShop's text mode leaves most of its fields empty."""
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
        """Values that can be clicked on this page, in WebShop's order. "search" only marks the search page."""
        if self.page in ("search", "done"):
            return ["search"] if self.page == "search" else []
        values = ["back to search"]
        if self.page == "results":
            values += ["< prev"] if self.number > 1 else []
            values += ["next >", *(asin.lower() for asin in self.shown())]
        else:
            values.append("< prev")
        if self.page == "item":
            options = self.catalogue.products[self.asin].options
            values += [*SUB_PAGES, "buy now", *(value for axis in options.values() for value in axis)]
        return list(dict.fromkeys(values))

    # ------------------------------------------------------------------------------------------------- acting

    def _act(self, action: str) -> None:
        verb, value = parse_action(action)
        if verb == "search":
            self._leave()
            self.page, self.results = "results", self.catalogue.search(value)
        else:
            self._click(value)

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
        elif value in (*SUB_PAGES, HIDDEN_PAGE):
            self.page, self.sub_page = "sub", value
        else:
            self.chosen[self._axis(value)] = value

    def _axis(self, value: str) -> str:
        """The option that a value belongs to; the last one if several have it."""
        options = self.catalogue.products[self.asin].options
        return next(name for name in reversed(options) if value in options[name])

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Actions that do something now, in a fixed order. Of all searches it offers two: the whole instruction, and
        the type of product."""
        return offered(self.clickables(), (self.goal.instruction, self.catalogue.products[self.goal.asin].query))

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows the catalogue. It buys the first result that can score 1, or the
        goal's own product if there is none (some real goals ask for what no product has)."""
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
            return f"{here} fits.", f"click[{here}]"
        place = next((place for place, asin in enumerate(self.results) if self._fit(asin) is not None), None)
        if place is None:
            return "Nothing fits.", "click[back to search]"
        return "Not on this page.", "click[next >]" if place >= self.number * PER_PAGE else "click[< prev]"

    def _query(self) -> str:
        """Words that find a fitting product: the goal's, else the title or all texts of the goal's own product."""
        if not self._words:
            item = self.catalogue.products[self.goal.asin]
            values = [option if isinstance(option, str) else option[1] for option in self.goal.options]
            texts = (" ".join([*self.goal.attributes, item.query, *values]), item.title, item.document())
            tries = [search_text(text) for text in texts]
            finds = (any(self._fit(asin) is not None for asin in self.catalogue.search(words)) for words in tries)
            self._words = next((words for words, found in zip(tries, finds, strict=True) if found), tries[0])
        return self._words

    def _fit(self, asin: str) -> dict[str, str] | None:
        """Options (name -> value) with which this product scores 1, else None. The goal's own product always gets its
        best options."""
        if asin not in self._fitting:
            item = self.catalogue.products[asin]
            chosen = choose_options(item.options, self.goal.options)
            perfect = self.catalogue.score(item, self.goal, chosen) == 1.0
            self._fitting[asin] = chosen if perfect or asin == self.goal.asin else None
        return self._fitting[asin]
