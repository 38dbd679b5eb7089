"""The formula of cost.py held against measured iterations, of two models whose sizes are ten times apart.

    python bench_scale.py                            one process
    torchrun --nproc_per_node 2 bench_scale.py       two, which share the episodes
    python bench_scale.py --table                    measured and computed, as markdown

A point is a whole iteration of the training code: episodes of a model with random weights in the House, which last as
long as they may, and an update. Each is a line in docs/scaling.jsonl. Three constants are fitted to the two shortest
points of one process. All other points are predictions.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy.optimize import least_squares
from transformers import AutoModelForCausalLM, Qwen2Config

from bench import clock
from config import TrainConfig, parse_config
from cost import Machine, Work, seconds, shape_of
from envs import careless_player, make_envs
from episode import Task, collate
from eval import start_ranks
from policy import Policy
from record import revision
from rollout import dialogue, play_scripted, rollout
from tiny import tiny_tokenizer
from train import learn
from update import Learner, make_learner

MODELS = {
    "3M": {"hidden_size": 192, "num_hidden_layers": 5, "intermediate_size": 704, "num_attention_heads": 6},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1792, "num_attention_heads": 8},
}
VOCABULARY = 4096
EPISODES, TURNS, RESPONSE = (8, 32), (3, 9), 16  # of an iteration; of an episode; tokens of a response
FITTED = (EPISODES[0], TURNS[0])
FILE = Path(__file__).parent / "docs" / "scaling.jsonl"


@dataclass(frozen=True)
class ScaleConfig:
    """Measure iterations, or compare them with the formula."""

    repeats: int = field(default=3, metadata={"help": "measurements of a point, of which the median counts"})
    table: bool = field(default=False, metadata={"help": "measure nothing, print the table"})
    file: str = field(default=str(FILE), metadata={"help": "of the measured points"})


def model_config(name: str) -> Qwen2Config:
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": VOCABULARY}
    return Qwen2Config(**MODELS[name], **sizes, max_position_embeddings=4096)


def settings(episodes: int) -> TrainConfig:
    return TrainConfig(
        tasks_per_iteration=episodes // 4, group_size=4, max_step_tokens=RESPONSE, max_tokens=2048, mini_batches=1
    )


def random_learner(accelerator: Accelerator, name: str) -> Learner:
    """A model of random weights that is ready to be trained."""
    (env,) = make_envs("house", [], 1)
    played = play_scripted(env, [Task("house", "train", seed) for seed in range(40)], careless_player(0.3), seed=0)
    tokenizer = tiny_tokenizer([dialogue(env.instructions, episode) for episode in played], 1024)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Policy(AutoModelForCausalLM.from_config(model_config(name), dtype=torch.float32), tokenizer).save(Path(folder))
        return make_learner(settings(4), accelerator, folder, folder)


def measure(accelerator: Accelerator, learner: Learner, name: str, episodes: int, turns: int, repeats: int) -> dict:
    """One point: seconds of sampling and of the update, medians, of the slowest process."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    config = settings(episodes)
    envs = make_envs("house", [f"max_steps={turns}"], episodes // ranks)
    samples, updates = [], []
    for repeat in range(repeats):
        tasks = [Task("house", "train", i // 4) for i in range(episodes)][rank::ranks]
        seeds = [(repeat, i) for i in range(episodes)][rank::ranks]
        limits = {"max_step_tokens": config.max_step_tokens, "max_tokens": config.max_tokens}
        sampling, played = clock(lambda: rollout(learner.policy, envs, tasks, seeds, **limits))  # noqa: B023
        gathered = accelerator.gather_for_metrics([played], use_gather_object=True)
        batch = collate([episode for part in gathered for episode in part], accelerator.device)
        batch.reward[::2] = 1.0  # a group whose rewards are equal has nothing to learn
        accelerator.wait_for_everyone()
        updating, _ = clock(lambda: learn(config, learner, batch, 1))  # noqa: B023
        slowest = accelerator.gather(torch.tensor([[sampling, updating]], device=accelerator.device)).amax(0)
        samples.append(float(slowest[0]))
        updates.append(float(slowest[1]))
    steps = [step for episode in played for step in episode.steps]
    sampled = sum(step.end - step.start for step in steps) / len(steps)
    inserted = sum(len(episode.ids) for episode in played) / len(steps) - sampled
    work = Work(episodes // ranks, turns, round(sampled, 2), round(inserted, 2))
    point = {"model": name, "ranks": ranks, "episodes": episodes, "turns": turns, "work": asdict(work)}
    return point | {"sample": statistics.median(samples), "update": statistics.median(updates), "commit": revision()}


# ------------------------------------------------------------------------------------------------- against the formula


def computed(point: dict, machine: Machine) -> tuple[float, float]:
    """Seconds of sampling and of the update, as the formula has them."""
    shape, work = shape_of(model_config(point["model"])), Work(**point["work"])
    parts = seconds(shape, work, machine, settings(point["episodes"]), point["ranks"])
    return parts["decode"] + parts["read"], parts["update"] + parts["communicate"]


def fit(points: list[dict]) -> Machine:
    """The constants with which the formula gives these points."""

    def error(logs: np.ndarray) -> list[float]:
        machine = Machine(*np.exp(logs))
        pairs = [(computed(point, machine), (point["sample"], point["update"])) for point in points]
        return [float(np.log(a / b)) for formula, measured in pairs for a, b in zip(formula, measured, strict=True)]

    return Machine(*np.exp(least_squares(error, np.log([1e-4, 1e10, 3e10])).x).tolist())


def table(points: list[dict]) -> str:
    """Every point, and what the formula says of it."""
    fitted = [point for point in points if point["ranks"] == 1 and (point["episodes"], point["turns"]) == FITTED]
    machine = fit(fitted)
    lines = [
        f"{machine.layer * 1e6:.0f} µs a layer, {machine.decode / 1e9:.1f} GFLOP/s while decoding, "
        f"{machine.update / 1e9:.1f} GFLOP/s in long sequences",
        "",
        "| model | processes | episodes | turns | sampling, s | formula | update, s | formula | formula / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = [point[name] for name in ("model", "ranks", "episodes", "turns")]
        sampling, update = computed(point, machine)
        ratio = (sampling + update) / (point["sample"] + point["update"])
        cells += [f"{x:.2f}" for x in (point["sample"], sampling, point["update"], update)]
        lines.append(f"| {' | '.join(map(str, cells))} | {'fitted' if point in fitted else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def main() -> None:
    scale = parse_config(ScaleConfig)
    file = Path(scale.file)
    if not scale.table:
        accelerator = start_ranks(threads=1)
        for name in MODELS:
            learner = random_learner(accelerator, name)
            for episodes, turns in product(EPISODES, TURNS):
                point = measure(accelerator, learner, name, episodes, turns, scale.repeats)
                if accelerator.is_main_process:
                    with file.open("a") as lines:
                        lines.write(json.dumps(point) + "\n")
        accelerator.end_training()
        if not accelerator.is_main_process:
            return
    print(table([json.loads(line) for line in file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
