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
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from envs import Env, Player, format_response, parse_response
from episode import Episode, Step, Task
from policy import Dialogue, Policy
from sampler import Response, Sampler

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

    def begin(number: int, env: Env) -> Episode:
        episode = _reset(env, tasks[number])
        episode.insert(policy.opening(env.instructions, [episode.prompt])[0])
        episode.truncated |= len(episode.ids) > max_tokens - max_step_tokens
        return episode

    with tqdm(total=len(tasks), desc=desc, unit="episode", leave=False, delay=2) as progress:
        return play(policy, envs, begin, seeds, **limits, report=lambda done: progress.update(done - progress.n))


def play_on(
    policy: Policy, envs: list[Env], episodes: list[Episode], seeds: list[tuple[int, ...]], **limits
) -> list[Episode]:
    """Play episodes that have begun to their end, and return them.

    episodes: each ends where the next response begins, and its environment is in that state.  limits: as in `play`.
    """
    return play(policy, envs, lambda number, env: episodes[number], seeds, **limits)


@dataclass
class Row:
    """A row of the sampler's batch: an episode that is being played."""

    env: Env
    episode: Episode
    uniform: np.ndarray  # (max_tokens,), the token at place j of the episode is drawn with number j


@torch.inference_mode()
def play(
    policy: Policy,
    envs: list[Env],
    begin: Callable[[int, Env], Episode],
    seeds: list[tuple[int, ...]],
    *,
    temperature: float,
    max_step_tokens: int,
    max_tokens: int,
    report: Callable[[int], object] = lambda done: None,
) -> list[Episode]:
    """The ReAct loop: play an episode for each of the seeds, as many at a time as there are environments.

    begin: puts an environment into the state in which episode number i begins, and returns that episode, which ends
    where the next response begins. The first episodes take the environments in their order. Each later one takes an
    environment whose episode is done.  report: is told after each turn how many episodes are done.  The rest is as in
    `rollout`.
    """
    sampler = Sampler(policy, temperature, max_step_tokens, max_tokens)
    episodes, rows, free = [], [], deque(envs)
    while rows or len(episodes) < len(seeds):
        old = len(rows)
        while free and len(episodes) < len(seeds):
            env, uniform = free.popleft(), np.random.default_rng(list(seeds[len(episodes)])).random(max_tokens)
            episodes.append(begin(len(episodes), env))
            if episodes[-1].done:
                free.append(env)
            else:
                rows.append(Row(env, episodes[-1], uniform))
        if len(rows) > old:
            sampler.add([row.episode.ids for row in rows[old:]])
        if rows:
            numbers = [row.uniform[len(row.episode.ids) :][:max_step_tokens] for row in rows]
            responses = sampler.respond([row.episode.ids for row in rows], torch.from_numpy(np.stack(numbers)))
            _observe(policy, rows, responses, max_tokens - max_step_tokens)
        going = [i for i, row in enumerate(rows) if not row.episode.done]
        free += [row.env for row in rows if row.episode.done]
        rows = [rows[i] for i in going]
        sampler.keep(going)
        report(len(episodes) - len(rows))
    return episodes


def _observe(policy: Policy, rows: list[Row], responses: list[Response], limit: int) -> None:
    """Append each row's response, do its action, and insert what the environment answers.

    limit: tokens that may stand before a response; an episode that would have more of them is truncated.
    """
    texts = policy.tokenizer.batch_decode([response.ids for response in responses], skip_special_tokens=True)
    for row, response, text in zip(rows, responses, texts, strict=True):
        row.episode.append_sampled(response.ids, response.logp, response.entropy)
        number = len(response.ids)
        _step(row.episode, row.env, *parse_response(text), sum(response.entropy) / number, number)
    turns = policy.turn([row.episode.steps[-1].observation for row in rows])
    for episode, turn in zip((row.episode for row in rows), turns, strict=True):
        stopped = episode.ids[-1] == policy.stop_id
        inserted = turn if stopped else [policy.stop_id, *turn]  # the response was cut off: close the turn for it
        episode.truncated |= not episode.terminated and len(episode.ids) + len(inserted) > limit
        if not episode.done:
            episode.insert(inserted)


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
