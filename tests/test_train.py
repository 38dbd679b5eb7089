"""The loop as a whole: what a run promises whatever the number of ranks, micro-batches, interruptions and flags."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path

import groups
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import train
import update
from config import ALGORITHMS, TrainConfig, parse_config
from empg import (
    clarity_bonus,
    gradient_scale,
    group_advantages,
    modulate,
    normalize_entropy,
    spread,
    step_entropy,
)
from engine import checkpoint
from engine.checkpoint import CheckpointError, checkpoints, verify_checkpoint
from engine.record import Modulation, RecordError, step_metrics
from episode import Episode, collate, load_episodes
from policy import PolicyError, load_policy
from worlds.coin import Coin

ROOT = Path(__file__).parents[1]
ONE_UPDATE = {"iterations": 1, "epochs": 3, "max_rounds": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache):
    """One iteration with the default flags of the method."""
    out = tmp_path_factory.mktemp("base") / "run"
    train.train(TrainConfig(**SMALL | ONE_UPDATE | {"out": str(out), "cache": str(cache)}))
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path, atol: float = 0.0) -> bool:
    """Whether the newest checkpoints of two runs hold the same weights, to `atol`."""
    a, b = (load_file(checkpoints(out)[-1] / "model.safetensors") for out in (a, b))
    return all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


# ------------------------------------------------------------------------------------------------ invariants of a run


def test_four_iterations_are_two_and_resume_and_two(run):
    """Resuming replayed or skipped a batch, and lost the random state (trl#3247, nano-aha-moment).

    A run that was killed between two checkpoints repeats iterations; the record must not hold them twice.
    """
    flags = {"algorithm": "dapo", "epochs": 2, "mini_batches": 2}
    whole = run("whole", iterations=4, **flags)
    parts = run("parts", iterations=2, **flags)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "reward/mean": 7.0}\n{"iteration": 4, "reward/me')  # killed while it wrote
    run("parts", iterations=4, resume=True, **flags)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert same_weights(whole, parts)
    (parts / "metrics.jsonl").write_text("?\n" + (parts / "metrics.jsonl").read_text())
    with pytest.raises(RecordError, match=r"cannot resume: .*metrics.jsonl, line 1: not JSON"):
        run("parts", iterations=5, resume=True, **flags)


def test_micro_batches_do_not_change_the_update(run, monkeypatch):
    """A normaliser taken per micro-batch makes a mean of means (nanochat, GRPO-Zero before its fix).

    With plain SGD the update is the gradient; Adam divides even the last bit of a gradient of nearly 0 by its size.
    """
    run("first", iterations=1, eval_tasks=1)  # puts the warm start, which needs AdamW, into the cache
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr=1.0))
    for aggregation in ("sequence", "token"):
        flags = {"iterations": 1, "aggregation": aggregation, "eval_tasks": 1}
        one = run(f"one {aggregation}", micro_batch_tokens=1, **flags)
        all_at_once = run(f"all {aggregation}", micro_batch_tokens=10**6, **flags)
        assert same_weights(one, all_at_once, atol=2e-6)
        assert rows(one)[1]["policy/loss"] == pytest.approx(rows(all_at_once)[1]["policy/loss"], abs=1e-6)


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """A Python module with its arguments, from the project's root."""
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)


