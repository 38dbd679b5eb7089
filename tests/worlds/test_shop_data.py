"""WebShop's product files and Lucene's search: against loops, against what the originals did, and broken."""

import json
import math
import random
import re
import subprocess
import sys

import pytest

from envs import make_envs
from worlds import shop_data, shop_reward, shop_search
from worlds.shop import Catalogue, Shop
from worlds.shop_data import KINDS, generate, load_files, parse, write_files
from worlds.shop_search import Index, search_words
from worlds.webshop import ShopConfig

# --------------------------------------------------------------------------------------------------------------- search


def slow_search(texts, query, limit, words, k1, b):
    """BM25 with loops and Python floats; ties in the order of the texts."""
    texts = {name: words(text) for name, text in texts.items()}
    filled = [own for own in texts.values() if own]
    mean = sum(map(len, filled)) / len(filled)
    scores = {}
    for name, own in texts.items():
        for word in words(query):
            containing = sum(word in other for other in filled)
            length = shop_search.remembered_length(len(own))
            rarity = math.log(1 + (len(filled) - containing + 0.5) / (containing + 0.5))
            saturation = own.count(word) / (own.count(word) + k1 * (1 - b + b * length / mean))
            scores[name] = scores.get(name, 0.0) + rarity * saturation
    found = [(name, score) for name, score in scores.items() if score]
    return sorted(found, key=lambda pair: -round(pair[1], 5))[:limit]


@pytest.mark.parametrize("settings", [{}, {"words": str.split, "k1": 1.5, "b": 0.75}])
def test_search_against_loops(settings):
    rng = random.Random(1)
    vocabulary = ["red", "blue", "lamp", "lamps", "shade", "wooden", "wood", "floor", "cat", "cats", "the", "of"]
    texts = {f"B{i:02d}": " ".join(rng.choices(vocabulary, k=rng.choice([0, 1, 3, 8, 60]))) for i in range(80)}
    index = Index(texts.items(), **settings)
    for _ in range(100):
        query = " ".join(rng.choices(vocabulary, k=rng.randint(1, 5)))
        found = index.search(query, 10)
        expected = slow_search(texts, query, 10, **{"words": search_words, "k1": 0.9, "b": 0.4} | settings)
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_search_results_are_lucenes():
    """Orders that Anserini's SimpleSearcher (Lucene 9.5) gave for these texts."""
    texts = {"B1": "running shoe for men (u.s.a.)", "B2": "shoes to run in", "B3": "women's running shoes, size 9.5"}
    index = Index([*texts.items(), ("B4", "runner's shoe rack"), ("B5", "of the")])
    assert [name for name, _ in index.search("runs shoe", 50)] == ["B2", "B1", "B3", "B4"]
    assert [name for name, _ in index.search("SHOES", 2)] == ["B2", "B4"]
    for empty in ("", "the", "zebra"):
        assert index.search(empty, 50) == Index([]).search(empty, 50) == Index([("B5", "the")]).search(empty, 50) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acme\u00ae mug\u2122 with lid\u00a9", ["acm", "\u00ae", "mug", "\u2122", "lid", "\u00a9"]),
        ("ruler 5\u00bd inch m\u00b2", ["ruler", "5", "inch", "m"]),
        ("\u2605\u2605 best \u2714 gift \U0001f600", ["\u2605", "\u2605", "best", "\u2714", "gift", "\U0001f600"]),
        ("\U0001f5a8 \U0001f53e \U0001f468\u200d\U0001f469", ["\U0001f5a8", "\U0001f468\u200d\U0001f469"]),
        ("caf\u00e9 cafe\u0301 na\u00efve", ["caf\u00e9", "cafe\u0301", "na\u00efv"]),
        ("it\uff07s \u2018quoted\u2019 l\u00b7l", ["quot", "l\u00b7l"]),
        ("'organic' oil 'it's 10'inch \u00b8x", ["organ", "oil", "10", "inch", "x"]),
        ("soft\u00adhyphen _snake_case", ["soft\u00adhyphen", "_snake_cas"]),
        ("\u6f22\u5b57 \u30ab\u30bf\u30ab\u30ca", ["\u6f22", "\u5b57", "\u30ab\u30bf\u30ab\u30ca"]),
        ("x" * 300, ["x" * 255, "x" * 45]),
        *((f"{mark}soap bar", ["soap", "bar"]) for mark in "\ufeff\u200e\u00ad"),
        ("us xs 6s technology geology visibly", ["us", "xs", "6s", "technolog", "geologi", "visibl"]),
        ("fairly generously", ["fairli", "gener"]),  # Porter's first stemmer, not his second
        ("Men\u2019s 3.5mm, 12,000 mAh; x-large 1/2", ["men", "3.5mm", "12,000", "mah", "x", "larg", "1", "2"]),
        ("it is not the s", ["s"]),
    ],
)
def test_words_are_lucenes(text, words):
    """What Anserini's DefaultEnglishAnalyzer (Lucene 9.5, Porter stems) made of these texts."""
    assert search_words(text) == words


# ---------------------------------------------------------------------------------------------------------------- files


