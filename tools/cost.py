"""The dry run: what memory a process of a run takes, computed before any weights are loaded.

    python -m tools.cost --processes 8 --mixed_precision bf16 --policy Qwen/Qwen2.5-7B-Instruct --fsdp

The command takes the flags of train.py and three of its own. It reads the model's configuration only. The parameters
are counted on a model without storage. The other terms are products of the model's sizes. docs/scaling.md lists them,
and tests/tools/test_cost.py compares them with what PyTorch allocates.

Not counted: the CUDA context (about 1 GB), buffers of communication, and fragmentation. A run should leave a tenth of
the device free.
"""

import argparse
import os
from dataclasses import dataclass

from transformers import PreTrainedModel

from config import TrainConfig, parse_config
from engine.sampler import ROUNDING, round_up
from engine.scorer import CHUNK_ELEMENTS, make_scorable
from imitate import empty_model, read_config
from policy import refused, require_context

HEADROOM = 0.1  # share of a device's memory that a run should leave free
# Bytes that a layer keeps for its backward pass, for one token, per unit of its width, of the MLP's width and of the
# keys' width. By the bytes of a number: in float32; in mixed precision, where the residual stream stays in float32.
KEPT = {4: (32, 16, 8), 2: (30, 8, 4)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    parameters: int  # a weight that embedding and head share counts once
    body: int  # parameters of the layers: without embedding and head
    layers: int
    width: int  # of the hidden states
    inner: int  # width of the MLP
    keys: int  # width of the keys in one layer; the values have the same
    vocabulary: int


def shape_of(model: PreTrainedModel) -> Shape:
    """The sizes of a model, which may have no storage. Where its configuration is silent, they are those of GPT-2."""
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    return Shape(
        parameters=model.num_parameters(),
        body=model.base_model.num_parameters() - model.get_input_embeddings().weight.numel(),
        layers=config.num_hidden_layers,
        width=width,
        inner=getattr(config, "intermediate_size", None) or 4 * width,
        keys=(getattr(config, "head_dim", None) or width // heads) * getattr(config, "num_key_value_heads", heads),
        vocabulary=config.vocab_size,
    )


def memory(config: TrainConfig, shape: Shape, ranks: int, compute: int) -> dict[str, dict[str, float]]:
    """Bytes that one of `ranks` processes takes: "always", and in addition for "sampling" and in the "update".

    On a GPU, what sampling takes stays during the update, because captured graphs know its addresses. With --fsdp it is
    freed first. `at_most` adds them up.

    compute: bytes of a number in matrix products: 4, or 2 in mixed precision. Weights, gradients and the two moments of
    AdamW are in float32. With --fsdp each process keeps its share of them.
    """
    own = 4 * shape.parameters / (ranks if config.fsdp else 1)  # one number in float32 for each parameter
    whole = compute * shape.parameters  # all weights in compute precision
    of_eval = -(-config.eval_tasks // ranks)  # evaluation samples in the memory of training
    most = min(config.batch_size, max(tasks_of_rank(config, ranks) * config.group_size, of_eval))
    rows, columns = round_up(most, ROUNDING["cuda"][0]), round_up(config.max_tokens, ROUNDING["cuda"][1]) + 1
    return {
        "always": {"weights": own, "AdamW": 2 * own, "reference": own if config.kl_coef else 0},
        "sampling": {
            "weights to sample with": whole if config.fsdp or compute < 4 else 0,
            "KV cache": 2 * shape.layers * shape.keys * compute * rows * columns,
            # in compute precision, in float32, and twice in float64
            "logits of a token": rows * shape.vocabulary * (compute + 4 + 8 + 8),
        },
        "update": {"gradients": own} | _update_memory(config, shape, compute),
    }


def at_most(config: TrainConfig, parts: dict[str, dict[str, float]]) -> float:
    """The largest sum of terms, bytes, that a process takes at a time.  parts: as `memory` returns them."""
    always, sampling, update = (sum(terms.values()) for terms in parts.values())
    return always + (max(sampling, update) if config.fsdp else sampling + update)


def _update_memory(config: TrainConfig, shape: Shape, compute: int) -> dict[str, float]:
    """Bytes of an update beside its gradients."""
    if config.fsdp:  # gathers one layer while the layer before it computes; embedding and head stay gathered
        weights = compute * shape.parameters - compute * shape.body * (1 - 2 / shape.layers)
    elif compute < 4:  # autocast keeps every weight that it cast
        weights = compute * shape.parameters
    else:
        weights = 0
    tokens = max(config.micro_batch_tokens, config.max_tokens)  # an episode longer than the budget goes alone
    layer = sum(a * b for a, b in zip(KEPT[compute], (shape.width, shape.inner, shape.keys), strict=True))
    # Gradient checkpointing keeps the input of each layer, in float32, and one layer in full.
    kept = 4 * shape.width * shape.layers + layer if config.gradient_checkpointing else layer * shape.layers
    logits = 8 * min(CHUNK_ELEMENTS, tokens * shape.vocabulary)
    head_gradient = (4 + compute) * shape.width * shape.vocabulary
    return {"weights to compute with": weights, "activations": tokens * kept, "head": logits + head_gradient}


def tasks_of_rank(config: TrainConfig, ranks: int) -> int:
    """Tasks of an iteration that the busiest rank plays."""
    return -(-config.tasks_per_iteration // ranks)


def dry_run(config: TrainConfig, processes: int, gpu_memory: float, precision: str) -> str:
    """What a run on this many processes would load and take. Ends the program with advice if it does not fit.

    gpu_memory: of one device, GB.  precision: Accelerate's mixed precision.
    Raises PolicyError if there is no configuration of the model, or it says that training would refuse the model.
    """
    with refused(f"the dry run cannot describe {config.policy!r}"):
        described = read_config(config.policy)
        require_context(described, config.max_tokens)
        shape = shape_of(make_scorable(empty_model(described)))
    parts = memory(config, shape, processes, 2 if precision in ("bf16", "fp16") else 4)
    lines = [*describe(config, shape, processes, precision), "", "memory of one process, GB"]
    for name, terms in parts.items():
        lines += [f"  {name:10}{term:26}{size / 1e9:8.2f}" for term, size in terms.items() if size]
    most = at_most(config, parts) / 1e9
    lines += [f"  {'at most':36}{most:8.2f}", ""]
    if most <= (1 - HEADROOM) * gpu_memory:
        return "\n".join([*lines, f"fits {gpu_memory:g} GB"])
    advice = [f"--{flag}" for flag in ("gradient_checkpointing", "fsdp") if not getattr(config, flag)]
    sampling, update = (sum(parts[name].values()) for name in ("sampling", "update"))
    advice.append("a smaller --batch_size" if sampling > update else "a smaller --micro_batch_tokens")
    lines.append(f"does not fit {gpu_memory:g} GB with a tenth left free; try {', '.join(advice)}, or more processes")
    raise SystemExit("\n".join(lines))


def describe(config: TrainConfig, shape: Shape, ranks: int, precision: str) -> list[str]:
    """The run in six lines."""
    episodes, longest = config.tasks_per_iteration * config.group_size, config.max_tokens
    own = tasks_of_rank(config, ranks) * config.group_size
    kind = "FSDP2" if config.fsdp else "DDP" if ranks > 1 else "no other"
    sizes = f"{shape.layers} layers of width {shape.width:,}, vocabulary {shape.vocabulary:,}"
    return [
        f"policy      {config.policy}: {shape.parameters:,} parameters, {sizes}",
        f"reference   {'the same' if config.kl_coef else 'none'}",
        f"world       {' '.join([config.env, *config.env_args])}",
        f"processes   {ranks}, {kind}, mixed precision {precision}",
        f"iteration   {episodes} episodes of at most {longest:,} tokens, {episodes * longest:,} in all, "
        f"{own * longest:,} of one process; {config.epochs * config.mini_batches} optimizer steps",
        f"run         {config.iterations} iterations, {config.iterations * episodes:,} episodes",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cost",
        usage="%(prog)s [--processes N] [--gpu_memory GB] [--mixed_precision TYPE] [flags of train.py]",
        description="What a run of train.py would take. Ends with status 1 and advice if it does not fit.",
        epilog="All other flags are those of train.py: python train.py --help lists them.",
        allow_abbrev=False,
    )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    parser.add_argument("--processes", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--gpu_memory", type=float, default=80, help="memory of one device, GB (default: 80)")
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], default=precision, help="as in Accelerate (default: no)"
    )
    own, flags = parser.parse_known_args()
    if own.processes < 1:
        parser.error(f"processes must be at least 1, got {own.processes}")
    print(dry_run(parse_config(TrainConfig, flags), own.processes, own.gpu_memory, own.mixed_precision))


if __name__ == "__main__":
    main()
