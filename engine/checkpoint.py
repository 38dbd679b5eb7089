"""Checkpoints that survive a full disk, a kill, a flipped bit: written aside, renamed when whole, verified when read.

A checkpoint is a folder that `from_pretrained` opens, with the optimizer, the position in the run and a checksum of
every file beside it. There is no random state to keep: every random number of a run comes from its seed, the task and
the episode (see rollout.py).
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from os.path import exists
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from config import EvalConfig, TrainConfig, fail
from engine.files import CHECKSUMS, checksums, content_digest, read_json, saved_checksums, write_checksums
from engine.ranks import explain_out_of_memory, full_weights, load_shards, save_shards
from envs import held_out_splits, setting_types
from policy import Policy

SHARDS = "shards"  # the folder of a sharded model and its optimizer, within a checkpoint
KEEP = 2  # the newest and the one before it
MAY_CHANGE = {  # flags that a resumed run may give another value, by what they change
    *("resume", "out", "cache", "report_to"),  # where things are
    *("iterations", "eval_every", "checkpoint_every"),  # when a run ends, is evaluated, is saved
    *("batch_size", "threads", "micro_batch_tokens", "gradient_checkpointing"),  # how work is divided: rounding alone
}  # and the sources of a world, see `_changed_flags`


class CheckpointError(SystemExit):
    """A checkpoint could not be written or read. Ends the program with its message, one line, unless it is caught."""


@dataclass
class RunState:
    """The position of a run, all of it JSON; a checkpoint keeps it in state.json."""

    config: dict  # every flag
    iteration: int = 0  # the last one that was learnt from
    next_task: int = 0  # number of the next training task
    unwritten: dict | None = None  # metrics of `iteration` until they are complete and written; then None
    before: dict | None = None  # evaluation of the first policy
    after: dict | None = None  # evaluation after `iteration`, if it was evaluated
    best: dict | None = None  # the evaluation with the most success, and its "iteration"
    saved: int = -1  # the iteration of the last checkpoint
    mixed_precision: str | None = None  # as Accelerate names it; None: an older run, which did not note it
    sources: dict | None = None  # see `sources_of`; None: an older run

    @property
    def last_written(self) -> int:
        """The last iteration whose metrics are complete; -1 for none."""
        return self.iteration if self.unwritten is None else self.iteration - 1

    def next_iteration(self, tasks_used: int, metrics: dict) -> None:
        """Go to the next iteration. metrics: what is known of it so far."""
        self.iteration, self.next_task = self.iteration + 1, self.next_task + tasks_used
        self.unwritten, self.after = metrics, None


def run_position(config: TrainConfig, mixed_precision: str) -> tuple[Path | None, RunState]:
    """The newest good checkpoint of the run in config.out and its state; None and a new state for a new run.

    mixed_precision: of this process, from its launcher.  A damaged checkpoint is named and skipped.
    Raises CheckpointError if there is a run but no --resume, --resume but no run, or if a flag or the precision changed
    that must not.
    """
    out, saved = config.out, checkpoints(Path(config.out))
    if not config.resume:
        if saved:
            raise CheckpointError(f"{out} holds a run already: continue it with --resume, or choose another --out")
        return None, RunState(asdict(config), unwritten={}, mixed_precision=mixed_precision, sources=sources_of(config))
    if not saved:
        raise CheckpointError(f"there is no checkpoint in {out} to resume from")
    newest = newest_good(saved)
    state = _state_of(newest)
    if changed := _changed_flags(config, state.config):
        raise CheckpointError(f"{out} was trained with {changed}; resume with the same, or choose another --out")
    sources = sources_of(config)
    if other := [flag for flag, digest in (state.sources or {}).items() if sources.get(flag, digest) != digest]:
        raise CheckpointError(f"what {other[0]} names is not what {out} was trained with; restore it to resume")
    state.sources = sources
    if state.mixed_precision not in (None, mixed_precision):
        raise CheckpointError(
            f"{out} was trained in mixed precision {state.mixed_precision}, and this launcher says {mixed_precision}: "
            f"resume with accelerate launch --mixed_precision {state.mixed_precision}"
        )
    state.config, state.mixed_precision = asdict(config), mixed_precision
    complete = state.after is not None or state.unwritten is not None  # the last iteration of a run is evaluated
    if config.iterations < state.iteration or (config.iterations == state.iteration and not complete):
        raise CheckpointError(f"{out} has {state.iteration} iterations already; ask for more with --iterations")
    return newest, state


def _state_of(folder: Path) -> RunState:
    """The state of a checkpoint. Raises CheckpointError if another version of this code wrote it."""
    try:
        state = RunState(**read_json(folder / "state.json"))
        if unknown := state.config.keys() - {field.name for field in fields(TrainConfig)}:
            raise ValueError(f"there is no flag --{min(unknown)}")
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is of another version of this code: {error}") from error
    return state


def _changed_flags(config: TrainConfig, before: dict) -> str:
    """The flags, with their values `before`, that have another value now and may not.

    Of the world's settings, a source may be at another place. It may not appear or vanish: the world would be another.
    """
    sources = _sources(config.env)

    def compared(value):
        if not isinstance(value, list):
            return value
        settings = dict(arg.partition("=")[::2] for arg in value)
        return {name: bool(place) if name in sources else place for name, place in settings.items()}

    flags = []
    for name, value in before.items():
        if name not in MAY_CHANGE and compared(getattr(config, name)) != compared(value):
            flags.append(f"--{name} {' '.join(value) if isinstance(value, list) else value}")
    return ", ".join(flags)


def _sources(env: str) -> set[str]:
    """Settings of a world that are texts: each names a file, a folder with code, a server or a data set on the hub."""
    return {name for name, kind in setting_types(env).items() if kind is str}


def newest_good(saved: list[Path]) -> Path:
    """The last of these checkpoints that is whole. Names those that it skips; CheckpointError if there is no other."""
    problems = []
    for folder in reversed(saved):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            tqdm.write(f"{problem}; resuming from {folder.name}")
        return folder
    raise CheckpointError(f"no checkpoint is whole: {'; '.join(problems)}")


# ------------------------------------------------------------------------------------------------- what a run saves


def save(
    out: Path, state: RunState, accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer
) -> Path:
    """Write the checkpoint of this iteration, unless it is there already; all ranks call this together.

    Older ones but KEEP are deleted.
    """
    folder = checkpoint_path(out, state.iteration)
    if state.saved != state.iteration:
        state.saved, weights = state.iteration, full_weights(policy.model)
        try:
            shards = save_shards(folder.with_name(".shards.partial"), policy.model, optimizer)
        except (Exception, CheckpointException) as error:  # torch raises an error of its own when a disk is full
            reason = f"could not save {folder} ({_reason(error)}); earlier checkpoints are untouched"
            raise CheckpointError(reason) from error

        def write(aside: Path) -> None:
            policy.save(aside, weights)
            if shards:
                os.replace(shards, aside / SHARDS)
            else:
                torch.save(optimizer.state_dict(), aside / "optimizer.pt")

        if accelerator.is_main_process:
            write_folder(folder, write, asdict(state))
            # A newer, damaged checkpoint may exist; it does not count towards KEEP.
            saved = checkpoints(out)
            for old in saved[: saved.index(folder) + 1][:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return folder


def keep_best(out: Path, state: RunState, accelerator: Accelerator, policy: Policy) -> None:
    """Keep the policy in OUT/best if none was better in its evaluation, `state.after`; all ranks call this together.

    The folder has no optimizer. Its state holds the evaluation, and the flags that eval.py repeats it with.
    """
    if state.best is None or state.after["success"] > state.best["success"]:
        state.best = {"iteration": state.iteration} | state.after
        weights = full_weights(policy.model)
        if accelerator.is_main_process:
            write_folder(out / "best", partial(policy.save, weights=weights), asdict(state))
    accelerator.wait_for_everyone()


def write_folder(folder: Path, write: Callable[[Path], None], state: dict) -> None:
    """Let `write` fill a folder, add the state and checksums. A folder of that name appears only when it is complete.

    Raises CheckpointError if it could not be written, and leaves what was there before untouched.
    """
    aside, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "replaced"))
    try:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_checksums(aside)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(aside, folder)
    except Exception as error:  # safetensors and torch raise errors of their own when the disk is full
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not save {folder} ({error}); earlier checkpoints are untouched") from error
    shutil.rmtree(replaced, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- what is on disk


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A copy under another name, such as checkpoint-best, is not one."""
    numbered = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_path(out: Path, iteration: int) -> Path:
    """Folder of an iteration's checkpoint; the names sort by iteration."""
    return out / f"checkpoint-{iteration:06d}"


