"""Files of a run: read in spite of damage or with one line, written whole, locked, and never lost without a word."""

import json
import math
import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from config import TrainConfig
from engine import checkpoint, files, record
from engine.checkpoint import CheckpointError, run_position, sources_of
from engine.files import RecordError, content_digest, read_json, replace_file, replacing, require_writable_file
from engine.record import Record

# ------------------------------------------------------------------------------------------------ reading and writing


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_not_json_is_one_line_that_names_the_file(text, tmp_path):
    """Deep nesting was a RecursionError."""
    (tmp_path / "f").write_bytes(text)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'f'}: not JSON .+$"):
        read_json(tmp_path / "f")


def test_an_integer_that_no_float_holds_is_infinite(tmp_path):
    """It was an OverflowError where it met a float."""
    (tmp_path / "f").write_text(f"[1, {'9' * 299}, {'9' * 400}, -{'9' * 5000}]")
    assert read_json(tmp_path / "f") == [1, 10**299 - 1, math.inf, -math.inf]


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file, link = tmp_path / "real" / "file", tmp_path / "link"
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to(file)

    def killed():
        with replacing(link) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert file.read_text() == "old"
    replace_file(link, "−")
    assert link.read_bytes() == "−".encode()
    assert file.read_text() == "old"  # a link in somebody's folder may lead to a file of yours
    assert not link.is_symlink()
    replace_file(Path("/dev/null"), "a device is written to")
    assert not Path("/dev/null").is_file()


