"""Train a ReAct agent with GRPO or DAPO, modulated by EMPG or not, on one process or many.

    accelerate launch train.py                                       the tiny model in the House world, on a laptop
    accelerate launch train.py --no_empg --out out/grpo              the baseline under it
    accelerate launch train.py --policy Qwen/Qwen2.5-1.5B-Instruct --example --learning_rate 1e-6    a real model
    accelerate launch train.py --resume                              resume the run in --out
    torchrun --nproc_per_node 2 train.py                             two processes, with or without GPUs
    torchrun --nproc_per_node 2 train.py --fsdp                      each of them with half of the model

The algorithm is `iterate`, in eight beats. A rank is one process. Each rank plays some of the groups and then receives
all groups, so EMPG's statistics, the normalisers and the metrics are those of the whole batch. Only sampling, forward
and backward are divided among the ranks.

Differences from the papers: DAPO's length penalty counts the tokens of the whole episode, observations included.
Not covered: tensor parallelism. While sampling, every device holds all weights in compute precision, with --fsdp too.
"""

if __name__ == "__main__":
    from engine.terminal import start_script

    start_script()

from collections.abc import Callable
from pathlib import Path

import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig, parse_config
from empg import Modulation, group_advantages, modulation, no_modulation, soft_overlong_penalty, step_entropy
from engine.checkpoint import RunState, keep_best, link_first_policy, restore, run_position, save
from engine.ranks import explain_out_of_memory, play_over_ranks, start_ranks, weights_for_sampling
from engine.record import Record, episode_metrics, eval_metrics, step_metrics, update_metrics
from engine.stopping import NotFiniteError, stoppable
from engine.world_errors import NoStepsError, require_steps
from envs import Env
from episode import Batch, Episode, collate
from eval import evaluate, first_tasks, open_envs, percent, summarize, table
from imitate import count_parameters, first_policy
from rollout import rollout, train_task
from update import Learner, make_learner, update

MAX_ROUNDS = 4  # of dynamic sampling in an iteration


def iterate(
    config: TrainConfig, learner: Learner, envs: list[Env], record: Record, state: RunState, assign_credit: Callable
) -> None:
    """The algorithm. Raises Stopped, while it samples, if the run was asked to stop; `state` can be saved then."""
    if state.unwritten is not None:  # iteration 0, or a run that was stopped before it evaluated this iteration
        evaluate_and_save(config, learner, envs, record, state)
    while state.iteration < config.iterations:
        # 1 sample episodes, in groups of one task
        groups, metrics = sample_groups(config, learner, envs, state.next_task)
        state.next_iteration(metrics["group/tasks_used"], metrics)
        record.spent_on("sample")

        if groups:  # dynamic sampling may find no group that differs in success
            batch = collate([episode for group in groups for episode in group], learner.accelerator.device)  # (B, L)

            # 2 score within the group
            advantage = score(config, batch)  # (B,)

            # 3 step entropy, from the entropies captured while sampling
            entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)  # (B, S), nats
            valid = valid & batch.keep[:, None]  # what an environment aborted is in no statistic

            # 4 modulate
            credit = assign_credit(config, batch, advantage, entropy, valid, learner)  # (B, S)

            # 5 loss and backward, 6 clip and step
            sums = update(config, learner, batch, credit.advantage, state.iteration)
            record.spent_on("learn")

            # 7 log
            metrics |= episode_metrics(batch.episodes, config.group_size, metrics.pop("episode/errors"))
            metrics |= step_metrics(credit) | update_metrics(sums)
            if config.is_evaluated(state.iteration):
                record.episodes(state.iteration, batch, credit, learner.policy.tokenizer)

        # 8 evaluate and save
        evaluate_and_save(config, learner, envs, record, state)


# --------------------------------------------------------------------------------------------------------- 1  sample


