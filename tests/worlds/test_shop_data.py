"""WebShop's product files and its search: against loops, against what the originals did, and broken."""

import doctest
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from envs import make_envs
from worlds import shop, shop_data, shop_search
from worlds.shop import Shop, ShopConfig
from worlds.shop_data import KINDS, generate, load_files, parse, write_files
from worlds.shop_search import Index, search_words

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("module", [shop, shop_data, shop_search])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# --------------------------------------------------------------------------------------------------------------- search


def slow_search(texts, query, limit):
    """BM25 with loops and Python floats; ties by id."""
    words = {name: search_words(text) for name, text in texts.items()}
    mean = sum(map(len, words.values())) / len(words)
    scores = {}
    for name, own in words.items():
        score = 0.0
        for word in search_words(query):
            containing = sum(word in other for other in words.values())
            frequency = own.count(word)
            length = shop_search.remembered_length(len(own))
            rarity = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
            score += rarity * frequency / (frequency + 0.9 * (0.6 + 0.4 * length / mean))
        if score:
            scores[name] = score
    return sorted(scores.items(), key=lambda pair: (-round(pair[1], 5), pair[0]))[:limit]


def test_search_against_loops():
    rng = random.Random(1)
    vocabulary = ["red", "blue", "lamp", "lamps", "shade", "wooden", "wood", "floor", "cat", "cats", "the", "of"]
    texts = {f"B{i:02d}": " ".join(rng.choices(vocabulary, k=rng.choice([3, 8, 60]))) for i in range(80)}
    index = Index(texts.items())
    for _ in range(100):
        query = " ".join(rng.choices(vocabulary, k=rng.randint(1, 5)))
        found, expected = index.search(query, 10), slow_search(texts, query, 10)
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_search_results_are_lucenes():
    """Orders that Anserini's SimpleSearcher (Lucene 9.5) gave for these texts."""
    texts = {
        "B1": "running shoe for men (u.s.a.)",
        "B2": "shoes to run in",
        "B3": "women's running shoes, size 9.5",
        "B4": "runner's shoe rack",
    }
    index = Index(texts.items())
    assert [name for name, _ in index.search("runs shoe", 50)] == ["B2", "B1", "B3", "B4"]
    assert index.search("the", 50) == index.search("", 50) == index.search("zebra", 50) == []
    assert [name for name, _ in index.search("SHOES", 2)] == ["B2", "B4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acme\u00ae mug\u2122 with lid\u00a9", ["acm", "\u00ae", "mug", "\u2122", "lid", "\u00a9"]),
        ("ruler 5\u00bd inch m\u00b2", ["ruler", "5", "inch", "m"]),
        ("\u2605\u2605 best \u2714 gift \U0001f600", ["\u2605", "\u2605", "best", "\u2714", "gift", "\U0001f600"]),
        ("caf\u00e9 cafe\u0301 na\u00efve", ["caf\u00e9", "cafe\u0301", "na\u00efv"]),
        ("it\uff07s \u2018quoted\u2019 l\u00b7l", ["quot", "l\u00b7l"]),
        ("soft\u00adhyphen _snake_case", ["soft\u00adhyphen", "_snake_cas"]),
        ("\u6f22\u5b57 \u30ab\u30bf\u30ab\u30ca", ["\u6f22", "\u5b57", "\u30ab\u30bf\u30ab\u30ca"]),
        ("x" * 300, ["x" * 255, "x" * 45]),
    ],
)
def test_words_are_lucenes(text, words):
    """What Anserini's DefaultEnglishAnalyzer (Lucene 9.5, Porter stems) made of these texts."""
    assert search_words(text) == words


def test_words_of_the_search():
    assert search_words("Men\u2019s 3.5mm jack, 12,000 mAh; x-large 1/2 o'neil's") == (
        ["men", "3.5mm", "jack", "12,000", "mah", "x", "larg", "1", "2", "o'neil"]
    )
    assert search_words("it is not the s") == ["s"]
    assert search_words("fairly generously") == ["fairli", "gener"]  # Porter's first stemmer, not his second


# ---------------------------------------------------------------------------------------------------------------- files


def test_generated_words_do_not_stand_for_each_other():
    for _, _, pool, axes in KINDS.values():
        for values in (pool.split(), *(values for _, values in axes)):
            assert sum(shop.alike(shop.option_core(a), shop.option_core(b)) for a in values for b in values) == len(
                values
            )
    pools = [word for _, _, pool, _ in KINDS.values() for word in pool.split()]
    assert len(pools) == len(set(pools))


def test_generator_is_deterministic_and_its_files_load_back_equal(tmp_path):
    contents = generate(40, 5, 7)
    assert contents == generate(40, 5, 7) != generate(40, 5, 8)
    write_files(tmp_path, contents)
    for human in (True, False):
        assert load_files(tmp_path, human_goals=human, seed=3) == parse(*contents, human_goals=human, seed=3)
    (env,) = make_envs("webshop", [f"data={tmp_path}"], 1)
    assert list(env.catalogue.products.values()) == load_files(tmp_path)[0]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "worlds.shop_data", "--out", tmp_path, "--products", "24", "--goals", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "24 products" in done.stdout
    assert len(load_files(tmp_path)[0]) == 24


