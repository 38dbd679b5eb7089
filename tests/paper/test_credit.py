"""Credit against the truth: replays are exact, values add up, and every statistic is held to a loop or a simulation."""

import shlex
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import rows

import train
from config import TrainConfig, parse_config
from empg import group_advantages, modulate, modulation, no_modulation, step_entropy
from envs import Env, make_envs
from episode import Episode, Step, Task, collate
from paper import beyond, credit, value
from policy import Policy, load_policy
from rollout import play_on, rollout

LIMITS = {"temperature": 1.0, "max_step_tokens": 20, "max_tokens": 400}
CONFIG = TrainConfig(env_args=["max_steps=3"], group_size=2, tasks_per_iteration=2, **LIMITS)


@pytest.fixture(scope="module")
def envs():
    return make_envs("house", ["max_steps=3"], 5)


@pytest.fixture(scope="module")
def episodes(house_policy, envs):
    tasks = [Task("house", "train", number) for number in range(2) for _ in range(2)]
    return rollout(house_policy, envs, tasks, [(7, i) for i in range(4)], **LIMITS)


def test_playing_on_with_its_own_seed_gives_the_episode_itself_from_every_step(house_policy, envs, episodes):
    """The strongest statement about a continuation: same tokens as context, same state of the world."""
    jobs = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode.steps))]
    assert len(jobs) > 8
    for first in range(0, len(jobs), len(envs)):
        part = jobs[first : first + len(envs)]
        starts = [value.replay_to(env, episodes[i], t) for env, (i, t) in zip(envs, part, strict=False)]
        played = play_on(house_policy, envs, starts, [(7, i) for i, _ in part], **LIMITS)
        for (i, _), again in zip(part, played, strict=True):
            assert again.ids == episodes[i].ids
            assert again.step_ids == episodes[i].step_ids
            assert again.old_logp == pytest.approx(episodes[i].old_logp, abs=1e-4)
            assert [step.observation for step in again.steps] == [step.observation for step in episodes[i].steps]
            assert (again.success, again.truncated) == (episodes[i].success, episodes[i].truncated)


def test_a_world_that_answers_otherwise_cannot_be_replayed(envs, episodes):
    episode = replace(episodes[0], steps=[replace(episodes[0].steps[0], observation="Hm."), *episodes[0].steps[1:]])
    with pytest.raises(ValueError, match=r"step 0: got .*, recorded was 'Hm.'"):
        value.replay_to(envs[0], episode, 1)


def test_every_step_is_continued_and_no_episode_is_changed(house_policy, envs, episodes):
    before = [list(episode.ids) for episode in episodes]
    outcomes = value.play_continuations(house_policy, envs, episodes, 2, CONFIG)
    assert [rows.shape for rows in outcomes] == [(len(episode.steps), 2) for episode in episodes]
    assert [list(episode.ids) for episode in episodes] == before
    again = value.play_continuations(house_policy, envs[:2], episodes, 2, CONFIG)  # in other batches
    assert all(np.array_equal(a, b) for a, b in zip(outcomes, again, strict=True))


def made_up(histories: list[list[int]], successes: list[bool]) -> list[Episode]:
    """Episodes of one task whose steps have one token each."""
    return [
        Episode(
            Task("coin", "train", 0),
            "",
            steps=[Step("", "", "", True, place, place + 1) for place in range(len(ids))],
            info={"success": success},
            ids=ids,
        )
        for ids, success in zip(histories, successes, strict=True)
    ]


def test_values_are_means_over_equal_histories_and_true_advantages_add_up():
    episodes = made_up([[1, 2], [1, 3], [5]], [True, False, False])
    outcomes = [np.array([[1, 0], [1, 1]]), np.array([[0, 0], [0, 1]]), np.array([[1, 1]])]
    first, second, third = value.values(episodes, outcomes)
    # Before any token: 1, 0, 0, 0, 1, 1.  After token 1, which two of them have: 1, 1, 0, 1.
    assert first.tolist() == [1 / 2, 3 / 4, 1]
    assert second.tolist() == [1 / 2, 3 / 4, 0]
    assert third.tolist() == [1 / 2, 0]
    assert np.diff(first).tolist() == [1 / 4, 1 / 4]  # they add up to the outcome minus V(s_0)