def sample_groups(
    config: TrainConfig, learner: Learner, envs: list[Env], next_task: int
) -> tuple[list[list[Episode]], dict]:
    """The groups of an iteration, the same on every rank, and metrics of all groups sampled for them.

    Dynamic sampling (DAPO) keeps the groups in which some episodes succeed and some do not. It samples until it has
    enough groups, at most MAX_ROUNDS times, and then trains on those that it has. Aborted episodes do not count.
    """
    kept, solved, errors, used, wanted = [], [], 0, 0, config.tasks_per_iteration
    while len(kept) < wanted and used < wanted * MAX_ROUNDS:
        groups = sample_round(config, learner, envs, next_task + used)
        used += wanted
        for group in groups:
            left = [episode.success for episode in group if not episode.aborted]
            solved, errors = solved + left, errors + len(group) - len(left)
            if not config.dynamic_sampling or 0 < sum(left) < len(left):
                kept.append(group)
    kept = kept[:wanted]
    if len(kept) < wanted and learner.accelerator.is_main_process:
        tqdm.write(f"dynamic sampling: of {used} groups only {len(kept)} differ in success; training on these")
    success = sum(solved) / len(solved)
    return kept, {"group/tasks_used": used, "group/kept": len(kept), "group/success": success, "episode/errors": errors}


@explain_out_of_memory("sampling", "lower --batch_size")
def sample_round(config: TrainConfig, learner: Learner, envs: list[Env], first_task: int) -> list[list[Episode]]:
    """One group of G episodes for each of the tasks from number `first_task` on; every rank plays its share."""
    tasks, size, split_size = config.tasks_per_iteration, config.group_size, envs[0].size("train")

    def play(numbers: list[int]) -> list[list[Episode]]:
        seeds = [("train", config.seed, number, index) for number in numbers for index in range(size)]
        played = [train_task(config.env, split_size, config.seed, number) for *_, number, _ in seeds]
        episodes = rollout(learner.policy, envs, played, seeds, **config.limits)
        return [episodes[start : start + size] for start in range(0, len(episodes), size)]

    with weights_for_sampling(learner.accelerator, learner.policy.model):
        groups = play_over_ranks(learner.accelerator, range(first_task, first_task + tasks), play)
    require_steps([episode for group in groups for episode in group])
    return groups


# ------------------------------------------------------------------------------------------ 2  score, 4  modulate


def score(config: TrainConfig, batch: Batch) -> Tensor:
    """The group-relative advantage (B,) of each episode, from its reward, with DAPO's penalty if it has a buffer."""
    reward = batch.reward  # (B,)
    if config.overlong_buffer:
        reward = reward + soft_overlong_penalty(batch.length, limit=config.max_tokens, buffer=config.overlong_buffer)
    return group_advantages(reward, config.group_size, keep=batch.keep)


def assign_credit(
    config: TrainConfig, batch: Batch, advantage: Tensor, entropy: Tensor, valid: Tensor, learner: Learner | None = None
) -> Modulation:
    """What each step of the batch is trained with. To use another function, pass it to `train`.

    advantage: (B,), group-relative.  entropy: (B, S), nats.  valid: (B, S) bool.  learner: for credit that needs the
    policy. The tensors of the result are (B, S).
    """
    if not config.empg:
        return no_modulation(advantage, entropy, valid)
    return modulation(advantage, entropy, valid, k=config.k, k_future=config.k_future, zeta=config.zeta)


# ---------------------------------------------------------------------------------------------- 8  evaluate and save


def evaluate_and_save(config: TrainConfig, learner: Learner, envs: list[Env], record: Record, state: RunState) -> None:
    """The end of an iteration: evaluate if it is time, write its metrics, save if it is time."""
    if config.is_evaluated(state.iteration):
        evaluate_held_out(config, learner, envs, record, state)
    record.metrics(state.iteration, state.unwritten, learner.policy.capture_seconds)
    state.unwritten = None
    if state.iteration == config.iterations or (state.iteration and state.iteration % config.checkpoint_every == 0):
        save(Path(config.out), state, learner.accelerator, learner.policy, learner.optimizer)


