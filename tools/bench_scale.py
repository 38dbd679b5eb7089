"""Seconds of an iteration, computed from the sizes of a model, and compared with measured iterations of two models.

    python -m tools.bench_scale                           measure, one process
    torchrun --nproc_per_node 2 -m tools.bench_scale      measure, two processes that share the episodes
    python -m tools.bench_scale --table                   measured and computed, as markdown
    python -m tools.bench_scale --gpus                    computed alone: three presets on GPUs, as markdown

One model is ten times the size of the other. A measured point is a whole iteration of the training code: a model with
random weights plays episodes in the House, each as long as it may be, and is updated. Each point is a line in
docs/scaling.jsonl. Three constants are fitted to the two shortest points of one process. All other points are
predictions.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy.optimize import least_squares
from transformers import Qwen2Config

from config import TrainConfig, parse_config
from engine.files import require_writable_file
from engine.ranks import start_ranks
from engine.record import revision
from envs import make_envs
from episode import Episode, Task, collate
from imitate import empty_model
from rollout import rollout
from tools.bench_rollout import clock, random_learner, step_advantage
from tools.cost import Shape, shape_of
from update import Learner, update

# ------------------------------------------------------------------------------------------------------- the formula


@dataclass(frozen=True)
class Work:
    """What one process does in an iteration: it samples episodes of equal length in parallel, then trains on them."""

    episodes: int
    group: int  # episodes of one task, whose prompt is read once
    prompt: float  # tokens of the prompt
    turns: int
    sampled: float  # tokens of a response
    inserted: float  # tokens between two responses: observation and template

    @property
    def length(self) -> float:
        """Tokens of an episode."""
        return self.prompt + self.turns * self.sampled + (self.turns - 1) * self.inserted


@dataclass(frozen=True)
class Machine:
    """The speed of a process. docs/scaling.md says where the numbers come from."""

    layer: float  # fixed overhead of a layer's forward pass, seconds
    decode: float  # FLOP a second while sampling, one token for each episode
    update: float  # FLOP a second on long sequences: reading observations, forward and backward passes
    bandwidth: float = float("inf")  # bytes a second from memory
    link: float = float("inf")  # bytes a second to the other processes
    compute: int = 4  # bytes of a number in matrix products


def seconds(shape: Shape, work: Work, machine: Machine, config: TrainConfig, ranks: int = 1) -> dict[str, float]:
    """Seconds of an iteration by part: "decode", "read", "update", "communicate". Environments are not counted.

    A matrix of n weights costs 2n FLOP a token forward and 4n backward. Gradient checkpointing adds a forward pass. The
    head scores the sampled tokens only, and computes its logits twice. A decode step reads all weights and the cache.
    It takes the longer of two times: that of its arithmetic and that of its reads from memory.
    """
    head = shape.width * shape.vocabulary
    sampled, steps = work.episodes * work.turns * work.sampled, work.turns * work.sampled
    cache = shape.layers * 2 * shape.keys * machine.compute * work.episodes * work.length / 2  # half full on average
    arithmetic = 2 * (shape.body + head) * work.episodes / machine.decode
    moved = (machine.compute * (shape.body + head) + cache) / machine.bandwidth
    attention = 2 * shape.layers * shape.width * work.length**2  # FLOP of an episode, forward, causal
    passes = 4 if config.gradient_checkpointing else 3  # in units of a forward pass
    update = passes * (2 * shape.body * work.length + attention) * work.episodes + 8 * head * sampled
    optimizer_steps = config.epochs * config.mini_batches
    batches = max(1, work.episodes * work.length // config.micro_batch_tokens)
    read = work.episodes * (work.prompt / work.group + (work.turns - 1) * work.inserted)
    # FSDP gathers the weights in each forward and backward pass, and scatters gradients. DDP all-reduces gradients.
    traffic = batches * (2 * machine.compute + 4) if config.fsdp else optimizer_steps * 2 * 4
    return {
        "decode": steps * (shape.layers * machine.layer + max(arithmetic, moved)),
        "read": work.turns * shape.layers * machine.layer + 2 * shape.body * read / machine.update,
        "update": config.epochs * (update / machine.update + batches * passes * shape.layers * machine.layer),
        "communicate": shape.parameters * traffic * (ranks - 1) / ranks / machine.link,
    }


# ------------------------------------------------------------------------------------------------------- measurements

COMMON = {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 4096}
MODELS = {
    "3M": COMMON | {"hidden_size": 192, "num_hidden_layers": 5, "intermediate_size": 704, "num_attention_heads": 6},
    "30M": COMMON | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1792, "num_attention_heads": 8},
}
GROUP = 4  # episodes of a task
EPISODES, TURNS, RESPONSE = (8, 32), (3, 9), 16  # of an iteration; of an episode; tokens of a response
FITTED = (EPISODES[0], TURNS[0])
FILE = Path(__file__).parents[1] / "docs" / "scaling.jsonl"


@dataclass(frozen=True)
class ScaleConfig:
    """Measure iterations, or compare them with the formula."""

    repeats: int = field(default=3, metadata={"help": "measurements of a point; their median counts"})
    table: bool = field(default=False, metadata={"help": "measure nothing, print the table"})
    gpus: bool = field(default=False, metadata={"help": "measure nothing, print what presets would take on GPUs"})
    file: str = field(default=str(FILE), metadata={"help": "file of the measured points"})


def settings(episodes: int) -> TrainConfig:
    return TrainConfig(
        tasks_per_iteration=episodes // GROUP,
        group_size=GROUP,
        max_step_tokens=RESPONSE,
        max_tokens=2048,
        mini_batches=1,
    )


def measure(accelerator: Accelerator, learner: Learner, name: str, episodes: int, turns: int, repeats: int) -> dict:
    """One point: seconds of sampling and of the update, medians, of the slowest process."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    config = settings(episodes)
    envs = make_envs("house", [f"max_steps={turns}"], episodes // ranks)
    samples, updates = [], []
    for repeat in range(repeats):
        tasks = [Task("house", "train", i // GROUP) for i in range(episodes)][rank::ranks]
        seeds = [(repeat, i) for i in range(episodes)][rank::ranks]
        sampling, played = clock(rollout, learner.policy, envs, tasks, seeds, **config.limits)
        batch = collate(gather_object(played), accelerator.device)
        batch.reward[::2] = 1.0  # a group whose rewards are equal has nothing to learn
        accelerator.wait_for_everyone()
        updating, _ = clock(update, config, learner, batch, step_advantage(config, batch), 1)
        slowest = accelerator.gather(torch.tensor([[sampling, updating]], device=accelerator.device)).amax(0)
        samples.append(float(slowest[0]))
        updates.append(float(slowest[1]))
    work = work_of(played, turns)
    point = {"model": name, "ranks": ranks, "episodes": episodes, "turns": turns, "work": asdict(work)}
    return point | {"sample": statistics.median(samples), "update": statistics.median(updates), "commit": revision()}


def work_of(played: list[Episode], turns: int) -> Work:
    """The work of a process that played these episodes, with mean numbers of tokens."""
    steps = [step for episode in played for step in episode.steps]
    sampled = sum(step.end - step.start for step in steps) / len(steps)
    prompts = sum(episode.steps[0].start for episode in played)
    tokens = sum(len(episode.ids) for episode in played)
    inserted = (tokens - prompts - len(steps) * sampled) / (len(steps) - len(played))
    return Work(len(played), GROUP, round(prompts / len(played), 2), turns, round(sampled, 2), round(inserted, 2))


# ------------------------------------------------------------------------------------------------- against the formula


def computed(point: dict, machine: Machine) -> tuple[float, float]:
    """Seconds of sampling and of the update, as the formula has them."""
    shape, work = shape_of(empty_model(Qwen2Config(**MODELS[point["model"]]))), Work(**point["work"])
    parts = seconds(shape, work, machine, settings(point["episodes"]), point["ranks"])
    return parts["decode"] + parts["read"], parts["update"] + parts["communicate"]


def fit(points: list[dict]) -> Machine:
    """The constants with which the formula gives these points: time of a layer, arithmetic, bandwidth."""

    def machine_of(logs: np.ndarray) -> Machine:
        layer, arithmetic, bandwidth = np.exp(logs).tolist()
        return Machine(layer, arithmetic, arithmetic, bandwidth)

    def error(logs: np.ndarray) -> list[float]:
        machine = machine_of(logs)
        pairs = [(computed(point, machine), (point["sample"], point["update"])) for point in points]
        return [float(np.log(a / b)) for formula, measured in pairs for a, b in zip(formula, measured, strict=True)]

    return machine_of(least_squares(error, np.log([3e-4, 5e10, 1e10])).x)


def table(points: list[dict]) -> str:
    """Every point, and what the formula says of it."""
    fitted = [point for point in points if point["ranks"] == 1 and (point["episodes"], point["turns"]) == FITTED]
    machine = fit(fitted)
    lines = [
        f"{machine.layer * 1e6:.0f} µs a layer, {machine.update / 1e9:.1f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s",
        "",
        "| model | processes | episodes | turns | sampling, s | formula | update, s | formula | formula / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = [point[name] for name in ("model", "ranks", "episodes", "turns")]
        sampling, update = computed(point, machine)
        ratio = (sampling + update) / (point["sample"] + point["update"])
        cells += [f"{x:.2f}" for x in (point["sample"], sampling, point["update"], update)]
        lines.append(f"| {' | '.join(map(str, cells))} | {'fitted' if point in fitted else f'{ratio:.2f}'} |")
    return "\n".join(lines)


# Assumed, not measured: 40 % of an H200's 989 TFLOP/s in bf16 and of its 4.8 TB/s, 10 µs a layer with CUDA graphs, and
# between machines 50 GB/s for each GPU, within a machine 450 GB/s.
GPU = Machine(layer=1e-5, decode=4e14, update=4e14, bandwidth=1.9e12, link=4.5e11, compute=2)
OF_ALFWORLD = {"group": 8, "prompt": 1500, "turns": 30, "sampled": 80, "inserted": 60}  # assumed, in tokens
OF_SEARCH = {"group": 8, "prompt": 1000, "turns": 4, "sampled": 150, "inserted": 700}
PRESETS = {  # shape; processes; episodes of a process; episodes at once; lengths; machine
    "qwen1.5b, ALFWorld": (
        Shape(1_543_714_304, 1_310_340_608, 28, 1536, 8960, 256, 151_936),
        *(8, 16, 16, OF_ALFWORLD, GPU),
    ),
    "qwen7b, ALFWorld": (
        Shape(7_615_616_512, 6_525_621_760, 28, 3584, 18_944, 512, 152_064),
        *(8, 16, 16, OF_ALFWORLD, GPU),
    ),
    "qwen32b, Deep Search": (
        Shape(32_763_876_352, 31_206_740_992, 64, 5120, 27_648, 1024, 152_064),
        *(32, 64, 16, OF_SEARCH, replace(GPU, link=5e10)),
    ),
}


def gpu_table() -> str:
    """Seconds of an iteration of three presets, as the formula has them."""
    lines = [
        "| preset | GPUs | decode | read | update | communicate | an iteration, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (shape, ranks, episodes, at_once, lengths, machine) in PRESETS.items():
        config = TrainConfig(gradient_checkpointing=True, fsdp=shape.parameters > 5e9, micro_batch_tokens=16384)
        waves = episodes // at_once  # the episodes of a process are sampled in waves
        sampling = seconds(shape, Work(at_once, **lengths), machine, config, ranks)
        learning = seconds(shape, Work(episodes, **lengths), machine, config, ranks)
        parts = [waves * sampling["decode"], waves * sampling["read"], learning["update"], learning["communicate"]]
        lines.append(f"| {name} | {ranks} | {' | '.join(f'{part:.0f}' for part in (*parts, sum(parts)))} |")
    return "\n".join(lines)


def main() -> None:
    scale = parse_config(ScaleConfig)
    file = Path(scale.file)
    if scale.gpus:
        return print(gpu_table())
    if not scale.table:
        require_writable_file(file)
        accelerator = start_ranks(threads=1)
        for name in MODELS:
            learner = random_learner(accelerator, settings(4), MODELS[name])
            for episodes, turns in product(EPISODES, TURNS):
                point = measure(accelerator, learner, name, episodes, turns, scale.repeats)
                if accelerator.is_main_process:
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(point) + "\n")
        accelerator.end_training()
        if not accelerator.is_main_process:
            return
    print(table([json.loads(line) for line in file.read_bytes().splitlines()]))


if __name__ == "__main__":
    main()
