"""Every formula of EMPG (arXiv:2509.09265) and of the GRPO and DAPO losses under it: tensors in, tensors out.

    H_t      step entropy: mean entropy of the tokens that step t sampled        step_entropy
    H_norm   H_t scaled to [0, 1] over the steps of the batch                    normalize_entropy
    g(H_t)   confident steps count more, uncertain ones less; mean 1             gradient_scale
    f(H_t+1) bonus for a step that leads to a clear next step                    clarity_bonus
    A_final  A g(H_t) + zeta f(H_t+1), minus its mean over all steps             modulate

`modulation` returns all of them; training calls it. Its field `advantage` is the result of `modulate`.

Dimensions: B episodes, G episodes of one task, L token positions, V vocabulary, S steps (the paper's t) per episode.
Entropies, advantages and old log-probabilities are constants for autograd; only `logp` carries a gradient.

Every mean, min and max runs over the rows that are passed in. The paper's statistics run over the whole update batch,
so pass all of it: gather the episodes of all ranks first, split into micro-batches afterwards.

Where sources disagree: the min-max normalisation uses epsilon 1e-8, as the authors' project page does. Group advantages
use the sample standard deviation and eps 1e-6, as verl does (TRL adds 1e-4). Proposition 1 is about Renyi-2 entropy;
the method itself uses Shannon entropy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-8  # of the min-max normalisation


# ------------------------------------------------------------------------------------- EMPG: modulation by step entropy


@torch.no_grad()
def step_entropy(token_entropy: Tensor, step_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Step entropy H_t: the mean Shannon entropy of the tokens that the policy sampled in a step.

    token_entropy: (B, L), nats.  step_ids: (B, L) int, the step that sampled the token, -1 if the policy did not.
    Returns entropy (B, S) in nats and valid (B, S) bool; S is the largest number of steps in the batch. A step without
    tokens is not valid and has entropy 0.  Raises ValueError if the shapes disagree.
    >>> step_entropy(torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[0, 0, -1]]))
    (tensor([[2.]]), tensor([[True]]))
    """
    _require_2d("token_entropy and step_ids", token_entropy, step_ids)
    steps = int(step_ids.max()) + 1 if step_ids.numel() else 0
    column = step_ids + 1  # column 0 collects what was not sampled, and is dropped
    empty = token_entropy.new_zeros(len(step_ids), steps + 1)
    total = empty.scatter_add(1, column, token_entropy)[:, 1:]  # (B, S)
    tokens = empty.scatter_add(1, column, torch.ones_like(token_entropy))[:, 1:]
    return total / tokens.clamp(min=1), tokens > 0


@torch.no_grad()
def normalize_entropy(entropy: Tensor, valid: Tensor) -> Tensor:
    """H_norm = (H - min H) / (max H - min H + 1e-8), min and max over every valid step of the batch.

    entropy: (B, S), nats.  valid: (B, S) bool.  Returns (B, S) in [0, 1]; 0 where not valid, and if all are equal.
    >>> normalize_entropy(torch.tensor([[1.0, 3.0], [2.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([[0.0000, 1.0000],
            [0.5000, 0.0000]])
    """
    _require_2d("entropy and valid", entropy, valid)
    if not valid.any():
        return torch.zeros_like(entropy)
    low, high = entropy[valid].min(), entropy[valid].max()
    return ((entropy - low) / (high - low + NORM_EPS)).where(valid, 0)


@torch.no_grad()
def gradient_scale(norm_entropy: Tensor, valid: Tensor, *, k: float = 1.0) -> Tensor:
    """Self-calibrating gradient scaling g(H_t) = exp(-k H_norm,t) / mean over the batch's steps of exp(-k H_norm).

    norm_entropy: (B, S) in [0, 1].  valid: (B, S) bool.  k: sharpness, 0 turns it off (g = 1).
    Returns g (B, S), above 1 for confident steps and below 1 for uncertain ones, mean 1 over valid steps, 0 elsewhere.
    """
    _require_2d("norm_entropy and valid", norm_entropy, valid)
    confidence = torch.exp(-k * norm_entropy)
    return (confidence / confidence[valid].mean()).where(valid, 0)


