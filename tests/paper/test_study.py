"""The study: methods differ in nothing but the method, rows repeat, statistics match scipy, tables match the rows."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tqdm import tqdm

from config import TrainConfig, parse_config
from empg import kl_k3
from engine.checkpoint import checkpoints
from engine.files import RecordError
from envs import make_envs
from episode import Task
from paper import measure, pictures, report, study
from paper.rows import (
    Entry,
    Study,
    add_row,
    area,
    collapsed,
    estimate,
    read_credit,
    read_file,
    read_rows,
    sampled_and_greedy,
    success,
)
from policy import load_policy
from rollout import rollout

METHOD_FLAGS = {"algorithm", "empg", "k", "k_future", "zeta"}
METHOD_FLAGS |= {"clip_low", "clip_high", "aggregation", "dynamic_sampling", "overlong_buffer"}  # of the algorithm

# Flags of committed rows, and what has taken their place. The first two methods are credit functions now.
SINCE_THE_ROWS = {"--normalization rank": "", "--no_bonus_in_all_groups": "", "--data ": "--env_args data="}
SINCE_THE_ROWS |= {"--env_args data=out/study_games --env_args": "--env_args data=out/study_games"}

# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("world", study.WORLDS)
def test_methods_of_a_world_differ_in_nothing_but_the_method(world):
    """A comparison in which one method has more iterations, or another learning rate, compares these."""
    configs = {m: asdict(parse_config(TrainConfig, study.train_flags(world, m, 3))) for m in study.METHODS}
    for config in configs.values():
        assert {name for name in config if config[name] != configs["grpo"][name]} <= METHOD_FLAGS
        assert (config["env"], config["seed"], config["threads"]) == (world.partition("_")[0], 3, 1)
    flags = {method: tuple(str(config[name]) for name in sorted(METHOD_FLAGS)) for method, config in configs.items()}
    assert len({(flags[method], study.credit_of(method)) for method in flags}) == len(study.METHODS)
    for name in ("dapo_empg", "grpo_empg"):
        assert (configs[name]["k"], configs[name]["k_future"], configs[name]["zeta"]) == (1, 1, 0.1)  # the paper's


@pytest.fixture
def coin(monkeypatch, cache):
    """A world of seconds in the place of the study's."""
    flags = "--env coin --iterations 2 --eval_every 1 --tasks_per_iteration 3 --group_size 4"
    flags += f" --demonstrations 240 --slip 0.6 --max_step_tokens 24 --max_tokens 256 --cache {cache}"
    monkeypatch.setitem(study.WORLDS, "coin", Entry("coin", flags))
    monkeypatch.setitem(study.TASKS, "coin", 12)


def test_a_row_comes_out_the_same_again(coin, tmp_path):
    """Also where an earlier run was stopped, and saved."""
    (tmp_path / "b" / "coin" / "grpo_empg" / "3" / "checkpoint-000001").mkdir(parents=True)
    rows = [study.run_row("coin", "grpo_empg", 3, str(tmp_path / name)) for name in ("a", "b")]
    changing = [{name: row.pop(name) for name in ("seconds",)} for row in rows]
    assert rows[0] == rows[1]
    parts = ("sample", "learn", "capture")
    assert all(set(part["seconds"]) == {"train", "measure", *parts} for part in changing)
    assert [[len(part["seconds"][name]) for name in parts] for part in changing] == [[2, 2, 2]] * len(rows)
    (row, _) = rows
    assert len(row["curve"]) == len(row["entropy"]) == 2
    assert row["episodes"] == 24
    assert row["eval"]["eval"]["episodes"] == 12
    assert [iteration for iteration, _ in row["kl"]] == [0, 1, 2]
    assert row["kl"][0][1] == pytest.approx(0, abs=1e-4)  # the first policy sampled the episodes of iteration 1
    assert row["kl"][-1][1] > 0
    assert str(tmp_path) not in row["command"]
    assert "--methods grpo_empg --seeds 3" in row["command"]


