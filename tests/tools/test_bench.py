"""The benchmark with a tiny model: every figure is there and is a positive number, and the file holds all of them."""

import json
import math
from functools import partial

import pytest

from tools import bench, limits
from tools.limits import PARTS
from tools.loads import Load

TINY = Load((32, 64, 2, 4, 2, 1024), episodes=8, trained=2, step_tokens=4, context=512, rows=2, turns=2)


@pytest.mark.usefixtures("no_precision_yet")
def test_every_figure_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(limits, "copy_bandwidth", partial(limits.copy_bandwidth, size=2**20))  # a GB takes too long
    monkeypatch.setattr(bench, "LOADS", {"cpu": {"tiny": TINY}, "cuda": {"tiny": TINY}})
    monkeypatch.setattr(
        "sys.argv", ["bench", "--repeats", "1", "--threads", "1", "--out", str(tmp_path / "bench.json")]
    )
    bench.main()
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    lines = capsys.readouterr().out.splitlines()
    assert {line[:75].strip() for line in lines} == {*result}
    assert len(lines) == len(result) + 2  # the figures of the `generate` loop came after each of two turns
    result = {name.removeprefix("tiny, "): value for name, value in result.items()}
    assert result["turns an episode"] == 2
    assert all(math.isfinite(value) for value in result.values())
    assert {name[-7:] for name, value in result.items() if value <= 0} <= {"capture"}  # a CPU captures no graphs
    assert len([name for name in result if "share" in name]) == 2
    for piece in ("update, seconds of", "decode step, ms of"):
        parts = [name.removeprefix(piece).strip() for name in result if name.startswith(piece)]
        assert {"attention", "casts", "matrix products", "the rest"} <= {*parts} <= {*PARTS, "the rest"}
    assert {"update, seconds of optimizer", "update, seconds of head and its recomputation"} <= {*result}


@pytest.mark.parametrize(
    "flags", [["--repeats", "0"], ["--threads", "-1"], ["--only", "mars"], ["--out", "/dev/null/a"]]
)
def test_a_benchmark_that_cannot_be_made_ends_before_it_measures(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    monkeypatch.setattr(bench, "start_ranks", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(SystemExit) as end:
        bench.main()
    *usage, line = (capsys.readouterr().err or str(end.value)).strip().splitlines()
    assert [words[:6] for words in usage] in ([], ["usage:"])
    assert "error: " in line or "could not write" in line
