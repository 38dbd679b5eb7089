"""Errors of a world end the episode that they happen in, and no other one. They are not the policy's doing.

An environment raises, or it answers with something that is no text or no number. Such an episode is called aborted. It
stays on record with the error, and is counted in the metrics. It trains nothing: it is in no loss, and in no statistic
of its group or of the batch.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

from envs import Env
from episode import Episode, Task


@contextmanager
def aborting(episode: Episode) -> Iterator[None]:
    """An exception within ends the episode as truncated, with the error on record and in one line on the terminal."""
    try:
        yield
    except Exception as error:  # engines raise any exception type
        what = " ".join(f"{type(error).__name__}: {error}".split())
        logging.getLogger(__name__).warning("%s was aborted in step %d: %s", episode.task, len(episode.steps), what)
        episode.truncated, episode.info = True, episode.info | {"valid": False, "error": what}


def checked_reset(env: Env, task: Task) -> tuple[str, dict]:
    """`env.reset`. Raises TypeError or ValueError if the answer is not what `Env` says."""
    observation, info = env.reset(task.split, task.seed)
    return _text(observation), _info(info, "task_type", "success")


def checked_step(env: Env, action: str) -> tuple[str, float, bool, bool, dict]:
    """`env.step`. Raises TypeError or ValueError if the answer is not what `Env` says."""
    observation, reward, terminated, truncated, info = env.step(action)
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(f"the reward is {reward!r}, not a finite number")
    checked_info = _info(info, "valid", "task_type", "success")
    return _text(observation), float(reward), bool(terminated), bool(truncated), checked_info


def _text(observation: str) -> str:
    if not isinstance(observation, str):
        raise TypeError(f"the observation is {type(observation).__name__}, not text")
    observation.encode()  # a lone surrogate is no text; UnicodeEncodeError is a ValueError
    return observation


def _info(info: dict, *keys: str) -> dict:
    if not isinstance(info, dict) or not info.keys() >= {*keys}:
        raise ValueError(f"the info is {info!r}, not a dict with {', '.join(keys)}")
    return {key: value for key, value in info.items() if key != "error"}  # "error" marks an aborted episode


def require_steps(episodes: list[Episode]) -> list[Episode]:
    """The episodes. Ends the program if there are some and none has a step: nothing could be measured or learnt."""
    if episodes and not any(episode.steps for episode in episodes):
        reasons = [episode.info["error"] for episode in episodes if episode.aborted]
        reasons += ["the first observation leaves no room for a response, raise --max_tokens"]
        raise SystemExit(f"none of {len(episodes)} episodes has a step: {reasons[0]}")
    return episodes


def require_none_aborted(episodes: list[Episode], what: str) -> list[Episode]:
    """The episodes. Ends the program if an environment aborted any of them."""
    if errors := [episode.info["error"] for episode in episodes if episode.aborted]:
        raise SystemExit(f"{len(errors)} of {len(episodes)} {what} were aborted: {errors[0]}")
    return episodes
