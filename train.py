"""Train a ReAct agent with GRPO or DAPO, modulated by EMPG or not, on one process or many.

    accelerate launch train.py                                       the tiny model in the House world, on a laptop
    accelerate launch train.py --no_empg --out out/grpo              the baseline under it
    accelerate launch train.py --policy Qwen/Qwen2.5-1.5B-Instruct   a real model
    accelerate launch train.py --resume                              go on where the run in --out stopped
    torchrun --nproc_per_node 2 train.py                             two processes, with or without GPUs
    torchrun --nproc_per_node 2 train.py --fsdp                      each of them with half of the model

An iteration has eight beats: 1, 7 and 8 in `iterate`, 2 to 4 in `assign_credit`, 5 and 6 in `learn`. Every rank samples
its own groups and gets those of all ranks, so EMPG's statistics, the normalisers and the metrics are those of the whole
batch. Only sampling, forward and backward are divided among the ranks.

Differences from the papers: DAPO's length penalty counts the tokens of the whole episode, observations included.
Not covered: models whose weights, in the type that they compute in, do not fit on one device.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from config import TrainConfig, parse_config
from empg import (
    NORMALIZATIONS,
    center,
    clarity_bonus,
    gradient_scale,
    group_advantages,
    loss_normalizer,
    rewards_differ,
    soft_overlong_penalty,
    spread,
    step_entropy,
)
from engine.checkpoint import CheckpointError, checkpoint_path, keep_best, restore, run_position, save
from engine.ranks import whole
from engine.record import Modulation, Record, RecordError, episode_metrics, eval_metrics, step_metrics, update_metrics
from engine.stopping import Stopped, StopRequest, lost_a_rank
from envs import Env, careless_player, fingerprint
from episode import Batch, collate, save_episodes
from eval import enough_memory, evaluate, first_tasks, open_envs, start_ranks, summarize, table
from groups import sample_groups, train_task
from policy import Dialogue, PolicyError, require_context
from rollout import dialogue, play_scripted
from tiny import TinyConfig, warm_start
from tools.cost import dry_run
from update import (
    Learner,
    NotFiniteError,
    gradient_sync,
    make_learner,
    micro_batch_loss,
    micro_batches,
    mini_batches,
    recompute_old_logp,
    require_finite,
)


def train(config: TrainConfig) -> None:
    """The whole run: prepare, iterate, report."""
    tracker = {} if config.report_to == "none" else {"log_with": config.report_to, "project_dir": config.out}
    accelerator = start_ranks(config.threads, config.fsdp, **tracker)
    envs = open_envs(config, config.batch_size, ["train", config.held_out])
    record = Record(config, accelerator)
    learner, state = prepare(config, accelerator, envs[0])
    record.begin(state["iteration"] - ("row" in state))
    stop = StopRequest()
    try:
        iterate(config, learner, envs, record, state)
    except Stopped:
        save(config, learner, state)
        accelerator.end_training()
        raise SystemExit(f"stopped after iteration {state['iteration']}; go on with --resume") from None
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        # Said here, while SIGTERM is caught: as soon as one process has died, the launcher sends it to the others.
        print("another process of this run has ended; go on from the last checkpoint with --resume", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        stop.close()
    finish(config, accelerator, record, state)


def iterate(config: TrainConfig, learner: Learner, envs: list[Env], record: Record, state: dict) -> None:
    """The loop. Raises Stopped while it samples if the run was asked to stop; `state` is then ready to be saved."""
    if "row" in state:  # before training, or the run was stopped when this row still lacked its evaluation
        conclude(config, learner, envs, record, state)
    while state["iteration"] < config.iterations:
        # 1 sample episodes, groups of one task
        groups, row = sample_groups(config, learner, envs, state["next_task"])
        episodes = [episode for group in groups for episode in group]
        state |= {"iteration": state["iteration"] + 1, "next_task": state["next_task"] + row["group/tasks_used"]}
        state |= {"row": row, "after": None}
        iteration = state["iteration"]
        record.lap("sample")

        # 2 to 6 learn from them, unless dynamic sampling found no group that differs in success
        if groups:
            batch = collate(episodes, learner.accelerator.device)  # (B, L), the episodes of all ranks
            try:
                modulation, sums = learn(config, learner, batch, iteration)
            except NotFiniteError as error:
                where = Path(config.out) / f"not_finite_{iteration:06d}.jsonl"
                save_episodes(where, [episodes[i] for i in error.rows])
                raise SystemExit(f"stopped in iteration {iteration}: {error}; they are in {where}") from None
            record.lap("learn")

            # 7 log
            row |= episode_metrics(episodes, config.group_size) | step_metrics(modulation) | update_metrics(sums)
            if config.is_evaluated(iteration):
                record.episodes(iteration, episodes, modulation, learner.policy.tokenizer)

        # 8 evaluate, checkpoint
        conclude(config, learner, envs, record, state)


def assign_credit(config: TrainConfig, batch: Batch) -> Modulation:
    """What each step of the batch, (B, L), is trained with: its advantage, and what it was made of."""
    # 2 score and centre within the group
    reward = batch.reward  # (B,)
    if config.overlong_buffer:
        reward = reward + soft_overlong_penalty(batch.length, limit=config.max_tokens, buffer=config.overlong_buffer)
    base = group_advantages(reward, config.group_size)  # (B,)

    # 3 entropy was captured while sampling, and so were the old log-probs, unless `learn` is to compute them again; the
    #   reference's log-probs come with the loss, in beat 5
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)  # (B, S), nats

    # 4 modulate by step entropy: A_final = A g(H_t) + zeta f(H_t+1), minus its mean over all steps
    norm_entropy = NORMALIZATIONS[config.normalization](entropy, valid)  # (B, S), in [0, 1]
    if not config.empg:
        g, f = valid.float(), torch.zeros_like(entropy)
        return Modulation(base, entropy, valid, norm_entropy, g, f, base[:, None] * g)
    g = gradient_scale(norm_entropy, valid, k=config.k)  # (B, S), mean 1
    f = clarity_bonus(norm_entropy, valid, k_future=config.k_future)  # (B, S), of the next step
    if not config.bonus_in_all_groups:
        f = f * rewards_differ(reward, config.group_size)[:, None]
    return Modulation(base, entropy, valid, norm_entropy, g, f, center(base[:, None] * g + config.zeta * f, valid))


@enough_memory("learning", "lower --micro_batch_tokens, or set --gradient_checkpointing")
def learn(config: TrainConfig, learner: Learner, batch: Batch, iteration: int) -> tuple[Modulation, dict[str, float]]:
    """The algorithm: from the episodes of an iteration, (B, L), to new weights.

    Returns what the steps were trained with, and sums over this rank's tokens and optimizer steps for the record.
    Raises NotFiniteError instead of taking a bad step.
    """
    accelerator, sums = learner.accelerator, defaultdict(float)
    # No dropout: old and new log-probs must be of the same policy. Only gradient checkpointing needs training mode.
    learner.model.train(config.gradient_checkpointing)

    # 2 to 4
    modulation = assign_credit(config, batch)
    token_advantage = spread(modulation.advantage, batch.step_ids)  # (B, L)
    if config.old_logp == "recompute":
        batch, difference = recompute_old_logp(config, learner, batch)
        sums |= difference

    # 5 micro-batches: loss, backward
    for rows in mini_batches(config, len(batch.ids), iteration):
        normalizer = loss_normalizer(batch.mask[rows], config.aggregation)  # of all ranks and micro-batches
        parts = micro_batches(config, accelerator, batch.length, rows)
        for number, (part, weight) in enumerate(parts, 1):
            with gradient_sync(learner, last=number == len(parts)):
                loss, part_sums = micro_batch_loss(
                    config, learner, batch.select(part), token_advantage[part], normalizer
                )
                require_finite(loss.item(), part)
                accelerator.backward(weight * loss)
            for name, value in part_sums.items():
                sums[name] += float(value) if weight else 0.0
        # Up to the first step, sampler and trainer differ by rounding alone.
        sums.setdefault("kl_rollout", sums["kl_old"])
        sums.setdefault("rollout_tokens", sums["tokens"])

        # 6 clip and step
        grad_norm = accelerator.clip_grad_norm_(learner.model.parameters(), config.max_grad_norm)
        sums["grad_norm"] += require_finite(whole(grad_norm), rows)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        sums["learning_rate"] += learner.optimizer.param_groups[0]["lr"]
        sums["optimizer_steps"] += 1
    return modulation, sums


# ------------------------------------------------------------------------------------------------------- beginning


def prepare(config: TrainConfig, accelerator: Accelerator, env: Env) -> tuple[Learner, dict]:
    """What a run learns with, and its position: at the start, or at the newest checkpoint."""
    # The main process alone reads every checkpoint to its end to verify it.
    found = [run_position(config) if accelerator.is_main_process else None]
    newest, state = broadcast_object_list(found)[0]
    link = Path(config.out) / "first_policy"  # the policy that the run started from, for eval.py --compare
    first = str(link) if newest and link.exists() else first_policy(config, accelerator, env)
    if accelerator.is_main_process and Path(first).is_dir() and first != str(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(first).resolve(), target_is_directory=True)
    learner = make_learner(config, accelerator, str(newest or first), first)
    require_context(learner.policy, config.max_tokens)
    if newest:
        restore(newest, learner)
    return learner, state


def first_policy(config: TrainConfig, accelerator: Accelerator, env: Env) -> str:
    """Folder or hub id of the policy that training starts from. The main process builds the tiny one, if it is not in
    the cache; the others wait for it."""
    if config.policy != "tiny":
        return config.policy
    folder = [""]
    if accelerator.is_main_process:
        definition = {"env": config.env, "slip": config.slip, "demonstrations": config.demonstrations}
        definition["world"] = fingerprint(env, config.settings)
        demonstrate = lambda: demonstrations(config, env)  # noqa: E731
        folder = [str(warm_start(definition, demonstrate, TinyConfig(), config.seed, Path(config.cache)))]
    return broadcast_object_list(folder)[0]


def demonstrations(config: TrainConfig, env: Env) -> list[Dialogue]:
    """Dialogues of the careless player, on the first tasks of the run. Ends the program if any is broken off."""
    tasks = [train_task(config, env.size("train"), number) for number in range(config.demonstrations)]
    played = play_scripted(env, tasks, careless_player(config.slip), config.seed, desc="demonstrations")
    if broken := [episode.info["error"] for episode in played if "error" in episode.info]:
        raise SystemExit(f"{len(broken)} of {len(played)} demonstrations were broken off: {broken[0]}")
    return [dialogue(env.instructions, episode) for episode in played]


# --------------------------------------------------------------------------------- 8  evaluation, checkpoints, the end


def conclude(config: TrainConfig, learner: Learner, envs: list[Env], record: Record, state: dict) -> None:
    """The end of an iteration: evaluate if it is time, write its row, save if it is time."""
    iteration = state["iteration"]
    if config.is_evaluated(iteration):
        tasks = first_tasks(envs[0], config.env, config.held_out, config.eval_tasks)
        summary = summarize(evaluate(learner.policy, envs, tasks, config, learner.accelerator))
        state["after" if iteration else "before"] = summary
        state["row"] |= eval_metrics(summary)
        if iteration:
            keep_best(config, learner, state)
    record.row(iteration, state.pop("row"))
    if iteration and (iteration % config.checkpoint_every == 0 or iteration == config.iterations):
        save(config, learner, state)


def finish(config: TrainConfig, accelerator: Accelerator, record: Record, state: dict) -> None:
    """The table, the picture, and where everything is."""
    record.progress.close()
    accelerator.end_training()
    summaries = {name: state[name] for name in ("before", "after", "best")}
    record.result(summaries)
    if accelerator.is_main_process:
        out = Path(config.out)
        tasks = f"{config.env}, {state['after']['episodes']} held-out tasks, temperature {config.temperature}"
        print(f"\n{tasks}\n\n{table({name: summaries[name] for name in ('before', 'after')})}")
        print(f"\nbefore: {out / 'first_policy'}   after: {checkpoint_path(out, state['iteration'])}")
        print(f"best: {out / 'best'}, of iteration {state['best']['iteration']}")
        print(f"curves: {out / 'curves.png'}   metrics: {out / 'metrics.jsonl'}")


def main() -> None:
    config = parse_config(TrainConfig)
    transformers.utils.logging.disable_progress_bar()
    try:
        if config.dry_run:
            print(dry_run(config))
        else:
            train(config)
    except (CheckpointError, PolicyError, RecordError) as error:
        raise SystemExit(str(error)) from error
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        raise SystemExit("another process ended while the run was being prepared") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the last checkpoint, if there is one, is complete: go on with --resume") from None


if __name__ == "__main__":
    main()
