"""EMPG in TRL: what reaches TRL's loss against this project's own path from episodes to token advantages."""

import ast
import doctest
import itertools
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from config import TrainConfig
from empg import center, group_advantages, modulation, spread, step_entropy, token_logp_and_entropy
from engine.record import step_metrics
from envs import make_envs, parse_response
from episode import Episode, Step, Task, collate
from policy import Policy, load_policy
from worlds.house import HouseConfig

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from examples import empg_trainer, trl_house


@pytest.fixture(autouse=True, scope="module")
def state_of_its_own():
    """A trainer of TRL is in bf16 unless it is told otherwise. Accelerate would keep that for the tests after these."""
    with pytest.MonkeyPatch.context() as patch:
        for state in (AcceleratorState, PartialState):
            patch.setattr(state, "_shared_state", {})
        yield


EMPG, NO_EMPG = {"k": 1.0, "k_future": 0.5, "zeta": 0.1}, {"k": 0.0, "k_future": 1.0, "zeta": 0.0}
METRICS = ["entropy/mean", "entropy/min", "entropy/max", "empg/g_min", "empg/g_max", "empg/f_mean"]
METRICS += ["advantage/mean", "advantage/std"]


class Recorder(empg_trainer.EMPGTrainer):
    """Keeps for each iteration the weights that played it, and what reached the loss with the task and reward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = []

    def _generate_and_score_completions(self, inputs):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.record.append({"weights": weights, "reached": []})
        batch = super()._generate_and_score_completions(inputs)
        tasks = torch.tensor([row["seed"] for row in inputs])
        rewards = torch.tensor([environment.get_reward() for environment in self.environments])
        return batch | {"task": tasks, "reward": rewards, "row": torch.arange(len(tasks))}

    def _compute_loss(self, model, inputs):
        self.record[-1]["reached"] += [dict(zip(inputs, row, strict=True)) for row in rows_of(inputs)]
        return super()._compute_loss(model, inputs)


def steps_of(row: int) -> int:
    """Steps of the episode in this row of a process."""
    return 2 + row % 2


def logged(trainer: empg_trainer.EMPGTrainer) -> list[dict]:
    """TRL's line of each iteration."""
    return [line for line in trainer.state.log_history if "reward" in line]


def rows_of(inputs: dict) -> list[tuple]:
    return list(zip(*(value if value.dim() else itertools.repeat(value) for value in inputs.values()), strict=False))


class ScoredEnv(trl_house.AgentEnv):
    """The policy of the tests never succeeds, so the number of its actions is rewarded. Episodes take 2, 3, 2, 3 steps.

    Step counts that differ within a group give the advantages a mean over steps that is not 0.
    """

    made = 0

    def __init__(self, env, max_completion_length):
        super().__init__(env, max_completion_length)
        env.world.config = HouseConfig(max_steps=steps_of(ScoredEnv.made))
        ScoredEnv.made, self.actions = ScoredEnv.made + 1, 0

    def act(self, action: str) -> str:
        """Do one action.

        Args:
            action: What to do.
        """
        self.actions += 1
        return super().act(action)

    def get_reward(self):
        return self.actions / 7


