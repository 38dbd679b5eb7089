"""The credit page: what it reads, what it refuses, what it writes. The browser's view is in test_page_browser.py."""

import json
import math
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from empg import center, clarity_bonus, gradient_scale, group_advantages, normalize_entropy, step_entropy
from episode import Episode, collate
from paper import page

SETTINGS = {"env": "house", "algorithm": "grpo", "empg": True, "k": 1.0, "k_future": 1.0, "zeta": 0.1, "group_size": 3}
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]  # two groups of three; all rewards of the second are equal
HOSTILE = [
    "<script>window.hacked = 1; document.title = 'hacked'</script>",
    "</script></textarea></style><img src=x onerror='window.hacked = 1'><svg onload=window.hacked=1>",
    "{{7*7}}{% raw %}${7*7}&lt;b&gt;&amp;<!--",
    "line\u2028separator\u2029 \"double\" 'single' `back` \\ \\u003c \x00 \ud800",
    "\u202eright to left\u202c \u200f\u05d0 javascript:window.hacked=1",
]


# ------------------------------------------------------------------------------------------------- runs to be shown


def kept(episodes: list[Episode], decode) -> list[dict]:
    """The records of a batch as a run keeps them; the rewards are REWARDS."""
    records = [asdict(episode) for episode in episodes]
    for record, reward in zip(records, REWARDS, strict=True):
        record |= {"reward": reward, "info": record["info"] | {"success": bool(reward)}}
    batch = collate(episodes)
    base = group_advantages(batch.reward.new_tensor(REWARDS), SETTINGS["group_size"])
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)
    norm_entropy = normalize_entropy(entropy, valid)
    g, f = gradient_scale(norm_entropy, valid), clarity_bonus(norm_entropy, valid)
    advantage = center(base[:, None] * g + SETTINGS["zeta"] * f, valid)
    values = {"entropy": entropy, "norm_entropy": norm_entropy, "g": g, "f": f, "advantage": advantage}
    for row, record in enumerate(records):
        record["steps"][0]["valid"] = row % 2 == 0  # the tiny policy may know no valid action
        lists = {name: value[row, : len(record["steps"])].tolist() for name, value in values.items()}
        sampled = [token for token, step in zip(record["ids"], record["step_ids"], strict=True) if step >= 0]
        record |= {"modulation": {"base": float(base[row])} | lists, "tokens": [decode([token]) for token in sampled]}
    return records


def poison(records: list[dict]) -> list[dict]:
    """The same records with hostile texts in every place where a world or a model can write.

    The episodes are four times as long, because sixteen steps are wider than a phone. The last one has no step.
    """
    records = json.loads(json.dumps(records))
    for number, record in enumerate(records):
        hostile = [HOSTILE[(number + shift) % len(HOSTILE)] for shift in range(len(HOSTILE))]
        record["prompt"], record["info"]["error"] = hostile[0], hostile[1]
        record["task"]["split"] = hostile[2]
        times = 4 if number < 5 else 0
        for name in ("entropy", "norm_entropy", "g", "f", "advantage"):
            record["modulation"][name] *= times
        tokens = len(record["tokens"]) * times
        record |= {"steps": record["steps"] * times, "tokens": [hostile[place % 5] for place in range(tokens)]}
        for step in record["steps"]:
            step |= {"thought": hostile[2], "action": hostile[3], "observation": hostile[4]}
    return records


def measure(records: list[dict]) -> list[dict]:
    """The same records with a true credit."""
    records = json.loads(json.dumps(records))
    for record in records:
        value = [(7 * place) % 5 / 4 for place, _ in enumerate([*record["steps"], None])]
        credit = [after - before for before, after in pairwise(value)]
        record["credit"] = {"value": value, "true_advantage": credit, "continuations": 16}
    return records


def write_run(folder: Path, files: dict[str, list[dict]], **settings) -> Path:
    """A run folder with these files: the name, and the records in it."""
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"argv": [], "config": SETTINGS | settings}))
    return folder


def files_of_a_run(episodes: list[Episode], decode) -> dict[str, list[dict]]:
    """Two iterations; the second one has hostile texts, and also episodes whose true credit was measured."""
    records = kept(episodes, decode)
    return {
        "episodes/000002.jsonl": records,
        "episodes/000010.jsonl": poison(records),
        "credit/000010.jsonl": measure(records[3:] + records[:3]),
    }


@pytest.fixture(scope="module")
def files(house_episodes, house_policy) -> dict[str, list[dict]]:
    return files_of_a_run(house_episodes, house_policy.tokenizer.decode)


@pytest.fixture
def records(files) -> list[dict]:
    return files["episodes/000002.jsonl"]


# ------------------------------------------------------------------------------------------ what is read and written


def test_the_limits_of_the_filters_come_from_all_steps_and_the_first_groups_are_shown(files, tmp_path):
    run = write_run(tmp_path, files)
    everything, part = page.read_run(run), page.read_run(run, [2], max_groups=1)
    assert [batch["name"] for batch in everything["batches"]] == ["2-episodes", "10-credit", "10-episodes"]
    (whole, *_), (first,) = everything["batches"], part["batches"]
    assert whole.pop("groups")[:1] == first.pop("groups")
    assert whole == first
    assert first["kept"] == 2
    assert first["steps"] == sum(len(record["steps"]) for record in files["episodes/000002.jsonl"])


