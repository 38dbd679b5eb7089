"""What eval.py measures, against numbers from print or worked out by hand, and its command line as a user meets it."""

import io
import json
import math
import runpy
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

import pytest
from conftest import ROOT

import eval as evaluation
from config import TrainConfig
from envs import make_envs
from episode import Episode, Step, Task, load_episodes
from eval import by_split, compare, first_tasks, parse_eval_config, summarize, table, wilson_interval


def made_up(success: bool, valid: list[bool], task_type: str = "toy", seed: int = 0, split="eval", **info) -> Episode:
    """An episode with a step, valid or not, for each entry; `info` is what its environment reports beside success."""
    steps = [Step("", "", "", v, 0, 0) for v in valid]
    info |= {"task_type": task_type, "success": success}
    return Episode(Task("toy", split, seed), "", steps, float(success), terminated=True, info=info)


def outcomes(successes: list[int]) -> list[Episode]:
    return [made_up(bool(success), [True], seed=seed) for seed, success in enumerate(successes)]


@pytest.fixture
def main(monkeypatch, capsys):
    """eval.py in this process: what it printed on stdout."""

    def call(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv, "--threads", "1"])
        evaluation.main()
        return capsys.readouterr().out

    return call


# ---------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize(
    ("successes", "number", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0000),  # n of n: from n / (n + z^2), z^2 = 3.8415
        (0, 0, 0.0000, 1.0000),  # of nothing, nothing is known
    ],
)
def test_wilson_interval_as_published_and_by_hand(successes, number, low, high):
    assert wilson_interval(successes, number) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize("number", [1, 2, 7, 30])
def test_wilson_interval_solves_its_equation(number):
    # The ends are where |share - p| is z standard errors of p: (share - p)^2 n = z^2 p (1 - p).
    z = NormalDist().inv_cdf(0.975)
    for successes in range(number + 1):
        share, interval = successes / number, wilson_interval(successes, number)
        assert 0 <= interval[0] <= share <= interval[1] <= 1
        for p in interval:
            assert (share - p) ** 2 * number == pytest.approx(z**2 * p * (1 - p), abs=1e-9)
        assert interval[0] < interval[1]


def test_summarize_by_hand():
    # a: 1 of 2 successes, 3 + 1 steps of which 1 is invalid; b: 1 of 1, 2 steps.
    summary = summarize(
        [made_up(True, [True, False, True], "a"), made_up(True, [True] * 2, "b"), made_up(False, [True], "a")]
    )
    types = summary.pop("task_types")
    names = ("episodes", "success", "success_low", "success_high", "steps", "invalid", "errors")
    assert summary == pytest.approx(dict(zip(names, (3, 2 / 3, *wilson_interval(2, 3), 2, 1 / 6, 0), strict=True)))
    assert types["a"] == pytest.approx(dict(zip(names, (2, 1 / 2, *wilson_interval(1, 2), 2, 1 / 4, 0), strict=True)))
    assert types["b"] == pytest.approx(dict(zip(names, (1, 1, *wilson_interval(1, 1), 2, 0, 0), strict=True)))
    assert list(types) == ["a", "b"]


def test_summarize_takes_episodes_without_steps_and_no_episodes():
    assert summarize([made_up(False, [])])["invalid"] == 0
    nothing = summarize([])
    assert (nothing["episodes"], nothing["success"], nothing["steps"], nothing["task_types"]) == (0, 0, 0, {})
    assert (nothing["success_low"], nothing["success_high"]) == (0, 1)


def test_score_f1_and_errors_are_summed_up_where_they_are_reported():
    # Scores 1 and 0.25: 100 x 1.25 / 2. F1 is missing in one episode, which counts 0.
    episodes = [made_up(True, [True], score=1.0, f1=1.0), made_up(False, [True], score=0.25, error="E: gone")]
    summary = summarize(episodes)
    assert (summary["score"], summary["f1"], summary["errors"]) == (62.5, 0.5, 1)
    assert "f1" not in summarize([made_up(True, [True], score=1.0)])