def test_a_row_of_a_pretrained_policy_holds_its_success_at_temperature_0(coin, monkeypatch, house_policy, tmp_path):
    house_policy.save(tmp_path / "model")
    words = f"--policy {tmp_path / 'model'} --demonstrations 8 --imitation_rate 1e-3"
    flags = re.sub("--demonstrations 240", words, study.WORLDS["coin"].flags)
    monkeypatch.setitem(study.WORLDS, "coin", Entry("coin", flags))
    row = study.run_row("coin", "grpo", 0, str(tmp_path / "runs"))
    limits = {"max_step_tokens": 24, "max_tokens": 256}
    tasks, seeds = [Task("coin", "eval", n) for n in range(12)], [(99, n) for n in range(12)]  # the seeds do not matter
    last = load_policy(str(checkpoints(tmp_path / "runs" / "coin" / "grpo" / "0")[-1]))
    played = rollout(last, make_envs("coin", [], 5), tasks, seeds, temperature=0, **limits)
    at_0 = np.mean([episode.success for episode in played])
    assert row["greedy"]["eval"]["success"] == pytest.approx(at_0, abs=1e-4)
    assert len(json.dumps(row)) < 20_000  # a row may have to be carried by hand
    monkeypatch.setattr("paper.rows.read_rows", lambda name: [row] if name == "coin" else [])
    assert sampled_and_greedy("coin")[1].of("grpo")[0]["eval"] == row["greedy"]


def test_rows_that_are_there_are_not_run_again(monkeypatch, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"method": "grpo", "seed": 1, "machine": "of another kind"}) + "\n")
    argv = ["study", "--world", "house", "--methods", "grpo", "--seeds", "1", "--results", str(file)]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(study, "run_row", None)  # whoever runs it would call it
    study.main()
    assert len(file.read_text().splitlines()) == 1


def test_a_file_with_rows_of_another_world_is_refused(monkeypatch, tmp_path):
    """All rows counted as there, nothing was run, and the status was 0."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"world": "search", "method": "grpo", "seed": 1, "machine": study.machine()}) + "\n")
    argv = ["study", "--world", "house", "--methods", "grpo", "--seeds", "1", "--results", str(file)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match=r"rows.jsonl holds rows of search$"):
        study.main()


def test_a_row_is_added_after_one_that_was_cut_in_a_letter(tmp_path):
    """The run had trained for hours before the error."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"seed": 0, "machine": "m"}\n{"seed": 1, "m\xff')
    add_row(file, {"seed": 2, "machine": "m"})
    assert [row["seed"] for row in read_file(file)] == [0, 2]


def test_rows_with_other_random_numbers_are_no_pair():
    old, new = ({"method": method, "seed": 0, "machine": kind} for method, kind in (("a", "x"), ("b", "x, other")))
    assert Study([old, new]).together("a", "b") == []
    assert study.machine().endswith(study.STREAMS)


