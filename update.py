"""One policy update: mini-batches, micro-batches, loss, clip, step.

All ranks hold the whole batch and take every n-th row of each mini-batch. The normaliser of a loss is that of the whole
mini-batch, so its gradient is the same however the rows are divided into micro-batches and among ranks.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from config import TrainConfig
from empg import aggregate, kl_k3, loss_normalizer, policy_loss, spread
from engine.ranks import (
    explain_out_of_memory,
    gradient_sync,
    micro_batches,
    prepare_frozen,
    to_float,
    weights_for_sampling,
)
from engine.sampler_check import require_exact_sampling
from engine.scorer import checkpoint_layers, make_scorable
from engine.stopping import require_finite
from episode import Batch
from policy import Policy, load_policy
from rollout import generator

MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm


@dataclass(frozen=True)
class Learner:
    """The trainable policy of this process: accelerator, model, optimizer, reference."""

    accelerator: Accelerator
    policy: Policy  # for sampling and saving; its model is the bare one
    model: torch.nn.Module  # the same model, prepared by the accelerator
    optimizer: torch.optim.Optimizer
    reference: torch.nn.Module | None  # the frozen first policy; None if kl_coef is 0


@explain_out_of_memory("loading the policy", "take a smaller model, or divide it with --fsdp")
def make_learner(config: TrainConfig, accelerator: Accelerator, path: str, first: str) -> Learner:
    """The policy at `path` and a new optimizer, prepared by the accelerator, and the reference at `first` if there is a
    KL term. Raises PolicyError if a policy cannot be loaded or used."""
    policy = load_policy(path)
    make_scorable(policy.model)
    if config.gradient_checkpointing:
        checkpoint_layers(policy.model)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(policy.model, optimizer)
    policy.model = accelerator.unwrap_model(model)
    with weights_for_sampling(accelerator, policy.model):
        require_exact_sampling(policy, config.max_tokens)
    reference = None
    if config.kl_coef:
        reference = prepare_frozen(accelerator, make_scorable(load_policy(first).model))
    return Learner(accelerator, policy, model, optimizer, reference)


@explain_out_of_memory("learning", "lower --micro_batch_tokens, or set --gradient_checkpointing")
def update(config: TrainConfig, learner: Learner, batch: Batch, advantage: Tensor, iteration: int) -> dict[str, float]:
    """From the episodes of an iteration, (B, L), to new weights.

    advantage: (B, S), of every step.  Returns sums over this rank's tokens and optimizer steps, for the metrics.
    Raises NotFiniteError instead of taking a bad step.
    """
    accelerator, sums = learner.accelerator, defaultdict(float)
    learner.model.eval()  # no dropout: old and new log-probs must be of the same policy
    left = [row for row, episode in enumerate(batch.episodes) if not episode.aborted]
    batch = batch.select(left)  # the rows of this update; loss normalisers count these
    token_advantage = spread(advantage[left], batch.step_ids)  # (B, L)
    for rows in mini_batches(config, len(batch.ids), iteration):
        # 5 loss and backward
        normalizer = loss_normalizer(batch.mask[rows], config.aggregation)  # of all ranks and micro-batches
        parts = micro_batches(config, accelerator, batch.length, rows)
        for number, (part, weight) in enumerate(parts, 1):
            micro_batch = batch.select(part)
            with gradient_sync(accelerator, learner.model, last=number == len(parts)):
                loss, part_sums = micro_batch_loss(config, learner, micro_batch, token_advantage[part], normalizer)
                require_finite(loss.item(), micro_batch.episodes)
                accelerator.backward(weight * loss)
            for name, value in part_sums.items():
                sums[name] += float(value) if weight else 0.0
        # In the first mini-batch the weights are still those that sampled, so this KL is rounding; setdefault keeps it.
        sums.setdefault("kl_rollout", sums["kl_old"])
        sums.setdefault("rollout_tokens", sums["tokens"])

        # 6 clip and step
        grad_norm = to_float(accelerator.clip_grad_norm_(learner.model.parameters(), MAX_GRAD_NORM))
        # The scaler of fp16 leaves out a step that overflows, and halves its scale. Below 1 that has not helped.
        if accelerator.scaler is None or math.isfinite(grad_norm) or accelerator.scaler.get_scale() < 1:
            sums["grad_norm"] += require_finite(grad_norm, [batch.episodes[row] for row in rows])
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        sums["learning_rate"] += learner.optimizer.param_groups[0]["lr"]
        sums["optimizer_steps"] += 1
    return sums


# ------------------------------------------------------------------------------------------------ rows of an update


def mini_batches(config: TrainConfig, episodes: int, iteration: int) -> Iterator[list[int]]:
    """Rows of every optimizer step of an iteration: each epoch takes all episodes once, in an order of its own."""
    for epoch in range(config.epochs):
        order = generator("update", config.seed, iteration, epoch).permutation(episodes)
        yield from (rows.tolist() for rows in np.array_split(order, min(config.mini_batches, episodes)))


# --------------------------------------------------------------------------------------------------------- the loss


def sampled_logp(model: torch.nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities (B, L) of the sampled tokens, nats; 0 elsewhere.  model: as `make_scorable` returns it."""
    # In plain code: log_softmax(model(ids).logits[:, :-1] / temperature).gather(-1, ids[:, 1:, None]).
    # No attention mask: the padding is on the right, where a causal model does not look.
    logp = model(input_ids=batch.ids, sampled=batch.mask, temperature=temperature)  # (N,)
    return logp.new_zeros(batch.ids.shape).masked_scatter(batch.mask, logp)


def micro_batch_loss(
    config: TrainConfig, learner: Learner, batch: Batch, token_advantage: Tensor, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the mini-batch loss, and sums over its sampled tokens, for the metrics.

    batch: the rows, (B, L).  token_advantage: (B, L or more).  normalizer: `loss_normalizer` of the mini-batch.
    """
    logp = sampled_logp(learner.model, batch, config.temperature)
    advantage, clip = token_advantage[:, : logp.shape[1]], {"clip_low": config.clip_low, "clip_high": config.clip_high}
    how = {"aggregation": config.aggregation, "normalizer": normalizer}
    loss, sums = policy_loss(logp, batch.old_logp, advantage, batch.mask, **clip, **how)
    if learner.reference is not None:
        with torch.no_grad():
            ref_logp = sampled_logp(learner.reference, batch, config.temperature)
        kl = kl_k3(logp, ref_logp)  # 0 where nothing was sampled
        loss = loss + config.kl_coef * aggregate(kl, batch.mask, **how)
        sums["kl_ref"] = kl.detach().sum()
    return loss, sums | {"loss": loss.detach()}
