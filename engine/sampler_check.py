"""Is the sampler right for a model? It keeps its own cache, so the two are compared when the model is loaded."""

import re

import torch
from torch import Tensor

from empg import token_logp_and_entropy
from engine.sampler import Sampler
from episode import Episode, Task
from policy import Policy, PolicyError, require_context

# The most that captured log-probs may differ from the model's own, in nats: the largest difference in float32, the mean
# one in 16 bits, where a logit of 20 is rounded by up to 0.06. Faults are larger by far.
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 0.25


@torch.inference_mode()
def require_exact_sampling(policy: Policy, max_tokens: int) -> None:
    """Raises PolicyError, in one line, if the sampler is wrong for this model in episodes of up to max_tokens tokens.

    Three short episodes of different lengths are played in one batch, for one, two and three turns. Their log-probs and
    entropies are compared with those of a plain forward pass over each episode, in the precision that is in use.

    Rotary embeddings may change beyond `original_max_position_embeddings` (longrope). If max_tokens is more than that,
    the third episode grows beyond it.
    """
    policy.model.eval()
    rounded = policy.model.dtype.itemsize == 2 or torch.is_autocast_enabled(policy.model.device.type)
    try:
        require_context(policy, max_tokens)
        found = [_differences(policy, episode) for episode in _play_probe(policy, max_tokens)]
    except PolicyError:
        raise
    except Exception as error:  # every architecture fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolicyError(f"the sampler does not support this model's attention or positions: {reason}") from error
    difference = torch.stack([d.mean() if rounded else d.max() for d in found]).max().item()  # nan stays nan
    if not difference <= (TOLERANCE_16_BIT if rounded else TOLERANCE):
        size, reason = f"by {difference:.2g} nats", "(attention or positions that it does not support)"
        raise PolicyError(f"the sampler's log-probs differ from the model's own {size} {reason}")


def _play_probe(policy: Policy, max_tokens: int) -> list[Episode]:
    """Three episodes, whose prompts and observations are fixed ids. They play one, two and three turns."""
    config = policy.model.config.get_text_config()
    found = re.findall(r'"original_max_position_embeddings": (\d+)', config.to_json_string(use_diff=False))
    limit = max([n for n in map(int, found) if n < max_tokens], default=0)
    episodes = [Episode(Task("probe", "", number), "") for number in range(3)]
    for episode, length in zip(episodes, (37, 20, max(11, limit - 2)), strict=True):
        episode.insert([(7919 * i + length) % config.vocab_size for i in range(length)])
    sampler, live = Sampler(policy, [e.ids for e in episodes], 1.0, 4, max(limit, 37) + 64), episodes
    while live:
        uniform = torch.linspace(0.1, 0.9, 4, dtype=torch.float64).expand(len(live), 4)
        for episode, response in zip(live, sampler.respond([e.ids for e in live], uniform), strict=True):
            episode.append_sampled(*response)
            episode.insert(list(range(1, 5 + episode.task.seed)))
        live = live[1:]
        sampler.keep(list(range(1, 1 + len(live))))
    return episodes


def _differences(policy: Policy, episode: Episode) -> Tensor:
    """By how much the captured log-probs and entropies (2, n) differ from those of a plain forward pass, in nats."""
    first = next(place for place, step in enumerate(episode.step_ids) if step >= 0)
    ids = torch.tensor([episode.ids], device=policy.model.device)
    kept = len(episode.ids) - first + 1  # logits from the token before the first sampled one on
    logits = policy.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
    plain = torch.cat(token_logp_and_entropy(logits, ids[:, first:]))  # (2, kept - 1)
    captured = plain.new_tensor([episode.old_logp[first:], episode.token_entropy[first:]])
    return (plain - captured)[:, torch.tensor(episode.step_ids[first:]) >= 0].abs()