def test_a_row_that_is_asked_for_twice_is_made_once(monkeypatch, tmp_path):
    """By repeated seeds, and by two studies of which the second waits. Both made it; the second removed the folder."""
    assert study.missing([], ["grpo", "grpo"], [7, 7], "here") == [("grpo", 7)]
    config = study.StudyConfig(world="house", results=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"))
    run = tmp_path / "out" / "house" / "grpo" / "7"
    run.mkdir(parents=True)
    row = {"world": "house", "method": "grpo", "seed": 7, "machine": study.machine()}
    other = f"""
import filelock, pathlib, time
with filelock.FileLock({str(run / ".lock")!r}):
    mine = pathlib.Path({str(run / "mine")!r})
    mine.touch()
    print(flush=True)
    time.sleep(0.5)  # in which the folder is not removed
    assert mine.exists()
    pathlib.Path({str(config.file)!r}).write_text({json.dumps(row)!r} + chr(10))
"""
    monkeypatch.setattr(study.os, "setpgrp", lambda: None)
    monkeypatch.setattr(study, "run_row", None)  # whoever makes the row would call it
    first = subprocess.Popen([sys.executable, "-c", other], stdout=subprocess.PIPE)
    first.stdout.readline()
    study.make_row(config, "grpo", 7)
    assert first.wait() == 0
    assert read_file(config.file) == [row]


def test_a_row_of_metrics_that_are_not_of_its_run_alone_is_refused(coin, monkeypatch, tmp_path):
    """Of two studies at once rows with 78 values for 40 iterations were recorded, and the status was 0."""

    def train(config, credit):
        (tmp_path / "coin" / "grpo" / "3" / "metrics.jsonl").write_text(lines)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "measure", lambda config, tasks: {})
    monkeypatch.setattr(study.os, "setpgrp", lambda: None)
    config = study.StudyConfig(world="coin", results=str(tmp_path / "rows.jsonl"), out=str(tmp_path))
    for iterations in ([0, 1, 1, 2], [0, 2], [0, 1], [0, 1, 2, 3], [1, 2]):
        lines = "".join(f'{{"iteration": {iteration}}}\n' for iteration in iterations)
        with pytest.raises(SystemExit, match=r"^coin grpo 3 failed: .* has not the iterations 0 to 2.*log\.txt$"):
            study.make_row(config, "grpo", 3)
    assert not config.file.exists()
    assert "Traceback" in (tmp_path / "coin" / "grpo" / "3" / "log.txt").read_text()


