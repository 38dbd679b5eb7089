"""Credit beyond the paper: functions that `train.train` takes in the place of its `assign_credit`.

The study says of both: do not use them (docs/results.md). They show how to write one's own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from config import TrainConfig
from empg import Modulation, center, clarity_bonus, gradient_scale, modulation
from episode import Batch


def credit_by_rank(
    config: TrainConfig, batch: Batch, advantage: Tensor, entropy: Tensor, valid: Tensor, learner=None
) -> Modulation:
    """EMPG with H scaled to [0, 1] by rank: evenly spread, and one outlier cannot flatten all other steps."""
    norm_entropy = rank_entropy(entropy, valid)
    g = gradient_scale(norm_entropy, valid, k=config.k)
    f = clarity_bonus(norm_entropy, valid, k_future=config.k_future)
    final = center(advantage[:, None] * g + config.zeta * f, valid)
    return Modulation(advantage, entropy, valid, norm_entropy, g, f, final)


def credit_where_rewards_differ(
    config: TrainConfig, batch: Batch, advantage: Tensor, entropy: Tensor, valid: Tensor, learner=None
) -> Modulation:
    """EMPG without the bonus in groups whose rewards are all equal, where nothing but the bonus would train."""
    paper = modulation(advantage, entropy, valid, k=config.k, k_future=config.k_future, zeta=config.zeta)
    # The advantages differ where the rewards do, and they leave out what an environment aborted.
    f = paper.f * rewards_differ(advantage, config.group_size)[:, None]
    return replace(paper, f=f, advantage=center(advantage[:, None] * paper.g + config.zeta * f, valid))


CREDIT = {"grpo_empg_rank": credit_by_rank, "grpo_empg_mixed": credit_where_rewards_differ}


def rewards_differ(reward: Tensor, group_size: int) -> Tensor:
    """Which episodes are in a group whose rewards are not all equal.

    reward: (B,), groups are `group_size` consecutive rows.  Returns (B,) bool.
    >>> rewards_differ(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    grouped = reward.view(-1, group_size)
    return (grouped != grouped[:, :1]).any(1).repeat_interleave(group_size)


@torch.no_grad()
def rank_entropy(entropy: Tensor, valid: Tensor) -> Tensor:
    """H scaled to [0, 1] by rank, in the place of `empg.normalize_entropy`.

    entropy: (B, S), nats.  valid: (B, S) bool.  Returns (B, S), the share of the batch's other valid steps that have
    less entropy, ties counted half; 0 off valid, and for a single step.
    >>> rank_entropy(torch.tensor([[1.0, 3.0, 3.0, 99.0]]), torch.ones(1, 4, dtype=torch.bool))
    tensor([[0.0000, 0.5000, 0.5000, 1.0000]])
    """
    ordered = entropy[valid].sort().values
    below, not_above = (torch.searchsorted(ordered, entropy.contiguous(), right=right) for right in (False, True))
    rank = (below + not_above - 1) / 2  # of equal entropies, the mean of their places
    return (rank / max(1, len(ordered) - 1)).to(entropy.dtype).where(valid, 0)
