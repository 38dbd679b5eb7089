"""Runs that are killed, stopped, resumed, and exported: nothing is lost, and what comes out is what would have been."""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from conftest import ROOT, SMALL, flags_of, rows, same_metrics, same_weights, until
from huggingface_hub import ModelCard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import eval as evaluation
import train
from config import TrainConfig
from engine import checkpoint, record
from engine.checkpoint import CheckpointError, checkpoints, verify_checkpoint
from engine.record import RecordError, eval_metrics
from engine.stopping import StopRequest, stoppable
from policy import load_policy
from tests import soak
from tools.export import export
from worlds.coin import Coin

# ------------------------------------------------------------------------------------------------------- stopping

EVERY = {"iterations": 2, "eval_every": 1}  # evaluate, sample, evaluate, sample, evaluate: as in `whole`


def same_run(a: Path, b: Path) -> bool:
    names = ("metrics.jsonl", "result.json")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names) and same_weights(a, b)


@pytest.mark.parametrize(
    ("part", "saved", "number"),
    [
        (0, 0, signal.SIGTERM),
        (1, 0, signal.SIGINT),
        (2, 1, signal.SIGHUP),
        (3, 1, signal.SIGUSR1),
        (4, 2, signal.SIGTERM),
    ],
)
def test_a_signal_aborts_sampling_and_nothing_is_lost(run, whole, monkeypatch, part, saved, number):
    """A run stopped only between iterations, which for a large model is later than a cluster waits. With the terminal
    gone the signal handler raised before it stopped anything.

    part: of the five parts in which the run samples, the one in which the signal comes.
    """
    step, begun, steps_after = Coin.step, [], []

    def counted(original):
        return lambda *arguments, **options: begun.append(1) or original(*arguments, **options)

    def signalled(env, action):
        if len(begun) == part + 1:
            steps_after.append(1)
            os.kill(os.getpid(), number)
        return step(env, action)

    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        for module in (train, evaluation):
            patch.setattr(module, "rollout", counted(module.rollout))
        patch.setattr(Coin, "step", signalled)
        patch.setattr(os, "write", gone)
        with pytest.raises(SystemExit, match=f"stopped, .*checkpoint-00000{saved} is complete; resume with --resume"):
            run(**EVERY)
    assert len(steps_after) == 1  # and none of the other episodes went on
    assert same_run(run(**EVERY, resume=True), whole)


def test_a_signal_while_the_policy_learns_waits_for_the_end_of_the_update(run, whole):
    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return train.assign_credit(*arguments)

    with pytest.raises(SystemExit, match=r"stopped, .*checkpoint-000001 is complete"):
        run(assign_credit=signalled, **EVERY)
    assert same_run(run(**EVERY, resume=True), whole)


def test_a_second_ctrl_c_stops_at_once_and_an_echo_of_the_first_does_not():
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    stop.save = Path  # it could save, so it waits for a good place
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the key press on
        stop.since -= 2  # seconds
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stop_while_the_results_are_written_lets_them_be_finished(run, monkeypatch):
    monkeypatch.setattr(record, "draw_curves", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    out = run(iterations=1)
    assert json.loads((out / "result.json").read_text())["after"]["success"] == rows(out)[-1]["eval/success"]


def test_nohup_stays_in_force(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(tmp_path):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [("checkpoint-000001", "the last checkpoint is complete; resume with --resume"), ("", "nothing was saved yet")],
)
def test_ctrl_c_while_a_run_is_prepared_says_what_was_saved(checkpoint, said, tmp_path):
    """It said that the last checkpoint was complete when there was none."""
    (tmp_path / "first_policy" / checkpoint).mkdir(parents=True)
    (tmp_path / checkpoint).mkdir(exist_ok=True)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match=f"^stopped; {said}$"), stoppable(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# ----------------------------------------------------------------------------------------------- killed processes


def test_a_lost_rank_is_told_while_the_launchers_signal_is_still_caught(run, monkeypatch, capsys):
    """Told after the handlers are given back, it was lost whenever the launcher's SIGTERM came in between."""
    said, close = [], StopRequest.close

    def closed(stop):
        said.append(capsys.readouterr().err)
        close(stop)

    def lost(*_):
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:2024")

    monkeypatch.setattr(StopRequest, "close", closed)
    with pytest.raises(SystemExit):
        run(assign_credit=lost, **EVERY)
    assert "another process of this run has ended; resume from the last checkpoint with --resume" in said[0]


def test_another_number_of_ranks_resumes_and_when_one_is_killed_the_others_end(run, whole, cache, tmp_path):
    """A rank that waits for a dead one waits for ever, or for half an hour. torchrun and its ranks are forks."""
    out, log = run(**EVERY | {"iterations": 1}), tmp_path / "log.txt"
    torchrun = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0, "start_method": "fork"}
    flags = SMALL | EVERY | {"iterations": 100_000, "checkpoint_every": 10_000}
    flags |= {"out": out, "cache": cache, "resume": True}
    main = elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **torchrun), train.main)
    (launcher,) = soak.start(flags_of(flags), 1, log, main)
    try:
        until(lambda: len(rows(out)) > 4)
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()])
    except BaseException:
        os.kill(launcher, signal.SIGTERM)
        raise
    (code,), _ = soak.end([launcher])
    assert json.loads((out / "config.json").read_text())["ranks"] == 2
    same_metrics(rows(whole), rows(out)[:3], 1e-6)
    assert code != 0
    assert "another process of this run has ended; resume from the last checkpoint with --resume" in log.read_text()
    assert 'train.py", line' not in log.read_text()  # a traceback of ours; torchrun prints its own


