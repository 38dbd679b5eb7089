"""A GPU: how near sampling and updating come to its limits, and what takes the time. tools/bench.py calls it.

All figures fit four minutes on an H200. Each is printed when it is there, and the slow `generate` loop comes last.
"""

import gc
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

import rollout
from config import TrainConfig
from engine.ranks import start_ranks, weights_for_sampling
from engine.sampler import Sampler
from envs import make_envs
from episode import Batch, Episode, Task, collate
from policy import Policy
from tools.bench_rollout import (
    Load,
    clock,
    measure_sampler,
    our_rollout,
    random_learner,
    random_policy,
    step_advantage,
    timed,
)
from tools.cost import at_most, memory, shape_of
from update import Learner, update

COMMON = {"tie_word_embeddings": True}
# The shape of SmolLM2-135M.
MIDDLE = Load(COMMON | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152},
              torch.bfloat16, episodes=64, step_tokens=40)  # fmt: skip
# The shape of Qwen2.5-1.5B.
LARGE = Load(COMMON | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                       "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
             torch.bfloat16, episodes=128, step_tokens=64, context=4096)  # fmt: skip
# Parts of a profile, by words in the names of PyTorch's operations, without "_". The first that fits counts, for an
# operation and for all that it calls.
PARTS = {
    "head and its recomputation": ("score",),
    "attention": ("scaleddotproduct",),
    "optimizer": ("optimizer.",),
    "casts": ("aten::to",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"),
    "sampling a token": ("softmax", "logsumexp", "cumsum", "searchsorted"),
}


def measure_gpu(middle: Load, large: Load, repeats: int) -> Iterator[dict[str, float]]:
    """Iterations of two models by part, shares of the machine's limits, and the sampler against the `generate` loop."""
    accelerator = start_ranks(0, mixed_precision="bf16")
    device = accelerator.device
    for load, episodes in ((middle, middle.episodes), (large, large.episodes // 4)):
        config = TrainConfig(
            tasks_per_iteration=max(1, episodes // 8),
            group_size=min(8, episodes),
            mini_batches=1,
            learning_rate=1e-9,
            gradient_checkpointing=load is large,
            micro_batch_tokens=2 * load.context,
            max_step_tokens=load.step_tokens,
            max_tokens=load.context,
        )
        learner = random_learner(accelerator, config, load.shape, device.type)
        yield from measure_iterations(load, config, learner)
    yield measure_update(load, config, learner, repeats)
    del learner
    gc.collect()
    policy = random_policy(large.shape, large.dtype, device)
    yield measure_decode(large, policy, repeats)
    yield from measure_sampler(large, policy, repeats=1)


def measure_iterations(load: Load, config: TrainConfig, learner: Learner) -> Iterator[dict[str, float]]:
    """Seconds of two iterations in the House, by part, and peak memory. The second one finds its graphs captured.

    "sample" includes "read", "capture" and "environments".
    """
    policy, number = learner.policy, config.tasks_per_iteration * config.group_size
    model = f"{sum(weight.numel() for weight in policy.model.parameters()) / 1e6:.0f}M"
    envs = make_envs("house", [f"max_steps={load.turns}"], number)
    tasks = [Task("house", "train", i // config.group_size) for i in range(number)]
    gc.collect()  # the learner before this one
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for iteration in (1, 2):
        before = policy.capture_seconds
        with (
            weights_for_sampling(learner.accelerator, policy.model),
            timed(Sampler, "_read") as read,
            timed(rollout, "_reset") as reset,
            timed(rollout, "_act") as act,
        ):
            sampling, episodes = clock(our_rollout, policy, envs, tasks, config, 0)
        batch = collate(episodes, policy.device)
        batch.reward[::2] = 1.0  # a group whose rewards are equal has nothing to learn
        updating, _ = clock(update, config, learner, batch, step_advantage(config, batch), iteration)
        seconds = {"sample": sampling, "read": sum(read), "capture": policy.capture_seconds - before}
        seconds |= {"environments": sum(reset + act), "update": updating, "all": sampling + updating}
        yield {f"{model}, {number} episodes, iteration {iteration}, seconds: {part}": s for part, s in seconds.items()}
    if policy.device.type == "cuda":
        parts = memory(config, shape_of(policy.model.config), 1, 2)
        yield {
            f"{model}, peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
            f"{model}, peak memory by the formula, GB": at_most(config, parts) / 1e9,
        }


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
    buffers = [buffer for layer in sampler.memory.cache.layers for buffer in layer.buffers]
    token = sum(buffer[0, :, 0].numel() * buffer.element_size() for buffer in buffers)  # bytes of its keys and values
    step = statistics.median(seconds[1:])  # the first captures graphs
    moved = weights + token * load.episodes * (columns + tokens * (repeats + 2) // 2)
    bandwidth = copy_bandwidth(policy.device)
    sampler.memory.count.zero_()
    # Not as a graph, in which no operation has a name.
    parts = profiled(sampler._decode, len(sampler.memory.ids), sampler.memory.columns - 1)
    return {
        "decode step, ms": 1000 * step,
        "decode step, GB that it must read": moved / 1e9,
        "copy bandwidth, GB a second": bandwidth / 1e9,
        "decode step, share of the bandwidth": moved / step / bandwidth,
    } | {f"decode step, ms of {part}": 1000 * seconds for part, seconds in parts.items()}


def measure_update(load: Load, config: TrainConfig, learner: Learner, repeats: int) -> dict[str, float]:
    """Share of the matrix peak in an update of `rows` episodes of `context` tokens, with gradient checkpointing.

    Counted are the operations of the model's forward and backward pass. Those that checkpointing computes again are not
    counted, so 75 % is the most that can be reached. The policy sampled a third of the tokens.
    """
    rows, length, device = load.rows, load.context, learner.policy.device
    config = replace(config, tasks_per_iteration=1, group_size=rows)
    batch = random_batch(rows, length, device)
    advantage = step_advantage(config, batch)
    seconds = [clock(update, config, learner, batch, advantage, i)[0] for i in range(repeats + 1)]
    model = learner.policy.model
    inner = sum(weight.numel() for weight in model.model.layers.parameters())
    attention = 2 * model.config.hidden_size * len(model.model.layers) * length / 2
    head = model.lm_head.weight.numel() * int(batch.mask.sum())
    operations = 6 * (rows * length * (inner + attention) + head)
    step, peak = statistics.median(seconds[1:]), matrix_peak(device)
    parts = profiled(update, config, learner, batch, advantage, 0)
    return {
        "update, tokens a second": rows * length / step,
        "matrix peak, Tflop a second": peak / 1e12,
        "update, share of the matrix peak": operations / step / peak,
    } | {f"update, seconds of {part}": seconds for part, seconds in parts.items()}


def profiled(work: Callable, *args) -> dict[str, float]:
    """Seconds that the device spent in each of PARTS, and in the rest, while work(*args) ran."""
    with profile() as record:
        clock(work, *args)
    seconds = defaultdict(float)
    for event in record.events():
        if event.device_type == DeviceType.CPU:  # what called the kernels; their time is its `self_device_time_total`
            on_device = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            seconds[part_of(event)] += on_device / 1e6
    return {part: seconds[part] for part in [*PARTS, "the rest"] if seconds[part]}


def part_of(event) -> str:
    """Which of PARTS an event of the profile belongs to."""
    names = []
    while event is not None:
        names.append(event.name.replace("_", "").lower())
        event = event.cpu_parent
    fits = (part for part, words in PARTS.items() if any(word in name for name in names for word in words))
    return next(fits, "the rest")


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