def test_the_bootstrap_draws_groups_and_not_steps():
    """Steps of one group are alike; drawn one by one they would make the interval too narrow."""
    rng, group = np.random.default_rng(0), np.repeat(np.arange(40), 25)
    values = rng.normal(size=40)[group]
    mean, low, high = credit.bootstrap(lambda rows: float(values[rows].mean()), group, 400)
    assert mean == pytest.approx(values.mean())
    error = values[::25].std() / 40**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)  # of steps: a fifth of it


def test_agreement_is_correlation_and_sign_and_gains_are_paired():
    rng, group = np.random.default_rng(1), np.repeat(np.arange(50), 20)
    true = rng.normal(size=1000)
    first = true + rng.normal(size=1000)
    given = {"first": first, "same": 3 * first + 1, "second": true + 2 * rng.normal(size=1000)}
    table = credit.agreement(given, true, group, 200)
    assert table["first"]["pearson"][0] == pytest.approx(np.corrcoef(given["first"], true)[0, 1])
    assert table["first"]["sign"][0] == np.mean(np.sign(given["first"]) == np.sign(true))
    assert table["same"]["pearson_gain"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert table["second"]["pearson_gain"][2] < 0  # 1/sqrt(5) against 1/sqrt(2), certain with 1,000 steps
    assert "pearson_gain" not in table["first"]
    some, others = np.tile([0.0, 1.0, -1.0, 2.0], 10), np.tile([1.0, 0.0, 1.0, 1.0], 10)
    assert credit.agreement({"a": some}, others, np.arange(40) // 4, 9)["a"]["sign"][0] == 1 / 2  # 0 has no sign


def test_the_size_of_credit_does_not_count_the_chance_of_the_continuations():
    rng, n = np.random.default_rng(2), 20_000
    entropy = rng.random(n)
    true = rng.choice([-1, 1], n) * np.where(entropy < 0.2, 0.1, 0.3)
    halves = true + 0.5 * rng.normal(size=(2, n))  # the noise is larger than the credit
    fifths = credit.credit_by_entropy(entropy, halves, np.arange(n) // 20, 100)
    sizes = [fifth["credit"][0] for fifth in fifths]
    assert sizes == pytest.approx([0.1] + [0.3] * 4, abs=0.05)
    assert fifths[0]["entropy"][1] == pytest.approx(0.2, abs=0.02)
    assert all(low <= size <= high for size, low, high in (fifth["credit"] for fifth in fifths))


# ---------------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_gradient_products_are_those_of_each_groups_policy_loss(house_policy, episodes, aggregation):
    batch = collate(episodes)
    (entropy, valid), base = step_entropy(batch.token_entropy, batch.step_ids), group_advantages(batch.reward, 2)
    advantages = [modulate(base, entropy, valid), torch.rand(valid.shape)]
    flat = [advantage[valid].numpy() for advantage in advantages]
    products = credit.gradient_products(house_policy, episodes, flat, replace(CONFIG, aggregation=aggregation))
    sampled_by_all = sum(step >= 0 for episode in episodes for step in episode.step_ids)

    def gradient(advantage: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """By a loop over episodes and tokens, of the whole sequence."""
        total = 0.0
        for row in rows:
            ids = torch.tensor(episodes[row].ids)
            logp = house_policy.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            sampled = [place for place, step in enumerate(episodes[row].step_ids) if step >= 0]
            terms = [logp[j - 1, ids[j]] * advantage[row, episodes[row].step_ids[j]] for j in sampled]
            # A group is half of the four episodes, so it has twice its share of the mean over all tokens.
            share = 1 / (len(terms) * len(rows)) if aggregation == "sequence" else 2 / sampled_by_all
            total = total - torch.stack(terms).sum() * share
        parameters = [p for p in house_policy.model.parameters() if p.requires_grad]
        return torch.cat([part.flatten() for part in torch.autograd.grad(total, parameters)])

    expected = torch.stack([gradient(a, rows) for a in advantages for rows in ([0, 1], [2, 3])])
    torch.testing.assert_close(
        torch.from_numpy(products.reshape(4, 4)), (expected @ expected.T).double(), rtol=1e-3, atol=1e-6
    )


def test_gradient_measures_find_direction_and_signal_without_bias():
    """Gradients with a known mean and known noise. The naive cosine of two noisy means would be far too small."""
    rng, size, groups, batch = np.random.default_rng(3), 400, 120, 8
    true = rng.normal(size=size)
    other = (true + rng.normal(size=size)) / 2  # cosine 0.71 with the true one
    means, noise = [true, other, true], [3.0, 1.0, 0.5]
    drawn = [mean + scale * rng.normal(size=(groups, size)) for mean, scale in zip(means, noise, strict=True)]
    flat = np.concatenate(drawn)
    table = credit.gradient_measures(["a", "b", "true"], (flat @ flat.T).reshape(3, groups, 3, groups), batch, 100)
    for name, mean, scale in zip(("a", "b"), means, noise, strict=False):
        norm = mean @ mean + scale**2 * size / batch  # expected squared norm of a batch's gradient
        assert table[name]["signal"][0] == pytest.approx(mean @ mean / norm, abs=0.03)
        others = true @ true + 0.5**2 * size / (groups - batch)
        assert table[name]["direction"][0] == pytest.approx(mean @ true / np.sqrt(norm * others), abs=0.03)
    assert table["true"]["own"][0] == pytest.approx(1)
    assert table["b"]["signal_gain"][1] > 0 > table["b"]["direction_gain"][2] - 0.2


@pytest.fixture(scope="module")
def coin(whole) -> tuple[Policy, list[Env]]:
    """A policy that names the right side of the coin in about half of its episodes, and environments for it."""
    return load_policy(str(whole / "first_policy")), make_envs("coin", [], 24)


def test_each_method_is_modulated_as_in_its_own_runs(episodes):
    """Whatever run is measured: here a baseline's, with another k and zeta."""
    batch, config = collate(episodes), replace(CONFIG, empg=False, k=7.0, zeta=7.0)
    batch.reward[0] = 1.0  # the groups' rewards differ in the first group alone
    step = (group_advantages(batch.reward, 2), *step_entropy(batch.token_entropy, batch.step_ids))
    paper = TrainConfig(group_size=2)
    expected = {
        "grpo": no_modulation(*step),
        "grpo_scaling": modulation(*step, zeta=0),
        "grpo_bonus": modulation(*step, k=0),
        "grpo_empg": modulation(*step),
        "grpo_empg_rank": beyond.credit_by_rank(paper, batch, *step),
        "grpo_empg_mixed": beyond.credit_where_rewards_differ(paper, batch, *step),
        "grpo_empg_reversed": modulation(*step, k=-1),
    }
    assert [*expected] == credit.COMPARED
    for method, made in expected.items():
        got = credit.modulated_as(method, config, batch)
        assert all(torch.equal(getattr(got, field.name), getattr(made, field.name)) for field in fields(made))
    assert len({tuple(made.advantage[made.valid].tolist()) for made in expected.values()}) == len(expected)


@pytest.mark.filterwarnings("ignore")  # of resamples in which all advantages are equal
def test_a_row_has_every_method_and_the_episodes_carry_their_credit(coin):
    wanted = credit.CreditConfig(run="", checkpoint=0, batches=3, continuations=2, resamples=20)
    row, kept = credit.measure_credit(
        wanted, replace(CONFIG, env="coin", env_args=[], group_size=4, max_step_tokens=24), Accelerator(), *coin
    )
    assert [*row["credit"]] == credit.COMPARED
    assert [*row["update"]] == [*credit.COMPARED, "true"]
    assert row["groups"] == len(kept) / 4 == 6
    assert row["steps"] == sum(len(entry["steps"]) for entry in kept)
    for entry in kept:
        states, true = entry["credit"]["value"], entry["credit"]["true_advantage"]
        assert len(states) == len(entry["steps"]) + 1
        assert sum(true) == pytest.approx(entry["reward"] - states[0])
        assert len(entry["modulation"]["advantage"]) == len(true)


@pytest.mark.filterwarnings("ignore")
def test_a_large_model_has_credit_without_gradients(coin, monkeypatch):
    monkeypatch.setattr(credit, "MOST_NUMBERS", 10**6)
    monkeypatch.setattr(credit, "gradient_products", None)  # whoever makes them would call it
    wanted = credit.CreditConfig(run="", checkpoint=0, batches=1, continuations=2, resamples=20)
    row, _ = credit.measure_credit(
        wanted, replace(CONFIG, env="coin", env_args=[], group_size=4, max_step_tokens=24), Accelerator(), *coin
    )
    assert "update" not in row
    assert len(row["credit_by_entropy"]) == credit.FIFTHS
    assert [*row["credit"]] == credit.COMPARED


def test_a_policy_that_always_fails_has_no_credit_to_measure(house_policy, envs):
    wanted = credit.CreditConfig(run="", checkpoint=0, batches=1, continuations=2, resamples=20)
    with pytest.raises(SystemExit, match="no credit to measure: all 4 episodes"):
        credit.measure_credit(wanted, CONFIG, Accelerator(), house_policy, envs)  # in three steps no task can be done


def test_bad_settings_are_named():
    for name, number in (("continuations", 3), ("continuations", 0), ("batches", 0), ("checkpoint", -1)):
        with pytest.raises(ValueError, match=name):
            credit.CreditConfig(**{"run": "", "checkpoint": 0, name: number})


def test_the_recorded_flags_make_the_same_configuration():
    flags = "--algorithm dapo --no_empg --env search --env_args entities=400 topk=1 --seed 3 --k -1 --out elsewhere"
    config = parse_config(TrainConfig, flags.split())
    recorded = shlex.split(credit.flags_of(config))
    assert replace(parse_config(TrainConfig, recorded[1:]), out="elsewhere") == config
    assert "elsewhere" not in recorded


def test_the_ceiling_trains_on_the_true_advantages(run, whole):
    seen, true_credit = [], value.TrueCredit(2)

    def spy(config, batch, advantage, entropy, valid, learner):
        made = true_credit(config, batch, advantage, entropy, valid, learner)
        seen.append((batch, made, train.assign_credit(config, batch, advantage, entropy, valid)))
        return made

    out = run(assign_credit=spy, iterations=1, empg=False, eval_tasks=1)
    ((batch, true, grpo),) = seen
    assert rows(out)[1]["advantage/std"] == pytest.approx(float(true.advantage[true.valid].std(correction=0)))
    for name in ("base", "entropy", "valid", "norm_entropy", "g", "f"):
        assert torch.equal(getattr(true, name), getattr(grpo, name))
    size_of_true, size_of_grpo = (float(m.advantage[m.valid].square().mean()) for m in (true, grpo))
    assert size_of_true == pytest.approx(size_of_grpo, rel=1e-4)
    # The steps of an episode add up to its outcome minus the value of its first state, which a group shares.
    total, outcome = true.advantage.sum(1).view(3, 4), batch.reward.view(3, 4)
    factor = (total[:, :1] - total)[outcome[:, :1] != outcome] / (outcome[:, :1] - outcome)[outcome[:, :1] != outcome]
    assert factor.numel() > 0
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=1e-3)


def test_the_command_of_a_row_names_no_place_of_the_machine_that_made_it():
    made = credit.CreditConfig(run="out/house", checkpoint=12, continuations=4, results="/somewhere/else.jsonl")
    assert credit.command_of(made) == "python -m paper.credit --run out/house --checkpoint 12 --continuations 4"