def evaluation_of(player: str, strict: bool = True) -> dict:
    """How its training run evaluated a player, as values of EvalConfig; {} if it does not come from a run.

    They stand beside a checkpoint's weights, and for the policy that a run started from in the run's own folder. Flags
    of eval.py alone, such as files to write, are not taken from there.
    """
    same = {field.name for field in fields(EvalConfig)} & {field.name for field in fields(TrainConfig)} - {"policy"}
    for file in (Path(player) / "state.json", Path(player).parent / "config.json"):
        try:
            if (content := read_json(file)) == {}:  # the state of a warm start
                continue
            saved = content["config"]
            first, *_ = held_out_splits(saved["env"])
            own = {name: saved[name] for name in saved if name in same}
            own["env_args"] = [str(arg) for arg in saved["env_args"]]
            return own | {"split": [saved["eval_split"] or first], "tasks": saved["eval_tasks"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if strict and file.name == "state.json" and exists(file):
                raise CheckpointError(f"{file} does not say how it was trained: {error}") from error
    return {}


def world_settings(folder: Path | str, env: str, saved: list[str], typed: list[str]) -> list[str]:
    """The world's settings that a folder's run had; those that the command line gives go before them.

    The folder may be somebody else's, so a source is never taken from it. Ends the program with a line that says what
    to type.
    """
    texts = _sources(env)
    before, now = (dict(arg.partition("=")[::2] for arg in args) for args in (saved, typed))
    if sources := [f"{name}={value}" for name, value in before.items() if value and name in texts - now.keys()]:
        flag = f"--env_args {' '.join(map(shlex.quote, sources))}"
        flag = flag if flag.isprintable() else ascii(flag)
        fail(f"{folder} names a source, which is not taken from a folder; if you trust it, type: {flag}")
    return [f"{name}={value}" for name, value in (before | now).items()]


def sources_of(config: TrainConfig) -> dict[str, str]:
    """A digest of every file or folder that a flag names, by flag: the policy, and sources of the world."""
    settings = dict(arg.partition("=")[::2] for arg in config.env_args)
    named = {f"--env_args {name}": (settings[name], "**/*") for name in settings.keys() & _sources(config.env)}
    if config.policy_kind != "tiny":
        named["--policy"] = config.policy, "*"  # a run may write to a folder within that of its policy
    return {flag: content_digest(Path(path), files) for flag, (path, files) in named.items() if path and exists(path)}


def verify_checkpoint(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or not what was written."""
    expected = saved_checksums(folder)
    try:
        actual = checksums(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    for name in sorted({"state.json", *expected, *actual}):
        if expected.get(name) != actual.get(name) or name not in actual:
            state = "missing" if name not in actual else "damaged" if name in expected else f"not in {CHECKSUMS}"
            raise CheckpointError(f"{folder} cannot be used: {name} is {state}")


def restore(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer of a policy that was loaded from this checkpoint, in place; a sharded model, too."""
    try:
        with explain_out_of_memory("loading the optimizer", "take a smaller model, or divide it with --fsdp"):
            if not load_shards(folder / SHARDS, policy.model, optimizer):
                saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
                optimizer.load_state_dict(saved)
    except (Exception, CheckpointException) as error:  # the latter, of shards, is none of the former
        raise CheckpointError(f"{folder} cannot be restored: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]  # of one rank
    if isinstance(error, UnpicklingError):  # torch's own text advises to load it all the same
        return "it holds more than data"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def link_first_policy(link: Path, policy: str) -> None:
    """Let OUT/first_policy point to the policy that the run starts from, if it is a folder, for eval.py --compare."""
    if Path(policy).is_dir() and policy != str(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(policy).resolve(), target_is_directory=True)
