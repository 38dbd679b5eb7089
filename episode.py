"""An episode holds its texts and its tokens. It becomes a row of a batch, a line of JSON, or a transcript to read.

A recorded episode can be replayed: the world must give the same answers to the same actions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Task:
    """One goal: task number `seed` in a split of an environment. All episodes of a group have the same task."""

    env: str
    split: str
    seed: int


@dataclass
class Step:
    """One think-act-observe cycle. The policy sampled episode.ids[start:end] in it, the stop token included."""

    thought: str
    action: str  # what the environment received; "" if the response has no action
    observation: str  # the environment's answer
    valid: bool  # True if the environment understood and performed the action
    start: int
    end: int


@dataclass
class Episode:
    """One full interaction. The last four fields are lists with one entry for each of the L tokens."""

    task: Task
    prompt: str  # the first observation
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    terminated: bool = False  # the environment ended the episode
    truncated: bool = False  # a limit ended the episode: steps or tokens
    info: dict = field(default_factory=dict)  # the environment's last info: task_type, success, ...
    ids: list[int] = field(default_factory=list)
    step_ids: list[int] = field(default_factory=list)  # number of the step that sampled the token, -1 if inserted
    old_logp: list[float] = field(default_factory=list)  # log-prob of ids[j] given ids[:j], nats; 0 if inserted
    token_entropy: list[float] = field(default_factory=list)  # of the distribution at ids[j], nats; 0 if inserted

    @property
    def success(self) -> bool:
        return bool(self.info["success"])

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    @property
    def aborted(self) -> bool:
        """Whether its environment failed. That is not the policy's doing, so the episode trains nothing."""
        return "error" in self.info

    def insert(self, ids: list[int]) -> None:
        """Append tokens that the policy did not sample: prompt, observation, chat template."""
        self.ids += ids
        self.step_ids += [-1] * len(ids)
        self.old_logp += [0.0] * len(ids)
        self.token_entropy += [0.0] * len(ids)

    def append_sampled(self, ids: list[int], logp: list[float], entropy: list[float]) -> None:
        """Append the tokens that the policy sampled in the next step. logp and entropy: one number a token, nats."""
        self.ids += ids
        self.step_ids += [len(self.steps)] * len(ids)
        self.old_logp += logp
        self.token_entropy += entropy


# ------------------------------------------------------------------------------------------- batches, files, replay


@dataclass(frozen=True)
class Batch:
    """Episodes as tensors. Rows are padded on the right; `length` says where the padding starts, never a token id."""

    ids: Tensor  # (B, L) int, padded with 0
    step_ids: Tensor  # (B, L) int, -1 where the policy did not sample, padding included
    old_logp: Tensor  # (B, L), nats, padded with 0
    token_entropy: Tensor  # (B, L), nats, padded with 0
    reward: Tensor  # (B,)
    length: Tensor  # (B,) int, tokens
    episodes: list[Episode]  # of the rows

    @property
    def keep(self) -> Tensor:
        """(B,) bool, False for an episode that its environment aborted."""
        return torch.tensor([not episode.aborted for episode in self.episodes], device=self.ids.device)

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, True where the policy sampled."""
        return self.step_ids >= 0

    def select(self, rows: list[int]) -> "Batch":
        """The batch of these rows alone, cut to the longest of them."""
        length = self.length[rows]
        token_lists = (self.ids, self.step_ids, self.old_logp, self.token_entropy)
        cut = (tensor[rows, : int(length.max())] for tensor in token_lists)
        return Batch(*cut, self.reward[rows], length, [self.episodes[row] for row in rows])


def collate(episodes: list[Episode], device: torch.device | str = "cpu") -> Batch:
    """The episodes as one batch on `device`."""

    def padded(name: str, dtype: torch.dtype, padding: float = 0) -> Tensor:
        rows = [torch.tensor(getattr(episode, name), dtype=dtype) for episode in episodes]
        return pad_sequence(rows, batch_first=True, padding_value=padding).to(device)  # (B, L)

    return Batch(
        ids=padded("ids", torch.long),
        step_ids=padded("step_ids", torch.long, -1),
        old_logp=padded("old_logp", torch.float32),
        token_entropy=padded("token_entropy", torch.float32),
        reward=torch.tensor([episode.reward for episode in episodes], device=device),
        length=torch.tensor([len(episode.ids) for episode in episodes], device=device),
        episodes=episodes,
    )


def save_episodes(path: Path, episodes: list[Episode]) -> None:
    """Write one JSON object a line: first the texts of the episode, then its token lists. Floats are exact."""
    path.write_text("".join(json.dumps(asdict(episode)) + "\n" for episode in episodes), encoding="utf-8")


def load_episodes(path: Path) -> list[Episode]:
    """Read what `save_episodes` wrote, or the episodes that a run keeps; what stands beside their fields is left out.

    Raises ValueError for a line that is not an episode; it names file and line.
    """
    episodes = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            values = {field.name: record[field.name] for field in fields(Episode)}
            values["task"] = Task(**record["task"])
            values["steps"] = [Step(**step) for step in record["steps"]]
            episodes.append(Episode(**values))
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an episode ({error})") from error
    return episodes


def replay(episode: Episode, env) -> None:
    """Play the recorded actions again. Raises ValueError at the first observation that differs from the record."""
    prompt, _ = env.reset(episode.task.split, episode.task.seed)
    if prompt != episode.prompt:
        raise ValueError(f"{episode.task}: the world starts with {prompt!r}, recorded was {episode.prompt!r}")
    for number, step in enumerate(episode.steps):
        observation, *_ = env.step(step.action)
        if observation != step.observation:
            raise ValueError(f"{episode.task}, step {number}: got {observation!r}, recorded was {step.observation!r}")


def transcript(episode: Episode, entropy: Sequence[float], advantage: Sequence[float]) -> str:
    """The episode as text: each step with its thought, its action and the observation.

    entropy, advantage: one number a step, shown as H (nats) and A: what the step's tokens were trained with.
    """
    outcome = "success" if episode.success else "truncated" if episode.truncated else "failure"
    lines = [f"{episode.task.env} {episode.task.split} {episode.task.seed}: {outcome}, reward {episode.reward:g}", ""]
    lines += [episode.prompt]
    for number, (step, h, a) in enumerate(zip(episode.steps, entropy, advantage, strict=False)):  # padding follows
        invalid = "" if step.valid else "  (invalid)"
        lines += ["", f"step {number}  H {h:.3f}  A {round(a, 3) + 0.0:+.3f}{invalid}"]  # never -0.000
        lines += [f"  Thought: {step.thought}", f"  Action: {step.action}", f"  {step.observation}"]
    return "\n".join(lines) + "\n"
