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
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from empg import token_logp_and_entropy
from envs import Env, Player, format_response, parse_response
from episode import Episode, Step, Task
from policy import Dialogue, Policy, PolicyError

# --------------------------------------------------------------------------------------------------------- sampling


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


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer, written in place: the token at position p of a row stands in column p.

    transformers' own layer copies the whole past for every token. Here `keys` and `values`, (B, heads, columns, size),
    are views of buffers that double when they are full. The last column of a buffer takes what belongs to no token.
    """

    slots: Tensor  # (B, n), the column of each of the next n tokens, -1 for padding
    columns: int  # that will be in use then

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the states of n tokens, (B, heads, n, size), into their slots; returns all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states[:, :, :0] for states in (key_states, value_states)]
        if self.columns >= self._buffers[0].shape[2]:
            used = self.get_seq_length()
            self._buffers = [self._larger(buffer[:, :, :used]) for buffer in self._buffers]
        row = torch.arange(len(self.slots), device=self.slots.device)[:, None]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[row, :, self.slots] = states.transpose(1, 2)
        self.keys, self.values = (buffer[:, :, : self.columns] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may come several times."""
        if self.is_initialized:
            self._buffers = [self._larger(states[indices]) for states in (self.keys, self.values)]
            self.keys, self.values = (buffer[:, :, : self.columns] for buffer in self._buffers)

    def _larger(self, states: Tensor) -> Tensor:
        """A buffer that begins with the states. Zeros follow, because attention multiplies masked values by 0."""
        buffer = states.new_zeros(*states.shape[:2], 2 * self.columns, states.shape[3])
        buffer[:, :, : states.shape[2]] = states
        return buffer


class Sampler:
    """Samples a response for every row of a batch, turn after turn, on one KV cache.

    openings: the ids that each row begins with. Equal ones are read once. The last id is left for `respond`.
    """

    def __init__(self, policy: Policy, openings: list[list[int]], temperature: float, max_step_tokens: int):
        self.policy, self.temperature, self.max_step_tokens = policy, temperature, max_step_tokens
        self.cache = DynamicCache(config=policy.model.config)
        self.cache.layers = [SlotLayer() for _ in self.cache.layers]
        distinct = list(dict.fromkeys(tuple(ids[:-1]) for ids in openings))
        self.length = torch.zeros(len(distinct), 1, dtype=torch.long, device=policy.device)  # (B, 1), tokens read
        self._forward(*self._pad(distinct))
        self.keep([distinct.index(tuple(ids[:-1])) for ids in openings])

    def respond(self, pending: list[list[int]], uniform: Tensor) -> list[tuple[list[int], list[float], list[float]]]:
        """Feed each row its `pending` ids and sample until it writes the stop token or max_step_tokens.

        uniform: (B, max_step_tokens) random numbers in [0, 1).  Returns ids, logp and entropy (nats) for each row. The
        last id of a response has not been fed yet: it belongs in front of the row's next pending ids.
        Raises PolicyError if the logits are not finite.
        """
        ids, real = self._pad(pending)
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
        token, logp, entropy, kept = (torch.stack(column, 1) for column in zip(*columns, strict=True))  # (B, n)
        if not logp[kept > 0].isfinite().all():
            raise PolicyError("the policy's logits are not finite: its weights are damaged, or training diverged")
        lengths, columns = kept.sum(1).tolist(), [part.tolist() for part in (token, logp, entropy)]
        return [tuple(part[row][:length] for part in columns) for row, length in enumerate(lengths)]

    def _pad(self, rows: list) -> tuple[Tensor, Tensor]:
        """Ids (B, n), padded on the left with 0, and which of them are real, 1 or 0."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows], device=self.policy.device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.policy.device)
        return ids, real

    def _forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (B, V) after the last of the ids (B, n); `real` (B, n) is 0 for padding."""
        slots = (self.length + real.cumsum(1) - 1).where(real > 0, -1)  # (B, n)
        self.length = self.length + real.sum(1, keepdim=True)
        columns = int(self.length.max())
        for layer in self.cache.layers:
            layer.slots, layer.columns = slots, columns
        positions = slots.clamp(min=0)
        causal = torch.arange(columns, device=slots.device) <= positions[:, None, :, None]  # (B, 1, n, columns)
        output = self.policy.model(
            input_ids=ids,
            attention_mask=causal,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Make these the rows of the batch; every other row is dropped."""
        if rows != list(range(len(self.length))):
            index = torch.tensor(rows, dtype=torch.long, device=self.length.device)
            self.cache.batch_select_indices(index)
            self.length = self.length[index]


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
    sampler = Sampler(policy, [episodes[i].ids for i in live], temperature, max_step_tokens)
    pending = [episodes[i].ids[-1:] for i in live]  # ids that the model has not read yet
    while live:
        numbers = [uniform[i, len(episodes[i].ids) :][:max_step_tokens] for i in live]
        responses = sampler.respond(pending, torch.from_numpy(np.stack(numbers)))
        texts = policy.tokenizer.batch_decode([ids for ids, _, _ in responses], skip_special_tokens=True)
        for i, (ids, logp, entropy), text in zip(live, responses, texts, strict=True):
            episodes[i].append_sampled(ids, logp, entropy)
            _step(episodes[i], envs[i], *parse_response(text), sum(entropy) / len(ids), len(ids))
        turns = policy.turn([episodes[i].steps[-1].observation for i in live])
        for row, (i, turn) in enumerate(zip(live, turns, strict=True)):
            last = responses[row][0][-1]
            inserted = turn if last == policy.stop_id else [policy.stop_id, *turn]  # cut off: close the turn for it
            pending[row] = [last, *inserted]
            episodes[i].truncated |= not episodes[i].terminated and len(episodes[i].ids) + len(inserted) > limit
            if not episodes[i].done:
                episodes[i].insert(inserted)
        going = [row for row, i in enumerate(live) if not episodes[i].done]
        finished(len(live) - len(going))
        live, pending = [live[row] for row in going], [pending[row] for row in going]
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
