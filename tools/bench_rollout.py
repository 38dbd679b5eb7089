"""Sampling, compared with the loop that most people write, `generate_loop`. tools/bench.py calls it."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, Qwen2Config

from config import TrainConfig
from empg import group_advantages, modulation, step_entropy
from envs import PLAYERS, Env, make_envs, parse_response
from episode import Batch, Episode, Task
from imitate import dialogue
from policy import Policy
from rollout import play_scripted, rollout
from tiny import tiny_tokenizer
from update import Learner, make_learner


@dataclass(frozen=True)
class Load:
    """A Qwen2 with random weights, and the work that it is given."""

    shape: dict = field(default_factory=dict)  # arguments of Qwen2Config
    dtype: torch.dtype = torch.float32  # of the weights for sampling
    episodes: int = 32  # sampled in parallel
    turns: int = 15
    step_tokens: int = 32  # tokens of one response; random weights rarely end it earlier
    context: int = 2048  # tokens of an episode, at most
    rows: int = 8  # episodes of the update, each of `context` tokens


# 34 million parameters, for a CPU.
SMALL = Load({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True})  # fmt: skip


# --------------------------------------------------------------------------------------------------------- rollout


@torch.inference_mode()
def generate_loop(policy: Policy, envs: list[Env], tasks: list[Task], config: TrainConfig) -> Iterator[int]:
    """The loop that most people write: `generate` on the left-padded whole history at every turn, on the same tasks and
    with the same limits; finished episodes leave the batch here too. Yields the sampled tokens of each turn."""
    prompts = [env.reset(task.split, task.seed)[0] for env, task in zip(envs, tasks, strict=True)]
    histories = policy.prompt(envs[0].instructions, prompts)
    live, pad = list(range(len(tasks))), policy.tokenizer.pad_token_id
    while live:
        width = max(len(histories[i]) for i in live)
        ids = torch.tensor([[pad] * (width - len(histories[i])) + histories[i] for i in live], device=policy.device)
        mask = torch.tensor([[0] * (width - len(histories[i])) + [1] * len(histories[i]) for i in live])
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=mask.to(policy.device),
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.max_step_tokens,
            eos_token_id=list(policy.stop_ids),
            pad_token_id=pad,
        )[:, width:].tolist()
        ends = [next((n for n, i in enumerate(row, 1) if i in policy.stop_ids), len(row)) for row in output]
        responses = [row[:end] for row, end in zip(output, ends, strict=True)]
        yield sum(map(len, responses))
        going, room = [], config.max_tokens - config.max_step_tokens
        for i, ids in zip(live, responses, strict=True):
            observation, _, terminated, truncated, _ = envs[i].step(parse_response(*policy.read(ids))[1])
            histories[i] += ids + policy.between([observation])[0]
            if not (terminated or truncated or len(histories[i]) > room):
                going.append(i)
        live = going


def our_rollout(policy: Policy, envs: list[Env], tasks: list[Task], config: TrainConfig, seed: int) -> list[Episode]:
    """The same tasks with the same limits through rollout.py."""
    return rollout(policy, envs, tasks, [("bench", seed, number) for number in range(len(tasks))], **config.limits)


def sampled_tokens(episodes: list[Episode]) -> int:
    return sum(step.end - step.start for episode in episodes for step in episode.steps)


def measure_rollout(config: TrainConfig, policy: Policy, environments: int, repeats: int) -> dict[str, float]:
    """Sampled tokens a second of both loops, and the share of ours that is spent in the model's forward passes."""
    envs = make_envs(config.env, config.env_args, environments)
    tasks = [Task(config.env, "train", number // config.group_size) for number in range(environments)]  # groups
    ours, theirs, shares = [], [], []
    for repeat in range(repeats + 1):
        with timed(policy.model, "forward") as in_forward:
            seconds, episodes = clock(our_rollout, policy, envs, tasks, config, repeat)
        ours.append(sampled_tokens(episodes) / seconds)
        shares.append(sum(in_forward) / seconds)
        torch.manual_seed(repeat)
        seconds, sampled = clock(lambda: sum(generate_loop(policy, envs, tasks, config)))
        theirs.append(sampled / seconds)
    ours, theirs, shares = (statistics.median(values[1:]) for values in (ours, theirs, shares))  # the first warms up
    return {
        "rollout, sampled tokens a second": ours,
        "generate loop, sampled tokens a second": theirs,
        "rollout over generate loop": ours / theirs,
        "share of rollout in model forwards": shares,
    }


def random_policy(shape: dict, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Policy:
    """A Qwen2 with random weights, and a tokenizer of the House's texts.  shape: arguments of Qwen2Config."""
    env = make_envs("house", [], 1)[0]
    played = play_scripted(env, [Task("house", "train", seed) for seed in range(200)], PLAYERS["oracle"], seed=0)
    tokenizer = tiny_tokenizer([dialogue(env.instructions, episode) for episode in played], 1024)
    config = Qwen2Config(**shape, max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        return Policy(AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False), tokenizer)


def measure_sampler(load: Load, policy: Policy, repeats: int) -> Iterator[dict[str, float]]:
    """Sampled tokens a second of the sampler and of the `generate` loop, on the same House tasks in groups of 8.

    Each figure comes again after each repeat, as the median up to then. On a GPU the loop takes minutes, so its figures
    come again after each turn, too. Its later turns are the slower ones: the ratio is larger in the end.
    """
    config = TrainConfig(max_step_tokens=load.step_tokens, max_tokens=load.context)
    envs = make_envs("house", [f"max_steps={load.turns}"], load.episodes)
    tasks = [Task("house", "train", number // 8) for number in range(load.episodes)]
    yield {"millions of parameters": sum(weight.numel() for weight in policy.model.parameters()) / 1e6}
    policy.memory, ours, theirs = None, [], []  # graphs are captured within the time
    for repeat in range(repeats):
        seconds, episodes = clock(our_rollout, policy, envs, tasks, config, repeat)
        ours.append(sampled_tokens(episodes) / seconds)
        yield {"turns an episode": statistics.mean(len(episode.steps) for episode in episodes)}
        yield {"sampler, sampled tokens a second": statistics.median(ours)}
        sampled, start = 0, time.perf_counter()
        for of_turn in generate_loop(policy, envs, tasks, config):
            sampled += of_turn
            speed = statistics.median([*theirs, sampled / (time.perf_counter() - start)])
            yield {
                "generate loop, sampled tokens a second, random weights": speed,
                "sampler over generate loop": statistics.median(ours) / speed,
            }
        theirs.append(sampled / (time.perf_counter() - start))


def random_learner(accelerator: Accelerator, config: TrainConfig, shape: dict, device: str = "cpu") -> Learner:
    """A model with random weights, made on the device, that is ready to be trained."""
    with tempfile.TemporaryDirectory() as folder:
        (shared,) = broadcast_object_list([folder])  # the main process writes the policy, all ranks read it
        if accelerator.is_main_process:
            random_policy(shape, device=device).save(Path(folder))
        accelerator.wait_for_everyone()
        learner = make_learner(config, accelerator, shared, shared)
        accelerator.wait_for_everyone()
    return learner


# ------------------------------------------------------------------------------------------------------------ helpers


def step_advantage(config: TrainConfig, batch: Batch) -> torch.Tensor:
    """The advantage (B, S) that EMPG trains every step with."""
    advantage = group_advantages(batch.reward, config.group_size)
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)
    return modulation(advantage, entropy, valid, k=config.k, k_future=config.k_future, zeta=config.zeta).advantage


def clock(work: Callable, *args, **kwargs) -> tuple[float, object]:
    """Seconds that work(*args, **kwargs) took, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@contextmanager
def timed(owner: object, name: str) -> Iterator[list[float]]:
    """Within, the seconds of each call of owner.name are added to the list."""
    work, seconds = getattr(owner, name), []

    def watched(*args, **kwargs):
        took, result = clock(work, *args, **kwargs)
        seconds.append(took)
        return result

    with mock.patch.object(owner, name, watched):
        yield seconds
