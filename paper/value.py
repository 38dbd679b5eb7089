"""What a state is worth: the value of the states of an episode, by playing on from each of them several times.

The policy's own tokens are the context, and the world is replayed to that state. The share of successes is V(s_t). The
true advantage of step t is V(s_t+1) - V(s_t); after the last step V is the outcome.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from config import TrainConfig
from empg import Modulation
from engine.ranks import explain_out_of_memory, weights_for_sampling
from engine.world_errors import require_none_aborted
from envs import Env
from episode import Batch, Episode, replay
from eval import open_envs
from policy import Policy
from rollout import play_on
from train import assign_credit
from update import Learner


def replay_to(env: Env, episode: Episode, step: int) -> Episode:
    """The episode up to the response of this step, with the environment replayed to that state.

    Raises ValueError if the world answers otherwise than it did.
    """
    start = episode.steps[step].start
    tokens = {name: getattr(episode, name)[:start] for name in ("ids", "step_ids", "old_logp", "token_entropy")}
    again = Episode(episode.task, episode.prompt, list(episode.steps[:step]), **tokens)
    replay(again, env)
    return again


@explain_out_of_memory("playing continuations", "lower --batch_size of the run")
def play_continuations(
    policy: Policy, envs: list[Env], episodes: list[Episode], number: int, config: TrainConfig
) -> list[np.ndarray]:
    """Outcomes (S, number) of each episode: successes, 0 or 1, of `number` plays on from before each of its S steps."""
    jobs = [(i, t, k) for i, e in enumerate(episodes) for t in range(len(e.steps)) for k in range(number)]
    jobs.sort(key=lambda job: episodes[job[0]].steps[job[1]].start)  # equally long ones play together
    outcomes = [np.zeros((len(episode.steps), number)) for episode in episodes]
    for first in tqdm(range(0, len(jobs), len(envs)), desc="continuations", unit="batch", delay=2):
        part = jobs[first : first + len(envs)]
        starts = [replay_to(env, episodes[i], t) for env, (i, t, _) in zip(envs, part, strict=False)]
        seeds = [("value", config.seed, *job) for job in part]
        ended = require_none_aborted(play_on(policy, envs, starts, seeds, **config.limits), "continuations")
        for (i, t, k), played in zip(part, ended, strict=True):
            outcomes[i][t, k] = played.success
    return outcomes


def values(episodes: list[Episode], outcomes: list[np.ndarray]) -> list[np.ndarray]:
    """V of each episode, (S + 1,): before each step, and the outcome. Equal histories share their continuations."""
    total: dict[tuple, list[float]] = {}
    for episode, results in zip(episodes, outcomes, strict=True):
        for step, row in zip(episode.steps, results, strict=True):
            total.setdefault((episode.task, *episode.ids[: step.start]), []).extend(row)
    return [
        np.array([*(np.mean(total[e.task, *e.ids[: step.start]]) for step in e.steps), float(e.success)])
        for e in episodes
    ]


class TrueCredit:
    """Credit for `train.train`: every step has its true advantage, an upper bound for step credit.

    continuations: plays on from before every step. The advantages are scaled so that their root mean square over the
    steps of the batch is GRPO's, because the learning rate and the clipping of gradients were chosen for that.
    """

    def __init__(self, continuations: int):
        self.continuations, self.envs = continuations, []

    def __call__(
        self, config: TrainConfig, batch: Batch, advantage: Tensor, entropy: Tensor, valid: Tensor, learner: Learner
    ) -> Modulation:
        given = assign_credit(config, batch, advantage, entropy, valid)
        self.envs = self.envs or open_envs(config, config.batch_size, ["train"])
        with weights_for_sampling(learner.accelerator, learner.policy.model):
            outcomes = play_continuations(learner.policy, self.envs, batch.episodes, self.continuations, config)
        true = [torch.from_numpy(np.diff(value)).float() for value in values(batch.episodes, outcomes)]
        true = pad_sequence(true, batch_first=True).to(batch.ids.device) * given.valid  # (B, S)
        norms = [part[given.valid].square().mean().sqrt() for part in (given.advantage, true)]
        return replace(given, advantage=true * norms[0] / norms[1].clamp(min=1e-6))
