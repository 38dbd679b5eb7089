"""Seconds of an iteration, computed from the sizes of a model and the speed of a machine.

    python -m tools.speed        three presets of runs/llm.sh on GPUs, as markdown

`seconds` is the formula. docs/scaling.md derives it, and `python -m tools.bench` compares it with measured iterations.
"""

import math
from dataclasses import dataclass, replace

from config import TrainConfig
from tools.cost import Shape


@dataclass(frozen=True)
class Work:
    """What one process does in an iteration: it samples episodes of equal length in parallel, then trains on them."""

    episodes: int
    group: int  # episodes of one task, whose prompt is read once
    prompt: float  # tokens of the prompt
    turns: float
    sampled: float  # tokens of a response
    inserted: float  # tokens between two responses: observation and template

    @property
    def length(self) -> float:
        """Tokens of an episode."""
        return self.prompt + self.turns * self.sampled + (self.turns - 1) * self.inserted


@dataclass(frozen=True)
class Machine:
    """The speed of a process."""

    layer: float  # fixed overhead of a layer's forward pass, seconds
    flop: float  # arithmetic operations a second
    bandwidth: float = float("inf")  # bytes a second from memory
    link: float = float("inf")  # bytes a second to the other processes
    compute: int = 4  # bytes of a number in matrix products


def seconds(shape: Shape, work: Work, machine: Machine, config: TrainConfig, ranks: int = 1) -> dict[str, float]:
    """Seconds of an iteration by part: "decode", "read", "update", "communicate". Environments are not counted.

    A matrix of n weights costs 2n FLOP a token forward and 4n backward. Gradient checkpointing adds a forward pass, and
    the reference of a KL penalty another. The head scores the sampled tokens only, and computes its logits twice. A
    decode step reads all weights and the cache. It takes the longer of two times: that of its arithmetic and that of
    its reads from memory.
    """
    head, reference = shape.width * shape.vocabulary, config.kl_coef > 0
    sampled, decode_steps = work.episodes * work.turns * work.sampled, work.turns * work.sampled
    cache = shape.layers * 2 * shape.keys * machine.compute * work.episodes * work.length / 2  # half full on average
    arithmetic = 2 * (shape.body + head) * work.episodes / machine.flop
    reading = (machine.compute * (shape.body + head) + cache) / machine.bandwidth
    inserted = work.episodes * (work.prompt / work.group + (work.turns - 1) * work.inserted)
    attention = 2 * shape.layers * shape.width * work.length**2  # FLOP of an episode, forward, causal
    passes = 3 + config.gradient_checkpointing + reference  # in units of a forward pass
    update = passes * (2 * shape.body * work.length + attention) * work.episodes + (8 + 2 * reference) * head * sampled
    rows = max(1, config.micro_batch_tokens // work.length)  # episodes of a micro-batch
    micro_batches = config.mini_batches * math.ceil(work.episodes / config.mini_batches / rows)
    # FSDP gathers the weights in each forward and backward pass, and scatters gradients. DDP all-reduces gradients.
    fsdp = micro_batches * ((2 + reference) * machine.compute + 4)
    traffic = fsdp if config.fsdp else config.mini_batches * 2 * 4  # bytes a parameter
    return {
        "decode": decode_steps * (shape.layers * machine.layer + max(arithmetic, reading)),
        "read": work.turns * shape.layers * machine.layer + 2 * shape.body * inserted / machine.flop,
        "update": config.epochs * (update / machine.flop + micro_batches * passes * shape.layers * machine.layer),
        "communicate": config.epochs * shape.parameters * traffic * (ranks - 1) / ranks / machine.link,
    }


# An H200 in bf16 (docs/scaling.md). Measured: arithmetic in an update, bandwidth in a decode step. Assumed: 10 µs a
# layer with CUDA graphs, 450 GB/s between GPUs of a machine, 50 GB/s for each GPU between machines.
H200 = Machine(layer=1e-5, flop=3.37e14, bandwidth=1.65e12, link=4.5e11, compute=2)
OF_ALFWORLD = {"group": 8, "prompt": 1500, "turns": 30, "sampled": 80, "inserted": 60}  # assumed, in tokens
OF_SEARCH = {"group": 8, "prompt": 1000, "turns": 4, "sampled": 150, "inserted": 700}
# Shape; processes; episodes of a process; episodes at once; lengths; machine; mini-batches and tokens of a micro-batch.
PRESETS = {
    "qwen1.5b, ALFWorld": (
        Shape(1_543_714_304, 1_310_340_608, 28, 1536, 8960, 256, 151_936),
        *(8, 16, 16, OF_ALFWORLD, H200, 16, 32_768),
    ),
    "qwen7b, ALFWorld": (
        Shape(7_615_616_512, 6_525_621_760, 28, 3584, 18_944, 512, 152_064),
        *(8, 16, 16, OF_ALFWORLD, H200, 16, 16_384),
    ),
    "qwen32b, Deep Search": (
        Shape(32_763_876_352, 31_206_740_992, 64, 5120, 27_648, 1024, 152_064),
        *(32, 64, 16, OF_SEARCH, replace(H200, link=5e10), 8, 8192),
    ),
}


def main() -> None:
    print("| preset | GPUs | decode | read | update | communicate | an iteration, s |\n|---|---|---|---|---|---|---|")
    for name, (shape, ranks, episodes, at_once, lengths, machine, mini_batches, tokens) in PRESETS.items():
        config = TrainConfig(
            gradient_checkpointing=True,
            fsdp=shape.parameters > 5e9,
            kl_coef=0.001,
            mini_batches=mini_batches,
            micro_batch_tokens=tokens,
        )
        sampling, learning = (seconds(shape, Work(n, **lengths), machine, config, ranks) for n in (at_once, episodes))
        waves = episodes // at_once  # the episodes of a process are sampled in waves
        parts = [waves * sampling["decode"], waves * sampling["read"], learning["update"], learning["communicate"]]
        print(f"| {name} | {ranks} | {' | '.join(f'{part:.0f}' for part in (*parts, sum(parts)))} |")


if __name__ == "__main__":
    main()