def test_ctrl_c_ends_a_study_and_the_rows_that_are_finished_are_there(monkeypatch, tmp_path):
    """It trained every other run to its end, and recorded none."""

    def ignores_ctrl_c(process: int) -> bool:
        mask = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{process}/status").read_text())[1]
        return bool(int(mask, 16) >> signal.SIGINT - 1 & 1)

    def run_row(world, method, seed, out):
        with (tmp_path / "began").open("a") as file:
            print(seed, os.getpid(), os.getpgrp(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, file=file)
        if seed:
            while ignores_ctrl_c(os.getppid()):  # the study ignores Ctrl-C while it starts a run
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(600)
        return {"world": world, "method": method, "seed": seed, "machine": study.machine()}

    fork = multiprocessing.get_context("fork")  # which imports nothing again
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(study, "run_row", run_row)
    config = study.StudyConfig(world="house", results=str(tmp_path / "rows"), out=str(tmp_path / "out"), jobs=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores Ctrl-C
    try:
        with pytest.raises(SystemExit, match=r"^stopped; 2 of 3 rows are missing, the same command makes them$"):
            study.make_rows(config, [("grpo", seed) for seed in range(3)], tqdm(disable=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row["seed"] for row in read_file(config.file)] == [0]
    seeds, processes, groups, ignored = zip(*map(str.split, (tmp_path / "began").read_text().splitlines()), strict=True)
    assert seeds == ("0", "1")
    assert processes == groups  # each is in a group of its own, and a terminal signals that of the study alone
    assert ignored == ("True", "True")  # while it imports, before it has its own group
    assert not [number for number in processes if Path(f"/proc/{number}").exists()]


def test_a_row_that_is_made_again_leaves_the_run_of_the_first():
    """The command `one row again` removed it."""
    assert study.StudyConfig(world="house").folder == "out/study"
    assert study.StudyConfig(world="house", results="/tmp/again.jsonl").folder == "/tmp/again.jsonl.runs"
    assert study.StudyConfig(world="house", results="again.jsonl", out="here").folder == "here"


@pytest.mark.parametrize("end", ["", "\n", '\n{"seed": 2, "mach'])
def test_a_row_that_is_cut_off_is_left_out_with_a_word_and_made_again(end, tmp_path, capsys):
    rows = [{"seed": seed, "machine": "−"} for seed in range(3)]
    file = tmp_path / "rows.jsonl"
    add_row(file, rows[0])
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(rows[1], ensure_ascii=False) + end)
    assert read_file(file) == rows[:2]
    assert (f"{file}, line 3: cut off" in capsys.readouterr().err) == (len(end) > 1)
    add_row(file, rows[2], once=True)
    add_row(file, rows[2], once=True)
    assert read_file(file) == rows
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"seed": 1}', "[" * 100_000])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    (tmp_path / "rows").write_text(f'{line}\n{{"seed": 1, "machine": ""}}\n')
    with pytest.raises(RecordError, match=f"^{tmp_path / 'rows'}, line 1: not .+; repair or delete the line$"):
        read_file(tmp_path / "rows")


def test_a_seed_is_finished_by_the_kind_of_machine_that_has_all_its_methods():
    """The same seed rounds otherwise on another kind of machine, so its warm start and its pair are others."""
    there = {"here": {0: ["a", "b"], 1: ["a"], 3: ["b"]}, "elsewhere": {1: ["b"], 2: ["a", "b"], 3: ["a", "b"]}}
    rows = [
        {"method": method, "seed": seed, "machine": kind}
        for kind, seeds in there.items()
        for seed, methods in seeds.items()
        for method in methods
    ]
    assert study.missing(rows, ["a", "b"], [0, 1, 2, 3, 4], "here") == [("b", 1), ("a", 4), ("b", 4)]
    assert study.missing(rows, ["b"], [1, 4], "here") == [("b", 4)]
    assert study.missing([], ["a"], [0], "here") == [("a", 0)]


def test_the_games_of_alfworld_are_written_once_and_in_small_rooms(monkeypatch, tmp_path):
    pytest.importorskip("alfworld")
    monkeypatch.setattr(study, "GAMES", {"train": 2, "valid_seen": 1})
    study.write_games(tmp_path)
    games = sorted(tmp_path.rglob("game.tw-pddl"))
    assert [path.relative_to(tmp_path).parts[1] for path in games] == ["train", "train", "valid_seen"]
    for path in games:
        assert json.loads(path.read_text())["pddl_problem"].partition("(:goal")[0].count("(receptacleType ") == 5
    written = [path.stat().st_mtime_ns for path in games]
    study.write_games(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("game.tw-pddl"))] == written


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--world", "moon", "world must be one of"), ("--methods", "ppo", "got ppo"), ("--jobs", "-1", "at least 0")],
)
def test_bad_flags_end_with_one_line(monkeypatch, capsys, flag, value, message):
    argv = {"--world": "house"} | {flag: value}
    monkeypatch.setattr("sys.argv", ["study", *(word for pair in argv.items() for word in pair)])
    with pytest.raises(SystemExit) as error:
        study.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ measures


def test_kl_to_another_policy_is_the_mean_of_k3_over_sampled_tokens(house_policy, house_episodes, monkeypatch):
    class Sharper:
        """The policy with its logits doubled."""

        device = house_policy.device

        @staticmethod
        def model(**inputs):
            output = house_policy.model(**inputs)
            output.logits = 2 * output.logits
            return output

    values = []
    for episode in house_episodes:
        logits = house_policy.model(input_ids=torch.tensor([episode.ids])).logits[0]
        for place, step in enumerate(episode.step_ids):
            if step >= 0:
                logp = (2 * logits[place - 1]).log_softmax(-1)[episode.ids[place]]
                values.append(float(kl_k3(torch.tensor(episode.old_logp[place]), logp.detach())))
    assert measure.kl_to(Sharper, house_episodes) == pytest.approx(np.mean(values), rel=1e-3)


def test_entropy_does_not_change_under_the_policy_itself(house_policy):
    envs = make_envs("house", ["max_steps=4"], 6)
    episodes = rollout(house_policy, envs, [Task("house", "eval", n) for n in range(6)], [(0, n) for n in range(6)])
    change = measure.entropy_change(episodes, house_policy)
    assert len(change["token"]) == measure.BINS
    for before, after in change["token"] + change["step"]:
        assert after == pytest.approx(before, abs=2e-3)
    befores = [before for before, _ in change["token"]]
    assert befores == sorted(befores)
    assert befores[0] < befores[-1]