@pytest.mark.parametrize(
    ("norm_entropy", "found"),
    [
        ([0.0, 1.0, 0.0, 1.0], {"mistake": {0.0}, "uncertain": {1.0}}),  # the limits are 0 and 1: they are inclusive
        ([0.0, 0.0, 0.0, 0.0], {"mistake": set(), "uncertain": set()}),  # all steps are equally certain
    ],
)
def test_a_step_at_the_limit_is_found_unless_both_limits_are_equal(norm_entropy, found, records, tmp_path):
    records = [change(modulation__norm_entropy=norm_entropy[: len(r["steps"])])(r) for r in records]
    (batch,) = page.read_run(write_run(tmp_path, {"episodes/000001.jsonl": records}))["batches"]
    for episode in (episode for group in batch["groups"] for episode in group):
        for step in episode["steps"]:
            kind = "uncertain" if episode["success"] else "mistake"
            assert step["filter"] == (kind if step["norm_entropy"] in found[kind] else "")


def test_the_file_names_no_other_file_and_holds_texts_as_escaped_json_alone(files, tmp_path):
    run = write_run(tmp_path / "<i>run", files)
    page.main([str(run)])
    html = (run / "credit.html").read_text()
    template = page.TEMPLATE.read_text()
    assert re.findall(r"https?:|url\(|@import|\bsrc=|\bhref=|<link", template) == []
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert set("<>&'") & set(data) == set()
    assert json.loads(data) == page.read_run(run)
    assert html.count("<script") == html.count("</script>") == template.count("<script") == 2
    assert "<i>" not in html


@pytest.mark.parametrize(("empg", "words"), [(True, "EMPG with k = 1.0"), (False, "without EMPG")])
def test_the_page_says_how_the_run_was_trained(empg, words, records, tmp_path):
    run = write_run(tmp_path, {"episodes/000001.jsonl": records}, empg=empg)
    assert words in page.page(page.read_run(run)).replace("\n", " ")


def change(**changes):
    """A function that sets fields of a record: `steps__0__start=5` sets record["steps"][0]["start"]."""

    def apply(record: dict) -> dict:
        record = json.loads(json.dumps(record))
        for path, value in changes.items():
            place, (*way, last) = record, [int(name) if name.isdigit() else name for name in path.split("__")]
            for name in way:
                place = place[name]
            place[last] = value
        return record

    return apply


@pytest.mark.parametrize(
    "broken",
    [
        lambda record: [record],
        lambda record: {name: value for name, value in record.items() if name != "modulation"},
        lambda record: {name: value for name, value in record.items() if name != "tokens"},
        change(info={}),
        change(info=None),
        change(tokens=["a"]),
        change(token_entropy=[0.5]),
        change(steps__0__thought=None),
        change(modulation__entropy=[]),
        change(modulation__g=[]),
        change(modulation__advantage=[math.nan] * 4),
        change(modulation__norm_entropy=[math.inf] * 4),
        change(modulation__base="much"),
        change(credit={"value": [0.5], "true_advantage": [0.1] * 4, "continuations": 16}),
        change(credit={"value": [0.5] * 5, "true_advantage": [0.1], "continuations": 16}),
    ],
)
def test_a_line_that_is_not_a_kept_episode_is_named(broken, records, tmp_path):
    lines = [*records[:5], broken(records[5])]
    run = write_run(tmp_path, {"credit/000010.jsonl": lines})
    with pytest.raises(SystemExit, match=r"paper\.page: .*000010\.jsonl, line 6: not a kept episode") as error:
        page.main([str(run)])
    assert "\n" not in error.value.code  # a text: printed, and status 1
    assert not (run / "credit.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "arguments", "complaint"),
    [
        ("config.json", None, [], "config.json"),
        ("config.json", "{}", [], "config.json: not the settings of a run"),
        ("config.json", '{"config": {"group_size": 0}}', [], "group_size is below 1"),
        ("episodes/000002.jsonl", '{"prompt": "You', [], "line 1: not a kept episode"),
        ("episodes/000002.jsonl", "", [], "0 episodes are not whole groups of 3"),
        ("episodes/000002.jsonl", None, [], "no kept episodes"),
        ("other", "", ["--iterations", "2", "7"], "nothing was kept of iteration 7, only of 2"),
        ("other", "", ["--out", "nowhere/page.html"], "nowhere/page.html"),
    ],
)
def test_a_run_that_cannot_be_shown_is_refused_in_one_line(name, text, arguments, complaint, records, tmp_path):
    run = write_run(tmp_path, {"episodes/000002.jsonl": records})
    (run / name).unlink() if text is None else (run / name).write_text(text)
    with pytest.raises(SystemExit, match=r"paper\.page: ") as error:
        page.main([str(run), *arguments])
    assert complaint in error.value.code
    assert "\n" not in error.value.code


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"paper\.page: .*nowhere: no such folder$"):
        page.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), ([], 2), (["run", "--max_groups", "0"], 2), (["run", "--iterations", "x"], 2)],
)
def test_usage_is_shown(arguments, status, capsys):
    with pytest.raises(SystemExit) as error:
        page.main(arguments)
    assert error.value.code == status
    assert "usage: python -m paper.page" in "".join(capsys.readouterr())
