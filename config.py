"""Every flag of train.py and eval.py: one flat frozen dataclass for each, each field with its unit in its help."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from transformers import HfArgumentParser

from envs import ENVIRONMENTS, held_out_splits, make_envs, require_split

Config = TypeVar("Config")


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The command line as a config. An unknown flag or a bad value ends the program with one line, status 2."""
    parser = HfArgumentParser(
        config_class, description=config_class.__doc__, usage="%(prog)s [flags]; --help lists them", allow_abbrev=False
    )
    try:
        config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return config


@dataclass(frozen=True)
class WorldConfig:
    """Which world, and where it has its tasks from: the flags that train.py and eval.py share."""

    env: str = field(default="house", metadata={"help": f"one of {', '.join(ENVIRONMENTS)}"})
    env_args: list[str] = field(default_factory=list, metadata={"help": "settings of the environment, name=value"})
    data: str = field(default="", metadata={"help": "folder of the games (alfworld) or of the product files (webshop)"})
    webshop_root: str = field(default="", metadata={"help": "webshop: a checkout of WebShop to drive"})
    retriever: str = field(
        default="", metadata={"help": "search: http://HOST:PORT of a server in Search-R1's protocol"}
    )
    questions: str = field(default="", metadata={"help": "search: json, jsonl or parquet file, or a hub id"})
    corpus: str = field(default="", metadata={"help": "search: jsonl file of the passages to search"})

    @property
    def settings(self) -> list[str]:
        """env_args, and each source that was given, as make_envs takes them."""
        sources = ("data", "webshop_root", "retriever", "questions", "corpus")
        return [*self.env_args, *(f"{name}={getattr(self, name)}" for name in sources if getattr(self, name))]

    def require_tasks(self, splits: Sequence[str]) -> None:
        """Raises ValueError unless the world can be made and has tasks in each of the splits."""
        for split in splits:
            require_split(self.env, split)
        (env,) = make_envs(self.env, self.settings, 1)
        for split in splits:
            if env.size(split) == 0:
                raise ValueError(f"{self.env} has no tasks in split {split!r}")