# --------------------------------------------------------------------------------------- checkpoints, the best one


def test_a_full_disk_leaves_the_earlier_checkpoint(run, begun, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run(iterations=4, resume=True)
    monkeypatch.undo()
    assert [path.name for path in begun.glob("*checkpoint*")] == ["checkpoint-000002"]
    run(iterations=4, resume=True)
    assert rows(begun)[-1]["iteration"] == 4


def write_checksums(folder: Path) -> None:
    (folder / checkpoint.CHECKSUMS).write_text(json.dumps(checkpoint.checksums(folder)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint, as far as its checksums go."""
    folder = tmp_path / "checkpoint-000001"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "state.json", "config.json"):
        (folder / name).write_bytes(bytes(range(200)))
    write_checksums(folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "config.json"])
def test_a_damaged_checkpoint_is_named(folder, name):
    content = (folder / name).read_bytes()
    verify_checkpoint(folder)
    for damaged in (content[:100], bytes([content[0] ^ 1]) + content[1:], None):
        (folder / name).write_bytes(damaged) if damaged else (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(folder)


@pytest.mark.parametrize("sums", ["{}", "[]", "null", '{"state.json": "0"}', "{"])
def test_checksums_that_do_not_cover_the_checkpoint_are_refused(folder, sums):
    """With {} the verification was skipped."""
    (folder / checkpoint.CHECKSUMS).write_text(sums)
    with pytest.raises(CheckpointError, match="checkpoint-000001"):
        verify_checkpoint(folder)


def test_copies_of_checkpoints_are_neither_resumed_nor_counted(run, begun):
    for name in ("checkpoint-best", "checkpoint-000002-copy", "checkpoint-9"):
        shutil.copytree(begun / "checkpoint-000002", begun / name)
    run(iterations=4, checkpoint_every=1, resume=True)
    kept = ["checkpoint-000002-copy", "checkpoint-000003", "checkpoint-000004", "checkpoint-9", "checkpoint-best"]
    assert sorted(path.name for path in begun.glob("checkpoint-*")) == kept


def flip(file: Path) -> None:
    """One bit of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_skipped(run, whole, capsys):
    out = run(**EVERY, checkpoint_every=1)
    flip(out / "checkpoint-000002" / "model.safetensors")
    capsys.readouterr()
    run(**EVERY, checkpoint_every=1, resume=True)
    said = "checkpoint-000002 cannot be used: model.safetensors is damaged; resuming from checkpoint-000001\n"
    assert said in capsys.readouterr().out
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000001", "checkpoint-000002"]
    assert same_run(out, whole)
    for folder in checkpoints(out):
        flip(folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*000002 .*optimizer.pt is damaged; .*000001"):
        run(iterations=3, resume=True)


def test_the_best_policy_is_kept_with_its_evaluation(run, evaluate):
    """Steps so large that the policy gets worse: the last is not the best."""
    out = run(iterations=2, eval_every=1, checkpoint_every=1, learning_rate=0.02)
    trained = rows(out)[1:]
    best = max(trained, key=lambda row: row["eval/success"])  # the first of equals
    assert best is not trained[-1]
    kept = json.loads((out / "result.json").read_text())["best"]
    assert (kept["iteration"], kept["success"]) == (best["iteration"], best["eval/success"])
    (result,) = evaluate("--policy", str(out / "best")).values()
    assert eval_metrics(result).items() <= best.items()
    card = ModelCard.load(export(out, best=True) / "README.md")
    assert card.data.eval_results[0].metric_value == best["eval/success"]
    assert "number is too high" in card.text


# ------------------------------------------------------------------------------------- what may change on resume


def test_the_advice_after_out_of_memory_may_be_taken_on_resume():
    """--resume refused the very flag that the message named."""
    found = [re.findall(r"explain_out_of_memory\(.*", (ROOT / name).read_text()) for name in ("train.py", "update.py")]
    advice = [line for lines in found for line in lines if "loading" not in line]  # then there is nothing to resume
    flags = set(re.findall(r"--(\w+)", str(advice)))
    assert flags == {"batch_size", "micro_batch_tokens", "gradient_checkpointing"}
    assert flags <= checkpoint.MAY_CHANGE


def test_a_run_resumes_with_its_work_divided_in_another_way(run, whole):
    out = run(**EVERY | {"iterations": 1})
    divided = {"batch_size": 5, "micro_batch_tokens": 300, "gradient_checkpointing": True, "threads": 2}
    run(**EVERY, resume=True, **divided)
    same_metrics(rows(whole), rows(out), 1e-5)
    saved = json.loads((checkpoints(out)[-1] / "state.json").read_text())["config"]
    assert divided.items() <= saved.items()  # eval.py plays as many at a time


@pytest.mark.parametrize(
    ("before", "now", "may"),
    [
        ("retriever=http://a:1 topk=3", "topk=3 retriever=http://b:2", True),
        ("questions=old/q.jsonl corpus=old/c.jsonl", "questions=new/q.jsonl corpus=new/c.jsonl", True),
        ("questions=old/q.jsonl", "questions=old/q.jsonl corpus=c.jsonl", False),
        ("retriever=http://a:1", "", False),
        ("topk=3", "topk=4", False),
    ],
)
def test_a_source_of_the_world_may_be_at_another_place(before, now, may):
    """A search server at another port, or data that moved, ended the run."""
    one, other = (TrainConfig(env="search", env_args=args.split()) for args in (before, now))
    assert checkpoint._changed_flags(other, asdict(one)) == ("" if may else f"--env_args {before}")


# ------------------------------------------------------------------------------------------------ export, trackers


def test_the_export_opens_and_its_card_has_the_numbers_of_the_run(whole, tmp_path):
    """Text from the command line that is YAML or Markdown must stay text."""
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    about = json.loads((out / "config.json").read_text())
    about["argv"] = ["train.py", "--policy", "---\n- x: `y`\n# heading\n---"]
    about["config"]["policy"] = "a: [b\n---\n`c`"
    (out / "config.json").write_text(json.dumps(about))
    folder, after = export(out), rows(out)[-1]
    assert same_policy(folder, checkpoints(out)[-1])
    card = ModelCard.load(folder / "README.md")
    (evaluated,) = card.data.eval_results
    assert (evaluated.dataset_type, evaluated.metric_value) == ("coin", after["eval/success"])
    assert evaluated.metric_args["low"] == after["eval/success_low"]
    assert card.data.base_model is None
    assert {"reinforcement-learning", "grpo", "empg", "coin"} <= set(card.data.tags)
    assert f"Success in 6 held-out tasks (split `eval`), {100 * after['eval/success']:.1f} %" in card.text
    assert about["git"] in card.text
    assert not [line for line in card.text.splitlines() if line.startswith(("---", "- x", "# heading"))]
    assert not {"optimizer.pt", "state.json"} & {path.name for path in folder.iterdir()}
    (out / "result.json").unlink()
    with pytest.raises(CheckpointError, match="holds no finished run"):
        export(out)


def test_an_export_replaces_what_an_export_wrote_and_nothing_else(begun, monkeypatch):
    """It removed the folder, with a card that somebody had written and a repository, before the new card was made."""
    folder = export(begun)
    kept = {"README.md": "by hand", ".git/HEAD": "ref: refs/heads/main"}
    card = (folder / "README.md").read_text()
    (folder / ".git").mkdir()
    for name, text in kept.items():
        (folder / name).write_text(text)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("tools.export.model_card", lambda *arguments: {}["a fault"])
        with pytest.raises(CheckpointError):
            export(begun)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert export(begun, best=True) == folder
    assert {name: (folder / name).read_text() for name in kept} == kept
    assert "number is too high" in (folder / "README.new.md").read_text()
    (folder / "README.md").unlink()
    assert (export(begun) / "README.md").read_text() == card
    assert not (folder / "README.new.md").exists()
    (folder / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was not written by an export; move it"):
        export(begun, best=True)
    assert (folder / "model.safetensors").read_text() == "mine"
    assert (folder / "README.md").read_text() == card


def same_policy(a: Path, b: Path) -> bool:
    first, second = (load_policy(str(folder)) for folder in (a, b))
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return first.encode(["heads"]) == second.encode(["heads"]) and all(torch.equal(x, y) for x, y in weights)


@pytest.mark.parametrize("policy", ["Qwen/Qwen2.5-1.5B-Instruct", "tiny"])
def test_the_card_names_a_base_model_that_is_on_the_hub(whole, tmp_path, policy):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    about = json.loads((whole / "config.json").read_text())
    about["config"]["policy"] = policy
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    data = ModelCard.load(export(tmp_path / "run") / "README.md").data
    assert (data.base_model, data.license) == ((None, "mit") if policy == "tiny" else (policy, "other"))


def test_any_tracker_of_accelerate_gets_the_rows(run, monkeypatch):
    """tensorboard needs a folder, which it was not given, so --report_to tensorboard ended in a traceback."""
    seen = []

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "swanlab", True, None, True

        def __init__(self, run_name, logging_dir, **options):
            super().__init__()
            self.folder = Path(logging_dir)

        def store_init_configuration(self, values):
            if values["zeta"] == 0.5:
                raise OSError("no\nlogin")

        def log(self, values, step, **options):
            seen.append((self.folder, {"iteration": step} | values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "swanlab", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType("swanlab")])
    out = run(report_to="swanlab")
    assert seen == [(out, row) for row in rows(out)]
    with pytest.raises(RecordError, match=r"^could not start swanlab: no login$"):
        run("other", report_to="swanlab", zeta=0.5)
