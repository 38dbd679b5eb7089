"""What a run costs, on paper: memory of a process, seconds of an iteration; and --dry_run, which says it beforehand.

    python train.py --dry_run 8 --policy Qwen/Qwen2.5-7B-Instruct ...     as one of eight processes

No weights are loaded, only the model's configuration. Its parameters are counted on a model without storage. The other
terms are products of its sizes; docs/scaling.md derives them, and tests/test_cost.py compares them with what PyTorch
allocates.

Not counted: the CUDA context (about 1 GB), buffers of communication, and fragmentation. A run should leave a tenth of
the device free.
"""

import os
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from config import TrainConfig
from engine.scorer import CHUNK_ELEMENTS
from policy import PolicyError, require_model
from tiny import TinyConfig, tiny_model_config

FREE = 0.1  # share of a device's memory that a run should leave free
# Bytes that a layer keeps of a token for its backward pass, for each unit of its width, of the MLP's and of the keys':
# in float32, and in mixed precision, where the residual stream stays in float32.
KEPT = {4: (32, 16, 8), 2: (30, 8, 4)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    parameters: int  # weights shared by embedding and head count once
    body: int  # those of the layers: without embedding and head
    layers: int
    width: int  # of the hidden states
    inner: int  # of the MLP
    keys: int  # width of the keys of a token in one layer, that of the values too
    vocabulary: int


def shape_of(config: PretrainedConfig) -> Shape:
    """The sizes of the model that a transformers configuration describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = lambda part: sum(parameter.numel() for parameter in part.parameters())  # noqa: E731
    return Shape(
        parameters=count(model),
        body=count(model.base_model) - count(model.get_input_embeddings()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        keys=head * config.num_key_value_heads,
        vocabulary=config.vocab_size,
    )


def memory(config: TrainConfig, shape: Shape, ranks: int, compute: int) -> dict[str, dict[str, float]]:
    """Bytes that one of `ranks` processes takes: "always", and on top of it while "sampling" and in the "update".

    compute: bytes of a number in matrix products: 4, or 2 in mixed precision. Weights, gradients and the two moments of
    AdamW are in float32. With --fsdp each process keeps its share of them.
    """
    own = 4 * shape.parameters / (ranks if config.fsdp else 1)  # one number in float32 for each parameter
    whole = compute * shape.parameters  # the weights as matrix products take them
    rows = min(config.batch_size, tasks_of_rank(config, ranks) * config.group_size)
    tokens = max(config.micro_batch_tokens, config.max_tokens)  # an episode longer than the budget goes alone
    layer = sum(a * b for a, b in zip(KEPT[compute], (shape.width, shape.inner, shape.keys), strict=True))
    return {
        "always": {"weights": own, "AdamW": 2 * own, "reference": own if config.kl_coef else 0},
        "sampling": {
            "weights to sample with": whole if config.fsdp or compute < 4 else 0,
            "KV cache": 2 * shape.layers * shape.keys * compute * rows * config.max_tokens,
            "logits of a token": rows
            * shape.vocabulary
            * (compute + 4 + 8 + 8),  # and in float32, and twice in float64
        },
        "update": {
            "gradients": own,
            # FSDP gathers a layer while the one before it computes; embedding and head stay. Autocast keeps every cast.
            "weights to compute with": whole - compute * shape.body * (1 - 2 / shape.layers)
            if config.fsdp
            else whole * (compute < 4),
            # Gradient checkpointing keeps the input of each layer, in float32, and one layer in full.
            "activations": tokens * (4 * shape.width * shape.layers + layer)
            if config.gradient_checkpointing
            else tokens * layer * shape.layers,
            "head": 8 * min(CHUNK_ELEMENTS, tokens * shape.vocabulary)
            + (4 + compute) * shape.width * shape.vocabulary,  # logits; gradient of weights
        },
    }


@dataclass(frozen=True)
class Work:
    """What one process does in an iteration: episodes of equal length, sampled side by side, then learnt from."""

    episodes: int
    group: int  # episodes that begin alike; their opening is read once
    opening: float  # tokens before the first response
    turns: int
    sampled: float  # tokens of a response
    inserted: float  # tokens between two responses: observation and template

    @property
    def length(self) -> float:
        """Tokens of an episode."""
        return self.opening + self.turns * self.sampled + (self.turns - 1) * self.inserted


@dataclass(frozen=True)
class Machine:
    """What a process has to work with. docs/scaling.md says where the numbers come from."""

    layer: float  # seconds that one layer of one forward pass takes beside its arithmetic: launching, small operations
    decode: float  # FLOP a second while sampling, one token a row
    update: float  # FLOP a second in long sequences: reading observations, forward and backward passes
    bandwidth: float = float("inf")  # bytes a second from memory
    link: float = float("inf")  # bytes a second to the other processes
    compute: int = 4  # bytes of a number in matrix products


def seconds(shape: Shape, work: Work, machine: Machine, config: TrainConfig, ranks: int = 1) -> dict[str, float]:
    """Seconds of an iteration by part: "decode", "read", "update", "communicate"; environments are not counted.

    A matrix of n weights costs 2n FLOP a token forward and 4n backward; gradient checkpointing adds another forward
    pass. The head scores the sampled tokens alone, and computes its logits twice. A decode step reads all weights and
    the cache, so it takes as long as its arithmetic or its memory, whichever is longer.
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
    read = work.episodes * (work.opening / work.group + (work.turns - 1) * work.inserted)
    # FSDP gathers the weights for each forward and each backward pass, and scatters gradients; DDP adds gradients up.
    traffic = batches * (2 * machine.compute + 4) if config.fsdp else optimizer_steps * 2 * 4
    return {
        "decode": steps * (shape.layers * machine.layer + max(arithmetic, moved)),
        "read": work.turns * shape.layers * machine.layer + 2 * shape.body * read / machine.update,
        "update": config.epochs * (update / machine.update + batches * passes * shape.layers * machine.layer),
        "communicate": shape.parameters * traffic * (ranks - 1) / ranks / machine.link,
    }


def tasks_of_rank(config: TrainConfig, ranks: int) -> int:
    """Tasks of an iteration that the busiest rank plays."""
    return -(-config.tasks_per_iteration // ranks)


def dry_run(config: TrainConfig) -> str:
    """What a run on config.dry_run processes would load, take and do. Ends the program if it does not fit.

    Raises PolicyError if there is no configuration of the model.
    """
    ranks, precision = config.dry_run, os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    compute = 2 if precision in ("bf16", "fp16") else 4
    shape = shape_of(read_config(config.policy))
    parts = memory(config, shape, ranks, compute)
    episodes, longest = config.tasks_per_iteration * config.group_size, config.max_tokens
    own = tasks_of_rank(config, ranks) * config.group_size
    kind = "FSDP2" if config.fsdp else "DDP" if ranks > 1 else "no other"
    sizes = f"{shape.layers} layers of width {shape.width:,}, vocabulary {shape.vocabulary:,}"
    lines = [
        f"policy      {config.policy}: {shape.parameters:,} parameters, {sizes}",
        f"reference   {'the same' if config.kl_coef else 'none'}",
        f"world       {' '.join([config.env, *config.settings])}",
        f"processes   {ranks}, {kind}, mixed precision {precision}",
        f"iteration   {episodes} episodes of at most {longest:,} tokens, {episodes * longest:,} in all, "
        f"{own * longest:,} of one process; {config.epochs * config.mini_batches} optimizer steps",
        f"run         {config.iterations} iterations, {config.iterations * episodes:,} episodes",
        "",
        "memory of one process, GB",
    ]
    for name, terms in parts.items():
        lines += [f"  {name:10}{term:26}{size / 1e9:8.2f}" for term, size in terms.items() if size]
    always, *others = (sum(terms.values()) / 1e9 for terms in parts.values())
    most = always + max(others)
    lines += [f"  {'at most':36}{most:8.2f}", ""]
    if most > (1 - FREE) * config.gpu_memory:
        advice = ["--gradient_checkpointing"] * (not config.gradient_checkpointing) + ["--fsdp"] * (not config.fsdp)
        advice += ["a smaller --batch_size"] if others[0] > others[1] else ["a smaller --micro_batch_tokens"]
        lines.append(
            f"does not fit {config.gpu_memory:g} GB with a tenth left free; try {', '.join(advice)}, or more processes"
        )
        raise SystemExit("\n".join(lines))
    return "\n".join([*lines, f"fits {config.gpu_memory:g} GB"])


def read_config(policy: str) -> PretrainedConfig:
    """The configuration of a folder, of a hub id, or of the tiny model. Raises PolicyError if there is none."""
    if policy == "tiny":
        return tiny_model_config(TinyConfig(), TinyConfig.vocab_size)
    try:
        require_model(policy)
        return AutoConfig.from_pretrained(policy)
    except (OSError, ValueError) as error:
        raise PolicyError(f"no configuration of a model at {policy!r}: {str(error).splitlines()[0]}") from error
