"""Tables and figures from the committed rows: the tables of docs/results.md and docs/tables.md, docs/results/*.png.

    python -m paper.report    in a few seconds

A table stands between two marks, <!-- NAME --> and <!-- end -->. The sentences around it are written by hand.
"""

import re
from functools import partial
from pathlib import Path

from scipy import stats

from paper import pictures
from paper.rows import (
    MAIN,
    METHODS,
    TITLES,
    WORLDS,
    Row,
    Study,
    area,
    collapsed,
    drift,
    entropy_at_end,
    estimate,
    read_credit,
    read_rows,
    sampled_and_greedy,
    studies,
)

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/results.md", "docs/tables.md")
SHOWN = (*MAIN, "dapo_centered")
# Success of Qwen2.5 in the paper, in percent: baseline -> with EMPG.
PAPER = {
    ("alfworld", "grpo"): "65.6 → 73.7 (1.5B), 74.8 → 78.5 (7B)",
    ("alfworld", "dapo"): "80.8 → 88.1 (1.5B), 90.0 → 91.6 (7B)",
    ("webshop", "grpo"): "58.2 → 60.8 (1.5B), 65.6 → 69.3 (7B)",
    ("webshop", "dapo"): "73.2 → 73.8 (1.5B), 79.6 → 82.7 (7B)",
    ("search", "dapo"): "62.0 → 65.3 (32B)",
}


def baseline(method: str) -> str:
    return method.split("_")[0]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headline_table() -> str:
    """EMPG against its baseline, and what the paper reports."""
    rows = []
    for world, study in studies().items():
        for plain in ("grpo", "dapo"):
            method = f"{plain}_empg"
            difference = study.difference(method, plain)
            if difference.seeds:
                cells = [f"{WORLDS[world].title}, {TITLES[plain]}", study.mean(plain).text(), study.mean(method).text()]
                cells += [difference.text(sign=True), str(difference.seeds), PAPER.get((world, plain), "not in it")]
                rows.append(cells)
    head = ["", "baseline, %", "with EMPG, %", "difference, points", "seeds", "paper, % (Qwen2.5)"]
    return markdown(head, rows)


def methods_table() -> str:
    """Success of every method that the headline does not have, minus the baseline and minus EMPG."""
    rows = []
    for world, study in studies().items():
        for method in METHODS:
            plain = baseline(method)
            if not study.of(method) or method in (plain, f"{plain}_empg"):
                continue
            gains = [study.difference(method, other) for other in (plain, f"{plain}_empg")]
            cells = [gain.text(sign=True) for gain in gains]
            rows.append([WORLDS[world].title, TITLES[method], study.mean(method).text(), *cells, str(gains[0].seeds)])
    head = ["world", "method", "success, %", "minus the baseline, points", "minus EMPG, points", "seeds"]
    return markdown(head, rows)


def secondary_table() -> str:
    """The secondary measures of the protocol, and the step entropy of the last iteration."""
    rows = []
    for world, study in studies().items():
        for method in SHOWN:
            if not study.of(method):
                continue
            plain = baseline(method)
            gain, sharper = "", ""
            if method != plain:
                gain = study.difference(method, plain, area).text(sign=True)
                sharper = study.difference(method, plain, entropy_at_end).text(1, 3, sign=True)
            cells = [study.mean(method, area).text(), gain, study.mean(method, drift).text(1, 3)]
            cells += [study.mean(method, entropy_at_end).text(1, 3), sharper]
            lost = f"{sum(map(collapsed, study.of(method)))} of {len(study.of(method))}"
            rows.append([WORLDS[world].title, TITLES[method], *cells, lost])
    head = ["world", "method", "area under the curve, %", "difference, points"]
    head += ["KL to the first policy, nats per token", "step entropy at the end, nats", "difference, nats", "collapsed"]
    return markdown(head, rows)


def parts_table() -> str:
    """What each part of EMPG does on DAPO, on top of the parts before it."""
    study = studies()["house"]
    steps = {
        "centring alone": ("dapo_centered", "dapo"),
        "f, with centring": ("dapo_bonus", "dapo_centered"),
        "g, with centring": ("dapo_scaling", "dapo_centered"),
        "g and f, with centring": ("dapo_empg", "dapo_centered"),
        "g, with f and centring": ("dapo_empg", "dapo_bonus"),
    }
    rows = [
        [name, TITLES[other], gain.text(sign=True), str(gain.seeds)]
        for name, (method, other) in steps.items()
        if (gain := study.difference(method, other)).seeds
    ]
    return markdown(["what is added", "to", "difference, points", "seeds"], rows)


