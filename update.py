"""The loss of a micro-batch, what an update works on, and how its episodes are divided into mini- and micro-batches.

All ranks hold the whole batch and take every n-th row of each mini-batch. The normaliser of a loss is that of the whole
mini-batch, so its gradient is the same however the rows are divided into micro-batches and among ranks.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from config import TrainConfig
from empg import aggregate, kl_k3, policy_loss
from engine.ranks import prepare_frozen
from engine.scorer import make_scorable
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
    KL term. Raises PolicyError if a policy cannot be loaded or used."""
    policy = load_policy(path)
    make_scorable(policy.model)
    if config.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(policy.model, optimizer)
    policy.model = accelerator.unwrap_model(model)
    reference = None
    if config.kl_coef:
        reference = prepare_frozen(accelerator, make_scorable(load_policy(first).model))
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
    config: TrainConfig, accelerator: Accelerator, length: Tensor, rows: Sequence[int]
) -> list[tuple[list[int], int]]:
    """This rank's share of a mini-batch in parts of at most micro_batch_tokens tokens, each with its loss's weight.

    length: (B,), tokens of each episode. Rows are sorted by length, so that little of a part is padding. The weight is
    the number of ranks, because their gradients are averaged where they must be added. Ranks work together in every
    part, so each has the same number of them: a rank with too few runs one row with weight 0 instead.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    lengths = length.tolist()
    rows = sorted(rows, key=lambda row: lengths[row])
    shares = [split_by_tokens(rows[i::ranks], lengths, config.micro_batch_tokens) for i in range(ranks)]
    missing = max(map(len, shares)) - len(shares[rank])
    return [(part, ranks) for part in shares[rank]] + [(rows[:1], 0)] * missing


def split_by_tokens(rows: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Rows, sorted by length, in parts of at most `budget` tokens, padding included. A longer row is alone."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and (len(parts[-1]) + 1) * lengths[row] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def gradient_sync(learner: Learner, last: bool) -> contextlib.AbstractContextManager:
    """For a backward pass: gradients stay with their rank until the `last` part of a mini-batch adds them up.

    Sharded ones are added up in every part, because no rank has room for a whole gradient.
    """
    if last or learner.accelerator.is_fsdp2:
        return contextlib.nullcontext()
    return learner.accelerator.no_sync(learner.model)


# --------------------------------------------------------------------------------------------------------- the loss


def sampled_logp(model: torch.nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities (B, L) of the sampled tokens, nats; 0 elsewhere.  model: as `make_scorable` returns it."""
    # No attention mask: the padding is on the right, where a causal model does not look.
    logp = model(input_ids=batch.ids, sampled=batch.mask, temperature=temperature)  # (N,)
    return logp.new_zeros(batch.ids.shape).masked_scatter(batch.mask, logp)


@torch.no_grad()
def recompute_old_logp(config: TrainConfig, learner: Learner, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """The batch with the trainer's log-probs in place of those that were captured while sampling.

    Also returns sums over its sampled tokens, for the record: how far the two are apart.
    """
    logp = torch.zeros_like(batch.old_logp)
    for part, weight in micro_batches(config, learner.accelerator, batch.length, range(len(batch.ids))):
        scored = sampled_logp(learner.model, batch.select(part), config.temperature)
        if weight:
            logp[part, : scored.shape[1]] = scored
    logp = learner.accelerator.reduce(logp, "sum")  # every rank scored some rows
    kl = kl_k3(batch.old_logp, logp)  # 0 where nothing was sampled
    return replace(batch, old_logp=logp), {"kl_rollout": float(kl.sum()), "rollout_tokens": float(batch.mask.sum())}


def micro_batch_loss(
    config: TrainConfig, learner: Learner, batch: Batch, token_advantage: Tensor, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """What these rows add to the loss of their mini-batch, and sums over their sampled tokens, for the record.

    batch: the rows, (B, L).  token_advantage: (B, L or more).  normalizer: `loss_normalizer` of the mini-batch.
    """
    logp = sampled_logp(learner.model, batch, config.temperature)
    loss, sums = policy_loss(
        logp,
        batch.old_logp,
        token_advantage[:, : logp.shape[1]],
        batch.mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation=config.aggregation,
        normalizer=normalizer,
    )
    if learner.reference is not None:
        with torch.no_grad():
            ref_logp = sampled_logp(learner.reference, batch, config.temperature)
        kl = kl_k3(logp, ref_logp)  # 0 where nothing was sampled
        loss = loss + config.kl_coef * aggregate(kl, batch.mask, config.aggregation, normalizer)
        sums["kl_ref"] = kl.detach().sum()
    return loss, sums | {"loss": loss.detach()}
