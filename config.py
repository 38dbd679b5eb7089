"""Every flag of train.py and eval.py: one flat frozen dataclass for each, each field with its unit in its help.

Making a configuration checks its values and reads no file: whether data are there is found out when a run begins.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import HfArgumentParser

from empg import AGGREGATIONS, NORMALIZATIONS
from envs import ENVIRONMENTS, held_out_splits, make_config, require_split

Config = TypeVar("Config")

# What an algorithm is made of: the defaults of flags that can each be set on its own. TrainConfig fills them in once.
ALGORITHMS = {
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence",
        "dynamic_sampling": False,
        "overlong_buffer": 0,
    },
    "dapo": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token",
        "dynamic_sampling": True,
        "overlong_buffer": 128,
    },
}


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, defaults: dict | None = None) -> Config:
    """The command line as a config. An unknown flag or a bad value ends the program with one line, status 2.

    defaults: values that take the place of the class's own where a flag is not given.
    """
    parser = HfArgumentParser(
        config_class, description=config_class.__doc__, usage="%(prog)s [flags]; --help lists them", allow_abbrev=False
    )
    parser.set_defaults(**(defaults or {}))
    try:
        config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return config


def _require(config, *names: str, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> None:
    """Raises ValueError naming the first of these fields that is not finite or out of bounds."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and least <= value <= most and value > above):
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf)
            bounds += [f"at most {most:g}"] * (most < math.inf)
            raise ValueError(f"{name} must be {' and '.join(bounds or ['finite'])}, got {value}")


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
    example: bool = field(
        default=False, metadata={"help": "add a faultless episode to the instructions, for a model that never saw one"}
    )

    threads: int = field(
        default=0,
        metadata={"help": "of a process on the CPU; 0: its share of the cores; 1 for several runs beside each other"},
    )

    @property
    def settings(self) -> list[str]:
        """env_args, and each source that was given, as make_envs takes them."""
        sources = ("data", "webshop_root", "retriever", "questions", "corpus")
        return [*self.env_args, *(f"{name}={getattr(self, name)}" for name in sources if getattr(self, name))]


