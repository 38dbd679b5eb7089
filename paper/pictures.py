"""The figures of docs/results.md, drawn from the committed rows. Each function makes one; `draw_all` writes them.

Bands and bars are 95 % intervals. Every line differs in style or marker, so that a print in grey can be read. Every
figure is 8 inches wide, so that its text can be read where a page shows it 800 pixels wide.
"""

import json
from collections.abc import Callable, Iterable
from itertools import cycle
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
from matplotlib.ticker import MaxNLocator

from engine.figures import LOOKS
from paper.rows import (
    BINS,
    RESULTS,
    TITLES,
    WORLDS,
    Row,
    Study,
    estimate,
    read_credit,
    read_rows,
    sampled_and_greedy,
    studies,
)

PAIRS = {"GRPO": ("grpo", "grpo_empg"), "DAPO": ("dapo", "dapo_empg")}
FOUR = (*PAIRS["GRPO"], *PAIRS["DAPO"])
PARTS = {
    "EMPG": "empg",
    "scaling only": "scaling",
    "bonus only": "bonus",
    "centring only": "centered",
    "EMPG, k = −1": "empg_reversed",
}


def looks() -> cycle:
    return cycle(
        {"color": color, "marker": marker, "linestyle": line}
        for color, marker, line in zip(LOOKS["color"], LOOKS["marker"], ("-", "--", "-.", ":"), strict=False)
    )


def band(axis: Axes, x: list[float], rows: list[Row], values: Callable[[Row], list[float]], **look) -> None:
    """The mean over seeds of a list of values, with its interval as a band."""
    means = [estimate(list(column)) for column in zip(*map(values, rows), strict=True)]
    axis.plot(x, [m.mean for m in means], markersize=4, **look)
    if len(rows) > 1:
        limits = [m.low for m in means], [m.high for m in means]
        axis.fill_between(x, *limits, color=look["color"], alpha=0.15, linewidth=0)


def learning_curves(world: str = "house") -> Figure:
    """Success while training, baseline and EMPG, and below the paired differences of the final evaluation."""
    study = Study(read_rows(world))
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axis, (name, pair) in zip(above.subplots(1, 2), PAIRS.items(), strict=True):
        together = study.together(*pair)
        for rows, method, look in zip(zip(*together, strict=True), pair, looks(), strict=False):
            iterations = range(1, len(rows[0]["curve"]) + 1)
            band(axis, iterations, rows, lambda row: [100 * x for x in row["curve"]], label=TITLES[method], **look)
        axis.set(title=f"{WORLDS[world].title}, {name}, {len(together)} seeds", ylim=(0, 100))
        axis.set(xlabel="iteration (64 episodes)", ylabel="success on new tasks, %")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    differences(below.subplots(), study)
    return figure


def learning_curves_weak() -> Figure:
    """The same in House with a weak imitation."""
    return learning_curves("house_weak")


def differences(axis: Axes, study: Study) -> None:
    """The final evaluation of each part of EMPG minus its baseline, paired by seed."""
    shown = []
    for (name, (base, _)), color in zip(PAIRS.items(), LOOKS["color"], strict=False):
        for (part, key), marker in zip(PARTS.items(), LOOKS["marker"], strict=True):
            gain = study.difference(f"{base}_{key}", base)
            if gain.seeds:
                shown.append((f"{name} + {part}, {gain.seeds} seeds", gain, {"color": color, "marker": marker}))
    for place, (_, gain, look) in enumerate(shown):
        error = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]] if gain.seeds > 1 else None
        axis.errorbar(100 * gain.mean, -place, xerr=error, capsize=3, linestyle="none", **look)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks([-place for place in range(len(shown))], [label for label, *_ in shown])
    axis.set(xlabel="final success minus the baseline's, paired by seed, points", xlim=(-12, 12))
    axis.grid(alpha=0.3, axis="x")


