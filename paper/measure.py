"""What the study measures of a finished run: success on unseen tasks, KL to the first policy, change of entropy.

Every function takes policies, episodes or the folder of a run, and returns plain numbers for one row of results.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from config import EvalConfig, TrainConfig
from empg import expected_score_norm, kl_k3, step_entropy, token_logp_and_entropy
from engine.checkpoint import checkpoints
from engine.ranks import weights_for_sampling
from envs import held_out_splits
from episode import Episode, collate, load_episodes
from eval import evaluate, first_tasks, has_tasks, load_player, open_envs, summarize
from policy import Policy

BINS = 20  # of the entropy percentiles and of the histogram of H_norm
TEXTS = 64  # episodes of the first policy on which entropies are compared
POINTS = 80  # tokens in the picture of Proposition 1


def measure(config: TrainConfig, tasks: int) -> dict:
    """Everything that the study wants to know of the finished run of `config`.

    tasks: of each held-out split, the first ones; all that there are if there are fewer. They are played at temperature
    1 ("eval") and at 0 ("greedy"): a policy that stayed uncertain loses by sampling, and nothing at 0.
    """
    run = Path(config.out)
    envs = open_envs(config, config.batch_size, ["train", *held_out_splits(config.env)])
    accelerator = Accelerator()
    folders = run / "first_policy", checkpoints(run)[-1]
    first, last = (load_player(str(folder), config, accelerator) for folder in folders)
    splits = [split for split in held_out_splits(config.env) if has_tasks(envs[0], split)]
    held_out = [task for split in splits for task in first_tasks(envs[0], config.env, split, tasks)]
    calm = EvalConfig(**config.limits | {"temperature": 0.0}, seed=config.seed)
    played, greedy = (evaluate(last, envs, held_out, how, accelerator) for how in (config, calm))
    texts = evaluate(first, envs, held_out[:TEXTS], config, accelerator)
    with weights_for_sampling(accelerator, first.model), weights_for_sampling(accelerator, last.model):
        # The policy that sampled the episodes of iteration t has taken the updates of t - 1 iterations.
        kept = sorted((run / "episodes").glob("*.jsonl"))
        drift = [[int(path.stem) - 1, kl_to(first, load_episodes(path))] for path in kept]
        drift.append([config.iterations, kl_to(first, played[:TEXTS])])
        measured = {
            "kl": drift,
            "entropy_change": entropy_change(texts, last),
            "norm_entropy": norm_entropy_histogram(run),
            "score_norm": score_norm_points(texts, first),
        }

    def by_split(episodes: list[Episode]) -> dict[str, dict]:
        return {split: summarize([e for e in episodes if e.task.split == split]) for split in splits}

    return {"eval": by_split(played), "greedy": by_split(greedy)} | measured


@torch.inference_mode()
def sampled_logits(policy: Policy, episodes: list[Episode], rows: int = 8) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Logits (n, V), ids (n,) and old_logp (n,) of the n sampled tokens of some episodes at a time, teacher-forced."""
    for first in range(0, len(episodes), rows):
        batch = collate(episodes[first : first + rows], policy.device)
        logits = policy.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        mask = batch.mask[:, 1:]
        yield logits[mask], batch.ids[:, 1:][mask], batch.old_logp[:, 1:][mask]


def kl_to(first: Policy, episodes: list[Episode]) -> float:
    """KL(policy || first) in nats per token: the k3 estimate on episodes that the policy sampled at temperature 1."""
    values = []
    for logits, ids, logp in sampled_logits(first, episodes):
        ref_logp, _ = token_logp_and_entropy(logits[None], ids[None])
        values.append(kl_k3(logp, ref_logp[0]))
    return float(torch.cat(values).mean())


def entropy_change(texts: list[Episode], last: Policy) -> dict:
    """How training changed entropy on fixed texts, by percentile of the entropy before it; for steps and for tokens.

    texts: episodes that the first policy sampled.  Returns for "step" and "token" the mean entropy in nats before and
    after, of BINS equal parts of the steps or tokens, sorted by their entropy before.
    """
    entropies = (
        token_logp_and_entropy(logits[None], ids[None])[1][0] for logits, ids, _ in sampled_logits(last, texts)
    )
    after = torch.cat([*entropies]).cpu()
    batch = collate(texts)
    before = batch.token_entropy[batch.mask]
    later = torch.zeros_like(batch.token_entropy)
    later[batch.mask] = after
    step_before, valid = step_entropy(batch.token_entropy, batch.step_ids)
    step_after, _ = step_entropy(later, batch.step_ids)
    return {"step": by_percentile(step_before[valid], step_after[valid]), "token": by_percentile(before, after)}


def by_percentile(before: Tensor, after: Tensor) -> list[list[float]]:
    """The mean of both, (n,) each, in BINS equal parts of the entries sorted by `before`."""
    order = before.argsort(stable=True).tolist()
    return [
        [round(float(before[part].mean()), 4), round(float(after[part].mean()), 4)]
        for part in np.array_split(order, BINS)
        if len(part)
    ]


def norm_entropy_histogram(run: Path) -> list[int]:
    """Steps of the kept episodes with H_norm in each of BINS equal parts of [0, 1]."""
    values = [
        value
        for path in sorted((run / "episodes").glob("*.jsonl"))
        for line in path.read_bytes().splitlines()
        if "error" not in (record := json.loads(line))["info"]  # aborted episodes train nothing
        for value in record["modulation"]["norm_entropy"]
    ]
    return np.histogram(values, BINS, (0, 1))[0].tolist()


def score_norm_points(texts: list[Episode], policy: Policy) -> list[list[float]]:
    """Shannon entropy (nats), Renyi-2 entropy (nats) and expected squared score norm of POINTS sampled tokens.

    They are spread evenly over the tokens sorted by entropy.
    """
    rows = []
    for logits, ids, _ in sampled_logits(policy, texts):
        entropy = token_logp_and_entropy(logits[None], ids[None])[1][0]
        collision = 2 * logits.log_softmax(-1).double()  # log p^2
        rows.append(torch.stack([entropy, -collision.logsumexp(-1).float(), expected_score_norm(logits)], 1))
    points = torch.cat(rows).cpu()
    points = points[points[:, 0].argsort()]
    chosen = np.linspace(0, len(points) - 1, POINTS).round().astype(int)
    return [[round(x, 4) for x in point] for point in points[chosen].tolist()]