def evaluate_held_out(config: TrainConfig, learner: Learner, envs: list[Env], record: Record, state: RunState) -> None:
    """Evaluate the policy on held-out tasks, the same in every evaluation, and keep it if it is the best so far."""
    tasks = first_tasks(envs[0], config.env, config.held_out, config.eval_tasks)
    summary = summarize(evaluate(learner.policy, envs, tasks, config, learner.accelerator))
    record.say(f"iteration {state.iteration}: {percent(summary)} of {len(tasks)} held-out tasks")
    state.unwritten |= eval_metrics(summary)
    if state.iteration == 0:
        state.before = summary
    else:
        state.after = summary
        keep_best(Path(config.out), state, learner.accelerator, learner.policy)


# -------------------------------------------------------------------------------------------- the start and the end


def train(config: TrainConfig, assign_credit: Callable[..., Modulation] = assign_credit) -> None:
    """The whole run: prepare, iterate, report."""
    with stoppable(Path(config.out)) as stop:
        tracker = {} if config.report_to == "none" else {"log_with": config.report_to, "project_dir": config.out}
        accelerator = start_ranks(config.threads, config.fsdp, **tracker)
        envs = open_envs(config, config.batch_size, ["train", config.held_out])
        record = Record(config, accelerator)
        # The main process alone verifies the checkpoints, because that reads every file to its end.
        found = run_position(config, accelerator.mixed_precision) if accelerator.is_main_process else None
        newest, state = broadcast_object_list([found])[0]
        record.header(count_parameters(str(newest or config.policy)))
        learner = prepare(config, accelerator, envs[0], newest)
        record.open(state.last_written)

        def save_and_end() -> Path:
            saved = save(Path(config.out), state, accelerator, learner.policy, learner.optimizer)
            accelerator.end_training()
            return saved

        stop.save = save_and_end
        try:
            iterate(config, learner, envs, record, state, assign_credit)
        except NotFiniteError as error:
            raise SystemExit(record.not_finite(state.iteration, error.episodes)) from None
        except NoStepsError as error:
            raise SystemExit(f"{error}; --resume from {save_and_end()}" if state.iteration else str(error)) from None
        print_summary(config, accelerator, record, state)


def prepare(config: TrainConfig, accelerator: Accelerator, env: Env, checkpoint: Path | None = None) -> Learner:
    """The learner: from the policy that training starts from, or restored from a checkpoint."""
    link = Path(config.out) / "first_policy"
    first = first_policy(config, accelerator, env, link if checkpoint else None)
    if accelerator.is_main_process:
        link_first_policy(link, first)
    learner = make_learner(config, accelerator, str(checkpoint or first), first)
    if checkpoint:
        restore(checkpoint, learner.policy, learner.optimizer)
    return learner


def print_summary(config: TrainConfig, accelerator: Accelerator, record: Record, state: RunState) -> None:
    """The results and the picture as files, then the table, and where everything is."""
    record.result({"before": state.before, "after": state.after, "best": state.best})
    record.progress.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        out = Path(config.out)
        tasks = f"{config.env}, {state.after['episodes']} held-out tasks, temperature {config.temperature}"
        print(f"\n{tasks}\n\n{table({'before': state.before, 'after': state.after})}")
        print(f"\nbefore: {out / 'first_policy'}   after: {out / f'checkpoint-{state.iteration:06d}'}")
        print(f"best: {out / 'best'}, of iteration {state.best['iteration']}")
        print(f"curves: {out / 'curves.png'}   metrics: {out / 'metrics.jsonl'}")
        print(f"what every step was trained with: python -m paper.page {out}")


def main() -> None:
    config = parse_config(TrainConfig)
    transformers.utils.logging.disable_progress_bar()
    train(config)


if __name__ == "__main__":
    main()
