"""Checkpoints that survive a full disk, a kill, a flipped bit: written aside, renamed when whole, verified when read.

A checkpoint is a folder that `from_pretrained` opens, with the optimizer, the position in the run and a checksum of
every file beside it. There is no random state to keep: every random number of a run comes from its seed, the task and
the episode (see rollout.py).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from config import TrainConfig
from engine.ranks import full_weights, load_shards, save_shards
from policy import Policy
from update import Learner

CHECKSUMS = "sha256.json"
SHARDS = "shards"  # the folder of a sharded model and its optimizer, within a checkpoint
KEEP = 2  # the newest and the one before it
FREE = {"iterations", "resume", "out", "cache", "eval_every", "checkpoint_every", "report_to", "batch_size", "threads"}
FREE |= {"dry_run", "gpu_memory"}


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message is one line for the user."""


def run_position(config: TrainConfig) -> tuple[Path | None, dict]:
    """The newest good checkpoint of the run in config.out and its state; None and a new state for a new run.

    The state is JSON: "iteration", the last one that was learnt from; "next_task"; "config"; the evaluations "before",
    "after" (of this iteration) and "best"; "row", the metrics of the iteration while its evaluation is still to come;
    "saved", the iteration at the last save.  A damaged checkpoint is named and passed over.
    Raises CheckpointError unless --resume says which of the two is meant and the checkpoint fits the configuration.
    """
    out, saved = config.out, checkpoints(Path(config.out))
    if not config.resume:
        if saved:
            raise CheckpointError(
                f"{out} holds a run already: go on with --resume, or choose another folder with --out"
            )
        return None, {"iteration": 0, "next_task": 0, "row": {}, "after": None, "config": asdict(config)}
    if not saved:
        raise CheckpointError(f"there is no checkpoint in {out} to resume from")
    newest = newest_good(saved)
    state = json.loads((newest / "state.json").read_text())
    changed = {
        name: value for name, value in state["config"].items() if name not in FREE and getattr(config, name) != value
    }
    if changed:
        flags = ", ".join(
            f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in changed.items()
        )
        raise CheckpointError(f"{out} was trained with {flags}; resume with the same, or start anew with another --out")
    complete = state.get("after") or "row" in state  # the last iteration of a run is evaluated
    if config.iterations < state["iteration"] or (config.iterations == state["iteration"] and not complete):
        raise CheckpointError(f"{out} has {state['iteration']} iterations already; ask for more with --iterations")
    return newest, state


def newest_good(saved: list[Path]) -> Path:
    """The last of these checkpoints that is whole. Says which it passes over; CheckpointError if there is no other."""
    problems = []
    for folder in reversed(saved):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            tqdm.write(f"{problem}; going on from {folder.name}")
        return folder
    raise CheckpointError(f"no checkpoint is whole: {'; '.join(problems)}")


# ------------------------------------------------------------------------------------------------- what a run saves


def save(config: TrainConfig, learner: Learner, state: dict) -> None:
    """The checkpoint of this iteration, unless it is saved already; all ranks call this together."""
    if state.get("saved") != state["iteration"]:
        state["saved"] = state["iteration"]
        folder, model = checkpoint_path(Path(config.out), state["iteration"]), learner.policy.model
        weights = full_weights(model)
        try:
            shards = save_shards(folder.with_name(".shards.partial"), model, learner.optimizer)
        except Exception as error:  # torch raises an error of its own when a disk is full
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"could not save {folder} ({reason}); earlier checkpoints are untouched") from error
        if learner.accelerator.is_main_process:
            save_checkpoint(folder, learner.policy, learner.optimizer, state, weights, shards)
    learner.accelerator.wait_for_everyone()


def keep_best(config: TrainConfig, learner: Learner, state: dict) -> None:
    """Keep the policy in OUT/best if none was better in its evaluation, state["after"]; all ranks call this together.

    The folder has no optimizer. Its state holds the evaluation, and the flags that eval.py repeats it with.
    """
    if state["after"]["success"] > state.get("best", {"success": -1})["success"]:
        state["best"] = {"iteration": state["iteration"]} | state["after"]
        weights = full_weights(learner.policy.model)
        if learner.accelerator.is_main_process:
            write_folder(Path(config.out) / "best", partial(learner.policy.save, weights=weights), state)
    learner.accelerator.wait_for_everyone()


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict,
    weights: dict[str, torch.Tensor] | None = None,
    shards: Path | None = None,
) -> None:
    """Write a checkpoint, see `write_folder`. Older ones but KEEP are deleted.

    state: what resuming needs beside weights and optimizer, JSON.  weights, shards: of a sharded model (sharding.py).
    """

    def write(aside: Path) -> None:
        policy.save(aside, weights)
        if shards:
            os.replace(shards, aside / SHARDS)
        else:
            torch.save(optimizer.state_dict(), aside / "optimizer.pt")

    write_folder(folder, write, state)
    # A newer one is here if it was damaged and passed over; it does not count.
    saved = checkpoints(folder.parent)
    for old in saved[: saved.index(folder) + 1][:-KEEP]:
        shutil.rmtree(old)


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
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        (aside / CHECKSUMS).write_text(json.dumps(_checksums(aside), indent=1))
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


def verify_checkpoint(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or not what was written."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        actual = _checksums(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint ({error})") from error
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder} is no complete checkpoint ({CHECKSUMS} holds no checksums)")
    for name in sorted({"state.json", *expected, *actual}):
        if expected.get(name) != actual.get(name) or name not in actual:
            state = "missing" if name not in actual else "damaged" if name in expected else f"not in {CHECKSUMS}"
            raise CheckpointError(f"{folder} cannot be used: {name} is {state}")


def restore(folder: Path, learner: Learner) -> None:
    """Restore the optimizer of a learner whose policy was loaded from this checkpoint, in place."""
    if (folder / SHARDS).exists():
        load_shards(folder / SHARDS, learner.policy.model, learner.optimizer)
    else:
        load_optimizer(folder, learner.optimizer)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer, in place."""
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
