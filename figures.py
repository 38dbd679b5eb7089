"""Every picture: the learning curves of a run, and the success of several runs side by side.

python figures.py out/house/metrics.jsonl curves.png
python figures.py docs/runs/*.jsonl docs/worlds.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_metrics(metrics: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one for each iteration."""
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def draw_curves(metrics: Path, picture: Path) -> None:
    """Success, steps, entropy and invalid actions of a run against its iterations."""
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    panels = {
        "success": {"reward/success": "training episodes", "eval/success": "held-out tasks, 95 % interval"},
        "mean per episode": {"episode/steps": "steps"},
        "step entropy (nats)": {"entropy/mean": "mean", "entropy/min": "min", "entropy/max": "max"},
        "share of steps": {"episode/invalid_frac": "invalid actions"},
    }
    for axis, (label, lines) in zip(axes.flat, panels.items(), strict=True):
        for key, name in lines.items():
            points = [(row["iteration"], row[key]) for row in rows if key in row] or [(0, float("nan"))]
            axis.plot(*zip(*points, strict=True), label=name, marker="o" if key.startswith("eval") else None)
        axis.set(ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    draw_interval(axes[0, 0], rows, "C1")
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_interval(axis: plt.Axes, rows: list[dict], color: str) -> None:
    """The 95 % interval of success on held-out tasks as a band."""
    evaluated = [row for row in rows if "eval/success" in row]
    low, high = ([row[f"eval/success_{end}"] for row in evaluated] for end in ("low", "high"))
    axis.fill_between([row["iteration"] for row in evaluated], low, high, alpha=0.2, color=color)
    axis.set_ylim(0, 1)


def draw_runs(runs: list[Path], picture: Path) -> None:
    """Success on held-out tasks of several runs, named by their files, against their iterations."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, metrics in enumerate(runs):
        rows = read_metrics(metrics)
        points = [(row["iteration"], row["eval/success"]) for row in rows if "eval/success" in row]
        axis.plot(*zip(*points, strict=True), label=metrics.stem, marker="os^D"[number % 4], color=f"C{number}")
        draw_interval(axis, rows, f"C{number}")
    axis.set(xlabel="iteration", ylabel="success on held-out tasks, 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    *files, target = map(Path, sys.argv[1:])
    if len(files) > 1:
        draw_runs(files, target)
    else:
        draw_curves(*files, target)