def replication_table() -> str:
    """House with a weak imitation: the seeds on which EMPG gained, those of the replication, and the confirmation's."""
    rows, lines = read_rows("house_weak") + read_rows("house_weak_confirmation"), []
    for method in ("grpo_empg", "dapo_empg"):
        for name, seeds in {"0 to 9": range(10), "10 to 19": range(10, 20), "20 to 45": range(20, 46)}.items():
            gains = Study([row for row in rows if row["seed"] in seeds]).gains(method, baseline(method))
            if len(gains) < len(seeds):  # a series is told when it is whole
                continue
            above, p = f"{sum(gain > 0 for gain in gains)} of {len(gains)}", stats.ttest_1samp(gains, 0).pvalue
            lines.append([TITLES[method], name, estimate(gains).text(sign=True), above, f"{p:.3f}"])
    return markdown(["method", "seeds", "difference to the baseline, points", "seeds above it", "p"], lines)


def greedy_table() -> str:
    """The same final policies sampled at temperature 1 and played at temperature 0, of every world that has both."""
    rows = []
    for world in studies():
        sampled, greedy = sampled_and_greedy(world)
        for method in filter(greedy.of, ("first", *SHOWN)):
            plain, first = baseline(method), method == "first"
            cells = []
            for study in (sampled, greedy):
                gain = "" if first or method == plain else study.difference(method, plain).text(sign=True)
                cells += [study.mean(method).text(), gain]
            rows.append([WORLDS[world].title, TITLES[method], *cells, str(len(greedy.of(method)))])
    head = ["world", "method", "sampled, %", "difference, points", "greedy, %", "difference, points", "seeds"]
    return markdown(head, rows)


def split_table() -> str:
    """Success of GRPO with and without EMPG by split and task type; the headline has all tasks of the first split."""
    rows = []
    for world, study in studies().items():
        for number, split in enumerate(study.of("grpo")[0]["eval"]):
            types = sorted({name for row in study.of("grpo") for name in row["eval"][split]["task_types"]})
            names = types if len(types) > 1 else []
            for name in names if number == 0 else ["all", *names]:
                measure = partial(success_of, split, name)
                cells = [study.mean(method, measure).text() for method in ("grpo", "grpo_empg")]
                gain = study.difference("grpo_empg", "grpo", measure).text(sign=True)
                rows.append([WORLDS[world].title, split, name, *cells, gain])
    return markdown(["world", "split", "tasks", "GRPO, %", "GRPO + EMPG, %", "difference, points"], rows)


def success_of(split: str, name: str, row: Row) -> float:
    """Success in one split; name: a task type, or all."""
    evaluation = row["eval"][split]
    return (evaluation if name == "all" else evaluation["task_types"][name])["success"]


# ------------------------------------------------------------------------------------------------- credit and gradient


def interval(numbers: list[float], sign: bool = False) -> str:
    """A value and its bootstrap interval as text."""
    value, low, high = (f"{x:{'+' if sign else ''}.3f}" for x in numbers)
    return f"{value} ({low} to {high})".replace("-", "−")


def policy_name(row: dict) -> str:
    trained = TITLES[f"{row['algorithm']}_empg" if row["empg"] else row["algorithm"]]
    after = f"after {row['checkpoint']} iterations of {trained}" if row["checkpoint"] else "warm start"
    return f"{WORLDS[row['world']].title}, {after}, seed {row['seed']}, {100 * row['success']:.0f} %"


def gains_table(part: str, measure: str) -> str:
    """A measure of GRPO's advantages, and how much larger it is for each method: a line for each policy measured."""
    lines, methods = [], []
    for row in (row for row in read_credit() if part in row):
        methods = [name for name in row[part] if name != "grpo"]
        cells = [interval(row[part]["grpo"][measure])]
        cells += [interval(row[part][name][f"{measure}_gain"], sign=True) for name in methods]
        lines.append([policy_name(row), *cells])
    return markdown(["policy", "GRPO", *(TITLES[name].removeprefix("GRPO + ") for name in methods)], lines)


def entropy_table() -> str:
    """Size of the true credit by fifth of step entropy."""
    rows = [
        [policy_name(row), *(interval(part["credit"]) for part in row["credit_by_entropy"])] for row in read_credit()
    ]
    return markdown(["policy", "lowest fifth", "second", "third", "fourth", "highest fifth"], rows)


TABLES = {
    "headline": headline_table,
    "methods": methods_table,
    "secondary": secondary_table,
    "parts": parts_table,
    "replication": replication_table,
    "greedy": greedy_table,
    "splits": split_table,
    "credit by entropy": entropy_table,
    "correlation": lambda: gains_table("credit", "pearson"),
    "rank correlation": lambda: gains_table("credit", "spearman"),
    "same sign": lambda: gains_table("credit", "sign"),
    "direction": lambda: gains_table("update", "direction"),
    "direction on the same batch": lambda: gains_table("update", "own"),
    "signal": lambda: gains_table("update", "signal"),
}


def filled(text: str) -> str:
    """The document with every marked table written again. Raises KeyError for a mark without a table."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- ([a-z ]+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.draw_all()


if __name__ == "__main__":
    main()
