"""WebShop's product files: read as WebShop's own engine reads them, or written for a made-up catalogue.

Three JSON files describe a shop: its products, the attributes found in their texts (each product with an instruction
from a template), and the instructions that people wrote. `load_files` reads a folder of them: the published ones, or
the output of

    python -m worlds.shop_data --out DIR --products 500

which writes a made-up shop with short titles and few options. Prices and price limits are drawn from the same random
numbers as in the engine, so both have the same goals.
"""

import json
import random
import re
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

# (products, attributes), tried in this order. The engine's default is the first pair.
PRODUCT_FILES = (("items_shuffle_1000.json", "items_ins_v2_1000.json"), ("items_shuffle.json", "items_ins_v2.json"))
HUMAN_FILE = "items_human_ins.json"

GOAL_ORDER_SEED = 233  # the engine's: it decides which goals are for testing
PRICE_LIMITS = [10.0 * i for i in range(1, 100)]  # dollars
NO_LIMIT = 1_000_000
PATH_MARK = "\u203a"  # stands between categories


@dataclass(frozen=True, slots=True)
class Product:
    """One product: what the shop shows and what the reward compares."""

    asin: str  # its id
    title: str
    category: str
    query: str  # the search that found it when the data was collected; close to the type of product
    path: str  # categories from wide to narrow, with PATH_MARK between them
    price: float  # dollars
    price_tag: str
    description: str
    bullets: tuple[str, ...]  # the features
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]  # name -> values, all lower case
    sold: bool = True  # False: in the search index, but not in the shop; see `parse`

    def document(self) -> str:
        """The text that is searched."""
        options = ((name, ", ".join(values)) for name, values in self.options.items())
        return " ".join([self.title, self.description, *self.bullets[:1], _listed(options)]).lower()


@dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted: this type of product, with these attributes and options, for no more than the limit."""

    asin: str
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str | tuple[str, str], ...]  # a value (written by people), or name and value (from a template)
    price_limit: float  # dollars


def _listed(options: Iterable[tuple[str, str]]) -> str:
    """The options as WebShop writes them: "color: red, and size: small"."""
    return ", and ".join(f"{name}: {value}" for name, value in options)


# ------------------------------------------------------------------------------------------------------ reading files


def load_files(folder: str, *, limit: int = 0, human_goals: bool = True, seed: int = GOAL_ORDER_SEED):
    """(products, goals) of a folder. The arguments are those of `parse`.

    Raises ValueError if a file or an entry is missing or broken; the message names it.
    """
    pairs = [pair for pair in PRODUCT_FILES if (Path(folder) / pair[0]).is_file()]
    if not pairs:
        raise ValueError(
            f"{folder} has neither {PRODUCT_FILES[0][0]} nor {PRODUCT_FILES[1][0]}; "
            f"WebShop's setup.sh downloads them, `python -m worlds.shop_data --out {folder}` writes made-up ones"
        )
    names = (*pairs[0], HUMAN_FILE)
    records, attributes, human = (_read_json(Path(folder) / name) for name in names)
    for name, content, kind in zip(names, (records, attributes, human), (list, dict, dict), strict=True):
        if not isinstance(content, kind):
            raise ValueError(f"{folder}/{name} must hold a JSON {'array' if kind is list else 'object'}")
    return parse(records, attributes, human, limit=limit, human_goals=human_goals, seed=seed, source=folder)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def parse(
    records: list,
    attributes: dict,
    human: dict,
    *,
    limit: int = 0,
    human_goals: bool = True,
    seed: int = GOAL_ORDER_SEED,
    source: str = "catalogue",
) -> tuple[list[Product], list[Goal]]:
    """(products, goals) of the contents of the three files.

    limit: the engine sells the first `limit` records and indexes the first `limit` different ids. If ids are repeated,
    the index has more products than the shop: these have sold=False and no goals. 0: sell all records.
    human_goals: the instructions that people wrote, else those from a template, one for every choice of options.
    seed: of the prices of products with a price range, and of the price limits.
    What the engine leaves out is left out here, with a warning that counts it. Raises ValueError naming a broken entry.
    """
    rng, left_out = random.Random(seed), Counter()
    products = _products(records, attributes, limit, rng, left_out, source)
    instructions = human if human_goals else attributes
    make, goals = _human_goals if human_goals else _template_goals, []
    for asin, item in products.items():
        try:
            goals += make(item, instructions.get(asin), rng, left_out) if item.sold else []
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: the instructions of product {asin} are broken: {error!r}") from error
    unknown = sum(asin not in products or not products[asin].sold for asin in instructions)
    left_out["products of the instructions, not in the shop"] = unknown
    if any(left_out.values()):
        warnings.warn(
            f"{source}: left out {', '.join(f'{n} {what}' for what, n in left_out.items() if n)}", stacklevel=2
        )
    random.Random(GOAL_ORDER_SEED).shuffle(goals)
    return list(products.values()), goals


def _products(
    records: list, attributes: dict, limit: int, rng: random.Random, left_out: Counter, source: str
) -> dict[str, Product]:
    """id -> product, as `parse` says. Counts the records without a usable id in `left_out`."""
    products: dict[str, Product] = {}
    for number, record in enumerate(records):
        sold = not limit or number < limit
        if not sold and len(products) == limit:
            break
        try:
            asin = record["asin"]
            if asin == "nan" or len(asin) > 10 or asin in products:
                left_out["products with a bad or repeated id"] += sold
                continue
            products[asin] = _product(record, attributes.get(asin, {}), rng if sold else random.Random(0), sold)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            name = record.get("asin") if isinstance(record, dict) else None
            raise ValueError(f"{source}: product number {number} ({name}) is broken: {error!r}") from error
    return products


def _product(record: dict, found: dict, rng: random.Random, sold: bool) -> Product:
    bullets = record["small_description"]
    prices = [float(re.sub(r"[^\d.]", "", part)) for part in (record.get("pricing") or "$100").split("$")[1:]][:2]
    options = {}
    for name, values in (record["customization_options"] or {}).items():
        if values is not None:
            # The engine replaces slashes because a value is part of the page's address.
            options[_text(name).lower()] = tuple(
                _text(value["value"]).strip().replace("/", " | ").lower() for value in values
            )
    return Product(
        asin=_text(record["asin"]),
        title=_text(record["name"]),
        category=_text(record["category"]),
        query=_text(record["query"]).lower().strip(),
        path=_text(record["product_category"]),
        price=rng.uniform(*prices) if len(prices) > 1 else prices[0],
        price_tag=" to ".join(f"${price}" for price in prices),
        description=_text(record["full_description"]),
        bullets=_texts(bullets if isinstance(bullets, list) else [bullets]),
        attributes=_texts(found.get("attributes", ["DUMMY_ATTR"])),
        options=options,
        sold=sold,
    )


def _text(value: object) -> str:
    """A text that every tokenizer takes: JSON allows a lone surrogate, which becomes "?". Raises TypeError if it is no
    text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value.encode(errors="replace").decode()


