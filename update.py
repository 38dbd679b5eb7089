"""The loss of a micro-batch, what an update works on, and how its episodes are divided into mini- and micro-batches.

All ranks hold the whole batch and take every n-th row of each mini-batch. The normaliser of a loss is that of the whole
mini-batch, so its gradient is the same however the rows are divided into micro-batches and among ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from config import TrainConfig
from empg import aggregate, kl_k3, policy_loss, token_logp_and_entropy
from episode import Batch
from policy import Policy, load_policy


@dataclass(frozen=True)
class Learner:
    """What an update works on."""

    accelerator: Accelerator
    policy: Policy  # for sampling and saving; its model is the bare one
    model: torch.nn.Module  # the same model, prepared by the accelerator
    optimizer: torch.optim.Optimizer
    reference: torch.nn.Module | None  # the frozen first policy; None if kl_coef is 0


def make_learner(config: TrainConfig, accelerator: Accelerator, path: str, first: str) -> Learner:
    """The policy at `path` and a new optimizer, prepared by the accelerator, and the reference at `first` if there is a
    KL term. Raises PolicyError if a policy cannot be loaded."""
    policy = load_policy(path)
    reference = load_policy(first).model.to(accelerator.device) if config.kl_coef else None
    # No dropout: old and new log-probs must be of the same policy. Only gradient checkpointing needs training mode.
    policy.model.train(config.gradient_checkpointing)
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(policy.model, optimizer)
    policy.model = accelerator.unwrap_model(model)
    return Learner(accelerator, policy, model, optimizer, reference)


class NotFiniteError(Exception):
    """A loss or gradient is infinite or nan; no step was taken with it. `rows` are the episodes that it came from."""

    def __init__(self, rows: list[int]):
        super().__init__(f"loss or gradient is not finite, episodes {rows}")
        self.rows = rows


def require_finite(value: float, rows: list[int]) -> float:
    """The value. Raises NotFiniteError, naming the rows, if it is infinite or nan."""
    if not math.isfinite(value):
        raise NotFiniteError(rows)
    return value


# ------------------------------------------------------------------------------------------------ rows of an update


def mini_batches(config: TrainConfig, episodes: int, iteration: int) -> Iterator[list[int]]:
    """Rows of every optimizer step of an iteration: each epoch takes all episodes once, in an order of its own."""
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, iteration, epoch]).permutation(episodes)
        yield from (rows.tolist() for rows in np.array_split(order, config.mini_batches))


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, length: Tensor, rows: list[int]
) -> tuple[list[list[int]], int]:
    """This rank's share of a mini-batch in parts of micro_batch_size rows, and the weight of their losses.

    length: (B,), tokens of each episode. Rows are sorted by length, so that little of a part is padding. DDP takes the
    mean over ranks of what is a sum, hence the weight. It needs every rank in the backward pass, so a rank without rows
    runs one row with weight 0.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = sorted(rows[rank::ranks] or rows[:1], key=lambda row: int(length[row]))
    parts = [mine[i : i + config.micro_batch_size] for i in range(0, len(mine), config.micro_batch_size)]
    return parts, ranks if len(rows) > rank else 0


# --------------------------------------------------------------------------------------------------------- the loss


def sampled_logp(model: torch.nn.Module, batch: Batch, columns: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, n) of ids[:, columns], nats; logits are computed at these positions only."""
    # No attention mask: the padding is on the right, where a causal model does not look.
    logits = model(input_ids=batch.ids, logits_to_keep=columns - 1, use_cache=False).logits  # (B, n, V)
    return token_logp_and_entropy(logits, batch.ids[:, columns], temperature)[0]


def micro_batch_loss(
    config: TrainConfig, learner: Learner, batch: Batch, token_advantage: Tensor, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """What these rows add to the loss of their mini-batch, and sums over their sampled tokens, for the record.

    batch: the rows, (B, L).  token_advantage: (B, L or more).  normalizer: `loss_normalizer` of the mini-batch.
    """
    columns = batch.mask.any(0).nonzero().squeeze(1)  # (n,) positions that some row sampled
    mask = batch.mask[:, columns]
    logp = sampled_logp(learner.model, batch, columns, config.temperature)
    loss, sums = policy_loss(
        logp,
        batch.old_logp[:, columns],
        token_advantage[:, columns],
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation=config.aggregation,
        normalizer=normalizer,
    )
    if learner.reference is not None:
        with torch.no_grad():
            ref_logp = sampled_logp(learner.reference, batch, columns, config.temperature)
        kl = kl_k3(logp, ref_logp).where(mask, 0)
        loss = loss + config.kl_coef * aggregate(kl, mask, config.aggregation, normalizer)
        sums["kl_ref"] = kl.detach().sum()
    return loss, sums | {"loss": loss.detach()}
