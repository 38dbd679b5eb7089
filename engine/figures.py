"""Pictures of training: the learning curves of one run, or the success of several runs in one panel.

    python -m engine.figures out/house/metrics.jsonl curves.png                           one run: all its panels
    python -m engine.figures out/house/metrics.jsonl out/grpo/metrics.jsonl both.png      several runs: success alone

Lines differ in marker or line style, so that a print in grey can be read, too.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

from engine.files import read_lines

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
LOOKS = {"color": ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "marker": "os^Dv", "linestyle": ("-", "--", "-.")}

# y axis of a panel -> its lines: label, metric, line style
PANELS = {
    "success (share of episodes)": [("training", "reward/success", "-")],
    "steps per episode": [("mean", "episode/steps", "-")],
    "step entropy (nats)": [("max", "entropy/max", ":"), ("mean", "entropy/mean", "-"), ("min", "entropy/min", "--")],
    "invalid actions (share of steps)": [("mean", "episode/invalid_frac", "-")],
    "g, gradient scale (mean 1)": [("max", "empg/g_max", ":"), ("min", "empg/g_min", "--")],
    "f, clarity bonus of the next step": [("mean", "empg/f_mean", "-")],
}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, one for each recorded iteration.

    A last line without a line end that cannot be parsed is skipped: the run was stopped while it wrote that line.
    Any other line must be an object of numbers with an "iteration". Raises ValueError, naming file and line, if one is
    not, and if the file has no line. Raises OSError if there is no such file.
    """
    rows, faults, _ = read_lines(path, fault_of_metrics)
    if faults:
        raise ValueError(faults[0])
    if not rows:
        raise ValueError(f"{path}: no complete line; the run has recorded nothing yet")
    return rows


def fault_of_metrics(row) -> str:
    """What is wrong with a line of a metrics.jsonl or timings.jsonl; "" for nothing."""
    if not isinstance(row, dict) or "iteration" not in row:
        return 'not an object with an "iteration"'
    return next((f"{key!r} is not a number" for key, value in row.items() if not isinstance(value, int | float)), "")


def draw_curves(metrics: Path, picture: Path) -> Figure:
    """The panels of PANELS, against the iterations of a run.

    Writes the picture in the format of its suffix and returns the figure. Raises OSError or ValueError if a file
    cannot be read or written, or if the run was never evaluated.
    """
    rows = read_metrics(metrics)
    height = (len(PANELS) + 1) // 2
    figure = Figure(figsize=(10, 2.7 * height), layout="constrained")
    axes = figure.subplots(height, 2, sharex=True, squeeze=False)
    for axis, (quantity, lines) in zip(axes.flat, PANELS.items(), strict=False):
        for color, (label, key, linestyle) in zip(cycle(LOOKS["color"]), lines, strict=False):
            recorded = [row for row in rows if key in row]
            x, y = [row["iteration"] for row in recorded], [row[key] for row in recorded]
            axis.plot(x, y, color=color, linestyle=linestyle, label=label)
        axis.set(ylabel=quantity, ylim=(0, None))
    draw_held_out(axes[0, 0], metrics, rows, "held-out tasks, 95 % interval", look=1)
    for axis in axes.flat[: len(PANELS)]:
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(PANELS) :]:
        axis.set_visible(False)
    for axis in axes.flat[len(PANELS) - 2 : len(PANELS)]:  # the lowest panel of each column
        axis.set_xlabel("iteration")
        axis.tick_params(labelbottom=True)
    figure.savefig(picture, dpi=120)
    return figure


def draw_runs(runs: Sequence[Path], picture: Path) -> Figure:
    """Success on held-out tasks against the iterations of several runs.

    A run is named by its file, or by its folder if the file is a metrics.jsonl. Returns and raises as `draw_curves`.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for number, metrics in enumerate(runs):
        name = metrics.absolute().parent.name if metrics.name == "metrics.jsonl" else metrics.stem
        draw_held_out(axis, metrics, read_metrics(metrics), name, look=number)
    axis.set(xlabel="iteration", ylabel="success on held-out tasks\n(share of episodes, 95 % interval)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=120)
    return figure


def draw_held_out(axis: Axes, metrics: Path, rows: list[dict], label: str, look: int) -> None:
    """Success on held-out tasks with its 95 % interval as a bar. Raises ValueError if the run was never evaluated."""
    keys = ("iteration", "eval/success", "eval/success_low", "eval/success_high")
    evaluations = [[row[key] for key in keys] for row in rows if row.keys() >= set(keys)]
    if not evaluations:
        raise ValueError(f"{metrics}: no evaluation, so there is no success on held-out tasks to draw")
    bars = [(success - low, high - success) for _, success, low, high in evaluations]
    iterations, success, *_ = zip(*evaluations, strict=True)
    style = {name: values[look % len(values)] for name, values in LOOKS.items()}
    axis.errorbar(iterations, success, list(zip(*bars, strict=True)), label=label, capsize=3, **style)
    axis.set_ylim(0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. A wrong usage ends with status 2, a file that cannot be read or written with status 1."""
    parser = ArgumentParser(
        "python -m engine.figures", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of a run, or of several runs")
    parser.add_argument("picture", type=Path, help="file to write; its suffix is the format: .png, .pdf, .svg")
    args = parser.parse_args(argv)
    if args.picture.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        parser.error(f"{args.picture}, the last argument, must name a picture that ends in .png, .pdf or .svg")
    try:
        if len(args.metrics) == 1:
            draw_curves(args.metrics[0], args.picture)
        else:
            draw_runs(args.metrics, args.picture)
    except (OSError, ValueError) as error:
        raise SystemExit(f"engine.figures: {error}") from error


if __name__ == "__main__":
    main()