def test_a_result_that_cannot_be_written_is_refused_before_the_measurement(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(RecordError, match="could not write"):
            require_writable_file(path)
    require_writable_file(tmp_path / "new" / "file")
    require_writable_file(tmp_path / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["file", "new"]
    assert (tmp_path / "file").read_text() == "kept"


# ---------------------------------------------------------------------------------------------------------- the logs

LINES = [json.dumps({"iteration": i, "reward/mean": i / 7}) for i in range(5)]
DAMAGE = {
    "missing": None,
    "empty": "",
    "bad line": [*LINES[:2], "{", *LINES[3:]],
    "zeros": [*LINES[:2], "\0" * 40, *LINES[3:]],
    "deep": [*LINES[:2], "[" * 100_000, *LINES[3:]],
    "huge": [*LINES[:2], '{"iteration": ' + "9" * 400 + "}", *LINES[3:]],
    "no number": [*LINES[:2], '{"iteration": "2"}', *LINES[3:]],
    "line gone": [*LINES[:2], *LINES[3:]],
    "twice": [*LINES, LINES[2]],
    "cut": [*LINES[:2], LINES[2][:-3]],
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_blocks_no_checkpoint_and_no_row_is_lost_without_a_word(name, damage, tmp_path, capsys):
    """It ended the run with `cannot resume`, or the row was missing afterwards and nothing was said."""
    config = TrainConfig(out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    logs = Record(config, Accelerator(cpu=True))
    for file in ("metrics.jsonl", "timings.jsonl"):
        (logs.out / file).write_text("".join(f"{line}\n" for line in LINES))
    if DAMAGE[damage] is None:
        (logs.out / name).unlink()
    else:
        (logs.out / name).write_text("\n".join(DAMAGE[damage]) + "\n" * (damage != "cut"))
    before = (logs.out / name).read_bytes() if DAMAGE[damage] is not None else None
    logs.open(last=3)
    logs.progress.close()
    whole = "timings.jsonl" if name == "metrics.jsonl" else "metrics.jsonl"
    assert (logs.out / whole).read_text().splitlines() == LINES[:4]
    kept = (logs.out / name).read_text().splitlines()
    assert kept == [line for line in LINES[:4] if line in (DAMAGE[damage] or ())]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "resuming without" in line]
    assert str(logs.out / name) in said
    assert not (logs.out / f"{whole}.damaged").exists()
    if before is not None:
        assert (logs.out / f"{name}.damaged").read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_stands_in_the_place_of_a_log_is_moved_aside(kind, tmp_path):
    logs = Record(TrainConfig(out=str(tmp_path / "run"), cache=str(tmp_path / "cache")), Accelerator(cpu=True))
    place = logs.out / "metrics.jsonl"
    place.mkdir() if kind == "folder" else place.symlink_to(tmp_path / "nothing")
    logs.open(last=1)
    logs.progress.close()
    assert place.read_text() == ""
    assert not (tmp_path / "nothing").exists()


def test_a_run_takes_no_folder_that_holds_a_model(tmp_path):
    """`--policy FOLDER --out FOLDER` wrote the run's config.json over the model's, which no longer opened."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(RecordError, match=r"holds no run but another config.json; choose another --out"):
        Record(TrainConfig(out=str(tmp_path), cache=str(tmp_path / "cache")), Accelerator(cpu=True))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------------- what a run began with


def test_a_commit_is_of_this_repository_or_none(tmp_path, monkeypatch):
    """Inside another repository its commit was recorded. Without git it was a traceback, after the imitation."""
    assert len(record.revision()) == 40
    outer, hashed = tmp_path / "outer", "1" * 40
    for folder in ("objects", "refs"):
        (outer / ".git" / folder).mkdir(parents=True)
    (outer / ".git" / "HEAD").write_text(hashed)
    with monkeypatch.context() as patch:
        patch.setattr(record, "__file__", str(outer / "engine" / "record.py"))
        assert record.revision() == hashed
        patch.setattr(record, "__file__", str(outer / "copy" / "engine" / "record.py"))
        assert record.revision() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.revision() == ""


@pytest.fixture
def saved(tmp_path):
    """saved(of, **changed) makes the checkpoint of a run, as far as its position goes."""

    def save(of: TrainConfig, **changed) -> Path:
        _, begun = run_position(of, "no")
        begun.iteration, begun.after = 1, {"success": 0.0}
        checkpoint.write_folder(Path(of.out) / "checkpoint-000001", lambda aside: None, vars(begun) | changed)
        return Path(of.out)

    return save


@pytest.mark.parametrize("flag", ["--policy", "--env_args questions", "--env_args corpus"])
def test_resume_sees_that_what_a_flag_names_has_changed(flag, saved, tmp_path):
    """Other tasks, or another KL reference, and nothing was said."""
    for name in ("policy", "policy/run", "corpus"):
        (tmp_path / name).mkdir()
    named = {"--policy": tmp_path / "policy" / "model.safetensors"}
    named |= {"--env_args questions": tmp_path / "q.jsonl", "--env_args corpus": tmp_path / "corpus" / "c.jsonl"}
    for file in named.values():
        file.write_text("as it was")
    flags = {"policy": str(tmp_path / "policy"), "env": "search", "out": str(tmp_path / "policy" / "run")}
    flags["env_args"] = [f"questions={named['--env_args questions']}", f"corpus={tmp_path / 'corpus'}"]
    config = TrainConfig(**flags)
    resumed = TrainConfig(**flags, resume=True)
    saved(config)
    os.utime(named[flag], (1, 1))
    (tmp_path / "policy" / "README.md").write_text("a note")
    assert run_position(resumed, "no")[1].sources == sources_of(config)
    named[flag].write_text("as it is.")  # of the same length
    with pytest.raises(CheckpointError, match=f"^what {flag} names is not what .+ was trained with; .+$"):
        run_position(resumed, "no")
    named[flag].write_text("as it was")
    assert run_position(resumed, "no")[1].sources.keys() == named.keys()


def test_caches_and_hidden_files_of_a_source_do_not_count(tmp_path):
    (tmp_path / "code.py").write_text("1")
    before = content_digest(tmp_path, "**/*")
    for name in ("__pycache__/code.pyc", ".git/HEAD"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("2")
    assert content_digest(tmp_path, "**/*") == before
    (tmp_path / "new.py").write_text("3")
    assert content_digest(tmp_path, "**/*") != before


@pytest.mark.parametrize(
    ("state", "named"),
    [({"from_the_future": 1}, "from_the_future"), ({"config": {"moon": 2}}, "--moon"), ({"config": [1]}, "keys")],
)
def test_a_checkpoint_of_another_version_is_one_line(state, named, saved, tmp_path):
    config = TrainConfig(out=str(tmp_path / "run"))
    saved(config, **state)
    with pytest.raises(CheckpointError, match=f"^.+checkpoint-000001 is of another version of this code: .*{named}.*$"):
        run_position(TrainConfig(out=config.out, resume=True), "no")


def test_the_lock_of_a_folder_can_be_taken_again_by_the_process_that_has_it(tmp_path):
    """The study holds it while `train` takes it."""
    with files.lock_of(tmp_path / "run") as lock:
        again = files.lock_of(tmp_path / "run")
        again.acquire(timeout=0)
        assert again is lock
        again.release()
        assert lock.is_locked
    assert not lock.is_locked
