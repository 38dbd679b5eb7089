"""Success without chance: final policies of the study again, on the tasks of the study, at temperature 0.

    python -m paper.greedy --runs out/study/house/dapo/14 out/study/house/dapo_empg/14
    python -m paper.greedy --first --runs out/study/house/dapo/14       the policy that the run began with

A policy that stayed uncertain loses by sampling. A method that loses by that alone loses nothing here. A row for each
run goes to docs/results/greedy.jsonl; rows that are there are not made again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from transformers.hf_argparser import HfArg

from config import TrainConfig, parse_config
from engine.checkpoint import checkpoints
from engine.files import require_writable_file
from engine.record import revision
from eval import evaluate, first_tasks, load_player, open_envs, parse_eval_config, summarize
from paper.rows import RESULTS, Row, add_row, read_file
from paper.study import TASKS, WORLDS, machine, rounded

FIRST = "first"  # in the place of a method: the warm start, which all methods of a seed share


@dataclass(frozen=True)
class GreedyConfig:
    """Evaluate finished runs of the study again, at temperature 0."""

    runs: list[str] = HfArg(help="folders of runs, .../WORLD/METHOD/SEED")
    first: bool = HfArg(default=False, help="the policies that the runs started from; METHOD is then first")
    results: str = HfArg(default=str(RESULTS / "greedy.jsonl"), help="file of the rows")

    def __post_init__(self):
        for run in self.runs:
            if not checkpoints(Path(run)) or Path(run).parts[-3:-2] not in [(world,) for world in TASKS]:
                raise ValueError(f"runs must be finished runs of the study, .../WORLD/METHOD/SEED, got {run}")


def greedy_row(run: Path, first: bool) -> Row:
    """The first or final policy of a run, at temperature 0, on the first tasks of the world's first held-out split."""
    world, method, seed = run.parts[-3:]
    policy = str(run / "first_policy" if first else checkpoints(run)[-1])
    sources = parse_config(TrainConfig, WORLDS[world].flags.split()).env_args
    words = ["--policy", policy, "--temperature", "0", "--tasks", str(TASKS[world]), "--env_args", *sources]
    config = parse_eval_config(words if sources else words[:-1])
    torch.set_num_threads(config.threads)
    envs = open_envs(config, config.batch_size, config.split)
    tasks = first_tasks(envs[0], config.env, *config.split, config.tasks)
    accelerator = Accelerator()
    played = evaluate(load_player(policy, config, accelerator), envs, tasks, config, accelerator)
    return rounded(
        {
            "world": world,
            "method": FIRST if first else method,
            "seed": int(seed),
            "commit": revision(),
            "command": f"python -m paper.greedy {'--first ' * first}--runs out/study/{world}/{method}/{seed}",
            "machine": machine(),
            "eval": {config.split[0]: summarize(played)},
        }
    )


def main() -> None:
    greedy = parse_config(GreedyConfig)
    transformers.utils.logging.disable_progress_bar()
    file = Path(greedy.results)
    require_writable_file(file)
    there = {(row["world"], row["method"], str(row["seed"]), row["machine"]) for row in read_file(file)}
    for run in map(Path, greedy.runs):
        world, method, seed = run.parts[-3:]
        if (world, FIRST if greedy.first else method, seed, machine()) not in there:
            row = greedy_row(run, greedy.first)
            add_row(file, row)


if __name__ == "__main__":
    main()
