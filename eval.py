"""How good is a player: success with its interval, steps, invalid actions, per task type; two players compared.

    python eval.py --policy out/house/checkpoint-000080
    python eval.py --policy oracle --env house --split eval
    python eval.py --policy random --env search
    python eval.py --compare out/house/first_policy out/house/checkpoint-000080

A player is a checkpoint folder, a hub id, or one of the scripted players `oracle` and `random`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy import stats

from config import EvalConfig, parse_config
from envs import PLAYERS, Env, held_out_splits, make_envs
from episode import Episode, Task, save_episodes
from policy import Policy, load_policy
from rollout import play, rollout

# ------------------------------------------------------------------------------------------------------- measuring


def first_tasks(env: Env, name: str, split: str, number: int) -> list[Task]:
    """The first `number` tasks of a split, each once; all of them if there are fewer."""
    size = env.size(split)
    return [Task(name, split, seed) for seed in range(number if size is None else min(number, size))]


def play_tasks(player: str | Policy, envs: list[Env], tasks: list[Task], config: EvalConfig) -> list[Episode]:
    """An episode of every task, by a scripted player (by name) or by a policy."""
    if isinstance(player, str):
        return play(envs[0], tasks, PLAYERS[player], config.seed, desc=player)
    seeds = [(config.seed, task.seed) for task in tasks]
    limits = {"max_step_tokens": config.max_step_tokens, "max_tokens": config.max_tokens}
    return rollout(player, envs, tasks, seeds, temperature=config.temperature, desc="evaluate", **limits)


def wilson_interval(successes: int, number: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) if there are no trials."""
    if number == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarize(episodes: list[Episode]) -> dict:
    """Success (share) with its interval, mean steps and share of invalid actions; the same again per task type.

    "errors" counts the episodes that an environment broke off.  "score" (100 x mean of WebShop's reward) and "f1" (of
    the answers, 0 to 1) are there where the environment reports them.
    """
    by_type: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_type.setdefault(episode.info["task_type"], []).append(episode)
    types = {name: _summary(by_type[name]) for name in sorted(by_type)}
    return _summary(episodes) | {"task_types": types}


def _summary(episodes: list[Episode]) -> dict:
    successes, steps = sum(e.success for e in episodes), [step for e in episodes for step in e.steps]
    low, high = wilson_interval(successes, len(episodes))
    number = max(1, len(episodes))
    scales = {"score": 100, "f1": 1}
    reported = {name: scale for name, scale in scales.items() if any(name in e.info for e in episodes)}
    return {
        "episodes": len(episodes),
        "success": successes / number,
        "success_low": low,
        "success_high": high,
        "steps": len(steps) / number,
        "invalid": sum(not step.valid for step in steps) / max(1, len(steps)),
        "errors": sum("error" in e.info for e in episodes),
    } | {name: scale * sum(e.info.get(name, 0) for e in episodes) / number for name, scale in reported.items()}


def columns(episodes: list[Episode]) -> dict[str, list[Episode]]:
    """The episodes of each split and, if there are several, of all; as in the paper's Table 2 where some splits are out
    of distribution ("ood_..."): the one that is not is called ID, those that are come together again as OOD."""
    by_split: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_split.setdefault(episode.task.split, []).append(episode)
    if len(by_split) == 1:
        return by_split
    outside = [split for split in by_split if split.startswith("ood")]
    if len(outside) == len(by_split) - 1:
        by_split = {split if split in outside else "ID": part for split, part in by_split.items()}
    if outside:
        by_split["OOD"] = [episode for episode in episodes if episode.task.split in outside]
    return by_split | {"overall": episodes}


def compare(a: list[Episode], b: list[Episode]) -> dict:
    """b against a on the same tasks: difference in success, its 95 % bootstrap interval over tasks, McNemar's p.

    The interval of fewer than two tasks is (-1, 1).  Raises ValueError unless the tasks are the same in the same order.
    """
    if [e.task for e in a] != [e.task for e in b]:
        raise ValueError("the two players did not play the same tasks")
    difference = np.array([y.success - x.success for x, y in zip(a, b, strict=True)], dtype=float)
    low, high = -1.0, 1.0
    if len(difference) > 1:
        low, high = stats.bootstrap((difference,), np.mean, method="percentile", rng=0).confidence_interval
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    numbers = {"difference": float(difference.mean()), "low": float(low), "high": float(high)}
    return numbers | {"gained": gained, "lost": lost, "p": float(p)}


# ---------------------------------------------------------------------------------------------------------- output