def _texts(values: object) -> tuple[str, ...]:
    """A list of texts. Raises TypeError for anything else: a single text would count as a list of its letters."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of texts")
    return tuple(map(_text, values))


def _price_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """A round limit not far above the price, and the words for it. The dearest products have no limit."""
    limits = [limit for limit in PRICE_LIMITS if limit > price][:4]
    if len(limits) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(limits, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def _human_goals(item: Product, entries: list | None, rng: random.Random, left_out: Counter) -> list[Goal]:
    goals = []
    for entry in [] if entries is None else entries:
        wanted, options = _texts(entry["instruction_attributes"]), _texts(entry["instruction_options"])
        if not wanted:
            left_out["instructions without an attribute"] += 1
            continue
        limit, words = _price_limit(item.price, rng)
        goals.append(Goal(item.asin, _text(entry["instruction"]).strip(".") + words, wanted, options, limit))
    return goals


def _template_goals(item: Product, entry: dict | None, rng: random.Random, left_out: Counter) -> list[Goal]:
    if not entry or entry.get("instruction") is None:
        left_out["products without an instruction"] += 1
        return []
    wanted = _texts(entry["instruction_attributes"])
    if not wanted:
        raise ValueError("no attribute is wanted")
    limit, words = _price_limit(item.price, rng)
    names, goals = sorted(item.options), []
    for values in product(*(item.options[name] for name in names)):
        options = tuple(zip(names, values, strict=True))
        text = _text(entry["instruction"]) + (f" with {_listed(options)}" if options else "") + words
        goals.append(Goal(item.asin, text, wanted, options, limit))
    return goals


# -------------------------------------------------------------------------------------------------- made-up products

COLOR = ("color", ("black", "white", "red", "blue", "green", "pink", "gray", "purple"))
SIZE = ("size", ("small", "medium", "large"))
SCENT = ("scent", ("vanilla", "citrus", "lavender", "coconut", "mint", "rose"))
BRANDS = ("alder", "brisk", "corvo", "dunlin", "elmore", "fennick", "garrow", "halden")
# kind -> category, category path, attributes, options. No two attributes are `alike`: none is taken for another.
FASHION, HOME, SOUND, BEAUTY = (
    ("fashion", f"Clothing {PATH_MARK} Outdoor"), ("home", f"Home & Kitchen {PATH_MARK} Comfort"),
    ("electronics", f"Electronics {PATH_MARK} Audio"), ("beauty", f"Beauty {PATH_MARK} Bath"),
)  # fmt: skip
KINDS = {
    "jacket": (*FASHION, "hooded waterproof quilted padded reversible thermal", (COLOR, SIZE)),
    "scarf": (*FASHION, "knitted silky fringed checkered woolen pleated", (COLOR,)),
    "sandals": (*FASHION, "strappy cushioned braided buckled leather flat", (COLOR, SIZE)),
    "backpack": (*FASHION, "foldable rugged zippered roomy slim lockable", (COLOR,)),
    "mug": (*HOME, "insulated stackable handmade enameled unbreakable oversized", (COLOR, SIZE)),
    "blanket": (*HOME, "fluffy weighted woven washable heated crochet", (COLOR, SIZE)),
    "pillow": (*HOME, "firm cooling orthopedic bamboo plush travel", (COLOR,)),
    "lamp": (*HOME, "dimmable solar adjustable magnetic rotating vintage", (COLOR,)),
    "headphones": (*SOUND, "wireless soundproof lightweight rechargeable studio bendable", (COLOR,)),
    "speaker": (*SOUND, "portable loud stereo waterside compact retro", (COLOR, SIZE)),
    "soap": (*BEAUTY, "organic creamy exfoliating antibacterial vegan moisturizing", (SCENT,)),
    "shampoo": (*BEAUTY, "nourishing volumizing clarifying gentle strengthening softening", (SCENT, SIZE)),
}


def generate(products: int, goals: int, seed: int) -> tuple[list, dict, dict]:
    """Contents of the three files for a made-up shop: `products` products, up to `goals` instructions for each.

    No two instructions ask for the same thing, even with the words in another order, so training and testing share no
    task. The same holds for the instructions from a template. Equal arguments give equal contents on every machine.
    """
    rng, records, found, human = random.Random(f"shop/{seed}"), [], {}, {}
    asked, asked_by_template = set(), set()  # (kind, attributes, option values)
    kinds = (list(KINDS) * (products // len(KINDS) + 1))[:products]
    rng.shuffle(kinds)
    for number, kind in enumerate(kinds):
        category, path, pool, axes = KINDS[kind]
        asin = f"B{number:03d}"
        attributes = rng.sample(pool.split(), 3)
        options = {name: sorted(rng.sample(values, rng.randint(2, 3)), key=values.index) for name, values in axes}
        records.append(_record(asin, kind, category, path, attributes, options, rng))
        found[asin] = {"attributes": attributes, "instruction": None, "instruction_attributes": []}
        for wanted in combinations(attributes, 2):  # a template asks for every choice of options
            wishes = {(kind, frozenset(wanted), values) for values in product(*options.values())}
            if not wishes & asked_by_template:
                asked_by_template |= wishes
                found[asin] |= {
                    "instruction": f"Find me {', '.join(wanted)} {kind}",
                    "instruction_attributes": [*wanted],
                }
                break
        wishes = list(product(combinations(attributes, 2), product(*options.values())))
        rng.shuffle(wishes)
        human[asin] = []
        for wanted, values in wishes:
            wish = (kind, frozenset(wanted), values)
            if wish in asked or len(human[asin]) == goals:
                continue
            asked.add(wish)
            text = f"i need {', '.join(wanted)} {kind} with {_listed(zip(options, values, strict=True))}"
            entry = {"instruction": text, "instruction_attributes": list(wanted), "instruction_options": list(values)}
            human[asin].append(entry)
    return records, found, human


def _record(
    asin: str, kind: str, category: str, path: str, attributes: list, options: dict, rng: random.Random
) -> dict:
    """One product with the fields of the published files that the engine uses."""
    low = rng.randrange(10, 100)
    values = {name: [{"value": value, "image": None} for value in choice] for name, choice in options.items()}
    return {
        "asin": asin,
        "name": " ".join([rng.choice(BRANDS), *attributes, kind]),
        "category": category,
        "query": kind,
        "product_category": f"{path} {PATH_MARK} {kind.title()}",
        "pricing": f"${low}.00" if rng.random() < 0.9 else f"${low}.00 - ${low + 5}.00",
        "small_description": [f"{kind} for every day", *attributes],
        "full_description": f"A {attributes[0]} {kind}.",
        "images": [f"{asin}.jpg"],
        "customization_options": values,
    }


def write_files(folder: str, contents: tuple[list, dict, dict]) -> None:
    """Write the contents that `generate` returns. `load_files` and the real engine can read them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in zip((*PRODUCT_FILES[0], HUMAN_FILE), contents, strict=True):
        (Path(folder) / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = ArgumentParser(description="Write the three WebShop files of a made-up shop.")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--products", type=int, default=500, help="number of products")
    parser.add_argument("--goals", type=int, default=10, help="instructions for each product, at most")
    parser.add_argument("--seed", type=int, default=GOAL_ORDER_SEED, help="another seed, another shop")
    args = parser.parse_args()
    if args.products < 1 or args.goals < 1:
        parser.error(f"products and goals must be at least 1, got {args.products} and {args.goals}")
    contents = generate(args.products, args.goals, args.seed)
    try:
        write_files(args.out, contents)
    except OSError as error:
        parser.error(str(error))
    print(f"{args.out}: {len(contents[0])} products, {sum(map(len, contents[2].values()))} instructions")


if __name__ == "__main__":
    main()
