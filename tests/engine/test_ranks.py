"""Several processes against one: divided data (DDP), divided models (FSDP2), kills, and threads, on CPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SMALL, flags_of, rows, same_metrics, same_weights, without_locks
from torch.distributed.fsdp import FSDPModule

import eval as evaluation
import imitate
import train
from config import TrainConfig
from engine import checkpoint, ranks
from engine.checkpoint import RunState
from engine.ranks import cpu_threads, full_weights, start_ranks
from engine.record import RecordError, eval_metrics, precision_of
from engine.stopping import Stopped
from envs import make_envs
from policy import load_policy
from tests import soak

IMITATION = {"env": "coin", "demonstrations": 24, "max_tokens": 512, "threads": 1}
RUN = SMALL | {"algorithm": "dapo", "kl_coef": 0.1, "micro_batch_tokens": 300, "checkpoint_every": 1, "eval_every": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache) -> Path:
    """The run by this process alone."""
    out = tmp_path_factory.mktemp("one") / "run"
    train.train(TrainConfig(**RUN | {"out": str(out), "cache": str(cache)}))
    return out


@pytest.fixture(scope="module")
def several(one, cache, tmp_path_factory) -> Path:
    """The same run by two ranks, in the folder "run", and what eval.py says of it on two ranks, in eval.json. With
    models divided among two ranks: the imitation of a policy, in "imitated"; a run, in "whole"; and "parts", resumed
    after none of its iterations, after one, and after two by three ranks. What each printed is in a file of its number.

    The ranks are forks of this process. The run in "parts" is first stopped, as by SIGTERM, before its first update."""
    folder, update, sample_groups = tmp_path_factory.mktemp("ranks"), train.update, train.sample_groups

    def watched(config, learner, *rest):
        result = update(config, learner, *rest)
        models = [model for model in (learner.model, learner.reference) if model is not None]
        if learner.accelerator.is_main_process:
            with (Path(config.out) / "parts.jsonl").open("a") as file:
                print(json.dumps([learner.accelerator.num_processes, *map(share, models)]), file=file)
        return result

    def stopped_early(config, *rest):
        if config.out.endswith("parts") and not config.resume:
            raise Stopped
        return sample_groups(config, *rest)

    def job(out: str, ranks: int = 2, said: str = "", **flags) -> tuple:
        return train.main, ranks, RUN | {"cache": cache, "out": folder / out} | flags, said

    played = {"policy": folder / "run" / "checkpoint-000002", "json": folder / "eval.json", "threads": 1}
    stopped = "checkpoint-000000 is complete; resume with --resume"
    jobs = [job("run"), (evaluation.main, 2, played, "")]
    jobs += [(imitate.main, 2, IMITATION | {"policy": one / "best", "cache": folder / "imitated", "fsdp": True}, "")]
    jobs += [job("whole", fsdp=True), job("parts", fsdp=True, said=stopped)]
    jobs += [job("parts", number, fsdp=True, resume=True, iterations=n) for number, n in ((2, 1), (2, 2), (3, 3))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", watched)
        patch.setattr(train, "sample_groups", stopped_early)
        for number, (main, ranks, flags, said) in enumerate(jobs):
            log = folder / f"{number}.txt"
            codes, _ = soak.end(soak.start(flags_of(flags), ranks, log, main))
            assert codes == [1 if said else 0] * ranks, log.read_text()
            assert said in log.read_text()
    return folder


def share(model: torch.nn.Module) -> float:
    """The mean part of a parameter that this process holds."""
    if not isinstance(model, FSDPModule):
        return 1.0
    return mean(p.to_local().numel() / p.numel() for p in model.parameters())


def parts(out: Path) -> list[tuple]:
    """The number of ranks, and the shares of policy and reference that the main process held after each update."""
    lines = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    return [(ranks, *(round(share, 2) for share in shares)) for ranks, *shares in lines]


def test_two_ranks_train_and_evaluate_as_one_does(one, several):
    """Statistics per rank, or rows that were doubled to fill a batch, gave other advantages (ARLArena). And
    `accelerate launch --cpu --num_processes 2` starts one process, so that one rank was compared with one."""
    assert parts(several / "run") == [(2, 1.0, 1.0)] * 2
    same_metrics(rows(one), rows(several / "run"), 1e-6)
    assert same_weights(one, several / "run", 1e-4)  # a quarter of one step of Adam
    (evaluated,) = json.loads((several / "eval.json").read_text()).values()
    assert eval_metrics(evaluated).items() <= rows(several / "run")[-1].items()


def test_results_come_in_the_order_of_the_jobs_whoever_played_them(monkeypatch):
    """Two players are compared task by task, and groups are consecutive episodes."""
    accelerators = [SimpleNamespace(process_index=rank, num_processes=2) for rank in (0, 1)]
    shares: list[list] = []

    def play(jobs: list[str]) -> list[str]:
        return [job.upper() for job in jobs]

    monkeypatch.setattr(ranks, "gather_or_stop", lambda mine: shares.append(mine()) or [])
    for accelerator in accelerators:
        ranks.play_over_ranks(accelerator, "abcde", play)
    assert sorted(map(len, shares)) == [2, 3]
    monkeypatch.setattr(ranks, "gather_or_stop", lambda mine: shares[0] + shares[1])
    for accelerator in accelerators:
        assert ranks.play_over_ranks(accelerator, "abcde", play) == list("ABCDE")


def test_two_ranks_with_sharded_models_do_what_one_does(one, several):
    """What is sharded was silently whole on CPUs, where Accelerate takes DDP."""
    assert parts(several / "whole") == [(2, 0.5, 0.5)] * 2
    same_metrics(rows(one), rows(several / "whole"), 1e-4)
    assert same_weights(one, several / "whole", 1e-4)


def test_a_sharded_run_is_resumed_bit_for_bit(several):
    """Also before its first update, when torch makes an optimizer's state by a step of its own."""
    whole, resumed = ((several / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts"))
    assert resumed[:3] == whole
    assert same_weights(several / "whole" / "checkpoint-000002", several / "parts" / "checkpoint-000002")
    assert {path.name for path in (several / "parts" / "checkpoint-000002" / "shards").iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    }


def test_a_sharded_run_is_resumed_on_another_number_of_ranks(one, several, cache, tmp_path):
    shares = parts(several / "parts")
    assert shares[:2] == [(2, 0.5, 0.5)] * 2
    assert shares[2][0] == 3
    assert max(shares[2][1:]) < 0.4
    shutil.copytree(one, tmp_path / "one", symlinks=True)
    more = {"out": str(tmp_path / "one"), "cache": str(cache), "iterations": 3, "resume": True}
    train.train(TrainConfig(**RUN | more))
    same_metrics(rows(tmp_path / "one"), rows(several / "parts"), 1e-4)


def test_a_run_killed_at_random_moments_comes_out_the_same(whole, cache, tmp_path, capsys):
    """`python tests/soak.py --kills 20`, and with --ranks 2, for more of it."""
    (tmp_path / "warm_starts").symlink_to(cache)  # `whole` has put the same imitation there
    assert soak.soak(kills=3, ranks=1, seed=0, extra=["--iterations", "4"], folder=tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"3 kills in [123] runs: metrics, weights and optimizer equal to .*, bit for bit", last)


def test_a_policy_imitates_once_however_many_processes_there_are(one, several, tmp_path, monkeypatch, capsys):
    """`python imitate.py` prints the folder that train.py starts from. Two sharded ranks find that of one process."""
    flags = flags_of(IMITATION | {"policy": one / "best", "cache": tmp_path})
    monkeypatch.setattr(sys, "argv", ["imitate.py", *flags])
    imitate.main()
    (folder,) = without_locks(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    (log,) = [path for path in several.glob("?.txt") if str(several / "imitated") in path.read_text()]
    assert log.read_text().count(str(several / "imitated" / folder.name)) == 1
    assert same_weights(folder, several / "imitated" / folder.name)
    assert not same_weights(folder, one / "best")
    monkeypatch.setattr(sys, "argv", ["imitate.py", "--policy", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        imitate.main()
    assert capsys.readouterr().err.endswith("error: there is nothing to imitate: set --demonstrations\n")


def test_the_full_checkpoint_of_a_sharded_run_opens_and_plays(several):
    state = json.loads((several / "whole" / "checkpoint-000002" / "state.json").read_text())
    config = TrainConfig(**RUN | {"out": str(several / "whole")})
    policy, accelerator = load_policy(str(several / "whole" / "checkpoint-000002")), start_ranks(1)
    assert policy.model.config.architectures == ["Qwen2ForCausalLM"]
    tasks = evaluation.first_tasks(make_envs("coin", [], 1)[0], "coin", config.held_out, 6)
    played = evaluation.evaluate(policy, make_envs("coin", [], 6), tasks, config, accelerator)
    assert evaluation.summarize(played) == state["after"]
    assert full_weights(policy.model) is None


def test_shards_that_cannot_be_written_end_the_run_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_shards", full)
    state, policy = RunState({}, iteration=1), SimpleNamespace(model=None)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        checkpoint.save(tmp_path, state, accelerator=None, policy=policy, optimizer=None)


@pytest.mark.parametrize(("fsdp", "message"), [(True, "launch at least two"), (False, "runs/accelerate, and --fsdp")])
def test_a_launch_that_does_not_fit_the_flag_is_refused(fsdp, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # a launcher's configuration of type FSDP
    with pytest.raises(SystemExit, match=message):
        train.train(TrainConfig(**RUN | {"out": str(tmp_path / "run"), "fsdp": fsdp}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "True"),
        ("FSDP_IGNORED_MODULES", ".*lm_head"),
    ],
)
def test_settings_of_a_launcher_that_change_the_algorithm_are_refused(name, value, tmp_path, monkeypatch):
    """Eight accumulation steps divided every gradient by 8 (accelerate#1011): grad_norm 0.00642 for 0.05136."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"the launcher sets {re.escape(f'{name}={value}')}, which") as end:
        train.train(TrainConfig(**RUN | {"out": str(tmp_path / "run")}))
    assert "\n" not in str(end.value)
    assert not (tmp_path / "run").exists()


def test_what_accelerate_launch_sets_by_default_is_accepted(monkeypatch):
    sets = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "USE_CPU": "False"}
    sets |= {"GRADIENT_ACCUMULATION_STEPS": "1", "USE_DEEPSPEED": "false", "USE_FSDP": "false"}
    for name, value in sets.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert start_ranks(1).gradient_accumulation_steps == 1


# -------------------------------------------------------------------------------------------------- mixed precision


@pytest.fixture
def launched_with(monkeypatch):
    """launched_with(precision): what follows runs as under a launcher that says so."""

    def call(precision: str | None) -> None:
        AcceleratorState._reset_state()
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if precision:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)

    yield call
    AcceleratorState._reset_state()


def test_mixed_precision_is_written_with_the_run_and_found_again(launched_with, evaluate, run, tmp_path):
    """A run in bf16 said 18.8 %, and eval.py, which knew nothing of it, 18.0 %."""
    launched_with("bf16")
    out = run("half", iterations=1, eval_every=1)
    last, before = out / "checkpoint-000001", out / "first_policy"
    assert json.loads((out / "config.json").read_text())["mixed_precision"] == "bf16"
    assert json.loads((last / "state.json").read_text())["mixed_precision"] == "bf16"
    for launcher in (None, "no", "bf16"):  # python eval.py, accelerate launch eval.py
        launched_with(launcher)
        for player, row in ((last, 1), (before, 0), (out / "best", 1)):
            (result,) = evaluate("--policy", str(player)).values()
            assert eval_metrics(result).items() <= rows(out)[row].items()
            assert start_ranks(1, mixed_precision=precision_of([str(player)])).mixed_precision == "bf16"
    for launcher in (None, "no"):
        launched_with(launcher)
        with pytest.raises(checkpoint.CheckpointError, match=r"in mixed precision bf16.* launcher says no: res"):
            run("half", iterations=2, resume=True)
    launched_with("bf16")
    run("half", iterations=2, resume=True)
    state = json.loads((last / "state.json").read_text())
    (last / "state.json").write_text(json.dumps({name: state[name] for name in state if name != "mixed_precision"}))
    assert precision_of([str(last)]) == "bf16"  # of the run's own config.json


@pytest.mark.parametrize(
    ("runs", "launcher", "message"),
    [
        (["no"], "bf16", "a0/x says no and this launcher says bf16"),
        (["bf16", "no"], "no", "a0/x says bf16 and .*a1/x says no"),
    ],
)
def test_precisions_that_differ_are_refused_in_one_line(runs, launcher, message, launched_with, tmp_path, evaluate):
    for number, precision in enumerate(runs):
        (tmp_path / f"a{number}" / "x").mkdir(parents=True)
        state = {"mixed_precision": precision, "config": asdict(TrainConfig(env="coin"))}
        (tmp_path / f"a{number}" / "x" / "state.json").write_text(json.dumps(state))
    launched_with(launcher)
    players = [str(tmp_path / f"a{number}" / "x") for number in range(len(runs))]
    with pytest.raises(RecordError, match=message) as end:
        evaluate(*(["--compare", *players] if len(players) > 1 else ["--policy", *players]), "--env", "coin")
    assert "\n" not in str(end.value)


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def started_by(monkeypatch):
    """started_by(**environment) lets this process be one that a launcher with that environment started."""
    launchers = []

    def call(**environment: str) -> None:
        launchers.append(subprocess.Popen(["sleep", "60"], env={"PATH": os.defpath} | environment))
        while not Path(f"/proc/{launchers[-1].pid}/environ").read_bytes():  # it is not there at once
            pass
        monkeypatch.setattr(os, "getppid", lambda: launchers[-1].pid)
        monkeypatch.setenv("LOCAL_RANK", "0")

    yield call
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


@pytest.fixture
def six_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of the machine: a container may use some of them
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_threads_are_the_share_of_the_cores_that_the_process_may_use(six_cores):
    assert [cpu_threads(processes) for processes in (1, 2, 4, 9)] == [6, 3, 1, 1]


def test_the_users_omp_num_threads_counts(six_cores, started_by, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_threads(1) == 1
    started_by(OMP_NUM_THREADS="1")
    assert cpu_threads(2) == 1
    started_by()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cpu_threads(2) == 5
    for none in ("0", "", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", none)
        assert cpu_threads(2) == 3


def test_the_1_that_a_launcher_sets_does_not_count(six_cores, started_by, monkeypatch):
    """Every run by the README's command had one thread."""
    started_by()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_threads(2) == 3
    monkeypatch.delenv("LOCAL_RANK")
    assert cpu_threads(2) == 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert cpu_threads(2) == 3