def flags_of(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def test_two_ranks_train_and_evaluate_as_one_does(run, cache, tmp_path):
    """Statistics per rank, or rows that were doubled to fill a batch, gave other advantages (ARLArena). And
    `accelerate launch --cpu --num_processes 2` starts one process, so that one rank was compared with one."""
    flags = SMALL | {"algorithm": "dapo", "kl_coef": 0.1, "cache": str(cache)}
    one = run("one", **flags)
    script, two = tmp_path / "both.py", tmp_path / "two"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport eval, train\nfrom accelerate import Accelerator as A\n"
        "A.end_training, end = lambda self: None, A.end_training  # it would part the two processes\n"
        "train.main()\nA.end_training = end\n"
        f"sys.argv[1:] = ['--policy', {str(two / 'checkpoint-000002')!r}, '--json', {str(tmp_path / 'eval.json')!r}]\n"
        "eval.main()\n"
    )
    ranks = ["torch.distributed.run", "--nproc_per_node", "2"]
    result = launch(*ranks, str(script), *flags_of(flags | {"out": two}))
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((two / "config.json").read_text())["ranks"] == 2
    for a, b in zip(rows(one), rows(two), strict=True):
        # Adam makes more of the last bit of a gradient than of the metrics before it.
        assert b.pop("policy/grad_norm", 0) == pytest.approx(a.pop("policy/grad_norm", 0), rel=1e-4)
        assert b == pytest.approx(a, abs=1e-6, rel=1e-6)
    assert same_weights(one, two, atol=1e-4)  # a quarter of one step of Adam
    (evaluated,) = json.loads((tmp_path / "eval.json").read_text()).values()
    assert train.eval_metrics(evaluated).items() <= rows(two)[-1].items()


def test_the_command_of_the_readme_runs_on_the_house(tmp_path):
    flags = {"iterations": 1, "tasks_per_iteration": 2, "env_args": "max_steps=3", "threads": 1}
    flags |= {"demonstrations": 40, "eval_tasks": 4, "cache": tmp_path}
    arguments = ["accelerate.commands.launch", "train.py", *flags_of(flags | {"out": tmp_path / "run"})]
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "held-out tasks" in result.stdout
    assert "it/s" not in result.stderr  # TQDM_DISABLE=1 holds everywhere
    for name in ("curves.png", "metrics.jsonl", "timings.jsonl", "config.json", "result.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["ranks"] == 1


@pytest.mark.parametrize("name", ["alfworld", "webshop", "search"])
def test_every_world_is_trained_in_and_a_checkpoint_is_evaluated_as_in_training(name, run, evaluate, request):
    """62.5 % in training was 31.3 % by eval.py: other limits, and a random stream that depended on one of them."""
    flags = {"env_args": ["max_steps=3"], "demonstrations": 24, "max_tokens": 2000, "temperature": 0.8, "seed": 3}
    if name == "alfworld":
        flags |= {"data": request.getfixturevalue("alfworld_data")}
    out = run(name, env=name, iterations=1, tasks_per_iteration=1, group_size=2, eval_tasks=2, eval_every=1, **flags)
    before, after = rows(out)
    assert before["eval/episodes"] == after["eval/episodes"] == 2
    assert after["episode/steps"] > 0
    assert after["episode/errors"] == 0
    reported = {"webshop": {"eval/score"}, "search": {"eval/f1"}}.get(name, set())
    assert {key for key in after if key in ("eval/score", "eval/f1")} == reported
    for row, player in ((after, checkpoints(out)[-1]), (before, out / "first_policy")):
        (result,) = evaluate("--policy", str(player)).values()
        assert train.eval_metrics(result).items() <= row.items()


def test_what_is_trained_last_is_evaluated_and_recorded(run):
    """The last iteration's evaluation was on the terminal only, and an iteration without groups skipped its own."""
    out = run(iterations=3, eval_every=2, checkpoint_every=9)
    assert [row["iteration"] for row in rows(out) if "eval/success" in row] == [0, 2, 3]
    assert json.loads((out / "result.json").read_text())["after"]["success"] == rows(out)[-1]["eval/success"]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000003"]
    for kept in (out / "transcripts" / "000003.txt", out / "episodes" / "000003.jsonl"):
        assert kept.exists()
    first, last = (load_policy(str(path)).model for path in (out / "first_policy", checkpoints(out)[-1]))
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))


