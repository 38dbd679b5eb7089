"""Kill a run at random moments, resume it until it is finished, and compare it with the same run left alone.

    python tests/soak.py --kills 20                         one process
    python tests/soak.py --kills 20 --ranks 2               two processes, gradients averaged by DDP
    python tests/soak.py --kills 20 --ranks 2 -- --fsdp     the model divided among them; flags after -- go to train.py

Kills alternate. SIGKILL hits one rank at random, and the others are then ended as a launcher ends them. SIGTERM goes to
all ranks, as when a cluster takes its machines back. Metrics, weights and the optimizer must be equal bit for bit.

train.py is imported once, and its ranks are forks: a start costs a second instead of ten. Tests of several processes
start theirs in the same way.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from engine import record
from engine.checkpoint import SHARDS, checkpoints, verify_checkpoint

# Every iteration has something to lose: a checkpoint, every second one an evaluation.
RUN = {
    "env": "coin", "iterations": 6, "tasks_per_iteration": 4, "group_size": 4, "demonstrations": 240, "slip": 0.6,
    "eval_tasks": 8, "eval_every": 2, "checkpoint_every": 1, "max_step_tokens": 24, "max_tokens": 256, "threads": 1,
}  # fmt: skip
LATE = ("torch._dynamo", "transformers.models.qwen2.modeling_qwen2")  # what a run imports only when it trains
GRACE = 60  # seconds that ranks have to end after SIGTERM


def start(flags: list[str], ranks: int, log: Path, main: Callable[[], None] = train.main) -> list[int]:
    """Fork the ranks of `train.py FLAGS`; returns their process ids. What they print goes to the log.

    main: of another program, in the place of train.py's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [os.fork() or _rank(flags, rank, ranks, port, log, main) for rank in range(ranks)]


def _rank(flags: list[str], rank: int, ranks: int, port: int, log: Path, main: Callable[[], None]) -> None:
    """The life of a forked rank; it never returns."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)  # pytest's are other ones
        AcceleratorState._reset_state(reset_partial_state=True)  # of the parent, which may have run alone
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all forks; one that was killed may still hold it
        if ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()}
        sys.argv = ["train.py", *flags]
        main()
        code = 0
    except SystemExit as end:
        print(end, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pids: list[int]) -> tuple[list[int], float]:
    """Wait until all ranks have ended; returns how: 0, 1, or minus a signal; and the most CPU seconds of a rank.

    When a rank fails, the others get SIGTERM at once and SIGKILL after GRACE seconds, as from a launcher.
    """
    codes, seconds, failed = {}, 0.0, None
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                seconds = max(seconds, used.ru_utime + used.ru_stime)
        open_ranks = [pid for pid in pids if pid not in codes]
        if failed is None and any(codes.values()):
            failed = time.monotonic()
            send(signal.SIGTERM, open_ranks)
        if failed is not None and time.monotonic() - failed > GRACE:
            send(signal.SIGKILL, open_ranks)
        time.sleep(0.01)
    return [codes[pid] for pid in pids], seconds


def wait(pid: int, seconds: float) -> None:
    """Until a process has used so many CPU seconds, or has ended. On a busy machine CPU time is what says how far."""
    while True:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state == "Z" or (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return
        time.sleep(0.002)


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def flags_of(out: Path, extra: list[str]) -> list[str]:
    resume = ["--resume"] if checkpoints(out) else []
    settings = RUN | {"out": out, "cache": out.parent / "warm_starts"}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))] + resume + extra


def differences(a: Path, b: Path) -> list[str]:
    """Names of what is not equal bit for bit in two finished runs."""
    names = ("metrics.jsonl", "result.json")
    different = [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]
    last = [checkpoints(out)[-1] for out in (a, b)]
    for folders in (last, [a / "best", b / "best"]):
        weights = [load_file(folder / "model.safetensors") for folder in folders]
        if not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]):
            different.append(f"weights of {folders[0].name}")
    for folder in last:
        verify_checkpoint(folder)
    first, second = (optimizer_state(folder) for folder in last)
    if len(first) != len(second) or not all(map(torch.equal, first, second)):
        different.append("optimizer")
    return different


def optimizer_state(folder: Path) -> list[torch.Tensor]:
    """Moments and numbers of steps of a checkpoint, and if it is sharded the weights in its shards, too."""
    file = folder / "optimizer.pt"
    if not file.exists():
        file = folder.with_suffix(".pt")
        dcp_to_torch_save(folder / SHARDS, file)
    leaves = tree_leaves(torch.load(file, weights_only=True))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert tensors, f"no optimizer in {folder}"
    return tensors


def soak(kills: int, ranks: int, seed: int, extra: list[str], folder: Path) -> int:
    """The whole: prints a line for every kill and the outcome; returns the number of runs that came out different."""
    for module in LATE:
        importlib.import_module(module)
    rng, log, whole = random.Random(seed), folder / "log.txt", folder / "whole"
    # The picture takes longer than an iteration, and a kill while it is drawn finds nothing to lose.
    record.draw_curves = lambda metrics, picture: None
    end(start(flags_of(whole, [*extra, "--iterations", "1"]), ranks, log))  # puts the warm start into the cache
    if not (whole / "result.json").exists():
        raise SystemExit(f"the run does not finish even when it is left alone:\n{log.read_text()[-3000:]}")
    shutil.rmtree(whole)
    _, duration = end(start(flags_of(whole, extra), ranks, log))
    print(f"{ranks} rank(s); the run left alone takes {duration:.1f} s of CPU time")
    print(f"{'kill':>4} {'run':>3} {'signal':7} {'after s':>7} {'ended s':>7}  how the ranks ended, newest checkpoint")

    killed, wrong, number = 0, 0, 0
    while killed < kills:
        number += 1
        out = folder / f"run-{number}"
        while not (out / "result.json").exists():
            pids, moment = start(flags_of(out, extra), ranks, log), rng.uniform(0, duration)
            kind = (signal.SIGKILL, signal.SIGTERM)[killed % 2]
            if killed < kills:
                wait(pids[0], moment)
                send(kind, pids if kind == signal.SIGTERM else [rng.choice(pids)])
            hit = time.monotonic()
            codes, _ = end(pids)
            if killed < kills and any(codes):
                killed += 1
                newest = checkpoints(out)[-1].name if checkpoints(out) else "none"
                seconds = time.monotonic() - hit
                print(
                    f"{killed:4} {number:3} {kind.name:7} {moment:7.2f} {seconds:7.2f}  {codes}, {newest}", flush=True
                )
            elif any(codes):
                raise SystemExit(f"the run fails without being killed, see {log}:\n{log.read_text()[-3000:]}")
        if different := differences(whole, out):
            wrong += 1
            print(f"run {number} is different: {', '.join(different)}")
    equal = "metrics, weights and optimizer equal to the run left alone, bit for bit"
    print(f"{killed} kills in {number} runs: " + (f"{wrong} runs are DIFFERENT" if wrong else equal))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("flags", nargs="*", help="after --: more flags for train.py")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(options.kills, options.ranks, options.seed, options.flags, Path(folder))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
