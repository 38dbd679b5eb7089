"""Speed: how near sampling and updating come to a machine's limits, an iteration by part, the gain of the sampler.

    python -m tools.bench                    all of it; also writes out/bench.json
    python -m tools.bench --only sampler     the sampler against the usual `generate` loop alone

On a GPU the models have the shapes of SmolLM2-135M and Qwen2.5-1.5B, in bf16, and all should fit four minutes on an
H200. On a CPU they have 3 and 34 million weights, and all takes a quarter of an hour on two cores. Weights are random.
Each figure is printed as soon as it is there. The slow `generate` loop comes last. Speeds depend on the machine, so
what counts are shares and ratios.
"""

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from transformers.hf_argparser import HfArg

import rollout
from config import MOST_THREADS, TrainConfig, parse_config
from engine.files import replace_file, require_writable_file
from engine.ranks import COMPUTE, start_ranks, weights_for_sampling
from engine.sampler import Sampler
from engine.terminal import start_script
from envs import Env, make_envs, parse_response
from episode import Episode, Task, collate
from policy import Policy
from tools.cost import Shape, at_most, memory, shape_of
from tools.limits import measure_decode, measure_update
from tools.loads import LOADS, Load, clock, play, random_learner, random_policy, step_advantage, timed
from tools.speed import Machine, Work, seconds
from update import Learner, update


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory."""

    only: Literal["all", "iterations", "sampler"] = HfArg(
        default="all", help="iterations, with the limits of the machine; or the sampler"
    )
    repeats: int = HfArg(default=3, help="measurements of each limit; their median counts")
    threads: int = HfArg(default=0, help="threads on the CPU; 0: all cores")
    out: str = HfArg(default="out/bench.json", help="file for the result")

    def __post_init__(self):
        if not 1 <= self.repeats <= 20 or not 0 <= self.threads <= MOST_THREADS:
            raise ValueError(f"repeats must be 1 to 20, threads 0 to {MOST_THREADS}")


# ---------------------------------------------------------------------------------------------------- an iteration


def measure_iterations(load: Load, learner: Learner, shape: Shape, machine: Machine) -> Iterator[dict[str, float]]:
    """Seconds of two iterations in the House, by part, beside the formula, and peak memory beside its formula.

    On a GPU the second iteration finds its graphs captured. "sample" includes "read", "capture" and "environments".
    """
    policy, config, cuda = learner.policy, load.config, learner.policy.device.type == "cuda"
    policy.memory = None  # of the measurements before
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    envs = make_envs("house", [f"max_steps={load.turns}"], load.trained)
    for iteration in (1, 2):
        captured = policy.capture_seconds
        with (
            weights_for_sampling(learner.accelerator, policy.model),
            timed(Sampler, "_read") as read,
            timed(rollout, "_reset") as reset,
            timed(rollout, "_act") as act,
        ):
            sampling, episodes = clock(play, load, policy, envs)
        batch = collate(episodes, policy.device)
        batch.reward[::2] = 1.0  # a group whose rewards are equal has nothing to learn
        updating, _ = clock(update, config, learner, batch, step_advantage(config, batch), iteration)
        parts = {"sample": sampling, "read": sum(read), "capture": policy.capture_seconds - captured}
        parts |= {"environments": sum(reset + act), "update": updating, "all": sampling + updating}
        yield {f"iteration {iteration} of {load.trained} episodes, seconds: {part}": s for part, s in parts.items()}
    formula = seconds(shape, work_of(episodes, config.group_size), machine, config)
    yield {f"iteration by the formula, seconds: {part}": s for part, s in formula.items() if s}
    yield {"iteration, formula over measured": sum(formula.values()) / (parts["all"] - parts["environments"])}
    if cuda:
        terms = memory(config, shape, 1, machine.compute)
        yield {
            "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
            "peak memory, free parts of blocks and of graphs included, GB": torch.cuda.max_memory_reserved() / 1e9,
            "peak memory by the formula, GB": at_most(config, terms) / 1e9,
        }


def work_of(episodes: list[Episode], group: int) -> Work:
    """The work of these episodes, with mean numbers of tokens."""
    steps = [step for episode in episodes for step in episode.steps]
    sampled = sum(step.end - step.start for step in steps)
    prompts = sum(episode.steps[0].start for episode in episodes)
    inserted = sum(len(episode.ids) for episode in episodes) - prompts - sampled
    between, number = max(1, len(steps) - len(episodes)), len(episodes)
    return Work(number, group, prompts / number, len(steps) / number, sampled / len(steps), inserted / between)


# ------------------------------------------------------------------------------------------------------ the sampler


@torch.inference_mode()
def generate_loop(policy: Policy, envs: list[Env], tasks: list[Task], config: TrainConfig) -> Iterator[int]:
    """The loop that most people write: `generate` on the left-padded whole history at every turn, on the same tasks and
    with the same limits; finished episodes leave the batch here too. Yields the sampled tokens of each turn."""
    prompts = [env.reset(task.split, task.seed)[0] for env, task in zip(envs, tasks, strict=True)]
    histories = policy.prompt(envs[0].instructions, prompts)
    live, pad = list(range(len(tasks))), policy.tokenizer.pad_token_id
    while live:
        width = max(len(histories[i]) for i in live)
        padding = [width - len(histories[i]) for i in live]
        ids = torch.tensor([[pad] * n + histories[i] for n, i in zip(padding, live, strict=True)], device=policy.device)
        mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=mask.long().to(policy.device),
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.max_step_tokens,
            eos_token_id=list(policy.stop_ids),
            pad_token_id=pad,
        )[:, width:].tolist()
        ends = [next((n for n, i in enumerate(row, 1) if i in policy.stop_ids), len(row)) for row in output]
        responses = [row[:end] for row, end in zip(output, ends, strict=True)]
        yield sum(map(len, responses))
        going, room = [], config.max_tokens - config.max_step_tokens
        for i, ids in zip(live, responses, strict=True):
            observation, _, terminated, truncated, _ = envs[i].step(parse_response(*policy.read(ids))[1])
            histories[i] += ids + policy.between([observation])[0]
            if not (terminated or truncated or len(histories[i]) > room):
                going.append(i)
        live = going


def measure_sampler(load: Load, policy: Policy) -> Iterator[dict[str, float]]:
    """Sampled tokens a second of the sampler and of the `generate` loop, on the same House tasks in groups.

    The loop takes minutes, so its figures come again after each turn. Its later turns are the slower ones: the ratio is
    larger in the end.
    """
    envs = make_envs("house", [f"max_steps={load.turns}"], load.episodes)
    policy.memory = None  # graphs are captured within the time
    took, episodes = clock(play, load, policy, envs)
    steps = [step for episode in episodes for step in episode.steps]
    ours = sum(step.end - step.start for step in steps) / took
    yield {"turns an episode": len(steps) / len(episodes), "sampler, sampled tokens a second": ours}
    sampled, start = 0, time.perf_counter()
    for of_turn in generate_loop(policy, envs, [episode.task for episode in episodes], load.config):
        sampled += of_turn
        theirs = sampled / (time.perf_counter() - start)
        yield {"generate loop, sampled tokens a second": theirs, "sampler over generate loop": ours / theirs}


# ---------------------------------------------------------------------------------------------------------- output


def measure(
    bench: BenchConfig, loads: dict[str, Load], accelerator: Accelerator
) -> Iterator[tuple[str, dict[str, float]]]:
    """Model and figures of the parts that are asked for, as soon as each is there."""
    compute = 4 if accelerator.mixed_precision == "no" else 2
    for name, load in loads.items() if bench.only != "sampler" else ():
        learner = random_learner(accelerator, load)
        shape = shape_of(learner.policy.model)
        with weights_for_sampling(accelerator, learner.policy.model):
            figures, bandwidth, layer = measure_decode(load, learner.policy, shape, compute, bench.repeats)
        yield name, figures
        figures, flop = measure_update(load, learner, shape, layer, bench.repeats)
        yield name, figures
        machine = Machine(layer, flop, bandwidth, compute=compute)
        yield from ((name, figures) for figures in measure_iterations(load, learner, shape, machine))
        del learner
        accelerator.free_memory()  # it keeps what it has prepared
    if bench.only != "iterations":
        name, load = list(loads.items())[-1]
        # In plain bf16, because autocast would slow the loop: its cache would be in float32.
        policy = random_policy(load, accelerator.device, COMPUTE.get(accelerator.mixed_precision, torch.float32))
        yield from ((name, figures) for figures in measure_sampler(load, policy))


def main() -> None:
    bench, result = parse_config(BenchConfig), {}
    require_writable_file(Path(bench.out))
    accelerator = start_ranks(bench.threads, mixed_precision="bf16" if torch.cuda.is_available() else "no")
    for model, figures in measure(bench, LOADS[accelerator.device.type], accelerator):
        named = {f"{model}, {name}": value for name, value in figures.items()}
        result |= named
        replace_file(Path(bench.out), json.dumps(result, indent=1) + "\n")
        for name, value in named.items():
            print(f"{name:75} {value:12.4g}", flush=True)


if __name__ == "__main__":
    start_script()
    main()
