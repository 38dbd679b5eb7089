"""Every flag of train.py and eval.py, a line each, in groups as `--help` shows them.

Making a configuration checks its values and reads no file: whether data are there is found out when a run begins.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NoReturn, TypeVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from empg import AGGREGATIONS
from envs import ENVIRONMENTS, held_out_splits, make_config, require_split

Config = TypeVar("Config")
MOST_SEED, MOST_THREADS = 2**63 - 1, 4096

# The defaults that an algorithm gives to the flags marked *. Each of them can be set on its own.
ALGORITHMS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence", "dynamic_sampling": False}
    | {"overlong_buffer": 0},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "dynamic_sampling": True}
    | {"overlong_buffer": 128},
}

# What a policy needs: the defaults of the flags marked +, each of which can be set on its own.
# - The tiny model starts from nothing and learns at high rates. A pretrained one loses what it knows at them:
#   SmolLM2-135M fell from 75 to 0 % in two iterations at 4e-4, and gained 11 points at 1e-5. From 1.5 billion
#   parameters on the usual rate is 1e-6 (runs/llm.sh).
# - The tiny model repeats the player's short sentences. A pretrained one may write longer ones, so it has 128 tokens
#   for a response. Some chat models read 2,048 tokens only, so an episode has no more.
# - The tiny model must imitate. A pretrained one can: 64 demonstrations of the coin world took SmolLM2 from 0 to 84 %
#   of 64 tasks. It solved fewer after two passes, and fewer still after two at 3e-4.
POLICIES = {
    "tiny": {"learning_rate": 4e-4, "max_step_tokens": 32, "max_tokens": 1024}
    | {"demonstrations": 2400, "imitation_rate": 4e-3, "imitation_passes": 1},
    "pretrained": {"learning_rate": 1e-5, "max_step_tokens": 128, "max_tokens": 2048}
    | {"demonstrations": 0, "imitation_rate": 1e-4, "imitation_passes": 1},
}


def _both(name: str) -> str:
    """Both defaults of a flag, for its help text."""
    return f"[{POLICIES['tiny'][name]:g} tiny, {POLICIES['pretrained'][name]:g} pretrained]"


# ------------------------------------------------------------------------------------------------- flags of train.py


@dataclass(frozen=True)
class World:
    _argument_group_name = "world"
    env: str = HfArg(default="house", help=f"world: {', '.join(ENVIRONMENTS)}")
    env_args: list[str] = HfArg(default_factory=list, help="settings of the world, name=value")
    example: bool = HfArg(default=False, help="add a faultless episode to the instructions, for a model that saw none")


@dataclass(frozen=True)
class Run:
    _argument_group_name = "run"
    policy: str = HfArg(default="tiny", help="folder or hub id of a causal LM, or tiny: sets the flags marked +")
    out: str | None = HfArg(default=None, help="folder of the run; default: out/WORLD")
    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --out")
    seed: int = HfArg(default=0, help="seed of weights, tasks and sampling")
    iterations: int = HfArg(default=60, help="training iterations")
    threads: int = HfArg(default=0, help="CPU threads of a process; 0: OMP_NUM_THREADS, or cores / processes")
    checkpoint_every: int = HfArg(default=20, help="iterations between checkpoints")
    report_to: str = HfArg(default="none", help=f"tracker beside metrics.jsonl: {', '.join(LOGGER_TYPE_TO_CLASS)}")


@dataclass(frozen=True)
class Method:
    _argument_group_name = "method"
    algorithm: str = HfArg(default="grpo", help=f"{' or '.join(ALGORITHMS)}: sets the flags marked *")
    empg: bool = HfArg(default=True, help="modulate the advantage by step entropy")
    k: float = HfArg(default=1.0, help="sharpness of g(H), dimensionless; 0 turns g off; below 0 reverses it")
    k_future: float = HfArg(default=1.0, help="sharpness of f(H), dimensionless")
    zeta: float = HfArg(default=0.1, help="weight of f(H), in units of advantage; 0 turns f off")
    clip_low: float | None = HfArg(default=None, help="* lower clip width: ratio >= 1 - clip_low [0.2]")
    clip_high: float | None = HfArg(default=None, help="* upper clip width [0.2 in GRPO, 0.28 in DAPO]")
    aggregation: str | None = HfArg(default=None, help="* average of the loss: sequence [GRPO] or token [DAPO]")
    dynamic_sampling: bool | None = HfArg(default=None, help="* train only on groups that differ in success [DAPO]")
    overlong_buffer: int | None = HfArg(default=None, help="* penalised tokens before max_tokens [DAPO: 128, else 0]")
    kl_coef: float = HfArg(default=0.0, help="weight of the KL penalty (k3) to the first policy; 0 loads no reference")


@dataclass(frozen=True)
class Sampling:
    _argument_group_name = "sampling"
    tasks_per_iteration: int = HfArg(default=8, help="tasks, thus groups, of an iteration, over all ranks")
    group_size: int = HfArg(default=8, help="episodes per task, G")
    temperature: float = HfArg(default=1.0, help="sampling temperature, in training and evaluation")
    max_step_tokens: int | None = HfArg(default=None, help=f"+ most tokens of one response {_both('max_step_tokens')}")
    max_tokens: int | None = HfArg(default=None, help=f"+ most tokens of an episode {_both('max_tokens')}")
    batch_size: int = HfArg(default=128, help="most environments that are played at once, per rank")


@dataclass(frozen=True)
class Update:
    _argument_group_name = "update"
    learning_rate: float | None = HfArg(default=None, help=f"+ learning rate of AdamW {_both('learning_rate')}")
    epochs: int = HfArg(default=1, help="passes over the episodes of an iteration")
    mini_batches: int = HfArg(default=2, help="optimizer steps of a pass")
    micro_batch_tokens: int = HfArg(default=8192, help="most tokens of a forward pass, with padding, per rank")
    fsdp: bool = HfArg(default=False, help="divide weights, gradients and optimizer among the processes (FSDP2)")
    gradient_checkpointing: bool = HfArg(default=False, help="compute activations twice to save memory")


@dataclass(frozen=True)
class ColdStart:
    _argument_group_name = "cold start: the policy imitates before it is trained"
    demonstrations: int | None = HfArg(default=None, help=f"+ episodes that it imitates {_both('demonstrations')}")
    slip: float = HfArg(default=0.4, help="share of the careless player's steps that are not the oracle's")
    imitation_rate: float | None = HfArg(default=None, help=f"+ peak learning rate of that {_both('imitation_rate')}")
    imitation_passes: int | None = HfArg(default=None, help=f"+ passes over them {_both('imitation_passes')}")
    cache: str = HfArg(default="out/warm_starts", help="folder where imitated policies are kept")


@dataclass(frozen=True)
class Evaluation:
    _argument_group_name = "evaluation"
    eval_split: str = HfArg(default="", help="split of the held-out tasks; default: the first of them")
    eval_tasks: int = HfArg(default=256, help="held-out tasks, the first of the split")
    eval_every: int = HfArg(default=30, help="iterations between evaluations")


class Limits:
    @property
    def limits(self) -> dict[str, float]:
        """Temperature and limits in tokens, as `rollout` takes them."""
        return {name: getattr(self, name) for name in ("temperature", "max_step_tokens", "max_tokens")}


@dataclass(frozen=True)
class TrainConfig(Evaluation, ColdStart, Update, Sampling, Method, Run, World, Limits):
    """Train a ReAct agent with GRPO or DAPO, optionally modulated by EMPG."""

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be {' or '.join(ALGORITHMS)}, got {self.algorithm}")
        resolved = ALGORITHMS[self.algorithm] | POLICIES[self.policy_kind] | {"out": f"out/{self.env}"}
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # once, here: the rest of the run sees values only
        self._check_numbers()
        make_config(self.env, self.env_args)
        require_split(self.env, self.held_out)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be {' or '.join(AGGREGATIONS)}, got {self.aggregation}")
        if self.report_to not in ("none", *LOGGER_TYPE_TO_CLASS):
            raise ValueError(
                f"report_to must be none or one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {self.report_to}"
            )
        if self.report_to != "none" and self.report_to not in map(str, get_available_trackers()):
            raise ValueError(f"report_to {self.report_to} needs the package: pip install {self.report_to}")

    def _check_numbers(self) -> None:
        counts = ("iterations", "tasks_per_iteration", "epochs", "mini_batches", "micro_batch_tokens", "batch_size")
        _require(self, *counts, "eval_tasks", "eval_every", "checkpoint_every", "max_step_tokens", least=1)
        _require(self, "group_size", least=2)  # a group baseline
        if self.demonstrations or self.policy_kind == "tiny":  # without any the tiny model has no tokenizer
            _require(self, "demonstrations", least=4)  # one batch of the imitation
        _require(self, "imitation_passes", least=1)
        _require(self, "seed", least=0, most=MOST_SEED)
        _require(self, "threads", least=0, most=MOST_THREADS)
        _require(self, "zeta", "kl_coef", "overlong_buffer", "clip_high", least=0)
        _require(self, "slip", "clip_low", least=0, most=1)
        _require(self, "k", "k_future")
        _require(self, "learning_rate", "imitation_rate", above=0, most=1)
        _require(self, "temperature", above=0)
        _require(self, "max_tokens", above=self.max_step_tokens)
        _require(self, "overlong_buffer", most=self.max_tokens)
        _require(self, "mini_batches", most=self.tasks_per_iteration * self.group_size)

    @property
    def policy_kind(self) -> str:
        """The key of POLICIES. A folder counts as pretrained, whatever it holds."""
        return "tiny" if self.policy == "tiny" else "pretrained"

    @property
    def held_out(self) -> str:
        """The split of the evaluations."""
        return self.eval_split or held_out_splits(self.env)[0]

    def is_evaluated(self, iteration: int) -> bool:
        """Whether the policy is evaluated after this iteration; 0 is before training."""
        return iteration % self.eval_every == 0 or iteration == self.iterations


# -------------------------------------------------------------------------------------------------- flags of eval.py


@dataclass(frozen=True)
class Play:
    _argument_group_name = "evaluation"
    policy: str = HfArg(default="oracle", help="checkpoint folder, hub id, oracle or random")
    compare: list[str] = HfArg(default_factory=list, help="two players A B, paired; replaces --policy")
    split: list[str] = HfArg(default_factory=list, help="splits of the world's tasks; default: all held-out ones")
    tasks: int = HfArg(default=256, help="tasks of each split, the first; at most all that there are")
    batch_size: int = HfArg(default=128, help="most environments that are played at once")
    temperature: float = HfArg(default=1.0, help="sampling temperature; 0 is greedy")
    max_step_tokens: int = HfArg(default=POLICIES["pretrained"]["max_step_tokens"], help="most tokens of one response")
    max_tokens: int = HfArg(default=POLICIES["pretrained"]["max_tokens"], help="most tokens of an episode")
    seed: int = HfArg(default=0, help="seed of sampling")
    threads: int = HfArg(default=0, help="CPU threads of a process; 0: OMP_NUM_THREADS, or cores / processes")
    json: str = HfArg(default="", help="file for the result as JSON; it is also the last line printed")
    episodes: str = HfArg(default="", help="file for the episodes as JSON lines")


@dataclass(frozen=True)
class EvalConfig(Play, World, Limits):
    """Evaluate one player, or compare two on the same tasks."""

    def __post_init__(self):
        make_config(self.env, self.env_args)
        for split in self.split:
            require_split(self.env, split)
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare takes two players, got {len(self.compare)}")
        if self.compare and self.compare[0] == self.compare[1]:
            raise ValueError(f"compare takes two different players, got {self.compare[0]} twice")
        _require(self, "tasks", "batch_size", "max_step_tokens", least=1)
        _require(self, "max_tokens", above=self.max_step_tokens)
        _require(self, "temperature", least=0)
        _require(self, "seed", least=0, most=MOST_SEED)
        _require(self, "threads", least=0, most=MOST_THREADS)


# ----------------------------------------------------------------------------------------------------------- parsing


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, defaults: dict | None = None) -> Config:
    """The command line as a config. An unknown flag or a bad value ends the program with one line, status 2.

    defaults: values that take the place of the class's own where a flag is not given.
    """
    parser = _parser(config_class)
    parser.set_defaults(**(defaults or {}))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        return config_class(**{name: value for group in groups for name, value in vars(group).items()})
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        parser.error(str(error))


def given_flags(config_class: type, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags that the command line gives, with their values."""
    parser = _parser(config_class)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args(argv)[0])


def _parser(config_class: type) -> HfArgumentParser:
    """A configuration class is made of groups of flags, or is one itself."""
    groups = [base for base in config_class.__mro__[:0:-1] if is_dataclass(base)] or [config_class]
    usage = "%(prog)s [flags]; --help lists them"
    return HfArgumentParser(groups, description=config_class.__doc__, usage=usage, allow_abbrev=False)


def fail(message: str) -> NoReturn:
    """End the program as for a bad value of a flag: one line, status 2."""
    print(f"{sys.argv[0]}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _require(config, *names: str, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> None:
    """Raises ValueError naming the first of these fields that is not finite or out of bounds."""
    bounds = [(above, "above"), (least, "at least"), (most, "at most")]
    words = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound)) or "finite"
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise ValueError(f"{name} must be {words}, got {value}")