def kl() -> Figure:
    """KL to the first policy while training, in House."""
    study = Study(read_rows("house"))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    for method, look in zip(FOUR, looks(), strict=False):
        rows = study.of(method)
        iterations = [0, *(iteration for iteration, _ in rows[0]["kl"])]  # at 0 it is the first policy: no KL
        band(axis, iterations, rows, lambda row: [0.0, *(x for _, x in row["kl"])], label=TITLES[method], **look)
    axis.set(xlabel="iterations trained", title=f"{WORLDS['house'].title}, {seeds(study)} seeds", ylim=(0, None))
    axis.set(ylabel="KL to the first policy\n(k3 estimate, nats per token)")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def sharpening() -> Figure:
    """Success of the same policies sampled at temperature 1 and at temperature 0, before and after training."""
    worlds = {world: pair for world in studies() if (pair := sampled_and_greedy(world))[1].rows}
    height = (len(worlds) + 1) // 2
    figure = Figure(figsize=(8, 3.4 * height), layout="constrained")
    axes = figure.subplots(height, 2, sharey=True, squeeze=False)
    names = {"first": "warm\nstart", **{method: TITLES[method] for method in FOUR}}
    for axis, (world, both) in zip(axes.flat, worlds.items(), strict=False):
        for study, label, look in zip(both, ("sampled", "temperature 0"), looks(), strict=False):
            means = [100 * study.mean(method).mean for method in names]
            errors = [100 * (study.mean(method).high - study.mean(method).mean) for method in names]
            axis.errorbar(range(len(names)), means, errors, capsize=3, label=label, **look | {"linestyle": "none"})
        axis.set_xticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names.values()])
        axis.set(title=f"{WORLDS[world].title}, {seeds(both[1], names)} seeds", ylim=(0, 100))
        axis.grid(alpha=0.3, axis="y")
    for axis in axes.flat[len(worlds) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set(ylabel="success on held-out tasks, %")
    axes[0, 0].legend(loc="lower right")
    return figure


def seeds(study: Study, methods: Iterable[str] = FOUR) -> str:
    """The number of seeds of these methods, such as 20, or 6 to 14 where it differs."""
    numbers = sorted({len(study.of(method)) for method in methods})
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def entropy_change() -> Figure:
    """How training changed the entropy of fixed texts, by percentile of the entropy before."""
    study = Study(read_rows("house"))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    percentiles = [100 * (i + 0.5) / BINS for i in range(BINS)]
    for axis, level in zip(axes, ("step", "token"), strict=True):

        def change(row: Row, level: str = level) -> list[float]:
            return [after - before for before, after in row["entropy_change"][level]]

        for method, look in zip(FOUR, looks(), strict=False):
            band(axis, percentiles, study.of(method), change, label=TITLES[method], **look)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(
            xlabel=f"percentile of {level} entropy before training",
            ylabel="change of entropy (nats)",
            title=f"{WORLDS['house'].title}, {level}s, {seeds(study)} seeds",
        )
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def proposition() -> Figure:
    """Proposition 1: the expected squared norm of the score against entropy, and the tiny model's own tokens."""
    tokens = np.array([point for row in read_rows("house") if row["method"] == "grpo" for point in row["score_norm"]])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    renyi = np.linspace(0, 4, 200)
    for axis, column, name in zip(axes, (1, 0), ("Rényi-2 entropy H₂", "Shannon entropy H"), strict=True):
        axis.plot(renyi, 1 - np.exp(-renyi), color=LOOKS["color"][0], label="1 − exp(−entropy)")
        axis.plot(
            tokens[:, column],
            tokens[:, 2],
            ".",
            color=LOOKS["color"][1],
            markersize=3,
            label="tokens of the tiny model",
        )
        axis.set(xlabel=f"{name} of the token (nats)")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="E‖∇ log π‖², dimensionless")
    axes[0].legend(loc="lower right")
    return figure