def test_episodes_by_split_with_all_and_what_is_out_of_distribution():
    def splits(episodes: list[Episode]) -> dict[str, int]:
        return {name: len(part) for name, part in by_split(episodes).items()}

    def some(split: str, number: int) -> list[Episode]:
        return [made_up(True, [True], split=split)] * number

    assert splits(some("eval", 2)) == {"eval": 2}
    assert splits(some("valid_seen", 2) + some("valid_unseen", 3)) == {"valid_seen": 2, "valid_unseen": 3, "overall": 5}
    assert splits(some("train", 1) + some("eval", 2) + some("ood_comp", 3)) == {
        "train": 1, "eval": 2, "ood_comp": 3, "OOD": 3, "overall": 6,
    }  # fmt: skip
    paper = some("eval", 4) + some("ood_comp", 2) + some("ood_hops", 1)
    assert splits(paper) == {"ID": 4, "ood_comp": 2, "ood_hops": 1, "OOD": 3, "overall": 7}


@pytest.mark.parametrize(("size", "number", "expected"), [(5, 3, 3), (5, 5, 5), (5, 99, 5), (None, 99, 99)])
def test_first_tasks_are_each_once_and_a_full_sweep_of_a_small_split(size, number, expected):
    """Goals were drawn with repeats: some counted three times, some never."""

    class Sized:
        def size(self, split):
            return {"eval": size}[split]

    tasks = first_tasks(Sized(), "toy", "eval", number)
    assert tasks == [Task("toy", "eval", seed) for seed in range(expected)]


def test_tasks_of_the_eval_split_are_none_of_the_training_tasks():
    """In a published setup 64 % of the evaluation goals had been trained on."""
    env = make_envs("house", ["task_types=pick_and_place_simple", "objects=2"], 1)[0]
    prompts = {split: set() for split in ("train", "eval")}
    for split, found in prompts.items():
        for task in first_tasks(env, "house", split, 100):
            env.reset(task.split, task.seed)
            found.add(env.world.fingerprint())
    assert len(prompts["train"]) == len(prompts["eval"]) == 100
    assert not prompts["train"] & prompts["eval"]


@pytest.mark.parametrize("flags", [[], ["--example"]])
def test_the_flag_example_adds_an_episode_to_the_instructions_of_every_environment(flags):
    plain = make_envs("coin", [], 1)[0].instructions
    shown = (
        "\n\nAn example:\nToss 0: left.\nThought: It is left.\nAction: left\nAgain.\nThought: It is left.\nAction: left"
    )
    opened = evaluation.open_envs(parse_eval_config(["--env", "coin", *flags]), 3, [])
    assert [env.instructions for env in opened] == [plain + (shown if flags else "")] * 3


def test_compare_by_hand():
    # Differences 0, +1, +1, -1, +1: mean 2/5. McNemar: 1 or fewer of 4 by chance, both ways: 2 (1 + 4) / 16.
    result = compare(outcomes([1, 0, 0, 1, 0]), outcomes([1, 1, 1, 0, 1]))
    assert (result["difference"], result["gained"], result["lost"]) == (pytest.approx(0.4), 3, 1)
    assert result["p"] == pytest.approx(0.625)
    assert result["low"] < 0.4 < result["high"]
    same = outcomes([1, 0, 1])  # a player does not differ from itself
    assert compare(same, same) == {"difference": 0, "low": 0, "high": 0, "gained": 0, "lost": 0, "p": 1}
    result = compare(outcomes([0]), outcomes([1]))  # nothing is known from one task
    assert (result["difference"], result["low"], result["high"]) == (1, -1, 1)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (0, 5), (6, 0), (5, 2), (3, 3), (2, 9)])
def test_mcnemar_p_is_the_exact_binomial_one(gained, lost):
    n = gained + lost
    one_sided = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    result = compare(outcomes([0] * gained + [1] * lost + [1, 0]), outcomes([1] * gained + [0] * lost + [1, 0]))
    assert (result["gained"], result["lost"]) == (gained, lost)
    assert result["p"] == pytest.approx(min(1, 2 * one_sided))
    assert result["low"] <= result["difference"] <= result["high"]


