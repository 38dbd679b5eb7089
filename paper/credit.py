"""Credit against the truth: what each step was worth, what GRPO and EMPG gave it, and what the update made of it.

    python -m paper.credit --run out/house --checkpoint 20

plays groups of training tasks with a checkpoint's policy, and measures the true advantage of every step as value.py
says. Then three questions:

    credit      how do the advantages of each method agree with the true ones, and at which entropy is the true credit?
    direction   the cosine of a method's gradient, on a batch as large as in training, with the gradient that the true
                advantages of the other groups give
    signal      the share of that gradient's squared norm that is the same in other batches; the rest is noise

The gradients of a language model fit no memory; there only the first question is answered.

All intervals are bootstrap intervals over groups. A row goes to docs/results/credit.jsonl. The episodes and their
credit go to RUN/credit/CHECKPOINT.jsonl, where the credit page finds them.

Arrays here are flat: n entries, one for each step of all episodes, in order; `group` (n,) is the group of each.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats
from transformers.hf_argparser import HfArg

from config import TrainConfig, parse_config
from empg import Modulation, aggregate, loss_normalizer, step_entropy
from engine.checkpoint import checkpoint_path, world_settings
from engine.files import read_json, replace_file, require_writable, require_writable_file
from engine.ranks import start_ranks, weights_for_sampling
from engine.record import modulated, precision_of, revision
from engine.scorer import make_scorable
from engine.terminal import start_script
from engine.world_errors import require_none_aborted
from envs import Env
from episode import Batch, Episode, Task, collate
from eval import load_player, open_envs
from paper.rows import METHODS, add_row
from paper.study import ROOT, credit_of, machine, rounded
from paper.value import play_continuations, values
from policy import Policy
from rollout import rollout
from train import assign_credit, score
from update import sampled_logp

FIRST_TASK = 10**8  # beyond every task that a run trains on, where a world has a task for every seed
COMPARED = ["grpo", "grpo_scaling", "grpo_bonus", "grpo_empg"]
COMPARED += ["grpo_empg_rank", "grpo_empg_mixed", "grpo_empg_reversed"]
FIFTHS = 5
MOST_NUMBERS = 10**9  # of all gradients together


@dataclass(frozen=True)
class CreditConfig:
    """Measure the true credit of steps, and how the methods agree with it."""

    run: str = HfArg(help="folder of a run")
    checkpoint: int = HfArg(help="iteration of the policy to measure; 0: the policy that the run started from")
    batches: int = HfArg(default=4, help="batches of episodes, each as large as in training")
    continuations: int = HfArg(default=8, help="plays on from before every step; an even number, for two halves")
    resamples: int = HfArg(default=1000, help="resamples of the bootstrap over groups")
    results: str = HfArg(default="", help="file of the rows; default: docs/results/credit.jsonl")
    env_args: list[str] = HfArg(default_factory=list, help="sources of the run's world, such as data=FOLDER")

    def __post_init__(self):
        if self.continuations < 2 or self.continuations % 2:
            raise ValueError(f"continuations must be even and at least 2, got {self.continuations}")
        if min(self.batches, self.resamples) < 1 or self.checkpoint < 0:
            raise ValueError("batches and resamples must be at least 1, checkpoint at least 0")


def bootstrap(statistic: Callable[[np.ndarray], float], group: np.ndarray, resamples: int) -> list[float]:
    """The statistic of all entries, and its 95 % percentile interval when groups are drawn with replacement.

    statistic: takes the places of the entries to use, some of them several times.  group: (n,), of each entry.
    """
    members = [np.flatnonzero(group == number) for number in np.unique(group)]

    def of(chosen: np.ndarray) -> float:
        return statistic(np.concatenate([members[i] for i in chosen]))

    numbers = np.arange(len(members))
    drawn = stats.bootstrap((numbers,), of, n_resamples=resamples, vectorized=False, method="percentile", rng=0)
    return [float(of(numbers)), float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]


# -------------------------------------------------------------------------------------------------------------- credit


def agreement(
    given: dict[str, np.ndarray], true: np.ndarray, group: np.ndarray, resamples: int
) -> dict[str, dict[str, list[float]]]:
    """How the advantages that each method gave, (n,), agree with the true ones, (n,).

    Returns for each method correlation, rank correlation, and the share of steps with the same sign where neither is 0.
    """

    def same_sign(a: np.ndarray, b: np.ndarray) -> float:
        both = (a != 0) & (b != 0)
        return float((np.sign(a[both]) == np.sign(b[both])).mean())

    measures = {
        "pearson": lambda a, b: stats.pearsonr(a, b).statistic,
        "spearman": lambda a, b: stats.spearmanr(a, b).statistic,
        "sign": same_sign,
    }

    def measure(method: str, name: str, rows: np.ndarray) -> float:
        return measures[name](given[method][rows], true[rows])

    return against_first(list(given), list(measures), measure, group, resamples)


def against_first(
    methods: list[str],
    names: list[str],
    measure: Callable[[str, str, np.ndarray], float],
    group: np.ndarray,
    resamples: int,
) -> dict[str, dict[str, list[float]]]:
    """Bootstrap estimate of each measure, and of its difference to the first method."""
    table: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        table[method] = {}
        for name in names:
            own, base = partial(measure, method, name), partial(measure, methods[0], name)
            table[method][name] = bootstrap(own, group, resamples)
            if method != methods[0]:
                gain = bootstrap(lambda rows, a=own, b=base: a(rows) - b(rows), group, resamples)
                table[method][f"{name}_gain"] = gain
    return table


def credit_by_entropy(entropy: np.ndarray, halves: np.ndarray, group: np.ndarray, resamples: int) -> list[dict]:
    """The size of the true credit in each fifth of step entropy: root mean square, in units of success, with interval.

    entropy: (n,), nats.  halves: (2, n), the true advantages by two halves of the continuations. The mean product of
    the two is an unbiased estimate of the squared credit. One estimate squared would count the chance of its
    continuations as credit.
    """
    edges = np.quantile(entropy, np.linspace(0, 1, FIFTHS + 1))
    fifth = np.clip(np.searchsorted(edges, entropy, side="right") - 1, 0, FIFTHS - 1)

    def size(rows: np.ndarray, number: int) -> float:
        products = halves.prod(0)[rows[fifth[rows] == number]]
        return float(np.sqrt(max(0.0, products.mean()))) if len(products) else 0.0

    return [
        {"entropy": edges[i : i + 2].tolist(), "credit": bootstrap(lambda rows, i=i: size(rows, i), group, resamples)}
        for i in range(FIFTHS)
    ]


# ---------------------------------------------------------------------------------------------------------- the update


def gradient_products(
    policy: Policy, episodes: list[Episode], advantages: list[np.ndarray], config: TrainConfig
) -> np.ndarray:
    """Products of policy gradients, (methods, groups, methods, groups): of one method on one group with another's.

    advantages: for each method, (n,).  The loss is that of the first optimizer step of an iteration: the ratio is 1.
    The mean of the gradients of all groups is the gradient of the loss of all episodes, for either aggregation.
    """
    model = make_scorable(policy.model).eval()
    batch, parameters = collate(episodes, policy.device), [p for p in model.parameters() if p.requires_grad]
    first_step = np.cumsum([0, *(len(episode.steps) for episode in episodes)])
    given = torch.from_numpy(np.stack(advantages)).float().to(policy.device)  # (methods, n)
    normalizer = loss_normalizer(batch.mask, config.aggregation) * config.group_size / len(episodes)  # of a mean group
    gradients = []  # of each group: (methods, parameters)
    for first in range(0, len(episodes), config.group_size):
        rows = list(range(first, first + config.group_size))
        part = batch.select(rows)
        logp = sampled_logp(model, part, config.temperature)  # (G, L)
        place = part.step_ids.clamp(min=0) + torch.from_numpy(first_step[rows]).to(policy.device)[:, None]  # (G, L)
        of_method = []
        for number, advantage in enumerate(given, 1):
            values = -logp * advantage[place.clamp(max=given.shape[1] - 1)]
            loss = aggregate(values, part.mask, config.aggregation, normalizer)
            grads = torch.autograd.grad(loss, parameters, retain_graph=number < len(given))
            of_method.append(torch.cat([grad.flatten() for grad in grads]))
        gradients.append(torch.stack(of_method))
    flat = torch.stack(gradients, 1).flatten(0, 1)  # (methods x groups, parameters)
    shape = (len(given), len(gradients)) * 2
    return (flat @ flat.T).double().cpu().numpy().reshape(shape)


def gradient_measures(
    methods: list[str], products: np.ndarray, batch_groups: int, resamples: int
) -> dict[str, dict[str, list[float]]]:
    """Of each method's gradient on a batch: its cosine with the true gradient of other batches ("direction") and of the
    same batch ("own"), and the share of its squared norm that other batches have too ("signal").

    products: as of `gradient_products`, of these methods; the last is the true advantages.  batch_groups: groups of a
    batch. What two batches have in common is estimated from pairs of different groups, without bias.
    """
    true, groups = len(methods) - 1, products.shape[1]

    def expected(a: int, b: int, rows: np.ndarray, number: float) -> float:
        """Expected product of two gradients, each a mean over `number` groups, that share each group (inf: none)."""
        block, different = products[a][:, b][np.ix_(rows, rows)], rows[:, None] != rows
        return float(block[different].mean() * (1 - 1 / number) + block.diagonal().mean() / number)

    def measure(method: str, name: str, rows: np.ndarray) -> float:
        m = methods.index(method)
        size = expected(m, m, rows, batch_groups)
        if name == "signal":
            return expected(m, m, rows, np.inf) / size if size > 0 else np.nan
        common, number = (batch_groups, batch_groups) if name == "own" else (np.inf, groups - batch_groups)
        norms = size * expected(true, true, rows, number)
        return expected(m, true, rows, common) / norms**0.5 if norms > 0 else np.nan  # nan: nothing to learn in these

    return against_first(methods, ["direction", "own", "signal"], measure, np.arange(groups), resamples)


# ------------------------------------------------------------------------------------------------------------- the row


def modulated_as(method: str, config: TrainConfig, batch: Batch) -> Modulation:
    """What the steps of a batch would be trained with by a method; `config` is that of any run."""
    other = parse_config(TrainConfig, shlex.split(METHODS[method].flags))
    config = replace(config, **{flag: getattr(other, flag) for flag in ("empg", "k", "k_future", "zeta")})
    return credit_of(method)(config, batch, score(config, batch), *step_entropy(batch.token_entropy, batch.step_ids))


def measure_credit(
    credit: CreditConfig, config: TrainConfig, accelerator: Accelerator, policy: Policy, envs: list[Env]
) -> tuple[dict, list[dict]]:
    """The measurements as a row, and the episodes with modulation and credit as objects of JSON."""
    size, groups = config.group_size, credit.batches * config.tasks_per_iteration
    available = envs[0].size("train")
    numbers = [FIRST_TASK + i if available is None else i % available for i in range(groups)]
    tasks = [Task(config.env, "train", number) for number in numbers for _ in range(size)]
    seeds = [("credit", config.seed, i) for i in range(len(tasks))]
    with weights_for_sampling(accelerator, policy.model):
        episodes = require_none_aborted(rollout(policy, envs, tasks, seeds, **config.limits), "episodes")
        outcomes = play_continuations(policy, envs, episodes, credit.continuations, config)
    parts = (slice(None), slice(0, None, 2), slice(1, None, 2))  # all continuations, and two halves of them
    value, *of_halves = (values(episodes, [rows[:, part] for rows in outcomes]) for part in parts)
    true, *halves = (np.concatenate([np.diff(v) for v in part]) for part in (value, *of_halves))
    halves = np.stack(halves)
    if not true.any():
        raise SystemExit(f"no credit to measure: all {len(episodes)} episodes and all continuations ended alike")
    group = np.concatenate([np.full(len(e.steps), i // size) for i, e in enumerate(episodes)])

    # The statistics of EMPG run over a batch as large as in training.
    batches = np.split(np.arange(len(episodes)), credit.batches)
    collated = [collate([episodes[i] for i in rows], policy.device) for rows in batches]
    made = {name: [modulated_as(name, config, part) for part in collated] for name in COMPARED}

    given = {name: np.concatenate([m.advantage[m.valid].cpu() for m in made[name]]) for name in COMPARED}
    entropy = np.concatenate([m.entropy[m.valid].cpu() for m in made["grpo"]])
    methods = [*given, "true"]
    row = {
        "groups": groups,
        "continuations": credit.continuations,
        "steps": len(true),
        "success": float(np.mean([episode.success for episode in episodes])),
        "credit_by_entropy": credit_by_entropy(entropy, halves, group, credit.resamples),
        "credit": agreement(given, true, group, credit.resamples),
    }
    if len(methods) * groups * policy.model.num_parameters() > MOST_NUMBERS:
        print("the gradients of this model do not fit memory, and are left out")
    else:
        products = gradient_products(policy, episodes, [*given.values(), true], config)
        row["update"] = gradient_measures(methods, products, config.tasks_per_iteration, credit.resamples)
    kept = []
    for part in collated:
        own = assign_credit(config, part, score(config, part), *step_entropy(part.token_entropy, part.step_ids))
        kept += modulated(part.episodes, own, policy.tokenizer)
    for entry, v in zip(kept, value, strict=True):
        true_credit = {"value": v.tolist(), "true_advantage": np.diff(v).tolist()}
        entry["credit"] = true_credit | {"continuations": credit.continuations}
    return row, kept


def flags_of(config: TrainConfig) -> str:
    """A command of train.py that makes this configuration, without the folders."""
    plain = asdict(TrainConfig(algorithm=config.algorithm)) | {"algorithm": None}
    return _command(["train.py"], config, plain, {"out", "cache"})


def command_of(credit: CreditConfig) -> str:
    """The command that makes the row again. The file of the rows is left out, since it is a place on one machine."""
    plain = asdict(CreditConfig(run="", checkpoint=0)) | {"run": None, "checkpoint": None}
    return _command(["python", "-m", "paper.credit"], credit, plain, {"results"})


def _command(start: list[str], config: TrainConfig | CreditConfig, plain: dict, without: set[str]) -> str:
    """A command with the flags that differ from the plain ones."""
    own = {name: value for name, value in asdict(config).items() if name not in without and value != plain[name]}
    flags = [[f"--{name}", *(value if isinstance(value, list) else [str(value)])] for name, value in own.items()]
    return shlex.join([*start, *(word for flag in flags for word in flag)])


def main() -> None:
    try:
        run_credit(parse_config(CreditConfig))
    except (OSError, ValueError) as error:
        raise SystemExit(f"paper.credit: {error}") from error


def run_credit(credit: CreditConfig) -> None:
    """Measure a checkpoint of a run; append the row, and write the episodes to the folder of the run."""
    run, file = Path(credit.run), Path(credit.results or ROOT / "docs" / "results" / "credit.jsonl")
    try:
        config = TrainConfig(**read_json(run / "config.json")["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}: config.json is of another version of this code ({error})") from error
    config = replace(config, env_args=world_settings(run, config.env, config.env_args, credit.env_args))
    require_writable_file(file)
    require_writable(run / "credit")
    folder = checkpoint_path(run, credit.checkpoint) if credit.checkpoint else run / "first_policy"
    folder = folder.absolute()  # not the name of a model on the hub
    accelerator = start_ranks(config.threads, mixed_precision=precision_of([str(folder)]))
    envs = open_envs(config, config.batch_size, ["train"])
    row, kept = measure_credit(credit, config, accelerator, load_player(str(folder), config, accelerator), envs)
    about = {"world": config.env, "seed": config.seed, "empg": config.empg, "checkpoint": credit.checkpoint}
    about |= {"algorithm": config.algorithm, "commit": revision(), "machine": machine(accelerator.mixed_precision)}
    about |= {"train": flags_of(config), "command": command_of(credit)}
    replace_file(run / "credit" / f"{credit.checkpoint:06d}.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))
    add_row(file, rounded(about | row))


if __name__ == "__main__":
    start_script()
    main()
