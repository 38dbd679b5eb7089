"""The loop as a whole: what a run promises whatever the number of micro-batches, interruptions and flags."""

import itertools
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch as accelerate_launch
from conftest import ROOT, SMALL, flags_of, rows, same_weights, without_locks
from safetensors.torch import load_file

import empg
import imitate
import rollout
import train
import update
from config import ALGORITHMS, POLICIES, TrainConfig, parse_config
from empg import (
    Modulation,
    center,
    clarity_bonus,
    gradient_scale,
    group_advantages,
    modulation,
    no_modulation,
    normalize_entropy,
    spread,
    step_entropy,
)
from engine import checkpoint
from engine.checkpoint import CheckpointError, checkpoints, verify_checkpoint
from engine.record import Record, RecordError, eval_metrics, step_metrics
from envs import make_envs
from episode import load_episodes
from paper import credit as study
from paper.page import read_run
from policy import PolicyError, load_policy
from rollout import generator, train_task
from worlds.coin import Coin

ONE_UPDATE = {"iterations": 1, "epochs": 3, "eval_tasks": 1}
# A folder counts as pretrained: what a cold start of the tiny model made is trained on without another one.
AS_TINY = {"demonstrations": 0, "learning_rate": 4e-4}


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache):
    """One iteration with the default flags of the method."""
    out = tmp_path_factory.mktemp("base") / "run"
    train.train(TrainConfig(**SMALL | ONE_UPDATE | {"out": str(out), "cache": str(cache)}))
    return out


# ------------------------------------------------------------------------------------------------ invariants of a run