@torch.no_grad()
def clarity_bonus(norm_entropy: Tensor, valid: Tensor, *, k_future: float = 1.0) -> Tensor:
    """Future clarity bonus f(H_{t+1}) = exp(-k' H_norm,t+1): how certain the policy is in the next step.

    norm_entropy: (B, S) in [0, 1].  valid: (B, S) bool.  k_future: the paper's k'.
    Returns (B, S); 0 on an episode's last step, where not valid, and where the next step has no tokens.
    >>> clarity_bonus(torch.tensor([[0.7, 0.0]]), torch.tensor([[True, True]]))
    tensor([[1., 0.]])
    """
    _require_2d("norm_entropy and valid", norm_entropy, valid)
    following = torch.exp(-k_future * norm_entropy[:, 1:]).where(valid[:, :-1] & valid[:, 1:], 0)
    return F.pad(following, (0, 1))[:, : valid.shape[1]]


@torch.no_grad()
def center(values: Tensor, valid: Tensor) -> Tensor:
    """The values minus their mean over the valid steps of the batch.

    values: (B, S).  valid: (B, S) bool.  Returns (B, S), mean 0 over valid steps, 0 elsewhere. Not divided by a std.
    >>> center(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([[-2.,  0.],
            [ 2.,  0.]])
    """
    _require_2d("values and valid", values, valid)
    return (values - values[valid].mean()).where(valid, 0)