def test_generated_words_do_not_stand_for_each_other():
    for _, _, pool, axes in KINDS.values():
        for values in (pool.split(), *(values for _, values in axes)):
            cores = [shop_reward.option_core(value) for value in values]
            assert sum(shop_reward.alike(a, b) for a in cores for b in cores) == len(values)
    pools = [word for _, _, pool, _ in KINDS.values() for word in pool.split()]
    assert len(pools) == len(set(pools))


def test_generator_is_deterministic_and_its_files_load_back_equal(tmp_path):
    contents = generate(40, 5, 7)
    assert contents == generate(40, 5, 7) != generate(40, 5, 8)
    write_files(tmp_path, contents)
    for human in (True, False):
        assert load_files(tmp_path, human_goals=human, seed=3) == parse(*contents, human_goals=human, seed=3)
    (env,) = make_envs("webshop", [f"data={tmp_path}"], 1)
    assert list(env.world.catalogue.products.values()) == load_files(tmp_path)[0]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "worlds.shop_data", "--out", tmp_path, "--products", "24", "--goals", "4"]
    assert "24 products" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(load_files(tmp_path)[0]) == 24


@pytest.mark.parametrize("arguments", [["--products", "0"], ["--goals", "-1"], ["--out", __file__]])
def test_bad_command_lines_end_with_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shop_data.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        shop_data.main()
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_goals_are_the_engines():
    """The prices and limits that WebShop's own loader draws, written out with its calls of the random generator."""
    records, found, human = generate(40, 5, 7)
    products, goals = parse(records, found, human, seed=11)
    rng, prices, expected = random.Random(11), {}, []
    for record in records:
        low, *high = [float(part) for part in re.findall(r"\d+\.\d+", record["pricing"])]
        prices[record["asin"]] = rng.uniform(low, *high) if high else low
    for record in records:
        for entry in human[record["asin"]]:
            limits = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[record["asin"]]][:4]
            upper = sorted(rng.sample(limits, 2))[1]
            expected.append(f"{entry['instruction']}, and price lower than {upper:.2f} dollars")
    random.Random(233).shuffle(expected)
    assert {product.asin: product.price for product in products} == prices
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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_repeated_ids_leave_the_index_larger_than_the_shop():
    """WebShop sells the first 6 records, which are 4 products, and indexes the first 6 products."""
    records, found, human = generate(12, 3, 0)
    ids = [record["asin"] for record in records]
    records[4]["pricing"] = "$5.00 - $9.00"  # not sold, so no price is drawn that would shift the limits
    products, goals = parse([*records[:3], records[0], records[0], *records[3:]], found, human, limit=6, seed=1)
    assert [(product.asin, product.sold) for product in products] == [(asin, asin in ids[:4]) for asin in ids[:6]]
    assert goals == parse(records[:4], found, human, seed=1)[1]
    catalogue = Catalogue(products, goals)
    assert sorted(catalogue.search("every day")) == sorted(catalogue.products) == sorted(ids[:4])
    assert len(catalogue._index.search("every day", 50)) == 6


def test_left_out_entries_are_counted():
    records, found, human = generate(12, 3, 0)
    records += [records[0], {**records[1], "asin": "nan"}, {**records[2], "asin": "B" * 11}]
    human[records[0]["asin"]][0]["instruction_attributes"] = []
    human["B777"] = []
    with pytest.warns(UserWarning, match="here: left out") as caught:
        products, goals = parse(records, found, human, source="here")
    assert (len(products), len(goals)) == (12, sum(map(len, human.values())) - 1)
    assert str(caught[0].message) == (
        "here: left out 3 products with a bad or repeated id, 1 instructions without an attribute, "
        "1 products of the instructions, not in the shop"
    )


def test_lone_surrogates_are_replaced(tmp_path):
    """JSON allows "\\ud800", tokenizers do not."""
    contents = json.loads(json.dumps(generate(12, 3, 0)).replace(" mug", " m\ud800g").replace('"red"', '"r\\udfffd"'))
    write_files(tmp_path, contents)
    products, goals = load_files(tmp_path)
    for text in (repr(products), repr(goals)):
        assert "m?g" in text
        assert "r?d" in text
        assert "\\ud" not in text


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
        Shop(ShopConfig(data=str(tmp_path)))


PRODUCT, WISHES = "shelf: product number 4 .B004. is broken", "shelf: the instructions of product B004 are broken"


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        *((0, wrong, PRODUCT)
          for wrong in ({"pricing": "free"}, {"name": None}, {"customization_options": {"a": [{}]}})),
        (1, {"attributes": "soft"}, f"{PRODUCT}: TypeError"),  # it would be read as four attributes
        *((2, {"instruction_attributes": wrong}, f"{WISHES}: TypeError") for wrong in ("soft", [None])),
        *((2, {"instruction_options": wrong}, f"{WISHES}: TypeError")
          for wrong in ("red", [["color", "red"]], {"color": "red"})),
        (2, None, f"{WISHES}: KeyError"),
    ],
)  # fmt: skip
def test_broken_entries_are_named(file, change, problem):
    contents = generate(12, 3, 0)
    entry = [contents[0][4], contents[1]["B004"], contents[2]["B004"][0]][file]
    entry.clear() if change is None else entry.update(change)
    with pytest.raises(ValueError, match=problem):
        parse(*contents, source="shelf")
