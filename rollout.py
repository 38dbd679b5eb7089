"""ReAct episodes for many environments at once, with log-probabilities and entropy captured while sampling.

An episode is one growing list of token ids: instructions and first observation, then in turns the response that the
policy samples and the observation that the environment answers. The KV cache is kept across turns, so every token goes
through the model once, and an opening that several episodes share goes through it once for all of them.

A response is sampled at temperature T over the full vocabulary (no top-k, no top-p). Its log-probabilities and
entropies come from the very logits that it was sampled from. The random number of a token depends on the episode's seed
and on the token's place in the episode, and on nothing else. So an episode is the same in whatever batch, on whatever
rank and with whatever limits it is played.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from engine.sampler import Sampler
from envs import Env, Player, format_response, parse_response
from episode import Episode, Step, Task
from policy import Dialogue, Policy

# --------------------------------------------------------------------------------------------------------- episodes


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
    response might not fit.  Returns the episodes in the order of the tasks.  Raises PolicyError if the logits are not
    finite.
    """
    policy.model.eval()
    limits = {"temperature": temperature, "max_step_tokens": max_step_tokens, "max_tokens": max_tokens}
    episodes = []
    with tqdm(total=len(tasks), desc=desc, unit="episode", leave=False, delay=2) as progress:
        for first in range(0, len(tasks), len(envs)):
            part = slice(first, first + len(envs))
            begun = _start(policy, envs, tasks[part], max_tokens - max_step_tokens)
            episodes += play_on(policy, envs, begun, seeds[part], **limits, finished=progress.update)
    return episodes


def _start(policy: Policy, envs: list[Env], tasks: list[Task], limit: int) -> list[Episode]:
    """Reset the environments: episodes that hold what comes before the first response.

    limit: tokens that may stand before a response; an episode with more of them is truncated.
    """
    episodes = [_reset(env, task) for env, task in zip(envs, tasks, strict=False)]
    openings = policy.opening(envs[0].instructions, [episode.prompt for episode in episodes])
    for episode, ids in zip(episodes, openings, strict=True):
        episode.insert(ids)
        episode.truncated |= len(ids) > limit
    return episodes


@torch.inference_mode()
def play_on(
    policy: Policy,
    envs: list[Env],
    episodes: list[Episode],
    seeds: list[tuple[int, ...]],
    *,
    temperature: float,
    max_step_tokens: int,
    max_tokens: int,
    finished: Callable[[int], object] = lambda number: None,
) -> list[Episode]:
    """The ReAct loop: play episodes that have begun to their end, and return them. Those that are done leave the batch.

    episodes: each ends where the next response begins, and its environment is in that state.  finished: called with the
    number of episodes that are done since the last call.  The rest is as in `rollout`.
    """
    limit = max_tokens - max_step_tokens
    # The token at place j of an episode is drawn with number j of its row.
    uniform = np.stack([np.random.default_rng(list(seed)).random(max_tokens) for seed in seeds])  # (B, max_tokens)
    live = [i for i, episode in enumerate(episodes) if not episode.done]
    finished(len(episodes) - len(live))
    if not live:
        return episodes
    sampler = Sampler(policy, [episodes[i].ids for i in live], temperature, max_step_tokens, max_tokens)
    while live:
        numbers = [uniform[i, len(episodes[i].ids) :][:max_step_tokens] for i in live]
        responses = sampler.respond([episodes[i].ids for i in live], torch.from_numpy(np.stack(numbers)))
        texts = policy.tokenizer.batch_decode([response.ids for response in responses], skip_special_tokens=True)
        for i, (ids, logp, entropy), text in zip(live, responses, texts, strict=True):
            episodes[i].append_sampled(ids, logp, entropy)
            _step(episodes[i], envs[i], *parse_response(text), sum(entropy) / len(ids), len(ids))
        turns = policy.turn([episodes[i].steps[-1].observation for i in live])
        for episode, turn in zip((episodes[i] for i in live), turns, strict=True):
            stopped = episode.ids[-1] == policy.stop_id
            inserted = turn if stopped else [policy.stop_id, *turn]  # the response was cut off: close the turn for it
            episode.truncated |= not episode.terminated and len(episode.ids) + len(inserted) > limit
            if not episode.done:
                episode.insert(inserted)
        going = [row for row, i in enumerate(live) if not episodes[i].done]
        finished(len(live) - len(going))
        live = [live[row] for row in going]
        sampler.keep(going)
    return episodes


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
    except Exception as error:  # engines and servers raise any type; only this episode ends
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


# ------------------------------------------------------------------------------------------------- scripted players


def play_scripted(env: Env, tasks: list[Task], player: Player, seed: int, desc: str = "play") -> list[Episode]:
    """One episode of every task by a scripted player: episodes with steps, but without tokens.

    A task that comes again is played with other random numbers.
    """
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
    """The episode as texts for imitation: instructions, first observation, then response and observation in turns."""
    texts = [instructions, episode.prompt]
    for step in episode.steps:
        texts += [format_response(step.thought, step.action), step.observation]
    return texts[:-1]  # nothing answers the last observation
