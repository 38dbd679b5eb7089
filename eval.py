"""How good is a player: success with its interval, steps, invalid actions, per task type; two players compared.

    python eval.py --policy out/house/checkpoint-000060                            the number that training printed
    python eval.py --policy random --env search                                    every held-out split
    python eval.py --compare out/house/first_policy out/house/checkpoint-000060    paired, on the same tasks
    torchrun --nproc_per_node 2 eval.py --policy out/house/checkpoint-000060       two processes share the tasks

A player is a checkpoint folder, a hub id, or one of the scripted players `oracle` and `random`. A checkpoint is
evaluated as during its training: same tasks, limits and random numbers, unless a flag says otherwise. Sources of the
world (folders, files, servers, data sets) are not taken from a checkpoint: --env_args names them again.
"""

if __name__ == "__main__":
    from engine.terminal import start_script

    start_script()

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers
from accelerate import Accelerator
from scipy import stats

from config import EvalConfig, TrainConfig, fail, given_flags, parse_config
from engine.checkpoint import evaluation_of, world_settings
from engine.files import replace_file, replacing, require_undamaged, require_writable_file
from engine.ranks import explain_out_of_memory, play_over_ranks, start_ranks, weights_for_sampling
from engine.record import precision_of
from engine.sampler_check import require_exact_sampling
from engine.world_errors import require_steps
from envs import PLAYERS, Env, example, held_out_splits, make_envs
from episode import Episode, Task, save_episodes
from policy import Policy, load_policy
from rollout import play_scripted, rollout

# --------------------------------------------------------------------------------------------------------- playing


def open_envs(config: EvalConfig | TrainConfig, number: int, splits: list[str]) -> list[Env]:
    """`number` environments with tasks in the splits. Ends the program if data or packages are missing."""
    envs = make_envs(config.env, config.env_args, number, splits)
    if config.example:
        instructions = f"{envs[0].instructions}\n\n{example(envs[0])}"
        for env in envs:
            env.instructions = instructions
    return envs


def first_tasks(env: Env, name: str, split: str, number: int) -> list[Task]:
    """The first `number` tasks of a split, each once; all of them if there are fewer."""
    size = env.size(split)
    return [Task(name, split, seed) for seed in range(number if size is None else min(number, size))]


@explain_out_of_memory("loading the policy", "take a smaller model")
def load_player(path: str, config: EvalConfig | TrainConfig, accelerator: Accelerator) -> Policy:
    """The policy of a folder or a hub id, on this device. Raises PolicyError if it cannot be loaded or sampled from."""
    if accelerator.is_main_process:
        require_undamaged(Path(path))
    policy = load_policy(path)
    policy.model.to(accelerator.device)
    with weights_for_sampling(accelerator, policy.model):
        require_exact_sampling(policy, config.max_tokens)
    return policy


@explain_out_of_memory("sampling", "lower --batch_size")
def evaluate(
    player: str | Policy, envs: list[Env], tasks: list[Task], config: EvalConfig | TrainConfig, accelerator: Accelerator
) -> list[Episode]:
    """An episode of every task, in the order of the tasks, by a scripted player (by name) or by a policy.

    config: seed, temperature and limits. Every rank plays its share of the tasks and gets all episodes.
    """

    def play(mine: list[Task]) -> list[Episode]:
        if isinstance(player, str):
            return play_scripted(envs[0], mine, PLAYERS[player], config.seed, desc=player)
        seeds = [("evaluate", config.seed, task.split, task.seed) for task in mine]
        return rollout(player, envs, mine, seeds, **config.limits, desc="evaluate")

    with nullcontext() if isinstance(player, str) else weights_for_sampling(accelerator, player.model):
        return require_steps(play_over_ranks(accelerator, tasks, play))


# ------------------------------------------------------------------------------------------------------- measuring


def wilson_interval(successes: int, number: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) if there are no trials."""
    if number == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarize(episodes: list[Episode]) -> dict:
    """Success (share) with its interval, mean steps and share of invalid actions; the same again per task type.

    "errors" counts the episodes that an environment aborted.  "score" (100 x mean of WebShop's reward) and "f1" (of
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
        "errors": sum(e.aborted for e in episodes),
    } | {name: scale * sum(e.info.get(name, 0) for e in episodes) / number for name, scale in reported.items()}


def by_split(episodes: list[Episode]) -> dict[str, list[Episode]]:
    """The episodes of each split and, if there are several splits, of all of them as "overall".

    Splits named "ood_..." are out of distribution and are also pooled as "OOD". The only split beside them, if there is
    only one, is labelled "ID", as in the paper's Table 2.
    """
    parts: dict[str, list[Episode]] = {}
    for episode in episodes:
        parts.setdefault(episode.task.split, []).append(episode)
    if len(parts) == 1:
        return parts
    outside = [split for split in parts if split.startswith("ood")]
    if len(outside) == len(parts) - 1:
        parts = {split if split in outside else "ID": part for split, part in parts.items()}
    if outside:
        parts["OOD"] = [episode for episode in episodes if episode.task.split in outside]
    return parts | {"overall": episodes}


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


# The rows below the task types: key of a summary -> name, factor, decimals. A row is left out if nothing reports it.
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

    def line(name: str, cells: list[str]) -> str:
        return " | ".join([f"{name:{width}}", *(f"{cell:24}" for cell in cells)]).rstrip()

    head = line("", [f"{name[-24:]:^24}" for name in summaries])
    units = line("task type", ["success %, 95 %        n"] * len(summaries))
    return "\n".join([head, units, "-" * len(units), *(line(name, cells) for name, cells in rows.items())])


