"""The study: GRPO and DAPO, with EMPG, with each of its parts and without, on the same seeds, warm starts and tasks.

    python -m paper.study --world house                                     every row of House that is not there yet
    python -m paper.study --world house --methods grpo grpo_empg --seeds 0 1 2
    python -m paper.study --world house --methods grpo --seeds 3 --results /tmp/again.jsonl       one row again

A row is one training run and what was measured of it, a line in docs/results/WORLD.jsonl. Rows that are there are not
run again, so a study that was stopped is resumed by the same command. As many runs are made at once as there are cores,
each with one thread. Rows repeat exactly on one CPU type. A seed half done on another type is run again here, all
methods. docs/protocol.md says what was fixed before the first row.
"""

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from config import TrainConfig, parse_config
from empg import Modulation
from paper.beyond import CREDIT
from paper.measure import measure
from paper.rows import MAIN, METHODS, STUDY_GAMES, WORLDS, Row, read_file
from paper.value import TrueCredit
from train import assign_credit, train

ROOT = Path(__file__).parents[1]

GAMES = {"train": 500, "valid_seen": 300, "valid_unseen": 300}

TASKS = dict.fromkeys(WORLDS, 1000)  # of each held-out split, if there are so many
CONTINUATIONS = 4  # of the ceiling, from before every step


@dataclass(frozen=True)
class StudyConfig:
    """Run the study, or a part of it."""

    world: str = HfArg(help=f"world: {', '.join(WORLDS)}")
    methods: list[str] = HfArg(default_factory=lambda: list(MAIN), help=f"methods: {', '.join(METHODS)}")
    seeds: list[int] = HfArg(default_factory=lambda: list(range(20)), help="seeds of weights, tasks and sampling")
    results: str = HfArg(default="", help="file of the rows; default: docs/results/WORLD.jsonl")
    out: str = HfArg(default="out/study", help="folder of the runs")
    jobs: int = HfArg(default=0, help="runs in parallel; 0: one for each core")

    def __post_init__(self):
        if self.world not in WORLDS:
            raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {self.world}")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}")
        if self.jobs < 0 or any(seed < 0 for seed in self.seeds):
            raise ValueError("jobs and seeds must be at least 0")

    @property
    def file(self) -> Path:
        return Path(self.results or ROOT / "docs" / "results" / f"{self.world}.jsonl")


def write_games(folder: Path) -> None:
    """The games of the study's ALFWorld, unless they are there."""
    from worlds import alfworld_games as writer  # the engine is an extra package

    for split, games in GAMES.items():
        if not (folder / writer.LAYOUT / split).exists():
            writer.write_games(writer.GamesConfig(str(folder), split, games, receptacles=5, objects=5))


def train_flags(world: str, method: str, seed: int) -> list[str]:
    """The flags of train.py for a row."""
    return shlex.split(f"{WORLDS[world].flags} --seed {seed} --threads 1 {METHODS[method].flags}")


def credit_of(method: str) -> Callable[..., Modulation]:
    """The credit assignment of a method."""
    return TrueCredit(CONTINUATIONS) if method == "grpo_true" else CREDIT.get(method, assign_credit)


def run_row(world: str, method: str, seed: int, out: str) -> dict:
    """Train and measure, in a process of its own whose output goes to a file."""
    run = Path(out) / world / method / str(seed)
    shutil.rmtree(run, ignore_errors=True)  # what is left of a run that was stopped
    run.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    flags = [*train_flags(world, method, seed), "--eval_tasks", "8", "--checkpoint_every", "1000", "--out", str(run)]
    started = time.perf_counter()
    with (run / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        config = parse_config(TrainConfig, flags)
        train(config, credit_of(method))
        trained = time.perf_counter()
        measured = measure(config, TASKS[world])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row = {
        "world": world,
        "method": method,
        "seed": seed,
        "commit": json.loads((run / "config.json").read_text())["git"],
        "command": f"python -m paper.study --world {world} --methods {method} --seeds {seed}",
        "train": shlex.join(["train.py", *flags[:-2]]),
        "machine": machine(),
        "seconds": {
            "train": round(trained - started, 1),
            "measure": round(time.perf_counter() - trained, 1),
        },
        # success of all episodes sampled in an iteration, on training tasks; in House every task is new
        "curve": [round(row["group/success"], 4) for row in metrics if "group/success" in row],
        "entropy": [round(row["entropy/mean"], 4) for row in metrics if "entropy/mean" in row],
        "zero_std": [round(row["group/zero_std_frac"], 4) for row in metrics if "group/zero_std_frac" in row],
        "episodes": sum(row.get("group/tasks_used", 0) * config.group_size for row in metrics),
    } | measured
    return rounded(row)


def rounded(row: dict) -> dict:
    """The row with every number rounded to four decimals."""
    return json.loads(json.dumps(row), parse_float=lambda number: round(float(number), 4))


def missing(rows: list[Row], methods: list[str], seeds: list[int], here: str) -> list[tuple[str, int]]:
    """The methods and seeds to run on a machine of the kind `here`, so that one kind has every method of each seed."""
    there: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        there.setdefault((row["seed"], row["machine"]), set()).add(row["method"])
    finished = {seed for (seed, _), done in there.items() if done.issuperset(methods)}
    open_seeds = [seed for seed in seeds if seed not in finished]
    return [(method, seed) for seed in open_seeds for method in methods if method not in there.get((seed, here), ())]


def machine() -> str:
    """The kind of machine: rows are the same on machines of one kind."""
    info = Path("/proc/cpuinfo")  # on Linux
    cpu = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in cpu if "model name" in line]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.machine()}, {names[0] if names else platform.processor()}, {versions}, 1 thread"


def main() -> None:
    study = parse_config(StudyConfig)
    study.file.parent.mkdir(parents=True, exist_ok=True)
    wanted = missing(read_file(study.file), study.methods, study.seeds, machine())
    if study.world == "alfworld" and wanted:
        write_games(Path(STUDY_GAMES))
    failed = []
    os.environ["TQDM_DISABLE"] = "1"  # in the processes below; this one has read it already
    # A process for each run, so that nothing of one run is left for the next.
    pool = ProcessPoolExecutor(
        study.jobs or os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    with pool, tqdm(total=len(wanted), desc=study.world, unit="run") as progress:
        rows = {pool.submit(run_row, study.world, method, seed, study.out): (method, seed) for method, seed in wanted}
        for future in as_completed(rows):
            progress.update()
            if error := future.exception():
                failed.append(rows[future])
                tqdm.write(f"{rows[future]} failed: {error}; see {study.out}", file=sys.stderr)
                continue
            with study.file.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