def test_episodes_that_an_environment_broke_off_are_counted_and_not_imitated(run, monkeypatch, tmp_path):
    step, calls, every = Coin.step, [], 10

    def sometimes(env, action):
        calls.append(action)
        if len(calls) % every == 0:
            raise ConnectionError("gone")
        return step(env, action)

    played = run("whole", iterations=1)
    monkeypatch.setattr(Coin, "step", sometimes)
    broken = rows(run("broken", iterations=1, policy=str(played / "first_policy")))[-1]
    number = SMALL["tasks_per_iteration"] * SMALL["group_size"]
    assert 0 < broken["episode/errors"] <= number * broken["episode/truncated_frac"]
    assert rows(played)[-1]["episode/errors"] == 0
    every = 1
    with pytest.raises(SystemExit, match="7 of 7 demonstrations were broken off: ConnectionError: gone"):
        run(demonstrations=7, cache=str(tmp_path / "empty"))
    assert not list((tmp_path / "empty").iterdir())


def test_demonstrations_are_played_once(run, monkeypatch, cache):
    """ALFWorld's are thousands of games; a resumed run played them all again to find the name of a folder."""
    run("first")
    monkeypatch.setattr(train, "demonstrations", None)  # whoever plays them would call it
    run("second", k=2.0)
    run("first", iterations=3, resume=True, cache=str(cache / "gone"))


def test_a_run_learns_what_the_reward_asks_for(run):
    # Four times the demonstrations: after SMALL's the policy of some seeds has not found out what the toss says.
    flags = {"demonstrations": 960, "tasks_per_iteration": 8, "learning_rate": 2e-3, "eval_tasks": 64}
    out = run(iterations=15, eval_every=15, **flags)
    before, after = (rows(out)[i]["eval/success"] for i in (0, -1))
    assert before < 0.9  # of 64 tosses
    assert after > 0.9


# -------------------------------------------------------------------------------------------------- flags of the method


METHOD = {"algorithm": "dapo", "empg": False, "k": 3.0, "k_future": 3.0, "zeta": 0.5}
METHOD |= {"normalization": "rank", "bonus_in_all_groups": False}  # beyond the paper
METHOD |= {"clip_low": 0.0001, "clip_high": 0.0001, "aggregation": "token", "kl_coef": 1.0}


@pytest.mark.parametrize("flag", METHOD)
def test_a_method_flag_changes_the_update_and_not_the_episodes(run, base, flag):
    """A launcher's EPO flags changed nothing: silently plain PPO."""
    changed = run("changed", **ONE_UPDATE, **{flag: METHOD[flag]})
    assert not same_weights(base, changed)
    a, b = rows(base)[1], rows(changed)[1]
    if flag != "algorithm":  # dynamic sampling chooses among the episodes, which are the same
        untouched = [name for name in a if name.startswith(("reward/", "episode/", "group/", "entropy/"))]
        assert len(untouched) > 8
        assert {name: a[name] for name in untouched} == {name: b[name] for name in untouched}
    assert a["group/tasks_used"] == b["group/tasks_used"]


def test_the_kept_episodes_are_those_of_the_iteration_with_what_their_steps_were_trained_with(run):
    out = run(iterations=1)
    kept = [json.loads(line) for line in (out / "episodes" / "000001.jsonl").read_text().splitlines()]
    names = [field.name for field in dataclasses.fields(Episode)]
    (out / "plain.jsonl").write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in kept))
    episodes = load_episodes(out / "plain.jsonl")
    batch = collate(episodes)
    advantage, (entropy, valid) = group_advantages(batch.reward, 4), step_entropy(batch.token_entropy, batch.step_ids)
    norm_entropy = normalize_entropy(entropy, valid)
    expected = {
        "norm_entropy": norm_entropy,
        "g": gradient_scale(norm_entropy, valid),
        "f": clarity_bonus(norm_entropy, valid),
        "advantage": modulate(advantage, entropy, valid),
    }
    tokenizer = load_policy(str(checkpoints(out)[-1])).tokenizer
    for i, (row, episode) in enumerate(zip(kept, episodes, strict=True)):
        assert row["modulation"].pop("base") == pytest.approx(float(advantage[i]))
        assert row["modulation"] == {
            name: pytest.approx(values[i][valid[i]].tolist(), abs=1e-6) for name, values in expected.items()
        }
        sampled = [token for token, step in zip(episode.ids, episode.step_ids, strict=True) if step >= 0]
        assert "".join(row["tokens"]) == tokenizer.decode(sampled)
        assert len(row["tokens"]) == len(sampled)
    assert rows(out)[1]["group/success"] == statistics.fmean(episode.success for episode in episodes)


