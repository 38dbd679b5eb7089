"""Sampling and updating, compared with plain code and with the limits of the machine. tools/bench.py calls it.

`generate_loop` is the loop that most people write.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Qwen2Config

from config import TrainConfig
from empg import group_advantages, modulation, step_entropy
from engine.ranks import start_ranks
from engine.sampler import Sampler
from envs import PLAYERS, Env, make_envs, parse_response
from episode import Batch, Episode, Task
from imitate import dialogue
from policy import Policy
from rollout import play_scripted, rollout
from tiny import tiny_tokenizer
from update import make_learner, update


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
    histories = policy.prompt(envs[0].instructions, prompts)
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
            eos_token_id=list(policy.stop_ids),
            pad_token_id=pad,
        )[:, width:].tolist()
        ends = [next((n for n, i in enumerate(row, 1) if i in policy.stop_ids), len(row)) for row in output]
        responses = [row[:end] for row, end in zip(output, ends, strict=True)]
        sampled += sum(map(len, responses))
        going, room = [], config.max_tokens - config.max_step_tokens
        for i, ids in zip(live, responses, strict=True):
            observation, _, terminated, truncated, _ = envs[i].step(parse_response(*policy.read(ids))[1])
            histories[i] += ids + policy.between([observation])[0]
            if not (terminated or truncated or len(histories[i]) > room):
                going.append(i)
        live = going
    return sampled


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
    forward, in_forward = policy.model.forward, [0.0]

    def timed_forward(*args, **kwargs):
        seconds, output = clock(forward, *args, **kwargs)
        in_forward[0] += seconds
        return output

    for repeat in range(repeats + 1):
        policy.model.forward, in_forward[0] = timed_forward, 0.0
        seconds, episodes = clock(our_rollout, policy, envs, tasks, config, repeat)
        policy.model.forward = forward
        ours.append(sampled_tokens(episodes) / seconds)
        shares.append(in_forward[0] / seconds)
        torch.manual_seed(repeat)
        seconds, sampled = clock(generate_loop, policy, envs, tasks, config)
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

    Each figure comes again after each repeat, as the median up to then: on a GPU one `generate` loop takes minutes.
    """
    config = TrainConfig(max_step_tokens=load.step_tokens, max_tokens=load.context)
    envs = make_envs("house", [f"max_steps={load.turns}"], load.episodes)
    tasks = [Task("house", "train", number // 8) for number in range(load.episodes)]
    yield {"millions of parameters": sum(weight.numel() for weight in policy.model.parameters()) / 1e6}
    ours, theirs = [], []
    for repeat in range(repeats):
        seconds, episodes = clock(our_rollout, policy, envs, tasks, config, repeat)
        ours.append(sampled_tokens(episodes) / seconds)
        yield {"turns an episode": statistics.mean(len(episode.steps) for episode in episodes)}
        yield {"sampler, sampled tokens a second": statistics.median(ours)}
        seconds, sampled = clock(generate_loop, policy, envs, tasks, config)
        theirs.append(sampled / seconds)
        yield {
            "generate loop, sampled tokens a second, random weights": statistics.median(theirs),
            "sampler over generate loop": statistics.median(ours) / statistics.median(theirs),
        }


# ------------------------------------------------------------------------------------------------------------- GPU


def measure_gpu(load: Load, repeats: int) -> Iterator[dict[str, float]]:
    """Shares of the machine's limits that updating and sampling reach, and the sampler against the `generate` loop.

    Both limits are measured: bytes a second of a copy, and operations a second of a matrix product in bfloat16. The
    `generate` loop takes the longest, so it comes last and once.
    """
    accelerator = start_ranks(0, mixed_precision="bf16")
    yield measure_update(load, accelerator, repeats)
    policy = random_policy(load.shape, load.dtype, accelerator.device)
    yield measure_decode(load, policy, repeats)
    yield from measure_sampler(load, policy, repeats=1)


@torch.inference_mode()
def measure_decode(load: Load, policy: Policy, repeats: int) -> dict[str, float]:
    """Time of a decode step near the end of the context, and the share of the copy bandwidth that it uses.

    Counted are the bytes that a step must read: every weight once, and the keys and values of all tokens.
    """
    tokens, model = load.step_tokens, policy.model
    columns = load.context - (repeats + 2) * tokens
    histories = torch.randint(100, 500, (load.episodes, columns)).tolist()
    sampler = Sampler(policy, histories, 1.0, tokens, load.context)
    seconds = []
    for _ in range(repeats + 1):
        uniform = torch.rand(load.episodes, tokens, dtype=torch.float64)
        took, responses = clock(sampler.respond, histories, uniform)
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


def measure_update(load: Load, accelerator: Accelerator, repeats: int) -> dict[str, float]:
    """Share of the matrix peak in an update of `rows` episodes of `context` tokens, with gradient checkpointing.

    Counted are the operations of the model's forward and backward pass. Those that checkpointing computes again are not
    counted, so 75 % is the most that can be reached. The policy sampled a third of the tokens.
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
        random_policy(load.shape, load.dtype).save(Path(folder))
        learner = make_learner(config, accelerator, folder, folder)
    batch = random_batch(rows, length, accelerator.device)
    advantage = step_advantage(config, batch)
    seconds = [clock(update, config, learner, batch, advantage, i)[0] for i in range(repeats + 1)]
    model = learner.policy.model
    inner = sum(weight.numel() for weight in model.model.layers.parameters())
    attention = 2 * model.config.hidden_size * len(model.model.layers) * length / 2
    head = model.lm_head.weight.numel() * int(batch.mask.sum())
    operations = 6 * (rows * length * (inner + attention) + head)
    step, peak = statistics.median(seconds[1:]), matrix_peak(accelerator.device)
    return {
        "update, tokens a second": rows * length / step,
        "matrix peak, Tflop a second": peak / 1e12,
        "update, share of the matrix peak": operations / step / peak,
    }


def step_advantage(config: TrainConfig, batch: Batch) -> torch.Tensor:
    """The advantage (B, S) that EMPG trains every step with."""
    advantage = group_advantages(batch.reward, config.group_size)
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)
    return modulation(advantage, entropy, valid, k=config.k, k_future=config.k_future, zeta=config.zeta).advantage


def random_batch(rows: int, length: int, device: torch.device) -> Batch:
    """Episodes of one group with random ids, which succeed in turns. The last 32 of every 96 tokens are sampled."""
    ids = torch.randint(100, 500, (rows, length), device=device)
    place = torch.arange(length, device=device).expand(rows, -1)
    step_ids = (place // 96).where(place % 96 >= 64, -1)
    numbers = torch.zeros(rows, length, device=device)
    reward = (torch.arange(rows, device=device) % 2).float()
    lengths, episode = torch.full((rows,), length, device=device), Episode(Task("house", "train", 0), "")
    return Batch(ids, step_ids, numbers, numbers, reward, lengths, [episode] * rows)


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    seconds = [clock(target.copy_, source)[0] for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def matrix_peak(device: torch.device) -> float:
    """Operations a second of a product of two square matrices in bfloat16."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / statistics.median(clock(torch.matmul, a, a)[0] for _ in range(9))


def clock(work: Callable, *args, **kwargs) -> tuple[float, object]:
    """Seconds that work(*args, **kwargs) took, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result
