"""ReAct episodes for many environments at once, with log-probabilities and entropy captured while sampling.

An episode is one growing list of token ids: instructions and first observation, then in turns the response that the
policy samples and the observation that the environment answers. The KV cache is kept across turns, so every token goes
through the model once, and a prompt that several episodes share goes through it once for all of them.

A response is sampled at temperature T over the full vocabulary (no top-k, no top-p). Its log-probabilities and
entropies come from the same logits that it was sampled from. The random number of a token depends on the episode's seed
and on the token's place in the episode, and on nothing else. So an episode is the same in whatever batch, on whatever
rank and with whatever limits that it does not reach.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from engine.sampler import Sampler
from engine.world_errors import aborting
from envs import Env, Player, parse_response
from episode import Episode, Step, Task
from policy import Policy


def generator(*key: str | int) -> np.random.Generator:
    """Random numbers of their own for every key: a word for the purpose, then names and numbers."""
    return np.random.default_rng([*"/".join(map(str, key)).encode()])


def train_task(env: str, size: int | None, seed: int, number: int) -> Task:
    """A run's training task `number`: a new one each time, or all tasks of a finite split, in another order each pass.

    size: tasks of the training split, None if it has one for every seed.  seed: of the run.
    """
    if size is None:
        return Task(env, "train", seed * 10**9 + number)
    return Task(env, "train", int(task_order(seed, number // size, size)[number % size]))


@lru_cache(maxsize=2)  # a pass, and the next one
def task_order(seed: int, number: int, size: int) -> np.ndarray:
    """The order (size,) of a split's tasks in pass `number` of a run."""
    return generator("tasks", seed, number).permutation(size)


# --------------------------------------------------------------------------------------------------------- episodes


@torch.inference_mode()
def rollout(
    policy: Policy,
    envs: list[Env],
    tasks: list[Task],
    seeds: list[tuple[str | int, ...]],
    *,
    temperature: float = 1.0,
    max_step_tokens: int = 64,
    max_tokens: int = 2048,
    desc: str = "rollout",
) -> list[Episode]:
    """One episode of every task, in the order of the tasks; as many are played at a time as there are environments.

    seeds: for each episode, the key of its random numbers, see `generator`.  temperature: 0 is greedy.
    max_step_tokens: of one response; a longer one is cut off.  max_tokens: of an episode; it is truncated if the next
    response might not fit.  Raises PolicyError if the logits are not finite.
    """
    policy.model.eval()
    limits = {"temperature": temperature, "max_step_tokens": max_step_tokens, "max_tokens": max_tokens}
    episodes = []
    with tqdm(total=len(tasks), desc=desc, unit="episode", leave=False, delay=2) as progress:
        for start in range(0, len(tasks), len(envs)):
            part = slice(start, start + len(envs))
            started = _start(policy, envs, tasks[part], max_tokens - max_step_tokens)
            episodes += play_on(policy, envs, started, seeds[part], **limits, finished=progress.update)
    return episodes


def _start(policy: Policy, envs: list[Env], tasks: list[Task], limit: int) -> list[Episode]:
    """Reset the environments: episodes that hold the prompt, truncated if it has more than `limit` tokens."""
    episodes = [_reset(env, task) for env, task in zip(envs, tasks, strict=False)]
    prompts = policy.prompt(envs[0].instructions, [episode.prompt for episode in episodes])
    for episode, ids in zip(episodes, prompts, strict=True):
        episode.insert(ids)
        episode.truncated |= len(ids) > limit
    return episodes


@torch.inference_mode()
def play_on(
    policy: Policy,
    envs: list[Env],
    episodes: list[Episode],
    seeds: list[tuple[str | int, ...]],
    *,
    temperature: float,
    max_step_tokens: int,
    max_tokens: int,
    finished: Callable[[int], object] = lambda number: None,
) -> list[Episode]:
    """The ReAct loop: play started episodes to their end, and return them. An episode that is done leaves the batch.

    episodes: each ends where the next response begins, and its environment is in that state.  finished: called with the
    number of episodes that are done since the last call.  The rest is as in `rollout`.
    """
    limit = max_tokens - max_step_tokens
    # uniform[i, j] draws token j of episode i.
    uniform = np.stack([generator(*seed).random(max_tokens) for seed in seeds])  # (B, max_tokens)
    live = [i for i, episode in enumerate(episodes) if not episode.done]
    finished(len(episodes) - len(live))
    if not live:
        return episodes
    # In plain code: `model.generate` on each history, keeping log-prob and entropy of every token that it samples.
    sampler = Sampler(policy, [episodes[i].ids for i in live], temperature, max_step_tokens, max_tokens)
    while live:
        numbers = [uniform[i, len(episodes[i].ids) :][:max_step_tokens] for i in live]
        responses = sampler.respond([episodes[i].ids for i in live], torch.from_numpy(np.stack(numbers)))
        for i, response in zip(live, responses, strict=True):
            episodes[i].append_sampled(*response)
            _act(episodes[i], envs[i], *parse_response(*policy.read(response.ids)), tokens=len(response.ids))
        observations = policy.between([episodes[i].steps[-1].observation for i in live])
        for episode, ids in zip((episodes[i] for i in live), observations, strict=True):
            stops = [] if episode.ids[-1] == policy.stop_id else [policy.stop_id]  # cut off, or another stop token
            episode.truncated |= not episode.terminated and len(episode.ids) + len(stops) + len(ids) > limit
            if not episode.done:
                episode.insert(stops + ids)
        kept = [row for row, i in enumerate(live) if not episodes[i].done]
        finished(len(live) - len(kept))
        live = [live[row] for row in kept]
        sampler.keep(kept)
    return episodes


def _reset(env: Env, task: Task) -> Episode:
    """A new episode with its first observation; already aborted if the environment fails."""
    episode = Episode(task, "", info={"task_type": "unknown", "success": False})
    with aborting(episode):
        episode.prompt, episode.info = env.reset(task.split, task.seed)
    return episode


def _act(episode: Episode, env: Env, thought: str, action: str, tokens: int = 0) -> None:
    """Give the action to the environment and append the step; its tokens are the episode's last ones."""
    observation, reward = "", 0.0
    with aborting(episode):
        observation, reward, episode.terminated, episode.truncated, episode.info = env.step(action)
    end = len(episode.ids)
    episode.steps.append(Step(thought, action, observation, episode.info["valid"], end - tokens, end))
    episode.reward += reward


# ------------------------------------------------------------------------------------------------- scripted players


def play_scripted(
    env: Env, tasks: list[Task], player: Player, seed: int, desc: str = "play", strict: bool = False
) -> list[Episode]:
    """One episode of every task by a scripted player: episodes with steps, but without tokens.

    A task that comes again is played with other random numbers.  strict: the first aborted episode ends the program.
    """
    episodes, times = [], Counter()
    for task in tqdm(tasks, desc=desc, unit="episode", leave=False, delay=2):
        rng = random.Random(f"{task.split}/{seed}/{task.seed}/{times[task]}")
        times[task] += 1
        episode = _reset(env, task)
        while not episode.done:
            with aborting(episode):  # the player asks the environment what can be done
                _act(episode, env, *player(env, [step.action for step in episode.steps], rng))
        if strict and episode.aborted:
            raise SystemExit(f"{desc}: an episode was aborted: {episode.info['error']}")
        episodes.append(episode)
    return episodes