def test_the_bonus_can_be_kept_to_groups_whose_rewards_differ(run):
    flags = {"iterations": 1, "k": 0.0, "learning_rate": 1e-9}
    everywhere, mixed = run("everywhere", **flags), run("mixed", bonus_in_all_groups=False, **flags)
    kept = [[json.loads(x) for x in (out / "episodes/000001.jsonl").open()] for out in (everywhere, mixed)]
    groups = [[row["reward"] for row in kept[0][i : i + 4]] for i in (0, 4, 8)]
    assert 0 < sum(len(set(rewards)) > 1 for rewards in groups) < 3  # both kinds of group are there
    for i, (a, b) in enumerate(zip(*kept, strict=True)):
        same = len(set(groups[i // 4])) > 1
        assert b["modulation"]["f"] == (a["modulation"]["f"] if same else [0.0] * len(a["steps"]))


@pytest.mark.parametrize("empg", [True, False])
def test_what_is_logged_is_what_entered_the_loss_and_what_the_formulas_give(run, monkeypatch, empg):
    """The logged advantage or learning rate was not the one that was used (trl#7291, nano-aha-moment). Here g was
    computed a second time for the log, where a variant of it, or the baseline, never came to."""
    seen = []

    def spy(config, learner, batch, token_advantage, normalizer):
        seen.append((batch, token_advantage, learner.optimizer.param_groups[0]["lr"]))
        return update.micro_batch_loss(config, learner, batch, token_advantage, normalizer)

    monkeypatch.setattr(train, "micro_batch_loss", spy)
    monkeypatch.setattr(train, "mini_batches", lambda config, episodes, iteration: [list(range(episodes))])
    monkeypatch.setattr(train, "micro_batches", lambda config, accelerator, length, rows: [(rows, 1)])
    out = run(iterations=1, empg=empg)
    logged = rows(out)[1]
    ((batch, token_advantage, rate),) = seen
    advantage, (entropy, valid) = group_advantages(batch.reward, 4), step_entropy(batch.token_entropy, batch.step_ids)
    expected = modulate(advantage, entropy, valid) if empg else advantage[:, None] * valid
    torch.testing.assert_close(token_advantage, spread(expected, batch.step_ids))
    assert logged["advantage/std"] == pytest.approx(float(expected[valid].std(correction=0)))
    assert logged["policy/learning_rate"] == rate
    assert (logged["empg/g_min"] < 1 < logged["empg/g_max"]) == empg
    if not empg:
        assert (logged["empg/g_min"], logged["empg/g_max"], logged["empg/f_mean"]) == (1, 1, 0)
        assert same_weights(out, run("other", iterations=1, empg=False, k=5.0, k_future=5.0, zeta=5.0))  # unused


def test_step_metrics_are_those_of_the_tensors_that_trained():
    valid = torch.tensor([[True, True], [True, False]])
    values = [torch.tensor([[a, a + 1], [a + 2, 99.0]]) for a in range(5)]
    row = step_metrics(Modulation(torch.ones(2), values[0], valid, *values[1:]))
    assert (row["entropy/mean"], row["empg/norm_entropy"]) == (1, 2)
    assert (row["empg/g_min"], row["empg/g_max"], row["empg/f_mean"]) == (2, 4, 4)
    assert (row["advantage/mean"], row["advantage/std"]) == (5, pytest.approx((2 / 3) ** 0.5))


def test_an_algorithm_is_a_set_of_defaults_and_each_piece_a_flag():
    names = ("clip_low", "clip_high", "aggregation", "dynamic_sampling", "overlong_buffer")
    pieces = lambda *argv: {name: getattr(parse_config(TrainConfig, [*argv]), name) for name in names}  # noqa: E731
    assert TrainConfig(env="search").out == "out/search"  # another default that is filled in
    assert pieces() == ALGORITHMS["grpo"]
    assert pieces("--algorithm", "dapo") == ALGORITHMS["dapo"]
    assert pieces(*flags_of(ALGORITHMS["dapo"])) == ALGORITHMS["dapo"]  # GRPO with every piece of DAPO
    assert pieces("--algorithm", "dapo", "--dynamic_sampling", "false")["dynamic_sampling"] is False


def test_every_episode_and_every_task_of_a_finite_split_comes_once_a_pass():
    config = TrainConfig(**SMALL | {"epochs": 2, "mini_batches": 3})
    batches = [list(map(int, rows)) for rows in update.mini_batches(config, 8, iteration=5)]
    assert sorted(chain(*batches[:3])) == sorted(chain(*batches[3:])) == list(range(8))
    assert batches[:3] != batches[3:]
    seeds = [groups.train_task(config, 5, number).seed for number in range(15)]
    passes = [seeds[i : i + 5] for i in (0, 5, 10)]
    assert [sorted(part) for part in passes] == [list(range(5))] * 3
    assert len(set(map(tuple, passes))) > 1


# ------------------------------------------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_keeps_groups_that_differ(run, monkeypatch):
    kept = []
    sample_groups = train.sample_groups
    monkeypatch.setattr(train, "sample_groups", lambda *a: kept.append(sample_groups(*a)) or kept[-1])
    run(iterations=1, algorithm="dapo", max_rounds=20)
    groups, row = kept[0]
    assert len(groups) == row["group/kept"] == 3
    assert row["group/tasks_used"] % 3 == 0
    assert 0 < row["group/success"] < 1
    assert all(0 < sum(episode.success for episode in group) < 4 for group in groups)


def test_dynamic_sampling_gives_up_with_a_message_and_still_evaluates_and_saves(run, capsys, monkeypatch):
    """Without a cap a policy that never succeeds samples for ever."""
    before = Coin.step
    monkeypatch.setattr(Coin, "step", lambda self, action: before(self, "left" if self.side == "right" else "right"))
    out = run(iterations=2, algorithm="dapo", max_rounds=2, eval_every=1, checkpoint_every=1)
    assert "of 6 groups only 0 differ" in capsys.readouterr().out
    assert [row["group/kept"] for row in rows(out)[1:]] == [0, 0]
    assert all("eval/success" in row for row in rows(out))
    assert len(checkpoints(out)) == 2


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_episode(run, monkeypatch):
    out = run(iterations=2)

    def infinite(*arguments):
        loss, sums = update.micro_batch_loss(*arguments)
        return loss / 0, sums

    with monkeypatch.context() as patch:
        patch.setattr(train, "micro_batch_loss", infinite)
        with pytest.raises(SystemExit, match=r"iteration 3.*not finite"):
            run(iterations=4, resume=True)
    assert load_episodes(out / "not_finite_000003.jsonl")
    verify_checkpoint(checkpoints(out)[-1])
    assert checkpoints(out)[-1].name == "checkpoint-000002"
    # A step so large that the logits after it are nan: the next episodes cannot be sampled.
    state = torch.load(checkpoints(out)[-1] / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["lr"] = 1e30
    torch.save(state, checkpoints(out)[-1] / "optimizer.pt")
    write_checksums(checkpoints(out)[-1])
    with pytest.raises(PolicyError, match="training diverged"):
        run(iterations=9, resume=True)


def write_checksums(folder: Path) -> None:
    (folder / checkpoint.CHECKSUMS).write_text(json.dumps(checkpoint._checksums(folder)))


def test_a_folder_belongs_to_one_run_at_a_time(run, tmp_path):
    """Two runs in one folder doubled the rows, and one model was lost."""
    out = run(iterations=1)
    code = f"import filelock as f; a = f.FileLock({str(out / '.lock')!r}); a.acquire(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(RecordError, match="another run is writing"):
        run(iterations=2, resume=True)
    other.communicate(b"\n")
    run(iterations=2, resume=True)


def test_a_disk_that_fills_and_folders_that_cannot_be_written_are_named(run, tmp_path, monkeypatch):
    write = Path.open

    def full(path, mode="r", **options):
        if path.name == "metrics.jsonl" and mode == "a":
            raise OSError(28, "No space left on device")
        return write(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RecordError, match=r"could not write .*metrics\.jsonl: No space left on device"):
            run(iterations=1)
    monkeypatch.setattr(train, "demonstrations", None)  # refused before the warm start
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=f"could not write {tmp_path / 'file'}"):
        run("file")
    with pytest.raises(RecordError, match="could not write"):
        run(cache=str(tmp_path / "file" / "cache"))


def test_episodes_without_a_step_end_the_run(run):
    with pytest.raises(SystemExit, match=r"none of 6 episodes has a step: .* raise --max_tokens"):
        run(max_tokens=25)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(run):
    run()
    for error, message, flags in (
        (CheckpointError, "--resume", {}),
        (CheckpointError, r"--zeta 0\.1", {"resume": True, "zeta": 0.3}),
        (CheckpointError, "2 iterations already", {"resume": True, "iterations": 1}),
        (CheckpointError, "no checkpoint", {"name": "elsewhere", "resume": True}),
        (PolicyError, "no policy at 'nowhere'", {"name": "third", "policy": "nowhere"}),
    ):
        with pytest.raises(error, match=message):
            run(**flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--iter 3", "--iter"),
        ("--eval_split test", "test"),
        ("--group_size 1", "group_size must be at least 2"),
        ("--iterations 0", "iterations"),
        ("--learning_rate -1", "learning_rate"),
        ("--temperature 0", "temperature"),
        ("--algorithm ppo", "ppo"),
        ("--report_to wandb", "pip install wandb"),
        ("--mini_batches 65", "mini_batches"),
        ("--max_tokens 64 --algorithm dapo", "overlong_buffer must be at most 64, got 128"),
        ("--max_tokens 32", "max_tokens must be above 32"),
        ("--aggregation mean", "aggregation must be sequence or token"),
        ("--max_grad_norm nan", "max_grad_norm must be above 0, got nan"),
        ("--learning_rate 1e38", "learning_rate must be above 0 and at most 1"),
        ("--temperature nan", "temperature"),
        ("--k nan", "k must be finite"),
        ("--zeta -1", "zeta must be at least 0"),
        ("--kl_coef -1", "kl_coef"),
        ("--clip_low -0.1", "clip_low"),
        ("--clip_high -0.1", "clip_high"),
        ("--seed -1", "seed must be at least 0"),
        ("--demonstrations 1", "demonstrations must be at least 4"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_config(TrainConfig, arguments.split())
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last
    assert message in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"env": "alfworld", "data": "nowhere"}, "(?i)alfworld"),  # no games there, or no engine
        ({"env": "webshop", "data": "nowhere"}, "nowhere has neither"),
        ({"env": "search", "questions": "nowhere.json"}, "no such file: nowhere.json"),
        ({"threads": 1}, "2 processes were launched but 1 found each other"),
    ],
    ids=["alfworld", "webshop", "search", "ranks"],
)
def test_what_is_missing_ends_the_run_before_it_leaves_a_folder(flags, message, run, tmp_path, monkeypatch):
    """Under torchrun without a GPU two whole runs wrote into one folder."""
    if message.startswith("2 processes"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=message):
        run(**flags)
    assert not (tmp_path / "run").exists()