# What stands below the task types, where it was measured: key of a summary -> name, factor, decimals.
MEASURES = {
    "score": ("score", 1, 1),
    "f1": ("F1, %", 100, 1),
    "steps": ("steps", 1, 1),
    "invalid": ("invalid actions, %", 100, 1),
    "errors": ("errors", 1, 0),
}


def table(summaries: dict[str, dict]) -> str:
    """Summaries side by side as text: a column for each name, a row for each task type, for all, for each measure."""
    types = sorted({name for summary in summaries.values() for name in summary["task_types"]})
    rows = {name: [_cell(summary["task_types"].get(name)) for summary in summaries.values()] for name in types}
    rows["all"] = [_cell(summary) for summary in summaries.values()]
    for key, (name, factor, decimals) in MEASURES.items():
        values = [summary.get(key) for summary in summaries.values()]
        if any(value is not None for value in values):
            rows[name] = ["" if value is None else f"{factor * value:5.{decimals}f}" for value in values]
    width = max(map(len, ["task type", *rows]))
    line = lambda name, cells: " | ".join([f"{name:{width}}", *(f"{cell:24}" for cell in cells)]).rstrip()  # noqa: E731
    head = line("", [f"{name[-24:]:^24}" for name in summaries])
    units = line("task type", ["success %, 95 %        n"] * len(summaries))
    return "\n".join([head, units, "-" * len(units), *(line(name, cells) for name, cells in rows.items())])


def _cell(summary: dict | None) -> str:
    if summary is None:
        return ""
    interval = f"[{100 * summary['success_low']:.1f}, {100 * summary['success_high']:.1f}]"
    return f"{100 * summary['success']:5.1f} {interval:>13} {summary['episodes']:4d}"


def open_player(name: str) -> str | Policy:
    """A scripted player's name, or the policy of that folder or hub id on the fastest device. Ends the program with one
    line if there is none."""
    if name in PLAYERS:
        return name
    try:
        policy = load_policy(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no policy at {name!r}: {str(error).splitlines()[0]}") from error
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def main() -> None:
    config = parse_config(EvalConfig)
    transformers.utils.logging.disable_progress_bar()
    names = config.compare or [config.policy]
    players = [open_player(name) for name in names]
    at_once = config.batch_size if any(isinstance(player, Policy) for player in players) else 1
    envs = make_envs(config.env, config.settings, at_once)
    try:
        splits = config.split or [split for split in held_out_splits(config.env) if envs[0].size(split) != 0]
        tasks = [task for split in splits for task in first_tasks(envs[0], config.env, split, config.tasks)]
    except ValueError as error:  # a split without data
        raise SystemExit(str(error)) from error
    played = {name: play_tasks(player, envs, tasks, config) for name, player in zip(names, players, strict=True)}
    print(f"{config.env}, {len(tasks)} tasks of {', '.join(splits)}, temperature {config.temperature}")
    result = report(played)
    if config.compare:
        result["paired"] = report_pair(*played.items())
    if config.episodes:
        save_episodes(Path(config.episodes), [episode for episodes in played.values() for episode in episodes])
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def report(played: dict[str, list[Episode]]) -> dict:
    """Print each player's table and return the summaries by player, "splits" within them if there are several."""
    result = {name: summarize(episodes) for name, episodes in played.items()}
    parts = {name: {split: summarize(part) for split, part in columns(e).items()} for name, e in played.items()}
    if all(len(part) == 1 for part in parts.values()):
        print(f"\n{table(result)}")
        return result
    for name, part in parts.items():
        print(f"\n{name}\n{table(part)}")
        result[name]["splits"] = part
    return result


def report_pair(first: tuple[str, list[Episode]], second: tuple[str, list[Episode]]) -> dict:
    """Print and return how two (name, episodes) compare, over all tasks and, if there are several, in each split."""
    parts = zip(*(columns(episodes).values() for _, episodes in (first, second)), strict=True)
    pairs = {split: compare(a, b) for split, (a, b) in zip(columns(first[1]), parts, strict=True)}
    print(f"\n{second[0]} minus {first[0]}:")
    for split, pair in pairs.items():
        difference, low, high = (f"{100 * pair[key]:+.1f}" for key in ("difference", "low", "high"))
        counts = f"{pair['gained']} tasks gained, {pair['lost']} lost, McNemar p = {pair['p']:.2g}"
        print(f"{split}: {difference} points, 95 % [{low}, {high}], {counts}")
    return pairs["overall"] | {"splits": pairs} if len(pairs) > 1 else next(iter(pairs.values()))


if __name__ == "__main__":
    sys.exit(main())
