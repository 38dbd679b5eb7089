"""Two processes against one: divided data (DDP) and divided models (FSDP2), on CPUs, through the launcher."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL
from safetensors.torch import load_file

import eval as evaluation
import train
from config import TrainConfig
from engine import checkpoint
from engine.ranks import full_weights
from envs import make_envs
from policy import load_policy

ROOT = Path(__file__).parents[2]
RUN = SMALL | {"algorithm": "dapo", "kl_coef": 0.1, "iterations": 4, "micro_batch_tokens": 300}  # several parts a rank

# Trains one run after another in the processes of one launch: the flags of each are the argument. A run in a folder
# "early" is stopped, as by SIGTERM, before its first update.
SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule

Accelerator.end_training = lambda self: None  # it would part the processes
learn = train.learn

def watched(config, learner, batch, iteration):
    result = learn(config, learner, batch, iteration)
    models = [model for model in (learner.model, learner.reference) if model is not None]
    parts = [sum(p.to_local().numel() / p.numel() for p in model.parameters()) / len([*model.parameters()])
             if isinstance(model, FSDPModule) else 1.0 for model in models]
    if learner.accelerator.is_main_process:
        with open(config.out + "/parts.jsonl", "a") as file:
            file.write(json.dumps([learner.accelerator.num_processes, *parts]) + "\\n")
    return result

sample_groups = train.sample_groups

def stopped_early(config, *rest):
    if config.out.endswith("early") and not config.resume:
        raise train.Stopped
    return sample_groups(config, *rest)

train.learn, train.sample_groups = watched, stopped_early
for flags in json.loads(sys.argv[1]):
    sys.argv[1:] = flags
    try:
        train.main()
    except SystemExit as end:
        assert str(end) == "stopped after iteration 0; go on with --resume"
    AcceleratorState._reset_state()
"""


def flags_of(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("warm_starts"))


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache) -> Path:
    """The run by this process alone."""
    out = tmp_path_factory.mktemp("one") / "run"
    train.train(TrainConfig(**RUN | {"out": str(out), "cache": cache}))
    return out


@pytest.fixture(scope="module")
def launch(tmp_path_factory, cache):
    """launch(ranks, [flags of a run, ...]) trains one run after another, and returns their folder."""

    def launch(ranks: int, runs: list[dict], folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("ranks")
        (folder / "script.py").write_text(SCRIPT)
        flags = [flags_of(RUN | {"cache": cache} | run | {"out": folder / run["out"]}) for run in runs]
        command = [
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            str(folder / "script.py"),
            json.dumps(flags),
        ]
        environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return folder

    return launch


@pytest.fixture(scope="module")
def sharded(launch) -> Path:
    """Two ranks with sharded models: four iterations; two and a resumed run of two more; none and then four."""
    runs = [{"out": "whole"}, {"out": "parts", "iterations": 2}, {"out": "parts", "resume": True}]
    runs += [{"out": "early"}, {"out": "early", "resume": True}]
    return launch(2, [run | {"fsdp": True} for run in runs])


def same_metrics(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        # A norm adds up all gradients in another order.
        assert b.pop("policy/grad_norm", 0) == pytest.approx(a.pop("policy/grad_norm", 0), rel=max(tolerance, 1e-5))
        assert b == pytest.approx(a, abs=tolerance, rel=tolerance)


def same_weights(one: Path, other: Path, name: str, tolerance: float) -> None:
    a, b = (load_file(out / name / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= tolerance


def parts(out: Path) -> set[tuple]:
    """The number of ranks, and the shares of policy and reference that the main process held after an update."""
    lines = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    return {(ranks, *(round(share, 2) for share in shares)) for ranks, *shares in lines}


def test_two_ranks_do_what_one_does(one, launch):
    folder = launch(2, [{"out": "run"}])
    assert parts(folder / "run") == {(2, 1.0, 1.0)}
    same_metrics(one, folder / "run", 1e-6)
    same_weights(one, folder / "run", "checkpoint-000004", 1e-4)


def test_two_ranks_with_sharded_models_do_what_one_does(one, sharded):
    """What is sharded was silently whole on CPUs, where Accelerate takes DDP."""
    assert parts(sharded / "whole") == {(2, 0.5, 0.5)}
    same_metrics(one, sharded / "whole", 1e-4)
    same_weights(one, sharded / "whole", "checkpoint-000004", 1e-4)


def test_a_sharded_run_is_resumed_bit_for_bit(sharded):
    """Also one that was stopped before its first update, when torch makes an optimizer's state by a step of its own."""
    whole, parts, early = (sharded / name for name in ("whole", "parts", "early"))
    for resumed in (parts, early):
        assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
        same_weights(whole, resumed, "checkpoint-000004", 0.0)
    assert {path.name for path in (parts / "checkpoint-000004" / "shards").iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    }


def test_a_sharded_run_is_resumed_on_another_number_of_ranks(one, sharded, launch, cache, tmp_path):
    launch(3, [{"out": "parts", "iterations": 5, "fsdp": True, "resume": True}], sharded)
    assert {ranks for ranks, *shares in parts(sharded / "parts") if max(shares) < 0.4} == {3}
    shutil.copytree(one, tmp_path / "one", symlinks=True)
    more = {"out": str(tmp_path / "one"), "cache": cache, "iterations": 5, "resume": True}
    train.train(TrainConfig(**RUN | more))
    same_metrics(tmp_path / "one", sharded / "parts", 1e-4)


def test_the_full_checkpoint_of_a_sharded_run_opens_and_plays(sharded):
    state = json.loads((sharded / "whole" / "checkpoint-000004" / "state.json").read_text())
    config = TrainConfig(**RUN | {"out": str(sharded / "whole")})
    policy, accelerator = load_policy(str(sharded / "whole" / "checkpoint-000004")), evaluation.start_ranks(1)
    assert policy.model.config.architectures == ["Qwen2ForCausalLM"]
    tasks = evaluation.first_tasks(make_envs("coin", [], 1)[0], "coin", config.held_out, 6)
    played = evaluation.evaluate(policy, make_envs("coin", [], 6), tasks, config, accelerator)
    assert evaluation.summarize(played) == state["after"]
    assert full_weights(policy.model) is None


def test_shards_that_cannot_be_written_end_the_run_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_shards", full)
    learner = SimpleNamespace(policy=SimpleNamespace(model=None), optimizer=None, accelerator=None)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        checkpoint.save(TrainConfig(**RUN | {"out": str(tmp_path)}), learner, {"iteration": 1})


@pytest.mark.parametrize(("fsdp", "message"), [(True, "launch at least two"), (False, "runs/accelerate, and --fsdp")])
def test_a_launch_that_does_not_fit_the_flag_is_refused(fsdp, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # a launcher's configuration of type FSDP
    with pytest.raises(SystemExit, match=message):
        train.train(TrainConfig(**RUN | {"out": str(tmp_path / "run"), "fsdp": fsdp}))
    assert not (tmp_path / "run").exists()