def test_the_bootstrap_interval_has_the_quantiles_of_the_resampled_mean():
    # 8 of 16 tasks gained: the resampled mean is a binomial share of 16 at 1/2. P(3 or fewer) = 697 / 2^16 = 0.011 and
    # P(4 or fewer) = 2517 / 2^16 = 0.038, so the 2.5 % quantile is 4/16 and by symmetry the other one 12/16; with 9,999
    # resamples both probabilities are more than six standard errors away from 0.025.
    result = compare(outcomes([0] * 16), outcomes([1] * 8 + [0] * 8))
    assert (result["low"], result["high"]) == pytest.approx((0.25, 0.75))


def test_only_players_of_the_same_tasks_are_compared():
    """Two means over different tasks differ for the tasks' sake."""
    same = outcomes([1, 0, 1])
    for other in (same[:2], same[::-1], [*same, made_up(True, [True], seed=9)]):
        with pytest.raises(ValueError, match="same tasks"):
            compare(same, other)


def test_table_has_a_row_for_each_task_type_of_any_player_and_for_each_measure():
    first, second = [made_up(True, [True], "a")] * 2, [made_up(False, [False] * 3, "b", score=0.5, f1=0.25)]
    rows = [line.split("|") for line in table({"x": summarize(first), "y": summarize(second)}).split("\n")]
    names = ["", "task type", "a", "b", "all", "score", "F1, %", "steps", "invalid actions, %", "errors"]
    assert [row[0].strip() for row in rows if len(row) == 3] == names
    # Wilson: 2 of 2 from 2 / (2 + z^2) = 34.2 %; 0 of 1 to z^2 / (1 + z^2) = 79.3 %.
    cells = {row[0].strip(): [cell.split() for cell in row[1:]] for row in rows}
    assert cells["a"] == [["100.0", "[34.2,", "100.0]", "2"], []]
    assert cells["b"] == [[], ["0.0", "[0.0,", "79.3]", "1"]]
    assert (cells["score"], cells["F1, %"]) == ([[], ["50.0"]], [[], ["25.0"]])
    assert (cells["steps"], cells["invalid actions, %"]) == ([["1.0"], ["3.0"]], [["0.0"], ["100.0"]])
    assert "score" not in table({"x": summarize(first)})


# ------------------------------------------------------------------------------------------------------- command line


