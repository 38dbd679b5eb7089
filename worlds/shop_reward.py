"""WebShop's reward for a purchase, in [0, 1] (Yao et al. 2022, arXiv:2207.01206).

    reward = type_factor * (attributes matched + options matched + [price <= limit]) / (attributes + options + 1)

A wanted attribute matches if the product has a close one, or if it is in the product's texts. A wanted option matches
if a chosen value is close to it. `alike` decides what is close.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from worlds.shop_data import PATH_MARK, Goal, Product

NO_NOUNS = frozenset(["a", "an", "the", "and", "or", "of", "for", "with", "in", "on", "to", "by", "from", "that", "is",
                      "are", "be", "this", "it", "your", "my", "i"])  # fmt: skip


def title_words(title: str) -> list[str]:
    """The words of a title that count as its nouns: all but stop words, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Za-z]\w*", title) if word.lower() not in NO_NOUNS]


# WebShop compares an option by its colour: "black forest" is black. The first of these that it contains counts.
COLORS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal
dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy
khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine
yellow""".split()  # noqa: SIM905


@lru_cache(maxsize=100_000)
def _plain(text: str) -> str:
    """Words as thefuzz 0.19, WebShop's version, compares them: lower case letters, digits and underscores. Characters
    of Latin-1 beyond ASCII are dropped."""
    return re.sub(r"\W", " ", re.sub("[\x80-\xff]", "", text)).lower()


def alike(a: object, b: object) -> bool:
    """Whether nearly all words of one text are in the other: a rounded token set ratio above 85 of 100."""
    from rapidfuzz.fuzz import token_set_ratio  # only the shop needs this package

    return round(token_set_ratio(_plain(str(a)), _plain(str(b)))) > 85


@lru_cache(maxsize=100_000)
def option_core(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The colour in a value, else the value. A (name, value) pair becomes a colour only if its value is exactly one."""
    return next((color for color in COLORS if color in option), option)


def choose_options(options: dict[str, Iterable[str]], wanted: Iterable[str | tuple[str, str]]) -> dict[str, str]:
    """name -> value: for each wanted option the closest of the product's values, if one is `alike`."""
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


def score(bought: Product, target: Product, goal: Goal, chosen: dict[str, str]) -> float:
    """The reward for buying a product with the chosen options (name -> value). target: the product of the goal."""
    texts = [bought.title.lower(), " ".join(bought.bullets).lower(), bought.description.lower()]
    matched = sum(
        any(alike(own, wanted) for own in bought.attributes) or any(wanted in text for text in texts)
        for wanted in goal.attributes
    )
    values = [option_core(value) for value in chosen.values()]
    matched += sum(any(alike(value, option_core(wanted)) for value in values) for wanted in goal.options)
    matched += bought.price <= goal.price_limit
    return matched / (len(goal.attributes) + len(goal.options) + 1) * type_factor(bought, target)


def type_factor(bought: Product, target: Product) -> float:
    """1.0 for the same type of product; 0.5, 0.1 or 0.0 for another type."""
    wanted, found = title_words(target.title), set(title_words(bought.title))
    overlap = len(set(wanted) & found) / len(wanted) if wanted else 0.2
    if overlap < 0.1:
        return 0.1 if overlap else 0.0
    paths = [{part.strip() for part in item.path.split(PATH_MARK)} for item in (bought, target)]
    same = bought.query == target.query or len(paths[0] & paths[1]) >= 2 or overlap > 0.2
    return 1.0 if same else 0.5