def _cell(summary: dict | None) -> str:
    if summary is None:
        return ""
    interval = f"[{100 * summary['success_low']:.1f}, {100 * summary['success_high']:.1f}]"
    return f"{100 * summary['success']:5.1f} {interval:>13} {summary['episodes']:4d}"


def percent(summary: dict) -> str:
    """Success with its interval, such as "93.0 % (89.2 to 95.5)"."""
    mean, low, high = (f"{100 * summary[name]:.1f}" for name in ("success", "success_low", "success_high"))
    return f"{mean} % ({low} to {high})"


def parse_eval_config(argv: Sequence[str] | None = None) -> EvalConfig:
    """The command line of eval.py. What is not given comes from the checkpoint's own configuration, so that eval.py
    repeats the evaluation of its training run; world, settings and split do not if another --env is given. A source,
    such as a folder of data, comes from the command line alone, see docs/scaling.md."""
    given, defaults = given_flags(EvalConfig, argv), {}
    typed = given.pop("env_args", [])
    for player in given.get("compare") or [given.get("policy", EvalConfig.policy)]:
        own = evaluation_of(player, strict="env" not in given)
        if own and given.get("env", own["env"]) != own["env"]:
            own = {name: own[name] for name in ("seed", "temperature", "max_step_tokens", "max_tokens")}
        elif own:
            own["env_args"] = world_settings(player, own["env"], own["env_args"], typed)
        for name, value in own.items():
            if name not in given and defaults.setdefault(name, value) != value:
                fail(f"the two players were trained with {name} {defaults[name]} and {value}; say --{name}")
    config = parse_config(EvalConfig, argv, defaults)
    try:  # those of the player and those that were typed; the parser saw the latter alone
        return replace(config, env_args=defaults.get("env_args", config.env_args))
    except ValueError as error:
        fail(str(error))


def main() -> None:
    config = parse_eval_config()
    transformers.utils.logging.disable_progress_bar()
    precision = precision_of(config.compare or [config.policy])
    accelerator = start_ranks(config.threads, mixed_precision=precision)
    run(config, accelerator)
    accelerator.end_training()


def run(config: EvalConfig, accelerator: Accelerator) -> None:
    """Play, and let the main process write and print the result."""
    for file in filter(None, (config.episodes, config.json)):
        require_writable_file(Path(file))
    names = config.compare or [config.policy]
    players = [name if name in PLAYERS else load_player(name, config, accelerator) for name in names]
    envs = open_envs(config, config.batch_size if set(names) - set(PLAYERS) else 1, config.split)
    splits = config.split or [split for split in held_out_splits(config.env) if envs[0].size(split) != 0]
    tasks = [task for split in splits for task in first_tasks(envs[0], config.env, split, config.tasks)]
    if not tasks:
        raise SystemExit(f"{config.env} has no held-out tasks")
    played = [evaluate(player, envs, tasks, config, accelerator) for player in players]
    if not accelerator.is_main_process:
        return
    result, text = report(dict(zip(names, played, strict=True)))
    if config.compare:
        result["paired"], pairs = report_pair(*zip(names, played, strict=True))
        text += pairs
    try:
        if config.episodes:
            with replacing(Path(config.episodes)) as file:
                save_episodes(file, [episode for episodes in played for episode in episodes])
        if config.json:
            replace_file(Path(config.json), json.dumps(result, indent=1) + "\n")
    finally:  # a full disk does not cost what is printed
        print(f"{config.env}, {len(tasks)} tasks of {', '.join(splits)}, temperature {config.temperature}")
        print(f"{text}{json.dumps(result)}")


def report(played: dict[str, list[Episode]]) -> tuple[dict, str]:
    """The summaries by player, with "splits" within them if there are several, and each player's table as text."""
    result = {name: summarize(episodes) for name, episodes in played.items()}
    parts = {name: {split: summarize(part) for split, part in by_split(e).items()} for name, e in played.items()}
    if all(len(part) == 1 for part in parts.values()):
        return result, f"\n{table(result)}\n"
    for name, part in parts.items():
        result[name]["splits"] = part
    return result, "".join(f"\n{name}\n{table(part)}\n" for name, part in parts.items())


def report_pair(first: tuple[str, list[Episode]], second: tuple[str, list[Episode]]) -> tuple[dict, str]:
    """How two (name, episodes) compare, over all tasks and, if there are several, in each split; and that as text."""
    parts = zip(*(by_split(episodes).values() for _, episodes in (first, second)), strict=True)
    pairs = {split: compare(a, b) for split, (a, b) in zip(by_split(first[1]), parts, strict=True)}
    text = f"\n{second[0]} minus {first[0]}:\n"
    for split, pair in pairs.items():
        difference, low, high = (f"{100 * pair[key]:+.1f}" for key in ("difference", "low", "high"))
        counts = f"{pair['gained']} tasks gained, {pair['lost']} lost, McNemar p = {pair['p']:.2g}"
        text += f"{split}: {difference} points, 95 % [{low}, {high}], {counts}\n"
    whole = pairs["overall"] | {"splits": pairs} if len(pairs) > 1 else next(iter(pairs.values()))
    return whole, text


if __name__ == "__main__":
    main()