def play(folder: str, strength: dict) -> Recorder:
    """Two iterations of four episodes on this process or among all that were launched."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    config = TrainConfig(
        out=folder,
        iterations=2,
        tasks_per_iteration=2,
        group_size=2,
        mini_batches=1,
        temperature=0.7,
        max_step_tokens=20,
        max_tokens=512,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_house, "AgentEnv", ScoredEnv)
        patch.setattr(ScoredEnv, "made", 0)
        trainer = trl_house.make_trainer(config, folder, Recorder, micro_batch_size=2 // ranks, **strength)
        trainer.train()
        return trainer


@torch.no_grad()
def episode_of(reached: dict, policy: Policy) -> Episode:
    """What TRL's agent loop played, as rollout.py would have written it down.

    The responses come from TRL. Every other id comes from this project: the opening and the observations of the same
    task, played with the same actions. Entropies come from one pass over the episode alone, without padding.
    """
    env = make_envs("house", [f"max_steps={steps_of(int(reached['row']))}"], 1)[0]
    task = Task("house", "train", int(reached["task"]))
    prompt, info = env.reset(task.split, task.seed)
    episode = Episode(task, prompt, reward=float(reached["reward"]), info=info)
    episode.insert(policy.prompt(env.instructions, [prompt])[0])
    assert reached["prompt_ids"][reached["prompt_mask"] == 1].tolist() == episode.ids
    length = int(reached["completion_mask"].sum())
    ids, sampled = reached["completion_ids"][:length].tolist(), reached["tool_mask"][:length].tolist()
    entropy = token_logp_and_entropy(
        policy.model(torch.tensor([episode.ids + ids])).logits[:, len(episode.ids) - 1 : -1], torch.tensor([ids]), 0.7
    )[1][0].tolist()
    done, end = False, 0
    while not done:
        start, end = end, next((j for j in range(end, length) if not sampled[j]), length)
        episode.append_sampled(ids[start:end], [0.0] * (end - start), entropy[start:end])
        action = parse_response(*policy.read(ids[start:end]))[1]
        observation, _, terminated, truncated, _ = env.step(action)
        episode.steps.append(Step("", action, observation, True, start, end))
        done = terminated or truncated
        if not done:
            start, end = end, end + len(policy.between([observation])[0])
            episode.insert(policy.between([observation])[0])
            assert not any(sampled[start:end])
            assert ids[start:end] == episode.ids[-(end - start) :]
    assert end == length
    return episode


def check(record: list[dict], logged: list[dict], folder: str, strength: dict) -> None:
    """Every token's advantage and every metric, against empg's functions on the batch that collate makes."""
    policy = load_policy(folder)
    assert len(logged) == len(record) == 2
    for iteration, metrics in zip(record, logged, strict=True):
        policy.model.load_state_dict(iteration["weights"])
        reached = sorted(iteration["reached"], key=lambda row: (int(row["task"]), int(row["row"])))
        assert len(reached) == 4
        batch = collate([episode_of(row, policy) for row in reached])
        entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)
        assert sorted(valid.sum(1).tolist()) == [2, 2, 3, 3]
        advantage = group_advantages(batch.reward, 2, eps=1e-4)
        assert advantage.unique().numel() > 1
        credit = modulation(advantage, entropy, valid, **strength)
        expected = credit.advantage
        if strength == NO_EMPG:
            expected = center(advantage[:, None].expand_as(entropy), valid)
        assert {name: metrics[name] for name in METRICS} == pytest.approx(
            {name: step_metrics(credit)[name] for name in METRICS}, rel=1e-4, abs=1e-5
        )
        token_advantage = spread(expected, batch.step_ids)
        for row, values in zip(reached, token_advantage, strict=True):
            first, length = int(row["prompt_mask"].sum()), int(row["completion_mask"].sum())
            torch.testing.assert_close(row["advantages"][:length], values[first : first + length], atol=1e-5, rtol=1e-4)
            assert not row["advantages"][length:].any()
            assert not row["advantages"][:length][row["tool_mask"][:length] == 0].any()


@pytest.fixture
def folder(house_policy, tmp_path) -> str:
    house_policy.save(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("strength", [EMPG, NO_EMPG], ids=["empg", "no empg"])
def test_what_reaches_the_loss_is_modulated_over_the_whole_batch(strength, folder):
    trainer = play(folder, strength)
    check(trainer.record, logged(trainer), folder, strength)
    before, after = trainer.record[0]["weights"], trainer.model.state_dict()
    assert all((before[name] != after[name]).any() for name in before)


def test_what_is_logged_is_what_trains(folder, monkeypatch):
    """With a part of the modulation replaced, its metric and the advantages that reach the loss change together."""

    def halved(*args, **strength):
        credit = modulation(*args, **strength)
        return replace(credit, g=credit.g / 2, advantage=credit.advantage / 2)

    whole = play(folder, EMPG)
    monkeypatch.setattr(empg_trainer, "modulation", halved)
    half = play(folder, EMPG)
    first, second = logged(whole)[0], logged(half)[0]  # of the first iteration: then the weights differ
    for name in METRICS:
        part = 0.5 if name in ("empg/g_min", "empg/g_max", "advantage/mean", "advantage/std") else 1
        assert second[name] == pytest.approx(part * first[name], abs=1e-7)
    for one, other in zip(whole.record[0]["reached"], half.record[0]["reached"], strict=True):
        torch.testing.assert_close(other["advantages"], one["advantages"] / 2)


def test_two_processes_modulate_over_the_episodes_of_both(folder, tmp_path):
    """Each of them plays the two episodes of one task. Statistics of its own would give other numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, folder]
    root = str(Path(__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    (record, lines), (others, _) = ranks
    for one, other in zip(record, others, strict=True):
        assert len(one["reached"]) == len(other["reached"]) == 2
        one["reached"] += other["reached"]
    check(record, lines, folder, EMPG)


def test_the_example_in_a_docstring():
    assert doctest.testmod(empg_trainer).attempted == 1
    assert not doctest.testmod(empg_trainer).failed


def test_trl_gives_the_entropies_and_steps_that_the_rollout_recorded(folder, house_policy, house_episodes):
    """Episodes of 1 to 4 steps, so prompts and completions are padded."""
    trainer = play(folder, EMPG)
    trainer.model.load_state_dict(house_policy.model.state_dict())
    first = [episode.step_ids.index(0) for episode in house_episodes]  # sampled token

    def completions(name: str) -> torch.Tensor:
        rows = [torch.tensor(getattr(e, name)[n:]) for e, n in zip(house_episodes, first, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=-1 if name == "step_ids" else 0)

    prompts = [torch.tensor(e.ids[:n]) for e, n in zip(house_episodes, first, strict=True)]
    lengths = torch.tensor([len(e.ids) - n for e, n in zip(house_episodes, first, strict=True)])
    batch = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left"),
        "completion_ids": completions("ids"),
        "completion_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
    }
    steps = completions("step_ids")
    assert empg_trainer.sampled_steps((steps >= 0).long()).tolist() == steps.tolist()
    entropy = trainer.token_entropy(batch).where(steps >= 0, 0)
    torch.testing.assert_close(entropy, completions("token_entropy"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", ["--iterations 0", "--k nan", "--seed -1", "--zeta x", "--mars 1"])
def test_a_bad_flag_of_the_example_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trl_house", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        trl_house.main()
    assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1


def test_processes_and_policies_that_the_example_cannot_use_are_one_line(house_policy, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^48 episodes at once do not divide an optimizer step; .+$"):
        trl_house.trainer_arguments(TrainConfig(), micro_batch_size=48)  # as 16 on each of three processes
    house_policy.save(tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer_config.json"
    monkeypatch.setattr("sys.argv", ["trl_house", "--policy", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^no policy at [^\n]+$"):
        trl_house.main()
    tokenizer.write_text(tokenizer.read_text().replace("<|end|>", "<|user|>"))
    monkeypatch.setattr("sys.argv", ["trl_house", "--policy", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"^[^\n]+ holds no tiny policy; [^\n]+$"):
        trl_house.main()


# ------------------------------------------------------------------------------------------------- in one's own code


def test_the_trainer_knows_empg_torch_and_trl_alone():
    """So it works where it is copied to, beside empg.py."""
    tree = ast.parse(Path(empg_trainer.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"empg", "torch", "trl"}


def lines_of_its_docstring() -> str:
    """The indented lines of the module's docstring."""
    lines = [line for line in empg_trainer.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    return textwrap.dedent("\n".join(lines))


def test_the_five_lines_of_its_docstring_train_a_model_without_tools(house_policy, tmp_path, monkeypatch):
    """A random Llama, and a reward for short completions. Each completion is one step, so f is 0."""
    monkeypatch.syspath_prepend(Path(empg_trainer.__file__).parent)
    monkeypatch.chdir(tmp_path)
    tokenizer = house_policy.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")

    def reward(completions, **_):
        return [-float(len(text)) for text in completions]

    lines = [line for line in empg_trainer.__doc__.splitlines() if line.startswith("    ")]
    names = {"model": "llama", "reward": reward, "prompts": Dataset.from_dict({"prompt": ["You are in a room."]})}
    small = "logging_steps=1, use_cpu=True, max_completion_length=32"
    exec(textwrap.dedent("\n".join(lines)).replace("logging_steps=1", small), names)
    metrics = logged(names["trainer"])
    assert len(lines) == 5
    assert len(metrics) == 3  # one step in each of three epochs
    for line in metrics:
        assert 0 < line["entropy/min"] < line["entropy/max"] <= math.log(len(tokenizer))
        assert line["empg/g_min"] < 1 < line["empg/g_max"]
        assert line["empg/f_mean"] == 0
        assert abs(line["advantage/mean"]) < 1e-5 < line["advantage/std"]
        assert line["grad_norm"] > 0


if __name__ == "__main__":  # one of two processes
    trainer = play(sys.argv[1], EMPG)
    torch.save((trainer.record, logged(trainer)), f"rank{os.environ['RANK']}.pt")
