"""engine.figures: it draws the numbers of the file, and names a file that it cannot draw."""

import json
from pathlib import Path

import pytest

from engine import figures

ROWS = [
    {"iteration": 0, "eval/success": 0.25, "eval/success_low": 0.2, "eval/success_high": 0.5},
    {"iteration": 1, "reward/success": 0.5, "episode/steps": 7, "entropy/max": 0.75},
    {"iteration": 2, "reward/success": 1.0, "eval/success": 0.75, "eval/success_low": 0.6, "eval/success_high": 0.8},
]
GOOD = "".join(f"{json.dumps(row)}\n" for row in ROWS)


@pytest.fixture
def write(tmp_path):
    """A file of the given name and text, as its path."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def drawn(line) -> list[list[float]]:
    return line.get_xydata().tolist()


def test_curves_are_the_metrics_against_the_iteration(write, tmp_path):
    success, steps, entropy, invalid, *_ = figures.draw_curves(write("metrics.jsonl", GOOD), tmp_path / "c.png").axes
    training, held_out = success.lines[:2]
    assert drawn(training) == [[1, 0.5], [2, 1.0]]
    assert drawn(held_out) == [[0, 0.25], [2, 0.75]]
    assert drawn(steps.lines[0]) == [[1, 7]]
    assert {line.get_label(): drawn(line) for line in entropy.lines} == {"max": [[1, 0.75]], "mean": [], "min": []}
    assert drawn(invalid.lines[0]) == []
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_and_their_lines_differ(write, tmp_path):
    """Runs whose file is metrics.jsonl once all had the name `metrics` in the picture."""
    runs = [write(name, GOOD) for name in ("one.jsonl", "two.jsonl", "out/three/metrics.jsonl")]
    (axis,) = figures.draw_runs(runs, tmp_path / "runs.pdf").axes
    lines = [bar.lines[0] for bar in axis.containers]
    assert [bar.get_label() for bar in axis.containers] == ["one", "two", "three"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 3  # to be read in grey
    for line, bar in zip(lines, axis.containers, strict=True):
        assert drawn(line) == [[0, 0.25], [2, 0.75]]
        ends = [segment.tolist() for segment in bar.lines[2][0].get_segments()]
        assert ends == [[[0, 0.2], [0, 0.5]], [[2, 0.6], [2, 0.8]]]
    assert (tmp_path / "runs.pdf").stat().st_size > 0


@pytest.mark.parametrize("cut", [1, 10, len(json.dumps(ROWS[2])) - 1])
def test_the_line_in_which_a_run_was_stopped_is_skipped(cut, write):
    assert figures.read_metrics(write("m", GOOD[: -cut - 1])) == ROWS[:2]
    assert figures.read_metrics(write("m", GOOD[:-1])) == ROWS  # only the line end is missing


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "m.jsonl: no complete line"),
        ('{"iteration": 0, "ev', "m.jsonl: no complete line"),
        (GOOD + '{"iteration": 3, "ev\n', "m.jsonl, line 4: not JSON"),
        ('{"iteration": 0, "ev\n' + GOOD, "m.jsonl, line 1: not JSON"),
        (GOOD + "\n" + GOOD, "m.jsonl, line 4: not JSON"),
        (GOOD + "[1]\n", 'm.jsonl, line 4: not an object with an "iteration"'),
        ('{"step": 1}\n', 'm.jsonl, line 1: not an object with an "iteration"'),
        (GOOD + '{"iteration": 3, "eval/success": "much"}\n', "m.jsonl, line 4: 'eval/success' is not a number"),
        (json.dumps(ROWS[1]) + "\n", "m.jsonl: no evaluation"),
        (json.dumps({"iteration": 0, "eval/success": 0.5}) + "\n", "m.jsonl: no evaluation"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_named(text, complaint, write, tmp_path):
    metrics = tmp_path / "m.jsonl" if text is None else write("m.jsonl", text)
    for files in ([metrics], [write("good.jsonl", GOOD), metrics]):
        with pytest.raises(SystemExit, match=r"m\.jsonl") as error:
            figures.main([*map(str, files), str(tmp_path / "x.png")])
        assert complaint in error.value.code  # a text: printed, and status 1
        assert "\n" not in error.value.code
    assert not (tmp_path / "x.png").exists()


def test_a_folder_that_cannot_be_written_is_named(write):
    with pytest.raises(SystemExit, match=r"engine\.figures: .*none/x\.png") as error:
        figures.main([str(write("m.jsonl", GOOD)), str(write("m.jsonl", GOOD).parent / "none" / "x.png")])
    assert "\n" not in error.value.code


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["m.jsonl"], 2), (["m.jsonl"] * 2, 2)])
def test_usage_is_shown(arguments, status, capsys, monkeypatch, write):
    """Without a picture at the end, the last metrics file would be taken for it: it must never be written over."""
    path = write("m.jsonl", GOOD)
    monkeypatch.chdir(path.parent)
    with pytest.raises(SystemExit) as error:
        figures.main(arguments)
    assert error.value.code == status
    assert "usage: " in "".join(capsys.readouterr())
    assert path.read_text() == GOOD
