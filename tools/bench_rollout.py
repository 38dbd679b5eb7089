"""Sampling and updating against plain code and against what the machine could do; called by bench.py.

`generate_loop` is the loop that most people write. The GPU's part has only been tried with a tiny model on a CPU.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Qwen2Config

from config import TrainConfig
from engine.sampler import Sampler
from envs import PLAYERS, Env, make_envs, parse_response
from episode import Batch, Episode, Task
from eval import start_ranks
from policy import Policy
from rollout import dialogue, play_scripted, rollout
from tiny import tiny_tokenizer
from train import learn
from update import make_learner


@dataclass(frozen=True)
class Load:
    """A model with random weights, a Qwen2 of this shape, and the work that it is given."""

    shape: dict = field(default_factory=dict)  # arguments of Qwen2Config
    dtype: torch.dtype = torch.float32  # of the weights for sampling
    env: str = "house"
    episodes: int = 32  # at once
    turns: int = 15
    step_tokens: int = 32  # of one response; random weights hardly ever end it
    context: int = 2048  # tokens of an episode, at most
    rows: int = 8  # of the update, each of `context` tokens


# 34 million parameters, for a CPU.
SMALL = Load({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True})  # fmt: skip
# Qwen2.5-1.5B, for a GPU.
LARGE = Load({"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
              "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
             torch.bfloat16, episodes=128, step_tokens=64, context=4096)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- rollout


@torch.inference_mode()
def generate_loop(policy: Policy, envs: list[Env], tasks: list[Task], config: TrainConfig) -> int:
    """The loop that most people write: `generate` on the left-padded whole history at every turn, on the same tasks and
    with the same limits; finished episodes leave the batch here too. Returns the number of sampled tokens."""
    prompts = [env.reset(task.split, task.seed)[0] for env, task in zip(envs, tasks, strict=True)]
    histories = policy.opening(envs[0].instructions, prompts)
    live, sampled, pad = list(range(len(tasks))), 0, policy.tokenizer.pad_token_id
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
            eos_token_id=policy.stop_id,
            pad_token_id=pad,
        )[:, width:].tolist()
        responses = [row[: row.index(policy.stop_id) + 1] if policy.stop_id in row else row for row in output]
        sampled += sum(map(len, responses))
        going, room = [], config.max_tokens - config.max_step_tokens
        for i, ids in zip(live, responses, strict=True):
            observation, _, terminated, truncated, _ = envs[i].step(parse_response(policy.decode(ids))[1])
            histories[i] += ids + policy.turn([observation])[0]
            if not (terminated or truncated or len(histories[i]) > room):
                going.append(i)
        live = going
    return sampled


def our_rollout(policy: Policy, envs: list[Env], tasks: list[Task], config: TrainConfig, seed: int) -> list[Episode]:
    """rollout.py with the settings of the default run."""
    seeds = [(seed, number) for number in range(len(tasks))]
    limits = {"max_step_tokens": config.max_step_tokens, "max_tokens": config.max_tokens}
    return rollout(policy, envs, tasks, seeds, temperature=config.temperature, **limits)


def measure_rollout(config: TrainConfig, policy: Policy, environments: int, repeats: int) -> dict:
    """Sampled tokens a second of both loops, and the share of ours that is spent in bare model forwards."""
    envs = make_envs(config.env, config.settings, environments)
    tasks = [Task(config.env, "train", seed // config.group_size) for seed in range(environments)]  # groups
    ours, theirs, shares = [], [], []
    forward, in_forward = policy.model.forward, [0.0]

    def timed_forward(*args, **kwargs):
        seconds, output = clock(lambda: forward(*args, **kwargs))
        in_forward[0] += seconds
        return output

    for repeat in range(repeats + 1):
        policy.model.forward, in_forward[0] = timed_forward, 0.0
        seconds, episodes = clock(lambda seed=repeat: our_rollout(policy, envs, tasks, config, seed))
        policy.model.forward = forward
        ours.append(sum(step.end - step.start for episode in episodes for step in episode.steps) / seconds)
        shares.append(in_forward[0] / seconds)
        torch.manual_seed(repeat)
        seconds, sampled = clock(lambda: generate_loop(policy, envs, tasks, config))
        theirs.append(sampled / seconds)
    ours, theirs, shares = (statistics.median(values[1:]) for values in (ours, theirs, shares))  # the first warms up
    return {
        "rollout, sampled tokens a second": ours,
        "generate loop, sampled tokens a second": theirs,
        "rollout over generate loop": ours / theirs,
        "share of rollout in model forwards": shares,
    }


def random_policy(load: Load, device: torch.device | str) -> Policy:
    """Random weights, with a tokenizer of the House's texts."""
    env = make_envs("house", [], 1)[0]
    played = play_scripted(env, [Task("house", "train", seed) for seed in range(200)], PLAYERS["oracle"], seed=0)
    tokenizer = tiny_tokenizer([dialogue(env.instructions, episode) for episode in played], 1024)
    config = Qwen2Config(**load.shape, max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        return Policy(AutoModelForCausalLM.from_config(config, dtype=load.dtype), tokenizer)


def measure_sampler(load: Load, policy: Policy, repeats: int) -> dict:
    """Sampled tokens a second of the sampler and of the `generate` loop, on the same tasks in groups of 8."""
    config = TrainConfig(max_step_tokens=load.step_tokens, max_tokens=load.context)
    envs = make_envs(load.env, [f"max_steps={load.turns}"], load.episodes)
    tasks = [Task(load.env, "train", number // 8) for number in range(load.episodes)]
    ours, theirs = [], []
    for repeat in range(repeats):
        seconds, episodes = clock(lambda seed=repeat: our_rollout(policy, envs, tasks, config, seed))
        ours.append(sum(step.end - step.start for episode in episodes for step in episode.steps) / seconds)
        seconds, sampled = clock(lambda: generate_loop(policy, envs, tasks, config))
        theirs.append(sampled / seconds)
    ours, theirs = map(statistics.median, (ours, theirs))
    return {
        "millions of parameters": sum(weight.numel() for weight in policy.model.parameters()) / 1e6,
        "turns an episode": statistics.mean(len(episode.steps) for episode in episodes),
        "sampler, sampled tokens a second": ours,
        "generate loop, sampled tokens a second, random weights": theirs,
        "sampler over generate loop": ours / theirs,
    }


# ------------------------------------------------------------------------------------------------------------- GPU


def measure_gpu(load: Load, repeats: int) -> dict:
    """The sampler against the `generate` loop, and the shares of the machine's limits that sampling and updating reach.

    Both limits are measured: bytes a second of a copy, and operations a second of a matrix product in bfloat16.
    """
    accelerator = start_ranks(0, mixed_precision="bf16")
    policy = random_policy(load, accelerator.device)
    result = measure_sampler(load, policy, repeats) | measure_decode(load, policy, repeats)
    del policy
    return result | measure_update(load, accelerator, repeats)


@torch.inference_mode()
def measure_decode(load: Load, policy: Policy, repeats: int) -> dict:
    """Time of a decode step of full rows, and the share of the copy bandwidth that it uses.

    Counted are the bytes that a step must read: every weight once, and the keys and values of all tokens.
    """
    tokens, model = load.step_tokens, policy.model
    columns = load.context - (repeats + 2) * tokens
    histories = torch.randint(100, 500, (load.episodes, columns)).tolist()
    sampler = Sampler(policy, histories, 1.0, tokens, load.context)
    seconds = []
    for _ in range(repeats + 1):
        uniform = torch.rand(load.episodes, tokens, dtype=torch.float64)
        took, responses = clock(partial(sampler.respond, histories, uniform))
        seconds.append(took / tokens)
        histories = [ids + response.ids for ids, response in zip(histories, responses, strict=True)]
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    buffers = [buffer for layer in sampler.cache.layers for buffer in layer.buffers]
    token = sum(buffer[0, :, 0].numel() * buffer.element_size() for buffer in buffers)  # bytes of its keys and values
    step = statistics.median(seconds[1:])  # the first captures graphs
    moved = weights + token * load.episodes * (columns + tokens * (repeats + 2) // 2)
    bandwidth = copy_bandwidth(policy.device)
    return {
        "decode step, ms": 1000 * step,
        "decode step, GB that it must read": moved / 1e9,
        "copy bandwidth, GB a second": bandwidth / 1e9,
        "decode step, share of the bandwidth": moved / step / bandwidth,
    }


def measure_update(load: Load, accelerator: Accelerator, repeats: int) -> dict:
    """Share of the matrix peak in an update of `rows` episodes of `context` tokens, with gradient checkpointing.

    Counted are the operations of the model, forward and backward: what checkpointing computes again is not, so that 75
    % is the most. A third of the tokens is sampled.
    """
    rows, length = load.rows, load.context
    config = TrainConfig(
        tasks_per_iteration=1,
        group_size=rows,
        mini_batches=1,
        learning_rate=1e-9,
        gradient_checkpointing=True,
        micro_batch_tokens=2 * length,
        max_tokens=length,
    )
    with tempfile.TemporaryDirectory() as folder:
        random_policy(load, "cpu").save(Path(folder))
        learner = make_learner(config, accelerator, folder, folder)
    ids = torch.randint(100, 500, (rows, length), device=accelerator.device)
    place = torch.arange(length, device=accelerator.device).expand(rows, -1)
    step_ids = (place // 96).where((place % 96 >= 64), -1)  # the first 64 of 96 tokens are an observation
    numbers = torch.zeros(rows, length, device=accelerator.device)
    reward = (torch.arange(rows, device=accelerator.device) % 2).float()
    lengths = torch.full((rows,), length, device=accelerator.device)
    batch = Batch(ids, step_ids, numbers, numbers, reward, lengths)
    seconds = [clock(lambda i=i: learn(config, learner, batch, i))[0] for i in range(repeats + 1)]
    inner = sum(weight.numel() for weight in learner.policy.model.model.layers.parameters())
    attention = 2 * learner.policy.model.config.hidden_size * len(learner.policy.model.model.layers) * length / 2
    head = learner.policy.model.lm_head.weight.numel() * int(batch.mask.sum())
    operations = 6 * (rows * length * (inner + attention) + head)
    step, peak = statistics.median(seconds[1:]), matrix_peak(accelerator.device)
    return {
        "update, tokens a second": rows * length / step,
        "matrix peak, Tflop a second": peak / 1e12,
        "update, share of the matrix peak": operations / step / peak,
    }


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    seconds = [clock(lambda: target.copy_(source))[0] for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def matrix_peak(device: torch.device) -> float:
    """Operations a second of a product of two square matrices in bfloat16."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / statistics.median(clock(lambda: a @ a)[0] for _ in range(9))


def clock(work: Callable) -> tuple[float, object]:
    """Seconds that the work took, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result