def g_and_f() -> Figure:
    """g and f against H_norm for several k, above the H_norm of the study's steps in House."""
    counts = np.sum([row["norm_entropy"] for row in read_rows("house") if row["method"] == "grpo_empg"], axis=0)
    edges = np.linspace(0, 1, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    figure = Figure(figsize=(8, 5), layout="constrained")
    (g_axis, f_axis), lower = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
    h = np.linspace(0, 1, 101)
    for k, look in zip((0.5, 1.0, 2.0, -1.0), looks(), strict=False):
        look = {"color": look["color"], "linestyle": look["linestyle"]}
        mean = np.average(np.exp(-k * middles), weights=counts)  # over the steps of the study
        g_axis.plot(h, np.exp(-k * h) / mean, label=f"k = {k:g}".replace("-", "−"), **look)
        if k > 0:
            f_axis.plot(h, np.exp(-k * h), label=f"k' = {k:g}", **look)
    g_axis.axhline(1, color="black", linewidth=0.8)
    g_axis.set(ylabel="g(H), dimensionless", title="g scales the step's own advantage")
    f_axis.set(ylabel="f(H), dimensionless", title="f, bonus of the step before, without ζ", ylim=(0, 1.05))
    for axis in (g_axis, f_axis):
        axis.legend()
        axis.grid(alpha=0.3)
    for axis in lower:
        axis.bar(edges[:-1], 100 * counts / counts.sum(), width=1 / BINS, align="edge", color="0.6", edgecolor="0.3")
        axis.set(xlabel="H_norm of the step, dimensionless", ylabel="steps, %")
    return figure


def sensitivity() -> Figure:
    """Success minus GRPO's, paired by seed, against k and against zeta."""
    study = Study(read_rows("house"))
    settings = {
        "k": {0: "grpo_bonus", 0.5: "grpo_empg_k0.5", 1: "grpo_empg", 2: "grpo_empg_k2", -1: "grpo_empg_reversed"},
        "ζ": {0: "grpo_scaling", 0.05: "grpo_empg_zeta0.05", 0.1: "grpo_empg", 0.5: "grpo_empg_zeta0.5"},
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (name, methods), look in zip(figure.subplots(1, 2, sharey=True), settings.items(), looks(), strict=False):
        gains = {value: study.difference(method, "grpo") for value, method in sorted(methods.items())}
        means = [100 * gain.mean for gain in gains.values()]
        errors = [100 * (gain.high - gain.mean) for gain in gains.values()]
        axis.errorbar(range(len(gains)), means, errors, capsize=3, **look | {"linestyle": "none"})
        labels = [f"{value}\n{gain.seeds} seeds".replace("-", "−") for value, gain in gains.items()]
        axis.set_xticks(range(len(gains)), labels)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"{name}, dimensionless", ylabel="success minus GRPO's, points", title=f"House, {name}")
        axis.grid(alpha=0.3)
    return figure


def credit() -> Figure:
    """The true credit by fifth of entropy, and how much better than GRPO's each method's advantages agree with it.

    A row of panels for each world, with the policies that GRPO trained.
    """
    trained = [row for row in read_credit() if row["algorithm"] == "grpo" and not row["empg"]]
    worlds = {world: rows for world in WORLDS if (rows := [row for row in trained if row["world"] == world])}
    figure = Figure(figsize=(8, 3.2 * len(worlds)), layout="constrained")
    for (world, rows), (by_entropy, gains) in zip(
        worlds.items(), figure.subplots(len(worlds), 2, squeeze=False), strict=True
    ):
        for shift, (row, look) in enumerate(zip(rows, looks(), strict=False)):
            label = f"{row['checkpoint']} iterations, seed {row['seed']}: {100 * row['success']:.0f} %"
            fifths = np.array([fifth["credit"] for fifth in row["credit_by_entropy"]])
            errors = np.abs(fifths[:, 1:] - fifths[:, :1]).T
            by_entropy.errorbar(np.arange(1, 6) + 0.06 * shift, fifths[:, 0], errors, capsize=3, label=label, **look)
            methods = [name for name, measures in row["credit"].items() if "pearson_gain" in measures]
            values = np.array([row["credit"][name]["pearson_gain"] for name in methods])
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            places = -np.arange(len(methods)) - 0.15 * shift
            gains.errorbar(values[:, 0], places, xerr=errors, capsize=2, **look | {"linestyle": "none"})
            gains.set_yticks(
                -np.arange(len(methods)), [fill(TITLES[name].removeprefix("GRPO + "), 23) for name in methods]
            )
        by_entropy.set_ymargin(0.5)  # room for the legend
        by_entropy.set(title=f"{WORLDS[world].title}: true credit", ylim=(0, None), xticks=range(1, 6))
        by_entropy.set(xlabel="fifth of the steps by entropy, lowest first")
        by_entropy.set(ylabel="true credit of a step\n(root mean square, success)")
        by_entropy.legend(fontsize=8)
        gains.axvline(0, color="black", linewidth=0.8)
        gains.xaxis.set_major_locator(MaxNLocator(5))
        gains.set(xlabel="correlation with true credit, minus GRPO's", title=f"{WORLDS[world].title}: agreement")
        for axis in (by_entropy, gains):
            axis.grid(alpha=0.3)
    return figure


FIGURES = (
    learning_curves,
    learning_curves_weak,
    sharpening,
    kl,
    entropy_change,
    proposition,
    g_and_f,
    sensitivity,
    credit,
)


def draw_all() -> None:
    """Write every figure, and print where."""
    for draw in FIGURES:
        file = RESULTS / f"{draw.__name__}.png"
        draw().savefig(file, dpi=120)
        print(file)


def episode_bars() -> Figure:
    """One kept episode of the lab's run: H, g, f and the advantage of each step as bars. README shows it."""
    lines = (RESULTS.parent / "lab" / "house" / "episodes" / "000007.jsonl").read_bytes().splitlines()
    episode = json.loads(lines[18])  # the third of the third group of 8
    credit = episode["modulation"]
    labels = {"entropy": "H, nats", "g": "g(H), mean 1", "f": "f(H of next step)", "advantage": "final advantage"}
    names = [f"{place}  {step['action']}" for place, step in enumerate(episode["steps"])]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, (name, label), color in zip(
        figure.subplots(1, 4, sharey=True), labels.items(), LOOKS["color"], strict=False
    ):
        axis.barh(names, credit[name], color=color)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3, axis="x")
    axis.axvline(credit["base"], color="black", linestyle="--", linewidth=0.8)
    axis.set(title=f"base A: {credit['base']:.2f}")
    axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    episode_bars().savefig(RESULTS.parent / "episode.png", dpi=120)