def test_percentiles_are_equal_parts_in_the_order_of_before():
    before, after = torch.arange(100.0).flip(0), torch.arange(100.0).flip(0) ** 2
    parts = measure.by_percentile(before, after)
    assert parts[1] == [7.0, (25 + 36 + 49 + 64 + 81) / 5]  # 5 to 9


# ---------------------------------------------------------------------------------------------------------- statistics


def made_up(values: dict[str, dict[int, float]], machine: str = "one") -> list[dict]:
    def part(x: float) -> dict:
        return {"episodes": 10, "success": x}

    return [
        {
            "method": method,
            "seed": seed,
            "machine": machine,
            "eval": {"a": part(x), "b": part(0.0)},
            "curve": [0.2, x],
        }
        for method, seeds in values.items()
        for seed, x in seeds.items()
    ]


def test_means_and_paired_differences_have_the_intervals_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.random(7).tolist(), rng.random(7).tolist()
    world = Study(made_up({"grpo": dict(enumerate(a)), "grpo_empg": dict(enumerate(b))}))
    mean, difference = world.mean("grpo"), world.difference("grpo_empg", "grpo")
    for got, expected in (
        (mean, stats.ttest_1samp(a, 0).confidence_interval()),
        (difference, stats.ttest_rel(b, a).confidence_interval()),
    ):
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
        assert got.seeds == 7
    assert difference.mean == pytest.approx(np.mean(b) - np.mean(a))
    assert world.difference("grpo_empg", "grpo", area).mean == pytest.approx(difference.mean / 2)


def test_differences_are_of_the_seeds_that_both_have():
    world = Study(made_up({"grpo": {0: 0.5, 1: 0.1, 2: 0.9}, "dapo": {1: 0.2, 2: 0.9, 5: 0.7}}))
    assert [a["seed"] for a, _ in world.together("grpo", "dapo")] == [1, 2]
    assert world.difference("dapo", "grpo").mean == pytest.approx(0.05)
    assert [collapsed(row) for row in world.of("grpo")] == [False, True, False]
    assert estimate([0.5]).text() == "50.0 (one seed)"
    assert estimate([]).text() == "no row yet"
    assert estimate([0.5, 0.7]).text() == "60.0 (two seeds)"
    assert estimate([0.5, 0.5, 0.5]).text(sign=True) == "+50.0 (+50.0 to +50.0)"


def test_a_pair_is_of_one_kind_of_machine_and_each_seed_counts_once():
    first = made_up({"grpo": {0: 0.5, 1: 0.1, 2: 0.9}, "dapo": {0: 0.6, 3: 0.4}}, "one")
    second = made_up({"grpo": {1: 0.2, 0: 0.0}, "dapo": {0: 0.9, 1: 0.5, 2: 0.7}}, "two")
    world = Study(first + second)
    assert [a["seed"] for a, _ in world.together("dapo", "grpo")] == [0, 1]  # of 2 there is a row on each
    assert world.difference("dapo", "grpo").mean == pytest.approx(np.mean([0.6 - 0.5, 0.5 - 0.2]))
    assert world.mean("grpo").mean == pytest.approx(np.mean([0.5, 0.1, 0.9]))
    assert Study(second + first).difference("dapo", "grpo").mean == pytest.approx(np.mean([0.9 - 0.0, 0.5 - 0.2]))


