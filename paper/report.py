"""Tables and figures from the committed rows: the tables of README.md and docs/*.md, and docs/results/*.png.

    python -m paper.report            all of them, in a few seconds
    python -m paper.report --check    change nothing; status 1 if a table is not what the rows give

A table stands between two marks, <!-- NAME --> and <!-- end -->. The sentences around it are written by hand.
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from scipy import stats

from paper import pictures
from paper.rows import (
    MAIN,
    TITLES,
    WORLDS,
    Study,
    area,
    collapsed,
    drift,
    estimate,
    read_credit,
    read_rows,
    sampled_and_greedy,
)

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/results.md", "docs/credit_tables.md")
SHOWN = (*MAIN, "dapo_centered")
BEYOND = (
    "grpo_empg",
    "grpo_empg_rank",
    "grpo_empg_mixed",
    "grpo_empg_reversed",
    "grpo_true",
    "dapo_empg",
    "dapo_empg_reversed",
)
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


def studies() -> dict[str, Study]:
    """The worlds that have rows."""
    return {world: Study(rows) for world in WORLDS if (rows := read_rows(world))}


def success_table(methods: tuple[str, ...] = SHOWN) -> str:
    """Success in the final evaluation, and the paired difference to the baseline, for every world with rows."""
    rows = []
    for world, study in studies().items():
        for method in methods:
            if not study.of(method):
                continue
            plain, difference = baseline(method), study.difference(method, baseline(method))
            cells = [WORLDS[world].title, TITLES[method], study.mean(method).text()]
            cells += ["" if method == plain else difference.text(sign=True)]
            rows.append([*cells, str(len(study.of(method)) if method == plain else difference.seeds)])
    return markdown(["world", "method", "success, %", "difference to the baseline, points", "seeds"], rows)


def headline_table() -> str:
    """EMPG against its baseline, beside the paper."""
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


def secondary_table() -> str:
    rows = []
    for world, study in studies().items():
        for method in SHOWN:
            if not study.of(method):
                continue
            plain = baseline(method)
            gain = "" if method == plain else study.difference(method, plain, area).text(sign=True)
            lost = f"{sum(map(collapsed, study.of(method)))} of {len(study.of(method))}"
            kl = study.mean(method, drift).text(1, 3)
            rows.append([WORLDS[world].title, TITLES[method], study.mean(method, area).text(), gain, kl, lost])
    head = [
        "world",
        "method",
        "area under the curve, %",
        "difference, points",
        "KL to the first policy, nats per token",
    ]
    return markdown([*head, "collapsed"], rows)


def beyond_table() -> str:
    study, rows = studies()["house"], []
    for method in BEYOND:
        if study.of(method):
            plain = baseline(method)
            to_empg = "" if method.endswith("_empg") else study.difference(method, f"{plain}_empg").text(sign=True)
            gain = study.difference(method, plain)
            rows.append([TITLES[method], study.mean(method).text(), gain.text(sign=True), to_empg, str(gain.seeds)])
    return markdown(["method", "success, %", "minus the baseline, points", "minus EMPG, points", "seeds"], rows)


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
    gains = {name: study.difference(*pair) for name, pair in steps.items()}
    rows = [[name, gain.text(sign=True), str(gain.seeds)] for name, gain in gains.items() if gain.seeds]
    return markdown(["what is added to DAPO", "difference, points", "seeds"], rows)


def replication_table() -> str:
    """House with a weak imitation: the seeds on which EMPG gained, the seeds of the replication, and both."""
    rows, lines = read_rows("house_weak"), []
    for method in ("grpo_empg", "dapo_empg"):
        for name, seeds in {"0 to 9": range(10), "10 to 19": range(10, 20), "0 to 19": range(20)}.items():
            gains = Study([row for row in rows if row["seed"] in seeds]).gains(method, baseline(method))
            above, p = f"{sum(gain > 0 for gain in gains)} of {len(gains)}", stats.ttest_1samp(gains, 0).pvalue
            lines.append([TITLES[method], name, estimate(gains).text(sign=True), above, f"{p:.3f}"])
    return markdown(["method", "seeds", "difference to the baseline, points", "seeds above it", "p"], lines)


def greedy_table() -> str:
    """The same final policies sampled at temperature 1 and played at temperature 0, of every world that has both."""
    rows = []
    for world in WORLDS:
        sampled, greedy = sampled_and_greedy(world)
        for method in filter(greedy.of, ("first", *SHOWN)):
            plain, first = baseline(method), method == "first"
            cells = ["" if first else sampled.mean(method, lambda row: row["entropy"][-1]).text(1, 3)]
            for study in (sampled, greedy):
                gain = "" if first or method == plain else study.difference(method, plain).text(sign=True)
                cells += [study.mean(method).text(), gain]
            rows.append([WORLDS[world].title, TITLES[method], *cells, str(len(greedy.of(method)))])
    head = ["world", "method", "step entropy at the end, nats", "sampled, %", "difference, points"]
    return markdown([*head, "greedy, %", "difference, points", "seeds"], rows)


def split_table() -> str:
    """Success by split and task type, of the worlds that have more than one split."""
    rows = []
    for world, study in studies().items():
        for split in study.of("grpo")[0]["eval"]:
            types = sorted({name for row in study.of("grpo") for name in row["eval"][split]["task_types"]})
            for name in ("all", *types):
                measure = lambda row, split=split, name=name: (  # noqa: E731
                    row["eval"][split] if name == "all" else row["eval"][split]["task_types"][name]
                )["success"]
                cells = [study.mean(method, measure).text() for method in ("grpo", "grpo_empg")]
                gain = study.difference("grpo_empg", "grpo", measure).text(sign=True)
                rows.append([WORLDS[world].title, split, name, *cells, gain])
    return markdown(["world", "split", "tasks", "GRPO, %", "GRPO + EMPG, %", "difference, points"], rows)


# ------------------------------------------------------------------------------------------------- credit and gradient


def interval(numbers: list[float], decimals: int = 3, sign: bool = False) -> str:
    """A value and its bootstrap interval as text."""
    value, low, high = (f"{x:{'+' if sign else ''}.{decimals}f}" for x in numbers)
    return f"{value} ({low} to {high})".replace("-", "−")


def policy_name(row: dict) -> str:
    trained = TITLES[f"{row['algorithm']}_empg" if row["empg"] else row["algorithm"]]
    after = f"after {row['checkpoint']} iterations of {trained}" if row["checkpoint"] else "warm start"
    return f"{WORLDS[row['world']].title}, {after}, seed {row['seed']}, {100 * row['success']:.0f} %"


def gains_table(part: str, measure: str, decimals: int = 3) -> str:
    """A measure of GRPO's advantages, and how much larger it is for each method: a line for each policy measured."""
    lines, methods = [], []
    for row in read_credit():
        methods = [name for name in row[part] if name != "grpo"]
        cells = [interval(row[part]["grpo"][measure], decimals)]
        cells += [interval(row[part][name][f"{measure}_gain"], decimals, sign=True) for name in methods]
        lines.append([policy_name(row), *cells])
    return markdown(["policy", "GRPO", *(TITLES[name].removeprefix("GRPO + ") for name in methods)], lines)


def entropy_table() -> str:
    """Size of the true credit by fifth of step entropy."""
    rows = []
    for row in read_credit():
        rows.append([policy_name(row), *(interval(fifth["credit"]) for fifth in row["credit_by_entropy"])])
    return markdown(["policy", "lowest fifth", "second", "third", "fourth", "highest fifth"], rows)


TABLES = {
    "headline": headline_table,
    "success": success_table,
    "secondary": secondary_table,
    "beyond": beyond_table,
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
    """The document with every marked table made anew. Raises KeyError for a mark without a table."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- ([a-z ]+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the tables with the rows")
    check, stale = parser.parse_args().check, []
    for name in DOCUMENTS:
        path = ROOT / name
        old, new = path.read_text(), filled(path.read_text())
        if check and old != new:
            stale.append(name)
        if not check:
            path.write_text(new)
    if stale:
        raise SystemExit(f"not what the rows give: {', '.join(stale)}; run python -m paper.report")
    if not check:
        for picture in pictures.draw_all():
            print(picture)


if __name__ == "__main__":
    main()