def test_four_iterations_are_two_and_resume_and_two(run, capsys):
    """Resuming replayed or skipped a batch, and lost the random state (trl#3247, nano-aha-moment).

    A run that was killed between two checkpoints repeats iterations; the record must not hold them twice.
    """
    flags = {"algorithm": "dapo", "epochs": 2, "mini_batches": 2, "tasks_per_iteration": 2}
    whole = run("whole", iterations=4, **flags)
    parts = run("parts", iterations=2, **flags)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "reward/mean": 7.0}\n{"iteration": 4, "reward/me')  # killed while it wrote
    run("parts", iterations=4, resume=True, **flags)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert same_weights(whole, parts)
    (parts / "metrics.jsonl").write_text("?\n" + (parts / "metrics.jsonl").read_text())
    run("parts", iterations=5, resume=True, **flags)  # a damaged line of a log stops no run that has a checkpoint
    assert rows(parts)[:5] == rows(whole)
    assert "metrics.jsonl, line 1: not JSON" in capsys.readouterr().out


def test_the_command_of_the_readme_runs_on_the_house(tmp_path, monkeypatch, capfd):
    """The launcher is in this process, and it starts another one that trains."""
    flags = {"iterations": 1, "tasks_per_iteration": 2, "env_args": "max_steps=3", "threads": 1}
    flags |= {"demonstrations": 40, "eval_tasks": 4, "group_size": 2, "cache": tmp_path}
    monkeypatch.setattr(sys, "argv", ["launch", "train.py", *flags_of(flags | {"out": tmp_path / "run"})])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    accelerate_launch.main()  # ends the program if train.py does
    printed = capfd.readouterr()
    assert "held-out tasks" in printed.out
    assert "it/s" not in printed.err  # TQDM_DISABLE=1 holds everywhere
    for name in ("curves.png", "metrics.jsonl", "timings.jsonl", "config.json", "result.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["ranks"] == 1


@pytest.mark.parametrize("name", ["alfworld", "webshop", "search"])
def test_every_world_is_trained_in_and_a_checkpoint_is_evaluated_as_in_training(name, run, evaluate, request):
    """62.5 % in training was 31.3 % by eval.py: other limits, and a random stream that depended on one of them."""
    flags = {"env_args": ["max_steps=3"], "demonstrations": 24, "max_tokens": 2000, "temperature": 0.8, "seed": 3}
    sources = [f"data={request.getfixturevalue('alfworld_data')}"] if name == "alfworld" else []
    flags["env_args"] += sources
    out = run(name, env=name, iterations=1, tasks_per_iteration=1, group_size=2, eval_tasks=2, eval_every=1, **flags)
    before, after = rows(out)
    assert before["eval/episodes"] == after["eval/episodes"] == 2
    assert after["episode/steps"] > 0
    assert after["episode/errors"] == 0
    reported = {"webshop": {"eval/score"}, "search": {"eval/f1"}}.get(name, set())
    assert {key for key in after if key in ("eval/score", "eval/f1")} == reported
    for row, player in ((after, checkpoints(out)[-1]), (before, out / "first_policy")):
        (result,) = evaluate("--policy", str(player), *(["--env_args", *sources] if sources else [])).values()
        assert eval_metrics(result).items() <= row.items()


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


def test_episodes_that_an_environment_aborted_are_counted_and_not_imitated(run, whole, monkeypatch, tmp_path):
    step, calls, every = Coin.step, [], 10

    def sometimes(env, action):
        calls.append(action)
        if len(calls) % every == 0:
            raise ConnectionError("gone")
        return step(env, action)

    monkeypatch.setattr(Coin, "step", sometimes)
    aborted = rows(run("aborted", iterations=1, policy=str(whole / "first_policy"), **AS_TINY))[-1]
    assert 0 < aborted["episode/errors"] < SMALL["tasks_per_iteration"] * SMALL["group_size"]
    assert rows(whole)[-1]["episode/errors"] == 0
    every = 1
    with pytest.raises(SystemExit, match=r"^demonstrations: an episode was aborted: coin\.step: ConnectionError: gone"):
        run(demonstrations=7, cache=str(tmp_path / "empty"))
    assert not without_locks(tmp_path / "empty")


@pytest.fixture
def failing(monkeypatch):
    """failing(numbers) lets the world break in the second step of these training episodes, counted from 0. In the
    others the first episode of each group of four is won, and no other one is."""

    def call(numbers: set[int], message: str = "gone"):
        reset, step, count = Coin.reset, Coin.step, itertools.count()

        def counted(env, split, seed):
            env.number = next(count) if split == "train" else None
            return reset(env, split, seed)

        def second_fails(env, action):
            text, _, terminated, truncated, info = step(env, env.side if env.number is None else "left")
            if env.number in numbers and env.steps == 2:
                raise ConnectionError(message)
            success = terminated and env.number is not None and env.number % 4 == 0
            return text, float(success), terminated, truncated, info | {"success": success}

        monkeypatch.setattr(Coin, "reset", counted)
        monkeypatch.setattr(Coin, "step", second_fails)

    return call


@pytest.mark.parametrize("empg", [True, False])
def test_episodes_that_an_environment_aborted_are_in_no_loss_and_in_no_statistic(
    run, whole, failing, monkeypatch, empg
):
    """Three of eight episodes whose server was gone had the advantage -0.35, and their tokens were trained with it."""
    # Group 0 has 1, 0, 0 left, group 1 only failures, group 2 one episode, a success.
    failing({2, 4, 9, 10, 11})
    seen, trained = [], []
    train_update, micro_batch_loss = train.update, update.micro_batch_loss

    def spy(config, learner, batch, advantage, iteration):
        seen.append((batch, advantage))
        return train_update(config, learner, batch, advantage, iteration)

    def watch(config, learner, batch, token_advantage, normalizer):
        trained.append((len(batch.episodes), int(batch.mask.sum()), normalizer, token_advantage))
        return micro_batch_loss(config, learner, batch, token_advantage, normalizer)

    monkeypatch.setattr(train, "update", spy)
    monkeypatch.setattr(update, "micro_batch_loss", watch)
    out = run("failing", iterations=1, policy=str(whole / "first_policy"), **AS_TINY, empg=empg, aggregation="token")
    ((batch, advantage),) = seen
    left = [row for row in range(12) if row not in {2, 4, 9, 10, 11}]
    assert [row for row, episode in enumerate(batch.episodes) if not episode.aborted] == left

    # By hand: 1, 0, 0 have mean 1/3 and sample std sqrt(1/3). No other group differs.
    base = [0.0] * 12
    for row, reward in ((0, 1), (1, 0), (3, 0)):
        base[row] = (reward - 1 / 3) / ((1 / 3) ** 0.5 + 1e-6)
    assert [row["modulation"]["base"] for row in kept(out)] == pytest.approx(base)

    entropy, valid = step_entropy(batch.token_entropy[left], batch.step_ids[left])
    made = empg_module(empg)(torch.tensor(base)[left], entropy, valid)
    torch.testing.assert_close(advantage[left][:, : valid.shape[1]], made.advantage)
    aborted = [row for row in range(12) if row not in left]
    assert not advantage[aborted].any()
    tokens = int(batch.mask[left].sum())
    assert (sum(n for n, *_ in trained), sum(n for _, n, *_ in trained)) == (len(left), tokens)
    assert {normalizer for *_, normalizer, _ in trained} == {tokens}

    metrics = rows(out)[1]
    assert metrics["episode/errors"] == 5
    for name in ("reward/mean", "reward/success", "group/success"):
        assert metrics[name] == pytest.approx(2 / 7)
    assert metrics["group/zero_std_frac"] == pytest.approx(2 / 3)
    assert metrics["episode/truncated_frac"] == 0
    assert metrics["entropy/mean"] == pytest.approx(float(entropy[valid].mean()))
    for row in aborted:  # on record, with the entropy that was measured, and with nothing that was trained
        assert kept(out)[row]["info"]["error"] == "coin.step: ConnectionError: gone"
        assert kept(out)[row]["modulation"]["entropy"][0] > 0
        assert set(kept(out)[row]["modulation"]["advantage"]) == {0.0}
    assert read_run(out)["batches"][0]["steps"] == int(valid.sum())


def empg_module(empg: bool) -> Callable:
    return modulation if empg else no_modulation


def test_dynamic_sampling_looks_at_the_episodes_that_are_left(run, whole, failing, monkeypatch):
    """One success and seven errors was a group that differs."""
    failing({1, 2, 3, 5})
    monkeypatch.setattr(train, "MAX_ROUNDS", 1)
    out = run("failing", iterations=1, policy=str(whole / "first_policy"), **AS_TINY, dynamic_sampling=True)
    assert rows(out)[1]["group/kept"] == 2
    assert rows(out)[1]["episode/errors"] == 4
    assert len(kept(out)) == 8
    assert rows(out)[1]["group/success"] == 3 / 8


def test_a_batch_without_an_episode_left_ends_the_run_and_nothing_is_lost(run, whole, monkeypatch, caplog):
    """A server that was gone for good let the run count iterations that trained nothing, to its end."""
    with monkeypatch.context() as patch:
        step, count = Coin.step, itertools.count()

        def gone(env, action):
            if next(count) > broken:
                raise ConnectionError("down\nfor good")
            return step(env, action)

        patch.setattr(Coin, "step", gone)
        broken = 10**9
        # The first 12 episodes are answered; whatever is asked after the first evaluation of the policy is not.
        evaluate_held_out = train.evaluate_held_out

        def then_break(*arguments):
            nonlocal broken
            evaluate_held_out(*arguments)
            broken = -1 if arguments[-1].iteration == 1 else broken

        patch.setattr(train, "evaluate_held_out", then_break)
        lost = r"^all 12 episodes were aborted: coin\.step: ConnectionError: down for good; --resume from .*000001$"
        with pytest.raises(SystemExit, match=lost):
            run(eval_every=1)
    assert caplog.text.count("coin.step: ConnectionError: down for good") == 12
    assert rows(run(eval_every=1, resume=True)) == rows(whole)


def test_a_reset_that_fails_is_an_error_of_the_world_too(run, whole, monkeypatch, caplog):
    reset, count = Coin.reset, itertools.count()

    def sometimes(env, split, seed):
        if split == "train" and next(count) % 4 == 1:
            raise OSError("no such game")
        return reset(env, split, seed)

    monkeypatch.setattr(Coin, "reset", sometimes)
    out = run("failing", iterations=1, policy=str(whole / "first_policy"), **AS_TINY)
    assert rows(out)[1]["episode/errors"] == 3
    assert [row["modulation"]["base"] for row in kept(out)[1::4]] == [0, 0, 0]
    assert caplog.text.count("was aborted in step 0: coin.reset: OSError: no such game") == 3
    assert read_run(out)["batches"][0]["groups"]


def test_demonstrations_are_played_once(run, begun, monkeypatch, cache):
    """ALFWorld's are thousands of games; a resumed run played them all again to find the name of a folder."""
    monkeypatch.setattr(imitate, "demonstrations", None)  # whoever plays them would call it
    run("second", iterations=1, k=2.0)
    run(iterations=3, resume=True, cache=str(cache / "gone"))


def test_a_run_learns_what_the_reward_asks_for(run):
    # Four times the demonstrations: after SMALL's the policy of some seeds has not found out what the toss says.
    flags = {"demonstrations": 960, "tasks_per_iteration": 8, "learning_rate": 2e-3, "eval_tasks": 256}
    out = run(iterations=16, eval_every=16, **flags)
    result = json.loads((out / "result.json").read_text())
    assert result["after"]["success_low"] > result["before"]["success_high"]  # 95 % intervals of 256 tosses


# -------------------------------------------------------------------------------------------------- flags of the method


METHOD = {"algorithm": "dapo", "empg": False, "k": 3.0, "k_future": 3.0, "zeta": 0.5}
METHOD |= {"clip_low": 0.0001, "clip_high": 0.0001, "aggregation": "token", "kl_coef": 1.0}


@pytest.mark.parametrize("flag", METHOD)
def test_a_method_flag_changes_the_update_and_not_the_episodes(run, base, monkeypatch, flag):
    """A launcher's EPO flags changed nothing: silently plain PPO."""
    monkeypatch.setattr(train, "MAX_ROUNDS", 1)  # dynamic sampling takes what it finds in one
    changed = run("changed", **ONE_UPDATE, **{flag: METHOD[flag]})
    assert not same_weights(base, changed)
    a, b = rows(base)[1], rows(changed)[1]
    if flag != "algorithm":  # dynamic sampling chooses among the episodes, which are the same
        untouched = [name for name in a if name.startswith(("reward/", "episode/", "group/", "entropy/"))]
        assert len(untouched) > 8
        assert {name: a[name] for name in untouched} == {name: b[name] for name in untouched}
    assert a["group/tasks_used"] == b["group/tasks_used"]


@pytest.mark.parametrize("empg", [True, False])
def test_what_is_logged_and_kept_is_what_entered_the_loss_and_what_the_formulas_give(run, monkeypatch, empg):
    """The logged advantage or learning rate was not the one that was used (trl#7291, nano-aha-moment). Here g was
    computed a second time for the log, where a variant of it, or the baseline, never came to."""
    seen, micro_batch_loss = [], update.micro_batch_loss

    def spy(config, learner, batch, token_advantage, normalizer):
        seen.append((batch, token_advantage, learner.optimizer.param_groups[0]["lr"]))
        return micro_batch_loss(config, learner, batch, token_advantage, normalizer)

    monkeypatch.setattr(update, "micro_batch_loss", spy)
    monkeypatch.setattr(update, "mini_batches", lambda config, episodes, iteration: [list(range(episodes))])
    monkeypatch.setattr(update, "micro_batches", lambda config, accelerator, length, rows: [(rows, 1)])
    out = run(iterations=1, empg=empg)
    logged, ((batch, token_advantage, rate),) = rows(out)[1], seen
    advantage, (entropy, valid) = group_advantages(batch.reward, 4), step_entropy(batch.token_entropy, batch.step_ids)
    norm_entropy = normalize_entropy(entropy, valid)
    expected = {"entropy": entropy, "norm_entropy": norm_entropy, "g": valid.float(), "f": torch.zeros(valid.shape)}
    expected["advantage"] = advantage[:, None] * valid
    if empg:
        expected |= {"g": gradient_scale(norm_entropy, valid), "f": clarity_bonus(norm_entropy, valid)}
        expected["advantage"] = center(advantage[:, None] * expected["g"] + 0.1 * expected["f"], valid)
    torch.testing.assert_close(token_advantage, spread(expected["advantage"], batch.step_ids))
    assert logged["advantage/std"] == pytest.approx(float(expected["advantage"][valid].std(correction=0)))
    assert logged["policy/learning_rate"] == rate
    assert (logged["empg/g_min"] < 1 < logged["empg/g_max"]) == empg
    assert rows(out)[1]["group/success"] == statistics.fmean(episode.success for episode in batch.episodes)

    assert load_episodes(out / "episodes" / "000001.jsonl") == batch.episodes
    tokenizer = load_policy(str(checkpoints(out)[-1])).tokenizer
    for i, (row, episode) in enumerate(zip(kept(out), batch.episodes, strict=True)):
        assert row["modulation"].pop("base") == pytest.approx(float(advantage[i]))
        assert row["modulation"] == {
            name: pytest.approx(values[i][valid[i]].tolist(), abs=1e-6) for name, values in expected.items()
        }
        sampled = [token for token, step in zip(episode.ids, episode.step_ids, strict=True) if step >= 0]
        assert "".join(row["tokens"]) == tokenizer.decode(sampled)
        assert len(row["tokens"]) == len(sampled)
    if not empg:
        assert same_weights(out, run("other", iterations=1, empg=False, k=5.0, k_future=5.0, zeta=5.0))  # unused


def kept(out: Path) -> list[dict]:
    """The episodes of the first iteration that a run kept."""
    return [json.loads(line) for line in (out / "episodes" / "000001.jsonl").read_text().splitlines()]


def test_step_metrics_are_those_of_the_tensors_that_trained():
    valid = torch.tensor([[True, True], [True, False]])
    values = [torch.tensor([[a, a + 1], [a + 2, 99.0]]) for a in range(5)]
    row = step_metrics(Modulation(torch.ones(2), values[0], valid, *values[1:]))
    assert (row["entropy/mean"], row["empg/norm_entropy"]) == (1, 2)
    assert (row["empg/g_min"], row["empg/g_max"], row["empg/f_mean"]) == (2, 4, 4)
    assert (row["advantage/mean"], row["advantage/std"]) == (5, pytest.approx((2 / 3) ** 0.5))


def test_an_algorithm_is_a_set_of_defaults_and_each_piece_a_flag():
    names = ("clip_low", "clip_high", "aggregation", "dynamic_sampling", "overlong_buffer")

    def pieces(*argv: str) -> dict:
        return {name: getattr(parse_config(TrainConfig, [*argv]), name) for name in names}

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
    seeds = [train_task(config.env, 5, config.seed, number).seed for number in range(15)]
    passes = [seeds[i : i + 5] for i in (0, 5, 10)]
    assert [sorted(part) for part in passes] == [list(range(5))] * 3
    assert len(set(map(tuple, passes))) > 1


def test_no_two_purposes_draw_the_same_random_numbers(run, monkeypatch):
    """Seeds (s, n) and (s, n, 0) are one to numpy: evaluation task n had the random numbers of training group n."""
    keys = []
    for module in (rollout, update):
        monkeypatch.setattr(module, "generator", lambda *key: keys.append(key) or generator(*key))
    run(iterations=1, eval_every=1)
    times = Counter(keys)
    assert {key[0] for key in keys} == {"train", "evaluate", "update"}
    assert {times[key] for key in keys if key[0] == "train"} == {1}
    more = [("tasks", 0, 5), ("tasks", 0, 5, 0), ("evaluate", 0, "eval", 7), ("evaluate", 0, "test", 7)]
    distinct = {*keys, *more}
    assert len({generator(*key).random() for key in distinct}) == len(distinct)


# ----------------------------------------------------------------------------------------------- one's own credit


def test_ones_own_credit_function_is_what_trains(run, base):
    """It is handed to `train.train`. It gets the learner, and nothing of EMPG is left beside it."""
    learners = []

    def own(config, batch, advantage, entropy, valid, learner):
        learners.append(learner)
        return no_modulation(advantage, entropy, valid)

    mine, plain = run("mine", own, **ONE_UPDATE), run("plain", empg=False, **ONE_UPDATE)
    assert same_weights(mine, plain)
    assert rows(mine) == rows(plain)
    assert not same_weights(mine, base)
    assert [type(learner) for learner in learners] == [update.Learner]


def put(monkeypatch, function, other) -> None:
    """Another function in the place of one of empg.py, in every module that has it by any name."""
    for module in [module for name, module in sys.modules.items() if not name.startswith("test_")]:
        for name in [name for name, value in vars(module).items() if value is function]:
            monkeypatch.setattr(module, name, other)


def steps_of_page(out: Path) -> list[list[dict]]:
    """The steps of each episode of the first iteration as the credit page shows them."""
    groups = read_run(out)["batches"][0]["groups"]
    return [episode["steps"] for group in groups for episode in group]


def test_modulate_times_0_trains_nothing_and_is_what_is_logged_and_shown(run, base, monkeypatch):
    """Training had a copy of the formula: with `modulate` times 0 the policy was trained as before."""
    modulate = empg.modulate
    put(monkeypatch, modulate, lambda *tensors, **options: 0 * modulate(*tensors, **options))
    out = run(**ONE_UPDATE)
    first = load_file(out / "first_policy" / "model.safetensors")
    last = load_file(checkpoints(out)[-1] / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert not same_weights(out, base)
    assert rows(base)[1]["advantage/std"] > 0.1
    assert rows(out)[1]["advantage/std"] == 0
    assert {step["advantage"] for steps in steps_of_page(out) for step in steps} == {0}
    assert "A +0.000" in (out / "transcripts" / "000001.txt").read_text()


def test_another_statistic_in_step_entropy_is_found_everywhere(run, base, monkeypatch):
    """H had two sources. With the largest entropy of a step's tokens, transcripts, kept episodes, the credit page and
    the credit study showed 0.057 where 0.692 was trained with."""

    def largest(token_entropy, step_ids):
        _, valid = step_entropy(token_entropy, step_ids)
        of_steps = [token_entropy.where(step_ids == step, 0).amax(1) for step in range(valid.shape[1])]
        return torch.stack(of_steps, 1), valid

    put(monkeypatch, step_entropy, largest)
    out = run(**ONE_UPDATE)
    assert not same_weights(out, base)
    assert [row["ids"] for row in kept(out)] == [row["ids"] for row in kept(base)]
    wanted, success = largest_by_loop(kept(out)), [row["info"]["success"] for row in kept(out)]
    assert wanted != [row["modulation"]["entropy"] for row in kept(base)]
    assert [row["modulation"]["entropy"] for row in kept(out)] == [pytest.approx(entropies) for entropies in wanted]
    shown = [[step["entropy"] for step in steps] for steps in steps_of_page(out)]
    assert shown == [pytest.approx(entropies, abs=5.1e-4) for entropies in wanted]
    flat = [h for entropies in wanted for h in entropies]
    logged = [rows(out)[1][f"entropy/{name}"] for name in ("mean", "min", "max")]
    assert logged == pytest.approx([statistics.fmean(flat), min(flat), max(flat)])
    written = re.findall(r"  H (\S+)", (out / "transcripts" / "000001.txt").read_text())
    assert written == [f"{h:.3f}" for episode in map(success.index, (True, False)) for h in wanted[episode]]

    config = TrainConfig(**SMALL | {"env_args": [], "out": str(out)})
    wanted_of_study = study.CreditConfig(run="", checkpoint=0, batches=2, continuations=2, resamples=2)
    policy = load_policy(str(out / "first_policy"))
    row, episodes = study.measure_credit(wanted_of_study, config, Accelerator(), policy, make_envs("coin", [], 24))
    wanted = largest_by_loop(episodes)
    assert [row["modulation"]["entropy"] for row in episodes] == [pytest.approx(entropies) for entropies in wanted]
    flat, fifths = [h for entropies in wanted for h in entropies], row["credit_by_entropy"]
    assert (fifths[0]["entropy"][0], fifths[-1]["entropy"][1]) == pytest.approx((min(flat), max(flat)))


def largest_by_loop(episodes: list[dict]) -> list[list[float]]:
    """For each episode the largest token entropy of each step."""
    tokens = [list(zip(row["step_ids"], row["token_entropy"], strict=True)) for row in episodes]
    return [
        [max(h for step, h in of_row if step == number) for number in range(len(row["steps"]))]
        for row, of_row in zip(episodes, tokens, strict=True)
    ]


def test_g_and_f_swapped_are_found_everywhere(run, base, monkeypatch):
    put(monkeypatch, gradient_scale, lambda h, valid, *, k: clarity_bonus(h, valid, k_future=k))
    put(monkeypatch, clarity_bonus, lambda h, valid, *, k_future: gradient_scale(h, valid, k=k_future))
    out = run(**ONE_UPDATE)
    assert not same_weights(out, base)
    logged = [rows(out)[1][name] for name in ("empg/g_min", "empg/g_max", "empg/f_mean")]
    highest = max(f for row in kept(base) for f in row["modulation"]["f"])
    assert logged == pytest.approx([0, highest, 1])  # f is 0 in the last step, and the mean of g is 1
    for swapped, steps in zip(steps_of_page(out), steps_of_page(base), strict=True):
        assert [(step["g"], step["f"]) for step in swapped] == [(step["f"], step["g"]) for step in steps]
    for swapped, row in zip(kept(out), kept(base), strict=True):
        assert swapped["modulation"]["g"] == row["modulation"]["f"]
        assert swapped["modulation"]["f"] == row["modulation"]["g"]


# ------------------------------------------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_keeps_groups_that_differ(run, monkeypatch):
    kept = []
    sample_groups = train.sample_groups
    monkeypatch.setattr(train, "sample_groups", lambda *a: kept.append(sample_groups(*a)) or kept[-1])
    monkeypatch.setattr(train, "MAX_ROUNDS", 20)
    run(iterations=1, algorithm="dapo")
    groups, row = kept[0]
    assert len(groups) == row["group/kept"] == 3
    assert row["group/tasks_used"] % 3 == 0
    assert 0 < row["group/success"] < 1
    assert all(0 < sum(episode.success for episode in group) < 4 for group in groups)


def test_dynamic_sampling_gives_up_with_a_message_and_still_evaluates_and_saves(run, capsys, monkeypatch):
    """Without a cap a policy that never succeeds samples for ever."""
    before = Coin.step
    monkeypatch.setattr(Coin, "step", lambda self, action: before(self, "left" if self.side == "right" else "right"))
    monkeypatch.setattr(train, "MAX_ROUNDS", 2)
    out = run(iterations=2, algorithm="dapo", eval_every=1, checkpoint_every=1)
    assert "of 6 groups only 0 differ" in capsys.readouterr().out
    assert [row["group/kept"] for row in rows(out)[1:]] == [0, 0]
    assert all("eval/success" in row for row in rows(out))
    assert len(checkpoints(out)) == 2


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_episode(run, begun, monkeypatch):
    out, micro_batch_loss = begun, update.micro_batch_loss

    def infinite(*arguments):
        loss, sums = micro_batch_loss(*arguments)
        return loss / 0, sums

    with monkeypatch.context() as patch:
        patch.setattr(update, "micro_batch_loss", infinite)
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
    (folder / checkpoint.CHECKSUMS).write_text(json.dumps(checkpoint.checksums(folder)))


def test_a_folder_belongs_to_one_run_at_a_time(run, begun):
    """Two runs in one folder doubled the rows, and one model was lost."""
    code = f"import filelock as f; a = f.FileLock({str(begun / '.lock')!r}); a.acquire(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(RecordError, match="another run is writing"):
        run(iterations=3, resume=True)
    other.communicate(b"\n")
    run(iterations=3, resume=True)


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
    monkeypatch.setattr(imitate, "demonstrations", None)  # refused before the warm start
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=f"could not write {tmp_path / 'file'}"):
        run("file")
    with pytest.raises(RecordError, match="could not write"):
        run(cache=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(("flags", "said"), [({}, 1), ({"empg": False}, 0)], ids=["empg", "no_empg"])
def test_one_warning_when_nothing_but_the_bonus_trains(flags, said, tmp_path, capsys):
    config = TrainConfig(out=str(tmp_path / "run"), cache=str(tmp_path), **flags)
    record, warning = Record(config, Accelerator(cpu=True)), "have the same reward, so only the bonus trains"
    record.open(-1)
    record.metrics(1, {"group/zero_std_frac": 0.5})
    assert warning not in capsys.readouterr().out
    record.metrics(2, {"group/zero_std_frac": 1.0})
    record.metrics(3, {"group/zero_std_frac": 1.0})
    assert capsys.readouterr().out.count(f"of each group {warning}") == said


def test_episodes_without_a_step_end_the_run(run):
    with pytest.raises(SystemExit, match=r"none of 6 episodes has a step: .* raise --max_tokens"):
        run(max_tokens=25)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(run, begun):
    for error, message, flags in (
        (CheckpointError, "--resume", {}),
        (CheckpointError, r"--zeta 0\.1", {"resume": True, "zeta": 0.3}),
        (CheckpointError, "2 iterations already", {"resume": True, "iterations": 1}),
        (CheckpointError, "no checkpoint", {"name": "elsewhere", "resume": True}),
        (PolicyError, "no policy at 'nowhere'", {"name": "third", "policy": "nowhere"}),
    ):
        with pytest.raises(error, match=message):
            run(**flags)


def test_defaults_fit_the_policy_each_can_be_set_and_the_header_says_them(tmp_path, capsys):
    """SmolLM2 fell from 75 to 0 % in two iterations at the tiny model's learning rate and lengths."""
    for policy, kind in (("tiny", "tiny"), ("out/smollm2", "pretrained"), ("Qwen/Qwen2.5-1.5B-Instruct", "pretrained")):
        config = TrainConfig(policy=policy)
        assert {name: getattr(config, name) for name in POLICIES[kind]} == POLICIES[kind]
    assert (POLICIES["tiny"]["learning_rate"], POLICIES["pretrained"]["learning_rate"]) == (4e-4, 1e-5)
    config = TrainConfig(
        policy="mine", out=str(tmp_path / "run"), cache=str(tmp_path), max_tokens=777, demonstrations=64
    )
    Record(config, Accelerator(cpu=True)).header(1_000_000)
    said = "learning_rate 1e-05, max_step_tokens 128, max_tokens 777, demonstrations 64, imitation_rate 0.0001, "
    assert said + "imitation_passes 1; cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, tiny in POLICIES["tiny"].items():
        assert f"[{tiny:g} tiny, {POLICIES['pretrained'][name]:g} pretrained]" in text


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
        ("--learning_rate 1e38", "learning_rate must be above 0 and at most 1"),
        ("--temperature nan", "temperature"),
        ("--k nan", "k must be finite"),
        ("--zeta -1", "zeta must be at least 0"),
        ("--kl_coef -1", "kl_coef"),
        ("--clip_low -0.1", "clip_low"),
        ("--clip_high -0.1", "clip_high"),
        ("--seed -1", "seed must be at least 0"),
        ("--demonstrations 1", "demonstrations must be at least 4"),
        ("--policy out/mine --demonstrations 1", "demonstrations must be at least 4"),
        ("--imitation_rate 0", "imitation_rate must be above 0"),
        ("--imitation_passes 0", "imitation_passes must be at least 1"),
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
        ({"env": "alfworld", "env_args": ["data=nowhere"]}, "(?i)alfworld"),  # no games there, or no engine
        ({"env": "webshop", "env_args": ["data=nowhere"]}, "nowhere has neither"),
        ({"env": "search", "env_args": ["questions=nowhere.json"]}, "no such file: nowhere.json"),
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