def test_sampled_and_greedy_rows_are_of_the_same_policies(monkeypatch):
    """A seed on another kind of machine is another policy; the warm start's sampled success is that of iteration 1."""
    sampled = made_up({"grpo": {0: 0.5, 1: 0.6, 2: 0.7}, "grpo_empg": {0: 0.4}}) + made_up({"grpo": {1: 0.1}}, "two")
    greedy = made_up({"first": {0: 0.8}, "grpo": {0: 0.9}, "grpo_empg": {0: 0.95}}) + made_up({"grpo": {1: 1.0}}, "two")
    rows = {"house": sampled, "greedy": [row | {"world": "house"} for row in greedy]}
    monkeypatch.setattr("paper.rows.read_rows", lambda name: rows.get(name, []))
    at_1, at_0 = sampled_and_greedy("house")

    def of(study: Study, method: str) -> list[tuple]:
        return [(row["seed"], row["machine"], success(row)) for row in study.of(method)]

    assert of(at_1, "grpo") == [(0, "one", 0.5), (1, "two", 0.1)]
    assert of(at_0, "grpo") == [(0, "one", 0.9), (1, "two", 1.0)]
    assert of(at_1, "first") == [(0, "one", 0.2)]
    assert at_1.difference("grpo_empg", "grpo").mean == pytest.approx(-0.1)
    assert at_0.difference("grpo_empg", "grpo").mean == pytest.approx(0.05)
    assert [study.rows for study in sampled_and_greedy("webshop")] == [{}, {}]


# --------------------------------------------------------------------------------------------------- tables and figures


def test_the_tables_of_the_documents_are_what_the_committed_rows_give():
    """A number in a document is a number of a row."""
    for name in report.DOCUMENTS:
        text = (report.ROOT / name).read_text()
        assert "<!-- end -->" in text
        assert report.filled(text) == text, f"{name} is stale: python -m paper.report"


def prose() -> str:
    """docs/results.md without its generated tables, in one line."""
    text = (report.ROOT / "docs/results.md").read_text()
    return " ".join(re.sub(r"<!-- [a-z ]+ -->.*?<!-- end -->", "", text, flags=re.DOTALL).split())


def test_every_interval_in_the_prose_of_the_results_stands_in_a_table():
    found = re.findall(r"[+−]?\d+\.\d+ \([+−]?\d+\.\d+ to [+−]?\d+\.\d+\)", prose())
    tables = "".join(table() for table in report.TABLES.values())
    assert len(found) >= 15
    assert [interval for interval in found if interval not in tables] == []


def test_the_story_of_the_results_is_that_of_the_rows():
    """p values, counts and shares that its sentences say; the intervals are tested above."""
    text, house, weak = prose(), Study(read_rows("house")), read_rows("house_weak")
    losses = house.gains("dapo_empg", "dapo")
    p = stats.ttest_1samp(losses, 0).pvalue
    assert f"in {sum(gain < 0 for gain in losses)} of {len(losses)} seeds" in text
    assert f"p = {p:.4f}, and {10 * p:.3f} after" in text
    p = stats.ttest_1samp(Study([row for row in weak if row["seed"] < 10]).gains("grpo_empg", "grpo"), 0).pvalue
    assert f"p = {p:.3f} becomes {10 * p:.2f} after" in text
    gain = Study(read_rows("house_weak_confirmation")).difference("grpo_empg", "grpo")
    assert f"EMPG gains {100 * gain.mean:.1f} points" in text
    assert (gain.seeds, gain.low > 0) == (26, True)  # "the confirmation found the gain"

    policies = read_credit()
    g = [row["credit"]["grpo_scaling"]["pearson_gain"] for row in policies]
    k = [row["credit"]["grpo_empg_reversed"]["pearson_gain"] for row in policies]
    assert f"less with the true ones than GRPO's in {sum(gain[2] < 0 for gain in g)} of {len(g)} policies" in text
    assert f"more in {sum(gain[1] > 0 for gain in k)} policies and less in {sum(gain[2] < 0 for gain in k)}" in text
    assert sum(gain[1] > 0 for gain in g) == 1  # "in one, a warm start of House"
    policies = [row for row in policies if "update" in row]  # gradients of large models are left out
    g = [row["update"]["grpo_scaling"]["direction_gain"] for row in policies]
    worse, better = sum(gain[2] < 0 for gain in g), sum(gain[1] > 0 for gain in g)
    assert f"worse than GRPO's in {worse} policies, better in {better}, and in {len(g) - worse - better} no" in text
    signal = [row["update"]["grpo"]["signal"][0] for row in policies if row["checkpoint"]]
    assert f"In {sum(share < 0.1 for share in signal)} of {len(signal)} trained policies" in text

    def percent(world: str, method: str, temperature: int) -> str:
        return f"{100 * sampled_and_greedy(world)[temperature == 0].mean(method).mean:.0f}"

    warm = [percent(world, "first", 0) for world in ("house", "search", "webshop")]
    assert "{} % in House, {} % in Deep Search and {} % in WebShop".format(*warm) in text
    assert f"from {percent('house', 'first', 1)} to {percent('house', 'grpo', 1)} %" in text
    assert f"from {percent('house_weak', 'first', 0)} to {percent('house_weak', 'grpo', 0)} %" in text


