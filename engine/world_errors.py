"""Errors of a world end the episode that they happen in, and no other one. They are not the policy's doing.

An environment raises, or its answer breaks the contract. Such an episode is called aborted. It stays on record with the
error, and is counted in the metrics. It trains nothing: it is in no loss, and in no statistic of its group or of the
batch. If all episodes are aborted, the program ends.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from episode import Episode
from worlds.contract import WorldError, in_one_line


class NoStepsError(SystemExit):
    """There is nothing to measure or to learn. Ends the program with its message. All ranks raise it together."""


@contextmanager
def aborting(episode: Episode) -> Iterator[None]:
    """An exception within ends the episode as truncated, with the error on record and in one line on the terminal."""
    try:
        yield
    except (Exception, WorldError) as error:
        what = in_one_line(error)
        logging.getLogger(__name__).warning("%s was aborted in step %d: %s", episode.task, len(episode.steps), what)
        episode.truncated, episode.info = True, episode.info | {"valid": False, "error": what}


def require_steps(episodes: list[Episode]) -> list[Episode]:
    """The episodes of all ranks. Raises NoStepsError if there are some, but none has a step that was not aborted."""
    left = [episode for episode in episodes if not episode.aborted]
    if episodes and not left:
        raise NoStepsError(f"all {len(episodes)} episodes were aborted: {episodes[0].info['error']}")
    if left and not any(episode.steps for episode in left):
        why = "the first observation leaves no room for a response, raise --max_tokens"
        raise NoStepsError(f"none of {len(left)} episodes has a step: {why}")
    return episodes


def require_none_aborted(episodes: list[Episode], what: str) -> list[Episode]:
    """The episodes. Ends the program if an environment aborted any of them."""
    if errors := [episode.info["error"] for episode in episodes if episode.aborted]:
        raise SystemExit(f"{len(errors)} of {len(episodes)} {what} were aborted: {errors[0]}")
    return episodes
