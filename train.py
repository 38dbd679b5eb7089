"""Train a ReAct agent with GRPO or DAPO, modulated by EMPG or not, on one process or many.

    accelerate launch train.py                                       the tiny model in the House world, on a laptop
    accelerate launch train.py --no_empg --out out/grpo              the baseline under it
    accelerate launch train.py --policy Qwen/Qwen2.5-1.5B-Instruct   a real model
    accelerate launch train.py --resume                              go on where the run in --out stopped

Every rank samples its own groups; then all ranks hold all episodes, so that EMPG's statistics, the normalisers and the
metrics are those of the whole batch, computed by the same code whatever the number of ranks. Only sampling, forward and
backward are divided among them.

Differences from the papers: DAPO's length penalty counts the tokens of the whole episode, observations included.
Not covered: models whose weights do not fit on one device.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    CheckpointError,
    StopRequest,
    checkpoint_path,
    checkpoints,
    load_state,
    save_checkpoint,
    verify_checkpoint,
)
from config import TrainConfig, parse_config
from empg import (
    gradient_scale,
    group_advantages,
    modulate,
    normalize_entropy,
    soft_overlong_penalty,
    spread,
    step_entropy,
)
from envs import Env, careless_player, make_envs
from episode import Batch, Episode, Task, collate, save_episodes, transcript
from eval import first_tasks, summarize, table
from figures import draw_curves
from policy import Policy, TinyConfig, load_policy, warm_start
from rollout import dialogue, play, rollout
from update import Learner, NotFiniteError, update


def train(config: TrainConfig) -> None:
    """The whole run: prepare, iterate in eight beats, report."""
    accelerator = Accelerator(log_with=None if config.report_to == "none" else config.report_to)
    if accelerator.device.type == "cpu":  # the launcher leaves one thread to a process; share the cores instead
        torch.set_num_threads(max(1, os.cpu_count() // accelerator.num_processes))
    out, envs = Path(config.out), make_envs(config.env, config.settings, config.batch_size)
    policy, learner, state = prepare(config, accelerator, envs[0])
    record = Record(out, accelerator, config, state["iteration"])
    stop = StopRequest()
    if state["iteration"] == 0:
        state["before"] = summarize(evaluate(config, accelerator, policy, envs))
        record.metrics(0, eval_metrics(state["before"]))

    while state["iteration"] < config.iterations and not stop.requested(accelerator):
        iteration = state["iteration"] + 1

        # 1 sample episodes, groups of one task
        groups, tasks_used = sample_groups(config, accelerator, policy, envs, state["next_task"])
        state |= {"iteration": iteration, "next_task": state["next_task"] + tasks_used}
        if not groups:  # dynamic sampling found no group that differs in success: nothing to learn from
            record.metrics(iteration, {"group/tasks_used": tasks_used, "group/kept": 0})
            continue
        episodes = [episode for group in groups for episode in group]
        batch = collate(episodes, accelerator.device)  # (B, L), the episodes of all ranks
        record.lap("sample")

        # 2 score and centre within the group
        reward = batch.reward  # (B,)
        if config.algorithm == "dapo" and config.overlong_buffer:
            penalty = soft_overlong_penalty(batch.length, limit=config.max_tokens, buffer=config.overlong_buffer)
            reward = reward + penalty
        advantage = group_advantages(reward, config.group_size)  # (B,)

        # 3 old log-probs and entropy were captured while sampling; the reference's come with the loss, in beat 5
        entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)  # (B, S)

        # 4 modulate by step entropy
        if config.empg:
            step_advantage = modulate(advantage, entropy, valid, k=config.k, k_future=config.k_future, zeta=config.zeta)
        else:
            step_advantage = advantage[:, None] * valid  # (B, S)
        token_advantage = spread(step_advantage, batch.step_ids)  # (B, L)
        record.lap("modulate")

        # 5 micro-batches: loss, backward   6 clip and step
        try:
            sums = update(config, learner, batch, token_advantage, iteration)
        except NotFiniteError as error:
            where = out / f"not_finite_{iteration:06d}.jsonl"
            save_episodes(where, [episodes[row] for row in error.rows])
            raise SystemExit(f"stopped in iteration {iteration}: {error}; they are in {where}") from None
        record.lap("update")

        # 7 log
        row = episode_metrics(config, episodes, batch) | {"group/tasks_used": tasks_used, "group/kept": len(groups)}
        row |= step_metrics(config, entropy, valid, step_advantage) | update_metrics(config, sums)

        # 8 evaluate, checkpoint
        if iteration % config.eval_every == 0:
            state["after"] = summarize(evaluate(config, accelerator, policy, envs))
            row |= eval_metrics(state["after"])
            record.transcripts(iteration, episodes, step_advantage)
        record.metrics(iteration, row)
        if iteration % config.checkpoint_every == 0:
            save(config, accelerator, policy, learner, state)

    finish(config, accelerator, policy, learner, state, envs, record)


# ------------------------------------------------------------------------------------------------------- beginning


def first_policy(config: TrainConfig, accelerator: Accelerator, env: Env) -> str:
    """Folder or hub id of the policy that training starts from; the tiny one is built if it is not in the cache."""
    if config.policy != "tiny":
        return config.policy
    with accelerator.main_process_first():
        tasks = [train_task(config, env.size("train"), number) for number in range(config.demonstrations)]
        player = careless_player(config.slip)
        played = play(env, tasks, player, config.seed, desc="demonstrations")
        if broken := [episode.info["error"] for episode in played if "error" in episode.info]:
            raise SystemExit(f"{len(broken)} of {len(played)} demonstrations were broken off: {broken[0]}")
        dialogues = [dialogue(env.instructions, episode) for episode in played]
        return str(warm_start(dialogues, TinyConfig(), config.seed, Path(config.cache)))


def prepare(config: TrainConfig, accelerator: Accelerator, env: Env) -> tuple[Policy, Learner, dict]:
    """The policy, what its updates work on, and the position in the run: at the start or at the newest checkpoint."""
    saved = checkpoints(Path(config.out))
    if saved and not config.resume:
        raise SystemExit(f"{config.out} holds a run already: go on with --resume, or choose another folder with --out")
    if config.resume and not saved:
        raise SystemExit(f"there is no checkpoint in {config.out} to resume from")
    first = first_policy(config, accelerator, env)
    link = Path(config.out) / "first_policy"  # what eval.py --compare needs
    if accelerator.is_main_process and Path(first).is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(first).resolve(), target_is_directory=True)
    if config.resume:
        verify_checkpoint(saved[-1])
    try:
        policy = load_policy(str(saved[-1]) if config.resume else first)
        reference = load_policy(first).model.to(accelerator.device) if config.kl_coef else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"no policy at {first!r}: {str(error).splitlines()[0]}") from error
    # No dropout: old and new log-probs must be of the same policy. Only gradient checkpointing needs training mode.
    policy.model.train(config.gradient_checkpointing)
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(policy.model, optimizer)
    policy.model = accelerator.unwrap_model(model)
    state = {"iteration": 0, "next_task": 0, "config": asdict(config)}
    if config.resume:
        state = load_state(saved[-1], optimizer)
        require_same_run(config, state["config"])
    return policy, Learner(accelerator, model, optimizer, reference), state


def require_same_run(config: TrainConfig, saved: dict) -> None:
    """Ends the program if a flag that shapes the run differs from the checkpoint's."""
    free = {"iterations", "resume", "out", "cache", "eval_every", "checkpoint_every", "report_to", "batch_size"}
    changed = [name for name, value in asdict(config).items() if name not in free and saved.get(name) != value]
    if changed:
        flags = ", ".join(f"--{name} {saved.get(name)}" for name in changed)
        raise SystemExit(
            f"{config.out} was trained with {flags}; resume with the same, or start anew with another --out"
        )