def test_the_pages_stay_short():
    assert len((report.ROOT / "docs/results.md").read_bytes()) <= 12_000
    assert len((report.ROOT / "docs/protocol.md").read_text().splitlines()) <= 80


def test_a_table_is_filled_between_its_marks_and_nothing_else_is_touched():
    old = "before\n<!-- headline -->\nold\n<!-- end -->\nafter <!-- end -->"
    new = report.filled(old)
    assert new.startswith("before\n<!-- headline -->\n| ")
    assert new.endswith("|\n<!-- end -->\nafter <!-- end -->")
    assert report.filled(new) == new
    with pytest.raises(KeyError):
        report.filled("<!-- nothing -->\n<!-- end -->")


def test_every_committed_row_can_be_repeated_and_traced():
    for world in report.WORLDS:
        rows = read_rows(world) + read_rows(f"{world}_confirmation")
        assert len({(row["method"], row["seed"], row["machine"]) for row in rows}) == len(rows)  # none twice
        for row in rows:
            assert (
                row["command"]
                == f"python -m paper.study --world {world} --methods {row['method']} --seeds {row['seed']}"
            )
            assert len(row["commit"]) == 40
            flags = row["train"]
            for before, now in SINCE_THE_ROWS.items():
                flags = flags.replace(before, now)
            config = parse_config(TrainConfig, flags.split()[1:])
            expected = parse_config(TrainConfig, study.train_flags(world, row["method"], row["seed"]))
            assert {
                n for n in METHOD_FLAGS | {"iterations", "seed"} if getattr(config, n) != getattr(expected, n)
            } == set()
            assert 0 <= success(row) <= 1


def test_every_committed_greedy_row_is_of_a_row_of_the_study():
    def key(row: dict) -> tuple:
        return row["world"], row["method"].replace("first", "grpo"), row["seed"], row["machine"]

    trained = {key(row) for world in report.WORLDS for row in read_rows(world)}
    rows = read_rows("greedy")
    assert len({(*key(row), row["method"]) for row in rows}) == len(rows) > 0  # none twice
    for row in rows:
        assert key(row) in trained
        assert len(row["commit"]) == 40
        assert row["command"].endswith(f"--runs out/study/{'/'.join(map(str, key(row)[:3]))}")
        assert ("--first" in row["command"]) == (row["method"] == "first")


def test_the_figures_show_the_rows_and_name_their_axes():
    figures = [draw() for draw in pictures.FIGURES]
    for figure in figures:
        assert all(axis.get_xlabel() or axis.get_shared_x_axes().get_siblings(axis) for axis in figure.axes)
        assert any(axis.get_ylabel() for axis in figure.axes)
    house, line = Study(read_rows("house")), figures[0].axes[0].lines[0]
    curves = np.array([row["curve"] for row, _ in house.together("grpo", "grpo_empg")])
    assert line.get_ydata() == pytest.approx(100 * curves.mean(0))