@dataclass(frozen=True)
class TrainConfig(WorldConfig):
    """Train a ReAct agent with GRPO or DAPO, optionally modulated by EMPG."""

    policy: str = field(
        default="tiny", metadata={"help": "folder or hub id of a causal LM; tiny: built and warm-started"}
    )
    out: str = field(default="out/house", metadata={"help": "folder of the run"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in --out"})
    seed: int = field(default=0, metadata={"help": "of weights, tasks and sampling"})
    # the method
    algorithm: Literal["grpo", "dapo"] = field(default="grpo", metadata={"help": "loss and advantage family"})
    empg: bool = field(default=True, metadata={"help": "modulate the advantage by step entropy"})
    k: float = field(default=1.0, metadata={"help": "sharpness of g(H), dimensionless; 0 turns g off"})
    k_future: float = field(default=1.0, metadata={"help": "sharpness of f(H), dimensionless"})
    zeta: float = field(default=0.1, metadata={"help": "weight of f(H), in units of advantage; 0 turns f off"})
    clip_low: float = field(default=0.2, metadata={"help": "the ratio counts down to 1 - clip_low"})
    clip_high: float | None = field(
        default=None, metadata={"help": "and up to 1 + clip_high; 0.2 in GRPO, 0.28 in DAPO"}
    )
    aggregation: Literal["sequence", "token", "auto"] = field(
        default="auto", metadata={"help": "mean over tokens, then episodes, or over all tokens; auto: as the algorithm"}
    )
    kl_coef: float = field(
        default=0.0, metadata={"help": "weight of k3 to the first policy, per nat; 0 loads no reference"}
    )
    max_rounds: int = field(
        default=4, metadata={"help": "DAPO: rounds of sampling to find groups that differ in success"}
    )
    overlong_buffer: int = field(
        default=128, metadata={"help": "DAPO: tokens before max_tokens that cost reward; 0: none"}
    )
    # sampling
    iterations: int = field(default=80, metadata={"help": "batches of episodes to learn from"})
    tasks_per_iteration: int = field(
        default=8, metadata={"help": "tasks, thus groups, of an iteration, over all ranks"}
    )
    group_size: int = field(default=8, metadata={"help": "episodes per task, G"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, in training and evaluation"})
    max_step_tokens: int = field(default=32, metadata={"help": "tokens of one response"})
    max_tokens: int = field(default=1024, metadata={"help": "tokens of an episode"})
    batch_size: int = field(default=64, metadata={"help": "environments that are played at once, per rank"})
    # the update
    learning_rate: float = field(default=4e-4, metadata={"help": "of AdamW"})
    epochs: int = field(default=1, metadata={"help": "passes over the episodes of an iteration"})
    mini_batches: int = field(default=1, metadata={"help": "optimizer steps of a pass"})
    micro_batch_size: int = field(default=16, metadata={"help": "episodes of one forward and backward pass, per rank"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are scaled down to this norm"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice to save memory"})
    # the warm start of the tiny model
    demonstrations: int = field(
        default=2400, metadata={"help": "episodes of the careless player that it is cloned from"}
    )
    slip: float = field(default=0.4, metadata={"help": "share of the careless player's steps that are whims"})
    cache: str = field(default="out/warm_starts", metadata={"help": "folder where warm starts are kept"})
    # evaluation and records
    eval_split: str = field(default="", metadata={"help": "split of the held-out tasks; default: the first of them"})
    eval_tasks: int = field(default=256, metadata={"help": "held-out tasks, the first of the split"})
    eval_every: int = field(default=20, metadata={"help": "iterations between evaluations"})
    checkpoint_every: int = field(default=20, metadata={"help": "iterations between checkpoints"})
    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "tracker beside the file"}
    )

    def __post_init__(self):
        self.require_tasks(["train", self.held_out])
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 for a group baseline, got {self.group_size}")
        counts = (
            "iterations",
            "tasks_per_iteration",
            "max_rounds",
            "max_step_tokens",
            "max_tokens",
            "epochs",
            "batch_size",
        )
        counts += ("mini_batches", "micro_batch_size", "demonstrations", "eval_tasks", "eval_every", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ValueError(f"report_to {self.report_to} needs the package: pip install {self.report_to}")
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(
                f"overlong_buffer must be at most max_tokens {self.max_tokens}, got {self.overlong_buffer}"
            )
        if self.mini_batches > self.tasks_per_iteration * self.group_size:
            raise ValueError(f"mini_batches {self.mini_batches} are more than there are episodes in an iteration")

    @property
    def held_out(self) -> str:
        """The split of the evaluations."""
        return self.eval_split or held_out_splits(self.env)[0]

    @property
    def loss_settings(self) -> dict:
        """Keyword arguments of policy_loss: what tells DAPO's loss from GRPO's."""
        dapo = self.algorithm == "dapo"
        clip_high = self.clip_high if self.clip_high is not None else 0.28 if dapo else 0.2
        aggregation = self.aggregation if self.aggregation != "auto" else "token" if dapo else "sequence"
        return {"clip_low": self.clip_low, "clip_high": clip_high, "aggregation": aggregation}


@dataclass(frozen=True)
class EvalConfig(WorldConfig):
    """Evaluate one player, or compare two on the same tasks."""

    policy: str = field(default="oracle", metadata={"help": "checkpoint folder, hub id, oracle or random"})
    compare: list[str] = field(default_factory=list, metadata={"help": "two players A B, paired; replaces --policy"})
    split: list[str] = field(
        default_factory=list, metadata={"help": "splits of the environment's tasks; default: all held-out ones"}
    )
    tasks: int = field(default=256, metadata={"help": "tasks of each split, the first; at most all that there are"})
    batch_size: int = field(default=64, metadata={"help": "environments that are played at once"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling; 0 is greedy"})
    max_step_tokens: int = field(default=64, metadata={"help": "tokens of one response"})
    max_tokens: int = field(default=2048, metadata={"help": "tokens of an episode"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    json: str = field(default="", metadata={"help": "file for the result as JSON; it is also the last line printed"})
    episodes: str = field(default="", metadata={"help": "file for the episodes as JSON lines"})

    def __post_init__(self):
        self.require_tasks(self.split)
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare takes two players, got {len(self.compare)}")
        if self.compare and self.compare[0] == self.compare[1]:
            raise ValueError(f"compare takes two different players, got {self.compare[0]} twice")
        for name in ("tasks", "batch_size", "max_step_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