def test_goals_are_the_engines():
    """The prices and limits that WebShop's own loader draws, written out with its calls of the random generator."""
    products, goals = parse(*generate(40, 5, 7), seed=11)
    rng, expected = random.Random(11), []
    records, _, human = generate(40, 5, 7)
    prices = {}
    for record in records:
        low, *high = [float(part) for part in re.findall(r"\d+\.\d+", record["pricing"])]
        prices[record["asin"]] = rng.uniform(low, *high) if high else low
    assert {p.asin: p.price for p in products} == prices
    for record in records:
        for entry in human[record["asin"]]:
            limits = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[record["asin"]]][:4]
            upper = sorted(rng.sample(limits, 2))[1]
            expected.append(f"{entry['instruction']}, and price lower than {upper:.2f} dollars")
    random.Random(233).shuffle(expected)
    assert [goal.instruction for goal in goals] == expected


def test_products_are_read_as_the_engine_reads_them():
    records, found, human = generate(12, 3, 0)
    records[0].update(pricing="", small_description="one", query=" Rug ", customization_options=None)
    records[1].update(pricing="$1,299.50 - $1,400.00 - $2,000.00")
    records[2]["customization_options"] = {"Color": [{"value": " Red/Blue "}], "Size": None, "Style": [{"value": "A"}]}
    del found[records[2]["asin"]]
    human[records[1]["asin"]][0]["instruction"] = "i want it..."
    products, goals = parse(records, found, human)
    assert (products[0].price, products[0].price_tag, products[0].bullets) == (100.0, "$100.0", ("one",))
    assert (products[0].query, products[0].options) == ("rug", {})
    assert products[1].price_tag == "$1299.5 to $1400.0"
    assert 1299.5 <= products[1].price <= 1400
    assert products[2].options == {"color": ("red | blue",), "style": ("a",)}
    assert products[2].attributes == ("DUMMY_ATTR",)
    dear = [goal for goal in goals if goal.asin == products[1].asin]
    assert {goal.price_limit for goal in dear} == {1_000_000}  # no limit, and no words for it
    assert "i want it" in [goal.instruction for goal in dear]


def test_left_out_entries_are_counted():
    records, found, human = generate(12, 3, 0)
    asins = [record["asin"] for record in records]
    records += [records[0], {**records[1], "asin": "nan"}, {**records[2], "asin": "B" * 11}]
    human[asins[0]][0]["instruction_attributes"] = []
    human["B777"] = []
    with pytest.warns(UserWarning, match="here: left out") as caught:
        products, goals = parse(records, found, human, source="here")
    assert len(products) == 12
    assert len(goals) == sum(map(len, human.values())) - 1
    assert str(caught[0].message) == (
        "here: left out 3 products with a bad or repeated id, 1 instructions without an attribute, "
        "1 products of the instructions, not in the shop"
    )


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("items_shuffle_1000.json", None, "has neither items_shuffle_1000.json nor items_shuffle.json"),
        ("items_human_ins.json", None, "cannot read .*items_human_ins.json"),
        ("items_shuffle_1000.json", "[{", "cannot read .*items_shuffle_1000.json"),
        ("items_shuffle_1000.json", "\udcff", "cannot read .*items_shuffle_1000.json"),
        ("items_shuffle_1000.json", "{}", "items_shuffle_1000.json must hold a JSON array"),
        ("items_ins_v2_1000.json", "[]", "items_ins_v2_1000.json must hold a JSON object"),
        ("items_shuffle_1000.json", "[]", "has 0 goals; three splits need at least 6"),
        ("items_shuffle_1000.json", "[7]", "product number 0 .None. is broken"),
        ("items_shuffle_1000.json", '[{"asin": "B7"}]', "product number 0 .B7. is broken: KeyError"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_files(tmp_path, name, text, problem):
    write_files(tmp_path, generate(12, 3, 0))
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=problem):
        make_envs("webshop", [f"data={tmp_path}"], 1)


@pytest.mark.parametrize("change", [{"pricing": "free"}, {"name": None}, {"customization_options": {"a": [{}]}}])
def test_broken_products_are_named(change):
    records, found, human = generate(12, 3, 0)
    records[4].update(change)
    with pytest.raises(ValueError, match=rf"shelf: product number 4 .{records[4]['asin']}. is broken"):
        parse(records, found, human, source="shelf")


@pytest.mark.parametrize(
    "change",
    [
        {"instruction_attributes": "soft"},  # it would be read as four attributes
        {"instruction_attributes": [None]},
        {"instruction_options": "red"},
        {"instruction_options": [["color", "red"]]},
        {"instruction_options": {"color": "red"}},
    ],
)
def test_instructions_of_another_shape_are_named(change):
    records, found, human = generate(12, 3, 0)
    human[records[4]["asin"]][0].update(change)
    with pytest.raises(ValueError, match=rf"the instructions of product {records[4]['asin']} are broken: TypeError"):
        parse(records, found, human)
    found[records[5]["asin"]]["attributes"] = "soft"
    with pytest.raises(ValueError, match=r"product number 5 .* is broken: TypeError"):
        parse(records, found, human)


@pytest.mark.parametrize("arguments", [["--products", "0"], ["--goals", "-1"], ["--out", __file__]])
def test_bad_command_lines_end_with_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shop_data.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        shop_data.main()
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_broken_instructions_are_named():
    records, found, human = generate(12, 3, 0)
    human[records[4]["asin"]][0] = {"instruction": "buy"}
    with pytest.raises(ValueError, match=rf"the instructions of product {records[4]['asin']} are broken: KeyError"):
        parse(records, found, human)


def test_the_folder_is_named():
    with pytest.raises(ValueError, match="nowhere has neither"):
        Shop(ShopConfig(data="nowhere"))