def test_the_oracle_by_the_command_line(tmp_path, monkeypatch, capsys):
    """The file as a user starts it, without a network."""
    flags = ["--policy", "oracle", "--tasks", "20", "--json", str(tmp_path / "r"), "--episodes", str(tmp_path / "e")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags, "--threads", "1"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the script replaces
    monkeypatch.setattr(socket.socket, "connect", None)  # whoever reaches for a server calls it
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    result = json.loads(lines[-1])
    assert (result["oracle"]["success"], result["oracle"]["episodes"], result["oracle"]["invalid"]) == (1.0, 20, 0.0)
    # 20 of 20: from 20 / (20 + z^2) = 83.9 %.
    row = next(line for line in lines if line.startswith("all "))
    assert row.split("|")[1].split()[:3] == ["100.0", "[83.9,", "100.0]"]
    assert json.loads((tmp_path / "r").read_text()) == result
    episodes = load_episodes(tmp_path / "e")
    assert [episode.task for episode in episodes] == [Task("house", "eval", seed) for seed in range(20)]
    assert summarize(episodes) == result["oracle"]


@pytest.mark.parametrize("flag", ["--json", "--episodes"])
def test_a_result_that_cannot_be_written_ends_the_command_before_it_plays(main, flag, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.evaluate", None)  # whoever plays would call it
    with pytest.raises(SystemExit, match=f"could not write {tmp_path}: Is a directory"):
        main("--policy", "oracle", flag, str(tmp_path))


FEW = ["--policy", "oracle", "--env", "coin", "--tasks", "2"]


class Gone(io.StringIO):
    """A stream whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_the_files_are_written_before_anything_is_printed(main, tmp_path, monkeypatch):
    """With the reader of its output gone, eval.py lost the evaluation."""
    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(BrokenPipeError):
        main(*FEW, "--json", str(tmp_path / "r"), "--episodes", str(tmp_path / "e"))
    assert json.loads((tmp_path / "r").read_text())["oracle"]["success"] == 1.0
    assert len(load_episodes(tmp_path / "e")) == 2


def test_the_result_is_printed_although_a_file_cannot_be_written(main, capsys):
    with pytest.raises(SystemExit, match="could not write /dev/full: No space left on device"):
        main(*FEW, "--json", "/dev/full")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["oracle"]["success"] == 1.0


def test_two_players_by_the_command_line(main):
    lines = main("--compare", "oracle", "random", "--tasks", "20").rstrip("\n").split("\n")
    result = json.loads(lines[-1])
    pair = result["paired"]
    assert pair["difference"] == pytest.approx(result["random"]["success"] - result["oracle"]["success"])
    assert result["oracle"]["success"] == 1.0
    assert pair["high"] < 0
    assert (pair["gained"], pair["lost"]) == (0, round(-20 * pair["difference"]))
    assert lines[-3] == "random minus oracle:"
    assert lines[-2].startswith(f"eval: {100 * pair['difference']:+.1f} points, 95 % [")


def test_every_held_out_split_is_a_column(main):
    """As in the paper's Table 2: in distribution, out of it, overall."""
    argv = ["--env", "search", "--env-args", "entities=120", "syllables=12"]
    printed = main("--compare", "random", "oracle", "--tasks", "5", *argv).rstrip("\n").split("\n")
    result = json.loads(printed[-1])
    columns = ["ID", "ood_comp", "ood_hops", "OOD", "overall"]
    assert sum(line.replace("|", "").split() == columns for line in printed) == 2  # a table for each player
    assert {name: part["episodes"] for name, part in result["oracle"]["splits"].items()} == dict(
        zip(columns, (5, 5, 5, 10, 15), strict=True)
    )
    assert result["oracle"]["success"] == result["oracle"]["f1"] == 1
    assert list(result["paired"]["splits"]) == columns
    assert result["paired"]["splits"]["ID"]["difference"] > 0
    one = json.loads(main("--policy", "oracle", "--split", "ood_hops", "--tasks", "5", *argv).split("\n")[-2])
    assert list(one["oracle"]["task_types"]) == ["3 hops"]
    assert "splits" not in one["oracle"]


def test_a_checkpoint_is_played_the_same_in_batches_of_any_size(main, house_policy, tmp_path):
    house_policy.save(tmp_path)
    argv = ["--policy", str(tmp_path), "--tasks", "3", "--env-args", "max_steps=2", "--max-step-tokens", "12"]
    results = [main(*argv, "--batch-size", size, "--episodes", str(tmp_path / size)) for size in ("3", "2")]
    by_three, by_two = (load_episodes(tmp_path / size) for size in ("3", "2"))
    assert [e.ids for e in by_three] == [e.ids for e in by_two]
    assert [len(e.steps) for e in by_three] == [2, 2, 2]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--polcy", "oracle"], "unknown arguments: --polcy oracle"),
        (["--pol", "oracle"], "unknown arguments: --pol oracle"),  # nor by its first letters
        (["oracle"], "unknown arguments: oracle"),
        (["--env", "boat"], "unknown environment 'boat'; there are house"),
        (["--split", "test"], "house has no split 'test'; it has train, eval"),
        (["--env", "search", "--split", "eval", "odd"], "search has no split 'odd'; it has train, eval, ood_comp"),
        (["--env-args", "retriever=http://127.0.0.1:9"], "house has no setting 'retriever'; it has receptacles"),
        (["--env-args", "colour=red"], "house has no setting 'colour'; it has receptacles"),
        (["--env-args", "max_steps=many"], "max_steps must be an integer, got 'many'"),
        (["--env-args", "max_steps=0"], "house: max_steps must be at least 1, got 0"),
        (["--env-args", "task_types=fly"], "house: unknown task types ['fly']"),
        (["--tasks", "0"], "tasks must be at least 1, got 0"),
        (["--tasks", "some"], "argument --tasks: invalid int value: 'some'"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--max-tokens", "128"], "max_tokens must be above 128, got 128"),
        (["--max-step-tokens", "0"], "max_step_tokens must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0 and at most 9.22337e+18, got -1"),
        (["--seed", str(2**64)], "seed must be at least 0 and at most 9.22337e+18, got 18446744073709551616"),
        (["--tasks", "9" * 400], "int too large to convert to float"),
        (["--temperature", "-0.5"], "temperature must be at least 0, got -0.5"),
        (["--temperature", "nan"], "temperature must be at least 0, got nan"),
        (["--compare", "oracle"], "compare takes two players, got 1"),
        (["--compare", "oracle", "random", "oracle"], "compare takes two players, got 3"),
        (["--compare", "oracle", "oracle"], "compare takes two different players, got oracle twice"),
    ],
)
def test_a_bad_argument_ends_with_a_line_that_names_it(main, capsys, argv, message):
    """A flag that nobody reads was accepted, and the run was not the one that was asked for."""
    with pytest.raises(SystemExit) as exit_:
        main(*argv)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {message}" in printed.err.split("\n")[-2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policy", "tests"], "no policy at 'tests': .+"),
        (["--env", "search", "--env-args", "questions=none.json"], "search: no such file: none.json"),
        (
            ["--env", "webshop", "--env-args", "data=nowhere"],
            "webshop: nowhere has neither items_shuffle_1000.json nor .*",
        ),
        (["--env", "webshop", "--env-args", "webshop_root=nowhere"], "webshop: nowhere holds no WebShop.*"),
        (["--json", "README.md/result.json"], "could not write README.md: .*"),
        (["--env", "alfworld", "--env-args", "data=tests"], ".*(alfworld|ALFWorld).*"),
        (
            ["--env", "search", "--env-args", "retriever=localhost"],
            "search: a retriever's address is http://HOST:PORT, got 'localhost'",
        ),
        (["--env", "search", "--env-args", "corpus=c.jsonl"], "search: a corpus without questions.*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_ends_with_a_line_that_names_it(main, argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"^{message}$"):
        main(*argv)


# ------------------------------------------------------------------------------------ a checkpoint's own configuration


def saved(folder: Path, **flags) -> Path:
    """A checkpoint's folder, as far as its configuration goes."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"config": asdict(TrainConfig(**flags))}))
    return folder


def test_a_checkpoint_brings_its_own_evaluation_and_flags_go_before_it(tmp_path):
    env_args = ["entities=120", "syllables=12"]
    own = {"seed": 7, "temperature": 0.5, "max_step_tokens": 20, "max_tokens": 300, "batch_size": 5}
    search = {"env": "search", "env_args": env_args, "eval_tasks": 9, "eval_split": "ood_comp"}
    run = saved(tmp_path / "checkpoint-000001", **search, **own)
    config = parse_eval_config(["--policy", str(run)])
    expected = own | {"env": "search", "env_args": env_args, "split": ["ood_comp"], "tasks": 9}
    assert {name: getattr(config, name) for name in expected} == expected
    config = parse_eval_config(["--policy", str(run), "--max-tokens", "400", "--split", "eval", "--seed=1"])
    assert (config.max_tokens, config.split, config.seed, config.tasks) == (400, ["eval"], 1, 9)
    other = parse_eval_config(["--policy", str(run), "--env", "house"])  # its limits, the other world's own settings
    assert (other.env_args, other.split, other.tasks, other.max_tokens) == ([], [], 256, 300)


def test_two_checkpoints_that_were_evaluated_in_different_ways_need_a_word(tmp_path, capsys):
    a, b = saved(tmp_path / "a", max_tokens=500), saved(tmp_path / "b", max_tokens=600)
    with pytest.raises(SystemExit):
        parse_eval_config(["--compare", str(a), str(b)])
    assert "trained with max_tokens 500 and 600; say --max_tokens" in capsys.readouterr().err
    assert parse_eval_config(["--compare", str(a), str(b), "--max_tokens", "500"]).max_tokens == 500


def test_an_evaluation_without_a_step_is_no_result(main, house_policy, tmp_path):
    """It was 0.0 %."""
    house_policy.save(tmp_path)
    with pytest.raises(SystemExit, match=r"none of 3 episodes has a step: .*raise --max_tokens"):
        main("--policy", str(tmp_path), "--tasks", "3", "--max-step-tokens", "12", "--max-tokens", "13")
