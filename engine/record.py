"""The metrics and the files of a run: config.json, metrics.jsonl, timings.jsonl, transcripts, result.json, curves.png.

The main process writes; the others only take part where numbers of all ranks are added up. A metric is a sum over all
ranks divided by a count over all ranks, never a mean of means. Every key is explained in docs/metrics.md.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import Timeout
from tqdm import tqdm

from config import POLICIES, TrainConfig
from empg import Modulation
from engine.figures import draw_curves, fault_of_metrics
from engine.files import RecordError, lock_of, naming_the_file, read_json, read_lines, replace_file, require_writable
from engine.ranks import COMPUTE
from episode import Batch, Episode, save_episodes, transcript

OF_STEPS = ("entropy", "norm_entropy", "g", "f", "advantage")  # what a Modulation holds of each step

# --------------------------------------------------------------------------------------------------------- metrics


def episode_metrics(episodes: list[Episode], group_size: int, errors: int) -> dict:
    """Means over the episodes, groups and steps of all ranks, without what an environment aborted.

    Groups are consecutive episodes. One in which fewer than two are left counts as equal in reward.  errors: number of
    aborted episodes among all that were sampled.
    """
    groups = [episodes[first : first + group_size] for first in range(0, len(episodes), group_size)]
    rewards = [{episode.reward for episode in group if not episode.aborted} for group in groups]
    episodes = [episode for episode in episodes if not episode.aborted]
    steps = [step for episode in episodes for step in episode.steps]
    return {
        "reward/mean": float(torch.tensor([episode.reward for episode in episodes]).mean()),
        "reward/success": sum(episode.success for episode in episodes) / len(episodes),
        "group/zero_std_frac": float(torch.tensor([len(of_group) < 2 for of_group in rewards]).float().mean()),
        "episode/steps": len(steps) / len(episodes),
        "episode/tokens": sum(len(episode.ids) for episode in episodes) / len(episodes),
        "episode/invalid_frac": sum(not step.valid for step in steps) / max(1, len(steps)),
        "episode/truncated_frac": sum(episode.truncated for episode in episodes) / len(episodes),
        "episode/errors": errors,
    }


def step_metrics(modulation: Modulation) -> dict:
    """Over the steps of all ranks: entropy, g, f, and the advantage that went into the loss."""
    entropy, norm_entropy, g, f, advantage = (getattr(modulation, name)[modulation.valid] for name in OF_STEPS)
    return {
        "entropy/mean": float(entropy.mean()),
        "entropy/min": float(entropy.min()),
        "entropy/max": float(entropy.max()),
        "empg/norm_entropy": float(norm_entropy.mean()),
        "empg/g_min": float(g.min()),
        "empg/g_max": float(g.max()),
        "empg/f_mean": float(f.mean()),
        "advantage/mean": float(advantage.mean()),
        "advantage/std": float(advantage.std(correction=0)),
    }


def update_metrics(sums: dict[str, float]) -> dict:
    """Policy metrics, from the sums of `update`. Token sums are added over ranks; all ranks take the same optimizer
    steps."""
    parts = gather_object([dict(sums)])
    total, steps = {name: sum(part[name] for part in parts) for name in sums}, sums["optimizer_steps"]
    metrics = {"policy/loss": total["loss"] / steps}  # a rank's loss is its share of the whole
    metrics |= {f"policy/{name}": sums[name] / steps for name in ("grad_norm", "learning_rate")}
    metrics["policy/kl_rollout"] = total["kl_rollout"] / max(1, total["rollout_tokens"])
    by_token = [name for name in ("clip_low", "clip_high", "kl_old", "kl_ref") if name in sums]
    return metrics | {f"policy/{name}": total[name] / total["tokens"] for name in by_token}


def eval_metrics(summary: dict) -> dict:
    """A summary of eval.py as flat metrics."""
    metrics = {f"eval/{name}": value for name, value in summary.items() if name != "task_types"}
    return metrics | {f"eval/success/{name}": part["success"] for name, part in summary["task_types"].items()}


def modulated(episodes: list[Episode], credit: Modulation, tokenizer) -> list[dict]:
    """The episodes as objects of JSON, with the text of each sampled token and with what their steps were trained with.

    "modulation" has the episode's base advantage and, for each step, entropy, norm_entropy, g, f and final advantage.
    """
    lines = []
    for i, episode in enumerate(episodes):
        sampled = [[token] for token, step in zip(episode.ids, episode.step_ids, strict=True) if step >= 0]
        of_steps = {name: getattr(credit, name)[i, : len(episode.steps)].tolist() for name in OF_STEPS}
        own = {"tokens": tokenizer.batch_decode(sampled), "modulation": {"base": float(credit.base[i]), **of_steps}}
        lines.append(asdict(episode) | own)
    return lines


# ----------------------------------------------------------------------------------------------------------- files


class Record:
    """The folder of a run, for this run alone. Raises RecordError if it cannot be written or another run has it."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.out = config, accelerator, Path(config.out)
        self.started, self.seconds, self.captured, self.warned = time.perf_counter(), {}, 0.0, False
        if accelerator.is_main_process:
            if not _is_run(self.out / "config.json"):
                raise RecordError(f"{self.out} holds no run but another config.json; choose another --out")
            for folder in (self.out / "transcripts", self.out / "episodes", Path(config.cache)):
                require_writable(folder)
            self._lock = lock_of(self.out)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RecordError(f"another run is writing to {self.out}; choose another folder with --out") from None

    def header(self, parameters: int) -> None:
        """One line that says what is going to run, with the flags that depend on the policy, before anything slow."""
        config, device = self.config, self.accelerator.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        precision = self.accelerator.mixed_precision
        place = f"{device}{threads}, mixed precision {precision}, {self.accelerator.num_processes} process(es)"
        batch = f"{config.tasks_per_iteration} tasks x {config.group_size} episodes"
        flags = ", ".join(f"{name} {getattr(config, name):g}" for name in POLICIES[config.policy_kind])
        self.say(f"{config.policy}, {parameters / 1e6:.2f}M parameters; {flags}; {place}; {batch}; {config.out}")

    def open(self, last: int) -> None:
        """Write config.json, and delete the rows after iteration `last`; the resumed run writes them again. -1 deletes
        all."""
        main = self.accelerator.is_main_process
        silent = {} if main else {"disable": True}  # not given on the main process, where TQDM_DISABLE decides
        self.progress = tqdm(
            total=self.config.iterations, initial=max(0, last), desc="train", unit="iteration", **silent
        )
        self.shown: dict[str, str] = {}  # beside the bar
        flat = asdict(self.config) | {"env_args": " ".join(self.config.env_args)}
        try:
            self.accelerator.init_trackers("empg", flat)
        except Exception as error:  # no network, no login, no space: each tracker has its own classes
            raise RecordError(f"could not start {self.config.report_to}: {' '.join(str(error).split())}") from error
        if main:
            about = {"argv": sys.argv, "git": revision(), "ranks": self.accelerator.num_processes}
            about |= {"mixed_precision": self.accelerator.mixed_precision}
            replace_file(self.out / "config.json", json.dumps(about | {"config": asdict(self.config)}, indent=1))
            for name in ("metrics.jsonl", "timings.jsonl"):
                rows = self._rows_until(last, self.out / name) if last >= 0 else []
                replace_file(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))

    def _rows_until(self, last: int, log: Path) -> list[dict]:
        """The rows of a log, one for each of the iterations 0 to `last`. A damaged log does not stop a run that has a
        checkpoint. One line says what is lost."""
        try:
            rows, faults, _ = read_lines(log, fault_of_metrics)
        except OSError as error:
            rows, faults = [], [f"{log}: {error.strerror}"]
        rows = [row for row in rows if row["iteration"] <= last]
        kept = {row["iteration"]: row for row in rows}
        if lost := set(range(last + 1)) - kept.keys():
            faults.append(f"{log}: {len(lost)} of {last + 1} iterations are missing, the first is {min(lost)}")
        if len(rows) > len(kept):
            faults.append(f"{log}: an iteration is there twice")
        if faults:
            self.say(f"{faults[0]}; resuming without what is lost; {log.name}.damaged is the file as it was")
            if os.path.lexists(log):
                os.replace(log, log.with_name(f"{log.name}.damaged"))
        return [kept[iteration] for iteration in sorted(kept)]

    def spent_on(self, name: str) -> None:
        """Note that the time since the last call, in seconds, was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.started = now - self.started, now

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def metrics(self, iteration: int, metrics: dict, captured: float = 0.0) -> None:
        """One line each for metrics and timings. Timings have a file of their own, so that metrics are reproducible.

        captured: seconds that capturing CUDA graphs took since the start of the run.
        """
        self.spent_on("record")
        self.seconds["capture"], self.captured = captured - self.captured, captured
        self.accelerator.log(metrics, step=iteration)
        if self.accelerator.is_main_process:
            for name, content in (("metrics.jsonl", metrics), ("timings.jsonl", self.seconds)):
                with naming_the_file(self.out / name), (self.out / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"iteration": iteration} | content) + "\n")
        names = {"success": "group/success", "held_out": "eval/success", "H": "entropy/mean"}
        self.shown |= {name: f"{metrics[key]:.2f}" for name, key in names.items() if key in metrics}
        bonus = self.config.empg and self.config.zeta > 0
        if metrics.get("group/zero_std_frac") == 1 and bonus and not self.warned:
            self.warned = True
            self.say(
                f"iteration {iteration}: all episodes of each group have the same reward, so only the bonus trains"
            )
        self.progress.set_postfix(self.shown)
        if iteration:
            self.progress.update()

    def episodes(self, iteration: int, batch: Batch, credit: Modulation, tokenizer) -> None:
        """All episodes of an iteration with their modulation, and two of them as text, to be read: a success and a
        failure if there are both, with H and advantage of each step."""
        episodes = batch.episodes
        chosen = [next((i for i, e in enumerate(episodes) if e.success == wanted), 0) for wanted in (True, False)]
        texts = [transcript(episodes[i], credit.entropy[i].tolist(), credit.advantage[i].tolist()) for i in chosen]
        if self.accelerator.is_main_process:
            replace_file(self.out / "transcripts" / f"{iteration:06d}.txt", "\n".join(texts))
            lines = "".join(json.dumps(line) + "\n" for line in modulated(episodes, credit, tokenizer))
            replace_file(self.out / "episodes" / f"{iteration:06d}.jsonl", lines)

    def not_finite(self, iteration: int, episodes: list[Episode]) -> str:
        """Keep the episodes whose loss or gradient is not finite; returns the line that the run ends with."""
        path = self.out / f"not_finite_{iteration:06d}.jsonl"
        save_episodes(path, episodes)
        return f"stopped in iteration {iteration}: loss or gradient is not finite; its episodes are in {path}"

    def result(self, summaries: dict) -> None:
        """The first and the last evaluation as JSON, and the learning curves."""
        if self.accelerator.is_main_process:
            replace_file(self.out / "result.json", json.dumps(summaries, indent=1))
            try:
                with naming_the_file(self.out / "curves.png"):
                    (self.out / "curves.png").unlink(missing_ok=True)  # a link may lead out of the folder
                    draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")
            except ValueError as error:  # somebody else wrote to the log
                self.say(f"no curves: {error}")


def _is_run(config: Path) -> bool:
    """Whether a config.json is of a run, and not of a model. A damaged one counts as a run's: it is written again."""
    with suppress(OSError, TypeError, ValueError):
        return "model_type" not in read_json(config)
    return True


def precision_of(players: list[str]) -> str | None:
    """The mixed precision in which the runs of these players sampled; None if no run says so: the launcher's counts.

    Raises RecordError if two runs, or a run and the launcher, say different things. A launcher's "no" says nothing:
    it is what `accelerate launch` sets by default.
    """
    said = {}
    for player in players:
        for file in (Path(player) / "state.json", Path(player).parent / "config.json"):
            try:
                precision = read_json(file)["mixed_precision"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if precision in ("no", *COMPUTE):
                said[precision] = player
                break
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if said and launcher != "no":
        said.setdefault(launcher, "this launcher")
    if len(said) > 1:
        pairs = " and ".join(f"{player} says {precision}" for precision, player in said.items())
        raise RecordError(f"mixed precision differs, so the numbers would not be those of training: {pairs}")
    return next(iter(said), None)


def revision() -> str:
    """The commit of this code; "" without git, and if this folder is not the top of a repository."""
    repository = Path(__file__).parents[1] / ".git"  # named, or git would look for one in the folders above
    git = ["git", f"--git-dir={repository}", "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