@torch.no_grad()
def scale_and_bonus(
    entropy: Tensor, valid: Tensor, *, k: float = 1.0, k_future: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """H_norm, g(H_t) and f(H_{t+1}) of every step, (B, S) each.  entropy: (B, S), nats.  valid: (B, S) bool."""
    norm_entropy = normalize_entropy(entropy, valid)
    g = gradient_scale(norm_entropy, valid, k=k)
    f = clarity_bonus(norm_entropy, valid, k_future=k_future)
    return norm_entropy, g, f


@torch.no_grad()
def modulate(
    advantage: Tensor,
    entropy: Tensor,
    valid: Tensor,
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
    g_and_f: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The modulated advantage A_mod(i,t) = A(i) g(H_t) + zeta f(H_{t+1}), minus its mean over all steps of the batch.

    advantage: (B,), group-relative.  entropy: (B, S), nats.  valid: (B, S) bool.  zeta: weight of the bonus.
    g_and_f: both, (B, S) each, if they are computed already.
    Returns A_final (B, S): mean 0 over valid steps (not over tokens), not divided by a std, 0 elsewhere. With k = 0 and
    zeta = 0 it is the advantage minus its mean over steps.  Raises ValueError if the shapes disagree.
    """
    _require_2d("entropy and valid", entropy, valid)
    if advantage.shape != entropy.shape[:1]:
        raise ValueError(f"advantage must be (B,) and entropy (B, S); got {_shapes(advantage, entropy)}")
    g, f = g_and_f or scale_and_bonus(entropy, valid, k=k, k_future=k_future)[1:]
    return center(advantage[:, None] * g + zeta * f, valid)


@dataclass(frozen=True)
class Modulation:
    """What the steps of a batch are trained with. Metrics, transcripts and the credit page show these very tensors."""

    base: Tensor  # (B,), the group-relative advantage A of each episode
    entropy: Tensor  # (B, S), H in nats
    valid: Tensor  # (B, S) bool, False where an episode has no such step
    norm_entropy: Tensor  # (B, S), H_norm in [0, 1]
    g: Tensor  # (B, S), 1 without EMPG
    f: Tensor  # (B, S), 0 without EMPG
    advantage: Tensor  # (B, S), A_final, which enters the loss


def modulation(
    advantage: Tensor, entropy: Tensor, valid: Tensor, *, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.1
) -> Modulation:
    """All that a step is trained with under EMPG. Arguments and errors as in `modulate`, which makes the last field."""
    norm_entropy, g, f = scale_and_bonus(entropy, valid, k=k, k_future=k_future)
    final = modulate(advantage, entropy, valid, zeta=zeta, g_and_f=(g, f))
    return Modulation(advantage, entropy, valid, norm_entropy, g, f, final)


@torch.no_grad()
def no_modulation(advantage: Tensor, entropy: Tensor, valid: Tensor) -> Modulation:
    """`modulation` of the baseline without EMPG: g = 1, f = 0, and each step has its episode's advantage."""
    g, f = valid.to(advantage.dtype), torch.zeros_like(entropy)
    return Modulation(advantage, entropy, valid, normalize_entropy(entropy, valid), g, f, advantage[:, None] * g)


@torch.no_grad()
def spread(step_values: Tensor, step_ids: Tensor) -> Tensor:
    """Give every sampled token the value of its step.

    step_values: (B, S).  step_ids: (B, L) int, -1 where the policy did not sample.  Returns (B, L), 0 where it did not.
    Raises ValueError if the batch sizes disagree or a step has no value.
    >>> spread(torch.tensor([[7.0, 8.0]]), torch.tensor([[-1, 0, 1, 1]]))
    tensor([[0., 7., 8., 8.]])
    """
    if step_values.dim() != 2 or step_ids.dim() != 2 or len(step_values) != len(step_ids):
        raise ValueError(f"step_values must be (B, S) and step_ids (B, L); got {_shapes(step_values, step_ids)}")
    if step_ids.numel() and int(step_ids.max()) >= step_values.shape[1]:
        raise ValueError(f"step_ids go up to {int(step_ids.max())}, but step_values is {_shapes(step_values)}")
    return F.pad(step_values, (1, 0)).gather(1, step_ids + 1)  # column 0: not sampled


# -------------------------------------------------------------------------------------------------------- GRPO and DAPO


@torch.no_grad()
def group_advantages(
    reward: Tensor, group_size: int, *, eps: float = 1e-6, divide_by_std: bool = True, keep: Tensor | None = None
) -> Tensor:
    """A = (r - mean) / (std + eps) within each group of `group_size` consecutive rows; std is the sample one (G - 1).

    reward: (B,).  divide_by_std: False leaves r - mean.  keep: (B,) bool, the rows that a group consists of; None: all.
    Returns (B,): exactly 0 in a group whose rewards are equal, and in rows that are not kept.
    Raises ValueError if B is not a multiple of group_size.
    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    if reward.dim() != 1 or group_size < 1 or len(reward) % group_size:
        raise ValueError(f"reward must be (B,), B a multiple of group_size {group_size}; got {_shapes(reward)}")
    reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
    if keep is not None and not keep.all():
        parts = []
        for r, k in zip(reward.split(group_size), keep.split(group_size), strict=True):
            size = int(k.sum())
            left = group_advantages(r[k], size, eps=eps, divide_by_std=divide_by_std) if size else r[k]
            parts.append(torch.zeros_like(r).masked_scatter(k, left))
        return torch.cat(parts)
    grouped = reward.view(-1, group_size)
    differ = (grouped != grouped[:, :1]).any(1, keepdim=True)
    centred = grouped - grouped.mean(1, keepdim=True)
    if divide_by_std:
        # For a group of one the correction would divide by 0; its centred reward is 0 whatever it is divided by.
        centred = centred / (grouped.std(1, keepdim=True, correction=min(1, group_size - 1)) + eps)
    return centred.where(differ, 0).flatten()


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "sequence",
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(logp - old_logp).

    logp, old_logp (nats), advantage: (B, L) float.  mask: (B, L) bool, True where the policy sampled.
    GRPO: clip_low = clip_high = 0.2, aggregation "sequence".  DAPO: 0.2, 0.28, "token".  normalizer: see `aggregate`.
    Returns the loss and sums over the sampled tokens: "tokens", "clip_low" and "clip_high" (tokens whose gradient is 0
    because the ratio is outside this bound), "kl_old" (k3 estimate of KL(old || current), nats).
    Raises ValueError if the shapes disagree.
    """
    _require_2d("logp, old_logp, advantage and mask", logp, old_logp, advantage, mask)
    mask = mask.bool()
    # Mask before exp: values outside the mask may be infinite, and inf * 0 is nan. The clamp (as in verl) keeps exp
    # from overflowing; it is far outside the clip range.
    log_ratio = (logp - old_logp.detach()).where(mask, 0).clamp(-20, 20)
    advantage = advantage.detach().where(mask, 0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = aggregate(-torch.minimum(ratio * advantage, clipped * advantage), mask, aggregation, normalizer)
    metrics = {
        "tokens": mask.sum(),
        "clip_low": ((ratio < 1 - clip_low) & (advantage < 0)).sum(),
        "clip_high": ((ratio > 1 + clip_high) & (advantage > 0)).sum(),
        "kl_old": kl_k3(torch.zeros_like(log_ratio), log_ratio.detach()).sum(),
    }
    return loss, metrics


AGGREGATIONS = ("sequence", "token")


def aggregate(values: Tensor, mask: Tensor, aggregation: str, normalizer: float | None = None) -> Tensor:
    """One number from token values (B, L): their sum over `mask`, divided by `normalizer`.

    aggregation "sequence": mean over a sequence's tokens, then over sequences (GRPO). "token": mean over all tokens
    (DAPO).  normalizer: `loss_normalizer` of the whole mini-batch, all micro-batches and ranks included; None: of these
    rows.  Raises ValueError for another aggregation, or if the shapes disagree.
    """
    _require_2d("values and mask", values, mask)
    of_these_rows = loss_normalizer(mask, aggregation)
    values = values.where(mask, 0)
    if aggregation == "sequence":
        values = values / mask.sum(1, keepdim=True).clamp(min=1)
    return values.sum() / (of_these_rows if normalizer is None else normalizer)


def loss_normalizer(mask: Tensor, aggregation: str) -> float:
    """What `aggregate` divides by: the number of sequences or of sampled tokens, at least 1.

    mask: (B, L) bool.  Raises ValueError for another aggregation than AGGREGATIONS.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be {' or '.join(map(repr, AGGREGATIONS))}, got {aggregation!r}")
    return max(1, len(mask) if aggregation == "sequence" else int(mask.sum()))


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference): k3 = exp(d) - d - 1, d = ref_logp - logp; nats, >= 0."""
    delta = (ref_logp - logp).clamp(max=20)  # as in policy_loss: exp cannot overflow. Beyond 20 the gradient is 0
    return (delta.expm1() - delta).clamp(min=0)  # rounding can make it slightly negative


def soft_overlong_penalty(length: Tensor, *, limit: int, buffer: int) -> Tensor:
    """DAPO's addition to the reward of long episodes: 0 up to limit - buffer, then linearly to -1 at limit, -1 beyond.

    length: (B,), tokens.  Returns (B,) float in [-1, 0].  Raises ValueError unless 0 < buffer <= limit.
    >>> soft_overlong_penalty(torch.tensor([80, 90, 100, 200]), limit=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer must be above 0 and at most limit {limit}, got {buffer}")
    return ((limit - buffer - length) / buffer).clamp(-1, 0)


# ------------------------------------------------------------------------------ Proposition 1, log-probability, entropy


def expected_score_norm(logits: Tensor) -> Tensor:
    """Proposition 1: E_a ||grad_z log pi(a)||^2 = 1 - sum_a pi(a)^2 = 1 - exp(-H2), H2 the Renyi-2 entropy.

    logits: (..., V).  Returns (...,), from 0 for a policy that is certain to 1 - 1/V for a uniform one: confident
    tokens get small gradients, uncertain ones large and noisy ones.
    >>> expected_score_norm(torch.zeros(2, 4))
    tensor([0.7500, 0.7500])
    """
    return 1 - logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).square().sum(-1)


def token_logp_and_entropy(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids[:, j]` and Shannon entropy under softmax(logits[:, j] / temperature), in nats.

    logits: (B, L, V), any float type.  ids: (B, L) int.  temperature: above 0.
    Returns logp and entropy, each (B, L), at least float32, from one log-softmax over the full vocabulary. Gradient
    flows through logp only. An update calls engine/scorer.py instead, which needs no (B, L, V) tensor.
    Raises ValueError if the shapes disagree or the temperature is not above 0.
    >>> logp, entropy = token_logp_and_entropy(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    >>> bool(torch.isclose(entropy, torch.tensor(4.0).log())), bool(torch.isclose(logp, -entropy))
    (True, True)
    """
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"logits must be (B, L, V) and ids (B, L); got {tuple(logits.shape)} and {tuple(ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (B, L, V)
    log_p = z - z.logsumexp(-1, keepdim=True)  # log_softmax(z), in the order in which engine/scorer.py computes it
    logp = log_p.gather(-1, ids[..., None]).squeeze(-1)  # (B, L)
    log_p = log_p.detach().clamp(min=torch.finfo(z.dtype).min)  # p log p of a banned token is 0, where 0 * -inf is nan
    entropy = -(log_p.exp() * log_p).sum(-1)  # (B, L)
    return logp, entropy


def _require_2d(names: str, *tensors: Tensor) -> None:
    if tensors[0].dim() != 2 or any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"{names} must have one 2-d shape; got {_shapes(*tensors)}")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