# ------------------------------------------------------------------------------------------- 1  sampling the episodes


def train_task(config: TrainConfig, size: int | None, number: int) -> Task:
    """The run's task number `number`: a new one every time, or all of a finite split in a new order on each pass."""
    if size is None:
        return Task(config.env, "train", config.seed * 10**9 + number)
    order = np.random.default_rng([config.seed, number // size]).permutation(size)
    return Task(config.env, "train", int(order[number % size]))


def sample_round(
    config: TrainConfig, accelerator: Accelerator, policy: Policy, envs: list[Env], first: int
) -> list[list[Episode]]:
    """One group of G episodes for each of the tasks from number `first` on; every rank plays its share and gets all."""
    numbers = range(first, first + config.tasks_per_iteration)[accelerator.process_index :: accelerator.num_processes]
    size, group = envs[0].size("train"), config.group_size
    episodes = rollout(
        policy,
        envs,
        tasks=[train_task(config, size, number) for number in numbers for _ in range(group)],
        seeds=[(config.seed, number, episode) for number in numbers for episode in range(group)],
        temperature=config.temperature,
        max_step_tokens=config.max_step_tokens,
        max_tokens=config.max_tokens,
    )
    mine = [(number, episodes[i * group : (i + 1) * group]) for i, number in enumerate(numbers)]
    return [group for _, group in sorted(gather_object(mine), key=lambda pair: pair[0])]


def sample_groups(
    config: TrainConfig, accelerator: Accelerator, policy: Policy, envs: list[Env], next_task: int
) -> tuple[list[list[Episode]], int]:
    """The groups of an iteration, the same on every rank, and how many tasks were used up for them.

    GRPO keeps every group. DAPO keeps those in which some episodes succeed and some do not, and samples more until it
    has enough (dynamic sampling), at most max_rounds times; then it goes on with what it has.
    """
    if config.algorithm == "grpo":
        return sample_round(config, accelerator, policy, envs, next_task), config.tasks_per_iteration
    kept, wanted, used = [], config.tasks_per_iteration, 0
    while len(kept) < wanted and used < wanted * config.max_rounds:
        groups = sample_round(config, accelerator, policy, envs, next_task + used)
        kept += [group for group in groups if 0 < sum(episode.success for episode in group) < config.group_size]
        used += wanted
    if len(kept) < wanted and accelerator.is_main_process:
        tqdm.write(f"dynamic sampling: of {used} groups only {len(kept)} differ in success; going on with these")
    return kept[:wanted], used


# --------------------------------------------------------------------------------------------- 7  what is written down


class Record:
    """The files of a run, written by the main process: config, metrics, timings, transcripts."""

    def __init__(self, out: Path, accelerator: Accelerator, config: TrainConfig, iteration: int):
        self.out, self.accelerator, self.started = out, accelerator, time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.progress = tqdm(
            total=config.iterations,
            initial=iteration,
            desc="train",
            unit="iteration",
            disable=not accelerator.is_main_process,
        )
        accelerator.init_trackers("empg", asdict(config) | {"env_args": " ".join(config.env_args)})
        if accelerator.is_main_process:
            (out / "transcripts").mkdir(parents=True, exist_ok=True)
            revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
            about = {"argv": sys.argv, "git": revision.stdout.strip(), "config": asdict(config)}
            (out / "config.json").write_text(json.dumps(about, indent=1))
            for name in ("metrics.jsonl", "timings.jsonl"):  # what came after the checkpoint is about to happen again
                keep = [line for line in read_lines(out / name) if json.loads(line)["iteration"] <= iteration]
                (out / name).write_text("".join(keep) if iteration else "")

    def lap(self, name: str) -> None:
        """The time since the last lap, in seconds, was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.started = now - self.started, now

    def metrics(self, iteration: int, row: dict) -> None:
        """One line each for metrics and timings. Timings have a file of their own, so that metrics are reproducible."""
        self.lap("record")
        self.accelerator.log(row, step=iteration)
        if self.accelerator.is_main_process:
            for name, content in (("metrics.jsonl", row), ("timings.jsonl", self.seconds)):
                with (self.out / name).open("a") as file:
                    file.write(json.dumps({"iteration": iteration} | content) + "\n")
        if iteration:
            self.progress.set_postfix(success=f"{row.get('reward/success', float('nan')):.2f}")
            self.progress.update()

    def transcripts(self, iteration: int, episodes: list[Episode], step_advantage: Tensor) -> None:
        """Two episodes to be read, a success and a failure if there are both, with H and advantage of each step."""
        chosen = [next((i for i, e in enumerate(episodes) if e.success == wanted), 0) for wanted in (True, False)]
        texts = [transcript(episodes[i], step_advantage[i].tolist()) for i in chosen]
        if self.accelerator.is_main_process:
            (self.out / "transcripts" / f"{iteration:06d}.txt").write_text("\n".join(texts))


def read_lines(path: Path) -> list[str]:
    """Lines with their ends; none if there is no file."""
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def episode_metrics(config: TrainConfig, episodes: list[Episode], batch: Batch) -> dict:
    """Means over the episodes and steps of all ranks."""
    steps = [step for episode in episodes for step in episode.steps]
    reward = batch.reward.view(-1, config.group_size)
    return {
        "reward/mean": float(reward.mean()),
        "reward/success": sum(episode.success for episode in episodes) / len(episodes),
        "group/zero_std_frac": float((reward.amax(1) == reward.amin(1)).float().mean()),
        "episode/steps": len(steps) / len(episodes),
        "episode/tokens": float(batch.length.float().mean()),
        "episode/invalid_frac": sum(not step.valid for step in steps) / max(1, len(steps)),
        "episode/truncated_frac": sum(episode.truncated for episode in episodes) / len(episodes),
        "episode/errors": sum("error" in episode.info for episode in episodes),
    }


def step_metrics(config: TrainConfig, entropy: Tensor, valid: Tensor, step_advantage: Tensor) -> dict:
    """Over the steps of all ranks: entropy, its scale g, and the advantage that went into the loss."""
    scale = gradient_scale(normalize_entropy(entropy, valid), valid, k=config.k)[valid]
    return {
        "entropy/mean": float(entropy[valid].mean()),
        "entropy/min": float(entropy[valid].min()),
        "entropy/max": float(entropy[valid].max()),
        "empg/g_min": float(scale.min()),
        "empg/g_max": float(scale.max()),
        "advantage/mean": float(step_advantage[valid].mean()),
        "advantage/std": float(step_advantage[valid].std()),
    }


def update_metrics(config: TrainConfig, sums: dict[str, float]) -> dict:
    """Sums of all ranks, divided by the tokens or optimizer steps of all ranks."""
    total = {name: sum(part[name] for part in gather_object([dict(sums)])) for name in sums}
    tokens, steps = total.pop("tokens"), total.pop("optimizer_steps")
    row = {"policy/loss": total.pop("loss") / steps, "policy/grad_norm": total.pop("grad_norm") / steps}
    row |= {f"policy/{name}": value / tokens for name, value in total.items()}
    return row | {"policy/learning_rate": config.learning_rate}


# ---------------------------------------------------------------------------------- 8  evaluation, checkpoints, the end


def evaluate(config: TrainConfig, accelerator: Accelerator, policy: Policy, envs: list[Env]) -> list[Episode]:
    """One episode of every held-out task; every rank plays its share and gets all."""
    tasks = first_tasks(envs[0], config.env, config.held_out, config.eval_tasks)
    mine = tasks[accelerator.process_index :: accelerator.num_processes]
    episodes = rollout(
        policy,
        envs,
        mine,
        seeds=[(config.seed, task.seed) for task in mine],
        temperature=config.temperature,
        max_step_tokens=config.max_step_tokens,
        max_tokens=config.max_tokens,
        desc="evaluate",
    )
    return sorted(gather_object(episodes), key=lambda episode: episode.task.seed)


def eval_metrics(summary: dict) -> dict:
    """The summary as flat metrics."""
    row = {f"eval/{name}": value for name, value in summary.items() if name != "task_types"}
    return row | {f"eval/success/{name}": part["success"] for name, part in summary["task_types"].items()}


def save(config: TrainConfig, accelerator: Accelerator, policy: Policy, learner: Learner, state: dict) -> None:
    """A checkpoint, by the main process; the others wait for it."""
    if accelerator.is_main_process:
        save_checkpoint(checkpoint_path(Path(config.out), state["iteration"]), policy, learner.optimizer, state)
    accelerator.wait_for_everyone()


def finish(
    config: TrainConfig,
    accelerator: Accelerator,
    policy: Policy,
    learner: Learner,
    state: dict,
    envs: list[Env],
    record: Record,
) -> None:
    """Last checkpoint, last evaluation, the table and the picture; or, if the run was stopped, how to go on."""
    out, newest = Path(config.out), checkpoint_path(Path(config.out), state["iteration"])
    if newest not in checkpoints(out):
        save(config, accelerator, policy, learner, state)
    record.progress.close()
    if state["iteration"] < config.iterations:
        raise SystemExit(f"stopped after iteration {state['iteration']}; go on with the same command and --resume")
    if state["iteration"] % config.eval_every or "after" not in state:
        state["after"] = summarize(evaluate(config, accelerator, policy, envs))
    accelerator.end_training()
    if accelerator.is_main_process:
        (out / "result.json").write_text(json.dumps({name: state[name] for name in ("before", "after")}, indent=1))
        draw_curves(out / "metrics.jsonl", out / "curves.png")
        tasks = f"{config.env}, {state['after']['episodes']} held-out tasks, temperature {config.temperature}"
        print(f"\n{tasks}\n\n{table({name: state[name] for name in ('before', 'after')})}")
        print(f"\nbefore: {out / 'first_policy'}   after: {newest}")
        print(f"curves: {out / 'curves.png'}   metrics: {out / 'metrics.jsonl'}")


def main() -> None:
    config = parse_config(TrainConfig)
    transformers.utils.logging.disable_progress_bar()
    try:
        train(config)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the last checkpoint, if there is one, is complete: go on with --resume") from None


if __name__ == "__main__":
    main()