@dataclass(frozen=True)
class TrainConfig(WorldConfig):
    """Train a ReAct agent with GRPO or DAPO, optionally modulated by EMPG."""

    policy: str = field(
        default="tiny", metadata={"help": "folder or hub id of a causal LM; tiny: built and warm-started"}
    )
    out: str | None = field(default=None, metadata={"help": "folder of the run; default: out/WORLD"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in --out"})
    dry_run: int = field(
        default=0, metadata={"help": "say what a run on this many processes takes, load nothing, and end"}
    )
    gpu_memory: float = field(default=80, metadata={"help": "of one device, GB; for --dry_run"})
    seed: int = field(default=0, metadata={"help": "of weights, tasks and sampling"})
    # the method
    algorithm: str = field(default="grpo", metadata={"help": f"{' or '.join(ALGORITHMS)}: sets the flags marked *"})
    empg: bool = field(default=True, metadata={"help": "modulate the advantage by step entropy"})
    k: float = field(
        default=1.0, metadata={"help": "sharpness of g(H), dimensionless; 0: off; below 0: reversed, beyond the paper"}
    )
    k_future: float = field(default=1.0, metadata={"help": "sharpness of f(H), dimensionless"})
    zeta: float = field(default=0.1, metadata={"help": "weight of f(H), in units of advantage; 0 turns f off"})
    normalization: str = field(
        default="minmax", metadata={"help": f"of H to [0, 1]: {' or '.join(NORMALIZATIONS)}; rank is beyond the paper"}
    )
    bonus_in_all_groups: bool = field(
        default=True, metadata={"help": "f also where a group's rewards are all equal; False is beyond the paper"}
    )
    clip_low: float | None = field(default=None, metadata={"help": "* the ratio counts down to 1 - clip_low; 0.2"})
    clip_high: float | None = field(
        default=None, metadata={"help": "* and up to 1 + clip_high; 0.2 in GRPO, 0.28 in DAPO"}
    )
    aggregation: str | None = field(
        default=None,
        metadata={
            "help": f"* one of {', '.join(AGGREGATIONS)}: mean over a sequence's tokens first, or over all tokens"
        },
    )
    dynamic_sampling: bool | None = field(
        default=None, metadata={"help": "* train only on groups that differ in success, sample until there are enough"}
    )
    max_rounds: int = field(default=4, metadata={"help": "rounds of dynamic sampling in an iteration, at most"})
    overlong_buffer: int | None = field(
        default=None, metadata={"help": "* tokens before max_tokens that cost reward; 0 in GRPO, 128 in DAPO"}
    )
    kl_coef: float = field(
        default=0.0, metadata={"help": "weight of k3 to the first policy, per nat; 0 loads no reference"}
    )
    # sampling
    iterations: int = field(default=60, metadata={"help": "batches of episodes to learn from"})
    tasks_per_iteration: int = field(
        default=8, metadata={"help": "tasks, thus groups, of an iteration, over all ranks"}
    )
    group_size: int = field(default=8, metadata={"help": "episodes per task, G"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, in training and evaluation"})
    max_step_tokens: int = field(default=32, metadata={"help": "tokens of one response"})
    max_tokens: int = field(default=1024, metadata={"help": "tokens of an episode"})
    batch_size: int = field(default=128, metadata={"help": "environments that are played at once, at most, per rank"})
    # the update
    learning_rate: float = field(default=4e-4, metadata={"help": "of AdamW"})
    epochs: int = field(default=1, metadata={"help": "passes over the episodes of an iteration"})
    mini_batches: int = field(default=2, metadata={"help": "optimizer steps of a pass"})
    micro_batch_tokens: int = field(
        default=8192, metadata={"help": "tokens of one forward and backward pass, padding included, per rank"}
    )
    old_logp: Literal["captured", "recompute"] = field(
        default="captured", metadata={"help": "old log-probs: the sampler's, or the trainer's before its first step"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are scaled down to this norm"})
    fsdp: bool = field(
        default=False, metadata={"help": "divide weights, gradients and optimizer among the processes (FSDP2)"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice to save memory"})
    # the warm start of the tiny model
    demonstrations: int = field(default=2400, metadata={"help": "episodes of the careless player that it imitates"})
    slip: float = field(
        default=0.4, metadata={"help": "share of the careless player's steps that are not the oracle's"}
    )
    cache: str = field(default="out/warm_starts", metadata={"help": "folder where warm starts are kept"})
    # evaluation and records
    eval_split: str = field(default="", metadata={"help": "split of the held-out tasks; default: the first of them"})
    eval_tasks: int = field(default=256, metadata={"help": "held-out tasks, the first of the split"})
    eval_every: int = field(default=30, metadata={"help": "iterations between evaluations"})
    checkpoint_every: int = field(default=20, metadata={"help": "iterations between checkpoints"})
    report_to: str = field(default="none", metadata={"help": f"a tracker, too: {', '.join(LOGGER_TYPE_TO_CLASS)}"})

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be {' or '.join(ALGORITHMS)}, got {self.algorithm}")
        resolved = ALGORITHMS[self.algorithm] | {"out": f"out/{self.env}"}
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # once, here: the rest of the run sees values only
        self._check_numbers()
        make_config(self.env, self.settings)
        require_split(self.env, self.held_out)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be {' or '.join(AGGREGATIONS)}, got {self.aggregation}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be {' or '.join(NORMALIZATIONS)}, got {self.normalization}")
        if self.report_to not in ("none", *LOGGER_TYPE_TO_CLASS):
            raise ValueError(
                f"report_to must be none or one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {self.report_to}"
            )
        if self.report_to != "none" and self.report_to not in map(str, get_available_trackers()):
            raise ValueError(f"report_to {self.report_to} needs the package: pip install {self.report_to}")

    def _check_numbers(self) -> None:
        counts = ("iterations", "tasks_per_iteration", "max_rounds", "epochs", "mini_batches", "micro_batch_tokens")
        _require(
            self, *counts, "batch_size", "eval_tasks", "eval_every", "checkpoint_every", "max_step_tokens", least=1
        )
        _require(self, "group_size", least=2)  # a group baseline
        _require(self, "demonstrations", least=4)  # one batch of the imitation
        _require(self, "dry_run", "threads", "seed", "zeta", "kl_coef", "overlong_buffer", least=0)
        _require(self, "slip", "clip_low", least=0, most=1)
        _require(self, "clip_high", least=0)
        _require(self, "k", "k_future")
        _require(self, "learning_rate", above=0, most=1)
        _require(self, "temperature", "max_grad_norm", above=0)
        _require(self, "max_tokens", above=self.max_step_tokens)
        _require(self, "overlong_buffer", most=self.max_tokens)
        _require(self, "mini_batches", most=self.tasks_per_iteration * self.group_size)

    @property
    def held_out(self) -> str:
        """The split of the evaluations."""
        return self.eval_split or held_out_splits(self.env)[0]

    def is_evaluated(self, iteration: int) -> bool:
        """Whether the policy is evaluated after this iteration; 0 is before training."""
        return iteration % self.eval_every == 0 or iteration == self.iterations


# ---------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class EvalConfig(WorldConfig):
    """Evaluate one player, or compare two on the same tasks."""

    policy: str = field(default="oracle", metadata={"help": "checkpoint folder, hub id, oracle or random"})
    compare: list[str] = field(default_factory=list, metadata={"help": "two players A B, paired; replaces --policy"})
    split: list[str] = field(
        default_factory=list, metadata={"help": "splits of the environment's tasks; default: all held-out ones"}
    )
    tasks: int = field(default=256, metadata={"help": "tasks of each split, the first; at most all that there are"})
    batch_size: int = field(default=128, metadata={"help": "environments that are played at once, at most"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling; 0 is greedy"})
    max_step_tokens: int = field(default=64, metadata={"help": "tokens of one response"})
    max_tokens: int = field(default=2048, metadata={"help": "tokens of an episode"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    json: str = field(default="", metadata={"help": "file for the result as JSON; it is also the last line printed"})
    episodes: str = field(default="", metadata={"help": "file for the episodes as JSON lines"})

    def __post_init__(self):
        make_config(self.env, self.settings)
        for split in self.split:
            require_split(self.env, split)
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare takes two players, got {len(self.compare)}")
        if self.compare and self.compare[0] == self.compare[1]:
            raise ValueError(f"compare takes two different players, got {self.compare[0]} twice")
        _require(self, "tasks", "batch_size", "max_step_tokens", least=1)
        _require(self, "max_tokens", above=self.max_step_tokens)
        _require(self, "temperature", "seed", "threads", least=0)


def parse_eval_config(argv: Sequence[str] | None = None) -> EvalConfig:
    """The command line of eval.py. What is not given comes from the checkpoint's own configuration, so that eval.py
    repeats the evaluation of its training run; world, settings and split do not if another --env is given."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--policy", default="")
    given.add_argument("--compare", nargs="*", default=[])
    given.add_argument("--env")
    known, _ = given.parse_known_args(argv)
    words = sys.argv[1:] if argv is None else argv
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    defaults: dict = {}
    for player in known.compare or [known.policy]:
        own = evaluation_of(player)
        if known.env and own and known.env != own["env"]:
            own = {name: own[name] for name in ("seed", "temperature", "max_step_tokens", "max_tokens")}
        for name, value in own.items():
            if name not in typed and defaults.setdefault(name, value) != value:
                given.error(f"the two players were trained with {name} {defaults[name]} and {value}; say --{name}")
    return parse_config(EvalConfig, argv, defaults)


def evaluation_of(player: str) -> dict:
    """How its training run evaluated a player, as values of EvalConfig; empty if it is no folder of a run.

    They stand beside a checkpoint's weights, and for the policy that a run started from in the run's own folder.
    """
    same = [*WorldConfig.__dataclass_fields__, "seed", "temperature", "max_step_tokens", "max_tokens", "batch_size"]
    for file in (Path(player) / "state.json", Path(player).parent / "config.json"):
        try:
            saved = json.loads(file.read_text())["config"]
            split = saved["eval_split"] or held_out_splits(saved["env"])[0]
            own = {name: saved[name] for name in same if name in saved}
            return own | {"split": [split], "tasks": saved["eval_tasks"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}
