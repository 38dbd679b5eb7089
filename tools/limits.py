"""How near a decode step and an update come to what the machine can do, and what takes their time."""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from engine.sampler import Sampler
from episode import Batch, Episode, Task
from policy import Policy
from tools.cost import Shape
from tools.loads import Load, clock, step_advantage
from tools.speed import Machine, Work, seconds
from update import Learner, update


@torch.inference_mode()
def measure_decode(load: Load, policy: Policy, shape: Shape, compute: int, repeats: int) -> tuple[dict, float, float]:
    """A decode step near the end of the context, the share of the copy bandwidth that it uses, and what takes the time.

    Counted are the bytes that a step must read: every weight once, and the keys and values of all tokens.
    Returns figures, bytes a second, and the fixed time of a layer in seconds.
    """
    tokens, episodes = load.step_tokens, load.episodes
    columns = load.context - (repeats + 2) * tokens
    histories = torch.randint(100, 500, (episodes, columns)).tolist()
    sampler = Sampler(policy, histories, 1.0, tokens, load.context)
    step = decode_step(sampler, histories, repeats)
    buffers = [buffer for layer in sampler.memory.cache.layers for buffer in layer.buffers]
    token = sum(buffer[0, :, 0].numel() * buffer.element_size() for buffer in buffers)  # bytes of its keys and values
    weights = compute * (shape.body + shape.width * shape.vocabulary)
    moved = weights + token * episodes * (columns + tokens * (repeats + 2) // 2)
    copy = copy_bandwidth(policy.device)
    sampler.memory.count.zero_()
    # Not as a graph, in which no operation has a name.
    parts = profiled(sampler._decode, len(sampler.memory.ids), sampler.memory.columns - 1)
    alone = [histories[0][:8]]
    short = decode_step(Sampler(policy, alone, 1.0, tokens, load.context), alone, repeats)
    figures = {
        "decode step, ms": 1000 * step,
        "decode step, GB that it must read": moved / 1e9,
        "copy bandwidth, GB a second": copy / 1e9,
        "decode step, share of the bandwidth": moved / step / copy,
        "decode step of one short episode, ms": 1000 * short,
    } | {f"decode step, ms of {part}": 1000 * spent for part, spent in parts.items()}
    # Both steps read the weights and take the fixed time of every layer. The rest is the cache.
    bandwidth = (moved - weights) / (step - short) if step > short else moved / step
    return figures, bandwidth, max(0.0, short - weights / bandwidth) / shape.layers


def decode_step(sampler: Sampler, histories: list[list[int]], repeats: int) -> float:
    """Seconds of a decode step: a turn's time over the tokens of a response."""
    times = []
    for _ in range(repeats + 1):
        uniform = torch.rand(len(histories), sampler.max_step_tokens, dtype=torch.float64)
        took, responses = clock(sampler.respond, histories, uniform)
        times.append(took / sampler.max_step_tokens)
        histories = [ids + response.ids for ids, response in zip(histories, responses, strict=True)]
    return statistics.median(times[1:])  # the first captures graphs


def measure_update(load: Load, learner: Learner, shape: Shape, layer: float, repeats: int) -> tuple[dict, float]:
    """Share of the matrix peak in an update of `rows` episodes of `context` tokens, and what takes the time.

    Counted are the operations of the model's forward and backward pass. What is computed a second time is not counted:
    the head, and with gradient checkpointing all layers, so that 75 % is the most that can be reached there. The
    policy sampled a third of the tokens.

    layer: fixed time of a layer, seconds.  Returns figures, and operations a second, recomputation counted.
    """
    rows, length, device = load.rows, load.context, learner.policy.device
    config = replace(load.config, tasks_per_iteration=1, group_size=rows)
    batch = random_batch(rows, length, device)
    advantage = step_advantage(config, batch)
    times = [clock(update, config, learner, batch, advantage, number)[0] for number in range(repeats + 1)]
    step = statistics.median(times[1:])
    attention = 2 * shape.width * shape.layers * length / 2
    head = shape.width * shape.vocabulary * int(batch.mask.sum())
    operations, peak = 6 * (rows * length * (shape.body + attention) + head), matrix_peak(device)
    work = Work(rows, rows, prompt=64, turns=length / 96, sampled=32, inserted=64)
    parts = profiled(update, config, learner, batch, advantage, 0)
    figures = {
        "update, tokens a second": rows * length / step,
        "matrix peak, Tflop a second": peak / 1e12,
        "update, share of the matrix peak": operations / step / peak,
    } | {f"update, seconds of {part}": spent for part, spent in parts.items()}
    ideal, fixed = Machine(layer=0, flop=1), Machine(layer, flop=math.inf)
    flop, overhead = (seconds(shape, work, machine, config)["update"] for machine in (ideal, fixed))
    return figures, flop / max(step - overhead, 1e-3 * step)


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
    times = [clock(target.copy_, source)[0] for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def matrix_peak(device: torch.device) -> float:
    """Operations a second of a product of two square matrices, in bfloat16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / statistics.median(clock(torch.matmul, a, a)[0] for _ in range(9))


# -------------------------------------------------------------------------------------------------- what takes the time

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


def profiled(work: Callable, *args) -> dict[str, float]:
    """Seconds that the device spent in each of PARTS, and in the rest, while work(*args) ran."""
    with profile() as record:
        clock(work, *args)
    spent = defaultdict(float)
    for event in record.events():
        if event.device_type == DeviceType.CPU:  # what called the kernels; their time is its `self_device_time_total`
            on_device = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            spent[part_of(event)] += on_device / 1e6
    if not any(spent.values()):
        print("the profiler cannot time this device, so no times of parts follow", file=sys.stderr)
    return {part: spent[part] for part in [*PARTS, "the rest"] if spent[part]}


def part_of(event) -> str:
    """Which of PARTS an event of the profile belongs to."""
    names = []
    while event is not None:
        names.append(event.name.replace("_", "").lower())
        event = event.cpu_parent
    fits = (part for part, words in PARTS.items() if any(word in name for name in names for word in words))
    return next(fits, "the rest")
