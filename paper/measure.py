"""What the study measures of a finished run: success on unseen tasks, KL to the first policy, change of entropy.

Every function takes policies, episodes or the folder of a run, and returns plain numbers for one row of results.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from config import EvalConfig, TrainConfig
from empg import kl_k3, step_entropy, token_logp_and_entropy
from engine.checkpoint import checkpoints
from engine.ranks import explain_out_of_memory, weights_for_sampling
from envs import held_out_splits
from episode import Episode, collate, load_episodes
from eval import evaluate, first_tasks, load_player, open_envs, summarize
from paper.rows import BINS
from policy import Policy

TEXTS = 64  # episodes of the first policy on which entropies are compared


@explain_out_of_memory("measuring a policy", "lower --jobs")
def measure(config: TrainConfig, tasks: int) -> dict:
    """Everything that the study wants to know of the finished run of `config`.

    tasks: of each held-out split, the first ones; all that there are if there are fewer. They are played at temperature
    1 ("eval") and at 0 ("greedy"): a policy that stayed uncertain loses by sampling, and nothing at 0.
    """
    run = Path(config.out)
    splits = held_out_splits(config.env)
    envs = open_envs(config, config.batch_size, ["train", *splits])
    accelerator = Accelerator()
    folders = run / "first_policy", checkpoints(run)[-1]
    first, last = (load_player(str(folder), config, accelerator) for folder in folders)
    held_out = [task for split in splits for task in first_tasks(envs[0], config.env, split, tasks)]
    calm = EvalConfig(**config.limits | {"temperature": 0.0}, seed=config.seed)
    played, greedy = (evaluate(last, envs, held_out, how, accelerator) for how in (config, calm))
    texts = evaluate(first, envs, held_out[:TEXTS], config, accelerator)
    with weights_for_sampling(accelerator, first.model), weights_for_sampling(accelerator, last.model):
        # The policy that sampled the episodes of iteration t has taken the updates of t - 1 iterations.
        kept = sorted((run / "episodes").glob("*.jsonl"))
        drift = [[int(path.stem) - 1, kl_to(first, load_episodes(path))] for path in kept]
        drift.append([config.iterations, kl_to(first, played[:TEXTS])])
        change = entropy_change(texts, last)

    def by_split(episodes: list[Episode]) -> dict[str, dict]:
        return {split: summarize([e for e in episodes if e.task.split == split]) for split in splits}

    return {"eval": by_split(played), "greedy": by_split(greedy), "kl": drift, "entropy_change": change}


@torch.inference_mode()
def teacher_forced(policy: Policy, episodes: list[Episode]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy by this policy, and old_logp, (n,) each in nats, of the n sampled tokens of the episodes."""
    parts = []
    for first in range(0, len(episodes), 8):
        batch = collate(episodes[first : first + 8], policy.device)
        mask = batch.mask[:, 1:]
        logits = policy.model(input_ids=batch.ids, use_cache=False).logits[:, :-1][mask]  # (n, V)
        logp, entropy = token_logp_and_entropy(logits[None], batch.ids[:, 1:][mask][None])
        parts.append(torch.stack([logp[0], entropy[0], batch.old_logp[:, 1:][mask]]))
    return torch.cat(parts, 1).unbind()


def kl_to(first: Policy, episodes: list[Episode]) -> float:
    """KL(policy || first) in nats per token: the k3 estimate on episodes that the policy sampled at temperature 1."""
    ref_logp, _, logp = teacher_forced(first, episodes)
    return float(kl_k3(logp, ref_logp).mean())


def entropy_change(texts: list[Episode], last: Policy) -> dict:
    """How training changed entropy on fixed texts, by percentile of the entropy before it; for steps and for tokens.

    texts: episodes that the first policy sampled.  Returns for "step" and "token" the mean entropy in nats before and
    after, of BINS equal parts of the steps or tokens, sorted by their entropy before.
    """
    after = teacher_forced(last, texts)[1].cpu()
    batch = collate(texts)
    before = batch.token_entropy[batch.mask]
    later = torch.zeros_like(batch.token_entropy)
    later[batch.mask] = after
    step_before, valid = step_entropy(batch.token_entropy, batch.step_ids)
    step_after, _ = step_entropy(later, batch.step_ids)
    return {"step": by_percentile(step_before[valid], step_after[valid]), "token": by_percentile(before, after)}


def by_percentile(before: Tensor, after: Tensor) -> list[list[float]]:
    """The mean of both, (n,) each, in BINS equal parts of the entries sorted by `before`."""
    parts = (part for part in np.array_split(before.argsort(stable=True).tolist(), BINS) if len(part))
    return [[float(before[part].mean()), float(after[part].mean())] for part in parts]
