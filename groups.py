"""Beat 1 of the training loop: groups of episodes, one group for each task, sampled by all ranks together.

Every rank plays some of the tasks, and gets the groups of all. Task number n of a run, and the random numbers of its
episodes, depend on the seed and on n alone.
"""

from operator import itemgetter

import numpy as np
from tqdm import tqdm

from config import TrainConfig
from engine.ranks import gathered
from engine.sampler import sampling_weights
from engine.stopping import play_together
from envs import Env
from episode import Episode, Task
from eval import enough_memory, require_steps
from rollout import rollout
from update import Learner


def train_task(config: TrainConfig, size: int | None, number: int) -> Task:
    """The run's task number `number`: a new one every time, or all of a finite split in a new order on each pass."""
    if size is None:
        return Task(config.env, "train", config.seed * 10**9 + number)
    order = np.random.default_rng([config.seed, number // size]).permutation(size)
    return Task(config.env, "train", int(order[number % size]))


@enough_memory("sampling", "lower --batch_size")
def sample_round(config: TrainConfig, learner: Learner, envs: list[Env], first: int) -> list[list[Episode]]:
    """One group of G episodes for each of the tasks from number `first` on; every rank plays its share and gets all."""
    accelerator, size, group = learner.accelerator, envs[0].size("train"), config.group_size
    numbers = range(first, first + config.tasks_per_iteration)[accelerator.process_index :: accelerator.num_processes]

    def play() -> list[tuple[int, list[Episode]]]:
        tasks = [train_task(config, size, number) for number in numbers for _ in range(group)]
        seeds = [(config.seed, number, episode) for number in numbers for episode in range(group)]
        limits = {"max_step_tokens": config.max_step_tokens, "max_tokens": config.max_tokens}
        episodes = rollout(learner.policy, envs, tasks, seeds, temperature=config.temperature, **limits)
        return [(number, episodes[i * group : (i + 1) * group]) for i, number in enumerate(numbers)]

    with gathered(learner.policy.model), sampling_weights(learner.policy.model, accelerator.mixed_precision):
        return [group for _, group in sorted(play_together(play), key=itemgetter(0))]


def sample_groups(
    config: TrainConfig, learner: Learner, envs: list[Env], next_task: int
) -> tuple[list[list[Episode]], dict]:
    """The groups of an iteration, the same on every rank, and metrics of all groups sampled for them.

    Dynamic sampling (DAPO) keeps the groups in which some episodes succeed and some do not, and samples more until it
    has enough, at most max_rounds times; then it goes on with what it has.
    """
    kept, solved, wanted, used = [], [], config.tasks_per_iteration, 0
    while len(kept) < wanted and used < wanted * config.max_rounds:
        groups = sample_round(config, learner, envs, next_task + used)
        require_steps([episode for group in groups for episode in group])
        used += wanted
        solved += [sum(episode.success for episode in group) for group in groups]
        if not config.dynamic_sampling:
            kept = groups
            break
        kept += [group for group in groups if 0 < sum(episode.success for episode in group) < config.group_size]
    if len(kept) < wanted and learner.accelerator.is_main_process:
        tqdm.write(f"dynamic sampling: of {used} groups only {len(kept)} differ in success; going on with these")
    kept = kept[:wanted]
    success = sum(solved) / (len(solved) * config.group_size)
    return kept, {"group/tasks_used": used, "group/kept": len(kept), "group/success": success}
