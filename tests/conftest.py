"""Fixtures and helpers that more than one test file uses."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: OpenMP's threads would spin while they wait, and take the cores from the other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import eval as evaluation
import train
from config import TrainConfig
from empg import Modulation
from engine import record
from engine.checkpoint import checkpoints
from envs import careless_player, make_envs
from episode import Episode, Task
from imitate import Imitation, dialogue, imitate
from policy import Dialogue, Policy
from rollout import play_scripted, rollout
from tiny import TinyConfig, tiny_policy

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and runs that tests start would inherit that

ROOT = Path(__file__).parents[1]
ALFWORLD_INSTALL = "pip install --no-deps -r requirements-alfworld.txt"
ALFWORLD_GAMES = {"train": 6, "valid_seen": 3, "valid_unseen": 3}  # of each split


@pytest.fixture(scope="session")
def alfworld_data(tmp_path_factory) -> str:
    """A folder with a few small games in all three splits; a test that needs it is skipped without the engine."""
    for package in ("alfworld", "textworld"):
        pytest.importorskip(package, reason=ALFWORLD_INSTALL)
    from worlds.alfworld_games import GamesConfig, write_games

    out = tmp_path_factory.mktemp("games")
    for split, number in ALFWORLD_GAMES.items():
        write_games(GamesConfig(str(out), split, number, receptacles=8, objects=8))
    return str(out)


@pytest.fixture(scope="session")
def house_policy() -> Policy:
    """A tiny policy that has seen a few dialogues of the house: it is unsure, and may or may not end its turns."""
    env, config = make_envs("house", [], 1)[0], TinyConfig(vocab_size=512, hidden_size=32, intermediate_size=64)
    played = play_scripted(env, [Task("house", "train", seed) for seed in range(60)], careless_player(0.3), seed=0)
    dialogues = [dialogue(env.instructions, episode) for episode in played]
    policy = tiny_policy(dialogues, config, seed=0)
    imitate(policy, dialogues, Imitation(learning_rate=4e-3))
    return policy


@pytest.fixture(scope="session")
def house_episodes(house_policy) -> list[Episode]:
    """Six episodes of 1, 2, 3, 4, 4 and 4 steps that were played in one batch at temperature 0.7."""
    envs = [make_envs("house", [f"max_steps={steps}"], 1)[0] for steps in (1, 2, 3, 4, 4, 4)]
    tasks = [Task("house", "eval", seed) for seed in range(6)]
    return rollout(house_policy, envs, tasks, [(0, task.seed) for task in tasks], temperature=0.7, max_step_tokens=20)


# Demonstrations that slip in every third step: about half of the episodes of a group succeed, at random.
SMALL = {
    "env": "coin",
    "iterations": 2,
    "tasks_per_iteration": 3,
    "group_size": 4,
    "mini_batches": 1,
    "demonstrations": 240,
    "slip": 0.6,
    "eval_tasks": 6,
    "eval_every": 2,
    "checkpoint_every": 2,
    "max_step_tokens": 24,
    "max_tokens": 256,
    "threads": 1,  # more are slower for so small a model, and far slower on a busy machine
}


@pytest.fixture(scope="session", autouse=True)
def without_pictures():
    """Runs in this process draw no curves.png, which takes longer than such a run. The README's command draws one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "draw_curves", lambda metrics, picture: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def each_template_once():
    """The pieces of a chat template are computed once for all the policies of a session that have it.

    A policy renders sixty dialogues for them, which takes a tenth of a small run.
    """
    compute = Policy._template_pieces

    def pieces(policy: Policy, texts: Dialogue) -> list[str]:
        key = (str(policy.tokenizer.chat_template), str(policy.tokenizer.special_tokens_map), *texts)
        if key not in found:
            found[key] = compute(policy, texts)
        return found[key]

    found: dict[tuple, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "_template_pieces", pieces)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("warm_starts")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache) -> Path:
    """A run of two iterations that nothing stops, with an evaluation after each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.train(TrainConfig(**SMALL | {"eval_every": 1, "out": str(out), "cache": str(cache)}))
    return out


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """A copy of that run in tmp_path/run, where run(resume=True) resumes it."""
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


@pytest.fixture
def run(tmp_path, cache):
    """run(name, **flags) trains in tmp_path/name and returns that folder."""

    def run(name: str = "run", assign_credit: Callable[..., Modulation] = train.assign_credit, **flags) -> Path:
        config = TrainConfig(**SMALL | {"out": str(tmp_path / name), "cache": str(cache)} | flags)
        train.train(config, assign_credit)
        return tmp_path / name

    return run


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """eval.py in this process: its result."""

    def call(*argv: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv, "--threads", "1"])
        evaluation.main()
        return json.loads(capsys.readouterr().out.strip().split("\n")[-1])

    return call


@pytest.fixture
def no_precision_yet(monkeypatch):
    """Accelerate allows one mixed precision and one device in a process, and other tests have theirs."""
    threads = torch.get_num_threads()
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- helpers


def without_locks(cache: Path) -> list[Path]:
    """What is in a cache of warm starts beside the files that lock it."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def flags_of(settings: dict) -> list[str]:
    """The settings as flags of a command."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for the condition."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.1)


def rows(out: Path) -> list[dict]:
    """The metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_metrics(one: list[dict], other: list[dict], tolerance: float) -> None:
    """Asserts that two runs have the same metrics, to the tolerance."""
    for a, b in zip(one, other, strict=True):
        # A norm adds up all gradients, in another order.
        assert b.pop("policy/grad_norm", 0) == pytest.approx(a.pop("policy/grad_norm", 0), rel=max(tolerance, 1e-4))
        assert b == pytest.approx(a, abs=tolerance, rel=tolerance)


def same_weights(a: Path, b: Path, atol: float = 0.0) -> bool:
    """Whether two checkpoints, or the newest ones of two runs, hold the same weights, to `atol`."""
    a, b = (load_file([out, *checkpoints(out)][-1] / "model.safetensors") for out in (a, b))
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)
