"""figures.py: what is drawn is what was measured."""

import json

import pytest
from matplotlib import pyplot as plt

import figures

ROWS = [
    {"iteration": 0, "eval/success": 0.25, "eval/success_low": 0.2, "eval/success_high": 0.5},
    {"iteration": 1, "reward/success": 0.5},
    {"iteration": 2, "reward/success": 0.5, "eval/success": 0.75, "eval/success_low": 0.6, "eval/success_high": 0.8},
]


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that was drawn last, kept open."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")


@pytest.fixture
def metrics(tmp_path):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return files


def test_runs_are_drawn_by_name_where_they_were_evaluated(metrics, axes, tmp_path):
    figures.draw_runs(metrics, tmp_path / "runs.png")
    (axis,) = axes()
    assert [line.get_label() for line in axis.lines] == ["one", "two"]
    for line, band in zip(axis.lines, axis.collections, strict=True):
        assert line.get_xydata().tolist() == [[0, 0.25], [2, 0.75]]
        assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(0, 0.2), (0, 0.5), (2, 0.6), (2, 0.8)}
    assert (tmp_path / "runs.png").stat().st_size > 0


def test_curves_have_success_in_training_and_on_held_out_tasks(metrics, axes, tmp_path):
    figures.draw_curves(metrics[0], tmp_path / "curves.png")
    training, held_out = axes()[0].lines
    assert training.get_xydata().tolist() == [[1, 0.5], [2, 0.5]]
    assert held_out.get_xydata().tolist() == [[0, 0.25], [2, 0.75]]
