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
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from config import TrainConfig
from policy import Policy

CHECKSUMS = "sha256.json"
KEEP = 2  # the newest and the one before it


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message is one line for the user."""


def run_position(config: TrainConfig) -> tuple[Path | None, dict]:
    """The newest checkpoint of the run in config.out and the state saved with it; None and a new state for a new run.

    Raises CheckpointError unless --resume says which of the two is meant and the checkpoint fits the configuration.
    """
    out, saved = config.out, checkpoints(Path(config.out))
    if not config.resume:
        if saved:
            raise CheckpointError(
                f"{out} holds a run already: go on with --resume, or choose another folder with --out"
            )
        return None, {"iteration": 0, "next_task": 0, "config": asdict(config)}
    if not saved:
        raise CheckpointError(f"there is no checkpoint in {out} to resume from")
    verify_checkpoint(saved[-1])
    state = json.loads((saved[-1] / "state.json").read_text())
    free = (
        "iterations",
        "resume",
        "out",
        "cache",
        "eval_every",
        "checkpoint_every",
        "report_to",
        "batch_size",
        "threads",
    )
    changed = [name for name, value in state["config"].items() if name not in free and getattr(config, name) != value]
    if changed:
        flags = ", ".join(f"--{name} {state['config'][name]}" for name in changed)
        raise CheckpointError(f"{out} was trained with {flags}; resume with the same, or start anew with another --out")
    if config.iterations < state["iteration"] or (config.iterations == state["iteration"] and "after" not in state):
        raise CheckpointError(f"{out} has {state['iteration']} iterations already; ask for more with --iterations")
    return saved[-1], state


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write a checkpoint; a folder of that name appears only when it is complete. Older ones but KEEP are deleted.

    state: what resuming needs beside weights and optimizer, JSON.  Raises CheckpointError if it could not be written,
    and leaves what was there before untouched.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        policy.save(aside)
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        (aside / CHECKSUMS).write_text(json.dumps(_checksums(aside), indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except Exception as error:  # safetensors and torch raise errors of their own when the disk is full
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not save {folder} ({error}); earlier checkpoints are untouched") from error
    for old in checkpoints(folder.parent)[:-KEEP]:
        shutil.rmtree(old)


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
    for name in sorted({"state.json", "optimizer.pt", *expected, *actual}):
        if expected.get(name) != actual.get(name) or name not in actual:
            state = "missing" if name not in actual else "damaged" if name in expected else f"not in {CHECKSUMS}"
            raise CheckpointError(f"{folder} cannot be used: {name} is {state}; delete the folder to fall back")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer, in place."""
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StopRequest:
    """Ctrl-C, or SIGTERM, asks a run to stop when its iteration is complete; a second Ctrl-C stops it at once."""

    def __init__(self):
        self.since: float | None = None
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, _frame) -> None:
        # A launcher passes on the signal that the terminal has already sent: the same key press, not a second one.
        if number == signal.SIGINT and self.since is not None and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if self.since is None:
            self.since = time.monotonic()
            tqdm.write("stopping when this iteration is complete; Ctrl-C once more stops at once and loses it")

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked; all ranks must call this together and get the same answer."""
        return any(gather_object([self.since is not None]))
