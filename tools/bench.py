"""Where the time and the memory go: rollout against the usual generate loop, EMPG's share, log-prob and entropy.

    python bench.py                 everything, a few minutes on two cores; prints a table and writes bench.json
    python bench.py --only memory   one part of rollout, empg, trl, memory, head, worlds
    python bench.py --only sampler  a model of 34 million random weights: the sampler against the generate loop
    python bench.py --only gpu      Qwen2.5-1.5B's shape on a GPU: the same, and shares of the machine's limits
    python bench.py --only trl      an iteration against TRL's own (pip install -r requirements-trl.txt)
    python bench.py --only worlds --data games    ALFWorld too, on the games in that folder

Speeds are compared as ratios of medians, the two sides measured in turns: absolute numbers depend on the machine.
"""

import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

import torch
from accelerate import Accelerator
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from config import TrainConfig, parse_config
from empg import group_advantages, modulate, spread, step_entropy, token_logp_and_entropy
from engine.scorer import ScoringHead
from envs import ENVIRONMENTS, make_envs
from episode import Task, collate
from eval import start_ranks
from groups import train_task
from tools.bench_rollout import (
    LARGE,
    SMALL,
    clock,
    measure_gpu,
    measure_rollout,
    measure_sampler,
    our_rollout,
    random_policy,
)
from train import first_policy, learn, prepare
from update import Learner


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory."""

    only: Literal["all", "rollout", "empg", "trl", "memory", "head", "worlds", "sampler", "gpu"] = field(
        default="all", metadata={"help": "part to measure; all: without sampler and gpu"}
    )
    policy: str = field(default="tiny", metadata={"help": "folder or hub id; tiny: the warm start of the default run"})
    environments: int = field(default=64, metadata={"help": "House worlds that are played at once"})
    repeats: int = field(default=5, metadata={"help": "measurements of each side, of which the median counts"})
    tokens: int = field(default=4096, metadata={"help": "memory: tokens"})
    head_tokens: int = field(default=8192, metadata={"help": "head: tokens; plain code takes 2 MiB for each"})
    vocabulary: int = field(default=151_936, metadata={"help": "memory, head: size of the vocabulary; that of Qwen2.5"})
    threads: int = field(default=0, metadata={"help": "rollout, empg and trl: threads on the CPU; 0: all cores"})
    worlds: int = field(default=128, metadata={"help": "worlds: environments that take turns in one process"})
    data: str = field(default="", metadata={"help": "worlds: folder of ALFWorld games; default: ALFWorld is left out"})
    out: str = field(default="bench.json", metadata={"help": "file for the result"})


# ------------------------------------------------------------------------------------------------------------ EMPG


def measure_empg(bench: BenchConfig, config: TrainConfig, learner: Learner) -> dict:
    """What EMPG adds to an iteration: advantages, step entropy, modulation and spreading, over sampling plus update."""
    envs, policy = make_envs(config.env, config.settings, bench.environments), learner.policy
    number = config.tasks_per_iteration * config.group_size
    tasks = [Task(config.env, "train", seed // config.group_size) for seed in range(number)]
    sample, modulation, learning = [], [], []
    for repeat in range(bench.repeats + 1):
        seconds, episodes = clock(lambda seed=repeat: our_rollout(policy, envs, tasks, config, seed))
        batch = collate(episodes, policy.device)

        def token_advantage(batch=batch):
            advantage = group_advantages(batch.reward, config.group_size)
            return spread(modulate(advantage, *step_entropy(batch.token_entropy, batch.step_ids)), batch.step_ids)

        sample.append(seconds)
        modulation.append(clock(token_advantage)[0])
        learning.append(clock(lambda b=batch, i=repeat: learn(config, learner, b, i))[0])
    sample, modulation, learning = (statistics.median(values[1:]) for values in (sample, modulation, learning))
    return {
        "sampling, seconds": sample,
        "advantage and modulation, seconds": modulation,
        "advantage, modulation and update, seconds": learning,
        "EMPG's share of an iteration": modulation / (sample + learning),
    }


# ------------------------------------------------------------------------------------------------------------- TRL


class InTurns(TrainerCallback):
    """Measures every iteration of TRL's trainer, and calls `ours` after each. `steps`: optimizer steps of one."""

    def __init__(self, steps: int, ours: Callable[[int], None]):
        self.steps, self.ours, self.seconds = steps, ours, []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.seconds.append(time.perf_counter() - self.start)
            self.ours(state.global_step // self.steps - 1)


def measure_trl(bench: BenchConfig, config: TrainConfig, accelerator: Accelerator, make_trainer: Callable) -> dict:
    """An iteration of TRL's own GRPOTrainer and agent loop against one of ours, which also modulates.

    Both play the same tasks with the same limits, and update with the same batches. The learning rate is next to
    nothing, so both sample from the same policy all the time and their episodes are of the same length.

    make_trainer: as in examples/trl_empg.py, but for the plain GRPOTrainer.
    """
    config = replace(config, iterations=bench.repeats + 1, learning_rate=1e-12)
    number = config.tasks_per_iteration * config.group_size
    envs = make_envs(config.env, config.settings, number)
    learner, _ = prepare(config, accelerator, envs[0])
    ours, tokens = [], []

    def our_iteration(iteration: int) -> None:
        first = iteration * config.tasks_per_iteration
        tasks = [train_task(config, None, first + episode // config.group_size) for episode in range(number)]

        def work() -> int:
            batch = collate(our_rollout(learner.policy, envs, tasks, config, iteration), learner.policy.device)
            learn(config, learner, batch, iteration)
            return int(batch.mask.sum())

        seconds, sampled = clock(work)
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


# ---------------------------------------------------------------------------------------------------------- memory


def plain_logp_and_entropy(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers from the full vocabulary at once."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def measure_one(name: str, backward: bool, tokens: int, vocabulary: int) -> tuple[float, float]:
    """Peak memory beyond the logits in bytes, and seconds, of one version; to be called in a process of its own."""
    function = {"chunked": token_logp_and_entropy, "plain": plain_logp_and_entropy}[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(1, tokens, vocabulary, device=device, requires_grad=backward)
    ids = torch.randint(vocabulary, (1, tokens), device=device)

    def work():
        logp, _ = function(logits, ids)
        if backward:
            logp.sum().backward()

    function(logits[:, :8], ids[:, :8])  # what only a first call loads is not counted
    before = peak_memory(device)
    seconds, _ = clock(work)
    return peak_memory(device) - before, seconds


def peak_memory(device: str) -> float:
    """Bytes, the most so far of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(bench: BenchConfig) -> dict:
    """Forward alone, and forward with backward; in the latter both versions also write the gradient of the logits."""
    result, spawn = {}, multiprocessing.get_context("spawn")
    for label, backward in (("forward", False), ("forward and backward", True)):
        runs = {"chunked": [], "plain": []}
        for _ in range(min(3, bench.repeats)):
            for name, measured in runs.items():
                with spawn.Pool(1) as pool:
                    measured.append(pool.apply(measure_one, (name, backward, bench.tokens, bench.vocabulary)))
        memory, seconds = (
            {name: statistics.median(run[i] for run in measured) for name, measured in runs.items()} for i in (0, 1)
        )
        for name in runs:
            result[f"{label}, {name}: MiB beyond the logits"] = memory[name] / 2**20
        gradient = bench.tokens * bench.vocabulary * 4 if backward else 0
        result[f"{label}: memory, chunked over plain"] = memory["chunked"] / memory["plain"]
        if backward:
            without = {name: max(0, value - gradient) for name, value in memory.items()}
            result[f"{label}, beyond logits and their gradient: chunked over plain"] = (
                without["chunked"] / without["plain"]
            )
        result[f"{label}: time, chunked over plain"] = seconds["chunked"] / seconds["plain"]
    return result


# ------------------------------------------------------------------------------------------------------------ head


def head_once(name: str, tokens: int, vocabulary: int, size: int = 1536) -> tuple[float, float]:
    """Peak memory beyond weight and hidden states in bytes, and seconds, of the head's forward and backward pass; to be
    called in a process of its own. size: of a hidden state; Qwen2.5-1.5B's by default."""
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

    work(8, 8)  # what only a first call loads is not counted
    return work(tokens, vocabulary)


def measure_head(bench: BenchConfig, config: TrainConfig, learner: Learner) -> dict:
    """lm_head in an update: rows that it computes on House episodes, and memory and time against plain code."""
    envs, rows = make_envs(config.env, config.settings, bench.environments), []
    tasks = [Task(config.env, "train", seed // config.group_size) for seed in range(bench.environments)]
    batch = collate(our_rollout(learner.policy, envs, tasks, config, 0), learner.policy.device)
    learner.policy.model.lm_head.register_forward_hook(lambda head, args, output: rows.append(len(args[0])))
    learn(config, learner, batch, 0)
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


def measure_worlds(bench: BenchConfig) -> dict:
    """Median time of a step of the random player in every world, and the memory of many that take turns."""
    result = {}
    for name in ENVIRONMENTS:
        if name == "alfworld" and not bench.data:
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        envs, rng, seconds = make_envs(name, [f"data={bench.data}"] * (name == "alfworld"), bench.worlds), Random(0), []
        size = envs[0].size("train") or bench.worlds
        for number, env in enumerate(envs):
            env.reset("train", number % size)
        for number in range(10 * bench.worlds):
            env = envs[number % bench.worlds]
            took, answer = clock(lambda env=env: env.step(rng.choice(env.admissible())))  # noqa: B023
            seconds.append(took)
            if answer[2] or answer[3]:
                env.reset("train", number % size)
        result[f"{name}: ms a step, median"] = 1000 * statistics.median(seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        result[f"{name}: MiB of {bench.worlds} environments"] = memory / 1024
    return result


# ---------------------------------------------------------------------------------------------------------- output


def main() -> None:
    bench = parse_config(BenchConfig)
    config = TrainConfig(policy=bench.policy, out="out/bench")
    result = {}
    if bench.only in ("all", "worlds"):  # first: memory is counted from its highest point so far
        result |= measure_worlds(bench)
    if bench.only in ("all", "rollout", "empg", "trl", "head"):
        accelerator = start_ranks(bench.threads)
        learner, _ = prepare(config, accelerator, make_envs(config.env, config.settings, 1)[0])
        if bench.only in ("all", "rollout"):
            result |= measure_rollout(config, learner.policy, bench.environments, bench.repeats)
        if bench.only in ("all", "empg"):
            result |= measure_empg(bench, config, learner)
        if bench.only in ("all", "head"):
            result |= measure_head(bench, config, learner)
        if bench.only in ("all", "trl"):
            if importlib.util.find_spec("trl") is None:
                print("the comparison with TRL is left out; it needs: pip install -r requirements-trl.txt")
            else:
                from examples.trl_empg import GRPOTrainer, make_trainer

                result |= measure_trl(bench, config, accelerator, partial(make_trainer, trainer=GRPOTrainer))
    if bench.only == "sampler":
        torch.set_num_threads(bench.threads or os.cpu_count())
        result |= measure_sampler(SMALL, random_policy(SMALL, "cpu"), bench.repeats)
    if bench.only == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit("--only gpu needs a GPU, and torch sees none here")
        result |= measure_gpu(LARGE, bench.repeats)
    if bench.only in ("all", "memory"):
        result |= measure_memory(bench)
    for name, value in result.items():
        print(f"{name:75} {value:12.4g}")
    Path(bench.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
