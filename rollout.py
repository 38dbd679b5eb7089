"""ReAct episodes for many environments at once, with log-probabilities and entropy captured while sampling.

An episode is one growing list of token ids: instructions and first observation, then in turns the response that the
policy samples and the observation that the environment answers. The KV cache is kept across turns, so every token goes
through the model once. Ids are append-only: what was sampled is what is trained on.

A response is sampled at temperature T over the full vocabulary (no top-k, no top-p), and its log-probabilities and
entropies come from the very logits that it was sampled from. The random numbers of an episode depend on its own seed
alone, so an episode is the same in whatever batch and on whatever rank it is played.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from empg import token_logp_and_entropy
from envs import Env, Player, format_response, parse_response
from episode import Episode, Step, Task
from policy import Dialogue, Policy

# ------------------------------------------------------------------------------------------------------- sampling


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) from softmax(logits / temperature) by inversion of its distribution function.

    logits: (B, V).  uniform: (B,) float64 in [0, 1).  temperature 0 means the most likely token. In float64, where the
    function of 150,000 tokens still ends at 1; a token of probability 0 is never drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    distribution = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Sampler:
    """Samples a response for every row of a batch, turn after turn, on one KV cache.

    The cache has a column for every position that any row has fed. Rows grow by different numbers of tokens, so some
    of its entries belong to no token; `mask` says which.
    """

    def __init__(self, policy: Policy, rows: int, temperature: float, max_step_tokens: int):
        self.policy, self.temperature, self.max_step_tokens = policy, temperature, max_step_tokens
        self.cache = DynamicCache(config=policy.model.config)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=policy.device)  # (B, columns), 1 where a token is

    def respond(self, pending: list[list[int]], uniform: Tensor) -> list[tuple[list[int], list[float], list[float]]]:
        """Feed each row its `pending` ids and sample until it writes the stop token or max_step_tokens.

        uniform: (B, max_step_tokens) random numbers in [0, 1).  Returns ids, logp and entropy (nats) for each row. The
        last id of a response has not been fed yet: it belongs in front of the row's next pending ids.
        """
        width = max(map(len, pending))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in pending], device=self.policy.device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in pending], device=self.policy.device)
        uniform, open_rows, columns = uniform.to(self.policy.device), real[:, -1], []
        for position in range(self.max_step_tokens):
            logits = self._forward(ids, real)  # (B, V)
            token = sample(logits, uniform[:, position], self.temperature)
            # Greedy decoding has no distribution of its own; the record is that of temperature 1.
            logp, entropy = token_logp_and_entropy(logits[:, None], token[:, None], self.temperature or 1.0)
            columns.append((token, logp[:, 0], entropy[:, 0], open_rows))
            open_rows = open_rows * (token != self.policy.stop_id)
            if not open_rows.any():
                break
            ids, real = token[:, None], open_rows[:, None]
        token, logp, entropy, kept = (torch.stack(column, 1).tolist() for column in zip(*columns, strict=True))
        lengths = [sum(row) for row in kept]
        return [(token[b][:n], logp[b][:n], entropy[b][:n]) for b, n in enumerate(lengths)]

    def _forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (B, V) after the last of the ids (B, n); `real` (B, n) is 0 for padding."""
        fed = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, real], 1)
        output = self.policy.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=(fed + real.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Drop every other row of the batch."""
        if len(rows) < len(self.mask):
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]


# ------------------------------------------------------------------------------------------------------- episodes


@torch.inference_mode()
def rollout(
    policy: Policy,
    envs: list[Env],
    tasks: list[Task],
    seeds: list[tuple[int, ...]],
    *,
    temperature: float = 1.0,
    max_step_tokens: int = 64,
    max_tokens: int = 2048,
    desc: str = "rollout",
) -> list[Episode]:
    """Play one episode of every task, as many at a time as there are environments.

    seeds: for each episode, the integers that its random numbers come from.  temperature: 0 is greedy.
    max_step_tokens: of one response; it is cut off there.  max_tokens: of an episode; it is truncated if the next
    response might not fit.  Returns the episodes in the order of the tasks.
    """
    policy.model.eval()
    episodes = []
    with tqdm(total=len(tasks), desc=desc, unit="episode", leave=False, delay=2) as progress:
        for first in range(0, len(tasks), len(envs)):
            part = slice(first, first + len(envs))
            generators = [np.random.default_rng(list(seed)) for seed in seeds[part]]
            sampler = Sampler(policy, len(generators), temperature, max_step_tokens)
            episodes += _play(policy, envs, tasks[part], generators, sampler, max_tokens, progress.update)
    return episodes


def _start(policy: Policy, envs: list[Env], tasks: list[Task], room: int) -> list[Episode]:
    """Reset the environments: episodes that hold what comes before the first response."""
    episodes = [_reset(env, task) for env, task in zip(envs, tasks, strict=False)]
    openings = policy.opening(envs[0].instructions, [episode.prompt for episode in episodes])
    for episode, ids in zip(episodes, openings, strict=True):
        episode.insert(ids)
        episode.truncated |= len(ids) > room
    return episodes


def _play(
    policy: Policy,
    envs: list[Env],
    tasks: list[Task],
    generators: list[np.random.Generator],
    sampler: Sampler,
    max_tokens: int,
    finished: Callable[[int], object],
) -> list[Episode]:
    """The ReAct loop over one batch of episodes; those that are done leave the batch."""
    room = max_tokens - sampler.max_step_tokens
    episodes = _start(policy, envs, tasks, room)
    pending = [list(episode.ids) for episode in episodes]  # ids that the model has not read yet
    live = list(range(len(episodes)))
    while True:
        going = [row for row, i in enumerate(live) if not episodes[i].done]
        finished(len(live) - len(going))
        if not going:
            return episodes
        sampler.keep(going)
        live, pending = [live[row] for row in going], [pending[row] for row in going]
        uniform = np.stack([generators[i].random(sampler.max_step_tokens) for i in live])
        responses = sampler.respond(pending, torch.from_numpy(uniform))
        texts = policy.tokenizer.batch_decode([ids for ids, _, _ in responses], skip_special_tokens=True)
        for i, response, text in zip(live, responses, texts, strict=True):
            ids, logp, entropy = response
            episodes[i].append_sampled(ids, logp, entropy)
            _step(episodes[i], envs[i], *parse_response(text), sum(entropy) / len(ids), len(ids))
        turns = policy.turn([episodes[i].steps[-1].observation for i in live])
        for row, (i, turn) in enumerate(zip(live, turns, strict=True)):
            episode, (ids, _, _) = episodes[i], responses[row]
            inserted = turn if ids[-1] == policy.stop_id else [policy.stop_id, *turn]  # cut off: close the turn for it
            if not episode.done and len(episode.ids) + len(inserted) > room:
                episode.truncated = True
            if not episode.done:
                episode.insert(inserted)
            pending[row] = [ids[-1], *inserted]


def _reset(env: Env, task: Task) -> Episode:
    """An episode that holds the first observation; one that is over already if the environment raises."""
    try:
        prompt, info = env.reset(task.split, task.seed)
    except Exception as error:  # see _step
        episode = Episode(task, "", info={"task_type": "unknown", "success": False})
        _break_off(episode, error)
        return episode
    return Episode(task, prompt, info=info)


def _step(episode: Episode, env: Env, thought: str, action: str, entropy: float = 0.0, tokens: int = 0) -> None:
    """Do the action and append the step; its tokens are the episode's last ones.

    An environment that raises ends this episode, as truncated and with the error in its info, and no other one.
    """
    try:
        observation, reward, episode.terminated, episode.truncated, episode.info = env.step(action)
    except Exception as error:  # engines and servers raise what they like; an answer of theirs would not
        observation, reward = "", 0.0
        _break_off(episode, error)
    end = len(episode.ids)
    episode.steps.append(Step(thought, action, observation, episode.info["valid"], end - tokens, end, entropy))
    episode.reward += reward


def _break_off(episode: Episode, error: Exception) -> None:
    """End the episode as truncated, with the error on record and on the terminal."""
    what = f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("%s was broken off in step %d: %s", episode.task, len(episode.steps), what)
    episode.truncated, episode.info = True, episode.info | {"valid": False, "error": what}


# ------------------------------------------------------------------------------------------------ scripted players


def play(env: Env, tasks: list[Task], player: Player, seed: int, desc: str = "play") -> list[Episode]:
    """One episode of every task by a scripted player: episodes with steps, but without tokens. A task that comes again
    is played with other random numbers."""
    episodes, times = [], Counter()
    for task in tqdm(tasks, desc=desc, unit="episode", leave=False, delay=2):
        rng = random.Random(f"{seed}/{task.seed}/{times[task]}")
        times[task] += 1
        episode = _reset(env, task)
        while not episode.done:
            try:
                thought, action = player(env, [step.action for step in episode.steps], rng)
            except Exception as error:  # it asks the environment what can be done, see _step
                _break_off(episode, error)
            else:
                _step(episode, env, thought, action)
        episodes.append(episode)
    return episodes


def dialogue(instructions: str, episode: Episode) -> Dialogue:
    """The episode as texts for cloning: instructions, first observation, then response and observation in turns."""
    texts = [instructions, episode.prompt]
    for step in episode.steps:
        texts += [format_response(step.thought, step.action), step.observation]
    return texts[:-1]  # nothing answers the last observation
