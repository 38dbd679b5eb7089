"""An episode holds its texts and its tokens. It becomes a row of a batch, a line of JSON, or a transcript to read.

A recorded episode can be replayed: the world must give the same answers to the same actions.
"""

import json
from dataclasses import asdict, dataclass, field
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
    entropy: float  # H_t: mean Shannon entropy over the sampled tokens, nats


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

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, True where the policy sampled."""
        return self.step_ids >= 0

    def select(self, rows: list[int]) -> "Batch":
        """The batch of these rows alone, cut to the longest of them."""
        length = self.length[rows]
        token_lists = (self.ids, self.step_ids, self.old_logp, self.token_entropy)
        return Batch(*(tensor[rows, : int(length.max())] for tensor in token_lists), self.reward[rows], length)


def collate(episodes: list[Episode], device: torch.device | str = "cpu") -> Batch:
    """The episodes as one batch on `device`."""
    rows = lambda name, dtype: [torch.tensor(getattr(e, name), dtype=dtype) for e in episodes]  # noqa: E731
    return Batch(
        ids=pad_sequence(rows("ids", torch.long), batch_first=True).to(device),
        step_ids=pad_sequence(rows("step_ids", torch.long), batch_first=True, padding_value=-1).to(device),
        old_logp=pad_sequence(rows("old_logp", torch.float32), batch_first=True).to(device),
        token_entropy=pad_sequence(rows("token_entropy", torch.float32), batch_first=True).to(device),
        reward=torch.tensor([e.reward for e in episodes], device=device),
        length=torch.tensor([len(e.ids) for e in episodes], device=device),
    )


def save_episodes(path: Path, episodes: list[Episode]) -> None:
    """Write one JSON object a line: first the texts of the episode, then its token lists. Floats are exact."""
    path.write_text("".join(json.dumps(asdict(episode)) + "\n" for episode in episodes))


def load_episodes(path: Path) -> list[Episode]:
    """Read what `save_episodes` wrote. Raises ValueError for a line that is not an episode; it names file and line."""
    episodes = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            record["task"] = Task(**record["task"])
            record["steps"] = [Step(**step) for step in record["steps"]]
            episodes.append(Episode(**record))
        except (KeyError, TypeError, ValueError) as error:
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


def transcript(episode: Episode, step_advantage: list[float] | None = None) -> str:
    """The episode as text. Each step shows its entropy H in nats, its thought, its action and the observation.

    step_advantage: one number a step, the advantage that its tokens were trained with; it is shown as A.
    """
    outcome = "success" if episode.success else "truncated" if episode.truncated else "failure"
    lines = [f"{episode.task.env} {episode.task.split} {episode.task.seed}: {outcome}, reward {episode.reward:g}", ""]
    lines += [episode.prompt]
    for number, step in enumerate(episode.steps):
        advantage = f"  A {step_advantage[number]:+.3f}" if step_advantage else ""
        lines += ["", f"step {number}  H {step.entropy:.3f}{advantage}{'' if step.valid else '  (invalid)'}"]
        lines += [f"  Thought: {step.thought}", f"  Action: {step.action}", f"  {step.observation}"]
    return "\n".join(lines) + "\n"
