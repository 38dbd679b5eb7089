"""Speed and memory: rollout against the usual `generate` loop, EMPG's share, TRL's trainer, log-probs, the worlds.

    python -m tools.bench                    everything, a few minutes on two cores; also writes bench.json
    python -m tools.bench --only rollout     one part of rollout, empg, trl, head, worlds
    python -m tools.bench --only sampler     34 million random weights: the sampler against the `generate` loop
    python -m tools.bench --only gpu         shapes of SmolLM2-135M and Qwen2.5-1.5B on a GPU, four minutes
    python -m tools.bench --only trl         an iteration against TRL's own (pip install -r requirements-trl.txt)
    python -m tools.bench --only worlds --data games    ALFWorld too, on the games in that folder

Speeds depend on the machine, so two sides are compared by the ratio of their medians. They are measured in turns.
"""

import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

import torch
from accelerate import Accelerator
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from config import TrainConfig, parse_config
from engine.files import replace_file, require_writable_file
from engine.ranks import start_ranks
from engine.scorer import ScoringHead
from envs import ENVIRONMENTS, Env, make_envs
from episode import Task, collate
from imitate import first_policy
from rollout import train_task
from tools.bench_gpu import LARGE, MIDDLE, measure_gpu
from tools.bench_rollout import (
    SMALL,
    clock,
    measure_rollout,
    measure_sampler,
    our_rollout,
    random_policy,
    step_advantage,
)
from train import prepare
from update import Learner, update


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory."""

    only: Literal["all", "rollout", "empg", "trl", "head", "worlds", "sampler", "gpu"] = field(
        default="all", metadata={"help": "part to measure; all: without sampler and gpu"}
    )
    policy: str = field(default="tiny", metadata={"help": "folder or hub id; tiny: the warm start of the default run"})
    environments: int = field(default=64, metadata={"help": "House environments that are played in parallel"})
    repeats: int = field(default=5, metadata={"help": "measurements of each side; their median counts"})
    head_tokens: int = field(default=8192, metadata={"help": "head: tokens; plain code takes 2 MiB for each"})
    vocabulary: int = field(default=151_936, metadata={"help": "head: size of the vocabulary; that of Qwen2.5"})
    threads: int = field(default=0, metadata={"help": "threads on the CPU; 0: all cores"})
    worlds: int = field(default=128, metadata={"help": "worlds: environments that take turns in one process"})
    data: str = field(default="", metadata={"help": "worlds: folder of ALFWorld games; default: ALFWorld is left out"})
    out: str = field(default="bench.json", metadata={"help": "file for the result"})


# ------------------------------------------------------------------------------------------------------------ EMPG


def measure_empg(bench: BenchConfig, config: TrainConfig, learner: Learner) -> dict[str, float]:
    """EMPG's share of an iteration: group advantage, step entropy and modulation against sampling and update."""
    envs = make_envs(config.env, config.env_args, bench.environments)
    number = config.tasks_per_iteration * config.group_size
    tasks = [Task(config.env, "train", episode // config.group_size) for episode in range(number)]
    seconds = {"sampling": [], "advantage and modulation": [], "update": []}
    for repeat in range(bench.repeats + 1):
        sampling, episodes = clock(our_rollout, learner.policy, envs, tasks, config, repeat)
        batch = collate(episodes, learner.policy.device)
        modulating, advantage = clock(step_advantage, config, batch)
        updating, _ = clock(update, config, learner, batch, advantage, repeat)
        for values, value in zip(seconds.values(), (sampling, modulating, updating), strict=True):
            values.append(value)
    result = {f"{name}, seconds": statistics.median(values[1:]) for name, values in seconds.items()}
    share = result["advantage and modulation, seconds"] / sum(result.values())
    return result | {"EMPG's share of an iteration": share}


# ------------------------------------------------------------------------------------------------------------- TRL


class InTurns(TrainerCallback):
    """Times every iteration of TRL's trainer, and calls `ours` after it.  steps: optimizer steps of an iteration."""

    def __init__(self, steps: int, ours: Callable[[int], None]):
        self.steps, self.ours, self.seconds = steps, ours, []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.seconds.append(time.perf_counter() - self.start)
            self.ours(state.global_step // self.steps - 1)


def measure_trl(
    bench: BenchConfig, config: TrainConfig, accelerator: Accelerator, make_trainer: Callable
) -> dict[str, float]:
    """An iteration of TRL's own GRPOTrainer and agent loop against one of ours, which also modulates.

    Both play the same tasks with the same limits, and update with batches of the same size. The learning rate is almost
    0. So both sample from the same policy all the time, and their episodes are of the same length.

    make_trainer: as in examples/trl_house.py, but for the plain GRPOTrainer.
    """
    config = replace(config, iterations=bench.repeats + 1, learning_rate=1e-12)
    number = config.tasks_per_iteration * config.group_size
    envs = make_envs(config.env, config.env_args, number)
    learner = prepare(config, accelerator, envs[0])
    ours, tokens = [], []

    def iterate(iteration: int) -> int:
        first = iteration * config.tasks_per_iteration
        numbers = [first + episode // config.group_size for episode in range(number)]
        tasks = [train_task(config.env, None, config.seed, task) for task in numbers]
        batch = collate(our_rollout(learner.policy, envs, tasks, config, iteration), learner.policy.device)
        update(config, learner, batch, step_advantage(config, batch), iteration)
        return int(batch.mask.sum())

    def our_iteration(iteration: int) -> None:
        seconds, sampled = clock(iterate, iteration)
        ours.append(seconds)
        tokens.append(sampled)

    turns = InTurns(config.mini_batches, our_iteration)
    trainer = make_trainer(config, first_policy(config, accelerator, envs[0]), callbacks=[turns])
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    sides = (turns.seconds, ours, [number * length for length in lengths], tokens)
    theirs, ours, their_tokens, tokens = (statistics.median(values[1:]) for values in sides)  # the first warms up
    return {
        "TRL, seconds an iteration": theirs,
        "ours, seconds an iteration": ours,
        "TRL, sampled tokens an iteration": their_tokens,
        "ours, sampled tokens an iteration": tokens,
        "iterations a second, ours over TRL": theirs / ours,
        "sampled tokens a second, ours over TRL": (tokens / ours) / (their_tokens / theirs),
    }


# ------------------------------------------------------------------------------------------------------------ head


def peak_memory(device: str) -> float:
    """Bytes: the most that this process took so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def head_once(name: str, tokens: int, vocabulary: int, size: int = 1536) -> tuple[float, float]:
    """Peak memory beyond weight and hidden states in bytes, and seconds, of the head's forward and backward pass.

    To be called in a new process.  name: scorer or plain.  size: width of a hidden state; Qwen2.5-1.5B's by default.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def work(tokens: int, vocabulary: int) -> tuple[float, float]:
        head = ScoringHead(size, vocabulary, bias=False, device=device, dtype=dtype)
        hidden = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
        ids = torch.randint(vocabulary, (tokens,), device=device)

        def step() -> None:
            if name == "scorer":
                logp = head(hidden, ids)
            else:
                logp = head(hidden).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            logp.sum().backward()

        before = peak_memory(device)
        seconds, _ = clock(step)
        return peak_memory(device) - before, seconds

    work(8, 8)  # the first call loads libraries, which are not counted
    return work(tokens, vocabulary)


def measure_head(bench: BenchConfig, config: TrainConfig, learner: Learner) -> dict[str, float]:
    """lm_head in an update: rows that it computes on House episodes, and memory and time against plain code."""
    envs, rows = make_envs(config.env, config.env_args, bench.environments), []
    tasks = [Task(config.env, "train", episode // config.group_size) for episode in range(bench.environments)]
    batch = collate(our_rollout(learner.policy, envs, tasks, config, 0), learner.policy.device)
    learner.policy.model.lm_head.register_forward_hook(lambda head, args, output: rows.append(len(args[0])))
    update(config, learner, batch, step_advantage(config, batch), 0)
    result = {"lm_head rows over sampled tokens": sum(rows) / int(batch.mask.sum())}
    runs = {"scorer": [], "plain": []}
    for _ in range(min(3, bench.repeats)):
        for name, measured in runs.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(head_once, (name, bench.head_tokens, bench.vocabulary)))
    for i, (what, unit) in enumerate((("memory, MiB", 2**20), ("seconds", 1))):
        for name, measured in runs.items():
            result[f"head, {name}: {what}"] = statistics.median(run[i] for run in measured) / unit
        result[f"head: {what}, scorer over plain"] = result[f"head, scorer: {what}"] / result[f"head, plain: {what}"]
    return result


# ---------------------------------------------------------------------------------------------------------- worlds


def measure_worlds(bench: BenchConfig) -> dict[str, float]:
    """Median time of a step of the random player in every world, and the memory of many environments of one process."""
    result = {}
    for name in ENVIRONMENTS:
        settings = []
        if name == "alfworld":
            if not bench.data:
                continue
            settings = [f"data={bench.data}"]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        envs, rng, seconds = make_envs(name, settings, bench.worlds), Random(0), []
        size = envs[0].size("train") or bench.worlds
        for number, env in enumerate(envs):
            env.reset("train", number % size)
        for number in range(10 * bench.worlds):
            env = envs[number % bench.worlds]
            took, (_, _, terminated, truncated, _) = clock(random_step, env, rng)
            seconds.append(took)
            if terminated or truncated:
                env.reset("train", number % size)
        result[f"{name}: ms a step, median"] = 1000 * statistics.median(seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        result[f"{name}: MiB of {bench.worlds} environments"] = memory / 1024
    return result


def random_step(env: Env, rng: Random) -> tuple:
    return env.step(rng.choice(env.admissible()))


# ---------------------------------------------------------------------------------------------------------- output


def measure(bench: BenchConfig) -> Iterator[dict[str, float]]:
    """The figures of the parts that are asked for, as soon as each is there."""
    if bench.only in ("all", "worlds"):  # first: memory is counted from its highest point so far
        yield measure_worlds(bench)
    if bench.only in ("all", "rollout", "empg", "head", "trl"):
        yield from measure_training(bench)
    if bench.only == "sampler":
        torch.set_num_threads(bench.threads or os.cpu_count())
        yield from measure_sampler(SMALL, random_policy(SMALL.shape), bench.repeats)
    if bench.only == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("--only gpu needs a GPU, and torch sees none here")
        yield from measure_gpu(MIDDLE, LARGE, bench.repeats)


def measure_training(bench: BenchConfig) -> Iterator[dict[str, float]]:
    """The parts that play and train the policy of the default run."""
    config = TrainConfig(policy=bench.policy, out="out/bench")
    accelerator = start_ranks(bench.threads)
    learner = prepare(config, accelerator, make_envs(config.env, config.env_args, 1)[0])
    if bench.only in ("all", "rollout"):
        yield measure_rollout(config, learner.policy, bench.environments, bench.repeats)
    if bench.only in ("all", "empg"):
        yield measure_empg(bench, config, learner)
    if bench.only in ("all", "head"):
        yield measure_head(bench, config, learner)
    if bench.only in ("all", "trl"):
        if importlib.util.find_spec("trl") is None:
            print("the comparison with TRL is left out; it needs: pip install -r requirements-trl.txt")
            return
        from examples.trl_house import GRPOTrainer, make_trainer

        yield measure_trl(bench, config, accelerator, partial(make_trainer, trainer=GRPOTrainer))


def main() -> None:
    bench, result = parse_config(BenchConfig), {}
    require_writable_file(Path(bench.out))
    for figures in measure(bench):
        for name, value in figures.items():
            print(f"{name:75} {value:12.4g}", flush=True)
        result |= figures
        replace_file(Path(bench.out), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
